package store

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/trillian"
	"github.com/google/trillian/storage"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// treeMap is one committed state of the list of trees. It and the trees in it
// are never changed once published; readers get clones.
type treeMap = map[int64]*trillian.Tree

// admin is the list of trees, admin.db. Reading it costs no I/O: the whole
// list is in memory, replaced after each commit.
type admin struct {
	store *Store
	trees atomic.Pointer[treeMap]

	mu sync.Mutex // held by the one write transaction
	db *conn      // guarded by mu
}

var _ storage.AdminStorage = (*admin)(nil)

func openAdmin(s *Store) (*admin, error) {
	path := filepath.Join(s.dir, "admin.db")
	_, err := os.Stat(path)
	fresh := errors.Is(err, os.ErrNotExist)
	db, err := openConn(path, modeCreate, writerPragmas...)
	if err != nil {
		return nil, err
	}
	a := &admin{store: s, db: db}
	if err := a.load(fresh); err != nil {
		return nil, errors.Join(err, db.close())
	}
	return a, nil
}

func (a *admin) load(fresh bool) error {
	// An interrupted creation leaves a file without a schema and without trees.
	if err := adminSchema.migrate(a.db, true); err != nil {
		return err
	}
	if fresh {
		if err := syncDir(a.store.dir); err != nil {
			return err
		}
	}
	trees, err := readTrees(a.db)
	if err != nil {
		return err
	}
	a.trees.Store(&trees)
	return nil
}

// readTrees reads the list of trees.
func readTrees(c *conn) (treeMap, error) {
	trees := make(treeMap)
	err := c.query(context.Background(), "SELECT id, data, sum FROM trees", func(cols []driver.Value) error {
		id, _ := cols[0].(int64)
		data, err := checked(inTrees, id, cols[1], cols[2])
		if err != nil {
			return err
		}
		var t trillian.Tree
		if err := proto.Unmarshal(data, &t); err != nil || t.TreeId != id {
			return fmt.Errorf("parse tree %d: %w", id, ErrCorrupt)
		}
		trees[id] = &t
		return nil
	})
	return trees, err
}

func (a *admin) current() treeMap { return *a.trees.Load() }

func (a *admin) close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	err := a.db.close()
	a.db = nil
	return err
}

// CheckDatabaseAccessible implements storage.AdminStorage.
func (a *admin) CheckDatabaseAccessible(ctx context.Context) error {
	return a.store.CheckDatabaseAccessible(ctx)
}

// Snapshot implements storage.AdminStorage. It costs no I/O.
func (a *admin) Snapshot(context.Context) (storage.ReadOnlyAdminTX, error) {
	return &adminReader{trees: a.current()}, nil
}

// ReadWriteTransaction implements storage.AdminStorage. Files of new trees are
// created before the list names them, files of hard-deleted trees removed
// after it no longer does.
func (a *admin) ReadWriteTransaction(ctx context.Context, f storage.AdminTXFunc) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.db == nil {
		return ErrClosed
	}
	tx := &adminTX{adminReader: adminReader{trees: maps.Clone(a.current())}, now: a.store.opts.Now, changed: make(map[int64]bool)}
	if err := f(ctx, tx); err != nil {
		return err
	}
	return a.commit(tx)
}

func (a *admin) commit(tx *adminTX) error {
	if len(tx.changed) == 0 {
		return nil
	}
	opened, err := a.createFiles(tx)
	if err != nil {
		for id, t := range opened {
			err = errors.Join(err, t.close(), removeDatabase(a.store.treePath(id)))
		}
		return err
	}
	if err := a.save(tx); err != nil {
		// The list may or may not name the new files; unnamed ones do no harm.
		for _, t := range opened {
			err = errors.Join(err, t.close())
		}
		return err
	}
	a.trees.Store(&tx.trees)
	return a.swapFiles(tx, opened)
}

// createFiles creates the files of trees that are new in tx.
func (a *admin) createFiles(tx *adminTX) (map[int64]*logTree, error) {
	opened := make(map[int64]*logTree)
	for id := range tx.changed {
		if a.current()[id] != nil || tx.trees[id] == nil {
			continue
		}
		t, err := createTree(a.store.treePath(id), id, a.store.opts)
		if err != nil {
			return opened, fmt.Errorf("create tree %d: %w", id, err)
		}
		opened[id] = t
	}
	if len(opened) == 0 {
		return opened, nil
	}
	return opened, syncDir(a.store.dir)
}

// save writes the changed rows in one transaction.
func (a *admin) save(tx *adminTX) (err error) {
	if err := a.db.script("BEGIN IMMEDIATE"); err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	defer func() {
		if err != nil {
			_ = a.db.script("ROLLBACK")
		}
	}()
	for id := range tx.changed {
		t := tx.trees[id]
		if t == nil {
			if err := a.db.exec("DELETE FROM trees WHERE id=?", id); err != nil {
				return fmt.Errorf("delete tree: %w", err)
			}
			continue
		}
		data, err := proto.Marshal(t)
		if err != nil {
			return fmt.Errorf("serialise tree: %w", err)
		}
		if err := a.db.exec("INSERT OR REPLACE INTO trees (id, data, sum) VALUES (?,?,?)", id, data, checksum(inTrees, id, data)); err != nil {
			return fmt.Errorf("store tree: %w", err)
		}
	}
	if err := a.db.script("COMMIT"); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	return nil
}

// swapFiles publishes new trees and removes the files of deleted ones.
func (a *admin) swapFiles(tx *adminTX, opened map[int64]*logTree) error {
	s := a.store
	var gone []*logTree
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		err := ErrClosed
		for _, t := range opened {
			err = errors.Join(err, t.close())
		}
		return err
	}
	for id, t := range opened {
		s.trees[id] = t
	}
	for id := range tx.changed {
		if t := s.trees[id]; tx.trees[id] == nil && t != nil {
			gone = append(gone, t)
			delete(s.trees, id)
		}
	}
	s.mu.Unlock()
	var errs []error
	for _, t := range gone {
		errs = append(errs, t.close(), removeDatabase(s.treePath(t.id)))
	}
	return errors.Join(errs...)
}

// removeDatabase removes a SQLite file and what belongs to it.
func removeDatabase(path string) error {
	var errs []error
	for _, suffix := range []string{"-wal", "-shm", ""} {
		if err := os.Remove(path + suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// adminReader is a view of one state of the list.
type adminReader struct{ trees treeMap }

func (r *adminReader) get(id int64) (*trillian.Tree, error) {
	t := r.trees[id]
	if t == nil {
		return nil, status.Errorf(codes.NotFound, "tree %d not found", id)
	}
	return proto.Clone(t).(*trillian.Tree), nil
}

// GetTree implements storage.ReadOnlyAdminTX.
func (r *adminReader) GetTree(_ context.Context, id int64) (*trillian.Tree, error) {
	return r.get(id)
}

// ListTrees implements storage.ReadOnlyAdminTX.
func (r *adminReader) ListTrees(_ context.Context, includeDeleted bool) ([]*trillian.Tree, error) {
	var list []*trillian.Tree
	for _, t := range r.trees {
		if includeDeleted || !t.Deleted {
			list = append(list, proto.Clone(t).(*trillian.Tree))
		}
	}
	return list, nil
}

// Commit implements storage.ReadOnlyAdminTX.
func (r *adminReader) Commit() error { return nil }

// Close implements storage.ReadOnlyAdminTX.
func (r *adminReader) Close() error { return nil }

// adminTX is a private copy of the list and which trees of it changed. It is
// stored by ReadWriteTransaction, not by its own Commit.
type adminTX struct {
	adminReader
	now     func() time.Time
	changed map[int64]bool
}

// put keeps a clone, so that the caller's tree is its own.
func (tx *adminTX) put(t *trillian.Tree) *trillian.Tree {
	tx.trees[t.TreeId] = proto.Clone(t).(*trillian.Tree)
	tx.changed[t.TreeId] = true
	return t
}

// CreateTree implements storage.AdminWriter.
func (tx *adminTX) CreateTree(ctx context.Context, tree *trillian.Tree) (*trillian.Tree, error) {
	if err := storage.ValidateTreeForCreation(ctx, tree); err != nil {
		return nil, err
	}
	if tree.StorageSettings != nil {
		return nil, status.Error(codes.InvalidArgument, "storage_settings not supported")
	}
	id, err := storage.NewTreeID()
	if err != nil {
		return nil, fmt.Errorf("choose tree id: %w", err)
	}
	if tx.trees[id] != nil {
		return nil, status.Errorf(codes.AlreadyExists, "tree %d exists", id)
	}
	t := proto.Clone(tree).(*trillian.Tree)
	t.TreeId = id
	t.CreateTime = timestamppb.New(tx.now())
	t.UpdateTime = proto.Clone(t.CreateTime).(*timestamppb.Timestamp)
	return tx.put(t), nil
}

// UpdateTree implements storage.AdminWriter.
func (tx *adminTX) UpdateTree(ctx context.Context, id int64, update func(*trillian.Tree)) (*trillian.Tree, error) {
	t, err := tx.get(id)
	if err != nil {
		return nil, err
	}
	before := proto.Clone(t).(*trillian.Tree)
	update(t)
	if err := storage.ValidateTreeForUpdate(ctx, before, t); err != nil {
		return nil, err
	}
	if t.StorageSettings != nil {
		return nil, status.Error(codes.InvalidArgument, "storage_settings not supported")
	}
	t.UpdateTime = timestamppb.New(tx.now())
	return tx.put(t), nil
}

// SoftDeleteTree implements storage.AdminWriter.
func (tx *adminTX) SoftDeleteTree(_ context.Context, id int64) (*trillian.Tree, error) {
	return tx.setDeleted(id, true)
}

// UndeleteTree implements storage.AdminWriter.
func (tx *adminTX) UndeleteTree(_ context.Context, id int64) (*trillian.Tree, error) {
	return tx.setDeleted(id, false)
}

func (tx *adminTX) setDeleted(id int64, deleted bool) (*trillian.Tree, error) {
	t, err := tx.get(id)
	if err != nil {
		return nil, err
	}
	if t.Deleted == deleted {
		return nil, status.Errorf(codes.FailedPrecondition, "tree %d: deleted is already %t", id, deleted)
	}
	t.Deleted, t.DeleteTime = deleted, nil
	if deleted {
		t.DeleteTime = timestamppb.New(tx.now())
	}
	return tx.put(t), nil
}

// HardDeleteTree implements storage.AdminWriter: the tree's file goes too.
func (tx *adminTX) HardDeleteTree(_ context.Context, id int64) error {
	t, err := tx.get(id)
	if err != nil {
		return err
	}
	if !t.Deleted {
		return status.Errorf(codes.FailedPrecondition, "tree %d is not soft-deleted", id)
	}
	delete(tx.trees, id)
	tx.changed[id] = true
	return nil
}
