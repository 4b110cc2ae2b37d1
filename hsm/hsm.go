// Package hsm says what a private key is: something that lives in a token (a
// PKCS#11 HSM or a TPM 2.0), is named by a Ref, and signs.
//
// It promises that a Key is the one that was named: it is opened by the URI of
// its Ref and by the SHA-256 of its public key, and exactly one object of the
// token fits or there is an error. It promises that no wrong signature leaves:
// every signature is verified in software with the public key before it is
// returned (a fault attack or a bit flip in an ECDSA signature can give the
// private key away).
//
// It trusts the token for the secrecy of the key and for its randomness, and
// nothing else that the token says.
//
// The package holds types and rules only and imports the standard library
// alone. hsm/pkcs11 and hsm/tpm are the backends. Keys are held only by the
// packages that sign something with a meaning (a certificate, an SCT, a tree
// head, a timestamp); none of them offers to sign a digest for a caller.
package hsm

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

// Errors that callers branch on. Backends wrap them with %w and say which
// token and key; none carries a PIN or key material.
var (
	// ErrNotFound: no object (or no token) fits the Ref.
	ErrNotFound = errors.New("not found in the token")
	// ErrAmbiguous: more than one object (or token) fits the Ref.
	ErrAmbiguous = errors.New("more than one object fits")
	// ErrMismatch: the object's public key is not the one that the Ref names.
	ErrMismatch = errors.New("public key differs from the configured one")
	// ErrExists: an object with this id or label is there already.
	ErrExists = errors.New("exists already in the token")
	// ErrLost: the session or the device went away during the call. The
	// signature was not made, or was not seen.
	ErrLost = errors.New("token lost")
	// ErrPIN: the token refused the PIN, or its flags forbid another try. It
	// is fatal for the process (exit status 77): nothing retries a login.
	ErrPIN = errors.New("PIN refused")
	// ErrBusy: the bounded queue before the token is full, or the caller's
	// context ended while waiting in it. Nothing was signed.
	ErrBusy = errors.New("token busy")
	// ErrWedged: a call into the token's library does not return. It is an
	// ErrLost for which only a restart of the process helps.
	ErrWedged = errors.New("token wedged")
	// ErrPolicy: the key's attributes or the requested operation break the
	// policy of the key's role.
	ErrPolicy = errors.New("key policy violated")
	// ErrUnsupported: the token lacks the mechanism, or the backend the scheme.
	ErrUnsupported = errors.New("not supported")
	// ErrBadSignature: the token returned a signature that does not verify.
	// The signature is destroyed; the token should be taken out of service.
	ErrBadSignature = errors.New("token returned a wrong signature")
)

// Ref names one key pair. The zero Ref names none.
type Ref struct {
	// URI is "pkcs11:token=…;object=…;id=%…" (RFC 7512) or
	// "tpm2:path-or-handle?device=…". It never contains a PIN.
	URI string
	// SPKI is the SHA-256 of the DER SubjectPublicKeyInfo (RFC 5280, 4.1.2.7).
	SPKI [sha256.Size]byte
}

// Scheme returns the URI's scheme, "pkcs11" or "tpm2", or "" if there is none.
func (r Ref) Scheme() string {
	scheme, _, ok := strings.Cut(r.URI, ":")
	if !ok {
		return ""
	}
	return scheme
}

// String gives the URI and the first 8 octets of the SPKI hash, for people.
func (r Ref) String() string {
	return fmt.Sprintf("%s (spki %x…)", r.URI, r.SPKI[:8])
}

// ParseSPKIHash reads the 64 hexadecimal digits of a Ref's SPKI hash.
func ParseSPKIHash(s string) ([sha256.Size]byte, error) {
	var h [sha256.Size]byte
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(h) {
		return h, fmt.Errorf("spki-sha256 %.80q: want 64 hexadecimal digits", s)
	}
	return [sha256.Size]byte(b), nil
}

// SPKIHash returns the SHA-256 of the DER SubjectPublicKeyInfo of pub.
func SPKIHash(pub crypto.PublicKey) ([sha256.Size]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return [sha256.Size]byte{}, fmt.Errorf("encode public key: %w", err)
	}
	return sha256.Sum256(der), nil
}

// Key is a private key in a token. It is safe for concurrent use.
//
// Sign and SignContext take a digest of exactly opts.HashFunc().Size() octets
// and return an ASN.1 DER ECDSA signature (RFC 3279, 2.2.3) that has been
// verified with Public. Sign ignores its io.Reader: the token has its own
// randomness. They fail with ErrBusy, ErrLost, ErrBadSignature or ErrPIN.
// When ctx ends first SignContext returns ErrBusy (still queued) or ErrLost
// (the token was asked and has not answered); the result is then discarded.
type Key interface {
	crypto.Signer
	SignContext(ctx context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error)
	// Ref returns the name under which the key was opened.
	Ref() Ref
}

// Token is a device, logged in. It is safe for concurrent use.
type Token interface {
	// Info describes the token as it presents itself.
	Info() TokenInfo
	// Open finds the key that ref names: one object fits, its public key has
	// ref.SPKI, its attributes satisfy role.Policy(). The calls of the Key go
	// in role.Share(). Errors: ErrNotFound, ErrAmbiguous, ErrMismatch,
	// ErrPolicy.
	Open(ctx context.Context, ref Ref, role Role) (Key, error)
	// Find opens the one key pair with the given id (CKA_ID) without knowing
	// its public key, for RoleNone; it is how an interrupted ceremony looks for
	// what its intent record announced. Errors: ErrNotFound, ErrAmbiguous,
	// ErrPolicy.
	Find(ctx context.Context, id []byte) (Key, error)
	// Generate makes a key pair in the token with every attribute explicit,
	// reads it back, checks it against spec, and proves it (SelfTest). The Key
	// is open for RoleNone. It refuses an id or label that exists (ErrExists).
	Generate(ctx context.Context, spec Spec) (Key, error)
	// Evidence reads every attribute of key one by one and signs the text of
	// a Proof with it: one signature, so it is cheap on a slow token.
	Evidence(ctx context.Context, key Key) (Evidence, error)
	// Random returns n octets of the device's own randomness, 1 ≤ n ≤ 1024.
	Random(ctx context.Context, n int) ([]byte, error)
	// Keys counts the private keys on the token, to check that it is empty.
	Keys(ctx context.Context) (int, error)
	// Err says without touching the device why calls fail now: nil (they do
	// not), ErrBusy (the token is being reopened), ErrWedged (the process
	// should be restarted), ErrPIN (it should not), or ErrLost (closed).
	Err() error
	// Close logs out and releases the device. Keys of it fail with ErrLost.
	// Closing twice is harmless.
	Close() error
}

// Algorithm is a key type. Its values are the names used in ceremony
// definitions and evidence.
type Algorithm string

// The algorithms of our roles: P-256 with SHA-256, P-384 with SHA-384.
const (
	ECDSAP256 Algorithm = "ecdsa-p256"
	ECDSAP384 Algorithm = "ecdsa-p384"
)

// Curve returns the algorithm's curve, or nil for an unknown one.
func (a Algorithm) Curve() elliptic.Curve {
	switch a {
	case ECDSAP256:
		return elliptic.P256()
	case ECDSAP384:
		return elliptic.P384()
	}
	return nil
}

// Hash returns the digest that goes with the algorithm, or 0 for an unknown one.
func (a Algorithm) Hash() crypto.Hash {
	switch a {
	case ECDSAP256:
		return crypto.SHA256
	case ECDSAP384:
		return crypto.SHA384
	}
	return 0
}

// AlgorithmOf returns the algorithm of a public key, or ErrUnsupported.
func AlgorithmOf(pub crypto.PublicKey) (Algorithm, error) {
	if k, ok := pub.(*ecdsa.PublicKey); ok {
		switch k.Curve {
		case elliptic.P256():
			return ECDSAP256, nil
		case elliptic.P384():
			return ECDSAP384, nil
		}
	}
	return "", fmt.Errorf("key type %T: %w", pub, ErrUnsupported)
}

// Spec asks for a new key pair.
type Spec struct {
	// Label is the CKA_LABEL, 1 to 32 octets of printable ASCII without space.
	Label string
	// ID is the CKA_ID, 16 random octets chosen before generation so that an
	// interrupted generation can be found again.
	ID []byte
	// Algorithm is the key type.
	Algorithm Algorithm
	// Extractable allows wrapping for backup, under a wrapping key alone that
	// the token's security officer made trusted (see Backup); SENSITIVE is set
	// regardless. Only a role whose policy says so may have it.
	Extractable bool
}
