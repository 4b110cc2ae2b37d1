package identity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"golang.org/x/time/rate"
)

const (
	// minRefresh and maxRefresh bound the time between two background
	// fetches; between them the issuer's Cache-Control decides.
	minRefresh = 30 * time.Second
	maxRefresh = 5 * time.Minute
	// firstRetry is the pause after a failed fetch; it doubles up to maxRetry.
	firstRetry = time.Second
	maxRetry   = time.Minute
	// maxStale is how long keys stay in use when they cannot be fetched again:
	// about as long as an ID token lives.
	maxStale = time.Hour
	// askWait is how long a request waits for a fetch.
	askWait = 2 * time.Second
	// askBurst fetches may be asked for at once by tokens that no known key
	// verifies, then one in askEvery.
	askBurst = 2
	askEvery = 30 * time.Second
	// unknownFor is how long a key id that was not found stays refused without
	// asking again; maxUnknown such ids are remembered.
	unknownFor = 30 * time.Second
	maxUnknown = 256
)

// snapshot is an issuer's key set at one time. It is immutable.
type snapshot struct {
	keys       []jose.JSONWebKey
	algorithms []string      // what may sign; not empty
	lifetime   time.Duration // until the next background fetch
	fetched    time.Time     // with a monotonic reading; set by the keyring
	number     uint64        // of the fetch that brought it, from 1; set by the keyring
}

// keyring holds one issuer's keys. One goroutine, run, makes every fetch;
// requests only read the snapshot, and inquire further when their key id is not
// in it or no key verifies their token. Everything that tokens can make it do is
// limited: fetches by bucket, memory by maxUnknown.
type keyring struct {
	fetch  func(context.Context) (*snapshot, error)
	idle   func()        // called when run ends
	wait   time.Duration // of one request, for everything: askWait
	logger *slog.Logger

	current atomic.Pointer[snapshot] // changes under mu
	begun   atomic.Uint64            // number of fetches that have begun; changes under mu
	ended   atomic.Uint64            // and ended, after current was changed; changes under mu
	wake    chan struct{}            // buffered: somebody asks for a fetch
	bucket  *rate.Limiter

	mu      sync.Mutex
	flight  *flight              // the fetch asked for or under way, or nil; guarded by mu
	unknown map[string]time.Time // key id → until when it is refused; guarded by mu
	lastErr error                // of the last fetch; guarded by mu
	closed  bool                 // run has ended; guarded by mu
}

// flight is one fetch that any number of requests wait for.
type flight struct {
	done chan struct{}
	err  error // how it ended; set before done is closed
}

var (
	errLimited = errors.New("too many fetches")
	errClosed  = errors.New("verifier is closed")
)

func newKeyring(fetch func(context.Context) (*snapshot, error), idle func(), logger *slog.Logger) *keyring {
	return &keyring{
		fetch: fetch, idle: idle, wait: askWait, logger: logger,
		flight:  &flight{done: make(chan struct{})}, // run's first, which costs no request anything
		wake:    make(chan struct{}, 1),
		bucket:  rate.NewLimiter(rate.Every(askEvery), askBurst),
		unknown: map[string]time.Time{},
	}
}

// run fetches at once, then when the keys' lifetime is over, when a fetch is
// asked for, and after failures with growing pauses, until ctx ends.
func (k *keyring) run(ctx context.Context) {
	defer k.close()
	retry := firstRetry
	for {
		f := k.begin()
		set, err := k.fetchOnce(ctx)
		k.finish(f, set, err)
		pause := retry
		if err == nil {
			if retry > firstRetry {
				k.logger.Info("issuer keys refreshed again")
			}
			pause, retry = set.lifetime, firstRetry
		} else {
			retry = min(2*retry, maxRetry)
			if ctx.Err() == nil {
				k.logger.Warn("issuer keys not refreshed", "err", err)
			}
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-k.wake:
			timer.Stop()
		case <-timer.C:
		}
	}
}

func (k *keyring) fetchOnce(ctx context.Context) (*snapshot, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	set, err := k.fetch(ctx)
	if err == nil {
		set.fetched = time.Now()
	}
	return set, err
}

// begin takes over the flight that was asked for, or starts one.
func (k *keyring) begin() *flight {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.begun.Add(1)
	if k.flight == nil {
		k.flight = &flight{done: make(chan struct{})}
	}
	return k.flight
}

func (k *keyring) finish(f *flight, set *snapshot, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err == nil {
		set.number = k.begun.Load() // there is one fetch at a time
		k.current.Store(set)
		for _, key := range set.keys {
			delete(k.unknown, key.KeyID)
		}
	} else if errors.Is(err, errNoKeys) {
		k.current.Store(nil)
	}
	k.ended.Add(1)
	k.lastErr = err
	k.flight = nil
	select {
	case <-k.wake: // asked for before this fetch began: answered by it
	default:
	}
	f.err = err
	close(f.done)
}

func (k *keyring) close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.closed = true
	if k.flight != nil {
		k.flight.err = errClosed
		close(k.flight.done)
		k.flight = nil
	}
	k.idle()
}

// inquiry is one request's search for the key of its token. The last word is
// that of a fetch that began after the request had come: an issuer may publish a
// key when a fetch that is under way has its answer already.
type inquiry struct {
	ring  *keyring
	id    string    // of the key; any key for the empty one
	begun uint64    // number of fetches that had begun when the request came
	until time.Time // when it stops waiting; zero while it has not waited
}

func (k *keyring) inquire(id string) inquiry {
	return inquiry{ring: k, id: id, begun: k.begun.Load()}
}

// find returns the keys with the id. While there is none it has the keys fetched
// again, within limits, and looks once more. Errors: ErrToken, ErrUnavailable.
func (q *inquiry) find(ctx context.Context) (*snapshot, []jose.JSONWebKey, error) {
	k := q.ring
	for asked := error(nil); ; {
		ended := k.ended.Load()
		set, keys := k.lookup(q.id)
		switch {
		case len(keys) > 0:
			return set, keys, nil
		case k.isUnknown(q.id):
			return nil, nil, refuse("key is not the issuer's")
		case set != nil && q.isLast(set):
			k.remember(q.id, set)
			return nil, nil, refuse("key is not the issuer's")
		case asked != nil && set == nil:
			return nil, nil, fmt.Errorf("%w: no keys of the issuer", ErrUnavailable)
		case asked != nil:
			return nil, nil, refuse("key is not the issuer's")
		}
		asked = q.ask(ctx, ended)
	}
}

// renew says whether there are other keys to find than old's, or as many fetched
// anew: it has them fetched if the limits allow.
func (q *inquiry) renew(ctx context.Context, old *snapshot) bool {
	ended := q.ring.ended.Load()
	return !q.isLast(old) && (q.ring.current.Load() != old || q.ask(ctx, ended) == nil)
}

// isLast says whether a set was fetched for this request, or later: what it does
// not have is not the issuer's.
func (q *inquiry) isLast(set *snapshot) bool { return set.number > q.begun }

// ask waits for the fetch that is under way, or has one made if the bucket
// allows; the whole inquiry waits for at most ring.wait. It is nil when keys were
// fetched since the caller saw how many fetches had ended.
func (q *inquiry) ask(ctx context.Context, ended uint64) error {
	f, err := q.ring.join(ended)
	if f == nil {
		return err
	}
	if q.until.IsZero() {
		q.until = time.Now().Add(q.ring.wait)
	}
	ctx, cancel := context.WithDeadline(ctx, q.until)
	defer cancel()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-f.done:
		return f.err
	}
}

// join returns the fetch to wait for; none when one has ended since the caller
// saw how many had, and then how, so that a request that is late for a fetch
// costs no other.
func (k *keyring) join(ended uint64) (*flight, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.closed:
		return nil, errClosed
	case k.ended.Load() != ended:
		return nil, k.lastErr
	case k.flight != nil:
		return k.flight, nil
	case !k.bucket.Allow():
		return nil, errLimited
	}
	k.flight = &flight{done: make(chan struct{})}
	select {
	case k.wake <- struct{}{}:
	default:
	}
	return k.flight, nil
}

// lookup reads the snapshot; it is nil when there is none that is fresh enough.
func (k *keyring) lookup(id string) (*snapshot, []jose.JSONWebKey) {
	set := k.current.Load()
	if set == nil || time.Since(set.fetched) > maxStale {
		return nil, nil
	}
	if id == "" {
		return set, set.keys
	}
	var keys []jose.JSONWebKey // keys of different types may share an id: RFC 7517, 4.5
	for i := range set.keys {
		if set.keys[i].KeyID == id {
			keys = append(keys, set.keys[i])
		}
	}
	return set, keys
}

func (k *keyring) isUnknown(id string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	until, ok := k.unknown[id]
	return ok && time.Now().Before(until)
}

// remember notes that the set has no key with the id, unless another set has come
// since.
func (k *keyring) remember(id string, set *snapshot) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.current.Load() != set {
		return
	}
	if len(k.unknown) >= maxUnknown {
		for old, until := range k.unknown {
			if time.Now().After(until) {
				delete(k.unknown, old)
			}
		}
	}
	if len(k.unknown) < maxUnknown {
		k.unknown[id] = time.Now().Add(unknownFor)
	}
}

func (k *keyring) health() IssuerHealth {
	k.mu.Lock()
	defer k.mu.Unlock()
	h := IssuerHealth{Err: k.lastErr}
	if set := k.current.Load(); set != nil {
		h.Fetched = set.fetched
		if time.Since(set.fetched) <= maxStale {
			h.Keys = len(set.keys)
		}
	}
	return h
}

// lifetime reads max-age from a Cache-Control header (RFC 9111, Section
// 5.2.2.1) and keeps it within bounds.
func lifetime(cacheControl string) time.Duration {
	for directive := range strings.SplitSeq(cacheControl, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(directive), "=")
		if !strings.EqualFold(name, "max-age") {
			continue
		}
		if seconds, err := strconv.ParseUint(strings.Trim(value, `"`), 10, 31); err == nil {
			return min(max(time.Duration(seconds)*time.Second, minRefresh), maxRefresh)
		}
	}
	return maxRefresh
}
