package ca_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"testing"

	ctx509 "github.com/google/certificate-transparency-go/x509"

	"github.com/chancery-ca/chancery/ca"
	"github.com/chancery-ca/chancery/ca/internal/catest"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// elsewhere is a log that sees the precertificate first.
type elsewhere struct {
	log *catest.Log
	err error // what Submit answers instead
}

func (e elsewhere) Submit(ctx context.Context, precert []byte, chain [][]byte) ([]byte, error) {
	if e.err != nil {
		return nil, e.err
	}
	cert, err := ctx509.ParseCertificate(precert)
	if ctx509.IsFatal(err) {
		return nil, err
	}
	tbs, err := ctx509.RemoveCTPoison(cert.RawTBSCertificate)
	if err != nil {
		return nil, err
	}
	issuer, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, err
	}
	p, err := e.log.Promise(ctx, issuerKeyHash(issuer), tbs)
	if err != nil {
		return nil, err
	}
	_, err = p.Commit(ctx, precert, chain)
	return p.SCT(), err
}

// configElsewhere is a configuration with a log elsewhere.
func configElsewhere(f *catest.Parts) ca.Config {
	cfg := f.Config()
	cfg.SCTs, cfg.Submitter = nil, elsewhere{log: f.Log}
	cfg.LogKey, cfg.LogKeys = nil, []crypto.PublicKey{hsmtest.SoftwareKey(hsm.ECDSAP256).Public(), f.LogKey.Public()}
	return cfg
}

func TestIssueWithLogElsewhere(t *testing.T) {
	f := catest.NewParts(t)
	got, err := catest.Authority(t, configElsewhere(f)).Issue(t.Context(), request(t))
	if err != nil {
		t.Fatal(err)
	}
	if got.LogIndex != nil {
		t.Errorf("log index %d of a log that does not say", *got.LogIndex)
	}
	leaf, err := x509.ParseCertificate(got.DER)
	if err != nil {
		t.Fatal(err)
	}
	checkPath(t, f, leaf)
	checkSCT(t, f, got)
	leaves := f.Log.Leaves()
	if len(leaves) != 1 || len(leaves[0].Chain) != 2 || !bytes.Equal(leaves[0].Chain[1], f.Chain[1].Raw) {
		t.Fatalf("log has %d leaves", len(leaves))
	}
	checkPrecert(t, f, leaves[0], leaf)
}

// TestLogElsewhereRefuses: without an SCT by the pinned key for this
// precertificate no certificate is signed.
func TestLogElsewhereRefuses(t *testing.T) {
	passing := func(err error) error { return errors.Join(ca.ErrUnavailable, err) }
	for _, tc := range []struct {
		name  string
		spoil func(f *catest.Parts, cfg *ca.Config)
		want  error
	}{
		{"another log's key", func(_ *catest.Parts, cfg *ca.Config) {
			cfg.LogKeys = []crypto.PublicKey{hsmtest.SoftwareKey(hsm.ECDSAP256).Public()}
		}, ca.ErrLog},
		{"tampered SCT", func(f *catest.Parts, _ *ca.Config) {
			f.Log.Tamper = func(sct []byte) []byte { sct[40] ^= 1; return sct }
		}, ca.ErrLog},
		{"cut off SCT", func(f *catest.Parts, _ *ca.Config) {
			f.Log.Tamper = func(sct []byte) []byte { return sct[:len(sct)-1] }
		}, ca.ErrLog},
		{"no SCT", func(f *catest.Parts, _ *ca.Config) { f.Log.Tamper = func([]byte) []byte { return nil } }, ca.ErrLog},
		{"refused", func(f *catest.Parts, cfg *ca.Config) { cfg.Submitter = elsewhere{err: errors.New("refused")} }, ca.ErrLog},
		{"not available", func(f *catest.Parts, cfg *ca.Config) { cfg.Submitter = elsewhere{err: passing(errors.New("down"))} }, ca.ErrUnavailable},
		{"too late", func(f *catest.Parts, cfg *ca.Config) { cfg.Submitter = elsewhere{err: context.DeadlineExceeded} }, ca.ErrUnavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := catest.NewParts(t)
			cfg := configElsewhere(f)
			tc.spoil(f, &cfg)
			got, err := catest.Authority(t, cfg).Issue(t.Context(), request(t))
			if got != nil || !errors.Is(err, tc.want) {
				t.Fatalf("%v, %v; want %v", got, err, tc.want)
			}
			if n := f.Key.Count(); n != 1 {
				t.Errorf("%d signatures by the CA, want the precertificate's alone", n)
			}
		})
	}
}

func TestNewWantsOneLog(t *testing.T) {
	f := catest.NewParts(t)
	for name, change := range map[string]func(*ca.Config){
		"none":                           func(c *ca.Config) { c.SCTs = nil },
		"two":                            func(c *ca.Config) { c.Submitter = elsewhere{log: f.Log} },
		"one elsewhere, no key for":      func(c *ca.Config) { c.SCTs, c.Submitter, c.LogKey = nil, elsewhere{log: f.Log}, nil },
		"one elsewhere, key of one here": func(c *ca.Config) { c.SCTs, c.Submitter = nil, elsewhere{log: f.Log} },
		"one here, key of one elsewhere": func(c *ca.Config) { c.LogKeys = []crypto.PublicKey{f.LogKey.Public()} },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := f.Config()
			change(&cfg)
			if _, err := ca.New(cfg); !errors.Is(err, ca.ErrConfig) {
				t.Errorf("err %v", err)
			}
		})
	}
}

func issuerKeyHash(issuer *x509.Certificate) [sha256.Size]byte {
	return sha256.Sum256(issuer.RawSubjectPublicKeyInfo)
}
