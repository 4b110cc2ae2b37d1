// Command chancery-ceremony is the offline tool that makes a Chancery's keys
// and certificates and the files that clients and the service need, and that
// checks them afterwards.
//
// It listens on nothing and calls nobody. Everything that it does is in the
// transcript. PINs are typed at a terminal without echo or read from files of
// mode 0400; they are in no argument, variable, output or record.
//
// plan, verify, status, sign and abort need no token; rehearse makes its own;
// run and resume use those of the definition, and so does import, which goes on
// with what another machine has exported.
//
// Exit status: 0 done; 1 failed; 2 the command line is wrong; 77 a PIN or a
// key's policy was refused, so that nothing must try again by itself.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/chancery-ca/chancery/ceremony"
	"github.com/chancery-ca/chancery/ceremony/bundle"
	"github.com/chancery-ca/chancery/cmd/internal/memory"
	"github.com/chancery-ca/chancery/hsm"
)

// The exit statuses.
const (
	exitFailed  = 1
	exitUsage   = 2
	exitRefused = 77
)

func main() {
	if err := memory.Seal(); err != nil {
		_, _ = fmt.Fprintf(os.Stderr, "chancery-ceremony: error: %v\n", err)
		os.Exit(exitFailed)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal kills
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run executes one command line and returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	text := strings.ReplaceAll(clean(err.Error()), context.Canceled.Error(), "interrupted")
	fmt.Fprintf(stderr, "chancery-ceremony: error: %s\n", text)
	if hint := hintFor(err); hint != "" {
		fmt.Fprintf(stderr, "hint: %s\n", clean(hint))
	}
	return exitStatus(err)
}

// usageError is a wrong command line.
type usageError struct{ err error }

// Error is that of the error inside.
func (e usageError) Error() string { return e.err.Error() }

// Unwrap returns the error inside.
func (e usageError) Unwrap() error { return e.err }

func exitStatus(err error) int {
	var usage usageError
	switch {
	case errors.As(err, &usage):
		return exitUsage
	case errors.Is(err, hsm.ErrPIN), errors.Is(err, hsm.ErrPolicy):
		return exitRefused
	}
	return exitFailed
}

// hintFor says what a person can do about err, or "".
func hintFor(err error) string {
	var usage usageError
	var begun *interrupted
	if errors.As(err, &begun) {
		if hint := begun.hint(); hint != "" {
			return hint
		}
	}
	for _, h := range []struct {
		is   bool
		hint string
	}{
		{errors.As(err, &usage), "chancery-ceremony --help"},
		{errors.Is(err, errNoModule), "install SoftHSM (Debian: apt install softhsm2)"},
		{errors.Is(err, errNoCgo), "use the program that was built with cgo; this one plans and verifies"},
		{errors.Is(err, errNoTranscript), "name the output folder itself, for example DIR/out"},
		{errors.Is(err, ceremony.ErrNotInVersion), "take it out of the definition to rehearse the rest"},
		{errors.Is(err, ceremony.ErrEnvironment), "production definitions are run, all others rehearsed"},
		{errors.Is(err, errNoTerminal), "run it in a terminal; a rehearsal can do without"},
		{errors.Is(err, errInForce), "--previous N.root.json, from tuf/ of the outputs before"},
		{errors.Is(err, errPINFile), "chmod 400, and no one else's file"},
		{errors.Is(err, ceremony.ErrWindow), "check the clock against two watches, then the definition's window"},
		{errors.Is(err, ceremony.ErrDefinition), "config/example/genesis.yaml explains every field"},
		{errors.Is(err, bundle.ErrOther), "look at the label of the stick, and at the words on the other screen"},
		{errors.Is(err, ceremony.ErrPrevious), "--previous DIR: the outputs of the ceremony that the definition names, as they were"},
		{errors.Is(err, ceremony.ErrOutputExists), "choose another --dir, or go on with: chancery-ceremony resume OUTPUTS"},
		{errors.Is(err, ceremony.ErrVerify), "do not use these files; compare with another copy"},
	} {
		if h.is {
			return h.hint
		}
	}
	return ""
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "chancery-ceremony",
		Short: "Make the keys and certificates of a Chancery, and check them",
		Long: `chancery-ceremony makes the keys and certificates of a Chancery from one
definition, writes a transcript of everything it does, and checks the result.
It needs no network.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetUsageTemplate(strings.ReplaceAll(root.UsageTemplate(), ".FlagUsages", fmt.Sprintf(".FlagUsagesWrapped %d", width)))
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(newPlan(), newRehearse(), newRun(), newStatus(), newResume(), newSign(), newAbort(), newCustodian(), newVerify(), newExport(), newImport(), newLockout())
	for _, c := range append(root.Commands(), root) {
		args := c.Args
		c.Args = func(cmd *cobra.Command, given []string) error {
			if err := args(cmd, given); err != nil {
				return usageError{err}
			}
			return nil
		}
	}
	return root
}

// clock is the machine's, in UTC, without Go's monotonic reading: a transcript
// has wall time.
func clock() (time.Time, error) { return time.Now().UTC().Round(0), nil }

// readDefinition reads and validates the file at path.
func readDefinition(path string) (*ceremony.Definition, error) {
	source, err := readFile(path, ceremony.MaxDefinition)
	if err != nil {
		return nil, fmt.Errorf("read definition: %w", err)
	}
	return ceremony.ParseDefinition(source)
}

// readFile reads at most one octet more than limit.
func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit+1))
}
