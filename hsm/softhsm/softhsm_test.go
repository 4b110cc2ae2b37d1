package softhsm_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/softhsm"
)

// TestHome follows one home through this process: there can be only one.
func TestHome(t *testing.T) {
	if _, err := softhsm.Module(); errors.Is(err, softhsm.ErrNotInstalled) {
		hsmtest.Missing(t, err.Error())
	}
	dir := filepath.Join(t.TempDir(), "home")
	if _, err := softhsm.Open(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Open of nothing: %v", err)
	}
	home, err := softhsm.Create(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := softhsm.Create(dir); !errors.Is(err, fs.ErrExist) {
		t.Errorf("Create again: %v", err)
	}
	if _, err := softhsm.Open(dir); err != nil {
		t.Errorf("Open: %v", err)
	}
	if _, err := softhsm.Create(filepath.Join(t.TempDir(), "other")); !errors.Is(err, softhsm.ErrOtherHome) {
		t.Errorf("Create of another home: %v", err)
	}
	if err := home.InitToken("one", []byte("87654321"), []byte("12345678")); err != nil {
		t.Fatal(err)
	}
	if err := home.InitToken("one", []byte("87654321"), []byte("12345678")); !errors.Is(err, hsm.ErrExists) {
		t.Errorf("the same label again: %v", err)
	}
	if err := home.InitToken("two", []byte("87654321"), []byte("1")); !errors.Is(err, hsm.ErrPIN) {
		t.Errorf("a PIN of one octet: %v", err)
	}
	if err := home.InitToken("two", []byte("87654321"), []byte("12345678")); err != nil {
		t.Errorf("the short PIN left something behind: %v", err)
	}
	private(t, dir)
	if err := os.WriteFile(filepath.Join(dir, "softhsm2.conf"), []byte("directories.tokendir = /var/lib/softhsm/tokens\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := softhsm.Open(dir); err == nil {
		t.Error("Open of a home whose configuration points elsewhere")
	}
}

// private fails the test if others may read anything in the home.
func private(t *testing.T, dir string) {
	t.Helper()
	var files int
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %s", path, info.Mode())
		}
		files++
		return err
	})
	if err != nil || files < 4 {
		t.Errorf("walked %d files, %v", files, err)
	}
}
