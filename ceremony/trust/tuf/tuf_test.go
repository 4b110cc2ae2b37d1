package tuf

import (
	"crypto/ecdsa"
	"errors"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

var start = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// people are the keys of a repository: custodians, of whom two must sign, and
// the online key.
type people struct {
	custodians []hsm.Key
	online     hsm.Key
	layout     Layout
}

func public(k hsm.Key) *ecdsa.PublicKey { return k.Public().(*ecdsa.PublicKey) }

// newPeople returns n custodians with keys in memory.
func newPeople(n int) *people {
	p := &people{online: hsmtest.SoftwareKey(hsm.ECDSAP256)}
	for range n {
		p.custodians = append(p.custodians, hsmtest.SoftwareKey(hsm.ECDSAP256))
	}
	p.layout = p.newLayout(2)
	return p
}

func (p *people) newLayout(threshold int) Layout {
	l := Layout{Threshold: threshold, Online: public(p.online), Expires: Expires{
		Root: Period{Years: 1}, Targets: Decade, Snapshot: Decade, Timestamp: Period{Days: 7},
	}}
	for _, k := range p.custodians {
		l.Custodians = append(l.Custodians, public(k))
	}
	return l
}

// signed has every key sign a draft, which is then complete.
func signed(t testing.TB, d *Draft, keys ...hsm.Key) []byte {
	t.Helper()
	for _, k := range keys {
		if _, err := d.Sign(t.Context(), k); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Err(); err != nil {
		t.Fatal(err)
	}
	data, err := d.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// must takes the error out of a result.
func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func someTargets() []Target {
	return []Target{
		{Name: TrustedRootTarget, Content: []byte(`{"a":1}`)},
		{Name: SigningConfigTarget, Content: []byte(`{"b":1}`)},
		{Name: "rekor.pub", Content: []byte("-----BEGIN"), Usage: "Rekor", Status: "Active", URI: "https://sig.example/log/l1"},
	}
}

// genesis is the first repository of p, signed by the first two custodians.
func (p *people) genesis(t testing.TB, targets []Target) *Repository {
	t.Helper()
	root := must(NewRoot(p.layout, nil, start))(t)
	rootFile := signed(t, root, p.custodians[:2]...)
	return p.assemble(t, [][]byte{rootFile}, 1, targets, start)
}

// assemble signs targets and the online part below the newest of the roots.
func (p *people) assemble(t testing.TB, roots [][]byte, version int64, targets []Target, now time.Time) *Repository {
	t.Helper()
	root := must(ParseRoot(roots[len(roots)-1]))(t)
	targetsFile := signed(t, must(NewTargets(root, version, targets, now))(t), p.custodians[:2]...)
	snapshot := signed(t, must(NewSnapshot(root, targetsFile, NextVersion(0, now), now))(t), p.online)
	timestamp := signed(t, must(NewTimestamp(root, snapshot, NextVersion(0, now), now))(t), p.online)
	return must(Assemble(roots, targetsFile, snapshot, timestamp, targets))(t)
}

func TestRepositoryRoundTrip(t *testing.T) {
	p := newPeople(3)
	repo := p.genesis(t, someTargets())
	dir := t.TempDir() + "/tuf"
	if err := repo.Write(dir); err != nil {
		t.Fatal(err)
	}
	if err := repo.Write(dir); err == nil {
		t.Error("written twice")
	}
	again, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Expired(start); err != nil {
		t.Error(err)
	}
	if err := again.Expired(start.AddDate(0, 0, 7)); !errors.Is(err, ErrExpired) {
		t.Errorf("after seven days: %v, want ErrExpired", err)
	}
	for _, f := range again.Files() {
		t.Logf("%s\n%s", f.Name, f.Content)
	}
}
