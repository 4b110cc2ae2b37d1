package service

import (
	"errors"
	"log/slog"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/ca/identity"
	"github.com/chancery-ca/chancery/ca/identity/oidctest"
	"github.com/chancery-ca/chancery/config"
)

func TestVerifyToken(t *testing.T) {
	srv := httptest.NewServer(nil)
	t.Cleanup(srv.Close)
	idp := oidctest.New(oidctest.Config{Issuer: srv.URL, Email: "alice@example.com"})
	srv.Config.Handler = idp
	good, err := idp.Token(nil)
	if err != nil {
		t.Fatal(err)
	}
	expired, err := idp.Token(map[string]any{"iat": 1, "exp": 2})
	if err != nil {
		t.Fatal(err)
	}
	elsewhere, err := idp.Token(map[string]any{"iss": "https://elsewhere.example"})
	if err != nil {
		t.Fatal(err)
	}
	away, err := idp.Token(map[string]any{"iss": "http://127.0.0.1:1"})
	if err != nil {
		t.Fatal(err)
	}
	cfg := &config.Config{CA: config.CA{Config: identity.Config{OIDCIssuers: map[string]identity.Issuer{
		srv.URL:              {ClientID: "sigstore", Type: "email"},
		"http://127.0.0.1:1": {ClientID: "sigstore", Type: "email"}, // nobody listens
	}}}}
	tests := []struct {
		name, token string
		timeout     time.Duration
		want        error
	}{
		{"good", good, time.Minute, nil},
		{"forged", good[:strings.LastIndexByte(good, '.')+1] + "AAAA", time.Minute, identity.ErrToken},
		{"expired", expired, time.Minute, identity.ErrToken},
		{"of another issuer", elsewhere, time.Minute, identity.ErrToken},
		{"of an issuer that is away", away, 600 * time.Millisecond, identity.ErrUnavailable},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			began := time.Now()
			p, err := VerifyToken(t.Context(), cfg, test.token, test.timeout, slog.New(slog.DiscardHandler))
			if !errors.Is(err, test.want) || err == nil && p.SAN.Value != "alice@example.com" {
				t.Errorf("%+v, %v, want %v", p, err, test.want)
			}
			if took := time.Since(began); took > test.timeout+time.Minute {
				t.Errorf("it took %s, at most %s", took, test.timeout)
			}
		})
	}
}

func TestWithReasons(t *testing.T) {
	err := withReasons(identity.ErrUnavailable, []identity.IssuerHealth{{Issuer: "well"}, {Issuer: "away", Err: errors.New("nobody there")}})
	if !errors.Is(err, identity.ErrUnavailable) || !strings.HasSuffix(err.Error(), ": nobody there") {
		t.Errorf("error %v", err)
	}
}
