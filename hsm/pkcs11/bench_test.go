package pkcs11_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"fmt"
	"runtime"
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
// the figures. P is GOMAXPROCS, which each sets for itself: -cpu has no effect on
// a part that loops with B.Loop.

// BenchmarkSign measures a token that is as fast as the machine (SoftHSM), with
// one session. %-of-raw+verify is the time of crypto11's bare signature and of
// one software verification, one after the other, in per cent of the time that
// our Key takes for a signature, which is verified. One caller waits for each
// signature before it asks for the next; with more, one verifies while the
// session signs for another. With P=1 the hand-over from the caller to the worker
// and back costs what our code and two switches of goroutine cost; with more, and
// nothing else to do for them, Go wakes an idle processor at each of the two.
//
//	go test -run '^$' -bench Sign -benchtime 2s ./hsm/pkcs11
func BenchmarkSign(b *testing.B) {
	token := hsmtest.NewSoftHSM(b)
	opened := openToken(b, token, 1)
	for _, algorithm := range []hsm.Algorithm{hsm.ECDSAP256, hsm.ECDSAP384} {
		key := hsmtest.NewKey(b, opened, string(algorithm), algorithm)
		bare := bareSigner(b, opened, token, key, 1)
		for _, row := range []struct{ procs, callers int }{{1, 1}, {2, 1}, {2, 2}, {2, 4}} {
			b.Run(fmt.Sprintf("%s/P=%d/callers=%d", algorithm, row.procs, row.callers), func(b *testing.B) {
				defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(row.procs))
				signPairs(b, row.callers, key, bare)
			})
		}
	}
}

// signPairs takes turns: our Key signs, then crypto11 as often, and each of its
// signatures is verified. One caller's signatures are timed one by one, those of
// many callers 32 together.
func signPairs(b *testing.B, callers int, key hsm.Key, bare crypto.Signer) {
	run := 1
	if callers > 1 {
		run = 32
	}
	pub := key.Public().(*ecdsa.PublicKey)
	algorithm, err := hsm.AlgorithmOf(pub)
	if err != nil {
		b.Fatal(err)
	}
	digest := make([]byte, algorithm.Hash().Size())
	var ours, raw, verified []time.Duration
	for b.Loop() {
		ours = append(ours, signParallel(b, callers, run, key)/time.Duration(run))
		for range run {
			start := time.Now()
			sig, err := bare.Sign(nil, digest, algorithm.Hash())
			if err != nil {
				b.Fatal(err)
			}
			signed := time.Now()
			if err := hsm.Verify(pub, digest, sig); err != nil {
				b.Fatal(err)
			}
			raw = append(raw, signed.Sub(start))
			verified = append(verified, time.Since(signed))
		}
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
// rates depend on P.
func BenchmarkSlowToken(b *testing.B) {
	const delay = 5 * time.Millisecond
	for _, sessions := range []int{4, 16} {
		shim := hsmtest.NewShim(b)
		token := shim.NewToken(b)
		opened := openToken(b, token, sessions)
		key := hsmtest.NewKey(b, opened, "key", hsm.ECDSAP256)
		bare := bareSigner(b, opened, token, key, sessions)
		shim.Delay(int(delay.Microseconds()))
		for _, procs := range []int{2, 4, 16} {
			b.Run(fmt.Sprintf("%d/P=%d", sessions, procs), func(b *testing.B) {
				defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
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
}

// BenchmarkScheduler measures whether blocking C calls starve Go: 16 sessions are
// kept in C calls of 5 ms each, and a goroutine that has nothing to do with them
// sleeps for 1 ms again and again. late-µs is by how much it wakes too late, the
// median and the 99th of a hundred, beside the same with the token idle.
func BenchmarkScheduler(b *testing.B) {
	const sessions, nap = 16, time.Millisecond
	shim := hsmtest.NewShim(b)
	token := shim.NewToken(b)
	opened := openToken(b, token, sessions)
	key := hsmtest.NewKey(b, opened, "key", hsm.ECDSAP256)
	shim.Delay(5000)
	lateness := func() time.Duration {
		start := time.Now()
		time.Sleep(nap)
		return time.Since(start) - nap
	}
	measure := func(b *testing.B) {
		var idle, busy []time.Duration
		for b.Loop() {
			idle = append(idle, lateness())
		}
		ctx, cancel := context.WithCancel(b.Context())
		var wg sync.WaitGroup
		for range 2 * sessions {
			wg.Go(func() {
				for ctx.Err() == nil {
					if _, err := key.Sign(nil, make([]byte, 32), crypto.SHA256); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		for range idle {
			busy = append(busy, lateness())
		}
		cancel()
		wg.Wait()
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(microseconds(median(idle)), "idle-late-µs")
		b.ReportMetric(microseconds(median(busy)), "late-µs")
		b.ReportMetric(microseconds(idle[len(idle)*99/100]), "idle-late-p99-µs")
		b.ReportMetric(microseconds(busy[len(busy)*99/100]), "late-p99-µs")
	}
	for _, procs := range []int{1, 2, 4, 16} {
		b.Run(fmt.Sprintf("P=%d", procs), func(b *testing.B) {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
			measure(b)
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
	algorithm, err := hsm.AlgorithmOf(signer.Public())
	if err != nil {
		b.Fatal(err)
	}
	digest := make([]byte, algorithm.Hash().Size())
	sign := func() {
		for range count / n {
			if _, err := signer.Sign(rand.Reader, digest, algorithm.Hash()); err != nil {
				b.Error(err)
				return
			}
		}
	}
	start := time.Now()
	var wg sync.WaitGroup
	for range n - 1 {
		wg.Go(sign)
	}
	sign()
	wg.Wait()
	return time.Since(start)
}

// median sorts d.
func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

func microseconds(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }
