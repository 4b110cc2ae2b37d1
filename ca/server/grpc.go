package server

import (
	"context"
	"crypto/rand"
	"strconv"

	fulcio "github.com/sigstore/fulcio/pkg/generated/protobuf"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// metadataToken is where Fulcio's gateway puts the token of the header.
const metadataToken = "oidcidentitytoken"

// RegisterGRPC adds the v2 interface, service dev.sigstore.fulcio.v2.CA. The
// server's owner bounds the size of a message to MaxBody.
func (s *Server) RegisterGRPC(r grpc.ServiceRegistrar) {
	fulcio.RegisterCAServer(r, &grpcServer{server: s})
}

// grpcServer is the Server as gRPC sees it.
type grpcServer struct {
	fulcio.UnimplementedCAServer
	server *Server
}

// CreateSigningCertificate issues a certificate.
func (g *grpcServer) CreateSigningCertificate(ctx context.Context, msg *fulcio.CreateSigningCertificateRequest) (*fulcio.SigningCertificate, error) {
	id := rand.Text()
	token := msg.GetCredentials().GetOidcIdentityToken()
	if md, ok := metadata.FromIncomingContext(ctx); ok && token == "" {
		if values := md.Get(metadataToken); len(values) == 1 {
			token = values[0]
		}
	}
	cert, err := g.server.issue(ctx, id, token, msg)
	if err != nil {
		return nil, g.fail(ctx, id, err)
	}
	return &fulcio.SigningCertificate{Certificate: &fulcio.SigningCertificate_SignedCertificateEmbeddedSct{
		SignedCertificateEmbeddedSct: &fulcio.SigningCertificateEmbeddedSCT{Chain: &fulcio.CertificateChain{Certificates: cert.PEM}},
	}}, nil
}

// GetTrustBundle returns the CA's certificates.
func (g *grpcServer) GetTrustBundle(context.Context, *fulcio.GetTrustBundleRequest) (*fulcio.TrustBundle, error) {
	return trustBundle(g.server.cfg.Authority), nil
}

// GetConfiguration returns the configured issuers.
func (g *grpcServer) GetConfiguration(context.Context, *fulcio.GetConfigurationRequest) (*fulcio.Configuration, error) {
	return configuration(g.server.cfg.Identity.Config()), nil
}

// fail logs err and makes the status of its failure.
func (g *grpcServer) fail(ctx context.Context, id string, err error) error {
	f := failureOf(ctx, err)
	g.server.logFailure(ctx, id, f, err)
	if f.retry > 0 {
		// The call fails all the same if the header cannot be sent any more.
		_ = grpc.SetHeader(ctx, metadata.Pairs("retry-after", strconv.Itoa(f.retry)))
	}
	return status.Error(f.code, f.message)
}
