package ceremony

import (
	"bytes"
	"crypto/sha256"
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

// ErrVerify: the outputs of a ceremony are not what its records say.
var ErrVerify = errors.New("ceremony does not verify")

// Check is one line of a Report.
type Check struct {
	// Name says what was looked at, Detail what was found.
	Name, Detail string
	// Err is nil if it is as it should be.
	Err error
}

// Report is what Verify found. Definition is nil if it could not be read, and
// Head, the hash of the last record, is zero if the transcript does not hold.
type Report struct {
	Definition *Definition
	Head       [sha256.Size]byte
	Checks     []Check

	outputs []string // names
}

// Err returns nil if every check passed, or else an error that wraps ErrVerify
// and the errors of the checks.
func (r *Report) Err() error {
	var all []error
	for _, c := range r.Checks {
		if c.Err != nil {
			all = append(all, fmt.Errorf("%s: %w", c.Name, c.Err))
		}
	}
	if len(all) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %w", ErrVerify, errors.Join(all...))
}

// add notes a check and says whether it passed.
func (r *Report) add(name string, err error, format string, args ...any) bool {
	c := Check{Name: name, Err: err}
	if err == nil {
		c.Detail = fmt.Sprintf(format, args...)
	}
	r.Checks = append(r.Checks, c)
	return err == nil
}

// Verify checks the outputs of a complete ceremony in dir, without a token. It
// reads the definition and the transcript, does again everything that follows
// from them (commitments, seed, root serial, evidence signatures, every TBS
// with its lints, every certificate's signature, every output's octets), and
// compares. A changed octet in any output fails a check.
//
// It trusts nothing in dir; what it cannot show is that this ceremony is the
// one you mean: compare the words of the last record.
func Verify(dir string) *Report {
	r := &Report{}
	def := r.readDefinition(dir)
	records, err := readTranscriptFile(filepath.Join(dir, TranscriptName))
	if !r.add("transcript", err, "%d records, one chain", len(records)) || def == nil {
		return r
	}
	f, err := r.readFacts(def, records)
	if !r.add("records", err, "every step as the definition says") {
		return r
	}
	r.Head = f.head
	r.addFacts(f)
	r.checkFiles(dir, f, records)
	return r
}

// readFacts replays the records of a ceremony of this definition. What the
// first record calls a rehearsal is verified as one, whatever the definition
// is for.
func (r *Report) readFacts(def *Definition, records []Record) (*facts, error) {
	def, err := environmentOf(def, records)
	if err != nil {
		return nil, err
	}
	r.Definition = def
	steps, err := Plan(def)
	if !r.add("plan", err, "%d steps", len(steps)) {
		return nil, err
	}
	f := newFacts(def, steps)
	return f, f.replay(records)
}

// environmentOf returns the definition in the environment of its transcript.
func environmentOf(def *Definition, records []Record) (*Definition, error) {
	var first openData
	if len(records) == 0 || records[0].Step != string(StepOpen) {
		return def, nil // replay says what is wrong
	}
	if err := records[0].decode(&first); err != nil {
		return nil, err
	}
	if first.Environment == Rehearsal {
		var err error
		if def, err = def.Rehearsal(); err != nil {
			return nil, err
		}
	}
	return def.On(first.Machine)
}

// addFacts says what the records showed.
func (r *Report) addFacts(f *facts) {
	if len(f.def.People) > 0 {
		r.add("people", nil, "%d of %d there: %s", len(f.attendance()), len(f.def.People), strings.Join(f.attendance(), ", "))
	}
	if f.announced {
		r.add("entropy", nil, "%d shares fit their commitments", len(f.commitments))
		r.add("keys", nil, "%d keys: announced, observed, self-tests verify%s", len(f.keys), f.levels())
		r.add("certificates", nil, "%d certificates: profile, signatures; the root's serial is derived", len(f.certs))
	}
	signed, declined := f.signatures()
	detail := fmt.Sprintf("%d sign the checkpoint: %s", len(signed), orNobody(strings.Join(signed, ", ")))
	if len(declined) > 0 {
		detail += "; declined: " + strings.Join(declined, ", ")
	}
	r.add("witnesses", nil, "%s", detail)
	r.add("end", f.outcome(), "%s", f.status)
}

// levels counts the keys by evidence level.
func (f *facts) levels() string {
	count := map[hsm.Level]int{}
	for _, k := range f.keys {
		count[k.evidence.Level]++
	}
	text := ""
	for _, level := range sorted(count) {
		text += fmt.Sprintf("; %d %s", count[level], level)
	}
	return text
}

func (r *Report) readDefinition(dir string) *Definition {
	source, err := readBounded(filepath.Join(dir, definitionName), MaxDefinition)
	if err == nil {
		r.Definition, err = ParseDefinition(source)
	}
	if !r.add("definition", err, "valid") {
		return nil
	}
	return r.Definition
}

// checkFiles compares every output with what follows from the records.
func (r *Report) checkFiles(dir string, f *facts, records []Record) {
	if f.status == "" {
		return // not over: nothing can be said of its files
	}
	files, err := f.allFiles(records)
	if !r.add("outputs", err, "%d files follow from the records", len(files)) {
		return
	}
	var names []string
	for _, want := range files {
		names = append(names, want.Name)
		r.outputs = append(r.outputs, want.Name)
		r.add(want.Name, want.compare(dir), "%d octets", want.Size)
	}
	others, err := otherFiles(dir, names)
	r.add("other files", err, "%s", others)
}

// compare says how the file in dir differs from what it should be.
func (f File) compare(dir string) error {
	have, err := readBounded(filepath.Join(dir, filepath.FromSlash(f.Name)), f.Size)
	if err == nil && !bytes.Equal(have, f.content) {
		err = errors.New("content differs from the records")
	}
	return err
}

// otherFiles names what is in dir and was not written by the ceremony.
func otherFiles(dir string, names []string) (string, error) {
	var others []string
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if name := filepath.ToSlash(rel); err == nil && !slices.Contains(names, name) {
			others = append(others, name)
		}
		return err
	})
	if err != nil {
		return "", fmt.Errorf("list folder: %w", err)
	}
	if len(others) == 0 {
		return "none", nil
	}
	return fmt.Sprintf("%d, not covered by this check: %.200s", len(others), strings.Join(others, ", ")), nil
}

// errEmpty: a transcript without a record, as a kill can leave it.
var errEmpty = fmt.Errorf("%w: empty", ErrTranscript)

func readTranscriptFile(path string) ([]Record, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open transcript: %w", err)
	}
	defer f.Close()
	records, err := ReadTranscript(f)
	switch {
	case len(records) == 0 && (err == nil || errors.Is(err, ErrTorn)):
		return nil, errEmpty
	case err != nil:
		return records, err
	}
	return records, nil
}

// readBounded reads a regular file of at most limit octets.
func readBounded(path string, limit int) ([]byte, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", filepath.Base(path))
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err != nil {
		return nil, err
	}
	if len(data) > limit {
		return nil, fmt.Errorf("%s has more than %d octets", filepath.Base(path), limit)
	}
	return data, nil
}
