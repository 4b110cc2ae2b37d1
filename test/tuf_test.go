package test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	sigstoretuf "github.com/sigstore/sigstore-go/pkg/tuf"
	"github.com/theupdateframework/go-tuf/v2/metadata/fetcher"

	"github.com/chancery-ca/chancery/ceremony"
	"github.com/chancery-ca/chancery/ceremony/trust/tuf"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
	"github.com/chancery-ca/chancery/hsm/softhsm"
)

// signTargets has the custodians of a demo sign the next targets: its client
// files as they are. It runs in a process of its own: SoftHSM has one home per
// process.
func signTargets(t *testing.T, dir string) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run", "^TestCustodians$", "-test.v")
	cmd.Env = append(os.Environ(), "CHANCERY_TUF_DEMO="+dir)
	if out, err := cmd.CombinedOutput(); err != nil || bytes.Contains(out, []byte("SKIP")) {
		t.Fatalf("sign the next targets: %v\n%s", err, out)
	}
}

// TestCustodians is signTargets' process. Two of three custodians sign with the
// keys in their own tokens. What the online key signs is left to the service.
func TestCustodians(t *testing.T) {
	dir := os.Getenv("CHANCERY_TUF_DEMO")
	if dir == "" {
		t.Skip("the process of signTargets")
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	home, err := softhsm.Open(filepath.Join(dir, "tokens"))
	check(err)
	trustDir, now := filepath.Join(dir, "trust"), time.Now()
	def, err := ceremony.OpenFolder(trustDir)
	check(err)
	repoDir := filepath.Join(trustDir, "tuf")
	before, err := tuf.Load(repoDir)
	check(err)
	targets, err := tuf.Targets(mustRead(t, filepath.Join(dir, "trusted_root.json")), mustRead(t, filepath.Join(dir, "signing_config.v0.2.json")), now)
	check(err)
	draft, err := tuf.NewTargets(before.Root(), before.TargetsVersion()+1, targets, now)
	check(err)
	for _, c := range def.TUF.Custodians[1:] {
		token, err := pkcs11.Open(t.Context(), pkcs11.Config{
			Module: home.Module(), URI: "pkcs11:token=" + c.ID, PIN: mustRead(t, filepath.Join(dir, "pins", c.ID)),
		})
		check(err)
		t.Cleanup(func() { _ = token.Close() })
		spki, err := hsm.ParseSPKIHash(c.SPKISHA256)
		check(err)
		key, err := token.Open(t.Context(), hsm.Ref{URI: c.Key, SPKI: spki}, hsm.RoleNone)
		check(err)
		_, err = draft.Sign(t.Context(), key)
		check(err)
	}
	check(draft.Err())
	signed, err := draft.Bytes()
	check(err)
	repo, err := tuf.Assemble(before.RootFiles(), signed, nil, nil, targets)
	check(err)
	check(os.RemoveAll(repoDir))
	check(repo.Write(repoDir))
}

// versions returns those of the timestamp and of the targets that are served.
func (d *demo) versions() (timestamp, targets int64) {
	d.t.Helper()
	type pointer struct {
		Signed struct {
			Version int64
			Meta    map[string]struct{ Version int64 }
		}
	}
	var t, s pointer
	if err := json.Unmarshal(d.get("/tuf/timestamp.json", http.StatusOK), &t); err != nil {
		d.t.Fatal(err)
	}
	name := fmt.Sprintf("/tuf/%d.snapshot.json", t.Signed.Meta["snapshot.json"].Version)
	if err := json.Unmarshal(d.get(name, http.StatusOK), &s); err != nil {
		d.t.Fatal(err)
	}
	return t.Signed.Version, s.Signed.Meta["targets.json"].Version
}

// TestTUF: a client that knows a demo's first TUF root gets its trust files,
// and what follows them.
func TestTUF(t *testing.T) {
	d := startDemo(t, filepath.Join(t.TempDir(), "demo"))
	first := d.read("trust", "tuf", "1.root.json")
	fetch := func() {
		t.Helper()
		f := fetcher.NewDefaultFetcher()
		f.SetHTTPClient(d.http)
		client, err := sigstoretuf.New((&sigstoretuf.Options{
			Root: first, RepositoryBaseURL: d.url + "/tuf", CachePath: filepath.Join(t.TempDir(), "cache"), Fetcher: f,
		}).WithContext(context.Background()))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{tuf.TrustedRootTarget, tuf.SigningConfigTarget} {
			if got, err := client.GetTarget(name); err != nil || !bytes.Equal(got, d.read(name)) {
				t.Errorf("%s: %d octets, %v", name, len(got), err)
			}
		}
	}
	fetch()
	d.get("/tuf/2.root.json", http.StatusNotFound)
	d.get("/readyz", http.StatusOK)
	timestamp, targets := d.versions()
	if targets != 1 {
		t.Errorf("targets %d, want 1", targets)
	}

	// Stopped and started, nothing is signed without need. Without its state the
	// service signs anew, and no version goes back.
	dir := d.dir
	d.stop()
	d = startDemo(t, dir)
	if again, _ := d.versions(); again != timestamp {
		t.Errorf("after a restart timestamp %d, before %d", again, timestamp)
	}
	d.stop()
	if err := os.RemoveAll(filepath.Join(dir, "state", "tuf")); err != nil {
		t.Fatal(err)
	}
	d = startDemo(t, dir)
	if again, _ := d.versions(); again < timestamp {
		t.Errorf("without its state timestamp %d, before %d", again, timestamp)
	}
	fetch()
	d.stop()

	// The custodians sign new targets, and the trust folder of before is refused.
	old := filepath.Join(t.TempDir(), "tuf")
	if err := os.CopyFS(old, os.DirFS(filepath.Join(dir, "trust", "tuf"))); err != nil {
		t.Fatal(err)
	}
	signTargets(t, dir)
	d = startDemo(t, dir)
	fetch()
	if _, targets := d.versions(); targets != 2 {
		t.Errorf("targets %d, want 2", targets)
	}
	d.stop()
	if err := os.RemoveAll(filepath.Join(dir, "trust", "tuf")); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(filepath.Join(dir, "trust", "tuf"), os.DirFS(old)); err != nil {
		t.Fatal(err)
	}
	r := command(t, nil, binary(t, "chancery"), "demo", "--dir", dir)
	if r.code != 1 || !bytes.Contains([]byte(r.stderr), []byte("out of order")) {
		t.Errorf("an old trust folder: exit status %d\n%s", r.code, r.stderr)
	}
}

// TestCosignTUF: cosign is told of the mirror and its first root once, and then
// signs and verifies without a flag about the service.
func TestCosignTUF(t *testing.T) {
	path := cosign(t)
	d := startDemo(t, filepath.Join(t.TempDir(), "demo"))
	home := t.TempDir()
	env := []string{
		"SSL_CERT_FILE=" + d.path("tls-ca.pem"),
		"HOME=" + home, "DOCKER_CONFIG=" + home, "COSIGN_EXPERIMENTAL=", "SIGSTORE_ID_TOKEN=", "TUF_ROOT=" + filepath.Join(home, "tuf"),
	}
	c := &client{t: t, d: d, cosign: path, env: env}
	artefact, bundle := c.file("artefact", "trust by TUF\n"), filepath.Join(t.TempDir(), "bundle.json")

	must(t, env, path, "initialize", "--mirror", d.url+"/tuf", "--root", d.path("trust", "tuf", "1.root.json"))
	must(t, env, path, "sign-blob", artefact, "--bundle", bundle, "--identity-token", d.path("token"), "--yes")
	verifying := func(identity, file string) []string {
		return []string{"verify-blob", file, "--bundle", bundle, "--certificate-identity", identity, "--certificate-oidc-issuer", d.issuer}
	}
	must(t, env, path, verifying(user, artefact)...)
	// The same bundle by the files of the ceremony.
	must(t, env, path, c.verifying(user, d.issuer, "verify-blob", artefact, "--bundle", bundle)...)
	for name, args := range map[string][]string{
		"another identity": verifying("mallory@example.com", artefact), "another file": verifying(user, c.file("other", "x")),
	} {
		if r := command(t, env, path, args...); r.code == 0 {
			t.Errorf("cosign accepted %s", name)
		}
	}

	// A mirror whose root is not the one that was given is not taken.
	a, b := hsmtest.SoftwareKey(hsm.ECDSAP256), hsmtest.SoftwareKey(hsm.ECDSAP256)
	draft, err := tuf.NewRoot(tuf.Layout{
		Custodians: []*ecdsa.PublicKey{a.Public().(*ecdsa.PublicKey)}, Threshold: 1, Online: b.Public().(*ecdsa.PublicKey),
		Expires: tuf.Expires{Root: tuf.Decade, Targets: tuf.Decade, Snapshot: tuf.Decade, Timestamp: tuf.Decade},
	}, nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := draft.Sign(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	root, err := draft.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	stranger := append(slices.Clone(env), "TUF_ROOT="+filepath.Join(home, "other"))
	if r := command(t, stranger, path, "initialize", "--mirror", d.url+"/tuf", "--root", c.file("root.json", string(root))); r.code == 0 {
		t.Error("cosign took a mirror with another root")
	}
}

// custodyCeremony rehearses the example's genesis for a site, with three
// custodians, and returns the ceremony's folder.
func custodyCeremony(t *testing.T, s *site) string {
	t.Helper()
	definition := string(mustRead(t, "../config/example/genesis.yaml"))
	for _, r := range [][2]string{
		{"url: https://sig.acme.example", "url: " + s.url}, {"ct2026}", "ct1}"}, {"log2026-1}", "log1}"},
		{"[https://login.acme.example]", "[" + s.issuer + "]"},
		{"\ncertificates:", "\n  tuf-online: {token: online, alg: ecdsa-p256}\ncertificates:"},
	} {
		if !strings.Contains(definition, r[0]) {
			t.Fatalf("the example has no %q", r[0])
		}
		definition = strings.Replace(definition, r[0], r[1], 1)
	}
	definition += "tuf:\n  threshold: 2\n  root-expires: 1y\n  timestamp-expires: 7d\n  custodians:\n"
	for i := 1; i <= 3; i++ {
		definition += fmt.Sprintf("    - {id: c%d, key: \"pkcs11:token=c%d;object=tuf\", spki-sha256: \"%064x\"}\n", i, i, i)
	}
	file, practice := filepath.Join(t.TempDir(), "genesis.yaml"), filepath.Join(t.TempDir(), "practice")
	if err := os.WriteFile(file, []byte(definition), 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, nil, binary(t, "chancery-ceremony"), "rehearse", file, "--dir", practice)
	return practice
}

// serveCeremony has the site serve the outputs of a ceremony, as they are, with
// the tokens that the rehearsal in practice made.
func serveCeremony(t *testing.T, s *site, idp provider, practice, out string) {
	t.Helper()
	s.env = []string{"SOFTHSM2_CONF=" + filepath.Join(practice, "tokens", "softhsm2.conf")}
	s.write(t, map[string]any{
		"version": 1, "url": s.url, "listen": strings.TrimPrefix(s.url, "https://"),
		"tls":   map[string]any{"certificate": s.path("tls", "server.pem"), "key": s.path("tls", "server.key")},
		"state": s.path("serve-state"), "trust": out,
		"tokens": map[string]any{"online": map[string]any{"pin": "file:" + filepath.Join(practice, "pins", "online")}},
		"ca": map[string]any{
			"private-networks": []string{"127.0.0.0/8"},
			"oidc-issuers": map[string]any{s.issuer: map[string]any{
				"issuer-url": s.issuer, "client-id": "sigstore", "type": "email", "ca-cert": idp.ca,
			}},
		},
		"ct": map[string]any{"shard": "ct1"}, "rekor": map[string]any{"shard": "log1"},
	})
}

// TestCeremonyTUF: the outputs of a ceremony with custodians, as they are, in
// the trust folder of a service: clients learn of everything by TUF.
func TestCeremonyTUF(t *testing.T) {
	needSoftHSM(t)
	s, idp := newSite(t), startProvider(t)
	s.issuer = idp.Issuer()
	practice := custodyCeremony(t, s)
	out := filepath.Join(practice, "out")
	serveCeremony(t, s, idp, practice, out)
	must(t, s.env, binary(t, "chancery"), "init", "--config", s.config)
	stop := s.serve()
	defer stop()
	root := filepath.Join(out, "tuf", "1.root.json")

	t.Run("sigstore-go", func(t *testing.T) {
		f := fetcher.NewDefaultFetcher()
		f.SetHTTPClient(s.http)
		client, err := sigstoretuf.New((&sigstoretuf.Options{
			Root: mustRead(t, root), RepositoryBaseURL: s.url + "/tuf", CachePath: t.TempDir(), Fetcher: f,
		}).WithContext(context.Background()))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{tuf.TrustedRootTarget, tuf.SigningConfigTarget} {
			if got, err := client.GetTarget(name); err != nil || !bytes.Equal(got, mustRead(t, filepath.Join(out, name))) {
				t.Errorf("%s: %d octets, %v", name, len(got), err)
			}
		}
	})
	t.Run("cosign", func(t *testing.T) {
		path, home := cosign(t), t.TempDir()
		token, err := idp.Token(nil)
		if err != nil {
			t.Fatal(err)
		}
		artefact, idToken, bundle := filepath.Join(home, "artefact"), filepath.Join(home, "token"), filepath.Join(home, "bundle.json")
		for name, content := range map[string]string{artefact: "from a ceremony\n", idToken: token} {
			if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		env := []string{"SSL_CERT_FILE=" + s.path("tls-ca.pem"), "HOME=" + home, "DOCKER_CONFIG=" + home, "TUF_ROOT=" + filepath.Join(home, "tuf"),
			"COSIGN_EXPERIMENTAL=", "SIGSTORE_ID_TOKEN="}
		must(t, env, path, "initialize", "--mirror", s.url+"/tuf", "--root", root)
		must(t, env, path, "sign-blob", artefact, "--bundle", bundle, "--identity-token", idToken, "--yes")
		must(t, env, path, "verify-blob", artefact, "--bundle", bundle, "--certificate-identity", user, "--certificate-oidc-issuer", s.issuer)
	})
}
