// Package ca is the certificate authority: it turns an authenticated identity
// and a public key that its owner has proved into a code-signing certificate
// with an embedded SCT.
//
// Data flows one way: Request → decision (ca/policy) → TBS, built and linted
// (ca/profile) → precertificate ∥ SCT → final certificate ∥ the log's durable
// leaf ∥ the audit's durable record (ca/audit) → Certificate. What stands
// together runs at the same time, so that of the three hardware signatures
// (precertificate, SCT, certificate) two are on the critical path:
//
//	            ┌ sign precertificate ┐                ┌ sign certificate ┐
//	TBS, lints ─┤                     ├─ SCT is ours? ─┼ leaf durable     ┼─ release
//	            └ SCT (CT key)        ┘                └ record durable   ┘
//
// With a log elsewhere (Submitter) the log sees the precertificate before it
// gives an SCT, so the steps follow one another: precertificate → SCT, which is
// verified with the log's key → certificate.
//
// The package promises:
//   - The hardware signs only what the profile has linted, and only within the
//     validity of every certificate of the CA's chain.
//   - A certificate leaves only when its precertificate is a durable leaf of
//     the log, its SCT is for this certificate, and the audit holds a durable
//     record of it. When one fails, what was signed is dropped and never sent,
//     and the audit says so. Of a log elsewhere the CA knows only its signed
//     promise, the SCT.
//   - Every decision about an identity, yes or no, is in the audit; of requests
//     without a valid token as many as the audit takes.
//   - At most MaxConcurrent requests are in work; the next gets ErrBusy at
//     once.
//
// It trusts its caller for the identity and for the proof of possession, the
// key to verify its own signatures (see hsm.Key), and the SCT source for the
// durability that Commit reports.
package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/chancery-ca/chancery/ca/audit"
	"github.com/chancery-ca/chancery/ca/identity"
	"github.com/chancery-ca/chancery/ca/policy"
	"github.com/chancery-ca/chancery/ca/profile"
	"github.com/chancery-ca/chancery/hsm"
)

// Errors that callers branch on. Each wraps what happened.
var (
	// ErrBusy: too many requests are in work, or a queue behind this package
	// is full. Nothing was released; try again.
	ErrBusy = errors.New("certificate authority busy")
	// ErrUnavailable: the clock refuses, the token is lost, or the time ran
	// out. Nothing was released; try again.
	ErrUnavailable = errors.New("certificate authority not available")
	// ErrIdentity: the identity or the key cannot be put into a certificate.
	ErrIdentity = errors.New("certificate cannot carry this identity or key")
	// ErrPolicy: the policy does not allow the certificate.
	ErrPolicy = errors.New("policy does not allow this certificate")
	// ErrCA: the certificate could not be built or signed.
	ErrCA = errors.New("certificate not signed")
	// ErrLog: the certificate could not be entered in the log.
	ErrLog = errors.New("certificate not logged")
	// ErrConfig: key, chain and settings do not go together.
	ErrConfig = errors.New("certificate authority configuration refused")
)

// SCTSource is the log that the authority needs. Its errors, and those of its
// Promises, wrap ErrBusy or ErrUnavailable (or hsm's ErrBusy or ErrLost) where
// trying again helps; any other is ErrLog.
type SCTSource interface {
	// Promise has an SCT signed for a precertificate whose TBSCertificate
	// without poison is tbs, under the issuer with that key hash (RFC 6962,
	// Section 3.2). Nothing is queued or stored before Commit.
	Promise(ctx context.Context, issuerKeyHash [32]byte, tbs []byte) (Promise, error)
}

// Promise is an SCT whose leaf is not in the log yet.
type Promise interface {
	// SCT returns the TLS-encoded SignedCertificateTimestamp.
	SCT() []byte
	// Signed returns the SHA-256 digest that the log's key signed for the SCT,
	// and the DER signature, which that key verified before it returned it
	// (hsm.Key).
	Signed() (digest [32]byte, signature []byte)
	// Commit enters the leaf and returns when it is durable. precert is the
	// DER precertificate and chain its issuers, root last.
	Commit(ctx context.Context, precert []byte, chain [][]byte) (index uint64, err error)
}

// Submitter is a log elsewhere, to which a precertificate is sent as anybody
// would send it (RFC 6962, Section 4.2). Its errors wrap ErrBusy or
// ErrUnavailable where trying again helps; any other is ErrLog.
type Submitter interface {
	// Submit returns the TLS-encoded SignedCertificateTimestamp that the log
	// answers with. precert is the DER precertificate and chain its issuers,
	// root last. What comes back is not trusted: the Authority verifies it
	// with Config.LogKeys.
	Submit(ctx context.Context, precert []byte, chain [][]byte) (sct []byte, err error)
}

// Limits and defaults of Config.
const (
	// DefaultLifetime is how long a certificate is valid.
	DefaultLifetime = 10 * time.Minute
	// DefaultMaxConcurrent is how many requests are in work at a time.
	DefaultMaxConcurrent = 256
)

// Config is what an Authority consists of.
type Config struct {
	// Key signs; its public key is that of Chain[0].
	Key hsm.Key
	// Chain is the CA's certificates, issuer first, root last.
	Chain []*x509.Certificate
	// SCTs is the log in this process, Submitter the log elsewhere; exactly
	// one is given.
	SCTs      SCTSource
	Submitter Submitter
	// LogKey is the public key of the log in this process. It has verified the
	// SCT's signature (hsm.Key), over a digest that must be that of our own TBS
	// before the certificate is signed. Without it the SCT of SCTs is trusted
	// as the source returns it.
	LogKey crypto.PublicKey
	// LogKeys are those of the logs elsewhere, of which Submitter has one give
	// the SCT. It needs them.
	LogKeys []crypto.PublicKey
	// Now is the one clock; an error refuses every request.
	Now func() (time.Time, error)
	// Lifetime is notAfter − notBefore, whole seconds, at most
	// profile.MaxLifetime; 0 is DefaultLifetime.
	Lifetime time.Duration
	// Policy decides who may have a certificate; nil allows every identity.
	Policy *policy.Policy
	// Uses counts the uses of tokens; nil counts none, and their limits are
	// not kept.
	Uses *identity.Uses
	// Audit records every decision; nil records none.
	Audit *audit.Log
	// MaxConcurrent bounds the requests in work; 0 is DefaultMaxConcurrent.
	MaxConcurrent int
	// Logger may be nil.
	Logger *slog.Logger
}

// Authority issues certificates. It is safe for concurrent use.
type Authority struct {
	cfg      Config
	issuer   *profile.Issuer
	chainDER [][]byte
	chainPEM []string
	slots    chan struct{} // one for each request in work
}

// Request is who gets a certificate for which key. The caller has verified
// both.
type Request struct {
	// ID is the name under which log and audit have the request. It may be
	// empty.
	ID        string
	Principal *identity.Principal
	Public    crypto.PublicKey
}

// Certificate is a certificate that was issued and logged.
type Certificate struct {
	// DER is the leaf, and PEM the leaf and the chain, root last, each without
	// white space around it.
	DER []byte
	PEM []string
	// Serial is the serial number in hexadecimal.
	Serial              string
	NotBefore, NotAfter time.Time
	// LogIndex is the leaf's index in the log, or nil for a log elsewhere,
	// which does not say.
	LogIndex *uint64
}

// New checks that key, chain and settings go together: the key is that of the
// first certificate, and every certificate is a CA's, signed by the next, the
// last by itself. It does not look at the clock: a CA whose time has not come
// or is over refuses each request. Errors: ErrConfig.
func New(cfg Config) (*Authority, error) {
	if cfg.Lifetime == 0 {
		cfg.Lifetime = DefaultLifetime
	}
	if cfg.MaxConcurrent == 0 {
		cfg.MaxConcurrent = DefaultMaxConcurrent
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	issuer, err := profile.NewIssuer(cfg.Chain[0])
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	a := &Authority{cfg: cfg, issuer: issuer, slots: make(chan struct{}, cfg.MaxConcurrent)}
	for _, cert := range cfg.Chain {
		a.chainDER = append(a.chainDER, cert.Raw)
		a.chainPEM = append(a.chainPEM, encodePEM(cert.Raw))
	}
	return a, nil
}

func (c Config) check() error {
	switch {
	case c.Key == nil || c.Now == nil:
		return errors.New("key and clock are required")
	case (c.SCTs == nil) == (c.Submitter == nil):
		return errors.New("one log is required, here or elsewhere")
	case (c.Submitter != nil) != (len(c.LogKeys) > 0) || c.Submitter != nil && c.LogKey != nil:
		return errors.New("logs elsewhere need their public keys, and they alone")
	case c.Lifetime < time.Second || c.Lifetime%time.Second != 0:
		return fmt.Errorf("lifetime %v is not a positive number of whole seconds", c.Lifetime)
	case c.Lifetime > profile.MaxLifetime:
		return fmt.Errorf("lifetime %v is longer than %v", c.Lifetime, profile.MaxLifetime)
	case c.MaxConcurrent < 0:
		return errors.New("negative number of concurrent requests")
	case len(c.Chain) == 0:
		return errors.New("no certificate chain")
	}
	if err := checkKey(c.Key, c.Chain[0]); err != nil {
		return err
	}
	return checkChain(c.Chain)
}

func checkKey(key hsm.Key, cert *x509.Certificate) error {
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return fmt.Errorf("encode public key: %w", err)
	}
	if !bytes.Equal(spki, cert.RawSubjectPublicKeyInfo) {
		return fmt.Errorf("key of the first certificate: %w", hsm.ErrMismatch)
	}
	return nil
}

// checkChain verifies every signature of the chain, and what Fulcio asks of a
// chain: CAs, and codeSigning in the intermediates (Fulcio, docs/certificate-specification.md).
func checkChain(chain []*x509.Certificate) error {
	for i, cert := range chain {
		parent := chain[min(i+1, len(chain)-1)]
		if !cert.BasicConstraintsValid || !cert.IsCA {
			return fmt.Errorf("certificate %d of the chain is not a CA's", i)
		}
		if err := cert.CheckSignatureFrom(parent); err != nil {
			return fmt.Errorf("certificate %d of the chain: %w", i, err)
		}
		if last := i == len(chain)-1; !last && !slices.Contains(cert.ExtKeyUsage, x509.ExtKeyUsageCodeSigning) {
			return fmt.Errorf("certificate %d of the chain may not sign code", i)
		}
	}
	return nil
}

func encodePEM(der []byte) string {
	return strings.TrimSpace(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
}

// ChainPEM returns the CA's certificates, issuer first and root last, each
// without white space around it. The slice is not to be modified.
func (a *Authority) ChainPEM() []string { return a.chainPEM }

// Issue makes one certificate. Errors: ErrBusy, ErrUnavailable, ErrIdentity,
// ErrPolicy, identity.ErrUsed, ErrCA, ErrLog; nothing was released with any of
// them.
func (a *Authority) Issue(ctx context.Context, req Request) (*Certificate, error) {
	if err := a.admit(); err != nil {
		return nil, err
	}
	defer a.leave()
	granted, err := a.decide(req)
	if err != nil {
		a.refuse(granted.record, err, true)
		return nil, err
	}
	cert, err := a.issue(ctx, req, granted)
	if err != nil {
		a.withdraw(granted, req, err)
		return nil, err
	}
	a.note(audit.Record{Type: audit.TypeIssued, Request: req.ID, Serial: cert.Serial, LogIndex: cert.LogIndex})
	return cert, nil
}

// issue is the way from a decision to a certificate.
func (a *Authority) issue(ctx context.Context, req Request, granted *grant) (*Certificate, error) {
	leaf, err := a.prepare(req, granted.lifetime)
	if err != nil {
		return nil, err
	}
	granted.record.Serial = leaf.Serial().Text(16)
	if a.cfg.Submitter != nil {
		der, err := a.submit(ctx, leaf, granted)
		if err != nil {
			return nil, err
		}
		return a.certificate(leaf, der, nil), nil
	}
	precert, promise, err := a.precertify(ctx, leaf)
	if err != nil {
		return nil, err
	}
	der, index, err := a.seal(ctx, leaf, precert, promise, granted)
	if err != nil {
		return nil, err
	}
	return a.certificate(leaf, der, &index), nil
}

// admit takes a slot or refuses at once: waiting is the client's part.
func (a *Authority) admit() error {
	select {
	case a.slots <- struct{}{}:
		return nil
	default:
		return fmt.Errorf("%w: %d requests in work", ErrBusy, cap(a.slots))
	}
}

func (a *Authority) leave() { <-a.slots }

// prepare builds and lints the certificate: everything that needs no hardware.
func (a *Authority) prepare(req Request, lifetime time.Duration) (*profile.Leaf, error) {
	now, err := a.cfg.Now()
	if err != nil {
		return nil, fmt.Errorf("read clock: %w: %w", ErrUnavailable, err)
	}
	start := now.UTC().Truncate(time.Second)
	end := start.Add(lifetime)
	if err := a.checkWindow(start, end); err != nil {
		return nil, err
	}
	leaf, err := a.issuer.Leaf(profile.LeafSpec{
		Public: req.Public, SAN: req.Principal.SAN, Extensions: req.Principal.Extensions,
		NotBefore: start, NotAfter: end,
	})
	var lint *profile.LintError
	switch {
	case errors.As(err, &lint): // names only: a finding's detail may quote the identity
		return nil, fmt.Errorf("build certificate: %w: %w: %s", ErrCA, profile.ErrLint, strings.Join(lint.Rules(), ", "))
	case errors.Is(err, profile.ErrName), errors.Is(err, profile.ErrKey):
		return nil, fmt.Errorf("build certificate: %w: %w", ErrIdentity, err)
	case err != nil:
		return nil, fmt.Errorf("build certificate: %w: %w", ErrCA, err)
	}
	return leaf, nil
}

// checkWindow keeps a certificate within the validity of its whole chain.
func (a *Authority) checkWindow(start, end time.Time) error {
	for i, cert := range a.cfg.Chain {
		if start.Before(cert.NotBefore) || end.After(cert.NotAfter) {
			return fmt.Errorf("%w: certificate %d of the chain is valid from %s to %s", ErrCA, i,
				cert.NotBefore.UTC().Format(time.RFC3339), cert.NotAfter.UTC().Format(time.RFC3339))
		}
	}
	return nil
}

// precertify has the precertificate and the SCT signed, at the same time.
func (a *Authority) precertify(ctx context.Context, leaf *profile.Leaf) (precert []byte, promise Promise, err error) {
	err = together(ctx,
		func(ctx context.Context) error {
			der, err := leaf.SignPrecertificate(ctx, a.cfg.Key)
			if err != nil {
				return fmt.Errorf("sign precertificate: %w", classify(ErrCA, err))
			}
			precert = der
			return nil
		},
		func(ctx context.Context) error {
			p, err := a.cfg.SCTs.Promise(ctx, a.issuer.KeyHash(), leaf.LogTBS())
			if err != nil {
				return fmt.Errorf("obtain SCT: %w", classify(ErrLog, err))
			}
			promise = p
			return nil
		})
	return precert, promise, err
}

// seal checks the SCT, and has the certificate signed, the leaf made durable
// and the decision recorded at the same time. It returns only when all are done.
func (a *Authority) seal(ctx context.Context, leaf *profile.Leaf, precert []byte, promise Promise, granted *grant) (der []byte, index uint64, err error) {
	sct := promise.SCT()
	if a.cfg.LogKey != nil {
		digest, signature := promise.Signed()
		if err := leaf.CheckSignedSCT(sct, a.cfg.LogKey, digest, signature); err != nil {
			return nil, 0, fmt.Errorf("check SCT: %w: %w", ErrLog, err)
		}
	}
	err = together(ctx,
		func(ctx context.Context) (err error) {
			der, err = a.signFinal(ctx, leaf, sct)
			return err
		},
		func(ctx context.Context) error {
			i, err := promise.Commit(ctx, precert, a.chainDER)
			if err != nil {
				return fmt.Errorf("enter certificate in log: %w", classify(ErrLog, err))
			}
			index = i
			return nil
		},
		func(ctx context.Context) error { return a.allow(ctx, granted) })
	return der, index, err
}

func (a *Authority) signFinal(ctx context.Context, leaf *profile.Leaf, sct []byte) ([]byte, error) {
	der, err := leaf.SignFinal(ctx, a.cfg.Key, sct)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", classify(ErrCA, err))
	}
	return der, nil
}

// submit has the precertificate signed, gets an SCT for it from a log
// elsewhere, and has the certificate signed only when that SCT verifies.
func (a *Authority) submit(ctx context.Context, leaf *profile.Leaf, granted *grant) (der []byte, err error) {
	precert, err := leaf.SignPrecertificate(ctx, a.cfg.Key)
	if err != nil {
		return nil, fmt.Errorf("sign precertificate: %w", classify(ErrCA, err))
	}
	sct, err := a.cfg.Submitter.Submit(ctx, precert, a.chainDER)
	if err != nil {
		return nil, fmt.Errorf("submit precertificate: %w", classify(ErrLog, err))
	}
	if err := a.checkElsewhere(leaf, sct); err != nil {
		return nil, err
	}
	err = together(ctx,
		func(ctx context.Context) (err error) {
			der, err = a.signFinal(ctx, leaf, sct)
			return err
		},
		func(ctx context.Context) error { return a.allow(ctx, granted) })
	return der, err
}

// checkElsewhere wants an SCT for this leaf by one of the logs elsewhere.
func (a *Authority) checkElsewhere(leaf *profile.Leaf, sct []byte) (err error) {
	for _, key := range a.cfg.LogKeys {
		if err = leaf.CheckSCT(sct, key); err == nil {
			return nil
		}
	}
	return fmt.Errorf("check SCT: %w: %w", ErrLog, err)
}

func (a *Authority) certificate(leaf *profile.Leaf, der []byte, index *uint64) *Certificate {
	c := &Certificate{DER: der, Serial: leaf.Serial().Text(16), LogIndex: index}
	c.NotBefore, c.NotAfter = leaf.Validity()
	c.PEM = append(make([]string, 0, 1+len(a.chainPEM)), encodePEM(der))
	c.PEM = append(c.PEM, a.chainPEM...)
	return c
}

// classify says which of our errors err is: one that will pass, or kind.
func classify(kind, err error) error {
	switch {
	case errors.Is(err, ErrBusy), errors.Is(err, ErrUnavailable):
		return err
	case errors.Is(err, hsm.ErrBusy), errors.Is(err, audit.ErrBusy):
		return fmt.Errorf("%w: %w", ErrBusy, err)
	case errors.Is(err, hsm.ErrLost), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return fmt.Errorf("%w: %w", kind, err)
}

// together runs the first function here and the others beside it, and waits for
// all. The first error ends the others' context and is returned.
func together(ctx context.Context, here func(context.Context) error, others ...func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var first error
	var once sync.Once
	run := func(f func(context.Context) error) {
		if err := f(ctx); err != nil {
			once.Do(func() { first = err; cancel() })
		}
	}
	var beside sync.WaitGroup
	for _, f := range others {
		beside.Go(func() { run(f) })
	}
	run(here)
	beside.Wait()
	return first
}
