//go:build cgo

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chancery-ca/chancery/ceremony"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

func needStrace(t *testing.T) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "strace", "-f", "-o", "/dev/null", "true").CombinedOutput(); err != nil {
		hsmtest.Missing(t, fmt.Sprintf("strace is not installed, or does not work here: %v %s", err, out))
	}
}

// A ceremony that is killed at an fsync, before the kernel has carried it out,
// and resumed, ends with exactly one key for each name and with outputs that
// verify. CHANCERY_FAULTS=all kills at every one; without it, at a few.
func TestKilledAtFsync(t *testing.T) {
	needStrace(t)
	r := newRoom(t, nil)
	at := func(n int) int { return n * (n + 1) / 2 } // 1, 3, 6, 10, …
	limit := 6
	if os.Getenv("CHANCERY_FAULTS") == "all" {
		at, limit = func(n int) int { return n }, 1000
	}
	for i := 1; i <= limit; i++ {
		if !killedAt(t, r, at(i)) {
			if i < 5 {
				t.Errorf("only %d kills", i-1)
			}
			return
		}
	}
}

// killedAt kills a rehearsal at its n-th fsync, resumes it and checks what came
// of it. It returns false if the rehearsal ended before.
func killedAt(t *testing.T, r *room, n int) bool {
	t.Helper()
	dir := filepath.Join(r.dir, fmt.Sprintf("kill-%d", n))
	cmd := exec.CommandContext(t.Context(), "strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync",
		"-e", fmt.Sprintf("inject=fsync:signal=SIGKILL:when=%d", n), r.bin, "rehearse", r.def, "--dir", dir)
	cmd.Dir, cmd.Env = r.dir, append(r.env, "GOMAXPROCS=1")
	out, err := cmd.CombinedOutput()
	if err == nil {
		return false
	}
	outputs := filepath.Join(dir, "out")
	args := []string{"resume", outputs}
	if _, err := ceremony.OpenFolder(outputs); errors.Is(err, ceremony.ErrNotBegun) {
		args = []string{"rehearse", r.def, "--dir", dir} // it begins again
	}
	if again, err := r.command(args...).CombinedOutput(); err != nil {
		if bytes.Contains(again, []byte(ceremony.ErrStopped.Error())) && bytes.Contains(again, []byte("abort")) {
			t.Logf("kill %d: half a pair was left: in quarantine", n)
			return true
		}
		t.Errorf("killed at fsync %d:\n%s\nresume: %v\n%s", n, out, err, again)
		return true
	}
	if err := ceremony.Verify(outputs).Err(); err != nil {
		t.Errorf("killed at fsync %d: %v", n, err)
	}
	objects, err := filepath.Glob(filepath.Join(dir, tokensFolder, "tokens", "*", "*.object"))
	if err != nil {
		t.Fatal(err)
	}
	const tokens, keys = 2, 6 // a token has an object of its own, a key two
	if len(objects) != tokens+2*keys {
		t.Errorf("killed at fsync %d: %d objects in the tokens, want %d", n, len(objects), tokens+2*keys)
	}
	return true
}

// A run that finds another definition than the one that was planned is refused
// by everyone's paper (see TestProductionRefused), and a resumed one by the
// transcript, which also says which program it is.
func TestDefinitionChanged(t *testing.T) {
	r := newRoom(t, nil)
	d := r.run()
	r.arrive(d, "ca1", "w1", "w2")
	d.wait(`as\s+HH:MM:\s+> `)
	d.interrupt()
	d.exit()
	if err := os.Mkdir(filepath.Join(r.dir, "other"), 0o700); err != nil {
		t.Fatal(err)
	}
	other := exec.CommandContext(t.Context(), r.write(filepath.Join("other", program), r.read(r.bin)+"\n", 0o700), "resume", r.out())
	other.Dir, other.Env = r.dir, r.env
	if out, err := other.CombinedOutput(); err == nil || !bytes.Contains(out, []byte(ceremony.ErrProgram.Error())) || !bytes.Contains(out, []byte("hint: go on with the program that began it")) {
		t.Errorf("resume with another program: %v\n%s", err, out)
	}
	copied := filepath.Join(r.out(), "definition.yaml")
	text := strings.Replace(r.read(copied), "years: 10", "years: 20", 1)
	if err := os.WriteFile(copied, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := r.command("resume", r.out()).CombinedOutput()
	if err == nil || !bytes.Contains(out, []byte("not the one that the ceremony began with")) {
		t.Errorf("resume: %v\n%s", err, out)
	}
}
