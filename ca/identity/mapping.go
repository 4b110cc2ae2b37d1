package identity

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/sigstore/fulcio/pkg/certificate"
	"golang.org/x/text/unicode/norm"

	"github.com/chancery-ca/chancery/ca/profile"
)

// kinds is the claim mapping (Fulcio 1.8, pkg/identity): one row for each issuer
// type. A new type is a new row. The rows of ci-provider are the templates of
// the configuration (template.go).
var kinds = map[string]kind{
	"email": {
		challenge: "email",
		required:  []string{"email"},
		check:     checkEmail,
		sanType:   profile.Email,
		san:       claim("email"),
	},
	"username": {
		challenge:   "sub",
		checkConfig: checkUsernameDomain,
		check:       checkUsername,
		sanType:     profile.OtherName,
		san:         username,
	},
	"uri": {
		challenge:   "sub",
		checkConfig: checkURIDomain,
		check:       checkURISubject,
		sanType:     profile.URI,
		san:         claim("sub"),
	},
	"spiffe": {
		challenge:   "sub",
		checkConfig: checkTrustDomain,
		check:       checkSPIFFE,
		sanType:     profile.URI,
		san:         claim("sub"),
	},
	"kubernetes": {
		challenge: "sub",
		required:  []string{"kubernetes.io>namespace", "kubernetes.io>serviceaccount>name"},
		sanType:   profile.URI,
		san:       below("https://kubernetes.io/", "namespaces/{kubernetes.io>namespace}/serviceaccounts/{kubernetes.io>serviceaccount>name}"),
	},
	"github-workflow": {
		challenge: "sub",
		required: []string{
			"job_workflow_ref", "sha", "event_name", "repository", "workflow", "ref",
			"job_workflow_sha", "runner_environment", "repository_id",
			"repository_owner", "repository_owner_id", "repository_visibility",
			"workflow_ref", "workflow_sha", "run_id", "run_attempt",
		},
		sanType: profile.URI,
		san:     github("{job_workflow_ref}"),
		extensions: []extension{
			{"github-workflow-trigger", claim("event_name")},
			{"github-workflow-sha", claim("sha")},
			{"github-workflow-name", claim("workflow")},
			{"github-workflow-repository", claim("repository")},
			{"github-workflow-ref", claim("ref")},
			{"build-signer-uri", github("{job_workflow_ref}")},
			{"build-signer-digest", claim("job_workflow_sha")},
			{"runner-environment", claim("runner_environment")},
			{"source-repository-uri", github("{repository}")},
			{"source-repository-digest", claim("sha")},
			{"source-repository-ref", claim("ref")},
			{"source-repository-identifier", claim("repository_id")},
			{"source-repository-owner-uri", github("{repository_owner}")},
			{"source-repository-owner-identifier", claim("repository_owner_id")},
			{"build-config-uri", github("{workflow_ref}")},
			{"build-config-digest", claim("workflow_sha")},
			{"build-trigger", claim("event_name")},
			{"run-invocation-uri", github("{repository}/actions/runs/{run_id}/attempts/{run_attempt}")},
			{"source-repository-visibility-at-signing", claim("repository_visibility")},
		},
	},
	"gitlab-pipeline": {
		challenge: "sub",
		required: []string{
			"project_path", "project_id", "pipeline_source", "pipeline_id",
			"ci_config_ref_uri", "namespace_path", "namespace_id", "job_id", "ref",
			"ref_type", "sha", "runner_environment",
		},
		check:   checkGitLabRunner,
		sanType: profile.URI,
		san:     whole("https://{ci_config_ref_uri}"),
		extensions: []extension{
			{"build-signer-uri", whole("https://{ci_config_ref_uri}")},
			{"build-signer-digest", optional("ci_config_sha")},
			{"runner-environment", claim("runner_environment")},
			{"source-repository-uri", gitlab("{project_path}")},
			{"source-repository-digest", claim("sha")},
			{"source-repository-ref", gitRef},
			{"source-repository-identifier", claim("project_id")},
			{"source-repository-owner-uri", gitlab("{namespace_path}")},
			{"source-repository-owner-identifier", claim("namespace_id")},
			{"build-config-uri", whole("https://{ci_config_ref_uri}")},
			{"build-config-digest", optional("ci_config_sha")},
			{"build-trigger", claim("pipeline_source")},
			{"run-invocation-uri", gitlab("{project_path}/-/jobs/{job_id}")},
			{"source-repository-visibility-at-signing", optional("project_visibility")},
		},
	},
	"buildkite-job": {
		challenge: "sub",
		required:  []string{"organization_slug", "pipeline_slug"},
		sanType:   profile.URI,
		san:       below("https://buildkite.com/", "{organization_slug}/{pipeline_slug}"),
	},
	"codefresh-workflow": {
		challenge: "sub",
		required:  []string{"account_id", "pipeline_id", "workflow_id"},
		sanType:   profile.URI,
		san:       codefresh("{account_name?}/{pipeline_name?}:{account_id}/{pipeline_id}"),
		extensions: []extension{
			{"build-signer-uri", codefresh("build/{workflow_id}")},
			{"runner-environment", optional("runner_environment")},
			{"source-repository-uri", optional("scm_repo_url")},
			{"source-repository-ref", optional("scm_ref")},
			{"build-config-uri", codefresh("api/pipelines/{pipeline_id}")},
			{"run-invocation-uri", codefresh("build/{workflow_id}")},
		},
	},
	"chainguard-identity": {
		challenge: "sub",
		check:     checkChainguard,
		sanType:   profile.URI,
		san:       belowIssuer("{sub}"),
	},
}

// kind is one issuer type: what a token must say and what becomes of it.
type kind struct {
	challenge   string             // the claim that a proof of possession signs
	checkConfig func(Issuer) error // what the type asks of its configuration, or nil
	required    []string           // claims that must be non-empty strings
	check       func(Issuer, claims) error
	sanType     profile.SANType
	san         value
	extensions  []extension
	templates   *CIMetadata // of ci-provider; else nil
}

// extension maps a value to a field of certificate.Extensions, by the name
// that Fulcio's configuration gives the field.
type extension struct {
	field string
	value value
}

// value makes a text of a verified token's claims. Errors: ErrToken when a
// claim is missing, ErrMapping when it cannot be certified.
type value func(assertion) (string, error)

// assertion is what a verified token of an issuer says.
type assertion struct {
	issuer Issuer
	claims claims
	// texts are the claims as texts over the defaults of the configuration,
	// for the templates of ci-provider; nil for every other type.
	texts map[string]string
}

// claim is the text of one claim, which must be there.
func claim(name string) value { return text("{" + name + "}") }

// optional is the text of one claim, or nothing.
func optional(name string) value { return text("{" + name + "?}") }

// text is a template with {claim} in place of claims, {claim?} if it may be
// missing, {outer>inner} for a claim in an object.
func text(template string) value {
	return func(a assertion) (string, error) { return a.claims.fill(template) }
}

// below is a template as the path of a URL below base.
func below(base, template string) value {
	return func(a assertion) (string, error) {
		path, err := a.claims.fill(template)
		if err != nil {
			return "", err
		}
		return joinURL(base, path)
	}
}

func github(template string) value { return below("https://github.com/", template) }
func gitlab(template string) value { return below("https://gitlab.com/", template) }

// codefresh is below the platform that the token names.
func codefresh(template string) value {
	return func(a assertion) (string, error) {
		base := a.claims.text("platform_url")
		if base == "" {
			base = "https://g.codefresh.io"
		}
		if u, err := url.Parse(base); err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return "", fmt.Errorf("%w: claim platform_url is not an https URL", ErrMapping)
		}
		return below(base, template)(a)
	}
}

// belowIssuer is below the token's issuer.
func belowIssuer(template string) value {
	return func(a assertion) (string, error) { return below(a.claims.text("iss"), template)(a) }
}

// whole is a template that is a URL, as net/url writes it.
func whole(template string) value {
	return func(a assertion) (string, error) {
		s, err := a.claims.fill(template)
		if err != nil {
			return "", err
		}
		u, err := parseURL(s)
		if err != nil {
			return "", err
		}
		return u.String(), nil
	}
}

// username is the subject in the domain that the configuration gives it.
func username(a assertion) (string, error) {
	name, err := a.claims.fill("{sub}")
	if err == nil && !unmistakable(name) {
		return "", fmt.Errorf("%w: user name mixes scripts or letter forms", ErrMapping)
	}
	return name + "!" + a.issuer.SubjectDomain, err
}

// unmistakable says whether a name is written in one script (UTS #39, Section
// 5.1) and without compatibility forms (UAX #15), so that it does not pass for
// a name in another script. The scripts that East Asian languages use together
// count as one.
func unmistakable(name string) bool {
	if !norm.NFKC.IsNormalString(name) {
		return false
	}
	script := ""
	for _, r := range name {
		if !unicode.IsLetter(r) {
			continue
		}
		if s := scriptOf(r); script != "" && s != script {
			return false
		} else {
			script = s
		}
	}
	return true
}

// scriptOf names the script of a letter.
func scriptOf(r rune) string {
	if r <= unicode.MaxASCII || unicode.Is(unicode.Latin, r) {
		return "Latin"
	}
	if unicode.In(r, unicode.Han, unicode.Hiragana, unicode.Katakana, unicode.Hangul, unicode.Bopomofo) {
		return "East Asian"
	}
	for name, table := range unicode.Scripts {
		if unicode.Is(table, r) {
			return name // a letter has one script
		}
	}
	return "unknown"
}

// gitRef is GitLab's ref as git writes it.
func gitRef(a assertion) (string, error) {
	switch a.claims.text("ref_type") {
	case "branch":
		return a.claims.fill("refs/heads/{ref}")
	case "tag":
		return a.claims.fill("refs/tags/{ref}")
	}
	return "", refuse("ref_type is neither branch nor tag")
}

// fields finds a field by its name in Fulcio's configuration (Fulcio, docs/oid-info.md).
var fields = map[string]func(*certificate.Extensions) *string{
	"github-workflow-trigger":                 func(e *certificate.Extensions) *string { return &e.GithubWorkflowTrigger },
	"github-workflow-sha":                     func(e *certificate.Extensions) *string { return &e.GithubWorkflowSHA },
	"github-workflow-name":                    func(e *certificate.Extensions) *string { return &e.GithubWorkflowName },
	"github-workflow-repository":              func(e *certificate.Extensions) *string { return &e.GithubWorkflowRepository },
	"github-workflow-ref":                     func(e *certificate.Extensions) *string { return &e.GithubWorkflowRef },
	"build-signer-uri":                        func(e *certificate.Extensions) *string { return &e.BuildSignerURI },
	"build-signer-digest":                     func(e *certificate.Extensions) *string { return &e.BuildSignerDigest },
	"runner-environment":                      func(e *certificate.Extensions) *string { return &e.RunnerEnvironment },
	"source-repository-uri":                   func(e *certificate.Extensions) *string { return &e.SourceRepositoryURI },
	"source-repository-digest":                func(e *certificate.Extensions) *string { return &e.SourceRepositoryDigest },
	"source-repository-ref":                   func(e *certificate.Extensions) *string { return &e.SourceRepositoryRef },
	"source-repository-identifier":            func(e *certificate.Extensions) *string { return &e.SourceRepositoryIdentifier },
	"source-repository-owner-uri":             func(e *certificate.Extensions) *string { return &e.SourceRepositoryOwnerURI },
	"source-repository-owner-identifier":      func(e *certificate.Extensions) *string { return &e.SourceRepositoryOwnerIdentifier },
	"build-config-uri":                        func(e *certificate.Extensions) *string { return &e.BuildConfigURI },
	"build-config-digest":                     func(e *certificate.Extensions) *string { return &e.BuildConfigDigest },
	"build-trigger":                           func(e *certificate.Extensions) *string { return &e.BuildTrigger },
	"run-invocation-uri":                      func(e *certificate.Extensions) *string { return &e.RunInvocationURI },
	"source-repository-visibility-at-signing": func(e *certificate.Extensions) *string { return &e.SourceRepositoryVisibilityAtSigning },
	"deployment-environment":                  func(e *certificate.Extensions) *string { return &e.DeploymentEnvironment },
}

// principal applies the row to the claims of a verified token.
func (k kind) principal(issuer Issuer, c claims) (*Principal, error) {
	for _, name := range k.required {
		if c.nested(name) == "" {
			return nil, refuse("claim " + name + " is missing")
		}
	}
	if k.check != nil {
		if err := k.check(issuer, c); err != nil {
			return nil, err
		}
	}
	p := &Principal{Issuer: c.text("iss"), Subject: c.text("sub"), Challenges: k.challenges(issuer, c), claims: c}
	if !plain(p.Subject) {
		return nil, fmt.Errorf("%w: claim sub is too long or not plain text", ErrMapping)
	}
	a := assertion{issuer: issuer, claims: c}
	if k.templates != nil {
		a.texts = c.texts(*k.templates)
	}
	san, err := k.san(a)
	if err != nil {
		return nil, err
	}
	p.SAN = profile.SAN{Type: k.sanType, Value: san}
	p.Extensions, err = k.render(a)
	return p, err
}

// render fills in the extensions: issuer and subject as every type has them,
// and the row's.
func (k kind) render(a assertion) (certificate.Extensions, error) {
	e := certificate.Extensions{Issuer: a.claims.text("iss"), Subject: a.claims.text("sub")}
	if a.issuer.IssuerClaim != "" {
		if e.Issuer = a.claims.at(a.issuer.IssuerClaim); e.Issuer == "" {
			return e, refuse("claim of issuer-claim is missing")
		}
		if !plain(e.Issuer) {
			return e, fmt.Errorf("%w: claim of issuer-claim is too long or not plain text", ErrMapping)
		}
	}
	for _, x := range k.extensions {
		text, err := x.value(a)
		if err != nil {
			return e, err
		}
		*fields[x.field](&e) = text
	}
	return e, nil
}

// challenges are the values a proof of possession may sign: the type's claim,
// the configured one, and a verified e-mail address, which clients sign
// whenever a token has one, whatever the issuer's type.
func (k kind) challenges(issuer Issuer, c claims) []string {
	var out []string
	add := func(text string) {
		if text != "" && !slices.Contains(out, text) {
			out = append(out, text)
		}
	}
	add(c.text(k.challenge))
	if issuer.ChallengeClaim == "sub" {
		add(c.text("sub"))
	}
	if verified, _ := c.verified("email_verified"); verified {
		add(c.text("email"))
	}
	return out
}

// fill puts claims into a template (see text).
func (c claims) fill(template string) (string, error) {
	var out strings.Builder
	for {
		before, after, found := strings.Cut(template, "{")
		out.WriteString(before)
		if !found {
			return out.String(), nil
		}
		name, tail, _ := strings.Cut(after, "}")
		name, optional := strings.CutSuffix(name, "?")
		text := c.nested(name)
		if text == "" && !optional {
			return "", refuse("claim " + name + " is missing")
		}
		if !plain(text) {
			return "", fmt.Errorf("%w: claim %s is too long or not plain text", ErrMapping, name)
		}
		out.WriteString(text)
		template = tail
	}
}

// joinURL appends a path to base as net/url does. A path with a dot segment, or
// with an empty one, which net/url leaves out, would lead to another place than
// it says, and is refused.
func joinURL(base, path string) (string, error) {
	if err := checkPath(path); err != nil {
		return "", err
	}
	if strings.Contains(path, "//") {
		return "", fmt.Errorf("%w: claim with an empty path segment", ErrMapping)
	}
	joined, err := url.JoinPath(base, path)
	if err != nil {
		return "", fmt.Errorf("%w: claim does not make a URL", ErrMapping)
	}
	return joined, nil
}

// parseURL reads an absolute URL with a host, without user information and dot
// segments.
func parseURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme == "" || u.Host == "" || u.User != nil {
		return nil, fmt.Errorf("%w: claims do not make a URL with a host", ErrMapping)
	}
	return u, checkPath(u.Path)
}

// checkPath refuses dot segments.
func checkPath(path string) error {
	decoded, err := url.PathUnescape(path)
	if err != nil {
		return fmt.Errorf("%w: claim with an invalid percent-encoding", ErrMapping)
	}
	for segment := range strings.SplitSeq(decoded, "/") {
		if segment == "." || segment == ".." {
			return fmt.Errorf("%w: claim with a dot segment", ErrMapping)
		}
	}
	return nil
}

// maxText bounds a claim that goes into a certificate, in octets.
const maxText = 1024

// plain says whether text can be certified: not too long, printable, without
// the character that stands for undecodable input.
func plain(text string) bool {
	return len(text) <= maxText && !strings.ContainsFunc(text, func(r rune) bool {
		return r == utf8.RuneError || !unicode.IsGraphic(r)
	})
}
