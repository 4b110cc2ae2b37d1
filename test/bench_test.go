package test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThalesIgnite/crypto11"
	v1 "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	rekorpb "github.com/sigstore/rekor-tiles/v2/pkg/generated/protobuf"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// BenchmarkPath measures the whole path in one run and gives ratios. The
// service is a process of its own, reached over TLS with keep-alive; its CPU
// time is the operating system's account of that process alone. Hardware
// signatures are counted by a PKCS#11 module in front of SoftHSM, not by us.
//
//	token    raw crypto11 signatures in this process: 1, 8, 16 sessions
//	issue    POST /api/v2/signingCert: 1, 8, 32 clients
//	slow-token        raw crypto11, 5 ms more for each signature: 1, 16 sessions
//	issue-slow-token  certificates from such a token: 1, 32, 64 clients
//	entries  POST /api/v2/log/entries: 1, 32, 128 clients
//
// Reported beside ns/op (the wall time of the run per operation): per-s,
// p50-us, p99-us, cpu-us (of the service, per operation), sigs (hardware
// signatures per operation), and for issue token% = rate × 3 signatures, of
// the raw token's rate at 16 sessions, measured in the same run. The load generator runs on the same
// cores: on a machine of two cores it takes a third to a half of them.
func BenchmarkPath(b *testing.B) {
	needSoftHSM(b)
	shim := hsmtest.NewShim(b)
	var raw float64
	b.Run("token", func(b *testing.B) { raw = benchToken(b, hsmtest.NewSoftHSM(b), 1, 8, 16) })

	d := shimmedDemo(b, shim)
	b.Run("issue", func(b *testing.B) {
		body := signingRequest(b, freshKey(b), d.token(map[string]any{"exp": time.Now().Add(time.Hour).Unix()}), user)
		request := func(int64) (string, []byte) { return "/api/v2/signingCert", body }
		for _, clients := range []int{1, 8, 32} {
			b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
				rate := load{d.target(), shim, clients, http.StatusOK, request}.run(b)
				if raw > 0 {
					b.ReportMetric(100*rate*3/raw, "token%")
				}
			})
		}
	})
	// A token that takes 5 ms more for each signature, 16 at a time.
	const delay = 5 * time.Millisecond
	var slow float64
	b.Run("slow-token", func(b *testing.B) {
		shim.Delay(int(delay.Microseconds()))
		defer shim.Delay(0)
		slow = benchToken(b, shim.NewToken(b), 1, 16)
	})
	b.Run("issue-slow-token", func(b *testing.B) {
		shim.Delay(int(delay.Microseconds()))
		defer shim.Delay(0)
		body := signingRequest(b, freshKey(b), d.token(map[string]any{"exp": time.Now().Add(time.Hour).Unix()}), user)
		request := func(int64) (string, []byte) { return "/api/v2/signingCert", body }
		for _, clients := range []int{1, 32, 64} {
			b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
				rate := load{d.target(), shim, clients, http.StatusOK, request}.run(b)
				if slow > 0 {
					b.ReportMetric(100*rate*3/slow, "token%")
				}
			})
		}
	})
	b.Run("entries", func(b *testing.B) {
		for _, clients := range []int{1, 32, 128} {
			b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
				entries := makeEntries(b, d, b.N)
				request := func(i int64) (string, []byte) { return "/api/v2/log/entries", entries[i] }
				load{d.target(), shim, clients, http.StatusCreated, request}.run(b)
			})
		}
	})
	b.Run("memory", func(b *testing.B) {
		for b.Loop() {
			b.ReportMetric(float64(d.rss()>>20), "MiB-RSS")
		}
	})
}

// benchToken measures the bare token, through no code of ours, and returns the
// signatures per second of the last number of sessions.
func benchToken(b *testing.B, token hsmtest.SoftHSMToken, sessions ...int) (rate float64) {
	opened := hsmtest.OpenSoftHSM(b, token)
	key := hsmtest.NewKey(b, opened, "raw", hsm.ECDSAP256)
	if err := opened.Close(); err != nil { // the module has one owner at a time
		b.Fatal(err)
	}
	raw, err := crypto11.Configure(&crypto11.Config{
		Path: token.Module, TokenLabel: token.Label, Pin: string(token.PIN), MaxSessions: 17,
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = raw.Close() })
	pairs, err := raw.FindAllKeyPairs()
	if err != nil || len(pairs) != 1 || !key.Public().(*ecdsa.PublicKey).Equal(pairs[0].Public()) {
		b.Fatalf("%d key pairs, %v", len(pairs), err)
	}
	digest := make([]byte, 32)
	for _, n := range sessions {
		b.Run(fmt.Sprintf("sessions=%d", n), func(b *testing.B) {
			times := spread(b.N, n, func(int64) error {
				_, err := pairs[0].Sign(rand.Reader, digest, crypto.SHA256)
				return err
			}, b.Errorf)
			rate = report(b, times, b.Elapsed())
		})
	}
	return rate
}

// shimmedDemo runs a demo whose token is behind the counting module.
func shimmedDemo(t testing.TB, shim *hsmtest.Shim) *demo {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "demo")
	must(t, nil, binary(t, "chancery"), "demo", "--once", "--dir", dir)
	useModule(t, dir, shim.Module)
	shim.Reset()
	d := startDemo(t, dir)
	if shim.Signs() == 0 {
		t.Fatal("the service does not sign through the counting module")
	}
	return d
}

// useModule makes a demo's folder name another PKCS#11 module.
func useModule(t testing.TB, dir, module string) {
	t.Helper()
	ring := filepath.Join(dir, "trust", "keys.yaml")
	raw, err := os.ReadFile(ring)
	if err != nil {
		t.Fatal(err)
	}
	moved := regexp.MustCompile(`module: .*`).ReplaceAll(raw, []byte("module: "+module))
	if err := os.WriteFile(ring, moved, 0o600); err != nil {
		t.Fatal(err)
	}
}

// target is a service under load.
type target struct {
	url string
	tls *tls.Config          // nil of a service that speaks plain HTTP
	cpu func() time.Duration // processor time of all its processes
}

func (d *demo) target() target {
	return target{d.url, d.tlsConfig(), func() time.Duration { return processTime(d.t, d.cmd.Process.Pid) }}
}

// load is one kind of request from a number of clients.
type load struct {
	at      target
	shim    *hsmtest.Shim
	clients int
	status  int
	request func(i int64) (path string, body []byte)
}

// run makes b.N requests and returns how many were answered in a second.
func (l load) run(b *testing.B) float64 {
	b.Helper()
	clients := l.connect(b)
	defer clients.close()
	cpu, signs := l.at.cpu(), l.shim.Signs()
	b.ResetTimer()
	times := l.send(b, clients, b.N)
	b.StopTimer()
	b.ReportMetric(float64((l.at.cpu()-cpu).Microseconds())/float64(b.N), "cpu-us")
	b.ReportMetric(float64(l.shim.Signs()-signs)/float64(b.N), "sigs")
	return report(b, times, b.Elapsed())
}

// clients have a connection each, as separate machines would.
type clients []*http.Client

func (c clients) close() {
	for _, client := range c {
		client.CloseIdleConnections()
	}
}

// connect opens the connections of l's clients.
func (l load) connect(t testing.TB) clients {
	t.Helper()
	all := make(clients, l.clients)
	for i := range all {
		all[i] = &http.Client{Timeout: time.Minute, Transport: &http.Transport{TLSClientConfig: l.at.tls, ForceAttemptHTTP2: true}}
		if err := call(all[i], http.MethodGet, l.at.url+"/healthz", nil, http.StatusOK); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// send makes n requests over open connections and returns how long each took.
func (l load) send(t testing.TB, all clients, n int) []time.Duration {
	t.Helper()
	var next atomic.Int64
	free := make(chan *http.Client, len(all))
	for _, c := range all {
		free <- c
	}
	return spread(n, len(all), func(int64) error {
		c := <-free
		defer func() { free <- c }()
		path, body := l.request(next.Add(1) - 1)
		return call(c, http.MethodPost, l.at.url+path, body, l.status)
	}, t.Errorf)
}

func call(c *http.Client, method, url string, body []byte, status int) error {
	req, err := http.NewRequest(method, url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != status {
		return fmt.Errorf("%s: status %d: %.200s", url, resp.StatusCode, answer)
	}
	return nil
}

// spread does n operations in workers goroutines and returns how long each took.
func spread(n, workers int, do func(i int64) error, fail func(string, ...any)) []time.Duration {
	times := make([]time.Duration, n)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for {
				i := next.Add(1) - 1
				if i >= int64(n) {
					return
				}
				began := time.Now()
				if err := do(i); err != nil {
					fail("operation %d: %v", i, err)
					return
				}
				times[i] = time.Since(began)
			}
		})
	}
	wg.Wait()
	return times
}

// report gives rate and latencies and returns the rate per second.
func report(b *testing.B, times []time.Duration, took time.Duration) float64 {
	slices.Sort(times)
	rate := float64(len(times)) / took.Seconds()
	b.ReportMetric(rate, "per-s")
	b.ReportMetric(float64(times[len(times)/2].Microseconds()), "p50-us")
	b.ReportMetric(float64(times[len(times)*99/100].Microseconds()), "p99-us")
	return rate
}

// makeEntries makes n distinct, valid log entries, as cosign sends them: with
// a certificate of the demo's CA.
func makeEntries(b *testing.B, d *demo, n int) [][]byte {
	b.Helper()
	key := freshKey(b)
	answer := d.post("/api/v2/signingCert", "application/json", signingRequest(b, key, d.token(nil), user), http.StatusOK)
	var issued struct {
		SignedCertificateEmbeddedSct struct {
			Chain struct{ Certificates []string }
		}
	}
	if err := json.Unmarshal(answer, &issued); err != nil {
		b.Fatal(err)
	}
	leaf, _ := pem.Decode([]byte(issued.SignedCertificateEmbeddedSct.Chain.Certificates[0]))
	entries := make([][]byte, n)
	for i := range entries {
		digest := sha256.Sum256([]byte(strconv.Itoa(i)))
		sig, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
		if err != nil {
			b.Fatal(err)
		}
		entries[i], err = protojson.Marshal(&rekorpb.CreateEntryRequest{Spec: &rekorpb.CreateEntryRequest_HashedRekordRequestV002{
			HashedRekordRequestV002: &rekorpb.HashedRekordRequestV002{Digest: digest[:], Signature: &rekorpb.Signature{
				Content: sig, Verifier: &rekorpb.Verifier{KeyDetails: v1.PublicKeyDetails_PKIX_ECDSA_P256_SHA_256,
					Verifier: &rekorpb.Verifier_X509Certificate{X509Certificate: &v1.X509Certificate{RawBytes: leaf.Bytes}}},
			}},
		}})
		if err != nil {
			b.Fatal(err)
		}
	}
	return entries
}

// processTime is the processor time that a process has used, with that of the
// children that it has waited for.
func processTime(t testing.TB, pid int) time.Duration {
	t.Helper()
	used, err := readProcessTime(pid)
	if err != nil {
		t.Fatal(err)
	}
	return used
}

// readProcessTime reads utime, stime, cutime and cstime of /proc/PID/stat, in
// ticks of 10 ms (proc(5)).
func readProcessTime(pid int) (used time.Duration, err error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
	for _, field := range fields[11:15] {
		ticks, err := strconv.Atoi(field)
		if err != nil {
			return 0, fmt.Errorf("read CPU time of process %d: %w", pid, err)
		}
		used += time.Duration(ticks) * 10 * time.Millisecond
	}
	return used, nil
}

// rss is the demo's resident memory in octets, from /proc/PID/statm.
func (d *demo) rss() int {
	d.t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", d.cmd.Process.Pid))
	if err != nil {
		d.t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(raw))[1])
	if err != nil {
		d.t.Fatal(err)
	}
	return pages * os.Getpagesize()
}
