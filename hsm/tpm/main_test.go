package tpm_test

import (
	"fmt"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// TestMain fails the run if a goroutine outlives the tests: a worker, a watch or
// a supervisor of a token that was closed. In a process that a test starts to
// kill it, it destroys a key.
func TestMain(m *testing.M) {
	if text := os.Getenv(condemnedHere); text != "" {
		if err := destroyHere(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(destroyFailed)
		}
		os.Exit(0)
	}
	status := m.Run()
	for began := time.Now(); status == 0; {
		err := goleak.Find() // waits a second or so
		if err == nil {
			break
		}
		if time.Since(began) > patience {
			fmt.Fprintln(os.Stderr, err)
			status = 1
		}
	}
	os.Exit(status)
}
