package head

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync/atomic"

	"github.com/chancery-ca/chancery/log/tree"
)

// A latched Publisher signs nothing and lets nothing be appended, until an
// operator has acted and the process starts anew. It does not stop the
// service: the anchored head stays published, and what the tree proves to
// belong to that head stays readable.
//
// A Publisher latches
//
//   - at Open, when the tree is behind the anchored head or beside it;
//   - at Open, when the anchor is missing or both its slots are damaged: then
//     there is no head that anything could be proven against;
//   - at Open, when the anchor is not of the hardware counter's epoch;
//   - in its run, when the tree no longer extends the last head, or the counter
//     moves by another's hand.
//
// An anchor of another key, origin or format is no such case: the
// configuration names the wrong log, and Open fails with ErrMismatch.
//
// The operator finds the right database, which is proven at the next start, or
// accepts the loss (AcceptLoss).
type latch struct {
	// closed is set once and never reset.
	closed atomic.Bool
	// proven: the tree gives the root of the head that Latest returns. Set
	// before closed.
	proven atomic.Bool
}

// lost is the anchor of a Publisher whose anchor is missing.
type lost struct{}

func (lost) Load() (Record, bool, error) { return Record{}, false, nil }
func (lost) Store(Record) error          { return fmt.Errorf("write anchor: %w", ErrAnchor) }
func (lost) Close() error                { return nil }

// isLost says whether err means that the anchor's content is gone, not merely
// out of reach.
func isLost(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrDamaged)
}

// lossOf is why a log whose anchor is gone is latched.
func lossOf(err error) error {
	return fmt.Errorf("no head to compare the tree with: %w: %w", err, ErrFork)
}

// latchOn makes the Publisher read-only because of err, which is ErrFork.
func (p *Publisher) latchOn(ctx context.Context, err error, root tree.Root) {
	h := p.Latest()
	if len(h.Signature) > 0 {
		got, e := p.cfg.Tree.RootAt(ctx, h.Size)
		p.latched.proven.Store(e == nil && got == h.Root)
	}
	p.mu.Lock()
	p.err = err
	p.mu.Unlock()
	p.latched.closed.Store(true)
	p.cfg.Logger.Error("log is read-only until an operator decides: see chancery log status",
		"size", h.Size, "tree_size", root.Size, "readable", p.latched.proven.Load(), "error", err)
	p.answer(^uint64(0), outcome{err: err})
}

// forked returns the error of a latched Publisher, or nil.
func (p *Publisher) forked() error {
	if !p.latched.closed.Load() {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if errors.Is(p.err, ErrFork) {
		return p.err
	}
	return ErrFork
}

// unproven returns the error of a latched Publisher whose tree does not give
// the root of its head, or nil.
func (p *Publisher) unproven() error {
	if p.latched.proven.Load() {
		return nil
	}
	return p.forked()
}

// Tree returns the log as front ends are to see it. When the Publisher is
// latched, Append fails with ErrFork before anything is queued, and so do all
// reads unless the tree gives the root of the head that Latest returns.
func (p *Publisher) Tree() tree.Tree { return guarded{p.cfg.Tree, p} }

type guarded struct {
	tree.Tree
	p *Publisher
}

// Append implements tree.Tree. A leaf that was on its way when the Publisher
// latched may be in the tree, but its caller is not told so: no head will have
// it.
func (g guarded) Append(ctx context.Context, leaf tree.Leaf) (tree.Entry, bool, error) {
	if err := g.p.forked(); err != nil {
		return tree.Entry{}, false, fmt.Errorf("append: %w", err)
	}
	entry, existed, err := g.Tree.Append(ctx, leaf)
	if forked := g.p.forked(); forked != nil {
		return tree.Entry{}, false, fmt.Errorf("append: %w", forked)
	}
	return entry, existed, err
}

// InclusionProof implements tree.Tree.
func (g guarded) InclusionProof(ctx context.Context, index, size uint64) ([]tree.Hash, error) {
	if err := g.p.unproven(); err != nil {
		return nil, fmt.Errorf("prove inclusion: %w", err)
	}
	return g.Tree.InclusionProof(ctx, index, size)
}

// ConsistencyProof implements tree.Tree.
func (g guarded) ConsistencyProof(ctx context.Context, first, second uint64) ([]tree.Hash, error) {
	if err := g.p.unproven(); err != nil {
		return nil, fmt.Errorf("prove consistency: %w", err)
	}
	return g.Tree.ConsistencyProof(ctx, first, second)
}

// RootAt implements tree.Tree.
func (g guarded) RootAt(ctx context.Context, size uint64) (tree.Hash, error) {
	if err := g.p.unproven(); err != nil {
		return tree.Hash{}, fmt.Errorf("compute root: %w", err)
	}
	return g.Tree.RootAt(ctx, size)
}

// Entries implements tree.Tree.
func (g guarded) Entries(ctx context.Context, start, count uint64) ([]tree.Entry, error) {
	if err := g.p.unproven(); err != nil {
		return nil, fmt.Errorf("read entries: %w", err)
	}
	return g.Tree.Entries(ctx, start, count)
}

// ByLeafHash implements tree.Tree.
func (g guarded) ByLeafHash(ctx context.Context, h tree.Hash) (tree.Entry, error) {
	if err := g.p.unproven(); err != nil {
		return tree.Entry{}, fmt.Errorf("look up leaf hash: %w", err)
	}
	return g.Tree.ByLeafHash(ctx, h)
}

// ByIdentity implements tree.Tree.
func (g guarded) ByIdentity(ctx context.Context, id tree.Hash) (tree.Entry, error) {
	if err := g.p.unproven(); err != nil {
		return tree.Entry{}, fmt.Errorf("look up identity: %w", err)
	}
	return g.Tree.ByIdentity(ctx, id)
}

// Tile implements tree.Tree.
func (g guarded) Tile(ctx context.Context, level, index uint64, width int) ([]byte, error) {
	if err := g.p.unproven(); err != nil {
		return nil, fmt.Errorf("read tile: %w", err)
	}
	return g.Tree.Tile(ctx, level, index, width)
}
