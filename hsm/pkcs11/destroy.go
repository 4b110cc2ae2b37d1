package pkcs11

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/miekg/pkcs11"
)

var _ hsm.Destroyer = (*Token)(nil)

// Condemn implements hsm.Destroyer.
func (t *Token) Condemn(_ context.Context, k hsm.Key) (hsm.Condemned, error) {
	own, err := t.own(k)
	if err != nil {
		return hsm.Condemned{}, fmt.Errorf("condemn key: %w", err)
	}
	return hsm.Condemned{
		Token: t.Info().Device(), Label: own.label, ID: hex.EncodeToString(own.id), SPKI: hex.EncodeToString(own.ref.SPKI[:]),
	}, nil
}

// Destroy implements hsm.Destroyer (PKCS #11 v2.40, Section 5.7,
// C_DestroyObject). The private half goes first: what an interruption leaves is
// a public key.
func (t *Token) Destroy(ctx context.Context, c hsm.Condemned) error {
	if c.Token != t.Info().Device() {
		return fmt.Errorf("destroy key %.40q: condemned in token %.40q: %w", c.Label, c.Token.Label, hsm.ErrMismatch)
	}
	id, err := hex.DecodeString(c.ID)
	if err != nil || len(id) != hsm.IDSize {
		return fmt.Errorf("destroy key %.40q: id %.40q: %w", c.Label, c.ID, hsm.ErrMismatch)
	}
	spki, err := hsm.ParseSPKIHash(c.SPKI)
	if err != nil {
		return fmt.Errorf("destroy key %.40q: %w: %w", c.Label, hsm.ErrMismatch, err)
	}
	err = t.do(ctx, hsm.ShareRest, false, func(conn *connection) error {
		return conn.withAdmin(func(s pkcs11.SessionHandle) error { return conn.destroy(s, id, spki) })
	})
	if err != nil {
		return fmt.Errorf("destroy key %.40q in %s: %w", c.Label, t.uri, err)
	}
	return nil
}

// destroy destroys the pair with this id and public key, or the half of it that
// is left, and looks again.
func (c *connection) destroy(s pkcs11.SessionHandle, id []byte, spki [32]byte) error {
	private, err := c.find(s, pkcs11.CKO_PRIVATE_KEY, "", id)
	if err != nil {
		return err
	}
	public, err := c.find(s, pkcs11.CKO_PUBLIC_KEY, "", id)
	if err != nil {
		return err
	}
	switch {
	case len(private) > 1 || len(public) > 1:
		return fmt.Errorf("%d private and %d public objects have the id: %w", len(private), len(public), hsm.ErrAmbiguous)
	case len(private)+len(public) == 0:
		return hsm.ErrNotFound
	case len(public) == 0:
		return fmt.Errorf("the public half is missing, so nobody knows whose the private one is: %w", hsm.ErrMismatch)
	}
	pub, err := c.publicKey(s, public[0])
	if err != nil {
		return err
	}
	if have, err := hsm.SPKIHash(pub); err != nil || have != spki {
		return fmt.Errorf("another key has the id: %w", errors.Join(hsm.ErrMismatch, err))
	}
	for _, object := range append(private, public...) {
		if err := c.raw.DestroyObject(s, object); err != nil {
			return fmt.Errorf("C_DestroyObject: %w", refused(err, map[pkcs11.Error]error{
				pkcs11.CKR_ACTION_PROHIBITED: hsm.ErrPolicy, pkcs11.CKR_OBJECT_HANDLE_INVALID: hsm.ErrNotFound,
			}))
		}
	}
	for _, class := range []uint{pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_PUBLIC_KEY} {
		left, err := c.find(s, class, "", id)
		if err != nil {
			return err
		}
		if len(left) > 0 {
			return fmt.Errorf("the token still has it: %w", hsm.ErrPolicy)
		}
	}
	return nil
}
