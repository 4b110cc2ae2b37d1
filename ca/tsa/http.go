package tsa

import (
	"context"
	"errors"
	"io"
	"mime"
	"net/http"
	"strings"

	"github.com/labstack/echo/v4"

	"github.com/chancery-ca/chancery/hsm"
)

// Media types of RFC 3161, 3.4 and of sigstore's timestamp authority.
const (
	typeQuery = "application/timestamp-query"
	typeReply = "application/timestamp-reply"
	typeChain = "application/pem-certificate-chain"
	typeJSON  = "application/json"
)

// retryAfter is what a client that found the token busy is told to wait, in
// seconds.
const retryAfter = "1"

// Register adds the authority's routes to g:
//
//	POST /api/v1/timestamp            DER or JSON in, timestamp reply out
//	GET  /api/v1/timestamp/certchain  PEM, the TSA's certificate first
//	GET  /ping
func (a *Authority) Register(g *echo.Group) {
	g.POST("/api/v1/timestamp", a.handleTimestamp)
	g.GET("/api/v1/timestamp/certchain", a.handleChain)
	g.GET("/ping", handlePing)
}

func handlePing(c echo.Context) error { return c.String(http.StatusOK, ".") }

func (a *Authority) handleChain(c echo.Context) error {
	return c.Blob(http.StatusOK, typeChain, a.chainPEM)
}

func (a *Authority) handleTimestamp(c echo.Context) error {
	req, err := readRequest(c.Request())
	if err != nil {
		return a.fail(c, err)
	}
	reply, err := a.Timestamp(c.Request().Context(), req)
	if err != nil {
		return a.fail(c, err)
	}
	return c.Blob(http.StatusOK, typeReply, reply)
}

// errMediaType: the body is neither of the two forms.
var errMediaType = errors.New("content type is neither application/timestamp-query nor application/json")

// readRequest reads at most the form's bound and one octet, and parses.
func readRequest(r *http.Request) (*Request, error) {
	form, err := mediaType(r.Header)
	if err != nil {
		return nil, err
	}
	limit, parse := MaxDER, ParseDER
	if form == typeJSON {
		limit, parse = MaxJSON, ParseJSON
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, int64(limit)+1))
	if err != nil {
		return nil, refuse(msgGeneric, "read body: %.80s", err)
	}
	return parse(body)
}

// mediaType reads the one Content-Type; parameters are ignored.
func mediaType(h http.Header) (string, error) {
	values := h.Values("Content-Type")
	if len(values) != 1 || strings.Count(strings.ToLower(values[0]), "application/") != 1 {
		return "", errMediaType
	}
	form, _, err := mime.ParseMediaType(values[0])
	if err != nil || (form != typeQuery && form != typeJSON) {
		return "", errMediaType
	}
	return form, nil
}

// problem is the body of an error: upstream's, with the HTTP status as code.
type problem struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

// fail is the one mapping from errors to HTTP. The inner text goes to the log
// alone.
func (a *Authority) fail(c echo.Context, err error) error {
	p := problem{Code: http.StatusInternalServerError, Message: msgGeneric}
	var refused *RequestError
	switch {
	case errors.As(err, &refused):
		p = problem{Code: http.StatusBadRequest, Message: refused.Public}
	case errors.Is(err, errMediaType):
		p = problem{Code: http.StatusUnsupportedMediaType, Message: msgGeneric}
	case c.Request().Context().Err() != nil && errors.Is(c.Request().Context().Err(), context.Canceled):
		p = problem{Code: statusClientClosed, Message: "client disconnected during request"}
	case errors.Is(err, ErrUnavailable):
		p = problem{Code: http.StatusServiceUnavailable, Message: "time is not available"}
	case errors.Is(err, hsm.ErrBusy), errors.Is(err, hsm.ErrLost):
		p = problem{Code: http.StatusServiceUnavailable, Message: "timestamp authority is busy; retry"}
		c.Response().Header().Set("Retry-After", retryAfter)
	}
	level := a.log.Warn
	if p.Code >= http.StatusInternalServerError {
		level = a.log.Error
	}
	level("timestamp refused", "status", p.Code, "error", err)
	return c.JSON(p.Code, p)
}

// statusClientClosed is what upstream answers to a client that has gone.
const statusClientClosed = 499
