package ct

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	ct "github.com/google/certificate-transparency-go"
	"github.com/google/certificate-transparency-go/tls"
	"github.com/labstack/echo/v4"

	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/tree"
)

// Cache-Control values. What is addressed by index and size never changes.
const (
	cacheForever = "public, max-age=31536000, immutable"
	cacheDay     = "public, max-age=86400"
	cacheMinute  = "public, max-age=60"
	cacheNever   = "no-cache"
)

// failure is an error with its HTTP status and the sentence for the client.
// The wrapped error is for our log alone.
type failure struct {
	status int
	public string
	err    error
}

// Error is for our log: the sentence for the client and what was behind it.
func (f *failure) Error() string {
	if f.err == nil {
		return f.public
	}
	return f.public + ": " + f.err.Error()
}

// Unwrap returns what was behind it, or nil.
func (f *failure) Unwrap() error { return f.err }

func badRequest(format string, args ...any) error {
	return &failure{status: http.StatusBadRequest, public: fmt.Sprintf(format, args...)}
}

func notFound(what string) error {
	return &failure{status: http.StatusNotFound, public: what}
}

// Register adds the log's routes under g: /ct/v1/… (RFC 6962, Section 4),
// /checkpoint, /tile/… and /issuer/…. Those of a frozen log are the reads alone.
func (l *Log) Register(g *echo.Group) {
	if l.cfg.Frozen == nil {
		g.POST(ct.AddChainPath, l.serve("add-chain", func(c echo.Context) error { return l.add(c, ct.X509LogEntryType) }))
		g.POST(ct.AddPreChainPath, l.serve("add-pre-chain", func(c echo.Context) error { return l.add(c, ct.PrecertLogEntryType) }))
	}
	for path, handler := range map[string]echo.HandlerFunc{
		ct.GetSTHPath:            l.getSTH,
		ct.GetSTHConsistencyPath: l.getConsistency,
		ct.GetProofByHashPath:    l.getProofByHash,
		ct.GetEntriesPath:        l.getEntries,
		ct.GetRootsPath:          l.getRoots,
		ct.GetEntryAndProofPath:  l.getEntryAndProof,
		"/checkpoint":            l.getCheckpoint,
		"/tile/*":                l.getTile,
		"/issuer/:fingerprint":   l.getIssuer,
	} {
		h := l.serve(strings.Trim(path, "/*"), handler)
		g.GET(path, h)
		g.HEAD(path, h)
	}
}

// serve turns the errors of a handler into answers: the one mapping from
// errors to statuses.
func (l *Log) serve(name string, h echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		err := h(c)
		if err == nil || c.Response().Committed {
			return err
		}
		f := classify(err)
		// A client that went away is its own fault.
		if f.status >= http.StatusInternalServerError && c.Request().Context().Err() == nil {
			l.cfg.Logger.ErrorContext(c.Request().Context(), "request failed", "endpoint", name, "status", f.status, "error", err)
		} else {
			l.cfg.Logger.WarnContext(c.Request().Context(), "request refused", "endpoint", name, "status", f.status, "error", err)
		}
		header := c.Response().Header()
		header.Set("Cache-Control", "no-store")
		header.Set("X-Content-Type-Options", "nosniff")
		if f.status == http.StatusServiceUnavailable {
			header.Set("Retry-After", "1")
		}
		return c.String(f.status, http.StatusText(f.status)+"\n"+f.public+"\n")
	}
}

// classify finds the status of an error.
func classify(err error) *failure {
	var f *failure
	switch {
	case errors.As(err, &f):
		return f
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return &failure{status: http.StatusGatewayTimeout, public: "the request ended before the log answered"}
	case errors.Is(err, tree.ErrNotFound):
		return &failure{status: http.StatusNotFound, public: "not in the log"}
	case errors.Is(err, ErrUnavailable), errors.Is(err, tree.ErrBusy), errors.Is(err, tree.ErrClosed),
		errors.Is(err, tree.ErrStorage), errors.Is(err, tree.ErrCorrupt),
		errors.Is(err, head.ErrUnavailable), errors.Is(err, head.ErrClosed), errors.Is(err, head.ErrFork):
		return &failure{status: http.StatusServiceUnavailable, public: "the log is not available now; try again"}
	}
	return &failure{status: http.StatusInternalServerError, public: "the log could not do this"}
}

// add serves add-chain and add-pre-chain (RFC 6962, Sections 4.1 and 4.2).
func (l *Log) add(c echo.Context, kind ct.LogEntryType) error {
	select {
	case l.slots <- struct{}{}:
		defer func() { <-l.slots }()
	default:
		return &failure{status: http.StatusServiceUnavailable, public: "too many submissions at once; try again"}
	}
	body, err := readBody(c)
	if err != nil {
		return err
	}
	raw, err := parseBody(body)
	if err == nil {
		var s *submission
		if s, err = l.check(raw, kind); err == nil {
			return l.submit(c, s)
		}
	}
	return &failure{status: http.StatusBadRequest, public: publicReason(err), err: err}
}

func readBody(c echo.Context) ([]byte, error) {
	body, err := io.ReadAll(http.MaxBytesReader(c.Response(), c.Request().Body, maxBody))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, &failure{status: http.StatusRequestEntityTooLarge, public: fmt.Sprintf("the body is larger than %d octets", maxBody)}
	case err != nil:
		return nil, &failure{status: http.StatusBadRequest, public: "the body could not be read", err: err}
	}
	return body, nil
}

// submit answers with the SCT of a checked submission: the stored one if the
// certificate is in the log, else a new one once its leaf is durable.
func (l *Log) submit(c echo.Context, s *submission) error {
	ctx := c.Request().Context()
	entry, err := l.cfg.Tree.ByIdentity(ctx, identity(s.entry.EntryType, s.cert))
	if errors.Is(err, tree.ErrNotFound) {
		entry, err = l.enter(ctx, s)
	}
	if err != nil {
		return fmt.Errorf("log certificate: %w", err)
	}
	for _, der := range s.chain {
		l.learn(der)
	}
	return l.writeSCT(c, entry)
}

// enter signs an SCT and appends its leaf. If the same certificate came in at
// the same time and was first, its entry is returned and our SCT forgotten.
func (l *Log) enter(ctx context.Context, s *submission) (tree.Entry, error) {
	p, err := l.promise(ctx, s.entry)
	if err != nil {
		return tree.Entry{}, err
	}
	leaf, err := p.leaf(s.cert, s.chain)
	if err != nil {
		return tree.Entry{}, err
	}
	entry, existed, err := l.cfg.Tree.Append(ctx, leaf)
	if err != nil || existed {
		return entry, err
	}
	entry.Value, entry.Extra = leaf.Value, leaf.Extra
	return entry, nil
}

// writeSCT answers with the SCT that belongs to a stored entry.
func (l *Log) writeSCT(c echo.Context, entry tree.Entry) error {
	var leaf ct.MerkleTreeLeaf
	if rest, err := tls.Unmarshal(entry.Value, &leaf); err != nil || len(rest) > 0 {
		return fmt.Errorf("read entry %d: stored leaf is malformed", entry.Index)
	}
	signature, _, err := splitExtra(entry.Extra)
	if err != nil {
		return fmt.Errorf("read entry %d: %w", entry.Index, err)
	}
	signed, err := tls.Marshal(digitallySigned(signature))
	if err != nil {
		return fmt.Errorf("encode SCT: %w", err)
	}
	return writeJSON(c, "no-store", ct.AddChainResponse{
		SCTVersion: ct.V1,
		ID:         l.logID[:],
		Timestamp:  leaf.TimestampedEntry.Timestamp,
		Signature:  signed,
	})
}

func (l *Log) getCheckpoint(c echo.Context) error {
	signed, err := l.latest()
	if err != nil {
		return err
	}
	return blob(c, "text/plain; charset=utf-8", cacheNever, string(etag(signed.Note)), signed.Note)
}

// latest is the head up to which everything may be shown.
func (l *Log) latest() (head.Signed, error) {
	signed := l.cfg.Heads.Latest()
	if len(signed.Signature) == 0 {
		return head.Signed{}, &failure{status: http.StatusServiceUnavailable, public: "the log has no signed head yet", err: l.cfg.Heads.Err()}
	}
	return signed, nil
}

// getIssuer serves the certificate whose SHA-256 is in the path in lower-case
// hexadecimal (static-ct-api, Issuers).
func (l *Log) getIssuer(c echo.Context) error {
	name := c.Param("fingerprint")
	fp, err := hex.DecodeString(name)
	if err != nil || len(fp) != sha256.Size || hex.EncodeToString(fp) != name {
		return badRequest("an issuer is named by 64 lower-case hexadecimal digits")
	}
	der := l.issuer([sha256.Size]byte(fp))
	if der == nil {
		return notFound("no entry of the log names this issuer")
	}
	return blob(c, "application/pkix-cert", cacheForever, `"`+name+`"`, der)
}

// etag is a strong entity tag of body.
func etag(body []byte) []byte {
	sum := sha256.Sum256(body)
	return fmt.Appendf(nil, "%q", base64.RawURLEncoding.EncodeToString(sum[:16]))
}

// blob answers with body, or 304 if the client has it.
func blob(c echo.Context, contentType, cache, tag string, body []byte) error {
	header := c.Response().Header()
	header.Set("Cache-Control", cache)
	if tag != "" {
		header.Set("ETag", tag)
		if matches(c.Request().Header.Get("If-None-Match"), tag) {
			return c.NoContent(http.StatusNotModified)
		}
	}
	return c.Blob(http.StatusOK, contentType, body)
}

// matches is the weak comparison of RFC 9110, Section 13.1.2.
func matches(field, tag string) bool {
	for _, t := range strings.Split(field, ",") {
		if t = strings.TrimPrefix(strings.TrimSpace(t), "W/"); t == tag || t == "*" {
			return true
		}
	}
	return false
}

// writeJSON answers as ctfe does: application/json and one line. What is read
// has an entity tag; what is submitted has none.
func writeJSON(c echo.Context, cache string, v any) error {
	body, err := encodeJSON(v)
	if err != nil {
		return err
	}
	return writeBody(c, cache, body)
}

func encodeJSON(v any) ([]byte, error) {
	var body bytes.Buffer
	if err := json.NewEncoder(&body).Encode(v); err != nil {
		return nil, fmt.Errorf("encode answer: %w", err)
	}
	return body.Bytes(), nil
}

// writeBody answers with JSON.
func writeBody(c echo.Context, cache string, body []byte) error {
	tag := ""
	if c.Request().Method != http.MethodPost {
		tag = string(etag(body))
	}
	return blob(c, echo.MIMEApplicationJSON, cache, tag, body)
}
