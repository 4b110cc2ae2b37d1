package hsmtorture

import (
	"crypto/ecdsa"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"sync"

	"github.com/chancery-ca/chancery/hsm/hsmtest"
	p11 "github.com/miekg/pkcs11"
)

// ledger knows what callers asked for and got, and is held against what the
// token says it did.
type ledger struct {
	mu       sync.Mutex
	calls    map[string]*call // by key id and digest
	tested   map[string]bool  // key ids whose self-tests sign digests of their own
	slots    map[uint]*login
	made     int // signatures in the records
	given    int // signatures that callers got, found in the records
	inFlight int // signatures of calls that ended with an error
	selfTest int // signatures of self-tests
}

// call is one signature that was asked for.
type call struct {
	done bool
	sig  string // r ‖ s as the caller got it, "" for an error
	made []hsmtest.Record
}

// login is what may happen next at a slot.
type login struct {
	tried   bool // on this connection
	refused bool // and nobody has decided to go on
}

func newLedger() *ledger {
	return &ledger{calls: map[string]*call{}, tested: map[string]bool{}, slots: map[uint]*login{}}
}

func name(id, digest []byte) string { return string(id) + "|" + string(digest) }

// selfTests says that the key with this id is proved by the stack itself.
func (l *ledger) selfTests(id []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tested[string(id)] = true
}

func (l *ledger) begin(id, digest []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.calls[name(id, digest)] = &call{}
}

func (l *ledger) failed(id, digest []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.calls[name(id, digest)].done = true
}

// released enters a signature that a caller got.
func (l *ledger) released(id, digest, der []byte, pub *ecdsa.PublicKey) error {
	var sig struct{ R, S *big.Int }
	if rest, err := asn1.Unmarshal(der, &sig); err != nil || len(rest) != 0 {
		return fmt.Errorf("signature is not DER: %w", err)
	}
	size := (pub.Curve.Params().BitSize + 7) / 8
	raw := make([]byte, 2*size)
	sig.R.FillBytes(raw[:size])
	sig.S.FillBytes(raw[size:])
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.calls[name(id, digest)]
	c.done, c.sig = true, string(raw)
	return nil
}

// forgive is the operator's decision to log in after a refused PIN.
func (l *ledger) forgive() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.slots {
		s.refused = false
	}
}

// killed says that the process with the token is gone, and its logins with it.
func (l *ledger) killed() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.slots {
		s.tried = false
	}
}

// audit takes the new records in, and checks what callers have got by now.
func (l *ledger) audit(records func() ([]hsmtest.Record, error)) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var got []string // before the records are read: theirs are among them
	for name, c := range l.calls {
		if c.done && c.sig != "" {
			got = append(got, name)
		}
	}
	all, err := records()
	if err != nil {
		return err
	}
	var problems []error
	for _, r := range all {
		problems = append(problems, l.enter(r))
	}
	for _, name := range got {
		if !l.calls[name].wasMade() {
			problems = append(problems, errors.New("a signature left that the token did not make"))
		}
		l.given++
		l.made += len(l.calls[name].made)
		delete(l.calls, name)
	}
	return errors.Join(problems...)
}

// wasMade says whether the token made, and gave, what the caller got.
func (c *call) wasMade() bool {
	for _, r := range c.made {
		if string(r.Signature) == c.sig && !r.Corrupted && r.Code == p11.CKR_OK {
			return true
		}
	}
	return false
}

// enter takes one record in.
func (l *ledger) enter(r hsmtest.Record) error {
	switch r.Function {
	case hsmtest.Sign:
		return l.signed(r)
	case hsmtest.Login:
		return l.loggedIn(r)
	case hsmtest.Logout, hsmtest.CloseAllSessions:
		if r.Code == p11.CKR_OK && l.slots[r.Slot] != nil {
			l.slots[r.Slot].tried = false
		}
	case hsmtest.Finalize, hsmtest.Lost:
		for _, s := range l.slots {
			s.tried = s.tried && r.Code != p11.CKR_OK
		}
	}
	return nil
}

// signed finds the call that a signature was made for.
func (l *ledger) signed(r hsmtest.Record) error {
	if c := l.calls[name(r.ID, r.Digest)]; c != nil {
		c.made = append(c.made, r)
		return nil
	}
	if l.tested[string(r.ID)] {
		l.made++
		l.selfTest++
		return nil
	}
	return fmt.Errorf("the token signed %x with key %x, which nobody asked for", r.Digest, r.ID)
}

// loggedIn checks that a login was allowed.
func (l *ledger) loggedIn(r hsmtest.Record) error {
	s := l.slots[r.Slot]
	if s == nil {
		s = &login{}
		l.slots[r.Slot] = s
	}
	var err error
	switch {
	case s.refused:
		err = fmt.Errorf("record %d: slot %d: login after a PIN error", r.Sequence, r.Slot)
	case s.tried:
		err = fmt.Errorf("record %d: slot %d: second login on one connection", r.Sequence, r.Slot)
	}
	s.tried = true
	s.refused = s.refused || refuses(r.Code)
	return err
}

// refuses says whether a return value of C_Login is about the PIN or unknown:
// then nothing may try again.
func refuses(code uint) bool {
	switch code {
	case p11.CKR_OK:
		return false
	}
	c := classOf(code)
	return c != lost && c != busy
}

// unaccounted says which signatures were made for calls that have no error,
// when every call has ended.
func (l *ledger) unaccounted() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var problems []string
	for _, c := range l.calls {
		if !c.done {
			problems = append(problems, "a call has not ended")
		}
		l.made += len(c.made)
		l.inFlight += len(c.made)
	}
	if l.given == 0 {
		problems = append(problems, "no signature was given: this shows nothing")
	}
	return problems
}
