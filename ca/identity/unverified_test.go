package identity

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/chancery-ca/chancery/ca/profile"
)

// TestReadUnverified: the claims are those that Verify sees, whoever signed; and
// nobody is asked for a key.
func TestReadUnverified(t *testing.T) {
	i := startIDP(t)
	cfg := Config{
		OIDCIssuers: map[string]Issuer{i.Issuer(): i.email()},
		MetaIssuers: map[string]Issuer{"https://*.idp.example": {ClientID: "sigstore", Type: "email"}},
	}
	good := i.token(t, map[string]any{"team": []string{"a", "b"}})
	forged := good[:strings.LastIndexByte(good, '.')+1] + "AAAA"
	tests := []struct {
		name, token, issuer string
		// err is ReadUnverified's, warning of Unverified.Err.
		err, warning error
	}{
		{"good", good, i.Issuer(), nil, nil},
		{"forged", forged, i.Issuer(), nil, nil},
		{"of a pattern", i.token(t, map[string]any{"iss": "https://eu.idp.example"}), "https://eu.idp.example", nil, nil},
		{"expired", i.token(t, map[string]any{"iat": 1, "exp": 2}), i.Issuer(), nil, ErrToken},
		{"for somebody else", i.token(t, map[string]any{"aud": "other"}), i.Issuer(), nil, ErrToken},
		{"of an unknown issuer", i.token(t, map[string]any{"iss": "https://x.example"}), "", ErrToken, nil},
		{"without an identity", i.token(t, map[string]any{"email": ""}), "", ErrToken, nil},
		{"no token", "x", "", ErrToken, nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			u, err := ReadUnverified(cfg, test.token, noon)
			if !errors.Is(err, test.err) {
				t.Fatalf("err %v, want %v", err, test.err)
			}
			if err != nil {
				return
			}
			if u.Issuer != test.issuer || u.SAN != (profile.SAN{Type: profile.Email, Value: "alice@example.com"}) {
				t.Errorf("%s, %v", u.Issuer, u.SAN)
			}
			if !errors.Is(u.Err, test.warning) || (u.Err == nil) != (test.warning == nil) {
				t.Errorf("warning %v, want %v", u.Err, test.warning)
			}
		})
	}
	u, err := ReadUnverified(cfg, good, noon)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"a", "b"}, u.Claim("team")); d != "" {
		t.Error(d)
	}
	if n := i.fetches.Load(); n != 0 {
		t.Errorf("keys were fetched %d times", n)
	}
	if _, err := ReadUnverified(Config{}, good, noon); !errors.Is(err, ErrConfig) {
		t.Errorf("no issuer: %v", err)
	}
}
