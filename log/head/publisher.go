package head

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/tree"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
)

// Defaults and limits.
const (
	// DefaultSignTimeout bounds one signature: an outage of the token is an
	// answer after this time.
	DefaultSignTimeout = 1500 * time.Millisecond
	// DefaultMaxBackoff bounds the pause after a failure, and so the time that
	// a recovered token stays unnoticed.
	DefaultMaxBackoff = 2 * time.Second
	// DefaultMaxWaiters bounds the callers of Await.
	DefaultMaxWaiters = 1 << 16
	// ClockTolerance is how far the clock may be behind the last head and the
	// newest leaf. Within it a head gets the time of the later one.
	ClockTolerance = 2 * time.Second

	firstBackoff = 50 * time.Millisecond
	// outageAfter is when failures are an outage: from then on callers are
	// answered at once, not after the next attempt.
	outageAfter = time.Second
	// closeGrace is how long Close waits, after its context, for the disk.
	closeGrace = 2 * time.Second
)

// Config says what a Publisher signs and when.
type Config struct {
	// Tree is the log; this Publisher alone signs its heads.
	Tree tree.Tree
	// Key is the P-256 head key. At most one signature is asked for at a time.
	Key hsm.Key
	// Format is the kind of log.
	Format Format
	// Anchor is the path of the anchor file, made by CreateAnchor.
	Anchor string
	// AnchorStore replaces the file at Anchor. The Publisher closes it.
	AnchorStore Anchor
	// Now is the wall clock, that of Tree too. When it refuses, or is more than
	// ClockTolerance behind the last head or the newest leaf, nothing is signed.
	Now func() (time.Time, error)
	// MinInterval > 0 also signs a changed tree for which nobody waits, at
	// most once in this time. With 0 only callers of Await cause signatures.
	// They never wait for it.
	MinInterval time.Duration
	// MaxAge > 0 signs the tree anew when the last head is this old.
	MaxAge time.Duration
	// Counter binds the anchor to hardware that only counts up; nil = none. It
	// is of this log alone.
	Counter Counter
	// EpochInterval is how long heads share a value of Counter, at least;
	// DefaultEpochInterval if it is not positive.
	EpochInterval time.Duration
	// SignTimeout, MaxBackoff and MaxWaiters have defaults.
	SignTimeout time.Duration
	MaxBackoff  time.Duration
	MaxWaiters  int
	// Logger defaults to slog.Default.
	Logger *slog.Logger
}

// Stats counts since Open.
type Stats struct {
	// Signatures were asked for from the token, Heads published; what is more
	// failed, or began epochs.
	Signatures, Heads uint64
	// Failures are attempts, with or without a signature, that published
	// nothing.
	Failures uint64
	// Waiters are callers in Await now.
	Waiters int
	// Epoch is that of the last anchor record, 0 without a Counter. Advances
	// are the steps of the counter.
	Epoch, Advances uint64
}

// Publisher signs and publishes the heads of one tree. It implements
// Publication and is safe for concurrent use. What it returns is shared and
// must not be changed.
type Publisher struct {
	cfg    Config
	anchor Anchor
	// noAnchor is why anchor is a stand-in, or nil; set before run.
	noAnchor error
	pub      *ecdsa.PublicKey
	spki     [sha256.Size]byte

	ctx     context.Context // of the attempt under way
	cancel  context.CancelFunc
	kick    chan struct{} // capacity 1: something to look at
	stopped chan struct{} // closed when run has returned

	latched    latch
	latest     atomic.Pointer[Signed]
	signatures atomic.Uint64
	heads      atomic.Uint64
	failures   atomic.Uint64
	advances   atomic.Uint64
	epochNow   atomic.Uint64 // last.Epoch

	mu         sync.Mutex
	closed     bool
	err        error
	since      time.Time // when err was first set
	counterErr error
	waiters    map[*waiter]struct{}

	// These belong to run (and to Open before it).
	last    Record
	at      time.Time      // when last was signed, by this process's clock
	failed  bool           // the last attempt failed
	retry   time.Time      // when to try again after a failure
	backoff time.Duration  // the next pause
	token   chan signature // not nil: a signature was given up and is still under way
	epoch   epochs
}

type waiter struct {
	size   uint64
	result chan outcome // capacity 1
}

type outcome struct {
	head Signed
	err  error
}

type signature struct {
	der []byte
	err error
}

var _ Publication = (*Publisher)(nil)

// Open compares the anchor with the key, the format and the tree, and starts
// publishing. For an anchor that holds no head yet and an empty tree it signs
// and anchors the first head before it returns; for one that AcceptLoss wrote,
// the head of the tree that was accepted. When the tree does not continue the
// anchored head, or the anchor is missing or damaged, the Publisher is latched
// and there is no error: Err is ErrFork, and Latest the anchored head if there
// is one. Errors: ErrAnchor (in use, not readable), ErrMismatch,
// ErrUnavailable.
func Open(ctx context.Context, cfg Config) (*Publisher, error) {
	p, err := prepare(cfg)
	if err != nil {
		return nil, fmt.Errorf("open publisher: %w", err)
	}
	p.ctx, p.cancel = context.WithCancel(context.WithoutCancel(ctx))
	root := p.cfg.Tree.Root()
	err = p.start(ctx, root)
	switch {
	case errors.Is(err, ErrFork):
		p.latchOn(ctx, err, root)
	case err != nil:
		p.cancel()
		return nil, errors.Join(fmt.Errorf("open publisher: %w", err), p.anchor.Close())
	}
	go p.run()
	return p, nil
}

func prepare(cfg Config) (*Publisher, error) {
	if cfg.Tree == nil || cfg.Key == nil || cfg.Format == nil || cfg.Now == nil {
		return nil, errors.New("tree, key, format and clock are needed")
	}
	cfg.SignTimeout = orDefault(cfg.SignTimeout, DefaultSignTimeout)
	cfg.EpochInterval = orDefault(cfg.EpochInterval, DefaultEpochInterval)
	cfg.MaxBackoff = orDefault(cfg.MaxBackoff, DefaultMaxBackoff)
	cfg.MaxWaiters = orDefault(cfg.MaxWaiters, DefaultMaxWaiters)
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if alg, err := hsm.AlgorithmOf(cfg.Key.Public()); err != nil || alg != hsm.ECDSAP256 {
		return nil, fmt.Errorf("head key is not P-256: %w", hsm.ErrUnsupported)
	}
	p := &Publisher{
		cfg:     cfg,
		pub:     cfg.Key.Public().(*ecdsa.PublicKey),
		anchor:  cfg.AnchorStore,
		kick:    make(chan struct{}, 1),
		stopped: make(chan struct{}),
		waiters: make(map[*waiter]struct{}),
		backoff: firstBackoff,
	}
	var err error
	if p.spki, err = hsm.SPKIHash(p.pub); err != nil {
		return nil, err
	}
	if p.anchor == nil {
		a, err := OpenAnchor(cfg.Anchor)
		switch {
		case err == nil:
			p.anchor = a
		case isLost(err):
			p.anchor, p.noAnchor = lost{}, err
		default:
			return nil, err
		}
	}
	return p, nil
}

func orDefault[T int | time.Duration](v, dflt T) T {
	if v <= 0 {
		return dflt
	}
	return v
}

// start brings the Publisher to its first head.
func (p *Publisher) start(ctx context.Context, root tree.Root) error {
	if p.noAnchor != nil {
		return lossOf(p.noAnchor)
	}
	rec, ok, err := p.anchor.Load()
	switch {
	case errors.Is(err, ErrDamaged):
		return lossOf(err)
	case err != nil:
		return err
	case ok && rec.Loss:
		return p.accept(ctx, rec, root)
	case ok:
		return p.resume(ctx, rec, root)
	case root.Size != 0:
		return fmt.Errorf("the anchor holds no head but the tree has %d leaves: %w", root.Size, ErrFork)
	case root.Hash != tree.EmptyRoot():
		return fmt.Errorf("root of the empty tree: %w", ErrFork)
	}
	if err := p.takeEpoch(ctx, rec); err != nil {
		return err
	}
	p.last = Record{Epoch: rec.Epoch}
	return p.first(ctx, root)
}

// first signs, anchors and publishes a head before anybody waits for it.
func (p *Publisher) first(ctx context.Context, root tree.Root) error {
	next, err := p.sign(ctx, root)
	if err != nil {
		return err
	}
	p.publish(next)
	return nil
}

// accept takes up a tree that an operator accepted in the place of the
// anchored one.
func (p *Publisher) accept(ctx context.Context, rec Record, root tree.Root) error {
	if err := rec.Verify(p.pub, p.cfg.Format); err != nil {
		return err
	}
	if err := p.takeEpoch(ctx, rec); err != nil {
		return err
	}
	p.last = rec
	if err := p.first(ctx, root); err != nil {
		return err
	}
	p.cfg.Logger.Error("an operator accepted the loss of a log's last head: the log goes on from another tree",
		"size", rec.Size, "root", fmt.Sprintf("%x", rec.Root), "sequence", rec.Sequence, "replaced", fmt.Sprintf("%x", rec.Replaced))
	return nil
}

// resume takes up the anchored head after checking that it is ours.
func (p *Publisher) resume(ctx context.Context, rec Record, root tree.Root) error {
	if err := rec.Verify(p.pub, p.cfg.Format); err != nil {
		return err
	}
	p.latest.Store(&rec.Signed)
	if err := p.extends(ctx, rec.Head, root); err != nil {
		return err
	}
	if err := p.takeEpoch(ctx, rec); err != nil {
		return err
	}
	p.last = rec
	// Its age counts by the wall clock, as far as that can be had.
	p.at = time.Now()
	if now, err := p.cfg.Now(); err == nil && now.After(rec.Time) {
		p.at = p.at.Add(-now.Sub(rec.Time))
	}
	return nil
}

// noteText is what the signatures of a signed note sign (C2SP signed-note).
func noteText(note []byte) []byte {
	text, _, _ := bytes.Cut(note, []byte("\n\n"))
	return text
}

// Latest implements Publication.
func (p *Publisher) Latest() Signed {
	if s := p.latest.Load(); s != nil {
		return *s
	}
	return Signed{}
}

// Err implements Publication.
func (p *Publisher) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return ErrClosed
	}
	return p.err
}

// Stats returns counters for metrics.
func (p *Publisher) Stats() Stats {
	p.mu.Lock()
	waiting := len(p.waiters)
	p.mu.Unlock()
	return Stats{
		Signatures: p.signatures.Load(),
		Heads:      p.heads.Load(),
		Failures:   p.failures.Load(),
		Waiters:    waiting,
		Epoch:      p.epochNow.Load(),
		Advances:   p.advances.Load(),
	}
}

// Await implements Publication. A head that is published already is returned
// even when the Publisher cannot sign, unless it is latched and the tree does
// not give its root.
func (p *Publisher) Await(ctx context.Context, size uint64) (Signed, error) {
	if err := p.unproven(); err != nil {
		return Signed{}, err
	}
	if s := p.latest.Load(); s.Size >= size {
		return *s, nil
	}
	w := &waiter{size: size, result: make(chan outcome, 1)}
	if err := p.enter(w); err != nil {
		return Signed{}, err
	}
	select {
	case o := <-w.result:
		return o.head, o.err
	case <-ctx.Done():
		p.mu.Lock()
		delete(p.waiters, w)
		p.mu.Unlock()
		return Signed{}, ctx.Err()
	}
}

// enter registers a waiter, or answers it.
func (p *Publisher) enter(w *waiter) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch s := p.latest.Load(); {
	case s.Size >= w.size: // published since the caller looked
		w.result <- outcome{head: *s}
		return nil
	case p.closed:
		return ErrClosed
	case errors.Is(p.err, ErrFork):
		return p.err
	case p.err != nil && time.Since(p.since) > outageAfter:
		return p.err
	case len(p.waiters) >= p.cfg.MaxWaiters:
		return fmt.Errorf("%d callers wait for a head: %w", len(p.waiters), ErrUnavailable)
	}
	p.waiters[w] = struct{}{}
	p.wake()
	return nil
}

func (p *Publisher) wake() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// Close signs once more if somebody waits or MinInterval > 0 and the tree has
// changed, and releases the anchor. Callers still waiting get ErrClosed. When
// ctx ends the signature under way is given up; an anchor that hangs in spite of
// it is left open, with an error. Closing twice is harmless.
func (p *Publisher) Close(ctx context.Context) error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	stop := context.AfterFunc(ctx, p.cancel)
	defer stop()
	p.wake()
	select {
	case <-p.stopped:
	case <-ctx.Done():
		grace := time.NewTimer(closeGrace)
		defer grace.Stop()
		select {
		case <-p.stopped:
		case <-grace.C:
			return fmt.Errorf("close publisher: anchor hangs: %w", context.Cause(ctx))
		}
	}
	p.cancel()
	return p.anchor.Close()
}

// run signs whenever a head is due.
func (p *Publisher) run() {
	defer close(p.stopped)
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		changed := p.cfg.Tree.Changed()
		root := p.cfg.Tree.Root()
		closing := p.closing()
		counterWait, counting := p.advanceCounter()
		wait, ever := p.due(root, closing)
		epochWait, turning := p.epochDue(closing)
		if turning && epochWait <= 0 && !closing && (!ever || wait > 0 || p.epochLate()) {
			p.beginEpoch()
			continue
		}
		if ever && wait <= 0 {
			ok := p.attempt(root)
			if ok || !closing {
				continue
			}
		}
		if closing {
			p.answer(^uint64(0), outcome{err: ErrClosed})
			p.closeEpoch()
			return
		}
		var expired <-chan time.Time
		wait, ever = sooner(wait, ever, epochWait, turning)
		if wait, ever = sooner(wait, ever, counterWait, counting); ever {
			timer.Reset(wait)
			expired = timer.C
		}
		select {
		case a := <-p.epoch.advance:
			p.counterAnswered(a)
		case <-p.kick:
		case <-changed:
		case <-expired:
		}
	}
}

// sooner returns the earlier of two times that may never come.
func sooner(a time.Duration, aEver bool, b time.Duration, bEver bool) (time.Duration, bool) {
	if !bEver || aEver && a <= b {
		return a, aEver
	}
	return b, true
}

func (p *Publisher) closing() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.closed
}

// due says how long from now the next head is to be signed, if ever.
func (p *Publisher) due(root tree.Root, closing bool) (wait time.Duration, ever bool) {
	p.mu.Lock()
	fork := errors.Is(p.err, ErrFork)
	waited := false
	for w := range p.waiters {
		if w.size <= root.Size {
			waited = true
			break
		}
	}
	p.mu.Unlock()
	changed := root.Size != p.last.Size || root.Hash != p.last.Root
	switch {
	case fork:
		return 0, false
	case closing:
		return 0, waited || p.cfg.MinInterval > 0 && changed
	case p.failed:
		return time.Until(p.retry), true
	case waited:
		return 0, true
	case changed && p.cfg.MinInterval > 0:
		return time.Until(p.at.Add(p.cfg.MinInterval)), true
	case p.cfg.MaxAge > 0:
		return time.Until(p.at.Add(p.cfg.MaxAge)), true
	}
	return 0, false
}

// attempt signs root and tells the callers that it concerns.
func (p *Publisher) attempt(root tree.Root) bool {
	next, err := p.sign(p.ctx, root)
	if err == nil {
		p.publish(next)
		return true
	}
	p.failures.Add(1)
	if errors.Is(err, ErrFork) {
		p.latchOn(p.ctx, err, root)
		return false
	}
	p.failed, p.retry = true, time.Now().Add(p.backoff)
	p.backoff = min(2*p.backoff, p.cfg.MaxBackoff)
	p.mu.Lock()
	if p.err == nil {
		p.since = time.Now()
	}
	p.err = err
	p.mu.Unlock()
	p.cfg.Logger.Error("tree head not signed", "size", root.Size, "error", err)
	// Those whose leaves came during the attempt would fare no better.
	p.answer(max(root.Size, p.cfg.Tree.Root().Size), outcome{err: err})
	return false
}

// answer tells the callers that wait for at most size.
func (p *Publisher) answer(size uint64, o outcome) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for w := range p.waiters {
		if w.size <= size {
			w.result <- o
			delete(p.waiters, w)
		}
	}
}

// publish makes an anchored head visible. Only here do heads leave.
func (p *Publisher) publish(rec Record) {
	p.last, p.at = rec, time.Now()
	p.failed, p.backoff = false, firstBackoff
	p.heads.Add(1)
	p.latest.Store(&rec.Signed)
	p.mu.Lock()
	p.err = nil
	p.mu.Unlock()
	p.answer(rec.Size, outcome{head: rec.Signed})
}

// sign makes and anchors the head of root.
func (p *Publisher) sign(ctx context.Context, root tree.Root) (Record, error) {
	if p.last.Sequence > 0 {
		if err := p.extends(ctx, p.last.Head, root); err != nil {
			return Record{}, err
		}
	}
	var leaf time.Time
	if root.Size > 0 {
		leaf = root.Time
	}
	at, err := p.time(leaf)
	if err != nil {
		return Record{}, err
	}
	rec := Record{Sequence: p.last.Sequence + 1, Epoch: p.last.Epoch, Start: p.last.Start, SPKI: p.spki}
	rec.Head = Head{Size: root.Size, Root: root.Hash, Time: at}
	msg, err := p.cfg.Format.Message(rec.Head)
	if err != nil {
		return Record{}, fmt.Errorf("encode head: %w: %w", err, ErrUnavailable)
	}
	digest := sha256.Sum256(msg)
	if rec.Signature, err = p.ask(ctx, digest[:]); err != nil {
		return Record{}, fmt.Errorf("sign head: %w: %w", err, ErrUnavailable)
	}
	// Key has verified it. That is 50 µs for a batch; a head cannot be taken
	// back, and at the next start the anchor must verify.
	if !ecdsa.VerifyASN1(p.pub, digest[:], rec.Signature) {
		return Record{}, fmt.Errorf("sign head: %w: %w", hsm.ErrBadSignature, ErrUnavailable)
	}
	if rec.Note, err = p.cfg.Format.Note(rec.Head, rec.Signature); err != nil {
		return Record{}, fmt.Errorf("encode note: %w: %w", err, ErrUnavailable)
	}
	if err := p.anchor.Store(rec); err != nil {
		return Record{}, fmt.Errorf("anchor head: %w: %w", err, ErrUnavailable)
	}
	return rec, nil
}

// extends proves that root continues the tree of prev, or returns ErrFork.
func (p *Publisher) extends(ctx context.Context, prev Head, root tree.Root) error {
	switch {
	case root.Size < prev.Size:
		return fmt.Errorf("tree has %d leaves, signed were %d: %w", root.Size, prev.Size, ErrFork)
	case root.Size == prev.Size && root.Hash != prev.Root:
		return fmt.Errorf("another root of %d leaves was signed: %w", prev.Size, ErrFork)
	case root.Size == prev.Size:
		return nil
	}
	hashes, err := p.cfg.Tree.ConsistencyProof(ctx, prev.Size, root.Size)
	if errors.Is(err, tree.ErrCorrupt) {
		return fmt.Errorf("prove consistency of %d and %d: %w: %w", prev.Size, root.Size, err, ErrFork)
	}
	if err != nil {
		return fmt.Errorf("prove consistency of %d and %d: %w: %w", prev.Size, root.Size, err, ErrUnavailable)
	}
	path := make([][]byte, len(hashes))
	for i := range hashes {
		path[i] = hashes[i][:]
	}
	if err := proof.VerifyConsistency(rfc6962.DefaultHasher, prev.Size, root.Size, path, prev.Root[:], root.Hash[:]); err != nil {
		p.cfg.Logger.Error("consistency proof does not verify", "from", prev.Size, "to", root.Size, "error", err)
		return fmt.Errorf("prove consistency of %d and %d: %w", prev.Size, root.Size, ErrFork)
	}
	return nil
}

// time is the time of the next head, or epoch: now, and never before the last
// head nor before the newest leaf was integrated. An SCT has the time of the
// clock before its leaf is integrated, and no head may be older than an SCT of
// its tree (RFC 6962, 3.5), also when the process died before the head and the
// clock went back.
func (p *Publisher) time(leaf time.Time) (time.Time, error) {
	now, err := p.cfg.Now()
	if err != nil {
		return time.Time{}, fmt.Errorf("read clock: %w: %w", err, ErrUnavailable)
	}
	now = now.UTC().Truncate(time.Millisecond)
	leaf = leaf.UTC().Truncate(time.Millisecond)
	if behind := p.last.Time.Sub(now); behind > ClockTolerance {
		return time.Time{}, fmt.Errorf("clock is %s behind the last head: %w", behind, ErrUnavailable)
	}
	if behind := leaf.Sub(now); behind > ClockTolerance {
		return time.Time{}, fmt.Errorf("clock is %s behind the newest leaf: %w", behind, ErrUnavailable)
	}
	for _, floor := range []time.Time{p.last.Time, leaf} {
		if now.Before(floor) {
			now = floor
		}
	}
	return now, nil
}

// ask gets one signature from the token. A token that does not answer in time
// is not asked again before it has answered.
func (p *Publisher) ask(ctx context.Context, digest []byte) ([]byte, error) {
	if p.token != nil {
		select {
		case <-p.token:
			p.token = nil
		default:
			return nil, fmt.Errorf("an earlier signature has not returned: %w", hsm.ErrBusy)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, p.cfg.SignTimeout)
	defer cancel()
	p.signatures.Add(1)
	done := make(chan signature, 1)
	go func() {
		der, err := p.cfg.Key.SignContext(ctx, digest, crypto.SHA256)
		done <- signature{der, err}
	}()
	select {
	case s := <-done:
		return s.der, s.err
	case <-ctx.Done():
	}
	// A Key that keeps its contract returns now.
	grace := time.NewTimer(100 * time.Millisecond)
	defer grace.Stop()
	select {
	case s := <-done:
		if s.err == nil {
			s.err = ctx.Err()
		}
		return nil, s.err
	case <-grace.C:
		p.token = done
		return nil, ctx.Err()
	}
}
