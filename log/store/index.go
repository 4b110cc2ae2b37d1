package store

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"database/sql/driver"
	"encoding/binary"
	"fmt"
	"runtime"
	"slices"
	"sort"
	"sync"

	"golang.org/x/sys/unix"
)

// The lookup answers "at which indices may this hash be?". It is told a
// fingerprint of the hash under a secret, so that nobody can choose hashes
// that collide, and its answers are candidates: whoever asks compares the
// stored hash. It therefore cannot give a wrong answer, and a candidate that
// was rolled back does no harm.

// kind is what a lookup is by. Identities have one of their own only from the
// first leaf on whose identity is not its leaf hash.
type kind int

const (
	byLeafHash kind = iota
	byIdentity
	kinds
)

func (k kind) level() int {
	if k == byIdentity {
		return identities
	}
	return leafHashes
}

// generationSize is how many leaves a generation covers.
const generationSize = 1 << 18

// fingerprinter is a CBC-MAC over exactly two AES blocks, cut to 64 bits.
type fingerprinter struct{ block cipher.Block }

func newFingerprinter(secret []byte) (fingerprinter, error) {
	b, err := aes.NewCipher(secret)
	if err != nil {
		return fingerprinter{}, fmt.Errorf("lookup secret: %w: %w", ErrCorrupt, err)
	}
	return fingerprinter{b}, nil
}

func (f fingerprinter) of(hash []byte) uint64 {
	var b [aes.BlockSize]byte
	f.block.Encrypt(b[:], hash[:aes.BlockSize])
	for i := range b {
		b[i] ^= hash[aes.BlockSize+i]
	}
	f.block.Encrypt(b[:], b[:])
	return binary.BigEndian.Uint64(b[:])
}

// memTable is a generation that is not sealed yet: a hash table with open
// addressing, 21 octets for a leaf where Go's map takes 40. Leaves with one
// fingerprint form a chain, newest first.
type memTable struct {
	first uint64 // index of its first leaf

	mu   sync.RWMutex
	fps  []uint64
	prev []uint32 // position + 1 of the next older one, 0 at the end
	// slots hold position + 1 of the newest leaf with a fingerprint, 0 where
	// there is none; probed one after the other from the fingerprint's low bits
	// on. Its length is a power of two, at least twice that of fps. Slots were
	// taken in the order of positions and are freed in the reverse order, so
	// a freed one interrupts no other's probing.
	slots []uint32
}

const minSlots = 1024

func newMemTable(first uint64) *memTable {
	return &memTable{first: first, slots: make([]uint32, minSlots)}
}

// end is the index after the last leaf that the table may hold.
func (m *memTable) end() uint64 { return (m.first/generationSize + 1) * generationSize }

// slot returns where a fingerprint is, or the empty place where it belongs.
func (m *memTable) slot(fp uint64) *uint32 {
	mask := uint64(len(m.slots) - 1)
	for i := fp & mask; ; i = (i + 1) & mask {
		if n := m.slots[i]; n == 0 || m.fps[n-1] == fp {
			return &m.slots[i]
		}
	}
}

func (m *memTable) add(fp uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if 2*(len(m.fps)+1) > len(m.slots) {
		m.slots = make([]uint32, 2*len(m.slots))
		for i, fp := range m.fps {
			*m.slot(fp) = uint32(i + 1)
		}
	}
	s := m.slot(fp)
	m.fps = append(m.fps, fp)
	m.prev = append(m.prev, *s)
	*s = uint32(len(m.fps))
}

// truncate forgets the leaves from index on.
func (m *memTable) truncate(index uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for n := len(m.fps); n > 0 && m.first+uint64(n) > index; n-- {
		*m.slot(m.fps[n-1]) = m.prev[n-1]
		m.fps, m.prev = m.fps[:n-1], m.prev[:n-1]
	}
}

func (m *memTable) find(fp uint64, found []uint64) []uint64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for n := *m.slot(fp); n != 0; n = m.prev[n-1] {
		found = append(found, m.first+uint64(n-1))
	}
	return found
}

func (m *memTable) has(fp uint64) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return *m.slot(fp) != 0
}

// filter is a Bloom filter in blocks of 64 octets with 8 bits for each key.
type filter []byte

const (
	filterBlock   = 64
	filterBits    = 8
	filterPerLeaf = 2 // octets
)

func newFilter(n int) filter {
	return make(filter, max(1, n*filterPerLeaf/filterBlock)*filterBlock)
}

// blockOf returns the block of a fingerprint, uniform below blocks.
func blockOf(fp uint64, blocks int) uint64 { return (fp >> 32) * uint64(blocks) >> 32 }

func (f filter) block(fp uint64) filter {
	b := blockOf(fp, len(f)/filterBlock)
	return f[b*filterBlock : (b+1)*filterBlock]
}

// probes calls do for each bit of a fingerprint in its block.
func probes(fp uint64, do func(octet int, bit byte)) {
	p, step := uint32(fp), uint32(fp>>9)|1
	for range filterBits {
		at := p >> 23 // 9 bits
		do(int(at>>3), 1<<(at&7))
		p += step * 0x9e3779b1
	}
}

func (f filter) add(fp uint64) {
	b := f.block(fp)
	probes(fp, func(o int, bit byte) { b[o] |= bit })
}

// probe is a fingerprint made ready to be asked of many filters.
type probe struct {
	fp uint64
	// mask has the bits of the fingerprint in its block, as little-endian words.
	mask [filterBlock / 8]uint64
}

func newProbe(fp uint64) *probe {
	p := &probe{fp: fp}
	probes(fp, func(o int, bit byte) { p.mask[o/8] |= uint64(bit) << (o % 8 * 8) })
	return p
}

// in reports whether a block has all bits of the probe. It has no branch that
// depends on the block, which a processor would guess wrong half of the time.
func (p *probe) in(block []byte) bool {
	missing := uint64(0)
	for w, m := range &p.mask {
		missing |= m &^ binary.LittleEndian.Uint64(block[8*w:])
	}
	return missing == 0
}

// shelf is the memory of the filters of up to shelfWidth generations of one
// size. Block b of all of them lies together: a fingerprint has the same block
// in each, so asking all costs one miss of the processor's caches and not eight. The memory is the system's, not the collector's: filters are the
// one thing here that grows with the log, and on the heap each octet would
// allow another of garbage.
type shelf struct {
	mem    []byte
	blocks int // of each filter
	used   int // filters; used by whoever adds one
}

const shelfWidth = 8

func newShelf(blocks int) *shelf {
	s := &shelf{blocks: blocks}
	size := blocks * shelfWidth * filterBlock
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		s.mem = make([]byte, size)
		return s
	}
	// One entry of the processor's address cache then covers half a shelf.
	_ = unix.Madvise(b, unix.MADV_HUGEPAGE)
	s.mem = b
	runtime.AddCleanup(s, func(b []byte) { _ = unix.Munmap(b) }, b)
	return s
}

// block returns block b of a filter on the shelf. Its user keeps s alive.
func (s *shelf) block(slot int, b uint64) filter {
	at := (b*shelfWidth + uint64(slot)) * filterBlock
	return s.mem[at : at+filterBlock]
}

// sealed is a generation that is stored: its filter is in memory, its
// candidates are in 1,024 buckets of sorted words. A word is the upper 42
// bits of the fingerprint and 22 bits of offset; the upper 10 bits choose
// the bucket.
type sealed struct {
	id    int64 // kind << 40 | number of the generation
	first uint64
	count uint64
	shelf *shelf // of its filter
	slot  int    // in the shelf
}

// place puts the filter of g on the shelf of the generation before it, or on a
// new one.
func (g *sealed) place(f filter, before []*sealed) {
	blocks := len(f) / filterBlock
	if n := len(before); n > 0 && before[n-1].shelf.blocks == blocks && before[n-1].shelf.used < shelfWidth {
		g.shelf = before[n-1].shelf
	} else {
		g.shelf = newShelf(blocks)
	}
	g.slot = g.shelf.used
	g.shelf.used++
	for b := range blocks {
		copy(g.shelf.block(g.slot, uint64(b)), f[b*filterBlock:])
	}
	runtime.KeepAlive(g.shelf)
}

// filter returns a copy of the filter as it is stored.
func (g *sealed) filter() filter {
	defer runtime.KeepAlive(g.shelf)
	f := make(filter, 0, g.shelf.blocks*filterBlock)
	for b := range g.shelf.blocks {
		f = append(f, g.shelf.block(g.slot, uint64(b))...)
	}
	return f
}

// has reports whether the generation may have the fingerprint, without I/O.
func (g *sealed) has(p *probe) bool {
	ok := p.in(g.shelf.block(g.slot, blockOf(p.fp, g.shelf.blocks)))
	runtime.KeepAlive(g.shelf)
	return ok
}

const (
	buckets    = 1024
	bucketBits = 10
	offsetBits = 22
	wordSize   = 8
)

func generationID(k kind, first uint64) int64 {
	return int64(uint64(k)<<40 | first/generationSize)
}

func bucketID(generation int64, bucket uint64) int64 { return generation<<12 | int64(bucket) }

// find appends the candidates of the generation, reading at most one row.
func (g *sealed) find(ctx context.Context, c *conn, p *probe, found []uint64) ([]uint64, error) {
	if !g.has(p) {
		return found, nil
	}
	fp := p.fp
	id := bucketID(g.id, fp>>(64-bucketBits))
	rows := 0
	err := c.query(ctx, "SELECT data, sum FROM buckets WHERE id=?", func(cols []driver.Value) error {
		rows++
		data, err := checked(inBuckets, id, cols[0], cols[1])
		if err != nil {
			return err
		}
		n := len(data) / wordSize
		word := func(i int) uint64 { return binary.BigEndian.Uint64(data[i*wordSize:]) }
		for i := sort.Search(n, func(i int) bool { return word(i)>>offsetBits >= fp>>offsetBits }); i < n && word(i)>>offsetBits == fp>>offsetBits; i++ {
			found = append(found, g.first+word(i)&(1<<offsetBits-1))
		}
		return nil
	}, id)
	if err == nil && rows != 1 {
		err = fmt.Errorf("read lookup bucket: %w", ErrCorrupt)
	}
	return found, err
}

// seal turns a full table into what is stored of it. The generation is not
// placed yet.
func seal(k kind, m *memTable) (*sealed, filter, [][]byte) {
	m.mu.RLock()
	fps := m.fps
	m.mu.RUnlock()
	g := &sealed{id: generationID(k, m.first), first: m.first, count: uint64(len(fps))}
	f := newFilter(len(fps))
	words := make([]uint64, len(fps))
	for i, fp := range fps {
		f.add(fp)
		words[i] = fp>>offsetBits<<offsetBits | uint64(i)
	}
	slices.Sort(words)
	data := make([]byte, 0, len(words)*wordSize)
	pieces := make([][]byte, buckets)
	next := 0
	for b := range pieces {
		start := len(data)
		for ; next < len(words) && words[next]>>(64-bucketBits) == uint64(b); next++ {
			data = binary.BigEndian.AppendUint64(data, words[next])
		}
		pieces[b] = data[start:len(data):len(data)]
	}
	return g, f, pieces
}

// store writes a sealed generation; the caller owns the transaction.
func (g *sealed) store(c *conn, f filter, pieces [][]byte) error {
	for b, data := range pieces {
		id := bucketID(g.id, uint64(b))
		if err := c.exec("INSERT INTO buckets (id, data, sum) VALUES (?,?,?)", id, data, checksum(inBuckets, id, data)); err != nil {
			return fmt.Errorf("store lookup bucket: %w", err)
		}
	}
	return g.storeFilter(c, f)
}

// storeFilter writes the row that makes the buckets of a generation known.
func (g *sealed) storeFilter(c *conn, f filter) error {
	err := c.exec("INSERT INTO generations (id, first, count, filter, sum) VALUES (?,?,?,?,?)",
		g.id, int64(g.first), int64(g.count), []byte(f), checksum(inGenerations, g.id, f))
	if err != nil {
		return fmt.Errorf("store lookup generation: %w", err)
	}
	return nil
}

// loadSealed reads the filters of all sealed generations, oldest first.
func loadSealed(ctx context.Context, c *conn) (list [kinds][]*sealed, err error) {
	err = c.query(ctx, "SELECT id, first, count, filter, sum FROM generations ORDER BY id", func(cols []driver.Value) error {
		id, _ := cols[0].(int64)
		first, _ := cols[1].(int64)
		count, _ := cols[2].(int64)
		f, err := checked(inGenerations, id, cols[3], cols[4])
		if err != nil {
			return err
		}
		k := kind(id >> 40)
		if k < 0 || k >= kinds || id != generationID(k, uint64(first)) || count <= 0 || (first+count)%generationSize != 0 || count > generationSize || len(f) == 0 || len(f)%filterBlock != 0 {
			return fmt.Errorf("parse lookup generation %d: %w", id, ErrCorrupt)
		}
		g := &sealed{id: id, first: uint64(first), count: uint64(count)}
		g.place(f, list[k])
		list[k] = append(list[k], g)
		return nil
	})
	return list, err
}

// view is one arrangement of the generations; it is never changed once
// published. Tables in it still grow.
type view struct {
	sealed [kinds][]*sealed   // oldest first
	tables [kinds][]*memTable // oldest first, following the sealed ones
}

// next is the index of the first leaf that the lookup does not know.
func (v *view) next(k kind) (uint64, bool) {
	if n := len(v.tables[k]); n > 0 {
		m := v.tables[k][n-1]
		m.mu.RLock()
		defer m.mu.RUnlock()
		return m.first + uint64(len(m.fps)), true
	}
	if n := len(v.sealed[k]); n > 0 {
		g := v.sealed[k][n-1]
		return g.first + g.count, true
	}
	return 0, false
}

// maybe reports, without I/O, whether find could find anything.
func (v *view) maybe(k kind, fp uint64) bool {
	for _, m := range v.tables[k] {
		if m.has(fp) {
			return true
		}
	}
	p := newProbe(fp)
	for _, g := range v.sealed[k] {
		if g.has(p) {
			return true
		}
	}
	return false
}

// find returns the candidates of one kind, newest first.
func (v *view) find(ctx context.Context, c *conn, k kind, fp uint64) ([]uint64, error) {
	var found []uint64
	for _, m := range slices.Backward(v.tables[k]) {
		found = m.find(fp, found)
	}
	var err error
	p := newProbe(fp)
	for _, g := range slices.Backward(v.sealed[k]) {
		if found, err = g.find(ctx, c, p, found); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// withTable returns the view with one more table.
func (v *view) withTable(k kind, m *memTable) *view {
	w := *v
	w.tables[k] = append(slices.Clip(v.tables[k]), m)
	return &w
}

// withSealed returns the view with the oldest table replaced by g, whose filter
// is f.
func (v *view) withSealed(k kind, g *sealed, f filter) *view {
	w := *v
	g.place(f, v.sealed[k])
	w.tables[k] = slices.Clone(v.tables[k][1:])
	w.sealed[k] = append(slices.Clip(v.sealed[k]), g)
	return &w
}
