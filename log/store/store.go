// Package store is a durable storage driver for Trillian on SQLite, in
// process, for logs that must not lose what they acknowledged.
//
// A data directory holds one small file for the list of trees (admin.db) and
// one SQLite file for each tree (tree-ID.db), so that a burst in one tree
// never delays another. One process owns the directory; a second is refused.
//
// # What is promised
//
// A ReadWriteTransaction of a tree is one SQLite transaction with
// synchronous=FULL in WAL mode: its leaves, hashes and root become durable
// together, with one fsync, or not at all. A stored hash or entry never
// changes: only appending is possible, and rewriting one with other octets is
// refused with ErrCorrupt. Reads never wait for the writer; each sees one
// committed state for at most one second (ErrSnapshotExpired after that).
//
// The queue of a LOG tree is in memory, bounded (ErrQueueFull) and NOT durable:
// QueueLeaves only makes a leaf a candidate, and a leaf that was queued but
// not integrated is gone after a restart. Whoever promises something about a
// leaf waits until it is integrated, as log/tree does. Leaves of a
// PREORDERED_LOG tree are durable when AddSequencedLeaves returns.
//
// # Layout of a tree file
//
// Hashes are kept as the raw octets of C2SP tlog-tiles, cut into runs of 64
// hashes: a tile is four runs, the seven runs that fit a page of 16 KiB waste
// little, and a full run is written once. Only the last, partial run of each
// level is rewritten, in the table "tip", beside the root: a batch touches
// one page there. Level −1 holds the identity hashes from the first leaf on
// whose identity is not its leaf hash. Inner nodes of a tile are recomputed
// when they are read.
//
// An entry is one row keyed by its index. Hashes are looked up in
// generations of 2^18 leaves: the newest is a map in memory, rebuilt from the
// runs at start; a full one is written once, sorted, with a filter that stays
// in memory. Nothing is inserted at random positions of a large tree, so the
// cost of a leaf does not grow with the log.
//
// Every row carries a CRC-32C of its key and octets. It finds rot, not
// malice: an attacker who can write the files can recompute it. Against that
// log/tree recomputes leaf hashes and log/head compares roots with its anchor.
//
// # What is trusted
//
// The file system: what fsync acknowledged is there after a power cut. After
// any write error whose outcome is unknown the tree refuses to write
// (ErrFailed) until it is opened again.
package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/gofrs/flock"
	"github.com/google/trillian"
	"github.com/google/trillian/storage"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Errors that callers branch on.
var (
	// ErrLocked: another process has the data directory open.
	ErrLocked = errors.New("data directory is in use by another process")
	// ErrSchema: a file was written by a newer version, or is not ours.
	ErrSchema = errors.New("unknown database schema")
	// ErrCorrupt: stored octets contradict themselves or what is written.
	ErrCorrupt = errors.New("log database is corrupt")
	// ErrFailed: an earlier write had an unknown outcome. Open the store again.
	ErrFailed = errors.New("log database stopped after a write error")
	// ErrSnapshotExpired: a reader kept its snapshot longer than allowed.
	ErrSnapshotExpired = errors.New("snapshot expired")
	// ErrClosed: the store is closed.
	ErrClosed = errors.New("log database closed")
	// ErrNotFound: the tree does not fill the tile that was asked for.
	ErrNotFound = errors.New("not in the log database")
	// ErrQueueFull: the in-memory queue of the tree is full; nothing of the
	// call was queued. It is a gRPC status (ResourceExhausted), so that
	// errors.Is holds through a Trillian log server in this process.
	ErrQueueFull = status.Error(codes.ResourceExhausted, "log queue full")
)

// Defaults and limits of Options.
const (
	defaultQueueLeaves = 16384
	defaultQueueBytes  = 64 << 20
	defaultReaders     = 8
	defaultWALLimit    = 64 << 20
	defaultSnapshot    = time.Second
)

// Options tune a Store. The zero value is the recommended one.
type Options struct {
	// QueueLeaves bounds the leaves of one tree that wait or are in flight
	// (default 16,384), QueueBytes their octets (default 64 MiB).
	QueueLeaves int
	QueueBytes  int64
	// Readers is the number of read connections for each tree (default 8).
	Readers int
	// WALLimit is the size in octets of a tree's write-ahead log from which
	// on a checkpoint holds the writer back until the log can start over
	// (default 64 MiB). Below it checkpoints never touch the commit path.
	WALLimit int64
	// Snapshot bounds how long a reader may hold one state (default and
	// maximum 1 s).
	Snapshot time.Duration
	// Now is the clock for the times of trees (default time.Now). Roots and
	// leaves carry the times that Trillian gives them.
	Now func() time.Time
	// Logger receives what an operator should know (default: discarded).
	Logger *slog.Logger
}

func (o Options) withDefaults() Options {
	if o.QueueLeaves <= 0 {
		o.QueueLeaves = defaultQueueLeaves
	}
	if o.QueueBytes <= 0 {
		o.QueueBytes = defaultQueueBytes
	}
	if o.Readers <= 0 {
		o.Readers = defaultReaders
	}
	if o.WALLimit <= 0 {
		o.WALLimit = defaultWALLimit
	}
	if o.Snapshot <= 0 || o.Snapshot > defaultSnapshot {
		o.Snapshot = defaultSnapshot
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}

// Store is a data directory in use. It implements Trillian's
// storage.LogStorage; Admin gives its storage.AdminStorage (one type cannot
// be both: they share a method name). It is safe for concurrent use.
type Store struct {
	dir   string
	opts  Options
	lock  *flock.Flock
	admin *admin

	mu     sync.RWMutex
	trees  map[int64]*logTree // guarded by mu
	closed bool               // guarded by mu
}

var _ storage.LogStorage = (*Store)(nil)

// Open takes the data directory, which must exist (0700 is recommended), and
// opens every tree in it. An empty directory becomes a store without trees;
// trees are created explicitly through Admin. Errors: ErrLocked, ErrSchema,
// ErrCorrupt.
func Open(dir string, opts Options) (*Store, error) {
	// SQLite says of a read-only file system that a file is missing.
	if err := unix.Access(dir, unix.W_OK); err != nil {
		return nil, fmt.Errorf("write to data directory %s: %w", dir, err)
	}
	lock := flock.New(filepath.Join(dir, "LOCK"), flock.SetPermissions(0o600))
	held, err := lock.TryLock()
	if err != nil {
		return nil, fmt.Errorf("lock data directory: %w", err)
	}
	if !held {
		return nil, fmt.Errorf("lock %s: %w", dir, ErrLocked)
	}
	s := &Store{dir: dir, opts: opts.withDefaults(), lock: lock, trees: make(map[int64]*logTree)}
	if err := s.openFiles(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *Store) openFiles() error {
	var err error
	if s.admin, err = openAdmin(s); err != nil {
		return fmt.Errorf("open list of trees: %w", err)
	}
	for id := range s.admin.current() {
		t, err := openTree(s.treePath(id), id, s.opts)
		if err != nil {
			return fmt.Errorf("open tree %d: %w", id, err)
		}
		s.trees[id] = t
	}
	return nil
}

func (s *Store) treePath(id int64) string {
	return filepath.Join(s.dir, fmt.Sprintf("tree-%d.db", id))
}

// Close ends all snapshots, waits for the transaction under way in each tree,
// and releases the directory. Queued leaves are dropped. Closing twice is
// harmless.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	trees := s.trees
	s.trees = nil
	s.mu.Unlock()

	var errs []error
	for _, t := range trees {
		errs = append(errs, t.close())
	}
	if s.admin != nil {
		errs = append(errs, s.admin.close())
	}
	errs = append(errs, s.lock.Unlock())
	return errors.Join(errs...)
}

// Admin returns the store's list of trees.
func (s *Store) Admin() storage.AdminStorage { return s.admin }

// tree returns the open tree, or a NotFound status.
func (s *Store) tree(id int64) (*logTree, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return nil, ErrClosed
	}
	t, ok := s.trees[id]
	if !ok {
		return nil, status.Errorf(codes.NotFound, "tree %d not found", id)
	}
	return t, nil
}

// ReadTile returns the first width hashes (1 to 256) of tile index at level
// (C2SP tlog-tiles: level 0 holds leaf hashes), 32 × width octets that belong
// to the caller. It sees the newest committed root. ErrNotFound when the tree
// of that root does not fill them.
func (s *Store) ReadTile(ctx context.Context, treeID int64, level, index uint64, width int) ([]byte, error) {
	t, err := s.tree(treeID)
	if err != nil {
		return nil, err
	}
	return t.readTile(ctx, level, index, width)
}

// LeafByIdentity returns the integrated leaf with an identity hash, or nil if
// there is none; that it is absent is mostly known without I/O.
func (s *Store) LeafByIdentity(ctx context.Context, treeID int64, identity []byte) (*trillian.LogLeaf, error) {
	if len(identity) != hashSize {
		return nil, status.Errorf(codes.InvalidArgument, "identity hash of %d octets", len(identity))
	}
	t, err := s.tree(treeID)
	if err != nil {
		return nil, err
	}
	if !t.maybeStored(identity) {
		return nil, nil
	}
	var leaf *trillian.LogLeaf
	err = t.read(ctx, func(s *snapshot) (err error) {
		leaf, err = s.leafByIdentity(ctx, identity)
		return err
	})
	return leaf, err
}

// CheckDatabaseAccessible returns nil unless the store is closed or a tree has
// stopped after a write error.
func (s *Store) CheckDatabaseAccessible(context.Context) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return ErrClosed
	}
	for id, t := range s.trees {
		if err := t.failed(); err != nil {
			return fmt.Errorf("tree %d: %w", id, err)
		}
	}
	return nil
}

// GetActiveLogIDs returns the trees that are ACTIVE or DRAINING.
func (s *Store) GetActiveLogIDs(context.Context) ([]int64, error) {
	ids := []int64{}
	for id, t := range s.admin.current() {
		active := t.TreeState == trillian.TreeState_ACTIVE || t.TreeState == trillian.TreeState_DRAINING
		if active && !t.Deleted {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// SnapshotForTree opens a read transaction on the newest committed state. It
// waits, bounded by ctx, for a read connection, never for the writer. For a
// tree without a root it returns a transaction to be closed and
// storage.ErrTreeNeedsInit.
func (s *Store) SnapshotForTree(ctx context.Context, tree *trillian.Tree) (storage.ReadOnlyLogTreeTX, error) {
	t, err := s.tree(tree.GetTreeId())
	if err != nil {
		return nil, err
	}
	snap, err := t.snapshot(ctx)
	if err != nil {
		return nil, err
	}
	snap.preordered = tree.TreeType == trillian.TreeType_PREORDERED_LOG
	if snap.tip.root == nil {
		return snap, storage.ErrTreeNeedsInit
	}
	return snap, nil
}

// ReadWriteTransaction runs f with the tree's one writer; a second waits,
// bounded by ctx. Writes are kept in memory and stored when f returns nil.
// Reads within f see the state from before it.
func (s *Store) ReadWriteTransaction(ctx context.Context, tree *trillian.Tree, f storage.LogTXFunc) error {
	t, err := s.tree(tree.GetTreeId())
	if err != nil {
		return err
	}
	tx, err := t.begin(ctx, tree.TreeType == trillian.TreeType_PREORDERED_LOG)
	if err != nil {
		return err
	}
	defer tx.rollback()
	if err := f(ctx, tx); err != nil {
		return err
	}
	return tx.Commit(ctx)
}

// QueueLeaves holds leaves in memory until a transaction dequeues them; they
// are not durable before that transaction commits. A leaf whose identity is in
// the tree, in flight or queued is answered AlreadyExists with the original
// leaf; while that one is not integrated its IntegrateTimestamp is nil. The
// octets of the leaves must not be changed afterwards. Errors: ErrQueueFull,
// InvalidArgument for hashes that are not 32 octets.
func (s *Store) QueueLeaves(ctx context.Context, tree *trillian.Tree, leaves []*trillian.LogLeaf, queued time.Time) ([]*trillian.QueuedLogLeaf, error) {
	t, err := s.tree(tree.GetTreeId())
	if err != nil {
		return nil, err
	}
	if tree.TreeType == trillian.TreeType_PREORDERED_LOG {
		return nil, status.Error(codes.FailedPrecondition, "a PREORDERED_LOG has no queue")
	}
	return t.queueLeaves(ctx, leaves, queued)
}

// AddSequencedLeaves stores leaves of a PREORDERED_LOG at their own indices,
// durably, to be integrated later. Statuses: OK; AlreadyExists for the same
// leaf at its index; FailedPrecondition for another leaf at the index, or the
// identity at another index.
func (s *Store) AddSequencedLeaves(ctx context.Context, tree *trillian.Tree, leaves []*trillian.LogLeaf, at time.Time) ([]*trillian.QueuedLogLeaf, error) {
	t, err := s.tree(tree.GetTreeId())
	if err != nil {
		return nil, err
	}
	return t.addSequenced(ctx, leaves, at)
}

// syncDir makes directory entries durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("open directory: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	return nil
}
