package main

import (
	"context"
	"log/slog"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// The garbage collector's settings. A certificate allocates some 150 KB, of
// which next to nothing lives on, and with Go's defaults a service whose live
// heap is small (4 MiB with young logs) collects after every 30 certificates. So
// the heap may grow to eleven times what lives before it is collected, but not
// beyond a limit on all of Go's memory: then collecting costs less than a
// quarter of what it did (BenchmarkIssue in cmd/chancery/internal/demo).
//
// A limit that is too low for what lives would make the collector run without
// end. The live heap grows with the logs, slowly, so the limit is looked at
// now and then and kept at no less than twice what lives: there the collector
// works as with Go's defaults.
const (
	gcPercent      = 1000
	memoryLimit    = 96 << 20 // octets; the process has some 30 MiB beside: SQLite, the token's library, the program
	memoryInterval = 10 * time.Second
)

// tuneMemory sets the garbage collector up, and goes on with it until ctx ends.
// GOGC and GOMEMLIMIT in the environment are left alone, each for itself.
func tuneMemory(ctx context.Context, logger *slog.Logger) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	debug.SetMemoryLimit(memoryLimit)
	go func() {
		tick := time.NewTicker(memoryInterval)
		defer tick.Stop()
		for limit := int64(memoryLimit); ; {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if next := limitFor(memoryUse()); next != limit {
				logger.Debug("memory limit changed", "octets", next)
				debug.SetMemoryLimit(next)
				limit = next
			}
		}
	}()
}

// memoryUse returns the octets that lived after the last collection, and those
// that Go's memory has beside the heap's objects (stacks, metadata).
func memoryUse() (live, beside uint64) {
	samples := []metrics.Sample{
		{Name: "/gc/heap/live:bytes"},
		{Name: "/memory/classes/heap/stacks:bytes"},
		{Name: "/memory/classes/metadata/mspan/inuse:bytes"},
		{Name: "/memory/classes/metadata/other:bytes"},
		{Name: "/memory/classes/other:bytes"},
	}
	metrics.Read(samples)
	for i, s := range samples {
		switch {
		case s.Value.Kind() != metrics.KindUint64: // this Go does not know it
		case i == 0:
			live = s.Value.Uint64()
		default:
			beside += s.Value.Uint64()
		}
	}
	return live, beside
}

// limitFor is the limit for a heap of which so much lives: in steps of 16 MiB,
// so that it does not change with every look.
func limitFor(live, beside uint64) int64 {
	const step = 16 << 20
	need := int64(min(live, 1<<40)*2 + min(beside, 1<<40))
	return max(memoryLimit, (need+step-1)/step*step)
}
