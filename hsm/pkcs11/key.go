package pkcs11

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/chancery-ca/chancery/hsm"
)

// key is a private key in a token. It implements hsm.Key.
type key struct {
	token *Token
	ref   hsm.Ref
	role  hsm.Role
	pub   *ecdsa.PublicKey
	id    []byte
	label string

	// pair is the key on the last connection on which it was found.
	pair atomic.Pointer[pair]
}

var _ hsm.Key = (*key)(nil)

// Public returns the *ecdsa.PublicKey.
func (k *key) Public() crypto.PublicKey { return k.pub }

// Ref returns the name under which the key was opened.
func (k *key) Ref() hsm.Ref { return k.ref }

// Sign is SignContext without a context: its wait ends with the queue's limit
// or the token's deadline.
func (k *key) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.SignContext(context.Background(), digest, opts)
}

// maxDigest is the longest digest that CheckDigest lets through, in octets.
const maxDigest = 64

// SignContext signs digest in the token and verifies the signature. See hsm.Key.
func (k *key) SignContext(ctx context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if err := hsm.CheckDigest(digest, opts); err != nil {
		return nil, fmt.Errorf("sign with %s: %w", k.ref, err)
	}
	sig, err := k.sign(ctx, digest)
	if err != nil {
		return nil, fmt.Errorf("sign with %s: %w", k.ref, err)
	}
	if err := hsm.Verify(k.pub, digest, sig); err != nil {
		clear(sig)
		k.token.log.Error("token returned a wrong signature", "key", k.ref.URI)
		return nil, fmt.Errorf("sign with %s: %w", k.ref, err)
	}
	return sig, nil
}

// sign gets an unverified signature from the token.
func (k *key) sign(ctx context.Context, digest []byte) ([]byte, error) {
	// The worker may outlive this call, so it gets a copy. ECDSA uses the
	// leftmost bits of a digest that is longer than the curve's order
	// (FIPS 186-5, Section 6.4.1); not every token cuts by itself.
	var buf [maxDigest]byte
	n := copy(buf[:], digest)
	n = min(n, (k.pub.Curve.Params().BitSize+7)/8)
	var sig []byte
	err := k.token.do(ctx, k.role.Share(), true, func(c *connection) (err error) {
		p, err := k.on(c)
		if err != nil {
			return err
		}
		sig, err = p.signer.Sign(nil, buf[:n], nil)
		return p.proved(classify(err))
	})
	if err != nil {
		return nil, err
	}
	return sig, nil
}

// on returns where the key is on connection c. If it has not been found on c
// yet it is looked for, by its id and label, and must have its public key and
// satisfy its role.
func (k *key) on(c *connection) (*pair, error) {
	p := k.pair.Load()
	if p.conn == c {
		return p, nil
	}
	p, err := c.resolve(k.token.uri.key(k.label, k.id), &k.ref.SPKI, k.role)
	if err != nil {
		return nil, err
	}
	k.pair.Store(p)
	return p, nil
}

// errForeign: the key is not one of this token's.
var errForeign = errors.New("key was not opened by this token")

// own returns key as ours.
func (t *Token) own(k hsm.Key) (*key, error) {
	own, ok := k.(*key)
	if !ok || own.token != t {
		return nil, errForeign
	}
	return own, nil
}
