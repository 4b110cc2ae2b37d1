package tpm

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/chancery-ca/chancery/hsm"
)

// folder is a folder of key files. A file that is there is whole: it is written
// under another name, synced, and linked to its own, which fails if that is
// taken; then the folder is synced. Names that begin with a dot are of files
// that were not finished.
type folder struct{ dir string }

// maxKeys bounds how many key files a folder may have.
const maxKeys = 4096

// creationExtension is what the name of a creation file ends with.
const creationExtension = ".creation"

// labels lists the labels of the key files, sorted. A file whose name ends like
// a key file's but is no label's is an error, so that none is overlooked.
func (f folder) labels() ([]string, error) {
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		return nil, err
	}
	var labels []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") || !strings.HasSuffix(e.Name(), extension) {
			continue
		}
		label, ok := labelOf(e.Name())
		if !ok {
			return nil, fmt.Errorf("file name %.80q is no label's: %w", e.Name(), ErrKeyFile)
		}
		labels = append(labels, label)
	}
	if len(labels) > maxKeys {
		return nil, fmt.Errorf("%d key files, want at most %d: %w", len(labels), maxKeys, ErrKeyFile)
	}
	slices.Sort(labels)
	return labels, nil
}

// key reads the key file of a label; hsm.ErrNotFound if there is none.
func (f folder) key(label string) (*keyFile, error) {
	text, err := f.read(fileOf(label))
	if err != nil {
		return nil, err
	}
	key, err := parseKeyFile(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", fileOf(label), err)
	}
	if key.label == "" {
		key.label = label // another tool's file: it has the name that it has
	}
	if key.label != label {
		return nil, fmt.Errorf("%s says that its label is %s: %w", fileOf(label), key.label, ErrKeyFile)
	}
	return key, nil
}

// creation reads the creation file of a label; hsm.ErrNotFound if there is none.
func (f folder) creation(label string) (*creation, error) {
	name := creationOf(label)
	text, err := f.read(name)
	if err != nil {
		return nil, err
	}
	c, err := parseCreation(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return c, nil
}

// creationOf returns the name of a label's creation file.
func creationOf(label string) string {
	return strings.TrimSuffix(fileOf(label), extension) + creationExtension
}

// read reads a regular file of at most maxFile octets.
func (f folder) read(name string) ([]byte, error) {
	path := filepath.Join(f.dir, name)
	if info, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no file %s: %w", name, hsm.ErrNotFound)
	} else if err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file: %w", name, ErrKeyFile)
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	text, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxFile {
		return nil, fmt.Errorf("%s has more than %d octets: %w", name, maxFile, ErrKeyFile)
	}
	return text, nil
}

// withID returns the labels of the key files with this id. Files that cannot be
// read are left out and told to damaged: one of them must not hide the others.
func (f folder) withID(id []byte, damaged func(label string, err error)) ([]string, error) {
	labels, err := f.labels()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(labels, func(label string) bool {
		key, err := f.key(label)
		if err != nil {
			damaged(label, err)
			return true
		}
		return !bytes.Equal(key.id, id)
	}), nil
}

// vacant refuses the label or id of a key file, with hsm.ErrExists.
func (f folder) vacant(label string, id []byte) error {
	if _, err := os.Lstat(filepath.Join(f.dir, fileOf(label))); err == nil {
		return fmt.Errorf("label %s: %w", label, hsm.ErrExists)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var broken error
	same, err := f.withID(id, func(_ string, err error) { broken = errors.Join(broken, err) })
	if err = errors.Join(err, broken); err != nil {
		return fmt.Errorf("see whether id %x exists: %w", id, err)
	}
	if len(same) > 0 {
		return fmt.Errorf("id %x: %w", id, hsm.ErrExists)
	}
	return nil
}

// add writes the creation file and then the key file of a new key. A creation
// file that is there already is of a key that was never written, and goes.
func (f folder) add(label string, key, creation []byte) error {
	err := os.Remove(filepath.Join(f.dir, creationOf(label)))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := f.write(creationOf(label), creation); err != nil {
		return fmt.Errorf("write creation file: %w", err)
	}
	if err := f.write(fileOf(label), key); err != nil {
		return fmt.Errorf("write key file: %w", err)
	}
	return nil
}

// write makes a file, mode 0600, durable; hsm.ErrExists if the name is taken.
func (f folder) write(name string, text []byte) error {
	unfinished := filepath.Join(f.dir, ".new-"+rand.Text())
	if err := writeSynced(unfinished, text); err != nil {
		return err
	}
	err := os.Link(unfinished, filepath.Join(f.dir, name))
	if errors.Is(err, fs.ErrExist) {
		err = fmt.Errorf("%s: %w", name, hsm.ErrExists)
	}
	return errors.Join(err, os.Remove(unfinished), syncDir(f.dir))
}

// writeSynced writes a new file and syncs it, or leaves none.
func writeSynced(path string, text []byte) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(text)
	if err = errors.Join(err, file.Sync(), file.Close()); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// syncDir makes the names in a folder durable.
func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
