package tpm_test

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/tpm"
)

// patience bounds a wait for what must happen: only to end a hang.
const patience = 2 * time.Minute

// until polls until f is true, or fails the test.
func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for began := time.Now(); !f(); <-tick.C {
		if time.Since(began) > patience {
			t.Fatalf("%s: did not happen", what)
		}
	}
}

// load signs with keys from many goroutines until stop is called, which returns
// how many signatures were made. Every error must be one of a lost token.
func load(t *testing.T, keys ...hsm.Key) (made *atomic.Int64, stop func()) {
	t.Helper()
	made = new(atomic.Int64)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for ctx.Err() == nil {
				err := sign(context.Background(), keys[i%len(keys)])
				switch {
				case err == nil:
					made.Add(1)
				case errors.Is(err, hsm.ErrBusy):
					runtime.Gosched()
				case !errors.Is(err, hsm.ErrLost):
					t.Errorf("sign: %v, want ErrBusy or ErrLost", err)
				}
			}
		})
	}
	stop = func() {
		cancel()
		wg.Wait()
	}
	t.Cleanup(stop)
	return made, stop
}

// TestComesBack: the TPM is power-cycled or its emulator killed, during a
// signing load; the load goes on without anybody opening anything.
func TestComesBack(t *testing.T) {
	rows := []struct {
		name string
		hurt func(t *testing.T, e *hsmtest.Emulator)
	}{
		{"power cycle under the connection", func(t *testing.T, e *hsmtest.Emulator) { e.Reset(t) }},
		{"killed and restarted", func(t *testing.T, e *hsmtest.Emulator) { e.Stop(t); e.Start(t) }},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			e := hsmtest.SWTPM(t)
			token := open(t, e.Config(t))
			keys := []hsm.Key{
				hsmtest.NewKey(t, token, "a", hsm.ECDSAP256), hsmtest.NewKey(t, token, "b", hsm.ECDSAP256),
				hsmtest.NewKey(t, token, "c", hsm.ECDSAP384), hsmtest.NewKey(t, token, "d", hsm.ECDSAP256),
			}
			made, stop := load(t, keys...)
			for range 5 {
				before := made.Load()
				until(t, "signatures before the loss", func() bool { return made.Load() > before })
				row.hurt(t, e)
				after := made.Load()
				until(t, "signatures after the return", func() bool { return made.Load() > after+16 })
			}
			stop()
			for _, key := range keys {
				signs(t, key)
			}
			if objects, sessions, err := token.Handles(t.Context()); err != nil || objects > 3 || sessions != 1 {
				t.Errorf("%d objects, %d sessions, %v", objects, sessions, err)
			}
			if err := token.Close(); err != nil {
				t.Fatal(err)
			}
			empty(t, e)
		})
	}
}

// TestOneRetry: an idle token whose TPM was power-cycled signs at the first
// call, because that is tried once more.
func TestOneRetry(t *testing.T) {
	e := hsmtest.SWTPM(t)
	token := open(t, e.Config(t))
	key := hsmtest.NewKey(t, token, "key", hsm.ECDSAP256)
	e.Reset(t)
	signs(t, key)
	e.Stop(t)
	e.Start(t)
	signs(t, key)
}

// TestAway: while the TPM is gone, the caller who finds out gets ErrLost, later
// ones ErrBusy at once, and health says so; it comes back by itself.
func TestAway(t *testing.T) {
	e := hsmtest.SWTPM(t)
	token := hsmtest.OpenTPM(t, e.Config(t))
	if wait := token.RetryWait(); wait > 2*time.Second {
		t.Errorf("the caller who finds out would wait for %s, want 2 s at most", wait)
	}
	key := hsmtest.NewKey(t, token, "key", hsm.ECDSAP256)
	token.SetRetryWait(time.Millisecond)
	e.Stop(t)
	wants(t, "the caller who finds out", sign(t.Context(), key), hsm.ErrLost)
	token.SetRetryWait(10 * patience) // which later callers do not wait
	for range 3 {
		began := time.Now()
		wants(t, "a later caller", sign(t.Context(), key), hsm.ErrBusy)
		if took := time.Since(began); took > patience {
			t.Errorf("ErrBusy took %s", took)
		}
	}
	wants(t, "health", token.Err(), hsm.ErrBusy)
	_, err := token.Generate(t.Context(), hsm.Spec{Label: "new", ID: hsmtest.RandomID(), Algorithm: hsm.ECDSAP256})
	wants(t, "generate", err, hsm.ErrBusy)
	e.Start(t)
	until(t, "health after the return", func() bool { return token.Err() == nil })
	signs(t, key)
}

// TestAnotherTPM: another TPM at the same socket does not have the keys, and
// says so.
func TestAnotherTPM(t *testing.T) {
	e := hsmtest.SWTPM(t)
	token := open(t, e.Config(t))
	key := hsmtest.NewKey(t, token, "key", hsm.ECDSAP256)
	e.Stop(t)
	e.Forget(t)
	e.Start(t)
	until(t, "an answer", func() bool {
		err := sign(t.Context(), key)
		if err == nil {
			t.Fatal("another TPM signed with the key")
		}
		return errors.Is(err, hsm.ErrMismatch)
	})
}

// TestCloseWhileAway: Close ends a recovery.
func TestCloseWhileAway(t *testing.T) {
	e := hsmtest.SWTPM(t)
	token := open(t, e.Config(t))
	key := hsmtest.NewKey(t, token, "key", hsm.ECDSAP256)
	token.SetRetryWait(time.Millisecond)
	e.Stop(t)
	wants(t, "sign", sign(t.Context(), key), hsm.ErrLost)
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	wants(t, "health", token.Err(), hsm.ErrLost)
}

// TestHang: a TPM that does not answer wedges the token after the deadline:
// everybody who waits is told, and nobody hangs.
func TestHang(t *testing.T) {
	e := hsmtest.SWTPM(t)
	cfg := e.Config(t)
	token := open(t, cfg)
	ref := hsmtest.NewKey(t, token, "key", hsm.ECDSAP256).Ref()
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	token, key := openHasty(t, cfg, ref)
	e.Freeze(t)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() { wants(t, "sign while it hangs", sign(t.Context(), key), hsm.ErrWedged) })
	}
	ctx, cancel := context.WithTimeout(t.Context(), hastyDeadline/8)
	defer cancel()
	if err := sign(ctx, key); !errors.Is(err, hsm.ErrLost) && !errors.Is(err, hsm.ErrBusy) {
		t.Errorf("sign with a shorter context: %v", err)
	}
	wg.Wait()
	wants(t, "health", token.Err(), hsm.ErrWedged)
	wants(t, "sign later", sign(t.Context(), key), hsm.ErrWedged)
	if err := token.Close(); err != nil {
		t.Errorf("Close of a wedged token: %v", err)
	}
	e.Thaw(t)
	token = open(t, cfg) // a new process, as it were
	opened, err := token.Open(t.Context(), ref, hsm.RoleCT)
	if err != nil {
		t.Fatal(err)
	}
	signs(t, opened)
}

// hastyDeadline is one that a machine under load may miss.
const hastyDeadline = 300 * time.Millisecond

// openHasty opens a token with the hasty deadline and the key in it, as often as
// it takes until the key signs.
func openHasty(t *testing.T, cfg tpm.Config, ref hsm.Ref) (*tpm.Token, hsm.Key) {
	t.Helper()
	cfg.Deadline = hastyDeadline
	var token *tpm.Token
	var key hsm.Key
	until(t, "a signature in haste", func() bool {
		var err error
		if token, err = tpm.Open(t.Context(), cfg); err != nil {
			return false
		}
		if key, err = token.Open(t.Context(), ref, hsm.RoleNone); err == nil {
			err = sign(t.Context(), key)
		}
		if err != nil {
			until(t, "close", func() bool { return token.Close() == nil })
		}
		return err == nil
	})
	t.Cleanup(func() { _ = token.Close() })
	return token, key
}

// TestHangOnOpen: Open does not outlive its deadline, nor its context.
func TestHangOnOpen(t *testing.T) {
	e := hsmtest.SWTPM(t)
	cfg := e.Config(t)
	e.Freeze(t)
	defer e.Thaw(t)
	cfg.Deadline = 200 * time.Millisecond
	_, err := tpm.Open(t.Context(), cfg)
	wants(t, "deadline", err, hsm.ErrLost)
	cfg.Deadline = time.Minute
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err = tpm.Open(ctx, cfg)
	wants(t, "context", err, hsm.ErrLost)
}

// TestBusyShares: when one share's line is full the others are served.
func TestBusyShares(t *testing.T) {
	e := hsmtest.SWTPM(t)
	cfg := e.Config(t)
	cfg.MaxQueue = 4
	token := open(t, cfg)
	made := hsmtest.NewKey(t, token, "key", hsm.ECDSAP256)
	flood, err := token.Open(t.Context(), made.Ref(), hsm.RoleCT)
	if err != nil {
		t.Fatal(err)
	}
	head, err := token.Open(t.Context(), made.Ref(), hsm.RoleRekor)
	if err != nil {
		t.Fatal(err)
	}
	_, stop := load(t, flood)
	defer stop()
	for range 50 {
		signs(t, head)
	}
}
