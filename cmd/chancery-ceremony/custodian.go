package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/chancery-ca/chancery/ceremony/durable"
	"github.com/chancery-ca/chancery/ceremony/trust/tuf"
	"github.com/chancery-ca/chancery/hsm"
)

var (
	errDrafts    = errors.New("not a folder of drafts")
	errCustodian = errors.New("the token has no key that may sign this")
	errInForce   = errors.New("the root in force is needed")
)

func newCustodian() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "custodian",
		Short: "What a custodian of the TUF repository does with their own token",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newCustodianKey(), newCustodianSign())
	for _, c := range cmd.Commands() {
		args := c.Args
		c.Args = func(cmd *cobra.Command, given []string) error {
			if err := args(cmd, given); err != nil {
				return usageError{err}
			}
			return nil
		}
	}
	return cmd
}

// custodianFlags say which token, and where the result goes.
type custodianFlags struct{ module, uri, pinFile, out string }

func (f *custodianFlags) register(cmd *cobra.Command, uri string) {
	cmd.Flags().StringVar(&f.module, "module", "", "PKCS#11 library of the token")
	cmd.Flags().StringVar(&f.uri, "uri", "", uri)
	cmd.Flags().StringVar(&f.pinFile, "pin-file", "", "file with the PIN (mode 0400); else it is asked for")
	cmd.Flags().StringVar(&f.out, "out", "", "file to write; it must not exist")
}

// open logs in to the token.
func (f *custodianFlags) open(ctx context.Context, c *console) (hsm.Token, error) {
	if !filepath.IsAbs(f.module) || !strings.HasPrefix(f.uri, "pkcs11:") || f.out == "" {
		return nil, usageError{errors.New("want --module (an absolute path), --uri (pkcs11:…) and --out")}
	}
	pin, err := f.pin(ctx, c)
	if err != nil {
		return nil, err
	}
	defer clear(pin)
	return openPKCS11(ctx, f.module, f.tokenURI(), pin)
}

func (f *custodianFlags) pin(ctx context.Context, c *console) ([]byte, error) {
	if f.pinFile != "" {
		return readPINFile(f.pinFile)
	}
	pin, err := c.secretOf(ctx, "PIN of your token")
	if err != nil {
		return nil, fmt.Errorf("ask for the PIN: %w", err)
	}
	return pin, nil
}

// tokenURI is the part of a key's URI that names the token (RFC 7512, 2.3).
func (f *custodianFlags) tokenURI() string {
	var parts []string
	for _, part := range strings.Split(strings.TrimPrefix(f.uri, "pkcs11:"), ";") {
		switch name, _, _ := strings.Cut(part, "="); name {
		case "token", "serial", "manufacturer", "model":
			parts = append(parts, part)
		}
	}
	return "pkcs11:" + strings.Join(parts, ";")
}

// write makes a new file.
func (f *custodianFlags) write(content []byte) error {
	err := durable.Create(f.out, content, 0o644)
	if err == nil {
		err = durable.SyncFolder(filepath.Dir(f.out))
	}
	if err != nil {
		return fmt.Errorf("write result: %w", err)
	}
	return nil
}

func newCustodianKey() *cobra.Command {
	var f custodianFlags
	var label string
	cmd := &cobra.Command{
		Use:   "key --module LIBRARY --uri TOKEN --label LABEL --out FILE.pem",
		Short: "Make your key in your token, before the ceremony",
		Long: `key makes a P-256 key that never leaves the token, writes its public key to a
file, and prints what the ceremony's definition says of it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			c := consoleOf(cmd)
			tok, err := f.open(cmd.Context(), c)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, tok.Close()) }()
			id := make([]byte, hsm.IDSize)
			_, _ = rand.Read(id) // never fails
			key, err := tok.Generate(cmd.Context(), hsm.Spec{Label: label, ID: id, Algorithm: hsm.ECDSAP256})
			if err != nil {
				return err
			}
			der, err := x509.MarshalPKIXPublicKey(key.Public())
			if err != nil {
				return fmt.Errorf("encode public key: %w", err)
			}
			if err := f.write(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})); err != nil {
				return err
			}
			c.line("key: %q", key.Ref().URI)
			c.line("spki-sha256: %q", fmt.Sprintf("%x", key.Ref().SPKI))
			c.hash("SPKI", key.Ref().SPKI)
			return c.err
		},
	}
	f.register(cmd, "the token: pkcs11:token=LABEL;serial=…")
	cmd.Flags().StringVar(&label, "label", "tuf", "label of the new key")
	return cmd
}

func newCustodianSign() *cobra.Command {
	var f custodianFlags
	var previous string
	cmd := &cobra.Command{
		Use:   "sign FOLDER --module LIBRARY --uri KEY --out FILE",
		Short: "Sign the drafts of the TUF root and targets",
		Long: `sign shows what the drafts in FOLDER (of the ceremony's outputs: custodians/)
say, and signs them with your key. Compare the words of both with those that are
read aloud before you type your PIN. The file with your signatures goes back to
the ceremony.

A root that follows another needs --previous, the root in force (tuf/N.root.json
of the outputs before, or the one that your clients have): enough of its
custodians and enough of the new must sign. If your key is in the old one alone
you leave: it signs the new root for the last time, and nothing else.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			d, err := readDrafts(args[0], previous)
			if err != nil {
				return err
			}
			c := consoleOf(cmd)
			d.show(&c.printer)
			tok, err := f.open(cmd.Context(), c)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, tok.Close()) }()
			key, err := d.key(cmd.Context(), tok, f.uri)
			if err != nil {
				return err
			}
			part, what := d.part(key.Public())
			c.field("Your key", what)
			content, err := sign(cmd.Context(), key, part)
			if err != nil {
				return err
			}
			if err := f.write(content); err != nil {
				return err
			}
			c.field("Signed", f.out)
			return c.err
		},
	}
	f.register(cmd, "your key: pkcs11:token=…;object=…")
	cmd.Flags().StringVar(&previous, "previous", "", "the root that is in force, if there is one (N.root.json)")
	return cmd
}

// drafts are what a custodian signs.
type drafts struct {
	next          *tuf.Root // what root says
	inForce       *tuf.Root // the root before it, or nil
	root, targets *tuf.Draft
}

// readDrafts reads the one root and the one targets file of a folder, and the
// root in force if there is one.
func readDrafts(folder, previous string) (*drafts, error) {
	rootData, err := only(folder, "*.root.json")
	if err != nil {
		return nil, err
	}
	targetsData, err := only(folder, "*.targets.json")
	if err != nil {
		return nil, err
	}
	var d drafts
	if d.next, err = tuf.ParseRoot(rootData); err != nil {
		return nil, err
	}
	if d.next.Version > 1 && previous == "" {
		return nil, fmt.Errorf("root %d follows another: %w", d.next.Version, errInForce)
	}
	if previous != "" {
		data, err := readFile(previous, tuf.MaxFile)
		if err != nil {
			return nil, fmt.Errorf("read root in force: %w", err)
		}
		if d.inForce, err = tuf.ParseRoot(data); err != nil {
			return nil, fmt.Errorf("read root in force: %w", err)
		}
	}
	if d.root, err = tuf.ReadRootDraft(rootData, d.inForce); err != nil {
		return nil, err
	}
	d.targets, err = tuf.ReadTargetsDraft(targetsData, d.next)
	return &d, err
}

// only reads the one file that fits.
func only(folder, pattern string) ([]byte, error) {
	names, err := filepath.Glob(filepath.Join(folder, pattern))
	if err != nil || len(names) != 1 {
		return nil, fmt.Errorf("folder %s has %d files %s, want 1: %w", folder, len(names), pattern, errors.Join(errDrafts, err))
	}
	return readFile(names[0], tuf.MaxFile)
}

// show prints what would be signed.
func (d *drafts) show(p *printer) {
	layout := d.next.Layout
	p.field("Root", fmt.Sprintf("version %d, until %s", d.root.Version(), d.root.Expires().Format(time.DateOnly)))
	p.field("", fmt.Sprintf("%d of %d custodians; timestamps for %s", layout.Threshold, len(layout.Custodians), layout.Expires.Timestamp))
	if old := d.inForce; old != nil {
		leave, join := missing(old.Layout.Custodians, layout.Custodians), missing(layout.Custodians, old.Layout.Custodians)
		p.field("", fmt.Sprintf("follows root %d, of whose custodians %d of %d must sign too; leaving: %d, joining: %d",
			old.Version, old.Layout.Threshold, len(old.Layout.Custodians), leave, join))
	}
	p.hash("", d.root.Digest())
	p.field("Targets", fmt.Sprintf("version %d, until %s", d.targets.Version(), d.targets.Expires().Format(time.DateOnly)))
	p.hash("", d.targets.Digest())
}

// missing counts the keys that are not among others.
func missing(keys, others []*ecdsa.PublicKey) int {
	n := 0
	for _, k := range keys {
		if !slices.ContainsFunc(others, func(o *ecdsa.PublicKey) bool { return o.Equal(k) }) {
			n++
		}
	}
	return n
}

// part returns what the owner of a key signs, and says so: both files, or, who
// has no say in the next root and leaves, the root alone.
func (d *drafts) part(pub crypto.PublicKey) ([]*tuf.Draft, string) {
	isKey := func(k *ecdsa.PublicKey) bool { return k.Equal(pub) }
	switch {
	case !slices.ContainsFunc(d.next.Layout.Custodians, isKey):
		return []*tuf.Draft{d.root}, fmt.Sprintf("leaves with root %d, and signs that root for the last time, not the targets", d.next.Version)
	case d.inForce != nil && !slices.ContainsFunc(d.inForce.Layout.Custodians, isKey):
		return []*tuf.Draft{d.root, d.targets}, fmt.Sprintf("joins with root %d, and signs root and targets", d.next.Version)
	}
	return []*tuf.Draft{d.root, d.targets}, "signs root and targets"
}

// sign signs the files. The signatures are a line each.
func sign(ctx context.Context, key hsm.Key, files []*tuf.Draft) ([]byte, error) {
	var content []byte
	for _, draft := range files {
		sig, err := draft.Sign(ctx, key)
		if err != nil {
			return nil, err
		}
		line, err := sig.Marshal()
		if err != nil {
			return nil, err
		}
		content = append(content, line...)
	}
	return content, nil
}

// key opens the key of the URI if its public key is a custodian's, of the next
// root or of the one in force.
func (d *drafts) key(ctx context.Context, tok hsm.Token, uri string) (hsm.Key, error) {
	custodians := d.next.Layout.Custodians
	if d.inForce != nil {
		custodians = slices.Concat(custodians, d.inForce.Layout.Custodians)
	}
	for _, pub := range custodians {
		spki, err := hsm.SPKIHash(pub)
		if err != nil {
			return nil, err
		}
		key, err := tok.Open(ctx, hsm.Ref{URI: uri, SPKI: spki}, hsm.RoleNone)
		if err == nil || !errors.Is(err, hsm.ErrMismatch) {
			return key, err
		}
	}
	return nil, fmt.Errorf("key %s: %w", uri, errCustodian)
}
