package tree

import (
	"container/list"
	"sync"
)

const (
	tileHeight = 8               // levels of the tree in one tile
	tileWidth  = 1 << tileHeight // hashes in a full tile
	maxLevel   = 7               // the highest tile level of a tree of 2^64 leaves
)

// tileID names a tile of C2SP tlog-tiles.
type tileID struct {
	level, index uint64
}

// tile is one tile with every node that its hashes determine. Hashes are only
// added, from the left, and never change.
type tile struct {
	index uint64
	width int
	// nodes holds the nodes of relative level 0 (the tile's hashes) to 7, one
	// level after the other: 256, 128, … 2.
	nodes [2*tileWidth - 2]Hash
}

// offset is where relative level k begins in tile.nodes.
func offset(k uint) int { return 2*tileWidth - 2*tileWidth>>k }

// add appends one hash and the nodes that it completes.
func (t *tile) add(h Hash) {
	i := t.width
	t.nodes[i] = h
	for k := uint(1); k < tileHeight && i>>(k-1)&1 == 1; k++ {
		at := offset(k-1) + i>>k*2
		t.nodes[offset(k)+i>>k] = hashChildren(&t.nodes[at], &t.nodes[at+1])
	}
	t.width++
}

// node returns the node at relative level k and position pos, and whether the
// tile has it.
func (t *tile) node(k uint, pos int) (Hash, bool) {
	if (pos+1)<<k > t.width {
		return Hash{}, false
	}
	return t.nodes[offset(k)+pos], true
}

// root returns the node above a full tile.
func (t *tile) root() Hash {
	top := offset(tileHeight - 1)
	return hashChildren(&t.nodes[top], &t.nodes[top+1])
}

// parseTile reads a tile of len(raw)/32 hashes.
func parseTile(index uint64, raw []byte) *tile {
	t := &tile{index: index}
	for ; len(raw) >= HashSize; raw = raw[HashSize:] {
		t.add(Hash(raw))
	}
	return t
}

// bytes returns the first width hashes in the form of C2SP tlog-tiles.
func (t *tile) bytes(width int) []byte {
	b := make([]byte, 0, width*HashSize)
	for i := range width {
		b = append(b, t.nodes[i][:]...)
	}
	return b
}

// edge is the right edge of a tree: for each tile level the tile that is not
// full yet (it may be empty). A published edge is never changed.
type edge struct {
	size  uint64
	tiles [maxLevel + 1]*tile
}

// growth is an edge in the making: a copy of a published edge to which a
// batch is added. Tiles are copied when they are first changed.
type growth struct {
	edge
	own  [maxLevel + 1]bool
	full map[tileID]*tile // the tiles that the batch filled
}

func (e *edge) grow() *growth {
	return &growth{edge: *e, full: map[tileID]*tile{}}
}

// add appends a leaf hash.
func (g *growth) add(h Hash) {
	g.size++
	for level := range g.tiles {
		t := g.mutable(level)
		t.add(h)
		if t.width < tileWidth {
			return
		}
		g.full[tileID{uint64(level), t.index}] = t
		g.tiles[level] = &tile{index: t.index + 1}
		h = t.root()
	}
}

func (g *growth) mutable(level int) *tile {
	old := g.tiles[level]
	if old != nil && g.own[level] {
		return old
	}
	t := &tile{}
	if old != nil {
		*t = *old
	}
	g.tiles[level], g.own[level] = t, true
	return t
}

// root folds the edge from the right: the root of the tree.
func (e *edge) root() Hash {
	if e.size == 0 {
		return EmptyRoot()
	}
	var acc Hash
	have := false
	for level := range e.tiles {
		t := e.tiles[level]
		if t == nil {
			continue
		}
		// The perfect subtrees of a tile of width w are its set bits, the
		// smallest one rightmost.
		for k := uint(0); k < tileHeight; k++ {
			if t.width>>k&1 == 0 {
				continue
			}
			left := t.nodes[offset(k)+(t.width>>k)-1]
			if !have {
				acc, have = left, true
				continue
			}
			acc = hashChildren(&left, &acc)
		}
	}
	return acc
}

// tileCache keeps the full tiles used last. Every tile in it has been checked
// against the tree above it. It is safe for concurrent use.
type tileCache struct {
	mu    sync.Mutex
	limit int
	tiles map[tileID]*list.Element // of cached
	order *list.List               // newest first
}

type cached struct {
	id tileID
	t  *tile
}

func newTileCache(limit int) *tileCache {
	return &tileCache{limit: limit, tiles: make(map[tileID]*list.Element), order: list.New()}
}

func (c *tileCache) get(id tileID) *tile {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.tiles[id]
	if e == nil {
		return nil
	}
	c.order.MoveToFront(e)
	return e.Value.(cached).t
}

func (c *tileCache) put(id tileID, t *tile) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tiles[id] != nil {
		return
	}
	c.tiles[id] = c.order.PushFront(cached{id, t})
	for c.order.Len() > c.limit {
		last := c.order.Remove(c.order.Back()).(cached)
		delete(c.tiles, last.id)
	}
}
