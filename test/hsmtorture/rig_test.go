// Package hsmtorture makes a token misbehave in every way that its shim knows
// while keys of several roles sign, and holds what left against what was made.
//
// After each fault these hold:
//   - Every signature that a caller got verifies, and is one that the token
//     made for this key and this digest (the shim's records).
//   - Every signature that the token made and no caller got belongs to a call
//     that ended with an error, or to a self-test.
//   - No connection logged in twice, and after a PIN error nothing logged in
//     until somebody opened the token again.
//   - Errors are of the documented set, for what was injected.
//   - All keys sign again after the fault's end: in the long form within 10 s.
//
// At the end no session and no goroutine is left.
//
// The short form is part of go test ./...; CHANCERY_TORTURE_HSM=1 runs the long
// one (make torture-hsm). Both print what was injected and what came of it.
package hsmtorture

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
	p11 "github.com/miekg/pkcs11"
)

// long says whether every fault is injected, or a sample.
var long = os.Getenv("CHANCERY_TORTURE_HSM") == "1"

const (
	// recoveryLimit is how long signing may take to come back, in the long form.
	recoveryLimit = 10 * time.Second
	// patience bounds every wait: only to end a hang.
	patience = 2 * time.Minute
	// signTime is what the shim adds to each signature: it paces the load.
	signTime = 6 * time.Millisecond
	// callLimit ends the wait of one call while calls hang.
	callLimit = 3 * time.Second
	// sessions is the MaxSessions of each token, and extra what its login and
	// reading take.
	sessions = 4
	extra    = 2
	// signersPerKey goroutines sign with each key.
	signersPerKey = 2
)

// device is one token and the keys that sign on it.
type device struct {
	token hsmtest.SoftHSMToken
	cfg   pkcs11.Config
	keys  []*signer

	mu   sync.Mutex
	open *pkcs11.Token // nil while closed
}

// signer is one key with its role. Its key is found again when the device was
// closed and opened.
type signer struct {
	ref  hsm.Ref
	role hsm.Role
	id   []byte
	pub  *ecdsa.PublicKey
	key  atomic.Pointer[hsm.Key] // nil while the device is closed
}

// rig is a shim with tokens behind it, a load and its ledger. The first token is
// never closed but by whoever stands for the operator.
type rig struct {
	t       *testing.T
	shim    *hsmtest.Shim
	devices []*device
	ledger  *ledger
	limit   time.Duration // of one call of the load
	report  *report
	fresh   []byte // id of the key that the generate phase made last

	faultsMu sync.Mutex
	faults   []*fault // under faultsMu: what was injected, in its order, nil for the end

	stop chan struct{}
	load sync.WaitGroup
}

// now says that f is injected from now on; nil that nothing is.
func (r *rig) now(f *fault) {
	r.faultsMu.Lock()
	defer r.faultsMu.Unlock()
	r.faults = append(r.faults, f)
}

// fault is what is injected now.
func (r *rig) fault() *fault {
	since := r.since(r.moment())
	return since[len(since)-1]
}

// moment is a place in the order of faults.
func (r *rig) moment() int {
	r.faultsMu.Lock()
	defer r.faultsMu.Unlock()
	return len(r.faults) - 1
}

// since gives the fault of a moment and those that came after it.
func (r *rig) since(moment int) []*fault {
	r.faultsMu.Lock()
	defer r.faultsMu.Unlock()
	return slices.Clone(r.faults[moment:])
}

// roles are those of the keys on each token.
var roles = [2][]struct {
	role      hsm.Role
	algorithm hsm.Algorithm
}{
	{{hsm.RoleIntermediate, hsm.ECDSAP256}, {hsm.RoleCT, hsm.ECDSAP256}, {hsm.RoleRekor, hsm.ECDSAP256}},
	{{hsm.RoleTSA, hsm.ECDSAP384}, {hsm.RoleTUFOnline, hsm.ECDSAP256}},
}

// newRig makes two tokens and their keys and opens them.
func newRig(t *testing.T) *rig {
	t.Helper()
	shim := hsmtest.NewShim(t)
	return newRigOn(t, shim, shim.NewToken(t), shim.NewToken(t))
}

// newRigOn makes keys on empty tokens behind the shim and opens them. Everything
// is closed and checked when the test ends.
func newRigOn(t *testing.T, shim *hsmtest.Shim, tokens ...hsmtest.SoftHSMToken) *rig {
	t.Helper()
	r := &rig{
		t: t, shim: shim, ledger: newLedger(), report: newReport(), stop: make(chan struct{}),
		limit: patience, faults: []*fault{nil},
	}
	goroutines := runtime.NumGoroutine()
	for i, token := range tokens {
		d := &device{token: token, cfg: pkcs11.Config{
			Module: token.Module, URI: token.URI, PIN: token.PIN,
			MaxSessions: sessions, Deadline: patience, Logger: slog.New(slog.DiscardHandler),
		}}
		r.devices = append(r.devices, d)
		r.makeKeys(d, i)
	}
	r.audit() // what generating left in the records
	t.Cleanup(func() { r.end(goroutines) })
	return r
}

// hasten opens the devices with a deadline that calls can outlive, and perhaps do
// on a machine under load: as often as it takes.
func (r *rig) hasten(deadline time.Duration) {
	r.t.Helper()
	if err := r.closeAll(); err != nil {
		r.t.Fatal(err)
	}
	for _, d := range r.devices {
		d.cfg.Deadline = deadline
	}
	r.limit = callLimit
	r.settle()
}

// makeKeys opens a fresh token, makes the keys of its roles and opens them.
func (r *rig) makeKeys(d *device, i int) {
	r.t.Helper()
	if err := r.openDevice(d); err != nil {
		r.t.Fatal(err)
	}
	for _, row := range roles[i] {
		id := hsmtest.RandomID()
		r.ledger.selfTests(id)
		made, err := d.open.Generate(r.t.Context(), hsm.Spec{Label: string(row.role), ID: id, Algorithm: row.algorithm})
		if err != nil {
			r.t.Fatal(err)
		}
		d.keys = append(d.keys, &signer{ref: made.Ref(), role: row.role, id: id, pub: made.Public().(*ecdsa.PublicKey)})
	}
	if err := d.findKeys(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
}

// openDevice opens a closed device and finds its keys, or what is missing of
// that.
func (r *rig) openDevice(d *device) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.open == nil {
		opened, err := pkcs11.Open(r.t.Context(), d.cfg)
		if err != nil {
			return err
		}
		d.open = opened
	}
	return d.findKeys(r.t.Context())
}

// findKeys opens every key for its role. The caller holds mu or is alone.
func (d *device) findKeys(ctx context.Context) error {
	for _, s := range d.keys {
		key, err := d.open.Open(ctx, s.ref, s.role)
		if err != nil {
			return err
		}
		s.key.Store(&key)
	}
	return nil
}

// closeDevice closes an open device; its keys are gone for the load.
func (d *device) closeDevice() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.open == nil {
		return nil
	}
	for _, s := range d.keys {
		s.key.Store(nil)
	}
	if err := d.open.Close(); err != nil {
		return err
	}
	d.open = nil
	return nil
}

// opened is the open token, or nil.
func (d *device) opened() *pkcs11.Token {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.open
}

// ready says whether the device is open with all its keys.
func (d *device) ready() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range d.keys {
		if s.key.Load() == nil {
			return false
		}
	}
	return d.open != nil
}

// errClosed is a call with a key of a device that the test has closed.
var errClosed = errors.New("the test has closed the device")

// sign signs a random digest and enters it in the ledger. The error is nil,
// errClosed or the key's.
func (r *rig) sign(s *signer) error { return r.signWithin(s, r.limit) }

// signWithin is sign with a limit of its own.
func (r *rig) signWithin(s *signer, limit time.Duration) error {
	key := s.key.Load()
	if key == nil {
		return errClosed
	}
	algorithm, err := hsm.AlgorithmOf(s.pub)
	if err != nil {
		return err
	}
	digest := make([]byte, algorithm.Hash().Size())
	_, _ = rand.Read(digest) // never fails
	ctx, cancel := context.WithTimeout(r.t.Context(), limit)
	defer cancel()
	r.ledger.begin(s.id, digest)
	sig, err := (*key).SignContext(ctx, digest, algorithm.Hash())
	if err != nil {
		r.ledger.failed(s.id, digest)
		return err
	}
	if !ecdsa.VerifyASN1(s.pub, digest, sig) {
		r.t.Errorf("a wrong signature of %s left", s.role)
	}
	if err := r.ledger.released(s.id, digest, sig, s.pub); err != nil {
		r.t.Error(err)
	}
	return nil
}

// startLoad signs with every key until stopLoad.
func (r *rig) startLoad() {
	for _, d := range r.devices {
		for _, s := range d.keys {
			for range signersPerKey {
				r.load.Go(func() { r.signOn(s) })
			}
		}
	}
}

// signOn signs until the load ends, and checks every error.
func (r *rig) signOn(s *signer) {
	rest := time.NewTicker(3 * time.Millisecond) // between errors, which come at once
	defer rest.Stop()
	for {
		began := r.moment()
		err := r.sign(s)
		// This goroutine may be late: perhaps the fault that it met is over.
		met := r.since(began)
		of := slices.IndexFunc(met, func(f *fault) bool { return f.allows(err) })
		if err != nil && !errors.Is(err, errClosed) && of < 0 {
			r.t.Errorf("%s: sign for %s: error %v is not of the documented set", met, s.role, err)
		}
		r.report.saw(met[max(of, 0)], err)
		select {
		case <-r.stop:
			return
		default:
		}
		if err != nil {
			<-rest.C
		}
	}
}

// stopLoad ends the load.
func (r *rig) stopLoad() {
	select {
	case <-r.stop:
	default:
		close(r.stop)
	}
	r.load.Wait()
}

// settle waits until every key signs, as somebody does who operates the
// service: what died of a PIN error, or is wedged, is closed and opened again.
// It fails the test after recoveryLimit, or patience.
func (r *rig) settle() time.Duration {
	r.t.Helper()
	limit := patience
	if long {
		limit = recoveryLimit
	}
	began := time.Now()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		err := r.operate()
		if err == nil {
			if err = r.signAll(); err == nil {
				return time.Since(began)
			}
		}
		if time.Since(began) > limit {
			r.t.Fatalf("%s: no recovery in %s: %v", r.fault(), limit, err)
		}
		<-tick.C
	}
}

// signAll signs once with every key.
func (r *rig) signAll() error {
	for _, d := range r.devices {
		for _, s := range d.keys {
			if err := r.sign(s); err != nil {
				return fmt.Errorf("sign for %s: %w", s.role, err)
			}
		}
	}
	return nil
}

// operate restarts what does not come back by itself. A module that died of
// its PIN is opened again when all its tokens are closed.
func (r *rig) operate() error {
	for _, d := range r.devices {
		token := d.opened()
		if token == nil {
			continue
		}
		switch err := token.Err(); {
		case errors.Is(err, hsm.ErrPIN):
			return r.closeAll()
		case errors.Is(err, hsm.ErrWedged):
			return d.closeDevice()
		}
	}
	for _, d := range r.devices {
		if !d.ready() {
			r.audit()
			r.ledger.forgive() // an operator's decision
			if err := r.openDevice(d); err != nil {
				return err
			}
		}
	}
	return nil
}

// closeAll closes every device.
func (r *rig) closeAll() error {
	var all error
	for _, d := range r.devices {
		all = errors.Join(all, d.closeDevice())
	}
	return all
}

// audit holds the records against the ledger.
func (r *rig) audit() {
	r.t.Helper()
	if err := r.ledger.audit(r.shim.Records); err != nil {
		r.t.Fatalf("%s: %v", r.fault(), err)
	}
}

// end stops the load, closes everything, and counts what is left.
func (r *rig) end(goroutines int) {
	r.shim.Hang(0)
	r.shim.PutBack()
	r.shim.Fail(0, 0, 0)
	r.stopLoad()
	for _, d := range r.devices {
		eventually(r.t, "close", func() bool { return d.closeDevice() == nil })
	}
	r.audit()
	for _, problem := range r.ledger.unaccounted() {
		r.t.Error(problem)
	}
	if n := r.shim.Sessions(); n != 0 {
		r.t.Errorf("%d sessions are left", n)
	}
	eventually(r.t, fmt.Sprintf("the end of all but %d goroutines", goroutines), func() bool { return runtime.NumGoroutine() <= goroutines })
	if runtime.NumGoroutine() > goroutines {
		buf := make([]byte, 1<<20)
		r.t.Logf("goroutines:\n%s", buf[:runtime.Stack(buf, true)])
	}
	r.report.print(r.t, r.ledger)
}

// eventually polls for what must happen.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for began := time.Now(); !done(); <-tick.C {
		if time.Since(began) > patience {
			t.Errorf("%s did not happen", what)
			return
		}
	}
}

// destroy removes the objects with this label, through the library itself,
// whose state is one for the process.
func destroy(d *device, label string) error {
	lib := p11.New(d.cfg.Module)
	session, err := lib.OpenSession(d.opened().Info().Slot, p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION)
	if err != nil {
		return err
	}
	defer func() { _ = lib.CloseSession(session) }()
	if err := lib.FindObjectsInit(session, []*p11.Attribute{p11.NewAttribute(p11.CKA_LABEL, label)}); err != nil {
		return err
	}
	objects, _, err := lib.FindObjects(session, 10)
	if final := lib.FindObjectsFinal(session); err == nil {
		err = final
	}
	for _, object := range objects {
		err = errors.Join(err, lib.DestroyObject(session, object))
	}
	return err
}
