package service

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"github.com/labstack/echo/v4"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/testing/ca"
	sigstoretuf "github.com/sigstore/sigstore-go/pkg/tuf"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/ceremony/trust/tuf"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// repository makes TUF repositories with keys in SoftHSM: three custodians with
// a token each, and the online key in another.
type repository struct {
	t          *testing.T
	custodians []hsm.Key
	online     hsm.Key
	trust      [2][]byte // trusted_root.json and signing_config.v0.2.json
	roots      [][]byte
	targets    int64
}

func newRepository(t *testing.T) *repository {
	r := &repository{t: t, online: hsmtest.NewKey(t, hsmtest.SoftHSM(t), "tuf-online", hsm.ECDSAP256)}
	for i := range 3 {
		r.custodians = append(r.custodians, hsmtest.NewKey(t, hsmtest.SoftHSM(t), fmt.Sprintf("custodian-%d", i+1), hsm.ECDSAP256))
	}
	v, err := ca.NewVirtualSigstore()
	r.check(err)
	fulcio := v.FulcioCertificateAuthorities()[0].(*root.FulcioCertificateAuthority)
	valid := trust.Validity{Start: time.Now().Add(-time.Hour)}
	tr := trust.Root{CertificateAuthorities: []trust.Authority{{
		CommonName: "root", URI: "https://sig.example", Chain: []*x509.Certificate{fulcio.Intermediates[0], fulcio.Root}, Validity: valid,
	}}}
	for _, l := range v.RekorLogs() {
		tr.Logs = append(tr.Logs, trust.Log{BaseURL: "https://sig.example/log/l1", PublicKey: l.PublicKey.(*ecdsa.PublicKey), Validity: valid})
	}
	r.trust[0], err = tr.Marshal()
	r.check(err)
	r.trust[1], err = trust.SigningConfig{CAs: []trust.Service{{URL: "https://sig.example", MajorAPIVersion: 1, Validity: valid, Operator: "acme"}}}.Marshal()
	r.check(err)
	r.addRoot()
	return r
}

func (r *repository) check(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *repository) layout() tuf.Layout {
	l := tuf.Layout{Threshold: 2, Online: r.online.Public().(*ecdsa.PublicKey), Expires: tuf.Expires{
		Root: tuf.Period{Years: 1}, Targets: tuf.Decade, Snapshot: tuf.Decade, Timestamp: tuf.Period{Days: 7},
	}}
	for _, k := range r.custodians {
		l.Custodians = append(l.Custodians, k.Public().(*ecdsa.PublicKey))
	}
	return l
}

// addRoot has two custodians sign the next root.
func (r *repository) addRoot() {
	r.t.Helper()
	var previous *tuf.Root
	if len(r.roots) > 0 {
		var err error
		previous, err = tuf.ParseRoot(r.roots[len(r.roots)-1])
		r.check(err)
	}
	draft, err := tuf.NewRoot(r.layout(), previous, time.Now())
	r.check(err)
	r.roots = append(r.roots, r.signed(draft))
}

func (r *repository) signed(draft *tuf.Draft) []byte {
	r.t.Helper()
	for _, k := range r.custodians[:2] {
		_, err := draft.Sign(r.t.Context(), k)
		r.check(err)
	}
	r.check(draft.Err())
	data, err := draft.Bytes()
	r.check(err)
	return data
}

// build has two custodians sign the next targets. The online part is the
// mirror's.
func (r *repository) build() *tuf.Repository {
	r.t.Helper()
	newest, err := tuf.ParseRoot(r.roots[len(r.roots)-1])
	r.check(err)
	targets, err := tuf.Targets(r.trust[0], r.trust[1], time.Now())
	r.check(err)
	r.targets++
	draft, err := tuf.NewTargets(newest, r.targets, targets, time.Now())
	r.check(err)
	repo, err := tuf.Assemble(r.roots, r.signed(draft), nil, nil, targets)
	r.check(err)
	return repo
}

// site is a service at one address whose repository is replaced, as by a
// restart with the outputs of another ceremony.
type site struct {
	t       *testing.T
	url     string
	handler atomic.Pointer[echo.Echo]
	stop    func()
}

func newSite(t *testing.T) *site {
	s := &site{t: t, stop: func() {}}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.handler.Load().ServeHTTP(w, r) }))
	t.Cleanup(server.Close)
	t.Cleanup(func() { s.stop() })
	s.url = server.URL
	return s
}

func (s *site) serve(repo *tuf.Repository, key hsm.Key, state string) {
	s.t.Helper()
	s.stop()
	mirror, err := tuf.OpenMirror(context.Background(), tuf.MirrorConfig{
		Repository: repo, State: state, Key: key, Now: func() (time.Time, error) { return time.Now(), nil }, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.stop = mirror.Close
	e := (&Service{log: slog.New(slog.DiscardHandler)}).newEcho()
	registerTUF(e.Group("/tuf"), mirror)
	s.handler.Store(e)
}

func (s *site) client(root []byte, cache string) (*sigstoretuf.Client, error) {
	return sigstoretuf.New(&sigstoretuf.Options{Root: root, RepositoryBaseURL: s.url + "/tuf", CachePath: cache})
}

// TestTUFClient: sigstore-go's client follows a Chancery from its first root
// through new targets and a new root with another online key.
func TestTUFClient(t *testing.T) {
	r, s := newRepository(t), newSite(t)
	state, cache := t.TempDir()+"/tuf", t.TempDir()
	want := func(client *sigstoretuf.Client) {
		t.Helper()
		for name, content := range map[string][]byte{tuf.TrustedRootTarget: r.trust[0], tuf.SigningConfigTarget: r.trust[1]} {
			got, err := client.GetTarget(name)
			if err != nil || !bytes.Equal(got, content) {
				t.Errorf("%s: %d octets of %d: %v", name, len(got), len(content), err)
			}
		}
		tr, err := root.GetTrustedRoot(client)
		if err != nil || len(tr.RekorLogs()) != 1 {
			t.Errorf("trusted root: %v", err)
		}
		if _, err := root.GetSigningConfig(client); err != nil {
			t.Errorf("signing configuration: %v", err)
		}
		if _, err := client.GetTarget("rekor.pub"); err != nil {
			t.Error(err)
		}
	}
	s.serve(r.build(), r.online, state)
	client, err := s.client(r.roots[0], cache)
	r.check(err)
	want(client)

	// New trust files: the same client, and one that comes today.
	r.trust[1], err = trust.RewriteServiceURL(r.trust[1], "https://new.example")
	r.check(err)
	s.serve(r.build(), r.online, state)
	r.check(client.Refresh())
	want(client)
	client, err = s.client(r.roots[0], t.TempDir())
	r.check(err)
	want(client)

	// A new root, with another online key and one custodian replaced; the
	// client knows root 1 and a timestamp of the old key.
	r.online = hsmtest.NewKey(t, hsmtest.SoftHSM(t), "tuf-online-2", hsm.ECDSAP256)
	r.custodians[2] = hsmtest.NewKey(t, hsmtest.SoftHSM(t), "custodian-4", hsm.ECDSAP256)
	r.addRoot()
	s.serve(r.build(), r.online, state)
	for name, folder := range map[string]string{"of before": cache, "of today": t.TempDir()} {
		client, err := s.client(r.roots[0], folder)
		if err != nil {
			t.Fatalf("client %s: %v", name, err)
		}
		want(client)
	}

	// Others' roots lead nowhere.
	if _, err := s.client(newRepository(t).roots[0], t.TempDir()); err == nil {
		t.Error("a client with another root takes the repository")
	}
}

func TestTUFHTTP(t *testing.T) {
	r, s := newRepository(t), newSite(t)
	repo := r.build()
	s.serve(repo, r.online, t.TempDir())
	const immutable, revalidate = "public, max-age=31536000, immutable", "no-cache"
	target := fmt.Sprintf("/tuf/targets/%x.trusted_root.json", sha256.Sum256(r.trust[0]))
	for _, tc := range []struct {
		method, path string
		status       int
		cache, kind  string
	}{
		{"GET", "/tuf/1.root.json", http.StatusOK, immutable, "application/json"},
		{"HEAD", "/tuf/1.root.json", http.StatusOK, immutable, "application/json"},
		{"GET", "/tuf/1.targets.json", http.StatusOK, immutable, "application/json"},
		{"GET", "/tuf/timestamp.json", http.StatusOK, revalidate, "application/json"},
		{"GET", target, http.StatusOK, immutable, "application/json"},
		{"GET", "/tuf/2.root.json", http.StatusNotFound, revalidate, ""},
		{"GET", "/tuf/", http.StatusNotFound, revalidate, ""},
		{"GET", "/tuf/targets/", http.StatusNotFound, revalidate, ""},
		{"GET", "/tuf/targets/trusted_root.json", http.StatusNotFound, revalidate, ""},
		{"GET", "/tuf/../keys.yaml", http.StatusNotFound, "", ""},
		{"GET", "/tuf/..%2fkeys.yaml", http.StatusNotFound, revalidate, ""},
		{"GET", "/tuf/%2e%2e/keys.yaml", http.StatusNotFound, revalidate, ""},
		{"POST", "/tuf/1.root.json", http.StatusNotImplemented, "", ""},
	} {
		t.Run(tc.method+" "+tc.path, func(t *testing.T) {
			req := httptest.NewRequest(tc.method, tc.path, nil)
			w := httptest.NewRecorder()
			s.handler.Load().ServeHTTP(w, req)
			header := w.Result().Header
			if w.Code != tc.status || tc.cache != "" && header.Get("Cache-Control") != tc.cache || tc.kind != "" && header.Get("Content-Type") != tc.kind {
				t.Fatalf("status %d, header %v", w.Code, header)
			}
			if tc.status != http.StatusOK {
				return
			}
			body, _ := io.ReadAll(w.Body)
			if tc.method == "HEAD" && len(body) != 0 || tc.method == "GET" && len(body) == 0 {
				t.Errorf("%d octets", len(body))
			}
			req.Header.Set("If-None-Match", header.Get("ETag"))
			again := httptest.NewRecorder()
			s.handler.Load().ServeHTTP(again, req)
			if again.Code != http.StatusNotModified || again.Body.Len() != 0 {
				t.Errorf("with its ETag: status %d", again.Code)
			}
		})
	}
}
