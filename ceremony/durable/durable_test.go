package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	before = "what was there"
	after  = "what is written"
	// fileName is what the test's own program writes in its working directory,
	// if helper says by which operation.
	fileName = "file"
	helper   = "CHANCERY_DURABLE"
)

// operations are what a faulty system is asked to do.
var operations = map[string]func(path string) error{
	"create":  func(path string) error { return Create(path, []byte(after), 0o644) },
	"publish": func(path string) error { return Publish(path, []byte(after), 0o644) },
	"replace": func(path string) error { return Replace(path, []byte(after), 0o644) },
	"folder":  func(path string) error { return MakeFolder(path, 0o755) },
	"sync":    SyncFile,
}

// The calls of one thread are counted: all of the helper's are the first's.
func init() {
	if os.Getenv(helper) != "" {
		runtime.LockOSThread()
	}
}

func TestMain(m *testing.M) {
	operation, ok := operations[os.Getenv(helper)]
	if !ok {
		os.Exit(m.Run())
	}
	if err := operation(fileName); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// traced is a call of the helper that names the file or its folder.
const traced = "write,fsync,linkat,renameat,unlinkat,mkdirat"

// strace runs an operation on the file of a folder, in a process of its own with
// the fault. It returns the calls that were seen and what the operation said:
// nil, or an error.
func strace(t *testing.T, operation, dir, fault string) (string, error) {
	t.Helper()
	log := filepath.Join(t.TempDir(), "calls")
	args := []string{"-qq", "-y", "-o", log, "-e", "trace=" + traced}
	for _, p := range []string{".", fileName, Partial(fileName)} {
		args = append(args, "-P", p, "-P", filepath.Join(dir, p))
	}
	if fault != "" {
		args = append(args, "-e", "inject="+fault)
	}
	cmd := exec.CommandContext(t.Context(), "strace", append(args, os.Args[0])...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), helper+"="+operation)
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, out)
	}
	calls, readErr := os.ReadFile(log)
	if readErr != nil {
		t.Skipf("strace does not work here: %v", errors.Join(err, readErr))
	}
	return string(calls), err
}

func needStrace(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("strace"); err != nil {
		const reason = "strace is not installed"
		if os.Getenv("CHANCERY_REQUIRE_HSM") == "1" { // as hsmtest.Missing, which needs cgo
			t.Fatal(reason)
		}
		t.Skip(reason)
	}
}

var callName = regexp.MustCompile(`(?m)^(\w+)\((.*)$`)

// TestOrder: octets are on the medium before the name is made, and the name
// before success is said.
func TestOrder(t *testing.T) {
	needStrace(t)
	for _, row := range []struct {
		operation string
		want      []string
	}{
		{"create", []string{"write FILE", "fsync FILE"}},
		{"publish", []string{"unlinkat PARTIAL", "write PARTIAL", "fsync PARTIAL", "linkat PARTIAL", "unlinkat PARTIAL", "fsync FOLDER"}},
		{"replace", []string{"unlinkat PARTIAL", "write PARTIAL", "fsync PARTIAL", "renameat PARTIAL", "fsync FOLDER"}},
		{"folder", []string{"mkdirat FILE", "fsync FOLDER"}},
		{"sync", []string{"fsync FILE", "fsync FOLDER"}},
	} {
		t.Run(row.operation, func(t *testing.T) {
			dir := t.TempDir()
			if row.operation == "sync" {
				if err := os.WriteFile(filepath.Join(dir, fileName), []byte(before), 0o400); err != nil {
					t.Fatal(err)
				}
			}
			calls, err := strace(t, row.operation, dir, "")
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, m := range callName.FindAllStringSubmatch(calls, -1) {
				what := "FOLDER"
				switch {
				case strings.Contains(m[2], Partial(fileName)):
					what = "PARTIAL"
				case strings.Contains(m[2], `"file"`), strings.Contains(m[2], "/file>"):
					what = "FILE"
				}
				if call := m[1] + " " + what; len(got) == 0 || got[len(got)-1] != call { // os.Remove tries twice
					got = append(got, call)
				}
			}
			if diff := cmp.Diff(row.want, got); diff != "" {
				t.Errorf("calls (-want +got):\n%s\n%s", diff, calls)
			}
		})
	}
}

// TestFaults fails, and kills, every call of every operation, once each. What is
// left is what the package promises, and the operation can be repeated.
func TestFaults(t *testing.T) {
	needStrace(t)
	for _, row := range []struct {
		operation, call string
		times           int // how often the operation makes the call
	}{
		{"create", "write", 1},
		{"create", "fsync", 1},
		{"publish", "write", 1},
		{"publish", "fsync", 2},
		{"publish", "linkat", 1},
		{"replace", "write", 1},
		{"replace", "fsync", 2},
		{"replace", "renameat", 1},
	} {
		for _, effect := range []string{"error=EIO", "error=ENOSPC", "signal=SIGKILL"} {
			if effect == "error=ENOSPC" && row.call != "write" {
				continue // as the other error
			}
			t.Run(row.operation+" "+row.call+" "+effect, func(t *testing.T) {
				t.Parallel()
				for n := 1; n <= row.times; n++ {
					if !faulty(t, row.operation, fmt.Sprintf("%s:%s:when=%d", row.call, effect, n)) {
						t.Errorf("call %d of %d was not made", n, row.times)
					}
				}
				if effect == "error=EIO" && faulty(t, row.operation, fmt.Sprintf("%s:%s:when=%d", row.call, effect, row.times+1)) {
					t.Errorf("more than %d calls", row.times)
				}
			})
		}
	}
}

// faulty makes one fault. It is false when there was nothing to make it in.
func faulty(t *testing.T, operation, fault string) bool {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, fileName)
	if operation == "replace" {
		if err := os.WriteFile(path, []byte(before), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := strace(t, operation, dir, fault); err == nil {
		return false
	}
	killed := strings.Contains(fault, "SIGKILL")
	content, readErr := os.ReadFile(path)
	has := string(content)
	folderOnly := strings.Contains(fault, "fsync") && strings.Contains(fault, "when=2")
	switch {
	case has == after && (killed || folderOnly): // the name may be lost by a power cut
	case operation == "replace" && has == before:
	case operation == "create" && killed && strings.HasPrefix(after, has):
	case operation != "replace" && errors.Is(readErr, fs.ErrNotExist):
	default:
		t.Errorf("%s: the file has %q (%v)", fault, has, readErr)
	}
	if _, err := os.Lstat(Partial(path)); !killed && !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: the partial file is left: %v", fault, err)
	}
	if operation == "create" && killed {
		return true // its name is taken, and its reader throws it away
	}
	if err := operations[operation](path); err != nil {
		t.Errorf("%s, repeated: %v", fault, err)
	}
	if content, err := os.ReadFile(path); err != nil || string(content) != after {
		t.Errorf("%s, repeated: the file has %q (%v)", fault, content, err)
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("%s, repeated: %d files are left (%v), want 1", fault, len(entries), err)
	}
	return true
}

// TestExists: what is there is not touched by who may not.
func TestExists(t *testing.T) {
	for _, row := range []struct {
		name      string
		operation string
		make      func(path string) error
		want      error
	}{
		{"create on a file", "create", func(p string) error { return os.WriteFile(p, []byte(before), 0o600) }, fs.ErrExist},
		{"create on the same file", "create", func(p string) error { return os.WriteFile(p, []byte(after), 0o600) }, fs.ErrExist},
		{"create on a dangling link", "create", func(p string) error { return os.Symlink(p+".other", p) }, fs.ErrExist},
		{"create on a folder", "create", func(p string) error { return os.Mkdir(p, 0o755) }, fs.ErrExist},
		{"publish on another file", "publish", func(p string) error { return os.WriteFile(p, []byte(before), 0o600) }, fs.ErrExist},
		{"publish on one of the same length", "publish", func(p string) error { return os.WriteFile(p, []byte(strings.ToUpper(after)), 0o600) }, fs.ErrExist},
		{"publish on the same file", "publish", func(p string) error { return os.WriteFile(p, []byte(after), 0o600) }, nil},
		{"publish on a dangling link", "publish", func(p string) error { return os.Symlink(p+".other", p) }, fs.ErrExist},
		{"publish on a folder", "publish", func(p string) error { return os.Mkdir(p, 0o755) }, fs.ErrExist},
		{"publish over a partial file", "publish", func(p string) error { return os.WriteFile(Partial(p), []byte("wh"), 0o600) }, nil},
		{"publish, killed before the end", "publish", func(p string) error {
			return errors.Join(os.WriteFile(Partial(p), []byte(after), 0o600), os.Link(Partial(p), p))
		}, nil},
		{"replace a file", "replace", func(p string) error { return os.WriteFile(p, []byte(before), 0o600) }, nil},
		{"replace a link, not what it names", "replace", func(p string) error {
			return errors.Join(os.WriteFile(p+".other", []byte(before), 0o600), os.Symlink(p+".other", p))
		}, nil},
		{"replace a folder", "replace", func(p string) error { return os.Mkdir(p, 0o755) }, fs.ErrExist},
		{"folder on a folder", "folder", func(p string) error { return os.Mkdir(p, 0o755) }, nil},
		{"folder on a file", "folder", func(p string) error { return os.WriteFile(p, []byte(before), 0o600) }, fs.ErrExist},
		{"folder below a file", "folder", func(p string) error { return os.WriteFile(filepath.Dir(p), []byte(before), 0o600) }, fs.ErrExist},
	} {
		t.Run(row.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), fileName)
			if strings.HasPrefix(row.name, "folder below") {
				path = filepath.Join(path, "below")
			}
			if err := row.make(path); err != nil {
				t.Fatal(err)
			}
			was := listing(t, filepath.Dir(path))
			if err := operations[row.operation](path); !errors.Is(err, row.want) || row.want == nil && err != nil {
				t.Fatalf("error %v, want %v", err, row.want)
			}
			switch is := listing(t, filepath.Dir(path)); {
			case row.want != nil:
				if diff := cmp.Diff(was, is); diff != "" {
					t.Errorf("refused, and changed (-was +is):\n%s", diff)
				}
			case row.operation != "folder":
				if content := is[filepath.Base(path)]; content != "-rw-r--r-- "+after && row.operation == "replace" || !strings.HasSuffix(content, after) {
					t.Errorf("the file is %q", content)
				}
				if _, left := is[filepath.Base(Partial(path))]; left {
					t.Error("the partial file is left")
				}
			}
		})
	}
}

// listing describes what is in a folder, without following links.
func listing(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, syscall.ENOTDIR) {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		content := ""
		switch info.Mode().Type() {
		case 0:
			b, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			content = string(b)
		case fs.ModeSymlink:
			if content, err = os.Readlink(filepath.Join(dir, e.Name())); err != nil {
				t.Fatal(err)
			}
		}
		all[e.Name()] = info.Mode().String() + " " + content
	}
	return all
}

// TestMakeFolder: every folder that got a name is synced above.
func TestMakeFolder(t *testing.T) {
	dir := t.TempDir()
	deep := filepath.Join(dir, "a", "b", "c")
	if err := MakeFolder(deep, 0o755); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(deep); err != nil || !info.IsDir() {
		t.Errorf("no folder: %v", err)
	}
	if err := MakeFolder(deep, 0o755); err != nil {
		t.Errorf("again: %v", err)
	}
	if err := SyncFolder(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v, want ErrNotExist", err)
	}
}
