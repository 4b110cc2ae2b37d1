package profile

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"

	"github.com/sigstore/fulcio/pkg/certificate"
)

// emptyName is the DER of a Name without attributes.
var emptyName = []byte{0x30, 0}

// Issuer is the CA certificate under which leaves are built. It is immutable
// and safe for concurrent use.
type Issuer struct {
	cert      *x509.Certificate
	algorithm *algorithm
	keyHash   [sha256.Size]byte
	usage     [2]pkix.Extension // key usage, extended key usage: the same in every leaf
	aki       pkix.Extension
}

// NewIssuer checks that cert may issue code-signing leaves: a CA with
// keyCertSign, with the purpose codeSigning or, for a root, none, and an ECDSA
// P-256 or P-384 key. It does not verify cert's own signature or chain.
// Errors: ErrIssuer.
func NewIssuer(cert *x509.Certificate) (*Issuer, error) {
	if cert == nil {
		return nil, fmt.Errorf("%w: no certificate", ErrIssuer)
	}
	if err := checkIssuer(leaf, cert); err != nil {
		return nil, err
	}
	alg, err := algorithmOf(cert.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrIssuer, err)
	}
	eku, err := extKeyUsage(oidCodeSigning, false)
	if err != nil {
		return nil, fmt.Errorf("encode extended key usage: %w", err)
	}
	aki, err := authorityKeyID(cert.SubjectKeyId)
	if err != nil {
		return nil, fmt.Errorf("encode authority key identifier: %w", err)
	}
	if _, err := registry(); err != nil { // fail at start, not at the first leaf
		return nil, err
	}
	return &Issuer{
		cert: cert, algorithm: alg, keyHash: sha256.Sum256(cert.RawSubjectPublicKeyInfo),
		usage: [2]pkix.Extension{usageSign, eku}, aki: aki,
	}, nil
}

// KeyHash returns the SHA-256 of the issuer's DER SubjectPublicKeyInfo, which
// a precert_entry carries (RFC 6962, 3.2).
func (i *Issuer) KeyHash() [sha256.Size]byte { return i.keyHash }

// Certificate returns the issuer's certificate, not to be modified.
func (i *Issuer) Certificate() *x509.Certificate { return i.cert }

// LeafSpec asks for one leaf certificate.
type LeafSpec struct {
	// Public is an *ecdsa.PublicKey on P-256, P-384 or P-521, an
	// *rsa.PublicKey of 2048 to 8192 bits, or an ed25519.PublicKey.
	Public crypto.PublicKey
	// SAN is the identity.
	SAN SAN
	// Extensions are Fulcio's, arc 1.3.6.1.4.1.57264.1; Issuer is mandatory,
	// and every text is UTF-8 without control characters.
	Extensions certificate.Extensions
	// NotBefore and NotAfter are cut to whole seconds. They lie within the
	// issuer's validity and at most MaxLifetime apart.
	NotBefore, NotAfter time.Time
	// Serial is nil for a random number of up to 159 bits.
	Serial *big.Int
}

// Leaf is a leaf certificate that has passed every lint and rule and has no
// signature yet. It is immutable and safe for concurrent use.
type Leaf struct {
	issuer     *Issuer
	body       body
	logged     []byte // TBS without poison and SCT list
	precert    []byte // TBS with poison
	serial     *big.Int
	start, end time.Time
}

// Leaf builds and lints a leaf. Errors: ErrKey and ErrName, which are the
// requester's fault (with ErrLint, where a lint found it); ErrSpec, ErrWindow,
// and ErrLint alone, which are ours.
func (i *Issuer) Leaf(spec LeafSpec) (*Leaf, error) {
	tmpl, san, err := i.template(spec)
	if err != nil {
		return nil, err
	}
	l := &Leaf{issuer: i, serial: tmpl.serial, start: tmpl.notBefore, end: tmpl.notAfter}
	if l.body, err = tmpl.encode(); err != nil {
		return nil, err
	}
	if l.logged, err = l.body.tbs(nil); err != nil {
		return nil, fmt.Errorf("encode TBS: %w", err)
	}
	end, err := encodeExtension(poison)
	if err != nil {
		return nil, fmt.Errorf("encode poison: %w", err)
	}
	if l.precert, err = l.body.tbs(end); err != nil {
		return nil, fmt.Errorf("encode precertificate: %w", err)
	}
	placeholder, err := l.final(placeholderSCT())
	if err != nil {
		return nil, err
	}
	if err := lintCopy(placeholder, i.algorithm, &candidate{kind: leaf, form: formFinal, issuer: i.cert, san: san}); err != nil {
		return nil, blame(err)
	}
	return l, nil
}

// blame adds ErrKey or ErrName to a *LintError all of whose findings are about
// the one thing that the requester chose, so that callers tell a client's
// fault from ours.
func blame(err error) error {
	var failed *LintError
	if !errors.As(err, &failed) {
		return err
	}
	about := func(prefixes ...string) bool {
		return !slices.ContainsFunc(failed.Rules(), func(rule string) bool {
			return !slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(rule, p) })
		})
	}
	switch {
	case about("e_rsa_fermat_factorization", "chancery_leaf_key"):
		return fmt.Errorf("%w: %w", ErrKey, err)
	case about("e_ext_san_rfc822_", "e_ext_san_uri_", "chancery_leaf_text", "chancery_leaf_size"):
		return fmt.Errorf("%w: %w", ErrName, err)
	}
	return err
}

// template fills in a leaf; it also returns the subjectAltName's value.
func (i *Issuer) template(spec LeafSpec) (*template, []byte, error) {
	if err := checkLeafKey(spec.Public); err != nil {
		return nil, nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(spec.Public)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	san, err := spec.SAN.encode()
	if err != nil {
		return nil, nil, err
	}
	exts, err := i.extensions(spki, san, spec.Extensions)
	if err != nil {
		return nil, nil, err
	}
	serial := spec.Serial
	if serial == nil {
		if serial, err = randomSerial(); err != nil {
			return nil, nil, err
		}
	}
	if err := checkSerial(serial); err != nil {
		return nil, nil, err
	}
	notBefore, notAfter := spec.NotBefore.UTC().Truncate(time.Second), spec.NotAfter.UTC().Truncate(time.Second)
	if err := checkTimes(notBefore, notAfter); err != nil {
		return nil, nil, err
	}
	if err := checkWindow(notBefore, notAfter, i.cert); err != nil {
		return nil, nil, err
	}
	return &template{
		algorithm: i.algorithm, serial: serial, issuer: i.cert.RawSubject, subject: emptyName,
		notBefore: notBefore, notAfter: notAfter, spki: spki, extensions: exts,
	}, san, nil
}

// extensions lists those that all forms share, in the order of crypto/x509
// and then of Fulcio, docs/oid-info.md.
func (i *Issuer) extensions(spki, san []byte, more certificate.Extensions) ([]pkix.Extension, error) {
	rendered, err := more.Render()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrName, err)
	}
	for _, e := range rendered {
		if err := checkExtensionText(e); err != nil {
			return nil, err
		}
	}
	id, err := keyID(spki)
	if err != nil {
		return nil, err
	}
	ski, err := subjectKeyID(id)
	if err != nil {
		return nil, fmt.Errorf("encode subject key identifier: %w", err)
	}
	exts := make([]pkix.Extension, 0, 5+len(rendered))
	exts = append(exts, i.usage[0], i.usage[1], ski, i.aki,
		pkix.Extension{Id: oidSubjectAltName, Critical: true, Value: san})
	return append(exts, rendered...), nil
}

// randomSerial draws a positive number of 64 to 159 bits: 20 octets without
// the sign bit.
func randomSerial() (*big.Int, error) {
	var octets [20]byte
	if _, err := rand.Read(octets[:]); err != nil {
		return nil, fmt.Errorf("draw serial number: %w", err)
	}
	octets[0] &= 0x7f
	return new(big.Int).SetBytes(octets[:]), nil
}

// Serial returns the serial number.
func (l *Leaf) Serial() *big.Int { return new(big.Int).Set(l.serial) }

// Validity returns notBefore and notAfter, whole seconds in UTC.
func (l *Leaf) Validity() (notBefore, notAfter time.Time) { return l.start, l.end }

// LogTBS returns the DER TBSCertificate without poison and SCT list: what the
// log stores and the SCT covers (RFC 6962, 3.2). The caller gets a copy.
func (l *Leaf) LogTBS() []byte { return bytes.Clone(l.logged) }

// SignPrecertificate has s sign the TBS with the critical poison extension
// and returns the DER precertificate. One hardware signature. Errors:
// ErrSigner, and those of s.
func (l *Leaf) SignPrecertificate(ctx context.Context, s Signer) ([]byte, error) {
	return sign(ctx, s, l.precert, l.issuer.algorithm, l.issuer.cert.PublicKey)
}

// SignFinal has s sign the TBS with the SCT list of the one SCT given (TLS
// encoded, RFC 6962, 3.2) and returns the DER certificate. One hardware
// signature. It refuses what is not exactly one v1 SCT (ErrSCT), before it
// signs, and compares what it will sign with the precertificate as Correspond
// does; CheckSCT says whether the SCT is this leaf's. Errors: ErrSCT,
// ErrCorrespondence, ErrSigner, and those of s.
func (l *Leaf) SignFinal(ctx context.Context, s Signer, sct []byte) ([]byte, error) {
	if _, err := parseSCT(sct); err != nil {
		return nil, err
	}
	tbs, err := l.final(sct)
	if err != nil {
		return nil, err
	}
	if err := correspond(l.precert, tbs); err != nil {
		return nil, err
	}
	return sign(ctx, s, tbs, l.issuer.algorithm, l.issuer.cert.PublicKey)
}

// final is the TBS whose last extension is the list of the one SCT.
func (l *Leaf) final(sct []byte) ([]byte, error) {
	list, err := sctList(sct)
	if err != nil {
		return nil, err
	}
	tbs, err := l.body.tbs(list)
	if err != nil {
		return nil, fmt.Errorf("encode certificate: %w", err)
	}
	return tbs, nil
}
