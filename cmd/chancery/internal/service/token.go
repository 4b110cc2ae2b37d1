package service

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/chancery-ca/chancery/ca/identity"
	"github.com/chancery-ca/chancery/config"
)

// tryAgain is the pause before an issuer's keys are asked for again.
const tryAgain = 250 * time.Millisecond

// VerifyToken verifies an ID token as the service of a configuration would, for
// tools: nothing is issued for it. Unlike the service it takes an issuer on
// http://127.0.0.1, as the demo has. It fetches the keys of the token's issuer
// and waits for them until timeout is over; why they did not come is in the error.
// Errors: those of identity.Verifier.Verify.
func VerifyToken(ctx context.Context, cfg *config.Config, token string, timeout time.Duration, logger *slog.Logger) (*identity.Principal, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	issuers, err := issuersFor(cfg.CA.Config, token)
	if err != nil {
		return nil, err
	}
	verifier, err := identity.New(ctx, issuers, identity.Options{
		LoopbackHTTP: true, PrivateNetworks: cfg.CA.PrivateNetworks, ReadFile: readBounded,
		Now: newClock(logger).Now, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return nil, fmt.Errorf("open identity issuers: %w", err)
	}
	defer verifier.Close()
	for {
		p, err := verifier.Verify(ctx, token)
		if !errors.Is(err, identity.ErrUnavailable) {
			return p, err
		}
		select {
		case <-ctx.Done():
			return nil, withReasons(err, verifier.Health())
		case <-time.After(tryAgain):
		}
	}
}

// withReasons adds to err why issuers' keys were not fetched.
func withReasons(err error, issuers []identity.IssuerHealth) error {
	for _, issuer := range issuers {
		if issuer.Err != nil {
			err = fmt.Errorf("%w: %w", err, issuer.Err)
		}
	}
	return err
}

// issuersFor leaves of the configured issuers only those that a token needs, so
// that no other is asked for its keys.
func issuersFor(cfg identity.Config, token string) (identity.Config, error) {
	read, err := identity.ReadUnverified(cfg, token, time.Now())
	if err != nil {
		return cfg, err
	}
	issuer, ok := cfg.OIDCIssuers[read.Issuer]
	if !ok {
		cfg.OIDCIssuers = nil
		return cfg, nil
	}
	cfg.OIDCIssuers, cfg.MetaIssuers = map[string]identity.Issuer{read.Issuer: issuer}, nil
	return cfg, nil
}
