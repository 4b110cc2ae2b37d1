package audit

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	filePrefix = "audit-"
	fileSuffix = ".jsonl"
)

// SealsName is the file, beside the audit's own, to which each seal is added.
const SealsName = "seals.jsonl"

// fileName is the name of the file whose first record has that number.
func fileName(seq uint64) string { return fmt.Sprintf("%s%020d%s", filePrefix, seq, fileSuffix) }

// Files lists the audit's files in dir, oldest first.
func Files(dir string) ([]string, error) {
	names, err := filepath.Glob(filepath.Join(dir, filePrefix+"*"+fileSuffix))
	if err != nil {
		return nil, err
	}
	slices.Sort(names) // the numbers have one width
	return names, nil
}

// open locks the folder, reads the newest file and opens it for writing.
func (w *writer) open(cfg Config) (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	names, err := w.lockDir(cfg.Dir)
	if err != nil {
		return err
	}
	if len(names) == 0 {
		return fmt.Errorf("no file in %s: %w", cfg.Dir, ErrNotFound)
	}
	chain, err := linkBefore(names)
	if err != nil {
		return err
	}
	last := names[len(names)-1]
	cut, err := chain.readFile(last, nil)
	if err != nil {
		return err
	}
	w.head, w.next, w.time, w.sealed = chain.head, chain.next, chain.time, chain.last == TypeSeal
	return w.resume(cfg, last, cut)
}

// create locks a folder without an audit and begins one.
func (w *writer) create(cfg Config) error {
	names, err := w.lockDir(cfg.Dir)
	if err != nil {
		return err
	}
	if len(names) > 0 {
		return fmt.Errorf("%d files in %s: %w", len(names), cfg.Dir, ErrExists)
	}
	return w.begin(cfg, "")
}

// lockDir takes the folder for this process alone and lists its files.
func (w *writer) lockDir(dir string) (names []string, err error) {
	if w.lock, err = os.Open(dir); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", ErrNotFound, err)
	} else if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(w.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("lock %s: %w: %w", dir, ErrInUse, err)
	}
	return Files(dir)
}

// linkBefore is where the chain stands before the newest file, which follows
// from the last line of the file before it.
func linkBefore(names []string) (*chain, error) {
	if len(names) == 1 {
		return &chain{}, nil
	}
	before := &chain{loose: true}
	cut, err := before.readFile(names[len(names)-2], nil)
	if err == nil && len(cut) > 0 {
		err = fmt.Errorf("%s: ends within a line: %w", filepath.Base(names[len(names)-2]), ErrDamaged)
	}
	return before, err
}

// resume opens the newest file behind its last line. Where octets were cut off,
// or the file has no line at all, that is written down.
func (w *writer) resume(cfg Config, name string, cut []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	w.file = f
	info, err := f.Stat()
	if err != nil {
		return err
	}
	w.size = info.Size() - int64(len(cut))
	if len(cut) == 0 && w.size > 0 {
		return nil
	}
	if err := f.Truncate(w.size); err != nil {
		return fmt.Errorf("cut off an unfinished line: %w", err)
	}
	w.buffer.Reset()
	record := Record{Type: TypeBegin, Reason: fmt.Sprintf("%d octets of an unfinished record cut off", len(cut))}
	if err := w.add(record, cfg); err != nil {
		return err
	}
	return w.flush()
}

// chain follows the links from line to line.
type chain struct {
	// loose takes the first line as it is: what came before is not known.
	loose bool
	next  uint64
	head  [sha256.Size]byte
	time  time.Time
	last  Type
	// line is the last line, without its line break.
	line []byte
}

// readFile follows the lines of one file and gives each to visit, with the line
// before it; both are valid until visit returns. It returns what stands behind
// the last line break. Errors: ErrDamaged, and visit's.
func (c *chain) readFile(name string, visit func(r Record, line, before []byte) error) (cut []byte, err error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	damaged := func(format string, args ...any) error {
		return fmt.Errorf("%s: record %d: %s: %w", filepath.Base(name), c.next, fmt.Sprintf(format, args...), ErrDamaged)
	}
	var before []byte
	lines := bufio.NewReaderSize(f, maxLine+1)
	for first := true; ; first = false {
		line, err := lines.ReadSlice('\n')
		switch {
		case errors.Is(err, io.EOF):
			return bytes.Clone(line), nil
		case errors.Is(err, bufio.ErrBufferFull):
			return nil, damaged("a line of more than %d octets", maxLine)
		case err != nil:
			return nil, fmt.Errorf("read audit: %w", err)
		}
		line = line[:len(line)-1]
		r, err := ParseRecord(line)
		if err != nil {
			return nil, damaged("%v", err)
		}
		if first && filepath.Base(name) != fileName(r.Seq) {
			return nil, damaged("the file begins with record %d", r.Seq)
		}
		before = append(before[:0], c.line...)
		if err := c.follow(r, line); err != nil {
			return nil, damaged("%v", err)
		}
		if visit != nil {
			if err := visit(r, line, before); err != nil {
				return nil, err
			}
		}
	}
}

// follow takes the next line.
func (c *chain) follow(r Record, line []byte) error {
	if !c.loose {
		switch {
		case r.Seq != c.next:
			return fmt.Errorf("number %d", r.Seq)
		case r.Prev != hex.EncodeToString(c.head[:]):
			return errors.New("does not follow from the line before it")
		case r.Time.Before(c.time):
			return errors.New("is older than the record before it")
		}
	}
	c.loose = false
	c.next, c.head, c.time, c.last = r.Seq+1, sha256.Sum256(line), r.Time, r.Type
	c.line = append(c.line[:0], line...)
	return nil
}

// ParseRecord reads a line, which must be exactly what the writer writes. That it
// follows from the line before it is for Verify to see.
func ParseRecord(line []byte) (Record, error) {
	var r Record
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&r); err != nil {
		return r, errors.New("not a record")
	}
	if r.Version != version {
		return r, fmt.Errorf("version %d, this program knows %d", r.Version, version)
	}
	again, err := json.Marshal(r)
	if err != nil || !bytes.Equal(again, line) {
		return r, errors.New("not as the writer writes it")
	}
	return r, nil
}

// Report is what Verify found.
type Report struct {
	// Records is how many there are, Files in how many files.
	Records uint64
	Files   int
	// Head is the SHA-256 of the last line, in hexadecimal, Last its time.
	Head string
	Last time.Time
	// Seals is how many of the records are seals, and Sealed how many records
	// the newest covers.
	Seals  int
	Sealed uint64
	// Unfinished are the octets behind the last line: a record that is being
	// written, or that a crash cut off. Nobody was told of it.
	Unfinished int
}

// Verify reads every file in dir, also while a service writes there, and
// follows every link. checkSeal verifies a timestamp over a line; nil checks
// only that seals stand where they belong. outside are seals that were kept
// elsewhere (the lines of seals.jsonl): a record that one covers must be there.
// visit gets every record; it may be nil. Errors: ErrDamaged, and those of
// visit and checkSeal.
func Verify(dir string, checkSeal func(seal, line []byte) error, outside []Record, visit func(Record) error) (Report, error) {
	names, err := Files(dir)
	if err != nil {
		return Report{}, err
	}
	if len(names) == 0 {
		return Report{}, fmt.Errorf("verify audit: no file in %s: %w: %w", dir, ErrNotFound, ErrDamaged)
	}
	want := map[uint64]Record{}
	for _, s := range outside {
		want[s.Seq] = s
	}
	report := Report{Files: len(names)}
	c := &chain{}
	for i, name := range names {
		cut, err := c.readFile(name, func(r Record, line, before []byte) error {
			if r.Type == TypeSeal {
				report.Seals, report.Sealed = report.Seals+1, r.Seq
				if err := verifySeal(r, before, checkSeal); err != nil {
					return err
				}
			}
			if s, ok := want[r.Seq]; ok {
				if kept, err := json.Marshal(s); err != nil || !bytes.Equal(kept, line) {
					return fmt.Errorf("verify audit: record %d is not the seal that was kept of it: %w", r.Seq, ErrDamaged)
				}
				delete(want, r.Seq)
			}
			if visit == nil {
				return nil
			}
			return visit(r)
		})
		if err != nil {
			return report, fmt.Errorf("verify audit: %w", err)
		}
		if report.Unfinished = len(cut); len(cut) > 0 && i < len(names)-1 {
			return report, fmt.Errorf("verify audit: %s ends within a line: %w", filepath.Base(name), ErrDamaged)
		}
	}
	for seq := range want {
		return report, fmt.Errorf("verify audit: record %d, of which a seal was kept, is gone: %w", seq, ErrDamaged)
	}
	report.Records, report.Head, report.Last = c.next, hex.EncodeToString(c.head[:]), c.time
	return report, nil
}

// verifySeal checks the timestamp of a seal over the line before it.
func verifySeal(r Record, before []byte, check func(seal, line []byte) error) error {
	if len(r.Seal) == 0 || len(before) == 0 {
		return fmt.Errorf("verify audit: seal %d is none: %w", r.Seq, ErrDamaged)
	}
	if check == nil {
		return nil
	}
	if err := check(r.Seal, before); err != nil {
		return fmt.Errorf("verify audit: seal %d: %w: %w", r.Seq, err, ErrDamaged)
	}
	return nil
}

// ReadSeals reads seals that were kept: lines of seals.jsonl. Errors:
// ErrDamaged.
func ReadSeals(text []byte) ([]Record, error) {
	var out []Record
	for line := range strings.Lines(string(text)) {
		r, err := ParseRecord([]byte(strings.TrimSuffix(line, "\n")))
		if err != nil || r.Type != TypeSeal {
			return nil, fmt.Errorf("read seals: line %d: not a seal: %w", len(out)+1, ErrDamaged)
		}
		out = append(out, r)
	}
	return out, nil
}
