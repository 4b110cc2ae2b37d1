package profile

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"strings"
	"sync"

	zx509 "github.com/zmap/zcrypto/x509"
	"github.com/zmap/zlint/v3/lint"
	_ "github.com/zmap/zlint/v3/lints/community" // registers its lints
	_ "github.com/zmap/zlint/v3/lints/rfc"       // registers its lints
)

// Finding is one lint or rule that a certificate fails.
type Finding struct {
	// Rule is zlint's name ("e_ext_san_no_entries") or one of our own
	// ("chancery_leaf_eku").
	Rule string
	// Detail says what was found; it may quote the certificate, at most 200
	// octets of it.
	Detail string
}

// LintError says which lints and rules a certificate fails. It is ErrLint.
type LintError struct {
	// Findings has at least one element, in the order in which the rules run.
	Findings []Finding
}

// Error names every rule that failed.
func (e *LintError) Error() string {
	parts := make([]string, len(e.Findings))
	for i, f := range e.Findings {
		parts[i] = f.Rule
		if f.Detail != "" {
			parts[i] += " (" + f.Detail + ")"
		}
	}
	return ErrLint.Error() + ": " + strings.Join(parts, ", ")
}

// Is makes a *LintError match ErrLint.
func (e *LintError) Is(target error) bool { return target == ErrLint }

// Rules returns the names of the rules that failed.
func (e *LintError) Rules() []string {
	names := make([]string, len(e.Findings))
	for i, f := range e.Findings {
		names[i] = f.Rule
	}
	return names
}

// exceptions are the lints whose finding does not stop a certificate, each
// with its reason.
var exceptions = map[string]string{
	// RFC 5280 wants a fully qualified domain name or an address in a URI's
	// authority. Identities here are not web servers: a SPIFFE trust domain is
	// no DNS name, and a private forge may be a single label or carry a port.
	// chancery_leaf_san takes its place: an absolute URI with an authority.
	"e_ext_san_uri_host_not_fqdn_or_ip": "identity URIs name trust domains and private hosts",
}

// lintSources are the registries that apply to a private code-signing PKI.
// The CA/Browser Forum, Apple, Mozilla and Chrome rules are for the web PKI
// and reject a code-signing root.
var lintSources = lint.SourceList{
	lint.RFC3279, lint.RFC5280, lint.RFC5480, lint.RFC5891, lint.RFC8813, lint.Community,
}

// registry is the filtered set of lints, built once.
var registry = sync.OnceValues(func() (*linter, error) {
	r, err := lint.GlobalRegistry().Filter(lint.FilterOptions{IncludeSources: lintSources})
	if err != nil {
		return nil, fmt.Errorf("filter lint registry: %w", err)
	}
	for name := range exceptions {
		if r.CertificateLints().ByName(name) == nil {
			return nil, fmt.Errorf("lint exception %s names no lint of the registry", name)
		}
	}
	about, err := needs(r.CertificateLints())
	if err != nil {
		return nil, err
	}
	return &linter{lints: r.CertificateLints().Lints(), needs: about, config: r.GetConfiguration()}, nil
})

// linter runs zlint's lints; safe for concurrent use, because every run makes
// its own lint objects.
type linter struct {
	lints  []*lint.CertificateLint
	needs  map[string]string // by name: the extension without which a lint never applies
	config lint.Configuration
}

// run returns every error, warning and fatal result that is no exception.
func (l *linter) run(cert *zx509.Certificate) []Finding {
	var found []Finding
	for _, one := range l.lints {
		if id, ok := l.needs[one.Name]; ok {
			if _, present := cert.ExtensionsMap[id]; !present {
				continue
			}
		}
		r := one.Execute(cert, l.config)
		if r.Status != lint.Error && r.Status != lint.Warn && r.Status != lint.Fatal {
			continue
		}
		if _, excepted := exceptions[one.Name]; excepted && r.Status != lint.Fatal {
			continue
		}
		found = append(found, Finding{Rule: one.Name, Detail: clip(r.Details)})
	}
	return found
}

// The throw-away signatures on the copies to be linted: one per algorithm, for
// the life of the process, over a random digest and by a key that is forgotten
// at once. It has the form of a real one, and no lint looks further; nobody's
// key verifies it on a copy, and a copy that escapes is worth nothing.
var (
	throwaway256 = sync.OnceValues(func() ([]byte, error) { return throwaway(ecdsaSHA256) })
	throwaway384 = sync.OnceValues(func() ([]byte, error) { return throwaway(ecdsaSHA384) })
)

// throwaway signs a random digest with a new key.
func throwaway(alg *algorithm) ([]byte, error) {
	key, err := ecdsa.GenerateKey(alg.curve, rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate throw-away key: %w", err)
	}
	digest := make([]byte, alg.hash.Size())
	if _, err := rand.Read(digest); err != nil {
		return nil, fmt.Errorf("draw digest: %w", err)
	}
	signature, err := ecdsa.SignASN1(rand.Reader, key, digest)
	if err != nil {
		return nil, fmt.Errorf("sign with throw-away key: %w", err)
	}
	return signature, nil
}

// throwawaySign puts the process's throw-away signature for alg on tbs.
func throwawaySign(tbs []byte, alg *algorithm) ([]byte, error) {
	source := throwaway256
	if alg == ecdsaSHA384 {
		source = throwaway384
	}
	signature, err := source()
	if err != nil {
		return nil, err
	}
	return assemble(tbs, alg, signature)
}

// lintCopy puts the throw-away signature on tbs and lints the result.
func lintCopy(tbs []byte, alg *algorithm, c *candidate) error {
	der, err := throwawaySign(tbs, alg)
	if err != nil {
		return err
	}
	c.algorithm = alg
	return lintDER(der, c)
}

// lintDER runs the registry and our rules on a certificate, in that order. A
// certificate that one of the two parsers refuses fails the rule
// chancery_parse.
func lintDER(der []byte, c *candidate) error {
	l, err := registry()
	if err != nil {
		return err
	}
	zcert, err := zx509.ParseCertificate(der)
	if err != nil {
		return &LintError{Findings: []Finding{{Rule: "chancery_parse", Detail: clip(err.Error())}}}
	}
	if c.cert, err = x509.ParseCertificate(der); err != nil {
		return &LintError{Findings: []Finding{{Rule: "chancery_parse", Detail: clip(err.Error())}}}
	}
	// The parser calls a certificate self-signed when its own key verifies it.
	// A throw-away copy of a root is not, but it is to be linted as one;
	// chancery_issuer_name and chancery_aki hold it to that.
	zcert.SelfSigned = c.issuer == nil
	found := append(l.run(zcert), c.check()...)
	if len(found) > 0 {
		return &LintError{Findings: found}
	}
	return nil
}

// CheckAuthority runs every lint and rule on a certificate of the hierarchy
// that exists already (imported, or read back by a verifier) and verifies its
// signature: with issuer's key, or its own for the self-signed kinds (issuer
// nil). Errors: ErrSpec (kind and issuer do not fit), ErrIssuer, ErrWindow,
// ErrLint.
func CheckAuthority(kind Kind, cert, issuer *x509.Certificate) error {
	selfSigned := kind == Root || kind == TSARoot
	if selfSigned != (issuer == nil) || (!selfSigned && kind != Intermediate && kind != TSA) {
		return fmt.Errorf("%w: kind %.40q and issuer do not fit", ErrSpec, kind)
	}
	signer := cert
	if issuer != nil {
		signer = issuer
		if err := checkIssuer(kind, issuer); err != nil {
			return err
		}
		if err := checkWindow(cert.NotBefore, cert.NotAfter, issuer); err != nil {
			return err
		}
	}
	alg, err := algorithmOf(signer.PublicKey)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrIssuer, err)
	}
	if err := signer.CheckSignature(alg.x509, cert.RawTBSCertificate, cert.Signature); err != nil {
		return fmt.Errorf("%w: %w", ErrIssuer, err)
	}
	return lintDER(cert.Raw, &candidate{kind: kind, issuer: issuer, algorithm: alg})
}

// CheckLeaf runs every lint and rule on a final leaf certificate that exists
// already and verifies its signature with the issuer's key. It does not verify
// the SCT's signature. Errors: ErrIssuer, ErrWindow, ErrLint.
func (i *Issuer) CheckLeaf(cert *x509.Certificate) error {
	if err := i.cert.CheckSignature(i.algorithm.x509, cert.RawTBSCertificate, cert.Signature); err != nil {
		return fmt.Errorf("%w: %w", ErrIssuer, err)
	}
	if err := checkWindow(cert.NotBefore, cert.NotAfter, i.cert); err != nil {
		return err
	}
	return lintDER(cert.Raw, &candidate{kind: leaf, form: formFinal, issuer: i.cert, algorithm: i.algorithm})
}

// clip bounds what a finding quotes.
func clip(s string) string {
	if len(s) > 200 {
		return strings.ToValidUTF8(s[:200], "") + "…"
	}
	return s
}
