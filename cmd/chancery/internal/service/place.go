package service

import (
	"crypto"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/config"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/tree"
)

// LogPlace says where a log lives, for tools that work on its files.
type LogPlace struct {
	// Name is that of its tree and its anchor.
	Name string
	// Role is hsm.RoleCT or hsm.RoleRekor: the kind, and the key.
	Role hsm.Role
	// Origin is the first line of its checkpoints.
	Origin string
	// Dir is the data directory, which all logs share; Anchor the file.
	Dir, Anchor string
	// Path is below which the service serves its tiles, without slashes at the
	// ends.
	Path string
	// Counter is the NV counter that its anchor is bound to, nil for none.
	Counter *config.Counter
}

// LogPlaces returns the logs that the configuration names.
func LogPlaces(cfg *config.Config) []LogPlace {
	ct, rekor := place(cfg, hsm.RoleCT, cfg.CT.Shard), place(cfg, hsm.RoleRekor, cfg.Rekor.Shard)
	ct.Origin, ct.Counter = cfg.CT.Origin, cfg.CT.Counter
	rekor.Origin, rekor.Counter = cfg.Rekor.Origin, cfg.Rekor.Counter
	switch {
	case cfg.Only == config.OnlyCT:
		return []LogPlace{ct}
	case cfg.CT.Elsewhere():
		return []LogPlace{rekor}
	}
	return []LogPlace{ct, rekor}
}

// place is where a shard lives, whatever its origin and counter are.
func place(cfg *config.Config, role hsm.Role, shard string) LogPlace {
	p := LogPlace{Role: role, Dir: logDir(cfg), Path: "ct/" + shard}
	p.Name = treeName(string(role), config.Log{Shard: shard})
	p.Anchor = anchorPath(cfg, p.Name)
	if role == hsm.RoleRekor {
		p.Path = "log/" + shard + "/api/v2"
	}
	return p
}

// FrozenLog is a shard of a log of this service that the trusted root names
// and that has a successor: it is read, under its own path, and takes no entry.
// Its key is gone from keys.yaml, so what it shows ends with its anchored head.
type FrozenLog struct {
	// LogPlace has no Origin, which is that of the anchored head, and no Counter:
	// no configuration names them any more. Nor need the files be there.
	LogPlace
	Key *ecdsa.PublicKey
	// Record is where the ceremony that made the successor put the last head.
	// There is none if the ceremony was given none.
	Record string
}

// ErrEnd: a frozen log does not end with the head on record.
var ErrEnd = errors.New("frozen log does not end with the head on record")

// CheckEnd holds the anchored head against the one on record, if there is one.
// Anchor and tree prove each other; that both are the last ones, and not a copy
// of before, only a record elsewhere can say. Errors: ErrEnd, also for a record
// that is not one of this log.
func (l FrozenLog) CheckEnd(h head.Head) error {
	content, err := readAtMost(l.Record, trust.MaxLastHead)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrEnd, err)
	}
	last, err := trust.ParseLastHead(l.Key, content)
	switch {
	case err != nil:
		err = fmt.Errorf("%s: %w", l.Record, err)
	case h.Size < last.Size:
		err = fmt.Errorf("the anchored head has %d leaves, the one on record (%s) %d: an old anchor and database were put back", h.Size, l.Record, last.Size)
	case h.Size > last.Size:
		err = fmt.Errorf("the anchored head has %d leaves, the one on record (%s) %d: the log went on after its end was recorded", h.Size, l.Record, last.Size)
	case h.Root != last.Root:
		err = fmt.Errorf("the anchored head of %d leaves has the root %x, the one on record (%s) %x", h.Size, h.Root, l.Record, last.Root)
	default:
		return nil
	}
	return fmt.Errorf("%w: %w", ErrEnd, err)
}

// FrozenLogs returns the shards of the trust folder's trusted root that are
// this service's by their URL and not the current ones by their key.
func FrozenLogs(cfg *config.Config, current map[hsm.Role]crypto.PublicKey) ([]FrozenLog, error) {
	data, err := os.ReadFile(filepath.Join(cfg.Trust, "trusted_root.json"))
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
	var frozen []FrozenLog
	for _, of := range []struct {
		role hsm.Role
		path string
		logs []trust.Log
	}{{hsm.RoleRekor, "/log/", trusted.Logs}, {hsm.RoleCT, "/ct/", trusted.CTLogs}} {
		for _, l := range of.logs {
			shard, ours := strings.CutPrefix(l.BaseURL, cfg.URL+of.path)
			p := place(cfg, of.role, shard)
			if ours && tree.CheckName(p.Name) == nil && !l.PublicKey.Equal(current[of.role]) {
				spki, err := hsm.SPKIHash(l.PublicKey)
				if err != nil {
					return nil, fmt.Errorf("key of log %s: %w", p.Name, err)
				}
				record := filepath.Join(cfg.Trust, filepath.FromSlash(trust.LastHeadName(spki)))
				frozen = append(frozen, FrozenLog{p, l.PublicKey, record})
			}
		}
	}
	return frozen, nil
}
