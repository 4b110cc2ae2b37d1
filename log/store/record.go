package store

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/google/trillian"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// A record is what is stored of an entry beside its hashes:
//
//	queued      int64, nanoseconds since 1970, big endian
//	integrated  int64, the same
//	length      uvarint, octets of value
//	value       the octets that are hashed
//	extra       the rest
const recordHeader = 16

// appendRecord encodes leaf. A time that is missing is stored as 1970.
func appendRecord(b []byte, leaf *trillian.LogLeaf) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(nanos(leaf.QueueTimestamp)))
	b = binary.BigEndian.AppendUint64(b, uint64(nanos(leaf.IntegrateTimestamp)))
	b = binary.AppendUvarint(b, uint64(len(leaf.LeafValue)))
	b = append(b, leaf.LeafValue...)
	return append(b, leaf.ExtraData...)
}

// parseRecord decodes a record into a leaf without hashes and index. The leaf
// shares b.
func parseRecord(b []byte) (*trillian.LogLeaf, error) {
	if len(b) < recordHeader {
		return nil, fmt.Errorf("parse entry: %d octets: %w", len(b), ErrCorrupt)
	}
	queued := int64(binary.BigEndian.Uint64(b))
	integrated := int64(binary.BigEndian.Uint64(b[8:]))
	rest := b[recordHeader:]
	n, used := binary.Uvarint(rest)
	if used <= 0 || n > uint64(len(rest)-used) {
		return nil, fmt.Errorf("parse entry: length of value: %w", ErrCorrupt)
	}
	rest = rest[used:]
	return &trillian.LogLeaf{
		LeafValue:          rest[:n:n],
		ExtraData:          rest[n:],
		QueueTimestamp:     timestamppb.New(time.Unix(0, queued)),
		IntegrateTimestamp: timestamppb.New(time.Unix(0, integrated)),
	}, nil
}

func nanos(t *timestamppb.Timestamp) int64 {
	if t == nil {
		return 0
	}
	return t.Seconds*int64(time.Second) + int64(t.Nanos)
}
