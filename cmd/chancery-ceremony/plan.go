package main

import (
	"github.com/spf13/cobra"

	"github.com/chancery-ca/chancery/ceremony"
)

func newPlan() *cobra.Command {
	return &cobra.Command{
		Use:   "plan DEFINITION",
		Short: "Check a definition and print every step, without a token",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			def, err := readDefinition(args[0])
			if err != nil {
				return err
			}
			steps, err := ceremony.Plan(def)
			if err != nil {
				return err
			}
			p := &printer{w: cmd.OutOrStdout()}
			printHead(p, def)
			for i, s := range steps {
				p.step(i+1, len(steps), "", s.Title)
			}
			return p.err
		},
	}
}

// printHead says which definition this is.
func printHead(p *printer, def *ceremony.Definition) {
	if def.Environment == ceremony.Rehearsal {
		p.line("REHEARSAL: practice keys in software tokens. Nothing made here counts.")
		p.line("")
	}
	p.field("Ceremony", def.ID+", "+string(def.Kind))
	p.hash("Definition", def.Hash())
	p.line("")
}
