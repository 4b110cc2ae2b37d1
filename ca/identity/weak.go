package identity

import (
	"crypto/ed25519"
	"crypto/rsa"
	"fmt"
	"math/big"
	"slices"
)

// fermatRounds is how many steps of Fermat's method a modulus must withstand:
// as many as boulder's goodkey takes.
const fermatRounds = 100

// checkRSA is what boulder's goodkey asks of a client's RSA key: a usual size,
// the usual exponent, and no modulus that is known to be easy to factor. Errors:
// ErrWeakKey.
func checkRSA(key *rsa.PublicKey) error {
	if !slices.Contains([]int{2048, 3072, 4096}, key.N.BitLen()) {
		return fmt.Errorf("%w: RSA modulus of %d bits", ErrWeakKey, key.N.BitLen())
	}
	if key.E != 65537 {
		return fmt.Errorf("%w: RSA exponent", ErrWeakKey)
	}
	switch {
	case hasSmallFactor(key.N):
		return fmt.Errorf("%w: RSA modulus has a small factor", ErrWeakKey)
	case isROCA(key.N):
		return fmt.Errorf("%w: RSA modulus of a flawed generator (CVE-2017-15361)", ErrWeakKey)
	case hasCloseFactors(key.N):
		return fmt.Errorf("%w: RSA modulus of two close primes (CVE-2022-26320)", ErrWeakKey)
	}
	return nil
}

// primes are those below 752, in order.
var primes = func() (out []uint64) {
	for n := int64(2); n < 752; n++ {
		if big.NewInt(n).ProbablyPrime(0) { // exact below 2^64
			out = append(out, uint64(n))
		}
	}
	return out
}()

// residues are n modulo each of primes: by one long division for as many
// primes as have a product of one word.
func residues(n *big.Int) []uint64 {
	out := make([]uint64, 0, len(primes))
	product, rest := new(big.Int), new(big.Int)
	for at := 0; at < len(primes); {
		end, m := at, uint64(1)
		for ; end < len(primes) && m < 1<<54; end++ { // no prime has more than 10 bits
			m *= primes[end]
		}
		r := rest.Mod(n, product.SetUint64(m)).Uint64()
		for _, p := range primes[at:end] {
			out = append(out, r%p)
		}
		at = end
	}
	return out
}

func hasSmallFactor(n *big.Int) bool { return slices.Contains(residues(n), 0) }

// powers65537 are, for each of the first 39 odd primes, the residues that are
// powers of 65537.
var powers65537 = func() (out []map[uint64]bool) {
	for _, p := range primes[1:40] {
		powers := map[uint64]bool{}
		for x := uint64(1); !powers[x]; x = x * 65537 % p {
			powers[x] = true
		}
		out = append(out, powers)
	}
	return out
}()

// isROCA says whether a modulus has the mark of Infineon's generator: modulo
// every small prime it is a power of 65537 (Nemec et al., The Return of
// Coppersmith's Attack, Section 2.3). One in many millions of honest ones has it too.
func isROCA(n *big.Int) bool {
	rest := residues(n)[1:]
	for i, powers := range powers65537 {
		if !powers[rest[i]] {
			return false
		}
	}
	return true
}

// hasCloseFactors tries Fermat's method on an odd n = a² - b², from the smallest a.
func hasCloseFactors(n *big.Int) bool {
	if n.Bit(0) == 0 {
		return true
	}
	a := new(big.Int).Sqrt(n)
	b2 := new(big.Int).Mul(a, a)
	if b2.Cmp(n) < 0 {
		a.Add(a, one)
		b2.Mul(a, a)
	}
	b2.Sub(b2, n)
	b, step := new(big.Int), new(big.Int)
	for range fermatRounds {
		if maybeSquare(b2) && step.Mul(b.Sqrt(b2), b).Cmp(b2) == 0 {
			return true
		}
		b2.Add(b2, step.Add(step.Lsh(a, 1), one)) // (a+1)² = a² + 2a + 1
		a.Add(a, one)
	}
	return false
}

// maybeSquare is false for 99 of 100 numbers, none of them a square: by their
// residues (Cohen, A Course in Computational Algebraic Number Theory, 1.7.2).
func maybeSquare(n *big.Int) bool {
	if !squares[64][n.Uint64()&63] {
		return false
	}
	r := new(big.Int).Mod(n, big.NewInt(63*65*11)).Uint64()
	return squares[63][r%63] && squares[65][r%65] && squares[11][r%11]
}

// squares are the squares modulo a number.
var squares = func() map[uint64][]bool {
	out := map[uint64][]bool{64: nil, 63: nil, 65: nil, 11: nil}
	for m := range out {
		out[m] = make([]bool, m)
		for x := range m {
			out[m][x*x%m] = true
		}
	}
	return out
}()

var one = big.NewInt(1)

// smallOrder are the y coordinates, in the encoding of RFC 8032, Section 5.1.2
// and without the sign of x, of the points whose order divides 8, and of the
// same points in encodings that are not canonical. Under such a key one
// signature verifies for many messages, or for all.
var smallOrder = func() map[[ed25519.PublicKeySize]byte]bool {
	p := new(big.Int).Sub(new(big.Int).Lsh(one, 255), big.NewInt(19))
	y8, _ := new(big.Int).SetString("05fc536d880238b13933c6d305acdfd5f098eff289f4c345b027b2c28f95e826", 16) // of order 8
	out := map[[ed25519.PublicKeySize]byte]bool{}
	for _, y := range []*big.Int{
		big.NewInt(0), one, y8, new(big.Int).Sub(p, y8), new(big.Int).Sub(p, one), p, new(big.Int).Add(p, one),
	} {
		var b [ed25519.PublicKeySize]byte
		y.FillBytes(b[:])
		slices.Reverse(b[:])
		out[b] = true
	}
	return out
}()

// checkEd25519 refuses keys of small order. Errors: ErrWeakKey.
func checkEd25519(key ed25519.PublicKey) error {
	var y [ed25519.PublicKeySize]byte
	if len(key) != len(y) {
		return fmt.Errorf("%w: Ed25519 key of %d octets", ErrWeakKey, len(key))
	}
	copy(y[:], key)
	y[len(y)-1] &= 0x7f
	if smallOrder[y] {
		return fmt.Errorf("%w: Ed25519 key of small order", ErrWeakKey)
	}
	return nil
}
