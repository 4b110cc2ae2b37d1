package hsm_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"encoding/asn1"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// signature encodes r and s (RFC 3279, 2.2.3).
func signature(t *testing.T, r, s int64) []byte {
	t.Helper()
	der, err := asn1.Marshal(struct{ R, S *big.Int }{big.NewInt(r), big.NewInt(s)})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestDistinctR(t *testing.T) {
	sig := func(r, s int64) []byte { return signature(t, r, s) }
	rows := []struct {
		name       string
		signatures [][]byte
		ok         bool
	}{
		{"none", nil, true},
		{"one", [][]byte{sig(1, 1)}, true},
		{"different r, one s", [][]byte{sig(1, 7), sig(2, 7), sig(3, 7)}, true},
		{"r of one is s of another", [][]byte{sig(1, 2), sig(2, 1)}, true},
		{"the same signature", [][]byte{sig(1, 1), sig(1, 1)}, false},
		{"one r, different s", [][]byte{sig(1, 1), sig(1, 2)}, false},
		{"first and last", [][]byte{sig(9, 1), sig(2, 2), sig(3, 3), sig(9, 4)}, false},
		{"a negative r", [][]byte{sig(5, 1), sig(-5, 1)}, false},
		{"not DER", [][]byte{sig(1, 1), make([]byte, 64)}, false},
		{"empty", [][]byte{{}}, false},
		{"an octet more", [][]byte{append(sig(1, 1), 0)}, false},
	}
	for _, row := range rows {
		err := hsm.DistinctR(row.signatures)
		if row.ok && err != nil || !row.ok && !errors.Is(err, hsm.ErrBadSignature) {
			t.Errorf("%s: %v", row.name, err)
		}
	}
}

func FuzzDistinctR(f *testing.F) {
	f.Add([]byte{0x30, 6, 2, 1, 1, 2, 1, 1}, []byte{0x30, 6, 2, 1, 2, 2, 1, 1})
	f.Add([]byte{}, []byte{0x30})
	f.Fuzz(func(t *testing.T, a, b []byte) {
		err := hsm.DistinctR([][]byte{a, b})
		if err != nil && !errors.Is(err, hsm.ErrBadSignature) {
			t.Errorf("error %v", err)
		}
		if err == nil && bytes.Equal(a, b) {
			t.Error("a signature differs from itself")
		}
	})
}

func TestProve(t *testing.T) {
	now := time.Date(2026, 11, 22, 12, 0, 0, 5, time.FixedZone("east", 7200))
	for _, algorithm := range []hsm.Algorithm{hsm.ECDSAP256, hsm.ECDSAP384} {
		key := hsmtest.SoftwareKey(algorithm)
		for name, prove := range map[string]func(context.Context, hsm.Key, time.Time) (hsm.Proof, error){"Prove": hsm.Prove, "SelfTest": hsm.SelfTest} {
			proof, err := prove(t.Context(), key, now)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			h := algorithm.Hash().New()
			h.Write([]byte(proof.Text))
			if err := hsm.Verify(key.Public().(*ecdsa.PublicKey), h.Sum(nil), proof.Signature); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if !strings.HasSuffix(proof.Text, "at 2026-11-22T10:00:00.000000005Z") {
				t.Errorf("%s: text %q", name, proof.Text)
			}
		}
	}
}
