package hsm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	_ "crypto/sha512" // the hash of P-384
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// ErrWrapped: a wrapped key is not intact, not for this token, or not what the
// caller expects. Nothing was restored.
var ErrWrapped = errors.New("wrapped key refused")

// Backup is a Token whose keys can be wrapped for one other token, and
// restored in it. The two hold one wrapping key, which their security officers
// made (see Pairing); a wrapped key is useless anywhere else. It is safe for
// concurrent use.
//
// A backup is worth what its restore proves: a ceremony wraps, restores into
// the second token, and keeps the Evidence that Restore returns.
type Backup interface {
	Token
	// Wrap gives key, encrypted by the token under the wrapping key that
	// pairing names (AES-KWP, RFC 5649), and has key sign what it gives.
	//
	// It refuses with ErrPolicy before the token is asked a key whose role
	// may not be backed up, a key that the token would let out under any
	// other wrapping key (CKA_WRAP_WITH_TRUSTED is not set), and a wrapping
	// key that the security officer did not mark as trusted or that could
	// decrypt. Errors also: ErrNotFound (no such wrapping key), ErrMismatch
	// (another one of that name), ErrUnsupported, ErrLost, ErrBusy.
	Wrap(ctx context.Context, key Key, role Role, pairing Pairing) (Wrapped, error)
	// Restore puts the wrapped key into the token for role, never extractable
	// again, and proves its use: it signs, the signature verifies with the
	// public key that hashes to spki, and Evidence says Restored.
	//
	// spki is what the caller knows the key by; wrapped is foreign until its
	// signature verifies with that key (ErrWrapped, see Wrapped.Verify). It
	// refuses an id or label that exists (ErrExists). A restore that was
	// interrupted is finished by restoring again; until then the error says
	// which half is in the token. Errors also: ErrPolicy, ErrNotFound and
	// ErrMismatch for the wrapping key, ErrWrapped from the token, ErrLost.
	Restore(ctx context.Context, wrapped Wrapped, role Role, spki [sha256.Size]byte) (Key, Evidence, error)
}

// Device names a token in records that outlive it.
type Device struct {
	Label        string `json:"label"`
	Manufacturer string `json:"manufacturer"`
	Model        string `json:"model"`
	Serial       string `json:"serial"`
}

// Device returns what of t is the device's own.
func (t TokenInfo) Device() Device {
	return Device{Label: t.Label, Manufacturer: t.Manufacturer, Model: t.Model, Serial: t.Serial}
}

// WrappingKey names the wrapping key of a pair of tokens: the same AES-256 key
// with the same names in both.
type WrappingKey struct {
	// Label is the CKA_LABEL in both tokens.
	Label string `json:"label"`
	// ID is the CKA_ID in both, in hexadecimal: the first 16 octets of the
	// SHA-256 of the two points that were exchanged, the source's first.
	ID string `json:"id"`
	// Check is the CKA_CHECK_VALUE in both (PKCS #11 v2.40, Section 4.10.2),
	// in hexadecimal: 3 octets, enough to tell two keys apart by mistake.
	Check string `json:"check"`
}

// Pairing records that two tokens share a wrapping key. It holds no secret.
type Pairing struct {
	Time time.Time   `json:"time"`
	Key  WrappingKey `json:"key"`
	// Source can wrap with the key and not unwrap; Target the reverse.
	Source Device `json:"source"`
	Target Device `json:"target"`
	// SourcePoint and TargetPoint are the points (SEC 1, Section 2.3.3,
	// uncompressed, P-384) that were exchanged.
	SourcePoint []byte `json:"sourcePoint"`
	TargetPoint []byte `json:"targetPoint"`
}

// WrappedFormat is the Format of a Wrapped.
const WrappedFormat = "chancery wrapped key v1"

// MechanismAESKWP is the mechanism of a Wrapped: AES key wrap with padding
// (RFC 5649), PKCS #11 mechanism 0x210A.
const MechanismAESKWP = "CKM_AES_KEY_WRAP_PAD"

// Wrapped is a private key, encrypted for one token, with what is needed to
// restore it and to know it. It may be copied and published: it is worth what
// the two tokens' wrapping key is worth.
//
// AES-KWP protects Octets alone. Signature, by the wrapped key itself over
// everything else, protects the rest; who changes a field and signs anew has
// another key, which the caller's SPKI hash refuses.
type Wrapped struct {
	Format    string      `json:"format"`
	Time      time.Time   `json:"time"` // UTC, whole seconds
	Role      Role        `json:"role"`
	Label     string      `json:"label"`
	ID        string      `json:"id"` // hexadecimal, IDSize octets
	Algorithm Algorithm   `json:"algorithm"`
	SPKI      string      `json:"spkiSHA256"` // hexadecimal
	PublicKey []byte      `json:"publicKey"`  // DER SubjectPublicKeyInfo
	Source    Device      `json:"source"`
	Key       WrappingKey `json:"wrappingKey"`
	Mechanism string      `json:"mechanism"`
	Octets    []byte      `json:"octets"` // AES-KWP of the PKCS #8 PrivateKeyInfo
	// Signature is an ASN.1 DER ECDSA signature over Digest.
	Signature []byte `json:"signature"`
}

// The limits of a wrapped key, in octets. An AES-KWP output is two blocks of 8
// at least, and a PKCS #8 EC key with its public half is below 256.
const (
	maxWrapped       = 16 << 10
	minWrappedOctets = 16
	maxWrappedOctets = 1024
)

// signedPrefix comes before the signed octets and keeps them apart from
// anything else that a key of ours signs.
const signedPrefix = "chancery wrapped key signed by itself\n"

// Marshal writes w as one line of JSON, the only form that ParseWrapped takes.
func (w Wrapped) Marshal() ([]byte, error) {
	text, err := json.Marshal(w)
	if err != nil {
		return nil, fmt.Errorf("encode wrapped key: %w", err)
	}
	return append(text, '\n'), nil
}

// ParseWrapped reads what Marshal wrote: at most 16 KiB, and octet for octet
// the form that Marshal gives, so that no two files are one wrapped key. It
// checks form alone; Verify says whether it is genuine. Errors: ErrWrapped.
func ParseWrapped(text []byte) (Wrapped, error) {
	if len(text) > maxWrapped {
		return Wrapped{}, fmt.Errorf("parse wrapped key: %d octets, want at most %d: %w", len(text), maxWrapped, ErrWrapped)
	}
	var w Wrapped
	if err := json.Unmarshal(text, &w); err != nil {
		return Wrapped{}, fmt.Errorf("parse wrapped key: %w (%w)", ErrWrapped, err)
	}
	again, err := w.Marshal()
	if err != nil || !bytes.Equal(again, text) {
		return Wrapped{}, fmt.Errorf("parse wrapped key: not the form that is written: %w", ErrWrapped)
	}
	return w, nil
}

// Digest is what the wrapped key signs: the hash of its algorithm over a prefix
// and w's JSON without Signature. It is ErrWrapped for an unknown algorithm.
func (w Wrapped) Digest() ([]byte, error) {
	hash := w.Algorithm.Hash()
	if hash == 0 {
		return nil, fmt.Errorf("algorithm %.40q: %w", w.Algorithm, ErrWrapped)
	}
	w.Signature = nil
	text, err := w.Marshal()
	if err != nil {
		return nil, err
	}
	h := hash.New()
	h.Write([]byte(signedPrefix))
	h.Write(text)
	return h.Sum(nil), nil
}

// Verify says whether w is the key that hashes to spki, wrapped for role, and
// as it was when that key signed it. It needs no token. Errors: ErrPolicy (the
// role allows no restored key), ErrWrapped.
func (w Wrapped) Verify(role Role, spki [sha256.Size]byte) error {
	if err := CheckBackup(role); err != nil {
		return err
	}
	if err := w.check(role, spki); err != nil {
		return fmt.Errorf("%w: %w", err, ErrWrapped)
	}
	pub, err := w.public()
	if err != nil {
		return err
	}
	digest, err := w.Digest()
	if err != nil {
		return err
	}
	if err := Verify(pub, digest, w.Signature); err != nil {
		return fmt.Errorf("signature of the wrapped key: %w", ErrWrapped)
	}
	return nil
}

// CheckBackup is ErrPolicy unless keys of the role may be wrapped and restored.
// RoleNone, the look at a key without a role, may not.
func CheckBackup(role Role) error {
	if policy := role.Policy(); role == RoleNone || !policy.Restored || !policy.Extractable {
		return fmt.Errorf("role %.40q has no backup: %w", role, ErrPolicy)
	}
	return nil
}

// check compares w's plain fields with what they must be.
func (w Wrapped) check(role Role, spki [sha256.Size]byte) error {
	switch n := len(w.Octets); {
	case w.Format != WrappedFormat:
		return fmt.Errorf("format %.40q", w.Format)
	case w.Mechanism != MechanismAESKWP:
		return fmt.Errorf("mechanism %.40q", w.Mechanism)
	case w.Role != role:
		return fmt.Errorf("role %.40q, want %s", w.Role, role)
	case n < minWrappedOctets || n > maxWrappedOctets || n%8 != 0:
		return fmt.Errorf("%d wrapped octets", n)
	case w.SPKI != hex.EncodeToString(spki[:]):
		return fmt.Errorf("spki %.64q, want %x", w.SPKI, spki)
	case sha256.Sum256(w.PublicKey) != spki:
		return errors.New("public key does not hash to its spki")
	}
	spec, err := w.Spec()
	if err == nil {
		err = CheckSpec(spec)
	}
	return err
}

// Spec returns what Generate would be asked for to make the like of w. The
// restored key is not extractable.
func (w Wrapped) Spec() (Spec, error) {
	id, err := hex.DecodeString(w.ID)
	if err != nil {
		return Spec{}, fmt.Errorf("id %.40q: %w", w.ID, ErrWrapped)
	}
	return Spec{Label: w.Label, ID: id, Algorithm: w.Algorithm}, nil
}

// public parses PublicKey, which must be of w's algorithm.
func (w Wrapped) public() (*ecdsa.PublicKey, error) {
	parsed, err := x509.ParsePKIXPublicKey(w.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("public key: %w (%w)", ErrWrapped, err)
	}
	if algorithm, err := AlgorithmOf(parsed); err != nil || algorithm != w.Algorithm {
		return nil, fmt.Errorf("public key is not %.40q: %w", w.Algorithm, ErrWrapped)
	}
	return parsed.(*ecdsa.PublicKey), nil
}
