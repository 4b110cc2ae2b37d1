package ct_test

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/certificate-transparency-go/trillian/ctfe"
	"github.com/google/certificate-transparency-go/x509util"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/ct"
	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/tree"
)

// chainCase is a submission and whether ctfe, the oracle, refuses it too.
type chainCase struct {
	name    string
	path    string
	chain   [][]byte
	says    string // part of our sentence
	differs string // why ctfe accepts what we refuse
}

// number is an integer of so many bits.
func number(bits uint) *big.Int {
	return new(big.Int).Add(new(big.Int).Lsh(big.NewInt(1), bits-1), big.NewInt(1))
}

// rsaKey is a SubjectPublicKeyInfo of a key that nobody made.
func rsaKey(t testing.TB, bits uint) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: number(bits), E: 65537})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// dsaKey is one of DSA (RFC 3279, Section 2.3.2).
func dsaKey(t testing.TB, bits, subgroup uint) []byte {
	t.Helper()
	parameters, err := asn1.Marshal([]*big.Int{number(bits), number(subgroup), big.NewInt(2)})
	if err != nil {
		t.Fatal(err)
	}
	y, err := asn1.Marshal(big.NewInt(4))
	if err != nil {
		t.Fatal(err)
	}
	der, err := asn1.Marshal(struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}{pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10040, 4, 1}, Parameters: asn1.RawValue{FullBytes: parameters}}, asn1.BitString{Bytes: y, BitLength: 8 * len(y)}})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// keyed is the fixture's issuer with another key, so that its signature is none.
func keyed(t testing.TB, f *fixture, spki []byte) []byte {
	t.Helper()
	var outer asn1.RawValue
	if _, err := asn1.Unmarshal(f.issuer.RawTBSCertificate, &outer); err != nil {
		t.Fatal(err)
	}
	outer.FullBytes, outer.Bytes = nil, bytes.Replace(outer.Bytes, f.issuer.RawSubjectPublicKeyInfo, spki, 1)
	tbs, err := asn1.Marshal(outer)
	if err != nil {
		t.Fatal(err)
	}
	der, err := asn1.Marshal(struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{asn1.RawValue{FullBytes: tbs}, pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 3}}, asn1.BitString{Bytes: f.issuer.Signature, BitLength: 8 * len(f.issuer.Signature)}})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func chainCases(t testing.TB, f *fixture) []chainCase {
	t.Helper()
	const pre, add = "/ct/v1/add-pre-chain", "/ct/v1/add-chain"
	stranger := newAuthority(t)
	notNull, notCritical := poison, poison
	notNull.Value = []byte{4, 0}
	notCritical.Critical = false
	cert, precert := f.leaf(t), f.leaf(t, poison)
	selfSigned := f.make(t, &x509.Certificate{Subject: pkix.Name{CommonName: "self"}, ExtraExtensions: []pkix.Extension{poison}}, nil, f.leafKey, f.leafKey)
	many := make([][]byte, 100)
	deep := [][]byte{precert.Raw}
	for i := range many {
		many[i] = precert.Raw
		if len(deep) < 11 {
			deep = append(deep, f.issuer.Raw)
		}
	}
	flipped := bytes.Clone(precert.Raw)
	flipped[len(flipped)-1] ^= 1
	return []chainCase{
		{"precertificate without poison", pre, f.chain(cert), "no poison", ""},
		{"precertificate with two poisons", pre, [][]byte{twicePoisoned(t, f), f.issuer.Raw, f.root.Raw}, "two poison", ""},
		{"poison that is not NULL", pre, f.chain(f.leaf(t, notNull)), "not a critical NULL", ""},
		{"poison that is not critical", pre, f.chain(f.leaf(t, notCritical)), "not a critical NULL", ""},
		{"precertificate sent as a certificate", add, f.chain(precert), "use add-pre-chain", ""},
		{"unknown root", pre, stranger.chain(stranger.leaf(t, poison)), "accepted root", ""},
		{"stranger's leaf under our chain", pre, [][]byte{stranger.leaf(t, poison).Raw, f.issuer.Raw, f.root.Raw}, "accepted root", ""},
		{"no issuer", pre, [][]byte{precert.Raw}, "accepted root", ""},
		{"self-signed", pre, [][]byte{selfSigned.Raw}, "accepted root", ""},
		{"wrong signature", pre, [][]byte{flipped, f.issuer.Raw, f.root.Raw}, "accepted root", ""},
		{"wrong order", pre, [][]byte{precert.Raw, f.root.Raw, f.issuer.Raw}, "order", ""},
		{"a certificate too many", pre, [][]byte{precert.Raw, f.issuer.Raw, stranger.root.Raw, f.root.Raw}, "order", ""},
		{"root submitted twice", pre, [][]byte{precert.Raw, f.issuer.Raw, f.root.Raw, f.root.Raw}, "order", ""},
		{"100 certificates", pre, many, "at most 10", ""},
		{"11 certificates", pre, deep, "at most 10", ""},
		{"trailing DER", pre, [][]byte{append(bytes.Clone(precert.Raw), 5, 0), f.issuer.Raw}, "not DER", ""},
		{"trailing DER in the issuer", pre, [][]byte{precert.Raw, append(bytes.Clone(f.issuer.Raw), 5, 0)}, "not DER", ""},
		{"truncated DER", pre, [][]byte{precert.Raw[:len(precert.Raw)/2], f.issuer.Raw}, "not DER", ""},
		{"empty certificate", pre, [][]byte{{}, f.issuer.Raw}, "not DER", ""},
		{"issuer with a huge RSA key", pre, [][]byte{precert.Raw, keyed(t, f, rsaKey(t, 8193)), f.root.Raw}, "RSA key above 8192 bits", ""},
		{"issuer with a huge DSA key", pre, [][]byte{precert.Raw, keyed(t, f, dsaKey(t, 3073, 256)), f.root.Raw}, "a DSA key above 3072", ""},
		{"issuer with a huge DSA subgroup", pre, [][]byte{precert.Raw, keyed(t, f, dsaKey(t, 3072, 257)), f.root.Raw}, "a DSA key above 3072 and 256", ""},
		{"issuer with a DSA key", pre, [][]byte{precert.Raw, keyed(t, f, dsaKey(t, 3072, 256)), f.root.Raw}, "accepted root", ""},
		{"text for a certificate", pre, [][]byte{[]byte("certificate")}, "not DER", ""},
	}
}

func TestRefusedChains(t *testing.T) {
	f := newFixture(t)
	for _, tc := range chainCases(t, f) {
		t.Run(tc.name, func(t *testing.T) {
			resp, body := f.post(t, tc.path, chainBody(t, tc.chain...))
			if resp.StatusCode != http.StatusBadRequest || !strings.Contains(string(body), tc.says) {
				t.Errorf("%d %q; want 400 with %q", resp.StatusCode, body, tc.says)
			}
			if oracleAccepts(f, tc.chain, strings.Contains(tc.path, "pre")) != (tc.differs != "") {
				t.Errorf("ctfe decides otherwise (reason given: %q)", tc.differs)
			}
		})
	}
	if size := f.tree.Root().Size; size != 0 {
		t.Errorf("tree of %d leaves", size)
	}
	for path, chain := range map[string][][]byte{
		"/ct/v1/add-pre-chain": f.chain(f.leaf(t, poison)),
		"/ct/v1/add-chain":     f.chain(f.leaf(t)),
	} {
		if resp, body := f.post(t, path, chainBody(t, chain...)); resp.StatusCode != http.StatusOK {
			t.Errorf("good chain: %d %q", resp.StatusCode, body)
		}
		if !oracleAccepts(f, chain, strings.Contains(path, "pre")) {
			t.Error("ctfe refuses a good chain")
		}
	}
}

// oracleAccepts says what ctfe's own chain checks decide.
func oracleAccepts(f *fixture, chain [][]byte, pre bool) bool {
	pool := x509util.NewPEMCertPool()
	if !pool.AppendCertsFromPEM(pemOf(f.root.Raw)) {
		return false
	}
	path, err := ctfe.ValidateChain(chain, ctfe.NewCertValidationOpts(pool, time.Time{}, false, false, nil, nil, false, nil))
	if err != nil {
		return false
	}
	isPre, err := ctfe.IsPrecertificate(path[0])
	if err != nil || isPre != pre {
		return false
	}
	return !pre || bytes.Count(path[0].Raw, []byte{0xd6, 0x79, 2, 4, 3}) == 1 // as MerkleTreeLeafFromChain
}

func pemOf(der []byte) []byte {
	return fmt.Appendf(nil, "-----BEGIN CERTIFICATE-----\n%s\n-----END CERTIFICATE-----\n", base64.StdEncoding.EncodeToString(der))
}

func TestRefusedBodies(t *testing.T) {
	f := newFixture(t)
	precert := base64.StdEncoding.EncodeToString(f.leaf(t, poison).Raw)
	for _, tc := range []struct {
		name   string
		body   string
		status int
	}{
		{"empty", "", 400},
		{"not JSON", "chain", 400},
		{"no chain", "{}", 400},
		{"empty chain", `{"chain":[]}`, 400},
		{"null chain", `{"chain":null}`, 400},
		{"chain of numbers", `{"chain":[1,2]}`, 400},
		{"chain of a string", `{"chain":"` + precert + `"}`, 400},
		{"not base64", `{"chain":["!!!!"]}`, 400},
		{"trailing JSON", `{"chain":["` + precert + `"]}{}`, 400},
		{"truncated JSON", `{"chain":["` + precert, 400},
		{"deeply nested", `{"chain":` + strings.Repeat("[", 20000), 400},
		{"1 MiB chain", `{"chain":["` + strings.Repeat("A", 1<<20) + `"]}`, 413},
		{"5 MiB of spaces", strings.Repeat(" ", 5<<20), 413},
	} {
		t.Run(tc.name, func(t *testing.T) {
			resp, body := f.post(t, "/ct/v1/add-pre-chain", []byte(tc.body))
			if resp.StatusCode != tc.status {
				t.Errorf("%d %q, want %d", resp.StatusCode, body, tc.status)
			}
		})
	}
	if resp, _ := f.get(t, "/ct/v1/add-chain"); resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("GET of add-chain: %d", resp.StatusCode)
	}
}

func TestRefusedReads(t *testing.T) {
	f := newFixture(t)
	f.fill(t, 5)
	f.publish(t)
	zero := url.QueryEscape(base64.StdEncoding.EncodeToString(make([]byte, 32)))
	short := url.QueryEscape(base64.StdEncoding.EncodeToString(make([]byte, 31)))
	leaf, err := f.tree.Entries(t.Context(), 4, 1)
	if err != nil {
		t.Fatal(err)
	}
	last := url.QueryEscape(base64.StdEncoding.EncodeToString(leaf[0].LeafHash[:]))
	for _, tc := range []struct {
		name, path string
		status     int
	}{
		{"entries without start", "/ct/v1/get-entries?end=1", 400},
		{"entries without end", "/ct/v1/get-entries?start=1", 400},
		{"entries with start > end", "/ct/v1/get-entries?start=2&end=1", 400},
		{"entries from a negative start", "/ct/v1/get-entries?start=-1&end=1", 400},
		{"entries to a negative end", "/ct/v1/get-entries?start=0&end=-1", 400},
		{"entries beyond the tree", "/ct/v1/get-entries?start=5&end=5", 400},
		{"entries from 2^63", "/ct/v1/get-entries?start=9223372036854775808&end=9223372036854775809", 400},
		{"entries in hexadecimal", "/ct/v1/get-entries?start=0x1&end=2", 400},
		{"proof for a short hash", "/ct/v1/get-proof-by-hash?tree_size=5&hash=" + short, 400},
		{"proof for no hash", "/ct/v1/get-proof-by-hash?tree_size=5", 400},
		{"proof for text", "/ct/v1/get-proof-by-hash?tree_size=5&hash=!!", 400},
		{"proof for an unknown hash", "/ct/v1/get-proof-by-hash?tree_size=5&hash=" + zero, 404},
		{"proof in a tree without the leaf", "/ct/v1/get-proof-by-hash?tree_size=4&hash=" + last, 404},
		{"proof beyond the tree", "/ct/v1/get-proof-by-hash?tree_size=6&hash=" + last, 404},
		{"proof in an empty tree", "/ct/v1/get-proof-by-hash?tree_size=0&hash=" + last, 400},
		{"proof without a size", "/ct/v1/get-proof-by-hash?hash=" + last, 400},
		{"consistency without first", "/ct/v1/get-sth-consistency?second=5", 400},
		{"consistency without second", "/ct/v1/get-sth-consistency?first=1", 400},
		{"consistency backwards", "/ct/v1/get-sth-consistency?first=5&second=1", 400},
		{"consistency from a negative size", "/ct/v1/get-sth-consistency?first=-1&second=5", 400},
		{"consistency beyond the tree", "/ct/v1/get-sth-consistency?first=1&second=6", 400},
		{"consistency from nothing to beyond the tree", "/ct/v1/get-sth-consistency?first=0&second=6", 400}, // ctfe: 200, proves nothing
		{"entry and proof beyond the tree", "/ct/v1/get-entry-and-proof?leaf_index=0&tree_size=6", 400},
		{"entry and proof of no leaf", "/ct/v1/get-entry-and-proof?leaf_index=5&tree_size=5", 400},
		{"entry and proof without an index", "/ct/v1/get-entry-and-proof?tree_size=5", 400},
		{"tile beyond the tree", "/tile/0/000.p/6", 404},
		{"full tile of a small tree", "/tile/0/000", 404},
		{"next tile", "/tile/0/001.p/1", 404},
		{"level beyond the tree", "/tile/1/000.p/1", 404},
		{"level 63", "/tile/63/000", 404},
		{"data beyond the tree", "/tile/data/000.p/6", 404},
		{"entries of another kind of log", "/tile/entries/000.p/5", 400},
		{"malformed tile", "/tile/0/1", 400},
		{"climbing tile", "/tile/0/..%2f000", 400},
		{"unknown issuer", "/issuer/" + strings.Repeat("0", 64), 404},
		{"issuer in upper case", "/issuer/" + strings.Repeat("A", 64), 400},
		{"issuer of 31 octets", "/issuer/" + strings.Repeat("0", 62), 400},
	} {
		t.Run(tc.name, func(t *testing.T) {
			resp, body := f.get(t, tc.path)
			if resp.StatusCode != tc.status {
				t.Errorf("%d %q, want %d", resp.StatusCode, body, tc.status)
			}
			if cache := resp.Header.Get("Cache-Control"); cache != "no-store" {
				t.Errorf("an error may be cached: %q", cache)
			}
		})
	}
}

func TestGetEntriesIsClipped(t *testing.T) {
	f := newFixture(t)
	f.fill(t, 300)
	f.publish(t)
	for _, tc := range []struct {
		name       string
		start, end int
		want       int
		cache      string
	}{
		{"one", 7, 7, 1, "public, max-age=86400"},
		{"a tile", 0, 255, 256, "public, max-age=86400"},
		{"a million", 0, 999999, 256, "public, max-age=86400"},
		{"a million from the middle of a tile", 10, 999999, 246, "public, max-age=86400"},
		{"past the end", 290, 299, 10, "public, max-age=86400"},
		{"beyond the end", 290, 310, 10, "public, max-age=60"},
		{"the largest end", 256, 9223372036854775807, 44, "public, max-age=60"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			resp, body := f.get(t, fmt.Sprintf("/ct/v1/get-entries?start=%d&end=%d", tc.start, tc.end))
			var answer struct {
				Entries []struct {
					LeafInput []byte `json:"leaf_input"`
				} `json:"entries"`
			}
			if err := json.Unmarshal(body, &answer); err != nil {
				t.Fatalf("%d %.80q: %v", resp.StatusCode, body, err)
			}
			if len(answer.Entries) != tc.want || resp.Header.Get("Cache-Control") != tc.cache {
				t.Errorf("%d entries, %q; want %d, %q", len(answer.Entries), resp.Header.Get("Cache-Control"), tc.want, tc.cache)
			}
		})
	}
}

func TestEmptyLog(t *testing.T) {
	f := newFixture(t)
	f.publish(t)
	if resp, body := f.get(t, "/ct/v1/get-sth-consistency?first=0&second=0"); resp.StatusCode != 200 || strings.TrimSpace(string(body)) != `{"consistency":[]}` {
		t.Errorf("empty consistency: %d %q", resp.StatusCode, body)
	}
	if sth, err := f.client(t).GetSTH(t.Context()); err != nil || sth.TreeSize != 0 || sth.SHA256RootHash != sha256.Sum256(nil) {
		t.Errorf("head of an empty log: %v, %v", sth, err)
	}
}

// fewHeads is a publication whose newest head is old, or missing.
type fewHeads struct {
	head.Publication
	latest head.Signed
}

func (h fewHeads) Latest() head.Signed { return h.latest }

// TestReadsStopAtThePublishedHead: leaves that are durable but under no
// published head are not shown.
func TestReadsStopAtThePublishedHead(t *testing.T) {
	var old fewHeads
	f := newFixture(t, func(c *ct.Config) { old.Publication = c.Heads; c.Heads = &old })
	for _, path := range []string{"/ct/v1/get-sth", "/checkpoint", "/ct/v1/get-entries?start=0&end=0"} {
		if resp, _ := f.get(t, path); resp.StatusCode != http.StatusServiceUnavailable {
			t.Errorf("%s without a head: %d", path, resp.StatusCode)
		}
	}
	f.fill(t, 2)
	old.latest = f.publish(t)
	f.fill(t, 1)
	for path, status := range map[string]int{
		"/ct/v1/get-entries?start=0&end=5":                        200,
		"/ct/v1/get-entries?start=2&end=2":                        400,
		"/ct/v1/get-sth-consistency?first=1&second=3":             400,
		"/ct/v1/get-entry-and-proof?leaf_index=2&tree_size=3":     400,
		"/tile/0/000.p/2":                                         200,
		"/tile/0/000.p/3":                                         404,
		"/tile/data/000.p/3":                                      404,
		"/ct/v1/get-proof-by-hash?tree_size=3&hash=" + leaf(t, f): 404,
	} {
		if resp, body := f.get(t, path); resp.StatusCode != status {
			t.Errorf("%s: %d %q, want %d", path, resp.StatusCode, body, status)
		}
	}
}

func leaf(t testing.TB, f *fixture) string {
	t.Helper()
	e, err := f.tree.Entries(t.Context(), 0, 1)
	if err != nil {
		t.Fatal(err)
	}
	return url.QueryEscape(base64.StdEncoding.EncodeToString(e[0].LeafHash[:]))
}

// faultyTree fails where it is told to.
type faultyTree struct {
	tree.Tree
	appendErr error
}

func (f *faultyTree) Append(ctx context.Context, l tree.Leaf) (tree.Entry, bool, error) {
	if f.appendErr != nil {
		return tree.Entry{}, false, f.appendErr
	}
	return f.Tree.Append(ctx, l)
}

func TestTreeFaults(t *testing.T) {
	faulty := &faultyTree{}
	f := newFixture(t, func(c *ct.Config) { faulty.Tree = c.Tree; c.Tree = faulty })
	for _, tc := range []struct {
		name   string
		err    error
		status int
	}{
		{"queue full", tree.ErrBusy, 503},
		{"shutting down", tree.ErrClosed, 503},
		{"timeout", context.DeadlineExceeded, 504},
		{"disk full", tree.ErrStorage, 503},
		{"damaged", tree.ErrCorrupt, 503},
		{"anything else", errors.New("no space left on /secret/path"), 500},
	} {
		t.Run(tc.name, func(t *testing.T) {
			faulty.appendErr = fmt.Errorf("append: %w", tc.err)
			resp, body := f.post(t, "/ct/v1/add-pre-chain", chainBody(t, f.chain(f.leaf(t, poison))...))
			if resp.StatusCode != tc.status || strings.Contains(string(body), "secret") || strings.Contains(string(body), "signature") {
				t.Errorf("%d %q, want %d and no inner text", resp.StatusCode, body, tc.status)
			}
			p, err := f.log.Promise(t.Context(), [32]byte{}, tbs(t, f.leaf(t, poison)))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := p.Commit(t.Context(), nil, nil); err == nil {
				t.Error("Commit succeeded")
			}
		})
	}
}

func TestExtKeyUsages(t *testing.T) {
	f := newFixture(t, func(c *ct.Config) { c.ExtKeyUsages = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} })
	if resp, body := f.post(t, "/ct/v1/add-pre-chain", chainBody(t, f.chain(f.leaf(t, poison))...)); resp.StatusCode != 200 {
		t.Errorf("code signing: %d %q", resp.StatusCode, body)
	}
	server := f.make(t, &x509.Certificate{DNSNames: []string{"test.example"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, ExtraExtensions: []pkix.Extension{poison}}, f.issuer, authKey(hsm.ECDSAP256), f.issuerKey)
	if resp, body := f.post(t, "/ct/v1/add-pre-chain", chainBody(t, f.chain(server)...)); resp.StatusCode != 400 || !strings.Contains(string(body), "extended key usage") {
		t.Errorf("server authentication: %d %q", resp.StatusCode, body)
	}
}

func TestSubmissionsAreBounded(t *testing.T) {
	arrived, gate := make(chan struct{}), make(chan struct{})
	slow := &slowTree{arrived: arrived, gate: gate}
	f := newFixture(t, func(c *ct.Config) { slow.Tree = c.Tree; c.Tree = slow; c.MaxInFlight = 1 })
	body := chainBody(t, f.chain(f.leaf(t, poison))...)
	done := make(chan int)
	go func() {
		resp, err := f.srv.Client().Post(f.url("/ct/v1/add-pre-chain"), "application/json", bytes.NewReader(body))
		if err != nil {
			done <- 0
			return
		}
		_ = resp.Body.Close()
		done <- resp.StatusCode
	}()
	select {
	case <-arrived:
	case status := <-done:
		t.Fatalf("first submission was answered before it was appended: %d", status)
	}
	if resp, body := f.post(t, "/ct/v1/add-pre-chain", body); resp.StatusCode != 503 {
		t.Errorf("second submission: %d %q", resp.StatusCode, body)
	}
	close(gate)
	if status := <-done; status != 200 {
		t.Errorf("first submission: %d", status)
	}
}

// waitingTree stops in Entries until the gate is open.
type waitingTree struct {
	tree.Tree
	arrived, gate chan struct{}
}

func (s *waitingTree) Entries(ctx context.Context, start, count uint64) ([]tree.Entry, error) {
	s.arrived <- struct{}{}
	<-s.gate
	return s.Tree.Entries(ctx, start, count)
}

// TestAnswersWithEntriesAreBounded: whoever asks for many at once, and takes none,
// holds no more of our memory than the budget.
func TestAnswersWithEntriesAreBounded(t *testing.T) {
	const most = (64 << 20) / tree.Answer
	for _, path := range []string{"/ct/v1/get-entries?start=0&end=2", "/tile/data/000.p/3"} {
		t.Run(path, func(t *testing.T) {
			slow := &waitingTree{arrived: make(chan struct{}), gate: make(chan struct{})}
			f := newFixture(t, func(c *ct.Config) { slow.Tree = c.Tree; c.Tree = slow })
			f.fill(t, 3)
			f.publish(t)
			handler, answers := f.srv.Config.Handler, make(chan int, most)
			ask := func() *httptest.ResponseRecorder {
				rec := httptest.NewRecorder()
				handler.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/ct/2026"+path, nil))
				return rec
			}
			for range most {
				go func() { answers <- ask().Code }()
			}
			for range most {
				<-slow.arrived
			}
			if rec := ask(); rec.Code != http.StatusServiceUnavailable || rec.Header().Get("Retry-After") == "" {
				t.Errorf("one more: %d %v", rec.Code, rec.Header())
			}
			close(slow.gate)
			for range most {
				if code := <-answers; code != http.StatusOK {
					t.Errorf("answer %d", code)
				}
			}
			go func() { <-slow.arrived }()
			if rec := ask(); rec.Code != http.StatusOK {
				t.Errorf("afterwards: %d", rec.Code)
			}
		})
	}
}

// slowTree stops in Append until the gate is open.
type slowTree struct {
	tree.Tree
	arrived, gate chan struct{}
}

func (s *slowTree) Append(ctx context.Context, l tree.Leaf) (tree.Entry, bool, error) {
	s.arrived <- struct{}{}
	<-s.gate
	return s.Tree.Append(ctx, l)
}
