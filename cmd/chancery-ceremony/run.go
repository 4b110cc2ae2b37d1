package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/chancery-ca/chancery/ceremony"
)

func newRun() *cobra.Command {
	var f runFlags
	cmd := &cobra.Command{
		Use:   "run DEFINITION",
		Short: "Perform the ceremony of a production definition",
		Long: `run performs a ceremony on the tokens that the definition names. It asks one
question at a time, at a terminal. PINs are typed and not shown, or read from
--pin-file TOKEN=PATH (mode 0400, yours); never from an argument or a variable.
Each PIN is tried once.

An answers file (--answers, YAML: "question: answer") may answer what is not a
decision, such as where a witness's signature is.

Interrupted at any point, it goes on with: chancery-ceremony resume DIR/out`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			def, err := readDefinition(args[0])
			if err != nil {
				return err
			}
			if def.Environment != ceremony.Production {
				return fmt.Errorf("run %s: environment is %s, not production: %w", def.ID, def.Environment, ceremony.ErrEnvironment)
			}
			if def, err = f.machine.part(def); err != nil {
				return err
			}
			return f.start(cmd, def)
		},
	}
	f.register(cmd)
	f.registerPINs(cmd)
	return cmd
}

func newResume() *cobra.Command {
	f := runFlags{resume: true}
	cmd := &cobra.Command{
		Use:   "resume OUTPUTS",
		Short: "Go on with an interrupted ceremony or rehearsal",
		Long: `resume goes on where an interrupted ceremony stopped. OUTPUTS is its output
folder, the one with transcript.jsonl. A token is opened, and its PIN asked
for, only if there is still something to do in it.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			def, err := ceremony.OpenFolder(args[0])
			if err != nil {
				return err
			}
			f.out = args[0]
			return f.start(cmd, def)
		},
	}
	f.registerAnswers(cmd)
	f.registerPINs(cmd)
	cmd.Flags().BoolVar(&f.ask, "ask", false, "in a rehearsal: ask people")
	return cmd
}

// runFlags are the flags of the commands that run a ceremony.
type runFlags struct {
	dir     string // of the ceremony
	out     string // of its outputs
	answers string
	pins    pinFiles
	newPINs pinFiles
	ask     bool
	resume  bool
	machine machineFlag
	bundle  string // of the other machine
	before  string // outputs of the ceremony before
	tokens  string // folder of an earlier rehearsal, whose tokens are used
}

func (f *runFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.dir, "dir", "", "folder of the ceremony (default: its id)")
	f.machine.register(cmd)
	f.registerAnswers(cmd)
}

func (f *runFlags) registerPrevious(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.before, "previous", "", "output folder of the ceremony that this one continues")
}

func (f *runFlags) registerAnswers(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.answers, "answers", "", "file with answers (YAML)")
}

func (f *runFlags) registerPINs(cmd *cobra.Command) {
	f.registerPrevious(cmd)
	f.pins, f.newPINs = pinFiles{}, pinFiles{}
	cmd.Flags().Var(f.pins, "pin-file", "file with the PIN of a token; once for each token")
	cmd.Flags().Var(f.newPINs, "new-pin-file", "file with what the PIN of a token becomes, if the definition says change-pin")
}

// start runs or resumes the ceremony of def.
func (f *runFlags) start(cmd *cobra.Command, def *ceremony.Definition) error {
	if err := f.place(def); err != nil {
		return err
	}
	if _, err := ceremony.Plan(def); err != nil {
		return err
	}
	if err := errors.Join(f.pins.check("pin-file", def), f.newPINs.check("new-pin-file", def), tokensPossible(def)); err != nil {
		return err
	}
	if !f.resume {
		if err := f.prepare(); err != nil {
			return err
		}
	}
	c := consoleOf(cmd)
	people, err := f.people(c, def)
	if err != nil {
		return err
	}
	return f.perform(cmd.Context(), c, people, def)
}

// consoleOf returns the console of a command.
func consoleOf(cmd *cobra.Command) *console {
	in, _ := cmd.InOrStdin().(*os.File)
	return newConsole(in, cmd.OutOrStdout())
}

// place works out the folders.
func (f *runFlags) place(def *ceremony.Definition) error {
	if f.out != "" { // resumed: DIR/OUTPUTS is where we are
		out, err := filepath.Abs(f.out)
		if err != nil {
			return fmt.Errorf("find folder: %w", err)
		}
		dir, ok := strings.CutSuffix(out, string(filepath.Separator)+filepath.FromSlash(def.Outputs.Dir))
		if !ok {
			return fmt.Errorf("the outputs are in %s, and the definition says %s: %w", out, def.Outputs.Dir, ceremony.ErrDefinition)
		}
		f.dir = dir
		return nil
	}
	if f.dir == "" {
		f.dir = def.ID
	}
	f.out = filepath.Join(f.dir, filepath.FromSlash(def.Outputs.Dir))
	first, _, _ := strings.Cut(def.Outputs.Dir, "/")
	if def.Environment == ceremony.Rehearsal && slices.Contains([]string{tokensFolder, pinsFolder, pairingsFolder}, first) {
		return fmt.Errorf("outputs: dir %q: a rehearsal has its own things in %s, and outputs are public: %w", def.Outputs.Dir, first, ceremony.ErrDefinition)
	}
	return nil
}

// people decides who answers: an unattended rehearsal answers by itself, a
// prepared answer comes before a typed one.
func (f *runFlags) people(c *console, def *ceremony.Definition) (ceremony.People, error) {
	var people ceremony.People = c
	if def.Environment == ceremony.Rehearsal && !f.ask {
		people = ceremony.Practice{}
	}
	if f.answers == "" {
		return people, nil
	}
	answers, err := readAnswers(f.answers)
	if err != nil {
		return nil, err
	}
	return &ceremony.Prepared{Answers: answers, Next: people}, nil
}

func readAnswers(path string) (map[string]string, error) {
	content, err := readFile(path, ceremony.MaxDefinition)
	if err != nil {
		return nil, fmt.Errorf("read answers: %w", err)
	}
	return ceremony.ParseAnswers(content)
}

// perform runs the ceremony and says what it made, or how to go on.
func (f *runFlags) perform(ctx context.Context, c *console, people ceremony.People, def *ceremony.Definition) error {
	printHead(&c.printer, def)
	began := time.Now()
	source := &tokenSource{def: def, dir: f.dir, out: f.out, before: f.before, console: c, pinFiles: f.pins, newPINFiles: f.newPINs}
	binary, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	progress := c.progress
	if _, unattended := people.(ceremony.Practice); unattended {
		progress = c.brief
	}
	opts := ceremony.Options{
		Open: source.open, Inspect: source.inspect, ChangePIN: source.changePIN, Pairing: source.pairing, People: people, Dir: f.out,
		Now: clock, Binary: binary, Resume: f.resume, Progress: progress, Bundle: f.bundle, Previous: f.before,
	}
	custodians := f.custodians(source, def)
	if custodians != nil {
		opts.Custodian = custodians.key
	}
	res, err := ceremony.Run(ctx, def, opts)
	if err = errors.Join(err, custodians.close()); err != nil {
		return &interrupted{err: err, out: f.out, ask: f.ask, before: f.before}
	}
	summary(c, f.dir, def, res, time.Since(began))
	return c.err
}

// interrupted is the error of a ceremony that has begun.
type interrupted struct {
	err    error
	out    string
	ask    bool   // a rehearsal by people
	before string // --previous
}

// Error is that of what interrupted it.
func (e *interrupted) Error() string { return e.err.Error() }

// Unwrap returns what interrupted it.
func (e *interrupted) Unwrap() error { return e.err }

// hint says how to go on, or that there is no going on.
func (e *interrupted) hint() string {
	state, err := ceremony.ReadStatus(e.out)
	switch {
	case errors.Is(err, ceremony.ErrNotBegun):
		return "nothing was done; begin again with the same command"
	case err != nil:
		return ""
	case state.Ending != "":
		return "the ceremony is over; its records are in " + e.out
	case state.Quarantined != "":
		return fmt.Sprintf("change nothing in the token; end with: chancery-ceremony abort %s --as ID --reason TEXT", e.out)
	case errors.Is(e.err, ceremony.ErrProgram):
		return "go on with the program that began it, or end with: chancery-ceremony abort " + e.out + " --as ID --reason TEXT"
	case errors.Is(e.err, ceremony.ErrEnvironment):
		return fmt.Sprintf("not with this definition; end with: chancery-ceremony abort %s --as ID --reason TEXT", e.out)
	case errors.Is(e.err, ceremony.ErrCustodians):
		return fmt.Sprintf("custodians sign the files in %s; then: chancery-ceremony resume %s%s", filepath.Join(e.out, "custodians"), e.out, e.flags())
	case errors.Is(e.err, ceremony.ErrBundle) && state.Machine == ceremony.Online:
		return fmt.Sprintf("carry this to the other machine: chancery-ceremony export %s BUNDLE; with its answer: chancery-ceremony import %s BUNDLE%s", e.out, e.out, e.flags())
	case errors.Is(e.err, ceremony.ErrBundle):
		return fmt.Sprintf("when the other machine's is here: chancery-ceremony import %s BUNDLE%s", e.out, e.flags())
	case errors.Is(e.err, ceremony.ErrUnfinished):
		return fmt.Sprintf("when a witness has signed: chancery-ceremony sign %s --as ID --signature FILE", e.out)
	}
	return fmt.Sprintf("nothing is lost; go on with: chancery-ceremony resume %s%s", e.out, e.flags())
}

// flags are what the next command needs to go on as this one did.
func (e *interrupted) flags() string {
	flags := ""
	if e.before != "" {
		flags += " --previous " + e.before
	}
	if e.ask {
		flags += " --ask"
	}
	return flags
}

// prepare makes the folder. One that has something in it is refused, unless it
// is what an interruption before the first record leaves.
func (f *runFlags) prepare() error {
	entries, err := os.ReadDir(f.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("open folder: %w", err)
	}
	first, _, _ := strings.Cut(strings.TrimPrefix(filepath.ToSlash(f.out), filepath.ToSlash(f.dir)+"/"), "/")
	_, begun := ceremony.OpenFolder(f.out)
	for _, e := range entries {
		if f.tokens != "" && e.Type() == fs.ModeSymlink { // see borrow
			continue
		}
		if e.Name() != first || !errors.Is(begun, ceremony.ErrNotBegun) {
			return fmt.Errorf("folder %s is not empty: %w", f.dir, ceremony.ErrOutputExists)
		}
	}
	if err := os.MkdirAll(f.dir, 0o755); err != nil {
		return fmt.Errorf("make folder: %w", err)
	}
	return f.borrow()
}

// borrow has a rehearsal use the tokens of an earlier one: their folders, and
// those of their PINs, are linked to, so that resume and import find them.
func (f *runFlags) borrow() error {
	if f.tokens == "" {
		return nil
	}
	for _, name := range []string{tokensFolder, pinsFolder} {
		target, err := filepath.Abs(filepath.Join(f.tokens, name))
		if err != nil {
			return fmt.Errorf("find tokens: %w", err)
		}
		if info, err := os.Stat(target); err != nil || !info.IsDir() {
			return fmt.Errorf("--tokens %s: not the folder of a rehearsal: no %s: %w", f.tokens, name, fs.ErrNotExist)
		}
		link := filepath.Join(f.dir, name)
		if have, err := os.Readlink(link); err == nil && have == target {
			continue
		}
		if err := os.Symlink(target, link); err != nil {
			return fmt.Errorf("use tokens of %s: %w", f.tokens, err)
		}
	}
	return nil
}

func summary(c *console, dir string, def *ceremony.Definition, res *ceremony.Result, took time.Duration) {
	p := &c.printer
	p.line("")
	p.field("Done", fmt.Sprintf("in %s: %d keys, %d certificates, %d files, %d records",
		seconds(took), len(def.Keys), len(res.Certificates), len(res.Files)+1, res.Records))
	for _, name := range slices.Sorted(maps.Keys(res.Certificates)) {
		cert := res.Certificates[name]
		p.field(name, fmt.Sprintf("%s, until %s", cert.Subject.CommonName, cert.NotAfter.Format(time.DateOnly)))
		p.field("", fmt.Sprintf("%x", sha256.Sum256(cert.Raw)))
	}
	p.hash("Last record", res.Head)
	p.field("Files", res.Dir)
	if def.Environment == ceremony.Rehearsal {
		p.field("PINs", filepath.Join(dir, pinsFolder))
	}
	p.field("Check", "chancery-ceremony verify "+res.Dir)
}
