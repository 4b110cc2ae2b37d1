package identity

import (
	"errors"
	"fmt"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/sigstore/fulcio/pkg/certificate"
)

// preset is a kind of identity provider whose configuration is known. What
// differs from site to site is derived from the issuer's URL by site.
type preset struct {
	// about is one line for people: what the issuer's URL looks like.
	about string
	// issuer has the fields that the preset decides.
	issuer Issuer
	// templates are for type ci-provider; "site" in them is what site returns,
	// whatever a token says.
	templates CIMetadata
	// site derives from the issuer's URL: the address of the provider's web
	// pages, "" where none is needed. It refuses a URL that is not of this
	// kind of provider.
	site func(*url.URL) (string, error)
}

// Presets returns what a preset's name stands for, one line each.
func Presets() map[string]string {
	out := make(map[string]string, len(presets))
	for name, p := range presets {
		out[name] = p.about
	}
	return out
}

// usePreset fills an issuer in from its preset.
func usePreset(i Issuer) (Issuer, CIMetadata, error) {
	p, ok := presets[i.Preset]
	if !ok {
		return i, CIMetadata{}, fmt.Errorf("preset %.40q is not one of %s", i.Preset, strings.Join(slices.Sorted(maps.Keys(presets)), ", "))
	}
	if i.Type != "" || i.CIProvider != "" {
		return i, CIMetadata{}, fmt.Errorf("preset and type exclude each other")
	}
	u, err := url.Parse(i.IssuerURL)
	if err != nil {
		return i, CIMetadata{}, fmt.Errorf("parse issuer-url: %w", err)
	}
	site, err := p.site(u)
	if err != nil {
		return i, CIMetadata{}, fmt.Errorf("preset %s: %w (%s)", i.Preset, err, p.about)
	}
	i.Type, i.CIProvider = p.issuer.Type, p.issuer.CIProvider
	i.SkipEmailVerification = i.SkipEmailVerification || p.issuer.SkipEmailVerification
	if i.Type == "uri" && i.SubjectDomain == "" {
		i.SubjectDomain = site
	}
	m := p.templates
	m.fixed, m.below = map[string]string{"site": site}, site
	return i, m, nil
}

// presets are the kinds of provider. The claims are those that each provider
// documents for its ID tokens; where Fulcio's public instance has templates for a
// provider (config/identity/config.yaml of Fulcio 1.8), the names are the same.
var presets = map[string]preset{
	// docs.github.com, Actions, "OpenID Connect reference"; the address below the
	// issuer is that of "Set the GitHub Actions OIDC custom issuer policy".
	"github": {
		about:     "https://token.actions.githubusercontent.com, or below it the slug of an enterprise",
		issuer:    Issuer{Type: "ci-provider", CIProvider: "github"},
		templates: githubTemplates,
		site: func(u *url.URL) (string, error) {
			return "https://github.com", wantHost(u, "token.actions.githubusercontent.com")
		},
	},
	// The same pages for Enterprise Server (HOST/_services/token), and "Feature
	// overview for GitHub Enterprise Cloud with data residency" (ghe.com).
	"github-enterprise": {
		about:     "https://HOST/_services/token, or https://token.actions.NAME.ghe.com",
		issuer:    Issuer{Type: "ci-provider", CIProvider: "github"},
		templates: githubTemplates,
		site: func(u *url.URL) (string, error) {
			if name, ok := strings.CutPrefix(u.Host, "token.actions."); ok && strings.HasSuffix(name, ".ghe.com") {
				return "https://" + name, nil
			}
			if u.Path != "/_services/token" {
				return "", fmt.Errorf("issuer-url is not of a GitHub Enterprise")
			}
			return u.Scheme + "://" + u.Host, nil
		},
	},
	// docs.gitlab.com, "OpenID Connect (OIDC) Authentication Using ID Tokens".
	"gitlab": {
		about:     "https://gitlab.com",
		issuer:    Issuer{Type: "ci-provider", CIProvider: "gitlab"},
		templates: gitlabTemplates,
		site:      func(u *url.URL) (string, error) { return "https://gitlab.com", wantHost(u, "gitlab.com") },
	},
	"gitlab-self-hosted": {
		about:     "the address of the GitLab, https://HOST or https://HOST/PATH",
		issuer:    Issuer{Type: "ci-provider", CIProvider: "gitlab"},
		templates: gitlabTemplates,
		site:      itself,
	},
	// buildkite.com/docs, "OIDC in Buildkite Pipelines" and "buildkite-agent oidc".
	"buildkite": {
		about:  "https://agent.buildkite.com",
		issuer: Issuer{Type: "ci-provider", CIProvider: "buildkite"},
		templates: CIMetadata{
			ExtensionTemplates: certificate.Extensions{
				RunnerEnvironment:      "runner_environment",
				SourceRepositoryDigest: "build_commit",
				BuildTrigger:           "build_source",
				RunInvocationURI:       "{{.site}}/{{.organization_slug}}/{{.pipeline_slug}}/builds/{{.build_number}}#{{.job_id}}",
			},
			SubjectAlternativeNameTemplate: "{{.site}}/{{.organization_slug}}/{{.pipeline_slug}}",
		},
		site: func(u *url.URL) (string, error) { return "https://buildkite.com", wantHost(u, "agent.buildkite.com") },
	},
	// circleci.com/docs, "Using OpenID Connect tokens in jobs"; the pipeline's
	// definition is in both forms of token.
	"circleci": {
		about:  "https://oidc.circleci.com/org/ORGANIZATION-ID",
		issuer: Issuer{Type: "ci-provider", CIProvider: "circleci"},
		templates: CIMetadata{
			DefaultTemplateValues: map[string]string{"oidc.circleci.com/vcs-ref": "", "oidc.circleci.com/vcs-origin": ""},
			ExtensionTemplates: certificate.Extensions{
				BuildSignerURI:      circleDefinition,
				BuildConfigURI:      `{{.site}}/api/v2/pipeline/{{need . "oidc.circleci.com/pipeline-id"}}/config`,
				RunInvocationURI:    `{{with index . "oidc.circleci.com/workflow-id"}}https://app.circleci.com/workflow/{{.}}/job/{{need $ "oidc.circleci.com/job-id"}}{{end}}`,
				RunnerEnvironment:   `{{if eq (index . "oidc.circleci.com/ssh-rerun") "true"}}ssh-rerun{{end}}`,
				SourceRepositoryURI: "oidc.circleci.com/vcs-origin",
				SourceRepositoryRef: "oidc.circleci.com/vcs-ref",
			},
			SubjectAlternativeNameTemplate: circleDefinition,
		},
		site: func(u *url.URL) (string, error) { return "https://circleci.com", wantHost(u, "oidc.circleci.com") },
	},
	// plugins.jenkins.io/oidc-provider: by default sub is JOB_URL, and the issuer of
	// a credential is that of the root or of the folder that holds it.
	"jenkins": {
		about:  "the issuer of the OpenID Connect Provider plugin, https://HOST/oidc, or https://HOST/oidc/job/FOLDER; a token's subject is the URL of its job",
		issuer: Issuer{Type: "uri"},
		site:   jenkinsSite,
	},
	// kubernetes.io/docs, "Managing Service Accounts", "Service account token volume
	// projection" and "Service account issuer discovery".
	"kubernetes": {
		about: "the issuer of the cluster's service account tokens (kubectl get --raw /.well-known/openid-configuration); " +
			"where its keys ask for a login, jwks-file with them (kubectl get --raw /openid/v1/jwks)",
		issuer: Issuer{Type: "kubernetes"},
		site:   none,
	},
	// developers.google.com/identity, "OpenID Connect API reference". Tokens of old
	// implementations, whose iss has no scheme, are refused.
	"google": {
		about:  "https://accounts.google.com",
		issuer: Issuer{Type: "email"},
		site:   func(u *url.URL) (string, error) { return "", wantHost(u, "accounts.google.com") },
	},
	// learn.microsoft.com/entra/identity-platform, "ID token claims reference" and
	// "Optional claims reference": email is an optional claim, and there is no
	// email_verified. Most clients sign nothing for an address without it
	// (sigstore/pkg/oauthflow).
	"entra": {
		about: "https://login.microsoftonline.com/TENANT-ID/v2.0, the tenant of one organisation, which alone decides who has which address; " +
			"cosign and others want email_verified, which Entra has not: for them put Dex or Keycloak in between",
		issuer: Issuer{Type: "email", SkipEmailVerification: true},
		site:   func(u *url.URL) (string, error) { return "", checkEntra(u) },
	},
	// developer.okta.com, "OpenID Connect & OAuth 2.0 API", "ID token claims", and
	// "Customize tokens returned from Okta": an ID token that comes with an access
	// token has the address alone.
	"okta": {
		about: "https://NAME.okta.com/oauth2/SERVER, an authorization server whose ID tokens always have the claims email and email_verified; " +
			"those of https://NAME.okta.com itself lack the second",
		issuer: Issuer{Type: "email"}, site: none,
	},
	// keycloak.org/docs, "Server Administration Guide", "Client scopes": scope email
	// has email and email_verified.
	"keycloak": {about: "https://HOST/realms/REALM", issuer: Issuer{Type: "email"}, site: none},
	// dexidp.io/docs, "Custom Scopes, Claims and Client Features": scope email;
	// email_verified is what the provider behind Dex says.
	"dex": {about: "the issuer of Dex's configuration", issuer: Issuer{Type: "email"}, site: none},
}

// forEverybody are the issuers, and meta-issuers, of which anybody in the world
// can get a token: a private CA needs a policy for them.
var forEverybody = []string{
	"https://accounts.google.com", "https://agent.buildkite.com", "https://gitlab.com", "https://oidc.circleci.com",
	"https://oidc.circleci.com/org/*", "https://token.actions.githubusercontent.com", "https://token.actions.githubusercontent.com/*",
}

// ForEverybody returns which of the configured issuers and meta-issuers are known
// to give tokens to anybody, in order.
func (c Config) ForEverybody() []string {
	var out []string
	for _, url := range forEverybody {
		_, exact := c.OIDCIssuers[url]
		if _, pattern := c.MetaIssuers[url]; exact || pattern {
			out = append(out, url)
		}
	}
	return out
}

// circleDefinition is the address of a pipeline's definition.
const circleDefinition = `{{.site}}/api/v2/projects/{{need . "oidc.circleci.com/project-id"}}/pipeline-definitions/{{need . "oidc.circleci.com/pipeline-definition-id"}}`

// jenkinsSite is where the jobs are for which an issuer speaks: those of the
// whole Jenkins or of one folder. An issuer elsewhere, which the plugin allows,
// needs its subject-domain in the configuration.
func jenkinsSite(u *url.URL) (string, error) {
	base, folder, ok := strings.Cut(u.Path, "/oidc")
	if !ok || folder != "" && !strings.HasPrefix(folder, "/job/") {
		return u.Scheme + "://" + u.Host, nil
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: base + folder}).String(), nil
}

// githubTemplates map the claims of GitHub Actions.
var githubTemplates = CIMetadata{
	DefaultTemplateValues: map[string]string{"environment": ""},
	ExtensionTemplates: certificate.Extensions{
		GithubWorkflowTrigger:               "event_name",
		GithubWorkflowSHA:                   "sha",
		GithubWorkflowName:                  "workflow",
		GithubWorkflowRepository:            "repository",
		GithubWorkflowRef:                   "ref",
		BuildSignerURI:                      "{{.site}}/{{.job_workflow_ref}}",
		BuildSignerDigest:                   "job_workflow_sha",
		RunnerEnvironment:                   "runner_environment",
		SourceRepositoryURI:                 "{{.site}}/{{.repository}}",
		SourceRepositoryDigest:              "sha",
		SourceRepositoryRef:                 "ref",
		SourceRepositoryIdentifier:          "repository_id",
		SourceRepositoryOwnerURI:            "{{.site}}/{{.repository_owner}}",
		SourceRepositoryOwnerIdentifier:     "repository_owner_id",
		BuildConfigURI:                      "{{.site}}/{{.workflow_ref}}",
		BuildConfigDigest:                   "workflow_sha",
		BuildTrigger:                        "event_name",
		RunInvocationURI:                    "{{.site}}/{{.repository}}/actions/runs/{{.run_id}}/attempts/{{.run_attempt}}",
		SourceRepositoryVisibilityAtSigning: "repository_visibility",
		DeploymentEnvironment:               "environment",
	},
	SubjectAlternativeNameTemplate: "{{.site}}/{{.job_workflow_ref}}",
}

// gitlabTemplates map the claims of GitLab CI.
var gitlabTemplates = CIMetadata{
	DefaultTemplateValues: map[string]string{"environment": "", "ci_config_sha": ""},
	ExtensionTemplates: certificate.Extensions{
		BuildSignerURI:                      "https://{{.ci_config_ref_uri}}",
		BuildSignerDigest:                   "ci_config_sha",
		RunnerEnvironment:                   "runner_environment",
		SourceRepositoryURI:                 "{{.site}}/{{.project_path}}",
		SourceRepositoryDigest:              "sha",
		SourceRepositoryRef:                 `refs/{{if eq .ref_type "branch"}}heads{{else if eq .ref_type "tag"}}tags{{else}}{{refuse}}{{end}}/{{.ref}}`,
		SourceRepositoryIdentifier:          "project_id",
		SourceRepositoryOwnerURI:            "{{.site}}/{{.namespace_path}}",
		SourceRepositoryOwnerIdentifier:     "namespace_id",
		BuildConfigURI:                      "https://{{.ci_config_ref_uri}}",
		BuildConfigDigest:                   "ci_config_sha",
		BuildTrigger:                        "pipeline_source",
		RunInvocationURI:                    "{{.site}}/{{.project_path}}/-/jobs/{{.job_id}}",
		SourceRepositoryVisibilityAtSigning: "project_visibility",
		DeploymentEnvironment:               "environment",
	},
	SubjectAlternativeNameTemplate: "https://{{.ci_config_ref_uri}}",
}

// entraHosts are Microsoft's public and national clouds (Microsoft identity
// platform, National clouds).
var entraHosts = []string{"login.microsoftonline.com", "login.microsoftonline.us", "login.partner.microsoftonline.cn"}

// entraTenant is a tenant in the issuer of a v2.0 token.
var entraTenant = regexp.MustCompile(`^/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/v2\.0$`)

// entraConsumers is the tenant of personal accounts, which anybody has.
const entraConsumers = "9188040d-6c67-4c5b-b112-36a304b66dad"

// checkEntra wants the tenant of one organisation: the addresses of Entra's
// tokens are not verified beyond what the tenant's administrators do.
func checkEntra(u *url.URL) error {
	tenant := entraTenant.FindStringSubmatch(u.Path)
	if !slices.Contains(entraHosts, u.Host) || tenant == nil {
		return errors.New("issuer-url is not of one tenant")
	}
	if tenant[1] == entraConsumers {
		return errors.New("issuer-url is of the tenant of personal accounts")
	}
	return nil
}

func wantHost(u *url.URL, host string) error {
	if u.Host != host {
		return fmt.Errorf("issuer-url is not at %s", host)
	}
	return nil
}

func itself(u *url.URL) (string, error) { return strings.TrimSuffix(u.String(), "/"), nil }

func none(*url.URL) (string, error) { return "", nil }
