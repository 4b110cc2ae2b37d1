// Package server is the issuance API: everything that Fulcio 1.8 answers, on an
// echo instance and a gRPC server that somebody else owns.
//
//	v2 over HTTP (fulcio.proto): cosign 3, sigstore-go, -js, -python
//	v2 over gRPC (grpc.go):      sigstore-java
//	v1 over HTTP (legacy.go):    cosign 2, gitsign
//
// Data flows one way, whatever the form: request, at most 4 MiB → request
// message and token → Principal (ca/identity) → proved public key →
// Certificate (ca) → answer. What goes wrong on the way is turned into an
// answer in one place, failureOf: the inner text goes to the log with the
// request's id, a constant sentence to the client.
//
// The package promises that no token and no claim reaches the log, that every
// request ends within Config.Timeout, that what could not be answered in a fifth
// of it, at the measured pace of the token, is refused at once (503 with
// Retry-After, before anything is verified), and that a client's fault is never
// answered with a 5xx. Of the requests that arrive at a time 16 have bodies of
// more than 16 KiB. It trusts the listener to bound headers and slow clients, and
// the gRPC server's owner to use LimitBody.
package server

import (
	"context"
	"crypto"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/labstack/echo/v4"
	fulcio "github.com/sigstore/fulcio/pkg/generated/protobuf"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/chancery-ca/chancery/ca"
	"github.com/chancery-ca/chancery/ca/identity"
)

// The paths of the interface.
const (
	PathSigningCert   = "/api/v2/signingCert"
	PathTrustBundle   = "/api/v2/trustBundle"
	PathConfiguration = "/api/v2/configuration"
)

// MaxBody bounds a request's body, in octets.
const MaxBody = 4 << 20

// DefaultTimeout bounds one issuance, from the body's last octet on.
const DefaultTimeout = 10 * time.Second

// Config is what a Server needs.
type Config struct {
	// Authority issues and Identity authenticates. Both are required.
	Authority *ca.Authority
	Identity  *identity.Verifier
	// Timeout bounds one issuance; 0 is DefaultTimeout.
	Timeout time.Duration
	// Logger may be nil.
	Logger *slog.Logger
}

// Server answers the issuance API. It is safe for concurrent use.
type Server struct {
	cfg           Config
	admission     *admission
	largeBodies   chan struct{} // one for each large body that arrives
	trustBundle   []byte        // JSON; the chain does not change
	configuration []byte        // JSON; the issuers do not change
}

// New prepares the answers that never change.
func New(cfg Config) (*Server, error) {
	if cfg.Authority == nil || cfg.Identity == nil {
		return nil, errors.New("authority and identity are required")
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = DefaultTimeout
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, admission: newAdmission(cfg.Timeout / 5), largeBodies: make(chan struct{}, largeBodies)}
	var err error
	if s.trustBundle, err = marshalAll(trustBundle(cfg.Authority)); err != nil {
		return nil, err
	}
	s.configuration, err = marshalAll(configuration(cfg.Identity.Config()))
	return s, err
}

// trustBundle is GET /api/v2/trustBundle: intermediates first, root last.
func trustBundle(a *ca.Authority) *fulcio.TrustBundle {
	return &fulcio.TrustBundle{Chains: []*fulcio.CertificateChain{{Certificates: a.ChainPEM()}}}
}

// configuration is GET /api/v2/configuration.
func configuration(cfg identity.Config) *fulcio.Configuration {
	out := &fulcio.Configuration{}
	add := func(issuers map[string]identity.Issuer, name func(url string, to *fulcio.OIDCIssuer)) {
		for _, url := range slices.Sorted(maps.Keys(issuers)) {
			issuer := issuers[url]
			o := &fulcio.OIDCIssuer{
				Audience:              issuer.ClientID,
				ChallengeClaim:        issuer.Challenge(),
				SpiffeTrustDomain:     issuer.SPIFFETrustDomain,
				IssuerType:            issuer.Kind(),
				SubjectDomain:         issuer.SubjectDomain,
				SkipEmailVerification: issuer.SkipEmailVerification,
			}
			name(url, o)
			out.Issuers = append(out.Issuers, o)
		}
	}
	add(cfg.OIDCIssuers, func(url string, o *fulcio.OIDCIssuer) { o.Issuer = &fulcio.OIDCIssuer_IssuerUrl{IssuerUrl: url} })
	add(cfg.MetaIssuers, func(url string, o *fulcio.OIDCIssuer) {
		o.Issuer = &fulcio.OIDCIssuer_WildcardIssuerUrl{WildcardIssuerUrl: url}
	})
	return out
}

// marshalAll writes a message with unset fields, as upstream's gateway does.
func marshalAll(m proto.Message) ([]byte, error) {
	b, err := protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", m.ProtoReflect().Descriptor().Name(), err)
	}
	return b, nil
}

// Register adds the routes. Other methods on the same paths are answered as
// Fulcio's gateway does, with 501.
func (s *Server) Register(e *echo.Echo) {
	s.route(e, PathSigningCert, http.MethodPost, s.signingCert)
	s.route(e, PathTrustBundle, http.MethodGet, func(c echo.Context) error { return s.write(c, http.StatusOK, s.trustBundle) })
	s.route(e, PathConfiguration, http.MethodGet, func(c echo.Context) error { return s.write(c, http.StatusOK, s.configuration) })
	s.route(e, PathLegacySigningCert, http.MethodPost, s.legacySigningCert)
	s.route(e, PathLegacyRootCert, http.MethodGet, s.legacyRootCert)
}

func (s *Server) route(e *echo.Echo, path, method string, handle echo.HandlerFunc) {
	e.Any(path, func(c echo.Context) error {
		identify(c)
		header := c.Response().Header()
		header.Set(echo.HeaderAccessControlAllowOrigin, "*")
		header.Set(echo.HeaderXContentTypeOptions, "nosniff")
		switch r := c.Request(); {
		case r.Method == method:
			return handle(c)
		case r.Method == http.MethodOptions && r.Header.Get(echo.HeaderAccessControlRequestMethod) != "":
			header.Set(echo.HeaderAccessControlAllowMethods, method)
			header.Set(echo.HeaderAccessControlAllowHeaders, "Authorization, Content-Type, Accept, X-Requested-With")
			header.Set(echo.HeaderAccessControlMaxAge, "600")
			return c.NoContent(http.StatusNoContent)
		}
		return s.fail(c, errMethod)
	})
}

// identify gives the request an id unless a middleware did. A client's own
// X-Request-Id is not used: it would go into our log.
func identify(c echo.Context) {
	header := c.Response().Header()
	if header.Get(echo.HeaderXRequestID) == "" {
		header.Set(echo.HeaderXRequestID, rand.Text())
	}
}

// signingCert is POST /api/v2/signingCert. Accept is not looked at:
// sigstore-python asks for PEM and reads JSON.
func (s *Server) signingCert(c echo.Context) error {
	msg := &fulcio.CreateSigningCertificateRequest{}
	if err := s.readRequest(c, msg); err != nil {
		return s.fail(c, err)
	}
	cert, err := s.issue(c.Request().Context(), requestID(c), rawToken(msg, c.Request().Header), msg)
	if err != nil {
		return s.fail(c, err)
	}
	body, err := json.Marshal(signingCertificate{embedded{certificates{cert.PEM}}})
	if err != nil {
		return s.fail(c, fmt.Errorf("%w: %w", errMarshal, err))
	}
	return s.write(c, http.StatusOK, body)
}

// logIndex is the entry's place in the log, or nothing where that is unknown.
func logIndex(cert *ca.Certificate) slog.Attr {
	if cert.LogIndex == nil {
		return slog.Attr{}
	}
	return slog.Uint64("logIndex", *cert.LogIndex)
}

// issue is the way from a request to a certificate, in the order in which
// Fulcio looks for faults: token, then key. It ends within Config.Timeout; what
// would not end in a fifth of it is refused before anything is looked at.
func (s *Server) issue(ctx context.Context, id, token string, msg *fulcio.CreateSigningCertificateRequest) (cert *ca.Certificate, err error) {
	if err := s.admission.enter(); err != nil {
		return nil, err
	}
	var began time.Time // zero without a certificate
	defer func() { s.admission.leave(began) }()
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Timeout)
	defer cancel()
	principal, err := s.cfg.Identity.Verify(ctx, token)
	if err != nil {
		s.cfg.Authority.Refused(id, nil, err)
		return nil, err
	}
	public, err := provedKey(msg, principal)
	if err != nil {
		s.cfg.Authority.Refused(id, principal, err)
		return nil, err
	}
	start := time.Now()
	cert, err = s.cfg.Authority.Issue(ctx, ca.Request{ID: id, Principal: principal, Public: public})
	if err != nil {
		return nil, err
	}
	began = start
	s.cfg.Logger.LogAttrs(ctx, slog.LevelInfo, "certificate issued",
		slog.String("request", id), slog.String("serial", cert.Serial), logIndex(cert))
	return cert, nil
}

// readRequest reads the body into msg: protobuf's JSON with both forms of names
// and unknown fields discarded. No body is an empty message.
func (s *Server) readRequest(c echo.Context, msg proto.Message) error {
	if c.Request().ContentLength > MaxBody {
		return errTooLarge
	}
	defer s.LimitBody(c.Request())()
	body, err := io.ReadAll(http.MaxBytesReader(c.Response(), c.Request().Body, MaxBody))
	if err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			return errTooLarge
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return errSlow
		case errors.Is(err, errBodies):
			// Else the server would wait for more of the body before it answers.
			c.Response().Header().Set(echo.HeaderConnection, "close")
			return errBodies
		}
		return fmt.Errorf("%w: read body: %w", errRequest, err)
	}
	if len(body) == 0 {
		return nil
	}
	if err := parse.Unmarshal(body, msg); err != nil {
		return errRequest // err quotes the body
	}
	return nil
}

// parse reads as upstream's gateway does. Messages of the interface nest 3
// deep; what is discarded may nest as deep as the limit.
var parse = protojson.UnmarshalOptions{DiscardUnknown: true, RecursionLimit: 64}

// rawToken takes the token from the body or else from the header.
func rawToken(msg *fulcio.CreateSigningCertificateRequest, header http.Header) string {
	if token := msg.GetCredentials().GetOidcIdentityToken(); token != "" {
		return token
	}
	return bearerToken(header)
}

// bearerToken takes the token from the one Authorization header.
func bearerToken(header http.Header) string {
	values := header.Values(echo.HeaderAuthorization)
	if len(values) != 1 {
		return ""
	}
	const bearer = "bearer " // in any case: RFC 9110, Section 11.1
	if v := values[0]; len(v) >= len(bearer) && strings.EqualFold(v[:len(bearer)], bearer) {
		return v[len(bearer):]
	}
	return values[0]
}

// provedKey is the public key of the CSR, or else the one with a proof of
// possession.
func provedKey(msg *fulcio.CreateSigningCertificateRequest, p *identity.Principal) (crypto.PublicKey, error) {
	if csr := msg.GetCertificateSigningRequest(); len(csr) > 0 {
		return identity.ProveCSR(csr)
	}
	req := msg.GetPublicKeyRequest()
	return identity.ProveKey(req.GetPublicKey().GetContent(), req.GetProofOfPossession(), p.Challenges)
}

// The answer's form (fulcio.proto).
type (
	signingCertificate struct {
		Embedded embedded `json:"signedCertificateEmbeddedSct"`
	}
	embedded struct {
		Chain certificates `json:"chain"`
	}
	certificates struct {
		Certificates []string `json:"certificates"`
	}
)

func (s *Server) write(c echo.Context, status int, body []byte) error {
	return c.Blob(status, echo.MIMEApplicationJSON, body)
}

func requestID(c echo.Context) string { return c.Response().Header().Get(echo.HeaderXRequestID) }
