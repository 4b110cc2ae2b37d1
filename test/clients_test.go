package test

import (
	"crypto/sha256"
	"fmt"
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

// verifies wants our own client to accept a bundle of the demo's user.
func verifies(t *testing.T, d *demo, bundle, artefact string) {
	t.Helper()
	must(t, nil, binary(t, "chancery"), "verify", "--trust", d.dir, "--bundle", bundle,
		"--certificate-identity", user, "--certificate-oidc-issuer", d.issuer, artefact)
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
	verifies(t, d, bundle, artefact)
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
			verifies(t, d, bundle, artefact)
		}
	}
}

// TestJava: unmodified sigstore-java asks by gRPC, with the trust files and with
// TUF alone, signs files and statements, and verifies. Two limits of version 2.0:
// with a token that it is given it proves possession over sub, which Fulcio does
// not accept of an e-mail issuer either, so that here sub is the address; and it
// signs statements whose log entry, a hashedrekord as of rekor-tiles 2.3, it
// cannot read itself, so that those are for others to verify.
func TestJava(t *testing.T) {
	jars := tool(t, "CHANCERY_SIGSTORE_JAVA")
	d := startDemo(t, filepath.Join(t.TempDir(), "demo"))
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if content != "" {
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return path
	}
	artefact, changed := file("artefact", "by Java\n"), file("changed", "by java\n")
	digest := sha256.Sum256([]byte("by Java\n"))
	statement := file("statement", fmt.Sprintf(`{"_type":"https://in-toto.io/Statement/v1","subject":[{"name":"artefact",`+
		`"digest":{"sha256":"%x"}}],"predicateType":"https://example.com/predicate","predicate":{}}`, digest))
	token := file("token", d.token(map[string]any{"sub": user}))
	store := file("trust.p12", "")
	must(t, nil, "keytool", "-importcert", "-noprompt", "-alias", "demo", "-file", d.path("tls-ca.pem"),
		"-keystore", store, "-storetype", "PKCS12", "-storepass", "changeit")
	java := func(args ...string) result {
		return command(t, nil, "java", append([]string{"-Djavax.net.ssl.trustStore=" + store, "-Djavax.net.ssl.trustStorePassword=changeit",
			"-cp", filepath.Join(jars, "*"), "testdata/sigstore-java/Sigstore.java"}, args...)...)
	}
	trust := map[string]string{
		"files": d.dir,
		"tuf":   strings.Join([]string{d.url + "/tuf", d.path("trust", "tuf", "1.root.json"), file("cache", "")}, ","),
	}
	for name, where := range trust {
		t.Run(name, func(t *testing.T) {
			bundle := file(name+".json", "")
			if r := java("sign", where, token, artefact, bundle); r.code != 0 {
				t.Fatalf("%+v", r)
			}
			for _, row := range []struct {
				what, identity, artefact string
				code                     int
			}{
				{"its own", user, artefact, 0},
				{"another artefact", user, changed, 3},
				{"another identity", "other@example.com", artefact, 3},
			} {
				if r := java("verify", where, row.identity, d.issuer, row.artefact, bundle); r.code != row.code {
					t.Errorf("%s: status %d, want %d: %s%s", row.what, r.code, row.code, r.stdout, r.stderr)
				}
			}
			verifies(t, d, bundle, artefact)
		})
	}
	t.Run("statement", func(t *testing.T) {
		bundle := file("statement.json", "")
		if r := java("attest", d.dir, token, statement, bundle); r.code != 0 {
			t.Fatalf("%+v", r)
		}
		verifies(t, d, bundle, artefact)
	})
	t.Run("the bundle of another client", func(t *testing.T) {
		if r := java("verify", d.dir, user, d.issuer, d.path("hello.txt"), d.path("hello.txt.sigstore.json")); r.code != 0 {
			t.Errorf("%+v", r)
		}
	})
}
