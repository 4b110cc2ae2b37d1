package ct

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"sync"
	"testing"
	"time"

	ct "github.com/google/certificate-transparency-go"
	"github.com/google/certificate-transparency-go/tls"
	ctx509 "github.com/google/certificate-transparency-go/x509"
)

// TestEncode compares what is encoded by hand with the library's encoding.
func TestEncode(t *testing.T) {
	filled := func(n int) []byte { return bytes.Repeat([]byte{0xa5}, n) }
	x509Entry := func(der []byte, extensions []byte) *ct.TimestampedEntry {
		return &ct.TimestampedEntry{Timestamp: 1 << 40, EntryType: ct.X509LogEntryType, X509Entry: &ct.ASN1Cert{Data: der}, Extensions: extensions}
	}
	precertEntry := func(tbs []byte, extensions []byte) *ct.TimestampedEntry {
		return &ct.TimestampedEntry{
			Timestamp: 1790000000123, EntryType: ct.PrecertLogEntryType, Extensions: extensions,
			PrecertEntry: &ct.PreCert{IssuerKeyHash: [32]byte(filled(32)), TBSCertificate: tbs},
		}
	}
	tests := []struct {
		name  string
		entry *ct.TimestampedEntry
		cert  []byte
		chain [][]byte
	}{
		{"certificate", x509Entry(filled(700), nil), filled(700), [][]byte{filled(500), filled(400)}},
		{"certificate without a chain", x509Entry(filled(1), nil), filled(1), nil},
		{"precertificate", precertEntry(filled(1200), nil), filled(1300), [][]byte{filled(500), filled(400)}},
		{"precertificate above 64 KiB", precertEntry(filled(70000), nil), filled(70000), [][]byte{filled(1)}},
		{"extensions", precertEntry(filled(3), filled(9)), filled(3), [][]byte{filled(255), filled(256)}},
		{"empty certificate", x509Entry(nil, nil), nil, [][]byte{nil}},
		{"empty TBS", precertEntry(nil, nil), nil, nil},
		{"TBS of 1 MiB", precertEntry(filled(1<<20), nil), filled(1 << 20), nil},
		{"TBS too long", precertEntry(filled(1<<24), nil), filled(1 << 24), [][]byte{filled(1)}},
		{"chain too long", precertEntry(filled(1), nil), filled(1), [][]byte{filled(1 << 23), filled(1 << 23)}},
		{"extensions too long", precertEntry(filled(1), filled(1<<16)), filled(1), nil},
		{"no body", &ct.TimestampedEntry{EntryType: ct.PrecertLogEntryType}, filled(1), nil},
		{"unknown type", &ct.TimestampedEntry{EntryType: 7}, filled(1), nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, gotErr := encodeEntry(test.entry)
			leaf, err := tls.Marshal(ct.MerkleTreeLeaf{Version: ct.V1, LeafType: ct.TimestampedEntryLeafType, TimestampedEntry: test.entry})
			same(t, "leaf", got, gotErr, leaf, err)
			input, err := tls.Marshal(ct.CertificateTimestamp{
				SCTVersion: ct.V1, SignatureType: ct.CertificateTimestampSignatureType, Timestamp: test.entry.Timestamp,
				EntryType: test.entry.EntryType, X509Entry: test.entry.X509Entry, PrecertEntry: test.entry.PrecertEntry,
				Extensions: test.entry.Extensions,
			})
			same(t, "what the SCT signs", got, gotErr, input, err)

			signature := filled(71)
			got, gotErr = encodeExtra(signature, test.entry.EntryType, test.cert, test.chain)
			want, err := libraryExtra(test.entry.EntryType, test.cert, test.chain)
			same(t, "extra data", got, gotErr, append(append([]byte{extraVersion, 0, 71}, signature...), want...), err)
		})
	}
}

// libraryExtra is the extra_data of RFC 6962, Section 4.6, by the library.
func libraryExtra(kind ct.LogEntryType, cert []byte, chain [][]byte) ([]byte, error) {
	certs := make([]ct.ASN1Cert, len(chain))
	for i, der := range chain {
		certs[i].Data = der
	}
	if kind == ct.PrecertLogEntryType {
		return tls.Marshal(ct.PrecertChainEntry{PreCertificate: ct.ASN1Cert{Data: cert}, CertificateChain: certs})
	}
	return tls.Marshal(ct.CertificateChain{Entries: certs})
}

// same: both fail, or both give the same octets.
func same(t *testing.T, what string, got []byte, gotErr error, want []byte, wantErr error) {
	t.Helper()
	if (gotErr != nil) != (wantErr != nil) {
		t.Errorf("%s: error %v, the library's %v", what, gotErr, wantErr)
	}
	if gotErr == nil && !bytes.Equal(got, want) {
		t.Errorf("%s: %d octets, not the library's %d", what, len(got), len(want))
	}
}

// TestEncodeSCT compares SCTs with the library's.
func TestEncodeSCT(t *testing.T) {
	l := &Log{logID: [32]byte{1, 2, 3}}
	for _, n := range []int{0, 8, 70, 72, 0xffff, 0x10000} {
		signature := bytes.Repeat([]byte{0x30}, n)
		got, gotErr := l.encodeSCT(1790000000123, signature)
		want, err := tls.Marshal(ct.SignedCertificateTimestamp{
			SCTVersion: ct.V1, LogID: ct.LogID{KeyID: l.logID}, Timestamp: 1790000000123,
			Signature: ct.DigitallySigned(digitallySigned(signature)),
		})
		same(t, "SCT", got, gotErr, want, err)
	}
}

// TestDefang compares what is left of a precertificate with what the library
// leaves, for every place of the poison and every length form.
func TestDefang(t *testing.T) {
	poison := pkix.Extension{Id: asn1.ObjectIdentifier(ctx509.OIDExtensionCTPoison), Critical: true, Value: asn1.NullBytes}
	other := func(n int) pkix.Extension {
		return pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57264, 1, n}, Value: bytes.Repeat([]byte{'x'}, n)}
	}
	tests := []struct {
		name       string
		extensions []pkix.Extension
		notAfter   time.Time
		err        error
	}{
		{"first", []pkix.Extension{poison, other(8)}, time.Time{}, nil},
		{"in the middle", []pkix.Extension{other(8), poison, other(9)}, time.Time{}, nil},
		{"last", []pkix.Extension{other(8), poison}, time.Time{}, nil},
		{"lengths of one octet", []pkix.Extension{other(100), poison}, time.Time{}, nil},
		{"lengths of two octets", []pkix.Extension{other(230), poison}, time.Time{}, nil},
		{"lengths of three octets", []pkix.Extension{other(70000), poison}, time.Time{}, nil},
		{"length that shrinks", []pkix.Extension{other(85), other(12), poison}, time.Time{}, nil},
		{"critical neighbour", []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 99}, Critical: true, Value: []byte{5, 0}}, poison}, time.Time{}, nil},
		{"after 2050", []pkix.Extension{other(8), poison}, time.Date(2051, 1, 1, 0, 0, 0, 0, time.UTC), nil},
		{"none", []pkix.Extension{other(8)}, time.Time{}, errPoison},
		{"two", []pkix.Extension{poison, other(8), poison}, time.Time{}, errPoison},
		{"nothing else", []pkix.Extension{poison}, time.Time{}, errPrecertificate},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			der, tbs := precertificateWith(t, test.extensions, test.notAfter)
			got, err := defang(der)
			if !errors.Is(err, test.err) {
				t.Fatalf("defang: %v, want %v", err, test.err)
			}
			if err != nil {
				return
			}
			want, err := ctx509.RemoveCTPoison(tbs)
			same(t, "TBS", got, nil, want, err)
		})
	}
}

// precertificateWith is a certificate with exactly these extensions, which
// crypto/x509 would refuse to make, and its TBS.
func precertificateWith(t *testing.T, extensions []pkix.Extension, notAfter time.Time) (der, tbs []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	if notAfter.IsZero() {
		notAfter = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	}
	algorithm := pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}}
	inner := struct {
		Version    int `asn1:"explicit,tag:0"`
		Serial     *big.Int
		Algorithm  pkix.AlgorithmIdentifier
		Issuer     asn1.RawValue
		Validity   struct{ NotBefore, NotAfter time.Time }
		Subject    asn1.RawValue
		Key        asn1.RawValue
		Extensions []pkix.Extension `asn1:"explicit,tag:3"`
	}{
		Version: 2, Serial: big.NewInt(1 << 40), Algorithm: algorithm, Extensions: extensions,
		Issuer: asn1.RawValue{FullBytes: []byte{0x30, 0}}, Subject: asn1.RawValue{FullBytes: []byte{0x30, 0}}, Key: asn1.RawValue{FullBytes: spki},
	}
	inner.Validity.NotBefore, inner.Validity.NotAfter = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), notAfter
	if tbs, err = asn1.Marshal(inner); err != nil {
		t.Fatal(err)
	}
	der, err = asn1.Marshal(struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{asn1.RawValue{FullBytes: tbs}, algorithm, asn1.BitString{Bytes: []byte{1}, BitLength: 8}})
	if err != nil {
		t.Fatal(err)
	}
	return der, tbs
}

// TestIssuersAreBounded: the bound holds for all who learn at once.
func TestIssuersAreBounded(t *testing.T) {
	l := &Log{issuers: make(map[[sha256.Size]byte][]byte)}
	var wg sync.WaitGroup
	for n := range 8 {
		wg.Go(func() {
			for i := range maxIssuers {
				l.learn(fmt.Append(nil, "issuer ", n, " ", i))
			}
		})
	}
	wg.Wait()
	if len(l.issuers) != maxIssuers {
		t.Errorf("%d issuers are kept, want %d", len(l.issuers), maxIssuers)
	}
}
