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
	"slices"
	"strings"
	"time"

	"github.com/chancery-ca/chancery/ceremony/durable"
	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/hsm"
)

// Errors that callers branch on.
var (
	// ErrEnvironment: the ceremony is not a rehearsal, or a token of a
	// rehearsal is not known to be software, or one of a production ceremony
	// is.
	ErrEnvironment = errors.New("wrong environment")
	// ErrWindow: the clock is outside the definition's window.
	ErrWindow = errors.New("outside the ceremony's window")
	// ErrNotEmpty: a token that must be empty has a private key.
	ErrNotEmpty = errors.New("token is not empty")
	// ErrModule: a PKCS#11 library is not the one that the definition pins.
	ErrModule = errors.New("module is not the definition's")
	// ErrProgram: an interrupted ceremony was begun by another program, whose hash
	// is on record and on everyone's paper.
	ErrProgram = errors.New("not the program that the ceremony began with")
	// ErrStopped: the token does not hold what an interrupted ceremony
	// announced. People have to look; nothing is repaired by itself. Such a
	// ceremony can only be aborted.
	ErrStopped = errors.New("ceremony stopped")
	// ErrEnded: the ceremony is over: complete, declined or aborted.
	ErrEnded = errors.New("ceremony is over")
	// ErrUnfinished: the ceremony is sound and waits for witnesses.
	ErrUnfinished = errors.New("ceremony waits for its witnesses")
	// ErrDeclined: too few witnesses signed. The ceremony is over, and its
	// outputs are not to be used.
	ErrDeclined = errors.New("too few witnesses signed")
	// ErrAborted: people ended the ceremony before it was complete.
	ErrAborted = errors.New("ceremony was aborted")
)

// actor is who writes the records that no person stands for.
const actor = "chancery-ceremony"

// Options is what a run needs besides its definition.
type Options struct {
	// Tokens are opened tokens, by the names of the definition. The caller
	// closes them.
	Tokens map[string]hsm.Token
	// Open opens a token that is not in Tokens, when it is first needed: the
	// only moment at which somebody types a PIN. The ceremony closes it. nil
	// if Tokens has all.
	Open func(ctx context.Context, token string) (hsm.Token, error)
	// Inspect describes a token without a login; nil if nobody can. It is
	// called before Open, so that people see what they type a PIN for.
	Inspect func(ctx context.Context, token string) (hsm.Inspection, error)
	// Custodian opens the TUF key of a custodian who has brought their token,
	// by the id of the definition; nil for one who has not. The caller closes
	// it. nil if all custodians sign elsewhere.
	Custodian func(ctx context.Context, id string) (hsm.Key, error)
	// Previous is the output folder of the ceremony that this one continues.
	Previous string
	// ChangePIN gives a token of the definition, which is not open, its new PIN
	// and proves that. begun says that an earlier call for it may have been
	// killed in the act, so that the new PIN may be there; it returns whether it
	// was. Called again it must end what was begun. nil if nobody can: a
	// definition with change-pin then stops there.
	ChangePIN func(ctx context.Context, token string, begun bool) (already bool, err error)
	// Pairing names the wrapping key that two practice tokens share; nil in
	// production, where the definition says it.
	Pairing func(source, target string) (hsm.Pairing, error)
	// Bundle is the path of the other machine's bundle, "" until it is there.
	Bundle string
	// People are asked and told. nil means Practice, in a rehearsal.
	People People
	// Dir is where the outputs go; it is made if it is not there. The caller
	// joins Definition.Outputs.Dir to a folder of its choice.
	Dir string
	// Now is the clock.
	Now func() (time.Time, error)
	// Progress is called, from the run's goroutine, before and after every
	// step; nil means nobody looks.
	Progress func(Event)
	// Binary is the path of this program, whose hash is recorded; "" if none. No
	// other program goes on with an interrupted ceremony.
	Binary string
	// Resume goes on with the interrupted ceremony in Dir. Without it a Dir
	// that has anything in it is refused with ErrOutputExists.
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
	// Files are all outputs, without checksums.txt.
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
	people     People
	facts      *facts
	transcript *Transcript
	opened     map[string]hsm.Token // by Options.Open
	aborting   bool
}

// Rehearse runs a definition whose environment is rehearsal (see
// Definition.Rehearsal), on tokens that are known to be software. It writes
// the outputs to opts.Dir and returns what it made. After an error, or a kill,
// it can be called again with Resume. Errors are those of Run.
func Rehearse(ctx context.Context, def *Definition, opts Options) (*Result, error) {
	if def.Environment != Rehearsal {
		return nil, fmt.Errorf("environment is %s, not rehearsal: %w", def.Environment, ErrEnvironment)
	}
	if opts.People == nil {
		opts.People = Practice{}
	}
	return Run(ctx, def, opts)
}

// Run performs the ceremony of a definition: it does every step of its plan,
// asks people what has to be asked, writes the outputs to opts.Dir and returns
// what it made. After an error, or a kill, it can be called again with Resume
// and goes on where it was.
//
// When ctx ends, a question is withdrawn at once; work in a token is finished
// first, because a half-made key would end the ceremony.
//
// Errors: ErrEnvironment, ErrNotInVersion, ErrOutputExists, ErrWindow,
// ErrModule, ErrProgram, ErrNotEmpty, ErrQuorum, ErrAnswer, ErrLive, ErrStopped,
// ErrEntropy, ErrTranscript, ErrCustodians, ErrMachine, ErrBundle, ErrUnfinished, ErrDeclined, ErrAborted, and those
// of the tokens.
func Run(ctx context.Context, def *Definition, opts Options) (*Result, error) {
	r, err := newRun(def, opts)
	if err != nil {
		return nil, err
	}
	for _, name := range sorted(opts.Tokens) {
		if err := def.checkSoftware(name, opts.Tokens[name].Info()); err != nil {
			return nil, err
		}
	}
	if err := r.open(); err != nil {
		return nil, err
	}
	err = r.runSteps(ctx)
	if err = errors.Join(err, r.closeTokens(), r.transcript.Close()); err != nil {
		return nil, err
	}
	if err := r.facts.outcome(); err != nil {
		return nil, err
	}
	return r.result()
}

func newRun(def *Definition, opts Options) (*run, error) {
	steps, err := Plan(def)
	if err != nil {
		return nil, err
	}
	if opts.People == nil {
		return nil, fmt.Errorf("nobody to ask: %w", ErrAnswer)
	}
	return &run{
		def: def, opts: opts, people: opts.People, facts: newFacts(def, steps), opened: map[string]hsm.Token{},
	}, nil
}

// checkSoftware wants software in a rehearsal, and none in production unless
// the definition accepts it.
func (d *Definition) checkSoftware(name string, info hsm.TokenInfo) error {
	software := hsm.IsSoftware(info)
	switch {
	case d.Environment == Rehearsal && !software:
		return fmt.Errorf("token %s is a %.40q by %.40q, not known to be software: not for a rehearsal: %w",
			name, info.Model, info.Manufacturer, ErrEnvironment)
	case d.Environment == Production && software && !d.Tokens[name].AcceptSoftware:
		return fmt.Errorf("token %s is software (%.40q): not for production: %w", name, info.Model, ErrEnvironment)
	}
	return nil
}

// token returns the open token of the definition, opening it if need be.
func (r *run) token(ctx context.Context, name string) (hsm.Token, error) {
	if tok := r.opts.Tokens[name]; tok != nil {
		return tok, nil
	}
	if tok := r.opened[name]; tok != nil {
		return tok, nil
	}
	if r.opts.Open == nil {
		return nil, fmt.Errorf("token %s is not open: %w", name, hsm.ErrNotFound)
	}
	if err := r.checkSeenBefore(ctx, name); err != nil {
		return nil, err
	}
	tok, err := r.opts.Open(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("open token %s: %w", name, err)
	}
	r.opened[name] = tok
	return tok, errors.Join(r.def.checkSoftware(name, tok.Info()), r.facts.checkRecorded(name, tok.Info()))
}

// checkSeenBefore wants the device that is on record, after an interruption, too:
// nobody shall type a PIN for another one with the same label.
func (r *run) checkSeenBefore(ctx context.Context, name string) error {
	if _, ok := r.facts.inventory[name]; !ok || r.opts.Inspect == nil {
		return nil
	}
	seen, err := r.opts.Inspect(ctx, name)
	if err != nil {
		return fmt.Errorf("inspect token %s: %w", name, err)
	}
	return r.facts.checkRecorded(name, seen.Token)
}

// checkRecorded wants the device of the inventory, if there is one.
func (f *facts) checkRecorded(name string, info hsm.TokenInfo) error {
	if on, ok := f.inventory[name]; ok && on.Token.Device() != info.Device() {
		return fmt.Errorf("token %s has serial %.40q, the one on record %.40q: another device: %w", name, info.Serial, on.Token.Serial, hsm.ErrMismatch)
	}
	return nil
}

// closeTokens logs out of the tokens that the ceremony opened.
func (r *run) closeTokens() error {
	var all []error
	for _, name := range sorted(r.opened) {
		all = append(all, r.opened[name].Close())
	}
	clear(r.opened)
	return errors.Join(all...)
}

// deviceTime bounds one step's work in a token: 65 signatures at 6 a second
// and a slow key generation fit in it many times.
const deviceTime = 5 * time.Minute

// device is the context for work in a token: it outlives ctx.
func device(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), deviceTime)
}

// now is the clock, within the window until the ceremony comes to its end: a
// witness may sign later, and people can always abort.
func (r *run) now() (time.Time, error) {
	now, err := r.opts.Now()
	if err != nil {
		return time.Time{}, err
	}
	if r.aborting || r.facts.next == len(r.facts.plan) || r.facts.plan[r.facts.next].Kind.ends() {
		return now, nil
	}
	return now, r.def.Window.check(now)
}

// check says whether t is in the window; the zero window has all times.
func (w Window) check(t time.Time) error {
	if w.NotBefore.IsZero() || !t.Before(w.NotBefore) && !t.After(w.NotAfter) {
		return nil
	}
	return fmt.Errorf("it is %s, the window is %s to %s: %w", t.UTC().Format(time.RFC3339),
		w.NotBefore.UTC().Format(time.RFC3339), w.NotAfter.UTC().Format(time.RFC3339), ErrWindow)
}

// open makes or reopens the output folder and its transcript.
func (r *run) open() error {
	path := filepath.Join(r.opts.Dir, TranscriptName)
	_, err := os.Lstat(path)
	switch exists := !errors.Is(err, fs.ErrNotExist); {
	case exists && !r.opts.Resume && begun(path):
		return fmt.Errorf("%s: %w", TranscriptName, ErrOutputExists)
	case exists:
		return r.reopen(path)
	}
	if _, err := r.now(); err != nil { // before anything is written
		return err
	}
	if err := durable.MakeFolder(r.opts.Dir, 0o755); err != nil {
		return fmt.Errorf("make output folder: %w", err)
	}
	if err := checkFresh(r.opts.Dir, r.def); err != nil {
		return err
	}
	if err := newFile(definitionName, r.def.source).write(r.opts.Dir); err != nil {
		return err
	}
	r.transcript, err = CreateTranscript(path, r.def.ID, r.now)
	return err
}

// begun says whether there is more in the transcript than a kill before the
// end of its first record leaves: nobody has acted upon that, so a ceremony can
// begin in its place.
func begun(path string) bool {
	_, err := readTranscriptFile(path)
	return !errors.Is(err, errEmpty)
}

// checkFresh wants nothing in the folder but what a kill before the first
// record leaves: the definition's copy, whole (write compares it) or not. The
// folders that the definition names for a TPM's key files may be there, because
// the token is opened with them; what is in them the token counts.
func checkFresh(dir string, d *Definition) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("list output folder: %w", err)
	}
	for _, e := range entries {
		if e.Name() != definitionName && e.Name() != durable.Partial(definitionName) && !(e.IsDir() && d.hasKeyFolder(e.Name())) {
			return fmt.Errorf("%s: %w", e.Name(), ErrOutputExists)
		}
	}
	return nil
}

// hasKeyFolder says whether a TPM of the definition keeps its key files in the
// folder of this name in the outputs, or below it.
func (d *Definition) hasKeyFolder(name string) bool {
	for _, t := range d.Tokens {
		path, ok := strings.CutPrefix(t.URI, "tpm2:")
		path, _, _ = strings.Cut(path, "?")
		if first, _, _ := strings.Cut(path, "/"); ok && first == name {
			return true
		}
	}
	return false
}

// reopen replays the transcript of an interrupted run.
func (r *run) reopen(path string) error {
	t, err := OpenTranscript(path, r.def.ID, r.now)
	if err != nil {
		return err
	}
	r.transcript = t
	err = r.facts.replay(t.Records())
	if err == nil { // a kill before the first record can leave half of it
		err = newFile(definitionName, r.def.source).write(r.opts.Dir)
	}
	if err == nil {
		err = r.sameProgram()
	}
	if err != nil {
		return errors.Join(err, t.Close())
	}
	return nil
}

// sameProgram wants the program on record, while there is something to do.
func (r *run) sameProgram() error {
	if r.opts.Binary == "" || r.facts.binary == "" || r.facts.next == len(r.facts.plan) {
		return nil
	}
	sum, err := hashFile(r.opts.Binary)
	if err != nil {
		return fmt.Errorf("hash this program: %w", err)
	}
	if sum != r.facts.binary {
		return fmt.Errorf("on record is SHA-256 %.64s, this is %s: %w", r.facts.binary, sum, ErrProgram)
	}
	return nil
}

// runSteps does every step that is not done, in order.
func (r *run) runSteps(ctx context.Context) error {
	for i, s := range r.facts.plan[:r.facts.next] {
		r.report(Event{Step: s, Index: i + 1, Total: len(r.facts.plan), Skipped: true})
		r.report(Event{Step: s, Index: i + 1, Total: len(r.facts.plan), Skipped: true, Done: true})
	}
	if name := r.facts.quarantined; name != "" && r.facts.status == "" && !r.facts.aborted() {
		return fmt.Errorf("key %s is in quarantine: %w", name, ErrStopped)
	}
	if _, err := r.now(); err != nil { // before anybody is asked for a PIN
		return err
	}
	for r.facts.next < len(r.facts.plan) {
		s := r.facts.plan[r.facts.next]
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("step %s: %w", s.ID, err)
		}
		e := Event{Step: s, Index: r.facts.next + 1, Total: len(r.facts.plan)}
		r.report(e)
		if err := r.step(ctx, s); err != nil {
			return fmt.Errorf("step %s: %w", s.ID, err)
		}
		e.Done = true
		r.report(e)
	}
	return r.finish()
}

func (r *run) report(e Event) {
	if r.opts.Progress != nil {
		r.opts.Progress(e)
	}
}

// step does one step, to its end.
func (r *run) step(ctx context.Context, s Step) error {
	a, err := actionOf(s.Kind)
	if err != nil {
		return err
	}
	before := r.facts.next
	if err := a.do(r, ctx, s); err != nil {
		return err
	}
	if r.facts.next == before {
		return fmt.Errorf("%w: the step has no result", ErrTranscript) // a fault of ours
	}
	return nil
}

// record takes a record into the facts, by the same way as a verifier, and appends
// it to the transcript: what a verifier would refuse is never on disk, where it
// would end the ceremony. After an error the run is over.
func (r *run) record(s Step, typ RecordType, data any) error {
	return r.append(actor, s, typ, data)
}

// state records what a person said.
func (r *run) state(s Step, person string, data any) error {
	return r.append(person, s, Statement, data)
}

func (r *run) append(who string, s Step, typ RecordType, data any) error {
	_, err := r.transcript.appendIf(who, s.ID, typ, data, r.facts.apply)
	return err
}

// show tells people something.
func (r *run) show(ctx context.Context, title string, facts ...Fact) error {
	return r.people.Show(ctx, Notice{Title: title, Facts: facts})
}

// result describes the complete ceremony.
func (r *run) result() (*Result, error) {
	ring, err := r.facts.resultRing()
	if err != nil {
		return nil, err
	}
	files, err := r.facts.allFiles(r.transcript.Records())
	if err != nil {
		return nil, err
	}
	roles := map[hsm.Role]string{}
	for key, u := range r.def.uses {
		roles[u.role] = key
	}
	return &Result{
		Dir: r.opts.Dir, Files: slices.DeleteFunc(files, func(f File) bool { return f.Name == ChecksumsName }),
		Keys: ring, Certificates: r.facts.certs,
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
