package test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const probeUnit = `[Unit]
Description=What TestSystemdBoot wants to see
[Service]
Type=oneshot
ExecStart=/bin/sh /srv/boot.sh
StandardOutput=file:/srv/boot.log
StandardError=file:/srv/boot.log
ExecStopPost=/bin/systemctl poweroff -ff
`

// bootConfig is a production configuration but for the port's host.
const bootConfig = `version: 1
url: https://127.0.0.1:443
listen: 127.0.0.1:443
tls: {certificate: tls/server.pem, key: tls/server.key}
state: /var/lib/chancery
trust: trust
tokens: {online: {pin: "credential:hsm-pin"}}
ca: {oidc-issuers: {"https://idp.example": {issuer-url: "https://idp.example", client-id: sigstore, type: email}}}
ct: {shard: ct1, origin: chancery-demo.invalid/ct/ct1}
rekor: {shard: log1}
`

// TestSystemdBoot boots a systemd of its own in a container, on an overlay of
// this machine's root that is thrown away, and follows the install steps: the
// hardened unit starts, serves, survives a kill, stops, and is not restarted
// after a wrong PIN.
func TestSystemdBoot(t *testing.T) {
	needSoftHSM(t)
	nspawn, err := exec.LookPath("systemd-nspawn")
	if err != nil || os.Getuid() != 0 {
		t.Skip("booting a container takes root and systemd-nspawn")
	}
	root := overlay(t)
	put := func(path, content string, mode os.FileMode) {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
	}
	copyIn := func(from, to string, mode os.FileMode) { put(to, string(mustRead(t, from)), mode) }
	must(t, nil, binary(t, "chancery"), "demo", "--once", "--dir", filepath.Join(root, "srv", "demo"))
	copyIn(binary(t, "chancery"), "usr/bin/chancery", 0o755)
	copyIn("../systemd/chancery.sysusers", "usr/lib/sysusers.d/chancery.conf", 0o644)
	copyIn("../systemd/chancery.service", "etc/systemd/system/chancery.service", 0o644)
	copyIn("testdata/boot.sh", "srv/boot.sh", 0o755)
	put("etc/systemd/system/chancery.service.d/softhsm.conf", "[Service]\nEnvironment=SOFTHSM2_CONF=/var/lib/chancery/tokens/softhsm2.conf\n", 0o644)
	put("etc/systemd/system/probe.service", probeUnit, 0o644)
	put("etc/systemd/system/default.target", "[Unit]\nRequires=probe.service basic.target\nAfter=basic.target\n", 0o644)
	put("etc/chancery/chancery.yaml", bootConfig, 0o644)

	ctx, cancel := context.WithTimeout(context.Background(), 2*hang)
	defer cancel()
	var console bytes.Buffer
	cmd := exec.CommandContext(ctx, nspawn, "--boot", "--register=no", "--keep-unit", "--private-network", "--quiet", "--directory", root)
	cmd.Stdout, cmd.Stderr = &console, &console
	_ = cmd.Run() // powers itself off; what counts is in the log
	raw, err := os.ReadFile(filepath.Join(root, "srv", "boot.log"))
	if err != nil {
		t.Skipf("the container did not boot here: %v\n%.2000s", err, console.String())
	}
	for _, want := range []string{
		"init 0", "start 0", `readyz {"status":"SERVING"}`, "user chancery", "pin in environment 0",
		`after a kill {"status":"SERVING"}`, "stop success", "wrong PIN 77 failed restarts 0",
	} {
		if !strings.Contains(string(raw), "\nCHECK "+want+"\n") {
			t.Errorf("missing: CHECK %s", want)
		}
	}
	if t.Failed() {
		t.Logf("%s", raw)
	}
}

// overlay mounts a writable view of this machine's root.
func overlay(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"upper", "work", "root"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	root := filepath.Join(dir, "root")
	options := "lowerdir=/,upperdir=" + filepath.Join(dir, "upper") + ",workdir=" + filepath.Join(dir, "work")
	if r := command(t, nil, "mount", "-t", "overlay", "overlay", "-o", options, root); r.code != 0 {
		t.Skipf("no overlay can be mounted here: %s", r.stderr)
	}
	t.Cleanup(func() {
		if r := command(t, nil, "umount", root); r.code != 0 {
			t.Errorf("umount: %s", r.stderr)
		}
	})
	return root
}
