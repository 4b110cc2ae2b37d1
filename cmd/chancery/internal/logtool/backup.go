package logtool

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/chancery-ca/chancery/cmd/chancery/internal/service"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/whole"
	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/store"
	"github.com/chancery-ca/chancery/log/tree"
)

// A backup is a folder:
//
//	backup.json   what is in it (Manifest), written last
//	log/          the data directory: admin.db, tree-ID.db
//
// The anchor is not in it. It says which head was the last that anybody saw;
// an old copy put in its place would let the log sign a second history. A
// backup holds, in the manifest, the head that each log had, so that Restore
// can prove that it restored that log.
const (
	manifestName    = "backup.json"
	manifestVersion = 1
	dataName        = "log"
	maxManifest     = 1 << 20
)

// Manifest describes a backup.
type Manifest struct {
	Version int       `json:"version"`
	Time    time.Time `json:"time"`
	Logs    []Saved   `json:"logs"`
	// Others are trees that the configuration does not name. Old shards that the
	// trusted root names and that end with their last head have it here; all else
	// has a name and a tree alone.
	Others []Saved `json:"others,omitempty"`
	// Files holds the SHA-256 of each file in log/, in hexadecimal.
	Files map[string]hexHash `json:"files"`
}

// Saved is one log of a backup.
type Saved struct {
	Name   string `json:"name"`
	Origin string `json:"origin"`
	// Tree is what the copy holds.
	Tree Point `json:"tree"`
	// Head is the anchored head from before the copy, nil if there was none or it
	// is not proven;
	// Checkpoint its signed note.
	Head       *Point `json:"head,omitempty"`
	Checkpoint string `json:"checkpoint,omitempty"`
	// AnchorSequence is that of the head.
	AnchorSequence uint64 `json:"anchorSequence"`
}

// Backup copies all logs of the data directory into a new folder, while the
// service runs. Each is copied as of one root. Those that the configuration
// names are at least as new as the head that was anchored when Backup began,
// and are proven to contain it. A frozen log that does not end with its last head
// does not stop the others: it is copied, and has no head in the manifest. Errors:
// os.ErrExist, ErrNotProven, ErrDamaged.
func Backup(ctx context.Context, logs []Log, dir string, now time.Time) (*Manifest, error) {
	m := &Manifest{Version: manifestVersion, Time: now.UTC().Truncate(time.Second), Files: map[string]hexHash{}}
	err := whole.Folder(dir, 0o700, func(tmp string) error {
		anchors := make([]head.AnchorState, len(logs))
		unread := make([]error, len(logs))
		for i, l := range logs {
			var err error
			if anchors[i], err = head.ReadAnchor(l.Anchor); l.Frozen {
				unread[i] = err
			} else if err != nil {
				return fmt.Errorf("back up log %s: %w: %w", l.Name, err, ErrNotProven)
			}
		}
		data := filepath.Join(tmp, dataName)
		if err := copyStore(ctx, logs[0].Dir, data); err != nil {
			return err
		}
		if err := m.describe(ctx, logs, anchors, unread, data); err != nil {
			return err
		}
		text, err := json.MarshalIndent(m, "", "  ")
		if err != nil {
			return fmt.Errorf("encode manifest: %w", err)
		}
		return writeFile(filepath.Join(tmp, manifestName), append(text, '\n'), 0o600)
	})
	return m, err
}

func copyStore(ctx context.Context, from, to string) (err error) {
	if err := os.Mkdir(to, 0o700); err != nil {
		return fmt.Errorf("create folder: %w", err)
	}
	r, err := store.OpenReader(from, store.Options{})
	if err != nil {
		return named(err)
	}
	return errors.Join(named(r.Backup(ctx, to)), r.Close())
}

// describe proves that the copy holds each head and lists its files.
func (m *Manifest) describe(ctx context.Context, logs []Log, anchors []head.AnchorState, unread []error, data string) error {
	f, err := openFiles(data)
	if err != nil {
		return err
	}
	old := map[string]Saved{} // with their last heads
	for i, l := range logs {
		s, e := l.check(ctx, f, anchors[i], unread[i])
		if l.Frozen {
			if e == nil && s.State == Frozen {
				old[l.Name] = saved(s)
			}
			continue
		}
		if e == nil && s.State != Consistent {
			e = fmt.Errorf("%s: %w", s.Reason, ErrNotProven)
		}
		if e != nil {
			err = errors.Join(err, fmt.Errorf("back up log %s: %w", l.Name, e))
			continue
		}
		m.Logs = append(m.Logs, saved(s))
	}
	for _, name := range slices.Sorted(maps.Keys(f.ids)) {
		if slices.Contains(names(configured(logs)), name) {
			continue
		}
		if s, ok := old[name]; ok {
			m.Others = append(m.Others, s)
			continue
		}
		_, root, e := f.root(ctx, name)
		err = errors.Join(err, e)
		m.Others = append(m.Others, Saved{Name: name, Tree: Point{root.Size, hexHash(root.Hash), root.Time}})
	}
	if err := errors.Join(err, f.Close(), dropShared(data)); err != nil {
		return err
	}
	return m.sum(data)
}

// saved is what the manifest says of a log whose head is proven.
func saved(s *Status) Saved {
	return Saved{s.Name, s.Origin, s.Tree, s.Head, string(s.anchor.Record.Note), s.AnchorSequence}
}

// configured returns the logs that are not frozen.
func configured(logs []Log) []Log {
	return slices.DeleteFunc(slices.Clone(logs), func(l Log) bool { return l.Frozen })
}

// dropShared removes what SQLite leaves beside databases that were only read.
func dropShared(dir string) error {
	var errs []error
	for _, pattern := range []string{"*.db-shm", "*.db-wal"} {
		files, err := filepath.Glob(filepath.Join(dir, pattern))
		errs = append(errs, err)
		for _, file := range files {
			errs = append(errs, os.Remove(file))
		}
	}
	return errors.Join(errs...)
}

// sum hashes every file.
func (m *Manifest) sum(dir string) error {
	files, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("read folder: %w", err)
	}
	for _, file := range files {
		h, err := hashFile(filepath.Join(dir, file.Name()), io.Discard)
		if err != nil {
			return err
		}
		m.Files[file.Name()] = h
	}
	return nil
}

// hashFile returns a file's SHA-256 and copies it to w.
func hashFile(path string, w io.Writer) (hexHash, error) {
	f, err := os.Open(filepath.Clean(path))
	if err != nil {
		return hexHash{}, fmt.Errorf("read file: %w", err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(io.MultiWriter(h, w), f); err != nil {
		return hexHash{}, fmt.Errorf("copy %s: %w", path, err)
	}
	return hexHash(h.Sum(nil)), nil
}

// readManifest reads and checks the manifest of a backup of these logs.
func readManifest(dir string, logs []Log) (*Manifest, error) {
	f, err := os.Open(filepath.Join(filepath.Clean(dir), manifestName))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBackup, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxManifest))
	if err != nil {
		return nil, fmt.Errorf("read manifest: %w", err)
	}
	m := new(Manifest)
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(m); err != nil || m.Version != manifestVersion {
		return nil, fmt.Errorf("%w: manifest of version %d: %w", ErrBackup, m.Version, errors.Join(err))
	}
	var have []string
	for _, s := range m.Logs {
		have = append(have, s.Name)
	}
	slices.Sort(have)
	if want := names(configured(logs)); !slices.Equal(have, want) {
		return nil, fmt.Errorf("%w: it has %q, the configuration %q", ErrBackup, have, want)
	}
	for name := range m.Files {
		if name != filepath.Base(name) || !strings.HasSuffix(name, ".db") {
			return nil, fmt.Errorf("%w: file name %q", ErrBackup, name)
		}
	}
	return m, nil
}

// Restore puts a backup into the place of the data directory, which must be
// missing or empty, after it has proven every leaf, tile and root of it and
// that each log holds the head that the manifest names. The anchors are left
// as they are: what Restore returns says how each log stands to its own, and a
// log that does not continue it is read-only when the service starts. Errors:
// os.ErrExist, ErrBackup, ErrDamaged.
func Restore(ctx context.Context, logs []Log, dir string, p Progress) ([]Status, error) {
	m, err := readManifest(dir, logs)
	if err != nil {
		return nil, err
	}
	target := filepath.Clean(logs[0].Dir)
	if err := os.Remove(target); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("restore to %s: it is not empty: %w", target, os.ErrExist)
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o700); err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	err = whole.Folder(target, 0o700, func(tmp string) error {
		for name, want := range m.Files {
			if err := copyFile(filepath.Join(dir, dataName, name), filepath.Join(tmp, name), want); err != nil {
				return err
			}
		}
		return m.prove(ctx, logs, tmp, p)
	})
	if err != nil {
		return nil, err
	}
	var list []Status
	for _, l := range logs {
		s, err := l.Check(ctx)
		if err != nil {
			return list, err
		}
		list = append(list, *s)
	}
	return list, nil
}

// copyFile copies a file of a backup and compares its hash.
func copyFile(from, to string, want hexHash) error {
	out, err := os.OpenFile(filepath.Clean(to), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	got, err := hashFile(from, out)
	if err = errors.Join(err, out.Close()); err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	if got != want {
		return fmt.Errorf("restore %s: the file's SHA-256 is not the manifest's: %w", filepath.Base(from), ErrDamaged)
	}
	return nil
}

// prove verifies restored logs as far as that goes without their anchors.
func (m *Manifest) prove(ctx context.Context, logs []Log, dir string, p Progress) error {
	f, err := openFiles(dir)
	if err != nil {
		return err
	}
	for _, saved := range slices.Concat(m.Logs, m.Others) {
		l := Log{LogPlace: service.LogPlace{Name: saved.Name}}
		if i := slices.IndexFunc(logs, func(l Log) bool { return l.Name == saved.Name }); i >= 0 {
			l = logs[i]
		}
		if l.Frozen {
			l.Origin = saved.Origin
		}
		if e := saved.prove(ctx, l, f, p); e != nil {
			err = errors.Join(err, fmt.Errorf("restore log %s: %w", saved.Name, e))
		}
	}
	if len(f.ids) != len(m.Logs)+len(m.Others) {
		err = errors.Join(err, fmt.Errorf("%d logs, the manifest has %d: %w", len(f.ids), len(m.Logs)+len(m.Others), ErrBackup))
	}
	return errors.Join(err, f.Close(), dropShared(dir))
}

func (saved Saved) prove(ctx context.Context, l Log, f *files, p Progress) error {
	id, root, err := f.root(ctx, l.Name)
	if err != nil {
		return err
	}
	if saved.Origin != l.Origin || root.Size != saved.Tree.Size || root.Hash != tree.Hash(saved.Tree.Root) {
		return fmt.Errorf("origin %s, %d leaves, the manifest has %s, %d: %w", l.Origin, root.Size, saved.Origin, saved.Tree.Size, ErrBackup)
	}
	s := &Status{Tree: saved.Tree, id: id}
	if err := l.proveTree(ctx, f, s, 0, nil, p); err != nil {
		return err
	}
	if err := f.Check(ctx, id); err != nil {
		return named(err)
	}
	if saved.Head == nil {
		return nil
	}
	at, err := f.rootAt(ctx, id, saved.Head.Size)
	if err == nil && at != tree.Hash(saved.Head.Root) {
		err = fmt.Errorf("the manifest's head is not of this tree: %w", ErrBackup)
	}
	return err
}
