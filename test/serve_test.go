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
	"syscall"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// TestServe runs `chancery serve` as systemd does: with a configuration file,
// a notification socket and the PIN as a credential.
func TestServe(t *testing.T) {
	needSoftHSM(t)
	dir := filepath.Join(t.TempDir(), "demo")
	chancery := binary(t, "chancery")
	must(t, nil, chancery, "demo", "--once", "--dir", dir)
	softhsm := "SOFTHSM2_CONF=" + filepath.Join(dir, "tokens", "softhsm2.conf")

	// The demo's issuer is on plain http: serve never accepts that.
	r := command(t, []string{softhsm}, chancery, "serve", "--config", filepath.Join(dir, "chancery.yaml"))
	if r.code != 1 || !strings.Contains(r.stderr, "https") {
		t.Fatalf("serve with an issuer on http: exit status %d\n%s", r.code, r.stderr)
	}

	path := serveConfig(t, dir)
	cmd, notifications, log := startServe(t, dir, path)
	notifications.await(t, "READY=1")
	d := &demo{t: t, dir: dir}
	d.connect()
	if body := d.get("/readyz", http.StatusOK); !strings.Contains(string(body), "SERVING") {
		t.Errorf("readyz: %s", body)
	}
	d.openCheckpoint(t, d.get("/api/v2/checkpoint", http.StatusOK))
	d.openCheckpoint(t, d.get("/log/log1/api/v2/checkpoint", http.StatusOK))
	notifications.await(t, "WATCHDOG=1")

	// The identity provider is nowhere: its users are kept out, and the operator
	// sees it.
	eventually(t, "an unhealthy issuer", func() bool {
		r := command(t, nil, chancery, "status", "--config", path)
		return r.code == 0 && strings.HasPrefix(r.stdout, "service     ready\n") && strings.Contains(r.stdout, "issuer      https://idp.example: 0 keys; unhealthy: ")
	})

	// A second service on the same state is refused, and harms nothing.
	if r := command(t, []string{softhsm, "CREDENTIALS_DIRECTORY=" + filepath.Join(dir, "pins")}, chancery, "serve", "--config", path); r.code != 1 || lastError(r.stderr) == "" || !strings.Contains(r.stderr, "\nhint: is the service running already?") {
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

// serveConfig makes a configuration for serve from a demo's: an issuer on
// https, the PIN as a credential, and more lines for the token.
func serveConfig(t *testing.T, dir string, token ...string) string {
	t.Helper()
	var state struct{ Issuer string }
	if err := json.Unmarshal(mustRead(t, filepath.Join(dir, "demo.json")), &state); err != nil {
		t.Fatal(err)
	}
	config := bytes.ReplaceAll(mustRead(t, filepath.Join(dir, "chancery.yaml")), []byte(state.Issuer), []byte("https://idp.example"))
	pin := "pin: file:" + filepath.Join(dir, "pins", "online")
	if !bytes.Contains(config, []byte(pin)) {
		t.Fatalf("the demo's configuration does not contain %q:\n%s", pin, config)
	}
	config = bytes.Replace(config, []byte(pin), []byte(strings.Join(append([]string{"pin: credential:online"}, token...), "\n    ")), 1)
	config = append(config, "operator: "+freePort(t)+"\n"...)
	path := filepath.Join(t.TempDir(), "chancery.yaml")
	if err := os.WriteFile(path, config, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// startServe runs serve with a notification socket and a watchdog of 300 ms.
func startServe(t *testing.T, dir, config string) (*exec.Cmd, *notify, *syncBuffer) {
	t.Helper()
	notifications, log := listenNotify(t), new(syncBuffer)
	cmd := exec.Command(binary(t, "chancery"), "serve", "--config", config)
	cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+filepath.Join(dir, "tokens", "softhsm2.conf"),
		"CREDENTIALS_DIRECTORY="+filepath.Join(dir, "pins"), "NOTIFY_SOCKET="+notifications.path, "WATCHDOG_USEC=300000")
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = cmd.Process.Kill(), cmd.Wait() })
	return cmd, notifications, log
}

// TestServeWithoutToken takes the token away from a running service in two
// ways: it hangs, and it comes back with a PIN flag that forbids a login.
func TestServeWithoutToken(t *testing.T) {
	needSoftHSM(t)
	shim := hsmtest.NewShim(t)
	dir := filepath.Join(t.TempDir(), "demo")
	must(t, nil, binary(t, "chancery"), "demo", "--once", "--dir", dir)
	useModule(t, dir, shim.Module)
	config := serveConfig(t, dir, "deadline: 5s") // of which the first test waits for one
	timestamp := func(d *demo) {
		resp, err := d.http.Post(d.url+"/api/v1/timestamp", "application/json",
			strings.NewReader(`{"artifactHash":"47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=","hashAlgorithm":"sha256"}`))
		if err != nil {
			t.Fatal(err)
		}
		if body := d.body(resp, "timestamp", http.StatusServiceUnavailable); !strings.Contains(string(body), `"code"`) {
			t.Errorf("timestamp without a token: %s", body)
		}
	}
	start := func() (*exec.Cmd, *demo, *syncBuffer) {
		shim.Reset()
		cmd, notifications, log := startServe(t, dir, config)
		notifications.await(t, "READY=1")
		d := &demo{t: t, dir: dir}
		d.connect()
		d.get("/readyz", http.StatusOK)
		return cmd, d, log
	}

	t.Run("hangs", func(t *testing.T) {
		cmd, d, log := start()
		shim.Hang(hsmtest.Sign)
		timestamp(d)
		defer func() {
			if t.Failed() {
				t.Logf("%s", log)
			}
		}()
		eventually(t, "a starving watchdog", func() bool { return strings.Contains(log.String(), "watchdog not fed") })
		d.get("/readyz", http.StatusServiceUnavailable)
		d.get("/healthz", http.StatusOK)
		// An operator may be sooner than the watchdog: what hangs does not keep the
		// service from ending, and is named.
		_ = cmd.Process.Signal(syscall.SIGTERM)
		timer := time.AfterFunc(hang, func() { _ = cmd.Process.Kill() })
		defer timer.Stop()
		_ = cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(lastError(log.String()), "wedged") {
			t.Errorf("stopped while a call hangs: exit status %d\n%s", code, log)
		}
	})
	t.Run("comes back and refuses the PIN", func(t *testing.T) {
		cmd, d, log := start()
		logins := shim.Logins()
		shim.TokenFlags(pkcs11.CKF_USER_PIN_COUNT_LOW)
		shim.Fail(hsmtest.SignInit, pkcs11.CKR_DEVICE_REMOVED, 1)
		timestamp(d)
		_ = cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); code != 77 || !strings.Contains(log.String(), "USER_PIN_COUNT_LOW") {
			t.Errorf("exit status %d\n%s", code, log)
		}
		if n := shim.Logins() - logins; n != 0 {
			t.Errorf("%d more logins", n)
		}
	})
}

// notify is the systemd side of sd_notify(3).
type notify struct {
	path   string
	states chan string
}

// listenNotify reads notifications all the time, as systemd does: a full
// socket would make the service wait.
func listenNotify(t *testing.T) *notify {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	n := &notify{path, make(chan string, 4096)}
	go func() {
		buf := make([]byte, 4096)
		for {
			size, err := conn.Read(buf)
			if err != nil {
				return
			}
			for _, state := range strings.Fields(string(buf[:size])) {
				select {
				case n.states <- state:
				default: // nobody waits for so many
				}
			}
		}
	}()
	return n
}

// await takes notifications until state comes.
func (n *notify) await(t *testing.T, state string) {
	t.Helper()
	limit := time.After(hang)
	for {
		select {
		case got := <-n.states:
			if got == state {
				return
			}
		case <-limit:
			t.Fatalf("%s did not come within %v", state, hang)
		}
	}
}
