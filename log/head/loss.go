package head

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/tree"
	"golang.org/x/sys/unix"
)

// readAttempts is how often ReadAnchor looks at a slot that does not verify: the
// process that owns the file may be writing it, and be held up in the middle.
// firstPause is how long it waits before it looks again, twice as long each time.
const (
	readAttempts = 8
	firstPause   = time.Millisecond
)

// AnchorState is what an anchor file holds, for people.
type AnchorState struct {
	// Record is the newest valid one; its Sequence is 0 if no head was ever
	// stored.
	Record Record
	// Damaged are the numbers, 0 or 1, of the slots that are neither valid nor
	// of a file that was never written so far. After a torn write one slot is
	// damaged until the next head.
	Damaged []int
}

// ReadAnchor reads the anchor file at path without locking it, also while a
// Publisher writes to it. It reads the newest record that was whole at some
// moment of the call. Errors: ErrAnchor; with fs.ErrNotExist if there is no
// file, with ErrDamaged if no slot is valid.
func ReadAnchor(path string) (AnchorState, error) {
	var state AnchorState
	for n := range readAttempts {
		if n > 0 {
			time.Sleep(firstPause << (n - 1))
		}
		b, err := os.ReadFile(filepath.Clean(path))
		if err != nil {
			return AnchorState{}, fmt.Errorf("read anchor: %w: %w", err, ErrAnchor)
		}
		if len(b) != 2*slotSize {
			return AnchorState{}, fmt.Errorf("read anchor %s: %d octets, want %d: %w: %w", path, len(b), 2*slotSize, ErrDamaged, ErrAnchor)
		}
		if state, err = parseAnchor(b); err != nil {
			return AnchorState{}, err
		}
		if len(state.Damaged) == 0 {
			break
		}
	}
	if len(state.Damaged) == 2 {
		return state, fmt.Errorf("read anchor %s: both slots damaged: %w: %w", path, ErrDamaged, ErrAnchor)
	}
	return state, nil
}

func parseAnchor(b []byte) (AnchorState, error) {
	var s AnchorState
	for n := range uint64(2) {
		slot := b[n*slotSize : (n+1)*slotSize]
		r, err := parseSlot(n, slot)
		switch {
		case errors.Is(err, ErrAnchor):
			return s, fmt.Errorf("read anchor: %w", err)
		case err != nil && n == 1 && bytes.Equal(slot, make([]byte, slotSize)) && s.Record.Sequence == 0 && len(s.Damaged) == 0:
			// A new file: CreateAnchor leaves slot 1 empty.
		case err != nil:
			s.Damaged = append(s.Damaged, int(n))
		case r.Sequence > s.Record.Sequence:
			s.Record = r
		}
	}
	return s, nil
}

// Verify checks a record against the log that it should be of: its key, its
// signature and the origin in its note. Of an accepted loss, which has no
// signature, the note's text is checked. Errors: ErrMismatch.
func (r Record) Verify(pub *ecdsa.PublicKey, format Format) error {
	spki, err := hsm.SPKIHash(pub)
	if err != nil {
		return err
	}
	if r.SPKI != spki {
		return fmt.Errorf("head key has SPKI %x…, the anchor %x…: %w", spki[:8], r.SPKI[:8], ErrMismatch)
	}
	if r.Loss {
		text, err := unsigned(r.Head, format)
		if err == nil && !bytes.Equal(text, r.Note) {
			err = fmt.Errorf("origin of the accepted tree: %w", ErrMismatch)
		}
		return err
	}
	msg, err := format.Message(r.Head)
	if err != nil {
		return fmt.Errorf("encode anchored head: %w", err)
	}
	if digest := sha256.Sum256(msg); !ecdsa.VerifyASN1(pub, digest[:], r.Signature) {
		return fmt.Errorf("signature of the anchored head: %w", ErrMismatch)
	}
	note, err := format.Note(r.Head, r.Signature)
	if err != nil {
		return fmt.Errorf("encode anchored note: %w", err)
	}
	if !bytes.Equal(noteText(note), noteText(r.Note)) {
		return fmt.Errorf("origin of the anchored head: %w", ErrMismatch)
	}
	return nil
}

// unsigned returns the text of the note that a head would get.
func unsigned(h Head, format Format) ([]byte, error) {
	note, err := format.Note(h, []byte{0})
	if err != nil {
		return nil, fmt.Errorf("encode note: %w", err)
	}
	return noteText(note), nil
}

// Loss is what an operator accepts: that the log goes on from this tree, not
// from the one that the anchor names.
type Loss struct {
	// Key is the head key's public half and Format the kind of log. An anchor
	// of others is refused.
	Key    *ecdsa.PublicKey
	Format Format
	// Size and Root are of the tree that is there.
	Size uint64
	Root tree.Hash
	// Epoch is the value of the log's hardware counter now, 0 if it has none.
	Epoch uint64
	// Time is now; the record gets the anchored head's if that is later.
	Time time.Time
	// Report is called with the record that is replaced, and its octets, under
	// the anchor's lock and before anything is written. It makes them durable
	// (an incident file); when it fails nothing is written. lost says that the
	// anchor was missing or damaged: then there is no old record, and raw is
	// the damaged file, nil if it is missing.
	Report func(old, replacement Record, raw []byte, lost bool) error
}

// AcceptLoss replaces the anchored head by one that nobody signed: the tree
// that is there. The record is bound to the octets of the one it replaces
// (Record.Replaced), so that a copy of those shows later what was given up.
// The next Publisher signs that tree, and only a continuation of it.
//
// It breaks the promise of this package, knowingly: whoever saw a lost head
// can show two contradicting ones. It is never done without an operator. The
// caller has compared the tree with the anchor. The process that owns the
// anchor must have ended. Errors: ErrAnchor (in use), ErrMismatch.
func AcceptLoss(path string, l Loss) (Record, error) {
	rec, err := acceptLoss(path, l)
	if err != nil {
		return Record{}, fmt.Errorf("accept loss: %w", err)
	}
	return rec, nil
}

func acceptLoss(path string, l Loss) (Record, error) {
	spki, err := hsm.SPKIHash(l.Key)
	if err != nil {
		return Record{}, err
	}
	next := Record{Sequence: 1, Epoch: l.Epoch, SPKI: spki, Loss: true}
	next.Head = Head{Size: l.Size, Root: l.Root, Time: l.Time.UTC().Truncate(time.Millisecond)}
	raw, err := os.ReadFile(filepath.Clean(path))
	if errors.Is(err, fs.ErrNotExist) {
		if next.Note, err = unsigned(next.Head, l.Format); err != nil {
			return Record{}, err
		}
		if err := l.Report(Record{}, next, nil, true); err != nil {
			return Record{}, err
		}
		if err := CreateAnchor(path); err != nil {
			return Record{}, err
		}
	} else if err != nil {
		return Record{}, fmt.Errorf("%w: %w", err, ErrAnchor)
	}
	a, err := lockAnchor(path)
	if err != nil {
		return Record{}, err
	}
	defer func() { _ = a.Close() }()
	if raw == nil {
		return next, a.Store(next)
	}
	return a.replace(next, l)
}

// replace stores next in the place of what the locked file holds.
func (a *FileAnchor) replace(next Record, l Loss) (Record, error) {
	raw := make([]byte, 2*slotSize+1)
	n, err := a.f.ReadAt(raw, 0)
	if n == len(raw) || err == nil {
		return Record{}, fmt.Errorf("anchor is larger than %d octets: %w", 2*slotSize, ErrAnchor)
	}
	raw = raw[:n]
	var state AnchorState
	lost := n != 2*slotSize
	if !lost {
		if state, err = parseAnchor(raw); err != nil {
			return Record{}, err
		}
		lost = len(state.Damaged) == 2
	}
	old := state.Record
	if lost {
		next.Replaced = sha256.Sum256(raw)
	} else {
		if old.Sequence > 0 {
			if err := old.Verify(l.Key, l.Format); err != nil {
				return Record{}, err
			}
		}
		slot, err := old.marshal()
		if err != nil {
			return Record{}, err
		}
		next.Sequence, next.Replaced = old.Sequence+1, sha256.Sum256(slot)
		if old.Time.After(next.Time) {
			next.Time = old.Time
		}
	}
	if next.Note, err = unsigned(next.Head, l.Format); err != nil {
		return Record{}, err
	}
	if err := l.Report(old, next, raw, lost); err != nil {
		return Record{}, err
	}
	if lost {
		return next, a.rewrite(next)
	}
	return next, a.Store(next)
}

// EpochChange is what an operator accepts: that the anchor, as it is, belongs
// to this value of the hardware counter.
type EpochChange struct {
	// Key and Format are as in Loss.
	Key    *ecdsa.PublicKey
	Format Format
	// Epoch is the counter's value now, 0 to give the counter up.
	Epoch uint64
	// Report is as in Loss; raw is the whole file.
	Report func(old, replacement Record, raw []byte) error
}

// AcceptEpoch binds an anchor to the present value of a hardware counter, or to
// none: when a counter is taken into use or given up, or was replaced, or an
// old anchor is all that is left. The anchored head stays as it is. The next
// Publisher begins a new epoch, and logs the act as an error.
//
// It breaks the promise of the counter, knowingly: the operator vouches that
// the anchor is the newest. The process that owns the anchor must have ended.
// Errors: ErrAnchor (missing, damaged, in use), ErrMismatch.
func AcceptEpoch(path string, c EpochChange) (Record, error) {
	rec, err := acceptEpoch(path, c)
	if err != nil {
		return Record{}, fmt.Errorf("accept epoch: %w", err)
	}
	return rec, nil
}

func acceptEpoch(path string, c EpochChange) (Record, error) {
	a, err := OpenAnchor(path)
	if err != nil {
		return Record{}, err
	}
	defer func() { _ = a.Close() }()
	raw := make([]byte, 2*slotSize)
	if _, err := a.f.ReadAt(raw, 0); err != nil {
		return Record{}, fmt.Errorf("read anchor: %w: %w", err, ErrAnchor)
	}
	old, ok, err := a.Load()
	if err != nil {
		return Record{}, err
	}
	next := old
	next.Epoch, next.Start = c.Epoch, EpochStart{}
	if ok {
		if err := old.Verify(c.Key, c.Format); err != nil {
			return Record{}, err
		}
		next.Sequence++
	}
	if err := c.Report(old, next, raw); err != nil {
		return Record{}, err
	}
	return next, a.Store(next)
}

// rewrite makes a file with nothing valid in it a whole one again, with rec in
// its slot.
func (a *FileAnchor) rewrite(rec Record) error {
	if err := a.f.Truncate(2 * slotSize); err != nil {
		return fmt.Errorf("write anchor: %w", err)
	}
	if err := unix.Fdatasync(int(a.f.Fd())); err != nil {
		return fmt.Errorf("sync anchor: %w", err)
	}
	return a.Store(rec)
}
