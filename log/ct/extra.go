package ct

import (
	"encoding/binary"
	"errors"
	"fmt"

	ct "github.com/google/certificate-transparency-go"
	"github.com/google/certificate-transparency-go/tls"
	"golang.org/x/crypto/cryptobyte"
)

// What a leaf keeps beside its hashed value (tree.Leaf.Extra) is ours, and
// versioned:
//
//	0x01 ‖ uint16 length ‖ SCT signature (DER) ‖ extra_data
//
// extra_data is the structure of RFC 6962, Section 4.6, and all that readers
// see. The signature lets a resubmission get its first SCT again; the rest of
// an SCT follows from the leaf. A later version may name issuers by hash.
const extraVersion = 1

var errExtra = errors.New("stored extra data is malformed")

// encodeExtra builds the stored form for a certificate and its chain.
func encodeExtra(signature []byte, kind ct.LogEntryType, cert []byte, chain [][]byte) ([]byte, error) {
	size := 3 + len(signature) + 3 + len(cert) + 3
	for _, der := range chain {
		size += 3 + len(der)
	}
	b := cryptobyte.NewBuilder(make([]byte, 0, size))
	b.AddUint8(extraVersion)
	b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(signature) })
	if kind == ct.PrecertLogEntryType {
		addCert(b, cert)
	}
	addChain(b, chain)
	out, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("encode extra data: %w", err)
	}
	return out, nil
}

// splitExtra returns the SCT signature and the RFC 6962 extra_data.
func splitExtra(extra []byte) (signature, data []byte, err error) {
	if len(extra) < 3 || extra[0] != extraVersion {
		return nil, nil, errExtra
	}
	n := int(binary.BigEndian.Uint16(extra[1:]))
	if len(extra) < 3+n {
		return nil, nil, errExtra
	}
	return extra[3 : 3+n], extra[3+n:], nil
}

// parseExtra reads extra_data: the precertificate (nil for a certificate
// entry) and the chain from the issuer on.
func parseExtra(kind ct.LogEntryType, data []byte) (precert []byte, chain []ct.ASN1Cert, err error) {
	var rest []byte
	if kind == ct.PrecertLogEntryType {
		var e ct.PrecertChainEntry
		rest, err = tls.Unmarshal(data, &e)
		precert, chain = e.PreCertificate.Data, e.CertificateChain
	} else {
		var e ct.CertificateChain
		rest, err = tls.Unmarshal(data, &e)
		chain = e.Entries
	}
	if err != nil || len(rest) > 0 {
		return nil, nil, errExtra
	}
	return precert, chain, nil
}
