package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/chancery-ca/chancery/ceremony"
)

// errNoTranscript: the folder is not the outputs of a ceremony.
var errNoTranscript = errors.New("no " + ceremony.TranscriptName + " in the folder")

func newVerify() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "verify DIR",
		Short: "Check the outputs of a ceremony, without a token",
		Long: `verify reads the outputs of a ceremony in DIR and does again everything that
follows from them: the chain of the transcript, commitments and seed, the
root's serial number, the keys' evidence, every certificate with its profile,
every file. It needs no token. Compare the words of the last record with those
that were read aloud: they say that this is the ceremony you mean.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if output != "text" && output != "json" {
				return usageError{fmt.Errorf("--output %q: want text or json", output)}
			}
			dir := args[0]
			if _, err := os.Stat(filepath.Join(dir, ceremony.TranscriptName)); errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("verify %s: %w", dir, errNoTranscript)
			}
			report := ceremony.Verify(dir)
			if output == "json" {
				return errors.Join(printJSON(cmd.OutOrStdout(), report), report.Err())
			}
			return errors.Join(printReport(&printer{w: cmd.OutOrStdout()}, report), summaryError(report))
		},
	}
	cmd.Flags().StringVar(&output, "output", "text", "text or json")
	return cmd
}

func printReport(p *printer, r *ceremony.Report) error {
	const indent = 34
	for _, c := range r.Checks {
		text, how := c.Detail, "ok"
		if c.Err != nil {
			text, how = c.Err.Error(), "FAIL"
		}
		head := fmt.Sprintf("%-5s%-*s ", how, indent-6, c.Name)
		for i, l := range wrap(text, width-indent) {
			if i > 0 {
				head = fmt.Sprintf("%*s", indent, "")
			}
			p.line("%s%s", head, l)
		}
	}
	if r.Err() == nil {
		p.line("")
		if r.Definition.Environment == ceremony.Rehearsal {
			p.line("REHEARSAL: these keys are practice keys. Nothing here counts.")
		}
		p.hash("Definition", r.Definition.Hash())
		p.hash("Last record", r.Head)
	}
	return p.err
}

// summaryError counts what the table has said already.
func summaryError(r *ceremony.Report) error {
	failed := 0
	for _, c := range r.Checks {
		if c.Err != nil {
			failed++
		}
	}
	if failed == 0 {
		return nil
	}
	return fmt.Errorf("%w: %d of %d checks failed", ceremony.ErrVerify, failed, len(r.Checks))
}

func printJSON(w io.Writer, r *ceremony.Report) error {
	type check struct {
		Name   string `json:"name"`
		Detail string `json:"detail,omitempty"`
		Error  string `json:"error,omitempty"`
	}
	out := struct {
		OK     bool    `json:"ok"`
		Head   string  `json:"head,omitempty"`
		Checks []check `json:"checks"`
	}{OK: r.Err() == nil}
	if out.OK {
		out.Head = fmt.Sprintf("%x", r.Head)
	}
	for _, c := range r.Checks {
		line := check{Name: c.Name, Detail: c.Detail}
		if c.Err != nil {
			line.Error = c.Err.Error()
		}
		out.Checks = append(out.Checks, line)
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(out)
}
