package tpm_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"maps"
	"math/big"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/tpm"
	"github.com/google/go-tpm/tpm2"
)

// attested is a TPM with a certified endorsement key, a key in it, and an
// attestation of that key.
type attested struct {
	emulator *hsmtest.Emulator
	token    *tpm.Token
	key      hsm.Key
	nonce    []byte
	roots    *x509.CertPool
	a        hsm.Attestation
}

func newAttested(t testing.TB) *attested {
	t.Helper()
	e := hsmtest.SWTPM(t)
	x := &attested{emulator: e, roots: e.Certify(t), nonce: bytes.Repeat([]byte{7}, 32)}
	x.token = hsmtest.OpenTPM(t, e.Config(t))
	x.key = hsmtest.NewKey(t, x.token, "attested", hsm.ECDSAP256)
	x.a = x.attest(t, x.key, x.nonce)
	return x
}

func (x *attested) attest(t testing.TB, k hsm.Key, nonce []byte) hsm.Attestation {
	t.Helper()
	a, err := x.token.Attest(t.Context(), k, nonce)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func (x *attested) verify(a hsm.Attestation) (tpm.Verdict, error) {
	return tpm.VerifyAttestation(a, x.key.Ref().SPKI, x.nonce, x.roots)
}

// copied returns an attestation that shares nothing with a, by way of its JSON.
func copied(t testing.TB, a hsm.Attestation) hsm.Attestation {
	t.Helper()
	text, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	var b hsm.Attestation
	if err := json.Unmarshal(text, &b); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestAttestation runs over what is refused and what is held, all on one TPM.
func TestAttestation(t *testing.T) {
	x := newAttested(t)
	t.Run("holds", x.testHolds)
	t.Run("refused", x.testRefused)
	t.Run("flipped octets", x.testFlipped)
	t.Run("JSON fields", x.testFields)
	t.Run("P-384 and all nonces", x.testOtherKeys)
	t.Run("at a persistent handle", x.testPersistent)
	t.Run("evidence", x.testEvidence)
	t.Run("challenge", x.testChallenge)
	t.Run("openssl agrees", x.testOpenSSL)
	t.Run("certificates", x.testCertificates)
	t.Run("beside signatures", x.testBesideSignatures)
	t.Run("after a reset", x.testReset)
}

func (x *attested) testHolds(t *testing.T) {
	device := tpm.EKDevice{Manufacturer: "id:00001014", Model: "swtpm", Version: "id:20191023"}
	without := copied(t, x.a)
	without.EKCertificate = nil
	unactivated := copied(t, x.a)
	unactivated.Activation = nil
	born := copied(t, x.a)
	born.Creation, born.CreationData, born.CreationSignature = nil, nil, nil
	for _, tc := range []struct {
		name  string
		a     hsm.Attestation
		roots *x509.CertPool
		want  tpm.Verdict
	}{
		{"with roots", x.a, x.roots, tpm.Verdict{Chain: tpm.ChainVerified, Device: device, Software: true, Creation: true, Activation: true, Level: hsm.LevelSoftware}},
		{"without roots", x.a, nil, tpm.Verdict{Chain: tpm.ChainUnchecked, Device: device, Software: true, Creation: true, Activation: true, Level: hsm.LevelSoftware}},
		{"without a certificate", without, nil, tpm.Verdict{Chain: tpm.ChainAbsent, Creation: true, Activation: true, Level: hsm.LevelModule}},
		{"without an activation", unactivated, x.roots, tpm.Verdict{Chain: tpm.ChainVerified, Device: device, Software: true, Creation: true, Level: hsm.LevelSoftware}},
		{"without creation", born, x.roots, tpm.Verdict{Chain: tpm.ChainVerified, Device: device, Software: true, Activation: true, Level: hsm.LevelSoftware}},
	} {
		got, err := tpm.VerifyAttestation(tc.a, x.key.Ref().SPKI, x.nonce, tc.roots)
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		if got.Firmware == 0 {
			t.Errorf("%s: no firmware version", tc.name)
		}
		if got.Firmware = 0; got != tc.want {
			t.Errorf("%s: verdict %+v, want %+v", tc.name, got, tc.want)
		}
	}
}

func (x *attested) testRefused(t *testing.T) {
	other := hsmtest.NewKey(t, x.token, "other", hsm.ECDSAP256)
	otherKey := x.attest(t, other, x.nonce)
	otherNonce := x.attest(t, x.key, bytes.Repeat([]byte{8}, 32))
	e := hsmtest.SWTPM(t)
	foreignToken := hsmtest.OpenTPM(t, e.Config(t))
	foreign, err := foreignToken.Attest(t.Context(), hsmtest.NewKey(t, foreignToken, "attested", hsm.ECDSAP256), x.nonce)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		change func(a *hsm.Attestation)
	}{
		{"another key's attestation", func(a *hsm.Attestation) { *a = otherKey }},
		{"another nonce's attestation", func(a *hsm.Attestation) { *a = otherNonce }},
		{"another nonce's, with the nonce written over", func(a *hsm.Attestation) { *a = otherNonce; a.Nonce = x.nonce }},
		{"another TPM's attestation", func(a *hsm.Attestation) { *a = foreign }},
		{"another TPM's attestation key", func(a *hsm.Attestation) { a.AK = foreign.AK }},
		{"another TPM's endorsement key", func(a *hsm.Attestation) { a.EK = foreign.EK }},
		{"another key's public area", func(a *hsm.Attestation) { a.Key = otherKey.Key }},
		{"another key's statement", func(a *hsm.Attestation) { a.Certify, a.CertifySignature = otherKey.Certify, otherKey.CertifySignature }},
		{"another key's creation", func(a *hsm.Attestation) {
			a.Creation, a.CreationSignature, a.CreationData = otherKey.Creation, otherKey.CreationSignature, otherKey.CreationData
		}},
		{"another key's creation data", func(a *hsm.Attestation) { a.CreationData = otherKey.CreationData }},
		{"another nonce's statement", func(a *hsm.Attestation) {
			a.Certify, a.CertifySignature = otherNonce.Certify, otherNonce.CertifySignature
		}},
		{"another nonce's creation", func(a *hsm.Attestation) {
			a.Creation, a.CreationSignature = otherNonce.Creation, otherNonce.CreationSignature
		}},
		{"parts exchanged", func(a *hsm.Attestation) {
			a.Certify, a.Creation = a.Creation, a.Certify
			a.CertifySignature, a.CreationSignature = a.CreationSignature, a.CertifySignature
		}},
		{"signatures exchanged", func(a *hsm.Attestation) {
			a.CertifySignature, a.CreationSignature = a.CreationSignature, a.CertifySignature
		}},
		{"creation in both places", func(a *hsm.Attestation) { a.Certify, a.CertifySignature = a.Creation, a.CreationSignature }},
		{"certify in both places", func(a *hsm.Attestation) { a.Creation, a.CreationSignature = a.Certify, a.CertifySignature }},
		{"key as attestation key", func(a *hsm.Attestation) { a.AK = a.Key }},
		{"attestation key as endorsement key", func(a *hsm.Attestation) { a.EK = a.AK }},
		{"endorsement key as attestation key", func(a *hsm.Attestation) { a.AK = a.EK }},
		{"creation without data", func(a *hsm.Attestation) { a.CreationData = nil }},
		{"creation without a signature", func(a *hsm.Attestation) { a.CreationSignature = nil }},
		{"data without creation", func(a *hsm.Attestation) { a.Creation, a.CreationSignature = nil, nil }},
		{"no statement", func(a *hsm.Attestation) { a.Certify, a.CertifySignature = nil, nil }},
		{"no certificate", func(a *hsm.Attestation) { a.EKCertificate = nil }},
		{"something after the key", func(a *hsm.Attestation) { a.Key = append(a.Key, 0) }},
		{"something after the statement", func(a *hsm.Attestation) { a.Certify = append(a.Certify, 0) }},
		{"something after the certificate", func(a *hsm.Attestation) { a.EKCertificate = append(a.EKCertificate, 0) }},
		{"activation that failed", func(a *hsm.Attestation) { a.Activation.Answer = make([]byte, 32) }},
		{"activation of nothing", func(a *hsm.Attestation) { a.Activation = &hsm.Activation{} }},
		{"another format", func(a *hsm.Attestation) { a.Format = "tpm2-certify-2" }},
		{"nothing", func(a *hsm.Attestation) { *a = hsm.Attestation{} }},
	} {
		a := copied(t, x.a)
		tc.change(&a)
		if v, err := x.verify(a); !errors.Is(err, tpm.ErrAttestation) || v != (tpm.Verdict{}) {
			t.Errorf("%s: verdict %+v, error %v, want ErrAttestation", tc.name, v, err)
		}
	}
	for name, err := range map[string]error{
		"another SPKI":  errOf(tpm.VerifyAttestation(x.a, other.Ref().SPKI, x.nonce, x.roots)),
		"another nonce": errOf(tpm.VerifyAttestation(x.a, x.key.Ref().SPKI, bytes.Repeat([]byte{8}, 32), x.roots)),
		"short nonce":   errOf(tpm.VerifyAttestation(x.a, x.key.Ref().SPKI, x.nonce[:15], x.roots)),
		"other roots":   errOf(tpm.VerifyAttestation(x.a, x.key.Ref().SPKI, x.nonce, x509.NewCertPool())),
	} {
		if !errors.Is(err, tpm.ErrAttestation) {
			t.Errorf("%s: error %v, want ErrAttestation", name, err)
		}
	}
	for _, n := range []int{0, 15, 65} {
		if _, err := x.token.Attest(t.Context(), x.key, make([]byte, n)); !errors.Is(err, hsm.ErrUnsupported) {
			t.Errorf("nonce of %d octets: error %v, want ErrUnsupported", n, err)
		}
	}
	if _, err := foreignToken.Attest(t.Context(), x.key, x.nonce); err == nil {
		t.Error("a key of another token was attested")
	}
}

func errOf(_ tpm.Verdict, err error) error { return err }

// binaryFields returns pointers to all octet strings of a.
func binaryFields(a *hsm.Attestation) map[string]*[]byte {
	return map[string]*[]byte{
		"nonce": &a.Nonce, "key": &a.Key, "ak": &a.AK, "ek": &a.EK, "ekCertificate": &a.EKCertificate,
		"certify": &a.Certify, "certifySignature": &a.CertifySignature,
		"creation": &a.Creation, "creationSignature": &a.CreationSignature, "creationData": &a.CreationData,
		"activation.secret": &a.Activation.Secret, "activation.answer": &a.Activation.Answer,
	}
}

// testFlipped flips one bit of every octet of every field, and cuts each field.
// testFlipped flips a bit of every octet in the long form (make torture-hsm), and
// of every fourth, from a random one on, otherwise.
func (x *attested) testFlipped(t *testing.T) {
	n, step := 0, 4
	if os.Getenv("CHANCERY_TORTURE_HSM") == "1" {
		step = 1
	}
	first := mathrand.IntN(step)
	a := copied(t, x.a)
	for name, field := range binaryFields(&a) {
		if len(*field) == 0 {
			t.Fatalf("%s is empty", name)
		}
		for i := min(first, len(*field)-1); i < len(*field); i += step {
			bit := byte(1) << (i % 8)
			(*field)[i] ^= bit
			if _, err := x.verify(a); !errors.Is(err, tpm.ErrAttestation) {
				t.Errorf("%s, octet %d, bit %#x: error %v, want ErrAttestation", name, i, bit, err)
			}
			(*field)[i] ^= bit
			n++
		}
		whole := *field
		for _, cut := range []int{1, len(whole) / 2, len(whole) - 1} {
			*field = whole[:cut]
			if _, err := x.verify(a); !errors.Is(err, tpm.ErrAttestation) {
				t.Errorf("%s cut to %d octets: error %v, want ErrAttestation", name, cut, err)
			}
		}
		*field = whole
	}
	if _, err := x.verify(a); err != nil {
		t.Errorf("restored: %v", err)
	}
	t.Logf("%d octets, each %d. from %d on", n, step, first)
}

// testFields holds the JSON form to its documentation.
func (x *attested) testFields(t *testing.T) {
	text, err := json.Marshal(x.a)
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal(text, &fields); err != nil {
		t.Fatal(err)
	}
	want := slices.Sorted(maps.Keys(map[string]bool{
		"format": true, "nonce": true, "key": true, "ak": true, "ek": true, "ekCertificate": true, "certify": true,
		"certifySignature": true, "creation": true, "creationSignature": true, "creationData": true, "activation": true,
	}))
	if got := slices.Sorted(maps.Keys(fields)); !slices.Equal(got, want) {
		t.Errorf("fields %v, want %v", got, want)
	}
	if fields["nonce"] != base64.StdEncoding.EncodeToString(x.nonce) {
		t.Errorf("nonce %v", fields["nonce"])
	}
}

func (x *attested) testOtherKeys(t *testing.T) {
	k := hsmtest.NewKey(t, x.token, "p384", hsm.ECDSAP384)
	for _, n := range []int{16, 20, 64} {
		nonce := make([]byte, n)
		_, _ = rand.Read(nonce)
		v, err := tpm.VerifyAttestation(x.attest(t, k, nonce), k.Ref().SPKI, nonce, x.roots)
		if err != nil || !v.Creation || v.Chain != tpm.ChainVerified {
			t.Errorf("nonce of %d octets: verdict %+v, error %v", n, v, err)
		}
	}
}

// testPersistent: a key at a handle has no creation file.
func (x *attested) testPersistent(t *testing.T) {
	const handle = 0x81000100
	if err := x.token.Persist(t.Context(), x.key, handle); err != nil {
		t.Fatal(err)
	}
	k, err := x.token.Open(t.Context(), hsm.Ref{URI: tpm.HandleURI(x.emulator.Socket(), handle), SPKI: x.key.Ref().SPKI}, hsm.RoleNone)
	if err != nil {
		t.Fatal(err)
	}
	v, err := x.verify(x.attest(t, k, x.nonce))
	if err != nil || v.Creation || v.Chain != tpm.ChainVerified {
		t.Errorf("verdict %+v, error %v", v, err)
	}
}

func (x *attested) testEvidence(t *testing.T) {
	e, err := x.token.Evidence(t.Context(), x.key)
	if err != nil {
		t.Fatal(err)
	}
	if e.Attestation == nil {
		t.Fatal("no attestation")
	}
	sum := sha256.Sum256([]byte(e.SelfTestText))
	if !bytes.Equal(e.Attestation.Nonce, sum[:]) {
		t.Errorf("nonce %x, want %x", e.Attestation.Nonce, sum)
	}
	if v, err := tpm.VerifyAttestation(*e.Attestation, x.key.Ref().SPKI, sum[:], x.roots); err != nil || v.Level != e.Level {
		t.Errorf("verdict %+v, evidence is %s, error %v", v, e.Level, err)
	}
}

// testChallenge: the secret comes back from the one TPM with both keys.
func (x *attested) testChallenge(t *testing.T) {
	secret := make([]byte, 32)
	_, _ = rand.Read(secret)
	c, err := tpm.MakeCredential(x.a, secret)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := x.token.ActivateCredential(t.Context(), x.a, c); err != nil || !bytes.Equal(got, secret) {
		t.Errorf("answer %x, error %v", got, err)
	}
	e := hsmtest.SWTPM(t)
	other := hsmtest.OpenTPM(t, e.Config(t))
	foreign, err := other.Attest(t.Context(), hsmtest.NewKey(t, other, "k", hsm.ECDSAP256), x.nonce)
	if err != nil {
		t.Fatal(err)
	}
	mixed := copied(t, x.a)
	mixed.AK = foreign.AK
	forOther, err := tpm.MakeCredential(mixed, secret)
	if err != nil {
		t.Fatal(err)
	}
	flipped := tpm.Credential{Blob: bytes.Clone(c.Blob), EncryptedSecret: c.EncryptedSecret}
	flipped.Blob[len(flipped.Blob)-1] ^= 1
	for name, tc := range map[string]struct {
		token      *tpm.Token
		a          hsm.Attestation
		credential tpm.Credential
	}{
		"another attestation key": {x.token, x.a, forOther},
		"another TPM":             {other, x.a, c},
		"flipped":                 {x.token, x.a, flipped},
		"cut":                     {x.token, x.a, tpm.Credential{Blob: c.Blob[:20], EncryptedSecret: c.EncryptedSecret}},
	} {
		if got, err := tc.token.ActivateCredential(t.Context(), tc.a, tc.credential); !errors.Is(err, hsm.ErrMismatch) {
			t.Errorf("%s: answer %x, error %v, want ErrMismatch", name, got, err)
		}
	}
	if _, err := tpm.MakeCredential(x.a, make([]byte, 33)); !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("long secret: error %v, want ErrUnsupported", err)
	}
	if _, err := tpm.MakeCredential(hsm.Attestation{AK: x.a.AK, EK: x.a.Key}, secret); !errors.Is(err, tpm.ErrAttestation) {
		t.Errorf("to a key that is none: error %v, want ErrAttestation", err)
	}
}

// testOpenSSL has a program that is not ours verify the statement's signature.
func (x *attested) testOpenSSL(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		hsmtest.Missing(t, "openssl is not installed")
	}
	// TPMT_PUBLIC of AK ends with two coordinates, TPMT_SIGNATURE with r and s.
	point := x.a.AK[len(x.a.AK)-68:]
	pub, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), slices.Concat([]byte{4}, point[2:34], point[36:]))
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	pair := x.a.CertifySignature[len(x.a.CertifySignature)-68:]
	sig, err := asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(pair[2:34]), new(big.Int).SetBytes(pair[36:])})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, b := range map[string][]byte{"pub": der, "sig": sig, "msg": x.a.Certify} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), openssl, "dgst", "-sha256", "-keyform", "DER", "-verify", "pub", "-signature", "sig", "msg")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "Verified OK") {
		t.Errorf("openssl: %v: %s", err, out)
	}
}

// maker is a CA that certifies the endorsement key of a TPM as its maker would.
type maker struct {
	key   *ecdsa.PrivateKey
	cert  *x509.Certificate
	roots *x509.CertPool
}

func newMaker(t *testing.T) *maker {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "maker"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	m := &maker{key: key, roots: x509.NewCertPool()}
	if m.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	m.roots.AddCert(m.cert)
	return m
}

// directoryName is a critical subjectAltName with a directory name of the TCG's
// three attributes.
func directoryName(t *testing.T, manufacturer, model, version string) pkix.Extension {
	t.Helper()
	type attribute struct {
		Type  asn1.ObjectIdentifier
		Value string `asn1:"utf8"`
	}
	type rdnSET []attribute // the name makes it a SET
	names, err := asn1.Marshal([]rdnSET{
		{{asn1.ObjectIdentifier{2, 23, 133, 2, 1}, manufacturer}},
		{{asn1.ObjectIdentifier{2, 23, 133, 2, 2}, model}},
		{{asn1.ObjectIdentifier{2, 23, 133, 2, 3}, version}},
	})
	if err != nil {
		t.Fatal(err)
	}
	value, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: names}})
	if err != nil {
		t.Fatal(err)
	}
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: value}
}

// testCertificates has a CA of ours certify the emulator's endorsement key in
// ways that a TPM's maker may, or must not.
func (x *attested) testCertificates(t *testing.T) {
	m := newMaker(t)
	ek, err := x509.ParseCertificate(x.a.EKCertificate)
	if err != nil {
		t.Fatal(err)
	}
	ekUsage := []asn1.ObjectIdentifier{{2, 23, 133, 8, 1}}
	real := tpm.EKDevice{Manufacturer: "id:49465800", Model: "SLB9672", Version: "id:000F0016"}
	for _, tc := range []struct {
		name   string
		change func(c *x509.Certificate)
		key    any
		want   hsm.Level // "" = refused
		device tpm.EKDevice
	}{
		{"a chip", func(*x509.Certificate) {}, ek.PublicKey, hsm.LevelAttested, real},
		{"expired since", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }, ek.PublicKey, hsm.LevelAttested, real},
		{"without usages", func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil }, ek.PublicKey, hsm.LevelAttested, real},
		{"without a name", func(c *x509.Certificate) { c.ExtraExtensions = nil }, ek.PublicKey, hsm.LevelAttested, tpm.EKDevice{}},
		{"an emulator", func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{directoryName(t, "id:00001014", "SWTPM", "id:1")}
		}, ek.PublicKey, hsm.LevelSoftware, tpm.EKDevice{Manufacturer: "id:00001014", Model: "SWTPM", Version: "id:1"}},
		{"of another key", func(*x509.Certificate) {}, m.key.Public(), "", tpm.EKDevice{}},
		{"of a CA", func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }, ek.PublicKey, "", tpm.EKDevice{}},
		{"for a server", func(c *x509.Certificate) {
			c.UnknownExtKeyUsage, c.ExtKeyUsage = nil, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}, ek.PublicKey, "", tpm.EKDevice{}},
		{"before the CA", func(c *x509.Certificate) { c.NotBefore = time.Now().Add(-2 * time.Hour) }, ek.PublicKey, "", tpm.EKDevice{}},
		{"with an unknown critical extension", func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}})
		}, ek.PublicKey, "", tpm.EKDevice{}},
		{"with a broken name", func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: []byte{0x30, 3, 0xa4, 1, 9}}}
		}, ek.PublicKey, "", tpm.EKDevice{}},
	} {
		template := &x509.Certificate{
			SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-30 * time.Minute), NotAfter: time.Now().Add(time.Hour),
			KeyUsage: x509.KeyUsageKeyAgreement, UnknownExtKeyUsage: ekUsage,
			ExtraExtensions: []pkix.Extension{directoryName(t, real.Manufacturer, real.Model, real.Version)},
		}
		tc.change(template)
		der, err := x509.CreateCertificate(rand.Reader, template, m.cert, tc.key, m.key)
		if err != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
		a := copied(t, x.a)
		a.EKCertificate = der
		v, err := tpm.VerifyAttestation(a, x.key.Ref().SPKI, x.nonce, m.roots)
		switch {
		case tc.want == "":
			if !errors.Is(err, tpm.ErrAttestation) {
				t.Errorf("%s: verdict %+v, error %v, want ErrAttestation", tc.name, v, err)
			}
		case err != nil || v.Level != tc.want || v.Device != tc.device:
			t.Errorf("%s: verdict %+v, error %v, want %s of %+v", tc.name, v, err, tc.want, tc.device)
		}
		if tc.want != hsm.LevelAttested {
			continue
		}
		// Each part of that level is needed.
		if v, err := tpm.VerifyAttestation(a, x.key.Ref().SPKI, x.nonce, nil); err != nil || v.Level != hsm.LevelModule {
			t.Errorf("%s, without roots: verdict %+v, error %v", tc.name, v, err)
		}
		a.Activation = nil
		if v, err := tpm.VerifyAttestation(a, x.key.Ref().SPKI, x.nonce, m.roots); err != nil || v.Level != hsm.LevelModule {
			t.Errorf("%s, without an activation: verdict %+v, error %v", tc.name, v, err)
		}
	}
}

// TestRSAEndorsementKey challenges a TPM by its RSA key, whose certificate
// tpm2-tools read.
func TestRSAEndorsementKey(t *testing.T) {
	if _, err := exec.LookPath("tpm2_nvread"); err != nil {
		hsmtest.Missing(t, "tpm2-tools is not installed (Debian: apt install tpm2-tools)")
	}
	e := hsmtest.SWTPM(t)
	roots := e.Certify(t)
	read := exec.CommandContext(t.Context(), "tpm2_nvread", "0x1c00002")
	read.Env = append(read.Environ(), "TPM2TOOLS_TCTI=swtpm:path="+e.Socket())
	der, err := read.Output()
	if err != nil {
		t.Fatalf("tpm2_nvread: %v", err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	token := hsmtest.OpenTPM(t, e.Config(t))
	k := hsmtest.NewKey(t, token, "k", hsm.ECDSAP256)
	nonce := make([]byte, 32)
	a, err := token.Attest(t.Context(), k, nonce)
	if err != nil {
		t.Fatal(err)
	}
	area := tpm2.RSAEKTemplate
	area.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: certificate.PublicKey.(*rsa.PublicKey).N.Bytes()})
	a.EK, a.EKCertificate = tpm2.Marshal(area), der
	if v, err := tpm.VerifyAttestation(a, k.Ref().SPKI, nonce, roots); err != nil || v.Chain != tpm.ChainVerified {
		t.Fatalf("verdict %+v, error %v", v, err)
	}
	secret := make([]byte, 32)
	_, _ = rand.Read(secret)
	c, err := tpm.MakeCredential(a, secret)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := token.ActivateCredential(t.Context(), a, c); err != nil || !bytes.Equal(got, secret) {
		t.Errorf("answer %x, error %v", got, err)
	}
}

// testBesideSignatures: attesting and signing share three slots in the TPM.
func (x *attested) testBesideSignatures(t *testing.T) {
	keys := []hsm.Key{x.key}
	for _, label := range []string{"b", "c", "d", "e"} {
		keys = append(keys, hsmtest.NewKey(t, x.token, label, hsm.ECDSAP256))
	}
	var wg sync.WaitGroup
	for i, k := range keys {
		wg.Go(func() {
			for n := range 10 {
				digest := sha256.Sum256([]byte{byte(n), byte(i)})
				if _, err := k.SignContext(context.Background(), digest[:], hsm.ECDSAP256.Hash()); err != nil {
					t.Errorf("sign: %v", err)
				}
			}
		})
	}
	wg.Go(func() {
		for _, k := range keys {
			a, err := x.token.Attest(context.Background(), k, x.nonce)
			if err == nil {
				_, err = tpm.VerifyAttestation(a, k.Ref().SPKI, x.nonce, x.roots)
			}
			if err != nil {
				t.Errorf("attest: %v", err)
			}
		}
	})
	wg.Wait()
}

// testReset: the keys of the endorsement hierarchy are made anew.
func (x *attested) testReset(t *testing.T) {
	x.emulator.Reset(t)
	v, err := x.verify(x.attest(t, x.key, x.nonce))
	if err != nil || v.Chain != tpm.ChainVerified {
		t.Errorf("verdict %+v, error %v", v, err)
	}
}

// TestAttestWithoutCertificate uses the endorsement key by its policy, which a
// TPM without certificates gets.
func TestAttestWithoutCertificate(t *testing.T) {
	e := hsmtest.SWTPM(t)
	token := hsmtest.OpenTPM(t, e.Config(t))
	k := hsmtest.NewKey(t, token, "k", hsm.ECDSAP256)
	nonce := make([]byte, 16)
	a, err := token.Attest(t.Context(), k, nonce)
	if err != nil {
		t.Fatal(err)
	}
	v, err := tpm.VerifyAttestation(a, k.Ref().SPKI, nonce, nil)
	if err != nil || v.Chain != tpm.ChainAbsent || !v.Activation || v.Level != hsm.LevelModule {
		t.Errorf("verdict %+v, error %v", v, err)
	}
	if _, err := tpm.VerifyAttestation(a, k.Ref().SPKI, nonce, x509.NewCertPool()); !errors.Is(err, tpm.ErrAttestation) {
		t.Errorf("with roots: error %v, want ErrAttestation", err)
	}
}

// TestVerifiedFromFiles writes evidence beside the TPM and has a program without
// cgo, in a folder with files alone and an empty environment, verify it.
func TestVerifiedFromFiles(t *testing.T) {
	gotool, err := exec.LookPath("go")
	if err != nil {
		hsmtest.Missing(t, "no go command to build the verifier with")
	}
	dir := t.TempDir()
	e := hsmtest.SWTPM(t)
	e.Certify(t)
	token := hsmtest.OpenTPM(t, e.Config(t))
	evidence, err := token.Evidence(t.Context(), hsmtest.NewKey(t, token, "k", hsm.ECDSAP256))
	if err != nil {
		t.Fatal(err)
	}
	other, err := token.Evidence(t.Context(), hsmtest.NewKey(t, token, "other", hsm.ECDSAP256))
	if err != nil {
		t.Fatal(err)
	}
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	e.Stop(t)
	roots, err := os.ReadFile(e.CAFile())
	if err != nil {
		t.Fatal(err)
	}
	changed := func(change func(*hsm.Evidence)) hsm.Evidence {
		text, err := json.Marshal(evidence)
		var c hsm.Evidence
		if err := errors.Join(err, json.Unmarshal(text, &c)); err != nil {
			t.Fatal(err)
		}
		change(&c)
		return c
	}
	if err := os.WriteFile(filepath.Join(dir, "roots.pem"), roots, 0o600); err != nil {
		t.Fatal(err)
	}
	build := exec.CommandContext(t.Context(), gotool, "build", "-o", filepath.Join(dir, "verify"), "./testdata/verify")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, tc := range []struct {
		name     string
		evidence hsm.Evidence
		want     string // "" = refused
	}{
		{"as written", evidence, "chain verified, creation true, activation true, level software, model swtpm\n"},
		{"flipped", changed(func(e *hsm.Evidence) { e.Attestation.Certify[40] ^= 1 }), ""},
		{"another key", changed(func(e *hsm.Evidence) { e.SPKI = other.SPKI }), ""},
		{"another key's attestation", changed(func(e *hsm.Evidence) { e.Attestation = other.Attestation }), ""},
		{"another nonce", changed(func(e *hsm.Evidence) { e.SelfTestText += "." }), ""},
	} {
		text, err := json.Marshal(tc.evidence)
		if err := errors.Join(err, os.WriteFile(filepath.Join(dir, "evidence.json"), text, 0o600)); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), filepath.Join(dir, "verify"), "evidence.json", "roots.pem")
		cmd.Dir, cmd.Env = dir, []string{}
		out, err := cmd.Output()
		if string(out) != tc.want || (err == nil) != (tc.want != "") {
			t.Errorf("%s: %q, %v; want %q", tc.name, out, err, tc.want)
		}
	}
}

var update = flag.Bool("update", false, "make testdata/attestation.json anew")

// vector is an attestation by swtpm 0.7.1 with the CA of swtpm_localca, made by
// this test with -update. It holds the JSON form of an Attestation to what
// earlier programs wrote.
type vector struct {
	SPKI        string          `json:"spkiSHA256"`
	Roots       string          `json:"roots"`
	Attestation hsm.Attestation `json:"attestation"`
}

var vectorFile = filepath.Join("testdata", "attestation.json")

func readVector(t testing.TB) (v vector, spki [32]byte, roots *x509.CertPool) {
	t.Helper()
	text, err := os.ReadFile(vectorFile)
	if err == nil {
		d := json.NewDecoder(bytes.NewReader(text))
		d.DisallowUnknownFields()
		err = d.Decode(&v)
	}
	if err == nil {
		spki, err = hsm.ParseSPKIHash(v.SPKI)
	}
	roots = x509.NewCertPool()
	if err != nil || !roots.AppendCertsFromPEM([]byte(v.Roots)) {
		t.Fatalf("read vector: %v", err)
	}
	return v, spki, roots
}

func TestAttestationVector(t *testing.T) {
	if *update {
		x := newAttested(t)
		roots, err := os.ReadFile(x.emulator.CAFile())
		if err != nil {
			t.Fatal(err)
		}
		spki := x.key.Ref().SPKI
		text, err := json.MarshalIndent(vector{hex.EncodeToString(spki[:]), string(roots), x.a}, "", "  ")
		if err := errors.Join(err, os.WriteFile(vectorFile, append(text, '\n'), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	v, spki, roots := readVector(t)
	got, err := tpm.VerifyAttestation(v.Attestation, spki, v.Attestation.Nonce, roots)
	if err != nil || got.Chain != tpm.ChainVerified || !got.Creation || !got.Activation || got.Level != hsm.LevelSoftware {
		t.Errorf("verdict %+v, error %v", got, err)
	}
}

// FuzzVerifyAttestation changes one field of an attestation that holds. What is
// still accepted is the same attestation.
func FuzzVerifyAttestation(f *testing.F) {
	v, spki, roots := readVector(f)
	names := slices.Sorted(maps.Keys(binaryFields(&v.Attestation)))
	for i, name := range names {
		f.Add(uint8(i), *binaryFields(&v.Attestation)[name])
	}
	f.Fuzz(func(t *testing.T, n uint8, b []byte) {
		a := v.Attestation
		activation := *a.Activation
		a.Activation = &activation
		field := binaryFields(&a)[names[int(n)%len(names)]]
		same := bytes.Equal(*field, b)
		*field = b
		if _, err := tpm.VerifyAttestation(a, spki, v.Attestation.Nonce, roots); err == nil && !same {
			t.Errorf("%s: accepted %x", names[int(n)%len(names)], b)
		}
		// Without roots it must not panic either.
		_, _ = tpm.VerifyAttestation(a, spki, v.Attestation.Nonce, nil)
		_, _ = tpm.MakeCredential(a, v.Attestation.Nonce)
	})
}

// FuzzAttestationJSON reads whole attestations.
func FuzzAttestationJSON(f *testing.F) {
	v, spki, roots := readVector(f)
	text, err := json.Marshal(v.Attestation)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"format":"tpm2-certify-1"}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var a hsm.Attestation
		if json.Unmarshal(text, &a) != nil {
			return
		}
		_, err := tpm.VerifyAttestation(a, spki, v.Attestation.Nonce, roots)
		if err == nil && !(bytes.Equal(a.Key, v.Attestation.Key) && bytes.Equal(a.Certify, v.Attestation.Certify)) {
			t.Errorf("accepted another statement: %s", text)
		}
	})
}
