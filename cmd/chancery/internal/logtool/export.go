package logtool

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/chancery-ca/chancery/cmd/chancery/internal/whole"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/ct"
	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/rekor"
	"github.com/chancery-ca/chancery/log/tree"
)

// Export writes the logs, each as of its anchored head, into a new folder that
// any web server can serve: below it the very paths of the service, C2SP
// tlog-tiles for the signature log and the layout of static-ct-api for CT
// (checkpoint, tile/…, and issuer/… for CT). Every leaf and tile is proven to
// belong to the head on the way. The folder is whole or not there. Of several
// logs those that are Absent are passed over. Errors: os.ErrExist, ErrNotProven,
// ErrFrozen, ErrDamaged.
func Export(ctx context.Context, logs []Log, dir string, p Progress) ([]Status, error) {
	var list []Status
	err := whole.Folder(dir, 0o755, func(tmp string) error {
		for _, l := range logs {
			s, err := l.export(ctx, filepath.Join(tmp, filepath.FromSlash(l.Path)), p)
			absent := s != nil && s.State == Absent
			if err != nil && (!absent || len(logs) == 1) {
				return fmt.Errorf("export log %s: %w", l.Name, err)
			}
			list = append(list, *s)
		}
		return nil
	})
	return list, err
}

func (l Log) export(ctx context.Context, dir string, p Progress) (s *Status, err error) {
	anchor, anchorErr := head.ReadAnchor(l.Anchor)
	f, err := openFiles(l.Dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if s, err = l.check(ctx, f, anchor, anchorErr); err != nil {
		return nil, err
	}
	switch {
	case s.State == Absent:
		return s, fmt.Errorf("%s: %w", s.Reason, ErrNoLog)
	case s.Err() != nil:
		return nil, s.Err()
	case s.State != Consistent && s.State != Frozen:
		return nil, fmt.Errorf("%s: %w", s.Reason, ErrNotProven)
	case s.Head == nil:
		return nil, fmt.Errorf("no head was signed yet: %w", ErrNotProven)
	}
	out := &folder{dir: dir, role: l.Role, issuers: map[[32]byte]bool{}}
	root, err := l.walk(ctx, f, s, s.Head.Size, 0, out, p)
	if err != nil {
		return nil, err
	}
	if root != tree.Hash(s.Head.Root) {
		return nil, fmt.Errorf("root: the tiles give %x, the head has %s: %w", root, s.Head.Root, ErrDamaged)
	}
	return s, writeFile(filepath.Join(dir, "checkpoint"), anchor.Record.Note, 0o644)
}

// folder is a sink that writes C2SP paths.
type folder struct {
	dir     string
	role    hsm.Role
	issuers map[[32]byte]bool // those written
}

// tile implements sink.
func (f *folder) tile(level, index uint64, hashes []byte) error {
	path := tlog.Tile{H: 8, L: int(level), N: int64(index), W: len(hashes) / tree.HashSize}.Path()
	return f.write(strings.Replace(path, "tile/8/", "tile/", 1), hashes)
}

// entries implements sink.
func (f *folder) entries(index uint64, entries []tree.Entry) error {
	path := tlog.Tile{H: 8, L: -1, N: int64(index), W: len(entries)}.Path()
	path = strings.Replace(path, "tile/8/", "tile/", 1)
	if f.role == hsm.RoleRekor {
		bundle, err := rekor.Bundle(entries)
		if err != nil {
			return err
		}
		return f.write(strings.Replace(path, "tile/data/", "tile/entries/", 1), bundle)
	}
	var failed error
	bundle, err := ct.Bundle(entries, func(der []byte) { failed = errors.Join(failed, f.issuer(der)) })
	if err = errors.Join(err, failed); err != nil {
		return err
	}
	return f.write(path, bundle)
}

func (f *folder) issuer(der []byte) error {
	sum := sha256.Sum256(der)
	if f.issuers[sum] {
		return nil
	}
	f.issuers[sum] = true
	return f.write("issuer/"+hex.EncodeToString(sum[:]), der)
}

func (f *folder) write(path string, data []byte) error {
	return writeFile(filepath.Join(f.dir, filepath.FromSlash(path)), data, 0o644)
}

// writeFile writes a new file and the folders above it.
func writeFile(path string, data []byte, perm os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return fmt.Errorf("write: %w", err)
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
