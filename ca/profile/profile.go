// Package profile is the certificate profile as code: every certificate that
// this project issues is built here, as a TBS, and nowhere else.
//
// Data flows one way: a spec (who, which key, when) → a template → a
// throw-away signature → lints → a TBS → the hardware's signature → a
// certificate whose TBSCertificate octets are the linted ones.
//
// The package promises that a TBS that exists has passed every lint of the
// registry and every rule of the profile, and that Sign puts a signature on
// exactly those octets. It trusts the caller for the truth of the identity.
// It holds no key and knows no token: a Signer is lent to it for one call.
package profile

import (
	"context"
	"crypto"
	"crypto/x509/pkix"
	"math/big"
	"time"
)

// Signer makes one signature in hardware; hsm.Key is one. The signature has
// been verified by the signer: this package does not verify it again.
type Signer interface {
	Public() crypto.PublicKey
	SignContext(ctx context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error)
}

// Kind is a role in the certificate hierarchy.
type Kind string

// The kinds of certificate a ceremony makes. Leaf certificates have their own
// spec.
const (
	// Root: self-signed, CA:TRUE, pathLen from the spec, certSign|cRLSign, no
	// EKU (contract: Fulcio roots).
	Root Kind = "root"
	// Intermediate: CA:TRUE pathLen 0, certSign|cRLSign, EKU codeSigning not critical.
	Intermediate Kind = "intermediate"
	// TSARoot: self-signed like Root, for timestamping alone.
	TSARoot Kind = "tsa-root"
	// TSA: end entity, digitalSignature, EKU timeStamping only and critical.
	TSA Kind = "tsa"
)

// AuthoritySpec asks for a certificate of the hierarchy.
type AuthoritySpec struct {
	Kind    Kind
	Subject pkix.Name
	// Serial is positive and at most 20 octets; it carries at least 64
	// unpredictable bits.
	Serial              *big.Int
	Public              crypto.PublicKey // *ecdsa.PublicKey, P-256 or P-384
	NotBefore, NotAfter time.Time        // whole seconds, UTC
	PathLen             int              // for Root and TSARoot; an Intermediate's is 0
}
