package tpm_test

import (
	"crypto/ecdsa"
	"crypto/rand"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// BenchmarkSign compares, on one emulated TPM and in one run, a bare TPM2_Sign by
// go-tpm in a reused session of the same kind with our Key (line, worker,
// session, verification) at 1 and 8 callers, and gives the price of one software
// verification. The TPM makes one signature at a time. Read the ratios:
//
//	go test -run xxx -bench Sign -benchtime 2s ./hsm/tpm
func BenchmarkSign(b *testing.B) {
	token := hsmtest.OpenSWTPM(b)
	for _, algorithm := range []hsm.Algorithm{hsm.ECDSAP256, hsm.ECDSAP384} {
		key := hsmtest.NewKey(b, token, string(algorithm), algorithm)
		digest := make([]byte, algorithm.Hash().Size())
		_, _ = rand.Read(digest)
		b.Run(string(algorithm)+"/raw", func(b *testing.B) {
			sign, release, err := token.RawSign(key, digest)
			defer release()
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if err := sign(); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(string(algorithm)+"/key", func(b *testing.B) {
			for b.Loop() {
				if _, err := key.Sign(nil, digest, algorithm.Hash()); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(string(algorithm)+"/key/8", func(b *testing.B) {
			b.SetParallelism(4) // of two processors
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if _, err := key.Sign(nil, digest, algorithm.Hash()); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
		b.Run(string(algorithm)+"/verify", func(b *testing.B) {
			sig, err := key.Sign(nil, digest, algorithm.Hash())
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if err := hsm.Verify(key.Public().(*ecdsa.PublicKey), digest, sig); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
