package server

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/labstack/echo/v4"
	"github.com/sigstore/fulcio/pkg/certificate"
	fulcio "github.com/sigstore/fulcio/pkg/generated/protobuf"
	"github.com/sigstore/sigstore-go/pkg/sign"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/chancery-ca/chancery/ca"
	"github.com/chancery-ca/chancery/ca/identity"
	"github.com/chancery-ca/chancery/ca/identity/oidctest"
	"github.com/chancery-ca/chancery/ca/internal/catest"
	"github.com/chancery-ca/chancery/ca/internal/idptest"
	"github.com/chancery-ca/chancery/hsm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// house is a server with everything behind it, and its log.
type house struct {
	*catest.Parts
	server *Server
	echo   *echo.Echo
	idp    *oidctest.Provider
	gh     *oidctest.Provider // its tokens are of type github-workflow
	log    *bytes.Buffer
	key    *ecdsa.PrivateKey // a client's
}

func build(t testing.TB, change func(*ca.Config)) *house {
	t.Helper()
	h := &house{Parts: catest.NewParts(t), echo: echo.New(), log: &bytes.Buffer{}}
	var err error
	if h.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	h.idp, h.gh = idptest.Serve(t, catest.Noon, nil), idptest.Serve(t, catest.Noon, nil)
	cfg := h.Config()
	if change != nil {
		change(&cfg)
	}
	verifier, err := identity.New(context.Background(), identity.Config{OIDCIssuers: map[string]identity.Issuer{
		h.idp.Issuer(): {IssuerURL: h.idp.Issuer(), ClientID: "sigstore", Type: "email"},
		h.gh.Issuer():  {IssuerURL: h.gh.Issuer(), ClientID: "sigstore", Type: "github-workflow"},
	}}, identity.Options{Now: cfg.Now, LoopbackHTTP: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(verifier.Close)
	ready(t, verifier)
	s, err := New(Config{
		Authority: catest.Authority(t, cfg), Identity: verifier,
		Logger: slog.New(slog.NewTextHandler(h.log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Register(h.echo)
	h.server = s
	return h
}

// ready waits until the keys of every issuer are there: a request waits for them
// for 2 s alone, which a busy machine may need.
func ready(t testing.TB, v *identity.Verifier) {
	t.Helper()
	idptest.Until(t, "keys of every issuer", func() bool {
		return !slices.ContainsFunc(v.Health(), func(h identity.IssuerHealth) bool { return h.Keys == 0 })
	})
}

func (h *house) token(t testing.TB, claims map[string]any) string {
	t.Helper()
	raw, err := h.idp.Token(claims)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func publicPEM(t testing.TB, pub crypto.PublicKey) string {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

func prove(t testing.TB, key *ecdsa.PrivateKey, challenge string) []byte {
	t.Helper()
	digest := sha256.Sum256([]byte(challenge))
	sig, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	return sig
}

func csr(t testing.TB, key crypto.Signer, alg x509.SignatureAlgorithm) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{SignatureAlgorithm: alg}, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

// body is the JSON of variant A (fulcio.proto); an empty token leaves out
// credentials.
func body(t testing.TB, token, key string, proof []byte) string {
	t.Helper()
	m := map[string]any{"publicKeyRequest": map[string]any{
		"publicKey": map[string]any{"algorithm": "ECDSA", "content": key}, "proofOfPossession": proof,
	}}
	if token != "" {
		m["credentials"] = map[string]any{"oidcIdentityToken": token}
	}
	return marshal(t, m)
}

func csrBody(t testing.TB, token string, csr []byte) string {
	t.Helper()
	return marshal(t, map[string]any{"credentials": map[string]any{"oidcIdentityToken": token}, "certificateSigningRequest": csr})
}

func marshal(t testing.TB, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// do calls a handler without a network.
func (h *house) do(method, path, body string, header map[string]string) *httptest.ResponseRecorder {
	req := httptest.NewRequest(method, path, strings.NewReader(body))
	for k, v := range header {
		req.Header.Set(k, v)
	}
	rec := httptest.NewRecorder()
	h.echo.ServeHTTP(rec, req)
	return rec
}

// leafOf reads an answer with Fulcio's own message type.
func leafOf(t testing.TB, rec *httptest.ResponseRecorder) *x509.Certificate {
	t.Helper()
	if rec.Code != http.StatusOK || rec.Header().Get("Content-Type") != "application/json" {
		t.Fatalf("status %d, %s: %s", rec.Code, rec.Header().Get("Content-Type"), rec.Body)
	}
	var msg fulcio.SigningCertificate
	if err := protojson.Unmarshal(rec.Body.Bytes(), &msg); err != nil {
		t.Fatal(err)
	}
	chain := msg.GetSignedCertificateEmbeddedSct().GetChain().GetCertificates()
	if len(chain) != 3 {
		t.Fatalf("%d certificates", len(chain))
	}
	block, _ := pem.Decode([]byte(chain[0]))
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// TestRequestForms: every form in which a client may ask (fulcio.proto).
func TestRequestForms(t *testing.T) {
	h := build(t, nil)
	token, key := h.token(t, nil), publicPEM(t, h.key.Public())
	proof := prove(t, h.key, "alice@example.com")
	request := csr(t, h.key, x509.ECDSAWithSHA256)
	bearer := map[string]string{"Authorization": "Bearer " + token}
	good := body(t, token, key, proof)
	replace := func(s string, pairs ...string) string { return strings.NewReplacer(pairs...).Replace(s) }
	for _, test := range []struct {
		name, body string
		header     map[string]string
	}{
		{"token in the body", good, nil},
		{"token in the header", body(t, "", key, proof), bearer},
		{"scheme in other case", body(t, "", key, proof), map[string]string{"Authorization": "bearer " + token}},
		{"both, and the body wins", good, map[string]string{"Authorization": "Bearer nonsense"}},
		{"CSR with the token in the header", marshal(t, map[string]any{"certificateSigningRequest": request}), bearer},
		{"CSR in the body", csrBody(t, token, request), nil},
		{"snake case", replace(good, "oidcIdentityToken", "oidc_identity_token", "publicKeyRequest", "public_key_request",
			"publicKey\"", "public_key\"", "proofOfPossession", "proof_of_possession"), nil},
		{"unknown field", replace(good, `{"credentials"`, `{"colour":{"deep":[1,{}]},"credentials"`), nil},
		{"no algorithm", replace(good, `"algorithm":"ECDSA",`, ""), nil},
		{"wrong algorithm, which is ignored", replace(good, `"ECDSA"`, `"RSA_PSS"`), nil},
		// protojson takes an unknown name for an unknown field, as upstream's gateway does.
		{"unknown algorithm name", replace(good, `"ECDSA"`, `"ROT13"`), nil},
		{"algorithm as a number", replace(good, `"ECDSA"`, `2`), nil},
		{"base64 without padding", replace(good, base64.StdEncoding.EncodeToString(proof), base64.RawStdEncoding.EncodeToString(proof)), nil},
		{"base64url", replace(good, base64.StdEncoding.EncodeToString(proof), base64.URLEncoding.EncodeToString(proof)), nil},
		{"Accept of sigstore-python", good, map[string]string{"Accept": "application/pem-certificate-chain"}},
		{"no content type", good, map[string]string{"Content-Type": ""}},
	} {
		t.Run(test.name, func(t *testing.T) {
			cert := leafOf(t, h.do(http.MethodPost, PathSigningCert, test.body, test.header))
			if !h.key.PublicKey.Equal(cert.PublicKey) || cert.EmailAddresses[0] != "alice@example.com" {
				t.Errorf("certificate for %v", cert.EmailAddresses)
			}
			ext, err := certificate.ParseExtensions(cert.Extensions)
			if want := (certificate.Extensions{Issuer: h.idp.Issuer(), Subject: "alice-id"}); err != nil || ext != want {
				t.Errorf("extensions %+v, %v", ext, err)
			}
		})
	}
}

// TestGitHubWorkflow compares a whole certificate with the tables of Fulcio, docs/oid-info.md.
func TestGitHubWorkflow(t *testing.T) {
	h := build(t, nil)
	raw, err := h.gh.Token(map[string]any{
		"sub": "repo:o/r:ref:refs/heads/main", "email": nil, "email_verified": nil,
		"job_workflow_ref": "o/shared/.github/workflows/w.yml@refs/tags/v1", "sha": "aa", "event_name": "push",
		"repository": "o/r", "workflow": "build", "ref": "refs/heads/main", "job_workflow_sha": "bb",
		"runner_environment": "github-hosted", "repository_id": "1", "repository_owner": "o",
		"repository_owner_id": "2", "repository_visibility": "public",
		"workflow_ref": "o/r/.github/workflows/b.yml@refs/heads/main", "workflow_sha": "cc", "run_id": "3", "run_attempt": "4",
	})
	if err != nil {
		t.Fatal(err)
	}
	proof := prove(t, h.key, "repo:o/r:ref:refs/heads/main")
	cert := leafOf(t, h.do(http.MethodPost, PathSigningCert, body(t, raw, publicPEM(t, h.key.Public()), proof), nil))
	if len(cert.URIs) != 1 || cert.URIs[0].String() != "https://github.com/o/shared/.github/workflows/w.yml@refs/tags/v1" {
		t.Errorf("SAN %v", cert.URIs)
	}
	want := map[string]string{
		"1": h.gh.Issuer(), "2": "push", "3": "aa", "4": "build", "5": "o/r", "6": "refs/heads/main",
		"8": h.gh.Issuer(), "9": "https://github.com/o/shared/.github/workflows/w.yml@refs/tags/v1", "10": "bb",
		"11": "github-hosted", "12": "https://github.com/o/r", "13": "aa", "14": "refs/heads/main", "15": "1",
		"16": "https://github.com/o", "17": "2", "18": "https://github.com/o/r/.github/workflows/b.yml@refs/heads/main",
		"19": "cc", "20": "push", "21": "https://github.com/o/r/actions/runs/3/attempts/4", "22": "public",
		"24": "repo:o/r:ref:refs/heads/main",
	}
	got := map[string]string{}
	for _, e := range cert.Extensions {
		number, ours := strings.CutPrefix(e.Id.String(), "1.3.6.1.4.1.57264.1.")
		if !ours {
			continue
		}
		if e.Critical {
			t.Errorf("extension %s is critical", number)
		}
		got[number] = string(e.Value)
		if len(number) > 1 || number >= "8" {
			got[number] = utf8String(t, e.Value)
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// utf8String reads a short DER UTF8String by hand.
func utf8String(t *testing.T, der []byte) string {
	t.Helper()
	if len(der) < 2 || der[0] != 0x0c || int(der[1]) != len(der)-2 {
		t.Fatalf("% x is not a UTF8String", der)
	}
	return string(der[2:])
}

func TestErrors(t *testing.T) {
	h := build(t, nil)
	token, key := h.token(t, nil), publicPEM(t, h.key.Public())
	proof := prove(t, h.key, "alice@example.com")
	good := body(t, token, key, proof)
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa1024, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	const (
		badToken     = "There was an error processing the identity token"
		badKey       = "The public key supplied in the request could not be parsed"
		weakKey      = "The public key supplied in the request is insecure"
		badSignature = "The signature supplied in the request could not be verified"
		badCSR       = "The certificate signing request could not be parsed"
		badRequest   = "The request could not be parsed"
	)
	withToken := func(claims map[string]any) string { return body(t, h.token(t, claims), key, proof) }
	for _, test := range []struct {
		name, body string
		status     int
		code       int
		message    string
	}{
		{"no body", "", 400, 3, badToken},
		{"empty message", "{}", 400, 3, badToken},
		{"no token", body(t, "", key, proof), 400, 3, badToken},
		{"token of 1 MiB", body(t, strings.Repeat("a", 1<<20), key, proof), 400, 3, badToken},
		{"expired token", withToken(map[string]any{"exp": catest.Noon.Unix()}), 400, 3, badToken},
		{"token for another audience", withToken(map[string]any{"aud": "other"}), 400, 3, badToken},
		{"token of an unknown issuer", withToken(map[string]any{"iss": "https://unknown.example"}), 400, 3, badToken},
		{"unverified address", withToken(map[string]any{"email_verified": false}), 400, 3, badToken},
		{"bad token and bad key: token first", body(t, "x.y.z", "nonsense", nil), 400, 3, badToken},
		{"token that cannot be certified", withToken(map[string]any{"sub": "a\x00b"}), 400, 3, "The identity in the token cannot be put into a certificate"},

		{"no key", body(t, token, "", proof), 400, 3, badKey},
		{"no key request", csrBody(t, token, nil), 400, 3, badKey},
		{"nonsense for a key", body(t, token, "nonsense", proof), 400, 3, badKey},
		{"RSA-1024", body(t, token, publicPEM(t, rsa1024.Public()), proof), 400, 3, weakKey},
		{"P-224", body(t, token, publicPEM(t, p224.Public()), proof), 400, 3, weakKey},
		{"no proof", body(t, token, key, nil), 400, 3, badSignature},
		{"proof by another key", body(t, token, publicPEM(t, p384.Public()), proof), 400, 3, badSignature},
		{"proof of another identity", body(t, token, key, prove(t, h.key, "bob@example.com")), 400, 3, badSignature},
		{"proof of the subject where the address is asked for", body(t, token, key, prove(t, h.key, "alice-id")), 400, 3, badSignature},

		{"nonsense for a CSR", csrBody(t, token, []byte("nonsense")), 400, 3, badCSR},
		{"CSR of RSA-1024", csrBody(t, token, csr(t, rsa1024, x509.SHA256WithRSA)), 400, 3, weakKey},
		{"CSR of P-384 with SHA-256", csrBody(t, token, csr(t, p384, x509.ECDSAWithSHA256)), 400, 3, "signing algorithm not permitted: *ecdsa.PublicKey, SHA-256"},
		{"CSR with RSA-PSS", csrBody(t, token, csr(t, rsa2048, x509.SHA256WithRSAPSS)), 400, 3, "unrecognized signature algorithm: SHA256-RSAPSS"},

		{"not JSON", "hello", 400, 3, badRequest},
		{"JSON cut", good[:len(good)-1], 400, 3, badRequest},
		{"two messages", good + good, 400, 3, badRequest},
		{"a list", "[]", 400, 3, badRequest},
		{"CSR and public key", strings.Replace(csrBody(t, token, []byte("x")), "{", `{"publicKeyRequest":{},`, 1), 400, 3, badRequest}, // a oneof
		{"field twice", strings.Replace(good, "{", `{"credentials":{},`, 1), 400, 3, badRequest},
		{"invalid base64", strings.Replace(good, `"proofOfPossession":"`, `"proofOfPossession":"!`, 1), 400, 3, badRequest},
		{"invalid UTF-8", strings.Replace(good, "ECDSA", "\xff", 1), 400, 3, badRequest},
		{"deep nesting", `{"x":` + strings.Repeat("[", 1<<20), 400, 3, badRequest},
		{"deep nesting, closed", `{"x":` + strings.Repeat("[", 1<<20) + strings.Repeat("]", 1<<20) + "}", 400, 3, badRequest},
		{"body of 5 MiB", strings.Repeat(" ", 5<<20), 413, 8, "The request is larger than 4 MiB"},
	} {
		t.Run(test.name, func(t *testing.T) {
			rec := h.do(http.MethodPost, PathSigningCert, test.body, nil)
			wantFailure(t, rec, test.status, test.code, test.message)
		})
	}
	if n := len(h.Log.Leaves()); n != 0 || h.Key.Count() != 0 {
		t.Errorf("refused requests left %d leaves and %d signatures", n, h.Key.Count())
	}
	for _, secret := range []string{token, strings.Split(token, ".")[1], "alice", "bob"} {
		if strings.Contains(h.log.String(), secret) {
			t.Errorf("the log contains %.20q", secret)
		}
	}
	if !strings.Contains(h.log.String(), "request=") || strings.Contains(h.log.String(), "level=ERROR") {
		t.Error("refusals are not logged as the client's faults with a request id")
	}
}

func wantFailure(t *testing.T, rec *httptest.ResponseRecorder, status, code int, message string) {
	t.Helper()
	want := marshal(t, struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
		Details []any  `json:"details"`
	}{code, message, []any{}})
	if rec.Code != status || rec.Body.String() != want || rec.Header().Get("Content-Type") != "application/json" {
		t.Errorf("status %d, body %s; want %d, %s", rec.Code, rec.Body, status, want)
	}
}

// TestServerFaults: what is our fault has its own rows, and says when to come back.
func TestServerFaults(t *testing.T) {
	down := errors.New("secret inner text")
	for _, test := range []struct {
		name    string
		change  func(*ca.Config)
		status  int
		code    int
		message string
		retry   string
	}{
		{"CA backend", func(c *ca.Config) { c.Now = late }, 500, 13, "error communicating with CA backend", ""},
		{"CT submission", func(c *ca.Config) { c.SCTs.(*catest.Log).OnCommit = func(context.Context) error { return down } }, 500, 13, "Error entering certificate in CTL", ""},
		{"token busy", func(c *ca.Config) { c.SCTs.(*catest.Log).OnCommit = func(context.Context) error { return hsm.ErrBusy } }, 503, 14, "The certificate authority is busy; try again", "1"},
		{"token lost", func(c *ca.Config) { c.SCTs.(*catest.Log).OnCommit = func(context.Context) error { return hsm.ErrLost } }, 503, 14, "The certificate authority is not available; try again", "2"},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := build(t, test.change)
			raw := h.token(t, map[string]any{"exp": catest.Start.AddDate(2, 0, 0).Unix()})
			rec := h.do(http.MethodPost, PathSigningCert, body(t, raw, publicPEM(t, h.key.Public()), prove(t, h.key, "alice@example.com")), nil)
			wantFailure(t, rec, test.status, test.code, test.message)
			if got := rec.Header().Get("Retry-After"); got != test.retry {
				t.Errorf("Retry-After %q, want %q", got, test.retry)
			}
			if !strings.Contains(h.log.String(), rec.Header().Get("X-Request-Id")) || strings.Contains(rec.Body.String(), "secret") {
				t.Error("inner text and request id are not where they belong")
			}
		})
	}
}

func late() (time.Time, error) { return catest.Start.AddDate(1, 0, 1), nil }

func TestClockRefuses(t *testing.T) {
	h := build(t, func(c *ca.Config) {
		c.Now = func() (time.Time, error) { return time.Time{}, errors.New("clock went back") }
	})
	rec := h.do(http.MethodPost, PathSigningCert, body(t, h.token(t, nil), "", nil), nil)
	wantFailure(t, rec, 503, 14, "The certificate authority is not available; try again")
}

func TestMethods(t *testing.T) {
	h := build(t, nil)
	for path, method := range map[string]string{PathSigningCert: "POST", PathTrustBundle: "GET", PathConfiguration: "GET"} {
		for _, wrong := range []string{"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"} {
			if wrong == method {
				continue
			}
			wantFailure(t, h.do(wrong, path, "", nil), 501, 12, "Method Not Allowed")
		}
		rec := h.do(http.MethodOptions, path, "", map[string]string{"Origin": "https://x.example", "Access-Control-Request-Method": method})
		if rec.Code != http.StatusNoContent || rec.Header().Get("Access-Control-Allow-Origin") != "*" || rec.Header().Get("Access-Control-Allow-Methods") != method {
			t.Errorf("preflight of %s: %d, %v", path, rec.Code, rec.Header())
		}
	}
}

func TestReads(t *testing.T) {
	h := build(t, nil)
	var bundle fulcio.TrustBundle
	rec := h.do(http.MethodGet, PathTrustBundle, "", nil)
	if err := protojson.Unmarshal(rec.Body.Bytes(), &bundle); err != nil || rec.Code != http.StatusOK {
		t.Fatalf("status %d, %v", rec.Code, err)
	}
	want := &fulcio.TrustBundle{Chains: []*fulcio.CertificateChain{{Certificates: []string{encode(h.Chain[0]), encode(h.Chain[1])}}}}
	if !proto.Equal(want, &bundle) {
		t.Errorf("trust bundle %v", &bundle)
	}
	var cfg fulcio.Configuration
	rec = h.do(http.MethodGet, PathConfiguration, "", nil)
	if err := protojson.Unmarshal(rec.Body.Bytes(), &cfg); err != nil || len(cfg.Issuers) != 2 {
		t.Fatalf("%s, %v", rec.Body, err)
	}
	for _, i := range cfg.Issuers {
		challenge := map[string]string{"email": "email", "github-workflow": "sub"}[i.IssuerType]
		if i.GetAudience() != "sigstore" || i.GetChallengeClaim() != challenge || challenge == "" {
			t.Errorf("issuer %v", i)
		}
	}
}

func encode(cert *x509.Certificate) string {
	return strings.TrimSpace(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})))
}

// TestSigstoreGo: the client library gets its certificate.
func TestSigstoreGo(t *testing.T) {
	h := build(t, nil)
	srv := httptest.NewServer(h.echo)
	defer srv.Close()
	keys, err := sign.NewEphemeralKeypair(nil)
	if err != nil {
		t.Fatal(err)
	}
	client := sign.NewFulcio(&sign.FulcioOptions{BaseURL: srv.URL, Timeout: 2 * time.Minute, Transport: srv.Client().Transport})
	der, err := client.GetCertificate(t.Context(), keys, &sign.CertificateProviderOptions{IDToken: h.token(t, nil)})
	if err != nil {
		t.Fatal(err)
	}
	if cert, err := x509.ParseCertificate(der); err != nil || cert.EmailAddresses[0] != "alice@example.com" {
		t.Errorf("%v, %v", cert, err)
	}
}

// FuzzRequest: whatever the body, the answer is JSON, and no body gets a 5xx
// or a certificate, because none has a token.
func FuzzRequest(f *testing.F) {
	h := build(f, nil)
	f.Add([]byte(`{}`))
	f.Add([]byte(body(f, "a.b.c", "k", []byte("p"))))
	f.Add([]byte(csrBody(f, "a.b.c", []byte("x"))))
	f.Fuzz(func(t *testing.T, b []byte) {
		rec := h.do(http.MethodPost, PathSigningCert, string(b), nil)
		h.log.Reset()
		if rec.Code < 400 || rec.Code >= 500 || !json.Valid(rec.Body.Bytes()) {
			t.Errorf("%q: status %d, %s", b, rec.Code, rec.Body)
		}
	})
}

// BenchmarkIssue is a whole request without the network: JSON, token, proof,
// certificate, three signatures by software keys.
func BenchmarkIssue(b *testing.B) {
	h := build(b, nil)
	s := h.do(http.MethodPost, PathSigningCert, "{}", nil)
	if s.Code != http.StatusBadRequest {
		b.Fatal(s.Code)
	}
	request := []byte(body(b, "", publicPEM(b, h.key.Public()), prove(b, h.key, "alice@example.com")))
	authorization := "Bearer " + h.token(b, nil)
	b.ReportAllocs()
	for b.Loop() {
		req := httptest.NewRequest(http.MethodPost, PathSigningCert, bytes.NewReader(request))
		req.Header.Set("Authorization", authorization)
		rec := httptest.NewRecorder()
		h.echo.ServeHTTP(rec, req)
		if rec.Code != http.StatusOK {
			b.Fatal(rec.Body)
		}
		_, _ = io.Copy(io.Discard, rec.Body)
		h.log.Reset()
	}
}

// TestLargeBodyWithoutLength: the limit holds for a body that does not say how
// long it is, over a real connection.
func TestLargeBodyWithoutLength(t *testing.T) {
	h := build(t, nil)
	srv := httptest.NewServer(h.echo)
	defer srv.Close()
	endless := io.LimitReader(blanks{}, 5<<20)
	resp, err := srv.Client().Post(srv.URL+PathSigningCert, "application/json", io.MultiReader(endless)) // hides the length
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusRequestEntityTooLarge {
		t.Errorf("status %d", resp.StatusCode)
	}
}

// blanks is white space without end, which no JSON parser minds.
type blanks struct{}

func (blanks) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	return len(p), nil
}

// TestIdentityProviderDown: nobody can sign in, and the answer says whose
// fault it is.
func TestIdentityProviderDown(t *testing.T) {
	gone := httptest.NewServer(nil)
	issuer := gone.URL
	gone.Close()
	f := catest.NewParts(t)
	verifier, err := identity.New(t.Context(), identity.Config{OIDCIssuers: map[string]identity.Issuer{
		issuer: {IssuerURL: issuer, ClientID: "sigstore", Type: "email"},
	}}, identity.Options{Now: f.Config().Now, LoopbackHTTP: true})
	if err != nil {
		t.Fatal(err)
	}
	defer verifier.Close()
	s, err := New(Config{Authority: catest.Authority(t, f.Config()), Identity: verifier})
	if err != nil {
		t.Fatal(err)
	}
	h := &house{echo: echo.New()}
	s.Register(h.echo)
	raw, err := oidctest.New(oidctest.Config{Issuer: issuer, Now: func() time.Time { return catest.Noon }}).Token(nil)
	if err != nil {
		t.Fatal(err)
	}
	rec := h.do(http.MethodPost, PathSigningCert, body(t, raw, "", nil), nil)
	wantFailure(t, rec, 503, 14, "The identity provider is not available; try again")
	if rec.Header().Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
}
