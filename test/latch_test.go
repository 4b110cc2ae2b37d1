package test

import (
	"bytes"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestLatchedLog restores an older copy of the logs under a service. It starts
// all the same: what needs no log works, heads stay published, nothing is
// signed or appended, and readiness says so. With the newest database back it
// is as before.
func TestLatchedLog(t *testing.T) {
	needSoftHSM(t)
	dir := filepath.Join(t.TempDir(), "demo")
	chancery := binary(t, "chancery")
	must(t, nil, chancery, "demo", "--once", "--dir", dir)
	data, old, newest := filepath.Join(dir, "state", "log"), filepath.Join(dir, "old"), filepath.Join(dir, "newest")
	if err := os.CopyFS(old, os.DirFS(data)); err != nil {
		t.Fatal(err)
	}
	must(t, nil, chancery, "demo", "--once", "--dir", dir)
	swap := func(away, back string) {
		t.Helper()
		if err := errors.Join(os.Rename(data, away), os.Rename(back, data)); err != nil {
			t.Fatal(err)
		}
	}
	swap(newest, old)
	config := serveConfig(t, dir)

	cmd, notifications, log := startServe(t, dir, config)
	notifications.await(t, "READY=1")
	d := &demo{t: t, dir: dir}
	d.connect()
	d.get("/healthz", http.StatusOK)
	d.get("/readyz", http.StatusServiceUnavailable)
	head := d.get("/api/v2/checkpoint", http.StatusOK)
	d.openCheckpoint(t, head)
	d.get("/ct/ct1/ct/v1/get-sth", http.StatusOK)
	d.get("/ct/ct1/ct/v1/get-entries?start=0&end=0", http.StatusServiceUnavailable)
	d.get("/api/v2/tile/entries/000.p/2", http.StatusServiceUnavailable)
	resp, err := d.http.Post(d.url+"/api/v1/timestamp", "application/json",
		strings.NewReader(`{"artifactHash":"47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=","hashAlgorithm":"sha256"}`))
	if err != nil {
		t.Fatal(err)
	}
	d.body(resp, "timestamp", http.StatusOK)
	r := command(t, nil, chancery, "log", "status", "--config", config)
	if r.code != 1 || strings.Count(r.stdout, "read-only") != 2 {
		t.Errorf("status: exit status %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	for _, name := range []string{"ct-ct1", "rekor-log1"} {
		if want := `msg="log is read-only until an operator decides: see chancery log status" log=` + name; !strings.Contains(log.String(), want) {
			t.Errorf("the log does not have %q:\n%s", want, log)
		}
	}
	stop := func() {
		t.Helper()
		if err := errors.Join(cmd.Process.Signal(os.Interrupt), cmd.Wait()); err != nil {
			t.Fatalf("serve ended with %v\n%s", err, log)
		}
	}
	stop()

	swap(old, newest)
	cmd, notifications, log = startServe(t, dir, config)
	notifications.await(t, "READY=1")
	d.get("/readyz", http.StatusOK)
	if again := d.get("/api/v2/checkpoint", http.StatusOK); !bytes.Equal(again, head) {
		t.Errorf("checkpoint %q, while it was latched %q", again, head)
	}
	d.get("/ct/ct1/ct/v1/get-entries?start=0&end=0", http.StatusOK)
	must(t, nil, chancery, "log", "verify", "--config", config)
	stop()
}
