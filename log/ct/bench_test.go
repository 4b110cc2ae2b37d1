package ct_test

import (
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/log/ct"
)

// BenchmarkPromise is an SCT for a TBSCertificate: one P-256 signature and its
// verification in the key, and what this package adds to them.
func BenchmarkPromise(b *testing.B) {
	f := newFixtureWith(b, hsmtest.SoftwareKey(hsm.ECDSAP256))
	precert := f.leaf(b, poison)
	defanged, hash := tbs(b, precert), issuerKeyHash(f.issuer)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := f.log.Promise(b.Context(), hash, defanged); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCommit is a promise and its leaf, durable, with one caller.
func BenchmarkCommit(b *testing.B) {
	f := newFixture(b)
	promises, precerts := make([]*ct.Promise, b.N), make([][]byte, b.N)
	for i := range promises {
		precert := f.leaf(b, poison)
		p, err := f.log.Promise(b.Context(), issuerKeyHash(f.issuer), tbs(b, precert))
		if err != nil {
			b.Fatal(err)
		}
		promises[i], precerts[i] = p, precert.Raw
	}
	chain := [][]byte{f.issuer.Raw, f.root.Raw}
	b.ReportAllocs()
	b.ResetTimer()
	for i, p := range promises {
		if _, err := p.Commit(b.Context(), precerts[i], chain); err != nil {
			b.Fatal(err)
		}
	}
}
