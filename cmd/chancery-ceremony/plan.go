package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/chancery-ca/chancery/ceremony"
)

func newPlan() *cobra.Command {
	var script, details bool
	var machine machineFlag
	cmd := &cobra.Command{
		Use:   "plan DEFINITION",
		Short: "Check a definition and print every step, without a token",
		Long: `plan checks a definition and prints the steps of its ceremony: with --details
every question, key template and certificate, with --script a text to print on
paper for everyone in the room, with the words of the definition, boxes to tick
and lines for names and times.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			def, err := readDefinition(args[0])
			if err != nil {
				return err
			}
			if def, err = machine.part(def); err != nil {
				return err
			}
			steps, err := ceremony.Plan(def)
			if err != nil {
				return err
			}
			p := &printer{w: cmd.OutOrStdout()}
			if script {
				printScript(p, def, steps)
				return p.err
			}
			printHead(p, def)
			for i, s := range steps {
				p.step(i+1, len(steps), "", s.Title)
				if details {
					p.indented(8, append([]string{s.Why}, s.Details...)...)
				}
			}
			return p.err
		},
	}
	machine.register(cmd)
	cmd.Flags().BoolVar(&script, "script", false, "print the script for the people in the room")
	cmd.Flags().BoolVar(&details, "details", false, "print what is known of each step")
	return cmd
}

// printHead says which definition this is.
func printHead(p *printer, def *ceremony.Definition) {
	if def.Environment == ceremony.Rehearsal {
		p.line("REHEARSAL: practice keys in software tokens. Nothing made here counts.")
		p.line("")
	}
	p.field("Ceremony", def.ID+", "+string(def.Kind))
	if m := def.Machine(); m != "" {
		p.field("Machine", string(m))
	}
	p.hash("Definition", def.Hash())
	p.line("")
}

// blank is a line to write on.
const blank = "____________________"

// printScript prints what everyone has on paper.
func printScript(p *printer, def *ceremony.Definition, steps []ceremony.Step) {
	p.line("KEY CEREMONY %s", def.ID)
	p.line("")
	printHead(p, def)
	p.field("Environment", string(def.Environment))
	if w := def.Window; !w.NotBefore.IsZero() {
		p.field("Window", w.NotBefore.UTC().Format(time.RFC3339)+" to "+w.NotAfter.UTC().Format(time.RFC3339))
	}
	p.line("")
	p.line("Room %s  Date %s  Page ___ of ___", blank, blank)
	p.line("")
	p.line("People (each brings this paper, their ssh key on their own machine, and a watch)")
	p.line("")
	for _, person := range def.People {
		p.line("  [ ] %-6s %-24.24s %-14s %s", person.ID, person.Name, person.Role, blank)
	}
	p.line("")
	p.line("  Words of the definition")
	p.words(strings.Fields(ceremony.Words(def.Hash()))...)
	p.line("Everyone checks, before it begins")
	p.line("")
	for _, check := range []string{
		"The words of the definition above are those of my own copy (made with: chancery-ceremony plan).",
		"The program's SHA-256 is the one that we agreed on: " + blank + blank,
		"The machine has no network and was started from media that we agreed on.",
		"The devices' seals are whole; their serial numbers are those of the records.",
	} {
		p.box(check)
	}
	for i, s := range steps {
		p.line("")
		p.step(i+1, len(steps), "", s.Title)
		p.indented(8, s.Why)
		for _, d := range s.Details {
			p.box(d)
		}
		p.line("        Time %s  Done [ ]  Remarks %s", "________", blank)
	}
	p.line("")
	p.line("At the end, from the screen")
	p.line("")
	p.line("  Words of the checkpoint")
	p.words()
	p.line("  Words of the last record")
	p.words()
	p.line("  Signatures")
	p.line("")
	for _, person := range def.People {
		p.line("  %-6s %-24.24s %s", person.ID, person.Name, blank+blank)
		p.line("")
	}
}

// box prints text with a box to tick.
func (p *printer) box(text string) {
	const mark = "        [ ] "
	head := mark
	for _, l := range wrap(text, width-len(mark)) {
		p.line("%s%s", head, l)
		head = fmt.Sprintf("%*s", len(mark), "")
	}
}

// indented prints texts, each broken at spaces.
func (p *printer) indented(n int, texts ...string) {
	for _, text := range texts {
		if text == "" {
			continue
		}
		for _, l := range wrap(text, width-n) {
			p.line("%*s%s", n, "", l)
		}
	}
}

// words prints the 24 words of a hash with their numbers, or lines for them.
func (p *printer) words(words ...string) {
	const count = 24
	if len(words) != count {
		words = slices.Repeat([]string{"________"}, count)
	}
	for i := 0; i < count; i += 6 {
		line := "  "
		for n, word := range words[i : i+6] {
			line += fmt.Sprintf("%2d %-8s ", i+n+1, word)
		}
		p.line("%s", strings.TrimRight(line, " "))
	}
	p.line("")
}
