package identity

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/sigstore/fulcio/pkg/certificate"

	"github.com/chancery-ca/chancery/ca/profile"
)

// kinds is the claim mapping (Fulcio 1.8, pkg/identity): one row for each issuer type. A
// new type is a new row.
var kinds = map[string]kind{
	"email": {
		challenge: "email",
		required:  []string{"email"},
		check:     checkEmail,
		sanType:   profile.Email,
		san:       value{template: "{email}"},
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
}

// kind is one issuer type: what a token must say and what becomes of it.
type kind struct {
	challenge  string   // the claim that a proof of possession signs
	required   []string // claims that must be non-empty strings
	check      func(Issuer, claims) error
	sanType    profile.SANType
	san        value
	extensions []extension
}

// extension maps a value to a field of certificate.Extensions, by the name
// that Fulcio's configuration gives the field.
type extension struct {
	field string
	value value
}

// value is a text with {claim} in place of claims. With a base it is the path
// of a URL below base.
type value struct{ base, template string }

func claim(name string) value      { return value{template: "{" + name + "}"} }
func github(template string) value { return value{base: "https://github.com/", template: template} }

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
		if c.text(name) == "" {
			return nil, refuse("claim " + name + " is missing")
		}
	}
	if k.check != nil {
		if err := k.check(issuer, c); err != nil {
			return nil, err
		}
	}
	p := &Principal{Issuer: c.text("iss"), Subject: c.text("sub"), Challenges: k.challenges(issuer, c)}
	if !plain(p.Subject) {
		return nil, fmt.Errorf("%w: claim sub is too long or not plain text", ErrMapping)
	}
	san, err := k.san.render(c)
	if err != nil {
		return nil, err
	}
	p.SAN = profile.SAN{Type: k.sanType, Value: san}
	p.Extensions, err = k.render(issuer, c)
	return p, err
}

// render fills in the extensions: issuer and subject as every type has them,
// and the row's.
func (k kind) render(issuer Issuer, c claims) (certificate.Extensions, error) {
	e := certificate.Extensions{Issuer: c.text("iss"), Subject: c.text("sub")}
	if issuer.IssuerClaim != "" {
		if e.Issuer = c.at(issuer.IssuerClaim); e.Issuer == "" {
			return e, refuse("claim of issuer-claim is missing")
		}
		if !plain(e.Issuer) {
			return e, fmt.Errorf("%w: claim of issuer-claim is too long or not plain text", ErrMapping)
		}
	}
	for _, x := range k.extensions {
		text, err := x.value.render(c)
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

// render puts claims into the template. Errors: ErrToken when a claim is
// missing, ErrMapping when it cannot be certified.
func (v value) render(c claims) (string, error) {
	var out strings.Builder
	rest := v.template
	for {
		before, after, found := strings.Cut(rest, "{")
		out.WriteString(before)
		if !found {
			break
		}
		name, tail, _ := strings.Cut(after, "}")
		text := c.text(name)
		if text == "" {
			return "", refuse("claim " + name + " is missing")
		}
		if !plain(text) {
			return "", fmt.Errorf("%w: claim %s is too long or not plain text", ErrMapping, name)
		}
		out.WriteString(text)
		rest = tail
	}
	if v.base == "" {
		return out.String(), nil
	}
	return joinURL(v.base, out.String())
}

// joinURL appends a path to base as net/url does. A path with a dot segment
// would lead to another place than it says, and is refused.
func joinURL(base, path string) (string, error) {
	decoded, err := url.PathUnescape(path)
	if err != nil {
		return "", fmt.Errorf("%w: claim with an invalid percent-encoding", ErrMapping)
	}
	for segment := range strings.SplitSeq(decoded, "/") {
		if segment == "." || segment == ".." {
			return "", fmt.Errorf("%w: claim with a dot segment", ErrMapping)
		}
	}
	joined, err := url.JoinPath(base, path)
	if err != nil {
		return "", fmt.Errorf("%w: claim does not make a URL", ErrMapping)
	}
	return joined, nil
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

// checkEmail is what type email asks of a token.
func checkEmail(issuer Issuer, c claims) error {
	verified, ok := c.verified("email_verified")
	if !ok {
		return refuse("email_verified is not a boolean")
	}
	if !verified && !issuer.SkipEmailVerification {
		return refuse("e-mail address is not verified")
	}
	if !isMailbox(c.text("email")) {
		return refuse("email is not an e-mail address")
	}
	return nil
}

// isMailbox says whether s is dot-atom@domain in ASCII (RFC 5321, Section
// 4.1.2), the domain of at least two labels. Quoted local parts and literals
// are not names of people, and an rfc822Name is ASCII (RFC 5280, 4.2.1.6).
func isMailbox(s string) bool {
	local, domain, ok := strings.Cut(s, "@")
	if !ok || len(s) > 254 || len(local) > 64 || len(domain) > 253 {
		return false
	}
	for atom := range strings.SplitSeq(local, ".") {
		if atom == "" || strings.ContainsFunc(atom, func(r rune) bool { return !isAtext(r) }) {
			return false
		}
	}
	labels := strings.Split(domain, ".")
	for _, label := range labels {
		if !isLabel(label) {
			return false
		}
	}
	top := labels[len(labels)-1]
	return len(labels) >= 2 && isLetter(rune(top[0]))
}

// isAtext is RFC 5322, Section 3.2.3.
func isAtext(r rune) bool {
	return isLetter(r) || isDigit(r) || strings.ContainsRune("!#$%&'*+-/=?^_`{|}~", r)
}

// isLabel is a label of letters, digits and inner hyphens (RFC 1123, 2.1).
func isLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool { return !isLetter(r) && !isDigit(r) && r != '-' })
}

func isLetter(r rune) bool { return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' }
func isDigit(r rune) bool  { return '0' <= r && r <= '9' }
