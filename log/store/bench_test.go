package store

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/google/trillian"
)

// cpuTime is the processor time of this process so far.
func cpuTime(b testing.TB) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkIntegrate queues and integrates leaves of 1 KiB through Trillian's
// sequencer: leaves per second, processor time and octets on disk for each.
func BenchmarkIntegrate(b *testing.B) {
	for _, batch := range []int{1, 16, 128, 1024} {
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) {
			r := newRig(b, trillian.TreeType_LOG, Options{})
			leaves := make([]*trillian.LogLeaf, b.N)
			for i := range leaves {
				leaves[i] = bulkLeaf(i, 1024)
			}
			b.ReportAllocs()
			b.ResetTimer()
			start, cpu := time.Now(), cpuTime(b)
			for i := 0; i < b.N; i += batch {
				r.queue(leaves[i:min(b.N, i+batch)]...)
				r.integrate(batch)
			}
			b.StopTimer()
			b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "leaves/s")
			b.ReportMetric(float64((cpuTime(b)-cpu).Microseconds())/float64(b.N), "cpu-µs/leaf")
			if err := r.s.Close(); err != nil {
				b.Fatal(err)
			}
			info, err := os.Stat(filepath.Join(r.s.dir, fmt.Sprintf("tree-%d.db", r.tree.TreeId)))
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(info.Size())/float64(b.N)-1024, "overhead-B/leaf")
		})
	}
}

// TestGrowth builds a log of CHANCERY_GROWTH_LEAVES leaves of 1 KiB and states
// what a leaf costs as the log grows, and how long opening it takes.
func TestGrowth(t *testing.T) {
	n, err := strconv.Atoi(os.Getenv("CHANCERY_GROWTH_LEAVES"))
	if err != nil {
		t.Skip("set CHANCERY_GROWTH_LEAVES to a number of leaves (1,100 octets of disk each)")
	}
	r := newRig(t, trillian.TreeType_LOG, Options{})
	step := max(1, n/10)
	for from := 0; from < n; from += step {
		start, cpu := time.Now(), cpuTime(t)
		bulk(r, from, min(n, from+step), 1024, 1024)
		took, used := time.Since(start), cpuTime(t)-cpu
		info, err := os.Stat(r.s.treePath(r.tree.TreeId))
		if err != nil {
			t.Fatal(err)
		}
		size := r.root().TreeSize
		t.Logf("%9d leaves: %6.0f leaves/s, %5.1f µs CPU and %4.0f octets beyond its own for each; peak RSS %d MiB",
			size, float64(step)/took.Seconds(), float64(used.Microseconds())/float64(step), float64(info.Size())/float64(size)-1024, peakRSS(t)>>20)
	}
	if err := r.s.Close(); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	s := mustOpen(t, r.s.dir, Options{})
	t.Logf("opened in %v", time.Since(start))
	if _, err := s.ReadTile(t.Context(), r.tree.TreeId, 0, 0, 256); err != nil {
		t.Error(err)
	}
}

// peakRSS is the most memory that this process had, in octets.
func peakRSS(t testing.TB) int64 {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return u.Maxrss << 10
}
