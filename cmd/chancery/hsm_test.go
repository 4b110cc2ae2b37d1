//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal returns both ends of a pseudo-terminal: the person's and the
// program's.
func terminal(t *testing.T) (person, program *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo-terminal here: %v", err)
	}
	t.Cleanup(func() { _ = person.Close() })
	if err := unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo-terminal here: %v", err)
	}
	t.Cleanup(func() { _ = program.Close() })
	return person, program
}

// echoes says whether what is typed would be shown.
func echoes(t *testing.T, f *os.File) bool {
	t.Helper()
	settings, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return settings.Lflag&unix.ECHO != 0
}

// awaitSilence waits until the program reads without echo.
func awaitSilence(t *testing.T, program *os.File) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(2 * time.Minute); echoes(t, program); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("the prompt echoes")
		}
	}
}

func TestAskPIN(t *testing.T) {
	for _, tc := range []struct{ name, typed, want, fault string }{
		{"a PIN", "1234 5678\n", "1234 5678", ""},
		{"nothing", "\n", "", "none was typed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			person, program := terminal(t)
			type answer struct {
				pin []byte
				err error
			}
			answers := make(chan answer, 1)
			var out bytes.Buffer
			go func() {
				pin, err := askPIN(t.Context(), program, &out, "on\x1bline")
				answers <- answer{pin, err}
			}()
			awaitSilence(t, program)
			if _, err := person.WriteString(tc.typed); err != nil {
				t.Fatal(err)
			}
			select {
			case a := <-answers:
				if string(a.pin) != tc.want || (a.err != nil) != (tc.fault != "") || a.err != nil && !strings.Contains(a.err.Error(), tc.fault) {
					t.Errorf("%q, %v; want %q, %q", a.pin, a.err, tc.want, tc.fault)
				}
			case <-time.After(2 * time.Minute):
				t.Fatal("no answer")
			}
			if got, want := out.String(), "PIN of token on?line: \n"; got != want {
				t.Errorf("printed %q, want %q", got, want)
			}
			if !echoes(t, program) {
				t.Error("the terminal stays silent")
			}
		})
	}
	t.Run("interrupted", func(t *testing.T) {
		_, program := terminal(t)
		ctx, cancel := context.WithCancel(t.Context())
		errs := make(chan error, 1)
		var out bytes.Buffer
		go func() {
			_, err := askPIN(ctx, program, &out, "online")
			errs <- err
		}()
		awaitSilence(t, program)
		cancel()
		if err := <-errs; !errors.Is(err, context.Canceled) {
			t.Errorf("error %v, want Canceled", err)
		}
		if !echoes(t, program) {
			t.Error("the terminal stays silent")
		}
	})
	t.Run("no terminal", func(t *testing.T) {
		var out bytes.Buffer
		if _, err := askPIN(t.Context(), strings.NewReader("1234\n"), &out, "online"); !errors.Is(err, errNoTerminal) || out.Len() > 0 {
			t.Errorf("error %v, printed %q; want errNoTerminal", err, &out)
		}
	})
}

func TestFold(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		want       string // lines joined by |
	}{
		{"empty", "", ""},
		{"short", "a b", "a b"},
		{"breaks", "aaa bbb ccc", "aaa bbb|ccc"},
		{"a long word stays whole", "a bbbbbbbbbbbb c", "a|bbbbbbbbbbbb|c"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := strings.Join(fold(tc.text, 7), "|"); got != tc.want {
				t.Errorf("%q, want %q", got, tc.want)
			}
		})
	}
}
