package server

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/sigstore/fulcio/pkg/api"
)

// TestLegacyClient issues through Fulcio's own v1 client, which cosign 2 and
// gitsign contain.
func TestLegacyClient(t *testing.T) {
	h := build(t, nil)
	srv := httptest.NewServer(h.echo)
	defer srv.Close()
	u, err := url.Parse(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	client := api.NewClient(u, api.WithTimeout(0))
	der, err := x509.MarshalPKIXPublicKey(h.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	token := h.token(t, nil)
	for name, request := range map[string]api.CertificateRequest{
		"DER key": {PublicKey: api.Key{Content: der, Algorithm: "ecdsa"}, SignedEmailAddress: prove(t, h.key, "alice@example.com")},
		"PEM key": {PublicKey: api.Key{Content: []byte(publicPEM(t, h.key.Public())), Algorithm: "whatever"}, SignedEmailAddress: prove(t, h.key, "alice@example.com")},
		"CSR":     {CertificateSigningRequest: csr(t, h.key, x509.ECDSAWithSHA256)},
	} {
		answer, err := client.SigningCert(request, token)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		leaf, err := x509.ParseCertificate(decode(t, answer.CertPEM))
		if err != nil || len(leaf.EmailAddresses) != 1 || leaf.EmailAddresses[0] != "alice@example.com" {
			t.Errorf("%s: leaf %v, %v", name, leaf, err)
		}
		if n := bytes.Count(answer.ChainPEM, []byte("BEGIN CERTIFICATE")); n != 2 {
			t.Errorf("%s: chain of %d certificates", name, n)
		}
		if len(answer.SCT) != 0 {
			t.Errorf("%s: a detached SCT", name)
		}
	}
	roots, err := client.RootCert()
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.Join(h.server.cfg.Authority.ChainPEM(), "\n"); string(roots.ChainPEM) != want {
		t.Errorf("root certificates %q", roots.ChainPEM)
	}
}

func decode(t *testing.T, text []byte) []byte {
	t.Helper()
	block, _ := pem.Decode(text)
	if block == nil {
		t.Fatalf("not PEM: %q", text)
	}
	return block.Bytes
}

// TestLegacyForm: status, type and white space are what clients take apart.
func TestLegacyForm(t *testing.T) {
	h := build(t, nil)
	request := marshal(t, map[string]any{
		"publicKey":          map[string]any{"content": []byte(publicPEM(t, h.key.Public())), "algorithm": "ecdsa"},
		"signedEmailAddress": prove(t, h.key, "alice@example.com"),
	})
	auth := map[string]string{"Authorization": "Bearer " + h.token(t, nil)}
	rec := h.do(http.MethodPost, PathLegacySigningCert, request, auth)
	if rec.Code != http.StatusCreated || rec.Header().Get("Content-Type") != mimeChain || rec.Header().Get("SCT") != "" {
		t.Fatalf("status %d, %v: %s", rec.Code, rec.Header(), rec.Body)
	}
	if text := rec.Body.String(); text != strings.TrimSpace(text) || strings.Count(text, "-----END CERTIFICATE-----\n-----BEGIN") != 2 {
		t.Errorf("answer %q", text)
	}
	for _, test := range []struct {
		name, body string
		header     map[string]string
		status     int
		message    string
	}{
		{"no token", request, nil, 400, "There was an error processing the identity token"},
		{"token in the body", marshal(t, map[string]any{"credentials": map[string]any{"oidcIdentityToken": h.token(t, nil)}}), nil, 400, "There was an error processing the identity token"},
		{"no key", "{}", auth, 400, "The public key supplied in the request could not be parsed"},
		{"key that is none", marshal(t, map[string]any{"publicKey": map[string]any{"content": []byte("x")}}), auth, 400, "The public key supplied in the request could not be parsed"},
		{"proof of another", marshal(t, map[string]any{
			"publicKey": map[string]any{"content": []byte(publicPEM(t, h.key.Public()))}, "signedEmailAddress": prove(t, h.key, "bob@example.com")}), auth, 400, "The signature supplied in the request could not be verified"},
		{"not JSON", "x", auth, 400, "The request could not be parsed"},
		{"CSR that is none", marshal(t, map[string]any{"certificateSigningRequest": []byte("x")}), auth, 400, "The certificate signing request could not be parsed"},
	} {
		rec := h.do(http.MethodPost, PathLegacySigningCert, test.body, test.header)
		var answer struct {
			Code    int
			Message string
		}
		if err := json.Unmarshal(rec.Body.Bytes(), &answer); err != nil {
			t.Errorf("%s: %v: %s", test.name, err, rec.Body)
		}
		if rec.Code != test.status || answer.Message != test.message || answer.Code != 3 {
			t.Errorf("%s: %d %s", test.name, rec.Code, rec.Body)
		}
	}
	if rec := h.do(http.MethodGet, PathLegacySigningCert, "", nil); rec.Code != http.StatusNotImplemented {
		t.Errorf("GET: %d", rec.Code)
	}
}
