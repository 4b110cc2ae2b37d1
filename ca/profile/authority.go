package profile

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"time"
)

// TBS is a TBSCertificate that has passed every lint and rule, waiting for
// its signature. It is immutable and safe for concurrent use.
type TBS struct {
	raw       []byte
	algorithm *algorithm
	issuerKey crypto.PublicKey
}

// Raw returns the DER TBSCertificate, the octets that Sign signs. The caller
// gets a copy.
func (t *TBS) Raw() []byte { return bytes.Clone(t.raw) }

// Sign has s sign the TBS and returns the DER Certificate, whose
// TBSCertificate octets are Raw. It makes exactly one signature and does not
// verify it: s has. Errors: ErrSigner, and those of s.
func (t *TBS) Sign(ctx context.Context, s Signer) ([]byte, error) {
	return sign(ctx, s, t.raw, t.algorithm, t.issuerKey)
}

// sign is the one place where a hardware signature is put on a TBS.
func sign(ctx context.Context, s Signer, tbs []byte, alg *algorithm, issuerKey crypto.PublicKey) ([]byte, error) {
	if !sameKey(s.Public(), issuerKey) {
		return nil, fmt.Errorf("%w: its key is not the issuer's", ErrSigner)
	}
	h := alg.hash.New()
	h.Write(tbs)
	signature, err := s.SignContext(ctx, h.Sum(nil), alg.hash)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	if len(signature) == 0 {
		return nil, fmt.Errorf("%w: empty signature", ErrSigner)
	}
	return assemble(tbs, alg, signature)
}

// sameKey compares two ECDSA public keys.
func sameKey(a, b crypto.PublicKey) bool {
	k, ok := a.(*ecdsa.PublicKey)
	return ok && k != nil && k.Equal(b)
}

// NewAuthority builds and lints the certificate that spec asks for. Root and
// TSARoot are self-signed (issuer nil); an Intermediate is issued by a Root, a
// TSA by a TSARoot or a Root. It makes no signature but the throw-away one.
//
// Errors: ErrSpec, ErrKey, ErrIssuer, ErrWindow, ErrLint.
func NewAuthority(spec AuthoritySpec, issuer *x509.Certificate) (*TBS, error) {
	if err := checkSpec(spec, issuer); err != nil {
		return nil, err
	}
	tmpl, issuerKey, err := authorityTemplate(spec, issuer)
	if err != nil {
		return nil, err
	}
	b, err := tmpl.encode()
	if err != nil {
		return nil, err
	}
	raw, err := b.tbs(nil)
	if err != nil {
		return nil, fmt.Errorf("encode TBS: %w", err)
	}
	if err := lintCopy(raw, tmpl.algorithm, &candidate{kind: spec.Kind, issuer: issuer}); err != nil {
		return nil, err
	}
	return &TBS{raw: raw, algorithm: tmpl.algorithm, issuerKey: issuerKey}, nil
}

// authorityTemplate fills the template and says whose key signs it.
func authorityTemplate(spec AuthoritySpec, issuer *x509.Certificate) (*template, crypto.PublicKey, error) {
	if _, err := algorithmOf(spec.Public); err != nil {
		return nil, nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(spec.Public)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	subject, err := asn1.Marshal(spec.Subject.ToRDNSequence())
	if err != nil {
		return nil, nil, fmt.Errorf("%w: encode subject: %w", ErrSpec, err)
	}
	issuerKey, issuerName, issuerKeyID := spec.Public, subject, []byte(nil)
	if issuer != nil {
		issuerKey, issuerName, issuerKeyID = issuer.PublicKey, issuer.RawSubject, issuer.SubjectKeyId
	}
	alg, err := algorithmOf(issuerKey)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrIssuer, err)
	}
	exts, err := authorityExtensions(spec, spki, issuerKeyID)
	if err != nil {
		return nil, nil, err
	}
	return &template{
		algorithm: alg, serial: spec.Serial, issuer: issuerName, subject: subject,
		notBefore: spec.NotBefore, notAfter: spec.NotAfter, spki: spki, extensions: exts,
	}, issuerKey, nil
}

// authorityExtensions lists them in the order of crypto/x509: key usage,
// extended key usage, basic constraints, subject and authority key identifier.
func authorityExtensions(spec AuthoritySpec, spki, issuerKeyID []byte) ([]pkix.Extension, error) {
	var exts []pkix.Extension
	var firstErr error
	add := func(e pkix.Extension, err error) {
		if err != nil && firstErr == nil {
			firstErr = fmt.Errorf("encode extension %s: %w", e.Id, err)
		}
		exts = append(exts, e)
	}
	switch spec.Kind {
	case Root, TSARoot:
		add(usageCA, nil)
		add(basicConstraintsCA(spec.PathLen))
	case Intermediate:
		add(usageCA, nil)
		add(extKeyUsage(oidCodeSigning, false))
		add(basicConstraintsCA(0))
	case TSA:
		add(usageSign, nil)
		add(extKeyUsage(oidTimeStamping, true)) // RFC 3161, 2.3
	}
	id, err := keyID(spki)
	if err != nil {
		return nil, err
	}
	add(subjectKeyID(id))
	if issuerKeyID != nil {
		add(authorityKeyID(issuerKeyID))
	}
	return exts, firstErr
}

// maxPathLen bounds a root's path length; this hierarchy needs 1.
const maxPathLen = 4

// checkSpec refuses what can be refused without building.
func checkSpec(spec AuthoritySpec, issuer *x509.Certificate) error {
	selfSigned := spec.Kind == Root || spec.Kind == TSARoot
	switch {
	case !selfSigned && spec.Kind != Intermediate && spec.Kind != TSA:
		return fmt.Errorf("%w: unknown kind %.40q", ErrSpec, spec.Kind)
	case selfSigned && issuer != nil:
		return fmt.Errorf("%w: a %s is self-signed and has no issuer", ErrSpec, spec.Kind)
	case !selfSigned && issuer == nil:
		return fmt.Errorf("%w: a %s needs an issuer", ErrSpec, spec.Kind)
	case selfSigned && (spec.PathLen < 0 || spec.PathLen > maxPathLen):
		return fmt.Errorf("%w: path length %d, want 0 to %d", ErrSpec, spec.PathLen, maxPathLen)
	case !selfSigned && spec.PathLen != 0:
		return fmt.Errorf("%w: path length of a %s must be 0", ErrSpec, spec.Kind)
	case spec.Subject.CommonName == "":
		return fmt.Errorf("%w: subject has no common name", ErrSpec)
	}
	if err := checkSerial(spec.Serial); err != nil {
		return err
	}
	if err := checkTimes(spec.NotBefore, spec.NotAfter); err != nil {
		return err
	}
	if issuer == nil {
		return nil
	}
	if err := checkIssuer(spec.Kind, issuer); err != nil {
		return err
	}
	if sameKey(spec.Public, issuer.PublicKey) {
		return fmt.Errorf("%w: it has the issuer's key", ErrSpec)
	}
	return checkWindow(spec.NotBefore, spec.NotAfter, issuer)
}

// minSerialBits: RFC 5280, 4.1.2.2 wants uniqueness, and unpredictability
// guards against collisions of the hash.
const minSerialBits = 64

// checkSerial wants a positive number of 64 to 159 bits: 20 octets at most
// when encoded (RFC 5280, 4.1.2.2).
func checkSerial(serial *big.Int) error {
	if serial == nil || serial.Sign() <= 0 || serial.BitLen() < minSerialBits || serial.BitLen() > 159 {
		return fmt.Errorf("%w: serial number must be positive and of 64 to 159 bits", ErrSpec)
	}
	return nil
}

// checkTimes wants whole seconds in order, in years that a certificate can say.
func checkTimes(notBefore, notAfter time.Time) error {
	for _, t := range []time.Time{notBefore, notAfter} {
		if y := t.UTC().Year(); y < 2000 || y > 9999 {
			return fmt.Errorf("%w: year %d", ErrSpec, y)
		}
		if t.Nanosecond() != 0 {
			return fmt.Errorf("%w: time with a fraction of a second", ErrSpec)
		}
	}
	if !notBefore.Before(notAfter) {
		return fmt.Errorf("%w: notAfter is not after notBefore", ErrSpec)
	}
	return nil
}

// checkWindow wants [notBefore, notAfter] within the issuer's validity.
func checkWindow(notBefore, notAfter time.Time, issuer *x509.Certificate) error {
	if notBefore.Before(issuer.NotBefore) || notAfter.After(issuer.NotAfter) {
		return fmt.Errorf("%w: %s to %s, issuer %s to %s", ErrWindow,
			notBefore.UTC().Format(time.RFC3339), notAfter.UTC().Format(time.RFC3339),
			issuer.NotBefore.UTC().Format(time.RFC3339), issuer.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// checkIssuer says whether issuer may issue a certificate of kind (RFC 5280,
// 4.2.1.3, 4.2.1.9, 4.2.1.12).
func checkIssuer(kind Kind, issuer *x509.Certificate) error {
	purpose := x509.ExtKeyUsageCodeSigning
	if kind == TSA {
		purpose = x509.ExtKeyUsageTimeStamping
	}
	switch {
	case !issuer.BasicConstraintsValid || !issuer.IsCA:
		return fmt.Errorf("%w: it is not a CA", ErrIssuer)
	case issuer.KeyUsage&x509.KeyUsageCertSign == 0:
		return fmt.Errorf("%w: its key usage lacks keyCertSign", ErrIssuer)
	case len(issuer.SubjectKeyId) == 0:
		return fmt.Errorf("%w: it has no subject key identifier", ErrIssuer)
	case len(issuer.RawSubject) == 0 || issuer.Subject.CommonName == "":
		return fmt.Errorf("%w: it has no subject", ErrIssuer)
	case !allows(issuer, purpose):
		return fmt.Errorf("%w: its extended key usage does not allow what is asked", ErrIssuer)
	case kind == Intermediate && issuer.MaxPathLen == 0:
		return fmt.Errorf("%w: its path length allows no CA below it", ErrIssuer)
	}
	return nil
}

// allows: no extended key usage at all, or one that names the purpose.
func allows(issuer *x509.Certificate, purpose x509.ExtKeyUsage) bool {
	if len(issuer.ExtKeyUsage) == 0 && len(issuer.UnknownExtKeyUsage) == 0 {
		return true
	}
	for _, u := range issuer.ExtKeyUsage {
		if u == purpose {
			return true
		}
	}
	return false
}
