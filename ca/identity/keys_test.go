package identity

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	jose "github.com/go-jose/go-jose/v4"
)

var discard = slog.New(slog.DiscardHandler)

// fakeIssuer answers fetches in a synctest bubble, where time is free.
type fakeIssuer struct {
	mu    sync.Mutex
	ids   []string
	err   error
	delay time.Duration
	count atomic.Int64

	lifetime time.Duration // 0 is maxRefresh
}

func (f *fakeIssuer) fetch(ctx context.Context) (*snapshot, error) {
	f.count.Add(1)
	f.mu.Lock()
	ids, err, delay := f.ids, f.err, f.delay
	f.mu.Unlock()
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(delay):
	}
	if err != nil {
		return nil, err
	}
	set := &snapshot{algorithms: []string{"RS256"}, lifetime: cmp.Or(f.lifetime, maxRefresh)}
	for _, id := range ids {
		set.keys = append(set.keys, jose.JSONWebKey{KeyID: id})
	}
	return set, nil
}

func (f *fakeIssuer) set(err error, delay time.Duration, ids ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ids, f.err, f.delay = ids, err, delay
}

// keyringTest runs body with a keyring whose goroutine is at work.
func keyringTest(t *testing.T, f *fakeIssuer, body func(t *testing.T, k *keyring)) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		k := newKeyring(f.fetch, func() {}, discard)
		var done sync.WaitGroup
		done.Go(func() { k.run(ctx) })
		defer done.Wait()
		defer cancel()
		synctest.Wait()
		body(t, k)
	})
}

func TestRefreshInBackground(t *testing.T) {
	f := &fakeIssuer{ids: []string{"a"}}
	keyringTest(t, f, func(t *testing.T, k *keyring) {
		if _, keys, err := k.find(t.Context(), "a"); err != nil || len(keys) != 1 {
			t.Fatalf("%v, %v", keys, err)
		}
		f.set(nil, 0, "b")
		time.Sleep(maxRefresh + time.Second) // the bubble's clock
		if _, _, err := k.find(t.Context(), "b"); err != nil {
			t.Error(err)
		}
		if n := f.count.Load(); n != 2 {
			t.Errorf("%d fetches", n)
		}
	})
}

func TestUnknownKeySharesOneFetch(t *testing.T) {
	f := &fakeIssuer{ids: []string{"a"}}
	keyringTest(t, f, func(t *testing.T, k *keyring) {
		f.set(nil, time.Second, "a", "b")
		var found atomic.Int64
		var all sync.WaitGroup
		for range 100 {
			all.Go(func() {
				if _, _, err := k.find(context.Background(), "b"); err == nil {
					found.Add(1)
				}
			})
		}
		all.Wait()
		if found.Load() != 100 || f.count.Load() != 2 {
			t.Errorf("%d found it with %d fetches", found.Load(), f.count.Load())
		}
	})
}

func TestUnknownKeysAreLimited(t *testing.T) {
	f := &fakeIssuer{ids: []string{"a"}}
	keyringTest(t, f, func(t *testing.T, k *keyring) {
		for i := range 1000 {
			if _, _, err := k.find(t.Context(), "x"+strconv.Itoa(i)); !errors.Is(err, ErrToken) {
				t.Fatal(err)
			}
		}
		if n := f.count.Load(); n != 1+askBurst {
			t.Errorf("%d fetches", n)
		}
		time.Sleep(askEvery)
		if _, _, err := k.find(t.Context(), "y"); !errors.Is(err, ErrToken) {
			t.Fatal(err)
		}
		if n := f.count.Load(); n != 2+askBurst {
			t.Errorf("%d fetches after the bucket was refilled", n)
		}
		if n := len(k.unknown); n > maxUnknown {
			t.Errorf("%d unknown keys remembered", n)
		}
	})
}

// TestLateForTheFetch: a request that looked for its key before a fetch ended,
// and asks after it, has what the fetch brought and costs no other.
func TestLateForTheFetch(t *testing.T) {
	f := &fakeIssuer{ids: []string{"a"}}
	keyringTest(t, f, func(t *testing.T, k *keyring) {
		seen := k.current.Load()
		f.set(nil, 0, "a", "b")
		if _, _, err := k.find(t.Context(), "b"); err != nil {
			t.Fatal(err)
		}
		if err := k.ask(t.Context(), seen); err != nil {
			t.Error(err)
		}
		if n := f.count.Load(); n != 2 || k.bucket.Tokens() != askBurst-1 {
			t.Errorf("%d fetches, %v left", n, k.bucket.Tokens())
		}
		if err := k.ask(t.Context(), k.current.Load()); err != nil {
			t.Error(err)
		}
		if n := f.count.Load(); n != 3 {
			t.Errorf("%d fetches after another was asked for", n)
		}
	})
}

func TestNegativeCache(t *testing.T) {
	f := &fakeIssuer{ids: []string{"a"}}
	keyringTest(t, f, func(t *testing.T, k *keyring) {
		for range 10 {
			if _, _, err := k.find(t.Context(), "x"); !errors.Is(err, ErrToken) {
				t.Fatal(err)
			}
		}
		if n := f.count.Load(); n != 2 {
			t.Errorf("%d fetches for one unknown key", n)
		}
	})
}

// TestNegativeCacheForgets: an id that was not found is looked for again when
// its time is over, and at once when a fetch in between brought it.
func TestNegativeCacheForgets(t *testing.T) {
	f := &fakeIssuer{ids: []string{"a"}}
	keyringTest(t, f, func(t *testing.T, k *keyring) {
		for _, id := range []string{"b", "c"} {
			if _, _, err := k.find(t.Context(), id); !errors.Is(err, ErrToken) {
				t.Fatal(err)
			}
		}
		f.set(nil, 0, "a", "b", "c")
		if _, _, err := k.find(t.Context(), "b"); !errors.Is(err, ErrToken) {
			t.Errorf("an id that is remembered: %v", err)
		}
		time.Sleep(unknownFor) // the bubble's clock
		if _, _, err := k.find(t.Context(), "b"); err != nil {
			t.Errorf("afterwards: %v", err)
		}
		if len(k.unknown) != 0 {
			t.Errorf("%v are remembered, and the keys are known", k.unknown)
		}
		if n := f.count.Load(); n != 4 {
			t.Errorf("%d fetches", n)
		}
	})
}

// TestRefreshByCacheControl: the issuer decides within bounds when it is asked
// again.
func TestRefreshByCacheControl(t *testing.T) {
	i := startIDP(t)
	for header, want := range map[string]time.Duration{"max-age=60": time.Minute, "max-age=1": minRefresh, "no-store": maxRefresh, "max-age=86400": maxRefresh} {
		base := serveProvider(t, hostile{jwks: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Cache-Control", header)
			_ = json.NewEncoder(w).Encode(i.JWKS())
		}})
		s, err := newSource(known{Issuer: Issuer{IssuerURL: base, ClientID: "c", Type: "email"}}, Options{LoopbackHTTP: true, Logger: discard})
		if err != nil {
			t.Fatal(err)
		}
		set, err := s.fetch(t.Context())
		if err != nil || set.lifetime != want {
			t.Errorf("%s: %v, %v; want %v", header, set, err, want)
		}
		s.client.CloseIdleConnections()
	}
	f := &fakeIssuer{ids: []string{"a"}, lifetime: time.Minute}
	keyringTest(t, f, func(t *testing.T, _ *keyring) {
		time.Sleep(10*time.Minute + time.Second)
		if n := f.count.Load(); n != 11 {
			t.Errorf("%d fetches in ten minutes", n)
		}
	})
}

// TestFirstFetchIsFree: requests that come before the first fetch wait for it
// and take nothing from what tokens may ask for.
func TestFirstFetchIsFree(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{ids: []string{"a"}, delay: time.Second}
		ctx, cancel := context.WithCancel(context.Background())
		k := newKeyring(f.fetch, func() {}, discard)
		var all sync.WaitGroup
		var failed atomic.Int64
		for range 10 {
			all.Go(func() {
				if _, _, err := k.find(ctx, "a"); err != nil {
					failed.Add(1)
				}
			})
		}
		synctest.Wait()
		var done sync.WaitGroup
		done.Go(func() { k.run(ctx) })
		all.Wait()
		if failed.Load() != 0 || f.count.Load() != 1 || k.bucket.Tokens() != askBurst {
			t.Errorf("%d failed, %d fetches, %v left", failed.Load(), f.count.Load(), k.bucket.Tokens())
		}
		cancel()
		done.Wait()
	})
}

func TestWaitIsBounded(t *testing.T) {
	f := &fakeIssuer{ids: []string{"a"}}
	keyringTest(t, f, func(t *testing.T, k *keyring) {
		f.set(nil, fetchTimeout-time.Second, "a", "b")
		start := time.Now()
		if _, _, err := k.find(t.Context(), "b"); !errors.Is(err, ErrToken) {
			t.Error(err)
		}
		if d := time.Since(start); d != askWait {
			t.Errorf("waited %v", d)
		}
		time.Sleep(fetchTimeout)
		if _, _, err := k.find(t.Context(), "b"); err != nil {
			t.Errorf("after the fetch: %v", err)
		}
	})
}

func TestStaleKeysHaveAnEnd(t *testing.T) {
	f := &fakeIssuer{ids: []string{"a"}}
	keyringTest(t, f, func(t *testing.T, k *keyring) {
		f.set(errors.New("down"), 0)
		time.Sleep(maxStale - time.Minute)
		if _, _, err := k.find(t.Context(), "a"); err != nil {
			t.Errorf("keys were dropped early: %v", err)
		}
		if h := k.health(); h.Err == nil || h.Keys != 1 {
			t.Errorf("health %+v", h)
		}
		time.Sleep(2 * time.Minute)
		if _, _, err := k.find(t.Context(), "a"); !errors.Is(err, ErrUnavailable) {
			t.Errorf("stale keys were used: %v", err)
		}
		f.set(nil, 0, "a")
		time.Sleep(maxRetry)
		if _, _, err := k.find(t.Context(), "a"); err != nil {
			t.Errorf("after recovery: %v", err)
		}
	})
}

// TestWithdrawnKeys: an issuer that publishes no usable key has withdrawn those
// before; one that fails has not.
func TestWithdrawnKeys(t *testing.T) {
	f := &fakeIssuer{ids: []string{"a"}}
	keyringTest(t, f, func(t *testing.T, k *keyring) {
		f.set(brief("parse key set", errors.New("not a JSON Web Key Set")), 0)
		time.Sleep(maxRefresh + time.Second)
		if _, _, err := k.find(t.Context(), "a"); err != nil {
			t.Errorf("after an answer that is none: %v", err)
		}
		f.set(brief("parse key set", errNoKeys), 0)
		time.Sleep(maxRetry)
		if _, _, err := k.find(t.Context(), "a"); !errors.Is(err, ErrUnavailable) {
			t.Errorf("a withdrawn key: %v", err)
		}
		if h := k.health(); h.Keys != 0 || !errors.Is(h.Err, errNoKeys) {
			t.Errorf("health %+v", h)
		}
	})
}

// TestSharedKeyID: keys of different types may share an id (RFC 7517, Section 4.5).
func TestSharedKeyID(t *testing.T) {
	f := &fakeIssuer{ids: []string{"a", "b", "a"}}
	keyringTest(t, f, func(t *testing.T, k *keyring) {
		if _, keys, err := k.find(t.Context(), "a"); err != nil || len(keys) != 2 {
			t.Errorf("%v, %v", keys, err)
		}
	})
}

func TestRetriesGrow(t *testing.T) {
	f := &fakeIssuer{err: errors.New("down")}
	keyringTest(t, f, func(t *testing.T, k *keyring) {
		time.Sleep(time.Hour)
		if n := f.count.Load(); n < 60 || n > 70 {
			t.Errorf("%d tries in an hour", n)
		}
	})
}

func TestFindAfterClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		f := &fakeIssuer{delay: time.Second}
		k := newKeyring(f.fetch, func() {}, discard)
		k.run(ctx)
		if _, _, err := k.find(t.Context(), "a"); !errors.Is(err, ErrUnavailable) {
			t.Error(err)
		}
	})
}

func TestLifetime(t *testing.T) {
	for header, want := range map[string]time.Duration{
		"":                               maxRefresh,
		"no-store":                       maxRefresh,
		"public, max-age=60":             time.Minute,
		"max-age=1":                      minRefresh,
		"MAX-AGE=\"90\"":                 90 * time.Second,
		"max-age=86400":                  maxRefresh,
		"max-age=-1":                     maxRefresh,
		"max-age=99999999999999999999":   maxRefresh,
		"max-age=garbage, max-age=45, x": 45 * time.Second,
	} {
		if got := lifetime(header); got != want {
			t.Errorf("%q: %v, want %v", header, got, want)
		}
	}
}
