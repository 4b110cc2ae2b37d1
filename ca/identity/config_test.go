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
