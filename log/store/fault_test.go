package store

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	hashing "hash"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/trillian"
	"github.com/google/trillian/log"
	"github.com/google/trillian/quota"
	"github.com/google/trillian/storage"
	stree "github.com/google/trillian/storage/tree"
	"github.com/google/trillian/types"
	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"
	"google.golang.org/grpc/codes"

	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// digest reads all of a tree through the public interface and condenses it:
// root, leaves, tiles, lookups. It also checks that the root is that of the
// leaves. Any contradiction is an error.
func digest(s *Store, tree *trillian.Tree) (sum [32]byte, size uint64, err error) {
	ctx := context.Background()
	all := sha256.New()
	root, err := readLeaves(ctx, s, tree, all)
	if err != nil {
		return sum, 0, err
	}
	if err := readLookups(ctx, s, tree, root.TreeSize, all); err != nil {
		return sum, 0, err
	}
	for level := uint64(0); level < 3; level++ {
		for i, n := uint64(0), root.TreeSize>>(8*level); i < n; i += tileHashes {
			tile, err := s.ReadTile(ctx, tree.TreeId, level, i/tileHashes, int(min(tileHashes, n-i)))
			if err != nil {
				return sum, 0, fmt.Errorf("read tile: %w", err)
			}
			all.Write(tile)
		}
	}
	return [32]byte(all.Sum(nil)), root.TreeSize, nil
}

// readLookups finds some leaves by both of their hashes.
func readLookups(ctx context.Context, s *Store, tree *trillian.Tree, size uint64, all hashing.Hash) error {
	for i := uint64(0); i < size; i += 1 + size/20 {
		l, err := readRange(ctx, s, tree, int64(i), 1)
		if err != nil {
			return err
		}
		found, err := s.LeafByIdentity(ctx, tree.TreeId, l[0].LeafIdentityHash)
		if err != nil || found.GetLeafIndex() != int64(i) {
			return fmt.Errorf("look up identity %d: found %v: %w", i, found, err)
		}
		var byHash []*trillian.LogLeaf
		err = inSnapshot(ctx, s, tree, func(tx storage.ReadOnlyLogTreeTX) (err error) {
			byHash, err = tx.GetLeavesByHash(ctx, [][]byte{l[0].MerkleLeafHash}, true)
			return err
		})
		if err != nil {
			return fmt.Errorf("look up leaf hash %d: %w", i, err)
		}
		for _, l := range byHash {
			fmt.Fprintf(all, "%d at %d\n", i, l.LeafIndex)
		}
	}
	return nil
}

func readLeaves(ctx context.Context, s *Store, tree *trillian.Tree, all hashing.Hash) (root types.LogRootV1, err error) {
	tx, err := s.SnapshotForTree(ctx, tree)
	if err != nil {
		return root, fmt.Errorf("snapshot: %w", err)
	}
	defer tx.Close()
	slr, err := tx.LatestSignedLogRoot(ctx)
	if err != nil {
		return root, fmt.Errorf("read root: %w", err)
	}
	if err := root.UnmarshalBinary(slr.LogRoot); err != nil {
		return root, fmt.Errorf("parse root: %w", err)
	}
	all.Write(slr.LogRoot)
	factory := compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}
	cr := factory.NewEmptyRange(0)
	for i := int64(0); i < int64(root.TreeSize); {
		leaves, err := readRange(ctx, s, tree, i, int64(root.TreeSize)-i)
		if err != nil {
			return root, fmt.Errorf("read leaves: %w", err)
		}
		for _, l := range leaves {
			fmt.Fprintf(all, "%d %x %x %x %x %v %v\n", l.LeafIndex, l.LeafValue, l.ExtraData, l.MerkleLeafHash, l.LeafIdentityHash, l.QueueTimestamp.AsTime(), l.IntegrateTimestamp.AsTime())
			if !bytes.Equal(rfc6962.DefaultHasher.HashLeaf(l.LeafValue), l.MerkleLeafHash) {
				return root, fmt.Errorf("leaf %d: hash is not that of the value", l.LeafIndex)
			}
			if err := cr.Append(l.MerkleLeafHash, nil); err != nil {
				return root, err
			}
			i++
		}
	}
	got, err := cr.GetRootHash(nil)
	if err != nil {
		return root, err
	}
	if root.TreeSize > 0 && !bytes.Equal(got, root.RootHash) {
		return root, fmt.Errorf("root %x, leaves give %x", root.RootHash, got)
	}
	return root, nil
}

// inSnapshot runs f in a snapshot, and again in another one when that expired, which
// on a machine under load is no fault of what is tested.
func inSnapshot(ctx context.Context, s *Store, tree *trillian.Tree, f func(storage.ReadOnlyLogTreeTX) error) error {
	for {
		tx, err := s.SnapshotForTree(ctx, tree)
		if err != nil {
			return err
		}
		if err = errors.Join(f(tx), tx.Close()); !errors.Is(err, ErrSnapshotExpired) {
			return err
		}
	}
}

// readRange reads leaves in a snapshot of its own.
func readRange(ctx context.Context, s *Store, tree *trillian.Tree, start, count int64) (leaves []*trillian.LogLeaf, err error) {
	err = inSnapshot(ctx, s, tree, func(tx storage.ReadOnlyLogTreeTX) (err error) {
		leaves, err = tx.GetLeavesByRange(ctx, start, count)
		return err
	})
	return leaves, err
}

// openTreeIn opens a store and its only tree.
func openTreeIn(dir string) (*Store, *trillian.Tree, error) {
	s, err := Open(dir, Options{})
	if err != nil {
		return nil, nil, err
	}
	trees, err := storage.ListTrees(context.Background(), s.Admin(), true)
	if err != nil || len(trees) != 1 {
		return nil, nil, errors.Join(fmt.Errorf("%d trees, want 1", len(trees)), err, s.Close())
	}
	return s, trees[0], nil
}

// Modes of the child process, see TestMain.
const (
	childMode = "CHANCERY_STORE_CHILD"
	childDir  = "CHANCERY_STORE_DIR"
)

// TestMain lets the test binary be its own victim: with CHANCERY_STORE_CHILD
// it opens a store and appends, or only holds it, until it is killed.
func TestMain(m *testing.M) {
	switch os.Getenv(childMode) {
	case "append":
		fmt.Fprintln(os.Stderr, childAppend(os.Getenv(childDir)))
		os.Exit(1)
	case "hold":
		fmt.Fprintln(os.Stderr, childHold(os.Getenv(childDir)))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// childAppend integrates leaves for ever and says after each batch how many
// are durable.
func childAppend(dir string) error {
	s, tree, err := openTreeIn(dir)
	if err != nil {
		return err
	}
	_, size, err := digest(s, tree)
	if err != nil {
		return err
	}
	fmt.Println(size)
	clock := &rig{now: int64(size+1) * 1e9} // later than every root before
	for ctx := context.Background(); ; {
		leaves := make([]*trillian.LogLeaf, 1+rand.IntN(60))
		for i := range leaves {
			leaves[i] = testLeaf(int(size)+i, true)
		}
		if _, err := s.QueueLeaves(ctx, tree, leaves, clock.Now()); err != nil {
			return err
		}
		n, err := log.IntegrateBatch(ctx, tree, 1024, 0, 0, clock, s, quota.Noop())
		if err != nil {
			return err
		}
		size += uint64(n)
		fmt.Println(size)
	}
}

func childHold(dir string) error {
	if _, _, err := openTreeIn(dir); err != nil {
		return err
	}
	fmt.Println("open")
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

// child starts the test binary in a mode, under a command if one is given; its
// output is read line by line.
func child(t *testing.T, mode, dir string, under ...string) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	args := append(under, self)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), childMode+"="+mode, childDir+"="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // a test that gave up leaves nobody behind
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd, bufio.NewScanner(out)
}

// acks reads what the child acknowledges, at most n times (all if negative).
func acks(t *testing.T, lines *bufio.Scanner, n int) (acked uint64) {
	t.Helper()
	for ; n != 0 && lines.Scan(); n-- {
		size, err := strconv.ParseUint(lines.Text(), 10, 64)
		if err != nil {
			t.Fatalf("child says %q", lines.Text())
		}
		acked = size
	}
	return acked
}

// survived opens what a child left: nothing that it acknowledged is lost, and
// every batch is whole.
func survived(t *testing.T, dir string, acked uint64) {
	t.Helper()
	s, tree, err := openTreeIn(dir)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	_, size, err := digest(s, tree)
	if err != nil {
		t.Errorf("read back: %v", err)
	}
	if size < acked {
		t.Errorf("%d leaves, %d were acknowledged", size, acked)
	}
	if size > 0 {
		l, err := s.LeafByIdentity(context.Background(), tree.TreeId, testLeaf(int(size-1), true).LeafIdentityHash)
		if err != nil || l.GetLeafIndex() != int64(size-1) {
			t.Errorf("last leaf: %v, %v", l, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// tortureRounds is how often a fault is repeated: few times, or as often as
// CHANCERY_TORTURE_ROUNDS says.
func tortureRounds(few int) int {
	if n, err := strconv.Atoi(os.Getenv("CHANCERY_TORTURE_ROUNDS")); err == nil {
		return n
	}
	return few
}

// TestKill kills a process that appends, at random moments.
func TestKill(t *testing.T) {
	r := newRig(t, trillian.TreeType_LOG, Options{})
	if err := r.s.Close(); err != nil {
		t.Fatal(err)
	}
	for range tortureRounds(5) {
		cmd, lines := child(t, "append", r.s.dir)
		acked := acks(t, lines, 1+rand.IntN(30))
		// The child goes on; a busy wait makes the moment arbitrary.
		for i := rand.IntN(2_000_000); i > 0; i-- {
			_ = sha256.Size * i
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		acked = max(acked, acks(t, lines, -1))
		_ = cmd.Wait()
		survived(t, r.s.dir, acked)
	}
}

// TestSyscallFaults stops a process that appends at the N-th write or sync, or
// makes them fail from there on. A failure must stop it: an acknowledgement
// after a sync that failed would be worth nothing.
func TestSyscallFaults(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		hsmtest.Missing(t, "strace is not installed")
	}
	if out, err := exec.Command(strace, "-qq", "-o", "/dev/null", "/bin/true").CombinedOutput(); err != nil {
		t.Skipf("strace does not work here: %s", out)
	}
	r := newRig(t, trillian.TreeType_LOG, Options{})
	if err := r.s.Close(); err != nil {
		t.Fatal(err)
	}
	for _, inject := range []string{
		"pwrite64:signal=KILL:when=%d",
		"fsync,fdatasync:signal=KILL:when=%d",
		"fsync,fdatasync:error=EIO:when=%d+",
		"pwrite64:error=EIO:when=%d+",
		"pwrite64:error=ENOSPC:when=%d+",
	} {
		t.Run(inject, func(t *testing.T) {
			for range tortureRounds(1) {
				what := fmt.Sprintf(inject, 1+rand.IntN(60))
				cmd, lines := child(t, "append", r.s.dir, strace, "-f", "-qq", "-o", "/dev/null",
					"-e", "trace=pwrite64,fsync,fdatasync", "-e", "signal=none", "-e", "inject="+what)
				acked := acks(t, lines, -1)
				_ = cmd.Wait()
				t.Logf("%s: %d acknowledged", what, acked)
				survived(t, r.s.dir, acked)
			}
		})
	}
}

// TestTwoProcesses: the second is refused as long as the first lives.
func TestTwoProcesses(t *testing.T) {
	r := newRig(t, trillian.TreeType_LOG, Options{})
	if _, err := Open(r.s.dir, Options{}); !errors.Is(err, ErrLocked) {
		t.Errorf("open twice in one process: %v, want ErrLocked", err)
	}
	if err := r.s.Close(); err != nil {
		t.Fatal(err)
	}
	cmd, lines := child(t, "hold", r.s.dir)
	if !lines.Scan() || lines.Text() != "open" {
		t.Fatalf("child says %q", lines.Text())
	}
	if _, err := Open(r.s.dir, Options{}); !errors.Is(err, ErrLocked) {
		t.Errorf("open beside another process: %v, want ErrLocked", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	mustOpen(t, r.s.dir, Options{})
}

// copyFiles copies the files of a directory.
func copyFiles(t *testing.T, from, to string) {
	t.Helper()
	names, err := os.ReadDir(from)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if strings.HasSuffix(n.Name(), "-shm") || n.Name() == "LOCK" {
			continue
		}
		b, err := os.ReadFile(filepath.Join(from, n.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(to, n.Name()), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// flip flips one bit of a file at a random place.
func flip(t *testing.T, path string, rnd *rand.Rand) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	at, bit := rnd.IntN(len(b)), rnd.IntN(8)
	b[at] ^= 1 << bit
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("bit %d of octet %d", bit, at)
}

// TestBitFlips: a flipped bit in the tree's file, in its write-ahead log or in
// the list of trees is noticed, or what can be read is what was written. In
// the write-ahead log SQLite takes a damaged batch for one that never
// committed: an earlier state, whole, which log/head's anchor finds.
func TestBitFlips(t *testing.T) {
	r := newRig(t, trillian.TreeType_LOG, Options{})
	states := map[[32]byte]bool{}
	remember := func() {
		d, _, err := digest(r.s, r.tree)
		if err != nil {
			t.Fatal(err)
		}
		states[d] = true
	}
	remember()
	for n := 0; n < 420; n += 60 {
		for i := n; i < n+60; i++ {
			r.queue(testLeaf(i, true))
		}
		r.integrate(60)
		remember()
	}
	name := fmt.Sprintf("tree-%d.db", r.tree.TreeId)
	live, closed := t.TempDir(), t.TempDir()
	copyFiles(t, r.s.dir, live)
	final, _, err := digest(r.s, r.tree)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.s.Close(); err != nil {
		t.Fatal(err)
	}
	copyFiles(t, r.s.dir, closed)
	for _, tc := range []struct {
		name, from, file string
		flips            int
		allowed          map[[32]byte]bool
	}{
		{"tree file", closed, name, 120, map[[32]byte]bool{final: true}},
		{"list of trees", closed, "admin.db", 20, map[[32]byte]bool{final: true}},
		{"write-ahead log", live, name + "-wal", 60, states},
	} {
		t.Run(tc.name, func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(1, 2))
			noticed := 0
			for range tc.flips {
				dir := t.TempDir()
				copyFiles(t, tc.from, dir)
				where := flip(t, filepath.Join(dir, tc.file), rnd)
				s, tree, err := openTreeIn(dir)
				if err != nil {
					noticed++
					continue
				}
				got, _, err := digest(s, tree)
				switch {
				case err != nil:
					noticed++
				case !tc.allowed[got]:
					t.Errorf("%s: other content, unnoticed", where)
				}
				_ = s.Close()
			}
			t.Logf("%d of %d flips noticed", noticed, tc.flips)
		})
	}
}

func TestSchema(t *testing.T) {
	tests := map[string]struct {
		damage func(t *testing.T, dir, tree string)
		want   error
	}{
		"newer tree": {func(t *testing.T, _, tree string) { script(t, tree, "PRAGMA user_version=99") }, ErrSchema},
		"newer list": {func(t *testing.T, dir, _ string) { script(t, filepath.Join(dir, "admin.db"), "PRAGMA user_version=99") }, ErrSchema},
		"foreign":    {func(t *testing.T, _, tree string) { script(t, tree, "PRAGMA application_id=1") }, ErrSchema},
		"empty tree": {func(t *testing.T, _, tree string) { write(t, tree, nil) }, ErrSchema},
		"no database": {func(t *testing.T, _, tree string) {
			write(t, tree, bytes.Repeat([]byte("not a database "), 5000))
		}, ErrCorrupt},
		"missing tree": {func(t *testing.T, _, tree string) {
			if err := os.Remove(tree); err != nil {
				t.Fatal(err)
			}
		}, os.ErrNotExist},
		"another tree's file": {func(t *testing.T, _, tree string) { script(t, tree, "UPDATE facts SET tree=tree+1") }, ErrCorrupt},
		"no tip":              {func(t *testing.T, _, tree string) { script(t, tree, "DELETE FROM tip WHERE slot=0") }, ErrCorrupt},
		"no secret":           {func(t *testing.T, _, tree string) { script(t, tree, "DELETE FROM facts") }, ErrCorrupt},
		"other secret":        {func(t *testing.T, _, tree string) { script(t, tree, "UPDATE facts SET secret=zeroblob(16)") }, ErrCorrupt},
		"lost run":            {func(t *testing.T, _, tree string) { script(t, tree, "DELETE FROM runs WHERE id=1<<58") }, ErrCorrupt},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, trillian.TreeType_LOG, Options{})
			r.fill(0, 100, same)
			if err := r.s.Close(); err != nil {
				t.Fatal(err)
			}
			tc.damage(t, r.s.dir, r.s.treePath(r.tree.TreeId))
			s, err := Open(r.s.dir, Options{})
			if err == nil {
				_ = s.Close()
			}
			if !errors.Is(err, tc.want) {
				t.Errorf("Open: %v, want %v", err, tc.want)
			}
		})
	}
}

func script(t *testing.T, path, sql string) {
	t.Helper()
	c, err := openConn(path, modeExisting)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	if err := c.script(sql); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestMigrate: an older file is brought up step by step; a step that fails
// leaves the file as it was.
func TestMigrate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.db")
	c, err := openConn(path, modeCreate, writerPragmas...)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	one := schema{"CREATE TABLE a (x)"}
	if err := one.migrate(c, false); !errors.Is(err, ErrSchema) {
		t.Errorf("empty file: %v, want ErrSchema", err)
	}
	if err := one.migrate(c, true); err != nil {
		t.Fatal(err)
	}
	bad := schema{one[0], "CREATE TABLE b (x); INSERT INTO nowhere VALUES (1)"}
	if err := bad.migrate(c, false); err == nil {
		t.Error("a step that fails: no error")
	}
	two := schema{one[0], "ALTER TABLE a ADD COLUMN y"}
	if err := two.migrate(c, false); err != nil {
		t.Fatalf("after the failed step: %v", err)
	}
	if err := c.script("INSERT INTO a (x, y) VALUES (1, 2)"); err != nil {
		t.Error(err)
	}
	if err := one.migrate(c, false); !errors.Is(err, ErrSchema) {
		t.Errorf("newer file: %v, want ErrSchema", err)
	}
}

// TestDiskFull: a batch that does not fit is refused whole; the tree goes on
// when there is room again, with the leaves that were waiting.
func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small tmpfs needs root")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=6m"); err != nil {
		t.Skipf("mounting a small tmpfs is not allowed: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	r := &rig{TB: t, s: mustOpen(t, dir, Options{})}
	r.create(trillian.TreeType_LOG)
	ctx := context.Background()
	var err error
	n := 0
	for ; err == nil && n < 20_000; n += 50 {
		leaves := make([]*trillian.LogLeaf, 50)
		for i := range leaves {
			leaves[i] = bulkLeaf(n+i, 1024)
		}
		r.queue(leaves...)
		_, err = log.IntegrateBatch(ctx, r.tree, 1024, 0, 0, r, r.s, quota.Noop())
	}
	if err == nil {
		t.Fatal("6 MiB hold everything?")
	}
	t.Logf("after about %d leaves: %v", n, err)
	size := r.root().TreeSize
	if _, _, err := digest(r.s, r.tree); err != nil {
		t.Fatalf("what was committed: %v", err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_REMOUNT, "size=64m"); err != nil {
		t.Fatal(err)
	}
	if lt, e := r.s.tree(r.tree.TreeId); e != nil || lt.failed() != nil {
		// The outcome was unknown: open again, queue again.
		if errors.Is(err, ErrFailed) {
			r.reopen()
		} else {
			t.Fatalf("stopped after %v", err)
		}
		for i := size; i < uint64(n); i++ {
			r.queue(bulkLeaf(int(i), 1024))
		}
	}
	r.integrate(4096)
	if got := r.root().TreeSize; got != uint64(n) {
		t.Errorf("after making room: %d leaves, want %d", got, n)
	}
	if _, _, err := digest(r.s, r.tree); err != nil {
		t.Errorf("after making room: %v", err)
	}
}

// TestFull: SQLite's own limit instead of the disk's.
func TestFull(t *testing.T) {
	r := newRig(t, trillian.TreeType_LOG, Options{})
	r.fill(0, 300, same)
	lt, err := r.s.tree(r.tree.TreeId)
	if err != nil {
		t.Fatal(err)
	}
	pages, err := lt.writer.integer("PRAGMA page_count")
	if err != nil {
		t.Fatal(err)
	}
	if err := lt.writer.script(fmt.Sprintf("PRAGMA max_page_count=%d", pages+2)); err != nil {
		t.Fatal(err)
	}
	leaves := make([]*trillian.LogLeaf, 1000)
	for i := range leaves {
		leaves[i] = testLeaf(300+i, false)
	}
	r.queue(leaves...)
	if _, err = log.IntegrateBatch(context.Background(), r.tree, 1024, 0, 0, r, r.s, quota.Noop()); err == nil {
		t.Fatal("a batch beyond the limit was stored")
	}
	if q := r.queue(testLeaf(301, false)); q[0].Status.GetCode() != int32(codes.AlreadyExists) || q[0].Leaf.IntegrateTimestamp != nil {
		t.Errorf("leaf of the refused batch: %v, want queued", q[0])
	}
	r.check(300, same)
	if err := lt.writer.script("PRAGMA max_page_count=1000000"); err != nil {
		t.Fatal(err)
	}
	if n := r.integrate(1024); n != 1000 {
		t.Fatalf("integrated %d, want 1000", n)
	}
	r.check(1300, same)
}

// TestReadersDoNotWait: with a transaction open in SQLite itself, everything
// that reads and queueing go on.
func TestReadersDoNotWait(t *testing.T) {
	r := newRig(t, trillian.TreeType_LOG, Options{})
	r.fill(0, 700, same)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	lt, err := r.s.tree(r.tree.TreeId)
	if err != nil {
		t.Fatal(err)
	}
	if err := lt.acquire(ctx); err != nil {
		t.Fatal(err)
	}
	defer lt.release()
	err = lt.writer.transaction(func() error {
		if err := lt.writer.exec("DELETE FROM entries"); err != nil {
			return err
		}
		r.check(700, same)
		if q := r.queue(testLeaf(5, false), testLeaf(700, false)); q[0].Leaf.LeafIndex != 5 || q[1].Status != nil {
			t.Errorf("QueueLeaves: %v", q)
		}
		return errEnough
	})
	if !errors.Is(err, errEnough) {
		t.Fatal(err)
	}
}

func TestSnapshotExpires(t *testing.T) {
	r := newRig(t, trillian.TreeType_LOG, Options{Snapshot: time.Millisecond, Readers: 1})
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	tx := r.snapshot()
	for {
		_, err := tx.GetMerkleNodes(ctx, nil)
		if errors.Is(err, ErrSnapshotExpired) {
			break
		}
		if err != nil || ctx.Err() != nil {
			t.Fatalf("got %v, want ErrSnapshotExpired", err)
		}
	}
	if err := tx.Commit(ctx); !errors.Is(err, ErrSnapshotExpired) {
		t.Errorf("Commit: %v, want ErrSnapshotExpired", err)
	}
	if err := tx.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	r.root() // the connection is free again
}

// expiring is a context that lets snapshots expire while it is asked, so many
// times and never twice within 20 questions.
type expiring struct {
	context.Context
	t  *logTree
	wg sync.WaitGroup

	mu          sync.Mutex
	asked, next int
	left, times int
}

func (e *expiring) Err() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.asked++; e.asked >= e.next && e.left > 0 {
		e.left--
		e.next = math.MaxInt
		e.wg.Go(func() {
			e.t.expire(ErrSnapshotExpired)
			e.mu.Lock()
			defer e.mu.Unlock()
			e.next, e.times = e.asked+20, e.times+1
		})
	}
	return e.Context.Err()
}

// expire ends all snapshots of a tree.
func (t *logTree) expire(why error) {
	t.mu.Lock()
	var open []*snapshot
	for s := range t.open {
		open = append(open, s)
	}
	t.mu.Unlock()
	for _, s := range open {
		s.end(why)
	}
}

// TestReadsOutliveSnapshots: what takes longer than a snapshot may live, on a
// slow disk or a busy machine, goes on in another one.
func TestReadsOutliveSnapshots(t *testing.T) {
	r := newRig(t, trillian.TreeType_LOG, Options{})
	r.fill(0, 1000, same)
	lt, err := r.s.tree(r.tree.TreeId)
	if err != nil {
		t.Fatal(err)
	}
	again := make([]*trillian.LogLeaf, 1000)
	for i := range again {
		again[i] = testLeaf(i, false)
	}
	ctx := &expiring{Context: context.Background(), t: lt, next: 20, left: 10 * maxAttempts}
	q, err := r.s.QueueLeaves(ctx, r.tree, again, r.Now())
	ctx.wg.Wait()
	t.Logf("%d snapshots expired", ctx.times)
	if err != nil {
		t.Fatalf("%d leaves again: %v", len(again), err)
	}
	for i := range q {
		if q[i].Status.GetCode() != int32(codes.AlreadyExists) || q[i].Leaf.LeafIndex != int64(i) {
			t.Fatalf("leaf %d again: %v", i, q[i])
		}
	}

	tries := 0
	err = lt.read(context.Background(), func(s *snapshot) error {
		if tries++; tries < maxAttempts {
			s.end(ErrSnapshotExpired)
		}
		return s.use(func() error { return nil })
	})
	if err != nil || tries != maxAttempts {
		t.Errorf("read at the %d. attempt: %v", tries, err)
	}
	err = lt.read(context.Background(), func(s *snapshot) error {
		s.end(ErrSnapshotExpired)
		return s.use(func() error { return nil })
	})
	if !errors.Is(err, ErrSnapshotExpired) {
		t.Errorf("read that never gets its turn: %v, want ErrSnapshotExpired", err)
	}
}

// TestCommitOfAnExpiredSnapshot: what was read before it expired is of one state
// and counts; a read that was refused does not.
func TestCommitOfAnExpiredSnapshot(t *testing.T) {
	r := newRig(t, trillian.TreeType_LOG, Options{})
	r.fill(0, 10, same)
	lt, err := r.s.tree(r.tree.TreeId)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	for _, late := range []bool{false, true} {
		s, err := lt.snapshot(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if l, err := s.GetLeavesByRange(ctx, 0, 10); err != nil || len(l) != 10 {
			t.Errorf("%d leaves: %v", len(l), err)
		}
		s.end(ErrSnapshotExpired)
		var want error
		if late {
			want = ErrSnapshotExpired
			if _, err := s.GetLeavesByRange(ctx, 0, 10); !errors.Is(err, want) {
				t.Errorf("read after the end: %v, want ErrSnapshotExpired", err)
			}
		}
		if err := s.Commit(ctx); !errors.Is(err, want) {
			t.Errorf("commit: %v, want %v", err, want)
		}
	}
}

func TestReadersAreBounded(t *testing.T) {
	r := newRig(t, trillian.TreeType_LOG, Options{Readers: 1})
	tx := r.snapshot()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := r.s.SnapshotForTree(ctx, r.tree); !errors.Is(err, context.Canceled) {
		t.Errorf("second snapshot: %v, want context.Canceled", err)
	}
	if err := tx.Commit(context.Background()); err != nil {
		t.Error(err)
	}
	if _, err := tx.GetLeavesByRange(context.Background(), 0, 1); err == nil {
		t.Error("read after Commit: no error")
	}
}

// TestConcurrent reads, proves and queues while batches are integrated.
func TestConcurrent(t *testing.T) {
	r := newRig(t, trillian.TreeType_LOG, Options{WALLimit: 1 << 20})
	const leaves = 1000
	done := make(chan struct{})
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-done:
					return
				default:
				}
				if n%400 == 0 {
					if _, _, err := digest(r.s, r.tree); err != nil {
						t.Errorf("reader %d: %v", g, err)
						return
					}
				}
				i := rand.IntN(leaves)
				q, err := r.s.QueueLeaves(context.Background(), r.tree, []*trillian.LogLeaf{testLeaf(i, true)}, time.Unix(1_700_000_000, 0))
				if err != nil {
					t.Errorf("queue: %v", err)
					return
				}
				if !bytes.Equal(q[0].Leaf.LeafValue, testLeaf(i, true).LeafValue) {
					t.Errorf("queued leaf %d, got %q", i, q[0].Leaf.LeafValue)
				}
			}
		})
	}
	for r.root().TreeSize < leaves && !t.Failed() {
		r.integrate(64)
	}
	close(done)
	wg.Wait()
	seen := map[string]bool{}
	for i := int64(0); i < leaves; {
		l, err := readRange(context.Background(), r.s, r.tree, i, leaves)
		if err != nil {
			t.Fatal(err)
		}
		for _, leaf := range l {
			if seen[string(leaf.LeafValue)] {
				t.Errorf("%q is in the tree twice", leaf.LeafValue)
			}
			seen[string(leaf.LeafValue)] = true
		}
		i += int64(len(l))
	}
	if got := r.root().TreeSize; got != leaves {
		t.Errorf("tree size %d, want each leaf once: %d", got, leaves)
	}
}

// TestWALIsBounded: the write-ahead log stays near its limit, though the writer
// waits for a checkpoint to begin only, never for its end.
func TestWALIsBounded(t *testing.T) {
	const limit, chunk = 8 << 20, 4 << 20
	r := newRig(t, trillian.TreeType_LOG, Options{WALLimit: limit})
	lt, err := r.s.tree(r.tree.TreeId)
	if err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for leaf := 0; leaf < 60_000; leaf += chunk / 1024 {
		bulk(r, leaf, leaf+chunk/1024, 512, 1024)
		for lt.checkpoints.since.Load() >= checkpointStep {
			<-tick.C
		}
	}
	info, err := os.Stat(r.s.treePath(r.tree.TreeId) + "-wal")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("write-ahead log of %d octets at most, limit %d", info.Size(), limit)
	// Twice the limit, and what comes while one checkpoint is made and the next
	// one begins.
	if info.Size() > 5*limit {
		t.Errorf("write-ahead log has %d octets, limit %d", info.Size(), limit)
	}
}

func TestBackup(t *testing.T) {
	r := newRig(t, trillian.TreeType_LOG, Options{})
	distinct := func(i int) bool { return i >= 200 }
	r.fill(0, 900, distinct)
	dir := t.TempDir()
	if err := r.s.Backup(context.Background(), dir); err != nil {
		t.Fatalf("Backup: %v", err)
	}
	want, _, err := digest(r.s, r.tree)
	if err != nil {
		t.Fatal(err)
	}
	r.fill(900, 1000, distinct)
	if err := r.s.Backup(context.Background(), dir); !errors.Is(err, os.ErrExist) {
		t.Errorf("Backup over a backup: %v, want ErrExist", err)
	}
	s, tree, err := openTreeIn(dir)
	if err != nil {
		t.Fatalf("open backup: %v", err)
	}
	got, _, err := digest(s, tree)
	if err != nil || got != want {
		t.Errorf("backup differs: %v", err)
	}
	copied := &rig{TB: t, s: s, tree: tree, now: r.now}
	copied.fill(900, 1000, distinct)
	copied.check(1000, distinct)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestRewriteRefused(t *testing.T) {
	r := newRig(t, trillian.TreeType_LOG, Options{})
	r.fill(0, 300, same)
	ctx := context.Background()
	bad := bytes.Repeat([]byte{1}, 32)
	tests := map[string]struct {
		level uint
		index uint64
		hash  []byte
		want  error
	}{
		"other hash in a full run":   {0, 10, bad, ErrCorrupt},
		"other hash in the last run": {0, 299, bad, ErrCorrupt},
		"other hash of a tile":       {8, 0, bad, ErrCorrupt},
		"same hash":                  {0, 10, testLeaf(10, false).MerkleLeafHash, nil},
		"hash without an entry":      {0, 300, bad, errAny},
		"hash beyond the end":        {0, 302, bad, errAny},
		"hash of the wrong length":   {0, 300, bad[:20], errAny},
		"level beyond any tree":      {64, 0, bad, errAny},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			err := r.s.ReadWriteTransaction(ctx, r.tree, func(ctx context.Context, tx storage.LogTreeTX) error {
				return tx.SetMerkleNodes(ctx, nodeOf(tc.level, tc.index, tc.hash))
			})
			if (tc.want == errAny && err == nil) || (tc.want != errAny && !errors.Is(err, tc.want)) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
	r.check(300, same)
}

func nodeOf(level uint, index uint64, h []byte) []stree.Node {
	return []stree.Node{{ID: compact.NodeID{Level: level, Index: index}, Hash: h}}
}

var errAny = errors.New("any error")

func TestPreordered(t *testing.T) {
	r := newRig(t, trillian.TreeType_PREORDERED_LOG, Options{})
	ctx := context.Background()
	add := func(from, to int) []*trillian.QueuedLogLeaf {
		t.Helper()
		var leaves []*trillian.LogLeaf
		for i := from; i < to; i++ {
			l := testLeaf(i, true)
			l.LeafIndex = int64(i)
			leaves = append(leaves, l)
		}
		q, err := r.s.AddSequencedLeaves(ctx, r.tree, leaves, r.Now())
		if err != nil {
			t.Fatalf("AddSequencedLeaves: %v", err)
		}
		return q
	}
	add(0, 100)
	add(300, 400)
	if n := r.integrate(1024); n != 100 {
		t.Fatalf("integrated %d, want the 100 before the gap", n)
	}
	add(100, 300)
	r.reopen()
	if n := r.integrate(150); n != 150 {
		t.Fatalf("integrated %d, want 150", n)
	}
	if n := r.integrate(1024); n != 150 {
		t.Fatalf("integrated %d, want 150", n)
	}
	r.check(400, func(int) bool { return true })
	for i, q := range add(0, 400) {
		if q.Status.GetCode() != int32(codes.AlreadyExists) || q.Leaf.LeafIndex != int64(i) {
			t.Fatalf("leaf %d again: %v", i, q)
		}
	}
	moved := testLeaf(7, true)
	moved.LeafIndex = 400
	other := testLeaf(999, true)
	other.LeafIndex = 8
	q, err := r.s.AddSequencedLeaves(ctx, r.tree, []*trillian.LogLeaf{moved, other}, r.Now())
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []int64{7, 8} {
		if q[i].Status.GetCode() != int32(codes.FailedPrecondition) || q[i].Leaf.LeafIndex != want {
			t.Errorf("conflict %d: %v", i, q[i])
		}
	}
}
