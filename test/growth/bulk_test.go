package growth

import (
	"context"
	"crypto/rand"
	"io"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/mod/sumdb/note"
	"k8s.io/klog/v2"

	"github.com/chancery-ca/chancery/log/tree"
)

// BenchmarkBulk integrates leaves of 1 KiB with batches of 1,024, every one
// durable before its caller goes on, in this log and in Tessera's POSIX driver,
// on one file system with one load. Neither signs: Tessera's checkpoint once a
// second is the least that it allows us to ask for. Ours looks for duplicates,
// which Tessera without its antispam database does not. The last row is the
// ratio of the two.
func BenchmarkBulk(b *testing.B) {
	var ours, theirs cost
	b.Run("chancery", func(b *testing.B) { ours = bulk(b, chanceryLog(b)) })
	b.Run("tessera", func(b *testing.B) { theirs = bulk(b, tesseraLog(b)) })
	b.Run("ratio", func(b *testing.B) {
		if ours.rate == 0 || theirs.rate == 0 {
			b.Skip("both are needed")
		}
		for b.Loop() {
			b.ReportMetric(0, "ns/op")
		}
		b.ReportMetric(ours.rate/theirs.rate, "×rate")
		b.ReportMetric(ours.cpu/theirs.cpu, "×CPU")
	})
}

// cost is what a leaf took.
type cost struct {
	rate float64 // leaves per second
	cpu  float64 // of this process, µs per leaf
}

// bulk appends b.N leaves.
func bulk(b *testing.B, add func(context.Context, []byte) error) (c cost) {
	cpu, written := cpuTime(b), writtenBytes(b)
	var next atomic.Int64
	var wg sync.WaitGroup
	b.ResetTimer()
	for range callers {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(b.N); i = next.Add(1) - 1 {
				value := make([]byte, leafSize) // Tessera keeps it
				fillLeaf(value, uint64(i))
				if err := add(b.Context(), value); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	n := float64(b.N)
	c = cost{n / b.Elapsed().Seconds(), float64((cpuTime(b) - cpu).Nanoseconds()) / 1e3 / n}
	b.ReportMetric(c.rate, "leaves/s")
	b.ReportMetric(c.cpu, "cpu-µs/leaf")
	b.ReportMetric(float64(writtenBytes(b)-written)/n, "written-B/leaf")
	return c
}

func chanceryLog(b *testing.B) func(context.Context, []byte) error {
	e, err := tree.Open(b.Context(), tree.Config{
		Dir: b.TempDir(), MaxBatch: batchSize,
		Now:    func() (time.Time, error) { return time.Now(), nil },
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := e.Close(context.Background()); err != nil {
			b.Error(err)
		}
	})
	if err := e.Create(b.Context(), "bulk"); err != nil {
		b.Fatal(err)
	}
	t, err := e.Tree(b.Context(), "bulk")
	if err != nil {
		b.Fatal(err)
	}
	return func(ctx context.Context, value []byte) error {
		_, _, err := t.Append(ctx, tree.Leaf{Value: value})
		return err
	}
}

func tesseraLog(b *testing.B) func(context.Context, []byte) error {
	klog.LogToStderr(false)
	klog.SetOutput(io.Discard)
	secret, _, err := note.GenerateKey(rand.Reader, "bulk.example")
	if err != nil {
		b.Fatal(err)
	}
	signer, err := note.NewSigner(secret)
	if err != nil {
		b.Fatal(err)
	}
	driver, err := posix.New(b.Context(), posix.Config{Path: filepath.Join(b.TempDir(), "tessera")})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(b.Context()))
	b.Cleanup(cancel)
	a, _, _, err := tessera.NewAppender(ctx, driver, tessera.NewAppendOptions().
		WithCheckpointSigner(signer).
		WithCheckpointInterval(time.Second).
		WithGarbageCollectionInterval(0).
		WithPushback(2*callers).
		WithBatching(batchSize, 50*time.Millisecond))
	if err != nil {
		b.Fatal(err)
	}
	return func(ctx context.Context, value []byte) error {
		_, err := a.Add(ctx, tessera.NewEntry(value))()
		return err
	}
}
