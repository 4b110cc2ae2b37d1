package store

import (
	"context"
	"testing"

	"github.com/google/trillian/integration/storagetest"
	"github.com/google/trillian/storage"
	"github.com/google/trillian/storage/testonly"
)

// mustOpen opens a store in dir that the test closes at its end.
func mustOpen(t testing.TB, dir string, opts Options) *Store {
	t.Helper()
	s, err := Open(dir, opts)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return s
}

// TestTrillianLogStorage is Trillian's own acceptance test of a log storage.
func TestTrillianLogStorage(t *testing.T) {
	storagetest.RunLogStorageTests(t, func(_ context.Context, t *testing.T) (storage.LogStorage, storage.AdminStorage) {
		s := mustOpen(t, t.TempDir(), Options{})
		return s, s.Admin()
	})
}

// TestTrillianAdminStorage is Trillian's own acceptance test of a list of trees.
func TestTrillianAdminStorage(t *testing.T) {
	tester := &testonly.AdminStorageTester{NewAdminStorage: func() storage.AdminStorage {
		return mustOpen(t, t.TempDir(), Options{}).Admin()
	}}
	tester.RunAllTests(t)
}
