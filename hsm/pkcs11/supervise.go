package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/internal/queue"
)

// errRecovering is what a token answers while its module is being reopened.
var errRecovering = fmt.Errorf("token is being reopened: %w", hsm.ErrBusy)

// The pace of recovery.
const (
	// defaultRetryWait is how long a call that lost its connection waits for a
	// new one before it gives ErrLost.
	defaultRetryWait = 2 * time.Second
	// firstPause and lastPause bound the doubling pause between attempts.
	firstPause = 50 * time.Millisecond
	lastPause  = time.Second
)

// recovery is the state of a module's supervisor. At most one attempt runs.
//
//	up ──lost──▶ reopening ──all tokens open──▶ up
//	                 │ ▲ └──not yet: pause──┘
//	                 └──PIN refused──▶ dead
//
// What an attempt came to is noted while it still keeps everybody else out: who
// signs on a new connection, or opens a token after a refused PIN, finds it
// noted. A connection that is lost again before the recovery has ended is the
// next one's.
type recovery struct {
	mu    sync.Mutex
	done  chan struct{} // not nil while reopening; closed when it ends
	open  bool          // while reopening: all tokens are open, and it is about to end
	again *loss         // the first loss since open
	fatal error         // why the module is dead, nil if it is not
	until time.Time     // when the running attempt counts as hung; zero between attempts
	hold  time.Duration // how long the last lost connection was kept for the others
	now   chan struct{} // not nil while one is kept: to be closed if it is lost for all
}

// loss is a connection that was lost, by whose token and why.
type loss struct {
	token *Token
	cause error
}

// why says why there is no connection.
func (r *recovery) why() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.fatal != nil:
		return r.fatal
	case !r.until.IsZero() && time.Now().After(r.until):
		return queue.ErrWedged
	}
	return errRecovering
}

// err is why, or nil while no recovery runs and none has failed for good.
func (r *recovery) err() error {
	r.mu.Lock()
	up := r.up()
	r.mu.Unlock()
	if up {
		return nil
	}
	return r.why()
}

// up says whether the connections are good. The caller holds mu.
func (r *recovery) up() bool {
	return r.fatal == nil && (r.done == nil || r.open && r.again == nil)
}

// dead returns why the module is dead, nil if it is not.
func (r *recovery) dead() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.fatal
}

// forget lets a module be opened again after a refused PIN: every token of it
// is closed, and another Open is somebody's decision.
func (r *recovery) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fatal = nil
}

// unproven marks the loss of a key that has not signed since the connection was
// made: perhaps the key is broken and not the connection.
type unproven struct{ error }

func (u unproven) Unwrap() error { return u.error }

// lose reports that t's connection is lost. The first report starts the
// supervisor, which logs to t's logger; later ones change nothing. The caller
// holds t.gate for reading.
//
// One broken key must not take the others away, nor log in as fast as it can:
// while losses are unproven the connection is kept for a time that doubles, from
// firstPause to lastPause, before the module is reopened. A loss that is no
// doubt one ends the wait.
func (m *module) lose(t *Token, err error) {
	r := &m.recovery
	r.mu.Lock()
	defer r.mu.Unlock()
	t.conn.lost = true
	if !errors.As(err, new(unproven)) {
		t.conn.gone.Store(true)
		r.hold = 0
		if r.now != nil {
			close(r.now)
			r.now = nil
		}
	}
	switch {
	case r.fatal != nil:
	case r.done == nil:
		m.begin(&loss{t, err})
	case r.open && r.again == nil:
		r.again = &loss{t, err}
	}
}

// begin starts a recovery. The caller holds recovery.mu.
func (m *module) begin(l *loss) {
	r := &m.recovery
	r.done = make(chan struct{})
	if errors.As(l.cause, new(unproven)) {
		r.hold = min(max(2*r.hold, firstPause), lastPause)
		r.now = make(chan struct{})
	}
	go m.recover(l.token.log, l.token.cfg.Deadline, l.cause, r.hold, r.now)
}

// keep waits for as long as the connection is kept.
func (r *recovery) keep(hold time.Duration, now <-chan struct{}) {
	if now == nil {
		return
	}
	timeout := time.NewTimer(hold)
	defer timeout.Stop()
	select {
	case <-now:
	case <-timeout.C:
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.now = nil
}

// recovered waits for a running recovery, no longer than wait, and says whether
// the module is up.
func (m *module) recovered(ctx context.Context, wait time.Duration) bool {
	r := &m.recovery
	timeout := time.NewTimer(wait)
	defer timeout.Stop()
	for {
		r.mu.Lock()
		done, fatal := r.done, r.fatal
		r.mu.Unlock()
		if done == nil || fatal != nil {
			return fatal == nil
		}
		select {
		case <-done:
		case <-ctx.Done():
			return false
		case <-timeout.C:
			return false
		}
	}
}

// recover closes every connection of the module and opens them all again, as
// often as it takes. It ends when all are open, when none is wanted any more, or for
// good when a PIN is refused. Callers get ErrLost while an attempt hangs.
func (m *module) recover(log *slog.Logger, deadline time.Duration, cause error, hold time.Duration, now <-chan struct{}) {
	began := time.Now()
	log.Warn("connection lost, reopening the module", "module", m.path, "error", cause, "after", hold)
	m.recovery.keep(hold, now)
	pause := firstPause
	for {
		late := time.AfterFunc(deadline, func() {
			log.Error("module wedged: reopening it outlived the deadline", "deadline", deadline)
		})
		m.recovery.setUntil(time.Now().Add(deadline))
		err := m.reopen()
		m.recovery.setUntil(time.Time{})
		late.Stop()
		if err == nil {
			break
		}
		if errors.Is(err, hsm.ErrPIN) {
			log.Error("module is dead: PIN refused while reopening", "error", err)
			m.finish()
			return
		}
		log.Warn("module not reopened yet", "error", err, "pause", pause)
		time.Sleep(pause)
		pause = min(2*pause, lastPause)
	}
	log.Warn("module reopened", "after", time.Since(began))
	m.finish()
}

// setUntil says when the attempt that begins counts as hung, or that it ended.
func (r *recovery) setUntil(until time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.until = until
}

// attempted notes what an attempt came to. The caller holds lock and every gate.
func (r *recovery) attempted(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case err == nil:
		r.open = true
	case errors.Is(err, hsm.ErrPIN):
		r.fatal = err
	}
}

// finish ends the recovery, and begins the next one if that is due.
func (m *module) finish() {
	r := &m.recovery
	r.mu.Lock()
	defer r.mu.Unlock()
	close(r.done)
	again := r.again
	r.done, r.open, r.again = nil, false, nil
	if again != nil {
		m.begin(again)
	}
}

// reopen is one attempt: drain, close all, open all. If one token cannot be
// opened all are closed again, so that the next attempt starts from a library
// that is not initialised.
func (m *module) reopen() (err error) {
	m.lock <- struct{}{}
	defer func() { <-m.lock }()
	for t := range m.tokens {
		t.gate.Lock() // waits for running calls; new ones get errRecovering
		defer t.gate.Unlock()
	}
	defer func() { m.recovery.attempted(err) }()
	if !m.broken() {
		return nil
	}
	m.disconnectAll()
	for t := range m.tokens {
		if err := t.reconnect(); err != nil {
			m.disconnectAll()
			return fmt.Errorf("reopen %s: %w", t.uri, err)
		}
	}
	return nil
}

// broken says whether a token is without a connection or has a lost one. If none
// is, what was lost has been closed, and perhaps opened again, by its owner.
func (m *module) broken() bool {
	for t := range m.tokens {
		if t.conn == nil || t.conn.lost {
			return true
		}
	}
	return false
}

func (m *module) disconnectAll() {
	for t := range m.tokens {
		m.disconnect(t)
	}
}

// reconnect logs in again and looks for every key. A key that is not there as
// it was costs nobody else anything: its next use looks again and says why. The
// caller holds lock and t.gate.
func (t *Token) reconnect() error {
	conn, err := t.module.connect(t)
	if err != nil {
		return err
	}
	t.conn = conn
	t.mu.Lock()
	defer t.mu.Unlock()
	t.info = conn.info
	for _, k := range t.keys {
		_, err := k.on(conn)
		if temporary(err) {
			return err
		}
		if err != nil {
			t.log.Error("key did not come back with the token", "key", k.ref.URI, "error", err)
		}
	}
	return nil
}
