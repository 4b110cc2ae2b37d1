package test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// secrecy runs the programs as an ordinary account in a folder of its own, with
// core files allowed, and looks for secrets in everything that can be seen of
// them.
type secrecy struct {
	t       *testing.T
	dir     string // the account's; core files would fall into it
	account *syscall.Credential
	secrets []string
}

// newSecrecy makes the folder. Root runs the programs as nobody: to root every
// process is open, so that it could not see the difference.
func newSecrecy(t *testing.T) *secrecy {
	t.Helper()
	dir, err := os.MkdirTemp("", "chancery-secrets-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &secrecy{t: t, dir: dir}
	if os.Getuid() == 0 {
		s.account = &syscall.Credential{Uid: 65534, Gid: 65534}
		if err := os.Chown(dir, 65534, 65534); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(binary(t, "chancery"))
	if err != nil {
		t.Fatal(err)
	}
	// The test's own folder is closed to the account.
	if err := os.WriteFile(s.path("chancery"), raw, 0o755); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *secrecy) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

// start runs a program as the account, with core files of any size. What it
// prints goes to the buffer.
func (s *secrecy) start(env []string, name string, args ...string) (*exec.Cmd, *syncBuffer) {
	s.t.Helper()
	out := new(syncBuffer)
	cmd := exec.Command("sh", append([]string{"-c", `ulimit -c unlimited && exec "$0" "$@"`, name}, args...)...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, out, out
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + s.dir, "TMPDIR=" + s.dir}, env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.account}
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = cmd.Process.Kill() })
	return cmd, out
}

// run is start to the end. The output must hold no secret. It returns the exit
// status and the output.
func (s *secrecy) run(env []string, name string, args ...string) (int, string) {
	s.t.Helper()
	cmd, out := s.start(env, name, args...)
	var exit *exec.ExitError
	if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
		s.t.Fatal(err)
	}
	s.text("output of "+strings.Join(args, " "), out.String())
	return cmd.ProcessState.ExitCode(), out.String()
}

// secret names something that must not be seen from now on.
func (s *secrecy) secret(value []byte) {
	s.t.Helper()
	text := strings.TrimSpace(string(value))
	if len(text) < 8 {
		s.t.Fatalf("secret of %d octets: it would be found everywhere", len(text))
	}
	s.secrets = append(s.secrets, text)
}

// text fails the test if a secret is in text.
func (s *secrecy) text(where, text string) {
	s.t.Helper()
	for _, secret := range s.secrets {
		if strings.Contains(text, secret) {
			s.t.Errorf("%s holds a secret", where)
		}
	}
}

// files looks into every file of the account but those that are allowed.
func (s *secrecy) files(allowed ...string) {
	s.t.Helper()
	s.filesOf(s.dir, allowed...)
}

// filesOf looks into every file below dir but those that are allowed, in which a
// secret must be.
func (s *secrecy) filesOf(dir string, allowed ...string) {
	s.t.Helper()
	seen := map[string]bool{}
	for _, secret := range s.secrets {
		for _, path := range grep(s.t, dir, secret) {
			seen[path] = true
		}
	}
	for _, path := range allowed {
		if !seen[path] {
			s.t.Errorf("the secret was not found in %s: it would not be found elsewhere either", path)
		}
		delete(seen, path)
	}
	for path := range seen {
		s.t.Errorf("file %s holds a secret", path)
	}
}

// process looks at what the system shows of a process and its children.
func (s *secrecy) process(pid int) {
	s.t.Helper()
	for _, one := range append(children(s.t, pid), pid) {
		for _, name := range []string{"cmdline", "environ", "comm", "status", "maps"} {
			content, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", one, name))
			if err != nil && os.Getuid() == 0 && (one == pid || !ended(err)) {
				s.t.Errorf("read %s: %v", name, err)
			}
			s.text(fmt.Sprintf("/proc/%d/%s", one, name), string(content))
		}
	}
}

// ended says that a process is no more, as a child may be that was just listed.
func ended(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH)
}

// sealed expects that the process leaves no core file and that its own account
// cannot read its memory, and that another process of the account is open.
func (s *secrecy) sealed(pid int) {
	s.t.Helper()
	other, _ := s.start(nil, "sleep", "3600")
	defer func() { _ = other.Process.Kill(); _ = other.Wait() }()
	eventually(s.t, "an open process", func() bool { return owner(s.t, other.Process.Pid) != 0 })
	if uid := owner(s.t, pid); uid != 0 {
		s.t.Errorf("/proc/PID/mem belongs to user %d, want root", uid)
	}
	for _, row := range []struct {
		pid  int
		open bool
	}{{other.Process.Pid, true}, {pid, false}} {
		status, out := s.run(nil, "cat", fmt.Sprintf("/proc/%d/environ", row.pid))
		if (status == 0) != row.open {
			s.t.Errorf("the account reads the environment of process %d: exit status %d, want success: %t\n%s", row.pid, status, row.open, out)
		}
	}
	for _, line := range strings.Split(string(mustRead(s.t, fmt.Sprintf("/proc/%d/limits", pid))), "\n") {
		if rest, ok := strings.CutPrefix(line, "Max core file size"); ok && strings.Fields(rest)[1] != "0" {
			s.t.Errorf("core files are limited to %s, want 0", rest)
		}
	}
}

// owner is the user to whom a process's memory belongs.
func owner(t *testing.T, pid int) uint32 {
	t.Helper()
	info, err := os.Stat(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Uid
}

// children lists the processes below pid.
func children(t *testing.T, pid int) []int {
	t.Helper()
	var all []int
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, list := range lists {
		raw, err := os.ReadFile(list)
		if err != nil {
			continue // the thread has ended
		}
		for _, field := range strings.Fields(string(raw)) {
			if child, err := strconv.Atoi(field); err == nil {
				all = append(append(all, child), children(t, child)...)
			}
		}
	}
	return all
}

// cores lists the core files in the account's folder.
func (s *secrecy) cores() []string {
	s.t.Helper()
	var found []string
	err := filepath.WalkDir(s.dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() && strings.HasPrefix(e.Name(), "core") {
			if raw, err := os.ReadFile(path); err == nil && bytes.HasPrefix(raw, []byte("\x7fELF")) {
				found = append(found, path)
			}
		}
		return nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return found
}

// abort ends a process as the watchdog does. It must dump its goroutines, no
// secret among them, and no core, though another process here would.
func (s *secrecy) abort(cmd *exec.Cmd, out *syncBuffer) {
	s.t.Helper()
	if status, _ := s.run(nil, "sh", "-c", "kill -ABRT $$"); status == 0 {
		s.t.Error("the shell survived")
	}
	control := s.cores()
	for _, path := range control {
		_ = os.Remove(path)
	}
	if len(control) == 0 {
		s.t.Logf("this machine leaves no core files here (%s): their absence shows nothing", strings.TrimSpace(string(mustRead(s.t, "/proc/sys/kernel/core_pattern"))))
	}
	if err := cmd.Process.Signal(syscall.SIGABRT); err != nil {
		s.t.Fatal(err)
	}
	_ = cmd.Wait()
	if status := cmd.ProcessState.Sys().(syscall.WaitStatus); !status.Signaled() || status.CoreDump() {
		s.t.Errorf("the end: signalled %t, core dumped %t; want a signal and no core", status.Signaled(), status.CoreDump())
	}
	if text := out.String(); !strings.Contains(text, "goroutine ") {
		s.t.Errorf("no goroutine was dumped:\n%s", text)
	}
	s.text("dump", out.String())
	for _, path := range s.cores() {
		s.t.Errorf("core file %s", path)
	}
}

// TestSecretsAppearNowhere: the PIN of the demo's token is in one file, and in
// nothing else that a service, its commands and its end leave or show.
func TestSecretsAppearNowhere(t *testing.T) {
	needSoftHSM(t)
	s := newSecrecy(t)
	chancery, dir := s.path("chancery"), s.path("demo")

	t.Run("demo", func(t *testing.T) {
		s.t = t
		cmd, out := s.start([]string{"GOTRACEBACK=crash"}, chancery, "demo", "--dir", dir)
		eventually(t, "a demo", func() bool { return strings.Contains(out.String(), "Stop with Ctrl-C") })
		s.secret(mustRead(t, filepath.Join(dir, "pins", "online")))
		d := &demo{t: t, dir: dir}
		d.connect()
		d.get("/readyz", http.StatusOK)
		s.process(cmd.Process.Pid)
		s.sealed(cmd.Process.Pid)
		s.abort(cmd, out)
		s.files("demo/pins/online")
	})

	t.Run("serve", func(t *testing.T) {
		s.t = t
		config := s.path("chancery.yaml")
		if err := os.WriteFile(config, mustRead(t, serveConfig(t, dir)), 0o644); err != nil {
			t.Fatal(err)
		}
		credentials := s.path("demo", "pins")
		env := []string{"SOFTHSM2_CONF=" + filepath.Join(dir, "tokens", "softhsm2.conf"), "CREDENTIALS_DIRECTORY=" + credentials, "GOTRACEBACK=crash"}
		cmd, out := s.start(env, chancery, "serve", "--config", config, "--log-level", "debug")
		eventually(t, "a service", func() bool { return strings.Contains(out.String(), "msg=serving") })
		d := &demo{t: t, dir: dir}
		d.connect()
		s.text("readyz", string(d.get("/readyz", http.StatusOK)))
		d.post("/api/v1/timestamp", "application/json",
			[]byte(`{"artifactHash":"47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=","hashAlgorithm":"sha256"}`), http.StatusOK)
		for _, args := range [][]string{
			{"hsm", "info"}, {"hsm", "list"}, {"hsm", "test", "intermediate"}, {"hsm", "attest", "intermediate"}, {"config", "check"},
		} {
			status, text := s.run(env, chancery, append(args, "--config", config)...)
			if status != 0 {
				t.Errorf("%s: exit status %d\n%s", strings.Join(args, " "), status, text)
			}
		}
		s.process(cmd.Process.Pid)
		s.sealed(cmd.Process.Pid)
		s.abort(cmd, out)
		s.files("demo/pins/online")
	})

	t.Run("refused PIN", func(t *testing.T) {
		s.t = t
		wrong := s.path("wrong")
		if err := os.Mkdir(wrong, 0o755); err != nil {
			t.Fatal(err)
		}
		pin := []byte("wrong-pin-4711-0815")
		if err := os.WriteFile(filepath.Join(wrong, "online"), pin, 0o400); err != nil {
			t.Fatal(err)
		}
		s.own(filepath.Join(wrong, "online"))
		s.secret(pin)
		env := []string{"SOFTHSM2_CONF=" + filepath.Join(dir, "tokens", "softhsm2.conf"), "CREDENTIALS_DIRECTORY=" + wrong}
		if status, out := s.run(env, chancery, "serve", "--config", s.path("chancery.yaml"), "--log-level", "debug"); status != 77 {
			t.Errorf("exit status %d, want 77\n%s", status, out)
		}
		s.files("demo/pins/online", "wrong/online")
	})
}

// TestTPMAuthAppearsNowhere: the authorisation value of a TPM's keys is in the
// file that the configuration names, and in nothing else that a rehearsal, a
// service on the TPM, its commands and its end leave or show. So is the PIN of
// the token beside it.
func TestTPMAuthAppearsNowhere(t *testing.T) {
	needSoftHSM(t)
	site := newTPMSite(t, "inter-g1", "tsa-1")
	site.bind()
	site.site.write(t, site.settings)
	s := newSecrecy(t)
	whole := filepath.Dir(filepath.Dir(site.dir)) // the ceremony's folder and the site's
	var files []string
	for _, token := range []string{"tpm", "online"} {
		pin := strings.TrimPrefix(site.settings["tokens"].(map[string]any)[token].(map[string]any)["pin"].(string), "file:")
		s.secret(mustRead(t, pin))
		rel, err := filepath.Rel(whole, pin)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, rel)
	}
	s.text("output of rehearse", site.rehearsal)
	s.adopt(whole)
	s.adopt(filepath.Dir(site.tpm.Socket()))

	chancery := s.path("chancery")
	// An emulator serves one program at a time, so the commands come first.
	run := func(args ...string) {
		t.Helper()
		if status, text := s.run(site.env, chancery, append(args, "--config", site.config)...); status != 0 {
			t.Errorf("%s: exit status %d\n%s", strings.Join(args, " "), status, text)
		}
	}
	run("config", "check")
	run("init")
	run("hsm", "info")
	run("hsm", "list")
	run("hsm", "test", "intermediate", "--duration", "100ms")
	run("hsm", "attest", "intermediate", "--nonce", strings.Repeat("5a", 32), "--out", site.path("evidence"))
	run("hsm", "bench", "tsa", "--duration", "100ms")
	cmd, out := s.start(append([]string{"GOTRACEBACK=crash"}, site.env...), chancery, "serve", "--config", site.config, "--log-level", "debug")
	eventually(t, "a service", func() bool { return strings.Contains(out.String(), "msg=serving") })
	s.text("readyz", string(site.get("/readyz", http.StatusOK)))
	site.awaitKeys(t)
	site.certificate(t, site.idp, http.StatusOK)
	s.process(cmd.Process.Pid)
	s.sealed(cmd.Process.Pid)
	s.abort(cmd, out)
	run("log", "status", "--counter")

	// A wrong value is refused, and is not shown either.
	wrong := site.path("wrong")
	if err := os.WriteFile(wrong, []byte("wrong-value-4711-0815-4711-0815-4711"), 0o400); err != nil {
		t.Fatal(err)
	}
	s.own(wrong)
	s.secret(mustRead(t, wrong))
	site.settings["tokens"].(map[string]any)["tpm"].(map[string]any)["pin"] = "file:" + wrong
	site.site.write(t, site.settings)
	if status, out := s.run(site.env, chancery, "serve", "--config", site.config, "--log-level", "debug"); status != 77 {
		t.Errorf("wrong value: exit status %d, want 77\n%s", status, out)
	}
	s.filesOf(whole, append(files, "001/site/wrong")...)
}

// adopt gives everything below dir to the account, and lets it get there.
func (s *secrecy) adopt(dir string) {
	s.t.Helper()
	if s.account == nil {
		return
	}
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, int(s.account.Uid), int(s.account.Gid))
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// own gives a file to the account.
func (s *secrecy) own(path string) {
	s.t.Helper()
	if s.account == nil {
		return
	}
	if err := os.Chown(path, int(s.account.Uid), int(s.account.Gid)); err != nil {
		s.t.Fatal(err)
	}
}
