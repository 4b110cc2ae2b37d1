package hsmtest_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
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
	if _, err := first.Open(t.Context(), key.Ref()); err != nil {
		t.Fatal(err)
	}
	if _, err := second.Open(t.Context(), key.Ref()); err == nil {
		t.Fatal("the second token opened the first one's key")
	}
}
