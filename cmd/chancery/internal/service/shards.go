package service

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/ct"
	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/rekor"
	"github.com/chancery-ca/chancery/log/tree"
)

// frozenShard is a shard of a log of this service that the trusted root names
// and that has a successor: it is read, under its own path, and takes no entry.
// Its key is gone from keys.yaml, so what it shows ends with its anchored head.
type frozenShard struct {
	role hsm.Role
	path string // below the service's URL: /log/SHARD or /ct/SHARD
	name string // of its tree and its anchor
	key  *ecdsa.PublicKey
}

// frozenShards returns the shards of the trust folder's trusted root that are
// this service's by their URL and not the current ones by their key.
func (s *Service) frozenShards() ([]frozenShard, error) {
	data, err := os.ReadFile(filepath.Join(s.cfg.Trust, "trusted_root.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // a trust folder of a CT log alone needs none
	}
	if err != nil {
		return nil, fmt.Errorf("read trusted root: %w", err)
	}
	trusted, err := trust.ParseRoot(data)
	if err != nil {
		return nil, err
	}
	var shards []frozenShard
	for _, of := range []struct {
		role       hsm.Role
		path, kind string
		logs       []trust.Log
	}{{hsm.RoleRekor, "/log/", "rekor", trusted.Logs}, {hsm.RoleCT, "/ct/", "ct", trusted.CTLogs}} {
		for _, l := range of.logs {
			shard, ours := strings.CutPrefix(l.BaseURL, s.cfg.URL+of.path)
			if current := s.keys[of.role]; !ours || tree.CheckName(of.kind+"-"+shard) != nil || current != nil && l.PublicKey.Equal(current.Public()) {
				continue
			}
			shards = append(shards, frozenShard{of.role, of.path + shard, of.kind + "-" + shard, l.PublicKey})
		}
	}
	return shards, nil
}

// serveFrozen serves the frozen shards whose trees are in the state folder. One
// that is not there is somebody else's to serve; one that does not verify is not
// shown, and is a warning: it must not keep the current shard from working.
func (s *Service) serveFrozen(ctx context.Context, roots []*x509.Certificate) error {
	shards, err := s.frozenShards()
	if err != nil {
		return err
	}
	for _, shard := range shards {
		err := s.serveShard(ctx, shard, roots)
		switch {
		case errors.Is(err, tree.ErrNotFound):
			s.log.Warn("a frozen shard of the trusted root is not in the state folder and is not served", "log", shard.name)
		case err != nil:
			s.log.Error("a frozen shard does not verify and is not served", "log", shard.name, "err", err)
			s.unreadable = append(s.unreadable, shard.name)
		default:
			s.log.Info("serving a frozen shard", "log", shard.name)
		}
	}
	return nil
}

func (s *Service) serveShard(ctx context.Context, shard frozenShard, roots []*x509.Certificate) error {
	t, err := s.engine.Tree(ctx, shard.name)
	if err != nil {
		return err
	}
	var origin string
	heads, err := head.OpenFrozen(ctx, t, anchorPath(s.cfg, shard.name), shard.key, func(of string) (head.Format, error) {
		origin = of
		if shard.role == hsm.RoleCT {
			return ct.NewFormat(of, shard.key)
		}
		return rekor.NewFormat(of, shard.key)
	})
	if err != nil {
		return err
	}
	if shard.role == hsm.RoleCT {
		log, err := ct.New(ct.Config{Tree: t, Heads: heads, Frozen: shard.key, Roots: roots, Origin: origin, Now: s.clock.Now, Logger: s.log})
		if err != nil {
			return err
		}
		log.Register(s.echo.Group(shard.path))
		return nil
	}
	log, err := rekor.New(rekor.Config{Tree: t, Heads: heads, Origin: origin, PublicKey: shard.key, Frozen: true, Now: s.clock.Now, Logger: s.log})
	if err != nil {
		return err
	}
	log.Register(s.echo.Group(shard.path))
	return nil
}
