package identity

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseConfig(t *testing.T) {
	want := Config{OIDCIssuers: map[string]Issuer{
		"https://idp.example": {
			IssuerURL: "https://idp.example", ClientID: "sigstore", Type: "email",
			IssuerClaim: "$.federated_claims.connector_id", Contact: "ops@example.com",
		},
		"https://token.actions.githubusercontent.com": {
			IssuerURL: "https://token.actions.githubusercontent.com", ClientID: "sigstore", Type: "github-workflow",
		},
	}}
	for name, text := range map[string]string{
		"YAML": `
oidc-issuers:
  https://idp.example:
    issuer-url: https://idp.example
    client-id: sigstore
    type: email
    issuer-claim: $.federated_claims.connector_id
    contact: ops@example.com
  https://token.actions.githubusercontent.com:
    issuer-url: https://token.actions.githubusercontent.com
    client-id: sigstore
    type: github-workflow
`,
		"JSON": `{"OIDCIssuers": {
  "https://idp.example": {"IssuerURL": "https://idp.example", "ClientID": "sigstore", "Type": "email",
    "IssuerClaim": "$.federated_claims.connector_id", "Contact": "ops@example.com"},
  "https://token.actions.githubusercontent.com": {"IssuerURL": "https://token.actions.githubusercontent.com",
    "ClientID": "sigstore", "Type": "github-workflow"}}}`,
	} {
		got, err := ParseConfig([]byte(text))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}

// TestDomainsOfOneOwner: an issuer may speak for names that end in its last two
// labels (Fulcio 1.8, pkg/config).
func TestDomainsOfOneOwner(t *testing.T) {
	for _, domain := range []string{"example.com", "accounts.example.com", "users.staff.example.com"} {
		for kind, scheme := range map[string]string{"username": "", "uri": "https://"} {
			cfg := Config{OIDCIssuers: map[string]Issuer{"https://accounts.example.com": {ClientID: "c", Type: kind, SubjectDomain: scheme + domain}}}
			if err := cfg.Validate(); err != nil {
				t.Errorf("%s of %s: %v", kind, domain, err)
			}
		}
	}
}

func TestParseConfigRefusals(t *testing.T) {
	issuer := func(lines ...string) string {
		return "oidc-issuers:\n  https://a.example:\n    " + strings.Join(lines, "\n    ") + "\n"
	}
	const url, client, typ = "issuer-url: https://a.example", "client-id: sigstore", "type: email"
	for _, test := range []struct{ name, text, reason string }{
		{"empty", "", "no issuer"},
		{"no issuer", "oidc-issuers: {}", "no issuer"},
		{"unknown key", issuer(url, client, typ, "colour: red"), "parse"},
		{"unknown key at the top", issuer(url, client, typ) + "extra: 1\n", "parse"},
		{"issuer twice", issuer(url, client, typ) + issuer(url, client, typ), "parse"},
		{"issuer twice, JSON", `{"OIDCIssuers":{"https://a.example":{"ClientID":"a","Type":"email"},"https://a.example":{"ClientID":"b","Type":"email"}}}`, "appears twice"},
		{"more after the JSON", `{"OIDCIssuers":{"https://a.example":{"ClientID":"a","Type":"email"}}}}`, "parse"},
		{"two JSON documents", `{"OIDCIssuers":{"https://a.example":{"ClientID":"a","Type":"email"}}}{}`, "parse"},
		{"names at an address", "oidc-issuers: {'https://10.9.0.1': {client-id: c, type: username, subject-domain: 127.0.0.1}}", "not the issuer's address"},
		{"not a map", "[]", "parse"},
		{"key and URL differ", issuer("issuer-url: https://b.example", client, typ), "has issuer-url"},
		{"no client", issuer(url, typ), "no client-id"},
		{"no type", issuer(url, client), "is not supported"},
		{"unknown type", issuer(url, client, "type: saml"), "is not supported"},
		{"issuer-claim elsewhere", issuer(url, client, "type: github-workflow", "issuer-claim: $.a"), "belongs to type email"},
		{"issuer-claim with a filter", issuer(url, client, typ, "issuer-claim: $..a[?(@.b)]"), "is not of the form"},
		{"challenge by another claim", issuer(url, client, typ, "challenge-claim: name"), "neither email nor sub"},
		{"names without a domain", issuer(url, client, "type: username"), "subject-domain is missing"},
		{"names at a URL", issuer(url, client, "type: username", "subject-domain: https://a.example"), "not a host name"},
		{"names of another owner", issuer(url, client, "type: username", "subject-domain: b.example"), "not of the issuer's domain"},
		{"names of a top domain", issuer(url, client, "type: username", "subject-domain: example"), "not of the issuer's domain"},
		{"URIs without a domain", issuer(url, client, "type: uri"), "not a URL of scheme and host"},
		{"URIs without a scheme", issuer(url, client, "type: uri", "subject-domain: a.example"), "not a URL of scheme and host"},
		{"URIs of another scheme", issuer(url, client, "type: uri", "subject-domain: http://a.example"), "another scheme"},
		{"URIs of another owner", issuer(url, client, "type: uri", "subject-domain: https://a.example.net"), "not of the issuer's domain"},
		{"no trust domain", issuer(url, client, "type: spiffe"), "spiffe-trust-domain is missing"},
		{"a trust domain that is none", issuer(url, client, "type: spiffe", "spiffe-trust-domain: A/b"), "spiffe-trust-domain is not one"},
		{"templates that are missing", issuer(url, client, "type: ci-provider", "ci-provider: none"), "not in ci-issuer-metadata"},
		{"no template of a name", issuer(url, client, "type: ci-provider", "ci-provider: ci") + "ci-issuer-metadata: {ci: {}}\n", "subject-alternative-name-template is missing"},
		{"a template that cannot be read", issuer(url, client, typ) + "ci-issuer-metadata: {ci: {subject-alternative-name-template: 'https://{{.a'}}\n", "subject-alternative-name-template"},
		{"an extension that cannot be read", issuer(url, client, typ) +
			"ci-issuer-metadata: {ci: {subject-alternative-name-template: 'https://a.example/{{.a}}', extension-templates: {build-trigger: '{{nobody}}'}}}\n", "build-trigger"},
		{"bad CA", issuer(url, client, typ, "ca-cert: hello"), "ca-cert"},
		{"query in the URL", "oidc-issuers: {'https://a.example?x': {issuer-url: 'https://a.example?x', client-id: c, type: email}}", "not a URL"},
		{"user in the URL", "oidc-issuers: {'https://u@a.example': {issuer-url: 'https://u@a.example', client-id: c, type: email}}", "not a URL"},
		{"not a URL", "oidc-issuers: {'a': {issuer-url: 'a', client-id: c, type: email}}", "not a URL"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := ParseConfig([]byte(test.text))
			if !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), test.reason) {
				t.Errorf("err %v, want %q", err, test.reason)
			}
		})
	}
}
