package identity

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"math/big"
	"strconv"
	"testing"

	"filippo.io/edwards25519"
	jose "github.com/go-jose/go-jose/v4"
)

// nextPrime is the first prime at start or after it by steps.
func nextPrime(start, step *big.Int) *big.Int {
	p := new(big.Int).Set(start)
	for !p.ProbablyPrime(10) {
		p.Add(p, step)
	}
	return p
}

func randomBits(t *testing.T, bits int) *big.Int {
	t.Helper()
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(one, uint(bits-2)))
	if err != nil {
		t.Fatal(err)
	}
	n.SetBit(n, bits-1, 1)
	n.SetBit(n, bits-2, 1) // so that the product has all its bits
	return n.SetBit(n, 0, 1)
}

// closeModulus is a product of two primes that follow each other.
func closeModulus(t *testing.T) *big.Int {
	t.Helper()
	p := nextPrime(randomBits(t, 1024), big.NewInt(2))
	q := nextPrime(new(big.Int).Add(p, big.NewInt(2)), big.NewInt(2))
	return p.Mul(p, q)
}

// rocaModulus is made as Infineon's generator did it: each prime is k·M +
// (65537^a mod M), where M is the product of the first 126 primes.
func rocaModulus(t *testing.T) *big.Int {
	t.Helper()
	m := big.NewInt(1)
	for _, p := range primes[:126] {
		m.Mul(m, new(big.Int).SetUint64(p))
	}
	prime := func() *big.Int {
		a := randomBits(t, 64)
		start := new(big.Int).Exp(big.NewInt(65537), a, m)
		k := new(big.Int).Div(randomBits(t, 1024), m)
		return nextPrime(start.Add(start, k.Mul(k, m)), m)
	}
	n := prime()
	return n.Mul(n, prime())
}

func TestCheckRSA(t *testing.T) {
	k := makeKeys(t)
	far := nextPrime(randomBits(t, 1024), big.NewInt(2))
	small := new(big.Int).Sub(k.rsa2048.N, new(big.Int).Mod(k.rsa2048.N, big.NewInt(743)))
	for _, test := range []struct {
		name string
		key  rsa.PublicKey
		want error
	}{
		{"2048 bits", k.rsa2048.PublicKey, nil},
		{"3072 bits", k.rsa3072.PublicKey, nil},
		{"two far primes", rsa.PublicKey{N: new(big.Int).Mul(far, nextPrime(randomBits(t, 1024), big.NewInt(2))), E: 65537}, nil},
		{"1024 bits", k.rsa1024.PublicKey, ErrWeakKey},
		{"2047 bits", rsa.PublicKey{N: new(big.Int).Rsh(k.rsa2048.N, 1), E: 65537}, ErrWeakKey},
		{"2049 bits", rsa.PublicKey{N: new(big.Int).SetBit(new(big.Int).Lsh(k.rsa2048.N, 1), 0, 1), E: 65537}, ErrWeakKey},
		{"8192 bits", rsa.PublicKey{N: new(big.Int).SetBit(k.rsa2048.N, 8191, 1), E: 65537}, ErrWeakKey},
		{"e = 1", rsa.PublicKey{N: k.rsa2048.N, E: 1}, ErrWeakKey},
		{"e = 3", rsa.PublicKey{N: k.rsa2048.N, E: 3}, ErrWeakKey},
		{"e = 65536", rsa.PublicKey{N: k.rsa2048.N, E: 65536}, ErrWeakKey},
		{"e = 65539", rsa.PublicKey{N: k.rsa2048.N, E: 65539}, ErrWeakKey},
		{"factor 743", rsa.PublicKey{N: small, E: 65537}, ErrWeakKey},
		{"even", rsa.PublicKey{N: new(big.Int).Sub(k.rsa2048.N, one), E: 65537}, ErrWeakKey},
		{"square", rsa.PublicKey{N: new(big.Int).Mul(far, far), E: 65537}, ErrWeakKey},
		{"close primes", rsa.PublicKey{N: closeModulus(t), E: 65537}, ErrWeakKey},
		{"ROCA", rsa.PublicKey{N: rocaModulus(t), E: 65537}, ErrWeakKey},
	} {
		if err := checkRSA(&test.key); !errors.Is(err, test.want) {
			t.Errorf("%s: err %v, want %v", test.name, err, test.want)
		}
	}
}

// TestHonestKeysAreNotROCA: the share of numbers with the mark is small enough
// that no honest key has it.
func TestHonestKeysAreNotROCA(t *testing.T) {
	share := 1.0
	for i, powers := range powers65537 {
		share *= float64(len(powers)) / float64(primes[1+i]-1)
	}
	if share > 1e-7 || len(powers65537) != 39 {
		t.Errorf("%g of all moduli have it, by %d primes", share, len(powers65537))
	}
}

// TestSmallOrder: the table has every point whose order divides 8, and no
// honest key.
func TestSmallOrder(t *testing.T) {
	points := 0
	for y := range smallOrder {
		for _, sign := range []byte{0, 0x80} {
			key := y
			key[31] |= sign
			if err := checkEd25519(key[:]); !errors.Is(err, ErrWeakKey) {
				t.Errorf("%x: err %v", key, err)
			}
			p, err := new(edwards25519.Point).SetBytes(key[:])
			if err != nil {
				continue
			}
			if points++; new(edwards25519.Point).MultByCofactor(p).Equal(edwards25519.NewIdentityPoint()) != 1 {
				t.Errorf("%x is not of small order", key)
			}
		}
	}
	if points < 8 {
		t.Errorf("%d points, there are 8", points)
	}
	pub, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if err := checkEd25519(pub); err != nil {
		t.Error(err)
	}
}

// TestKeyForEverybody: under the neutral point a signature that anybody can
// write verifies for every message, so that it would be everybody's key.
func TestKeyForEverybody(t *testing.T) {
	neutral := ed25519.PublicKey{31: 0}
	neutral[0] = 1
	forged := append([]byte{}, neutral...)
	forged = append(forged, make([]byte, 32)...)
	if !ed25519.Verify(neutral, []byte(challenge), forged) {
		t.Fatal("the library refuses the key by itself")
	}
	if _, err := ProveKey(publicPEM(t, neutral), forged, []string{challenge}); !errors.Is(err, ErrWeakKey) {
		t.Errorf("err %v", err)
	}
	if signs(jose.JSONWebKey{Key: neutral}) {
		t.Error("it may sign tokens")
	}
}

// TestIssuerKeys: what an issuer's RSA key must be.
func TestIssuerKeys(t *testing.T) {
	k := makeKeys(t)
	n := k.rsa2048.N
	for name, test := range map[string]struct {
		key  rsa.PublicKey
		want bool
	}{
		"2048 bits":  {rsa.PublicKey{N: n, E: 65537}, true},
		"e = 3":      {rsa.PublicKey{N: n, E: 3}, true},
		"e = 1":      {rsa.PublicKey{N: n, E: 1}, false},
		"e = 2":      {rsa.PublicKey{N: n, E: 2}, false},
		"1024 bits":  {k.rsa1024.PublicKey, false},
		"9000 bits":  {rsa.PublicKey{N: new(big.Int).SetBit(n, 8999, 1), E: 65537}, false},
		"even":       {rsa.PublicKey{N: new(big.Int).Sub(n, one), E: 65537}, false},
		"for crypto": {rsa.PublicKey{N: n, E: 65537}, false},
	} {
		key := jose.JSONWebKey{Key: &test.key}
		if name == "for crypto" {
			key.Use = "enc"
		}
		if got := signs(key); got != test.want {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
	}
}

// BenchmarkCheckRSA is the cost of the checks beside the signature's.
func BenchmarkCheckRSA(b *testing.B) {
	for _, bits := range []int{2048, 4096} {
		key, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(strconv.Itoa(bits), func(b *testing.B) {
			for b.Loop() {
				if err := checkRSA(&key.PublicKey); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
