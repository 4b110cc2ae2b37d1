package ceremony

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/tyler-smith/go-bip39"

	"github.com/chancery-ca/chancery/hsm"
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
func checkReveals(commitments, reveals []contribution) ([sha256.Size]byte, error) {
	var seed [sha256.Size]byte
	n := len(commitments)
	if n == 0 || len(reveals) != n || commitments[n-1].Contributor != hardwareShare {
		return seed, fmt.Errorf("%w: %d commitments, %d reveals", ErrEntropy, n, len(reveals))
	}
	h := sha256.New()
	h.Write([]byte("chancery seed v1\x00"))
	for _, c := range commitments {
		b, err := hex.DecodeString(c.Commitment)
		if err != nil || len(b) != sha256.Size {
			return seed, fmt.Errorf("%w: commitment of %.40q is malformed", ErrEntropy, c.Contributor)
		}
		h.Write(b)
	}
	for i, r := range reveals {
		share, err := hex.DecodeString(r.Value)
		c := commitments[i]
		if err != nil || len(share) != shareSize || r.Contributor != c.Contributor ||
			subtle.ConstantTimeCompare([]byte(commit(c.Contributor, share)), []byte(c.Commitment)) != 1 {
			return seed, fmt.Errorf("%w: share of %.40q does not fit its commitment", ErrEntropy, c.Contributor)
		}
		h.Write(share)
	}
	return [sha256.Size]byte(h.Sum(nil)), nil
}

// entropy collects all commitments, the token's first, each on disk before the
// next person is asked, and only then records all values. So no share depends
// on another: the token cannot choose after it has seen people's shares, and
// nobody sees a share before having committed to their own. Interrupted in
// between it begins again: the earlier commitments stay in the transcript for
// all to see.
func (r *run) entropy(ctx context.Context, s Step) error {
	name := r.facts.entropyToken()
	tok, err := r.token(ctx, name)
	if err != nil {
		return err
	}
	hardware, err := r.deviceShare(ctx, tok)
	if err != nil {
		return err
	}
	if err := r.record(s, Intent, entropyIntent{Token: name, Commitment: commit(hardwareShare, hardware)}); err != nil {
		return err
	}
	var result entropyResult
	for _, who := range r.def.Entropy.Contributors {
		share, err := r.askShare(ctx, s, who)
		if err != nil {
			return err
		}
		if err := r.state(s, who, commitmentData{Commitment: commit(who, share)}); err != nil {
			return err
		}
		result.Reveals = append(result.Reveals, contribution{Contributor: who, Value: hex.EncodeToString(share)})
	}
	result.Reveals = append(result.Reveals, contribution{Contributor: hardwareShare, Value: hex.EncodeToString(hardware)})
	seed, err := checkReveals(r.facts.commitments, result.Reveals)
	if err != nil {
		return err
	}
	result.Seed = hex.EncodeToString(seed[:])
	return r.record(s, Done, result)
}

// entropyToken is whose random numbers take part: the root's.
func (f *facts) entropyToken() string { return f.def.entropyToken() }

func (r *run) deviceShare(ctx context.Context, tok hsm.Token) ([]byte, error) {
	ctx, cancel := device(ctx)
	defer cancel()
	return randomOctets(ctx, tok, shareSize)
}

// askShare asks one person for their share of the randomness.
func (r *run) askShare(ctx context.Context, s Step, who string) ([]byte, error) {
	fresh := make([]byte, shareSize)
	_, _ = rand.Read(fresh) // never fails (crypto/rand since Go 1.24)
	answer, err := r.ask(ctx, Question{
		ID: s.ID + ":" + who, Person: who, Secret: true,
		Title: "The machine commits to your share, and shows it to all when everyone has committed.",
		Why:   "If one share is random and independent, the result is, whatever the others did.",
		Prompt: r.def.person(who).label() + ", type 64 hexadecimal digits, 24 words, 100 throws of a die, " +
			"or file: and a path (nothing is shown)",
		Check:    func(answer string) error { _, err := parseShare(answer); return err },
		Practice: hex.EncodeToString(fresh),
	})
	if err != nil {
		return nil, err
	}
	return parseShare(answer)
}

// minThrows of a six-sided die have 258 bits.
const minThrows = 100

// filePrefix begins an answer that names a file with the answer.
const filePrefix = "file:"

// parseShare reads a share as a person brings it: 64 hexadecimal digits, the
// 24 words of Words, 100 or more throws of a die (the digits 1 to 6, of which
// the share is the SHA-256), or "file:" and the path of a file with one of
// these. Spaces, tabs and line ends between digits do not count.
func parseShare(text string) ([]byte, error) {
	if path, ok := strings.CutPrefix(strings.TrimSpace(text), filePrefix); ok {
		content, err := readBounded(strings.TrimSpace(path), maxAnswer)
		if err != nil {
			return nil, err
		}
		text = string(content)
		if strings.HasPrefix(strings.TrimSpace(text), filePrefix) {
			return nil, errors.New("a file that names a file")
		}
	}
	fields := strings.Fields(text)
	digits := strings.Join(fields, "")
	switch {
	case len(fields) == 24:
		if share, err := bip39.EntropyFromMnemonic(strings.ToLower(strings.Join(fields, " "))); err == nil {
			return share, nil
		}
	case len(digits) == 2*shareSize:
		if share, err := hex.DecodeString(digits); err == nil {
			return share, nil
		}
	}
	if len(digits) >= minThrows && strings.Trim(digits, "123456") == "" {
		sum := sha256.Sum256([]byte(digits))
		return sum[:], nil
	}
	return nil, fmt.Errorf("this is neither %d hexadecimal digits, 24 words of the list, nor %d throws of a die", 2*shareSize, minThrows)
}

// takeEntropy accepts the token's commitment again: an interrupted step begins
// anew.
func (f *facts) takeEntropy(rec *Record, _ Step) error {
	switch rec.Type {
	case Intent:
		var d entropyIntent
		if err := rec.decode(&d); err != nil {
			return err
		}
		if d.Token != f.entropyToken() {
			return bad(rec, "hardware random is not of the root's token")
		}
		f.hardware = d.Commitment
		f.commitments = nil
		if len(f.def.Entropy.Contributors) == 0 {
			f.commitments = []contribution{{Contributor: hardwareShare, Commitment: d.Commitment}}
		}
		return nil
	case Statement:
		return f.takeCommitment(rec)
	}
	var d entropyResult
	if err := rec.result(&d); err != nil {
		return err
	}
	seed, err := checkReveals(f.commitments, d.Reveals)
	if err != nil {
		return bad(rec, "%w", err)
	}
	if d.Seed != hex.EncodeToString(seed[:]) {
		return bad(rec, "%w: recorded seed differs", ErrEntropy)
	}
	f.seed, f.seedRecord = seed, rec.Digest()
	return nil
}

// takeCommitment takes one person's commitment, in the definition's order and
// after the token's.
func (f *facts) takeCommitment(rec *Record) error {
	var d commitmentData
	if err := rec.decode(&d); err != nil {
		return err
	}
	who := f.def.Entropy.Contributors
	if n := len(f.commitments); f.hardware == "" || n >= len(who) || who[n] != rec.Actor {
		return bad(rec, "%w: commitment of %.40q out of turn", ErrEntropy, rec.Actor)
	}
	f.commitments = append(f.commitments, contribution{Contributor: rec.Actor, Commitment: d.Commitment})
	if len(f.commitments) == len(who) {
		f.commitments = append(f.commitments, contribution{Contributor: hardwareShare, Commitment: f.hardware})
	}
	return nil
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
