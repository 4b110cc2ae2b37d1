// Package softhsm keeps private SoftHSM homes: directories with their own
// configuration and tokens, for the demo, rehearsals and tests.
//
// It promises that nothing outside the directory is read or written: not the
// machine's /etc/softhsm, not another home's tokens. SoftHSM reads its
// configuration from the environment of the process when it is initialised, so
// there is one home per process; a second one is refused.
//
// A token here is software. Its keys are in files under the home, encrypted
// with the user PIN; hsm.Evidence says LevelSoftware of them.
package softhsm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gofrs/flock"
	"github.com/google/renameio/v2"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
)

// ErrNotInstalled: libsofthsm2.so is in none of the known places.
var ErrNotInstalled = errors.New("SoftHSM is not installed (Debian: apt install softhsm2)")

// ErrOtherHome: this process uses another home already.
var ErrOtherHome = errors.New("another SoftHSM home is in use in this process")

// modulePaths are where distributions put the library.
var modulePaths = []string{
	"/usr/lib/softhsm/libsofthsm2.so",
	"/usr/lib64/softhsm/libsofthsm2.so",
	"/usr/lib64/pkcs11/libsofthsm2.so",
	"/usr/lib/pkcs11/libsofthsm2.so",
	"/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
	"/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
	"/usr/local/lib/softhsm/libsofthsm2.so",
	"/opt/homebrew/lib/softhsm/libsofthsm2.so",
}

// Module returns the absolute path of SoftHSM's library, or ErrNotInstalled.
func Module() (string, error) {
	for _, path := range modulePaths {
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			return path, nil
		}
	}
	return "", ErrNotInstalled
}

const (
	confName   = "softhsm2.conf"
	tokensName = "tokens"
	// confEnv is the variable from which SoftHSM learns where its
	// configuration is.
	confEnv = "SOFTHSM2_CONF"
)

// current is the home of this process.
var current struct {
	mu  sync.Mutex
	dir string
}

// Home is a directory with a SoftHSM configuration and tokens. It is safe for
// concurrent use.
type Home struct {
	dir    string
	module string
}

// Create makes a home in dir, which is made if it is missing (mode 0700) and
// must not be a home already, and makes it the home of this process.
func Create(dir string) (*Home, error) {
	h, err := newHome(dir)
	if err != nil {
		return nil, fmt.Errorf("create SoftHSM home: %w", err)
	}
	if err := h.use(); err != nil {
		return nil, fmt.Errorf("create SoftHSM home %s: %w", h.dir, err)
	}
	if err := h.write(); err != nil {
		return nil, fmt.Errorf("create SoftHSM home: %w", err)
	}
	return h, nil
}

// Open makes the home that Create made in dir the home of this process. A home
// that was moved is refused: its configuration names the old place.
func Open(dir string) (*Home, error) {
	h, err := newHome(dir)
	if err != nil {
		return nil, fmt.Errorf("open SoftHSM home: %w", err)
	}
	conf, err := os.ReadFile(h.conf())
	if err != nil {
		return nil, fmt.Errorf("open SoftHSM home: %w", err)
	}
	if string(conf) != h.confText() {
		return nil, fmt.Errorf("open SoftHSM home: %s is not what Create writes here", h.conf())
	}
	if err := h.use(); err != nil {
		return nil, fmt.Errorf("open SoftHSM home %s: %w", h.dir, err)
	}
	return h, nil
}

func newHome(dir string) (*Home, error) {
	module, err := Module()
	if err != nil {
		return nil, err
	}
	dir, err = filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if strings.ContainsAny(dir, "\n\r") {
		return nil, errors.New("line break in the path")
	}
	return &Home{dir: dir, module: module}, nil
}

// write makes the directories and the configuration, and overwrites nothing. The
// configuration is there when all is: what a kill leaves before it is no home yet,
// and is gone on with.
func (h *Home) write() error {
	if err := os.MkdirAll(filepath.Join(h.dir, tokensName), 0o700); err != nil {
		return err
	}
	partial := filepath.Join(h.dir, ".partial-"+confName)
	f, err := os.OpenFile(partial, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(h.confText())
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Link(partial, h.conf())
	}
	return errors.Join(err, os.Remove(partial))
}

func (h *Home) conf() string { return filepath.Join(h.dir, confName) }

// confText is the configuration: tokens in files of this home, no log below
// errors, and no other mechanism than the library's own list.
func (h *Home) confText() string {
	return "directories.tokendir = " + filepath.Join(h.dir, tokensName) + "\n" +
		"objectstore.backend = file\n" +
		"log.level = ERROR\n" +
		"slots.removable = false\n" +
		"slots.mechanisms = ALL\n" +
		"library.reset_on_fork = false\n"
}

// use makes h the home of this process, before the library is initialised.
func (h *Home) use() error {
	current.mu.Lock()
	defer current.mu.Unlock()
	if current.dir != "" && current.dir != h.dir {
		return fmt.Errorf("%w: %s", ErrOtherHome, current.dir)
	}
	if err := os.Setenv(confEnv, h.conf()); err != nil {
		return err
	}
	current.dir = h.dir
	return nil
}

// Dir returns the home's directory, an absolute path.
func (h *Home) Dir() string { return h.dir }

// Module returns the absolute path of the library.
func (h *Home) Module() string { return h.module }

// InitToken makes a new token with this label (1 to 32 octets). A label that
// exists is hsm.ErrExists. SoftHSM wants PINs of 4 to 255 octets. What a kill in
// the middle of it leaves, the next call removes.
func (h *Home) InitToken(label string, soPIN, pin []byte) error {
	unlock, err := h.lock()
	if err != nil {
		return fmt.Errorf("make token %s: %w", label, err)
	}
	defer unlock()
	if err := errors.Join(h.sweep(), h.note()); err != nil {
		return fmt.Errorf("make token %s: %w", label, err)
	}
	err = pkcs11.InitToken(h.module, label, soPIN, pin)
	if err != nil && !errors.Is(err, hsm.ErrExists) {
		err = errors.Join(err, h.sweep())
	}
	return errors.Join(err, h.forget())
}

const (
	lockName = ".lock"
	// makingName is the file that is there while a token is being made. It lists
	// the folders of those that were there before, a line each.
	makingName = ".making"
	// maxMaking bounds the wait for another process that makes a token here.
	maxMaking = time.Minute
	lockPoll  = 10 * time.Millisecond
)

// lock keeps other makers of tokens out of the home, in any process.
func (h *Home) lock() (unlock func(), err error) {
	ctx, cancel := context.WithTimeout(context.Background(), maxMaking)
	defer cancel()
	l := flock.New(filepath.Join(h.dir, lockName), flock.SetPermissions(0o600))
	if _, err := l.TryLockContext(ctx, lockPoll); err != nil {
		return nil, fmt.Errorf("lock SoftHSM home: %w", err)
	}
	return func() { _ = l.Close() }, nil
}

// note writes down which tokens are whole.
func (h *Home) note() error {
	entries, err := os.ReadDir(filepath.Join(h.dir, tokensName))
	if err != nil {
		return err
	}
	text := ""
	for _, e := range entries {
		text += e.Name() + "\n"
	}
	return renameio.WriteFile(filepath.Join(h.dir, makingName), []byte(text), 0o600)
}

// forget says that all tokens are whole; a power cut does not unsay it.
func (h *Home) forget() error {
	if err := os.Remove(filepath.Join(h.dir, makingName)); err != nil {
		return err
	}
	folder, err := os.Open(h.dir)
	if err != nil {
		return err
	}
	return errors.Join(folder.Sync(), folder.Close())
}

// sweep removes the token that was being made when its maker ended. One that has
// an object is not such a one.
func (h *Home) sweep() error {
	text, err := os.ReadFile(filepath.Join(h.dir, makingName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	whole := strings.Split(string(text), "\n")
	entries, err := os.ReadDir(filepath.Join(h.dir, tokensName))
	if err != nil {
		return err
	}
	for _, e := range entries {
		folder := filepath.Join(h.dir, tokensName, e.Name())
		objects, err := filepath.Glob(filepath.Join(folder, "*.object"))
		if err != nil {
			return err
		}
		if slices.Contains(whole, e.Name()) || len(objects) > 1 {
			continue
		}
		if err := os.RemoveAll(folder); err != nil {
			return err
		}
	}
	return nil
}
