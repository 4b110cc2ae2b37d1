package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/chancery-ca/chancery/ceremony"
	"github.com/chancery-ca/chancery/hsm"
)

// The folders below --dir, besides the definition's output folder.
const (
	tokensFolder = "tokens" // the software tokens
	pinsFolder   = "pins"   // one file for each token, mode 0400
)

var (
	errNoModule = errors.New("SoftHSM is not installed")
	errNoCgo    = errors.New("built without cgo: no PKCS#11 tokens")
)

func newRehearse() *cobra.Command {
	var dir string
	var resume bool
	cmd := &cobra.Command{
		Use:   "rehearse DEFINITION",
		Short: "Run a definition on software tokens made for the occasion",
		Long: `rehearse runs a definition from beginning to end on SoftHSM tokens that it
makes itself. Below DIR it leaves tokens/ (the software tokens), pins/ (their
random PINs, mode 0400) and the definition's output folder.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			def, err := readDefinition(args[0])
			if err != nil {
				return err
			}
			if dir == "" {
				dir = def.ID
			}
			return rehearse(cmd.Context(), &printer{w: cmd.OutOrStdout()}, def, dir, resume)
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "folder of the rehearsal (default: the ceremony's id)")
	cmd.Flags().BoolVar(&resume, "resume", false, "continue an interrupted rehearsal in --dir")
	return cmd
}

// rehearse makes the tokens, runs the ceremony and says what it made.
func rehearse(ctx context.Context, p *printer, def *ceremony.Definition, dir string, resume bool) (err error) {
	if def.Environment != ceremony.Rehearsal {
		return fmt.Errorf("rehearse %s: environment is %s: %w", def.ID, def.Environment, ceremony.ErrEnvironment)
	}
	if _, err := ceremony.Plan(def); err != nil {
		return err
	}
	if err := tokensPossible(); err != nil {
		return err
	}
	if err := prepare(dir, resume); err != nil {
		return err
	}
	printHead(p, def)
	start := time.Now()
	tokens, err := openTokens(ctx, def, dir)
	defer func() { err = errors.Join(err, closeAll(tokens)) }()
	if err != nil {
		return err
	}
	binary, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	res, err := ceremony.Rehearse(ctx, def, ceremony.Options{
		Tokens: tokens, Dir: filepath.Join(dir, def.Outputs.Dir), Now: clock, Binary: binary, Resume: resume,
		Progress: func(e ceremony.Event) {
			switch {
			case e.Done && e.Skipped:
				p.step(e.Index, e.Total, "kept", e.Step.Title)
			case e.Done:
				p.step(e.Index, e.Total, "ok", e.Step.Title)
			}
		},
	})
	if err != nil {
		return err
	}
	summary(p, dir, def, res, time.Since(start))
	return p.err
}

// prepare makes the folder; one that has something in it is refused, unless
// the rehearsal in it is resumed.
func prepare(dir string, resume bool) error {
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, os.ErrNotExist) && resume:
		return fmt.Errorf("resume: %w", err)
	case err == nil && len(entries) > 0 && !resume:
		return fmt.Errorf("folder %s is not empty: %w", dir, ceremony.ErrOutputExists)
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("open folder: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make folder: %w", err)
	}
	return nil
}

func closeAll(tokens map[string]hsm.Token) error {
	var all []error
	for _, t := range tokens {
		all = append(all, t.Close())
	}
	return errors.Join(all...)
}

// tokenLabels gives each token of the definition the label that it has there,
// or its name when the label is missing or not the only one.
func tokenLabels(def *ceremony.Definition) map[string]string {
	count := map[string]int{}
	for name, t := range def.Tokens {
		count[t.Label()]++
		count[name]++
	}
	labels := map[string]string{}
	for name, t := range def.Tokens {
		labels[name] = name
		if l := t.Label(); l != "" && count[l] == 1 {
			labels[name] = l
		}
	}
	return labels
}

func summary(p *printer, dir string, def *ceremony.Definition, res *ceremony.Result, took time.Duration) {
	p.line("")
	p.field("Done", fmt.Sprintf("in %s: %d keys, %d certificates, %d files, %d records",
		seconds(took), len(def.Keys), len(res.Certificates), len(res.Files)+1, res.Records))
	for _, name := range slices.Sorted(maps.Keys(res.Certificates)) {
		c := res.Certificates[name]
		p.field(name, fmt.Sprintf("%s, until %s", c.Subject.CommonName, c.NotAfter.Format(time.DateOnly)))
		p.field("", fmt.Sprintf("%x", sha256.Sum256(c.Raw)))
	}
	p.hash("Last record", res.Head)
	p.field("Files", res.Dir)
	p.field("PINs", filepath.Join(dir, pinsFolder))
	p.field("Check", "chancery-ceremony verify "+res.Dir)
}
