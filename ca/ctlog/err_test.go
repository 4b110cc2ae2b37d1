package ctlog

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// TestDoubtPasses: a failure speaks for ten seconds.
func TestDoubtPasses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l Log
		failed := errors.New("down")
		l.note(failed)
		time.Sleep(doubt) // the bubble's clock
		if err := l.Err(); !errors.Is(err, failed) {
			t.Errorf("within the time: %v", err)
		}
		time.Sleep(time.Nanosecond)
		if err := l.Err(); err != nil {
			t.Errorf("after it: %v", err)
		}
	})
}
