package ceremony

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/hsm"
)

// StepDestroy destroys a key and proves that it is gone.
const StepDestroy StepKind = "destroy"

// destroyIntent is the intent of StepDestroy: what will be destroyed.
type destroyIntent struct {
	Key hsm.Condemned `json:"key"`
}

// destroyResult is the result of StepDestroy.
type destroyResult struct {
	Key hsm.Condemned `json:"key"`
	// Found is how many keys with the id the token has after it: none.
	Found int `json:"found"`
}

// destroyFacts is what the records say of one key's end.
type destroyFacts struct {
	key       *hsm.Condemned
	confirmed bool
	gone      bool
}

func (d *Definition) checkDestroy(f *faults) {
	if (d.Kind == Decommission) != (len(d.Destroy) > 0) {
		f.add("destroy: the kind %s names %d roles", d.Kind, len(d.Destroy))
	}
	if d.Kind == Decommission && d.CRL == nil {
		f.add("crl: the last list is missing")
	}
	for i, role := range d.Destroy {
		if !slices.Contains(trust.Roles(), role) || slices.Contains(d.Destroy[:i], role) {
			f.add("destroy: role %.40q is unknown, or twice", role)
		}
	}
}

// planDecommission signs the last list and then destroys keys, the roots last.
func planDecommission(d *Definition) ([]Step, error) {
	steps := append([]Step{previousStep(d.Previous)}, d.tokenSteps()...)
	steps = append(steps, d.crlStep())
	roles := slices.Clone(d.Destroy)
	slices.SortFunc(roles, func(a, b hsm.Role) int { return slices.Index(trust.Roles(), b) - slices.Index(trust.Roles(), a) })
	for _, role := range roles {
		steps = append(steps, named(StepDestroy, string(role), "Nobody can ever sign with it again; what it has signed stays good.",
			"Destroy the key of the role %s, and prove that it is gone.", role))
	}
	return append(steps, outputsStep()), nil
}

// destroy condemns the key, asks, destroys, and looks again. Resumed, it
// destroys what was condemned and nothing else.
func (r *run) destroy(ctx context.Context, s Step) error {
	role := hsm.Role(s.Name)
	tok, err := r.destroyer(ctx, role)
	if err != nil {
		return err
	}
	if r.facts.destroyed[s.Name].key == nil {
		key, _, err := r.previousKey(ctx, role)
		if err != nil {
			return err
		}
		c, err := tok.Condemn(ctx, key)
		if err != nil {
			return err
		}
		if err := r.record(s, Intent, destroyIntent{Key: c}); err != nil {
			return err
		}
	}
	c := *r.facts.destroyed[s.Name].key
	if err := r.confirmDestruction(ctx, s, c); err != nil {
		return err
	}
	ctx, cancel := device(ctx)
	defer cancel()
	if err := tok.Destroy(ctx, c); err != nil && !errors.Is(err, hsm.ErrNotFound) {
		return err
	}
	id, err := hex.DecodeString(c.ID)
	if err != nil {
		return fmt.Errorf("%w: id %.40q", ErrTranscript, c.ID)
	}
	if _, err := tok.Find(ctx, id); !errors.Is(err, hsm.ErrNotFound) {
		return fmt.Errorf("key %s after it was destroyed: %w: %w", c.Label, ErrStopped, errors.Join(err, hsm.ErrExists))
	}
	return r.record(s, Done, destroyResult{Key: c})
}

// destroyer is the token of the role's key.
func (r *run) destroyer(ctx context.Context, role hsm.Role) (hsm.Destroyer, error) {
	name := r.facts.before.ring.Keys[role].Token
	if _, ok := r.def.Tokens[name]; !ok {
		return nil, fmt.Errorf("the key of the role %s is in token %.40q, which the definition does not name: %w", role, name, ErrDefinition)
	}
	tok, err := r.token(ctx, name)
	if err != nil {
		return nil, err
	}
	d, ok := tok.(hsm.Destroyer)
	if !ok {
		return nil, fmt.Errorf("token %s cannot destroy keys: %w", name, hsm.ErrUnsupported)
	}
	return d, nil
}

func (r *run) confirmDestruction(ctx context.Context, s Step, c hsm.Condemned) error {
	who := r.def.confirmer(r.facts.present)
	if who == "" || r.facts.destroyed[s.Name].confirmed {
		return nil
	}
	spki, err := hsm.ParseSPKIHash(c.SPKI)
	if err != nil {
		return err
	}
	words := newChallenge(s.ID, spki)
	_, err = r.ask(ctx, Question{
		ID: s.ID, Person: who, Confirmation: true,
		Title:  "The token destroys this key for good.",
		Why:    "There is no way back but a backup, and backups are to be destroyed too.",
		Facts:  append([]Fact{{"role", s.Name}, {"token", c.Token.Label + " " + c.Token.Serial}, {"key", c.Label + ", id " + c.ID}}, hashFact("public key", spki)...),
		Prompt: r.def.person(who).label() + ": " + words.prompt() + " of its public key",
		Check:  words.check, Practice: words.answer(),
	})
	if err != nil {
		return err
	}
	return r.state(s, who, confirmData{Words: words.answer()})
}

func (f *facts) takeDestroy(rec *Record, s Step) error {
	if f.destroyed == nil {
		f.destroyed = map[string]destroyFacts{}
	}
	d := f.destroyed[s.Name]
	spki := f.before.ring.Keys[hsm.Role(s.Name)].SPKI
	switch rec.Type {
	case Intent:
		var in destroyIntent
		if err := rec.decode(&in); err != nil {
			return err
		}
		token := f.inventory[f.before.ring.Keys[hsm.Role(s.Name)].Token].Token
		if d.key != nil || spki == [sha256.Size]byte{} || in.Key.SPKI != hex.EncodeToString(spki[:]) || in.Key.Token != token.Device() {
			return bad(rec, "not the key of the role %s", s.Name)
		}
		d.key = &in.Key
	case Statement:
		var c confirmData
		if err := rec.decode(&c); err != nil {
			return err
		}
		if d.key == nil || d.confirmed || rec.Actor != f.def.confirmer(f.present) || c.Words != newChallenge(s.ID, spki).answer() {
			return bad(rec, "%.40q was not asked, or has other words", rec.Actor)
		}
		d.confirmed = true
	default:
		var end destroyResult
		if err := rec.result(&end); err != nil {
			return err
		}
		if d.key == nil || end.Key != *d.key || end.Found != 0 || !d.confirmed && f.def.confirmer(f.present) != "" {
			return bad(rec, "not the key that was condemned, or it is there")
		}
		d.gone = true
	}
	f.destroyed[s.Name] = d
	return nil
}
