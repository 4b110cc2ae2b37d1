package pkcs11_test

import (
	"crypto/ecdsa"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
)

// pairOf is two open tokens that share a wrapping key.
type pairOf struct {
	shim             *hsmtest.Shim
	sourceT, targetT hsmtest.SoftHSMToken
	source, target   *pkcs11.Token
	pairing          hsm.Pairing
}

// officer is the security officer of a token.
func officer(token hsmtest.SoftHSMToken) pkcs11.Officer {
	return pkcs11.Officer{Module: token.Module, URI: token.URI, PIN: token.SOPIN}
}

// newPair makes two tokens behind the shim, pairs and opens them.
func newPair(t *testing.T) pairOf {
	t.Helper()
	p := pairOf{shim: hsmtest.NewShim(t)}
	p.sourceT, p.targetT = p.shim.NewToken(t), p.shim.NewToken(t)
	var err error
	if p.pairing, err = pkcs11.Pair(t.Context(), "wrapping-key", officer(p.sourceT), officer(p.targetT)); err != nil {
		t.Fatal(err)
	}
	p.source, p.target = hsmtest.OpenSoftHSM(t, p.sourceT), hsmtest.OpenSoftHSM(t, p.targetT)
	return p
}

// extractable makes a key in the source that may be wrapped.
func (p pairOf) extractable(t *testing.T, label string, algorithm hsm.Algorithm) hsm.Key {
	t.Helper()
	key, err := p.source.Generate(t.Context(), hsm.Spec{Label: label, ID: hsmtest.RandomID(), Algorithm: algorithm, Extractable: true})
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// wrap makes and wraps a key.
func (p pairOf) wrap(t *testing.T, label string, algorithm hsm.Algorithm) hsm.Wrapped {
	t.Helper()
	wrapped, err := p.source.Wrap(t.Context(), p.extractable(t, label, algorithm), hsm.RoleRoot, p.pairing)
	if err != nil {
		t.Fatal(err)
	}
	return wrapped
}

// spki is the hash of a wrapped key.
func spki(t *testing.T, w hsm.Wrapped) [32]byte {
	t.Helper()
	hash, err := hsm.ParseSPKIHash(w.SPKI)
	if err != nil {
		t.Fatal(err)
	}
	return hash
}

func TestBackupRoundTrip(t *testing.T) {
	p := newPair(t)
	for _, row := range []struct {
		role      hsm.Role
		algorithm hsm.Algorithm
	}{{hsm.RoleRoot, hsm.ECDSAP256}, {hsm.RoleTSARoot, hsm.ECDSAP384}} {
		key := p.extractable(t, string(row.role), row.algorithm)
		wrapped, err := p.source.Wrap(t.Context(), key, row.role, p.pairing)
		if err != nil {
			t.Fatal(err)
		}
		text, err := wrapped.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		read, err := hsm.ParseWrapped(text)
		if err != nil {
			t.Fatal(err)
		}
		restored, e, err := p.target.Restore(t.Context(), read, row.role, key.Ref().SPKI)
		if err != nil {
			t.Fatal(err)
		}
		if !key.Public().(*ecdsa.PublicKey).Equal(restored.Public()) {
			t.Error("another public key was restored")
		}
		t.Logf("%d octets, %s", len(wrapped.Octets), e.Level)
	}
}
