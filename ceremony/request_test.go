package ceremony

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
)

var requestName = pkix.Name{Organization: []string{"Acme"}, CommonName: "Acme Intermediate"}

// requestOf is what the standard library makes of a template.
func requestOf(t testing.TB, template x509.CertificateRequest, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func generated(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func spkiOf(t testing.TB, key crypto.PublicKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// signedInfo puts a P-256 signature by key on a CertificationRequestInfo.
func signedInfo(t testing.TB, info []byte, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	digest := sha256.Sum256(info)
	sig, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	der, err := signedDER(info, hsm.ECDSAP256, sig)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// infoOf is a CertificationRequestInfo of any parts.
func infoOf(t testing.TB, version int, name, public []byte, attributes ...asn1.RawValue) []byte {
	t.Helper()
	info, err := asn1.Marshal(struct {
		Version    int
		Subject    asn1.RawValue
		PublicKey  asn1.RawValue
		Attributes []asn1.RawValue `asn1:"tag:0"`
	}{version, asn1.RawValue{FullBytes: name}, asn1.RawValue{FullBytes: public}, attributes})
	if err != nil {
		t.Fatal(err)
	}
	return info
}

func mustMarshal(t testing.TB, v any) []byte {
	t.Helper()
	der, err := asn1.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// challengePassword is the attribute challengePassword (RFC 2985, Section 5.4.1).
func challengePassword(t testing.TB) asn1.RawValue {
	t.Helper()
	return asn1.RawValue{FullBytes: mustMarshal(t, struct {
		Type   asn1.ObjectIdentifier
		Values []string `asn1:"set"`
	}{asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 7}, []string{"secret"}})}
}

func TestCheckRequest(t *testing.T) {
	key, other := generated(t, elliptic.P256()), generated(t, elliptic.P256())
	public := spkiOf(t, key.Public())
	good := requestOf(t, x509.CertificateRequest{Subject: requestName}, key)
	name := mustMarshal(t, requestName.ToRDNSequence())
	utf8Name := bytes.Replace(name, append([]byte{asn1.TagPrintableString}, "\x04Acme"...), append([]byte{asn1.TagUTF8String}, "\x04Acme"...), 1)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	isCA := pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}
	for _, tc := range []struct {
		name string
		der  []byte
		want string // in the error, "" if it is accepted
	}{
		{"the one that is wanted", good, ""},
		{"nothing", nil, "asn1"},
		{"something else", []byte("-----BEGIN CERTIFICATE REQUEST-----"), "asn1"},
		{"another key", requestOf(t, x509.CertificateRequest{Subject: requestName}, other), "another key"},
		{"a key on P-224", requestOf(t, x509.CertificateRequest{Subject: requestName}, generated(t, elliptic.P224())), "another key"},
		{"a key on P-384", requestOf(t, x509.CertificateRequest{Subject: requestName}, generated(t, elliptic.P384())), "another key"},
		{"a key on P-521", requestOf(t, x509.CertificateRequest{Subject: requestName}, generated(t, elliptic.P521())), "another key"},
		{"an RSA key", requestOf(t, x509.CertificateRequest{Subject: requestName}, rsaKey), "another key"},
		{"another's signature", signedInfo(t, infoOf(t, 0, name, public), other), "proof of possession"},
		{"a signature with a longer hash", requestOf(t, x509.CertificateRequest{Subject: requestName, SignatureAlgorithm: x509.ECDSAWithSHA512}, key), "ECDSA-SHA512"},
		{"no signature", mustMarshal(t, struct {
			Info      asn1.RawValue
			Algorithm pkix.AlgorithmIdentifier
			Signature asn1.BitString
		}{asn1.RawValue{FullBytes: infoOf(t, 0, name, public)}, pkix.AlgorithmIdentifier{Algorithm: ecdsaWith[hsm.ECDSAP256]}, asn1.BitString{}}), "proof of possession"},
		{"parameters of the signature", mustMarshal(t, struct {
			Info      asn1.RawValue
			Algorithm pkix.AlgorithmIdentifier
			Signature asn1.BitString
		}{asn1.RawValue{FullBytes: infoOf(t, 0, name, public)}, pkix.AlgorithmIdentifier{Algorithm: ecdsaWith[hsm.ECDSAP256], Parameters: asn1.NullRawValue},
			asn1.BitString{Bytes: []byte{1}, BitLength: 8}}), "not in DER"},
		{"another name", requestOf(t, x509.CertificateRequest{Subject: pkix.Name{CommonName: "Acme Root"}}, key), "CN=Acme Root"},
		{"no name", requestOf(t, x509.CertificateRequest{}, key), "wanted is"},
		{"one more name", requestOf(t, x509.CertificateRequest{Subject: pkix.Name{Organization: []string{"Acme", "Evil"}, CommonName: "Acme Intermediate"}}, key), "Evil"},
		{"the name as another type of string", signedInfo(t, infoOf(t, 0, utf8Name, public), key), "wanted is"},
		{"another version", signedInfo(t, infoOf(t, 1, name, public), key), "wanted is"},
		{"a CA is asked for", requestOf(t, x509.CertificateRequest{Subject: requestName, ExtraExtensions: []pkix.Extension{isCA}}, key), "asks for 1 extensions"},
		{"a DNS name is asked for", requestOf(t, x509.CertificateRequest{Subject: requestName, DNSNames: []string{"acme.example"}}, key), "asks for 1 extensions"},
		{"a challenge password", signedInfo(t, infoOf(t, 0, name, public, challengePassword(t)), key), "nothing else"},
		{"something after it", append(bytes.Clone(good), 0), "trailing"},
		{"the same twice", append(bytes.Clone(good), good...), "trailing"},
		{"cut short", good[:len(good)-1], "asn1"},
		{"a length in more octets than it needs", append([]byte{0x30, 0x82, 0}, good[2:]...), "asn1"},
		{"too large", append(bytes.Clone(good), make([]byte, maxRequest)...), "at most 2048"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			csr, err := checkRequest(tc.der, requestName, public)
			switch {
			case tc.want == "" && (err != nil || !bytes.Equal(csr.Raw, tc.der)):
				t.Errorf("refused: %v", err)
			case tc.want != "" && (!errors.Is(err, ErrRequest) || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("error %v, want ErrRequest with %q", err, tc.want)
			}
		})
	}
	t.Run("on P-384", func(t *testing.T) {
		key := generated(t, elliptic.P384())
		if _, err := checkRequest(requestOf(t, x509.CertificateRequest{Subject: requestName}, key), requestName, spkiOf(t, key.Public())); err != nil {
			t.Error(err)
		}
	})
	t.Run("by another program", func(t *testing.T) {
		dir := t.TempDir()
		rewrite(t, filepath.Join(dir, "request.pem"), requestPEM(&x509.CertificateRequest{Raw: good}))
		if out := shell(t, dir, "openssl", "req", "-in", "request.pem", "-noout", "-verify", "-subject"); !strings.Contains(out, "verify OK") {
			t.Errorf("openssl: %s", out)
		}
	})
}

// Whatever comes is refused with ErrRequest, or is the request with another
// signature.
func FuzzCheckRequest(f *testing.F) {
	key := generated(f, elliptic.P256())
	public := spkiOf(f, key.Public())
	f.Add(requestOf(f, x509.CertificateRequest{Subject: requestName}, key))
	f.Add(requestOf(f, x509.CertificateRequest{Subject: requestName, DNSNames: []string{"a"}}, key))
	f.Add([]byte{0x30, 0x80, 0, 0})
	info := infoOf(f, 0, mustMarshal(f, requestName.ToRDNSequence()), public)
	f.Fuzz(func(t *testing.T, der []byte) {
		csr, err := checkRequest(der, requestName, public)
		switch {
		case err != nil && !errors.Is(err, ErrRequest):
			t.Errorf("error %v, want ErrRequest", err)
		case err == nil && !bytes.Equal(csr.RawTBSCertificateRequest, info):
			t.Errorf("accepted %x", der)
		}
	})
}
