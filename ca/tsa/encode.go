package tsa

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"math/big"
	"slices"
	"time"

	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// Object identifiers of RFC 5652, 5035, 5758 and 3161.
var (
	oidSignedData           = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}
	oidContentType          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 3}
	oidMessageDigest        = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}
	oidSigningTime          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 5}
	oidTSTInfo              = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 1, 4}
	oidSigningCertificateV2 = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 16, 2, 47}
	oidECDSAWithSHA256      = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}
	oidECDSAWithSHA384      = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 3}
)

// tag0 is [0], constructed.
var tag0 = casn1.Tag(0).ContextSpecific().Constructed()

// encoder holds what is the same in every response. It is immutable.
type encoder struct {
	hash        crypto.Hash           // of the signed attributes and the content
	hashOID     asn1.ObjectIdentifier // of hash
	signature   asn1.ObjectIdentifier
	certificate []byte // DER
	sid         []byte // DER IssuerAndSerialNumber
	tsa         []byte // DER GeneralName: the certificate's subject
	fixed       [][]byte
}

// newEncoder prepares for the TSA's certificate.
func newEncoder(cert *x509.Certificate) (*encoder, error) {
	hash, signature, ok := algorithmOf(cert.PublicKey)
	if !ok {
		return nil, fmt.Errorf("%w: key type %T, want ECDSA P-256 or P-384", ErrConfig, cert.PublicKey)
	}
	e := &encoder{hash: hash, hashOID: oidOf(hash), signature: signature, certificate: cert.Raw}
	var err error
	if e.sid, err = build(func(b *cryptobyte.Builder) {
		b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddBytes(cert.RawIssuer)
			b.AddASN1BigInt(cert.SerialNumber)
		})
	}); err != nil {
		return nil, err
	}
	if e.tsa, err = build(func(b *cryptobyte.Builder) { addDirectoryName(b, cert.RawSubject) }); err != nil {
		return nil, err
	}
	contentType, err := attribute(oidContentType, func(b *cryptobyte.Builder) { b.AddASN1ObjectIdentifier(oidTSTInfo) })
	if err != nil {
		return nil, err
	}
	signingCertificate, err := attribute(oidSigningCertificateV2, func(b *cryptobyte.Builder) { addSigningCertificate(b, cert) })
	if err != nil {
		return nil, err
	}
	e.fixed = [][]byte{contentType, signingCertificate}
	return e, nil
}

// addSigningCertificate writes SigningCertificateV2 (RFC 5035, 3) with one
// ESSCertIDv2 (RFC 5816): SHA-256, which is the default and so not named.
func addSigningCertificate(b *cryptobyte.Builder, cert *x509.Certificate) {
	digest := sha256.Sum256(cert.Raw)
	b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { // SigningCertificateV2
		b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { // certs
			b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { // ESSCertIDv2
				b.AddASN1OctetString(digest[:])
				b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { // IssuerSerial
					b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { addDirectoryName(b, cert.RawIssuer) })
					b.AddASN1BigInt(cert.SerialNumber)
				})
			})
		})
	})
}

// addDirectoryName writes GeneralName directoryName, [4] EXPLICIT.
func addDirectoryName(b *cryptobyte.Builder, name []byte) {
	b.AddASN1(casn1.Tag(4).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) { b.AddBytes(name) })
}

// tstInfo encodes a TSTInfo (RFC 3161, 2.4.2). ordering is FALSE, which DER
// leaves out; genTime has whole seconds, so no fraction to trim.
func (e *encoder) tstInfo(req *Request, policy asn1.ObjectIdentifier, serial *big.Int, genTime time.Time) ([]byte, error) {
	return build(func(b *cryptobyte.Builder) {
		b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1Int64(1)
			b.AddASN1ObjectIdentifier(policy)
			b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { // messageImprint
				b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
					b.AddASN1ObjectIdentifier(oidOf(req.Hash))
					if !req.NoParameters {
						b.AddASN1NULL()
					}
				})
				b.AddASN1OctetString(req.Digest)
			})
			b.AddASN1BigInt(serial)
			b.AddASN1GeneralizedTime(genTime)
			b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { b.AddASN1Int64(accuracy) })
			if req.Nonce != nil {
				b.AddASN1BigInt(req.Nonce)
			}
			b.AddASN1(tag0, func(b *cryptobyte.Builder) { b.AddBytes(e.tsa) })
		})
	})
}

// attributes encodes the signed attributes, in DER order, without the outer
// tag: contentType, signingTime, messageDigest, signingCertificateV2.
func (e *encoder) attributes(info []byte, genTime time.Time) ([]byte, error) {
	h := e.hash.New()
	h.Write(info)
	digest, err := attribute(oidMessageDigest, func(b *cryptobyte.Builder) { b.AddASN1OctetString(h.Sum(nil)) })
	if err != nil {
		return nil, err
	}
	when, err := attribute(oidSigningTime, func(b *cryptobyte.Builder) { addTime(b, genTime) })
	if err != nil {
		return nil, err
	}
	all := append(slices.Clone(e.fixed), digest, when)
	slices.SortFunc(all, bytes.Compare)
	return bytes.Join(all, nil), nil
}

// addTime writes a CMS Time: UTCTime through 2049 (RFC 5652, 11.3).
func addTime(b *cryptobyte.Builder, t time.Time) {
	if t.Year() < 2050 {
		b.AddASN1UTCTime(t)
		return
	}
	b.AddASN1GeneralizedTime(t)
}

// response encodes TimeStampResp { status granted, ContentInfo }.
func (e *encoder) response(info, attributes, signature []byte, withCertificate bool) ([]byte, error) {
	return build(func(b *cryptobyte.Builder) {
		b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { b.AddASN1Int64(0) }) // PKIStatusInfo: granted
			b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {                      // ContentInfo
				b.AddASN1ObjectIdentifier(oidSignedData)
				b.AddASN1(tag0, func(b *cryptobyte.Builder) {
					e.addSignedData(b, info, attributes, signature, withCertificate)
				})
			})
		})
	})
}

// addSignedData writes SignedData, version 3 because the content is not
// id-data (RFC 5652, 5.1).
func (e *encoder) addSignedData(b *cryptobyte.Builder, info, attributes, signature []byte, withCertificate bool) {
	b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Int64(3)
		b.AddASN1(casn1.SET, func(b *cryptobyte.Builder) { addAlgorithm(b, e.hashOID) })
		b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { // EncapsulatedContentInfo
			b.AddASN1ObjectIdentifier(oidTSTInfo)
			b.AddASN1(tag0, func(b *cryptobyte.Builder) { b.AddASN1OctetString(info) })
		})
		if withCertificate {
			b.AddASN1(tag0, func(b *cryptobyte.Builder) { b.AddBytes(e.certificate) })
		}
		b.AddASN1(casn1.SET, func(b *cryptobyte.Builder) { e.addSignerInfo(b, attributes, signature) })
	})
}

// addSignerInfo writes SignerInfo, version 1 because the signer is named by
// issuer and serial number (RFC 5652, 5.3).
func (e *encoder) addSignerInfo(b *cryptobyte.Builder, attributes, signature []byte) {
	b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Int64(1)
		b.AddBytes(e.sid)
		addAlgorithm(b, e.hashOID)
		b.AddASN1(tag0, func(b *cryptobyte.Builder) { b.AddBytes(attributes) })
		addAlgorithm(b, e.signature)
		b.AddASN1OctetString(signature)
	})
}

// addAlgorithm writes an AlgorithmIdentifier without parameters (RFC 5754, 2;
// RFC 5758, 3.2).
func addAlgorithm(b *cryptobyte.Builder, id asn1.ObjectIdentifier) {
	b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { b.AddASN1ObjectIdentifier(id) })
}

// attribute encodes Attribute { type, SET OF one value }.
func attribute(id asn1.ObjectIdentifier, value func(*cryptobyte.Builder)) ([]byte, error) {
	return build(func(b *cryptobyte.Builder) {
		b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1ObjectIdentifier(id)
			b.AddASN1(casn1.SET, value)
		})
	})
}

// setOf puts the outer tag of a SET OF around sorted members.
func setOf(members []byte) ([]byte, error) {
	return build(func(b *cryptobyte.Builder) {
		b.AddASN1(casn1.SET, func(b *cryptobyte.Builder) { b.AddBytes(members) })
	})
}

// oidOf is the inverse of hashOf for the hashes that are granted.
func oidOf(h crypto.Hash) asn1.ObjectIdentifier {
	switch h {
	case crypto.SHA256:
		return oidSHA256
	case crypto.SHA384:
		return oidSHA384
	case crypto.SHA512:
		return oidSHA512
	}
	return nil
}

// build runs f on a fresh builder.
func build(f func(*cryptobyte.Builder)) ([]byte, error) {
	var b cryptobyte.Builder
	f(&b)
	out, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("encode timestamp: %w", err)
	}
	return out, nil
}
