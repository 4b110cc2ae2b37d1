package logtool_test

import (
	"testing"

	"github.com/chancery-ca/chancery/cmd/chancery/internal/logtool"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/logtool/logtooltest"
)

// BenchmarkVerify verifies a log of small leaves: what a leaf costs beside the
// hashing of its octets.
func BenchmarkVerify(b *testing.B) {
	s, err := large()
	logtooltest.Must(b, err)
	logs, err := logtool.Find(s.Config, logtooltest.Rekor)
	logtooltest.Must(b, err)
	for b.Loop() {
		if _, err := logs[0].Verify(b.Context(), 0, &counter{}); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)*leaves/b.Elapsed().Seconds(), "leaves/s")
}
