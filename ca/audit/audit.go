// Package audit keeps the record of every decision of the certificate
// authority: lines of JSON in files that only grow, each line holding the
// SHA-256 of the one before it.
//
// Data flows one way: Record → bounded queue → one writer, which gives it its
// number, time and link, writes all that wait with one write and one
// fdatasync, and wakes those who wait.
//
// The package promises:
//   - Append returns nil only when the record is on the disk. A certificate is
//     released only then, so none exists that the audit does not know.
//   - Nothing that was acknowledged changes unnoticed: Verify finds a changed,
//     removed, inserted or reordered line. What the end of the last file alone
//     can lose shows against a Seal: a timestamp over the newest line, made by
//     the timestamp authority's hardware key, kept beside the files and shown in
//     the service's own log, from where it can be taken elsewhere.
//   - When a line cannot be written every later Append fails too, until the
//     process is restarted and what is on the disk was read again. Issuing
//     stops.
//   - Nobody fills the disk without a token: records of requests that did not
//     authenticate are limited, and what was left out is counted in a record.
//
// It trusts the file system to keep what fdatasync acknowledged, and its caller
// for what a Record says. A Record names the identity that goes into the
// certificate and no other claim of a token, and never the token.
//
// What each file is worth: audit-*.jsonl may not be lost; who can change the
// last file can take away what came after the newest seal that somebody else
// has. seals.jsonl may be lost: each seal is in the files too.
package audit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

// Errors that callers branch on.
var (
	// ErrUnavailable: the record cannot be written. Nothing may be issued.
	ErrUnavailable = errors.New("audit cannot be written")
	// ErrBusy: too many records wait. Nothing was written; try again.
	ErrBusy = errors.New("audit busy")
	// ErrDamaged: a file is not what was written.
	ErrDamaged = errors.New("audit damaged")
	// ErrInUse: another process writes here.
	ErrInUse = errors.New("audit in use")
	// ErrNotFound: no audit was begun here, or all its files are gone.
	ErrNotFound = errors.New("audit not found")
	// ErrExists: an audit was begun here already.
	ErrExists = errors.New("audit exists already")
)

// Type is what a record tells.
type Type string

// The types of records.
const (
	// TypeAllowed: a certificate will be issued. It is durable before the
	// certificate is released. An Issued or Withdrawn with its serial follows.
	TypeAllowed Type = "allowed"
	// TypeIssued: the certificate was released; LogIndex is its entry.
	TypeIssued Type = "issued"
	// TypeWithdrawn: the certificate was not released; Reason says why.
	TypeWithdrawn Type = "withdrawn"
	// TypeRefused: a request was refused; Reason says why.
	TypeRefused Type = "refused"
	// TypeOmitted: Count records of refused requests were left out.
	TypeOmitted Type = "omitted"
	// TypeSeal: Seal is a timestamp over Prev.
	TypeSeal Type = "seal"
	// TypeBegin is the first record of a file. After a crash Reason says what
	// was cut off: octets that were never acknowledged.
	TypeBegin Type = "begin"
)

// Record is one line. Version, Seq, Time and Prev are the writer's; what does
// not belong to the type is empty and left out.
type Record struct {
	Version int `json:"v"`
	// Seq counts records from 0, over all files.
	Seq  uint64    `json:"seq"`
	Time time.Time `json:"time"`
	Type Type      `json:"type"`
	// Request is the id under which the service's log has the request.
	Request string `json:"request,omitempty"`
	// Issuer is the identity provider, SAN and SANType the name that goes into
	// the certificate.
	Issuer  string `json:"issuer,omitempty"`
	SANType string `json:"sanType,omitempty"`
	SAN     string `json:"san,omitempty"`
	// SPKI is the SHA-256 of the certified public key, in hexadecimal.
	SPKI string `json:"spki,omitempty"`
	// Token is the first 16 hexadecimal digits of the token's SHA-256, and Uses
	// how often it was used, this time included; 0 if that is not known.
	Token string `json:"token,omitempty"`
	Uses  int    `json:"uses,omitempty"`
	// Rule is the rule of the policy that decided.
	Rule string `json:"rule,omitempty"`
	// Serial is the certificate's, in hexadecimal.
	Serial string `json:"serial,omitempty"`
	// LogIndex is the entry in the CT log, absent for a log elsewhere.
	LogIndex *uint64 `json:"logIndex,omitempty"`
	Reason   string  `json:"reason,omitempty"`
	Count    uint64  `json:"count,omitempty"`
	// Seal is a DER TimeStampResp (RFC 3161, Section 2.4.2) whose message
	// imprint is Prev: it is a timestamp of the line before this one.
	Seal []byte `json:"seal,omitempty"`
	// Prev is the SHA-256, in hexadecimal, of the line before this one without
	// its line break; of the first record 64 zeros.
	Prev string `json:"prev"`
}

// Sealer puts a trusted time on the SHA-256 of a line: the timestamp authority.
type Sealer interface {
	// Timestamp returns a DER TimeStampResp (RFC 3161, Section 2.4.2) whose
	// message imprint is digest, a SHA-256.
	Timestamp(ctx context.Context, digest [sha256.Size]byte) ([]byte, error)
}

// Config is what a Log needs.
type Config struct {
	// Dir holds the files, the first of which Create has made.
	Dir string
	// Now is the one clock. Records carry max(now, time of the last record).
	Now func() (time.Time, error)
	// Sealer signs the newest line every SealEvery and at Close, and ten minutes
	// after it failed or Open found no seal at the end; nil is none.
	Sealer    Sealer
	SealEvery time.Duration // 0 is a day
	// MaxFile is the size after which a new file begins, 0 is 64 MiB.
	MaxFile int64
	// Logger may be nil.
	Logger *slog.Logger
}

const (
	version       = 1
	maxQueue      = 4096
	maxBatch      = 1024
	maxLine       = 64 << 10 // octets
	defaultFile   = 64 << 20
	defaultSeal   = 24 * time.Hour
	sealTimeout   = 10 * time.Second // nothing is written meanwhile
	sealAgain     = 10 * time.Minute
	strangerRate  = 5 // records of requests that did not authenticate, per second
	strangerBurst = 100
	omittedEvery  = time.Minute
)

// Log is an open audit. It is safe for concurrent use. One goroutine owns the
// files.
type Log struct {
	cfg       Config
	queue     chan *entry
	strangers *rate.Limiter
	stop      chan struct{} // closed by Close
	done      chan struct{} // closed when the writer has ended
	closing   func() error  // Close, once

	mu      sync.Mutex
	omitted uint64 // refused requests that got no record; guarded by mu
	dead    error  // why nothing can be written; guarded by mu

	w writer // the goroutine's own
}

// entry is a record in the queue.
type entry struct {
	record Record
	done   chan error // holds one; nil if nobody waits
}

// Create begins an audit in dir, and makes the folder if it is missing. It is the
// only way in which one begins: an audit that is gone is noticed, not replaced.
// Errors: ErrExists, ErrInUse.
func Create(dir string, now func() (time.Time, error)) (err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("create audit: %w", err)
	}
	var w writer
	if err := w.create(Config{Dir: dir, Now: now}); err != nil {
		return fmt.Errorf("create audit: %w", errors.Join(err, w.close()))
	}
	return w.close()
}

// Open opens the audit in cfg.Dir for this process alone. It reads the newest
// file and the link to the one before. Octets behind the last complete line,
// which nobody was told of, are cut off and noted. Errors: ErrNotFound,
// ErrInUse, ErrDamaged.
func Open(cfg Config) (*Log, error) {
	if cfg.Now == nil {
		return nil, errors.New("open audit: no clock")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.MaxFile == 0 {
		cfg.MaxFile = defaultFile
	}
	if cfg.SealEvery == 0 {
		cfg.SealEvery = defaultSeal
	}
	l := &Log{
		cfg: cfg, queue: make(chan *entry, maxQueue), strangers: rate.NewLimiter(strangerRate, strangerBurst),
		stop: make(chan struct{}), done: make(chan struct{}),
	}
	l.closing = sync.OnceValue(l.close)
	if err := l.w.open(cfg); err != nil {
		return nil, fmt.Errorf("open audit: %w", err)
	}
	go l.run()
	return l, nil
}

// Append writes a record and returns when it is durable. Errors: ErrBusy,
// ErrUnavailable; when ctx ends first its error, and the record may be written
// all the same.
func (l *Log) Append(ctx context.Context, r Record) error {
	e := &entry{record: r, done: make(chan error, 1)}
	if err := l.enqueue(e); err != nil {
		return err
	}
	select {
	case err := <-e.done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("append to audit: %w", context.Cause(ctx))
	case <-l.done:
		select {
		case err := <-e.done:
			return err
		default:
			return fmt.Errorf("%w: closed", ErrUnavailable)
		}
	}
}

// Note writes a record after those that were appended before it, and does not
// wait. A full queue or a dead log drops it, which a later Append shows.
func (l *Log) Note(r Record) {
	if err := l.enqueue(&entry{record: r}); err != nil {
		l.cfg.Logger.Error("audit record dropped", "type", string(r.Type), "request", r.Request, "err", err)
	}
}

// Refuse notes a refused request. authenticated says whether it had a valid
// token; of those without one only so many a second are written, and the rest
// are counted.
func (l *Log) Refuse(r Record, authenticated bool) {
	r.Type = TypeRefused
	if !authenticated && !l.strangers.Allow() {
		l.mu.Lock()
		l.omitted++
		l.mu.Unlock()
		return
	}
	l.Note(r)
}

// Err is why nothing can be written, or nil.
func (l *Log) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dead
}

func (l *Log) enqueue(e *entry) error {
	if err := l.Err(); err != nil {
		return err
	}
	select {
	case <-l.stop:
		return fmt.Errorf("%w: closed", ErrUnavailable)
	default:
	}
	select {
	case l.queue <- e:
		return nil
	default:
		return fmt.Errorf("%w: %d records wait", ErrBusy, cap(l.queue))
	}
}

// Close writes what is in the queue, seals, and closes the files. Appending
// later is ErrUnavailable. It may be called again, with the same result.
func (l *Log) Close() error { return l.closing() }

func (l *Log) close() error {
	close(l.stop)
	<-l.done
	return l.w.close()
}

// run is the writer's goroutine.
func (l *Log) run() {
	defer close(l.done)
	seal := time.NewTimer(l.nextSeal())
	defer seal.Stop()
	omitted := time.NewTicker(omittedEvery)
	defer omitted.Stop()
	for {
		select {
		case e := <-l.queue:
			l.commit(l.gather(e))
		case <-omitted.C:
			l.commit(l.countOmitted())
		case <-seal.C:
			l.seal()
			seal.Reset(l.nextSeal())
		case <-l.stop:
			l.drain()
			return
		}
	}
}

// gather takes what else is in the queue, up to maxBatch.
func (l *Log) gather(first *entry) []*entry {
	batch := []*entry{first}
	for len(batch) < maxBatch {
		select {
		case e := <-l.queue:
			batch = append(batch, e)
		default:
			return batch
		}
	}
	return batch
}

// countOmitted makes the record of what was left out, if anything was.
func (l *Log) countOmitted() []*entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.omitted == 0 {
		return nil
	}
	n := l.omitted
	l.omitted = 0
	return []*entry{{record: Record{Type: TypeOmitted, Count: n}}}
}

func (l *Log) drain() {
	for {
		select {
		case e := <-l.queue:
			l.commit(l.gather(e))
		default:
			l.commit(l.countOmitted())
			l.seal()
			return
		}
	}
}

// commit writes a batch and answers everybody in it.
func (l *Log) commit(batch []*entry) {
	if len(batch) == 0 {
		return
	}
	err := l.Err()
	if err == nil {
		if err = l.w.write(batch, l.cfg); err != nil {
			err = fmt.Errorf("%w: %w", ErrUnavailable, err)
			l.mu.Lock()
			l.dead = err
			l.mu.Unlock()
			l.cfg.Logger.Error("audit cannot be written: issuing stops", "err", err)
		}
	}
	for _, e := range batch {
		if e.done != nil {
			e.done <- err
		}
	}
}

// nextSeal is the time to the next seal.
func (l *Log) nextSeal() time.Duration {
	if l.w.sealed {
		return l.cfg.SealEvery
	}
	return min(l.cfg.SealEvery, sealAgain)
}

// seal has the newest line timestamped. Without new records since the last
// seal there is nothing to do. A failure is logged and tried again next time.
func (l *Log) seal() {
	if l.cfg.Sealer == nil || l.w.sealed || l.Err() != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), sealTimeout)
	defer cancel()
	head := l.w.head
	token, err := l.cfg.Sealer.Timestamp(ctx, head)
	if err != nil {
		l.cfg.Logger.Warn("audit not sealed", "err", err)
		return
	}
	seq := l.w.next
	l.commit([]*entry{{record: Record{Type: TypeSeal, Seal: token}}})
	if l.Err() != nil {
		return
	}
	l.w.sealed = true
	l.cfg.Logger.Info("audit sealed", "seq", seq, "head", hex.EncodeToString(head[:]))
	if err := l.w.keepSeal(l.cfg.Dir, Record{Version: version, Seq: seq, Time: l.w.time, Type: TypeSeal, Seal: token, Prev: hex.EncodeToString(head[:])}); err != nil {
		l.cfg.Logger.Warn("seal not kept beside the audit", "err", err)
	}
}

// writer is the files. One goroutine uses it.
type writer struct {
	lock   *os.File // the directory
	file   *os.File
	size   int64
	next   uint64            // number of the next record
	head   [sha256.Size]byte // SHA-256 of the last line
	time   time.Time         // of the last record
	sealed bool              // no record since the last seal
	buffer bytes.Buffer
}

// write gives the records their numbers and links, writes them and syncs. A seal
// begins no file: it is over the line before it, which would be another.
func (w *writer) write(batch []*entry, cfg Config) error {
	if w.size >= cfg.MaxFile && batch[0].record.Type != TypeSeal {
		if err := w.rotate(cfg); err != nil {
			return err
		}
	}
	w.buffer.Reset()
	for _, e := range batch {
		if err := w.add(e.record, cfg); err != nil {
			return err
		}
	}
	return w.flush()
}

// add puts one record into the buffer.
func (w *writer) add(r Record, cfg Config) error {
	now, err := cfg.Now()
	if err != nil || now.Before(w.time) {
		now = w.time // a clock in doubt stops issuing; what is refused then has the last time
	}
	r.Version, r.Seq, r.Time, r.Prev = version, w.next, now.UTC(), hex.EncodeToString(w.head[:])
	line, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	if len(line) > maxLine {
		return fmt.Errorf("record of %d octets, at most %d", len(line), maxLine)
	}
	w.buffer.Write(line)
	w.buffer.WriteByte('\n')
	w.head, w.time, w.next, w.sealed = sha256.Sum256(line), r.Time, w.next+1, false
	return nil
}

// flush writes the buffer with one write and makes it durable.
func (w *writer) flush() error {
	n, err := w.file.Write(w.buffer.Bytes())
	w.size += int64(n)
	if err != nil {
		return fmt.Errorf("write: %w", err)
	}
	if err := unix.Fdatasync(int(w.file.Fd())); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	return nil
}

// rotate begins a new file.
func (w *writer) rotate(cfg Config) error {
	old := w.file
	if err := w.begin(cfg, ""); err != nil {
		return err
	}
	return old.Close()
}

// begin makes the file of the next record and writes its first line.
func (w *writer) begin(cfg Config, reason string) error {
	name := filepath.Join(cfg.Dir, fileName(w.next))
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("begin file: %w", err)
	}
	w.file, w.size = f, 0
	w.buffer.Reset()
	if err := w.add(Record{Type: TypeBegin, Reason: reason}, cfg); err != nil {
		return err
	}
	if err := w.flush(); err != nil {
		return err
	}
	return w.lock.Sync()
}

// keepSeal appends the seal to seals.jsonl.
func (w *writer) keepSeal(dir string, r Record) error {
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(dir, SealsName), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(line, '\n'))
	return errors.Join(err, f.Sync(), f.Close())
}

func (w *writer) close() error {
	var errs []error
	if w.file != nil {
		errs = append(errs, w.file.Close())
		w.file = nil
	}
	if w.lock != nil {
		errs = append(errs, w.lock.Close())
		w.lock = nil
	}
	return errors.Join(errs...)
}
