package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/miekg/pkcs11"
)

// unseedable are the answers of a token that takes no seed.
var unseedable = []pkcs11.Error{
	pkcs11.CKR_RANDOM_SEED_NOT_SUPPORTED, pkcs11.CKR_RANDOM_NO_RNG, pkcs11.CKR_FUNCTION_NOT_SUPPORTED,
}

// SeedRandom mixes octets into the token's random number generator
// (PKCS #11 v2.40, Section 5.16, C_SeedRandom). A token that does not take any
// is hsm.ErrUnsupported. Errors also: hsm.ErrLost, hsm.ErrBusy.
func (t *Token) SeedRandom(ctx context.Context, seed []byte) error {
	seed = slices.Clone(seed)
	err := t.do(ctx, hsm.ShareRest, true, func(c *connection) error {
		return c.withAdmin(func(s pkcs11.SessionHandle) error {
			err := c.raw.SeedRandom(s, seed)
			var code pkcs11.Error
			if errors.As(err, &code) && slices.Contains(unseedable, code) {
				return hsm.ErrUnsupported
			}
			return err
		})
	})
	if err != nil {
		return fmt.Errorf("seed random source of %s: %w", t.uri, err)
	}
	return nil
}
