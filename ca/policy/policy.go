// Package policy decides which authenticated identity may have a certificate,
// and explains the decision.
//
// A Policy is an ordered list of rules. The first rule that fits decides; when
// none fits the answer is no. A rule fits when everything that it names fits:
// the issuer, the name in the certificate, and claims of the token. An allow
// rule also says which keys it allows and how long a certificate lives; a key
// that it does not allow is a no, and no later rule is asked.
//
// The package promises that a decision depends on nothing but the policy and
// the Subject, that every rule that was looked at is in Decision.Trace, and
// that a claim that a token does not have fits no pattern (a deny rule on a
// claim therefore does not fit a token without it: a policy that must be closed
// ends in what it allows, not in what it denies).
//
// It trusts its caller for the Subject: it is what a verified token says.
package policy

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/chancery-ca/chancery/ca/profile"
)

// ErrInvalid: the rules contradict themselves or say nothing.
var ErrInvalid = errors.New("invalid policy")

// Effect is what a rule does when it fits.
type Effect string

// The effects.
const (
	Allow Effect = "allow"
	Deny  Effect = "deny"
)

// Rule is one rule. What is empty fits everything.
type Rule struct {
	// Name is how logs and explanations call the rule: [a-z0-9-]{1,64}, unique.
	Name string
	// Effect is Allow or Deny.
	Effect Effect
	// Issuer is the token's iss, octet for octet.
	Issuer string
	// Identity is a pattern (see Pattern) of the name in the certificate.
	Identity string
	// Claims are patterns of the token's claims, by name; the names of objects
	// and a claim in them are joined by > (kubernetes.io>namespace). A claim
	// that is a list fits when one of its elements does; numbers and booleans
	// are taken as JSON writes them.
	Claims map[string]string
	// Keys, of an allow rule, are the key types that it allows: ecdsa-p256,
	// ecdsa-p384, ecdsa-p521, rsa-2048, rsa-3072, rsa-4096, ed25519. Empty
	// allows all.
	Keys []string
	// Lifetime, of an allow rule, is how long its certificates live, whole
	// seconds; 0 is the authority's own lifetime, which is also the longest.
	Lifetime time.Duration
}

// Subject is who asks.
type Subject struct {
	// Issuer is the token's iss, SAN the name in the certificate.
	Issuer string
	SAN    profile.SAN
	// Claim returns the values of a claim of the token, none if it has none.
	Claim func(path string) []string
	// Key is the type of the public key, as in Rule.Keys.
	Key string
}

// Decision is the answer and why.
type Decision struct {
	// Allowed says whether a certificate may be issued.
	Allowed bool
	// Rule is the rule that decided, "" if none fitted.
	Rule string
	// Reason is one sentence. It holds no claim and no name.
	Reason string
	// Lifetime is the rule's, 0 if it has none.
	Lifetime time.Duration
	// Trace has a line for each rule that was looked at, in order.
	Trace []Step
}

// Step is a rule that was looked at.
type Step struct {
	Rule string
	// Fits says whether it fitted; Missed is otherwise the first part that did
	// not: "issuer", "identity" or "claim NAME".
	Fits   bool
	Missed string
}

// KeyTypes are the values of Rule.Keys.
func KeyTypes() []string {
	return []string{"ecdsa-p256", "ecdsa-p384", "ecdsa-p521", "ed25519", "rsa-2048", "rsa-3072", "rsa-4096"}
}

// Policy is a checked list of rules. It is immutable and safe for concurrent
// use. A nil Policy allows everybody.
type Policy struct{ rules []compiled }

// compiled is a rule whose patterns have been read.
type compiled struct {
	Rule
	identity pattern
	claims   []claimPattern // in order of the name
}

type claimPattern struct {
	name    string
	pattern pattern
}

// New checks rules and reads their patterns. Errors: ErrInvalid.
func New(rules []Rule) (*Policy, error) {
	if len(rules) == 0 {
		return nil, fmt.Errorf("%w: no rule, which would refuse everybody", ErrInvalid)
	}
	p := &Policy{}
	seen := map[string]bool{}
	for i, r := range rules {
		c, err := r.compile()
		if err == nil && seen[r.Name] {
			err = errors.New("the name stands twice")
		}
		if err != nil {
			return nil, fmt.Errorf("%w: rule %d (%.64q): %w", ErrInvalid, i+1, r.Name, err)
		}
		seen[r.Name] = true
		p.rules = append(p.rules, c)
	}
	return p, nil
}

func (r Rule) compile() (compiled, error) {
	if !isName(r.Name) {
		return compiled{}, errors.New("the name is not 1 to 64 of a to z, 0 to 9 and -")
	}
	switch r.Effect {
	case Allow:
	case Deny:
		if len(r.Keys) > 0 || r.Lifetime != 0 {
			return compiled{}, errors.New("keys and lifetime belong to an allow rule")
		}
	default:
		return compiled{}, fmt.Errorf("effect %.20q is neither allow nor deny", r.Effect)
	}
	if r.Lifetime < 0 || r.Lifetime%time.Second != 0 || r.Lifetime > profile.MaxLifetime {
		return compiled{}, fmt.Errorf("lifetime %v is not of whole seconds up to %v", r.Lifetime, profile.MaxLifetime)
	}
	for _, key := range r.Keys {
		if !slices.Contains(KeyTypes(), key) {
			return compiled{}, fmt.Errorf("key type %.20q is not one of %s", key, strings.Join(KeyTypes(), ", "))
		}
	}
	c := compiled{Rule: r}
	var err error
	if r.Identity != "" {
		if c.identity, err = parsePattern(r.Identity); err != nil {
			return c, fmt.Errorf("identity: %w", err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.Claims)) {
		p, err := parsePattern(r.Claims[name])
		if err != nil {
			return c, fmt.Errorf("claim %.80q: %w", name, err)
		}
		c.claims = append(c.claims, claimPattern{name, p})
	}
	return c, nil
}

func isName(s string) bool {
	return s != "" && len(s) <= 64 && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-'
	})
}

// Decide says whether the subject may have a certificate.
func (p *Policy) Decide(s Subject) Decision {
	if p == nil {
		return Decision{Allowed: true, Reason: "there is no policy"}
	}
	var d Decision
	for _, r := range p.rules {
		missed := r.misses(s)
		d.Trace = append(d.Trace, Step{Rule: r.Name, Fits: missed == "", Missed: missed})
		if missed != "" {
			continue
		}
		d.Rule = r.Name
		switch {
		case r.Effect == Deny:
			d.Reason = "rule " + r.Name + " denies"
		case len(r.Keys) > 0 && !slices.Contains(r.Keys, s.Key):
			d.Reason = "rule " + r.Name + " does not allow keys of this type"
		default:
			d.Allowed, d.Lifetime, d.Reason = true, r.Lifetime, "rule "+r.Name+" allows"
		}
		return d
	}
	d.Reason = "no rule fits"
	return d
}

// misses names the first part of the rule that does not fit, "" if all do.
func (r compiled) misses(s Subject) string {
	if r.Issuer != "" && r.Issuer != s.Issuer {
		return "issuer"
	}
	if r.identity != nil && !r.identity.fits(s.SAN.Value, separator(s.SAN.Type)) {
		return "identity"
	}
	for _, c := range r.claims {
		fits := func(value string) bool { return c.pattern.fits(value, '/') }
		if s.Claim == nil || !slices.ContainsFunc(s.Claim(c.name), fits) {
			return "claim " + c.name
		}
	}
	return ""
}
