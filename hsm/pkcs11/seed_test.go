package pkcs11_test

import (
	"errors"
	"testing"

	p11 "github.com/miekg/pkcs11"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

func TestSeedRandom(t *testing.T) {
	shim := hsmtest.NewShim(t)
	defer shim.Reset()
	tok := hsmtest.OpenSoftHSM(t, shim.NewToken(t))
	for _, tc := range []struct {
		name string
		code uint // that the token answers
		want error
	}{
		{"taken", p11.CKR_OK, nil},
		{"not supported", p11.CKR_RANDOM_SEED_NOT_SUPPORTED, hsm.ErrUnsupported},
		{"no generator", p11.CKR_RANDOM_NO_RNG, hsm.ErrUnsupported},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.code != p11.CKR_OK {
				shim.Fail(hsmtest.SeedRandom, tc.code, 1)
			}
			before := shim.Calls(hsmtest.SeedRandom)
			if err := tok.SeedRandom(t.Context(), []byte("seed")); !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
			if n := shim.Calls(hsmtest.SeedRandom) - before; n != 1 {
				t.Errorf("the token was asked %d times", n)
			}
		})
	}
}
