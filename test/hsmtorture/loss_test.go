package hsmtorture

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// rounds is how often a fault is repeated.
func rounds(short, most int) int {
	if long {
		return most
	}
	return short
}

// during injects one fault that is not a return value of a single call.
func (r *rig) during(f *fault, inject, end func()) {
	r.t.Helper()
	r.now(f)
	inject()
	end()
	recovery := r.settle()
	r.audit()
	r.report.injected(f, recovery)
	r.now(nil)
}

// mustFail proves that a fault is one: when the load has noticed it no key signs
// any more, again and again.
func (r *rig) mustFail() {
	r.t.Helper()
	for _, d := range r.devices {
		eventually(r.t, "a loss", func() bool { return d.opened().Err() != nil })
	}
	for _, d := range r.devices {
		for _, s := range d.keys {
			for range 5 {
				if err := r.signWithin(s, callLimit/10); err == nil {
					r.t.Errorf("%s: signed for %s", r.fault(), s.role)
				}
			}
		}
	}
}

// TestLoss takes sessions, tokens and devices away and gives them back. Nobody
// restarts anything.
func TestLoss(t *testing.T) {
	r := newRig(t)
	r.shim.Delay(int(signTime.Microseconds()))
	r.startLoad()
	logins := r.shim.Logins()
	losses := 0
	for i := range rounds(1, 20) {
		r.during(&fault{phase: "loss", call: "all", kind: "sessions lost"}, func() {
			r.shim.LoseSessions()
		}, func() {})

		r.during(&fault{phase: "loss", call: "all", kind: "device removed"}, func() {
			r.shim.Remove()
			r.mustFail()
		}, r.shim.PutBack)

		// Nobody opens a session while this many are open: 1, the second token
		// none; or no room to sign.
		r.during(&fault{phase: "loss", call: "C_OpenSession", kind: "sessions exhausted"}, func() {
			r.shim.LimitSessions(1 + i%3)
			r.shim.LoseSessions()
			r.mustFail()
		}, func() { r.shim.LimitSessions(0) })

		folder, away := r.devices[1].token.Folder(t), filepath.Join(t.TempDir(), "away")
		r.during(&fault{phase: "loss", call: "all", kind: "token folder moved"}, func() {
			move(t, folder, away)
			r.shim.LoseSessions()
			r.mustFail() // the unit of recovery is the library
		}, func() { move(t, away, folder) })
		losses += 4
	}
	if got := r.shim.Logins() - logins; got < 2*losses {
		t.Errorf("%d logins after %d losses of two tokens, want at least 2 for each", got, losses)
	}
}

func move(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

// TestPINLock: a token that refuses its PIN while it is reopened is asked once.
// Whoever opens it again is refused without a login, as long as its flags say
// that a PIN was wrong.
func TestPINLock(t *testing.T) {
	r := newRig(t)
	r.shim.Delay(int(signTime.Microseconds()))
	r.startLoad()
	for i := range rounds(2, 12) {
		tries := 1 + i%3
		f := &fault{phase: "recover", call: "C_Login", kind: fmt.Sprintf("PIN refused, %d tries", tries), also: []error{hsm.ErrPIN}}
		r.during(f, func() {
			logins := r.shim.Logins()
			r.shim.RefusePIN(tries)
			r.shim.LoseSessions()
			for _, d := range r.devices {
				eventually(t, "ErrPIN", func() bool { return errors.Is(d.opened().Err(), hsm.ErrPIN) })
				eventually(t, "ErrPIN for a caller", func() bool { return errors.Is(r.sign(d.keys[0]), hsm.ErrPIN) })
			}
			if err := r.closeAll(); err != nil {
				t.Errorf("%s: close: %v", f, err)
			}
			for range 3 {
				if err := r.operate(); !errors.Is(err, hsm.ErrPIN) {
					t.Errorf("%s: open: %v, want ErrPIN", f, err)
				}
			}
			if got := r.shim.Logins() - logins; got != 1 {
				t.Errorf("%s: %d logins, want 1", f, got)
			}
		}, func() { r.shim.RefusePIN(0) })
	}
}

// TestWrongSignatures: signatures are corrupted on their way, or made and not
// given. None that is wrong leaves, and each is reported to one caller.
func TestWrongSignatures(t *testing.T) {
	r := newRig(t)
	r.shim.Delay(int(signTime.Microseconds()))
	r.startLoad()
	for i := range rounds(2, 20) {
		every := 1 + i*3
		f := &fault{phase: "sign", call: "C_Sign", kind: "corrupted", also: []error{hsm.ErrBadSignature}}
		corrupted := r.shim.Corrupted()
		r.during(f, func() {
			r.shim.CorruptEvery(every)
			eventually(t, "corruption", func() bool { return r.shim.Corrupted() >= corrupted+8 })
		}, func() { r.shim.CorruptEvery(0) })
		code := codes[lost][i%len(codes[lost])]
		f = &fault{phase: "sign", call: "C_Sign", kind: "made but not given", code: code}
		r.during(f, func() {
			r.shim.FailAfter(hsmtest.Sign, code, 1+i%4)
			eventually(t, "the failure", func() bool { return r.shim.Pending() == 0 })
		}, func() {})
	}
	r.stopLoad()
	if got, want := r.report.count("ErrBadSignature"), r.shim.Corrupted(); got != want || want == 0 {
		t.Errorf("%d callers got ErrBadSignature, %d signatures were corrupted", got, want)
	}
}

// hung are calls that hang, and what makes the stack call them.
var hung = []struct {
	function hsmtest.Function
	lose     bool // needs a recovery
}{
	{hsmtest.Sign, false},
	{hsmtest.Login, true},
	{hsmtest.SignInit, false},
	{hsmtest.OpenSession, true},
	{hsmtest.Initialize, true},
	{hsmtest.Finalize, true},
	{hsmtest.GetTokenInfo, true},
	{hsmtest.FindObjects, true},
	{hsmtest.GetAttributeValue, true},
	{hsmtest.Logout, true},
	{hsmtest.CloseSession, true},
}

// TestHang: a call does not return within the deadline. Callers leave, the
// token says that it is wedged, and when the call has ended another Open helps.
func TestHang(t *testing.T) {
	const deadline = 1500 * time.Millisecond
	r := newRig(t)
	r.hasten(deadline)
	r.shim.Delay(int(signTime.Microseconds()))
	r.startLoad()
	for _, row := range hung[:rounds(2, len(hung))] {
		f := &fault{phase: "sign", call: row.function.String(), kind: "hang"}
		if row.lose {
			f.phase = "recover"
		}
		r.during(f, func() {
			r.shim.Hang(row.function)
			if row.lose {
				r.shim.LoseSessions()
			}
			eventually(t, "a hung call", func() bool { return r.shim.Hanging() > 0 })
			eventually(t, "ErrWedged", func() bool {
				return errors.Is(r.devices[0].opened().Err(), hsm.ErrWedged) || errors.Is(r.devices[1].opened().Err(), hsm.ErrWedged)
			})
			for _, d := range r.devices {
				for _, s := range d.keys {
					_ = r.sign(s) // checked by nobody: only that it returns
				}
			}
		}, func() { r.shim.Hang(0) })
	}
	// Short: it ends before the deadline and nobody notices but the callers.
	for range rounds(1, 10) {
		f := &fault{phase: "sign", call: "C_Sign", kind: "slow"}
		r.during(f, func() {
			r.shim.Hang(hsmtest.Sign)
			eventually(t, "a hung call", func() bool { return r.shim.Hanging() >= 2 })
		}, func() { r.shim.Hang(0) })
	}
}

// TestOneKeyFails: one key's signatures always lose the connection, as they do
// when its object is broken. The others sign, and the tokens are not logged in
// to as fast as they can be.
func TestOneKeyFails(t *testing.T) {
	const watch = 2 * time.Second
	r := newRig(t)
	r.shim.Delay(int(signTime.Microseconds()))
	r.startLoad()
	broken := r.devices[0].keys[0]
	for i := range rounds(1, 4) {
		code := codes[lost][i%len(codes[lost])]
		f := &fault{phase: "sign", call: "C_SignInit", kind: "of one key, always", code: code}
		r.during(f, func() {
			logins, began := r.shim.Logins(), time.Now()
			r.shim.FailKey(broken.id, code)
			for time.Since(began) < watch {
				for _, d := range r.devices {
					for _, s := range d.keys {
						if s != broken {
							eventually(t, "a signature of another key", func() bool { return r.sign(s) == nil })
						}
					}
				}
			}
			got, took := r.shim.Logins()-logins, time.Since(began)
			if most := 2 * losses(took); got > most {
				t.Errorf("%s: %d logins in %s, want at most %d", f, got, took, most)
			}
			if err := r.sign(broken); err == nil {
				t.Errorf("%s: signed", f)
			}
		}, func() { r.shim.FailKey(nil, 0) })
	}
}

// losses says how often a key may take the connection away in this time: once
// because it had signed before, and then after pauses that double from 50 ms to
// 1 s.
func losses(took time.Duration) int {
	n := 1
	for pause := 50 * time.Millisecond; took > 0; pause = min(2*pause, time.Second) {
		took -= pause
		n++
	}
	return n
}
