package pkcs11_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ThalesIgnite/crypto11"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
)

// The benchmarks compare our Key with crypto11's signer as it is, on one token
// in one run, a moment after one another, and report medians and their ratio:
// the machine may be busy, but it is equally busy for both. Read the ratios, not
// the figures.

// BenchmarkSign measures one caller on a token that is as fast as the machine
// (SoftHSM): %-of-raw+verify is the time of crypto11's bare signature and of one
// software verification, in per cent of the time of our signature, which is
// verified.
//
//	go test -bench Sign -benchtime 2s ./hsm/pkcs11
func BenchmarkSign(b *testing.B) {
	token := hsmtest.NewSoftHSM(b)
	opened := openToken(b, token, 1)
	for _, algorithm := range []hsm.Algorithm{hsm.ECDSAP256, hsm.ECDSAP384} {
		key := hsmtest.NewKey(b, opened, string(algorithm), algorithm)
		bare := bareSigner(b, opened, token, key, 1)
		b.Run(string(algorithm), func(b *testing.B) { signPairs(b, key, bare) })
	}
}

// signPairs signs and verifies b.N times with each.
func signPairs(b *testing.B, key hsm.Key, bare crypto.Signer) {
	pub := key.Public().(*ecdsa.PublicKey)
	algorithm, err := hsm.AlgorithmOf(pub)
	if err != nil {
		b.Fatal(err)
	}
	digest := make([]byte, algorithm.Hash().Size())
	_, _ = rand.Read(digest)
	b.ReportAllocs()
	var ours, raw, verified []time.Duration
	for b.Loop() {
		start := time.Now()
		if _, err := key.Sign(nil, digest, algorithm.Hash()); err != nil {
			b.Fatal(err)
		}
		signed := time.Now()
		sig, err := bare.Sign(nil, digest, algorithm.Hash())
		if err != nil {
			b.Fatal(err)
		}
		bared := time.Now()
		if err := hsm.Verify(pub, digest, sig); err != nil {
			b.Fatal(err)
		}
		ours = append(ours, signed.Sub(start))
		raw = append(raw, bared.Sub(signed))
		verified = append(verified, time.Since(bared))
	}
	o, r, v := median(ours), median(raw), median(verified)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(microseconds(o), "key-µs")
	b.ReportMetric(microseconds(r), "raw-µs")
	b.ReportMetric(microseconds(v), "verify-µs")
	b.ReportMetric(100*float64(r+v)/float64(o), "%-of-raw+verify")
}

// BenchmarkSlowToken measures a token that takes 5 ms for a signature, which is
// where a hand-over costs nothing and a worker that is not at work everything:
// %-of-raw is the rate of our Key with n sessions and twice as many callers, in
// per cent of that of crypto11's bare signer with n sessions and n callers. Go
// takes the processor away from a blocking C call only after a while, so the
// rates depend on GOMAXPROCS: compare -cpu 2,4,16.
func BenchmarkSlowToken(b *testing.B) {
	const delay = 5 * time.Millisecond
	for _, sessions := range []int{4, 16} {
		b.Run(fmt.Sprint(sessions), func(b *testing.B) {
			shim := hsmtest.NewShim(b)
			token := shim.NewToken(b)
			opened := openToken(b, token, sessions)
			key := hsmtest.NewKey(b, opened, "key", hsm.ECDSAP256)
			bare := bareSigner(b, opened, token, key, sessions)
			shim.Delay(int(delay.Microseconds()))
			var ours, raw []time.Duration
			for b.Loop() {
				ours = append(ours, signParallel(b, 2*sessions, 20*sessions, key))
				raw = append(raw, signParallel(b, sessions, 20*sessions, bare))
			}
			o, r := median(ours), median(raw)
			most := 20 * delay // if nothing but the token took time
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(100*float64(r)/float64(o), "%-of-raw")
			b.ReportMetric(100*float64(most)/float64(o), "%-of-token")
		})
	}
}

func openToken(b *testing.B, token hsmtest.SoftHSMToken, sessions int) *pkcs11.Token {
	b.Helper()
	opened, err := pkcs11.Open(b.Context(), pkcs11.Config{
		Module: token.Module, URI: token.URI, PIN: token.PIN, MaxSessions: sessions,
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := opened.Close(); err != nil {
			b.Error(err)
		}
	})
	return opened
}

// bareSigner returns crypto11's signer for key, from a context of its own with
// n sessions to sign. The PIN is not checked again because the token is logged
// in.
func bareSigner(b *testing.B, opened *pkcs11.Token, token hsmtest.SoftHSMToken, key hsm.Key, n int) crypto.Signer {
	b.Helper()
	context, err := crypto11.Configure(&crypto11.Config{
		Path: opened.Info().Module, TokenLabel: token.Label, Pin: string(token.PIN), MaxSessions: n + 1,
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

// signParallel signs count times from n goroutines and returns how long it took.
func signParallel(b *testing.B, n, count int, signer crypto.Signer) time.Duration {
	b.Helper()
	digest := sha256.Sum256([]byte("digest"))
	start := time.Now()
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			for range count / n {
				if _, err := signer.Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	return time.Since(start)
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

func microseconds(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }
