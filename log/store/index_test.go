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

// TestShelves: filters that share shelves find what was added to them, find
// little else, and are stored as they were built.
func TestShelves(t *testing.T) {
	const generations, keys = 2*shelfWidth + 3, 1000
	rnd := rand.New(rand.NewPCG(5, 6))
	var list []*sealed
	var filters []filter
	added := make([][]uint64, generations)
	for i := range added {
		f := newFilter(keys)
		if i == 0 {
			f = newFilter(keys / 3) // the first generation of identities is shorter
		}
		for range keys {
			fp := rnd.Uint64()
			added[i] = append(added[i], fp)
			f.add(fp)
		}
		g := &sealed{}
		g.place(f, list)
		list, filters = append(list, g), append(filters, f)
	}
	wrong := 0
	for i, g := range list {
		if diff := cmp.Diff(filters[i], g.filter()); diff != "" {
			t.Errorf("filter %d (-built +kept):\n%s", i, diff)
		}
		for j, fps := range added {
			for _, fp := range fps {
				switch has := g.has(newProbe(fp)); {
				case i == j && !has:
					t.Fatalf("filter %d lost a key", i)
				case i != j && has && i > 0:
					wrong++
				}
			}
		}
	}
	if limit := (generations - 1) * (generations - 1) * keys / 200; wrong > limit {
		t.Errorf("%d wrong answers, want at most %d", wrong, limit)
	}
}

// BenchmarkMaybe asks the filters of 10 M leaves for one that is not there.
func BenchmarkMaybe(b *testing.B) {
	const generations = 10_000_000 / generationSize
	v := &view{}
	for range generations {
		f := newFilter(generationSize)
		for range generationSize {
			f.add(rand.Uint64())
		}
		g := &sealed{}
		g.place(f, v.sealed[byLeafHash])
		v.sealed[byLeafHash] = append(v.sealed[byLeafHash], g)
	}
	found := 0
	for b.Loop() {
		if v.maybe(byLeafHash, rand.Uint64()) {
			found++
		}
	}
	b.ReportMetric(100*float64(found)/float64(b.N), "%-wrong")
}
