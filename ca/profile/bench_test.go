package profile

import (
	"syscall"
	"testing"
	"time"

	zx509 "github.com/zmap/zcrypto/x509"
)

// reportCPU adds the process's own CPU time per operation, which a busy
// machine does not distort.
func reportCPU(b *testing.B) {
	b.Helper()
	used := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	start := used()
	b.Cleanup(func() { b.ReportMetric(float64(used()-start)/float64(b.N), "cpu-ns/op") })
}

// BenchmarkLeaf is the profile's whole share of an issuance: build, lint,
// precertificate TBS and final TBS, without the hardware signatures.
func BenchmarkLeaf(b *testing.B) {
	h := newHierarchy(b)
	i := newIssuer(b, h)
	spec := emailSpec(newKey(b, ecdsaSHA256.curve).Public())
	sct := placeholderSCT()
	b.ReportAllocs()
	reportCPU(b)
	for b.Loop() {
		l, err := i.Leaf(spec)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := l.final(sct); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkLeafWorkflow is the same with every CI extension.
func BenchmarkLeafWorkflow(b *testing.B) {
	h := newHierarchy(b)
	i := newIssuer(b, h)
	spec := workflowSpec(newKey(b, ecdsaSHA256.curve).Public())
	b.ReportAllocs()
	reportCPU(b)
	for b.Loop() {
		if _, err := i.Leaf(spec); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkLint is the part of BenchmarkLeaf that lints.
func BenchmarkLint(b *testing.B) {
	h := newHierarchy(b)
	i := newIssuer(b, h)
	l, err := i.Leaf(emailSpec(newKey(b, ecdsaSHA256.curve).Public()))
	if err != nil {
		b.Fatal(err)
	}
	tbs, err := l.final(placeholderSCT())
	if err != nil {
		b.Fatal(err)
	}
	der, err := throwawaySign(tbs, i.algorithm)
	if err != nil {
		b.Fatal(err)
	}
	r, err := registry()
	if err != nil {
		b.Fatal(err)
	}
	b.Run("sign", func(b *testing.B) {
		for b.Loop() {
			if _, err := throwawaySign(tbs, i.algorithm); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("parse", func(b *testing.B) {
		for b.Loop() {
			if _, err := zx509.ParseCertificate(der); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("zlint", func(b *testing.B) {
		cert, err := zx509.ParseCertificate(der)
		if err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			if f := r.run(cert); f != nil {
				b.Fatal(f)
			}
		}
	})
	b.Run("all", func(b *testing.B) {
		for b.Loop() {
			if err := lintDER(der, &candidate{kind: leaf, issuer: h.inter, algorithm: i.algorithm}); err != nil {
				b.Fatal(err)
			}
		}
	})
}
