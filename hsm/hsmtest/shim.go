package hsmtest

import (
	_ "embed"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
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
	words
)

// Function is a PKCS#11 function that the shim can make fail: its place in
// CK_FUNCTION_LIST (PKCS#11 v2.40, pkcs11f.h).
type Function uint64

// The functions that the shim can make fail.
const (
	GetTokenInfo      Function = 6
	OpenSession       Function = 12
	Login             Function = 18
	GetAttributeValue Function = 24
	FindObjectsInit   Function = 26
	SignInit          Function = 42
	Sign              Function = 43
	GenerateKeyPair   Function = 59
	GenerateRandom    Function = 64
)

// Shim is a PKCS#11 module before SoftHSM that counts and misbehaves on
// command. Like SoftHSM it is one for the process. The module behind it is
// SoftHSM's, so a test binary must not hold tokens of both open at once.
type Shim struct {
	// Module is the absolute path of the shim, for pkcs11.Config.
	Module string
	memory []byte
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
	if out, err := exec.Command("gcc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", module, source, "-ldl").CombinedOutput(); err != nil {
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
// lives: a hung C call may still read it.
func mapControl(path string) ([]byte, error) {
	size := int(words) * 8
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

// Reset switches every fault off and sets every counter to zero.
func (s *Shim) Reset() {
	for w := range words {
		if w != wordRunning { // a call may be inside
			s.at(w).Store(0)
		}
	}
}

// Logins counts the C_Login calls for the user since Reset.
func (s *Shim) Logins() int { return int(s.at(wordLogins).Load()) }

// Signs counts the signatures that SoftHSM was asked for since Reset.
func (s *Shim) Signs() int { return int(s.at(wordSigns).Load()) }

// Corrupted counts the signatures that were corrupted since Reset.
func (s *Shim) Corrupted() int { return int(s.at(wordCorrupted).Load()) }

// Failed counts the calls that were made to fail since Reset.
func (s *Shim) Failed() int { return int(s.at(wordFailed).Load()) }

// Running says how many C_Sign calls are inside the shim now.
func (s *Shim) Running() int { return int(s.at(wordRunning).Load()) }

// Peak is the highest Running since Reset.
func (s *Shim) Peak() int { return int(s.at(wordPeak).Load()) }

// Delay makes every C_Sign take this much longer.
func (s *Shim) Delay(microseconds int) { s.at(wordDelay).Store(uint64(microseconds)) }

// Hang makes a function not return until another is named; 0 names none.
func (s *Shim) Hang(function Function) { s.at(wordHang).Store(uint64(function)) }

// CorruptEvery flips a bit in every n-th signature; 0 in none.
func (s *Shim) CorruptEvery(n int) { s.at(wordCorrupt).Store(uint64(n)) }

// TokenFlags adds flags to what C_GetTokenInfo says of initialised tokens.
func (s *Shim) TokenFlags(flags uint) { s.at(wordFlags).Store(uint64(flags)) }

// MaxSessions changes how many read-write sessions C_GetTokenInfo says that a
// token allows; 0 leaves the truth.
func (s *Shim) MaxSessions(n int) { s.at(wordMaxSessions).Store(uint64(n)) }

// Fail makes the next count calls of a function return code.
func (s *Shim) Fail(function Function, code uint, count int) {
	s.at(wordFailCount).Store(0)
	s.at(wordFailFunction).Store(uint64(function))
	s.at(wordFailCode).Store(uint64(code))
	s.at(wordFailCount).Store(uint64(count))
}
