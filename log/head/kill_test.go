package head

import (
	"bufio"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/log/tree"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
)

// acked is what a killed process had told a client.
type acked struct {
	index, size uint64
	leaf, root  tree.Hash
}

const (
	victimDir   = "CHANCERY_TEST_VICTIM_DIR"
	victimRound = "CHANCERY_TEST_VICTIM_ROUND"
	victimKey   = "CHANCERY_TEST_VICTIM_KEY"
)

// TestKilled kills a process that writes a log, at a random moment, again and
// again on one directory. Every answer that it gave must hold for ever: the
// leaf is included, and all heads are consistent.
func TestKilled(t *testing.T) {
	if dir := os.Getenv(victimDir); dir != "" {
		victim(t, dir, os.Getenv(victimRound))
		return
	}
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	f, key := newVictims(t)
	var all []acked
	for round := range rounds {
		all = append(all, runVictim(t, f.dir, key, round, 1+rand.IntN(200))...)
	}
	if len(all) < rounds {
		t.Fatalf("%d answers in %d rounds", len(all), rounds)
	}
	holds(t, f, key, all)
}

// TestKilledAtSyscall kills the process as it enters the n-th write or sync of
// a thread, at start-up and at work, with strace.
func TestKilledAtSyscall(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		hsmtest.Missing(t, "strace is not installed")
	}
	if out, err := exec.CommandContext(t.Context(), strace, "-o", os.DevNull, "true").CombinedOutput(); err != nil {
		t.Skipf("strace may not trace here: %v: %s", err, out)
	}
	points := []int{1, 2, 3, 5, 9, 17, 40}
	if testing.Short() {
		points = points[:2]
	}
	f, key := newVictims(t)
	var all []acked
	round := 100
	for _, call := range []string{"pwrite64", "fdatasync"} {
		for _, n := range points {
			round++
			inject := fmt.Sprintf("inject=%s:signal=KILL:when=%d", call, n)
			all = append(all, runVictim(t, f.dir, key, round, 1<<30, strace, "-f", "-qq", "-o", os.DevNull, "-e", "trace="+call, "-e", inject)...)
		}
	}
	if len(all) == 0 {
		t.Fatal("no answers")
	}
	holds(t, f, key, all)
}

// newVictims makes a log and a key for processes that will be killed.
func newVictims(t *testing.T) (*fixture, string) {
	t.Helper()
	f := newFixture(t)
	if err := f.engine.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return f, hex.EncodeToString(key)
}

// holds checks every answer against the log as it is now.
func holds(t *testing.T, f *fixture, key string, all []acked) {
	t.Helper()
	f.openTree()
	f.key = &hsmtest.Counting{Key: keyOf(t, key)}
	f.open()
	for _, a := range all {
		if a.size > f.heads.Latest().Size {
			t.Fatalf("head of %d leaves was given, the anchor has %d", a.size, f.heads.Latest().Size)
		}
	}
	roots := map[uint64]tree.Hash{}
	for _, a := range all {
		if r, ok := roots[a.size]; ok && r != a.root {
			t.Fatalf("two roots of %d leaves", a.size)
		}
		roots[a.size] = a.root
		if r, err := f.tree.RootAt(t.Context(), a.size); err != nil || r != a.root {
			t.Fatalf("head of %d leaves is not of this tree: %v", a.size, err)
		}
		hs, err := f.tree.InclusionProof(t.Context(), a.index, a.size)
		if err != nil {
			t.Fatal(err)
		}
		var path [][]byte
		for _, h := range hs {
			path = append(path, h[:])
		}
		if err := proof.VerifyInclusion(rfc6962.DefaultHasher, a.index, a.size, a.leaf[:], path, a.root[:]); err != nil {
			t.Fatalf("leaf %d in head %d: %v", a.index, a.size, err)
		}
	}
	t.Logf("%d answers, %d heads, %d leaves", len(all), len(roots), f.tree.Root().Size)
}

// runVictim starts a victim, by way of another program if one is given, kills
// it at an answer unless it dies before, and returns the answers that it gave.
func runVictim(t *testing.T, dir, key string, round, answers int, by ...string) (all []acked) {
	t.Helper()
	by = append(by, os.Args[0], "-test.run=^TestKilled$")
	cmd := exec.CommandContext(t.Context(), by[0], by[1:]...)
	cmd.Env = append(os.Environ(), victimDir+"="+dir, victimKey+"="+key, fmt.Sprintf("%s=%d", victimRound, round))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	for {
		line, err := lines.ReadString('\n')
		if err == io.EOF {
			break // the last line may be cut: it was not given
		}
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(line, "answer ") {
			t.Fatalf("victim of round %d: %s", round, line)
		}
		all = append(all, parseAnswer(t, line))
		if len(all) == answers {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := cmd.Wait(); err == nil {
		t.Fatalf("victim of round %d ended by itself", round)
	}
	return all
}

func parseAnswer(t *testing.T, line string) (a acked) {
	t.Helper()
	var leaf, root string
	if _, err := fmt.Sscanf(line, "answer %d %d %s %s", &a.index, &a.size, &leaf, &root); err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	for to, s := range map[*tree.Hash]string{&a.leaf: leaf, &a.root: root} {
		b, err := hex.DecodeString(s)
		if err != nil || len(b) != tree.HashSize {
			t.Fatalf("%q: %v", line, err)
		}
		*to = tree.Hash(b)
	}
	return a
}

// victim writes the log in dir until it is killed.
func victim(t *testing.T, dir, round string) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute) // ends a hang
	defer cancel()
	f := &fixture{t: t, dir: dir, clock: &clock{}, key: &hsmtest.Counting{Key: keyOf(t, os.Getenv(victimKey))}}
	f.openTree()
	f.open(func(c *Config) { // what is wrong is no answer, and fails the test
		c.Logger = slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{Level: slog.LevelError}))
	}, victimCounter(t))
	var mu sync.Mutex
	var wg sync.WaitGroup
	for c := range 16 {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				e, _, err := f.tree.Append(ctx, tree.Leaf{Value: fmt.Append(nil, round, " ", c, " ", i)})
				if err != nil {
					t.Error(err)
					return
				}
				s, err := f.heads.Await(ctx, e.Index+1)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				fmt.Printf("answer %d %d %x %x\n", e.Index, s.Size, e.LeafHash, s.Root)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
}

// portableKey is a software key that two processes can share.
type portableKey struct{ *ecdsa.PrivateKey }

func keyOf(t *testing.T, pkcs8 string) portableKey {
	t.Helper()
	der, err := hex.DecodeString(pkcs8)
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		t.Fatal(err)
	}
	return portableKey{key.(*ecdsa.PrivateKey)}
}

func (k portableKey) Ref() hsm.Ref { return hsm.Ref{} }

func (k portableKey) SignContext(_ context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.Sign(crand.Reader, digest, opts)
}
