package ct

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"math/big"
	"testing"

	ct "github.com/google/certificate-transparency-go"
	"github.com/google/certificate-transparency-go/tls"
	ctx509 "github.com/google/certificate-transparency-go/x509"
	"github.com/google/certificate-transparency-go/x509util"
	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// fuzzChain is a root, a precertificate and a certificate of it.
func fuzzChain(f *testing.F) (root, precert, cert []byte) {
	f.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true, SubjectKeyId: []byte{1}}
	if root, err = x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key); err != nil {
		f.Fatal(err)
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), EmailAddresses: []string{"dev@test.example"}}
	if cert, err = x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), key); err != nil {
		f.Fatal(err)
	}
	leaf.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11129, 2, 4, 3}, Critical: true, Value: asn1.NullBytes}}
	if precert, err = x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), key); err != nil {
		f.Fatal(err)
	}
	return root, precert, cert
}

// FuzzAddChain: an accepted body gives an entry that can be stored and read
// again; a refused one is refused with a sentence.
func FuzzAddChain(f *testing.F) {
	root, precert, cert := fuzzChain(f)
	parsed, err := ctx509.ParseCertificate(root)
	if ctx509.IsFatal(err) {
		f.Fatal(err)
	}
	l := &Log{roots: x509util.NewPEMCertPool(), issuers: map[[32]byte][]byte{}}
	l.roots.AddCert(parsed)
	for _, chain := range [][][]byte{nil, {precert, root}, {cert, root}, {cert}, {precert, cert, root}} {
		b, err := json.Marshal(ct.AddChainRequest{Chain: chain})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, true)
		f.Add(b, false)
	}
	f.Fuzz(func(t *testing.T, body []byte, pre bool) {
		kind := ct.X509LogEntryType
		if pre {
			kind = ct.PrecertLogEntryType
		}
		raw, err := parseBody(body)
		var s *submission
		if err == nil {
			s, err = l.check(raw, kind)
		}
		if err != nil {
			var bad badChain
			if !errors.As(err, &bad) {
				t.Fatalf("refused without a sentence: %v", err)
			}
			return
		}
		signed, err := encodeEntry(s.entry)
		if err != nil {
			t.Fatal(err)
		}
		p := &Promise{log: l, entry: s.entry, signed: signed, signature: []byte("signature")}
		leaf, err := p.leaf(s.cert, s.chain)
		if err != nil {
			t.Fatal(err)
		}
		signature, data, err := splitExtra(leaf.Extra)
		if err != nil || string(signature) != "signature" {
			t.Fatalf("signature %q, %v", signature, err)
		}
		entry, err := ct.RawLogEntryFromLeaf(0, &ct.LeafEntry{LeafInput: leaf.Value, ExtraData: data})
		if err != nil || !bytes.Equal(entry.Cert.Data, s.cert) || len(entry.Chain) != len(s.chain) {
			t.Fatalf("entry as a client reads it: %v", err)
		}
		if _, err := l.tileLeaf(leaf.Value, data); err != nil {
			t.Fatal(err)
		}
	})
}

// FuzzStored: whatever the storage gives back, reading it does not panic, and
// what is read is what was written.
func FuzzStored(f *testing.F) {
	root, precert, cert := fuzzChain(f)
	for _, kind := range []ct.LogEntryType{ct.X509LogEntryType, ct.PrecertLogEntryType} {
		extra, err := encodeExtra([]byte("signature"), kind, precert, [][]byte{root})
		if err != nil {
			f.Fatal(err)
		}
		value, err := tls.Marshal(*ct.CreateX509MerkleTreeLeaf(ct.ASN1Cert{Data: cert}, 1))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(value, extra)
	}
	f.Add([]byte{}, []byte{1, 0xff, 0xff})
	l := &Log{issuers: map[[32]byte][]byte{}}
	f.Fuzz(func(t *testing.T, value, extra []byte) {
		signature, data, err := splitExtra(extra)
		if err != nil {
			return
		}
		if 3+len(signature)+len(data) != len(extra) {
			t.Fatal("octets lost")
		}
		_, _ = l.tileLeaf(value, data)
		_, _, _ = parseExtra(ct.PrecertLogEntryType, data)
	})
}

// FuzzDefang: what is taken from an accepted precertificate is what the
// library takes, which parses all of it and encodes it again.
func FuzzDefang(f *testing.F) {
	_, precert, cert := fuzzChain(f)
	f.Add(precert)
	f.Add(cert)
	f.Fuzz(func(t *testing.T, der []byte) {
		tbs, err := defang(der)
		if err != nil {
			return
		}
		var outer, poisoned cryptobyte.String
		in := cryptobyte.String(der)
		if !in.ReadASN1(&outer, casn1.SEQUENCE) || !outer.ReadASN1Element(&poisoned, casn1.SEQUENCE) {
			t.Fatal("accepted what is no certificate")
		}
		want, err := ctx509.RemoveCTPoison(poisoned)
		if err != nil || !bytes.Equal(tbs, want) {
			t.Fatalf("defang gives %x, the library %x, %v", tbs, want, err)
		}
	})
}
