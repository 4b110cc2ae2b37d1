package pkcs11_test

import (
	"errors"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
	p11 "github.com/miekg/pkcs11"
)

// TestChangePIN: which PIN the token has after every fault, how many were tried,
// and that a repeated change ends the first.
func TestChangePIN(t *testing.T) {
	const next = "the-next-pin-0815"
	for _, row := range []struct {
		name    string
		change  func(c *pkcs11.PINChange)
		fault   func(s *hsmtest.Shim)
		begun   bool // the new PIN is there: an earlier call was cut off after C_SetPIN
		want    error
		already bool
		logins  int
		changed bool // at the end
	}{
		{name: "at once", logins: 2, changed: true},
		{name: "cut off before", change: func(c *pkcs11.PINChange) { c.Begun = true }, logins: 3, changed: true},
		{name: "cut off after", change: func(c *pkcs11.PINChange) { c.Begun = true }, begun: true, already: true, logins: 1, changed: true},
		{name: "cut off after, and not said", begun: true, want: hsm.ErrPIN, logins: 1, changed: true},
		{name: "a wrong old PIN", change: func(c *pkcs11.PINChange) { c.Old = []byte("wrong-pin") }, want: hsm.ErrPIN, logins: 1},
		{name: "the same PIN", change: func(c *pkcs11.PINChange) { c.New = c.Old }, want: hsm.ErrPIN},
		{name: "a short PIN", change: func(c *pkcs11.PINChange) { c.New = []byte("1") }, want: hsm.ErrPIN},
		{name: "no PIN", change: func(c *pkcs11.PINChange) { c.New = nil }, want: hsm.ErrPIN},
		{name: "no such token", change: func(c *pkcs11.PINChange) { c.URI = "pkcs11:token=nobody" }, want: hsm.ErrNotFound},
		{name: "a URI with a PIN", change: func(c *pkcs11.PINChange) { c.URI += "?pin-value=1234" }, want: pkcs11.ErrURI},
		{name: "a flag that forbids a try", fault: func(s *hsmtest.Shim) { s.TokenFlags(p11.CKF_USER_PIN_COUNT_LOW) }, want: hsm.ErrPIN},
		{name: "a locked PIN", fault: func(s *hsmtest.Shim) { s.Fail(hsmtest.Login, p11.CKR_PIN_LOCKED, 1) },
			change: func(c *pkcs11.PINChange) { c.Begun = true }, want: hsm.ErrPIN, logins: 1},
		{name: "lost before C_SetPIN", fault: func(s *hsmtest.Shim) { s.Fail(hsmtest.SetPIN, p11.CKR_DEVICE_REMOVED, 1) }, want: hsm.ErrLost, logins: 1},
		{name: "lost after C_SetPIN", fault: func(s *hsmtest.Shim) { s.FailAfter(hsmtest.SetPIN, p11.CKR_DEVICE_REMOVED, 1) }, want: hsm.ErrLost, logins: 1, changed: true},
		{name: "no C_SetPIN", fault: func(s *hsmtest.Shim) { s.Fail(hsmtest.SetPIN, p11.CKR_FUNCTION_NOT_SUPPORTED, 1) }, want: hsm.ErrUnsupported, logins: 1},
		{name: "neither PIN", fault: func(s *hsmtest.Shim) { s.RefusePIN(3) },
			change: func(c *pkcs11.PINChange) { c.Begun = true }, want: hsm.ErrPIN, logins: 2},
		{name: "neither PIN, and one try left", fault: func(s *hsmtest.Shim) { s.RefusePIN(2) },
			change: func(c *pkcs11.PINChange) { c.Begun = true }, want: hsm.ErrPIN, logins: 1},
		{name: "lost before", fault: func(s *hsmtest.Shim) { s.Fail(hsmtest.Login, p11.CKR_DEVICE_REMOVED, 1) }, want: hsm.ErrLost, logins: 1},
		{name: "lost before it is proved", fault: func(s *hsmtest.Shim) { s.FailLater(hsmtest.Login, p11.CKR_DEVICE_REMOVED, 1, 1) }, want: hsm.ErrLost, logins: 2, changed: true},
	} {
		t.Run(row.name, func(t *testing.T) {
			shim := hsmtest.NewShim(t)
			defer shim.Reset()
			token := shim.NewToken(t)
			c := pkcs11.PINChange{Module: token.Module, URI: token.URI, Old: token.PIN, New: []byte(next)}
			if row.begun {
				if _, err := pkcs11.ChangePIN(t.Context(), c); err != nil {
					t.Fatal(err)
				}
				shim.Reset()
			}
			if row.change != nil {
				row.change(&c)
			}
			if row.fault != nil {
				row.fault(shim)
			}
			already, err := pkcs11.ChangePIN(t.Context(), c)
			if !errors.Is(err, row.want) || row.want == nil && err != nil || already != row.already {
				t.Fatalf("already %t, error %v; want %t, %v", already, err, row.already, row.want)
			}
			if n := shim.Logins(); n != row.logins {
				t.Errorf("%d logins, want %d", n, row.logins)
			}
			shim.Reset()
			pin := token.PIN
			if row.changed {
				pin = []byte(next)
			}
			opened, err := pkcs11.Open(t.Context(), pkcs11.Config{Module: token.Module, URI: token.URI, PIN: pin})
			if row.want != nil && row.logins > 0 && errors.Is(err, hsm.ErrPIN) {
				// A wrong try left its mark: the flag, which a person clears.
				c := pkcs11.PINChange{Module: token.Module, URI: token.URI, Old: pin, New: []byte("another-one-42")}
				if _, err := pkcs11.ChangePIN(t.Context(), c); !errors.Is(err, hsm.ErrPIN) {
					t.Errorf("the flag of a wrong try is overlooked: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatalf("the PIN is not the one that it should be: %v", err)
			}
			defer func() { _ = opened.Close() }()
			_, err = pkcs11.ChangePIN(t.Context(), pkcs11.PINChange{Module: token.Module, URI: token.URI, Old: pin, New: []byte("another-one-42")})
			wants(t, token, "change of an open token's PIN", err, pkcs11.ErrOpen)
		})
	}
}
