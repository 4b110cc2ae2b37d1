package tuf

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/chancery-ca/chancery/ceremony/durable"
)

// Repository is a whole repository, verified: every root since the first, the
// newest targets with their files, and, unless the online key has not signed
// yet, a snapshot and a timestamp. It does not change and is safe for
// concurrent use.
type Repository struct {
	roots     []*Root // version 1 first
	targets   *listing
	snapshot  *pointer // nil without the online part
	timestamp *pointer // nil without the online part
	files     map[string][]byte
}

// metadataName are the names of metadata files; versions have no leading zero.
var metadataName = regexp.MustCompile(`^([1-9][0-9]{0,15})\.(root|targets|snapshot)\.json$`)

// New verifies the files of a repository and returns it. They are exactly:
// 1.root.json, 2.root.json and so on without a gap; one N.targets.json; under
// targets/ each file that it lists; and either one N.snapshot.json and
// timestamp.json, or neither. Every signature of every file must verify, every
// threshold be reached, every root be signed by the custodians of the one
// before too. Expiry is not looked at: see Expired.
//
// Errors: ErrFormat (an octet or a file that does not belong), ErrSignature,
// ErrForeign, ErrThreshold, ErrVersion.
func New(files []File) (*Repository, error) {
	r := &Repository{files: map[string][]byte{}}
	for _, f := range files {
		if _, twice := r.files[f.Name]; twice {
			return nil, fmt.Errorf("file %.120q twice: %w", f.Name, ErrFormat)
		}
		r.files[f.Name] = bytes.Clone(f.Content)
	}
	names, err := r.sortNames()
	if err != nil {
		return nil, err
	}
	if err := r.readRoots(names[RoleRoot]); err != nil {
		return nil, err
	}
	if err := r.readTargets(names[RoleTargets]); err != nil {
		return nil, err
	}
	if err := r.readOnline(names[RoleSnapshot]); err != nil {
		return nil, err
	}
	return r, r.checkContents()
}

// sortNames returns the versions of each role's files, in order.
func (r *Repository) sortNames() (map[Role][]int64, error) {
	versions := map[Role][]int64{}
	for name := range r.files {
		if name == TimestampName || strings.HasPrefix(name, TargetsFolder) {
			continue
		}
		m := metadataName.FindStringSubmatch(name)
		if m == nil {
			return nil, fmt.Errorf("file %.120q is not one of a repository: %w", name, ErrFormat)
		}
		v, err := strconv.ParseInt(m[1], 10, 64)
		if err != nil || v > maxVersion {
			return nil, fmt.Errorf("file %.120q: %w", name, ErrVersion)
		}
		versions[Role(m[2])] = append(versions[Role(m[2])], v)
	}
	for _, v := range versions {
		slices.Sort(v)
	}
	return versions, nil
}

// readRoots verifies the chain of roots.
func (r *Repository) readRoots(versions []int64) error {
	if len(versions) == 0 || len(versions) > maxRoots {
		return fmt.Errorf("%d roots, want 1 to %d: %w", len(versions), maxRoots, ErrFormat)
	}
	var previous *Root
	for i, v := range versions {
		if v != int64(i)+1 {
			return fmt.Errorf("root %d is missing: %w", i+1, ErrVersion)
		}
		root, signed, err := parseRoot(r.files[RoleRoot.fileName(v)])
		if err != nil {
			return fmt.Errorf("root %d: %w", v, err)
		}
		if root.Version != v {
			return fmt.Errorf("%s has version %d: %w", RoleRoot.fileName(v), root.Version, ErrVersion)
		}
		by, err := rootAuthorities(root, previous)
		if err == nil {
			err = signed.verify(by...)
		}
		if err != nil {
			return fmt.Errorf("root %d: %w", v, err)
		}
		r.roots, previous = append(r.roots, root), root
	}
	return nil
}

func (r *Repository) readTargets(versions []int64) error {
	if len(versions) != 1 {
		return fmt.Errorf("%d targets files, want 1: %w", len(versions), ErrFormat)
	}
	l, p, err := parseTargets(r.files[RoleTargets.fileName(versions[0])])
	if err != nil {
		return err
	}
	by, err := r.Root().Layout.custodians("custodians")
	if err == nil {
		err = p.verify(by)
	}
	if err != nil {
		return fmt.Errorf("targets %d: %w", versions[0], err)
	}
	if l.version != versions[0] {
		return fmt.Errorf("%s has version %d: %w", RoleTargets.fileName(versions[0]), l.version, ErrVersion)
	}
	r.targets = l
	return nil
}

// readOnline verifies the snapshot and the timestamp, if they are there.
func (r *Repository) readOnline(versions []int64) (err error) {
	timestamp, ok := r.files[TimestampName]
	if !ok && len(versions) == 0 {
		return nil
	}
	if !ok || len(versions) != 1 {
		return fmt.Errorf("%d snapshots and timestamp %t, want one of each or none: %w", len(versions), ok, ErrFormat)
	}
	name := RoleSnapshot.fileName(versions[0])
	if r.snapshot, err = r.readPointer(RoleSnapshot, r.files[name]); err != nil {
		return err
	}
	if r.timestamp, err = r.readPointer(RoleTimestamp, timestamp); err != nil {
		return err
	}
	targets := r.files[RoleTargets.fileName(r.targets.version)]
	switch {
	case r.snapshot.version != versions[0]:
		return fmt.Errorf("%s has version %d: %w", name, r.snapshot.version, ErrVersion)
	case r.timestamp.to != referenceTo(r.snapshot.version, r.files[name]):
		return fmt.Errorf("the timestamp names another snapshot: %w", ErrVersion)
	case r.snapshot.to != referenceTo(r.targets.version, targets):
		return fmt.Errorf("the snapshot names other targets: %w", ErrVersion)
	}
	return nil
}

func (r *Repository) readPointer(role Role, data []byte) (*pointer, error) {
	p, signed, err := parsePointer(role, data)
	if err != nil {
		return nil, err
	}
	by, err := r.Root().Layout.online()
	if err == nil {
		err = signed.verify(by)
	}
	if err != nil {
		return nil, fmt.Errorf("%s %d: %w", role, p.version, err)
	}
	return p, nil
}

// checkContents compares the files under targets/ with the list.
func (r *Repository) checkContents() error {
	want := map[string]bool{}
	for name, t := range r.targets.targets {
		file := t.path(name)
		content, ok := r.files[file]
		if !ok {
			return fmt.Errorf("target %s is missing: %w", name, ErrFormat)
		}
		if got := referenceTo(0, content); got.length != t.length || got.hash != t.hash {
			return fmt.Errorf("target %s is not the listed one: %w", name, ErrFormat)
		}
		want[file] = true
	}
	for name := range r.files {
		if strings.HasPrefix(name, TargetsFolder) && !want[name] {
			return fmt.Errorf("file %.120q is not a listed target: %w", name, ErrFormat)
		}
	}
	return nil
}

// Assemble puts a repository together from metadata files and target contents,
// and verifies it. Roots are in order from version 1. Snapshot and timestamp
// may both be nil: the online key signs later.
func Assemble(roots [][]byte, targets, snapshot, timestamp []byte, contents []Target) (*Repository, error) {
	var files []File
	for i, root := range roots {
		files = append(files, File{RoleRoot.fileName(int64(i) + 1), root})
	}
	l, _, err := parseTargets(targets)
	if err != nil {
		return nil, err
	}
	files = append(files, File{RoleTargets.fileName(l.version), targets})
	if snapshot != nil {
		p, _, err := parsePointer(RoleSnapshot, snapshot)
		if err != nil {
			return nil, err
		}
		files = append(files, File{RoleSnapshot.fileName(p.version), snapshot})
	}
	if timestamp != nil {
		files = append(files, File{TimestampName, timestamp})
	}
	for _, t := range contents {
		entry, ok := l.targets[t.Name]
		if !ok {
			return nil, fmt.Errorf("target %.100q is not listed: %w", t.Name, ErrFormat)
		}
		files = append(files, File{entry.path(t.Name), t.Content})
	}
	return New(files)
}

// Root returns the newest root, RootFiles all of them, version 1 first.
func (r *Repository) Root() *Root { return r.roots[len(r.roots)-1] }

// RootFiles returns the octets of every root, version 1 first.
func (r *Repository) RootFiles() [][]byte {
	var out [][]byte
	for _, root := range r.roots {
		out = append(out, bytes.Clone(r.files[RoleRoot.fileName(root.Version)]))
	}
	return out
}

// TargetsVersion returns the version of the targets.
func (r *Repository) TargetsVersion() int64 { return r.targets.version }

// TargetNames returns the names of the targets, in order.
func (r *Repository) TargetNames() []string { return r.targets.names() }

// Target returns the octets of a target, or nil if there is none of the name.
func (r *Repository) Target(name string) []byte {
	t, ok := r.targets.targets[name]
	if !ok {
		return nil
	}
	return bytes.Clone(r.files[t.path(name)])
}

// OnlineVersions returns the versions of snapshot and timestamp, 0 and 0 while
// the online key has not signed.
func (r *Repository) OnlineVersions() (snapshot, timestamp int64) {
	if r.timestamp == nil {
		return 0, 0
	}
	return r.snapshot.version, r.timestamp.version
}

// Expiry says until when a role's file is valid.
type Expiry struct {
	Role    Role
	Version int64
	Expires time.Time
}

// Expiries returns the expiry of each role's newest file: root, targets and,
// if they are there, snapshot and timestamp.
func (r *Repository) Expiries() []Expiry {
	root := r.Root()
	out := []Expiry{{RoleRoot, root.Version, root.Expires}, {RoleTargets, r.targets.version, r.targets.expires}}
	if r.timestamp != nil {
		out = append(out, Expiry{RoleSnapshot, r.snapshot.version, r.snapshot.expires},
			Expiry{RoleTimestamp, r.timestamp.version, r.timestamp.expires})
	}
	return out
}

// Expired returns nil if a client accepts the repository at now, else ErrExpired
// and what is past its time (TUF 1.0.31, Section 5.3.10 and others: a file is
// expired from the second that it names).
func (r *Repository) Expired(now time.Time) error {
	var errs []error
	for _, e := range r.Expiries() {
		if !now.Before(e.Expires) {
			errs = append(errs, fmt.Errorf("%s %d expired %s: %w", e.Role, e.Version, e.Expires.Format(time.RFC3339), ErrExpired))
		}
	}
	return errors.Join(errs...)
}

// Files returns every file by name, the timestamp last.
func (r *Repository) Files() []File {
	var out []File
	for name, content := range r.files {
		out = append(out, File{name, bytes.Clone(content)})
	}
	slices.SortFunc(out, func(a, b File) int {
		if last := a.Name == TimestampName; last != (b.Name == TimestampName) {
			if last {
				return 1
			}
			return -1
		}
		return strings.Compare(a.Name, b.Name)
	})
	return out
}

// Write makes the folder dir, which must not exist, with the files of the
// repository: each is made exclusively and on disk before Write returns, the
// timestamp last. What an interrupted Write leaves is not a repository.
func (r *Repository) Write(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("make repository: %w", err)
	}
	if err := os.Mkdir(filepath.Join(dir, TargetsFolder), 0o755); err != nil {
		return fmt.Errorf("make repository: %w", err)
	}
	for _, f := range r.Files() {
		if err := durable.Create(filepath.Join(dir, filepath.FromSlash(f.Name)), f.Content, 0o644); err != nil {
			return fmt.Errorf("write %s: %w", f.Name, err)
		}
	}
	for _, d := range []string{filepath.Join(dir, TargetsFolder), dir, filepath.Dir(filepath.Clean(dir))} {
		if err := durable.SyncFolder(d); err != nil {
			return fmt.Errorf("write repository: %w", err)
		}
	}
	return nil
}

// Load reads and verifies the repository in the folder dir, as New does. Links,
// folders other than targets/ and files of more than MaxFile octets are
// ErrFormat.
func Load(dir string) (*Repository, error) {
	var files []File
	for _, folder := range []string{"", TargetsFolder} {
		entries, err := os.ReadDir(filepath.Join(dir, folder))
		if err != nil {
			return nil, fmt.Errorf("read repository: %w", err)
		}
		if len(entries) > maxRoots+maxTargets {
			return nil, fmt.Errorf("read repository: %d files: %w", len(entries), ErrFormat)
		}
		for _, e := range entries {
			name := path.Join(folder, e.Name())
			if folder == "" && name+"/" == TargetsFolder && e.IsDir() {
				continue
			}
			content, err := readFile(filepath.Join(dir, filepath.FromSlash(name)))
			if err != nil {
				return nil, fmt.Errorf("read repository: %w", err)
			}
			files = append(files, File{name, content})
		}
	}
	return New(files)
}

// readFile reads a regular file of at most MaxFile octets.
func readFile(name string) ([]byte, error) {
	info, err := os.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > MaxFile {
		return nil, fmt.Errorf("%s: %s of %d octets: %w", filepath.Base(name), info.Mode().Type(), info.Size(), ErrFormat)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > MaxFile {
		return nil, fmt.Errorf("%s: more than %d octets: %w", filepath.Base(name), MaxFile, ErrFormat)
	}
	return data, nil
}
