package ceremony

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/transparency-dev/merkle/rfc6962"

	"github.com/chancery-ca/chancery/ceremony/internal/sshsig"
)

// Namespace is the namespace of witnesses' signatures (ssh-keygen -n).
const Namespace = "chancery-ceremony@v1"

// CheckpointName is the file that witnesses sign: the body of a signed note
// (C2SP signed-note and tlog-checkpoint) with the origin
// "chancery-ceremony/ID", the number of lines and the RFC 6962 root over them.
const CheckpointName = "transcript.checkpoint"

// SignatureName is the file with a witness's signature.
func SignatureName(witness string) string { return CheckpointName + "." + witness + ".sig" }

// leafHash is the RFC 6962 leaf hash (Section 2.1) of a line without its end.
func leafHash(line []byte) [sha256.Size]byte {
	return [sha256.Size]byte(rfc6962.DefaultHasher.HashLeaf(line))
}

// treeRoot is the RFC 6962 tree hash (Section 2.1) over leaf hashes.
func treeRoot(leaves [][sha256.Size]byte) [sha256.Size]byte {
	switch n := len(leaves); n {
	case 0:
		return [sha256.Size]byte(rfc6962.DefaultHasher.EmptyRoot())
	case 1:
		return leaves[0]
	default:
		k := 1
		for k*2 < n {
			k *= 2
		}
		left, right := treeRoot(leaves[:k]), treeRoot(leaves[k:])
		return [sha256.Size]byte(rfc6962.DefaultHasher.HashChildren(left[:], right[:]))
	}
}

// checkpoint logs out and seals the lines so far.
func (r *run) checkpoint(_ context.Context, s Step) error {
	if err := r.closeTokens(); err != nil {
		return fmt.Errorf("log out: %w", err)
	}
	root := treeRoot(r.facts.lines)
	return r.record(s, Done, checkpointData{Size: uint64(len(r.facts.lines)), Root: hex.EncodeToString(root[:])})
}

func (f *facts) takeCheckpoint(rec *Record, _ Step) error {
	var d checkpointData
	if err := rec.result(&d); err != nil {
		return err
	}
	root := treeRoot(f.lines)
	if d.Size != uint64(len(f.lines)) || d.Root != hex.EncodeToString(root[:]) {
		return bad(rec, "checkpoint is not of the lines before it")
	}
	f.size, f.root = d.Size, root
	return nil
}

// checkpointFile is what witnesses sign.
func (f *facts) checkpointFile() File {
	return newFile(CheckpointName, fmt.Appendf(nil, "chancery-ceremony/%s\n%d\n%s\n",
		f.def.ID, f.size, base64.StdEncoding.EncodeToString(f.root[:])))
}

// The answers of a witness who does not sign now.
const (
	later         = "later"
	declinePrefix = "decline:"
)

// maxReason bounds the reason of a witness or of an abort, in characters.
const maxReason = 500

// witnesses collects the signatures, in any order and over any number of runs.
func (r *run) witnesses(ctx context.Context, s Step) error {
	file := r.facts.checkpointFile()
	if err := file.write(r.opts.Dir); err != nil {
		return err
	}
	waiting := 0
	for _, p := range r.facts.expected() {
		if _, ok := r.facts.answers[p.ID]; ok {
			continue
		}
		data, err := r.askWitness(ctx, s, p, file)
		if err != nil {
			return err
		}
		if data == (witnessData{}) {
			waiting++
			continue
		}
		if err := r.state(s, p.ID, data); err != nil {
			return err
		}
	}
	if waiting > 0 {
		return fmt.Errorf("%d of %d have not signed %s: %w", waiting, len(r.facts.expected()), CheckpointName, ErrUnfinished)
	}
	signed, declined := r.facts.signatures()
	return r.record(s, Done, witnessesData{Signed: signed, Declined: declined})
}

// expected are the witnesses who are there.
func (f *facts) expected() []Person {
	return slices.DeleteFunc(f.def.witnesses(), func(p Person) bool { return !f.present[p.ID] })
}

// askWitness asks one witness for their signature; a zero answer is "later".
func (r *run) askWitness(ctx context.Context, s Step, p Person, file File) (witnessData, error) {
	path := filepath.Join(r.opts.Dir, file.Name)
	q := Question{
		ID: s.ID + ":" + p.ID, Person: p.ID,
		Title: p.label() + " signs the transcript on their own machine.",
		Why:   "Without enough witnesses' signatures nobody accepts this ceremony.",
		Facts: append([]Fact{{"file", path}, {"command", SignCommand}},
			hashFact("checkpoint", r.facts.root)...),
		Prompt: fmt.Sprintf("Path of the signature, or the word %s, or %s and why", later, declinePrefix),
		Check: func(answer string) error {
			_, err := r.facts.parseWitness(p, answer)
			return err
		},
	}
	if r.def.Environment == Rehearsal {
		armored, err := sshsig.Sign(practiceKey(r.def.Hash(), p.ID), file.content, Namespace)
		if err != nil {
			return witnessData{}, err
		}
		q.Practice = string(armored)
	}
	answer, err := r.ask(ctx, q)
	if err != nil {
		return witnessData{}, err
	}
	return r.facts.parseWitness(p, answer)
}

// parseWitness reads a witness's answer: a path, an armored signature, a
// refusal, or "later", which is the zero witnessData.
func (f *facts) parseWitness(p Person, answer string) (witnessData, error) {
	if answer == later {
		return witnessData{}, nil
	}
	if reason, ok := strings.CutPrefix(answer, declinePrefix); ok {
		reason, err := checkReason(reason)
		return witnessData{Declined: reason}, err
	}
	text := answer + "\n" // its line end was trimmed
	if !strings.HasPrefix(answer, "-----BEGIN ") {
		content, err := readBounded(answer, sshsig.MaxArmored)
		if err != nil {
			return witnessData{}, err
		}
		text = string(content)
	}
	return witnessData{Signature: text}, f.checkSignature(p, text)
}

// checkReason wants a sentence that can be printed.
func checkReason(text string) (string, error) {
	text = strings.TrimSpace(text)
	switch {
	case text == "":
		return "", errors.New("a reason is needed")
	case len([]rune(text)) > maxReason || !printable(text):
		return "", fmt.Errorf("the reason is not printable, or longer than %d characters", maxReason)
	}
	return text, nil
}

// checkSignature verifies a witness's signature of the checkpoint with the key
// of the definition; in a rehearsal the practice key will do.
func (f *facts) checkSignature(p Person, armored string) error {
	message := f.checkpointFile().content
	keys := []sshsig.PublicKey{}
	if p.Key != "" {
		key, err := sshsig.ParsePublicKey(p.Key)
		if err != nil {
			return err
		}
		keys = append(keys, key)
	}
	if f.def.Environment == Rehearsal {
		key, err := sshsig.NewPublicKey(practiceKey(f.def.Hash(), p.ID).Public().(ed25519.PublicKey))
		if err != nil {
			return err
		}
		keys = append(keys, key)
	}
	err := fmt.Errorf("%s has no key: %w", p.ID, sshsig.ErrSignature)
	for _, key := range keys {
		if err = key.Verify(message, Namespace, []byte(armored)); err == nil {
			return nil
		}
	}
	return err
}

// practiceKey is a person's key in a rehearsal without one: everybody can make
// it, so it proves nothing, and no production ceremony accepts it. Its seed is
// SHA-256("chancery practice key v1\0" ‖ person ‖ 0x00 ‖ hash of the
// definition).
func practiceKey(definition [sha256.Size]byte, person string) ed25519.PrivateKey {
	seed := sha256.Sum256(append([]byte("chancery practice key v1\x00"+person+"\x00"), definition[:]...))
	return ed25519.NewKeyFromSeed(seed[:])
}

// signatures lists who signed and who declined.
func (f *facts) signatures() (signed, declined []string) {
	signed, declined = []string{}, []string{}
	for _, p := range f.def.witnesses() {
		switch a, ok := f.answers[p.ID]; {
		case !ok:
		case a.Signature != "":
			signed = append(signed, p.ID)
		default:
			declined = append(declined, p.ID)
		}
	}
	return signed, declined
}

func (f *facts) takeWitnesses(rec *Record, _ Step) error {
	signed, declined := f.signatures()
	if rec.Type != Statement {
		var d witnessesData
		if err := rec.result(&d); err != nil {
			return err
		}
		if len(f.answers) != len(f.expected()) || !slices.Equal(d.Signed, signed) || !slices.Equal(d.Declined, declined) {
			return bad(rec, "not what the witnesses answered")
		}
		return nil
	}
	var d witnessData
	if err := rec.decode(&d); err != nil {
		return err
	}
	p := f.def.person(rec.Actor)
	if _, ok := f.answers[p.ID]; ok || p.Role != Witness || (d.Signature == "") == (d.Declined == "") {
		return bad(rec, "%.40q is no witness, or answered before", rec.Actor)
	}
	if d.Signature != "" {
		if err := f.checkSignature(p, d.Signature); err != nil {
			return bad(rec, "signature of %s: %w", p.ID, err)
		}
	}
	f.answers[p.ID] = d
	return nil
}

// end writes how it ended.
func (r *run) end(ctx context.Context, s Step) error {
	if err := r.record(s, Done, closeData{Status: r.facts.ending()}); err != nil {
		return err
	}
	return r.show(ctx, "The last record. Read its words aloud; everyone writes them down.", hashFact("last record", r.facts.head)...)
}

// ending is how a ceremony that has come to its last step ends.
func (f *facts) ending() Ending {
	signed, _ := f.signatures()
	switch {
	case f.aborted():
		return Aborted
	case len(signed) < f.def.Quorum[Witness]:
		return Declined
	}
	return Complete
}

// outcome is nil for a complete ceremony.
func (f *facts) outcome() error {
	switch f.status {
	case Complete:
		return nil
	case Declined:
		signed, _ := f.signatures()
		return fmt.Errorf("%d of %d needed: %w", len(signed), f.def.Quorum[Witness], ErrDeclined)
	case Aborted:
		return fmt.Errorf("at step %s, by %s: %s: %w", f.abortedAt.Step, f.abortedBy, f.abortReason, ErrAborted)
	}
	return fmt.Errorf("%w: the ceremony is not complete", ErrTranscript)
}

func (f *facts) takeClose(rec *Record, _ Step) error {
	var d closeData
	if err := rec.result(&d); err != nil {
		return err
	}
	if d.Status != f.ending() {
		return bad(rec, "status %.40q, want %s", d.Status, f.ending())
	}
	f.status = d.Status
	return nil
}

// abortStep takes the place of the steps that are left.
func abortStep() Step {
	return Step{
		ID: string(StepAbort), Kind: StepAbort, Title: "End the ceremony before it is complete.",
		Why: "A ceremony that is not finished must not look as if it could be.",
	}
}

// Abort ends an interrupted ceremony for good, in the name of one of its
// people: it records the reason and what was made, seals the transcript, and
// has the witnesses who were there sign it. No token is needed; keys that were
// made stay where they are, and the record names them.
//
// It returns nil when the end is complete. Errors: ErrEnded, ErrUnfinished (the
// witnesses have not all answered), ErrDefinition (no such person), and those
// of Run.
func Abort(ctx context.Context, def *Definition, opts Options, person, reason string) error {
	opts.Resume = true
	r, err := newRun(def, opts)
	if err != nil {
		return err
	}
	reason, err = checkReason(reason)
	if err != nil {
		return fmt.Errorf("abort: %w: %w", ErrAnswer, err)
	}
	if def.person(person).ID == "" && len(def.People) > 0 {
		return fmt.Errorf("abort: %.40q is not one of the people: %w", person, ErrDefinition)
	}
	if err := r.reopen(filepath.Join(opts.Dir, TranscriptName)); err != nil {
		return err
	}
	err = r.abortNow(ctx, person, reason)
	if err = errors.Join(err, r.transcript.Close()); err != nil {
		return err
	}
	if err := r.facts.outcome(); !errors.Is(err, ErrAborted) {
		return err
	}
	return nil
}

// abortNow turns the plan and walks it to its end.
func (r *run) abortNow(ctx context.Context, person, reason string) error {
	r.aborting = true
	if !r.facts.aborted() {
		if r.facts.status != "" || r.facts.next > len(r.facts.plan)-len(r.def.closing()) {
			return fmt.Errorf("abort: the transcript is sealed: %w", ErrEnded)
		}
		if _, err := r.ask(ctx, Question{
			ID: string(StepAbort), Person: person, Confirmation: true,
			Title:    "The ceremony ends here and can never be resumed.",
			Why:      "What was made so far will not be used; its keys stay in the tokens until someone destroys them.",
			Facts:    r.facts.pinsBegun(),
			Prompt:   "Type the ceremony's id to end it",
			Check:    func(answer string) error { return wantText(answer, r.def.ID) },
			Practice: r.def.ID,
		}); err != nil {
			return err
		}
		if person == "" {
			person = actor
		}
		if err := r.state(abortStep(), person, abortData{Reason: reason}); err != nil {
			return err
		}
	}
	return r.runSteps(ctx)
}

func wantText(answer, want string) error {
	if answer != want {
		return fmt.Errorf("this is not %s", want)
	}
	return nil
}

// abort writes what was left behind, after the statement of who ended it.
func (r *run) abort(_ context.Context, s Step) error {
	return r.record(s, Done, r.facts.leftBehind())
}

// leftBehind is what an abort leaves.
func (f *facts) leftBehind() abortResult {
	return abortResult{Step: f.abortedStep, Keys: append([]string{}, sorted(f.keyIntents)...)}
}

func (f *facts) takeAbort(rec *Record, _ Step) error {
	if rec.Type == Statement {
		var d abortData
		if err := rec.decode(&d); err != nil {
			return err
		}
		reason, err := checkReason(d.Reason)
		known := f.def.person(rec.Actor).ID != "" || rec.Actor == actor && len(f.def.People) == 0
		if err != nil || reason != d.Reason || f.abortedBy != "" || !known {
			return bad(rec, "not an end by one of the people with a reason")
		}
		f.abortedBy, f.abortReason = rec.Actor, d.Reason
		return nil
	}
	var d abortResult
	if err := rec.result(&d); err != nil {
		return err
	}
	if want := f.leftBehind(); f.abortedBy == "" || d.Step != want.Step || !slices.Equal(d.Keys, want.Keys) {
		return bad(rec, "not what was left behind")
	}
	f.abortedAt = &d
	return nil
}
