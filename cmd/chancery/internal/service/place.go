package service

import (
	"github.com/chancery-ca/chancery/config"
	"github.com/chancery-ca/chancery/hsm"
)

// LogPlace says where a configured log lives, for tools that work on its files.
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
	ct, rekor := treeName("ct", cfg.CT.Log), treeName("rekor", cfg.Rekor.Log)
	places := []LogPlace{
		{ct, hsm.RoleCT, cfg.CT.Origin, logDir(cfg), anchorPath(cfg, ct), "ct/" + cfg.CT.Shard, cfg.CT.Counter},
		{rekor, hsm.RoleRekor, cfg.Rekor.Origin, logDir(cfg), anchorPath(cfg, rekor), "log/" + cfg.Rekor.Shard + "/api/v2", cfg.Rekor.Counter},
	}
	switch {
	case cfg.Only == config.OnlyCT:
		return places[:1]
	case cfg.CT.Elsewhere():
		return places[1:]
	}
	return places
}
