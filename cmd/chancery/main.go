// Command chancery is a private Sigstore in one program: it serves the
// certificate authority, the logs and the timestamp authority, shows them in a
// demo, and signs and verifies files as a client.
//
// Exit status: 0 done; 1 failed; 2 the command line is wrong; 77 a PIN or a key
// was refused, so that a supervisor must not try again.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/chancery-ca/chancery/cmd/chancery/internal/service"
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
		_, _ = fmt.Fprintf(os.Stderr, "chancery: error: %v\n", err)
		os.Exit(exitFailed)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run executes one command line and returns the exit status.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	_, _ = fmt.Fprintf(stderr, "chancery: error: %v\n", err)
	var h *hinted
	if errors.As(err, &h) {
		_, _ = fmt.Fprintf(stderr, "hint: %s\n", h.hint)
	}
	return exitStatus(err)
}

func exitStatus(err error) int {
	var usage *usageError
	switch {
	case errors.As(err, &usage):
		return exitUsage
	case errors.Is(err, hsm.ErrPIN), errors.Is(err, hsm.ErrPolicy), errors.Is(err, hsm.ErrMismatch), errors.Is(err, service.ErrRevoked):
		return exitRefused
	}
	return exitFailed
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "chancery",
		Short: "A private Sigstore in one program, with its keys in hardware",
		Long: "Chancery issues short-lived code-signing certificates for OpenID Connect logins,\n" +
			"keeps a Certificate Transparency log and a signature log, and timestamps; every\n" +
			"private key lives in a PKCS#11 HSM or a TPM 2.0. Start with: chancery demo",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs, // cobra's own complaint is no usage error
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return &usageError{fmt.Errorf("unknown command %q", args[0]), cmd.CommandPath()}
			}
			return cmd.Help()
		},
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		// With a command that does not exist no flag of its is known either.
		if cmd.HasSubCommands() && cmd.Flags().NArg() > 0 {
			err = fmt.Errorf("unknown command %q", cmd.Flags().Arg(0))
		}
		return &usageError{err: err, command: cmd.CommandPath()}
	})
	root.AddCommand(newDemo(), newServe(), newInit(), newConfig(), newSign(), newVerify(), newLog(), newHSM(), newPolicy(), newAudit(), newStatus(), newVersion())
	for _, c := range root.Commands() {
		wrapArgs(c)
	}
	return root
}

// wrapArgs makes every complaint about arguments a usage error.
func wrapArgs(c *cobra.Command) {
	if check := c.Args; check != nil {
		c.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return &usageError{err: err, command: cmd.CommandPath()}
			}
			return nil
		}
	}
	for _, sub := range c.Commands() {
		wrapArgs(sub)
	}
}

// usageError is a wrong command line: exit status 2.
type usageError struct {
	err     error
	command string
}

// Error names the command whose help tells more.
func (e *usageError) Error() string { return fmt.Sprintf("%v (see %s --help)", e.err, e.command) }

// Unwrap returns what is wrong with the command line.
func (e *usageError) Unwrap() error { return e.err }

// hinted is an error with a sentence on what to do about it.
type hinted struct {
	err  error
	hint string
}

// Error is the error without the hint.
func (e *hinted) Error() string { return e.err.Error() }

// Unwrap returns the error that the hint is about.
func (e *hinted) Unwrap() error { return e.err }

// hint adds advice to err; a nil err stays nil.
func hint(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return &hinted{err: err, hint: fmt.Sprintf(format, args...)}
}
