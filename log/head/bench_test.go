package head

import (
	"context"
	"crypto"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/log/tree"
)

// slowKey is a token that takes its time.
type slowKey struct {
	hsm.Key
	takes time.Duration
}

func (k slowKey) SignContext(ctx context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if k.takes > 0 {
		time.Sleep(k.takes)
	}
	return k.Key.SignContext(ctx, digest, opts)
}

// BenchmarkPublish is one client's round: append a leaf of 1 KiB, await a head
// that includes it, prove it. Leaves are durable and heads anchored. The ratio
// to see is between the rows; sigs/leaf is the share of the token.
func BenchmarkPublish(b *testing.B) {
	for _, bc := range []struct {
		clients int
		takes   time.Duration
	}{{1, 0}, {128, 0}, {256, 10 * time.Millisecond}} {
		b.Run(fmt.Sprintf("clients=%d/key=%s", bc.clients, bc.takes), func(b *testing.B) {
			f := newFixture(b)
			f.key = &hsmtest.Counting{Key: slowKey{hsmtest.SoftwareKey(hsm.ECDSAP256), bc.takes}}
			f.open()
			f.add(1)
			f.await(1)
			took := make([]time.Duration, b.N)
			var next atomic.Int64
			signed, cpu := f.key.Count(), cpuTime()
			var wg sync.WaitGroup
			b.ResetTimer()
			for range bc.clients {
				wg.Go(func() {
					for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
						start := time.Now()
						round(b, f, int(i))
						took[i-1] = time.Since(start)
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			slices.Sort(took)
			n := float64(b.N)
			b.ReportMetric(n/b.Elapsed().Seconds(), "leaves/s")
			b.ReportMetric(float64(f.key.Count()-signed)/n, "sigs/leaf")
			b.ReportMetric(float64((cpuTime()-cpu).Microseconds())/n, "cpu-µs/leaf")
			b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
			f.close()
		})
	}
}

func round(b *testing.B, f *fixture, i int) {
	value := make([]byte, 1024)
	copy(value, fmt.Append(nil, "bench ", b.N, " ", i))
	e, _, err := f.tree.Append(b.Context(), tree.Leaf{Value: value})
	if err != nil {
		b.Error(err)
		return
	}
	s, err := f.heads.Await(b.Context(), e.Index+1)
	if err != nil {
		b.Error(err)
		return
	}
	if _, err := f.tree.InclusionProof(b.Context(), e.Index, s.Size); err != nil {
		b.Error(err)
	}
}

// cpuTime is what this process has used.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
