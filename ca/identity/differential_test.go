package identity

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"maps"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/google/go-cmp/cmp"
	fulcio "github.com/sigstore/fulcio/pkg/config"
	upstream "github.com/sigstore/fulcio/pkg/identity"
	"github.com/sigstore/fulcio/pkg/identity/buildkite"
	"github.com/sigstore/fulcio/pkg/identity/chainguard"
	"github.com/sigstore/fulcio/pkg/identity/ciprovider"
	fulciocodefresh "github.com/sigstore/fulcio/pkg/identity/codefresh"
	"github.com/sigstore/fulcio/pkg/identity/email"
	fulciogithub "github.com/sigstore/fulcio/pkg/identity/github"
	"github.com/sigstore/fulcio/pkg/identity/gitlabcom"
	"github.com/sigstore/fulcio/pkg/identity/kubernetes"
	"github.com/sigstore/fulcio/pkg/identity/spiffe"
	"github.com/sigstore/fulcio/pkg/identity/uri"
	fulciousername "github.com/sigstore/fulcio/pkg/identity/username"

	"github.com/chancery-ca/chancery/ca/profile"
)

// pipeline is a token of GitLab CI, and job, build and runs one of Buildkite,
// Codefresh and CircleCI, as their documentation shows them.
var (
	pipeline = map[string]any{
		"sub": "project_path:my-group/my-project:ref_type:branch:ref:feature-branch-1", "project_path": "my-group/my-project",
		"project_id": "22", "pipeline_source": "web", "pipeline_id": "574",
		"ci_config_ref_uri": "gitlab.com/my-group/my-project//.gitlab-ci.yml@refs/heads/main",
		"ci_config_sha":     "714a629c0b401fdce83e847fc9589983fc6f46bc", "namespace_path": "my-group", "namespace_id": "72",
		"job_id": "302", "ref": "feature-branch-1", "ref_type": "branch", "sha": "714a629c0b401fdce83e847fc9589983fc6f46bc",
		"runner_id": 1, "runner_environment": "self-hosted", "project_visibility": "public",
	}
	job = map[string]any{
		"sub":               "organization:acme-inc:pipeline:super-duper-app:ref:refs/heads/main:commit:9f3182061f1e2cca4702c368cbc039b7dc9d4485:step:build",
		"organization_slug": "acme-inc", "pipeline_slug": "super-duper-app", "build_number": 1,
		"build_commit": "9f3182061f1e2cca4702c368cbc039b7dc9d4485", "build_source": "ui", "job_id": "0184990a-477b-4fa8-9968-496074483cee",
		"runner_environment": "buildkite-hosted",
	}
	build = map[string]any{
		"sub":        "account:628a80b693a15c0f9c13ab75:pipeline:65e5a53e52853dc51a5b0cc1",
		"account_id": "628a80b693a15c0f9c13ab75", "account_name": "codefresh-account", "pipeline_id": "65e5a53e52853dc51a5b0cc1",
		"pipeline_name": "oidc-test/get-token", "workflow_id": "64f447c02199f903000a20", "scm_repo_url": "https://github.com/codefresh-user/oidc-test",
		"scm_ref": "main", "runner_environment": "cloud",
	}
	serviceAccount = map[string]any{
		"sub": "system:serviceaccount:default:builder",
		"kubernetes.io": map[string]any{
			"namespace":      "default",
			"pod":            map[string]any{"name": "oidc-test", "uid": "49ad3572-b3dd-43a6-8d77-5858d3660275"},
			"serviceaccount": map[string]any{"name": "builder", "uid": "f5720c1d-e152-4356-a897-11b07aff165d"},
		},
	}
)

// with returns claims with others on top; nil takes one away.
func with(claims map[string]any, others map[string]any) map[string]any {
	out := maps.Clone(claims)
	maps.Copy(out, others)
	return out
}

// TestLikeFulcio gives the same token to Fulcio's own packages and to ours:
// the name in the certificate and every extension are the same octets.
func TestLikeFulcio(t *testing.T) {
	templates := CIMetadata{
		DefaultTemplateValues:          map[string]string{"url": "https://ci.example", "colour": "red", "project_path": "default"},
		SubjectAlternativeNameTemplate: "{{.url}}/{{.project_path}}//x@{{.ref}}",
	}
	templates.ExtensionTemplates.Issuer = "ignored"
	templates.ExtensionTemplates.Subject = "ignored"
	templates.ExtensionTemplates.BuildSignerURI = "https://{{ .ci_config_ref_uri }}"
	templates.ExtensionTemplates.SourceRepositoryRef = `refs/{{if eq .ref_type "branch"}}heads/{{ else }}tags/{{end}}{{ .ref }}`
	templates.ExtensionTemplates.BuildTrigger = "colour"
	templates.ExtensionTemplates.RunnerEnvironment = `{{index . "not there"}}`
	templates.ExtensionTemplates.SourceRepositoryIdentifier = "{{.runner_id}} {{.big}} {{.small}} {{.fraction}} {{.yes}} {{.list}}"
	odd := map[string]any{"big": 1234567890123456768, "small": 1e-7, "fraction": 12.5, "yes": true, "list": []any{1, "a", 2.5}}

	type convert func(context.Context, *oidc.IDToken) (upstream.Principal, error)
	for _, test := range []struct {
		name   string
		issuer Issuer
		claims map[string]any
		theirs convert
	}{
		{"email", Issuer{Type: "email"}, map[string]any{"email": "alice@example.com", "email_verified": true}, email.PrincipalFromIDToken},
		{"email, verified as a text", Issuer{Type: "email"}, map[string]any{"email": "alice@example.com", "email_verified": "true"}, email.PrincipalFromIDToken},
		{"email, not verified", Issuer{Type: "email", SkipEmailVerification: true}, map[string]any{"email": "alice@example.com", "email_verified": nil}, email.PrincipalFromIDToken},
		{"email, federated", Issuer{Type: "email", IssuerClaim: "$.federated_claims.connector_id"}, map[string]any{"email": "alice@example.com", "email_verified": true, "federated_claims": map[string]any{"connector_id": "https://accounts.example"}}, email.PrincipalFromIDToken},
		{"username", Issuer{Type: "username", SubjectDomain: "127.0.0.1"}, map[string]any{"sub": "alice"}, fulciousername.PrincipalFromIDToken},
		{"username, not ASCII", Issuer{Type: "username", SubjectDomain: "127.0.0.1"}, map[string]any{"sub": "älice"}, fulciousername.PrincipalFromIDToken},
		{"uri", Issuer{Type: "uri", SubjectDomain: "http://127.0.0.1"}, map[string]any{"sub": "http://127.0.0.1/users/1?a=b#c"}, uri.PrincipalFromIDToken},
		{"spiffe", Issuer{Type: "spiffe", SPIFFETrustDomain: "example.com"}, map[string]any{"sub": "spiffe://example.com/workload/1"}, spiffe.PrincipalFromIDToken},
		{"kubernetes", Issuer{Type: "kubernetes"}, serviceAccount, kubernetes.PrincipalFromIDToken},
		{"github-workflow", Issuer{Type: "github-workflow"}, workflow, fulciogithub.WorkflowPrincipalFromIDToken},
		{"github-workflow, odd names", Issuer{Type: "github-workflow"}, with(workflow, map[string]any{
			"workflow": "büild & test <1>", "ref": "refs/heads/a b#c?d", "job_workflow_ref": "o/r/.github/workflows/a b.yml@refs/heads/ä%20"}), fulciogithub.WorkflowPrincipalFromIDToken},
		{"gitlab-pipeline", Issuer{Type: "gitlab-pipeline"}, pipeline, gitlabcom.JobPrincipalFromIDToken},
		{"gitlab-pipeline, tag, no digest", Issuer{Type: "gitlab-pipeline"}, with(pipeline, map[string]any{"ref_type": "tag", "ref": "v1.0", "ci_config_sha": nil, "project_visibility": nil}), gitlabcom.JobPrincipalFromIDToken},
		{"buildkite-job", Issuer{Type: "buildkite-job"}, job, buildkite.JobPrincipalFromIDToken},
		{"codefresh-workflow", Issuer{Type: "codefresh-workflow"}, build, fulciocodefresh.WorkflowPrincipalFromIDToken},
		{"codefresh-workflow, least", Issuer{Type: "codefresh-workflow"}, with(build, map[string]any{
			"account_name": nil, "pipeline_name": nil, "scm_repo_url": nil, "scm_ref": nil, "runner_environment": nil,
			"platform_url": "https://codefresh.example/base"}), fulciocodefresh.WorkflowPrincipalFromIDToken},
		{"chainguard-identity", Issuer{Type: "chainguard-identity"}, map[string]any{"sub": "efe4e2bb/8a0f1b2c", "act": map[string]any{"iss": "x"}}, chainguard.PrincipalFromIDToken},
		{"chainguard-identity, with an address", Issuer{Type: "chainguard-identity"}, map[string]any{"sub": "efe4", "email": "a@example.com", "email_verified": true}, chainguard.PrincipalFromIDToken},
		{"ci-provider", Issuer{Type: "ci-provider", CIProvider: "templates"}, with(pipeline, odd), ciprovider.WorkflowPrincipalFromIDToken},
	} {
		t.Run(test.name, func(t *testing.T) {
			i := startIDP(t)
			issuer := test.issuer
			issuer.IssuerURL, issuer.ClientID = i.Issuer(), "sigstore"
			claims := with(map[string]any{"email": nil, "email_verified": nil}, test.claims)
			raw := i.token(t, claims)

			ours, err := New(t.Context(), Config{
				OIDCIssuers:      map[string]Issuer{issuer.IssuerURL: issuer},
				CIIssuerMetadata: map[string]CIMetadata{"templates": templates},
			}, Options{Now: atNoon, LoopbackHTTP: true, wait: time.Minute})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(ours.Close)
			got, err := ours.Verify(t.Context(), raw)
			if err != nil {
				t.Fatal(err)
			}

			cfg := &fulcio.FulcioConfig{
				OIDCIssuers: map[string]fulcio.OIDCIssuer{issuer.IssuerURL: {
					IssuerURL: issuer.IssuerURL, ClientID: issuer.ClientID, Type: fulcio.IssuerType(issuer.Type),
					CIProvider: issuer.CIProvider, IssuerClaim: issuer.IssuerClaim, SubjectDomain: issuer.SubjectDomain,
					SPIFFETrustDomain: issuer.SPIFFETrustDomain, SkipEmailVerification: issuer.SkipEmailVerification,
				}},
				CIIssuerMetadata: map[string]fulcio.IssuerMetadata{"templates": {
					DefaultTemplateValues: templates.DefaultTemplateValues, ExtensionTemplates: templates.ExtensionTemplates,
					SubjectAlternativeNameTemplate: templates.SubjectAlternativeNameTemplate,
				}},
			}
			ctx := fulcio.With(t.Context(), cfg)
			theirs, err := test.theirs(ctx, idToken(t, issuer, &i.key.PublicKey, raw))
			if err != nil {
				t.Fatal(err)
			}
			var want x509.Certificate
			if err := theirs.Embed(ctx, &want); err != nil {
				t.Fatal(err)
			}
			if name := theirs.Name(ctx); got.Challenges[0] != name && got.Challenges[len(got.Challenges)-1] != name {
				t.Errorf("challenges %q, Fulcio wants %q", got.Challenges, name)
			}
			compare(t, got, &want)
		})
	}
}

// idToken is the token as Fulcio sees it.
func idToken(t *testing.T, i Issuer, key *rsa.PublicKey, raw string) *oidc.IDToken {
	t.Helper()
	verifier := oidc.NewVerifier(i.IssuerURL, &oidc.StaticKeySet{PublicKeys: []crypto.PublicKey{key}},
		&oidc.Config{ClientID: i.ClientID, Now: func() time.Time { return noon }})
	token, err := verifier.Verify(t.Context(), raw)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// compare fails unless ours has the names and extensions of want.
func compare(t *testing.T, ours *Principal, want *x509.Certificate) {
	t.Helper()
	extensions, err := ours.Extensions.Render()
	if err != nil {
		t.Fatal(err)
	}
	switch ours.SAN.Type {
	case profile.Email:
		if d := cmp.Diff(want.EmailAddresses, []string{ours.SAN.Value}); d != "" {
			t.Error(d)
		}
	case profile.URI:
		// The profile writes a URI as net/url does; crypto/x509 too.
		u, err := parseURL(ours.SAN.Value)
		if err != nil {
			t.Fatal(err)
		}
		if len(want.URIs) != 1 || want.URIs[0].String() != u.String() {
			t.Errorf("SAN %s, Fulcio has %v", u, want.URIs)
		}
	case profile.OtherName:
		san := want.ExtraExtensions[0]
		want.ExtraExtensions = want.ExtraExtensions[1:]
		if value := san.Value; string(value[len(value)-len(ours.SAN.Value):]) != ours.SAN.Value {
			t.Errorf("SAN %q, Fulcio has %q", ours.SAN.Value, value)
		}
	}
	if d := cmp.Diff(want.ExtraExtensions, extensions); d != "" {
		t.Errorf("extensions (-Fulcio +ours):\n%s", d)
	}
}
