package ct

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"strconv"

	ct "github.com/google/certificate-transparency-go"
	"github.com/google/certificate-transparency-go/tls"
	"github.com/labstack/echo/v4"

	"github.com/chancery-ca/chancery/log/tree"
)

// getSTH serves the newest signed tree head (RFC 6962, Section 4.3).
func (l *Log) getSTH(c echo.Context) error {
	signed, err := l.latest()
	if err != nil {
		return err
	}
	ms, err := milliseconds(signed.Head)
	if err != nil {
		return err
	}
	signature, err := tls.Marshal(digitallySigned(signed.Signature))
	if err != nil {
		return fmt.Errorf("encode tree head: %w", err)
	}
	return writeJSON(c, cacheNever, ct.GetSTHResponse{
		TreeSize:          signed.Size,
		Timestamp:         ms,
		SHA256RootHash:    signed.Root[:],
		TreeHeadSignature: signature,
	})
}

// getConsistency serves RFC 6962, Section 4.4. Both sizes must be of published
// heads; ctfe answers first = 0 with an empty proof to any second.
func (l *Log) getConsistency(c echo.Context) error {
	first, err := number(c, "first")
	if err != nil {
		return err
	}
	second, err := number(c, "second")
	if err != nil {
		return err
	}
	signed, err := l.latest()
	switch {
	case err != nil:
		return err
	case first > second:
		return badRequest("first is greater than second")
	case second > signed.Size:
		return badRequest("second is beyond the newest tree head, %d", signed.Size)
	}
	proof, err := l.cfg.Tree.ConsistencyProof(c.Request().Context(), first, second)
	if err != nil {
		return fmt.Errorf("prove consistency: %w", err)
	}
	return writeJSON(c, cacheDay, ct.GetSTHConsistencyResponse{Consistency: octets(proof)})
}

// getProofByHash serves RFC 6962, Section 4.5.
func (l *Log) getProofByHash(c echo.Context) error {
	hash, err := base64.StdEncoding.DecodeString(c.QueryParam("hash"))
	if err != nil || len(hash) != tree.HashSize {
		return badRequest("hash is not the base64 of 32 octets")
	}
	size, err := number(c, "tree_size")
	if err != nil {
		return err
	}
	if size == 0 {
		return badRequest("tree_size is 0")
	}
	signed, err := l.latest()
	if err != nil {
		return err
	}
	if size > signed.Size {
		return notFound("tree_size is beyond the newest tree head")
	}
	ctx := c.Request().Context()
	entry, err := l.cfg.Tree.ByLeafHash(ctx, tree.Hash(hash))
	if err != nil {
		return fmt.Errorf("find leaf: %w", err)
	}
	if entry.Index >= size {
		return notFound("not in the tree of this size")
	}
	proof, err := l.cfg.Tree.InclusionProof(ctx, entry.Index, size)
	if err != nil {
		return fmt.Errorf("prove inclusion: %w", err)
	}
	return writeJSON(c, cacheDay, ct.GetProofByHashResponse{
		LeafIndex: int64(entry.Index),
		AuditPath: octets(proof),
	})
}

// getEntries serves RFC 6962, Section 4.6. An answer has at most 256 entries,
// and a request for more is cut at the next multiple of 256, so that readers
// fall into step and share caches.
func (l *Log) getEntries(c echo.Context) error {
	start, err := number(c, "start")
	if err != nil {
		return err
	}
	end, err := number(c, "end")
	if err != nil {
		return err
	}
	signed, err := l.latest()
	switch {
	case err != nil:
		return err
	case start > end:
		return badRequest("start is greater than end")
	case start >= signed.Size:
		return badRequest("start is beyond the newest tree head, %d", signed.Size)
	}
	wanted := end - start + 1
	if wanted >= maxEntries {
		wanted = maxEntries - start%maxEntries
	}
	count := min(wanted, signed.Size-start)
	cache := cacheDay
	if count < wanted {
		cache = cacheMinute
	}
	return l.reads.Serve(func() ([]byte, error) {
		answer := ct.GetEntriesResponse{Entries: make([]ct.LeafEntry, 0, count)}
		err := l.entries(c.Request().Context(), start, count, maxEntryOctets, func(e tree.Entry, data []byte) error {
			answer.Entries = append(answer.Entries, ct.LeafEntry{LeafInput: e.Value, ExtraData: data})
			return nil
		})
		if err != nil {
			return nil, err
		}
		if uint64(len(answer.Entries)) < count {
			cache = cacheMinute
		}
		return encodeJSON(answer)
	}, func(body []byte) error { return writeBody(c, cache, body) })
}

// entries calls yield for count entries from start on, with their extra_data;
// it ends early when more than limit octets were read (0: no limit).
func (l *Log) entries(ctx context.Context, start, count uint64, limit int, yield func(e tree.Entry, data []byte) error) error {
	read := 0
	for count > 0 && (limit == 0 || read < limit) {
		page, err := l.cfg.Tree.Entries(ctx, start, min(count, entryPage))
		if err != nil {
			return fmt.Errorf("read entries: %w", err)
		}
		if len(page) == 0 || uint64(len(page)) > count || page[0].Index != start {
			return fmt.Errorf("read entries: the tree gave %d entries for %d from %d", len(page), count, start)
		}
		for _, e := range page {
			_, data, err := splitExtra(e.Extra)
			if err != nil {
				return fmt.Errorf("read entry %d: %w", e.Index, err)
			}
			read += len(e.Value) + len(data)
			if err := yield(e, data); err != nil {
				return err
			}
		}
		start += uint64(len(page))
		count -= uint64(len(page))
	}
	return nil
}

// getRoots serves RFC 6962, Section 4.7, from memory.
func (l *Log) getRoots(c echo.Context) error {
	return blob(c, echo.MIMEApplicationJSON, cacheMinute, string(l.answer.rootsTag), l.answer.roots)
}

// getEntryAndProof serves RFC 6962, Section 4.8.
func (l *Log) getEntryAndProof(c echo.Context) error {
	index, err := number(c, "leaf_index")
	if err != nil {
		return err
	}
	size, err := number(c, "tree_size")
	if err != nil {
		return err
	}
	signed, err := l.latest()
	switch {
	case err != nil:
		return err
	case index >= size:
		return badRequest("leaf_index is not below tree_size")
	case size > signed.Size:
		return badRequest("tree_size is beyond the newest tree head, %d", signed.Size)
	}
	ctx := c.Request().Context()
	proof, err := l.cfg.Tree.InclusionProof(ctx, index, size)
	if err != nil {
		return fmt.Errorf("prove inclusion: %w", err)
	}
	answer := ct.GetEntryAndProofResponse{AuditPath: octets(proof)}
	err = l.entries(ctx, index, 1, 0, func(e tree.Entry, data []byte) error {
		answer.LeafInput, answer.ExtraData = e.Value, data
		return nil
	})
	if err != nil {
		return err
	}
	return writeJSON(c, cacheDay, answer)
}

// getTile serves /tile/<L>/<N>[.p/<W>] and /tile/data/<N>[.p/<W>].
func (l *Log) getTile(c echo.Context) error {
	path := c.Param("*")
	p, err := tree.ParseTilePath(path, "data")
	if err != nil {
		return &failure{status: http.StatusBadRequest, public: "not a tile path", err: err}
	}
	signed, err := l.latest()
	if err != nil {
		return err
	}
	if !p.In(signed.Size) {
		return notFound("the newest tree head does not cover this tile")
	}
	cache := cacheForever
	if !p.Full() {
		cache = cacheDay
	}
	ctx := c.Request().Context()
	write := func(data []byte) error {
		return blob(c, echo.MIMEOctetStream, cache, fmt.Sprintf(`"%x-%s"`, l.logID[:8], path), data)
	}
	if p.Entries {
		return l.reads.Serve(func() ([]byte, error) { return l.dataTile(ctx, p) }, write)
	}
	data, err := l.cfg.Tree.Tile(ctx, p.Level, p.Index, p.Width)
	if err != nil {
		return fmt.Errorf("read tile: %w", err)
	}
	return write(data)
}

// dataTile builds an entry bundle.
func (l *Log) dataTile(ctx context.Context, p tree.TilePath) ([]byte, error) {
	var out []byte
	err := l.entries(ctx, p.Index*tree.TileWidth, uint64(p.Width), 0, func(e tree.Entry, data []byte) error {
		leaf, err := l.tileLeaf(e.Value, data)
		if err != nil {
			return fmt.Errorf("read entry %d: %w", e.Index, err)
		}
		out = append(out, leaf...)
		return nil
	})
	return out, err
}

// tileLeaf encodes an entry and remembers its issuers for /issuer.
func (l *Log) tileLeaf(value, data []byte) ([]byte, error) { return tileLeaf(value, data, l.learn) }

// number reads a query parameter as RFC 6962 clients write it: decimal digits,
// at most 2^63 − 1.
func number(c echo.Context, name string) (uint64, error) {
	n, err := strconv.ParseInt(c.QueryParam(name), 10, 64)
	if err != nil || n < 0 {
		return 0, badRequest("%s is not a number from 0 to 2^63-1", name)
	}
	return uint64(n), nil
}

// octets gives a proof the shape that encodes as a list of base64 strings,
// never as null.
func octets(proof []tree.Hash) [][]byte {
	out := make([][]byte, len(proof))
	for i := range proof {
		out[i] = proof[i][:]
	}
	return out
}
