// Package identity decides who is asking: it turns an OpenID Connect ID token
// into a Principal, the identity that a certificate may carry, and checks that
// the asker holds the private key that the certificate will name.
//
// Data flows one way: raw token → parsed and still unverified (token.go) → the
// one configured issuer that its iss names → signature, by a key of that
// issuer (source.go, keys.go) → claims → Principal, by the row of the
// issuer's type (mapping.go).
//
// The package promises:
//   - A token is at most 16 KiB, has one of our asymmetric algorithms, exactly
//     the configured issuer, our audience, an expiry in the future and no
//     repeated JSON name, before a key is looked for. Keys come only from the
//     issuer's own key set: jwk, jku, x5u and x5c in a header are ignored.
//   - Whatever a token says, the network is reached only for configured
//     issuers, over https, without redirects, not in private networks unless
//     configured, for at most 256 KiB per answer, and for tokens that no known key
//     verifies at most twice at once and then once in 30 s (client.go, keys.go).
//   - No error, log line or answer contains a token or a claim, nor the URL of
//     an issuer before a token of it has verified, unless it is configured.
//
// Where it refuses what Fulcio 1.8 would certify, the names it does certify are
// the same octets: repeated or over-large JSON, tokens of another kind by their
// type, an issue time in the future, paths that lead elsewhere than they say or collapse, integers that
// float64 would round, user names that mix scripts, templates that repeat, names
// of a preset beyond its provider's site, client keys that are known to be weak.
//
// It trusts the configured issuers to say who their users are, the web PKI (or
// the issuer's configured ca-cert) for who the issuers are, and the clock.
package identity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sort"
	"sync"
	"time"

	"github.com/sigstore/fulcio/pkg/certificate"

	"github.com/chancery-ca/chancery/ca/profile"
)

// Errors that callers branch on. The texts around them name the check that
// refused, never what the token contained.
var (
	// ErrToken: the token does not authenticate anybody here.
	ErrToken = errors.New("identity token refused")
	// ErrMapping: the token is genuine, and its identity cannot be put into a
	// certificate.
	ErrMapping = errors.New("identity cannot be certified")
	// ErrUnavailable: no key of the issuer is known because the issuer could
	// not be reached.
	ErrUnavailable = errors.New("identity provider not available")
	// ErrClock: the clock refuses to say what time it is.
	ErrClock = errors.New("clock not available")
	// ErrConfig: the configuration contradicts itself or asks for what is not
	// supported.
	ErrConfig = errors.New("identity configuration refused")
)

// Principal is an authenticated identity. It is the only thing that leaves
// this package about a token.
type Principal struct {
	// SAN is the subject alternative name of the certificate.
	SAN profile.SAN
	// Extensions are the Fulcio extensions, arc 1.3.6.1.4.1.57264.1.
	Extensions certificate.Extensions
	// Challenges are the values of which the proof of possession may sign one
	// (see ProveKey). All come from the same token.
	Challenges []string
	// Issuer and Subject are the token's iss and sub.
	Issuer, Subject string
	// Token stands for the token itself, to count its uses.
	Token TokenUse

	claims claims // for Claim
}

// Claim returns the values of a claim of the token as texts: one of a string,
// number or boolean, each element's of a list, none of a claim that is missing,
// null or an object. The names of objects and a claim in them are joined by >.
// It is for the policy alone: claims go into no log, audit or answer.
func (p *Principal) Claim(path string) []string {
	return p.claims.values(path)
}

// Options are what the verifier needs beside the issuers.
type Options struct {
	// Now is the clock against which tokens are checked. Required. An error
	// refuses every token with ErrClock.
	Now func() (time.Time, error)
	// Logger gets a line when an issuer's keys could not be fetched; nil
	// discards.
	Logger *slog.Logger
	// LoopbackHTTP allows issuers with http URLs whose host is a loopback
	// address: for the demo and tests.
	LoopbackHTTP bool
	// ReadFile reads a file of an issuer's configuration (KeysFile,
	// DiscoveryFile), at most 256 KiB; nil if there is none. It is called
	// again and again, from one goroutine for each issuer.
	ReadFile func(path string) ([]byte, error)
	// PrivateNetworks are networks that are not on the public Internet in
	// which issuers may be. Without them only public addresses are dialled.
	PrivateNetworks []netip.Prefix

	// wait is how long a request waits for keys at most; 0 is askWait. Tests that
	// go over real sockets take longer on a busy machine.
	wait time.Duration
}

// Verifier authenticates tokens of the configured issuers. It is safe for
// concurrent use. Close ends its background refreshes.
type Verifier struct {
	issuers map[string]*source // by iss, octet for octet
	others  *federation        // issuers by pattern
	now     func() (time.Time, error)
	config  Config

	cancel context.CancelFunc
	done   sync.WaitGroup // one per source
}

// New checks cfg and begins to fetch the issuers' keys in the background, until
// ctx ends or Close is called. It does not wait for them, so that an identity
// provider that is down does not keep the service from starting. Errors:
// ErrConfig.
func New(ctx context.Context, cfg Config, opts Options) (*Verifier, error) {
	if opts.Now == nil {
		return nil, fmt.Errorf("%w: no clock", ErrConfig)
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	all, err := cfg.resolve()
	if err != nil {
		return nil, err
	}
	v := &Verifier{issuers: make(map[string]*source, len(all.issuers)), now: opts.Now, config: cfg}
	for url, issuer := range all.issuers {
		s, err := newSource(issuer, opts)
		if err != nil {
			return nil, err
		}
		v.issuers[url] = s
	}
	for _, p := range all.patterns {
		// As any of its issuers would be made, to find a fault now.
		k, err := p.issuer(p.example())
		if err == nil {
			_, err = newSource(k, opts)
		}
		if err != nil {
			return nil, fmt.Errorf("meta-issuer %.200q: %w", p.text, err)
		}
	}
	ctx, v.cancel = context.WithCancel(ctx)
	for _, s := range v.issuers {
		v.done.Go(func() { s.keys.run(ctx) })
	}
	v.others = newFederation(all.patterns, func(k known) (*source, context.CancelFunc, error) {
		s, err := newSource(k, opts)
		if err != nil {
			return nil, nil, err
		}
		ctx, stop := context.WithCancel(ctx)
		v.done.Go(func() { s.keys.run(ctx) })
		return s, stop, nil
	})
	return v, nil
}

// Close ends the background refreshes and waits for them.
func (v *Verifier) Close() {
	v.cancel()
	v.others.close() // it starts what done waits for
	v.done.Wait()
}

// Config returns the configuration that the verifier was made with.
func (v *Verifier) Config() Config { return v.config }

// Health says for every configured issuer, and every one by a pattern of which a
// token has verified, in order of their URLs, how its keys are.
func (v *Verifier) Health() []IssuerHealth {
	out := v.others.health()
	for url, s := range v.issuers {
		h := s.keys.health()
		h.Issuer = url
		out = append(out, h)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Issuer < out[j].Issuer })
	return out
}

// IssuerHealth is the state of an issuer's keys.
type IssuerHealth struct {
	Issuer string
	// Pattern is the meta-issuer that it fits, "" for one that is configured.
	Pattern string
	// Keys is how many keys tokens can be verified with, none if they are stale,
	// and Fetched when they were last fetched (zero: never).
	Keys    int
	Fetched time.Time
	// Err is why the last fetch went wrong, or nil.
	Err error
}

// Verify authenticates a raw ID token (a compact JWS, RFC 7515, Section 7.1).
// It waits for the network only when the token's key is not known, and then
// for at most 2 s. Errors: ErrToken, ErrMapping, ErrUnavailable, ErrClock.
func (v *Verifier) Verify(ctx context.Context, raw string) (*Principal, error) {
	now, err := v.now()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrClock, err)
	}
	t, err := parseToken(raw)
	if err != nil {
		return nil, err
	}
	s, exact, err := v.source(t, now)
	if err != nil {
		return nil, err
	}
	if err := s.verify(ctx, t, now); err != nil {
		return nil, err
	}
	if !exact {
		v.others.proven(s.issuer.IssuerURL)
	}
	return s.principal(t)
}

// source finds the one issuer that a token names, and checks the token's claims
// before that costs anything. exact is false for an issuer by a pattern.
func (v *Verifier) source(t *token, now time.Time) (s *source, exact bool, err error) {
	iss := t.claims.text("iss")
	if s, exact = v.issuers[iss]; exact {
		return s, true, t.check(s.issuer.ClientID, now)
	}
	p, err := v.others.match(iss)
	if err != nil {
		return nil, false, err
	}
	if err := t.check(p.template.ClientID, now); err != nil {
		return nil, false, err
	}
	s, err = v.others.open(p, iss)
	return s, false, err
}

// refuse is ErrToken with its reason, which must be a constant.
func refuse(reason string) error { return fmt.Errorf("%w: %s", ErrToken, reason) }
