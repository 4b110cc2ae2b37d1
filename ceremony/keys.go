package ceremony

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"

	"github.com/chancery-ca/chancery/hsm"
)

// rSignatures is how many signatures of one digest must have different r.
const rSignatures = 64

// key makes one key: its intent is on disk before it is generated, and its
// result after it has been read back and proved.
func (r *run) key(ctx context.Context, s Step) error {
	def := r.def.Keys[s.Name]
	tok := r.opts.Tokens[def.Token]
	intent, resumed := r.facts.keyIntents[s.Name]
	if !resumed {
		id := make([]byte, hsm.IDSize)
		_, _ = rand.Read(id) // never fails
		intent = keyIntent{
			Role: r.def.uses[s.Name].role, Token: def.Token, Label: s.Name,
			ID: hex.EncodeToString(id), Algorithm: def.Algorithm,
		}
		if err := r.record(s, Intent, intent); err != nil {
			return err
		}
	}
	key, adopted, err := findOrGenerate(ctx, tok, intent, resumed)
	if err != nil {
		return err
	}
	evidence, err := tok.Evidence(ctx, key)
	if err != nil {
		return fmt.Errorf("read key back: %w", err)
	}
	if err := checkEvidence(evidence, intent); err != nil {
		if adopted {
			err = fmt.Errorf("%w: %w", ErrStopped, err)
		}
		return err
	}
	if evidence.Level != hsm.LevelSoftware {
		return fmt.Errorf("key %s has evidence level %s: %w", s.Name, evidence.Level, ErrEnvironment)
	}
	distinct, err := distinctR(ctx, key, def.Algorithm)
	if err != nil {
		return err
	}
	return r.record(s, Done, keyResult{Adopted: adopted, Evidence: evidence, DistinctR: distinct, Signatures: rSignatures})
}

// findOrGenerate makes the announced key. In a resumed ceremony it first looks
// for it by its id, never by its label: none → generate, exactly one → adopt,
// anything else → stop.
func findOrGenerate(ctx context.Context, tok hsm.Token, intent keyIntent, resumed bool) (key hsm.Key, adopted bool, err error) {
	id, err := hex.DecodeString(intent.ID)
	if err != nil || len(id) != hsm.IDSize {
		return nil, false, fmt.Errorf("%w: intent has id %.40q", ErrTranscript, intent.ID)
	}
	if resumed {
		key, err = tok.Find(ctx, id)
		switch {
		case err == nil:
			return key, true, nil
		case !errors.Is(err, hsm.ErrNotFound):
			return nil, false, fmt.Errorf("find key %s by id %s: %w: %w", intent.Label, intent.ID, ErrStopped, err)
		}
	}
	key, err = tok.Generate(ctx, hsm.Spec{
		Label: intent.Label, ID: id, Algorithm: intent.Algorithm, Extractable: intent.Extractable,
	})
	if resumed && errors.Is(err, hsm.ErrExists) {
		// A kill in the middle of the generation can leave half a pair: it is
		// not found as a pair, and it is in the way.
		return nil, false, fmt.Errorf("generate key %s: part of it is in the token: %w: %w", intent.Label, ErrStopped, err)
	}
	if err != nil {
		return nil, false, fmt.Errorf("generate key %s: %w", intent.Label, err)
	}
	return key, false, nil
}

// checkEvidence checks what a token said of a key against what was announced:
// algorithm, attributes, and the self-test signature under the public key. A
// verifier calls it too.
func checkEvidence(e hsm.Evidence, intent keyIntent) error {
	pub, err := x509.ParsePKIXPublicKey(e.PublicKey)
	if err != nil {
		return fmt.Errorf("evidence of %s: parse public key: %w", intent.Label, err)
	}
	alg, err := hsm.AlgorithmOf(pub)
	if err != nil || alg != intent.Algorithm || e.Algorithm != intent.Algorithm {
		return fmt.Errorf("evidence of %s: key is %s, announced was %s: %w", intent.Label, alg, intent.Algorithm, hsm.ErrPolicy)
	}
	if spki, err := hsm.SPKIHash(pub); err != nil || hex.EncodeToString(spki[:]) != e.SPKI {
		return fmt.Errorf("evidence of %s: public key hash: %w", intent.Label, hsm.ErrMismatch)
	}
	if id, ok := e.Attributes["ID"]; ok && id != intent.ID {
		return fmt.Errorf("evidence of %s: id %.40q, announced was %s: %w", intent.Label, id, intent.ID, hsm.ErrMismatch)
	}
	if err := (hsm.Policy{Extractable: intent.Extractable}).Check(e.Attributes); err != nil {
		return fmt.Errorf("evidence of %s: %w", intent.Label, err)
	}
	h := alg.Hash().New()
	h.Write([]byte(e.SelfTestText))
	if e.SelfTestText == "" || !ecdsa.VerifyASN1(pub.(*ecdsa.PublicKey), h.Sum(nil), e.SelfTest) {
		return fmt.Errorf("evidence of %s: self-test: %w", intent.Label, hsm.ErrBadSignature)
	}
	return nil
}

// distinctR has the key sign one digest again and again and counts different
// r: a repeated r means a repeated nonce, which gives the private key away.
// The Key verifies every signature.
func distinctR(ctx context.Context, key hsm.Key, alg hsm.Algorithm) (int, error) {
	h := alg.Hash().New()
	h.Write([]byte("chancery r-uniqueness v1\x00"))
	digest := h.Sum(nil)
	seen := map[string]bool{}
	for range rSignatures {
		der, err := key.SignContext(ctx, digest, alg.Hash())
		if err != nil {
			return 0, fmt.Errorf("sign for r-uniqueness: %w", err)
		}
		var sig struct{ R, S *big.Int }
		if rest, err := asn1.Unmarshal(der, &sig); err != nil || len(rest) > 0 {
			return 0, fmt.Errorf("signature is not DER: %w", hsm.ErrBadSignature)
		}
		seen[sig.R.String()] = true
	}
	if len(seen) != rSignatures {
		return 0, fmt.Errorf("%d signatures of one digest have %d different r: %w", rSignatures, len(seen), hsm.ErrBadSignature)
	}
	return len(seen), nil
}
