package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/miekg/pkcs11"
)

// ErrOpen: the token is open already in this process. A second login would
// share the first one's session state and accept any PIN, so it is refused.
var ErrOpen = errors.New("token is open already in this process")

// registry holds the one owner of each module path. C_Initialize and
// C_Finalize act on the whole process, so nothing else may call them.
var registry = struct {
	mu      sync.Mutex
	modules map[string]*module
}{modules: map[string]*module{}}

// module owns a PKCS#11 library: when it is initialised, which tokens of it
// are open, and their recovery.
type module struct {
	path string
	raw  *pkcs11.Ctx // never initialised while live > 0; see handle

	// lock is held, by having put a value in, while the library is initialised
	// or finalised, tokens are opened or closed or initialised. A channel and
	// not a mutex, so that waiting for it can end.
	lock   chan struct{}
	live   int                 // under lock: crypto11 contexts, so the library is initialised if > 0
	shared *pkcs11.Ctx         // under lock: crypto11's own handle while live > 0, else nil
	tokens map[*Token]struct{} // under lock: what is open

	// alone is held during each visit to a library that takes one call at a
	// time (oneCall), and of no use to others. It comes before any Token.gate.
	alone    sync.Mutex
	oneCall  bool
	recovery recovery
}

// oneCallOnly are the libraries, by file name, that several threads must not
// call: when the server of p11-kit's client (0.24) goes away in the middle of
// an answer, the threads that wait for other answers on the same connection
// never return. It loses nothing: the server takes a connection's calls in
// turn.
var oneCallOnly = map[string]bool{"p11-kit-client.so": true}

// enter begins a visit to the library. The visit ends with what it returns.
func (m *module) enter() (leave func()) {
	if !m.oneCall {
		return func() {}
	}
	m.alone.Lock()
	return m.alone.Unlock
}

// moduleFor returns the owner of the library at path, loading it the first
// time. Two names of one file have one owner.
func moduleFor(path string) (*module, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("load module %.200q: want an absolute path", path)
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, fmt.Errorf("load module: %w", err)
	}
	registry.mu.Lock()
	defer registry.mu.Unlock()
	if m, ok := registry.modules[real]; ok {
		return m, nil
	}
	raw := pkcs11.New(real)
	if raw == nil {
		return nil, fmt.Errorf("load module %s: not a PKCS#11 library", real)
	}
	m := &module{path: real, raw: raw, lock: make(chan struct{}, 1), tokens: map[*Token]struct{}{},
		oneCall: oneCallOnly[filepath.Base(real)]}
	registry.modules[real] = m
	return m, nil
}

// exclusive runs f while holding lock. It returns ErrBusy if ctx ends before,
// and ErrLost if it ends while f runs; f then goes on alone, keeps the lock,
// and late is called when it has succeeded after all.
func (m *module) exclusive(ctx context.Context, f func() error, late func()) error {
	select {
	case m.lock <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("wait for module: %w (%w)", hsm.ErrBusy, context.Cause(ctx))
	}
	var state atomic.Int32
	done := make(chan error, 1)
	go func() {
		defer func() { <-m.lock }()
		defer m.enter()()
		err := f()
		if !state.CompareAndSwap(waited, ended) && err == nil {
			late()
		}
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		if state.CompareAndSwap(waited, abandoned) {
			return fmt.Errorf("module gave no answer: %w (%w)", hsm.ErrLost, context.Cause(ctx))
		}
		return <-done // it has just finished
	}
}

// The states of an exclusive function: its caller waits, it has ended, or its
// caller has left. Whoever moves it out of waited decides.
const (
	waited int32 = iota
	ended
	abandoned
)

// initialised runs f with the library initialised, for as long as f takes if
// no connection keeps it so. The caller holds lock.
func (m *module) initialised(f func() error) error {
	if m.live == 0 {
		err := m.raw.Initialize()
		if errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)) {
			// An earlier C_Finalize, of crypto11 or ours, went wrong.
			_ = m.raw.Finalize()
			err = m.raw.Initialize()
		}
		if err != nil {
			return fmt.Errorf("initialise module: %w", classify(err))
		}
		defer func() { _ = m.raw.Finalize() }() // nothing is open, so nothing is lost
	}
	return f()
}

// handle returns the handle that is initialised: crypto11's own while it has
// one. To load the library a second time is not the same everywhere: SoftHSM
// has one state for the process, p11-kit's client a new connection, not logged
// in, for each C_GetFunctionList.
func (m *module) handle() *pkcs11.Ctx {
	if m.shared != nil {
		return m.shared
	}
	return m.raw
}

// present lists the initialised tokens that are there. A slot that cannot be
// read is passed over: a stranger's broken reader must not stop ours.
func (m *module) present() ([]hsm.TokenInfo, error) {
	slots, err := m.handle().GetSlotList(true)
	if err != nil {
		return nil, fmt.Errorf("list slots: %w", classify(err))
	}
	var version string
	if info, err := m.handle().GetInfo(); err == nil {
		version = fmt.Sprintf("%d.%d", info.LibraryVersion.Major, info.LibraryVersion.Minor)
	}
	var tokens []hsm.TokenInfo
	for _, slot := range slots {
		info, err := m.handle().GetTokenInfo(slot)
		if err != nil || info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			continue
		}
		t := tokenInfo(slot, info)
		t.Module, t.ModuleVersion = m.path, version
		tokens = append(tokens, t)
	}
	return tokens, nil
}

// locate finds the one present token that u names, and the serial number or
// label that singles it out among all of them.
func (m *module) locate(u uri) (found hsm.TokenInfo, by uri, err error) {
	tokens, err := m.present()
	if err != nil {
		return found, by, err
	}
	var matches, serials, labels int
	for _, t := range tokens {
		if u.names(t) {
			found = t
			matches++
		}
	}
	switch {
	case matches == 0:
		return found, by, fmt.Errorf("token: %w", hsm.ErrNotFound)
	case matches > 1:
		return found, by, fmt.Errorf("%d tokens: %w", matches, hsm.ErrAmbiguous)
	}
	for _, t := range tokens {
		if t.Serial == found.Serial {
			serials++
		}
		if t.Label == found.Label {
			labels++
		}
	}
	switch {
	case found.Serial != "" && serials == 1:
		return found, uri{serial: found.Serial}, nil
	case found.Label != "" && labels == 1:
		return found, uri{token: found.Label}, nil
	}
	return found, by, fmt.Errorf("neither its serial number nor its label is its own: %w", hsm.ErrAmbiguous)
}

// flagNames are the token flags by value (PKCS#11 v2.40, Section 3.2, CK_TOKEN_INFO).
var flagNames = []struct {
	flag uint
	name string
}{
	{pkcs11.CKF_RNG, "RNG"},
	{pkcs11.CKF_WRITE_PROTECTED, "WRITE_PROTECTED"},
	{pkcs11.CKF_LOGIN_REQUIRED, "LOGIN_REQUIRED"},
	{pkcs11.CKF_USER_PIN_INITIALIZED, "USER_PIN_INITIALIZED"},
	{pkcs11.CKF_RESTORE_KEY_NOT_NEEDED, "RESTORE_KEY_NOT_NEEDED"},
	{pkcs11.CKF_CLOCK_ON_TOKEN, "CLOCK_ON_TOKEN"},
	{pkcs11.CKF_PROTECTED_AUTHENTICATION_PATH, "PROTECTED_AUTHENTICATION_PATH"},
	{pkcs11.CKF_DUAL_CRYPTO_OPERATIONS, "DUAL_CRYPTO_OPERATIONS"},
	{pkcs11.CKF_TOKEN_INITIALIZED, "TOKEN_INITIALIZED"},
	{pkcs11.CKF_USER_PIN_COUNT_LOW, "USER_PIN_COUNT_LOW"},
	{pkcs11.CKF_USER_PIN_FINAL_TRY, "USER_PIN_FINAL_TRY"},
	{pkcs11.CKF_USER_PIN_LOCKED, "USER_PIN_LOCKED"},
	{pkcs11.CKF_USER_PIN_TO_BE_CHANGED, "USER_PIN_TO_BE_CHANGED"},
	{pkcs11.CKF_SO_PIN_COUNT_LOW, "SO_PIN_COUNT_LOW"},
	{pkcs11.CKF_SO_PIN_FINAL_TRY, "SO_PIN_FINAL_TRY"},
	{pkcs11.CKF_SO_PIN_LOCKED, "SO_PIN_LOCKED"},
	{pkcs11.CKF_SO_PIN_TO_BE_CHANGED, "SO_PIN_TO_BE_CHANGED"},
	{pkcs11.CKF_ERROR_STATE, "ERROR_STATE"},
}

// refusing are the flags under which no PIN is sent.
var refusing = []string{"USER_PIN_COUNT_LOW", "USER_PIN_FINAL_TRY", "USER_PIN_LOCKED", "USER_PIN_TO_BE_CHANGED"}

// tokenInfo translates a CK_TOKEN_INFO, without its padding.
func tokenInfo(slot uint, info pkcs11.TokenInfo) hsm.TokenInfo {
	trim := func(s string) string { return strings.TrimRight(s, " \x00") }
	version := func(v pkcs11.Version) string { return fmt.Sprintf("%d.%d", v.Major, v.Minor) }
	t := hsm.TokenInfo{
		Label: trim(info.Label), Manufacturer: trim(info.ManufacturerID),
		Model: trim(info.Model), Serial: trim(info.SerialNumber),
		Firmware: version(info.FirmwareVersion), Hardware: version(info.HardwareVersion),
		Slot: slot,
	}
	for _, f := range flagNames {
		if info.Flags&f.flag != 0 {
			t.Flags = append(t.Flags, f.name)
		}
	}
	return t
}

// checkPINFlags refuses a token whose flags say that a wrong PIN was entered
// before, or that there is no PIN. Nothing was sent to it.
func checkPINFlags(t hsm.TokenInfo) error {
	has := func(name string) bool {
		for _, f := range t.Flags {
			if f == name {
				return true
			}
		}
		return false
	}
	for _, name := range refusing {
		if has(name) {
			return fmt.Errorf("token flag %s is set: %w", name, hsm.ErrPIN)
		}
	}
	if !has("USER_PIN_INITIALIZED") {
		return fmt.Errorf("token has no user PIN: %w", hsm.ErrPIN)
	}
	return nil
}

// InitToken makes a token with this label in the first slot that has none, and
// sets its SO PIN and its user PIN. It never touches an initialised token: a
// label that exists is ErrExists, no free slot is ErrNotFound. It may be called
// while other tokens of the module are open.
func InitToken(modulePath, label string, soPIN, pin []byte) error {
	if len(label) == 0 || len(label) > 32 {
		return fmt.Errorf("initialise token: label of %d octets, want 1 to 32", len(label))
	}
	m, err := moduleFor(modulePath)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	soPIN, pin = slices.Clone(soPIN), slices.Clone(pin) // an abandoned call goes on
	err = m.exclusive(ctx, func() error {
		defer func() { clear(soPIN); clear(pin) }()
		return m.initialised(func() error { return m.initToken(label, soPIN, pin) })
	}, func() {})
	if err != nil {
		return fmt.Errorf("initialise token %s: %w", label, err)
	}
	return nil
}

// initToken does InitToken's work; the library is initialised.
func (m *module) initToken(label string, soPIN, pin []byte) error {
	tokens, err := m.present()
	if err != nil {
		return err
	}
	for _, t := range tokens {
		if t.Label == label {
			return hsm.ErrExists
		}
	}
	slot, info, err := m.freeSlot()
	if err != nil {
		return err
	}
	for _, p := range [][]byte{soPIN, pin} { // before anything is written
		if n := uint(len(p)); n < info.MinPinLen || n > info.MaxPinLen {
			return fmt.Errorf("PIN of %d octets, want %d to %d: %w", n, info.MinPinLen, info.MaxPinLen, hsm.ErrPIN)
		}
	}
	raw := m.handle()
	if err := raw.InitToken(slot, string(soPIN), label); err != nil {
		return fmt.Errorf("C_InitToken: %w", classify(err))
	}
	session, err := raw.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return fmt.Errorf("open session: %w", classify(err))
	}
	defer func() { _ = raw.CloseSession(session) }() // also logs out
	if err := raw.Login(session, pkcs11.CKU_SO, string(soPIN)); err != nil {
		return fmt.Errorf("log in as security officer: %w", classify(err))
	}
	if err := raw.InitPIN(session, string(pin)); err != nil {
		return fmt.Errorf("set user PIN: %w", classify(err))
	}
	return nil
}

// freeSlot returns a slot whose token is present and not initialised.
func (m *module) freeSlot() (uint, pkcs11.TokenInfo, error) {
	slots, err := m.handle().GetSlotList(true)
	if err != nil {
		return 0, pkcs11.TokenInfo{}, fmt.Errorf("list slots: %w", classify(err))
	}
	for _, slot := range slots {
		info, err := m.handle().GetTokenInfo(slot)
		if err == nil && info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			return slot, info, nil
		}
	}
	return 0, pkcs11.TokenInfo{}, fmt.Errorf("free slot: %w", hsm.ErrNotFound)
}
