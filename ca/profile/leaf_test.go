package profile

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	ct "github.com/google/certificate-transparency-go"
	cttls "github.com/google/certificate-transparency-go/tls"
	ctx509 "github.com/google/certificate-transparency-go/x509"
	"github.com/google/certificate-transparency-go/x509util"
	"github.com/google/go-cmp/cmp"
	"github.com/sigstore/fulcio/pkg/certificate"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	zx509 "github.com/zmap/zcrypto/x509"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// testLog signs SCTs with certificate-transparency-go's own encoding.
type testLog struct{ key *testKey }

func (l *testLog) id(t testing.TB) [32]byte {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(l.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(spki)
}

func (l *testLog) sct(t testing.TB, keyHash [32]byte, tbs []byte, extensions []byte) []byte {
	t.Helper()
	s := ct.SignedCertificateTimestamp{
		SCTVersion: ct.V1, LogID: ct.LogID{KeyID: l.id(t)}, Timestamp: uint64(testStart.UnixMilli()), Extensions: extensions,
	}
	input, err := ct.SerializeSCTSignatureInput(s, ct.LogEntry{Leaf: ct.MerkleTreeLeaf{
		Version: ct.V1, LeafType: ct.TimestampedEntryLeafType,
		TimestampedEntry: &ct.TimestampedEntry{
			Timestamp: s.Timestamp, EntryType: ct.PrecertLogEntryType, Extensions: extensions,
			PrecertEntry: &ct.PreCert{IssuerKeyHash: keyHash, TBSCertificate: tbs},
		},
	}})
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(input)
	signature, err := l.key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	s.Signature = ct.DigitallySigned{
		Algorithm: cttls.SignatureAndHashAlgorithm{Hash: cttls.SHA256, Signature: cttls.ECDSA}, Signature: signature,
	}
	raw, err := cttls.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// x509Template is what crypto/x509 would be asked for to get the leaf, with
// last as its last extension.
func x509Template(t *testing.T, spec LeafSpec, serial *big.Int, last pkix.Extension) *x509.Certificate {
	t.Helper()
	ski, err := cryptoutils.SKID(spec.Public)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial, NotBefore: spec.NotBefore, NotAfter: spec.NotAfter, SubjectKeyId: ski,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
	}
	switch spec.SAN.Type {
	case Email:
		tmpl.EmailAddresses = []string{spec.SAN.Value}
	case URI:
		u, err := url.Parse(spec.SAN.Value)
		if err != nil {
			t.Fatal(err)
		}
		tmpl.URIs = []*url.URL{u}
	case OtherName:
		san, err := cryptoutils.MarshalOtherNameSAN(spec.SAN.Value, true)
		if err != nil {
			t.Fatal(err)
		}
		tmpl.ExtraExtensions = append(tmpl.ExtraExtensions, *san)
	}
	exts, err := spec.Extensions.Render()
	if err != nil {
		t.Fatal(err)
	}
	tmpl.ExtraExtensions = append(append(tmpl.ExtraExtensions, exts...), last)
	return tmpl
}

func leafSpecs(t testing.TB) map[string]LeafSpec {
	t.Helper()
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	edKey, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spiffe := emailSpec(newKey(t, elliptic.P521()).Public())
	spiffe.SAN = SAN{Type: URI, Value: "spiffe://prod/ns/build"}
	rsaSpec, edSpec := emailSpec(&rsaKey.PublicKey), workflowSpec(edKey)
	return map[string]LeafSpec{
		"email P-256": emailSpec(newKey(t, elliptic.P256()).Public()), "workflow P-384": workflowSpec(newKey(t, elliptic.P384()).Public()),
		"username P-256": usernameSpec(newKey(t, elliptic.P256()).Public()), "SPIFFE P-521": spiffe, "RSA 2048": rsaSpec, "workflow Ed25519": edSpec,
	}
}

// TestLeafBytes: precertificate and final certificate are, octet by octet,
// what crypto/x509 makes of the same template; the logged TBS is what
// certificate-transparency-go makes of either; the SCT verifies there.
func TestLeafBytes(t *testing.T) {
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		rootKey, caKey := newKey(t, elliptic.P384()), deterministic{newKey(t, curve).PrivateKey}
		root := authority(t, rootSpec(rootKey.Public()), nil, rootKey)
		inter := authority(t, interSpec(caKey.Public()), root, rootKey)
		issuer, err := NewIssuer(inter)
		if err != nil {
			t.Fatal(err)
		}
		log := &testLog{newKey(t, elliptic.P256())}
		for name, spec := range leafSpecs(t) {
			t.Run(curve.Params().Name+"/"+name, func(t *testing.T) {
				l, err := issuer.Leaf(spec)
				if err != nil {
					t.Fatal(err)
				}
				precert, err := l.SignPrecertificate(t.Context(), caKey)
				if err != nil {
					t.Fatal(err)
				}
				want, err := x509.CreateCertificate(nil, x509Template(t, spec, l.Serial(), poison), inter, spec.Public, caKey)
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(precert, want) {
					t.Errorf("precertificate differs:\n got %x\nwant %x", precert, want)
				}
				sct := log.sct(t, issuer.KeyHash(), l.LogTBS(), nil)
				final, err := l.SignFinal(t.Context(), caKey, sct)
				if err != nil {
					t.Fatal(err)
				}
				if want, err = x509.CreateCertificate(nil, x509Template(t, spec, l.Serial(), listOf(t, sct)), inter, spec.Public, caKey); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(final, want) {
					t.Errorf("final certificate differs:\n got %x\nwant %x", final, want)
				}
				checkTransparent(t, issuer, l, log, precert, final, sct)
			})
		}
	}
}

// listOf is the SCT list extension in certificate-transparency-go's encoding.
func listOf(t *testing.T, sct []byte) pkix.Extension {
	t.Helper()
	list, err := cttls.Marshal(ctx509.SignedCertificateTimestampList{SCTList: []ctx509.SerializedSCT{{Val: sct}}})
	if err != nil {
		t.Fatal(err)
	}
	value, err := asn1.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	return pkix.Extension{Id: oidSCTList, Value: value}
}

func checkTransparent(t *testing.T, issuer *Issuer, l *Leaf, log *testLog, precert, final, sct []byte) {
	t.Helper()
	if start, end := l.Validity(); !start.Equal(testStart.Add(time.Hour)) || !end.Equal(start.Add(10*time.Minute)) {
		t.Errorf("validity %s to %s", start, end)
	}
	if err := l.CheckSCT(sct, log.key.Public()); err != nil {
		t.Error(err)
	}
	if err := Correspond(precert, final); err != nil {
		t.Error(err)
	}
	pre, err := x509.ParseCertificate(precert)
	if err != nil {
		t.Fatal(err)
	}
	fin, err := x509.ParseCertificate(final)
	if err != nil {
		t.Fatal(err)
	}
	fromPre, err := ctx509.BuildPrecertTBS(pre.RawTBSCertificate, nil)
	if err != nil {
		t.Fatal(err)
	}
	fromFinal, err := ctx509.RemoveSCTList(fin.RawTBSCertificate)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(fromPre, l.LogTBS()) || !bytes.Equal(fromFinal, l.LogTBS()) {
		t.Error("the logged TBS is not what certificate-transparency-go makes of the two forms")
	}
	ctLeaf, err := ctx509.ParseCertificate(final)
	if err != nil {
		t.Fatal(err)
	}
	ctIssuer, err := ctx509.ParseCertificate(issuer.Certificate().Raw)
	if err != nil {
		t.Fatal(err)
	}
	scts, err := x509util.ParseSCTsFromSCTList(&ctLeaf.SCTList)
	if err != nil || len(scts) != 1 {
		t.Fatalf("%d SCTs: %v", len(scts), err)
	}
	entry, err := ct.MerkleTreeLeafForEmbeddedSCT([]*ctx509.Certificate{ctLeaf, ctIssuer}, scts[0].Timestamp)
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := ct.NewSignatureVerifier(log.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	if err := verifier.VerifySCTSignature(*scts[0], ct.LogEntry{Leaf: *entry}); err != nil {
		t.Errorf("embedded SCT: %v", err)
	}
}

// TestEveryFormPassesEveryLint is the argument of the package comment, tried:
// for many leaves, the logged form, the precertificate, and the final form
// with a real SCT get the findings of the form that was linted: none.
func TestEveryFormPassesEveryLint(t *testing.T) {
	h := newHierarchy(t)
	issuer := newIssuer(t, h)
	log := &testLog{newKey(t, elliptic.P256())}
	lints, err := registry()
	if err != nil {
		t.Fatal(err)
	}
	if len(lints.lints) < 140 {
		t.Fatalf("only %d lints in the registry", len(lints.lints))
	}
	findings := func(tbs []byte) []Finding {
		der, err := throwawaySign(tbs, issuer.algorithm)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := zx509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return lints.run(cert)
	}
	for name, spec := range leafSpecs(t) {
		for i := range 4 {
			l, err := issuer.Leaf(spec)
			if err != nil {
				t.Fatal(err)
			}
			final, err := l.final(log.sct(t, issuer.KeyHash(), l.logged, bytes.Repeat([]byte{1}, 8*i)))
			if err != nil {
				t.Fatal(err)
			}
			forms := map[form][]byte{formLogged: l.logged, formPrecertificate: l.precert, formFinal: final}
			for f, tbs := range forms {
				if found := findings(tbs); len(found) != 0 {
					t.Errorf("%s, form %d: %v", name, f, found)
				}
				c := &candidate{kind: leaf, form: f, issuer: h.inter, algorithm: issuer.algorithm}
				if err := lintCopy(tbs, issuer.algorithm, c); err != nil {
					t.Errorf("%s, form %d: %v", name, f, err)
				}
			}
		}
	}
	// The same for leaves that fail: the shared octets decide, not the form.
	tmpl, _, err := issuer.template(emailSpec(newKey(t, elliptic.P256()).Public()))
	if err != nil {
		t.Fatal(err)
	}
	for _, change := range []func(*template){
		func(b *template) { b.extensions[0].Critical = false },
		func(b *template) { b.extensions[2].Critical = true },
		func(b *template) { b.extensions[4].Critical = false },
		func(b *template) { b.extensions = b.extensions[:4] },
		func(b *template) { b.extensions = append(b.extensions, b.extensions[0]) },
	} {
		bad := *tmpl
		bad.extensions = append([]pkix.Extension{}, tmpl.extensions...)
		change(&bad)
		b, err := bad.encode()
		if err != nil {
			t.Fatal(err)
		}
		l := &Leaf{body: b}
		placeholder, err := l.final(placeholderSCT())
		if err != nil {
			t.Fatal(err)
		}
		end, err := encodeExtension(poison)
		if err != nil {
			t.Fatal(err)
		}
		precert, err := b.tbs(end)
		if err != nil {
			t.Fatal(err)
		}
		want := findings(placeholder)
		if len(want) == 0 {
			t.Error("a bad leaf has no finding: this check shows nothing")
		}
		if d := cmp.Diff(want, findings(precert)); d != "" {
			t.Errorf("the precertificate has other findings: %s", d)
		}
	}
}

// TestFulcioReads: upstream's parser gives back every extension.
func TestFulcioReads(t *testing.T) {
	h := newHierarchy(t)
	issuer := newIssuer(t, h)
	for name, spec := range leafSpecs(t) {
		l, err := issuer.Leaf(spec)
		if err != nil {
			t.Fatal(err)
		}
		der, err := l.SignFinal(t.Context(), h.interKey, placeholderSCT())
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if err := issuer.CheckLeaf(cert); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		got, err := certificate.ParseExtensions(cert.Extensions)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(spec.Extensions, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		if d := cmp.Diff([]string{spec.SAN.Value}, cryptoutils.GetSubjectAlternateNames(cert)); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		roots, inters := x509.NewCertPool(), x509.NewCertPool()
		roots.AddCert(h.root)
		inters.AddCert(h.inter)
		cert.UnhandledCriticalExtensions = nil // crypto/x509 does not know otherName; sigstore does the same
		if _, err := cert.Verify(x509.VerifyOptions{
			Roots: roots, Intermediates: inters, CurrentTime: spec.NotBefore, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
		}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSerials(t *testing.T) {
	seen := make(map[string]bool)
	for range 1000 {
		s, err := randomSerial()
		if err != nil {
			t.Fatal(err)
		}
		if err := checkSerial(s); err != nil {
			t.Fatal(err)
		}
		if seen[s.String()] {
			t.Fatalf("serial number %v twice", s)
		}
		seen[s.String()] = true
	}
}

func TestLeafRefuses(t *testing.T) {
	h := newHierarchy(t)
	issuer := newIssuer(t, h)
	key := newKey(t, elliptic.P256()).Public()
	san := func(kind SANType, value string) func(*LeafSpec) {
		return func(s *LeafSpec) { s.SAN = SAN{Type: kind, Value: value} }
	}
	tests := []struct {
		name   string
		change func(*LeafSpec)
		want   error
		rule   string
	}{
		{"no key", func(s *LeafSpec) { s.Public = nil }, ErrKey, ""},
		{"P-224", func(s *LeafSpec) { s.Public = newKey(t, elliptic.P224()).Public() }, ErrKey, ""},
		{"RSA 1024", func(s *LeafSpec) { s.Public = &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 1023), E: 65537} }, ErrKey, ""},
		{"RSA 16384", func(s *LeafSpec) { s.Public = &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 16383), E: 65537} }, ErrKey, ""},
		{"RSA exponent 3", func(s *LeafSpec) { s.Public = &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 2047), E: 3} }, ErrKey, ""},
		{"RSA without modulus", func(s *LeafSpec) { s.Public = &rsa.PublicKey{E: 65537} }, ErrKey, ""},
		{"RSA even modulus of close factors", func(s *LeafSpec) {
			p := new(big.Int).Lsh(big.NewInt(1), 1024)
			s.Public = &rsa.PublicKey{N: new(big.Int).Mul(new(big.Int).Add(p, big.NewInt(643)), new(big.Int).Add(p, big.NewInt(1))), E: 65537}
		}, ErrKey, "e_rsa_fermat_factorization"},
		{"nil RSA key", func(s *LeafSpec) { s.Public = (*rsa.PublicKey)(nil) }, ErrKey, ""},
		{"Ed25519 of 31 octets", func(s *LeafSpec) { s.Public = ed25519.PublicKey(make([]byte, 31)) }, ErrKey, ""},
		{"point not on the curve", func(s *LeafSpec) {
			s.Public = &ecdsa.PublicKey{Curve: elliptic.P256(), X: big.NewInt(1), Y: big.NewInt(1)} //nolint:staticcheck // on purpose
		}, ErrKey, ""},
		{"the issuer's key", func(s *LeafSpec) { s.Public = h.interKey.Public() }, ErrKey, "chancery_leaf_key"},
		{"a private key", func(s *LeafSpec) { s.Public = h.interKey.PrivateKey }, ErrKey, ""},

		{"no name", func(s *LeafSpec) { s.SAN = SAN{} }, ErrName, ""},
		{"unknown name type", san("dns", "example.com"), ErrName, ""},
		{"e-mail empty", san(Email, ""), ErrName, ""},
		{"e-mail without at", san(Email, "jane"), ErrName, ""},
		{"e-mail with two ats", san(Email, "jane@a@example.com"), ErrName, ""},
		{"e-mail with NUL", san(Email, "jane@example.com\x00.evil.example"), ErrName, ""},
		{"e-mail with line break", san(Email, "jane@example.com\n"), ErrName, ""},
		{"e-mail with blank", san(Email, "jane @example.com"), ErrName, ""},
		{"e-mail with display name", san(Email, "Jane <jane@example.com>"), ErrName, ""},
		{"e-mail in brackets", san(Email, "<jane@example.com>"), ErrName, ""},
		{"e-mail with comment", san(Email, "jane@example.com(c)"), ErrName, ""},
		{"e-mail quoted", san(Email, `"jane doe"@example.com`), ErrName, ""},
		{"e-mail list", san(Email, "jane@example.com,eve@example.com"), ErrName, ""},
		{"e-mail with U-label domain", san(Email, "jane@bücher.example"), ErrName, ""},
		{"e-mail with UTF-8 local part", san(Email, "jürg@example.com"), ErrName, ""},
		{"e-mail not UTF-8", san(Email, "jane\xff@example.com"), ErrName, ""},
		{"e-mail of 255 octets", san(Email, strings.Repeat("a", 64)+"@"+strings.Repeat("b", 190)), ErrName, ""},
		{"URI empty", san(URI, ""), ErrName, ""},
		{"URI relative", san(URI, "/path"), ErrName, ""},
		{"URI without host", san(URI, "https:///path"), ErrName, ""},
		{"URI opaque", san(URI, "mailto:jane@example.com"), ErrName, ""},
		{"URI with user", san(URI, "https://jane:secret@example.com/"), ErrName, ""},
		{"URI with control character", san(URI, "https://example.com/\x01"), ErrName, ""},
		{"URI with NUL", san(URI, "https://example.com/\x00"), ErrName, ""},
		{"URI not UTF-8", san(URI, "https://example.com/\xff"), ErrName, ""},
		{"URI with bad escape", san(URI, "https://example.com/%zz"), ErrName, ""},
		{"URI with U-label host", san(URI, "https://bücher.example/"), ErrName, ""},
		{"URI host ends in a dot", san(URI, "https://example.com./"), ErrName, ""},
		{"URI host with an empty label", san(URI, "https://example..com/"), ErrName, ""},
		{"URI host with a long label", san(URI, "https://"+strings.Repeat("a", 64)+".example/"), ErrName, ""},
		{"URI host of 254 octets", san(URI, "https://"+strings.Repeat("a.", 126)+"aa/"), ErrName, ""},
		{"URI with a zone", san(URI, "https://[fe80::1%25eth0]/"), ErrName, ""},
		{"URI of 2049 octets", san(URI, "https://example.com/"+strings.Repeat("a", 2029)), ErrName, ""},
		{"URI that grows above 2048 octets", san(URI, "https://example.com/"+strings.Repeat("ü", 900)), ErrName, ""},
		{"username empty", san(OtherName, ""), ErrName, ""},
		{"username with NUL", san(OtherName, "jane\x00!example.com"), ErrName, ""},
		{"username not UTF-8", san(OtherName, "jane\xc3!example.com"), ErrName, ""},
		{"username of 2049 octets", san(OtherName, strings.Repeat("a", 2049)), ErrName, ""},

		{"no issuer text", func(s *LeafSpec) { s.Extensions.Issuer = "" }, ErrName, ""},
		{"issuer with NUL", func(s *LeafSpec) { s.Extensions.Issuer = "https://a.example\x00" }, ErrName, ""},
		{"issuer not UTF-8", func(s *LeafSpec) { s.Extensions.Issuer = "https://a.example/\xff" }, ErrName, ""},
		{"subject with escape sequence", func(s *LeafSpec) { s.Extensions.Subject = "\x1b[2J" }, ErrName, ""},
		{"raw extension not UTF-8", func(s *LeafSpec) { s.Extensions.GithubWorkflowName = "\xff" }, ErrName, ""},
		{"extension of 4097 octets", func(s *LeafSpec) { s.Extensions.RunInvocationURI = strings.Repeat("a", 4097) }, ErrName, ""},
		{"extensions that make 16 KiB", func(s *LeafSpec) {
			long := strings.Repeat("a", 4096)
			s.Extensions.RunInvocationURI, s.Extensions.BuildConfigURI, s.Extensions.BuildSignerURI, s.Extensions.SourceRepositoryURI = long, long, long, long
		}, ErrName, "chancery_leaf_size"},

		{"serial of 63 bits", func(s *LeafSpec) { s.Serial = big.NewInt(1 << 62) }, ErrSpec, ""},
		{"ends when it starts", func(s *LeafSpec) { s.NotAfter = s.NotBefore }, ErrSpec, ""},
		{"shorter than a second", func(s *LeafSpec) { s.NotAfter = s.NotBefore.Add(time.Second - 1) }, ErrSpec, ""},
		{"no time", func(s *LeafSpec) { s.NotBefore, s.NotAfter = time.Time{}, time.Time{} }, ErrSpec, ""},
		{"before the issuer", func(s *LeafSpec) { s.NotBefore = testStart.Add(-time.Second) }, ErrWindow, ""},
		{"issuer ends first", func(s *LeafSpec) {
			s.NotBefore, s.NotAfter = h.inter.NotAfter.Add(-5*time.Minute), h.inter.NotAfter.Add(5*time.Minute)
		}, ErrWindow, ""},
		{"to the issuer's last second", func(s *LeafSpec) { s.NotBefore, s.NotAfter = h.inter.NotAfter.Add(-time.Minute), h.inter.NotAfter }, nil, ""},
		{"longer than a day", func(s *LeafSpec) { s.NotAfter = s.NotBefore.Add(MaxLifetime + time.Second) }, ErrLint, "chancery_leaf_lifetime"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			spec := emailSpec(key)
			test.change(&spec)
			_, err := issuer.Leaf(spec)
			if !errors.Is(err, test.want) {
				t.Fatalf("got %v, want %v", err, test.want)
			}
			wantRule(t, err, test.rule)
			if err != nil && len(err.Error()) > 1000 {
				t.Errorf("error of %d octets", len(err.Error()))
			}
		})
	}
}

// TestLeafNames: names that look odd and are right.
func TestLeafNames(t *testing.T) {
	h := newHierarchy(t)
	issuer := newIssuer(t, h)
	for _, test := range []struct {
		kind        SANType
		value, want string // want: as the certificate has it, if not value
	}{
		{Email, "o'brien+ci@sub.example.com", ""},
		{Email, "jane@xn--bcher-kva.example", ""},
		{Email, "a@b", ""},
		{URI, "https://github.com/acme/widget/.github/workflows/release.yml@refs/heads/main", ""},
		{URI, "https://github.com/acme/widget/.github/workflows/my flow.yml@refs/heads/ü", "https://github.com/acme/widget/.github/workflows/my%20flow.yml@refs/heads/%C3%BC"},
		{URI, "https://gitlab:8443/acme/widget//.gitlab-ci.yml@refs/tags/v1", ""},
		{URI, "https://192.0.2.1:8443/x", ""},
		{URI, "https://[2001:db8::1]:8443/x", ""},
		{URI, "https://kubernetes.io/namespaces/ci/serviceaccounts/build", ""},
		{URI, "spiffe://prod/ns/build", ""},
		{URI, "https://example.com/" + strings.Repeat("a", 2028), ""},
		{OtherName, "jürg 根!example.com", ""},
		{OtherName, strings.Repeat("a", 2048), ""},
	} {
		spec := emailSpec(newKey(t, elliptic.P256()).Public())
		spec.SAN = SAN{Type: test.kind, Value: test.value}
		l, err := issuer.Leaf(spec)
		if err != nil {
			t.Errorf("%s %.60q: %v", test.kind, test.value, err)
			continue
		}
		der, err := l.SignFinal(t.Context(), h.interKey, placeholderSCT())
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		want := test.value
		if test.want != "" {
			want = test.want
		}
		if d := cmp.Diff([]string{want}, cryptoutils.GetSubjectAlternateNames(cert)); d != "" {
			t.Error(d)
		}
	}
}

func TestNewIssuerRefuses(t *testing.T) {
	h := newHierarchy(t)
	p521 := *h.inter
	p521.PublicKey = newKey(t, elliptic.P521()).Public()
	noSKI, noName := *h.inter, *h.inter
	noSKI.SubjectKeyId, noName.Subject = nil, pkix.Name{}
	noUsage := *h.inter
	noUsage.KeyUsage = x509.KeyUsageCRLSign
	serverAuth := *h.inter
	serverAuth.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	for name, cert := range map[string]*x509.Certificate{
		"nil": nil, "TSA": h.tsa, "P-521": &p521, "no key identifier": &noSKI, "no subject": &noName, "no certSign": &noUsage, "server EKU": &serverAuth,
	} {
		if _, err := NewIssuer(cert); !errors.Is(err, ErrIssuer) {
			t.Errorf("%s: %v, want ErrIssuer", name, err)
		}
	}
	if _, err := NewIssuer(h.root); err != nil {
		t.Errorf("a root without purposes may issue: %v", err)
	}
}

func TestSCTs(t *testing.T) {
	h := newHierarchy(t)
	issuer := newIssuer(t, h)
	log, otherLog := &testLog{newKey(t, elliptic.P256())}, &testLog{newKey(t, elliptic.P256())}
	newLeaf := func() *Leaf {
		l, err := issuer.Leaf(emailSpec(newKey(t, elliptic.P256()).Public()))
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	l, other := newLeaf(), newLeaf()
	good := log.sct(t, issuer.KeyHash(), l.LogTBS(), nil)
	parsed, err := parseSCT(good)
	if err != nil {
		t.Fatal(err)
	}
	data, err := parsed.signedData(issuer.KeyHash(), l.LogTBS())
	if err != nil {
		t.Fatal(err)
	}
	digest, signature := sha256.Sum256(data), parsed.signature
	edit := func(change func([]byte)) []byte {
		b := bytes.Clone(good)
		change(b)
		return b
	}
	tests := []struct {
		name  string
		sct   []byte
		form  bool // SignFinal takes it
		check bool // CheckSCT takes it
	}{
		{"good", good, true, true},
		{"with extensions", log.sct(t, issuer.KeyHash(), l.LogTBS(), []byte{0, 0, 5, 0, 0, 0, 0, 7}), true, true},
		{"empty", nil, false, false},
		{"version 2", edit(func(b []byte) { b[0] = 1 }), false, false},
		{"truncated", good[:len(good)-1], false, false},
		{"trailing octet", append(bytes.Clone(good), 0), false, false},
		{"twice", append(bytes.Clone(good), good...), false, false},
		{"RSA", edit(func(b []byte) { b[44] = 1 }), false, false},
		{"SHA-1", edit(func(b []byte) { b[43] = 2 }), false, false},
		{"huge", make([]byte, 1<<16), false, false},
		{"signature is no DER", edit(func(b []byte) { b[47] = 0x31 }), false, false},
		{"another timestamp", edit(func(b []byte) { b[40] ^= 1 }), true, false},
		{"another log's", otherLog.sct(t, issuer.KeyHash(), l.LogTBS(), nil), true, false},
		{"another log's under this log's ID", underID(otherLog.sct(t, issuer.KeyHash(), l.LogTBS(), nil), good), true, false},
		{"of another leaf", log.sct(t, issuer.KeyHash(), other.LogTBS(), nil), true, false},
		{"of another issuer", log.sct(t, [32]byte{1}, l.LogTBS(), nil), true, false},
		{"over the precertificate with its poison", log.sct(t, issuer.KeyHash(), l.precert, nil), true, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			before := h.interKey.signatures.Load()
			final, err := l.SignFinal(t.Context(), h.interKey, test.sct)
			formOK := err == nil
			if formOK != test.form || (!formOK && !errors.Is(err, ErrSCT)) {
				t.Errorf("SignFinal: %v", err)
			}
			if !formOK && h.interKey.signatures.Load() != before {
				t.Error("signed before it refused")
			}
			if formOK && len(final) == 0 {
				t.Error("no certificate")
			}
			if err := l.CheckSCT(test.sct, log.key.Public()); (err == nil) != test.check || (err != nil && !errors.Is(err, ErrSCT)) {
				t.Errorf("CheckSCT: %v", err)
			}
			// What the log's key signed for this leaf lets this SCT pass alone.
			err = l.CheckSignedSCT(test.sct, log.key.Public(), digest, signature)
			if want := bytes.Equal(test.sct, good); (err == nil) != want || (err != nil && !errors.Is(err, ErrSCT)) {
				t.Errorf("CheckSignedSCT: %v", err)
			}
		})
	}
	for name, signed := range map[string]struct {
		digest    [32]byte
		signature []byte
	}{"another digest": {[32]byte{}, signature}, "another signature": {digest, edit(func(b []byte) { b[60] ^= 1 })[47:]}, "no signature": {digest, nil}} {
		if err := l.CheckSignedSCT(good, log.key.Public(), signed.digest, signed.signature); !errors.Is(err, ErrSCT) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, key := range map[string]crypto.PublicKey{"nil": nil, "nil ECDSA": (*ecdsa.PublicKey)(nil), "Ed25519": ed25519.PublicKey(make([]byte, 32))} {
		if err := l.CheckSCT(good, key); !errors.Is(err, ErrSCT) {
			t.Errorf("log key %s: %v", name, err)
		}
	}
}

// underID gives sct the log ID of other.
func underID(sct, other []byte) []byte {
	copy(sct[1:33], other[1:33])
	return sct
}

// TestCorrespond: swapped and altered forms.
func TestCorrespond(t *testing.T) {
	h := newHierarchy(t)
	issuer := newIssuer(t, h)
	sign := func(spec LeafSpec) (precert, final []byte) {
		l, err := issuer.Leaf(spec)
		if err != nil {
			t.Fatal(err)
		}
		if precert, err = l.SignPrecertificate(t.Context(), h.interKey); err != nil {
			t.Fatal(err)
		}
		if final, err = l.SignFinal(t.Context(), h.interKey, placeholderSCT()); err != nil {
			t.Fatal(err)
		}
		return precert, final
	}
	spec := emailSpec(newKey(t, elliptic.P256()).Public())
	precert, final := sign(spec)
	if err := Correspond(precert, final); err != nil {
		t.Fatal(err)
	}
	_, another := sign(spec)
	later := spec
	later.Serial, later.NotAfter = testSerial(7), spec.NotAfter.Add(time.Second)
	same := spec
	same.Serial = testSerial(7)
	_, finalLater := sign(later)
	precertSame, finalSame := sign(same)
	// rebuild takes poison and SCT list off a certificate and puts last on.
	rebuild := func(der []byte, last ...pkix.Extension) []byte {
		tbs, err := tbsOf(der)
		if err != nil {
			t.Fatal(err)
		}
		parts, err := cut(tbs)
		if err != nil {
			t.Fatal(err)
		}
		var tail []byte
		for _, e := range last {
			one, err := encodeExtension(e)
			if err != nil {
				t.Fatal(err)
			}
			tail = append(tail, one...)
		}
		raw, err := body{head: parts.head, extensions: parts.rest}.tbs(tail)
		if err != nil {
			t.Fatal(err)
		}
		out, err := throwawaySign(raw, issuer.algorithm)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	list := listOf(t, placeholderSCT())
	twoSCTs := pkix.Extension{Id: oidSCTList, Value: append([]byte{4, 0x81, 0xf8}, make([]byte, 0xf8)...)}
	mild := poison
	mild.Critical = false
	notNull := poison
	notNull.Value = []byte{4, 0}
	unknown := pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Value: []byte{5, 0}}
	for _, test := range []struct {
		name           string
		precert, final []byte
	}{
		{"swapped", final, precert},
		{"precertificate twice", precert, precert},
		{"final twice", final, final},
		{"of another leaf", precert, another},
		{"of another validity", precertSame, finalLater},
		{"of another serial", precert, finalSame},
		{"no certificate", precert, []byte("hello")},
		{"empty", nil, nil},
		{"trailing octet", precert, append(bytes.Clone(final), 0)},
		{"precertificate with both", rebuild(precert, list, poison), final},
		{"final with both", precert, rebuild(final, poison, list)},
		{"poison not critical", rebuild(precert, mild), final},
		{"poison not NULL", rebuild(precert, notNull), final},
		{"poison twice", rebuild(precert, poison, poison), final},
		{"SCT list twice", precert, rebuild(final, list, list)},
		{"malformed SCT list", precert, rebuild(final, twoSCTs)},
		{"an extension more", precert, rebuild(final, unknown, list)},
		{"neither", rebuild(precert), rebuild(final)},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := Correspond(test.precert, test.final); !errors.Is(err, ErrCorrespondence) {
				t.Errorf("got %v, want ErrCorrespondence", err)
			}
		})
	}
	if err := Correspond(rebuild(precert, poison), rebuild(final, list)); err != nil {
		t.Errorf("the rows' own builder: %v", err)
	}
	// An altered leaf cannot reach the hardware: SignFinal compares what it
	// is about to sign.
	l, err := issuer.Leaf(spec)
	if err != nil {
		t.Fatal(err)
	}
	l.body.extensions = bytes.Replace(l.body.extensions, []byte("jane@"), []byte("evil@"), 1)
	before := h.interKey.signatures.Load()
	if _, err := l.SignFinal(t.Context(), h.interKey, placeholderSCT()); !errors.Is(err, ErrCorrespondence) || h.interKey.signatures.Load() != before {
		t.Errorf("altered between the two signatures: %v", err)
	}
}

func TestCheckLeafRefuses(t *testing.T) {
	h := newHierarchy(t)
	issuer := newIssuer(t, h)
	l, err := issuer.Leaf(emailSpec(newKey(t, elliptic.P256()).Public()))
	if err != nil {
		t.Fatal(err)
	}
	precert, err := l.SignPrecertificate(t.Context(), h.interKey)
	if err != nil {
		t.Fatal(err)
	}
	parse := func(der []byte) *x509.Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	if err := issuer.CheckLeaf(parse(precert)); !errors.Is(err, ErrLint) {
		t.Errorf("precertificate: %v, want ErrLint", err)
	}
	final, err := l.final(placeholderSCT())
	if err != nil {
		t.Fatal(err)
	}
	throwaway, err := throwawaySign(final, issuer.algorithm)
	if err != nil {
		t.Fatal(err)
	}
	if err := issuer.CheckLeaf(parse(throwaway)); !errors.Is(err, ErrIssuer) {
		t.Errorf("signed with the throw-away key: %v, want ErrIssuer", err)
	}
}

// TestToken: three signatures' worth of a leaf with keys in a real token:
// exactly two by the CA, and no more.
func TestToken(t *testing.T) {
	token := hsmtest.SoftHSM(t)
	rootKey := hsmtest.NewKey(t, token, "root", hsm.ECDSAP384)
	caKey := &hsmtest.Counting{Key: hsmtest.NewKey(t, token, "ca", hsm.ECDSAP256)}
	root := authority(t, rootSpec(rootKey.Public()), nil, rootKey)
	issuer, err := NewIssuer(authority(t, interSpec(caKey.Public()), root, rootKey))
	if err != nil {
		t.Fatal(err)
	}
	l, err := issuer.Leaf(workflowSpec(newKey(t, elliptic.P256()).Public()))
	if err != nil {
		t.Fatal(err)
	}
	if caKey.Count() != 0 {
		t.Error("linting used the hardware")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	precert, err := l.SignPrecertificate(ctx, caKey)
	if err != nil {
		t.Fatal(err)
	}
	final, err := l.SignFinal(ctx, caKey, placeholderSCT())
	if err != nil {
		t.Fatal(err)
	}
	if caKey.Count() != 2 {
		t.Errorf("%d signatures, want 2", caKey.Count())
	}
	for _, der := range [][]byte{precert, final} {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if err := cert.CheckSignatureFrom(issuer.Certificate()); err != nil {
			t.Error(err)
		}
	}
}

// FuzzSCT: no panic, and what is accepted is one v1 SCT to
// certificate-transparency-go too, in the same octets.
func FuzzSCT(f *testing.F) {
	f.Add(placeholderSCT())
	f.Add([]byte{0})
	f.Fuzz(func(t *testing.T, raw []byte) {
		if _, err := parseSCT(raw); err != nil {
			if !errors.Is(err, ErrSCT) {
				t.Fatalf("%v is not ErrSCT", err)
			}
			return
		}
		var s ct.SignedCertificateTimestamp
		rest, err := cttls.Unmarshal(raw, &s)
		if err != nil || len(rest) != 0 || s.SCTVersion != ct.V1 {
			t.Fatalf("certificate-transparency-go: %v, %d octets left, version %d", err, len(rest), s.SCTVersion)
		}
		again, err := cttls.Marshal(s)
		if err != nil || !bytes.Equal(again, raw) {
			t.Fatalf("encoded again %x, was %x (%v)", again, raw, err)
		}
	})
}

// FuzzSAN: no panic, and a name that is accepted is the one name that
// sigstore reads from the certificate.
func FuzzSAN(f *testing.F) {
	f.Add("email", "jane@example.com")
	f.Add("uri", "https://gitlab:8443/a b@ü")
	f.Add("othername", "jürg!example.com")
	h := newHierarchy(f)
	issuer := newIssuer(f, h)
	key := newKey(f, elliptic.P256()).Public()
	f.Fuzz(func(t *testing.T, kind, value string) {
		spec := emailSpec(key)
		spec.SAN = SAN{Type: SANType(kind), Value: value}
		l, err := issuer.Leaf(spec)
		if err != nil {
			if !errors.Is(err, ErrName) {
				t.Fatalf("%v is not ErrName", err)
			}
			return
		}
		der, err := l.SignFinal(t.Context(), h.interKey, placeholderSCT())
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		got := cryptoutils.GetSubjectAlternateNames(cert)
		if len(got) != 1 {
			t.Fatalf("names %q", got)
		}
		if spec.SAN.Type != URI && got[0] != value {
			t.Fatalf("name %q, want %q", got[0], value)
		}
	})
}

// FuzzCorrespond: no panic on foreign certificates.
func FuzzCorrespond(f *testing.F) {
	h := newHierarchy(f)
	l, err := newIssuer(f, h).Leaf(emailSpec(newKey(f, elliptic.P256()).Public()))
	if err != nil {
		f.Fatal(err)
	}
	precert, err := l.SignPrecertificate(f.Context(), h.interKey)
	if err != nil {
		f.Fatal(err)
	}
	final, err := l.SignFinal(f.Context(), h.interKey, placeholderSCT())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(precert, final)
	f.Fuzz(func(t *testing.T, a, b []byte) {
		if err := Correspond(a, b); err != nil && !errors.Is(err, ErrCorrespondence) {
			t.Fatalf("%v is not ErrCorrespondence", err)
		}
	})
}

func ExampleLintError() {
	err := error(&LintError{Findings: []Finding{{Rule: "chancery_leaf_eku", Detail: "missing"}}})
	fmt.Println(err)
	fmt.Println(errors.Is(err, ErrLint))
	// Output:
	// certificate profile violated: chancery_leaf_eku (missing)
	// true
}
