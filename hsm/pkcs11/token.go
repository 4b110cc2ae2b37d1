// Package pkcs11 holds private keys in PKCS#11 tokens.
//
// It promises what package hsm promises, and:
//   - One owner per library: C_Initialize and C_Finalize act on the whole
//     process, so every token of a module path is opened and closed here, one
//     crypto11 context per token. A second Open of an open token is ErrOpen.
//   - One login per connection, and none when the token's flags say that a
//     wrong PIN was tried before. A refused PIN is never tried again: the
//     token is dead for this process. So is a login that fails for a reason
//     that says neither that the connection is lost nor that the token is
//     busy: it may have cost the PIN a try.
//   - A key is what its Ref says: miekg/pkcs11 counts the private and the
//     public objects that fit and reads their attributes; crypto11's own
//     pairing is compared with that and never believed.
//   - Every wait ends, and no role starves another. Calls go through a bounded
//     line for each hsm.Share to as many workers as there are sessions
//     (hsm/internal/queue); a caller leaves when its context ends; a C call that
//     outlives the deadline wedges the token, which then answers ErrLost until
//     the process is replaced.
//   - Lost sessions and devices come back by themselves. The unit of recovery
//     is the module path (C_Finalize is counted for the whole library): all its
//     contexts are drained and closed, opened again, and every key is found
//     again by its id and compared with its public key (supervise.go). A key
//     that alone keeps losing the connection does not take the others with it.
//
// It trusts the library not to corrupt the process, and the token for secrecy
// and randomness. It does not trust a signature, an object handle that outlived
// a connection, or the order in which a token lists objects.
//
// How a signature flows: Key.SignContext → queue → worker → crypto11 (C_SignInit,
// C_Sign) → DER → hsm.Verify on the caller's goroutine → caller.
//
// PINs stay in memory as long as the token is open (recovery logs in again; the
// login is ours, crypto11 never sees it); they are in no error and no log record.
package pkcs11

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/internal/queue"
	"github.com/miekg/pkcs11"
)

// Config says which token to open and how.
type Config struct {
	// Module is the absolute path of the PKCS#11 library.
	Module string
	// URI names the token (RFC 7512): token or serial, and optionally
	// manufacturer and model. Exactly one present token must fit.
	URI string
	// PIN is the user PIN. Open copies it; the caller should clear it.
	PIN []byte
	// MaxSessions is how many calls the token works on at once; 0 means 8. The
	// token's own limit lowers it. Two more sessions are kept for the login
	// and for reading objects.
	MaxSessions int
	// MaxQueue is how many calls of each hsm.Share may wait; 0 means 256.
	// Beyond it is ErrBusy.
	MaxQueue int
	// Deadline is how long one C call may take before the token is given up as
	// wedged, and how long Open, Close and one recovery may take; 0 means 30 s.
	Deadline time.Duration
	// Logger receives loss, recovery and wedging; nil discards them.
	Logger *slog.Logger
}

// The defaults of Config.
const (
	defaultSessions = 8
	defaultQueue    = 256
	defaultDeadline = 30 * time.Second
)

// withDefaults checks c and fills in what is zero.
func (c Config) withDefaults() (Config, error) {
	if c.MaxSessions < 0 || c.MaxQueue < 0 || c.Deadline < 0 {
		return c, errors.New("negative limit")
	}
	if c.MaxSessions == 0 {
		c.MaxSessions = defaultSessions
	}
	if c.MaxQueue == 0 {
		c.MaxQueue = defaultQueue
	}
	if c.Deadline == 0 {
		c.Deadline = defaultDeadline
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// Token is an open, logged-in PKCS#11 token. It implements hsm.Token and is
// safe for concurrent use.
type Token struct {
	module *module
	cfg    Config
	pin    string
	uri    uri
	log    *slog.Logger
	queue  *queue.Queue
	// retryWait is how long a call waits to be tried again.
	retryWait time.Duration

	// gate is held for reading during each call's visit to the token, and for
	// writing while conn is replaced, under module.lock.
	gate sync.RWMutex
	conn *connection // the living connection, nil while there is none

	mu   sync.Mutex
	info hsm.TokenInfo // under mu: as of the last connection
	keys []*key        // under mu: every key opened, for recovery
}

var _ hsm.Token = (*Token)(nil)

// Open logs in to the one token that cfg.URI names. Before the PIN is sent it
// checks that the token is present exactly once, that its flags allow a login,
// and that it signs with ECDSA. Errors: ErrNotFound, ErrAmbiguous, ErrPIN,
// ErrUnsupported, ErrOpen, ErrURI, ErrLost.
func Open(ctx context.Context, cfg Config) (*Token, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("open token: %w", err)
	}
	u, err := parseURI(cfg.URI)
	if err != nil {
		return nil, fmt.Errorf("open token: %w", err)
	}
	m, err := moduleFor(cfg.Module)
	if err != nil {
		return nil, fmt.Errorf("open token: %w", err)
	}
	t := &Token{
		module: m, cfg: cfg, pin: string(cfg.PIN), uri: u,
		log: cfg.Logger.With("token", u.String()), retryWait: defaultRetryWait,
	}
	t.cfg.PIN = nil
	ctx, cancel := context.WithTimeout(ctx, cfg.Deadline)
	defer cancel()
	// A recovery that runs, for another token, would reopen the new connection
	// too: let it end if it can.
	m.recovered(ctx, t.retryWait)
	err = m.exclusive(ctx, func() error { return m.attach(t) }, func() { m.detach(t) })
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", u, err)
	}
	return t, nil
}

// attach connects t and adds it to the module's tokens. The caller holds lock.
func (m *module) attach(t *Token) error {
	if err := m.recovery.dead(); err != nil {
		return err
	}
	conn, err := m.connect(t)
	if err != nil {
		return err
	}
	t.info = conn.info
	t.conn = conn
	t.queue = queue.New(queue.Config{
		Workers: conn.sessions, Length: t.cfg.MaxQueue, Deadline: t.cfg.Deadline,
		OnWedge: func() {
			t.log.Error("token wedged: a call outlived its deadline", "deadline", t.cfg.Deadline)
		},
	})
	m.tokens[t] = struct{}{}
	return nil
}

// detach ends t's connection once no call of t runs; other tokens go on. The
// caller holds lock. It blocks as long as a C call does.
func (m *module) detach(t *Token) {
	t.queue.Close()
	t.gate.Lock()
	defer t.gate.Unlock()
	m.disconnect(t)
	delete(m.tokens, t)
	if len(m.tokens) == 0 {
		m.recovery.forget()
	}
}

// Info describes the token as it presented itself at the last login.
func (t *Token) Info() hsm.TokenInfo {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.info
}

// Err implements hsm.Token. While the connection is being replaced it is
// ErrBusy.
func (t *Token) Err() error {
	if err := t.queue.Err(); err != nil {
		return err
	}
	if err := t.module.recovery.err(); err != nil {
		return err
	}
	if !t.gate.TryRLock() { // a call would not get in
		return t.why()
	}
	t.gate.RUnlock()
	return nil
}

// why says why a call does not get to the token.
func (t *Token) why() error {
	if err := t.queue.Err(); err != nil {
		return err
	}
	return t.module.recovery.why()
}

// Close logs out and releases the token. It waits for running calls no longer
// than the deadline. While a call hangs it returns ErrLost and releases
// nothing; it may be called again, and the end of the process does the rest.
func (t *Token) Close() error {
	t.queue.Close()
	if err := t.queue.Err(); errors.Is(err, hsm.ErrWedged) && t.queue.Oldest(time.Now()) > 0 {
		return fmt.Errorf("close %s: %w", t.uri, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), t.cfg.Deadline)
	defer cancel()
	err := t.module.exclusive(ctx, func() error { t.module.detach(t); return nil }, func() {})
	if err != nil {
		return fmt.Errorf("close %s: %w", t.uri, err)
	}
	return nil
}

// do runs f on a worker with the living connection, in its share's turn. If the
// connection turns out to be lost, recovery begins, and if again is set do waits
// for it a short while and runs f once more on the new connection. When it fails
// f may still be running: what f writes must not be read, nor its argument be
// the caller's memory.
func (t *Token) do(ctx context.Context, share hsm.Share, again bool, f func(*connection) error) error {
	err := t.once(ctx, share, f)
	if !again || !temporary(err) || ctx.Err() != nil {
		return err
	}
	if !t.module.recovered(ctx, t.retryWait) {
		return err
	}
	return t.once(ctx, share, f)
}

// once is one run of f on a worker.
func (t *Token) once(ctx context.Context, share hsm.Share, f func(*connection) error) error {
	return t.queue.Do(ctx, share, func() error {
		defer t.module.enter()()
		if !t.gate.TryRLock() {
			return t.why()
		}
		defer t.gate.RUnlock()
		if t.conn == nil || t.conn.gone.Load() {
			return t.why()
		}
		err := classify(f(t.conn))
		if temporary(err) {
			t.module.lose(t, err)
		}
		return err
	})
}

// Random returns n octets from the token's generator (C_GenerateRandom), n
// from 1 to 1024.
func (t *Token) Random(ctx context.Context, n int) ([]byte, error) {
	if n < 1 || n > 1024 {
		return nil, fmt.Errorf("random: %d octets, want 1 to 1024: %w", n, hsm.ErrUnsupported)
	}
	var out []byte
	err := t.do(ctx, hsm.ShareRest, true, func(c *connection) error {
		return c.withAdmin(func(s pkcs11.SessionHandle) (err error) {
			out, err = c.raw.GenerateRandom(s, n)
			return err
		})
	})
	if err != nil {
		return nil, fmt.Errorf("random from %s: %w", t.uri, err)
	}
	if len(out) != n {
		return nil, fmt.Errorf("random from %s: %d octets, want %d: %w", t.uri, len(out), n, hsm.ErrLost)
	}
	return out, nil
}

// Keys counts the private key objects of any type on the token.
func (t *Token) Keys(ctx context.Context) (int, error) {
	var n int
	err := t.do(ctx, hsm.ShareRest, true, func(c *connection) error {
		return c.withAdmin(func(s pkcs11.SessionHandle) error {
			objects, err := c.find(s, pkcs11.CKO_PRIVATE_KEY, "", nil)
			n = len(objects)
			return err
		})
	})
	if err != nil {
		return 0, fmt.Errorf("count keys of %s: %w", t.uri, err)
	}
	return n, nil
}

// Open finds the key that ref names and holds its attributes against the
// role's policy. See hsm.Token.
func (t *Token) Open(ctx context.Context, ref hsm.Ref, role hsm.Role) (hsm.Key, error) {
	u, err := parseKeyURI(ref.URI)
	if err != nil {
		return nil, fmt.Errorf("open key: %w", err)
	}
	if !u.names(t.Info()) {
		return nil, fmt.Errorf("open key %s: names another token than %s: %w", ref, t.uri, hsm.ErrNotFound)
	}
	pair, err := t.resolve(ctx, u, &ref.SPKI, role)
	if err != nil {
		return nil, fmt.Errorf("open key %s: %w", ref, err)
	}
	return t.adopt(ref, role, pair), nil
}

// Find opens the key pair with this CKA_ID. See hsm.Token.
func (t *Token) Find(ctx context.Context, id []byte) (hsm.Key, error) {
	if len(id) == 0 {
		return nil, fmt.Errorf("find key: empty id: %w", hsm.ErrNotFound)
	}
	pair, err := t.resolve(ctx, t.uri.key("", bytes.Clone(id)), nil, hsm.RoleNone)
	if err != nil {
		return nil, fmt.Errorf("find key with id %x in %s: %w", id, t.uri, err)
	}
	return t.adopt(pair.ref(t.uri), hsm.RoleNone, pair), nil
}

// resolve looks for a pair on the living connection.
func (t *Token) resolve(ctx context.Context, u uri, spki *[32]byte, role hsm.Role) (*pair, error) {
	var found *pair
	err := t.do(ctx, hsm.ShareRest, true, func(c *connection) (err error) {
		found, err = c.resolve(u, spki, role)
		return err
	})
	if err != nil {
		return nil, err
	}
	return found, nil
}

// adopt makes a Key of a resolved pair and remembers it for recovery. The same
// Ref and role give the same Key.
func (t *Token) adopt(ref hsm.Ref, role hsm.Role, p *pair) hsm.Key {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, k := range t.keys {
		if k.ref == ref && k.role == role {
			return k
		}
	}
	k := &key{token: t, ref: ref, role: role, pub: p.pub, id: p.id, label: p.label}
	k.pair.Store(p)
	t.keys = append(t.keys, k)
	return k
}
