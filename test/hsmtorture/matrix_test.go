package hsmtorture

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// phase is something that our stack does with the second token while all keys
// sign.
type phase struct {
	name string
	// before brings the token to where the phase begins.
	before func(*rig) error
	// do is the phase. It returns the caller's error. consumed says whether
	// the fault has happened.
	do func(r *rig, consumed func() bool) error
	// after looks at what do has left, when there is no fault any more.
	after func(r *rig, err error) error
	// also are the errors of its own that it documents.
	also []error
}

// phases in the order of a token's life.
var phases = []phase{
	{
		name:   "open",
		before: func(r *rig) error { return r.devices[1].closeDevice() },
		do:     func(r *rig, _ func() bool) error { return r.openDevice(r.devices[1]) },
		// A slot that cannot be read is passed over.
		also: []error{hsm.ErrNotFound},
	},
	{
		name: "sign",
		do:   func(_ *rig, consumed func() bool) error { return until(consumed) },
	},
	{
		name: "recover",
		do: func(r *rig, consumed func() bool) error {
			r.shim.LoseSessions()
			return until(consumed)
		},
	},
	{
		name: "generate",
		do: func(r *rig, _ func() bool) error {
			r.fresh = hsmtest.RandomID()
			r.ledger.selfTests(r.fresh)
			ctx, cancel := context.WithTimeout(r.t.Context(), patience)
			defer cancel()
			key, err := r.devices[1].opened().Generate(ctx, hsm.Spec{Label: freshLabel, ID: r.fresh, Algorithm: hsm.ECDSAP256})
			if err == nil {
				s := &signer{id: r.fresh, pub: key.Public().(*ecdsa.PublicKey)}
				s.key.Store(&key)
				err = r.sign(s)
			}
			return err
		},
		after: (*rig).removeFresh,
	},
	{
		name: "evidence",
		do: func(r *rig, _ func() bool) error {
			s := r.devices[1].keys[0]
			ctx, cancel := context.WithTimeout(r.t.Context(), patience)
			defer cancel()
			_, err := r.devices[1].opened().Evidence(ctx, *s.key.Load())
			return err
		},
	},
	{
		name: "read",
		do: func(r *rig, _ func() bool) error {
			ctx, cancel := context.WithTimeout(r.t.Context(), patience)
			defer cancel()
			token := r.devices[1].opened()
			_, random := token.Random(ctx, 16)
			n, keys := token.Keys(ctx)
			if keys == nil && n != len(r.devices[1].keys) {
				keys = fmt.Errorf("%d keys counted, want %d", n, len(r.devices[1].keys))
			}
			_, find := token.Find(ctx, r.devices[1].keys[0].id)
			return errors.Join(random, keys, find)
		},
	},
	{
		name: "close",
		do:   func(r *rig, _ func() bool) error { return r.devices[1].closeDevice() },
	},
}

// freshLabel is the label of the key that the generate phase makes.
const freshLabel = "fresh"

// until waits for what the load will come to.
func until(done func() bool) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for began := time.Now(); !done(); <-tick.C {
		if time.Since(began) > patience {
			return errNotReached
		}
	}
	return nil
}

// errNotReached: the call that shall fail was not made.
var errNotReached = errors.New("the call was not made")

// removeFresh looks whether the generation happened, says that what Generate
// said was true, and removes what it left. The token is closed, to forget the
// key.
func (r *rig) removeFresh(err error) error {
	d := r.devices[1]
	_, found := d.opened().Find(r.t.Context(), r.fresh)
	if err == nil && found != nil {
		return fmt.Errorf("the generated key is not found: %w", found)
	}
	if err := destroy(d, freshLabel); err != nil {
		return err
	}
	if err := d.closeDevice(); err != nil {
		return err
	}
	return r.openDevice(d)
}

// owns says whether a function that the phase calls is injected into in it.
// Signing has a phase of its own; sessions are opened when they are first
// needed, and for sure when a connection begins. C_GetFunctionList is called
// when a library is loaded, which C_Initialize stands for.
func (p phase) owns(f hsmtest.Function) bool {
	switch f {
	case hsmtest.SignInit, hsmtest.Sign:
		return p.name == "sign"
	case hsmtest.OpenSession:
		return p.name == "open" || p.name == "recover"
	}
	return f != hsmtest.GetFunctionList && p.name != "sign"
}

// succeeds says whether a call can be made to fail after it succeeded. A session
// that was opened and not given is the token's leak; lost ones are not closed.
func (p phase) succeeds(f hsmtest.Function) bool {
	switch f {
	case hsmtest.OpenSession:
		return false
	case hsmtest.Logout, hsmtest.CloseSession:
		return p.name != "recover"
	}
	return true
}

// survey runs every phase without a fault and says which functions each calls.
func (r *rig) survey() map[string][]hsmtest.Function {
	r.t.Helper()
	calls := map[string][]hsmtest.Function{}
	for _, p := range phases {
		if p.before != nil {
			if err := p.before(r); err != nil {
				r.t.Fatalf("%s: %v", p.name, err)
			}
		}
		before := map[hsmtest.Function]int{}
		for f := range hsmtest.Functions() {
			before[f] = r.shim.Calls(f)
		}
		err := p.do(r, func() bool { return r.signAll() == nil })
		for f := range hsmtest.Functions() {
			if r.shim.Calls(f) > before[f] && p.owns(f) {
				calls[p.name] = append(calls[p.name], f)
			}
		}
		if err == nil && p.after != nil {
			err = p.after(r, nil)
		}
		if err != nil {
			r.t.Fatalf("%s: %v", p.name, err)
		}
		if r.devices[1].opened() == nil {
			if err := r.openDevice(r.devices[1]); err != nil {
				r.t.Fatal(err)
			}
		}
	}
	return calls
}

// inject makes one call of a function fail in a phase: instead of what it does,
// or after it has done it.
func (r *rig) inject(p phase, function hsmtest.Function, kind class, code uint, after bool) {
	r.t.Helper()
	f := &fault{phase: p.name, call: function.String(), kind: string(kind), code: code, also: p.documented(function, kind)}
	if after {
		f.kind += ", but done"
	}
	if p.before != nil {
		if err := p.before(r); err != nil {
			r.t.Fatalf("%s: before: %v", f, err)
		}
	}
	r.now(f)
	failed := r.shim.Failed()
	if after {
		r.shim.FailAfter(function, code, 1)
	} else {
		r.shim.Fail(function, code, 1)
	}
	err := p.do(r, func() bool { return r.shim.Pending() == 0 })
	r.shim.Fail(0, 0, 0)
	if r.shim.Failed() == failed {
		r.t.Errorf("%s: %v", f, errNotReached)
	}
	if err != nil && !f.allows(err) {
		r.t.Errorf("%s: error %v is not of the documented set", f, err)
	}
	r.report.saw(f, err)
	recovery := r.settle()
	if p.after != nil {
		if err := p.after(r, err); err != nil {
			r.t.Errorf("%s: after: %v", f, err)
		}
	}
	r.audit()
	r.report.injected(f, recovery)
	r.now(nil)
	if n, most := r.shim.Sessions(), 2*(sessions+extra); n > most {
		r.t.Errorf("%s: %d sessions are open, want at most %d", f, n, most)
	}
}

// documented are the errors that a caller may get for a return value of this
// class, besides ErrBusy, ErrLost and the value itself.
func (p phase) documented(function hsmtest.Function, kind class) []error {
	also := slices.Clone(p.also)
	switch {
	case kind == fatal, function == hsmtest.Login:
		also = append(also, hsm.ErrPIN)
	case function == hsmtest.GetAttributeValue && (kind == callers || kind == unknown):
		// An attribute that cannot be read satisfies no policy.
		also = append(also, hsm.ErrPolicy)
	case function == hsmtest.GetMechanismInfo:
		also = append(also, hsm.ErrUnsupported)
	}
	return also
}

// TestMatrix makes each call of each phase fail with codes of each class; in
// the long form with every code that the table has for it, and signing with
// every code that hsm/pkcs11 knows.
func TestMatrix(t *testing.T) {
	r := newRig(t)
	calls := r.survey()
	r.shim.Delay(int(signTime.Microseconds()))
	r.startLoad()
	turn := 0
	for _, p := range phases {
		if len(calls[p.name]) == 0 {
			t.Errorf("phase %s makes no call", p.name)
		}
		for _, f := range calls[p.name] {
			for i, kind := range classes {
				if !long && i != turn%len(classes) {
					continue // the next class in the next call
				}
				for _, code := range chosen(p, kind, turn) {
					r.inject(p, f, kind, code, false)
				}
			}
			if p.succeeds(f) && (long || turn%3 == 0) {
				r.inject(p, f, lost, codes[lost][turn%len(codes[lost])], true)
			}
			if t.Failed() {
				return
			}
			turn++
		}
	}
	if long && r.report.total < 500 {
		t.Errorf("%d faults, want 500", r.report.total)
	}
}

// chosen are the codes of a class for a phase: in the short form the next.
func chosen(p phase, kind class, turn int) []uint {
	if !long {
		return codes[kind][turn/len(classes)%len(codes[kind]):][:1]
	}
	if p.name == "sign" {
		return append(slices.Clone(codes[kind]), more[kind]...)
	}
	return codes[kind]
}
