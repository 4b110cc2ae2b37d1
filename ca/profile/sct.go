package profile

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"

	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// Sizes and code points of RFC 6962, 3.2 and RFC 5246, 7.4.1.4.1.
const (
	sctV1        = 0
	logIDSize    = sha256.Size
	tlsSHA256    = 4
	tlsECDSA     = 3
	maxSCT       = 1024 // ours; an ECDSA P-256 SCT without extensions has 119 octets
	sigTypeSCT   = 0    // SignatureType certificate_timestamp
	entryPrecert = 1    // LogEntryType precert_entry
)

// sct is a parsed SignedCertificateTimestamp (RFC 6962, 3.2).
type sct struct {
	logID      []byte // 32 octets
	timestamp  uint64 // milliseconds since the epoch
	extensions []byte
	signature  []byte // DER ECDSA over SHA-256
}

// parseSCT reads exactly one v1 SCT whose signature is ECDSA with SHA-256,
// the only one that every sigstore client verifies. Errors: ErrSCT.
func parseSCT(raw []byte) (*sct, error) {
	if len(raw) > maxSCT {
		return nil, fmt.Errorf("%w: %d octets", ErrSCT, len(raw))
	}
	var s sct
	var version, hash, sigAlg uint8
	var extensions, signature cryptobyte.String
	in := cryptobyte.String(raw)
	if !in.ReadUint8(&version) || version != sctV1 {
		return nil, fmt.Errorf("%w: not version 1", ErrSCT)
	}
	if !in.ReadBytes(&s.logID, logIDSize) || !in.ReadUint64(&s.timestamp) ||
		!in.ReadUint16LengthPrefixed(&extensions) ||
		!in.ReadUint8(&hash) || !in.ReadUint8(&sigAlg) ||
		!in.ReadUint16LengthPrefixed(&signature) || !in.Empty() {
		return nil, fmt.Errorf("%w: malformed", ErrSCT)
	}
	if hash != tlsSHA256 || sigAlg != tlsECDSA {
		return nil, fmt.Errorf("%w: signature algorithm %d/%d, want sha256/ecdsa", ErrSCT, hash, sigAlg)
	}
	if !derSignature(signature) {
		return nil, fmt.Errorf("%w: signature is not DER", ErrSCT)
	}
	s.extensions, s.signature = extensions, signature
	return &s, nil
}

// derSignature: SEQUENCE of two positive INTEGERs and nothing more.
func derSignature(raw []byte) bool {
	var seq cryptobyte.String
	var r, s []byte // ReadASN1Integer into []byte takes non-negative numbers only
	in := cryptobyte.String(raw)
	return in.ReadASN1(&seq, casn1.SEQUENCE) && in.Empty() &&
		seq.ReadASN1Integer(&r) && seq.ReadASN1Integer(&s) && seq.Empty() &&
		len(r) > 0 && len(s) > 0
}

// sctList is the SCT list extension with the one SCT: an OCTET STRING in the
// extension's OCTET STRING (RFC 6962, 3.3).
func sctList(raw []byte) ([]byte, error) {
	var list cryptobyte.Builder
	list.AddASN1(casn1.OCTET_STRING, func(b *cryptobyte.Builder) {
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
			b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(raw) })
		})
	})
	value, err := list.Bytes()
	if err != nil {
		return nil, fmt.Errorf("encode SCT list: %w", err)
	}
	return encodeExtension(pkix.Extension{Id: oidSCTList, Value: value})
}

// parseSCTList reads the extension's value: exactly one SCT.
func parseSCTList(value []byte) error {
	_, err := onlySCT(value)
	return err
}

func onlySCT(value []byte) ([]byte, error) {
	var octets, list, one cryptobyte.String
	in := cryptobyte.String(value)
	if !in.ReadASN1(&octets, casn1.OCTET_STRING) || !in.Empty() ||
		!octets.ReadUint16LengthPrefixed(&list) || !octets.Empty() ||
		!list.ReadUint16LengthPrefixed(&one) || !list.Empty() {
		return nil, fmt.Errorf("%w: not a list of exactly one", ErrSCT)
	}
	if _, err := parseSCT(one); err != nil {
		return nil, err
	}
	return one, nil
}

// poison is the precertificate's last extension (RFC 6962, 3.1): a constant.
var poison = pkix.Extension{Id: oidPoison, Critical: true, Value: asn1.NullBytes}

// placeholderSCT has the shape of a P-256 log's SCT, and is what the linted
// copy carries.
func placeholderSCT() []byte {
	var b cryptobyte.Builder
	b.AddUint8(sctV1)
	b.AddBytes(make([]byte, logIDSize))
	b.AddUint64(0)
	b.AddUint16(0)
	b.AddUint8(tlsSHA256)
	b.AddUint8(tlsECDSA)
	b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
		b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {
			number := append([]byte{0, 0x80}, make([]byte, 31)...) // 32 octets and the sign
			b.AddASN1(casn1.INTEGER, func(b *cryptobyte.Builder) { b.AddBytes(number) })
			b.AddASN1(casn1.INTEGER, func(b *cryptobyte.Builder) { b.AddBytes(number) })
		})
	})
	return b.BytesOrPanic() // constant input: cannot fail
}

// signedData is what the log signed (RFC 6962, 3.2): a digitally-signed
// struct over a precert_entry.
func (s *sct) signedData(issuerKeyHash [sha256.Size]byte, tbs []byte) ([]byte, error) {
	b := cryptobyte.NewBuilder(make([]byte, 0, len(tbs)+len(s.extensions)+64))
	b.AddUint8(sctV1)
	b.AddUint8(sigTypeSCT)
	b.AddUint64(s.timestamp)
	b.AddUint16(entryPrecert)
	b.AddBytes(issuerKeyHash[:])
	b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(tbs) })
	b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(s.extensions) })
	return b.Bytes()
}

// CheckSCT says whether raw is an SCT of the log with the given key for this
// leaf: log ID and signature (about 50 µs). It is how an SCT for another leaf
// or by another log is refused; SignFinal alone looks at the form.
// Errors: ErrSCT.
func (l *Leaf) CheckSCT(raw []byte, log crypto.PublicKey) error {
	s, key, digest, err := l.covered(raw, log)
	if err != nil {
		return err
	}
	if !ecdsa.VerifyASN1(key, digest[:], s.signature) {
		return fmt.Errorf("%w: signature does not cover this leaf", ErrSCT)
	}
	return nil
}

// CheckSignedSCT is CheckSCT for a log in this process, whose key has verified
// its signature over digest already, as every hsm.Key does before it returns
// one (about 5 µs). The digest is computed here, from this leaf: the SCT is
// refused unless it is the one that was verified and the SCT carries that very
// signature. Errors: ErrSCT.
func (l *Leaf) CheckSignedSCT(raw []byte, log crypto.PublicKey, digest [sha256.Size]byte, signature []byte) error {
	s, _, ours, err := l.covered(raw, log)
	if err != nil {
		return err
	}
	if ours != digest || !bytes.Equal(s.signature, signature) {
		return fmt.Errorf("%w: what was signed is not this leaf", ErrSCT)
	}
	return nil
}

// covered reads an SCT with the log's ID and returns the digest over which a
// signature makes it this leaf's.
func (l *Leaf) covered(raw []byte, log crypto.PublicKey) (s *sct, key *ecdsa.PublicKey, digest [sha256.Size]byte, err error) {
	if s, err = parseSCT(raw); err != nil {
		return nil, nil, digest, err
	}
	key, ok := log.(*ecdsa.PublicKey)
	if !ok || key == nil {
		return nil, nil, digest, fmt.Errorf("%w: log key of type %T", ErrSCT, log)
	}
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, nil, digest, fmt.Errorf("%w: encode log key: %w", ErrSCT, err)
	}
	if id := sha256.Sum256(spki); !bytes.Equal(s.logID, id[:]) {
		return nil, nil, digest, fmt.Errorf("%w: by another log", ErrSCT)
	}
	data, err := s.signedData(l.issuer.keyHash, l.logged)
	if err != nil {
		return nil, nil, digest, fmt.Errorf("%w: %w", ErrSCT, err)
	}
	return s, key, sha256.Sum256(data), nil
}
