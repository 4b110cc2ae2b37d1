package tree

import (
	"sync"
	"time"

	"github.com/google/trillian/util/clock"
)

// rootClock is the clock that Trillian is given. It is strictly increasing,
// because IntegrateBatch refuses a root that is not later than the last one:
// max(wall clock, last + 1 ns). A wall clock that refuses does not stop leaves
// from becoming durable; signing their head is refused in log/head.
type rootClock struct {
	now func() (time.Time, error)

	mu   sync.Mutex
	last time.Time
}

var _ clock.TimeSource = (*rootClock)(nil)

// Now implements clock.TimeSource.
func (c *rootClock) Now() time.Time {
	now, err := c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	if next := c.last.Add(time.Nanosecond); err != nil || now.Before(next) {
		now = next
	}
	c.last = now
	return now
}

// NewTimer implements clock.TimeSource.
func (*rootClock) NewTimer(d time.Duration) clock.Timer { return clock.System.NewTimer(d) }
