package test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestSoak keeps a service under load for CHANCERY_SOAK (a duration; default
// 8 s), with the race detector if the tests have it, and wants its threads and
// open files as flat at the end as they were in the second quarter; after ten
// minutes, when the garbage collector has met its limit, its memory too. In a
// short run, which a busy machine disturbs, they may grow, but by less than half of
// one for each certificate.
func TestSoak(t *testing.T) {
	lasts := 8 * time.Second
	if text := os.Getenv("CHANCERY_SOAK"); text != "" {
		var err error
		if lasts, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
	}
	const (
		clients = 8
		pause   = 60 * time.Millisecond // about 130 certificates a second in all
		// growth is what may come on top in half of the time: the logs' indices
		// grow, the collector breathes.
		growth = 12.0 // MiB
		long   = 10 * time.Minute
	)
	d := startDemoOf(t, "chancery"+withRace, filepath.Join(t.TempDir(), "demo"))
	key := freshKey(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()

	var body atomic.Pointer[[]byte]
	renew := func() {
		b := signingRequest(t, key, d.token(nil), user)
		body.Store(&b)
	}
	renew()
	var issued, failed atomic.Int64
	var load sync.WaitGroup
	for range clients {
		load.Go(func() {
			tick := time.NewTicker(pause)
			defer tick.Stop()
			for ctx.Err() == nil {
				if d.issues(*body.Load()) {
					issued.Add(1)
				} else {
					failed.Add(1)
				}
				select {
				case <-ctx.Done():
				case <-tick.C:
				}
			}
		})
	}
	samples := d.sample(lasts, renew, &issued)
	cancel()
	load.Wait()
	t.Logf("%d certificates in %v, %d refused", issued.Load(), lasts, failed.Load())
	if issued.Load() == 0 || failed.Load()*100 > issued.Load() {
		t.Errorf("%d issued, %d not", issued.Load(), failed.Load())
	}
	early, late := samples[len(samples)/4:len(samples)/2], samples[3*len(samples)/4:]
	allowed := growth
	if lasts < long {
		made := func(s sample) float64 { return s.issued }
		allowed = max(growth, (median(late, made)-median(early, made))/2)
	}
	for name, of := range map[string]func(sample) float64{
		"MiB": func(s sample) float64 { return s.rss }, "threads": func(s sample) float64 { return s.threads }, "open files": func(s sample) float64 { return s.files },
	} {
		before, after := median(early, of), median(late, of)
		t.Logf("%s: %.1f in the second quarter, %.1f in the last", name, before, after)
		if after > before+allowed && (name != "MiB" || lasts >= long) {
			t.Errorf("%s grew from %.1f to %.1f", name, before, after)
		}
	}
}

// issues asks for one certificate.
func (d *demo) issues(body []byte) bool {
	resp, err := d.http.Post(d.url+"/api/v2/signingCert", "application/json", bytes.NewReader(body))
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return err == nil && resp.StatusCode == http.StatusOK
}

// sample is what a process holds at one time, and how many certificates it had
// issued by then.
type sample struct{ rss, threads, files, issued float64 }

// sample looks at the process 40 times in so long, or longer if the machine is
// busy, and renews the token in time.
func (d *demo) sample(lasts time.Duration, renew func(), issued *atomic.Int64) (out []sample) {
	const samples = 40
	tick := time.NewTicker(lasts / samples)
	defer tick.Stop()
	token := time.NewTicker(2 * time.Minute)
	defer token.Stop()
	for len(out) < samples {
		select {
		case <-token.C:
			renew()
		case <-tick.C:
			out = append(out, sample{float64(d.rss()) / (1 << 20), d.count("task"), d.count("fd"), float64(issued.Load())})
		}
	}
	return out
}

// count counts the entries of a folder in /proc/PID.
func (d *demo) count(name string) float64 {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/%s", d.cmd.Process.Pid, name))
	if err != nil {
		d.t.Error(err)
	}
	return float64(len(entries))
}

func median(samples []sample, of func(sample) float64) float64 {
	values := make([]float64, len(samples))
	for i, s := range samples {
		values[i] = of(s)
	}
	slices.Sort(values)
	return values[len(values)/2]
}
