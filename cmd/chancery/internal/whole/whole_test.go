package whole

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// TestFolder: the folder is there with all of it, or nothing is.
func TestFolder(t *testing.T) {
	parent := t.TempDir()
	dir := filepath.Join(parent, "new")
	fill := func(tmp string) error { return os.WriteFile(filepath.Join(tmp, "file"), []byte("x"), 0o600) }
	broken := errors.New("broken")
	if err := Folder(dir, 0o700, func(tmp string) error { return errors.Join(fill(tmp), broken) }); !errors.Is(err, broken) {
		t.Errorf("err %v", err)
	}
	if left, err := os.ReadDir(parent); err != nil || len(left) != 0 {
		t.Errorf("left %v, %v", left, err)
	}
	if err := Folder(dir, 0o750, fill); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o750 {
		t.Errorf("%v, %v", info, err)
	}
	if text, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || string(text) != "x" {
		t.Errorf("%q, %v", text, err)
	}
	if err := Folder(dir, 0o700, fill); !errors.Is(err, os.ErrExist) {
		t.Errorf("over another: %v", err)
	}
	// One that comes into being meanwhile is not replaced either, empty as it is.
	other := filepath.Join(parent, "other")
	if err := Folder(other, 0o700, func(string) error { return os.Mkdir(other, 0o700) }); !errors.Is(err, os.ErrExist) {
		t.Errorf("over one made meanwhile: %v", err)
	}
}
