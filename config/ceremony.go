package config

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/hsm"
)

// What the file leaves to the outputs of the ceremony is filled in from the trust
// folder; what the file says itself is kept.

// defaultURL takes the URL from the signing configuration.
func (c *Config) defaultURL() error {
	if c.URL != "" || c.Trust == "" {
		return nil
	}
	signing, err := readOutput(c.Trust, "signing_config.v0.2.json", trust.ParseSigningConfig)
	if err != nil {
		return fmt.Errorf("url: missing, and the ceremony's outputs do not say it: %w", err)
	}
	if n := len(signing.CAs); n > 0 {
		c.URL = signing.CAs[n-1].URL
	}
	return nil
}

// defaultShard takes the shard's name from the trusted root. section is that of
// the file.
func (c *Config) defaultShard(l *Log, section string, role hsm.Role) (err error) {
	if l.Shard != "" {
		return nil
	}
	if l.Shard, err = c.currentShard(role); err != nil {
		return fmt.Errorf("%s.shard: missing, and the ceremony's outputs do not say it: %w", section, err)
	}
	return nil
}

// currentShard returns the name of the shard whose key is that of the role, as
// the trusted root's URL of it says: what follows /ct/ or /log/.
func (c *Config) currentShard(role hsm.Role) (string, error) {
	trusted, err := readOutput(c.Trust, "trusted_root.json", trust.ParseRoot)
	if err != nil {
		return "", err
	}
	ring, err := trust.LoadKeyRing(filepath.Join(c.Trust, "keys.yaml"))
	if err != nil {
		return "", err
	}
	logs, path := trusted.Logs, "/log/"
	if role == hsm.RoleCT {
		logs, path = trusted.CTLogs, "/ct/"
	}
	for _, l := range logs {
		if id, err := l.ID(); err == nil && id == ring.Keys[role].SPKI {
			_, shard, _ := strings.Cut(strings.TrimPrefix(l.BaseURL, "https://"), path)
			return shard, nil
		}
	}
	return "", fmt.Errorf("the trusted root has no log with the %s key of keys.yaml", role)
}

// readOutput reads and parses a file of the ceremony.
func readOutput[T any](dir, name string, parse func([]byte) (T, error)) (T, error) {
	var none T
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return none, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return none, err
	}
	return parse(data)
}
