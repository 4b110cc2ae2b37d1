package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"github.com/chancery-ca/chancery/ceremony"
)

// errPINFile: a PIN file that others could read, or that is not one.
var errPINFile = errors.New("PIN file refused")

// pinFiles are the files of --pin-file TOKEN=PATH. It implements pflag.Value.
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
func (p pinFiles) check(def *ceremony.Definition) error {
	for token := range p {
		if _, ok := def.Tokens[token]; !ok {
			return usageError{fmt.Errorf("--pin-file: the definition has no token %.40q", token)}
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
	def := s.def.Tokens[name]
	parts := max(def.PINParts, 1)
	var pin []byte
	for i := range parts {
		what := "PIN of token " + name
		if parts > 1 {
			what = fmt.Sprintf("%s, part %d of %d (another person)", what, i+1, parts)
		}
		part, err := s.console.secretOf(ctx, what)
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
