package head

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/log/tree"
)

// wantLatched checks all that a Publisher says and refuses when its tree does
// not give the root of the head that is anchored.
func (f *fixture) wantLatched(anchored Signed) {
	f.t.Helper()
	ctx := f.t.Context()
	if diff := cmp.Diff(anchored.Head, f.heads.Latest().Head); diff != "" {
		f.t.Errorf("published head (-want +got):\n%s", diff)
	}
	if err := f.heads.Err(); !errors.Is(err, ErrFork) {
		f.t.Errorf("readiness says %v, want ErrFork", err)
	}
	for _, size := range []uint64{0, anchored.Size, anchored.Size + 1} {
		if _, err := f.heads.Await(ctx, size); !errors.Is(err, ErrFork) {
			f.t.Errorf("await %d: error %v, want ErrFork", size, err)
		}
	}
	before := f.tree.Root()
	for name, err := range readAll(ctx, f.heads.Tree()) {
		if !errors.Is(err, ErrFork) {
			f.t.Errorf("%s: error %v, want ErrFork", name, err)
		}
	}
	if _, _, err := f.heads.Tree().Append(ctx, tree.Leaf{Value: []byte("late")}); !errors.Is(err, ErrFork) {
		f.t.Errorf("append: error %v, want ErrFork", err)
	}
	if after := f.tree.Root(); after != before {
		f.t.Errorf("the tree grew from %d to %d leaves", before.Size, after.Size)
	}
}

// readAll returns the error of every read of a tree with at least one leaf.
func readAll(ctx context.Context, tr tree.Tree) map[string]error {
	errs := map[string]error{}
	_, errs["inclusion proof"] = tr.InclusionProof(ctx, 0, 1)
	_, errs["consistency proof"] = tr.ConsistencyProof(ctx, 1, 1)
	_, errs["root"] = tr.RootAt(ctx, 1)
	entries, err := tr.Entries(ctx, 0, 1)
	errs["entries"] = err
	hash := tree.Hash{}
	if err == nil {
		hash = entries[0].LeafHash
	}
	_, errs["by leaf hash"] = tr.ByLeafHash(ctx, hash)
	_, errs["by identity"] = tr.ByIdentity(ctx, hash)
	_, errs["tile"] = tr.Tile(ctx, 0, 0, 1)
	return errs
}

// wantAnchored checks which head a file holds.
func wantAnchored(t *testing.T, path string, want Signed) {
	t.Helper()
	s, err := ReadAnchor(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want.Head, s.Record.Head); diff != "" {
		t.Errorf("anchored head (-want +got):\n%s", diff)
	}
}

// lines collects what is logged.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// withLog makes a publisher log to l.
func withLog(l *lines) func(*Config) {
	return func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(l, nil)) }
}

// TestAnchorGone: without an anchor there is nothing to compare the tree with.
func TestAnchorGone(t *testing.T) {
	for _, test := range []struct {
		name string
		do   func(path string) error
	}{
		{"removed", os.Remove},
		{"empty", func(path string) error { return os.Truncate(path, 0) }},
		{"cut in the middle of a slot", func(path string) error { return os.Truncate(path, slotSize+17) }},
		{"longer", func(path string) error { return os.Truncate(path, 3*slotSize) }},
		{"both slots torn", func(path string) error {
			return overwrite(path, []int64{0, slotSize}, make([]byte, 512))
		}},
		{"made anew", func(path string) error { return errors.Join(os.Remove(path), CreateAnchor(path)) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFixture(t).open()
			f.add(3)
			f.await(3)
			f.close()
			signed := f.key.Count()
			if err := test.do(f.anchor()); err != nil {
				t.Fatal(err)
			}
			before, _ := os.ReadFile(f.anchor())
			f.openTree()
			var log lines
			f.openAny(withLog(&log))
			f.wantLatched(Signed{})
			if !strings.Contains(log.String(), "level=ERROR msg=\"log is read-only until an operator decides") {
				t.Errorf("logged: %s", &log)
			}
			f.close()
			if f.key.Count() != signed {
				t.Error("a head was signed")
			}
			if after, _ := os.ReadFile(f.anchor()); !bytes.Equal(after, before) {
				t.Error("the anchor was written")
			}
		})
	}
}

// overwrite puts b at each offset of a file.
func overwrite(path string, offsets []int64, b []byte) error {
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	for _, at := range offsets {
		if _, err := file.WriteAt(b, at); err != nil {
			return errors.Join(err, file.Close())
		}
	}
	return file.Close()
}

// TestTornAnchorGoesOn: one torn slot is what a crash leaves. The head before
// it counts and the log goes on.
func TestTornAnchorGoesOn(t *testing.T) {
	f := newFixture(t).open()
	f.add(3)
	first := f.await(3)
	f.add(3)
	f.await(6)
	f.close()
	s, err := ReadAnchor(f.anchor())
	if err != nil {
		t.Fatal(err)
	}
	newest := int64(s.Record.Sequence % 2)
	if err := overwrite(f.anchor(), []int64{newest*slotSize + 64}, make([]byte, 512)); err != nil {
		t.Fatal(err)
	}
	if s, err = ReadAnchor(f.anchor()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]int{int(newest)}, s.Damaged); diff != "" || s.Record.Head != first.Head {
		t.Errorf("head of %d leaves, damaged slots (-want +got):\n%s", s.Record.Size, diff)
	}
	f.openTree()
	f.open()
	if err := f.heads.Err(); err != nil {
		t.Fatal(err)
	}
	f.add(1)
	f.verify(f.await(7))
}

// TestInUseIsNotLost: an anchor that another process holds stops the start.
func TestInUseIsNotLost(t *testing.T) {
	f := newFixture(t).open()
	err := f.tryOpen()
	if !errors.Is(err, ErrAnchor) || errors.Is(err, ErrFork) {
		t.Errorf("error %v, want ErrAnchor alone", err)
	}
	_, err = AcceptLoss(f.anchor(), f.loss(nil))
	if !errors.Is(err, ErrAnchor) {
		t.Errorf("accept: error %v, want ErrAnchor", err)
	}
}

// TestRunningLatchStillReads: when memory went bad, what the storage proves to
// belong to the published head goes on being served.
func TestRunningLatchStillReads(t *testing.T) {
	f := newFixture(t)
	l := &liar{Tree: f.tree}
	f.open(func(c *Config) { c.Tree = l })
	f.add(3)
	f.await(3)
	lie := func(r tree.Root) tree.Root { r.Hash[0] ^= 1; return r }
	l.lie.Store(&lie)
	f.add(1)
	if _, err := f.heads.Await(t.Context(), 4); !errors.Is(err, ErrFork) {
		t.Fatalf("error %v, want ErrFork", err)
	}
	for name, err := range readAll(t.Context(), f.heads.Tree()) {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := f.heads.Tree().Append(t.Context(), tree.Leaf{Value: []byte("late")}); !errors.Is(err, ErrFork) {
		t.Errorf("append: error %v, want ErrFork", err)
	}
}

// slowTree is a tree whose appended leaves are durable before they are answered.
type slowTree struct {
	tree.Tree
	durable, answer chan struct{}
}

func (s slowTree) Append(ctx context.Context, leaf tree.Leaf) (tree.Entry, bool, error) {
	e, existed, err := s.Tree.Append(ctx, leaf)
	s.durable <- struct{}{}
	<-s.answer
	return e, existed, err
}

// TestLatchMeetsAppend: nobody is told that a leaf is in the log when the log
// latched before it could be said.
func TestLatchMeetsAppend(t *testing.T) {
	f := newFixture(t)
	s := slowTree{f.tree, make(chan struct{}), make(chan struct{})}
	l := &liar{Tree: s}
	f.open(func(c *Config) { c.Tree = l })
	f.add(3)
	f.await(3)
	errs := make(chan error, 1)
	go func() {
		_, _, err := f.heads.Tree().Append(t.Context(), tree.Leaf{Value: []byte("on its way")})
		errs <- err
	}()
	<-s.durable
	lie := func(r tree.Root) tree.Root { r.Hash[0] ^= 1; return r }
	l.lie.Store(&lie)
	if _, err := f.heads.Await(t.Context(), 4); !errors.Is(err, ErrFork) {
		t.Fatalf("error %v, want ErrFork", err)
	}
	close(s.answer)
	if err := <-errs; !errors.Is(err, ErrFork) {
		t.Errorf("append: error %v, want ErrFork", err)
	}
}

// loss is the acceptance of the tree that f has; old receives what is reported.
func (f *fixture) loss(old *Record) Loss {
	root := f.tree.Root()
	return Loss{
		Key: f.key.Public().(*ecdsa.PublicKey), Format: checkpoint("log.example"), Size: root.Size, Root: root.Hash, Time: time.Now(),
		Report: func(o, _ Record, _ []byte, _ bool) error {
			if old != nil {
				*old = o
			}
			return nil
		},
	}
}

// behind leaves f closed, its tree of 3 leaves restored from before a head of 8.
func behind(t *testing.T) (f *fixture, anchored Signed) {
	t.Helper()
	f = newFixture(t).open()
	f.add(3)
	f.await(3)
	f.close()
	old := filepath.Join(f.dir, "old")
	if err := os.CopyFS(old, os.DirFS(filepath.Join(f.dir, "log"))); err != nil {
		t.Fatal(err)
	}
	f.openTree()
	f.open()
	f.add(5)
	anchored = f.await(8)
	f.close()
	if err := errors.Join(os.RemoveAll(filepath.Join(f.dir, "log")), os.Rename(old, filepath.Join(f.dir, "log"))); err != nil {
		t.Fatal(err)
	}
	f.openTree()
	return f, anchored
}

func TestAcceptLoss(t *testing.T) {
	f, anchored := behind(t)
	before, err := ReadAnchor(f.anchor())
	if err != nil {
		t.Fatal(err)
	}
	slot, err := before.Record.marshal()
	if err != nil {
		t.Fatal(err)
	}
	var old Record
	rec, err := AcceptLoss(f.anchor(), f.loss(&old))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before.Record, old); diff != "" {
		t.Errorf("reported record (-want +got):\n%s", diff)
	}
	want := Record{Sequence: old.Sequence + 1, SPKI: old.SPKI, Loss: true, Replaced: sha256.Sum256(slot)}
	want.Head = Head{Size: 3, Root: f.tree.Root().Hash, Time: rec.Time}
	if want.Note, err = checkpoint("log.example").Message(want.Head); err != nil {
		t.Fatal(err)
	}
	want.Note = bytes.TrimSuffix(want.Note, []byte("\n"))
	if diff := cmp.Diff(want, rec); diff != "" {
		t.Errorf("record (-want +got):\n%s", diff)
	}
	if rec.Time.Before(anchored.Time) {
		t.Errorf("time went back from %v to %v", anchored.Time, rec.Time)
	}
	stored, ok, err := load(t, f.anchor())
	if err != nil || !ok || !stored.Loss || stored.Replaced != want.Replaced || stored.Head != want.Head {
		t.Fatalf("stored record %+v, %v, %v", stored, ok, err)
	}

	f.open()
	if err := f.heads.Err(); err != nil {
		t.Fatal(err)
	}
	s := f.heads.Latest()
	f.verify(s)
	if s.Size != 3 || s.Time.Before(anchored.Time) {
		t.Errorf("head of %d leaves at %v", s.Size, s.Time)
	}
	f.add(1)
	f.verify(f.await(4))
	f.close()
	f.openTree()
	f.open()
	f.consistent(s, f.heads.Latest())
}

// TestAcceptedTreeAlone: what was accepted is one tree, not any.
func TestAcceptedTreeAlone(t *testing.T) {
	f, _ := behind(t)
	l := f.loss(nil)
	l.Root[0] ^= 1
	if _, err := AcceptLoss(f.anchor(), l); err != nil {
		t.Fatal(err)
	}
	signed := f.key.Count()
	f.openAny()
	f.wantLatched(Signed{})
	if f.key.Count() != signed {
		t.Error("a head was signed")
	}
}

// TestAcceptLossTorn: a crash in the middle of an acceptance leaves the log
// latched as it was, and the acceptance can be repeated.
func TestAcceptLossTorn(t *testing.T) {
	f, anchored := behind(t)
	before, err := os.ReadFile(f.anchor())
	if err != nil {
		t.Fatal(err)
	}
	rec, err := AcceptLoss(f.anchor(), f.loss(nil))
	if err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(f.anchor())
	if err != nil {
		t.Fatal(err)
	}
	at := int(rec.Sequence%2) * slotSize
	for _, cut := range []int{0, 8, 112, 512, slotSum} {
		torn := append(bytes.Clone(after[at:at+cut]), before[at+cut:at+slotSize]...)
		file := bytes.Clone(before)
		copy(file[at:], torn)
		if err := os.WriteFile(f.anchor(), file, 0o600); err != nil {
			t.Fatal(err)
		}
		f.openAny()
		f.wantLatched(anchored)
		if err := f.heads.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := AcceptLoss(f.anchor(), f.loss(nil)); err != nil {
		t.Fatal(err)
	}
	f.open()
	f.verify(f.heads.Latest())
}

// TestAcceptedTreeOfAnotherLog: the record is bound to key and origin.
func TestAcceptedTreeOfAnotherLog(t *testing.T) {
	f, _ := behind(t)
	if _, err := AcceptLoss(f.anchor(), f.loss(nil)); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Config){
		"key":    func(c *Config) { c.Key = hsmtest.SoftwareKey(hsm.ECDSAP256) },
		"origin": func(c *Config) { c.Format = checkpoint("other.example") },
	} {
		if err := f.tryOpen(change); !errors.Is(err, ErrMismatch) {
			t.Errorf("another %s: error %v, want ErrMismatch", name, err)
		}
	}
	f.open()
	f.verify(f.heads.Latest())
}

// TestAcceptedLossSlot: the second kind of record has one form.
func TestAcceptedLossSlot(t *testing.T) {
	r := record(4)
	r.Loss, r.Replaced, r.Signature = true, [32]byte{9}, nil
	b, err := r.marshal()
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseSlot(0, b)
	if diff := cmp.Diff(r, got); diff != "" || err != nil {
		t.Fatalf("record (-want +got), %v:\n%s", err, diff)
	}
	signed := r
	signed.Signature = []byte{1}
	if _, err := signed.marshal(); err == nil {
		t.Error("an accepted loss with a signature was written")
	}
	for name, change := range map[string]func([]byte){
		"unknown kind":       func(b []byte) { b[15] = 2 },
		"hash too short":     func(b []byte) { b[11]-- },
		"of sequence 0":      func(b []byte) { clear(b[16:24]) },
		"in the other slot":  func(b []byte) { b[23]++ },
		"something after it": func(b []byte) { b[slotSum-1] = 1 },
	} {
		bad := bytes.Clone(b)
		change(bad)
		copy(bad[slotSum:], sum(bad[:slotSum]))
		if r, err := parseSlot(0, bad); err == nil {
			t.Errorf("%s: accepted as %+v", name, r)
		}
	}
}

func TestAcceptLossOfAnchor(t *testing.T) {
	for _, test := range []struct {
		name string
		do   func(path string) error
	}{
		{"removed", os.Remove},
		{"empty", func(path string) error { return os.Truncate(path, 0) }},
		{"cut", func(path string) error { return os.Truncate(path, slotSize) }},
		{"both slots torn", func(path string) error {
			return overwrite(path, []int64{0, slotSize}, make([]byte, 512))
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFixture(t).open()
			f.add(3)
			f.await(3)
			f.close()
			if err := test.do(f.anchor()); err != nil {
				t.Fatal(err)
			}
			raw, err := os.ReadFile(f.anchor())
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
			f.openTree()
			l := f.loss(nil)
			reported := 0
			l.Report = func(_, _ Record, got []byte, lost bool) error {
				reported++
				if !lost || !bytes.Equal(got, raw) {
					t.Errorf("reported %d octets, lost %v", len(got), lost)
				}
				return nil
			}
			rec, err := AcceptLoss(f.anchor(), l)
			if err != nil || reported != 1 {
				t.Fatalf("%v; %d reports", err, reported)
			}
			want := [32]byte{}
			if raw != nil {
				want = sha256.Sum256(raw)
			}
			if rec.Sequence != 1 || rec.Replaced != want {
				t.Errorf("record %+v", rec)
			}
			f.open()
			f.add(2)
			f.verify(f.await(5))
		})
	}
}

// TestAcceptLossRefuses: whatever is refused leaves the anchor as it was.
func TestAcceptLossRefuses(t *testing.T) {
	full := errors.New("no space for the incident file")
	for _, test := range []struct {
		name   string
		change func(*Loss)
		want   error
	}{
		{"another key", func(l *Loss) {
			l.Key = hsmtest.SoftwareKey(hsm.ECDSAP256).Public().(*ecdsa.PublicKey)
		}, ErrMismatch},
		{"another origin", func(l *Loss) { l.Format = checkpoint("other.example") }, ErrMismatch},
		{"incident file not written", func(l *Loss) {
			l.Report = func(Record, Record, []byte, bool) error { return full }
		}, full},
	} {
		t.Run(test.name, func(t *testing.T) {
			f, anchored := behind(t)
			before, err := os.ReadFile(f.anchor())
			if err != nil {
				t.Fatal(err)
			}
			l := f.loss(nil)
			test.change(&l)
			if _, err := AcceptLoss(f.anchor(), l); !errors.Is(err, test.want) {
				t.Errorf("error %v, want %v", err, test.want)
			}
			if after, err := os.ReadFile(f.anchor()); err != nil || !bytes.Equal(after, before) {
				t.Errorf("the anchor changed: %v", err)
			}
			f.openAny()
			f.wantLatched(anchored)
		})
	}
}

// TestReadAnchorBesideWriter: a reader without the lock sees whole records,
// never an older one than before.
func TestReadAnchorBesideWriter(t *testing.T) {
	path := anchorWith(t, 1)
	a := mustOpen(t, path)
	defer a.Close()
	done := make(chan error, 1)
	go func() {
		for n := uint64(2); n < 300; n++ {
			if err := a.Store(record(n)); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	for last := uint64(0); ; {
		s, err := ReadAnchor(path)
		if err != nil || s.Record.Sequence < last {
			t.Fatalf("record %d after %d: %v", s.Record.Sequence, last, err)
		}
		last = s.Record.Sequence
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			return
		default:
		}
	}
}

// TestReadAnchorErrors names what is wrong with a file.
func TestReadAnchorErrors(t *testing.T) {
	for _, test := range []struct {
		name string
		do   func(path string) error
		want error
	}{
		{"missing", os.Remove, fs.ErrNotExist},
		{"short", func(path string) error { return os.Truncate(path, 100) }, ErrDamaged},
		{"both slots", func(path string) error { return overwrite(path, []int64{20, slotSize + 20}, []byte{9}) }, ErrDamaged},
	} {
		path := anchorWith(t, 3)
		if err := test.do(path); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadAnchor(path); !errors.Is(err, test.want) || !errors.Is(err, ErrAnchor) {
			t.Errorf("%s: error %v, want %v", test.name, err, test.want)
		}
	}
}
