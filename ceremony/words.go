package ceremony

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/tyler-smith/go-bip39"
)

// Words returns a SHA-256 as 24 words for reading aloud: the encoding of
// BIP-39 ("Mnemonic code for generating deterministic keys", bitcoin/bips,
// bip-0039.mediawiki) with its English list of 2,048 words, of which no two
// have the same first four letters. Each word is 11 bits; the last one carries
// 8 bits of checksum, so a word misheard is mostly noticed without the other
// side. The PGP word list would take 32 words and has no checksum.
func Words(hash [sha256.Size]byte) string {
	words, err := bip39.NewMnemonic(hash[:])
	if err != nil { // 256 bits are a length that BIP-39 has
		return ""
	}
	return words
}

// challengeSize is how many of a hash's words a person types: 33 bits, which
// nobody hits by chance, and not 24 words, which nobody types without a slip.
const challengeSize = 3

// challenge is a request for some of a hash's words, by number from 1. Which
// ones depends on the hash and on what it is asked for, so that a person who
// types them looked at this hash for this purpose.
type challenge struct {
	numbers [challengeSize]int
	words   [challengeSize]string
}

// newChallenge picks the words: their numbers come from
// SHA-256("chancery words v1\0" ‖ purpose ‖ 0x00 ‖ hash), octet by octet, each
// octet below 240 modulo 24, without repetition, then sorted.
func newChallenge(purpose string, hash [sha256.Size]byte) challenge {
	all := strings.Fields(Words(hash))
	sum := sha256.Sum256(append([]byte("chancery words v1\x00"+purpose+"\x00"), hash[:]...))
	var c challenge
	n := 0
	for len(all) == 24 && n < challengeSize {
		for _, b := range sum {
			number := int(b)%24 + 1
			if n < challengeSize && b < 240 && !slices.Contains(c.numbers[:n], number) {
				c.numbers[n] = number
				n++
			}
		}
		sum = sha256.Sum256(sum[:])
	}
	slices.Sort(c.numbers[:])
	for i, number := range c.numbers {
		c.words[i] = all[number-1]
	}
	return c
}

// prompt says which words to type.
func (c challenge) prompt() string {
	return fmt.Sprintf("Type words %d, %d and %d", c.numbers[0], c.numbers[1], c.numbers[2])
}

// answer is what is to be typed.
func (c challenge) answer() string { return strings.Join(c.words[:], " ") }

// check compares without regard to case, spaces and commas.
func (c challenge) check(typed string) error {
	if c.fits(typed) {
		return nil
	}
	return errors.New("these are not the words")
}

func (c challenge) fits(typed string) bool {
	fields := strings.FieldsFunc(strings.ToLower(typed), func(r rune) bool { return r == ' ' || r == ',' || r == '\t' })
	return slices.Equal(fields, c.words[:])
}
