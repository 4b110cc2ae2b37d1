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
//
// # A leaf is linted once and signed twice
//
// A leaf certificate has three forms that share every octet but one
// extension (RFC 6962, 3.1 to 3.3):
//
//	logged TBS      = head ‖ shared extensions
//	precertificate  = head ‖ shared extensions ‖ poison
//	final           = head ‖ shared extensions ‖ SCT list
//
// head and the shared extensions are encoded once and stored as octets; each
// form is their concatenation under recomputed lengths, so the forms cannot
// differ in anything else. The form that is linted is the final one with a
// placeholder SCT. What the hardware signs beyond the linted octets is then
// either the poison, which is a constant, or a list of one SCT, which is
// parsed, must be version 1, and is encoded by one function. No lint of the
// registry reads more of either than its presence; a test lints all forms of
// many leaves with every lint and compares the findings.
package profile

import (
	"context"
	"crypto"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"time"
)

// Errors that callers branch on. A certificate that was built and failed a
// lint or a rule gives a *LintError, which is ErrLint.
var (
	// ErrSpec: the spec is malformed: a field is missing, out of range, or
	// contradicts another or the issuer.
	ErrSpec = errors.New("certificate spec refused")
	// ErrKey: the subject public key is of a kind the profile does not allow.
	ErrKey = errors.New("public key refused")
	// ErrName: the identity cannot be written as a subject alternative name,
	// or an extension's text cannot be written as UTF-8.
	ErrName = errors.New("name refused")
	// ErrWindow: the validity is not within the issuer's. A CA near its end
	// gets this for every leaf.
	ErrWindow = errors.New("validity outside of the issuer's")
	// ErrIssuer: the issuer certificate must not issue what was asked.
	ErrIssuer = errors.New("issuer refused")
	// ErrSigner: the signer's key is not the issuer's, or what it returned is
	// not an ECDSA signature.
	ErrSigner = errors.New("signer refused")
	// ErrSCT: the octets are not one v1 SCT, or not one for this leaf.
	ErrSCT = errors.New("SCT refused")
	// ErrCorrespondence: a precertificate and a final certificate differ in
	// more than poison and SCT list (RFC 6962, 3.1).
	ErrCorrespondence = errors.New("precertificate and certificate do not correspond")
	// ErrLint: a lint or a rule failed. errors.As to *LintError gives which.
	ErrLint = errors.New("certificate profile violated")
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
	// EKU (as Fulcio's roots).
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
