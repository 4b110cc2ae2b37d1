package tuf

import (
	"cmp"
	"crypto/ecdsa"
	"crypto/elliptic"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// Layout is what a root says: whose signatures count, and for how long.
type Layout struct {
	// Custodians sign root and targets; Threshold of them are needed, 1 to
	// the number of them, at most 16. Their order has no meaning.
	Custodians []*ecdsa.PublicKey
	Threshold  int
	// Online signs snapshot and timestamp. It is no custodian's key.
	Online *ecdsa.PublicKey
	// Expires says for how long a file of each role is valid.
	Expires Expires
}

// Expires has a period for each role.
type Expires struct {
	Root, Targets, Snapshot, Timestamp Period
}

// Decade is the period of targets and snapshot when nothing else is asked for:
// what is current is the timestamp's to say.
var Decade = Period{Years: 10}

// expiresField is the member of a root's roles that carries the period.
const expiresField = "x-chancery-expires"

// Root is a root as it was read: well-formed, its signatures not looked at.
type Root struct {
	Version int64
	Expires time.Time
	Layout  Layout
}

// key returns the TUF key of pub and its id.
func key(pub *ecdsa.PublicKey) (*metadata.Key, string, error) {
	if pub == nil || pub.Curve != elliptic.P256() {
		return nil, "", fmt.Errorf("a key is not P-256: %w", ErrLayout)
	}
	k, err := metadata.KeyFromPublicKey(pub)
	if err != nil {
		return nil, "", fmt.Errorf("encode key: %w", err)
	}
	id, err := k.ID()
	if err != nil {
		return nil, "", fmt.Errorf("encode key: %w", err)
	}
	return k, id, nil
}

// KeyID returns the id that a P-256 key has in TUF metadata: the SHA-256 of its
// canonical JSON, in hexadecimal (TUF 1.0.31, Section 4.2).
func KeyID(pub *ecdsa.PublicKey) (string, error) {
	_, id, err := key(pub)
	return id, err
}

// authority is a group of keys of which a threshold must sign.
type authority struct {
	name      string // for errors
	keys      map[string]*ecdsa.PublicKey
	threshold int
}

func newAuthority(name string, threshold int, keys ...*ecdsa.PublicKey) (authority, error) {
	a := authority{name, map[string]*ecdsa.PublicKey{}, threshold}
	for _, pub := range keys {
		_, id, err := key(pub)
		if err != nil {
			return a, err
		}
		if a.keys[id] != nil {
			return a, fmt.Errorf("key %.16s… twice: %w", id, ErrLayout)
		}
		a.keys[id] = pub
	}
	if threshold < 1 || threshold > len(keys) || len(keys) > maxCustodians {
		return a, fmt.Errorf("threshold %d of %d keys: %w", threshold, len(keys), ErrLayout)
	}
	return a, nil
}

func (l Layout) custodians(name string) (authority, error) {
	return newAuthority(name, l.Threshold, l.Custodians...)
}

func (l Layout) online() (authority, error) {
	return newAuthority("online key", 1, l.Online)
}

// check finds what cannot be in a layout.
func (l Layout) check() error {
	people, err := l.custodians("custodians")
	if err != nil {
		return fmt.Errorf("custodians: %w", err)
	}
	_, id, err := key(l.Online)
	if err != nil {
		return fmt.Errorf("online key: %w", err)
	}
	if people.keys[id] != nil {
		return fmt.Errorf("the online key is a custodian's: %w", ErrLayout)
	}
	for _, p := range []Period{l.Expires.Root, l.Expires.Targets, l.Expires.Snapshot, l.Expires.Timestamp} {
		if !p.valid() {
			return fmt.Errorf("a role has no period: %w", ErrLayout)
		}
	}
	return nil
}

// document returns the root as a document to be signed or compared.
func (r *Root) document() (document, error) {
	l := r.Layout
	if err := l.check(); err != nil {
		return document{}, err
	}
	m := metadata.Root(r.Expires).Signed
	m.Version = r.Version
	roles := map[Role]*metadata.Role{}
	for _, role := range []struct {
		name      Role
		keys      []*ecdsa.PublicKey
		threshold int
		expires   Period
	}{
		{RoleRoot, l.Custodians, l.Threshold, l.Expires.Root},
		{RoleTargets, l.Custodians, l.Threshold, l.Expires.Targets},
		{RoleSnapshot, []*ecdsa.PublicKey{l.Online}, 1, l.Expires.Snapshot},
		{RoleTimestamp, []*ecdsa.PublicKey{l.Online}, 1, l.Expires.Timestamp},
	} {
		mr := &metadata.Role{Threshold: role.threshold, UnrecognizedFields: map[string]any{expiresField: role.expires.String()}}
		for _, pub := range role.keys {
			k, id, err := key(pub)
			if err != nil {
				return document{}, err
			}
			m.Keys[id] = k
			mr.KeyIDs = append(mr.KeyIDs, id)
		}
		slices.Sort(mr.KeyIDs)
		roles[role.name] = mr
	}
	for name, role := range roles {
		m.Roles[string(name)] = role
	}
	return newDocument(RoleRoot, r.Version, m.Expires, m)
}

// parseRoot reads a root and its signatures.
func parseRoot(data []byte) (*Root, *parsed, error) {
	m, sigs, err := decode[metadata.RootType](data)
	if err != nil {
		return nil, nil, fmt.Errorf("read root: %w", err)
	}
	r := &Root{Version: m.Version, Expires: m.Expires}
	if r.Layout, err = layoutOf(m); err != nil {
		return nil, nil, fmt.Errorf("read root: %w: %w", ErrFormat, err)
	}
	doc, err := r.document()
	if err != nil {
		return nil, nil, fmt.Errorf("read root: %w: %w", ErrFormat, err)
	}
	p, err := doc.matched(data, sigs)
	if err != nil {
		return nil, nil, fmt.Errorf("read root: %w", err)
	}
	return r, p, nil
}

// ParseRoot reads a root metadata file strictly. It looks at its form, not at
// its signatures: those are a Repository's to check, or a Draft's.
func ParseRoot(data []byte) (*Root, error) {
	r, _, err := parseRoot(data)
	return r, err
}

// layoutOf takes a layout out of a root. What it overlooks the comparison with
// the re-written file finds.
func layoutOf(m metadata.RootType) (Layout, error) {
	if len(m.Keys) > maxCustodians+1 {
		return Layout{}, fmt.Errorf("%d keys", len(m.Keys))
	}
	keysOf := func(role Role) (keys []*ecdsa.PublicKey, threshold int, expires Period, err error) {
		r := m.Roles[string(role)]
		if r == nil || len(r.KeyIDs) > maxCustodians {
			return nil, 0, Period{}, fmt.Errorf("role %s is missing or has too many keys", role)
		}
		for _, id := range r.KeyIDs {
			k := m.Keys[id]
			if k == nil {
				return nil, 0, Period{}, fmt.Errorf("role %s: unknown key", role)
			}
			pub, err := k.ToPublicKey()
			if err != nil {
				return nil, 0, Period{}, fmt.Errorf("role %s: %w", role, err)
			}
			ec, ok := pub.(*ecdsa.PublicKey)
			if !ok {
				return nil, 0, Period{}, fmt.Errorf("role %s: a %T", role, pub)
			}
			keys = append(keys, ec)
		}
		text, _ := r.UnrecognizedFields[expiresField].(string)
		expires, err = ParsePeriod(text)
		return keys, r.Threshold, expires, err
	}
	var l Layout
	var err [4]error
	var online []*ecdsa.PublicKey
	l.Custodians, l.Threshold, l.Expires.Root, err[0] = keysOf(RoleRoot)
	_, _, l.Expires.Targets, err[1] = keysOf(RoleTargets)
	_, _, l.Expires.Snapshot, err[2] = keysOf(RoleSnapshot)
	online, _, l.Expires.Timestamp, err[3] = keysOf(RoleTimestamp)
	if e := cmp.Or(err[0], err[1], err[2], err[3]); e != nil {
		return Layout{}, e
	}
	if len(online) == 1 {
		l.Online = online[0]
	}
	return l, nil
}

// ids returns the key ids of an authority in order.
func (a authority) ids() []string { return slices.Sorted(maps.Keys(a.keys)) }
