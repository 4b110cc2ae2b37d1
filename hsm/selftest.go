package hsm

import (
	"context"
	_ "crypto/sha256" // the hashes of the algorithms
	_ "crypto/sha512"
	"encoding/asn1"
	"fmt"
	"math/big"
	"time"
)

// Proof is a signature that shows the use of a key. A verifier with the public
// key hashes Text with the algorithm's hash and checks Signature.
type Proof struct {
	// Text names the key by its SPKI hash and the time (RFC 3339, UTC).
	Text string
	// Signature is ASN.1 DER (RFC 3279, 2.2.3).
	Signature []byte
}

// Prove has the key sign a text that names it and the time: one signature. It
// fails as Key.SignContext does.
func Prove(ctx context.Context, key Key, now time.Time) (Proof, error) {
	algorithm, err := AlgorithmOf(key.Public())
	if err != nil {
		return Proof{}, err
	}
	spki := key.Ref().SPKI
	text := fmt.Sprintf("chancery self-test of key %x at %s", spki, now.UTC().Format(time.RFC3339Nano))
	sig, err := key.SignContext(ctx, digestOf(algorithm, text), algorithm.Hash())
	if err != nil {
		return Proof{}, fmt.Errorf("sign self-test: %w", err)
	}
	return Proof{Text: text, Signature: sig}, nil
}

// SelfTestSignatures is how many signatures of one digest SelfTest compares.
const SelfTestSignatures = 64

// selfTestText is what SelfTest has signed SelfTestSignatures times.
const selfTestText = "chancery r-uniqueness v1\x00"

// SelfTest proves the key (Prove) and its randomness: SelfTestSignatures
// signatures of one digest have different r. It makes SelfTestSignatures + 1
// signatures one after the other, so on a token of 6 in a second it takes 11 s.
// It fails as Key.SignContext does, and with ErrBadSignature if an r repeats.
func SelfTest(ctx context.Context, key Key, now time.Time) (Proof, error) {
	proof, err := Prove(ctx, key, now)
	if err != nil {
		return Proof{}, err
	}
	algorithm, err := AlgorithmOf(key.Public())
	if err != nil {
		return Proof{}, err
	}
	digest := digestOf(algorithm, selfTestText)
	signatures := make([][]byte, SelfTestSignatures)
	for i := range signatures {
		if signatures[i], err = key.SignContext(ctx, digest, algorithm.Hash()); err != nil {
			return Proof{}, fmt.Errorf("sign for r-uniqueness: %w", err)
		}
	}
	return proof, DistinctR(signatures)
}

// DistinctR checks that no two of the ASN.1 DER ECDSA signatures have the same
// r. Two signatures of one key with one r were made with one nonce, or with its
// negative; from two of different digests anybody can compute the private key
// (FIPS 186-5, Section 6.4). The error wraps ErrBadSignature, as it does for what
// is no signature.
func DistinctR(signatures [][]byte) error {
	first := make(map[string]int, len(signatures))
	for i, der := range signatures {
		var sig struct{ R, S *big.Int }
		if rest, err := asn1.Unmarshal(der, &sig); err != nil || len(rest) > 0 {
			return fmt.Errorf("signature %d is not DER: %w", i, ErrBadSignature)
		}
		r := string(sig.R.Bytes())
		if j, ok := first[r]; ok {
			return fmt.Errorf("signatures %d and %d have the same r: %w", j, i, ErrBadSignature)
		}
		first[r] = i
	}
	return nil
}

// digestOf hashes text with the algorithm's hash.
func digestOf(algorithm Algorithm, text string) []byte {
	h := algorithm.Hash().New()
	h.Write([]byte(text))
	return h.Sum(nil)
}
