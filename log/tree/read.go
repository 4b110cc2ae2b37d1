package tree

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/trillian"
	"github.com/google/trillian/storage"
	"github.com/transparency-dev/merkle/compact"

	"github.com/chancery-ca/chancery/log/store"
)

// maxEntries bounds what one call of Entries returns.
const maxEntries = 1024

// Entries implements Tree. It returns at most 1024 entries. Each one's hash is
// computed from its bytes and compared with the tree.
func (t *logTree) Entries(ctx context.Context, start, count uint64) ([]Entry, error) {
	s := t.state.Load()
	if start >= s.root.Size || count == 0 {
		return nil, fmt.Errorf("read entries from %d: %w", start, ErrNotFound)
	}
	count = min(count, s.root.Size-start, maxEntries)
	var leaves []*trillian.LogLeaf
	err := t.snapshot(ctx, func(tx storage.ReadOnlyLogTreeTX) (err error) {
		leaves, err = tx.GetLeavesByRange(ctx, int64(start), int64(count))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read entries from %d: %w", start, err)
	}
	if len(leaves) == 0 {
		return nil, fmt.Errorf("read entries from %d: none there: %w", start, ErrCorrupt)
	}
	entries := make([]Entry, len(leaves))
	for i, l := range leaves {
		if entries[i], err = t.entry(ctx, s, l); err != nil {
			return nil, fmt.Errorf("read entry %d: %w", start+uint64(i), err)
		}
		if entries[i].Index != start+uint64(i) {
			return nil, fmt.Errorf("read entry %d: got %d: %w", start+uint64(i), entries[i].Index, ErrCorrupt)
		}
	}
	return entries, nil
}

// ByLeafHash implements Tree.
func (t *logTree) ByLeafHash(ctx context.Context, h Hash) (Entry, error) {
	leaves, err := t.leavesByHash(ctx, h)
	if err != nil {
		return Entry{}, fmt.Errorf("look up leaf hash: %w", err)
	}
	s := t.state.Load()
	var first *trillian.LogLeaf
	for _, l := range leaves {
		if l.LeafIndex >= 0 && uint64(l.LeafIndex) < s.root.Size && (first == nil || l.LeafIndex < first.LeafIndex) {
			first = l
		}
	}
	if first == nil {
		return Entry{}, fmt.Errorf("look up leaf hash: %w", ErrNotFound)
	}
	return t.entry(ctx, s, first)
}

// ByIdentity implements Tree.
func (t *logTree) ByIdentity(ctx context.Context, id Hash) (Entry, error) {
	done, err := t.enter()
	if err != nil {
		return Entry{}, err
	}
	defer done()
	leaf, err := t.backend.Identities.LeafByIdentity(ctx, t.meta.TreeId, id[:])
	if err != nil {
		return Entry{}, fmt.Errorf("look up identity: %w", err)
	}
	s := t.state.Load()
	if leaf == nil || leaf.LeafIndex < 0 || uint64(leaf.LeafIndex) >= s.root.Size {
		return Entry{}, fmt.Errorf("look up identity: %w", ErrNotFound)
	}
	if string(leaf.LeafIdentityHash) != string(id[:]) {
		return Entry{}, fmt.Errorf("look up identity: got another leaf: %w", ErrCorrupt)
	}
	return t.entry(ctx, s, leaf)
}

func (t *logTree) leavesByHash(ctx context.Context, h Hash) (leaves []*trillian.LogLeaf, err error) {
	err = t.snapshot(ctx, func(tx storage.ReadOnlyLogTreeTX) (err error) {
		leaves, err = tx.GetLeavesByHash(ctx, [][]byte{h[:]}, true)
		return err
	})
	return leaves, err
}

// maxAttempts bounds how often a read is begun whose snapshot expired before it
// got its turn, which a machine that is short of processors can do to it.
const maxAttempts = 5

// snapshot runs f in a read-only transaction, and again in another one when that
// expired.
func (t *logTree) snapshot(ctx context.Context, f func(storage.ReadOnlyLogTreeTX) error) error {
	done, err := t.enter()
	if err != nil {
		return err
	}
	defer done()
	for n := 1; ; n++ {
		if err := t.inSnapshot(ctx, f); !errors.Is(err, store.ErrSnapshotExpired) || n == maxAttempts {
			return err
		}
	}
}

func (t *logTree) inSnapshot(ctx context.Context, f func(storage.ReadOnlyLogTreeTX) error) error {
	tx, err := t.backend.Log.SnapshotForTree(ctx, t.meta)
	if tx != nil {
		defer func() { _ = tx.Close() }()
	}
	if err != nil {
		return fmt.Errorf("begin snapshot: %w", err)
	}
	if err := f(tx); err != nil {
		return err
	}
	return tx.Commit(ctx)
}

// entry checks a stored leaf against the tree.
func (t *logTree) entry(ctx context.Context, s *state, l *trillian.LogLeaf) (Entry, error) {
	if l.LeafIndex < 0 {
		return Entry{}, fmt.Errorf("leaf index %d: %w", l.LeafIndex, ErrCorrupt)
	}
	e := Entry{Index: uint64(l.LeafIndex), LeafHash: LeafHash(l.LeafValue), Value: l.LeafValue, Extra: l.ExtraData}
	return e, t.check(ctx, s, e)
}

// check compares an entry's hash with the tree's leaf at its index.
func (t *logTree) check(ctx context.Context, s *state, e Entry) error {
	h, err := t.node(ctx, s, compact.NewNodeID(0, e.Index))
	if err != nil {
		return err
	}
	if h != e.LeafHash {
		return fmt.Errorf("entry %d is not the leaf in the tree: %w", e.Index, ErrCorrupt)
	}
	return nil
}
