package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"
)

const (
	// tries is how often a service is asked that says that it is busy.
	tries = 3
	// maxPause bounds the pause between two tries, whatever the service wishes.
	maxPause = 5 * time.Second
	// maxAnswer bounds what is read of a refusal, in octets.
	maxAnswer = 4 << 10
)

// errRefused is the answer of a service that does not do what it was asked.
var errRefused = errors.New("service refused")

// patient asks again, when it is told to, a service that is busy (503, 429), and
// makes an error with the service's own words of its last answer: sigstore-go
// tries again too, but then has lost them. It gives up when ctx ends, which
// sigstore-go's requests do not know.
type patient struct {
	ctx  context.Context
	next http.RoundTripper
}

// RoundTrip implements http.RoundTripper. All tries together take no longer than
// the request's own deadline.
func (p patient) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Body != nil {
		defer req.Body.Close() // copies are sent
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	defer context.AfterFunc(p.ctx, func() { cancel(context.Cause(p.ctx)) })()
	for left := tries - 1; ; left-- {
		resp, err := p.try(ctx, req)
		if err != nil {
			cancel(nil)
			return nil, err
		}
		if resp.StatusCode < http.StatusInternalServerError && resp.StatusCode != http.StatusTooManyRequests {
			resp.Body = &releasing{resp.Body, cancel}
			return resp, nil
		}
		refused := refusal(resp)
		if left == 0 || resp.StatusCode != http.StatusServiceUnavailable && resp.StatusCode != http.StatusTooManyRequests {
			cancel(nil)
			return nil, refused
		}
		select {
		case <-ctx.Done():
			cancel(nil)
			return nil, fmt.Errorf("%w (%w)", refused, context.Cause(ctx))
		case <-time.After(pause(resp.Header.Get("Retry-After"))):
		}
	}
}

// try sends a copy of the request.
func (p patient) try(ctx context.Context, req *http.Request) (*http.Response, error) {
	again := req.Clone(ctx)
	if req.GetBody != nil {
		body, err := req.GetBody()
		if err != nil {
			return nil, fmt.Errorf("send again: %w", err)
		}
		again.Body = body
	}
	return p.next.RoundTrip(again)
}

// refusal is an answer as an error, and closes it.
func refusal(resp *http.Response) error {
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, maxAnswer)) // the status alone says enough
	var answer struct{ Message string }
	if err := json.Unmarshal(text, &answer); err != nil || answer.Message == "" {
		answer.Message = "no reason given"
	}
	return fmt.Errorf("%w: %s: %.500q", errRefused, resp.Status, answer.Message)
}

// pause is how long to wait for a service that says Retry-After.
func pause(after string) time.Duration {
	seconds, err := strconv.Atoi(after)
	if err != nil || seconds < 1 {
		return time.Second
	}
	return time.Duration(min(seconds, int(maxPause/time.Second))) * time.Second
}

// releasing is a body that frees what its request holds when it is closed.
type releasing struct {
	io.ReadCloser
	cancel context.CancelCauseFunc
}

// Close implements io.Closer.
func (r *releasing) Close() error {
	defer r.cancel(nil)
	return r.ReadCloser.Close()
}
