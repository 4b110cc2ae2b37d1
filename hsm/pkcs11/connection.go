package pkcs11

import (
	"errors"
	"fmt"
	"reflect"
	"sync"
	"sync/atomic"

	"github.com/ThalesIgnite/crypto11"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/miekg/pkcs11"
)

// connection is one login to one token: a crypto11 context, which keeps the
// login and a pool of signing sessions, and a session of our own for reading
// objects. Handles of it are meaningless to any other connection.
type connection struct {
	raw      *pkcs11.Ctx
	context  *crypto11.Context
	slot     uint
	info     hsm.TokenInfo
	sessions int                           // signing sessions
	sizes    map[uint]pkcs11.MechanismInfo // of mechanisms we use
	lost     bool                          // under recovery.mu and Token.gate: it was reported lost
	gone     atomic.Bool                   // and without a doubt: nothing more goes over it

	mu    sync.Mutex           // held while admin is in use
	admin pkcs11.SessionHandle // one operation at a time (PKCS#11 v2.40, Section 2.6.5)
}

// extraSessions are the sessions of a connection that do not sign: crypto11's
// persistent one and admin.
const extraSessions = 2

// connect checks the token and logs in to it, once. The caller holds lock.
func (m *module) connect(t *Token) (*connection, error) {
	var info hsm.TokenInfo
	var by uri
	sessions := t.cfg.MaxSessions
	err := m.initialised(func() (err error) {
		if info, by, err = m.locate(t.uri); err != nil {
			return err
		}
		if m.isOpen(t, info) {
			return ErrOpen
		}
		if sessions, err = m.limit(info.Slot, sessions); err != nil {
			return err
		}
		return m.clear(info.Slot)
	})
	if err != nil {
		return nil, err
	}
	// crypto11 does not log in: it would take CKR_USER_ALREADY_LOGGED_IN for a
	// success whatever the PIN, and not say which of its calls failed.
	context, err := crypto11.Configure(&crypto11.Config{
		Path: m.path, TokenSerial: by.serial, TokenLabel: by.token,
		LoginNotSupported: true, MaxSessions: sessions + 1,
	})
	if err != nil {
		return nil, fmt.Errorf("connect: %w", classify(err))
	}
	m.live++
	c := &connection{context: context, sessions: sessions}
	if c.raw, err = innerHandle(context); err == nil {
		m.shared = c.raw
		err = c.begin(m, t)
	}
	if err != nil {
		m.release(c)
		return nil, err
	}
	return c, nil
}

// isOpen says whether a token other than t is the one that info describes.
func (m *module) isOpen(t *Token, info hsm.TokenInfo) bool {
	for other := range m.tokens {
		if other != t && other.conn != nil && other.conn.info.Serial == info.Serial && other.conn.info.Label == info.Label {
			return true
		}
	}
	return false
}

// clear ends what a connection to the slot may have left that could not be
// closed properly while others kept the library initialised: a login that is
// still there would make any PIN good. The slot is not open.
func (m *module) clear(slot uint) error {
	if m.live == 0 {
		return nil
	}
	if err := m.handle().CloseAllSessions(slot); err != nil {
		return fmt.Errorf("close old sessions: %w", classify(err))
	}
	return nil
}

// limit lowers a wish for signing sessions to what the token in slot allows,
// less the extra ones. The library is initialised.
func (m *module) limit(slot uint, wish int) (int, error) {
	info, err := m.handle().GetTokenInfo(slot)
	if err != nil {
		return 0, fmt.Errorf("read token: %w", classify(err))
	}
	if m.oneCall {
		wish = 1
	}
	most := info.MaxRwSessionCount
	if most == pkcs11.CK_EFFECTIVELY_INFINITE || most == pkcs11.CK_UNAVAILABLE_INFORMATION {
		return wish, nil
	}
	if most <= extraSessions {
		return 0, fmt.Errorf("token allows %d sessions, want %d: %w", most, extraSessions+1, hsm.ErrUnsupported)
	}
	return int(min(uint(wish), most-extraSessions)), nil
}

// innerHandle returns the library handle that crypto11 keeps to itself. Object
// handles, sessions and the login belong to it; see module.handle for why a
// handle of our own would not do.
func innerHandle(context *crypto11.Context) (*pkcs11.Ctx, error) {
	field := reflect.ValueOf(context).Elem().FieldByName("ctx")
	if field.IsValid() && field.Kind() == reflect.Struct {
		field = field.FieldByName("Ctx")
	}
	if !field.IsValid() || field.Type() != reflect.TypeFor[*pkcs11.Ctx]() || field.IsNil() {
		return nil, errors.New("crypto11 has changed: its library handle is not where it was")
	}
	return (*pkcs11.Ctx)(field.UnsafePointer()), nil
}

// begin learns what the token can do, opens the reading session and logs in.
func (c *connection) begin(m *module, t *Token) error {
	info, _, err := m.locate(t.uri)
	if err != nil {
		return err
	}
	c.info, c.slot = info, info.Slot
	c.sizes = map[uint]pkcs11.MechanismInfo{}
	for _, mechanism := range []uint{pkcs11.CKM_ECDSA, pkcs11.CKM_EC_KEY_PAIR_GEN} {
		size, err := c.raw.GetMechanismInfo(c.slot, []*pkcs11.Mechanism{pkcs11.NewMechanism(mechanism, nil)})
		var code *codeError
		switch err = classify(err); {
		case err == nil:
			c.sizes[mechanism] = size
		case errors.As(err, &code) && code.connection():
			return fmt.Errorf("read mechanism %#x: %w", mechanism, err)
		}
	}
	if _, ok := c.sizes[pkcs11.CKM_ECDSA]; !ok {
		return fmt.Errorf("token lacks CKM_ECDSA: %w", hsm.ErrUnsupported)
	}
	c.admin, err = c.raw.OpenSession(c.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return fmt.Errorf("open session: %w", classify(err))
	}
	if err := checkPINFlags(info); err != nil {
		return err
	}
	return c.login(t.pin)
}

// login sends the PIN, once: every session of the library then has the login
// (PKCS#11 v2.40, Section 5.6). Only a lost connection and a busy token leave
// room for another attempt. Any other answer, and one that nobody knows most of
// all, may have cost the PIN a try: it is ErrPIN.
func (c *connection) login(pin string) error {
	err := classify(c.raw.Login(c.admin, pkcs11.CKU_USER, pin))
	switch {
	case err == nil:
		return nil
	case errors.Is(err, hsm.ErrLost), errors.Is(err, hsm.ErrBusy), errors.Is(err, hsm.ErrPIN):
		return fmt.Errorf("log in: %w", err)
	}
	return fmt.Errorf("log in: %w (%w)", hsm.ErrPIN, err)
}

// disconnect ends t's connection if it has one. The caller holds lock and
// t.gate.
func (m *module) disconnect(t *Token) {
	if t.conn != nil {
		m.release(t.conn)
		t.conn = nil
	}
}

// release logs out and closes. On a lost device each step may fail, which is
// nothing new. The last release finalises the library.
func (m *module) release(c *connection) {
	if c.admin != 0 {
		_ = c.raw.Logout(c.admin)
		_ = c.raw.CloseSession(c.admin)
	}
	_ = c.context.Close() // exactly once: a second Close panics
	if m.live--; m.live == 0 {
		m.shared = nil // crypto11 has finalised and destroyed it
	} else if c.sizes != nil { // c.slot is known
		_ = c.raw.CloseAllSessions(c.slot) // whatever would not close
	}
}

// withAdmin runs f with the reading session to itself.
func (c *connection) withAdmin(f func(pkcs11.SessionHandle) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return f(c.admin)
}

// supports says whether the token's mechanism takes keys of this many bits. A
// token that reports no sizes (0, 0) is believed to.
func (c *connection) supports(mechanism uint, bits int) error {
	size, ok := c.sizes[mechanism]
	if !ok {
		return fmt.Errorf("token lacks mechanism %#x: %w", mechanism, hsm.ErrUnsupported)
	}
	if size.MaxKeySize != 0 && (uint(bits) < size.MinKeySize || uint(bits) > size.MaxKeySize) {
		return fmt.Errorf("token takes %d to %d bits, want %d: %w", size.MinKeySize, size.MaxKeySize, bits, hsm.ErrUnsupported)
	}
	return nil
}
