package store

import (
	"context"
	"crypto/sha256"
	"database/sql/driver"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/google/trillian"
	"github.com/google/trillian/storage"
	stree "github.com/google/trillian/storage/tree"
	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Bounds of one GetLeavesByRange: it returns fewer leaves than asked for.
const (
	maxRangeLeaves = 1024
	maxRangeBytes  = 16 << 20
)

// snapshot is a read transaction on one committed state of a tree. It ends by
// itself after Options.Snapshot, so that no reader keeps the write-ahead log
// from starting over.
type snapshot struct {
	t          *logTree
	tip        *tip
	view       *view
	preordered bool
	timer      *time.Timer

	mu      sync.Mutex
	c       *conn            // guarded by mu
	err     error            // why it ended; guarded by mu
	refused error            // what a read after the end was told; guarded by mu
	runs    map[int64][]byte // full runs read so far; guarded by mu
}

var _ storage.ReadOnlyLogTreeTX = (*snapshot)(nil)

// snapshot waits for a free read connection and pins the newest state on it.
func (t *logTree) snapshot(ctx context.Context) (*snapshot, error) {
	var c *conn
	select {
	case c = <-t.readers:
	case <-t.closing:
		return nil, ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	s := &snapshot{t: t, c: c}
	if err := s.pin(ctx); err != nil {
		_ = c.script("ROLLBACK")
		t.readers <- c
		return nil, fmt.Errorf("begin snapshot: %w", err)
	}
	t.mu.Lock()
	dead := t.dead
	if !dead {
		t.open[s] = struct{}{}
	}
	t.mu.Unlock()
	if dead {
		s.end(ErrClosed)
		return nil, ErrClosed
	}
	s.mu.Lock()
	s.timer = time.AfterFunc(t.opts.Snapshot, func() { s.end(ErrSnapshotExpired) })
	s.mu.Unlock()
	return s, nil
}

// maxAttempts bounds how often a read is begun whose snapshot expired before it
// got its turn: on a machine that is short of processors a second can pass
// between two statements.
const maxAttempts = 5

// read runs f with a snapshot, and again with another one when that expired.
func (t *logTree) read(ctx context.Context, f func(*snapshot) error) error {
	for n := 1; ; n++ {
		s, err := t.snapshot(ctx)
		if err != nil {
			return err
		}
		err = f(s)
		_ = s.Close() // never fails
		if !errors.Is(err, ErrSnapshotExpired) || n == maxAttempts {
			return err
		}
	}
}

// pin begins the transaction. The lookup must be of the same state: a table
// that is stored now must be in the view or in the snapshot, so the view may
// not change between the two.
func (s *snapshot) pin(ctx context.Context) (err error) {
	for {
		s.view = s.t.view.Load()
		if err := s.c.script("BEGIN"); err != nil {
			return err
		}
		if s.tip, err = readTip(ctx, s.c); err != nil {
			return err
		}
		if s.view == s.t.view.Load() {
			return nil
		}
		if err := s.c.script("ROLLBACK"); err != nil {
			return err
		}
	}
}

// end gives the connection back; why is what later calls return.
func (s *snapshot) end(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.c == nil {
		return
	}
	if s.timer != nil {
		s.timer.Stop()
	}
	if err := s.c.script("ROLLBACK"); err != nil {
		s.t.opts.Logger.Error("end snapshot", "tree", s.t.id, "error", err)
	}
	s.t.readers <- s.c
	s.c, s.err, s.runs = nil, why, nil
	s.t.mu.Lock()
	delete(s.t.open, s)
	s.t.mu.Unlock()
}

// Commit implements storage.ReadOnlyLogTreeTX. What was read belongs to one
// state; a snapshot that expired is an error only where a read was refused.
func (s *snapshot) Commit(context.Context) error {
	s.end(nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.refused
}

// Close implements storage.ReadOnlyLogTreeTX.
func (s *snapshot) Close() error {
	s.end(nil)
	return nil
}

// LatestSignedLogRoot implements storage.ReadOnlyLogTreeTX.
func (s *snapshot) LatestSignedLogRoot(context.Context) (*trillian.SignedLogRoot, error) {
	if s.tip.root == nil {
		return nil, storage.ErrTreeNeedsInit
	}
	return &trillian.SignedLogRoot{LogRoot: slices.Clone(s.tip.root)}, nil
}

// use runs f with the connection, unless the snapshot ended.
func (s *snapshot) use(f func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.c == nil {
		if s.refused = s.err; s.err == nil {
			s.refused = status.Error(codes.FailedPrecondition, "transaction is over")
		}
		return s.refused
	}
	return f()
}

// GetMerkleNodes implements storage.ReadOnlyLogTreeTX. Node (8·L, i) is hash i
// of tile level L; nodes between are computed from those below.
func (s *snapshot) GetMerkleNodes(ctx context.Context, ids []compact.NodeID) (nodes []stree.Node, err error) {
	err = s.use(func() error {
		nodes = make([]stree.Node, len(ids))
		for i, id := range ids {
			h, err := s.node(ctx, id)
			if err != nil {
				return err
			}
			nodes[i] = stree.Node{ID: id, Hash: h}
		}
		return nil
	})
	return nodes, err
}

// maxNodeLevel is the level of the root of a tree of 2^63 leaves.
const maxNodeLevel = 63

func (s *snapshot) node(ctx context.Context, id compact.NodeID) ([]byte, error) {
	if id.Level > maxNodeLevel {
		return nil, status.Errorf(codes.InvalidArgument, "node level %d", id.Level)
	}
	level, up := int(id.Level/8), id.Level%8
	width := uint64(1) << up
	if have := s.tip.edge(level).count >> up; id.Index >= have {
		return nil, status.Errorf(codes.NotFound, "node %d/%d is not in the tree", id.Level, id.Index)
	}
	if up > 0 {
		if h, ok := s.t.nodes.get(id); ok {
			return h[:], nil
		}
	}
	hashes := make([]byte, 0, width*hashSize)
	if err := s.hashes(ctx, level, id.Index<<up, width, func(h []byte) { hashes = append(hashes, h...) }); err != nil {
		return nil, err
	}
	if up == 0 {
		return hashes, nil
	}
	h := hash(subtreeRoot(hashes))
	s.t.nodes.put(id, h)
	return h[:], nil
}

// subtreeRoot computes the root of a perfect subtree from its hashes, in
// their place.
func subtreeRoot(hashes []byte) []byte {
	pair := [1 + 2*hashSize]byte{rfc6962.RFC6962NodeHashPrefix}
	for n := len(hashes) / hashSize; n > 1; n /= 2 {
		for i := range n / 2 {
			copy(pair[1:], hashes[2*i*hashSize:])
			h := sha256.Sum256(pair[:])
			copy(hashes[i*hashSize:], h[:])
		}
	}
	return hashes[:hashSize]
}

// hashes calls f with n hashes of a level from index start on; full runs are
// kept for the rest of the snapshot.
func (s *snapshot) hashes(ctx context.Context, level int, start, n uint64, f func([]byte)) error {
	e := s.tip.edge(level)
	for i := start; i < start+n; {
		run := i / runHashes
		var data []byte
		if run == e.count/runHashes {
			data = e.partial
		} else {
			var err error
			if data, err = s.run(ctx, level, run); err != nil {
				return err
			}
		}
		for ; i < start+n && i/runHashes == run; i++ {
			o := i % runHashes * hashSize
			if o+hashSize > uint64(len(data)) {
				return fmt.Errorf("read hash %d of level %d: %w", i, level, ErrCorrupt)
			}
			f(data[o : o+hashSize : o+hashSize])
		}
	}
	return nil
}

// run returns a full run.
func (s *snapshot) run(ctx context.Context, level int, run uint64) ([]byte, error) {
	id := runID(level, run)
	if data, ok := s.runs[id]; ok {
		return data, nil
	}
	data, err := readRun(ctx, s.c, id)
	if err != nil {
		return nil, err
	}
	if s.runs == nil {
		s.runs = make(map[int64][]byte)
	}
	s.runs[id] = data
	return data, nil
}

func readRun(ctx context.Context, c *conn, id int64) (run []byte, err error) {
	err = c.query(ctx, "SELECT data, sum FROM runs WHERE id=?", func(cols []driver.Value) (err error) {
		run, err = checked(inRuns, id, cols[0], cols[1])
		return err
	}, id)
	if err == nil && len(run) != runSize {
		err = fmt.Errorf("read run %d: %d octets: %w", id, len(run), ErrCorrupt)
	}
	return run, err
}

// readHashes calls f with n hashes of a level from index start on, in the
// state tp, reading runs in order.
func readHashes(ctx context.Context, c *conn, tp *tip, level int, start, n uint64, f func([]byte)) error {
	s := snapshot{c: c, tip: tp}
	for i := start; i < start+n; {
		step := min(start+n-i, runHashes-i%runHashes)
		if err := s.hashes(ctx, level, i, step, f); err != nil {
			return err
		}
		clear(s.runs)
		i += step
	}
	return nil
}

// readTile is ReadTile of one tree.
func (t *logTree) readTile(ctx context.Context, level, index uint64, width int) ([]byte, error) {
	if width < 1 || width > tileHashes {
		return nil, status.Errorf(codes.InvalidArgument, "tile width %d", width)
	}
	if level >= levels-1 || index >= 1<<55 {
		return nil, fmt.Errorf("read tile %d/%d: %w", level, index, ErrNotFound)
	}
	start := index * tileHashes
	var tile []byte
	err := t.read(ctx, func(s *snapshot) error {
		if start+uint64(width) > s.tip.size>>(8*level) {
			return fmt.Errorf("read tile %d/%d: %w", level, index, ErrNotFound)
		}
		tile = make([]byte, 0, width*hashSize)
		return s.use(func() error {
			return s.hashes(ctx, int(level), start, uint64(width), func(h []byte) { tile = append(tile, h...) })
		})
	})
	return tile, err
}

// GetLeavesByRange implements storage.ReadOnlyLogTreeTX. It returns at most
// 1,024 leaves and stops after 16 MiB.
func (s *snapshot) GetLeavesByRange(ctx context.Context, start, count int64) (leaves []*trillian.LogLeaf, err error) {
	if count <= 0 {
		return nil, status.Errorf(codes.InvalidArgument, "invalid count %d, want > 0", count)
	}
	if start < 0 {
		return nil, status.Errorf(codes.InvalidArgument, "invalid start %d, want >= 0", start)
	}
	if !s.preordered {
		if uint64(start) >= s.tip.size {
			return nil, status.Errorf(codes.OutOfRange, "invalid start %d, want < tree size %d", start, s.tip.size)
		}
		count = min(count, int64(s.tip.size)-start)
	}
	count = min(count, maxRangeLeaves)
	err = s.use(func() error {
		leaves, err = s.leafRange(ctx, uint64(start), uint64(count))
		return err
	})
	return leaves, err
}

// leafRange reads integrated entries, then staged ones, up to a gap. A gap
// below the tree size is damage.
func (s *snapshot) leafRange(ctx context.Context, start, count uint64) ([]*trillian.LogLeaf, error) {
	leaves := []*trillian.LogLeaf{}
	if start < s.tip.entries {
		var err error
		if leaves, err = s.entries(ctx, start, min(count, s.tip.entries-start)); err != nil {
			return nil, err
		}
		if next := start + uint64(len(leaves)); next < s.tip.entries {
			return leaves, nil // clipped by size
		}
	}
	next := start + uint64(len(leaves))
	staged, err := readStaged(ctx, s.c, next, count-uint64(len(leaves)))
	if err != nil {
		return nil, err
	}
	leaves = append(leaves, staged...)
	if next += uint64(len(staged)); next < start+count && next < s.tip.size {
		if more, err := s.c.integer("SELECT count(*) FROM staged WHERE idx>? AND idx<?", int64(next), int64(start+count)); err != nil || more > 0 || len(leaves) == 0 {
			return nil, fmt.Errorf("read leaf %d of tree of size %d: missing: %w", next, s.tip.size, ErrCorrupt)
		}
	}
	return leaves, nil
}

// entries reads integrated entries with their hashes.
func (s *snapshot) entries(ctx context.Context, start, count uint64) ([]*trillian.LogLeaf, error) {
	leaves := make([]*trillian.LogLeaf, 0, count)
	size := 0
	err := s.c.query(ctx, "SELECT idx, data, sum FROM entries WHERE idx>=? AND idx<? ORDER BY idx", func(cols []driver.Value) error {
		i, _ := cols[0].(int64)
		if i != int64(start)+int64(len(leaves)) {
			return fmt.Errorf("read entry %d: missing: %w", int64(start)+int64(len(leaves)), ErrCorrupt)
		}
		data, err := checked(inEntries, i, cols[1], cols[2])
		if err != nil {
			return err
		}
		leaf, err := parseRecord(data)
		if err != nil {
			return err
		}
		leaf.LeafIndex = i
		leaves = append(leaves, leaf)
		if size += len(data); size >= maxRangeBytes {
			return errEnough
		}
		return nil
	}, int64(start), int64(start+count))
	if err == nil && uint64(len(leaves)) != count {
		return nil, fmt.Errorf("read entry %d: missing: %w", start+uint64(len(leaves)), ErrCorrupt)
	}
	if err := ignoreEnough(err); err != nil {
		return nil, err
	}
	i := 0
	err = s.hashes(ctx, leafHashes, start, uint64(len(leaves)), func(h []byte) {
		leaves[i].MerkleLeafHash, leaves[i].LeafIdentityHash = h, h
		i++
	})
	if err != nil || len(leaves) == 0 {
		return leaves, err
	}
	return leaves, s.setIdentities(ctx, leaves)
}

// setIdentities replaces identities that are not the leaf hash.
func (s *snapshot) setIdentities(ctx context.Context, leaves []*trillian.LogLeaf) error {
	start := uint64(leaves[0].LeafIndex)
	end := start + uint64(len(leaves))
	if s.tip.distinct == never || end <= s.tip.distinct*runHashes {
		return nil
	}
	from := max(start, s.tip.distinct*runHashes)
	i := from - start
	return s.hashes(ctx, identities, from, end-from, func(h []byte) {
		leaves[i].LeafIdentityHash = h
		i++
	})
}

// errEnough stops a query early.
var errEnough = errors.New("enough")

// GetLeavesByHash implements storage.ReadOnlyLogTreeTX. The result is in the
// order of the hashes, or of the indices if orderBySequence.
func (s *snapshot) GetLeavesByHash(ctx context.Context, hashes [][]byte, orderBySequence bool) (leaves []*trillian.LogLeaf, err error) {
	for i, h := range hashes {
		if len(h) != hashSize {
			return nil, status.Errorf(codes.InvalidArgument, "hashes[%d] must have %d octets", i, hashSize)
		}
	}
	err = s.use(func() error {
		leaves, err = s.leavesByHash(ctx, hashes)
		return err
	})
	if orderBySequence {
		slices.SortFunc(leaves, func(a, b *trillian.LogLeaf) int { return int(a.LeafIndex - b.LeafIndex) })
	}
	return leaves, err
}

func (s *snapshot) leavesByHash(ctx context.Context, hashes [][]byte) ([]*trillian.LogLeaf, error) {
	var leaves []*trillian.LogLeaf
	for _, h := range hashes {
		found, err := s.view.find(ctx, s.c, byLeafHash, s.t.mark.of(h))
		if err != nil {
			return nil, err
		}
		slices.Sort(found)
		for _, i := range found {
			ok, err := s.isHash(ctx, leafHashes, i, h)
			if err != nil {
				return nil, err
			}
			if !ok || (i >= s.tip.size && !s.preordered) || len(leaves) >= maxRangeLeaves {
				continue
			}
			l, err := s.entries(ctx, i, 1)
			if err != nil {
				return nil, err
			}
			leaves = append(leaves, l...)
		}
	}
	return leaves, nil
}

// isHash reports whether hash i of a level is stored and is h.
func (s *snapshot) isHash(ctx context.Context, level int, i uint64, h []byte) (same bool, err error) {
	if i >= s.tip.edge(level).count {
		return false, nil // of a batch that this snapshot does not see
	}
	err = s.hashes(ctx, level, i, 1, func(stored []byte) { same = string(stored) == string(h) })
	return same, err
}

// leafByIdentity returns the entry with an identity, or nil.
func (s *snapshot) leafByIdentity(ctx context.Context, identity []byte) (leaf *trillian.LogLeaf, err error) {
	err = s.use(func() error {
		fp := s.t.mark.of(identity)
		for k := range kinds {
			found, err := s.view.find(ctx, s.c, k, fp)
			if err != nil {
				return err
			}
			for _, i := range found {
				if s.tip.identityLevel(i) != k.level() {
					continue
				}
				ok, err := s.isHash(ctx, k.level(), i, identity)
				if err != nil {
					return err
				}
				if ok {
					l, err := s.entries(ctx, i, 1)
					if err != nil {
						return err
					}
					leaf = l[0]
					return nil
				}
			}
		}
		return nil
	})
	return leaf, err
}

// nodeCache keeps inner nodes of tiles, which are the same in every state
// that has them. It is two generations of a bounded map.
type nodeCache struct {
	mu       sync.Mutex
	new, old map[compact.NodeID]hash // guarded by mu
}

const nodeCacheSize = 8192

func (n *nodeCache) get(id compact.NodeID) (hash, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	h, ok := n.new[id]
	if !ok {
		if h, ok = n.old[id]; ok {
			n.putLocked(id, h)
		}
	}
	return h, ok
}

func (n *nodeCache) put(id compact.NodeID, h hash) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.putLocked(id, h)
}

func (n *nodeCache) putLocked(id compact.NodeID, h hash) {
	if n.new == nil || len(n.new) >= nodeCacheSize {
		n.old, n.new = n.new, make(map[compact.NodeID]hash)
	}
	n.new[id] = h
}
