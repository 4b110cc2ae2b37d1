package pkcs11_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
	p11 "github.com/miekg/pkcs11"
)

// TestConformance runs every backend's suite through the shim, which counts
// logins. No PIN is in any log record.
func TestConformance(t *testing.T) {
	shim := hsmtest.NewShim(t)
	hsmtest.Conformance(t, func(t *testing.T) hsmtest.Device {
		token := shim.NewToken(t)
		logs := watchLogs(t, token)
		return token.Device(pkcs11.Config{Logger: logs}, shim.Logins)
	})
}

// lockedBuffer is a log's memory.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// watchLogs returns a logger and fails the test if a PIN of token is in it.
func watchLogs(t *testing.T, token hsmtest.SoftHSMToken) *slog.Logger {
	t.Helper()
	var buf lockedBuffer
	t.Cleanup(func() {
		noPIN(t, token, "log", buf.String())
		if t.Failed() {
			t.Logf("log:\n%s", buf.String())
		}
	})
	return slog.New(slog.NewTextHandler(&buf, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// noPIN fails the test if text holds one of token's PINs.
func noPIN(t *testing.T, token hsmtest.SoftHSMToken, where, text string) {
	t.Helper()
	if strings.Contains(text, string(token.PIN)) || strings.Contains(text, string(token.SOPIN)) {
		t.Errorf("%s holds a PIN", where)
	}
}

// wants fails the test unless err is want and holds no PIN.
func wants(t *testing.T, token hsmtest.SoftHSMToken, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: error %v, want %v", what, err, want)
	}
	if err != nil {
		noPIN(t, token, what, err.Error())
	}
}

// fixture is an open token behind the shim with one key.
type fixture struct {
	shim  *hsmtest.Shim
	token hsmtest.SoftHSMToken
	open  *pkcs11.Token
	key   hsm.Key
}

// setUp opens a fresh token behind the shim with these limits.
func setUp(t *testing.T, cfg pkcs11.Config) fixture {
	t.Helper()
	f := fixture{shim: hsmtest.NewShim(t)}
	f.token = f.shim.NewToken(t)
	cfg.Module, cfg.URI, cfg.PIN = f.token.Module, f.token.URI, f.token.PIN
	if cfg.Logger == nil {
		cfg.Logger = watchLogs(t, f.token)
	}
	if cfg.Deadline == 0 {
		cfg.Deadline = patience // of what is made to hang a while nothing is wedged
	}
	opened, err := pkcs11.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	f.open = opened
	f.open.SetRetryWait(patience)
	t.Cleanup(func() {
		f.shim.Reset() // whatever hangs may end
		eventually(t, "the last call to end", func() bool { return f.shim.Running() == 0 })
		eventually(t, "Close", func() bool { return opened.Close() == nil })
	})
	f.key = hsmtest.NewKey(t, opened, "key", hsm.ECDSAP256)
	return f
}

// reopen opens f's token with other limits, among them a deadline so short that
// a machine under load may miss it: as often as it takes until the key signs.
func (f fixture) reopen(t *testing.T, cfg pkcs11.Config) fixture {
	t.Helper()
	if err := f.open.Close(); err != nil {
		t.Fatal(err)
	}
	cfg.Module, cfg.URI, cfg.PIN, cfg.Logger = f.token.Module, f.token.URI, f.token.PIN, watchLogs(t, f.token)
	ref := f.key.Ref()
	eventually(t, "a token that signs", func() bool {
		opened, err := pkcs11.Open(t.Context(), cfg)
		if err != nil {
			return false
		}
		f.open = opened
		if f.key, err = opened.Open(t.Context(), ref, hsm.RoleNone); err == nil {
			err = f.sign(t.Context())
		}
		if err != nil {
			eventually(t, "Close", func() bool { return opened.Close() == nil })
		}
		return err == nil
	})
	t.Cleanup(func() {
		f.shim.Reset()
		eventually(t, "Close", func() bool { return f.open.Close() == nil })
	})
	return f
}

// patience bounds a wait for what must happen: only to end a hang.
const patience = 2 * time.Minute

// eventually waits for what another goroutine or the token is about to do.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-timeout.C:
			t.Fatalf("%s did not happen", what)
		}
	}
}

var digest = sha256.Sum256([]byte("digest"))

// sign signs digest and checks the signature.
func (f fixture) sign(ctx context.Context) error {
	sig, err := f.key.SignContext(ctx, digest[:], crypto.SHA256)
	if err == nil && !ecdsa.VerifyASN1(f.key.Public().(*ecdsa.PublicKey), digest[:], sig) {
		return errors.New("a wrong signature left")
	}
	return err
}

func TestOpenRefuses(t *testing.T) {
	shim := hsmtest.NewShim(t)
	token := shim.NewToken(t)
	good := pkcs11.Config{Module: token.Module, URI: token.URI, PIN: token.PIN}
	cfg := func(change func(*pkcs11.Config)) pkcs11.Config {
		c := good
		change(&c)
		return c
	}
	rows := []struct {
		name string
		cfg  pkcs11.Config
		want error // nil: any
	}{
		{"relative module", cfg(func(c *pkcs11.Config) { c.Module = "libsofthsm2.so" }), nil},
		{"absent module", cfg(func(c *pkcs11.Config) { c.Module = "/nonexistent.so" }), nil},
		{"module that is no library", cfg(func(c *pkcs11.Config) { c.Module = "/etc/passwd" }), nil},
		{"negative limit", cfg(func(c *pkcs11.Config) { c.MaxQueue = -1 }), nil},
		{"no URI", cfg(func(c *pkcs11.Config) { c.URI = "" }), pkcs11.ErrURI},
		{"PIN in the URI", cfg(func(c *pkcs11.Config) { c.URI += "?pin-value=" + string(token.PIN) }), pkcs11.ErrURI},
		{"absent token", cfg(func(c *pkcs11.Config) { c.URI = pkcs11.TokenURI("nobody") }), hsm.ErrNotFound},
		{"label of ours, serial of another", cfg(func(c *pkcs11.Config) { c.URI += ";serial=0000" }), hsm.ErrNotFound},
	}
	for _, row := range rows {
		opened, err := pkcs11.Open(t.Context(), row.cfg)
		if err == nil {
			_ = opened.Close()
			t.Errorf("%s: opened", row.name)
			continue
		}
		if row.want == nil {
			row.want = err
		}
		wants(t, token, row.name, err, row.want)
	}
	if n := shim.Logins(); n != 0 {
		t.Errorf("%d logins, want none", n)
	}
}

// TestPINFlags: a token that says that a wrong PIN was entered gets none.
func TestPINFlags(t *testing.T) {
	shim := hsmtest.NewShim(t)
	token := shim.NewToken(t)
	cfg := pkcs11.Config{Module: token.Module, URI: token.URI, PIN: token.PIN}
	flags := map[string]uint{
		"count low": p11.CKF_USER_PIN_COUNT_LOW, "final try": p11.CKF_USER_PIN_FINAL_TRY,
		"locked": p11.CKF_USER_PIN_LOCKED, "to be changed": p11.CKF_USER_PIN_TO_BE_CHANGED,
	}
	for name, flag := range flags {
		shim.TokenFlags(flag)
		_, err := pkcs11.Open(t.Context(), cfg)
		wants(t, token, name, err, hsm.ErrPIN)
	}
	shim.TokenFlags(0)
	for name, code := range map[string]uint{"CKR_PIN_LOCKED": p11.CKR_PIN_LOCKED, "CKR_PIN_EXPIRED": p11.CKR_PIN_EXPIRED} {
		shim.Fail(hsmtest.Login, code, 1)
		_, err := pkcs11.Open(t.Context(), cfg)
		wants(t, token, name, err, hsm.ErrPIN)
	}
	if n := shim.Logins(); n != 2 {
		t.Errorf("%d logins, want the 2 that the shim refused", n)
	}
	opened, err := pkcs11.Open(t.Context(), cfg)
	if err != nil {
		t.Fatalf("after the flags are gone: %v", err)
	}
	if err := opened.Close(); err != nil {
		t.Error(err)
	}
}

// TestLoseSessions: every way to lose a session during a signature ends in a
// verified signature on a new connection, after one more login.
func TestLoseSessions(t *testing.T) {
	codes := []uint{
		p11.CKR_SESSION_HANDLE_INVALID, p11.CKR_SESSION_CLOSED, p11.CKR_DEVICE_ERROR,
		p11.CKR_DEVICE_REMOVED, p11.CKR_TOKEN_NOT_PRESENT, p11.CKR_CRYPTOKI_NOT_INITIALIZED,
		p11.CKR_USER_NOT_LOGGED_IN, p11.CKR_OBJECT_HANDLE_INVALID, p11.CKR_KEY_HANDLE_INVALID,
		p11.CKR_OPERATION_ACTIVE, p11.CKR_GENERAL_ERROR,
	}
	f := setUp(t, pkcs11.Config{})
	logins := f.shim.Logins()
	for _, function := range []hsmtest.Function{hsmtest.SignInit, hsmtest.Sign} {
		for _, code := range codes {
			f.shim.Fail(function, code, 1)
			if err := f.sign(t.Context()); err != nil {
				t.Errorf("function %d fails with %#x: %v", function, code, err)
			}
			logins++
			if got := f.shim.Logins(); got != logins {
				t.Errorf("function %d fails with %#x: %d logins, want %d", function, code, got, logins)
				logins = got
			}
		}
	}
}

// TestCallersErrors: a return value that is the caller's fault reaches the
// caller and closes nothing.
func TestCallersErrors(t *testing.T) {
	f := setUp(t, pkcs11.Config{})
	logins := f.shim.Logins()
	rows := map[uint]error{
		p11.CKR_FUNCTION_FAILED:            p11.Error(p11.CKR_FUNCTION_FAILED),
		p11.CKR_KEY_FUNCTION_NOT_PERMITTED: p11.Error(p11.CKR_KEY_FUNCTION_NOT_PERMITTED),
		p11.CKR_MECHANISM_INVALID:          hsm.ErrUnsupported,
		p11.CKR_DEVICE_MEMORY:              hsm.ErrBusy,
		p11.CKR_SESSION_COUNT:              hsm.ErrBusy,
		0x80000001:                         p11.Error(0x80000001),
	}
	for code, want := range rows {
		f.shim.Fail(hsmtest.SignInit, code, 1)
		wants(t, f.token, fmt.Sprintf("%#x", code), f.sign(t.Context()), want)
		if err := f.sign(t.Context()); err != nil {
			t.Errorf("after %#x: %v", code, err)
		}
	}
	if got := f.shim.Logins(); got != logins {
		t.Errorf("%d logins, want %d", got, logins)
	}
}

// TestLoseEverySession takes the sessions of two tokens of one module away for
// real. Both come back with their keys, whichever notices first. Nothing signs
// meanwhile: SoftHSM does not survive a session closed under a running call.
func TestLoseEverySession(t *testing.T) {
	f := setUp(t, pkcs11.Config{})
	other := f.second(t)
	lib := p11.New(f.open.Info().Module)
	for round := range 4 {
		for _, slot := range []uint{f.open.Info().Slot, other.open.Info().Slot} {
			if err := lib.CloseAllSessions(slot); err != nil {
				t.Fatal(err)
			}
		}
		first, then := f, other
		if round%2 == 1 {
			first, then = other, f
		}
		if err := first.sign(t.Context()); err != nil {
			t.Errorf("round %d: the one that notices: %v", round, err)
		}
		eventually(t, "signing with the other token", func() bool { return then.sign(t.Context()) == nil })
	}
}

// second opens another token of f's module, with a key.
func (f fixture) second(t *testing.T) fixture {
	t.Helper()
	token := f.shim.NewToken(t)
	opened, err := pkcs11.Open(t.Context(), pkcs11.Config{
		Module: token.Module, URI: token.URI, PIN: token.PIN, Logger: watchLogs(t, token),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := opened.Close(); err != nil {
			t.Error(err)
		}
	})
	return fixture{shim: f.shim, token: token, open: opened, key: hsmtest.NewKey(t, opened, "key", hsm.ECDSAP256)}
}

// TestLoseUnderLoad loses the connection again and again while 8 goroutines
// sign with two tokens. Every answer is a verified signature, ErrBusy or
// ErrLost, and signing goes on after each loss.
func TestLoseUnderLoad(t *testing.T) {
	f := setUp(t, pkcs11.Config{})
	tokens := []fixture{f, f.second(t)}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				err := tokens[i%2].sign(t.Context())
				if err != nil && !errors.Is(err, hsm.ErrBusy) && !errors.Is(err, hsm.ErrLost) {
					t.Error(err)
					return
				}
			}
		})
	}
	for i := range 4 {
		signs := f.shim.Signs()
		code := []uint{p11.CKR_SESSION_HANDLE_INVALID, p11.CKR_DEVICE_REMOVED}[i%2]
		f.shim.Fail(hsmtest.SignInit, code, 1+i)
		eventually(t, "signing again", func() bool { return f.shim.Signs() > signs+20 })
	}
	close(stop)
	wg.Wait()
}

// TestAbsentToken: while the token is away callers get ErrBusy or ErrLost at
// once; when it is back they get signatures. The PIN is sent only to a token
// that is there.
func TestAbsentToken(t *testing.T) {
	f := setUp(t, pkcs11.Config{})
	f.open.SetRetryWait(time.Millisecond)
	logins := f.shim.Logins()
	f.shim.Fail(hsmtest.GetTokenInfo, p11.CKR_TOKEN_NOT_PRESENT, 1<<30)
	lib := p11.New(f.open.Info().Module)
	if err := lib.CloseAllSessions(f.open.Info().Slot); err != nil {
		t.Fatal(err)
	}
	wants(t, f.token, "the caller that notices", f.sign(t.Context()), hsm.ErrLost)
	for range 100 {
		wants(t, f.token, "a later caller", f.sign(t.Context()), hsm.ErrBusy)
	}
	wants(t, f.token, "health while it is away", f.open.Err(), hsm.ErrBusy)
	if got := f.shim.Logins(); got != logins {
		t.Errorf("%d logins while the token is away, want none", got-logins)
	}
	f.shim.Fail(hsmtest.GetTokenInfo, 0, 0)
	eventually(t, "signing again", func() bool { return f.sign(t.Context()) == nil })
	if got := f.shim.Logins(); got != logins+1 {
		t.Errorf("%d logins after the return, want 1", got-logins)
	}
	if err := f.open.Err(); err != nil {
		t.Errorf("health after the return: %v", err)
	}
}

// TestPINRefusedWhileReopening: the module is dead, and nothing logs in again.
func TestPINRefusedWhileReopening(t *testing.T) {
	f := setUp(t, pkcs11.Config{})
	logins := f.shim.Logins()
	f.shim.Fail(hsmtest.Login, p11.CKR_PIN_INCORRECT, 1)
	lib := p11.New(f.open.Info().Module)
	if err := lib.CloseAllSessions(f.open.Info().Slot); err != nil {
		t.Fatal(err)
	}
	_ = f.sign(t.Context()) // notices
	eventually(t, "ErrPIN", func() bool { return errors.Is(f.sign(t.Context()), hsm.ErrPIN) })
	for range 10 {
		wants(t, f.token, "sign", f.sign(t.Context()), hsm.ErrPIN)
	}
	wants(t, f.token, "health", f.open.Err(), hsm.ErrPIN)
	if got := f.shim.Logins(); got != logins+1 {
		t.Errorf("%d logins, want 1", got-logins)
	}
}

// TestKeyDoesNotComeBack: the key was gone when the connection was back. The
// other key of the token signs; another key with the old label does not pass.
func TestKeyDoesNotComeBack(t *testing.T) {
	f := setUp(t, pkcs11.Config{})
	other := hsmtest.NewKey(t, f.open, "other", hsm.ECDSAP256)
	destroy(t, f.open, "key")
	lib := p11.New(f.open.Info().Module)
	if err := lib.CloseAllSessions(f.open.Info().Slot); err != nil {
		t.Fatal(err)
	}
	eventually(t, "ErrNotFound", func() bool { return errors.Is(f.sign(t.Context()), hsm.ErrNotFound) })
	if _, err := other.Sign(nil, digest[:], crypto.SHA256); err != nil {
		t.Errorf("the other key: %v", err)
	}
	hsmtest.NewKey(t, f.open, "key", hsm.ECDSAP256)
	wants(t, f.token, "another key with its label", f.sign(t.Context()), hsm.ErrNotFound)
}

// TestBadReadWhileReopening: an attribute that could not be read while the
// module was reopened does not cost the key for good.
func TestBadReadWhileReopening(t *testing.T) {
	f := setUp(t, pkcs11.Config{})
	for _, code := range []uint{p11.CKR_FUNCTION_FAILED, p11.CKR_DEVICE_MEMORY, p11.CKR_ATTRIBUTE_TYPE_INVALID, p11.CKR_DEVICE_ERROR} {
		f.shim.Fail(hsmtest.GetAttributeValue, code, 5)
		lib := p11.New(f.open.Info().Module)
		if err := lib.CloseAllSessions(f.open.Info().Slot); err != nil {
			t.Fatal(err)
		}
		eventually(t, "signing again", func() bool { return f.sign(t.Context()) == nil })
		if f.shim.Failed() == 0 {
			t.Errorf("%#x: no call failed", code)
		}
	}
}

// destroy removes every object with this label.
func destroy(t *testing.T, token hsm.Token, label string) {
	t.Helper()
	lib := p11.New(token.Info().Module)
	session, err := lib.OpenSession(token.Info().Slot, p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lib.CloseSession(session) }()
	if err := lib.FindObjectsInit(session, []*p11.Attribute{p11.NewAttribute(p11.CKA_LABEL, label)}); err != nil {
		t.Fatal(err)
	}
	objects, _, err := lib.FindObjects(session, 10)
	if err != nil || len(objects) != 2 {
		t.Fatalf("found %d objects, %v", len(objects), err)
	}
	if err := lib.FindObjectsFinal(session); err != nil {
		t.Fatal(err)
	}
	for _, object := range objects {
		if err := lib.DestroyObject(session, object); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCorruptSignature: one signature in three is wrong; none of them leaves.
func TestCorruptSignature(t *testing.T) {
	f := setUp(t, pkcs11.Config{})
	f.shim.CorruptEvery(3)
	var bad int
	for range 60 {
		switch err := f.sign(t.Context()); {
		case errors.Is(err, hsm.ErrBadSignature):
			bad++
		case err != nil:
			t.Fatal(err)
		}
	}
	if want := f.shim.Corrupted(); bad != want || want != 20 {
		t.Errorf("%d refused, %d corrupted, want 20 of each", bad, want)
	}
}

// TestGenerateProvesKey: a key whose first signature is wrong is not returned.
func TestGenerateProvesKey(t *testing.T) {
	f := setUp(t, pkcs11.Config{})
	f.shim.CorruptEvery(1)
	_, err := f.open.Generate(t.Context(), hsm.Spec{Label: "bad", ID: hsmtest.RandomID(), Algorithm: hsm.ECDSAP256})
	wants(t, f.token, "generate", err, hsm.ErrBadSignature)
}

// TestGenerateOnce: a generation that was lost is not tried again by itself;
// Find tells whether it happened.
func TestGenerateOnce(t *testing.T) {
	f := setUp(t, pkcs11.Config{})
	id := hsmtest.RandomID()
	f.shim.Fail(hsmtest.GenerateKeyPair, p11.CKR_DEVICE_ERROR, 1)
	_, err := f.open.Generate(t.Context(), hsm.Spec{Label: "lost", ID: id, Algorithm: hsm.ECDSAP256})
	wants(t, f.token, "generate", err, hsm.ErrLost)
	eventually(t, "Find saying that it did not", func() bool {
		_, err := f.open.Find(t.Context(), id)
		return errors.Is(err, hsm.ErrNotFound)
	})
}

// TestQueue: with one session and a queue of two, a third waiter is refused at
// once, and a waiter whose context ends leaves without a signature.
func TestQueue(t *testing.T) {
	f := setUp(t, pkcs11.Config{MaxSessions: 1, MaxQueue: 2})
	signs := f.shim.Signs()
	f.shim.Hang(hsmtest.Sign)
	results, first := make(chan error, 10), make(chan error, 1)
	running, cancelRunning := context.WithCancelCause(t.Context())
	go func() { first <- f.sign(running) }()
	eventually(t, "the first call", func() bool { return f.shim.Running() == 1 })
	waiting, cancelWaiting := context.WithCancelCause(t.Context())
	for range 10 {
		go func() { results <- f.sign(waiting) }()
	}
	for range 8 {
		err := <-results
		wants(t, f.token, "full", err, hsm.ErrBusy)
		if !strings.Contains(err.Error(), "queue of 2 for rest is full") {
			t.Errorf("full: %v", err)
		}
	}
	cause := errors.New("the client left")
	cancelWaiting(cause)
	for range 2 {
		err := <-results
		wants(t, f.token, "ended while queued", err, hsm.ErrBusy)
		wants(t, f.token, "ended while queued", err, cause)
	}
	cancelRunning(cause)
	wants(t, f.token, "ended while running", <-first, hsm.ErrLost)
	f.shim.Hang(0)
	eventually(t, "the hung call to end", func() bool { return f.shim.Running() == 0 })
	if err := f.sign(t.Context()); err != nil {
		t.Errorf("after the hang: %v", err)
	}
	if got := f.shim.Signs() - signs; got != 2 {
		t.Errorf("%d signatures were made, want 2", got)
	}
}

// TestWedged: a call that outlives the deadline wedges the token: everybody
// gets ErrLost soon, nobody waits, and Close does not hang.
func TestWedged(t *testing.T) {
	f := setUp(t, pkcs11.Config{}).reopen(t, pkcs11.Config{MaxSessions: 2, Deadline: time.Second})
	f.shim.Hang(hsmtest.Sign)
	results := make(chan error, 8)
	for range cap(results) {
		go func() { results <- f.sign(context.Background()) }()
	}
	for range cap(results) {
		wants(t, f.token, "waiting", <-results, hsm.ErrLost)
	}
	wants(t, f.token, "later", f.sign(context.Background()), hsm.ErrLost)
	wants(t, f.token, "health", f.open.Err(), hsm.ErrWedged)
	wants(t, f.token, "close", f.open.Close(), hsm.ErrLost)
	if got := f.shim.Peak(); got != 2 {
		t.Errorf("%d calls at once, want 2", got)
	}
}

// TestSessionLimit: the token's own limit bounds the calls inside it, and
// calls overlap up to it.
func TestSessionLimit(t *testing.T) {
	shim := hsmtest.NewShim(t)
	token := shim.NewToken(t)
	cfg := pkcs11.Config{Module: token.Module, URI: token.URI, PIN: token.PIN}
	for _, most := range []int{1, 2} {
		shim.MaxSessions(most)
		_, err := pkcs11.Open(t.Context(), cfg)
		wants(t, token, fmt.Sprintf("%d sessions", most), err, hsm.ErrUnsupported)
	}
	shim.MaxSessions(5)
	opened, err := pkcs11.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := opened.Close(); err != nil {
			t.Error(err)
		}
	}()
	f := fixture{shim: shim, token: token, open: opened, key: hsmtest.NewKey(t, opened, "key", hsm.ECDSAP256)}
	shim.Hang(hsmtest.Sign)
	var wg sync.WaitGroup
	for range 24 {
		wg.Go(func() {
			if err := f.sign(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	eventually(t, "three calls at once", func() bool { return shim.Running() == 3 })
	shim.Hang(0)
	wg.Wait()
	if got := shim.Peak(); got != 3 {
		t.Errorf("%d calls at once, want 3", got)
	}
}

// TestHungRecovery: a module that hangs while it is reopened is wedged after
// the deadline, and callers learn it without waiting.
func TestHungRecovery(t *testing.T) {
	f := setUp(t, pkcs11.Config{}).reopen(t, pkcs11.Config{Deadline: time.Second})
	f.open.SetRetryWait(time.Millisecond)
	f.shim.Hang(hsmtest.Login)
	f.shim.Fail(hsmtest.SignInit, p11.CKR_DEVICE_REMOVED, 1)
	wants(t, f.token, "the caller that notices", f.sign(t.Context()), hsm.ErrLost)
	eventually(t, "ErrLost for later callers", func() bool {
		err := f.sign(t.Context())
		if !errors.Is(err, hsm.ErrBusy) && !errors.Is(err, hsm.ErrLost) {
			t.Fatal(err)
		}
		return errors.Is(err, hsm.ErrLost)
	})
	wants(t, f.token, "health", f.open.Err(), hsm.ErrWedged)
	f.shim.Hang(0)
	eventually(t, "signing again", func() bool { return f.sign(t.Context()) == nil })
}

// TestCloseOther: opening and closing one token does not disturb another.
func TestCloseOther(t *testing.T) {
	f := setUp(t, pkcs11.Config{})
	other := f.shim.NewToken(t)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := f.sign(t.Context()); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for range 5 {
		opened, err := pkcs11.Open(t.Context(), pkcs11.Config{Module: other.Module, URI: other.URI, PIN: other.PIN})
		if err != nil {
			t.Fatal(err)
		}
		if err := opened.Close(); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	wg.Wait()
}

// TestInitToken: a label that exists is refused, and tokens are made while
// another one is open.
func TestInitToken(t *testing.T) {
	f := setUp(t, pkcs11.Config{})
	err := pkcs11.InitToken(f.token.Module, f.token.Label, f.token.SOPIN, f.token.PIN)
	wants(t, f.token, "label again", err, hsm.ErrExists)
	for _, label := range []string{"", strings.Repeat("a", 33)} {
		if err := pkcs11.InitToken(f.token.Module, label, f.token.SOPIN, f.token.PIN); err == nil {
			t.Errorf("label of %d octets: made", len(label))
		}
	}
	f.shim.NewToken(t)
	if err := f.sign(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestWrongPINOnce: SoftHSM notes a wrong PIN in the token's flags, so that
// not even the right one is sent after it.
func TestWrongPINOnce(t *testing.T) {
	shim := hsmtest.NewShim(t)
	token := shim.NewToken(t)
	for i, pin := range [][]byte{[]byte("0000-wrong"), token.PIN} {
		_, err := pkcs11.Open(t.Context(), pkcs11.Config{Module: token.Module, URI: token.URI, PIN: pin})
		wants(t, token, fmt.Sprintf("attempt %d", i), err, hsm.ErrPIN)
	}
	if n := shim.Logins(); n != 1 {
		t.Errorf("%d logins, want 1", n)
	}
}
