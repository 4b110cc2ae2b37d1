package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/google/trillian"
)

// TestReaderBesideWriter: a Reader sees what the process that owns the
// directory has committed, and what it copies meanwhile is a whole store.
func TestReaderBesideWriter(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, trillian.TreeType_LOG, Options{})
	distinct := func(i int) bool { return i >= 200 }
	r.fill(0, 300, distinct)
	reader, err := OpenReader(r.s.dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = reader.Close() })
	if trees := reader.Trees(); len(trees) != 1 || trees[0].TreeId != r.tree.TreeId {
		t.Fatalf("trees %v", trees)
	}
	var stop atomic.Bool
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := 300; i < 2000 && !stop.Load(); i += 10 {
			r.fill(i, i+10, distinct)
		}
	}()
	for last := uint64(0); last < 800; {
		root, err := reader.Root(ctx, r.tree.TreeId)
		if err != nil || root.TreeSize < last {
			t.Fatalf("root of %d leaves after %d: %v", root.TreeSize, last, err)
		}
		last = root.TreeSize
		got, err := reader.Entries(ctx, r.tree.TreeId, last-1, 1)
		if err != nil || string(got[0].LeafValue) != string(testLeaf(int(last-1), false).LeafValue) {
			t.Fatalf("entry %d: %v", last-1, err)
		}
		if tile, err := reader.ReadTile(ctx, r.tree.TreeId, 0, 0, 256); err != nil || len(tile) != 256*hashSize {
			t.Fatalf("tile of %d octets: %v", len(tile), err)
		}
	}
	dir := t.TempDir()
	if err := reader.Backup(ctx, dir); err != nil {
		t.Fatal(err)
	}
	stop.Store(true)
	<-done
	if err := reader.Check(ctx, r.tree.TreeId); err != nil {
		t.Errorf("check: %v", err)
	}
	s, tree, err := openTreeIn(dir)
	if err != nil {
		t.Fatal(err)
	}
	_, size, err := digest(s, tree)
	if err != nil || size < 800 {
		t.Errorf("copy of %d leaves: %v", size, err)
	}
	copied := &rig{TB: t, s: s, tree: tree, now: r.now}
	copied.check(int(size), distinct)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// TestReaderAlone: without a process that owns it, and after one that was
// killed, a directory is read as it is, and can then be opened.
func TestReaderAlone(t *testing.T) {
	r := newRig(t, trillian.TreeType_LOG, Options{})
	r.fill(0, 300, same)
	killed := t.TempDir()
	copyFiles(t, r.s.dir, killed) // with its write-ahead log
	if err := r.s.Close(); err != nil {
		t.Fatal(err)
	}
	for name, dir := range map[string]string{"closed": r.s.dir, "killed": killed} {
		t.Run(name, func(t *testing.T) {
			reader, err := OpenReader(dir, Options{})
			if err != nil {
				t.Fatal(err)
			}
			root, err := reader.Root(t.Context(), r.tree.TreeId)
			if err != nil || root.TreeSize != 300 {
				t.Errorf("root of %d leaves: %v", root.TreeSize, err)
			}
			rc := reader.s.trees[r.tree.TreeId].readers
			c := <-rc
			if err := c.script("DELETE FROM entries"); err == nil {
				t.Error("a reader wrote")
			}
			rc <- c
			if err := errors.Join(reader.Close(), reader.Close()); err != nil {
				t.Error(err)
			}
			mustOpen(t, dir, Options{})
		})
	}
}

func TestReaderRefuses(t *testing.T) {
	if _, err := OpenReader(t.TempDir(), Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("empty directory: %v, want ErrNotExist", err)
	}
	for name, test := range map[string]struct {
		file, sql string
		want      error
	}{
		"newer list":        {"admin.db", "PRAGMA user_version=9", ErrSchema},
		"newer tree":        {"tree-%d.db", "PRAGMA user_version=9", ErrSchema},
		"another program's": {"tree-%d.db", "PRAGMA application_id=7", ErrSchema},
		"list":              {"admin.db", "UPDATE trees SET data=zeroblob(9)", ErrCorrupt},
		"another tree's":    {"tree-%d.db", "UPDATE facts SET tree=tree+1", ErrCorrupt},
		"facts":             {"tree-%d.db", "UPDATE facts SET secret=zeroblob(16)", ErrCorrupt},
		"tip":               {"tree-%d.db", "UPDATE tip SET data=zeroblob(length(data))", ErrCorrupt},
		"runs":              {"tree-%d.db", "UPDATE runs SET data=zeroblob(2048) WHERE id=(SELECT max(id) FROM runs)", ErrCorrupt},
		"staged":            {"tree-%d.db", "INSERT INTO staged VALUES (1, x'00', x'00', 7)", ErrCorrupt},
		"generations":       {"tree-%d.db", "INSERT INTO generations VALUES (0, 0, 262144, zeroblob(64), 7)", ErrCorrupt},
		"buckets":           {"tree-%d.db", "INSERT INTO buckets VALUES (0, zeroblob(64), 7)", ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, trillian.TreeType_LOG, Options{})
			r.fill(0, 300, same)
			if err := r.s.Close(); err != nil {
				t.Fatal(err)
			}
			file := test.file
			if file != "admin.db" {
				file = fmt.Sprintf(file, r.tree.TreeId)
			}
			script(t, filepath.Join(r.s.dir, file), test.sql)
			reader, err := OpenReader(r.s.dir, Options{})
			if err == nil {
				err = reader.Check(t.Context(), r.tree.TreeId)
				t.Cleanup(func() { _ = reader.Close() })
			}
			if !errors.Is(err, test.want) {
				t.Errorf("error %v, want %v", err, test.want)
			}
		})
	}
}
