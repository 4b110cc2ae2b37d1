package head

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/chancery-ca/chancery/log/tree"
	"golang.org/x/sys/unix"
)

// Anchor keeps the last signed head, outside the database. It is used by one
// goroutine at a time.
type Anchor interface {
	// Load returns the record with the highest sequence number. ok is false
	// when no head was ever stored. Errors: ErrAnchor.
	Load() (rec Record, ok bool, err error)
	// Store makes rec durable before it returns nil; when it fails, Load gives
	// rec or the record before it. Sequence is one more than the last one's.
	Store(rec Record) error
	// Close releases the anchor.
	Close() error
}

// Record is what an Anchor keeps.
type Record struct {
	// Sequence counts records, from 1.
	Sequence uint64
	// Epoch is the value of the log's hardware counter in which the record was
	// made, 0 where there is none; see Counter.
	Epoch uint64
	// Start is how the epoch began, signed; zero where nobody signed it.
	Start EpochStart
	// SPKI is the SHA-256 of the head key's SubjectPublicKeyInfo.
	SPKI [sha256.Size]byte
	// Loss marks a record that AcceptLoss wrote: nobody signed its head,
	// Signature is empty and Note the text alone. Replaced is then the SHA-256
	// of the slot that it replaced, of the whole file if that was damaged, and
	// zero if there was none.
	Loss     bool
	Replaced [sha256.Size]byte
	Signed
}

// The file: two slots of 4 KiB, written in turn, integers big-endian.
//
//	offset   0  magic "CHANHEAD"
//	         8  version, 2 octets: 2 with the signed beginning of an epoch, 1 without
//	        10  length of the signature, 2 octets
//	        12  length of the note, 2 octets
//	        14  kind, 2 octets: 0 a signed head, 1 an accepted loss
//	        16  sequence, 8 octets: record n is in slot n mod 2, 0 holds no head
//	        24  epoch, 8 octets
//	        32  SPKI, 32 octets
//	        64  tree size, 8 octets
//	        72  root, 32 octets
//	       104  time, 8 octets: milliseconds since 1970
//	       112  in version 2: beginning of the epoch, its time, 8 octets, tree
//	            size, 8 octets, root, 32 octets, length of the signature, 2
//	            octets, signature
//	            signature, note, zeros; of an accepted loss, in place of the
//	            signature, SHA-256 of the record replaced
//	      4064  SHA-256 of all octets before it
//
// A record is written with one pwrite and one fdatasync. A write that was torn
// spoils its own slot; the other one holds the record before it, and that head
// was the last one published.
const (
	slotSize     = 4096
	anchorMagic  = "CHANHEAD"
	anchorFormat = 1
	anchorSigned = 2 // with an EpochStart
	kindLoss     = 1
	slotBody     = 112
	slotSum      = slotSize - sha256.Size
	slotStart    = 50                 // octets of an EpochStart before its signature
	maxVariable  = slotSum - slotBody // octets of EpochStart, signature and note together
)

var errSlot = errors.New("slot not valid")

// marshal encodes a slot. The zero Record is the empty slot 0 of a new file.
func (r Record) marshal() ([]byte, error) {
	signature, kind := r.Signature, uint16(0)
	if r.Loss {
		if len(r.Signature) > 0 {
			return nil, errors.New("an accepted loss has no signature")
		}
		signature, kind = r.Replaced[:], kindLoss
	}
	start, version := r.Start.marshal(), uint16(anchorFormat)
	if len(start) > 0 {
		version = anchorSigned
	}
	if len(start)+len(signature)+len(r.Note) > maxVariable {
		return nil, fmt.Errorf("note of %d octets does not fit the anchor", len(r.Note))
	}
	b := make([]byte, slotBody, slotSize)
	copy(b, anchorMagic)
	be := binary.BigEndian
	be.PutUint16(b[8:], version)
	be.PutUint16(b[10:], uint16(len(signature)))
	be.PutUint16(b[12:], uint16(len(r.Note)))
	be.PutUint16(b[14:], kind)
	be.PutUint64(b[16:], r.Sequence)
	be.PutUint64(b[24:], r.Epoch)
	copy(b[32:], r.SPKI[:])
	be.PutUint64(b[64:], r.Size)
	copy(b[72:], r.Root[:])
	if r.Sequence > 0 {
		be.PutUint64(b[104:], uint64(r.Time.UnixMilli()))
	}
	b = append(append(append(b, start...), signature...), r.Note...)
	b = b[:slotSum]
	sum := sha256.Sum256(b)
	return append(b, sum[:]...), nil
}

// marshal encodes a signed beginning, and none as nothing.
func (s EpochStart) marshal() []byte {
	if len(s.Signature) == 0 {
		return nil
	}
	be := binary.BigEndian
	b := be.AppendUint64(nil, uint64(s.Time.UnixMilli()))
	b = be.AppendUint64(b, s.Size)
	b = append(b, s.Root[:]...)
	b = be.AppendUint16(b, uint16(len(s.Signature)))
	return append(b, s.Signature...)
}

// parseEpochStart decodes the beginning of b and returns the rest.
func parseEpochStart(b []byte) (EpochStart, []byte, error) {
	var s EpochStart
	be := binary.BigEndian
	ms, n := be.Uint64(b), int(be.Uint16(b[slotStart-2:]))
	if ms > 1<<53 || n == 0 || n > len(b)-slotStart {
		return s, nil, errSlot
	}
	s.Head = Head{Size: be.Uint64(b[8:]), Root: tree.Hash(b[16:]), Time: time.UnixMilli(int64(ms)).UTC()}
	s.Signature = bytes.Clone(b[slotStart : slotStart+n])
	return s, b[slotStart+n:], nil
}

// parseSlot decodes the slot with the given number, 0 or 1. Exactly what
// marshal writes is accepted.
func parseSlot(number uint64, b []byte) (Record, error) {
	var r Record
	if len(b) != slotSize || string(b[:8]) != anchorMagic {
		return r, errSlot
	}
	if sum := sha256.Sum256(b[:slotSum]); !bytes.Equal(sum[:], b[slotSum:]) {
		return r, errSlot
	}
	be := binary.BigEndian
	version := be.Uint16(b[8:])
	if version != anchorFormat && version != anchorSigned {
		return r, fmt.Errorf("anchor version %d, this program knows %d and %d: %w", version, anchorFormat, anchorSigned, ErrAnchor)
	}
	sig, note := int(be.Uint16(b[10:])), int(be.Uint16(b[12:]))
	ms := be.Uint64(b[104:])
	rest := b[slotBody:slotSum]
	if version == anchorSigned {
		var err error
		if r.Start, rest, err = parseEpochStart(rest); err != nil {
			return r, err
		}
	}
	if sig+note > len(rest) || ms > 1<<53 || version == anchorSigned && be.Uint64(b[16:]) == 0 {
		return r, errSlot
	}
	r.Sequence, r.Epoch = be.Uint64(b[16:]), be.Uint64(b[24:])
	r.SPKI = [sha256.Size]byte(b[32:])
	r.Size, r.Root = be.Uint64(b[64:]), tree.Hash(b[72:])
	if r.Sequence > 0 {
		r.Time = time.UnixMilli(int64(ms)).UTC()
	}
	r.Signature = bytes.Clone(rest[:sig])
	r.Note = bytes.Clone(rest[sig : sig+note])
	if be.Uint16(b[14:]) == kindLoss {
		if sig != sha256.Size || r.Sequence == 0 {
			return r, errSlot
		}
		r.Loss, r.Replaced, r.Signature = true, [sha256.Size]byte(r.Signature), nil
	}
	if again, err := r.marshal(); err != nil || !bytes.Equal(again, b) || r.Sequence%2 != number {
		return r, errSlot
	}
	return r, nil
}

// FileAnchor is an Anchor in a file of two slots.
type FileAnchor struct {
	f    *os.File
	once sync.Once
	err  error // of Close
}

var _ Anchor = (*FileAnchor)(nil)

// CreateAnchor makes an anchor that holds no head yet. An existing file is
// refused (errors.Is fs.ErrExist). It is durable, with its name in the
// directory, before it returns.
func CreateAnchor(path string) error { return CreateAnchorAt(path, 0) }

// CreateAnchorAt makes an anchor as CreateAnchor does, for a log with a hardware
// counter: epoch is the counter's value now.
func CreateAnchorAt(path string, epoch uint64) error {
	empty, err := Record{Epoch: epoch}.marshal()
	if err != nil {
		return fmt.Errorf("create anchor: %w", err)
	}
	f, err := os.OpenFile(filepath.Clean(path), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("create anchor: %w", err)
	}
	defer func() { _ = f.Close() }()
	if _, err := f.Write(append(empty, make([]byte, slotSize)...)); err != nil {
		return fmt.Errorf("create anchor: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("create anchor: %w", err)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("create anchor: %w", err)
	}
	defer func() { _ = dir.Close() }()
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("create anchor: %w", err)
	}
	return nil
}

// OpenAnchor opens the anchor file at path for this process alone. Errors:
// ErrAnchor if it is missing (with fs.ErrNotExist), has another size (with
// ErrDamaged) or is in use.
func OpenAnchor(path string) (*FileAnchor, error) {
	a, err := lockAnchor(path)
	if err != nil {
		return nil, err
	}
	info, err := a.f.Stat()
	if err == nil && info.Size() != 2*slotSize {
		err = fmt.Errorf("%d octets, want %d: %w", info.Size(), 2*slotSize, ErrDamaged)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open anchor %s: %w: %w", path, err, ErrAnchor), a.Close())
	}
	return a, nil
}

// lockAnchor opens and locks a file that may be damaged.
func lockAnchor(path string) (*FileAnchor, error) {
	f, err := os.OpenFile(filepath.Clean(path), os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("open anchor: %w: %w", err, ErrAnchor)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock anchor %s: %w: %w", path, err, ErrAnchor)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("not a file")
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("open anchor %s: %w: %w", path, err, ErrAnchor)
	}
	return &FileAnchor{f: f}, nil
}

// Load implements Anchor. The valid slot with the higher sequence number
// counts; one that is not valid is tolerated, two are not.
func (a *FileAnchor) Load() (Record, bool, error) {
	b := make([]byte, 2*slotSize)
	if _, err := a.f.ReadAt(b, 0); err != nil {
		return Record{}, false, fmt.Errorf("read anchor: %w: %w", err, ErrAnchor)
	}
	var best Record
	valid := 0
	for n := range uint64(2) {
		r, err := parseSlot(n, b[n*slotSize:(n+1)*slotSize])
		switch {
		case errors.Is(err, ErrAnchor):
			return Record{}, false, fmt.Errorf("read anchor: %w", err)
		case err != nil:
			continue
		}
		if valid++; valid == 1 || r.Sequence > best.Sequence {
			best = r
		}
	}
	if valid == 0 {
		return Record{}, false, fmt.Errorf("read anchor: both slots damaged: %w: %w", ErrDamaged, ErrAnchor)
	}
	return best, best.Sequence > 0, nil
}

// Store implements Anchor.
func (a *FileAnchor) Store(rec Record) error {
	b, err := rec.marshal()
	if err != nil {
		return fmt.Errorf("write anchor: %w", err)
	}
	if _, err := a.f.WriteAt(b, int64(rec.Sequence%2)*slotSize); err != nil {
		return fmt.Errorf("write anchor: %w", err)
	}
	if err := unix.Fdatasync(int(a.f.Fd())); err != nil {
		return fmt.Errorf("sync anchor: %w", err)
	}
	return nil
}

// Close implements Anchor. Closing twice is harmless.
func (a *FileAnchor) Close() error {
	a.once.Do(func() {
		if err := a.f.Close(); err != nil {
			a.err = fmt.Errorf("close anchor: %w", err)
		}
	})
	return a.err
}
