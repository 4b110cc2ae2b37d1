package ceremony

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/gowebpki/jcs"

	"github.com/chancery-ca/chancery/ceremony/durable"
)

// TranscriptName is the transcript's file name among the outputs.
const TranscriptName = "transcript.jsonl"

// The bounds of a transcript that is read.
const (
	MaxTranscript = 16 << 20 // octets
	// MaxRecord is how many octets one line has. The largest is that of an import
	// on the online machine: it has the transcript of the offline one, in which is
	// what that one carried over (maxCarried) and the transcript of the request,
	// in which is the same again; each is in base64.
	MaxRecord = 4 << 20
)

// Errors that callers branch on.
var (
	// ErrTranscript: the transcript is malformed or its chain is broken.
	ErrTranscript = errors.New("invalid transcript")
	// ErrTorn: the transcript ends in the middle of a record, as a kill
	// leaves it. Resuming cuts the torn record off: it was never acted upon.
	ErrTorn = fmt.Errorf("%w: last record is torn", ErrTranscript)
)

// RecordType says what a record is about its step.
type RecordType string

// The types of records. An intent says what will be done, and is on disk
// before it is done; a result says what came of it, and ends the step.
const (
	Intent RecordType = "intent"
	Done   RecordType = "result"
	// Statement is what a person said; the actor is the person.
	Statement RecordType = "statement"
	// Quarantine says that a token does not hold what was announced.
	Quarantine RecordType = "quarantine"
)

// Record is one line of the transcript. It never contains a secret.
type Record struct {
	V        int             `json:"v"`        // 1
	Ceremony string          `json:"ceremony"` // Definition.ID
	Seq      uint64          `json:"seq"`      // from 0, without gaps
	Time     time.Time       `json:"time"`     // UTC, never earlier than the record before
	Actor    string          `json:"actor"`    // a person's id, a token's name, or "chancery-ceremony"
	Step     string          `json:"step"`     // Step.ID
	Type     RecordType      `json:"type"`
	Data     json.RawMessage `json:"data"` // an object; its shape depends on the step
	// Prev is the Hash of the record before, 64 zeros for the first.
	Prev string `json:"prev"`
	// Hash is the SHA-256 of 0x00 and the JCS form (RFC 8785) of this record
	// without this member, in hexadecimal.
	Hash string `json:"hash"`
}

// Digest returns Hash as octets.
func (r *Record) Digest() [sha256.Size]byte {
	var h [sha256.Size]byte
	_, _ = hex.Decode(h[:], []byte(r.Hash)) // checked when the record was made
	return h
}

// line returns the record's canonical JSON, and with hash "" the octets that
// are hashed.
func (r *Record) line() ([]byte, error) {
	raw, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encode record %d: %w", r.Seq, err)
	}
	if r.Hash == "" {
		raw = append(bytes.TrimSuffix(raw, []byte(`,"hash":""}`)), '}')
	}
	canonical, err := jcs.Transform(raw)
	if err != nil {
		return nil, fmt.Errorf("canonicalise record %d: %w", r.Seq, err)
	}
	return canonical, nil
}

// seal computes Hash from everything else.
func (r *Record) seal() error {
	r.Hash = ""
	body, err := r.line()
	if err != nil {
		return err
	}
	h := sha256.New()
	h.Write([]byte{0})
	h.Write(body)
	r.Hash = hex.EncodeToString(h.Sum(nil))
	return nil
}

// decode reads Data strictly into v.
func (r *Record) decode(v any) error {
	dec := json.NewDecoder(bytes.NewReader(r.Data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return fmt.Errorf("%w: record %d (%s): %w", ErrTranscript, r.Seq, r.Step, err)
	}
	return nil
}

var zeroHash = hex.EncodeToString(make([]byte, sha256.Size))

// ReadTranscript reads and checks a whole transcript: every line is the
// canonical form of its record, every record continues the one before, and
// there is nothing else. The records before a torn last one are returned
// together with ErrTorn.
func ReadTranscript(r io.Reader) ([]Record, error) {
	data, err := io.ReadAll(io.LimitReader(r, MaxTranscript+1))
	if err != nil {
		return nil, fmt.Errorf("read transcript: %w", err)
	}
	if len(data) > MaxTranscript {
		return nil, fmt.Errorf("%w: larger than %d octets", ErrTranscript, MaxTranscript)
	}
	var records []Record
	for len(data) > 0 {
		line, rest, ended := bytes.Cut(data, []byte("\n"))
		if !ended {
			return records, ErrTorn
		}
		rec, err := parseRecord(line)
		if err != nil {
			return nil, fmt.Errorf("%w: line %d: %w", ErrTranscript, len(records)+1, err)
		}
		if err := checkChain(records, rec); err != nil {
			return nil, fmt.Errorf("%w: line %d: %w", ErrTranscript, len(records)+1, err)
		}
		records, data = append(records, *rec), rest
	}
	return records, nil
}

// parseRecord reads one line and checks its own hash and form.
func parseRecord(line []byte) (*Record, error) {
	if len(line) > MaxRecord {
		return nil, fmt.Errorf("larger than %d octets", MaxRecord)
	}
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.DisallowUnknownFields()
	var rec Record
	if err := dec.Decode(&rec); err != nil {
		return nil, fmt.Errorf("decode: %w", err)
	}
	if len(rec.Data) == 0 || rec.Data[0] != '{' {
		return nil, errors.New("data is not an object")
	}
	canonical, err := rec.line()
	if err != nil {
		return nil, err
	}
	if rec.Hash == "" || !bytes.Equal(canonical, line) {
		return nil, errors.New("not in canonical form")
	}
	sealed := rec
	if err := sealed.seal(); err != nil {
		return nil, err
	}
	if sealed.Hash != rec.Hash {
		return nil, errors.New("hash does not fit the record")
	}
	return &rec, nil
}

// checkChain says whether next continues the records.
func checkChain(records []Record, next *Record) error {
	if next.V != 1 {
		return fmt.Errorf("version %d", next.V)
	}
	if next.Seq != uint64(len(records)) {
		return fmt.Errorf("sequence number %d, want %d", next.Seq, len(records))
	}
	if !slices.Contains([]RecordType{Intent, Done, Statement, Quarantine}, next.Type) {
		return fmt.Errorf("unknown type %.20q", next.Type)
	}
	if len(records) == 0 {
		if next.Prev != zeroHash {
			return errors.New("the first record has a predecessor")
		}
		return nil
	}
	last := &records[len(records)-1]
	switch {
	case next.Prev != last.Hash:
		return errors.New("does not continue the record before")
	case next.Ceremony != last.Ceremony:
		return errors.New("belongs to another ceremony")
	case next.Time.Before(last.Time):
		return errors.New("is earlier than the record before")
	}
	return nil
}

// Transcript is an open transcript, being written. It is not safe for
// concurrent use: a ceremony does one thing at a time.
type Transcript struct {
	ceremony string
	file     *os.File
	now      func() (time.Time, error)
	records  []Record
	// broken is the first write error: after it nothing is appended, because
	// what is on disk is no longer known.
	broken error
}

// CreateTranscript starts a new transcript at path. A file that exists is
// refused (fs.ErrExist).
func CreateTranscript(path, ceremony string, now func() (time.Time, error)) (*Transcript, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR|os.O_APPEND, 0o644)
	if err != nil {
		return nil, fmt.Errorf("create transcript: %w", err)
	}
	t := &Transcript{ceremony: ceremony, file: f, now: now}
	if err := errors.Join(t.lock(), durable.SyncFolder(filepath.Dir(path))); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return t, nil
}

// OpenTranscript opens the transcript of an interrupted ceremony to go on with
// it, checks it, and cuts off a torn last record.
func OpenTranscript(path, ceremony string, now func() (time.Time, error)) (*Transcript, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		return nil, fmt.Errorf("open transcript: %w", err)
	}
	t := &Transcript{ceremony: ceremony, file: f, now: now}
	if err := errors.Join(t.lock(), t.load()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return t, nil
}

// lock keeps a second process out of this ceremony.
func (t *Transcript) lock() error {
	if err := syscall.Flock(int(t.file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return fmt.Errorf("lock transcript: another process has it: %w", err)
	}
	return nil
}

func (t *Transcript) load() error {
	records, err := ReadTranscript(t.file)
	if err != nil && !errors.Is(err, ErrTorn) {
		return err
	}
	if len(records) > 0 && records[0].Ceremony != t.ceremony {
		return fmt.Errorf("%w: it belongs to ceremony %.80q", ErrTranscript, records[0].Ceremony)
	}
	t.records = records
	if err == nil {
		return nil
	}
	var size int64
	for i := range records {
		line, err := records[i].line()
		if err != nil {
			return err
		}
		size += int64(len(line)) + 1
	}
	if err := errors.Join(t.file.Truncate(size), t.file.Sync()); err != nil {
		return fmt.Errorf("cut torn record: %w", err)
	}
	return nil
}

// Records returns all records so far. The caller does not change them.
func (t *Transcript) Records() []Record { return t.records }

// Append seals a record with the given data (a struct that encodes to a JSON
// object), writes it and waits until it is on disk.
func (t *Transcript) Append(actor, step string, typ RecordType, data any) (*Record, error) {
	return t.appendIf(actor, step, typ, data, func(*Record) error { return nil })
}

// appendIf is Append of a record that accept takes. One that it refuses is not
// written.
func (t *Transcript) appendIf(actor, step string, typ RecordType, data any, accept func(*Record) error) (*Record, error) {
	if t.broken != nil {
		return nil, t.broken
	}
	raw, err := json.Marshal(data)
	if err != nil {
		return nil, fmt.Errorf("encode %s of %s: %w", typ, step, err)
	}
	// What is kept in memory is what a reader of the file gets.
	if raw, err = jcs.Transform(raw); err != nil {
		return nil, fmt.Errorf("canonicalise %s of %s: %w", typ, step, err)
	}
	now, err := t.now()
	if err != nil {
		return nil, fmt.Errorf("read clock: %w", err)
	}
	rec := Record{
		V: 1, Ceremony: t.ceremony, Seq: uint64(len(t.records)), Time: now.UTC().Round(0),
		Actor: actor, Step: step, Type: typ, Data: raw, Prev: zeroHash,
	}
	if n := len(t.records); n > 0 {
		rec.Prev = t.records[n-1].Hash
	}
	if err := checkChain(t.records, &rec); err != nil {
		return nil, fmt.Errorf("append record %d: %w", rec.Seq, err)
	}
	if err := rec.seal(); err != nil {
		return nil, err
	}
	line, err := rec.line()
	if err != nil {
		return nil, err
	}
	if len(line) > MaxRecord {
		return nil, fmt.Errorf("append record %d: larger than %d octets", rec.Seq, MaxRecord)
	}
	if err := accept(&rec); err != nil {
		return nil, err
	}
	if _, err := t.file.Write(append(line, '\n')); err != nil {
		t.broken = fmt.Errorf("write record %d: %w", rec.Seq, err)
		return nil, t.broken
	}
	if err := t.file.Sync(); err != nil {
		t.broken = fmt.Errorf("sync record %d: %w", rec.Seq, err)
		return nil, t.broken
	}
	t.records = append(t.records, rec)
	return &t.records[len(t.records)-1], nil
}

// Close closes the file. The transcript stays as it is.
func (t *Transcript) Close() error {
	if err := t.file.Close(); err != nil {
		return fmt.Errorf("close transcript: %w", err)
	}
	return nil
}
