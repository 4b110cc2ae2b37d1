package test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/google/certificate-transparency-go/ctutil"
	"github.com/google/certificate-transparency-go/x509util"

	"github.com/chancery-ca/chancery/ca/identity/oidctest"
	"github.com/chancery-ca/chancery/log/ct/cttest"
)

// provider is an identity provider on https, as `chancery serve` wants it.
type provider struct {
	*oidctest.Provider
	ca string // PEM
}

func startProvider(t *testing.T) provider {
	t.Helper()
	var handler http.Handler
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { handler.ServeHTTP(w, r) }))
	t.Cleanup(srv.Close)
	p := oidctest.New(oidctest.Config{Issuer: srv.URL, Email: user})
	handler = p
	return provider{p, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}))}
}

// site is a Chancery of its own in a demo's folder, run by `chancery serve`.
type site struct {
	*demo
	whole  *testing.T // the test at whose end the site stops
	config string     // path
	env    []string

	// operator is the address at which a service with a CA says how it is; "" for
	// one without.
	operator string
}

// newSite makes the keys and certificates of a site.
func newSite(t *testing.T) *site {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "site")
	must(t, nil, binary(t, "chancery"), "demo", "--once", "--dir", dir)
	s := &site{demo: &demo{t: t, dir: dir}, whole: t, config: filepath.Join(dir, "serve.yaml"),
		env: []string{"SOFTHSM2_CONF=" + filepath.Join(dir, "tokens", "softhsm2.conf")}}
	s.connect()
	return s
}

// configure writes the site's configuration: the demo's with another identity
// provider, another CT log and empty logs of its own.
func (s *site) configure(t *testing.T, idp provider, ct map[string]any) {
	t.Helper()
	var config map[string]any
	if err := yaml.Unmarshal(s.read("chancery.yaml"), &config); err != nil {
		t.Fatal(err)
	}
	config["ct"], config["state"] = ct, filepath.Join(s.dir, "serve-state")
	config["ca"] = map[string]any{
		"private-networks": []string{"127.0.0.0/8"},
		"oidc-issuers": map[string]any{idp.Issuer(): map[string]any{
			"issuer-url": idp.Issuer(), "client-id": "sigstore", "type": "email", "ca-cert": idp.ca,
		}},
	}
	s.write(t, config)
}

// configureAlone makes the site a CT log and nothing else.
func (s *site) configureAlone(t *testing.T, ct map[string]any) {
	t.Helper()
	var config map[string]any
	if err := yaml.Unmarshal(s.read("chancery.yaml"), &config); err != nil {
		t.Fatal(err)
	}
	delete(config, "ca")
	delete(config, "rekor")
	config["only"], config["ct"], config["state"] = "ct", ct, filepath.Join(s.dir, "serve-state")
	s.write(t, config)
}

// write writes the site's configuration.
func (s *site) write(t *testing.T, config map[string]any) {
	t.Helper()
	s.operator = ""
	if _, ok := config["ca"]; ok {
		s.operator = freePort(t)
		config["operator"] = s.operator
	}
	raw, err := yaml.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.config, raw, 0o600); err != nil {
		t.Fatal(err)
	}
}

// serve runs the site until the function that it returns is called, or the
// whole test ends.
func (s *site) serve() (stop func()) {
	t := s.whole
	t.Helper()
	notifications, log := listenNotify(t), new(syncBuffer)
	cmd := exec.Command(binary(t, "chancery"), "serve", "--config", s.config)
	cmd.Env = append(append(os.Environ(), s.env...), "NOTIFY_SOCKET="+notifications.path)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	stop = func() {
		if cmd == nil {
			return
		}
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := <-ended; err != nil {
			t.Errorf("serve ended with %v\n%s", err, log)
		}
		cmd = nil
		s.http.CloseIdleConnections()
	}
	t.Cleanup(stop)
	notifications.await(t, "READY=1")
	s.awaitKeys(t)
	return stop
}

// awaitKeys waits until the service has the keys of its identity providers: it
// is ready before, and a request waits for them only a while, which on a busy
// machine may be too short.
func (s *site) awaitKeys(t *testing.T) {
	t.Helper()
	if s.operator == "" {
		return
	}
	eventually(t, "keys of every issuer", func() bool {
		resp, err := http.Get("http://" + s.operator + "/status")
		if err != nil {
			t.Fatal(err)
		}
		var status struct{ Issuers []struct{ Keys int } }
		if err := json.Unmarshal(s.body(resp, "status", http.StatusOK), &status); err != nil || len(status.Issuers) == 0 {
			t.Fatalf("status %+v, %v", status, err)
		}
		return !slices.ContainsFunc(status.Issuers, func(i struct{ Keys int }) bool { return i.Keys == 0 })
	})
}

// certificate asks for a certificate and expects status; it returns the leaf
// (nil unless 200), its issuers in PEM, and the answer.
func (s *site) certificate(t *testing.T, idp provider, status int) (leaf *x509.Certificate, issuers []byte, body string) {
	t.Helper()
	token, err := idp.Token(nil)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	raw := s.post("/api/v2/signingCert", "application/json", signingRequest(t, key, token, user), status)
	if status != http.StatusOK {
		return nil, nil, string(raw)
	}
	var answer struct {
		Embedded struct {
			Chain struct{ Certificates []string } `json:"chain"`
		} `json:"signedCertificateEmbeddedSct"`
	}
	if err := json.Unmarshal(raw, &answer); err != nil || len(answer.Embedded.Chain.Certificates) != 3 {
		t.Fatalf("answer %.300s: %v", raw, err)
	}
	block, _ := pem.Decode([]byte(answer.Embedded.Chain.Certificates[0]))
	if leaf, err = x509.ParseCertificate(block.Bytes); err != nil {
		t.Fatal(err)
	}
	return leaf, []byte(strings.Join(answer.Embedded.Chain.Certificates[1:], "\n")), string(raw)
}

// TestLogElsewhere: one Chancery is the CT log of another, which knows it by
// URL and key.
func TestLogElsewhere(t *testing.T) {
	needSoftHSM(t)
	idp := startProvider(t)
	log, branch := newSite(t), newSite(t)
	log.configure(t, idp, map[string]any{"shard": "ct1", "origin": "log.test.example/ct/ct1", "roots": []string{branch.path("trust", "root.pem")}})
	elsewhere := map[string]any{"url": log.url + "/ct/ct1", "key": log.path("trust", "ct.pub"), "tls-roots": log.path("tls-ca.pem")}
	branch.configure(t, idp, elsewhere)
	for s, made := range map[*site]string{log: "logs ct1 and log1 in", branch: "logs log1 in"} {
		if out := must(t, s.env, binary(t, "chancery"), "init", "--config", s.config); !strings.Contains(out, made) {
			t.Errorf("init says %q, want %q", out, made)
		}
	}
	stopLog := log.serve()
	stopBranch := branch.serve()

	leaf, issuers, _ := branch.certificate(t, idp, http.StatusOK)
	checkCT(t, log.demo, leaf, issuers)
	own, issuers, _ := log.certificate(t, idp, http.StatusOK)
	checkCT(t, log.demo, own, issuers)
	branch.get("/ct/ct1/ct/v1/get-sth", http.StatusNotFound)

	t.Run("log away and back", func(t *testing.T) {
		stopLog()
		if _, _, body := branch.certificate(t, idp, http.StatusServiceUnavailable); !strings.Contains(body, "try again") {
			t.Errorf("answer %s", body)
		}
		branch.get("/readyz", http.StatusServiceUnavailable)
		log.serve()
		leaf, issuers, _ := branch.certificate(t, idp, http.StatusOK)
		checkCT(t, log.demo, leaf, issuers)
	})
	t.Run("another key", func(t *testing.T) {
		stopBranch()
		elsewhere["key"] = branch.path("trust", "ct.pub")
		branch.configure(t, idp, elsewhere)
		stop := branch.serve()
		defer stop()
		if _, _, body := branch.certificate(t, idp, http.StatusInternalServerError); !strings.Contains(body, "Error entering certificate in CTL") {
			t.Errorf("answer %s", body)
		}
	})
	t.Run("a root that the log does not accept", func(t *testing.T) {
		chain := branch.read("trust", "chain.pem")
		block, _ := pem.Decode(chain)
		stranger := newSite(t)
		other, _ := pem.Decode(stranger.read("trust", "chain.pem"))
		for name, row := range map[string]struct {
			der    []byte
			status int
		}{"accepted": {block.Bytes, http.StatusOK}, "unknown": {other.Bytes, http.StatusBadRequest}} {
			body, err := json.Marshal(map[string][][]byte{"chain": {row.der}})
			if err != nil {
				t.Fatal(err)
			}
			if got := log.post("/ct/ct1/ct/v1/add-chain", "application/json", body, row.status); bytes.Contains(got, []byte("timestamp")) != (row.status == http.StatusOK) {
				t.Errorf("%s: %s", name, got)
			}
		}
	})
}

// TestLogAlone: a Chancery that is a CT log and nothing else serves a CA
// elsewhere.
func TestLogAlone(t *testing.T) {
	needSoftHSM(t)
	idp := startProvider(t)
	log, branch := newSite(t), newSite(t)
	log.configureAlone(t, map[string]any{"shard": "ct1", "origin": "log.test.example/ct/ct1", "roots": []string{branch.path("trust", "root.pem")}})
	branch.configure(t, idp, map[string]any{"url": log.url + "/ct/ct1", "key": log.path("trust", "ct.pub"), "tls-roots": log.path("tls-ca.pem")})
	for s, made := range map[*site]string{log: "logs ct1 in", branch: "logs log1 in"} {
		if out := must(t, s.env, binary(t, "chancery"), "init", "--config", s.config); !strings.Contains(out, made) {
			t.Errorf("init says %q, want %q", out, made)
		}
	}
	stop := log.serve()
	branch.serve()
	leaf, issuers, _ := branch.certificate(t, idp, http.StatusOK)
	checkCT(t, log.demo, leaf, issuers)
	log.get("/readyz", http.StatusOK)
	for _, path := range []string{"/api/v2/trustBundle", "/api/v2/checkpoint", "/api/v1/timestamp"} {
		log.get(path, http.StatusNotFound)
	}
	// Its own CA's root is a stranger's here.
	block, _ := pem.Decode(log.read("trust", "chain.pem"))
	body, err := json.Marshal(map[string][][]byte{"chain": {block.Bytes}})
	if err != nil {
		t.Fatal(err)
	}
	log.post("/ct/ct1/ct/v1/add-chain", "application/json", body, http.StatusBadRequest)
	stop()

	// A root's file that is not there is not a log that is not there.
	log.configureAlone(t, map[string]any{"shard": "ct1", "origin": "log.test.example/ct/ct1", "roots": []string{log.path("none.pem")}})
	r := command(t, log.env, binary(t, "chancery"), "serve", "--config", log.config)
	if r.code != 1 || !strings.Contains(lastError(r.stderr), "none.pem") || strings.Contains(r.stderr, "chancery init") {
		t.Errorf("exit status %d\n%s", r.code, r.stderr)
	}
}

// TestLogOfOthers: a Chancery whose CT log is ctfe.
func TestLogOfOthers(t *testing.T) {
	needSoftHSM(t)
	idp, branch := startProvider(t), newSite(t)
	block, _ := pem.Decode(branch.read("trust", "root.pem"))
	root, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	log := cttest.New(t, []*x509.Certificate{root}, cttest.Options{})
	der, err := x509.MarshalPKIXPublicKey(log.Key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		"other-ct.pub":  {Type: "PUBLIC KEY", Bytes: der},
		"other-tls.pem": {Type: "CERTIFICATE", Bytes: log.Server.Certificate().Raw},
	} {
		if err := os.WriteFile(branch.path(name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	branch.configure(t, idp, map[string]any{"url": log.URL(), "key": "other-ct.pub", "tls-roots": "other-tls.pem"})
	must(t, branch.env, binary(t, "chancery"), "init", "--config", branch.config)
	branch.serve()
	leaf, issuers, _ := branch.certificate(t, idp, http.StatusOK)
	scts, err := x509util.ParseSCTsFromCertificate(leaf.Raw)
	if err != nil || len(scts) != 1 {
		t.Fatalf("%d SCTs, %v", len(scts), err)
	}
	chain := ctChain(t, leaf.Raw, issuers)
	if err := ctutil.VerifySCT(log.Key, chain[:2], scts[0], true); err != nil {
		t.Errorf("SCT: %v", err)
	}
	log.Server.CloseClientConnections()
	log.Server.Close()
	branch.certificate(t, idp, http.StatusServiceUnavailable)
}

// TestSignWhileFrozen: with the CT log frozen there is no certificate, and the
// client says so in the words of the authority, and soon.
func TestSignWhileFrozen(t *testing.T) {
	s, idp := newAuditedSite(t)
	s.init(t)
	s.configure(t, idp, map[string]any{"shard": "ct1", "origin": "audit.example/ct/ct1", "frozen": true})
	stop := s.serve()
	defer stop()
	dir := t.TempDir()
	file, token := filepath.Join(dir, "file"), filepath.Join(dir, "token")
	for path, content := range map[string]string{file: "never signed\n", token: idp.token(t, nil)} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	r := command(t, nil, binary(t, "chancery"), "sign", "--trust", s.dir, "--token", token, file)
	t.Logf("the client took %v", time.Since(began))
	if want := "chancery: error: sign: "; r.code != 1 || !strings.HasPrefix(r.stderr, want) || !strings.Contains(r.stderr, "503 Service Unavailable: ") {
		t.Errorf("exit status %d\n%s", r.code, r.stderr)
	}
}
