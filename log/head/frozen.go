package head

import (
	"context"
	"crypto/ecdsa"
	"fmt"

	"github.com/chancery-ca/chancery/log/tree"
)

// Frozen is the last head of a log that takes no more leaves: a shard that has a
// successor. Nothing is signed any more, so no key is needed. It implements
// Publication; it never changes and is safe for concurrent use.
type Frozen struct{ last Signed }

var _ Publication = (*Frozen)(nil)

// OpenFrozen reads the head that is anchored in the file anchor, verifies it
// with the log's public key, and holds the tree against it. format returns how
// the log with an origin writes its heads; the origin is that of the anchored
// head. The file is not locked: nobody writes to it. Errors: ErrAnchor (no file,
// with fs.ErrNotExist; no head in it, damaged, or an accepted loss that nobody
// signed), ErrMismatch, ErrFork when the tree does not give the head's root.
func OpenFrozen(ctx context.Context, t tree.Tree, anchor string, pub *ecdsa.PublicKey, format func(origin string) (Format, error)) (*Frozen, error) {
	state, err := ReadAnchor(anchor)
	if err != nil {
		return nil, err
	}
	rec := state.Record
	if rec.Sequence == 0 || rec.Loss {
		return nil, fmt.Errorf("read anchor %s: no signed head: %w", anchor, ErrAnchor)
	}
	f, err := format(rec.Origin())
	if err != nil {
		return nil, fmt.Errorf("origin of the anchored head: %w: %w", err, ErrMismatch)
	}
	if err := rec.Verify(pub, f); err != nil {
		return nil, err
	}
	root, err := t.RootAt(ctx, rec.Size)
	if err != nil || root != rec.Root {
		return nil, fmt.Errorf("the tree does not give the root of the last head, of size %d: %w", rec.Size, joinFork(err))
	}
	return &Frozen{rec.Signed}, nil
}

// joinFork is ErrFork, with the cause if there is one.
func joinFork(err error) error {
	if err == nil {
		return ErrFork
	}
	return fmt.Errorf("%w: %w", err, ErrFork)
}

// Latest implements Publication.
func (f *Frozen) Latest() Signed { return f.last }

// Await implements Publication. A larger size never comes: ErrClosed.
func (f *Frozen) Await(ctx context.Context, size uint64) (Signed, error) {
	if size > f.last.Size {
		return Signed{}, fmt.Errorf("await a head of size %d of a frozen log of size %d: %w", size, f.last.Size, ErrClosed)
	}
	return f.last, ctx.Err()
}

// Err implements Publication: it is nil, for nothing is to be signed.
func (f *Frozen) Err() error { return nil }
