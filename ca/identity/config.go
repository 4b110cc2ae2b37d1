package identity

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"regexp"
	"slices"

	"github.com/sigstore/fulcio/pkg/certificate"
	"go.yaml.in/yaml/v3"
)

// Config is the part of a Fulcio configuration file that says which identity
// providers are trusted and how their claims become identities (Fulcio 1.8, pkg/config).
// The YAML names are those of Fulcio's file, the JSON names those of its older
// JSON form, so that such a file is read unchanged.
type Config struct {
	// OIDCIssuers are the issuers by their URL, which is matched with a
	// token's iss octet for octet.
	OIDCIssuers map[string]Issuer `json:"OIDCIssuers,omitempty" yaml:"oidc-issuers,omitempty"`
	// MetaIssuers are issuers by a pattern of their URL, in which * stands for
	// one or more of the characters -, _, A to Z, a to z and 0 to 9. An issuer
	// in OIDCIssuers goes before a pattern that its URL fits.
	MetaIssuers map[string]Issuer `json:"MetaIssuers,omitempty" yaml:"meta-issuers,omitempty"`
	// CIIssuerMetadata are the templates of ci-provider issuers, by name.
	CIIssuerMetadata map[string]CIMetadata `json:"CIIssuerMetadata,omitempty" yaml:"ci-issuer-metadata,omitempty"`
	// Define holds what a file's author wants to name once (YAML anchors). It
	// has no meaning.
	Define any `json:"-" yaml:"define,omitempty"`
}

// Issuer is one identity provider.
type Issuer struct {
	// IssuerURL is the provider's issuer, https, without query or fragment.
	// Empty means the name under which it stands in Config.
	IssuerURL string `json:"IssuerURL,omitempty" yaml:"issuer-url,omitempty"`
	// ClientID is the audience that a token must have.
	ClientID string `json:"ClientID" yaml:"client-id,omitempty"`
	// Preset names a kind of provider whose Type, templates and the like are
	// known (see Presets); Type and CIProvider are then empty.
	Preset string `json:"Preset,omitempty" yaml:"preset,omitempty"`
	// Type names the row of the claim mapping: email, username, uri, spiffe,
	// kubernetes, github-workflow, gitlab-pipeline, buildkite-job,
	// codefresh-workflow, chainguard-identity or ci-provider.
	Type string `json:"Type" yaml:"type,omitempty"`
	// CIProvider names the templates of a ci-provider issuer.
	CIProvider string `json:"CIProvider,omitempty" yaml:"ci-provider,omitempty"`
	// IssuerClaim, for type email, is the path ($.name.name) of a claim that
	// is certified in place of iss, for providers that federate others.
	IssuerClaim string `json:"IssuerClaim,omitempty" yaml:"issuer-claim,omitempty"`
	// SubjectDomain and SPIFFETrustDomain belong to types uri, username and
	// spiffe. For uri it is a URL: scheme and host of the subjects, and their
	// port and the start of their path if it has them.
	SubjectDomain     string `json:"SubjectDomain,omitempty" yaml:"subject-domain,omitempty"`
	SPIFFETrustDomain string `json:"SPIFFETrustDomain,omitempty" yaml:"spiffe-trust-domain,omitempty"`
	// ChallengeClaim is the claim that a proof of possession signs, email or
	// sub, when it is not the type's own.
	ChallengeClaim string `json:"ChallengeClaim,omitempty" yaml:"challenge-claim,omitempty"`
	// Description and Contact are for people.
	Description string `json:"Description,omitempty" yaml:"description,omitempty"`
	Contact     string `json:"Contact,omitempty" yaml:"contact,omitempty"`
	// KeysFile is a JSON Web Key Set in a file, for a site that cannot or shall
	// not ask the provider: nothing is fetched, and the file is read again
	// when it may have changed. DiscoveryFile is a discovery document in a
	// file (OpenID Connect Discovery 1.0, Section 4): the keys are fetched
	// from its jwks_uri. At most one of them. Paths are Options.ReadFile's.
	KeysFile      string `json:"KeysFile,omitempty" yaml:"jwks-file,omitempty"`
	DiscoveryFile string `json:"DiscoveryFile,omitempty" yaml:"discovery-file,omitempty"`
	// MaxUses is how often one token may be used within its life, and MaxKeys
	// for how many different public keys; 0 is without limit (clients reuse a
	// token while it lives).
	MaxUses int `json:"MaxUses,omitempty" yaml:"max-uses,omitempty"`
	MaxKeys int `json:"MaxKeys,omitempty" yaml:"max-keys,omitempty"`
	// CACert is PEM: further roots for the provider's TLS certificate.
	CACert string `json:"CACert,omitempty" yaml:"ca-cert,omitempty"`
	// SkipEmailVerification accepts tokens of type email without
	// email_verified, for a provider whose addresses are verified otherwise.
	SkipEmailVerification bool `json:"SkipEmailVerification,omitempty" yaml:"skip-email-verification,omitempty"`
}

// CIMetadata are the templates of one ci-provider.
type CIMetadata struct {
	DefaultTemplateValues          map[string]string      `json:"DefaultTemplateValues,omitempty" yaml:"default-template-values,omitempty"`
	ExtensionTemplates             certificate.Extensions `json:"ExtensionTemplates,omitempty" yaml:"extension-templates,omitempty"`
	SubjectAlternativeNameTemplate string                 `json:"SubjectAlternativeNameTemplate,omitempty" yaml:"subject-alternative-name-template,omitempty"`

	fixed map[string]string // values that no claim replaces, of a preset
	below string            // the URL below which every name is, of a preset
}

// ParseConfig reads a Fulcio configuration file, JSON or YAML, strictly, and
// validates it. Errors: ErrConfig.
func ParseConfig(b []byte) (Config, error) {
	var cfg Config
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	err := dec.Decode(&cfg)
	if _, more := dec.Token(); err == nil && errors.Is(more, io.EOF) {
		if _, err := parseClaims(b); err != nil {
			return Config{}, fmt.Errorf("%w: parse: %w", ErrConfig, err)
		}
	} else {
		cfg = Config{}
		dec := yaml.NewDecoder(bytes.NewReader(b)) // of Fulcio: it knows aliases as keys
		dec.KnownFields(true)
		if err := dec.Decode(&cfg); err != nil && !errors.Is(err, io.EOF) {
			return Config{}, fmt.Errorf("%w: parse: %.500s", ErrConfig, err.Error())
		}
		if err := dec.Decode(new(any)); !errors.Is(err, io.EOF) {
			return Config{}, fmt.Errorf("%w: parse: more than one document", ErrConfig)
		}
	}
	return cfg, cfg.Validate()
}

// Validate checks the configuration with Fulcio's rules and, where Fulcio
// would ignore or repair, refuses. In particular there is no default issuer:
// a configuration without one is an error. Errors: ErrConfig.
func (c Config) Validate() error {
	_, err := c.resolve()
	return err
}

// resolved is a checked configuration: every issuer with its kind.
type resolved struct {
	issuers  map[string]known // by iss, octet for octet
	patterns []pattern
}

// known is an issuer and what becomes of its tokens.
type known struct {
	Issuer
	kind kind
	// pattern is the meta-issuer that it fits, or "".
	pattern string
}

// name is what the log calls the issuer: its URL where that is configured, and
// not where a token gave it.
func (k known) name() string { return cmp.Or(k.pattern, k.IssuerURL) }

// resolve checks the configuration and makes every preset, default and
// template into what it stands for.
func (c Config) resolve() (resolved, error) {
	out := resolved{issuers: map[string]known{}}
	if len(c.OIDCIssuers)+len(c.MetaIssuers) == 0 {
		return out, fmt.Errorf("%w: no issuer", ErrConfig)
	}
	for _, name := range slices.Sorted(maps.Keys(c.CIIssuerMetadata)) {
		if _, err := c.CIIssuerMetadata[name].kind(); err != nil {
			return out, fmt.Errorf("ci-issuer-metadata %.80q: %w", name, err)
		}
	}
	for _, url := range slices.Sorted(maps.Keys(c.OIDCIssuers)) {
		issuer := c.OIDCIssuers[url]
		if issuer.IssuerURL == "" {
			issuer.IssuerURL = url
		}
		if url != issuer.IssuerURL {
			return out, fmt.Errorf("%w: issuer %.200q has issuer-url %.200q", ErrConfig, url, issuer.IssuerURL)
		}
		k, err := c.know(issuer)
		if err != nil {
			return out, fmt.Errorf("%w: issuer %.200q: %w", ErrConfig, url, err)
		}
		out.issuers[url] = k
	}
	for text, issuer := range c.MetaIssuers {
		p, err := c.pattern(text, issuer)
		if err != nil {
			return out, fmt.Errorf("%w: meta-issuer %.200q: %w", ErrConfig, text, err)
		}
		out.patterns = append(out.patterns, p)
	}
	sortPatterns(out.patterns)
	return out, nil
}

// know finds the kind of a complete issuer and checks both.
func (c Config) know(issuer Issuer) (known, error) {
	issuer, metadata, err := c.expand(issuer)
	if err != nil {
		return known{}, err
	}
	k, ok := kinds[issuer.Type]
	switch {
	case issuer.Type == "ci-provider":
		if k, err = metadata.kind(); err != nil {
			return known{}, err
		}
	case !ok:
		return known{}, fmt.Errorf("type %.40q is not supported", issuer.Type)
	}
	if err := issuer.validate(); err != nil {
		return known{}, err
	}
	if k.checkConfig != nil {
		err = k.checkConfig(issuer)
	}
	return known{Issuer: issuer, kind: k}, err
}

// expand replaces a preset by what it stands for, and finds the templates of a
// ci-provider issuer.
func (c Config) expand(issuer Issuer) (Issuer, CIMetadata, error) {
	if issuer.Preset != "" {
		return usePreset(issuer)
	}
	if issuer.Type != "ci-provider" {
		return issuer, CIMetadata{}, nil
	}
	metadata, ok := c.CIIssuerMetadata[issuer.CIProvider]
	if !ok {
		return issuer, CIMetadata{}, fmt.Errorf("ci-provider %.80q is not in ci-issuer-metadata", issuer.CIProvider)
	}
	return issuer, metadata, nil
}

// claimPath is the part of JSONPath that issuer-claim supports.
var claimPath = regexp.MustCompile(`^\$(\.[A-Za-z0-9_-]+){1,8}$`)

func (i Issuer) validate() error {
	u, err := url.Parse(i.IssuerURL)
	if err != nil {
		return fmt.Errorf("parse issuer-url: %w", err)
	}
	if u.Host == "" || u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" {
		return fmt.Errorf("issuer-url is not a URL of scheme, host and path")
	}
	if i.ClientID == "" {
		return fmt.Errorf("no client-id")
	}
	switch {
	case i.KeysFile != "" && i.DiscoveryFile != "":
		return fmt.Errorf("jwks-file and discovery-file exclude each other")
	case i.MaxUses < 0 || i.MaxKeys < 0:
		return fmt.Errorf("max-uses or max-keys is negative")
	case i.IssuerClaim != "" && i.Type != "email":
		return fmt.Errorf("issuer-claim belongs to type email")
	case i.IssuerClaim != "" && !claimPath.MatchString(i.IssuerClaim):
		return fmt.Errorf("issuer-claim %.80q is not of the form $.name.name", i.IssuerClaim)
	case i.ChallengeClaim != "" && i.ChallengeClaim != "email" && i.ChallengeClaim != "sub":
		return fmt.Errorf("challenge-claim %.40q is neither email nor sub", i.ChallengeClaim)
	case i.CACert != "" && !x509.NewCertPool().AppendCertsFromPEM([]byte(i.CACert)):
		return fmt.Errorf("ca-cert is not a PEM certificate")
	}
	return nil
}

// Kind returns the issuer's type, that of its preset if it has one.
func (i Issuer) Kind() string {
	if i.Preset != "" {
		return presets[i.Preset].issuer.Type
	}
	return i.Type
}

// Challenge returns the claim that clients are told to sign.
func (i Issuer) Challenge() string {
	if i.ChallengeClaim != "" {
		return i.ChallengeClaim
	}
	if k, ok := kinds[i.Kind()]; ok {
		return k.challenge
	}
	return "sub" // of ci-provider
}
