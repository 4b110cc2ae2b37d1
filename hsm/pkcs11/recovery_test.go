package pkcs11_test

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
	p11 "github.com/miekg/pkcs11"
)

// halting is a log that stops who writes a certain record to it, the first time:
// the supervisor, between two of its steps.
type halting struct {
	slog.Handler
	message string
	once    *sync.Once
	reached chan struct{} // closed when the record was written
	goOn    chan struct{} // closed by the test
}

func newHalting(message string) halting {
	return halting{
		Handler: slog.DiscardHandler, message: message, once: new(sync.Once),
		reached: make(chan struct{}), goOn: make(chan struct{}),
	}
}

func (h halting) Enabled(context.Context, slog.Level) bool { return true }
func (h halting) WithAttrs([]slog.Attr) slog.Handler       { return h }
func (h halting) WithGroup(string) slog.Handler            { return h }

func (h halting) Handle(_ context.Context, r slog.Record) error {
	if r.Message == h.message {
		h.once.Do(func() {
			close(h.reached)
			<-h.goOn
		})
	}
	return nil
}

// setUpHalting opens a fresh token whose supervisor stops at this record.
func setUpHalting(t *testing.T, message string) (fixture, halting) {
	t.Helper()
	h := newHalting(message)
	f := setUp(t, pkcs11.Config{Logger: slog.New(h)})
	t.Cleanup(func() { // before the token is closed
		select {
		case <-h.goOn:
		default:
			close(h.goOn)
		}
	})
	return f, h
}

// loseSessions takes every session of the token away.
func (f fixture) loseSessions(t *testing.T) {
	t.Helper()
	if err := p11.New(f.open.Info().Module).CloseAllSessions(f.open.Info().Slot); err != nil {
		t.Fatal(err)
	}
}

// TestLostAgainAtOnce: who signs as soon as the new connection is there finds the
// token well; and when that connection is lost before the supervisor has come to
// its end, the loss is not forgotten: its caller too is tried again.
func TestLostAgainAtOnce(t *testing.T) {
	f, h := setUpHalting(t, "module reopened")
	answers := make(chan error, 2)
	f.loseSessions(t)
	go func() { answers <- f.sign(t.Context()) }()
	<-h.reached
	wants(t, f.token, "sign on the new connection", f.sign(t.Context()), nil)
	wants(t, f.token, "health", f.open.Err(), nil)
	f.loseSessions(t)
	go func() { answers <- f.sign(t.Context()) }()
	eventually(t, "the second loss", func() bool { return errors.Is(f.open.Err(), hsm.ErrBusy) })
	close(h.goOn)
	for range cap(answers) {
		wants(t, f.token, "the callers that noticed", <-answers, nil)
	}
}

// TestLostForAll: who comes after a loss gets ErrBusy, also while the supervisor
// has not yet begun; nothing more goes over that connection.
func TestLostForAll(t *testing.T) {
	f, h := setUpHalting(t, "connection lost, reopening the module")
	answer := make(chan error, 1)
	f.shim.Fail(hsmtest.SignInit, p11.CKR_DEVICE_REMOVED, 1)
	go func() { answer <- f.sign(t.Context()) }()
	<-h.reached
	calls := f.shim.Calls(hsmtest.SignInit)
	wants(t, f.token, "a later caller", f.sign(t.Context()), hsm.ErrBusy)
	if got := f.shim.Calls(hsmtest.SignInit); got != calls {
		t.Errorf("%d calls over a lost connection", got-calls)
	}
	close(h.goOn)
	wants(t, f.token, "the caller that noticed", <-answer, nil)
}

// TestNoLoginAfterRefusal: from the moment at which a PIN was refused while the
// module was reopened nothing logs in, until every token is closed; then whoever
// opens one has decided to.
func TestNoLoginAfterRefusal(t *testing.T) {
	f, h := setUpHalting(t, "module is dead: PIN refused while reopening")
	logins := f.shim.Logins()
	f.shim.Fail(hsmtest.Login, p11.CKR_PIN_INCORRECT, 1)
	f.loseSessions(t)
	answer := make(chan error, 1)
	go func() { answer <- f.sign(t.Context()) }()
	<-h.reached
	wants(t, f.token, "health", f.open.Err(), hsm.ErrPIN)
	cfg := pkcs11.Config{Module: f.token.Module, URI: f.token.URI, PIN: f.token.PIN}
	_, err := pkcs11.Open(t.Context(), cfg)
	wants(t, f.token, "open while it is dead", err, hsm.ErrPIN)
	if got := f.shim.Logins() - logins; got != 1 {
		t.Errorf("%d logins, want 1", got)
	}
	if err := f.open.Close(); err != nil {
		t.Error(err)
	}
	close(h.goOn)
	wants(t, f.token, "the caller that noticed", <-answer, hsm.ErrLost)
	opened, err := pkcs11.Open(t.Context(), cfg)
	if err != nil {
		t.Fatalf("open after all were closed: %v", err)
	}
	wants(t, f.token, "health of what was opened", opened.Err(), nil)
	if err := opened.Close(); err != nil {
		t.Error(err)
	}
}

// TestOpenDuringRecovery: a token that was closed while it was away does not
// disturb the next one that is opened, however late its recovery ends.
func TestOpenDuringRecovery(t *testing.T) {
	f, h := setUpHalting(t, "module not reopened yet")
	f.open.SetRetryWait(time.Millisecond)
	f.shim.Fail(hsmtest.GetTokenInfo, p11.CKR_TOKEN_NOT_PRESENT, 1<<30)
	f.loseSessions(t)
	wants(t, f.token, "the caller that notices", f.sign(t.Context()), hsm.ErrLost)
	<-h.reached
	if err := f.open.Close(); err != nil {
		t.Fatal(err)
	}
	f.shim.Fail(hsmtest.GetTokenInfo, 0, 0)
	logins := f.shim.Logins()
	again, err := pkcs11.Open(t.Context(), pkcs11.Config{Module: f.token.Module, URI: f.token.URI, PIN: f.token.PIN})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := again.Close(); err != nil {
			t.Error(err)
		}
	}()
	close(h.goOn)
	eventually(t, "the end of the recovery", func() bool {
		if _, err := again.Random(t.Context(), 8); err != nil {
			t.Fatalf("a token just opened: %v", err)
		}
		return again.Err() == nil
	})
	if got := f.shim.Logins() - logins; got != 1 {
		t.Errorf("%d logins, want the one of Open", got)
	}
}

// TestStaleLogin: a session that is logged in, and that nobody here knows of, is
// closed before the token is opened, which logs in itself. Another token of the
// library does not notice.
func TestStaleLogin(t *testing.T) {
	f := setUp(t, pkcs11.Config{}) // the library stays initialised
	other := f.shim.NewToken(t)
	lib := p11.New(other.Module)
	slots, err := lib.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	for _, slot := range slots {
		info, err := lib.GetTokenInfo(slot)
		if err != nil || info.Label != other.Label {
			continue
		}
		session, err := lib.OpenSession(slot, p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION)
		if err != nil {
			t.Fatal(err)
		}
		if err := lib.Login(session, p11.CKU_USER, string(other.PIN)); err != nil {
			t.Fatal(err)
		}
	}
	logins := f.shim.Logins()
	opened, err := pkcs11.Open(t.Context(), pkcs11.Config{Module: other.Module, URI: other.URI, PIN: other.PIN})
	if err != nil {
		t.Fatal(err)
	}
	if got := f.shim.Logins() - logins; got != 1 {
		t.Errorf("%d logins, want 1", got)
	}
	wants(t, f.token, "sign meanwhile", f.sign(t.Context()), nil)
	if err := opened.Close(); err != nil {
		t.Error(err)
	}
}
