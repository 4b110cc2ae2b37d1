package identity

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/url"
	"regexp"

	"github.com/goccy/go-yaml"
	"github.com/sigstore/fulcio/pkg/certificate"
)

// Config is the part of a Fulcio configuration file that says which identity
// providers are trusted and how their claims become identities (Fulcio 1.8, pkg/config).
// The YAML names are those of Fulcio's file, the JSON names those of its older
// JSON form, so that such a file is read unchanged.
type Config struct {
	// OIDCIssuers are the issuers by their URL, which is matched with a
	// token's iss octet for octet.
	OIDCIssuers map[string]Issuer `json:"OIDCIssuers,omitempty" yaml:"oidc-issuers,omitempty"`
	// MetaIssuers are issuers by a pattern. They are not supported: a file
	// that has any is refused.
	MetaIssuers map[string]Issuer `json:"MetaIssuers,omitempty" yaml:"meta-issuers,omitempty"`
	// CIIssuerMetadata are the templates of ci-provider issuers, by name.
	CIIssuerMetadata map[string]CIMetadata `json:"CIIssuerMetadata,omitempty" yaml:"ci-issuer-metadata,omitempty"`
}

// Issuer is one identity provider.
type Issuer struct {
	// IssuerURL is the provider's issuer, https, without query or fragment.
	IssuerURL string `json:"IssuerURL,omitempty" yaml:"issuer-url,omitempty"`
	// ClientID is the audience that a token must have.
	ClientID string `json:"ClientID" yaml:"client-id,omitempty"`
	// Type names the row of the claim mapping: email or github-workflow.
	Type string `json:"Type" yaml:"type,omitempty"`
	// CIProvider names the templates of a ci-provider issuer.
	CIProvider string `json:"CIProvider,omitempty" yaml:"ci-provider,omitempty"`
	// IssuerClaim, for type email, is the path ($.name.name) of a claim that
	// is certified in place of iss, for providers that federate others.
	IssuerClaim string `json:"IssuerClaim,omitempty" yaml:"issuer-claim,omitempty"`
	// SubjectDomain and SPIFFETrustDomain belong to types uri, username and spiffe.
	SubjectDomain     string `json:"SubjectDomain,omitempty" yaml:"subject-domain,omitempty"`
	SPIFFETrustDomain string `json:"SPIFFETrustDomain,omitempty" yaml:"spiffe-trust-domain,omitempty"`
	// ChallengeClaim is the claim that a proof of possession signs, email or
	// sub, when it is not the type's own.
	ChallengeClaim string `json:"ChallengeClaim,omitempty" yaml:"challenge-claim,omitempty"`
	// Description and Contact are for people.
	Description string `json:"Description,omitempty" yaml:"description,omitempty"`
	Contact     string `json:"Contact,omitempty" yaml:"contact,omitempty"`
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
}

// ParseConfig reads a Fulcio configuration file, JSON or YAML, strictly, and
// validates it. Errors: ErrConfig.
func ParseConfig(b []byte) (Config, error) {
	var cfg Config
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&cfg); err != nil || dec.More() {
		cfg = Config{}
		if err := yaml.UnmarshalWithOptions(b, &cfg, yaml.Strict()); err != nil {
			return Config{}, fmt.Errorf("%w: parse: %w", ErrConfig, err)
		}
	}
	return cfg, cfg.Validate()
}

// Validate checks the configuration with Fulcio's rules and, where Fulcio
// would ignore or repair, refuses. In particular there is no default issuer:
// a configuration without one is an error. Errors: ErrConfig.
func (c Config) Validate() error {
	if len(c.OIDCIssuers) == 0 {
		return fmt.Errorf("%w: no issuer", ErrConfig)
	}
	if len(c.MetaIssuers) > 0 {
		return fmt.Errorf("%w: meta-issuers are not supported", ErrConfig)
	}
	for name, issuer := range c.OIDCIssuers {
		if name != issuer.IssuerURL {
			return fmt.Errorf("%w: issuer %.200q has issuer-url %.200q", ErrConfig, name, issuer.IssuerURL)
		}
		if err := issuer.validate(); err != nil {
			return fmt.Errorf("%w: issuer %.200q: %w", ErrConfig, name, err)
		}
	}
	return nil
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
	if _, ok := kinds[i.Type]; !ok {
		return fmt.Errorf("type %.40q is not supported", i.Type)
	}
	switch {
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

// Challenge returns the claim that clients are told to sign.
func (i Issuer) Challenge() string {
	if i.ChallengeClaim != "" {
		return i.ChallengeClaim
	}
	return kinds[i.Type].challenge
}
