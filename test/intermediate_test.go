package test

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chancery-ca/chancery/ceremony"
)

// TestCosignIntermediateApart: the service's host and the root's are two, and nothing
// but two bundles goes between them. The outputs of the ceremony that asked for
// the intermediate are served as they are; a client that learned of the first
// intermediate by TUF learns of the second, and verifies what both signed.
func TestCosignIntermediateApart(t *testing.T) {
	needSoftHSM(t)
	path := cosign(t)
	s, idp := newSite(t), startProvider(t)
	s.issuer = idp.Issuer()
	practice := custodyCeremony(t, s)
	genesis := filepath.Join(practice, "out")
	serveCeremony(t, s, idp, practice, genesis)
	must(t, s.env, binary(t, "chancery"), "init", "--config", s.config)
	home := t.TempDir()
	env := []string{"SSL_CERT_FILE=" + s.path("tls-ca.pem"), "HOME=" + home, "DOCKER_CONFIG=" + home, "TUF_ROOT=" + filepath.Join(home, "tuf"),
		"COSIGN_EXPERIMENTAL=", "SIGSTORE_ID_TOKEN="}
	artefact := filepath.Join(home, "artefact")
	if err := os.WriteFile(artefact, []byte("by two intermediates\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	sign := func(name string) (bundle string) {
		token, err := idp.Token(nil)
		if err != nil {
			t.Fatal(err)
		}
		idToken := filepath.Join(home, "token")
		if err := os.WriteFile(idToken, []byte(token), 0o600); err != nil {
			t.Fatal(err)
		}
		bundle = filepath.Join(home, name+".json")
		must(t, env, path, "sign-blob", artefact, "--bundle", bundle, "--identity-token", idToken, "--yes")
		return bundle
	}
	mirror := func() {
		must(t, env, path, "initialize", "--mirror", s.url+"/tuf", "--root", filepath.Join(genesis, "tuf", "1.root.json"))
	}

	stop := s.serve()
	mirror()
	bundles := []string{sign("before")}
	stop()

	out := anotherIntermediate(t, practice)
	serveCeremony(t, s, idp, practice, out)
	stop = s.serve()
	defer stop()
	mirror()
	bundles = append(bundles, sign("after"))
	for i, bundle := range bundles {
		must(t, env, path, "verify-blob", artefact, "--bundle", bundle, "--certificate-identity", user, "--certificate-oidc-issuer", s.issuer)
		if issuer := issuerIn(t, bundle); strings.HasSuffix(issuer, "G2") != (i == 1) {
			t.Errorf("%s was signed under %q", filepath.Base(bundle), issuer)
		}
	}
}

// issuerIn is the name of the intermediate under a bundle's certificate.
func issuerIn(t *testing.T, path string) string {
	t.Helper()
	var b struct {
		Material struct {
			Certificate struct {
				Raw []byte `json:"rawBytes"`
			} `json:"certificate"`
		} `json:"verificationMaterial"`
	}
	if err := json.Unmarshal(mustRead(t, path), &b); err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(b.Material.Certificate.Raw)
	if err != nil {
		t.Fatal(err)
	}
	return cert.Issuer.CommonName
}

// apartDefinition is what the definitions of both ceremonies have.
const apartDefinition = `version: 1
id: %s
kind: %s
environment: rehearsal
previous: {ceremony: %s, heads: ["%x"]}
people:
  - {id: a1, role: administrator, name: The Administrator}
  - {id: w1, role: witness, name: First Witness}
quorum: {witness: 1}
certificates:
  inter-g2: {key: inter-g2, issuer: root, subject: {o: Acme, cn: Acme Intermediate G2}, years: 3, path-len: 0, eku: [codeSigning]}
outputs: {dir: out}
`

// anotherIntermediate rehearses the two ceremonies after the genesis in practice
// and returns the outputs of the one that asked.
func anotherIntermediate(t *testing.T, practice string) string {
	t.Helper()
	dir, program := t.TempDir(), binary(t, "chancery-ceremony")
	genesis := filepath.Join(practice, "out")
	def, err := ceremony.OpenFolder(genesis)
	if err != nil {
		t.Fatal(err)
	}
	begin := func(kind ceremony.Kind, id, rest string) string {
		state, err := ceremony.ReadStatus(genesis)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, id+".yaml")
		if err := os.WriteFile(file, []byte(fmt.Sprintf(apartDefinition, id, kind, def.ID, state.Head)+rest), 0o600); err != nil {
			t.Fatal(err)
		}
		r := command(t, nil, program, "rehearse", file, "--dir", filepath.Join(dir, id), "--previous", genesis, "--tokens", practice)
		if r.code == 0 || !strings.Contains(r.stderr, ceremony.ErrBundle.Error()) {
			t.Fatalf("%s: status %d\n%s%s", kind, r.code, r.stdout, r.stderr)
		}
		return filepath.Join(dir, id, "out")
	}
	_, custodians, ok := bytes.Cut(def.Source(), []byte("\ntuf:\n"))
	if !ok {
		t.Fatal("the genesis has no custodians")
	}
	online := begin(ceremony.IntermediateCSR, "inter-csr", "tokens: {online: {uri: \"pkcs11:token=acme-online\"}}\n"+
		"rotation: {overlap: 7d}\nkeys: {inter-g2: {token: online, alg: ecdsa-p256}}\ntuf:\n"+string(custodians))
	request, response := filepath.Join(dir, "request.tar"), filepath.Join(dir, "response.tar")
	must(t, nil, program, "export", online, request)
	state, err := ceremony.ReadStatus(online)
	if err != nil {
		t.Fatal(err)
	}
	root := begin(ceremony.SignIntermediate, "inter-sign", "tokens: {root: {uri: \"pkcs11:token=acme-root\"}}\n"+
		fmt.Sprintf("request: {ceremony: inter-csr, head: \"%x\"}\nkeys: {inter-g2: {alg: ecdsa-p256}}\n", state.Head))
	must(t, nil, program, "import", root, request)
	must(t, nil, program, "export", root, response)
	must(t, nil, program, "import", online, response)
	for _, outputs := range []string{root, online} {
		must(t, nil, program, "verify", outputs)
	}
	return online
}

// TestIntermediateApart is the same in production, at terminals: two tokens with
// PINs of their own, two definitions, two copies of the genesis' outputs, people
// who compare words, custodians and witnesses.
func TestIntermediateApart(t *testing.T) {
	needSoftHSM(t)
	r := newRoom(t)
	online := r.perform("genesis", r.genesis(), "")
	root := filepath.Join(t.TempDir(), "out") // the copy in the root's safe
	if err := os.CopyFS(root, os.DirFS(online)); err != nil {
		t.Fatal(err)
	}
	const certificate = `certificates:
  inter-g2: {key: inter-g2, issuer: root, subject: {o: Acme, cn: Acme Sigstore Intermediate G2}, years: 3, path-len: 0, eku: [codeSigning]}
`
	pin := "online=" + r.path("acme-online.pin")
	asks := r.waits("csr", r.head("acme-inter-2026", "intermediate-csr", online)+"tokens:\n"+fmt.Sprintf(onlineToken, "")+certificate+
		"rotation: {overlap: 1d}\nkeys: {inter-g2: {token: online, alg: ecdsa-p256}}\n", online, "--pin-file", pin)
	request := r.exported(asks, "request.tar")

	id, last := lastRecord(t, asks)
	definition, _, _ := strings.Cut(r.head("acme-inter-2026-sign", "sign-intermediate", root), "tuf:")
	definition += "tokens:\n" + fmt.Sprintf(rootToken, "") + certificate + "keys: {inter-g2: {alg: ecdsa-p256}}\n"
	strict := r.waits("strict", definition+fmt.Sprintf("request: {ceremony: %s, head: %q}\n", id, last), root)
	if status, text := r.converse(strict, "import", strict, request); status == 0 || !strings.Contains(text, "it was made in software") {
		t.Errorf("a key in software that the root does not accept: status %d\n%s", status, text)
	}
	signs := r.waits("sign", definition+fmt.Sprintf("request: {ceremony: %s, head: %q, accept-software: true}\n", id, last), root)
	if status, text := r.converse(signs, "import", signs, request); status != 0 {
		t.Fatalf("import at the root: status %d\n%s", status, text)
	}
	r.ceremony("verify", signs)
	response := r.exported(signs, "response.tar")

	r.before = online
	r.printed = "" // nobody is asked for words of the definition any more
	if status, text := r.converse(asks, "import", asks, response, "--pin-file", pin); status != 0 {
		t.Fatalf("import online: status %d\n%s", status, text)
	}
	r.ceremony("verify", asks)
	r.serve(asks)
	defer r.stop()
	users := r.clients(asks, "")
	users.verifyAll(users.sign("apart"))
	if issuer := certificateOf(t, filepath.Join(asks, "intermediate.pem")); issuer.Subject.CommonName != "Acme Sigstore Intermediate G2" {
		t.Errorf("the intermediate is %s", issuer.Subject)
	}
}

// waits performs a ceremony until it waits for a bundle, and returns its outputs.
func (r *room) waits(name, definition, before string, args ...string) string {
	r.t.Helper()
	r.printed = ceremony.Words(sha256.Sum256([]byte(definition)))
	r.before = before
	out := filepath.Join(r.path(name), "out")
	args = append([]string{"run", r.write(name+".yaml", definition, 0o600), "--dir", r.path(name), "--previous", before}, args...)
	if status, text := r.converse(out, args...); status == 0 || !strings.Contains(text, ceremony.ErrBundle.Error()) {
		r.t.Fatalf("%s: status %d\n%s", name, status, text)
	}
	return out
}

// exported writes the bundle, whose words somebody reads aloud from now on.
func (r *room) exported(out, name string) string {
	r.t.Helper()
	_, words, _ := strings.Cut(r.ceremony("export", out, r.path(name)), "\nBundle       ")
	hash, words, _ := strings.Cut(words, "\n")
	words, _, _ = strings.Cut(words, "\nLast record")
	if r.readAloud = strings.Join(strings.Fields(words), " "); len(hash) == 0 || len(strings.Fields(words)) != 24 {
		r.t.Fatalf("no words: %q", words)
	}
	return r.path(name)
}
