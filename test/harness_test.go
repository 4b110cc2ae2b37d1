package test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"

	"github.com/chancery-ca/chancery/hsm/softhsm"
)

// The demo's user, as `chancery demo` documents it.
const user = "demo@example.com"

// withRace behind a program's name builds it with the race detector when the
// tests have it. Such a program is several times slower: the tests of load want
// it, those that look at what a program does take it as it is released.
const withRace = " with race detector"

// binary builds a program of this module once per test run.
var binary = func() func(t testing.TB, name string) string {
	var mu sync.Mutex
	built := map[string]string{}
	return func(t testing.TB, name string) string {
		t.Helper()
		mu.Lock()
		defer mu.Unlock()
		if path, ok := built[name]; ok {
			return path
		}
		path := filepath.Join(scratch, name)
		args := []string{"build", "-trimpath", "-o", path}
		program, race := strings.CutSuffix(name, withRace)
		if race && raceEnabled {
			args = append(args, "-race")
		}
		cmd := exec.Command("go", append(args, module+"/cmd/"+program)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", name, err, out)
		}
		built[name] = path
		return path
	}
}()

// hang is after how long something that was to come is said not to come. It ends
// a test that would wait for ever; it measures nothing.
const hang = 5 * time.Minute

// scratch is a folder for the whole test run.
var scratch string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "chancery-test-")
	if err != nil {
		panic(err)
	}
	scratch = dir
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// needSoftHSM skips without SoftHSM, or fails where it is required.
func needSoftHSM(t testing.TB) {
	t.Helper()
	if _, err := softhsm.Module(); err != nil {
		if os.Getenv("CHANCERY_REQUIRE_HSM") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

// demo is a running `chancery demo --dir`.
type demo struct {
	t      testing.TB
	dir    string
	url    string
	issuer string
	http   *http.Client
	cmd    *exec.Cmd
	log    *syncBuffer
}

// startDemo runs the demo on dir and waits until it says that it is ready.
func startDemo(t testing.TB, dir string, args ...string) *demo {
	t.Helper()
	return startDemoOf(t, "chancery", dir, args...)
}

// startDemoOf is startDemo of a program as binary names it.
func startDemoOf(t testing.TB, program, dir string, args ...string) *demo {
	t.Helper()
	needSoftHSM(t)
	d := &demo{t: t, dir: dir, log: new(syncBuffer)}
	d.cmd = exec.Command(binary(t, program), append([]string{"demo", "--dir", dir}, args...)...)
	d.cmd.Stderr = d.log
	stdout, err := d.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.stop)
	ready := make(chan bool, 1)
	go func() {
		lines := bufio.NewScanner(io.TeeReader(stdout, d.log))
		for lines.Scan() {
			if strings.Contains(lines.Text(), "Stop with Ctrl-C") {
				ready <- true
			}
		}
		close(ready)
	}()
	select {
	case ok := <-ready:
		if !ok {
			t.Fatalf("the demo ended early:\n%s", d.log)
		}
	case <-time.After(hang):
		t.Fatalf("the demo was not ready after %v:\n%s", hang, d.log)
	}
	d.connect()
	return d
}

// connect reads where the demo is and trusts its TLS authority.
func (d *demo) connect() {
	d.t.Helper()
	var state struct{ Issuer, Listen string }
	if err := json.Unmarshal(d.read("demo.json"), &state); err != nil {
		d.t.Fatal(err)
	}
	d.issuer, d.url = state.Issuer, "https://"+state.Listen
	d.http = &http.Client{Timeout: hang, Transport: &http.Transport{
		TLSClientConfig: d.tlsConfig(), ForceAttemptHTTP2: true, MaxIdleConnsPerHost: 256,
	}}
}

func (d *demo) tlsConfig() *tls.Config {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(d.read("tls-ca.pem")) {
		d.t.Fatal("tls-ca.pem has no certificate")
	}
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
}

// stop ends the demo as Ctrl-C does and expects a clean end.
func (d *demo) stop() {
	if d.cmd == nil {
		return
	}
	cmd := d.cmd
	d.cmd = nil
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		d.t.Errorf("stop demo: %v", err)
	}
	timer := time.AfterFunc(hang, func() {
		d.t.Errorf("the demo did not stop within %v", hang)
		_ = cmd.Process.Signal(syscall.SIGABRT) // shows where it hangs
	})
	defer timer.Stop()
	if err := cmd.Wait(); err != nil {
		d.t.Errorf("the demo ended with %v:\n%s", err, d.log)
	}
	if d.http != nil {
		d.http.CloseIdleConnections()
	}
}

func (d *demo) path(elem ...string) string {
	return filepath.Join(append([]string{d.dir}, elem...)...)
}

func (d *demo) read(elem ...string) []byte {
	d.t.Helper()
	raw, err := os.ReadFile(d.path(elem...))
	if err != nil {
		d.t.Fatal(err)
	}
	return raw
}

// get fetches a path of the service and expects status.
func (d *demo) get(path string, status int) []byte {
	d.t.Helper()
	resp, err := d.http.Get(d.url + path)
	if err != nil {
		d.t.Fatal(err)
	}
	return d.body(resp, path, status)
}

// post sends a body to a path of the service and expects status.
func (d *demo) post(path, contentType string, body []byte, status int) []byte {
	d.t.Helper()
	resp, err := d.http.Post(d.url+path, contentType, bytes.NewReader(body))
	if err != nil {
		d.t.Fatal(err)
	}
	return d.body(resp, path, status)
}

func (d *demo) body(resp *http.Response, path string, status int) []byte {
	d.t.Helper()
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		d.t.Fatal(err)
	}
	if resp.StatusCode != status {
		d.t.Fatalf("%s: status %d, want %d: %.300s", path, resp.StatusCode, status, body)
	}
	return body
}

// token signs claims with the key of the demo's identity provider.
func (d *demo) token(override map[string]any) string {
	d.t.Helper()
	block, _ := pem.Decode(d.read("identity-provider.key"))
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		d.t.Fatal(err)
	}
	key := parsed.(*rsa.PrivateKey)
	var jwks jose.JSONWebKeySet
	resp, err := http.Get(d.issuer + "/jwks")
	if err != nil {
		d.t.Fatal(err)
	}
	if err := json.Unmarshal(d.body(resp, "jwks", http.StatusOK), &jwks); err != nil || len(jwks.Keys) != 1 {
		d.t.Fatalf("%d keys, %v", len(jwks.Keys), err)
	}
	now := time.Now()
	claims := map[string]any{
		"iss": d.issuer, "sub": "demo-user", "aud": "sigstore", "iat": now.Unix(), "exp": now.Add(5 * time.Minute).Unix(),
		"email": user, "email_verified": true,
	}
	for name, value := range override {
		claims[name] = value
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		d.t.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256,
		Key: jose.JSONWebKey{Key: key, KeyID: jwks.Keys[0].KeyID}}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		d.t.Fatal(err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		d.t.Fatal(err)
	}
	compact, err := jws.CompactSerialize()
	if err != nil {
		d.t.Fatal(err)
	}
	return compact
}

// result is how a command ended.
type result struct {
	code           int
	stdout, stderr string
}

// command runs a program to its end and returns how it ended.
func command(t testing.TB, env []string, name string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("run %s: %v", name, err)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// must runs a program that has to succeed and returns its output.
func must(t testing.TB, env []string, name string, args ...string) string {
	t.Helper()
	r := command(t, env, name, args...)
	if r.code != 0 {
		t.Fatalf("%s %s: exit status %d\n%s%s", filepath.Base(name), strings.Join(args, " "), r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// freePort returns a loopback address that was free a moment ago. Its port is
// below those that the system gives to whoever asks for any, so that nobody
// takes it meanwhile, but for one who chooses the same of 20,000.
func freePort(t testing.TB) string {
	t.Helper()
	const first, last = 10240, 32767
	for {
		address := fmt.Sprintf("127.0.0.1:%d", first+rand.IntN(last-first+1))
		if l, err := net.Listen("tcp", address); err == nil {
			_ = l.Close()
			return address
		} else if !errors.Is(err, syscall.EADDRINUSE) {
			t.Fatal(err)
		}
	}
}

// syncBuffer is a bytes.Buffer for several goroutines.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// softHSMPath is where the library is.
func softHSMPath(t testing.TB) string {
	t.Helper()
	path, err := softhsm.Module()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// eventually polls until done says so, for at most hang.
func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	deadline := time.NewTimer(hang)
	defer deadline.Stop()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-deadline.C:
			t.Fatalf("%s did not come within %v", what, hang)
		case <-tick.C:
		}
	}
}
