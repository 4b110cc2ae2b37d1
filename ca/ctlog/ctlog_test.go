package ctlog_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	ctgo "github.com/google/certificate-transparency-go"
	"github.com/google/certificate-transparency-go/client"
	"github.com/google/certificate-transparency-go/ctutil"
	"github.com/google/certificate-transparency-go/jsonclient"
	ctx509 "github.com/google/certificate-transparency-go/x509"
	"github.com/google/certificate-transparency-go/x509util"
	"github.com/sigstore/fulcio/pkg/certificate"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"go.uber.org/goleak"

	"github.com/chancery-ca/chancery/ca"
	"github.com/chancery-ca/chancery/ca/ctlog"
	"github.com/chancery-ca/chancery/ca/identity"
	"github.com/chancery-ca/chancery/ca/internal/catest"
	"github.com/chancery-ca/chancery/ca/profile"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/log/ct/cttest" //nolint:depguard // the reference log, which is not ours
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func wallClock() (time.Time, error) { return time.Now(), nil }

// fixture is a CA whose log elsewhere is ctfe, behind a server that a test may
// put its own words into.
type fixture struct {
	chain  []*x509.Certificate // intermediate, root
	key    *hsmtest.Counting
	oracle *cttest.CTFE
	front  *httptest.Server
	asked  atomic.Int64 // requests for add-pre-chain
	now    atomic.Pointer[behaviour]
}

// behaviour is what the log does to the requests that come.
type behaviour struct {
	// spoil, if not nil, answers in place of ctfe, or returns false.
	spoil func(w http.ResponseWriter, r *http.Request) bool
	// change, if not nil, alters a good answer of ctfe on its way out.
	change func(answer map[string]any)
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	key := hsmtest.SoftwareKey(hsm.ECDSAP256)
	f := &fixture{key: &hsmtest.Counting{Key: key}, chain: catest.Chain(t, hsmtest.SoftwareKey(hsm.ECDSAP384), key)}
	f.now.Store(new(behaviour))
	f.oracle = cttest.New(t, f.chain[1:], cttest.Options{})
	f.front = httptest.NewTLSServer(http.HandlerFunc(f.serve))
	t.Cleanup(f.front.Close)
	return f
}

func (f *fixture) serve(w http.ResponseWriter, r *http.Request) {
	f.asked.Add(1)
	b := f.now.Load()
	if b.spoil != nil && b.spoil(w, r) {
		return
	}
	if b.change == nil {
		f.oracle.Server.Config.Handler.ServeHTTP(w, r)
		return
	}
	rec := httptest.NewRecorder()
	f.oracle.Server.Config.Handler.ServeHTTP(rec, r)
	var answer map[string]any
	dec := json.NewDecoder(rec.Body)
	dec.UseNumber()
	if err := dec.Decode(&answer); err != nil {
		http.Error(w, err.Error(), http.StatusTeapot)
		return
	}
	b.change(answer)
	_ = json.NewEncoder(w).Encode(answer)
}

// config is one that works.
func (f *fixture) config() ctlog.Config {
	roots := x509.NewCertPool()
	roots.AddCert(f.front.Certificate())
	return ctlog.Config{URL: f.front.URL + f.oracle.Prefix + "/", Key: f.oracle.Key, Roots: roots, Now: wallClock}
}

// issue asks a CA with that log for a certificate.
func (f *fixture) issue(t testing.TB, cfg ctlog.Config) (*ca.Certificate, error) {
	t.Helper()
	l, err := ctlog.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := ca.New(ca.Config{
		Key: f.key, Chain: f.chain, Submitter: l, LogKeys: []crypto.PublicKey{cfg.Key},
		Now: func() (time.Time, error) { return catest.Noon, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	return a.Issue(t.Context(), request(t))
}

func request(t testing.TB) ca.Request {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return ca.Request{Public: key.Public(), Principal: &identity.Principal{
		SAN:        profile.SAN{Type: profile.Email, Value: "alice@example.com"},
		Extensions: certificate.Extensions{Issuer: "https://idp.example", Subject: "alice-id"},
	}}
}

// TestCTFE: a CA with ctfe as its log. The SCT in the certificate and the
// inclusion of the precertificate are verified by certificate-transparency-go.
func TestCTFE(t *testing.T) {
	f := newFixture(t)
	got, err := f.issue(t, f.config())
	if err != nil {
		t.Fatal(err)
	}
	if f.asked.Load() != 1 || f.key.Count() != 2 {
		t.Errorf("%d requests and %d signatures, want 1 and 2", f.asked.Load(), f.key.Count())
	}
	var chain []*ctx509.Certificate
	for _, der := range [][]byte{got.DER, f.chain[0].Raw} {
		cert, err := ctx509.ParseCertificate(der)
		if ctx509.IsFatal(err) {
			t.Fatal(err)
		}
		chain = append(chain, cert)
	}
	scts, err := x509util.ParseSCTsFromCertificate(got.DER)
	if err != nil || len(scts) != 1 {
		t.Fatalf("%d SCTs, %v", len(scts), err)
	}
	if err := ctutil.VerifySCT(f.oracle.Key, chain, scts[0], true); err != nil {
		t.Error(err)
	}
	f.oracle.Integrate(t)
	checkInclusion(t, f.oracle, chain, scts[0])
}

func checkInclusion(t *testing.T, oracle *cttest.CTFE, chain []*ctx509.Certificate, sct *ctgo.SignedCertificateTimestamp) {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(oracle.Key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.New(oracle.URL(), oracle.Server.Client(), jsonclient.Options{PublicKeyDER: der})
	if err != nil {
		t.Fatal(err)
	}
	defer oracle.Server.Client().CloseIdleConnections()
	sth, err := c.GetSTH(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	hash, err := ctutil.LeafHash(chain, sct, true)
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.GetProofByHash(t.Context(), hash[:], sth.TreeSize)
	if err != nil {
		t.Fatal(err)
	}
	if err := proof.VerifyInclusion(rfc6962.DefaultHasher, uint64(got.LeafIndex), sth.TreeSize, hash[:], got.AuditPath, sth.SHA256RootHash[:]); err != nil {
		t.Error(err)
	}
}

// refusal is what may happen at the log, and what becomes of the certificate.
type refusal struct {
	name   string
	spoil  func(w http.ResponseWriter, r *http.Request) bool
	change func(answer map[string]any)
	config func(c *ctlog.Config)
	want   error
	asked  int64 // requests that reach the log; −1: any
}

// says answers with a status, a Retry-After if it is not empty, and a body.
func says(status int, retryAfter, body string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, _ *http.Request) bool {
		if retryAfter != "" {
			w.Header().Set("Retry-After", retryAfter)
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
		return true
	}
}

// hang answers header, if it is not empty, and then nothing until the client
// has gone.
func hang(header string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		_, _ = io.Copy(io.Discard, r.Body) // else the server does not notice
		if header != "" {
			_, _ = io.WriteString(w, header)
			_ = http.NewResponseController(w).Flush()
		}
		<-r.Context().Done()
		return true
	}
}

func endless(w http.ResponseWriter, _ *http.Request) bool {
	for chunk := bytes.Repeat([]byte(" "), 1<<16); ; {
		if _, err := w.Write(chunk); err != nil {
			return true
		}
	}
}

func hangUp(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) }

func redirect(status int) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, r.URL.Path, status)
		return true
	}
}

func set(field string, value any) func(map[string]any) {
	return func(answer map[string]any) { answer[field] = value }
}

func refusals() []refusal {
	// It may be over before a busy machine has a connection.
	short := func(c *ctlog.Config) { c.Timeout = 200 * time.Millisecond }
	return []refusal{
		{name: "another key pinned", config: func(c *ctlog.Config) { c.Key = hsmtest.SoftwareKey(hsm.ECDSAP256).Public() }, want: ctlog.ErrAnswer, asked: 1},
		{name: "tampered signature", change: func(a map[string]any) {
			a["signature"] = strings.Replace(a["signature"].(string), "BAMA", "BAMB", 1)
		}, want: ca.ErrLog, asked: 1},
		{name: "tampered time", change: func(a map[string]any) {
			ms, _ := a["timestamp"].(json.Number).Int64()
			a["timestamp"] = ms + 1
		}, want: profile.ErrSCT, asked: 1},
		{name: "tampered extensions", change: set("extensions", "AAAA"), want: profile.ErrSCT, asked: 1},
		{name: "huge extensions", change: set("extensions", strings.Repeat("AAAA", 1000)), want: ctlog.ErrAnswer, asked: 1},
		{name: "time of long ago", change: set("timestamp", 1), want: ctlog.ErrAnswer, asked: 1},
		{name: "time to come", change: set("timestamp", uint64(1)<<62), want: ctlog.ErrAnswer, asked: 1},
		{name: "negative time", change: set("timestamp", -1), want: ctlog.ErrAnswer, asked: 1},
		{name: "no time", change: func(a map[string]any) { delete(a, "timestamp") }, want: ctlog.ErrAnswer, asked: 1},
		{name: "another version", change: set("sct_version", 1), want: ctlog.ErrAnswer, asked: 1},
		{name: "no version", change: func(a map[string]any) { delete(a, "sct_version") }, want: ctlog.ErrAnswer, asked: 1},
		{name: "another log", change: set("id", "AAAA"), want: ctlog.ErrAnswer, asked: 1},
		{name: "no signature", change: set("signature", ""), want: profile.ErrSCT, asked: 1},
		{name: "huge signature", change: set("signature", strings.Repeat("AAAA", 10000)), want: profile.ErrSCT, asked: 1},
		{name: "not JSON", spoil: says(200, "", "<html>welcome</html>"), want: ctlog.ErrAnswer, asked: 1},
		{name: "nothing", spoil: says(200, "", ""), want: ctlog.ErrAnswer, asked: 1},
		{name: "no content", spoil: says(204, "", ""), want: ctlog.ErrRefused, asked: 1},
		{name: "two answers", spoil: says(200, "", "{}{}"), want: ctlog.ErrAnswer, asked: 1},
		{name: "an endless answer", spoil: endless, want: ctlog.ErrAnswer, asked: 1},
		{name: "400", spoil: says(400, "", "unknown root"), want: ctlog.ErrRefused, asked: 1},
		{name: "404", spoil: says(404, "", ""), want: ctlog.ErrRefused, asked: 1},
		{name: "500", spoil: says(500, "", ""), want: ca.ErrUnavailable, asked: 1},
		{name: "500 with Retry-After", spoil: says(500, "0", ""), want: ca.ErrUnavailable, asked: 1},
		{name: "502", spoil: says(502, "", ""), want: ca.ErrUnavailable, asked: 1},
		{name: "503", spoil: says(503, "", ""), want: ca.ErrUnavailable, asked: 1},
		{name: "503 twice", spoil: says(503, "0", ""), want: ca.ErrUnavailable, asked: 2},
		{name: "429 twice", spoil: says(429, "0", ""), want: ca.ErrUnavailable, asked: 2},
		{name: "503 for an hour", spoil: says(503, "3600", ""), want: ca.ErrUnavailable, asked: 1},
		{name: "503 for longer than we have", spoil: says(503, "5", ""), config: func(c *ctlog.Config) { c.Timeout = 5 * time.Second }, want: ca.ErrUnavailable, asked: 1},
		{name: "503 until a date", spoil: says(503, "Fri, 31 Dec 2027 23:59:59 GMT", ""), want: ca.ErrUnavailable, asked: 1},
		{name: "503 for a negative time", spoil: says(503, "-1", ""), want: ca.ErrUnavailable, asked: 1},
		{name: "301", spoil: redirect(301), want: ctlog.ErrRefused, asked: 1},
		{name: "307", spoil: redirect(307), want: ctlog.ErrRefused, asked: 1},
		{name: "308 to nowhere", spoil: says(308, "", ""), want: ctlog.ErrRefused, asked: 1},
		{name: "no answer", spoil: hang(""), config: short, want: ca.ErrUnavailable, asked: -1},
		{name: "half an answer", spoil: hang(`{"sct_version":0,`), config: short, want: ca.ErrUnavailable, asked: -1},
		{name: "hung up", spoil: hangUp, want: ca.ErrUnavailable, asked: -1},
		{name: "a server of another TLS authority", config: func(c *ctlog.Config) { c.Roots = x509.NewCertPool() }, want: ca.ErrUnavailable},
		{name: "no server", config: func(c *ctlog.Config) { c.URL = "https://127.0.0.1:1/ct" }, want: ca.ErrUnavailable},
		{name: "clock refuses", config: func(c *ctlog.Config) {
			c.Now = func() (time.Time, error) { return time.Time{}, errors.New("clock went back") }
		}, want: ca.ErrUnavailable, asked: 1},
	}
}

// TestRefusals: whatever the log does, there is no certificate, and the error
// says whether trying again helps.
func TestRefusals(t *testing.T) {
	f := newFixture(t)
	for _, tc := range refusals() {
		t.Run(tc.name, func(t *testing.T) {
			f.now.Store(&behaviour{tc.spoil, tc.change})
			before, signed := f.asked.Load(), f.key.Count()
			cfg := f.config()
			if tc.config != nil {
				tc.config(&cfg)
			}
			got, err := f.issue(t, cfg)
			if got != nil || !errors.Is(err, tc.want) {
				t.Errorf("%v, %v; want %v", got, err, tc.want)
			}
			if passes := errors.Is(err, ca.ErrUnavailable); passes == errors.Is(err, ca.ErrLog) {
				t.Errorf("%v is not one of ErrUnavailable and ErrLog", err)
			}
			if n := f.asked.Load() - before; n != tc.asked && tc.asked >= 0 {
				t.Errorf("%d requests, want %d", n, tc.asked)
			}
			if n := f.key.Count() - signed; n != 1 {
				t.Errorf("%d signatures by the CA, want the precertificate's alone", n)
			}
		})
	}
	f.now.Store(new(behaviour))
	if _, err := f.issue(t, f.config()); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

// TestAskedAgain: a log that asks for it is asked once more.
func TestAskedAgain(t *testing.T) {
	f := newFixture(t)
	for _, status := range []int{http.StatusTooManyRequests, http.StatusServiceUnavailable} {
		var refused atomic.Bool
		f.now.Store(&behaviour{spoil: func(w http.ResponseWriter, r *http.Request) bool {
			return refused.CompareAndSwap(false, true) && says(status, "0", "later")(w, r)
		}})
		before := f.asked.Load()
		if _, err := f.issue(t, f.config()); err != nil {
			t.Errorf("%d and then good: %v", status, err)
		}
		if n := f.asked.Load() - before; n != 2 {
			t.Errorf("%d: %d requests, want 2", status, n)
		}
	}
}

// TestErr: readiness follows the newest Submit.
func TestErr(t *testing.T) {
	f := newFixture(t)
	l, err := ctlog.New(f.config())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := ca.New(ca.Config{
		Key: f.key, Chain: f.chain, Submitter: l, LogKeys: []crypto.PublicKey{f.oracle.Key},
		Now: func() (time.Time, error) { return catest.Noon, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Err(); err != nil {
		t.Errorf("before the first Submit: %v", err)
	}
	f.now.Store(&behaviour{spoil: says(http.StatusInternalServerError, "", "")})
	if _, err := a.Issue(t.Context(), request(t)); err == nil || !errors.Is(l.Err(), ca.ErrUnavailable) {
		t.Errorf("after %v: %v", err, l.Err())
	}
	f.now.Store(new(behaviour))
	if _, err := a.Issue(t.Context(), request(t)); err != nil || l.Err() != nil {
		t.Errorf("after a good one: %v, %v", err, l.Err())
	}
}

// TestCallerLeaves: a Submit ends with its caller, and says nothing about the
// log.
func TestCallerLeaves(t *testing.T) {
	f := newFixture(t)
	ctx, cancel := context.WithCancel(t.Context())
	f.now.Store(&behaviour{spoil: func(w http.ResponseWriter, r *http.Request) bool {
		cancel()
		return hang("")(w, r)
	}})
	l, err := ctlog.New(f.config())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := l.Submit(ctx, []byte("precert"), nil); !errors.Is(err, context.Canceled) {
		t.Errorf("err %v", err)
	}
	if err := l.Err(); err != nil {
		t.Errorf("the log is blamed: %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	good := ctlog.Config{URL: "https://ct.example/2026", Key: hsmtest.SoftwareKey(hsm.ECDSAP256).Public(), Now: wallClock}
	url := func(u string) func(*ctlog.Config) { return func(c *ctlog.Config) { c.URL = u } }
	key := func(k crypto.PublicKey) func(*ctlog.Config) { return func(c *ctlog.Config) { c.Key = k } }
	for name, change := range map[string]func(*ctlog.Config){
		"no URL":           url(""),
		"http":             url("http://ct.example"),
		"no host":          url("https:///ct"),
		"a query":          url("https://ct.example/?a=b"),
		"an empty query":   url("https://ct.example/?"),
		"a fragment":       url("https://ct.example/#a"),
		"a user":           url("https://a:b@ct.example/"),
		"opaque":           url("https:ct.example"),
		"control":          url("https://ct.example/\n"),
		"no key":           key(nil),
		"a P-384 key":      key(hsmtest.SoftwareKey(hsm.ECDSAP384).Public()),
		"a nil key":        key((*ecdsa.PublicKey)(nil)),
		"no clock":         func(c *ctlog.Config) { c.Now = nil },
		"negative timeout": func(c *ctlog.Config) { c.Timeout = -1 },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := good
			change(&cfg)
			if _, err := ctlog.New(cfg); !errors.Is(err, ctlog.ErrConfig) {
				t.Errorf("err %v", err)
			}
		})
	}
	if _, err := ctlog.New(good); err != nil {
		t.Error(err)
	}
}
