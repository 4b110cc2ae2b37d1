package ceremony

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
)

// ErrEntropy: a share of the public randomness does not fit its commitment,
// or a random source fails its test.
var ErrEntropy = errors.New("randomness check failed")

// shareSize is the size of each share of the public randomness, in octets.
const shareSize = 32

// hardwareShare names the token's own share among the contributors.
const hardwareShare = "hardware"

// commit returns the commitment to a share:
// SHA-256("chancery commitment v1\0" ‖ contributor ‖ 0x00 ‖ share). The name
// keeps one contributor from repeating another's commitment.
func commit(contributor string, share []byte) string {
	h := sha256.New()
	h.Write([]byte("chancery commitment v1\x00" + contributor + "\x00"))
	h.Write(share)
	return hex.EncodeToString(h.Sum(nil))
}

// checkReveals checks every share against its commitment and returns the seed:
// SHA-256("chancery seed v1\0" ‖ commitments ‖ reveals ‖ hardware random).
// Commitments are those of the contributors in the definition's order and then
// the hardware's; reveals are the contributors' alone, in the same order.
func checkReveals(in *entropyIntent, out *entropyResult) ([sha256.Size]byte, error) {
	var seed [sha256.Size]byte
	n := len(in.Commitments)
	if n == 0 || len(out.Reveals) != n || in.Commitments[n-1].Contributor != hardwareShare {
		return seed, fmt.Errorf("%w: %d commitments, %d reveals", ErrEntropy, n, len(out.Reveals))
	}
	h := sha256.New()
	h.Write([]byte("chancery seed v1\x00"))
	for _, c := range in.Commitments {
		b, err := hex.DecodeString(c.Commitment)
		if err != nil || len(b) != sha256.Size {
			return seed, fmt.Errorf("%w: commitment of %.40q is malformed", ErrEntropy, c.Contributor)
		}
		h.Write(b)
	}
	for i, r := range out.Reveals {
		share, err := hex.DecodeString(r.Value)
		c := in.Commitments[i]
		if err != nil || len(share) != shareSize || r.Contributor != c.Contributor ||
			subtle.ConstantTimeCompare([]byte(commit(c.Contributor, share)), []byte(c.Commitment)) != 1 {
			return seed, fmt.Errorf("%w: share of %.40q does not fit its commitment", ErrEntropy, c.Contributor)
		}
		h.Write(share)
	}
	seed = [sha256.Size]byte(h.Sum(nil))
	if out.Seed != "" && out.Seed != hex.EncodeToString(seed[:]) {
		return seed, fmt.Errorf("%w: recorded seed differs", ErrEntropy)
	}
	return seed, nil
}

// newShare makes a contributor's share in a rehearsal.
func newShare() []byte {
	b := make([]byte, shareSize)
	_, _ = rand.Read(b) // never fails (crypto/rand since Go 1.24)
	return b
}

// Health is the outcome of the continuous health tests of NIST SP 800-90B,
// Section 4.4, over octets of a token's random source, taken once. They notice
// a source that is stuck or grossly biased, not one that is predictable.
type Health struct {
	Octets int `json:"octets"`
	// LongestRun is the longest run of one value (repetition count test).
	LongestRun int `json:"longestRun"`
	// MostFrequent is the highest count of a window's first value within the
	// window (adaptive proportion test).
	MostFrequent int `json:"mostFrequent"`
}

// The cutoffs for at least 4 bits of entropy per octet and a false alarm in
// 2^30: 1 + ceil(30/4), and the critical value of a binomial distribution of
// healthWindow trials with probability 2^-4.
const (
	healthOctets = 8192
	healthWindow = 512
	runCutoff    = 9
	windowCutoff = 71
)

// testRandom runs the health tests and returns ErrEntropy when one fails.
func testRandom(octets []byte) (Health, error) {
	h := Health{Octets: len(octets)}
	run := 0
	for i, b := range octets {
		if i > 0 && b == octets[i-1] {
			run++
		} else {
			run = 1
		}
		h.LongestRun = max(h.LongestRun, run)
	}
	for start := 0; start+healthWindow <= len(octets); start += healthWindow {
		count := 0
		for _, b := range octets[start : start+healthWindow] {
			if b == octets[start] {
				count++
			}
		}
		h.MostFrequent = max(h.MostFrequent, count)
	}
	return h, h.check()
}

// check compares the counts with the cutoffs.
func (h Health) check() error {
	if h.Octets < healthWindow || h.LongestRun >= runCutoff || h.MostFrequent >= windowCutoff {
		return fmt.Errorf("%w: %d octets, a run of %d, one value %d times in %d",
			ErrEntropy, h.Octets, h.LongestRun, h.MostFrequent, healthWindow)
	}
	return nil
}

// knownAnswer checks the hash functions that everything here rests on against
// the example "abc" of FIPS 180-4.
func knownAnswer() error {
	a, b := sha256.Sum256([]byte("abc")), sha512.Sum384([]byte("abc"))
	if hex.EncodeToString(a[:]) != "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" ||
		hex.EncodeToString(b[:]) != "cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed"+
			"8086072ba1e7cc2358baeca134c825a7" {
		return errors.New("known-answer test of SHA-2 failed")
	}
	return nil
}
