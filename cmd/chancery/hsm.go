package main

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/hsmtool"
	"github.com/chancery-ca/chancery/config"
	"github.com/chancery-ca/chancery/hsm"
)

func newHSM() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "hsm",
		Short: "Look at tokens, test, attest and measure their keys",
		Long: "Look at the tokens of a service, or at one that --uri names, and at their keys.\n" +
			"Nothing is made or changed in a token. A KEY is a role of keys.yaml, such as\n" +
			"intermediate or ct, or a key's URI.\n\n" +
			"All of it works beside a running service, but for bench, which would take the\n" +
			"token's time from it, and but for an emulated TPM, whose socket serves one\n" +
			"program at a time.",
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return &usageError{fmt.Errorf("unknown command %q", args[0]), cmd.CommandPath()}
			}
			return cmd.Help()
		},
	}
	cmd.AddCommand(newHSMInfo(), newHSMList(), newHSMTest(), newHSMAttest(), newHSMVerify(), newHSMBench())
	return cmd
}

// tokenFlags name the tokens that a command works on and how to log in.
type tokenFlags struct {
	config, token, module, uri, pinFile string
	output                              outputFlag
}

func (f *tokenFlags) add(cmd *cobra.Command) {
	addConfigFlag(cmd, &f.config)
	cmd.Flags().StringVar(&f.token, "token", "", "`name` of one token of the configuration (default: all)")
	cmd.Flags().StringVar(&f.uri, "uri", "", "a token without a configuration: `URI`, pkcs11:token=… or tpm2:DIR?device=…")
	cmd.Flags().StringVar(&f.module, "module", "", "PKCS#11 library of --uri, an absolute `path`")
	f.output.add(cmd)
}

// addPIN adds what a login takes.
func (f *tokenFlags) addPIN(cmd *cobra.Command) {
	f.add(cmd)
	cmd.Flags().StringVar(&f.pinFile, "pin-file", "", "`file` of mode 0400 with the PIN, or a TPM's auth value (default: as configured, else asked for)")
}

// places finds the tokens.
func (f *tokenFlags) places(cmd *cobra.Command) (hsmtool.Places, error) {
	if f.uri == "" && f.module == "" {
		cfg, err := loadConfig(f.config)
		if err != nil {
			return hsmtool.Places{}, err
		}
		return hsmtool.Find(cfg, f.token)
	}
	if cmd.Flags().Changed("config") || f.token != "" {
		return hsmtool.Places{}, &usageError{errors.New("--uri and --module are instead of --config and --token"), cmd.CommandPath()}
	}
	if f.uri == "" {
		return hsmtool.Places{}, &usageError{errors.New("--uri is needed to say which token of --module"), cmd.CommandPath()}
	}
	places, err := hsmtool.At(trust.Token{URI: f.uri, Module: f.module}, config.Token{Deadline: 30 * time.Second})
	if err != nil {
		return places, &usageError{err, cmd.CommandPath()}
	}
	return places, nil
}

// open logs in to a place.
func (f *tokenFlags) open(cmd *cobra.Command, place hsmtool.Place) (hsm.Token, error) {
	pin, err := f.pin(cmd, place)
	if err != nil {
		return nil, err
	}
	defer clear(pin)
	return place.Open(cmd.Context(), pin, quiet(cmd))
}

// pin reads the PIN of a place: from --pin-file, from where the configuration
// says, or from the terminal when neither is there.
func (f *tokenFlags) pin(cmd *cobra.Command, place hsmtool.Place) ([]byte, error) {
	if f.pinFile != "" {
		return config.FileSecret(f.pinFile).Read()
	}
	missing := errors.New("no PIN is configured")
	if !place.How.PIN.IsZero() {
		pin, err := place.How.PIN.Read()
		if !errors.Is(err, config.ErrNoCredential) {
			return pin, err
		}
		missing = err
	}
	pin, err := askPIN(cmd.Context(), cmd.InOrStdin(), cmd.ErrOrStderr(), place.Name)
	if errors.Is(err, errNoTerminal) {
		return nil, hint(fmt.Errorf("token %s: %w", place.Name, missing), "name a file that holds it with --pin-file, or run this on a terminal")
	}
	return pin, err
}

// quiet logs what goes wrong in a token, for commands that are over soon.
func quiet(cmd *cobra.Command) *slog.Logger {
	logger, _ := newLogger(cmd.ErrOrStderr(), "warn") // a level that there is
	return logger
}

// errNoTerminal: there is nobody to ask.
var errNoTerminal = errors.New("not a terminal")

// askPIN asks for a PIN on a terminal, without echo, until ctx ends.
func askPIN(ctx context.Context, in io.Reader, out io.Writer, token string) ([]byte, error) {
	f, ok := in.(*os.File)
	if !ok {
		return nil, errNoTerminal
	}
	fd := int(f.Fd())
	if !term.IsTerminal(fd) {
		return nil, errNoTerminal
	}
	before, err := term.GetState(fd)
	if err != nil {
		return nil, fmt.Errorf("ask for PIN: %w", err)
	}
	if _, err := fmt.Fprintf(out, "PIN of token %s: ", hsmtool.Clean(token)); err != nil {
		return nil, err
	}
	type answer struct {
		pin []byte
		err error
	}
	answers := make(chan answer, 1)
	go func() {
		pin, err := term.ReadPassword(fd)
		answers <- answer{pin, err}
	}()
	select {
	case <-ctx.Done():
		return nil, errors.Join(fmt.Errorf("ask for PIN: %w", context.Cause(ctx)), term.Restore(fd, before), line(out))
	case a := <-answers:
		if a.err == nil && len(a.pin) == 0 {
			a.err = errors.New("none was typed")
		}
		if a.err != nil {
			return nil, errors.Join(fmt.Errorf("ask for PIN: %w", a.err), line(out))
		}
		return a.pin, line(out)
	}
}

// outputFlag is --output.
type outputFlag string

func (o *outputFlag) add(cmd *cobra.Command) {
	cmd.Flags().StringVar((*string)(o), "output", "text", "`form` of the output: text or json")
}

func (o outputFlag) check(cmd *cobra.Command) error {
	if o != "text" && o != "json" {
		return &usageError{fmt.Errorf("--output %q: want text or json", string(o)), cmd.CommandPath()}
	}
	return nil
}

// print writes value as JSON, or lets text write it for people.
func (o outputFlag) print(w io.Writer, value any, text func(*printer)) error {
	if o == "json" {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(value)
	}
	p := &printer{w: w}
	text(p)
	return p.err
}

// hsmHint says what usually mends a command on a token that failed.
func hsmHint(err error) error {
	switch {
	case errors.Is(err, hsmtool.ErrServing):
		return hint(err, "stop the service first, or say --while-serving and let its clients wait")
	case errors.Is(err, hsm.ErrPIN):
		return hint(err, "do not try again by guessing: chancery hsm info shows the token's flags without a PIN")
	case errors.Is(err, hsm.ErrMismatch):
		return hint(err, "keys.yaml names another key than the one in the token: chancery hsm list")
	case errors.Is(err, hsmtool.ErrNoKey):
		return hint(err, "chancery hsm list shows the keys")
	case errors.Is(err, hsm.ErrBusy):
		return hint(err, "an emulated TPM serves one program at a time: is the service running?")
	case errors.Is(err, fs.ErrPermission):
		return hint(err, "run it as the service's user")
	case errors.Is(err, fs.ErrExist):
		return hint(err, "nothing is overwritten; name a new folder")
	}
	return err
}

func newHSMInfo() *cobra.Command {
	var f tokenFlags
	cmd := &cobra.Command{
		Use:   "info [--config FILE | --module PATH [--uri URI] | --uri URI]",
		Short: "Show what tokens say of themselves, without a PIN",
		Long: "Show each token's slot, library, firmware, flags and mechanisms. No PIN is asked\n" +
			"for or sent, so it also shows a token that refuses one. --module without --uri\n" +
			"shows every token of a library. What a token says is its own word.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.output.check(cmd); err != nil {
				return err
			}
			list, err := f.infos(cmd)
			if err != nil && len(list) == 0 {
				return hsmHint(err)
			}
			printed := f.output.print(cmd.OutOrStdout(), list, func(p *printer) { p.infos(list) })
			return errors.Join(hsmHint(err), printed)
		},
	}
	f.add(cmd)
	return cmd
}

// infos looks at every token that it can; the errors are of the others.
func (f *tokenFlags) infos(cmd *cobra.Command) ([]hsmtool.Info, error) {
	if f.module != "" && f.uri == "" && f.token == "" && !cmd.Flags().Changed("config") {
		return hsmtool.Module(cmd.Context(), f.module)
	}
	places, err := f.places(cmd)
	if err != nil {
		return nil, err
	}
	list := []hsmtool.Info{}
	var errs []error
	for _, place := range places.Tokens {
		info, err := place.Info(cmd.Context())
		if errs = append(errs, err); err == nil {
			list = append(list, info)
		}
	}
	return list, errors.Join(errs...)
}

func newHSMList() *cobra.Command {
	var f tokenFlags
	cmd := &cobra.Command{
		Use:   "list [--config FILE | --module PATH --uri URI]",
		Short: "List the keys in tokens, their roles and policy",
		Long: "List every private key of each token with its label, id, algorithm, public key\n" +
			"hash, role (by keys.yaml), evidence level, and whether its attributes keep the\n" +
			"policy of its role. The exit status is 77 if a key breaks the policy of its role,\n" +
			"and 1 if the key of a role is missing.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.output.check(cmd); err != nil {
				return err
			}
			places, err := f.places(cmd)
			if err != nil {
				return err
			}
			list := []hsmtool.Contents{}
			var errs []error
			for _, place := range places.Tokens {
				c, err := f.contents(cmd, places, place)
				if err != nil {
					return hsmHint(err)
				}
				list = append(list, c)
				errs = append(errs, c.Err())
			}
			printed := f.output.print(cmd.OutOrStdout(), list, func(p *printer) { p.contents(list) })
			return errors.Join(append(errs, printed)...)
		},
	}
	f.addPIN(cmd)
	return cmd
}

func (f *tokenFlags) contents(cmd *cobra.Command, places hsmtool.Places, place hsmtool.Place) (c hsmtool.Contents, err error) {
	token, err := f.open(cmd, place)
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, token.Close()) }()
	return places.List(cmd.Context(), place, token)
}

// withKey opens the key that a command's argument names for as long as do runs.
func (f *tokenFlags) withKey(cmd *cobra.Command, reference string, do func(hsmtool.Target, hsm.Token, hsm.Key) error) (err error) {
	places, err := f.places(cmd)
	if err != nil {
		return err
	}
	target, err := places.Target(reference)
	if err != nil {
		return hsmHint(err)
	}
	pin, err := f.pin(cmd, target.Place)
	if err != nil {
		return err
	}
	token, key, err := target.Open(cmd.Context(), pin, quiet(cmd))
	clear(pin)
	if err != nil {
		return hsmHint(err)
	}
	defer func() { err = errors.Join(err, token.Close()) }()
	return hsmHint(do(target, token, key))
}

func newHSMTest() *cobra.Command {
	var f tokenFlags
	var duration time.Duration
	cmd := &cobra.Command{
		Use:   "test KEY",
		Short: "Have a key sign, check its signatures and its randomness",
		Long: "Open the key under the policy of its role, have it sign a text that names it, and\n" +
			"then one digest 64 times: no two of the signatures may have the same r. Then sign\n" +
			"for a short while, one signature after the other, and show rate and latency. Every\n" +
			"signature is verified.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.output.check(cmd); err != nil {
				return err
			}
			if err := hsmtool.CheckBounds(1, duration); err != nil {
				return &usageError{err, cmd.CommandPath()}
			}
			return f.withKey(cmd, args[0], func(target hsmtool.Target, _ hsm.Token, key hsm.Key) error {
				r, err := target.Test(cmd.Context(), key, time.Now(), duration)
				if err != nil {
					return err
				}
				return f.output.print(cmd.OutOrStdout(), r, func(p *printer) { p.tested(r) })
			})
		},
	}
	f.addPIN(cmd)
	cmd.Flags().DurationVar(&duration, "duration", time.Second, "`time` for which rate and latency are measured")
	return cmd
}

func newHSMAttest() *cobra.Command {
	var f tokenFlags
	var nonce, out string
	cmd := &cobra.Command{
		Use:   "attest KEY",
		Short: "Write down the evidence of a key",
		Long: "Read every attribute of the key, have it sign a text that names it and the time,\n" +
			"and, where the device can (a TPM), have the device sign a statement about it. The\n" +
			"result is JSON; --out writes it into a new folder, which chancery hsm verify checks\n" +
			"without the device.\n\n" +
			"--nonce binds the device's statement to your occasion, for example the hash of a\n" +
			"ceremony's transcript; without one it is bound to the signed text.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			octets, err := parseNonce(cmd, nonce)
			if err != nil {
				return err
			}
			if _, err := os.Lstat(out); out != "" && err == nil {
				return hsmHint(fmt.Errorf("--out %s: %w", out, fs.ErrExist)) // before the key signs
			}
			return f.withKey(cmd, args[0], func(_ hsmtool.Target, token hsm.Token, key hsm.Key) error {
				a, err := hsmtool.Attest(cmd.Context(), token, key, octets)
				if err != nil {
					return err
				}
				if out == "" {
					return outputFlag("json").print(cmd.OutOrStdout(), a, nil)
				}
				if err := a.Write(out); err != nil {
					return err
				}
				p := &printer{w: cmd.OutOrStdout()}
				p.attested(a, out)
				return p.err
			})
		},
	}
	f.addPIN(cmd)
	_ = cmd.Flags().MarkHidden("output") // it is JSON, or a folder
	cmd.Flags().StringVar(&nonce, "nonce", "", "16 to 64 octets in `hexadecimal` for the device's statement")
	cmd.Flags().StringVar(&out, "out", "", "new `folder` for evidence.json and attestation.json")
	return cmd
}

func parseNonce(cmd *cobra.Command, text string) ([]byte, error) {
	if text == "" && !cmd.Flags().Changed("nonce") {
		return nil, nil
	}
	nonce, err := hsmtool.ParseNonce(text)
	if err != nil {
		return nil, &usageError{fmt.Errorf("--nonce: %w", err), cmd.CommandPath()}
	}
	return nonce, nil
}

func newHSMVerify() *cobra.Command {
	var nonce, spki, role, roots string
	var output outputFlag
	cmd := &cobra.Command{
		Use:   "verify DIR",
		Short: "Check the evidence that attest wrote, without the device",
		Long: "Check that the files of DIR fit together: the public key and its hash, the signed\n" +
			"text, the attributes and the policy, the evidence level, and the device's statement\n" +
			"if there is one. What a PKCS#11 module says of attributes stays its own word; a\n" +
			"TPM's statement is as good as the manufacturer's certificates in --roots.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := output.check(cmd); err != nil {
				return err
			}
			want, err := expect(cmd, nonce, spki, role, roots)
			if err != nil {
				return err
			}
			a, err := hsmtool.Read(args[0])
			if err != nil {
				return err
			}
			found, err := a.Verify(want)
			printed := output.print(cmd.OutOrStdout(), found, func(p *printer) { p.findings(found) })
			return errors.Join(err, printed)
		},
	}
	output.add(cmd)
	cmd.Flags().StringVar(&nonce, "nonce", "", "that the statement must have, in `hexadecimal` (default: of the signed text)")
	cmd.Flags().StringVar(&spki, "spki", "", "`hash` of the public key that is meant, 64 hexadecimal digits")
	cmd.Flags().StringVar(&role, "role", "", "`role` whose policy the attributes must keep")
	cmd.Flags().StringVar(&roots, "roots", "", "PEM `file` of TPM manufacturers' root certificates")
	return cmd
}

// expect reads what the flags of hsm verify say.
func expect(cmd *cobra.Command, nonce, spki, role, roots string) (want hsmtool.Expect, err error) {
	want.Role = hsm.Role(role)
	if want.Nonce, err = parseNonce(cmd, nonce); err != nil {
		return want, err
	}
	if role != "" && !isRole(want.Role) {
		return want, &usageError{fmt.Errorf("--role %.40q: want one of %v", role, trust.Roles()), cmd.CommandPath()}
	}
	if spki != "" {
		hash, err := hsm.ParseSPKIHash(spki)
		if err != nil {
			return want, &usageError{fmt.Errorf("--spki: %w", err), cmd.CommandPath()}
		}
		want.SPKI = &hash
	}
	if roots == "" {
		return want, nil
	}
	raw, err := os.ReadFile(roots)
	if err != nil {
		return want, fmt.Errorf("read --roots: %w", err)
	}
	if want.Roots = x509.NewCertPool(); !want.Roots.AppendCertsFromPEM(raw) {
		return want, fmt.Errorf("read --roots %s: no certificate in it", roots)
	}
	return want, nil
}

func isRole(role hsm.Role) bool {
	for _, r := range trust.Roles() {
		if r == role {
			return true
		}
	}
	return false
}

func newHSMBench() *cobra.Command {
	var f tokenFlags
	var parallel int
	var duration time.Duration
	var serving bool
	cmd := &cobra.Command{
		Use:   "bench KEY",
		Short: "Measure how fast a key signs for 1, 2, 4 … callers at once",
		Long: "Let 1, 2, 4 … and --parallel callers sign with the key, each waiting for its\n" +
			"signature before it asks for the next, and show rate and latency, and the rate\n" +
			"against that of one caller. Every signature is verified, as it is for the service.\n\n" +
			"It takes the token's time, so it refuses to run beside the service of the\n" +
			"configuration, and keeps it from starting meanwhile.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.output.check(cmd); err != nil {
				return err
			}
			if err := hsmtool.CheckBounds(parallel, duration); err != nil {
				return &usageError{err, cmd.CommandPath()}
			}
			return f.bench(cmd, args[0], parallel, duration, serving)
		},
	}
	f.addPIN(cmd)
	cmd.Flags().IntVar(&parallel, "parallel", 16, "most `callers` at once, 1 to 1024")
	cmd.Flags().DurationVar(&duration, "duration", 10*time.Second, "`time` that all of it takes, at most 1h")
	cmd.Flags().BoolVar(&serving, "while-serving", false, "run beside the service all the same")
	return cmd
}

func (f *tokenFlags) bench(cmd *cobra.Command, reference string, parallel int, duration time.Duration, serving bool) (err error) {
	if f.uri == "" && f.module == "" && !serving {
		cfg, err := loadConfig(f.config)
		if err != nil {
			return err
		}
		release, err := hsmtool.Reserve(cfg)
		if err != nil {
			return hsmHint(err)
		}
		defer func() { err = errors.Join(err, release()) }()
	}
	return f.withKey(cmd, reference, func(target hsmtool.Target, _ hsm.Token, key hsm.Key) error {
		meter := newMeter(cmd.ErrOrStderr())
		defer meter.close()
		b, err := target.Bench(cmd.Context(), key, parallel, duration, meter.watch)
		meter.close()
		if err != nil {
			return err
		}
		return f.output.print(cmd.OutOrStdout(), b, func(p *printer) { p.benched(b) })
	})
}

// meter shows on a terminal how many signatures a measurement has made. Its
// methods are for one goroutine; what watch returns is for any.
type meter struct {
	w     io.Writer // nil: nothing is shown
	count atomic.Int64
	clear func() // takes the line off the screen; nil if there is none
}

// newMeter shows nothing on what is not a terminal.
func newMeter(w io.Writer) *meter {
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return &meter{w: w}
	}
	return &meter{}
}

// watch begins the count for a number of callers.
func (m *meter) watch(parallel int) func() {
	m.close()
	m.count.Store(0)
	if m.w != nil {
		stop, stopped := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(stopped)
			m.show(parallel, stop)
		}()
		m.clear = func() { close(stop); <-stopped }
	}
	return func() { m.count.Add(1) }
}

func (m *meter) show(parallel int, stop chan struct{}) {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			_, _ = fmt.Fprintf(m.w, "\r%s\r", strings.Repeat(" ", 40))
			return
		case <-tick.C:
			_, _ = fmt.Fprintf(m.w, "\r%5d at once: %9d signatures", parallel, m.count.Load())
		}
	}
}

// close ends the display. It may be called twice.
func (m *meter) close() {
	if m.clear != nil {
		m.clear()
		m.clear = nil
	}
}
