package tuf

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/theupdateframework/go-tuf/v2/metadata/trustedmetadata"

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
	dir := filepath.Join(t.TempDir(), "tuf")
	if err := repo.Write(dir); err != nil {
		t.Fatal(err)
	}
	if err := repo.Write(dir); !errors.Is(err, fs.ErrExist) {
		t.Errorf("written twice: %v", err)
	}
	again, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(repo.Files(), again.Files()); diff != "" {
		t.Errorf("read back (-want +got):\n%s", diff)
	}
	if last := repo.Files()[len(repo.Files())-1]; last.Name != TimestampName {
		t.Errorf("the last file is %s", last.Name)
	}
	for _, tc := range []struct {
		at      time.Time
		expired bool
	}{{start, false}, {start.AddDate(0, 0, 7).Add(-time.Second), false}, {start.AddDate(0, 0, 7), true}, {start.AddDate(11, 0, 0), true}} {
		if err := again.Expired(tc.at); errors.Is(err, ErrExpired) != tc.expired || err != nil && !tc.expired {
			t.Errorf("at %s: %v", tc.at, err)
		}
	}
	if diff := cmp.Diff([]string{"rekor.pub", SigningConfigTarget, TrustedRootTarget}, again.TargetNames()); diff != "" {
		t.Errorf("targets (-want +got):\n%s", diff)
	}
	for _, target := range someTargets() {
		if !bytes.Equal(again.Target(target.Name), target.Content) {
			t.Errorf("target %s: %q", target.Name, again.Target(target.Name))
		}
	}
	if again.Target("none") != nil || again.TargetsVersion() != 1 || again.Root().Version != 1 || len(again.RootFiles()) != 1 {
		t.Error("a target that is not there, or versions other than 1")
	}
}

// TestPayload: what is signed is the same today and tomorrow, and is what the
// file says (TUF 1.0.31, Section 4.2).
func TestPayload(t *testing.T) {
	p := newPeople(2)
	one, two := must(NewRoot(p.layout, nil, start))(t), must(NewRoot(p.layout, nil, start))(t)
	if one.Digest() != two.Digest() || one.Digest() != sha256.Sum256(one.Payload()) || one.Name() != "1.root.json" || one.Role() != RoleRoot {
		t.Error("two drafts of one root differ")
	}
	if !one.Expires().Equal(start.AddDate(1, 0, 0)) || one.Version() != 1 {
		t.Errorf("expires %s, version %d", one.Expires(), one.Version())
	}
	if later := must(NewRoot(p.layout, nil, start.Add(time.Second)))(t); later.Digest() == one.Digest() {
		t.Error("a draft of a second later is the same")
	}
	file := signed(t, one, p.custodians...)
	if _, err := two.Sign(t.Context(), p.custodians[1]); err != nil {
		t.Fatal(err)
	}
	half := must(two.Bytes())(t)
	again := must(ReadRootDraft(half, nil))(t)
	if err := again.Err(); !errors.Is(err, ErrThreshold) {
		t.Errorf("half signed: %v, want ErrThreshold", err)
	}
	if _, err := again.Sign(t.Context(), p.custodians[0]); err != nil || again.Err() != nil {
		t.Errorf("signed by the second on another machine: %v, %v", err, again.Err())
	}
	// Signatures arrive in any order and stand in one.
	var ids []string
	for _, s := range must(ReadRootDraft(file, nil))(t).Signatures() {
		ids = append(ids, s.KeyID)
	}
	if !slices.IsSorted(ids) || len(ids) != 2 {
		t.Errorf("signatures of %v", ids)
	}
}

func TestAddRefuses(t *testing.T) {
	p := newPeople(3)
	stranger := hsmtest.SoftwareKey(hsm.ECDSAP256)
	other := must(NewRoot(p.layout, nil, start.Add(time.Second)))(t)
	wrong := must(other.Sign(t.Context(), p.custodians[0]))(t)
	draft := func() *Draft { return must(NewRoot(p.layout, nil, start))(t) }
	good := must(draft().Sign(t.Context(), p.custodians[0]))(t)
	with := func(change func(*Signature)) Signature {
		s := Signature{good.KeyID, bytes.Clone(good.Sig)}
		change(&s)
		return s
	}
	for _, tc := range []struct {
		name string
		sig  Signature
		want error
	}{
		{"right", good, nil},
		{"over another draft", wrong, ErrSignature},
		{"of a stranger", must(draftOf(stranger).Sign(t.Context(), stranger))(t), ErrForeign},
		{"of the online key", must(draftOf(p.online).Sign(t.Context(), p.online))(t), ErrForeign},
		{"under another's name", with(func(s *Signature) { s.KeyID = must(KeyID(public(p.custodians[1])))(t) }), ErrSignature},
		{"changed", with(func(s *Signature) { s.Sig[len(s.Sig)-1] ^= 1 }), ErrSignature},
		{"with an octet more", with(func(s *Signature) { s.Sig = append(s.Sig, 0) }), ErrSignature},
		{"empty", with(func(s *Signature) { s.Sig = nil }), ErrSignature},
		{"huge", with(func(s *Signature) { s.Sig = make([]byte, 1<<16) }), ErrSignature},
		{"upper case", with(func(s *Signature) { s.KeyID = strings.ToUpper(s.KeyID) }), ErrForeign},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := draft()
			if err := d.Add(tc.sig); !errors.Is(err, tc.want) {
				t.Fatalf("%v, want %v", err, tc.want)
			}
			if n := len(d.Signatures()); (n == 1) != (tc.want == nil) {
				t.Errorf("%d signatures", n)
			}
		})
	}
	d := draft()
	for i, want := range []error{nil, ErrDouble} {
		if err := d.Add(good); !errors.Is(err, want) {
			t.Errorf("time %d: %v, want %v", i+1, err, want)
		}
	}
	// A key that would be refused is not asked.
	asked := &failing{Key: p.custodians[0], err: hsm.ErrLost}
	if _, err := d.Sign(t.Context(), asked); !errors.Is(err, ErrDouble) || asked.calls != 0 {
		t.Errorf("signed twice: %v, %d calls", err, asked.calls)
	}
	p384 := hsmtest.SoftwareKey(hsm.ECDSAP384)
	if _, err := d.Sign(t.Context(), p384); !errors.Is(err, ErrForeign) {
		t.Errorf("a P-384 key: %v, want ErrForeign", err)
	}
	if _, err := d.Sign(t.Context(), &failing{Key: p.custodians[1], err: hsm.ErrBusy}); !errors.Is(err, hsm.ErrBusy) {
		t.Errorf("a busy token: %v", err)
	}
}

// draftOf is a root whose one custodian is the key.
func draftOf(key hsm.Key) *Draft {
	l := newPeople(0).newLayout(1)
	l.Custodians = []*ecdsa.PublicKey{public(key)}
	d, err := NewRoot(l, nil, start)
	if err != nil {
		panic(err)
	}
	return d
}

// TestRootSuccession: whoever signs, root 2 needs two of the old custodians and
// two of the new.
func TestRootSuccession(t *testing.T) {
	old := newPeople(3)
	first := old.genesis(t, someTargets())
	next := newPeople(2)
	next.custodians = append(next.custodians, old.custodians[2]) // stays
	next.layout = next.newLayout(2)
	a, b, c, d, e := old.custodians[0], old.custodians[1], old.custodians[2], next.custodians[0], next.custodians[1]
	for _, tc := range []struct {
		name string
		keys []hsm.Key
		ok   bool
	}{
		{"nobody", nil, false},
		{"old alone", []hsm.Key{a, b, c}, false},
		{"new alone", []hsm.Key{d, e}, false},
		{"one old, two new", []hsm.Key{a, d, e}, false},
		{"two old, one new", []hsm.Key{a, b, d}, false},
		{"two and two", []hsm.Key{d, b, a, e}, true},
		{"who is both counts for both", []hsm.Key{c, a, d}, true},
		{"all", []hsm.Key{a, b, c, d, e}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			draft := must(NewRoot(next.layout, first.Root(), start.AddDate(0, 6, 0)))(t)
			for _, k := range tc.keys {
				if _, err := draft.Sign(t.Context(), k); err != nil {
					t.Fatal(err)
				}
			}
			err := draft.Err()
			if (err == nil) != tc.ok || err != nil && !errors.Is(err, ErrThreshold) {
				t.Fatalf("%v, want %t", err, tc.ok)
			}
			root2 := must(draft.Bytes())(t)
			parsed := must(ParseRoot(root2))(t)
			targets := signed(t, must(NewTargets(parsed, 2, someTargets(), start))(t), next.custodians[:2]...)
			repo, err := Assemble(append(first.RootFiles(), root2), targets, nil, nil, someTargets())
			if (err == nil) != tc.ok || err != nil && !errors.Is(err, ErrThreshold) {
				t.Fatalf("repository: %v, want %t", err, tc.ok)
			}
			// go-tuf's client says the same.
			trusted := must(trustedmetadata.New(first.RootFiles()[0]))(t)
			if _, err := trusted.UpdateRoot(root2); (err == nil) != tc.ok {
				t.Errorf("go-tuf: %v, want %t", err, tc.ok)
			}
			if tc.ok && (repo.Root().Version != 2 || len(repo.RootFiles()) != 2) {
				t.Errorf("root %d of %d", repo.Root().Version, len(repo.RootFiles()))
			}
		})
	}
	if _, err := ReadRootDraft(first.RootFiles()[0], first.Root()); !errors.Is(err, ErrVersion) {
		t.Errorf("root 1 after root 1: %v, want ErrVersion", err)
	}
}

func TestLayoutRefuses(t *testing.T) {
	p := newPeople(3)
	for _, tc := range []struct {
		name   string
		change func(*Layout)
	}{
		{"no custodian", func(l *Layout) { l.Custodians = nil }},
		{"threshold 0", func(l *Layout) { l.Threshold = 0 }},
		{"threshold of four", func(l *Layout) { l.Threshold = 4 }},
		{"custodian twice", func(l *Layout) { l.Custodians[1] = l.Custodians[0] }},
		{"custodian without a key", func(l *Layout) { l.Custodians[1] = nil }},
		{"custodian on P-384", func(l *Layout) { l.Custodians[1] = public(hsmtest.SoftwareKey(hsm.ECDSAP384)) }},
		{"no online key", func(l *Layout) { l.Online = nil }},
		{"the online key is a custodian's", func(l *Layout) { l.Online = l.Custodians[2] }},
		{"no period", func(l *Layout) { l.Expires.Timestamp = Period{} }},
		{"years and days", func(l *Layout) { l.Expires.Root.Days = 1 }},
		{"too many custodians", func(l *Layout) {
			for range maxCustodians {
				l.Custodians = append(l.Custodians, public(hsmtest.SoftwareKey(hsm.ECDSAP256)))
			}
		}},
	} {
		l := p.newLayout(2)
		tc.change(&l)
		if _, err := NewRoot(l, nil, start); !errors.Is(err, ErrLayout) {
			t.Errorf("%s: %v, want ErrLayout", tc.name, err)
		}
	}
	root := must(ParseRoot(signed(t, must(NewRoot(p.layout, nil, start))(t), p.custodians...)))(t)
	for _, tc := range []struct {
		name    string
		targets []Target
	}{
		{"none", nil},
		{"empty", []Target{{Name: "a"}}},
		{"path", []Target{{Name: "../a", Content: []byte("x")}}},
		{"slash", []Target{{Name: "a/b", Content: []byte("x")}}},
		{"twice", []Target{{Name: "a", Content: []byte("x")}, {Name: "a", Content: []byte("y")}}},
		{"huge", []Target{{Name: "a", Content: make([]byte, MaxFile+1)}}},
	} {
		if _, err := NewTargets(root, 1, tc.targets, start); !errors.Is(err, ErrLayout) {
			t.Errorf("targets: %s: %v, want ErrLayout", tc.name, err)
		}
	}
	if _, err := NewTargets(root, 0, someTargets(), start); !errors.Is(err, ErrVersion) {
		t.Errorf("version 0: %v, want ErrVersion", err)
	}
}

func TestPeriod(t *testing.T) {
	for s, end := range map[string]time.Time{"7d": start.AddDate(0, 0, 7), "1y": start.AddDate(1, 0, 0), "9999d": start.AddDate(0, 0, 9999), "99y": start.AddDate(99, 0, 0)} {
		p, err := ParsePeriod(s)
		if err != nil || p.String() != s || !p.After(start.Add(time.Millisecond)).Equal(end) {
			t.Errorf("%s: %v, %v", s, p, err)
		}
	}
	for _, s := range []string{"", "d", "7", "0d", "-1d", "+1d", "07d", "1w", "100y", "10000d", "1 d", "1y1d", "99999999999d"} {
		if p, err := ParsePeriod(s); !errors.Is(err, ErrLayout) {
			t.Errorf("%q: %v, %v", s, p, err)
		}
	}
}

// TestEveryOctet flips a bit in octets of every file of a repository: in each
// with CHANCERY_TAMPER=1, else in one of 23. It is noticed wherever it is.
func TestEveryOctet(t *testing.T) {
	step := 23
	if os.Getenv("CHANCERY_TAMPER") == "1" {
		step = 1
	}
	p := newPeople(3)
	first := p.genesis(t, someTargets())
	root2 := signed(t, must(NewRoot(p.layout, first.Root(), start))(t), p.custodians...)
	files := p.assemble(t, append(first.RootFiles(), root2), 2, someTargets(), start).Files()
	octets := 0
	for n, f := range files {
		good := f.Content
		for i := 0; i < len(good); i += step {
			changed := bytes.Clone(good)
			changed[i] ^= 1 << (i % 8)
			files[n].Content = changed
			if _, err := New(files); err == nil {
				t.Fatalf("%s: octet %d (%q for %q) is not noticed", f.Name, i, changed[i], good[i])
			}
			octets++
		}
		files[n].Content = good
		for _, changed := range [][]byte{good[:len(good)-1], append(bytes.Clone(good), '\n'), append([]byte{' '}, good...), {}} {
			files[n].Content = changed
			if _, err := New(files); err == nil {
				t.Fatalf("%s: %d octets instead of %d are not noticed", f.Name, len(changed), len(good))
			}
		}
		files[n].Content = good
	}
	if _, err := New(files); err != nil || octets < 300 {
		t.Fatalf("%v after %d octets", err, octets)
	}
}

func TestNewRefuses(t *testing.T) {
	p := newPeople(3)
	first := p.genesis(t, someTargets())
	root2 := signed(t, must(NewRoot(p.layout, first.Root(), start))(t), p.custodians...)
	good := p.assemble(t, append(first.RootFiles(), root2), 2, someTargets(), start)
	other := newPeople(3).genesis(t, someTargets())
	version := NextVersion(0, start)
	snapshotName := RoleSnapshot.fileName(version)
	content := func(r *Repository, name string) []byte { return r.files[name] }
	// Rightly signed and wrongly put together.
	older := p.assemble(t, append(first.RootFiles(), root2), 1, someTargets(), start)
	later := signed(t, must(NewSnapshot(good.Root(), content(good, "2.targets.json"), version+1, start))(t), p.online)
	half := must(NewTargets(good.Root(), 2, someTargets(), start))(t)
	if _, err := half.Sign(t.Context(), p.custodians[0]); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		change func(map[string][]byte)
		want   error
	}{
		{"nothing changed", func(map[string][]byte) {}, nil},
		{"without its online part", func(f map[string][]byte) { delete(f, TimestampName); delete(f, snapshotName) }, nil},
		{"no files", func(f map[string][]byte) { clear(f) }, ErrFormat},
		{"no root", func(f map[string][]byte) { delete(f, "1.root.json"); delete(f, "2.root.json") }, ErrFormat},
		{"no first root", func(f map[string][]byte) { delete(f, "1.root.json") }, ErrVersion},
		{"roots swapped", func(f map[string][]byte) { f["1.root.json"], f["2.root.json"] = f["2.root.json"], f["1.root.json"] }, ErrVersion},
		{"a root of others", func(f map[string][]byte) { f["1.root.json"] = content(other, "1.root.json") }, ErrThreshold},
		{"no targets", func(f map[string][]byte) { delete(f, "2.targets.json") }, ErrFormat},
		{"two targets", func(f map[string][]byte) { f["1.targets.json"] = content(first, "1.targets.json") }, ErrFormat},
		{"targets of others", func(f map[string][]byte) { f["2.targets.json"] = content(other, "1.targets.json") }, ErrForeign},
		{"targets under another version", func(f map[string][]byte) { f["2.targets.json"] = content(first, "1.targets.json") }, ErrVersion},
		{"targets signed by one", func(f map[string][]byte) { f["2.targets.json"] = must(half.Bytes())(t) }, ErrThreshold},
		{"older targets", func(f map[string][]byte) {
			delete(f, "2.targets.json")
			f["1.targets.json"] = content(older, "1.targets.json")
		}, ErrVersion},
		{"no timestamp", func(f map[string][]byte) { delete(f, TimestampName) }, ErrFormat},
		{"no snapshot", func(f map[string][]byte) { delete(f, snapshotName) }, ErrFormat},
		{"another snapshot", func(f map[string][]byte) { delete(f, snapshotName); f[RoleSnapshot.fileName(version+1)] = later }, ErrVersion},
		{"snapshot under another version", func(f map[string][]byte) {
			f[RoleSnapshot.fileName(version+1)] = f[snapshotName]
			delete(f, snapshotName)
		}, ErrVersion},
		{"timestamp of others", func(f map[string][]byte) { f[TimestampName] = content(other, TimestampName) }, ErrForeign},
		{"snapshot for a timestamp", func(f map[string][]byte) { f[TimestampName] = f[snapshotName] }, ErrFormat},
		{"a target is missing", func(f map[string][]byte) {
			for name := range f {
				if strings.HasSuffix(name, ".rekor.pub") {
					delete(f, name)
				}
			}
		}, ErrFormat},
		{"a target more", func(f map[string][]byte) { f["targets/x"] = []byte("x") }, ErrFormat},
		{"a file more", func(f map[string][]byte) { f["root.json"] = f["2.root.json"] }, ErrFormat},
		{"a version with a zero", func(f map[string][]byte) { f["03.root.json"] = f["2.root.json"] }, ErrFormat},
		{"a version that is too high", func(f map[string][]byte) { f["9999999999999999.root.json"] = f["2.root.json"] }, ErrVersion},
		{"a folder", func(f map[string][]byte) { f["x/2.root.json"] = f["2.root.json"] }, ErrFormat},
	} {
		t.Run(tc.name, func(t *testing.T) {
			files := maps.Clone(good.files)
			tc.change(files)
			var list []File
			for name, content := range files {
				list = append(list, File{name, content})
			}
			if _, err := New(list); !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
		})
	}
	if _, err := New(append(good.Files(), good.Files()[0])); !errors.Is(err, ErrFormat) {
		t.Errorf("a file twice: %v, want ErrFormat", err)
	}
	if _, err := Assemble(good.RootFiles(), content(good, "2.targets.json"), nil, nil, append(someTargets(), Target{Name: "x", Content: []byte("x")})); !errors.Is(err, ErrFormat) {
		t.Errorf("a content that is not listed: %v, want ErrFormat", err)
	}
}

func TestLoadRefuses(t *testing.T) {
	repo := newPeople(2).genesis(t, someTargets())
	for _, tc := range []struct {
		name   string
		damage func(t *testing.T, dir string) error
		want   error
	}{
		{"a link for the root", func(t *testing.T, dir string) error {
			name := filepath.Join(dir, "1.root.json")
			if err := os.Rename(name, filepath.Join(t.TempDir(), "root")); err != nil {
				return err
			}
			return os.Symlink("/etc/passwd", name)
		}, ErrFormat},
		{"a huge file", func(_ *testing.T, dir string) error { return os.Truncate(filepath.Join(dir, TimestampName), 10<<30) }, ErrFormat},
		{"a folder", func(_ *testing.T, dir string) error { return os.Mkdir(filepath.Join(dir, "x"), 0o700) }, ErrFormat},
		{"a partial file", func(_ *testing.T, dir string) error {
			return os.WriteFile(filepath.Join(dir, "timestamp.json.partial"), nil, 0o600)
		}, ErrFormat},
		{"no targets folder", func(_ *testing.T, dir string) error { return os.RemoveAll(filepath.Join(dir, "targets")) }, fs.ErrNotExist},
		{"nothing", func(_ *testing.T, dir string) error { return os.RemoveAll(dir) }, fs.ErrNotExist},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "tuf")
			if err := repo.Write(dir); err != nil {
				t.Fatal(err)
			}
			if err := tc.damage(t, dir); err != nil {
				t.Fatal(err)
			}
			if _, err := Load(dir); !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
		})
	}
}

func TestSignatureFile(t *testing.T) {
	p := newPeople(2)
	sig := must(must(NewRoot(p.layout, nil, start))(t).Sign(t.Context(), p.custodians[0]))(t)
	data := must(sig.Marshal())(t)
	if again := must(ParseSignature(data))(t); !cmp.Equal(again, sig) {
		t.Errorf("read back: %v", again)
	}
	for name, bad := range map[string]string{
		"empty": "", "two": string(data) + string(data), "white space": " " + string(data), "unknown member": strings.Replace(string(data), "{", `{"x":1,`, 1),
		"upper case": strings.ToUpper(string(data)), "short id": strings.Replace(string(data), sig.KeyID, sig.KeyID[2:], 1),
		"no signature": `{"keyid":"` + sig.KeyID + `","sig":""}` + "\n", "huge": strings.Repeat(" ", 2000),
	} {
		if _, err := ParseSignature([]byte(bad)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v, want ErrFormat", name, err)
		}
	}
}

// TestClientSays: go-tuf's own client accepts what New accepts.
func TestClientSays(t *testing.T) {
	p := newPeople(3)
	first := p.genesis(t, someTargets())
	root2 := signed(t, must(NewRoot(p.layout, first.Root(), start))(t), p.custodians...)
	repo := p.assemble(t, append(first.RootFiles(), root2), 2, someTargets(), start)
	c := must(trustedmetadata.New(repo.RootFiles()[0]))(t)
	c.RefTime = start
	must(c.UpdateRoot(repo.RootFiles()[1]))(t)
	must(c.UpdateTimestamp(repo.files[TimestampName]))(t)
	must(c.UpdateSnapshot(repo.files[RoleSnapshot.fileName(repo.snapshot.version)], false))(t)
	targets := must(c.UpdateTargets(repo.files["2.targets.json"]))(t)
	if n := len(targets.Signed.Targets); n != 3 {
		t.Errorf("%d targets", n)
	}
}

func FuzzNew(f *testing.F) {
	p := newPeople(2)
	repo := p.genesis(f, someTargets())
	for _, file := range repo.Files() {
		f.Add(file.Name, file.Content)
	}
	f.Add("1.root.json", []byte(`{"signatures":[],"signed":{"_type":"root"}}`))
	files := repo.Files()
	f.Fuzz(func(t *testing.T, name string, content []byte) {
		changed := slices.Clone(files)
		same := false
		i := slices.IndexFunc(changed, func(f File) bool { return f.Name == name })
		if i < 0 {
			changed = append(changed, File{name, content})
		} else {
			same = bytes.Equal(changed[i].Content, content)
			changed[i].Content = content
		}
		if _, err := New(changed); (err == nil) != same {
			t.Fatalf("file %q: %v, unchanged %t", name, err, same)
		}
	})
}

func FuzzParseRoot(f *testing.F) {
	p := newPeople(2)
	f.Add(signed(f, must(NewRoot(p.layout, nil, start))(f), p.custodians...))
	f.Add(must(must(NewRoot(p.layout, nil, start))(f).Bytes())(f))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := ParseRoot(data)
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Fatalf("error %v is not ErrFormat", err)
			}
			return
		}
		if _, err := NewRoot(r.Layout, r, start); err != nil && r.Version < maxVersion {
			t.Fatalf("what was read has no successor: %v", err)
		}
	})
}

func FuzzParseSignature(f *testing.F) {
	f.Add([]byte(`{"keyid":"` + strings.Repeat("ab", 32) + `","sig":"3006020101020101"}` + "\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := ParseSignature(data)
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Fatalf("error %v is not ErrFormat", err)
			}
			return
		}
		if again, err := s.Marshal(); err != nil || !bytes.Equal(again, data) {
			t.Fatalf("written differently (%v)", err)
		}
	})
}
