package tpm_test

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/tpm"
	"github.com/google/go-tpm/tpm2"
)

// TestLeave: a caller who leaves while the TPM works shares no memory with the
// operation that goes on: it may use its own again, and the TPM gets what was
// given.
func TestLeave(t *testing.T) {
	w, token, key, _ := openWire(t)
	counter := mustCreate(t, token, testIndex)
	attestation, err := token.Attest(t.Context(), key, make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	limits := tpm.Lockout{MaxTries: 3, Recovery: time.Hour}
	digest, lockout := make([]byte, 32), append([]byte("lockout-"), hsmtest.RandomID()...)
	rows := []struct {
		name string
		call func(context.Context) error
		mine []byte // what the caller gave
	}{
		{"Sign", func(ctx context.Context) error {
			_, err := key.SignContext(ctx, digest, hsm.ECDSAP256.Hash())
			return err
		}, digest},
		{"Open", func(ctx context.Context) error {
			_, err := token.Open(ctx, key.Ref(), hsm.RoleCT)
			return err
		}, nil},
		{"Evidence", func(ctx context.Context) error {
			_, err := token.Evidence(ctx, key)
			return err
		}, nil},
		{"Attest", func(ctx context.Context) error {
			_, err := token.Attest(ctx, key, make([]byte, 32))
			return err
		}, nil},
		{"ActivateCredential", func(ctx context.Context) error {
			_, err := token.ActivateCredential(ctx, attestation, tpm.Credential{})
			return err
		}, nil},
		{"Random", func(ctx context.Context) error {
			_, err := token.Random(ctx, 8)
			return err
		}, nil},
		{"Lockout", func(ctx context.Context) error {
			_, err := token.Lockout(ctx)
			return err
		}, nil},
		{"Value", func(ctx context.Context) error {
			_, err := counter.Value(ctx)
			return err
		}, nil},
		{"Advance", func(ctx context.Context) error {
			_, err := counter.Advance(ctx)
			return err
		}, nil},
		{"SetLockout", func(ctx context.Context) error {
			return token.SetLockout(ctx, nil, limits, lockout)
		}, lockout},
	}
	given := bytes.Clone(lockout)
	for _, row := range rows {
		asked, goOn := make(chan struct{}), make(chan struct{})
		first := true
		w.set(func(_ tpm2.TPMCC, ask func() []byte) []byte {
			if first {
				first = false
				close(asked)
				<-goOn
			}
			return ask()
		})
		ctx, cancel := context.WithCancel(t.Context())
		answer := make(chan error, 1)
		go func() { answer <- row.call(ctx) }()
		select {
		case <-asked:
			cancel()
			wants(t, row.name, <-answer, hsm.ErrLost)
		case err := <-answer:
			t.Errorf("%s asked nothing of the TPM: %v", row.name, err)
		}
		cancel()
		clear(row.mine)
		close(goOn)
		signs(t, key) // the one worker is free
	}
	wants(t, "the lockout value that was given", token.SetLockout(t.Context(), given, limits, nil), nil)
}
