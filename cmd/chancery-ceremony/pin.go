package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/chancery-ca/chancery/ceremony"
	"github.com/chancery-ca/chancery/ceremony/durable"
	"github.com/chancery-ca/chancery/hsm"
)

// errPINFile: a PIN file that others could read, or that is not one.
var errPINFile = errors.New("PIN file refused")

// pinFiles are the files of --pin-file TOKEN=PATH and --new-pin-file. It implements pflag.Value.
type pinFiles map[string]string

// String is empty: there is no default, and --help would print it.
func (p pinFiles) String() string { return "" }

// Type is what --help says of the value.
func (p pinFiles) Type() string { return "TOKEN=PATH" }

// Set takes one TOKEN=PATH.
func (p pinFiles) Set(value string) error {
	token, path, ok := strings.Cut(value, "=")
	if !ok || token == "" || path == "" {
		return errors.New("want TOKEN=PATH")
	}
	if _, twice := p[token]; twice {
		return fmt.Errorf("token %s twice", token)
	}
	p[token] = path
	return nil
}

// check wants tokens of the definition.
func (p pinFiles) check(flag string, def *ceremony.Definition) error {
	for token := range p {
		if _, ok := def.Tokens[token]; !ok {
			return usageError{fmt.Errorf("--%s: the definition has no token %.40q", flag, token)}
		}
	}
	return nil
}

// maxPIN bounds a PIN, in octets.
const maxPIN = 255

// readPINFile reads a PIN from a regular file of mode 0400 that belongs to this
// user. One line end at the end does not count.
func readPINFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open PIN file: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("look at PIN file: %w", err)
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !info.Mode().IsRegular() || info.Mode().Perm() != 0o400 || !ok || int(owner.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("%s: want a regular file of mode 0400 that is yours: %w", path, errPINFile)
	}
	pin, err := io.ReadAll(io.LimitReader(f, maxPIN+2))
	if err != nil {
		return nil, fmt.Errorf("read PIN file: %w", err)
	}
	pin = bytes.TrimSuffix(pin, []byte("\n"))
	if len(pin) == 0 || len(pin) > maxPIN {
		return nil, fmt.Errorf("%s: %d octets, want 1 to %d: %w", path, len(pin), maxPIN, errPINFile)
	}
	return pin, nil
}

// pinOf reads a token's PIN from its file, or asks for it, part by part.
func (s *tokenSource) pinOf(ctx context.Context, name string) ([]byte, error) {
	if path, ok := s.pinFiles[name]; ok {
		return readPINFile(path)
	}
	return s.inParts(ctx, name, "PIN of token "+name, s.console.secretOf)
}

// newPINOf reads what a token's PIN becomes from its file, or asks for it twice,
// part by part: nobody else will know it.
func (s *tokenSource) newPINOf(ctx context.Context, name string) ([]byte, error) {
	if path, ok := s.newPINFiles[name]; ok {
		pin, err := readPINFile(path)
		if err == nil {
			err = durable.SyncFile(path) // or a power cut leaves a token whose PIN nobody has
		}
		return pin, err
	}
	return s.inParts(ctx, name, "new PIN of token "+name, s.console.newSecret)
}

// inParts asks the people who share a PIN, one after the other.
func (s *tokenSource) inParts(ctx context.Context, name, what string, ask func(context.Context, string) ([]byte, error)) ([]byte, error) {
	parts := max(s.def.Tokens[name].PINParts, 1)
	var pin []byte
	for i := range parts {
		of := what
		if parts > 1 {
			of = fmt.Sprintf("%s, part %d of %d (another person)", what, i+1, parts)
		}
		part, err := ask(ctx, of)
		if err != nil {
			return nil, fmt.Errorf("ask for the PIN: %w", err)
		}
		pin = append(pin, part...)
		clear(part)
	}
	if len(pin) == 0 || len(pin) > maxPIN {
		return nil, fmt.Errorf("PIN of %d octets, want 1 to %d: %w", len(pin), maxPIN, errPINFile)
	}
	return pin, nil
}

// newPINTries bounds how often someone may type a new PIN's two forms.
const newPINTries = 5

// newSecret asks for what is to be kept, until it was typed twice alike.
func (c *console) newSecret(ctx context.Context, what string) ([]byte, error) {
	c.paragraph("", "Write the "+what+" on its paper before you type it. It is asked for twice.")
	for range newPINTries {
		first, err := c.secretOf(ctx, what)
		if err != nil {
			return nil, err
		}
		again, err := c.secretOf(ctx, what+", again")
		if err != nil {
			clear(first)
			return nil, err
		}
		same := bytes.Equal(first, again) && len(first) > 0
		clear(again)
		if same {
			return first, nil
		}
		clear(first)
		c.line("Not accepted: empty, or not the same twice.")
	}
	return nil, fmt.Errorf("the %s was never the same twice: %w", what, hsm.ErrPIN)
}

// changePIN is what Options.ChangePIN wants. An interrupted change asks again for
// both PINs: which one the token has it finds out itself. In a rehearsal the new
// PIN is made, and takes the old one's place when the token has it.
func (s *tokenSource) changePIN(ctx context.Context, name string, begun bool) (already bool, err error) {
	module, uri, err := s.pkcs11(ctx, name)
	if err != nil {
		return false, err
	}
	if s.def.Environment == ceremony.Production {
		s.console.line("")
		s.console.paragraph("", "The PIN of token "+name+" is changed: first the one that it has, then the new.")
	}
	old, err := s.pin(ctx, name)
	if err != nil {
		return false, err
	}
	defer clear(old)
	if s.def.Environment == ceremony.Rehearsal {
		return s.changePractice(ctx, name, module, uri, old, begun)
	}
	next, err := s.newPINOf(ctx, name)
	if err != nil {
		return false, err
	}
	defer clear(next)
	return changePKCS11(ctx, module, uri, old, next, begun)
}

// newSuffix ends the name of the file with what a practice PIN becomes.
const newSuffix = ".new"

// changePractice changes the PIN of a rehearsal's token. Its file has the old
// PIN until the token has the new one, which is in a file of its own before.
func (s *tokenSource) changePractice(ctx context.Context, name, module, uri string, old []byte, begun bool) (already bool, err error) {
	path := filepath.Join(s.dir, pinsFolder, name)
	if !begun { // that of an earlier rehearsal, which the token has by now
		if err := os.Remove(path + newSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, fmt.Errorf("remove PIN file: %w", err)
		}
	}
	next, err := loadPIN(path + newSuffix)
	if err != nil {
		return false, err
	}
	defer clear(next)
	if !bytes.Equal(old, next) { // else a kill came after the file was replaced
		if already, err = changePKCS11(ctx, module, uri, old, next, begun); err != nil {
			return false, err
		}
	} else {
		already = true
	}
	if err := durable.Replace(path, next, 0o400); err != nil {
		return false, fmt.Errorf("write PIN file: %w", err)
	}
	return already, nil
}
