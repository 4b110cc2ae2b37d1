package identity

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/sigstore/fulcio/pkg/certificate"

	"github.com/chancery-ca/chancery/ca/identity/oidctest"
	"github.com/chancery-ca/chancery/ca/profile"
)

// FuzzToken: whatever the octets, parsing ends, and what it accepts is within
// the bounds that the rest of the package relies on.
func FuzzToken(f *testing.F) {
	raw, err := oidctest.New(oidctest.Config{Issuer: "https://idp.example"}).Token(nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add(strings.Replace(raw, ".", "..", 1))
	f.Add("eyJhbGciOiJub25lIn0.e30.AA")
	f.Fuzz(func(t *testing.T, raw string) {
		parsed, err := parseToken(raw)
		if err != nil {
			return
		}
		if len(raw) > maxToken || strings.Count(raw, ".") != 2 || parsed.claims == nil {
			t.Errorf("accepted %q", raw)
		}
		_ = parsed.check("sigstore", noon) // must not panic
	})
}

// FuzzClaims: what the strict decoder accepts, encoding/json reads the same.
func FuzzClaims(f *testing.F) {
	for _, s := range []string{`{}`, `{"a":[1,{"b":null}]}`, `{"a":1,"a":2}`, `{"a":1e400}`, `{"\ud800":1}`, `[]`, ` {"a":"b"} x`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := parseClaims(b)
		if err != nil {
			return
		}
		if !utf8.Valid(b) {
			t.Errorf("accepted invalid UTF-8 %q", b)
		}
		dec := json.NewDecoder(strings.NewReader(string(b)))
		dec.UseNumber()
		var want map[string]any
		if err := dec.Decode(&want); err != nil || !reflect.DeepEqual(want, map[string]any(got)) {
			t.Errorf("%q: got %v, encoding/json reads %v, %v", b, got, want, err)
		}
	})
}

// FuzzCSR: no request is accepted whose key is not on the allow list.
func FuzzCSR(f *testing.F) {
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(makeCSR(f, p256, 0))
	f.Add(makeCSR(f, ed, 0))
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\nMAA=\n-----END CERTIFICATE REQUEST-----\n"))
	f.Fuzz(func(t *testing.T, csr []byte) {
		pub, err := ProveCSR(csr)
		if err != nil {
			return
		}
		if _, ok := allowedHash(pub); !ok || checkStrength(pub) != nil {
			t.Errorf("accepted a %T", pub)
		}
	})
}

// FuzzProof: no key is proved that is weak, whatever the encoding.
func FuzzProof(f *testing.F) {
	f.Add("-----BEGIN PUBLIC KEY-----\nMAA=\n-----END PUBLIC KEY-----\n", []byte{0x30, 0})
	f.Add("\x30\x59\x30\x13", []byte{1})
	f.Fuzz(func(t *testing.T, content string, proof []byte) {
		pub, err := ProveKey(content, proof, []string{challenge})
		if err == nil && checkStrength(pub) != nil {
			t.Errorf("accepted a %T", pub)
		}
	})
}

// FuzzConfig: a configuration that is accepted is valid.
func FuzzConfig(f *testing.F) {
	f.Add([]byte("oidc-issuers: {'https://a.example': {issuer-url: 'https://a.example', client-id: c, type: email}}"))
	f.Add([]byte(`{"OIDCIssuers":{}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		cfg, err := ParseConfig(b)
		if err == nil && cfg.Validate() != nil {
			t.Errorf("accepted %q", b)
		}
	})
}

// FuzzKeySet: what is kept of a key set can verify tokens and nothing else.
func FuzzKeySet(f *testing.F) {
	f.Add([]byte(`{"keys":[]}`))
	f.Add([]byte(`{"keys":[{"kty":"oct","k":"AAAA"},{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		keys, err := parseKeys(b)
		if err != nil {
			return
		}
		for _, key := range keys {
			if !signs(key) || !key.IsPublic() || len(keys) > maxKeys {
				t.Errorf("kept %v of %q", key, b)
			}
		}
	})
}

// FuzzTemplate: whatever the template and the claims, it ends, and what comes
// out can be certified.
func FuzzTemplate(f *testing.F) {
	f.Add("{{.url}}/{{.a}}", "https://ci.example", "x")
	f.Add(`{{if eq .a "b"}}{{.url}}{{else}}{{need . "c"}}{{end}}`, "https://ci.example/x", "b")
	f.Add("a", "", "../..")
	f.Add("{{range .}}{{.}}{{end}}", "", "")
	f.Add(`{{define "x"}}{{template "x"}}{{end}}{{template "x"}}`, "", "")
	f.Add(`{{printf "%1000000s" .a}}`, "", "")
	f.Fuzz(func(t *testing.T, text, url, value string) {
		k, err := CIMetadata{
			DefaultTemplateValues:          map[string]string{"url": url},
			SubjectAlternativeNameTemplate: text,
			ExtensionTemplates:             certificate.Extensions{BuildTrigger: text},
		}.kind()
		if err != nil {
			if !errors.Is(err, ErrConfig) {
				t.Errorf("error %v", err)
			}
			return
		}
		p, err := k.principal(Issuer{}, claims{"iss": "https://idp.example", "sub": "s", "a": value})
		switch {
		case err != nil && !errors.Is(err, ErrMapping) && !errors.Is(err, ErrToken):
			t.Errorf("error %v", err)
		case err == nil:
			if u, err := parseURL(p.SAN.Value); err != nil || u.Host == "" || !plain(p.SAN.Value) || !plain(p.Extensions.BuildTrigger) {
				t.Errorf("%q of %q and %q", p.SAN.Value, url, value)
			}
		}
	})
}

// FuzzPrincipal gives any claims to every type and preset: what comes out is
// plain text, and an address in the web leads where it says.
func FuzzPrincipal(f *testing.F) {
	for _, c := range []map[string]any{workflow, pipeline, job, build, serviceAccount, {"sub": "spiffe://example.com/x", "email": "a@example.com", "email_verified": true}} {
		b, err := json.Marshal(c)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	issuers := []Issuer{
		{IssuerURL: "https://users.example.com", Type: "username", SubjectDomain: "example.com"},
		{IssuerURL: "https://users.example.com", Type: "uri", SubjectDomain: "https://example.com"},
		{IssuerURL: "https://users.example.com", Type: "spiffe", SPIFFETrustDomain: "example.com"},
		{IssuerURL: "https://gitlab.com", Preset: "gitlab"},
		{IssuerURL: "https://token.actions.githubusercontent.com", Preset: "github"},
		{IssuerURL: "https://oidc.circleci.com/org/1", Preset: "circleci"},
		{IssuerURL: "https://agent.buildkite.com", Preset: "buildkite"},
	}
	for _, name := range []string{"email", "kubernetes", "github-workflow", "gitlab-pipeline", "buildkite-job", "codefresh-workflow", "chainguard-identity"} {
		issuers = append(issuers, Issuer{IssuerURL: "https://idp.example.com", Type: name})
	}
	var all []known
	for _, i := range issuers {
		i.ClientID = "sigstore"
		k, err := Config{}.know(i)
		if err != nil {
			f.Fatal(err)
		}
		all = append(all, k)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := parseClaims(b)
		if err != nil {
			return
		}
		for _, k := range all {
			c["iss"] = k.IssuerURL
			p, err := k.kind.principal(k.Issuer, c)
			if err != nil {
				if !errors.Is(err, ErrToken) && !errors.Is(err, ErrMapping) {
					t.Errorf("%s: error %v", k.Type, err)
				}
				continue
			}
			if p.SAN.Value == "" || !plain(p.SAN.Value) {
				t.Errorf("%s: SAN %q", k.Type, p.SAN.Value)
			}
			if p.SAN.Type == profile.URI && strings.Contains(p.SAN.Value+"/", "/../") {
				t.Errorf("%s: SAN %q climbs", k.Type, p.SAN.Value)
			}
			for name, field := range fields {
				if text := *field(&p.Extensions); !plain(text) {
					t.Errorf("%s: %s is %q", k.Type, name, text)
				}
			}
		}
	})
}
