package hsmtest_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
)

func TestSoftHSM(t *testing.T) {
	first := hsmtest.SoftHSM(t)
	key := hsmtest.NewKey(t, first, "one", hsm.ECDSAP256)
	second := hsmtest.SoftHSM(t) // while the first is open
	if n, err := second.Keys(t.Context()); err != nil || n != 0 {
		t.Fatalf("Keys of a fresh token = %d, %v; want 0", n, err)
	}
	digest := sha256.Sum256([]byte("hello"))
	sig, err := key.Sign(nil, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	if !ecdsa.VerifyASN1(key.Public().(*ecdsa.PublicKey), digest[:], sig) {
		t.Fatal("signature does not verify")
	}
	if _, err := first.Open(t.Context(), key.Ref(), hsm.RoleNone); err != nil {
		t.Fatal(err)
	}
	if _, err := second.Open(t.Context(), key.Ref(), hsm.RoleNone); err == nil {
		t.Fatal("the second token opened the first one's key")
	}
}

// TestConformance runs the suite on SoftHSM itself; hsm/pkcs11 runs it on
// SoftHSM behind the shim.
func TestConformance(t *testing.T) {
	hsmtest.Conformance(t, func(t *testing.T) hsmtest.Device {
		return hsmtest.NewSoftHSM(t).Device(pkcs11.Config{}, nil)
	})
}

func TestCounting(t *testing.T) {
	key := &hsmtest.Counting{Key: hsmtest.SoftwareKey(hsm.ECDSAP384)}
	for range 3 {
		if _, err := key.Sign(nil, make([]byte, 48), crypto.SHA384); err != nil {
			t.Fatal(err)
		}
	}
	if key.Count() != 3 {
		t.Errorf("Count = %d, want 3", key.Count())
	}
}

func TestFailing(t *testing.T) {
	key := &hsmtest.Failing{Key: hsmtest.SoftwareKey(hsm.ECDSAP256)}
	key.Fail(hsm.ErrLost)
	if _, err := key.Sign(nil, make([]byte, 32), crypto.SHA256); !errors.Is(err, hsm.ErrLost) {
		t.Errorf("error %v, want ErrLost", err)
	}
	key.Fail(nil)
	if _, err := key.Sign(nil, make([]byte, 32), crypto.SHA256); err != nil {
		t.Error(err)
	}
}
