package tpm_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/tpm"
)

const testIndex = 0x01800010

func mustCreate(t testing.TB, token *tpm.Token, index uint32) *tpm.Counter {
	t.Helper()
	c, err := tpm.CreateCounter(t.Context(), token, index)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func wantValue(t testing.TB, c *tpm.Counter, want uint64) {
	t.Helper()
	if got, err := c.Value(t.Context()); err != nil || got != want {
		t.Errorf("counter at %d, error %v, want %d", got, err, want)
	}
}

func TestCounter(t *testing.T) {
	e := hsmtest.SWTPM(t)
	cfg := e.Config(t)
	token, err := tpm.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tpm.OpenCounter(t.Context(), token, testIndex); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("before it is created: error %v, want ErrNotFound", err)
	}
	c := mustCreate(t, token, testIndex)
	first, err := c.Value(t.Context())
	if err != nil || first == 0 {
		t.Fatalf("first value %d, %v", first, err)
	}
	for i := range uint64(5) {
		if got, err := c.Advance(t.Context()); err != nil || got != first+i+1 {
			t.Fatalf("advance %d: %d, %v", i, got, err)
		}
	}
	if _, err := tpm.CreateCounter(t.Context(), token, testIndex); !errors.Is(err, hsm.ErrExists) {
		t.Errorf("created again: error %v, want ErrExists", err)
	}
	wantValue(t, c, first+5)

	e.Reset(t) // power cycle under the connection
	wantValue(t, c, first+5)
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Value(t.Context()); !errors.Is(err, hsm.ErrLost) {
		t.Errorf("closed token: error %v, want ErrLost", err)
	}
	e.Stop(t)
	e.Start(t)
	token = hsmtest.OpenTPM(t, cfg)
	if c, err = tpm.OpenCounter(t.Context(), token, testIndex); err != nil {
		t.Fatal(err)
	}
	wantValue(t, c, first+5)

	// Deleted and made again it goes on above all that was.
	if err := tpm.DeleteCounter(t.Context(), token, testIndex); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Advance(t.Context()); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("deleted: error %v, want ErrNotFound", err)
	}
	if err := tpm.DeleteCounter(t.Context(), token, testIndex); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("deleted twice: error %v, want ErrNotFound", err)
	}
	again := mustCreate(t, token, testIndex)
	if got, err := again.Value(t.Context()); err != nil || got <= first+5 {
		t.Errorf("made again at %d, %v, want more than %d", got, err, first+5)
	}
}

func TestCounterRefusals(t *testing.T) {
	e := hsmtest.SWTPM(t)
	cfg := e.Config(t)
	token := hsmtest.OpenTPM(t, cfg)
	for _, index := range []uint32{0, 0x017fffff, 0x01c00002, 0x81000001} {
		_, created := tpm.CreateCounter(t.Context(), token, index)
		_, opened := tpm.OpenCounter(t.Context(), token, index)
		deleted := tpm.DeleteCounter(t.Context(), token, index)
		for name, err := range map[string]error{"create": created, "open": opened, "delete": deleted} {
			if !errors.Is(err, hsm.ErrUnsupported) {
				t.Errorf("%s %#x: error %v, want ErrUnsupported", name, index, err)
			}
		}
	}
}

// TestCounterOfAnotherKind: what tpm2-tools define at an index is not taken for
// a counter of ours, and not deleted.
func TestCounterOfAnotherKind(t *testing.T) {
	tools, err := exec.LookPath("tpm2_nvdefine")
	if err != nil {
		hsmtest.Missing(t, "tpm2-tools is not installed (Debian: apt install tpm2-tools)")
	}
	e := hsmtest.SWTPM(t)
	indices := map[uint32][]string{
		testIndex:     {"-s", "8", "-a", "authread|authwrite|no_da"},
		testIndex + 1: {"-s", "8", "-a", "nt=counter|authread|authwrite"},
		testIndex + 2: {"-s", "8", "-a", "nt=counter|authread|authwrite|no_da|ownerwrite"},
		testIndex + 3: {"-s", "8", "-a", "nt=counter|authread|authwrite|no_da|orderly"},
		testIndex + 4: {"-s", "8", "-a", "nt=counter|authread|authwrite|no_da|policywrite"},
		testIndex + 5: {"-s", "8", "-a", "nt=counter|authread|authwrite|no_da"}, // no first increment
	}
	for index, args := range indices {
		cmd := exec.CommandContext(t.Context(), tools, append([]string{"-C", "o", fmt.Sprintf("%#x", index)}, args...)...)
		cmd.Env = append(cmd.Environ(), "TPM2TOOLS_TCTI=swtpm:path="+e.Socket())
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("tpm2_nvdefine %v: %v: %s", args, err, out)
		}
	}
	token := hsmtest.OpenTPM(t, e.Config(t))
	for index := range indices {
		if _, err := tpm.OpenCounter(t.Context(), token, index); !errors.Is(err, hsm.ErrMismatch) {
			t.Errorf("open %#x: error %v, want ErrMismatch", index, err)
		}
		if _, err := tpm.CreateCounter(t.Context(), token, index); !errors.Is(err, hsm.ErrExists) {
			t.Errorf("create %#x: error %v, want ErrExists", index, err)
		}
		want := hsm.ErrMismatch
		if index == testIndex+5 { // the trace of a creation that was cut off may go
			want = nil
		}
		if err := tpm.DeleteCounter(t.Context(), token, index); !errors.Is(err, want) {
			t.Errorf("delete %#x: error %v, want %v", index, err, want)
		}
	}
}

// TestCounterReplaced: while the TPM was away somebody put another index in the
// counter's place. The open Counter does not take it for its own.
func TestCounterReplaced(t *testing.T) {
	if _, err := exec.LookPath("tpm2_nvdefine"); err != nil {
		hsmtest.Missing(t, "tpm2-tools is not installed (Debian: apt install tpm2-tools)")
	}
	for _, tc := range []struct {
		name string
		args []string // of tpm2_nvdefine; none = the index is only removed
		want error
	}{
		{"removed", nil, hsm.ErrNotFound},
		{"an ordinary index", []string{"-a", "authread|authwrite|no_da"}, hsm.ErrMismatch},
		{"a counter that the owner may write", []string{"-a", "nt=counter|authread|authwrite|no_da|ownerwrite"}, hsm.ErrMismatch},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := hsmtest.SWTPM(t)
			token := hsmtest.OpenTPM(t, e.Config(t))
			c := mustCreate(t, token, testIndex)
			e.Stop(t)
			socket := filepath.Join(e.StateDir(), "..", "other")
			other := exec.CommandContext(t.Context(), "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+e.StateDir(),
				"--server", "type=unixio,path="+socket, "--ctrl", "type=unixio,path="+socket+".ctrl", "--flags", "not-need-init,startup-clear")
			if err := other.Start(); err != nil {
				t.Fatal(err)
			}
			for _, path := range []string{socket, socket + ".ctrl"} {
				until(t, "swtpm listens", func() bool {
					conn, err := net.Dial("unix", path)
					if err == nil {
						_ = conn.Close()
					}
					return err == nil
				})
			}
			run := func(name string, args ...string) {
				cmd := exec.CommandContext(t.Context(), name, append([]string{"-C", "o", fmt.Sprintf("%#x", testIndex)}, args...)...)
				cmd.Env = append(cmd.Environ(), "TPM2TOOLS_TCTI=swtpm:path="+socket)
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("%s: %v: %s", name, err, out)
				}
			}
			run("tpm2_nvundefine")
			if tc.args != nil {
				run("tpm2_nvdefine", append(tc.args, "-s", "8")...)
			}
			_ = other.Process.Kill()
			_ = other.Wait() // killed
			e.Start(t)
			var err error = hsm.ErrLost
			until(t, "an answer of the counter", func() bool {
				_, err = c.Value(t.Context())
				return !errors.Is(err, hsm.ErrLost) && !errors.Is(err, hsm.ErrBusy)
			})
			if !errors.Is(err, tc.want) {
				t.Errorf("value: error %v, want %v", err, tc.want)
			}
			if _, err := c.Advance(t.Context()); !errors.Is(err, tc.want) {
				t.Errorf("advance: error %v, want %v", err, tc.want)
			}
		})
	}
}

// TestCounterWithAnotherAuth: the value of the token's keys opens it, no other.
func TestCounterWithAnotherAuth(t *testing.T) {
	e := hsmtest.SWTPM(t)
	token, err := tpm.Open(t.Context(), e.Config(t))
	if err != nil {
		t.Fatal(err)
	}
	mustCreate(t, token, testIndex)
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	token = hsmtest.OpenTPM(t, e.Config(t)) // another random value
	for range 5 {                           // and no lockout
		if _, err := tpm.OpenCounter(t.Context(), token, testIndex); !errors.Is(err, hsm.ErrPIN) {
			t.Errorf("error %v, want ErrPIN", err)
		}
	}
	if err := token.Err(); err != nil {
		t.Errorf("token: %v", err)
	}
}

// TestCounterWhileLost: a TPM that is away or hangs is ErrLost or ErrBusy within
// the caller's time, and the counter is there again with it.
func TestCounterWhileLost(t *testing.T) {
	e := hsmtest.SWTPM(t)
	token := hsmtest.OpenTPM(t, e.Config(t))
	c := mustCreate(t, token, testIndex)
	first, err := c.Value(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	e.Freeze(t)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Advance(ctx); !errors.Is(err, hsm.ErrLost) && !errors.Is(err, hsm.ErrBusy) {
		t.Errorf("hanging: error %v, want ErrLost or ErrBusy", err)
	}
	e.Thaw(t)
	e.Stop(t)
	if _, err := c.Advance(t.Context()); !errors.Is(err, hsm.ErrLost) && !errors.Is(err, hsm.ErrBusy) {
		t.Errorf("away: error %v, want ErrLost or ErrBusy", err)
	}
	e.Start(t)
	var value uint64
	until(t, "the counter's value", func() bool {
		value, err = c.Value(t.Context())
		return err == nil
	})
	if value < first || value > first+1 { // the hanging advance may have been done
		t.Errorf("counter at %d, was at %d", value, first)
	}
}

func TestCounterConcurrently(t *testing.T) {
	token := hsmtest.OpenSWTPM(t)
	c := mustCreate(t, token, testIndex)
	first, err := c.Value(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	seen := map[uint64]int{}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 5 {
				value, err := c.Advance(context.Background())
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				seen[value]++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	for value := first + 1; value <= first+20; value++ {
		if seen[value] != 1 {
			t.Errorf("value %d was returned %d times", value, seen[value])
		}
	}
}
