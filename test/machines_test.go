package test

import (
	"bytes"
	"crypto/sha256"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/ceremony"
)

// TestTwoHosts is a genesis in production on two hosts, at terminals: both roots
// are in a token of the one, the service's six keys in a token of the other, and
// nothing but two bundles goes between them. The outputs of the online host are
// served as they are.
func TestTwoHosts(t *testing.T) {
	needSoftHSM(t)
	r := newRoom(t)
	offline, online := r.env, r.secondHost("acme-online")
	definition := r.genesisOnTwo()
	r.printed = ceremony.Words(sha256.Sum256([]byte(definition)))
	pin := "online=" + r.path("acme-online.pin")
	stick := t.TempDir()
	began := time.Now()

	asks := r.on(online, "online", definition, "--pin-file", pin)
	request := r.exported(asks, filepath.Join("online", "request.tar"))
	request = carry(t, request, stick)

	roots := r.on(offline, "offline", definition)
	if status, text := r.converse(roots, "import", roots, request); status != 0 {
		t.Fatalf("import at the roots: status %d\n%s", status, text)
	}
	response := carry(t, r.exported(roots, filepath.Join("offline", "response.tar")), stick)

	r.env = online
	if status, text := r.converse(asks, "import", asks, response, "--pin-file", pin); status != 0 {
		t.Fatalf("import online: status %d\n%s", status, text)
	}
	if took := time.Since(began); took > maxCeremony {
		t.Errorf("the genesis took %v, want at most %v", took, maxCeremony)
	} else {
		t.Logf("%.1f s of the machine's time", took.Seconds())
	}
	r.ceremony("verify", asks)
	r.ceremony("verify", roots)
	for _, name := range []string{"root.pem", "chain.pem", "trusted_root.json", "signing_config.v0.2.json", "keys.yaml", "tuf/1.root.json", "rekor-v1.pub"} {
		if !bytes.Equal(mustRead(t, filepath.Join(asks, name)), mustRead(t, filepath.Join(roots, name))) {
			t.Errorf("the two hosts have different %s", name)
		}
	}
	r.serve(asks)
	defer r.stop()
	users := r.clients(asks, "")
	users.verifyAll(users.sign("two-hosts"))
}

// genesisOnTwo is the genesis with a machine for each token, and a key for every
// role that there is.
func (r *room) genesisOnTwo() string {
	r.t.Helper()
	text := r.genesis()
	for _, edit := range [][2]string{
		{`token=acme-root", module: soft, accept-software: true`, `token=acme-root", machine: offline, module: soft, accept-software: true`},
		{`token=acme-online", module: soft, accept-software: true`, `token=acme-online", machine: online, module: soft, accept-software: true`},
		{"  rekor-1:    {token: online, alg: ecdsa-p256}\n", "  rekor-1:    {token: online, alg: ecdsa-p256}\n  rekor-v1-1: {token: online, alg: ecdsa-p256}\n"},
		{"rekor: {shard: log2026-1}}", "rekor: {shard: log2026-1}, rekor-v1: {shard: log2026-v1}}"},
	} {
		if strings.Count(text, edit[0]) != 1 {
			r.t.Fatalf("the definition has not one %q", edit[0])
		}
		text = strings.Replace(text, edit[0], edit[1], 1)
	}
	return text
}

// secondHost moves the token with the label to a SoftHSM home of its own, which
// the service uses from now on, and returns that host's environment.
func (r *room) secondHost(label string) []string {
	r.t.Helper()
	home := r.path("second-softhsm")
	if err := os.Mkdir(home, 0o700); err != nil {
		r.t.Fatal(err)
	}
	folders, err := filepath.Glob(r.path("softhsm/*/token.object"))
	if err != nil {
		r.t.Fatal(err)
	}
	moved := 0
	for _, object := range folders {
		if bytes.Contains(mustRead(r.t, object), []byte(label)) {
			folder := filepath.Dir(object)
			if err := os.Rename(folder, filepath.Join(home, filepath.Base(folder))); err != nil {
				r.t.Fatal(err)
			}
			moved++
		}
	}
	if moved != 1 {
		r.t.Fatalf("%d tokens are called %s", moved, label)
	}
	conf := r.write("second-softhsm2.conf", "directories.tokendir = "+home+"\nobjectstore.backend = file\nlog.level = ERROR\n", 0o600)
	env := []string{"SOFTHSM2_CONF=" + conf, "TERM=xterm"}
	r.s.env = append(append([]string(nil), env...), "CREDENTIALS_DIRECTORY="+r.dir)
	return env
}

// on begins the ceremony on a host, named as the definition names it, and returns
// its outputs when it waits for the other's bundle. The host has a copy of the
// definition.
func (r *room) on(env []string, host, definition string, args ...string) string {
	r.t.Helper()
	r.env = env
	dir := r.path(host)
	out := filepath.Join(dir, "out")
	file := r.write(host+".yaml", definition, 0o600)
	args = append([]string{"run", file, "--machine", host, "--dir", dir}, args...)
	if status, text := r.converse(out, args...); status == 0 || !strings.Contains(text, ceremony.ErrBundle.Error()) {
		r.t.Fatalf("%s: status %d\n%s", host, status, text)
	}
	return out
}

// carry copies a bundle to the stick, from which the other host reads it.
func carry(t *testing.T, bundle, stick string) string {
	t.Helper()
	to := filepath.Join(stick, filepath.Base(bundle))
	if err := os.WriteFile(to, mustRead(t, bundle), 0o600); err != nil {
		t.Fatal(err)
	}
	return to
}
