package ceremony

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/tpm"
)

// key makes one key: its intent is on disk before it is generated, and its
// result after it has been read back and proved.
func (r *run) key(ctx context.Context, s Step) error {
	def := r.def.Keys[s.Name]
	tok, err := r.token(ctx, def.Token)
	if err != nil {
		return err
	}
	ctx, cancel := device(ctx)
	defer cancel()
	intent, resumed := r.facts.keyIntents[s.Name]
	if !resumed {
		if intent, err = r.announceKey(s); err != nil {
			return err
		}
	}
	key, adopted, err := findOrGenerate(ctx, tok, intent, resumed)
	if err != nil {
		return r.quarantine(s, intent, err)
	}
	data, err := r.prove(ctx, tok, key, intent, adopted)
	if err != nil {
		if adopted && foreign(err) {
			err = r.quarantine(s, intent, fmt.Errorf("adopt key %s: %w: %w", s.Name, ErrStopped, err))
		}
		return err
	}
	return r.record(s, Done, data)
}

// announceKey writes what will be made, with the random id by which an
// interrupted ceremony finds it again.
func (r *run) announceKey(s Step) (keyIntent, error) {
	def := r.def.Keys[s.Name]
	id := make([]byte, hsm.IDSize)
	_, _ = rand.Read(id) // never fails
	intent := keyIntent{
		Role: r.def.uses[s.Name].role, Token: def.Token, Label: s.Name,
		ID: hex.EncodeToString(id), Algorithm: def.Algorithm, Extractable: def.extractable(),
	}
	return intent, r.record(s, Intent, intent)
}

// prove reads the key back, lets the device speak for it with the transcript's
// head as nonce, and shows that its signatures do not repeat themselves.
func (r *run) prove(ctx context.Context, tok hsm.Token, key hsm.Key, intent keyIntent, adopted bool) (keyResult, error) {
	now, err := r.now()
	if err != nil {
		return keyResult{}, err
	}
	evidence, err := tok.Evidence(ctx, key)
	if err != nil {
		return keyResult{}, fmt.Errorf("read key back: %w", err)
	}
	if attester, ok := tok.(hsm.Attester); ok {
		switch a, err := attester.Attest(ctx, key, r.facts.head[:]); {
		case err == nil:
			evidence.Attestation = &a
		case !errors.Is(err, hsm.ErrUnsupported):
			return keyResult{}, fmt.Errorf("attest key: %w", err)
		}
	}
	if err := checkEvidence(evidence, intent, r.facts.head); err != nil {
		return keyResult{}, err
	}
	if err := r.def.checkLevel(intent, evidence); err != nil {
		return keyResult{}, err
	}
	if adopted { // Generate has done it to a new key
		if _, err := hsm.SelfTest(ctx, key, now); err != nil {
			return keyResult{}, fmt.Errorf("self-test: %w", err)
		}
	}
	return keyResult{Adopted: adopted, Evidence: evidence, DistinctR: hsm.SelfTestSignatures, Signatures: hsm.SelfTestSignatures}, nil
}

// checkLevel wants software keys in a rehearsal, and none in production unless
// the definition accepts them.
func (d *Definition) checkLevel(intent keyIntent, e hsm.Evidence) error {
	software := e.Level == hsm.LevelSoftware
	if software != (d.Environment == Rehearsal) && !(software && d.Tokens[intent.Token].AcceptSoftware) {
		return fmt.Errorf("key %s has evidence level %.20s in a %s: %w", intent.Label, e.Level, d.Environment, ErrEnvironment)
	}
	return nil
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
		case foreign(err):
			return nil, false, fmt.Errorf("find key %s by id %s: %w: %w", intent.Label, intent.ID, ErrStopped, err)
		case !errors.Is(err, hsm.ErrNotFound):
			return nil, false, fmt.Errorf("find key %s by id %s: %w", intent.Label, intent.ID, err)
		}
	}
	key, err = tok.Generate(ctx, hsm.Spec{
		Label: intent.Label, ID: id, Algorithm: intent.Algorithm, Extractable: intent.Extractable,
	})
	if resumed && errors.Is(err, hsm.ErrExists) {
		// A kill in the middle of the generation can leave half a pair: it is
		// not found as a pair, and it is in the way.
		return nil, false, fmt.Errorf("generate key %s: half of it is in the token: %w: %w", intent.Label, ErrStopped, err)
	}
	if err != nil {
		return nil, false, fmt.Errorf("generate key %s: %w", intent.Label, err)
	}
	return key, false, nil
}

// foreign says that what is in the token is not what was announced, rather
// than that the token did not answer.
func foreign(err error) bool {
	for _, is := range []error{hsm.ErrAmbiguous, hsm.ErrPolicy, hsm.ErrMismatch, hsm.ErrBadSignature} {
		if errors.Is(err, is) {
			return true
		}
	}
	return false
}

// quarantine records that the token holds something else than what was
// announced, when err is ErrStopped, and returns err. From then on the
// ceremony can only be aborted: what is in the token is evidence, which a
// second attempt would change.
func (r *run) quarantine(s Step, intent keyIntent, err error) error {
	if !errors.Is(err, ErrStopped) {
		return err
	}
	return errors.Join(err, r.record(s, Quarantine, quarantineData{Token: intent.Token, ID: intent.ID, Found: err.Error()}))
}

// checkEvidence checks what a token said of a key against what was announced:
// algorithm, attributes, and the self-test signature under the public key. A
// verifier calls it too. An attestation has the transcript's head as nonce.
func checkEvidence(e hsm.Evidence, intent keyIntent, head [sha256.Size]byte) error {
	return checkEvidenceUnder(hsm.Policy{Extractable: intent.Extractable}, e, intent, head)
}

func checkEvidenceUnder(policy hsm.Policy, e hsm.Evidence, intent keyIntent, head [sha256.Size]byte) error {
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
	if err := policy.Check(e.Attributes); err != nil {
		return fmt.Errorf("evidence of %s: %w", intent.Label, err)
	}
	if e.Attestation != nil {
		// No manufacturer's root: the verdict is on the statement, not on the
		// device, whose certificate is in the evidence for those who have one.
		if _, err := tpm.VerifyAttestation(*e.Attestation, sha256.Sum256(e.PublicKey), head[:], nil); err != nil {
			return fmt.Errorf("evidence of %s: %w", intent.Label, err)
		}
	}
	h := alg.Hash().New()
	h.Write([]byte(e.SelfTestText))
	if e.SelfTestText == "" || !ecdsa.VerifyASN1(pub.(*ecdsa.PublicKey), h.Sum(nil), e.SelfTest) {
		return fmt.Errorf("evidence of %s: self-test: %w", intent.Label, hsm.ErrBadSignature)
	}
	return nil
}

// keyFact is a key that was made.
type keyFact struct {
	evidence hsm.Evidence
	public   crypto.PublicKey
	spki     [sha256.Size]byte
}

func (f *facts) takeKey(rec *Record, s Step) error {
	switch rec.Type {
	case Intent:
		return f.takeKeyIntent(rec, s.Name)
	case Quarantine:
		return f.takeQuarantine(rec, s.Name)
	}
	var d keyResult
	if err := rec.result(&d); err != nil {
		return err
	}
	intent, ok := f.keyIntents[s.Name]
	if !ok {
		return bad(rec, "the key was not announced")
	}
	if err := checkEvidence(d.Evidence, intent, rec.previous()); err != nil {
		return bad(rec, "%w", err)
	}
	if err := f.def.checkLevel(intent, d.Evidence); err != nil {
		return bad(rec, "%w", err)
	}
	if d.Evidence.Token.Device() != f.inventory[intent.Token].Token.Device() {
		return bad(rec, "the key is in another token than the inventory's")
	}
	if d.Signatures != hsm.SelfTestSignatures || d.DistinctR != hsm.SelfTestSignatures {
		return bad(rec, "r-uniqueness was not shown")
	}
	pub, err := x509.ParsePKIXPublicKey(d.Evidence.PublicKey)
	if err != nil {
		return bad(rec, "%w", err)
	}
	k := keyFact{evidence: d.Evidence, public: pub, spki: sha256.Sum256(d.Evidence.PublicKey)}
	for other, have := range f.keys {
		if have.spki == k.spki {
			return bad(rec, "key %s has the same public key", other)
		}
	}
	f.keys[s.Name] = k
	return nil
}

func (f *facts) takeKeyIntent(rec *Record, name string) error {
	var d keyIntent
	if err := rec.decode(&d); err != nil {
		return err
	}
	want := keyIntent{
		Role: f.def.uses[name].role, Token: f.def.Keys[name].Token, Label: name,
		ID: d.ID, Algorithm: f.def.Keys[name].Algorithm, Extractable: f.def.Keys[name].extractable(),
	}
	if id, err := hex.DecodeString(d.ID); d != want || err != nil || len(id) != hsm.IDSize {
		return bad(rec, "not the key of the definition")
	}
	if _, ok := f.keyIntents[name]; ok {
		return bad(rec, "the key was announced before")
	}
	f.keyIntents[name] = d
	return nil
}

func (f *facts) takeQuarantine(rec *Record, name string) error {
	var d quarantineData
	if err := rec.decode(&d); err != nil {
		return err
	}
	if intent, ok := f.keyIntents[name]; !ok || d.ID != intent.ID || d.Token != intent.Token || d.Found == "" {
		return bad(rec, "not the announced key")
	}
	f.quarantined = name
	return nil
}
