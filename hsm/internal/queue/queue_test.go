package queue

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-cmp/cmp"
)

// Each test runs in a bubble of testing/synctest: synctest.Wait returns when
// every goroutine waits for another one, so nothing here depends on time, and a
// goroutine that is left over at the end fails the test.

// device is a queue and what its calls did. A call of it runs until the test
// lets it end.
type device struct {
	*testing.T
	q     *Queue
	began []string // the names of the calls, as they began
	mu    sync.Mutex
	end   map[string]chan error
}

// errDevice is what a call of the device may return.
var errDevice = errors.New("device error")

const deadline = 8 * time.Second

// bubble runs test with a fresh queue and closes it.
func bubble(t *testing.T, workers, length int, test func(*testing.T, *device)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		d := &device{T: t, end: map[string]chan error{}}
		d.q = New(Config{Workers: workers, Length: length, Deadline: deadline, OnWedge: func() { d.note("wedged") }})
		defer d.q.Close()
		test(t, d)
	})
}

func (d *device) note(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.began = append(d.began, name)
}

// ask calls Do in the background with a call of this name, sees it wait or run,
// and returns where its error will be.
func (d *device) ask(ctx context.Context, share hsm.Share, name string) <-chan error {
	d.Helper()
	end := make(chan error, 1)
	d.mu.Lock()
	d.end[name] = end
	d.mu.Unlock()
	answer := make(chan error, 1)
	go func() {
		answer <- d.q.Do(ctx, share, func() error {
			d.note(name)
			return <-end
		})
	}()
	synctest.Wait()
	return answer
}

// finish ends the running call of this name with err and waits for what follows.
func (d *device) finish(name string, err error) {
	d.end[name] <- err
	synctest.Wait()
}

// take returns the names of the calls that began since the last take.
func (d *device) take() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	began := d.began
	d.began = nil
	return began
}

// wants fails the test unless the calls that began since the last take are
// these, in this order.
func (d *device) wants(what string, names ...string) {
	d.Helper()
	if diff := cmp.Diff(names, d.take()); diff != "" {
		d.Errorf("%s: calls began (-want +got):\n%s", what, diff)
	}
}

// answered fails the test unless the answer is there and is want.
func (d *device) answered(what string, answer <-chan error, want error) {
	d.Helper()
	select {
	case err := <-answer:
		if !errors.Is(err, want) {
			d.Errorf("%s: %v, want %v", what, err, want)
		}
	default:
		d.Errorf("%s: no answer, want %v", what, want)
	}
}

// drain lets every call end, now and later.
func (d *device) drain() {
	for {
		names := d.take()
		if len(names) == 0 {
			return
		}
		for _, name := range names {
			d.finish(name, nil)
		}
	}
}

var allShares = []hsm.Share{hsm.ShareHeads, hsm.ShareIssuing, hsm.ShareTimestamps, hsm.ShareRest}

// flood asks n times for share; the calls are called prefix and a, b, …
func (d *device) flood(share hsm.Share, prefix string, n int) {
	for i := range n {
		d.ask(d.Context(), share, prefix+string(rune('a'+i)))
	}
}

func TestResult(t *testing.T) {
	bubble(t, 1, 1, func(t *testing.T, d *device) {
		for _, want := range []error{nil, errDevice} {
			answer := d.ask(t.Context(), hsm.ShareHeads, "call")
			d.wants("an idle worker", "call")
			d.finish("call", want)
			d.answered("call", answer, want)
		}
		if err := d.q.Err(); err != nil {
			t.Errorf("Err = %v", err)
		}
	})
}

// TestFlood: while one share floods the device, the call of another waits only
// for the call that runs, again and again.
func TestFlood(t *testing.T) {
	for _, flooding := range allShares {
		for _, other := range allShares {
			if other == flooding {
				continue
			}
			t.Run(flooding.String()+" floods "+other.String(), func(t *testing.T) {
				for _, workers := range []int{1, 3} {
					bubble(t, workers, 20, func(t *testing.T, d *device) {
						d.flood(flooding, "", workers+15)
						running := d.take()
						if len(running) != workers {
							t.Fatalf("%d calls run, want %d", len(running), workers)
						}
						for range 4 {
							answer := d.ask(t.Context(), other, "lone")
							d.finish(running[0], nil)
							d.wants("the next free worker", "lone")
							d.finish("lone", nil)
							d.answered("lone", answer, nil)
							running = append(running[1:], d.take()...)
							if len(running) != workers {
								t.Fatalf("then %d calls run, want %d", len(running), workers)
							}
						}
						for _, name := range running {
							d.finish(name, nil)
						}
						d.drain()
					})
				}
			})
		}
	}
}

// TestHeadsUnderSaturation: whatever waits, a head is taken after at most one
// other call, also if the last call was a head.
func TestHeadsUnderSaturation(t *testing.T) {
	bubble(t, 1, 30, func(t *testing.T, d *device) {
		d.flood(hsm.ShareIssuing, "issuing ", 20)
		d.flood(hsm.ShareTimestamps, "timestamps ", 20)
		d.flood(hsm.ShareRest, "rest ", 20)
		running := d.take()[0]
		for i := range 10 {
			answer := d.ask(t.Context(), hsm.ShareHeads, "head")
			others := 0
			for name := running; name != "head"; others++ {
				d.finish(name, nil)
				name = d.take()[0]
			}
			if others > 2 {
				t.Errorf("head %d waited for %d others, want at most 2", i, others)
			}
			d.finish("head", nil)
			d.answered("head", answer, nil)
			running = d.take()[0]
		}
		d.finish(running, nil)
		d.drain()
	})
}

// TestTurns: when everybody waits the order is fixed, and first in, first out
// within a share.
func TestTurns(t *testing.T) {
	bubble(t, 1, 6, func(t *testing.T, d *device) {
		d.ask(t.Context(), hsm.ShareRest, "first")
		d.flood(hsm.ShareRest, "r", 3)
		d.flood(hsm.ShareTimestamps, "t", 3)
		d.flood(hsm.ShareIssuing, "i", 3)
		d.flood(hsm.ShareHeads, "h", 5)
		want := []string{"first", "ha", "ia", "hb", "ta", "hc", "ra", "hd", "ib", "he", "tb", "rb", "ic", "tc", "rc"}
		for _, name := range want {
			d.wants("turn", name)
			d.finish(name, nil)
		}
		d.wants("after the last")
	})
}

// TestFull: a full line refuses its own share and no other, and its place is
// free again when a call begins.
func TestFull(t *testing.T) {
	for _, full := range allShares {
		t.Run(full.String(), func(t *testing.T) {
			bubble(t, 1, 2, func(t *testing.T, d *device) {
				d.flood(full, "", 3)
				answer := d.ask(t.Context(), full, "refused")
				select {
				case err := <-answer:
					if !errors.Is(err, hsm.ErrBusy) || !strings.Contains(err.Error(), "queue of 2 for "+full.String()+" is full") {
						t.Errorf("full: %v", err)
					}
				default:
					t.Error("full: no answer")
				}
				var others []<-chan error
				for _, other := range allShares {
					if other != full {
						others = append(others, d.ask(t.Context(), other, other.String()+" 1"), d.ask(t.Context(), other, other.String()+" 2"))
					}
				}
				d.wants("one worker", "a")
				for d.q.lines[full].n == 2 {
					d.finish(append(d.take(), "a")[0], nil)
				}
				again := d.ask(t.Context(), full, "again")
				if len(again) != 0 {
					t.Errorf("after a call began: %v", <-again)
				}
				d.drain()
				for i, other := range others {
					d.answered("other "+string(rune('0'+i)), other, nil)
				}
				d.answered("again", again, nil)
			})
		})
	}
}

// TestNoLine: without a line only an idle worker takes a call.
func TestNoLine(t *testing.T) {
	bubble(t, 1, 0, func(t *testing.T, d *device) {
		first := d.ask(t.Context(), hsm.ShareRest, "first")
		d.answered("second", d.ask(t.Context(), hsm.ShareHeads, "second"), hsm.ErrBusy)
		d.finish("first", nil)
		d.answered("first", first, nil)
	})
}

// TestUnknownShare: a share that there is not is the rest.
func TestUnknownShare(t *testing.T) {
	bubble(t, 1, 1, func(t *testing.T, d *device) {
		d.ask(t.Context(), hsm.ShareRest, "running")
		d.ask(t.Context(), hsm.Shares, "waiting")
		d.answered("third", d.ask(t.Context(), hsm.ShareRest, "third"), hsm.ErrBusy)
		d.drain()
	})
}

// TestWorkConserving: no worker is idle while a call waits, of whatever shares
// the calls are.
func TestWorkConserving(t *testing.T) {
	for _, shares := range [][]hsm.Share{{hsm.ShareRest}, {hsm.ShareHeads}, {hsm.ShareHeads, hsm.ShareTimestamps}, allShares} {
		bubble(t, 3, 20, func(t *testing.T, d *device) {
			const calls = 20
			for i := range calls {
				d.ask(t.Context(), shares[i%len(shares)], string(rune('a'+i)))
			}
			running := d.take()
			for left := calls; left > 0; left-- {
				if want := min(3, left); len(running) != want {
					t.Fatalf("%v: %d calls run with %d left, want %d", shares, len(running), left, want)
				}
				d.finish(running[0], nil)
				running = append(running[1:], d.take()...)
			}
		})
	}
}

// TestCancel: a caller may leave before, in the line and during the call.
func TestCancel(t *testing.T) {
	cause := errors.New("the client left")
	bubble(t, 1, 2, func(t *testing.T, d *device) {
		ctx := func() (context.Context, func()) {
			ctx, cancel := context.WithCancelCause(t.Context())
			return ctx, func() { cancel(cause); synctest.Wait() }
		}
		ended, leave := ctx()
		leave()
		answer := d.ask(ended, hsm.ShareHeads, "ended")
		if err := <-answer; !errors.Is(err, hsm.ErrBusy) || !errors.Is(err, cause) {
			t.Errorf("ended before: %v", err)
		}
		runs, leaveRunning := ctx()
		waits, leaveLine := ctx()
		running := d.ask(runs, hsm.ShareRest, "running")
		first := d.ask(t.Context(), hsm.ShareRest, "first")
		second := d.ask(waits, hsm.ShareRest, "second")
		d.answered("third", d.ask(t.Context(), hsm.ShareRest, "third"), hsm.ErrBusy)
		leaveLine()
		if err := <-second; !errors.Is(err, hsm.ErrBusy) || !errors.Is(err, cause) {
			t.Errorf("left the line: %v", err)
		}
		fourth := d.ask(t.Context(), hsm.ShareRest, "fourth") // the place of the second
		leaveRunning()
		if err := <-running; !errors.Is(err, hsm.ErrLost) || !errors.Is(err, cause) {
			t.Errorf("left a running call: %v", err)
		}
		d.wants("the worker stays", "running")
		d.finish("running", nil)
		d.wants("then", "first")
		d.finish("first", nil)
		d.wants("then", "fourth")
		d.finish("fourth", errDevice)
		d.answered("first", first, nil)
		d.answered("fourth", fourth, errDevice)
	})
}

// TestCancelAnywhere: a call may leave from the front, the middle and the end
// of a line without disturbing its order.
func TestCancelAnywhere(t *testing.T) {
	for _, gone := range []int{0, 1, 2} {
		bubble(t, 1, 3, func(t *testing.T, d *device) {
			d.ask(t.Context(), hsm.ShareHeads, "running")
			var cancels []context.CancelFunc
			want := []string{"running"}
			for i := range 3 {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				name := string(rune('a' + i))
				d.ask(ctx, hsm.ShareHeads, name)
				cancels = append(cancels, cancel)
				if i != gone {
					want = append(want, name)
				}
			}
			cancels[gone]()
			synctest.Wait()
			d.ask(t.Context(), hsm.ShareHeads, "late")
			for _, name := range append(want, "late") {
				d.wants("order", name)
				d.finish(name, nil)
			}
		})
	}
}

// TestWedge: one call that outlives the deadline ends every wait, and nothing
// begins any more.
func TestWedge(t *testing.T) {
	bubble(t, 2, 2, func(t *testing.T, d *device) {
		hung := d.ask(t.Context(), hsm.ShareRest, "hung")
		time.Sleep(deadline / 2) // of the bubble
		other := d.ask(t.Context(), hsm.ShareHeads, "other")
		waiting := d.ask(t.Context(), hsm.ShareTimestamps, "waiting")
		d.wants("before", "hung", "other")
		if got := d.q.Oldest(time.Now()); got != deadline/2 {
			t.Errorf("oldest call is of %s, want %s", got, deadline/2)
		}
		time.Sleep(deadline)
		synctest.Wait()
		d.wants("the deadline passed", "wedged")
		for what, answer := range map[string]<-chan error{"hung": hung, "other": other, "waiting": waiting} {
			d.answered(what, answer, ErrWedged)
		}
		if err := d.q.Do(t.Context(), hsm.ShareHeads, func() error { return nil }); !errors.Is(err, hsm.ErrWedged) || !errors.Is(err, hsm.ErrLost) {
			t.Errorf("later: %v, want ErrWedged and ErrLost", err)
		}
		d.q.Close()
		if err := d.q.Err(); !errors.Is(err, hsm.ErrWedged) {
			t.Errorf("Err of a wedged and closed queue = %v, want ErrWedged", err)
		}
		d.finish("other", nil) // the workers end with their calls
		d.finish("hung", nil)
		if got := d.q.Oldest(time.Now()); got != 0 {
			t.Errorf("oldest call is of %s after all have ended", got)
		}
		d.wants("after the wedge")
	})
}

// TestWedgeAfterLeaving: the watch looks at calls whose callers have left, and
// at a closed queue.
func TestWedgeAfterLeaving(t *testing.T) {
	bubble(t, 1, 2, func(t *testing.T, d *device) {
		ctx, cancel := context.WithCancel(t.Context())
		left := d.ask(ctx, hsm.ShareRest, "hung")
		cancel()
		synctest.Wait()
		d.answered("left", left, hsm.ErrLost)
		d.q.Close()
		time.Sleep(2 * deadline)
		synctest.Wait()
		d.wants("the deadline passed", "hung", "wedged")
		d.finish("hung", nil)
	})
}

// TestClose: the line is sent away, the running call gets its answer.
func TestClose(t *testing.T) {
	bubble(t, 1, 2, func(t *testing.T, d *device) {
		running := d.ask(t.Context(), hsm.ShareRest, "running")
		waiting := d.ask(t.Context(), hsm.ShareHeads, "waiting")
		for range 2 {
			d.q.Close()
		}
		synctest.Wait()
		d.answered("waiting", waiting, ErrClosed)
		if len(running) != 0 {
			t.Errorf("the running call was answered by Close: %v", <-running)
		}
		d.answered("later", d.ask(t.Context(), hsm.ShareHeads, "later"), hsm.ErrLost)
		if err := d.q.Err(); !errors.Is(err, ErrClosed) || errors.Is(err, hsm.ErrWedged) {
			t.Errorf("Err = %v, want ErrClosed", err)
		}
		d.finish("running", errDevice)
		d.answered("running", running, errDevice)
		d.wants("all", "running")
	})
}

// TestChaos: many callers of all shares come, leave and are refused. Each
// answer is one of those promised, and a nil answer means that the call ran for
// this caller to its end. Never do more run than there are workers.
func TestChaos(t *testing.T) {
	const workers, callers, calls = 3, 32, 200
	q := New(Config{Workers: workers, Length: 4, Deadline: time.Minute})
	var running, ran, done atomic.Int64
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			for range calls {
				ctx, cancel := context.WithCancel(t.Context())
				mine := 0
				leave := rand.N(3) == 0
				err := q.Do(ctx, allShares[i%len(allShares)], func() error {
					if running.Add(1) > workers {
						t.Error("more calls than workers")
					}
					if leave {
						cancel()
					} else {
						mine++
					}
					ran.Add(1)
					running.Add(-1)
					return nil
				})
				cancel()
				switch {
				case err == nil && !leave && mine != 1:
					t.Errorf("answered, ran %d times", mine)
				case err == nil:
					done.Add(1)
				case !errors.Is(err, hsm.ErrBusy) && !errors.Is(err, hsm.ErrLost):
					t.Error(err)
				case errors.Is(err, hsm.ErrLost) && !leave:
					t.Errorf("a caller that stayed: %v", err)
				}
			}
		})
	}
	wg.Wait()
	q.Close()
	if done.Load() == 0 || ran.Load() < done.Load() {
		t.Errorf("%d ran, %d answered", ran.Load(), done.Load())
	}
}
