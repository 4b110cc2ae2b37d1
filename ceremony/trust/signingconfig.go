package trust

import (
	"encoding/json"
	"fmt"
	"net/url"
	"strings"

	trustpb "github.com/sigstore/protobuf-specs/gen/pb-go/trustroot/v1"
)

// TimestampPath is where a timestamp authority answers below its service URL.
// Clients take the full URL from the signing configuration.
const TimestampPath = "/api/v1/timestamp"

// Service is one endpoint that clients may use when signing.
type Service struct {
	// URL is the base URL without a final slash; a timestamp authority's is
	// the full one.
	URL string
	// MajorAPIVersion is 1 for the CA (although its paths say v2), the
	// OpenID provider and the timestamp authority, 1 or 2 for Rekor.
	MajorAPIVersion uint32
	Validity        Validity
	// Operator is required; clients take one service per operator.
	Operator string
}

// SigningConfig is the content of signing_config.v0.2.json. The selectors are
// always ANY: sigstore-js knows no other, sigstore-go needs one.
type SigningConfig struct {
	CAs, OIDC, Rekor, TSAs []Service
}

// Marshal returns signing_config.v0.2.json, indented, with a final newline.
func (c SigningConfig) Marshal() ([]byte, error) {
	m := &trustpb.SigningConfig{MediaType: SigningConfigMediaType}
	for _, l := range []struct {
		name string
		in   []Service
		out  *[]*trustpb.Service
	}{
		{"CA", c.CAs, &m.CaUrls},
		{"OIDC", c.OIDC, &m.OidcUrls},
		{"Rekor", c.Rekor, &m.RekorTlogUrls},
		{"TSA", c.TSAs, &m.TsaUrls},
	} {
		var err error
		if *l.out, err = servicesToProto(l.in); err != nil {
			return nil, fmt.Errorf("encode %s services: %w", l.name, err)
		}
	}
	// A configuration of an empty list makes sigstore-js throw.
	if len(c.Rekor) > 0 {
		m.RekorTlogConfig = &trustpb.ServiceConfiguration{Selector: trustpb.ServiceSelector_ANY}
	}
	if len(c.TSAs) > 0 {
		m.TsaConfig = &trustpb.ServiceConfiguration{Selector: trustpb.ServiceSelector_ANY}
	}
	return marshal(m)
}

// ParseSigningConfig reads signing_config.v0.2.json strictly.
func ParseSigningConfig(data []byte) (SigningConfig, error) {
	var m trustpb.SigningConfig
	if err := unmarshal(data, &m); err != nil {
		return SigningConfig{}, fmt.Errorf("read signing configuration: %w", err)
	}
	if m.GetMediaType() != SigningConfigMediaType {
		return SigningConfig{}, fmt.Errorf("read signing configuration: media type %.80q: %w", m.GetMediaType(), ErrFormat)
	}
	for _, s := range []*trustpb.ServiceConfiguration{m.GetRekorTlogConfig(), m.GetTsaConfig()} {
		if s != nil && s.GetSelector() != trustpb.ServiceSelector_ANY {
			return SigningConfig{}, fmt.Errorf("read signing configuration: selector %s: %w", s.GetSelector(), ErrFormat)
		}
	}
	var c SigningConfig
	for _, l := range []struct {
		in  []*trustpb.Service
		out *[]Service
	}{
		{m.GetCaUrls(), &c.CAs},
		{m.GetOidcUrls(), &c.OIDC},
		{m.GetRekorTlogUrls(), &c.Rekor},
		{m.GetTsaUrls(), &c.TSAs},
	} {
		for _, s := range l.in {
			valid, err := validityFromProto(s.GetValidFor())
			if err != nil {
				return SigningConfig{}, fmt.Errorf("read service %.200q: %w", s.GetUrl(), err)
			}
			*l.out = append(*l.out, Service{s.GetUrl(), s.GetMajorApiVersion(), valid, s.GetOperator()})
		}
	}
	return c, nil
}

// WithServiceURL returns a copy in which the CA, the Rekor logs and the
// timestamp authorities answer at serviceURL (scheme, host and port). Paths,
// versions, validity, operators and the OpenID providers stay as they are.
func (c SigningConfig) WithServiceURL(serviceURL string) (SigningConfig, error) {
	base, err := url.Parse(serviceURL)
	if err != nil || checkURL(serviceURL) != nil || strings.Trim(base.Path, "/") != "" {
		return SigningConfig{}, fmt.Errorf("service URL %.200q: want scheme, host and port alone: %w", serviceURL, ErrIncomplete)
	}
	out := SigningConfig{OIDC: append([]Service(nil), c.OIDC...)}
	for _, l := range []struct {
		in  []Service
		out *[]Service
	}{{c.CAs, &out.CAs}, {c.Rekor, &out.Rekor}, {c.TSAs, &out.TSAs}} {
		for _, s := range l.in {
			u, err := url.Parse(s.URL)
			if err != nil {
				return SigningConfig{}, fmt.Errorf("service %.200q: %w", s.URL, ErrFormat)
			}
			u.Scheme, u.Host = base.Scheme, base.Host
			s.URL = u.String()
			*l.out = append(*l.out, s)
		}
	}
	return out, nil
}

// RewriteServiceURL reads a signing_config.v0.2.json and returns it for a
// service that has moved to serviceURL. Nothing else in it changes.
func RewriteServiceURL(signingConfig []byte, serviceURL string) ([]byte, error) {
	c, err := ParseSigningConfig(signingConfig)
	if err != nil {
		return nil, err
	}
	if c, err = c.WithServiceURL(serviceURL); err != nil {
		return nil, err
	}
	return c.Marshal()
}

// MarshalClientConfig returns client_trust_config.json (sigstore-python's
// --trust-config), which embeds the two other files.
func MarshalClientConfig(trustedRoot, signingConfig []byte) ([]byte, error) {
	if _, err := ParseRoot(trustedRoot); err != nil {
		return nil, err
	}
	if _, err := ParseSigningConfig(signingConfig); err != nil {
		return nil, err
	}
	raw, err := json.Marshal(struct {
		MediaType     string          `json:"mediaType"`
		TrustedRoot   json.RawMessage `json:"trustedRoot"`
		SigningConfig json.RawMessage `json:"signingConfig"`
	}{ClientConfigMediaType, trustedRoot, signingConfig})
	if err != nil {
		return nil, fmt.Errorf("encode client trust configuration: %w", err)
	}
	return indent(raw)
}

func servicesToProto(in []Service) ([]*trustpb.Service, error) {
	var out []*trustpb.Service
	for _, s := range in {
		if err := checkURL(s.URL); err != nil {
			return nil, err
		}
		if strings.HasSuffix(s.URL, "/") || s.MajorAPIVersion == 0 || s.Operator == "" {
			return nil, fmt.Errorf("service %s: final slash, no version or no operator: %w", s.URL, ErrIncomplete)
		}
		valid, err := s.Validity.toProto()
		if err != nil {
			return nil, fmt.Errorf("service %s: %w", s.URL, err)
		}
		out = append(out, &trustpb.Service{
			Url: s.URL, MajorApiVersion: s.MajorAPIVersion, ValidFor: valid, Operator: s.Operator,
		})
	}
	return out, nil
}
