//go:build cgo

package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"

	"github.com/chancery-ca/chancery/ceremony"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
	"github.com/chancery-ca/chancery/hsm/softhsm"
)

// tokensPossible says, before anything is made, why no token can be.
func tokensPossible() error {
	if _, err := softhsm.Module(); err != nil {
		return fmt.Errorf("%w: %w", errNoModule, err)
	}
	return nil
}

// openTokens makes, or after an interruption finds, one software token for
// each token of the definition and opens them by the definition's names. On an
// error it returns what it has opened.
func openTokens(ctx context.Context, def *ceremony.Definition, dir string) (map[string]hsm.Token, error) {
	home, err := openHome(filepath.Join(dir, tokensFolder))
	if err != nil {
		return nil, err
	}
	tokens := map[string]hsm.Token{}
	labels := tokenLabels(def)
	for _, name := range slices.Sorted(maps.Keys(def.Tokens)) {
		tok, err := openToken(ctx, home, labels[name], filepath.Join(dir, pinsFolder, name))
		if err != nil {
			return tokens, fmt.Errorf("token %s: %w", name, err)
		}
		tokens[name] = tok
	}
	return tokens, nil
}

func openHome(dir string) (*softhsm.Home, error) {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return softhsm.Create(dir)
	}
	return softhsm.Open(dir)
}

// openToken opens the token with this label. The PIN is on disk before the
// token is made, so an interruption leaves no token without its PIN; the
// SO-PIN is forgotten, nobody re-initialises a rehearsal's token.
func openToken(ctx context.Context, home *softhsm.Home, label, pinFile string) (hsm.Token, error) {
	pin, err := loadPIN(pinFile)
	if err != nil {
		return nil, err
	}
	defer clear(pin)
	err = home.InitToken(label, []byte(rand.Text()), pin)
	if err != nil && !errors.Is(err, hsm.ErrExists) {
		return nil, fmt.Errorf("make token: %w", err)
	}
	tok, err := pkcs11.Open(ctx, pkcs11.Config{
		Module: home.Module(), URI: "pkcs11:token=" + url.PathEscape(label), PIN: pin,
	})
	if err != nil {
		return nil, fmt.Errorf("open token: %w", err)
	}
	return tok, nil
}

// loadPIN reads the PIN file, or makes it with a random PIN of 128 bits.
func loadPIN(path string) ([]byte, error) {
	pin, err := os.ReadFile(path)
	if err == nil && len(pin) > 0 {
		return pin, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read PIN file: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make PIN folder: %w", err)
	}
	pin = []byte(rand.Text())
	if err := writePIN(path, pin); err != nil {
		return nil, fmt.Errorf("write PIN file: %w", err)
	}
	return pin, nil
}

// writePIN replaces nothing but a file that a kill left empty.
func writePIN(path string, pin []byte) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o400)
	if err != nil {
		return err
	}
	_, err = f.Write(pin)
	return errors.Join(err, f.Sync(), f.Close())
}
