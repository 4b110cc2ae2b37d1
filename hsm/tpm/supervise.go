package tpm

import (
	"context"
	"fmt"
	"time"

	"github.com/chancery-ca/chancery/hsm"
)

// errReconnecting is what a token answers while it connects again.
var errReconnecting = fmt.Errorf("TPM is being reconnected: %w", hsm.ErrBusy)

// The pace of recovery.
const (
	// defaultRetryWait is how long a call that lost its connection waits for a
	// new one before it gives ErrLost.
	defaultRetryWait = 2 * time.Second
	// firstPause and lastPause bound the doubling pause between attempts.
	firstPause = 20 * time.Millisecond
	lastPause  = time.Second
)

// lose gives up a connection and starts the supervisor. The caller holds gate.
func (t *Token) lose(conn *connection, cause error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	conn.device.close()
	t.conn = nil
	if t.back != nil || t.ctx.Err() != nil || t.queue.Err() != nil {
		return
	}
	t.back = make(chan struct{})
	go t.recover(cause)
}

// recover connects as often as it takes, until the token is closed. What was in
// the TPM is forgotten: keys are loaded again when they are asked for, and must
// have their Names.
func (t *Token) recover(cause error) {
	began, pause := time.Now(), firstPause
	t.log.Warn("connection lost, reconnecting", "error", cause)
	for {
		conn, err := t.reconnect()
		if err == nil {
			t.log.Warn("TPM reconnected", "after", time.Since(began))
			t.finish(conn)
			return
		}
		if t.ctx.Err() != nil {
			t.finish(nil)
			return
		}
		t.log.Warn("TPM not reconnected yet", "error", err, "pause", pause)
		select {
		case <-t.ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, lastPause)
	}
}

// reconnect is one attempt.
func (t *Token) reconnect() (*connection, error) {
	ctx, cancel := context.WithTimeout(t.ctx, t.cfg.Deadline)
	defer cancel()
	select {
	case t.gate <- struct{}{}:
		defer func() { <-t.gate }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return connect(ctx, t.cfg)
}

// finish ends a recovery with a connection, or with nil because the token is
// being closed.
func (t *Token) finish(conn *connection) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if conn != nil && t.ctx.Err() != nil {
		conn.close()
		conn = nil
	}
	if conn != nil {
		t.conn, t.info = conn, conn.info
	}
	close(t.back)
	t.back = nil
}

// reconnected waits for a running recovery and says whether there is a
// connection.
func (t *Token) reconnected(ctx context.Context) bool {
	t.mu.Lock()
	back := t.back
	t.mu.Unlock()
	if back != nil {
		timeout := time.NewTimer(t.retryWait)
		defer timeout.Stop()
		select {
		case <-back:
		case <-ctx.Done():
			return false
		case <-timeout.C:
			return false
		}
	}
	_, err := t.living()
	return err == nil
}
