package rekor_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/gowebpki/jcs"
	ssldsse "github.com/secure-systems-lab/go-securesystemslib/dsse"
	bundlepb "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	v1 "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	"github.com/sigstore/protobuf-specs/gen/pb-go/dsse"
	pbs "github.com/sigstore/protobuf-specs/gen/pb-go/rekor/v1"
	"github.com/sigstore/rekor-tiles/v2/pkg/client"
	"github.com/sigstore/rekor-tiles/v2/pkg/client/write"
	pb "github.com/sigstore/rekor-tiles/v2/pkg/generated/protobuf"
	rekornote "github.com/sigstore/rekor-tiles/v2/pkg/note"
	"github.com/sigstore/rekor-tiles/v2/pkg/types/hashedrekord"
	"github.com/sigstore/rekor-tiles/v2/pkg/verify"
	sgsign "github.com/sigstore/sigstore-go/pkg/sign"
	"github.com/sigstore/sigstore-go/pkg/tlog"
	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/mod/sumdb/note"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/rekor"
)

var admitted = []v1.PublicKeyDetails{
	v1.PublicKeyDetails_PKIX_ECDSA_P256_SHA_256,
	v1.PublicKeyDetails_PKIX_ECDSA_P384_SHA_384,
	v1.PublicKeyDetails_PKIX_ECDSA_P521_SHA_512,
	v1.PublicKeyDetails_PKIX_RSA_PKCS1V15_2048_SHA256,
	v1.PublicKeyDetails_PKIX_RSA_PKCS1V15_3072_SHA256,
	v1.PublicKeyDetails_PKIX_ED25519_PH,
}

// noteVerifier is rekor-tiles' own verifier of checkpoints.
func (f *fixture) noteVerifier(t testing.TB) note.Verifier {
	t.Helper()
	v, err := signature.LoadVerifier(f.key.Public(), crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	nv, err := rekornote.NewNoteVerifier(testOrigin, v)
	if err != nil {
		t.Fatal(err)
	}
	return nv
}

// created checks a 201 answer with software that we did not write: the
// proof and the checkpoint with rekor-tiles, the entry with sigstore-go.
func (f *fixture) created(t testing.TB, resp *http.Response, body []byte) *pbs.TransparencyLogEntry {
	t.Helper()
	if resp.StatusCode != http.StatusCreated || resp.Header.Get("Content-Type") != "application/json" {
		t.Fatalf("%d %s %q", resp.StatusCode, resp.Header.Get("Content-Type"), body)
	}
	var tle pbs.TransparencyLogEntry
	if err := protojson.Unmarshal(body, &tle); err != nil {
		t.Fatal(err)
	}
	f.verifyEntry(t, &tle)
	return &tle
}

func (f *fixture) verifyEntry(t testing.TB, tle *pbs.TransparencyLogEntry) {
	t.Helper()
	if err := verify.VerifyLogEntry(tle, f.noteVerifier(t)); err != nil {
		t.Errorf("rekor-tiles: %v", err)
	}
	entry, err := tlog.ParseTransparencyLogEntry(tle)
	if err != nil {
		t.Fatalf("sigstore-go: %v", err)
	}
	if err := tlog.ValidateEntry(entry); err != nil {
		t.Errorf("sigstore-go: %v", err)
	}
	v, err := signature.LoadVerifier(f.key.Public(), crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	if err := tlog.VerifyCheckpointAndInclusion(entry, v, testOrigin); err != nil {
		t.Errorf("sigstore-go: %v", err)
	}
	if id := f.log.LogID(); !entry.IsRekorV2() || !bytes.Equal(tle.GetLogId().GetKeyId(), id[:]) {
		t.Errorf("log id %x, v2 %v", tle.GetLogId().GetKeyId(), entry.IsRekorV2())
	}
}

// canonical is the leaf as rekor-tiles makes it.
func canonical(t testing.TB, hr *pb.HashedRekordRequestV002) []byte {
	t.Helper()
	registry, err := signature.NewAlgorithmRegistryConfig(admitted)
	if err != nil {
		t.Fatal(err)
	}
	entry, err := hashedrekord.ToLogEntry(hr, registry)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := protojson.Marshal(entry)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := jcs.Transform(raw)
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

func TestLeafIsThatOfRekorTiles(t *testing.T) {
	f := newFixture(t)
	for _, details := range admitted {
		t.Run(details.String(), func(t *testing.T) {
			s := newSigner(t, details)
			cert := s.certificate(t, nil, s)
			for name, hr := range map[string]*pb.HashedRekordRequestV002{
				"public key":  s.request(t, "a"),
				"certificate": certified(s.request(t, "b"), cert),
			} {
				resp, answer := f.post(t, body(t, hr))
				tle := f.created(t, resp, answer)
				if d := cmp.Diff(string(canonical(t, hr)), string(tle.GetCanonicalizedBody())); d != "" {
					t.Errorf("%s: %s", name, d)
				}
				want, err := hashedrekord.ToEntryHash(hr.GetDigest(), hr.GetSignature())
				if err != nil {
					t.Fatal(err)
				}
				if got := rfc6962.DefaultHasher.HashLeaf(tle.GetCanonicalizedBody()); !bytes.Equal(got, want) {
					t.Errorf("%s: leaf hash %x, rebuilt %x", name, got, want)
				}
			}
		})
	}
}

// TestAnswerHasTheUnpopulatedFields compares our JSON with that of protojson
// as rekor-tiles configures it.
func TestAnswerHasTheUnpopulatedFields(t *testing.T) {
	f := newFixture(t)
	for i := range 3 {
		resp, answer := f.post(t, body(t, p256(t).request(t, fmt.Sprint(i))))
		tle := f.created(t, resp, answer)
		want, err := protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(tle)
		if err != nil {
			t.Fatal(err)
		}
		var got, wanted any
		if json.Unmarshal(answer, &got) != nil || json.Unmarshal(want, &wanted) != nil {
			t.Fatal("not JSON")
		}
		if d := cmp.Diff(wanted, got); d != "" {
			t.Error(d)
		}
		if tle.GetInclusionProof().GetTreeSize() <= tle.GetLogIndex() {
			t.Errorf("tree size %d for index %d", tle.GetInclusionProof().GetTreeSize(), tle.GetLogIndex())
		}
	}
}

// TestKeyInToken: a checkpoint made in a token verifies.
func TestKeyInToken(t *testing.T) {
	f := newFixtureWith(t, hsmtest.NewKey(t, hsmtest.SoftHSM(t), "rekor", hsm.ECDSAP256))
	resp, answer := f.post(t, body(t, p256(t).request(t, "artefact")))
	f.created(t, resp, answer)
}

func TestClientOfRekorTiles(t *testing.T) {
	f := newFixture(t)
	writer, err := write.NewWriter(f.srv.URL, client.WithTLSConfig(f.srv.Client().Transport.(*http.Transport).TLSClientConfig))
	if err != nil {
		t.Fatal(err)
	}
	tle, err := writer.Add(t.Context(), p256(t).request(t, "hello"))
	if err != nil {
		t.Fatal(err)
	}
	f.verifyEntry(t, tle)
}

// TestClientOfSigstoreGo enters a DSSE envelope and a message signature as
// cosign does.
func TestClientOfSigstoreGo(t *testing.T) {
	f := newFixture(t)
	writer, err := write.NewWriter(f.srv.URL, client.WithTLSConfig(f.srv.Client().Transport.(*http.Transport).TLSClientConfig))
	if err != nil {
		t.Fatal(err)
	}
	s := p256(t)
	cert := s.certificate(t, nil, s)
	material := &bundlepb.VerificationMaterial{Content: &bundlepb.VerificationMaterial_Certificate{Certificate: &v1.X509Certificate{RawBytes: cert.Raw}}}
	digest := s.digest([]byte("blob"))
	pae := ssldsse.PAE("text/plain", []byte("payload"))
	for name, b := range map[string]*bundlepb.Bundle{
		"message": {VerificationMaterial: material, Content: &bundlepb.Bundle_MessageSignature{MessageSignature: &v1.MessageSignature{
			MessageDigest: &v1.HashOutput{Algorithm: v1.HashAlgorithm_SHA2_256, Digest: digest}, Signature: s.sign(t, digest),
		}}},
		"envelope": {VerificationMaterial: material, Content: &bundlepb.Bundle_DsseEnvelope{DsseEnvelope: &dsse.Envelope{
			Payload: []byte("payload"), PayloadType: "text/plain", Signatures: []*dsse.Signature{{Sig: s.sign(t, s.digest(pae))}},
		}}},
	} {
		b = proto.Clone(b).(*bundlepb.Bundle)
		r := sgsign.NewRekor(&sgsign.RekorOptions{ClientV2: writer, Version: 2})
		if err := r.GetTransparencyLogEntry(t.Context(), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), b); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		f.verifyEntry(t, b.GetVerificationMaterial().GetTlogEntries()[0])
	}
}

func envelopeRequest(payloadType string, payload, sig []byte, v *pb.Verifier) *pb.CreateEntryRequest {
	return &pb.CreateEntryRequest{Spec: &pb.CreateEntryRequest_DsseRequestV002{DsseRequestV002: &pb.DSSERequestV002{
		Envelope:  &dsse.Envelope{Payload: payload, PayloadType: payloadType, Signatures: []*dsse.Signature{{Sig: sig, Keyid: "ignored"}}},
		Verifiers: []*pb.Verifier{v},
	}}}
}

// TestEnvelopeBecomesHashedRekord: the request that sigstore-js sends gives
// the leaf that sigstore-go rebuilds from the bundle.
func TestEnvelopeBecomesHashedRekord(t *testing.T) {
	f := newFixture(t)
	for _, details := range admitted {
		t.Run(details.String(), func(t *testing.T) {
			s := newSigner(t, details)
			digest := s.digest(ssldsse.PAE("application/vnd.in-toto+json", []byte(`{"_type":"x"}`)))
			hr := s.request(t, "")
			hr.Digest, hr.Signature.Content = digest, s.sign(t, digest)
			raw, err := protojson.Marshal(envelopeRequest("application/vnd.in-toto+json", []byte(`{"_type":"x"}`), hr.GetSignature().GetContent(), hr.GetSignature().GetVerifier()))
			if err != nil {
				t.Fatal(err)
			}
			resp, answer := f.post(t, raw)
			tle := f.created(t, resp, answer)
			if d := cmp.Diff(string(canonical(t, hr)), string(tle.GetCanonicalizedBody())); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestCheckpoint(t *testing.T) {
	f := newFixture(t)
	for i := range 3 {
		resp, answer := f.post(t, body(t, p256(t).request(t, fmt.Sprint(i))))
		f.created(t, resp, answer)
	}
	resp, text := f.get(t, "/api/v2/checkpoint")
	if resp.StatusCode != 200 || resp.Header.Get("Cache-Control") != "no-cache" || !strings.HasPrefix(resp.Header.Get("Content-Type"), "text/plain") {
		t.Errorf("%d %v", resp.StatusCode, resp.Header)
	}
	cp, err := verify.VerifyCheckpoint(string(text), f.noteVerifier(t))
	if err != nil {
		t.Fatal(err)
	}
	if cp.Origin != testOrigin || cp.Size != 3 {
		t.Errorf("origin %q, size %d", cp.Origin, cp.Size)
	}
	// What sigstore-python counts, and what verifiers of one log expect.
	if n := bytes.Count(text, []byte("\n\n")); n != 1 {
		t.Errorf("%d blank lines", n)
	}
	if n := bytes.Count(text, []byte("\u2014 ")); n != 1 || !bytes.HasSuffix(text, []byte("\n")) {
		t.Errorf("%d signature lines in %q", n, text)
	}
	line := strings.Fields(string(text[bytes.Index(text, []byte("\u2014")):]))
	raw, err := base64.StdEncoding.DecodeString(line[2])
	if id := f.log.LogID(); err != nil || line[1] != testOrigin || !bytes.Equal(raw[:4], id[:4]) {
		t.Errorf("signature line %q", line)
	}
	text2 := text[:bytes.Index(text, []byte("\n\n"))+1]
	if !ecdsa.VerifyASN1(f.key.Public().(*ecdsa.PublicKey), sum(text2), raw[4:]) {
		t.Error("the signature is not ASN.1 DER over SHA-256 of the text")
	}
	if resp, _ := f.get(t, "/api/v2/checkpoint", "If-None-Match", resp.Header.Get("ETag")); resp.StatusCode != http.StatusNotModified {
		t.Errorf("checkpoint that the client has: %d", resp.StatusCode)
	}
	if _, other := f.get(t, "/log/2026-1/api/v2/checkpoint"); !bytes.Equal(other, text) {
		t.Error("the shard's prefix serves another checkpoint")
	}
}

func TestTilesAndBundles(t *testing.T) {
	f := newFixture(t)
	s := p256(t)
	const n = 260
	var bodies [n][]byte
	for i := range bodies {
		bodies[i] = body(t, s.request(t, fmt.Sprint(i)))
	}
	const clients = 16
	f.srv.Client().Transport.(*http.Transport).MaxIdleConnsPerHost = clients
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			for i := c; i < n; i += clients {
				resp, err := f.srv.Client().Post(f.srv.URL+"/api/v2/log/entries", "application/json", bytes.NewReader(bodies[i]))
				if err != nil {
					t.Error(err)
					return
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				_ = resp.Body.Close()
				if resp.StatusCode != http.StatusCreated {
					t.Errorf("entry %d: status %d", i, resp.StatusCode)
				}
			}
		})
	}
	wg.Wait()
	_, text := f.get(t, "/api/v2/checkpoint")
	cp, err := verify.VerifyCheckpoint(string(text), f.noteVerifier(t))
	if err != nil || cp.Size != n {
		t.Fatalf("checkpoint of size %d: %v", cp.Size, err)
	}
	resp, hashes := f.get(t, "/api/v2/tile/0/000")
	if resp.StatusCode != 200 || len(hashes) != 8192 || resp.Header.Get("Cache-Control") != "public, max-age=31536000, immutable" || resp.Header.Get("Content-Type") != "application/octet-stream" {
		t.Fatalf("full tile: %d, %d octets, %v", resp.StatusCode, len(hashes), resp.Header)
	}
	resp, rest := f.get(t, "/log/2026-1/api/v2/tile/0/001.p/4")
	if resp.StatusCode != 200 || len(rest) != 4*32 || strings.Contains(resp.Header.Get("Cache-Control"), "immutable") {
		t.Fatalf("partial tile: %d, %d octets, %v", resp.StatusCode, len(rest), resp.Header)
	}
	hashes = append(hashes, rest...)
	_, bundle := f.get(t, "/api/v2/tile/entries/000")
	_, tail := f.get(t, "/api/v2/tile/entries/001.p/4")
	bundle = append(bundle, tail...)
	for i := range n {
		size := int(binary.BigEndian.Uint16(bundle))
		if got := rfc6962.DefaultHasher.HashLeaf(bundle[2:][:size]); !bytes.Equal(got, hashes[i*32:][:32]) {
			t.Fatalf("entry %d of the bundles has another leaf hash", i)
		}
		bundle = bundle[2+size:]
	}
	if len(bundle) > 0 {
		t.Errorf("%d octets after the last entry", len(bundle))
	}
	resp, answer := f.post(t, body(t, s.request(t, "one more")))
	tle := f.created(t, resp, answer)
	path := tle.GetInclusionProof().GetHashes()
	if err := proof.VerifyInclusion(rfc6962.DefaultHasher, n, n+1, rfc6962.DefaultHasher.HashLeaf(tle.GetCanonicalizedBody()), path, tle.GetInclusionProof().GetRootHash()); err != nil {
		t.Error(err)
	}
	consistency, err := f.tree.ConsistencyProof(t.Context(), n, n+1)
	if err != nil {
		t.Fatal(err)
	}
	raw := make([][]byte, len(consistency))
	for i := range consistency {
		raw[i] = consistency[i][:]
	}
	if err := verify.VerifyConsistencyProofWithCheckpoints(raw, string(text), tle.GetInclusionProof().GetCheckpoint().GetEnvelope(), f.noteVerifier(t)); err != nil {
		t.Error(err)
	}
	if f.key.Count() > n {
		t.Errorf("%d signatures for %d entries", f.key.Count(), n+1)
	}
}

func TestFormatRefuses(t *testing.T) {
	key := newECDSA(t, elliptic.P256())
	for name, origin := range map[string]string{
		"empty":            "",
		"Rekor v1":         "rekor.example - 123",
		"space":            "rekor example",
		"newline":          "rekor.example\n",
		"plus":             "rekor.example+1",
		"port":             "rekor.example:8080",
		"path":             "rekor.example/log",
		"scheme":           "https://rekor.example",
		"control":          "rekor\x00example",
		"replacement rune": "rekor\xff",
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := rekor.NewFormat(origin, key.Public()); err == nil {
				t.Errorf("accepted %q", origin)
			}
		})
	}
	for _, origin := range []string{"rekor.example", "127.0.0.1", "::1"} {
		if _, err := rekor.NewFormat(origin, key.Public()); err != nil {
			t.Error(err)
		}
	}
	if _, err := rekor.NewFormat(testOrigin, newECDSA(t, elliptic.P384()).Public()); err == nil {
		t.Error("accepted a P-384 key")
	}
	format, err := rekor.NewFormat(testOrigin, key.Public())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := format.Note(head.Head{}, nil); err == nil {
		t.Error("wrote a checkpoint without a signature")
	}
}

func TestNewRefuses(t *testing.T) {
	f := newFixture(t)
	s := p256(t)
	good := rekor.Config{Tree: f.tree, Heads: f.heads, Origin: testOrigin, PublicKey: f.key.Public(), Now: wallClock}
	for name, change := range map[string]func(*rekor.Config){
		"no tree":                    func(c *rekor.Config) { c.Tree = nil },
		"no heads":                   func(c *rekor.Config) { c.Heads = nil },
		"no key":                     func(c *rekor.Config) { c.PublicKey = nil },
		"no clock":                   func(c *rekor.Config) { c.Now = nil },
		"v1 origin":                  func(c *rekor.Config) { c.Origin = "rekor.example - 1" },
		"P-521 key":                  func(c *rekor.Config) { c.PublicKey = newECDSA(t, elliptic.P521()).Public() },
		"negative limit":             func(c *rekor.Config) { c.MaxInFlight = -1 },
		"negative window":            func(c *rekor.Config) { c.Replay = -time.Second },
		"intermediate without roots": func(c *rekor.Config) { c.Intermediates = append(c.Intermediates, s.certificate(t, nil, s)) },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := good
			change(&cfg)
			if _, err := rekor.New(cfg); err == nil {
				t.Error("accepted")
			}
		})
	}
}
