package server

import (
	"net/http"
	"strings"

	"github.com/labstack/echo/v4"
	fulcio "github.com/sigstore/fulcio/pkg/generated/protobuf"
	"github.com/sigstore/fulcio/pkg/generated/protobuf/legacy"
)

// The paths of the v1 interface (fulcio_legacy.proto of Fulcio 1.8), which
// cosign 2 and gitsign use.
const (
	PathLegacySigningCert = "/api/v1/signingCert"
	PathLegacyRootCert    = "/api/v1/rootCert"
)

// mimeChain is PEM certificates, leaf first.
const mimeChain = "application/pem-certificate-chain"

// legacySigningCert is POST /api/v1/signingCert. Its clients take 201 alone for
// a success. The token comes in the header only.
func (s *Server) legacySigningCert(c echo.Context) error {
	old := &legacy.CreateSigningCertificateRequest{}
	if err := s.readRequest(c, old); err != nil {
		return s.fail(c, err)
	}
	cert, err := s.issue(c.Request().Context(), requestID(c), bearerToken(c.Request().Header), current(old))
	if err != nil {
		return s.fail(c, err)
	}
	return c.Blob(http.StatusCreated, mimeChain, []byte(strings.Join(cert.PEM, "\n")))
}

// legacyRootCert is GET /api/v1/rootCert: the CA's certificates, issuer first.
func (s *Server) legacyRootCert(c echo.Context) error {
	return c.Blob(http.StatusOK, mimeChain, []byte(strings.Join(s.cfg.Authority.ChainPEM(), "\n")))
}

// current is a v1 request as one of v2. The algorithm is left out: the key
// decides.
func current(old *legacy.CreateSigningCertificateRequest) *fulcio.CreateSigningCertificateRequest {
	//nolint:staticcheck // SA1019: the whole interface is deprecated, and in use
	csr, key, proof := old.GetCertificateSigningRequest(), old.GetPublicKey(), old.GetSignedEmailAddress()
	if len(csr) > 0 {
		return &fulcio.CreateSigningCertificateRequest{
			Key: &fulcio.CreateSigningCertificateRequest_CertificateSigningRequest{CertificateSigningRequest: csr},
		}
	}
	return &fulcio.CreateSigningCertificateRequest{
		Key: &fulcio.CreateSigningCertificateRequest_PublicKeyRequest{PublicKeyRequest: &fulcio.PublicKeyRequest{
			//nolint:staticcheck // SA1019: as above
			PublicKey:         &fulcio.PublicKey{Content: string(key.GetContent())},
			ProofOfPossession: proof,
		}},
	}
}
