package identity

import (
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"math/big"
	"strings"
	"sync"
	"testing"
)

const challenge = "alice@example.com"

// clientKeys is a key of every kind.
type clientKeys struct {
	p224, p256, p384, p521    *ecdsa.PrivateKey
	rsa1024, rsa2048, rsa3072 *rsa.PrivateKey
	ed                        ed25519.PrivateKey
}

// makeKeys makes them once: RSA generation is slow.
func makeKeys(t testing.TB) clientKeys {
	t.Helper()
	onceKeys.Do(func() { allKeys = generateKeys(t) })
	return allKeys
}

var (
	onceKeys sync.Once
	allKeys  clientKeys
)

func generateKeys(t testing.TB) clientKeys {
	t.Helper()
	ec := func(c elliptic.Curve) *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	rs := func(bits int) *rsa.PrivateKey {
		k, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return clientKeys{
		p224: ec(elliptic.P224()), p256: ec(elliptic.P256()), p384: ec(elliptic.P384()), p521: ec(elliptic.P521()),
		rsa1024: rs(1024), rsa2048: rs(2048), rsa3072: rs(3072), ed: ed,
	}
}

func publicPEM(t testing.TB, pub crypto.PublicKey) string {
	t.Helper()
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: publicDER(t, pub)}))
}

func publicDER(t testing.TB, pub crypto.PublicKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// sign is crypto/…'s own signature with the given hash.
func sign(t testing.TB, key crypto.Signer, message string, opts crypto.SignerOpts) []byte {
	t.Helper()
	digest := []byte(message)
	if h := opts.HashFunc(); h != 0 {
		w := h.New()
		w.Write(digest)
		digest = w.Sum(nil)
	}
	sig, err := key.Sign(rand.Reader, digest, opts)
	if err != nil {
		t.Fatal(err)
	}
	return sig
}

func TestProveKey(t *testing.T) {
	k := makeKeys(t)
	for name, key := range map[string]struct {
		signer crypto.Signer
		opts   crypto.SignerOpts
	}{
		"P-256": {k.p256, crypto.SHA256}, "P-384": {k.p384, crypto.SHA384}, "P-521": {k.p521, crypto.SHA512},
		"RSA-2048": {k.rsa2048, crypto.SHA256}, "RSA-3072": {k.rsa3072, crypto.SHA256}, "Ed25519": {k.ed, crypto.Hash(0)},
	} {
		proof := sign(t, key.signer, challenge, key.opts)
		for form, content := range map[string]string{
			"PEM": publicPEM(t, key.signer.Public()), "DER": string(publicDER(t, key.signer.Public())),
		} {
			pub, err := ProveKey(content, proof, []string{"someone else", challenge})
			if err != nil {
				t.Errorf("%s, %s: %v", name, form, err)
				continue
			}
			if !pub.(interface{ Equal(crypto.PublicKey) bool }).Equal(key.signer.Public()) {
				t.Errorf("%s, %s: another key came back", name, form)
			}
		}
	}
	pkcs1 := string(pem.EncodeToMemory(&pem.Block{Type: "RSA PUBLIC KEY", Bytes: x509.MarshalPKCS1PublicKey(&k.rsa2048.PublicKey)}))
	if _, err := ProveKey(pkcs1, sign(t, k.rsa2048, challenge, crypto.SHA256), []string{challenge}); err != nil {
		t.Errorf("PKCS #1 key: %v", err)
	}
}

func TestProveKeyRefusals(t *testing.T) {
	k := makeKeys(t)
	good := publicPEM(t, k.p256.Public())
	proof := sign(t, k.p256, challenge, crypto.SHA256)
	x25519, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	e3 := &rsa.PublicKey{N: k.rsa2048.N, E: 3}
	// A multiple of 751 with 2048 bits: the modulus less its remainder.
	factor := new(big.Int).Sub(k.rsa2048.N, new(big.Int).Mod(k.rsa2048.N, big.NewInt(751)))
	smooth := &rsa.PublicKey{N: factor, E: 65537}
	odd := &rsa.PublicKey{N: new(big.Int).SetBit(new(big.Int), 2048, 1), E: 65537}
	for _, test := range []struct {
		name, content string
		proof         []byte
		want          error
	}{
		{"no key", "", proof, ErrPublicKey},
		{"not a key", "hello", proof, ErrPublicKey},
		{"over-long", strings.Repeat("A", maxPublicKey+1), proof, ErrPublicKey},
		{"certificate in its place", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{0x30, 0}})), proof, ErrPublicKey},
		{"private key in its place", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: publicDER(t, k.p256.Public())})), proof, ErrPublicKey},
		{"two keys", good + good, proof, ErrPublicKey},
		{"trailing octets in DER", string(append(publicDER(t, k.p256.Public()), 0)), proof, ErrPublicKey},
		{"RSA-PSS key", rsaPSSKey(t, &k.rsa2048.PublicKey), proof, ErrPublicKey},
		{"point off the curve", offCurve(t, k.p256), proof, ErrPublicKey},

		{"RSA-1024", publicPEM(t, k.rsa1024.Public()), sign(t, k.rsa1024, challenge, crypto.SHA256), ErrWeakKey},
		{"RSA of 2049 bits", publicPEM(t, odd), proof, ErrWeakKey},
		{"RSA with e = 3", publicPEM(t, e3), proof, ErrWeakKey},
		{"RSA with a small factor", publicPEM(t, smooth), proof, ErrWeakKey},
		{"P-224", publicPEM(t, k.p224.Public()), sign(t, k.p224, challenge, crypto.SHA256), ErrWeakKey},
		{"X25519", publicPEM(t, x25519.PublicKey()), proof, ErrWeakKey},

		{"no proof", good, nil, ErrProof},
		{"over-long proof", good, make([]byte, maxProof+1), ErrProof},
		{"proof by another key", good, sign(t, k.p384, challenge, crypto.SHA384), ErrProof},
		{"proof of another challenge", good, sign(t, k.p256, "bob@example.com", crypto.SHA256), ErrProof},
		{"proof of the empty challenge", good, sign(t, k.p256, "", crypto.SHA256), ErrProof},
		{"proof with another hash", good, sign(t, k.p256, challenge, crypto.SHA384), ErrProof},
		{"P-384 with SHA-256", publicPEM(t, k.p384.Public()), sign(t, k.p384, challenge, crypto.SHA256), ErrProof},
		{"trailing octets in the proof", good, append(proof, 0), ErrProof},
		{"RSA-PSS signature", publicPEM(t, k.rsa2048.Public()), sign(t, k.rsa2048, challenge, &rsa.PSSOptions{Hash: crypto.SHA256}), ErrProof},
		{"Ed25519ph signature", publicPEM(t, k.ed.Public()), sign(t, k.ed, challenge, &ed25519.Options{Hash: crypto.SHA512}), ErrProof},
	} {
		t.Run(test.name, func(t *testing.T) {
			if _, err := ProveKey(test.content, test.proof, []string{challenge}); !errors.Is(err, test.want) {
				t.Errorf("err %v, want %v", err, test.want)
			}
		})
	}
	if _, err := ProveKey(good, proof, nil); !errors.Is(err, ErrProof) {
		t.Errorf("without a challenge: %v", err)
	}
}

// rsaPSSKey is an SPKI whose algorithm is id-RSASSA-PSS (RFC 4055, 1.2).
func rsaPSSKey(t *testing.T, pub *rsa.PublicKey) string {
	t.Helper()
	der, err := asn1.Marshal(struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}{
		pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 10}},
		asn1.BitString{Bytes: x509.MarshalPKCS1PublicKey(pub), BitLength: 8 * len(x509.MarshalPKCS1PublicKey(pub))},
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

func offCurve(t *testing.T, key *ecdsa.PrivateKey) string {
	t.Helper()
	der := publicDER(t, key.Public())
	der[len(der)-1] ^= 1
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

func makeCSR(t testing.TB, key crypto.Signer, alg x509.SignatureAlgorithm) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "ignored"}, EmailAddresses: []string{"root@example.com"}, SignatureAlgorithm: alg,
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func TestProveCSR(t *testing.T) {
	k := makeKeys(t)
	for name, csr := range map[string][]byte{
		"P-256":        makeCSR(t, k.p256, x509.ECDSAWithSHA256),
		"P-384":        makeCSR(t, k.p384, x509.ECDSAWithSHA384),
		"P-521":        makeCSR(t, k.p521, x509.ECDSAWithSHA512),
		"RSA-2048":     makeCSR(t, k.rsa2048, x509.SHA256WithRSA),
		"Ed25519":      makeCSR(t, k.ed, x509.PureEd25519),
		"old PEM type": []byte(strings.ReplaceAll(string(makeCSR(t, k.p256, 0)), "CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST")),
		"text before":  append([]byte("Certificate Request:\n"), makeCSR(t, k.p256, 0)...),
	} {
		if _, err := ProveCSR(csr); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestProveCSRRefusals(t *testing.T) {
	k := makeKeys(t)
	good := makeCSR(t, k.p256, x509.ECDSAWithSHA256)
	block, _ := pem.Decode(good)
	wrong := append([]byte{}, block.Bytes...)
	wrong[len(wrong)-1] ^= 1
	encode := func(der []byte) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	}
	for _, test := range []struct {
		name string
		csr  []byte
		want error
	}{
		{"not PEM", []byte("hello"), ErrCSR},
		{"DER", block.Bytes, ErrCSR},
		{"over-long", make([]byte, maxCSR+1), ErrCSR},
		{"another PEM type", []byte(strings.ReplaceAll(string(good), "CERTIFICATE REQUEST", "CERTIFICATE")), ErrCSR},
		{"two requests", append(append([]byte{}, good...), good...), ErrCSR},
		{"trailing octets", encode(append(append([]byte{}, block.Bytes...), 0)), ErrCSR},
		{"cut", encode(block.Bytes[:len(block.Bytes)-9]), ErrCSR},
		{"wrong signature", encode(wrong), ErrProof},
		{"RSA-1024", makeCSR(t, k.rsa1024, x509.SHA256WithRSA), ErrWeakKey},
		{"P-224", makeCSR(t, k.p224, x509.ECDSAWithSHA256), ErrWeakKey},
	} {
		t.Run(test.name, func(t *testing.T) {
			if _, err := ProveCSR(test.csr); !errors.Is(err, test.want) {
				t.Errorf("err %v, want %v", err, test.want)
			}
		})
	}
	for _, test := range []struct {
		name string
		csr  []byte
		want string
	}{
		{"P-384 with SHA-256", makeCSR(t, k.p384, x509.ECDSAWithSHA256), "signing algorithm not permitted: *ecdsa.PublicKey, SHA-256"},
		{"P-256 with SHA-384", makeCSR(t, k.p256, x509.ECDSAWithSHA384), "signing algorithm not permitted: *ecdsa.PublicKey, SHA-384"},
		{"RSA with SHA-512", makeCSR(t, k.rsa2048, x509.SHA512WithRSA), "signing algorithm not permitted: *rsa.PublicKey, SHA-512"},
		{"RSA-PSS", makeCSR(t, k.rsa2048, x509.SHA256WithRSAPSS), "unrecognized signature algorithm: SHA256-RSAPSS"},
	} {
		var algorithm *AlgorithmError
		if _, err := ProveCSR(test.csr); !errors.As(err, &algorithm) || err.Error() != test.want {
			t.Errorf("%s: err %v", test.name, err)
		}
	}
}
