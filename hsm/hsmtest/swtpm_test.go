package hsmtest_test

import (
	"testing"

	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/tpm"
)

// TestConformanceSWTPM runs the suite on an emulated TPM; hsm/tpm runs it with
// its logs watched.
func TestConformanceSWTPM(t *testing.T) {
	hsmtest.Conformance(t, func(t *testing.T) hsmtest.Device {
		return hsmtest.SWTPM(t).Device(t, tpm.Config{})
	})
}
