// Package idptest is what the tests of ca/identity and ca/server need around
// oidctest: a provider on loopback, answers that a provider should not give, and
// a log that many goroutines write.
package idptest

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/ca/identity/oidctest"
)

var makeKey = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })

// Key is the key of every provider of a test program: making one is slow.
func Key(t testing.TB) *rsa.PrivateKey {
	t.Helper()
	key, err := makeKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// At makes a provider of that URL whose clock stands. It has one user, alice-id,
// alice@example.com.
func At(t testing.TB, issuer string, now time.Time) *oidctest.Provider {
	t.Helper()
	return oidctest.New(oidctest.Config{
		Issuer: issuer, Key: Key(t), Subject: "alice-id", Email: "alice@example.com", Now: func() time.Time { return now },
	})
}

// Serve serves a provider on loopback, behind wrap, which may be nil.
func Serve(t testing.TB, now time.Time, wrap func(http.Handler) http.Handler) *oidctest.Provider {
	t.Helper()
	srv := httptest.NewServer(nil)
	t.Cleanup(srv.Close)
	p := At(t, srv.URL, now)
	srv.Config.Handler = p
	if wrap != nil {
		srv.Config.Handler = wrap(p)
	}
	return p
}

// Flood answers with 10 MiB of white space, which no parser of JSON minds.
func Flood(w http.ResponseWriter, _ *http.Request) {
	chunk := bytes.Repeat([]byte(" "), 64<<10)
	for range 160 {
		if _, err := w.Write(chunk); err != nil {
			return
		}
	}
}

// ManyKeys answers with a key set of 10,001 keys.
func ManyKeys(w http.ResponseWriter, _ *http.Request) {
	fmt.Fprintf(w, `{"keys":[%s{}]}`, strings.Repeat("{},", 10_000))
}

// Log is a log that many goroutines write.
type Log struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

// Write implements io.Writer.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// String is all that was written.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Until polls for at most two minutes, which only ends a hang.
func Until(t testing.TB, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(2 * time.Minute); !done(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not come to pass", what)
		}
	}
}
