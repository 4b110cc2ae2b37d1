package ceremony

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/hsm"
)

// Errors that callers branch on.
var (
	// ErrEnvironment: the ceremony is not a rehearsal, or a token of a
	// rehearsal is not known to be software.
	ErrEnvironment = errors.New("not a rehearsal")
	// ErrWindow: the clock is outside the definition's window.
	ErrWindow = errors.New("outside the ceremony's window")
	// ErrNotEmpty: a token that must be empty has a private key.
	ErrNotEmpty = errors.New("token is not empty")
	// ErrStopped: the token does not hold what an interrupted ceremony
	// announced. People have to look; nothing is repaired by itself.
	ErrStopped = errors.New("ceremony stopped")
)

// actor is who writes the records that no person stands for.
const actor = "chancery-ceremony"

// Options is what a run needs besides its definition.
type Options struct {
	// Tokens are the opened tokens, by the names of the definition. The
	// caller closes them.
	Tokens map[string]hsm.Token
	// Dir is where the outputs go; it is made if it is not there. The caller
	// joins Definition.Outputs.Dir to a folder of its choice.
	Dir string
	// Now is the clock.
	Now func() (time.Time, error)
	// Progress is called, from the run's goroutine, before and after every
	// step; nil means nobody looks.
	Progress func(Event)
	// Shares are the contributors' values, 32 octets each, by person id. A
	// rehearsal makes those that are missing.
	Shares map[string][]byte
	// Binary is the path of this program, whose hash is recorded; "" if none.
	Binary string
	// Resume goes on with the interrupted ceremony in Dir. Without it a Dir
	// that has any of the outputs is refused with ErrOutputExists.
	Resume bool
}

// Event is one sign of progress.
type Event struct {
	Step         Step
	Index, Total int // of the step, from 1
	// Done is false before the step and true after it.
	Done bool
	// Skipped says that an earlier run had finished the step.
	Skipped bool
}

// Result is what a complete ceremony leaves.
type Result struct {
	Dir string
	// Files are the outputs, without checksums.txt and the transcript.
	Files []File
	Keys  *trust.KeyRing
	// Certificates are by the names of the definition.
	Certificates map[string]*x509.Certificate
	// Roles says which key (by its name in the definition) has which role.
	Roles map[hsm.Role]string
	// Head is the hash of the transcript's last record.
	Head [sha256.Size]byte
	// Records is the length of the transcript.
	Records int
}

// run is one running ceremony.
type run struct {
	def        *Definition
	opts       Options
	steps      []Step
	facts      *facts
	transcript *Transcript
}

// Rehearse runs a definition whose environment is rehearsal, on tokens that
// are known to be software. It writes the outputs to opts.Dir and returns what
// it made. After an error, or a kill, it can be called again with Resume.
//
// Errors: ErrEnvironment, ErrNotInVersion, ErrOutputExists, ErrWindow,
// ErrNotEmpty, ErrStopped, ErrEntropy, ErrTranscript, and those of the tokens.
func Rehearse(ctx context.Context, def *Definition, opts Options) (*Result, error) {
	if def.Environment != Rehearsal {
		return nil, fmt.Errorf("environment is %s: %w", def.Environment, ErrEnvironment)
	}
	steps, err := Plan(def)
	if err != nil {
		return nil, err
	}
	r := &run{def: def, opts: opts, steps: steps, facts: newFacts(def)}
	if err := r.checkTokens(); err != nil {
		return nil, err
	}
	if _, err := r.now(); err != nil { // before anything is written
		return nil, err
	}
	if err := r.open(); err != nil {
		return nil, err
	}
	err = r.runSteps(ctx)
	if err = errors.Join(err, r.transcript.Close()); err != nil {
		return nil, err
	}
	return r.result()
}

// checkTokens wants every token of the definition, and only software.
func (r *run) checkTokens() error {
	for _, name := range sorted(r.def.Tokens) {
		tok, ok := r.opts.Tokens[name]
		if !ok || tok == nil {
			return fmt.Errorf("token %s is not open: %w", name, hsm.ErrNotFound)
		}
		if info := tok.Info(); !hsm.IsSoftware(info) {
			return fmt.Errorf("token %s is a %.40q by %.40q, not known to be software: %w",
				name, info.Model, info.Manufacturer, ErrEnvironment)
		}
	}
	return nil
}

// now is the clock within the window.
func (r *run) now() (time.Time, error) {
	now, err := r.opts.Now()
	if err != nil {
		return time.Time{}, err
	}
	w := r.def.Window
	if !w.NotBefore.IsZero() && (now.Before(w.NotBefore) || now.After(w.NotAfter)) {
		return time.Time{}, fmt.Errorf("it is %s, the window is %s to %s: %w", now.UTC().Format(time.RFC3339),
			w.NotBefore.Format(time.RFC3339), w.NotAfter.Format(time.RFC3339), ErrWindow)
	}
	return now, nil
}

// open makes or reopens the output folder and its transcript.
func (r *run) open() error {
	if err := os.MkdirAll(r.opts.Dir, 0o755); err != nil {
		return fmt.Errorf("make output folder: %w", err)
	}
	path := filepath.Join(r.opts.Dir, TranscriptName)
	_, err := os.Lstat(path)
	exists := !errors.Is(err, fs.ErrNotExist)
	switch {
	case exists && !r.opts.Resume:
		return fmt.Errorf("%s: %w", TranscriptName, ErrOutputExists)
	case exists:
		return r.reopen(path)
	}
	for _, name := range outputNames(r.def) {
		// A kill can leave the definition's copy without a transcript; write
		// compares it.
		if _, err := os.Lstat(filepath.Join(r.opts.Dir, name)); !errors.Is(err, fs.ErrNotExist) && name != definitionName {
			return fmt.Errorf("%s: %w", name, ErrOutputExists)
		}
	}
	if err := newFile(definitionName, r.def.source).write(r.opts.Dir); err != nil {
		return err
	}
	r.transcript, err = CreateTranscript(path, r.def.ID, r.now)
	return err
}

// reopen replays the transcript of an interrupted run.
func (r *run) reopen(path string) error {
	t, err := OpenTranscript(path, r.def.ID, r.now)
	if err != nil {
		return err
	}
	if err := replay(r.facts, r.steps, t.Records()); err != nil {
		return errors.Join(err, t.Close())
	}
	r.transcript = t
	return nil
}

// replay takes the records into f, and checks that they are those of the plan
// and in its order.
func replay(f *facts, steps []Step, records []Record) error {
	next := 0
	for i := range records {
		rec := &records[i]
		if next == len(steps) || rec.Step != steps[next].ID {
			return fmt.Errorf("%w: record %d: step %.80q is not the plan's next", ErrTranscript, rec.Seq, rec.Step)
		}
		if err := f.apply(rec, steps[next]); err != nil {
			return err
		}
		if rec.Type == Done {
			next++
		}
	}
	return nil
}

// runSteps does every step that is not done, in order.
func (r *run) runSteps(ctx context.Context) error {
	for i, s := range r.steps {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("step %s: %w", s.ID, err)
		}
		skipped := r.facts.done[s.ID]
		r.report(Event{Step: s, Index: i + 1, Total: len(r.steps), Skipped: skipped})
		if !skipped {
			if err := r.step(ctx, s); err != nil {
				return fmt.Errorf("step %s: %w", s.ID, err)
			}
		}
		r.report(Event{Step: s, Index: i + 1, Total: len(r.steps), Skipped: skipped, Done: true})
	}
	return r.checksums()
}

func (r *run) report(e Event) {
	if r.opts.Progress != nil {
		r.opts.Progress(e)
	}
}

// step does one step.
func (r *run) step(ctx context.Context, s Step) error {
	switch s.Kind {
	case StepOpen:
		return r.begin(s)
	case StepInventory:
		return r.inventory(ctx, s)
	case StepSelfTest:
		return r.selfTest(ctx, s)
	case StepEntropy:
		return r.entropy(ctx, s)
	case StepKey:
		return r.key(ctx, s)
	case StepCertificate:
		return r.certificate(ctx, s)
	case StepOutputs:
		return r.outputs(s)
	case StepClose:
		return r.record(s, Done, closeData{Status: statusComplete})
	}
	return fmt.Errorf("step kind %s: %w", s.Kind, ErrNotInVersion)
}

// record appends to the transcript and takes the record into the facts, by the
// same way as a verifier.
func (r *run) record(s Step, typ RecordType, data any) error {
	rec, err := r.transcript.Append(actor, s.ID, typ, data)
	if err != nil {
		return err
	}
	return r.facts.apply(rec, s)
}

func (r *run) begin(s Step) error {
	h := r.def.Hash()
	data := openData{
		Definition: hex.EncodeToString(h[:]), Kind: r.def.Kind, Environment: r.def.Environment,
		GoVersion: runtime.Version(),
	}
	if r.opts.Binary != "" {
		var err error
		if data.Binary, err = hashFile(r.opts.Binary); err != nil {
			return fmt.Errorf("hash this program: %w", err)
		}
	}
	return r.record(s, Done, data)
}

func (r *run) inventory(ctx context.Context, s Step) error {
	tok := r.opts.Tokens[s.Name]
	data := inventoryData{Token: tok.Info()}
	var err error
	if data.Keys, err = tok.Keys(ctx); err != nil {
		return fmt.Errorf("count keys: %w", err)
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

func (r *run) selfTest(ctx context.Context, s Step) error {
	if err := knownAnswer(); err != nil {
		return err
	}
	octets, err := randomOctets(ctx, r.opts.Tokens[s.Name], healthOctets)
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

// entropy collects all commitments, records them, and only then all values.
// Interrupted in between it begins again: the earlier commitments stay in the
// transcript for all to see.
func (r *run) entropy(ctx context.Context, s Step) error {
	token := r.def.Keys[r.def.keyOfRole(hsm.RoleRoot)].Token
	hardware, err := randomOctets(ctx, r.opts.Tokens[token], shareSize)
	if err != nil {
		return err
	}
	for who := range r.opts.Shares {
		if !slices.Contains(r.def.Entropy.Contributors, who) {
			return fmt.Errorf("%w: share of %.40q, who is not a contributor", ErrEntropy, who)
		}
	}
	intent := entropyIntent{Token: token}
	var result entropyResult
	add := func(who string, share []byte) {
		intent.Commitments = append(intent.Commitments, contribution{Contributor: who, Commitment: commit(who, share)})
		result.Reveals = append(result.Reveals, contribution{Contributor: who, Value: hex.EncodeToString(share)})
	}
	for _, who := range r.def.Entropy.Contributors {
		share, ok := r.opts.Shares[who]
		if !ok {
			share = newShare()
		} else if len(share) != shareSize {
			return fmt.Errorf("%w: share of %s has %d octets, want %d", ErrEntropy, who, len(share), shareSize)
		}
		add(who, share)
	}
	add(hardwareShare, hardware)
	if err := r.record(s, Intent, intent); err != nil {
		return err
	}
	seed, err := checkReveals(&intent, &result)
	if err != nil {
		return err
	}
	result.Seed = hex.EncodeToString(seed[:])
	return r.record(s, Done, result)
}

// result describes the complete ceremony.
func (r *run) result() (*Result, error) {
	ring, err := r.facts.keyRing()
	if err != nil {
		return nil, err
	}
	files, err := r.facts.outputFiles()
	if err != nil {
		return nil, err
	}
	roles := map[hsm.Role]string{}
	for key, u := range r.def.uses {
		roles[u.role] = key
	}
	return &Result{
		Dir: r.opts.Dir, Files: files, Keys: ring, Certificates: r.facts.certs,
		Roles: roles, Head: r.facts.head, Records: r.facts.records,
	}, nil
}

// hashFile returns the SHA-256 of a file in hexadecimal.
func hashFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
