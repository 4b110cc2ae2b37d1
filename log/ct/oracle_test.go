package ct_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	rfc6962ct "github.com/google/certificate-transparency-go"
	"github.com/google/certificate-transparency-go/ctutil"
	"github.com/google/go-cmp/cmp"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/ct"
	"github.com/chancery-ca/chancery/log/ct/cttest"
)

// pair is our log and ctfe, the oracle, side by side: the same roots, the same
// requests in the same order, and, because our clock is set to what ctfe has
// just answered, the same leaves. What follows from the tree must then be the
// same to the octet.
type pair struct {
	*fixture
	oracle *cttest.CTFE
	clock  atomic.Int64 // our time in ms; 0 is the wall clock's
}

func newPair(t testing.TB, opts cttest.Options, change ...func(*ct.Config)) *pair {
	t.Helper()
	p := new(pair)
	now := func(c *ct.Config) {
		c.Now = func() (time.Time, error) {
			if ms := p.clock.Load(); ms != 0 {
				return time.UnixMilli(ms), nil
			}
			return time.Now(), nil
		}
	}
	p.fixture = newFixture(t, append(change, now)...)
	p.oracle = cttest.New(t, []*x509.Certificate{p.root}, opts)
	return p
}

// reply is an answer without what differs by nature.
type reply struct {
	status int
	cache  string
	body   []byte
}

func exchange(t testing.TB, client *http.Client, method, url string, body []byte) reply {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	read, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return reply{resp.StatusCode, resp.Header.Get("Cache-Control"), read}
}

// both sends a request to the oracle and then to our log.
func (p *pair) both(t testing.TB, method, path string, body []byte) (ours, theirs reply) {
	t.Helper()
	theirs = exchange(t, p.oracle.Server.Client(), method, p.oracle.URL()+path, body)
	var sct struct{ Timestamp int64 }
	if method == http.MethodPost && theirs.status == http.StatusOK {
		if err := json.Unmarshal(theirs.body, &sct); err != nil {
			t.Fatalf("ctfe answers %q: %v", theirs.body, err)
		}
	}
	p.clock.Store(sct.Timestamp)
	return exchange(t, p.srv.Client(), method, p.url(path), body), theirs
}

// publishBoth makes both logs show what they have.
func (p *pair) publishBoth(t testing.TB) {
	t.Helper()
	p.oracle.Integrate(t)
	p.publish(t)
}

// submission is a row of the comparison.
type submission struct {
	name string
	pre  bool
	body []byte
	ours int // status
	// differs says why ctfe, whose status is then theirs, answers otherwise.
	theirs  int
	differs string
}

// submissions are those of chainCases and TestRefusedBodies, and good ones.
func submissions(t testing.TB, f *fixture) []submission {
	t.Helper()
	var rows []submission
	for _, c := range chainCases(t, f) {
		rows = append(rows, submission{name: c.name, pre: strings.Contains(c.path, "pre"), body: chainBody(t, c.chain...), ours: 400})
	}
	cert, precert := f.leaf(t), f.leaf(t, poison)
	text := func(s string) []byte { return []byte(s) }
	rows = append(rows,
		submission{name: "certificate", body: chainBody(t, f.chain(cert)...), ours: 200},
		submission{name: "certificate again", body: chainBody(t, f.chain(cert)...), ours: 200},
		submission{name: "certificate again, without its root", body: chainBody(t, f.chain(cert)[:2]...), ours: 200},
		submission{name: "precertificate", pre: true, body: chainBody(t, f.chain(precert)...), ours: 200},
		submission{name: "precertificate again", pre: true, body: chainBody(t, f.chain(precert)...), ours: 200},
		submission{name: "precertificate without its root", pre: true, body: chainBody(t, f.chain(f.leaf(t, poison))[:2]...), ours: 200},
		submission{name: "final certificate sent as a precertificate", pre: true, body: chainBody(t, f.chain(cert)...), ours: 400},
		submission{name: "expired", body: chainBody(t, f.chain(dated(t, f, notBefore.AddDate(-20, 0, 0)))...), ours: 200},
		submission{name: "not yet valid", body: chainBody(t, f.chain(dated(t, f, notBefore.AddDate(20, 0, 0)))...), ours: 200},
		submission{name: "an issuer as the leaf", body: chainBody(t, f.issuer.Raw, f.root.Raw), ours: 200},
		submission{name: "a root as the leaf", body: chainBody(t, f.root.Raw), ours: 200},
		submission{name: "signed by a preissuer", pre: true, body: chainBody(t, preissued(t, f)...), ours: 200},
		submission{name: "an unknown critical extension", body: chainBody(t, f.chain(f.leaf(t, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: asn1.NullBytes}))...), ours: 200},
		submission{name: "unknown fields in the JSON", body: bytes.Replace(chainBody(t, f.chain(f.leaf(t))...), text("{"), text(`{"more":[1],`), 1), ours: 200},
		submission{name: "field name in upper case", body: bytes.Replace(chainBody(t, f.chain(f.leaf(t))...), text(`"chain"`), text(`"CHAIN"`), 1), ours: 200},
		submission{name: "no body", ours: 400},
		submission{name: "not JSON", body: text("chain"), ours: 400},
		submission{name: "no chain", body: text("{}"), ours: 400},
		submission{name: "empty chain", body: text(`{"chain":[]}`), ours: 400},
		submission{name: "null chain", body: text(`{"chain":null}`), ours: 400},
		submission{name: "chain of numbers", body: text(`{"chain":[1,2]}`), ours: 400},
		submission{name: "not base64", body: text(`{"chain":["!!!!"]}`), ours: 400},
		submission{name: "trailing JSON", body: append(chainBody(t, f.chain(f.leaf(t))...), '{', '}'), ours: 400},
		submission{name: "1 MiB chain", pre: true, body: text(`{"chain":["` + strings.Repeat("A", 1<<20) + `"]}`), ours: 413},
		submission{name: "1 MiB of certificates", body: chainBody(t, slices.Repeat([][]byte{cert.Raw}, (1<<20)/len(cert.Raw))...), ours: 413},
	)
	return rows
}

// dated makes a leaf that begins to be valid at another time.
func dated(t testing.TB, f *fixture, start time.Time) *x509.Certificate {
	t.Helper()
	standard := notBefore
	notBefore = start
	defer func() { notBefore = standard }()
	return f.leaf(t)
}

// preissued is a precertificate by a Precertificate Signing Certificate (RFC
// 6962, Section 3.1), with its chain.
func preissued(t testing.TB, f *fixture) [][]byte {
	t.Helper()
	key := authKey(hsm.ECDSAP256)
	pre := f.make(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "preissuer"}, IsCA: true, BasicConstraintsValid: true,
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{{1, 3, 6, 1, 4, 1, 11129, 2, 4, 4}},
	}, f.issuer, key, f.issuerKey)
	leaf := f.make(t, &x509.Certificate{EmailAddresses: []string{"dev@test.example"}, ExtraExtensions: []pkix.Extension{poison}}, pre, f.leafKey, key)
	return [][]byte{leaf.Raw, pre.Raw, f.issuer.Raw, f.root.Raw}
}

func TestOracleSubmissions(t *testing.T) {
	p := newPair(t, cttest.Options{})
	for _, row := range submissions(t, p.fixture) {
		t.Run(row.name, func(t *testing.T) {
			p.submit(t, row)
		})
	}
	p.publishBoth(t)
	p.sameEntries(t)
}

// submit sends a row to both logs and compares statuses and SCTs.
func (p *pair) submit(t *testing.T, row submission) {
	t.Helper()
	path, kind := "/ct/v1/add-chain", rfc6962ct.X509LogEntryType
	if row.pre {
		path, kind = "/ct/v1/add-pre-chain", rfc6962ct.PrecertLogEntryType
	}
	ours, theirs := p.both(t, http.MethodPost, path, row.body)
	want := row.ours
	if row.differs != "" {
		want = row.theirs
	}
	if ours.status != row.ours || theirs.status != want {
		t.Fatalf("ours %d %.100q, want %d; ctfe %d %.100q, want %d (%s)", ours.status, ours.body, row.ours, theirs.status, theirs.body, want, row.differs)
	}
	if ours.status != http.StatusOK || row.differs != "" {
		return
	}
	if d := cmp.Diff(fields(t, theirs.body), fields(t, ours.body)); d != "" {
		t.Errorf("the answers have other fields: %s", d)
	}
	var a, b rfc6962ct.AddChainResponse
	for body, to := range map[*[]byte]*rfc6962ct.AddChainResponse{&ours.body: &a, &theirs.body: &b} {
		if err := json.Unmarshal(*body, to); err != nil {
			t.Fatal(err)
		}
	}
	p.verifySCT(t, "ours", a, p.key.Public().(*ecdsa.PublicKey), row.body, kind)
	p.verifySCT(t, "ctfe", b, p.oracle.Key, row.body, kind)
	a.ID, b.ID, a.Signature, b.Signature = nil, nil, nil, nil
	if d := cmp.Diff(b, a); d != "" {
		t.Errorf("SCT differs from ctfe's: %s", d)
	}
}

// fields names the members of a JSON object.
func fields(t testing.TB, body []byte) []string {
	t.Helper()
	var object map[string]any
	if err := json.Unmarshal(body, &object); err != nil {
		t.Fatalf("%.100q: %v", body, err)
	}
	var names []string
	for name := range object {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// verifySCT verifies an answer with certificate-transparency-go.
func (p *pair) verifySCT(t testing.TB, whose string, answer rfc6962ct.AddChainResponse, key *ecdsa.PublicKey, body []byte, kind rfc6962ct.LogEntryType) {
	t.Helper()
	sct, err := answer.ToSignedCertificateTimestamp()
	if err != nil {
		t.Errorf("%s: %v", whose, err)
		return
	}
	var sent rfc6962ct.AddChainRequest
	if err := json.Unmarshal(body, &sent); err != nil {
		t.Fatal(err)
	}
	if last := sent.Chain[len(sent.Chain)-1]; !bytes.Equal(last, p.root.Raw) {
		sent.Chain = append(sent.Chain, p.root.Raw)
	}
	chain := parseCT(t, sent.Chain...)
	leaf, err := rfc6962ct.MerkleTreeLeafFromChain(chain, kind, sct.Timestamp)
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := rfc6962ct.NewSignatureVerifier(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := verifier.VerifySCTSignature(*sct, rfc6962ct.LogEntry{Leaf: *leaf}); err != nil {
		t.Errorf("%s: SCT: %v", whose, err)
	}
	if len(chain) > 2 && len(chain[1].UnknownExtKeyUsage) == 0 { // ctutil knows no preissuers
		if err := ctutil.VerifySCT(key, chain, sct, false); err != nil {
			t.Errorf("%s: ctutil: %v", whose, err)
		}
	}
}

// sameEntries compares the trees: sizes, roots and every entry with its
// extra_data.
func (p *pair) sameEntries(t testing.TB) {
	t.Helper()
	sths := make([]rfc6962ct.GetSTHResponse, 2)
	ours, theirs := p.both(t, http.MethodGet, "/ct/v1/get-sth", nil)
	for i, r := range []reply{ours, theirs} {
		if err := json.Unmarshal(r.body, &sths[i]); err != nil {
			t.Fatalf("get-sth: %d %q: %v", r.status, r.body, err)
		}
		sth, err := sths[i].ToSignedTreeHead()
		if err != nil {
			t.Fatal(err)
		}
		key := []*ecdsa.PublicKey{p.key.Public().(*ecdsa.PublicKey), p.oracle.Key}[i]
		verifier, err := rfc6962ct.NewSignatureVerifier(key)
		if err != nil {
			t.Fatal(err)
		}
		if err := verifier.VerifySTHSignature(*sth); err != nil {
			t.Errorf("head %d: %v", i, err)
		}
	}
	if d := cmp.Diff(fields(t, theirs.body), fields(t, ours.body)); d != "" {
		t.Errorf("get-sth has other fields: %s", d)
	}
	if sths[0].TreeSize == 0 || sths[0].TreeSize != sths[1].TreeSize || !bytes.Equal(sths[0].SHA256RootHash, sths[1].SHA256RootHash) {
		t.Errorf("trees differ: ours %d %x, ctfe %d %x", sths[0].TreeSize, sths[0].SHA256RootHash, sths[1].TreeSize, sths[1].SHA256RootHash)
	}
	for start := uint64(0); start < sths[0].TreeSize; start += cttest.MaxGetEntries {
		ours, theirs := p.both(t, http.MethodGet, fmt.Sprintf("/ct/v1/get-entries?start=%d&end=%d", start, sths[0].TreeSize-1), nil)
		if d := cmp.Diff(decoded(t, theirs), decoded(t, ours)); d != "" {
			t.Errorf("entries from %d: %s", start, d)
		}
	}
}

// decoded is an answer's JSON value.
func decoded(t testing.TB, r reply) any {
	t.Helper()
	var v any
	if err := json.Unmarshal(r.body, &v); err != nil {
		t.Fatalf("%d %.100q: %v", r.status, r.body, err)
	}
	return v
}

// TestOracleExtKeyUsage: both logs take code signing certificates only.
func TestOracleExtKeyUsage(t *testing.T) {
	p := newPair(t, cttest.Options{ExtKeyUsages: []string{"CodeSigning"}}, func(c *ct.Config) {
		c.ExtKeyUsages = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}
	})
	with := func(usages ...x509.ExtKeyUsage) []byte {
		leaf := p.make(t, &x509.Certificate{EmailAddresses: []string{"dev@test.example"}, ExtKeyUsage: usages}, p.issuer, p.leafKey, p.issuerKey)
		return chainBody(t, p.chain(leaf)...)
	}
	for _, row := range []submission{
		{name: "code signing", body: with(x509.ExtKeyUsageCodeSigning), ours: 200},
		{name: "code signing and another", body: with(x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageCodeSigning), ours: 200},
		{name: "another", body: with(x509.ExtKeyUsageServerAuth), ours: 400},
		{name: "any", body: with(x509.ExtKeyUsageAny), ours: 400},
		{name: "none", body: with(), ours: 400},
	} {
		t.Run(row.name, func(t *testing.T) { p.submit(t, row) })
	}
	p.publishBoth(t)
	p.sameEntries(t)
}

// read is a row of the comparison of reads.
type read struct {
	name, path string
	ours       int
	theirs     int    // 0: as ours
	differs    string // why
}

// TestOracleReads: after the same 300 submissions every answer is the same,
// octets of proofs and entries included.
func TestOracleReads(t *testing.T) {
	const size = 300
	p := newPair(t, cttest.Options{})
	for i := range size {
		path, leaf := "/ct/v1/add-chain", p.leaf(t)
		if i%3 > 0 {
			path, leaf = "/ct/v1/add-pre-chain", p.leaf(t, poison)
		}
		ours, theirs := p.both(t, http.MethodPost, path, chainBody(t, p.chain(leaf)...))
		if ours.status != http.StatusOK || theirs.status != http.StatusOK {
			t.Fatalf("submission %d: %d and %d", i, ours.status, theirs.status)
		}
		if i == 99 { // an earlier head
			p.publishBoth(t)
		}
	}
	p.publishBoth(t)
	p.sameEntries(t)
	for _, row := range oracleReads(t, p, size) {
		t.Run(row.name, func(t *testing.T) { p.compareRead(t, row) })
	}
}

func (p *pair) compareRead(t *testing.T, row read) {
	t.Helper()
	ours, theirs := p.both(t, http.MethodGet, "/ct/v1/"+row.path, nil)
	want := row.theirs
	if want == 0 {
		want = row.ours
	}
	if ours.status != row.ours || theirs.status != want {
		t.Fatalf("ours %d %.100q, want %d; ctfe %d %.100q, want %d (%s)", ours.status, ours.body, row.ours, theirs.status, theirs.body, want, row.differs)
	}
	if (row.theirs != 0) != (row.differs != "") {
		t.Fatal("a difference needs its reason")
	}
	if ours.status != http.StatusOK || row.differs != "" {
		return
	}
	if d := cmp.Diff(decoded(t, theirs), decoded(t, ours)); d != "" {
		t.Errorf("ctfe answers otherwise: %s", d)
	}
	if theirs.cache != "" && theirs.cache != ours.cache {
		t.Errorf("ours may be cached as %q, ctfe's as %q", ours.cache, theirs.cache)
	}
}

func oracleReads(t testing.TB, p *pair, size int) []read {
	t.Helper()
	encode := func(hash []byte) string { return url.QueryEscape(base64.StdEncoding.EncodeToString(hash)) }
	entries, err := p.tree.Entries(t.Context(), 0, 1)
	if err != nil {
		t.Fatal(err)
	}
	first := encode(entries[0].LeafHash[:])
	last, err := p.tree.Entries(t.Context(), uint64(size-1), 1)
	if err != nil {
		t.Fatal(err)
	}
	unknown := encode(make([]byte, sha256.Size))
	rows := []read{
		{name: "roots", path: "get-roots", ours: 200},

		{name: "one entry", path: "get-entries?start=7&end=7", ours: 200},
		{name: "a tile of entries", path: "get-entries?start=0&end=255", ours: 200},
		{name: "entries across tiles", path: "get-entries?start=250&end=260", ours: 200},
		{name: "a million entries", path: "get-entries?start=0&end=999999", ours: 200},
		{name: "a million entries from within a tile", path: "get-entries?start=10&end=999999", ours: 200},
		{name: "entries past the end", path: "get-entries?start=290&end=310", ours: 200},
		{name: "the last entry", path: "get-entries?start=299&end=299", ours: 200},
		{name: "entries to 2^63-1", path: "get-entries?start=256&end=9223372036854775806", ours: 200},
		{name: "start > end", path: "get-entries?start=2&end=1", ours: 400},
		{name: "negative start", path: "get-entries?start=-1&end=1", ours: 400},
		{name: "negative end", path: "get-entries?start=0&end=-1", ours: 400},
		{name: "start beyond the tree", path: "get-entries?start=300&end=300", ours: 400},
		{name: "start far beyond the tree", path: "get-entries?start=1000000&end=2000000", ours: 400},
		{name: "start of 2^63", path: "get-entries?start=9223372036854775808&end=9223372036854775809", ours: 400},
		{name: "no start", path: "get-entries?end=1", ours: 400},
		{name: "no end", path: "get-entries?start=1", ours: 400},
		{name: "hexadecimal start", path: "get-entries?start=0x1&end=2", ours: 400},

		{name: "consistency with an earlier head", path: "get-sth-consistency?first=100&second=300", ours: 200},
		{name: "consistency with itself", path: "get-sth-consistency?first=300&second=300", ours: 200},
		{name: "consistency with nothing", path: "get-sth-consistency?first=0&second=300", ours: 200},
		{name: "consistency of nothing", path: "get-sth-consistency?first=0&second=0", ours: 200},
		{name: "consistency backwards", path: "get-sth-consistency?first=300&second=100", ours: 400},
		{name: "consistency beyond the tree", path: "get-sth-consistency?first=100&second=301", ours: 400},
		{name: "consistency from a negative size", path: "get-sth-consistency?first=-1&second=300", ours: 400},
		{name: "consistency without first", path: "get-sth-consistency?second=300", ours: 400},
		{name: "consistency without second", path: "get-sth-consistency?first=100", ours: 400},
		{name: "consistency of text", path: "get-sth-consistency?first=one&second=two", ours: 400},
		{name: "consistency of nothing with more than the tree", path: "get-sth-consistency?first=0&second=301", ours: 400, theirs: 200,
			differs: "ctfe does not look at second when first is 0, and so confirms a tree that does not exist"},

		{name: "proof of the first leaf", path: "get-proof-by-hash?tree_size=300&hash=" + first, ours: 200},
		{name: "proof in an earlier tree", path: "get-proof-by-hash?tree_size=100&hash=" + first, ours: 200},
		{name: "proof in a tree of one", path: "get-proof-by-hash?tree_size=1&hash=" + first, ours: 200},
		{name: "proof of the last leaf", path: "get-proof-by-hash?tree_size=300&hash=" + encode(last[0].LeafHash[:]), ours: 200},
		{name: "proof in a tree before the leaf", path: "get-proof-by-hash?tree_size=299&hash=" + encode(last[0].LeafHash[:]), ours: 404},
		{name: "proof of an unknown hash", path: "get-proof-by-hash?tree_size=300&hash=" + unknown, ours: 404},
		{name: "proof of 31 octets", path: "get-proof-by-hash?tree_size=300&hash=" + encode(make([]byte, 31)), ours: 400},
		{name: "proof of 33 octets", path: "get-proof-by-hash?tree_size=300&hash=" + encode(make([]byte, 33)), ours: 400},
		{name: "proof of no hash", path: "get-proof-by-hash?tree_size=300", ours: 400},
		{name: "proof of an empty hash", path: "get-proof-by-hash?tree_size=300&hash=", ours: 400},
		{name: "proof of text", path: "get-proof-by-hash?tree_size=300&hash=!!", ours: 400},
		{name: "proof beyond the tree", path: "get-proof-by-hash?tree_size=301&hash=" + first, ours: 404},
		{name: "proof in a tree of none", path: "get-proof-by-hash?tree_size=0&hash=" + first, ours: 400},
		{name: "proof in a negative tree", path: "get-proof-by-hash?tree_size=-1&hash=" + first, ours: 400},
		{name: "proof without a size", path: "get-proof-by-hash?hash=" + first, ours: 400},

		{name: "entry and proof", path: "get-entry-and-proof?leaf_index=17&tree_size=300", ours: 200},
		{name: "last entry and proof", path: "get-entry-and-proof?leaf_index=299&tree_size=300", ours: 200},
		{name: "entry and proof in an earlier tree", path: "get-entry-and-proof?leaf_index=17&tree_size=100", ours: 200},
		{name: "entry beyond its tree", path: "get-entry-and-proof?leaf_index=100&tree_size=100", ours: 400},
		{name: "entry and proof beyond the tree", path: "get-entry-and-proof?leaf_index=17&tree_size=301", ours: 400},
		{name: "entry of a negative index", path: "get-entry-and-proof?leaf_index=-1&tree_size=300", ours: 400},
		{name: "entry of no tree", path: "get-entry-and-proof?leaf_index=0&tree_size=0", ours: 400},
		{name: "entry without an index", path: "get-entry-and-proof?tree_size=300", ours: 400},
		{name: "entry without a size", path: "get-entry-and-proof?leaf_index=0", ours: 400},
	}
	return rows
}

// TestOracleDiffers: where a submission or a method is answered otherwise on
// purpose, and why.
func TestOracleDiffers(t *testing.T) {
	p := newPair(t, cttest.Options{})
	good := chainBody(t, p.chain(p.leaf(t))...)
	padded := append(bytes.Repeat([]byte(" "), 515_000), good...)
	for _, row := range []submission{
		{name: "12 certificates, each signed by the next", body: chainBody(t, deepChain(t, p.fixture, 12)...), ours: 400, theirs: 200,
			differs: "a chain of our CAs has three certificates; each more is a signature that anybody can make us verify"},
		{name: "a body of 515,000 octets", body: padded, ours: 200, theirs: 413,
			differs: "ours may have 512 KiB, ctfe's 512,000 octets by default"},
	} {
		t.Run(row.name, func(t *testing.T) { p.submit(t, row) })
	}
	t.Run("HEAD", func(t *testing.T) {
		// RFC 9110, Section 9.1: all general-purpose servers support GET and
		// HEAD. ctfe knows GET alone; caches ask with HEAD.
		ours, theirs := p.both(t, http.MethodHead, "/ct/v1/get-roots", nil)
		if ours.status != http.StatusOK || theirs.status != http.StatusMethodNotAllowed {
			t.Errorf("ours %d, ctfe %d", ours.status, theirs.status)
		}
	})
	for _, row := range []struct{ method, path string }{
		{http.MethodGet, "/ct/v1/add-chain"}, {http.MethodPost, "/ct/v1/get-sth"}, {http.MethodDelete, "/ct/v1/get-roots"},
	} {
		t.Run(row.method+" "+row.path, func(t *testing.T) {
			if ours, theirs := p.both(t, row.method, row.path, nil); ours.status != theirs.status || ours.status != http.StatusMethodNotAllowed {
				t.Errorf("ours %d, ctfe %d", ours.status, theirs.status)
			}
		})
	}
}

// deepChain is a chain of n certificates, leaf first and root last.
func deepChain(t testing.TB, f *fixture, n int) [][]byte {
	t.Helper()
	chain := [][]byte{f.root.Raw}
	parent, parentKey := f.root, f.rootKey
	for i := range n - 2 {
		key := authKey(hsm.ECDSAP256)
		parent = f.make(t, &x509.Certificate{Subject: pkix.Name{CommonName: fmt.Sprint("deep ", i)}, IsCA: true, BasicConstraintsValid: true}, parent, key, parentKey)
		parentKey = key
		chain = append(chain, parent.Raw)
	}
	leaf := f.make(t, &x509.Certificate{EmailAddresses: []string{"dev@test.example"}}, parent, f.leafKey, parentKey)
	chain = append(chain, leaf.Raw)
	slices.Reverse(chain)
	return chain
}
