package identity

import (
	"errors"
	"maps"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/sigstore/fulcio/pkg/certificate"

	"github.com/chancery-ca/chancery/ca/profile"
)

// workflow is a token of GitHub Actions as its documentation shows it.
var workflow = map[string]any{
	"sub":                   "repo:octo-org/octo-repo:ref:refs/heads/main",
	"job_workflow_ref":      "octo-org/octo-automation/.github/workflows/oidc.yml@refs/heads/main",
	"sha":                   "0123456789abcdef0123456789abcdef01234567",
	"event_name":            "workflow_dispatch",
	"repository":            "octo-org/octo-repo",
	"workflow":              "example workflow",
	"ref":                   "refs/heads/main",
	"job_workflow_sha":      "89abcdef0123456789abcdef0123456789abcdef",
	"runner_environment":    "github-hosted",
	"repository_id":         "74",
	"repository_owner":      "octo-org",
	"repository_owner_id":   "65",
	"repository_visibility": "private",
	"workflow_ref":          "octo-org/octo-repo/.github/workflows/build.yml@refs/heads/main",
	"workflow_sha":          "fedcba9876543210fedcba9876543210fedcba98",
	"run_id":                "1658821493",
	"run_attempt":           "2",
}

func TestGitHubWorkflow(t *testing.T) {
	i := startIDP(t)
	issuer := i.email()
	issuer.Type = "github-workflow"
	claims := maps.Clone(workflow)
	claims["email"], claims["email_verified"] = nil, nil
	got, err := newVerifier(t, issuer).Verify(t.Context(), i.token(t, claims))
	if err != nil {
		t.Fatal(err)
	}
	want := &Principal{
		Token: got.Token,
		SAN:   profile.SAN{Type: profile.URI, Value: "https://github.com/octo-org/octo-automation/.github/workflows/oidc.yml@refs/heads/main"},
		// Contract 1.6, row github-workflow.
		Extensions: certificate.Extensions{
			Issuer:                              i.Issuer(),
			GithubWorkflowTrigger:               "workflow_dispatch",
			GithubWorkflowSHA:                   "0123456789abcdef0123456789abcdef01234567",
			GithubWorkflowName:                  "example workflow",
			GithubWorkflowRepository:            "octo-org/octo-repo",
			GithubWorkflowRef:                   "refs/heads/main",
			BuildSignerURI:                      "https://github.com/octo-org/octo-automation/.github/workflows/oidc.yml@refs/heads/main",
			BuildSignerDigest:                   "89abcdef0123456789abcdef0123456789abcdef",
			RunnerEnvironment:                   "github-hosted",
			SourceRepositoryURI:                 "https://github.com/octo-org/octo-repo",
			SourceRepositoryDigest:              "0123456789abcdef0123456789abcdef01234567",
			SourceRepositoryRef:                 "refs/heads/main",
			SourceRepositoryIdentifier:          "74",
			SourceRepositoryOwnerURI:            "https://github.com/octo-org",
			SourceRepositoryOwnerIdentifier:     "65",
			BuildConfigURI:                      "https://github.com/octo-org/octo-repo/.github/workflows/build.yml@refs/heads/main",
			BuildConfigDigest:                   "fedcba9876543210fedcba9876543210fedcba98",
			BuildTrigger:                        "workflow_dispatch",
			RunInvocationURI:                    "https://github.com/octo-org/octo-repo/actions/runs/1658821493/attempts/2",
			SourceRepositoryVisibilityAtSigning: "private",
			Subject:                             "repo:octo-org/octo-repo:ref:refs/heads/main",
		},
		Challenges: []string{"repo:octo-org/octo-repo:ref:refs/heads/main"},
		Issuer:     i.Issuer(), Subject: "repo:octo-org/octo-repo:ref:refs/heads/main",
	}
	if d := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Principal{})); d != "" {
		t.Error(d)
	}
}

// TestVerifiedEmailIsAChallenge: clients sign the address whenever a token has
// one; an unverified one counts for nothing.
func TestVerifiedEmailIsAChallenge(t *testing.T) {
	k := kinds["github-workflow"]
	for _, test := range []struct {
		name     string
		verified any
		want     []string
	}{
		{"verified", true, []string{"subject", "a@example.com"}},
		{"not verified", false, []string{"subject"}},
		{"absent", nil, []string{"subject"}},
	} {
		c := claims{"sub": "subject", "email": "a@example.com", "email_verified": test.verified}
		if d := cmp.Diff(test.want, k.challenges(Issuer{}, c)); d != "" {
			t.Errorf("%s: %s", test.name, d)
		}
	}
}

func TestGitHubWorkflowRefusals(t *testing.T) {
	for _, name := range kinds["github-workflow"].required {
		for _, value := range []any{nil, "", 7} {
			c := maps.Clone(workflow)
			c["iss"] = "https://token.example"
			c[name] = value
			if _, err := kinds["github-workflow"].principal(Issuer{}, c); !errors.Is(err, ErrToken) {
				t.Errorf("%s = %v: err %v", name, value, err)
			}
		}
	}
	for _, test := range []struct{ name, claim, value string }{
		{"path that climbs", "job_workflow_ref", "octo-org/../evil/x.yml@main"},
		{"path that climbs, encoded", "job_workflow_ref", "octo-org/%2e%2e/evil/x.yml@main"},
		{"half an encoding", "job_workflow_ref", "octo-org/x%2"},
		{"line break", "ref", "refs/heads/main\nX: y"},
		{"NUL", "repository", "octo-org/octo\x00repo"},
		{"undecodable", "workflow", "a\uFFFDb"},
		{"bidirectional override", "workflow", "a\u202Eb"},
		{"over-long", "workflow", strings.Repeat("a", maxText+1)},
		{"over-long subject", "sub", strings.Repeat("a", maxText+1)},
	} {
		c := maps.Clone(workflow)
		c["iss"] = "https://token.example"
		c[test.claim] = test.value
		if _, err := kinds["github-workflow"].principal(Issuer{}, c); !errors.Is(err, ErrMapping) {
			t.Errorf("%s: err %v", test.name, err)
		}
	}
}

// TestURLsStayBelowTheirBase: whatever a claim says, the host is the base's.
func TestURLsStayBelowTheirBase(t *testing.T) {
	for _, path := range []string{
		"@evil.example/x", "//evil.example/x", "?x=y", "#x", "https://evil.example", "\\evil", "a b", "ü",
	} {
		got, err := joinURL("https://github.com/", path)
		if err != nil {
			continue
		}
		if !strings.HasPrefix(got, "https://github.com/") || strings.ContainsAny(got, "?# ") {
			t.Errorf("%q became %q", path, got)
		}
	}
}

// TestTable: every row names fields and claims that exist.
func TestTable(t *testing.T) {
	for name, k := range kinds {
		if k.challenge == "" || k.san == nil || k.sanType == "" {
			t.Errorf("row %s is incomplete", name)
		}
		seen := map[string]bool{}
		for _, x := range k.extensions {
			if fields[x.field] == nil || seen[x.field] {
				t.Errorf("row %s: field %s is unknown or filled twice", name, x.field)
			}
			seen[x.field] = true
		}
	}
}

func TestIsMailbox(t *testing.T) {
	for address, want := range map[string]bool{
		"alice@example.com": true, "a.b+c@sub.example.co": true, "x@xn--mnchen-3ya.example": true,
		"o'brien@example.com": true, "123@4.example": true,
		"": false, "@": false, "alice": false, "alice@": false, "@example.com": false,
		"alice@localhost": false, "alice@10.0.0.1": false, "alice@[10.0.0.1]": false,
		".alice@example.com": false, "alice.@example.com": false, "a..b@example.com": false,
		"alice@example..com": false, "alice@-example.com": false, "alice@example.com.": false,
		`"alice x"@example.com`: false, "alice x@example.com": false, "alice@exa mple.com": false,
		"alice@example.com\n": false, "alice@b@example.com": false, "älice@example.com": false,
		"alice@münchen.example": false, "alice<bob@example.com>": false,
		strings.Repeat("a", 65) + "@example.com":         false,
		"a@" + strings.Repeat("b", 64) + ".com":          false,
		"a@" + strings.Repeat("bcd.", 80) + "example.de": false,
	} {
		if got := isMailbox(address); got != want {
			t.Errorf("%q: %v, want %v", address, got, want)
		}
	}
}

// TestHomographs: a name that could pass for another is refused, and an
// honest one in another script is not.
func TestHomographs(t *testing.T) {
	for name, want := range map[string]bool{
		"alice": true, "alice.smith-2": true, "jörg": true, "ελένη": true, "алиса": true, "山田ハナコ": true, "O'Neill": true,
		"аlice":        false, // Cyrillic а
		"alicе":        false, // Cyrillic е
		"Αlice":        false, // Greek Α
		"ａｌｉｃｅ":        false, // full width
		"ﬁona":         false, // a ligature
		"jo\u0308rg":   false, // not composed
		"𝐚lice":        false, // mathematical
		"ⅼice":         false, // a numeral
		"alice\u00A0b": false, // a space of another kind
	} {
		if got := unmistakable(name); got != want {
			t.Errorf("%q: %v, want %v", name, got, want)
		}
	}
	issuer := Issuer{IssuerURL: "https://idp.example.com", SubjectDomain: "example.com"}
	c := claims{"iss": "https://idp.example.com", "sub": "аlice"}
	if _, err := kinds["username"].principal(issuer, c); !errors.Is(err, ErrMapping) {
		t.Errorf("err %v", err)
	}
}

// TestPathsThatCollapse: net/url leaves empty segments out, so that two claims
// would make one name.
func TestPathsThatCollapse(t *testing.T) {
	for path, want := range map[string]bool{"a/b": true, "/a/b": true, "a/b/": true, "a//b": false, "a/b//": false, "//a": false} {
		if _, err := joinURL("https://example.com", path); (err == nil) != want {
			t.Errorf("%q: %v", path, err)
		}
	}
}

// TestNumbersInTemplates: an integer that a float64 would round is refused, and
// has no default.
func TestNumbersInTemplates(t *testing.T) {
	k, err := CIMetadata{
		DefaultTemplateValues:          map[string]string{"id": "1"},
		SubjectAlternativeNameTemplate: "https://ci.example/{{.id}}",
	}.kind()
	if err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string]string{
		"7": "https://ci.example/7", "9007199254740992": "https://ci.example/9.007199254740992e+15", "1234567": "https://ci.example/1.234567e+06", "0.5": "https://ci.example/0.5",
		"-0": "https://ci.example/-0", "1000000000000000000000": "https://ci.example/1e+21",
		"9007199254740993": "", "-9007199254740993": "", "1234567890123456789": "", "123456789012345678901234567890": "",
	} {
		c, err := parseClaims([]byte(`{"iss":"https://a.example","sub":"s","id":` + id + `}`))
		if err != nil {
			t.Fatal(err)
		}
		p, err := k.principal(Issuer{}, c)
		switch {
		case want == "" && !errors.Is(err, ErrMapping):
			t.Errorf("%s: %v, %v", id, p, err)
		case want != "" && (err != nil || p.SAN.Value != want):
			t.Errorf("%s: %v, %v, want %s", id, p, err, want)
		}
	}
}
