package tuf

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// Target is a file that clients download through the repository.
type Target struct {
	// Name is a plain file name, [a-z0-9][a-z0-9._-]{0,99}.
	Name    string
	Content []byte
	// Usage says to clients that know no trusted_root.json what the file is:
	// "Fulcio", "Rekor", "CTFE" or "TSA" with Status "Active" or "Expired" and
	// the URI of the service. "" for files that are known by their name.
	Usage, Status, URI string
}

var targetName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,99}$`)

// custom is the "custom" member of a target.
type custom struct {
	Sigstore struct {
		Status string `json:"status"`
		URI    string `json:"uri"`
		Usage  string `json:"usage"`
	} `json:"sigstore"`
}

// listing is the content of a targets file.
type listing struct {
	version int64
	expires time.Time
	targets map[string]listed
}

// listed is what a targets file says of one target.
type listed struct {
	length             int64
	hash               [sha256.Size]byte
	usage, status, uri string
}

// path returns the name of the target's file with consistent snapshots.
func (l listed) path(name string) string {
	return fmt.Sprintf("%s%x.%s", TargetsFolder, l.hash, name)
}

func newListing(version int64, expires time.Time, targets []Target) (*listing, error) {
	l := &listing{version, expires, map[string]listed{}}
	for _, t := range targets {
		if _, twice := l.targets[t.Name]; twice || len(t.Content) > MaxFile || len(t.Content) == 0 {
			return nil, fmt.Errorf("target %.100q: twice, empty or more than %d octets: %w", t.Name, MaxFile, ErrLayout)
		}
		l.targets[t.Name] = listed{int64(len(t.Content)), sha256.Sum256(t.Content), t.Usage, t.Status, t.URI}
	}
	return l, nil
}

func (l *listing) document() (document, error) {
	if len(l.targets) == 0 || len(l.targets) > maxTargets {
		return document{}, fmt.Errorf("%d targets, want 1 to %d: %w", len(l.targets), maxTargets, ErrLayout)
	}
	m := metadata.Targets(l.expires).Signed
	m.Version = l.version
	for name, t := range l.targets {
		if !targetName.MatchString(name) || t.length < 1 || t.length > MaxFile {
			return document{}, fmt.Errorf("target %.100q of %d octets: %w", name, t.length, ErrLayout)
		}
		f := &metadata.TargetFiles{Length: t.length, Hashes: metadata.Hashes{"sha256": t.hash[:]}}
		if t.usage != "" {
			var c custom
			c.Sigstore.Status, c.Sigstore.URI, c.Sigstore.Usage = t.status, t.uri, t.usage
			raw, err := json.Marshal(c)
			if err != nil {
				return document{}, fmt.Errorf("target %s: %w", name, err)
			}
			f.Custom = (*json.RawMessage)(&raw)
		}
		m.Targets[name] = f
	}
	return newDocument(RoleTargets, l.version, l.expires, m)
}

// NewTargets drafts targets, valid from now for the root's period, that the
// custodians of root sign. Version is 1 or one more than the version before.
func NewTargets(root *Root, version int64, targets []Target, now time.Time) (*Draft, error) {
	l, err := newListing(version, root.Layout.Expires.Targets.After(now), targets)
	if err != nil {
		return nil, fmt.Errorf("make targets: %w", err)
	}
	doc, err := l.document()
	if err != nil {
		return nil, fmt.Errorf("make targets: %w", err)
	}
	by, err := root.Layout.custodians("custodians")
	if err != nil {
		return nil, fmt.Errorf("make targets: %w", err)
	}
	return &Draft{doc: doc, authorities: []authority{by}}, nil
}

// parseTargets reads targets and their signatures.
func parseTargets(data []byte) (*listing, *parsed, error) {
	m, sigs, err := decode[metadata.TargetsType](data)
	if err != nil {
		return nil, nil, fmt.Errorf("read targets: %w", err)
	}
	l := &listing{m.Version, m.Expires, map[string]listed{}}
	if len(m.Targets) > maxTargets {
		return nil, nil, fmt.Errorf("read targets: %d targets: %w", len(m.Targets), ErrFormat)
	}
	for name, f := range m.Targets {
		if f == nil || len(f.Hashes["sha256"]) != sha256.Size {
			return nil, nil, fmt.Errorf("read targets: target %.100q has no SHA-256: %w", name, ErrFormat)
		}
		t := listed{length: f.Length, hash: [sha256.Size]byte(f.Hashes["sha256"])}
		if f.Custom != nil {
			var c custom
			if err := strictJSON(*f.Custom, &c); err != nil {
				return nil, nil, fmt.Errorf("read targets: target %.100q: %w: %w", name, ErrFormat, err)
			}
			t.usage, t.status, t.uri = c.Sigstore.Usage, c.Sigstore.Status, c.Sigstore.URI
		}
		l.targets[name] = t
	}
	doc, err := l.document()
	if err != nil {
		return nil, nil, fmt.Errorf("read targets: %w: %w", ErrFormat, err)
	}
	p, err := doc.matched(data, sigs)
	if err != nil {
		return nil, nil, fmt.Errorf("read targets: %w", err)
	}
	return l, p, nil
}

// names returns the targets' names in order.
func (l *listing) names() []string { return slices.Sorted(maps.Keys(l.targets)) }

// pointer is the content of a snapshot, which points to targets, or of a
// timestamp, which points to a snapshot: by version, length and hash.
type pointer struct {
	role    Role
	version int64
	expires time.Time
	to      reference
}

type reference struct {
	version int64
	length  int64
	hash    [sha256.Size]byte
}

// target returns the role that a role's file points to.
func (r Role) target() Role {
	if r == RoleTimestamp {
		return RoleSnapshot
	}
	return RoleTargets
}

// referenceTo returns how a file is pointed to.
func referenceTo(version int64, file []byte) reference {
	return reference{version, int64(len(file)), sha256.Sum256(file)}
}

func (p *pointer) document() (document, error) {
	if p.to.version < 1 || p.to.version > maxVersion || p.to.length < 1 || p.to.length > MaxFile {
		return document{}, fmt.Errorf("%s points to version %d of %d octets: %w", p.role, p.to.version, p.to.length, ErrLayout)
	}
	meta := map[string]*metadata.MetaFiles{string(p.role.target()) + ".json": {
		Version: p.to.version, Length: p.to.length, Hashes: metadata.Hashes{"sha256": p.to.hash[:]},
	}}
	if p.role == RoleTimestamp {
		m := metadata.Timestamp(p.expires).Signed
		m.Version, m.Meta = p.version, meta
		return newDocument(p.role, p.version, p.expires, m)
	}
	m := metadata.Snapshot(p.expires).Signed
	m.Version, m.Meta = p.version, meta
	return newDocument(p.role, p.version, p.expires, m)
}

// NewSnapshot drafts the snapshot that names a targets file, valid from now for
// the root's period, for root's online key. Version is NextVersion's.
func NewSnapshot(root *Root, targets []byte, version int64, now time.Time) (*Draft, error) {
	l, _, err := parseTargets(targets)
	if err != nil {
		return nil, fmt.Errorf("make snapshot: %w", err)
	}
	return newPointer(root, &pointer{RoleSnapshot, version, root.Layout.Expires.Snapshot.After(now), referenceTo(l.version, targets)})
}

// NewTimestamp drafts the timestamp that names a snapshot file, as NewSnapshot.
func NewTimestamp(root *Root, snapshot []byte, version int64, now time.Time) (*Draft, error) {
	s, _, err := parsePointer(RoleSnapshot, snapshot)
	if err != nil {
		return nil, fmt.Errorf("make timestamp: %w", err)
	}
	return newPointer(root, &pointer{RoleTimestamp, version, root.Layout.Expires.Timestamp.After(now), referenceTo(s.version, snapshot)})
}

func newPointer(root *Root, p *pointer) (*Draft, error) {
	doc, err := p.document()
	if err != nil {
		return nil, fmt.Errorf("make %s: %w", p.role, err)
	}
	by, err := root.Layout.online()
	if err != nil {
		return nil, fmt.Errorf("make %s: %w", p.role, err)
	}
	return &Draft{doc: doc, authorities: []authority{by}}, nil
}

// parsePointer reads a snapshot or a timestamp and its signatures.
func parsePointer(role Role, data []byte) (*pointer, *parsed, error) {
	var (
		p    *pointer
		meta map[string]*metadata.MetaFiles
		sigs []Signature
		err  error
	)
	if role == RoleTimestamp {
		var m metadata.TimestampType
		m, sigs, err = decode[metadata.TimestampType](data)
		p, meta = &pointer{role: role, version: m.Version, expires: m.Expires}, m.Meta
	} else {
		var m metadata.SnapshotType
		m, sigs, err = decode[metadata.SnapshotType](data)
		p, meta = &pointer{role: role, version: m.Version, expires: m.Expires}, m.Meta
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", role, err)
	}
	f := meta[string(role.target())+".json"]
	if f == nil || len(f.Hashes["sha256"]) != sha256.Size {
		return nil, nil, fmt.Errorf("read %s: %s.json is missing or has no SHA-256: %w", role, role.target(), ErrFormat)
	}
	p.to = reference{f.Version, f.Length, [sha256.Size]byte(f.Hashes["sha256"])}
	doc, err := p.document()
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w: %w", role, ErrFormat, err)
	}
	matched, err := doc.matched(data, sigs)
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", role, err)
	}
	return p, matched, nil
}
