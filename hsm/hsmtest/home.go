package hsmtest

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/chancery-ca/chancery/hsm/softhsm"
	"github.com/gofrs/flock"
)

// homePrefix begins the name of every home that this package makes.
const homePrefix = "chancery-hsmtest-"

// shared is the home of this test binary, made at the first use.
var shared = sync.OnceValues(newHome)

// keepLock keeps the home's lock until the process ends.
var keepLock *flock.Flock

// sharedHome returns the process's home, or skips or fails the test.
func sharedHome(t testing.TB) *softhsm.Home {
	t.Helper()
	home, err := shared()
	if errors.Is(err, softhsm.ErrNotInstalled) {
		Missing(t, err.Error())
	}
	if err != nil {
		t.Fatal(err)
	}
	return home
}

// Missing skips the test for want of a real part, or fails it when
// CHANCERY_REQUIRE_HSM is 1.
func Missing(t testing.TB, reason string) {
	t.Helper()
	if os.Getenv("CHANCERY_REQUIRE_HSM") == "1" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

// newHome makes a home that holds its lock, and removes those of processes
// that have ended. Both happen under one lock, so that no home is seen between
// its making and its locking.
func newHome() (*softhsm.Home, error) {
	all := flock.New(filepath.Join(os.TempDir(), homePrefix+"lock"))
	if err := all.Lock(); err != nil {
		return nil, err
	}
	defer func() { _ = all.Close() }()
	sweep(os.TempDir())
	dir, err := os.MkdirTemp("", homePrefix+"home-")
	if err != nil {
		return nil, err
	}
	keepLock = flock.New(filepath.Join(dir, "lock"))
	if err := keepLock.Lock(); err != nil {
		return nil, err
	}
	return softhsm.Create(filepath.Join(dir, "softhsm"))
}

// sweep removes homes whose lock nobody holds.
func sweep(tmp string) {
	entries, err := os.ReadDir(tmp)
	if err != nil {
		return // nothing to remove is no reason not to test
	}
	for _, e := range entries {
		if !e.IsDir() || !strings.HasPrefix(e.Name(), homePrefix+"home-") {
			continue
		}
		dir := filepath.Join(tmp, e.Name())
		lock := flock.New(filepath.Join(dir, "lock"))
		if held, err := lock.TryLock(); err == nil && held {
			_ = os.RemoveAll(dir)
			_ = lock.Close()
		}
	}
}
