// Package durable writes files that a power cut leaves whole or absent.
//
// # What it promises
//
// A function that returns nil has brought the octets to the medium (fsync of
// the file), and, but for Create, the name too (fsync of the folder). It has
// replaced nothing but what Replace was asked to. One that is killed, or whose
// power is cut, leaves:
//
//   - Create: the name is absent, or has any beginning of the octets. Only for
//     files that nobody reads under this name unless all went well: those in a
//     folder of their own that is thrown away, and those whose reader can tell.
//   - Publish: the name is absent or has all octets. Repeated, it ends the work:
//     a name that has these very octets is no error.
//   - Replace: the name has all of the old octets or all of the new ones.
//
// Publish and Replace write to Partial first, in the same folder; a kill may
// leave that file, and the next call for the same name removes it.
//
// An error of fsync is final: the kernel may have dropped the pages, and a
// second fsync would report success for octets that are nowhere (as
// PostgreSQL learnt in 2018). So the file that was being written is removed,
// and a caller begins again with the octets, not with the file.
//
// # What it trusts
//
// That the file system and the medium keep what fsync acknowledged, that
// link(2) fails on a name that is there and rename(2) is atomic, and that the
// folder is not changed by others at the same time: it is no protection from
// one who can write to it. A folder whose file system cannot be synced is an
// error and not a warning.
package durable

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Partial returns where Publish and Replace keep the octets of path until they
// are on the medium: a hidden file of the same folder.
func Partial(path string) string {
	return filepath.Join(filepath.Dir(path), ".partial-"+filepath.Base(path))
}

// Create makes the file path with the permissions perm (before umask), writes
// it and syncs it, but not its folder: call SyncFolder once after the last
// file. A path that exists, if only as a link, is fs.ErrExist and stays as it
// is; after any other error there is no file.
func Create(path string, content []byte, perm fs.FileMode) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, perm)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// Publish makes the file path as Create does, under its name only when it is
// whole, and syncs the folder. A path that has these octets is left, and synced
// again, because who wrote it may have been interrupted; with others it is
// fs.ErrExist.
func Publish(path string, content []byte, perm fs.FileMode) error {
	switch same, err := has(path, content); {
	case err == nil && !same:
		return fmt.Errorf("%w with other content", fs.ErrExist)
	case err == nil:
		return errors.Join(removePartial(path), SyncFolder(filepath.Dir(path)))
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	partial, err := createPartial(path, content, perm)
	if err != nil {
		return err
	}
	if err := os.Link(partial, path); err != nil {
		return errors.Join(err, removePartial(path))
	}
	if err := removePartial(path); err != nil {
		return err
	}
	return SyncFolder(filepath.Dir(path))
}

// has says whether path is a regular file with these octets. It reads no more
// than those.
func has(path string, content []byte) (bool, error) {
	info, err := os.Lstat(path)
	if err != nil || !info.Mode().IsRegular() || info.Size() != int64(len(content)) {
		return false, err
	}
	have, err := os.ReadFile(path)
	return bytes.Equal(have, content), err
}

// Replace gives path these octets, whether it exists or not, and syncs the
// folder. The permissions are perm (before umask), not those that it had.
func Replace(path string, content []byte, perm fs.FileMode) error {
	partial, err := createPartial(path, content, perm)
	if err != nil {
		return err
	}
	if err := os.Rename(partial, path); err != nil {
		return errors.Join(err, removePartial(path))
	}
	return SyncFolder(filepath.Dir(path))
}

// createPartial writes the octets beside path, in the place of those that a kill
// left there.
func createPartial(path string, content []byte, perm fs.FileMode) (string, error) {
	if err := removePartial(path); err != nil {
		return "", err
	}
	partial := Partial(path)
	return partial, Create(partial, content, perm)
}

func removePartial(path string) error {
	if err := os.Remove(Partial(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove partial file: %w", err)
	}
	return nil
}

// MakeFolder makes the folder dir and those above it that are missing, with the
// permissions perm (before umask), and syncs each folder that got a name. What
// exists is left and counts as being on the medium; a file or a dangling link in
// the way is an error.
func MakeFolder(dir string, perm fs.FileMode) error {
	dir = filepath.Clean(dir)
	if info, err := os.Stat(dir); err == nil && info.IsDir() {
		return nil
	}
	above := filepath.Dir(dir)
	if above == dir {
		return fmt.Errorf("make folder %s: %w", dir, fs.ErrNotExist)
	}
	if err := MakeFolder(above, perm); err != nil {
		return err
	}
	if err := os.Mkdir(dir, perm); err != nil {
		return err
	}
	return SyncFolder(above)
}

// SyncFile brings a file that somebody else wrote, and the names in its folder,
// to the medium. It needs no more than to read it.
func SyncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open file: %w", err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("sync file: %w", err)
	}
	return SyncFolder(filepath.Dir(path))
}

// SyncFolder brings the names in the folder dir to the medium.
func SyncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("open folder: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync folder: %w", err)
	}
	return nil
}
