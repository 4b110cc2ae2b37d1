package pkcs11_test

import (
	"context"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
)

// TestLeave: a caller who leaves while the token works shares no memory with the
// call that goes on: it may use its own again. The race detector is the judge.
func TestLeave(t *testing.T) {
	f := setUp(t, pkcs11.Config{MaxSessions: 1})
	id, seed := hsmtest.RandomID(), []byte("seed")
	made, err := f.open.Generate(t.Context(), hsm.Spec{Label: "other", ID: id, Algorithm: hsm.ECDSAP256})
	if err != nil {
		t.Fatal(err)
	}
	digest := make([]byte, 32)
	rows := []struct {
		name string
		in   hsmtest.Function
		call func(context.Context) error
		mine []byte // what the caller gave
	}{
		{"Sign", hsmtest.Sign, func(ctx context.Context) error {
			_, err := made.SignContext(ctx, digest, hsm.ECDSAP256.Hash())
			return err
		}, digest},
		{"Find", hsmtest.GetAttributeValue, func(ctx context.Context) error {
			_, err := f.open.Find(ctx, id)
			return err
		}, id},
		{"Open", hsmtest.GetAttributeValue, func(ctx context.Context) error {
			_, err := f.open.Open(ctx, made.Ref(), hsm.RoleCT)
			return err
		}, nil},
		{"Evidence", hsmtest.GetAttributeValue, func(ctx context.Context) error {
			_, err := f.open.Evidence(ctx, made)
			return err
		}, nil},
		{"List", hsmtest.GetAttributeValue, func(ctx context.Context) error {
			_, err := f.open.List(ctx)
			return err
		}, nil},
		{"Keys", hsmtest.FindObjects, func(ctx context.Context) error {
			_, err := f.open.Keys(ctx)
			return err
		}, nil},
		{"Random", hsmtest.GenerateRandom, func(ctx context.Context) error {
			_, err := f.open.Random(ctx, 8)
			return err
		}, nil},
		{"SeedRandom", hsmtest.SeedRandom, func(ctx context.Context) error {
			return f.open.SeedRandom(ctx, seed)
		}, seed},
	}
	for _, row := range rows {
		f.shim.Hang(row.in)
		ctx, cancel := context.WithCancel(t.Context())
		answer := make(chan error, 1)
		go func() { answer <- row.call(ctx) }()
		eventually(t, "a call that hangs", func() bool { return f.shim.Hanging() == 1 })
		cancel()
		wants(t, f.token, row.name, <-answer, hsm.ErrLost)
		clear(row.mine)
		f.shim.Hang(0)
		wants(t, f.token, "a signature after "+row.name, f.sign(t.Context()), nil) // the one worker is free
	}
}
