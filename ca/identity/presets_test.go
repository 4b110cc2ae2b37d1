package identity

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/sigstore/fulcio/pkg/certificate"

	"github.com/chancery-ca/chancery/ca/profile"
)

// TestPresets: every preset has a row, and makes the identity that its
// provider's pages have.
func TestPresets(t *testing.T) {
	circle := map[string]any{
		"sub": "org/1/project/2/user/3", "oidc.circleci.com/project-id": "p-1", "oidc.circleci.com/pipeline-definition-id": "d-1",
		"oidc.circleci.com/pipeline-id": "pl-1",
	}
	person := map[string]any{"sub": "1", "email": "alice@example.com", "email_verified": true}
	seen := map[string]bool{}
	for _, test := range []struct {
		preset, issuer string
		claims         map[string]any
		san            profile.SAN
	}{
		{"github", "https://token.actions.githubusercontent.com", workflow, profile.SAN{Type: profile.URI, Value: "https://github.com/octo-org/octo-automation/.github/workflows/oidc.yml@refs/heads/main"}},
		{"github", "https://token.actions.githubusercontent.com/acme", workflow, profile.SAN{Type: profile.URI, Value: "https://github.com/octo-org/octo-automation/.github/workflows/oidc.yml@refs/heads/main"}},
		{"github-enterprise", "https://git.acme.example/_services/token", workflow, profile.SAN{Type: profile.URI, Value: "https://git.acme.example/octo-org/octo-automation/.github/workflows/oidc.yml@refs/heads/main"}},
		{"github-enterprise", "https://token.actions.acme.ghe.com", workflow, profile.SAN{Type: profile.URI, Value: "https://acme.ghe.com/octo-org/octo-automation/.github/workflows/oidc.yml@refs/heads/main"}},
		{"gitlab", "https://gitlab.com", pipeline, profile.SAN{Type: profile.URI, Value: "https://gitlab.com/my-group/my-project//.gitlab-ci.yml@refs/heads/main"}},
		{"gitlab-self-hosted", "https://git.acme.example/gitlab", with(pipeline, map[string]any{"ci_config_ref_uri": "git.acme.example/gitlab/g/p//.gitlab-ci.yml@refs/heads/main"}), profile.SAN{Type: profile.URI, Value: "https://git.acme.example/gitlab/g/p//.gitlab-ci.yml@refs/heads/main"}},
		{"buildkite", "https://agent.buildkite.com", job, profile.SAN{Type: profile.URI, Value: "https://buildkite.com/acme-inc/super-duper-app"}},
		{"circleci", "https://oidc.circleci.com/org/1", circle, profile.SAN{Type: profile.URI, Value: "https://circleci.com/api/v2/projects/p-1/pipeline-definitions/d-1"}},
		{"jenkins", "https://ci.acme.example/oidc", map[string]any{"sub": "https://ci.acme.example/job/build/"}, profile.SAN{Type: profile.URI, Value: "https://ci.acme.example/job/build/"}},
		{"jenkins", "https://ci.acme.example/jenkins/oidc/job/team", map[string]any{"sub": "https://ci.acme.example/jenkins/job/team/job/build/"}, profile.SAN{Type: profile.URI, Value: "https://ci.acme.example/jenkins/job/team/job/build/"}},
		{"kubernetes", "https://kubernetes.default.svc.cluster.local", serviceAccount, profile.SAN{Type: profile.URI, Value: "https://kubernetes.io/namespaces/default/serviceaccounts/builder"}},
		{"google", "https://accounts.google.com", person, profile.SAN{Type: profile.Email, Value: "alice@example.com"}},
		{"entra", "https://login.microsoftonline.com/6babcaad-604b-40ac-a9d7-9fd97c0b779f/v2.0", map[string]any{"sub": "1", "email": "alice@example.com"}, profile.SAN{Type: profile.Email, Value: "alice@example.com"}},
		{"okta", "https://acme.okta.com", person, profile.SAN{Type: profile.Email, Value: "alice@example.com"}},
		{"keycloak", "https://id.acme.example/realms/acme", person, profile.SAN{Type: profile.Email, Value: "alice@example.com"}},
		{"dex", "https://dex.acme.example", person, profile.SAN{Type: profile.Email, Value: "alice@example.com"}},
	} {
		seen[test.preset] = true
		k, err := Config{}.know(Issuer{IssuerURL: test.issuer, ClientID: "sigstore", Preset: test.preset})
		if err != nil {
			t.Errorf("%s: %v", test.preset, err)
			continue
		}
		// A claim of the name that the preset fixes changes nothing.
		p, err := k.kind.principal(k.Issuer, asClaims(t, with(test.claims, map[string]any{"iss": test.issuer, "site": "https://evil.example"})))
		if err != nil {
			t.Errorf("%s: %v", test.preset, err)
			continue
		}
		if p.SAN != test.san {
			t.Errorf("%s: %v, want %v", test.preset, p.SAN, test.san)
		}
		if p.Extensions.Issuer != test.issuer {
			t.Errorf("%s: issuer %s", test.preset, p.Extensions.Issuer)
		}
		if e := p.Extensions; e.SourceRepositoryURI != "" && strings.Contains(e.SourceRepositoryURI, "evil") {
			t.Errorf("%s: %s", test.preset, e.SourceRepositoryURI)
		}
	}
	for name, about := range Presets() {
		if !seen[name] || about == "" {
			t.Errorf("preset %s is not tried, or says nothing of itself", name)
		}
	}
}

// TestPresetsLikePublicFulcio: a token of a provider of the public instance makes
// the same name and extensions by the preset as by the templates that Fulcio
// publishes, but for one that is mended.
func TestPresetsLikePublicFulcio(t *testing.T) {
	cfg, err := ParseConfig(fulcioSource(t, "config/identity/config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	circle := map[string]any{
		"sub": "org/1/project/2/user/3/vcs-origin/github.com/o/r/vcs-ref/refs/heads/main", "oidc.circleci.com/project-id": "p-1",
		"oidc.circleci.com/pipeline-definition-id": "d-1", "oidc.circleci.com/pipeline-id": "l-1", "oidc.circleci.com/workflow-id": "w-1",
		"oidc.circleci.com/job-id": "j-1", "oidc.circleci.com/ssh-rerun": true, "oidc.circleci.com/vcs-origin": "github.com/o/r",
		"oidc.circleci.com/vcs-ref": "refs/heads/main",
	}
	for preset, test := range map[string]struct {
		issuer string
		claims map[string]any
		mend   func(*certificate.Extensions) // what Fulcio's template makes
	}{
		"github":    {"https://token.actions.githubusercontent.com", with(workflow, map[string]any{"environment": "production"}), nil},
		"gitlab":    {"https://gitlab.com", with(pipeline, map[string]any{"environment": "production"}), nil},
		"buildkite": {"https://agent.buildkite.com", job, nil},
		"circleci": {"https://oidc.circleci.com", circle, func(e *certificate.Extensions) {
			e.RunInvocationURI = strings.Replace(e.RunInvocationURI, "circleci.com//", "circleci.com/", 1)
		}},
	} {
		t.Run(preset, func(t *testing.T) {
			c := asClaims(t, with(test.claims, map[string]any{"iss": test.issuer}))
			principal := func(i Issuer) *Principal {
				i.IssuerURL = test.issuer
				k, err := cfg.know(i)
				if err != nil {
					t.Fatal(err)
				}
				p, err := k.kind.principal(k.Issuer, c)
				if err != nil {
					t.Fatal(err)
				}
				return p
			}
			want, got := principal(cfg.OIDCIssuers[test.issuer]), principal(Issuer{ClientID: "sigstore", Preset: preset})
			if test.mend != nil {
				test.mend(&want.Extensions)
			}
			if d := cmp.Diff([]any{want.SAN, want.Extensions}, []any{got.SAN, got.Extensions}); d != "" {
				t.Errorf("-Fulcio +preset:\n%s", d)
			}
		})
	}
}

func TestPresetRefusals(t *testing.T) {
	for _, test := range []struct {
		name   string
		issuer Issuer
		reason string
	}{
		{"unknown", Issuer{IssuerURL: "https://a.example", Preset: "travis"}, "is not one of buildkite, "},
		{"and a type", Issuer{IssuerURL: "https://gitlab.com", Preset: "gitlab", Type: "email"}, "exclude each other"},
		{"GitHub elsewhere", Issuer{IssuerURL: "https://github.example", Preset: "github"}, "not at token.actions"},
		{"GitLab elsewhere", Issuer{IssuerURL: "https://gitlab.example", Preset: "gitlab"}, "not at gitlab.com"},
		{"Enterprise without its path", Issuer{IssuerURL: "https://git.example", Preset: "github-enterprise"}, "not of a GitHub Enterprise"},
		{"personal accounts", Issuer{IssuerURL: "https://login.microsoftonline.com/9188040d-6c67-4c5b-b112-36a304b66dad/v2.0", Preset: "entra"}, "of personal accounts"},
		{"a tenant elsewhere", Issuer{IssuerURL: "https://evil.example/6babcaad-604b-40ac-a9d7-9fd97c0b779f/v2.0", Preset: "entra"}, "not of one tenant"},
		{"a tenant by its name", Issuer{IssuerURL: "https://login.microsoftonline.com/acme.onmicrosoft.com/v2.0", Preset: "entra"}, "not of one tenant"},
		{"tokens of v1.0", Issuer{IssuerURL: "https://sts.windows.net/6babcaad-604b-40ac-a9d7-9fd97c0b779f/", Preset: "entra"}, "not of one tenant"},
		{"every tenant", Issuer{IssuerURL: "https://login.microsoftonline.com/common/v2.0", Preset: "entra"}, "not of one tenant"},
	} {
		test.issuer.ClientID = "sigstore"
		cfg := Config{OIDCIssuers: map[string]Issuer{test.issuer.IssuerURL: test.issuer}}
		if err := cfg.Validate(); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), test.reason) {
			t.Errorf("%s: err %v, want %q", test.name, err, test.reason)
		}
	}
}

// TestNamesStayAtTheSite: what a job of a provider can say about itself does not
// make a name elsewhere.
func TestNamesStayAtTheSite(t *testing.T) {
	for _, test := range []struct {
		name, preset, issuer string
		claims               map[string]any
	}{
		// The pipeline's definition may be at an HTTP remote of the project's choice.
		{"pipeline defined elsewhere", "gitlab", "https://gitlab.com", with(pipeline, map[string]any{"ci_config_ref_uri": "evil.example/x.yml@refs/heads/main"})},
		{"pipeline defined at gitlab.com", "gitlab-self-hosted", "https://git.acme.example", pipeline},
		{"beside the GitLab of one path", "gitlab-self-hosted", "https://git.acme.example/gitlab", with(pipeline, map[string]any{"ci_config_ref_uri": "git.acme.example/gitlab2/p//x@refs/heads/main"})},
		{"user information", "gitlab", "https://gitlab.com", with(pipeline, map[string]any{"ci_config_ref_uri": "gitlab.com@evil.example/p//x@refs/heads/main"})},
		{"another port", "gitlab", "https://gitlab.com", with(pipeline, map[string]any{"ci_config_ref_uri": "gitlab.com:8443/p//x@refs/heads/main"})},
		{"kind of ref that is neither", "gitlab", "https://gitlab.com", with(pipeline, map[string]any{"ref_type": "merge_request"})},
		{"path that climbs", "github", "https://token.actions.githubusercontent.com", with(workflow, map[string]any{"job_workflow_ref": "../evil/x.yml@main"})},
		{"template in a claim", "github", "https://token.actions.githubusercontent.com", with(workflow, map[string]any{"job_workflow_ref": "{{.site}}/../x"})},
		{"site that is a claim", "buildkite", "https://agent.buildkite.com", with(job, map[string]any{"organization_slug": "../..", "site": "https://evil.example"})},
		{"missing definition", "circleci", "https://oidc.circleci.com/org/1", map[string]any{"sub": "s", "oidc.circleci.com/project-id": "p", "oidc.circleci.com/pipeline-id": "x"}},
	} {
		k, err := Config{}.know(Issuer{IssuerURL: test.issuer, ClientID: "sigstore", Preset: test.preset})
		if err != nil {
			t.Fatal(err)
		}
		if p, err := k.kind.principal(k.Issuer, asClaims(t, with(test.claims, map[string]any{"iss": test.issuer}))); !errors.Is(err, ErrMapping) {
			t.Errorf("%s: %v, %v", test.name, p, err)
		}
	}
	// A template in a claim stays what it is: text.
	k, err := Config{}.know(Issuer{IssuerURL: "https://token.actions.githubusercontent.com", ClientID: "sigstore", Preset: "github"})
	if err != nil {
		t.Fatal(err)
	}
	p, err := k.kind.principal(k.Issuer, asClaims(t, with(workflow, map[string]any{"iss": "https://token.actions.githubusercontent.com", "workflow": "{{.sub}}"})))
	if err != nil || p.Extensions.GithubWorkflowName != "{{.sub}}" {
		t.Errorf("%v, %v", p, err)
	}
}

// TestForEverybody: an issuer that anybody can get a token of is known by its
// address, with and without a preset.
func TestForEverybody(t *testing.T) {
	cfg := Config{OIDCIssuers: map[string]Issuer{}, MetaIssuers: map[string]Issuer{"https://oidc.circleci.com/org/*": {}, "https://oidc.*.acme.example/id": {}}}
	for _, url := range []string{
		"https://token.actions.githubusercontent.com", "https://token.actions.githubusercontent.com/acme", "https://gitlab.com",
		"https://gitlab.acme.example", "https://agent.buildkite.com", "https://oidc.circleci.com", "https://oidc.circleci.com/org/1",
		"https://accounts.google.com", "https://idp.acme.example",
	} {
		cfg.OIDCIssuers[url] = Issuer{}
	}
	want := []string{
		"https://accounts.google.com", "https://agent.buildkite.com", "https://gitlab.com", "https://oidc.circleci.com",
		"https://oidc.circleci.com/org/*", "https://token.actions.githubusercontent.com",
	}
	if d := cmp.Diff(want, cfg.ForEverybody()); d != "" {
		t.Error(d)
	}
}

// TestFolderOfJenkins: the issuer of a folder speaks for the jobs in it alone.
func TestFolderOfJenkins(t *testing.T) {
	k, err := Config{}.know(Issuer{IssuerURL: "https://ci.acme.example:8443/oidc/job/team", ClientID: "sigstore", Preset: "jenkins"})
	if err != nil {
		t.Fatal(err)
	}
	for sub, want := range map[string]bool{
		"https://ci.acme.example:8443/job/team/job/build/": true,
		"https://ci.acme.example:8443/job/team":            true,
		"https://ci.acme.example:8443/job/team2/job/x/":    false,
		"https://ci.acme.example:8443/job/release/":        false,
		"https://ci.acme.example:8443/job/team/../release": false,
		"https://ci.acme.example:8443/":                    false,
		"https://ci.acme.example/job/team/job/build/":      false,
		"https://ci.acme.example:9443/job/team/job/build/": false,
	} {
		_, err := k.kind.principal(k.Issuer, claims{"iss": k.IssuerURL, "sub": sub})
		if (err == nil) != want {
			t.Errorf("%s: %v", sub, err)
		}
	}
}

// TestCircleCI: the extensions that a certificate of CircleCI has.
func TestCircleCI(t *testing.T) {
	k, err := Config{}.know(Issuer{IssuerURL: "https://oidc.circleci.com/org/1", ClientID: "sigstore", Preset: "circleci"})
	if err != nil {
		t.Fatal(err)
	}
	least := map[string]any{"iss": "https://oidc.circleci.com/org/1", "sub": "s", "oidc.circleci.com/project-id": "p",
		"oidc.circleci.com/pipeline-definition-id": "d", "oidc.circleci.com/pipeline-id": "l"}
	most := with(least, map[string]any{"oidc.circleci.com/workflow-id": "w", "oidc.circleci.com/job-id": "j", "oidc.circleci.com/ssh-rerun": true,
		"oidc.circleci.com/vcs-origin": "github.com/o/r", "oidc.circleci.com/vcs-ref": "refs/heads/main"})
	definition := "https://circleci.com/api/v2/projects/p/pipeline-definitions/d"
	for _, test := range []struct {
		claims map[string]any
		want   certificate.Extensions
	}{
		{least, certificate.Extensions{BuildSignerURI: definition}},
		{most, certificate.Extensions{BuildSignerURI: definition, RunInvocationURI: "https://app.circleci.com/workflow/w/job/j",
			RunnerEnvironment: "ssh-rerun", SourceRepositoryURI: "github.com/o/r", SourceRepositoryRef: "refs/heads/main"}},
	} {
		test.want.Issuer, test.want.Subject = "https://oidc.circleci.com/org/1", "s"
		test.want.BuildConfigURI = "https://circleci.com/api/v2/pipeline/l/config"
		p, err := k.kind.principal(k.Issuer, asClaims(t, test.claims))
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(test.want, p.Extensions); d != "" {
			t.Error(d)
		}
	}
}

// TestNumbersInPresets: a number of many digits is written as it is.
func TestNumbersInPresets(t *testing.T) {
	k, err := Config{}.know(Issuer{IssuerURL: "https://agent.buildkite.com", ClientID: "sigstore", Preset: "buildkite"})
	if err != nil {
		t.Fatal(err)
	}
	p, err := k.kind.principal(k.Issuer, asClaims(t, with(job, map[string]any{"iss": "https://agent.buildkite.com", "build_number": 1234567})))
	if err != nil {
		t.Fatal(err)
	}
	if want := "https://buildkite.com/acme-inc/super-duper-app/builds/1234567#0184990a-477b-4fa8-9968-496074483cee"; p.Extensions.RunInvocationURI != want {
		t.Errorf("%s, want %s", p.Extensions.RunInvocationURI, want)
	}
}

// asClaims passes values through JSON, as a token does.
func asClaims(t *testing.T, values map[string]any) claims {
	t.Helper()
	b, err := json.Marshal(values)
	if err != nil {
		t.Fatal(err)
	}
	c, err := parseClaims(b)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
