// Package whole makes folders that are whole and durable, or not there.
package whole

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Folder makes dir from what fill puts into a temporary folder beside it: dir is
// whole and durable, or not there. An existing one is refused. Errors:
// os.ErrExist, and fill's.
func Folder(dir string, perm os.FileMode, fill func(tmp string) error) (err error) {
	dir = filepath.Clean(dir)
	if _, err := os.Lstat(dir); err == nil {
		return fmt.Errorf("%s: %w", dir, os.ErrExist)
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "."+filepath.Base(dir)+".part-")
	if err != nil {
		return fmt.Errorf("create folder: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(tmp))
		}
	}()
	if err := fill(tmp); err != nil {
		return err
	}
	if err := os.Chmod(tmp, perm); err != nil {
		return fmt.Errorf("create folder: %w", err)
	}
	if err := Sync(tmp); err != nil {
		return err
	}
	// Not os.Rename: that would replace an empty folder made meanwhile.
	if err := unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, dir, unix.RENAME_NOREPLACE); err != nil {
		return fmt.Errorf("create folder %s: %w", dir, err)
	}
	return Sync(filepath.Dir(dir))
}

// Sync makes all that was written to the file system of a folder
// durable: one call for thousands of files.
func Sync(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}
