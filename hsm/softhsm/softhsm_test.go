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
	// What a kill in Create leaves is no home.
	if err := os.MkdirAll(filepath.Join(dir, "tokens"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, ".partial-softhsm2.conf"), []byte("direc"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := softhsm.Open(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Open of half a home: %v", err)
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
	unfinished(t, home)
	private(t, dir)
	if err := os.WriteFile(filepath.Join(dir, "softhsm2.conf"), []byte("directories.tokendir = /var/lib/softhsm/tokens\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := softhsm.Open(dir); err == nil {
		t.Error("Open of a home whose configuration points elsewhere")
	}
}

// unfinished leaves what a kill in InitToken leaves, and what it cannot have left.
func unfinished(t *testing.T, home *softhsm.Home) {
	t.Helper()
	tokens := filepath.Join(home.Dir(), "tokens")
	entries, err := os.ReadDir(tokens)
	if err != nil {
		t.Fatal(err)
	}
	whole := ""
	for _, e := range entries {
		whole += e.Name() + "\n"
	}
	write := func(path string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(whole), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(home.Dir(), ".making"))
	for _, name := range []string{"half/token.object", "used/token.object", "used/key.object"} {
		write(filepath.Join(tokens, name))
	}
	if err := home.InitToken("one", []byte("87654321"), []byte("12345678")); !errors.Is(err, hsm.ErrExists) {
		t.Errorf("a token that was whole: %v", err)
	}
	for name, want := range map[string]bool{"tokens/half": false, "tokens/used": true, ".making": false} {
		if _, err := os.Stat(filepath.Join(home.Dir(), name)); (err == nil) != want {
			t.Errorf("%s is there: %t (%v), want %t", name, err == nil, err, want)
		}
	}
	if err := os.RemoveAll(filepath.Join(tokens, "used")); err != nil {
		t.Fatal(err)
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
