package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/trillian"
	"github.com/google/trillian/storage"
	stree "github.com/google/trillian/storage/tree"
	"github.com/google/trillian/types"
	"github.com/transparency-dev/merkle/compact"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// logTX collects what one transaction appends to a tree; Commit stores it.
// It is used by one goroutine, which holds the tree's token of writing.
type logTX struct {
	t          *logTree
	old        *tip
	preordered bool
	snap       *snapshot // for reading, opened when needed
	over       bool
	committed  bool

	taken    int              // leaves dequeued, the head of the queue
	inFlight map[hash]*queued // the same by identity
	done     map[hash]bool    // those that were sequenced

	grow     [levels]*growth
	distinct uint64
	records  []byte // of new entries, one after the other
	ends     []int  // where each record ends
	staged   int    // how many of the entries came from staged
	root     []byte
	newSize  uint64
	frontier map[compact.NodeID][]byte
}

var _ storage.LogTreeTX = (*logTX)(nil)

// begin waits for the token of writing. rollback gives it back.
func (t *logTree) begin(ctx context.Context, preordered bool) (*logTX, error) {
	if err := t.acquire(ctx); err != nil {
		return nil, err
	}
	old := t.tip.Load()
	return &logTX{t: t, old: old, distinct: old.distinct, preordered: preordered, records: t.spare[:0]}, nil
}

// maxSpare bounds the octets that a tree keeps for the records of the next
// transaction. A buffer made anew for each one was half of all garbage.
const maxSpare = 4 << 20

// rollback ends the transaction if Commit did not.
func (tx *logTX) rollback() {
	_ = tx.Close()
	if tx.t.spare = tx.records; cap(tx.records) > maxSpare {
		tx.t.spare = nil
	}
	tx.records = nil
	tx.t.release()
}

// Close implements storage.ReadOnlyLogTreeTX: without Commit nothing happened,
// and the leaves that were dequeued are still queued, in order.
func (tx *logTX) Close() error {
	tx.over = true
	if tx.snap != nil {
		return tx.snap.Close()
	}
	return nil
}

var errOver = status.Error(codes.FailedPrecondition, "transaction is over")

// reader returns a snapshot of the state before the transaction. One that
// expired is replaced: only we could have changed the state.
func (tx *logTX) reader(ctx context.Context) (*snapshot, error) {
	if tx.over {
		return nil, errOver
	}
	if tx.snap != nil && tx.snap.use(func() error { return nil }) == nil {
		return tx.snap, nil
	}
	s, err := tx.t.snapshot(ctx)
	if err != nil {
		return nil, err
	}
	s.preordered = tx.preordered
	tx.snap = s
	return s, nil
}

// read runs f with the reader, and again with another one when it expired.
func (tx *logTX) read(ctx context.Context, f func(*snapshot) error) error {
	for n := 1; ; n++ {
		s, err := tx.reader(ctx)
		if err != nil {
			return err
		}
		if err = f(s); !errors.Is(err, ErrSnapshotExpired) || n == maxAttempts {
			return err
		}
	}
}

// GetMerkleNodes implements storage.ReadOnlyLogTreeTX.
func (tx *logTX) GetMerkleNodes(ctx context.Context, ids []compact.NodeID) ([]stree.Node, error) {
	if tx.over {
		return nil, errOver
	}
	nodes := make([]stree.Node, 0, len(ids))
	for _, id := range ids {
		if h, ok := tx.t.frontier[id]; ok {
			nodes = append(nodes, stree.Node{ID: id, Hash: h})
		}
	}
	if len(nodes) == len(ids) {
		return nodes, nil
	}
	err := tx.read(ctx, func(s *snapshot) (err error) {
		nodes, err = s.GetMerkleNodes(ctx, ids)
		return err
	})
	return nodes, err
}

// GetLeavesByRange implements storage.ReadOnlyLogTreeTX.
func (tx *logTX) GetLeavesByRange(ctx context.Context, start, count int64) (leaves []*trillian.LogLeaf, err error) {
	err = tx.read(ctx, func(s *snapshot) (err error) {
		leaves, err = s.GetLeavesByRange(ctx, start, count)
		return err
	})
	return leaves, err
}

// GetLeavesByHash implements storage.ReadOnlyLogTreeTX.
func (tx *logTX) GetLeavesByHash(ctx context.Context, hashes [][]byte, orderBySequence bool) (leaves []*trillian.LogLeaf, err error) {
	err = tx.read(ctx, func(s *snapshot) (err error) {
		leaves, err = s.GetLeavesByHash(ctx, hashes, orderBySequence)
		return err
	})
	return leaves, err
}

// LatestSignedLogRoot implements storage.ReadOnlyLogTreeTX.
func (tx *logTX) LatestSignedLogRoot(context.Context) (*trillian.SignedLogRoot, error) {
	switch {
	case tx.over:
		return nil, errOver
	case tx.root != nil:
		return &trillian.SignedLogRoot{LogRoot: slices.Clone(tx.root)}, nil
	case tx.old.root == nil:
		return nil, storage.ErrTreeNeedsInit
	}
	return &trillian.SignedLogRoot{LogRoot: slices.Clone(tx.old.root)}, nil
}

// DequeueLeaves implements storage.LogTreeTX.
func (tx *logTX) DequeueLeaves(ctx context.Context, limit int, cutoff time.Time) ([]*trillian.LogLeaf, error) {
	if tx.over {
		return nil, errOver
	}
	if tx.preordered {
		return tx.dequeueStaged(ctx, limit, cutoff)
	}
	head := tx.t.queue.head(tx.taken, limit, cutoff)
	leaves := make([]*trillian.LogLeaf, len(head))
	if tx.inFlight == nil {
		tx.inFlight = make(map[hash]*queued, len(head))
		tx.done = make(map[hash]bool, len(head))
	}
	for i, q := range head {
		leaves[i] = q.leaf()
		tx.inFlight[q.identity] = q
	}
	tx.taken += len(head)
	return leaves, nil
}

// dequeueStaged returns the staged leaves that follow the tree.
func (tx *logTX) dequeueStaged(ctx context.Context, limit int, cutoff time.Time) ([]*trillian.LogLeaf, error) {
	if limit <= 0 {
		return nil, nil
	}
	leaves, err := readStaged(ctx, tx.t.writer, tx.old.size, uint64(limit))
	if err != nil {
		return nil, err
	}
	for i, l := range leaves {
		if l.QueueTimestamp.AsTime().After(cutoff) {
			return leaves[:i], nil
		}
	}
	return leaves, nil
}

// level returns the growth of a level.
func (tx *logTX) level(level int) *growth {
	if tx.grow[level+1] == nil {
		e := tx.old.edge(level)
		tx.grow[level+1] = &growth{base: e.count, tail: e.partial}
	}
	return tx.grow[level+1]
}

// setHash appends hash i of a level, or checks that it is stored already.
func (tx *logTX) setHash(ctx context.Context, level int, i uint64, h []byte) error {
	if len(h) != hashSize {
		return status.Errorf(codes.InvalidArgument, "hash of %d octets", len(h))
	}
	g := tx.level(level)
	switch n := g.count(); {
	case i == n:
		g.added = append(g.added, h...)
		return nil
	case i > n:
		return status.Errorf(codes.OutOfRange, "hash %d of level %d does not follow the %d stored", i, level, n)
	}
	stored := g.at(i)
	if stored == nil {
		err := tx.read(ctx, func(s *snapshot) error {
			return s.use(func() error {
				return s.hashes(ctx, level, i, 1, func(h []byte) { stored = h })
			})
		})
		if err != nil {
			return err
		}
	}
	if !bytes.Equal(stored, h) {
		return fmt.Errorf("rewrite hash %d of level %d: %w", i, level, ErrCorrupt)
	}
	return nil
}

// UpdateSequencedLeaves implements storage.LogTreeTX. The leaves must have
// been dequeued by this transaction, and continue the entries of the tree.
func (tx *logTX) UpdateSequencedLeaves(ctx context.Context, leaves []*trillian.LogLeaf) error {
	if tx.over {
		return errOver
	}
	if tx.preordered {
		return status.Error(codes.FailedPrecondition, "leaves of a PREORDERED_LOG are sequenced already")
	}
	for _, l := range leaves {
		if len(l.LeafIdentityHash) != hashSize {
			return status.Errorf(codes.InvalidArgument, "identity hash of %d octets", len(l.LeafIdentityHash))
		}
		id := hash(l.LeafIdentityHash)
		q := tx.inFlight[id]
		if q == nil || tx.done[id] {
			return status.Errorf(codes.FailedPrecondition, "leaf %x was not dequeued by this transaction", id)
		}
		if !bytes.Equal(q.leafHash[:], l.MerkleLeafHash) {
			return fmt.Errorf("sequence leaf %d: leaf hash changed: %w", l.LeafIndex, ErrCorrupt)
		}
		if err := tx.appendEntry(ctx, l); err != nil {
			return err
		}
		tx.done[id] = true
	}
	return nil
}

// appendEntry appends an entry and its hashes.
func (tx *logTX) appendEntry(ctx context.Context, l *trillian.LogLeaf) error {
	i := tx.old.entries + uint64(len(tx.ends))
	if l.LeafIndex < 0 || uint64(l.LeafIndex) != i {
		return status.Errorf(codes.FailedPrecondition, "leaf index %d, the next entry is %d", l.LeafIndex, i)
	}
	if err := tx.setHash(ctx, leafHashes, i, l.MerkleLeafHash); err != nil {
		return err
	}
	if tx.distinct == never && !bytes.Equal(l.LeafIdentityHash, l.MerkleLeafHash) {
		tx.startIdentities(i)
	}
	if tx.distinct != never {
		if err := tx.setHash(ctx, identities, i, l.LeafIdentityHash); err != nil {
			return err
		}
	}
	tx.records = appendRecord(tx.records, l)
	tx.ends = append(tx.ends, len(tx.records))
	return nil
}

// startIdentities begins level −1 at the run of entry i; the entries before it
// in that run have their leaf hash as identity.
func (tx *logTX) startIdentities(i uint64) {
	tx.distinct = i / runHashes
	g := &growth{base: tx.distinct * runHashes}
	for j := g.base; j < i; j++ {
		g.added = append(g.added, tx.level(leafHashes).at(j)...)
	}
	tx.grow[identities+1] = g
}

// SetMerkleNodes implements storage.LogTreeTX. Only nodes at the bottom of a
// tile are stored, and each level only grows; the others can be recomputed.
func (tx *logTX) SetMerkleNodes(ctx context.Context, nodes []stree.Node) error {
	if tx.over {
		return errOver
	}
	var bottom []stree.Node
	for _, n := range nodes {
		if n.ID.Level > maxNodeLevel {
			return status.Errorf(codes.InvalidArgument, "node level %d", n.ID.Level)
		}
		if n.ID.Level%8 == 0 {
			bottom = append(bottom, n)
		}
	}
	slices.SortFunc(bottom, func(a, b stree.Node) int {
		switch {
		case a.ID.Level != b.ID.Level:
			return int(a.ID.Level) - int(b.ID.Level)
		case a.ID.Index < b.ID.Index:
			return -1
		}
		return 1
	})
	for _, n := range bottom {
		if err := tx.setHash(ctx, int(n.ID.Level/8), n.ID.Index, n.Hash); err != nil {
			return err
		}
	}
	tx.setFrontier(nodes)
	return nil
}

// setFrontier collects the nodes that the next batch will ask for.
func (tx *logTX) setFrontier(nodes []stree.Node) {
	size := tx.level(leafHashes).count()
	tx.frontier = make(map[compact.NodeID][]byte)
	for _, n := range nodes {
		if onFrontier(n.ID, size) {
			tx.frontier[n.ID] = n.Hash
		}
	}
	for id, h := range tx.t.frontier {
		if onFrontier(id, size) {
			tx.frontier[id] = h
		}
	}
}

// onFrontier reports whether id is in compact.RangeNodes(0, size).
func onFrontier(id compact.NodeID, size uint64) bool {
	top := size >> id.Level
	return top&1 == 1 && id.Index == top-1
}

// StoreSignedLogRoot implements storage.LogTreeTX. Staged leaves that the root
// covers become entries.
func (tx *logTX) StoreSignedLogRoot(ctx context.Context, root *trillian.SignedLogRoot) error {
	if tx.over {
		return errOver
	}
	var r types.LogRootV1
	if err := r.UnmarshalBinary(root.GetLogRoot()); err != nil {
		return status.Errorf(codes.InvalidArgument, "parse root: %v", err)
	}
	if r.TreeSize < tx.old.size {
		return status.Errorf(codes.FailedPrecondition, "root of size %d after one of size %d", r.TreeSize, tx.old.size)
	}
	if err := tx.sameRoot(r); err != nil {
		return err
	}
	tx.root, tx.newSize = slices.Clone(root.LogRoot), r.TreeSize
	if tx.preordered {
		return tx.promoteStaged(ctx, r)
	}
	return nil
}

// sameRoot refuses another root hash for the size of the last root.
func (tx *logTX) sameRoot(r types.LogRootV1) error {
	if tx.old.root == nil || r.TreeSize != tx.old.size {
		return nil
	}
	var old types.LogRootV1
	if err := old.UnmarshalBinary(tx.old.root); err != nil {
		return fmt.Errorf("parse root: %w: %w", ErrCorrupt, err)
	}
	if !bytes.Equal(old.RootHash, r.RootHash) {
		return fmt.Errorf("store second root for size %d: %w", r.TreeSize, ErrCorrupt)
	}
	return nil
}

// promoteStaged makes the staged leaves below the size of a root entries.
func (tx *logTX) promoteStaged(ctx context.Context, r types.LogRootV1) error {
	next := tx.old.entries + uint64(len(tx.ends))
	if next >= r.TreeSize {
		return nil
	}
	leaves, err := readStaged(ctx, tx.t.writer, next, r.TreeSize-next)
	if err != nil {
		return err
	}
	at := timestamppb.New(time.Unix(0, int64(r.TimestampNanos)))
	for _, l := range leaves {
		l.IntegrateTimestamp = at
		if err := tx.appendEntry(ctx, l); err != nil {
			return err
		}
		tx.staged++
	}
	return nil
}

// Commit stores the transaction, durably and whole. Without an error it
// happened; after ErrFailed it may have; after any other error it did not.
func (tx *logTX) Commit(ctx context.Context) error {
	switch {
	case tx.committed:
		return nil
	case tx.over:
		return errOver
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	tx.over = true
	if tx.root == nil && tx.grow == [levels]*growth{} && len(tx.ends) == 0 {
		tx.committed = true
		return nil
	}
	err := tx.store()
	tx.committed = err == nil
	return err
}

func (tx *logTX) store() error {
	t := tx.t
	next := &tip{root: tx.old.root, size: tx.old.size, entries: tx.old.entries + uint64(len(tx.ends)), distinct: tx.distinct, edges: tx.old.edges}
	if tx.root != nil {
		next.root, next.size = tx.root, tx.newSize
	}
	if got := tx.level(leafHashes).count(); got != next.entries {
		return status.Errorf(codes.FailedPrecondition, "%d leaf hashes for %d entries", got, next.entries)
	}
	tx.index(next)
	written := int64(len(tx.records))
	err := t.writer.transaction(func() error {
		if err := tx.storeEntries(); err != nil {
			return err
		}
		for i, g := range tx.grow {
			if g == nil {
				continue
			}
			written += int64(len(g.added))
			var err error
			if next.edges[i], err = g.flush(func(n uint64, run []byte) error { return storeRun(t.writer, runID(i-1, n), run) }); err != nil {
				return err
			}
		}
		return writeTip(t.writer, tx.old, next)
	})
	if err != nil {
		tx.unindex()
		return t.commitFailed(tx.old, err)
	}
	t.tip.Store(next)
	if tx.frontier != nil {
		t.frontier = tx.frontier
	}
	if tx.taken > 0 {
		t.queue.remove(tx.taken, tx.done)
	}
	t.kickSealer()
	t.checkpoints.wrote(written)
	return nil
}

// commitFailed finds out what an error means. When the disk is full nothing
// was stored, which is checked, and the tree goes on; everything else that
// leaves the outcome open stops it.
func (t *logTree) commitFailed(old *tip, err error) error {
	if _, unknown := errors.AsType[*commitError](err); !unknown {
		return fmt.Errorf("store batch: %w", err)
	}
	if isFull(err) {
		now, e := readTip(context.Background(), t.writer)
		if e == nil && bytes.Equal(now.encodeState(), old.encodeState()) {
			return fmt.Errorf("store batch: %w", err)
		}
		err = errors.Join(err, e)
	}
	return t.latch(fmt.Errorf("store batch: %w", err))
}

// index tells the lookup about the new entries. That happens before they are
// committed, so that nobody misses one; the lookup's answers are checked.
func (tx *logTX) index(next *tip) {
	for k := range kinds {
		g := tx.grow[k.level()+1]
		if g == nil || (k == byIdentity && next.distinct == never) {
			continue
		}
		for i := g.base; i < g.count(); i++ {
			tx.t.table(k, i).add(tx.t.mark.of(g.at(i)))
		}
	}
}

func (tx *logTX) unindex() {
	v := tx.t.view.Load()
	for k := range kinds {
		if g := tx.grow[k.level()+1]; g != nil {
			for _, m := range v.tables[k] {
				m.truncate(g.base)
			}
		}
	}
}

// table returns the table that leaf i goes to, publishing a new one when the
// last is full.
func (t *logTree) table(k kind, i uint64) *memTable {
	v := t.view.Load()
	if n := len(v.tables[k]); n > 0 && i < v.tables[k][n-1].end() {
		return v.tables[k][n-1]
	}
	m := newMemTable(i)
	t.view.Store(v.withTable(k, m))
	return m
}

// rowsPerInsert is how many entries one INSERT carries.
const rowsPerInsert = 16

var (
	insertEntry   = "INSERT INTO entries (idx, data, sum) VALUES (?,?,?)"
	insertEntries = insertEntry + strings.Repeat(",(?,?,?)", rowsPerInsert-1)
)

func (tx *logTX) storeEntries() error {
	c, first, start := tx.t.writer, int64(tx.old.entries), 0
	args := make([]any, 0, 3*rowsPerInsert)
	for n, end := range tx.ends {
		i, data := first+int64(n), tx.records[start:end:end]
		start = end
		args = append(args, i, data, checksum(inEntries, i, data))
		if len(args) == cap(args) {
			if err := c.exec(insertEntries, args...); err != nil {
				return fmt.Errorf("store entries: %w", err)
			}
			args = args[:0]
		}
	}
	for len(args) > 0 {
		if err := c.exec(insertEntry, args[:3]...); err != nil {
			return fmt.Errorf("store entry: %w", err)
		}
		args = args[3:]
	}
	if tx.staged > 0 {
		if err := c.exec("DELETE FROM staged WHERE idx<?", first+int64(len(tx.ends))); err != nil {
			return fmt.Errorf("clear staged leaves: %w", err)
		}
	}
	return nil
}

func storeRun(c *conn, id int64, run []byte) error {
	if err := c.exec("INSERT INTO runs (id, data, sum) VALUES (?,?,?)", id, run, checksum(inRuns, id, run)); err != nil {
		return fmt.Errorf("store run: %w", err)
	}
	return nil
}
