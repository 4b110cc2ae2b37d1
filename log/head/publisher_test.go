package head

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/log/tree"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"go.uber.org/goleak"
)

var quiet = slog.New(slog.DiscardHandler)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// klog flushes for the process's life.
		goleak.IgnoreAnyFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"),
		// The watch over a closed token leaves at its next tick.
		goleak.IgnoreAnyFunction("github.com/chancery-ca/chancery/hsm/pkcs11.(*queue).watch"))
}

func sum(b []byte) []byte { s := sha256.Sum256(b); return s[:] }

// checkpoint is a C2SP checkpoint of an origin, with the time below it.
type checkpoint string

func (o checkpoint) Message(h Head) ([]byte, error) {
	return fmt.Appendf(nil, "%s\n%d\n%s\n%d\n", o, h.Size, base64.StdEncoding.EncodeToString(h.Root[:]), h.Time.UnixMilli()), nil
}

func (o checkpoint) Note(h Head, sig []byte) ([]byte, error) {
	msg, err := o.Message(h)
	return fmt.Appendf(msg, "\n— %s %s\n", o, base64.StdEncoding.EncodeToString(sig)), err
}

// clock is a wall clock in the hands of a test.
type clock struct {
	mu  sync.Mutex
	off time.Duration
	err error
}

func (c *clock) Now() (time.Time, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.off), c.err
}

func (c *clock) set(off time.Duration, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.off, c.err = off, err
}

// fixture is a log: an engine with one tree, an anchor, a publisher.
type fixture struct {
	t      testing.TB
	dir    string
	key    *hsmtest.Counting
	clock  *clock
	engine *tree.Engine
	tree   tree.Tree
	heads  *Publisher
	next   atomic.Int64 // the next leaf
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	f := &fixture{
		t: t, dir: t.TempDir(), clock: &clock{},
		key: &hsmtest.Counting{Key: hsmtest.SoftwareKey(hsm.ECDSAP256)},
	}
	f.openTree()
	if err := CreateAnchor(f.anchor()); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fixture) anchor() string { return filepath.Join(f.dir, "anchor") }

func (f *fixture) openTree() {
	f.t.Helper()
	dir := filepath.Join(f.dir, "log")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		f.t.Fatal(err)
	}
	e, err := tree.Open(f.t.Context(), tree.Config{Dir: dir, Now: f.clock.Now, Logger: quiet})
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { e.Close(context.Background()) })
	if err := e.Create(f.t.Context(), "log"); err != nil && !errors.Is(err, tree.ErrExists) {
		f.t.Fatal(err)
	}
	if f.tree, err = e.Tree(f.t.Context(), "log"); err != nil {
		f.t.Fatal(err)
	}
	f.engine = e
}

func (f *fixture) config(change ...func(*Config)) Config {
	cfg := Config{
		Tree: f.tree, Key: f.key, Format: checkpoint("log.example"), Anchor: f.anchor(),
		Now: f.clock.Now, MaxBackoff: 50 * time.Millisecond, Logger: quiet,
	}
	for _, c := range change {
		c(&cfg)
	}
	return cfg
}

func (f *fixture) tryOpen(change ...func(*Config)) error {
	f.t.Helper()
	p, err := Open(f.t.Context(), f.config(change...))
	if err != nil {
		return err
	}
	f.t.Cleanup(func() { p.Close(context.Background()) })
	f.heads = p
	return nil
}

func (f *fixture) open(change ...func(*Config)) *fixture {
	f.t.Helper()
	f.openAny(change...)
	if err := f.heads.Err(); errors.Is(err, ErrFork) {
		f.t.Fatal(err)
	}
	return f
}

// openAny opens a log that may be latched.
func (f *fixture) openAny(change ...func(*Config)) {
	f.t.Helper()
	if err := f.tryOpen(change...); err != nil {
		f.t.Fatal(err)
	}
}

// close ends the publisher and the engine, as a clean shutdown does.
func (f *fixture) close() {
	f.t.Helper()
	if f.heads != nil {
		if err := f.heads.Close(f.t.Context()); err != nil {
			f.t.Fatal(err)
		}
	}
	if err := f.engine.Close(f.t.Context()); err != nil {
		f.t.Fatal(err)
	}
}

// add appends n leaves at once.
func (f *fixture) add(n int) {
	f.t.Helper()
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			if _, _, err := f.tree.Append(f.t.Context(), tree.Leaf{Value: fmt.Append(nil, "leaf ", f.next.Add(1))}); err != nil {
				f.t.Error(err)
			}
		})
	}
	wg.Wait()
	if f.t.Failed() {
		f.t.FailNow()
	}
}

func (f *fixture) await(size uint64) Signed {
	f.t.Helper()
	s, err := f.heads.Await(f.t.Context(), size)
	if err != nil {
		f.t.Fatalf("await %d: %v", size, err)
	}
	f.verify(s)
	if s.Size < size {
		f.t.Fatalf("head has %d leaves, want %d", s.Size, size)
	}
	return s
}

// recovers waits until heads are signed again, which needs no caller.
func (f *fixture) recovers() {
	f.t.Helper()
	f.until("recovery", func() bool { return f.heads.Err() == nil })
}

// verify checks a head's signature and root with nothing of ours but tiles.
func (f *fixture) verify(s Signed) {
	f.t.Helper()
	msg, _ := checkpoint("log.example").Message(s.Head)
	if !ecdsa.VerifyASN1(f.key.Public().(*ecdsa.PublicKey), sum(msg), s.Signature) {
		f.t.Fatalf("signature of head %d does not verify", s.Size)
	}
	if root, err := f.tree.RootAt(f.t.Context(), s.Size); err != nil || root != s.Root {
		f.t.Fatalf("head %d has another root: %v", s.Size, err)
	}
}

func (f *fixture) consistent(a, b Signed) {
	f.t.Helper()
	hs, err := f.tree.ConsistencyProof(f.t.Context(), a.Size, b.Size)
	if err != nil {
		f.t.Fatal(err)
	}
	var path [][]byte
	for _, h := range hs {
		path = append(path, h[:])
	}
	if err := proof.VerifyConsistency(rfc6962.DefaultHasher, a.Size, b.Size, path, a.Root[:], b.Root[:]); err != nil {
		f.t.Fatal(err)
	}
	if b.Time.Before(a.Time) {
		f.t.Fatalf("head %d is of %v, before %v", b.Size, b.Time, a.Time)
	}
}

func TestFirstHead(t *testing.T) {
	f := newFixture(t).open()
	s := f.heads.Latest()
	f.verify(s)
	if s.Size != 0 || s.Root != tree.EmptyRoot() || f.key.Count() != 1 {
		t.Errorf("head %+v after %d signatures", s.Head, f.key.Count())
	}
	if s.Time.Nanosecond()%1e6 != 0 || s.Time.Location() != time.UTC {
		t.Errorf("time %v, want milliseconds in UTC", s.Time)
	}
}

func TestRestart(t *testing.T) {
	f := newFixture(t).open()
	f.add(5)
	first := f.await(5)
	f.close()
	signed := f.key.Count()

	f.openTree()
	f.open()
	if got := f.heads.Latest(); got.Head != first.Head || string(got.Note) != string(first.Note) || f.key.Count() != signed {
		t.Fatalf("after restart %+v with %d more signatures, was %+v", got.Head, f.key.Count()-signed, first.Head)
	}
	f.add(7)
	f.consistent(first, f.await(12))
	f.close()

	// The tree grew and the process died before the head was signed.
	f.openTree()
	f.add(3)
	if err := f.engine.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.openTree()
	f.open()
	f.consistent(first, f.await(15))
}

// TestOneSignatureForEachBatch: callers share heads.
func TestOneSignatureForEachBatch(t *testing.T) {
	f := newFixture(t).open()
	const clients, each = 128, 8
	// batches counts the roots that the tree went through.
	stop, batches := make(chan struct{}), make(chan int64)
	go func() {
		n := int64(0)
		for {
			changed := f.tree.Changed()
			select {
			case <-changed:
				n++
			case <-stop:
				batches <- n
				return
			}
		}
	}()
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			for i := range each {
				e, _, err := f.tree.Append(t.Context(), tree.Leaf{Value: fmt.Append(nil, c, " ", i)})
				if err != nil {
					t.Error(err)
					return
				}
				s, err := f.heads.Await(t.Context(), e.Index+1)
				if err != nil || s.Size <= e.Index {
					t.Errorf("head %d for leaf %d: %v", s.Size, e.Index, err)
					return
				}
				path, err := f.tree.InclusionProof(t.Context(), e.Index, s.Size)
				if err != nil {
					t.Error(err)
					return
				}
				var hs [][]byte
				for _, h := range path {
					hs = append(hs, h[:])
				}
				if err := proof.VerifyInclusion(rfc6962.DefaultHasher, e.Index, s.Size, e.LeafHash[:], hs, s.Root[:]); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	n := <-batches
	signed := f.key.Count() - 1
	st := f.heads.Stats()
	t.Logf("%d leaves in %d batches seen, %d signatures", clients*each, n, signed)
	if signed < each || signed > clients*each {
		t.Errorf("%d signatures for %d leaves", signed, clients*each)
	}
	if st.Signatures != st.Heads || st.Heads != uint64(signed)+1 || st.Failures != 0 || st.Waiters != 0 {
		t.Errorf("stats %+v for %d signatures", st, signed+1)
	}
	f.verify(f.heads.Latest())
}

// TestWaitersShareAHead: all who come while one head is signed get the next one.
func TestWaitersShareAHead(t *testing.T) {
	const clients = 100
	f := newFixture(t)
	key := &rogue{Key: f.key}
	f.open(func(c *Config) { c.Key, c.SignTimeout = key, time.Hour })
	asked, answer := make(chan struct{}, clients), make(chan struct{})
	slow := func(ctx context.Context, digest []byte) ([]byte, error) {
		asked <- struct{}{}
		<-answer
		return f.key.SignContext(ctx, digest, crypto.SHA256)
	}
	key.sign.Store(&slow)
	before := f.key.Count()
	var wg sync.WaitGroup
	client := func() {
		e, _, err := f.tree.Append(t.Context(), tree.Leaf{Value: fmt.Append(nil, "leaf ", f.next.Add(1))})
		if err == nil {
			_, err = f.heads.Await(t.Context(), e.Index+1)
		}
		if err != nil {
			t.Error(err)
		}
	}
	wg.Go(client)
	<-asked
	for range clients - 1 {
		wg.Go(client)
	}
	f.until("waiting calls", func() bool { return f.heads.Stats().Waiters == clients })
	close(answer)
	wg.Wait()
	if n := f.key.Count() - before; n != 2 {
		t.Errorf("%d signatures for %d clients, want 2", n, clients)
	}
	f.verify(f.heads.Latest())
}

// TestForks: whatever the database became, the anchor's head stands.
func TestForks(t *testing.T) {
	copyTree := func(f *fixture, to string) {
		t.Helper()
		if err := os.CopyFS(to, os.DirFS(filepath.Join(f.dir, "log"))); err != nil {
			t.Fatal(err)
		}
	}
	restore := func(f *fixture, from string) {
		t.Helper()
		if err := os.RemoveAll(filepath.Join(f.dir, "log")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(from, filepath.Join(f.dir, "log")); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name string
		// then happens to the log that was restored at size 5, with a head of
		// 8 anchored.
		then func(*fixture)
	}{
		{"older tree", func(*fixture) {}},
		{"another leaf, shorter", func(f *fixture) { f.next.Store(100); f.add(1) }},
		{"another root at the same size", func(f *fixture) { f.next.Store(100); f.add(3) }},
		{"forked and longer", func(f *fixture) { f.next.Store(100); f.add(30) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFixture(t)
			f.t = t
			f.open()
			f.add(5)
			f.await(5)
			f.close()
			old := filepath.Join(f.dir, "old")
			copyTree(f, old)
			f.openTree()
			f.open()
			f.add(3)
			anchored := f.await(8)
			f.close()
			signed := f.key.Count()
			restore(f, old)
			f.openTree()
			tc.then(f)
			f.openAny()
			f.wantLatched(anchored)
			if f.key.Count() != signed {
				t.Error("a head was signed")
			}
			f.close()
			if f.key.Count() != signed {
				t.Error("a head was signed at the end")
			}
			wantAnchored(t, f.anchor(), anchored)
		})
	}
}

// liar is a tree that shows other roots, on command, than its own.
type liar struct {
	tree.Tree
	lie atomic.Pointer[func(tree.Root) tree.Root]
}

func (l *liar) Root() tree.Root {
	if f := l.lie.Load(); f != nil {
		return (*f)(l.Tree.Root())
	}
	return l.Tree.Root()
}

// TestForkLatches: memory that went bad in a running process stops signing
// for good, though the tree looks well again.
func TestForkLatches(t *testing.T) {
	for name, lie := range map[string]func(tree.Root) tree.Root{
		"other root": func(r tree.Root) tree.Root { r.Hash[0] ^= 1; return r },
		"shrunk":     func(r tree.Root) tree.Root { r.Size = 1; return r },
		"same size": func(r tree.Root) tree.Root {
			r.Size, r.Hash = 3, tree.Hash{1}
			return r
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			l := &liar{Tree: f.tree}
			f.open(func(c *Config) { c.Tree, c.MinInterval = l, time.Nanosecond })
			f.add(3)
			before := f.await(3)
			signed := f.key.Count()
			l.lie.Store(&lie)
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			errs := make(chan error, 1)
			go func() { _, err := f.heads.Await(ctx, 4); errs <- err }()
			f.add(1)
			if err := <-errs; !errors.Is(err, ErrFork) {
				t.Fatalf("error %v, want ErrFork", err)
			}
			l.lie.Store(nil)
			f.add(1)
			if _, err := f.heads.Await(ctx, 5); !errors.Is(err, ErrFork) {
				t.Errorf("error %v, want ErrFork for ever", err)
			}
			if !errors.Is(f.heads.Err(), ErrFork) {
				t.Errorf("readiness says %v", f.heads.Err())
			}
			if got := f.heads.Latest(); got.Head != before.Head || f.key.Count() != signed {
				t.Errorf("head %+v published", got.Head)
			}
			if s, err := f.heads.Await(ctx, 3); err != nil || s.Head != before.Head {
				t.Errorf("what is published is still served: %v", err)
			}
		})
	}
}

func TestMismatch(t *testing.T) {
	f := newFixture(t).open()
	f.add(3)
	f.await(3)
	f.close()
	f.openTree()
	for name, change := range map[string]func(*Config){
		"another key":    func(c *Config) { c.Key = hsmtest.SoftwareKey(hsm.ECDSAP256) },
		"another origin": func(c *Config) { c.Format = checkpoint("other.example") },
		"another format": func(c *Config) { c.Format = suffixed{checkpoint("log.example")} },
	} {
		if err := f.tryOpen(change); !errors.Is(err, ErrMismatch) {
			t.Errorf("%s: error %v, want ErrMismatch", name, err)
		}
	}
	if err := f.tryOpen(func(c *Config) { c.Key = hsmtest.SoftwareKey(hsm.ECDSAP384) }); !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("P-384: error %v, want ErrUnsupported", err)
	}
	f.open() // and nothing of it did harm
}

// suffixed signs something else than the checkpoint alone.
type suffixed struct{ checkpoint }

func (s suffixed) Message(h Head) ([]byte, error) {
	m, err := s.checkpoint.Message(h)
	return append(m, 'x'), err
}

// rogue is a key that misbehaves on command.
type rogue struct {
	hsm.Key
	sign atomic.Pointer[func(ctx context.Context, digest []byte) ([]byte, error)]
}

func (r *rogue) SignContext(ctx context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if f := r.sign.Load(); f != nil {
		return (*f)(ctx, digest)
	}
	return r.Key.SignContext(ctx, digest, opts)
}

// run is t.Run with a clock that stands still while anything is under way, so
// that no machine is too slow for a bound.
func run(t *testing.T, name string, test func(*testing.T)) {
	t.Helper()
	t.Run(name, func(t *testing.T) { synctest.Test(t, test) })
}

func TestBadSigners(t *testing.T) {
	var release chan struct{}
	other := hsmtest.SoftwareKey(hsm.ECDSAP256)
	for _, tc := range []struct {
		name string
		sign func(ctx context.Context, digest []byte) ([]byte, error)
		want error
	}{
		{"lost", func(context.Context, []byte) ([]byte, error) { return nil, hsm.ErrLost }, hsm.ErrLost},
		{"busy", func(context.Context, []byte) ([]byte, error) { return nil, hsm.ErrBusy }, hsm.ErrBusy},
		{"another key's signature", func(_ context.Context, d []byte) ([]byte, error) { return other.Sign(nil, d, crypto.SHA256) }, hsm.ErrBadSignature},
		{"garbage", func(context.Context, []byte) ([]byte, error) { return []byte("signature"), nil }, hsm.ErrBadSignature},
		{"nothing", func(context.Context, []byte) ([]byte, error) { return nil, nil }, hsm.ErrBadSignature},
		{"hangs until the deadline", func(ctx context.Context, _ []byte) ([]byte, error) { <-ctx.Done(); return nil, hsm.ErrLost }, hsm.ErrLost},
		{"hangs", func(context.Context, []byte) ([]byte, error) { <-release; return nil, hsm.ErrLost }, context.DeadlineExceeded},
	} {
		run(t, tc.name, func(t *testing.T) {
			release = make(chan struct{})
			f := newFixture(t)
			key := &rogue{Key: f.key}
			f.open(func(c *Config) { c.Key, c.SignTimeout = key, 20*time.Millisecond })
			f.add(2)
			first := f.await(2)
			var held, most atomic.Int64
			sign := func(ctx context.Context, digest []byte) ([]byte, error) {
				if n := held.Add(1); n > most.Load() {
					most.Store(n)
				}
				defer held.Add(-1)
				return tc.sign(ctx, digest)
			}
			key.sign.Store(&sign)
			f.add(2)
			_, err := f.heads.Await(t.Context(), 4)
			if !errors.Is(err, ErrUnavailable) || !errors.Is(err, tc.want) {
				t.Fatalf("error %v, want ErrUnavailable and %v", err, tc.want)
			}
			if !errors.Is(f.heads.Err(), ErrUnavailable) {
				t.Errorf("readiness says %v", f.heads.Err())
			}
			if got := f.heads.Latest(); got.Head != first.Head {
				t.Errorf("head %+v published", got.Head)
			}
			_, _ = f.heads.Await(t.Context(), 4) // again, while it is broken
			if most.Load() != 1 {
				t.Errorf("%d signatures at once", most.Load())
			}
			key.sign.Store(nil)
			close(release)
			f.recovers()
			f.consistent(first, f.await(4))
			f.close()
		})
	}
}

// brokenAnchor fails after it wrote, or instead of it.
type brokenAnchor struct {
	Anchor
	fail  atomic.Bool
	write atomic.Bool
}

func (a *brokenAnchor) Store(r Record) error {
	if !a.fail.Load() {
		return a.Anchor.Store(r)
	}
	if a.write.Load() {
		if err := a.Anchor.Store(r); err != nil {
			return err
		}
	}
	return errors.New("input/output error")
}

func TestAnchorFails(t *testing.T) {
	for _, wrote := range []bool{false, true} {
		t.Run(fmt.Sprintf("wrote %v", wrote), func(t *testing.T) {
			f := newFixture(t)
			a := &brokenAnchor{Anchor: mustOpen(t, f.anchor())}
			f.open(func(c *Config) { c.AnchorStore = a })
			f.add(2)
			first := f.await(2)
			a.write.Store(wrote)
			a.fail.Store(true)
			f.add(1)
			if _, err := f.heads.Await(t.Context(), 3); !errors.Is(err, ErrUnavailable) {
				t.Fatalf("error %v, want ErrUnavailable", err)
			}
			if f.heads.Latest().Head != first.Head {
				t.Fatal("a head was published that is not in the anchor")
			}
			a.fail.Store(false)
			f.add(1)
			f.recovers()
			second := f.await(4)
			f.consistent(first, second)
			f.close()
			f.openTree()
			f.open()
			if f.heads.Latest().Head != second.Head {
				t.Error("the anchor has another head than was published")
			}
		})
	}
}

func TestClock(t *testing.T) { synctest.Test(t, testClock) }

func testClock(t *testing.T) {
	f := newFixture(t).open()
	f.add(1)
	last := f.await(1)
	for i, step := range []struct {
		name string
		off  time.Duration
		err  error
		ok   bool
	}{
		{"a second back", -time.Second, nil, true},
		{"3 seconds back", -3 * time.Second, nil, false},
		{"an hour back", -time.Hour, nil, false},
		{"refuses", 0, errors.New("clock jumped"), false},
		{"an hour ahead", time.Hour, nil, true},
		{"right again, behind the last head", 0, nil, false},
		{"an hour ahead again", time.Hour, nil, true},
	} {
		f.clock.set(step.off, step.err)
		f.add(1)
		if !step.ok {
			if _, err := f.heads.Await(t.Context(), uint64(i+2)); !errors.Is(err, ErrUnavailable) {
				t.Fatalf("%s: error %v, want ErrUnavailable", step.name, err)
			}
			continue
		}
		f.recovers()
		s := f.await(uint64(i + 2))
		f.consistent(last, s)
		last = s
	}
	f.close()
}

// TestHeadIsNotOlderThanItsLeaves: a process that died before it signed had given
// times to leaves; the clock of the next one is behind them.
func TestHeadIsNotOlderThanItsLeaves(t *testing.T) {
	for _, tc := range []struct {
		name string
		back time.Duration
		ok   bool
	}{
		{"right", 0, true},
		{"a second and a half back", 1500 * time.Millisecond, true},
		{"3 seconds back", 3 * time.Second, false},
	} {
		run(t, tc.name, func(t *testing.T) {
			f := newFixture(t).open()
			f.add(1)
			f.await(1)
			time.Sleep(time.Hour)
			f.add(1) // in no head yet
			leaf, err := f.clock.Now()
			if err != nil {
				t.Fatal(err)
			}
			f.close()
			f.openTree()
			f.clock.set(-tc.back, nil)
			f.open()
			s, err := f.heads.Await(t.Context(), 2)
			switch {
			case tc.ok && err != nil:
				t.Error(err)
			case tc.ok && s.Time.Before(leaf.Truncate(time.Millisecond)):
				t.Errorf("head of %v, its newest leaf of %v", s.Time, leaf)
			case !tc.ok && (!errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "behind the newest leaf")):
				t.Errorf("error %v, want ErrUnavailable and the clock", err)
			}
			f.clock.set(0, nil)
			f.verify(f.await(2))
			f.close()
		})
	}
}

func TestAwaitCancelled(t *testing.T) {
	f := newFixture(t).open()
	ctx, cancel := context.WithCancel(t.Context())
	errs := make(chan error, 1)
	go func() { _, err := f.heads.Await(ctx, 1); errs <- err }()
	f.until("waiting calls", func() bool { return f.heads.Stats().Waiters == 1 })
	cancel()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v, want context.Canceled", err)
	}
	if n := f.heads.Stats().Waiters; n != 0 {
		t.Errorf("%d waiters left", n)
	}
	f.add(1)
	if n := f.key.Count(); n != 1 {
		t.Errorf("%d signatures though nobody waits", n)
	}
	f.await(1)
}

func TestAwaitIsBounded(t *testing.T) {
	f := newFixture(t).open(func(c *Config) { c.MaxWaiters = 2 })
	errs := make(chan error, 2)
	for range 2 {
		go func() { _, err := f.heads.Await(t.Context(), 1); errs <- err }()
	}
	f.until("waiting calls", func() bool { return f.heads.Stats().Waiters == 2 })
	if _, err := f.heads.Await(t.Context(), 1); !errors.Is(err, ErrUnavailable) {
		t.Errorf("error %v, want ErrUnavailable", err)
	}
	f.add(1) // a caller that came before the leaf is served too
	for range 2 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

func TestClose(t *testing.T) {
	f := newFixture(t).open()
	errs := make(chan error, 1)
	go func() { _, err := f.heads.Await(context.Background(), 10); errs <- err }()
	f.until("waiting calls", func() bool { return f.heads.Stats().Waiters == 1 })
	if err := f.heads.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-errs; !errors.Is(err, ErrClosed) {
		t.Errorf("waiter: error %v, want ErrClosed", err)
	}
	if _, err := f.heads.Await(t.Context(), 1); !errors.Is(err, ErrClosed) {
		t.Errorf("await: error %v, want ErrClosed", err)
	}
	if err := f.heads.Err(); !errors.Is(err, ErrClosed) {
		t.Errorf("readiness says %v", err)
	}
	if _, err := f.heads.Await(t.Context(), 0); err != nil {
		t.Errorf("published head after close: %v", err)
	}
	if err := f.heads.Close(t.Context()); err != nil {
		t.Errorf("second close: %v", err)
	}
}

// TestOutage: after a second of failures callers are told at once.
func TestOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		key := &hsmtest.Failing{Key: f.key}
		f.open(func(c *Config) { c.Key, c.MaxBackoff = key, 0 })
		key.Fail(hsm.ErrLost)
		f.add(1)
		start := time.Now()
		if _, err := f.heads.Await(t.Context(), 1); !errors.Is(err, hsm.ErrLost) || time.Since(start) != 0 {
			t.Errorf("first caller: error %v after %v", err, time.Since(start))
		}
		time.Sleep(3 * time.Second)
		before := f.heads.Stats()
		for range 100 {
			start := time.Now()
			if _, err := f.heads.Await(t.Context(), 1); !errors.Is(err, ErrUnavailable) || time.Since(start) != 0 {
				t.Fatalf("caller in an outage: error %v after %v", err, time.Since(start))
			}
		}
		if after := f.heads.Stats(); after.Signatures != before.Signatures {
			t.Errorf("%d attempts for 100 callers", after.Signatures-before.Signatures)
		}
		key.Fail(nil)
		time.Sleep(DefaultMaxBackoff)
		if err := f.heads.Err(); err != nil {
			t.Errorf("not recovered: %v", err)
		}
		f.await(1)
		f.close()
	})
}

// TestIntervals: a tree for which nobody waits is signed at most once in
// MinInterval, an idle one once in MaxAge.
func TestIntervals(t *testing.T) {
	f := newFixture(t).open(func(c *Config) { c.MinInterval = 200 * time.Millisecond })
	start := time.Now()
	for range 40 {
		f.add(1)
	}
	f.until("head of 40 leaves", func() bool { return f.heads.Latest().Size >= 40 })
	if n, most := f.key.Count()-1, int64(time.Since(start)/(200*time.Millisecond))+1; n > most {
		t.Errorf("%d signatures in %v, want at most %d", n, time.Since(start), most)
	}
	f.add(1)
	f.await(41) // a caller does not wait for the interval
	f.add(1)
	if err := f.heads.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if f.heads.Latest().Size != 42 {
		t.Errorf("closed with a head of %d, want 42", f.heads.Latest().Size)
	}
	f.close()

	f.openTree()
	f.open(func(c *Config) { c.MaxAge = 100 * time.Millisecond })
	a := f.heads.Latest()
	f.until("head after another", func() bool { return f.heads.Latest().Time.After(a.Time) })
	b := f.heads.Latest()
	f.verify(b)
	if age := b.Time.Sub(a.Time); b.Size != 42 || age < 90*time.Millisecond {
		t.Errorf("refreshed to %d leaves after %v", b.Size, age)
	}
}

// TestTokenKey runs the path with a key in SoftHSM.
func TestTokenKey(t *testing.T) {
	f := newFixture(t)
	f.key = &hsmtest.Counting{Key: hsmtest.NewKey(t, hsmtest.SoftHSM(t), "head", hsm.ECDSAP256)}
	f.open()
	f.add(10)
	f.await(10)
}
