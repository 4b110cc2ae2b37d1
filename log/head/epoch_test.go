package head

import (
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/tree"
)

// memory is a counter that forgets at the end of the process. It can be lost,
// and lose the answer of an advance that it made.
type memory struct {
	mu       sync.Mutex
	value    uint64
	advances int
	lost     error // of every call
	answer   error // of an advance that is made, and of every call after it
	hang     chan struct{}
}

func (m *memory) Value(ctx context.Context) (uint64, error) {
	m.mu.Lock()
	hang := m.hang
	m.mu.Unlock()
	if hang != nil {
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-hang:
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.value, m.lost
}

func (m *memory) Advance(context.Context) (uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.lost != nil {
		return 0, m.lost
	}
	m.value++
	m.advances++
	m.lost = m.answer
	return m.value, m.answer
}

func (m *memory) set(change func(*memory)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	change(m)
}

func (m *memory) at() (value uint64, advances int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.value, m.advances
}

// process is a counter as one process reaches it, until that is killed.
type process struct {
	Counter
	dead atomic.Bool
}

func (p *process) Value(ctx context.Context) (uint64, error) {
	if p.dead.Load() {
		return 0, hsm.ErrLost
	}
	return p.Counter.Value(ctx)
}

func (p *process) Advance(ctx context.Context) (uint64, error) {
	if p.dead.Load() {
		return 0, hsm.ErrLost
	}
	return p.Counter.Advance(ctx)
}

// counted makes a publisher use c.
func counted(c Counter) func(*Config) {
	return func(cfg *Config) { cfg.Counter = c }
}

// newCounted is a log with a counter at 7 and a new anchor bound to it.
func newCounted(t testing.TB) (*fixture, *memory) {
	t.Helper()
	f := newFixture(t)
	c := &memory{value: 7}
	f.bindNew(7)
	return f, c
}

// bindNew makes the anchor of f anew.
func (f *fixture) bindNew(epoch uint64) {
	f.t.Helper()
	if err := errors.Join(os.Remove(f.anchor()), CreateAnchorAt(f.anchor(), epoch)); err != nil {
		f.t.Fatal(err)
	}
}

// settles waits until the counter has followed the anchor to value.
func (f *fixture) settles(c *memory, value uint64) {
	f.t.Helper()
	f.until(fmt.Sprintf("counter at %d", value), func() bool {
		v, _ := c.at()
		return v == value && f.heads.Stats().Epoch == value && f.heads.CounterErr() == nil
	})
}

func (f *fixture) until(what string, done func() bool) {
	f.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(2 * time.Minute); !done(); <-tick.C {
		if time.Now().After(deadline) {
			f.t.Fatalf("no %s: %+v, counter error %v, error %v", what, f.heads.Stats(), f.heads.CounterErr(), f.heads.Err())
		}
	}
}

func (f *fixture) record() Record {
	f.t.Helper()
	s, err := ReadAnchor(f.anchor())
	if err != nil {
		f.t.Fatal(err)
	}
	return s.Record
}

func TestEpochs(t *testing.T) {
	f, c := newCounted(t)
	f.open(counted(c))
	f.settles(c, 8) // a new anchor begins an epoch at once
	f.add(3)
	f.await(3)
	if r := f.record(); r.Epoch != 8 || r.Start.Size != 0 || len(r.Start.Signature) == 0 {
		t.Errorf("record of epoch %d, begun at %d", r.Epoch, r.Start.Size)
	}
	f.close() // and so does a shutdown after a leaf
	if value, advances := c.at(); value != 9 || advances != 2 {
		t.Fatalf("counter at %d after %d advances, want 9 after 2", value, advances)
	}
	r := f.record()
	if r.Epoch != 9 || r.Start.Size != 3 || r.Size != 3 {
		t.Errorf("record of epoch %d with %d leaves, begun at %d", r.Epoch, r.Size, r.Start.Size)
	}
	if err := r.Verify(f.heads.pub, checkpoint("log.example")); err != nil {
		t.Error(err)
	}

	f.openTree()
	f.open(counted(c))
	f.close() // nothing was logged
	f.openTree()
	f.open(counted(c))
	if value, _ := c.at(); value != 9 {
		t.Errorf("counter at %d after idle starts, want 9", value)
	}
	f.add(1)
	f.verify(f.await(4))
	if r := f.record(); r.Epoch != 9 || r.Size != 4 {
		t.Errorf("record of epoch %d with %d leaves", r.Epoch, r.Size)
	}
}

// TestEpochInterval counts the advances of six hours: with a leaf each minute, and
// with heads of a tree that does not grow.
func TestEpochInterval(t *testing.T) {
	for _, tc := range []struct {
		name     string
		leaves   bool
		advances int
	}{
		{"a leaf a minute", true, 1 + 4*6},
		{"heads alone", false, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f, c := newCounted(t)
				f.open(counted(c), func(cfg *Config) { cfg.MaxAge = 30 * time.Second })
				for i := range 6 * 60 {
					time.Sleep(time.Minute)
					if tc.leaves {
						f.add(1)
						f.await(uint64(i + 1))
					}
				}
				synctest.Wait()
				_, advances := c.at()
				if advances > tc.advances || advances < tc.advances-2 {
					t.Errorf("%d advances in six hours, want at most %d and not much less", advances, tc.advances)
				}
				f.close()
			})
		})
	}
}

// TestEpochUnderLoad: an epoch begins too when a head is due at all times.
func TestEpochUnderLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, c := newCounted(t)
		slow := &rogue{Key: f.key}
		sign := func(_ context.Context, digest []byte) ([]byte, error) {
			time.Sleep(time.Second)
			return f.key.Sign(nil, digest, crypto.SHA256)
		}
		slow.sign.Store(&sign)
		f.open(counted(c), func(cfg *Config) { cfg.Key, cfg.EpochInterval = slow, 20*time.Second })
		synctest.Wait()
		stop := time.Now().Add(2 * time.Minute)
		var wg sync.WaitGroup
		for n := range 3 {
			wg.Go(func() {
				for i := 0; time.Now().Before(stop); i++ {
					e, _, err := f.tree.Append(t.Context(), tree.Leaf{Value: fmt.Append(nil, n, " ", i)})
					if err == nil {
						_, err = f.heads.Await(t.Context(), e.Index+1)
					}
					if err != nil {
						t.Error(err)
						return
					}
					time.Sleep(time.Duration(n) * 300 * time.Millisecond)
				}
			})
		}
		wg.Wait()
		// At the latest interval and patience after the one before.
		if _, advances := c.at(); advances < 4 || advances > 7 {
			t.Errorf("%d advances in two minutes, want 4 to 7", advances)
		}
		f.close()
	})
}

// crash closes f, after a process that had c was killed, and puts on disk what
// the anchor was then.
func (f *fixture) crash(c *process) {
	f.t.Helper()
	c.dead.Store(true)
	at, err := os.ReadFile(f.anchor())
	if err != nil {
		f.t.Fatal(err)
	}
	f.close()
	if err := os.WriteFile(f.anchor(), at, 0o600); err != nil {
		f.t.Fatal(err)
	}
}

// TestCrashLoop: a process that dies again and again costs the counter nothing
// within an interval, whether it wrote or not.
func TestCrashLoop(t *testing.T) {
	f, c := newCounted(t)
	p := &process{Counter: c}
	f.open(counted(p))
	f.settles(c, 8)
	for i := range 10 {
		f.crash(p)
		p = &process{Counter: c}
		f.openTree()
		f.open(counted(p))
		if i%2 == 0 {
			f.add(1)
			f.await(f.tree.Root().Size)
		}
	}
	if _, advances := c.at(); advances != 1 {
		t.Errorf("%d advances, want 1", advances)
	}
}

// TestEpochInterrupted kills a process between the steps of a new epoch, or
// takes the counter away from it. short makes the next epoch due at once.
func TestEpochInterrupted(t *testing.T) {
	short := func(cfg *Config) { cfg.EpochInterval = time.Millisecond }
	for _, tc := range []struct {
		name  string
		fault func(c *memory)
		kill  bool
		heal  func(c *memory)
		// advances that the counter makes for the interrupted epoch
		advances int
	}{
		{"killed before the advance", func(c *memory) { c.lost = hsm.ErrLost }, true, func(c *memory) { c.lost = nil }, 1},
		{"killed after the advance", func(c *memory) { c.answer = hsm.ErrLost }, true, func(c *memory) { c.answer, c.lost = nil, nil }, 1},
		{"lost before the advance", func(c *memory) { c.lost = hsm.ErrBusy }, false, func(c *memory) { c.lost = nil }, 1},
		{"lost after the advance", func(c *memory) { c.answer = hsm.ErrLost }, false, func(c *memory) { c.answer, c.lost = nil, nil }, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f, c := newCounted(t)
			p := &process{Counter: c}
			f.open(counted(p), short)
			f.settles(c, 8)
			c.set(tc.fault)
			f.add(1)
			f.await(1)
			f.until("counter error", func() bool { return f.heads.CounterErr() != nil })
			if err := f.heads.Err(); err != nil {
				t.Errorf("heads are held up: %v", err)
			}
			f.add(1)
			f.verify(f.await(2)) // heads go on
			if r := f.record(); r.Epoch != 9 || r.Size != 2 {
				t.Errorf("record of epoch %d with %d leaves, want 9 with 2", r.Epoch, r.Size)
			}
			_, before := c.at()
			if tc.name == "lost before the advance" || tc.name == "killed before the advance" {
				if before != 1 {
					t.Errorf("%d advances before the counter is back, want 1", before)
				}
			}
			if tc.kill {
				f.crash(p)
				c.set(tc.heal)
				f.openTree()
				f.open(counted(c))
			} else {
				c.set(tc.heal)
			}
			// The tree has grown since: without a kill the next epoch may follow.
			f.until("counter at 9", func() bool { v, _ := c.at(); return v >= 9 && f.heads.CounterErr() == nil })
			if tc.kill {
				f.settles(c, 9)
				if _, advances := c.at(); advances != 1+tc.advances {
					t.Errorf("%d advances, want %d", advances, 1+tc.advances)
				}
			}
			f.add(1)
			f.verify(f.await(3))
		})
	}
}

// TestEpochNotStored: an anchor that fails leaves the epoch, whether it wrote
// or not, and the counter is not asked.
func TestEpochNotStored(t *testing.T) {
	for _, wrote := range []bool{false, true} {
		t.Run(fmt.Sprintf("wrote %v", wrote), func(t *testing.T) {
			f, c := newCounted(t)
			f.open(counted(c))
			f.add(1)
			f.await(1)
			f.settles(c, 8)
			f.close()
			f.openTree()
			a := &brokenAnchor{Anchor: mustOpen(t, f.anchor())}
			f.open(counted(c), func(cfg *Config) { cfg.AnchorStore = a })
			f.add(1)
			f.await(2)
			value, _ := c.at()
			a.write.Store(wrote)
			a.fail.Store(true)
			f.close()
			if now, _ := c.at(); now != value {
				t.Errorf("counter at %d, was %d", now, value)
			}
			f.openTree()
			f.open(counted(c))
			f.add(1)
			f.verify(f.await(3))
			f.close()
			if now, _ := c.at(); now <= value {
				t.Errorf("counter at %d, was %d", now, value)
			}
		})
	}
}

// TestCounterHangs: heads and Close do not wait for a counter.
func TestCounterHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, c := newCounted(t)
		f.open(counted(c))
		f.settles(c, 8)
		f.add(1)
		f.await(1)
		f.close()
		f.openTree()
		f.open(counted(c), func(cfg *Config) { cfg.EpochInterval = time.Millisecond })
		hang := make(chan struct{})
		c.set(func(c *memory) { c.hang = hang })
		time.Sleep(time.Minute) // an epoch is due with the next leaf
		start := time.Now()
		for i := range uint64(20) {
			f.add(1)
			f.verify(f.await(2 + i))
		}
		if took := time.Since(start); took != 0 {
			t.Errorf("heads waited %v", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		start = time.Now()
		_ = f.heads.Close(ctx)
		if took := time.Since(start); took > time.Second {
			t.Errorf("close took %v", took)
		}
		close(hang)
		if err := f.engine.Close(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestCounterAwayAtStart(t *testing.T) {
	f, c := newCounted(t)
	f.open(counted(c))
	f.close()
	c.set(func(c *memory) { c.lost = hsm.ErrLost })
	f.openTree()
	if err := f.tryOpen(counted(c)); !errors.Is(err, ErrUnavailable) || !errors.Is(err, hsm.ErrLost) {
		t.Fatalf("error %v, want ErrUnavailable", err)
	}
	c.set(func(c *memory) { c.lost = nil })
	f.open(counted(c))
}

// TestRollback is the matrix of what is put back, replaced or written over
// while the service is down. Each row starts from a log that had a first epoch
// with 2 leaves (files in old) and a later one with 5.
func TestRollback(t *testing.T) {
	put := func(t *testing.T, f *fixture, old string) {
		t.Helper()
		err := errors.Join(os.RemoveAll(filepath.Join(f.dir, "log")), os.CopyFS(filepath.Join(f.dir, "log"), os.DirFS(filepath.Join(old, "log"))))
		b, e := os.ReadFile(filepath.Join(old, "anchor"))
		if err := errors.Join(err, e, os.WriteFile(f.anchor(), b, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	rewrite := func(t *testing.T, f *fixture, change func(r *Record)) {
		t.Helper()
		r := f.record()
		change(&r)
		a := mustOpen(t, f.anchor())
		if err := errors.Join(a.Store(r), a.Close()); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name string
		do   func(t *testing.T, f *fixture, c *memory, old string) Counter
		says string // "" = the log goes on
	}{
		{"nothing", func(_ *testing.T, _ *fixture, c *memory, _ string) Counter { return c }, ""},
		{"old anchor and database", func(t *testing.T, f *fixture, c *memory, old string) Counter {
			put(t, f, old)
			return c
		}, "an old anchor was put back"},
		{"old anchor and database, number written over", func(t *testing.T, f *fixture, c *memory, old string) Counter {
			put(t, f, old)
			rewrite(t, f, func(r *Record) { r.Sequence, r.Epoch = r.Sequence+1, c.value })
			return c
		}, "did not sign epoch"},
		{"old anchor and database, beginning of the last epoch", func(t *testing.T, f *fixture, c *memory, old string) Counter {
			last := f.record()
			put(t, f, old)
			rewrite(t, f, func(r *Record) { r.Sequence, r.Epoch, r.Start = r.Sequence+1, last.Epoch, last.Start })
			return c
		}, "the anchor was changed"},
		{"beginning of another tree", func(t *testing.T, f *fixture, c *memory, _ string) Counter {
			rewrite(t, f, func(r *Record) { r.Sequence, r.Start.Root = r.Sequence+1, tree.Hash{1} })
			return c
		}, "did not sign epoch"},
		{"next number without a signature", func(t *testing.T, f *fixture, c *memory, _ string) Counter {
			rewrite(t, f, func(r *Record) { r.Sequence, r.Epoch, r.Start = r.Sequence+1, r.Epoch+1, EpochStart{} })
			return c
		}, "not the counter that this log had"},
		{"counter replaced by a new one", func(_ *testing.T, _ *fixture, _ *memory, _ string) Counter {
			return &memory{value: 1}
		}, "not the counter that this log had"},
		{"counter ahead", func(_ *testing.T, _ *fixture, c *memory, _ string) Counter {
			c.set(func(c *memory) { c.value++ })
			return c
		}, "an old anchor was put back, or the counter is used by another log"},
		{"counter no longer configured", func(_ *testing.T, _ *fixture, _ *memory, _ string) Counter {
			return nil
		}, "none is configured"},
		{"anchor of a time without a counter", func(t *testing.T, f *fixture, c *memory, _ string) Counter {
			rewrite(t, f, func(r *Record) { r.Sequence, r.Epoch, r.Start = r.Sequence+1, 0, EpochStart{} })
			return c
		}, "not bound to it"},
		{"newest slot lost at the beginning of an epoch", func(t *testing.T, f *fixture, c *memory, _ string) Counter {
			at := int64(f.record().Sequence%2) * slotSize
			if err := overwrite(f.anchor(), []int64{at}, make([]byte, 16)); err != nil {
				t.Fatal(err)
			}
			return c
		}, "an old anchor was put back"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f, c := newCounted(t)
			f.open(counted(c))
			f.add(2)
			f.await(2)
			f.close()
			old := t.TempDir()
			b, err := os.ReadFile(f.anchor())
			if err := errors.Join(err, os.CopyFS(filepath.Join(old, "log"), os.DirFS(filepath.Join(f.dir, "log"))), os.WriteFile(filepath.Join(old, "anchor"), b, 0o600)); err != nil {
				t.Fatal(err)
			}
			f.openTree()
			f.open(counted(c))
			f.add(3)
			f.await(5)
			f.close()
			value, _ := c.at()
			counter := tc.do(t, f, c, old)
			before, err := os.ReadFile(f.anchor())
			if err != nil {
				t.Fatal(err)
			}
			signed := f.key.Count()
			f.openTree()
			var log lines
			f.openAny(func(cfg *Config) {
				if counter != nil {
					cfg.Counter = counter
				}
			}, withLog(&log))
			err = f.heads.Err()
			if tc.says == "" {
				if err != nil || f.heads.Latest().Size != 5 {
					t.Fatalf("head of %d leaves, error %v", f.heads.Latest().Size, err)
				}
				return
			}
			if !errors.Is(err, ErrEpoch) || !errors.Is(err, ErrFork) || !strings.Contains(err.Error(), tc.says) {
				t.Fatalf("error %v, want ErrEpoch that says %q", err, tc.says)
			}
			if _, _, err := f.heads.Tree().Append(t.Context(), tree.Leaf{Value: []byte("late")}); !errors.Is(err, ErrFork) {
				t.Errorf("append: error %v, want ErrFork", err)
			}
			if !strings.Contains(log.String(), "log is read-only until an operator decides") {
				t.Errorf("logged: %s", &log)
			}
			f.close()
			if after, err := os.ReadFile(f.anchor()); err != nil || string(after) != string(before) {
				t.Errorf("the anchor was written: %v", err)
			}
			if now, _ := c.at(); f.key.Count() != signed || now > value+1 {
				t.Errorf("%d signatures, counter from %d to %d", f.key.Count()-signed, value, now)
			}
		})
	}
}

// TestTwoTreesOneCounter: the second log to move the counter is stopped.
func TestTwoTreesOneCounter(t *testing.T) {
	f, c := newCounted(t)
	f.open(counted(c))
	f.settles(c, 8)
	f.add(1)
	f.await(1)
	g := newFixture(t)
	g.bindNew(8)
	g.open(counted(c))
	g.settles(c, 9)
	f.close() // a new epoch of f: the counter is not where f left it
	if err := f.heads.CounterErr(); !errors.Is(err, ErrEpoch) || !strings.Contains(err.Error(), "another log") {
		t.Errorf("error %v, want ErrEpoch", err)
	}
	if value, _ := c.at(); value != 9 {
		t.Errorf("counter at %d, want 9", value)
	}
}

// TestForeignAdvanceLatches: in its run too a log stops when its counter moves
// by another's hand.
func TestForeignAdvanceLatches(t *testing.T) {
	f, c := newCounted(t)
	f.open(counted(c), func(cfg *Config) { cfg.EpochInterval = time.Millisecond })
	f.settles(c, 8)
	c.set(func(c *memory) { c.value += 3 })
	f.add(1)
	_, _ = f.heads.Await(t.Context(), 1)
	f.until("latch", func() bool { return errors.Is(f.heads.Err(), ErrEpoch) })
	for name, err := range readAll(t.Context(), f.heads.Tree()) {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := f.heads.Tree().Append(t.Context(), tree.Leaf{Value: []byte("late")}); !errors.Is(err, ErrFork) {
		t.Errorf("append: error %v, want ErrFork", err)
	}
}

// change is the acceptance of an epoch by an operator.
func (f *fixture) change(epoch uint64, reports *[]Record) EpochChange {
	return EpochChange{
		Key: f.heads.pub, Format: checkpoint("log.example"), Epoch: epoch,
		Report: func(old, next Record, raw []byte) error {
			if len(raw) != 2*slotSize {
				return fmt.Errorf("%d octets reported", len(raw))
			}
			*reports = append(*reports, old, next)
			return nil
		},
	}
}

// TestAcceptEpoch takes a counter into use on a log that had none, replaces it,
// and gives it up.
func TestAcceptEpoch(t *testing.T) {
	f := newFixture(t).open()
	f.add(3)
	first := f.await(3)
	f.close()
	for _, step := range []struct {
		name    string
		counter *memory
	}{
		{"taken into use", &memory{value: 40}},
		{"replaced", &memory{value: 2}},
		{"given up", nil},
	} {
		var change []func(*Config)
		epoch := uint64(0)
		if step.counter != nil {
			change, epoch = append(change, counted(step.counter)), step.counter.value
		}
		f.openTree()
		f.openAny(change...)
		if err := f.heads.Err(); !errors.Is(err, ErrEpoch) {
			t.Fatalf("%s: error %v, want ErrEpoch", step.name, err)
		}
		f.close()
		before := f.record()
		var reports []Record
		rec, err := AcceptEpoch(f.anchor(), f.change(epoch, &reports))
		if err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		want := before
		want.Sequence, want.Epoch, want.Start = before.Sequence+1, epoch, EpochStart{}
		if diff := cmp.Diff([]Record{before, want, want}, append(reports, rec)); diff != "" {
			t.Fatalf("%s: records (-want +got):\n%s", step.name, diff)
		}
		f.openTree()
		var log lines
		f.open(append(change, withLog(&log))...)
		size := f.heads.Latest().Size
		f.add(1)
		f.consistent(first, f.await(size+1))
		if step.counter != nil {
			f.settles(step.counter, epoch+1)
			if !strings.Contains(log.String(), "level=ERROR msg=\"an operator bound the anchor") {
				t.Errorf("%s: logged %s", step.name, &log)
			}
		}
		f.close()
	}
}

func TestAcceptEpochRefuses(t *testing.T) {
	full := errors.New("no space for the incident file")
	for _, tc := range []struct {
		name   string
		change func(*EpochChange)
		want   error
	}{
		{"another origin", func(c *EpochChange) { c.Format = checkpoint("other.example") }, ErrMismatch},
		{"incident file not written", func(c *EpochChange) { c.Report = func(Record, Record, []byte) error { return full } }, full},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFixture(t).open()
			var reports []Record
			if _, err := AcceptEpoch(f.anchor(), f.change(3, &reports)); !errors.Is(err, ErrAnchor) {
				t.Errorf("in use: error %v, want ErrAnchor", err)
			}
			f.close()
			before := f.record()
			change := f.change(3, &reports)
			tc.change(&change)
			if _, err := AcceptEpoch(f.anchor(), change); !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
			if diff := cmp.Diff(before, f.record()); diff != "" {
				t.Errorf("the anchor changed (-was +is):\n%s", diff)
			}
		})
	}
}

// TestAcceptLossBinds: a tree that is accepted is bound to the counter as it is.
func TestAcceptLossBinds(t *testing.T) {
	f, _ := behind(t)
	l := f.loss(nil)
	l.Epoch = 12
	if rec, err := AcceptLoss(f.anchor(), l); err != nil || rec.Epoch != 12 {
		t.Fatalf("record of epoch %d, %v", rec.Epoch, err)
	}
	c := &memory{value: 12}
	f.open(counted(c))
	f.verify(f.heads.Latest())
	f.settles(c, 13)
	f.add(1)
	f.verify(f.await(4))
}

// TestEpochSlot: a record with a signed beginning has one form.
func TestEpochSlot(t *testing.T) {
	r := record(4)
	r.Start = EpochStart{Head: Head{Size: 30, Root: [32]byte{9}, Time: time.UnixMilli(900).UTC()}, Signature: []byte{1, 2, 3}}
	b, err := r.marshal()
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseSlot(0, b)
	if diff := cmp.Diff(r, got); diff != "" || err != nil {
		t.Fatalf("record (-want +got), %v:\n%s", err, diff)
	}
	for name, change := range map[string]func([]byte){
		"as version 1":           func(b []byte) { b[9] = 1 },
		"no signature":           func(b []byte) { b[slotBody+slotStart-1] = 0 },
		"signature too long":     func(b []byte) { b[slotBody+slotStart-2] = 0xff },
		"note too long":          func(b []byte) { b[12] = 0x0f },
		"time of the far future": func(b []byte) { b[slotBody] = 1 },
		"of sequence 0":          func(b []byte) { clear(b[16:24]) },
		"a kind of its own":      func(b []byte) { b[15] = 2 },
	} {
		bad := []byte(string(b))
		change(bad)
		copy(bad[slotSum:], sum(bad[:slotSum]))
		if r, err := parseSlot(0, bad); err == nil {
			t.Errorf("%s: accepted as %+v", name, r)
		}
	}
	start := sha256.Sum256(r.Start.message(3))
	other := r.Start
	other.Size++
	for name, again := range map[string][32]byte{
		"epoch": sha256.Sum256(r.Start.message(4)), "size": sha256.Sum256(other.message(3)),
	} {
		if again == start {
			t.Errorf("the message does not contain the %s", name)
		}
	}
}
