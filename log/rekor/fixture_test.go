package rekor_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/labstack/echo/v4"
	v1 "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	pb "github.com/sigstore/rekor-tiles/v2/pkg/generated/protobuf"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/rekor"
	"github.com/chancery-ca/chancery/log/tree"
)

const testOrigin = "rekor.test.example"

func newECDSA(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// signer is a client's key with its key details and digest.
type signer struct {
	crypto.Signer
	details v1.PublicKeyDetails
	hash    crypto.Hash
}

// signers holds one signer for each kind of key: RSA keys take long to make.
var signers sync.Map

func newSigner(t testing.TB, details v1.PublicKeyDetails) *signer {
	t.Helper()
	s, ok := signers.Load(details)
	if !ok {
		s, _ = signers.LoadOrStore(details, makeSigner(t, details))
	}
	return s.(*signer)
}

func makeSigner(t testing.TB, details v1.PublicKeyDetails) *signer {
	t.Helper()
	s := &signer{details: details, hash: crypto.SHA256}
	var err error
	switch details {
	case v1.PublicKeyDetails_PKIX_ECDSA_P256_SHA_256:
		s.Signer = newECDSA(t, elliptic.P256())
	case v1.PublicKeyDetails_PKIX_ECDSA_P384_SHA_384:
		s.Signer, s.hash = newECDSA(t, elliptic.P384()), crypto.SHA384
	case v1.PublicKeyDetails_PKIX_ECDSA_P521_SHA_512:
		s.Signer, s.hash = newECDSA(t, elliptic.P521()), crypto.SHA512
	case v1.PublicKeyDetails_PKIX_RSA_PKCS1V15_2048_SHA256:
		s.Signer, err = rsa.GenerateKey(rand.Reader, 2048)
	case v1.PublicKeyDetails_PKIX_RSA_PKCS1V15_3072_SHA256:
		s.Signer, err = rsa.GenerateKey(rand.Reader, 3072)
	case v1.PublicKeyDetails_PKIX_ED25519_PH:
		_, s.Signer, err = ed25519.GenerateKey(rand.Reader)
		s.hash = crypto.SHA512
	default:
		t.Fatalf("no signer for %s", details)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// p256 is a new key, as every keyless signature has.
func p256(t testing.TB) *signer { return makeSigner(t, v1.PublicKeyDetails_PKIX_ECDSA_P256_SHA_256) }

func (s *signer) digest(message []byte) []byte {
	h := s.hash.New()
	h.Write(message)
	return h.Sum(nil)
}

func (s *signer) sign(t testing.TB, digest []byte) []byte {
	t.Helper()
	signature, err := s.Sign(rand.Reader, digest, s.hash)
	if err != nil {
		t.Fatal(err)
	}
	return signature
}

func (s *signer) spki(t testing.TB) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(s.Public())
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// certificate is self-signed, or signed by parent with its key.
func (s *signer) certificate(t testing.TB, parent *x509.Certificate, parentKey crypto.Signer) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber:   big.NewInt(1),
		Subject:        pkix.Name{CommonName: "signer"},
		NotBefore:      time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
		NotAfter:       time.Date(2026, 1, 1, 0, 10, 0, 0, time.UTC),
		KeyUsage:       x509.KeyUsageDigitalSignature,
		ExtKeyUsage:    []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
		EmailAddresses: []string{"dev@test.example"},
	}
	return sign(t, template, parent, s.Public(), parentKey)
}

func sign(t testing.TB, template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// request is a hashedrekord request for message by a bare key.
func (s *signer) request(t testing.TB, message string) *pb.HashedRekordRequestV002 {
	t.Helper()
	digest := s.digest([]byte(message))
	return &pb.HashedRekordRequestV002{
		Digest: digest,
		Signature: &pb.Signature{
			Content: s.sign(t, digest),
			Verifier: &pb.Verifier{
				Verifier:   &pb.Verifier_PublicKey{PublicKey: &pb.PublicKey{RawBytes: s.spki(t)}},
				KeyDetails: s.details,
			},
		},
	}
}

// certified is the same with a certificate.
func certified(hr *pb.HashedRekordRequestV002, cert *x509.Certificate) *pb.HashedRekordRequestV002 {
	hr.Signature.Verifier.Verifier = &pb.Verifier_X509Certificate{X509Certificate: &v1.X509Certificate{RawBytes: cert.Raw}}
	return hr
}

func body(t testing.TB, hr *pb.HashedRekordRequestV002) []byte {
	t.Helper()
	b, err := protojson.Marshal(&pb.CreateEntryRequest{Spec: &pb.CreateEntryRequest_HashedRekordRequestV002{HashedRekordRequestV002: hr}})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// fixture is a log on the real engine and publisher, behind a TLS server.
type fixture struct {
	log   *rekor.Log
	tree  tree.Tree
	heads *head.Publisher
	key   *hsmtest.Counting
	srv   *httptest.Server
}

func wallClock() (time.Time, error) { return time.Now(), nil }

// newFixture returns a log whose head key is in memory.
func newFixture(t testing.TB, change ...func(*rekor.Config)) *fixture {
	t.Helper()
	return newFixtureWith(t, hsmtest.SoftwareKey(hsm.ECDSAP256), change...)
}

func newFixtureWith(t testing.TB, key hsm.Key, change ...func(*rekor.Config)) *fixture {
	t.Helper()
	ctx := context.Background()
	dir := t.TempDir()
	quiet := slog.New(slog.DiscardHandler)
	f := &fixture{key: &hsmtest.Counting{Key: key}}
	engine, err := tree.Open(ctx, tree.Config{Dir: dir, Now: wallClock, Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := engine.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	if err := engine.Create(ctx, "rekor"); err != nil {
		t.Fatal(err)
	}
	if f.tree, err = engine.Tree(ctx, "rekor"); err != nil {
		t.Fatal(err)
	}
	format, err := rekor.NewFormat(testOrigin, f.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	anchor := filepath.Join(dir, "rekor.anchor")
	if err := head.CreateAnchor(anchor); err != nil {
		t.Fatal(err)
	}
	f.heads, err = head.Open(ctx, head.Config{Tree: f.tree, Key: f.key, Format: format, Anchor: anchor, Now: wallClock, Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.heads.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	cfg := rekor.Config{Tree: f.tree, Heads: f.heads, Origin: testOrigin, PublicKey: f.key.Public(), Now: wallClock}
	for _, c := range change {
		c(&cfg)
	}
	if f.log, err = rekor.New(cfg); err != nil {
		t.Fatal(err)
	}
	e := echo.New()
	f.log.Register(e.Group(""))
	f.log.RegisterReads(e.Group("/log/2026-1"))
	f.srv = httptest.NewTLSServer(e)
	t.Cleanup(f.srv.Close)
	return f
}

func (f *fixture) do(t testing.TB, method, path string, body []byte, header ...string) (*http.Response, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, f.srv.URL+path, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := f.srv.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, answer
}

func (f *fixture) post(t testing.TB, body []byte) (*http.Response, []byte) {
	t.Helper()
	return f.do(t, http.MethodPost, "/api/v2/log/entries", body)
}

func (f *fixture) get(t testing.TB, path string, header ...string) (*http.Response, []byte) {
	t.Helper()
	return f.do(t, http.MethodGet, path, nil, header...)
}

// status is the JSON of a google.rpc.Status.
type status struct {
	Code    int               `json:"code"`
	Message string            `json:"message"`
	Details []json.RawMessage `json:"details"`
}

func parseStatus(t testing.TB, body []byte) status {
	t.Helper()
	var s status
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil || s.Details == nil {
		t.Fatalf("%q is not a status: %v", body, err)
	}
	return s
}

func sum(b []byte) []byte {
	h := sha256.Sum256(b)
	return h[:]
}
