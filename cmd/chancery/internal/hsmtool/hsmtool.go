// Package hsmtool is what an operator does with tokens and their keys: look at
// them, list them, test one, attest it, measure it.
//
// It promises that a token is only looked at: nothing is made, changed or
// removed in it, and a PIN is sent at most once. What a key signs here is a
// text that names the key or this program, never octets that a caller chose, so
// that no certificate, SCT, tree head or timestamp can come of it. Info takes no
// PIN at all.
//
// It trusts the key ring (keys.yaml) for which key has which role, and the
// token no more than package hsm does. Text that comes from a token is printed
// with its control characters replaced.
package hsmtool

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/service"
	"github.com/chancery-ca/chancery/config"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
	"github.com/chancery-ca/chancery/log/store"
)

// Errors that callers branch on.
var (
	// ErrNoToken: no token of that name, or none at all.
	ErrNoToken = errors.New("no such token")
	// ErrNoKey: the reference is neither a role of the key ring nor a key's URI,
	// or does not say in which token the key is.
	ErrNoKey = errors.New("no such key")
	// ErrServing: the service is running, and the command would disturb it.
	ErrServing = errors.New("service is running")
)

// Place is a token that was named and is not opened.
type Place struct {
	// Name is that of the configuration, or the URI of a token without one.
	Name  string
	Token trust.Token
	How   config.Token
}

// Places are the tokens that a command works on.
type Places struct {
	Tokens []Place
	// Ring says which key has which role; nil without a configuration.
	Ring *trust.KeyRing
}

// Find returns the tokens that the configuration can log in to, or the one with
// the name. Errors: ErrNoToken.
func Find(cfg *config.Config, name string) (Places, error) {
	ring, err := service.LoadRing(cfg)
	if err != nil {
		return Places{}, err
	}
	p := Places{Ring: ring}
	names := slices.Sorted(maps.Keys(cfg.Tokens))
	for _, n := range names {
		if name == "" || n == name {
			p.Tokens = append(p.Tokens, Place{n, ring.Tokens[n], cfg.Tokens[n]})
		}
	}
	if len(p.Tokens) == 0 {
		return Places{}, fmt.Errorf("%w: %q; the configuration has %q", ErrNoToken, name, names)
	}
	return p, nil
}

// At names one token without a configuration.
func At(where trust.Token, how config.Token) (Places, error) {
	if err := service.CheckTokenURI(where); err != nil {
		return Places{}, err
	}
	return Places{Tokens: []Place{{where.URI, where, how}}}, nil
}

// Open logs in to the token with the PIN, or of a TPM with the auth value.
func (p Place) Open(ctx context.Context, pin []byte, logger *slog.Logger) (hsm.Token, error) {
	token, err := service.LogIn(ctx, p.Token, p.How, pin, logger)
	if err != nil {
		return nil, fmt.Errorf("token %s: %w", p.Name, err)
	}
	return token, nil
}

// Info describes a token without a login, as it is at the moment.
type Info struct {
	Name string `json:"name"`
	URI  string `json:"uri"`
	hsm.Inspection
	// Level is the best that the token's own word supports: see hsm.LevelOf.
	Level hsm.Level `json:"level"`
}

// Info looks at the token. It needs no PIN.
func (p Place) Info(ctx context.Context) (Info, error) {
	found, err := service.InspectToken(ctx, p.Token)
	if err != nil {
		return Info{}, fmt.Errorf("token %s: %w", p.Name, err)
	}
	return info(p.Name, p.Token.URI, found), nil
}

func info(name, uri string, found hsm.Inspection) Info {
	level := hsm.LevelModule
	if hsm.IsSoftware(found.Token) {
		level = hsm.LevelSoftware
	}
	return Info{Name: name, URI: uri, Inspection: found, Level: level}
}

// Module describes every token of a PKCS#11 library.
func Module(ctx context.Context, path string) ([]Info, error) {
	found, err := pkcs11.Inspect(ctx, path, "")
	if err != nil {
		return nil, err
	}
	var all []Info
	for _, f := range found {
		uri := pkcs11.TokenURI(f.Token.Label)
		all = append(all, info(uri, uri, f))
	}
	return all, nil
}

// Target is a key that was named.
type Target struct {
	Place Place
	Role  hsm.Role // RoleNone if the key ring does not have it
	URI   string
	// SPKI is the public key that it must have; zero: whichever it has.
	SPKI [sha256.Size]byte
}

// Target finds what the reference means: a role of the key ring, or the URI of
// a key. Errors: ErrNoKey, ErrNoToken.
func (p Places) Target(reference string) (Target, error) {
	if scheme := (hsm.Ref{URI: reference}).Scheme(); scheme == "" {
		return p.byRole(hsm.Role(reference))
	}
	if err := service.CheckKeyURI(reference); err != nil {
		return Target{}, err
	}
	if p.Ring != nil {
		for role, key := range p.Ring.Keys {
			if key.URI == reference {
				return p.byRole(role)
			}
		}
	}
	var fit []Place
	for _, place := range p.Tokens {
		if sameDevice(place.Token.URI, reference) {
			fit = append(fit, place)
		}
	}
	if len(fit) != 1 {
		return Target{}, fmt.Errorf("%w: %.200q is in none of the tokens, or in more than one: say which", ErrNoKey, reference)
	}
	return Target{Place: fit[0], URI: reference}, nil
}

func (p Places) byRole(role hsm.Role) (Target, error) {
	if p.Ring == nil {
		return Target{}, fmt.Errorf("%w: %.80q: a role is found by a configuration; without one, name the key by its URI", ErrNoKey, role)
	}
	key, ok := p.Ring.Keys[role]
	if !ok {
		return Target{}, fmt.Errorf("%w: %.80q; keys.yaml has %q", ErrNoKey, role, slices.Sorted(maps.Keys(p.Ring.Keys)))
	}
	for _, place := range p.Tokens {
		if place.Name == key.Token {
			return Target{Place: place, Role: role, URI: key.URI, SPKI: key.SPKI}, nil
		}
	}
	return Target{}, fmt.Errorf("%w: the %s key is in token %q, which the configuration has no PIN for", ErrNoToken, role, key.Token)
}

// sameDevice says whether a key's URI can be of a token, by scheme. Which token
// it is, the token itself says when it is asked.
func sameDevice(token, key string) bool {
	return hsm.Ref{URI: token}.Scheme() == hsm.Ref{URI: key}.Scheme()
}

// Open opens the key that the target names, under its role's policy, and the
// token that it is in. The caller closes the token.
func (t Target) Open(ctx context.Context, pin []byte, logger *slog.Logger) (hsm.Token, hsm.Key, error) {
	token, err := t.Place.Open(ctx, pin, logger)
	if err != nil {
		return nil, nil, err
	}
	key, err := t.key(ctx, token)
	if err != nil {
		return nil, nil, errors.Join(err, token.Close())
	}
	return token, key, nil
}

func (t Target) key(ctx context.Context, token hsm.Token) (hsm.Key, error) {
	ref := hsm.Ref{URI: t.URI, SPKI: t.SPKI}
	if ref.SPKI == ([sha256.Size]byte{}) {
		lister, ok := token.(hsm.Lister)
		if !ok {
			return nil, fmt.Errorf("look for key: token %T: %w", token, hsm.ErrUnsupported)
		}
		var err error
		if ref, err = lister.Look(ctx, t.URI); err != nil {
			return nil, err
		}
	}
	return token.Open(ctx, ref, t.Role)
}

// Listed is a key of a token, with what the key ring has to say about it.
type Listed struct {
	hsm.Listing
	// Role is the key's role, "" if the key ring does not have it.
	Role hsm.Role `json:"role"`
	// Policy is "good", or in which way the key breaks the policy of its role (of
	// an online key if it has none).
	Policy string `json:"policy"`
}

// PolicyGood is the Listed.Policy of a key that keeps it.
const PolicyGood = "good"

// Contents is what is in a token.
type Contents struct {
	Token string   `json:"token"`
	URI   string   `json:"uri"`
	Keys  []Listed `json:"keys"`
	// Missing are the roles whose key should be in this token and is not.
	Missing []hsm.Role `json:"missing"`
}

// List describes every private key of an open token.
func (p Places) List(ctx context.Context, place Place, token hsm.Token) (Contents, error) {
	c := Contents{Token: place.Name, URI: place.Token.URI, Keys: []Listed{}, Missing: []hsm.Role{}}
	lister, ok := token.(hsm.Lister)
	if !ok {
		return c, fmt.Errorf("token %s: list keys: %w", place.Name, hsm.ErrUnsupported)
	}
	all, err := lister.List(ctx)
	if err != nil {
		return c, fmt.Errorf("token %s: %w", place.Name, err)
	}
	found := map[hsm.Role]bool{}
	for _, l := range all {
		k := Listed{Listing: l, Role: p.roleOf(l.SPKI), Policy: PolicyGood}
		if err := k.Role.Policy().Check(l.Attributes); err != nil {
			k.Policy = err.Error()
		}
		found[k.Role] = true
		c.Keys = append(c.Keys, k)
	}
	if p.Ring != nil {
		for _, role := range trust.Roles() {
			if key, ok := p.Ring.Keys[role]; ok && key.Token == place.Name && !found[role] {
				c.Missing = append(c.Missing, role)
			}
		}
	}
	return c, nil
}

// Err returns what keeps the service from using the token: a key of a role that
// is missing, cannot be opened, or breaks its policy. Keys without a role are
// nobody's.
func (c Contents) Err() error {
	var errs []error
	for _, role := range c.Missing {
		errs = append(errs, fmt.Errorf("%s key: %w", role, hsm.ErrNotFound))
	}
	for _, k := range c.Keys {
		switch {
		case k.Role == hsm.RoleNone:
		case k.Policy != PolicyGood:
			errs = append(errs, fmt.Errorf("%s key: %w", k.Role, hsm.ErrPolicy))
		case k.Problem != "":
			errs = append(errs, fmt.Errorf("%s key: %s", k.Role, k.Problem))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("token %s: %w", c.Token, err)
	}
	return nil
}

// roleOf returns the role of the public key with this hash in hexadecimal.
func (p Places) roleOf(spki string) hsm.Role {
	if p.Ring == nil || spki == "" {
		return hsm.RoleNone
	}
	for role, key := range p.Ring.Keys {
		if hex.EncodeToString(key.SPKI[:]) == spki {
			return role
		}
	}
	return hsm.RoleNone
}

// Reserve keeps the service of the configuration from starting until release is
// called. Errors: ErrServing if it is running.
func Reserve(cfg *config.Config) (release func() error, err error) {
	dir := service.LogPlaces(cfg)[0].Dir // all logs share it, and there is one at least
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return func() error { return nil }, nil // it was never initialised, so it cannot run
	}
	lock, err := store.Open(dir, store.Options{})
	if errors.Is(err, store.ErrLocked) {
		return nil, fmt.Errorf("%w: %w", ErrServing, err)
	}
	if err != nil {
		return nil, fmt.Errorf("look for a running service: %w", err)
	}
	return lock.Close, nil
}

// Clean replaces what a terminal could take for a command.
func Clean(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0) || r == '\u202e' || r == '\u2066' {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}
