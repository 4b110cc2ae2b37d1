package memory_test

import (
	"os"
	"os/exec"
	"testing"

	"github.com/chancery-ca/chancery/cmd/internal/memory"
	"golang.org/x/sys/unix"
)

// TestSeal seals a process of its own: what is sealed stays so.
func TestSeal(t *testing.T) {
	if os.Getenv("CHANCERY_TEST_SEAL") == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestSeal$")
		cmd.Env = append(os.Environ(), "CHANCERY_TEST_SEAL=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	if err := memory.Seal(); err != nil {
		t.Fatal(err)
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &limit); err != nil || limit.Cur != 0 || limit.Max != 0 {
		t.Errorf("core limit %+v, %v; want 0", limit, err)
	}
	if dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil || dumpable != 0 {
		t.Errorf("dumpable is %d, %v; want 0", dumpable, err)
	}
	if err := memory.Seal(); err != nil {
		t.Errorf("again: %v", err)
	}
}
