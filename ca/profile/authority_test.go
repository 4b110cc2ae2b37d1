package profile

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// deterministic signs with the nonce of RFC 6979, so that two signers of the
// same octets give the same certificate.
type deterministic struct{ *ecdsa.PrivateKey }

func (d deterministic) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return d.PrivateKey.Sign(nil, digest, opts)
}

func (d deterministic) SignContext(_ context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return d.PrivateKey.Sign(nil, digest, opts)
}

// authorityTemplateX509 is what crypto/x509 would be asked for.
func authorityTemplateX509(t *testing.T, spec AuthoritySpec, issuer *x509.Certificate) *x509.Certificate {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(spec.Public)
	if err != nil {
		t.Fatal(err)
	}
	id, err := keyID(spki)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: spec.Serial, Subject: spec.Subject, NotBefore: spec.NotBefore, NotAfter: spec.NotAfter, SubjectKeyId: id,
	}
	if spec.Kind == TSA { // crypto/x509 cannot make the extended key usage critical by itself
		tmpl.ExtraExtensions = []pkix.Extension{
			{Id: oidKeyUsage, Critical: true, Value: []byte{3, 2, 7, 0x80}},
			{Id: oidExtKeyUsage, Critical: true, Value: []byte{0x30, 10, 6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 8}},
			{Id: oidSubjectKeyID, Value: append([]byte{4, 20}, id...)},
			{Id: oidAuthorityKeyID, Value: append([]byte{0x30, 22, 0x80, 20}, issuer.SubjectKeyId...)},
		}
		return tmpl
	}
	tmpl.KeyUsage, tmpl.IsCA, tmpl.BasicConstraintsValid = x509.KeyUsageCertSign|x509.KeyUsageCRLSign, true, true
	tmpl.MaxPathLen, tmpl.MaxPathLenZero = spec.PathLen, spec.PathLen == 0
	if spec.Kind == Intermediate {
		tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}
	}
	return tmpl
}

// TestAuthorityBytes: every kind, octet by octet what crypto/x509 makes of the
// same template with the same signature.
func TestAuthorityBytes(t *testing.T) {
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		rootKey, key := deterministic{newKey(t, curve).PrivateKey}, newKey(t, elliptic.P256())
		compare := func(t *testing.T, spec AuthoritySpec, issuer *x509.Certificate) *x509.Certificate {
			t.Helper()
			tmpl := authorityTemplateX509(t, spec, issuer)
			parent := issuer
			if parent == nil {
				parent = tmpl
			}
			want, err := x509.CreateCertificate(nil, tmpl, parent, spec.Public, rootKey)
			if err != nil {
				t.Fatal(err)
			}
			tbs, err := NewAuthority(spec, issuer)
			if err != nil {
				t.Fatal(err)
			}
			got, err := tbs.Sign(t.Context(), rootKey)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("%s differs:\n got %x\nwant %x", spec.Kind, got, want)
			}
			cert, err := x509.ParseCertificate(got)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(cert.RawTBSCertificate, tbs.Raw()) {
				t.Error("signed TBS is not the linted one")
			}
			return cert
		}
		root := compare(t, rootSpec(rootKey.Public()), nil)
		compare(t, interSpec(key.Public()), root)
		tsaRoot := compare(t, tsaRootSpec(rootKey.Public()), nil)
		compare(t, tsaSpec(key.Public()), tsaRoot)
	}
}

// TestTimes: the year 2050 changes the encoding (RFC 5280, 4.1.2.5).
func TestTimes(t *testing.T) {
	key := newKey(t, elliptic.P256())
	for _, end := range []time.Time{
		time.Date(2049, 12, 31, 23, 59, 59, 0, time.UTC), time.Date(2050, 1, 1, 0, 0, 0, 0, time.UTC),
		time.Date(2050, 1, 1, 0, 30, 0, 0, time.FixedZone("east", 3600)),
	} {
		spec := rootSpec(key.Public())
		spec.NotAfter = end
		if got := authority(t, spec, nil, key).NotAfter; !got.Equal(end) {
			t.Errorf("notAfter %s, want %s", got, end)
		}
	}
}

func TestAuthorityRefuses(t *testing.T) {
	h := newHierarchy(t)
	other := newKey(t, elliptic.P256())
	rsaKey := &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 2047), E: 65537}
	tests := []struct {
		name   string
		base   AuthoritySpec
		issuer *x509.Certificate
		change func(*AuthoritySpec)
		want   error
		rule   string
	}{
		{"unknown kind", rootSpec(other.Public()), nil, func(s *AuthoritySpec) { s.Kind = "banana" }, ErrSpec, ""},
		{"leaf is no authority", rootSpec(other.Public()), nil, func(s *AuthoritySpec) { s.Kind = leaf }, ErrSpec, ""},
		{"root with an issuer", rootSpec(other.Public()), h.root, nil, ErrSpec, ""},
		{"intermediate without issuer", interSpec(other.Public()), nil, nil, ErrSpec, ""},
		{"no common name", rootSpec(other.Public()), nil, func(s *AuthoritySpec) { s.Subject.CommonName = "" }, ErrSpec, ""},
		{"path length negative", rootSpec(other.Public()), nil, func(s *AuthoritySpec) { s.PathLen = -1 }, ErrSpec, ""},
		{"path length huge", rootSpec(other.Public()), nil, func(s *AuthoritySpec) { s.PathLen = 5 }, ErrSpec, ""},
		{"intermediate with a path length", interSpec(other.Public()), h.root, func(s *AuthoritySpec) { s.PathLen = 1 }, ErrSpec, ""},
		{"no serial", rootSpec(other.Public()), nil, func(s *AuthoritySpec) { s.Serial = nil }, ErrSpec, ""},
		{"serial 0", rootSpec(other.Public()), nil, func(s *AuthoritySpec) { s.Serial = new(big.Int) }, ErrSpec, ""},
		{"serial negative", rootSpec(other.Public()), nil, func(s *AuthoritySpec) { s.Serial = new(big.Int).Neg(testSerial(1)) }, ErrSpec, ""},
		{"serial of 63 bits", rootSpec(other.Public()), nil, func(s *AuthoritySpec) { s.Serial = big.NewInt(1 << 62) }, ErrSpec, ""},
		{"serial of 160 bits", rootSpec(other.Public()), nil, func(s *AuthoritySpec) { s.Serial = new(big.Int).Lsh(big.NewInt(1), 159) }, ErrSpec, ""},
		{"fraction of a second", rootSpec(other.Public()), nil, func(s *AuthoritySpec) { s.NotBefore = testStart.Add(1) }, ErrSpec, ""},
		{"ends when it starts", rootSpec(other.Public()), nil, func(s *AuthoritySpec) { s.NotAfter = s.NotBefore }, ErrSpec, ""},
		{"zero time", rootSpec(other.Public()), nil, func(s *AuthoritySpec) { s.NotBefore = time.Time{} }, ErrSpec, ""},
		{"year 10000", rootSpec(other.Public()), nil, func(s *AuthoritySpec) { s.NotAfter = testStart.AddDate(9000, 0, 0) }, ErrSpec, ""},
		{"starts before the issuer", interSpec(other.Public()), h.root, func(s *AuthoritySpec) { s.NotBefore = testStart.Add(-time.Second) }, ErrWindow, ""},
		{"ends after the issuer", interSpec(other.Public()), h.inter, func(s *AuthoritySpec) { s.NotAfter = testStart.AddDate(4, 0, 0) }, ErrIssuer, ""},
		{"TSA outlives its root", tsaSpec(other.Public()), h.tsaRoot, func(s *AuthoritySpec) { s.NotAfter = testStart.AddDate(11, 0, 0) }, ErrWindow, ""},
		{"issuer has path length 0", interSpec(other.Public()), h.tsaRoot, nil, ErrIssuer, ""},
		{"issuer is an end entity", interSpec(other.Public()), h.tsa, nil, ErrIssuer, ""},
		{"TSA under a code-signing intermediate", tsaSpec(other.Public()), h.inter, nil, ErrIssuer, ""},
		{"issuer's key again", interSpec(h.rootKey.Public()), h.root, nil, ErrSpec, ""},
		{"issuer's name again", interSpec(other.Public()), h.root, func(s *AuthoritySpec) { s.Subject = h.root.Subject }, ErrLint, "chancery_issuer_name"},
		{"no key", rootSpec(nil), nil, nil, ErrKey, ""},
		{"nil ECDSA key", rootSpec((*ecdsa.PublicKey)(nil)), nil, nil, ErrKey, ""},
		{"P-521", rootSpec(newKey(t, elliptic.P521()).Public()), nil, nil, ErrKey, ""},
		{"P-224", rootSpec(newKey(t, elliptic.P224()).Public()), nil, nil, ErrKey, ""},
		{"RSA", rootSpec(rsaKey), nil, nil, ErrKey, ""},
		{"point not on the curve", rootSpec(&ecdsa.PublicKey{Curve: elliptic.P256(), X: big.NewInt(1), Y: big.NewInt(1)}), nil, nil, ErrKey, ""}, //nolint:staticcheck // on purpose
		{"common name of 65 characters", rootSpec(other.Public()), nil, func(s *AuthoritySpec) { s.Subject.CommonName = strings.Repeat("x", 65) }, ErrLint, "e_subject_common_name_max_length"},
		{"common name with a NUL", rootSpec(other.Public()), nil, func(s *AuthoritySpec) { s.Subject.CommonName = "Acme\x00Root" }, ErrLint, "chancery_subject"},
		{"leading blank", rootSpec(other.Public()), nil, func(s *AuthoritySpec) { s.Subject.CommonName = " Acme" }, ErrLint, "w_subject_dn_leading_whitespace"},
		{"country of lower case", rootSpec(other.Public()), nil, func(s *AuthoritySpec) { s.Subject.Country = []string{"ch"} }, ErrLint, "e_subj_country_not_uppercase"},
		{"invalid UTF-8", rootSpec(other.Public()), nil, func(s *AuthoritySpec) { s.Subject.CommonName = "Acme\xff" }, ErrSpec, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			spec := test.base
			if test.change != nil {
				test.change(&spec)
			}
			_, err := NewAuthority(spec, test.issuer)
			if !errors.Is(err, test.want) {
				t.Fatalf("got %v, want %v", err, test.want)
			}
			wantRule(t, err, test.rule)
		})
	}
}

// wantRule looks for a rule in a *LintError.
func wantRule(t *testing.T, err error, rule string) {
	t.Helper()
	if rule == "" {
		return
	}
	var lintErr *LintError
	if !errors.As(err, &lintErr) {
		t.Fatalf("%v is no *LintError", err)
	}
	for _, r := range lintErr.Rules() {
		if r == rule {
			return
		}
	}
	t.Errorf("rules %v, want %s", lintErr.Rules(), rule)
}

// TestNames: what a ceremony may call its authorities.
func TestNames(t *testing.T) {
	key := newKey(t, elliptic.P256())
	for _, name := range []pkix.Name{
		{CommonName: "Root"},
		{CommonName: "Bücher & Söhne 根"},
		{CommonName: "REHEARSAL Acme Root G1", Organization: []string{"Acme"}, OrganizationalUnit: []string{"PKI"}, Country: []string{"CH"}},
		{CommonName: strings.Repeat("x", 64)},
	} {
		spec := rootSpec(key.Public())
		spec.Subject = name
		if got := authority(t, spec, nil, key).Subject.String(); got != name.String() {
			t.Errorf("subject %s, want %s", got, name)
		}
	}
}

func TestSignRefuses(t *testing.T) {
	key, other := newKey(t, elliptic.P256()), newKey(t, elliptic.P256())
	tbs, err := NewAuthority(rootSpec(key.Public()), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tbs.Sign(t.Context(), other); !errors.Is(err, ErrSigner) {
		t.Errorf("another key: %v", err)
	}
	if other.signatures.Load() != 0 {
		t.Error("another key was asked to sign")
	}
	key.fail = hsm.ErrBusy
	if _, err := tbs.Sign(t.Context(), key); !errors.Is(err, hsm.ErrBusy) {
		t.Errorf("busy token: %v", err)
	}
	key.fail = nil
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := tbs.Sign(ctx, key); !errors.Is(err, context.Canceled) {
		t.Errorf("ended context: %v", err)
	}
	if _, err := tbs.Sign(t.Context(), empty{key}); !errors.Is(err, ErrSigner) {
		t.Errorf("empty signature: %v", err)
	}
	raw := tbs.Raw()
	raw[len(raw)-1] ^= 1
	der, err := tbs.Sign(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	if key.signatures.Load() != 1 {
		t.Errorf("%d signatures, want 1", key.signatures.Load())
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	if err := cert.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature); err != nil {
		t.Errorf("a change to Raw's result reached the certificate: %v", err)
	}
}

// empty is a signer that returns no signature and no error.
type empty struct{ Signer }

func (empty) SignContext(context.Context, []byte, crypto.SignerOpts) ([]byte, error) { return nil, nil }

func TestCheckAuthority(t *testing.T) {
	h := newHierarchy(t)
	for _, test := range []struct {
		name         string
		kind         Kind
		cert, issuer *x509.Certificate
		want         error
	}{
		{"root", Root, h.root, nil, nil},
		{"intermediate", Intermediate, h.inter, h.root, nil},
		{"TSA root", TSARoot, h.tsaRoot, nil, nil},
		{"TSA", TSA, h.tsa, h.tsaRoot, nil},
		{"root as intermediate", Intermediate, h.root, nil, ErrSpec},
		{"intermediate as root", Root, h.inter, nil, ErrIssuer},
		{"intermediate as TSA", TSA, h.inter, h.root, ErrLint},
		{"TSA as intermediate", Intermediate, h.tsa, h.tsaRoot, ErrIssuer},
		{"another issuer", TSA, h.tsa, h.root, ErrIssuer},
		{"leaf", leaf, h.inter, h.root, ErrSpec},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := CheckAuthority(test.kind, test.cert, test.issuer); !errors.Is(err, test.want) {
				t.Errorf("got %v, want %v", err, test.want)
			}
		})
	}
	t.Run("one bit of the signature", func(t *testing.T) {
		changed := *h.inter
		changed.Signature = bytes.Clone(h.inter.Signature)
		changed.Signature[len(changed.Signature)-1] ^= 1
		if err := CheckAuthority(Intermediate, &changed, h.root); !errors.Is(err, ErrIssuer) {
			t.Errorf("got %v, want ErrIssuer", err)
		}
	})
}

// TestOpenSSL: openssl reads and verifies the whole hierarchy and a leaf, all
// signed in a token.
func TestOpenSSL(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skipf("openssl: %v", err)
	}
	token := hsmtest.SoftHSM(t)
	rootKey := hsmtest.NewKey(t, token, "root", hsm.ECDSAP384)
	interKey := hsmtest.NewKey(t, token, "intermediate", hsm.ECDSAP256)
	root := authority(t, rootSpec(rootKey.Public()), nil, rootKey)
	inter := authority(t, interSpec(interKey.Public()), root, rootKey)
	issuer, err := NewIssuer(inter)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	openssl := func(args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), "openssl", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	at := strconv.FormatInt(testStart.Add(time.Hour+time.Minute).Unix(), 10)
	rootPEM, interPEM := write("root.pem", root.Raw), write("inter.pem", inter.Raw)
	openssl("verify", "-x509_strict", "-attime", at, "-CAfile", rootPEM, interPEM)
	for name, spec := range map[string]LeafSpec{
		"email": emailSpec(newKey(t, elliptic.P256()).Public()), "workflow": workflowSpec(newKey(t, elliptic.P521()).Public()),
		"username": usernameSpec(newKey(t, elliptic.P384()).Public()),
	} {
		l, err := issuer.Leaf(spec)
		if err != nil {
			t.Fatal(err)
		}
		final, err := l.SignFinal(t.Context(), interKey, placeholderSCT())
		if err != nil {
			t.Fatal(err)
		}
		leafPEM := write(name+".pem", final)
		openssl("verify", "-x509_strict", "-attime", at, "-CAfile", rootPEM, "-untrusted", interPEM, leafPEM)
		text := openssl("x509", "-in", leafPEM, "-noout", "-text")
		for _, want := range []string{
			"Version: 3 (0x2)", "ecdsa-with-SHA256", "X509v3 Key Usage: critical\n                Digital Signature\n",
			"X509v3 Extended Key Usage: \n                Code Signing\n", "X509v3 Subject Alternative Name: critical\n", "CT Precertificate SCTs",
		} {
			if !strings.Contains(text, want) {
				t.Errorf("%s: openssl's text lacks %q:\n%s", name, want, text)
			}
		}
	}
}
