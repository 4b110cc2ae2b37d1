package hsmtest

import (
	"bytes"
	_ "embed"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"
)

// shimSource is the C source of the shim.
//
//go:embed testdata/shim.c
var shimSource []byte

// word is the place of a word in the control file; shim.c has the same list.
type word int

const (
	wordLogins word = iota
	wordSigns
	wordDelay
	wordHang
	wordCorrupt
	wordRunning
	wordPeak
	wordFlags
	wordFailFunction
	wordFailCode
	wordFailCount
	wordCorrupted
	wordFailed
	wordMaxSessions
	wordFailSkip
	wordFailAfter
	wordHanging
	wordLose
	wordRemoved
	wordPINTries
	wordPINWrong
	wordSessionLimit
	wordSessions
	wordSessionsPeak
	wordRecords
	wordKeyCode
	wordKeyID
	wordPass

	wordCalls word = 32 // and one more for each function
	words     word = 128
)

// ringSize is how many records the shim keeps.
const ringSize = 1 << 16

// Shim is a PKCS#11 module before SoftHSM that records what it signs and
// misbehaves on command. Like SoftHSM it is one for the process. The module
// behind it is SoftHSM's, so a test binary must not hold tokens of both open
// at once. Its methods are safe for concurrent use, but for Records; one fault
// of a kind is set at a time.
//
// A call of any function goes through these steps: it is counted (Calls);
// hangs (Hang); takes every session away (LoseSessions); fails (Fail); finds
// the device gone (Remove); asks SoftHSM; fails after all (FailAfter).
type Shim struct {
	// Module is the absolute path of the shim, for pkcs11.Config.
	Module string
	memory []byte
	next   uint64 // of the records: what Records has not given yet
}

// theShim is built at the first use.
var theShim = sync.OnceValues(buildShim)

// NewShim returns the shim with every fault switched off and every counter at
// zero, and sees to it that the next test finds it so. The test is skipped (or
// failed, see Missing) where SoftHSM or a C compiler is missing.
func NewShim(t testing.TB) *Shim {
	t.Helper()
	sharedHome(t)
	if _, err := exec.LookPath("gcc"); err != nil {
		Missing(t, "gcc is not installed: the PKCS#11 shim cannot be built")
	}
	shim, err := theShim()
	if err != nil {
		t.Fatal(err)
	}
	shim.Reset()
	t.Cleanup(shim.Reset)
	return shim
}

// NewToken makes a fresh token behind the shim.
func (s *Shim) NewToken(t testing.TB) SoftHSMToken {
	t.Helper()
	return newToken(t, s.Module)
}

// buildShim compiles the shim into the home's directory and maps its control
// file.
func buildShim() (*Shim, error) {
	home, err := shared()
	if err != nil {
		return nil, err
	}
	dir := filepath.Dir(home.Dir())
	source, module, control := filepath.Join(dir, "shim.c"), filepath.Join(dir, "shim.so"), filepath.Join(dir, "control")
	if err := os.WriteFile(source, shimSource, 0o600); err != nil {
		return nil, err
	}
	if out, err := exec.Command("gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread", "-o", module, source, "-ldl").CombinedOutput(); err != nil {
		return nil, errors.New("build shim: " + string(out))
	}
	memory, err := mapControl(control)
	if err != nil {
		return nil, err
	}
	env := map[string]string{"CHANCERY_SHIM_MODULE": home.Module(), "CHANCERY_SHIM_CONTROL": control}
	for name, value := range env {
		if err := os.Setenv(name, value); err != nil {
			return nil, err
		}
	}
	return &Shim{Module: module, memory: memory}, nil
}

// mapControl makes the control file and maps it for as long as the process
// lives: a hung C call may still read it. Its pages take room when they are
// written.
func mapControl(path string) ([]byte, error) {
	size := int(words)*8 + ringSize*recordSize
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	if err := f.Truncate(int64(size)); err != nil {
		return nil, err
	}
	return syscall.Mmap(int(f.Fd()), 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
}

// at returns a word of the control file.
func (s *Shim) at(w word) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&s.memory[int(w)*8]))
}

// Reset switches every fault off, sets every counter to zero and forgets the
// records. Sessions that are open and calls that are inside still count.
func (s *Shim) Reset() {
	for w := range words {
		switch w {
		case wordRunning, wordHanging, wordSessions, wordRecords:
		default:
			s.at(w).Store(0)
		}
	}
	s.next = s.at(wordRecords).Load()
}

// Forget is for processes with the shim in them that were killed: their
// sessions and calls are no more.
func (s *Shim) Forget() {
	for _, w := range []word{wordRunning, wordHanging, wordSessions} {
		s.at(w).Store(0)
	}
}

// Logins counts the C_Login calls for the user since Reset.
func (s *Shim) Logins() int { return int(s.at(wordLogins).Load()) }

// Signs counts the signatures that SoftHSM made since Reset.
func (s *Shim) Signs() int { return int(s.at(wordSigns).Load()) }

// Corrupted counts the signatures that were corrupted since Reset.
func (s *Shim) Corrupted() int { return int(s.at(wordCorrupted).Load()) }

// Failed counts the calls that Fail and FailAfter made to fail since Reset.
func (s *Shim) Failed() int { return int(s.at(wordFailed).Load()) }

// Calls counts the calls of a function since Reset; those of C_Sign that ask
// for a length do not count.
func (s *Shim) Calls(f Function) int { return int(s.at(wordCalls + word(f) - 1).Load()) }

// Running says how many C_Sign calls are inside the shim now.
func (s *Shim) Running() int { return int(s.at(wordRunning).Load()) }

// Peak is the highest Running since Reset.
func (s *Shim) Peak() int { return int(s.at(wordPeak).Load()) }

// Hanging says how many calls hang now.
func (s *Shim) Hanging() int { return int(s.at(wordHanging).Load()) }

// Sessions says how many sessions are open now.
func (s *Shim) Sessions() int { return int(s.at(wordSessions).Load()) }

// SessionsPeak is the highest Sessions since Reset.
func (s *Shim) SessionsPeak() int { return int(s.at(wordSessionsPeak).Load()) }

// Delay makes every C_Sign take this much longer.
func (s *Shim) Delay(microseconds int) { s.at(wordDelay).Store(uint64(microseconds)) }

// Hang makes a function not return until another is named; 0 names none.
func (s *Shim) Hang(function Function) { s.at(wordHang).Store(uint64(function)) }

// Pass lets one of the calls that hang go on, or else the next that would hang.
func (s *Shim) Pass() { s.at(wordPass).Add(1) }

// CorruptEvery flips a bit in every n-th signature; 0 in none.
func (s *Shim) CorruptEvery(n int) { s.at(wordCorrupt).Store(uint64(n)) }

// TokenFlags adds flags to what C_GetTokenInfo says of initialised tokens.
func (s *Shim) TokenFlags(flags uint) { s.at(wordFlags).Store(uint64(flags)) }

// MaxSessions changes how many read-write sessions C_GetTokenInfo says that a
// token allows; 0 leaves the truth.
func (s *Shim) MaxSessions(n int) { s.at(wordMaxSessions).Store(uint64(n)) }

// LimitSessions makes C_OpenSession return CKR_SESSION_COUNT while n sessions
// or more are open; 0 does not.
func (s *Shim) LimitSessions(n int) { s.at(wordSessionLimit).Store(uint64(n)) }

// RefusePIN makes every user PIN wrong, as a token does that allows this many
// tries: CKR_PIN_INCORRECT each time, then CKR_PIN_LOCKED. Its flags show it
// (PKCS#11 v2.40, Section 3.2): USER_PIN_COUNT_LOW after the first,
// USER_PIN_FINAL_TRY before the last, USER_PIN_LOCKED after it. 0 makes the
// PIN right and the flags clear again.
func (s *Shim) RefusePIN(tries int) {
	s.at(wordPINWrong).Store(0)
	s.at(wordPINTries).Store(uint64(tries))
}

// LoseSessions takes every session of the process that makes the next call
// away, and with them its logins. No call is inside SoftHSM meanwhile, which
// would not survive it.
func (s *Shim) LoseSessions() { s.at(wordLose).Store(1) }

// Remove pulls the device: its sessions are lost, no slot has a token,
// functions on sessions return CKR_DEVICE_REMOVED and those on slots
// CKR_TOKEN_NOT_PRESENT.
func (s *Shim) Remove() {
	s.at(wordRemoved).Store(1)
	s.LoseSessions()
}

// PutBack ends Remove.
func (s *Shim) PutBack() { s.at(wordRemoved).Store(0) }

// Fail makes the next count calls of a function return code without asking
// SoftHSM.
func (s *Shim) Fail(function Function, code uint, count int) { s.rule(function, code, 0, count, 0) }

// FailLater is Fail after the next skip calls.
func (s *Shim) FailLater(function Function, code uint, skip, count int) {
	s.rule(function, code, skip, count, 0)
}

// FailAfter makes the next count successful calls of a function return code:
// what they did was done, and the answer was lost. It has no meaning for
// GetFunctionList, WaitForSlotEvent and functions that open sessions.
func (s *Shim) FailAfter(function Function, code uint, count int) {
	s.rule(function, code, 0, count, 1)
}

// FailKey makes every C_SignInit with the key of this CKA_ID, of which the first
// 8 octets count, return code; code 0 none.
func (s *Shim) FailKey(id []byte, code uint) {
	var begin [8]byte
	copy(begin[:], id)
	s.at(wordKeyCode).Store(0)
	s.at(wordKeyID).Store(binary.NativeEndian.Uint64(begin[:]))
	s.at(wordKeyCode).Store(uint64(code))
}

func (s *Shim) rule(function Function, code uint, skip, count, after int) {
	s.at(wordFailCount).Store(0)
	s.at(wordFailSkip).Store(uint64(skip))
	s.at(wordFailAfter).Store(uint64(after))
	s.at(wordFailFunction).Store(uint64(function))
	s.at(wordFailCode).Store(uint64(code))
	s.at(wordFailCount).Store(uint64(count))
}

// Pending says how many calls Fail and FailAfter will still make to fail.
func (s *Shim) Pending() int { return int(s.at(wordFailCount).Load()) }

// Record is one event at the token, in the order of Sequence.
type Record struct {
	Sequence uint64 // from 1, without gaps but for torn records
	// Function is Sign or SignFinal (a signature was made), Login (of the
	// user), Logout, CloseAllSessions, Initialize, Finalize or Lost.
	Function Function
	Code     uint // what the caller was told
	// Slot is where it happened, or ^0 for the whole library.
	Slot uint
	// Corrupted: the caller got another signature than Signature.
	Corrupted bool
	// Injected: Code is the shim's, not SoftHSM's.
	Injected bool
	// ID is the CKA_ID of the signing key. Digest is what C_Sign was given, at
	// most 64 octets. Signature is what SoftHSM made, r ‖ s, before anything
	// was done to it.
	ID, Digest, Signature []byte
}

// record is a Record in the ring; shim.c has the same.
type record struct {
	sequence                           atomic.Uint64
	function, code, slot, flags        uint64
	idLength, dataLength, signatureLen uint64
	id                                 [32]byte
	data                               [64]byte
	signature                          [96]byte
}

const recordSize = int(unsafe.Sizeof(record{}))

// ErrRecords: the shim's ring went round before Records was called.
var ErrRecords = errors.New("records of the shim were overwritten")

// Records gives the records since the last call of it or of Reset. A process
// that was killed may have torn a record; it is left out. One goroutine at a
// time may call it.
func (s *Shim) Records() ([]Record, error) {
	end := s.at(wordRecords).Load()
	if end-s.next > ringSize {
		return nil, ErrRecords
	}
	var all []Record
	for ; s.next < end; s.next++ {
		r := (*record)(unsafe.Pointer(&s.memory[int(words)*8+int(s.next%ringSize)*recordSize]))
		if !written(r, s.next+1) {
			continue
		}
		all = append(all, Record{
			Sequence: s.next + 1, Function: Function(r.function), Code: uint(r.code), Slot: uint(r.slot),
			Corrupted: r.flags&1 != 0, Injected: r.flags&2 != 0,
			ID: bytes.Clone(r.id[:r.idLength]), Digest: bytes.Clone(r.data[:r.dataLength]),
			Signature: bytes.Clone(r.signature[:r.signatureLen]),
		})
		if s.at(wordRecords).Load()-s.next > ringSize {
			return nil, ErrRecords
		}
	}
	return all, nil
}

// tornAfter is how long a record may take to be written: a few instructions, of a
// thread that may have to wait for a processor.
const tornAfter = 10 * time.Second

// written waits for a record that is being written, and says whether it is.
func written(r *record, sequence uint64) bool {
	for began := time.Now(); r.sequence.Load() != sequence; runtime.Gosched() {
		if time.Since(began) > tornAfter {
			return false
		}
	}
	return true
}
