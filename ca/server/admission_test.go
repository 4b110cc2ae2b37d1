package server

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/chancery-ca/chancery/ca"
	"github.com/chancery-ca/chancery/ca/identity"
)

// token is a device that makes so many certificates at once, each in so long.
type token struct {
	a        *admission
	sessions int
	each     time.Duration

	line []time.Time // when who waits arrived
	busy []time.Time // when each session is free, zero if it is
	made []time.Time // when who is being served arrived
}

// run offers a request every interval for a while and returns how many were
// issued and refused, the longest time to an answer, and how many were in work
// at most.
func (d *token) run(interval, during time.Duration) (issued, refused int, longest time.Duration, most int) {
	end := time.Now().Add(during)
	for next := time.Now(); time.Now().Before(end); time.Sleep(time.Millisecond) {
		now := time.Now()
		for i, free := range d.busy {
			if !free.IsZero() && !free.After(now) {
				d.a.leave(d.made[i])
				issued++
				d.busy[i] = time.Time{}
			}
		}
		for ; !next.After(now); next = next.Add(interval) {
			if err := d.a.enter(); err != nil {
				refused++
				continue
			}
			d.line = append(d.line, now)
		}
		most = max(most, d.a.inWork)
		for i, free := range d.busy {
			if free.IsZero() && len(d.line) > 0 {
				d.busy[i], d.made[i] = now.Add(d.each), d.line[0]
				longest = max(longest, d.busy[i].Sub(d.line[0]))
				d.line = d.line[1:]
			}
		}
	}
	return issued, refused, longest, most
}

// TestAdmission: tokens of every pace, offered a tenth, all and four times of
// what they can do. Nothing that was let in waits much longer than promised,
// the token has always work, and a token that keeps up refuses nothing.
func TestAdmission(t *testing.T) {
	const wait = 2 * time.Second
	for _, test := range []struct {
		name     string
		sessions int
		each     time.Duration
	}{
		{"fast", 4, 4 * time.Millisecond},
		{"16 at a time, 15 ms", 16, 15 * time.Millisecond},
		{"a TPM", 1, 45 * time.Millisecond},
		{"a YubiHSM", 1, 210 * time.Millisecond},
	} {
		capacity := test.each / time.Duration(test.sessions) // from one certificate to the next
		for load, interval := range map[string]time.Duration{"a tenth": 10 * capacity, "full": capacity * 100 / 95, "four times": capacity / 4} {
			t.Run(test.name+", "+load, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					d := &token{a: newAdmission(wait), sessions: test.sessions, each: test.each, busy: make([]time.Time, test.sessions), made: make([]time.Time, test.sessions)}
					d.run(interval, 30*time.Second) // the pace is learnt
					issued, refused, longest, most := d.run(interval, 30*time.Second)
					possible := int(30 * time.Second / max(capacity, interval))
					if issued < possible*9/10 {
						t.Errorf("%d certificates, %d were possible", issued, possible)
					}
					if interval > capacity && refused > 0 {
						t.Errorf("%d refused by a token that keeps up", refused)
					}
					if enough := min(mostInWork, int(wait/capacity)) / 2; interval < capacity && most < enough {
						t.Errorf("%d in work at most, %d could be", most, 2*enough)
					}
					if interval < capacity && refused < 2*possible {
						t.Errorf("%d refused at four times the capacity", refused)
					}
					if limit := max(wait, (fewInWork+1)*test.each) * 3 / 2; longest > limit {
						t.Errorf("a request waited %s, want at most %s", longest, limit)
					}
					if most > mostInWork {
						t.Errorf("%d in work", most)
					}
				})
			})
		}
	}
}

// TestAdmissionOfStrangers: requests that come to nothing, however many, do not
// make the token look slow when hardly anybody asks for a certificate.
func TestAdmissionOfStrangers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAdmission(2 * time.Second)
		var all sync.WaitGroup
		end := time.Now().Add(time.Minute)
		for range 4 * fewInWork { // there are always as many in work
			all.Go(func() {
				for time.Now().Before(end) {
					if err := a.enter(); err != nil {
						t.Error(err)
						return
					}
					time.Sleep(50 * time.Millisecond) // the bubble's clock
					a.leave(time.Time{})
				}
			})
		}
		for time.Now().Before(end) {
			time.Sleep(3 * time.Second)
			if err := a.enter(); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			time.Sleep(10 * time.Millisecond)
			a.leave(began)
		}
		all.Wait()
	})
}

// TestClientLeft: what a client that went away is answered is no fault of ours,
// whatever failed because of it.
func TestClientLeft(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, err := range []error{ca.ErrUnavailable, ca.ErrBusy, ca.ErrCA, identity.ErrUnavailable, context.Canceled} {
		if f := failureOf(ctx, err); f.status != statusClientClosed || f.code != codes.Canceled || f.retry != 0 {
			t.Errorf("%v: %+v", err, f)
		}
	}
	if f := failureOf(ctx, errSlow); f.status != http.StatusRequestTimeout {
		t.Errorf("a late body, which ends the context too: %+v", f)
	}
}

// TestAdmissionRefuses: what the refused get, and that those who fail give
// their place back.
func TestAdmissionRefuses(t *testing.T) {
	a := newAdmission(time.Second)
	for range firstInWork {
		if err := a.enter(); err != nil {
			t.Fatal(err)
		}
	}
	err := a.enter()
	var busy *busyError
	if !errors.Is(err, ca.ErrBusy) || !errors.As(err, &busy) {
		t.Fatalf("error %v", err)
	}
	if got := failureOf(t.Context(), err); got.status != 503 || got.retry != 2 {
		t.Errorf("failure %+v, want 503 and to try again after 2 s", got)
	}
	a.leave(time.Time{})
	if err := a.enter(); err != nil {
		t.Errorf("after one left: %v", err)
	}
	if f := failureOf(t.Context(), &busyError{time.Hour}); f.retry != maxRetry {
		t.Errorf("retry %d, want %d", f.retry, maxRetry)
	}
}
