package audittool

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/chancery-ca/chancery/ca/audit"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/whole"
)

// Backup copies the audit in dir into a new folder, also while a service writes
// it, and has verify look at the copy before it counts. The copy is an audit: its
// files have the names of dir's, the newest ends with a line that was complete,
// and every seal that stands in its seals.jsonl is of a record that it has. It
// is whole and durable, or not there. Errors: os.ErrExist, audit.ErrNotFound,
// and verify's.
func Backup(dir, to string, verify func(dir string) error) error {
	return whole.Folder(to, 0o700, func(tmp string) error {
		// The seals first: each stands in the audit before it stands there.
		if err := copyLines(filepath.Join(dir, audit.SealsName), filepath.Join(tmp, audit.SealsName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		files, err := audit.Files(dir)
		if err != nil {
			return fmt.Errorf("back up audit: %w", err)
		}
		if len(files) == 0 {
			return fmt.Errorf("back up audit: no file in %s: %w", dir, audit.ErrNotFound)
		}
		for _, file := range files {
			if err := copyLines(file, filepath.Join(tmp, filepath.Base(file))); err != nil {
				return err
			}
		}
		if err := verify(tmp); err != nil {
			return fmt.Errorf("back up audit: %w", err)
		}
		return nil
	})
}

// copyLines copies the complete lines that a growing file has.
func copyLines(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("back up audit: %w", err)
	}
	defer in.Close()
	out, err := os.OpenFile(filepath.Clean(to), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("back up audit: %w", err)
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	lines, w := bufio.NewReaderSize(in, maxLine+1), bufio.NewWriterSize(out, 1<<20)
	for {
		line, err := lines.ReadSlice('\n')
		switch {
		case errors.Is(err, io.EOF):
			return w.Flush()
		case errors.Is(err, bufio.ErrBufferFull):
			return fmt.Errorf("back up audit: %s: a line of more than %d octets: %w", filepath.Base(from), maxLine, audit.ErrDamaged)
		case err != nil:
			return fmt.Errorf("back up audit: %w", err)
		}
		if _, err := w.Write(line); err != nil {
			return fmt.Errorf("back up audit: %w", err)
		}
	}
}
