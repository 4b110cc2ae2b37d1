package service

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/chancery-ca/chancery/ca/identity"
	"github.com/chancery-ca/chancery/ca/identity/oidctest"
	"github.com/chancery-ca/chancery/config"
)

// unready is a service without anything, but for a clock and issuers: one that
// is well and one that nobody reaches.
func unready(t *testing.T) (s *Service, well, gone string) {
	t.Helper()
	idp := httptest.NewServer(nil)
	t.Cleanup(idp.Close)
	idp.Config.Handler = oidctest.New(oidctest.Config{Issuer: idp.URL})
	nobody := httptest.NewServer(nil)
	nobody.Close()
	logger := slog.New(slog.DiscardHandler)
	s = &Service{cfg: &config.Config{Operator: "127.0.0.1:0"}, log: logger, clock: newClock(logger)}
	var err error
	s.identity, err = identity.New(t.Context(), identity.Config{OIDCIssuers: map[string]identity.Issuer{
		idp.URL:    {ClientID: "sigstore", Type: "email"},
		nobody.URL: {ClientID: "sigstore", Type: "email"},
	}}, identity.Options{Now: s.clock.Now, LoopbackHTTP: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.identity.Close)
	return s, idp.URL, nobody.URL
}

// until polls for at most two minutes.
func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(2 * time.Minute); !done(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not come to pass", what)
		}
	}
}

// TestIssuersAreShown: an issuer that is not well is in the status and the
// metrics, and the service ready all the same.
func TestIssuersAreShown(t *testing.T) {
	s, well, gone := unready(t)
	s.state.set(serving)
	until(t, "a first fetch of each", func() bool {
		h := s.identity.Health()
		return len(h) == 2 && h[0].Keys+h[1].Keys == 1 && (h[0].Err == nil) != (h[1].Err == nil)
	})
	srv := httptest.NewServer(s.operatorHandler())
	defer srv.Close()
	st, err := AskStatus(t.Context(), strings.TrimPrefix(srv.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	if !st.Ready || st.Reason != "" || len(st.Warnings) != 0 {
		t.Errorf("status %+v", st)
	}
	for _, i := range st.Issuers {
		if i.Healthy() != (i.Issuer == well) || i.Healthy() != (i.Fetched != nil) || (i.Error == "") != i.Healthy() {
			t.Errorf("issuer %+v", i)
		}
	}
	resp, err := srv.Client().Get(srv.URL + PathMetrics)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"chancery_ready 1",
		`chancery_issuer_up{issuer="` + well + `"} 1`, `chancery_issuer_keys{issuer="` + well + `"} 1`,
		`chancery_issuer_up{issuer="` + gone + `"} 0`, `chancery_issuer_keys{issuer="` + gone + `"} 0`,
	} {
		if !strings.Contains(string(text), "\n"+line+"\n") {
			t.Errorf("no %s in:\n%s", line, text)
		}
	}
	if !strings.Contains(string(text), `chancery_issuer_keys_age_seconds{issuer="`+well) || strings.Contains(string(text), `age_seconds{issuer="`+gone) {
		t.Errorf("ages:\n%s", text)
	}

	s.state.set(draining)
	if st := s.Status(); st.Ready || st.Reason != "shutting down" {
		t.Errorf("draining: %+v", st)
	}
}

// TestBoundedLabels: however many issuers fit a pattern, they are one name.
func TestBoundedLabels(t *testing.T) {
	noon := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	at := func(d time.Duration) *time.Time { a := noon.Add(-d); return &a }
	const pattern = "https://oidc.*.example.com"
	got := group([]IssuerStatus{
		{Issuer: "https://idp.example.com", Keys: 3, Fetched: at(time.Minute)},
		{Issuer: "https://oidc.a.example.com", Pattern: pattern, Keys: 2, Fetched: at(time.Second)},
		{Issuer: "https://oidc.b.example.com", Pattern: pattern, Keys: 1, Fetched: at(time.Hour), Error: "down"},
		{Issuer: "https://oidc.c.example.com", Pattern: pattern, Keys: 5},
	}, noon)
	want := map[string]issuerGroup{
		"https://idp.example.com": {up: true, fetched: true, keys: 3, members: 1, age: time.Minute},
		pattern:                   {pattern: true, fetched: true, keys: 1, members: 3, age: time.Hour},
	}
	if d := cmp.Diff(want, got, cmp.AllowUnexported(issuerGroup{})); d != "" {
		t.Error(d)
	}
}

// TestOperatorsListener: it answers this machine's programs and no page of a
// browser, has nothing else, and ends with the service.
func TestOperatorsListener(t *testing.T) {
	s, _, _ := unready(t)
	s.echo = s.newEcho()
	s.registerHealth()
	addresses := make(listening, 1)
	s.log = slog.New(addresses)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	served, up := make(chan error, 1), make(chan Status, 1)
	go func() { served <- s.Serve(ctx, l, func() { up <- s.Status() }) }()
	if st := <-up; !st.Ready {
		t.Errorf("when it is up: %+v", st)
	}
	operator := <-addresses
	if st, err := AskStatus(t.Context(), operator); err != nil || !st.Ready {
		t.Errorf("status %+v, %v", st, err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	status := func(method, base, host, path string) int {
		req, err := http.NewRequestWithContext(t.Context(), method, "http://"+base+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = host
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		return resp.StatusCode
	}
	for _, test := range []struct {
		method, base, host, path string
		want                     int
	}{
		{"GET", operator, "", PathStatus, 200},
		{"GET", operator, "localhost:1", PathMetrics, 200},
		{"GET", operator, "rebound.example.com", PathStatus, 403},
		{"POST", operator, "", PathStatus, 405},
		{"GET", operator, "", "/readyz", 404},
		{"GET", operator, "", "/debug/pprof/", 404},
		{"GET", l.Addr().String(), "", PathStatus, 404},
		{"GET", l.Addr().String(), "", PathMetrics, 404},
	} {
		if got := status(test.method, test.base, test.host, test.path); got != test.want {
			t.Errorf("%s %s at %s: %d, want %d", test.method, test.path, test.host, got, test.want)
		}
	}
	stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if _, err := AskStatus(t.Context(), operator); err == nil {
		t.Error("the operator's listener outlives the service")
	}

	// An address that is taken stops the start, and nobody is told that it is up.
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	s.cfg.Operator = taken.Addr().String()
	if l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	err = s.Serve(t.Context(), l, func() { t.Error("it says that it is up") })
	if err == nil || !strings.Contains(err.Error(), "listen for the operator") {
		t.Errorf("err %v", err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the clients' listener stays open: %v", err)
	}
}

// listening takes the operator's address from the log.
type listening chan string

func (listening) Enabled(context.Context, slog.Level) bool { return true }
func (a listening) WithAttrs([]slog.Attr) slog.Handler     { return a }
func (a listening) WithGroup(string) slog.Handler          { return a }
func (a listening) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "serving the operator" {
		r.Attrs(func(at slog.Attr) bool {
			a <- at.Value.String()
			return true
		})
	}
	return nil
}
