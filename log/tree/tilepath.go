package tree

import (
	"fmt"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
)

// TileWidth is the number of hashes in a full tile and of entries in a full
// bundle (C2SP tlog-tiles).
const TileWidth = 256

const (
	tilePathHeight = 8
	// maxTilePath is longer than the path of any index below 2^63.
	maxTilePath = 48
)

// TilePath is what a C2SP tile path names: Width consecutive hashes of a level,
// or Width entries, starting at TileWidth × Index.
type TilePath struct {
	// Entries says that the path names an entry bundle; Level is then 0.
	Entries bool
	Level   uint64 // 0 to 63
	Index   uint64 // below 2^63
	Width   int    // 1 to TileWidth
}

// ParseTilePath reads what follows "tile/" in a C2SP tile path:
//
//	<L>/<N>[.p/<W>]  or  <bundles>/<N>[.p/<W>]
//
// where bundles is the log's own word for entry bundles ("entries" in
// tlog-tiles, "data" in static-ct-api) and N is written in groups of three
// digits, x001/x234/067. Only the one canonical spelling is accepted.
func ParseTilePath(path, bundles string) (TilePath, error) {
	if len(path) > maxTilePath {
		return TilePath{}, fmt.Errorf("tile path of %d octets: longer than any index", len(path))
	}
	level, rest, _ := strings.Cut(path, "/")
	switch level {
	case bundles:
		level = "data"
	case "data":
		return TilePath{}, fmt.Errorf("tile path %q: malformed", path)
	}
	t, err := tlog.ParseTilePath(fmt.Sprintf("tile/%d/%s/%s", tilePathHeight, level, rest))
	if err != nil || t.L > 63 {
		return TilePath{}, fmt.Errorf("tile path %q: malformed", path)
	}
	p := TilePath{Index: uint64(t.N), Width: t.W}
	if t.L < 0 {
		p.Entries = true
	} else {
		p.Level = uint64(t.L)
	}
	return p, nil
}

// Full says whether the path names a full tile or bundle. Its content never
// changes and its path stays valid for ever.
func (p TilePath) Full() bool { return p.Width == TileWidth }

// In says whether a tree of size leaves fills what the path names.
func (p TilePath) In(size uint64) bool {
	if p.Level > 7 || p.Width < 1 || p.Width > TileWidth {
		return false
	}
	n := size >> (tilePathHeight * p.Level)
	return p.Index < n/TileWidth || p.Index == n/TileWidth && uint64(p.Width) <= n%TileWidth
}
