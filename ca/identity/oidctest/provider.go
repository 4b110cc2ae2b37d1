// Package oidctest is a small OpenID provider for the demo and for tests. It is
// never part of serve: it approves its one configured user without asking, and
// its key is an ordinary private key in memory.
//
// It is a real provider all the same, so that unmodified clients can use it:
// discovery and JWKS (OpenID Connect Discovery 1.0), the authorization code
// flow with PKCE S256 for a public client that listens on a loopback port (RFC
// 7636, RFC 8252), and the device flow (RFC 8628). Tokens are RS256, which is
// what cosign recognises as a token on its command line.
//
// Every store is bounded: at most maxPending codes wait at a time, each for at
// most a few minutes and for one use.
package oidctest

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	jose "github.com/go-jose/go-jose/v4"
)

// Defaults of Config.
const (
	DefaultClientID = "sigstore"
	DefaultSubject  = "demo-user"
	DefaultEmail    = "demo@example.com"
	DefaultLifetime = 10 * time.Minute
)

// keyBits is the size of a key that the provider makes itself.
const keyBits = 2048

// Config says who the provider is and whom it approves.
type Config struct {
	// Issuer is the provider's URL without a trailing slash, for example
	// "http://127.0.0.1:8081" or "http://127.0.0.1:8081/idp". Every endpoint
	// is below it, and it is the iss claim, octet for octet.
	Issuer string
	// Key signs the tokens; nil makes a fresh RSA-2048 key.
	Key *rsa.PrivateKey
	// ClientID is the one public client, and the aud claim. Default: sigstore.
	ClientID string
	// Subject and Email are the user that is approved: claims sub and email.
	Subject, Email string
	// EmailUnverified makes email_verified false.
	EmailUnverified bool
	// Lifetime is exp − iat of every token. Default: 10 minutes.
	Lifetime time.Duration
	// AutoApprove lets the device flow succeed at once. Otherwise it waits
	// until somebody has opened the verification URI.
	AutoApprove bool
	// Now is the clock; nil is time.Now.
	Now func() time.Time
}

// Provider is an OpenID provider. It is an http.Handler for the paths below
// the path of its issuer, and is safe for concurrent use.
type Provider struct {
	cfg    Config
	mux    *http.ServeMux
	codes  *pending[authorization]
	device *pending[deviceGrant]

	mu   sync.Mutex
	keys []signingKey // the last signs; all are published; guarded by mu
	next int          // number of the next key id; guarded by mu
	err  error        // why there is no first key; guarded by mu
}

type signingKey struct {
	id  string
	key *rsa.PrivateKey
}

// New makes a provider. A key that cannot be made, or an issuer that is no
// URL, is reported by Token and by every endpoint.
func New(cfg Config) *Provider {
	cfg = cfg.withDefaults()
	p := &Provider{cfg: cfg, mux: http.NewServeMux()}
	p.codes = newPending[authorization](cfg.Now, codeLifetime)
	p.device = newPending[deviceGrant](cfg.Now, deviceLifetime)
	u, err := url.Parse(cfg.Issuer)
	if err != nil || u.Host == "" {
		p.err = fmt.Errorf("issuer %q is not a URL", cfg.Issuer)
		return p
	}
	if cfg.Key == nil {
		if cfg.Key, p.err = rsa.GenerateKey(rand.Reader, keyBits); p.err != nil {
			return p
		}
	}
	p.addKey(cfg.Key)
	p.routes(strings.TrimSuffix(u.Path, "/"))
	return p
}

func (c Config) withDefaults() Config {
	set := func(s *string, value string) {
		if *s == "" {
			*s = value
		}
	}
	set(&c.ClientID, DefaultClientID)
	set(&c.Subject, DefaultSubject)
	set(&c.Email, DefaultEmail)
	if c.Lifetime == 0 {
		c.Lifetime = DefaultLifetime
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c
}

func (p *Provider) routes(prefix string) {
	p.mux.HandleFunc("GET "+prefix+"/.well-known/openid-configuration", p.serveDiscovery)
	p.mux.HandleFunc("GET "+prefix+"/jwks", p.serveKeys)
	p.mux.HandleFunc("GET "+prefix+"/auth", p.serveAuthorize)
	p.mux.HandleFunc("POST "+prefix+"/token", p.serveToken)
	p.mux.HandleFunc("POST "+prefix+"/device/code", p.serveDeviceCode)
	p.mux.HandleFunc("GET "+prefix+"/device", p.serveDevice)
}

// ServeHTTP answers the provider's endpoints; other paths are 404.
func (p *Provider) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	p.mux.ServeHTTP(w, r)
}

// Issuer returns the iss claim.
func (p *Provider) Issuer() string { return p.cfg.Issuer }

// Token signs a token for the configured user. claims overrides or adds
// claims; a claim whose value is nil is left out.
func (p *Provider) Token(claims map[string]any) (string, error) {
	payload, err := json.Marshal(p.Claims(claims))
	if err != nil {
		return "", fmt.Errorf("encode claims: %w", err)
	}
	return p.Sign(payload)
}

// Claims returns what Token would sign.
func (p *Provider) Claims(override map[string]any) map[string]any {
	now := p.cfg.Now()
	all := map[string]any{
		"iss":            p.cfg.Issuer,
		"sub":            p.cfg.Subject,
		"aud":            p.cfg.ClientID,
		"iat":            now.Unix(),
		"exp":            now.Add(p.cfg.Lifetime).Unix(),
		"email":          p.cfg.Email,
		"email_verified": !p.cfg.EmailUnverified,
	}
	for name, value := range override {
		if value == nil {
			delete(all, name)
			continue
		}
		all[name] = value
	}
	return all
}

// Sign returns the compact JWS (RFC 7515, Section 7.1) of payload under the
// newest key, whatever payload is: tests make malformed tokens with it.
func (p *Provider) Sign(payload []byte) (string, error) {
	key, err := p.signing()
	if err != nil {
		return "", err
	}
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key.key, KeyID: key.id}},
		(&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return "", fmt.Errorf("make token signer: %w", err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		return "", fmt.Errorf("sign token: %w", err)
	}
	return jws.CompactSerialize()
}

// Rotate makes key (nil: a fresh one) the signing key and goes on publishing
// the ones before. It returns the new key's id.
func (p *Provider) Rotate(key *rsa.PrivateKey) (string, error) {
	if key == nil {
		var err error
		if key, err = rsa.GenerateKey(rand.Reader, keyBits); err != nil {
			return "", fmt.Errorf("generate signing key: %w", err)
		}
	}
	return p.addKey(key), nil
}

// Retire stops publishing every key but the newest.
func (p *Provider) Retire() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.keys); n > 1 {
		p.keys = p.keys[n-1:]
	}
}

// JWKS returns the published keys as a JSON Web Key Set (RFC 7517).
func (p *Provider) JWKS() jose.JSONWebKeySet {
	p.mu.Lock()
	defer p.mu.Unlock()
	var set jose.JSONWebKeySet
	for _, k := range p.keys {
		set.Keys = append(set.Keys, jose.JSONWebKey{
			Key: k.key.Public(), KeyID: k.id, Algorithm: string(jose.RS256), Use: "sig",
		})
	}
	return set
}

func (p *Provider) addKey(key *rsa.PrivateKey) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.next++
	id := fmt.Sprintf("%s-%d", keyThumbprint(key), p.next)
	p.keys = append(p.keys, signingKey{id: id, key: key})
	return id
}

// keyThumbprint is the start of the key's thumbprint (RFC 7638), so that a
// provider that starts again with the same key keeps its key id.
func keyThumbprint(key *rsa.PrivateKey) string {
	jwk := jose.JSONWebKey{Key: key.Public()}
	sum, err := jwk.Thumbprint(thumbprintHash)
	if err != nil {
		return "key"
	}
	return fmt.Sprintf("%x", sum[:8])
}

var errNoKey = errors.New("provider has no signing key")

func (p *Provider) signing() (signingKey, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		return signingKey{}, p.err
	}
	if len(p.keys) == 0 {
		return signingKey{}, errNoKey
	}
	return p.keys[len(p.keys)-1], nil
}
