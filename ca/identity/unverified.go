package identity

import (
	"slices"
	"time"

	"github.com/chancery-ca/chancery/ca/profile"
)

// Unverified is what a token of which nobody has checked the signature says.
// Anybody can have written it. It explains what would become of such a token,
// and it is no Principal: nothing is issued for it.
type Unverified struct {
	// Issuer is its iss, SAN the name that a certificate would carry.
	Issuer string
	SAN    profile.SAN
	// Err is why Verify would refuse it whatever its signature, such as that it
	// has expired; nil if nothing else is wrong with it.
	Err error

	claims claims // for Claim
}

// Claim is as Principal's.
func (u *Unverified) Claim(path string) []string { return u.claims.values(path) }

// ReadUnverified reads a raw ID token without checking its signature. Nothing is
// fetched. The issuer must be configured and the claims must make an identity.
// Errors: ErrToken, ErrMapping, ErrConfig.
func ReadUnverified(cfg Config, raw string, now time.Time) (*Unverified, error) {
	all, err := cfg.resolve()
	if err != nil {
		return nil, err
	}
	t, err := parseToken(raw)
	if err != nil {
		return nil, err
	}
	k, err := all.find(t.claims.text("iss"))
	if err != nil {
		return nil, err
	}
	p, err := k.kind.principal(k.Issuer, t.claims)
	if err != nil {
		return nil, err
	}
	return &Unverified{Issuer: p.Issuer, SAN: p.SAN, Err: t.check(k.ClientID, now), claims: t.claims}, nil
}

// find returns the configuration of an issuer, by its name or else by the first
// pattern that it fits.
func (r resolved) find(iss string) (known, error) {
	if k, ok := r.issuers[iss]; ok {
		return k, nil
	}
	at := slices.IndexFunc(r.patterns, func(p pattern) bool { return p.match.MatchString(iss) })
	if at < 0 {
		return known{}, refuse("issuer is not configured")
	}
	k, err := r.patterns[at].issuer(iss)
	if err != nil {
		return known{}, refuse("issuer does not make a configuration")
	}
	return k, nil
}
