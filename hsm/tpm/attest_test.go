package tpm_test

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/tpm"
)

// attested is a TPM with a certified endorsement key, a key in it, and an
// attestation of that key.
type attested struct {
	token *tpm.Token
	key   hsm.Key
	nonce []byte
	roots *x509.CertPool
	a     hsm.Attestation
}

func newAttested(t testing.TB) *attested {
	t.Helper()
	e := hsmtest.SWTPM(t)
	x := &attested{roots: e.Certify(t), nonce: bytes.Repeat([]byte{7}, 32)}
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

func TestAttest(t *testing.T) {
	x := newAttested(t)
	text, err := json.Marshal(x.a)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d octets of JSON", len(text))
	v, err := tpm.VerifyAttestation(x.a, x.key.Ref().SPKI, x.nonce, x.roots)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", v)
	_ = sha256.New
	_ = rand.Reader
	_ = errors.New
}
