// Package queue is the line before a device whose calls cannot be cancelled.
//
// A fixed number of workers, one for each session of the device, make the
// calls: the caller may leave, the worker may not. Each hsm.Share has a line of
// its own, first in first out and of bounded length. A free worker takes the
// call whose turn it is:
//
//   - heads have every second turn;
//   - issuing, timestamps and rest take the turns between, one after the other;
//   - a turn that nobody wants goes to the next who does, so that no worker is
//     idle while a call waits.
//
// So a share is promised, whatever the other shares do: a waiting head starts
// after at most one other call has been taken, and the first call of any other
// line after at most five (one of each share and the heads between). A flood of
// one share makes another wait for no more than the calls that are running, and
// when its line is full it alone gets hsm.ErrBusy.
//
// What becomes of a call:
//
//   - Its context ends while it waits: it leaves the line, whose place is free
//     at once; nothing was run (hsm.ErrBusy).
//   - Its context ends while it runs: the caller leaves (hsm.ErrLost), and the
//     worker goes on to the end of the call.
//   - It runs longer than the deadline: the queue is wedged for good. Everybody
//     who waits, in a line or for an answer, gets ErrWedged at once, as do all
//     later callers. The hung worker is left behind; it ends if its call does.
//   - The queue is closed: who waits in a line gets ErrClosed, as do later
//     callers; who runs gets its answer. Idle workers end.
//
// All state is under Queue.mu. A call belongs to the line it waits in, then to
// the worker that runs it. Whoever takes it from there answers it, and nobody
// else does: the worker at its end, the wedge, the close, or nobody if its
// caller took it and left. A caller is woken once for each call, and a worker
// only if it was idle.
package queue

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/chancery-ca/chancery/hsm"
)

var (
	// ErrClosed is what a closed queue answers. It is an hsm.ErrLost: the
	// device is gone for the caller.
	ErrClosed = fmt.Errorf("token closed: %w", hsm.ErrLost)
	// ErrWedged is what a queue answers after a call outlived the deadline. It
	// is an hsm.ErrWedged and an hsm.ErrLost.
	ErrWedged = fmt.Errorf("%w: a call outlived its deadline: %w", hsm.ErrWedged, hsm.ErrLost)
)

// Config says how wide and how long the line is.
type Config struct {
	// Workers is how many calls run at once, at least 1.
	Workers int
	// Length is how many calls of each share may wait, beyond those that run.
	Length int
	// Deadline is how long one call may run; it is looked at eight times in a
	// deadline.
	Deadline time.Duration
	// OnWedge, if not nil, is called once if the queue wedges, by a goroutine
	// of the queue.
	OnWedge func()
}

// Queue is the line and its workers. It is safe for concurrent use.
type Queue struct {
	length   int
	deadline time.Duration
	ended    chan struct{} // closed, under mu, when err is set and nothing runs

	mu      sync.Mutex
	lines   [hsm.Shares]line
	taken   hsm.Share // the share of the last call taken
	turn    int       // the last of others that was taken
	workers []*worker
	idle    []*worker // who waits for a call; the last to come is the first to go
	running int       // workers inside a call
	err     error     // nil, ErrClosed or ErrWedged
}

// worker makes one call at a time. Its fields are under Queue.mu but hand.
type worker struct {
	hand  chan *call // holds one: the next call, given while it is idle
	call  *call      // what it runs, nil if nobody waits for the answer
	since time.Time  // when that began, zero while it is idle
}

// call is one visit to the device.
type call struct {
	run  func() error
	done chan error // holds one

	// Under Queue.mu; see the package comment.
	line       *line   // where it waits, or nil
	prev, next *call   // its neighbours there
	worker     *worker // who runs it for a caller who waits, or nil
}

// line is what waits of one share, first to last.
type line struct {
	first, last *call
	n           int
}

func (l *line) push(c *call) {
	c.line, c.prev = l, l.last
	if l.last == nil {
		l.first = c
	} else {
		l.last.next = c
	}
	l.last = c
	l.n++
}

func (l *line) remove(c *call) {
	if c.prev == nil {
		l.first = c.next
	} else {
		c.prev.next = c.next
	}
	if c.next == nil {
		l.last = c.prev
	} else {
		c.next.prev = c.prev
	}
	c.line, c.prev, c.next = nil, nil, nil
	l.n--
}

// New starts the workers and the watch over their calls. They end some time
// after Close.
func New(cfg Config) *Queue {
	q := &Queue{
		length: cfg.Length, deadline: cfg.Deadline,
		ended: make(chan struct{}), taken: hsm.ShareRest,
	}
	for range max(cfg.Workers, 1) {
		w := &worker{hand: make(chan *call, 1)}
		q.workers = append(q.workers, w)
		q.idle = append(q.idle, w)
		go q.work(w)
	}
	go q.watch(cfg.OnWedge)
	return q
}

// Do runs f on a worker and returns its error. Without f's own result it fails
// with hsm.ErrBusy (the share's line is full, or ctx ended before f began: f
// will not run), or with hsm.ErrLost (ctx ended while f ran, ErrWedged,
// ErrClosed); then f may still be running, and what f writes must not be read.
// A share that there is not counts as hsm.ShareRest.
func (q *Queue) Do(ctx context.Context, share hsm.Share, f func() error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%w: not queued (%w)", hsm.ErrBusy, context.Cause(ctx))
	}
	c := &call{run: f, done: make(chan error, 1)}
	if err := q.submit(share, c); err != nil {
		return err
	}
	select {
	case err := <-c.done:
		return err
	case <-ctx.Done():
		return q.leave(ctx, c)
	}
}

// submit gives c to an idle worker or puts it at the end of its line.
func (q *Queue) submit(share hsm.Share, c *call) error {
	if share >= hsm.Shares {
		share = hsm.ShareRest
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err != nil {
		return q.err
	}
	if n := len(q.idle); n > 0 { // so every line is empty
		w := q.idle[n-1]
		q.idle = q.idle[:n-1]
		q.running++
		q.note(share)
		w.start(c)
		w.hand <- c
		return nil
	}
	l := &q.lines[share]
	if l.n >= q.length {
		return fmt.Errorf("queue of %d for %s is full: %w", q.length, share, hsm.ErrBusy)
	}
	l.push(c)
	return nil
}

// leave takes c away from whoever has it, because its caller goes.
func (q *Queue) leave(ctx context.Context, c *call) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case c.line != nil:
		c.line.remove(c)
		return fmt.Errorf("%w while queued (%w)", hsm.ErrBusy, context.Cause(ctx))
	case c.worker != nil:
		c.worker.call = nil
		return fmt.Errorf("%w: no answer yet (%w)", hsm.ErrLost, context.Cause(ctx))
	}
	return <-c.done // somebody answers it right now
}

// work is one worker: call after call until its hand is closed.
func (q *Queue) work(w *worker) {
	for c := range w.hand {
		for c != nil {
			c = q.finish(w, c.run())
		}
	}
}

// start makes c the call of w.
func (w *worker) start(c *call) {
	c.worker, w.call = w, c
	w.since = time.Now()
}

// finish answers w's call with err and returns its next one, nil if it is idle.
func (q *Queue) finish(w *worker, err error) *call {
	q.mu.Lock()
	over := w.call
	if over != nil {
		w.call, over.worker = nil, nil
	}
	next := q.next()
	if next != nil {
		w.start(next)
	} else {
		w.since = time.Time{}
		q.running--
		q.rest(w)
	}
	q.mu.Unlock()
	if over != nil {
		over.done <- err
	}
	return next
}

// rest makes w wait for a call, or end. The caller holds mu.
func (q *Queue) rest(w *worker) {
	if q.err == nil {
		q.idle = append(q.idle, w)
		return
	}
	close(w.hand)
	if q.running == 0 {
		close(q.ended)
	}
}

// others are the shares that take the turns between the heads', in turn.
var others = [...]hsm.Share{hsm.ShareIssuing, hsm.ShareTimestamps, hsm.ShareRest}

// next takes the call whose turn it is out of its line, nil if none waits. The
// caller holds mu.
func (q *Queue) next() *call {
	if q.taken != hsm.ShareHeads {
		if c := q.take(hsm.ShareHeads); c != nil {
			return c
		}
	}
	for i := range others {
		if c := q.take(others[(q.turn+1+i)%len(others)]); c != nil {
			return c
		}
	}
	return q.take(hsm.ShareHeads)
}

// take takes the first call of a share's line, nil if it is empty. The caller
// holds mu.
func (q *Queue) take(share hsm.Share) *call {
	l := &q.lines[share]
	c := l.first
	if c != nil {
		l.remove(c)
		q.note(share)
	}
	return c
}

// note remembers whose turn it was. The caller holds mu.
func (q *Queue) note(share hsm.Share) {
	q.taken = share
	for i, other := range others {
		if other == share {
			q.turn = i
		}
	}
}

// watch wedges the queue when a call outlives the deadline.
func (q *Queue) watch(onWedge func()) {
	tick := time.NewTicker(max(q.deadline/8, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-q.ended:
			return
		case now := <-tick.C:
			if !q.wedge(now) {
				continue
			}
			if onWedge != nil {
				onWedge()
			}
			return
		}
	}
}

// wedge ends the queue if a call that runs has outlived the deadline, and says
// whether one has.
func (q *Queue) wedge(now time.Time) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.oldest(now) <= q.deadline {
		return false
	}
	q.end(ErrWedged)
	return true
}

// Oldest returns how long the longest running call has run, 0 if none runs.
func (q *Queue) Oldest(now time.Time) time.Duration {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.oldest(now)
}

// oldest is Oldest. The caller holds mu.
func (q *Queue) oldest(now time.Time) time.Duration {
	var oldest time.Duration
	for _, w := range q.workers {
		if !w.since.IsZero() {
			oldest = max(oldest, now.Sub(w.since))
		}
	}
	return oldest
}

// Err says why the queue takes no calls: ErrWedged, ErrClosed, or nil if it
// does. A queue that is both is wedged.
func (q *Queue) Err() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.err
}

// Close refuses further calls. It does not wait for running ones. Closing
// twice is harmless.
func (q *Queue) Close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.end(ErrClosed)
}

// end makes reason the end of the queue and answers those to whom it applies.
// The caller holds mu.
func (q *Queue) end(reason error) {
	if q.err == ErrWedged || q.err == reason { //nolint:errorlint // both are ours, never wrapped
		return
	}
	first := q.err == nil
	q.err = reason
	for c := q.next(); c != nil; c = q.next() {
		c.done <- reason
	}
	if reason == ErrWedged { //nolint:errorlint // as above
		for _, w := range q.workers {
			if c := w.call; c != nil {
				w.call, c.worker = nil, nil
				c.done <- reason
			}
		}
	}
	for _, w := range q.idle {
		close(w.hand)
	}
	q.idle = nil
	if first && q.running == 0 {
		close(q.ended)
	}
}
