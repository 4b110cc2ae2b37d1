// Package hsmtest gives tests their keys: fresh SoftHSM tokens, software keys,
// and Conformance, the one suite that every backend passes.
//
// Each call of SoftHSM makes a new token, so tests do not see each other's
// keys and may run in parallel. The tokens of one test binary share a private
// home in a temporary directory; nothing of the machine's own SoftHSM is read
// or written. Homes of test binaries that have ended are removed by the next
// one.
//
// A missing SoftHSM skips the test with its reason, or fails it when
// CHANCERY_REQUIRE_HSM is 1.
package hsmtest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
)

// SoftHSM returns a fresh, empty, open token with a random label. It is closed
// when the test ends.
func SoftHSM(t testing.TB) hsm.Token {
	t.Helper()
	return OpenSoftHSM(t, NewSoftHSM(t))
}

// SoftHSMToken is a token of the process's private home: what a test needs to
// open it itself.
type SoftHSMToken struct {
	Module string // absolute path of the library
	Label  string // random
	URI    string // names the token, for pkcs11.Config
	PIN    []byte // user PIN, random
	SOPIN  []byte
}

// NewSoftHSM makes a fresh, empty token and does not open it.
func NewSoftHSM(t testing.TB) SoftHSMToken {
	t.Helper()
	return newToken(t, sharedHome(t).Module())
}

// Folder returns the folder in which SoftHSM keeps the token. Moved away it is
// a token that was taken out of its reader, for a library that is initialised
// meanwhile.
func (token SoftHSMToken) Folder(t testing.TB) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(sharedHome(t).Dir(), "tokens", "*", "token.object"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if content, err := os.ReadFile(file); err == nil && bytes.Contains(content, []byte(token.Label)) {
			return filepath.Dir(file)
		}
	}
	t.Fatalf("token %s has no folder", token.Label)
	return ""
}

// newToken makes a token through a module: SoftHSM's, or the shim before it.
func newToken(t testing.TB, module string) SoftHSMToken {
	t.Helper()
	token := SoftHSMToken{
		Module: module, Label: "test-" + rand.Text()[:12],
		PIN: []byte(rand.Text()), SOPIN: []byte(rand.Text()),
	}
	token.URI = pkcs11.TokenURI(token.Label)
	if err := pkcs11.InitToken(module, token.Label, token.SOPIN, token.PIN); err != nil {
		t.Fatal(err)
	}
	return token
}

// OpenSoftHSM opens a token of NewSoftHSM until the test ends.
func OpenSoftHSM(t testing.TB, token SoftHSMToken) *pkcs11.Token {
	t.Helper()
	opened, err := pkcs11.Open(t.Context(), pkcs11.Config{Module: token.Module, URI: token.URI, PIN: token.PIN, Deadline: patience})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := opened.Close(); err != nil {
			t.Errorf("close token: %v", err)
		}
	})
	return opened
}

// NewKey generates a key pair with this label and a random id.
func NewKey(t testing.TB, token hsm.Token, label string, algorithm hsm.Algorithm) hsm.Key {
	t.Helper()
	key, err := token.Generate(t.Context(), hsm.Spec{Label: label, ID: RandomID(), Algorithm: algorithm})
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// RandomID returns a random CKA_ID.
func RandomID() []byte {
	id := make([]byte, hsm.IDSize)
	_, _ = rand.Read(id) // never fails
	return id
}

// softwareKey is a key in memory. It keeps hsm.Key's promises about digests,
// verification and contexts, so that what it measures is the caller.
type softwareKey struct {
	private *ecdsa.PrivateKey
	ref     hsm.Ref
}

// SoftwareKey returns a new key in memory, for benchmarks and fault tests where
// a token would only add its own time. It panics on an unknown algorithm.
func SoftwareKey(algorithm hsm.Algorithm) hsm.Key {
	private, err := ecdsa.GenerateKey(algorithm.Curve(), rand.Reader)
	if err != nil {
		panic(fmt.Sprintf("hsmtest: generate %q: %v", algorithm, err))
	}
	spki, err := hsm.SPKIHash(private.Public())
	if err != nil {
		panic(fmt.Sprintf("hsmtest: %v", err))
	}
	ref := hsm.Ref{URI: fmt.Sprintf("memory:%x", spki[:8]), SPKI: spki}
	return &softwareKey{private: private, ref: ref}
}

func (k *softwareKey) Public() crypto.PublicKey { return &k.private.PublicKey }
func (k *softwareKey) Ref() hsm.Ref             { return k.ref }

func (k *softwareKey) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.SignContext(context.Background(), digest, opts)
}

func (k *softwareKey) SignContext(ctx context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if err := hsm.CheckDigest(digest, opts); err != nil {
		return nil, fmt.Errorf("sign with %s: %w", k.ref, err)
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("sign with %s: %w while queued (%w)", k.ref, hsm.ErrBusy, context.Cause(ctx))
	}
	sig, err := ecdsa.SignASN1(rand.Reader, k.private, digest)
	if err != nil {
		return nil, fmt.Errorf("sign with %s: %w", k.ref, err)
	}
	return sig, hsm.Verify(&k.private.PublicKey, digest, sig)
}

// Counting counts the signatures that its Key was asked for. The zero count
// and a Key make it ready; it is safe for concurrent use.
type Counting struct {
	hsm.Key
	count atomic.Int64
}

// Count returns how often Sign or SignContext was called.
func (c *Counting) Count() int64 { return c.count.Load() }

// Sign counts and signs.
func (c *Counting) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	c.count.Add(1)
	return c.Key.Sign(r, digest, opts)
}

// SignContext counts and signs.
func (c *Counting) SignContext(ctx context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	c.count.Add(1)
	return c.Key.SignContext(ctx, digest, opts)
}

// Failing is a Key that can be told to fail. It is safe for concurrent use.
type Failing struct {
	hsm.Key
	mu  sync.Mutex
	err error
}

// Fail makes every later signature fail with err; nil makes them work again.
func (f *Failing) Fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

// Sign signs unless Fail said otherwise.
func (f *Failing) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return f.SignContext(context.Background(), digest, opts)
}

// SignContext signs unless Fail said otherwise.
func (f *Failing) SignContext(ctx context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	f.mu.Lock()
	err := f.err
	f.mu.Unlock()
	if err != nil {
		return nil, fmt.Errorf("sign with %s: %w", f.Ref(), err)
	}
	return f.Key.SignContext(ctx, digest, opts)
}
