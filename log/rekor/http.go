package rekor

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"github.com/labstack/echo/v4"
	"google.golang.org/grpc/codes"

	"github.com/chancery-ca/chancery/log/tree"
)

// Cache-Control values. What is addressed by index and width never changes.
const (
	cacheForever = "public, max-age=31536000, immutable"
	cacheMinute  = "public, max-age=60"
	cacheNever   = "no-cache"
)

const frozenSentence = "This log has been frozen, please switch to the latest log."

// Register adds the log's routes under g: POST /api/v2/log/entries and the
// C2SP tlog-tiles reads /api/v2/checkpoint and /api/v2/tile/….
func (l *Log) Register(g *echo.Group) {
	g.POST("/api/v2/log/entries", l.serve("entries", l.postEntry))
	l.RegisterReads(g)
}

// RegisterReads adds the reads alone, for a second prefix of the same log.
func (l *Log) RegisterReads(g *echo.Group) {
	checkpoint, tile := l.serve("checkpoint", l.getCheckpoint), l.serve("tile", l.getTile)
	g.GET("/api/v2/checkpoint", checkpoint)
	g.HEAD("/api/v2/checkpoint", checkpoint)
	g.GET("/api/v2/tile/*", tile)
	g.HEAD("/api/v2/tile/*", tile)
}

// serve turns the errors of a handler into answers: the JSON of a
// google.rpc.Status, as the gRPC gateway of rekor-tiles writes it.
func (l *Log) serve(name string, h echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		err := h(c)
		if err == nil || c.Response().Committed {
			return err
		}
		f := classify(err)
		ctx := c.Request().Context()
		if f.status >= http.StatusInternalServerError {
			l.cfg.Logger.ErrorContext(ctx, "request failed", "endpoint", name, "status", f.status, "error", err)
		} else {
			l.cfg.Logger.WarnContext(ctx, "request refused", "endpoint", name, "status", f.status, "error", err)
		}
		header := c.Response().Header()
		header.Set("Cache-Control", "no-store")
		if f.index != "" {
			header.Set("X-Log-Index", f.index)
		}
		if f.status == http.StatusServiceUnavailable || f.status == http.StatusTooManyRequests {
			header.Set("Retry-After", "1")
		}
		return c.JSON(f.status, struct {
			Code    codes.Code `json:"code"`
			Message string     `json:"message"`
			Details []struct{} `json:"details"`
		}{f.code, f.message, []struct{}{}})
	}
}

// postEntry serves dev.sigstore.rekor.v2.Rekor/CreateEntry over HTTP.
func (l *Log) postEntry(c echo.Context) error {
	if l.cfg.Frozen {
		c.Response().Header().Set("Allow", "")
		return c.String(http.StatusMethodNotAllowed, frozenSentence+"\n")
	}
	now, err := l.cfg.Now()
	if err != nil {
		return &failure{codes.Unavailable, http.StatusServiceUnavailable, "the log is not available now; retry", "", err}
	}
	if !l.rates.allow(l.cfg.Client(c.Request()), now) {
		return &failure{code: codes.ResourceExhausted, status: http.StatusTooManyRequests, message: "too many entries from this client; retry later"}
	}
	release, err := l.enter(c.Request())
	if err != nil {
		return err
	}
	defer release()
	body, err := readBody(c)
	if err != nil {
		return err
	}
	e, err := parse(body)
	if err != nil {
		return err
	}
	r, err := l.add(c.Request().Context(), e, now)
	if err != nil {
		return err
	}
	return l.writeReceipt(c, r)
}

// enter takes a slot, and one of the few for large bodies if this may be one.
func (l *Log) enter(r *http.Request) (release func(), err error) {
	full := &failure{code: codes.Unavailable, status: http.StatusServiceUnavailable, message: "reached max pushback; retry"}
	select {
	case l.small <- struct{}{}:
	default:
		return nil, full
	}
	if r.ContentLength >= 0 && r.ContentLength <= smallBody {
		return func() { <-l.small }, nil
	}
	select {
	case l.large <- struct{}{}:
		return func() { <-l.large; <-l.small }, nil
	default:
		<-l.small
		return nil, full
	}
}

func readBody(c echo.Context) ([]byte, error) {
	var body bytes.Buffer
	if n := c.Request().ContentLength; n > 0 && n <= smallBody {
		body.Grow(int(n) + bytes.MinRead)
	}
	_, err := body.ReadFrom(http.MaxBytesReader(c.Response(), c.Request().Body, maxBody))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, &failure{code: codes.InvalidArgument, status: http.StatusRequestEntityTooLarge, message: "the request is larger than " + strconv.Itoa(maxBody) + " octets"}
	case errors.Is(err, context.Canceled):
		return nil, err
	case err != nil && !errors.Is(err, io.EOF):
		return nil, &failure{codes.InvalidArgument, http.StatusBadRequest, "the request could not be read", "", err}
	}
	return body.Bytes(), nil
}

// transparencyLogEntry is the protobuf JSON of a TransparencyLogEntry with its
// unpopulated fields, as rekor-tiles answers. 64-bit numbers are strings.
type transparencyLogEntry struct {
	LogIndex          string         `json:"logIndex"`
	LogID             logID          `json:"logId"`
	KindVersion       kindVersion    `json:"kindVersion"`
	IntegratedTime    string         `json:"integratedTime"`
	InclusionPromise  *struct{}      `json:"inclusionPromise"`
	InclusionProof    inclusionProof `json:"inclusionProof"`
	CanonicalizedBody []byte         `json:"canonicalizedBody"`
}

type logID struct {
	KeyID []byte `json:"keyId"`
}

type kindVersion struct {
	Kind    string `json:"kind"`
	Version string `json:"version"`
}

type inclusionProof struct {
	LogIndex   string     `json:"logIndex"`
	RootHash   []byte     `json:"rootHash"`
	TreeSize   string     `json:"treeSize"`
	Hashes     [][]byte   `json:"hashes"`
	Checkpoint checkpoint `json:"checkpoint"`
}

type checkpoint struct {
	Envelope string `json:"envelope"`
}

// writeReceipt answers 201: some clients take no other success.
func (l *Log) writeReceipt(c echo.Context, r *receipt) error {
	index := strconv.FormatUint(r.index, 10)
	hashes := make([][]byte, len(r.proof))
	for i := range r.proof {
		hashes[i] = r.proof[i][:]
	}
	body, err := json.Marshal(&transparencyLogEntry{
		LogIndex:       index,
		LogID:          logID{l.logID[:]},
		KindVersion:    kindVersion{"hashedrekord", "0.0.2"},
		IntegratedTime: "0",
		InclusionProof: inclusionProof{
			LogIndex:   index,
			RootHash:   r.head.Root[:],
			TreeSize:   strconv.FormatUint(r.head.Size, 10),
			Hashes:     hashes,
			Checkpoint: checkpoint{string(r.head.Note)},
		},
		CanonicalizedBody: r.leaf,
	})
	if err != nil {
		return fmt.Errorf("encode answer: %w", err)
	}
	c.Response().Header().Set("Cache-Control", "no-store")
	return c.Blob(http.StatusCreated, echo.MIMEApplicationJSON, body)
}

// getCheckpoint serves the newest published head.
func (l *Log) getCheckpoint(c echo.Context) error {
	note := l.cfg.Heads.Latest().Note
	if len(note) == 0 {
		return &failure{codes.Unavailable, http.StatusServiceUnavailable, "the log has no checkpoint yet; retry", "", l.cfg.Heads.Err()}
	}
	sum := sha256.Sum256(note)
	return blob(c, "text/plain; charset=utf-8", cacheNever, `"`+base64.RawURLEncoding.EncodeToString(sum[:16])+`"`, note)
}

// getTile serves tile/<L>/<N>[.p/<W>] and tile/entries/<N>[.p/<W>] as far as
// the newest checkpoint covers them.
func (l *Log) getTile(c echo.Context) error {
	path := c.Param("*")
	p, err := tree.ParseTilePath(path, "entries")
	if err != nil {
		return &failure{codes.InvalidArgument, http.StatusBadRequest, "not a tile path", "", err}
	}
	if !p.In(l.cfg.Heads.Latest().Size) {
		return &failure{code: codes.NotFound, status: http.StatusNotFound, message: "the newest checkpoint does not cover this tile"}
	}
	cache := cacheForever
	if !p.Full() {
		cache = cacheMinute
	}
	ctx := c.Request().Context()
	write := func(data []byte) error {
		return blob(c, echo.MIMEOctetStream, cache, fmt.Sprintf(`"%x-%s"`, l.logID[:8], path), data)
	}
	if p.Entries {
		return l.reads.Serve(func() ([]byte, error) { return l.bundle(ctx, p) }, write)
	}
	data, err := l.cfg.Tree.Tile(ctx, p.Level, p.Index, p.Width)
	if err != nil {
		return fmt.Errorf("read tile: %w", err)
	}
	return write(data)
}

// Bundle returns what /tile/entries/… serves for consecutive entries, an entry
// bundle of C2SP tlog-tiles: for each entry its length as a uint16 and its
// octets.
func Bundle(entries []tree.Entry) ([]byte, error) {
	var out []byte
	for _, e := range entries {
		if len(e.Value) > maxEntry {
			return nil, fmt.Errorf("entry %d has %d octets", e.Index, len(e.Value))
		}
		out = binary.BigEndian.AppendUint16(out, uint16(len(e.Value)))
		out = append(out, e.Value...)
	}
	return out, nil
}

// bundle reads and encodes the entries of a path.
func (l *Log) bundle(ctx context.Context, p tree.TilePath) ([]byte, error) {
	next, count := p.Index*tree.TileWidth, uint64(p.Width)
	var out []byte
	for count > 0 {
		entries, err := l.cfg.Tree.Entries(ctx, next, count)
		if err != nil {
			return nil, err
		}
		if len(entries) == 0 || uint64(len(entries)) > count {
			return nil, fmt.Errorf("the tree gave %d entries for %d", len(entries), count)
		}
		if entries[0].Index != next {
			return nil, fmt.Errorf("entry %d at %d", entries[0].Index, next)
		}
		part, err := Bundle(entries)
		if err != nil {
			return nil, err
		}
		out = append(out, part...)
		next += uint64(len(entries))
		count -= uint64(len(entries))
	}
	return out, nil
}

// blob answers with body, or 304 if the client has it.
func blob(c echo.Context, contentType, cache, tag string, body []byte) error {
	header := c.Response().Header()
	header.Set("Cache-Control", cache)
	header.Set("ETag", tag)
	for _, t := range strings.Split(c.Request().Header.Get("If-None-Match"), ",") {
		if t = strings.TrimPrefix(strings.TrimSpace(t), "W/"); t == tag || t == "*" {
			return c.NoContent(http.StatusNotModified)
		}
	}
	return c.Blob(http.StatusOK, contentType, body)
}
