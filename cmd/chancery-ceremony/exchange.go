package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/chancery-ca/chancery/ceremony"
)

func newExport() *cobra.Command {
	return &cobra.Command{
		Use:   "export OUTPUTS BUNDLE",
		Short: "Write the bundle for the other machine",
		Long: `export writes what the other machine needs into one file, which must not exist:
the online machine its certificate requests, the offline one what it issued. It
needs no token, changes nothing in OUTPUTS, and can be repeated.

The other machine may perform another part of the same ceremony, or one of its
own: an intermediate-csr is answered by a sign-intermediate, whose definition
names the last record that export prints.

The words of the bundle are read aloud when it is imported: keep them on the
screen, or on paper.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := ceremony.Export(args[0], args[1])
			if err != nil {
				return err
			}
			p := &printer{w: cmd.OutOrStdout()}
			p.field("Bundle", fmt.Sprintf("%s, %s of ceremony %s, %d files", args[1], b.Kind, b.Ceremony, len(b.Files)))
			p.hash("Bundle", b.Hash())
			p.hash("Last record", b.Head)
			p.line("")
			p.line("On the other machine: chancery-ceremony import OUTPUTS BUNDLE")
			return p.err
		},
	}
}

func newImport() *cobra.Command {
	f := runFlags{resume: true}
	cmd := &cobra.Command{
		Use:   "import OUTPUTS BUNDLE",
		Short: "Take in the bundle of the other machine, and go on",
		Long: `import reads the bundle of the other machine, verifies all of it, has its words
compared, and goes on with the ceremony in OUTPUTS. A bundle of another
ceremony than the definition says, for another request, or with anything in it
that does not follow from its transcript is refused, and nothing is recorded of
it.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			def, err := ceremony.OpenFolder(args[0])
			if err != nil {
				return err
			}
			f.out, f.bundle = args[0], args[1]
			return f.start(cmd, def)
		},
	}
	f.registerAnswers(cmd)
	f.registerPINs(cmd)
	cmd.Flags().BoolVar(&f.ask, "ask", false, "in a rehearsal: ask people")
	return cmd
}

// machineFlag is which of two machines this is.
type machineFlag struct{ name string }

func (m *machineFlag) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&m.name, "machine", "", "which machine this is, of a definition for two: offline or online")
}

// part returns the part of the definition that happens here.
func (m *machineFlag) part(def *ceremony.Definition) (*ceremony.Definition, error) {
	part, err := def.On(ceremony.Machine(m.name))
	if err != nil {
		return nil, usageError{fmt.Errorf("--machine: %w", err)}
	}
	return part, nil
}
