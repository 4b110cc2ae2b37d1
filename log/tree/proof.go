package tree

import (
	"context"
	"fmt"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/proof"
)

// InclusionProof implements Tree. For a leaf near the right edge it reads
// memory alone.
func (t *logTree) InclusionProof(ctx context.Context, index, size uint64) ([]Hash, error) {
	s := t.state.Load()
	if size > s.root.Size || index >= size {
		return nil, fmt.Errorf("prove leaf %d in %d: %w", index, size, ErrNotFound)
	}
	n, err := proof.Inclusion(index, size)
	if err != nil {
		return nil, fmt.Errorf("prove leaf %d in %d: %w", index, size, err)
	}
	return t.hashes(ctx, s, n)
}

// ConsistencyProof implements Tree.
func (t *logTree) ConsistencyProof(ctx context.Context, first, second uint64) ([]Hash, error) {
	s := t.state.Load()
	if second > s.root.Size || first > second {
		return nil, fmt.Errorf("prove %d in %d: %w", first, second, ErrNotFound)
	}
	n, err := proof.Consistency(first, second)
	if err != nil {
		return nil, fmt.Errorf("prove %d in %d: %w", first, second, err)
	}
	return t.hashes(ctx, s, n)
}

// RootAt implements Tree.
func (t *logTree) RootAt(ctx context.Context, size uint64) (Hash, error) {
	s := t.state.Load()
	switch {
	case size > s.root.Size:
		return Hash{}, fmt.Errorf("compute root of %d: %w", size, ErrNotFound)
	case size == s.root.Size:
		return s.root.Hash, nil
	case size == 0:
		return EmptyRoot(), nil
	}
	return t.fold(ctx, s, reversed(compact.RangeNodes(0, size, nil)))
}

// Tile implements Tree. The hashes have been checked against the root.
func (t *logTree) Tile(ctx context.Context, level, index uint64, width int) ([]byte, error) {
	s := t.state.Load()
	if width < 1 || width > tileWidth || level > maxLevel {
		return nil, fmt.Errorf("read tile %d/%d.p/%d: %w", level, index, width, ErrNotFound)
	}
	filled := s.root.Size >> (tileHeight * level)
	if index > filled/tileWidth || index == filled/tileWidth && uint64(width) > filled%tileWidth {
		return nil, fmt.Errorf("read tile %d/%d.p/%d: %w", level, index, width, ErrNotFound)
	}
	tl, err := t.tile(ctx, s, tileID{level, index})
	if err != nil {
		return nil, err
	}
	return tl.bytes(width), nil
}

// hashes builds the proof that n describes.
func (t *logTree) hashes(ctx context.Context, s *state, n proof.Nodes) ([]Hash, error) {
	_, begin, end := n.Ephem()
	out := make([]Hash, 0, len(n.IDs))
	for i := 0; i < len(n.IDs); i++ {
		ids := n.IDs[i : i+1]
		if i == begin && begin < end {
			ids = n.IDs[begin:end]
			i = end - 1
		}
		h, err := t.fold(ctx, s, ids)
		if err != nil {
			return nil, err
		}
		out = append(out, h)
	}
	return out, nil
}

// fold hashes perfect subtrees, given from the rightmost to the leftmost, into
// the node above them.
func (t *logTree) fold(ctx context.Context, s *state, ids []compact.NodeID) (Hash, error) {
	acc, err := t.node(ctx, s, ids[0])
	if err != nil {
		return Hash{}, err
	}
	for _, id := range ids[1:] {
		left, err := t.node(ctx, s, id)
		if err != nil {
			return Hash{}, err
		}
		acc = hashChildren(&left, &acc)
	}
	return acc, nil
}

func reversed(ids []compact.NodeID) []compact.NodeID {
	for i, j := 0, len(ids)-1; i < j; i, j = i+1, j-1 {
		ids[i], ids[j] = ids[j], ids[i]
	}
	return ids
}

// node returns one node of the tree of state s.
func (t *logTree) node(ctx context.Context, s *state, id compact.NodeID) (Hash, error) {
	k := id.Level % tileHeight
	at := tileID{uint64(id.Level / tileHeight), id.Index >> (tileHeight - k)}
	tl, err := t.tile(ctx, s, at)
	if err != nil {
		return Hash{}, err
	}
	h, ok := tl.node(k, int(id.Index&(1<<(tileHeight-k)-1)))
	if !ok {
		return Hash{}, fmt.Errorf("read node %d/%d: %w", id.Level, id.Index, ErrNotFound)
	}
	return h, nil
}

// tile returns a tile of the tree of state s: from the edge, from the cache,
// or from the storage, which is believed only if the tile's root is the hash
// in the tile above. The edge, where this ends, fits the root.
func (t *logTree) tile(ctx context.Context, s *state, id tileID) (*tile, error) {
	if id.level > maxLevel {
		return nil, fmt.Errorf("read tile %d/%d: %w", id.level, id.index, ErrNotFound)
	}
	if e := s.edge.tiles[id.level]; e != nil && e.index == id.index {
		return e, nil
	}
	if id.index >= s.root.Size>>(tileHeight*id.level)/tileWidth {
		return nil, fmt.Errorf("read tile %d/%d: %w", id.level, id.index, ErrNotFound)
	}
	if tl := t.cache.get(id); tl != nil {
		return tl, nil
	}
	raw, err := t.read(ctx, id, tileWidth)
	if err != nil {
		return nil, err
	}
	tl := parseTile(id.index, raw)
	above, err := t.node(ctx, s, compact.NewNodeID(uint(id.level+1)*tileHeight, id.index))
	if err != nil {
		return nil, err
	}
	if tl.root() != above {
		return nil, fmt.Errorf("read tile %d/%d: %w", id.level, id.index, ErrCorrupt)
	}
	t.cache.put(id, tl)
	return tl, nil
}

// read gets the bytes of a tile from the storage.
func (t *logTree) read(ctx context.Context, id tileID, width int) ([]byte, error) {
	done, err := t.enter()
	if err != nil {
		return nil, err
	}
	defer done()
	raw, err := t.backend.Tiles.ReadTile(ctx, t.meta.TreeId, id.level, id.index, width)
	if err != nil {
		return nil, fmt.Errorf("read tile %d/%d: %w", id.level, id.index, err)
	}
	if len(raw) != width*HashSize {
		return nil, fmt.Errorf("read tile %d/%d: %d octets, want %d: %w", id.level, id.index, len(raw), width*HashSize, ErrCorrupt)
	}
	return raw, nil
}

// loadEdge reads the right edge of a tree of the given size.
func (t *logTree) loadEdge(ctx context.Context, size uint64) (*edge, error) {
	e := &edge{size: size}
	for level := range e.tiles {
		filled := size >> (tileHeight * level)
		if filled == 0 && level > 0 {
			break
		}
		id := tileID{uint64(level), filled / tileWidth}
		width := int(filled % tileWidth)
		if width == 0 {
			e.tiles[level] = &tile{index: id.index}
			continue
		}
		raw, err := t.read(ctx, id, width)
		if err != nil {
			return nil, err
		}
		e.tiles[level] = parseTile(id.index, raw)
	}
	return e, nil
}
