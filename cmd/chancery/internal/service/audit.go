package service

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/sigstore/timestamp-authority/v2/pkg/verification"

	"github.com/chancery-ca/chancery/ca/audit"
	"github.com/chancery-ca/chancery/ca/tsa"
	"github.com/chancery-ca/chancery/config"
)

// HasAudit says whether a service of this configuration keeps an audit: a CT log
// alone decides nothing.
func HasAudit(cfg *config.Config) bool { return cfg.Only != config.OnlyCT }

// AuditDir is the folder of the audit.
func AuditDir(cfg *config.Config) string { return filepath.Join(cfg.State, "audit") }

// maxSeals bounds a file of seals, in octets: a line for each day.
const maxSeals = 64 << 20

// openAudit opens the audit, which timestamps seals.
func (s *Service) openAudit(timestamps *tsa.Authority) (err error) {
	s.audit, err = audit.Open(audit.Config{
		Dir: AuditDir(s.cfg), Now: s.clock.Now, Sealer: sealer{timestamps}, Logger: s.log,
	})
	return err
}

// sealer is the timestamp authority as the audit needs it.
type sealer struct{ authority *tsa.Authority }

// Timestamp implements audit.Sealer.
func (s sealer) Timestamp(ctx context.Context, digest [sha256.Size]byte) ([]byte, error) {
	return s.authority.Timestamp(ctx, &tsa.Request{Hash: crypto.SHA256, Digest: digest[:], Certificates: true})
}

// VerifyAudit follows the whole audit in dir, that of a configuration or a copy of
// it, also beside a running service, verifies every seal with the ceremony's TSA
// chain, and gives each record to visit. seals names files of seals that were
// kept elsewhere, beside the audit's own; a record that one covers must be
// there. Errors: audit.ErrDamaged.
func VerifyAudit(cfg *config.Config, dir string, seals []string, visit func(audit.Record) error) (audit.Report, error) {
	chain, err := readChain(filepath.Join(cfg.Trust, "tsa-chain.pem"))
	if err != nil {
		return audit.Report{}, err
	}
	own := filepath.Join(dir, audit.SealsName)
	if _, err := os.Stat(own); err == nil {
		seals = append([]string{own}, seals...)
	}
	var kept []audit.Record
	for _, name := range seals {
		text, err := readAtMost(name, maxSeals)
		if err != nil {
			return audit.Report{}, fmt.Errorf("read seals: %w", err)
		}
		more, err := audit.ReadSeals(text)
		if err != nil {
			return audit.Report{}, fmt.Errorf("%s: %w", name, err)
		}
		kept = append(kept, more...)
	}
	return audit.Verify(dir, func(seal, line []byte) error { return checkSeal(chain, seal, line) }, kept, visit)
}

// checkSeal verifies a timestamp of a line with the TSA's chain, leaf first.
func checkSeal(chain []*x509.Certificate, seal, line []byte) error {
	last := len(chain) - 1
	_, err := verification.VerifyTimestampResponse(seal, bytes.NewReader(line), verification.VerifyOpts{
		TSACertificate: chain[0], Intermediates: chain[1:last], Roots: chain[last:],
	})
	return err
}

// maxIssuerFile bounds a file of an issuer's keys, in octets.
const maxIssuerFile = 256 << 10

// readBounded is identity.Options.ReadFile.
func readBounded(path string) ([]byte, error) { return readAtMost(path, maxIssuerFile) }

var errTooLarge = errors.New("file is too large")

func readAtMost(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(text)) > most {
		err = errTooLarge
	}
	return text, err
}
