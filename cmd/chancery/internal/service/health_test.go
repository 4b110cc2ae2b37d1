package service

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/labstack/echo/v4"

	"github.com/chancery-ca/chancery/config"
)

// TestGatewayAnswers: what no package answers itself has the form that clients
// know from the gateway of the public service, and nothing of what went wrong.
func TestGatewayAnswers(t *testing.T) {
	var log strings.Builder
	logger := slog.New(slog.NewTextHandler(&log, nil))
	s := &Service{cfg: &config.Config{}, log: logger, clock: newClock(logger)}
	s.echo = s.newEcho()
	s.registerHealth()
	s.echo.POST("/panics", func(echo.Context) error { panic("inner text") })
	s.echo.POST("/fails", func(echo.Context) error { return errors.New("inner text") })
	serve := func(phase phase) { s.state.set(phase) }
	for _, test := range []struct {
		method, path string
		phase        phase
		status       int
		body         string
	}{
		{"GET", "/healthz", starting, 200, `{"status":"SERVING"}`},
		{"GET", "/readyz", starting, 503, `{"status":"NOT_SERVING"}`},
		{"GET", "/readyz", serving, 200, `{"status":"SERVING"}`},
		{"GET", "/readyz", draining, 503, `{"status":"NOT_SERVING"}`},
		{"GET", "/nothing", serving, 404, `{"code":5,"message":"Not Found","details":[]}`},
		{"POST", "/healthz", serving, 501, `{"code":12,"message":"Method Not Allowed","details":[]}`},
		{"POST", "/panics", serving, 500, `{"code":13,"message":"internal error","details":[]}`},
		{"POST", "/fails", serving, 500, `{"code":13,"message":"internal error","details":[]}`},
	} {
		serve(test.phase)
		rec := httptest.NewRecorder()
		s.Handler().ServeHTTP(rec, httptest.NewRequest(test.method, test.path, nil))
		if got := strings.TrimSpace(rec.Body.String()); rec.Code != test.status || got != test.body {
			t.Errorf("%s %s: %d %s", test.method, test.path, rec.Code, got)
		}
		if retry := rec.Header().Get("Retry-After"); (retry != "") != (rec.Code == http.StatusServiceUnavailable) {
			t.Errorf("%s %s: Retry-After %q", test.method, test.path, retry)
		}
	}
	if n := strings.Count(log.String(), "inner text"); n < 2 {
		t.Errorf("the operator does not see what went wrong: %s", log.String())
	}
}

// TestServeDrains: when it is told to end, the service is not ready, takes nobody
// new, and answers who is there.
func TestServeDrains(t *testing.T) {
	s, _, _ := unready(t)
	s.cfg.Operator = ""
	s.echo = s.newEcho()
	s.registerHealth()
	entered, release := make(chan struct{}), make(chan struct{})
	s.echo.GET("/slow", func(c echo.Context) error {
		close(entered)
		<-release
		return c.NoContent(http.StatusNoContent)
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	served, status := make(chan error, 1), make(chan int, 1)
	go func() { served <- s.Serve(ctx, l, func() {}) }()
	go func() {
		resp, err := http.Get("http://" + l.Addr().String() + "/slow")
		if err != nil {
			t.Error(err)
			status <- 0
			return
		}
		_ = resp.Body.Close()
		status <- resp.StatusCode
	}()
	<-entered
	stop()
	until(t, "an end to new connections", func() bool {
		c, err := net.Dial("tcp", l.Addr().String())
		if err == nil {
			_ = c.Close()
		}
		return err != nil
	})
	if err := s.Ready(); err == nil || err.Error() != "shutting down" {
		t.Errorf("ready: %v", err)
	}
	select {
	case err := <-served:
		t.Errorf("it ended before the answer: %v", err)
	default:
	}
	close(release)
	if got := <-status; got != http.StatusNoContent {
		t.Errorf("status %d of what was in flight", got)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}
