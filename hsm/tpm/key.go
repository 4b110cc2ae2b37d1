package tpm

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"math/big"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-tpm/tpm2"
	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// key is a private key in a TPM. It implements hsm.Key.
type key struct {
	token  *Token
	ref    hsm.Ref
	role   hsm.Role
	public *public
	file   *keyFile       // nil for a key at a persistent handle
	handle tpm2.TPMHandle // the persistent handle, zero for a key in a file
}

var _ hsm.Key = (*key)(nil)

// Public returns the *ecdsa.PublicKey.
func (k *key) Public() crypto.PublicKey { return k.public.key }

// Ref returns the name under which the key was opened.
func (k *key) Ref() hsm.Ref { return k.ref }

// Sign is SignContext without a context: its wait ends with the queue's limit
// or the token's deadline.
func (k *key) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.SignContext(context.Background(), digest, opts)
}

// SignContext signs digest in the TPM (TPM2_Sign, Part 3, Section 20.2) and
// verifies the signature. The hash is the one that goes with the key's
// algorithm: a TPM key is bound to it. See hsm.Key.
func (k *key) SignContext(ctx context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if err := k.checkDigest(digest, opts); err != nil {
		return nil, fmt.Errorf("sign with %s: %w", k.ref, err)
	}
	sig, err := k.sign(ctx, append([]byte(nil), digest...)) // the worker may outlive this call
	if err != nil {
		return nil, fmt.Errorf("sign with %s: %w", k.ref, err)
	}
	if err := hsm.Verify(k.public.key, digest, sig); err != nil {
		clear(sig)
		k.token.log.Error("TPM returned a wrong signature", "key", k.ref.URI)
		return nil, fmt.Errorf("sign with %s: %w", k.ref, err)
	}
	return sig, nil
}

// checkDigest says whether the key can sign digest.
func (k *key) checkDigest(digest []byte, opts crypto.SignerOpts) error {
	if err := hsm.CheckDigest(digest, opts); err != nil {
		return err
	}
	if bound := k.public.algorithm.Hash(); opts.HashFunc() != bound {
		return fmt.Errorf("hash %s, the key is bound to %s: %w", opts.HashFunc(), bound, hsm.ErrUnsupported)
	}
	return nil
}

// sign gets an unverified signature from the TPM.
func (k *key) sign(ctx context.Context, digest []byte) ([]byte, error) {
	var sig []byte
	err := k.token.do(ctx, k.role.Share(), true, func(c *connection) (err error) {
		sig, err = c.sign(k, digest)
		if errors.Is(err, hsm.ErrPIN) {
			k.token.die(err)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return sig, nil
}

// sign is one TPM2_Sign.
func (c *connection) sign(k *key, digest []byte) ([]byte, error) {
	s, err := c.session()
	if err != nil {
		return nil, err
	}
	handle, err := c.load(k)
	if err != nil {
		return nil, err
	}
	rsp, err := run(c, tpm2.Sign{
		KeyHandle: tpm2.AuthHandle{Handle: handle, Name: k.public.name, Auth: s.with(c.cfg.Auth, in)},
		Digest:    tpm2.TPM2BDigest{Buffer: digest},
		// InScheme is null: the key's own.
		Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck},
	})
	if k.file == nil && errors.Is(err, tpm2.TPMRCHandle) {
		delete(c.parents, k.handle)
		return nil, fmt.Errorf("nothing at %#x any more: %w: %w", uint32(k.handle), hsm.ErrNotFound, err)
	}
	if err != nil {
		return nil, err
	}
	sig, err := rsp.Signature.Signature.ECDSA()
	if err != nil {
		return nil, &lostError{err}
	}
	var r, sValue big.Int
	r.SetBytes(sig.SignatureR.Buffer)
	sValue.SetBytes(sig.SignatureS.Buffer)
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1BigInt(&r)
		b.AddASN1BigInt(&sValue)
	})
	return b.Bytes()
}

// load returns a handle of the key, good until the next hold or room. Whatever
// was loaded has the key's Name.
func (c *connection) load(k *key) (tpm2.TPMHandle, error) {
	if err := k.token.alive(k.public.name); err != nil {
		return zero, err
	}
	if k.file == nil {
		return k.handle, c.atHandle(k)
	}
	return c.hold(string(k.public.name.Buffer), func() (tpm2.TPMHandle, error) {
		return c.loadFile(k.file, k.public)
	})
}

// loadFile loads a key's blobs (TPM2_Load, Part 3, Section 12.2).
func (c *connection) loadFile(f *keyFile, p *public) (tpm2.TPMHandle, error) {
	s, err := c.session()
	if err != nil {
		return zero, err
	}
	above, err := c.parent(f.parent)
	if err != nil {
		return zero, fmt.Errorf("storage key: %w", err)
	}
	rsp, err := run(c, tpm2.Load{
		ParentHandle: tpm2.AuthHandle{Handle: above.Handle, Name: above.Name, Auth: s.with(nil, plain)},
		InPrivate:    tpm2.TPM2BPrivate{Buffer: f.private},
		InPublic:     tpm2.New2B(p.area),
	})
	if errors.Is(err, tpm2.TPMRCIntegrity) {
		return zero, fmt.Errorf("key file is damaged, or of another TPM: %w: %w", hsm.ErrMismatch, err)
	}
	if err != nil {
		return zero, fmt.Errorf("load key: %w", err)
	}
	if string(rsp.Name.Buffer) != string(p.name.Buffer) {
		_ = c.flush(rsp.ObjectHandle)
		return zero, &lostError{fmt.Errorf("%w: another key was loaded", errMalformed)}
	}
	return rsp.ObjectHandle, nil
}

// atHandle checks, once for each connection, that the key is still at its
// persistent handle.
func (c *connection) atHandle(k *key) error {
	if p := c.parents[k.handle]; p != nil && string(p.Name.Buffer) == string(k.public.name.Buffer) {
		return nil
	}
	area, name, err := c.readPersistent(k.handle)
	if err != nil {
		return err
	}
	if string(name.Buffer) != string(k.public.name.Buffer) {
		return fmt.Errorf("another key is at %#x: %w", uint32(k.handle), hsm.ErrMismatch)
	}
	c.parents[k.handle] = &parent{tpm2.NamedHandle{Handle: k.handle, Name: name}, area}
	return nil
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
