// Package growth builds a large log and states what a leaf costs as it grows.
// It has tests only; `make bench-growth` runs it.
package growth

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"

	"github.com/chancery-ca/chancery/log/tree"
)

const (
	leafSize  = 1024
	batchSize = 1024
	// callers keep one batch gathering while another commits.
	callers = 2 * batchSize
	// window is how many leaves before a mark its cost per leaf is measured
	// over: two generations of the storage's lookup, so that each window has
	// the same number of sealings.
	window = 1 << 19
	// yardstick is the leaves of the new log that each mark is compared with.
	yardstick = 1 << 17
	// proofs is how many random proofs are timed at a mark.
	proofs = 2000
	// tailMark is where the lookup has sealed generations; bounds that are
	// about a large log hold from here on.
	tailMark = 1_000_000
)

// What is promised (log/README.md).
const (
	maxGrowth   = 1.2 // CPU for a leaf, as a multiple of a new log's, against that at 1 M
	maxRSS      = 150 << 20
	maxStart    = 2 * time.Second
	maxProof    = 5 * time.Millisecond // 99th percentile
	maxOverhead = 250                  // octets on disk for a leaf beyond its own
)

// mark is what was measured when the log had so many leaves.
type mark struct {
	leaves   int
	cpu      time.Duration // of this process for a leaf, over the window
	relative float64       // cpu as a multiple of that of a new log, made at the same time
	rate     float64       // leaves per second, over the window
	written  float64       // octets written for a leaf, over the window
	overhead float64       // octets on disk for a leaf beyond its own
	rss      int64         // the most so far, octets
	start    time.Duration // to open the log
	p50, p99 time.Duration // of a proof of any leaf at any size
}

// TestGrowth builds a log of CHANCERY_GROWTH_LEAVES leaves of 1 KiB, through
// log/tree with batches of 1,024, and holds it to its bounds. It needs 1.2 KB
// of disk for each leaf, in TMPDIR.
func TestGrowth(t *testing.T) {
	n, err := strconv.Atoi(os.Getenv("CHANCERY_GROWTH_LEAVES"))
	if err != nil || n < 1 {
		t.Skip("set CHANCERY_GROWTH_LEAVES to a number of leaves, 1.2 KB of disk each")
	}
	g := &grower{t: t, dir: t.TempDir()}
	g.open()
	var marks []mark
	for _, m := range []int{100_000, tailMark, 10_000_000} {
		if m <= n {
			marks = append(marks, g.measure(m))
		}
	}
	if len(marks) == 0 || marks[len(marks)-1].leaves != n {
		marks = append(marks, g.measure(n))
	}
	g.close()
	print(os.Stdout, marks)
	hold(t, marks)
}

// hold compares the marks with the bounds.
func hold(t *testing.T, marks []mark) {
	t.Helper()
	at1M := 0.0
	for _, m := range marks {
		if m.rss >= maxRSS {
			t.Errorf("%d leaves: %d MiB of memory, want less than %d", m.leaves, m.rss>>20, maxRSS>>20)
		}
		if m.start >= maxStart {
			t.Errorf("%d leaves: opened in %v, want less than %v", m.leaves, m.start, maxStart)
		}
		if m.p99 >= maxProof {
			t.Errorf("%d leaves: 99th percentile of a proof %v, want less than %v", m.leaves, m.p99, maxProof)
		}
		if m.leaves >= tailMark && m.overhead > maxOverhead {
			t.Errorf("%d leaves: %.0f octets on disk beyond a leaf's own, want at most %d", m.leaves, m.overhead, maxOverhead)
		}
		if at1M > 0 && m.relative > maxGrowth*at1M {
			t.Errorf("%d leaves: CPU for a leaf is %.2f of a new log's, at 1 M it was %.2f: more than %.1f times", m.leaves, m.relative, at1M, maxGrowth)
		}
		if m.leaves == tailMark {
			at1M = m.relative
		}
	}
}

// print writes the table of log/README.md.
func print(w io.Writer, marks []mark) {
	fmt.Fprintf(w, "| leaves | CPU per leaf | of a new log's | leaves/s | written per leaf | on disk beyond the leaf | RSS, most | start | proof p50 | proof p99 |\n")
	fmt.Fprintf(w, "|---|---|---|---|---|---|---|---|---|---|\n")
	for _, m := range marks {
		fmt.Fprintf(w, "| %d | %.1f µs | %.2f | %.0f | %.0f B | %.0f B | %d MiB | %d ms | %d µs | %d µs |\n",
			m.leaves, float64(m.cpu.Nanoseconds())/1e3, m.relative, m.rate, m.written, m.overhead, m.rss>>20,
			m.start.Milliseconds(), m.p50.Microseconds(), m.p99.Microseconds())
	}
}

// grower is the log that grows.
type grower struct {
	t      *testing.T
	dir    string
	engine *tree.Engine
	tree   tree.Tree
	size   int
}

func (g *grower) open() {
	g.t.Helper()
	e, err := tree.Open(g.t.Context(), tree.Config{
		Dir: g.dir, MaxBatch: batchSize,
		Now:    func() (time.Time, error) { return time.Now(), nil },
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		g.t.Fatal(err)
	}
	g.engine = e
	g.t.Cleanup(func() { e.Close(context.Background()) })
	if g.size == 0 {
		if err := e.Create(g.t.Context(), "growth"); err != nil {
			g.t.Fatal(err)
		}
	}
	if g.tree, err = e.Tree(g.t.Context(), "growth"); err != nil {
		g.t.Fatal(err)
	}
}

func (g *grower) close() {
	g.t.Helper()
	if err := g.engine.Close(g.t.Context()); err != nil {
		g.t.Fatal(err)
	}
}

// measure grows the log to size leaves and measures it there.
func (g *grower) measure(size int) mark {
	g.t.Helper()
	from := max(g.size, size-window)
	g.grow(from)
	fresh := g.newLog()
	cpu, written, start := cpuTime(g.t), writtenBytes(g.t), time.Now()
	g.grow(size)
	m := mark{leaves: size, rate: float64(size-from) / time.Since(start).Seconds()}
	// Closing writes what the write-ahead log still has: part of the cost.
	g.close()
	m.cpu = (cpuTime(g.t) - cpu) / time.Duration(size-from)
	m.written = float64(writtenBytes(g.t)-written) / float64(size-from)
	m.overhead = float64(diskBytes(g.t, g.dir))/float64(size) - leafSize
	m.relative = 2 * float64(m.cpu) / float64(fresh+g.newLog())
	start = time.Now()
	g.open()
	m.start = time.Since(start)
	m.p50, m.p99 = g.prove()
	m.rss = peakRSS(g.t)
	return m
}

// newLog returns the CPU for a leaf of a log that begins, in a process of its
// own. Whatever else the machine does now makes it dearer too.
func (g *grower) newLog() time.Duration {
	g.t.Helper()
	cmd := exec.CommandContext(g.t.Context(), os.Args[0], "-test.run=^TestYardstick$", "-test.v")
	cmd.Env = append(os.Environ(), yardstickChild+"=1")
	out, err := cmd.Output()
	if err != nil {
		g.t.Fatalf("grow a new log: %v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if s, ok := strings.CutPrefix(strings.TrimSpace(line), "yardstick "); ok {
			d, err := time.ParseDuration(s)
			if err != nil {
				g.t.Fatal(err)
			}
			return d
		}
	}
	g.t.Fatalf("no yardstick in %s", out)
	return 0
}

const yardstickChild = "CHANCERY_GROWTH_YARDSTICK"

// TestYardstick is the child of newLog.
func TestYardstick(t *testing.T) {
	if os.Getenv(yardstickChild) == "" {
		t.Skip("only as a child of TestGrowth")
	}
	g := &grower{t: t, dir: t.TempDir()}
	g.open()
	cpu := cpuTime(t)
	g.grow(yardstick)
	g.close()
	fmt.Println("yardstick", (cpuTime(t)-cpu)/yardstick)
}

// grow appends leaves until there are size.
func (g *grower) grow(size int) {
	g.t.Helper()
	next := atomic.Int64{}
	next.Store(int64(g.size))
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			value := make([]byte, leafSize)
			for i := next.Add(1) - 1; i < int64(size); i = next.Add(1) - 1 {
				fillLeaf(value, uint64(i))
				if _, existed, err := g.tree.Append(g.t.Context(), tree.Leaf{Value: value}); err != nil || existed {
					g.t.Errorf("append leaf %d: existed %v: %v", i, existed, err)
					return
				}
			}
		})
	}
	wg.Wait()
	g.size = size
	if got := g.tree.Root().Size; g.t.Failed() || got != uint64(size) {
		g.t.Fatalf("%d leaves in the log, appended %d", got, size)
	}
}

// fillLeaf writes octets that do not compress and are no other leaf's.
func fillLeaf(value []byte, i uint64) {
	rnd := rand.NewPCG(i, 0)
	for at := 0; at < len(value); at += 8 {
		binary.LittleEndian.PutUint64(value[at:], rnd.Uint64())
	}
	binary.BigEndian.PutUint64(value, i)
}

// prove times and verifies proofs of random leaves at random sizes.
func (g *grower) prove() (p50, p99 time.Duration) {
	g.t.Helper()
	took := make([]time.Duration, proofs)
	for i := range took {
		size := 1 + rand.Uint64N(uint64(g.size))
		index := rand.Uint64N(size)
		start := time.Now()
		path, err := g.tree.InclusionProof(g.t.Context(), index, size)
		took[i] = time.Since(start)
		if err != nil {
			g.t.Fatal(err)
		}
		if i%100 == 0 {
			g.verify(index, size, path)
		}
	}
	slices.Sort(took)
	return took[proofs/2], took[proofs*99/100]
}

// verify checks a proof with software that is not ours; only which entry it is
// and the root at that size come from the log.
func (g *grower) verify(index, size uint64, path []tree.Hash) {
	g.t.Helper()
	entries, err := g.tree.Entries(g.t.Context(), index, 1)
	if err != nil {
		g.t.Fatal(err)
	}
	root, err := g.tree.RootAt(g.t.Context(), size)
	if err != nil {
		g.t.Fatal(err)
	}
	hashes := make([][]byte, len(path))
	for i := range path {
		hashes[i] = path[i][:]
	}
	leaf := rfc6962.DefaultHasher.HashLeaf(entries[0].Value)
	if err := proof.VerifyInclusion(rfc6962.DefaultHasher, index, size, leaf, hashes, root[:]); err != nil {
		g.t.Fatalf("leaf %d in %d: %v", index, size, err)
	}
}

// cpuTime is the processor time of this process so far.
func cpuTime(t testing.TB) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// writtenBytes is what this process caused to be sent to storage so far.
func writtenBytes(t testing.TB) int64 {
	t.Helper()
	return procValue(t, "/proc/self/io", "write_bytes:")
}

// peakRSS is the most memory that this process had, in octets.
func peakRSS(t *testing.T) int64 {
	t.Helper()
	return procValue(t, "/proc/self/status", "VmHWM:") << 10
}

// procValue reads a number from a file of "name value" lines.
func procValue(t testing.TB, path, name string) int64 {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		if f := strings.Fields(lines.Text()); len(f) > 1 && f[0] == name {
			v, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
	}
	t.Fatalf("no %s in %s", name, path)
	return 0
}

// diskBytes is the size of all files in dir.
func diskBytes(t *testing.T, dir string) (n int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			n += info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}
