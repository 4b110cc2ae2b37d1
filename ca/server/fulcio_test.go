package server

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	fulcio "github.com/sigstore/fulcio/pkg/generated/protobuf"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/chancery-ca/chancery/ca/internal/catest"
	"github.com/chancery-ca/chancery/ca/internal/idptest"
)

// answer is what a client makes of an answer: of a failure status, code and
// message, of a certificate its names and extensions.
type answer struct {
	Status     int
	Type       string
	Code       int
	Message    string
	Extensions map[string]string // of the leaf, by OID: names and Fulcio's
	Chain      int               // certificates
}

// TestLikeFulcioServer asks the program of Fulcio 1.8.8 and us the same, row by
// row of its tables: status, code, sentence, names and extensions are the same,
// but for the rows that say how and why we differ. CHANCERY_PEER names the folder
// of the program (make test-fulcio builds it).
func TestLikeFulcioServer(t *testing.T) {
	programs := os.Getenv("CHANCERY_PEER")
	if programs == "" {
		t.Skip("CHANCERY_PEER names no folder of Fulcio's program: make test-fulcio")
	}
	h := build(t, nil)
	theirs := startFulcio(t, filepath.Join(programs, "fulcio"), h)

	// Valid by our clock, which stands still, and by theirs.
	years := map[string]any{"exp": catest.Noon.AddDate(10, 0, 0).Unix()}
	token := h.token(t, years)
	claims := func(change map[string]any) string {
		all := map[string]any{}
		for _, m := range []map[string]any{years, change} {
			for name, v := range m {
				all[name] = v
			}
		}
		return h.token(t, all)
	}
	key, proof := publicPEM(t, h.key.Public()), prove(t, h.key, "alice@example.com")
	good := body(t, token, key, proof)
	withToken := func(change map[string]any) string { return body(t, claims(change), key, proof) }
	workflow, err := h.gh.Token(workflowClaims(years))
	if err != nil {
		t.Fatal(err)
	}
	p224, p384 := must(ecdsa.GenerateKey(elliptic.P224(), rand.Reader)), must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
	rsa1024, rsa2048 := must(rsa.GenerateKey(rand.Reader, 1024)), must(rsa.GenerateKey(rand.Reader, 2048))
	bearer := map[string]string{"Authorization": "Bearer " + token}
	replace := func(pairs ...string) string { return strings.NewReplacer(pairs...).Replace(good) }
	post := func(text string) *http.Request { return ask(http.MethodPost, PathSigningCert, text, nil) }
	// Their sentence quotes the request, in which the token is.
	unread := &answer{Status: 400, Type: "application/json", Code: 3, Message: "The request could not be parsed"}
	v1 := func(v map[string]any) string { return marshal(t, v) }
	pub := map[string]any{"content": []byte(key), "algorithm": "ecdsa"}

	for _, test := range []struct {
		name string
		req  *http.Request
		// ours is our answer where it is not Fulcio's.
		ours *answer
	}{
		{name: "token in the body", req: post(good)},
		{name: "token in the header", req: ask(http.MethodPost, PathSigningCert, body(t, "", key, proof), bearer)},
		{name: "both, and the body wins", req: ask(http.MethodPost, PathSigningCert, good, map[string]string{"Authorization": "Bearer x"})},
		{name: "workflow", req: post(body(t, workflow, key, prove(t, h.key, "repo:o/r")))},
		{name: "CSR", req: post(csrBody(t, token, csr(t, h.key, x509.ECDSAWithSHA256)))},
		{name: "CSR of P-384", req: post(csrBody(t, token, csr(t, p384, x509.ECDSAWithSHA384)))},
		{name: "CSR of RSA", req: post(csrBody(t, token, csr(t, rsa2048, x509.SHA256WithRSA)))},
		{name: "unknown field", req: post(replace(`{"credentials"`, `{"colour":[1],"credentials"`))},
		{name: "snake case", req: post(replace("oidcIdentityToken", "oidc_identity_token", "publicKeyRequest", "public_key_request"))},
		{name: "no algorithm", req: post(replace(`"algorithm":"ECDSA",`, ""))},
		{name: "another algorithm", req: post(replace(`"ECDSA"`, `"RSA_PSS"`))},
		// The gateway discards a name that it does not know, as an unknown field.
		{name: "unknown algorithm", req: post(replace(`"ECDSA"`, `"ROT13"`))},
		{name: "algorithm in lower case", req: post(replace(`"ECDSA"`, `"ecdsa"`))},
		{name: "number of no algorithm", req: post(replace(`"ECDSA"`, `99`))},
		{name: "algorithm that is a list", req: post(replace(`"ECDSA"`, `[]`)), ours: unread},

		{name: "no body", req: post("")},
		{name: "empty message", req: post("{}")},
		{name: "no token", req: post(body(t, "", key, proof))},
		{name: "token that is none", req: post(body(t, "x.y.z", key, proof))},
		{name: "expired", req: post(withToken(map[string]any{"exp": 1}))},
		{name: "another audience", req: post(withToken(map[string]any{"aud": "other"}))},
		{name: "unknown issuer", req: post(withToken(map[string]any{"iss": "https://unknown.example"}))},
		{name: "not verified", req: post(withToken(map[string]any{"email_verified": false}))},
		{name: "no address", req: post(withToken(map[string]any{"email": nil}))},
		{name: "not valid yet", req: post(withToken(map[string]any{"nbf": catest.Noon.AddDate(9, 0, 0).Unix()}))},
		{name: "no time of issue", req: post(withToken(map[string]any{"iat": nil}))},
		{name: "token before key", req: post(body(t, "x.y.z", "nonsense", nil))},

		{name: "no key", req: post(body(t, token, "", proof))},
		{name: "nonsense for a key", req: post(body(t, token, "nonsense", proof))},
		{name: "RSA-1024", req: post(body(t, token, publicPEM(t, rsa1024.Public()), proof))},
		{name: "P-224", req: post(body(t, token, publicPEM(t, p224.Public()), proof))},
		{name: "no proof", req: post(body(t, token, key, nil))},
		{name: "proof by another key", req: post(body(t, token, publicPEM(t, p384.Public()), proof))},
		{name: "proof of another identity", req: post(body(t, token, key, prove(t, h.key, "bob@example.com")))},
		{name: "nonsense for a CSR", req: post(csrBody(t, token, []byte("nonsense")))},
		{name: "CSR of RSA-1024", req: post(csrBody(t, token, csr(t, rsa1024, x509.SHA256WithRSA)))},
		{name: "CSR of P-384 with SHA-256", req: post(csrBody(t, token, csr(t, p384, x509.ECDSAWithSHA256)))},
		{name: "CSR with RSA-PSS", req: post(csrBody(t, token, csr(t, rsa2048, x509.SHA256WithRSAPSS)))},

		{name: "not JSON", req: post("hello"), ours: unread},
		{name: "a list", req: post("[]"), ours: unread},
		{name: "field twice", req: post(replace(`{"credentials"`, `{"credentials":{},"credentials"`)), ours: unread},
		{name: "invalid base64", req: post(replace(`"proofOfPossession":"`, `"proofOfPossession":"!`)), ours: unread},
		// The status for it; theirs is 400.
		{name: "body of 5 MiB", req: post(strings.Repeat(" ", 5<<20)), ours: &answer{Status: 413, Type: "application/json", Code: 8, Message: "The request is larger than 4 MiB"}},

		{name: "GET for POST", req: ask(http.MethodGet, PathSigningCert, "", nil)},
		{name: "POST for GET", req: ask(http.MethodPost, PathTrustBundle, "{}", nil)},

		{name: "v1", req: ask(http.MethodPost, PathLegacySigningCert, v1(map[string]any{"publicKey": pub, "signedEmailAddress": proof}), bearer)},
		{name: "v1 with a CSR", req: ask(http.MethodPost, PathLegacySigningCert, v1(map[string]any{"certificateSigningRequest": csr(t, h.key, x509.ECDSAWithSHA256)}), bearer)},
		{name: "v1, unknown algorithm", req: ask(http.MethodPost, PathLegacySigningCert, v1(map[string]any{"publicKey": map[string]any{"content": []byte(key), "algorithm": "rot13"}, "signedEmailAddress": proof}), bearer)},
		{name: "v1, no token", req: ask(http.MethodPost, PathLegacySigningCert, v1(map[string]any{"publicKey": pub, "signedEmailAddress": proof}), nil)},
		{name: "v1, no key", req: ask(http.MethodPost, PathLegacySigningCert, "{}", bearer)},
		{name: "v1, another's proof", req: ask(http.MethodPost, PathLegacySigningCert, v1(map[string]any{"publicKey": pub, "signedEmailAddress": []byte("x")}), bearer)},
	} {
		t.Run(test.name, func(t *testing.T) {
			want := theirs(t, test.req)
			rec := httptest.NewRecorder()
			h.echo.ServeHTTP(rec, test.req.Clone(t.Context()))
			got := read(t, rec.Result(), rec.Body.Bytes())
			if test.ours != nil {
				if cmp.Equal(want, got) {
					t.Error("no difference is left")
				}
				want = *test.ours
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("-Fulcio +ours:\n%s", d)
			}
		})
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// ask makes a request whose body can be read again and again.
func ask(method, path, text string, header map[string]string) *http.Request {
	req := httptest.NewRequest(method, path, nil)
	req.Body = &again{strings.NewReader(text)}
	req.ContentLength = int64(len(text))
	for name, v := range header {
		req.Header.Set(name, v)
	}
	return req
}

// again is a body that begins again when it is closed.
type again struct{ *strings.Reader }

func (a *again) Close() error {
	_, err := a.Seek(0, io.SeekStart)
	return err
}

// read takes an answer apart.
func read(t *testing.T, resp *http.Response, text []byte) answer {
	t.Helper()
	a := answer{Status: resp.StatusCode, Type: resp.Header.Get("Content-Type")}
	var leaf []byte
	switch {
	case resp.StatusCode >= http.StatusBadRequest:
		if err := json.Unmarshal(text, &a); err != nil {
			a.Message = string(text)
		}
		return a
	case a.Type == mimeChain:
		leaf, a.Chain = text, bytes.Count(text, []byte("BEGIN CERTIFICATE"))
	default:
		var msg fulcio.SigningCertificate
		if err := protojson.Unmarshal(text, &msg); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		chain := append(msg.GetSignedCertificateEmbeddedSct().GetChain().GetCertificates(), msg.GetSignedCertificateDetachedSct().GetChain().GetCertificates()...)
		leaf, a.Chain = []byte(chain[0]), len(chain)
	}
	block, _ := pem.Decode(leaf)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	a.Extensions = map[string]string{}
	for _, e := range cert.Extensions {
		if id := e.Id.String(); id == "2.5.29.17" || strings.HasPrefix(id, "1.3.6.1.4.1.57264.") {
			a.Extensions[id] = fmt.Sprintf("%v %x", e.Critical, e.Value)
		}
	}
	a.Chain = min(a.Chain, 2) // their CA here is a root itself
	return a
}

// startFulcio runs Fulcio with a CA in memory and no log, for the issuers of h,
// and returns what asks it.
func startFulcio(t *testing.T, program string, h *house) func(*testing.T, *http.Request) answer {
	t.Helper()
	dir := t.TempDir()
	config := filepath.Join(dir, "config.yaml")
	text := fmt.Sprintf("oidc-issuers:\n  %[1]s: {issuer-url: %[1]q, client-id: sigstore, type: email}\n  %[2]s: {issuer-url: %[2]q, client-id: sigstore, type: github-workflow}\n",
		h.idp.Issuer(), h.gh.Issuer())
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Timeout: 2 * time.Minute, Transport: &http.Transport{}}
	t.Cleanup(client.CloseIdleConnections)
	base := runFulcio(t, client, program, config)
	for tries := 1; base == "" && tries < 5; tries++ {
		base = runFulcio(t, client, program, config)
	}
	if base == "" {
		t.Fatal("Fulcio does not come up")
	}
	return func(t *testing.T, req *http.Request) answer {
		t.Helper()
		out, err := http.NewRequestWithContext(t.Context(), req.Method, base+req.URL.Path, req.Body)
		if err != nil {
			t.Fatal(err)
		}
		out.Header, out.ContentLength = req.Header, req.ContentLength
		resp, err := client.Do(out)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return read(t, resp, text)
	}
}

// runFulcio returns the URL at which Fulcio answers, or "" when it ended, as it
// does when somebody took a port after it was chosen. Its HTTP server has an
// address of its own, so that nobody else answers there; its gateway wants gRPC at
// localhost.
func runFulcio(t *testing.T, client *http.Client, program, config string) string {
	t.Helper()
	part := make([]byte, 3)
	if _, err := rand.Read(part); err != nil {
		t.Fatal(err)
	}
	host := fmt.Sprintf("127.%d.%d.%d", 1+part[0]/2, part[1], 1+part[2]/2)
	port := freePort(t, host)
	ctx, stop := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, program, "serve", "--ca=ephemeralca", "--ct-log-url=", "--config-path="+config,
		"--host="+host, "--port="+port, "--grpc-host=127.0.0.1", "--grpc-port="+freePort(t, "127.0.0.1"),
		"--metrics-port="+freePort(t, host), "--legacy-unix-domain-socket="+filepath.Join(t.TempDir(), "legacy.sock"))
	var log idptest.Log
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		stop()
		<-ended
		if t.Failed() {
			t.Logf("%.4000s", log.String())
		}
	})
	base := "http://" + net.JoinHostPort(host, port)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); {
		resp, err := client.Get(base + "/healthz")
		if err == nil {
			_ = resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return base
			}
		}
		select {
		case <-ended:
			return ""
		case <-tick.C:
		}
	}
	return ""
}

// freePort is a port on which nobody listens.
func freePort(t *testing.T, host string) string {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}
