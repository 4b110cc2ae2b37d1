package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"math/big"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"
)

func TestUses(t *testing.T) {
	token := func(id byte, uses, keys int) TokenUse {
		return TokenUse{ID: [32]byte{id}, Expires: noon.Add(time.Hour), MaxUses: uses, MaxKeys: keys}
	}
	type step struct {
		token TokenUse
		key   byte
		n     int
		err   error
	}
	for _, test := range []struct {
		name  string
		steps []step
	}{
		{"without limits", []step{{token(1, 0, 0), 1, 1, nil}, {token(1, 0, 0), 2, 2, nil}, {token(2, 0, 0), 1, 1, nil}}},
		{"one use", []step{{token(1, 1, 0), 1, 1, nil}, {token(1, 1, 0), 1, 1, ErrUsed}, {token(2, 1, 0), 1, 1, nil}}},
		{"one key", []step{{token(1, 0, 1), 1, 1, nil}, {token(1, 0, 1), 1, 2, nil}, {token(1, 0, 1), 2, 2, ErrUsed}, {token(1, 0, 1), 1, 3, nil}}},
		{"two keys, three uses", []step{{token(1, 3, 2), 1, 1, nil}, {token(1, 3, 2), 2, 2, nil}, {token(1, 3, 2), 3, 2, ErrUsed}, {token(1, 3, 2), 2, 3, nil}, {token(1, 3, 2), 2, 3, ErrUsed}}},
	} {
		u := NewUses(10)
		for i, s := range test.steps {
			n, err := u.Count(s.token, [32]byte{s.key}, noon)
			if n != s.n || !errors.Is(err, s.err) {
				t.Errorf("%s, step %d: %d, %v; want %d, %v", test.name, i, n, err, s.n, s.err)
			}
		}
	}
}

// TestUndoOfNothing: what was not used cannot be taken back.
func TestUndoOfNothing(t *testing.T) {
	u := NewUses(10)
	token := TokenUse{ID: [32]byte{1}, Expires: noon.Add(time.Hour), MaxUses: 1}
	for n, want := range []error{nil, nil, ErrUsed} {
		if _, err := u.Count(token, [32]byte{}, noon); !errors.Is(err, want) {
			t.Errorf("use %d: err %v, want %v", n, err, want)
		}
		if n == 0 {
			u.Undo(token)
			u.Undo(token)
		}
	}
}

// TestUsesAreBounded: a full memory refuses tokens with limits, lets others
// pass uncounted, and is empty again when they have expired.
func TestUsesAreBounded(t *testing.T) {
	u := NewUses(2)
	now := noon
	count := func(id byte, limit int) (int, error) {
		return u.Count(TokenUse{ID: [32]byte{id}, Expires: noon.Add(time.Minute), MaxUses: limit}, [32]byte{}, now)
	}
	for id := range byte(2) {
		if n, err := count(id, 5); n != 1 || err != nil {
			t.Fatal(n, err)
		}
	}
	if n, err := count(2, 0); n != 0 || err != nil {
		t.Errorf("full, without a limit: %d, %v", n, err)
	}
	if _, err := count(3, 5); !errors.Is(err, ErrUnavailable) {
		t.Errorf("full, with a limit: %v", err)
	}
	if n, err := count(1, 5); n != 2 || err != nil {
		t.Errorf("a known one: %d, %v", n, err)
	}
	now = noon.Add(2 * time.Minute)
	if n, err := count(4, 5); n != 1 || err != nil {
		t.Errorf("after they expired: %d, %v", n, err)
	}
}

// TestOneTokenManySignatures: an ECDSA signature can be written in a second form
// that verifies too (s and its negative); the token is the same.
func TestOneTokenManySignatures(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	base := serveProvider(t, hostile{algorithms: []string{"ES256"}, keys: jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k"}}}})
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	jws, err := signer.Sign([]byte(validClaims(base)))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := jws.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	signed, encoded := raw[:strings.LastIndexByte(raw, '.')+1], raw[strings.LastIndexByte(raw, '.')+1:]
	sig, err := base64.RawURLEncoding.DecodeString(encoded)
	if err != nil {
		t.Fatal(err)
	}
	s := new(big.Int).SetBytes(sig[32:])
	s.Sub(elliptic.P256().Params().N, s).FillBytes(sig[32:])
	other := signed + base64.RawURLEncoding.EncodeToString(sig)

	v := newVerifier(t, Issuer{IssuerURL: base, ClientID: "sigstore", Type: "email", MaxUses: 1})
	uses := NewUses(10)
	for n, token := range []string{raw, other} {
		p, err := v.Verify(t.Context(), token)
		if err != nil {
			t.Fatal(err) // the second too: it is a signature
		}
		_, err = uses.Count(p.Token, [32]byte{}, noon)
		if want := []error{nil, ErrUsed}[n]; !errors.Is(err, want) {
			t.Errorf("use %d: err %v, want %v", n, err, want)
		}
	}
}

// TestUsesConcurrently: of many uses at once exactly the allowed ones pass.
func TestUsesConcurrently(t *testing.T) {
	u := NewUses(10)
	token := TokenUse{ID: [32]byte{1}, Expires: noon.Add(time.Hour), MaxUses: 7}
	var passed atomic.Int64
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			if _, err := u.Count(token, [32]byte{}, noon); err == nil {
				passed.Add(1)
			}
		})
	}
	wg.Wait()
	if passed.Load() != 7 {
		t.Errorf("%d passed, want 7", passed.Load())
	}
	u.Undo(token)
	if _, err := u.Count(token, [32]byte{}, noon); err != nil {
		t.Errorf("after one was taken back: %v", err)
	}
}
