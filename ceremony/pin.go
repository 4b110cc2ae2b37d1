package ceremony

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/chancery-ca/chancery/hsm"
)

// StepPIN changes the user PIN of a token, when nothing else is to be done in
// it.
const StepPIN StepKind = "pin"

// pinIntent is the intent of StepPIN. From here on the token may have the new
// PIN.
type pinIntent struct {
	Token hsm.Device `json:"token"`
}

// pinResult is the result of StepPIN: the new PIN has opened the token. No
// record has anything of a PIN.
type pinResult struct {
	Token hsm.Device `json:"token"`
	// Already: an interrupted run had changed it; this one found the new PIN.
	Already bool `json:"already"`
}

// checkPIN wants PINs to change where they can: a TPM has none, and the value of
// its keys is made with them.
func (t Token) checkPIN() error {
	if t.ChangePIN && !strings.HasPrefix(t.URI, "pkcs11:") {
		return errors.New("change-pin: only a PKCS#11 token has a PIN")
	}
	return nil
}

// pinSteps are the last that is done with tokens, of any kind of ceremony that
// comes to its outputs. One that is aborted before leaves the PINs.
func (d *Definition) pinSteps() []Step {
	var steps []Step
	for _, name := range sorted(d.Tokens) {
		t := d.Tokens[name]
		if !t.ChangePIN {
			continue
		}
		step := named(StepPIN, name, "Whoever saw or kept the PIN of today cannot open the token tomorrow.",
			"Log out of token %s and change its PIN.", name)
		step.Details = []string{"the old PIN, then the new one twice; each is on paper before it is typed"}
		if t.PINParts > 1 {
			step.Details = append(step.Details, fmt.Sprintf("in %d parts, each by another person", t.PINParts))
		}
		steps = append(steps, step)
	}
	return steps
}

// changePIN logs out and has the caller change the PIN: the ceremony sees none.
func (r *run) changePIN(ctx context.Context, s Step) error {
	if r.opts.ChangePIN == nil {
		return fmt.Errorf("token %s: nobody can change its PIN: %w", s.Name, hsm.ErrUnsupported)
	}
	if tok := r.opened[s.Name]; tok != nil {
		delete(r.opened, s.Name)
		if err := tok.Close(); err != nil {
			return fmt.Errorf("log out: %w", err)
		}
	}
	if err := r.checkSeenBefore(ctx, s.Name); err != nil {
		return err
	}
	device := r.facts.inventory[s.Name].Token.Device()
	begun := r.facts.pins[s.Name]
	if !begun {
		if err := r.record(s, Intent, pinIntent{Token: device}); err != nil {
			return err
		}
	}
	already, err := r.opts.ChangePIN(ctx, s.Name, begun)
	if err != nil {
		return fmt.Errorf("change PIN of token %s: %w", s.Name, err)
	}
	return r.record(s, Done, pinResult{Token: device, Already: already})
}

func (f *facts) takePIN(rec *Record, s Step) error {
	device := f.inventory[s.Name].Token.Device()
	if rec.Type == Intent {
		var d pinIntent
		if err := rec.decode(&d); err != nil {
			return err
		}
		if f.pins[s.Name] || d.Token != device {
			return bad(rec, "announced before, or in another token")
		}
		if f.pins == nil {
			f.pins = map[string]bool{}
		}
		f.pins[s.Name] = true
		return nil
	}
	var d pinResult
	if err := rec.result(&d); err != nil {
		return err
	}
	if !f.pins[s.Name] || d.Token != device {
		return bad(rec, "not announced, or in another token")
	}
	return nil
}

// pinsBegun are the tokens of which the records do not say that they have the
// PIN of before: who ends the ceremony now must not throw a paper away.
func (f *facts) pinsBegun() []Fact {
	var facts []Fact
	for _, name := range sorted(f.pins) {
		facts = append(facts, Fact{"PIN", "token " + name + " has its new PIN, or still the one before: keep both"})
	}
	return facts
}
