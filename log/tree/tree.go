// Package tree is the Merkle log engine: append-only trees on Trillian, with
// one interface whether Trillian runs in this process or elsewhere.
//
// Data flows one way: a Leaf is appended, waits in memory, is integrated with
// its batch by Trillian's sequencer, is durable, and is then an Entry of every
// later Root. What is signed about a Root is the business of log/head.
//
// The package promises that Append returns only when the leaf is durable (one
// transaction, one fsync for the whole batch); that a leaf whose identity is
// in the tree already is not added again; that a leaf hash is recomputed from
// the leaf's bytes before it is integrated, so that a fault in memory or in
// storage cannot put a hash without a preimage into the tree. It trusts the
// storage to keep what it acknowledged, and nothing else: log/head checks
// every root against the last one it signed.
package tree

import (
	"context"
	"crypto/sha256"
	"errors"
	"time"
)

// Errors that callers branch on.
var (
	// ErrBusy: the bounded queue before the tree is full. Nothing was added.
	ErrBusy = errors.New("log queue full")
	// ErrNotFound: no such leaf, index or size in the tree.
	ErrNotFound = errors.New("not in the log")
	// ErrClosed: the tree is shutting down; the leaf may or may not be added.
	ErrClosed = errors.New("log closed")
	// ErrExists: a tree of this name is there already.
	ErrExists = errors.New("log exists already")
	// ErrName: not a tree's name, which is 1 to 64 of a-z, 0-9 and hyphen.
	ErrName = errors.New("bad log name")
	// ErrLeaf: the leaf is empty or larger than Config.MaxQueueBytes.
	ErrLeaf = errors.New("bad leaf")
	// ErrStorage: the storage refused a batch (disk full, input or output
	// error). Its leaves are kept in memory and tried again; a repeated Append
	// waits for them.
	ErrStorage = errors.New("log storage failed")
	// ErrCorrupt: a hash does not fit the bytes or the tree above it. Nothing
	// is added to the tree any more until the process starts anew.
	ErrCorrupt = errors.New("log data damaged")
)

// HashSize is the length of every hash of a tree, SHA-256.
const HashSize = sha256.Size

// Hash is a leaf, node or root hash (RFC 6962, Section 2.1).
type Hash = [HashSize]byte

// Leaf is what a front end appends.
type Leaf struct {
	// Value is the octets that are hashed: SHA-256(0x00 ‖ Value).
	Value []byte
	// Extra is stored beside Value and not hashed.
	Extra []byte
	// Identity is what makes a leaf the same as another; two leaves with one
	// identity are one leaf. Zero means: the leaf hash.
	Identity Hash
}

// Entry is a leaf in its place.
type Entry struct {
	Index    uint64 // from 0
	LeafHash Hash
	Value    []byte
	Extra    []byte
}

// Root is the state of a tree after a batch. It is durable and not signed.
type Root struct {
	Size uint64
	Hash Hash
	// Time is when the batch was integrated, strictly increasing from root to
	// root. It is not the time of a signed tree head.
	Time time.Time
}

// Tree is one append-only Merkle tree. It is safe for concurrent use. Slices
// that it returns belong to the caller.
type Tree interface {
	// Append adds leaf and waits until it is durable. When a leaf with the same
	// identity is in the tree, its entry is returned and existed is true. If
	// ctx ends first the leaf may still be integrated; nothing is lost and a
	// repeated Append finds it. When the leaf is waiting to be integrated
	// already, the caller waits for it too and existed is true. Errors:
	// ErrBusy, ErrClosed, ErrLeaf, ErrStorage, ErrCorrupt, ctx.Err().
	Append(ctx context.Context, leaf Leaf) (entry Entry, existed bool, err error)
	// Root returns the newest durable root without touching the storage.
	Root() Root
	// Changed returns a channel that is closed when Root is next replaced.
	// Take the channel before Root to miss nothing.
	Changed() <-chan struct{}
	// InclusionProof is the audit path of RFC 6962, Section 2.1.1 for leaf
	// index in the tree of the first size leaves; index < size ≤ Root().Size,
	// else ErrNotFound.
	InclusionProof(ctx context.Context, index, size uint64) ([]Hash, error)
	// ConsistencyProof is the proof of RFC 6962, Section 2.1.2 between two
	// sizes, first ≤ second ≤ Root().Size, else ErrNotFound. It is empty when
	// first is 0 or equal to second.
	ConsistencyProof(ctx context.Context, first, second uint64) ([]Hash, error)
	// RootAt computes the root of the first size leaves from the stored tiles.
	RootAt(ctx context.Context, size uint64) (Hash, error)
	// Entries returns the entries from start on, at most count and at least
	// one unless start ≥ Root().Size (ErrNotFound).
	Entries(ctx context.Context, start, count uint64) ([]Entry, error)
	// ByLeafHash finds the first entry with the leaf hash, or ErrNotFound.
	ByLeafHash(ctx context.Context, h Hash) (Entry, error)
	// ByIdentity finds the entry with the identity, or ErrNotFound.
	ByIdentity(ctx context.Context, id Hash) (Entry, error)
	// Tile returns width hashes (1 to 256) of tile index at level (C2SP
	// tlog-tiles: level 0 holds leaf hashes), 32 × width octets, or
	// ErrNotFound where the tree of Root().Size does not fill them yet.
	Tile(ctx context.Context, level, index uint64, width int) ([]byte, error)
	// Err returns why leaves are not being integrated, or nil: for readiness.
	Err() error
}
