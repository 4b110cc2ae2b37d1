// Package tsa is an RFC 3161 timestamp authority whose key lives in a token.
//
// Data flows one way: HTTP body → request (DER or JSON) → TSTInfo → signed
// attributes → the hardware's signature → CMS SignedData → response.
//
// The package promises that a timestamp that leaves it
//   - carries the time of the one clock, in whole seconds, never earlier than
//     a timestamp given out before by this Authority, at most one second away
//     from the clock, and within the validity of every certificate of its
//     chain;
//   - has a serial number of its own: 159 random bits;
//   - is over SHA-256, SHA-384 or SHA-512, under a policy that is configured;
//   - has exactly the profile that sigstore's clients read: CMS version 3, one signer named by issuer and serial number,
//     signingCertificateV2, the nonce if and only if one was sent, the
//     certificate if and only if it was asked for.
//
// When it cannot know the time, or the token does not answer, it gives no
// timestamp. It trusts the clock, and the key to verify what it signs; it
// keeps no state but the last time it gave out, and no record of whom it
// served.
//
// The response is encoded here and not by github.com/digitorus/timestamp
// (v0.0.0-20231217203849): that library writes a signingTime from the system's
// clock instead of ours, an empty certificates field where RFC 3161, 2.4.1
// forbids one, parameters into the messageImprint that the request did not
// have, and cannot hand a context to the token. For the rest, the tests show
// that the octets are the library's, and read every response with it, with
// openssl and with sigstore's verifiers.
package tsa

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"slices"
	"sync"
	"time"

	"github.com/chancery-ca/chancery/hsm"
)

// Errors that callers branch on.
var (
	// ErrConfig: New was given a key, chain or policy that cannot work.
	ErrConfig = errors.New("timestamp authority refused")
	// ErrRequest: the request is the client's fault. errors.As to
	// *RequestError gives the public sentence.
	ErrRequest = errors.New("timestamp request refused")
	// ErrUnavailable: the time is not known, or is outside of the validity of
	// the certificates. Nothing was signed.
	ErrUnavailable = errors.New("time not available")
)

// SigstorePolicy is the policy of sigstore's public timestamp authority. It is
// the default, and accepted in a request in any case.
var SigstorePolicy = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57264, 2}

// accuracy is the bound on |genTime − clock| that every timestamp states, in
// seconds (RFC 3161, 2.4.2).
const accuracy = 1

// Config is what an Authority is made of.
type Config struct {
	// Key is the TSA's key, ECDSA P-256 or P-384; the certificate's.
	Key hsm.Key
	// Chain is the TSA's certificate, then each issuer, the self-signed root
	// last: at least two, as sigstore-python demands.
	Chain []*x509.Certificate
	// Now is the one clock. Its error means that the time is not known.
	Now func() (time.Time, error)
	// Policy is written into a timestamp whose request names none. Nil is
	// SigstorePolicy.
	Policy asn1.ObjectIdentifier
	// Logger takes refusals (warn) and failures (error). Nil discards.
	Logger *slog.Logger
}

// Authority gives timestamps. It is safe for concurrent use.
type Authority struct {
	key      hsm.Key
	now      func() (time.Time, error)
	policy   asn1.ObjectIdentifier
	log      *slog.Logger
	encoder  *encoder
	chainPEM []byte
	start    time.Time // the latest notBefore of the chain
	end      time.Time // the earliest notAfter of the chain

	mu   sync.Mutex
	last time.Time // the latest genTime given out; mu
}

// New checks the key, the chain and the policy and makes an Authority. It does
// not look at the clock: a certificate out of its validity is refused at each
// request. Errors: ErrConfig.
func New(cfg Config) (*Authority, error) {
	if cfg.Key == nil || cfg.Now == nil {
		return nil, fmt.Errorf("%w: no key or no clock", ErrConfig)
	}
	if err := checkChain(cfg.Chain); err != nil {
		return nil, err
	}
	signer := cfg.Chain[0]
	if pub, ok := cfg.Key.Public().(*ecdsa.PublicKey); !ok || !pub.Equal(signer.PublicKey) {
		return nil, fmt.Errorf("%w: the key is not the first certificate's", ErrConfig)
	}
	if cfg.Policy == nil {
		cfg.Policy = SigstorePolicy
	}
	if !validOID(cfg.Policy) {
		return nil, fmt.Errorf("%w: policy is not an object identifier", ErrConfig)
	}
	enc, err := newEncoder(signer)
	if err != nil {
		return nil, err
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	a := &Authority{
		key: cfg.Key, now: cfg.Now, policy: slices.Clone(cfg.Policy), log: cfg.Logger, encoder: enc,
		start: signer.NotBefore, end: signer.NotAfter,
	}
	var chain bytes.Buffer
	for _, c := range cfg.Chain {
		if c.NotBefore.After(a.start) {
			a.start = c.NotBefore
		}
		if c.NotAfter.Before(a.end) {
			a.end = c.NotAfter
		}
		if err := pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}); err != nil {
			return nil, fmt.Errorf("encode chain: %w", err)
		}
	}
	if !a.start.Before(a.end) {
		return nil, fmt.Errorf("%w: the certificates of the chain are never valid together", ErrConfig)
	}
	a.chainPEM = chain.Bytes()
	return a, nil
}

// CertificateChain returns the chain in PEM, the TSA's certificate first.
func (a *Authority) CertificateChain() []byte { return bytes.Clone(a.chainPEM) }

// Timestamp answers one request with the DER of a TimeStampResp, status
// granted. Errors: *RequestError, ErrUnavailable, and those of the key
// (hsm.ErrBusy, hsm.ErrLost, …).
func (a *Authority) Timestamp(ctx context.Context, req *Request) ([]byte, error) {
	if err := req.check(a.policy); err != nil {
		return nil, err
	}
	genTime, err := a.time()
	if err != nil {
		return nil, err
	}
	serial, err := newSerial(rand.Reader)
	if err != nil {
		return nil, err
	}
	policy := req.Policy
	if policy == nil {
		policy = a.policy
	}
	info, err := a.encoder.tstInfo(req, policy, serial, genTime)
	if err != nil {
		return nil, err
	}
	attributes, err := a.encoder.attributes(info, genTime)
	if err != nil {
		return nil, err
	}
	signature, err := a.sign(ctx, attributes)
	if err != nil {
		return nil, err
	}
	return a.encoder.response(info, attributes, signature, req.Certificates)
}

// sign has the token sign the signed attributes as a SET OF (RFC 5652, 5.4).
// hsm.Key verifies the signature: it is not verified again here.
func (a *Authority) sign(ctx context.Context, attributes []byte) ([]byte, error) {
	set, err := setOf(attributes)
	if err != nil {
		return nil, err
	}
	h := a.encoder.hash.New()
	h.Write(set)
	signature, err := a.key.SignContext(ctx, h.Sum(nil), a.encoder.hash)
	if err != nil {
		return nil, fmt.Errorf("sign timestamp: %w", err)
	}
	return signature, nil
}

// time is the next genTime: the clock's, in whole seconds, but never earlier
// than the last one. A clock that is more than the accuracy behind the last
// genTime is not believed. It is read where the last one cannot change: a request
// that pauses between the two would look like a clock that went back.
func (a *Authority) time() (time.Time, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now, err := a.now()
	if err != nil {
		return time.Time{}, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	genTime := now.UTC().Truncate(time.Second)
	if genTime.Before(a.last) {
		if a.last.Sub(now) > accuracy*time.Second {
			return time.Time{}, fmt.Errorf("%w: clock is %s behind the last timestamp", ErrUnavailable, a.last.Sub(now))
		}
		genTime = a.last
	}
	if genTime.Before(a.start) || genTime.After(a.end) {
		return time.Time{}, fmt.Errorf("%w: %s is not in the validity of the certificates, %s to %s", ErrUnavailable,
			genTime.Format(time.RFC3339), a.start.UTC().Format(time.RFC3339), a.end.UTC().Format(time.RFC3339))
	}
	a.last = genTime
	return genTime, nil
}

// newSerial draws a positive serial number of up to 159 bits, at least 64.
func newSerial(random io.Reader) (*big.Int, error) {
	var octets [20]byte
	if _, err := io.ReadFull(random, octets[:]); err != nil {
		return nil, fmt.Errorf("draw serial number: %w", err)
	}
	octets[0] &= 0x7f
	serial := new(big.Int).SetBytes(octets[:])
	if serial.BitLen() < 64 {
		return nil, errors.New("draw serial number: randomness is broken")
	}
	return serial, nil
}

var (
	oidExtKeyUsage = asn1.ObjectIdentifier{2, 5, 29, 37}
	oidKeyUsage    = asn1.ObjectIdentifier{2, 5, 29, 15}
)

// checkChain: each certificate is signed by the next, the last by itself; the
// first is an end entity for timestamping alone (RFC 3161, 2.3), the others
// are CAs that allow it.
func checkChain(chain []*x509.Certificate) error {
	if len(chain) < 2 || slices.Contains(chain, nil) {
		return fmt.Errorf("%w: the chain needs the TSA's certificate and its issuers, root last", ErrConfig)
	}
	if err := checkSigner(chain[0]); err != nil {
		return err
	}
	for i, c := range chain {
		issuer := chain[min(i+1, len(chain)-1)]
		if !bytes.Equal(c.RawIssuer, issuer.RawSubject) {
			return fmt.Errorf("%w: certificate %d of the chain does not name the next as its issuer", ErrConfig, i)
		}
		if err := c.CheckSignatureFrom(issuer); err != nil {
			return fmt.Errorf("%w: certificate %d of the chain is not signed by the next: %w", ErrConfig, i, err)
		}
		if i > 0 && !allowsTimeStamping(c) {
			return fmt.Errorf("%w: certificate %d of the chain must not issue for timestamping", ErrConfig, i)
		}
		if i > 0 && c.MaxPathLen >= 0 && i-1 > c.MaxPathLen && (c.MaxPathLen > 0 || c.MaxPathLenZero) {
			return fmt.Errorf("%w: certificate %d of the chain has a path length of %d", ErrConfig, i, c.MaxPathLen)
		}
	}
	return nil
}

// checkSigner wants an end entity with the one purpose timeStamping, critical,
// that may sign, with a key that sigstore's clients verify.
func checkSigner(c *x509.Certificate) error {
	if c.IsCA {
		return fmt.Errorf("%w: the first certificate is a CA", ErrConfig)
	}
	if len(c.UnknownExtKeyUsage) != 0 || len(c.ExtKeyUsage) != 1 || c.ExtKeyUsage[0] != x509.ExtKeyUsageTimeStamping {
		return fmt.Errorf("%w: the first certificate's extended key usage is not timeStamping alone", ErrConfig)
	}
	if !isCritical(c, oidExtKeyUsage) {
		return fmt.Errorf("%w: the first certificate's extended key usage is not critical", ErrConfig)
	}
	if c.KeyUsage&x509.KeyUsageDigitalSignature == 0 || !isCritical(c, oidKeyUsage) {
		return fmt.Errorf("%w: the first certificate lacks the critical key usage digitalSignature", ErrConfig)
	}
	if _, _, ok := algorithmOf(c.PublicKey); !ok {
		return fmt.Errorf("%w: key type %T, want ECDSA P-256 or P-384", ErrConfig, c.PublicKey)
	}
	return nil
}

func isCritical(c *x509.Certificate, id asn1.ObjectIdentifier) bool {
	return slices.ContainsFunc(c.Extensions, func(e pkixExtension) bool { return e.Id.Equal(id) && e.Critical })
}

// allowsTimeStamping: a CA without purposes, or with this one among them.
func allowsTimeStamping(c *x509.Certificate) bool {
	if len(c.ExtKeyUsage) == 0 && len(c.UnknownExtKeyUsage) == 0 {
		return true
	}
	return slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageTimeStamping)
}

// algorithmOf gives the digest and the signature algorithm of a key: SHA-256
// with P-256, SHA-384 with P-384 (sigstore-js follows the CMS digest).
func algorithmOf(pub crypto.PublicKey) (crypto.Hash, asn1.ObjectIdentifier, bool) {
	if k, ok := pub.(*ecdsa.PublicKey); ok {
		switch k.Curve {
		case elliptic.P256():
			return crypto.SHA256, oidECDSAWithSHA256, true
		case elliptic.P384():
			return crypto.SHA384, oidECDSAWithSHA384, true
		}
	}
	return 0, nil, false
}
