package torture

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	_ "github.com/mattn/go-sqlite3" // tables are damaged through SQL

	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/store"
	"github.com/chancery-ca/chancery/log/tree"
)

// TestTableBitFlips flips one bit in each column of each table of a log, where
// SQLite itself sees nothing wrong. Every answer that was given is then right
// or refused as damage; none is another.
func TestTableBitFlips(t *testing.T) {
	l := newLane(t)
	for range 2 {
		if status, complaint := l.run(400); status != 0 || complaint != "" {
			t.Fatalf("child: %v: %s", status, complaint)
		}
	}
	for _, tc := range []struct {
		file, table string
		columns     []string
	}{
		{"admin.db", "trees", []string{"id", "data", "sum"}},
		{"tree-*.db", "facts", []string{"tree", "secret", "sum"}},
		{"tree-*.db", "tip", []string{"slot", "data", "sum"}},
		{"tree-*.db", "runs", []string{"id", "data", "sum"}},
		{"tree-*.db", "entries", []string{"idx", "data", "sum"}},
	} {
		t.Run(tc.table, func(t *testing.T) {
			refused, wrong, rounds := 0, 0, long(2, 1)
			for _, column := range tc.columns {
				for range rounds {
					dir := t.TempDir()
					copyLog(t, l.dir, dir)
					where := flip(t, filepath.Join(dir, "log", tc.file), tc.table, column)
					err := l.believe(t.Context(), dir)
					switch {
					case err == nil: // the bit is in nothing that was asked for
					case damage(err):
						refused++
					default:
						wrong++
						t.Errorf("%s: %v", where, err)
					}
				}
			}
			t.Logf("%d flips, %d refused, %d wrong", rounds*len(tc.columns), refused, wrong)
			if refused == 0 {
				t.Error("none was noticed")
			}
		})
	}
}

// damage reports whether err says that stored data are not what they were.
func damage(err error) bool {
	for _, known := range []error{store.ErrCorrupt, tree.ErrCorrupt, store.ErrSchema, head.ErrFork, tree.ErrNotFound, os.ErrNotExist} {
		if errors.Is(err, known) {
			return true
		}
	}
	return false
}

// flip flips a random bit of a column in a random row, and says which. A flip
// that SQLite refuses, as of a key to one that exists, is tried elsewhere.
func flip(t *testing.T, pattern, table, column string) string {
	t.Helper()
	paths, err := filepath.Glob(pattern)
	if err != nil || len(paths) != 1 {
		t.Fatalf("%s: %v, %v", pattern, paths, err)
	}
	db, err := sql.Open("sqlite3", paths[0])
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for range 100 {
		var row int64
		var old any
		if err := db.QueryRow("SELECT rowid, "+column+" FROM "+table+" WHERE length("+column+")>0 ORDER BY random() LIMIT 1").Scan(&row, &old); err != nil {
			t.Fatal(err)
		}
		bit := rand.IntN(63)
		var damaged any
		switch v := old.(type) {
		case int64:
			damaged = v ^ 1<<bit
		case []byte:
			bit = rand.IntN(8 * len(v))
			b := slices.Clone(v)
			b[bit/8] ^= 1 << (bit % 8)
			damaged = b
		default:
			t.Fatalf("%s.%s is a %T", table, column, old)
		}
		if _, err := db.Exec("UPDATE "+table+" SET "+column+"=? WHERE rowid=?", damaged, row); err == nil {
			return fmt.Sprintf("bit %d of %s in row %d of %s", bit, column, row, table)
		}
	}
	t.Fatalf("no bit of %s.%s can be flipped", table, column)
	return ""
}

// believe opens the log in dir, asks for everything that was said, appends, and
// returns the first thing that is not as it was.
func (l *lane) believe(ctx context.Context, dir string) (err error) {
	key, err := newOracle(l.key, io.Discard)
	if err != nil {
		return err
	}
	v, err := open(ctx, dir, key)
	if err != nil {
		return err
	}
	// What is not as it was keeps the log from closing well, too.
	defer func() { _ = v.close(ctx) }()
	if err := l.said.holdsIn(ctx, v.tree, v.heads.Latest()); err != nil {
		return err
	}
	for range 3 {
		if _, err := v.append(ctx, newLeaf()); err != nil {
			return err
		}
	}
	return nil
}

// TestReadOnlyFileSystem: a log on it is refused, with the system's reason, and
// loses nothing.
func TestReadOnlyFileSystem(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err != nil {
		t.Skipf("mounting a tmpfs is not allowed here: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	l := &lane{t: t, dir: dir, key: newKey(t)}
	create(t, dir)
	if status, complaint := l.run(50); status != 0 || complaint != "" {
		t.Fatalf("child: %v: %s", status, complaint)
	}
	remount := func(flags uintptr) {
		t.Helper()
		if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_REMOUNT|flags, ""); err != nil {
			t.Fatal(err)
		}
	}
	remount(syscall.MS_RDONLY)
	err := l.believe(t.Context(), dir)
	if err == nil || !strings.Contains(err.Error(), syscall.EROFS.Error()) {
		t.Errorf("opened read-only: %v, want %q", err, syscall.EROFS)
	}
	remount(0)
	examine(t, dir, l.key, l.said)
}

// TestClockAtStart opens a log whose clock is wrong. Leaves are durable, but
// no head is signed with a time before the last one's; when the clock is right
// again everything goes on.
func TestClockAtStart(t *testing.T) {
	const hour, day = time.Hour, 24 * time.Hour
	for _, tc := range []struct {
		name  string
		fast  []time.Duration // of one process after the other
		signs []bool
	}{
		{"an hour back", []time.Duration{0, -hour, 0}, []bool{true, false, true}},
		{"a day forward, then right", []time.Duration{0, day, 0}, []bool{true, true, false}},
		{"a day forward, an hour back, a day forward", []time.Duration{day, -hour, day}, []bool{true, false, true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir, pkcs8 := t.TempDir(), newKey(t)
			create(t, dir)
			var record strings.Builder
			key, err := newOracle(pkcs8, &record)
			if err != nil {
				t.Fatal(err)
			}
			var all said
			for i, fast := range tc.fast {
				v, err := openAt(t.Context(), dir, key, fast)
				if err != nil {
					t.Fatalf("process %d: open: %v", i, err)
				}
				a, err := v.append(t.Context(), newLeaf())
				switch {
				case tc.signs[i] && err != nil:
					t.Fatalf("process %d: %v", i, err)
				case tc.signs[i]:
					all.answers = append(all.answers, a)
				case !errors.Is(err, head.ErrUnavailable) || !strings.Contains(err.Error(), "behind the last head"):
					t.Errorf("process %d: %v, want ErrUnavailable and the clock", i, err)
				}
				if size := v.tree.Root().Size; size != uint64(i+1) {
					t.Errorf("process %d: %d leaves", i, size)
				}
				if err := v.close(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if err := all.readAll([]byte(record.String())); err != nil {
				t.Fatal(err)
			}
			// The latest of the clocks goes on.
			v, err := openAt(t.Context(), dir, key, day)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := v.append(t.Context(), newLeaf()); err != nil {
				t.Fatal(err)
			}
			if err := all.holdsIn(t.Context(), v.tree, v.heads.Latest()); err != nil {
				t.Error(err)
			}
			if err := v.close(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}
