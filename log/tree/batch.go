package tree

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/trillian"
	trillianlog "github.com/google/trillian/log"
	"github.com/google/trillian/quota"
	"github.com/google/trillian/storage"
	"google.golang.org/grpc/codes"
)

// step puts work into the storage's queue and integrates that queue. Callers
// whose leaves did not become durable have been told when it returns an error.
func (t *logTree) step(work []*pending) error {
	queueErr := t.enqueue(work)
	if len(t.stored) == 0 || errors.Is(queueErr, ErrCorrupt) {
		return queueErr
	}
	b, err := t.attempt()
	if err != nil {
		t.setErr(err) // before anybody is told, so that readiness agrees with the answer
		for _, p := range t.stored {
			t.disappoint(p, err)
		}
		return err
	}
	t.publish(b)
	return queueErr
}

// enqueue hands leaves to the storage and answers those that are in the tree
// already and those that the storage refused. One call for the whole batch
// takes the queue's lock and, where identities may exist, a read transaction
// once, and the hash computed at admission serves; Trillian's QueueLeaf would
// do each of these for every leaf, and read the tree's configuration.
func (t *logTree) enqueue(work []*pending) error {
	if len(work) == 0 {
		return nil
	}
	queued, err := t.offer(work)
	if err != nil {
		t.setErr(err)
		for _, p := range work {
			t.finish(p, Entry{}, false, err)
		}
		return err
	}
	for i, p := range work {
		if e := t.queued(p, queued[i]); e != nil {
			t.finish(p, Entry{}, false, e)
			err = e
		}
	}
	return err
}

// offer calls QueueLeaves. The storage gets its own structs: it keeps them.
func (t *logTree) offer(work []*pending) ([]*trillian.QueuedLogLeaf, error) {
	leaves := make([]*trillian.LogLeaf, len(work))
	for i, p := range work {
		leaves[i] = &trillian.LogLeaf{
			MerkleLeafHash:   p.hash[:],
			LeafValue:        p.leaf.Value,
			ExtraData:        p.leaf.Extra,
			LeafIdentityHash: p.id[:],
		}
	}
	queued, err := t.backend.Log.QueueLeaves(t.ctx, t.meta, leaves, t.clock.Now())
	if err != nil {
		return nil, fmt.Errorf("queue leaves: %w: %w", err, ErrStorage)
	}
	if len(queued) != len(work) {
		return nil, fmt.Errorf("queue leaves: %d results for %d: %w", len(queued), len(work), ErrStorage)
	}
	return queued, nil
}

// queued looks at the storage's answer for one leaf.
func (t *logTree) queued(p *pending, q *trillian.QueuedLogLeaf) error {
	switch code := codes.Code(q.GetStatus().GetCode()); code {
	case codes.OK:
		t.stored[p.id] = p
		return nil
	case codes.AlreadyExists:
		entry, err := t.existing(t.ctx, p.id, q.GetLeaf())
		if errors.Is(err, ErrNotFound) {
			// It is in the storage's queue: it will be in the next batch.
			t.stored[p.id] = p
			return nil
		}
		if err != nil {
			return err
		}
		t.finish(p, entry, true, nil)
		return nil
	default:
		return fmt.Errorf("queue leaf: %s: %s: %w", code, q.GetStatus().GetMessage(), ErrStorage)
	}
}

// existing turns the leaf that the storage says to have into an entry. The
// storage is not believed: the hash is computed from the leaf's bytes and
// must be in the tree at the leaf's index (MySQL's driver returns another).
func (t *logTree) existing(ctx context.Context, id Hash, leaf *trillian.LogLeaf) (Entry, error) {
	if string(leaf.GetLeafIdentityHash()) != string(id[:]) {
		return Entry{}, fmt.Errorf("look up identity: got another leaf: %w", ErrCorrupt)
	}
	entry := Entry{LeafHash: LeafHash(leaf.GetLeafValue()), Value: leaf.GetLeafValue(), Extra: leaf.GetExtraData()}
	s := t.state.Load()
	if leaf.GetLeafIndex() >= 0 && uint64(leaf.GetLeafIndex()) < s.root.Size {
		entry.Index = uint64(leaf.GetLeafIndex())
		switch err := t.check(ctx, s, entry); {
		case err == nil:
			return entry, nil
		case !errors.Is(err, ErrCorrupt):
			return Entry{}, err
		}
	}
	found, err := t.leavesByHash(ctx, entry.LeafHash)
	if err != nil {
		return Entry{}, err
	}
	for _, l := range found {
		if string(l.LeafIdentityHash) == string(id[:]) {
			return t.entry(ctx, t.state.Load(), l)
		}
	}
	return Entry{}, ErrNotFound
}

// batch is what one transaction did.
type batch struct {
	edge   *growth
	root   Root
	leaves []*trillian.LogLeaf
	err    error // the reason when we, not the storage, refused
}

// attempt integrates the storage's queue in one transaction.
func (t *logTree) attempt() (*batch, error) {
	if t.doubt != nil {
		switch done, err := t.committed(t.doubt); {
		case err != nil:
			return nil, err
		case done:
			return t.doubt, nil
		}
		t.doubt = nil
	}
	b := &batch{}
	ls := checkedStorage{LogStorage: t.backend.Log, tree: t, batch: b}
	_, err := trillianlog.IntegrateBatch(t.ctx, t.meta, t.cfg.MaxBatch, 0, 0, t.clock, ls, quota.Noop())
	switch {
	case b.err != nil:
		return nil, b.err
	case err == nil && b.edge == nil:
		// The storage lost its queue. It is filled anew when callers repeat.
		return nil, t.forget()
	case err == nil:
		return b, nil
	}
	err = fmt.Errorf("integrate batch: %w: %w", err, ErrStorage)
	if b.edge != nil {
		t.doubt = b
		if done, cerr := t.committed(b); cerr == nil && done {
			return b, nil
		}
	}
	return nil, err
}

// forget answers the leaves that the storage accepted and does not have.
func (t *logTree) forget() error {
	err := fmt.Errorf("%d queued leaves are gone: %w", len(t.stored), ErrStorage)
	for id, p := range t.stored {
		t.finish(p, Entry{}, false, err)
		delete(t.stored, id)
	}
	return err
}

// committed reports whether the storage has the batch after all.
func (t *logTree) committed(b *batch) (bool, error) {
	tx, err := t.backend.Log.SnapshotForTree(t.ctx, t.meta)
	if tx != nil {
		defer func() { _ = tx.Close() }()
	}
	if err != nil {
		return false, fmt.Errorf("read root: %w: %w", err, ErrStorage)
	}
	slr, err := tx.LatestSignedLogRoot(t.ctx)
	if err != nil {
		return false, fmt.Errorf("read root: %w: %w", err, ErrStorage)
	}
	root, err := parseRoot(slr)
	if err != nil {
		return false, err
	}
	return root == b.root, nil
}

// publish makes a durable batch visible and answers its callers.
func (t *logTree) publish(b *batch) {
	t.doubt = nil
	for id, tl := range b.edge.full {
		t.cache.put(id, tl)
	}
	old := t.state.Swap(&state{root: b.root, edge: &b.edge.edge, changed: make(chan struct{})})
	close(old.changed)
	for _, l := range b.leaves {
		id := Hash(l.LeafIdentityHash)
		p := t.stored[id]
		if p == nil {
			continue
		}
		delete(t.stored, id)
		t.finish(p, Entry{
			Index:    uint64(l.LeafIndex),
			LeafHash: p.hash,
			Value:    p.leaf.Value,
			Extra:    p.leaf.Extra,
		}, false, nil)
	}
}

// checkedStorage is the storage as IntegrateBatch sees it in one attempt.
type checkedStorage struct {
	storage.LogStorage
	tree  *logTree
	batch *batch
}

// ReadWriteTransaction implements storage.LogStorage.
func (s checkedStorage) ReadWriteTransaction(ctx context.Context, meta *trillian.Tree, f storage.LogTXFunc) error {
	return s.LogStorage.ReadWriteTransaction(ctx, meta, func(ctx context.Context, tx storage.LogTreeTX) error {
		*s.batch = batch{} // the storage may call again
		return f(ctx, &checkedTX{LogTreeTX: tx, tree: s.tree, batch: s.batch})
	})
}

// checkedTX is the transaction of a batch. It lets nothing into the tree that
// does not fit: the root before must be the one we know, each leaf hash that
// of the leaf's bytes, and the root after the one that we compute ourselves.
type checkedTX struct {
	storage.LogTreeTX
	tree  *logTree
	batch *batch
}

// refuse remembers why, because IntegrateBatch does not wrap errors.
func (tx *checkedTX) refuse(format string, args ...any) error {
	tx.batch.err = fmt.Errorf(format+": %w", append(args, ErrCorrupt)...)
	return tx.batch.err
}

// LatestSignedLogRoot implements storage.LogTreeTX.
func (tx *checkedTX) LatestSignedLogRoot(ctx context.Context) (*trillian.SignedLogRoot, error) {
	slr, err := tx.LogTreeTX.LatestSignedLogRoot(ctx)
	if err != nil {
		return nil, err
	}
	root, err := parseRoot(slr)
	if err != nil {
		return nil, tx.refuse("%s", err)
	}
	if known := tx.tree.Root(); root != known {
		return nil, tx.refuse("root of %d leaves changed beneath us, we know %d", root.Size, known.Size)
	}
	return slr, nil
}

// DequeueLeaves implements storage.LogTreeTX.
func (tx *checkedTX) DequeueLeaves(ctx context.Context, limit int, cutoff time.Time) ([]*trillian.LogLeaf, error) {
	leaves, err := tx.LogTreeTX.DequeueLeaves(ctx, limit, cutoff)
	if err != nil {
		return nil, err
	}
	for _, l := range leaves {
		if h := LeafHash(l.LeafValue); string(l.MerkleLeafHash) != string(h[:]) {
			return nil, tx.refuse("queued leaf hash %x is not that of its bytes", l.MerkleLeafHash)
		}
		if len(l.LeafIdentityHash) != HashSize {
			return nil, tx.refuse("queued identity of %d octets", len(l.LeafIdentityHash))
		}
	}
	return leaves, nil
}

// UpdateSequencedLeaves implements storage.LogTreeTX. Here the leaves have
// their indexes.
func (tx *checkedTX) UpdateSequencedLeaves(ctx context.Context, leaves []*trillian.LogLeaf) error {
	if err := tx.LogTreeTX.UpdateSequencedLeaves(ctx, leaves); err != nil {
		return err
	}
	g := tx.tree.state.Load().edge.grow()
	for _, l := range leaves {
		if l.LeafIndex < 0 || uint64(l.LeafIndex) != g.size {
			return tx.refuse("leaf has index %d, want %d", l.LeafIndex, g.size)
		}
		g.add(Hash(l.MerkleLeafHash))
	}
	tx.batch.edge, tx.batch.leaves = g, leaves
	return nil
}

// StoreSignedLogRoot implements storage.LogTreeTX.
func (tx *checkedTX) StoreSignedLogRoot(ctx context.Context, slr *trillian.SignedLogRoot) error {
	root, err := parseRoot(slr)
	if err != nil {
		return tx.refuse("%s", err)
	}
	if g := tx.batch.edge; g == nil || root.Size != g.size || root.Hash != g.root() {
		return tx.refuse("root of %d leaves is not the one we computed", root.Size)
	}
	tx.batch.root = root
	return tx.LogTreeTX.StoreSignedLogRoot(ctx, slr)
}
