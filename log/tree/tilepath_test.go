package tree_test

import (
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/chancery-ca/chancery/log/tree"
)

func TestParseTilePath(t *testing.T) {
	for _, tc := range []struct {
		name, path string
		want       tree.TilePath
	}{
		{"first tile", "0/000", tree.TilePath{Width: 256}},
		{"partial tile", "0/000.p/1", tree.TilePath{Width: 1}},
		{"widest partial tile", "1/017.p/255", tree.TilePath{Level: 1, Index: 17, Width: 255}},
		{"grouped index", "2/x001/x234/067", tree.TilePath{Level: 2, Index: 1234067, Width: 256}},
		{"grouped partial index", "63/x001/x234/067.p/9", tree.TilePath{Level: 63, Index: 1234067, Width: 9}},
		{"bundle", "entries/x001/000", tree.TilePath{Entries: true, Index: 1000, Width: 256}},
		{"partial bundle", "entries/000.p/3", tree.TilePath{Entries: true, Width: 3}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := tree.ParseTilePath(tc.path, "entries")
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestParseTilePathRefuses(t *testing.T) {
	for name, path := range map[string]string{
		"empty":                  "",
		"no index":               "0",
		"empty index":            "0/",
		"ungrouped index":        "0/1234",
		"short group":            "0/1",
		"missing x":              "0/001/234",
		"x on the last group":    "0/x001",
		"leading zero group":     "0/x000/001",
		"negative level":         "-1/000",
		"level with zero":        "00/000",
		"level beyond 63":        "64/000",
		"width zero":             "0/000.p/0",
		"width full":             "0/000.p/256",
		"width with zero":        "0/000.p/01",
		"width negative":         "0/000.p/-1",
		"suffix without width":   "0/000.p",
		"trailing slash":         "0/000/",
		"trailing part":          "0/000.p/1/2",
		"parent directory":       "0/../000",
		"the other word":         "data/000",
		"level in letters":       "x/000",
		"plus sign":              "+0/000",
		"plus sign in the index": "0/+00",
		"overflowing index":      "0/x999/x999/x999/x999/x999/x999/x999/x999/999",
		"index of 2^64":          "0/x018/x446/x744/x073/x709/x551/616",
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := tree.ParseTilePath(path, "entries"); err == nil {
				t.Errorf("accepted %q as %+v", path, got)
			}
		})
	}
}

func TestTilePathIn(t *testing.T) {
	for _, tc := range []struct {
		name string
		path tree.TilePath
		size uint64
		want bool
	}{
		{"empty tree", tree.TilePath{Width: 1}, 0, false},
		{"exact", tree.TilePath{Width: 5}, 5, true},
		{"one short", tree.TilePath{Width: 6}, 5, false},
		{"full", tree.TilePath{Width: 256}, 256, true},
		{"prefix of a full tile", tree.TilePath{Width: 255}, 256, true},
		{"next tile", tree.TilePath{Index: 1, Width: 1}, 256, false},
		{"level 1 not yet", tree.TilePath{Level: 1, Width: 1}, 255, false},
		{"level 1", tree.TilePath{Level: 1, Width: 1}, 256, true},
		{"level 7 of the largest tree", tree.TilePath{Level: 7, Width: 255}, math.MaxUint64, true},
		{"level 8", tree.TilePath{Level: 8, Width: 1}, math.MaxUint64, false},
		{"largest index", tree.TilePath{Index: math.MaxInt64, Width: 256}, math.MaxUint64, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := tc.path.In(tc.size); got != tc.want {
				t.Errorf("In(%d) = %v, want %v", tc.size, got, tc.want)
			}
		})
	}
}

// FuzzParseTilePath checks that what is accepted has exactly one spelling.
func FuzzParseTilePath(f *testing.F) {
	for _, s := range []string{"0/000", "entries/x001/x234/067.p/9", "1/017.p/255", "data/000", "0/x999/x999/x999/x999/x999/x999/x999/999"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := tree.ParseTilePath(s, "entries")
		if err != nil {
			return
		}
		if p.Width < 1 || p.Width > tree.TileWidth || p.Level > 63 || p.Index > math.MaxInt64 {
			t.Fatalf("%q gives %+v", s, p)
		}
		want := tlog.Tile{H: 8, L: int(p.Level), N: int64(p.Index), W: p.Width}
		if p.Entries {
			want.L = -1
		}
		spelled := want.Path()[len("tile/8/"):]
		if p.Entries {
			spelled = "entries" + spelled[len("data"):]
		}
		if spelled != s {
			t.Fatalf("%q is a second spelling of %q", s, spelled)
		}
	})
}
