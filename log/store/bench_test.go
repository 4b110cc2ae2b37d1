package store

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/google/trillian"
)

// cpuTime is the processor time of this process so far.
func cpuTime(b *testing.B) time.Duration {
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
