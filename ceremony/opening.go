package ceremony

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"time"
)

// ErrQuorum: too few of the people that the definition wants are there.
var ErrQuorum = errors.New("too few people")

// begin records what will be done, and with what.
func (r *run) begin(ctx context.Context, s Step) error {
	h := r.def.Hash()
	data := openData{
		Definition: hex.EncodeToString(h[:]), Kind: r.def.Kind, Environment: r.def.Environment,
		Machine: r.def.machine, GoVersion: runtime.Version(), Modules: map[string]string{},
	}
	var err error
	if r.opts.Binary != "" {
		if data.Binary, err = hashFile(r.opts.Binary); err != nil {
			return fmt.Errorf("hash this program: %w", err)
		}
	}
	if r.def.Environment == Production { // a rehearsal loads its own
		for _, name := range r.def.modulesHere() {
			if err := r.def.Modules[name].Check(); err != nil {
				return fmt.Errorf("module %s: %w", name, err)
			}
			data.Modules[name] = r.def.Modules[name].SHA256
		}
	}
	if err := r.record(s, Done, data); err != nil {
		return err
	}
	facts := append([]Fact{{"ceremony", fmt.Sprintf("%s, %s, %s", r.def.ID, r.def.Kind, r.def.Environment)}},
		hashFact("definition", h)...)
	if data.Binary != "" {
		facts = append(facts, Fact{"program", data.Binary})
	}
	return r.show(ctx, "Read the words aloud; everyone compares them with their paper.", facts...)
}

// Check compares the library's file with its hash. Whoever loads the library
// checks it before: a library that is loaded has run. Errors: ErrModule.
func (m Module) Check() error {
	sum, err := hashFile(m.Path)
	if err != nil {
		return fmt.Errorf("hash %s: %w", m.Path, err)
	}
	if sum != m.SHA256 {
		return fmt.Errorf("%s has SHA-256 %s: %w", m.Path, sum, ErrModule)
	}
	return nil
}

// presentPurpose is what a person's words of the definition are asked for.
func presentPurpose(person string) string { return "present " + person }

const absent = "absent"

// gather has everyone say that they are there. Who was absent in an
// interrupted run is asked again.
func (r *run) gather(ctx context.Context, s Step) error {
	for _, p := range r.def.People {
		if r.facts.present[p.ID] {
			continue
		}
		c := newChallenge(presentPurpose(p.ID), r.def.Hash())
		answer, err := r.ask(ctx, Question{
			ID: s.ID + ":" + p.ID, Person: p.ID, Confirmation: true,
			Title:  p.label() + " takes part.",
			Why:    "The words come from your own paper, not from the screen: they say that you agreed to this definition.",
			Prompt: c.prompt() + " of the definition, or the word " + absent,
			Check: func(answer string) error {
				if answer == absent {
					return nil
				}
				return c.check(answer)
			},
			Practice: c.answer(),
		})
		if err != nil {
			return err
		}
		data := presenceData{Present: answer != absent}
		if data.Present {
			data.Words = c.answer()
		}
		if err := r.state(s, p.ID, data); err != nil {
			return err
		}
	}
	if err := r.facts.quorum(); err != nil {
		return err
	}
	return r.record(s, Done, peopleData{Present: r.facts.attendance()})
}

// attendance lists who is there, in the definition's order.
func (f *facts) attendance() []string {
	ids := []string{}
	for _, p := range f.def.People {
		if f.present[p.ID] {
			ids = append(ids, p.ID)
		}
	}
	return ids
}

// quorum says whether enough people are there: the definition's number of each
// role, an administrator if there are any, and everyone who contributes.
func (f *facts) quorum() error {
	count, all := map[PersonRole]int{}, map[PersonRole]int{}
	for _, p := range f.def.People {
		all[p.Role]++
		if f.present[p.ID] {
			count[p.Role]++
		}
	}
	for _, role := range sorted(f.def.Quorum) {
		if n := f.def.Quorum[role]; count[role] < n {
			return fmt.Errorf("%d of %d needed with the role %s: %w", count[role], n, role, ErrQuorum)
		}
	}
	if all[Administrator] > 0 && count[Administrator] == 0 {
		return fmt.Errorf("no %s: %w", Administrator, ErrQuorum)
	}
	for _, id := range f.def.Entropy.Contributors {
		if !f.present[id] {
			return fmt.Errorf("%s, who contributes randomness, is not there: %w", id, ErrQuorum)
		}
	}
	return nil
}

// confirmer is who confirms what will be signed: the first administrator who
// is there, or else the first person; "" if there is nobody. present nil means
// everybody.
func (d *Definition) confirmer(present map[string]bool) string {
	first := ""
	for _, p := range d.People {
		switch {
		case present != nil && !present[p.ID]:
		case p.Role == Administrator:
			return p.ID
		case first == "":
			first = p.ID
		}
	}
	return first
}

// witnesses lists the witnesses, in the definition's order.
func (d *Definition) witnesses() []Person {
	var all []Person
	for _, p := range d.People {
		if p.Role == Witness {
			all = append(all, p)
		}
	}
	return all
}

// The clock is compared with this many watches, if there are as many people,
// and may differ from each by clockTolerance.
const (
	watchCount     = 2
	clockTolerance = 2 * time.Minute
)

// watchers are whose watches are asked for.
func (f *facts) watchers() []string {
	ids := f.attendance()
	return ids[:min(watchCount, len(ids))]
}

const watchLayout = "15:04"

// watches has two people read their watches.
func (r *run) watches(ctx context.Context, s Step) error {
	for _, id := range r.facts.watchers() {
		if r.facts.watches[id] {
			continue
		}
		now, err := r.now()
		if err != nil {
			return err
		}
		var clockErr error
		answer, err := r.ask(ctx, Question{
			ID: s.ID + ":" + id, Person: id, Confirmation: true,
			Title:  "The machine's clock is taken as right.",
			Why:    "Certificates begin at the machine's time; a watch of your own is the only other clock in the room.",
			Facts:  []Fact{{"machine", now.UTC().Format("Monday 2006-01-02 15:04:05 UTC")}},
			Prompt: r.def.person(id).label() + ", type the time on your watch, in UTC, as HH:MM",
			Check: func(answer string) error {
				if now, clockErr = r.now(); clockErr != nil {
					return nil
				}
				return checkWatch(answer, now, clockTolerance)
			},
			Practice: now.UTC().Format(watchLayout),
		})
		if err = errors.Join(err, clockErr); err != nil {
			return err
		}
		if err := r.state(s, id, watchData{Watch: answer}); err != nil {
			return err
		}
	}
	return r.record(s, Done, clockData{Watches: len(r.facts.watches)})
}

// checkWatch compares the time of day on a watch with the clock.
func checkWatch(watch string, now time.Time, tolerance time.Duration) error {
	t, err := time.Parse(watchLayout, watch)
	if err != nil || t.Format(watchLayout) != watch {
		return errors.New("this is not a time as HH:MM")
	}
	const day = 24 * time.Hour
	minute := func(t time.Time) time.Duration {
		t = t.UTC()
		return time.Duration(t.Hour())*time.Hour + time.Duration(t.Minute())*time.Minute
	}
	diff := (minute(t) - minute(now) + day) % day
	if diff = min(diff, day-diff); diff > tolerance {
		return fmt.Errorf("the watch and the machine differ by %s", diff)
	}
	return nil
}

// takeOpen checks the first record.
func (f *facts) takeOpen(rec *Record, _ Step) error {
	var d openData
	if err := rec.result(&d); err != nil {
		return err
	}
	if h := f.def.Hash(); d.Definition != hex.EncodeToString(h[:]) {
		return bad(rec, "%w: not the one that the ceremony began with", ErrDefinition)
	}
	if rec.Ceremony != f.def.ID || d.Kind != f.def.Kind || d.Environment != f.def.Environment || d.Machine != f.def.machine {
		return bad(rec, "id, kind, environment or machine is not the definition's")
	}
	if f.def.Environment == Production {
		for _, name := range f.def.modulesHere() {
			if d.Modules[name] != f.def.Modules[name].SHA256 {
				return bad(rec, "module %s: %w", name, ErrModule)
			}
		}
	}
	f.openedAt, f.since, f.binary = rec.Time, rec.Time, d.Binary
	return nil
}

// takePeople checks who said to be there, and that they are enough.
func (f *facts) takePeople(rec *Record, _ Step) error {
	if rec.Type == Statement {
		var d presenceData
		if err := rec.decode(&d); err != nil {
			return err
		}
		if f.def.person(rec.Actor).ID == "" || f.present[rec.Actor] {
			return bad(rec, "%.40q is not one of the people, or spoke before", rec.Actor)
		}
		if want := newChallenge(presentPurpose(rec.Actor), f.def.Hash()); d.Present && d.Words != want.answer() || !d.Present && d.Words != "" {
			return bad(rec, "words are not those of the definition")
		}
		f.present[rec.Actor] = d.Present
		return nil
	}
	var d peopleData
	if err := rec.result(&d); err != nil {
		return err
	}
	if !slices.Equal(d.Present, f.attendance()) {
		return bad(rec, "not who said to be there")
	}
	if err := f.quorum(); err != nil {
		return bad(rec, "%w", err)
	}
	return nil
}

func (f *facts) takeClock(rec *Record, _ Step) error {
	if rec.Type == Statement {
		var d watchData
		if err := rec.decode(&d); err != nil {
			return err
		}
		if !slices.Contains(f.watchers(), rec.Actor) || f.watches[rec.Actor] {
			return bad(rec, "%.40q was not asked", rec.Actor)
		}
		// The minute may have ended between the answer and the record.
		if err := checkWatch(d.Watch, rec.Time, clockTolerance+time.Minute); err != nil {
			return bad(rec, "%w", err)
		}
		f.watches[rec.Actor] = true
		return nil
	}
	var d clockData
	if err := rec.result(&d); err != nil {
		return err
	}
	if len(f.watches) != len(f.watchers()) || d.Watches != len(f.watches) {
		return bad(rec, "%d watches, want %d", len(f.watches), len(f.watchers()))
	}
	return nil
}
