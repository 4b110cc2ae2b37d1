package test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	ctgo "github.com/google/certificate-transparency-go"
	ctclient "github.com/google/certificate-transparency-go/client"
	"github.com/google/certificate-transparency-go/jsonclient"
	"github.com/google/certificate-transparency-go/x509util"
	rekornote "github.com/sigstore/rekor-tiles/v2/pkg/note"
	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	sigstoretuf "github.com/sigstore/sigstore-go/pkg/tuf"
	"github.com/sigstore/sigstore-go/pkg/verify"
	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/theupdateframework/go-tuf/v2/metadata/fetcher"
	"github.com/transparency-dev/formats/log"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/chancery-ca/chancery/ceremony"
	"github.com/chancery-ca/chancery/log/tree"
	"github.com/chancery-ca/chancery/test/terminal"
)

// maxCeremony bounds the machine's time of all ceremonies of a Chancery's life.
const maxCeremony = 3 * time.Minute

// TestRotation is the whole life of a Chancery in production, with clients that
// are not ours: genesis, signatures, another intermediate, other log keys,
// signatures. It says how long the ceremonies took, which is the time that
// ceremony/README.md states.
func TestRotation(t *testing.T) { rotation(t, "") }

// TestCosignRotation is TestRotation with unmodified cosign beside sigstore-go.
func TestCosignRotation(t *testing.T) { rotation(t, cosign(t)) }

func rotation(t *testing.T, cosignPath string) {
	needSoftHSM(t)
	r := newRoom(t)
	genesis := r.perform("genesis", r.genesis(), "")

	s := r.serve(genesis)
	before := r.clients(genesis, cosignPath)
	signed := map[string]string{}
	maps.Copy(signed, before.sign("before"))
	before.verifyAll(signed)
	oldLast := s.get("/api/v2/checkpoint", http.StatusOK)

	// The intermediate gets a successor and is revoked; the service goes on.
	oldInter := certificateOf(t, filepath.Join(genesis, "intermediate.pem"))
	rotated := r.perform("rotate", r.rotate(genesis, oldInter), genesis)
	s.get("/readyz", http.StatusOK)
	// The logs are frozen, their last heads go into the record, and other shards
	// with other keys follow.
	r.stop()
	r.crashed()
	r.settings["rekor"], r.settings["ct"] = map[string]any{"frozen": true}, map[string]any{"frozen": true}
	r.serve(genesis)
	r.frozen()
	r.stop()
	delete(r.settings, "rekor")
	delete(r.settings, "ct")
	last := r.perform("log-key", r.logKey(rotated), rotated)

	r.serve(last)
	if t.Logf("%d ceremonies in %.1f s of the machine's time", r.performed, r.machine.Seconds()); r.machine > maxCeremony {
		t.Errorf("the ceremonies took %v, want at most %v", r.machine, maxCeremony)
	}
	after := r.clients(last, cosignPath)
	fresh := after.sign("after")
	old := maps.Clone(signed)
	maps.Copy(signed, fresh)
	after.verifyAll(signed) // who comes today
	before.areBehind(after)
	before.verifyTUF(signed) // who was there before follows without being told
	before.refuses(fresh)    // the files of before know nothing of what came after
	before.files(old)        // and are as good as ever for what they know
	r.revoked(last, oldInter)
	r.oldShard(genesis, last, old, oldLast)
	r.oldCTShard(genesis, old)
	r.oldLogs()
	r.stop()
	r.revokedStops(genesis, last)
	r.otherEnd(genesis, last, oldLast)
	r.damagedShard(last)
}

// room is what people and machines of a production ceremony need: tokens, keys
// of people and of custodians, and a service afterwards. The tokens are SoftHSM,
// which the definition has to accept by name.
type room struct {
	t        *testing.T
	s        *site
	idp      provider
	dir      string
	env      []string
	settings map[string]any // of the service

	custodians string // of the definition
	before     string // outputs that the ceremony continues, "" for the genesis
	printed    string // words of the definition, on everybody's paper
	readAloud  string // words of a bundle, from the other machine's screen
	machine    time.Duration
	performed  int
	end        func()
}

// rootPIN is typed; the online token's is in a file.
const rootPIN = "root-pin-4711"

func newRoom(t *testing.T) *room {
	t.Helper()
	r := &room{t: t, s: newSite(t), idp: startProvider(t), dir: t.TempDir(), end: func() {}}
	r.s.issuer = r.idp.Issuer()
	tokens := filepath.Join(r.dir, "softhsm")
	if err := os.Mkdir(tokens, 0o700); err != nil {
		t.Fatal(err)
	}
	conf := r.write("softhsm2.conf", "directories.tokendir = "+tokens+"\nobjectstore.backend = file\nlog.level = ERROR\n", 0o600)
	r.env = []string{"SOFTHSM2_CONF=" + conf, "TERM=xterm"}
	for label, pin := range map[string]string{"acme-root": rootPIN, "acme-online": "online-pin-1234", "c1": "c1-pin-1111", "c2": "c2-pin-2222", "c3": "c3-pin-3333"} {
		r.tool("softhsm2-util", "--init-token", "--free", "--label", label, "--so-pin", "so-"+pin, "--pin", pin)
		r.write(label+".pin", pin, 0o400)
	}
	for _, id := range []string{"ca1", "w1", "w2"} {
		r.tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", id, "-f", r.path(id))
	}
	for _, id := range []string{"c1", "c2", "c3"} {
		out := r.ceremony("custodian", "key", "--module", softHSMPath(t), "--uri", "pkcs11:token="+id, "--label", "tuf",
			"--pin-file", r.path(id+".pin"), "--out", r.path(id+".pem"))
		lines := regexp.MustCompile(`(?m)^(key|spki-sha256): ".*"$`).FindAllString(out, -1)
		r.custodians += "    - {id: " + id + ", " + strings.Join(lines, ", ") + "}\n"
	}
	r.settings = map[string]any{
		"version": 1, "listen": strings.TrimPrefix(r.s.url, "https://"),
		"tls":    map[string]any{"certificate": r.s.path("tls", "server.pem"), "key": r.s.path("tls", "server.key")},
		"state":  r.path("state"),
		"tokens": map[string]any{"online": map[string]any{"pin": "credential:acme-online.pin"}},
		"ca": map[string]any{
			"private-networks": []string{"127.0.0.0/8"},
			"oidc-issuers": map[string]any{r.s.issuer: map[string]any{
				"issuer-url": r.s.issuer, "client-id": "sigstore", "type": "email", "ca-cert": r.idp.ca,
			}},
		},
	}
	r.s.env = append(r.env, "CREDENTIALS_DIRECTORY="+r.dir)
	return r
}

func (r *room) path(name string) string { return filepath.Join(r.dir, name) }

func (r *room) write(name, content string, mode os.FileMode) string {
	r.t.Helper()
	if err := os.WriteFile(r.path(name), []byte(content), mode); err != nil {
		r.t.Fatal(err)
	}
	return r.path(name)
}

func (r *room) tool(name string, args ...string) string {
	r.t.Helper()
	return must(r.t, r.env, name, args...)
}

// ceremony runs a command that asks nobody.
func (r *room) ceremony(args ...string) string {
	r.t.Helper()
	return r.tool(binary(r.t, "chancery-ceremony"), args...)
}

// head is how every definition begins: where, when, who.
func (r *room) head(id, kind, previous string) string {
	r.t.Helper()
	module, now := softHSMPath(r.t), time.Now().UTC()
	text := fmt.Sprintf(`version: 1
id: %s
kind: %s
environment: production
window: {not-before: %s, not-after: %s}
modules: {soft: {path: %s, sha256: %x}}
`, id, kind, now.Add(-time.Hour).Format(time.RFC3339), now.Add(time.Hour).Format(time.RFC3339), module, sha256.Sum256(mustRead(r.t, module)))
	if previous != "" {
		before, hash := lastRecord(r.t, previous)
		text += fmt.Sprintf("previous: {ceremony: %s, heads: [%q]}\n", before, hash)
	}
	text += "people:\n"
	for _, p := range [][2]string{{"ca1", "administrator"}, {"w1", "witness"}, {"w2", "witness"}} {
		text += fmt.Sprintf("  - {id: %s, role: %s, name: Person %s, key: %q}\n", p[0], p[1], p[0], strings.TrimSpace(string(mustRead(r.t, r.path(p[0]+".pub")))))
	}
	return text + "quorum: {witness: 2}\noutputs: {dir: out}\n" +
		"tuf:\n  threshold: 2\n  root-expires: 1y\n  timestamp-expires: 7d\n  custodians:\n" + r.custodians
}

const (
	rootToken   = `  root: {uri: "pkcs11:token=acme-root", module: soft, accept-software: true%s}` + "\n"
	onlineToken = `  online: {uri: "pkcs11:token=acme-online", module: soft, accept-software: true%s}` + "\n"
)

func (r *room) genesis() string {
	const empty = ", must-be-empty: true"
	return r.head("acme-genesis-2026", "genesis", "") + "tokens:\n" + fmt.Sprintf(rootToken, empty) + fmt.Sprintf(onlineToken, empty) +
		fmt.Sprintf(`entropy: {mode: commit-reveal, contributors: [w1, w2]}
keys:
  root-g1:    {token: root,   alg: ecdsa-p384, protection: non-extractable}
  tsa-root:   {token: root,   alg: ecdsa-p384, protection: non-extractable}
  inter-g1:   {token: online, alg: ecdsa-p256}
  ct-1:       {token: online, alg: ecdsa-p256}
  rekor-1:    {token: online, alg: ecdsa-p256}
  tsa-1:      {token: online, alg: ecdsa-p256}
  tuf-online: {token: online, alg: ecdsa-p256}
certificates:
  root:     {key: root-g1, self-signed: true, subject: {o: Acme, cn: Acme Sigstore Root G1}, years: 10, path-len: 1}
  inter:    {key: inter-g1, issuer: root, subject: {o: Acme, cn: Acme Sigstore Intermediate G1}, years: 3, path-len: 0, eku: [codeSigning]}
  tsa-root: {key: tsa-root, self-signed: true, subject: {o: Acme, cn: Acme Timestamping Root G1}, years: 10, path-len: 0}
  tsa:      {key: tsa-1, issuer: tsa-root, subject: {o: Acme, cn: Acme Timestamping G1}, years: 3, eku: [timeStamping]}
service:
  url: %s
  logs: {ct: {shard: ct2026}, rekor: {shard: log2026-1}}
  oidc: [%q]
`, r.s.url, r.s.issuer)
}

// rotate replaces the intermediate, and revokes the old one from now on.
func (r *room) rotate(previous string, old *x509.Certificate) string {
	return r.head("acme-rotate-2026", "rotate", previous) + "tokens:\n" + fmt.Sprintf(rootToken, "") + fmt.Sprintf(onlineToken, "") +
		fmt.Sprintf(`rotation: {overlap: 1d}
keys:
  inter-g2: {token: online, alg: ecdsa-p256}
certificates:
  inter-g2: {key: inter-g2, issuer: root, subject: {o: Acme, cn: Acme Sigstore Intermediate G2}, years: 3, path-len: 0, eku: [codeSigning]}
crl:
  valid: 1y
  revoked: [{serial: "%x", at: %s, reason: superseded}]
`, old.SerialNumber, time.Now().UTC().Format(time.RFC3339))
}

func (r *room) logKey(previous string) string {
	return r.head("acme-log-key-2026", "log-key", previous) + "tokens:\n" + fmt.Sprintf(onlineToken, "") + `rotation: {overlap: 1d}
keys:
  rekor-2: {token: online, alg: ecdsa-p256}
  ct-2:    {token: online, alg: ecdsa-p256}
service:
  logs: {rekor: {shard: log2026-2}, ct: {shard: ct2027}}
`
}

// lastRecord returns the ceremony's id and the hash of its last record.
func lastRecord(t *testing.T, out string) (id, hash string) {
	t.Helper()
	lines := bytes.Split(bytes.TrimSpace(mustRead(t, filepath.Join(out, ceremony.TranscriptName))), []byte("\n"))
	var rec struct{ Ceremony, Hash string }
	if err := json.Unmarshal(lines[len(lines)-1], &rec); err != nil {
		t.Fatal(err)
	}
	return rec.Ceremony, rec.Hash
}

// asked are the questions of a ceremony in production, each with its answer.
var asked = regexp.MustCompile(`Type\s+words\s+(?P<words>\d+,\s+\d+\s+and\s+\d+)[^>]*> ` +
	`|as\s+(?P<watch>HH:MM):\s+> ` +
	`|PIN\s+of\s+token\s+(?P<pin>\w+)\s+.nothing\s+is\s+shown.: ` +
	`|type\s+(?P<share>64)\s+hexadecimal[^>]*> ` +
	`|Path\s+of\s+the\s+(?P<key>public)\s+key\s+in\s+PEM:\s+> ` +
	`|Path\s+of\s+the\s+two\s+(?P<tuf>signatures)[^>]*> ` +
	`|Path\s+of\s+the\s+(?P<witness>signature),[^>]*> ` +
	`|Path\s+of\s+its\s+(?P<frozen>last)\s+checkpoint[^>]*> `)

// perform has people perform the definition's ceremony at a terminal, checks it,
// and returns its outputs. before are those that it continues.
func (r *room) perform(name, definition, before string) string {
	r.t.Helper()
	file := r.write(name+".yaml", definition, 0o600)
	r.printed = ceremony.Words(sha256.Sum256([]byte(definition)))
	r.before = before
	args := []string{"run", file, "--dir", r.path(name), "--pin-file", "online=" + r.path("acme-online.pin")}
	if before != "" {
		args = append(args, "--previous", before)
	}
	out := filepath.Join(r.path(name), "out")
	began := time.Now()
	if status, text := r.converse(out, args...); status != 0 {
		r.t.Fatalf("%s: exit status %d\n%s", name, status, text)
	}
	took := time.Since(began)
	r.machine, r.performed = r.machine+took, r.performed+1
	r.t.Logf("%s: %.1f s", name, took.Seconds())
	r.ceremony("verify", out)
	return out
}

// converse runs a command at a terminal, has people answer what it asks, and
// returns how it ended and what it said. out are the outputs of the ceremony.
func (r *room) converse(out string, args ...string) (status int, text string) {
	r.t.Helper()
	cmd := exec.CommandContext(r.t.Context(), binary(r.t, "chancery-ceremony"), args...)
	cmd.Env = append(os.Environ(), r.env...)
	d := terminal.Start(r.t, cmd)
	for {
		passed, groups, ok := d.Next(asked)
		if !ok {
			break
		}
		for i, kind := range asked.SubexpNames() {
			if kind != "" && groups[i] != "" {
				d.Say(r.answer(out, kind, groups[i], passed))
			}
		}
	}
	status = d.Exit()
	if strings.Contains(d.Text(), rootPIN) {
		r.t.Error("the PIN was shown")
	}
	return status, d.Text()
}

// answer is what the person types who is asked.
func (r *room) answer(out, kind, what, passed string) string {
	r.t.Helper()
	named := func(re string) string {
		found := regexp.MustCompile(re).FindAllStringSubmatch(passed, -1)
		if len(found) == 0 {
			r.t.Fatalf("nobody is named in:\n%s", passed)
		}
		return found[len(found)-1][1]
	}
	switch kind {
	case "words":
		text := r.printed
		if regexp.MustCompile(`becomes\s+part\s+of\s+this\s+ceremony`).MatchString(passed) {
			text = r.readAloud
		}
		if at := strings.LastIndex(passed, "to be signed"); at >= 0 {
			_, text, _ = strings.Cut(passed[at:], "in words")
		}
		return pick(strings.Fields(text), what)
	case "watch":
		return time.Now().UTC().Format("15:04")
	case "pin":
		return rootPIN
	case "share":
		return strings.Repeat("0f", 32)
	case "key":
		return r.path(named(`key\s+of\s+custodian\s+(\w+)`) + ".pem")
	case "tuf":
		return r.custodianSigns(out, named(`Custodian\s+(\w+)\s+signs`))
	case "witness":
		return r.witnessSigns(out, named(`\(witness\s+(\w+)\)\s+signs`))
	case "frozen":
		if strings.Contains(named(`The\s+shard\s+(\S+)\s+takes`), "/ct/") {
			return r.path("last.sth")
		}
		return r.path("last.checkpoint")
	}
	r.t.Fatalf("nobody knows what to answer to %q", kind)
	return ""
}

// pick picks words by their numbers, "3, 5 and 7".
func pick(all []string, numbers string) string {
	var picked []string
	for _, n := range regexp.MustCompile(`\d+`).FindAllString(numbers, -1) {
		if i, err := strconv.Atoi(n); err == nil && i <= len(all) {
			picked = append(picked, all[i-1])
		}
	}
	return strings.Join(picked, " ")
}

// custodianSigns has a custodian sign the drafts with their own token. One of
// three is late.
func (r *room) custodianSigns(out, id string) string {
	r.t.Helper()
	if id == "c1" {
		return "later"
	}
	to := filepath.Join(filepath.Dir(out), id+".signatures")
	args := []string{"custodian", "sign", filepath.Join(out, "custodians"), "--module", softHSMPath(r.t),
		"--uri", "pkcs11:token=" + id + ";object=tuf", "--pin-file", r.path(id + ".pin"), "--out", to}
	if r.before != "" {
		roots, err := filepath.Glob(filepath.Join(r.before, "tuf", "*.root.json"))
		if err != nil || len(roots) == 0 {
			r.t.Fatalf("no root in force: %v", err)
		}
		args = append(args, "--previous", slices.Max(roots))
	}
	r.ceremony(args...)
	return to
}

// witnessSigns has a witness sign the checkpoint with ssh-keygen.
func (r *room) witnessSigns(out, id string) string {
	r.t.Helper()
	own := filepath.Join(filepath.Dir(out), id+".checkpoint")
	if err := os.WriteFile(own, mustRead(r.t, filepath.Join(out, ceremony.CheckpointName)), 0o600); err != nil {
		r.t.Fatal(err)
	}
	r.tool("ssh-keygen", "-q", "-Y", "sign", "-f", r.path(id), "-n", ceremony.Namespace, own)
	return own + ".sig"
}

// serve runs the service on the outputs of a ceremony as they are: what its
// configuration has besides is where it listens, its TLS, its PIN, and who logs
// in.
func (r *room) serve(out string) *site {
	r.t.Helper()
	r.settings["trust"] = out
	r.s.write(r.t, r.settings)
	chancery := binary(r.t, "chancery")
	r.tool(chancery, "config", "check", "--config", r.s.config)
	must(r.t, r.s.env, chancery, "init", "--add", "--config", r.s.config)
	r.end = r.s.serve()
	r.s.get("/readyz", http.StatusOK)
	return r.s
}

func (r *room) stop() { r.end() }

// users are people who have the files of a ceremony, and those who have its
// first TUF root alone.
type users struct {
	r      *room
	cosign string // "" for none
	dir    string // of the files
	root   string // of TUF
	home   string // of those who follow by TUF
	token  string
	file   string // what is signed
}

func (r *room) clients(out, cosignPath string) *users {
	r.t.Helper()
	c := &users{r: r, cosign: cosignPath, dir: r.t.TempDir(), root: filepath.Join(out, "tuf", "1.root.json"), home: r.t.TempDir()}
	for _, name := range []string{"trusted_root.json", "signing_config.v0.2.json"} {
		c.write(name, string(mustRead(r.t, filepath.Join(out, name))))
	}
	c.write("tls-ca.pem", string(r.s.read("tls-ca.pem")))
	c.file = c.write("artefact", "something worth signing for years\n")
	token, err := r.idp.Token(nil)
	if err != nil {
		r.t.Fatal(err)
	}
	c.token = c.write("token", token)
	if cosignPath != "" {
		must(r.t, c.env(), cosignPath, "initialize", "--mirror", r.s.url+"/tuf", "--root", c.root)
	}
	return c
}

func (c *users) write(name, content string) string {
	c.r.t.Helper()
	path := filepath.Join(c.dir, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		c.r.t.Fatal(err)
	}
	return path
}

// env keeps the machine's own configuration away from cosign.
func (c *users) env() []string {
	return []string{"SSL_CERT_FILE=" + filepath.Join(c.dir, "tls-ca.pem"), "HOME=" + c.home, "DOCKER_CONFIG=" + c.home,
		"TUF_ROOT=" + filepath.Join(c.home, "cosign"), "COSIGN_EXPERIMENTAL=", "SIGSTORE_ID_TOKEN="}
}

// sign returns the paths of a bundle of each client.
func (c *users) sign(when string) map[string]string {
	c.r.t.Helper()
	bundles := map[string]string{}
	to := func(by string) string {
		name := when + " the rotation by " + by
		bundles[name] = filepath.Join(c.dir, strings.ReplaceAll(name, " ", "-")+".json")
		return bundles[name]
	}
	must(c.r.t, nil, binary(c.r.t, "chancery"), "sign", "--trust", c.dir, "--token", c.token, "--bundle", to("sigstore-go"), c.file)
	if c.cosign != "" {
		must(c.r.t, c.env(), c.cosign, "sign-blob", c.file, "--bundle", to("cosign, files"), "--identity-token", c.token, "--yes",
			"--signing-config", filepath.Join(c.dir, "signing_config.v0.2.json"), "--trusted-root", filepath.Join(c.dir, "trusted_root.json"))
		must(c.r.t, c.env(), c.cosign, "sign-blob", c.file, "--bundle", to("cosign, TUF"), "--identity-token", c.token, "--yes")
	}
	return bundles
}

// verifyAll verifies every bundle in every way.
func (c *users) verifyAll(bundles map[string]string) {
	c.r.t.Helper()
	c.files(bundles)
	c.verifyTUF(bundles)
}

// files verifies with trusted_root.json.
func (c *users) files(bundles map[string]string) {
	c.r.t.Helper()
	for name, path := range bundles {
		for by, err := range c.byFiles(path) {
			if err != nil {
				c.r.t.Errorf("%s by the files does not verify the bundle of %s: %v", by, name, err)
			}
		}
	}
}

// refuses expects that no client accepts the bundles with its trusted_root.json.
func (c *users) refuses(bundles map[string]string) {
	c.r.t.Helper()
	for name, path := range bundles {
		for by, err := range c.byFiles(path) {
			if err == nil {
				c.r.t.Errorf("%s by the files verifies the bundle of %s", by, name)
			}
		}
	}
}

// byFiles is what each client says of a bundle by its files.
func (c *users) byFiles(path string) map[string]error {
	c.r.t.Helper()
	trustedRoot := filepath.Join(c.dir, "trusted_root.json")
	trusted, err := root.NewTrustedRootFromPath(trustedRoot)
	if err != nil {
		c.r.t.Fatal(err)
	}
	said := map[string]error{
		"sigstore-go": c.byGo(trusted, path),
		"chancery":    c.by(nil, binary(c.r.t, "chancery"), "verify", "--trust", c.dir, "--bundle", path, "--certificate-identity", user, "--certificate-oidc-issuer", c.r.s.issuer, c.file),
	}
	if c.cosign != "" {
		said["cosign"] = c.byCosign(path, "--trusted-root", trustedRoot)
	}
	return said
}

// verifyTUF verifies as clients that know the mirror and its first root.
func (c *users) verifyTUF(bundles map[string]string) {
	c.r.t.Helper()
	f := fetcher.NewDefaultFetcher()
	f.SetHTTPClient(c.r.s.http)
	client, err := sigstoretuf.New((&sigstoretuf.Options{
		Root: mustRead(c.r.t, c.root), RepositoryBaseURL: c.r.s.url + "/tuf", CachePath: filepath.Join(c.home, "go"), Fetcher: f,
	}).WithContext(context.Background()))
	if err != nil {
		c.r.t.Fatal(err)
	}
	trusted, err := root.GetTrustedRoot(client)
	if err != nil {
		c.r.t.Fatal(err)
	}
	for name, path := range bundles {
		if err := c.byGo(trusted, path); err != nil {
			c.r.t.Errorf("sigstore-go by TUF does not verify the bundle of %s: %v", name, err)
		}
		if c.cosign == "" {
			continue
		}
		if err := c.byCosign(path); err != nil {
			c.r.t.Errorf("cosign by TUF does not verify the bundle of %s: %v", name, err)
		}
	}
}

// areBehind makes sure that the files are of before, and the TUF caches are, too.
func (c *users) areBehind(now *users) {
	c.r.t.Helper()
	if bytes.Equal(mustRead(c.r.t, filepath.Join(c.dir, "trusted_root.json")), mustRead(c.r.t, filepath.Join(now.dir, "trusted_root.json"))) {
		c.r.t.Fatal("nothing has changed")
	}
	folders := []string{"go"}
	if c.cosign != "" {
		folders = append(folders, "cosign")
	}
	for _, folder := range folders {
		cached, err := filepath.Glob(filepath.Join(c.home, folder, "*", "root.json"))
		if err != nil || len(cached) != 1 {
			c.r.t.Fatalf("cache of %s: %v, %v", folder, cached, err)
		}
		var known struct{ Signed struct{ Version int } }
		if err := json.Unmarshal(mustRead(c.r.t, cached[0]), &known); err != nil || known.Signed.Version != 1 {
			c.r.t.Fatalf("%s knows root %d, %v", folder, known.Signed.Version, err)
		}
	}
}

// byGo verifies with sigstore-go: certificate with its SCT, log entry with its
// proof, timestamp, signer, and that a changed artefact is refused.
func (c *users) byGo(trusted root.TrustedMaterial, path string) error {
	c.r.t.Helper()
	b, err := bundle.LoadJSONFromPath(path)
	if err != nil {
		return err
	}
	v, err := verify.NewVerifier(trusted, verify.WithTransparencyLog(1), verify.WithSignedCertificateTimestamps(1), verify.WithSignedTimestamps(1))
	if err != nil {
		return err
	}
	identity, err := verify.NewShortCertificateIdentity(c.r.s.issuer, "", user, "")
	if err != nil {
		return err
	}
	content := mustRead(c.r.t, c.file)
	policy := func(content []byte) verify.PolicyBuilder {
		return verify.NewPolicy(verify.WithArtifact(bytes.NewReader(content)), verify.WithCertificateIdentity(identity))
	}
	if _, err := v.Verify(b, policy(append(content, '!'))); err == nil {
		c.r.t.Error("sigstore-go verifies a changed artefact")
	}
	_, err = v.Verify(b, policy(content))
	return err
}

func (c *users) byCosign(path string, args ...string) error {
	c.r.t.Helper()
	args = append([]string{"verify-blob", c.file, "--bundle", path, "--certificate-oidc-issuer", c.r.s.issuer, "--certificate-identity"}, args...)
	at := slices.Index(args, "--certificate-identity") + 1
	if err := c.by(c.env(), c.cosign, slices.Insert(slices.Clone(args), at, "mallory@example.com")...); err == nil {
		c.r.t.Error("cosign accepts another identity")
	}
	return c.by(c.env(), c.cosign, slices.Insert(args, at, user)...)
}

// by runs a program; its error is what it said.
func (c *users) by(env []string, program string, args ...string) error {
	c.r.t.Helper()
	if got := command(c.r.t, env, program, args...); got.code != 0 {
		return fmt.Errorf("exit status %d: %s", got.code, got.stderr)
	}
	return nil
}

func certificateOf(t *testing.T, path string) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(mustRead(t, path))
	if block == nil {
		t.Fatalf("%s has no certificate", path)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// revoked has openssl verify the list that the service serves, and looks for the
// old intermediate in it.
func (r *room) revoked(out string, old *x509.Certificate) {
	r.t.Helper()
	list := r.write("served.crl", string(r.s.get("/root.crl", http.StatusOK)), 0o600)
	got := command(r.t, nil, "openssl", "crl", "-inform", "DER", "-in", list, "-CAfile", filepath.Join(out, "root.pem"), "-noout", "-text")
	if got.code != 0 || !strings.Contains(got.stderr+got.stdout, "verify OK") || !strings.Contains(got.stdout, fmt.Sprintf("Serial Number: %X\n", old.SerialNumber)) {
		r.t.Errorf("openssl crl: %d\n%s%s", got.code, got.stdout, got.stderr)
	}
	pemList := r.write("served.pem", r.tool("openssl", "crl", "-inform", "DER", "-in", list), 0o600)
	for name, want := range map[*x509.Certificate]bool{old: false, certificateOf(r.t, filepath.Join(out, "intermediate.pem")): true} {
		file := r.write("intermediate.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: name.Raw})), 0o600)
		got := command(r.t, nil, "openssl", "verify", "-crl_check", "-CRLfile", pemList, "-CAfile", filepath.Join(out, "root.pem"), file)
		if (got.code == 0) != want || !want && !strings.Contains(got.stdout+got.stderr, "revoked") {
			r.t.Errorf("openssl verify of %s: %d\n%s%s", name.Subject.CommonName, got.code, got.stdout, got.stderr)
		}
	}
}

// crashed leaves a leaf in each log that no head covers, as a service that is
// killed between its commit and its signature.
func (r *room) crashed() {
	r.t.Helper()
	engine, err := tree.Open(r.t.Context(), tree.Config{
		Dir: filepath.Join(r.path("state"), "log"), Now: func() (time.Time, error) { return time.Now(), nil }, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		r.t.Fatal(err)
	}
	for _, name := range []string{"ct-ct2026", "rekor-log2026-1"} {
		shard, err := engine.Tree(r.t.Context(), name)
		if err == nil {
			_, _, err = shard.Append(r.t.Context(), tree.Leaf{Value: []byte("nobody had an answer to this")})
		}
		if err != nil {
			r.t.Fatal(err)
		}
	}
	if err := engine.Close(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
}

// oldLogs has the operator's tool verify the old shards beside the running
// service: they end with the heads in the record.
func (r *room) oldLogs() {
	r.t.Helper()
	chancery := binary(r.t, "chancery")
	var list []struct {
		Name, State string
		Head        struct {
			Size uint64
			Root string
		}
	}
	if err := json.Unmarshal([]byte(r.tool(chancery, "log", "status", "--config", r.s.config, "--output", "json")), &list); err != nil {
		r.t.Fatal(err)
	}
	var sth struct {
		Size uint64 `json:"tree_size"`
		Root []byte `json:"sha256_root_hash"`
	}
	if err := json.Unmarshal(mustRead(r.t, r.path("last.sth")), &sth); err != nil {
		r.t.Fatal(err)
	}
	lines := strings.Split(string(mustRead(r.t, r.path("last.checkpoint"))), "\n")
	root, err := base64.StdEncoding.DecodeString(lines[2])
	if err != nil {
		r.t.Fatal(err)
	}
	want := []string{
		"rekor-log2026-1 frozen " + lines[1] + fmt.Sprintf(" %x", root),
		fmt.Sprintf("ct-ct2026 frozen %d %x", sth.Size, sth.Root),
	}
	var got []string
	for _, l := range list {
		if l.State == "frozen" {
			got = append(got, fmt.Sprintf("%s %s %d %s", l.Name, l.State, l.Head.Size, l.Head.Root))
		}
	}
	if !slices.Equal(got, want) {
		r.t.Errorf("frozen logs %q, want %q", got, want)
	}
	verified := r.tool(chancery, "log", "verify", "--config", r.s.config)
	for _, name := range []string{"ct-ct2026", "rekor-log2026-1", "ct-ct2027", "rekor-log2026-2"} {
		if !strings.Contains(verified, "verified  "+name+": ") {
			r.t.Errorf("%s is not verified:\n%s", name, verified)
		}
	}
}

// frozen takes the last heads of logs that take nothing more, and finds that they
// are the last: no client's entry or certificate changes them.
func (r *room) frozen() {
	r.t.Helper()
	heads := map[string]string{"/log/log2026-1/api/v2/checkpoint": "last.checkpoint", "/ct/ct2026/ct/v1/get-sth": "last.sth"}
	for path, file := range heads {
		r.write(file, string(r.s.get(path, http.StatusOK)), 0o600)
	}
	for path, want := range map[string]int{
		"/api/v2/log/entries": http.StatusMethodNotAllowed, "/ct/ct2026/ct/v1/add-chain": http.StatusNotFound, "/ct/ct2026/ct/v1/add-pre-chain": http.StatusNotFound,
	} {
		if resp, err := r.s.http.Post(r.s.url+path, "application/json", strings.NewReader("{}")); err != nil || resp.StatusCode != want {
			r.t.Errorf("%s of a frozen log: %v, %v, want %d", path, resp, err, want)
		}
	}
	r.s.certificate(r.t, r.idp, http.StatusServiceUnavailable)
	if answer := string(r.s.get("/readyz", http.StatusOK)); !strings.Contains(answer, "CT log is frozen") {
		r.t.Errorf("readyz says %s", answer)
	}
	for path, file := range heads {
		if !bytes.Equal(r.s.get(path, http.StatusOK), mustRead(r.t, r.path(file))) {
			r.t.Errorf("%s of a frozen log has changed", path)
		}
	}
}

// oldShard reads the shard that has a successor: under its own path it ends with
// the checkpoint in the record, which continues what clients saw, and every entry
// of before is in it. The new shard is another log.
func (r *room) oldShard(genesis, last string, bundles map[string]string, seen []byte) {
	r.t.Helper()
	const shard = "/log/log2026-1/api/v2/"
	end := r.open(genesis, r.s.get(shard+"checkpoint", http.StatusOK))
	id := r.logID(genesis, "rekor.pub")
	frozen, err := filepath.Glob(filepath.Join(last, "frozen", fmt.Sprintf("%x.checkpoint", id[:8])))
	if err != nil || len(frozen) != 1 {
		r.t.Fatalf("frozen: %v, %v", frozen, err)
	}
	recorded, earlier := r.open(genesis, mustRead(r.t, frozen[0])), r.open(genesis, seen)
	if recorded.Size != end.Size || !bytes.Equal(recorded.Hash, end.Hash) || end.Size < uint64(len(bundles)) {
		r.t.Errorf("the old shard ends at %d, the record says %d; %d bundles", end.Size, recorded.Size, len(bundles))
	}
	tree := tlog.Tree{N: int64(end.Size), Hash: tlog.Hash(end.Hash)}
	reader := tlog.TileHashReader(tree, shardTiles{r.s, shard})
	path, err := tlog.ProveTree(tree.N, int64(earlier.Size), reader)
	if err == nil {
		err = tlog.CheckTree(path, tree.N, tree.Hash, int64(earlier.Size), tlog.Hash(earlier.Hash))
	}
	if err != nil {
		r.t.Errorf("the old shard does not continue what was seen: %v", err)
	}
	entries := r.s.get(fmt.Sprintf("%stile/entries/000.p/%d", shard, end.Size), http.StatusOK)
	for name, file := range bundles {
		b, err := bundle.LoadJSONFromPath(file)
		if err != nil {
			r.t.Fatal(err)
		}
		entry := b.GetVerificationMaterial().GetTlogEntries()[0]
		leaf := tlog.RecordHash(entry.GetCanonicalizedBody())
		path, err := tlog.ProveRecord(tree.N, entry.GetLogIndex(), reader)
		if err == nil {
			err = tlog.CheckRecord(path, tree.N, tree.Hash, entry.GetLogIndex(), leaf)
		}
		if err != nil || !bytes.Contains(entries, entry.GetCanonicalizedBody()) {
			r.t.Errorf("the entry of %s is not in the old shard: %v", name, err)
		}
	}
	if resp, err := r.s.http.Post(r.s.url+strings.TrimSuffix(shard, "/")+"/log/entries", "application/json", strings.NewReader("{}")); err != nil || resp.StatusCode != http.StatusMethodNotAllowed {
		r.t.Errorf("an entry for the old shard: %v, %v", resp, err)
	}
	r.open(last, r.s.get("/api/v2/checkpoint", http.StatusOK))
	r.open(last, r.s.get("/log/log2026-2/api/v2/checkpoint", http.StatusOK))
}

// logID is the SHA-256 of the public key in a file of the outputs.
func (r *room) logID(out, name string) [sha256.Size]byte {
	r.t.Helper()
	der, err := x509.MarshalPKIXPublicKey(publicKey(r.t, mustRead(r.t, filepath.Join(out, name))))
	if err != nil {
		r.t.Fatal(err)
	}
	return sha256.Sum256(der)
}

// oldCTShard finds the certificates of before in the CT log that has a successor,
// with certificate-transparency-go, and no way to add another.
func (r *room) oldCTShard(genesis string, bundles map[string]string) {
	r.t.Helper()
	const shard = "/ct/ct2026"
	c, err := ctclient.New(r.s.url+shard, r.s.http, jsonclient.Options{PublicKey: string(mustRead(r.t, filepath.Join(genesis, "ct.pub")))})
	if err != nil {
		r.t.Fatal(err)
	}
	sth, err := c.GetSTH(r.t.Context()) // verifies the signature
	if err != nil || sth.TreeSize < uint64(len(bundles)) {
		r.t.Fatalf("tree head %v, %v", sth, err)
	}
	for name, path := range bundles {
		b, err := bundle.LoadJSONFromPath(path)
		if err != nil {
			r.t.Fatal(err)
		}
		leaf := b.GetVerificationMaterial().GetCertificate().GetRawBytes()
		if leaf == nil {
			leaf = b.GetVerificationMaterial().GetX509CertificateChain().GetCertificates()[0].GetRawBytes()
		}
		scts, err := x509util.ParseSCTsFromCertificate(leaf)
		if err != nil || len(scts) != 1 {
			r.t.Fatalf("%d SCTs, %v", len(scts), err)
		}
		entry, err := ctgo.MerkleTreeLeafForEmbeddedSCT(ctChain(r.t, leaf, mustRead(r.t, filepath.Join(genesis, "chain.pem")))[:2], scts[0].Timestamp)
		if err != nil {
			r.t.Fatal(err)
		}
		hash, err := ctgo.LeafHashForLeaf(entry)
		if err != nil {
			r.t.Fatal(err)
		}
		got, err := c.GetProofByHash(r.t.Context(), hash[:], sth.TreeSize)
		if err == nil {
			err = proof.VerifyInclusion(rfc6962.DefaultHasher, uint64(got.LeafIndex), sth.TreeSize, hash[:], got.AuditPath, sth.SHA256RootHash[:])
		}
		if err != nil {
			r.t.Errorf("the certificate of %s is not in the old CT log: %v", name, err)
		}
	}
	if resp, err := r.s.http.Post(r.s.url+shard+"/ct/v1/add-chain", "application/json", strings.NewReader("{}")); err != nil || resp.StatusCode/100 == 2 {
		r.t.Errorf("a certificate for the old CT log: %v, %v", resp, err)
	}
}

// revokedStops puts the new list beside the old intermediate: the service does not
// run it, and is not to be started again.
func (r *room) revokedStops(genesis, last string) {
	r.t.Helper()
	trust := filepath.Join(r.t.TempDir(), "trust")
	if err := os.CopyFS(trust, os.DirFS(genesis)); err != nil {
		r.t.Fatal(err)
	}
	overwrite(r.t, filepath.Join(trust, "root.crl"), mustRead(r.t, filepath.Join(last, "root.crl")))
	r.settings["trust"] = trust
	r.s.write(r.t, r.settings)
	if got := command(r.t, r.s.env, binary(r.t, "chancery"), "serve", "--config", r.s.config); got.code != 77 || !strings.Contains(lastError(got.stderr), "certificate is revoked") {
		r.t.Errorf("a revoked intermediate: exit status %d\n%s", got.code, got.stderr)
	}
}

// otherEnd has a head on record that the old shard's key signed and that is not
// the one with which it ends, as when an old copy of the shard was put back:
// nothing of it is shown.
func (r *room) otherEnd(genesis, last string, seen []byte) {
	r.t.Helper()
	trust := filepath.Join(r.t.TempDir(), "trust")
	if err := os.CopyFS(trust, os.DirFS(last)); err != nil {
		r.t.Fatal(err)
	}
	id := r.logID(genesis, "rekor.pub")
	overwrite(r.t, filepath.Join(trust, "frozen", fmt.Sprintf("%x.checkpoint", id[:8])), seen)
	r.settings["trust"] = trust
	r.s.write(r.t, r.settings)
	r.end = r.s.serve()
	if answer := string(r.s.get("/readyz", http.StatusOK)); !strings.Contains(answer, "frozen log rekor-log2026-1") {
		r.t.Errorf("readyz says %s", answer)
	}
	r.s.get("/log/log2026-1/api/v2/checkpoint", http.StatusNotFound)
	got := command(r.t, r.env, binary(r.t, "chancery"), "log", "status", "--config", r.s.config)
	if got.code != 1 || !strings.Contains(got.stderr, "on record") || strings.Contains(got.stderr, "ct2026") {
		r.t.Errorf("log status: exit status %d\n%s%s", got.code, got.stdout, got.stderr)
	}
	r.stop()
}

// damagedShard puts another head into the old shard's anchor: nothing of the
// shard is shown, and all else is as before.
func (r *room) damagedShard(last string) {
	r.t.Helper()
	r.settings["trust"] = last
	r.s.write(r.t, r.settings)
	anchors := filepath.Join(r.path("state"), "anchor")
	overwrite(r.t, filepath.Join(anchors, "rekor-log2026-1.anchor"), mustRead(r.t, filepath.Join(anchors, "rekor-log2026-2.anchor")))
	r.end = r.s.serve()
	if answer := string(r.s.get("/readyz", http.StatusOK)); !strings.Contains(answer, "frozen log rekor-log2026-1") {
		r.t.Errorf("readyz says %s", answer)
	}
	r.s.get("/log/log2026-1/api/v2/checkpoint", http.StatusNotFound)
	for _, verb := range []string{"status", "verify"} {
		got := command(r.t, r.env, binary(r.t, "chancery"), "log", verb, "--config", r.s.config)
		if got.code != 1 || !strings.Contains(got.stderr, "log rekor-log2026-1: ") || strings.Contains(got.stderr, "ct2026") || !strings.Contains(got.stdout, "ct-ct2026") {
			r.t.Errorf("log %s: exit status %d\n%s%s", verb, got.code, got.stdout, got.stderr)
		}
	}
	r.s.get("/log/log2026-2/api/v2/checkpoint", http.StatusOK)
}

// open verifies a checkpoint with rekor.pub of a ceremony.
func (r *room) open(out string, note []byte) *log.Checkpoint {
	r.t.Helper()
	sv, err := signature.LoadVerifier(publicKey(r.t, mustRead(r.t, filepath.Join(out, "rekor.pub"))), crypto.SHA256)
	if err != nil {
		r.t.Fatal(err)
	}
	verifier, err := rekornote.NewNoteVerifier("127.0.0.1", sv)
	if err != nil {
		r.t.Fatal(err)
	}
	checkpoint, _, _, err := log.ParseCheckpoint(note, "127.0.0.1", verifier)
	if err != nil {
		r.t.Fatalf("checkpoint: %v\n%s", err, note)
	}
	return checkpoint
}

// shardTiles reads the tiles of a shard for golang.org/x/mod/sumdb/tlog.
type shardTiles struct {
	s    *site
	path string
}

func (r shardTiles) Height() int                     { return 8 }
func (r shardTiles) SaveTiles([]tlog.Tile, [][]byte) {}
func (r shardTiles) ReadTiles(ts []tlog.Tile) ([][]byte, error) {
	out := make([][]byte, len(ts))
	for i, tile := range ts {
		out[i] = r.s.get(r.path+strings.Replace(tile.Path(), "tile/8/", "tile/", 1), http.StatusOK)
	}
	return out, nil
}
