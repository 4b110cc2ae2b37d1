package ceremony

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"

	"github.com/chancery-ca/chancery/hsm"
)

// ErrRequest: a certificate request is not the one that the definition gives.
var ErrRequest = errors.New("not the certificate request of the definition")

// StepRequest makes a certificate request, which proves that this machine has
// the key.
const StepRequest StepKind = "request"

// maxRequest bounds a request, in octets: the longest names and a P-384 key
// take half of it.
const maxRequest = 2048

// requestFolder has the requests among the outputs.
const requestFolder = "requests/"

// requestData is the result of StepRequest: a PKCS #10 request (RFC 2986), DER.
type requestData struct {
	Request []byte `json:"request"`
	SHA256  string `json:"sha256"`
}

func (d *Definition) requestSteps() []Step {
	var steps []Step
	if d.side() != Online {
		return nil
	}
	for _, name := range d.requests() {
		c := d.Certificates[name]
		steps = append(steps, named(StepRequest, name, "The signature under the request proves that this token has the private key.",
			"Make the certificate request %s with key %s: %q.", name, c.Key, d.CommonName(c.Subject)))
	}
	return steps
}

// request makes a certificate request.
func (r *run) request(ctx context.Context, s Step) error {
	c := r.def.Certificates[s.Name]
	key, err := r.openKey(ctx, c.Key)
	if err != nil {
		return err
	}
	ctx, cancel := device(ctx)
	defer cancel()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: r.def.subject(c.Subject)}, contextSigner{ctx, key})
	if err != nil {
		return fmt.Errorf("sign request: %w", err)
	}
	sum := sha256.Sum256(der)
	return r.record(s, Done, requestData{Request: der, SHA256: hex.EncodeToString(sum[:])})
}

// contextSigner is a key for one call of the standard library.
type contextSigner struct {
	ctx context.Context
	hsm.Key
}

// Sign has the key sign a digest within the call's context. The source of
// randomness is not used: the token has its own.
func (s contextSigner) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return s.SignContext(s.ctx, digest, opts)
}

func (f *facts) takeRequest(rec *Record, s Step) error {
	var d requestData
	if err := rec.result(&d); err != nil {
		return err
	}
	c := f.def.Certificates[s.Name]
	csr, err := checkRequest(d.Request, f.def.subject(c.Subject), f.keys[c.Key].evidence.PublicKey)
	if err != nil {
		return bad(rec, "%w", err)
	}
	if sum := sha256.Sum256(d.Request); hex.EncodeToString(sum[:]) != d.SHA256 {
		return bad(rec, "hash differs")
	}
	if f.exchange.requests == nil {
		f.exchange.requests = map[string]*x509.CertificateRequest{}
	}
	f.exchange.requests[s.Name] = csr
	return nil
}

// checkRequest accepts the one request (RFC 2986, Section 4) that there can be
// for a subject and a public key (SubjectPublicKeyInfo, DER) but for its
// signature: version 1, no attributes and so no extensions that are asked for,
// ECDSA with the hash of the key's curve, DER, and nothing after it. The
// signature is verified: whoever made it has the private key. Errors:
// ErrRequest.
func checkRequest(der []byte, subject pkix.Name, public []byte) (*x509.CertificateRequest, error) {
	if len(der) > maxRequest {
		return nil, fmt.Errorf("%w: %d octets, at most %d", ErrRequest, len(der), maxRequest)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	if !bytes.Equal(csr.RawSubjectPublicKeyInfo, public) {
		return nil, fmt.Errorf("%w: another key, SPKI SHA-256 %x", ErrRequest, sha256.Sum256(csr.RawSubjectPublicKeyInfo))
	}
	info, err := requestInfo(subject, public)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(csr.RawTBSCertificateRequest, info) {
		return nil, fmt.Errorf("%w: it is for %.200q and asks for %d extensions, wanted is %q and nothing else",
			ErrRequest, csr.Subject, len(csr.Extensions), subject)
	}
	alg, err := hsm.AlgorithmOf(csr.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	if again, err := signedDER(info, alg, csr.Signature); err != nil || !bytes.Equal(again, der) {
		return nil, fmt.Errorf("%w: signed with %s, or not in DER", ErrRequest, csr.SignatureAlgorithm)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("%w: proof of possession: %w", ErrRequest, err)
	}
	return csr, nil
}

// requestInfo is the CertificationRequestInfo (RFC 2986, Section 4.1) without
// attributes.
func requestInfo(subject pkix.Name, public []byte) ([]byte, error) {
	name, err := asn1.Marshal(subject.ToRDNSequence())
	if err != nil {
		return nil, fmt.Errorf("encode subject: %w", err)
	}
	return asn1.Marshal(struct {
		Version    int
		Subject    asn1.RawValue
		PublicKey  asn1.RawValue
		Attributes []asn1.RawValue `asn1:"tag:0"`
	}{0, asn1.RawValue{FullBytes: name}, asn1.RawValue{FullBytes: public}, nil})
}

// signedDER puts a signature by a key of the algorithm on the octets of what is
// signed, as certificates, lists and requests have it (RFC 5280, 4.1.1).
func signedDER(tbs []byte, alg hsm.Algorithm, sig []byte) ([]byte, error) {
	return asn1.Marshal(struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{asn1.RawValue{FullBytes: tbs}, pkix.AlgorithmIdentifier{Algorithm: ecdsaWith[alg]}, asn1.BitString{Bytes: sig, BitLength: 8 * len(sig)}})
}

// requestPEM is a request as a file (RFC 7468, Section 7).
func requestPEM(csr *x509.CertificateRequest) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr.Raw})
}
