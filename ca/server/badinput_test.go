package server

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/labstack/echo/v4"

	"github.com/chancery-ca/chancery/ca/identity"
	"github.com/chancery-ca/chancery/ca/identity/oidctest"
	"github.com/chancery-ca/chancery/ca/internal/catest"
	"github.com/chancery-ca/chancery/ca/internal/idptest"
)

// What a client is told (Fulcio 1.8, pkg/server/error.go).
const (
	sayToken     = "There was an error processing the identity token"
	sayIdentity  = "The identity in the token cannot be put into a certificate"
	sayKey       = "The public key supplied in the request could not be parsed"
	sayWeak      = "The public key supplied in the request is insecure"
	saySignature = "The signature supplied in the request could not be verified"
	sayCSR       = "The certificate signing request could not be parsed"
)

// marker is in every claim of a token that is refused, and never in the log.
const marker = "s3cr3t"

// embassy is a house with a provider for each of some issuer types, and
// everything that they and the server log.
type embassy struct {
	*house
	all       *idptest.Log
	providers map[string]*oidctest.Provider
}

func buildEmbassy(t *testing.T, wrap func(http.Handler) http.Handler) *embassy {
	t.Helper()
	e := &embassy{house: &house{Parts: catest.NewParts(t), echo: echo.New()}, all: &idptest.Log{}, providers: map[string]*oidctest.Provider{}}
	var err error
	if e.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	cfg := identity.Config{
		OIDCIssuers: map[string]identity.Issuer{},
		CIIssuerMetadata: map[string]identity.CIMetadata{"ci": {
			DefaultTemplateValues:          map[string]string{"url": "https://ci.example"},
			SubjectAlternativeNameTemplate: "{{.url}}/{{.project}}/{{.id}}",
		}},
	}
	for kind, issuer := range map[string]identity.Issuer{
		"email":           {Type: "email"},
		"username":        {Type: "username", SubjectDomain: "127.0.0.1"},
		"uri":             {Type: "uri", SubjectDomain: "http://127.0.0.1"},
		"spiffe":          {Type: "spiffe", SPIFFETrustDomain: "example.com"},
		"github-workflow": {Type: "github-workflow"},
		"ci":              {Type: "ci-provider", CIProvider: "ci"},
	} {
		p := idptest.Serve(t, catest.Noon, wrap)
		issuer.ClientID = "sigstore"
		e.providers[kind], cfg.OIDCIssuers[p.Issuer()] = p, issuer
	}
	logger := slog.New(slog.NewTextHandler(e.all, &slog.HandlerOptions{Level: slog.LevelDebug}))
	verifier, err := identity.New(t.Context(), cfg, identity.Options{Now: e.Config().Now, LoopbackHTTP: true, Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(verifier.Close)
	ready(t, verifier)
	s, err := New(Config{Authority: catest.Authority(t, e.Config()), Identity: verifier, Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	s.Register(e.echo)
	e.server = s
	return e
}

// ask sends a token with a key whose proof is over the challenge.
func (e *embassy) ask(t *testing.T, raw, challenge string) *httptest.ResponseRecorder {
	t.Helper()
	return e.do(http.MethodPost, PathSigningCert, body(t, raw, publicPEM(t, e.key.Public()), prove(t, e.key, challenge)), nil)
}

// wantSilence fails if the log has a secret or an error of ours.
func (e *embassy) wantSilence(t *testing.T, secrets ...string) {
	t.Helper()
	text := e.all.String()
	for _, secret := range append(secrets, marker, "alice") {
		if strings.Contains(text, secret) {
			t.Errorf("the log contains %.40q", secret)
		}
	}
	if strings.Contains(text, "level=ERROR") || !strings.Contains(text, "request=") {
		t.Errorf("log: %.2000s", text)
	}
}

// workflowClaims are a token of GitHub Actions.
func workflowClaims(change map[string]any) map[string]any {
	claims := map[string]any{"sub": "repo:o/r", "email": nil, "email_verified": nil}
	for _, name := range []string{
		"job_workflow_ref", "sha", "event_name", "repository", "workflow", "ref", "job_workflow_sha", "runner_environment", "repository_id",
		"repository_owner", "repository_owner_id", "repository_visibility", "workflow_ref", "workflow_sha", "run_id", "run_attempt",
	} {
		claims[name] = "x"
	}
	for name, v := range change {
		claims[name] = v
	}
	return claims
}

// TestBadTokens: what a provider signed and we refuse, over HTTP, by type.
func TestBadTokens(t *testing.T) {
	e := buildEmbassy(t, nil)
	long := marker + strings.Repeat("a", 2000)
	at := func(d time.Duration) int64 { return catest.Noon.Add(d).Unix() }
	rows := []struct {
		name, kind string
		claims     map[string]any
		message    string
	}{
		{"NUL in the address", "email", map[string]any{"email": marker + "@example.com\x00.evil.example"}, sayToken},
		{"NUL before the address", "email", map[string]any{"email": "\x00" + marker + "@example.com"}, sayToken},
		{"homograph of an address", "email", map[string]any{"email": marker + "\u0430lice@example.com"}, sayToken},
		{"homograph of a domain", "email", map[string]any{"email": marker + "@ex\u0430mple.com"}, sayToken},
		{"over-long address", "email", map[string]any{"email": long + "@example.com"}, sayToken},
		{"two addresses", "email", map[string]any{"email": marker + "@example.com, b@example.com"}, sayToken},
		{"address with a name", "email", map[string]any{"email": marker + " <b@example.com>"}, sayToken},
		{"line break in an address", "email", map[string]any{"email": marker + "@example.com\r\nBcc: b"}, sayToken},
		{"over-long subject", "email", map[string]any{"sub": long}, sayIdentity},
		{"bidirectional text in the subject", "email", map[string]any{"sub": marker + "\u202e"}, sayIdentity},

		{"homograph of a user", "username", map[string]any{"sub": marker + "\u0430"}, sayIdentity},
		{"full width letters", "username", map[string]any{"sub": marker + "\uff41"}, sayIdentity},
		{"user in another domain", "username", map[string]any{"sub": marker + "!other.example"}, sayToken},
		{"user that is an address", "username", map[string]any{"sub": marker + "@example.com"}, sayToken},
		{"over-long user", "username", map[string]any{"sub": long}, sayIdentity},

		{"URI of another host", "uri", map[string]any{"sub": "http://evil.example/" + marker}, sayToken},
		{"URI with a user", "uri", map[string]any{"sub": "http://" + marker + "@127.0.0.1/"}, sayToken},
		{"URI of another scheme", "uri", map[string]any{"sub": "javascript://127.0.0.1/" + marker}, sayToken},
		{"URI that climbs", "uri", map[string]any{"sub": "http://127.0.0.1/" + marker + "/../b"}, sayIdentity},
		{"URI that climbs, encoded", "uri", map[string]any{"sub": "http://127.0.0.1/" + marker + "/%2e%2E/b"}, sayIdentity},
		{"another trust domain", "spiffe", map[string]any{"sub": "spiffe://evil.example/" + marker}, sayToken},
		{"SPIFFE ID with a port", "spiffe", map[string]any{"sub": "spiffe://example.com:1/" + marker}, sayToken},

		{"path that climbs", "github-workflow", workflowClaims(map[string]any{"job_workflow_ref": "o/../../" + marker}), sayIdentity},
		{"path that collapses", "github-workflow", workflowClaims(map[string]any{"job_workflow_ref": "o//" + marker}), sayIdentity},
		{"over-long extension", "github-workflow", workflowClaims(map[string]any{"workflow": long}), sayIdentity},
		{"control character in an extension", "github-workflow", workflowClaims(map[string]any{"workflow": marker + "\x1b[2J"}), sayIdentity},
		{"missing claim", "github-workflow", workflowClaims(map[string]any{"sha": nil, "workflow": marker}), sayToken},

		{"template: host from a claim", "ci", map[string]any{"url": "https://" + marker + "@evil.example", "project": "p", "id": "1"}, sayIdentity},
		{"template: no host", "ci", map[string]any{"url": marker, "project": "p", "id": "1"}, sayIdentity},
		{"template: path that climbs", "ci", map[string]any{"project": marker + "/..", "id": "1"}, sayIdentity},
		{"template: line break", "ci", map[string]any{"project": marker + "\nX: y", "id": "1"}, sayIdentity},
		{"template: NUL", "ci", map[string]any{"project": marker + "\x00", "id": "1"}, sayIdentity},
		{"template: over-long", "ci", map[string]any{"project": long, "id": "1"}, sayIdentity},
		{"template: integer that is rounded", "ci", map[string]any{"project": marker, "id": json.Number("9007199254740993")}, sayIdentity},
		{"template: missing claim", "ci", map[string]any{"project": marker}, sayIdentity},

		{"expired this second", "email", map[string]any{"exp": at(0), "name": marker}, sayToken},
		{"issued beyond the leeway", "email", map[string]any{"iat": at(301 * time.Second), "exp": at(time.Hour), "name": marker}, sayToken},
		{"valid beyond the leeway", "email", map[string]any{"nbf": at(301 * time.Second), "name": marker}, sayToken},
		{"issued after it expires", "email", map[string]any{"iat": at(200 * time.Second), "exp": at(100 * time.Second), "name": marker}, sayToken},
		{"expiry beyond all calendars", "email", map[string]any{"exp": json.Number("1e300"), "name": marker}, sayToken},
		{"expiry that is negative", "email", map[string]any{"exp": -1, "name": marker}, sayToken},
		{"logout token", "email", map[string]any{"events": map[string]any{"http://schemas.openid.net/event/backchannel-logout": marker}}, sayToken},
	}
	for _, test := range rows {
		t.Run(test.name, func(t *testing.T) {
			raw, err := e.providers[test.kind].Token(test.claims)
			if err != nil {
				t.Fatal(err)
			}
			wantFailure(t, e.ask(t, raw, "alice@example.com"), 400, 3, test.message)
			e.wantSilence(t, raw, raw[strings.IndexByte(raw, '.')+1:])
		})
	}
	for name, change := range map[string]func(string) string{
		"claim twice":              func(s string) string { return strings.Replace(s, "{", `{"email":"`+marker+`@example.com",`, 1) },
		"claim twice, one escaped": func(s string) string { return strings.Replace(s, "{", `{"\u0065mail":"`+marker+`@example.com",`, 1) },
		"claim twice, nested":      func(s string) string { return strings.Replace(s, "{", `{"x":[{"a":1,"a":"`+marker+`"}],`, 1) },
		"nested 2,000 deep": func(s string) string {
			return strings.Replace(s, "{", `{"`+marker+`":`+strings.Repeat("[", 2000)+strings.Repeat("]", 2000)+",", 1)
		},
		"huge number": func(s string) string { return strings.Replace(s, "{", `{"`+marker+`":1e99999,`, 1) },
		"number of 4,000 digits": func(s string) string {
			return strings.Replace(s, "{", `{"`+marker+`":`+strings.Repeat("9", 4000)+",", 1)
		},
		"invalid UTF-8":           func(s string) string { return strings.Replace(s, "{", "{\""+marker+"\":\"\xc3\x28\",", 1) },
		"overlong UTF-8":          func(s string) string { return strings.Replace(s, "{", "{\""+marker+"\":\"\xc0\x80\",", 1) },
		"surrogate in UTF-8":      func(s string) string { return strings.Replace(s, "{", "{\""+marker+"\":\"\xed\xa0\x80\",", 1) },
		"half a surrogate in sub": func(s string) string { return strings.Replace(s, `"alice-id"`, `"`+marker+`\ud800"`, 1) },
		"more after the claims":   func(s string) string { return s + `{"sub":"` + marker + `"}` },
		"byte order mark":         func(s string) string { return "\ufeff" + s },
	} {
		t.Run(name, func(t *testing.T) {
			claims, err := json.Marshal(e.providers["email"].Claims(nil))
			if err != nil {
				t.Fatal(err)
			}
			raw, err := e.providers["email"].Sign([]byte(change(string(claims))))
			if err != nil {
				t.Fatal(err)
			}
			want := sayToken
			if strings.HasPrefix(name, "half a surrogate") {
				want = sayIdentity
			}
			wantFailure(t, e.ask(t, raw, "alice@example.com"), 400, 3, want)
			e.wantSilence(t, raw)
		})
	}
	if n := len(e.Log.Leaves()); n != 0 || e.Key.Count() != 0 {
		t.Errorf("refused requests left %d leaves and %d signatures", n, e.Key.Count())
	}
	// Clocks may differ by the leeway, and a template makes what it should.
	for _, test := range []struct {
		kind   string
		claims map[string]any
		proof  string
	}{
		{"email", map[string]any{"iat": at(299 * time.Second), "nbf": at(299 * time.Second), "exp": at(time.Hour)}, "alice@example.com"},
		{"ci", map[string]any{"project": "a{{.url}}b", "id": 7}, "alice-id"},
	} {
		raw, err := e.providers[test.kind].Token(test.claims)
		if err != nil {
			t.Fatal(err)
		}
		if cert := leafOf(t, e.ask(t, raw, test.proof)); test.kind == "ci" && cert.URIs[0].String() != "https://ci.example/a%7B%7B.url%7D%7Db/7" {
			t.Errorf("SAN %v", cert.URIs)
		}
	}
}

// spki encodes a public key that crypto/x509 would not.
func spki(t *testing.T, algorithm pkix.AlgorithmIdentifier, key []byte) []byte {
	t.Helper()
	der, err := asn1.Marshal(struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}{algorithm, asn1.BitString{Bytes: key, BitLength: 8 * len(key)}})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// csrOf encodes a request for a public key with a signature by nobody.
func csrOf(t *testing.T, spki []byte) []byte {
	t.Helper()
	type info struct {
		Version    int
		Subject    asn1.RawValue
		Key        asn1.RawValue
		Attributes asn1.RawValue
	}
	der, err := asn1.Marshal(struct {
		Info      info
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{
		info{0, asn1.RawValue{FullBytes: []byte{0x30, 0}}, asn1.RawValue{FullBytes: spki}, asn1.RawValue{FullBytes: []byte{0xa0, 0}}},
		pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}},
		asn1.BitString{Bytes: []byte{0x30, 0}, BitLength: 16},
	})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// TestBadKeys: odd keys, as a public key and in a request.
func TestBadKeys(t *testing.T) {
	e := buildEmbassy(t, nil)
	raw, err := e.providers["email"].Token(nil)
	if err != nil {
		t.Fatal(err)
	}
	key := idptest.Key(t)
	rsaOf := func(n *big.Int, exponent int) []byte {
		der, err := x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: n, E: exponent})
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	ofSize := func(bits int) *big.Int {
		n := new(big.Int).Mod(key.N, new(big.Int).Lsh(big.NewInt(1), uint(bits-1)))
		return n.SetBit(n, bits-1, 1)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der := func(pub crypto.PublicKey) []byte {
		b, err := x509.MarshalPKIXPublicKey(pub)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	curve := func(oid asn1.ObjectIdentifier, size int) []byte {
		parameters, err := asn1.Marshal(oid)
		if err != nil {
			t.Fatal(err)
		}
		point := append([]byte{4}, make([]byte, 2*size)...)
		return spki(t, pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}, Parameters: asn1.RawValue{FullBytes: parameters}}, point)
	}
	offCurve := der(e.key.Public())
	offCurve[len(offCurve)-1] ^= 1
	infinity := spki(t, pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1},
		Parameters: asn1.RawValue{FullBytes: []byte{6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7}}}, []byte{0})
	smooth := new(big.Int).Sub(key.N, new(big.Int).Mod(key.N, big.NewInt(3)))
	neutral := append([]byte{1}, make([]byte, 31)...)

	for _, test := range []struct {
		name string
		spki []byte
		weak bool // or it cannot be read
	}{
		{"RSA of 1024 bits", rsaOf(ofSize(1024), 65537), true},
		{"RSA of 2049 bits", rsaOf(ofSize(2049), 65537), true},
		{"RSA of 8192 bits", rsaOf(new(big.Int).SetBit(key.N, 8191, 1), 65537), true},
		{"RSA with e = 3", rsaOf(key.N, 3), true},
		{"RSA with e = 65539", rsaOf(key.N, 65539), true},
		{"RSA with a small factor", rsaOf(smooth, 65537), true},
		{"P-224", der(p224.Public()), true},
		{"Ed25519 of small order", spki(t, pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 3, 101, 112}}, neutral), true},
		{"X25519", spki(t, pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 3, 101, 110}}, neutral), true},
		{"Ed448", spki(t, pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 3, 101, 113}}, make([]byte, 57)), false},
		{"secp256k1", curve(asn1.ObjectIdentifier{1, 3, 132, 0, 10}, 32), false},
		{"brainpoolP256r1", curve(asn1.ObjectIdentifier{1, 3, 36, 3, 3, 2, 8, 1, 1, 7}, 32), false},
		{"SM2", curve(asn1.ObjectIdentifier{1, 2, 156, 10197, 1, 301}, 32), false},
		{"point off the curve", offCurve, false},
		{"point at infinity", infinity, false},
		{"octets after the key", append(der(e.key.Public()), 0), false},
		{"key cut short", der(e.key.Public())[:60], false},
	} {
		t.Run(test.name, func(t *testing.T) {
			asKey, asCSR := sayKey, sayCSR
			if test.weak {
				asKey, asCSR = sayWeak, sayWeak
			}
			if test.name == "Ed448" {
				asCSR = sayWeak // a request can be read without its key
			}
			proof := prove(t, e.key, "alice@example.com")
			content := string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: test.spki}))
			wantFailure(t, e.do(http.MethodPost, PathSigningCert, body(t, raw, content, proof), nil), 400, 3, asKey)
			request := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csrOf(t, test.spki)})
			wantFailure(t, e.do(http.MethodPost, PathSigningCert, csrBody(t, raw, request), nil), 400, 3, asCSR)
		})
	}

	good := csr(t, e.key, x509.ECDSAWithSHA256)
	block, _ := pem.Decode(good)
	changed := func(at int) []byte {
		b := append([]byte{}, block.Bytes...)
		b[at] ^= 1
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: b})
	}
	trailing := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: append(append([]byte{}, block.Bytes...), 0)})
	for name, test := range map[string]struct {
		csr     []byte
		message string
	}{
		"signature of another": {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csrOf(t, der(e.key.Public()))}), saySignature},
		"signature changed":    {changed(len(block.Bytes) - 1), saySignature},
		"octets after it":      {trailing, sayCSR},
		"two requests":         {append(append([]byte{}, good...), good...), sayCSR},
		"text after it":        {append(append([]byte{}, good...), marker...), sayCSR},
		"another block":        {[]byte(strings.ReplaceAll(string(good), "CERTIFICATE REQUEST", "CERTIFICATE")), sayCSR},
		"64 KiB and more":      {append([]byte(strings.Repeat(marker+"\n", 20_000)), good...), sayCSR},
	} {
		t.Run(name, func(t *testing.T) {
			wantFailure(t, e.do(http.MethodPost, PathSigningCert, csrBody(t, raw, test.csr), nil), 400, 3, test.message)
		})
	}
	e.wantSilence(t, raw, base64.StdEncoding.EncodeToString(good))
	if n := len(e.Log.Leaves()); n != 0 || e.Key.Count() != 0 {
		t.Errorf("refused requests left %d leaves and %d signatures", n, e.Key.Count())
	}
}

// TestProviderTurns: a provider that was well and then answers with nonsense
// takes nothing away from the tokens of the keys that it had, and a token of
// another key is the client's fault, not a 5xx.
func TestProviderTurns(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("another server was asked") }))
	defer elsewhere.Close()
	for name, answer := range map[string]http.HandlerFunc{
		"10 MiB":               idptest.Flood,
		"10,000 keys":          idptest.ManyKeys,
		"redirect to loopback": func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, elsewhere.URL, http.StatusFound) },
		"redirect to metadata": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://169.254.169.254/", http.StatusMovedPermanently)
		},
		"another issuer": func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, `{"issuer":"https://evil.example","jwks_uri":"https://evil.example"}`)
		},
		"keys at a private host": func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, `{"issuer":"http://%s","jwks_uri":"https://10.0.0.1/keys"}`, r.Host)
		},
		"an error": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) },
		"a page":   func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>"+marker) },
	} {
		t.Run(name, func(t *testing.T) {
			var turned atomic.Bool
			e := buildEmbassy(t, func(well http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if turned.Load() {
						answer(w, r)
						return
					}
					well.ServeHTTP(w, r)
				})
			})
			idp := e.providers["email"]
			token := func() string {
				raw, err := idp.Token(nil)
				if err != nil {
					t.Fatal(err)
				}
				return raw
			}
			known := token()
			leafOf(t, e.ask(t, known, "alice@example.com"))
			turned.Store(true)
			if _, err := idp.Rotate(nil); err != nil {
				t.Fatal(err)
			}
			wantFailure(t, e.ask(t, token(), "alice@example.com"), 400, 3, sayToken)
			leafOf(t, e.ask(t, known, "alice@example.com"))
			// The request may have waited for less than the fetch needed.
			idptest.Until(t, "the provider's fault in its health", func() bool {
				return slices.ContainsFunc(e.server.cfg.Identity.Health(), func(h identity.IssuerHealth) bool {
					return h.Issuer == idp.Issuer() && h.Err != nil && h.Keys == 1
				})
			})
			if health := e.server.cfg.Identity.Health(); len(health) != len(e.providers) {
				t.Errorf("health of %d issuers", len(health))
			}
			turned.Store(false)
			// It is asked again now, by the request or by a retry.
			idptest.Until(t, "faith in a provider that is well again", func() bool {
				return e.ask(t, token(), "alice@example.com").Code == http.StatusOK
			})
		})
	}
}

// TestSlowBodies: a body that stops, or comes by drops, ends when the listener's
// time for it is over, as the client's fault and with nothing of it in the log,
// and keeps nobody from a certificate.
func TestSlowBodies(t *testing.T) {
	e := buildEmbassy(t, nil)
	raw, err := e.providers["email"].Token(nil)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(e.echo)
	srv.Config.ReadTimeout, srv.Config.ReadHeaderTimeout = 300*time.Millisecond, time.Minute
	srv.Start()
	defer srv.Close()
	good := body(t, raw, publicPEM(t, e.key.Public()), prove(t, e.key, "alice@example.com"))
	half := strings.Replace(good, "{", `{"`+marker+`":1,`, 1)[:len(good)/2]
	for name, rest := range map[string]func(net.Conn) error{
		"stops": func(net.Conn) error { return nil },
		"by drops": func(c net.Conn) error {
			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); {
				if _, err := c.Write([]byte(" ")); err != nil {
					return nil // hung up, as it should
				}
				<-tick.C
			}
			return errors.New("the drops are read on and on")
		},
	} {
		for _, path := range []string{PathSigningCert, PathLegacySigningCert} {
			c, err := net.Dial("tcp", srv.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: 100000\r\n\r\n%s", path, raw, half); err != nil {
				t.Fatal(err)
			}
			if err := rest(c); err != nil {
				t.Errorf("%s, %s: %v", name, path, err)
			}
			_ = c.SetReadDeadline(time.Now().Add(2 * time.Minute))
			text, err := io.ReadAll(c)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s, %s: the connection stays open", name, path)
			}
			if !bytes.HasPrefix(text, []byte("HTTP/1.1 408 ")) {
				t.Errorf("%s, %s: %.100q", name, path, text)
			}
			_ = c.Close()
		}
	}
	leafOf(t, e.ask(t, raw, "alice@example.com"))
	idptest.Until(t, "a line for each", func() bool { return strings.Count(e.all.String(), "request refused") == 4 })
	e.wantSilence(t, raw)
	if n := strings.Count(e.all.String(), "status=408"); n != 4 {
		t.Errorf("%d of 4 are the client's fault: %s", n, e.all.String())
	}
}

// TestSlowBodyOverHTTP2 is the same for a stream of a connection that others use.
func TestSlowBodyOverHTTP2(t *testing.T) {
	e := buildEmbassy(t, nil)
	// A ReadTimeout would be the time for the handshake, too.
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := http.NewResponseController(w).SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
			t.Error(err)
		}
		e.echo.ServeHTTP(w, r)
	}))
	srv.EnableHTTP2 = true
	srv.StartTLS()
	defer srv.Close()
	late, end := io.Pipe()
	defer end.Close()
	resp, err := srv.Client().Post(srv.URL+PathSigningCert, "application/json", late)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.ProtoMajor != 2 || resp.StatusCode != http.StatusRequestTimeout {
		t.Errorf("HTTP/%d, status %d", resp.ProtoMajor, resp.StatusCode)
	}
}
