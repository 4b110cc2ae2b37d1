package service

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"

	"github.com/chancery-ca/chancery/ca"
	"github.com/chancery-ca/chancery/ca/ctlog"
	"github.com/chancery-ca/chancery/config"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/ct"
)

// certificateLog is the CT log of the certificate authority: here or elsewhere.
type certificateLog struct {
	here      ca.SCTSource
	elsewhere ca.Submitter
	key       crypto.PublicKey // with which its SCTs verify
}

// certificateLog joins the authority to our log, or to the configured log
// elsewhere when ours is nil.
func (s *Service) certificateLog(ours *ct.Log) (certificateLog, error) {
	if ours != nil {
		return certificateLog{here: sctSource{ours}, key: s.keys[hsm.RoleCT].Public()}, nil
	}
	key, err := readPublicKey(s.cfg.CT.Key)
	if err != nil {
		return certificateLog{}, err
	}
	cfg := ctlog.Config{URL: s.cfg.CT.URL, Key: key, Now: s.clock.Now}
	if s.cfg.CT.TLSRoots != "" {
		roots, err := readChain(s.cfg.CT.TLSRoots)
		if err != nil {
			return certificateLog{}, err
		}
		cfg.Roots = x509.NewCertPool()
		for _, root := range roots {
			cfg.Roots.AddCert(root)
		}
	}
	if s.elsewhere, err = ctlog.New(cfg); err != nil {
		return certificateLog{}, err
	}
	return certificateLog{elsewhere: s.elsewhere, key: key}, nil
}

// readPublicKey reads a PEM file that holds one PKIX public key.
func readPublicKey(path string) (crypto.PublicKey, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read public key: %w", err)
	}
	block, rest := pem.Decode(raw)
	if block == nil || block.Type != "PUBLIC KEY" || len(rest) > 0 {
		return nil, fmt.Errorf("read public key %s: want one PUBLIC KEY block and nothing else", path)
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read public key %s: %w", path, err)
	}
	return key, nil
}

// Logs names the shards of the logs that Create makes.
func Logs(cfg *config.Config) []string {
	switch {
	case cfg.Only == config.OnlyCT:
		return []string{cfg.CT.Shard}
	case cfg.CT.Elsewhere():
		return []string{cfg.Rekor.Shard}
	}
	return []string{cfg.CT.Shard, cfg.Rekor.Shard}
}
