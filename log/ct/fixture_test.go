package ct_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	ctx509 "github.com/google/certificate-transparency-go/x509"
	"github.com/labstack/echo/v4"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/log/ct"
	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/tree"
)

const testOrigin = "ct.test.example/ct/2026"

// authKey is a key of the test's authorities.
func authKey(algorithm hsm.Algorithm) hsm.Key { return hsmtest.SoftwareKey(algorithm) }

// authority is a root, an intermediate and what they sign.
type authority struct {
	root, issuer       *x509.Certificate
	rootKey, issuerKey hsm.Key
	leafKey            hsm.Key
	serial             atomic.Int64
}

var (
	poison    = pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11129, 2, 4, 3}, Critical: true, Value: asn1.NullBytes}
	notBefore = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
)

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{rootKey: authKey(hsm.ECDSAP384), issuerKey: authKey(hsm.ECDSAP256), leafKey: authKey(hsm.ECDSAP256)}
	a.root = a.make(t, &x509.Certificate{Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true}, nil, a.rootKey, a.rootKey)
	a.issuer = a.make(t, &x509.Certificate{Subject: pkix.Name{CommonName: "issuer"}, IsCA: true, BasicConstraintsValid: true}, a.root, a.issuerKey, a.rootKey)
	return a
}

func (a *authority) make(t testing.TB, template, parent *x509.Certificate, subject, signer hsm.Key) *x509.Certificate {
	t.Helper()
	template.SerialNumber = big.NewInt(a.serial.Add(1))
	template.NotBefore, template.NotAfter = notBefore, notBefore.Add(10*time.Minute)
	if template.IsCA {
		template.KeyUsage = x509.KeyUsageCertSign
		template.SubjectKeyId = []byte(template.Subject.CommonName)
	}
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, subject.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// leaf makes a certificate with the extensions given.
func (a *authority) leaf(t testing.TB, extensions ...pkix.Extension) *x509.Certificate {
	t.Helper()
	return a.make(t, &x509.Certificate{
		EmailAddresses:  []string{"dev@test.example"},
		ExtKeyUsage:     []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
		ExtraExtensions: extensions,
	}, a.issuer, a.leafKey, a.issuerKey)
}

func (a *authority) chain(leaf *x509.Certificate) [][]byte {
	return [][]byte{leaf.Raw, a.issuer.Raw, a.root.Raw}
}

// tbs is what the SCT of a precertificate covers.
func tbs(t testing.TB, precert *x509.Certificate) []byte {
	t.Helper()
	der, err := ctx509.RemoveCTPoison(precert.RawTBSCertificate)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// fixture is a log on the real engine and publisher, behind a TLS server.
type fixture struct {
	*authority
	log    *ct.Log
	tree   tree.Tree
	heads  *head.Publisher
	engine *tree.Engine
	dir    string
	key    *hsmtest.Counting
	fail   func(error) // what the key answers from now on
	srv    *httptest.Server
}

func wallClock() (time.Time, error) { return time.Now(), nil }

// newFixture returns a log whose key is in memory.
func newFixture(t testing.TB, change ...func(*ct.Config)) *fixture {
	t.Helper()
	return newFixtureWith(t, hsmtest.SoftwareKey(hsm.ECDSAP256), change...)
}

func newFixtureWith(t testing.TB, key hsm.Key, change ...func(*ct.Config)) *fixture {
	t.Helper()
	dir := t.TempDir()
	failing := &hsmtest.Failing{Key: key}
	f := &fixture{authority: newAuthority(t), dir: dir, key: &hsmtest.Counting{Key: failing}, fail: failing.Fail}
	if err := head.CreateAnchor(filepath.Join(dir, "ct.anchor")); err != nil {
		t.Fatal(err)
	}
	engine, err := tree.Open(t.Context(), tree.Config{Dir: dir, Now: wallClock, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(engine.Create(t.Context(), "ct"), engine.Close(t.Context())); err != nil {
		t.Fatal(err)
	}
	f.start(t, change...)
	t.Cleanup(func() { f.stop(t) })
	return f
}

// start opens the log of the fixture's directory and serves it.
func (f *fixture) start(t testing.TB, change ...func(*ct.Config)) {
	t.Helper()
	ctx := context.Background()
	quiet := slog.New(slog.DiscardHandler)
	var err error
	if f.engine, err = tree.Open(ctx, tree.Config{Dir: f.dir, Now: wallClock, Logger: quiet}); err != nil {
		t.Fatal(err)
	}
	if f.tree, err = f.engine.Tree(ctx, "ct"); err != nil {
		t.Fatal(err)
	}
	format, err := ct.NewFormat(testOrigin, f.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	f.heads, err = head.Open(ctx, head.Config{Tree: f.tree, Key: f.key, Format: format, Anchor: filepath.Join(f.dir, "ct.anchor"), Now: wallClock, Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	cfg := ct.Config{Tree: f.tree, Heads: f.heads, Key: f.key, Roots: []*x509.Certificate{f.root}, Origin: testOrigin, Now: wallClock}
	for _, c := range change {
		c(&cfg)
	}
	if f.log, err = ct.New(cfg); err != nil {
		t.Fatal(err)
	}
	e := echo.New()
	f.log.Register(e.Group("/ct/2026"))
	f.srv = httptest.NewTLSServer(e)
}

// stop shuts down as the service does: requests, heads, trees.
func (f *fixture) stop(t testing.TB) {
	t.Helper()
	f.srv.Close()
	if err := errors.Join(f.heads.Close(context.Background()), f.engine.Close(context.Background())); err != nil {
		t.Error(err)
	}
}

func (f *fixture) url(path string) string { return f.srv.URL + "/ct/2026" + path }

// publish waits until the head covers the whole tree.
func (f *fixture) publish(t testing.TB) head.Signed {
	t.Helper()
	signed, err := f.heads.Await(t.Context(), f.tree.Root().Size)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

// fill logs n precertificates in process, many at once.
func (f *fixture) fill(t testing.TB, n int) {
	t.Helper()
	errs := make(chan error)
	for range n {
		precert := f.leaf(t, poison)
		defanged := tbs(t, precert)
		go func() {
			p, err := f.log.Promise(context.Background(), issuerKeyHash(f.issuer), defanged)
			if err == nil {
				_, err = p.Commit(context.Background(), precert.Raw, [][]byte{f.issuer.Raw, f.root.Raw})
			}
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
}

// get reads a path; header, if given, is the If-None-Match field.
func (f *fixture) get(t testing.TB, path string, header ...string) (*http.Response, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, f.url(path), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range header {
		req.Header.Set("If-None-Match", h)
	}
	return f.do(t, req)
}

func (f *fixture) post(t testing.TB, path string, body []byte) (*http.Response, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, f.url(path), bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	return f.do(t, req)
}

func (f *fixture) do(t testing.TB, req *http.Request) (*http.Response, []byte) {
	t.Helper()
	resp, err := f.srv.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, body
}

func chainBody(t testing.TB, chain ...[]byte) []byte {
	t.Helper()
	body, err := json.Marshal(map[string][][]byte{"chain": chain})
	if err != nil {
		t.Fatal(err)
	}
	return body
}
