package test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// tool returns the path in an environment variable that `make test-clients`
// sets; plain `go test` skips the test.
func tool(t *testing.T, variable string) string {
	t.Helper()
	path := os.Getenv(variable)
	if path == "" {
		t.Skip(variable + " is not set: run make test-clients")
	}
	return path
}

// TestPython: unmodified sigstore-python signs by CSR and verifies.
func TestPython(t *testing.T) {
	sigstore := tool(t, "CHANCERY_SIGSTORE_PYTHON")
	d := startDemo(t, filepath.Join(t.TempDir(), "demo"))
	home := t.TempDir()
	env := []string{"HOME=" + home, "SSL_CERT_FILE=" + d.path("tls-ca.pem"), "REQUESTS_CA_BUNDLE=" + d.path("tls-ca.pem"),
		"SIGSTORE_IDENTITY_TOKEN=" + d.token(nil)}
	artefact, bundle := filepath.Join(home, "artefact"), filepath.Join(home, "bundle.json")
	changed := filepath.Join(home, "changed")
	for path, content := range map[string]string{artefact: "by python\n", changed: "by Python\n"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	config := []string{"--trust-config", d.path("client_trust_config.json")}
	must(t, env, sigstore, append(config, "sign", "--bundle", bundle, artefact)...)
	verify := append(config, "verify", "identity", "--bundle", bundle, "--cert-identity", user, "--cert-oidc-issuer", d.issuer)
	must(t, env, sigstore, append(verify, artefact)...)
	if r := command(t, env, sigstore, append(verify, changed)...); r.code == 0 {
		t.Error("sigstore-python accepted a changed artefact")
	}
	must(t, nil, binary(t, "chancery"), "verify", "--trust", d.dir, "--bundle", bundle,
		"--certificate-identity", user, "--certificate-oidc-issuer", d.issuer, artefact)
}

// TestJavaScript: unmodified sigstore-js signs files and DSSE envelopes (which
// it submits in the deprecated form) and verifies them.
func TestJavaScript(t *testing.T) {
	modules := tool(t, "CHANCERY_SIGSTORE_JS")
	d := startDemo(t, filepath.Join(t.TempDir(), "demo"))
	artefact := filepath.Join(t.TempDir(), "artefact")
	if err := os.WriteFile(artefact, []byte(`{"_type":"https://in-toto.io/Statement/v1"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	env := []string{"NODE_PATH=" + modules, "NODE_EXTRA_CA_CERTS=" + d.path("tls-ca.pem")}
	for _, kind := range []string{"messageSignature", "dsseEnvelope"} {
		bundle := filepath.Join(t.TempDir(), "bundle.json")
		out := must(t, env, "node", "testdata/sigstore.js", d.dir, artefact, kind, bundle)
		if !strings.Contains(out, "verified "+user) {
			t.Errorf("%s: %s", kind, out)
		}
		if kind == "messageSignature" {
			must(t, nil, binary(t, "chancery"), "verify", "--trust", d.dir, "--bundle", bundle,
				"--certificate-identity", user, "--certificate-oidc-issuer", d.issuer, artefact)
		}
	}
}
