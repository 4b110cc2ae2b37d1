package store

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestMemTable compares the table with a list under random additions and
// truncations, with fingerprints that are often equal or share their low bits.
func TestMemTable(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	const first = 77
	m, list := newMemTable(first), []uint64{}
	fingerprint := func() uint64 { return rnd.Uint64N(64)<<40 | rnd.Uint64N(32)*minSlots }
	for range 300 {
		for range rnd.IntN(60) {
			fp := fingerprint()
			m.add(fp)
			list = append(list, fp)
		}
		if rnd.IntN(3) == 0 {
			list = list[:len(list)-rnd.IntN(min(100, len(list))+1)]
			m.truncate(first + uint64(len(list)))
		}
		for range 20 {
			fp := fingerprint()
			var want []uint64
			for i, other := range slices.Backward(list) {
				if other == fp {
					want = append(want, first+uint64(i))
				}
			}
			if diff := cmp.Diff(want, m.find(fp, nil)); diff != "" || m.has(fp) != (want != nil) {
				t.Fatalf("%d leaves, fingerprint %x (-want +got):\n%s", len(list), fp, diff)
			}
		}
	}
	if len(list) < 2*minSlots {
		t.Fatalf("only %d leaves: the table never grew", len(list))
	}
}
