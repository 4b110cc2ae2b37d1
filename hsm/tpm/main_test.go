package tpm_test

import (
	"testing"

	"go.uber.org/goleak"
)

// TestMain fails the run if a goroutine outlives the tests: a worker, a watch or
// a supervisor of a token that was closed.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
