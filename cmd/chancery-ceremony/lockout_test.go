//go:build cgo

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/tpm"
)

// TestLockout: parameters and value are set once, changed with the present value
// alone, and nothing is tried that would keep us out.
func TestLockout(t *testing.T) {
	e := hsmtest.SWTPM(t)
	value := func(name, text string) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, []byte(text), 0o400); err != nil {
			t.Fatal(err)
		}
		return path
	}
	const secret = "a-value-for-the-safe-4711"
	first, short := value("first", secret), value("short", "short")
	long, other := value("long", strings.Repeat("x", 33)), value("other", "another-value-4711-0815")
	for _, row := range []struct {
		name   string
		args   []string
		status int
		says   string
		want   tpm.LockoutState
	}{
		{"no tries", []string{"--tries", "0"}, exitFailed, "no protection", tpm.LockoutState{}},
		{"a short value", []string{"--value-file", short}, exitFailed, "want 16", tpm.LockoutState{}},
		{"a long value", []string{"--value-file", long}, exitFailed, "want 16 to 32", tpm.LockoutState{}},
		{"a value that is not set", []string{"--current-file", first}, exitFailed, "does not fit", tpm.LockoutState{}},
		{
			"parameters alone", []string{"--tries", "5"}, 0, "it is empty",
			tpm.LockoutState{Lockout: tpm.Lockout{MaxTries: 5, Recovery: 10 * time.Minute, LockoutRecovery: 24 * time.Hour}},
		},
		{
			"a value", []string{"--value-file", first, "--recovery", "20m"}, 0, "31 wrong values lock, one is forgotten every 20m0s",
			tpm.LockoutState{Lockout: tpm.Lockout{MaxTries: 31, Recovery: 20 * time.Minute, LockoutRecovery: 24 * time.Hour}, AuthSet: true},
		},
		{"the value is not given", []string{"--tries", "5"}, exitFailed, "does not fit", tpm.LockoutState{}},
		{
			"the value is given", []string{"--tries", "7", "--current-file", first}, 0, "7 wrong values",
			tpm.LockoutState{Lockout: tpm.Lockout{MaxTries: 7, Recovery: 10 * time.Minute, LockoutRecovery: 24 * time.Hour}, AuthSet: true},
		},
		{"a wrong value", []string{"--current-file", other}, exitRefused, "lockout", tpm.LockoutState{}},
	} {
		t.Run(row.name, func(t *testing.T) {
			before, err := tpm.ReadLockout(t.Context(), e.Socket())
			if err != nil {
				t.Fatal(err)
			}
			var stdout, stderr bytes.Buffer
			if got := run(t.Context(), append([]string{"lockout", e.Socket()}, row.args...), &stdout, &stderr); got != row.status {
				t.Fatalf("exit status %d, want %d\n%s%s", got, row.status, &stdout, &stderr)
			}
			text := strings.Join(strings.Fields(stdout.String()+stderr.String()), " ")
			if !strings.Contains(text, row.says) {
				t.Errorf("missing %q in:\n%s", row.says, text)
			}
			if strings.Contains(text, secret) {
				t.Error("the value is in the output")
			}
			if row.status != 0 {
				row.want = before
			}
			after, err := tpm.ReadLockout(t.Context(), e.Socket())
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(row.want, after); diff != "" {
				t.Errorf("lockout (-want +got):\n%s", diff)
			}
		})
	}
}
