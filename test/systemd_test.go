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

// TestSystemdUnit checks the unit as it is, and with the drop-in for a TPM.
func TestSystemdUnit(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is not installed")
	}
	for _, row := range []struct{ name, dropIn string }{
		{"alone", ""},
		{"with a TPM", "tpm.conf"},
	} {
		t.Run(row.name, func(t *testing.T) {
			unit := installUnit(t, row.dropIn)
			r := command(t, nil, analyze, "verify", unit)
			if r.code != 0 || strings.TrimSpace(r.stdout+r.stderr) != "" {
				t.Errorf("systemd-analyze verify: exit status %d\n%s%s", r.code, r.stdout, r.stderr)
			}
			if r := command(t, nil, analyze, "security", "--offline=true", "--threshold="+exposure, unit); r.code != 0 {
				t.Errorf("the unit is more exposed than %s/100:\n%s", exposure, r.stdout)
			}
		})
	}
}

// installUnit puts the unit, and a drop-in if there is one, where systemd looks
// for them.
func installUnit(t *testing.T, dropIn string) string {
	t.Helper()
	text := string(mustRead(t, "../systemd/chancery.service"))
	// verify wants the program to exist; the test does not install it.
	const program = "ExecStart=/usr/bin/chancery "
	if !strings.Contains(text, program) {
		t.Fatalf("the unit has no line %q", program)
	}
	text = strings.Replace(text, program, "ExecStart=/bin/true ", 1)
	unit := filepath.Join(t.TempDir(), "chancery.service")
	if err := os.WriteFile(unit, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if dropIn == "" {
		return unit
	}
	more := mustRead(t, filepath.Join("../systemd/chancery.service.d", dropIn))
	for _, line := range []string{"DeviceAllow=/dev/tpmrm0 rw", "DevicePolicy=closed", "SupplementaryGroups=tss"} {
		if !strings.Contains(string(more), "\n"+line+"\n") {
			t.Errorf("%s has no line %q", dropIn, line)
		}
	}
	if err := os.Mkdir(unit+".d", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(unit+".d", dropIn), more, 0o600); err != nil {
		t.Fatal(err)
	}
	return unit
}
