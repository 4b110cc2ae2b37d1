package test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// TestOverload: offered four times what its token can sign, the service issues
// as many certificates as before, and tells the others at once when to come
// again.
func TestOverload(t *testing.T) {
	got := overload(t, 120, 3*time.Second)
	t.Log(got)
	if got.goodput < 0.9*got.capacity {
		t.Errorf("%.1f certificates/s at four times the capacity of %.1f/s, want 90 %%", got.goodput, got.capacity)
	}
	if len(got.refusals) == 0 {
		t.Fatal("nothing was refused")
	}
	// The median, because the machine of a test may be busy with others.
	if median := got.refusals[len(got.refusals)/2]; median > 50*time.Millisecond {
		t.Errorf("half of the refusals took more than %s", median)
	}
}

// BenchmarkOverload reports capacity and goodput in certificates a second, the
// goodput as a part of the capacity, and how long it took to be refused. An
// operation is one certificate by which the capacity is measured; then requests
// are offered at four times that rate, for as long.
func BenchmarkOverload(b *testing.B) {
	got := overload(b, max(b.N, 60), 0)
	b.ReportMetric(got.capacity, "capacity-per-s")
	b.ReportMetric(got.goodput, "goodput-per-s")
	b.ReportMetric(100*got.goodput/got.capacity, "goodput%")
	if n := len(got.refusals); n > 0 {
		b.ReportMetric(float64(got.refusals[n/2].Microseconds()), "refused-p50-us")
		b.ReportMetric(float64(got.refusals[n*99/100].Microseconds()), "refused-p99-us")
	}
}

// pressure is what came of an overload.
type pressure struct {
	capacity, goodput float64         // certificates a second
	refusals          []time.Duration // how long each took, in order
}

func (p pressure) String() string {
	n := len(p.refusals)
	if n == 0 {
		return fmt.Sprintf("capacity %.1f/s, goodput %.1f/s, no refusals", p.capacity, p.goodput)
	}
	return fmt.Sprintf("capacity %.1f/s, goodput %.1f/s, %d refused, in %s (median) and %s (99 %%)",
		p.capacity, p.goodput, n, p.refusals[n/2], p.refusals[n*99/100])
}

// overload measures the capacity of a service whose token takes 100 ms for a
// signature, 16 at a time, with two clients for each session, by so many
// certificates; then it offers four times that, for so long (0: as long as the
// first part took).
func overload(t testing.TB, certificates int, during time.Duration) (p pressure) {
	t.Helper()
	needSoftHSM(t)
	shim := hsmtest.NewShim(t)
	d := shimmedDemo(t, shim)
	shim.Delay(int((100 * time.Millisecond).Microseconds()))
	body := signingRequest(t, freshKey(t), d.token(map[string]any{"exp": time.Now().Add(time.Hour).Unix()}), user)
	clients := make([]*http.Client, 16)
	for i := range clients {
		clients[i] = &http.Client{Timeout: time.Minute, Transport: &http.Transport{TLSClientConfig: d.tlsConfig(), ForceAttemptHTTP2: true}}
		defer clients[i].CloseIdleConnections()
	}
	var mu sync.Mutex
	var issued []time.Time
	ask := func(i int64) error {
		began := time.Now()
		retry, err := issueOrRefuse(clients[i%int64(len(clients))], d.url+"/api/v2/signingCert", body)
		took := time.Since(began)
		mu.Lock()
		defer mu.Unlock()
		switch {
		case err != nil:
			return err
		case retry:
			p.refusals = append(p.refusals, took)
		default:
			issued = append(issued, time.Now())
		}
		return nil
	}
	began := time.Now()
	spread(certificates, 32, ask, t.Errorf)
	p.capacity = pace(issued)
	if during == 0 {
		during = time.Since(began)
	}
	issued, p.refusals = nil, nil
	if p.capacity == 0 {
		t.Fatal("no certificates")
	}
	var wg sync.WaitGroup
	tick := time.NewTicker(time.Duration(float64(time.Second) / p.capacity / 4))
	defer tick.Stop()
	end := time.After(during)
	for i := int64(0); ; i++ {
		select {
		case <-tick.C:
			wg.Go(func() {
				if err := ask(i); err != nil {
					t.Error(err)
				}
			})
			continue
		case <-end:
		}
		break
	}
	wg.Wait()
	p.goodput = pace(issued)
	slices.Sort(p.refusals)
	return p
}

// pace is how many a second there were, without the first and the last tenth.
func pace(times []time.Time) float64 {
	n := len(times)
	times = times[n/10 : n-n/10]
	if len(times) < 2 {
		return 0
	}
	return float64(len(times)-1) / times[len(times)-1].Sub(times[0]).Seconds()
}

// issueOrRefuse asks for a certificate and says whether it was told to try
// again, when.
func issueOrRefuse(c *http.Client, url string, body []byte) (retry bool, err error) {
	resp, err := c.Post(url, "application/json", bytes.NewReader(body))
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	switch after := resp.Header.Get("Retry-After"); {
	case err != nil:
		return false, err
	case resp.StatusCode == http.StatusOK:
		return false, nil
	case resp.StatusCode != http.StatusServiceUnavailable:
		return false, fmt.Errorf("status %d: %.200s", resp.StatusCode, answer)
	default:
		if seconds, err := strconv.Atoi(after); err != nil || seconds < 1 {
			return false, fmt.Errorf("refused, and to try again after %q seconds", after)
		}
		return true, nil
	}
}
