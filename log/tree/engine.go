package tree

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/google/trillian"
	"github.com/google/trillian/extension"
	trillianlog "github.com/google/trillian/log"
	"github.com/google/trillian/quota"
	"github.com/google/trillian/server"
	"github.com/google/trillian/storage"
	"github.com/google/trillian/types"
	"google.golang.org/protobuf/types/known/durationpb"
	"k8s.io/klog/v2"
)

// Defaults of Config.
const (
	DefaultMaxQueue      = 8192
	DefaultMaxQueueBytes = 64 << 20
	DefaultMaxBatch      = 1024
	DefaultMaxBackoff    = 5 * time.Second
	DefaultCacheTiles    = 256
)

// Config says how an Engine works. Only Dir (or Backend) and Now are needed.
type Config struct {
	// Dir is the data directory. One process at a time can open it.
	Dir string
	// Backend replaces the storage in Dir.
	Backend *Backend
	// Now is the wall clock. It gives the times of roots, which never go back:
	// where it refuses or went back, a root is 1 ns later than the one before.
	Now func() (time.Time, error)
	// Logger defaults to slog.Default. Trillian's own messages go there too.
	Logger *slog.Logger
	// MaxQueue bounds the leaves of one tree that are accepted and not yet
	// durable, MaxQueueBytes their octets (Value and Extra).
	MaxQueue      int
	MaxQueueBytes int
	// MaxBatch bounds the leaves of one transaction.
	MaxBatch int
	// MaxBackoff bounds the pause after a batch that the storage refused.
	MaxBackoff time.Duration
	// CacheTiles is how many full tiles of one tree are kept in memory, 16 KiB
	// each.
	CacheTiles int
}

// Backend is a Trillian storage driver and what Trillian's interfaces lack.
type Backend struct {
	Log   storage.LogStorage
	Admin storage.AdminStorage
	Tiles TileReader
	// Identities finds leaves by identity hash.
	Identities IdentityReader
	// Close releases the storage; it is called once, by Engine.Close.
	Close func() error
}

// TileReader reads stored tiles (C2SP tlog-tiles): the first width hashes of
// tile index at level, 32 × width octets.
type TileReader interface {
	ReadTile(ctx context.Context, treeID int64, level, index uint64, width int) ([]byte, error)
}

// IdentityReader finds the integrated leaf with an identity hash. It returns
// nil without an error when there is none.
type IdentityReader interface {
	LeafByIdentity(ctx context.Context, treeID int64, identity []byte) (*trillian.LogLeaf, error)
}

// Engine holds the trees of one data directory: one Trillian log server, and
// one integrating goroutine for each open tree. It is safe for concurrent use.
type Engine struct {
	cfg     Config
	backend Backend
	server  *server.TrillianLogRPCServer
	// ctx is that of integration; it ends when the time to drain is over.
	ctx    context.Context
	cancel context.CancelFunc

	mu     sync.Mutex
	closed bool
	trees  map[string]*logTree // open trees by name
}

// Open opens the data directory. It creates no tree.
func Open(ctx context.Context, cfg Config) (*Engine, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	initTrillian(cfg.Logger)
	backend := cfg.Backend
	if backend == nil {
		if backend, err = OpenStore(cfg); err != nil {
			return nil, err
		}
	}
	e := &Engine{cfg: cfg, backend: *backend, trees: map[string]*logTree{}}
	e.ctx, e.cancel = context.WithCancel(context.WithoutCancel(ctx))
	e.server = server.NewTrillianLogRPCServer(extension.Registry{
		AdminStorage: backend.Admin,
		LogStorage:   backend.Log,
		QuotaManager: quota.Noop(),
	}, &rootClock{now: cfg.Now})
	return e, nil
}

func (c Config) complete() (Config, error) {
	if c.Now == nil {
		return c, errors.New("open log: no clock")
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	for _, d := range []struct {
		v    *int
		dflt int
	}{
		{&c.MaxQueue, DefaultMaxQueue},
		{&c.MaxQueueBytes, DefaultMaxQueueBytes},
		{&c.MaxBatch, DefaultMaxBatch},
		{&c.CacheTiles, DefaultCacheTiles},
	} {
		if *d.v <= 0 {
			*d.v = d.dflt
		}
	}
	if c.MaxBackoff <= 0 {
		c.MaxBackoff = DefaultMaxBackoff
	}
	return c, nil
}

var trillianOnce sync.Once

// initTrillian sets what Trillian keeps for the whole process: its metrics
// (inert) and its logger, that of the first Engine.
func initTrillian(l *slog.Logger) {
	trillianOnce.Do(func() {
		trillianlog.InitMetrics(nil)
		klog.SetSlogLogger(l.With("component", "trillian"))
	})
}

// CheckName returns ErrName unless name is 1 to 64 of a-z, 0-9 and hyphen.
func CheckName(name string) error {
	if len(name) < 1 || len(name) > 64 {
		return fmt.Errorf("log name of %d octets: %w", len(name), ErrName)
	}
	for _, c := range []byte(name) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return fmt.Errorf("log name %q: %w", name, ErrName)
		}
	}
	return nil
}

// Create makes an empty tree, durably. It completes a creation that was
// interrupted. Errors: ErrName, ErrExists, ErrClosed.
func (e *Engine) Create(ctx context.Context, name string) error {
	if err := CheckName(name); err != nil {
		return fmt.Errorf("create log: %w", err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return fmt.Errorf("create log %s: %w", name, ErrClosed)
	}
	meta, err := e.find(ctx, name)
	if errors.Is(err, ErrNotFound) {
		meta, err = storage.CreateTree(ctx, e.backend.Admin, &trillian.Tree{
			TreeState:       trillian.TreeState_ACTIVE,
			TreeType:        trillian.TreeType_LOG,
			DisplayName:     name,
			MaxRootDuration: durationpb.New(0),
		})
	} else if err == nil {
		_, err = e.latest(ctx, meta)
		switch {
		case err == nil:
			return fmt.Errorf("create log %s: %w", name, ErrExists)
		case errors.Is(err, storage.ErrTreeNeedsInit):
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("create log %s: %w", name, err)
	}
	if _, err := e.server.InitLog(ctx, &trillian.InitLogRequest{LogId: meta.TreeId}); err != nil {
		return fmt.Errorf("initialise log %s: %w", name, err)
	}
	e.cfg.Logger.InfoContext(ctx, "log created", "log", name, "tree", meta.TreeId)
	return nil
}

// Tree opens a tree and starts its integrator. Two calls with one name return
// one Tree. Errors: ErrName, ErrNotFound if it was never created, ErrClosed,
// ErrCorrupt if the stored tiles do not give the stored root.
func (e *Engine) Tree(ctx context.Context, name string) (Tree, error) {
	if err := CheckName(name); err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, fmt.Errorf("open log %s: %w", name, ErrClosed)
	}
	if t := e.trees[name]; t != nil {
		return t, nil
	}
	meta, err := e.find(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("open log %s: %w", name, err)
	}
	root, err := e.latest(ctx, meta)
	if err != nil {
		return nil, fmt.Errorf("open log %s: %w", name, err)
	}
	t, err := e.open(ctx, meta, root)
	if err != nil {
		return nil, fmt.Errorf("open log %s: %w", name, err)
	}
	e.trees[name] = t
	return t, nil
}

// find returns the tree with the name, or ErrNotFound.
func (e *Engine) find(ctx context.Context, name string) (*trillian.Tree, error) {
	all, err := storage.ListTrees(ctx, e.backend.Admin, false)
	if err != nil {
		return nil, fmt.Errorf("list logs: %w", err)
	}
	var found *trillian.Tree
	for _, m := range all {
		if m.DisplayName != name {
			continue
		}
		if found != nil {
			return nil, fmt.Errorf("trees %d and %d have one name: %w", found.TreeId, m.TreeId, ErrCorrupt)
		}
		found = m
	}
	if found == nil {
		return nil, ErrNotFound
	}
	return found, nil
}

// latest reads the newest root from the storage, or storage.ErrTreeNeedsInit.
func (e *Engine) latest(ctx context.Context, meta *trillian.Tree) (Root, error) {
	tx, err := e.backend.Log.SnapshotForTree(ctx, meta)
	if tx != nil {
		// A tree without a root comes with a transaction and an error.
		defer func() { _ = tx.Close() }()
	}
	if err != nil {
		return Root{}, err
	}
	slr, err := tx.LatestSignedLogRoot(ctx)
	if err != nil {
		return Root{}, err
	}
	root, err := parseRoot(slr)
	if err != nil {
		return Root{}, err
	}
	return root, tx.Commit(ctx)
}

// parseRoot reads Trillian's log root.
func parseRoot(slr *trillian.SignedLogRoot) (Root, error) {
	var r types.LogRootV1
	if err := r.UnmarshalBinary(slr.GetLogRoot()); err != nil {
		return Root{}, fmt.Errorf("read log root: %w: %w", err, ErrCorrupt)
	}
	if len(r.RootHash) != HashSize {
		return Root{}, fmt.Errorf("root hash of %d octets: %w", len(r.RootHash), ErrCorrupt)
	}
	return Root{
		Size: r.TreeSize,
		Hash: Hash(r.RootHash),
		Time: time.Unix(0, int64(r.TimestampNanos)).UTC(),
	}, nil
}

// Close stops accepting leaves, integrates those that are accepted, and
// closes the storage. When ctx ends first, or the storage refuses a batch,
// the leaves still waiting fail with ErrClosed. A storage that hangs in spite of
// it is left open, with an error. Closing twice is harmless.
func (e *Engine) Close(ctx context.Context) error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	e.mu.Unlock()

	stop := context.AfterFunc(ctx, e.cancel)
	defer stop()
	for _, t := range e.trees {
		t.drain()
	}
	for name, t := range e.trees {
		if !stopped(ctx, t.stopped) || !stopped(ctx, t.unread()) {
			return fmt.Errorf("close log %s: storage hangs: %w", name, context.Cause(ctx))
		}
	}
	e.cancel()
	if e.backend.Close == nil {
		return nil
	}
	if err := e.backend.Close(); err != nil {
		return fmt.Errorf("close log storage: %w", err)
	}
	return nil
}

// closeGrace is how long Close waits, after its context, for a storage to obey.
const closeGrace = 2 * time.Second

// stopped waits for c to be closed, until closeGrace after the end of ctx.
func stopped(ctx context.Context, c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	case <-ctx.Done():
	}
	grace := time.NewTimer(closeGrace)
	defer grace.Stop()
	select {
	case <-c:
		return true
	case <-grace.C:
		return false
	}
}
