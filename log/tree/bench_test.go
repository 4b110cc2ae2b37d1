package tree

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
)

// BenchmarkAppend appends durable leaves of 1 KiB.
func BenchmarkAppend(b *testing.B) {
	for _, clients := range []int{1, 128, 4096} {
		b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
			s := newFaultyStorage(b)
			_, tr := openTree(b, s)
			var next atomic.Int64
			var wg sync.WaitGroup
			s.queues = 0
			b.ResetTimer()
			for range clients {
				wg.Go(func() {
					for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
						value := make([]byte, 1024)
						copy(value, fmt.Append(nil, b.N, " ", i))
						if _, _, err := tr.Append(b.Context(), Leaf{Value: value}); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "leaves/s")
			b.ReportMetric(float64(b.N)/float64(s.queues), "leaves/batch")
		})
	}
}

// BenchmarkInclusionProof proves leaves of a tree of 100,000: the newest, as a
// signature log does for every answer, and any, of which the cache holds few.
func BenchmarkInclusionProof(b *testing.B) {
	const n = 100_000
	s := newFaultyStorage(b)
	_, tr := openTree(b, s, func(c *Config) { c.CacheTiles = 16; c.MaxQueue = n })
	var wg sync.WaitGroup
	for c := range 1024 {
		wg.Go(func() {
			for i := c; i < n; i += 1024 {
				if _, _, err := tr.Append(b.Context(), leafN(i)); err != nil {
					b.Error(err)
				}
			}
		})
	}
	wg.Wait()
	b.Run("newest", func(b *testing.B) {
		b.ReportAllocs()
		for i := range b.N {
			if _, err := tr.InclusionProof(b.Context(), n-1-uint64(i%128), n); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("any", func(b *testing.B) {
		b.ReportAllocs()
		for range b.N {
			if _, err := tr.InclusionProof(b.Context(), rand.Uint64N(n), n); err != nil {
				b.Fatal(err)
			}
		}
	})
}
