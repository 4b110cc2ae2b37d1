package identity

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	jose "github.com/go-jose/go-jose/v4"
)

const (
	// maxKeys bounds an issuer's key set; a larger one is refused whole.
	maxKeys = 64
	// minRSA and maxRSA bound an issuer's RSA key, in bits: a larger one would
	// make every token cost more than it should.
	minRSA = 2048
	maxRSA = 8192
)

// source is one configured issuer.
type source struct {
	issuer Issuer
	kind   kind
	client *http.Client
	keys   *keyring
	// readFile reads the issuer's files, if it has any.
	readFile func(string) ([]byte, error)
	// hide takes an issuer that a token named out of an error's text, which
	// goes to the log; nil for one that is configured.
	hide *strings.Replacer
}

func newSource(from known, opts Options) (*source, error) {
	issuer := from.Issuer
	u, err := url.Parse(issuer.IssuerURL)
	if err != nil {
		return nil, fmt.Errorf("%w: parse issuer-url: %w", ErrConfig, err)
	}
	if err := checkURL(u, opts.LoopbackHTTP); err != nil {
		return nil, fmt.Errorf("%w: issuer %.200q: %w", ErrConfig, issuer.IssuerURL, err)
	}
	client, err := newClient(issuer, opts)
	if err != nil {
		return nil, err
	}
	s := &source{issuer: issuer, kind: from.kind, client: client, readFile: opts.ReadFile}
	if from.pattern != "" {
		s.hide = strings.NewReplacer(issuer.IssuerURL, "ISSUER", u.Host, "HOST", u.Hostname(), "HOST")
	}
	if (issuer.KeysFile != "" || issuer.DiscoveryFile != "") && opts.ReadFile == nil {
		return nil, fmt.Errorf("%w: issuer %.200q: its files cannot be read here", ErrConfig, issuer.IssuerURL)
	}
	s.keys = newKeyring(s.fetch, client.CloseIdleConnections, opts.Logger.With("issuer", from.name()))
	s.keys.wait = cmp.Or(opts.wait, askWait)
	return s, nil
}

// principal maps a verified token's claims.
func (s *source) principal(t *token) (*Principal, error) {
	p, err := s.kind.principal(s.issuer, t.claims)
	if err != nil {
		return nil, err
	}
	p.Token = t.use(s.issuer)
	return p, nil
}

// verify checks the token's signature with the issuer's keys. When none verifies
// it the keys may be old: an issuer may give a new key the id of the one before
// (Jenkins does), or have none. They are then fetched once more, within the limits
// of unknown ids.
func (s *source) verify(ctx context.Context, t *token, now time.Time) error {
	q := s.keys.inquire(t.keyID)
	set, keys, err := q.find(ctx)
	for err == nil {
		err = s.verifyWith(ctx, set, keys, t, now)
		if err == nil || !q.renew(ctx, set) {
			return err
		}
		set, keys, err = q.find(ctx)
	}
	return err
}

// verifyWith tries keys of a set, and has go-oidc check issuer, audience and times
// a second time, on what was signed.
func (s *source) verifyWith(ctx context.Context, set *snapshot, keys []jose.JSONWebKey, t *token, now time.Time) error {
	if !slices.Contains(set.algorithms, t.algorithm) {
		return refuse("signature algorithm is not the issuer's")
	}
	verifier := oidc.NewVerifier(s.issuer.IssuerURL, candidates(keys), &oidc.Config{
		ClientID:             s.issuer.ClientID,
		SupportedSigningAlgs: []string{t.algorithm},
		Now:                  func() time.Time { return now },
	})
	if _, err := verifier.Verify(ctx, t.raw); err != nil {
		return refuse("signature does not verify") // err may quote claims
	}
	return nil
}

// candidates is an oidc.KeySet of the keys that may have signed a token.
type candidates []jose.JSONWebKey

var errSignature = errors.New("no key verifies the signature")

// VerifySignature implements oidc.KeySet.
func (c candidates) VerifySignature(_ context.Context, raw string) ([]byte, error) {
	jws, err := jose.ParseSignedCompact(raw, joseAlgorithms)
	if err != nil {
		return nil, errSignature
	}
	for _, key := range c {
		if key.Algorithm != "" && key.Algorithm != jws.Signatures[0].Header.Algorithm {
			continue
		}
		if payload, err := jws.Verify(key.Key); err == nil && saltFits(key.Key, raw, jws.Signatures[0]) {
			return payload, nil
		}
	}
	return nil, errSignature
}

// saltFits says whether the salt of an RSA-PSS signature, which go-jose has
// verified with a salt of any length, is as long as the hash (RFC 7518, Section
// 3.5). It is true for other algorithms.
func saltFits(key any, raw string, sig jose.Signature) bool {
	hash, pss := pssHashes[sig.Header.Algorithm]
	if !pss {
		return true
	}
	public, ok := key.(*rsa.PublicKey)
	if !ok {
		return false
	}
	h := hash.New()
	h.Write([]byte(raw[:strings.LastIndexByte(raw, '.')]))
	return rsa.VerifyPSS(public, hash, h.Sum(nil), sig.Signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
}

var pssHashes = map[string]crypto.Hash{oidc.PS256: crypto.SHA256, oidc.PS384: crypto.SHA384, oidc.PS512: crypto.SHA512}

var joseAlgorithms = func() (out []jose.SignatureAlgorithm) {
	for _, a := range algorithms {
		out = append(out, jose.SignatureAlgorithm(a))
	}
	return out
}()

// metadata is what we need of a discovery document (OpenID Connect Discovery
// 1.0, Section 3).
type metadata struct {
	Issuer     string   `json:"issuer"`
	Keys       string   `json:"jwks_uri"`
	Algorithms []string `json:"id_token_signing_alg_values_supported"`
}

// fetch reads the issuer's keys. Of an issuer that no configuration names the
// error says only what was wrong.
func (s *source) fetch(ctx context.Context) (*snapshot, error) {
	set, err := s.read(ctx)
	if err != nil && s.hide != nil && !errors.Is(err, errNoKeys) {
		err = errors.New(s.hide.Replace(err.Error()))
	}
	return set, err
}

// read reads the discovery document and the key set, each from where the
// configuration says.
func (s *source) read(ctx context.Context) (*snapshot, error) {
	if s.issuer.KeysFile != "" {
		return s.readKeys()
	}
	meta, err := s.discover(ctx)
	if err != nil {
		return nil, err
	}
	set := &snapshot{algorithms: usable(meta.Algorithms)}
	if len(set.algorithms) == 0 {
		return nil, errors.New("issuer offers no signature algorithm that is allowed")
	}
	body, header, err := s.get(ctx, meta.Keys)
	if err != nil {
		return nil, brief("read key set", err)
	}
	set.lifetime = lifetime(header.Get("Cache-Control"))
	if set.keys, err = parseKeys(body); err != nil {
		return nil, brief("parse key set", err)
	}
	return set, nil
}

// readKeys reads a key set from its file. It says nothing of algorithms; each
// key takes those of its type.
func (s *source) readKeys() (*snapshot, error) {
	body, err := s.file(s.issuer.KeysFile)
	if err != nil {
		return nil, err
	}
	keys, err := parseKeys(body)
	if err != nil {
		return nil, brief("parse key set", err)
	}
	return &snapshot{keys: keys, algorithms: algorithms, lifetime: minRefresh}, nil
}

// discover gets the discovery document.
func (s *source) discover(ctx context.Context) (metadata, error) {
	var meta metadata
	if s.issuer.DiscoveryFile == "" {
		provider, err := oidc.NewProvider(oidc.ClientContext(ctx, s.client), s.issuer.IssuerURL)
		if err != nil {
			return meta, brief("discover issuer", err)
		}
		if err := provider.Claims(&meta); err != nil {
			return meta, brief("read discovery document", err)
		}
		return meta, nil
	}
	body, err := s.file(s.issuer.DiscoveryFile)
	if err != nil {
		return meta, err
	}
	if err := json.Unmarshal(body, &meta); err != nil {
		return meta, errors.New("discovery-file is not a discovery document")
	}
	if meta.Issuer != s.issuer.IssuerURL {
		return meta, errors.New("discovery-file is of another issuer")
	}
	return meta, nil
}

// file reads a file of the issuer.
func (s *source) file(path string) ([]byte, error) {
	body, err := s.readFile(path)
	if err != nil {
		return nil, brief("read file", err)
	}
	if len(body) > maxAnswer {
		return nil, errTooLarge
	}
	return body, nil
}

func (s *source) get(ctx context.Context, url string) ([]byte, http.Header, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, nil, err
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return nil, nil, fmt.Errorf("status %d", resp.StatusCode)
	}
	body, err := io.ReadAll(resp.Body)
	return body, resp.Header, err
}

// brief keeps an error's text short: some quote the whole answer.
func brief(what string, err error) error {
	if errors.Is(err, errNoKeys) {
		return fmt.Errorf("%s: %w", what, err)
	}
	return fmt.Errorf("%s: %.200s", what, err.Error())
}

// usable are the algorithms that the issuer advertises and we allow; RS256 if
// it advertises none (OpenID Connect Core 1.0, Section 3.1.3.7).
func usable(advertised []string) []string {
	if len(advertised) == 0 {
		return []string{oidc.RS256}
	}
	var out []string
	for _, a := range algorithms {
		if slices.Contains(advertised, a) {
			out = append(out, a)
		}
	}
	return out
}

// parseKeys reads a JSON Web Key Set (RFC 7517, Section 5). Keys that cannot
// verify a token are left out: of unknown type, for encryption, symmetric,
// private, too short or long. Errors: errNoKeys if none is left.
func parseKeys(body []byte) ([]jose.JSONWebKey, error) {
	var raw struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(body, &raw); err != nil {
		return nil, errors.New("not a JSON Web Key Set")
	}
	if len(raw.Keys) > maxKeys {
		return nil, fmt.Errorf("%d keys, at most %d", len(raw.Keys), maxKeys)
	}
	var keys []jose.JSONWebKey
	for _, r := range raw.Keys {
		var key jose.JSONWebKey
		if err := json.Unmarshal(r, &key); err == nil && signs(key) && mayVerify(r) {
			keys = append(keys, key)
		}
	}
	if len(keys) == 0 {
		return nil, errNoKeys
	}
	return keys, nil
}

// mayVerify says whether a key's operations, if it names them, have verify (RFC
// 7517, Section 4.3).
func mayVerify(key []byte) bool {
	var named struct {
		Operations []string `json:"key_ops"`
	}
	err := json.Unmarshal(key, &named)
	return err == nil && (named.Operations == nil || slices.Contains(named.Operations, "verify"))
}

// errNoKeys: the key set could be read, and no token can be verified with it.
// It is the issuer's word, so that the keys known before go at once.
var errNoKeys = errors.New("no key that can verify a token")

// signs says whether a key may verify tokens.
func signs(key jose.JSONWebKey) bool {
	if key.Use != "" && key.Use != "sig" {
		return false
	}
	if key.Algorithm != "" && !slices.Contains(algorithms, key.Algorithm) {
		return false
	}
	switch k := key.Key.(type) {
	case *rsa.PublicKey:
		return k.N.BitLen() >= minRSA && k.N.BitLen() <= maxRSA && k.E >= 3 && k.E%2 == 1 && !hasSmallFactor(k.N)
	case ed25519.PublicKey:
		return checkEd25519(k) == nil
	case *ecdsa.PublicKey:
		return key.Valid()
	}
	return false
}
