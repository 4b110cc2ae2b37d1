package demo

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm/softhsm"
)

// TestMain is the load generator when a benchmark starts this program again.
func TestMain(m *testing.M) {
	if url := os.Getenv(loadURL); url != "" {
		if err := generate(url); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// How a benchmark tells the load generator what to do; the body of every
// request is its standard input.
const (
	loadURL      = "CHANCERY_BENCH_URL"
	loadClients  = "CHANCERY_BENCH_CLIENTS"
	loadRequests = "CHANCERY_BENCH_REQUESTS"
)

// BenchmarkIssue issues certificates over TLS with keep-alive to clients in
// another process, so that a profile and cpu-us show the service alone:
//
//	go test -run '^$' -bench 'Issue/clients=32' -benchtime 10000x -cpuprofile cpu.out ./cmd/chancery/internal/demo
//
// cpu-us is the processor time of this process per certificate (getrusage).
// The service of BenchmarkPath in test is a whole process of its own; its
// figures are those that count.
func BenchmarkIssue(b *testing.B) {
	procs := runtime.GOMAXPROCS(0)
	runtime.GOMAXPROCS(6 * procs) // as chancery serve does
	defer runtime.GOMAXPROCS(procs)
	d := start(b)
	body := request(b, d)
	for _, clients := range []int{1, 32} {
		b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
			cmd := exec.CommandContext(b.Context(), os.Args[0])
			cmd.Env = append(os.Environ(), loadURL+"="+d.url+"/api/v2/signingCert",
				loadClients+"="+strconv.Itoa(clients), loadRequests+"="+strconv.Itoa(b.N))
			cmd.Stdin, cmd.Stderr = bytes.NewReader(body), os.Stderr
			b.ReportAllocs()
			before := used(b)
			b.ResetTimer()
			if err := cmd.Run(); err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64((used(b)-before).Microseconds())/float64(b.N), "cpu-us")
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "per-s")
		})
	}
}

// used is the processor time of this process.
func used(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// generate posts the body from the number of clients, each on a connection of
// its own, until there were so many requests.
func generate(url string) error {
	body, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	clients, err1 := strconv.Atoi(os.Getenv(loadClients))
	requests, err2 := strconv.Atoi(os.Getenv(loadRequests))
	if err1 != nil || err2 != nil {
		return fmt.Errorf("%w, %w", err1, err2)
	}
	var left atomic.Int64
	left.Store(int64(requests))
	var wg sync.WaitGroup
	failed := make(chan error, clients)
	for range clients {
		wg.Go(func() {
			// Whose certificate it is does not matter to the measurement.
			c := &http.Client{Timeout: time.Minute, Transport: &http.Transport{
				TLSClientConfig:   &tls.Config{InsecureSkipVerify: true},
				ForceAttemptHTTP2: true,
			}}
			defer c.CloseIdleConnections()
			for left.Add(-1) >= 0 {
				if err := ask(c, url, body); err != nil {
					failed <- err
					return
				}
			}
		})
	}
	wg.Wait()
	close(failed)
	return <-failed
}

func ask(c *http.Client, url string, body []byte) error {
	resp, err := c.Post(url, "application/json", bytes.NewReader(body))
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d: %.200s", resp.StatusCode, answer)
	}
	return err
}

// BenchmarkIssueHandler issues certificates through the whole service in this
// process, without the network: what of the cost is not HTTP and TLS.
func BenchmarkIssueHandler(b *testing.B) {
	d := start(b)
	body := request(b, d)
	b.Run("parallel", func(b *testing.B) { post(b, d.service.Handler(), body) })
}

// start runs a demo until the test ends.
func start(b testing.TB) *Demo {
	b.Helper()
	d, err := Start(b.Context(), Options{
		Dir: filepath.Join(b.TempDir(), "demo"), Logger: slog.New(slog.DiscardHandler), Step: func(string, string, time.Duration) {},
	})
	if err != nil {
		if os.Getenv("CHANCERY_REQUIRE_HSM") == "1" || !errors.Is(err, softhsm.ErrNotInstalled) {
			b.Fatal(err)
		}
		b.Skip(err)
	}
	b.Cleanup(func() {
		if err := d.Close(); err != nil {
			b.Error(err)
		}
	})
	return d
}

func post(b *testing.B, handler http.Handler, body []byte) {
	b.SetParallelism(8)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			r := httptest.NewRequest(http.MethodPost, "/api/v2/signingCert", bytes.NewReader(body))
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, r)
			if w.Code != http.StatusOK {
				b.Errorf("status %d: %s", w.Code, w.Body)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "per-s")
}

// request is a signing request of the demo's user for a fresh key.
func request(b testing.TB, d *Demo) []byte {
	b.Helper()
	token, err := d.idp.Token(map[string]any{"exp": time.Now().Add(time.Hour).Unix()})
	if err != nil {
		b.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		b.Fatal(err)
	}
	digest := sha256.Sum256([]byte(Email))
	possession, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		b.Fatal(err)
	}
	body, err := json.Marshal(map[string]any{
		"credentials": map[string]string{"oidcIdentityToken": token},
		"publicKeyRequest": map[string]any{
			"publicKey":         map[string]string{"content": string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))},
			"proofOfPossession": possession,
		},
	})
	if err != nil {
		b.Fatal(err)
	}
	return body
}
