package rekor

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	_ "crypto/sha256" // linked for crypto.SHA256
	_ "crypto/sha512" // linked for crypto.SHA384 and crypto.SHA512
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"strconv"

	v1 "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	pb "github.com/sigstore/rekor-tiles/v2/pkg/generated/protobuf"
	"google.golang.org/protobuf/encoding/protojson"
)

// entry is a request that passed every check.
type entry struct {
	leaf []byte            // canonical, ready to append
	cert *x509.Certificate // nil if the verifier is a bare public key
}

// refusal is why a request is refused, in words for the client: Message is the
// sentence that rekor-tiles answers, reason says what is wrong.
type refusal struct {
	message, reason string
}

func (r *refusal) Error() string { return r.message + ": " + r.reason }

const (
	msgInvalid = "invalid hashedrekord request"
	msgType    = "invalid type, must be hashedrekord"
	msgEntry   = "invalid entry"
	msgBody    = "invalid request body"
)

func invalid(format string, args ...any) error {
	return &refusal{msgInvalid, fmt.Sprintf(format, args...)}
}

// algorithm is one of the admitted kinds of signature. It is the default for
// its key: verifiers derive it from the key when they rebuild the leaf, so no
// other is accepted (sigstore-go since 1.2 rebuilds the leaf).
type algorithm struct {
	details v1.PublicKeyDetails
	hash    crypto.Hash
	name    string // of the hash, in the leaf
}

// algorithmOf returns the default algorithm of a key, if it is admitted.
func algorithmOf(pub crypto.PublicKey) (algorithm, bool) {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return algorithm{v1.PublicKeyDetails_PKIX_ECDSA_P256_SHA_256, crypto.SHA256, "SHA2_256"}, true
		case elliptic.P384():
			return algorithm{v1.PublicKeyDetails_PKIX_ECDSA_P384_SHA_384, crypto.SHA384, "SHA2_384"}, true
		case elliptic.P521():
			return algorithm{v1.PublicKeyDetails_PKIX_ECDSA_P521_SHA_512, crypto.SHA512, "SHA2_512"}, true
		}
	case *rsa.PublicKey:
		switch k.Size() * 8 {
		case 2048:
			return algorithm{v1.PublicKeyDetails_PKIX_RSA_PKCS1V15_2048_SHA256, crypto.SHA256, "SHA2_256"}, true
		case 3072:
			return algorithm{v1.PublicKeyDetails_PKIX_RSA_PKCS1V15_3072_SHA256, crypto.SHA256, "SHA2_256"}, true
		case 4096:
			return algorithm{v1.PublicKeyDetails_PKIX_RSA_PKCS1V15_4096_SHA256, crypto.SHA256, "SHA2_256"}, true
		}
	case ed25519.PublicKey:
		return algorithm{v1.PublicKeyDetails_PKIX_ED25519_PH, crypto.SHA512, "SHA2_512"}, true
	}
	return algorithm{}, false
}

// parse reads and checks the JSON of a CreateEntryRequest and returns the
// entry that it asks for, or a *refusal. Unknown fields are refused.
func parse(body []byte) (*entry, error) {
	var req pb.CreateEntryRequest
	if err := protojson.Unmarshal(body, &req); err != nil {
		return nil, fmt.Errorf("%w: %w", &refusal{msgBody, "not the JSON of a CreateEntryRequest, or a field that it does not have"}, err)
	}
	return build(&req)
}

func build(req *pb.CreateEntryRequest) (*entry, error) {
	switch spec := req.GetSpec().(type) {
	case *pb.CreateEntryRequest_HashedRekordRequestV002:
		return fromHashedRekord(spec.HashedRekordRequestV002)
	case *pb.CreateEntryRequest_DsseRequestV002:
		return fromDSSE(spec.DsseRequestV002)
	}
	return nil, &refusal{msgType, "the request has no hashedRekordRequestV002"}
}

// fromHashedRekord checks a hashedrekord request in the order of rekor-tiles.
func fromHashedRekord(hr *pb.HashedRekordRequestV002) (*entry, error) {
	switch {
	case len(hr.GetSignature().GetContent()) == 0:
		return nil, invalid("the signature is missing")
	case hr.GetSignature().GetVerifier() == nil:
		return nil, invalid("the verifier is missing")
	case len(hr.GetDigest()) == 0:
		return nil, invalid("the digest is missing")
	}
	v, err := readVerifier(hr.GetSignature().GetVerifier())
	if err != nil {
		return nil, err
	}
	return v.entry(hr.GetDigest(), hr.GetSignature().GetContent())
}

// verifier is a public key with the algorithm that it stands for.
type verifier struct {
	algorithm
	pub  crypto.PublicKey
	cert *x509.Certificate
	raw  []byte // DER of the certificate or of the SubjectPublicKeyInfo
}

// readVerifier parses the key or certificate and checks its key details.
func readVerifier(p *pb.Verifier) (*verifier, error) {
	v := &verifier{}
	var err error
	switch {
	case p.GetX509Certificate() != nil:
		v.raw = p.GetX509Certificate().GetRawBytes()
		if v.cert, err = x509.ParseCertificate(v.raw); err == nil {
			v.pub = v.cert.PublicKey
		}
	case p.GetPublicKey() != nil:
		v.raw = p.GetPublicKey().GetRawBytes()
		v.pub, err = x509.ParsePKIXPublicKey(v.raw)
	default:
		return nil, invalid("the verifier has neither a public key nor a certificate")
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", invalid("the verifier is not a DER certificate or SubjectPublicKeyInfo"), err)
	}
	if p.GetKeyDetails() == v1.PublicKeyDetails_PUBLIC_KEY_DETAILS_UNSPECIFIED {
		return nil, invalid("keyDetails is missing")
	}
	var ok bool
	if v.algorithm, ok = algorithmOf(v.pub); !ok {
		return nil, invalid("keys of this type or size are not admitted")
	}
	if p.GetKeyDetails() != v.details {
		return nil, invalid("keyDetails must be %s for this key", v.details)
	}
	return v, nil
}

// entry checks the digest and the signature over it and builds the entry.
func (v *verifier) entry(digest, signature []byte) (*entry, error) {
	if len(digest) != v.hash.Size() {
		return nil, invalid("the digest has %d octets; %s has %d", len(digest), v.hash, v.hash.Size())
	}
	if !v.verify(digest, signature) {
		return nil, invalid("the signature does not verify")
	}
	leaf := v.leaf(digest, signature)
	if len(leaf) > maxEntry {
		return nil, &refusal{msgEntry, "the entry is longer than " + strconv.Itoa(maxEntry) + " octets"}
	}
	return &entry{leaf: leaf, cert: v.cert}, nil
}

// verify checks a signature over digest: ECDSA in ASN.1 DER, RSA PKCS #1 v1.5,
// or Ed25519ph (RFC 8032, Section 5.1).
func (v *verifier) verify(digest, signature []byte) bool {
	switch k := v.pub.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(k, digest, signature)
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(k, v.hash, digest, signature) == nil
	case ed25519.PublicKey:
		return ed25519.VerifyWithOptions(k, digest, signature, &ed25519.Options{Hash: v.hash}) == nil
	}
	return false
}

// leaf is the canonical entry: the RFC 8785 form of the protobuf JSON of a
// hashedrekord 0.0.2 Entry. Its keys are in order and its strings are base64
// and names of enums, which RFC 8785 leaves as they are, so it can be written
// directly; a test compares it with rekor-tiles' own.
func (v *verifier) leaf(digest, signature []byte) []byte {
	b := make([]byte, 0, 384+base64.StdEncoding.EncodedLen(len(digest)+len(signature)+len(v.raw)))
	b = append(b, `{"apiVersion":"0.0.2","kind":"hashedrekord","spec":{"hashedRekordV002":{"data":{"algorithm":"`...)
	b = append(b, v.name...)
	b = append(b, `","digest":"`...)
	b = base64.StdEncoding.AppendEncode(b, digest)
	b = append(b, `"},"signature":{"content":"`...)
	b = base64.StdEncoding.AppendEncode(b, signature)
	b = append(b, `","verifier":{"keyDetails":"`...)
	b = append(b, v.details.String()...)
	if v.cert != nil {
		b = append(b, `","x509Certificate":{"rawBytes":"`...)
	} else {
		b = append(b, `","publicKey":{"rawBytes":"`...)
	}
	b = base64.StdEncoding.AppendEncode(b, v.raw)
	return append(b, `"}}}}}}`...)
}
