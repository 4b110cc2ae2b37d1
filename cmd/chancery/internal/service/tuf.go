package service

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/labstack/echo/v4"

	"github.com/chancery-ca/chancery/ceremony/trust/tuf"
	"github.com/chancery-ca/chancery/hsm"
)

// tufName is the folder of the TUF repository below the trust folder, of its
// online part below the state folder, and the path under which it is served.
const tufName = "tuf"

// openTUF serves the TUF repository of the trust folder, if there is one, with
// a timestamp that the tuf-online key signs.
func (s *Service) openTUF(ctx context.Context) error {
	dir := filepath.Join(s.cfg.Trust, tufName)
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	repo, err := tuf.Load(dir)
	if err != nil {
		return fmt.Errorf("open TUF repository %s: %w", dir, err)
	}
	key, ok := s.keys[hsm.RoleTUFOnline]
	if !ok {
		return fmt.Errorf("open TUF repository %s: keys.yaml has no %s key to refresh it", dir, hsm.RoleTUFOnline)
	}
	s.tuf, err = tuf.OpenMirror(ctx, tuf.MirrorConfig{
		Repository: repo, State: filepath.Join(s.cfg.State, tufName), Key: key, Now: s.clock.Now, Logger: s.log,
	})
	if err != nil {
		return err
	}
	registerTUF(s.echo.Group("/"+tufName), s.tuf)
	return nil
}

// registerTUF adds the reading of a repository to g. It reads memory only: what
// is not a file of the repository (the next root, above all, for which every
// client asks) does not exist, whatever is on disk.
func registerTUF(g *echo.Group, mirror *tuf.Mirror) {
	serve := func(c echo.Context) error { return serveTUF(c, mirror, c.Param("*")) }
	g.GET("/*", serve)
	g.HEAD("/*", serve)
}

func serveTUF(c echo.Context, mirror *tuf.Mirror, name string) error {
	header := c.Response().Header()
	content, changes, ok := mirror.File(name)
	if !ok {
		header.Set("Cache-Control", "no-cache") // the next root may come
		return echo.ErrNotFound
	}
	header.Set("Cache-Control", "public, max-age=31536000, immutable")
	if changes {
		header.Set("Cache-Control", "no-cache")
	}
	header.Set("Content-Type", "application/octet-stream")
	if strings.HasSuffix(name, ".json") {
		header.Set("Content-Type", "application/json")
	}
	header.Set("X-Content-Type-Options", "nosniff")
	hash := sha256.Sum256(content)
	header.Set("ETag", `"`+hex.EncodeToString(hash[:16])+`"`)
	http.ServeContent(c.Response(), c.Request(), "", time.Time{}, bytes.NewReader(content))
	return nil
}
