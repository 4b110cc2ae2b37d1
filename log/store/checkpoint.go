package store

import (
	"context"
	"database/sql/driver"
	"fmt"
	"sync/atomic"
)

// checkpointer copies the write-ahead log of a tree into its file, on a
// connection and a goroutine of its own. Below Options.WALLimit it only makes
// passive checkpoints, which never make the writer wait. At the limit, after
// a passive one has copied nearly everything, it holds the writer back for
// the little that is left, so that the log starts over and stays bounded. At
// twice the limit it no longer waits for a quiet moment.
type checkpointer struct {
	t    *logTree
	c    *conn
	wake chan struct{}
	// since counts the octets written since the last checkpoint, roughly.
	since atomic.Int64
}

const (
	// checkpointStep is how much is written before a checkpoint.
	checkpointStep = 4 << 20
	// commitOverhead is what a commit writes beside its data: the pages of
	// the tip and of the right ends of tables.
	commitOverhead = 3 * pageSize
	// passiveRuns bounds the attempts to catch up with the writer.
	passiveRuns = 8
	// restartWait bounds, in milliseconds, how long the writer waits for
	// readers of the old log before the log grows on instead.
	restartWait = 50
)

func newCheckpointer(t *logTree) (*checkpointer, error) {
	c, err := openConn(t.path, modeExisting, "PRAGMA synchronous=FULL", "PRAGMA wal_autocheckpoint=0",
		"PRAGMA cache_size=-512", fmt.Sprintf("PRAGMA busy_timeout=%d", restartWait))
	if err != nil {
		return nil, err
	}
	return &checkpointer{t: t, c: c, wake: make(chan struct{}, 1)}, nil
}

// wrote says that a commit with so many octets of data is in the log.
func (p *checkpointer) wrote(octets int64) {
	if p.since.Add(octets+commitOverhead) < checkpointStep {
		return
	}
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (p *checkpointer) run() {
	for {
		select {
		case <-p.t.closing:
			return
		case <-p.wake:
		}
		if err := p.checkpoint(); err != nil {
			p.t.opts.Logger.Error("checkpoint write-ahead log", "tree", p.t.id, "error", err)
		}
	}
}

func (p *checkpointer) checkpoint() error {
	for range passiveRuns {
		p.since.Store(0)
		size, err := p.pragma("PASSIVE")
		if err != nil || size < p.t.opts.WALLimit {
			return err
		}
		if p.since.Load() < checkpointStep/4 || size >= 2*p.t.opts.WALLimit {
			break // little came in meanwhile, or too much
		}
	}
	if err := p.t.acquire(context.Background()); err != nil {
		return nil //nolint:nilerr // closing or stopped: nothing is written any more
	}
	defer p.t.release()
	left, err := p.pragma("RESTART")
	if err == nil && left > 4*p.t.opts.WALLimit {
		p.t.opts.Logger.Warn("write-ahead log is far beyond its limit", "tree", p.t.id, "octets", left)
	}
	return err
}

// pragma makes one checkpoint and returns the octets in the log, 0 when it
// starts over. That readers keep it from finishing is no error: the next one
// will.
func (p *checkpointer) pragma(mode string) (size int64, err error) {
	err = p.c.query(context.Background(), "PRAGMA wal_checkpoint("+mode+")", func(cols []driver.Value) error {
		busy, _ := cols[0].(int64)
		frames, _ := cols[1].(int64)
		done, _ := cols[2].(int64)
		if size = frames * pageSize; mode != "PASSIVE" && busy == 0 && done == frames {
			size = 0
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("%s checkpoint: %w", mode, err)
	}
	return size, nil
}
