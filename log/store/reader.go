package store

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/trillian"
	"github.com/google/trillian/types"
	"google.golang.org/protobuf/proto"
)

// Reader is a data directory opened to be read and checked, beside the process
// that owns it or without one. It takes no lock of ours and can write nothing:
// SQLite's write-ahead log gives each read one committed state, for at most
// one second, and holds nobody back. SQLite itself may leave a -wal and a -shm
// file, so the directory must be writable. It is safe for concurrent use.
//
// Trees that are created while it is open are not seen.
type Reader struct {
	s *Store
	// failed has the trees whose files could not be opened: one that is damaged
	// does not hide the others.
	failed map[int64]error
}

// OpenReader opens every tree in dir, which must hold a store. A tree that
// cannot be opened is an error of every call for that tree. Errors, of both:
// os.ErrNotExist, ErrSchema (also for files of an older version, which only
// Open may change), ErrCorrupt.
func OpenReader(dir string, opts Options) (*Reader, error) {
	s := &Store{dir: dir, opts: opts.withDefaults(), trees: make(map[int64]*logTree)}
	s.opts.Readers = 2
	r := &Reader{s, make(map[int64]error)}
	if err := r.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("read log database: %w", err), r.Close())
	}
	return r, nil
}

func (r *Reader) open() (err error) {
	s := r.s
	s.admin = &admin{store: s}
	if s.admin.db, err = openReadOnly(filepath.Join(s.dir, "admin.db"), adminSchema); err != nil {
		return fmt.Errorf("open list of trees: %w", err)
	}
	trees, err := readTrees(s.admin.db)
	if err != nil {
		return fmt.Errorf("open list of trees: %w", err)
	}
	s.admin.trees.Store(&trees)
	for id := range trees {
		t, err := readTree(s.treePath(id), id, s.opts)
		if err != nil {
			r.failed[id] = fmt.Errorf("open tree %d: %w", id, err)
			continue
		}
		s.trees[id] = t
	}
	return nil
}

// tree returns an open tree, or why it could not be opened.
func (r *Reader) tree(id int64) (*logTree, error) {
	if err := r.failed[id]; err != nil {
		return nil, err
	}
	return r.s.tree(id)
}

// openReadOnly opens a file that must be there, in the newest schema.
func openReadOnly(path string, want schema) (*conn, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("find file: %w", err)
	}
	c, err := openConn(path, modeRead, readerPragmas...)
	if err != nil {
		return nil, err
	}
	if err := want.require(c); err != nil {
		return nil, errors.Join(err, c.close())
	}
	return c, nil
}

// require refuses a file that migrate would change, or does not know.
func (s schema) require(c *conn) error {
	app, err := c.integer("PRAGMA application_id")
	if err != nil {
		return fmt.Errorf("read application id: %w", err)
	}
	version, err := c.integer("PRAGMA user_version")
	if err != nil {
		return fmt.Errorf("read schema version: %w", err)
	}
	if app != applicationID || version != int64(len(s)) {
		return fmt.Errorf("%w: application %#x, version %d, want %#x and %d", ErrSchema, app, version, applicationID, len(s))
	}
	return nil
}

// readTree opens a tree file without a writer.
func readTree(path string, id int64, opts Options) (*logTree, error) {
	t := &logTree{
		id: id, path: path, opts: opts,
		writing: make(chan struct{}, 1),
		readers: make(chan *conn, opts.Readers),
		closing: make(chan struct{}),
		open:    make(map[*snapshot]struct{}),
	}
	t.writing <- struct{}{}
	for range opts.Readers {
		c, err := openReadOnly(path, treeSchema)
		if err != nil {
			return nil, errors.Join(err, t.close())
		}
		t.readers <- c
		t.pool++
	}
	if err := t.readFacts(); err != nil {
		return nil, errors.Join(err, t.close())
	}
	return t, nil
}

// readFacts checks the facts and reads the sealed part of the lookup, which a
// backup copies.
func (t *logTree) readFacts() error {
	c := <-t.readers
	defer func() { t.readers <- c }()
	if err := t.checkFacts(c); err != nil {
		return err
	}
	list, err := loadSealed(context.Background(), c)
	if err != nil {
		return err
	}
	t.view.Store(&view{sealed: list})
	return nil
}

// Trees returns what the list says of each tree.
func (r *Reader) Trees() []*trillian.Tree {
	var list []*trillian.Tree
	for _, t := range r.s.admin.current() {
		list = append(list, proto.Clone(t).(*trillian.Tree))
	}
	return list
}

// Root returns the newest committed root of a tree. ErrNotFound: the tree was
// created and never given one.
func (r *Reader) Root(ctx context.Context, treeID int64) (types.LogRootV1, error) {
	var root types.LogRootV1
	t, err := r.tree(treeID)
	if err != nil {
		return root, err
	}
	snap, err := t.snapshot(ctx)
	if err != nil {
		return root, err
	}
	defer snap.Close()
	if snap.tip.root == nil {
		return root, fmt.Errorf("tree %d has no root: %w", treeID, ErrNotFound)
	}
	if err := root.UnmarshalBinary(snap.tip.root); err != nil {
		return root, fmt.Errorf("parse root: %w: %w", ErrCorrupt, err)
	}
	return root, nil
}

// ReadTile is Store.ReadTile.
func (r *Reader) ReadTile(ctx context.Context, treeID int64, level, index uint64, width int) ([]byte, error) {
	t, err := r.tree(treeID)
	if err != nil {
		return nil, err
	}
	return t.readTile(ctx, level, index, width)
}

// Entries returns integrated entries from start on: at least one, at most
// count, fewer where they are large. start must be below the tree's size.
func (r *Reader) Entries(ctx context.Context, treeID int64, start, count uint64) ([]*trillian.LogLeaf, error) {
	t, err := r.tree(treeID)
	if err != nil {
		return nil, err
	}
	var leaves []*trillian.LogLeaf
	err = t.read(ctx, func(s *snapshot) (err error) {
		leaves, err = s.GetLeavesByRange(ctx, int64(start), int64(count))
		return err
	})
	return leaves, err
}

// Backup is Store.Backup: it copies the trees while another process writes.
func (r *Reader) Backup(ctx context.Context, dir string) error {
	for _, err := range r.failed {
		return err
	}
	return r.s.Backup(ctx, dir)
}

// Check compares every row of a tree file with its sum but for the entries,
// which Entries checks: it finds rot in what no proof ever reads. The error
// names the table and the row.
func (r *Reader) Check(ctx context.Context, treeID int64) error {
	t, err := r.tree(treeID)
	if err != nil {
		return err
	}
	for _, table := range []struct {
		name, key, data string
		tag             byte
	}{
		{"tip", "slot", "data", inTip},
		{"runs", "id", "data", inRuns},
		{"staged", "idx", "data", inStaged},
		{"generations", "id", "filter", inGenerations},
		{"buckets", "id", "data", inBuckets},
	} {
		query := fmt.Sprintf("SELECT %[2]s, %[3]s, sum FROM %[1]s WHERE %[2]s>? ORDER BY %[2]s LIMIT %[4]d", table.name, table.key, table.data, backupRows)
		if err := t.checkTable(ctx, query, table.tag); err != nil {
			return fmt.Errorf("check table %s: %w", table.name, err)
		}
	}
	return nil
}

// checkTable reads a table in steps, each a short snapshot.
func (t *logTree) checkTable(ctx context.Context, query string, tag byte) error {
	last, more := int64(-1), true
	for more {
		more = false
		size := 0
		err := t.rows(ctx, query, func(cols []driver.Value) error {
			key, _ := cols[0].(int64)
			data, err := checked(tag, key, cols[1], cols[2])
			if err != nil {
				return err
			}
			last, more = key, true
			if size += len(data); size > backupBytes {
				return errEnough
			}
			return nil
		}, last)
		if ignoreEnough(err) != nil {
			return err
		}
	}
	return nil
}

// Close releases the files. Closing twice is harmless.
func (r *Reader) Close() error {
	s := r.s
	s.mu.Lock()
	trees := s.trees
	s.trees, s.closed = nil, true
	s.mu.Unlock()
	var errs []error
	for _, t := range trees {
		errs = append(errs, t.close())
	}
	if s.admin != nil {
		errs = append(errs, s.admin.close())
	}
	return errors.Join(errs...)
}
