package tsa

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"crypto/x509/pkix"

	"github.com/digitorus/timestamp"
	"github.com/google/go-cmp/cmp"
	"github.com/labstack/echo/v4"
	"github.com/sigstore/sigstore-go/pkg/sign"
	"github.com/sigstore/timestamp-authority/v2/pkg/verification"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

func serve(a *Authority, prefix string) *echo.Echo {
	e := echo.New()
	a.Register(e.Group(prefix))
	return e
}

func post(h http.Handler, contentType string, body io.Reader) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodPost, "/api/v1/timestamp", body)
	if contentType != "" {
		r.Header.Set("Content-Type", contentType)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func der(t testing.TB, change func(*timestamp.Request)) []byte {
	t.Helper()
	digest := sha256.Sum256(artifact)
	req := &timestamp.Request{HashAlgorithm: crypto.SHA256, HashedMessage: digest[:]}
	if change != nil {
		change(req)
	}
	raw, err := req.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func digest64() string {
	digest := sha256.Sum256(artifact)
	return base64.StdEncoding.EncodeToString(digest[:])
}

// TestClients sends the request of every client that is known to ask.
func TestClients(t *testing.T) {
	f := newFixture(t, hsmtest.SoftwareKey(hsm.ECDSAP256))
	h := serve(f.Authority, "")
	nonce := new(big.Int).SetUint64(1<<64 - 59)
	tests := []struct {
		name, contentType string
		body              []byte
		nonce             *big.Int
		certificate       bool
		policy            asn1.ObjectIdentifier
	}{
		{"sigstore-go and cosign 3", typeQuery, der(t, nil), nil, false, ownPolicy},
		{"cosign 2 and the TSA client", typeQuery, der(t, func(r *timestamp.Request) { r.Nonce, r.Certificates = nonce, true }), nonce, true, ownPolicy},
		{"sigstore-js", typeJSON, []byte(`{"artifactHash":"` + digest64() + `","hashAlgorithm":"sha256"}`), nil, false, ownPolicy},
		{"sigstore-js, all members", typeJSON, []byte(`{"artifactHash":"` + digest64() + `","hashAlgorithm":"SHA256","certificates":true,"nonce":18446744073709551557,"tsaPolicyOID":"1.3.6.1.4.1.57264.2"}`), nonce, true, SigstorePolicy},
		{"sigstore-python", typeQuery, der(t, func(r *timestamp.Request) { r.Nonce, r.Certificates = nonce, true }), nonce, true, ownPolicy},
		{"sigstore-java", typeQuery, der(t, func(r *timestamp.Request) { r.Nonce = nonce }), nonce, false, ownPolicy},
		{"own policy by name", typeQuery, der(t, func(r *timestamp.Request) { r.TSAPolicyOID = ownPolicy }), nil, false, ownPolicy},
		{"content type with parameter", "application/json; charset=utf-8", []byte(`{"artifactHash":"` + digest64() + `","hashAlgorithm":"sha256"}`), nil, false, ownPolicy},
		{"unknown member", typeJSON, []byte(`{"artifactHash":"` + digest64() + `","hashAlgorithm":"sha256","x":1,"nonce":null}`), nil, false, ownPolicy},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			w := post(h, test.contentType, bytes.NewReader(test.body))
			if w.Code != http.StatusOK || w.Header().Get("Content-Type") != typeReply {
				t.Fatalf("status %d, type %q: %s", w.Code, w.Header().Get("Content-Type"), w.Body)
			}
			ts, err := verification.VerifyTimestampResponse(w.Body.Bytes(), bytes.NewReader(artifact), verification.VerifyOpts{
				TSACertificate: f.chain[0], Roots: f.chain[1:], Nonce: test.nonce, OID: test.policy,
			})
			if err != nil {
				t.Fatal(err)
			}
			if (ts.Nonce != nil) != (test.nonce != nil) || ts.AddTSACertificate != test.certificate {
				t.Errorf("nonce %v, certificate %t", ts.Nonce, ts.AddTSACertificate)
			}
		})
	}
}

func TestBadInput(t *testing.T) {
	f := newFixture(t, hsmtest.SoftwareKey(hsm.ECDSAP256))
	h := serve(f.Authority, "")
	object := func(members string) []byte { return []byte(`{"artifactHash":"` + digest64() + `",` + members + `}`) }
	good := der(t, nil)
	tests := []struct {
		name, contentType string
		body              []byte
		status            int
		message           string
	}{
		{"no content type", "", good, 415, msgGeneric},
		{"text", "text/plain", good, 415, msgGeneric},
		{"application twice", "application/json, application/timestamp-query", good, 415, msgGeneric},
		{"another application type", "application/octet-stream", good, 415, msgGeneric},
		{"malformed content type", "application/json; =", good, 415, msgGeneric},
		{"DER called JSON", typeJSON, good, 400, msgGeneric},
		{"JSON called DER", typeQuery, object(`"hashAlgorithm":"sha256"`), 400, msgGeneric},
		{"empty DER", typeQuery, nil, 400, msgGeneric},
		{"empty JSON", typeJSON, nil, 400, msgGeneric},
		{"truncated DER", typeQuery, good[:len(good)-1], 400, msgGeneric},
		{"DER with a trailing octet", typeQuery, append(bytes.Clone(good), 0), 400, msgGeneric},
		{"two requests", typeQuery, append(bytes.Clone(good), good...), 400, msgGeneric},
		{"DER of version 2", typeQuery, bytes.Replace(good, []byte{2, 1, 1}, []byte{2, 1, 2}, 1), 400, msgGeneric},
		{"DER of 5 MiB", typeQuery, make([]byte, 5<<20), 400, msgLarge},
		{"JSON of 1025 octets", typeJSON, append(object(`"hashAlgorithm":"sha256"`), bytes.Repeat([]byte{' '}, 1025)...), 400, msgLarge},
		{"JSON with a long nonce", typeJSON, object(`"hashAlgorithm":"sha256","nonce":` + strings.Repeat("9", 2000)), 400, msgLarge},
		{"JSON nonce above 64 octets", typeJSON, object(`"hashAlgorithm":"sha256","nonce":1` + strings.Repeat("0", 200)), 400, msgLarge},
		{"DER nonce above 64 octets", typeQuery, der(t, func(r *timestamp.Request) { r.Nonce = new(big.Int).Lsh(big.NewInt(1), 520) }), 400, msgLarge},
		{"JSON array", typeJSON, []byte(`[]`), 400, msgGeneric},
		{"JSON null", typeJSON, []byte(`null`), 400, msgGeneric},
		{"JSON twice", typeJSON, append(object(`"hashAlgorithm":"sha256"`), "{}"...), 400, msgGeneric},
		{"JSON nonce is a string", typeJSON, object(`"hashAlgorithm":"sha256","nonce":"1"`), 400, msgGeneric},
		{"JSON nonce is a fraction", typeJSON, object(`"hashAlgorithm":"sha256","nonce":1.5`), 400, msgGeneric},
		{"JSON without hash algorithm", typeJSON, object(`"certificates":true`), 400, msgGeneric},
		{"JSON with md5", typeJSON, object(`"hashAlgorithm":"md5"`), 400, msgGeneric},
		{"JSON with SHA-1", typeJSON, object(`"hashAlgorithm":"sha1"`), 400, msgWeakHash},
		{"JSON digest not base64", typeJSON, []byte(`{"artifactHash":"***","hashAlgorithm":"sha256"}`), 400, msgGeneric},
		{"JSON without digest", typeJSON, []byte(`{"hashAlgorithm":"sha256"}`), 400, msgLength},
		{"JSON digest of another hash", typeJSON, object(`"hashAlgorithm":"sha512"`), 400, msgLength},
		{"JSON policy of another", typeJSON, object(`"hashAlgorithm":"sha256","tsaPolicyOID":"1.2.3"`), 400, msgPolicy},
		{"JSON policy with 129 components", typeJSON, object(`"hashAlgorithm":"sha256","tsaPolicyOID":"1` + strings.Repeat(".1", 128) + `"`), 400, msgOID},
		{"JSON policy not numbers", typeJSON, object(`"hashAlgorithm":"sha256","tsaPolicyOID":"1.x"`), 400, msgOID},
		{"JSON policy negative", typeJSON, object(`"hashAlgorithm":"sha256","tsaPolicyOID":"1.-3"`), 400, msgOID},
		{"JSON policy in no arc", typeJSON, object(`"hashAlgorithm":"sha256","tsaPolicyOID":"9.1"`), 400, msgOID},
		{"SHA-1", typeQuery, der(t, func(r *timestamp.Request) { r.HashAlgorithm, r.HashedMessage = crypto.SHA1, make([]byte, 20) }), 400, msgWeakHash},
		{"SHA-224", typeQuery, bytes.Replace(good, []byte{0x86, 0x48, 0x01, 0x65, 3, 4, 2, 1}, []byte{0x86, 0x48, 0x01, 0x65, 3, 4, 2, 4}, 1), 400, msgGeneric},
		{"digest too short", typeQuery, der(t, func(r *timestamp.Request) { r.HashedMessage = make([]byte, 31) }), 400, msgLength},
		{"digest too long", typeQuery, der(t, func(r *timestamp.Request) { r.HashedMessage = make([]byte, 33) }), 400, msgLength},
		{"digest empty", typeQuery, der(t, func(r *timestamp.Request) { r.HashedMessage = nil }), 400, msgLength},
		{"policy of another", typeQuery, der(t, func(r *timestamp.Request) { r.TSAPolicyOID = asn1.ObjectIdentifier{1, 2, 3, 4, 1} }), 400, msgPolicy},
		{"hash algorithm with a parameter", typeQuery, assemble(t, imprint(sha256Algorithm(4, 0))), 400, msgGeneric},
		{"hash algorithm with NULL and more", typeQuery, assemble(t, imprint(sha256Algorithm(5, 0, 5, 0))), 400, msgGeneric},
		{"hash algorithm no OID", typeQuery, assemble(t, imprint([]byte{0x30, 2, 5, 0})), 400, msgGeneric},
		{"imprint no sequence", typeQuery, assemble(t, []byte{4, 0}), 400, msgGeneric},
		{"imprint with trailing data", typeQuery, assemble(t, imprint(sha256Algorithm(), 5, 0)), 400, msgGeneric},
		{"malformed policy", typeQuery, assemble(t, imprint(sha256Algorithm()), 6, 1, 0x80), 400, msgGeneric},
		{"nonce not minimal", typeQuery, assemble(t, imprint(sha256Algorithm()), 2, 2, 0, 1), 400, msgGeneric},
		{"nonce empty", typeQuery, assemble(t, imprint(sha256Algorithm()), 2, 0), 400, msgGeneric},
		{"certReq neither true nor false", typeQuery, assemble(t, imprint(sha256Algorithm()), 1, 1, 1), 400, msgGeneric},
		{"nonce after certReq", typeQuery, assemble(t, imprint(sha256Algorithm()), 1, 1, 0xff, 2, 1, 5), 400, msgGeneric},
		{"an extension", typeQuery, der(t, func(r *timestamp.Request) {
			r.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Value: []byte{5, 0}}}
		}), 400, msgExtension},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			w := post(h, test.contentType, bytes.NewReader(test.body))
			wantProblem(t, w, test.status, test.message)
		})
	}
	t.Run("body breaks off", func(t *testing.T) {
		w := post(h, typeQuery, io.MultiReader(bytes.NewReader(good[:9]), iotest.ErrReader(io.ErrUnexpectedEOF)))
		wantProblem(t, w, 400, msgGeneric)
	})
	t.Run("two content types", func(t *testing.T) {
		r := httptest.NewRequest(http.MethodPost, "/api/v1/timestamp", bytes.NewReader(good))
		r.Header.Add("Content-Type", typeQuery)
		r.Header.Add("Content-Type", typeJSON)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		wantProblem(t, w, 415, msgGeneric)
	})
}

// sha256Algorithm is the AlgorithmIdentifier of SHA-256 with these parameters.
func sha256Algorithm(parameters ...byte) []byte {
	id := []byte{6, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 1}
	return append(append([]byte{0x30, byte(len(id) + len(parameters))}, id...), parameters...)
}

// imprint is a MessageImprint of the artefact, with more after the digest.
func imprint(algorithm []byte, more ...byte) []byte {
	digest := sha256.Sum256(artifact)
	content := append(append(append([]byte{}, algorithm...), 4, 32), digest[:]...)
	content = append(content, more...)
	return append([]byte{0x30, byte(len(content))}, content...)
}

// assemble is a TimeStampReq of version 1 with these fields.
func assemble(t *testing.T, fields []byte, more ...byte) []byte {
	t.Helper()
	content := append(append([]byte{2, 1, 1}, fields...), more...)
	if len(content) > 127 {
		t.Fatalf("%d octets need a long length", len(content))
	}
	return append([]byte{0x30, byte(len(content))}, content...)
}

// TestLenientForms: what DER or the profile would not write, but clients do.
// The message imprint comes back in the octets in which it was sent.
func TestLenientForms(t *testing.T) {
	f := newFixture(t, hsmtest.SoftwareKey(hsm.ECDSAP256))
	h := serve(f.Authority, "")
	for _, test := range []struct {
		name    string
		imprint []byte
		more    []byte
	}{
		{"no parameters", imprint(sha256Algorithm()), nil},
		{"NULL parameters", imprint(sha256Algorithm(5, 0)), nil},
		{"explicit certReq FALSE", imprint(sha256Algorithm(5, 0)), []byte{1, 1, 0}},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := post(h, typeQuery, bytes.NewReader(assemble(t, test.imprint, test.more...)))
			if w.Code != http.StatusOK {
				t.Fatalf("status %d: %s", w.Code, w.Body)
			}
			if !bytes.Contains(w.Body.Bytes(), test.imprint) {
				t.Error("the message imprint is not the request's")
			}
			ts, err := verification.VerifyTimestampResponse(w.Body.Bytes(), bytes.NewReader(artifact), verification.VerifyOpts{
				TSACertificate: f.chain[0], Roots: f.chain[1:],
			})
			if err != nil {
				t.Fatal(err)
			}
			if ts.AddTSACertificate {
				t.Error("certificate without being asked for")
			}
		})
	}
}

func wantProblem(t *testing.T, w *httptest.ResponseRecorder, status int, message string) {
	t.Helper()
	var got problem
	if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
		t.Fatalf("body %q: %v", w.Body, err)
	}
	if d := cmp.Diff(problem{Code: status, Message: message}, got); d != "" || w.Code != status {
		t.Errorf("status %d: %s", w.Code, d)
	}
}

func TestUnavailable(t *testing.T) {
	key := &hsmtest.Failing{Key: hsmtest.SoftwareKey(hsm.ECDSAP256)}
	f := newFixture(t, key)
	h := serve(f.Authority, "")
	good := der(t, nil)
	for _, test := range []struct {
		name       string
		keyErr     error
		clockErr   error
		status     int
		retryAfter string
		message    string
	}{
		{"token busy", hsm.ErrBusy, nil, 503, "1", "timestamp authority is busy; retry"},
		{"token lost", hsm.ErrLost, nil, 503, "1", "timestamp authority is busy; retry"},
		{"wrong signature", hsm.ErrBadSignature, nil, 500, "", msgGeneric},
		{"PIN refused", hsm.ErrPIN, nil, 500, "", msgGeneric},
		{"clock refused", nil, errors.New("clock jumped"), 503, "", "time is not available"},
	} {
		t.Run(test.name, func(t *testing.T) {
			key.Fail(test.keyErr)
			f.clock.set(testStart.Add(time.Hour), test.clockErr)
			w := post(h, typeQuery, bytes.NewReader(good))
			wantProblem(t, w, test.status, test.message)
			if got := w.Header().Get("Retry-After"); got != test.retryAfter {
				t.Errorf("Retry-After %q, want %q", got, test.retryAfter)
			}
		})
	}
	key.Fail(nil)
	f.clock.set(testStart.Add(time.Hour), nil)
	if w := post(h, typeQuery, bytes.NewReader(good)); w.Code != http.StatusOK {
		t.Errorf("after recovery: status %d", w.Code)
	}
	t.Run("client gone", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		r := httptest.NewRequestWithContext(ctx, http.MethodPost, "/api/v1/timestamp", bytes.NewReader(good))
		r.Header.Set("Content-Type", typeQuery)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		wantProblem(t, w, 499, "client disconnected during request")
	})
}

func TestChainAndPing(t *testing.T) {
	f := newFixture(t, hsmtest.SoftwareKey(hsm.ECDSAP256))
	h := serve(f.Authority, "/prefix")
	get := func(path string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/prefix"+path, nil))
		return w
	}
	w := get("/api/v1/timestamp/certchain")
	if w.Code != http.StatusOK || w.Header().Get("Content-Type") != typeChain {
		t.Fatalf("status %d, type %q", w.Code, w.Header().Get("Content-Type"))
	}
	if !bytes.Equal(w.Body.Bytes(), f.CertificateChain()) {
		t.Error("CertificateChain gives another chain")
	}
	rest := w.Body.Bytes()
	for i, want := range f.chain {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil || !bytes.Equal(block.Bytes, want.Raw) {
			t.Errorf("certificate %d of the chain is another", i)
		}
	}
	if len(rest) != 0 {
		t.Errorf("%d octets after the chain", len(rest))
	}
	if w := get("/ping"); w.Code != http.StatusOK {
		t.Errorf("ping: %d", w.Code)
	}
	if w := get("/api/v1/timestamp"); w.Code != http.StatusMethodNotAllowed {
		t.Errorf("GET of the POST path: %d", w.Code)
	}
}

// TestSigstoreGoClient: the client that cosign 3 uses, over the wire, with a
// key in a token.
func TestSigstoreGoClient(t *testing.T) {
	f := newFixture(t, hsmtest.NewKey(t, hsmtest.SoftHSM(t), "tsa", hsm.ECDSAP256))
	server := httptest.NewServer(serve(f.Authority, ""))
	defer server.Close()
	client := sign.NewTimestampAuthority(&sign.TimestampAuthorityOptions{URL: server.URL + "/api/v1/timestamp"})
	reply, err := client.GetTimestamp(t.Context(), artifact)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := verification.VerifyTimestampResponse(reply, bytes.NewReader(artifact), verification.VerifyOpts{
		TSACertificate: f.chain[0], Roots: f.chain[1:],
	}); err != nil {
		t.Fatal(err)
	}
}

// TestLibraryReadsWhatWeRead: for every request that digitorus/timestamp
// writes, our parser and its agree.
func TestLibraryReadsWhatWeRead(t *testing.T) {
	for i, change := range []func(*timestamp.Request){
		nil,
		func(r *timestamp.Request) { r.Certificates = true },
		func(r *timestamp.Request) { r.Nonce = big.NewInt(-128) },
		func(r *timestamp.Request) { r.TSAPolicyOID = SigstorePolicy; r.Nonce = big.NewInt(0) },
	} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			raw := der(t, change)
			theirs, err := timestamp.ParseRequest(raw)
			if err != nil {
				t.Fatal(err)
			}
			ours, err := ParseDER(raw)
			if err != nil {
				t.Fatal(err)
			}
			want := &Request{
				Hash: theirs.HashAlgorithm, Digest: theirs.HashedMessage, Policy: theirs.TSAPolicyOID, Nonce: theirs.Nonce,
				Certificates: theirs.Certificates,
			}
			if d := cmp.Diff(want, ours, cmp.Comparer(func(a, b *big.Int) bool { return (a == nil) == (b == nil) && (a == nil || a.Cmp(b) == 0) })); d != "" {
				t.Error(d)
			}
		})
	}
}

// FuzzParseDER: no panic, and what is accepted is accepted by the library
// with the same meaning, and gets a timestamp that the library reads.
func FuzzParseDER(f *testing.F) {
	f.Add(der(f, nil))
	f.Add(der(f, func(r *timestamp.Request) {
		r.Nonce, r.Certificates, r.TSAPolicyOID = big.NewInt(5), true, SigstorePolicy
	}))
	f.Add(der(f, func(r *timestamp.Request) { r.HashAlgorithm, r.HashedMessage = crypto.SHA1, make([]byte, 20) }))
	f.Add([]byte{0x30, 0x80, 0, 0})
	a := newFixture(f, hsmtest.SoftwareKey(hsm.ECDSAP256))
	f.Fuzz(func(t *testing.T, raw []byte) {
		req, err := ParseDER(raw)
		if err != nil {
			if !errors.Is(err, ErrRequest) {
				t.Fatalf("%v is not ErrRequest", err)
			}
			return
		}
		checkFuzzed(t, a, req)
	})
}

// FuzzParseJSON is the same for the JSON form.
func FuzzParseJSON(f *testing.F) {
	f.Add([]byte(`{"artifactHash":"` + digest64() + `","hashAlgorithm":"sha256","certificates":true,"nonce":12,"tsaPolicyOID":"1.3.6.1.4.1.57264.2"}`))
	f.Add([]byte(`{"artifactHash":"","hashAlgorithm":"sha1"}`))
	f.Add([]byte(`{"nonce":-1e3}`))
	a := newFixture(f, hsmtest.SoftwareKey(hsm.ECDSAP256))
	f.Fuzz(func(t *testing.T, raw []byte) {
		req, err := ParseJSON(raw)
		if err != nil {
			if !errors.Is(err, ErrRequest) {
				t.Fatalf("%v is not ErrRequest", err)
			}
			return
		}
		checkFuzzed(t, a, req)
	})
}

func checkFuzzed(t *testing.T, a *fixture, req *Request) {
	reply, err := a.Timestamp(t.Context(), req)
	if errors.Is(err, ErrRequest) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	got, err := timestamp.ParseResponse(reply)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.HashedMessage, req.Digest) || got.HashAlgorithm != req.Hash {
		t.Error("timestamp over another digest")
	}
	if req.Nonce != nil && (got.Nonce == nil || got.Nonce.Cmp(req.Nonce) != 0) {
		t.Errorf("nonce %v, sent %v", got.Nonce, req.Nonce)
	}
}
