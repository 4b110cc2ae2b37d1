package main

import (
	"errors"

	"github.com/spf13/cobra"
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
	var f runFlags
	cmd := &cobra.Command{
		Use:   "rehearse DEFINITION",
		Short: "Run any definition on software tokens made for the occasion",
		Long: `rehearse runs a definition from beginning to end on SoftHSM tokens that it
makes itself (emulated TPMs are used as they are). A definition for production
is rehearsed as it is: every certified name gets the prefix "REHEARSAL ", the
window does not count, and no device that it names is touched. Nobody is asked,
unless --ask is given: then people practise their part.

A definition that continues a ceremony is rehearsed after a rehearsal of that
one: --previous names its outputs, and --tokens its folder, for the root that
signs is there.

If a key has a wrapped backup, the rehearsal pairs the two software tokens, as
the security officers of the real ones do before the ceremony.

Below DIR it leaves tokens/ (the software tokens), pins/ (their random PINs,
mode 0400), pairings/ and the definition's output folder.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			def, err := readDefinition(args[0])
			if err != nil {
				return err
			}
			if def, err = def.Rehearsal(); err != nil {
				return err
			}
			if def, err = f.machine.part(def); err != nil {
				return err
			}
			return f.start(cmd, def)
		},
	}
	f.register(cmd)
	f.registerPrevious(cmd)
	cmd.Flags().StringVar(&f.tokens, "tokens", "", "folder of an earlier rehearsal, whose tokens this one continues with")
	cmd.Flags().BoolVar(&f.ask, "ask", false, "ask people, as in the real ceremony")
	return cmd
}
