package ctlog

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/chancery-ca/chancery/ca"
)

// maxGroup is how many logs a Group may have.
const maxGroup = 8

// Group is several logs elsewhere, of which one gives each SCT: clients want
// exactly one in a certificate. The log that answered last is asked first, and
// the others in order when it fails; a log that refuses (it may not know our
// root, or have reached the end of its shard) is a failure like another. It
// implements ca.Submitter and is safe for concurrent use.
type Group struct {
	logs  []*Log
	first atomic.Int32 // index of the log that answered last
}

// NewGroup joins 1 to 8 logs, each with a key of its own. Errors: ErrConfig.
func NewGroup(logs ...*Log) (*Group, error) {
	if len(logs) == 0 || len(logs) > maxGroup {
		return nil, fmt.Errorf("%w: %d logs, want 1 to %d", ErrConfig, len(logs), maxGroup)
	}
	seen := map[[32]byte]bool{}
	for _, l := range logs {
		if seen[l.logID] {
			return nil, fmt.Errorf("%w: two logs with one key", ErrConfig)
		}
		seen[l.logID] = true
	}
	return &Group{logs: logs}, nil
}

// Submit implements ca.Submitter. When every log fails the error is theirs, and
// wraps ca.ErrUnavailable if trying again may help with any of them.
func (g *Group) Submit(ctx context.Context, precert []byte, chain [][]byte) ([]byte, error) {
	start := int(g.first.Load())
	var errs []error
	for i := range g.logs {
		at := (start + i) % len(g.logs)
		sct, err := g.ask(ctx, at, len(g.logs)-i, precert, chain)
		if err == nil {
			g.first.Store(int32(at))
			return sct, nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(errs...)
}

// ask gives one log its part of the time that is left, so that one that does
// not answer leaves time for the others.
func (g *Group) ask(ctx context.Context, at, left int, precert []byte, chain [][]byte) ([]byte, error) {
	if deadline, ok := ctx.Deadline(); ok && left > 1 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(deadline)/time.Duration(left))
		defer cancel()
	}
	sct, err := g.logs[at].Submit(ctx, precert, chain)
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("%w: %w", ca.ErrUnavailable, err)
	}
	return sct, err
}

// Keys are the public keys of the logs.
func (g *Group) Keys() []crypto.PublicKey {
	keys := make([]crypto.PublicKey, len(g.logs))
	for i, l := range g.logs {
		keys[i] = l.cfg.Key
	}
	return keys
}

// Err is nil while one of the logs is not known to fail (see Log.Err).
func (g *Group) Err() error {
	var errs []error
	for _, l := range g.logs {
		err := l.Err()
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Close closes idle connections of every log.
func (g *Group) Close() {
	for _, l := range g.logs {
		l.Close()
	}
}
