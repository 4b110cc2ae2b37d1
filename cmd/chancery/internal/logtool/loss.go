package logtool

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"time"

	"github.com/chancery-ca/chancery/cmd/chancery/internal/whole"
	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/store"
	"github.com/chancery-ca/chancery/log/tree"
)

// Incident is the record of an accepted loss, for those who ask later: which
// head was given up, and for what.
type Incident struct {
	Version int       `json:"version"`
	Time    time.Time `json:"time"`
	// User is who ran the command, by the operating system.
	User   string `json:"user"`
	Log    string `json:"log"`
	Origin string `json:"origin"`
	// Reason is why the log was read-only.
	Reason string `json:"reason"`
	// Lost is the head that was given up, nil if the anchor was gone;
	// Checkpoint its signed note.
	Lost       *Point `json:"lost,omitempty"`
	Checkpoint string `json:"checkpoint,omitempty"`
	// Accepted is the tree with which the log goes on.
	Accepted Point `json:"accepted"`
	// AnchorSequence and Replaced are those of the new anchor record; Replaced
	// is the SHA-256 of the record in Anchor, or of all of Anchor if that was
	// damaged.
	AnchorSequence uint64  `json:"anchorSequence"`
	Replaced       hexHash `json:"replaced"`
	// Anchor is the anchor file as it was.
	Anchor []byte `json:"anchor,omitempty"`
}

// Lost compares a log that is read-only with its anchor, for AcceptLoss and
// for the operator who decides. It proves that the tree that is there is whole.
// Errors: ErrNothingLost, ErrNotProven for an anchor of another log, ErrFrozen,
// ErrDamaged.
func (l Log) Lost(ctx context.Context, p Progress) (*Status, error) {
	anchor, anchorErr := head.ReadAnchor(l.Anchor)
	f, err := openFiles(l.Dir)
	if err != nil {
		return nil, fmt.Errorf("log %s: %w", l.Name, err)
	}
	s, err := l.check(ctx, f, anchor, anchorErr)
	switch {
	case err != nil:
	case l.Frozen:
		err = fmt.Errorf("no head is signed after an acceptance: %w", ErrFrozen)
	case s.State == Consistent, s.State == Accepted:
		err = fmt.Errorf("%w: the tree of %d leaves continues the anchor", ErrNothingLost, s.Tree.Size)
	case s.State != Latched:
		err = fmt.Errorf("%s: %w", s.Reason, ErrNotProven)
	default:
		err = l.proveTree(ctx, f, s, 0, nil, p)
	}
	if err != nil {
		err = fmt.Errorf("log %s: %w", l.Name, err)
	}
	return s, errors.Join(err, f.Close())
}

// AcceptLoss makes the tree that s describes, from Lost, the one that the log
// goes on with: it writes an incident file beside the anchor, and then the
// anchor. The service must be stopped. It returns the incident file's path.
// Errors: ErrRunning, ErrNotProven when the tree or the anchor has changed
// since Lost, ErrCounter.
//
// The new anchor record is bound to the value of the log's hardware counter, if
// the configuration names one; if nothing but the epoch keeps the log read-only,
// the anchored head stays and its epoch alone is replaced.
func (l Log) AcceptLoss(ctx context.Context, s *Status, now time.Time) (file string, err error) {
	lock, err := store.Open(l.Dir, store.Options{})
	if errors.Is(err, store.ErrLocked) {
		err = fmt.Errorf("%w: %w", ErrRunning, err)
	}
	if err != nil {
		return "", fmt.Errorf("log %s: %w", l.Name, err)
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if l.Counter != nil && l.Hardware == nil {
		return "", fmt.Errorf("log %s: %w", l.Name, ErrCounter)
	}
	again, err := l.Check(ctx)
	if err != nil {
		return "", err
	}
	if again.epochOnly != s.epochOnly || again.Tree.Size != s.Tree.Size || again.Tree.Root != s.Tree.Root || again.AnchorSequence != s.AnchorSequence || again.State != Latched {
		return "", fmt.Errorf("log %s changed meanwhile: %w", l.Name, ErrNotProven)
	}
	report := func(old, next head.Record, raw []byte, lost bool) error {
		file = filepath.Join(filepath.Dir(l.Anchor), fmt.Sprintf("%s-incident-%s-%d.json", l.Name, now.UTC().Format("20060102T150405Z"), next.Sequence))
		return l.report(file, s, old, next, raw, lost)
	}
	if s.epochOnly {
		_, err = head.AcceptEpoch(l.Anchor, head.EpochChange{
			Key: l.Public, Format: l.Format, Epoch: again.epoch(),
			Report: func(old, next head.Record, raw []byte) error { return report(old, next, raw, false) },
		})
	} else {
		_, err = head.AcceptLoss(l.Anchor, head.Loss{
			Key: l.Public, Format: l.Format, Size: s.Tree.Size, Root: tree.Hash(s.Tree.Root), Time: now,
			Epoch: again.epoch(), Report: report,
		})
	}
	if err != nil {
		return "", fmt.Errorf("log %s: %w", l.Name, err)
	}
	return file, nil
}

// EpochOnly says whether the log is read-only because of its epoch alone: the
// tree continues the anchored head, and no leaf is lost.
func (s *Status) EpochOnly() bool { return s.epochOnly }

// epoch is the one to which an acceptance binds the anchor.
func (s *Status) epoch() uint64 {
	if s.Counter == nil {
		return 0
	}
	return *s.Counter
}

// report writes the incident file durably.
func (l Log) report(file string, s *Status, old, next head.Record, raw []byte, lost bool) error {
	i := Incident{
		Version: 1, Time: next.Time, User: userName(), Log: l.Name, Origin: l.Origin, Reason: s.Reason,
		Accepted: Point{next.Size, hexHash(next.Root), s.Tree.Time}, AnchorSequence: next.Sequence,
		Replaced: hexHash(next.Replaced), Anchor: raw,
	}
	if !lost && old.Sequence > 0 {
		i.Lost, i.Checkpoint = &Point{old.Size, hexHash(old.Root), old.Time}, string(old.Note)
	}
	text, err := json.MarshalIndent(i, "", "  ")
	if err != nil {
		return fmt.Errorf("encode incident: %w", err)
	}
	if err := writeFile(file, append(text, '\n'), 0o600); err != nil {
		return err
	}
	return whole.Sync(filepath.Dir(file))
}

func userName() string {
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return fmt.Sprintf("uid %d", os.Getuid())
}
