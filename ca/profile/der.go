package profile

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha1" //nolint:gosec // a key identifier, not a security property (RFC 5280, 4.2.1.2)
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"time"

	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// Object identifiers of the extensions that the profile uses.
var (
	oidSubjectKeyID     = asn1.ObjectIdentifier{2, 5, 29, 14}
	oidKeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidSubjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidAuthorityKeyID   = asn1.ObjectIdentifier{2, 5, 29, 35}
	oidExtKeyUsage      = asn1.ObjectIdentifier{2, 5, 29, 37}
	oidSCTList          = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11129, 2, 4, 2} // RFC 6962, 3.3
	oidPoison           = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11129, 2, 4, 3} // RFC 6962, 3.1
	oidFulcio           = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57264, 1}
	oidOtherName        = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57264, 1, 7}

	oidCodeSigning  = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 3}
	oidTimeStamping = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 8}
)

// algorithm is a signature algorithm of an issuer.
type algorithm struct {
	curve elliptic.Curve
	hash  crypto.Hash
	x509  x509.SignatureAlgorithm
	oid   asn1.ObjectIdentifier // RFC 5758, 3.2: parameters absent
}

// The algorithms with which certificates are signed.
var (
	ecdsaSHA256 = &algorithm{elliptic.P256(), crypto.SHA256, x509.ECDSAWithSHA256, asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}}
	ecdsaSHA384 = &algorithm{elliptic.P384(), crypto.SHA384, x509.ECDSAWithSHA384, asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 3}}
)

// algorithmOf returns the algorithm with which pub's private key signs
// certificates: ErrKey for anything but ECDSA on P-256 and P-384.
func algorithmOf(pub crypto.PublicKey) (*algorithm, error) {
	if k, ok := pub.(*ecdsa.PublicKey); ok && k != nil {
		switch k.Curve {
		case elliptic.P256():
			return ecdsaSHA256, nil
		case elliptic.P384():
			return ecdsaSHA384, nil
		}
	}
	return nil, fmt.Errorf("%w: an authority's key is ECDSA P-256 or P-384, not %T", ErrKey, pub)
}

// identifier appends the AlgorithmIdentifier.
func (a *algorithm) identifier(b *cryptobyte.Builder) {
	b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { b.AddASN1ObjectIdentifier(a.oid) })
}

// template is a TBSCertificate (RFC 5280, 4.1) before it is encoded.
type template struct {
	algorithm           *algorithm
	serial              *big.Int
	issuer, subject     []byte // DER Name
	notBefore, notAfter time.Time
	spki                []byte // DER SubjectPublicKeyInfo
	extensions          []pkix.Extension
}

// body is an encoded TBSCertificate, cut where the forms of a leaf differ.
type body struct {
	head       []byte // version to subjectPublicKeyInfo, without the outer SEQUENCE
	extensions []byte // the shared extensions, without the outer SEQUENCE
}

// encode gives the template's octets.
func (t *template) encode() (body, error) {
	var head, exts cryptobyte.Builder
	head.AddASN1(casn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) { b.AddASN1Int64(2) }) // v3
	head.AddASN1BigInt(t.serial)
	t.algorithm.identifier(&head)
	head.AddBytes(t.issuer)
	head.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
		addTime(b, t.notBefore)
		addTime(b, t.notAfter)
	})
	head.AddBytes(t.subject)
	head.AddBytes(t.spki)
	for _, e := range t.extensions {
		addExtension(&exts, e)
	}
	h, err := head.Bytes()
	if err != nil {
		return body{}, fmt.Errorf("encode TBS: %w", err)
	}
	x, err := exts.Bytes()
	if err != nil {
		return body{}, fmt.Errorf("encode extensions: %w", err)
	}
	return body{head: h, extensions: x}, nil
}

// tbs is the TBSCertificate whose last extension is last (DER, may be empty).
func (b body) tbs(last []byte) ([]byte, error) {
	out := cryptobyte.NewBuilder(make([]byte, 0, len(b.head)+len(b.extensions)+len(last)+16))
	out.AddASN1(casn1.SEQUENCE, func(c *cryptobyte.Builder) {
		c.AddBytes(b.head)
		c.AddASN1(casn1.Tag(3).ContextSpecific().Constructed(), func(c *cryptobyte.Builder) {
			c.AddASN1(casn1.SEQUENCE, func(c *cryptobyte.Builder) {
				c.AddBytes(b.extensions)
				c.AddBytes(last)
			})
		})
	})
	return out.Bytes()
}

// addTime writes a Time: UTCTime through 2049, then GeneralizedTime
// (RFC 5280, 4.1.2.5).
func addTime(b *cryptobyte.Builder, t time.Time) {
	t = t.UTC()
	if t.Year() >= 1950 && t.Year() < 2050 {
		b.AddASN1UTCTime(t)
		return
	}
	b.AddASN1GeneralizedTime(t)
}

// addExtension writes an Extension; critical FALSE is absent (DER).
func addExtension(b *cryptobyte.Builder, e pkix.Extension) {
	b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(e.Id)
		if e.Critical {
			b.AddASN1Boolean(true)
		}
		b.AddASN1OctetString(e.Value)
	})
}

// encodeExtension gives one Extension's octets.
func encodeExtension(e pkix.Extension) ([]byte, error) {
	var b cryptobyte.Builder
	addExtension(&b, e)
	return b.Bytes()
}

// assemble gives a Certificate: the TBS octets as they are, the algorithm,
// the signature.
func assemble(tbs []byte, alg *algorithm, signature []byte) ([]byte, error) {
	out := cryptobyte.NewBuilder(make([]byte, 0, len(tbs)+len(signature)+32))
	out.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(tbs)
		alg.identifier(b)
		b.AddASN1BitString(signature)
	})
	return out.Bytes()
}

// keyBits returns the content of the subjectPublicKey BIT STRING.
func keyBits(spki []byte) ([]byte, error) {
	var inner, alg cryptobyte.String
	var bits []byte
	in := cryptobyte.String(spki)
	if !in.ReadASN1(&inner, casn1.SEQUENCE) || !in.Empty() ||
		!inner.ReadASN1(&alg, casn1.SEQUENCE) || !inner.ReadASN1BitStringAsBytes(&bits) || !inner.Empty() {
		return nil, fmt.Errorf("%w: not a SubjectPublicKeyInfo", ErrKey)
	}
	return bits, nil
}

// keyID is the key identifier of RFC 5280, 4.2.1.2, method 1: the SHA-1 of
// the public key bits.
func keyID(spki []byte) ([]byte, error) {
	bits, err := keyBits(spki)
	if err != nil {
		return nil, err
	}
	h := sha1.Sum(bits) //nolint:gosec // see the import
	return h[:], nil
}

// The extensions that depend on nothing but their arguments. Their encodings
// are those of RFC 5280, 4.2.1, and an error is impossible for these types.

func keyUsage(bits byte, unused uint8) pkix.Extension {
	return pkix.Extension{Id: oidKeyUsage, Critical: true, Value: []byte{byte(casn1.BIT_STRING), 2, unused, bits}}
}

// Key usages: a certificate that signs data, and one that signs certificates
// and CRLs (bits 0, and 5 and 6).
var (
	usageSign = keyUsage(0x80, 7)
	usageCA   = keyUsage(0x06, 1)
)

func extKeyUsage(purpose asn1.ObjectIdentifier, critical bool) (pkix.Extension, error) {
	var b cryptobyte.Builder
	b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { b.AddASN1ObjectIdentifier(purpose) })
	value, err := b.Bytes()
	return pkix.Extension{Id: oidExtKeyUsage, Critical: critical, Value: value}, err
}

func basicConstraintsCA(pathLen int) (pkix.Extension, error) {
	var b cryptobyte.Builder
	b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Boolean(true)
		b.AddASN1Int64(int64(pathLen))
	})
	value, err := b.Bytes()
	return pkix.Extension{Id: oidBasicConstraints, Critical: true, Value: value}, err
}

func subjectKeyID(id []byte) (pkix.Extension, error) {
	var b cryptobyte.Builder
	b.AddASN1OctetString(id)
	value, err := b.Bytes()
	return pkix.Extension{Id: oidSubjectKeyID, Value: value}, err
}

func authorityKeyID(id []byte) (pkix.Extension, error) {
	var b cryptobyte.Builder
	b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(casn1.Tag(0).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes(id) })
	})
	value, err := b.Bytes()
	return pkix.Extension{Id: oidAuthorityKeyID, Value: value}, err
}
