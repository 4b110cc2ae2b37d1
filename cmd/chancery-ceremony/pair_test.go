//go:build cgo

package main

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chancery-ca/chancery/ceremony"
)

// TestPairingKilled: a rehearsal that is killed when the practice tokens have
// their wrapping key, and nobody has written down which, is resumed with
// another.
func TestPairingKilled(t *testing.T) {
	needStrace(t)
	r := newRoom(t, nil)
	_, text, _ := strings.Cut(r.read(filepath.Join("testdata", "script", "backup.txtar")), "-- genesis.yaml --\n")
	text, _, _ = strings.Cut(text, "-- drill.yaml --\n")
	def := r.write("backup.yaml", text, 0o600)
	path := filepath.Join("acme", pairingsFolder, ".partial-root-copy.json")
	cmd := exec.CommandContext(t.Context(), "strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync",
		"-P", path, "-P", filepath.Join(r.dir, path), "-e", "inject=fsync:signal=SIGKILL:when=1",
		r.bin, "rehearse", def, "--dir", "acme")
	cmd.Dir, cmd.Env = r.dir, r.env
	if out, err := cmd.CombinedOutput(); err == nil || strings.Contains(string(out), "error:") {
		t.Fatalf("not killed: %v\n%s", err, out)
	}
	state, err := ceremony.ReadStatus(r.out())
	if err != nil {
		t.Fatal(err)
	}
	if step := state.Steps[state.Done].Kind; step != ceremony.StepInventory {
		t.Fatalf("killed in %s, want %s", step, ceremony.StepInventory)
	}
	if out, err := r.command("resume", r.out()).CombinedOutput(); err != nil {
		t.Fatalf("resume: %v\n%s", err, out)
	}
	if err := ceremony.Verify(r.out()).Err(); err != nil {
		t.Error(err)
	}
}
