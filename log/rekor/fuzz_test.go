package rekor

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"testing"

	"github.com/gowebpki/jcs"
	v1 "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	"github.com/sigstore/protobuf-specs/gen/pb-go/dsse"
	pb "github.com/sigstore/rekor-tiles/v2/pkg/generated/protobuf"
	"github.com/sigstore/rekor-tiles/v2/pkg/types/hashedrekord"
	"github.com/sigstore/sigstore/pkg/signature"
	"google.golang.org/protobuf/encoding/protojson"
)

// FuzzParse: what is accepted gives the leaf that rekor-tiles makes of it,
// and whatever is refused is refused with a sentence.
func FuzzParse(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		f.Fatal(err)
	}
	digest := sha256.Sum256([]byte("DSSEv1 4 text 1 x"))
	sig, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		f.Fatal(err)
	}
	v := &pb.Verifier{
		Verifier:   &pb.Verifier_PublicKey{PublicKey: &pb.PublicKey{RawBytes: spki}},
		KeyDetails: v1.PublicKeyDetails_PKIX_ECDSA_P256_SHA_256,
	}
	for _, req := range []*pb.CreateEntryRequest{
		{},
		{Spec: &pb.CreateEntryRequest_HashedRekordRequestV002{HashedRekordRequestV002: &pb.HashedRekordRequestV002{Digest: digest[:], Signature: &pb.Signature{Content: sig, Verifier: v}}}},
		{Spec: &pb.CreateEntryRequest_DsseRequestV002{DsseRequestV002: &pb.DSSERequestV002{
			Envelope:  &dsse.Envelope{Payload: []byte("x"), PayloadType: "text", Signatures: []*dsse.Signature{{Sig: sig}}},
			Verifiers: []*pb.Verifier{v},
		}}},
	} {
		b, err := protojson.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	registry, err := signature.NewAlgorithmRegistryConfig([]v1.PublicKeyDetails{v1.PublicKeyDetails_PKIX_ECDSA_P256_SHA_256})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := parse(b)
		var r *refusal
		if err != nil {
			if !errors.As(err, &r) || r.reason == "" {
				t.Fatalf("refused without a sentence: %v", err)
			}
			return
		}
		var req pb.CreateEntryRequest
		if err := protojson.Unmarshal(b, &req); err != nil {
			t.Fatalf("accepted what protojson refuses: %v", err)
		}
		hr := req.GetHashedRekordRequestV002()
		if hr == nil {
			return
		}
		entry, err := hashedrekord.ToLogEntry(hr, registry)
		if err != nil {
			t.Fatalf("accepted what rekor-tiles refuses: %v", err)
		}
		raw, err := protojson.Marshal(entry)
		if err != nil {
			t.Fatal(err)
		}
		want, err := jcs.Transform(raw)
		if err != nil || !bytes.Equal(want, e.leaf) {
			t.Fatalf("leaf %s, rekor-tiles %s (%v)", e.leaf, want, err)
		}
	})
}
