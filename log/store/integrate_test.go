package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/trillian"
	"github.com/google/trillian/log"
	"github.com/google/trillian/quota"
	"github.com/google/trillian/storage"
	"github.com/google/trillian/types"
	"github.com/google/trillian/util/clock"
	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
)

func init() { log.InitMetrics(nil) }

// rig is a store with one initialised tree and a clock that always advances.
type rig struct {
	testing.TB
	s    *Store
	tree *trillian.Tree
	now  int64
}

// Now implements clock.TimeSource.
func (r *rig) Now() time.Time {
	r.now += 1000
	return time.Unix(1_800_000_000, r.now)
}

// NewTimer implements clock.TimeSource.
func (r *rig) NewTimer(d time.Duration) clock.Timer { return clock.System.NewTimer(d) }

func newRig(t testing.TB, typ trillian.TreeType, opts Options) *rig {
	t.Helper()
	r := &rig{TB: t, s: mustOpen(t, t.TempDir(), opts)}
	r.create(typ)
	return r
}

func (r *rig) create(typ trillian.TreeType) {
	r.Helper()
	var err error
	r.tree, err = storage.CreateTree(context.Background(), r.s.Admin(), &trillian.Tree{
		TreeState: trillian.TreeState_ACTIVE, TreeType: typ, MaxRootDuration: durationpb.New(0),
	})
	if err != nil {
		r.Fatalf("CreateTree: %v", err)
	}
	r.init()
}

func (r *rig) init() {
	r.Helper()
	root, err := (&types.LogRootV1{RootHash: rfc6962.DefaultHasher.EmptyRoot(), TimestampNanos: uint64(r.Now().UnixNano())}).MarshalBinary()
	if err != nil {
		r.Fatal(err)
	}
	err = r.s.ReadWriteTransaction(context.Background(), r.tree, func(ctx context.Context, tx storage.LogTreeTX) error {
		return tx.StoreSignedLogRoot(ctx, &trillian.SignedLogRoot{LogRoot: root})
	})
	if err != nil {
		r.Fatalf("store first root: %v", err)
	}
}

func (r *rig) integrate(limit int) int {
	r.Helper()
	n, err := log.IntegrateBatch(context.Background(), r.tree, limit, 0, 0, r, r.s, quota.Noop())
	if err != nil {
		r.Fatalf("IntegrateBatch: %v", err)
	}
	return n
}

func (r *rig) queue(leaves ...*trillian.LogLeaf) []*trillian.QueuedLogLeaf {
	r.Helper()
	q, err := r.s.QueueLeaves(context.Background(), r.tree, leaves, r.Now())
	if err != nil {
		r.Fatalf("QueueLeaves: %v", err)
	}
	return q
}

// testLeaf is leaf n: its leaf hash is that of its value; with distinct its
// identity is another hash.
func testLeaf(n int, distinct bool) *trillian.LogLeaf {
	value := fmt.Appendf(nil, "leaf %d", n)
	l := &trillian.LogLeaf{LeafValue: value, ExtraData: fmt.Appendf(nil, "extra %d", n), MerkleLeafHash: rfc6962.DefaultHasher.HashLeaf(value)}
	l.LeafIdentityHash = l.MerkleLeafHash
	if distinct {
		id := sha256.Sum256(fmt.Appendf(nil, "identity %d", n))
		l.LeafIdentityHash = id[:]
	}
	return l
}

// fill integrates leaves [from, to) in batches of random size.
func (r *rig) fill(from, to int, distinct func(int) bool) {
	r.Helper()
	rnd := rand.New(rand.NewPCG(uint64(from), uint64(to)))
	for i := from; i < to; {
		n := min(to-i, 1+rnd.IntN(300))
		leaves := make([]*trillian.LogLeaf, n)
		for j := range leaves {
			leaves[j] = testLeaf(i+j, distinct(i+j))
		}
		r.queue(leaves...)
		if got := r.integrate(1024); got != n {
			r.Fatalf("integrated %d leaves, want %d", got, n)
		}
		i += n
	}
}

// same says that no leaf has an identity of its own.
func same(int) bool { return false }

func (r *rig) snapshot() storage.ReadOnlyLogTreeTX {
	r.Helper()
	tx, err := r.s.SnapshotForTree(context.Background(), r.tree)
	if err != nil {
		r.Fatalf("SnapshotForTree: %v", err)
	}
	return tx
}

func (r *rig) root() types.LogRootV1 {
	r.Helper()
	tx := r.snapshot()
	defer tx.Close()
	slr, err := tx.LatestSignedLogRoot(context.Background())
	if err != nil {
		r.Fatal(err)
	}
	var root types.LogRootV1
	if err := root.UnmarshalBinary(slr.LogRoot); err != nil {
		r.Fatal(err)
	}
	return root
}

// check compares everything that can be read of a tree of n leaves with the
// reference: leaves, hashes, the root, tiles.
func (r *rig) check(n int, distinct func(int) bool) {
	r.Helper()
	ctx := context.Background()
	if got := r.root(); got.TreeSize != uint64(n) {
		r.Fatalf("tree size %d, want %d", got.TreeSize, n)
	}
	ref := &compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}
	cr := ref.NewEmptyRange(0)
	nodes := make(map[compact.NodeID][]byte)
	for i := 0; i < n; {
		leaves, err := readRange(ctx, r.s, r.tree, int64(i), int64(n-i))
		if err != nil {
			r.Fatalf("GetLeavesByRange(%d): %v", i, err)
		}
		for _, l := range leaves {
			want := testLeaf(i, distinct(i))
			if l.LeafIndex != int64(i) || !bytes.Equal(l.LeafValue, want.LeafValue) || !bytes.Equal(l.ExtraData, want.ExtraData) ||
				!bytes.Equal(l.MerkleLeafHash, want.MerkleLeafHash) || !bytes.Equal(l.LeafIdentityHash, want.LeafIdentityHash) {
				r.Fatalf("leaf %d: got %v, want %v", i, l, want)
			}
			if err := cr.Append(l.MerkleLeafHash, func(id compact.NodeID, h []byte) { nodes[id] = h }); err != nil {
				r.Fatal(err)
			}
			i++
		}
	}
	want, err := cr.GetRootHash(nil)
	if err != nil {
		r.Fatal(err)
	}
	if n > 0 && !bytes.Equal(want, r.root().RootHash) {
		r.Fatalf("root %x, leaves give %x", r.root().RootHash, want)
	}
	r.checkNodes(nodes)
	r.checkTiles(n, nodes)
}

func (r *rig) checkNodes(nodes map[compact.NodeID][]byte) {
	r.Helper()
	ids := make([]compact.NodeID, 0, len(nodes))
	for id := range nodes {
		if id.Level > 0 || id.Index%7 == 0 {
			ids = append(ids, id)
		}
	}
	for some := range slices.Chunk(ids, 512) {
		for i, h := range r.hashes(some) {
			if !bytes.Equal(h, nodes[some[i]]) {
				r.Fatalf("node %v: got %x, want %x", some[i], h, nodes[some[i]])
			}
		}
	}
}

// hashes reads nodes of the tree.
func (r *rig) hashes(ids []compact.NodeID) [][]byte {
	r.Helper()
	hashes := make([][]byte, len(ids))
	err := inSnapshot(context.Background(), r.s, r.tree, func(tx storage.ReadOnlyLogTreeTX) error {
		got, err := tx.GetMerkleNodes(context.Background(), ids)
		for i := range got {
			hashes[i] = got[i].Hash
		}
		return err
	})
	if err != nil {
		r.Fatalf("GetMerkleNodes: %v", err)
	}
	return hashes
}

func (r *rig) checkTiles(n int, nodes map[compact.NodeID][]byte) {
	r.Helper()
	ctx := context.Background()
	for level := uint64(0); level < 4; level++ {
		hashes := uint64(n) >> (8 * level)
		for index := uint64(0); index*tileHashes < hashes; index++ {
			width := int(min(tileHashes, hashes-index*tileHashes))
			for _, w := range []int{1, width/2 + 1, width} {
				w = min(w, width)
				tile, err := r.s.ReadTile(ctx, r.tree.TreeId, level, index, w)
				if err != nil {
					r.Fatalf("ReadTile(%d, %d, %d): %v", level, index, w, err)
				}
				var want []byte
				for i := range uint64(w) {
					want = append(want, nodes[compact.NodeID{Level: uint(8 * level), Index: index*tileHashes + i}]...)
				}
				if !bytes.Equal(tile, want) {
					r.Fatalf("tile %d/%d of width %d differs", level, index, w)
				}
			}
			if width < tileHashes {
				if _, err := r.s.ReadTile(ctx, r.tree.TreeId, level, index, width+1); !errors.Is(err, ErrNotFound) {
					r.Errorf("ReadTile beyond the tree: got %v, want ErrNotFound", err)
				}
			}
		}
	}
}

// reopen closes the store and opens it again.
func (r *rig) reopen() {
	r.Helper()
	if err := r.s.Close(); err != nil {
		r.Fatalf("Close: %v", err)
	}
	r.s = mustOpen(r.TB, r.s.dir, r.s.opts)
}

func TestIntegrate(t *testing.T) {
	for name, distinct := range map[string]func(int) bool{
		"identity is leaf hash":    same,
		"identity differs":         func(int) bool { return true },
		"differs from leaf 100 on": func(i int) bool { return i >= 100 },
		"differs now and then":     func(i int) bool { return i > 700 && i%3 == 0 },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, trillian.TreeType_LOG, Options{})
			r.check(0, distinct)
			sizes := []int{1, 63, 64, 65, 255, 256, 257, 1000, 1500}
			for i, n := range sizes {
				from := 0
				if i > 0 {
					from = sizes[i-1]
				}
				r.fill(from, n, distinct)
				if n > 300 || n == 257 {
					r.check(n, distinct)
				}
			}
			r.reopen()
			r.check(1500, distinct)
			r.fill(1500, 1700, distinct)
			r.check(1700, distinct)
			for _, i := range []int{0, 63, 64, 99, 100, 101, 700, 701, 702, 1499, 1500, 1699} {
				q := r.queue(testLeaf(i, distinct(i)))
				if q[0].Status.GetCode() != int32(codes.AlreadyExists) || q[0].Leaf.LeafIndex != int64(i) {
					t.Errorf("leaf %d again: %v", i, q[0])
				}
			}
			if n := r.integrate(1024); n != 0 {
				t.Errorf("integrated %d duplicates", n)
			}
		})
	}
}

// TestProofs verifies inclusion and consistency with the reference verifier.
func TestProofs(t *testing.T) {
	r := newRig(t, trillian.TreeType_LOG, Options{})
	roots := map[uint64][]byte{}
	for _, n := range []int{1, 3, 64, 200, 256, 600} {
		r.fill(int(r.root().TreeSize), n, same)
		roots[uint64(n)] = r.root().RootHash
	}
	fetch := func(n proof.Nodes) [][]byte {
		p, err := n.Rehash(r.hashes(n.IDs), rfc6962.DefaultHasher.HashChildren)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	for size, root := range roots {
		for i := uint64(0); i < size; i += 1 + size/50 {
			n, err := proof.Inclusion(i, size)
			if err != nil {
				t.Fatal(err)
			}
			if err := proof.VerifyInclusion(rfc6962.DefaultHasher, i, size, testLeaf(int(i), false).MerkleLeafHash, fetch(n), root); err != nil {
				t.Errorf("inclusion of %d in %d: %v", i, size, err)
			}
		}
		for first, old := range roots {
			if first > size {
				continue
			}
			n, err := proof.Consistency(first, size)
			if err != nil {
				t.Fatal(err)
			}
			if err := proof.VerifyConsistency(rfc6962.DefaultHasher, first, size, fetch(n), old, root); err != nil {
				t.Errorf("consistency of %d with %d: %v", first, size, err)
			}
		}
	}
}

func TestQueueDuplicates(t *testing.T) {
	r := newRig(t, trillian.TreeType_LOG, Options{})
	q := r.queue(testLeaf(1, true), testLeaf(2, true), testLeaf(1, true))
	for i, want := range []codes.Code{codes.OK, codes.OK, codes.AlreadyExists} {
		if got := codes.Code(q[i].Status.GetCode()); got != want {
			t.Errorf("leaf %d in one call: %v, want %v", i, got, want)
		}
	}
	other := testLeaf(2, true)
	other.LeafValue, other.ExtraData = []byte("another value, same identity"), nil
	q = r.queue(other)
	if !bytes.Equal(q[0].Leaf.LeafValue, testLeaf(2, true).LeafValue) || q[0].Leaf.IntegrateTimestamp != nil {
		t.Errorf("queued duplicate: got %v, want the original, not integrated", q[0])
	}
	err := r.s.ReadWriteTransaction(context.Background(), r.tree, func(ctx context.Context, tx storage.LogTreeTX) error {
		if l, err := tx.DequeueLeaves(ctx, 10, r.Now()); err != nil || len(l) != 2 {
			t.Errorf("DequeueLeaves: %d leaves, %v; want 2", len(l), err)
		}
		if q := r.queue(other); q[0].Status.GetCode() != int32(codes.AlreadyExists) {
			t.Errorf("duplicate of a leaf in flight: %v", q[0])
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if n := r.integrate(10); n != 2 {
		t.Fatalf("integrated %d, want the 2 that were dequeued but not sequenced", n)
	}
	q = r.queue(other, testLeaf(3, true))
	if q[0].Leaf.LeafIndex != 1 || q[0].Leaf.IntegrateTimestamp == nil || q[1].Status.GetCode() != 0 {
		t.Errorf("integrated duplicate beside a new leaf: %v", q)
	}
}

func TestRollbackKeepsOrder(t *testing.T) {
	r := newRig(t, trillian.TreeType_LOG, Options{})
	r.queue(testLeaf(0, false), testLeaf(1, false), testLeaf(2, false))
	stop := errors.New("stop")
	err := r.s.ReadWriteTransaction(context.Background(), r.tree, func(ctx context.Context, tx storage.LogTreeTX) error {
		leaves, err := tx.DequeueLeaves(ctx, 2, r.Now())
		if err != nil {
			return err
		}
		for i, l := range leaves {
			l.LeafIndex = int64(i)
		}
		if err := tx.UpdateSequencedLeaves(ctx, leaves); err != nil {
			return err
		}
		return stop
	})
	if !errors.Is(err, stop) {
		t.Fatalf("ReadWriteTransaction: %v, want %v", err, stop)
	}
	r.queue(testLeaf(3, false))
	if n := r.integrate(10); n != 4 {
		t.Fatalf("integrated %d, want 4", n)
	}
	r.check(4, same)
}

func TestQueueBounds(t *testing.T) {
	for name, opts := range map[string]Options{
		"leaves": {QueueLeaves: 2},
		"octets": {QueueBytes: int64(len("leaf 0")+len("extra 0")) * 2},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, trillian.TreeType_LOG, opts)
			r.queue(testLeaf(0, false), testLeaf(1, false))
			_, err := r.s.QueueLeaves(context.Background(), r.tree, []*trillian.LogLeaf{testLeaf(2, false)}, r.Now())
			if !errors.Is(err, ErrQueueFull) {
				t.Fatalf("third leaf: %v, want ErrQueueFull", err)
			}
			if q := r.queue(testLeaf(1, false)); q[0].Status.GetCode() != int32(codes.AlreadyExists) {
				t.Errorf("duplicate while full: %v", q[0])
			}
			if n := r.integrate(10); n != 2 {
				t.Fatalf("integrated %d, want 2", n)
			}
			if q := r.queue(testLeaf(2, false)); q[0].Status != nil {
				t.Errorf("leaf after the queue emptied: %v", q[0])
			}
		})
	}
}

// TestGenerations builds more than one generation of the lookup.
func TestGenerations(t *testing.T) {
	if testing.Short() {
		t.Skip("integrates 2^18 leaves")
	}
	r := newRig(t, trillian.TreeType_LOG, Options{})
	const n = generationSize + 3000
	bulk(r, 0, n, 4096, 8)
	lt, err := r.s.tree(r.tree.TreeId)
	if err != nil {
		t.Fatal(err)
	}
	for lt.view.Load().sealed[byLeafHash] == nil {
		// The sealer works in the background; committing goes on meanwhile.
		r.queue(bulkLeaf(int(r.root().TreeSize), 8))
		r.integrate(10)
	}
	size := int(r.root().TreeSize)
	verify := func() {
		t.Helper()
		for _, i := range []int{0, 1, 77, generationSize - 1, generationSize, generationSize + 1, size - 1} {
			q := r.queue(bulkLeaf(i, 8))
			if q[0].Status.GetCode() != int32(codes.AlreadyExists) || q[0].Leaf.LeafIndex != int64(i) {
				t.Errorf("leaf %d again: %v", i, q[0])
			}
			err := inSnapshot(context.Background(), r.s, r.tree, func(tx storage.ReadOnlyLogTreeTX) error {
				got, err := tx.GetLeavesByHash(context.Background(), [][]byte{bulkLeaf(i, 8).MerkleLeafHash}, true)
				if err == nil && (len(got) != 1 || got[0].LeafIndex != int64(i)) {
					err = fmt.Errorf("got %v", got)
				}
				return err
			})
			if err != nil {
				t.Errorf("GetLeavesByHash(%d): %v", i, err)
			}
		}
	}
	verify()
	r.reopen()
	verify()
	if n := r.integrate(10); n != 0 {
		t.Errorf("integrated %d duplicates", n)
	}
	damageGenerations(t, r)
}

// damageGenerations changes what is stored of a sealed generation: it is
// refused when the tree is opened or when the lookup comes to it.
func damageGenerations(t *testing.T, r *rig) {
	t.Helper()
	l := bulkLeaf(77, 8)
	lt, err := r.s.tree(r.tree.TreeId)
	if err != nil {
		t.Fatal(err)
	}
	bucket := fmt.Sprintf(" WHERE id=%d", bucketID(generationID(byLeafHash, 0), lt.mark.of(l.MerkleLeafHash)>>(64-bucketBits)))
	if err := r.s.Close(); err != nil {
		t.Fatal(err)
	}
	for name, sql := range map[string]string{
		"generation: number":   "UPDATE generations SET id=id|1<<41",
		"generation: first":    "UPDATE generations SET first=first|4",
		"generation: count":    "UPDATE generations SET count=count-8",
		"generation: filter":   "UPDATE generations SET filter=zeroblob(length(filter))",
		"generation: checksum": "UPDATE generations SET sum=sum+1",
		"bucket: number":       "UPDATE buckets SET id=id|1<<50" + bucket,
		"bucket: words":        "UPDATE buckets SET data=zeroblob(length(data))" + bucket,
		"bucket: checksum":     "UPDATE buckets SET sum=sum+1" + bucket,
		"bucket: lost":         "DELETE FROM buckets" + bucket,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			copyFiles(t, r.s.dir, dir)
			script(t, filepath.Join(dir, filepath.Base(r.s.treePath(r.tree.TreeId))), sql)
			s, err := Open(dir, Options{})
			if err == nil {
				defer s.Close()
				_, err = s.LeafByIdentity(t.Context(), r.tree.TreeId, l.LeafIdentityHash)
			}
			if !errors.Is(err, ErrCorrupt) {
				t.Errorf("got %v, want ErrCorrupt", err)
			}
		})
	}
}

// bulkLeaf is leaf n of size octets.
func bulkLeaf(n, size int) *trillian.LogLeaf {
	value := make([]byte, size)
	binary.BigEndian.PutUint64(value, uint64(n))
	h := rfc6962.DefaultHasher.HashLeaf(value)
	return &trillian.LogLeaf{LeafValue: value, MerkleLeafHash: h, LeafIdentityHash: h}
}

// bulk integrates leaves [from, to) of size octets in batches.
func bulk(r *rig, from, to, batch, size int) {
	r.Helper()
	for i := from; i < to; i += batch {
		leaves := make([]*trillian.LogLeaf, min(batch, to-i))
		for j := range leaves {
			leaves[j] = bulkLeaf(i+j, size)
		}
		r.queue(leaves...)
		if n := r.integrate(batch); n != len(leaves) {
			r.Fatalf("integrated %d leaves, want %d", n, len(leaves))
		}
	}
}
