package test

import (
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// cosign returns the path of an unmodified cosign, which `make test-clients`
// builds; plain `go test` skips these tests.
func cosign(t *testing.T) string {
	t.Helper()
	path := os.Getenv("CHANCERY_COSIGN")
	if path == "" {
		t.Skip("CHANCERY_COSIGN is not set: run make test-clients")
	}
	return path
}

// client is somebody at a shell who has cosign and the demo's files.
type client struct {
	t      *testing.T
	d      *demo
	cosign string
	env    []string
}

func newClient(t *testing.T) *client {
	t.Helper()
	path := cosign(t)
	d := startDemo(t, filepath.Join(t.TempDir(), "demo"))
	home := t.TempDir()
	return &client{t: t, d: d, cosign: path, env: []string{
		"SSL_CERT_FILE=" + d.path("tls-ca.pem"),
		// Nothing of the machine's own configuration takes part.
		"HOME=" + home, "DOCKER_CONFIG=" + home, "TUF_ROOT=" + filepath.Join(home, "tuf"), "COSIGN_EXPERIMENTAL=", "SIGSTORE_ID_TOKEN=",
	}}
}

func (c *client) signing(args ...string) []string {
	return append(args,
		"--signing-config", c.d.path("signing_config.v0.2.json"), "--trusted-root", c.d.path("trusted_root.json"),
		"--identity-token", c.d.path("token"), "--yes")
}

func (c *client) verifying(identity, issuer string, args ...string) []string {
	return append(args, "--trusted-root", c.d.path("trusted_root.json"),
		"--certificate-identity", identity, "--certificate-oidc-issuer", issuer)
}

func (c *client) file(name, content string) string {
	c.t.Helper()
	path := filepath.Join(c.t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		c.t.Fatal(err)
	}
	return path
}

func TestCosignBlob(t *testing.T) {
	c := newClient(t)
	artefact := c.file("artefact", "something worth signing\n")
	byCosign, byChancery := filepath.Join(t.TempDir(), "cosign.json"), filepath.Join(t.TempDir(), "chancery.json")
	chancery := binary(t, "chancery")

	must(t, c.env, c.cosign, c.signing("sign-blob", artefact, "--bundle", byCosign)...)
	must(t, nil, chancery, "sign", "--trust", c.d.dir, "--token", c.d.path("token"), "--bundle", byChancery, artefact)

	for name, bundle := range map[string]string{"cosign": byCosign, "chancery": byChancery} {
		must(t, c.env, c.cosign, c.verifying(user, c.d.issuer, "verify-blob", artefact, "--bundle", bundle)...)
		out := must(t, nil, chancery, "verify", "--trust", c.d.dir, "--bundle", bundle,
			"--certificate-identity", user, "--certificate-oidc-issuer", c.d.issuer, artefact)
		if !strings.Contains(out, user) || !strings.Contains(out, c.d.issuer) {
			t.Errorf("chancery verify does not say who signed the bundle of %s:\n%s", name, out)
		}
	}

	refusals := []struct{ name, file, identity, issuer string }{
		{"a changed artefact", c.file("changed", "something worth signing!\n"), user, c.d.issuer},
		{"another identity", artefact, "mallory@example.com", c.d.issuer},
		{"another issuer", artefact, user, "https://accounts.example.com"},
	}
	for _, refusal := range refusals {
		for name, bundle := range map[string]string{"cosign": byCosign, "chancery": byChancery} {
			if r := command(t, c.env, c.cosign, c.verifying(refusal.identity, refusal.issuer, "verify-blob", refusal.file, "--bundle", bundle)...); r.code == 0 {
				t.Errorf("cosign accepted %s in the bundle of %s", refusal.name, name)
			}
			r := command(t, nil, chancery, "verify", "--trust", c.d.dir, "--bundle", bundle,
				"--certificate-identity", refusal.identity, "--certificate-oidc-issuer", refusal.issuer, refusal.file)
			if r.code != 1 || !strings.HasPrefix(r.stderr, "chancery: error: not verified: ") {
				t.Errorf("chancery verify of %s in the bundle of %s: exit status %d\n%s", refusal.name, name, r.code, r.stderr)
			}
		}
	}
}

// TestCosignDemo does what the demo says, word for word.
func TestCosignDemo(t *testing.T) {
	path := cosign(t)
	dir := filepath.Join(t.TempDir(), "a demo")
	d := startDemo(t, dir)
	_, text, _ := strings.Cut(d.log.String(), "cosign 3 signs and verifies")
	script := ""
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "  ") {
			script += line
		}
	}
	if n := strings.Count(script, "cosign "); n != 5 || !strings.Contains(script, "cosign initialize") {
		t.Fatalf("%d commands in:\n%s", n, text)
	}
	home := t.TempDir()
	if err := os.Symlink(path, filepath.Join(home, "cosign")); err != nil {
		t.Fatal(err)
	}
	env := []string{"HOME=" + home, "DOCKER_CONFIG=" + home, "PATH=" + home + ":" + os.Getenv("PATH"), "COSIGN_EXPERIMENTAL=", "SIGSTORE_ID_TOKEN="}
	must(t, env, "sh", "-e", "-c", `cd "$1" && eval "$2"`, "sh", home, script)

	// At another address the custodians' files are not the demo's any more.
	d.stop()
	d = startDemo(t, dir, "--listen", freePort(t))
	if strings.Contains(d.log.String(), "cosign initialize") {
		t.Errorf("a demo that has moved says:\n%s", d.log)
	}
}

// TestCosignDevice: without a token cosign logs in by the device flow.
func TestCosignDevice(t *testing.T) {
	c := newClient(t)
	artefact, bundle := c.file("artefact", "by device\n"), filepath.Join(t.TempDir(), "bundle.json")
	must(t, c.env, c.cosign, "sign-blob", artefact, "--bundle", bundle, "--yes",
		"--signing-config", c.d.path("signing_config.v0.2.json"), "--trusted-root", c.d.path("trusted_root.json"))
	must(t, c.env, c.cosign, c.verifying(user, c.d.issuer, "verify-blob", artefact, "--bundle", bundle)...)
}

func TestCosignImage(t *testing.T) {
	c := newClient(t)
	hub := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithReferrersSupport(true)))
	t.Cleanup(hub.Close)
	image := pushImage(t, strings.TrimPrefix(hub.URL, "http://")+"/acme/tool")
	other := pushImage(t, strings.TrimPrefix(hub.URL, "http://")+"/acme/other")

	must(t, c.env, c.cosign, c.signing("sign", image)...)
	out := must(t, c.env, c.cosign, c.verifying(user, c.d.issuer, "verify", image)...)
	if !strings.Contains(out, user) && !strings.Contains(out, strings.Split(image, "@")[1]) {
		t.Errorf("cosign verify names neither the signer nor the image:\n%s", out)
	}
	for name, args := range map[string][]string{
		"an unsigned image": c.verifying(user, c.d.issuer, "verify", other),
		"another identity":  c.verifying("mallory@example.com", c.d.issuer, "verify", image),
		"another issuer":    c.verifying(user, "https://accounts.example.com", "verify", image),
	} {
		if r := command(t, c.env, c.cosign, args...); r.code == 0 {
			t.Errorf("cosign accepted %s", name)
		}
	}
}

// pushImage puts a small random image into the registry and returns its name
// with the digest.
func pushImage(t *testing.T, repository string) string {
	t.Helper()
	image, err := random.Image(1024, 1)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.NewTag(repository + ":v1")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, image); err != nil {
		t.Fatal(err)
	}
	digest, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return repository + "@" + digest.String()
}
