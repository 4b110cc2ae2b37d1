package ceremony

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/chancery-ca/chancery/hsm"
)

// StepBackup makes the backup of a key, or records the one that its device
// made.
const StepBackup StepKind = "backup"

// StepDrill proves that a backup is good.
const StepDrill StepKind = "drill"

// Backup says where the wrapped key of a wrapped-backup is restored.
type Backup struct {
	Token string `yaml:"token"`
	// Key is the wrapping key that the security officers of both tokens made
	// before the ceremony (chancery hsm pair). A rehearsal takes its own.
	Key WrappingKey `yaml:"wrapping-key"`
}

// WrappingKey is hsm.WrappingKey in a definition.
type WrappingKey struct {
	Label string `yaml:"label"`
	ID    string `yaml:"id"`
	Check string `yaml:"check"`
}

// statementData is what a person said in StepBackup of a backup that the
// device makes by its own means.
type statementData struct {
	Statement string `json:"statement"`
}

// backupIntent is the intent of StepBackup: the wrapped key, before it is
// restored.
type backupIntent struct {
	Wrapped hsm.Wrapped `json:"wrapped"`
}

// backupResult is the result of StepBackup and of StepDrill.
type backupResult struct {
	Kind Protection `json:"kind"`
	// Evidence is of the restored key.
	Evidence *hsm.Evidence `json:"evidence,omitempty"`
}

// backupFacts is what the records say of one key's backup.
type backupFacts struct {
	statement string
	wrapped   *hsm.Wrapped
	restored  *hsm.Evidence
}

// extractable says whether the key is made to be wrapped.
func (k Key) extractable() bool { return k.Protection == WrappedBackup }

func (d *Definition) checkBackups(f *faults) {
	for _, name := range sorted(d.Keys) {
		k := d.Keys[name]
		switch {
		case k.Protection != WrappedBackup && k.Backup != nil:
			f.add("keys: %s: backup: the protection is not %s", name, WrappedBackup)
		case k.Protection != WrappedBackup:
		case k.Backup == nil:
			f.add("keys: %s: backup: the second token is missing", name)
		default:
			t, ok := d.Tokens[k.Backup.Token]
			if !ok || k.Backup.Token == k.Token || t.Machine != d.Tokens[k.Token].Machine {
				f.add("keys: %s: backup: token %.40q is not a second one on the same machine", name, k.Backup.Token)
			}
			if k.Backup.Key.Label == "" || d.Environment == Production && (k.Backup.Key.ID == "" || k.Backup.Key.Check == "") {
				f.add("keys: %s: backup: wrapping-key: label, id and check are needed", name)
			}
		}
	}
}

// checkBackupRoles wants wrapped backups of roots alone; the uses are known.
func (d *Definition) checkBackupRoles(f *faults) {
	for _, name := range sorted(d.Keys) {
		if !d.Keys[name].extractable() {
			continue
		}
		if err := hsm.CheckBackup(d.uses[name].role); err != nil {
			f.add("keys: %s: protection: %w", name, err)
		}
	}
}

// backupSteps are the steps of all keys that have a backup.
func (d *Definition) backupSteps() []Step {
	var steps []Step
	for _, name := range d.keyOrder() {
		switch k := d.Keys[name]; k.Protection {
		case NativeBackup:
			steps = append(steps, named(StepBackup, name, "What the device does by its own means nobody here can see; so a person says it.",
				"Record the backup of key %s that its device makes.", name))
		case WrappedBackup:
			steps = append(steps, named(StepBackup, name, "A backup is worth what its restore proves: the second token signs with it.",
				"Wrap key %s and restore it in token %s.", name, k.Backup.Token))
		}
	}
	return steps
}

// backup does one of the two.
func (r *run) backup(ctx context.Context, s Step) error {
	if r.def.Keys[s.Name].Protection == NativeBackup {
		return r.nativeBackup(ctx, s)
	}
	if r.facts.backups[s.Name].wrapped == nil {
		w, err := r.wrap(ctx, s.Name)
		if err != nil {
			return err
		}
		if err := r.record(s, Intent, backupIntent{Wrapped: w}); err != nil {
			return err
		}
	}
	k := r.def.Keys[s.Name]
	e, err := r.restore(ctx, k.Backup.Token, *r.facts.backups[s.Name].wrapped, r.def.uses[s.Name].role, r.facts.keys[s.Name].spki)
	if err != nil {
		return err
	}
	return r.record(s, Done, backupResult{Kind: WrappedBackup, Evidence: &e})
}

func (r *run) nativeBackup(ctx context.Context, s Step) error {
	if r.facts.backups[s.Name].statement == "" {
		who := r.def.confirmer(r.facts.present)
		answer, err := r.ask(ctx, Question{
			ID: s.ID, Person: who, Confirmation: true,
			Title:  "The device makes a backup of key " + s.Name + " by its own means, now.",
			Why:    "A key without a backup is lost with its device; one in a wrong place is everybody's.",
			Facts:  []Fact{{"key", fmt.Sprintf("%s, SPKI SHA-256 %x", s.Name, r.facts.keys[s.Name].spki)}},
			Prompt: "What was made, with which serial number, and where it goes",
			Check: func(answer string) error {
				_, err := checkReason(answer)
				return err
			},
			Practice: "a rehearsal has no device",
		})
		if err != nil {
			return err
		}
		if who == "" {
			who = actor
		}
		if err := r.state(s, who, statementData{Statement: answer}); err != nil {
			return err
		}
	}
	return r.record(s, Done, backupResult{Kind: NativeBackup})
}

// wrap has the token wrap the key for the second token. It leaves nothing in
// either.
func (r *run) wrap(ctx context.Context, name string) (hsm.Wrapped, error) {
	def := r.def.Keys[name]
	tok, err := r.token(ctx, def.Token)
	if err != nil {
		return hsm.Wrapped{}, err
	}
	source, ok := tok.(hsm.Backup)
	if !ok {
		return hsm.Wrapped{}, fmt.Errorf("token %s cannot wrap keys: %w", def.Token, hsm.ErrUnsupported)
	}
	key, err := r.openKey(ctx, name)
	if err != nil {
		return hsm.Wrapped{}, err
	}
	pairing := hsm.Pairing{
		Key:    hsm.WrappingKey{Label: def.Backup.Key.Label, ID: def.Backup.Key.ID, Check: def.Backup.Key.Check},
		Source: r.facts.inventory[def.Token].Token.Device(), Target: r.facts.inventory[def.Backup.Token].Token.Device(),
	}
	if r.def.Environment == Rehearsal && r.opts.Pairing != nil {
		if pairing, err = r.opts.Pairing(def.Token, def.Backup.Token); err != nil {
			return hsm.Wrapped{}, fmt.Errorf("pair practice tokens: %w", err)
		}
	}
	ctx, cancel := device(ctx)
	defer cancel()
	return source.Wrap(ctx, key, r.def.uses[name].role, pairing)
}

// restore puts a wrapped key into a token and returns what the token says of
// it. A key that an interrupted run has restored, or an earlier ceremony, is
// found by its id and proves itself again.
func (r *run) restore(ctx context.Context, token string, w hsm.Wrapped, role hsm.Role, spki [sha256.Size]byte) (hsm.Evidence, error) {
	tok, err := r.token(ctx, token)
	if err != nil {
		return hsm.Evidence{}, err
	}
	target, ok := tok.(hsm.Backup)
	if !ok {
		return hsm.Evidence{}, fmt.Errorf("token %s cannot restore keys: %w", token, hsm.ErrUnsupported)
	}
	id, err := hex.DecodeString(w.ID)
	if err != nil {
		return hsm.Evidence{}, fmt.Errorf("id of the wrapped key: %w", hsm.ErrWrapped)
	}
	ctx, cancel := device(ctx)
	defer cancel()
	key, err := target.Find(ctx, id)
	if err == nil {
		if have, err := hsm.SPKIHash(key.Public()); err != nil || have != spki {
			return hsm.Evidence{}, fmt.Errorf("token %s has another key with the id: %w", token, errors.Join(hsm.ErrMismatch, err))
		}
		return target.Evidence(ctx, key)
	}
	_, e, err := target.Restore(ctx, w, role, spki)
	return e, err
}

// checkRestored checks what the second token said of the restored key.
func (f *facts) checkRestored(e *hsm.Evidence, w *hsm.Wrapped, token string) error {
	if e == nil || w == nil {
		return errors.New("nothing was restored")
	}
	if e.SPKI != w.SPKI || !e.Restored || e.Attributes["EXTRACTABLE"] != "false" {
		return fmt.Errorf("not the key that was wrapped, or not restored: %w", hsm.ErrMismatch)
	}
	if e.Token.Device() != f.inventory[token].Token.Device() {
		return fmt.Errorf("in another token than the inventory's: %w", hsm.ErrMismatch)
	}
	intent := keyIntent{Label: w.Label, ID: w.ID, Algorithm: w.Algorithm}
	return checkEvidenceUnder(hsm.Policy{Restored: true}, *e, intent, [sha256.Size]byte{})
}

func (f *facts) takeBackup(rec *Record, s Step) error {
	if f.backups == nil {
		f.backups = map[string]backupFacts{}
	}
	b, def := f.backups[s.Name], f.def.Keys[s.Name]
	switch rec.Type {
	case Statement:
		var d statementData
		if err := rec.decode(&d); err != nil {
			return err
		}
		if text, err := checkReason(d.Statement); err != nil || text != d.Statement || b.statement != "" || def.Protection != NativeBackup {
			return bad(rec, "nobody asked for a statement, or it is none")
		}
		b.statement = d.Statement
	case Intent:
		var d backupIntent
		if err := rec.decode(&d); err != nil {
			return err
		}
		if b.wrapped != nil || def.Protection != WrappedBackup || d.Wrapped.Source != f.inventory[def.Token].Token.Device() {
			return bad(rec, "wrapped before, or in another token")
		}
		if d.Wrapped.ID != f.keyIntents[s.Name].ID {
			return bad(rec, "another key was wrapped")
		}
		if err := d.Wrapped.Verify(f.def.uses[s.Name].role, f.keys[s.Name].spki); err != nil {
			return bad(rec, "%w", err)
		}
		if k := d.Wrapped.Key; f.def.Environment == Production && (WrappingKey{k.Label, k.ID, k.Check}) != def.Backup.Key {
			return bad(rec, "under another wrapping key than the definition's")
		}
		b.wrapped = &d.Wrapped
	default:
		var d backupResult
		if err := rec.result(&d); err != nil {
			return err
		}
		if d.Kind != def.Protection || d.Kind == NativeBackup && (b.statement == "" || d.Evidence != nil) {
			return bad(rec, "not the backup of the definition")
		}
		if d.Kind == WrappedBackup {
			if err := f.checkRestored(d.Evidence, b.wrapped, def.Backup.Token); err != nil {
				return bad(rec, "%w", err)
			}
		}
		b.restored = d.Evidence
	}
	f.backups[s.Name] = b
	return nil
}

// backupFiles are the wrapped keys and what the second tokens said of them.
func (f *facts) backupFiles() ([]File, error) {
	var files []File
	for _, name := range sorted(f.backups) {
		b := f.backups[name]
		if b.wrapped != nil {
			text, err := b.wrapped.Marshal()
			if err != nil {
				return nil, err
			}
			files = append(files, newFile(backupFolder+name+".json", text))
		}
		if b.restored != nil {
			text, err := evidenceJSON(*b.restored)
			if err != nil {
				return nil, err
			}
			files = append(files, newFile(evidenceFolder+name+".restored.json", text))
		}
	}
	return files, nil
}

// Drill is one proof of a backup: the wrapped key of the outputs before, and
// the token that has it, or where it is restored.
type Drill struct {
	Key   string `yaml:"key"` // by its name in the ceremony that made it
	Token string `yaml:"token"`
}

func (d *Definition) checkDrills(f *faults) {
	if (d.Kind == RestoreDrill) != (len(d.Drills) > 0) {
		f.add("drills: the kind %s has %d", d.Kind, len(d.Drills))
	}
	seen := map[string]bool{}
	for i, drill := range d.Drills {
		if _, ok := d.Tokens[drill.Token]; !ok || !namePattern.MatchString(drill.Key) || seen[drill.Key] {
			f.add("drills: entry %d: key %.40q in token %.40q: unknown, or twice", i+1, drill.Key, drill.Token)
		}
		seen[drill.Key] = true
	}
}

// planDrill restores backups and has them sign.
func planDrill(d *Definition) ([]Step, error) {
	steps := append([]Step{previousStep(d.Previous)}, d.tokenSteps()...)
	for _, drill := range d.Drills {
		steps = append(steps, named(StepDrill, drill.Key, "A backup that was never restored is a hope.",
			"Prove the backup of key %s in token %s.", drill.Key, drill.Token))
	}
	return append(steps, outputsStep()), nil
}

// drillOf returns the token of a drill and the wrapped key.
func (f *facts) drillOf(name string) (token string, w hsm.Wrapped, spki [sha256.Size]byte, err error) {
	for _, drill := range f.def.Drills {
		if drill.Key == name {
			token = drill.Token
		}
	}
	if w, err = hsm.ParseWrapped(f.before.files[backupFolder+name+".json"]); err != nil {
		return token, w, spki, fmt.Errorf("backup of %s: %w", name, err)
	}
	spki = f.before.ring.Keys[w.Role].SPKI
	return token, w, spki, w.Verify(w.Role, spki)
}

func (r *run) drill(ctx context.Context, s Step) error {
	token, w, spki, err := r.facts.drillOf(s.Name)
	if err != nil {
		return err
	}
	e, err := r.restore(ctx, token, w, w.Role, spki)
	if err != nil {
		return err
	}
	return r.record(s, Done, backupResult{Kind: WrappedBackup, Evidence: &e})
}

func (f *facts) takeDrill(rec *Record, s Step) error {
	var d backupResult
	if err := rec.result(&d); err != nil {
		return err
	}
	token, w, _, err := f.drillOf(s.Name)
	if err == nil {
		err = f.checkRestored(d.Evidence, &w, token)
	}
	if err != nil {
		return bad(rec, "%w", err)
	}
	if f.backups == nil {
		f.backups = map[string]backupFacts{}
	}
	f.backups[s.Name] = backupFacts{restored: d.Evidence}
	return nil
}
