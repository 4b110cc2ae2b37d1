package ceremony

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// ErrOutputExists: a file that the ceremony would write exists already.
var ErrOutputExists = errors.New("output exists")

// File is one output: its slash-separated name below the output folder and
// the SHA-256 of its octets, in hexadecimal.
type File struct {
	Name   string `json:"name"`
	SHA256 string `json:"sha256"`
	Size   int    `json:"size"`

	content []byte
}

func newFile(name string, content []byte) File {
	h := sha256.Sum256(content)
	return File{name, hex.EncodeToString(h[:]), len(content), content}
}

// write puts the file below dir: the octets go to a temporary file and to
// disk, then the name is made, which fails if it exists. So a name is either
// absent or complete. A file that exists with the same octets is left (an
// interrupted ceremony wrote it); with others it is ErrOutputExists.
func (f File) write(dir string) error {
	path := filepath.Join(dir, filepath.FromSlash(f.Name))
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write %s: %w", f.Name, err)
	}
	switch have, err := os.ReadFile(path); {
	case err == nil && bytes.Equal(have, f.content):
		return nil
	case err == nil:
		return fmt.Errorf("write %s: %w with other content", f.Name, ErrOutputExists)
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("write %s: %w", f.Name, err)
	}
	temp := filepath.Join(filepath.Dir(path), partialName(filepath.Base(path)))
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("write %s: remove partial file: %w", f.Name, err)
	}
	if err := writeExclusive(temp, f.content); err != nil {
		return fmt.Errorf("write %s: %w", f.Name, err)
	}
	if err := os.Link(temp, path); err != nil {
		if errors.Is(err, fs.ErrExist) {
			err = ErrOutputExists
		}
		return fmt.Errorf("write %s: %w", f.Name, err)
	}
	if err := os.Remove(temp); err != nil {
		return fmt.Errorf("write %s: %w", f.Name, err)
	}
	if err := syncFolderOf(path); err != nil {
		return fmt.Errorf("write %s: %w", f.Name, err)
	}
	return nil
}

// partialName is where a file's octets are until they are on disk.
func partialName(base string) string { return ".partial-" + base }

// writeExclusive creates path (O_EXCL), writes and syncs it, and on an error
// removes what it made.
func writeExclusive(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
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

// syncFolderOf makes the name of path durable.
func syncFolderOf(path string) error {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("open folder: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync folder: %w", err)
	}
	return nil
}
