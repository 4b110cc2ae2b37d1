package server

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/chancery-ca/chancery/ca/internal/idptest"
)

// TestManyLargeBodies: who sends most of a large body on each of many connections
// gets no more of our memory than there is for it; others are told to come back,
// and small requests are answered all the while.
func TestManyLargeBodies(t *testing.T) {
	h := build(t, nil)
	srv := httptest.NewServer(h.echo)
	defer srv.Close() // after the bodies are ended
	const clients = 3 * largeBodies
	hold := make(chan struct{})
	end := sync.OnceFunc(func() { close(hold) })
	defer end()
	var answers sync.WaitGroup
	statuses := make(chan int, clients)
	for range clients {
		body, rest := io.Pipe()
		answers.Go(func() {
			resp, err := srv.Client().Post(srv.URL+PathSigningCert, "application/json", body)
			_ = body.CloseWithError(io.ErrClosedPipe)
			if err != nil {
				t.Error(err)
				return
			}
			_ = resp.Body.Close()
			statuses <- resp.StatusCode
		})
		answers.Go(func() {
			_, _ = rest.Write(bytes.Repeat([]byte(" "), 2*smallBody))
			<-hold
			_ = rest.Close()
		})
	}
	idptest.Until(t, "refusals of all but those that are let in", func() bool { return len(statuses) == clients-largeBodies })
	raw := h.token(t, nil)
	leafOf(t, h.do(http.MethodPost, PathSigningCert, body(t, raw, publicPEM(t, h.key.Public()), prove(t, h.key, "alice@example.com")), nil))
	large := strings.Repeat(" ", 512<<10) + "{}"
	rec := h.do(http.MethodPost, PathLegacySigningCert, large, nil)
	wantFailure(t, rec, 503, 14, "The certificate authority is busy; try again")
	if rec.Header().Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}

	end()
	answers.Wait()
	close(statuses)
	counts := map[int]int{}
	for status := range statuses {
		counts[status]++
	}
	if counts[http.StatusServiceUnavailable] != clients-largeBodies || counts[http.StatusBadRequest] != largeBodies {
		t.Errorf("answers %v", counts)
	}
	idptest.Until(t, "the end of the requests", func() bool { return len(h.server.largeBodies) == 0 })
	// One alone is what it was: a message without a token.
	wantFailure(t, h.do(http.MethodPost, PathSigningCert, large, nil), 400, 3, sayToken)
}
