//go:build cgo

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/chancery-ca/chancery/ceremony"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
	"github.com/chancery-ca/chancery/hsm/softhsm"
)

// tokensPossible says, before anything is made, why no token can be.
func tokensPossible(def *ceremony.Definition) error {
	if def.Environment != ceremony.Rehearsal {
		return nil
	}
	if _, err := softhsm.Module(); err != nil {
		return fmt.Errorf("%w: %w", errNoModule, err)
	}
	return nil
}

func openPKCS11(ctx context.Context, module, uri string, pin []byte) (hsm.Token, error) {
	tok, err := pkcs11.Open(ctx, pkcs11.Config{Module: module, URI: uri, PIN: pin, MaxSessions: 1})
	if err != nil {
		return nil, err // not a nil *Token in an interface
	}
	return tok, nil
}

// changePKCS11 changes the user PIN of a token that is not open.
func changePKCS11(ctx context.Context, module, uri string, old, next []byte, begun bool) (already bool, err error) {
	return pkcs11.ChangePIN(ctx, pkcs11.PINChange{Module: module, URI: uri, Old: old, New: next, Begun: begun})
}

// pairPKCS11 makes a wrapping key in two tokens, neither of which is open.
func pairPKCS11(ctx context.Context, label string, source, target officer) (hsm.Pairing, error) {
	return pkcs11.Pair(ctx, label, pkcs11.Officer{Module: source.module, URI: source.uri, PIN: source.pin},
		pkcs11.Officer{Module: target.module, URI: target.uri, PIN: target.pin})
}

// inspectPKCS11 wants exactly one token that fits.
func inspectPKCS11(ctx context.Context, module, uri string) (hsm.Inspection, error) {
	found, err := pkcs11.Inspect(ctx, module, uri)
	switch {
	case err != nil:
		return hsm.Inspection{}, err
	case len(found) != 1:
		return hsm.Inspection{}, fmt.Errorf("%d tokens fit %s: %w", len(found), uri, hsm.ErrAmbiguous)
	}
	return found[0], nil
}

// softTokens are the SoftHSM tokens of a rehearsal.
type softTokens struct{ home *softhsm.Home }

// make makes, or after an interruption finds, the token with this label below
// dir, and returns the library.
func (s *softTokens) make(dir, label string, soPIN, pin []byte) (module string, err error) {
	if real, err := filepath.EvalSymlinks(dir); err == nil { // of an earlier rehearsal
		dir = real
	}
	if s.home == nil {
		if s.home, err = softhsm.Open(dir); errors.Is(err, fs.ErrNotExist) {
			s.home, err = softhsm.Create(dir)
		}
		if err != nil {
			return "", err
		}
	}
	err = s.home.InitToken(label, soPIN, pin)
	if err != nil && !errors.Is(err, hsm.ErrExists) {
		return "", fmt.Errorf("make token: %w", err)
	}
	return s.home.Module(), nil
}
