// Package audittool shows the end of an audit, and copies it, also while a
// service writes it.
//
// Data flows one way: the files, newest first, until enough records pass the
// filter → those records, oldest first → and, when following, what is appended
// and every file that begins.
//
// It promises to change nothing, to show only complete lines that the writer
// can have written, and to hold at most one line and the records that were asked
// for. It does not follow the links: what it shows may have been tampered with,
// which is for audit.Verify to see. A copy is verified before it is one
// (backup.go).
package audittool

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/chancery-ca/chancery/ca/audit"
)

const (
	// maxLine bounds a line, in octets.
	maxLine = 64 << 10
	// pollEvery is how often Follow looks for more.
	pollEvery = 250 * time.Millisecond
	// maxOpen is how many allowed certificates are remembered for the record
	// that says what came of each: more than can be in work at once.
	maxOpen = 4096
	// recallTime is how long before the first record of a file a certificate may
	// have been allowed that the file says was released: much longer than a
	// request lasts.
	recallTime = time.Minute
)

// Filter says which records are shown. What is empty fits everything.
type Filter struct {
	// Identity is the name in the certificate and Issuer the identity provider,
	// both octet for octet. The record of a released certificate names neither,
	// and is shown after the one that allowed it.
	Identity, Issuer string
	Type             audit.Type
	// Serial is in hexadecimal, in any case, leading zeros left out or not.
	Serial string
}

// fits says whether the filter shows a record.
func (f Filter) fits(r audit.Record, allowed *serials) bool {
	switch {
	case f.Serial != "" && !strings.EqualFold(strings.TrimLeft(f.Serial, "0"), r.Serial):
		return false
	case f.Identity == "" && f.Issuer == "":
	case r.Type == audit.TypeIssued:
		if !allowed.take(r.Serial) {
			return false
		}
	case f.Identity != "" && f.Identity != r.SAN, f.Issuer != "" && f.Issuer != r.Issuer:
		return false
	case r.Type == audit.TypeAllowed:
		allowed.add(r.Serial)
	}
	return f.Type == "" || f.Type == r.Type
}

// serials remembers the newest maxOpen serials.
type serials struct{ list []string }

func (s *serials) add(serial string) {
	if len(s.list) == maxOpen {
		s.list = slices.Delete(s.list, 0, 1)
	}
	s.list = append(s.list, serial)
}

func (s *serials) take(serial string) bool {
	at := slices.Index(s.list, serial)
	if at < 0 {
		return false
	}
	s.list = slices.Delete(s.list, at, at+1)
	return true
}

// Tail is where in an audit somebody reads.
type Tail struct {
	dir     string
	filter  Filter
	file    string // the newest that was read
	offset  int64  // behind its last complete line
	allowed serials
}

// Last returns the newest n records that the filter shows, oldest first, and
// where to follow from. Errors: audit.ErrNotFound, audit.ErrDamaged.
func Last(dir string, n int, filter Filter) ([]audit.Record, *Tail, error) {
	files, err := audit.Files(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("read audit: %w", err)
	}
	if len(files) == 0 {
		if _, err := os.ReadDir(dir); err != nil {
			return nil, nil, fmt.Errorf("read audit: %w: %w", audit.ErrNotFound, err)
		}
		return nil, nil, fmt.Errorf("read audit: no file in %s: %w", dir, audit.ErrNotFound)
	}
	newest := &Tail{dir: dir, filter: filter}
	found, err := newest.newestOf(n, files)
	for i := len(files) - 1; i > 0 && len(found) < n && err == nil; i-- {
		before := &Tail{filter: filter}
		var more []audit.Record
		more, err = before.newestOf(n-len(found), files[:i])
		found = append(more, found...)
	}
	return found, newest, err
}

// recall reads the end of files, of which t's comes next, for the certificates
// that they allowed and t's file may say were released.
func (t *Tail) recall(next string, files []string) error {
	if t.filter.Identity == "" && t.filter.Issuer == "" || len(files) == 0 {
		return nil
	}
	begun, err := firstTime(next)
	if err != nil {
		return err
	}
	from := len(files) - 1
	for ; from > 0 && !begun.IsZero(); from-- {
		at, err := firstTime(files[from])
		if err != nil {
			return err
		}
		if at.Before(begun.Add(-recallTime)) {
			break
		}
	}
	for _, t.file = range files[from:] {
		t.offset = 0
		if err := t.read(func(audit.Record) error { return nil }); err != nil {
			return err
		}
	}
	return nil
}

// firstTime is the time of a file's first record; it is zero while that is
// being written.
func firstTime(file string) (at time.Time, err error) {
	first := &Tail{file: file}
	err = first.read(func(r audit.Record) error {
		at = r.Time
		return errStop
	})
	if errors.Is(err, errStop) {
		err = nil
	}
	return at, err
}

// errStop ends a reading.
var errStop = errors.New("read enough")

// newestOf reads the last of files to its end and keeps the last n records that
// fit.
func (t *Tail) newestOf(n int, files []string) ([]audit.Record, error) {
	last := len(files) - 1
	if err := t.recall(files[last], files[:last]); err != nil {
		return nil, err
	}
	var found []audit.Record
	t.file, t.offset = files[last], 0
	err := t.read(func(r audit.Record) error {
		found = append(found, r)
		if len(found) >= 2*n+64 { // seldom, so that moving them costs little
			found = slices.Delete(found, 0, len(found)-n)
		}
		return nil
	})
	return found[max(0, len(found)-n):], err
}

// Follow gives every further record that the filter shows to visit, until ctx
// ends. Errors: audit.ErrDamaged, and visit's.
func (t *Tail) Follow(ctx context.Context, visit func(audit.Record) error) error {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		if err := t.next(visit); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// next reads what has come, file after file.
func (t *Tail) next(visit func(audit.Record) error) error {
	files, err := audit.Files(t.dir) // first: nothing is appended to a file that another follows
	if err != nil {
		return fmt.Errorf("read audit: %w", err)
	}
	if err := t.read(visit); err != nil {
		return err
	}
	for _, file := range files {
		if file <= t.file {
			continue
		}
		t.file, t.offset = file, 0
		if err := t.read(visit); err != nil {
			return err
		}
	}
	return nil
}

// read gives the complete lines behind the offset to visit, if they fit.
func (t *Tail) read(visit func(audit.Record) error) error {
	f, err := os.Open(t.file)
	if err != nil {
		return fmt.Errorf("read audit: %w", err)
	}
	defer f.Close()
	if _, err := f.Seek(t.offset, io.SeekStart); err != nil {
		return fmt.Errorf("read audit: %w", err)
	}
	lines := bufio.NewReaderSize(f, maxLine+1)
	for {
		line, err := lines.ReadSlice('\n')
		switch {
		case errors.Is(err, io.EOF):
			return nil // what stands behind the last line is being written
		case errors.Is(err, bufio.ErrBufferFull):
			return fmt.Errorf("%s: a line of more than %d octets: %w", filepath.Base(t.file), maxLine, audit.ErrDamaged)
		case err != nil:
			return fmt.Errorf("read audit: %w", err)
		}
		t.offset += int64(len(line))
		r, err := audit.ParseRecord(bytes.TrimSuffix(line, []byte("\n")))
		if err != nil {
			return fmt.Errorf("%s: the line that ends at octet %d: %w: %w", filepath.Base(t.file), t.offset, err, audit.ErrDamaged)
		}
		if !t.filter.fits(r, &t.allowed) {
			continue
		}
		if err := visit(r); err != nil {
			return err
		}
	}
}
