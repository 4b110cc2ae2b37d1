package tree

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/trillian"
)

// state is what readers see, replaced as a whole after each batch.
type state struct {
	root Root
	edge *edge
	// changed is closed when the state is replaced.
	changed chan struct{}
}

// logTree implements Tree.
type logTree struct {
	cfg     Config
	log     *slog.Logger
	backend Backend
	meta    *trillian.Tree
	clock   *rootClock
	cache   *tileCache
	ctx     context.Context // of integration
	state   atomic.Pointer[state]
	kick    chan struct{} // capacity 1: there is something to do
	stopped chan struct{} // closed when the integrator has returned
	readers sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	err     error             // the last batch's, nil after one that succeeded
	bytes   int               // of the leaves in waiting
	waiting map[Hash]*pending // accepted and not durable, by identity
	queue   []*pending        // those of waiting that the storage has not got

	// stored are those of waiting that are in the storage's queue. Only the
	// integrator uses it.
	stored map[Hash]*pending
	// doubt is a batch whose commit failed in a way that left unknown whether
	// it is durable. Only the integrator uses it.
	doubt *batch
}

// pending is an accepted leaf.
type pending struct {
	id, hash Hash
	leaf     Leaf
	// result is that of the attempt to come; tree.mu.
	result *result
}

// result is what the callers that wait for one attempt are told.
type result struct {
	done    chan struct{} // closed when the rest is set
	entry   Entry
	existed bool
	err     error
}

func newResult() *result { return &result{done: make(chan struct{})} }

func (e *Engine) open(ctx context.Context, meta *trillian.Tree, root Root) (*logTree, error) {
	t := &logTree{
		cfg:     e.cfg,
		log:     e.cfg.Logger.With("log", meta.DisplayName),
		backend: e.backend,
		meta:    meta,
		clock:   &rootClock{now: e.cfg.Now, last: root.Time},
		cache:   newTileCache(e.cfg.CacheTiles),
		ctx:     e.ctx,
		kick:    make(chan struct{}, 1),
		stopped: make(chan struct{}),
		waiting: make(map[Hash]*pending),
		stored:  make(map[Hash]*pending),
	}
	edge, err := t.loadEdge(ctx, root.Size)
	if err != nil {
		return nil, err
	}
	if edge.root() != root.Hash {
		return nil, fmt.Errorf("tiles of size %d do not give the root: %w", root.Size, ErrCorrupt)
	}
	t.state.Store(&state{root: root, edge: edge, changed: make(chan struct{})})
	go t.integrate()
	return t, nil
}

// Root implements Tree.
func (t *logTree) Root() Root { return t.state.Load().root }

// Changed implements Tree.
func (t *logTree) Changed() <-chan struct{} { return t.state.Load().changed }

// Err implements Tree.
func (t *logTree) Err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return ErrClosed
	}
	return t.err
}

// Append implements Tree.
func (t *logTree) Append(ctx context.Context, leaf Leaf) (Entry, bool, error) {
	if err := ctx.Err(); err != nil {
		return Entry{}, false, err
	}
	p := &pending{id: leaf.Identity, hash: LeafHash(leaf.Value), result: newResult()}
	if p.id == (Hash{}) {
		p.id = p.hash
	}
	// The caller may give up and use its buffers again while we still need them.
	p.leaf = Leaf{Value: bytes.Clone(leaf.Value), Extra: bytes.Clone(leaf.Extra), Identity: p.id}
	r, joined, err := t.admit(p)
	if err != nil {
		return Entry{}, false, fmt.Errorf("append to %s: %w", t.meta.DisplayName, err)
	}
	select {
	case <-r.done:
	case <-ctx.Done():
		return Entry{}, false, ctx.Err()
	}
	if r.err != nil {
		return Entry{}, false, fmt.Errorf("append to %s: %w", t.meta.DisplayName, r.err)
	}
	entry := r.entry
	entry.Value, entry.Extra = bytes.Clone(entry.Value), bytes.Clone(entry.Extra)
	return entry, r.existed || joined, nil
}

// admit accepts p, or joins it to the waiting leaf with its identity.
func (t *logTree) admit(p *pending) (r *result, joined bool, err error) {
	size := len(p.leaf.Value) + len(p.leaf.Extra)
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.closed:
		return nil, false, ErrClosed
	case errors.Is(t.err, ErrCorrupt):
		return nil, false, t.err
	case len(p.leaf.Value) == 0 || size > t.cfg.MaxQueueBytes:
		return nil, false, fmt.Errorf("leaf of %d octets: %w", len(p.leaf.Value), ErrLeaf)
	}
	if same := t.waiting[p.id]; same != nil {
		return same.result, true, nil
	}
	if len(t.waiting) >= t.cfg.MaxQueue || t.bytes+size > t.cfg.MaxQueueBytes {
		return nil, false, ErrBusy
	}
	t.waiting[p.id] = p
	t.bytes += size
	t.queue = append(t.queue, p)
	t.wake()
	return p.result, false, nil
}

// wake tells the integrator that there is something to do.
func (t *logTree) wake() {
	select {
	case t.kick <- struct{}{}:
	default:
	}
}

// finish takes p out of waiting and tells its callers, once.
func (t *logTree) finish(p *pending, entry Entry, existed bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.waiting[p.id] != p {
		return
	}
	delete(t.waiting, p.id)
	t.bytes -= len(p.leaf.Value) + len(p.leaf.Extra)
	p.result.entry, p.result.existed, p.result.err = entry, existed, err
	close(p.result.done)
}

// disappoint tells the callers of p that an attempt failed; p stays.
func (t *logTree) disappoint(p *pending, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p.result.err = err
	close(p.result.done)
	p.result = newResult()
}

func (t *logTree) setErr(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.err = err
}

// drain stops admission; the integrator finishes what was accepted.
func (t *logTree) drain() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	t.wake()
}

// enter counts a reader, which Close waits for before it closes the storage.
func (t *logTree) enter() (done func(), err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, ErrClosed
	}
	t.readers.Add(1)
	return t.readers.Done, nil
}

// unread returns a channel that is closed when nobody reads any more. No reader
// enters after drain.
func (t *logTree) unread() <-chan struct{} {
	done := make(chan struct{})
	go func() {
		t.readers.Wait()
		close(done)
	}()
	return done
}

const firstBackoff = 50 * time.Millisecond

// integrate is the tree's one writer: it takes what has gathered, makes it
// durable, and looks again. While it commits, the next batch gathers.
func (t *logTree) integrate() {
	defer close(t.stopped)
	backoff, failing := firstBackoff, false
	for {
		work, closing := t.take()
		idle := len(work) == 0 && len(t.stored) == 0
		switch {
		case idle && closing:
			return
		case idle && !failing:
			<-t.kick
			continue
		}
		// Without a leaf to try with, ask the storage: a log that says that it
		// is not ready may get none.
		try := t.probe
		if !idle {
			try = func() error { return t.step(work) }
		}
		err := try()
		failing = err != nil
		if err == nil {
			backoff = firstBackoff
			t.setErr(nil)
			continue
		}
		t.log.Error("batch not integrated", "leaves", len(work)+len(t.stored), "error", err)
		t.setErr(err)
		if !t.pause(backoff, errors.Is(err, ErrCorrupt)) {
			t.abandon(ErrClosed)
			return
		}
		backoff = min(2*backoff, t.cfg.MaxBackoff)
	}
}

// probe asks the storage whether it works.
func (t *logTree) probe() error {
	if err := t.backend.Log.CheckDatabaseAccessible(t.ctx); err != nil {
		return fmt.Errorf("probe: %w: %w", err, ErrStorage)
	}
	return nil
}

// take removes the next batch from the queue.
func (t *logTree) take() (work []*pending, closing bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := min(len(t.queue), max(0, t.cfg.MaxBatch-len(t.stored)))
	work = t.queue[:n:n]
	if t.queue = t.queue[n:]; len(t.queue) == 0 {
		t.queue = nil
	}
	return work, t.closed
}

// pause waits after a failure and reports whether to go on; a damaged tree
// does not.
func (t *logTree) pause(d time.Duration, forever bool) bool {
	if forever {
		t.abandon(ErrCorrupt)
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		t.mu.Lock()
		closed := t.closed
		t.mu.Unlock()
		if closed {
			return false
		}
		expired := timer.C
		if forever {
			expired = nil
		}
		select {
		case <-expired:
			return true
		case <-t.kick:
		}
	}
}

// abandon fails every waiting leaf.
func (t *logTree) abandon(err error) {
	t.mu.Lock()
	all := make([]*pending, 0, len(t.waiting))
	for _, p := range t.waiting {
		all = append(all, p)
	}
	t.queue = nil
	t.mu.Unlock()
	for _, p := range all {
		t.finish(p, Entry{}, false, err)
	}
}
