package test

import (
	"bytes"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestServe runs `chancery serve` as systemd does: with a configuration file,
// a notification socket and the PIN as a credential.
func TestServe(t *testing.T) {
	needSoftHSM(t)
	dir := filepath.Join(t.TempDir(), "demo")
	chancery := binary(t, "chancery")
	must(t, nil, chancery, "demo", "--once", "--dir", dir)
	softhsm := "SOFTHSM2_CONF=" + filepath.Join(dir, "tokens", "softhsm2.conf")
	var state struct{ Issuer, Listen string }
	demoConfig := mustRead(t, filepath.Join(dir, "chancery.yaml"))
	if err := json.Unmarshal(mustRead(t, filepath.Join(dir, "demo.json")), &state); err != nil {
		t.Fatal(err)
	}

	// The demo's issuer is on plain http: serve never accepts that.
	r := command(t, []string{softhsm}, chancery, "serve", "--config", filepath.Join(dir, "chancery.yaml"))
	if r.code != 1 || !strings.Contains(r.stderr, "https") {
		t.Fatalf("serve with an issuer on http: exit status %d\n%s", r.code, r.stderr)
	}

	config := bytes.ReplaceAll(demoConfig, []byte(state.Issuer), []byte("https://idp.example"))
	config = bytes.Replace(config, []byte("file:"+filepath.Join(dir, "pins", "online")), []byte("credential:online"), 1)
	path := filepath.Join(t.TempDir(), "chancery.yaml")
	if err := os.WriteFile(path, config, 0o600); err != nil {
		t.Fatal(err)
	}
	notifications := listenNotify(t)
	cmd := exec.Command(chancery, "serve", "--config", path)
	cmd.Env = append(os.Environ(), softhsm, "CREDENTIALS_DIRECTORY="+filepath.Join(dir, "pins"), "NOTIFY_SOCKET="+notifications.path, "WATCHDOG_USEC=300000")
	log := new(syncBuffer)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	notifications.await(t, "READY=1")
	d := &demo{t: t, dir: dir}
	d.connect()
	if body := d.get("/readyz", http.StatusOK); !strings.Contains(string(body), "SERVING") {
		t.Errorf("readyz: %s", body)
	}
	d.openCheckpoint(t, d.get("/api/v2/checkpoint", http.StatusOK))
	d.openCheckpoint(t, d.get("/log/log1/api/v2/checkpoint", http.StatusOK))
	notifications.await(t, "WATCHDOG=1")

	// A second service on the same state is refused, and harms nothing.
	if r := command(t, []string{softhsm, "CREDENTIALS_DIRECTORY=" + filepath.Join(dir, "pins")}, chancery, "serve", "--config", path); r.code != 1 || lastError(r.stderr) == "" {
		t.Errorf("second service: exit status %d\n%s", r.code, r.stderr)
	}
	d.get("/readyz", http.StatusOK)

	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	notifications.await(t, "STOPPING=1")
	if err := cmd.Wait(); err != nil {
		t.Errorf("serve ended with %v\n%s", err, log)
	}
	pin := string(mustRead(t, filepath.Join(dir, "pins", "online")))
	if strings.Contains(log.String(), pin) {
		t.Error("the log contains the PIN")
	}
}

// notify is the systemd side of sd_notify(3).
type notify struct {
	path string
	conn *net.UnixConn
}

func listenNotify(t *testing.T) *notify {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return &notify{path, conn}
}

// await reads notifications until state comes.
func (n *notify) await(t *testing.T, state string) {
	t.Helper()
	if err := n.conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4096)
	for {
		size, err := n.conn.Read(buf)
		if err != nil {
			t.Fatalf("waiting for %s: %v", state, err)
		}
		for _, line := range strings.Split(string(buf[:size]), "\n") {
			if line == state {
				return
			}
		}
	}
}
