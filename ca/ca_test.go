package ca_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/certificate-transparency-go/ctutil"
	ctx509 "github.com/google/certificate-transparency-go/x509"
	"github.com/google/certificate-transparency-go/x509util"
	"github.com/google/go-cmp/cmp"
	"github.com/sigstore/fulcio/pkg/certificate"
	summary "github.com/sigstore/sigstore-go/pkg/fulcio/certificate"
	"go.uber.org/goleak"

	"github.com/chancery-ca/chancery/ca"
	"github.com/chancery-ca/chancery/ca/identity"
	"github.com/chancery-ca/chancery/ca/internal/catest"
	"github.com/chancery-ca/chancery/ca/profile"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

func TestMain(m *testing.M) {
	// The watch over a closed token leaves at its next tick, within an eighth of
	// the token's deadline.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/chancery-ca/chancery/hsm/pkcs11.(*queue).watch"))
}

func alice() *identity.Principal {
	return &identity.Principal{
		SAN:        profile.SAN{Type: profile.Email, Value: "alice@example.com"},
		Extensions: certificate.Extensions{Issuer: "https://idp.example", Subject: "alice-id"},
	}
}

func request(t testing.TB) ca.Request {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return ca.Request{Principal: alice(), Public: key.Public()}
}

// TestIssue checks a certificate with software that we did not write: crypto/x509
// for the path, certificate-transparency-go for the SCT, Fulcio and sigstore-go
// for the extensions.
func TestIssue(t *testing.T) {
	f := catest.NewParts(t)
	req := request(t)
	got, err := catest.Authority(t, f.Config()).Issue(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if n, m := f.Key.Count(), f.LogKey.Count(); n != 2 || m != 1 {
		t.Errorf("%d signatures by the CA and %d by the log, want 2 and 1", n, m)
	}
	leaf, err := x509.ParseCertificate(got.DER)
	if err != nil {
		t.Fatal(err)
	}
	checkPath(t, f, leaf)
	checkSCT(t, f, got)
	if !leaf.PublicKey.(*ecdsa.PublicKey).Equal(req.Public) {
		t.Error("certificate is for another key")
	}
	if d := cmp.Diff([]string{"alice@example.com"}, leaf.EmailAddresses); d != "" {
		t.Error(d)
	}
	extensions, err := certificate.ParseExtensions(leaf.Extensions)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(req.Principal.Extensions, extensions); d != "" {
		t.Error(d)
	}
	if s, err := summary.SummarizeCertificate(leaf); err != nil || s.SubjectAlternativeName != "alice@example.com" || s.Issuer != "https://idp.example" {
		t.Errorf("sigstore-go reads %+v, %v", s, err)
	}
	if leaf.NotBefore != catest.Noon || leaf.NotAfter != catest.Noon.Add(10*time.Minute) ||
		leaf.NotBefore != got.NotBefore || leaf.NotAfter != got.NotAfter || leaf.SerialNumber.Text(16) != got.Serial {
		t.Errorf("valid from %v to %v, reported %+v", leaf.NotBefore, leaf.NotAfter, got)
	}
	checkPEM(t, f, got)
	leaves := f.Log.Leaves()
	if len(leaves) != 1 || len(leaves[0].Chain) != 2 || !bytes.Equal(leaves[0].Chain[1], f.Chain[1].Raw) {
		t.Fatalf("log has %d leaves", len(leaves))
	}
	checkPrecert(t, f, leaves[0], leaf)
}

func checkPath(t *testing.T, f *catest.Parts, leaf *x509.Certificate) {
	t.Helper()
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(f.Chain[1])
	intermediates.AddCert(f.Chain[0])
	if _, err := leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: catest.Noon,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
	}); err != nil {
		t.Error(err)
	}
}

func checkSCT(t *testing.T, f *catest.Parts, cert *ca.Certificate) {
	t.Helper()
	var chain []*ctx509.Certificate
	for _, der := range [][]byte{cert.DER, f.Chain[0].Raw} {
		c, err := ctx509.ParseCertificate(der)
		if ctx509.IsFatal(err) {
			t.Fatal(err)
		}
		chain = append(chain, c)
	}
	scts, err := x509util.ParseSCTsFromCertificate(cert.DER)
	if err != nil || len(scts) != 1 {
		t.Fatalf("%d SCTs, %v", len(scts), err)
	}
	if err := ctutil.VerifySCT(f.LogKey.Public(), chain, scts[0], true); err != nil {
		t.Error(err)
	}
}

func checkPEM(t *testing.T, f *catest.Parts, cert *ca.Certificate) {
	t.Helper()
	want := [][]byte{cert.DER, f.Chain[0].Raw, f.Chain[1].Raw}
	if len(cert.PEM) != len(want) {
		t.Fatalf("%d certificates in PEM", len(cert.PEM))
	}
	for i, text := range cert.PEM {
		block, rest := pem.Decode([]byte(text))
		if block == nil || !bytes.Equal(block.Bytes, want[i]) || len(rest) != 0 || strings.TrimSpace(text) != text {
			t.Errorf("certificate %d in PEM is %q", i, text)
		}
	}
}

// checkPrecert: what the log holds is signed by the CA and is the leaf without SCT.
func checkPrecert(t *testing.T, f *catest.Parts, entry catest.Leaf, leaf *x509.Certificate) {
	t.Helper()
	precert, err := x509.ParseCertificate(entry.Precert)
	if err != nil {
		t.Fatal(err)
	}
	if err := precert.CheckSignatureFrom(f.Chain[0]); err != nil {
		t.Error(err)
	}
	if precert.SerialNumber.Cmp(leaf.SerialNumber) != 0 {
		t.Error("precertificate has another serial number")
	}
	tbs, err := ctx509.RemoveCTPoison(precert.RawTBSCertificate)
	if err != nil || !bytes.Equal(tbs, entry.TBS) {
		t.Errorf("logged TBS is not the precertificate's: %v", err)
	}
	tbs, err = ctx509.RemoveSCTList(leaf.RawTBSCertificate)
	if err != nil || !bytes.Equal(tbs, entry.TBS) {
		t.Errorf("logged TBS is not the certificate's: %v", err)
	}
}

// TestIssueInHardware: the same with both keys in a token, many at a time.
func TestIssueInHardware(t *testing.T) {
	token := hsmtest.SoftHSM(t)
	f := catest.PartsOn(t, hsmtest.NewKey(t, token, "ca", hsm.ECDSAP256), hsmtest.NewKey(t, token, "ct", hsm.ECDSAP256))
	a := catest.Authority(t, f.Config())
	const clients, each = 8, 4
	var all sync.WaitGroup
	for range clients {
		req := request(t)
		all.Go(func() {
			for range each {
				got, err := a.Issue(context.Background(), req)
				if err != nil {
					t.Error(err)
					return
				}
				leaf, err := x509.ParseCertificate(got.DER)
				if err != nil {
					t.Error(err)
					return
				}
				checkPath(t, f, leaf)
				if !bytes.Equal(leaf.RawSubjectPublicKeyInfo, spki(t, req.Public)) {
					t.Error("certificate is for another key")
				}
			}
		})
	}
	all.Wait()
	if n := f.Key.Count() + f.LogKey.Count(); n != 3*clients*each {
		t.Errorf("%d hardware signatures for %d certificates", n, clients*each)
	}
	serials := map[string]bool{}
	for _, leaf := range f.Log.Leaves() {
		cert, err := ctx509.ParseCertificate(leaf.Precert)
		if ctx509.IsFatal(err) {
			t.Fatal(err)
		}
		serials[cert.SerialNumber.String()] = true
	}
	if len(serials) != clients*each {
		t.Errorf("%d serial numbers in the log", len(serials))
	}
}

func spki(t *testing.T, pub crypto.PublicKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Error(err)
	}
	return der
}

// meeting lets n callers go on only when all n are there.
type meeting struct {
	all  sync.WaitGroup
	open chan struct{}
}

func meet(n int) *meeting {
	m := &meeting{open: make(chan struct{})}
	m.all.Add(n)
	go func() { m.all.Wait(); close(m.open) }()
	return m
}

func (m *meeting) wait(ctx context.Context) error {
	m.all.Done()
	select {
	case <-m.open:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// meetingKey holds each signature until the other side of its pair has come.
type meetingKey struct {
	hsm.Key
	next chan *meeting
}

func (k *meetingKey) SignContext(ctx context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	m := <-k.next
	if err := m.wait(ctx); err != nil {
		return nil, err
	}
	return k.Key.SignContext(ctx, digest, opts)
}

// TestTwoOperationsOnTheCriticalPath: precertificate and SCT are signed at the
// same time, certificate and commit go on at the same time. If either pair
// were one after the other this would end by its deadline.
func TestTwoOperationsOnTheCriticalPath(t *testing.T) {
	f := catest.NewParts(t)
	first, second := meet(2), meet(2)
	key := &meetingKey{Key: f.Key, next: make(chan *meeting, 2)}
	key.next <- first
	key.next <- second
	f.Log.OnPromise = func(ctx context.Context, _ []byte) error { return first.wait(ctx) }
	f.Log.OnCommit = second.wait
	cfg := f.Config()
	cfg.Key = key
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if _, err := catest.Authority(t, cfg).Issue(ctx, request(t)); err != nil {
		t.Error(err)
	}
}

// TestNothingBeforeDurable: a certificate that is signed waits for its leaf.
func TestNothingBeforeDurable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := catest.NewParts(t)
		durable := make(chan struct{})
		f.Log.OnCommit = func(context.Context) error {
			<-durable
			return nil
		}
		done := make(chan error, 1)
		a, req := catest.Authority(t, f.Config()), request(t)
		go func() {
			_, err := a.Issue(context.Background(), req)
			done <- err
		}()
		synctest.Wait() // nothing is left to do
		if n := f.Key.Count(); n != 2 || len(done) != 0 {
			t.Errorf("%d signatures, released before the leaf was durable: %v", n, len(done) != 0)
		}
		close(durable)
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestIssueRefusals(t *testing.T) {
	down := errors.New("down")
	flip := func(sct []byte) []byte {
		out := bytes.Clone(sct)
		out[len(out)-1] ^= 1
		return out
	}
	for _, test := range []struct {
		name    string
		change  func(f *catest.Parts, cfg *ca.Config, req *ca.Request)
		want    error
		commits int
	}{
		{"clock refuses", func(_ *catest.Parts, c *ca.Config, _ *ca.Request) {
			c.Now = func() (time.Time, error) { return time.Time{}, down }
		}, ca.ErrUnavailable, 0},
		{"before the CA's time", func(_ *catest.Parts, c *ca.Config, _ *ca.Request) {
			c.Now = func() (time.Time, error) { return catest.Start.Add(-time.Second), nil }
		}, ca.ErrCA, 0},
		{"ten minutes before the CA's end", func(_ *catest.Parts, c *ca.Config, _ *ca.Request) {
			c.Now = func() (time.Time, error) {
				return catest.Start.AddDate(1, 0, 0).Add(-10*time.Minute + time.Second), nil
			}
		}, ca.ErrCA, 0},
		{"no principal", func(_ *catest.Parts, _ *ca.Config, r *ca.Request) { r.Principal = nil }, ca.ErrIdentity, 0},
		{"no key", func(_ *catest.Parts, _ *ca.Config, r *ca.Request) { r.Public = nil }, ca.ErrIdentity, 0},
		{"name that cannot be certified", func(_ *catest.Parts, _ *ca.Config, r *ca.Request) { r.Principal.SAN.Value = "a\x00b@example.com" }, ca.ErrIdentity, 0},
		{"address that is none", func(_ *catest.Parts, _ *ca.Config, r *ca.Request) { r.Principal.SAN.Value = "alice@exa_mple..com" }, ca.ErrIdentity, 0},
		{"no issuer", func(_ *catest.Parts, _ *ca.Config, r *ca.Request) { r.Principal.Extensions.Issuer = "" }, ca.ErrIdentity, 0},
		{"CA key busy", failing(hsm.ErrBusy), ca.ErrBusy, 0},
		{"CA key lost", failing(hsm.ErrLost), ca.ErrUnavailable, 0},
		{"CA key signs wrongly", failing(hsm.ErrBadSignature), ca.ErrCA, 0},
		{"log does not promise", func(f *catest.Parts, _ *ca.Config, _ *ca.Request) {
			f.Log.OnPromise = func(context.Context, []byte) error { return down }
		}, ca.ErrLog, 0},
		{"log key busy", func(f *catest.Parts, _ *ca.Config, _ *ca.Request) {
			f.Log.OnPromise = func(context.Context, []byte) error { return hsm.ErrBusy }
		}, ca.ErrBusy, 0},
		{"log queue full", func(f *catest.Parts, _ *ca.Config, _ *ca.Request) {
			f.Log.OnCommit = func(context.Context) error { return ca.ErrBusy }
		}, ca.ErrBusy, 0},
		{"leaf not durable", func(f *catest.Parts, _ *ca.Config, _ *ca.Request) {
			f.Log.OnCommit = func(context.Context) error { return down }
		}, ca.ErrLog, 0},
		{"log too slow", func(f *catest.Parts, _ *ca.Config, _ *ca.Request) {
			f.Log.OnCommit = func(context.Context) error { return context.DeadlineExceeded }
		}, ca.ErrUnavailable, 0},
		{"SCT with a wrong signature", func(f *catest.Parts, _ *ca.Config, _ *ca.Request) { f.Log.Tamper = flip }, ca.ErrLog, 0},
		{"SCT cut", func(f *catest.Parts, _ *ca.Config, _ *ca.Request) {
			f.Log.Tamper = func(sct []byte) []byte { return sct[:40] }
		}, ca.ErrLog, 0},
		{"no SCT", func(f *catest.Parts, _ *ca.Config, _ *ca.Request) {
			f.Log.Tamper = func([]byte) []byte { return nil }
		}, ca.ErrLog, 0},
		{"SCT by another log", func(f *catest.Parts, c *ca.Config, _ *ca.Request) {
			c.LogKey = hsmtest.SoftwareKey(hsm.ECDSAP256).Public()
		}, ca.ErrLog, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := catest.NewParts(t)
			cfg, req := f.Config(), request(t)
			test.change(f, &cfg, &req)
			got, err := catest.Authority(t, cfg).Issue(t.Context(), req)
			if !errors.Is(err, test.want) || got != nil {
				t.Errorf("%v, err %v, want %v", got, err, test.want)
			}
			if n := len(f.Log.Leaves()); n != test.commits {
				t.Errorf("%d leaves in the log, want %d", n, test.commits)
			}
		})
	}
}

// TestRootEndsFirst: no certificate outlives the root, whatever the intermediate's
// certificate says, which a root elsewhere may have signed.
func TestRootEndsFirst(t *testing.T) {
	f := catest.NewParts(t)
	rootKey, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	certify := func(serial int64, pub crypto.PublicKey, parent *x509.Certificate, end time.Time) *x509.Certificate {
		spec := &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: fmt.Sprintf("CA %d", serial)},
			NotBefore: catest.Start, NotAfter: end, IsCA: true, BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		}
		if parent == nil {
			parent = spec
		} else {
			spec.ExtKeyUsage, spec.MaxPathLenZero = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}, true
		}
		der, err := x509.CreateCertificate(rand.Reader, spec, parent, pub, rootKey)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	end := catest.Noon.Add(10 * time.Minute)
	root := certify(1, rootKey.Public(), nil, end)
	cfg := f.Config()
	cfg.Chain = []*x509.Certificate{certify(2, f.Key.Public(), root, end.AddDate(1, 0, 0)), root}
	if _, err := catest.Authority(t, cfg).Issue(t.Context(), request(t)); err != nil {
		t.Errorf("to the root's last second: %v", err)
	}
	cfg.Now = func() (time.Time, error) { return catest.Noon.Add(time.Second), nil }
	if _, err := catest.Authority(t, cfg).Issue(t.Context(), request(t)); !errors.Is(err, ca.ErrCA) {
		t.Errorf("beyond the root's end: %v", err)
	}
}

func failing(err error) func(*catest.Parts, *ca.Config, *ca.Request) {
	return func(f *catest.Parts, c *ca.Config, _ *ca.Request) {
		key := &hsmtest.Failing{Key: f.Key}
		key.Fail(err)
		c.Key = key
	}
}

// TestSwappedSCT: an SCT that the log made for another certificate is refused,
// alone and with what was signed for it.
func TestSwappedSCT(t *testing.T) {
	for name, whole := range map[string]bool{"the SCT": false, "the whole promise": true} {
		t.Run(name, func(t *testing.T) {
			f := catest.NewParts(t)
			cfg := f.Config()
			cfg.SCTs = &swapping{SCTSource: cfg.SCTs, whole: whole}
			a := catest.Authority(t, cfg)
			if _, err := a.Issue(t.Context(), request(t)); err != nil {
				t.Fatal(err)
			}
			signed := f.Key.Count()
			if _, err := a.Issue(t.Context(), request(t)); !errors.Is(err, ca.ErrLog) || !errors.Is(err, profile.ErrSCT) {
				t.Errorf("err %v", err)
			}
			if n := f.Key.Count() - signed; n != 1 {
				t.Errorf("%d signatures for a refused certificate, want the precertificate's alone", n)
			}
		})
	}
}

// swapping is a log that gives everybody the SCT of the first.
type swapping struct {
	ca.SCTSource
	whole bool // what was signed for it as well
	first ca.Promise
}

func (s *swapping) Promise(ctx context.Context, issuerKeyHash [32]byte, tbs []byte) (ca.Promise, error) {
	p, err := s.SCTSource.Promise(ctx, issuerKeyHash, tbs)
	switch {
	case err != nil:
		return nil, err
	case s.first == nil:
		s.first = p
	case s.whole:
		return s.first, nil
	}
	return swapped{p, s.first}, nil
}

type swapped struct {
	ca.Promise
	other ca.Promise
}

func (s swapped) SCT() []byte { return s.other.SCT() }

// TestFinalSignatureFails: the leaf may be in the log, the certificate is not released.
func TestFinalSignatureFails(t *testing.T) {
	f := catest.NewParts(t)
	key := &hsmtest.Failing{Key: f.Key}
	f.Log.Tamper = func(sct []byte) []byte {
		key.Fail(hsm.ErrLost) // from here on; the precertificate's may be refused as well
		return sct
	}
	cfg := f.Config()
	cfg.Key = key
	if got, err := catest.Authority(t, cfg).Issue(t.Context(), request(t)); !errors.Is(err, ca.ErrUnavailable) || got != nil {
		t.Errorf("%v, err %v", got, err)
	}
}

func TestBusyAtOnce(t *testing.T) {
	f := catest.NewParts(t)
	inside := make(chan struct{})
	f.Log.OnCommit = func(ctx context.Context) error {
		inside <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	}
	cfg := f.Config()
	cfg.MaxConcurrent = 1
	a := catest.Authority(t, cfg)
	ctx, cancel := context.WithCancel(t.Context())
	done, req := make(chan error), request(t)
	go func() {
		_, err := a.Issue(ctx, req)
		done <- err
	}()
	<-inside
	if _, err := a.Issue(t.Context(), req); !errors.Is(err, ca.ErrBusy) {
		t.Errorf("second request: %v", err)
	}
	cancel() // the client goes away
	// ErrBusy if the certificate's signature was still waiting for the key.
	if err := <-done; !errors.Is(err, ca.ErrUnavailable) && !errors.Is(err, ca.ErrBusy) {
		t.Errorf("cancelled request: %v", err)
	}
	f.Log.OnCommit = nil
	if _, err := a.Issue(t.Context(), req); err != nil {
		t.Errorf("the slot was not freed: %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	f, other := catest.NewParts(t), catest.NewParts(t)
	for name, change := range map[string]func(*ca.Config){
		"no key":                  func(c *ca.Config) { c.Key = nil },
		"no log":                  func(c *ca.Config) { c.SCTs = nil },
		"no clock":                func(c *ca.Config) { c.Now = nil },
		"no chain":                func(c *ca.Config) { c.Chain = nil },
		"key of another CA":       func(c *ca.Config) { c.Key = other.Key },
		"chain of another CA":     func(c *ca.Config) { c.Chain = other.Chain },
		"root of another CA":      func(c *ca.Config) { c.Chain = []*x509.Certificate{f.Chain[0], other.Chain[1]} },
		"no root":                 func(c *ca.Config) { c.Chain = f.Chain[:1] },
		"chain upside down":       func(c *ca.Config) { c.Chain = []*x509.Certificate{f.Chain[1], f.Chain[0]} },
		"fraction of a second":    func(c *ca.Config) { c.Lifetime = time.Second + 1 },
		"negative lifetime":       func(c *ca.Config) { c.Lifetime = -time.Minute },
		"lifetime of two days":    func(c *ca.Config) { c.Lifetime = 48 * time.Hour },
		"negative concurrency":    func(c *ca.Config) { c.MaxConcurrent = -1 },
		"leaf in place of the CA": func(c *ca.Config) { c.Chain = append([]*x509.Certificate{issued(t, f)}, f.Chain...) },
	} {
		cfg := f.Config()
		change(&cfg)
		if _, err := ca.New(cfg); !errors.Is(err, ca.ErrConfig) {
			t.Errorf("%s: err %v", name, err)
		}
	}
}

func issued(t *testing.T, f *catest.Parts) *x509.Certificate {
	t.Helper()
	got, err := catest.Authority(t, f.Config()).Issue(t.Context(), request(t))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(got.DER)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// BenchmarkIssue is the pipeline with software keys and a log in memory: what
// is left when token, network and disk cost nothing.
func BenchmarkIssue(b *testing.B) {
	f := catest.NewParts(b)
	a, req := catest.Authority(b, f.Config()), request(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := a.Issue(b.Context(), req); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(f.Key.Count()+f.LogKey.Count())/float64(b.N), "signatures/op")
}
