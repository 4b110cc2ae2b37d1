package ct

import (
	"crypto/sha256"
	"errors"
	"fmt"

	ct "github.com/google/certificate-transparency-go"
	"github.com/google/certificate-transparency-go/tls"
	"golang.org/x/crypto/cryptobyte"
)

// What is encoded for every certificate is encoded here, by hand, because the
// library encodes by reflection. The tests compare each of these functions
// with the library, octet for octet. Reading is left to the library.

// errASN1Cert: an opaque ASN.1Cert<1..2^24-1> or TBSCertificate that is empty.
var errASN1Cert = errors.New("certificate is empty")

// encodeEntry gives the MerkleTreeLeaf of a TimestampedEntry (RFC 6962,
// Section 3.4). The same octets are what the SCT's signature covers (Section
// 3.2): version 0 and leaf_type 0 there are version 0 and signature_type 0
// (certificate_timestamp) here, and the rest is the same in the same order.
func encodeEntry(e *ct.TimestampedEntry) ([]byte, error) {
	var b *cryptobyte.Builder
	switch {
	case e.EntryType == ct.X509LogEntryType && e.X509Entry != nil:
		b = newEntry(e, len(e.X509Entry.Data))
		addCert(b, e.X509Entry.Data)
	case e.EntryType == ct.PrecertLogEntryType && e.PrecertEntry != nil:
		b = newEntry(e, sha256.Size+len(e.PrecertEntry.TBSCertificate))
		b.AddBytes(e.PrecertEntry.IssuerKeyHash[:])
		addCert(b, e.PrecertEntry.TBSCertificate)
	default:
		return nil, fmt.Errorf("encode entry: type %d without its body", e.EntryType)
	}
	b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(e.Extensions) })
	out, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("encode entry: %w", err)
	}
	return out, nil
}

// newEntry starts an entry whose body has about n octets.
func newEntry(e *ct.TimestampedEntry, n int) *cryptobyte.Builder {
	b := cryptobyte.NewBuilder(make([]byte, 0, n+len(e.Extensions)+32))
	b.AddUint8(uint8(ct.V1))
	b.AddUint8(uint8(ct.TimestampedEntryLeafType))
	b.AddUint64(e.Timestamp)
	b.AddUint16(uint16(e.EntryType))
	return b
}

// addCert adds an opaque<1..2^24-1>.
func addCert(b *cryptobyte.Builder, der []byte) {
	if len(der) == 0 {
		b.SetError(errASN1Cert)
		return
	}
	b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(der) })
}

// addChain adds an ASN.1Cert<0..2^24-1>.
func addChain(b *cryptobyte.Builder, chain [][]byte) {
	b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) {
		for _, der := range chain {
			addCert(b, der)
		}
	})
}

// encodeSCT is the TLS encoding of RFC 6962, Section 3.2, with no extensions.
func (l *Log) encodeSCT(timestamp uint64, signature []byte) ([]byte, error) {
	b := cryptobyte.NewBuilder(make([]byte, 0, 47+len(signature)))
	b.AddUint8(uint8(ct.V1))
	b.AddBytes(l.logID[:])
	b.AddUint64(timestamp)
	b.AddUint16(0)
	addSigned(b, signature)
	out, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("encode SCT: %w", err)
	}
	return out, nil
}

// addSigned adds a DigitallySigned: a DER ECDSA signature over SHA-256
// (RFC 5246, Section 4.7).
func addSigned(b *cryptobyte.Builder, signature []byte) {
	b.AddUint8(uint8(tls.SHA256))
	b.AddUint8(uint8(tls.ECDSA))
	b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(signature) })
}
