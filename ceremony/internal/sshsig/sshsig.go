// Package sshsig verifies and makes SSH signatures of files, as
// "ssh-keygen -Y sign" makes them (OpenSSH, PROTOCOL.sshsig), with ssh-ed25519
// keys alone.
//
// It promises that a signature is of this message, in this namespace, by this
// key, and that only one octet string is accepted for each: everything in a
// signature is compared with what it must be, and nothing may follow. It uses
// crypto/ed25519 and no SSH implementation.
package sshsig

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha512"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// Errors that callers branch on.
var (
	// ErrFormat: not an armored SSH signature, or not a public key line.
	ErrFormat = errors.New("malformed")
	// ErrSignature: well-formed, and not a signature of this message in this
	// namespace by this key.
	ErrSignature = errors.New("signature does not verify")
)

// MaxArmored is the largest armored signature that is read, in octets. One by
// an ssh-ed25519 key has about 300.
const MaxArmored = 4096

const (
	algorithm = "ssh-ed25519"
	hashName  = "sha512"
	magic     = "SSHSIG"
	begin     = "-----BEGIN SSH SIGNATURE-----"
	end       = "-----END SSH SIGNATURE-----"
	lineWidth = 70 // of ssh-keygen
)

// PublicKey is an ssh-ed25519 public key (RFC 8709, Section 4).
type PublicKey struct{ key ed25519.PublicKey }

// NewPublicKey wraps a key of ed25519.PublicKeySize octets.
func NewPublicKey(key ed25519.PublicKey) (PublicKey, error) {
	if len(key) != ed25519.PublicKeySize {
		return PublicKey{}, fmt.Errorf("public key of %d octets: %w", len(key), ErrFormat)
	}
	return PublicKey{bytes.Clone(key)}, nil
}

// ParsePublicKey reads a line as in an authorized_keys file without options:
// the algorithm, the key in base64, and a comment that is ignored.
func ParsePublicKey(line string) (PublicKey, error) {
	fields := strings.Fields(line)
	if len(fields) < 2 || fields[0] != algorithm {
		return PublicKey{}, fmt.Errorf("want a line that begins with %s: %w", algorithm, ErrFormat)
	}
	blob, err := base64.StdEncoding.Strict().DecodeString(fields[1])
	if err != nil {
		return PublicKey{}, fmt.Errorf("want base64: %w", ErrFormat)
	}
	r := reader{rest: blob}
	name, key := r.string(), r.string()
	if r.failed || len(r.rest) > 0 || string(name) != algorithm || len(key) != ed25519.PublicKeySize {
		return PublicKey{}, fmt.Errorf("not an %s key: %w", algorithm, ErrFormat)
	}
	return PublicKey{key}, nil
}

// blob is the key's wire form.
func (k PublicKey) blob() []byte { return appendString(appendString(nil, []byte(algorithm)), k.key) }

// String gives the line that ParsePublicKey reads, without a comment.
func (k PublicKey) String() string {
	return algorithm + " " + base64.StdEncoding.EncodeToString(k.blob())
}

// Equal says whether both are the same key.
func (k PublicKey) Equal(other PublicKey) bool { return bytes.Equal(k.key, other.key) }

// Verify checks an armored signature. Errors: ErrFormat, ErrSignature.
func (k PublicKey) Verify(message []byte, namespace string, armored []byte) error {
	raw, err := unarmor(armored)
	if err != nil {
		return err
	}
	rest, ok := bytes.CutPrefix(raw, []byte(magic))
	if !ok {
		return fmt.Errorf("no %s preamble: %w", magic, ErrFormat)
	}
	r := reader{rest: rest}
	version, blob, space := r.uint32(), r.string(), r.string()
	reserved, hash, outer := r.string(), r.string(), r.string()
	if r.failed || len(r.rest) > 0 || version != 1 {
		return fmt.Errorf("not a version 1 signature: %w", ErrFormat)
	}
	inner := reader{rest: outer}
	name, sig := inner.string(), inner.string()
	switch {
	case inner.failed || len(inner.rest) > 0:
		return fmt.Errorf("signature blob: %w", ErrFormat)
	case string(name) != algorithm || len(sig) != ed25519.SignatureSize:
		return fmt.Errorf("algorithm %.40q, want %s: %w", name, algorithm, ErrSignature)
	case !bytes.Equal(blob, k.blob()):
		return fmt.Errorf("made by another key: %w", ErrSignature)
	case string(space) != namespace:
		return fmt.Errorf("namespace %.80q, want %s: %w", space, namespace, ErrSignature)
	case len(reserved) > 0:
		return fmt.Errorf("reserved field is not empty: %w", ErrSignature)
	case string(hash) != hashName:
		return fmt.Errorf("hash %.20q, want %s: %w", hash, hashName, ErrSignature)
	case !ed25519.Verify(k.key, signed(message, namespace), sig):
		return ErrSignature
	}
	return nil
}

// Sign makes what Verify accepts. It exists for rehearsals; people sign with
// ssh-keygen.
func Sign(key ed25519.PrivateKey, message []byte, namespace string) ([]byte, error) {
	if len(key) != ed25519.PrivateKeySize {
		return nil, fmt.Errorf("private key of %d octets: %w", len(key), ErrFormat)
	}
	public := PublicKey{key.Public().(ed25519.PublicKey)}
	raw := binary.BigEndian.AppendUint32([]byte(magic), 1)
	raw = appendString(raw, public.blob())
	raw = appendString(raw, []byte(namespace))
	raw = appendString(raw, nil)
	raw = appendString(raw, []byte(hashName))
	sig := ed25519.Sign(key, signed(message, namespace))
	raw = appendString(raw, appendString(appendString(nil, []byte(algorithm)), sig))
	return armor(raw), nil
}

// signed is what the key signs.
func signed(message []byte, namespace string) []byte {
	sum := sha512.Sum512(message)
	out := appendString([]byte(magic), []byte(namespace))
	out = appendString(out, nil)
	out = appendString(out, []byte(hashName))
	return appendString(out, sum[:])
}

func armor(raw []byte) []byte {
	var b bytes.Buffer
	b.WriteString(begin + "\n")
	text := base64.StdEncoding.EncodeToString(raw)
	for len(text) > lineWidth {
		b.WriteString(text[:lineWidth] + "\n")
		text = text[lineWidth:]
	}
	b.WriteString(text + "\n" + end + "\n")
	return b.Bytes()
}

// unarmor reads exactly what armor writes: a signature has one form, so that a
// changed octet is noticed even where it would mean the same.
func unarmor(armored []byte) ([]byte, error) {
	if len(armored) > MaxArmored {
		return nil, fmt.Errorf("%d octets, at most %d: %w", len(armored), MaxArmored, ErrFormat)
	}
	body, ok := strings.CutPrefix(string(armored), begin+"\n")
	body, ended := strings.CutSuffix(body, "\n"+end+"\n")
	if !ok || !ended {
		return nil, fmt.Errorf("no SSH SIGNATURE armor: %w", ErrFormat)
	}
	raw, err := base64.StdEncoding.Strict().DecodeString(strings.ReplaceAll(body, "\n", ""))
	if err != nil {
		return nil, fmt.Errorf("want base64: %w", ErrFormat)
	}
	if !bytes.Equal(armor(raw), armored) {
		return nil, fmt.Errorf("not in the form of ssh-keygen: %w", ErrFormat)
	}
	return raw, nil
}

// appendString appends an SSH string (RFC 4251, Section 5).
func appendString(to, s []byte) []byte {
	return append(binary.BigEndian.AppendUint32(to, uint32(len(s))), s...)
}

// reader reads SSH's data types (RFC 4251, Section 5). After a read beyond the
// end, failed is set and everything is empty.
type reader struct {
	rest   []byte
	failed bool
}

func (r *reader) uint32() uint32 {
	if r.failed || len(r.rest) < 4 {
		r.failed = true
		return 0
	}
	v := binary.BigEndian.Uint32(r.rest)
	r.rest = r.rest[4:]
	return v
}

func (r *reader) string() []byte {
	n := r.uint32()
	if r.failed || uint64(n) > uint64(len(r.rest)) {
		r.failed = true
		return nil
	}
	s := r.rest[:n]
	r.rest = r.rest[n:]
	return s
}
