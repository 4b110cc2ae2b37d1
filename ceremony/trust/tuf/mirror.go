package tuf

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/chancery-ca/chancery/ceremony/durable"
	"github.com/chancery-ca/chancery/hsm"
)

// ErrExpiring: metadata is near its end, and clients still accept it.
var ErrExpiring = errors.New("TUF metadata expires soon")

const (
	// signTime bounds one refresh: two signatures and four writes.
	signTime = 30 * time.Second
	// Between two attempts to refresh lie at least minDelay, doubled with each
	// failure up to maxDelay.
	minDelay = 5 * time.Second
	maxDelay = 10 * time.Minute
	// maxSleep is how long the refresher looks away: a clock may be set.
	maxSleep = time.Hour
	// notice is how long before its end a file is said to expire soon, unless a
	// quarter of its period is less: custodians have to meet.
	notice = 60 * 24 * time.Hour
)

// MirrorConfig says what a Mirror serves. Every field is needed.
type MirrorConfig struct {
	// Repository is the ceremony's, with or without its online part.
	Repository *Repository
	// State is the folder of the snapshot and timestamp that the mirror signs.
	// It is made if it is not there, and may be lost.
	State string
	// Key is the online key of Repository's newest root.
	Key hsm.Key
	// Now is the service's clock.
	Now    func() (time.Time, error)
	Logger *slog.Logger
}

// Mirror serves a repository from memory and signs a new timestamp, and when it
// is needed a new snapshot, long before the old one expires: when a quarter of
// its period is over, so that three quarters remain to repair what hinders it.
// Signing happens in a goroutine of its own, never on a request's path; one
// attempt at a time, with growing delays; what is signed is on disk before it is
// served. It is safe for concurrent use.
type Mirror struct {
	cfg  MirrorConfig
	view atomic.Pointer[view]
	stop context.CancelFunc
	done sync.WaitGroup

	// Of the goroutine that refreshes, and before it of OpenMirror.
	snapshotVersion, timestampVersion int64 // the newest known
	warned                            time.Time
}

// view is what is served at a moment.
type view struct {
	repo  *Repository       // complete but before the first refresh
	files map[string][]byte // its files, and the snapshot before
}

// OpenMirror takes up the state, signs what is missing or due, and starts the
// refresher. It fails with ErrForeign (the key is not the root's), ErrVersion
// (what was served before is newer than Repository: an old trust folder) or
// when there is nothing that a client would accept and the token does not sign.
// Close ends it.
func OpenMirror(ctx context.Context, cfg MirrorConfig) (*Mirror, error) {
	m := &Mirror{cfg: cfg}
	if pub, ok := cfg.Key.Public().(*ecdsa.PublicKey); !ok || !pub.Equal(cfg.Repository.Root().Layout.Online) {
		return nil, fmt.Errorf("open TUF mirror: the online key is not the one of root %d: %w", cfg.Repository.Root().Version, ErrForeign)
	}
	if err := os.MkdirAll(cfg.State, 0o700); err != nil {
		return nil, fmt.Errorf("open TUF mirror: %w", err)
	}
	repo, err := m.resume()
	if err != nil {
		return nil, fmt.Errorf("open TUF mirror: %w", err)
	}
	m.publish(repo)
	if err := m.refreshIfDue(ctx); err != nil {
		if m.Err() != nil {
			return nil, fmt.Errorf("open TUF mirror: %w", err)
		}
		cfg.Logger.Warn("TUF timestamp not refreshed at start", "err", err)
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	m.stop = stop
	m.done.Go(func() { m.run(run) })
	return m, nil
}

// Close ends the refresher and waits for it.
func (m *Mirror) Close() {
	m.stop()
	m.done.Wait()
}

// File returns a file by its name in the repository, and whether its content
// can ever change. The caller must not change the octets.
func (m *Mirror) File(name string) (content []byte, changes, ok bool) {
	content, ok = m.view.Load().files[name]
	return content, name == TimestampName, ok
}

// Err returns nil if clients accept what is served, else ErrExpired,
// ErrThreshold (nothing was signed yet) or why the clock does not tell.
func (m *Mirror) Err() error {
	now, err := m.cfg.Now()
	if err != nil {
		return err
	}
	repo := m.view.Load().repo
	if repo.timestamp == nil {
		return fmt.Errorf("no TUF timestamp: %w", ErrThreshold)
	}
	return repo.Expired(now)
}

// Expiring returns nil, or ErrExpiring with what must be signed soon and by
// whom: root and targets by custodians, the others by this service.
func (m *Mirror) Expiring() error {
	now, err := m.cfg.Now()
	if err != nil {
		return err
	}
	repo := m.view.Load().repo
	var errs []error
	for _, e := range repo.Expiries() {
		if left := e.Expires.Sub(now); left < min(repo.Root().Layout.Expires.of(e.Role).length(now)/4, notice) {
			errs = append(errs, fmt.Errorf("%s %d, %s: %w", e.Role, e.Version, e.Expires.Format(time.RFC3339), ErrExpiring))
		}
	}
	return errors.Join(errs...)
}

// Expiries returns until when what is served is valid.
func (m *Mirror) Expiries() []Expiry { return m.view.Load().repo.Expiries() }

// of returns the period of a role.
func (e Expires) of(role Role) Period {
	switch role {
	case RoleRoot:
		return e.Root
	case RoleTargets:
		return e.Targets
	case RoleSnapshot:
		return e.Snapshot
	}
	return e.Timestamp
}

// length returns how long a period that begins now is.
func (p Period) length(now time.Time) time.Duration { return p.After(now).Sub(now) }

// resume returns the repository with the newest online part there is: the
// ceremony's or the state's.
func (m *Mirror) resume() (*Repository, error) {
	repo := m.cfg.Repository
	m.snapshotVersion, m.timestampVersion = repo.OnlineVersions()
	snapshot, timestamp, err := m.readState()
	if errors.Is(err, fs.ErrNotExist) {
		return repo, nil
	}
	var newest reference
	if err == nil {
		newest, err = m.known(snapshot, timestamp)
	}
	if err != nil {
		m.cfg.Logger.Warn("TUF state is not ours or damaged: it is made anew", "err", err)
		return repo, nil
	}
	if newest.version > repo.TargetsVersion() {
		return nil, fmt.Errorf("targets %d were served, the trust folder has %d: %w", newest.version, repo.TargetsVersion(), ErrVersion)
	}
	saved, err := repo.withOnline(snapshot, timestamp)
	if err != nil {
		// Signed for older targets or by an older key: what is known of the
		// versions stays, new files are signed.
		m.cfg.Logger.Info("TUF state is of an older trust folder", "err", err)
		if s, t := repo.OnlineVersions(); s >= m.snapshotVersion && t >= m.timestampVersion && t > 0 {
			return repo, nil
		}
		return repo.withoutOnline()
	}
	if _, v := repo.OnlineVersions(); v > saved.timestamp.version {
		return repo, nil
	}
	return saved, nil
}

// readState reads the timestamp in the state's folder and the snapshot that it
// names.
func (m *Mirror) readState() (snapshot, timestamp []byte, err error) {
	if timestamp, err = readFile(filepath.Join(m.cfg.State, TimestampName)); err != nil {
		return nil, nil, err
	}
	t, _, err := parsePointer(RoleTimestamp, timestamp)
	if err != nil {
		return nil, nil, err
	}
	snapshot, err = readFile(filepath.Join(m.cfg.State, RoleSnapshot.fileName(t.to.version)))
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("snapshot %d is missing: %w", t.to.version, ErrFormat)
	}
	return snapshot, timestamp, err
}

// known learns the versions of a saved snapshot and timestamp that one of the
// roots' online keys has signed, and returns the targets that they led to.
func (m *Mirror) known(snapshot, timestamp []byte) (reference, error) {
	s, signedS, err := parsePointer(RoleSnapshot, snapshot)
	if err != nil {
		return reference{}, err
	}
	t, signedT, err := parsePointer(RoleTimestamp, timestamp)
	if err != nil {
		return reference{}, err
	}
	if t.to != referenceTo(s.version, snapshot) {
		return reference{}, fmt.Errorf("the timestamp names another snapshot: %w", ErrVersion)
	}
	for _, root := range m.cfg.Repository.roots {
		var by authority
		if by, err = root.Layout.online(); err != nil {
			return reference{}, err
		}
		if err = errors.Join(signedS.verify(by), signedT.verify(by)); err == nil {
			m.snapshotVersion, m.timestampVersion = max(m.snapshotVersion, s.version), max(m.timestampVersion, t.version)
			return s.to, nil
		}
	}
	return reference{}, err
}

// withOnline returns the repository with another snapshot and timestamp.
func (r *Repository) withOnline(snapshot, timestamp []byte) (*Repository, error) {
	s, _, err := parsePointer(RoleSnapshot, snapshot)
	if err != nil {
		return nil, err
	}
	return New(append(r.offline(), File{RoleSnapshot.fileName(s.version), snapshot}, File{TimestampName, timestamp}))
}

func (r *Repository) withoutOnline() (*Repository, error) { return New(r.offline()) }

// offline returns the files that custodians stand for.
func (r *Repository) offline() []File {
	var out []File
	for _, f := range r.Files() {
		if f.Name == TimestampName || r.snapshot != nil && f.Name == RoleSnapshot.fileName(r.snapshot.version) {
			continue
		}
		out = append(out, f)
	}
	return out
}

// publish serves repo from now on. The snapshot that was current stays: a
// client may have read the timestamp that names it.
func (m *Mirror) publish(repo *Repository) {
	v := &view{repo, maps.Clone(repo.files)}
	if old := m.view.Load(); old != nil && old.repo.snapshot != nil {
		name := RoleSnapshot.fileName(old.repo.snapshot.version)
		v.files[name] = old.repo.files[name]
	}
	m.view.Store(v)
}

// due returns how long it is until something should be signed, ≤ 0 for now.
func (m *Mirror) due(now time.Time) time.Duration {
	repo := m.view.Load().repo
	if repo.timestamp == nil {
		return 0
	}
	wait := maxSleep
	for _, p := range []*pointer{repo.snapshot, repo.timestamp} {
		quarter := repo.Root().Layout.Expires.of(p.role).length(now) / 4
		wait = min(wait, p.expires.Add(-3*quarter).Sub(now))
	}
	return wait
}

func (m *Mirror) refreshIfDue(ctx context.Context) error {
	now, err := m.cfg.Now()
	if err != nil {
		return err
	}
	if m.due(now) > 0 {
		return nil
	}
	return m.refresh(ctx, now)
}

// refresh signs a timestamp, before it a snapshot if that is due too or was
// never signed, saves both and serves them.
func (m *Mirror) refresh(ctx context.Context, now time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, signTime)
	defer cancel()
	old := m.view.Load().repo
	snapshot, err := m.snapshot(ctx, old, now)
	if err != nil {
		return err
	}
	version := NextVersion(m.timestampVersion, now)
	draft, err := NewTimestamp(old.Root(), snapshot, version, now)
	if err != nil {
		return err
	}
	timestamp, err := m.sign(ctx, draft)
	if err != nil {
		return err
	}
	repo, err := old.withOnline(snapshot, timestamp)
	if err != nil {
		return fmt.Errorf("check what was signed: %w", err)
	}
	if err := m.save(repo, snapshot, timestamp); err != nil {
		return fmt.Errorf("save TUF state: %w", err)
	}
	m.snapshotVersion, m.timestampVersion = repo.snapshot.version, version
	m.publish(repo)
	m.cfg.Logger.Info("TUF timestamp signed", "version", version, "snapshot", repo.snapshot.version, "expires", repo.timestamp.expires)
	return nil
}

// snapshot returns the current snapshot, or a new one.
func (m *Mirror) snapshot(ctx context.Context, repo *Repository, now time.Time) ([]byte, error) {
	if repo.snapshot != nil {
		quarter := repo.Root().Layout.Expires.Snapshot.length(now) / 4
		if repo.snapshot.expires.Sub(now) > 3*quarter {
			return repo.files[RoleSnapshot.fileName(repo.snapshot.version)], nil
		}
	}
	targets := repo.files[RoleTargets.fileName(repo.targets.version)]
	draft, err := NewSnapshot(repo.Root(), targets, NextVersion(m.snapshotVersion, now), now)
	if err != nil {
		return nil, err
	}
	return m.sign(ctx, draft)
}

func (m *Mirror) sign(ctx context.Context, draft *Draft) ([]byte, error) {
	if _, err := draft.Sign(ctx, m.cfg.Key); err != nil {
		return nil, err
	}
	return draft.Bytes()
}

// save puts the online part on disk, the timestamp last, and then removes the
// snapshots of before.
func (m *Mirror) save(repo *Repository, snapshot, timestamp []byte) error {
	name := RoleSnapshot.fileName(repo.snapshot.version)
	if err := durable.Replace(filepath.Join(m.cfg.State, name), snapshot, 0o644); err != nil {
		return err
	}
	if err := durable.Replace(filepath.Join(m.cfg.State, TimestampName), timestamp, 0o644); err != nil {
		return err
	}
	entries, err := os.ReadDir(m.cfg.State)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if match := metadataName.FindStringSubmatch(e.Name()); match != nil && Role(match[2]) == RoleSnapshot && e.Name() != name {
			if err := os.Remove(filepath.Join(m.cfg.State, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// run refreshes until ctx ends.
func (m *Mirror) run(ctx context.Context) {
	delay := minDelay
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		m.warn()
		wait := delay
		if err := m.refreshIfDue(ctx); err == nil {
			delay = minDelay
			wait = m.sleep()
		} else if ctx.Err() == nil {
			m.cfg.Logger.Error("TUF timestamp not refreshed", "err", err, "again_in", wait)
			delay = min(2*delay, maxDelay)
		}
		timer.Reset(wait)
	}
}

// sleep returns how long nothing is to be done, minDelay to maxSleep.
func (m *Mirror) sleep() time.Duration {
	now, err := m.cfg.Now()
	if err != nil {
		return minDelay
	}
	return max(m.due(now), minDelay)
}

// warn says once a day what expires soon.
func (m *Mirror) warn() {
	now, err := m.cfg.Now()
	if err != nil || now.Sub(m.warned).Abs() < 24*time.Hour {
		return
	}
	if err := m.Expiring(); err != nil {
		m.warned = now
		m.cfg.Logger.Warn("TUF metadata expires soon", "err", err)
	}
}
