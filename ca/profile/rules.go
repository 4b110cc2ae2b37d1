package profile

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"time"
	"unicode/utf8"

	"github.com/sigstore/fulcio/pkg/certificate"
	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// leaf is the kind of an end entity's code-signing certificate.
const leaf Kind = "leaf"

// form is which of its forms a leaf is in.
type form int

const (
	formFinal form = iota // one SCT, no poison
	formPrecertificate
	formLogged // neither
)

// Bounds of a leaf.
const (
	// MaxLifetime bounds a leaf's validity: a short-lived certificate is what
	// makes revocation unnecessary.
	MaxLifetime = 24 * time.Hour
	// MaxSize bounds a leaf certificate, in octets of DER. A log entry and a
	// bundle both hold it in base64.
	MaxSize = 16 << 10

	maxText = 4096 // octets of one extension's text
)

// candidate is a certificate under examination, as crypto/x509 parsed it, and
// what it has to agree with.
type candidate struct {
	cert      *x509.Certificate
	kind      Kind
	form      form              // for a leaf
	issuer    *x509.Certificate // nil: self-signed
	algorithm *algorithm        // of the issuer's key
	san       []byte            // for a leaf: the subjectAltName value that was asked for, or nil: any
}

// rule is one of our own lints: check returns what is wrong, or "".
type rule struct {
	id    string
	kinds []Kind
	check func(*candidate) string
}

var (
	everyKind = []Kind{Root, TSARoot, Intermediate, TSA, leaf}
	caKinds   = []Kind{Root, TSARoot, Intermediate}
	endKinds  = []Kind{TSA, leaf}
)

// rules are the profile (Fulcio, docs/certificate-specification.md and docs/oid-info.md; RFC 3161). They look at the parsed
// certificate only. With the builder they share definitions (what a key
// identifier is, which text is plain), not encoding.
var rules = []rule{
	{"chancery_version", everyKind, checkVersion},
	{"chancery_serial", everyKind, checkSerialRule},
	{"chancery_signature_algorithm", everyKind, checkSignatureAlgorithm},
	{"chancery_validity", everyKind, checkValidity},
	{"chancery_issuer_name", everyKind, checkIssuerName},
	{"chancery_ski", everyKind, checkSKI},
	{"chancery_aki", everyKind, checkAKI},
	{"chancery_extensions", everyKind, checkExtensions},
	{"chancery_subject", []Kind{Root, TSARoot, Intermediate, TSA}, checkSubject},
	{"chancery_authority_key", []Kind{Root, TSARoot, Intermediate, TSA}, checkAuthorityKey},
	{"chancery_ca_constraints", caKinds, checkCAConstraints},
	{"chancery_ca_ku", caKinds, checkCAUsage},
	{"chancery_root_eku", []Kind{Root, TSARoot}, checkNoPurpose},
	{"chancery_intermediate_eku", []Kind{Intermediate}, checkCodeSigning},
	{"chancery_intermediate_pathlen", []Kind{Intermediate}, checkPathLenZero},
	{"chancery_end_constraints", endKinds, checkNoConstraints},
	{"chancery_end_ku", endKinds, checkEndUsage},
	{"chancery_tsa_eku", []Kind{TSA}, checkTimeStamping},
	{"chancery_leaf_eku", []Kind{leaf}, checkCodeSigning},
	{"chancery_leaf_subject", []Kind{leaf}, checkEmptySubject},
	{"chancery_leaf_san", []Kind{leaf}, checkSAN},
	{"chancery_leaf_key", []Kind{leaf}, checkLeafKeyRule},
	{"chancery_leaf_lifetime", []Kind{leaf}, checkLifetime},
	{"chancery_leaf_size", []Kind{leaf}, checkSize},
	{"chancery_leaf_issuer", []Kind{leaf}, checkLeafIssuer},
	{"chancery_leaf_text", []Kind{leaf}, checkText},
	{"chancery_leaf_sct", []Kind{leaf}, checkTransparency},
}

// check runs the rules of the candidate's kind.
func (c *candidate) check() []Finding {
	var found []Finding
	for _, r := range rules {
		if !contains(r.kinds, c.kind) {
			continue
		}
		if detail := r.check(c); detail != "" {
			found = append(found, Finding{Rule: r.id, Detail: clip(detail)})
		}
	}
	return found
}

func contains(kinds []Kind, k Kind) bool {
	for _, one := range kinds {
		if one == k {
			return true
		}
	}
	return false
}

// extension returns the extension with id, or nil.
func (c *candidate) extension(id asn1.ObjectIdentifier) *pkix.Extension {
	for i := range c.cert.Extensions {
		if c.cert.Extensions[i].Id.Equal(id) {
			return &c.cert.Extensions[i]
		}
	}
	return nil
}

// want says what is wrong with an extension's presence and criticality.
func (c *candidate) want(id asn1.ObjectIdentifier, critical bool) string {
	e := c.extension(id)
	if e == nil {
		return "missing"
	}
	if e.Critical != critical {
		return fmt.Sprintf("critical is %t", e.Critical)
	}
	return ""
}

func checkVersion(c *candidate) string {
	if c.cert.Version != 3 {
		return fmt.Sprintf("version %d, want 3", c.cert.Version)
	}
	return ""
}

func checkSerialRule(c *candidate) string {
	if checkSerial(c.cert.SerialNumber) != nil {
		return fmt.Sprintf("%d bits, sign %d", c.cert.SerialNumber.BitLen(), c.cert.SerialNumber.Sign())
	}
	return ""
}

func checkSignatureAlgorithm(c *candidate) string {
	if c.cert.SignatureAlgorithm != c.algorithm.x509 {
		return fmt.Sprintf("%s, want %s", c.cert.SignatureAlgorithm, c.algorithm.x509)
	}
	return ""
}

func checkValidity(c *candidate) string {
	if !c.cert.NotBefore.Before(c.cert.NotAfter) {
		return "notAfter is not after notBefore"
	}
	if c.issuer != nil && checkWindow(c.cert.NotBefore, c.cert.NotAfter, c.issuer) != nil {
		return "not within the issuer's"
	}
	return ""
}

func checkIssuerName(c *candidate) string {
	want := c.cert.RawSubject
	if c.issuer != nil {
		want = c.issuer.RawSubject
		if bytes.Equal(want, c.cert.RawSubject) {
			return "subject equals the issuer, which reads as self-issued"
		}
	}
	if !bytes.Equal(c.cert.RawIssuer, want) {
		return "not the issuer's subject"
	}
	return ""
}

func checkSKI(c *candidate) string {
	id, err := keyID(c.cert.RawSubjectPublicKeyInfo)
	if err != nil {
		return err.Error()
	}
	if !bytes.Equal(c.cert.SubjectKeyId, id) {
		return "not the SHA-1 of the public key bits"
	}
	return c.want(oidSubjectKeyID, false)
}

func checkAKI(c *candidate) string {
	if c.issuer == nil {
		if c.extension(oidAuthorityKeyID) != nil {
			return "present on a self-signed certificate"
		}
		return ""
	}
	if !bytes.Equal(c.cert.AuthorityKeyId, c.issuer.SubjectKeyId) || len(c.cert.AuthorityKeyId) == 0 {
		return "not the issuer's subject key identifier"
	}
	e := c.extension(oidAuthorityKeyID)
	if n := len(c.issuer.SubjectKeyId); len(e.Value) != n+4 {
		return "more than a key identifier"
	}
	return c.want(oidAuthorityKeyID, false)
}

// checkExtensions refuses what the profile does not know, and duplicates.
func checkExtensions(c *candidate) string {
	for i, e := range c.cert.Extensions {
		for _, earlier := range c.cert.Extensions[:i] {
			if earlier.Id.Equal(e.Id) {
				return e.Id.String() + " twice"
			}
		}
		if !c.known(e.Id) {
			return e.Id.String() + " is not in the profile"
		}
		if fulcioExtension(e.Id) && e.Critical {
			return e.Id.String() + " is critical"
		}
	}
	return ""
}

// known says whether an extension may appear in a certificate of this kind.
// Rules of their own say when it must, and how.
func (c *candidate) known(id asn1.ObjectIdentifier) bool {
	if id.Equal(oidKeyUsage) || id.Equal(oidExtKeyUsage) || id.Equal(oidBasicConstraints) ||
		id.Equal(oidSubjectKeyID) || id.Equal(oidAuthorityKeyID) {
		return true
	}
	if c.kind != leaf {
		return false
	}
	return id.Equal(oidSubjectAltName) || id.Equal(oidSCTList) || id.Equal(oidPoison) || fulcioExtension(id)
}

// lastFulcio is the highest extension of arc 57264.1 that Fulcio 1.8 lists.
const lastFulcio = 24

// fulcioExtension: 1.1 to 1.24 but 1.7, which is the type of an otherName.
func fulcioExtension(id asn1.ObjectIdentifier) bool {
	n := len(oidFulcio)
	if len(id) != n+1 || !id[:n].Equal(oidFulcio) {
		return false
	}
	return id[n] >= 1 && id[n] <= lastFulcio && id[n] != oidOtherName[n]
}

func checkSubject(c *candidate) string {
	if c.cert.Subject.CommonName == "" {
		return "no common name"
	}
	for _, a := range c.cert.Subject.Names {
		s, ok := a.Value.(string)
		if !ok || plainText(s) != nil {
			return "attribute " + a.Type.String() + " is not plain text"
		}
	}
	return ""
}

func checkAuthorityKey(c *candidate) string {
	if _, err := algorithmOf(c.cert.PublicKey); err != nil {
		return err.Error()
	}
	if c.issuer != nil && sameKey(c.cert.PublicKey, c.issuer.PublicKey) {
		return "the issuer's key"
	}
	return ""
}

func checkCAConstraints(c *candidate) string {
	if !c.cert.BasicConstraintsValid || !c.cert.IsCA {
		return "not CA:TRUE"
	}
	if c.cert.MaxPathLen < 0 {
		return "no path length"
	}
	return c.want(oidBasicConstraints, true)
}

func checkCAUsage(c *candidate) string {
	if c.cert.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign {
		return "not keyCertSign and cRLSign"
	}
	return c.want(oidKeyUsage, true)
}

func checkNoPurpose(c *candidate) string {
	if c.extension(oidExtKeyUsage) != nil {
		return "present"
	}
	return ""
}

// onlyPurpose: exactly one purpose, and the criticality given.
func onlyPurpose(c *candidate, purpose x509.ExtKeyUsage, critical bool) string {
	if len(c.cert.UnknownExtKeyUsage) != 0 || len(c.cert.ExtKeyUsage) != 1 || c.cert.ExtKeyUsage[0] != purpose {
		return "not the one purpose"
	}
	return c.want(oidExtKeyUsage, critical)
}

func checkCodeSigning(c *candidate) string {
	return onlyPurpose(c, x509.ExtKeyUsageCodeSigning, false)
}

func checkTimeStamping(c *candidate) string {
	return onlyPurpose(c, x509.ExtKeyUsageTimeStamping, true)
}

func checkPathLenZero(c *candidate) string {
	if c.cert.MaxPathLen != 0 || !c.cert.MaxPathLenZero {
		return fmt.Sprintf("path length %d, want 0", c.cert.MaxPathLen)
	}
	return ""
}

func checkNoConstraints(c *candidate) string {
	if c.extension(oidBasicConstraints) != nil {
		return "basic constraints on an end entity"
	}
	return ""
}

func checkEndUsage(c *candidate) string {
	if c.cert.KeyUsage != x509.KeyUsageDigitalSignature {
		return "not digitalSignature alone"
	}
	return c.want(oidKeyUsage, true)
}

func checkEmptySubject(c *candidate) string {
	if !bytes.Equal(c.cert.RawSubject, emptyName) {
		return "not empty"
	}
	return ""
}

// checkSAN: exactly one name, in the extension exactly as asked, critical
// because the subject is empty (RFC 5280, 4.2.1.6).
func checkSAN(c *candidate) string {
	e := c.extension(oidSubjectAltName)
	if e == nil {
		return "missing"
	}
	if err := parseSAN(e.Value); err != nil {
		return err.Error()
	}
	if c.san != nil && !bytes.Equal(e.Value, c.san) {
		return "not the name that was asked for"
	}
	return c.want(oidSubjectAltName, true)
}

func checkLeafKeyRule(c *candidate) string {
	if err := checkLeafKey(c.cert.PublicKey); err != nil {
		return err.Error()
	}
	if c.issuer != nil && sameKey(c.cert.PublicKey, c.issuer.PublicKey) {
		return "the issuer's key"
	}
	return ""
}

// RSA modulus sizes that a leaf may have, in bits; the upper bound keeps
// verifiers' work bounded.
const minRSABits, maxRSABits = 2048, 8192

// checkLeafKey allows ECDSA P-256, P-384 and P-521, RSA of 2048 to 8192 bits,
// and Ed25519. Whether a deployment allows them all is the identity package's
// matter.
func checkLeafKey(pub any) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if k != nil && (k.Curve == elliptic.P256() || k.Curve == elliptic.P384() || k.Curve == elliptic.P521()) {
			return nil
		}
		return fmt.Errorf("%w: ECDSA on another curve than P-256, P-384, P-521", ErrKey)
	case *rsa.PublicKey:
		if k == nil || k.N == nil || k.N.BitLen() < minRSABits || k.N.BitLen() > maxRSABits {
			return fmt.Errorf("%w: RSA modulus not of %d to %d bits", ErrKey, minRSABits, maxRSABits)
		}
		if k.E < 65537 || k.E%2 == 0 {
			return fmt.Errorf("%w: RSA exponent %d", ErrKey, k.E)
		}
		return nil
	case ed25519.PublicKey:
		if len(k) == ed25519.PublicKeySize {
			return nil
		}
		return fmt.Errorf("%w: Ed25519 key of %d octets", ErrKey, len(k))
	}
	return fmt.Errorf("%w: type %T", ErrKey, pub)
}

func checkLifetime(c *candidate) string {
	if d := c.cert.NotAfter.Sub(c.cert.NotBefore); d > MaxLifetime {
		return fmt.Sprintf("valid for %s, at most %s", d, MaxLifetime)
	}
	return ""
}

func checkSize(c *candidate) string {
	if len(c.cert.Raw) > MaxSize {
		return fmt.Sprintf("%d octets, at most %d", len(c.cert.Raw), MaxSize)
	}
	return ""
}

// checkLeafIssuer: both forms of the issuer extension, with one text: cosign
// and gitsign read 1.8, others only 1.1.
func checkLeafIssuer(c *candidate) string {
	old, now := c.extension(certificate.OIDIssuer), c.extension(certificate.OIDIssuerV2)
	if old == nil || now == nil {
		return "1.1 or 1.8 missing"
	}
	var text string
	if err := certificate.ParseDERString(now.Value, &text); err != nil {
		return "1.8 is not a UTF8String"
	}
	if text == "" || text != string(old.Value) {
		return "1.1 and 1.8 differ, or are empty"
	}
	return ""
}

// lastRaw is the last extension of the arc whose value is bare text.
const lastRaw = 6

// checkText: 1.1 to 1.6 are bare UTF-8, the rest DER UTF8Strings; all plain.
func checkText(c *candidate) string {
	for _, e := range c.cert.Extensions {
		if !fulcioExtension(e.Id) {
			continue
		}
		if err := checkExtensionText(e); err != nil {
			return err.Error()
		}
	}
	return ""
}

// checkExtensionText reads the text of a Fulcio extension, raw up to 1.6 and a
// UTF8String above, and wants it plain and bounded. Errors: ErrName.
func checkExtensionText(e pkix.Extension) error {
	text := cryptobyte.String(e.Value)
	if e.Id[len(oidFulcio)] > lastRaw {
		in := text
		if !in.ReadASN1(&text, casn1.UTF8String) || !in.Empty() {
			return fmt.Errorf("%w: extension %s is not a UTF8String", ErrName, e.Id)
		}
	}
	if len(text) > maxText {
		return fmt.Errorf("%w: extension %s has %d octets, at most %d", ErrName, e.Id, len(text), maxText)
	}
	if err := plainText(string(text)); err != nil {
		return fmt.Errorf("extension %s: %w", e.Id, err)
	}
	return nil
}

// plainText: not empty, UTF-8, and no control character, so that nothing that
// prints an identity can be made to print something else.
func plainText(s string) error {
	if s == "" {
		return fmt.Errorf("%w: empty text", ErrName)
	}
	if !utf8.ValidString(s) {
		return fmt.Errorf("%w: not UTF-8", ErrName)
	}
	for _, r := range s {
		if r < 0x20 || (r >= 0x7f && r < 0xa0) {
			return fmt.Errorf("%w: control character U+%04X", ErrName, r)
		}
	}
	return nil
}

// checkTransparency: the form has what it must have and not what it must not.
func checkTransparency(c *candidate) string {
	poison, scts := c.extension(oidPoison), c.extension(oidSCTList)
	if (poison != nil) != (c.form == formPrecertificate) {
		return "poison in the wrong form"
	}
	if (scts != nil) != (c.form == formFinal) {
		return "SCT list in the wrong form"
	}
	if poison != nil && (!poison.Critical || !bytes.Equal(poison.Value, asn1.NullBytes)) {
		return "poison is not critical NULL"
	}
	if scts != nil {
		if scts.Critical {
			return "SCT list is critical"
		}
		if err := parseSCTList(scts.Value); err != nil {
			return err.Error()
		}
	}
	return ""
}
