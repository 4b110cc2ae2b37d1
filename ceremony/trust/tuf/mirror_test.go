package tuf

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chancery-ca/chancery/ceremony/durable"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// clock is a clock that a test sets.
type clock struct {
	mu  sync.Mutex
	now time.Time
	err error
}

func (c *clock) Now() (time.Time, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now, c.err
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func newMirror(t testing.TB, p *people, repo *Repository, state string, now func() (time.Time, error)) *Mirror {
	t.Helper()
	m, err := OpenMirror(t.Context(), MirrorConfig{Repository: repo, State: state, Key: p.online, Now: now, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m
}

// served returns the repository as a client finds it.
func served(t testing.TB, m *Mirror) *Repository {
	t.Helper()
	var files []File
	for name, content := range m.view.Load().files {
		if s := m.view.Load().repo.snapshot; strings.HasSuffix(name, ".snapshot.json") && (s == nil || name != RoleSnapshot.fileName(s.version)) {
			continue
		}
		files = append(files, File{name, content})
	}
	return must(New(files))(t)
}

func TestMirrorSignsAtStart(t *testing.T) {
	p := newPeople(2)
	whole := p.genesis(t, someTargets())
	bare := must(New(whole.offline()))(t)
	c := &clock{now: start.Add(time.Hour)}
	m := newMirror(t, p, bare, t.TempDir()+"/state", c.Now)
	repo := served(t, m)
	if s, v := repo.OnlineVersions(); s != NextVersion(0, c.now) || v != s {
		t.Errorf("versions %d and %d", s, v)
	}
	if err := m.Err(); err != nil {
		t.Error(err)
	}
	if err := m.Expiring(); err != nil {
		t.Error(err)
	}
	if got := repo.Expiries()[3]; !got.Expires.Equal(c.now.AddDate(0, 0, 7)) {
		t.Errorf("timestamp expires %s", got.Expires)
	}
	c.add(8 * 24 * time.Hour)
	if err := m.Err(); !errors.Is(err, ErrExpired) {
		t.Errorf("after eight days: %v, want ErrExpired", err)
	}
	c.err = errors.New("no time")
	if err := m.Err(); !errors.Is(err, c.err) {
		t.Errorf("without a clock: %v", err)
	}
}

// TestMirrorKeepsTheCeremonysPart: what the ceremony signed an hour ago is good.
func TestMirrorKeepsTheCeremonysPart(t *testing.T) {
	p := newPeople(2)
	repo := p.genesis(t, someTargets())
	c := &clock{now: start.Add(time.Hour)}
	m := newMirror(t, p, repo, t.TempDir(), c.Now)
	if _, v := served(t, m).OnlineVersions(); v != NextVersion(0, start) {
		t.Errorf("version %d: signed again without need", v)
	}
}

// TestMirrorOverTime runs a mirror for a hundred days on a clock that moves when
// everybody waits: clients always find metadata with most of its period left.
func TestMirrorOverTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now().UTC()
		now := func() (time.Time, error) { return time.Now().UTC(), nil }
		p := newPeople(2)
		p.layout.Expires.Root, p.layout.Expires.Targets = Period{Years: 5}, Period{Years: 5}
		p.layout.Expires.Snapshot = Period{Days: 60}
		root := must(ParseRoot(signed(t, must(NewRoot(p.layout, nil, begin))(t), p.custodians...)))(t)
		rootFile := signed(t, must(NewRoot(p.layout, nil, begin))(t), p.custodians...)
		targets := signed(t, must(NewTargets(root, 1, someTargets(), begin))(t), p.custodians...)
		state := t.TempDir()
		m := newMirror(t, p, must(Assemble([][]byte{rootFile}, targets, nil, nil, someTargets()))(t), state, now)
		defer m.Close()
		last := int64(0)
		versions, snapshots := 0, map[int64]bool{}
		for range 100 * 4 {
			before := m.view.Load().repo.snapshot.version
			time.Sleep(6 * time.Hour)
			synctest.Wait()
			if err := errors.Join(m.Err(), m.Expiring()); err != nil {
				t.Fatalf("after %s: %v", time.Since(begin), err)
			}
			repo := served(t, m)
			s, v := repo.OnlineVersions()
			if v < last {
				t.Fatalf("version went back from %d to %d", last, v)
			}
			if v > last {
				versions++
			}
			last, snapshots[s] = v, true
			if left := time.Until(repo.timestamp.expires); left < 5*24*time.Hour {
				t.Fatalf("only %s left", left)
			}
			if _, _, ok := m.File(RoleSnapshot.fileName(before)); !ok {
				t.Fatalf("snapshot %d, current six hours ago, is gone", before)
			}
		}
		if versions < 50 || versions > 100 || len(snapshots) < 6 || len(snapshots) > 9 {
			t.Errorf("%d timestamps, %d snapshots in a hundred days", versions, len(snapshots))
		}
		entries, err := os.ReadDir(state)
		if err != nil || len(entries) != 2 {
			t.Errorf("%d files in the state folder, want the timestamp and its snapshot (%v)", len(entries), err)
		}
	})
}

// failing is a key whose token is away while it fails.
type failing struct {
	hsm.Key
	mu    sync.Mutex
	err   error
	calls int
}

func (f *failing) SignContext(ctx context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	f.mu.Lock()
	f.calls++
	err := f.err
	f.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return f.Key.SignContext(ctx, digest, opts)
}

func (f *failing) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls
}

func (f *failing) set(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

// TestMirrorTokenAway: a token that is away for five days costs nothing but a
// few attempts an hour; one that is away for longer is announced, then noticed.
func TestMirrorTokenAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		now := func() (time.Time, error) { return time.Now().UTC(), nil }
		begin := time.Now().UTC()
		p := newPeople(2)
		key := &failing{Key: p.online}
		rootFile := signed(t, must(NewRoot(p.layout, nil, begin))(t), p.custodians...)
		repo := p.assemble(t, [][]byte{rootFile}, 1, someTargets(), begin)
		var log syncBuffer
		m, err := OpenMirror(t.Context(), MirrorConfig{Repository: repo, State: t.TempDir(), Key: key, Now: now, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		key.set(hsm.ErrLost)
		time.Sleep(5 * 24 * time.Hour)
		synctest.Wait()
		if err := errors.Join(m.Err(), m.Expiring()); err != nil {
			t.Errorf("after five days: %v", err)
		}
		if n := key.count(); n < 100 || n > 6*24*5 {
			t.Errorf("%d attempts in five days", n)
		}
		time.Sleep(12 * time.Hour)
		if err := m.Expiring(); !errors.Is(err, ErrExpiring) || m.Err() != nil {
			t.Errorf("after five days and a half: expiring %v, err %v", err, m.Err())
		}
		time.Sleep(36 * time.Hour)
		synctest.Wait()
		if err := m.Err(); !errors.Is(err, ErrExpired) {
			t.Errorf("after seven days: %v, want ErrExpired", err)
		}
		if text := log.String(); !strings.Contains(text, "TUF metadata expires soon") || !strings.Contains(text, "TUF timestamp not refreshed") {
			t.Errorf("the log says nothing of it:\n%.2000s", text)
		}
		key.set(nil)
		time.Sleep(maxDelay)
		synctest.Wait()
		if err := errors.Join(m.Err(), m.Expiring()); err != nil {
			t.Errorf("with the token back: %v", err)
		}
	})
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func TestOpenMirrorRefuses(t *testing.T) {
	p := newPeople(2)
	repo := p.genesis(t, someTargets())
	c := &clock{now: start}
	open := func(repo *Repository, key hsm.Key, state string) error {
		m, err := OpenMirror(t.Context(), MirrorConfig{Repository: repo, State: state, Key: key, Now: c.Now, Logger: slog.New(slog.DiscardHandler)})
		if err == nil {
			m.Close()
		}
		return err
	}
	if err := open(repo, p.custodians[0], t.TempDir()); !errors.Is(err, ErrForeign) {
		t.Errorf("another key: %v, want ErrForeign", err)
	}
	away := &failing{Key: p.online, err: hsm.ErrLost}
	if err := open(must(repo.withoutOnline())(t), away, t.TempDir()); !errors.Is(err, hsm.ErrLost) {
		t.Errorf("nothing signed and the token away: %v, want ErrLost", err)
	}
	c.now = start.AddDate(0, 0, 6)
	if err := open(repo, away, t.TempDir()); err != nil {
		t.Errorf("a timestamp that is good for a day, and the token away: %v", err)
	}
	c.now = start.AddDate(0, 0, 7)
	if err := open(repo, away, t.TempDir()); !errors.Is(err, hsm.ErrLost) {
		t.Errorf("an expired timestamp, and the token away: %v, want ErrLost", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := open(repo, p.online, file); err == nil {
		t.Error("a state folder that is a file")
	}
}

// TestMirrorState: the state may be anything, and versions never go back.
func TestMirrorState(t *testing.T) {
	p := newPeople(2)
	first := p.genesis(t, someTargets())
	// What the service served: two refreshes after the ceremony.
	prepare := func(t *testing.T) (state string, snapshot, timestamp int64) {
		state = t.TempDir()
		c := &clock{now: start.AddDate(0, 0, 3)}
		m := newMirror(t, p, first, state, c.Now)
		m.Close()
		snapshot, timestamp = served(t, m).OnlineVersions()
		return state, snapshot, timestamp
	}
	next := append(someTargets(), Target{Name: "new.pub", Content: []byte("new")})
	second := p.assemble(t, first.RootFiles(), 2, next, start.AddDate(0, 0, 1))
	rekeyed := func() (*people, *Repository) {
		q := &people{custodians: []hsm.Key{p.custodians[1], hsmtest.SoftwareKey(hsm.ECDSAP256)}, online: hsmtest.SoftwareKey(hsm.ECDSAP256)}
		q.layout = q.newLayout(2)
		draft := must(NewRoot(q.layout, first.Root(), start))(t)
		root2 := signed(t, draft, p.custodians[0], p.custodians[1], q.custodians[1])
		return q, q.assemble(t, append(first.RootFiles(), root2), 2, next, start.AddDate(0, 0, 1))
	}
	q, third := rekeyed()
	now := start.AddDate(0, 0, 3).Add(time.Hour)
	for _, tc := range []struct {
		name   string
		damage func(t *testing.T, state string)
		repo   *Repository
		people *people
		signs  bool // a new timestamp
	}{
		{"as it was", nil, first, p, false},
		{"lost", func(t *testing.T, state string) { remove(t, state, "*") }, first, p, true},
		{"without the snapshot", func(t *testing.T, state string) { remove(t, state, "*.snapshot.json") }, first, p, true},
		{"a partial file more", func(t *testing.T, state string) { write(t, state, durable.Partial(TimestampName), "{") }, first, p, false},
		{"torn timestamp", func(t *testing.T, state string) { write(t, state, TimestampName, `{"signatures"`) }, first, p, true},
		{"empty timestamp", func(t *testing.T, state string) { write(t, state, TimestampName, "") }, first, p, true},
		{"huge timestamp", func(t *testing.T, state string) { write(t, state, TimestampName, strings.Repeat("x", MaxFile+1)) }, first, p, true},
		{"timestamp is a link", func(t *testing.T, state string) {
			remove(t, state, TimestampName)
			if err := os.Symlink("/etc/passwd", filepath.Join(state, TimestampName)); err != nil {
				t.Fatal(err)
			}
		}, first, p, true},
		{"new targets from the custodians", nil, second, p, true},
		{"new root with another online key", nil, third, q, true},
		{"state of another repository", func(t *testing.T, state string) {
			other := newPeople(2)
			m := newMirror(t, other, must(other.genesis(t, someTargets()).withoutOnline())(t), t.TempDir(), (&clock{now: now.AddDate(9, 0, 0)}).Now)
			defer m.Close()
			for _, f := range served(t, m).Files() {
				if f.Name == TimestampName || strings.HasSuffix(f.Name, ".snapshot.json") {
					write(t, state, f.Name, string(f.Content))
				}
			}
		}, first, p, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			state, snapshot, timestamp := prepare(t)
			if timestamp <= NextVersion(0, start) {
				t.Fatalf("the preparation signed nothing: version %d", timestamp)
			}
			if tc.damage != nil {
				tc.damage(t, state)
			}
			c := &clock{now: now}
			m := newMirror(t, tc.people, tc.repo, state, c.Now)
			repo := served(t, m)
			if err := repo.Expired(now); err != nil {
				t.Error(err)
			}
			s, v := repo.OnlineVersions()
			if s < snapshot || v < timestamp || (v > timestamp) != tc.signs {
				t.Errorf("snapshot %d, timestamp %d; before %d and %d; want a new one: %t", s, v, snapshot, timestamp, tc.signs)
			}
			if v > NextVersion(0, now) {
				t.Errorf("version %d is of the future", v)
			}
			m.Close()
			again := newMirror(t, tc.people, tc.repo, state, c.Now)
			if _, w := served(t, again).OnlineVersions(); w != v {
				t.Errorf("opened again: version %d, was %d", w, v)
			}
		})
	}
	t.Run("an old trust folder", func(t *testing.T) {
		state := t.TempDir()
		c := &clock{now: now}
		m := newMirror(t, p, must(second.withoutOnline())(t), state, c.Now)
		m.Close()
		_, err := OpenMirror(t.Context(), MirrorConfig{Repository: first, State: state, Key: p.online, Now: c.Now, Logger: slog.New(slog.DiscardHandler)})
		if !errors.Is(err, ErrVersion) {
			t.Errorf("%v, want ErrVersion", err)
		}
	})
}

func write(t testing.TB, dir, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func remove(t testing.TB, dir, pattern string) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(names) == 0 {
		t.Fatalf("nothing fits %s (%v)", pattern, err)
	}
	for _, name := range names {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
}
