package main

import (
	"context"
	"log/slog"
	"math"
	"runtime/debug"
	"testing"
)

// TestLimitFor: below the limit it is constant, above it never so low that
// the collector would have less room than what lives.
func TestLimitFor(t *testing.T) {
	for _, test := range []struct {
		name         string
		live, beside uint64
		want         int64
	}{
		{"nothing", 0, 0, memoryLimit},
		{"a small service", 15 << 20, 8 << 20, memoryLimit},
		{"just full", 44 << 20, 8 << 20, memoryLimit},
		{"one octet more", 44<<20 + 1, 8 << 20, 112 << 20},
		{"a large log", 200 << 20, 10 << 20, 416 << 20},
		{"nonsense", math.MaxUint64, math.MaxUint64, 3 << 40},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := limitFor(test.live, test.beside); got != test.want {
				t.Errorf("limitFor(%d, %d) = %d, want %d", test.live, test.beside, got, test.want)
			}
		})
	}
	if live, beside := memoryUse(); beside == 0 {
		t.Errorf("memoryUse() = %d, %d: this Go's metrics have other names", live, beside)
	}
}

// TestTuneMemory: the settings are made, and each setting of the environment
// is left alone.
func TestTuneMemory(t *testing.T) {
	for _, test := range []struct {
		name, gogc, limit string
		wantPercent       int
		wantLimit         int64
	}{
		{"nothing set", "", "", gcPercent, memoryLimit},
		{"GOGC set", "50", "", 100, memoryLimit},
		{"GOMEMLIMIT set", "", "1GiB", gcPercent, math.MaxInt64},
	} {
		t.Run(test.name, func(t *testing.T) {
			percent, limit := debug.SetGCPercent(100), debug.SetMemoryLimit(math.MaxInt64)
			defer func() { debug.SetGCPercent(percent); debug.SetMemoryLimit(limit) }()
			t.Setenv("GOGC", test.gogc)
			t.Setenv("GOMEMLIMIT", test.limit)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			tuneMemory(ctx, slog.New(slog.DiscardHandler))
			if got := debug.SetGCPercent(100); got != test.wantPercent {
				t.Errorf("percentage = %d, want %d", got, test.wantPercent)
			}
			if got := debug.SetMemoryLimit(-1); got != test.wantLimit {
				t.Errorf("limit = %d, want %d", got, test.wantLimit)
			}
		})
	}
}
