package hsmtest

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm/tpm"
)

// Emulator is a TPM 2.0 of its own: swtpm on a Unix socket in a private folder.
// It serves one connection at a time. It can be killed, restarted, power-cycled
// and hung.
type Emulator struct {
	dir string
	cmd *exec.Cmd
}

// patience bounds every wait for another process: only to end a hang.
const patience = 2 * time.Minute

// SWTPM starts a fresh TPM until the test ends. The test is skipped (or failed,
// see Missing) where swtpm is missing.
func SWTPM(t testing.TB) *Emulator {
	t.Helper()
	if _, err := exec.LookPath("swtpm"); err != nil {
		Missing(t, "swtpm is not installed (Debian: apt install swtpm)")
	}
	// Not t.TempDir: the path of a Unix socket has room for 107 octets.
	dir, err := os.MkdirTemp("", "chancery-swtpm-")
	if err != nil {
		t.Fatal(err)
	}
	e := &Emulator{dir: dir}
	if err := os.Mkdir(e.StateDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		e.Stop(t)
		_ = os.RemoveAll(dir)
	})
	e.Start(t)
	return e
}

// Socket is the path of the socket that speaks TPM commands, for tpm.Config.
func (e *Emulator) Socket() string { return filepath.Join(e.dir, "tpm") }

// Control is the path of swtpm's control channel, where tpm2-tools' swtpm TCTI
// looks for it.
func (e *Emulator) Control() string { return e.Socket() + ".ctrl" }

// StateDir is the folder of the TPM's persistent memory. It may be provisioned
// (swtpm_setup) while the emulator is stopped.
func (e *Emulator) StateDir() string { return filepath.Join(e.dir, "state") }

// KeyDir is a folder for key files, made at the first call.
func (e *Emulator) KeyDir(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(e.dir, "keys")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// Start plugs the TPM in. It returns when it answers.
func (e *Emulator) Start(t testing.TB) {
	t.Helper()
	e.cmd = exec.Command("swtpm", "socket", "--tpm2",
		"--tpmstate", "dir="+e.StateDir(),
		"--server", "type=unixio,path="+e.Socket(),
		"--ctrl", "type=unixio,path="+e.Control(),
		"--flags", "not-need-init,startup-clear")
	e.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := e.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for began := time.Now(); ; <-tick.C {
		conn, err := net.Dial("unix", e.Socket())
		if err == nil {
			_ = conn.Close()
			return
		}
		if time.Since(began) > patience {
			t.Fatalf("swtpm does not listen: %v", err)
		}
	}
}

// Stop kills the emulator, as if the TPM were pulled out. What it held in
// volatile memory is gone. Stopping twice is harmless.
func (e *Emulator) Stop(t testing.TB) {
	t.Helper()
	if e.cmd == nil {
		return
	}
	if err := e.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Error(err)
	}
	_ = e.cmd.Wait() // killed
	e.cmd = nil
	_ = os.Remove(e.Socket())
	_ = os.Remove(e.Control())
}

// Freeze makes the TPM hang until Thaw.
func (e *Emulator) Freeze(t testing.TB) { e.signal(t, syscall.SIGSTOP) }

// Thaw ends a Freeze.
func (e *Emulator) Thaw(t testing.TB) { e.signal(t, syscall.SIGCONT) }

func (e *Emulator) signal(t testing.TB, s syscall.Signal) {
	t.Helper()
	if err := e.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// Reset power-cycles the TPM under its connection, which stays: sessions and
// transient objects are gone, and commands are refused until TPM2_Startup.
func (e *Emulator) Reset(t testing.TB) {
	t.Helper()
	conn, err := net.DialTimeout("unix", e.Control(), patience)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	// CMD_INIT of swtpm's control protocol with no flags; the answer is a code.
	if _, err := conn.Write([]byte{0, 0, 0, 2, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	var answer [4]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		t.Fatal(err)
	}
	if code := binary.BigEndian.Uint32(answer[:]); code != 0 {
		t.Fatalf("swtpm does not reset: code %d", code)
	}
}

// Config returns how to open the TPM with key files in KeyDir. Auth is random
// at each call.
func (e *Emulator) Config(t testing.TB) tpm.Config {
	t.Helper()
	return tpm.Config{Device: e.Socket(), Dir: e.KeyDir(t), Auth: append(RandomID(), RandomID()...), Deadline: patience}
}

// OpenSWTPM returns an open token on a fresh TPM, both until the test ends.
func OpenSWTPM(t testing.TB) *tpm.Token {
	t.Helper()
	return OpenTPM(t, SWTPM(t).Config(t))
}

// OpenTPM opens a TPM until the test ends.
func OpenTPM(t testing.TB, cfg tpm.Config) *tpm.Token {
	t.Helper()
	token, err := tpm.Open(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := token.Close(); err != nil {
			t.Errorf("close TPM: %v", err)
		}
	})
	return token
}

// Forget empties the persistent memory of a stopped emulator: at the next Start
// it is another TPM.
func (e *Emulator) Forget(t testing.TB) {
	t.Helper()
	if err := os.RemoveAll(e.StateDir()); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(e.StateDir(), 0o700); err != nil {
		t.Fatal(err)
	}
}
