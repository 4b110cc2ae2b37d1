package test

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"
)

// TestCosignV1: unmodified cosign 2, which speaks Fulcio's v1 interface, gets a
// certificate, and signs; without our signature log, because it knows only that
// of v1. It verifies what it made, with our CA and our CT log's key.
func TestCosignV1(t *testing.T) {
	cosign2 := tool(t, "CHANCERY_COSIGN2")
	d := startDemo(t, filepath.Join(t.TempDir(), "demo"))
	dir := t.TempDir()
	artefact, changed := filepath.Join(dir, "artefact"), filepath.Join(dir, "changed")
	for path, content := range map[string]string{artefact: "by cosign 2\n", changed: "by cosign 3\n"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	intermediates, root := splitChain(t, d.read("trust", "chain.pem"))
	roots := filepath.Join(dir, "roots.pem")
	if err := os.WriteFile(roots, append(append([]byte{}, intermediates...), root...), 0o600); err != nil {
		t.Fatal(err)
	}
	env := []string{
		"SSL_CERT_FILE=" + d.path("tls-ca.pem"), "SIGSTORE_ROOT_FILE=" + roots, "SIGSTORE_CT_LOG_PUBLIC_KEY_FILE=" + d.path("trust", "ct.pub"),
		"HOME=" + dir, "TUF_ROOT=" + filepath.Join(dir, "tuf"), "COSIGN_EXPERIMENTAL=", "SIGSTORE_ID_TOKEN=",
	}
	certificate, signature := filepath.Join(dir, "certificate"), filepath.Join(dir, "signature")
	must(t, env, cosign2, "sign-blob", artefact, "--yes", "--fulcio-url", d.url, "--identity-token", d.path("token"),
		"--tlog-upload=false", "--output-certificate", certificate, "--output-signature", signature)

	verify := func(identity, file string) result {
		return command(t, env, cosign2, "verify-blob", file, "--certificate", certificate, "--signature", signature,
			"--certificate-identity", identity, "--certificate-oidc-issuer", d.issuer, "--insecure-ignore-tlog")
	}
	if r := verify(user, artefact); r.code != 0 {
		t.Errorf("cosign 2 refuses its own signature: %s", r.stderr)
	}
	if verify(user, changed).code == 0 {
		t.Error("cosign 2 accepted a changed file")
	}
	if verify("mallory@example.com", artefact).code == 0 {
		t.Error("cosign 2 accepted another identity")
	}
	opensslSignature(t, d, certificate, signature, artefact)
}

// opensslSignature has openssl verify the chain of a certificate that cosign 2
// wrote, and the signature of a file with it.
func opensslSignature(t *testing.T, d *demo, certificate, signature, file string) {
	t.Helper()
	plain := func(path string) []byte {
		raw, err := base64.StdEncoding.DecodeString(string(mustRead(t, path)))
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		return raw
	}
	block, _ := pem.Decode(plain(certificate))
	if block == nil {
		t.Fatal("cosign 2 wrote no PEM certificate")
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	opensslChain(t, d, leaf)
	leafPEM := writePEM(t, leaf.Raw)
	public, der := filepath.Join(t.TempDir(), "public.pem"), filepath.Join(t.TempDir(), "signature.der")
	if err := os.WriteFile(public, []byte(must(t, nil, "openssl", "x509", "-in", leafPEM, "-noout", "-pubkey")), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(der, plain(signature), 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, nil, "openssl", "dgst", "-sha256", "-verify", public, "-signature", der, file)
}
