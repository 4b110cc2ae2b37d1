package ca_test

import (
	"context"
	"crypto/x509"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/ca"
	"github.com/chancery-ca/chancery/ca/internal/catest"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// fixture is a CA's parts, with counters on the keys.
type fixture struct {
	Key, LogKey *hsmtest.Counting
	Chain       []*x509.Certificate // intermediate, root
	Log         *catest.Log
}

// newFixture makes a CA and a log on software keys.
func newFixture(t testing.TB) *fixture {
	t.Helper()
	return withKeys(t, hsmtest.SoftwareKey(hsm.ECDSAP256), hsmtest.SoftwareKey(hsm.ECDSAP256))
}

func withKeys(t testing.TB, intermediate, log hsm.Key) *fixture {
	t.Helper()
	f := &fixture{Key: &hsmtest.Counting{Key: intermediate}, LogKey: &hsmtest.Counting{Key: log}}
	f.Chain = catest.Chain(t, hsmtest.SoftwareKey(hsm.ECDSAP384), intermediate)
	f.Log = &catest.Log{Key: f.LogKey}
	return f
}

// Config is a configuration that works.
func (f *fixture) Config() ca.Config {
	return ca.Config{
		Key: f.Key, Chain: f.Chain, SCTs: source{f.Log}, LogKey: f.LogKey.Public(),
		Now: func() (time.Time, error) { return catest.Noon, nil },
	}
}

func authority(t testing.TB, cfg ca.Config) *ca.Authority {
	t.Helper()
	a, err := ca.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// source is the log as the authority needs it.
type source struct{ *catest.Log }

func (s source) Promise(ctx context.Context, issuerKeyHash [32]byte, tbs []byte) (ca.Promise, error) {
	p, err := s.Log.Promise(ctx, issuerKeyHash, tbs)
	if err != nil {
		return nil, err
	}
	return p, nil
}
