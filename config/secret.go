package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// maxSecret bounds a secret, in octets.
const maxSecret = 4096

// ErrNoCredential: the reference is to a systemd credential, and this process was
// not started with credentials.
var ErrNoCredential = errors.New("no credentials: the service was not started by systemd with LoadCredential")

// Secret is a reference to a secret, never the secret itself. Its forms are
//
//	credential:NAME   the systemd credential NAME ($CREDENTIALS_DIRECTORY/NAME)
//	file:PATH         a regular file with no permission for group or others,
//	                  owned by this process's user or by root
type Secret struct {
	kind, name string
}

// UnmarshalYAML reads "credential:NAME" or "file:PATH".
func (s *Secret) UnmarshalYAML(unmarshal func(any) error) error {
	var text string
	if err := unmarshal(&text); err != nil {
		return errors.New("a reference is needed: credential:NAME or file:PATH")
	}
	kind, name, ok := strings.Cut(text, ":")
	if !ok || name == "" || (kind != "credential" && kind != "file") {
		// The text is not repeated: it may be the secret.
		return errors.New("a reference is needed: credential:NAME or file:PATH, not a value")
	}
	if kind == "credential" && strings.ContainsAny(name, "/\x00") {
		return errors.New("credential: a name, not a path")
	}
	s.kind, s.name = kind, name
	return nil
}

// MarshalYAML writes the reference.
func (s Secret) MarshalYAML() (any, error) { return s.String(), nil }

// String returns the reference.
func (s Secret) String() string { return s.kind + ":" + s.name }

// FileSecret returns the reference file:path.
func FileSecret(path string) Secret { return Secret{kind: "file", name: path} }

// IsZero says whether there is no reference.
func (s Secret) IsZero() bool { return s.kind == "" }

func (s Secret) check() error {
	if s.IsZero() {
		return errors.New("missing: credential:NAME or file:PATH")
	}
	return nil
}

func (s *Secret) resolve(dir string) {
	if s.kind == "file" && !filepath.IsAbs(s.name) {
		s.name = filepath.Join(dir, s.name)
	}
}

// Read returns the secret without a final newline. The caller overwrites it
// when it has been used.
func (s Secret) Read() ([]byte, error) {
	path := s.name
	if s.kind == "credential" {
		dir := os.Getenv("CREDENTIALS_DIRECTORY")
		if dir == "" {
			return nil, fmt.Errorf("read %s: %w", s, ErrNoCredential)
		}
		path = filepath.Join(dir, s.name)
	}
	// O_NONBLOCK: a pipe in its place would keep us waiting.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0) //nolint:gosec // G703: the operator names the file
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", s, err)
	}
	defer f.Close()
	if s.kind == "file" {
		if err := private(f); err != nil {
			return nil, fmt.Errorf("read %s: %w", s, err)
		}
	}
	secret, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", s, err)
	}
	secret = bytes.TrimSuffix(secret, []byte("\n"))
	if len(secret) == 0 || len(secret) > maxSecret {
		clear(secret)
		return nil, fmt.Errorf("read %s: empty, or over %d octets", s, maxSecret)
	}
	return secret, nil
}

// private refuses a file that others could read or replace.
func private(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return errors.New("not a regular file")
	}
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("mode %04o: others may read it; want 0400", info.Mode().Perm())
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if uid := uint32(os.Getuid()); ok && stat.Uid != uid && stat.Uid != 0 {
		return fmt.Errorf("owned by uid %d, not by this process's user", stat.Uid)
	}
	return nil
}
