package ceremony

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/chancery-ca/chancery/hsm"
)

// Seeder is a token that takes randomness from outside into its generator
// (PKCS #11 v2.40, Section 5.16, C_SeedRandom). ErrUnsupported says that this
// one does not.
type Seeder interface {
	SeedRandom(ctx context.Context, seed []byte) error
}

// inventory looks at a token twice: without a login, so that people see what
// they type a PIN for, and then inside.
func (r *run) inventory(ctx context.Context, s Step) error {
	var data inventoryData
	if r.opts.Inspect != nil {
		seen, err := r.opts.Inspect(ctx, s.Name)
		if err != nil {
			return fmt.Errorf("inspect token: %w", err)
		}
		if err := r.def.checkSoftware(s.Name, seen.Token); err != nil {
			return err
		}
		data.Inspection = &seen
		if err := r.show(ctx, "Token "+s.Name+" says of itself, before anyone logs in:", inspectionFacts(seen)...); err != nil {
			return err
		}
	}
	tok, err := r.token(ctx, s.Name)
	if err != nil {
		return err
	}
	data.Token = tok.Info()
	ctx, cancel := device(ctx)
	defer cancel()
	if data.Keys, err = tok.Keys(ctx); err != nil {
		return fmt.Errorf("count keys: %w", err)
	}
	if err := r.facts.checkSameDevice(s.Name, data.Token); err != nil {
		return err
	}
	if data.Keys > 0 && r.def.Tokens[s.Name].MustBeEmpty {
		return fmt.Errorf("token %s has %d private keys: %w", s.Name, data.Keys, ErrNotEmpty)
	}
	if data.Token.Module != "" {
		if data.ModuleSHA256, err = hashFile(data.Token.Module); err != nil {
			return fmt.Errorf("hash module: %w", err)
		}
	}
	return r.record(s, Done, data)
}

// inspectionFacts are what people compare with the label on the device.
func inspectionFacts(in hsm.Inspection) []Fact {
	t := in.Token
	facts := []Fact{
		{"device", strings.TrimSpace(t.Manufacturer + " " + t.Model)},
		{"label", t.Label}, {"serial", t.Serial}, {"firmware", t.Firmware},
		{"flags", strings.Join(t.Flags, " ")},
	}
	if in.Slot.Description != "" {
		facts = append(facts, Fact{"slot", in.Slot.Description})
	}
	if in.Library.Path != "" {
		facts = append(facts, Fact{"library", fmt.Sprintf("%s %s (%s)", in.Library.Manufacturer, in.Library.Version, in.Library.Path)})
	}
	return append(facts, Fact{"mechanisms", fmt.Sprint(len(in.Mechanisms))})
}

func (f *facts) takeInventory(rec *Record, s Step) error {
	var d inventoryData
	if err := rec.result(&d); err != nil {
		return err
	}
	if d.Keys < 0 || d.Keys > 0 && f.def.Tokens[s.Name].MustBeEmpty {
		return bad(rec, "%w: %d keys", ErrNotEmpty, d.Keys)
	}
	if err := f.def.checkSoftware(s.Name, d.Token); err != nil {
		return bad(rec, "%w", err)
	}
	if err := f.checkSameDevice(s.Name, d.Token); err != nil {
		return bad(rec, "%w", err)
	}
	if in := d.Inspection; in != nil && in.Token.Device() != d.Token.Device() {
		return bad(rec, "two tokens were looked at: %w", hsm.ErrMismatch)
	}
	if m, ok := f.def.Modules[f.def.Tokens[s.Name].Module]; ok && f.def.Environment == Production && d.ModuleSHA256 != m.SHA256 {
		return bad(rec, "%w", ErrModule)
	}
	f.inventory[s.Name] = d
	return nil
}

// selfTest checks the token's random source and our own hash functions.
func (r *run) selfTest(ctx context.Context, s Step) error {
	if err := knownAnswer(); err != nil {
		return err
	}
	tok, err := r.token(ctx, s.Name)
	if err != nil {
		return err
	}
	ctx, cancel := device(ctx)
	defer cancel()
	octets, err := randomOctets(ctx, tok, healthOctets)
	if err != nil {
		return err
	}
	health, err := testRandom(octets)
	if err != nil {
		return err
	}
	return r.record(s, Done, selfTestData{Health: health, KnownAnswer: knownAnswerPass})
}

// randomOctets reads n octets in the portions that tokens give.
func randomOctets(ctx context.Context, tok hsm.Token, n int) ([]byte, error) {
	const portion = 1024
	var out []byte
	for len(out) < n {
		b, err := tok.Random(ctx, min(portion, n-len(out)))
		if err != nil {
			return nil, fmt.Errorf("read random octets: %w", err)
		}
		if len(b) == 0 {
			return nil, fmt.Errorf("%w: no octets", ErrEntropy)
		}
		out = append(out, b...)
	}
	return out, nil
}

func (f *facts) takeSelfTest(rec *Record, _ Step) error {
	var d selfTestData
	if err := rec.result(&d); err != nil {
		return err
	}
	if d.KnownAnswer != knownAnswerPass {
		return bad(rec, "known-answer test: %.40q", d.KnownAnswer)
	}
	if err := d.Health.check(); err != nil {
		return bad(rec, "%w", err)
	}
	return nil
}

// seed gives the ceremony's randomness to a token that takes it.
func (r *run) seed(ctx context.Context, s Step) error {
	tok, err := r.token(ctx, s.Name)
	if err != nil {
		return err
	}
	data := seededData{Answer: "the token has no way to take it"}
	if seeder, ok := tok.(Seeder); ok {
		ctx, cancel := device(ctx)
		defer cancel()
		switch err := seeder.SeedRandom(ctx, r.facts.seed[:]); {
		case err == nil:
			data = seededData{Taken: true}
		case errors.Is(err, hsm.ErrUnsupported):
			data.Answer = "the token does not take it"
		default:
			return fmt.Errorf("seed random source: %w", err)
		}
	}
	return r.record(s, Done, data)
}

func (f *facts) takeSeeded(rec *Record, s Step) error {
	var d seededData
	if err := rec.result(&d); err != nil {
		return err
	}
	if d.Taken == (d.Answer != "") {
		return bad(rec, "taken or not")
	}
	f.seeded[s.Name] = d.Taken
	return nil
}
