package ca_test

import (
	"context"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/chancery-ca/chancery/ca"
	"github.com/chancery-ca/chancery/ca/audit"
	"github.com/chancery-ca/chancery/ca/identity"
	"github.com/chancery-ca/chancery/ca/internal/catest"
	"github.com/chancery-ca/chancery/ca/policy"
	"github.com/chancery-ca/chancery/ca/profile"
	"github.com/chancery-ca/chancery/hsm"
)

// openAudit opens an audit in a folder of the test.
func openAudit(t *testing.T) (dir string, log *audit.Log) {
	t.Helper()
	dir = t.TempDir()
	noon := func() (time.Time, error) { return catest.Noon, nil }
	if err := audit.Create(dir, noon); err != nil {
		t.Fatal(err)
	}
	log, err := audit.Open(audit.Config{Dir: dir, Now: noon})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = log.Close() })
	return dir, log
}

// records closes the audit and reads it.
func records(t *testing.T, dir string, log *audit.Log) (out []audit.Record) {
	t.Helper()
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := audit.Verify(dir, nil, nil, func(r audit.Record) error { out = append(out, r); return nil }); err != nil {
		t.Fatal(err)
	}
	return out[1:] // after the begin
}

func types(records []audit.Record) (out []audit.Type) {
	for _, r := range records {
		out = append(out, r.Type)
	}
	return out
}

// TestAudit: an issued certificate has two records, the first of them before it
// is released, with the identity in the certificate and nothing else of the
// token.
func TestAudit(t *testing.T) {
	f := catest.NewParts(t)
	dir, log := openAudit(t)
	cfg := f.Config()
	cfg.Audit, cfg.Uses = log, identity.NewUses(10)
	req := request(t)
	req.ID, req.Principal.Issuer, req.Principal.Subject = "request-1", "https://idp.example", "alice-secret-subject"
	cert, err := catest.Authority(t, cfg).Issue(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	got := records(t, dir, log)
	if d := cmp.Diff([]audit.Type{audit.TypeAllowed, audit.TypeIssued}, types(got)); d != "" {
		t.Fatal(d)
	}
	spki, err := hsm.SPKIHash(req.Public)
	if err != nil {
		t.Fatal(err)
	}
	if r := got[0]; r.Serial != cert.Serial || r.SAN != "alice@example.com" || r.SANType != "email" || r.Issuer != "https://idp.example" ||
		r.Request != "request-1" || r.Uses != 1 || r.SPKI != hex.EncodeToString(spki[:]) {
		t.Errorf("record %+v", r)
	}
	if r := got[1]; r.Serial != cert.Serial || r.LogIndex == nil || *r.LogIndex != *cert.LogIndex {
		t.Errorf("record %+v", r)
	}
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if text, err := os.ReadFile(name); err != nil || strings.Contains(string(text), "secret") {
			t.Errorf("%s holds another claim, or %v", name, err)
		}
	}
}

// TestNothingWithoutAudit: when the record cannot be written nothing is
// released, whatever was signed.
func TestNothingWithoutAudit(t *testing.T) {
	f := catest.NewParts(t)
	_, log := openAudit(t)
	cfg := f.Config()
	cfg.Audit, cfg.Uses = log, identity.NewUses(10)
	a := catest.Authority(t, cfg)
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	req := request(t)
	req.Principal.Token = identity.TokenUse{Expires: catest.Noon.Add(time.Hour), MaxUses: 1}
	for range 2 { // the use of the token is given back
		if cert, err := a.Issue(t.Context(), req); !errors.Is(err, ca.ErrUnavailable) || cert != nil {
			t.Errorf("certificate %v, %v", cert, err)
		}
	}
}

// TestWithdrawn: when the log fails after the decision was recorded, the audit
// says that nothing came of it.
func TestWithdrawn(t *testing.T) {
	f := catest.NewParts(t)
	dir, log := openAudit(t)
	recorded := make(chan struct{})
	f.Log.OnCommit = func(ctx context.Context) error {
		<-recorded
		return errors.New("disk full")
	}
	cfg := f.Config()
	cfg.Audit = log
	go func() {
		defer close(recorded)
		for !hasRecord(dir, audit.TypeAllowed) {
			if t.Context().Err() != nil {
				return
			}
		}
	}()
	if _, err := catest.Authority(t, cfg).Issue(t.Context(), request(t)); !errors.Is(err, ca.ErrLog) {
		t.Fatal(err)
	}
	got := records(t, dir, log)
	if d := cmp.Diff([]audit.Type{audit.TypeAllowed, audit.TypeWithdrawn}, types(got)); d != "" {
		t.Fatal(d)
	}
	if got[0].Serial != got[1].Serial || got[1].Serial == "" || got[1].Reason == "" {
		t.Errorf("records %+v", got)
	}
}

func hasRecord(dir string, want audit.Type) (found bool) {
	_, err := audit.Verify(dir, nil, nil, func(r audit.Record) error { found = found || r.Type == want; return nil })
	return found && err == nil
}

// TestPolicy: the policy decides before anything is signed, and its lifetime
// counts as far as it is the shorter one.
func TestPolicy(t *testing.T) {
	rules, err := policy.New([]policy.Rule{
		{Name: "mallory", Effect: policy.Deny, Identity: "mallory@**"},
		{Name: "people", Effect: policy.Allow, Issuer: "https://idp.example", Identity: "*@example.com", Lifetime: 3 * time.Minute, Keys: []string{"ecdsa-p256"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	f := catest.NewParts(t)
	dir, log := openAudit(t)
	cfg := f.Config()
	cfg.Policy, cfg.Audit = rules, log
	a := catest.Authority(t, cfg)
	ask := func(issuer, email string) (*ca.Certificate, error) {
		req := request(t)
		req.Principal.Issuer, req.Principal.SAN = issuer, profile.SAN{Type: profile.Email, Value: email}
		return a.Issue(t.Context(), req)
	}
	for _, refused := range [][2]string{{"https://idp.example", "mallory@example.com"}, {"https://idp.example", "alice@example.org"}, {"https://other.example", "alice@example.com"}} {
		if _, err := ask(refused[0], refused[1]); !errors.Is(err, ca.ErrPolicy) || strings.Contains(err.Error(), "example.") {
			t.Errorf("%v: %v", refused, err)
		}
	}
	if n := f.Key.Count() + f.LogKey.Count(); n != 0 {
		t.Errorf("%d signatures for what is refused", n)
	}
	cert, err := ask("https://idp.example", "alice@example.com")
	if err != nil || cert.NotAfter.Sub(cert.NotBefore) != 3*time.Minute {
		t.Errorf("%+v, %v", cert, err)
	}
	got := records(t, dir, log)
	if d := cmp.Diff([]audit.Type{audit.TypeRefused, audit.TypeRefused, audit.TypeRefused, audit.TypeAllowed, audit.TypeIssued}, types(got)); d != "" {
		t.Fatal(d)
	}
	if got[0].Rule != "mallory" || got[1].Rule != "" || got[3].Rule != "people" {
		t.Errorf("rules %q, %q, %q", got[0].Rule, got[1].Rule, got[3].Rule)
	}
}

// TestLongLifetimeOfARule: no rule gives a certificate a longer life than the
// authority's.
func TestLongLifetimeOfARule(t *testing.T) {
	rules, err := policy.New([]policy.Rule{{Name: "people", Effect: policy.Allow, Lifetime: time.Hour}})
	if err != nil {
		t.Fatal(err)
	}
	f := catest.NewParts(t)
	cfg := f.Config()
	cfg.Policy, cfg.Lifetime = rules, 5*time.Minute
	cert, err := catest.Authority(t, cfg).Issue(t.Context(), request(t))
	if err != nil || cert.NotAfter.Sub(cert.NotBefore) != 5*time.Minute {
		t.Errorf("%+v, %v", cert, err)
	}
}

// TestLongReason: a record has the beginning of a long error, in whole characters.
func TestLongReason(t *testing.T) {
	dir, log := openAudit(t)
	cfg := catest.NewParts(t).Config()
	cfg.Audit = log
	catest.Authority(t, cfg).Refused("r", nil, errors.New("x"+strings.Repeat("ä", 10_000)))
	got := records(t, dir, log)
	if len(got) != 1 || got[0].Reason != "x"+strings.Repeat("ä", 149) {
		t.Errorf("%d records, reason %q", len(got), got[0].Reason)
	}
}

// TestUsedToken: a token beyond its uses gets nothing.
func TestUsedToken(t *testing.T) {
	f := catest.NewParts(t)
	cfg := f.Config()
	cfg.Uses = identity.NewUses(10)
	a := catest.Authority(t, cfg)
	req := request(t)
	req.Principal.Token = identity.TokenUse{Expires: catest.Noon.Add(time.Hour), MaxUses: 1}
	if _, err := a.Issue(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Issue(t.Context(), req); !errors.Is(err, identity.ErrUsed) {
		t.Error(err)
	}
}
