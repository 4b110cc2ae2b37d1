package test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	ctgo "github.com/google/certificate-transparency-go"
	ctclient "github.com/google/certificate-transparency-go/client"
	"github.com/google/certificate-transparency-go/ctutil"
	"github.com/google/certificate-transparency-go/jsonclient"
	ctx509 "github.com/google/certificate-transparency-go/x509"
	"github.com/google/certificate-transparency-go/x509util"
	"github.com/google/go-cmp/cmp"
	rekornote "github.com/sigstore/rekor-tiles/v2/pkg/note"
	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/transparency-dev/formats/log"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	zx509 "github.com/zmap/zcrypto/x509"
	"github.com/zmap/zlint/v3"
	"github.com/zmap/zlint/v3/lint"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// TestWholePath signs one file as `chancery demo` does and looks at everything
// that came of it with software that is not ours.
func TestWholePath(t *testing.T) {
	d := startDemo(t, filepath.Join(t.TempDir(), "demo"))
	b := d.signed("hello.txt.sigstore.json")
	leaf := b.leaf(t)

	t.Run("openssl verifies the chain", func(t *testing.T) { opensslChain(t, d, leaf) })
	t.Run("openssl verifies the timestamp", func(t *testing.T) { opensslTimestamp(t, d, b) })
	t.Run("zlint passes the certificate", func(t *testing.T) { lintLeaf(t, leaf) })
	t.Run("certificate-transparency-go verifies the SCT and its inclusion", func(t *testing.T) {
		checkCT(t, d, leaf, d.read("trust", "chain.pem"))
		resubmit(t, d, leaf)
	})
	t.Run("merkle verifies the log entry", func(t *testing.T) { b.checkInclusion(t, d) })
	t.Run("ALPN offers h2", func(t *testing.T) {
		resp, err := d.http.Get(d.url + "/healthz")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.ProtoMajor != 2 || resp.TLS.NegotiatedProtocol != "h2" {
			t.Errorf("protocol %s, ALPN %q", resp.Proto, resp.TLS.NegotiatedProtocol)
		}
	})
	t.Run("health", func(t *testing.T) {
		for _, path := range []string{"/healthz", "/readyz"} {
			if body := d.get(path, http.StatusOK); !strings.Contains(string(body), `"SERVING"`) {
				t.Errorf("%s: %s", path, body)
			}
		}
	})
	t.Run("unknown paths and methods", func(t *testing.T) {
		if body := d.get("/nothing", http.StatusNotFound); !strings.Contains(string(body), `"code":5`) {
			t.Errorf("unknown path: %s", body)
		}
		if body := d.get("/api/v2/signingCert", http.StatusNotImplemented); !strings.Contains(string(body), `"code":12`) {
			t.Errorf("wrong method: %s", body)
		}
	})
}

// signedBundle is a bundle that a client wrote.
type signedBundle struct{ *bundle.Bundle }

func (d *demo) signed(name string) signedBundle {
	d.t.Helper()
	b := new(bundle.Bundle)
	if err := b.UnmarshalJSON(d.read(name)); err != nil {
		d.t.Fatal(err)
	}
	return signedBundle{b}
}

func (b signedBundle) leaf(t *testing.T) *x509.Certificate {
	t.Helper()
	leaf, err := x509.ParseCertificate(b.GetVerificationMaterial().GetCertificate().GetRawBytes())
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

func writePEM(t *testing.T, der []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "certificate.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func opensslChain(t *testing.T, d *demo, leaf *x509.Certificate) {
	out := must(t, nil, "openssl", "verify", "-x509_strict", "-purpose", "any", "-CAfile", d.path("trust", "root.pem"),
		"-untrusted", d.path("trust", "intermediate.pem"), "-verify_email", user, writePEM(t, leaf.Raw))
	if !strings.Contains(out, ": OK") {
		t.Errorf("openssl: %s", out)
	}
	// The check can fail: another root does not verify.
	if r := command(t, nil, "openssl", "verify", "-CAfile", d.path("tls-ca.pem"),
		"-untrusted", d.path("trust", "intermediate.pem"), writePEM(t, leaf.Raw)); r.code == 0 {
		t.Error("openssl accepted the chain under another root")
	}
}

func opensslTimestamp(t *testing.T, d *demo, b signedBundle) {
	stamps := b.GetVerificationMaterial().GetTimestampVerificationData().GetRfc3161Timestamps()
	if len(stamps) != 1 {
		t.Fatalf("%d timestamps, want one", len(stamps))
	}
	dir := t.TempDir()
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	reply := write("reply.tsr", stamps[0].GetSignedTimestamp())
	data := write("signature", b.GetMessageSignature().GetSignature())
	leaf, root := splitChain(t, d.read("trust", "tsa-chain.pem"))
	args := []string{"ts", "-verify", "-in", reply, "-data", data,
		"-CAfile", write("root.pem", root), "-untrusted", write("leaf.pem", leaf)}
	if r := command(t, nil, "openssl", args...); r.code != 0 || !strings.Contains(r.stdout+r.stderr, "Verification: OK") {
		t.Errorf("openssl: exit status %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	args[5] = write("other", []byte("another signature"))
	if r := command(t, nil, "openssl", args...); r.code == 0 {
		t.Error("openssl accepted the timestamp for other data")
	}
}

// splitChain returns the first and the last certificate of a PEM chain.
func splitChain(t *testing.T, chain []byte) (first, last []byte) {
	t.Helper()
	for {
		var block *pem.Block
		if block, chain = pem.Decode(chain); block == nil {
			break
		}
		last = pem.EncodeToMemory(block)
		if first == nil {
			first = last
		}
	}
	if bytes.Equal(first, last) {
		t.Fatal("the chain has fewer than two certificates")
	}
	return first, last
}

func lintLeaf(t *testing.T, leaf *x509.Certificate) {
	registry, err := lint.GlobalRegistry().Filter(lint.FilterOptions{IncludeSources: lint.SourceList{
		lint.RFC3279, lint.RFC5280, lint.RFC5480, lint.RFC5891, lint.RFC8813, lint.Community,
	}})
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := zx509.ParseCertificate(leaf.Raw)
	if err != nil {
		t.Fatal(err)
	}
	results := zlint.LintCertificateEx(parsed, registry)
	if len(results.Results) < 50 {
		t.Fatalf("only %d lints ran", len(results.Results))
	}
	for id, result := range results.Results {
		if result.Status >= lint.Warn && !lintExceptions[id] {
			t.Errorf("%s: %s %s", id, result.Status, result.Details)
		}
	}
}

// lintExceptions are the findings that the profile accepts on purpose; the
// reasons stand in ca/profile.
var lintExceptions = map[string]bool{}

// checkCT looks for leaf, whose issuers are in the PEM issuers, in the log of d.
func checkCT(t *testing.T, d *demo, leaf *x509.Certificate, issuers []byte) {
	ctx := context.Background()
	pub, logClient := d.read("trust", "ct.pub"), d.ctClient(t)
	chain := ctChain(t, leaf.Raw, issuers)
	scts, err := x509util.ParseSCTsFromCertificate(leaf.Raw)
	if err != nil || len(scts) != 1 {
		t.Fatalf("%d SCTs, %v", len(scts), err)
	}
	key := publicKey(t, pub)
	if err := ctutil.VerifySCT(key, chain[:2], scts[0], true); err != nil {
		t.Errorf("SCT: %v", err)
	}
	changed := *scts[0]
	changed.Timestamp++
	if err := ctutil.VerifySCT(key, chain[:2], &changed, true); err == nil {
		t.Error("an SCT with another timestamp verified")
	}

	merkleLeaf, err := ctgo.MerkleTreeLeafForEmbeddedSCT(chain[:2], scts[0].Timestamp)
	if err != nil {
		t.Fatal(err)
	}
	hash, err := ctgo.LeafHashForLeaf(merkleLeaf)
	if err != nil {
		t.Fatal(err)
	}
	// The tree head follows within the merge delay; it is made once a second.
	var sth *ctgo.SignedTreeHead
	var got *ctgo.GetProofByHashResponse
	eventually(t, "a tree head over the certificate", func() bool {
		sth = awaitSTH(t, logClient, 1)
		got, err = logClient.GetProofByHash(ctx, hash[:], sth.TreeSize)
		return err == nil
	})
	if err := proof.VerifyInclusion(rfc6962.DefaultHasher, uint64(got.LeafIndex), sth.TreeSize, hash[:], got.AuditPath, sth.SHA256RootHash[:]); err != nil {
		t.Errorf("inclusion: %v", err)
	}
	entries, err := logClient.GetEntries(ctx, got.LeafIndex, got.LeafIndex)
	if err != nil || len(entries) != 1 || entries[0].Precert == nil {
		t.Fatalf("entry %d: %v, %v", got.LeafIndex, entries, err)
	}
	roots, err := logClient.GetAcceptedRoots(ctx)
	if err != nil || !slices.ContainsFunc(roots, func(root ctgo.ASN1Cert) bool { return bytes.Equal(root.Data, chain[len(chain)-1].Raw) }) {
		t.Errorf("the root is not among %d accepted ones, %v", len(roots), err)
	}
}

// resubmit sends to the log over HTTPS what is in it, which must give the SCT
// of the first time, and something new, and proves that old and new heads are
// of one tree. Everything is verified by certificate-transparency-go.
func resubmit(t *testing.T, d *demo, leaf *x509.Certificate) {
	ctx, c := context.Background(), d.ctClient(t)
	key, chain := publicKey(t, d.read("trust", "ct.pub")), ctChain(t, leaf.Raw, d.read("trust", "chain.pem"))
	before := awaitSTH(t, c, 1)
	entries, err := c.GetEntries(ctx, 0, 0)
	if err != nil || len(entries) != 1 || entries[0].Precert == nil {
		t.Fatalf("entry 0: %v, %v", entries, err)
	}
	embedded, err := x509util.ParseSCTsFromCertificate(leaf.Raw)
	if err != nil || len(embedded) != 1 {
		t.Fatalf("%d SCTs, %v", len(embedded), err)
	}
	precert := []ctgo.ASN1Cert{entries[0].Precert.Submitted, {Data: chain[1].Raw}}
	for range 2 {
		again, err := c.AddPreChain(ctx, precert)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(embedded[0], again); d != "" {
			t.Errorf("the precertificate got another SCT than the certificate carries: %s", d)
		}
	}
	final := []ctgo.ASN1Cert{{Data: leaf.Raw}, {Data: chain[1].Raw}, {Data: chain[2].Raw}}
	first, err := c.AddChain(ctx, final)
	if err != nil {
		t.Fatal(err)
	}
	if err := ctutil.VerifySCT(key, chain, first, false); err != nil {
		t.Errorf("SCT for the certificate: %v", err)
	}
	second, err := c.AddChain(ctx, final[:2])
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(first, second); d != "" {
		t.Errorf("the certificate got another SCT: %s", d)
	}
	after := awaitSTH(t, c, before.TreeSize+1)
	hash, err := ctutil.LeafHash(chain, first, false)
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.GetProofByHash(ctx, hash[:], after.TreeSize)
	if err != nil {
		t.Fatal(err)
	}
	if err := proof.VerifyInclusion(rfc6962.DefaultHasher, uint64(got.LeafIndex), after.TreeSize, hash[:], got.AuditPath, after.SHA256RootHash[:]); err != nil {
		t.Errorf("inclusion of the certificate: %v", err)
	}
	path, err := c.GetSTHConsistency(ctx, before.TreeSize, after.TreeSize)
	if err != nil {
		t.Fatal(err)
	}
	if err := proof.VerifyConsistency(rfc6962.DefaultHasher, before.TreeSize, after.TreeSize, path, before.SHA256RootHash[:], after.SHA256RootHash[:]); err != nil {
		t.Errorf("consistency: %v", err)
	}
}

// awaitSTH polls for a verified tree head of at least size, within the log's
// merge delay.
func awaitSTH(t *testing.T, c *ctclient.LogClient, size uint64) *ctgo.SignedTreeHead {
	t.Helper()
	var sth *ctgo.SignedTreeHead
	eventually(t, "a tree head", func() bool {
		var err error
		if sth, err = c.GetSTH(context.Background()); err != nil { // verifies the signature
			t.Fatal(err)
		}
		return sth.TreeSize >= size
	})
	return sth
}

func ctChain(t *testing.T, leaf, issuers []byte) []*ctx509.Certificate {
	t.Helper()
	first, err := ctx509.ParseCertificate(leaf)
	if ctx509.IsFatal(err) {
		t.Fatal(err)
	}
	chain := []*ctx509.Certificate{first}
	for {
		var block *pem.Block
		if block, issuers = pem.Decode(issuers); block == nil {
			return chain
		}
		c, err := ctx509.ParseCertificate(block.Bytes)
		if ctx509.IsFatal(err) {
			t.Fatal(err)
		}
		chain = append(chain, c)
	}
}

func publicKey(t *testing.T, raw []byte) crypto.PublicKey {
	t.Helper()
	block, _ := pem.Decode(raw)
	if block == nil {
		t.Fatal("no PEM public key")
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// checkInclusion verifies the bundle's log entry with transparency-dev/merkle
// and rekor-tiles' checkpoint verifier, and finds the entry in its tile.
func (b signedBundle) checkInclusion(t *testing.T, d *demo) {
	entries := b.GetVerificationMaterial().GetTlogEntries()
	if len(entries) != 1 {
		t.Fatalf("%d log entries, want one", len(entries))
	}
	entry, path := entries[0], entries[0].GetInclusionProof()
	checkpoint := d.openCheckpoint(t, []byte(path.GetCheckpoint().GetEnvelope()))
	if checkpoint.Size != uint64(path.GetTreeSize()) || !bytes.Equal(checkpoint.Hash, path.GetRootHash()) {
		t.Errorf("the proof is for size %d, the checkpoint for %d", path.GetTreeSize(), checkpoint.Size)
	}
	hash := rfc6962.DefaultHasher.HashLeaf(entry.GetCanonicalizedBody())
	if err := proof.VerifyInclusion(rfc6962.DefaultHasher, uint64(path.GetLogIndex()), checkpoint.Size, hash, path.GetHashes(), checkpoint.Hash); err != nil {
		t.Errorf("inclusion: %v", err)
	}
	bundleTile := d.get("/api/v2/tile/entries/000.p/1", http.StatusOK)
	if entry.GetLogIndex() == 0 && !bytes.Equal(bundleTile[2:], entry.GetCanonicalizedBody()) {
		t.Error("the entry bundle does not hold the entry")
	}
}

// openCheckpoint verifies a checkpoint with the trusted key and origin.
func (d *demo) openCheckpoint(t *testing.T, raw []byte) *log.Checkpoint {
	t.Helper()
	pub := publicKey(t, d.read("trust", "rekor.pub"))
	sv, err := signature.LoadVerifier(pub, crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := rekornote.NewNoteVerifier("127.0.0.1", sv)
	if err != nil {
		t.Fatal(err)
	}
	checkpoint, _, _, err := log.ParseCheckpoint(raw, "127.0.0.1", verifier)
	if err != nil {
		t.Fatalf("checkpoint: %v\n%s", err, raw)
	}
	if n, err := note.Open(raw, note.VerifierList(verifier)); err != nil || len(n.Sigs) != 1 {
		t.Fatalf("signature lines: %v", err)
	}
	return checkpoint
}

// TestRestart stops the demo and opens it again: the logs go on where they
// were, and keys, issuer and trust are the same.
func TestRestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "demo")
	d := startDemo(t, dir)
	for range 3 {
		d.sign(t)
	}
	before := d.openCheckpoint(t, d.get("/api/v2/checkpoint", http.StatusOK))
	sthBefore := d.sth(t)
	trusted, issuer := d.read("trusted_root.json"), d.issuer
	d.stop()

	d = startDemo(t, dir, "--listen", freePort(t))
	if !bytes.Equal(trusted, d.read("trusted_root.json")) || d.issuer != issuer {
		t.Error("trusted root or issuer changed with the restart")
	}
	if !strings.Contains(string(d.read("signing_config.v0.2.json")), d.url) {
		t.Errorf("the signing configuration does not name %s", d.url)
	}
	d.sign(t)
	after := d.openCheckpoint(t, d.get("/api/v2/checkpoint", http.StatusOK))
	if after.Size <= before.Size {
		t.Fatalf("the log has %d entries after the restart, %d before", after.Size, before.Size)
	}
	// Consistency, from tiles alone, with Go's own transparency log client.
	reader := tlog.TileHashReader(tlog.Tree{N: int64(after.Size), Hash: tlog.Hash(after.Hash)}, tiles{t, d})
	consistent, err := tlog.ProveTree(int64(after.Size), int64(before.Size), reader)
	if err != nil {
		t.Fatal(err)
	}
	if err := tlog.CheckTree(consistent, int64(after.Size), tlog.Hash(after.Hash), int64(before.Size), tlog.Hash(before.Hash)); err != nil {
		t.Errorf("the signature log forked: %v", err)
	}
	d.checkCTConsistency(t, sthBefore)
}

// tiles reads tiles for golang.org/x/mod/sumdb/tlog.
type tiles struct {
	t *testing.T
	d *demo
}

func (r tiles) Height() int                     { return 8 }
func (r tiles) SaveTiles([]tlog.Tile, [][]byte) {}
func (r tiles) ReadTiles(ts []tlog.Tile) ([][]byte, error) {
	out := make([][]byte, len(ts))
	for i, tile := range ts {
		// tlog writes tile/8/L/N; C2SP leaves the height out.
		path := strings.Replace(tile.Path(), "tile/8/", "tile/", 1)
		out[i] = r.d.get("/api/v2/"+path, http.StatusOK)
	}
	return out, nil
}

func (d *demo) sth(t *testing.T) *ctgo.SignedTreeHead {
	t.Helper()
	c := d.ctClient(t)
	sth, err := c.GetSTH(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return sth
}

func (d *demo) ctClient(t *testing.T) *ctclient.LogClient {
	t.Helper()
	c, err := ctclient.New(d.url+"/ct/ct1", d.http, jsonclient.Options{PublicKey: string(d.read("trust", "ct.pub"))})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (d *demo) checkCTConsistency(t *testing.T, before *ctgo.SignedTreeHead) {
	t.Helper()
	c := d.ctClient(t)
	after := awaitSTH(t, c, before.TreeSize+1)
	path, err := c.GetSTHConsistency(context.Background(), before.TreeSize, after.TreeSize)
	if err != nil {
		t.Fatal(err)
	}
	if err := proof.VerifyConsistency(rfc6962.DefaultHasher, before.TreeSize, after.TreeSize, path, before.SHA256RootHash[:], after.SHA256RootHash[:]); err != nil {
		t.Errorf("the CT log forked: %v", err)
	}
	if after.Timestamp < before.Timestamp {
		t.Error("the CT log's time went back")
	}
}

// sign signs a fresh file with `chancery sign` and verifies the bundle.
func (d *demo) sign(t testing.TB) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "file")
	random := make([]byte, 32)
	_, _ = rand.Read(random)
	if err := os.WriteFile(file, random, 0o600); err != nil {
		t.Fatal(err)
	}
	chancery := binary(t, "chancery")
	must(t, nil, chancery, "sign", "--trust", d.dir, "--token", d.path("token"), file)
	must(t, nil, chancery, "verify", "--trust", d.dir, "--certificate-identity", user, "--certificate-oidc-issuer", d.issuer, file)
}

// freshKey makes a P-256 key as a client does for one signature.
func freshKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// signingRequest is the body of POST /api/v2/signingCert for a key, whose proof
// of possession signs subject.
func signingRequest(t testing.TB, key *ecdsa.PrivateKey, token, subject string) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte(subject))
	possession, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	body, err := json.Marshal(map[string]any{
		"credentials": map[string]string{"oidcIdentityToken": token},
		"publicKeyRequest": map[string]any{
			"publicKey":         map[string]string{"algorithm": "ECDSA", "content": string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))},
			"proofOfPossession": base64.StdEncoding.EncodeToString(possession),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// TestRefusedTokens sends what an attacker would send to the running service.
// The whole table of refusals is tested in ca/server; here the point is that
// the running service is joined to it.
func TestRefusedTokens(t *testing.T) {
	d := startDemo(t, filepath.Join(t.TempDir(), "demo"))
	const refused = "There was an error processing the identity token"
	good := d.token(nil)
	tests := []struct {
		name, token, subject string
		status               int
		message              string
	}{
		{"good", good, user, http.StatusOK, ""},
		{"expired", d.token(map[string]any{"exp": 1}), user, http.StatusBadRequest, refused},
		{"another audience", d.token(map[string]any{"aud": "elsewhere"}), user, http.StatusBadRequest, refused},
		{"unknown issuer", d.token(map[string]any{"iss": "https://idp.example"}), user, http.StatusBadRequest, refused},
		{"e-mail not verified", d.token(map[string]any{"email_verified": false}), user, http.StatusBadRequest, refused},
		{"1 MiB long", good + strings.Repeat("A", 1<<20), user, http.StatusBadRequest, refused},
		{"signature cut off", good[:strings.LastIndexByte(good, '.')+1], user, http.StatusBadRequest, refused},
		{"proof of possession of another subject", good, "mallory@example.com", http.StatusBadRequest, "The signature supplied in the request could not be verified"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			body := d.post("/api/v2/signingCert", "application/json", signingRequest(t, freshKey(t), test.token, test.subject), test.status)
			if !strings.Contains(string(body), test.message) {
				t.Errorf("answer %.300s, want %q", body, test.message)
			}
		})
	}
}

// TestDeviceLogin signs without a token and without a terminal: the client
// logs in by the device flow at the provider that the signing configuration
// names.
func TestDeviceLogin(t *testing.T) {
	d := startDemo(t, filepath.Join(t.TempDir(), "demo"))
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("by device\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	chancery := binary(t, "chancery")
	r := command(t, []string{"SIGSTORE_ID_TOKEN="}, chancery, "sign", "--trust", d.dir, file)
	if r.code != 0 || !strings.Contains(r.stderr, d.issuer+"/device?user_code=") {
		t.Fatalf("exit status %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	must(t, nil, chancery, "verify", "--trust", d.dir, "--certificate-identity", user, "--certificate-oidc-issuer", d.issuer, file)
}

// TestNoPrivateKeyOutsideTokens looks at every file that a demo wrote.
func TestNoPrivateKeyOutsideTokens(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "demo")
	needSoftHSM(t)
	must(t, nil, binary(t, "chancery"), "demo", "--once", "--dir", dir)
	// The TLS key, the demo's TLS authority and its identity provider; nothing
	// that a signature is verified with.
	allowed := map[string]bool{"tls/ca.key": true, "tls/server.key": true, "identity-provider.key": true}
	found := privateKeys(t, dir)
	for path := range found {
		if !allowed[path] {
			t.Errorf("%s holds a private key", path)
		}
	}
	for path := range allowed {
		if !found[path] {
			t.Errorf("the search did not find the private key in %s: it would not find another either", path)
		}
	}
	pin := strings.TrimSpace(string(mustRead(t, filepath.Join(dir, "pins", "online"))))
	if hits := grep(t, dir, pin); len(hits) != 1 || hits[0] != "pins/online" {
		t.Errorf("the PIN stands in %v", hits)
	}
}

func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// grep lists the files below dir that contain text.
func grep(t *testing.T, dir, text string) []string {
	t.Helper()
	var hits []string
	walk(t, dir, func(path string, content []byte) {
		if bytes.Contains(content, []byte(text)) {
			hits = append(hits, path)
		}
	})
	return hits
}

// privateKeys lists the files below dir that contain a private key: PEM, or
// DER in one of the forms in which a P-256, P-384 or RSA key can be written.
func privateKeys(t *testing.T, dir string) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	walk(t, dir, func(path string, content []byte) {
		if bytes.Contains(content, []byte("PRIVATE KEY")) || derKey(content) {
			found[path] = true
		}
	})
	return found
}

// derKey looks for the beginning of an ECPrivateKey (RFC 5915) and of a PKCS#8
// PrivateKeyInfo (RFC 5958) at every offset.
func derKey(content []byte) bool {
	for _, marker := range [][]byte{
		{0x02, 0x01, 0x01, 0x04, 0x20}, // version 1, 32 octets
		{0x02, 0x01, 0x01, 0x04, 0x30}, // version 1, 48 octets
	} {
		for rest := content; ; {
			at := bytes.Index(rest, marker)
			if at < 0 {
				break
			}
			if at >= 2 && rest[at-2] == 0x30 {
				return true
			}
			rest = rest[at+1:]
		}
	}
	return false
}

func walk(t *testing.T, dir string, visit func(path string, content []byte)) {
	t.Helper()
	files := 0
	err := filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // a program that runs here has removed it
		}
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		files++
		rel, err := filepath.Rel(dir, path)
		visit(rel, content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if files < 20 {
		t.Fatalf("only %d files below %s: this would show nothing", files, dir)
	}
}

// TestStartRefusals starts the demo's folder with something wrong in it. Each
// is a sentence, the right exit status, and no service.
func TestStartRefusals(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "demo")
	needSoftHSM(t)
	chancery := binary(t, "chancery")
	must(t, nil, chancery, "demo", "--once", "--dir", dir)
	replace := func(name, old, new string) func(t *testing.T) {
		return func(t *testing.T) {
			path := filepath.Join(dir, name)
			raw := mustRead(t, path)
			changed := bytes.Replace(raw, []byte(old), []byte(new), 1)
			if bytes.Equal(raw, changed) {
				t.Fatalf("%s does not contain %q", name, old)
			}
			overwrite(t, path, changed)
			t.Cleanup(func() { overwrite(t, path, raw) })
		}
	}
	ring := string(mustRead(t, filepath.Join(dir, "trust", "keys.yaml")))
	at := strings.Index(ring, "  ct:")
	spki := ring[at+strings.Index(ring[at:], "spki-sha256: ")+len("spki-sha256: "):][:64]
	pin := string(mustRead(t, filepath.Join(dir, "pins", "online")))

	tests := []struct {
		name    string
		spoil   func(t *testing.T)
		code    int
		message string
	}{
		{"key with another public key", replace("trust/keys.yaml", spki, strings.Repeat("f", 63)+"1"), 77, "ct"},
		{"no key ring", func(t *testing.T) { hide(t, filepath.Join(dir, "trust", "keys.yaml")) }, 1, "keys"},
		{"no anchor", func(t *testing.T) { hide(t, filepath.Join(dir, "state", "anchor", "rekor-log1.anchor")) }, 1, "anchor"},
		{"no log", func(t *testing.T) { hide(t, filepath.Join(dir, "state", "log", "admin.db")) }, 1, "log"},
		{"an address that is taken", func(t *testing.T) { occupy(t, dir) }, 1, "hint: is this demo running already?"},
		{"nothing wrong", func(*testing.T) {}, 0, ""}, // nothing above was lost
		// Last: the token remembers a wrong PIN and is not asked again.
		{"wrong PIN", replace("pins/online", pin, "0000"), 77, "PIN"},
		{"right PIN after a wrong one", func(*testing.T) {}, 77, "USER_PIN_COUNT_LOW"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			test.spoil(t)
			r := command(t, nil, chancery, "demo", "--once", "--dir", dir)
			if r.code != test.code || (r.code != 0 && lastError(r.stderr) == "") || !strings.Contains(r.stderr, test.message) {
				t.Errorf("exit status %d, want %d\n%s", r.code, test.code, r.stderr)
			}
			if r.code == 77 && !strings.Contains(r.stderr, "\nhint: ") {
				t.Errorf("nobody is told what to do:\n%s", r.stderr)
			}
			if strings.Contains(r.stderr+r.stdout, pin) {
				t.Error("the output contains the PIN")
			}
		})
	}
}

// occupy listens where the demo did.
func occupy(t *testing.T, dir string) {
	t.Helper()
	d := &demo{t: t, dir: dir}
	d.connect()
	l, err := net.Listen("tcp", strings.TrimPrefix(d.url, "https://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
}

// lastError returns the line with which a program explains its end.
func lastError(stderr string) string {
	for _, line := range strings.Split(stderr, "\n") {
		if strings.HasPrefix(line, "chancery: error: ") {
			return line
		}
	}
	return ""
}

func overwrite(t *testing.T, path string, data []byte) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, info.Mode().Perm()); err != nil {
		t.Fatal(err)
	}
}

// hide moves a file away until the test ends; what the program wrote in its
// place is removed.
func hide(t *testing.T, path string) {
	t.Helper()
	if err := os.Rename(path, path+".hidden"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Rename(path+".hidden", path); err != nil {
			t.Fatal(err)
		}
	})
}

// TestNoSoftHSM runs the demo where the library is not installed.
func TestNoSoftHSM(t *testing.T) {
	needSoftHSM(t)
	if os.Getuid() != 0 {
		t.Skip("hiding the library takes a mount namespace: root only")
	}
	unshare, err := exec.LookPath("unshare")
	if err != nil {
		t.Skip("unshare is not installed")
	}
	dir := filepath.Join(t.TempDir(), "demo")
	script := `mount --bind /dev/null "$1" && exec "$2" demo --once --dir "$3"`
	module := softHSMPath(t)
	r := command(t, nil, unshare, "--mount", "sh", "-c", script, "sh", module, binary(t, "chancery"), dir)
	if r.code != 1 || !strings.Contains(r.stderr, "SoftHSM is not installed") || !strings.Contains(r.stderr, "hint: ") {
		t.Errorf("exit status %d\n%s", r.code, r.stderr)
	}
}
