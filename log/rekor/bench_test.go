package rekor_test

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// BenchmarkEntry measures POST /api/v2/log/entries over TLS, on the real
// engine and publisher, with a head key in memory: entries per second, p50 and
// p99, and head signatures per entry. The client's share of the CPU (TLS,
// HTTP) is in the figures; its signatures are made beforehand.
func BenchmarkEntry(b *testing.B) {
	for _, clients := range []int{1, 32, 128} {
		b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
			f := newFixture(b)
			s := p256(b)
			cert := s.certificate(b, nil, s)
			bodies := make([][]byte, b.N)
			for i := range bodies {
				bodies[i] = body(b, certified(s.request(b, fmt.Sprint(i)), cert))
			}
			client := &http.Client{Transport: &http.Transport{
				TLSClientConfig:     &tls.Config{RootCAs: f.srv.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs},
				MaxIdleConnsPerHost: clients,
			}}
			defer client.CloseIdleConnections()
			took := make([]time.Duration, b.N)
			var next atomic.Int64
			var wg sync.WaitGroup
			before := f.key.Count()
			b.ReportAllocs()
			b.ResetTimer()
			for range clients {
				wg.Go(func() {
					for i := next.Add(1) - 1; i < int64(b.N); i = next.Add(1) - 1 {
						start := time.Now()
						resp, err := client.Post(f.srv.URL+"/api/v2/log/entries", "application/json", bytes.NewReader(bodies[i]))
						if err != nil {
							b.Error(err)
							return
						}
						_, _ = io.Copy(io.Discard, resp.Body)
						_ = resp.Body.Close()
						if resp.StatusCode != http.StatusCreated {
							b.Errorf("status %d", resp.StatusCode)
							return
						}
						took[i] = time.Since(start)
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			slices.Sort(took)
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "entries/s")
			b.ReportMetric(float64(took[b.N/2].Microseconds()), "p50-µs")
			b.ReportMetric(float64(took[b.N*99/100].Microseconds()), "p99-µs")
			b.ReportMetric(float64(f.key.Count()-before)/float64(b.N), "signatures/entry")
		})
	}
}
