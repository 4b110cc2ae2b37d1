package service

import (
	"context"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/config"
	"github.com/chancery-ca/chancery/hsm"
)

// onlineRoles are the keys that the service signs with. The roots stay where
// the ceremony left them. The key for the TUF repository is one of them if the
// ceremony made it.
func onlineRoles(cfg *config.Config, ring *trust.KeyRing) []hsm.Role {
	if cfg.Only == config.OnlyCT {
		return []hsm.Role{hsm.RoleCT}
	}
	roles := []hsm.Role{hsm.RoleIntermediate, hsm.RoleRekor, hsm.RoleTSA}
	if !cfg.CT.Elsewhere() {
		roles = append(roles, hsm.RoleCT)
	}
	if _, ok := ring.Keys[hsm.RoleTUFOnline]; ok {
		roles = append(roles, hsm.RoleTUFOnline)
	}
	return roles
}

// maxChain bounds a certificate file, in octets.
const maxChain = 1 << 20

// openKeys logs in to the tokens that hold an online key, each once, and opens
// the keys by URI and public key.
func (s *Service) openKeys(ctx context.Context) error {
	ring, err := LoadRing(s.cfg)
	if err != nil {
		return err
	}
	for _, role := range onlineRoles(s.cfg, ring) {
		key := ring.Keys[role]
		token, err := s.openToken(ctx, key.Token, ring.Tokens[key.Token])
		if err != nil {
			return fmt.Errorf("open token %q: %w", key.Token, err)
		}
		if s.keys[role], err = openKey(ctx, token, role, key.Ref()); err != nil {
			return fmt.Errorf("open %s key: %w", role, err)
		}
	}
	return nil
}

// openKey opens a key for its role, by which the token holds its attributes
// against the policy, and sees it sign once.
func openKey(ctx context.Context, token hsm.Token, role hsm.Role, ref hsm.Ref) (hsm.Key, error) {
	key, err := token.Open(ctx, ref, role)
	if err != nil {
		return nil, err
	}
	if _, err := hsm.Prove(ctx, key, time.Now()); err != nil {
		return nil, err
	}
	return key, nil
}

func (s *Service) openToken(ctx context.Context, name string, where trust.Token) (hsm.Token, error) {
	if token, ok := s.tokens[name]; ok {
		return token, nil
	}
	how, ok := s.cfg.Tokens[name]
	if !ok {
		return nil, errors.New("the configuration has no PIN for it (tokens)")
	}
	token, err := OpenToken(ctx, where, how, s.log)
	if err != nil {
		return nil, err
	}
	s.tokens[name] = token
	return token, nil
}

// readChain reads the certificates of a PEM file, first to last.
func readChain(path string) ([]*x509.Certificate, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read certificates: %w", err)
	}
	defer f.Close()
	rest, err := io.ReadAll(io.LimitReader(f, maxChain))
	if err != nil {
		return nil, fmt.Errorf("read certificates: %w", err)
	}
	var chain []*x509.Certificate
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("read certificates %s: a %s block in it", path, block.Type)
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("read certificates %s: %w", path, err)
		}
		chain = append(chain, certificate)
	}
	if len(chain) == 0 {
		return nil, fmt.Errorf("read certificates %s: none in it", path)
	}
	return chain, nil
}

// asn1OID converts an object identifier to the form that encoding/asn1 uses.
func asn1OID(id x509.OID) (asn1.ObjectIdentifier, error) {
	der, err := id.MarshalBinary()
	if err != nil {
		return nil, err
	}
	var out asn1.ObjectIdentifier
	_, err = asn1.Unmarshal(append([]byte{asn1.TagOID, byte(len(der))}, der...), &out)
	return out, err
}
