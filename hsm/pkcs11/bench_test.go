package pkcs11_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/ThalesIgnite/crypto11"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
)

// BenchmarkSign compares, in one run and on one SoftHSM key, crypto11's signer
// as it is with our Key (queue, deadline, verification), and gives the price of
// one software verification. Read the ratios, not the figures:
//
//	go test -bench Sign -benchtime 2s ./hsm/pkcs11
func BenchmarkSign(b *testing.B) {
	token := hsmtest.NewSoftHSM(b)
	opened, err := pkcs11.Open(b.Context(), pkcs11.Config{
		Module: token.Module, URI: token.URI, PIN: token.PIN, MaxSessions: 16,
	})
	if err != nil {
		b.Fatal(err)
	}
	defer opened.Close()
	for _, algorithm := range []hsm.Algorithm{hsm.ECDSAP256, hsm.ECDSAP384} {
		key := hsmtest.NewKey(b, opened, string(algorithm), algorithm)
		raw := rawSigner(b, opened.Info().Module, token, key)
		digest := make([]byte, algorithm.Hash().Size())
		_, _ = rand.Read(digest)
		for _, parallel := range []int{1, 8, 16} {
			b.Run(fmt.Sprintf("%s/crypto11/%d", algorithm, parallel), func(b *testing.B) {
				signParallel(b, parallel, raw, digest, algorithm.Hash())
			})
			b.Run(fmt.Sprintf("%s/key/%d", algorithm, parallel), func(b *testing.B) {
				signParallel(b, parallel, key, digest, algorithm.Hash())
			})
		}
		b.Run(fmt.Sprintf("%s/verify", algorithm), func(b *testing.B) {
			pub := key.Public().(*ecdsa.PublicKey)
			sig, err := key.Sign(nil, digest, algorithm.Hash())
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if err := hsm.Verify(pub, digest, sig); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// rawSigner returns crypto11's signer for key, from a context of its own. The
// PIN is not checked again because the token is logged in.
func rawSigner(b *testing.B, module string, token hsmtest.SoftHSMToken, key hsm.Key) crypto.Signer {
	b.Helper()
	context, err := crypto11.Configure(&crypto11.Config{
		Path: module, TokenLabel: token.Label, Pin: string(token.PIN), MaxSessions: 17,
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = context.Close() })
	pairs, err := context.FindAllKeyPairs()
	if err != nil {
		b.Fatal(err)
	}
	for _, pair := range pairs {
		if key.Public().(*ecdsa.PublicKey).Equal(pair.Public()) {
			return pair
		}
	}
	b.Fatal("crypto11 does not find the key")
	return nil
}

// signParallel signs b.N times from n goroutines.
func signParallel(b *testing.B, n int, signer crypto.Signer, digest []byte, hash crypto.Hash) {
	b.ReportAllocs()
	var wg sync.WaitGroup
	per := b.N / n
	for i := range n {
		count := per
		if i == 0 {
			count += b.N % n
		}
		wg.Go(func() {
			for range count {
				if _, err := signer.Sign(rand.Reader, digest, hash); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "sig/s")
}

// BenchmarkSlowToken signs with 16 sessions on a token that takes 5 ms for a
// signature, and reports how much of its rate (16 in 5 ms) is reached. Go hands
// the processor of a blocking C call to others only after a while, so the
// result depends on GOMAXPROCS: compare -cpu 2,16.
func BenchmarkSlowToken(b *testing.B) {
	const sessions, delay = 16, 5 * time.Millisecond
	shim := hsmtest.NewShim(b)
	token := shim.NewToken(b)
	opened, err := pkcs11.Open(b.Context(), pkcs11.Config{
		Module: token.Module, URI: token.URI, PIN: token.PIN, MaxSessions: sessions,
	})
	if err != nil {
		b.Fatal(err)
	}
	defer opened.Close()
	key := hsmtest.NewKey(b, opened, "key", hsm.ECDSAP256)
	shim.Delay(int(delay.Microseconds()))
	b.ResetTimer()
	signParallel(b, 2*sessions, key, make([]byte, 32), crypto.SHA256)
	most := sessions / delay.Seconds()
	b.ReportMetric(100*float64(b.N)/b.Elapsed().Seconds()/most, "%-of-token")
}
