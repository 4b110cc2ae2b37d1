package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
)

// Errors of a proof of possession, one for each row of Fulcio's error table. An
// algorithm that is not allowed gives an *AlgorithmError.
var (
	// ErrPublicKey: no public key, or one that cannot be read.
	ErrPublicKey = errors.New("public key cannot be parsed")
	// ErrWeakKey: a key of an insecure kind or size.
	ErrWeakKey = errors.New("public key is insecure")
	// ErrProof: the signature is not by the key, or not over a challenge.
	ErrProof = errors.New("proof of possession does not verify")
	// ErrCSR: the certificate signing request cannot be read.
	ErrCSR = errors.New("certificate signing request cannot be parsed")
)

// AlgorithmError is a pair of key type and hash that is not on the allow list, or
// a request's signature algorithm that is none of the list. Its text may be shown
// to the client.
type AlgorithmError struct {
	Key  string // the key's Go type, as Fulcio names it: "*ecdsa.PublicKey"
	Hash crypto.Hash
	// Signature is an algorithm that goes with no key of the list; then Key and
	// Hash are empty. Else it is zero.
	Signature x509.SignatureAlgorithm
}

// Error gives Fulcio's sentence.
func (e *AlgorithmError) Error() string {
	if e.Signature != x509.UnknownSignatureAlgorithm {
		return fmt.Sprintf("unrecognized signature algorithm: %s", e.Signature)
	}
	return fmt.Sprintf("signing algorithm not permitted: %s, %s", e.Key, e.Hash)
}

// Bounds of what a request may contain, in octets.
const (
	maxPublicKey = 16 << 10
	maxCSR       = 64 << 10
	maxProof     = 2 << 10
)

// ProveKey reads a public key, PEM or DER SubjectPublicKeyInfo, and checks that
// proof is a signature by it over the UTF-8 octets of one of the challenges
// (Fulcio 1.8, pkg/challenges): ECDSA P-256, P-384 or P-521 with SHA-256, SHA-384 or
// SHA-512, in ASN.1; RSA of 2048, 3072 or 4096 bits, PKCS #1 v1.5 with
// SHA-256; pure Ed25519. Errors: ErrPublicKey, ErrWeakKey, ErrProof.
func ProveKey(content string, proof []byte, challenges []string) (crypto.PublicKey, error) {
	pub, err := parsePublicKey(content)
	if err != nil {
		return nil, err
	}
	if err := checkStrength(pub); err != nil {
		return nil, err
	}
	if len(proof) == 0 || len(proof) > maxProof {
		return nil, ErrProof
	}
	if !slices.ContainsFunc(challenges, func(c string) bool { return verifies(pub, []byte(c), proof) }) {
		return nil, ErrProof
	}
	return pub, nil
}

// ProveCSR reads a PEM certificate signing request (RFC 2986), whose own
// signature is the proof. Nothing else of it counts. Errors: ErrCSR,
// ErrWeakKey, ErrProof, *AlgorithmError.
func ProveCSR(csr []byte) (crypto.PublicKey, error) {
	if len(csr) > maxCSR {
		return nil, fmt.Errorf("%w: too long", ErrCSR)
	}
	block, rest := pem.Decode(csr)
	if block == nil || (block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST") {
		return nil, fmt.Errorf("%w: not PEM", ErrCSR)
	}
	if len(bytes.TrimSpace(rest)) > 0 {
		return nil, fmt.Errorf("%w: more than one PEM block", ErrCSR)
	}
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCSR, err)
	}
	if err := checkStrength(request.PublicKey); err != nil {
		return nil, err
	}
	if err := request.CheckSignature(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProof, err)
	}
	hash, ok := signatureHash(request.SignatureAlgorithm)
	if !ok {
		return nil, &AlgorithmError{Signature: request.SignatureAlgorithm}
	}
	if want, ok := allowedHash(request.PublicKey); !ok || hash != want {
		return nil, &AlgorithmError{Key: fmt.Sprintf("%T", request.PublicKey), Hash: hash}
	}
	return request.PublicKey, nil
}

func parsePublicKey(content string) (crypto.PublicKey, error) {
	if content == "" || len(content) > maxPublicKey {
		return nil, fmt.Errorf("%w: absent or too long", ErrPublicKey)
	}
	der := []byte(content)
	if block, rest := pem.Decode(der); block != nil {
		if block.Type != "PUBLIC KEY" && block.Type != "RSA PUBLIC KEY" || len(bytes.TrimSpace(rest)) > 0 {
			return nil, fmt.Errorf("%w: not one PEM public key", ErrPublicKey)
		}
		if block.Type == "RSA PUBLIC KEY" {
			pub, err := x509.ParsePKCS1PublicKey(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("%w: %w", ErrPublicKey, err)
			}
			return pub, nil
		}
		der = block.Bytes
	}
	pub, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrPublicKey, err)
	}
	return pub, nil
}

// checkStrength refuses keys that nobody should sign with.
func checkStrength(pub crypto.PublicKey) error {
	switch key := pub.(type) {
	case *rsa.PublicKey:
		return checkRSA(key)
	case ed25519.PublicKey:
		return checkEd25519(key)
	}
	if _, ok := allowedHash(pub); !ok {
		return fmt.Errorf("%w: kind %T", ErrWeakKey, pub)
	}
	return nil
}

// allowedHash is the allow list: the one hash that goes with a kind of key (0
// for Ed25519, which hashes for itself).
func allowedHash(pub crypto.PublicKey) (crypto.Hash, bool) {
	switch key := pub.(type) {
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256():
			return crypto.SHA256, true
		case elliptic.P384():
			return crypto.SHA384, true
		case elliptic.P521():
			return crypto.SHA512, true
		}
	case *rsa.PublicKey:
		return crypto.SHA256, true
	case ed25519.PublicKey:
		return 0, true
	}
	return 0, false
}

// verifies checks a signature over message with the key's default scheme.
func verifies(pub crypto.PublicKey, message, signature []byte) bool {
	hash, ok := allowedHash(pub)
	if !ok {
		return false
	}
	if key, ok := pub.(ed25519.PublicKey); ok {
		return ed25519.Verify(key, message, signature)
	}
	h := hash.New()
	h.Write(message)
	digest := h.Sum(nil)
	switch key := pub.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(key, digest, signature)
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(key, hash, digest, signature) == nil
	}
	return false
}

// signatureHash is the hash of a CSR's signature; ok is false for one that no key
// of the allow list makes, such as RSA-PSS.
func signatureHash(a x509.SignatureAlgorithm) (hash crypto.Hash, ok bool) {
	switch a {
	case x509.ECDSAWithSHA256, x509.SHA256WithRSA:
		return crypto.SHA256, true
	case x509.ECDSAWithSHA384, x509.SHA384WithRSA:
		return crypto.SHA384, true
	case x509.ECDSAWithSHA512, x509.SHA512WithRSA:
		return crypto.SHA512, true
	case x509.PureEd25519:
		return 0, true
	}
	return 0, false
}
