package server

import (
	"fmt"
	"sync"
	"time"

	"github.com/chancery-ca/chancery/ca"
)

// admission refuses at once what could not be answered in time. A token signs
// at its own pace, between a dozen and thousands of signatures in a second, and
// a request too many makes all who wait wait longer, until every answer is too
// late and none is of use. So the pace is measured, the time from one
// certificate to the next while one is made, and the request that would be
// number n in work is let in if n times that is no longer than wait.
//
// It looks at a request before anything of it is verified: to refuse costs next
// to nothing. It is safe for concurrent use.
type admission struct {
	wait time.Duration // the longest time from admission to answer that is expected of a request

	mu     sync.Mutex
	inWork int
	pace   time.Duration // from one certificate to the next, averaged
	since  time.Time     // when the last certificate was made
}

const (
	// fewInWork is how many requests are let in whatever the pace: several
	// sessions of a token work at once, and it is with them that the pace shows.
	fewInWork = 8
	// mostInWork bounds what is let in, whatever the pace.
	mostInWork = ca.DefaultMaxConcurrent
	// firstInWork is how many are let in before a pace was measured.
	firstInWork = 64
	// paceWeight is the part of the average that a new certificate is.
	paceWeight = 32
)

func newAdmission(wait time.Duration) *admission {
	return &admission{wait: wait, pace: wait / firstInWork}
}

// busyError is ca.ErrBusy with the time after which there will be room.
type busyError struct{ retry time.Duration }

// Error says when there will be room; it is for the log.
func (e *busyError) Error() string {
	return fmt.Sprintf("%s: room in %s", ca.ErrBusy, e.retry.Round(time.Millisecond))
}

// Unwrap is ca.ErrBusy, by which its answer is found.
func (e *busyError) Unwrap() error { return ca.ErrBusy }

// enter lets a request in or refuses it with a *busyError. Who was let in
// leaves.
func (a *admission) enter() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	expected := time.Duration(a.inWork+1) * a.pace
	if a.inWork >= mostInWork || a.inWork >= fewInWork && expected > a.wait {
		return &busyError{expected}
	}
	a.inWork++
	return nil
}

// leave is the end of a request that was let in. One that got a certificate says
// when the making of it began; of another that is zero: it says nothing about the
// pace, nor does the time in which nobody asked for more than a refusal.
func (a *admission) leave(began time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.inWork--
	if began.IsZero() {
		return
	}
	if began.Before(a.since) {
		began = a.since
	}
	now := time.Now()
	a.pace += (min(now.Sub(began), a.wait) - a.pace) / paceWeight
	a.since = now
}
