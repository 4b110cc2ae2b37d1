package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/chancery-ca/chancery/ceremony"
	"github.com/chancery-ca/chancery/ceremony/durable"
	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/tpm"
)

// tokenSource opens the tokens of a ceremony when they are needed: those that
// the definition names or, for a rehearsal, software tokens in their place.
type tokenSource struct {
	def      *ceremony.Definition
	dir      string // the ceremony's folder
	out      string // its outputs
	before   string // the outputs of the ceremony that this one continues, or ""
	console  *console
	pinFiles pinFiles
	// newPINFiles have what the PINs become.
	newPINFiles pinFiles
	soft        softTokens // of a rehearsal
}

// tpmFolder is where the key files of a TPM are, below the outputs, if its URI
// names no folder.
const tpmFolder = "tpm"

// inspect describes a token without a login.
func (s *tokenSource) inspect(ctx context.Context, name string) (hsm.Inspection, error) {
	folder, device, isTPM, err := s.tpm(ctx, name)
	if err != nil {
		return hsm.Inspection{}, err
	}
	if isTPM {
		seen, err := tpm.Inspect(ctx, device)
		seen.Token.Label = folder // as the opened token has it
		return seen, err
	}
	module, uri, err := s.pkcs11(ctx, name)
	if err != nil {
		return hsm.Inspection{}, err
	}
	return inspectPKCS11(ctx, module, uri)
}

// open logs in to a token.
func (s *tokenSource) open(ctx context.Context, name string) (hsm.Token, error) {
	folder, device, isTPM, err := s.tpm(ctx, name)
	switch {
	case err != nil:
		return nil, err
	case isTPM:
		return s.openTPM(ctx, name, folder, device)
	}
	module, uri, err := s.pkcs11(ctx, name) // before anybody types a PIN
	if err != nil {
		return nil, err
	}
	pin, err := s.pin(ctx, name)
	if err != nil {
		return nil, err
	}
	defer clear(pin)
	return openPKCS11(ctx, module, uri, pin)
}

func (s *tokenSource) openTPM(ctx context.Context, name, folder, device string) (hsm.Token, error) {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, fmt.Errorf("make folder of key files: %w", err)
	}
	auth, err := s.pin(ctx, name)
	if err != nil {
		return nil, err
	}
	defer clear(auth)
	tok, err := tpm.Open(ctx, tpm.Config{Device: device, Dir: folder, Auth: auth})
	if err != nil {
		return nil, err // not a nil *Token in an interface
	}
	return tok, nil
}

// pin is what opens the token. A rehearsal makes it.
func (s *tokenSource) pin(ctx context.Context, name string) ([]byte, error) {
	if s.def.Environment == ceremony.Rehearsal {
		return loadPIN(filepath.Join(s.dir, pinsFolder, name))
	}
	return s.pinOf(ctx, name)
}

// pkcs11 returns the library and the URI of a token, which a rehearsal makes
// first, and pairs with the one that gets its backups.
func (s *tokenSource) pkcs11(ctx context.Context, name string) (module, uri string, err error) {
	t := s.def.Tokens[name]
	if s.def.Environment != ceremony.Rehearsal {
		m := s.def.Modules[t.Module]
		return m.Path, t.URI, m.Check()
	}
	if err := s.pairUp(ctx); err != nil {
		return "", "", err
	}
	return s.makeSoft(name)
}

// makeSoft makes a rehearsal's token, or finds it. Its PINs are on disk before.
func (s *tokenSource) makeSoft(name string) (module, uri string, err error) {
	soPIN, err := loadPIN(filepath.Join(s.dir, pinsFolder, name+officerSuffix))
	if err != nil {
		return "", "", err
	}
	defer clear(soPIN)
	pin, err := loadPIN(filepath.Join(s.dir, pinsFolder, name))
	if err != nil {
		return "", "", err
	}
	defer clear(pin)
	label := tokenLabels(s.def)[name]
	module, err = s.soft.make(filepath.Join(s.dir, tokensFolder), label, soPIN, pin)
	return module, "pkcs11:token=" + url.PathEscape(label), err
}

// tpm returns the folder of key files and the device if the token is a TPM. A
// rehearsal uses emulators alone, and makes a SoftHSM token in place of
// hardware: it does not go near it.
func (s *tokenSource) tpm(ctx context.Context, name string) (folder, device string, ok bool, err error) {
	folder, device, ok = splitTPM(s.def.Tokens[name].URI)
	if !ok {
		return "", "", false, nil
	}
	if s.def.Environment == ceremony.Rehearsal {
		if ok, err = emulated(ctx, device); !ok || err != nil {
			return "", "", false, err
		}
	}
	folder, err = s.keyFolder(name, folder)
	return folder, device, true, err
}

// keyFolder returns the absolute path of a TPM's key files. The first ceremony
// has them below its outputs unless the URI names another place. A later one
// goes on with them: where no folder is named, in their place; where one of the
// outputs is, with copies in its own outputs, because keys.yaml names them there.
func (s *tokenSource) keyFolder(name, folder string) (string, error) {
	if filepath.IsAbs(folder) {
		return folder, nil
	}
	if s.def.Previous != nil && s.before == "" {
		return "", usageError{fmt.Errorf("token %s: its key files are in the outputs before: --previous is needed, also to resume", name)}
	}
	if folder == "" && s.before != "" {
		return folderBefore(filepath.Join(s.before, "keys.yaml"), name, filepath.Join(s.out, tpmFolder, name))
	}
	if folder == "" {
		folder = filepath.Join(tpmFolder, name)
	}
	own, err := filepath.Abs(filepath.Join(s.out, folder))
	if err == nil && s.before != "" {
		err = copyKeyFiles(filepath.Join(s.before, folder), own)
	}
	return own, err
}

// folderBefore returns where the key files of a token are, as a keys.yaml says
// that names none in its outputs, and other if it has no key there.
func folderBefore(keys, token, other string) (string, error) {
	ring, err := trust.LoadKeyRing(keys)
	if err != nil {
		return "", err
	}
	for _, k := range ring.Keys {
		if file, _, ok := splitTPM(k.URI); ok && k.Token == token && filepath.IsAbs(file) {
			return filepath.Dir(file), nil
		}
	}
	return filepath.Abs(other)
}

// maxKeyFile bounds a key file and what is beside it, in octets.
const maxKeyFile = 64 << 10

// copyKeyFiles copies what is in a folder of key files and is not in another,
// whole. A file that differs there is refused (fs.ErrExist). They open nothing
// but in their own TPM.
func copyKeyFiles(from, to string) error {
	entries, err := os.ReadDir(from)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the token is new
	}
	if err == nil {
		err = durable.MakeFolder(to, 0o700)
	}
	if err != nil {
		return fmt.Errorf("copy key files: %w", err)
	}
	for _, e := range entries {
		if !e.Type().IsRegular() || strings.HasPrefix(e.Name(), ".") { // not finished
			continue
		}
		content, err := readFile(filepath.Join(from, e.Name()), maxKeyFile)
		if err == nil {
			err = durable.Publish(filepath.Join(to, e.Name()), content, 0o600)
		}
		if err != nil {
			return fmt.Errorf("copy key file %s: %w", e.Name(), err)
		}
	}
	return nil
}

// emulated says whether device is an emulator on a Unix socket; anything else
// is not touched.
func emulated(ctx context.Context, device string) (bool, error) {
	info, err := os.Stat(device)
	if err != nil || info.Mode()&fs.ModeSocket == 0 {
		return false, nil
	}
	seen, err := tpm.Inspect(ctx, device)
	return err == nil && hsm.IsSoftware(seen.Token), err
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
	return path, device, device != ""
}

// tokenLabels gives each token of the definition the label that it has there,
// or its name when the label is missing or not the only one.
func tokenLabels(def *ceremony.Definition) map[string]string {
	count := map[string]int{}
	for name, t := range def.Tokens {
		count[t.Label()]++
		count[name]++
	}
	labels := map[string]string{}
	for name, t := range def.Tokens {
		labels[name] = name
		if l := t.Label(); l != "" && count[l] == 1 {
			labels[name] = l
		}
	}
	return labels
}

// loadPIN reads the PIN file of a rehearsal, or makes it with a random PIN of
// 128 bits. It is on disk before the token is made, so an interruption leaves
// no token without its PIN.
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
	if err := durable.Replace(path, pin, 0o400); err != nil { // it may be there, and empty
		return nil, fmt.Errorf("write PIN file: %w", err)
	}
	return pin, nil
}
