package pkcs11_test

import (
	"encoding/hex"
	"errors"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	p11 "github.com/miekg/pkcs11"
)

func TestDestroy(t *testing.T) {
	token := hsmtest.OpenSoftHSM(t, hsmtest.NewSoftHSM(t))
	other := hsmtest.OpenSoftHSM(t, hsmtest.NewSoftHSM(t))
	key, kept := hsmtest.NewKey(t, token, "condemned", hsm.ECDSAP256), hsmtest.NewKey(t, token, "kept", hsm.ECDSAP256)
	c, err := token.Condemn(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Condemn(t.Context(), key); err == nil {
		t.Error("another token condemns it")
	}
	keptC, err := token.Condemn(t.Context(), kept)
	if err != nil {
		t.Fatal(err)
	}
	with := func(change func(*hsm.Condemned)) hsm.Condemned {
		d := c
		change(&d)
		return d
	}
	for _, tc := range []struct {
		name string
		c    hsm.Condemned
		want error
	}{
		{"in another token", with(func(c *hsm.Condemned) { c.Token.Serial = "0" }), hsm.ErrMismatch},
		{"without an id", with(func(c *hsm.Condemned) { c.ID = "" }), hsm.ErrMismatch},
		{"with an id of nobody", with(func(c *hsm.Condemned) { c.ID = hex.EncodeToString(hsmtest.RandomID()) }), hsm.ErrNotFound},
		{"with the id of another", with(func(c *hsm.Condemned) { c.ID = keptC.ID }), hsm.ErrMismatch},
		{"with the hash of another", with(func(c *hsm.Condemned) { c.SPKI = keptC.SPKI }), hsm.ErrMismatch},
		{"without a hash", with(func(c *hsm.Condemned) { c.SPKI = "" }), hsm.ErrMismatch},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := token.Destroy(t.Context(), tc.c); !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
		})
	}
	if n, err := token.Keys(t.Context()); n != 2 || err != nil {
		t.Fatalf("%d keys (%v) after what was refused, want 2", n, err)
	}
	// An interruption leaves the public half.
	lib, session := rawSession(t, token)
	for _, object := range rawFind(t, lib, session, p11.CKO_PRIVATE_KEY, "condemned") {
		if err := lib.DestroyObject(session, object); err != nil {
			t.Fatal(err)
		}
	}
	if err := token.Destroy(t.Context(), c); err != nil {
		t.Errorf("the half that was left: %v", err)
	}
	if err := token.Destroy(t.Context(), keptC); err != nil {
		t.Errorf("a whole pair: %v", err)
	}
	for _, d := range []hsm.Condemned{c, keptC} {
		id, err := hex.DecodeString(d.ID)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := token.Find(t.Context(), id); !errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("%s after: %v, want ErrNotFound", d.Label, err)
		}
		if err := token.Destroy(t.Context(), d); !errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("%s again: %v, want ErrNotFound", d.Label, err)
		}
	}
}
