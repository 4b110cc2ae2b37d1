package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/chancery-ca/chancery/ceremony"
)

func newStatus() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "status OUTPUTS",
		Short: "Say how far a ceremony is, without a token",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if output != "text" && output != "json" {
				return usageError{fmt.Errorf("--output %q: want text or json", output)}
			}
			s, err := ceremony.ReadStatus(args[0])
			if err != nil {
				return err
			}
			if output == "json" {
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				return enc.Encode(s)
			}
			return printStatus(&printer{w: cmd.OutOrStdout()}, s, args[0])
		},
	}
	cmd.Flags().StringVar(&output, "output", "text", "text or json")
	return cmd
}

func printStatus(p *printer, s ceremony.Status, out string) error {
	p.field("Ceremony", fmt.Sprintf("%s, %s, %s", s.ID, s.Kind, s.Environment))
	p.field("Began", s.Began.Format(time.RFC3339))
	p.field("Last record", fmt.Sprintf("%d, %s", s.Records-1, s.Last.Format(time.RFC3339)))
	p.field("", fmt.Sprintf("%x", s.Head))
	for _, k := range s.Keys {
		p.field("Key", k)
	}
	for _, c := range s.Certificates {
		p.field("Certificate", c)
	}
	for _, w := range s.Signed {
		p.field("Signed", w)
	}
	p.line("")
	for i, step := range s.Steps {
		switch {
		case i < s.Done:
			p.step(i+1, len(s.Steps), "done", step.Title)
		case i == s.Done:
			p.step(i+1, len(s.Steps), "NEXT", step.Title)
		default:
			p.step(i+1, len(s.Steps), "", step.Title)
		}
	}
	p.line("")
	switch {
	case s.Ending != "":
		p.field("End", string(s.Ending))
	case s.Quarantined != "":
		p.field("Stopped", "key "+s.Quarantined+" is in quarantine; end with: chancery-ceremony abort "+out+" --as ID --reason TEXT")
	case len(s.Waiting) > 0:
		for _, w := range s.Waiting {
			p.field("Waits for", w)
		}
	default:
		p.field("Go on with", "chancery-ceremony resume "+out)
	}
	return p.err
}

func newSign() *cobra.Command {
	var person, signature, decline string
	cmd := &cobra.Command{
		Use:   "sign OUTPUTS --as WITNESS (--signature FILE | --decline REASON)",
		Short: "Record a witness's signature of the checkpoint, or that they decline",
		Long: `sign adds a witness's answer to a ceremony that waits for it, without a token.
The witness makes the signature on their own machine, with their own key:

  ` + ceremony.SignCommand + `

which writes transcript.checkpoint.sig. When the last witness has answered the
ceremony is closed.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if person == "" || (signature == "") == (decline == "") {
				return usageError{errors.New("want --as, and either --signature or --decline")}
			}
			def, err := ceremony.OpenFolder(args[0])
			if err != nil {
				return err
			}
			opts := ceremony.Options{Dir: args[0], Now: clock}
			err = ceremony.Sign(cmd.Context(), def, opts, person, signature, decline)
			c := newConsole(nil, cmd.OutOrStdout())
			switch {
			case errors.Is(err, ceremony.ErrUnfinished):
				c.paragraph("", "Recorded. Other witnesses have not answered yet.")
				return c.err
			case errors.Is(err, ceremony.ErrAnswer): // nothing is to be resumed: sign again
				return err
			case err != nil:
				return &interrupted{err: err, out: args[0]}
			}
			s, err := ceremony.ReadStatus(args[0])
			if err != nil {
				return err
			}
			c.field("Ceremony", s.ID+" is "+string(s.Ending))
			c.hash("Last record", s.Head)
			return c.err
		},
	}
	cmd.Flags().StringVar(&person, "as", "", "id of the witness")
	cmd.Flags().StringVar(&signature, "signature", "", "file made by ssh-keygen -Y sign")
	cmd.Flags().StringVar(&decline, "decline", "", "why the witness does not sign")
	return cmd
}

func newAbort() *cobra.Command {
	var person, reason string
	f := runFlags{resume: true}
	cmd := &cobra.Command{
		Use:   "abort OUTPUTS --as PERSON --reason TEXT",
		Short: "End an interrupted ceremony for good, with a record of why",
		Long: `abort ends a ceremony that is not complete, in the name of one of its people.
The reason and what was made are recorded, the transcript is sealed, and the
witnesses who were there sign it. No token is needed; keys that were made stay
in their tokens and are named in the record.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if reason == "" {
				return usageError{errors.New("want --reason")}
			}
			def, err := ceremony.OpenFolder(args[0])
			if err != nil {
				return err
			}
			c := consoleOf(cmd)
			people, err := f.people(c, def)
			if err != nil {
				return err
			}
			opts := ceremony.Options{Dir: args[0], Now: clock, People: people, Progress: c.progress}
			if err := ceremony.Abort(cmd.Context(), def, opts, person, reason); err != nil {
				return &interrupted{err: err, out: args[0]}
			}
			c.line("")
			c.field("Aborted", "the record of it is in "+args[0])
			return c.err
		},
	}
	cmd.Flags().StringVar(&person, "as", "", "id of the person who ends it")
	cmd.Flags().StringVar(&reason, "reason", "", "why")
	cmd.Flags().BoolVar(&f.ask, "ask", false, "in a rehearsal: ask people")
	f.registerAnswers(cmd)
	return cmd
}
