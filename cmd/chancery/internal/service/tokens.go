package service

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/config"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
	"github.com/chancery-ca/chancery/hsm/tpm"
	"github.com/chancery-ca/chancery/log/head"
)

// The schemes of token and key URIs.
const (
	schemePKCS11 = "pkcs11"
	schemeTPM    = "tpm2"
)

// CheckTokenURI says, without touching a device, whether a token can be looked
// for: its URI is one of a token, and a PKCS#11 token has a module, a TPM none.
func CheckTokenURI(where trust.Token) error {
	var err error
	switch (hsm.Ref{URI: where.URI}).Scheme() {
	case schemePKCS11:
		if err = pkcs11.CheckTokenURI(where.URI); err == nil && !filepath.IsAbs(where.Module) {
			err = fmt.Errorf("module %.200q: want the absolute path of a PKCS#11 library", where.Module)
		}
	case schemeTPM:
		if err = tpm.CheckTokenURI(where.URI); err == nil && where.Module != "" {
			err = fmt.Errorf("module %.200q: a TPM has none", where.Module)
		}
	default:
		err = fmt.Errorf("scheme is neither %s nor %s: %w", schemePKCS11, schemeTPM, hsm.ErrUnsupported)
	}
	if err != nil {
		return fmt.Errorf("token %s: %w", withoutQuery(where.URI), err)
	}
	return nil
}

// CheckKeyURI says the same of a key's URI.
func CheckKeyURI(uri string) error {
	var err error
	switch (hsm.Ref{URI: uri}).Scheme() {
	case schemePKCS11:
		err = pkcs11.CheckKeyURI(uri)
	case schemeTPM:
		err = tpm.CheckKeyURI(uri)
	default:
		err = fmt.Errorf("scheme is neither %s nor %s: %w", schemePKCS11, schemeTPM, hsm.ErrUnsupported)
	}
	if err != nil {
		return fmt.Errorf("key %s: %w", withoutQuery(uri), err)
	}
	return nil
}

// withoutQuery quotes a URI that was refused up to its query, in which somebody
// may have put a PIN.
func withoutQuery(uri string) string {
	path, _, _ := strings.Cut(uri, "?")
	return fmt.Sprintf("%.200q", path)
}

// LoadRing reads keys.yaml of the trust folder and gives each TPM whose URI
// names no folder that of the configuration. A token of the configuration that
// keys.yaml does not have is an error.
func LoadRing(cfg *config.Config) (*trust.KeyRing, error) {
	ring, err := trust.LoadKeyRing(filepath.Join(cfg.Trust, "keys.yaml"))
	if err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(cfg.Tokens)) {
		if _, ok := ring.Tokens[name]; !ok {
			return nil, fmt.Errorf("configuration names token %q: keys.yaml does not have it", name)
		}
		if folder := cfg.Tokens[name].Keys; folder != "" {
			if err := ring.SetFolder(name, folder); err != nil {
				return nil, fmt.Errorf("tokens.%s.keys: %w", name, err)
			}
		}
	}
	return ring, nil
}

// ErrNoKeys: there is no keys.yaml yet.
var ErrNoKeys = errors.New("no keys.yaml")

// Check holds the configuration against keys.yaml without touching a device, a
// secret or a log: every online key is in a token that the configuration can log
// in to, and the URIs of both can be understood. Errors: ErrNoKeys when the
// ceremony's outputs are not there.
func Check(cfg *config.Config) error {
	ring, err := LoadRing(cfg)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrNoKeys, err)
	}
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(cfg.Tokens)) {
		if err := CheckTokenURI(ring.Tokens[name]); err != nil {
			return fmt.Errorf("tokens.%s: %w", name, err)
		}
	}
	for _, role := range onlineRoles(cfg, ring) {
		key := ring.Keys[role]
		if _, ok := cfg.Tokens[key.Token]; !ok {
			return fmt.Errorf("the %s key is in token %q: the configuration has no PIN for it (tokens)", role, key.Token)
		}
		if err := CheckKeyURI(key.URI); err != nil {
			return fmt.Errorf("the %s key: %w", role, err)
		}
	}
	for _, counter := range []struct {
		log string
		*config.Counter
	}{{"ct", cfg.CT.Counter}, {"rekor", cfg.Rekor.Counter}} {
		if counter.Counter != nil && (hsm.Ref{URI: ring.Tokens[counter.Token].URI}).Scheme() != schemeTPM {
			return fmt.Errorf("%s.counter: token %q is no TPM: %w", counter.log, counter.Token, hsm.ErrUnsupported)
		}
	}
	return nil
}

// OpenToken logs in to the token with the PIN that the configuration refers to.
func OpenToken(ctx context.Context, where trust.Token, how config.Token, logger *slog.Logger) (hsm.Token, error) {
	pin, err := how.PIN.Read()
	if err != nil {
		return nil, err
	}
	defer clear(pin)
	return LogIn(ctx, where, how, pin, logger)
}

// LogIn is OpenToken with the PIN given. The caller clears it.
func LogIn(ctx context.Context, where trust.Token, how config.Token, pin []byte, logger *slog.Logger) (hsm.Token, error) {
	if err := CheckTokenURI(where); err != nil {
		return nil, err
	}
	if (hsm.Ref{URI: where.URI}).Scheme() == schemeTPM {
		return openTPM(ctx, where, how, pin, logger)
	}
	return pkcs11.Open(ctx, pkcs11.Config{
		Module: where.Module, URI: where.URI, PIN: pin,
		MaxSessions: how.Sessions, MaxQueue: how.Queue, Deadline: how.Deadline, Logger: logger,
	})
}

func openTPM(ctx context.Context, where trust.Token, how config.Token, auth []byte, logger *slog.Logger) (hsm.Token, error) {
	dir, device, err := tpm.ParseTokenURI(where.URI)
	if err != nil {
		return nil, err
	}
	if len(auth) < config.MinAuth {
		return nil, fmt.Errorf("auth value of %d octets, want at least %d: %w", len(auth), config.MinAuth, hsm.ErrPIN)
	}
	owner, err := readOptional(how.OwnerAuth)
	if err != nil {
		return nil, fmt.Errorf("owner-auth: %w", err)
	}
	defer clear(owner)
	endorsement, err := readOptional(how.EndorsementAuth)
	if err != nil {
		return nil, fmt.Errorf("endorsement-auth: %w", err)
	}
	defer clear(endorsement)
	return tpm.Open(ctx, tpm.Config{
		Device: device, Dir: dir, Auth: auth, OwnerAuth: owner, EndorsementAuth: endorsement,
		MaxQueue: how.Queue, Deadline: how.Deadline, Logger: logger,
	})
}

// readOptional reads a secret, or nothing where there is no reference.
func readOptional(s config.Secret) ([]byte, error) {
	if s.IsZero() {
		return nil, nil
	}
	return s.Read()
}

// InspectToken describes a token without a login.
func InspectToken(ctx context.Context, where trust.Token) (hsm.Inspection, error) {
	if err := CheckTokenURI(where); err != nil {
		return hsm.Inspection{}, err
	}
	if (hsm.Ref{URI: where.URI}).Scheme() == schemeTPM {
		dir, device, err := tpm.ParseTokenURI(where.URI)
		if err != nil {
			return hsm.Inspection{}, err
		}
		found, err := tpm.Inspect(ctx, device)
		found.Token.Label = dir
		return found, err
	}
	found, err := pkcs11.Inspect(ctx, where.Module, where.URI)
	if err != nil {
		return hsm.Inspection{}, err
	}
	if len(found) > 1 {
		return hsm.Inspection{}, fmt.Errorf("token %s: %d tokens: %w", where.URI, len(found), hsm.ErrAmbiguous)
	}
	return found[0], nil
}

// asTPM returns the token as one that has NV counters.
func asTPM(token hsm.Token, c *config.Counter) (*tpm.Token, error) {
	t, ok := token.(*tpm.Token)
	if !ok {
		return nil, fmt.Errorf("counter %#x: token %q is no TPM: %w", c.Index, c.Token, hsm.ErrUnsupported)
	}
	return t, nil
}

// OpenCounter opens the configured counter in its open token.
func OpenCounter(ctx context.Context, token hsm.Token, c *config.Counter) (head.Counter, error) {
	t, err := asTPM(token, c)
	if err != nil {
		return nil, err
	}
	counter, err := tpm.OpenCounter(ctx, t, c.Index)
	if err != nil {
		return nil, fmt.Errorf("token %q: %w", c.Token, err)
	}
	return counter, nil
}

// Counters opens the counters of the logs, by the names of LogPlaces, each in
// its token, which is opened once. done logs out.
func Counters(ctx context.Context, cfg *config.Config, logger *slog.Logger) (counters map[string]head.Counter, done func() error, err error) {
	tokens, err := counterTokens(ctx, cfg, logger)
	if err != nil {
		return nil, nil, err
	}
	counters = map[string]head.Counter{}
	for _, place := range LogPlaces(cfg) {
		if place.Counter == nil {
			continue
		}
		if counters[place.Name], err = OpenCounter(ctx, tokens.open[place.Counter.Token], place.Counter); err != nil {
			return nil, nil, errors.Join(fmt.Errorf("counter of log %s: %w", place.Name, err), tokens.Close())
		}
	}
	return counters, tokens.Close, nil
}

// openTokens are open, by name.
type openTokens struct{ open map[string]hsm.Token }

// Close logs out of all of them.
func (t *openTokens) Close() error {
	var errs []error
	for _, token := range t.open {
		errs = append(errs, token.Close())
	}
	return errors.Join(errs...)
}

// counterTokens logs in to the tokens that a configured counter is in.
func counterTokens(ctx context.Context, cfg *config.Config, logger *slog.Logger) (*openTokens, error) {
	tokens := &openTokens{map[string]hsm.Token{}}
	for _, place := range LogPlaces(cfg) {
		if place.Counter == nil || tokens.open[place.Counter.Token] != nil {
			continue
		}
		ring, err := LoadRing(cfg)
		if err != nil {
			return nil, errors.Join(err, tokens.Close())
		}
		name := place.Counter.Token
		token, err := OpenToken(ctx, ring.Tokens[name], cfg.Tokens[name], logger)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open token %q: %w", name, err), tokens.Close())
		}
		tokens.open[name] = token
	}
	return tokens, nil
}
