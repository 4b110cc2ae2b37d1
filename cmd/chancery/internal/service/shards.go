package service

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"strings"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/ct"
	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/rekor"
	"github.com/chancery-ca/chancery/log/tree"
)

// serveFrozen serves the frozen shards whose trees are in the state folder. One
// that is not there is somebody else's to serve; one that does not verify is not
// shown, and is a warning: it must not keep the current shard from working.
func (s *Service) serveFrozen(ctx context.Context, roots []*x509.Certificate) error {
	current := map[hsm.Role]crypto.PublicKey{}
	for role, key := range s.keys {
		current[role] = key.Public()
	}
	shards, err := FrozenLogs(s.cfg, current)
	if err != nil {
		return err
	}
	for _, shard := range shards {
		err := s.serveShard(ctx, shard, roots)
		switch {
		case errors.Is(err, tree.ErrNotFound):
			s.log.Warn("a frozen shard of the trusted root is not in the state folder and is not served", "log", shard.Name)
		case err != nil:
			s.log.Error("a frozen shard does not verify and is not served", "log", shard.Name, "err", err)
			s.unreadable = append(s.unreadable, shard.Name)
		default:
			s.log.Info("serving a frozen shard", "log", shard.Name)
		}
	}
	return nil
}

func (s *Service) serveShard(ctx context.Context, shard FrozenLog, roots []*x509.Certificate) error {
	t, err := s.engine.Tree(ctx, shard.Name)
	if err != nil {
		return err
	}
	var origin string
	heads, err := head.OpenFrozen(ctx, t, shard.Anchor, shard.Key, func(of string) (head.Format, error) {
		origin = of
		if shard.Role == hsm.RoleCT {
			return ct.NewFormat(of, shard.Key)
		}
		return rekor.NewFormat(of, shard.Key)
	})
	if err == nil {
		err = shard.CheckEnd(heads.Latest().Head)
	}
	if err != nil {
		return err
	}
	if shard.Role == hsm.RoleCT {
		log, err := ct.New(ct.Config{Tree: t, Heads: heads, Frozen: shard.Key, Roots: roots, Origin: origin, Now: s.clock.Now, Logger: s.log})
		if err != nil {
			return err
		}
		log.Register(s.echo.Group("/" + shard.Path))
		return nil
	}
	log, err := rekor.New(rekor.Config{Tree: t, Heads: heads, Origin: origin, PublicKey: shard.Key, Frozen: true, Now: s.clock.Now, Logger: s.log})
	if err != nil {
		return err
	}
	log.Register(s.echo.Group(strings.TrimSuffix("/"+shard.Path, "/api/v2")))
	return nil
}
