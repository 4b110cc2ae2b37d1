package ceremony

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math/big"
	"testing"

	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// The cutoff of the adaptive proportion test is the one of SP 800-90B, Section
// 4.4.2, for 4 bits of entropy per octet and a false alarm in 2^30.
func TestWindowCutoff(t *testing.T) {
	// P(X = k) is C(512, k) · 15^(512-k) / 16^512; counted from the top.
	scale := new(big.Int).Exp(big.NewInt(16), big.NewInt(healthWindow), nil)
	alpha := scale.Rsh(scale, 30)
	tail, c := new(big.Int), healthWindow+1
	for {
		n := new(big.Int).Exp(big.NewInt(15), big.NewInt(int64(healthWindow-c+1)), nil)
		n.Mul(n, new(big.Int).Binomial(healthWindow, int64(c-1)))
		if tail.Add(tail, n); tail.Cmp(alpha) > 0 {
			break
		}
		c--
	}
	if c != windowCutoff {
		t.Errorf("cutoff %d, computed %d", windowCutoff, c)
	}
}

func TestRandomHealth(t *testing.T) {
	good, err := randomOctets(t.Context(), hsmtest.SoftHSM(t), healthOctets)
	if err != nil || len(good) != healthOctets {
		t.Fatalf("%d octets, %v", len(good), err)
	}
	if h, err := testRandom(good); err != nil {
		t.Errorf("a good source: %+v, %v", h, err)
	}
	biased := bytes.Clone(good)
	for i := 0; i < healthWindow; i += 6 {
		biased[i] = biased[0]
	}
	for _, tc := range []struct {
		name   string
		octets []byte
	}{
		{"stuck", make([]byte, healthOctets)},
		{"stuck for nine octets", append(bytes.Clone(good), bytes.Repeat([]byte{good[len(good)-1] + 1}, runCutoff)...)},
		{"biased", biased},
		{"too few", good[:healthWindow-1]},
		{"none", nil},
	} {
		if _, err := testRandom(tc.octets); !errors.Is(err, ErrEntropy) {
			t.Errorf("%s: %v, want ErrEntropy", tc.name, err)
		}
	}
}

func TestCheckReveals(t *testing.T) {
	a, b, hw := bytes.Repeat([]byte{1}, shareSize), bytes.Repeat([]byte{2}, shareSize), bytes.Repeat([]byte{3}, shareSize)
	in := []contribution{
		{Contributor: "w1", Commitment: commit("w1", a)},
		{Contributor: "w2", Commitment: commit("w2", b)},
		{Contributor: hardwareShare, Commitment: commit(hardwareShare, hw)},
	}
	reveal := func(who string, share []byte) contribution {
		return contribution{Contributor: who, Value: hex.EncodeToString(share)}
	}
	good := []contribution{reveal("w1", a), reveal("w2", b), reveal(hardwareShare, hw)}
	// By hand: (printf 'chancery seed v1\0'; for each commitment and share, xxd -r -p) | sha256sum
	const want = "ce8570674a106ae705f07c343d1afeacb4e7d9a0aabf6940d47be6a9f0786dcf"
	seed, err := checkReveals(in, good)
	if err != nil || hex.EncodeToString(seed[:]) != want {
		t.Errorf("seed %x, %v; want %s", seed, err, want)
	}
	for _, tc := range []struct {
		name    string
		in      []contribution
		reveals []contribution
	}{
		{"another share", in, []contribution{reveal("w1", b), reveal("w2", b), reveal(hardwareShare, hw)}},
		{"shares swapped", in, []contribution{reveal("w2", b), reveal("w1", a), reveal(hardwareShare, hw)}},
		{"a share missing", in, good[:2]},
		{"a share more", in, append(good, reveal("w3", a))},
		{"a short share", in, []contribution{reveal("w1", a[:31]), reveal("w2", b), reveal(hardwareShare, hw)}},
		{"not hexadecimal", in, []contribution{{Contributor: "w1", Value: "zz"}, reveal("w2", b), reveal(hardwareShare, hw)}},
		{"no hardware", in[:2], good[:2]},
		{"nothing", nil, nil},
		{"a commitment copied from another", []contribution{
			in[0], {Contributor: "w2", Commitment: in[0].Commitment}, in[2]},
			[]contribution{reveal("w1", a), reveal("w2", a), reveal(hardwareShare, hw)}},
	} {
		if _, err := checkReveals(tc.in, tc.reveals); !errors.Is(err, ErrEntropy) {
			t.Errorf("%s: %v, want ErrEntropy", tc.name, err)
		}
	}
}

func TestKnownAnswer(t *testing.T) {
	if err := knownAnswer(); err != nil {
		t.Error(err)
	}
}

func TestWords(t *testing.T) {
	// BIP-39's own test vector for 32 octets of 0x7f.
	const want = "legal winner thank year wave sausage worth useful legal winner thank year wave sausage worth useful legal winner thank year wave sausage worth title"
	if got := Words([32]byte(bytes.Repeat([]byte{0x7f}, 32))); got != want {
		t.Errorf("words %q", got)
	}
}
