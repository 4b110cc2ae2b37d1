package server

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/chancery-ca/chancery/ca"
	"github.com/chancery-ca/chancery/ca/audit"
	"github.com/chancery-ca/chancery/ca/internal/catest"
)

// TestTimeout: a request whose certificate does not come ends all the same.
func TestTimeout(t *testing.T) {
	h := build(t, func(c *ca.Config) {
		c.SCTs.(*catest.Log).OnCommit = func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		}
	})
	h.server.cfg.Timeout = 200 * time.Millisecond
	rec := h.do(http.MethodPost, PathSigningCert, body(t, h.token(t, nil), publicPEM(t, h.key.Public()), prove(t, h.key, "alice@example.com")), nil)
	if rec.Code != http.StatusServiceUnavailable || rec.Header().Get("Retry-After") == "" {
		t.Errorf("status %d, %v: %s", rec.Code, rec.Header(), rec.Body)
	}
	if n := h.server.admission.inWork; n != 0 {
		t.Errorf("%d requests are in work still", n)
	}
}

// TestTwoHeaders: of two tokens in the header none counts.
func TestTwoHeaders(t *testing.T) {
	h := build(t, nil)
	text := body(t, "", publicPEM(t, h.key.Public()), prove(t, h.key, "alice@example.com"))
	req := httptest.NewRequest(http.MethodPost, PathSigningCert, strings.NewReader(text))
	for range 2 {
		req.Header.Add("Authorization", "Bearer "+h.token(t, nil))
	}
	rec := httptest.NewRecorder()
	h.echo.ServeHTTP(rec, req)
	wantFailure(t, rec, 400, 3, sayToken)
}

// TestRefusalsAreRecorded: what is refused before it comes to the authority is in
// the audit, with the identity if the token was valid.
func TestRefusalsAreRecorded(t *testing.T) {
	dir, noon := t.TempDir(), func() (time.Time, error) { return catest.Noon, nil }
	if err := audit.Create(dir, noon); err != nil {
		t.Fatal(err)
	}
	log, err := audit.Open(audit.Config{Dir: dir, Now: noon})
	if err != nil {
		t.Fatal(err)
	}
	h := build(t, func(c *ca.Config) { c.Audit = log })
	key := publicPEM(t, h.key.Public())
	for _, text := range []string{
		body(t, "x.y.z", key, prove(t, h.key, "alice@example.com")),
		body(t, h.token(t, nil), key, prove(t, h.key, "bob@example.com")),
	} {
		if rec := h.do(http.MethodPost, PathSigningCert, text, nil); rec.Code != http.StatusBadRequest {
			t.Errorf("status %d: %s", rec.Code, rec.Body)
		}
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	var names []string
	if _, err := audit.Verify(dir, nil, nil, func(r audit.Record) error {
		if r.Type == audit.TypeRefused {
			names = append(names, r.SAN)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"", "alice@example.com"}, names); d != "" {
		t.Error(d)
	}
}
