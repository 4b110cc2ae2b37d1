package pkcs11

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/miekg/pkcs11"
)

// PINChange says which user PIN becomes which.
type PINChange struct {
	// Module and URI are as in Config.
	Module, URI string
	// Old is the PIN, New what it becomes. ChangePIN does not clear them.
	Old, New []byte
	// Begun says that an earlier call with the same New may have been cut off
	// in the act, so that New may be the PIN already. It is then tried first.
	Begun bool
}

// changeTimeout bounds ChangePIN, which logs in three times at most.
const changeTimeout = time.Minute

// ChangePIN changes the user PIN of a token (PKCS #11 v2.40, Section 5.5,
// C_SetPIN) and proves the new one by a login. It returns whether the new PIN
// was there before the call: no token says which of two PINs it has, so after an
// interruption the new one is tried and then, if it is refused, the old one.
// That is the one case in which a second PIN is sent; a token that has but one
// try left after the first is left alone. Repeated with Begun, ChangePIN ends
// what an earlier call began, at whatever point that was cut off.
//
// The token must not be open in this process (ErrOpen): it is logged in with the
// old PIN there. Errors: ErrPIN (a PIN was refused, or is too short or too long,
// or New is Old, or a flag forbids a try), ErrNotFound, ErrAmbiguous, ErrURI,
// ErrUnsupported (the token has no C_SetPIN), ErrBusy, ErrLost (it is not known
// which PIN the token has: repeat with Begun).
func ChangePIN(ctx context.Context, c PINChange) (bool, error) {
	u, err := parseURI(c.URI)
	if err != nil {
		return false, fmt.Errorf("change PIN: %w", err)
	}
	m, err := moduleFor(c.Module)
	if err != nil {
		return false, fmt.Errorf("change PIN: %w", err)
	}
	if bytes.Equal(c.Old, c.New) {
		return false, fmt.Errorf("change PIN of %s: the new one is the old one: %w", u, hsm.ErrPIN)
	}
	c.Old, c.New = slices.Clone(c.Old), slices.Clone(c.New) // an abandoned call goes on
	var already bool
	ctx, cancel := context.WithTimeout(ctx, changeTimeout)
	defer cancel()
	err = m.exclusive(ctx, func() error {
		defer func() { clear(c.Old); clear(c.New) }()
		return m.initialised(func() (err error) {
			already, err = m.changePIN(u, c)
			return err
		})
	}, func() {})
	if err != nil {
		return false, fmt.Errorf("change PIN of %s: %w", u, err)
	}
	return already, nil
}

// changePIN does ChangePIN's work; the caller holds lock and the library is
// initialised.
func (m *module) changePIN(u uri, c PINChange) (already bool, err error) {
	info, _, err := m.locate(u)
	if err != nil {
		return false, err
	}
	for t := range m.tokens {
		if t.Info().Device() == info.Device() {
			return false, ErrOpen
		}
	}
	if err := checkPINFlags(info); err != nil {
		return false, err
	}
	if err := m.checkPINSize(info.Slot, c.New); err != nil {
		return false, err
	}
	if err := m.clear(info.Slot); err != nil {
		return false, err
	}
	if c.Begun {
		err := m.withUser(info.Slot, c.New, func(pkcs11.SessionHandle) error { return nil })
		if err == nil {
			return true, nil
		}
		if err := m.mayTryAgain(u, err); err != nil {
			return false, err
		}
	}
	err = m.withUser(info.Slot, c.Old, func(s pkcs11.SessionHandle) error {
		if err := m.handle().SetPIN(s, string(c.Old), string(c.New)); err != nil {
			return fmt.Errorf("C_SetPIN: %w", classify(err))
		}
		return nil
	})
	if err != nil {
		return false, err
	}
	err = m.withUser(info.Slot, c.New, func(pkcs11.SessionHandle) error { return nil })
	if err != nil {
		return false, fmt.Errorf("prove the new PIN, which the token took: %w", err)
	}
	return false, nil
}

// checkPINSize holds a new PIN against the token's limits.
func (m *module) checkPINSize(slot uint, pin []byte) error {
	info, err := m.handle().GetTokenInfo(slot)
	if err != nil {
		return fmt.Errorf("read token: %w", classify(err))
	}
	if n := uint(len(pin)); n < info.MinPinLen || n > info.MaxPinLen {
		return fmt.Errorf("new PIN of %d octets, want %d to %d: %w", n, info.MinPinLen, info.MaxPinLen, hsm.ErrPIN)
	}
	return nil
}

// withUser runs f in a session of the logged-in user, and ends it. The PIN is
// sent once.
func (m *module) withUser(slot uint, pin []byte, f func(pkcs11.SessionHandle) error) error {
	raw := m.handle()
	session, err := raw.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return fmt.Errorf("open session: %w", classify(err))
	}
	defer func() { _ = raw.CloseSession(session) }() // the slot's only one: logs out too
	if err := raw.Login(session, pkcs11.CKU_USER, string(pin)); err != nil {
		return fmt.Errorf("log in: %w", classify(err))
	}
	defer func() { _ = raw.Logout(session) }()
	return f(session)
}

// mayTryAgain says whether the old PIN may be tried after the new one was not
// taken: it was refused as a wrong one, and the token has more than one try
// left.
func (m *module) mayTryAgain(u uri, err error) error {
	if !errors.Is(err, pkcs11.Error(pkcs11.CKR_PIN_INCORRECT)) {
		return err
	}
	info, _, locateErr := m.locate(u)
	if locateErr != nil {
		return errors.Join(err, locateErr)
	}
	for _, flag := range []string{"USER_PIN_FINAL_TRY", "USER_PIN_LOCKED"} {
		if slices.Contains(info.Flags, flag) {
			return fmt.Errorf("token flag %s is set, so the old PIN is not tried: %w", flag, err)
		}
	}
	return nil
}
