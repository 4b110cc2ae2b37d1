package trust

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/testing/ca"
	"github.com/sigstore/sigstore-go/pkg/verify"
)

const (
	signer  = "alice@acme.example"
	issuer  = "https://login.acme.example"
	service = "https://sig.acme.example"
)

var artefact = []byte("something worth signing\n")

// generation is a sigstore of sigstore-go's own, whose keys stand for one
// generation of ours.
type generation struct {
	*ca.VirtualSigstore
	t testing.TB
}

func newGeneration(t testing.TB) generation {
	t.Helper()
	v, err := ca.NewVirtualSigstore()
	if err != nil {
		t.Fatal(err)
	}
	return generation{v, t}
}

func (g generation) authority(valid Validity) Authority {
	a := g.FulcioCertificateAuthorities()[0].(*root.FulcioCertificateAuthority)
	return Authority{"Acme", "root", service, append(a.Intermediates, a.Root), valid}
}

func (g generation) timestamps(valid Validity) Authority {
	a := g.TimestampingAuthorities()[0].(*root.SigstoreTimestampingAuthority)
	return Authority{"Acme", "tsa", service + TimestampPath, append(append([]*x509.Certificate{a.Leaf}, a.Intermediates...), a.Root), valid}
}

func (g generation) log(url string, valid Validity) Log {
	for _, l := range g.RekorLogs() {
		return Log{url, l.PublicKey.(*ecdsa.PublicKey), valid}
	}
	g.t.Fatal("no log")
	return Log{}
}

func (g generation) ctLog(url string, valid Validity) Log {
	for _, l := range g.CTLogs() {
		return Log{url, l.PublicKey.(*ecdsa.PublicKey), valid}
	}
	g.t.Fatal("no CT log")
	return Log{}
}

// sign returns a signature with an entry in this generation's log at a time and
// a timestamp of five minutes ago.
func (g generation) sign(at time.Time) *ca.TestEntity {
	g.t.Helper()
	e, err := g.SignAtTime(signer, issuer, artefact, at)
	if err != nil {
		g.t.Fatal(err)
	}
	return e
}

// check verifies a signature with a trusted_root.json, as sigstore-go does.
func check(t testing.TB, r Root, e *ca.TestEntity, options ...verify.VerifierOption) error {
	t.Helper()
	data, err := r.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	trusted, err := root.NewTrustedRootFromJSON(data)
	if err != nil {
		t.Fatal(err)
	}
	v, err := verify.NewVerifier(trusted, options...)
	if err != nil {
		t.Fatal(err)
	}
	id, err := verify.NewShortCertificateIdentity(issuer, "", signer, "")
	if err != nil {
		t.Fatal(err)
	}
	_, err = v.Verify(e, verify.NewPolicy(verify.WithArtifact(bytes.NewReader(artefact)), verify.WithCertificateIdentity(id)))
	return err
}

var (
	byLog = []verify.VerifierOption{verify.WithTransparencyLog(1), verify.WithIntegratedTimestamps(1)}
	byTSA = []verify.VerifierOption{verify.WithSignedTimestamps(1)}
)

// TestRotationKeepsSignatures rotates everything that a root has and verifies
// signatures of before and after, by sigstore-go.
func TestRotationKeepsSignatures(t *testing.T) {
	now := time.Now().UTC().Truncate(time.Second)
	open := Validity{Start: now.Add(-time.Hour)}
	before, after := newGeneration(t), newGeneration(t)
	old := Root{
		Logs:                   []Log{before.log(service+"/log/l1", open)},
		CTLogs:                 []Log{before.ctLog(service+"/ct/c1", open)},
		CertificateAuthorities: []Authority{before.authority(open)},
		TimestampAuthorities:   []Authority{before.timestamps(open)},
	}
	kept := old.clone()
	// The overlap: both are in use for an hour.
	end, next := now.Add(30*time.Minute), Validity{Start: now.Add(-30 * time.Minute)}
	rotate := func(end time.Time) Root {
		t.Helper()
		r, err := old.RotateCertificateAuthority(after.authority(next), end)
		if err != nil {
			t.Fatal(err)
		}
		if r, err = r.RotateTimestampAuthority(after.timestamps(next), end); err != nil {
			t.Fatal(err)
		}
		id, err := old.Logs[0].ID()
		if err != nil {
			t.Fatal(err)
		}
		if r, err = r.RotateLog(id, after.log(service+"/log/l2", next), end); err != nil {
			t.Fatal(err)
		}
		if id, err = old.CTLogs[0].ID(); err != nil {
			t.Fatal(err)
		}
		if r, err = r.RotateCTLog(id, after.ctLog(service+"/ct/c2", next), end); err != nil {
			t.Fatal(err)
		}
		return r
	}
	rotated := rotate(end)
	if diff := cmp.Diff(kept, old, cmp.Comparer(func(a, b *x509.Certificate) bool { return a.Equal(b) }), cmp.Comparer(func(a, b *ecdsa.PublicKey) bool { return a.Equal(b) })); diff != "" {
		t.Errorf("the root that was rotated has changed:\n%s", diff)
	}
	for _, tc := range []struct {
		name   string
		root   Root
		entity *ca.TestEntity
		by     []verify.VerifierOption
		ok     bool
	}{
		{"before, with the old root", old, before.sign(now.Add(time.Minute)), byLog, true},
		{"before, with the new root", rotated, before.sign(now.Add(time.Minute)), byLog, true},
		{"before, by its timestamp", rotated, before.sign(now.Add(time.Minute)), byTSA, true},
		{"after, with the new root", rotated, after.sign(now.Add(time.Minute)), byLog, true},
		{"after, by its timestamp", rotated, after.sign(now.Add(time.Minute)), byTSA, true},
		{"after, with the old root", old, after.sign(now.Add(time.Minute)), byLog, false},
		{"by the old log after its end", rotate(now.Add(-10 * time.Minute)), before.sign(now.Add(time.Minute)), byLog, false},
		{"by the old authorities after their end", rotate(now.Add(-10 * time.Minute)), before.sign(now.Add(time.Minute)), byTSA, false},
		{"of a third party", rotated, newGeneration(t).sign(now.Add(time.Minute)), byLog, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := check(t, tc.root, tc.entity, tc.by...); (err == nil) != tc.ok {
				t.Errorf("verified: %v, want %t", err, tc.ok)
			}
		})
	}
	// A third generation leaves the end of the first as it is.
	third := newGeneration(t)
	again, err := rotated.RotateCertificateAuthority(third.authority(Validity{Start: now}), now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if a := again.CertificateAuthorities; len(a) != 3 || !a[0].Validity.End.Equal(end) || !a[1].Validity.End.Equal(now.Add(time.Hour)) || !a[2].Validity.End.IsZero() {
		t.Errorf("validity of three generations: %v", a)
	}
}

func TestRotationRefuses(t *testing.T) {
	r := newRoot(t)
	a := r.CertificateAuthorities[0]
	next := Authority{"Acme", "root", a.URI, newChain(t, true), Validity{Start: start.AddDate(0, 1, 0)}}
	id, err := r.Logs[0].ID()
	if err != nil {
		t.Fatal(err)
	}
	shard := Log{"https://sig.example/log/l3", &newKey(t, elliptic.P256()).PublicKey, Validity{Start: start.AddDate(0, 1, 0)}}
	month := start.AddDate(0, 1, 0)
	if _, err := r.RotateCertificateAuthority(next, month); err != nil {
		t.Error(err)
	}
	if _, err := r.RotateLog(id, shard, month); err != nil {
		t.Error(err)
	}
	for _, tc := range []struct {
		name   string
		rotate func() error
	}{
		{"a gap", func() error { _, err := r.RotateCertificateAuthority(next, month.Add(-1)); return err }},
		{"an end before the start", func() error { _, err := r.RotateCertificateAuthority(next, start); return err }},
		{"the same certificate", func() error { _, err := r.RotateCertificateAuthority(a, month); return err }},
		{"no certificate", func() error { _, err := r.RotateCertificateAuthority(Authority{URI: a.URI}, month); return err }},
		{"another URI", func() error {
			n := next
			n.URI = "https://other.example"
			_, err := r.RotateCertificateAuthority(n, month)
			return err
		}},
		{"a timestamp authority at another URI", func() error { _, err := r.RotateTimestampAuthority(next, month); return err }},
		{"a log with a gap", func() error { _, err := r.RotateLog(id, shard, month.Add(-1)); return err }},
		{"a log with the same key", func() error {
			l := shard
			l.PublicKey = r.Logs[0].PublicKey
			_, err := r.RotateLog(id, l, month)
			return err
		}},
		{"a log with the same URL", func() error {
			l := shard
			l.BaseURL = r.Logs[0].BaseURL
			_, err := r.RotateLog(id, l, month)
			return err
		}},
		{"a log without a key", func() error { _, err := r.RotateLog(id, Log{BaseURL: "https://sig.example/log/l4"}, month); return err }},
		{"an unknown log", func() error { _, err := r.RotateLog([32]byte{1}, shard, month); return err }},
		{"a CT log by the id of a signature log", func() error { _, err := r.RotateCTLog(id, shard, month); return err }},
	} {
		if err := tc.rotate(); !errors.Is(err, ErrRotation) {
			t.Errorf("%s: %v, want ErrRotation", tc.name, err)
		}
	}
}

// TestRotateCA: a client takes the authority that is valid when it signs.
func TestRotateCA(t *testing.T) {
	c := newSigningConfig()
	c.CAs[0].Validity.End = start.AddDate(3, 0, 0)
	next := c.CAs[0]
	next.Validity = Validity{Start: start.AddDate(2, 0, 0), End: start.AddDate(5, 0, 0)}
	rotated, err := c.RotateCA(next, start.AddDate(2, 0, 1))
	if err != nil {
		t.Fatal(err)
	}
	data, err := rotated.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	sc, err := root.NewSigningConfigFromJSON(data)
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []time.Time{start.AddDate(1, 0, 0), start.AddDate(2, 0, 1), start.AddDate(4, 0, 0)} {
		if s, err := root.SelectService(sc.FulcioCertificateAuthorityURLs(), []uint32{1}, at); err != nil || s.URL != next.URL {
			t.Errorf("at %s: %+v, %v", at, s, err)
		}
	}
	if _, err := root.SelectService(sc.FulcioCertificateAuthorityURLs(), []uint32{1}, start.AddDate(5, 0, 1)); err == nil {
		t.Error("an authority after the end of both")
	}
	if len(c.CAs) != 1 || !c.CAs[0].Validity.End.Equal(start.AddDate(3, 0, 0)) {
		t.Error("the configuration that was rotated has changed")
	}
	next.URL = "https://other.example"
	if _, err := c.RotateCA(next, start.AddDate(2, 0, 1)); !errors.Is(err, ErrRotation) {
		t.Errorf("another URL: %v, want ErrRotation", err)
	}
}
