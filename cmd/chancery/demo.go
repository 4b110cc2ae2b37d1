package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/chancery-ca/chancery/cmd/chancery/internal/client"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/demo"
	"github.com/chancery-ca/chancery/hsm/softhsm"
)

func newDemo() *cobra.Command {
	var dir, listen, level string
	var once bool
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Run everything on one folder, sign a file and verify it",
		Long: "Make SoftHSM tokens, rehearse the key ceremony on them, start the service and\n" +
			"an identity provider that approves one user, sign a file as a client would, and\n" +
			"verify it. The folder is kept: the next demo opens it again, with the same keys\n" +
			"and logs. Everything listens on 127.0.0.1. It is for trying out, not for use.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger, err := newLogger(cmd.ErrOrStderr(), level)
			if err != nil {
				return &usageError{err, cmd.CommandPath()}
			}
			return runDemo(cmd.Context(), cmd.OutOrStdout(), demo.Options{Dir: dir, Listen: listen, Logger: logger}, once)
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "chancery-demo", "`folder` of the demo; made if it is missing")
	cmd.Flags().StringVar(&listen, "listen", "", "`address` of the service, 127.0.0.1:PORT (default: as last time, else a free port)")
	cmd.Flags().BoolVar(&once, "once", false, "stop after the verification")
	cmd.Flags().StringVar(&level, "log-level", "warn", "least `level` to log: debug, info, warn, error")
	return cmd
}

func runDemo(ctx context.Context, out io.Writer, opts demo.Options, once bool) (err error) {
	widen()
	tuneMemory(ctx, opts.Logger)
	p := &printer{w: out}
	opts.Step = p.step
	opts.Logger = opts.Logger.With(slog.String("part", "demo"))
	d, err := demo.Start(ctx, opts)
	if err != nil {
		return demoHint(err)
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if err := signAndVerify(ctx, d, p); err != nil {
		return err
	}
	p.explain(d, once)
	if p.err != nil || once {
		return p.err
	}
	return d.Wait(ctx)
}

func demoHint(err error) error {
	switch {
	case errors.Is(err, softhsm.ErrNotInstalled):
		return hint(err, "install it with: make deps")
	case errors.Is(err, demo.ErrIncomplete):
		return hint(err, "name another folder with --dir, or remove this one")
	case errors.Is(err, syscall.EADDRINUSE):
		return hint(err, "is this demo running already? stop it first, or try in another folder: --dir FOLDER")
	}
	return startHint(err)
}

// signAndVerify does what a developer and a user of the software would do.
func signAndVerify(ctx context.Context, d *demo.Demo, p *printer) error {
	file := filepath.Join(d.Dir(), "hello.txt")
	bundle := file + ".sigstore.json"
	token, err := d.Token()
	if err != nil {
		return err
	}
	began := time.Now()
	signed, err := client.Sign(ctx, file, token, d.Trust())
	if err != nil {
		return err
	}
	if err := os.WriteFile(bundle, append(signed, '\n'), 0o644); err != nil {
		return fmt.Errorf("write bundle: %w", err)
	}
	p.step("signed", "hello.txt -> hello.txt.sigstore.json", time.Since(began))
	began = time.Now()
	result, err := client.Verify(file, bundle, d.Trust(), client.Policy{Identity: demo.Email, Issuer: d.Issuer()})
	if err != nil {
		return fmt.Errorf("not verified: %w", err)
	}
	p.step("verified", "signer "+result.Signature.Certificate.SubjectAlternativeName, time.Since(began))
	return nil
}

// printer writes the demo's few lines and keeps the first error.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) printf(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format, args...)
	}
}

func (p *printer) step(name, what string, took time.Duration) {
	line := fmt.Sprintf("  %-10s %-56s", name, what)
	if took > 0 {
		line += fmt.Sprintf(" %6d ms", took.Milliseconds())
	}
	p.printf("%s\n", strings.TrimRight(line, " "))
}

func (p *printer) explain(d *demo.Demo, once bool) {
	p.printf("\nAll of it is in %s\n", d.Dir())
	if once {
		p.printf("Keep it running with: %s demo --dir %s\n", quote(os.Args[0]), quote(d.Dir()))
	}
	p.printf(`
With the demo running, cosign 3 signs and verifies against it:

  cd %s
  export SSL_CERT_FILE=$PWD/tls-ca.pem
  cosign sign-blob --signing-config signing_config.v0.2.json \
    --trusted-root trusted_root.json --identity-token token \
    --bundle my.sigstore.json --yes hello.txt
  cosign verify-blob --trusted-root trusted_root.json \
    --certificate-identity %s \
    --certificate-oidc-issuer %s \
    --bundle my.sigstore.json hello.txt
`, quote(d.Dir()), demo.Email, d.Issuer())
	if mirror, root, ok := d.TUF(); ok {
		p.printf(`
or is told once whom to follow, by TUF, and then needs no file:

  export TUF_ROOT=$PWD/cosign
  cosign initialize --mirror %s --root %s
  cosign sign-blob --identity-token token --bundle my.sigstore.json --yes hello.txt
  cosign verify-blob --certificate-identity %s \
    --certificate-oidc-issuer %s \
    --bundle my.sigstore.json hello.txt
`, mirror, root, demo.Email, d.Issuer())
	}
	if !once {
		p.printf("\nThe token is renewed while the demo runs. Stop with Ctrl-C.\n")
	}
}

// quote makes a path safe to paste into a shell.
func quote(path string) string {
	if strings.ContainsAny(path, " \t\n'\"$`\\!*?[]{}()<>|&;#~") {
		return "'" + strings.ReplaceAll(path, "'", `'\''`) + "'"
	}
	return path
}
