package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/chancery-ca/chancery/hsm/tpm"
)

// errLockoutValue: the TPM has a lockout value, and none was given, or the
// other way about. Nothing was tried: one wrong value is enough to be kept out.
var errLockoutValue = errors.New("the lockout value does not fit the TPM")

// lockoutFlags say how a TPM answers guessing.
type lockoutFlags struct {
	tpm.Lockout
	valueFile, currentFile string
}

func newLockout() *cobra.Command {
	var f lockoutFlags
	cmd := &cobra.Command{
		Use:   "lockout DEVICE",
		Short: "Say how a TPM answers guessing at values, before the ceremony",
		Long: `lockout sets a TPM's dictionary-attack parameters and its lockout value, and
prints what the TPM says of them before and after. Our keys are not locked out
by wrong values, but what else is in the TPM may be: a disk's key, or the
systemd credential with the keys' value. Keep the lockout value in the safe: no
service needs it, and who has it can lift the protection.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c := consoleOf(cmd)
			before, err := tpm.ReadLockout(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			c.lockout("Before", before)
			if err := f.set(cmd.Context(), args[0], before.AuthSet); err != nil {
				return err
			}
			after, err := tpm.ReadLockout(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			c.lockout("After", after)
			return c.err
		},
	}
	cmd.Flags().Uint32Var(&f.MaxTries, "tries", 31, "wrong values that lock")
	cmd.Flags().DurationVar(&f.Recovery, "recovery", 10*time.Minute, "time after which one wrong value is forgotten")
	cmd.Flags().DurationVar(&f.LockoutRecovery, "lockout-recovery", 24*time.Hour,
		"time for which the lockout value is not taken after it was wrong once; 0 is until a restart")
	cmd.Flags().StringVar(&f.valueFile, "value-file", "", "file with the new lockout value, 16 to 32 octets (mode 0400); else it stays")
	cmd.Flags().StringVar(&f.currentFile, "current-file", "", "file with the present lockout value (mode 0400), if the TPM has one")
	return cmd
}

// set asks the TPM once at most.
func (f *lockoutFlags) set(ctx context.Context, device string, isSet bool) (err error) {
	if isSet != (f.currentFile != "") {
		return fmt.Errorf("a value is set: %t; --current-file is given: %t: %w", isSet, f.currentFile != "", errLockoutValue)
	}
	var current, next []byte
	defer func() { clear(current); clear(next) }()
	if f.currentFile != "" {
		if current, err = readPINFile(f.currentFile); err != nil {
			return err
		}
	}
	if f.valueFile != "" {
		if next, err = readPINFile(f.valueFile); err != nil {
			return err
		}
		if len(next) > 32 {
			return fmt.Errorf("lockout value of %d octets, want 16 to 32: %w", len(next), errPINFile)
		}
	}
	return tpm.SetLockout(ctx, device, current, f.Lockout, next)
}

// lockout prints what a TPM says.
func (c *console) lockout(when string, s tpm.LockoutState) {
	text := fmt.Sprintf("%d wrong values lock, one is forgotten every %v, the lockout value is refused for %v", s.MaxTries, s.Recovery, s.LockoutRecovery)
	if !s.AuthSet {
		text += "; it is empty, so anybody at the TPM can lift the lock"
	}
	c.field(when, text)
	if s.Failed > 0 || s.Locked {
		c.field("", fmt.Sprintf("%d wrong values are not forgotten yet; locked: %t", s.Failed, s.Locked))
	}
}
