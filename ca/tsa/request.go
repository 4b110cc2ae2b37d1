package tsa

import (
	"bytes"
	"crypto"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"
)

type pkixExtension = pkix.Extension

// Bounds of a request.
const (
	// MaxJSON bounds a JSON request, in octets (as upstream does: a decimal
	// nonce costs quadratic time to read).
	MaxJSON = 1024
	// MaxDER bounds a DER request, in octets. A SHA-512 request with policy
	// and nonce has about 150.
	MaxDER = 4096

	maxNonce         = 64  // octets
	maxOIDComponents = 128 // as upstream
)

// Public sentences, the ones of upstream where it has one.
const (
	msgGeneric   = "Error generating timestamp response"
	msgOID       = "OID should be comprised of at most 128 components"
	msgLarge     = "timestamp request is too large"
	msgWeakHash  = "Weak hash algorithm in timestamp request"
	msgLength    = "Message digest has incorrect length for specified algorithm"
	msgPolicy    = "unaccepted policy: requested TSA policy is not supported by the TSA"
	msgExtension = "unaccepted extension: requested extensions are not supported by the TSA"
)

// RequestError is a refused request: Public may be told to the client, the
// rest is for the log. It is ErrRequest.
type RequestError struct {
	// Public is one of a fixed set of sentences.
	Public string
	// Reason says more; it quotes at most 80 octets of the request.
	Reason string
}

// Error gives both.
func (e *RequestError) Error() string { return e.Public + ": " + e.Reason }

// Is makes a *RequestError match ErrRequest.
func (e *RequestError) Is(target error) bool { return target == ErrRequest }

func refuse(public, format string, args ...any) error {
	return &RequestError{Public: public, Reason: fmt.Sprintf(format, args...)}
}

// Request is a TimeStampReq (RFC 3161, 2.4.1), however it was written.
type Request struct {
	// Hash is SHA-256, SHA-384 or SHA-512.
	Hash crypto.Hash
	// Digest is the hashed message, Hash.Size octets.
	Digest []byte
	// NoParameters: the request's AlgorithmIdentifier has no parameters,
	// instead of NULL. The timestamp's is the same, since RFC 3161, 2.4.2
	// wants the same messageImprint.
	NoParameters bool
	// Policy is the policy asked for, or nil.
	Policy asn1.ObjectIdentifier
	// Nonce is echoed, or nil. At most 64 octets.
	Nonce *big.Int
	// Certificates asks for the TSA's certificate in the response.
	Certificates bool
}

// check refuses what this Authority does not grant.
func (r *Request) check(own asn1.ObjectIdentifier) error {
	switch r.Hash {
	case crypto.SHA256, crypto.SHA384, crypto.SHA512:
	case crypto.SHA1:
		return refuse(msgWeakHash, "SHA-1")
	default:
		return refuse(msgGeneric, "unsupported hash algorithm")
	}
	if len(r.Digest) != r.Hash.Size() {
		return refuse(msgLength, "%d octets, want %d", len(r.Digest), r.Hash.Size())
	}
	if r.Policy != nil && !r.Policy.Equal(own) && !r.Policy.Equal(SigstorePolicy) {
		return refuse(msgPolicy, "%.80s", r.Policy)
	}
	if r.Nonce != nil && len(r.Nonce.Bytes()) > maxNonce {
		return refuse(msgLarge, "nonce of %d octets", len(r.Nonce.Bytes()))
	}
	return nil
}

var (
	oidSHA1   = asn1.ObjectIdentifier{1, 3, 14, 3, 2, 26}
	oidSHA256 = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}
	oidSHA384 = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 2}
	oidSHA512 = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 3}
)

// hashOf returns the hash with an object identifier, or 0. SHA-1 is known in
// order to be refused by name.
func hashOf(id asn1.ObjectIdentifier) crypto.Hash {
	switch {
	case id.Equal(oidSHA256):
		return crypto.SHA256
	case id.Equal(oidSHA384):
		return crypto.SHA384
	case id.Equal(oidSHA512):
		return crypto.SHA512
	case id.Equal(oidSHA1):
		return crypto.SHA1
	}
	return 0
}

// ParseDER reads a TimeStampReq:
//
//	SEQUENCE { version INTEGER (1), messageImprint, reqPolicy OPTIONAL,
//	  nonce INTEGER OPTIONAL, certReq BOOLEAN DEFAULT FALSE,
//	  extensions [0] IMPLICIT OPTIONAL }
//
// An explicit certReq FALSE, which DER forbids, is read as BouncyCastle and
// openssl read it. Extensions are refused. Errors: *RequestError.
func ParseDER(raw []byte) (*Request, error) {
	if len(raw) > MaxDER {
		return nil, refuse(msgLarge, "%d octets of DER", len(raw))
	}
	var seq cryptobyte.String
	var version int64
	in := cryptobyte.String(raw)
	if !in.ReadASN1(&seq, casn1.SEQUENCE) || !in.Empty() {
		return nil, refuse(msgGeneric, "not one DER sequence")
	}
	if !seq.ReadASN1Integer(&version) || version != 1 {
		return nil, refuse(msgGeneric, "version is not 1")
	}
	req := new(Request)
	if err := req.readImprint(&seq); err != nil {
		return nil, err
	}
	if seq.PeekASN1Tag(casn1.OBJECT_IDENTIFIER) && !seq.ReadASN1ObjectIdentifier(&req.Policy) {
		return nil, refuse(msgGeneric, "malformed policy")
	}
	if err := req.readNonce(&seq); err != nil {
		return nil, err
	}
	if seq.PeekASN1Tag(casn1.BOOLEAN) && !seq.ReadASN1Boolean(&req.Certificates) {
		return nil, refuse(msgGeneric, "malformed certReq")
	}
	if seq.PeekASN1Tag(casn1.Tag(0).ContextSpecific().Constructed()) {
		return nil, refuse(msgExtension, "extensions")
	}
	if !seq.Empty() {
		return nil, refuse(msgGeneric, "trailing data in the sequence")
	}
	return req, nil
}

// readImprint reads SEQUENCE { AlgorithmIdentifier, OCTET STRING }.
func (r *Request) readImprint(in *cryptobyte.String) error {
	var imprint, alg cryptobyte.String
	var id asn1.ObjectIdentifier
	if !in.ReadASN1(&imprint, casn1.SEQUENCE) || !imprint.ReadASN1(&alg, casn1.SEQUENCE) ||
		!alg.ReadASN1ObjectIdentifier(&id) {
		return refuse(msgGeneric, "malformed message imprint")
	}
	r.NoParameters = alg.Empty()
	if !r.NoParameters {
		var null cryptobyte.String
		if !alg.ReadASN1(&null, casn1.NULL) || !null.Empty() || !alg.Empty() {
			return refuse(msgGeneric, "hash algorithm has parameters")
		}
	}
	if !imprint.ReadASN1Bytes(&r.Digest, casn1.OCTET_STRING) || !imprint.Empty() {
		return refuse(msgGeneric, "malformed message digest")
	}
	if r.Hash = hashOf(id); r.Hash == 0 {
		return refuse(msgGeneric, "unknown hash algorithm %.80s", id)
	}
	return nil
}

// readNonce reads the optional nonce, an INTEGER of either sign.
func (r *Request) readNonce(in *cryptobyte.String) error {
	if !in.PeekASN1Tag(casn1.INTEGER) {
		return nil
	}
	r.Nonce = new(big.Int)
	if !in.ReadASN1Integer(r.Nonce) {
		return refuse(msgGeneric, "malformed nonce")
	}
	return nil
}

// jsonRequest is the JSON form, which only sigstore-js sends.
type jsonRequest struct {
	ArtifactHash  string   `json:"artifactHash"`
	Certificates  bool     `json:"certificates"`
	HashAlgorithm string   `json:"hashAlgorithm"`
	Nonce         *big.Int `json:"nonce"`
	TSAPolicyOID  string   `json:"tsaPolicyOID"`
}

// ParseJSON reads the JSON form: {"artifactHash": base64 digest,
// "hashAlgorithm": "sha256" | "sha384" | "sha512" in any case, "certificates":
// bool, "nonce": integer, "tsaPolicyOID": dotted}. Unknown members are
// ignored, as upstream ignores them. Errors: *RequestError.
func ParseJSON(raw []byte) (*Request, error) {
	if len(raw) > MaxJSON {
		return nil, refuse(msgLarge, "%d octets of JSON", len(raw))
	}
	if !bytes.HasPrefix(bytes.TrimLeft(raw, " \t\r\n"), []byte("{")) {
		return nil, refuse(msgGeneric, "not a JSON object")
	}
	var in jsonRequest
	if err := json.Unmarshal(raw, &in); err != nil {
		return nil, refuse(msgGeneric, "malformed JSON: %.80s", err)
	}
	req := &Request{Certificates: in.Certificates, Nonce: in.Nonce}
	var err error
	if req.Hash, err = hashNamed(in.HashAlgorithm); err != nil {
		return nil, err
	}
	if req.Policy, err = parseOID(in.TSAPolicyOID); err != nil {
		return nil, err
	}
	if req.Digest, err = base64.StdEncoding.DecodeString(in.ArtifactHash); err != nil {
		return nil, refuse(msgGeneric, "artifactHash is not base64")
	}
	return req, nil
}

func hashNamed(name string) (crypto.Hash, error) {
	switch strings.ToLower(name) {
	case "sha256":
		return crypto.SHA256, nil
	case "sha384":
		return crypto.SHA384, nil
	case "sha512":
		return crypto.SHA512, nil
	case "sha1":
		return 0, refuse(msgWeakHash, "SHA-1")
	}
	return 0, refuse(msgGeneric, "unknown hash algorithm %.80q", name)
}

// parseOID reads a dotted object identifier; "" is none.
func parseOID(dotted string) (asn1.ObjectIdentifier, error) {
	if dotted == "" {
		return nil, nil
	}
	if strings.Count(dotted, ".") >= maxOIDComponents {
		return nil, refuse(msgOID, "too many components")
	}
	var id asn1.ObjectIdentifier
	for part := range strings.SplitSeq(dotted, ".") {
		n, err := strconv.ParseUint(part, 10, 31)
		if err != nil {
			return nil, refuse(msgOID, "component %.20q", part)
		}
		id = append(id, int(n))
	}
	if !validOID(id) {
		return nil, refuse(msgOID, "not an object identifier")
	}
	return id, nil
}

// validOID: at least two arcs, the first of 0 to 2, the second below 40 under
// the first two (X.660); none negative.
func validOID(id asn1.ObjectIdentifier) bool {
	if len(id) < 2 || len(id) > maxOIDComponents || id[0] > 2 || (id[0] < 2 && id[1] >= 40) {
		return false
	}
	return !slices.ContainsFunc(id, func(n int) bool { return n < 0 })
}
