package store

import (
	"context"
	"crypto/rand"
	"database/sql/driver"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/transparency-dev/merkle/compact"
)

// logTree is one tree file in use.
//
// One goroutine at a time writes: whoever holds the token of writing. What the
// writer last committed is in memory (tip), so a batch reads nothing.
type logTree struct {
	id   int64
	path string
	opts Options

	writing chan struct{} // holds one token
	writer  *conn         // used by the holder of the token
	mark    fingerprinter
	queue   *queue

	tip    atomic.Pointer[tip]   // replaced by the writer after each commit
	view   atomic.Pointer[view]  // replaced by the writer
	broken atomic.Pointer[error] // why nothing more is written

	// frontier has the nodes of compact.RangeNodes(0, tip.entries) that the
	// writer knows; used by the holder of the token.
	frontier map[compact.NodeID][]byte
	spare    []byte // a buffer for records; used by the holder of the token
	nodes    nodeCache

	readers chan *conn    // the connections that are free
	pool    int           // how many there are
	closing chan struct{} // closed when the tree closes
	work    sync.WaitGroup

	mu   sync.Mutex
	open map[*snapshot]struct{} // guarded by mu
	dead bool                   // guarded by mu

	checkpoints *checkpointer
	full        chan struct{} // a table of the lookup is full
}

// createTree makes the file of a new, empty tree. An existing one is refused.
func createTree(path string, id int64, opts Options) (*logTree, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create file: %w", err)
	}
	if err := f.Close(); err != nil {
		return nil, fmt.Errorf("create file: %w", err)
	}
	if err := initTree(path, id); err != nil {
		return nil, errors.Join(err, removeDatabase(path))
	}
	return openTree(path, id, opts)
}

func initTree(path string, id int64) (err error) {
	c, err := openConn(path, modeExisting, writerPragmas...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	if err := treeSchema.migrate(c, true); err != nil {
		return err
	}
	secret := make([]byte, 16)
	if _, err := rand.Read(secret); err != nil {
		return fmt.Errorf("make lookup secret: %w", err)
	}
	return c.transaction(func() error {
		if err := storeFacts(c, id, secret); err != nil {
			return err
		}
		return writeTip(c, nil, &tip{distinct: never})
	})
}

// storeFacts writes the row of facts of a new tree file.
func storeFacts(c *conn, id int64, secret []byte) error {
	return c.exec("INSERT INTO facts (id, tree, secret, sum) VALUES (0,?,?,?)", id, secret, checksum(inFacts, id, secret))
}

// openTree opens an existing tree file and reads what the writer keeps in
// memory.
func openTree(path string, id int64, opts Options) (*logTree, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("find file: %w", err)
	}
	t := &logTree{
		id: id, path: path, opts: opts,
		writing: make(chan struct{}, 1),
		queue:   newQueue(opts.QueueLeaves, opts.QueueBytes),
		readers: make(chan *conn, opts.Readers),
		closing: make(chan struct{}),
		open:    make(map[*snapshot]struct{}),
		full:    make(chan struct{}, 1),
	}
	t.writing <- struct{}{}
	if err := t.openConns(); err != nil {
		return nil, errors.Join(err, t.closeConns())
	}
	t.work.Go(t.sealFull)
	t.work.Go(t.checkpoints.run)
	t.kickSealer()
	return t, nil
}

func (t *logTree) openConns() error {
	var err error
	if t.writer, err = openConn(t.path, modeExisting, writerPragmas...); err != nil {
		return err
	}
	if err := treeSchema.migrate(t.writer, false); err != nil {
		return err
	}
	if err := t.load(); err != nil {
		return err
	}
	for range t.opts.Readers {
		c, err := openConn(t.path, modeExisting, readerPragmas...)
		if err != nil {
			return err
		}
		t.readers <- c
		t.pool++
	}
	t.checkpoints, err = newCheckpointer(t)
	return err
}

// checkFacts reads the facts.
func (t *logTree) checkFacts(c *conn) error {
	rows := 0
	err := c.query(context.Background(), "SELECT tree, secret, sum FROM facts", func(cols []driver.Value) (err error) {
		rows++
		if id, _ := cols[0].(int64); id != t.id {
			return fmt.Errorf("%s is the file of tree %d: %w", filepath.Base(t.path), id, ErrCorrupt)
		}
		secret, err := checked(inFacts, t.id, cols[1], cols[2])
		if err != nil {
			return err
		}
		t.mark, err = newFingerprinter(secret)
		return err
	})
	if err != nil {
		return err
	}
	if rows != 1 {
		return fmt.Errorf("read facts: %w", ErrCorrupt)
	}
	return nil
}

// load reads the facts, the tip and the lookup.
func (t *logTree) load() error {
	if err := t.checkFacts(t.writer); err != nil {
		return err
	}
	ctx := context.Background()
	tp, err := readTip(ctx, t.writer)
	if err != nil {
		return err
	}
	t.tip.Store(tp)
	return t.loadView(ctx, tp)
}

// loadView reads the filters and rebuilds the tables that are not sealed.
func (t *logTree) loadView(ctx context.Context, tp *tip) error {
	list, err := loadSealed(ctx, t.writer)
	if err != nil {
		return err
	}
	v := &view{sealed: list}
	for k := range kinds {
		start := uint64(0)
		if k == byIdentity {
			start = min(tp.distinct, tp.entries/runHashes+1) * runHashes
		}
		if n, ok := v.next(k); ok {
			start = n
		}
		if v, err = t.loadTables(ctx, v, tp, k, start); err != nil {
			return fmt.Errorf("rebuild lookup: %w", err)
		}
	}
	t.view.Store(v)
	return nil
}

// loadTables adds to v the tables of kind k for the leaves from start on.
func (t *logTree) loadTables(ctx context.Context, v *view, tp *tip, k kind, start uint64) (*view, error) {
	for i := start; i < tp.entries; {
		m := newMemTable(i)
		err := readHashes(ctx, t.writer, tp, k.level(), i, min(m.end(), tp.entries)-i, func(h []byte) {
			m.add(t.mark.of(h))
		})
		if err != nil {
			return nil, err
		}
		v = v.withTable(k, m)
		i = min(m.end(), tp.entries)
	}
	return v, nil
}

// close ends snapshots, waits for the writer and the background work, and
// closes all connections.
func (t *logTree) close() error {
	t.mu.Lock()
	if t.dead {
		t.mu.Unlock()
		return nil
	}
	t.dead = true
	open := t.open
	t.open = nil
	t.mu.Unlock()

	close(t.closing)
	for s := range open {
		s.end(ErrClosed)
	}
	<-t.writing // never given back
	t.work.Wait()
	return t.closeConns()
}

func (t *logTree) closeConns() error {
	var errs []error
	if t.checkpoints != nil {
		errs = append(errs, t.checkpoints.c.close())
	}
	for range t.pool {
		errs = append(errs, (<-t.readers).close())
	}
	// The writer is last: the last connection empties the write-ahead log.
	return errors.Join(append(errs, t.writer.close())...)
}

// failed returns why the tree does not write, or nil.
func (t *logTree) failed() error {
	if p := t.broken.Load(); p != nil {
		return *p
	}
	return nil
}

// latch stops all writing until the tree is opened again.
func (t *logTree) latch(cause error) error {
	err := fmt.Errorf("%w: %w", ErrFailed, cause)
	t.broken.CompareAndSwap(nil, &err)
	t.opts.Logger.Error("tree stopped", "tree", t.id, "error", cause)
	return err
}

// acquire takes the token of writing.
func (t *logTree) acquire(ctx context.Context) error {
	select {
	case <-t.writing:
	case <-t.closing:
		return ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := t.failed(); err != nil {
		t.release()
		return err
	}
	return nil
}

func (t *logTree) release() { t.writing <- struct{}{} }

// transaction runs f between BEGIN and COMMIT of a write connection. An error
// of COMMIT itself is a commitError: its outcome may be unknown.
func (c *conn) transaction(f func() error) error {
	if err := c.script("BEGIN IMMEDIATE"); err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	if err := f(); err != nil {
		if e := c.script("ROLLBACK"); e != nil && !c.db.AutoCommit() {
			return &commitError{errors.Join(err, e)}
		}
		return err
	}
	if err := c.script("COMMIT"); err != nil {
		if !c.db.AutoCommit() {
			if e := c.script("ROLLBACK"); e != nil {
				err = errors.Join(err, e)
			}
		}
		return &commitError{err}
	}
	return nil
}

// commitError is an error after which it is not known what is stored.
type commitError struct{ err error }

func (e *commitError) Error() string { return "commit: " + e.err.Error() }
func (e *commitError) Unwrap() error { return e.err }

// sealFull is the goroutine that stores full tables of the lookup.
func (t *logTree) sealFull() {
	for {
		select {
		case <-t.closing:
			return
		case <-t.full:
		}
		for k := range kinds {
			if err := t.sealOldest(k); err != nil && !errors.Is(err, ErrClosed) {
				t.opts.Logger.Error("seal lookup generation", "tree", t.id, "error", err)
			}
		}
	}
}

// kickSealer wakes the sealer if there is work for it.
func (t *logTree) kickSealer() {
	v := t.view.Load()
	for k := range kinds {
		if len(v.tables[k]) > 0 && v.tables[k][0].end() <= t.tip.Load().entries {
			select {
			case t.full <- struct{}{}:
			default:
			}
			return
		}
	}
}

// sealOldest stores the full tables of kind k. Sorting happens beside the
// writer, storing (about 3 MB once in 2^18 leaves) in its place.
func (t *logTree) sealOldest(k kind) error {
	for {
		tables := t.view.Load().tables[k]
		if len(tables) == 0 || tables[0].end() > t.tip.Load().entries {
			return nil
		}
		g, f, pieces := seal(k, tables[0])
		if err := t.acquire(context.Background()); err != nil {
			return err
		}
		err := t.writer.transaction(func() error { return g.store(t.writer, f, pieces) })
		if err == nil {
			t.view.Store(t.view.Load().withSealed(k, g, f))
		} else if _, unknown := errors.AsType[*commitError](err); unknown && !isFull(err) {
			err = t.latch(err)
		}
		t.release()
		if err != nil {
			return err
		}
		t.checkpoints.wrote(generationSize * (wordSize + filterPerLeaf))
	}
}
