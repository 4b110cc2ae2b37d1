package identity

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
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
	key   any // of every id
	count atomic.Int64

	lifetime time.Duration // 0 is maxRefresh
}

func (f *fakeIssuer) fetch(ctx context.Context) (*snapshot, error) {
	f.count.Add(1)
	f.mu.Lock()
	ids, err, delay, key := f.ids, f.err, f.delay, f.key
	f.mu.Unlock()
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(delay):
	}
	if err != nil {
		return nil, err
	}
	set := &snapshot{algorithms: []string{"ES256"}, lifetime: cmp.Or(f.lifetime, maxRefresh)}
	for _, id := range ids {
		set.keys = append(set.keys, jose.JSONWebKey{KeyID: id, Key: key})
	}
	return set, nil
}

func (f *fakeIssuer) set(err error, delay time.Duration, ids ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ids, f.err, f.delay = ids, err, delay
}

// find is a whole inquiry.
func (k *keyring) find(ctx context.Context, id string) (*snapshot, []jose.JSONWebKey, error) {
	q := k.inquire(id)
	return q.find(ctx)
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
// and asks after it, has what the fetch brought, be it a failure, and costs no
// other.
func TestLateForTheFetch(t *testing.T) {
	f := &fakeIssuer{ids: []string{"a"}}
	keyringTest(t, f, func(t *testing.T, k *keyring) {
		late, ended := k.inquire("b"), k.ended.Load()
		f.set(nil, 0, "a", "b")
		if _, _, err := k.find(t.Context(), "b"); err != nil {
			t.Fatal(err)
		}
		if err := late.ask(t.Context(), ended); err != nil {
			t.Error(err)
		}
		if n := f.count.Load(); n != 2 || k.bucket.Tokens() != askBurst-1 {
			t.Errorf("%d fetches, %v left", n, k.bucket.Tokens())
		}
		late, ended = k.inquire("c"), k.ended.Load()
		down := errors.New("down")
		f.set(down, 0)
		if _, _, err := k.find(t.Context(), "c"); !errors.Is(err, ErrToken) {
			t.Fatal(err)
		}
		if err := late.ask(t.Context(), ended); !errors.Is(err, down) {
			t.Error(err)
		}
		if n := f.count.Load(); n != 3 || k.bucket.Tokens() != 0 {
			t.Errorf("%d fetches, %v left", n, k.bucket.Tokens())
		}
		if err := late.ask(t.Context(), k.ended.Load()); !errors.Is(err, errLimited) {
			t.Errorf("another was asked for: %v", err)
		}
	})
}

// TestAskedAsTheTimeIsOver: a fetch that is asked for at the moment at which one
// begins anyway is that one, and no other follows.
func TestAskedAsTheTimeIsOver(t *testing.T) {
	k := newKeyring(nil, func() {}, discard)
	k.finish(k.begin(), &snapshot{}, nil)
	asked, err := k.join(k.ended.Load())
	if err != nil {
		t.Fatal(err)
	}
	begun := k.begin() // by the timer
	k.finish(begun, &snapshot{}, nil)
	if asked != begun || len(k.wake) != 0 {
		t.Errorf("asked for %p, begun %p, %d more to come", asked, begun, len(k.wake))
	}
}

// TestKeyOfALaterFetch: requests that come while a fetch is under way, which has
// its answer from before the issuer published their key, share another one.
func TestKeyOfALaterFetch(t *testing.T) {
	f := &fakeIssuer{ids: []string{"a"}}
	keyringTest(t, f, func(t *testing.T, k *keyring) {
		f.set(nil, time.Second, "a")
		time.Sleep(maxRefresh) // the bubble's clock
		synctest.Wait()        // a fetch has begun
		f.set(nil, 0, "a", "b")
		var failed atomic.Int64
		var all sync.WaitGroup
		for range 64 {
			all.Go(func() {
				if _, _, err := k.find(context.Background(), "b"); err != nil {
					failed.Add(1)
				}
			})
		}
		all.Wait()
		if n := f.count.Load(); failed.Load() != 0 || n != 3 || k.bucket.Tokens() != askBurst-1 {
			t.Errorf("%d failed, %d fetches, %v left", failed.Load(), n, k.bucket.Tokens())
		}
	})
}

// TestKeyOfNoFetch: what the later fetch does not bring either is unknown; what no
// later fetch was allowed to look for is not.
func TestKeyOfNoFetch(t *testing.T) {
	f := &fakeIssuer{ids: []string{"a"}}
	keyringTest(t, f, func(t *testing.T, k *keyring) {
		f.set(nil, askWait/4, "a")
		for n, known := range []bool{true, true, false} { // the third finds the bucket empty
			time.Sleep(maxRefresh)
			synctest.Wait()
			if k.flight == nil || k.bucket.Tokens() < askBurst {
				t.Fatalf("no fetch under way, %v left", k.bucket.Tokens())
			}
			if !known {
				k.bucket.AllowN(time.Now(), askBurst)
			}
			id := "x" + strconv.Itoa(n)
			if _, _, err := k.find(t.Context(), id); !errors.Is(err, ErrToken) {
				t.Fatal(err)
			}
			if k.isUnknown(id) != known {
				t.Errorf("%s is remembered: %v", id, !known)
			}
		}
		f.set(nil, 0, "a", "x2")
		time.Sleep(askEvery)
		if _, _, err := k.find(t.Context(), "x2"); err != nil {
			t.Errorf("when the bucket was refilled: %v", err)
		}
	})
}

// TestWholeWaitIsBounded: two slow fetches in a row do not make a request wait
// for longer than one does.
func TestWholeWaitIsBounded(t *testing.T) {
	f := &fakeIssuer{ids: []string{"a"}}
	keyringTest(t, f, func(t *testing.T, k *keyring) {
		f.set(nil, askWait*3/4, "a")
		time.Sleep(maxRefresh)
		synctest.Wait()
		f.set(nil, askWait*3/4, "a", "b")
		start := time.Now()
		if _, _, err := k.find(t.Context(), "b"); !errors.Is(err, ErrToken) {
			t.Error(err)
		}
		if d := time.Since(start); d != askWait || k.isUnknown("b") {
			t.Errorf("waited %v, remembered %v", d, k.isUnknown("b"))
		}
		if _, _, err := k.find(t.Context(), "b"); err != nil {
			t.Errorf("the next request: %v", err)
		}
	})
}

// TestReplacedKeyOfALaterFetch: a new key under the id of the one before is found
// though a fetch was under way that still had the old one, and a forged token
// costs what an unknown id does.
func TestReplacedKeyOfALaterFetch(t *testing.T) {
	const issuer = "https://idp.example"
	keys := make([]*ecdsa.PrivateKey, 3)
	tokens := make([]*token, len(keys))
	for i := range keys {
		var err error
		if keys[i], err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
		signer := must(jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: keys[i], KeyID: "k"}}, nil))
		tokens[i] = must(parseToken(must(must(signer.Sign([]byte(validClaims(issuer)))).CompactSerialize())))
	}
	f := &fakeIssuer{ids: []string{"k"}, key: keys[0].Public()}
	publish := func(key *ecdsa.PrivateKey, delay time.Duration) {
		f.set(nil, delay, "k")
		f.mu.Lock()
		defer f.mu.Unlock()
		f.key = key.Public()
	}
	keyringTest(t, f, func(t *testing.T, k *keyring) {
		s := &source{issuer: Issuer{IssuerURL: issuer, ClientID: "sigstore"}, keys: k}
		publish(keys[0], time.Second)
		time.Sleep(maxRefresh)
		synctest.Wait()
		publish(keys[1], 0)
		if err := s.verify(t.Context(), tokens[1], noon); err != nil {
			t.Errorf("the new key: %v", err)
		}
		if n := f.count.Load(); n != 3 {
			t.Errorf("%d fetches, want one more than the one under way", n)
		}
		for range 2 * askBurst {
			if err := s.verify(t.Context(), tokens[2], noon); !errors.Is(err, ErrToken) {
				t.Errorf("a key that was never published: %v", err)
			}
		}
		if n := f.count.Load(); n != 2+askBurst {
			t.Errorf("%d fetches after forged tokens", n)
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
