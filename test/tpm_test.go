package test

import (
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// tpmSite is a site whose keys were made by `chancery-ceremony rehearse` on an
// emulated TPM and on SoftHSM.
type tpmSite struct {
	*site
	idp provider
	tpm *hsmtest.Emulator
	// settings is what serve.yaml says.
	settings map[string]any
	// rehearsal is what the ceremony printed.
	rehearsal string
	process   *exec.Cmd // the running service, nil if none
	log       *syncBuffer
}

// newTPMSite rehearses the example's definition. The root is in SoftHSM, the
// keys of the names in inTPM are in the TPM, and the other online keys in
// SoftHSM. Then it moves the ceremony's outputs, the TPM's key files in them, to
// where the service looks for them.
func newTPMSite(t *testing.T, inTPM ...string) *tpmSite {
	t.Helper()
	s := &tpmSite{site: newSite(t), idp: startProvider(t), tpm: hsmtest.SWTPM(t)}
	s.issuer = s.idp.Issuer()
	definition := string(mustRead(t, "../config/example/genesis.yaml"))
	replace := func(old, new string) {
		t.Helper()
		if !strings.Contains(definition, old) {
			t.Fatalf("the example has no %q", old)
		}
		definition = strings.Replace(definition, old, new, 1)
	}
	replace("  online: {uri: \"pkcs11:token=acme-online\", must-be-empty: true}\n",
		"  online: {uri: \"pkcs11:token=acme-online\", must-be-empty: true}\n  tpm: {uri: \"tpm2:tpm-keys?device="+s.tpm.Socket()+"\", must-be-empty: true}\n")
	for _, name := range inTPM {
		at := strings.Index(definition, "  "+name+": ")
		if at < 0 {
			t.Fatalf("the example has no key %s", name)
		}
		definition = definition[:at] + strings.Replace(definition[at:], "token: online", "token: tpm", 1)
	}
	replace("url: https://sig.acme.example", "url: "+s.url)
	replace("ct2026}", "ct1}")
	replace("log2026-1}", "log1}")
	replace("[https://login.acme.example]", "["+s.issuer+"]")
	file := filepath.Join(t.TempDir(), "genesis.yaml")
	if err := os.WriteFile(file, []byte(definition), 0o600); err != nil {
		t.Fatal(err)
	}
	practice := filepath.Join(s.whole.TempDir(), "practice")
	s.rehearsal = must(t, nil, binary(t, "chancery-ceremony"), "rehearse", file, "--dir", practice)
	if err := os.RemoveAll(s.path("trust")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(practice, "out"), s.path("trust")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"trusted_root.json", "signing_config.v0.2.json"} {
		if err := os.WriteFile(s.path(name), s.read("trust", name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.env = []string{"SOFTHSM2_CONF=" + filepath.Join(practice, "tokens", "softhsm2.conf")}
	pin := func(token string) map[string]any {
		return map[string]any{"pin": "file:" + filepath.Join(practice, "pins", token), "deadline": "5m"}
	}
	s.settings = map[string]any{
		"version": 1, "url": s.url, "listen": strings.TrimPrefix(s.url, "https://"),
		"tls":   map[string]any{"certificate": s.path("tls", "server.pem"), "key": s.path("tls", "server.key")},
		"state": s.path("serve-state"), "trust": s.path("trust"),
		"tokens": map[string]any{"tpm": pin("tpm")},
		"ca": map[string]any{
			"private-networks": []string{"127.0.0.0/8"},
			"oidc-issuers": map[string]any{s.issuer: map[string]any{
				"issuer-url": s.issuer, "client-id": "sigstore", "type": "email", "ca-cert": s.idp.ca,
			}},
		},
		"ct": map[string]any{"shard": "ct1"}, "rekor": map[string]any{"shard": "log1"},
	}
	if len(inTPM) < 4 {
		s.settings["tokens"].(map[string]any)["online"] = pin("online")
	}
	return s
}

// bind binds the anchors to counters in the TPM.
func (s *tpmSite) bind() {
	s.settings["ct"] = map[string]any{"shard": "ct1", "counter": map[string]any{"token": "tpm", "index": 0x01800010}}
	s.settings["rekor"] = map[string]any{"shard": "log1", "counter": map[string]any{"token": "tpm", "index": 0x01800011}}
}

// chancery runs a command on the site's configuration and expects its status.
func (s *tpmSite) chancery(t *testing.T, status int, args ...string) string {
	t.Helper()
	r := command(t, s.env, binary(t, "chancery"), append(args, "--config", s.config)...)
	if r.code != status {
		t.Fatalf("chancery %s: exit status %d, want %d\n%s%s", strings.Join(args, " "), r.code, status, r.stdout, r.stderr)
	}
	return r.stdout + r.stderr
}

// start runs the service until stop, kill or the end of the test.
func (s *tpmSite) start(t *testing.T) {
	t.Helper()
	notifications := listenNotify(t)
	s.log = new(syncBuffer)
	s.process = exec.Command(binary(t, "chancery"), "serve", "--config", s.config)
	s.process.Env = append(append(os.Environ(), s.env...), "NOTIFY_SOCKET="+notifications.path)
	s.process.Stderr = s.log
	if err := s.process.Start(); err != nil {
		t.Fatal(err)
	}
	s.whole.Cleanup(s.kill)
	notifications.await(t, "READY=1")
	s.awaitKeys(t)
}

// stop ends the service as systemd does.
func (s *tpmSite) stop(t *testing.T) {
	t.Helper()
	if err := s.process.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := s.process.Wait(); err != nil {
		t.Errorf("serve ended with %v\n%s", err, s.log)
	}
	s.process = nil
	s.http.CloseIdleConnections()
}

// kill ends the service as a power cut would. Without one it does nothing.
func (s *tpmSite) kill() {
	if s.process == nil {
		return
	}
	_ = s.process.Process.Kill()
	_ = s.process.Wait() // killed
	s.process = nil
	s.http.CloseIdleConnections()
}

// signFile signs a file with chancery and verifies it, and returns the bundle.
func (s *tpmSite) signFile(t *testing.T) signedBundle {
	t.Helper()
	token, err := s.idp.Token(nil)
	if err != nil {
		t.Fatal(err)
	}
	artefact := s.path("artefact")
	for path, content := range map[string]string{s.path("id-token"): token, artefact: "something worth signing\n"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	chancery := binary(t, "chancery")
	must(t, nil, chancery, "sign", "--trust", s.dir, "--token", s.path("id-token"), "--bundle", s.path("bundle.json"), artefact)
	out := must(t, nil, chancery, "verify", "--trust", s.dir, "--bundle", s.path("bundle.json"),
		"--certificate-identity", user, "--certificate-oidc-issuer", s.issuer, artefact)
	if !strings.Contains(out, user) {
		t.Errorf("chancery verify says %q", out)
	}
	if r := command(t, nil, chancery, "verify", "--trust", s.dir, "--bundle", s.path("bundle.json"),
		"--certificate-identity", "mallory@example.com", "--certificate-oidc-issuer", s.issuer, artefact); r.code != 1 {
		t.Errorf("another identity: exit status %d\n%s", r.code, r.stderr)
	}
	return s.signed("bundle.json")
}

// TestTPM: the intermediate, and what else the row says, is in a TPM, the root
// in SoftHSM; everything that a client gets verifies with software that we did
// not write.
func TestTPM(t *testing.T) {
	needSoftHSM(t)
	for _, row := range []struct {
		name  string
		inTPM []string
	}{
		{"every online key in the TPM", []string{"inter-g1", "ct-1", "rekor-1", "tsa-1"}},
		{"intermediate and timestamps in the TPM", []string{"inter-g1", "tsa-1"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := newTPMSite(t, row.inTPM...)
			s.site.write(t, s.settings)
			out := must(t, nil, binary(t, "chancery-ceremony"), "verify", s.path("trust"))
			if !strings.Contains(out, "tpm-keys/inter-g1.pem") {
				t.Errorf("the ceremony's verification does not name the key files:\n%s", out)
			}
			s.chancery(t, 0, "config", "check")
			s.chancery(t, 0, "init")
			s.start(t)
			s.get("/readyz", http.StatusOK)
			b := s.signFile(t)
			leaf := b.leaf(t)
			opensslChain(t, s.demo, leaf)
			opensslTimestamp(t, s.demo, b)
			checkCT(t, s.demo, leaf, s.read("trust", "chain.pem"))
			b.checkInclusion(t, s.demo)

			s.kill()
			s.start(t)
			second, _, _ := s.certificate(t, s.idp, http.StatusOK)
			opensslChain(t, s.demo, second)
			checkCT(t, s.demo, leaf, s.read("trust", "chain.pem")) // what was logged before the kill is there
			s.noAuth(t)
			s.stop(t)
		})
	}
}

// noAuth looks for the TPM's auth value where it must not be.
func (s *tpmSite) noAuth(t *testing.T) {
	t.Helper()
	file := strings.TrimPrefix(s.settings["tokens"].(map[string]any)["tpm"].(map[string]any)["pin"].(string), "file:")
	auth := string(mustRead(t, file))
	if len(auth) < 16 {
		t.Fatalf("auth value of %d octets", len(auth))
	}
	if strings.Contains(s.log.String(), auth) {
		t.Error("the auth value is in the log")
	}
	if found := grep(t, s.dir, auth); len(found) > 0 {
		t.Errorf("the auth value is in %v", found)
	}
}

// TestTPMAway takes the TPM from a running service and gives it back.
func TestTPMAway(t *testing.T) {
	needSoftHSM(t)
	s := newTPMSite(t, "inter-g1", "ct-1", "rekor-1", "tsa-1")
	s.site.write(t, s.settings)
	s.chancery(t, 0, "init")
	s.start(t)
	s.certificate(t, s.idp, http.StatusOK)

	s.tpm.Stop(t)
	began := time.Now()
	s.certificate(t, s.idp, http.StatusServiceUnavailable)
	t.Logf("the refusal took %v", time.Since(began))
	s.get("/readyz", http.StatusServiceUnavailable)
	s.get("/healthz", http.StatusOK)

	s.tpm.Start(t)
	began = time.Now()
	eventually(t, "readiness", func() bool { return s.ready() })
	leaf, _, _ := s.certificate(t, s.idp, http.StatusOK)
	t.Logf("issuing again took %v", time.Since(began))
	opensslChain(t, s.demo, leaf)
	s.stop(t)
}

func (s *tpmSite) ready() bool {
	resp, err := s.http.Get(s.url + "/readyz")
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// TestTPMCounter puts an old disk back, the anchors in it: the counter in the
// TPM shows it, and an operator can accept it.
func TestTPMCounter(t *testing.T) {
	needSoftHSM(t)
	s := newTPMSite(t, "inter-g1", "ct-1", "rekor-1", "tsa-1")
	s.bind()
	s.site.write(t, s.settings)
	s.chancery(t, 0, "config", "check")
	s.chancery(t, 0, "init")
	if out := s.chancery(t, 0, "init", "--add"); out != "kept      ct-ct1\nkept      rekor-log1\nkept      the audit\n" {
		t.Errorf("init --add with nothing to add says %q", out)
	}
	s.start(t)
	s.certificate(t, s.idp, http.StatusOK)
	s.stop(t)
	old := filepath.Join(t.TempDir(), "old")
	must(t, nil, "cp", "-a", s.path("serve-state"), old)
	s.start(t)
	s.certificate(t, s.idp, http.StatusOK)
	s.stop(t)
	if out := s.chancery(t, 0, "log", "status", "--counter"); strings.Count(out, "by the hardware counter") != 2 {
		t.Errorf("status does not show two counters:\n%s", out)
	}
	s.chancery(t, 0, "log", "verify", "--counter")

	must(t, nil, "rm", "-r", s.path("serve-state"))
	must(t, nil, "cp", "-a", old, s.path("serve-state"))
	s.chancery(t, 0, "log", "status") // the disk alone does not show it
	if out := s.chancery(t, 1, "log", "status", "--counter", "--log", "ct-ct1"); !strings.Contains(out, "an old anchor was put back") {
		t.Errorf("status of an old anchor:\n%s", out)
	}
	s.start(t)
	s.get("/readyz", http.StatusServiceUnavailable)
	s.kill()

	for _, name := range []string{"ct-ct1", "rekor-log1"} {
		var list []struct {
			State string
			Tree  struct {
				Size json.Number
				Root string
			}
		}
		r := command(t, s.env, binary(t, "chancery"), "log", "status", "--counter", "--log", name, "--output", "json", "--config", s.config)
		if err := json.Unmarshal([]byte(r.stdout), &list); err != nil || len(list) != 1 {
			t.Fatalf("status of %s: %v\n%s%s", name, err, r.stdout, r.stderr)
		}
		if list[0].State == "consistent" {
			continue // nothing was logged in it, so its epoch did not move
		}
		out := s.chancery(t, 2, "log", "accept-loss", "--log", name)
		if !strings.Contains(out, "You vouch that this anchor is the newest") {
			t.Errorf("accept-loss says:\n%s", out)
		}
		s.chancery(t, 0, "log", "accept-loss", "--log", name, "--size", list[0].Tree.Size.String(), "--root", list[0].Tree.Root)
	}
	s.chancery(t, 0, "log", "status", "--counter")
	s.start(t)
	s.get("/readyz", http.StatusOK)
	s.certificate(t, s.idp, http.StatusOK)
	s.stop(t)
}

// TestTPMTools runs chancery hsm on the site's TPM.
func TestTPMTools(t *testing.T) {
	needSoftHSM(t)
	s := newTPMSite(t, "inter-g1", "ct-1", "rekor-1", "tsa-1")
	s.site.write(t, s.settings)
	want := func(out string, texts ...string) {
		t.Helper()
		for _, text := range texts {
			// Long values are on a line of their own.
			if !strings.Contains(strings.Join(strings.Fields(out), " "), text) {
				t.Errorf("missing %q in:\n%s", text, out)
			}
		}
	}
	want(s.chancery(t, 0, "hsm", "info"), "TPM_ECC_NIST_P256", "TPM 2.0", "software")
	want(s.chancery(t, 0, "hsm", "list"), "tpm-keys/inter-g1.pem", "role intermediate", "policy good")
	want(s.chancery(t, 0, "hsm", "test", "intermediate", "--duration", "100ms"), "64 different r")
	const nonce = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
	evidence := filepath.Join(t.TempDir(), "evidence")
	want(s.chancery(t, 0, "hsm", "attest", "intermediate", "--nonce", nonce, "--out", evidence), "signed by the device, nonce "+nonce)
	want(s.chancery(t, 0, "hsm", "bench", "ct", "--parallel", "2", "--duration", "200ms"), "signatures/s")

	// Offline: the TPM is away.
	s.tpm.Stop(t)
	chancery := binary(t, "chancery")
	want(must(t, nil, chancery, "hsm", "verify", evidence, "--nonce", nonce, "--role", "intermediate"), "signed by one TPM", "policy: that of role intermediate")
	for name, args := range map[string][]string{
		"another nonce": {"--nonce", strings.Repeat("ab", 32)},
		"no nonce":      {},
	} {
		if r := command(t, nil, chancery, append([]string{"hsm", "verify", evidence}, args...)...); r.code != 1 || !strings.Contains(r.stdout, "BAD") {
			t.Errorf("%s: exit status %d\n%s%s", name, r.code, r.stdout, r.stderr)
		}
	}
	path := filepath.Join(evidence, "attestation.json")
	text := mustRead(t, path)
	var statement map[string]any
	if err := json.Unmarshal(text, &statement); err != nil {
		t.Fatal(err)
	}
	statement["certifySignature"] = statement["creationSignature"]
	changed, err := json.Marshal(statement)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, changed, 0o600); err != nil {
		t.Fatal(err)
	}
	if r := command(t, nil, chancery, "hsm", "verify", evidence, "--nonce", nonce); r.code != 1 || !strings.Contains(r.stdout, "BAD         statement") {
		t.Errorf("another signature: exit status %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	out := s.chancery(t, 1, "hsm", "info")
	want(out, "token tpm: ")
}

// TestCosignTPM: unmodified cosign signs and verifies where every online key is
// in a TPM.
func TestCosignTPM(t *testing.T) {
	path := cosign(t)
	needSoftHSM(t)
	s := newTPMSite(t, "inter-g1", "ct-1", "rekor-1", "tsa-1")
	s.site.write(t, s.settings)
	s.chancery(t, 0, "init")
	s.start(t)
	s.signFile(t)
	token, err := s.idp.Token(nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.path("token"), []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	home := t.TempDir()
	c := &client{t: t, d: s.demo, cosign: path, env: []string{
		"SSL_CERT_FILE=" + s.path("tls-ca.pem"), "HOME=" + home, "TUF_ROOT=" + filepath.Join(home, "tuf"), "SIGSTORE_ID_TOKEN=",
	}}
	bundle := filepath.Join(home, "cosign.json")
	must(t, c.env, path, c.signing("sign-blob", s.path("artefact"), "--bundle", bundle)...)
	for _, b := range []string{bundle, s.path("bundle.json")} {
		must(t, c.env, path, c.verifying(user, s.issuer, "verify-blob", s.path("artefact"), "--bundle", b)...)
		if r := command(t, c.env, path, c.verifying("mallory@example.com", s.issuer, "verify-blob", s.path("artefact"), "--bundle", b)...); r.code == 0 {
			t.Error("cosign accepted another identity")
		}
	}
	s.stop(t)
}
