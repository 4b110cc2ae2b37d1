package ct_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"testing"

	rfc6962ct "github.com/google/certificate-transparency-go"
	"github.com/google/certificate-transparency-go/tls"
	"github.com/google/go-cmp/cmp"
	f_note "github.com/transparency-dev/formats/note"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api/layout"
	"github.com/transparency-dev/tessera/client"
	"github.com/transparency-dev/tessera/fsck"
	"golang.org/x/mod/sumdb/note"
)

// The log under the eyes of Tessera's client and fsck, with the note verifier
// of transparency-dev/formats. Of this module they use one function, which
// reads TileLeaf structures (tileHashes).

// tileFetcher is Tessera's HTTP fetcher; the entries of a CT log are at
// /tile/data (C2SP static-ct-api), not at /tile/entries.
type tileFetcher struct {
	*client.HTTPFetcher
	f     *fixture
	spoil func(path string, body []byte) []byte // nil: nothing
}

func newTileFetcher(t testing.TB, f *fixture) tileFetcher {
	t.Helper()
	root, err := url.Parse(f.url("/"))
	if err != nil {
		t.Fatal(err)
	}
	fetcher, err := client.NewHTTPFetcher(root, f.srv.Client())
	if err != nil {
		t.Fatal(err)
	}
	return tileFetcher{HTTPFetcher: fetcher, f: f}
}

// ReadTile fetches a tile of hashes.
func (r tileFetcher) ReadTile(ctx context.Context, level, index uint64, p uint8) ([]byte, error) {
	data, err := r.HTTPFetcher.ReadTile(ctx, level, index, p)
	return r.spoiled(layout.TilePath(level, index, p), data), err
}

// ReadEntryBundle fetches a data tile.
func (r tileFetcher) ReadEntryBundle(ctx context.Context, index uint64, p uint8) ([]byte, error) {
	path := "/" + strings.Replace(layout.EntriesPath(index, p), "/entries/", "/data/", 1)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.f.url(path), nil)
	if err != nil {
		return nil, err
	}
	resp, err := r.f.srv.Client().Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound:
		return nil, fmt.Errorf("%s: %w", path, os.ErrNotExist)
	default:
		return nil, fmt.Errorf("%s: status %d", path, resp.StatusCode)
	}
	data, err := io.ReadAll(resp.Body)
	return r.spoiled(path[1:], data), err
}

func (r tileFetcher) spoiled(path string, data []byte) []byte {
	if r.spoil == nil {
		return data
	}
	return r.spoil(path, bytes.Clone(data))
}

// tileHashes gives the leaf hashes of a data tile: the bundle hasher for our
// layout, TileLeaf of static-ct-api whose extensions are empty.
func tileHashes(data []byte) (hashes [][]byte, err error) {
	for len(data) > 0 {
		leaf, _, rest, err := splitTileLeaf(data)
		if err != nil {
			return nil, err
		}
		hashes = append(hashes, rfc6962.DefaultHasher.HashLeaf(leaf))
		data = rest
	}
	return hashes, nil
}

// splitTileLeaf reads one TileLeaf: the MerkleTreeLeaf that it stands for, and
// the fingerprints of its chain.
func splitTileLeaf(data []byte) (leaf []byte, issuers [][32]byte, rest []byte, err error) {
	var entry rfc6962ct.TimestampedEntry
	if rest, err = tls.Unmarshal(data, &entry); err != nil {
		return nil, nil, nil, fmt.Errorf("read timestamped entry: %w", err)
	}
	if len(entry.Extensions) != 0 {
		return nil, nil, nil, errors.New("the entry has extensions")
	}
	leaf = append([]byte{0, 0}, data[:len(data)-len(rest)]...) // v1, timestamped_entry
	if entry.EntryType == rfc6962ct.PrecertLogEntryType {
		var precert rfc6962ct.ASN1Cert
		if rest, err = tls.Unmarshal(rest, &precert); err != nil {
			return nil, nil, nil, fmt.Errorf("read precertificate: %w", err)
		}
	}
	var chain struct {
		Fingerprints [][32]byte `tls:"minlen:0,maxlen:65535"`
	}
	if rest, err = tls.Unmarshal(rest, &chain); err != nil {
		return nil, nil, nil, fmt.Errorf("read fingerprints: %w", err)
	}
	return leaf, chain.Fingerprints, rest, nil
}

// noteVerifier is that of transparency-dev/formats for the log's key.
func noteVerifier(t testing.TB, f *fixture) note.Verifier {
	t.Helper()
	vkey, err := f_note.RFC6962VerifierString("https://"+testOrigin+"/", f.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := f_note.NewRFC6962Verifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	return verifier
}

// mixed logs certificates and precertificates, so that both forms of entry are
// in the data tiles, until the published tree has size leaves.
func (f *fixture) mixed(t testing.TB, size int) {
	t.Helper()
	for path, chain := range map[string][][]byte{
		"/ct/v1/add-chain":     f.chain(f.leaf(t)),
		"/ct/v1/add-pre-chain": f.chain(f.leaf(t, poison))[:2],
	} {
		if resp, body := f.post(t, path, chainBody(t, chain...)); resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %d %q", path, resp.StatusCode, body)
		}
	}
	f.fill(t, size-int(f.tree.Root().Size))
	f.publish(t)
}

// TestTesseraFsck: every entry, tile and the root, at sizes around the edges
// of tiles.
func TestTesseraFsck(t *testing.T) {
	f := newFixture(t)
	verifier := noteVerifier(t, f)
	for _, size := range []int{2, 255, 256, 257, 520} {
		f.mixed(t, size)
		check := fsck.New(testOrigin, verifier, newTileFetcher(t, f), tileHashes, fsck.Opts{N: 2})
		if err := check.Check(t.Context()); err != nil {
			t.Errorf("size %d: %v", size, err)
		}
	}
}

// TestTesseraFsckSeesDamage: the check above can fail.
func TestTesseraFsckSeesDamage(t *testing.T) {
	f := newFixture(t)
	f.mixed(t, 300)
	for _, tc := range []struct{ name, path string }{
		{"entries", "tile/data/000"},
		{"leaf hashes", "tile/0/001.p/44"},
		{"inner hashes", "tile/1/000.p/1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fetcher, hit := newTileFetcher(t, f), false
			fetcher.spoil = func(path string, body []byte) []byte {
				if path == tc.path && len(body) > 20 {
					hit = true
					body[20] ^= 1
				}
				return body
			}
			// Several workers: fsck waits for ever when the only one has failed.
			err := fsck.New(testOrigin, noteVerifier(t, f), fetcher, tileHashes, fsck.Opts{N: 8}).Check(t.Context())
			if err == nil || !hit {
				t.Errorf("flipped bit in %s (fetched: %v): %v", tc.path, hit, err)
			}
		})
	}
}

// TestTesseraClient follows the log as a monitor does: each new checkpoint is
// proved, from tiles alone, to contain the one before, and every entry to be
// in it.
func TestTesseraClient(t *testing.T) {
	f := newFixture(t)
	f.mixed(t, 100)
	ctx, fetcher, verifier := t.Context(), newTileFetcher(t, f), noteVerifier(t, f)
	tracker, err := client.NewLogStateTracker(ctx, fetcher.ReadTile, nil, verifier, testOrigin, client.UnilateralConsensus(fetcher.ReadCheckpoint))
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []uint64{100, 256, 300} {
		if size > 100 {
			f.mixed(t, int(size))
			if _, _, _, err := tracker.Update(ctx); err != nil {
				t.Fatalf("update to size %d: %v", size, err)
			}
		}
		latest := tracker.Latest()
		if latest.Size != size {
			t.Fatalf("checkpoint of size %d, want %d", latest.Size, size)
		}
		builder, err := client.NewProofBuilder(ctx, size, fetcher.ReadTile)
		if err != nil {
			t.Fatal(err)
		}
		hashes, err := client.FetchLeafHashes(ctx, fetcher.ReadTile, 0, size, size)
		if err != nil {
			t.Fatal(err)
		}
		for _, index := range []uint64{0, 1, size / 2, size - 1} {
			path, err := builder.InclusionProof(ctx, index)
			if err != nil {
				t.Fatal(err)
			}
			if err := proof.VerifyInclusion(rfc6962.DefaultHasher, index, size, hashes[index], path, latest.Hash); err != nil {
				t.Errorf("entry %d of %d: %v", index, size, err)
			}
			// The proof of RFC 6962, Section 4.5 is the same.
			rfc, err := f.client(t).GetProofByHash(ctx, hashes[index], size)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(path, rfc.AuditPath); d != "" || rfc.LeafIndex != int64(index) {
				t.Errorf("entry %d of %d: get-proof-by-hash differs from the tiles: %s", index, size, d)
			}
		}
	}
}

// TestTileIssuers: the fingerprints in the data tiles lead to the certificates.
func TestTileIssuers(t *testing.T) {
	f := newFixture(t)
	f.mixed(t, 10)
	_, data := f.get(t, "/tile/data/000.p/10")
	kinds := map[int]int{}
	for len(data) > 0 {
		_, issuers, rest, err := splitTileLeaf(data)
		if err != nil {
			t.Fatal(err)
		}
		for _, fp := range issuers {
			resp, der := f.get(t, "/issuer/"+hex.EncodeToString(fp[:]))
			if resp.StatusCode != http.StatusOK || sha256.Sum256(der) != fp {
				t.Errorf("issuer %x: %d", fp, resp.StatusCode)
			}
		}
		kinds[len(issuers)]++
		data = rest
	}
	if kinds[2] != 10 {
		t.Errorf("chains by length: %v, want 10 of issuer and root", kinds)
	}
}
