package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/google/trillian"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

type hash = [hashSize]byte

// queue holds the leaves of a LOG tree that are not integrated. It is in
// memory only. The leaves in flight are its head: the one transaction that
// dequeued them removes them when it commits, so a rollback has nothing to
// undo.
type queue struct {
	maxLeaves int
	maxBytes  int64

	mu    sync.Mutex
	list  []*queued        // in order of arrival; guarded by mu
	known map[hash]*queued // the same by identity; guarded by mu
	bytes int64            // guarded by mu
	epoch uint64           // commits that removed leaves; guarded by mu
}

// queued is a leaf as it was queued. It is never changed.
type queued struct {
	identity, leafHash hash
	value, extra       []byte
	at                 time.Time
}

func (q *queued) size() int64 { return int64(len(q.value) + len(q.extra)) }

// leaf returns a new LogLeaf, so that nobody shares the struct that the
// sequencer changes.
func (q *queued) leaf() *trillian.LogLeaf {
	return &trillian.LogLeaf{
		MerkleLeafHash:   q.leafHash[:],
		LeafIdentityHash: q.identity[:],
		LeafValue:        q.value,
		ExtraData:        q.extra,
		QueueTimestamp:   timestamppb.New(q.at),
	}
}

func newQueue(leaves int, bytes int64) *queue {
	return &queue{maxLeaves: leaves, maxBytes: bytes, known: make(map[hash]*queued)}
}

// head returns up to limit leaves after the first skip, in order, stopping at
// the first that was queued after cutoff.
func (q *queue) head(skip, limit int, cutoff time.Time) []*queued {
	q.mu.Lock()
	defer q.mu.Unlock()
	if limit < 0 {
		limit = 0
	}
	end := min(len(q.list), skip+limit)
	for i := skip; i < end; i++ {
		if q.list[i].at.After(cutoff) {
			return q.list[skip:i:i]
		}
	}
	return q.list[skip:end:end]
}

// remove takes leaves that were integrated, which are among the first n, out
// of the queue.
func (q *queue) remove(n int, integrated map[hash]bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	var rest []*queued
	for _, l := range q.list[:n] {
		if !integrated[l.identity] {
			rest = append(rest, l)
			continue
		}
		delete(q.known, l.identity)
		q.bytes -= l.size()
	}
	clear(q.list[:n]) // the array lives on
	switch tail := q.list[n:]; {
	case len(rest) > 0:
		q.list = append(rest, tail...)
	case len(tail) == 0:
		q.list = nil
	default:
		q.list = tail
	}
	q.epoch++
}

// candidate is a leaf of one QueueLeaves call on its way into the queue.
type candidate struct {
	*queued
	pos int // in the call
	// absent is 1 + the epoch in which the leaf was looked up in the database
	// and not found. While the epoch stands it still is not there.
	absent uint64
}

// add queues leaves, all or none. same has for each leaf the one that was
// queued before it with the same identity, or nil. If some leaves may be in
// the database by the judgement of maybe, nothing is queued and they are
// returned as doubtful, with the epoch in which to look them up.
func (q *queue) add(leaves []*candidate, maybe func(*candidate) bool) (same []*queued, doubtful []*candidate, epoch uint64, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	same = make([]*queued, len(leaves))
	fresh := make(map[hash]*queued, len(leaves))
	var bytes int64
	for i, l := range leaves {
		if same[i] = q.known[l.identity]; same[i] == nil {
			same[i] = fresh[l.identity]
		}
		switch {
		case same[i] != nil:
		case l.absent != q.epoch+1 && maybe(l):
			doubtful = append(doubtful, l)
		default:
			fresh[l.identity] = l.queued
			bytes += l.size()
		}
	}
	if len(doubtful) > 0 {
		return nil, doubtful, q.epoch, nil
	}
	if len(fresh) > 0 && (len(q.list)+len(fresh) > q.maxLeaves || q.bytes+bytes > q.maxBytes) {
		return nil, nil, 0, ErrQueueFull
	}
	for i, l := range leaves {
		if same[i] == nil {
			q.list = append(q.list, l.queued)
			q.known[l.identity] = l.queued
		}
	}
	q.bytes += bytes
	return same, nil, 0, nil
}

// queueLeaves is QueueLeaves of one tree. The database is looked at only for
// leaves that the filters do not rule out, and outside of the queue's lock;
// when a batch was committed meanwhile, they are looked up again.
func (t *logTree) queueLeaves(ctx context.Context, leaves []*trillian.LogLeaf, at time.Time) ([]*trillian.QueuedLogLeaf, error) {
	if err := t.failed(); err != nil {
		return nil, err
	}
	todo := make([]*candidate, len(leaves))
	for i, l := range leaves {
		if len(l.GetLeafIdentityHash()) != hashSize || len(l.GetMerkleLeafHash()) != hashSize {
			return nil, status.Errorf(codes.InvalidArgument, "leaves[%d]: hashes must have %d octets", i, hashSize)
		}
		todo[i] = &candidate{pos: i, queued: &queued{
			identity: hash(l.LeafIdentityHash), leafHash: hash(l.MerkleLeafHash),
			value: l.LeafValue, extra: l.ExtraData, at: at,
		}}
	}
	result := make([]*trillian.QueuedLogLeaf, len(leaves))
	maybe := func(c *candidate) bool { return t.maybeStored(c.identity[:]) }
	for {
		same, doubtful, epoch, err := t.queue.add(todo, maybe)
		if err != nil {
			return nil, err
		}
		if len(doubtful) == 0 {
			for i, c := range todo {
				result[c.pos] = &trillian.QueuedLogLeaf{Leaf: leaves[c.pos]}
				if same[i] != nil {
					result[c.pos] = alreadyExists(same[i].leaf())
				}
			}
			return result, nil
		}
		if err := t.lookUp(ctx, doubtful, epoch, result); err != nil {
			return nil, fmt.Errorf("look up leaf: %w", err)
		}
		todo = slices.DeleteFunc(todo, func(c *candidate) bool { return result[c.pos] != nil })
	}
}

// lookUp puts the leaves that are stored into result and marks the others as
// absent in epoch. On a slow disk many leaves take longer than a snapshot may
// live: the rest is looked up in another one, which is not older.
func (t *logTree) lookUp(ctx context.Context, leaves []*candidate, epoch uint64, result []*trillian.QueuedLogLeaf) error {
	for len(leaves) > 0 {
		err := t.read(ctx, func(s *snapshot) error {
			for first := true; len(leaves) > 0; first = false {
				c := leaves[0]
				l, err := s.leafByIdentity(ctx, c.identity[:])
				if !first && errors.Is(err, ErrSnapshotExpired) {
					return nil
				}
				if err != nil {
					return err
				}
				if l != nil {
					result[c.pos] = alreadyExists(l)
				} else {
					c.absent = epoch + 1
				}
				leaves = leaves[1:]
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// maybeStored reports without I/O whether an identity could be in the tree.
func (t *logTree) maybeStored(identity []byte) bool {
	// The view, unlike the tip, is ahead of what is committed, so whoever saw a
	// leaf finds it.
	v, fp := t.view.Load(), t.mark.of(identity)
	return v.maybe(byIdentity, fp) || v.maybe(byLeafHash, fp)
}

func alreadyExists(l *trillian.LogLeaf) *trillian.QueuedLogLeaf {
	return &trillian.QueuedLogLeaf{Leaf: l, Status: status.New(codes.AlreadyExists, "leaf already exists").Proto()}
}
