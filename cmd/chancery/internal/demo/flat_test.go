package demo

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
)

// Bounds of TestFlatMemory.
const (
	// flatNoise is what a heap may differ by between two looks, in octets.
	flatNoise = 3 << 20
	// flatLeaf is what the log may keep in memory for a leaf, in octets: its
	// index's filters.
	flatLeaf = 16
	// flatGoroutines is the same for goroutines.
	flatGoroutines = 16
)

// TestFlatMemory: what lives on the heap, and the goroutines, do not grow with
// the requests, issued and refused. CHANCERY_FLAT_REQUESTS makes it longer than
// the 2,000 of a short run.
func TestFlatMemory(t *testing.T) {
	requests := 2000
	if text := os.Getenv("CHANCERY_FLAT_REQUESTS"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil {
			t.Fatal(err)
		}
		requests = n
	}
	d := start(t)
	good, bad := request(t, d), []byte(`{"credentials": {"oidcIdentityToken": "no.token.atall"}}`)
	press := func(n int) {
		var left atomic.Int64
		left.Store(int64(n))
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				for i := left.Add(-1); i >= 0; i = left.Add(-1) {
					body, want := good, http.StatusOK
					if i%8 == 0 {
						body, want = bad, http.StatusBadRequest
					}
					w := askHere(d, body)
					for w.Code == http.StatusServiceUnavailable { // the machine is slow
						w = askHere(d, body)
					}
					if w.Code != want {
						t.Errorf("status %d: %s", w.Code, w.Body)
						return
					}
				}
			})
		}
		wg.Wait()
	}
	press(1000) // caches and pools are filled
	before, goroutines := live(), runtime.NumGoroutine()
	press(requests)
	after := live()
	t.Logf("live heap %d KiB, then %d KiB after %d requests", before>>10, after>>10, requests)
	if limit := before + flatNoise + int64(requests)*flatLeaf; after > limit {
		t.Errorf("live heap of %d octets grew to %d in %d requests, want at most %d", before, after, requests, limit)
	}
	if n := runtime.NumGoroutine(); n > goroutines+flatGoroutines {
		t.Errorf("%d goroutines became %d", goroutines, n)
	}
}

// askHere asks the service for a certificate without the network.
func askHere(d *Demo, body []byte) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	d.service.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/api/v2/signingCert", bytes.NewReader(body)))
	return w
}

// live is what lives on the heap, in octets. What finalizers and pools hold on
// to is gone after the second collection.
func live() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
