package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestPatient: what is busy is asked again, with the same body; what goes on
// refusing is quoted; what is no refusal passes.
func TestPatient(t *testing.T) {
	const busy = `{"code":14,"message":"busy; try again","details":[]}`
	for _, test := range []struct {
		name    string
		answers []int // the last one again and again
		body    string
		asked   int32
		want    string // of the error
	}{
		{"at once", []int{200}, "good", 1, ""},
		{"the client's fault", []int{400}, "bad", 1, ""},
		{"busy once", []int{503, 200}, busy, 2, ""},
		{"too many", []int{429, 201}, busy, 2, ""},
		{"busy", []int{503}, busy, tries, `service refused: 503 Service Unavailable: "busy; try again"`},
		{"broken", []int{500}, "<html>", 1, `service refused: 500 Internal Server Error: "no reason given"`},
		{"too slow", []int{504}, "", 1, `service refused: 504 Gateway Timeout: "no reason given"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var asked atomic.Int32
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if got, err := io.ReadAll(r.Body); err != nil || string(got) != "request" {
					t.Errorf("asked with %q, %v", got, err)
				}
				w.WriteHeader(test.answers[min(int(asked.Add(1)), len(test.answers))-1])
				_, _ = io.WriteString(w, test.body)
			}))
			defer server.Close()
			c := &http.Client{Transport: patient{t.Context(), http.DefaultTransport}}
			resp, err := c.Post(server.URL, "application/json", strings.NewReader("request"))
			if n := asked.Load(); n != test.asked {
				t.Errorf("asked %d times, want %d", n, test.asked)
			}
			if test.want != "" {
				if !errors.Is(err, errRefused) || !strings.HasSuffix(fmt.Sprint(err), test.want) {
					t.Errorf("error %v, want %s", err, test.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if body, err := io.ReadAll(resp.Body); err != nil || string(body) != test.body || resp.StatusCode != test.answers[len(test.answers)-1] {
				t.Errorf("status %d, %q, %v", resp.StatusCode, body, err)
			}
		})
	}
}

// TestPatientEnds: neither a service that says nothing nor the wait for a busy
// one outlives the caller.
func TestPatientEnds(t *testing.T) {
	reached, done := make(chan struct{}, tries), make(chan struct{})
	for name, handler := range map[string]http.HandlerFunc{
		"silent": func(http.ResponseWriter, *http.Request) { reached <- struct{}{}; <-done },
		"busy": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "3600")
			w.WriteHeader(http.StatusServiceUnavailable)
			reached <- struct{}{}
		},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(handler)
			defer server.Close()
			if name == "silent" {
				defer close(done)
			}
			ctx, stop := context.WithCancelCause(t.Context())
			stopped := errors.New("stopped")
			go func() { <-reached; stop(stopped) }()
			c := &http.Client{Transport: patient{ctx, http.DefaultTransport}}
			if resp, err := c.Post(server.URL, "", strings.NewReader("request")); err == nil {
				_ = resp.Body.Close()
				t.Errorf("status %d", resp.StatusCode)
			}
		})
	}
}

func TestPause(t *testing.T) {
	for after, want := range map[string]time.Duration{
		"": time.Second, "2": 2 * time.Second, "0": time.Second, "-1": time.Second, "3600": maxPause,
		"9999999999999": maxPause, "Fri, 31 Dec 2100 23:59:59 GMT": time.Second,
	} {
		if got := pause(after); got != want {
			t.Errorf("pause(%q) = %s, want %s", after, got, want)
		}
	}
}
