package service

import (
	"errors"
	"log/slog"
	"testing"
	"time"
)

func TestClock(t *testing.T) {
	start := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	type step struct {
		wall, mono time.Duration // moved since the step before
		refused    bool
	}
	tests := []struct {
		name     string
		observed time.Duration // signed before the start, relative to it
		steps    []step
	}{
		{"steady", -time.Hour, []step{{}, {time.Second, time.Second, false}, {time.Hour, time.Hour, false}}},
		{"one second behind the last head", time.Second, []step{{0, 0, false}}},
		{"three seconds behind the last head", 3 * time.Second, []step{{0, 0, true}, {time.Second, time.Second, false}}},
		{"set back an hour and corrected", -time.Hour, []step{{}, {-time.Hour, time.Second, true}, {time.Hour, time.Second, true}, {time.Minute, time.Minute, false}}},
		{"set back one second", -time.Hour, []step{{}, {-time.Second, 0, false}}},
		{"forward a day, steady afterwards", -time.Hour, []step{
			{}, {24 * time.Hour, time.Second, true}, {59 * time.Second, 59 * time.Second, true}, {2 * time.Second, 2 * time.Second, false},
		}},
		{"forward a day and back", -time.Hour, []step{
			{}, {24 * time.Hour, time.Second, true}, {-24 * time.Hour, time.Second, true}, {time.Minute, time.Minute, false},
		}},
		{"forward twice", -time.Hour, []step{
			{}, {2 * time.Minute, time.Second, true}, {3 * time.Minute, time.Minute, true}, {59 * time.Second, 59 * time.Second, true},
		}},
		{"small correction", -time.Hour, []step{{}, {59 * time.Second, 0, false}}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			wall, mono := start, time.Duration(0)
			c := newClock(slog.New(slog.DiscardHandler))
			c.read = func() (time.Time, time.Duration) { return wall, mono }
			c.Observe(start.Add(test.observed))
			var last time.Time
			for i, s := range test.steps {
				wall, mono = wall.Add(s.wall), mono+s.mono
				now, err := c.Now()
				if refused := errors.Is(err, errClock); refused != s.refused || (err != nil && !refused) {
					t.Fatalf("step %d: err %v, want refused = %v", i, err, s.refused)
				}
				if err != nil {
					continue
				}
				if now.Before(last) {
					t.Fatalf("step %d: time went back from %v to %v", i, last, now)
				}
				last = now
			}
		})
	}
}
