package ct_test

import (
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"testing"
)

// TestEveryReadMayBeCached: each read has an entity tag and says how long it
// lives; a client that has it gets 304 and nothing more; HEAD answers as GET.
func TestEveryReadMayBeCached(t *testing.T) {
	f := newFixture(t)
	f.fill(t, 300)
	f.publish(t)
	hash := leaf(t, f)
	issuer := sha256.Sum256(f.issuer.Raw)
	const (
		forever = "public, max-age=31536000, immutable"
		day     = "public, max-age=86400"
		minute  = "public, max-age=60"
		asks    = "no-cache" // kept, and asked for each time
	)
	rows := []struct {
		path, cache string
		grows       bool // another answer when the tree has grown
	}{
		{"/ct/v1/get-sth", asks, true},
		{"/checkpoint", asks, true},
		{"/ct/v1/get-roots", minute, false},
		{"/ct/v1/get-sth-consistency?first=1&second=300", day, false},
		{"/ct/v1/get-proof-by-hash?tree_size=300&hash=" + hash, day, false},
		{"/ct/v1/get-entry-and-proof?leaf_index=5&tree_size=300", day, false},
		{"/ct/v1/get-entries?start=0&end=10", day, false},
		{"/ct/v1/get-entries?start=290&end=310", minute, true},
		{"/tile/0/000", forever, false},
		{"/tile/0/001.p/44", day, false},
		{"/tile/1/000.p/1", day, false},
		{"/tile/data/000", forever, false},
		{"/tile/data/001.p/44", day, false},
		{"/issuer/" + hex.EncodeToString(issuer[:]), forever, false},
	}
	tags := map[string]string{}
	for _, row := range rows {
		t.Run(row.path, func(t *testing.T) {
			resp, body := f.get(t, row.path)
			tag := resp.Header.Get("ETag")
			if resp.StatusCode != http.StatusOK || len(body) == 0 || tag == "" || resp.Header.Get("Cache-Control") != row.cache {
				t.Fatalf("%d, %d octets, tag %s, %q; want %q", resp.StatusCode, len(body), tag, resp.Header.Get("Cache-Control"), row.cache)
			}
			if other, ok := tags[tag]; ok {
				t.Errorf("%s has the same tag", other)
			}
			tags[tag] = row.path
			again, body := f.get(t, row.path, tag)
			if again.StatusCode != http.StatusNotModified || len(body) != 0 || again.Header.Get("ETag") != tag || again.Header.Get("Cache-Control") != row.cache {
				t.Errorf("a client that has it: %d, %d octets, %v", again.StatusCode, len(body), again.Header)
			}
			head := exchange(t, f.srv.Client(), http.MethodHead, f.url(row.path), nil)
			if head.status != http.StatusOK || head.cache != row.cache || len(head.body) != 0 {
				t.Errorf("HEAD: %d %q, %d octets", head.status, head.cache, len(head.body))
			}
		})
	}
	f.fill(t, 11)
	f.publish(t)
	for _, row := range rows {
		resp, _ := f.get(t, row.path)
		if same := tags[resp.Header.Get("ETag")] == row.path; same == row.grows {
			t.Errorf("%s: tag unchanged by a larger tree: %v", row.path, same)
		}
	}
	resp, _ := f.post(t, "/ct/v1/add-pre-chain", chainBody(t, f.chain(f.leaf(t, poison))...))
	if resp.Header.Get("ETag") != "" || resp.Header.Get("Cache-Control") != "no-store" {
		t.Errorf("a submission may be cached: %v", resp.Header)
	}
}
