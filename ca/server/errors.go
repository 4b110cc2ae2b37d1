package server

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"math"
	"net/http"
	"strconv"

	"github.com/labstack/echo/v4"
	"google.golang.org/grpc/codes"

	"github.com/chancery-ca/chancery/ca"
	"github.com/chancery-ca/chancery/ca/identity"
)

// Faults of a request that no other package knows.
var (
	errMethod   = errors.New("method not allowed")
	errTooLarge = errors.New("request body is too large")
	errRequest  = errors.New("request is not a message of the interface")
	errSlow     = errors.New("request body did not arrive in time")
	errMarshal  = errors.New("answer could not be encoded")
)

// failure is what a client is told: an HTTP status, a gRPC code and a sentence
// that it may rely on (Fulcio 1.8, pkg/server/error.go).
type failure struct {
	status  int
	code    codes.Code
	message string
	// retry is the Retry-After header in seconds; 0 is none.
	retry int
}

// statusClientClosed is what is logged for a client that went away. It never
// arrives.
const statusClientClosed = 499

// failures is Fulcio's error table in the order in which errors are looked for.
var failures = []struct {
	err error
	failure
}{
	{identity.ErrUsed, failure{http.StatusBadRequest, codes.InvalidArgument, "There was an error processing the identity token", 0}},
	{ca.ErrPolicy, failure{http.StatusForbidden, codes.PermissionDenied, "The policy of this certificate authority does not allow this certificate", 0}},
	{identity.ErrToken, failure{http.StatusBadRequest, codes.InvalidArgument, "There was an error processing the identity token", 0}},
	{identity.ErrCSR, failure{http.StatusBadRequest, codes.InvalidArgument, "The certificate signing request could not be parsed", 0}},
	{identity.ErrPublicKey, failure{http.StatusBadRequest, codes.InvalidArgument, "The public key supplied in the request could not be parsed", 0}},
	{identity.ErrWeakKey, failure{http.StatusBadRequest, codes.InvalidArgument, "The public key supplied in the request is insecure", 0}},
	{identity.ErrProof, failure{http.StatusBadRequest, codes.InvalidArgument, "The signature supplied in the request could not be verified", 0}},
	{identity.ErrMapping, failure{http.StatusBadRequest, codes.InvalidArgument, "The identity in the token cannot be put into a certificate", 0}},
	{ca.ErrIdentity, failure{http.StatusBadRequest, codes.InvalidArgument, "The identity in the token cannot be put into a certificate", 0}},
	{errRequest, failure{http.StatusBadRequest, codes.InvalidArgument, "The request could not be parsed", 0}},
	{errTooLarge, failure{http.StatusRequestEntityTooLarge, codes.ResourceExhausted, "The request is larger than 4 MiB", 0}},
	{errSlow, failure{http.StatusRequestTimeout, codes.DeadlineExceeded, "The request did not arrive in time", 0}},
	{errMethod, failure{http.StatusNotImplemented, codes.Unimplemented, "Method Not Allowed", 0}},
	{ca.ErrBusy, failure{http.StatusServiceUnavailable, codes.Unavailable, "The certificate authority is busy; try again", 1}},
	{ca.ErrUnavailable, failure{http.StatusServiceUnavailable, codes.Unavailable, "The certificate authority is not available; try again", 2}},
	{identity.ErrClock, failure{http.StatusServiceUnavailable, codes.Unavailable, "The certificate authority is not available; try again", 2}},
	{identity.ErrUnavailable, failure{http.StatusServiceUnavailable, codes.Unavailable, "The identity provider is not available; try again", 2}},
	{ca.ErrLog, failure{http.StatusInternalServerError, codes.Internal, "Error entering certificate in CTL", 0}},
	{ca.ErrCA, failure{http.StatusInternalServerError, codes.Internal, "error communicating with CA backend", 0}},
	{errMarshal, failure{http.StatusInternalServerError, codes.Internal, "Error marshaling code signing certificate", 0}},
}

// failureOf is the one place where an error becomes an answer.
func failureOf(ctx context.Context, err error) failure {
	// The listener ends the context of a body that is late, too.
	if errors.Is(ctx.Err(), context.Canceled) && !errors.Is(err, errSlow) {
		return failure{statusClientClosed, codes.Canceled, "The client went away", 0}
	}
	var algorithm *identity.AlgorithmError
	if errors.As(err, &algorithm) {
		return failure{http.StatusBadRequest, codes.InvalidArgument, algorithm.Error(), 0}
	}
	for _, row := range failures {
		if errors.Is(err, row.err) {
			return row.later(err)
		}
	}
	return failure{http.StatusInternalServerError, codes.Internal, "internal error", 0}
}

// maxRetry bounds the Retry-After header, in seconds.
const maxRetry = 30

// later says when to try again, if err knows better than the table.
func (f failure) later(err error) failure {
	var busy *busyError
	if errors.As(err, &busy) {
		f.retry = int(min(max(math.Ceil(busy.retry.Seconds()), 1), maxRetry))
	}
	return f
}

// fail logs err and answers with its failure, in the form of grpc-gateway.
func (s *Server) fail(c echo.Context, err error) error {
	ctx := c.Request().Context()
	f := failureOf(ctx, err)
	s.logFailure(ctx, requestID(c), f, err)
	if f.retry > 0 {
		c.Response().Header().Set(echo.HeaderRetryAfter, strconv.Itoa(f.retry))
	}
	body, err := json.Marshal(struct {
		Code    codes.Code `json:"code"`
		Message string     `json:"message"`
		Details []struct{} `json:"details"`
	}{f.code, f.message, []struct{}{}})
	if err != nil {
		return err
	}
	return s.write(c, f.status, body)
}

// logFailure writes one line: a warning for the client's fault, an error for
// ours.
func (s *Server) logFailure(ctx context.Context, id string, f failure, err error) {
	level := slog.LevelError
	if f.status < http.StatusInternalServerError || f.code == codes.Unimplemented {
		level = slog.LevelWarn
	}
	s.cfg.Logger.LogAttrs(ctx, level, "request refused",
		slog.String("request", id), slog.Int("status", f.status), slog.String("err", err.Error()))
}
