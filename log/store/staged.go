package store

import (
	"bytes"
	"context"
	"database/sql/driver"
	"fmt"
	"slices"
	"time"

	"github.com/google/trillian"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// Staged leaves are those of a PREORDERED_LOG that are stored but not
// integrated. Their row holds identity ‖ leaf hash ‖ record under one sum.

// stagedLeaf parses a row (idx, identity, data, sum) of staged.
func stagedLeaf(cols []driver.Value) (*trillian.LogLeaf, error) {
	i, _ := cols[0].(int64)
	identity, _ := cols[1].([]byte)
	data, _ := cols[2].([]byte)
	if _, err := checked(inStaged, i, slices.Concat(identity, data), cols[3]); err != nil {
		return nil, err
	}
	if len(identity) != hashSize || len(data) < hashSize {
		return nil, fmt.Errorf("parse staged leaf %d: %w", i, ErrCorrupt)
	}
	leaf, err := parseRecord(data[hashSize:])
	if err != nil {
		return nil, err
	}
	leaf.LeafIndex, leaf.LeafIdentityHash, leaf.MerkleLeafHash = i, identity, data[:hashSize:hashSize]
	return leaf, nil
}

// readStaged returns up to count staged leaves from index start on, without a
// gap.
func readStaged(ctx context.Context, c *conn, start, count uint64) ([]*trillian.LogLeaf, error) {
	if count == 0 {
		return nil, nil
	}
	var leaves []*trillian.LogLeaf
	err := c.query(ctx, "SELECT idx, identity, data, sum FROM staged WHERE idx>=? AND idx<? ORDER BY idx", func(cols []driver.Value) error {
		l, err := stagedLeaf(cols)
		if err != nil {
			return err
		}
		if uint64(l.LeafIndex) != start+uint64(len(leaves)) {
			return errEnough
		}
		leaves = append(leaves, l)
		return nil
	}, int64(start), int64(start+count))
	return leaves, ignoreEnough(err)
}

// addSequenced is AddSequencedLeaves of one tree: one transaction.
func (t *logTree) addSequenced(ctx context.Context, leaves []*trillian.LogLeaf, at time.Time) ([]*trillian.QueuedLogLeaf, error) {
	for i, l := range leaves {
		if len(l.GetLeafIdentityHash()) != hashSize || len(l.GetMerkleLeafHash()) != hashSize {
			return nil, status.Errorf(codes.FailedPrecondition, "leaves[%d]: hashes must have %d octets", i, hashSize)
		}
		if l.LeafIndex < 0 {
			return nil, status.Errorf(codes.OutOfRange, "leaves[%d]: index %d", i, l.LeafIndex)
		}
	}
	if err := t.acquire(ctx); err != nil {
		return nil, err
	}
	defer t.release()
	s, err := t.snapshot(ctx)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	result := make([]*trillian.QueuedLogLeaf, len(leaves))
	written := int64(0)
	err = t.writer.transaction(func() error {
		for i, l := range leaves {
			r, err := t.stage(ctx, s, l, at)
			if err != nil {
				return err
			}
			result[i] = r
			written += int64(len(l.LeafValue) + len(l.ExtraData))
		}
		return nil
	})
	if err != nil {
		return nil, t.commitFailed(t.tip.Load(), err)
	}
	t.checkpoints.wrote(written)
	return result, nil
}

// stage stores one leaf, unless its index or identity is taken.
func (t *logTree) stage(ctx context.Context, s *snapshot, l *trillian.LogLeaf, at time.Time) (*trillian.QueuedLogLeaf, error) {
	other, err := t.sequencedAt(ctx, s, l.LeafIndex)
	if err != nil {
		return nil, err
	}
	if other == nil {
		if other, err = t.sequencedAs(ctx, s, l.LeafIdentityHash); err != nil {
			return nil, err
		}
	}
	switch {
	case other == nil:
	case other.LeafIndex != l.LeafIndex:
		return &trillian.QueuedLogLeaf{Leaf: other, Status: status.New(codes.FailedPrecondition, "conflicting LeafIdentityHash").Proto()}, nil
	case bytes.Equal(other.LeafIdentityHash, l.LeafIdentityHash) && bytes.Equal(other.LeafValue, l.LeafValue):
		return alreadyExists(other), nil
	default:
		return &trillian.QueuedLogLeaf{Leaf: other, Status: status.New(codes.FailedPrecondition, "conflicting LeafIndex").Proto()}, nil
	}
	stored := &trillian.LogLeaf{LeafValue: l.LeafValue, ExtraData: l.ExtraData, QueueTimestamp: timestamppb.New(at)}
	data := appendRecord(slices.Clone(l.MerkleLeafHash), stored)
	sum := checksum(inStaged, l.LeafIndex, slices.Concat(l.LeafIdentityHash, data))
	if err := t.writer.exec("INSERT INTO staged (idx, identity, data, sum) VALUES (?,?,?,?)", l.LeafIndex, l.LeafIdentityHash, data, sum); err != nil {
		return nil, fmt.Errorf("stage leaf: %w", err)
	}
	return &trillian.QueuedLogLeaf{Leaf: l, Status: status.New(codes.OK, "OK").Proto()}, nil
}

// sequencedAt returns the leaf at an index, integrated or staged, or nil.
func (t *logTree) sequencedAt(ctx context.Context, s *snapshot, index int64) (leaf *trillian.LogLeaf, err error) {
	if uint64(index) < s.tip.entries {
		err = s.use(func() error {
			l, err := s.entries(ctx, uint64(index), 1)
			if err == nil {
				leaf = l[0]
			}
			return err
		})
		return leaf, err
	}
	l, err := readStaged(ctx, t.writer, uint64(index), 1)
	if err != nil || len(l) == 0 {
		return nil, err
	}
	return l[0], nil
}

// sequencedAs returns the leaf with an identity, integrated or staged, or nil.
func (t *logTree) sequencedAs(ctx context.Context, s *snapshot, identity []byte) (*trillian.LogLeaf, error) {
	if t.maybeStored(identity) {
		if l, err := s.leafByIdentity(ctx, identity); err != nil || l != nil {
			return l, err
		}
	}
	var leaf *trillian.LogLeaf
	err := t.writer.query(ctx, "SELECT idx, identity, data, sum FROM staged WHERE identity=?", func(cols []driver.Value) (err error) {
		leaf, err = stagedLeaf(cols)
		return err
	}, identity)
	return leaf, err
}
