package hsmtest

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// remoteModule is p11-kit's client library, in the places of distributions.
var remoteModule = []string{
	"/usr/lib/x86_64-linux-gnu/pkcs11/p11-kit-client.so",
	"/usr/lib/aarch64-linux-gnu/pkcs11/p11-kit-client.so",
	"/usr/lib64/pkcs11/p11-kit-client.so",
	"/usr/lib/pkcs11/p11-kit-client.so",
}

// Remote is SoftHSM in another process, reached over a Unix socket through
// p11-kit: a device that can be unplugged. There is one for the process at a
// time, because the client library reads the socket's place from the
// environment.
type Remote struct {
	// Token is the fresh token as this process sees it: its module is the
	// client library.
	Token SoftHSMToken

	real   string // SoftHSM's library, or the shim's
	shim   *Shim  // nil if the server does not use it
	socket string
	cmd    *exec.Cmd
}

// NewRemote makes a fresh token and starts a server for it until the test
// ends. The test is skipped (or failed, see Missing) where p11-kit or SoftHSM
// is missing.
func NewRemote(t testing.TB) *Remote {
	t.Helper()
	return newRemote(t, NewSoftHSM(t), nil)
}

// NewRemote is the function of that name, with the shim in the server. What
// the shim counts of the server's sessions starts again when it is killed.
func (s *Shim) NewRemote(t testing.TB) *Remote {
	t.Helper()
	return newRemote(t, s.NewToken(t), s)
}

func newRemote(t testing.TB, local SoftHSMToken, shim *Shim) *Remote {
	t.Helper()
	kit, err := exec.LookPath("p11-kit")
	if err != nil {
		Missing(t, "p11-kit is not installed (Debian: apt install p11-kit p11-kit-modules)")
	}
	r := &Remote{Token: local, real: local.Module, shim: shim, socket: filepath.Join(filepath.Dir(sharedHome(t).Dir()), "p11")}
	r.Token.Module = ""
	for _, path := range remoteModule {
		if _, err := os.Stat(path); err == nil {
			r.Token.Module = path
		}
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(kit), "..", "libexec", "p11-kit", "p11-kit-server")); err != nil || r.Token.Module == "" {
		Missing(t, "p11-kit's server or client module is not installed (Debian: apt install p11-kit p11-kit-modules)")
	}
	if err := os.Setenv("P11_KIT_SERVER_ADDRESS", "unix:path="+r.socket); err != nil {
		t.Fatal(err)
	}
	r.Start(t)
	t.Cleanup(func() { r.Kill(t) })
	return r
}

// Start plugs the device in. It returns when the socket answers.
func (r *Remote) Start(t testing.TB) {
	t.Helper()
	// The server forks; in the foreground and in a group of its own the whole
	// of it can be killed.
	r.cmd = exec.Command("p11-kit", "server", "--foreground", "--name", r.socket, "--provider", r.real, "pkcs11:")
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for began := time.Now(); ; <-tick.C {
		conn, err := net.Dial("unix", r.socket)
		if err == nil {
			_ = conn.Close()
			return
		}
		if time.Since(began) > patience {
			t.Fatalf("p11-kit server does not listen: %v", err)
		}
	}
}

// Kill unplugs the device: the server and every process that it forked.
func (r *Remote) Kill(t testing.TB) {
	t.Helper()
	if r.cmd == nil {
		return
	}
	if err := syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		t.Error(err)
	}
	_ = r.cmd.Wait() // killed
	r.cmd = nil
	_ = os.Remove(r.socket)
	if r.shim != nil {
		r.shim.Forget()
	}
}
