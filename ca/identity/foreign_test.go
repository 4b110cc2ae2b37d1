package identity

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/oauth2-proxy/mockoidc"

	"github.com/chancery-ca/chancery/ca/profile"
)

// These tests have tokens and key sets by others' software: a whole provider,
// and the tools of José, which is written in C.

// foreign is a provider of oauth2-proxy.
type foreign struct {
	*mockoidc.MockOIDC
	mu   sync.Mutex // the provider has none of its own
	keys atomic.Int64
}

func startForeign(t *testing.T) *foreign {
	t.Helper()
	p, err := mockoidc.NewServer(nil)
	if err != nil {
		t.Fatal(err)
	}
	f := &foreign{MockOIDC: p}
	f.ClientID = "sigstore"
	f.rotate(t)
	err = p.AddMiddleware(func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == mockoidc.JWKSEndpoint {
				f.keys.Add(1)
			}
			f.mu.Lock()
			defer f.mu.Unlock()
			next.ServeHTTP(w, r)
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(nil)
	if err := p.Start(srv.Listener, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Shutdown(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// rotate gives the provider another key in place of its own.
func (f *foreign) rotate(t *testing.T) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := mockoidc.NewKeypair(key)
	if err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.Keypair = pair
}

// signIn is the authorization code flow of a client: a browser's redirect, then
// the token endpoint.
func (f *foreign) signIn(client *http.Client, user mockoidc.User) (string, error) {
	f.QueueUser(user)
	query := url.Values{
		"client_id": {"sigstore"}, "response_type": {"code"}, "scope": {"openid email"}, "state": {"s"},
		"redirect_uri": {"http://localhost/auth/callback"},
	}
	resp, err := client.Get(f.AuthorizationEndpoint() + "?" + query.Encode())
	if err != nil {
		return "", err
	}
	_ = resp.Body.Close()
	back, err := resp.Location()
	if err != nil {
		return "", err
	}
	form := url.Values{
		"client_id": {"sigstore"}, "client_secret": {f.ClientSecret}, "grant_type": {"authorization_code"}, "code": {back.Query().Get("code")},
	}
	if resp, err = client.PostForm(f.TokenEndpoint(), form); err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var answer struct {
		Token string `json:"id_token"`
	}
	return answer.Token, json.NewDecoder(resp.Body).Decode(&answer)
}

func (f *foreign) verifier(t *testing.T) *Verifier {
	t.Helper()
	v, err := New(t.Context(), Config{OIDCIssuers: map[string]Issuer{f.Issuer(): {ClientID: "sigstore", Type: "email"}}},
		Options{Now: func() (time.Time, error) { return time.Now(), nil }, LoopbackHTTP: true, wait: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.Close)
	v.issuers[f.Issuer()].keys.bucket.SetLimit(0) // not refilled on a slow day
	return v
}

// noRedirects is a client whose redirects are looked at.
func noRedirects(t *testing.T) *http.Client {
	t.Helper()
	client := &http.Client{
		Transport:     &http.Transport{},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	t.Cleanup(client.CloseIdleConnections)
	return client
}

// TestForeignProvider: discovery, key set and tokens of a provider that we did
// not write.
func TestForeignProvider(t *testing.T) {
	f := startForeign(t)
	v, client := f.verifier(t), noRedirects(t)
	jane := &mockoidc.MockUser{Subject: "42", Email: "jane@example.com", EmailVerified: true}
	raw, err := f.signIn(client, jane)
	if err != nil {
		t.Fatal(err)
	}
	p, err := v.Verify(t.Context(), raw)
	if err != nil {
		t.Fatal(err)
	}
	if want := (profile.SAN{Type: profile.Email, Value: "jane@example.com"}); p.SAN != want || p.Subject != "42" || p.Issuer != f.Issuer() {
		t.Errorf("principal %+v", p)
	}
	for name, test := range map[string]struct {
		user   *mockoidc.MockUser
		reason string
	}{
		"not verified": {&mockoidc.MockUser{Subject: "43", Email: "jane@example.com"}, "e-mail address is not verified"},
		"no address":   {&mockoidc.MockUser{Subject: "44", EmailVerified: true}, "claim email is missing"},
	} {
		raw, err := f.signIn(client, test.user)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(name, func(t *testing.T) { wantRefusal(t, v, raw, test.reason) })
	}
	f.FastForward(-time.Hour)
	if raw, err = f.signIn(client, jane); err != nil {
		t.Fatal(err)
	}
	wantRefusal(t, v, raw, "token has expired or never does")
}

// TestForeignRotation: at the moment at which a provider has another key, which
// replaces the one before, nobody's request fails, and the provider is asked
// once.
func TestForeignRotation(t *testing.T) {
	f := startForeign(t)
	v, client := f.verifier(t), noRedirects(t)
	jane := &mockoidc.MockUser{Subject: "42", Email: "jane@example.com", EmailVerified: true}
	before, err := f.signIn(client, jane)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(t.Context(), before); err != nil {
		t.Fatal(err)
	}
	for range askBurst {
		f.rotate(t)
		raw, err := f.signIn(client, jane)
		if err != nil {
			t.Fatal(err)
		}
		asked := f.keys.Load()
		var all sync.WaitGroup
		var failed atomic.Int64
		for range 64 {
			all.Go(func() {
				if _, err := v.Verify(t.Context(), raw); err != nil {
					failed.Add(1)
				}
			})
		}
		all.Wait()
		if n := failed.Load(); n != 0 {
			t.Errorf("%d requests failed", n)
		}
		if n := f.keys.Load() - asked; n != 1 {
			t.Errorf("%d fetches", n)
		}
	}
	wantRefusal(t, v, before, "key is not the issuer's")
}

// joseTool runs one of the tools of José in a folder.
func joseTool(t *testing.T, dir string, args ...string) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "jose", args...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("jose %s: %v: %s", args[0], err, stderr.String())
	}
	return out
}

// TestForeignTokens: keys, key sets and tokens by José, of each algorithm that
// it has and we allow, served as files.
func TestForeignTokens(t *testing.T) {
	if _, err := exec.LookPath("jose"); err != nil {
		const reason = "package jose is not installed"
		if os.Getenv("CHANCERY_REQUIRE_HSM") == "1" { // as hsmtest.Missing, which needs cgo
			t.Fatal(reason)
		}
		t.Skip(reason)
	}
	dir := t.TempDir()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var keys []string
	offered := []string{"RS256", "PS256", "PS384", "ES256", "ES384", "ES512"}
	for _, alg := range offered {
		joseTool(t, dir, "jwk", "gen", "-i", fmt.Sprintf(`{"alg":%q,"kid":"key of %s"}`, alg, alg), "-o", alg+".jwk")
		keys = append(keys, strings.TrimSpace(string(joseTool(t, dir, "jwk", "pub", "-i", alg+".jwk"))))
	}
	srv := httptest.NewServer(http.FileServer(http.Dir(dir)))
	t.Cleanup(srv.Close)
	if err := os.Mkdir(filepath.Join(dir, ".well-known"), 0o700); err != nil {
		t.Fatal(err)
	}
	algorithms, err := json.Marshal(offered)
	if err != nil {
		t.Fatal(err)
	}
	write(".well-known/openid-configuration", fmt.Sprintf(`{"issuer":%q,"jwks_uri":%q,"id_token_signing_alg_values_supported":%s}`, srv.URL, srv.URL+"/keys", algorithms))
	write("keys", `{"keys":[`+strings.Join(keys, ",")+`]}`)
	write("claims", validClaims(srv.URL))

	v := newVerifier(t, Issuer{IssuerURL: srv.URL, ClientID: "sigstore", Type: "email"})
	var verified []string
	for _, alg := range offered {
		raw := string(joseTool(t, dir, "jws", "sig", "-I", "claims", "-k", alg+".jwk", "-c",
			"-s", fmt.Sprintf(`{"protected":{"alg":%q,"kid":"key of %s"}}`, alg, alg)))
		if p, err := v.Verify(t.Context(), raw); err != nil || p.SAN.Value != "a@example.com" {
			t.Errorf("%s: %v, %v", alg, p, err)
		} else {
			verified = append(verified, alg)
		}
		other := offered[(len(verified)+1)%len(offered)]
		forged := string(joseTool(t, dir, "jws", "sig", "-I", "claims", "-k", alg+".jwk", "-c",
			"-s", fmt.Sprintf(`{"protected":{"alg":%q,"kid":"key of %s"}}`, alg, other)))
		if _, err := v.Verify(t.Context(), forged); !errors.Is(err, ErrToken) {
			t.Errorf("%s under the key of %s: %v", alg, other, err)
		}
	}
	if d := cmp.Diff(offered, verified); d != "" {
		t.Error(d)
	}
}
