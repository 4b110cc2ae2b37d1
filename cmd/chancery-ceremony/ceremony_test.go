//go:build cgo

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/chancery-ca/chancery/ceremony"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/softhsm"
)

const program = "chancery-ceremony"

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){program: main})
}

const examplePath = "../../config/example/genesis.yaml"

func needSoftHSM(t *testing.T) {
	t.Helper()
	if _, err := softhsm.Module(); err != nil {
		hsmtest.Missing(t, err.Error())
	}
}

func TestScripts(t *testing.T) {
	needSoftHSM(t)
	example, err := filepath.Abs(examplePath)
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("EXAMPLE", example)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"columns": columns, "secret": secret, "flip": flip, "head": head,
		},
	})
}

// columns fails if a line of the last stdout is longer than 80 columns.
func columns(ts *testscript.TestScript, _ bool, _ []string) {
	for _, line := range strings.Split(ts.ReadFile("stdout"), "\n") {
		if n := len([]rune(line)); n > width {
			ts.Fatalf("%d columns: %s", n, line)
		}
	}
}

// secret FILE... fails if the content of a file is in stdout, stderr, or any
// file below out/.
func secret(ts *testscript.TestScript, _ bool, files []string) {
	for _, name := range files {
		pin := ts.ReadFile(name)
		if len(pin) < 20 {
			ts.Fatalf("%s has %d octets", name, len(pin))
		}
		if strings.Contains(ts.ReadFile("stdout")+ts.ReadFile("stderr"), pin) {
			ts.Fatalf("the content of %s was printed", name)
		}
		out := filepath.Join(filepath.Dir(filepath.Dir(ts.MkAbs(name))), "out")
		ts.Check(filepath.WalkDir(out, func(path string, e os.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			content, err := os.ReadFile(path)
			if err == nil && bytes.Contains(content, []byte(pin)) {
				ts.Fatalf("the content of %s is in %s", name, path)
			}
			return err
		}))
	}
}

// flip FILE changes one bit in the middle of a file.
func flip(ts *testscript.TestScript, _ bool, args []string) {
	path := ts.MkAbs(args[0])
	content, err := os.ReadFile(path)
	ts.Check(err)
	content[len(content)/2] ^= 1
	ts.Check(os.WriteFile(path, content, 0o644))
}

// head WORD OUTPUTS DEFINITION puts the hash of a ceremony's last record in the
// place of a word of a definition.
func head(ts *testscript.TestScript, _ bool, args []string) {
	state, err := ceremony.ReadStatus(ts.MkAbs(args[1]))
	ts.Check(err)
	path := ts.MkAbs(args[2])
	content := strings.Replace(ts.ReadFile(args[2]), args[0], fmt.Sprintf("%x", state.Head), 1)
	ts.Check(os.WriteFile(path, []byte(content), 0o644))
}

func TestExitStatus(t *testing.T) {
	production := filepath.Join(t.TempDir(), "production.yaml")
	source, err := os.ReadFile(examplePath)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Replace(string(source), "environment: rehearsal",
		"environment: production\nwindow: {not-before: 2020-12-01T09:00:00Z, not-after: 2020-12-01T18:00:00Z}\n"+
			`modules: {m: {path: /usr/lib/m.so, sha256: "`+strings.Repeat("0", 64)+`"}}`, 1)
	text = strings.ReplaceAll(text, "must-be-empty: true", "module: m, must-be-empty: true")
	if err := os.WriteFile(production, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(t.TempDir(), "broken.yaml")
	if err := os.WriteFile(broken, []byte("version: 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	amongPINs := filepath.Join(t.TempDir(), "pins.yaml")
	if err := os.WriteFile(amongPINs, bytes.Replace(source, []byte("outputs: {dir: out}"), []byte("outputs: {dir: pins/out}"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		args   []string
		status int
		stderr string
	}{
		{"help", nil, 0, ""},
		{"plan", []string{"plan", examplePath}, 0, ""},
		{"unknown command", []string{"party"}, exitUsage, "hint:"},
		{"unknown flag", []string{"plan", "--loud", examplePath}, exitUsage, "hint:"},
		{"no definition", []string{"rehearse"}, exitUsage, "hint:"},
		{"unknown output", []string{"verify", "--output", "xml", "."}, exitUsage, "text or json"},
		{"definition not there", []string{"plan", "nothing.yaml"}, exitFailed, "no such file"},
		{"a name that clears the screen", []string{"plan", "no\x1b[2J\u202eth\xff.yaml"}, exitFailed, "open no?[2J?th?.yaml: no such"},
		{"outputs among the PINs", []string{"rehearse", amongPINs, "--dir", filepath.Join(t.TempDir(), "new")}, exitFailed, "outputs are public"},
		{"definition incomplete", []string{"plan", broken}, exitFailed, "invalid definition"},
		{"run a rehearsal", []string{"run", examplePath, "--dir", t.TempDir()}, exitFailed, "environment is rehearsal"},
		{"run without the module", []string{"run", production, "--dir", filepath.Join(t.TempDir(), "new")}, exitFailed, "window"},
		{"a PIN for another token", []string{"run", production, "--pin-file", "nobody=/dev/null"}, exitUsage, "no token"},
		{"a PIN file without a token", []string{"run", production, "--pin-file", "/dev/null"}, exitUsage, "TOKEN=PATH"},
		{"sign as nobody", []string{"sign", t.TempDir()}, exitUsage, "--as"},
		{"abort without a reason", []string{"abort", t.TempDir()}, exitUsage, "--reason"},
		{"status of nothing", []string{"status", t.TempDir()}, exitFailed, "definition.yaml"},
		{"verify nothing", []string{"verify", t.TempDir()}, exitFailed, "transcript.jsonl"},
		{"resume nothing", []string{"resume", filepath.Join(t.TempDir(), "none")}, exitFailed, "definition.yaml"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			status := run(context.Background(), tc.args, &stdout, &stderr)
			if status != tc.status || !strings.Contains(stderr.String(), tc.stderr) {
				t.Errorf("status %d, want %d; stderr %q, want %q", status, tc.status, &stderr, tc.stderr)
			}
			if status != 0 && !strings.HasPrefix(stderr.String(), program+": error: ") {
				t.Errorf("stderr %q", &stderr)
			}
		})
	}
}

// A rehearsal that is killed (SIGKILL) in the middle of its work is resumed in
// a new process and ends with outputs that verify. Only a kill in the middle of
// a key's generation may leave half a pair; the rehearsal then stops for good
// and says so.
func TestKilledAndResumed(t *testing.T) {
	needSoftHSM(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(t.TempDir(), program)
	if err := os.Symlink(self, bin); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		step    string
		mayStop bool // keys are made after it
	}{{"open", true}, {"key/inter-g1", true}, {"certificate/root", false}, {"outputs", false}} {
		t.Run(tc.step, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "practice")
			args := []string{"rehearse", examplePath, "--dir", dir}
			killAt(t, exec.CommandContext(t.Context(), bin, args...), filepath.Join(dir, "out", ceremony.TranscriptName), tc.step)
			out, err := exec.CommandContext(t.Context(), bin, "resume", filepath.Join(dir, "out")).CombinedOutput()
			switch {
			case err == nil:
				if err := ceremony.Verify(filepath.Join(dir, "out")).Err(); err != nil {
					t.Error(err)
				}
			case tc.mayStop && bytes.Contains(out, []byte(ceremony.ErrStopped.Error())):
				t.Log("half a pair was left: stopped")
			default:
				t.Errorf("resume: %v\n%s", err, out)
			}
		})
	}
}

// killAt runs cmd until the transcript has a record of the step, and kills it.
func killAt(t *testing.T, cmd *exec.Cmd, transcript, step string) {
	t.Helper()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(io.Discard, stdout)
	}()
	want := []byte(`"step":"` + step + `"`)
	look := time.NewTicker(time.Millisecond)
	defer look.Stop()
	for {
		content, err := os.ReadFile(transcript)
		if err == nil && bytes.Contains(content, want) {
			break
		}
		select {
		case <-done: // it was faster than we looked
			_ = cmd.Wait()
			return
		case <-look.C:
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	<-done
	_ = cmd.Wait()
}

// What the tool is made of: no server, no database, no log engine; and no code
// of ours, in any package of it, that could listen or dial.
func TestDependencies(t *testing.T) {
	for _, cgo := range []string{"0", "1"} {
		cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-f", "{{.ImportPath}} {{join .Imports \" \"}}", ".")
		cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("go list with CGO_ENABLED=%s: %v", cgo, err)
		}
		const ours = "github.com/chancery-ca/chancery/"
		for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
			fields := strings.Fields(line)
			for _, banned := range []string{
				"github.com/labstack/", "google.golang.org/grpc", "github.com/google/trillian", "github.com/mattn/go-sqlite3",
				"github.com/sigstore/sigstore-go", "github.com/sigstore/fulcio/pkg/server", "github.com/sigstore/fulcio/pkg/ca", ours + "log/", ours + "ca/server", ours + "config",
			} {
				if strings.HasPrefix(fields[0], banned) {
					t.Errorf("CGO_ENABLED=%s: the ceremony tool contains %s", cgo, fields[0])
				}
			}
			if cgo == "0" && strings.HasPrefix(fields[0], "github.com/miekg/pkcs11") {
				t.Errorf("without cgo the tool contains %s", fields[0])
			}
			for _, imported := range fields[1:] {
				if strings.HasPrefix(fields[0], ours) && (imported == "net" || strings.HasPrefix(imported, "net/http")) {
					t.Errorf("%s imports %s", fields[0], imported)
				}
				// A dot means a module: the standard library may import itself.
				zlint := strings.HasPrefix(fields[0], "github.com/zmap/zlint/") || fields[0] == "github.com/weppos/publicsuffix-go/publicsuffix" // its list of suffixes
				if strings.Contains(fields[0], ".") && strings.HasPrefix(imported, "net/http") && !zlint {
					t.Errorf("%s, which is not zlint, imports %s", fields[0], imported)
				}
			}
		}
	}
}
