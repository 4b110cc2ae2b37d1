package hsm

import (
	"crypto"
	"crypto/ecdsa"
	"fmt"
)

// Verify checks an ASN.1 DER ECDSA signature (RFC 3279, 2.2.3) over digest and
// returns ErrBadSignature if it does not verify. Every backend calls it exactly
// once per signature, before the signature is returned. It costs one software
// verification (about as long as one P-256 signature in SoftHSM).
func Verify(pub *ecdsa.PublicKey, digest, sig []byte) error {
	if !ecdsa.VerifyASN1(pub, digest, sig) {
		return ErrBadSignature
	}
	return nil
}

// CheckDigest says whether a Key with this public key can sign digest under
// opts: the hash is SHA-256, SHA-384 or SHA-512 and digest has exactly its
// size. Anything else is ErrUnsupported: a truncated or unhashed message must
// never reach a token.
func CheckDigest(digest []byte, opts crypto.SignerOpts) error {
	if opts == nil {
		return fmt.Errorf("no hash named: %w", ErrUnsupported)
	}
	switch h := opts.HashFunc(); h {
	case crypto.SHA256, crypto.SHA384, crypto.SHA512:
		if len(digest) != h.Size() {
			return fmt.Errorf("digest of %d octets for %s: %w", len(digest), h, ErrUnsupported)
		}
		return nil
	default:
		return fmt.Errorf("hash %d: %w", uint(h), ErrUnsupported)
	}
}

// CheckSpec refuses a Spec that Generate must not carry out: a label that is
// not 1 to 32 octets of printable ASCII without space, an id that is not 16
// octets, or an unknown algorithm. The error wraps ErrUnsupported.
func CheckSpec(spec Spec) error {
	if len(spec.Label) == 0 || len(spec.Label) > 32 {
		return fmt.Errorf("label of %d octets, want 1 to 32: %w", len(spec.Label), ErrUnsupported)
	}
	for _, c := range []byte(spec.Label) {
		if c <= ' ' || c > '~' {
			return fmt.Errorf("label %q: octet %#02x: %w", spec.Label, c, ErrUnsupported)
		}
	}
	if len(spec.ID) != IDSize {
		return fmt.Errorf("id of %d octets, want %d: %w", len(spec.ID), IDSize, ErrUnsupported)
	}
	if spec.Algorithm.Curve() == nil {
		return fmt.Errorf("algorithm %.40q: %w", spec.Algorithm, ErrUnsupported)
	}
	return nil
}

// IDSize is the length of a new key's id in octets.
const IDSize = 16
