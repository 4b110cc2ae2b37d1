package identity

import (
	"testing"

	"github.com/chancery-ca/chancery/ca/internal/idptest"
)

// BenchmarkVerify is one RS256 token whose key is known: our strict parse,
// those of go-oidc and go-jose, one RSA verification, no network.
func BenchmarkVerify(b *testing.B) {
	p := idptest.Serve(b, noon, nil)
	v, err := New(b.Context(), Config{OIDCIssuers: map[string]Issuer{
		p.Issuer(): {ClientID: "sigstore", Type: "email"},
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
