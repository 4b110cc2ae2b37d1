package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/softhsm"
)

func TestMain(m *testing.M) {
	reportEvery = time.Hour
	testscript.Main(m, map[string]func(){"chancery": main})
}

// TestScripts runs the command lines in testdata as a person would. Beside
// testscript's own commands there are `exits STATUS PROGRAM …`, `logs`,
// `cut FILE LINES`, which keeps the first lines of a file, and
// `replace OLD NEW FILE COPY`, which writes a file with another text.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			if module, err := softhsm.Module(); err == nil {
				env.Setenv("SOFTHSM", module)
			}
			example, err := os.ReadFile("../../config/example/chancery.yaml")
			if err != nil {
				return err
			}
			return os.WriteFile(env.Getenv("WORK")+"/example.yaml", example, 0o600)
		},
		Condition: func(name string) (bool, error) {
			if name != "softhsm" {
				return false, fmt.Errorf("unknown condition %q", name)
			}
			_, err := softhsm.Module()
			if err != nil && os.Getenv("CHANCERY_REQUIRE_HSM") == "1" {
				return false, err
			}
			return err == nil, nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){"exits": exits, "logs": logs, "cut": cut, "replace": replace},
	})
}

func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits STATUS PROGRAM [ARG …]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit status %d, want %d", got, want)
	}
}

func cut(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: cut FILE LINES")
	}
	keep, err := strconv.Atoi(args[1])
	ts.Check(err)
	lines := strings.SplitAfter(ts.ReadFile(args[0]), "\n")
	if len(lines) < keep {
		ts.Fatalf("%s has %d lines", args[0], len(lines))
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(strings.Join(lines[:keep], "")), 0o600))
}

func replace(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 4 {
		ts.Fatalf("usage: replace OLD NEW FILE COPY")
	}
	before := ts.ReadFile(args[2])
	if !strings.Contains(before, args[0]) {
		ts.Fatalf("%s has no %q", args[2], args[0])
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[3]), []byte(strings.ReplaceAll(before, args[0], args[1])), 0o600))
}

func TestExitStatus(t *testing.T) {
	tests := []struct {
		err  error
		want int
	}{
		{errors.New("disk full"), exitFailed},
		{&usageError{errors.New("no FILE"), "chancery sign"}, exitUsage},
		{fmt.Errorf("open token: %w", hsm.ErrPIN), exitRefused},
		{hint(fmt.Errorf("open key: %w", hsm.ErrMismatch), "look"), exitRefused},
		{fmt.Errorf("open key: %w", hsm.ErrPolicy), exitRefused},
		{fmt.Errorf("sign: %w", hsm.ErrBusy), exitFailed},
		{errors.Join(fmt.Errorf("open token: %w", hsm.ErrPIN), errors.New("close")), exitRefused},
	}
	for _, test := range tests {
		if got := exitStatus(test.err); got != test.want {
			t.Errorf("exit status of %q is %d, want %d", test.err, got, test.want)
		}
	}
}

func TestQuote(t *testing.T) {
	for path, want := range map[string]string{
		"/tmp/demo": "/tmp/demo", "/tmp/my demo": "'/tmp/my demo'", "/tmp/it's": `'/tmp/it'\''s'`, "/tmp/$(x)": "'/tmp/$(x)'",
	} {
		if got := quote(path); got != want {
			t.Errorf("quote(%q) = %s, want %s", path, got, want)
		}
	}
}
