package rekor

import (
	"fmt"

	pb "github.com/sigstore/rekor-tiles/v2/pkg/generated/protobuf"
)

// fromDSSE turns the deprecated DSSE request into a hashedrekord entry over
// the hash of the envelope's pre-authentication encoding: verifiers since
// sigstore-go 1.2 cannot read dsse 0.0.2 leaves, and rebuild a hashedrekord.
func fromDSSE(req *pb.DSSERequestV002) (*entry, error) {
	env := req.GetEnvelope()
	switch {
	case env == nil:
		return nil, invalid("the envelope is missing")
	case len(env.GetSignatures()) != 1:
		return nil, invalid("the envelope has %d signatures; exactly one is accepted", len(env.GetSignatures()))
	case len(req.GetVerifiers()) != 1:
		return nil, invalid("the request has %d verifiers; exactly one is accepted", len(req.GetVerifiers()))
	case len(env.GetSignatures()[0].GetSig()) == 0:
		return nil, invalid("the signature is missing")
	}
	v, err := readVerifier(req.GetVerifiers()[0])
	if err != nil {
		return nil, err
	}
	h := v.hash.New()
	// DSSE 1.0.2, PAE: "DSSEv1" SP LEN(type) SP type SP LEN(payload) SP payload.
	_, _ = fmt.Fprintf(h, "DSSEv1 %d %s %d ", len(env.GetPayloadType()), env.GetPayloadType(), len(env.GetPayload()))
	_, _ = h.Write(env.GetPayload())
	return v.entry(h.Sum(nil), env.GetSignatures()[0].GetSig())
}
