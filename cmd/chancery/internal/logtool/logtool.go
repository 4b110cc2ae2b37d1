// Package logtool is what an operator does with the files of a log: look,
// verify, export, back up, restore, and accept a loss.
//
// It promises that whatever it only reads is not changed, and that nothing is
// overwritten: every output is a new folder that is whole or not there. It
// needs no secret: heads are checked with the public keys of the trust folder,
// each of which must be the one that keys.yaml names. All but Restore and
// AcceptLoss work beside a running service; those two need it stopped.
//
// A shard that has a successor is a log like the others, but that nothing signs
// for it any more: its key and its URL are in the trusted root alone, and the
// anchored head is the last. Leaves that it does not cover are not the log's.
//
// What is read is proven before it is used: a leaf hash is computed from the
// leaf's octets, a tile from the tiles below it, the root from the tiles, and
// the root must be that of the head that the anchor holds, signed by the log's
// key. The anchor is always read before the tree: a tree only grows, so it
// covers every head that was anchored before.
//
// It trusts the anchor, as log/head does, and the trust folder.
package logtool

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/service"
	"github.com/chancery-ca/chancery/config"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/ct"
	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/rekor"
	"github.com/chancery-ca/chancery/log/store"
	"github.com/chancery-ca/chancery/log/tree"
)

// Errors that callers branch on.
var (
	// ErrNoLog: the configuration names no such log.
	ErrNoLog = errors.New("no such log")
	// ErrNotProven: the log's tree is not proven to continue its anchored head.
	ErrNotProven = errors.New("log is not proven consistent with its anchor")
	// ErrDamaged: something that is stored does not fit what it must fit.
	ErrDamaged = errors.New("log data damaged")
	// ErrRunning: the service must be stopped for this.
	ErrRunning = errors.New("service is running")
	// ErrFrozen: what is there of a frozen log is not what its last head says.
	// Nothing mends it but the newest files: no head is signed any more.
	ErrFrozen = errors.New("frozen log does not end with its last head")
	// ErrNothingLost: the log continues its anchor; there is no loss to accept.
	ErrNothingLost = errors.New("nothing is lost")
	// ErrCounter: the hardware counter of the log was not opened.
	ErrCounter = errors.New("hardware counter not opened")
	// ErrBackup: the folder is no whole backup of these logs.
	ErrBackup = errors.New("not a backup of these logs")
)

// Log is one log of the configuration or of the trusted root, from outside.
type Log struct {
	service.LogPlace
	Public *ecdsa.PublicKey
	// Frozen says that the log has a successor. Its Origin and Format are then
	// empty: they are those of the anchored head.
	Frozen bool
	Format head.Format
	// Hardware is the open counter that the anchor is bound to. While it is nil
	// and LogPlace.Counter is not, the anchor's epoch is shown and not compared
	// with it.
	Hardware head.Counter

	// checkEnd holds the anchored head of a frozen log against the one on record.
	checkEnd func(head.Head) error
}

// Find returns the configured logs and after them the frozen ones, or the one
// with the name. Errors: ErrNoLog.
func Find(cfg *config.Config, name string) ([]Log, error) {
	ring, err := trust.LoadKeyRing(filepath.Join(cfg.Trust, "keys.yaml"))
	if err != nil {
		return nil, err
	}
	var logs []Log
	current := map[hsm.Role]crypto.PublicKey{}
	for _, place := range service.LogPlaces(cfg) {
		l := Log{LogPlace: place}
		if l.Public, err = publicKey(filepath.Join(cfg.Trust, string(place.Role)+".pub"), ring.Keys[place.Role].SPKI); err != nil {
			return nil, fmt.Errorf("public key of log %s: %w", place.Name, err)
		}
		if l.Format, err = l.newFormat(place.Origin); err != nil {
			return nil, fmt.Errorf("log %s: %w", place.Name, err)
		}
		logs, current[place.Role] = append(logs, l), l.Public
	}
	frozen, err := service.FrozenLogs(cfg, current)
	if err != nil {
		return nil, err
	}
	for _, l := range frozen {
		logs = append(logs, Log{LogPlace: l.LogPlace, Public: l.Key, Frozen: true, checkEnd: l.CheckEnd})
	}
	if name == "" {
		return logs, nil
	}
	all := names(logs)
	if logs = slices.DeleteFunc(logs, func(l Log) bool { return l.Name != name }); len(logs) == 0 {
		return nil, fmt.Errorf("%w: %q; there are %q", ErrNoLog, name, all)
	}
	return logs, nil
}

// newFormat is how a log of this kind and key writes the heads of an origin.
func (l Log) newFormat(origin string) (head.Format, error) {
	if l.Role == hsm.RoleRekor {
		return rekor.NewFormat(origin, l.Public)
	}
	return ct.NewFormat(origin, l.Public)
}

// verifyHead verifies the anchored head with the log's key.
func (l Log) verifyHead(rec head.Record) error {
	if l.Frozen {
		var err error
		if l.Format, err = l.newFormat(rec.Origin()); err != nil {
			return fmt.Errorf("origin of the anchored head: %w", err)
		}
	}
	return rec.Verify(l.Public, l.Format)
}

// publicKey reads a P-256 key in PEM and holds it against keys.yaml.
func publicKey(path string, want [32]byte) (*ecdsa.PublicKey, error) {
	data, err := os.ReadFile(filepath.Clean(path))
	if err != nil {
		return nil, err
	}
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "PUBLIC KEY" || len(rest) > 0 {
		return nil, fmt.Errorf("read %s: not one PEM public key", path)
	}
	parsed, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	pub, ok := parsed.(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("read %s: not an ECDSA key", path)
	}
	if spki, err := hsm.SPKIHash(pub); err != nil || spki != want {
		return nil, fmt.Errorf("read %s: %x…, keys.yaml has %x…: %w", path, spki[:8], want[:8], hsm.ErrMismatch)
	}
	return pub, nil
}

// files is the open data directory of some logs.
type files struct {
	*store.Reader
	ids map[string]int64 // by name of the tree
}

func openFiles(dir string) (*files, error) {
	r, err := store.OpenReader(dir, store.Options{})
	if err != nil {
		return nil, named(err)
	}
	f := &files{r, map[string]int64{}}
	for _, t := range r.Trees() {
		if !t.Deleted {
			f.ids[t.DisplayName] = t.TreeId
		}
	}
	return f, nil
}

// named gives the storage's word for damage ours.
func named(err error) error {
	if errors.Is(err, store.ErrCorrupt) || errors.Is(err, store.ErrSchema) {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return err
}

// root is the newest root of a log's tree.
func (f *files) root(ctx context.Context, name string) (id int64, root tree.Root, err error) {
	id, ok := f.ids[name]
	if !ok {
		return 0, root, fmt.Errorf("log %s: %w in the database: %w", name, ErrNoLog, fs.ErrNotExist)
	}
	r, err := f.Root(ctx, id)
	if err != nil {
		return 0, root, named(err)
	}
	if len(r.RootHash) != tree.HashSize {
		return 0, root, fmt.Errorf("root hash of %d octets: %w", len(r.RootHash), ErrDamaged)
	}
	return id, tree.Root{Size: r.TreeSize, Hash: tree.Hash(r.RootHash), Time: time.Unix(0, int64(r.TimestampNanos)).UTC()}, nil
}

// State is how a tree stands to its anchor.
type State string

const (
	// Consistent: the tree continues the anchored head.
	Consistent State = "consistent"
	// Accepted: an operator accepted a loss; the next start signs this tree.
	Accepted State = "loss accepted"
	// Latched: it does not, or the anchor is gone. The service runs the log
	// read-only.
	Latched State = "read-only"
	// Foreign: the anchor is of another key or origin. The service does not
	// start.
	Foreign State = "foreign anchor"
	// Frozen: the log has a successor, and ends with its last head.
	Frozen State = "frozen"
	// Unproven: it has a successor, and does not end with its last head.
	Unproven State = "frozen, not proven"
	// Absent: it has a successor, and nothing of it is in the state folder. It is
	// somebody else's to serve.
	Absent State = "frozen, not here"
)

// Status is what is known of a log without reading its leaves.
type Status struct {
	Name   string `json:"name"`
	Origin string `json:"origin"`
	State  State  `json:"state"`
	// Reason says why the state is not Consistent, or what is wrong beside it.
	Reason string `json:"reason,omitempty"`
	// Tree is the newest durable root, which is not signed.
	Tree Point `json:"tree"`
	// Head is the anchored head; nil if there is none.
	Head *Point `json:"head,omitempty"`
	// AnchorSequence counts the heads and accepted losses since the beginning.
	AnchorSequence uint64 `json:"anchorSequence"`
	// DamagedSlots are the anchor's slots that are not valid, 0 or 1.
	DamagedSlots []int `json:"damagedSlots,omitempty"`
	// Pending are leaves that no head covers yet.
	Pending uint64 `json:"pending"`
	// Bound says that the configuration binds the anchor to a hardware counter,
	// Epoch is the number in the anchor (0: bound to none), and Counter the
	// counter's value, nil if it was not read.
	Bound   bool    `json:"bound"`
	Epoch   uint64  `json:"epoch"`
	Counter *uint64 `json:"counter,omitempty"`

	anchor head.AnchorState
	id     int64
	// epochOnly: the tree continues the anchored head; the epoch alone is why
	// the log is read-only.
	epochOnly bool
}

// Point is a tree at one size.
type Point struct {
	Size uint64    `json:"size"`
	Root hexHash   `json:"root"`
	Time time.Time `json:"time"`
}

type hexHash tree.Hash

// MarshalText implements encoding.TextMarshaler: lower-case hexadecimal.
func (h hexHash) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, h[:]), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *hexHash) UnmarshalText(b []byte) error {
	if len(b) != 2*tree.HashSize {
		return fmt.Errorf("hash of %d digits, want %d", len(b), 2*tree.HashSize)
	}
	_, err := hex.Decode(h[:], b)
	return err
}

// String returns the hash in hexadecimal.
func (h hexHash) String() string { return hex.EncodeToString(h[:]) }

// Check compares a log's tree with its anchor, as the service does at start.
func (l Log) Check(ctx context.Context) (*Status, error) {
	s, err := l.checkOnce(ctx)
	if err == nil && s.epochOnly {
		// A running service may have begun an epoch since the anchor was read.
		return l.checkOnce(ctx)
	}
	return s, err
}

func (l Log) checkOnce(ctx context.Context) (*Status, error) {
	anchor, anchorErr := head.ReadAnchor(l.Anchor) // before the tree
	f, err := openFiles(l.Dir)
	if err != nil {
		return nil, fmt.Errorf("log %s: %w", l.Name, err)
	}
	s, err := l.check(ctx, f, anchor, anchorErr)
	if err != nil {
		err = fmt.Errorf("log %s: %w", l.Name, err)
	}
	return s, errors.Join(err, f.Close())
}

func (l Log) check(ctx context.Context, f *files, anchor head.AnchorState, anchorErr error) (*Status, error) {
	id, root, err := f.root(ctx, l.Name)
	if l.Frozen && errors.Is(err, fs.ErrNotExist) {
		return l.without(errors.Is(err, ErrNoLog) && errors.Is(anchorErr, fs.ErrNotExist)), nil
	}
	if err != nil {
		return nil, err
	}
	rec := anchor.Record
	if l.Frozen {
		l.Origin = rec.Origin()
	}
	s := &Status{
		Name: l.Name, Origin: l.Origin, Tree: Point{root.Size, hexHash(root.Hash), root.Time},
		AnchorSequence: rec.Sequence, DamagedSlots: anchor.Damaged, anchor: anchor, id: id,
	}
	if rec.Sequence > 0 {
		s.Head = &Point{rec.Size, hexHash(rec.Root), rec.Time}
		s.Pending = root.Size - min(root.Size, rec.Size)
	}
	s.State, s.Reason, err = l.compare(ctx, f, s, anchorErr)
	if err != nil {
		return nil, err
	}
	if l.Frozen {
		s.Epoch = rec.Epoch
		s.end(l.checkEnd)
		return s, nil
	}
	return s, l.checkEpoch(ctx, s, anchorErr)
}

// without is the status of a frozen log that has no tree here, and that never had
// one or was moved away, or lost it.
func (l Log) without(absent bool) *Status {
	if absent {
		return &Status{Name: l.Name, State: Absent, Reason: "neither its tree nor its anchor is in the state folder"}
	}
	return &Status{Name: l.Name, State: Unproven, Reason: "its tree is missing in the state folder"}
}

// end turns the state of a log that could go on into that of a frozen one. Of
// the slots of an anchor that is not written again one is enough. onRecord holds
// the anchored head against the one on record.
func (s *Status) end(onRecord func(head.Head) error) {
	var err error
	if s.State == Consistent && s.Head != nil {
		err = onRecord(s.anchor.Record.Head)
	}
	switch {
	case s.State == Accepted:
		s.Reason = "an operator accepted a loss, and no head was signed after it"
	case s.State != Consistent:
	case s.Head == nil:
		s.Reason = "the anchor holds no head"
	case s.Pending > 0:
		s.Reason = fmt.Sprintf("%d leaves after the last head: nobody signed for them", s.Pending)
	case err != nil:
		s.Reason = err.Error()
	case len(s.DamagedSlots) > 0:
		s.State, s.Reason = Frozen, fmt.Sprintf("slot %d of the anchor is damaged", s.DamagedSlots[0])
		return
	default:
		s.State = Frozen
		return
	}
	s.State = Unproven
}

// Err is what is wrong with a log that would not sign, or that is frozen and
// does not end with its last head: ErrNotProven, ErrFrozen. Else it is nil.
func (s *Status) Err() error {
	switch s.State {
	case Latched, Foreign:
		return fmt.Errorf("%s: %w", s.Reason, ErrNotProven)
	case Unproven:
		return fmt.Errorf("%s: %w", s.Reason, ErrFrozen)
	}
	return nil
}

// checkEpoch holds the epoch of a readable anchor against the configuration and,
// if it is open, the counter. A tree that continues its anchor is read-only all
// the same if the anchor is not of the counter's epoch.
func (l Log) checkEpoch(ctx context.Context, s *Status, anchorErr error) error {
	s.Bound = l.Counter != nil
	if l.Hardware != nil {
		value, err := l.Hardware.Value(ctx)
		if err != nil {
			return fmt.Errorf("read counter: %w", err)
		}
		s.Counter = &value
	}
	if anchorErr != nil {
		return nil
	}
	rec := s.anchor.Record
	s.Epoch = rec.Epoch
	if s.State != Consistent && s.State != Accepted {
		return nil
	}
	var err error
	switch {
	case l.Hardware != nil || !s.Bound:
		_, err = rec.CheckEpoch(ctx, l.Hardware, l.Public)
	case rec.Epoch == 0:
		err = fmt.Errorf("a hardware counter is configured but the anchor is not bound to it: %w", head.ErrEpoch)
	}
	if errors.Is(err, head.ErrEpoch) {
		s.State, s.Reason, s.epochOnly = Latched, err.Error(), true
		return nil
	}
	return err
}

func (l Log) compare(ctx context.Context, f *files, s *Status, anchorErr error) (State, string, error) {
	rec := s.anchor.Record
	switch {
	case errors.Is(anchorErr, fs.ErrNotExist):
		return Latched, "the anchor is missing: " + l.Anchor, nil
	case errors.Is(anchorErr, head.ErrDamaged):
		return Latched, "the anchor is damaged: " + l.Anchor, nil
	case anchorErr != nil:
		return "", "", anchorErr
	case rec.Sequence == 0 && s.Tree.Size > 0:
		return Latched, fmt.Sprintf("the anchor holds no head, the tree %d leaves", s.Tree.Size), nil
	case rec.Sequence == 0:
		return Consistent, "", nil
	}
	if err := l.verifyHead(rec); err != nil {
		return Foreign, err.Error(), nil
	}
	if s.Tree.Size < rec.Size {
		return Latched, fmt.Sprintf("the tree is %d leaves behind its anchored head", rec.Size-s.Tree.Size), nil
	}
	root, err := f.rootAt(ctx, s.id, rec.Size)
	if err != nil {
		return "", "", err
	}
	switch {
	case root != rec.Root:
		return Latched, fmt.Sprintf("the first %d leaves of the tree are not those of the anchored head", rec.Size), nil
	case rec.Loss:
		return Accepted, "an operator accepted a loss; the next start signs this tree", nil
	case len(s.anchor.Damaged) > 0:
		return Consistent, fmt.Sprintf("slot %d of the anchor is damaged; the next head writes it anew", s.anchor.Damaged[0]), nil
	}
	return Consistent, "", nil
}

// Progress is told how a long task goes.
type Progress interface {
	// Begin starts a task of total leaves; done is called at its end.
	Begin(task string, total uint64) (add func(leaves int), done func())
}

// names returns the logs' names, sorted.
func names(logs []Log) []string {
	var list []string
	for _, l := range logs {
		list = append(list, l.Name)
	}
	slices.Sort(list)
	return list
}
