// Package catest is the parts of a CA, a chain of certificates and a log in
// memory, for the tests and benchmarks of ca and ca/server, on whatever keys they
// bring. The chain is made by ca/profile and the SCTs are real: every part of an
// issued certificate verifies.
package catest

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/cryptobyte"

	"github.com/chancery-ca/chancery/ca"
	"github.com/chancery-ca/chancery/ca/profile"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// Start is when the chain begins to be valid; it lasts a year.
var Start = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// Noon is the time of the tests.
var Noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// Parts are what a CA consists of, with counters on the keys.
type Parts struct {
	Key, LogKey *hsmtest.Counting
	Chain       []*x509.Certificate // intermediate, root
	Log         *Log
}

// NewParts makes a CA's parts on software keys.
func NewParts(t testing.TB) *Parts {
	t.Helper()
	return PartsOn(t, hsmtest.SoftwareKey(hsm.ECDSAP256), hsmtest.SoftwareKey(hsm.ECDSAP256))
}

// PartsOn makes a CA's parts on the keys of the intermediate and of the log.
func PartsOn(t testing.TB, intermediate, log hsm.Key) *Parts {
	t.Helper()
	p := &Parts{Key: &hsmtest.Counting{Key: intermediate}, LogKey: &hsmtest.Counting{Key: log}}
	p.Chain = Chain(t, hsmtest.SoftwareKey(hsm.ECDSAP384), intermediate)
	p.Log = &Log{Key: p.LogKey}
	return p
}

// Config is a configuration that works. Its clock stands at Noon.
func (p *Parts) Config() ca.Config {
	return ca.Config{
		Key: p.Key, Chain: p.Chain, SCTs: p.Log, LogKey: p.LogKey.Public(),
		Now: func() (time.Time, error) { return Noon, nil },
	}
}

// Authority makes the CA.
func Authority(t testing.TB, cfg ca.Config) *ca.Authority {
	t.Helper()
	a, err := ca.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// Chain makes a root and an intermediate, and returns the intermediate's
// certificate and the root's.
func Chain(t testing.TB, root, intermediate hsm.Key) []*x509.Certificate {
	t.Helper()
	rootCert := certify(t, profile.Root, "Test Root", root, nil, root)
	return []*x509.Certificate{certify(t, profile.Intermediate, "Test CA", intermediate, rootCert, root), rootCert}
}

func certify(t testing.TB, kind profile.Kind, name string, subject hsm.Key, issuer *x509.Certificate, signer hsm.Key) *x509.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 150))
	if err != nil {
		t.Fatal(err)
	}
	spec := profile.AuthoritySpec{
		Kind: kind, Subject: pkix.Name{CommonName: name, Organization: []string{"Test"}},
		Serial: serial.SetBit(serial, 150, 1), Public: subject.Public(),
		NotBefore: Start, NotAfter: Start.AddDate(1, 0, 0),
	}
	if kind == profile.Root {
		spec.PathLen = 1
	}
	tbs, err := profile.NewAuthority(spec, issuer)
	if err != nil {
		t.Fatal(err)
	}
	der, err := tbs.Sign(t.Context(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// Leaf is what was committed to a Log.
type Leaf struct {
	TBS, Precert []byte
	Chain        [][]byte
}

// Log signs SCTs and keeps leaves in memory. Its hooks stand where the real
// one may fail or wait; set them before use.
type Log struct {
	Key       hsm.Key
	OnPromise func(ctx context.Context, tbs []byte) error
	OnCommit  func(ctx context.Context) error
	// Tamper changes an SCT on its way out.
	Tamper func(sct []byte) []byte

	mu     sync.Mutex
	leaves []Leaf // guarded by mu
}

// Leaves returns what was committed.
func (l *Log) Leaves() []Leaf {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]Leaf(nil), l.leaves...)
}

// Promise implements ca.SCTSource.
func (l *Log) Promise(ctx context.Context, issuerKeyHash [32]byte, tbs []byte) (ca.Promise, error) {
	if l.OnPromise != nil {
		if err := l.OnPromise(ctx, tbs); err != nil {
			return nil, err
		}
	}
	p, err := l.sign(ctx, issuerKeyHash, tbs)
	if err != nil {
		return nil, err
	}
	if l.Tamper != nil {
		p.sct = l.Tamper(p.sct)
	}
	return p, nil
}

// sign makes a SignedCertificateTimestamp (RFC 6962, Section 3.2).
func (l *Log) sign(ctx context.Context, issuerKeyHash [32]byte, tbs []byte) (*promise, error) {
	spki, err := x509.MarshalPKIXPublicKey(l.Key.Public())
	if err != nil {
		return nil, err
	}
	id := sha256.Sum256(spki)
	at := uint64(Noon.UnixMilli())
	var data cryptobyte.Builder
	data.AddBytes([]byte{0, 0}) // v1, certificate_timestamp
	data.AddUint64(at)
	data.AddUint16(1) // precert_entry
	data.AddBytes(issuerKeyHash[:])
	data.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(tbs) })
	data.AddUint16(0) // no extensions
	digest := sha256.Sum256(data.BytesOrPanic())
	signature, err := l.Key.SignContext(ctx, digest[:], hsm.ECDSAP256.Hash())
	if err != nil {
		return nil, err
	}
	var sct cryptobyte.Builder
	sct.AddUint8(0)
	sct.AddBytes(id[:])
	sct.AddUint64(at)
	sct.AddUint16(0)
	sct.AddBytes([]byte{4, 3}) // sha256, ecdsa
	sct.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(signature) })
	return &promise{log: l, sct: sct.BytesOrPanic(), tbs: tbs, digest: digest, signature: signature}, nil
}

// promise is a ca.Promise.
type promise struct {
	log       *Log
	sct, tbs  []byte
	digest    [32]byte
	signature []byte
}

// SCT returns the TLS-encoded SCT.
func (p *promise) SCT() []byte { return p.sct }

// Signed returns what the log's key signed, and its signature.
func (p *promise) Signed() (digest [32]byte, signature []byte) { return p.digest, p.signature }

// Commit keeps the leaf.
func (p *promise) Commit(ctx context.Context, precert []byte, chain [][]byte) (uint64, error) {
	if p.log.OnCommit != nil {
		if err := p.log.OnCommit(ctx); err != nil {
			return 0, err
		}
	}
	p.log.mu.Lock()
	defer p.log.mu.Unlock()
	p.log.leaves = append(p.log.leaves, Leaf{TBS: p.tbs, Precert: precert, Chain: chain})
	return uint64(len(p.log.leaves) - 1), nil
}
