package client

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"fmt"

	protobundle "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	protocommon "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	"github.com/sigstore/sigstore/pkg/cryptoutils"

	"github.com/sigstore/sigstore-go/pkg/sign"
)

// keypair is a throw-away P-256 key that lives for one signature, in memory
// alone. It is a sigstore-go sign.Keypair: SignData hashes what it is given.
type keypair struct {
	private *ecdsa.PrivateKey
	pem     string
}

func newKeypair() (*keypair, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make throw-away key: %w", err)
	}
	pem, err := cryptoutils.MarshalPublicKeyToPEM(private.Public())
	if err != nil {
		return nil, fmt.Errorf("encode throw-away key: %w", err)
	}
	return &keypair{private: private, pem: string(pem)}, nil
}

func (k *keypair) GetHashAlgorithm() protocommon.HashAlgorithm {
	return protocommon.HashAlgorithm_SHA2_256
}

func (k *keypair) GetSigningAlgorithm() protocommon.PublicKeyDetails {
	return protocommon.PublicKeyDetails_PKIX_ECDSA_P256_SHA_256
}

func (k *keypair) GetHint() []byte                  { return nil }
func (k *keypair) GetKeyAlgorithm() string          { return "ECDSA" }
func (k *keypair) GetPublicKey() crypto.PublicKey   { return k.private.Public() }
func (k *keypair) GetPublicKeyPem() (string, error) { return k.pem, nil }

func (k *keypair) SignData(_ context.Context, data []byte) ([]byte, []byte, error) {
	digest := sha256.Sum256(data)
	signature, err := ecdsa.SignASN1(rand.Reader, k.private, digest[:])
	return signature, digest[:], err
}

// digested is the same key for content that is a SHA-256 digest already: an
// artefact is hashed once as a stream and never held in memory.
type digested struct{ *keypair }

func (k digested) SignData(_ context.Context, digest []byte) ([]byte, []byte, error) {
	if len(digest) != sha256.Size {
		return nil, nil, fmt.Errorf("sign digest: %d octets, want %d", len(digest), sha256.Size)
	}
	signature, err := ecdsa.SignASN1(rand.Reader, k.private, digest)
	return signature, digest, err
}

// artifact is the sign.Content of a file of which only the digest is known.
type artifact struct{ digest [sha256.Size]byte }

func (a artifact) PreAuthEncoding() []byte { return a.digest[:] }

func (a artifact) Bundle(b *protobundle.Bundle, signature, digest []byte, alg protocommon.HashAlgorithm) {
	(&sign.PlainData{}).Bundle(b, signature, digest, alg)
}

// certifier asks the CA for a certificate of the throw-away key. The proof of
// possession signs a hash of the token's subject, not a digest that is given.
type certifier struct {
	fulcio *sign.Fulcio
	key    *keypair
}

func (c certifier) GetCertificate(ctx context.Context, _ sign.Keypair, opts *sign.CertificateProviderOptions) ([]byte, error) {
	return c.fulcio.GetCertificate(ctx, c.key, opts)
}
