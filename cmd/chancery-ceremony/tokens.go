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
	"github.com/chancery-ca/chancery/hsm/tpm"
)

// tokensPossible says, before anything is made, why no token can be.
func tokensPossible() error {
	if _, err := softhsm.Module(); err != nil {
		return fmt.Errorf("%w: %w", errNoModule, err)
	}
	return nil
}

// openTokens makes, or after an interruption finds, one software token for
// each token of the definition and opens them by the definition's names. That is
// a SoftHSM token, unless the definition names an emulated TPM. On an error it
// returns what it has opened.
func openTokens(ctx context.Context, def *ceremony.Definition, dir string) (map[string]hsm.Token, error) {
	home, err := openHome(filepath.Join(dir, tokensFolder))
	if err != nil {
		return nil, err
	}
	tokens := map[string]hsm.Token{}
	labels := tokenLabels(def)
	for _, name := range slices.Sorted(maps.Keys(def.Tokens)) {
		pinFile := filepath.Join(dir, pinsFolder, name)
		tok, err := openEmulator(ctx, def.Tokens[name].URI, filepath.Join(dir, def.Outputs.Dir), pinFile)
		if err == nil && tok == nil {
			tok, err = openToken(ctx, home, labels[name], pinFile)
		}
		if err != nil {
			return tokens, fmt.Errorf("token %s: %w", name, err)
		}
		tokens[name] = tok
	}
	return tokens, nil
}

// openEmulator opens the TPM that uri names if it is an emulator on a Unix
// socket; otherwise it returns nil and no error, having touched nothing: a
// rehearsal does not go near hardware. The folder of its key files, made if it
// is missing, is below outputs unless it is absolute.
func openEmulator(ctx context.Context, uri, outputs, authFile string) (hsm.Token, error) {
	folder, device, ok := splitTPM(uri)
	info, err := os.Stat(device)
	if !ok || err != nil || info.Mode()&fs.ModeSocket == 0 {
		return nil, nil
	}
	seen, err := tpm.Inspect(ctx, device)
	if err != nil {
		return nil, err
	}
	if !hsm.IsSoftware(seen.Token) {
		return nil, nil
	}
	if !filepath.IsAbs(folder) {
		if folder, err = filepath.Abs(filepath.Join(outputs, folder)); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, fmt.Errorf("make folder of key files: %w", err)
	}
	auth, err := loadPIN(authFile)
	if err != nil {
		return nil, err
	}
	defer clear(auth)
	tok, err := tpm.Open(ctx, tpm.Config{Device: device, Dir: folder, Auth: auth})
	if err != nil {
		return nil, fmt.Errorf("open token: %w", err)
	}
	return tok, nil
}

// splitTPM returns the folder and the device of "tpm2:FOLDER?device=PATH".
func splitTPM(uri string) (folder, device string, ok bool) {
	u, err := url.Parse(uri)
	if err != nil || u.Scheme != "tpm2" {
		return "", "", false
	}
	path := u.Path
	if u.Opaque != "" { // a relative one
		if path, err = url.PathUnescape(u.Opaque); err != nil {
			return "", "", false
		}
	}
	device = u.Query().Get("device")
	return path, device, path != "" && device != ""
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
