package service

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// errClock is returned by a clock that cannot be trusted at the moment.
var errClock = errors.New("clock not trustworthy")

const (
	// maxBehind is how far the wall clock may be behind the newest time that
	// this service has put under a signature.
	maxBehind = 2 * time.Second
	// maxJump is how far the wall clock may run away from the monotonic clock
	// between two readings.
	maxJump = 60 * time.Second
	// settle is how long a clock that jumped must agree with the monotonic
	// clock before it is trusted again.
	settle = 60 * time.Second
)

// clock is the one wall clock of CA, CT log, Rekor log and TSA. It refuses to
// tell the time (errClock) while the wall clock is more than maxBehind behind
// what was signed before, or after it jumped forward by more than maxJump.
// After a jump it must run steadily for the settling time, so that an
// operator's or NTP's correction heals it without a restart.
//
// It is safe for concurrent use.
type clock struct {
	// read returns the wall clock and a monotonic time since some start.
	read func() (wall time.Time, mono time.Duration)
	log  *slog.Logger

	mu       sync.Mutex
	newest   time.Time // the newest time told or signed
	started  bool      // whether lastWall and lastMono hold a reading
	lastWall time.Time
	lastMono time.Duration
	jumped   bool          // a forward jump has not settled yet
	jumpedAt time.Duration // when it was seen, monotonic
	refusing bool          // whether the last reading was refused
}

func newClock(log *slog.Logger) *clock {
	start := time.Now()
	return &clock{log: log, read: func() (time.Time, time.Duration) {
		now := time.Now()
		return now.Round(0), now.Sub(start)
	}}
}

// Observe tells the clock of a time that was signed before this process
// started: the clock will not tell an earlier one.
func (c *clock) Observe(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t.After(c.newest) {
		c.newest = t
	}
}

// Now returns the time in UTC. It never returns an earlier time than before.
func (c *clock) Now() (time.Time, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	wall, mono := c.read()
	err := c.judge(wall, mono)
	c.report(err)
	if err != nil {
		return time.Time{}, err
	}
	now := wall.UTC()
	if now.Before(c.newest) {
		now = c.newest
	}
	c.newest = now
	return now, nil
}

// judge compares a reading with the one before and with the newest time told.
// The caller holds mu.
func (c *clock) judge(wall time.Time, mono time.Duration) error {
	if c.started && wall.Sub(c.lastWall)-(mono-c.lastMono) > maxJump {
		c.jumped, c.jumpedAt = true, mono
	}
	c.started, c.lastWall, c.lastMono = true, wall, mono
	if behind := c.newest.Sub(wall); behind > maxBehind {
		return fmt.Errorf("%w: %s behind the last signed time", errClock, behind.Round(time.Millisecond))
	}
	if c.jumped && mono-c.jumpedAt < settle {
		return fmt.Errorf("%w: it jumped forward; trusted again in %s", errClock, (settle - (mono - c.jumpedAt)).Round(time.Second))
	}
	c.jumped = false
	return nil
}

// report logs a change between trusted and not. The caller holds mu.
func (c *clock) report(err error) {
	refuse := err != nil
	if refuse == c.refusing {
		return
	}
	c.refusing = refuse
	if refuse {
		c.log.Error("clock not trustworthy: issuing stops", "err", err)
	} else {
		c.log.Info("clock trusted again")
	}
}
