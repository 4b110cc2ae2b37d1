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
	key       crypto.PublicKey // of the log here
	elsewhere ca.Submitter
	keys      []crypto.PublicKey // of the logs elsewhere
}

// certificateLog joins the authority to our log, or to the configured logs
// elsewhere when ours is nil.
func (s *Service) certificateLog(ours *ct.Log) (certificateLog, error) {
	if ours != nil {
		return certificateLog{here: sctSource{ours}, key: s.keys[hsm.RoleCT].Public()}, nil
	}
	var logs []*ctlog.Log
	for _, where := range append([]config.LogElsewhere{s.cfg.CT.LogElsewhere}, s.cfg.CT.Others...) {
		log, err := s.logElsewhere(where)
		if err != nil {
			return certificateLog{}, err
		}
		logs = append(logs, log)
	}
	group, err := ctlog.NewGroup(logs...)
	if err != nil {
		return certificateLog{}, err
	}
	s.elsewhere = group
	return certificateLog{elsewhere: group, keys: group.Keys()}, nil
}

func (s *Service) logElsewhere(where config.LogElsewhere) (*ctlog.Log, error) {
	key, err := readPublicKey(where.Key)
	if err != nil {
		return nil, err
	}
	cfg := ctlog.Config{URL: where.URL, Key: key, Now: s.clock.Now}
	if where.TLSRoots != "" {
		roots, err := readChain(where.TLSRoots)
		if err != nil {
			return nil, err
		}
		cfg.Roots = x509.NewCertPool()
		for _, root := range roots {
			cfg.Roots.AddCert(root)
		}
	}
	return ctlog.New(cfg)
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
