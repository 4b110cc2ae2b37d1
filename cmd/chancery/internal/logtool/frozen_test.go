package logtool_test

import (
	"bytes"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/logtool"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/logtool/logtooltest"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/service"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// backUp copies anchor and database of the logs of a stopped service and returns
// what puts them back.
func backUp(t *testing.T, s *logtooltest.Service) (putBack func()) {
	t.Helper()
	old := filepath.Join(t.TempDir(), "old")
	for _, part := range []string{"anchor", "log"} {
		logtooltest.Must(t, os.CopyFS(filepath.Join(old, part), os.DirFS(filepath.Join(s.Config.State, part))))
	}
	return func() {
		for _, part := range []string{"anchor", "log"} {
			to := filepath.Join(s.Config.State, part)
			logtooltest.Must(t, errors.Join(os.RemoveAll(to), os.CopyFS(to, os.DirFS(filepath.Join(old, part)))))
		}
	}
}

// TestFrozenRollback: an old anchor with the old database that fits it is not
// where the log ended, by the record; without a record nothing can say so.
func TestFrozenRollback(t *testing.T) {
	record := func(s *logtooltest.Service, role hsm.Role, old map[hsm.Role]hsm.Key) string {
		spki, err := hsm.SPKIHash(old[role].Public())
		logtooltest.Must(t, err)
		return filepath.Join(s.Config.Trust, trust.LastHeadName(spki))
	}
	for _, test := range []struct {
		name string
		// from are the leaves when the copy is made that is put back, end and
		// last those when the head is put on record and when the logs end.
		from, end, last int
		change          func(t *testing.T, path string)
		want            string // "": frozen
	}{
		{"ends as on record", 20, 20, 20, nil, ""},
		{"put back", 10, 20, 20, nil, "the anchored head has 10 leaves, the one on record"},
		{"went on after the record", 30, 20, 30, nil, "the log went on after its end was recorded"},
		{"put back, never recorded", 10, 20, 20, func(t *testing.T, path string) { logtooltest.Must(t, os.Remove(path)) }, ""},
		{"a record of nothing", 20, 20, 20, func(t *testing.T, path string) { logtooltest.Must(t, os.WriteFile(path, nil, 0o600)) }, trust.ErrLastHead.Error()},
		{"a record that was changed", 20, 20, 20, func(t *testing.T, path string) {
			b, err := os.ReadFile(path)
			logtooltest.Must(t, err)
			logtooltest.Must(t, os.WriteFile(path, bytes.Replace(b, []byte("20"), []byte("10"), 1), 0o600))
		}, trust.ErrLastHead.Error()},
		{"a folder", 20, 20, 20, func(t *testing.T, path string) {
			logtooltest.Must(t, errors.Join(os.Remove(path), os.Mkdir(path, 0o700)))
		}, "is a directory"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := small(t, 10)
			old := s.Keys
			fill := func(from, to int) {
				logtooltest.Must(t, errors.Join(s.Start(), s.Fill(logtooltest.CT, to-from), s.Fill(logtooltest.Rekor, to-from), s.Stop()))
			}
			putBack := backUp(t, s)
			fill(10, test.end)
			logtooltest.Must(t, errors.Join(s.Record(logtooltest.CT, old), s.Record(logtooltest.Rekor, old)))
			records := map[string][]byte{}
			for _, role := range []hsm.Role{hsm.RoleCT, hsm.RoleRekor} {
				path := record(s, role, old)
				b, err := os.ReadFile(path)
				logtooltest.Must(t, err)
				records[path] = b
			}
			if test.last > test.end {
				fill(test.end, test.last)
			}
			if test.from == 10 {
				putBack()
			}
			logtooltest.Must(t, s.Rotate())
			for path, b := range records {
				logtooltest.Must(t, os.WriteFile(path, b, 0o600))
				if test.change != nil {
					test.change(t, path)
				}
			}
			for _, name := range []string{logtooltest.CT, logtooltest.Rekor} {
				st, err := find(t, s, name)[0].Check(t.Context())
				logtooltest.Must(t, err)
				if state := st.State; (state == logtool.Frozen) != (test.want == "") || !strings.Contains(st.Reason, test.want) || errors.Is(st.Err(), logtool.ErrFrozen) != (test.want != "") {
					t.Errorf("%s is %s: %s, want %q", name, state, st.Reason, test.want)
				}
				if _, err := find(t, s, name)[0].Verify(t.Context(), 0, &counter{}); errors.Is(err, logtool.ErrFrozen) != (test.want != "") {
					t.Errorf("verify %s: %v", name, err)
				}
			}
		})
	}
}

// rotatedOnce is a stopped service whose logs of 300 leaves have successors of 5.
var rotatedOnce = sync.OnceValues(func() (*logtooltest.Service, error) {
	dir, err := folder()
	if err != nil {
		return nil, err
	}
	s, err := logtooltest.New(dir, 300)
	if err != nil {
		return nil, err
	}
	return s, errors.Join(s.Rotate(), s.Start(), s.Fill(logtooltest.NextCT, 5), s.Fill(logtooltest.NextRekor, 5), s.Stop())
})

func rotated(t *testing.T) *logtooltest.Service {
	t.Helper()
	s, err := rotatedOnce()
	logtooltest.Must(t, err)
	c, err := s.Copy(filepath.Join(t.TempDir(), "service"))
	logtooltest.Must(t, err)
	return c
}

// ownState gives the service a state folder in which no old shard ever was.
func ownState(t *testing.T, s *logtooltest.Service) {
	t.Helper()
	s.Config.State = filepath.Join(s.Dir, "state2")
	logtooltest.Must(t, service.Create(t.Context(), s.Config, service.Options{Logger: slog.New(slog.DiscardHandler)}))
}

func anchorOf(s *logtooltest.Service, name string) string {
	return filepath.Join(s.Config.State, "anchor", name+".anchor")
}

// TestFrozen: old shards are shown and verified beside the new ones, with the keys
// of the trusted root.
func TestFrozen(t *testing.T) {
	s := rotated(t)
	got := map[string]logtool.State{}
	for _, l := range find(t, s, "") {
		r, err := l.Verify(t.Context(), 0, &counter{})
		if err != nil {
			t.Fatal(err)
		}
		st, err := l.Check(t.Context())
		if err != nil || st.Err() != nil || st.Pending != 0 || st.Head.Size != r.Leaves || *st.Head != (logtool.Point{Size: r.Tree.Size, Root: r.Tree.Root, Time: st.Head.Time}) {
			t.Errorf("%s: status %+v, %v", l.Name, st, err)
		}
		got[st.Origin+" "+l.Name] = st.State
	}
	want := map[string]logtool.State{
		"sig.example/ct/ct2 ct-ct2": logtool.Consistent, "sig.example rekor-log2": logtool.Consistent,
		"sig.example/ct/ct1 ct-ct1": logtool.Frozen, "sig.example rekor-log1": logtool.Frozen,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("states (-want +got):\n%s", diff)
	}
	dir := filepath.Join(t.TempDir(), "www")
	_, err := logtool.Export(t.Context(), find(t, s, ""), dir, &counter{})
	logtooltest.Must(t, err)
	for path, first := range map[string]string{"ct/ct1": "sig.example/ct/ct1\n300\n", "log/log1/api/v2": "sig.example\n300\n", "log/log2/api/v2": "sig.example\n5\n"} {
		if b, err := os.ReadFile(filepath.Join(dir, path, "checkpoint")); err != nil || !strings.HasPrefix(string(b), first) {
			t.Errorf("checkpoint of %s: %q, %v", path, b, err)
		}
	}
	if _, err := find(t, s, logtooltest.CT)[0].Lost(t.Context(), &counter{}); !errors.Is(err, logtool.ErrFrozen) {
		t.Errorf("a loss of a frozen log: error %v, want ErrFrozen", err)
	}
}

// TestFrozenFinds: whatever is changed in an old shard, or gone, is said, and the
// current shards are as they were.
func TestFrozenFinds(t *testing.T) {
	edit := func(name string, at int) func(*testing.T, *logtooltest.Service) {
		return func(t *testing.T, s *logtooltest.Service) {
			b, err := os.ReadFile(anchorOf(s, name))
			logtooltest.Must(t, err)
			b[at] ^= 0x10
			b[4096+at] ^= 0x10
			logtooltest.Must(t, os.WriteFile(anchorOf(s, name), b, 0o600))
		}
	}
	for _, test := range []struct {
		name   string
		tamper func(*testing.T, *logtooltest.Service)
		state  logtool.State
		err    error  // of Verify
		want   string // in it
	}{
		{"nothing", func(*testing.T, *logtooltest.Service) {}, logtool.Frozen, nil, ""},
		{"never here", ownState, logtool.Absent, nil, ""},
		{"an anchor alone", func(t *testing.T, s *logtooltest.Service) {
			b, err := os.ReadFile(anchorOf(s, logtooltest.Rekor))
			logtooltest.Must(t, err)
			ownState(t, s)
			logtooltest.Must(t, os.WriteFile(anchorOf(s, logtooltest.Rekor), b, 0o600))
		}, logtool.Unproven, logtool.ErrFrozen, "its tree is missing"},
		{"tree file gone", func(t *testing.T, s *logtooltest.Service) {
			db := database(t, s, logtooltest.Rekor)
			defer db.Close()
			var seq, name, file string
			logtooltest.Must(t, db.QueryRow("PRAGMA database_list").Scan(&seq, &name, &file))
			logtooltest.Must(t, os.Remove(file))
		}, logtool.Unproven, logtool.ErrFrozen, "its tree is missing"},
		{"anchor gone", func(t *testing.T, s *logtooltest.Service) {
			logtooltest.Must(t, os.Remove(anchorOf(s, logtooltest.Rekor)))
		}, logtool.Unproven, logtool.ErrFrozen, "the anchor is missing"},
		{"anchor damaged", edit(logtooltest.Rekor, 200), logtool.Unproven, logtool.ErrFrozen, "the anchor is damaged"},
		{"anchor of the successor", func(t *testing.T, s *logtooltest.Service) {
			b, err := os.ReadFile(anchorOf(s, logtooltest.NextRekor))
			logtooltest.Must(t, err)
			logtooltest.Must(t, os.WriteFile(anchorOf(s, logtooltest.Rekor), b, 0o600))
		}, logtool.Unproven, logtool.ErrFrozen, "SPKI"},
		{"another key in the trusted root", func(t *testing.T, s *logtooltest.Service) {
			other := hsmtest.SoftwareKey(hsm.ECDSAP256)
			logtooltest.Must(t, s.WriteRoot(map[hsm.Role]hsm.Key{hsm.RoleCT: other, hsm.RoleRekor: other}))
		}, logtool.Unproven, logtool.ErrFrozen, "SPKI"},
		{"leaf flipped", func(t *testing.T, s *logtooltest.Service) {
			db := database(t, s, logtooltest.Rekor)
			defer db.Close()
			flip(t, db, "entries", "idx", 'e', 7, 20, true)
		}, logtool.Frozen, logtool.ErrDamaged, "entry 7 does not hash"},
		{"root flipped", func(t *testing.T, s *logtooltest.Service) {
			db := database(t, s, logtooltest.Rekor)
			defer db.Close()
			flip(t, db, "tip", "slot", 't', 0, 30, true)
		}, logtool.Frozen, logtool.ErrDamaged, "root: the tiles give"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := rotated(t)
			test.tamper(t, s)
			l := find(t, s, logtooltest.Rekor)[0]
			st, err := l.Check(t.Context())
			if err != nil || st.State != test.state || (st.Err() != nil) != (test.state == logtool.Unproven) {
				t.Fatalf("status %+v, %v, want %s", st, err, test.state)
			}
			_, err = l.Verify(t.Context(), 0, &counter{})
			if !errors.Is(err, test.err) || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %v with %q", err, test.err, test.want)
			}
			for _, name := range []string{logtooltest.NextRekor, logtooltest.NextCT} {
				if st, err := find(t, s, name)[0].Check(t.Context()); err != nil || st.State != logtool.Consistent {
					t.Errorf("%s: status %+v, %v", name, st, err)
				}
			}
		})
	}
}

// TestFrozenGrew: leaves that came after the last head are nobody's word.
func TestFrozenGrew(t *testing.T) {
	s := small(t, 10)
	logtooltest.Must(t, s.Start())
	for _, name := range []string{logtooltest.CT, logtooltest.Rekor} {
		leaf, err := logtooltest.Leaf(name, 10)
		logtooltest.Must(t, err)
		_, _, err = s.Trees[name].Append(t.Context(), leaf)
		logtooltest.Must(t, err)
	}
	logtooltest.Must(t, errors.Join(s.Stop(), s.Rotate()))
	for _, name := range []string{logtooltest.CT, logtooltest.Rekor} {
		l := find(t, s, name)[0]
		st, err := l.Check(t.Context())
		if err != nil || st.State != logtool.Unproven || st.Pending != 1 || st.Head.Size != 10 || st.Tree.Size != 11 {
			t.Errorf("status %+v, %v", st, err)
		}
		if _, err := l.Verify(t.Context(), 0, &counter{}); !errors.Is(err, logtool.ErrFrozen) || !strings.Contains(err.Error(), "1 leaves after the last head") {
			t.Errorf("error %v, want ErrFrozen", err)
		}
		if _, err := logtool.Export(t.Context(), []logtool.Log{l}, filepath.Join(t.TempDir(), "www"), &counter{}); !errors.Is(err, logtool.ErrFrozen) {
			t.Errorf("export: error %v, want ErrFrozen", err)
		}
	}
	// It does not keep the current shards from being saved.
	logtooltest.Must(t, s.Start())
	logtooltest.Must(t, errors.Join(s.Fill(logtooltest.NextCT, 2), s.Fill(logtooltest.NextRekor, 2), s.Stop()))
	m, err := logtool.Backup(t.Context(), find(t, s, ""), filepath.Join(t.TempDir(), "backup"), time.Now())
	if err != nil || len(m.Logs) != 2 || len(m.Others) != 2 || m.Others[0].Head != nil || m.Others[0].Tree.Size != 11 {
		t.Errorf("backup %+v, %v", m, err)
	}
}

// TestFrozenBackup: old shards are saved and restored with their last heads.
func TestFrozenBackup(t *testing.T) {
	s := rotated(t)
	logs := find(t, s, "")
	dir := filepath.Join(t.TempDir(), "backup")
	m, err := logtool.Backup(t.Context(), logs, dir, time.Now())
	logtooltest.Must(t, err)
	if len(m.Logs) != 2 || len(m.Others) != 2 {
		t.Fatalf("manifest %+v", m)
	}
	for _, saved := range m.Others {
		if saved.Head == nil || saved.Head.Size != 300 || !strings.HasPrefix(saved.Checkpoint, saved.Origin+"\n300\n") {
			t.Errorf("an old shard is saved as %+v", saved)
		}
	}
	logtooltest.Must(t, os.RemoveAll(logs[0].Dir))
	logtooltest.Must(t, os.Remove(anchorOf(s, logtooltest.CT)))
	list, err := logtool.Restore(t.Context(), logs, dir, &counter{})
	logtooltest.Must(t, err)
	got := map[string]logtool.State{}
	for _, st := range list {
		got[st.Name] = st.State
	}
	want := map[string]logtool.State{
		logtooltest.NextCT: logtool.Consistent, logtooltest.NextRekor: logtool.Consistent,
		logtooltest.CT: logtool.Unproven, logtooltest.Rekor: logtool.Frozen,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("restored (-want +got):\n%s", diff)
	}
}

// TestFrozenElsewhere: what the trusted root names and is not here is passed over,
// unless it alone is asked for.
func TestFrozenElsewhere(t *testing.T) {
	s := rotated(t)
	ownState(t, s)
	logtooltest.Must(t, s.Start())
	logtooltest.Must(t, errors.Join(s.Fill(logtooltest.NextCT, 2), s.Fill(logtooltest.NextRekor, 2), s.Stop()))
	dir := filepath.Join(t.TempDir(), "www")
	list, err := logtool.Export(t.Context(), find(t, s, ""), dir, &counter{})
	if err != nil || !slices.ContainsFunc(list, func(st logtool.Status) bool { return st.State == logtool.Absent }) {
		t.Errorf("exported %+v, %v", list, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "log", "log1")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("folder of an old shard: %v", err)
	}
	if _, err := logtool.Export(t.Context(), find(t, s, logtooltest.Rekor), filepath.Join(t.TempDir(), "www"), &counter{}); !errors.Is(err, logtool.ErrNoLog) {
		t.Errorf("one that is not here: error %v, want ErrNoLog", err)
	}
	logtooltest.Must(t, os.WriteFile(filepath.Join(s.Config.Trust, "trusted_root.json"), []byte("{}"), 0o600))
	if _, err := logtool.Find(s.Config, ""); err == nil {
		t.Error("a trusted root that is none is read")
	}
}
