package test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	fulcio "github.com/sigstore/fulcio/pkg/generated/protobuf"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// TestFulcioForms asks one listener in every way that Fulcio is asked: v2 over
// gRPC as sigstore-java does, v1 as cosign 2 and gitsign do.
func TestFulcioForms(t *testing.T) {
	d := startDemo(t, filepath.Join(t.TempDir(), "demo"))
	token, key := strings.TrimSpace(string(d.read("token"))), freshKey(t)
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte(user))
	proof, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}

	conn, err := grpc.NewClient(strings.TrimPrefix(d.url, "https://"), grpc.WithTransportCredentials(credentials.NewTLS(d.tlsConfig())))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := fulcio.NewCAClient(conn)
	request := &fulcio.CreateSigningCertificateRequest{
		Credentials: &fulcio.Credentials{Credentials: &fulcio.Credentials_OidcIdentityToken{OidcIdentityToken: token}},
		Key: &fulcio.CreateSigningCertificateRequest_PublicKeyRequest{PublicKeyRequest: &fulcio.PublicKeyRequest{
			PublicKey: &fulcio.PublicKey{Content: string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))}, ProofOfPossession: proof,
		}},
	}
	answer, err := client.CreateSigningCertificate(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	checkLeaf(t, d, answer.GetSignedCertificateEmbeddedSct().GetChain().GetCertificates(), key)
	if _, err := client.CreateSigningCertificate(t.Context(), &fulcio.CreateSigningCertificateRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("gRPC without a token: %v", err)
	}
	health, err := grpc_health_v1.NewHealthClient(conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	if err != nil || health.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Errorf("gRPC health %v, %v", health, err)
	}

	body, err := json.Marshal(map[string]any{"publicKey": map[string]any{"content": der, "algorithm": "ecdsa"}, "signedEmailAddress": proof})
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, d.url+"/api/v1/signingCert", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := d.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusCreated {
		t.Fatalf("v1: status %d, %v: %s", resp.StatusCode, err, text)
	}
	checkLeaf(t, d, strings.SplitAfter(string(text), "-----END CERTIFICATE-----\n"), key)
}

// checkLeaf has openssl verify a chain, leaf first, and compares the key.
func checkLeaf(t *testing.T, d *demo, chain []string, key *ecdsa.PrivateKey) {
	t.Helper()
	if len(chain) != 3 {
		t.Fatalf("%d certificates", len(chain))
	}
	block, _ := pem.Decode([]byte(chain[0]))
	if block == nil {
		t.Fatalf("not PEM: %q", chain[0])
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if !key.PublicKey.Equal(leaf.PublicKey) {
		t.Error("the certificate is for another key")
	}
	opensslChain(t, d, leaf)
}
