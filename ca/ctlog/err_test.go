package ctlog

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chancery-ca/chancery/ca"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// TestDoubtPasses: a failure speaks for ten seconds.
func TestDoubtPasses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l Log
		failed := errors.New("down")
		l.note(failed)
		time.Sleep(doubt) // the bubble's clock
		if err := l.Err(); !errors.Is(err, failed) {
			t.Errorf("within the time: %v", err)
		}
		time.Sleep(time.Nanosecond)
		if err := l.Err(); err != nil {
			t.Errorf("after it: %v", err)
		}
	})
}

// wire is a log's server in a bubble, where no socket can be.
type wire func(*http.Request) (*http.Response, error)

func (w wire) RoundTrip(r *http.Request) (*http.Response, error) { return w(r) }

// silent never answers.
func silent(r *http.Request) (*http.Response, error) {
	<-r.Context().Done()
	return nil, r.Context().Err()
}

// half begins to answer.
func half(r *http.Request) (*http.Response, error) {
	body, w := io.Pipe()
	go func() {
		_, _ = io.WriteString(w, `{"sct_version":0,`)
		<-r.Context().Done()
		_ = w.CloseWithError(r.Context().Err())
	}()
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: body}, nil
}

// onWire makes a log whose clock is the bubble's.
func onWire(t *testing.T, answer wire) *Log {
	t.Helper()
	l, err := New(Config{URL: "https://ct.example", Key: hsmtest.SoftwareKey(hsm.ECDSAP256).Public(), Now: func() (time.Time, error) { return time.Now(), nil }})
	if err != nil {
		t.Fatal(err)
	}
	l.client.Transport = answer
	return l
}

// TestTimeout: a log that does not answer, or not wholly, takes the configured
// time and no more.
func TestTimeout(t *testing.T) {
	for name, answer := range map[string]wire{"no answer": silent, "half an answer": half} {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			_, err := onWire(t, answer).Submit(t.Context(), []byte("precert"), nil)
			if !errors.Is(err, ca.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s: %v", name, err)
			}
			if d := time.Since(start); d != DefaultTimeout {
				t.Errorf("%s: it took %v", name, d)
			}
		})
	}
}

// TestGroupSharesTime: a log that hangs leaves its part of the time for the next.
func TestGroupSharesTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var good *Log
		var left time.Duration
		good = onWire(t, func(r *http.Request) (*http.Response, error) {
			deadline, _ := r.Context().Deadline()
			left = time.Until(deadline)
			body := fmt.Sprintf(`{"sct_version":0,"id":%q,"timestamp":%d,"extensions":"","signature":"BAMAAA=="}`,
				base64.StdEncoding.EncodeToString(good.logID[:]), time.Now().UnixMilli())
			return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body))}, nil
		})
		group, err := NewGroup(onWire(t, silent), onWire(t, half), good)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if _, err := group.Submit(ctx, []byte("precert"), nil); err != nil {
			t.Error(err)
		}
		if left != time.Second {
			t.Errorf("the last log had %v", left)
		}
		if _, err := group.Submit(ctx, []byte("precert"), nil); err != nil || left != time.Second/3 {
			t.Errorf("the log that answered last is asked first: %v, %v", err, left)
		}
	})
}
