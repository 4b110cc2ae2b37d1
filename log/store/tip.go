package store

import (
	"context"
	"database/sql/driver"
	"encoding/binary"
	"fmt"
	"math"
	"slices"

	"github.com/google/trillian/types"
)

const (
	hashSize = 32
	// runHashes is how many hashes a run holds; a tile is four runs.
	runHashes  = 64
	runSize    = runHashes * hashSize
	tileHashes = 256
	// levels counts the levels of hashes: −1 (identities) and 0 to 7 (tiles).
	levels     = 9
	identities = -1
	leafHashes = 0
	// never is tip.distinct while every identity is its leaf hash.
	never = math.MaxUint64
)

// edge is the right end of one level: how many hashes the level has, and those
// of the last, partial run.
type edge struct {
	count   uint64
	partial []byte // (count mod 64) × 32 octets
}

// tip is one committed state of a tree. It is never changed once built.
type tip struct {
	root     []byte // the marshalled LogRootV1, nil before the first
	size     uint64 // TreeSize of root
	entries  uint64 // entries stored, from index 0 without a gap
	distinct uint64 // first run of level −1 that is stored, or never
	edges    [levels]edge
}

func (t *tip) edge(level int) *edge { return &t.edges[level+1] }

// identityLevel returns the level that holds the identity of entry index.
func (t *tip) identityLevel(index uint64) int {
	if index/runHashes >= t.distinct {
		return identities
	}
	return leafHashes
}

// runID is the key of a full run in the table runs.
func runID(level int, run uint64) int64 { return int64(uint64(level+1)<<58 | run) }

// Slots of the table tip.
const slotState = 0

func slotOf(level int) int64 { return int64(level + 2) }

const stateHeader = 16

// encodeState is slot 0: entries, distinct (uint64, big endian), root.
func (t *tip) encodeState() []byte {
	b := make([]byte, stateHeader, stateHeader+len(t.root))
	binary.BigEndian.PutUint64(b, t.entries)
	binary.BigEndian.PutUint64(b[8:], t.distinct)
	return append(b, t.root...)
}

func (t *tip) decodeState(b []byte) error {
	if len(b) < stateHeader {
		return fmt.Errorf("parse state: %w", ErrCorrupt)
	}
	t.entries = binary.BigEndian.Uint64(b)
	t.distinct = binary.BigEndian.Uint64(b[8:])
	if len(b) == stateHeader {
		return nil
	}
	return t.setRoot(b[stateHeader:])
}

func (t *tip) setRoot(root []byte) error {
	var r types.LogRootV1
	if err := r.UnmarshalBinary(root); err != nil {
		return fmt.Errorf("parse root: %w: %w", ErrCorrupt, err)
	}
	t.root, t.size = root, r.TreeSize
	return nil
}

// encode is the slot of a level: count (uint64, big endian), partial.
func (e *edge) encode() []byte {
	return append(binary.BigEndian.AppendUint64(make([]byte, 0, 8+len(e.partial)), e.count), e.partial...)
}

func (e *edge) decode(b []byte) error {
	if len(b) < 8 {
		return fmt.Errorf("parse edge: %w", ErrCorrupt)
	}
	e.count, e.partial = binary.BigEndian.Uint64(b), b[8:]
	if uint64(len(e.partial)) != e.count%runHashes*hashSize {
		return fmt.Errorf("parse edge: %d octets for %d hashes: %w", len(e.partial), e.count, ErrCorrupt)
	}
	return nil
}

// readTip reads the state that a connection's transaction sees.
func readTip(ctx context.Context, c *conn) (*tip, error) {
	t := &tip{distinct: never}
	found := false
	err := c.query(ctx, "SELECT slot, data, sum FROM tip", func(cols []driver.Value) error {
		slot, _ := cols[0].(int64)
		data, err := checked(inTip, slot, cols[1], cols[2])
		if err != nil {
			return err
		}
		switch {
		case slot == slotState:
			found = true
			return t.decodeState(data)
		case slot > 0 && slot <= levels:
			return t.edges[slot-1].decode(data)
		}
		return fmt.Errorf("parse tip: slot %d: %w", slot, ErrCorrupt)
	})
	if err != nil {
		return nil, err
	}
	if !found || t.edge(leafHashes).count != t.entries {
		return nil, fmt.Errorf("parse tip: sizes disagree: %w", ErrCorrupt)
	}
	return t, nil
}

// writeTip stores the slots of t that differ from old.
func writeTip(c *conn, old, t *tip) error {
	put := func(slot int64, data []byte) error {
		if err := c.exec("INSERT OR REPLACE INTO tip (slot, data, sum) VALUES (?,?,?)", slot, data, checksum(inTip, slot, data)); err != nil {
			return fmt.Errorf("store tip: %w", err)
		}
		return nil
	}
	for i := range t.edges {
		e := &t.edges[i]
		if old != nil && e.count == old.edges[i].count {
			continue
		}
		if err := put(slotOf(i-1), e.encode()); err != nil {
			return err
		}
	}
	return put(slotState, t.encodeState())
}

// growth is what a transaction appends to one level.
type growth struct {
	base  uint64 // count before
	tail  []byte // partial run before
	added []byte // hashes from base on
}

func (g *growth) count() uint64 { return g.base + uint64(len(g.added)/hashSize) }

// at returns hash i, or nil if it is in a full run from before.
func (g *growth) at(i uint64) []byte {
	if i >= g.base {
		o := (i - g.base) * hashSize
		return g.added[o : o+hashSize]
	}
	if back := (g.base - i) * hashSize; back <= uint64(len(g.tail)) {
		o := uint64(len(g.tail)) - back
		return g.tail[o : o+hashSize]
	}
	return nil
}

// flush calls run for each run that became full and returns the new edge.
func (g *growth) flush(run func(n uint64, hashes []byte) error) (edge, error) {
	all := slices.Concat(g.tail, g.added)
	n := g.base / runHashes
	for ; len(all) >= runSize; n++ {
		if err := run(n, all[:runSize]); err != nil {
			return edge{}, err
		}
		all = all[runSize:]
	}
	return edge{count: g.count(), partial: slices.Clone(all)}, nil
}
