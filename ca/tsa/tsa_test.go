package tsa

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/digitorus/pkcs7"
	"github.com/digitorus/timestamp"
	"github.com/google/go-cmp/cmp"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/timestamp-authority/v2/pkg/verification"

	"github.com/chancery-ca/chancery/ca/profile"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

var testStart = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// ownPolicy is a private enterprise arc for documentation (RFC 5612).
var ownPolicy = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 32473, 3161}

// clock is a clock that a test sets.
type clock struct {
	mu  sync.Mutex
	now time.Time
	err error
}

func (c *clock) Now() (time.Time, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now, c.err
}

func (c *clock) set(t time.Time, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now, c.err = t, err
}

func serial(n byte) *big.Int {
	octets := make([]byte, 20)
	octets[0], octets[19] = 0x41, n
	return new(big.Int).SetBytes(octets)
}

// certify builds a certificate of the profile and signs it.
func certify(t testing.TB, kind profile.Kind, n byte, pub crypto.PublicKey, issuer *x509.Certificate, signer profile.Signer) *x509.Certificate {
	t.Helper()
	tbs, err := profile.NewAuthority(profile.AuthoritySpec{
		Kind: kind, Subject: pkix.Name{Organization: []string{"Acme"}, CommonName: "Acme Timestamping " + string(kind)},
		Serial: serial(n), Public: pub, NotBefore: testStart, NotAfter: testStart.AddDate(3, 0, 0),
	}, issuer)
	if err != nil {
		t.Fatal(err)
	}
	der, err := tbs.Sign(t.Context(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// chainFor makes a TSA root and a certificate for key.
func chainFor(t testing.TB, key hsm.Key) []*x509.Certificate {
	t.Helper()
	rootKey := hsmtest.SoftwareKey(hsm.ECDSAP384)
	top := certify(t, profile.TSARoot, 1, rootKey.Public(), nil, rootKey)
	return []*x509.Certificate{certify(t, profile.TSA, 2, key.Public(), top, rootKey), top}
}

// fixture is an authority with a clock that stands at testStart + 1 h + 0.9 s.
type fixture struct {
	*Authority
	clock *clock
	chain []*x509.Certificate
}

func newFixture(t testing.TB, key hsm.Key) *fixture {
	t.Helper()
	f := &fixture{clock: &clock{now: testStart.Add(time.Hour + 900*time.Millisecond)}, chain: chainFor(t, key)}
	var err error
	f.Authority, err = New(Config{Key: key, Chain: f.chain, Now: f.clock.Now, Policy: ownPolicy})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

var artifact = []byte("hello, roll\n")

func requestFor(h crypto.Hash) *Request {
	d := h.New()
	d.Write(artifact)
	return &Request{Hash: h, Digest: d.Sum(nil)}
}

func TestResponseProfile(t *testing.T) {
	for _, alg := range []hsm.Algorithm{hsm.ECDSAP256, hsm.ECDSAP384} {
		for _, h := range []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512} {
			t.Run(string(alg)+"/"+h.String(), func(t *testing.T) {
				f := newFixture(t, hsmtest.SoftwareKey(alg))
				req := requestFor(h)
				req.Nonce, req.Certificates = big.NewInt(-7), true
				reply, err := f.Timestamp(t.Context(), req)
				if err != nil {
					t.Fatal(err)
				}
				got, err := timestamp.ParseResponse(reply) // verifies: the certificate is there
				if err != nil {
					t.Fatal(err)
				}
				if got.SerialNumber.Sign() != 1 || got.SerialNumber.BitLen() > 159 || got.SerialNumber.BitLen() < 64 {
					t.Errorf("serial number %v", got.SerialNumber)
				}
				want := &timestamp.Timestamp{
					HashAlgorithm: h, HashedMessage: req.Digest, Time: testStart.Add(time.Hour), Accuracy: time.Second,
					SerialNumber: got.SerialNumber, Policy: ownPolicy, Nonce: big.NewInt(-7), AddTSACertificate: true,
					RawToken: got.RawToken, Certificates: got.Certificates,
				}
				if d := cmp.Diff(want, got, cmp.Comparer(func(a, b *big.Int) bool { return a.Cmp(b) == 0 })); d != "" {
					t.Error(d)
				}
				if len(got.Certificates) != 1 || !got.Certificates[0].Equal(f.chain[0]) {
					t.Errorf("embedded certificates: %d", len(got.Certificates))
				}
				checkCMS(t, got.RawToken, f.chain[0], alg.Hash())
			})
		}
	}
}

// checkCMS looks at what digitorus/timestamp does not report.
func checkCMS(t *testing.T, token []byte, signer *x509.Certificate, h crypto.Hash) {
	t.Helper()
	p7, err := pkcs7.Parse(token)
	if err != nil {
		t.Fatal(err)
	}
	var outer struct {
		Type    asn1.ObjectIdentifier
		Content struct {
			Version int
			Rest    asn1.RawValue
		} `asn1:"tag:0,explicit"`
	}
	if _, err := asn1.Unmarshal(token, &outer); err != nil && !strings.Contains(err.Error(), "trailing") {
		t.Fatal(err)
	}
	if outer.Content.Version != 3 {
		t.Errorf("SignedData version %d, want 3", outer.Content.Version)
	}
	if len(p7.Signers) != 1 {
		t.Fatalf("%d signers", len(p7.Signers))
	}
	s := p7.Signers[0]
	if s.Version != 1 || s.IssuerAndSerialNumber.SerialNumber.Cmp(signer.SerialNumber) != 0 ||
		!bytes.Equal(s.IssuerAndSerialNumber.IssuerName.FullBytes, signer.RawIssuer) {
		t.Error("signer is not named by issuer and serial number")
	}
	if !s.DigestAlgorithm.Algorithm.Equal(oidOf(h)) {
		t.Errorf("digest algorithm %v", s.DigestAlgorithm.Algorithm)
	}
	var when time.Time
	if err := p7.UnmarshalSignedAttribute(oidSigningTime, &when); err != nil || !when.Equal(testStart.Add(time.Hour)) {
		t.Errorf("signingTime %v (%v), want the clock's", when, err)
	}
	var kind asn1.ObjectIdentifier
	if err := p7.UnmarshalSignedAttribute(oidContentType, &kind); err != nil || !kind.Equal(oidTSTInfo) {
		t.Errorf("contentType %v (%v)", kind, err)
	}
	var ess struct {
		Certs []struct {
			Hash   []byte
			Issuer struct {
				Names  []asn1.RawValue
				Serial *big.Int
			}
		}
	}
	if err := p7.UnmarshalSignedAttribute(oidSigningCertificateV2, &ess); err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(signer.Raw)
	if len(ess.Certs) != 1 || !bytes.Equal(ess.Certs[0].Hash, digest[:]) || ess.Certs[0].Issuer.Serial.Cmp(signer.SerialNumber) != 0 {
		t.Errorf("signingCertificateV2: %+v", ess)
	}
}

// TestSigstoreVerifiers: the two verifiers that sigstore's Go clients use, in
// every combination of certificate and nonce.
func TestSigstoreVerifiers(t *testing.T) {
	f := newFixture(t, hsmtest.SoftwareKey(hsm.ECDSAP256))
	for _, withCert := range []bool{false, true} {
		for _, nonce := range []*big.Int{nil, big.NewInt(0), new(big.Int).Lsh(big.NewInt(1), 64)} {
			req := requestFor(crypto.SHA256)
			req.Certificates, req.Nonce = withCert, nonce
			reply, err := f.Timestamp(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			ts, err := verification.VerifyTimestampResponse(reply, bytes.NewReader(artifact), verification.VerifyOpts{
				OID: ownPolicy, TSACertificate: f.chain[0], Roots: f.chain[1:], Nonce: nonce, CommonName: f.chain[0].Subject.CommonName,
			})
			if err != nil {
				t.Fatalf("certificate %t, nonce %v: %v", withCert, nonce, err)
			}
			if (ts.Nonce == nil) != (nonce == nil) {
				t.Errorf("nonce %v, asked with %v", ts.Nonce, nonce)
			}
			if (len(ts.Certificates) == 1) != withCert {
				t.Errorf("%d certificates, certReq %t", len(ts.Certificates), withCert)
			}
			authority := &root.SigstoreTimestampingAuthority{
				Root: f.chain[1], Leaf: f.chain[0], ValidityPeriodStart: testStart, ValidityPeriodEnd: testStart.AddDate(3, 0, 0),
			}
			got, err := authority.Verify(reply, artifact)
			if err != nil {
				t.Fatal(err)
			}
			if !got.Time.Equal(testStart.Add(time.Hour)) {
				t.Errorf("time %s", got.Time)
			}
			if _, err := authority.Verify(reply, []byte("another artefact")); err == nil {
				t.Error("verified for another artefact")
			}
		}
	}
}

// TestLibraryBytes: given the library's serial number, signing time and
// signature, our encoding of the whole response is the library's, octet by
// octet: it is the form that every sigstore client is tried with upstream.
// There is one difference. Without a certificate the library writes an empty
// certificates field, where RFC 3161, 2.4.1 says that it MUST not be present.
func TestLibraryBytes(t *testing.T) {
	for _, alg := range []hsm.Algorithm{hsm.ECDSAP256, hsm.ECDSAP384} {
		for _, withCert := range []bool{false, true} {
			f := newFixture(t, hsmtest.SoftwareKey(alg))
			req := requestFor(crypto.SHA256)
			req.Nonce, req.Certificates = big.NewInt(1<<62), withCert
			theirs := timestamp.Timestamp{
				HashAlgorithm: req.Hash, HashedMessage: req.Digest, Time: testStart.Add(time.Hour), Accuracy: time.Second,
				Policy: ownPolicy, Nonce: req.Nonce, AddTSACertificate: withCert,
			}
			want, err := theirs.CreateResponseWithOpts(f.chain[0], f.key, alg.Hash())
			if err != nil {
				t.Fatal(err)
			}
			parsed, err := timestamp.ParseResponse(want)
			if err != nil {
				t.Fatal(err)
			}
			p7, err := pkcs7.Parse(parsed.RawToken)
			if err != nil {
				t.Fatal(err)
			}
			var when time.Time
			if err := p7.UnmarshalSignedAttribute(oidSigningTime, &when); err != nil {
				t.Fatal(err)
			}
			info, err := f.encoder.tstInfo(req, ownPolicy, parsed.SerialNumber, testStart.Add(time.Hour))
			if err != nil {
				t.Fatal(err)
			}
			attributes, err := f.encoder.attributes(info, when.UTC())
			if err != nil {
				t.Fatal(err)
			}
			ours, err := f.encoder.response(info, attributes, p7.Signers[0].EncryptedDigest, withCert)
			if err != nil {
				t.Fatal(err)
			}
			like := *f.encoder
			if !withCert {
				like.certificate = nil // an empty field
				if len(ours) != len(want)-2 || bytes.Contains(ours, []byte{0xa0, 0, 0x31, 0x82}) {
					t.Error("a certificates field although none was asked for")
				}
			}
			got, err := like.response(info, attributes, p7.Signers[0].EncryptedDigest, true)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s, certificate %t:\n got %x\nwant %x", alg, withCert, got, want)
			}
		}
	}
}

func TestNewRefuses(t *testing.T) {
	key := hsmtest.SoftwareKey(hsm.ECDSAP256)
	good := chainFor(t, key)
	other := chainFor(t, key)
	c := &clock{now: testStart}
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	// issue signs a template under a root that allows everything.
	issue := func(change func(leaf, root *x509.Certificate)) []*x509.Certificate {
		top := &x509.Certificate{
			SerialNumber: serial(9), Subject: pkix.Name{CommonName: "Root"}, NotBefore: testStart, NotAfter: testStart.AddDate(1, 0, 0),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
		eku, err := asn1.Marshal([]asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 8}})
		if err != nil {
			t.Fatal(err)
		}
		leaf := &x509.Certificate{
			SerialNumber: serial(10), Subject: pkix.Name{CommonName: "TSA"}, NotBefore: testStart, NotAfter: testStart.AddDate(1, 0, 0),
			KeyUsage:        x509.KeyUsageDigitalSignature,
			ExtraExtensions: []pkix.Extension{{Id: oidExtKeyUsage, Critical: true, Value: eku}},
		}
		change(leaf, top)
		return []*x509.Certificate{
			reparse(t, leaf, top, key.Public(), rootKey), reparse(t, top, top, rootKey.Public(), rootKey),
		}
	}
	twoPurposes, err := asn1.Marshal([]asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 8}, {1, 3, 6, 1, 4, 1, 32473, 1}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{Key: key, Now: c.Now, Chain: issue(func(_, _ *x509.Certificate) {})}); err != nil {
		t.Fatalf("the template of the rows is refused itself: %v", err)
	}
	tests := []struct {
		name string
		cfg  Config
		want string
	}{
		{"no key", Config{Now: c.Now, Chain: good}, "no key or no clock"},
		{"no clock", Config{Key: key, Chain: good}, "no key or no clock"},
		{"no chain", Config{Key: key, Now: c.Now}, "needs the TSA's certificate and its issuers"},
		{"leaf alone", Config{Key: key, Now: c.Now, Chain: good[:1]}, "needs the TSA's certificate and its issuers"},
		{"nil certificate", Config{Key: key, Now: c.Now, Chain: []*x509.Certificate{good[0], nil}}, "needs the TSA's certificate"},
		{"root first", Config{Key: key, Now: c.Now, Chain: []*x509.Certificate{good[1], good[0]}}, "is a CA"},
		{"another root of the same name", Config{Key: key, Now: c.Now, Chain: []*x509.Certificate{good[0], other[1]}}, "not signed by the next"},
		{"another key", Config{Key: hsmtest.SoftwareKey(hsm.ECDSAP256), Now: c.Now, Chain: good}, "not the first certificate's"},
		{"malformed policy", Config{Key: key, Now: c.Now, Chain: good, Policy: asn1.ObjectIdentifier{3, 1}}, "policy is not"},
		{"EKU not critical", Config{Key: key, Now: c.Now, Chain: issue(func(l, _ *x509.Certificate) { l.ExtraExtensions[0].Critical = false })}, "not critical"},
		{"a second, unknown EKU", Config{Key: key, Now: c.Now, Chain: issue(func(l, _ *x509.Certificate) { l.ExtraExtensions[0].Value = twoPurposes })}, "not timeStamping alone"},
		{"no EKU", Config{Key: key, Now: c.Now, Chain: issue(func(l, _ *x509.Certificate) { l.ExtraExtensions = nil })}, "not timeStamping alone"},
		{"no digitalSignature", Config{Key: key, Now: c.Now, Chain: issue(func(l, _ *x509.Certificate) { l.KeyUsage = x509.KeyUsageContentCommitment })}, "digitalSignature"},
		{"issuer for code signing", Config{Key: key, Now: c.Now, Chain: issue(func(_, r *x509.Certificate) {
			r.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}
		})}, "must not issue for timestamping"},
		{"leaf is a CA", Config{Key: key, Now: c.Now, Chain: issue(func(l, _ *x509.Certificate) { l.IsCA, l.BasicConstraintsValid = true, true })}, "is a CA"},
		{"issuer is no CA", Config{Key: key, Now: c.Now, Chain: issue(func(_, r *x509.Certificate) { r.IsCA = false })}, "not signed by the next"},
		{"never valid together", Config{Key: key, Now: c.Now, Chain: issue(func(l, _ *x509.Certificate) {
			l.NotBefore, l.NotAfter = testStart.AddDate(2, 0, 0), testStart.AddDate(3, 0, 0)
		})}, "never valid together"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := New(test.cfg)
			if !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
}

func reparse(t *testing.T, tmpl, issuer *x509.Certificate, pub any, signer crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, issuer, pub, signer)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestClock walks one authority through the moods of its clock.
func TestClock(t *testing.T) {
	f := newFixture(t, hsmtest.SoftwareKey(hsm.ECDSAP256))
	at := func(d time.Duration) time.Time { return testStart.Add(time.Hour + d) }
	broken := errors.New("clock jumped")
	steps := []struct {
		name string
		now  time.Time
		err  error
		want time.Time // zero: refused
	}{
		{"whole seconds, cut", at(999 * time.Millisecond), nil, at(0)},
		{"forward", at(5 * time.Second), nil, at(5 * time.Second)},
		{"half a second back: the last time again", at(4500 * time.Millisecond), nil, at(5 * time.Second)},
		{"one second back: the accuracy's edge", at(4 * time.Second), nil, at(5 * time.Second)},
		{"more than a second back", at(4*time.Second - 1), nil, time.Time{}},
		{"refused by the clock", at(6 * time.Second), broken, time.Time{}},
		{"a refused time leaves no trace", at(5 * time.Second), nil, at(5 * time.Second)},
		{"before the certificate", testStart.Add(-time.Hour), nil, time.Time{}},
		{"the certificate's last second", testStart.AddDate(3, 0, 0), nil, testStart.AddDate(3, 0, 0)},
		{"after the certificate", testStart.AddDate(3, 0, 1), nil, time.Time{}},
	}
	for _, step := range steps {
		t.Run(step.name, func(t *testing.T) {
			f.clock.set(step.now, step.err)
			reply, err := f.Timestamp(t.Context(), requestFor(crypto.SHA256))
			if step.want.IsZero() {
				if !errors.Is(err, ErrUnavailable) {
					t.Fatalf("got %v, want ErrUnavailable", err)
				}
				if step.err != nil && !errors.Is(err, step.err) {
					t.Errorf("%v does not wrap the clock's error", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got, err := timestamp.ParseResponse(reply)
			if err != nil {
				t.Fatal(err)
			}
			if !got.Time.Equal(step.want) {
				t.Errorf("genTime %s, want %s", got.Time, step.want)
			}
		})
	}
}

func TestNotYetValid(t *testing.T) {
	f := newFixture(t, hsmtest.SoftwareKey(hsm.ECDSAP256))
	f.clock.set(testStart.Add(-time.Second), nil)
	if _, err := f.Timestamp(t.Context(), requestFor(crypto.SHA256)); !errors.Is(err, ErrUnavailable) {
		t.Fatalf("got %v, want ErrUnavailable", err)
	}
}

func TestSerialNeedsRandomness(t *testing.T) {
	if _, err := newSerial(bytes.NewReader(make([]byte, 20))); err == nil {
		t.Error("took 20 zero octets for random ones")
	}
	if _, err := newSerial(bytes.NewReader(nil)); err == nil {
		t.Error("took no octets for random ones")
	}
	s, err := newSerial(bytes.NewReader(bytes.Repeat([]byte{0xff}, 20)))
	if err != nil || s.Sign() != 1 || s.BitLen() != 159 {
		t.Errorf("all ones: %v, %v", s, err)
	}
}

// TestClockOfMany: a clock that only goes forward refuses nobody, however long a
// request pauses after it has read it.
func TestClockOfMany(t *testing.T) {
	f := newFixture(t, hsmtest.SoftwareKey(hsm.ECDSAP256))
	var readings atomic.Int64
	f.now = func() (time.Time, error) {
		n := readings.Add(1)
		runtime.Gosched()
		return testStart.Add(time.Duration(2*n) * time.Second), nil
	}
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 1000 {
				if _, err := f.time(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
}

// TestConcurrent: one signature for each timestamp, serial numbers unique,
// time never back in the order of completion of any one caller.
func TestConcurrent(t *testing.T) {
	key := &hsmtest.Counting{Key: hsmtest.SoftwareKey(hsm.ECDSAP256)}
	f := newFixture(t, key)
	const workers, each = 8, 25
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen := make(map[string]bool)
	for w := range workers {
		wg.Go(func() {
			var last time.Time
			for i := range each {
				f.clock.set(testStart.Add(time.Hour+time.Duration(w*each+i)*7*time.Millisecond), nil)
				reply, err := f.Timestamp(context.Background(), requestFor(crypto.SHA256))
				if errors.Is(err, ErrUnavailable) {
					continue // another worker moved the clock more than a second ahead
				}
				if err != nil {
					t.Error(err)
					return
				}
				got, err := timestamp.ParseResponse(reply)
				if err != nil {
					t.Error(err)
					return
				}
				if got.Time.Before(last) {
					t.Errorf("time went from %s to %s", last, got.Time)
				}
				last = got.Time
				mu.Lock()
				if seen[got.SerialNumber.String()] {
					t.Errorf("serial number %v twice", got.SerialNumber)
				}
				seen[got.SerialNumber.String()] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if len(seen) == 0 || key.Count() != int64(len(seen)) {
		t.Errorf("%d signatures for %d timestamps", key.Count(), len(seen))
	}
}

// TestOpenSSL: openssl makes the query and verifies the reply, under a key in
// a real token.
func TestOpenSSL(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skipf("openssl: %v", err)
	}
	f := newFixture(t, hsmtest.NewKey(t, hsmtest.SoftHSM(t), "tsa", hsm.ECDSAP256))
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	write := func(name string, data []byte) {
		if err := os.WriteFile(path(name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	openssl := func(args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), "openssl", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	write("artifact", artifact)
	write("root.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.chain[1].Raw}))
	write("tsa.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.chain[0].Raw}))
	for _, test := range []struct {
		name  string
		query []string
	}{
		{"certificate and nonce", []string{"-sha256", "-cert"}},
		{"neither", []string{"-sha384", "-no_nonce"}},
		{"policy of sigstore", []string{"-sha512", "-tspolicy", SigstorePolicy.String()}},
	} {
		t.Run(test.name, func(t *testing.T) {
			openssl(append([]string{"ts", "-query", "-data", path("artifact"), "-out", path("query")}, test.query...)...)
			query, err := os.ReadFile(path("query"))
			if err != nil {
				t.Fatal(err)
			}
			req, err := ParseDER(query)
			if err != nil {
				t.Fatal(err)
			}
			reply, err := f.Timestamp(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			write("reply", reply)
			out := openssl("ts", "-verify", "-in", path("reply"), "-queryfile", path("query"), "-CAfile", path("root.pem"),
				"-untrusted", path("tsa.pem"), "-attime", "1795356000")
			if !strings.Contains(out, "Verification: OK") {
				t.Errorf("openssl: %s", out)
			}
			text := openssl("ts", "-reply", "-in", path("reply"), "-text")
			for _, want := range []string{"Status: Granted.", "Accuracy: 0x01 seconds", "Ordering: no", "Time stamp: Nov 22 13:00:00 2026 GMT"} {
				if !strings.Contains(text, want) {
					t.Errorf("openssl's text lacks %q:\n%s", want, text)
				}
			}
		})
	}
}

func BenchmarkTimestamp(b *testing.B) {
	f := newFixture(b, hsmtest.SoftwareKey(hsm.ECDSAP256))
	digest := sha512.Sum512(artifact)
	req := &Request{Hash: crypto.SHA512, Digest: digest[:], Nonce: big.NewInt(1), Certificates: true}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := f.Timestamp(b.Context(), req); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkLibrary is digitorus/timestamp with the same key, for comparison.
func BenchmarkLibrary(b *testing.B) {
	f := newFixture(b, hsmtest.SoftwareKey(hsm.ECDSAP256))
	digest := sha512.Sum512(artifact)
	b.ReportAllocs()
	for b.Loop() {
		ts := timestamp.Timestamp{
			HashAlgorithm: crypto.SHA512, HashedMessage: digest[:], Time: testStart, Nonce: big.NewInt(1), Policy: ownPolicy,
			Accuracy: time.Second, AddTSACertificate: true,
		}
		if _, err := ts.CreateResponseWithOpts(f.chain[0], f.key, crypto.SHA256); err != nil {
			b.Fatal(err)
		}
	}
}
