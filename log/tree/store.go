package tree

import (
	"fmt"
	"time"

	"github.com/chancery-ca/chancery/log/store"
)

// OpenStore opens the storage driver of this project in cfg.Dir, as Open does
// for a Config without a Backend.
func OpenStore(cfg Config) (*Backend, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	clock := &rootClock{now: cfg.Now}
	s, err := store.Open(cfg.Dir, store.Options{
		// Admission is bounded before the storage, which never has more.
		QueueLeaves: cfg.MaxQueue,
		QueueBytes:  int64(cfg.MaxQueueBytes),
		Now:         func() time.Time { return clock.Now() },
		Logger:      cfg.Logger,
	})
	if err != nil {
		return nil, fmt.Errorf("open log storage: %w", err)
	}
	return &Backend{Log: s, Admin: s.Admin(), Tiles: s, Identities: s, Close: s.Close}, nil
}
