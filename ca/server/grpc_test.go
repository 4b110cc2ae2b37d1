package server

import (
	"context"
	"crypto"
	"crypto/x509"
	"net"
	"testing"

	"github.com/google/go-cmp/cmp"
	fulcio "github.com/sigstore/fulcio/pkg/generated/protobuf"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/chancery-ca/chancery/ca"
	"github.com/chancery-ca/chancery/hsm"
)

// dial serves gRPC in memory and returns a client.
func (h *house) dial(t *testing.T) fulcio.CAClient {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	server := grpc.NewServer(grpc.MaxRecvMsgSize(MaxBody))
	h.server.RegisterGRPC(server)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:///bufconn", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return fulcio.NewCAClient(conn)
}

// request is what sigstore-java sends: the token in the body.
func (h *house) request(t *testing.T, token, challenge string) *fulcio.CreateSigningCertificateRequest {
	t.Helper()
	msg := &fulcio.CreateSigningCertificateRequest{
		Key: &fulcio.CreateSigningCertificateRequest_PublicKeyRequest{PublicKeyRequest: &fulcio.PublicKeyRequest{
			PublicKey:         &fulcio.PublicKey{Algorithm: fulcio.PublicKeyAlgorithm_ECDSA, Content: publicPEM(t, h.key.Public())},
			ProofOfPossession: prove(t, h.key, challenge),
		}},
	}
	if token != "" {
		msg.Credentials = &fulcio.Credentials{Credentials: &fulcio.Credentials_OidcIdentityToken{OidcIdentityToken: token}}
	}
	return msg
}

func TestGRPC(t *testing.T) {
	h := build(t, nil)
	client := h.dial(t)
	token := h.token(t, nil)
	for name, call := range map[string]func() (*fulcio.SigningCertificate, error){
		"token in the message": func() (*fulcio.SigningCertificate, error) {
			return client.CreateSigningCertificate(t.Context(), h.request(t, token, "alice@example.com"))
		},
		"token in the metadata": func() (*fulcio.SigningCertificate, error) {
			ctx := metadata.AppendToOutgoingContext(t.Context(), metadataToken, token)
			return client.CreateSigningCertificate(ctx, h.request(t, "", "alice@example.com"))
		},
	} {
		answer, err := call()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		chain := answer.GetSignedCertificateEmbeddedSct().GetChain().GetCertificates()
		if len(chain) != 3 {
			t.Fatalf("%s: %d certificates", name, len(chain))
		}
		leaf, err := x509.ParseCertificate(decode(t, []byte(chain[0])))
		if err != nil || len(leaf.EmailAddresses) != 1 {
			t.Errorf("%s: leaf %v, %v", name, leaf, err)
		}
	}
	bundle, err := client.GetTrustBundle(t.Context(), &fulcio.GetTrustBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(h.server.cfg.Authority.ChainPEM(), bundle.GetChains()[0].GetCertificates()); d != "" {
		t.Error(d)
	}
	issuers, err := client.GetConfiguration(t.Context(), &fulcio.GetConfigurationRequest{})
	if err != nil || len(issuers.GetIssuers()) != 2 {
		t.Errorf("configuration %v, %v", issuers, err)
	}
}

func TestGRPCErrors(t *testing.T) {
	h := build(t, nil)
	client := h.dial(t)
	token := h.token(t, nil)
	twice := metadata.AppendToOutgoingContext(t.Context(), metadataToken, token, metadataToken, token)
	for _, test := range []struct {
		name    string
		ctx     context.Context
		msg     *fulcio.CreateSigningCertificateRequest
		code    codes.Code
		message string
	}{
		{"no token", t.Context(), h.request(t, "", "alice@example.com"), codes.InvalidArgument, "There was an error processing the identity token"},
		{"two tokens", twice, h.request(t, "", "alice@example.com"), codes.InvalidArgument, "There was an error processing the identity token"},
		{"another's proof", t.Context(), h.request(t, token, "bob@example.com"), codes.InvalidArgument, "The signature supplied in the request could not be verified"},
		{"nothing", t.Context(), &fulcio.CreateSigningCertificateRequest{}, codes.InvalidArgument, "There was an error processing the identity token"},
		{"too large", t.Context(), &fulcio.CreateSigningCertificateRequest{
			Key: &fulcio.CreateSigningCertificateRequest_CertificateSigningRequest{CertificateSigningRequest: make([]byte, MaxBody+1)}}, codes.ResourceExhausted, ""},
	} {
		_, err := client.CreateSigningCertificate(test.ctx, test.msg)
		if s := status.Convert(err); s.Code() != test.code || test.message != "" && s.Message() != test.message {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}

// TestGRPCBusy: a busy CA is Unavailable, and says when to come back.
func TestGRPCBusy(t *testing.T) {
	h := build(t, func(cfg *ca.Config) {
		cfg.Key = failing{cfg.Key, hsm.ErrBusy}
	})
	client := h.dial(t)
	var header metadata.MD
	_, err := client.CreateSigningCertificate(t.Context(), h.request(t, h.token(t, nil), "alice@example.com"), grpc.Header(&header))
	if status.Code(err) != codes.Unavailable {
		t.Errorf("err %v", err)
	}
	if d := cmp.Diff([]string{"1"}, header.Get("retry-after")); d != "" {
		t.Error(d)
	}
}

// failing is a key that only fails.
type failing struct {
	hsm.Key
	err error
}

func (f failing) SignContext(context.Context, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, f.err
}
