package identity

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/chancery-ca/chancery/ca/identity/oidctest"
	"github.com/chancery-ca/chancery/ca/internal/idptest"
)

// fulcioFile has everything that a published Fulcio configuration has: names
// given once and used as keys, meta-issuers with and without a final slash.
const fulcioFile = `
define:
  - &github "github-workflow"
  - &other "other"
oidc-issuers:
  https://token.actions.example:
    issuer-url: https://token.actions.example
    client-id: sigstore
    type: ci-provider
    ci-provider: *github
    contact: ops@example.com
    description: "workflows"
meta-issuers:
  https://*.oic.aks.example/*/*:
    client-id: sigstore
    type: kubernetes
  https://*.oic.aks.example/*/*/:
    client-id: sigstore
    type: kubernetes
  https://token.actions.example/*:
    client-id: sigstore
    type: ci-provider
    ci-provider: *github
ci-issuer-metadata:
  *github :
    default-template-values:
      url: "https://github.example"
    extension-templates:
      build-trigger: "event_name"
      source-repository-ref: refs/{{if eq .ref_type "branch"}}heads/{{ else }}tags/{{end}}{{ .ref }}
      runner-environment: '{{if eq (index . "ci.example/rerun") "true"}}again{{ else }}first{{end}}'
    subject-alternative-name-template: "{{ .url }}/{{ .job_workflow_ref }}"
  *other :
    subject-alternative-name-template: "{{ .url }}"
`

func TestFulcioFile(t *testing.T) {
	cfg, err := ParseConfig([]byte(fulcioFile))
	if err != nil {
		t.Fatal(err)
	}
	all, err := cfg.resolve()
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	for _, p := range all.patterns {
		order = append(order, p.text)
	}
	want := []string{"https://token.actions.example/*", "https://*.oic.aks.example/*/*/", "https://*.oic.aks.example/*/*"}
	if d := cmp.Diff(want, order); d != "" {
		t.Error(d)
	}
	if n := len(all.issuers["https://token.actions.example"].kind.extensions); n != 3 {
		t.Errorf("%d extensions, want 3", n)
	}
}

// TestPatterns: what a wildcard stands for, and what it does not.
func TestPatterns(t *testing.T) {
	cfg, err := ParseConfig([]byte("meta-issuers:\n  https://oidc.*.clusters.example/id/*: {client-id: c, type: kubernetes}\n"))
	if err != nil {
		t.Fatal(err)
	}
	all, err := cfg.resolve()
	if err != nil {
		t.Fatal(err)
	}
	for iss, want := range map[string]bool{
		"https://oidc.eu-west-1.clusters.example/id/B02C":            true,
		"https://oidc.a_b.clusters.example/id/x":                     true,
		"https://oidc.a.b.clusters.example/id/x":                     false,
		"https://oidc..clusters.example/id/x":                        false,
		"https://oidc.a.clusters.example/id/":                        false,
		"https://oidc.a.clusters.example/id/x/y":                     false,
		"https://oidc.a.clusters.example/id/x?y":                     false,
		"https://oidc.a.clusters.example/id/x#y":                     false,
		"https://oidc.a.clusters.example/id/..":                      false,
		"https://oidc.a@evil.clusters.example/id/x":                  false,
		"https://oidc.a/x.clusters.example/id/x":                     false,
		"http://oidc.a.clusters.example/id/x":                        false,
		"https://evil.example?https://oidc.a.clusters.example/id/x":  false,
		"https://evil.example/https://oidc.a.clusters.example/id/x":  false,
		"https://oidc.a.clusters.example/id/x\nhttps://evil.example": false,
		"https://oidc.ä.clusters.example/id/x":                       false,
		"https://oidcxa.clusters.example/id/x":                       false,
	} {
		if got := all.patterns[0].match.MatchString(iss); got != want {
			t.Errorf("%q: %v, want %v", iss, got, want)
		}
	}
}

func TestMetaIssuerRefusals(t *testing.T) {
	for _, test := range []struct{ name, pattern, rest, reason string }{
		{"any host", "https://*", "type: email", "anybody's host"},
		{"any domain", "https://*.example", "type: email", "anybody's host"},
		{"any top domain", "https://idp.*", "type: email", "anybody's host"},
		{"part of a label", "https://a*.example", "type: email", "anybody's host"},
		{"any domain of a public suffix", "https://*.co.uk", "type: email", "anybody's host"},
		{"any port", "https://idp.example.com:*", "type: email", "anybody's host"},
		{"user", "https://*@idp.example.com", "type: email", "anybody's host"},
		{"any scheme", "*://idp.example.com", "type: email", "not an https URL"},
		{"no wildcard", "https://idp.example.com", "type: email", "no wildcard"},
		{"trust domain of many", "https://*.idp.example.com", "type: spiffe, spiffe-trust-domain: example.com", "spiffe"},
		{"names of many", "https://*.idp.example.com", "type: username", "subject-domain is missing"},
		{"unknown type", "https://*.idp.example.com", "type: saml", "not supported"},
		{"no templates", "https://*.idp.example.com", "type: ci-provider, ci-provider: x", "ci-issuer-metadata"},
		{"pinned keys", "https://*.idp.example.com", "type: email, jwks-file: keys.json", "one issuer"},
		{"templates that repeat", "https://*.idp.example.com", "type: ci-provider, ci-provider: x}\nci-issuer-metadata: {x: {subject-alternative-name-template: '{{range .}}x{{end}}'}", "no range"},
		{"query", "https://*.idp.example.com?x", "type: email", "URL"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := ParseConfig(fmt.Appendf(nil, "meta-issuers:\n  '%s': {client-id: c, %s}\n", test.pattern, test.rest))
			if !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), test.reason) {
				t.Errorf("err %v, want %q", err, test.reason)
			}
		})
	}
}

// tenants serves one provider below each path of one segment.
func tenants(t *testing.T) (base string, token func(tenant string) string, asked *atomic.Int64) {
	t.Helper()
	asked = new(atomic.Int64)
	provider := func(issuer string) *oidctest.Provider { return idptest.At(t, issuer, noon) }
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		tenant, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
		switch {
		case strings.HasPrefix(tenant, "missing"):
			http.NotFound(w, r)
			return
		case strings.HasPrefix(tenant, "broken"):
			panic(http.ErrAbortHandler) // hangs up
		}
		provider("http://"+r.Host+"/"+tenant).ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	return srv.URL, func(tenant string) string {
		raw, err := provider(srv.URL + "/" + tenant).Token(nil)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}, asked
}

func TestMetaIssuer(t *testing.T) {
	base, token, _ := tenants(t)
	v, err := New(t.Context(), Config{
		MetaIssuers: map[string]Issuer{base + "/*": {ClientID: "sigstore", Type: "email", ChallengeClaim: "sub"}},
		OIDCIssuers: map[string]Issuer{base + "/exact": {ClientID: "sigstore", Type: "username", SubjectDomain: "127.0.0.1"}},
	}, Options{Now: atNoon, LoopbackHTTP: true, wait: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	for range 2 {
		p, err := v.Verify(t.Context(), token("one"))
		if err != nil {
			t.Fatal(err)
		}
		if p.Issuer != base+"/one" || p.SAN.Value != "alice@example.com" {
			t.Errorf("principal %+v", p)
		}
		if d := cmp.Diff([]string{"alice@example.com"}, p.Challenges); d != "" {
			t.Errorf("the challenge-claim was inherited: %s", d)
		}
	}
	if p, err := v.Verify(t.Context(), token("exact")); err != nil || p.SAN.Value != "alice-id!127.0.0.1" {
		t.Errorf("the exact issuer: %v, %v", p, err)
	}
	if _, err := v.Verify(t.Context(), token("a.b")); !errors.Is(err, ErrToken) {
		t.Errorf("an issuer that fits nothing: %v", err)
	}
	for iss, m := range v.others.members {
		v.others.endProbation(iss, m)
	}
	if n := len(v.others.members); n != 1 {
		t.Errorf("%d issuers are remembered after their probation, want the one that was proven", n)
	}
}

// TestMadeUpIssuers: of issuers that fit a pattern and do not exist only so many
// are asked for their keys.
func TestMadeUpIssuers(t *testing.T) {
	base, token, asked := tenants(t)
	v, err := New(t.Context(), Config{
		MetaIssuers: map[string]Issuer{base + "/*": {ClientID: "sigstore", Type: "email"}},
	}, Options{Now: atNoon, LoopbackHTTP: true, wait: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	v.others.bucket.SetLimit(0) // not refilled on a slow day
	refused := 0
	for n := range 3 * federateBurst {
		if _, err := v.Verify(t.Context(), token(fmt.Sprintf("missing%d", n))); !errors.Is(err, ErrUnavailable) {
			t.Errorf("err %v", err)
		} else if strings.Contains(err.Error(), "too many issuers") {
			refused++
		}
	}
	if refused != 2*federateBurst || asked.Load() < federateBurst {
		t.Errorf("%d of %d refused without a fetch, %d requests", refused, 3*federateBurst, asked.Load())
	}
	for iss, m := range v.others.members {
		v.others.endProbation(iss, m)
	}
	if n := len(v.others.members); n != 0 {
		t.Errorf("%d issuers are remembered after their probation", n)
	}
}

// TestPatternFaults: what is wrong with a pattern is found at the start, not by
// the first token.
func TestPatternFaults(t *testing.T) {
	cfg := Config{MetaIssuers: map[string]Issuer{"http://*.idp.example.com": {ClientID: "sigstore", Type: "email"}}}
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	if _, err := New(t.Context(), cfg, Options{Now: atNoon}); !errors.Is(err, ErrConfig) {
		t.Errorf("err %v", err)
	}
}

// TestMetaIssuerCosts: a token that no key could save does not make a new
// issuer known, and nothing that only a token says gets into the log.
func TestMetaIssuerCosts(t *testing.T) {
	base, token, asked := tenants(t)
	var log idptest.Log
	v, err := New(t.Context(), Config{
		MetaIssuers: map[string]Issuer{base + "/*": {ClientID: "sigstore", Type: "email"}},
	}, Options{Now: atNoon, LoopbackHTTP: true, wait: time.Minute, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	for name, claims := range map[string]map[string]any{
		"expired": {"exp": noon.Unix()}, "another audience": {"aud": "other"}, "no subject": {"sub": nil},
	} {
		p := oidctest.New(oidctest.Config{Issuer: base + "/late", Key: idptest.Key(t), Now: func() time.Time { return noon }})
		raw, err := p.Token(claims)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := v.Verify(t.Context(), raw); !errors.Is(err, ErrToken) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := asked.Load(); n != 0 || len(v.others.members) != 0 {
		t.Errorf("%d requests, %d issuers", n, len(v.others.members))
	}
	for _, tenant := range []string{"missing-secret", "broken-secret"} { // the one answers, the other's error names it
		if _, err := v.Verify(t.Context(), token(tenant)); !errors.Is(err, ErrUnavailable) {
			t.Error(err)
		}
	}
	idptest.Until(t, "a line of the log for each", func() bool { return strings.Count(log.String(), "not refreshed") >= 2 })
	if text := log.String(); strings.Contains(text, "-secret") || !strings.Contains(text, base+"/*") {
		t.Errorf("log: %s", text)
	}
	if h := v.Health(); len(h) != 0 {
		t.Errorf("health of an unproven issuer: %v", h)
	}
	if _, err := v.Verify(t.Context(), token("good")); err != nil {
		t.Fatal(err)
	}
	if h := v.Health(); len(h) != 1 || h[0].Issuer != base+"/good" || h[0].Pattern != base+"/*" || h[0].Keys != 1 || h[0].Err != nil {
		t.Errorf("health %+v", h)
	}
}

// TestMetaIssuerAfterClose: a token that comes while the verifier is closed, or
// later, starts nothing.
func TestMetaIssuerAfterClose(t *testing.T) {
	base, token, _ := tenants(t)
	v, err := New(t.Context(), Config{MetaIssuers: map[string]Issuer{base + "/*": {ClientID: "sigstore", Type: "email"}}},
		Options{Now: atNoon, LoopbackHTTP: true, wait: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for n := range federateBurst - 1 {
		raw := token(fmt.Sprintf("tenant%d", n))
		all.Go(func() {
			if _, err := v.Verify(t.Context(), raw); err != nil && !errors.Is(err, ErrUnavailable) {
				t.Error(err)
			}
		})
	}
	v.Close()
	all.Wait()
	met := len(v.others.members)
	if _, err := v.Verify(t.Context(), token("late")); !errors.Is(err, ErrUnavailable) || !errors.Is(err, errClosed) {
		t.Error(err)
	}
	if n := len(v.others.members) - met; n != 0 {
		t.Errorf("%d issuers after the end", n)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestRoom: a full federation makes room by the issuer that is idle the longest,
// and by no other.
func TestRoom(t *testing.T) {
	var stopped []string
	f := newFederation(nil, nil)
	now := time.Now()
	add := func(name string, proven bool, used time.Time) {
		f.members[name] = &member{proven: proven, used: used, stop: func() { stopped = append(stopped, name) }}
	}
	for n := range maxFederated - 2 {
		add(fmt.Sprint(n), false, now.Add(-2*idleTime))
	}
	add("busy", true, now)
	if !f.room(now) || stopped != nil {
		t.Fatal("there is room")
	}
	add("busy too", true, now.Add(-time.Minute))
	if f.room(now) {
		t.Error("there is no room")
	}
	if _, err := f.open(pattern{}, "https://another.example"); !errors.Is(err, ErrUnavailable) {
		t.Errorf("a new issuer without room: %v", err)
	}
	f.members["busy too"].used = now.Add(-idleTime)
	if !f.room(now) {
		t.Error("an idle issuer makes room")
	}
	if d := cmp.Diff([]string{"busy too"}, stopped); d != "" {
		t.Error(d)
	}
}

// TestPinnedKeys: with files nothing is asked of the network, and a new key in
// the file is taken.
func TestPinnedKeys(t *testing.T) {
	i := startIDP(t)
	dir := t.TempDir()
	write := func(name string, body []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), body, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	get := func(path string) []byte {
		rec := httptest.NewRecorder()
		i.Provider.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, path, nil))
		return rec.Body.Bytes()
	}
	write("keys.json", []byte(`{"keys":[]}`))
	write("discovery.json", get("/.well-known/openid-configuration"))
	write("other.json", fmt.Appendf(nil, `{"issuer":"https://other.example","jwks_uri":%q}`, i.Issuer()+"/jwks")) // of keys that would do
	write("huge.json", make([]byte, maxAnswer+1))
	verifier := func(change func(*Issuer)) *Verifier {
		issuer := i.email()
		change(&issuer)
		v, err := New(t.Context(), Config{OIDCIssuers: map[string]Issuer{issuer.IssuerURL: issuer}}, Options{
			Now: atNoon, LoopbackHTTP: true, wait: time.Minute,
			ReadFile: func(name string) ([]byte, error) { return os.ReadFile(filepath.Join(dir, name)) },
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(v.Close)
		return v
	}
	pinned := verifier(func(i *Issuer) { i.KeysFile = "keys.json" })
	if _, err := pinned.Verify(t.Context(), i.token(t, nil)); !errors.Is(err, ErrUnavailable) {
		t.Errorf("without a key: %v", err)
	}
	write("keys.json", get("/jwks"))
	if _, err := pinned.Verify(t.Context(), i.token(t, nil)); err != nil {
		t.Errorf("with the key: %v", err)
	}
	if n := i.fetches.Load(); n != 0 {
		t.Errorf("%d fetches", n)
	}
	if _, err := verifier(func(i *Issuer) { i.DiscoveryFile = "discovery.json" }).Verify(t.Context(), i.token(t, nil)); err != nil {
		t.Errorf("discovery from a file: %v", err)
	}
	for name, change := range map[string]func(*Issuer){
		"discovery of another issuer": func(i *Issuer) { i.DiscoveryFile = "other.json" },
		"file that is missing":        func(i *Issuer) { i.KeysFile = "none.json" },
		"file that is huge":           func(i *Issuer) { i.KeysFile = "huge.json" },
		"keys that are none":          func(i *Issuer) { i.KeysFile = "other.json" },
		"discovery that is none":      func(i *Issuer) { i.DiscoveryFile = "huge.json" },
	} {
		if _, err := verifier(change).Verify(t.Context(), i.token(t, nil)); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
	}
	issuer := i.email()
	issuer.KeysFile = "keys.json"
	if _, err := New(t.Context(), Config{OIDCIssuers: map[string]Issuer{issuer.IssuerURL: issuer}}, Options{Now: atNoon, LoopbackHTTP: true, wait: time.Minute}); !errors.Is(err, ErrConfig) {
		t.Errorf("files without a reader: %v", err)
	}
}

// TestPublishedConfigurations: the configuration files in Fulcio's own module,
// among them that of the public instance, are read unchanged.
func TestPublishedConfigurations(t *testing.T) {
	for name, want := range map[string][3]int{ // issuers, meta-issuers, templates
		"config/identity/config.yaml": {16, 9, 5},
	} {
		cfg, err := ParseConfig(fulcioSource(t, name))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := [3]int{len(cfg.OIDCIssuers), len(cfg.MetaIssuers), len(cfg.CIIssuerMetadata)}; got != want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
		v, err := New(t.Context(), Config{MetaIssuers: cfg.MetaIssuers, CIIssuerMetadata: cfg.CIIssuerMetadata}, Options{Now: atNoon})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		v.Close()
	}
}

// fulcioSource reads a file of Fulcio's module, or skips the test without it.
func fulcioSource(t *testing.T, name string) []byte {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/sigstore/fulcio").Output()
	dir := strings.TrimSpace(string(out))
	if err != nil || dir == "" {
		t.Skipf("the source of Fulcio is not at hand: %v", err)
	}
	text, err := os.ReadFile(filepath.Join(dir, filepath.FromSlash(name)))
	if err != nil {
		t.Fatal(err)
	}
	return text
}
