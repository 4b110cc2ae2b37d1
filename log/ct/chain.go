package ct

import (
	"crypto/dsa" //nolint:staticcheck // old certificates have such keys; none is made or trusted here
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"

	ct "github.com/google/certificate-transparency-go"
	"github.com/google/certificate-transparency-go/asn1"
	ctx509 "github.com/google/certificate-transparency-go/x509"
)

// submission is a chain that passed every check.
type submission struct {
	entry *ct.TimestampedEntry // without a timestamp
	cert  []byte               // the certificate or precertificate
	chain [][]byte             // issuer first, the accepted root last
}

// badChain is a refusal that is safe to show.
type badChain string

func (e badChain) Error() string { return string(e) }

// parseBody reads the JSON of add-chain and add-pre-chain (RFC 6962, Section
// 4.1): an object with a list of base64 DER certificates.
func parseBody(body []byte) ([][]byte, error) {
	var req ct.AddChainRequest
	if err := json.Unmarshal(body, &req); err != nil {
		return nil, badChain("the body is not a JSON object with a \"chain\" of base64 certificates")
	}
	switch {
	case len(req.Chain) == 0:
		return nil, badChain("the chain is empty")
	case len(req.Chain) > maxChain:
		return nil, badChain(fmt.Sprintf("the chain has %d certificates; at most %d are accepted", len(req.Chain), maxChain))
	}
	return req.Chain, nil
}

// check reads a chain, finds its way to an accepted root through exactly the
// certificates submitted, and builds the entry to log.
func (l *Log) check(raw [][]byte, kind ct.LogEntryType) (*submission, error) {
	path, err := l.verify(raw)
	if err != nil {
		return nil, err
	}
	poisoned, err := precertificate(path[0])
	if err != nil {
		return nil, err
	}
	switch {
	case kind == ct.PrecertLogEntryType && !poisoned:
		return nil, badChain("the certificate has no poison extension: not a precertificate")
	case kind == ct.X509LogEntryType && poisoned:
		return nil, badChain("the certificate is a precertificate: use add-pre-chain")
	}
	leaf, err := ct.MerkleTreeLeafFromChain(path, kind, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", badChain("the precertificate cannot be turned into a log entry"), err)
	}
	s := &submission{entry: leaf.TimestampedEntry, cert: path[0].Raw}
	for _, cert := range path[1:] {
		s.chain = append(s.chain, cert.Raw)
	}
	return s, nil
}

// verify parses the chain and returns the path to an accepted root that uses
// all of it in the order of submission (RFC 6962, Section 3.1).
func (l *Log) verify(raw [][]byte) ([]*ctx509.Certificate, error) {
	chain := make([]*ctx509.Certificate, len(raw))
	intermediates := ctx509.NewCertPool()
	for i, der := range raw {
		cert, err := ctx509.ParseCertificate(der)
		if ctx509.IsFatal(err) {
			return nil, fmt.Errorf("%w: %w", badChain(fmt.Sprintf("certificate %d of the chain is not DER X.509", i)), err)
		}
		if large(cert.PublicKey) {
			return nil, badChain(fmt.Sprintf("certificate %d of the chain has an RSA key above %d bits, or a DSA key above %d and %d", i, maxRSABits, maxDSABits, maxDSASubgroupBits))
		}
		chain[i] = cert
		if i > 0 {
			intermediates.AddCert(cert)
		}
	}
	if !l.usable(chain[0]) {
		return nil, badChain("the certificate has none of the extended key usages that this log accepts")
	}
	// A log observes certificates: only signatures and names count (as ctfe).
	paths, err := chain[0].Verify(ctx509.VerifyOptions{
		Roots:                          l.roots.CertPool(),
		Intermediates:                  intermediates,
		DisableTimeChecks:              true,
		DisableCriticalExtensionChecks: true,
		DisableEKUChecks:               true,
		DisablePathLenChecks:           true,
		DisableNameConstraintChecks:    true,
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", badChain("the chain does not lead to an accepted root"), err)
	}
	for _, path := range paths {
		if uses(path, chain) {
			return path, nil
		}
	}
	return nil, badChain("the chain does not lead to an accepted root in the order submitted")
}

// large says whether a signature by the key would take long to verify. A chain
// names keys before it leads anywhere.
func large(key any) bool {
	switch key := key.(type) {
	case *rsa.PublicKey:
		return key.N.BitLen() > maxRSABits
	case *dsa.PublicKey:
		return key.P.BitLen() > maxDSABits || key.Q.BitLen() > maxDSASubgroupBits
	}
	return false
}

// usable says whether cert has an extended key usage that the log accepts.
func (l *Log) usable(cert *ctx509.Certificate) bool {
	if len(l.ekus) == 0 {
		return true
	}
	for _, have := range cert.ExtKeyUsage {
		for _, want := range l.ekus {
			if have == want {
				return true
			}
		}
	}
	return false
}

// uses says whether path is chain, with or without its root.
func uses(path, chain []*ctx509.Certificate) bool {
	if len(path) != len(chain) && len(path) != len(chain)+1 {
		return false
	}
	for i, cert := range chain {
		if !cert.Equal(path[i]) {
			return false
		}
	}
	return true
}

// precertificate says whether cert has the poison extension, which must be
// critical and hold an ASN.1 NULL (RFC 6962, Section 3.1), and be there once.
func precertificate(cert *ctx509.Certificate) (bool, error) {
	found := false
	for _, ext := range cert.Extensions {
		if !ctx509.OIDExtensionCTPoison.Equal(ext.Id) {
			continue
		}
		if found {
			return false, badChain("the precertificate has two poison extensions")
		}
		if !ext.Critical || string(ext.Value) != string(asn1.NullBytes) {
			return false, badChain("the poison extension is not a critical NULL")
		}
		found = true
	}
	return found, nil
}

// publicReason is the part of err that is safe to show.
func publicReason(err error) string {
	var bad badChain
	if errors.As(err, &bad) {
		return string(bad)
	}
	return "the chain was refused"
}
