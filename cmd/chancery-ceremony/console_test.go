package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/chancery-ca/chancery/ceremony"
)

// typed returns the reading end of a pipe into which lines were written.
func typed(t *testing.T, lines string) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	go func() {
		_, _ = w.WriteString(lines)
		_ = w.Close()
	}()
	return r
}

func TestConsolePlain(t *testing.T) {
	var out bytes.Buffer
	c := newConsole(typed(t, "first\r\nsecond\n"), &out)
	q := ceremony.Question{
		Title: "The token signs this certificate.", Why: strings.Repeat("Because it is so. ", 10),
		Facts: []ceremony.Fact{{Name: "label", Text: "evil\x1b[2Jname\u202e"}}, Prompt: "Type it",
	}
	for _, want := range []string{"first", "second"} {
		if got, err := c.Ask(t.Context(), q); err != nil || got != want {
			t.Errorf("answer %q, %v; want %q", got, err, want)
		}
	}
	if _, err := c.Ask(t.Context(), q); err == nil {
		t.Error("an answer after the end of the input")
	}
	for _, line := range strings.Split(out.String(), "\n") {
		if len([]rune(line)) > width {
			t.Errorf("more than %d columns: %s", width, line)
		}
	}
	if strings.ContainsAny(out.String(), "\x1b\u202e") {
		t.Errorf("escapes where there is no terminal, or from a device: %q", out.String())
	}
}

func TestConsoleRefuses(t *testing.T) {
	c := newConsole(typed(t, "yes\n"), &bytes.Buffer{})
	if _, err := c.Ask(t.Context(), ceremony.Question{Live: true}); !errors.Is(err, errNoTerminal) {
		t.Errorf("a decision from a pipe: %v, want errNoTerminal", err)
	}
	if _, err := c.secretOf(t.Context(), "PIN"); !errors.Is(err, errNoTerminal) {
		t.Errorf("a PIN from a pipe: %v, want errNoTerminal", err)
	}
	if _, err := newConsole(nil, &bytes.Buffer{}).Ask(t.Context(), ceremony.Question{}); !errors.Is(err, errNoTerminal) {
		t.Errorf("an answer from nowhere: %v, want errNoTerminal", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := newConsole(r, &bytes.Buffer{}).Ask(ctx, ceremony.Question{}); !errors.Is(err, context.Canceled) {
		t.Errorf("an interrupted question: %v, want context.Canceled", err)
	}
	if _, err := newConsole(typed(t, strings.Repeat("x", 2*maxLine)), &bytes.Buffer{}).Ask(t.Context(), ceremony.Question{}); err == nil {
		t.Error("an endless line was accepted")
	}
}

func TestReadPINFile(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(write("target", "1234", 0o400), link); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ name, path, want string }{
		{"a PIN", write("good", "1234", 0o400), "1234"},
		{"a PIN with a line end", write("line", "1234\n", 0o400), "1234"},
		{"a PIN with spaces", write("spaces", " 12 34 ", 0o400), " 12 34 "},
		{"empty", write("empty", "\n", 0o400), ""},
		{"too long", write("long", strings.Repeat("1", maxPIN+1), 0o400), ""},
		{"group may read", write("group", "1234", 0o440), ""},
		{"all may read", write("all", "1234", 0o444), ""},
		{"owner may write", write("owner", "1234", 0o600), ""},
		{"a link", link, ""},
		{"a folder", dir, ""},
		{"not there", filepath.Join(dir, "none"), ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pin, err := readPINFile(tc.path)
			if diff := cmp.Diff(tc.want, string(pin)); diff != "" || (err == nil) != (tc.want != "") {
				t.Errorf("%v (-want +got):\n%s", err, diff)
			}
			if err != nil && strings.Contains(err.Error(), "1234") {
				t.Errorf("the error shows the PIN: %v", err)
			}
		})
	}
}

func TestPINFiles(t *testing.T) {
	p := pinFiles{}
	for _, tc := range []struct {
		value string
		ok    bool
	}{{"root=/pin", true}, {"root=/other", false}, {"root", false}, {"=x", false}, {"online=", false}, {"online=a=b", true}} {
		if err := p.Set(tc.value); (err == nil) != tc.ok {
			t.Errorf("%s: %v", tc.value, err)
		}
	}
	if diff := cmp.Diff(pinFiles{"root": "/pin", "online": "a=b"}, p); diff != "" {
		t.Error(diff)
	}
}

// A library that is not the definition's is not loaded, nor is a PIN asked for,
// in a resumed ceremony either.
func TestModuleIsCheckedFirst(t *testing.T) {
	library := filepath.Join(t.TempDir(), "lib.so")
	if err := os.WriteFile(library, []byte("not what was agreed on"), 0o600); err != nil {
		t.Fatal(err)
	}
	source := &tokenSource{def: &ceremony.Definition{
		Environment: ceremony.Production,
		Modules:     map[string]ceremony.Module{"m": {Path: library, SHA256: strings.Repeat("0", 64)}},
		Tokens:      map[string]ceremony.Token{"root": {URI: "pkcs11:token=root", Module: "m"}},
	}}
	if _, err := source.inspect(t.Context(), "root"); !errors.Is(err, ceremony.ErrModule) {
		t.Errorf("inspect: %v, want ErrModule", err)
	}
	if _, err := source.open(t.Context(), "root"); !errors.Is(err, ceremony.ErrModule) {
		t.Errorf("open: %v, want ErrModule", err)
	}
}
