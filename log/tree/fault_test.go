package tree

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/google/trillian"
	"github.com/google/trillian/storage"

	"github.com/chancery-ca/chancery/log/store"
)

// faultyStorage is the real storage with faults on command.
type faultyStorage struct {
	dir string
	storage.LogStorage
	tiles TileReader

	mu sync.Mutex
	// Each of these, if not nil, is called where its name says; an error is
	// the storage's answer.
	onQueue, onProbe, beforeBatch, inBatch, afterBatch func() error
	// answer changes the storage's answers to QueueLeaves.
	answer func([]*trillian.QueuedLogLeaf)
	// mutate changes the leaves that are dequeued.
	mutate func([]*trillian.LogLeaf)
	// flip changes the octets of tiles that are read.
	flip func(level, index uint64, raw []byte)
	// hold, if not nil, is received from before a tile is read.
	hold chan struct{}
	// expired is how many of the next snapshots expire before they are read.
	expired int
	// gate, if not nil, is received from before each batch.
	gate   chan struct{}
	held   int // batches that came to the gate
	queues int // calls of QueueLeaves
	closes int
}

func newFaultyStorage(t testing.TB) *faultyStorage { return &faultyStorage{dir: t.TempDir()} }

// backend opens the storage anew.
func (s *faultyStorage) backend(t testing.TB, cfg Config) *Backend {
	t.Helper()
	cfg.Dir = s.dir
	b, err := OpenStore(cfg)
	if err != nil {
		t.Fatal(err)
	}
	s.LogStorage, s.tiles = b.Log, b.Tiles
	release := b.Close
	b.Log, b.Tiles = s, s
	b.Close = func() error { s.closes++; return release() }
	return b
}

func (s *faultyStorage) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func (s *faultyStorage) call(f *func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if *f == nil {
		return nil
	}
	return (*f)()
}

func (s *faultyStorage) QueueLeaves(ctx context.Context, tree *trillian.Tree, leaves []*trillian.LogLeaf, at time.Time) ([]*trillian.QueuedLogLeaf, error) {
	if err := s.call(&s.onQueue); err != nil {
		return nil, err
	}
	s.set(func() { s.queues++ })
	out, err := s.LogStorage.QueueLeaves(ctx, tree, leaves, at)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil && s.answer != nil {
		s.answer(out)
	}
	return out, err
}

func (s *faultyStorage) CheckDatabaseAccessible(ctx context.Context) error {
	if err := s.call(&s.onProbe); err != nil {
		return err
	}
	return s.LogStorage.CheckDatabaseAccessible(ctx)
}

func (s *faultyStorage) ReadWriteTransaction(ctx context.Context, tree *trillian.Tree, f storage.LogTXFunc) error {
	s.mu.Lock()
	gate := s.gate
	s.mu.Unlock()
	if gate != nil {
		s.set(func() { s.held++ })
		select {
		case <-gate:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if err := s.call(&s.beforeBatch); err != nil {
		return err
	}
	err := s.LogStorage.ReadWriteTransaction(ctx, tree, func(ctx context.Context, tx storage.LogTreeTX) error {
		if err := f(ctx, &mutatingTX{LogTreeTX: tx, s: s}); err != nil {
			return err
		}
		return s.call(&s.inBatch)
	})
	if err != nil {
		return err
	}
	return s.call(&s.afterBatch)
}

type mutatingTX struct {
	storage.LogTreeTX
	s *faultyStorage
}

func (tx *mutatingTX) DequeueLeaves(ctx context.Context, limit int, cutoff time.Time) ([]*trillian.LogLeaf, error) {
	leaves, err := tx.LogTreeTX.DequeueLeaves(ctx, limit, cutoff)
	tx.s.mu.Lock()
	defer tx.s.mu.Unlock()
	if tx.s.mutate != nil {
		tx.s.mutate(leaves)
	}
	return leaves, err
}

func (s *faultyStorage) SnapshotForTree(ctx context.Context, tree *trillian.Tree) (storage.ReadOnlyLogTreeTX, error) {
	tx, err := s.LogStorage.SnapshotForTree(ctx, tree)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.expired--; err == nil && s.expired >= 0 {
		tx = expiredTX{tx}
	}
	return tx, err
}

// expiredTX is a snapshot whose time is over.
type expiredTX struct{ storage.ReadOnlyLogTreeTX }

func (expiredTX) GetLeavesByRange(context.Context, int64, int64) ([]*trillian.LogLeaf, error) {
	return nil, store.ErrSnapshotExpired
}

func (expiredTX) GetLeavesByHash(context.Context, [][]byte, bool) ([]*trillian.LogLeaf, error) {
	return nil, store.ErrSnapshotExpired
}

func (s *faultyStorage) ReadTile(ctx context.Context, treeID int64, level, index uint64, width int) ([]byte, error) {
	s.mu.Lock()
	hold := s.hold
	s.mu.Unlock()
	if hold != nil {
		<-hold
	}
	raw, err := s.tiles.ReadTile(ctx, treeID, level, index, width)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil && s.flip != nil {
		s.flip(level, index, raw)
	}
	return raw, err
}

var errDisk = errors.New("no space left on device")

func wallClock() (time.Time, error) { return time.Now(), nil }

// openTree opens an engine on s with one tree.
func openTree(t testing.TB, s *faultyStorage, change ...func(*Config)) (*Engine, Tree) {
	t.Helper()
	cfg := Config{Now: wallClock, MaxBackoff: 50 * time.Millisecond, Logger: quiet}
	for _, f := range change {
		f(&cfg)
	}
	cfg.Backend = s.backend(t, cfg)
	e, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	if err := e.Create(t.Context(), "log"); err != nil && !errors.Is(err, ErrExists) {
		t.Fatal(err)
	}
	tr, err := e.Tree(t.Context(), "log")
	if err != nil {
		t.Fatal(err)
	}
	return e, tr
}
