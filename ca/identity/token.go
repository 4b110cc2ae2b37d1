package identity

import (
	"encoding/base64"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
)

const (
	// maxToken bounds a raw token in octets, before anything looks into it.
	maxToken = 16 << 10
	// leeway is how far nbf and iat may lie ahead of our clock. exp has none.
	leeway = 5 * time.Minute
)

// algorithms are the signature algorithms that we accept, all of them
// asymmetric (RFC 7518, Section 3.1; RFC 8037): never HS256, whose key would
// be the public key, never none.
var algorithms = []string{
	oidc.RS256, oidc.RS384, oidc.RS512,
	oidc.ES256, oidc.ES384, oidc.ES512,
	oidc.PS256, oidc.PS384, oidc.PS512,
	oidc.EdDSA,
}

// token is a token that has been taken apart and not yet verified.
type token struct {
	raw       string
	signed    string // the signing input (RFC 7515, Section 5.2): raw without its signature
	algorithm string // one of algorithms
	keyID     string // may be empty
	claims    claims
}

// parseToken takes a compact JWS apart. It refuses by size and form before it
// decodes, and decodes strictly.
func parseToken(raw string) (*token, error) {
	if raw == "" {
		return nil, refuse("no token")
	}
	if len(raw) > maxToken {
		return nil, refuse("token is too long")
	}
	head, rest, ok := strings.Cut(raw, ".")
	body, signature, ok2 := strings.Cut(rest, ".")
	if !ok || !ok2 || signature == "" || strings.ContainsAny(raw, "\r\n") || strings.Contains(signature, ".") {
		// Line breaks: encoding/base64 would skip them.
		return nil, refuse("token is not a signed compact JWS")
	}
	header, err := decodeSegment(head)
	if err != nil {
		return nil, refuse("header is not strict JSON")
	}
	t := &token{raw: raw, signed: raw[:len(head)+1+len(body)], algorithm: header.text("alg"), keyID: header.text("kid")}
	if err := t.checkHeader(header); err != nil {
		return nil, err
	}
	if t.claims, err = decodeSegment(body); err != nil {
		return nil, refuse("payload is not strict JSON")
	}
	return t, nil
}

func decodeSegment(segment string) (claims, error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(segment)
	if err != nil {
		return nil, err
	}
	return parseClaims(b)
}

func (t *token) checkHeader(header claims) error {
	_, critical := header["crit"]
	kind := strings.ToLower(header.text("typ"))
	switch {
	case !slices.Contains(algorithms, t.algorithm):
		return refuse("signature algorithm is not allowed")
	case critical:
		return refuse("header has critical extensions") // RFC 7515, 4.1.11: none is understood
	case strings.HasSuffix(kind, "+jwt"):
		// RFC 8725, 3.11: at+jwt, logout+jwt, secevent+jwt and so on say what
		// they are for; ID tokens have no such type.
		return refuse("header names another kind of token")
	}
	return nil
}

// check looks at the claims that every token must have (OpenID Connect Core
// 1.0, Sections 2 and 3.1.3.7).
func (t *token) check(audience string, now time.Time) error {
	expiry, ok := t.claims.time("exp")
	if !ok || !expiry.After(now) {
		return refuse("token has expired or never does")
	}
	if _, given := t.claims["nbf"]; given {
		if nbf, ok := t.claims.time("nbf"); !ok || nbf.After(now.Add(leeway)) {
			return refuse("token is not valid yet")
		}
	}
	// Tokens that are not of OpenID Connect may lack it (JWT-SVID, Section 3).
	if _, given := t.claims["iat"]; given {
		if issued, ok := t.claims.time("iat"); !ok || issued.After(now.Add(leeway)) || !issued.Before(expiry) {
			return refuse("issue time is absurd")
		}
	}
	if !t.claims.hasAudience(audience) {
		return refuse("token is for another audience")
	}
	if t.claims.text("sub") == "" {
		return refuse("token has no subject")
	}
	if _, given := t.claims["events"]; given {
		return refuse("token reports events") // RFC 8417; OpenID Connect Back-Channel Logout 1.0, 2.4
	}
	return nil
}
