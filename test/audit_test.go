package test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/goccy/go-yaml"
	fulcio "github.com/sigstore/fulcio/pkg/generated/protobuf"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/chancery-ca/chancery/ca/audit"
)

// policySentence is what a client is told that the policy refused.
const policySentence = "The policy of this certificate authority does not allow this certificate"

// edit changes the part ca of the site's configuration.
func (s *site) edit(t *testing.T, change func(ca map[string]any)) {
	t.Helper()
	var config map[string]any
	if err := yaml.Unmarshal(mustRead(t, s.config), &config); err != nil {
		t.Fatal(err)
	}
	change(config["ca"].(map[string]any))
	s.write(t, config)
}

// newAuditedSite is a site with an identity provider, whose logs are made.
func newAuditedSite(t *testing.T) (*site, provider) {
	t.Helper()
	needSoftHSM(t)
	s, idp := newSite(t), startProvider(t)
	s.configure(t, idp, map[string]any{"shard": "ct1", "origin": "audit.example/ct/ct1"})
	return s, idp
}

// init makes the site's logs and audit.
func (s *site) init(t *testing.T) {
	t.Helper()
	must(t, s.env, binary(t, "chancery"), "init", "--config", s.config)
}

// auditFiles are the files of the site's audit, oldest first.
func (s *site) auditFiles(t *testing.T) []string {
	t.Helper()
	files, err := audit.Files(filepath.Join(s.dir, "serve-state", "audit"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	return files
}

// records reads the audit as an operator does.
func (s *site) records(t *testing.T, args ...string) (records []audit.Record) {
	t.Helper()
	out := must(t, s.env, binary(t, "chancery"), append([]string{"audit", "tail", "--config", s.config, "-n", "1000000", "--output", "json"}, args...)...)
	for line := range strings.Lines(out) {
		var r audit.Record
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatal(err)
		}
		records = append(records, r)
	}
	return records
}

// request asks for a certificate with a token of the provider whose claims are
// changed, and returns status and answer.
func (s *site) request(t *testing.T, token, email string) (int, string) {
	t.Helper()
	resp, err := s.http.Post(s.url+"/api/v2/signingCert", "application/json", bytes.NewReader(signingRequest(t, freshKey(t), token, email)))
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(s.body(resp, "signingCert", resp.StatusCode))
}

// token is a token of the provider with other claims.
func (p provider) token(t *testing.T, claims map[string]any) string {
	t.Helper()
	token, err := p.Token(claims)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// TestPolicyAndAudit: who may not, gets nothing in any form; and of everything
// the audit says what it was.
func TestPolicyAndAudit(t *testing.T) {
	s, idp := newAuditedSite(t)
	s.edit(t, func(ca map[string]any) {
		ca["policy"] = []map[string]any{
			{"deny": "leavers", "identity": "mallory@*"},
			{"allow": "everybody", "identity": "*@example.com", "keys": []string{"ecdsa-p256"}, "lifetime": "2m"},
		}
		ca["oidc-issuers"].(map[string]any)[idp.Issuer()].(map[string]any)["max-uses"] = 1
	})
	s.init(t)
	stop := s.serve()
	const mallory = "mallory@example.com"
	good, bad := idp.token(t, nil), idp.token(t, map[string]any{"email": mallory})
	var following syncBuffer
	follower := exec.Command(binary(t, "chancery"), "audit", "tail", "-n", "20", "-f", "--output", "json", "--identity", mallory, "--config", s.config)
	follower.Stdout, follower.Stderr = &following, &following
	if err := follower.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = follower.Process.Kill(); _ = follower.Wait() })

	leaf, _, _ := s.certificateFor(t, good, http.StatusOK)
	if life := leaf.NotAfter.Sub(leaf.NotBefore).String(); life != "2m0s" {
		t.Errorf("the certificate lives %s, the rule says 2m", life)
	}
	if _, _, body := s.certificateFor(t, good, http.StatusBadRequest); !strings.Contains(body, "There was an error processing the identity token") {
		t.Errorf("a token of one use, used again: %s", body)
	}
	if code, body := s.request(t, bad, mallory); code != http.StatusForbidden || !strings.Contains(body, policySentence) || !strings.Contains(body, `"code":7`) {
		t.Errorf("refused by policy: %d %s", code, body)
	}
	if err := s.callGRPC(t, idp.token(t, map[string]any{"email": mallory}), mallory); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), policySentence) {
		t.Errorf("refused by policy, over gRPC: %v", err)
	}
	eventually(t, "both refusals in audit tail -f", func() bool {
		return strings.Count(following.String(), "rule leavers denies") == 2
	})

	// The operator asks why, with the token that was refused, from stdin.
	why := exec.Command(binary(t, "chancery"), "policy", "test", "-", "--config", s.config)
	why.Stdin = strings.NewReader(bad)
	out, err := why.Output()
	if why.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "token       verified\n") || !strings.Contains(string(out), "decision    refused: rule leavers denies\n") {
		t.Errorf("policy test: %v\n%s", err, out)
	}
	tokenFile := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(tokenFile, []byte(good), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := must(t, nil, binary(t, "chancery"), "policy", "test", tokenFile, "--config", s.config); !strings.Contains(out, "lifetime    2m0s\n") {
		t.Errorf("policy test of a good token:\n%s", out)
	}

	serial := leaf.SerialNumber.Text(16)
	spki := sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
	records := s.records(t, "--serial", serial)
	if len(records) != 2 || records[0].Type != audit.TypeAllowed || records[1].Type != audit.TypeIssued {
		t.Fatalf("records of serial %s: %+v", serial, records)
	}
	if a := records[0]; a.SAN != user || a.Issuer != idp.Issuer() || a.SPKI != fmt.Sprintf("%x", spki) || a.Rule != "everybody" || a.Request == "" {
		t.Errorf("allowed: %+v", a)
	}
	if i := records[1]; i.LogIndex == nil || *i.LogIndex != 0 || i.Request != records[0].Request {
		t.Errorf("issued: %+v", i)
	}
	refused := s.records(t, "--type", "refused")
	if len(refused) != 3 || refused[0].SAN != user || refused[1].SAN != mallory || refused[1].Rule != "leavers" || refused[2].Rule != "leavers" {
		t.Errorf("refused: %+v", refused)
	}
	if out := must(t, s.env, binary(t, "chancery"), "audit", "verify", "--config", s.config); !strings.Contains(out, "none yet") {
		t.Errorf("beside the service:\n%s", out)
	}
	stop()
	if out := must(t, s.env, binary(t, "chancery"), "audit", "verify", "--config", s.config); !strings.Contains(out, "seals       1;") {
		t.Errorf("after the service:\n%s", out)
	}
	for _, secret := range []string{good, bad, good[strings.LastIndexByte(good, '.')+1:]} {
		if found := grep(t, s.dir, secret); len(found) > 0 {
			t.Errorf("a token is in %v", found)
		}
	}
}

// certificateFor asks with a token of the usual user.
func (s *site) certificateFor(t *testing.T, token string, status int) (leaf *x509.Certificate, issuers []byte, body string) {
	t.Helper()
	code, body := s.request(t, token, user)
	if code != status {
		t.Fatalf("status %d, want %d: %.300s", code, status, body)
	}
	if code != http.StatusOK {
		return nil, nil, body
	}
	chain := chainOf(t, body)
	return chain[0], nil, body
}

// chainOf reads the certificates of an answer, leaf first.
func chainOf(t testing.TB, body string) (chain []*x509.Certificate) {
	t.Helper()
	var answer struct {
		Embedded struct {
			Chain struct{ Certificates []string } `json:"chain"`
		} `json:"signedCertificateEmbeddedSct"`
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil {
		t.Fatalf("answer %.300s: %v", body, err)
	}
	for _, text := range answer.Embedded.Chain.Certificates {
		block, _ := pem.Decode([]byte(text))
		if block == nil {
			t.Fatalf("not PEM: %q", text)
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, certificate)
	}
	if len(chain) != 3 {
		t.Fatalf("%d certificates", len(chain))
	}
	return chain
}

// callGRPC asks as sigstore-java does.
func (s *site) callGRPC(t *testing.T, token, subject string) error {
	t.Helper()
	conn, err := grpc.NewClient(strings.TrimPrefix(s.url, "https://"), grpc.WithTransportCredentials(credentials.NewTLS(s.tlsConfig())))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	key := freshKey(t)
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte(subject))
	proof, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	_, err = fulcio.NewCAClient(conn).CreateSigningCertificate(t.Context(), &fulcio.CreateSigningCertificateRequest{
		Credentials: &fulcio.Credentials{Credentials: &fulcio.Credentials_OidcIdentityToken{OidcIdentityToken: token}},
		Key: &fulcio.CreateSigningCertificateRequest_PublicKeyRequest{PublicKeyRequest: &fulcio.PublicKeyRequest{
			PublicKey: &fulcio.PublicKey{Content: string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))}, ProofOfPossession: proof,
		}},
	})
	return err
}

// TestAuditDamaged: one bit of the audit flips while the service is stopped.
func TestAuditDamaged(t *testing.T) {
	s, idp := newAuditedSite(t)
	s.init(t)
	stop := s.serve()
	s.certificate(t, idp, http.StatusOK)
	stop()
	file := s.auditFiles(t)[0]
	good := mustRead(t, file)
	bad := bytes.Clone(good)
	at := bytes.Index(bad, []byte(user))
	bad[at] ^= 1
	overwrite(t, file, bad)
	verify := func() result {
		return command(t, s.env, binary(t, "chancery"), "audit", "verify", "--config", s.config)
	}
	if r := verify(); r.code != 1 || !strings.Contains(r.stderr, "audit damaged") || !strings.Contains(r.stderr, "hint: ") || r.stdout != "" {
		t.Errorf("audit verify: exit status %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	if r := command(t, s.env, binary(t, "chancery"), "serve", "--config", s.config); r.code != 1 ||
		!strings.Contains(lastError(r.stderr), "audit damaged") || !strings.Contains(r.stderr, "hint: chancery audit verify says where") {
		t.Errorf("serve: exit status %d\n%s", r.code, r.stderr)
	}
	if after := mustRead(t, file); !bytes.Equal(after, bad) {
		t.Error("the damaged file was written to")
	}
	// A state of a version without an audit, or one whose audit is gone.
	folder := filepath.Dir(file)
	if err := os.Rename(folder, folder+".away"); err != nil {
		t.Fatal(err)
	}
	if r := command(t, s.env, binary(t, "chancery"), "serve", "--config", s.config); r.code != 1 ||
		!strings.Contains(lastError(r.stderr), "audit not found") || !strings.Contains(r.stderr, "hint: ") || !strings.Contains(r.stderr, "chancery init --add") {
		t.Errorf("serve without an audit: exit status %d\n%s", r.code, r.stderr)
	}
	if err := os.Rename(folder+".away", folder); err != nil {
		t.Fatal(err)
	}
	overwrite(t, file, good)
	if r := verify(); r.code != 0 {
		t.Errorf("as it was: %s", r.stderr)
	}
	s.serve()()
}

// TestAuditDiskFull: the disk of the audit fills up, and nothing is issued that
// it does not have.
func TestAuditDiskFull(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting a small disk takes root")
	}
	s, idp := newAuditedSite(t)
	folder := filepath.Join(s.dir, "serve-state", "audit")
	if err := os.MkdirAll(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	if r := command(t, nil, "mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", folder); r.code != 0 {
		t.Skipf("no tmpfs can be mounted here: %s", r.stderr)
	}
	t.Cleanup(func() { must(t, nil, "umount", "--lazy", folder) })
	s.init(t)
	stop := s.serve()
	issued := map[string]bool{}
	for full := false; !full; {
		code, body := s.request(t, idp.token(t, nil), user)
		switch {
		case code == http.StatusOK:
			issued[chainOf(t, body)[0].SerialNumber.Text(16)] = true
		case code == http.StatusServiceUnavailable && strings.Contains(body, "not available"):
			full = true
		default:
			t.Fatalf("status %d: %s", code, body)
		}
		if len(issued) > 500 {
			t.Fatal("64 KiB hold more than 500 certificates' records")
		}
	}
	s.get("/readyz", http.StatusServiceUnavailable)
	s.get("/healthz", http.StatusOK)
	if code, _ := s.request(t, idp.token(t, nil), user); code != http.StatusServiceUnavailable {
		t.Errorf("a second request: status %d", code)
	}
	stop()
	recorded := map[string]bool{}
	for _, r := range s.records(t, "--type", "allowed") {
		recorded[r.Serial] = true
	}
	for serial := range issued {
		if !recorded[serial] {
			t.Errorf("certificate %s has no record", serial)
		}
	}
	if len(issued) == 0 {
		t.Error("nothing was issued before the disk was full: this shows nothing")
	}
	// With room again the chain goes on behind its last whole line.
	must(t, nil, "mount", "-o", "remount,size=1m", folder)
	again := s.serve()
	s.certificate(t, idp, http.StatusOK)
	again()
	must(t, s.env, binary(t, "chancery"), "audit", "verify", "--config", s.config)
}

// TestAuditKilled kills the service under load: each certificate that a client
// has is in the audit and in the CT log.
func TestAuditKilled(t *testing.T) {
	s, idp := newAuditedSite(t)
	s.init(t)
	got := map[string]*x509.Certificate{}
	for range 3 {
		cmd, log := s.run(t)
		for serial, leaf := range s.loadUntilKilled(t, idp, cmd) {
			got[serial] = leaf
		}
		if t.Failed() {
			t.Logf("%s", log)
		}
	}
	if len(got) < 60 {
		t.Fatalf("%d certificates: this shows little", len(got))
	}
	stop := s.serve()
	eventually(t, "every certificate in the CT log", func() bool {
		logged := s.loggedSerials(t)
		for serial := range got {
			if !logged[serial] {
				return false
			}
		}
		return true
	})
	stop()
	must(t, s.env, binary(t, "chancery"), "audit", "verify", "--config", s.config)
	allowed := map[string]audit.Record{}
	for _, r := range s.records(t, "--type", "allowed") {
		allowed[r.Serial] = r
	}
	for serial, leaf := range got {
		r, ok := allowed[serial]
		spki := sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
		if !ok || r.SAN != user || r.SPKI != fmt.Sprintf("%x", spki) {
			t.Errorf("certificate %s: record %v %+v", serial, ok, r)
		}
	}
	t.Logf("%d certificates, %d allowed", len(got), len(allowed))
}

// run starts the site and waits until it is ready; the caller ends it.
func (s *site) run(t *testing.T) (*exec.Cmd, *syncBuffer) {
	t.Helper()
	notifications, log := listenNotify(t), new(syncBuffer)
	cmd := exec.Command(binary(t, "chancery"), "serve", "--config", s.config)
	cmd.Env = append(append(os.Environ(), s.env...), "NOTIFY_SOCKET="+notifications.path)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = cmd.Process.Kill(), cmd.Wait() })
	notifications.await(t, "READY=1")
	s.awaitKeys(t)
	return cmd, log
}

// loadUntilKilled asks for certificates from as many clients as are never told
// to come again, kills the service after 40 were issued, and returns those that
// arrived.
func (s *site) loadUntilKilled(t *testing.T, idp provider, cmd *exec.Cmd) map[string]*x509.Certificate {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	token := idp.token(t, nil)
	var mu sync.Mutex
	var answers []string
	var clients sync.WaitGroup
	for range 8 {
		body := signingRequest(t, freshKey(t), token, user)
		clients.Go(func() {
			for ctx.Err() == nil {
				answer, ok := s.try(ctx, body)
				if !ok {
					return
				}
				mu.Lock()
				if answers = append(answers, answer); len(answers) == 40 {
					_ = cmd.Process.Kill()
				}
				mu.Unlock()
			}
		})
	}
	clients.Wait()
	_ = cmd.Process.Kill() // again, or because fewer came: Wait ends all the same
	_ = cmd.Wait()
	s.http.CloseIdleConnections()
	got := map[string]*x509.Certificate{}
	for _, answer := range answers {
		leaf := chainOf(t, answer)[0]
		got[leaf.SerialNumber.Text(16)] = leaf
	}
	return got
}

// try asks once; ok is false when no whole answer came.
func (s *site) try(ctx context.Context, body []byte) (answer string, ok bool) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url+"/api/v2/signingCert", bytes.NewReader(body))
	if err != nil {
		return "", false
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := s.http.Do(req)
	if err != nil {
		return "", false
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return string(raw), err == nil && resp.StatusCode == http.StatusOK
}

// loggedSerials are the serials of all entries of the CT log.
func (s *site) loggedSerials(t *testing.T) map[string]bool {
	t.Helper()
	serials := map[string]bool{}
	c := s.ctClient(t)
	for start, size := int64(0), int64(s.sth(t).TreeSize); start < size; {
		entries, err := c.GetEntries(t.Context(), start, size-1)
		if err != nil {
			t.Fatal(err)
		}
		if len(entries) == 0 {
			t.Fatal("no entries")
		}
		for _, e := range entries {
			serials[e.Precert.TBSCertificate.SerialNumber.Text(16)] = true
		}
		start += int64(len(entries))
	}
	return serials
}
