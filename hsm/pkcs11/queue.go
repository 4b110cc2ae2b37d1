package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/chancery-ca/chancery/hsm"
)

// errClosed is what a closed token answers. It is an ErrLost: the device is
// gone for the caller.
var errClosed = fmt.Errorf("token closed: %w", hsm.ErrLost)

// errWedged is what a token answers after a C call outlived the deadline.
var errWedged = fmt.Errorf("%w: a call outlived its deadline: %w", hsm.ErrWedged, hsm.ErrLost)

// The states of a call. Whoever moves it out of queued owns it: the worker
// that runs it, or the caller that gives up.
const (
	queued int32 = iota
	running
	abandoned
)

// call is one visit to the token.
type call struct {
	run   func() error
	state atomic.Int32
	done  chan error // holds one
}

// queue is the bounded line before a token. A fixed number of workers, one for
// each session, make the C calls, because a C call cannot be cancelled: the
// caller may leave, the worker may not. When a call outlives the deadline the
// queue is wedged for good: waiting and new callers get ErrLost, and the hung
// worker is left behind.
type queue struct {
	calls    chan *call
	deadline time.Duration
	started  []atomic.Int64 // for each worker, when its call began (Unix ns), 0 if idle
	wedged   chan struct{}  // closed by the watch alone, at most once
	stop     chan struct{}  // closed by close alone
	stopped  atomic.Bool
}

// newQueue starts the workers and the watch over them. onWedge is called once
// if the queue wedges.
func newQueue(workers, length int, deadline time.Duration, onWedge func()) *queue {
	q := &queue{
		calls:    make(chan *call, length),
		deadline: deadline,
		started:  make([]atomic.Int64, workers),
		wedged:   make(chan struct{}),
		stop:     make(chan struct{}),
	}
	for i := range q.started {
		go q.work(&q.started[i])
	}
	go q.watch(onWedge)
	return q
}

// do runs f on a worker. It fails with ErrBusy when the queue is full or ctx
// ends before f began, and with ErrLost when ctx ends after that or the token
// is wedged or closed. Unless do returns f's own result, f may still be running
// and what f writes must not be read.
func (q *queue) do(ctx context.Context, f func() error) error {
	if q.stopped.Load() {
		return errClosed
	}
	if q.isWedged() {
		return errWedged
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%w: not queued (%w)", hsm.ErrBusy, context.Cause(ctx))
	}
	c := &call{run: f, done: make(chan error, 1)}
	select {
	case q.calls <- c:
	default:
		return fmt.Errorf("queue of %d is full: %w", cap(q.calls), hsm.ErrBusy)
	}
	for stop := q.stop; ; {
		select {
		case err := <-c.done:
			return err
		case <-ctx.Done():
			if c.state.CompareAndSwap(queued, abandoned) {
				return fmt.Errorf("%w while queued (%w)", hsm.ErrBusy, context.Cause(ctx))
			}
			return fmt.Errorf("%w: no answer yet (%w)", hsm.ErrLost, context.Cause(ctx))
		case <-q.wedged:
			c.state.CompareAndSwap(queued, abandoned)
			return errWedged
		case <-stop:
			if c.state.CompareAndSwap(queued, abandoned) {
				return errClosed
			}
			stop = nil // it runs: its answer, ctx or the watch ends the wait
		}
	}
}

// work is one worker: one call at a time until the queue is closed.
func (q *queue) work(started *atomic.Int64) {
	for {
		select {
		case <-q.stop:
			return
		case c := <-q.calls:
			if !c.state.CompareAndSwap(queued, running) {
				continue
			}
			if q.isWedged() {
				c.done <- errWedged
				continue
			}
			started.Store(time.Now().UnixNano())
			err := c.run()
			started.Store(0)
			c.done <- err
		}
	}
}

// watch wedges the queue when a call outlives the deadline. It leaves when the
// queue is closed and nothing runs.
func (q *queue) watch(onWedge func()) {
	tick := time.NewTicker(max(q.deadline/8, time.Millisecond))
	defer tick.Stop()
	for now := range tick.C {
		oldest := q.oldest(now)
		if oldest > q.deadline {
			close(q.wedged)
			onWedge()
			return
		}
		if oldest == 0 && q.stopped.Load() {
			return
		}
	}
}

// oldest returns how long the longest running call has run.
func (q *queue) oldest(now time.Time) time.Duration {
	var oldest time.Duration
	for i := range q.started {
		if start := q.started[i].Load(); start != 0 {
			oldest = max(oldest, time.Duration(now.UnixNano()-start))
		}
	}
	return oldest
}

func (q *queue) isWedged() bool {
	select {
	case <-q.wedged:
		return true
	default:
		return false
	}
}

// close refuses further calls; the queued ones get ErrLost. It does not wait
// for running calls. Closing twice is harmless.
func (q *queue) close() {
	if q.stopped.CompareAndSwap(false, true) {
		close(q.stop)
	}
}

// temporary says whether err is worth one more try after a recovery.
func temporary(err error) bool {
	var code *codeError
	return errors.As(err, &code) && errors.Is(err, hsm.ErrLost)
}
