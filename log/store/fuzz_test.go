package store

import (
	"bytes"
	"errors"
	"testing"

	"github.com/google/trillian"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// FuzzRecord: any octets are an entry or damage; an entry encodes to itself
// unless its length was written long.
func FuzzRecord(f *testing.F) {
	f.Add(appendRecord(nil, &trillian.LogLeaf{LeafValue: []byte("value"), ExtraData: []byte("extra"), QueueTimestamp: timestamppb.Now()}))
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte{0xff}, 40))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := parseRecord(b)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Errorf("got %v, want ErrCorrupt", err)
			}
			return
		}
		again, err := parseRecord(appendRecord(nil, l))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(again.LeafValue, l.LeafValue) || !bytes.Equal(again.ExtraData, l.ExtraData) || nanos(again.QueueTimestamp) != nanos(l.QueueTimestamp) {
			t.Errorf("%x: read %v, then %v", b, l, again)
		}
	})
}

// FuzzTip: any octets are a state or an edge, which encode to themselves, or
// damage.
func FuzzTip(f *testing.F) {
	f.Add((&tip{entries: 3, distinct: never}).encodeState())
	f.Add((&edge{count: 65, partial: make([]byte, hashSize)}).encode())
	f.Add([]byte{1})
	f.Fuzz(func(t *testing.T, b []byte) {
		var e edge
		if err := e.decode(b); err == nil && !bytes.Equal(e.encode(), b) {
			t.Errorf("edge %x encodes to %x", b, e.encode())
		}
		var s tip
		err := s.decodeState(b)
		if err == nil && !bytes.Equal(s.encodeState(), b) {
			t.Errorf("state %x encodes to %x", b, s.encodeState())
		}
		if err != nil && !errors.Is(err, ErrCorrupt) {
			t.Errorf("got %v, want ErrCorrupt", err)
		}
	})
}
