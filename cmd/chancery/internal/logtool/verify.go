package logtool

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"

	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/tree"
)

var ranges = compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}

// rootAt computes the root of the first size leaves from the tiles at the
// right edge of a tree of that size.
func (f *files) rootAt(ctx context.Context, id int64, size uint64) (tree.Hash, error) {
	var tiles [][]byte
	for level, n := uint64(0), size; n > 0; level, n = level+1, n/tree.TileWidth {
		var tile []byte
		if width := n % tree.TileWidth; width > 0 {
			var err error
			if tile, err = f.ReadTile(ctx, id, level, n/tree.TileWidth, int(width)); err != nil {
				return tree.Hash{}, fmt.Errorf("compute root of %d leaves: tile %d/%d: %w", size, level, n/tree.TileWidth, named(err))
			}
		}
		tiles = append(tiles, tile)
	}
	return fold(tiles)
}

// fold computes the root from the partial tiles of the right edge, level 0
// first.
func fold(tiles [][]byte) (tree.Hash, error) {
	root := []byte(nil)
	for _, tile := range tiles {
		if len(tile) == 0 {
			continue
		}
		nodes, err := subtrees(tile)
		if err != nil {
			return tree.Hash{}, err
		}
		for i := len(nodes) - 1; i >= 0; i-- {
			if root == nil {
				root = nodes[i]
				continue
			}
			root = rfc6962.DefaultHasher.HashChildren(nodes[i], root)
		}
	}
	if root == nil {
		return tree.EmptyRoot(), nil
	}
	return tree.Hash(root), nil
}

// subtrees returns the roots of the perfect subtrees of a tile, left to right:
// one for a full tile.
func subtrees(tile []byte) ([][]byte, error) {
	r := ranges.NewEmptyRange(0)
	for ; len(tile) >= tree.HashSize; tile = tile[tree.HashSize:] {
		if err := r.Append(tile[:tree.HashSize:tree.HashSize], nil); err != nil {
			return nil, fmt.Errorf("hash tile: %w", err)
		}
	}
	return r.Hashes(), nil
}

// sink receives what a walk has read. Tiles come when their content agrees
// with what is below them; only the walk's root proves them all.
type sink interface {
	tile(level, index uint64, hashes []byte) error
	entries(index uint64, entries []tree.Entry) error
}

// walk reads a tree from left to right and proves it: each leaf's octets give
// its hash in level 0, each tile gives its hash in the level above, and the
// partial tiles at the edge give the root, which is returned.
type walk struct {
	f    *files
	id   int64
	size uint64
	// from is the first leaf whose octets are read. Of those before it the
	// stored hashes are taken.
	from uint64
	sink sink // may be nil
	add  func(leaves int)

	// above[k] holds the hashes of level k+1 that the walk computed and that do
	// not fill a tile yet.
	above [][]byte
}

func (w *walk) run(ctx context.Context) (tree.Hash, error) {
	for index := uint64(0); index*tree.TileWidth < w.size; index++ {
		if err := ctx.Err(); err != nil {
			return tree.Hash{}, err
		}
		width := min(w.size-index*tree.TileWidth, tree.TileWidth)
		hashes, err := w.leaves(ctx, index, int(width))
		if err == nil {
			err = w.put(ctx, 0, index, hashes)
		}
		if err != nil {
			return tree.Hash{}, err
		}
		w.add(int(width))
	}
	return w.finish(ctx)
}

// leaves returns a tile of level 0, computed from the entries.
func (w *walk) leaves(ctx context.Context, index uint64, width int) ([]byte, error) {
	first := index * tree.TileWidth
	if first+uint64(width) <= w.from {
		stored, err := w.f.ReadTile(ctx, w.id, 0, index, width)
		if err != nil {
			return nil, fmt.Errorf("tile 0/%d: %w", index, named(err))
		}
		return stored, nil
	}
	entries, err := w.read(ctx, first, width)
	if err != nil {
		return nil, err
	}
	hashes := make([]byte, 0, width*tree.HashSize)
	for _, e := range entries {
		hashes = append(hashes, e.LeafHash[:]...)
	}
	if w.sink != nil {
		return hashes, w.sink.entries(index, entries)
	}
	return hashes, nil
}

// read reads entries and computes their leaf hashes.
func (w *walk) read(ctx context.Context, first uint64, count int) ([]tree.Entry, error) {
	entries := make([]tree.Entry, 0, count)
	for len(entries) < count {
		next := first + uint64(len(entries))
		leaves, err := w.f.Entries(ctx, w.id, next, uint64(count-len(entries)))
		if err != nil {
			return nil, fmt.Errorf("entries from %d: %w", next, named(err))
		}
		if len(leaves) == 0 || len(leaves) > count-len(entries) {
			return nil, fmt.Errorf("entries from %d: %d were read: %w", next, len(leaves), ErrDamaged)
		}
		for i, l := range leaves {
			if l.LeafIndex != int64(next)+int64(i) {
				return nil, fmt.Errorf("entry %d: found %d in its place: %w", next+uint64(i), l.LeafIndex, ErrDamaged)
			}
			entries = append(entries, tree.Entry{
				Index: next + uint64(i), LeafHash: tree.LeafHash(l.LeafValue), Value: l.LeafValue, Extra: l.ExtraData,
			})
		}
	}
	return entries, nil
}

// put compares a computed tile with the stored one, and passes its root up
// when it is full.
func (w *walk) put(ctx context.Context, level, index uint64, hashes []byte) error {
	stored, err := w.f.ReadTile(ctx, w.id, level, index, len(hashes)/tree.HashSize)
	if err != nil {
		return fmt.Errorf("tile %d/%d: %w", level, index, named(err))
	}
	if !bytes.Equal(stored, hashes) {
		return w.differ(ctx, level, index, stored, hashes)
	}
	if w.sink != nil {
		if err := w.sink.tile(level, index, hashes); err != nil {
			return err
		}
	}
	if len(hashes) < tree.TileWidth*tree.HashSize {
		w.keep(level, hashes)
		return nil
	}
	nodes, err := subtrees(hashes)
	if err != nil {
		return err
	}
	w.keep(level, nil)
	up := append(w.pending(level+1), nodes[0]...)
	if len(up) < tree.TileWidth*tree.HashSize {
		w.keep(level+1, up)
		return nil
	}
	return w.put(ctx, level+1, index/tree.TileWidth, up)
}

func (w *walk) pending(level uint64) []byte {
	if level < uint64(len(w.above)) {
		return w.above[level]
	}
	return nil
}

func (w *walk) keep(level uint64, hashes []byte) {
	for uint64(len(w.above)) <= level {
		w.above = append(w.above, nil)
	}
	w.above[level] = hashes
}

// differ says which of two hashes is wrong, as far as a full tile's parent
// tells.
func (w *walk) differ(ctx context.Context, level, index uint64, stored, computed []byte) error {
	at := 0
	for bytes.Equal(stored[at:at+tree.HashSize], computed[at:at+tree.HashSize]) {
		at += tree.HashSize
	}
	number := index*tree.TileWidth + uint64(at/tree.HashSize)
	below := fmt.Sprintf("tile %d/%d", level-1, number)
	if level == 0 {
		below = fmt.Sprintf("entry %d", number)
	}
	here := fmt.Sprintf("tile %d/%d", level, index)
	if len(computed) == tree.TileWidth*tree.HashSize {
		parent, err := w.f.ReadTile(ctx, w.id, level+1, index/tree.TileWidth, int(index%tree.TileWidth)+1)
		if err == nil {
			parent = parent[len(parent)-tree.HashSize:]
			if nodes, err := subtrees(stored); err == nil && bytes.Equal(nodes[0], parent) {
				return fmt.Errorf("%s does not hash to what %s and the tile above have: %w", below, here, ErrDamaged)
			}
			if nodes, err := subtrees(computed); err == nil && bytes.Equal(nodes[0], parent) {
				return fmt.Errorf("%s, hash %d does not fit %s, which fits the tile above: %w", here, at/tree.HashSize, below, ErrDamaged)
			}
		}
	}
	return fmt.Errorf("%s does not hash to hash %d of %s: %w", below, at/tree.HashSize, here, ErrDamaged)
}

// finish compares the partial tiles above level 0 and computes the root.
func (w *walk) finish(ctx context.Context) (tree.Hash, error) {
	for level := uint64(1); level < uint64(len(w.above)); level++ {
		hashes := w.above[level]
		if len(hashes) == 0 {
			continue
		}
		if err := w.put(ctx, level, (w.size>>(8*level))/tree.TileWidth, hashes); err != nil {
			return tree.Hash{}, err
		}
	}
	return fold(w.above)
}

// Result is what a verification proved.
type Result struct {
	*Status
	// Leaves is how many leaves were hashed from their octets.
	Leaves uint64
}

// Verify checks all that is stored of a log: the anchor's slots, key,
// signature and origin; every row of the database; every leaf from the first
// one named on from its octets; every tile; the root; and that the anchored
// head is of this tree. Errors: ErrDamaged, ErrNotProven, ErrFrozen; the text
// names the thing. Of a log that is Absent nothing is checked. Of leaves before from, which an earlier Verify has proven, only the
// hashes are used.
func (l Log) Verify(ctx context.Context, from uint64, p Progress) (*Result, error) {
	anchor, anchorErr := head.ReadAnchor(l.Anchor)
	f, err := openFiles(l.Dir)
	if err != nil {
		return nil, fmt.Errorf("log %s: %w", l.Name, err)
	}
	r, err := l.verify(ctx, f, anchor, anchorErr, from, p)
	if err != nil {
		err = fmt.Errorf("log %s: %w", l.Name, err)
	}
	return r, errors.Join(err, f.Close())
}

func (l Log) verify(ctx context.Context, f *files, anchor head.AnchorState, anchorErr error, from uint64, p Progress) (*Result, error) {
	s, err := l.check(ctx, f, anchor, anchorErr)
	if err != nil {
		return nil, err
	}
	r := &Result{Status: s}
	if s.State == Absent || s.id == 0 {
		return r, s.Err()
	}
	if from > s.Tree.Size {
		return r, fmt.Errorf("from leaf %d of %d: beyond the tree: %w", from, s.Tree.Size, ErrNotProven)
	}
	// Everything that is wrong is named, not the first thing only.
	errs := []error{l.proveTree(ctx, f, s, from, nil, p)}
	if err := s.Err(); err != nil {
		errs = append(errs, fmt.Errorf("anchor: %w", err))
	}
	for _, slot := range s.DamagedSlots {
		errs = append(errs, fmt.Errorf("anchor: slot %d is damaged, by rot or by a crash before the next head: %w", slot, ErrDamaged))
	}
	if err := f.Check(ctx, s.id); err != nil {
		errs = append(errs, named(err))
	}
	r.Leaves = s.Tree.Size - from/tree.TileWidth*tree.TileWidth
	return r, errors.Join(errs...)
}

// proveTree walks the whole tree and compares its roots.
func (l Log) proveTree(ctx context.Context, f *files, s *Status, from uint64, to sink, p Progress) error {
	root, err := l.walk(ctx, f, s, s.Tree.Size, from, to, p)
	if err != nil {
		return err
	}
	if root != tree.Hash(s.Tree.Root) {
		return fmt.Errorf("root: the tiles give %x, stored is %s: %w", root, s.Tree.Root, ErrDamaged)
	}
	return nil
}

func (l Log) walk(ctx context.Context, f *files, s *Status, size, from uint64, to sink, p Progress) (tree.Hash, error) {
	add, done := p.Begin(l.Name, size)
	defer done()
	w := &walk{f: f, id: s.id, size: size, from: from, sink: to, add: add}
	return w.run(ctx)
}
