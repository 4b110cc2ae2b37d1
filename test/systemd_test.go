package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// exposure is the most that `systemd-analyze security` may find in the unit,
// in tenths (0 to 100).
const exposure = "20"

func TestSystemdUnit(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is not installed")
	}
	raw, err := os.ReadFile("../systemd/chancery.service")
	if err != nil {
		t.Fatal(err)
	}
	// verify wants the program to exist; the test does not install it.
	const program = "ExecStart=/usr/bin/chancery "
	if !strings.Contains(string(raw), program) {
		t.Fatalf("the unit has no line %q", program)
	}
	unit := filepath.Join(t.TempDir(), "chancery.service")
	installed := strings.Replace(string(raw), program, "ExecStart=/bin/true ", 1)
	if err := os.WriteFile(unit, []byte(installed), 0o600); err != nil {
		t.Fatal(err)
	}
	r := command(t, nil, analyze, "verify", unit)
	if r.code != 0 || strings.TrimSpace(r.stdout+r.stderr) != "" {
		t.Errorf("systemd-analyze verify: exit status %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	if r := command(t, nil, analyze, "security", "--offline=true", "--threshold="+exposure, unit); r.code != 0 {
		t.Errorf("the unit is more exposed than %s/100:\n%s", exposure, r.stdout)
	}
}
