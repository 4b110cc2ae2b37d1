package ct_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	rfc6962ct "github.com/google/certificate-transparency-go"
	"github.com/google/certificate-transparency-go/client"
	"github.com/google/certificate-transparency-go/ctutil"
	"github.com/google/certificate-transparency-go/jsonclient"
	"github.com/google/certificate-transparency-go/tls"
	ctx509 "github.com/google/certificate-transparency-go/x509"
	"github.com/google/go-cmp/cmp"
	f_note "github.com/transparency-dev/formats/note"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/mod/sumdb/note"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/log/ct"
	"github.com/chancery-ca/chancery/log/head"
)

func issuerKeyHash(issuer *x509.Certificate) [32]byte {
	return sha256.Sum256(issuer.RawSubjectPublicKeyInfo)
}

// parseCT reads certificates with the library of the oracle.
func parseCT(t testing.TB, ders ...[]byte) []*ctx509.Certificate {
	t.Helper()
	var out []*ctx509.Certificate
	for _, der := range ders {
		cert, err := ctx509.ParseCertificate(der)
		if ctx509.IsFatal(err) {
			t.Fatal(err)
		}
		out = append(out, cert)
	}
	return out
}

func parseSCT(t testing.TB, der []byte) *rfc6962ct.SignedCertificateTimestamp {
	t.Helper()
	var sct rfc6962ct.SignedCertificateTimestamp
	if rest, err := tls.Unmarshal(der, &sct); err != nil || len(rest) > 0 {
		t.Fatalf("SCT: %v, %d octets left", err, len(rest))
	}
	return &sct
}

func TestPromiseBecomesEmbeddedSCT(t *testing.T) {
	f := newFixture(t)
	precert := f.leaf(t, poison)
	before := f.key.Count()
	p, err := f.log.Promise(t.Context(), issuerKeyHash(f.issuer), tbs(t, precert))
	if err != nil {
		t.Fatal(err)
	}
	if n := f.key.Count() - before; n != 1 {
		t.Errorf("a promise took %d signatures", n)
	}
	if size := f.tree.Root().Size; size != 0 {
		t.Errorf("a promise put %d leaves into the tree", size)
	}
	index, err := p.Commit(t.Context(), precert.Raw, [][]byte{f.issuer.Raw, f.root.Raw})
	if err != nil || index != 0 {
		t.Fatalf("Commit = %d, %v", index, err)
	}
	if size := f.tree.Root().Size; size != 1 {
		t.Errorf("tree of %d leaves after one commit", size)
	}
	sct := parseSCT(t, p.SCT())
	if sct.LogID.KeyID != f.log.LogID() || len(sct.Extensions) != 0 {
		t.Errorf("log id %x, extensions %x", sct.LogID.KeyID, sct.Extensions)
	}
	if err := ctutil.VerifySCT(f.key.Public(), parseCT(t, precert.Raw, f.issuer.Raw), sct, false); err != nil {
		t.Errorf("SCT with the precertificate: %v", err)
	}
	digest, signature := p.Signed()
	if !ecdsa.VerifyASN1(f.key.Public().(*ecdsa.PublicKey), digest[:], signature) || !bytes.Equal(signature, sct.Signature.Signature) {
		t.Error("Signed is not what the SCT's signature covers")
	}

	// The final certificate carries the SCT where the precertificate has its
	// poison; whoever verifies sees only that one.
	inner := binary.BigEndian.AppendUint16(nil, uint16(len(p.SCT())))
	inner = append(inner, p.SCT()...)
	list := append(binary.BigEndian.AppendUint16(nil, uint16(len(inner))), inner...)
	value, err := asn1.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	f.serial.Add(-1)
	final := f.leaf(t, pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11129, 2, 4, 2}, Value: value})
	if err := ctutil.VerifySCT(f.key.Public(), parseCT(t, final.Raw, f.issuer.Raw), sct, true); err != nil {
		t.Errorf("SCT in the final certificate: %v", err)
	}
	hash, err := ctutil.LeafHash(parseCT(t, final.Raw, f.issuer.Raw), sct, true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.tree.ByLeafHash(t.Context(), hash); err != nil {
		t.Errorf("leaf rebuilt from the final certificate: %v", err)
	}
	if again, err := p.Commit(t.Context(), precert.Raw, [][]byte{f.issuer.Raw}); err != nil || again != index {
		t.Errorf("second Commit = %d, %v; want the first index", again, err)
	}
}

// TestKeyInToken: SCTs and heads made in a token verify, one signature each.
func TestKeyInToken(t *testing.T) {
	token := hsmtest.SoftHSM(t)
	f := newFixtureWith(t, hsmtest.NewKey(t, token, "ct", hsm.ECDSAP256))
	c := f.client(t)
	before := f.key.Count()
	if _, err := c.AddPreChain(t.Context(), asn1Chain(f.chain(f.leaf(t, poison))...)); err != nil {
		t.Fatal(err)
	}
	f.publish(t)
	if sth, err := c.GetSTH(t.Context()); err != nil || sth.TreeSize != 1 {
		t.Errorf("get-sth: %v, %v", sth, err)
	}
	if n := f.key.Count() - before; n != 2 {
		t.Errorf("%d signatures for an SCT and a head", n)
	}
}

func TestCommitRefuses(t *testing.T) {
	f := newFixture(t)
	chain := [][]byte{f.issuer.Raw, f.root.Raw}
	precert, other := f.leaf(t, poison), f.leaf(t, poison)
	logged := f.leaf(t, poison)
	promise := func(c *x509.Certificate) *ct.Promise {
		p, err := f.log.Promise(t.Context(), issuerKeyHash(f.issuer), tbs(t, c))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	first := promise(logged)
	if _, err := first.Commit(t.Context(), logged.Raw, chain); err != nil {
		t.Fatal(err)
	}
	// A later SCT for a precertificate that is in the log: its leaf would have
	// another time. Promises within one millisecond are the same leaf.
	second := promise(logged)
	for deadline := time.Now().Add(time.Minute); parseSCT(t, second.SCT()).Timestamp == parseSCT(t, first.SCT()).Timestamp; second = promise(logged) {
		if time.Now().After(deadline) {
			t.Fatal("the clock stands still")
		}
	}
	for _, tc := range []struct {
		name    string
		promise *ct.Promise
		precert []byte
		chain   [][]byte
	}{
		{"another precertificate", promise(precert), other.Raw, chain},
		{"no poison", promise(precert), f.leaf(t).Raw, chain},
		{"two poisons", promise(precert), twicePoisoned(t, f), chain},
		{"not DER", promise(precert), []byte("precert"), chain},
		{"trailing octets", promise(precert), append(bytes.Clone(precert.Raw), 0), chain},
		{"empty", promise(precert), nil, chain},
		{"no issuer", promise(precert), precert.Raw, nil},
		{"logged under another SCT", second, logged.Raw, chain},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if index, err := tc.promise.Commit(t.Context(), tc.precert, tc.chain); !errors.Is(err, ct.ErrConflict) {
				t.Errorf("Commit = %d, %v; want ErrConflict", index, err)
			}
		})
	}
	if size := f.tree.Root().Size; size != 1 {
		t.Errorf("tree of %d leaves, want 1", size)
	}
}

// twicePoisoned is a precertificate with two poison extensions. x509 refuses
// to make one, so one of two other extensions is renamed.
func twicePoisoned(t testing.TB, f *fixture) []byte {
	t.Helper()
	twin := poison
	twin.Id = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11129, 2, 4, 9}
	tbs := bytes.Clone(f.leaf(t, poison, twin).RawTBSCertificate)
	from, _ := asn1.Marshal(twin.Id)
	to, _ := asn1.Marshal(poison.Id)
	if !bytes.Contains(tbs, from) {
		t.Fatal("extension not found")
	}
	tbs = bytes.Replace(tbs, from, to, 1)
	digest := sha256.Sum256(tbs)
	signature, err := f.issuerKey.SignContext(t.Context(), digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	der, err := asn1.Marshal(struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{asn1.RawValue{FullBytes: tbs}, pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}}, asn1.BitString{Bytes: signature, BitLength: 8 * len(signature)}})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestPromiseUnavailable(t *testing.T) {
	refuse := errors.New("clock went back")
	f := newFixture(t, func(c *ct.Config) {
		c.Now = func() (time.Time, error) { return time.Time{}, refuse }
	})
	if _, err := f.log.Promise(t.Context(), [32]byte{}, []byte{0x30, 0}); !errors.Is(err, ct.ErrUnavailable) || !errors.Is(err, refuse) {
		t.Errorf("clock that refuses: %v", err)
	}
	f = newFixture(t)
	f.fail(fmt.Errorf("queue: %w", hsm.ErrBusy))
	if _, err := f.log.Promise(t.Context(), [32]byte{}, []byte{0x30, 0}); !errors.Is(err, ct.ErrUnavailable) || !errors.Is(err, hsm.ErrBusy) {
		t.Errorf("busy token: %v", err)
	}
	resp, body := f.post(t, "/ct/v1/add-pre-chain", chainBody(t, f.chain(f.leaf(t, poison))...))
	if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" {
		t.Errorf("busy token over HTTP: %d %q", resp.StatusCode, body)
	}
	if strings.Contains(string(body), "queue") {
		t.Errorf("the answer shows the inner error: %q", body)
	}
	f.fail(nil)
	if size := f.tree.Root().Size; size != 0 {
		t.Errorf("tree of %d leaves", size)
	}
}

// newClient is certificate-transparency-go's own client, which verifies SCTs
// and tree heads with the key.
func (f *fixture) client(t testing.TB) *client.LogClient {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(f.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.New(f.url(""), f.srv.Client(), jsonclient.Options{PublicKeyDER: der})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func asn1Chain(chain ...[]byte) []rfc6962ct.ASN1Cert {
	var out []rfc6962ct.ASN1Cert
	for _, der := range chain {
		out = append(out, rfc6962ct.ASN1Cert{Data: der})
	}
	return out
}

func TestClientOfCertificateTransparencyGo(t *testing.T) {
	f := newFixture(t)
	c := f.client(t)
	ctx := t.Context()
	precert, cert := f.leaf(t, poison), f.leaf(t)
	sct, err := c.AddPreChain(ctx, asn1Chain(f.chain(precert)...))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.VerifySCTSignature(*sct, rfc6962ct.PrecertLogEntryType, asn1Chain(f.chain(precert)...)); err != nil {
		t.Errorf("precertificate SCT: %v", err)
	}
	if sct.LogID.KeyID != f.log.LogID() {
		t.Errorf("log id %x", sct.LogID.KeyID)
	}
	// The root may be left out (RFC 6962, Section 4.1).
	x, err := c.AddChain(ctx, asn1Chain(cert.Raw, f.issuer.Raw))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.VerifySCTSignature(*x, rfc6962ct.X509LogEntryType, asn1Chain(cert.Raw)); err != nil {
		t.Errorf("certificate SCT: %v", err)
	}

	f.publish(t)
	signatures := f.key.Count()
	again, err := c.AddPreChain(ctx, asn1Chain(f.chain(precert)...))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(sct, again); d != "" {
		t.Errorf("resubmission got another SCT: %s", d)
	}
	if n := f.key.Count() - signatures; n != 0 {
		t.Errorf("resubmission took %d signatures", n)
	}

	small, err := c.GetSTH(ctx) // verifies the signature
	if err != nil || small.TreeSize != 2 {
		t.Fatalf("get-sth: %v, %v", small, err)
	}
	f.fill(t, 11)
	f.publish(t)
	large, err := c.GetSTH(ctx)
	if err != nil || large.TreeSize != 13 {
		t.Fatalf("get-sth: %v, %v", large, err)
	}
	consistency, err := c.GetSTHConsistency(ctx, 2, 13)
	if err != nil {
		t.Fatal(err)
	}
	if err := proof.VerifyConsistency(rfc6962.DefaultHasher, 2, 13, consistency, small.SHA256RootHash[:], large.SHA256RootHash[:]); err != nil {
		t.Error(err)
	}
	hash, err := ctutil.LeafHash(parseCT(t, precert.Raw, f.issuer.Raw), sct, false)
	if err != nil {
		t.Fatal(err)
	}
	inclusion, err := c.GetProofByHash(ctx, hash[:], 13)
	if err != nil || inclusion.LeafIndex != 0 {
		t.Fatalf("get-proof-by-hash: %v, %v", inclusion, err)
	}
	if err := proof.VerifyInclusion(rfc6962.DefaultHasher, 0, 13, hash[:], inclusion.AuditPath, large.SHA256RootHash[:]); err != nil {
		t.Error(err)
	}

	entries, err := c.GetEntries(ctx, 0, 12)
	if err != nil || len(entries) != 13 {
		t.Fatalf("get-entries: %d, %v", len(entries), err)
	}
	if got := entries[0].Precert; got == nil || !bytes.Equal(got.Submitted.Data, precert.Raw) || len(entries[0].Chain) != 2 {
		t.Errorf("entry 0 is not the precertificate with its chain")
	}
	if got := entries[1].X509Cert; got == nil || !bytes.Equal(got.Raw, cert.Raw) || len(entries[1].Chain) != 2 {
		t.Errorf("entry 1 is not the certificate with its chain up to the root")
	}
	for i := range uint64(13) {
		e, err := c.GetEntryAndProof(ctx, i, 13)
		if err != nil {
			t.Fatal(err)
		}
		if err := proof.VerifyInclusion(rfc6962.DefaultHasher, i, 13, rfc6962.DefaultHasher.HashLeaf(e.LeafInput), e.AuditPath, large.SHA256RootHash[:]); err != nil {
			t.Errorf("entry %d: %v", i, err)
		}
	}
	roots, err := c.GetAcceptedRoots(ctx)
	if err != nil || len(roots) != 1 || !bytes.Equal(roots[0].Data, f.root.Raw) {
		t.Errorf("get-roots: %d, %v", len(roots), err)
	}
}

// TestRestart: a log that is opened again knows what it promised, and its next
// head is consistent with the last.
func TestRestart(t *testing.T) {
	f := newFixture(t)
	precert := f.leaf(t, poison)
	sct, err := f.client(t).AddPreChain(t.Context(), asn1Chain(f.chain(precert)...))
	if err != nil {
		t.Fatal(err)
	}
	f.fill(t, 4)
	before := f.publish(t)
	f.stop(t)
	f.start(t)
	if latest := f.heads.Latest(); latest.Size != before.Size || latest.Root != before.Root {
		t.Errorf("head of size %d after the restart, %d before", latest.Size, before.Size)
	}
	signatures := f.key.Count()
	again, err := f.client(t).AddPreChain(t.Context(), asn1Chain(f.chain(precert)...))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(sct, again); d != "" || f.key.Count() != signatures {
		t.Errorf("resubmission after the restart: %d signatures, %s", f.key.Count()-signatures, d)
	}
	f.fill(t, 3)
	after := f.publish(t)
	path, err := f.client(t).GetSTHConsistency(t.Context(), before.Size, after.Size)
	if err != nil {
		t.Fatal(err)
	}
	if err := proof.VerifyConsistency(rfc6962.DefaultHasher, before.Size, after.Size, path, before.Root[:], after.Root[:]); err != nil {
		t.Error(err)
	}
}

func TestSubmissionsAtOnceShareOneSCT(t *testing.T) {
	f := newFixture(t)
	c := f.client(t)
	precert := f.leaf(t, poison)
	type result struct {
		sct *rfc6962ct.SignedCertificateTimestamp
		err error
	}
	results := make(chan result)
	for range 16 {
		go func() {
			sct, err := c.AddPreChain(t.Context(), asn1Chain(f.chain(precert)...))
			results <- result{sct, err}
		}()
	}
	var first *rfc6962ct.SignedCertificateTimestamp
	for range 16 {
		r := <-results
		if r.err != nil {
			t.Error(r.err)
			continue
		}
		if first == nil {
			first = r.sct
		}
		if d := cmp.Diff(first, r.sct); d != "" {
			t.Error(d)
		}
	}
	if size := f.tree.Root().Size; size != 1 {
		t.Errorf("tree of %d leaves, want 1", size)
	}
}

func TestPreissuer(t *testing.T) {
	f := newFixture(t)
	key := authKey(hsm.ECDSAP256)
	pre := f.make(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "preissuer"}, IsCA: true, BasicConstraintsValid: true,
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{{1, 3, 6, 1, 4, 1, 11129, 2, 4, 4}},
	}, f.issuer, key, f.issuerKey)
	precert := f.make(t, &x509.Certificate{EmailAddresses: []string{"dev@test.example"}, ExtraExtensions: []pkix.Extension{poison}}, pre, f.leafKey, key)
	chain := asn1Chain(precert.Raw, pre.Raw, f.issuer.Raw, f.root.Raw)
	c := f.client(t)
	sct, err := c.AddPreChain(t.Context(), chain)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.VerifySCTSignature(*sct, rfc6962ct.PrecertLogEntryType, chain); err != nil {
		t.Error(err)
	}
}

func TestCheckpointAndTreeHeadShareOneSignature(t *testing.T) {
	f := newFixture(t)
	f.fill(t, 3)
	before := f.key.Count()
	signed := f.publish(t)
	if n := f.key.Count() - before; n > 1 {
		t.Errorf("one head took %d signatures", n)
	}
	resp, body := f.get(t, "/checkpoint")
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Cache-Control") != "no-cache" {
		t.Errorf("checkpoint: %d %v", resp.StatusCode, resp.Header)
	}
	vkey, err := f_note.RFC6962VerifierString("https://"+testOrigin+"/", f.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := f_note.NewRFC6962Verifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	opened, err := note.Open(body, note.VerifierList(verifier))
	if err != nil {
		t.Fatalf("checkpoint %q: %v", body, err)
	}
	if want := fmt.Sprintf("%s\n3\n", testOrigin); !strings.HasPrefix(opened.Text, want) {
		t.Errorf("checkpoint %q", opened.Text)
	}
	// The same note follows from get-sth.
	_, sth := f.get(t, "/ct/v1/get-sth")
	converted, err := f_note.RFC6962STHToCheckpoint(sth, verifier)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(body), string(converted)); d != "" {
		t.Error(d)
	}
	if signed.Size != 3 {
		t.Errorf("head of size %d", signed.Size)
	}
	for _, path := range []string{"/ct/v1/get-sth", "/ct/v1/get-roots", "/ct/v1/get-entries?start=0&end=2", "/tile/data/000.p/3"} {
		resp, _ := f.get(t, path)
		if again, body := f.get(t, path, `"other", W/`+resp.Header.Get("ETag")); again.StatusCode != http.StatusNotModified || len(body) > 0 {
			t.Errorf("%s that the client has: %d", path, again.StatusCode)
		}
	}
	if resp, _ := f.get(t, "/checkpoint", resp.Header.Get("ETag")); resp.StatusCode != http.StatusNotModified {
		t.Errorf("checkpoint that the client has: %d", resp.StatusCode)
	}
}

func TestFormatRefuses(t *testing.T) {
	key := authKey(hsm.ECDSAP256)
	for name, origin := range map[string]string{
		"empty":       "",
		"space":       "ct.example/a b",
		"newline":     "ct.example\n",
		"plus":        "ct.example+1",
		"scheme":      "https://ct.example/2026",
		"final slash": "ct.example/2026/",
		"upper case":  "CT.example",
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := ct.NewFormat(origin, key.Public()); err == nil {
				t.Errorf("accepted %q", origin)
			}
		})
	}
	if _, err := ct.NewFormat(testOrigin, authKey(hsm.ECDSAP384).Public()); err == nil {
		t.Error("accepted a P-384 key")
	}
	format, err := ct.NewFormat(testOrigin, key.Public())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := format.Message(head.Head{Time: time.Unix(-1, 0)}); err == nil {
		t.Error("accepted a head of before 1970")
	}
}

func TestTiles(t *testing.T) {
	f := newFixture(t)
	f.fill(t, 300)
	signed := f.publish(t)
	resp, level0 := f.get(t, "/tile/0/000")
	if resp.StatusCode != 200 || len(level0) != 256*32 || !strings.Contains(resp.Header.Get("Cache-Control"), "immutable") {
		t.Fatalf("full tile: %d, %d octets, %v", resp.StatusCode, len(level0), resp.Header)
	}
	resp, rest := f.get(t, "/tile/0/001.p/44")
	if resp.StatusCode != 200 || len(rest) != 44*32 || strings.Contains(resp.Header.Get("Cache-Control"), "immutable") {
		t.Fatalf("partial tile: %d, %d octets, %v", resp.StatusCode, len(rest), resp.Header)
	}
	hashes := append(level0, rest...)
	if got := merkleRoot(hashes); !bytes.Equal(got, signed.Root[:]) {
		t.Errorf("root from the tiles %x, head %x", got, signed.Root)
	}
	_, level1 := f.get(t, "/tile/1/000.p/1")
	if want := merkleRoot(hashes[:256*32]); !bytes.Equal(level1, want) {
		t.Errorf("level 1 holds %x, want %x", level1, want)
	}
	if resp, _ := f.get(t, "/tile/0/000", resp.Header.Get("ETag")); resp.StatusCode != 200 {
		t.Errorf("another tile's tag: %d", resp.StatusCode)
	}

	_, data := f.get(t, "/tile/data/000")
	_, more := f.get(t, "/tile/data/001.p/44")
	n := 0
	for data = append(data, more...); len(data) > 0; n++ {
		leaf, issuers, next := readTileLeaf(t, data)
		if got := rfc6962.DefaultHasher.HashLeaf(leaf); !bytes.Equal(got, hashes[n*32:][:32]) {
			t.Fatalf("entry %d of the data tiles has another leaf hash", n)
		}
		if len(issuers) != 2 || issuers[0] != sha256.Sum256(f.issuer.Raw) || issuers[1] != sha256.Sum256(f.root.Raw) {
			t.Fatalf("entry %d names issuers %x", n, issuers)
		}
		data = next
	}
	if n != 300 {
		t.Errorf("%d entries in the data tiles", n)
	}
	sum := sha256.Sum256(f.issuer.Raw)
	if resp, der := f.get(t, "/issuer/"+hex.EncodeToString(sum[:])); resp.StatusCode != 200 || !bytes.Equal(der, f.issuer.Raw) {
		t.Errorf("issuer: %d", resp.StatusCode)
	}
}

// readTileLeaf reads one TileLeaf and gives back its MerkleTreeLeaf.
func readTileLeaf(t testing.TB, data []byte) (leaf []byte, issuers [][32]byte, rest []byte) {
	t.Helper()
	var entry rfc6962ct.TimestampedEntry
	rest, err := tls.Unmarshal(data, &entry)
	if err != nil {
		t.Fatal(err)
	}
	leaf = append([]byte{0, 0}, data[:len(data)-len(rest)]...)
	var tail struct {
		Precert      []byte     `tls:"minlen:1,maxlen:16777215"`
		Fingerprints [][32]byte `tls:"minlen:0,maxlen:65535"`
	}
	if rest, err = tls.Unmarshal(rest, &tail); err != nil {
		t.Fatal(err)
	}
	if cert, err := x509.ParseCertificate(tail.Precert); err != nil || len(cert.Raw) != len(tail.Precert) {
		t.Fatalf("precertificate: %v", err)
	}
	return leaf, tail.Fingerprints, rest
}

// merkleRoot is RFC 6962, Section 2.1 by its definition.
func merkleRoot(hashes []byte) []byte {
	n := len(hashes) / 32
	if n == 1 {
		return hashes
	}
	k := 1
	for 2*k < n {
		k *= 2
	}
	return rfc6962.DefaultHasher.HashChildren(merkleRoot(hashes[:k*32]), merkleRoot(hashes[k*32:]))
}

func TestNewRefuses(t *testing.T) {
	f := newFixture(t)
	good := ct.Config{Tree: f.tree, Heads: f.heads, Key: f.key, Roots: []*x509.Certificate{f.root}, Origin: testOrigin, Now: wallClock}
	for name, change := range map[string]func(*ct.Config){
		"no tree":        func(c *ct.Config) { c.Tree = nil },
		"no heads":       func(c *ct.Config) { c.Heads = nil },
		"no key":         func(c *ct.Config) { c.Key = nil },
		"no clock":       func(c *ct.Config) { c.Now = nil },
		"no roots":       func(c *ct.Config) { c.Roots = nil },
		"bad origin":     func(c *ct.Config) { c.Origin = "https://ct.example" },
		"P-384 key":      func(c *ct.Config) { c.Key = authKey(hsm.ECDSAP384) },
		"negative limit": func(c *ct.Config) { c.MaxInFlight = -1 },
		"broken root":    func(c *ct.Config) { c.Roots = []*x509.Certificate{{Raw: []byte("root")}} },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := good
			change(&cfg)
			if _, err := ct.New(cfg); err == nil {
				t.Error("accepted")
			}
		})
	}
	if _, err := ct.New(good); err != nil {
		t.Error(err)
	}
}
