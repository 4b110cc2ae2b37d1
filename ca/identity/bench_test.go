package identity

import (
	"net/http/httptest"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/ca/identity/oidctest"
)

// BenchmarkVerify is one RS256 token whose key is known: our strict parse,
// those of go-oidc and go-jose, one RSA verification, no network.
func BenchmarkVerify(b *testing.B) {
	srv := httptest.NewServer(nil)
	defer srv.Close()
	key, err := providerKey()
	if err != nil {
		b.Fatal(err)
	}
	p := oidctest.New(oidctest.Config{Issuer: srv.URL, Key: key, Now: func() time.Time { return noon }})
	srv.Config.Handler = p
	v, err := New(b.Context(), Config{OIDCIssuers: map[string]Issuer{
		srv.URL: {IssuerURL: srv.URL, ClientID: "sigstore", Type: "email"},
	}}, Options{Now: atNoon, LoopbackHTTP: true})
	if err != nil {
		b.Fatal(err)
	}
	defer v.Close()
	raw, err := p.Token(nil)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := v.Verify(b.Context(), raw); err != nil {
			b.Fatal(err)
		}
	}
}
