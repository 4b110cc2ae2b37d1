package tree

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chancery-ca/chancery/log/store"
	"github.com/google/go-cmp/cmp"
	"github.com/google/trillian"
	"github.com/google/trillian/storage"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

var quiet = slog.New(slog.DiscardHandler)

func TestMain(m *testing.M) {
	// klog starts a flushing goroutine for the process's life.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"))
}

func leafN(n int) Leaf {
	v := binary.BigEndian.AppendUint64([]byte("leaf "), uint64(n))
	return Leaf{Value: v, Extra: []byte(fmt.Sprintf("extra %d", n))}
}

// fill appends leaves from..to-1 in batches and returns the leaf hash at each
// index.
func fill(t testing.TB, tr Tree, from, to int) []Hash {
	t.Helper()
	hashes := make([]Hash, to-from)
	var wg sync.WaitGroup
	const clients = 1024
	for c := range clients {
		wg.Go(func() {
			for n := from + c; n < to; n += clients {
				e, existed, err := tr.Append(t.Context(), leafN(n))
				if err != nil || existed {
					t.Errorf("append %d: existed %v: %v", n, existed, err)
					return
				}
				hashes[e.Index-uint64(from)] = e.LeafHash
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return hashes
}

func slices(hs []Hash) [][]byte {
	out := make([][]byte, len(hs))
	for i := range hs {
		out[i] = hs[i][:]
	}
	return out
}

func mustRoot(t testing.TB, tr Tree, size uint64) Hash {
	t.Helper()
	h, err := tr.RootAt(t.Context(), size)
	if err != nil {
		t.Fatalf("root at %d: %v", size, err)
	}
	return h
}

func checkInclusion(t testing.TB, tr Tree, index, size uint64, leaf, root Hash) {
	t.Helper()
	p, err := tr.InclusionProof(t.Context(), index, size)
	if err != nil {
		t.Fatalf("inclusion of %d in %d: %v", index, size, err)
	}
	if err := proof.VerifyInclusion(rfc6962.DefaultHasher, index, size, leaf[:], slices(p), root[:]); err != nil {
		t.Fatalf("inclusion of %d in %d: %v", index, size, err)
	}
}

func checkConsistency(t testing.TB, tr Tree, first, second uint64, a, b Hash) {
	t.Helper()
	p, err := tr.ConsistencyProof(t.Context(), first, second)
	if err != nil {
		t.Fatalf("consistency of %d and %d: %v", first, second, err)
	}
	if err := proof.VerifyConsistency(rfc6962.DefaultHasher, first, second, slices(p), a[:], b[:]); err != nil {
		t.Fatalf("consistency of %d and %d: %v", first, second, err)
	}
}

// naiveRoot is RFC 6962, Section 2.1, as it is written there.
func naiveRoot(d []Hash) Hash {
	switch len(d) {
	case 0:
		return EmptyRoot()
	case 1:
		return d[0]
	}
	k := 1
	for k*2 < len(d) {
		k *= 2
	}
	l, r := naiveRoot(d[:k]), naiveRoot(d[k:])
	return Hash(rfc6962.DefaultHasher.HashChildren(l[:], r[:]))
}

func TestProofsExhaustive(t *testing.T) {
	const n = 300
	_, tr := openTree(t, newFaultyStorage(t))
	leaves := fill(t, tr, 0, n)
	roots := make([]Hash, n+1)
	for size := range roots {
		roots[size] = mustRoot(t, tr, uint64(size))
		if want := naiveRoot(leaves[:size]); roots[size] != want {
			t.Fatalf("root of %d is %x, want %x", size, roots[size], want)
		}
	}
	if tr.Root().Hash != roots[n] || tr.Root().Size != n {
		t.Fatalf("newest root %+v", tr.Root())
	}
	for size := range uint64(n + 1) {
		for i := range size {
			checkInclusion(t, tr, i, size, leaves[i], roots[size])
		}
		for first := range size + 1 {
			checkConsistency(t, tr, first, size, roots[first], roots[size])
		}
	}
}

// TestProofsOfAGrownTree reads old tiles back from the storage: the cache
// holds one.
func TestProofsOfAGrownTree(t *testing.T) {
	const n = 70_000
	s := newFaultyStorage(t)
	e, tr := openTree(t, s, func(c *Config) { c.CacheTiles = 1 })
	leaves := fill(t, tr, 0, n)
	root := tr.Root()
	if err := e.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, tr = openTree(t, s)
	if tr.Root() != root {
		t.Fatalf("root after reopening is %+v, was %+v", tr.Root(), root)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		size := 1 + rng.Uint64N(n)
		at := mustRoot(t, tr, size)
		i := rng.Uint64N(size)
		checkInclusion(t, tr, i, size, leaves[i], at)
		checkInclusion(t, tr, i, n, leaves[i], root.Hash)
		checkConsistency(t, tr, size, n, at, root.Hash)
		checkConsistency(t, tr, i, size, mustRoot(t, tr, i), at)
	}
	for _, size := range []uint64{255, 256, 257, 65535, 65536, 65537} {
		if got, want := mustRoot(t, tr, size), naiveRoot(leaves[:size]); got != want {
			t.Errorf("root of %d is %x, want %x", size, got, want)
		}
	}
}

func TestTiles(t *testing.T) {
	_, tr := openTree(t, newFaultyStorage(t))
	leaves := fill(t, tr, 0, 700)
	tile0 := bytes.Join(slices(leaves[:256]), nil)
	tile1 := bytes.Join(slices(leaves[256:512]), nil)
	top := append(append([]byte{}, hashOf(leaves[:256])...), hashOf(leaves[256:512])...)
	for _, tc := range []struct {
		name         string
		level, index uint64
		width        int
		want         []byte // nil: ErrNotFound
	}{
		{"full", 0, 0, 256, tile0},
		{"prefix of a full one", 0, 1, 3, tile1[:96]},
		{"partial", 0, 2, 188, bytes.Join(slices(leaves[512:700]), nil)},
		{"prefix of a partial one", 0, 2, 1, leaves[512][:]},
		{"wider than filled", 0, 2, 189, nil},
		{"next", 0, 3, 1, nil},
		{"far", 0, 1 << 60, 1, nil},
		{"level 1", 1, 0, 2, top},
		{"level 1 wider than filled", 1, 0, 3, nil},
		{"level 2", 2, 0, 1, nil},
		{"level 7", 7, 0, 1, nil},
		{"level 8", 8, 0, 1, nil},
		{"level 2^64-1", 1<<64 - 1, 0, 1, nil},
		{"width 0", 0, 0, 0, nil},
		{"width -1", 0, 0, -1, nil},
		{"width 257", 0, 0, 257, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := tr.Tile(t.Context(), tc.level, tc.index, tc.width)
			if tc.want == nil {
				if !errors.Is(err, ErrNotFound) {
					t.Fatalf("error %v, want ErrNotFound", err)
				}
				return
			}
			if err != nil || !bytes.Equal(got, tc.want) {
				t.Fatalf("got %d octets, %v; want %d", len(got), err, len(tc.want))
			}
		})
	}
}

func hashOf(d []Hash) []byte { h := naiveRoot(d); return h[:] }

func TestOutOfRange(t *testing.T) {
	_, tr := openTree(t, newFaultyStorage(t))
	fill(t, tr, 0, 10)
	ctx := t.Context()
	for name, f := range map[string]func() error{
		"inclusion beyond the root":   func() error { _, err := tr.InclusionProof(ctx, 3, 11); return err },
		"inclusion, index = size":     func() error { _, err := tr.InclusionProof(ctx, 5, 5); return err },
		"inclusion in nothing":        func() error { _, err := tr.InclusionProof(ctx, 0, 0); return err },
		"inclusion, 2^64-1":           func() error { _, err := tr.InclusionProof(ctx, 1<<64-2, 1<<64-1); return err },
		"consistency beyond the root": func() error { _, err := tr.ConsistencyProof(ctx, 3, 11); return err },
		"consistency backwards":       func() error { _, err := tr.ConsistencyProof(ctx, 5, 4); return err },
		"root beyond the root":        func() error { _, err := tr.RootAt(ctx, 11); return err },
		"entries beyond the root":     func() error { _, err := tr.Entries(ctx, 10, 1); return err },
		"no entries":                  func() error { _, err := tr.Entries(ctx, 0, 0); return err },
		"unknown leaf hash":           func() error { _, err := tr.ByLeafHash(ctx, Hash{1}); return err },
		"unknown identity":            func() error { _, err := tr.ByIdentity(ctx, Hash{1}); return err },
	} {
		if err := f(); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: error %v, want ErrNotFound", name, err)
		}
	}
	for _, size := range []uint64{0, 7, 10} {
		if p, err := tr.ConsistencyProof(ctx, 0, size); err != nil || len(p) != 0 {
			t.Errorf("consistency of 0 and %d: %d hashes, %v; want none", size, len(p), err)
		}
		if p, err := tr.ConsistencyProof(ctx, size, size); err != nil || len(p) != 0 {
			t.Errorf("consistency of %d with itself: %d hashes, %v; want none", size, len(p), err)
		}
	}
}

func TestEntriesAndLookups(t *testing.T) {
	_, tr := openTree(t, newFaultyStorage(t))
	var want []Entry
	for n := range 5 {
		l := leafN(n)
		l.Identity = Hash{9, byte(n)}
		e, existed, err := tr.Append(t.Context(), l)
		if err != nil || existed {
			t.Fatalf("append %d: existed %v: %v", n, existed, err)
		}
		want = append(want, Entry{Index: uint64(n), LeafHash: LeafHash(l.Value), Value: l.Value, Extra: l.Extra})
		if diff := cmp.Diff(want[n], e); diff != "" {
			t.Fatalf("append %d (-want +got):\n%s", n, diff)
		}
	}
	for _, tc := range []struct{ start, count, first, last uint64 }{
		{0, 5, 0, 5}, {0, 1, 0, 1}, {2, 2, 2, 4}, {3, 1 << 63, 3, 5}, {4, 1<<64 - 1, 4, 5},
	} {
		got, err := tr.Entries(t.Context(), tc.start, tc.count)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want[tc.first:tc.last], got); diff != "" {
			t.Errorf("entries %d+%d (-want +got):\n%s", tc.start, tc.count, diff)
		}
	}
	for n, w := range want {
		byHash, err := tr.ByLeafHash(t.Context(), w.LeafHash)
		if err != nil {
			t.Fatal(err)
		}
		byID, err := tr.ByIdentity(t.Context(), Hash{9, byte(n)})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]Entry{w, w}, []Entry{byHash, byID}); diff != "" {
			t.Errorf("look-ups of %d (-want +got):\n%s", n, diff)
		}
	}
}

// TestExpiredSnapshots: a reader that a busy machine held up looks again, and
// not for ever.
func TestExpiredSnapshots(t *testing.T) {
	s := newFaultyStorage(t)
	_, tr := openTree(t, s)
	hash := fill(t, tr, 0, 1)[0]
	for name, read := range map[string]func() error{
		"entries":      func() error { _, err := tr.Entries(t.Context(), 0, 1); return err },
		"by leaf hash": func() error { _, err := tr.ByLeafHash(t.Context(), hash); return err },
	} {
		for _, tc := range []struct {
			expired int
			want    error
		}{{maxAttempts - 1, nil}, {maxAttempts, store.ErrSnapshotExpired}} {
			s.set(func() { s.expired = tc.expired })
			if err := read(); !errors.Is(err, tc.want) {
				t.Errorf("%s after %d snapshots that expired: %v, want %v", name, tc.expired, err, tc.want)
			}
		}
	}
}

func TestDuplicates(t *testing.T) {
	_, tr := openTree(t, newFaultyStorage(t))
	first := Leaf{Value: []byte("first"), Extra: []byte("a"), Identity: Hash{7}}
	want, _, err := tr.Append(t.Context(), first)
	if err != nil {
		t.Fatal(err)
	}
	got, existed, err := tr.Append(t.Context(), Leaf{Value: []byte("second"), Extra: []byte("b"), Identity: Hash{7}})
	if err != nil || !existed {
		t.Fatalf("existed %v: %v", existed, err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("duplicate (-first +second):\n%s", diff)
	}
	// One value under two identities is two leaves.
	e, existed, err := tr.Append(t.Context(), Leaf{Value: []byte("first"), Identity: Hash{8}})
	if err != nil || existed || e.Index != 1 {
		t.Fatalf("entry %+v, existed %v: %v", e, existed, err)
	}
	if e, err := tr.ByLeafHash(t.Context(), LeafHash([]byte("first"))); err != nil || e.Index != 0 {
		t.Errorf("first entry with the hash is %d, %v; want 0", e.Index, err)
	}
	if tr.Root().Size != 2 {
		t.Errorf("size %d, want 2", tr.Root().Size)
	}
}

func TestConcurrentDuplicatesAreOneLeaf(t *testing.T) {
	_, tr := openTree(t, newFaultyStorage(t))
	const callers = 100
	var added, same int
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			e, existed, err := tr.Append(t.Context(), leafN(1))
			if err != nil || e.Index != 0 {
				t.Errorf("entry %+v: %v", e, err)
			}
			mu.Lock()
			defer mu.Unlock()
			if existed {
				same++
			} else {
				added++
			}
		})
	}
	wg.Wait()
	if added != 1 || same != callers-1 || tr.Root().Size != 1 {
		t.Errorf("%d added, %d existed, size %d", added, same, tr.Root().Size)
	}
}

// TestBatches: while one batch commits the next one gathers, whole.
func TestBatches(t *testing.T) {
	s := newFaultyStorage(t)
	_, tr := openTree(t, s)
	s.set(func() { s.gate = make(chan struct{}) })
	const n = 200
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			if _, _, err := tr.Append(t.Context(), leafN(i)); err != nil {
				t.Error(err)
			}
		})
	}
	lt := tr.(*logTree)
	waitFor(t, lt, func() bool { return len(lt.waiting) == n })
	poll(t, func() bool { // the first batch is in the storage's queue
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.held == 1
	})
	s.mu.Lock()
	before, gate := s.queues, s.gate
	s.gate = nil
	s.mu.Unlock()
	close(gate)
	wg.Wait()
	if got := s.queues - before; got != 1 && before+got != 1 {
		t.Errorf("%d batches after the first, want 1", got)
	}
}

// waitFor waits until cond, which is called with the tree's lock.
func waitFor(t *testing.T, lt *logTree, cond func() bool) {
	t.Helper()
	poll(t, func() bool {
		lt.mu.Lock()
		defer lt.mu.Unlock()
		return cond()
	})
}

// poll waits until cond; that this ends at all is to end a hang.
func poll(t *testing.T, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(2 * time.Minute); !cond(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("timeout")
		}
	}
}

func TestAdmissionIsBounded(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*Config)
		fit    int
	}{
		{"leaves", func(c *Config) { c.MaxQueue = 5 }, 5},
		{"octets", func(c *Config) { c.MaxQueueBytes = 100 }, 5}, // 20 octets each
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newFaultyStorage(t)
			_, tr := openTree(t, s, tc.change)
			s.set(func() { s.gate = make(chan struct{}) })
			var wg sync.WaitGroup
			for i := range tc.fit {
				wg.Go(func() {
					if _, _, err := tr.Append(t.Context(), leafN(i)); err != nil {
						t.Error(err)
					}
				})
			}
			lt := tr.(*logTree)
			waitFor(t, lt, func() bool { return len(lt.waiting) == tc.fit })
			if _, _, err := tr.Append(t.Context(), leafN(99)); !errors.Is(err, ErrBusy) {
				t.Errorf("error %v, want ErrBusy", err)
			}
			wg.Go(func() { // one that waits already takes no place
				if _, existed, err := tr.Append(t.Context(), leafN(0)); err != nil || !existed {
					t.Errorf("existed %v: %v", existed, err)
				}
			})
			s.mu.Lock()
			gate := s.gate
			s.gate = nil
			s.mu.Unlock()
			close(gate)
			wg.Wait()
			if _, existed, err := tr.Append(t.Context(), leafN(99)); err != nil || existed {
				t.Errorf("after the queue emptied: existed %v: %v", existed, err)
			}
		})
	}
}

func TestBadLeaves(t *testing.T) {
	_, tr := openTree(t, newFaultyStorage(t), func(c *Config) { c.MaxQueueBytes = 1000 })
	for name, leaf := range map[string]Leaf{
		"empty":           {},
		"only extra":      {Extra: []byte("x")},
		"huge value":      {Value: make([]byte, 1001)},
		"huge with extra": {Value: make([]byte, 500), Extra: make([]byte, 501)},
	} {
		if _, _, err := tr.Append(t.Context(), leaf); !errors.Is(err, ErrLeaf) {
			t.Errorf("%s: error %v, want ErrLeaf", name, err)
		}
	}
	if tr.Root().Size != 0 {
		t.Errorf("size %d, want 0", tr.Root().Size)
	}
}

func TestCancelledCallerLosesNothing(t *testing.T) {
	s := newFaultyStorage(t)
	_, tr := openTree(t, s)
	gate := make(chan struct{})
	s.set(func() { s.gate = gate })
	ctx, cancel := context.WithCancel(t.Context())
	leaf := Leaf{Value: []byte("mine"), Extra: []byte("too")}
	errs := make(chan error, 1)
	go func() { _, _, err := tr.Append(ctx, leaf); errs <- err }()
	lt := tr.(*logTree)
	waitFor(t, lt, func() bool { return len(lt.waiting) == 1 })
	cancel()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v, want context.Canceled", err)
	}
	copy(leaf.Value, "????") // the caller's buffer is its own again
	s.set(func() { s.gate = nil })
	close(gate)
	e, existed, err := tr.Append(t.Context(), Leaf{Value: []byte("mine")})
	if err != nil || !existed || string(e.Value) != "mine" || string(e.Extra) != "too" {
		t.Fatalf("entry %+v, existed %v: %v", e, existed, err)
	}
	if _, _, err := tr.Append(ctx, leafN(1)); !errors.Is(err, context.Canceled) {
		t.Errorf("append with an ended context: %v", err)
	}
}

func TestStorageFaults(t *testing.T) {
	for _, tc := range []struct {
		name    string
		inject  func(*faultyStorage, func() error)
		kept    bool // the leaf is in the tree without another Append
		visible bool // the caller sees an error
	}{
		{"queue fails", func(s *faultyStorage, f func() error) { s.onQueue, s.onProbe = f, f }, false, true},
		{"batch does not begin", func(s *faultyStorage, f func() error) { s.beforeBatch = f }, true, true},
		{"batch is rolled back", func(s *faultyStorage, f func() error) { s.inBatch = f }, true, true},
		{"commit reports an error but happened", func(s *faultyStorage, f func() error) { s.afterBatch = f }, true, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newFaultyStorage(t)
			_, tr := openTree(t, s)
			fill(t, tr, 0, 3)
			failures := 3
			if tc.visible {
				failures = 1 << 30 // until the test has looked
			}
			s.set(func() {
				tc.inject(s, func() error {
					if failures--; failures < 0 {
						return nil
					}
					return errDisk
				})
			})
			_, _, err := tr.Append(t.Context(), leafN(3))
			switch {
			case tc.visible && (!errors.Is(err, ErrStorage) || !errors.Is(err, errDisk)):
				t.Fatalf("error %v, want ErrStorage and its cause", err)
			case tc.visible && !errors.Is(tr.Err(), ErrStorage):
				t.Fatalf("readiness says %v", tr.Err())
			case !tc.visible && err != nil:
				t.Fatal(err)
			}
			if tc.visible {
				s.set(func() { failures = 0 })
			}
			if tc.kept {
				for tr.Root().Size < 4 {
					changed := tr.Changed()
					if tr.Root().Size < 4 {
						<-changed
					}
				}
			}
			var e Entry
			var existed bool
			for range 5 { // the disk recovers meanwhile
				if e, existed, err = tr.Append(t.Context(), leafN(3)); err == nil {
					break
				}
			}
			if err != nil || existed != tc.kept || e.Index != 3 {
				t.Fatalf("entry %d, existed %v: %v", e.Index, existed, err)
			}
			e, _, err = tr.Append(t.Context(), leafN(4))
			if err != nil || e.Index != 4 {
				t.Fatalf("entry %d: %v", e.Index, err)
			}
			if err := tr.Err(); err != nil {
				t.Errorf("readiness says %v after recovery", err)
			}
			root := tr.Root()
			checkInclusion(t, tr, 4, root.Size, e.LeafHash, root.Hash)
		})
	}
}

// TestReadinessReturns: a log without traffic notices that its disk is back.
func TestReadinessReturns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newFaultyStorage(t)
		e, tr := openTree(t, s)
		broken := func() error { return errDisk }
		s.set(func() { s.onQueue, s.onProbe = broken, broken })
		if _, _, err := tr.Append(t.Context(), leafN(1)); !errors.Is(err, errDisk) {
			t.Fatalf("error %v, want the disk's", err)
		}
		time.Sleep(time.Second)
		if !errors.Is(tr.Err(), ErrStorage) {
			t.Errorf("readiness says %v while the disk is away", tr.Err())
		}
		s.set(func() { s.onQueue, s.onProbe = nil, nil })
		time.Sleep(time.Second)
		if err := tr.Err(); err != nil {
			t.Errorf("readiness says %v", err)
		}
		if err := e.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

// TestMixedAnswers: in one batch the storage has some leaves, takes some and
// refuses one. Each caller gets its own answer.
func TestMixedAnswers(t *testing.T) {
	s := newFaultyStorage(t)
	_, tr := openTree(t, s)
	fill(t, tr, 0, 3)
	gate := make(chan struct{})
	s.set(func() { s.gate = gate })
	var wg sync.WaitGroup
	wg.Go(func() { // holds the integrator, so that the rest is one batch
		if _, _, err := tr.Append(t.Context(), leafN(3)); err != nil {
			t.Error(err)
		}
	})
	lt := tr.(*logTree)
	waitFor(t, lt, func() bool { return len(lt.waiting) == 1 && len(lt.queue) == 0 })
	refused := leafN(5)
	id := LeafHash(refused.Value)
	s.set(func() {
		s.answer = func(out []*trillian.QueuedLogLeaf) {
			for _, q := range out {
				if string(q.Leaf.LeafIdentityHash) == string(id[:]) {
					q.Status = status.New(codes.Internal, "disk").Proto()
				}
			}
		}
	})
	for n, want := range map[int]struct {
		existed bool
		err     error
	}{0: {true, nil}, 1: {true, nil}, 4: {false, nil}, 5: {false, ErrStorage}, 6: {false, nil}} {
		wg.Go(func() {
			e, existed, err := tr.Append(t.Context(), leafN(n))
			if existed != want.existed || !errors.Is(err, want.err) {
				t.Errorf("leaf %d: existed %v: %v; want %v, %v", n, existed, err, want.existed, want.err)
			}
			if err == nil && e.LeafHash != LeafHash(leafN(n).Value) {
				t.Errorf("leaf %d: another entry", n)
			}
		})
	}
	waitFor(t, lt, func() bool { return len(lt.queue) == 5 })
	s.set(func() { s.gate = nil })
	close(gate)
	wg.Wait()
	s.set(func() { s.answer = nil })
	if _, _, err := tr.Append(t.Context(), refused); err != nil {
		t.Errorf("the refused leaf again: %v", err)
	}
	if got := tr.Root().Size; got != 7 {
		t.Errorf("size %d, want 7", got)
	}
}

// TestBitFlips: a hash that does not fit its bytes or its place is never
// integrated and never served.
func TestBitFlips(t *testing.T) {
	for name, mutate := range map[string]func(*trillian.LogLeaf){
		"value":     func(l *trillian.LogLeaf) { l.LeafValue[0] ^= 1 },
		"leaf hash": func(l *trillian.LogLeaf) { l.MerkleLeafHash[31] ^= 0x80 },
		"no value":  func(l *trillian.LogLeaf) { l.LeafValue = nil },
		"identity":  func(l *trillian.LogLeaf) { l.LeafIdentityHash = l.LeafIdentityHash[:31] },
	} {
		t.Run("queued "+name, func(t *testing.T) {
			s := newFaultyStorage(t)
			_, tr := openTree(t, s)
			fill(t, tr, 0, 3)
			root := tr.Root()
			s.set(func() { s.mutate = func(ls []*trillian.LogLeaf) { mutate(ls[len(ls)-1]) } })
			for range 2 {
				if _, _, err := tr.Append(t.Context(), leafN(3)); !errors.Is(err, ErrCorrupt) {
					t.Fatalf("error %v, want ErrCorrupt", err)
				}
			}
			if tr.Root() != root {
				t.Errorf("root changed to %+v", tr.Root())
			}
			if !errors.Is(tr.Err(), ErrCorrupt) {
				t.Errorf("readiness says %v", tr.Err())
			}
		})
	}
	t.Run("stored tile", func(t *testing.T) {
		s := newFaultyStorage(t)
		e, tr := openTree(t, s)
		leaves := fill(t, tr, 0, 600)
		root := tr.Root()
		if err := e.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.set(func() {
			s.flip = func(level, index uint64, raw []byte) {
				if level == 0 && index == 1 {
					raw[77] ^= 4
				}
			}
		})
		_, tr = openTree(t, s)
		if _, err := tr.InclusionProof(t.Context(), 300, 600); !errors.Is(err, ErrCorrupt) {
			t.Errorf("proof: error %v, want ErrCorrupt", err)
		}
		if _, err := tr.Tile(t.Context(), 0, 1, 10); !errors.Is(err, ErrCorrupt) {
			t.Errorf("tile: error %v, want ErrCorrupt", err)
		}
		if _, err := tr.Entries(t.Context(), 256, 1); !errors.Is(err, ErrCorrupt) {
			t.Errorf("entry: error %v, want ErrCorrupt", err)
		}
		checkInclusion(t, tr, 3, 600, leaves[3], root.Hash) // the others serve
	})
	t.Run("stored edge", func(t *testing.T) {
		s := newFaultyStorage(t)
		e, tr := openTree(t, s)
		fill(t, tr, 0, 10)
		if err := e.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.set(func() { s.flip = func(_, _ uint64, raw []byte) { raw[0] ^= 1 } })
		cfg := Config{Now: wallClock, Logger: quiet}
		cfg.Backend = s.backend(t, cfg)
		e, err := Open(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close(t.Context())
		if _, err := e.Tree(t.Context(), "log"); !errors.Is(err, ErrCorrupt) {
			t.Errorf("error %v, want ErrCorrupt", err)
		}
	})
}

// TestRootTimes: Trillian's root times increase whatever the clock does.
func TestRootTimes(t *testing.T) {
	start := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	now := start
	var refuse error
	var mu sync.Mutex
	s := newFaultyStorage(t)
	e, tr := openTree(t, s, func(c *Config) {
		c.Now = func() (time.Time, error) { mu.Lock(); defer mu.Unlock(); return now, refuse }
	})
	last := tr.Root().Time
	for n, step := range []struct {
		at  time.Time
		err error
	}{
		{start.Add(time.Second), nil},
		{start.Add(time.Second), nil},                     // stands still
		{start.Add(-time.Hour), nil},                      // set back
		{time.Time{}, errors.New("clock is not trusted")}, // refuses
		{start.Add(24 * time.Hour), nil},                  // jumps
		{start.Add(2 * time.Second), nil},                 // and comes back
	} {
		mu.Lock()
		now, refuse = step.at, step.err
		mu.Unlock()
		if _, _, err := tr.Append(t.Context(), leafN(n)); err != nil {
			t.Fatalf("step %d: %v", n, err)
		}
		if at := tr.Root().Time; !at.After(last) {
			t.Fatalf("step %d: root at %v after %v", n, at, last)
		}
		last = tr.Root().Time
	}
	if err := e.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	now, refuse = start, nil
	mu.Unlock()
	_, tr = openTree(t, s, func(c *Config) { c.Now = func() (time.Time, error) { return start, nil } })
	if _, _, err := tr.Append(t.Context(), leafN(100)); err != nil {
		t.Fatalf("after reopening with the clock behind: %v", err)
	}
}

func TestCloseDrains(t *testing.T) {
	s := newFaultyStorage(t)
	e, tr := openTree(t, s)
	gate := make(chan struct{})
	s.set(func() { s.gate = gate })
	const n = 20
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			if _, _, err := tr.Append(t.Context(), leafN(i)); err != nil {
				t.Error(err)
			}
		})
	}
	lt := tr.(*logTree)
	waitFor(t, lt, func() bool { return len(lt.waiting) == n })
	closed := make(chan error, 1)
	go func() { closed <- e.Close(t.Context()) }()
	waitFor(t, lt, func() bool { return lt.closed })
	if _, _, err := tr.Append(t.Context(), leafN(99)); !errors.Is(err, ErrClosed) {
		t.Errorf("append while closing: %v", err)
	}
	close(gate)
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if tr.Root().Size != n || s.closes != 1 {
		t.Errorf("size %d, want %d; storage closed %d times", tr.Root().Size, n, s.closes)
	}
	for name, f := range map[string]func() error{
		"entries":  func() error { _, err := tr.Entries(t.Context(), 0, 1); return err },
		"look-up":  func() error { _, err := tr.ByLeafHash(t.Context(), Hash{}); return err },
		"identity": func() error { _, err := tr.ByIdentity(t.Context(), Hash{}); return err },
		"health":   tr.Err,
		"create":   func() error { return e.Create(t.Context(), "other") },
		"open":     func() error { _, err := e.Tree(t.Context(), "log"); return err },
	} {
		if err := f(); !errors.Is(err, ErrClosed) {
			t.Errorf("%s after closing: error %v, want ErrClosed", name, err)
		}
	}
	if err := e.Close(t.Context()); err != nil || s.closes != 1 {
		t.Errorf("second close: %v, storage closed %d times", err, s.closes)
	}
}

// TestCloseGivesUp: a storage that hangs does not hold Close beyond its
// context, and nobody waits for ever.
func TestCloseGivesUp(t *testing.T) {
	s := newFaultyStorage(t)
	e, tr := openTree(t, s)
	s.set(func() { s.gate = make(chan struct{}) })
	errs := make(chan error, 1)
	go func() { _, _, err := tr.Append(context.Background(), leafN(1)); errs <- err }()
	lt := tr.(*logTree)
	waitFor(t, lt, func() bool { return len(lt.waiting) == 1 })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := e.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if err := <-errs; err == nil {
		t.Error("append succeeded without a commit")
	}
}

// TestCloseLeavesReaders: a read that hangs in the storage, whatever its context
// says, does not hold Close, which says so.
func TestCloseLeavesReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newFaultyStorage(t)
		e, tr := openTree(t, s, func(c *Config) { c.CacheTiles = 1 })
		fill(t, tr, 0, 700)
		hold, errs := make(chan struct{}), make(chan error, 1)
		s.set(func() { s.hold = hold })
		go func() { _, err := tr.InclusionProof(context.Background(), 3, 700); errs <- err }()
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := e.Close(ctx); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "storage hangs") {
			t.Errorf("close: error %v, want that the storage hangs", err)
		}
		close(hold)
		if err := <-errs; err != nil {
			t.Errorf("the read: %v", err)
		}
		if err := e.backend.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestBackoff: a broken disk is tried at growing intervals, not in a loop.
func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newFaultyStorage(t)
		var tries []time.Duration
		start := time.Now()
		e, tr := openTree(t, s, func(c *Config) { c.MaxBackoff = time.Second })
		s.set(func() { s.beforeBatch = func() error { tries = append(tries, time.Since(start)); return errDisk } })
		if _, _, err := tr.Append(t.Context(), leafN(1)); !errors.Is(err, errDisk) {
			t.Fatalf("error %v, want the disk's", err)
		}
		time.Sleep(4 * time.Second)
		s.set(func() { s.beforeBatch = nil })
		if _, _, err := tr.Append(t.Context(), leafN(1)); err != nil {
			t.Fatal(err)
		}
		ms := time.Millisecond
		want := []time.Duration{0, 50 * ms, 150 * ms, 350 * ms, 750 * ms, 1550 * ms, 2550 * ms, 3550 * ms}
		if diff := cmp.Diff(want, tries); diff != "" {
			t.Errorf("tries (-want +got):\n%s", diff)
		}
		if err := e.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

func TestNames(t *testing.T) {
	e, tr := openTree(t, newFaultyStorage(t))
	for _, name := range []string{"", "Log", "log/1", "löw", "a b", "../x", "a\x00", strings.Repeat("a", 65)} {
		if err := e.Create(t.Context(), name); !errors.Is(err, ErrName) {
			t.Errorf("create %q: error %v, want ErrName", name, err)
		}
		if _, err := e.Tree(t.Context(), name); !errors.Is(err, ErrName) {
			t.Errorf("open %q: error %v, want ErrName", name, err)
		}
	}
	if err := e.Create(t.Context(), "log"); !errors.Is(err, ErrExists) {
		t.Errorf("create twice: error %v, want ErrExists", err)
	}
	if _, err := e.Tree(t.Context(), "absent"); !errors.Is(err, ErrNotFound) {
		t.Errorf("open an absent one: error %v, want ErrNotFound", err)
	}
	if again, err := e.Tree(t.Context(), "log"); err != nil || again != tr {
		t.Errorf("second open gives another tree or %v", err)
	}
	long := strings.Repeat("z", 64)
	if err := e.Create(t.Context(), long); err != nil {
		t.Fatal(err)
	}
	other, err := e.Tree(t.Context(), long)
	if err != nil {
		t.Fatal(err)
	}
	fill(t, other, 0, 3)
	if tr.Root().Size != 0 || other.Root().Size != 3 {
		t.Errorf("sizes %d and %d, want 0 and 3", tr.Root().Size, other.Root().Size)
	}
}

// TestReadersWhileWriting: whoever looks sees one consistent tree.
func TestReadersWhileWriting(t *testing.T) {
	const n = 3000
	_, tr := openTree(t, newFaultyStorage(t), func(c *Config) { c.CacheTiles = 2 })
	done := make(chan struct{})
	var readers sync.WaitGroup
	for r := range 4 {
		readers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(r), 7))
			last := tr.Root()
			for looking := true; looking; {
				select {
				case <-done:
					looking = false // and once more
				default:
				}
				changed, root := tr.Changed(), tr.Root()
				if root.Size < last.Size || root.Size == last.Size && root != last {
					t.Errorf("root of %d after one of %d", root.Size, last.Size)
					return
				}
				checkConsistency(t, tr, last.Size, root.Size, last.Hash, root.Hash)
				if last = root; root.Size > 0 {
					i := rng.Uint64N(root.Size)
					es, err := tr.Entries(t.Context(), i, 1)
					if err != nil {
						t.Error(err)
						return
					}
					checkInclusion(t, tr, i, root.Size, es[0].LeafHash, root.Hash)
					if raw, err := tr.Tile(t.Context(), 0, i/256, int(i%256)+1); err != nil || Hash(raw[len(raw)-HashSize:]) != es[0].LeafHash {
						t.Errorf("tile of leaf %d: %v", i, err)
						return
					}
					continue
				}
				select {
				case <-changed:
				case <-done:
				}
			}
		})
	}
	fill(t, tr, 0, n)
	close(done)
	readers.Wait()
}

// TestInterruptedCreate: a process died between the tree and its first root.
func TestInterruptedCreate(t *testing.T) {
	s := newFaultyStorage(t)
	e, _ := openTree(t, s)
	_, err := storage.CreateTree(t.Context(), e.backend.Admin, &trillian.Tree{
		TreeState: trillian.TreeState_ACTIVE, TreeType: trillian.TreeType_LOG,
		DisplayName: "half", MaxRootDuration: durationpb.New(0),
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Tree(t.Context(), "half"); !errors.Is(err, storage.ErrTreeNeedsInit) {
		t.Errorf("open: error %v, want ErrTreeNeedsInit", err)
	}
	for _, want := range []error{nil, ErrExists} {
		if err := e.Create(t.Context(), "half"); !errors.Is(err, want) {
			t.Errorf("create: error %v, want %v", err, want)
		}
	}
	tr, err := e.Tree(t.Context(), "half")
	if err != nil {
		t.Fatal(err)
	}
	fill(t, tr, 0, 2)
}

func TestTwoEngines(t *testing.T) {
	s := newFaultyStorage(t)
	openTree(t, s)
	if _, err := Open(t.Context(), Config{Dir: s.dir, Now: wallClock, Logger: quiet}); !errors.Is(err, store.ErrLocked) {
		t.Errorf("error %v, want ErrLocked", err)
	}
	if _, err := Open(t.Context(), Config{Dir: s.dir, Logger: quiet}); err == nil {
		t.Error("opened without a clock")
	}
}

// TestSeveralTrees: a storage that hangs for one tree does not delay another.
func TestSeveralTrees(t *testing.T) {
	s := newFaultyStorage(t)
	e, tr := openTree(t, s)
	if err := e.Create(t.Context(), "other"); err != nil {
		t.Fatal(err)
	}
	other, err := e.Tree(t.Context(), "other")
	if err != nil {
		t.Fatal(err)
	}
	gate := make(chan struct{})
	s.set(func() { s.gate = gate })
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, _, err := tr.Append(t.Context(), leafN(1)); err != nil {
			t.Error(err)
		}
	})
	lt := tr.(*logTree)
	waitFor(t, lt, func() bool { return len(lt.waiting) == 1 && len(lt.queue) == 0 })
	poll(t, func() bool { // the first tree's integrator is in the gate, or will be
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.held == 1
	})
	s.set(func() { s.gate = nil })
	fill(t, other, 0, 50)
	if tr.Root().Size != 0 || other.Root().Size != 50 {
		t.Errorf("sizes %d and %d, want 0 and 50", tr.Root().Size, other.Root().Size)
	}
	close(gate)
	wg.Wait()
}
