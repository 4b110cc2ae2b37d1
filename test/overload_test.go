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

// TestOverload: offered far more than its token can sign, the service refuses the
// rest, tells it when to come again, and spends no signature on it. How many
// certificates come of it and how soon the others are told is a matter of the
// machine and its other work: BenchmarkOverload measures it, and TestAdmission in
// ca/server holds it without a machine.
func TestOverload(t *testing.T) {
	got := overload(t, 120, 3*time.Second)
	t.Log(got)
	if len(got.refusals) == 0 || len(got.waits) == 0 {
		t.Fatal("nothing was refused, or nothing issued")
	}
	// A certificate is three signatures; a head is made once a second.
	needed := 3*len(got.waits) + int(got.took/time.Second) + 5
	if got.signatures > needed+needed/10 {
		t.Errorf("%d signatures for %d certificates in %s: some were for nothing", got.signatures, len(got.waits), got.took)
	}
	// Both are answered by the same machine, and the token takes its time over one.
	if refused, issued := halfWay(got.refusals), halfWay(got.waits); refused > issued {
		t.Errorf("half of the refusals took more than %s, half of the certificates no more than %s", refused, issued)
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
		b.ReportMetric(float64(halfWay(got.refusals).Microseconds()), "refused-p50-us")
		b.ReportMetric(float64(got.refusals[n*99/100].Microseconds()), "refused-p99-us")
	}
}

// pressure is what came of an overload.
type pressure struct {
	capacity, goodput float64         // certificates a second
	refusals, waits   []time.Duration // how long each refusal and each certificate took, in order
	signatures        int             // of the token, for what was offered in took
	took              time.Duration
}

// halfWay is the median of what is in order.
func halfWay(times []time.Duration) time.Duration { return times[len(times)/2] }

func (p pressure) String() string {
	n := len(p.refusals)
	if n == 0 {
		return fmt.Sprintf("capacity %.1f/s, goodput %.1f/s, no refusals", p.capacity, p.goodput)
	}
	return fmt.Sprintf("capacity %.1f/s, goodput %.1f/s, %d refused, in %s (median) and %s (99 %%)",
		p.capacity, p.goodput, n, halfWay(p.refusals), p.refusals[n*99/100])
}

// overload measures the capacity of a service whose token takes 100 ms for a
// signature, 16 at a time, with two clients for each session, by so many
// certificates; then it offers four times that, for so long (0: as long as the
// first part took), and, while nothing is refused, twice as much again: the
// machine may have been slower at first.
func overload(t testing.TB, certificates int, during time.Duration) (p pressure) {
	t.Helper()
	needSoftHSM(t)
	shim := hsmtest.NewShim(t)
	d := shimmedDemo(t, shim)
	shim.Delay(int((100 * time.Millisecond).Microseconds()))
	body := signingRequest(t, freshKey(t), d.token(map[string]any{"exp": time.Now().Add(time.Hour).Unix()}), user)
	clients := make([]*http.Client, 16)
	for i := range clients {
		clients[i] = &http.Client{Timeout: hang, Transport: &http.Transport{TLSClientConfig: d.tlsConfig(), ForceAttemptHTTP2: true}}
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
			issued, p.waits = append(issued, time.Now()), append(p.waits, took)
		}
		return nil
	}
	began := time.Now()
	spread(certificates, 32, ask, t.Errorf)
	p.capacity = pace(issued)
	if during == 0 {
		during = time.Since(began)
	}
	issued, p.refusals, p.waits = nil, nil, nil
	if p.capacity == 0 {
		t.Fatal("no certificates")
	}
	signs := shim.Signs()
	began = time.Now()
	refused := func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(p.refusals) > 0
	}
	for times := 4.0; times <= 64 && !refused(); times *= 2 {
		offer(time.Duration(float64(time.Second)/p.capacity/times), during, func(i int64) {
			if err := ask(i); err != nil {
				t.Error(err)
			}
		})
	}
	p.signatures, p.took = shim.Signs()-signs, time.Since(began)
	p.goodput = pace(issued)
	slices.Sort(p.refusals)
	slices.Sort(p.waits)
	return p
}

// offer begins do at every interval, and returns when all of them are done.
func offer(interval, during time.Duration, do func(i int64)) {
	var wg sync.WaitGroup
	defer wg.Wait()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	end := time.After(during)
	for i := int64(0); ; i++ {
		select {
		case <-tick.C:
			wg.Go(func() { do(i) })
		case <-end:
			return
		}
	}
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
