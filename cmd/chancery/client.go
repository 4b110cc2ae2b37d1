package main

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/chancery-ca/chancery/cmd/chancery/internal/client"
)

// maxToken bounds an ID token, in octets: what the server accepts.
const maxToken = 16 << 10

// trustFlags are the flags by which sign and verify know a Chancery.
type trustFlags struct {
	dir   string
	trust client.Trust
}

func (f *trustFlags) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.dir, "trust", "", "`folder` with trusted_root.json, signing_config.v0.2.json and, for a private TLS authority, tls-ca.pem")
	flags.StringVar(&f.trust.TrustedRoot, "trusted-root", "", "trusted root `file` (default: the one in --trust)")
}

// files returns the files to use: those named, else those in the folder.
func (f *trustFlags) files() (client.Trust, error) {
	t := f.trust
	if f.dir == "" && t.TrustedRoot == "" {
		return t, &usageError{errors.New("--trust or --trusted-root is needed"), "chancery"}
	}
	if f.dir == "" {
		return t, nil
	}
	for path, name := range map[*string]string{
		&t.TrustedRoot: "trusted_root.json", &t.SigningConfig: "signing_config.v0.2.json",
	} {
		if *path == "" {
			*path = filepath.Join(f.dir, name)
		}
	}
	if t.TLSCA == "" {
		if path := filepath.Join(f.dir, "tls-ca.pem"); exists(path) {
			t.TLSCA = path
		}
	}
	return t, nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func newSign() *cobra.Command {
	var f trustFlags
	var out, tokenFile string
	cmd := &cobra.Command{
		Use:   "sign FILE",
		Short: "Sign a file and write a Sigstore bundle",
		Long: "Sign a file with a throw-away key: the CA certifies it for the holder of the\n" +
			"OpenID Connect token, the timestamp authority fixes the time, the log records\n" +
			"the signature. The result is a Sigstore bundle that any client verifies.\n\n" +
			"The token comes from --token FILE, from the variable SIGSTORE_ID_TOKEN, or from\n" +
			"a login in the browser (without a terminal: by the device flow).",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			trust, err := f.files()
			if err != nil {
				return err
			}
			if trust.SigningConfig == "" {
				return &usageError{errors.New("--trust or --signing-config is needed"), cmd.CommandPath()}
			}
			if out == "" {
				out = args[0] + ".sigstore.json"
			}
			if exists(out) {
				return hint(fmt.Errorf("bundle %s exists already", out), "choose another name with --bundle; nothing is overwritten")
			}
			token, err := idToken(cmd, tokenFile, trust)
			if err != nil {
				return err
			}
			if !looksLikeToken(token) {
				return errors.New("read token: this is no ID token (a JWT, three parts with dots between)")
			}
			bundle, err := client.Sign(cmd.Context(), args[0], token, trust)
			if err != nil {
				return clientHint(err)
			}
			if err := writeNew(out, append(bundle, '\n')); err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "signed    %s\nbundle    %s\n", args[0], out)
			return err
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&f.trust.SigningConfig, "signing-config", "", "signing configuration `file` (default: the one in --trust)")
	cmd.Flags().StringVar(&f.trust.TLSCA, "tls-ca", "", "PEM `file` with the authority of the servers' TLS certificates (default: the one in --trust, else the system's)")
	cmd.Flags().StringVar(&tokenFile, "token", "", "`file` with the OpenID Connect token, - for standard input")
	cmd.Flags().StringVar(&out, "bundle", "", "bundle `file` to write (default FILE.sigstore.json)")
	return cmd
}

func newVerify() *cobra.Command {
	var f trustFlags
	var policy client.Policy
	var bundle string
	cmd := &cobra.Command{
		Use:   "verify FILE",
		Short: "Verify a file against its Sigstore bundle, offline",
		Long: "Verify that FILE is what was signed, by whom, and that the certificate, the\n" +
			"signature and the time are in the logs and authorities of the trusted root.\n" +
			"The signer that you expect must be stated; nothing is fetched.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			trust, err := f.files()
			if err != nil {
				return err
			}
			if policy.Identity == "" && policy.IdentityRegexp == "" || policy.Issuer == "" && policy.IssuerRegexp == "" {
				return &usageError{errors.New("say who must have signed: --certificate-identity and --certificate-oidc-issuer"), cmd.CommandPath()}
			}
			if bundle == "" {
				bundle = args[0] + ".sigstore.json"
			}
			result, err := client.Verify(args[0], bundle, trust, policy)
			if err != nil {
				return fmt.Errorf("not verified: %w", err)
			}
			return report(cmd.OutOrStdout(), args[0], result)
		},
	}
	f.add(cmd)
	flags := cmd.Flags()
	flags.StringVar(&bundle, "bundle", "", "bundle `file` (default FILE.sigstore.json)")
	flags.StringVar(&policy.Identity, "certificate-identity", "", "the signer, for example an e-mail `address`")
	flags.StringVar(&policy.IdentityRegexp, "certificate-identity-regexp", "", "a regular `expression` that the signer matches")
	flags.StringVar(&policy.Issuer, "certificate-oidc-issuer", "", "the OpenID Connect issuer, a `URL`")
	flags.StringVar(&policy.IssuerRegexp, "certificate-oidc-issuer-regexp", "", "a regular `expression` that the issuer matches")
	return cmd
}

// idToken finds the OpenID Connect token. It is never an argument: arguments
// are visible to every user of the machine.
func idToken(cmd *cobra.Command, file string, trust client.Trust) (string, error) {
	switch env := os.Getenv("SIGSTORE_ID_TOKEN"); {
	case file == "-":
		return readToken(cmd.InOrStdin())
	case file != "":
		f, err := os.Open(file)
		if err != nil {
			return "", fmt.Errorf("open token: %w", err)
		}
		defer f.Close()
		return readToken(f)
	case env != "":
		return readToken(strings.NewReader(env))
	}
	return client.Login(cmd.Context(), trust, cmd.InOrStdin(), cmd.ErrOrStderr())
}

func readToken(r io.Reader) (string, error) {
	raw, err := io.ReadAll(io.LimitReader(r, maxToken+1))
	if err != nil {
		return "", fmt.Errorf("read token: %w", err)
	}
	token := strings.TrimSpace(string(raw))
	if token == "" || len(raw) > maxToken {
		return "", fmt.Errorf("read token: empty, or over %d octets", maxToken)
	}
	return token, nil
}

// looksLikeToken says whether text has the form of an ID token. What is in it,
// the service judges.
func looksLikeToken(text string) bool {
	parts := strings.Split(text, ".")
	if len(parts) != 3 {
		return false
	}
	for _, part := range parts[:2] {
		raw, err := base64.RawURLEncoding.DecodeString(part)
		if err != nil || !json.Valid(raw) {
			return false
		}
	}
	return true
}

// clientHint says what usually mends a request that did not reach its service.
func clientHint(err error) error {
	var unknown x509.UnknownAuthorityError
	switch {
	case errors.As(err, &unknown):
		return hint(err, "name the PEM file of the authority of the service's TLS certificate with --tls-ca")
	case errors.Is(err, syscall.ECONNREFUSED):
		return hint(err, "is the service running?")
	}
	return err
}

// writeNew writes a file that must not exist, whole or not at all.
func writeNew(path string, data []byte) error {
	if exists(path) {
		return fmt.Errorf("write %s: it exists already", path)
	}
	if err := renameio.WriteFile(path, data, 0o644); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
