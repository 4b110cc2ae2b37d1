package identity

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/publicsuffix"
	"golang.org/x/time/rate"
)

const (
	// maxFederated is how many issuers found by a pattern are kept at once.
	maxFederated = 64
	// federateBurst new ones may be met at once, then one in federateEvery:
	// anybody can make up a token whose issuer fits a pattern, and each costs
	// a fetch.
	federateBurst = 8
	federateEvery = 2 * time.Second
	// probation is how long a new issuer is kept before a token of it has
	// verified, and idleTime how long one is kept that is not used.
	probation = time.Minute
	idleTime  = time.Hour
)

// pattern is a meta-issuer (Fulcio 1.8, pkg/config).
type pattern struct {
	text  string
	match *regexp.Regexp
	// template is the configuration of every issuer that fits.
	template Issuer
	config   Config
}

// pattern checks a meta-issuer.
func (c Config) pattern(text string, issuer Issuer) (pattern, error) {
	if issuer.IssuerURL != "" && issuer.IssuerURL != text {
		return pattern{}, fmt.Errorf("has issuer-url %.200q", issuer.IssuerURL)
	}
	if err := checkPattern(text); err != nil {
		return pattern{}, err
	}
	if issuer.Type == "spiffe" {
		return pattern{}, errors.New("type spiffe needs one issuer for a trust domain")
	}
	if issuer.KeysFile != "" || issuer.DiscoveryFile != "" {
		return pattern{}, errors.New("files of keys belong to one issuer")
	}
	quoted := strings.ReplaceAll(regexp.QuoteMeta(text), `\*`, `[-_a-zA-Z0-9]+`)
	match, err := regexp.Compile("^" + quoted + "$")
	if err != nil {
		return pattern{}, err
	}
	p := pattern{text: text, match: match, template: issuer, config: c}
	_, err = p.issuer(p.example())
	return p, err
}

// issuer is the configuration of one issuer that fits. As in Fulcio it has the
// pattern's challenge-claim and spiffe-trust-domain not.
func (p pattern) issuer(url string) (known, error) {
	i := p.template
	i.IssuerURL, i.ChallengeClaim, i.SPIFFETrustDomain = url, "", ""
	k, err := p.config.know(i)
	k.pattern = p.text
	return k, err
}

// example is the URL of an issuer that fits.
func (p pattern) example() string { return strings.ReplaceAll(p.text, "*", "x") }

// checkPattern refuses a pattern that could match a host of anybody: a
// wildcard stands neither in scheme, user information or port nor in the part of
// the host that is registered.
func checkPattern(text string) error {
	rest, ok := strings.CutPrefix(text, "https://")
	if !ok {
		if rest, ok = strings.CutPrefix(text, "http://"); !ok {
			return errors.New("is not an https URL")
		}
	}
	if !strings.Contains(text, "*") {
		return errors.New("has no wildcard: it belongs in oidc-issuers")
	}
	authority, _, _ := strings.Cut(rest, "/")
	host, port, _ := strings.Cut(authority, ":")
	if strings.Contains(port, "*") || strings.Contains(authority, "@") || anybodys(host) {
		return errors.New("has a wildcard where anybody's host would fit")
	}
	if _, err := url.Parse(strings.ReplaceAll(text, "*", "x")); err != nil {
		return errors.New("is not a URL")
	}
	return nil
}

// anybodys says whether a wildcard stands in the part of a host name that
// anybody can register: in the last two labels, or in the one before a public
// suffix such as co.uk.
func anybodys(host string) bool {
	labels := strings.Split(host, ".")
	registered := strings.Join(labels[max(0, len(labels)-2):], ".")
	suffix, known := publicsuffix.PublicSuffix(strings.ReplaceAll(strings.ToLower(host), "*", "x"))
	if n := strings.Count(suffix, ".") + 2; known && n <= len(labels) {
		registered += "." + strings.Join(labels[len(labels)-n:], ".")
	}
	return strings.Contains(registered, "*")
}

// sortPatterns puts the pattern with the most fixed characters first, so that
// the answer does not depend on the order of a map.
func sortPatterns(patterns []pattern) {
	fixed := func(p pattern) int { return len(p.text) - strings.Count(p.text, "*") }
	slices.SortFunc(patterns, func(a, b pattern) int {
		return cmp.Or(cmp.Compare(fixed(b), fixed(a)), strings.Compare(a.text, b.text))
	})
}

// federation holds the issuers that were met through a pattern. It is safe for
// concurrent use. What an unauthenticated token can make it do is bounded:
// issuers by maxFederated, new ones by bucket, and one whose tokens do not
// verify is forgotten after probation.
type federation struct {
	patterns []pattern
	start    func(known) (*source, context.CancelFunc, error)
	bucket   *rate.Limiter

	mu      sync.Mutex
	members map[string]*member // by iss; guarded by mu
	closed  bool               // no more are met; guarded by mu
}

// member is an issuer that fits a pattern.
type member struct {
	*source
	pattern string
	stop    context.CancelFunc
	proven  bool      // a token of it has verified
	used    time.Time // last, by a token that verified; before that, when it was met
}

func newFederation(patterns []pattern, start func(known) (*source, context.CancelFunc, error)) *federation {
	return &federation{
		patterns: patterns, start: start, members: map[string]*member{},
		bucket: rate.NewLimiter(rate.Every(federateEvery), federateBurst),
	}
}

// match returns the pattern that an issuer fits. Errors: ErrToken.
func (f *federation) match(iss string) (pattern, error) {
	at := slices.IndexFunc(f.patterns, func(p pattern) bool { return p.match.MatchString(iss) })
	if at < 0 {
		return pattern{}, refuse("issuer is not configured")
	}
	return f.patterns[at], nil
}

// open returns the source of an issuer that fits a pattern. Errors:
// ErrUnavailable when too many new issuers are met, and after close.
func (f *federation) open(p pattern, iss string) (*source, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m, ok := f.members[iss]; ok {
		return m.source, nil
	}
	if f.closed {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, errClosed)
	}
	if !f.bucket.Allow() || !f.room(time.Now()) {
		return nil, fmt.Errorf("%w: too many issuers at once", ErrUnavailable)
	}
	k, err := p.issuer(iss)
	if err != nil {
		return nil, refuse("issuer does not make a configuration")
	}
	s, stop, err := f.start(k)
	if err != nil {
		return nil, err
	}
	m := &member{source: s, pattern: p.text, stop: stop, used: time.Now()}
	f.members[iss] = m
	time.AfterFunc(probation, func() { f.endProbation(iss, m) })
	return s, nil
}

// close keeps new issuers from being met.
func (f *federation) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
}

// endProbation forgets an issuer of which no token has verified.
func (f *federation) endProbation(iss string, m *member) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !m.proven {
		f.forget(iss, m)
	}
}

// room says whether another member has a place, and makes one if it can: by
// the proven member that was not used for the longest time, if that is idle.
func (f *federation) room(now time.Time) bool {
	if len(f.members) < maxFederated {
		return true
	}
	var oldest string
	for iss, m := range f.members {
		if m.proven && (oldest == "" || m.used.Before(f.members[oldest].used)) {
			oldest = iss
		}
	}
	if oldest == "" || now.Sub(f.members[oldest].used) < idleTime {
		return false
	}
	f.forget(oldest, f.members[oldest])
	return true
}

// forget ends a member's fetches. The caller holds mu.
func (f *federation) forget(iss string, m *member) {
	if f.members[iss] == m {
		delete(f.members, iss)
	}
	m.stop()
}

// health is Verifier.Health for the members of which a token has verified.
func (f *federation) health() []IssuerHealth {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []IssuerHealth
	for iss, m := range f.members {
		if m.proven {
			h := m.keys.health()
			h.Issuer, h.Pattern = iss, m.pattern
			out = append(out, h)
		}
	}
	return out
}

// proven notes that a token of the issuer has verified.
func (f *federation) proven(iss string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m, ok := f.members[iss]; ok {
		m.proven, m.used = true, time.Now()
	}
}
