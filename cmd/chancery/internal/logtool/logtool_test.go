package logtool_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"database/sql"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/labstack/echo/v4"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/chancery-ca/chancery/cmd/chancery/internal/logtool"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/logtool/logtooltest"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/rekor"
	"github.com/chancery-ca/chancery/log/tree"
)

// leaves is the size of the large log: enough for a full run of hashes at
// level 1.
const leaves = 66 * 256

// large is a stopped service with a signature log of that many leaves and a CT
// log of 300. Tests copy it.
var large = sync.OnceValues(func() (*logtooltest.Service, error) {
	dir, err := folder()
	if err != nil {
		return nil, err
	}
	s, err := logtooltest.Create(dir)
	if err != nil {
		return nil, err
	}
	return s, errors.Join(s.Start(), s.Fill(logtooltest.Rekor, leaves), s.Fill(logtooltest.CT, 300), s.Stop())
})

// folders are those that tests share.
var folders []string

// folder makes a folder that outlives a test.
func folder() (string, error) {
	dir, err := os.MkdirTemp("", "logtool-")
	folders = append(folders, dir)
	return dir, err
}

func TestMain(m *testing.M) {
	code := m.Run()
	for _, dir := range folders {
		_ = os.RemoveAll(dir)
	}
	os.Exit(code)
}

func copyOfLarge(t *testing.T) *logtooltest.Service {
	t.Helper()
	s, err := large()
	logtooltest.Must(t, err)
	c, err := s.Copy(filepath.Join(t.TempDir(), "service"))
	logtooltest.Must(t, err)
	return c
}

// small is a service of n leaves in each log.
func small(t *testing.T, n int) *logtooltest.Service {
	t.Helper()
	s, err := logtooltest.New(filepath.Join(t.TempDir(), "service"), n)
	logtooltest.Must(t, err)
	return s
}

func find(t *testing.T, s *logtooltest.Service, name string) []logtool.Log {
	t.Helper()
	logs, err := logtool.Find(s.Config, name)
	logtooltest.Must(t, err)
	return logs
}

// counter is a Progress that counts.
type counter struct{ began, ended, leaves int }

func (c *counter) Begin(string, uint64) (func(int), func()) {
	c.began++
	return func(n int) { c.leaves += n }, func() { c.ended++ }
}

func TestVerify(t *testing.T) {
	s := copyOfLarge(t)
	l := find(t, s, logtooltest.Rekor)[0]
	for _, test := range []struct {
		name   string
		from   uint64
		hashed uint64
		err    error
	}{
		{"all", 0, leaves, nil},
		{"from the middle of a bundle", 1000, leaves - 768, nil},
		{"from the end", leaves, 0, nil},
		{"from beyond the end", leaves + 1, 0, logtool.ErrNotProven},
	} {
		t.Run(test.name, func(t *testing.T) {
			var c counter
			r, err := l.Verify(t.Context(), test.from, &c)
			if !errors.Is(err, test.err) {
				t.Fatalf("error %v, want %v", err, test.err)
			}
			if err != nil {
				return
			}
			if r.Leaves != test.hashed || r.Tree.Size != leaves || r.Head.Size != leaves || c != (counter{1, 1, leaves}) {
				t.Errorf("%d leaves hashed of %d, progress %+v", r.Leaves, r.Tree.Size, c)
			}
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := l.Verify(ctx, 0, &counter{}); !errors.Is(err, context.Canceled) {
			t.Errorf("error %v, want Canceled", err)
		}
	})
}

// database opens the tree file of a log for writing, and closes it with the
// test.
func database(t *testing.T, s *logtooltest.Service, name string) *sql.DB {
	t.Helper()
	list, err := sql.Open("sqlite3", filepath.Join(s.Config.State, "log", "admin.db"))
	logtooltest.Must(t, err)
	defer list.Close()
	if name == "" {
		db, err := sql.Open("sqlite3", filepath.Join(s.Config.State, "log", "admin.db"))
		logtooltest.Must(t, err)
		return db
	}
	rows, err := list.Query("SELECT id, data FROM trees")
	logtooltest.Must(t, err)
	defer rows.Close()
	for rows.Next() {
		var id int64
		var data []byte
		logtooltest.Must(t, rows.Scan(&id, &data))
		if bytes.Contains(data, []byte(name)) {
			db, err := sql.Open("sqlite3", filepath.Join(s.Config.State, "log", fmt.Sprintf("tree-%d.db", id)))
			logtooltest.Must(t, err)
			return db
		}
	}
	t.Fatalf("no tree %s: %v", name, rows.Err())
	return nil
}

// flip changes one octet of a row; with mend its sum is made to fit, as an
// attacker would.
func flip(t *testing.T, db *sql.DB, table, key string, tag byte, row int64, at int, mend bool) {
	t.Helper()
	var data []byte
	var sum int64
	logtooltest.Must(t, db.QueryRow(fmt.Sprintf("SELECT data, sum FROM %s WHERE %s=?", table, key), row).Scan(&data, &sum))
	data[at] ^= 0x10
	if mend {
		b := append([]byte{tag}, binary.BigEndian.AppendUint64(nil, uint64(row))...)
		sum = int64(crc32.Checksum(append(b, data...), crc32.MakeTable(crc32.Castagnoli)))
	}
	_, err := db.Exec(fmt.Sprintf("UPDATE %s SET data=?, sum=? WHERE %s=?", table, key), data, sum, row)
	logtooltest.Must(t, err)
}

// TestVerifyFindsTampering: an octet changed in anything that is stored is
// found, and named.
func TestVerifyFindsTampering(t *testing.T) {
	const level = int64(1) << 58
	onFile := func(table, key string, tag byte, row int64, at int, mend bool) func(*testing.T, *logtooltest.Service) {
		return func(t *testing.T, s *logtooltest.Service) {
			db := database(t, s, logtooltest.Rekor)
			defer db.Close()
			flip(t, db, table, key, tag, row, at, mend)
		}
	}
	exec := func(name, statement string) func(*testing.T, *logtooltest.Service) {
		return func(t *testing.T, s *logtooltest.Service) {
			db := database(t, s, name)
			defer db.Close()
			_, err := db.Exec(statement)
			logtooltest.Must(t, err)
		}
	}
	anchor := func(at int64, mend bool) func(*testing.T, *logtooltest.Service) {
		return func(t *testing.T, s *logtooltest.Service) {
			path := filepath.Join(s.Config.State, "anchor", logtooltest.Rekor+".anchor")
			b, err := os.ReadFile(path)
			logtooltest.Must(t, err)
			b[at] ^= 0x10
			if mend {
				for _, slot := range [][]byte{b[:4096], b[4096:]} {
					sum := sha256.Sum256(slot[:4064])
					copy(slot[4064:], sum[:])
				}
			}
			logtooltest.Must(t, os.WriteFile(path, b, 0o600))
		}
	}
	newest := func(t *testing.T, s *logtooltest.Service) int64 {
		a, err := head.ReadAnchor(filepath.Join(s.Config.State, "anchor", logtooltest.Rekor+".anchor"))
		logtooltest.Must(t, err)
		return int64(a.Record.Sequence%2) * 4096
	}
	for _, test := range []struct {
		name   string
		tamper func(*testing.T, *logtooltest.Service)
		want   []string // all in the error
		err    error
	}{
		{"entry, rotten", onFile("entries", "idx", 'e', 700, 20, false), []string{"entries from", "row e/700"}, logtool.ErrDamaged},
		{"entry, forged", onFile("entries", "idx", 'e', 700, 20, true), []string{"entry 700 does not hash to what tile 0/2 and the tile above have"}, logtool.ErrDamaged},
		{"entry removed", exec(logtooltest.Rekor, "DELETE FROM entries WHERE idx=700"), []string{"entry 700: missing"}, logtool.ErrDamaged},
		{"entries swapped", exec(logtooltest.Rekor, "UPDATE entries SET idx=-1 WHERE idx=5; UPDATE entries SET idx=5 WHERE idx=6; UPDATE entries SET idx=6 WHERE idx=-1"), []string{"row e/5"}, logtool.ErrDamaged},
		{"leaf hash, rotten", onFile("runs", "id", 'r', level+4, 33, false), []string{"entries from 256", fmt.Sprintf("check table runs: check row r/%d", level+4)}, logtool.ErrDamaged},
		{"leaf hash, forged", onFile("runs", "id", 'r', level+4, 33, true), []string{"tile 0/1, hash 1 does not fit entry 257, which fits the tile above"}, logtool.ErrDamaged},
		{"tile hash, rotten", onFile("runs", "id", 'r', 2*level, 64, false), []string{"tile 1/0"}, logtool.ErrDamaged},
		{"tile hash, forged", onFile("runs", "id", 'r', 2*level, 64, true), []string{"tile 0/2 does not hash to hash 2 of tile 1/0"}, logtool.ErrDamaged},
		{"edge, rotten", onFile("tip", "slot", 't', 3, 9, false), []string{"row t/3"}, logtool.ErrDamaged},
		{"edge, forged", onFile("tip", "slot", 't', 3, 9, true), []string{"tile 0/64 does not hash to hash 64 of tile 1/0"}, logtool.ErrDamaged},
		{"root, rotten", onFile("tip", "slot", 't', 0, 30, false), []string{"row t/0"}, logtool.ErrDamaged},
		{"root, forged", onFile("tip", "slot", 't', 0, 30, true), []string{"root: the tiles give"}, logtool.ErrDamaged},
		{"facts", exec(logtooltest.Rekor, "UPDATE facts SET secret=zeroblob(16)"), []string{"row f/"}, logtool.ErrDamaged},
		{"lookup filter", exec(logtooltest.Rekor, "INSERT INTO generations VALUES (0, 0, 262144, zeroblob(64), 7)"), []string{"row g/0"}, logtool.ErrDamaged},
		{"lookup piece", exec(logtooltest.Rekor, "INSERT INTO buckets VALUES (3, zeroblob(64), 7)"), []string{"check table buckets", "row b/3"}, logtool.ErrDamaged},
		{"staged leaf", exec(logtooltest.Rekor, "INSERT INTO staged VALUES (1, x'00', x'00', 7)"), []string{"check table staged", "row s/1"}, logtool.ErrDamaged},
		{"list of trees", exec("", "UPDATE trees SET data=zeroblob(9)"), []string{"list of trees", "row a/"}, logtool.ErrDamaged},
		{"anchor, newest slot", func(t *testing.T, s *logtooltest.Service) { anchor(newest(t, s)+200, false)(t, s) }, []string{"anchor: slot"}, logtool.ErrDamaged},
		{"anchor, older slot", func(t *testing.T, s *logtooltest.Service) { anchor(4096-newest(t, s)+200, false)(t, s) }, []string{"anchor: slot"}, logtool.ErrDamaged},
		{"anchor, signature forged", func(t *testing.T, s *logtooltest.Service) { anchor(newest(t, s)+130, true)(t, s) }, []string{"signature of the anchored head"}, logtool.ErrNotProven},
		{"anchor, root forged", func(t *testing.T, s *logtooltest.Service) { anchor(newest(t, s)+80, true)(t, s) }, []string{"signature of the anchored head"}, logtool.ErrNotProven},
		{"anchor, key forged", func(t *testing.T, s *logtooltest.Service) { anchor(newest(t, s)+40, true)(t, s) }, []string{"head key has SPKI"}, logtool.ErrNotProven},
		{"anchor gone", func(t *testing.T, s *logtooltest.Service) {
			logtooltest.Must(t, os.Remove(filepath.Join(s.Config.State, "anchor", logtooltest.Rekor+".anchor")))
		}, []string{"the anchor is missing"}, logtool.ErrNotProven},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := copyOfLarge(t)
			test.tamper(t, s)
			logs, err := logtool.Find(s.Config, logtooltest.Rekor)
			logtooltest.Must(t, err)
			_, err = logs[0].Verify(t.Context(), 0, &counter{})
			if !errors.Is(err, test.err) {
				t.Fatalf("error %v, want %v", err, test.err)
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q does not name %q", err, want)
				}
			}
			// The other log is none the worse, but for a list that both share.
			if test.name != "list of trees" {
				if _, err := find(t, s, logtooltest.CT)[0].Verify(t.Context(), 0, &counter{}); err != nil {
					t.Errorf("the other log: %v", err)
				}
			}
		})
	}
}

// client reads a log from a web server as C2SP tlog-tiles: the tiles are
// authenticated by the tree hash alone.
type client struct {
	t    *testing.T
	base string
}

func (c *client) get(path string) []byte {
	c.t.Helper()
	resp, err := http.Get(c.base + "/" + path)
	logtooltest.Must(c.t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	logtooltest.Must(c.t, err)
	if resp.StatusCode != http.StatusOK {
		c.t.Fatalf("%s: %s", path, resp.Status)
	}
	return body
}

// Height implements tlog.TileReader.
func (c *client) Height() int { return 8 }

// ReadTiles implements tlog.TileReader.
func (c *client) ReadTiles(tiles []tlog.Tile) ([][]byte, error) {
	data := make([][]byte, len(tiles))
	for i, tile := range tiles {
		data[i] = c.get(strings.Replace(tile.Path(), "tile/8/", "tile/", 1))
	}
	return data, nil
}

// SaveTiles implements tlog.TileReader.
func (c *client) SaveTiles([]tlog.Tile, [][]byte) {}

// checkpoint returns the origin and the tree of the log.
func (c *client) checkpoint() (string, tlog.Tree) {
	c.t.Helper()
	lines := strings.Split(string(c.get("checkpoint")), "\n")
	size, err := strconv.ParseInt(lines[1], 10, 64)
	logtooltest.Must(c.t, err)
	root, err := base64.StdEncoding.DecodeString(lines[2])
	logtooltest.Must(c.t, err)
	return lines[0], tlog.Tree{N: size, Hash: tlog.Hash(root)}
}

// leaf cuts one entry from a bundle and returns the octets that are hashed.
func leaf(name string, bundle []byte) (value, rest []byte, issuers []string) {
	if name == logtooltest.Rekor {
		n := binary.BigEndian.Uint16(bundle)
		return bundle[2 : 2+n], bundle[2+n:], nil
	}
	n := int(bundle[10])<<16 | int(bundle[11])<<8 | int(bundle[12])
	end := 13 + n + 2 // timestamp, type, certificate, extensions
	value = append([]byte{0, 0}, bundle[:end]...)
	chain := int(binary.BigEndian.Uint16(bundle[end:]))
	for fp := bundle[end+2 : end+2+chain]; len(fp) > 0; fp = fp[32:] {
		issuers = append(issuers, hex.EncodeToString(fp[:32]))
	}
	return value, bundle[end+2+chain:], issuers
}

// TestExport: golang.org/x/mod's tile client accepts the exported logs over
// plain HTTP, with every entry.
func TestExport(t *testing.T) {
	s := copyOfLarge(t)
	dir := filepath.Join(t.TempDir(), "www")
	logs := find(t, s, "")
	list, err := logtool.Export(t.Context(), logs, dir, &counter{})
	logtooltest.Must(t, err)
	srv := httptest.NewServer(http.FileServer(http.Dir(dir)))
	defer srv.Close()
	for i, l := range logs {
		t.Run(l.Name, func(t *testing.T) {
			c := &client{t, srv.URL + "/" + l.Path}
			origin, head := c.checkpoint()
			if origin != l.Origin || uint64(head.N) != list[i].Head.Size || head.N < 300 {
				t.Fatalf("checkpoint of %s, %d leaves", origin, head.N)
			}
			word := map[string]string{logtooltest.CT: "data", logtooltest.Rekor: "entries"}[l.Name]
			hashes := tlog.TileHashReader(head, c)
			for first := int64(0); first < head.N; first += 256 {
				width := int(min(256, head.N-first))
				path := strings.Replace(tlog.Tile{H: 8, L: -1, N: first / 256, W: width}.Path(), "tile/8/data/", "tile/"+word+"/", 1)
				var indexes []int64
				var want []tlog.Hash
				bundle := c.get(path)
				for n := range width {
					var value []byte
					var issuers []string
					value, bundle, issuers = leaf(l.Name, bundle)
					indexes = append(indexes, tlog.StoredHashIndex(0, first+int64(n)))
					want = append(want, tlog.RecordHash(value))
					for _, issuer := range issuers {
						if sum := sha256.Sum256(c.get("issuer/" + issuer)); hex.EncodeToString(sum[:]) != issuer {
							t.Fatalf("issuer %s", issuer)
						}
					}
				}
				got, err := hashes.ReadHashes(indexes)
				logtooltest.Must(t, err)
				if diff := cmp.Diff(want, got); diff != "" || len(bundle) > 0 {
					t.Fatalf("bundle %s, %d octets over (-want +got):\n%s", path, len(bundle), diff)
				}
			}
		})
	}
	if _, err := logtool.Export(t.Context(), logs, dir, &counter{}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("export over an export: error %v, want ErrExist", err)
	}
}

// TestExportIsWhatIsServed: the files are the octets that the service serves.
func TestExportIsWhatIsServed(t *testing.T) {
	s := small(t, 300)
	dir := filepath.Join(t.TempDir(), "www")
	l := find(t, s, logtooltest.Rekor)[0]
	_, err := logtool.Export(t.Context(), []logtool.Log{l}, dir, &counter{})
	logtooltest.Must(t, err)
	logtooltest.Must(t, s.Start())
	t.Cleanup(func() { logtooltest.Must(t, s.Stop()) })
	served, err := rekor.New(rekor.Config{
		Tree: s.Trees[l.Name], Heads: s.Heads[l.Name], Origin: l.Origin, PublicKey: l.Public,
		Now: func() (time.Time, error) { return time.Now(), nil },
	})
	logtooltest.Must(t, err)
	e := echo.New()
	served.RegisterReads(e.Group("/log/log1"))
	files := 0
	err = fs.WalkDir(os.DirFS(dir), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		files++
		want, err := os.ReadFile(filepath.Join(dir, path))
		rec := httptest.NewRecorder()
		e.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/"+path, nil))
		if rec.Code != http.StatusOK || !bytes.Equal(rec.Body.Bytes(), want) {
			t.Errorf("%s: served %d, %d octets, exported %d", path, rec.Code, rec.Body.Len(), len(want))
		}
		return err
	})
	// A checkpoint, two tiles of hashes and one above, two bundles.
	if err != nil || files != 6 {
		t.Errorf("%d files: %v", files, err)
	}
}

// TestBackupUnderLoad: copies that are made while leaves come in are whole,
// and prefixes of the log; restored, they are behind the anchor and read-only.
func TestBackupUnderLoad(t *testing.T) {
	s := small(t, 50)
	logtooltest.Must(t, s.Start())
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			if err := errors.Join(s.Fill(logtooltest.CT, 40), s.Fill(logtooltest.Rekor, 40)); err != nil {
				done <- err
				return
			}
		}
	}()
	logs := find(t, s, "")
	backups := t.TempDir()
	var manifests []*logtool.Manifest
	for i := range 4 {
		<-s.Trees[logtooltest.CT].Changed()
		m, err := logtool.Backup(t.Context(), logs, filepath.Join(backups, strconv.Itoa(i)), time.Now())
		logtooltest.Must(t, err)
		manifests = append(manifests, m)
		for _, l := range logs { // and the others work beside the service, too
			st, err := l.Check(t.Context())
			logtooltest.Must(t, err)
			if st.State != logtool.Consistent {
				t.Fatalf("%s is %s: %s", l.Name, st.State, st.Reason)
			}
		}
	}
	close(stop)
	logtooltest.Must(t, <-done)
	before := manifests[3].Logs[0].Tree.Size
	for _, name := range []string{logtooltest.CT, logtooltest.Rekor} {
		logtooltest.Must(t, s.Fill(name, 1)) // at least one leaf is missing from each
	}
	for _, m := range manifests {
		for _, saved := range m.Logs {
			root, err := s.Trees[saved.Name].RootAt(t.Context(), saved.Tree.Size)
			if err != nil || root != tree.Hash(saved.Tree.Root) || saved.Tree.Size < 50 {
				t.Errorf("backup of %s with %d leaves is no prefix of the log: %v", saved.Name, saved.Tree.Size, err)
			}
		}
	}
	logtooltest.Must(t, s.Stop())
	if before <= manifests[0].Logs[0].Tree.Size {
		t.Errorf("no load: %d leaves in the first backup, %d in the last", manifests[0].Logs[0].Tree.Size, before)
	}
	last := filepath.Join(t.TempDir(), "last")
	_, err := logtool.Backup(t.Context(), logs, last, time.Now())
	logtooltest.Must(t, err)
	for i, m := range manifests {
		restore(t, s, filepath.Join(backups, strconv.Itoa(i)), logtool.Latched)
		// The service runs, and the logs are what they should be: read-only.
		logtooltest.Must(t, s.Start())
		for _, saved := range m.Logs {
			if err := s.Heads[saved.Name].Err(); !errors.Is(err, head.ErrFork) {
				t.Errorf("%s: error %v, want ErrFork", saved.Name, err)
			}
		}
		logtooltest.Must(t, s.Stop())
	}
	restore(t, s, last, logtool.Consistent)
	logtooltest.Must(t, s.Start())
	logtooltest.Must(t, errors.Join(s.Fill(logtooltest.CT, 3), s.Fill(logtooltest.Rekor, 3), s.Stop()))
	for _, l := range logs {
		if _, err := l.Verify(t.Context(), 0, &counter{}); err != nil {
			t.Error(err)
		}
	}
}

// restore puts a backup in the place of the logs of s.
func restore(t *testing.T, s *logtooltest.Service, from string, want logtool.State) {
	t.Helper()
	logs := find(t, s, "")
	if _, err := logtool.Restore(t.Context(), logs, from, &counter{}); !errors.Is(err, fs.ErrExist) {
		t.Fatalf("restore over logs: error %v, want ErrExist", err)
	}
	logtooltest.Must(t, os.RemoveAll(logs[0].Dir))
	list, err := logtool.Restore(t.Context(), logs, from, &counter{})
	logtooltest.Must(t, err)
	for _, st := range list {
		if st.State != want {
			t.Errorf("restored %s is %s (%s), want %s", st.Name, st.State, st.Reason, want)
		}
	}
}

// TestRestoreRefuses: what is not a whole backup of these logs leaves nothing.
func TestRestoreRefuses(t *testing.T) {
	edit := func(old, now string) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			path := filepath.Join(dir, "backup.json")
			b, err := os.ReadFile(path)
			logtooltest.Must(t, err)
			if !bytes.Contains(b, []byte(old)) {
				t.Fatalf("the manifest does not have %q", old)
			}
			logtooltest.Must(t, os.WriteFile(path, bytes.Replace(b, []byte(old), []byte(now), 1), 0o600))
		}
	}
	for _, test := range []struct {
		name string
		do   func(t *testing.T, dir string)
		want error
	}{
		{"no manifest", func(t *testing.T, dir string) { logtooltest.Must(t, os.Remove(filepath.Join(dir, "backup.json"))) }, logtool.ErrBackup},
		{"newer manifest", edit(`"version": 1`, `"version": 2`), logtool.ErrBackup},
		{"unknown field", edit(`"version": 1`, `"version": 1, "colour": 3`), logtool.ErrBackup},
		{"another log", edit(logtooltest.CT, "ct-ct2"), logtool.ErrBackup},
		{"another origin", edit(`"origin": "sig.example"`, `"origin": "other.example"`), logtool.ErrBackup},
		{"another size", edit(`"size": 30`, `"size": 31`), logtool.ErrBackup},
		{"a path", edit(`"admin.db"`, `"../admin.db"`), logtool.ErrBackup},
		{"missing file", func(t *testing.T, dir string) {
			logtooltest.Must(t, os.Remove(filepath.Join(dir, "log", "admin.db")))
		}, fs.ErrNotExist},
		{"flipped bit", func(t *testing.T, dir string) {
			path := filepath.Join(dir, "log", "admin.db")
			b, err := os.ReadFile(path)
			logtooltest.Must(t, err)
			b[len(b)/2] ^= 1
			logtooltest.Must(t, os.WriteFile(path, b, 0o600))
		}, logtool.ErrDamaged},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := small(t, 30)
			logs := find(t, s, "")
			dir := filepath.Join(t.TempDir(), "backup")
			_, err := logtool.Backup(t.Context(), logs, dir, time.Now())
			logtooltest.Must(t, err)
			test.do(t, dir)
			logtooltest.Must(t, os.RemoveAll(logs[0].Dir))
			if _, err := logtool.Restore(t.Context(), logs, dir, &counter{}); !errors.Is(err, test.want) {
				t.Errorf("error %v, want %v", err, test.want)
			}
			left, err := os.ReadDir(s.Config.State)
			logtooltest.Must(t, err)
			if len(left) != 2 || left[0].Name() != "anchor" || left[1].Name() != "audit" {
				t.Errorf("left in the state folder: %v", left)
			}
		})
	}
}

// TestBackupOfOldShards: a log that the configuration does not name any more
// is saved, proven and restored with the others.
func TestBackupOfOldShards(t *testing.T) {
	s := small(t, 300)
	current, all := find(t, s, logtooltest.Rekor), find(t, s, "")
	dir := filepath.Join(t.TempDir(), "backup")
	m, err := logtool.Backup(t.Context(), current, dir, time.Now())
	logtooltest.Must(t, err)
	if len(m.Logs) != 1 || len(m.Others) != 1 || m.Others[0].Name != logtooltest.CT || m.Others[0].Tree.Size != 300 {
		t.Errorf("manifest %+v", m)
	}
	if _, err := logtool.Restore(t.Context(), all, dir, &counter{}); !errors.Is(err, logtool.ErrBackup) {
		t.Errorf("with a log that the backup knows no head of: error %v, want ErrBackup", err)
	}
	logtooltest.Must(t, os.RemoveAll(all[0].Dir))
	var c counter
	_, err = logtool.Restore(t.Context(), current, dir, &c)
	logtooltest.Must(t, err)
	if c.leaves != 600 {
		t.Errorf("%d leaves proven, want 600", c.leaves)
	}
	if _, err := all[0].Verify(t.Context(), 0, &counter{}); err != nil {
		t.Error(err)
	}
}

// TestAcceptLoss: an operator's way from an old backup to a log that signs.
func TestAcceptLoss(t *testing.T) {
	s := small(t, 30)
	logs := find(t, s, "")
	dir := filepath.Join(t.TempDir(), "backup")
	_, err := logtool.Backup(t.Context(), logs, dir, time.Now())
	logtooltest.Must(t, err)
	logtooltest.Must(t, s.Start())
	logtooltest.Must(t, errors.Join(s.Fill(logtooltest.CT, 5), s.Stop()))
	logtooltest.Must(t, os.RemoveAll(logs[0].Dir))
	_, err = logtool.Restore(t.Context(), logs, dir, &counter{})
	logtooltest.Must(t, err)

	ct, other := logs[0], logs[1]
	if _, err := other.Lost(t.Context(), &counter{}); !errors.Is(err, logtool.ErrNothingLost) {
		t.Errorf("the other log: error %v, want ErrNothingLost", err)
	}
	st, err := ct.Lost(t.Context(), &counter{})
	logtooltest.Must(t, err)
	if st.Tree.Size != 30 || st.Head.Size != 35 {
		t.Fatalf("status %+v", st)
	}
	changed := *st
	changed.Tree.Root[0] ^= 1
	if _, err := ct.AcceptLoss(t.Context(), &changed, time.Now()); !errors.Is(err, logtool.ErrNotProven) {
		t.Errorf("another tree: error %v, want ErrNotProven", err)
	}
	logtooltest.Must(t, s.Start())
	if _, err := ct.AcceptLoss(t.Context(), st, time.Now()); !errors.Is(err, logtool.ErrRunning) {
		t.Errorf("beside the service: error %v, want ErrRunning", err)
	}
	logtooltest.Must(t, s.Stop())
	file, err := ct.AcceptLoss(t.Context(), st, time.Now())
	logtooltest.Must(t, err)
	checkIncident(t, file, st)

	after, err := ct.Check(t.Context())
	if err != nil || after.State != logtool.Accepted || after.AnchorSequence != st.AnchorSequence+1 {
		t.Errorf("status %+v, %v", after, err)
	}
	logtooltest.Must(t, s.Start())
	logtooltest.Must(t, errors.Join(s.Fill(logtooltest.CT, 5), s.Stop()))
	if after, err = ct.Check(t.Context()); err != nil || after.State != logtool.Consistent || after.Head.Size != 35 {
		t.Errorf("status %+v, %v", after, err)
	}
	if _, err := ct.Verify(t.Context(), 0, &counter{}); err != nil {
		t.Error(err)
	}
}

// TestForeignAnchor: neither another key nor another origin is a loss that
// could be accepted.
func TestForeignAnchor(t *testing.T) {
	for name, change := range map[string]func(t *testing.T, l *logtool.Log){
		"key": func(t *testing.T, l *logtool.Log) {
			l.Public = ecdsaKey(t, hsmtest.SoftwareKey(hsm.ECDSAP256))
			f, err := rekor.NewFormat(l.Origin, l.Public)
			logtooltest.Must(t, err)
			l.Format = f
		},
		"origin": func(t *testing.T, l *logtool.Log) {
			f, err := rekor.NewFormat("other.example", l.Public)
			logtooltest.Must(t, err)
			l.Format = f
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := small(t, 3)
			l := find(t, s, logtooltest.Rekor)[0]
			change(t, &l)
			st, err := l.Check(t.Context())
			if err != nil || st.State != logtool.Foreign {
				t.Errorf("status %+v, %v", st, err)
			}
			if _, err := l.Lost(t.Context(), &counter{}); !errors.Is(err, logtool.ErrNotProven) {
				t.Errorf("lost: error %v, want ErrNotProven", err)
			}
		})
	}
}

func TestFindRefuses(t *testing.T) {
	s := small(t, 1)
	if _, err := logtool.Find(s.Config, "ct-nowhere"); !errors.Is(err, logtool.ErrNoLog) {
		t.Errorf("unknown name: error %v, want ErrNoLog", err)
	}
	pub := filepath.Join(s.Config.Trust, "rekor.pub")
	other, err := os.ReadFile(filepath.Join(s.Config.Trust, "ct.pub"))
	logtooltest.Must(t, err)
	for name, content := range map[string][]byte{"another key": other, "no PEM": []byte("key"), "two": append(other, other...)} {
		logtooltest.Must(t, os.WriteFile(pub, content, 0o600))
		if _, err := logtool.Find(s.Config, ""); err == nil || !strings.Contains(err.Error(), "rekor.pub") {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

func ecdsaKey(t *testing.T, key hsm.Key) *ecdsa.PublicKey {
	t.Helper()
	pub, ok := key.Public().(*ecdsa.PublicKey)
	if !ok {
		t.Fatalf("key is a %T", key.Public())
	}
	return pub
}

// checkIncident holds an incident file against the status that was accepted.
func checkIncident(t *testing.T, file string, st *logtool.Status) {
	t.Helper()
	text, err := os.ReadFile(file)
	logtooltest.Must(t, err)
	var i logtool.Incident
	logtooltest.Must(t, json.Unmarshal(text, &i))
	if diff := cmp.Diff(*st.Head, *i.Lost); diff != "" {
		t.Errorf("head given up (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(st.Tree, i.Accepted); diff != "" {
		t.Errorf("tree accepted (-want +got):\n%s", diff)
	}
	if i.Log != st.Name || i.Origin != st.Origin || i.User == "" || i.AnchorSequence != st.AnchorSequence+1 ||
		!strings.HasPrefix(i.Checkpoint, st.Origin+"\n35\n") {
		t.Errorf("incident %+v", i)
	}
	// The new record names the one before it, whose octets are kept.
	slot := i.Anchor[st.AnchorSequence%2*4096:][:4096]
	if sum := sha256.Sum256(slot); sum != i.Replaced {
		t.Errorf("replaced %s, the record kept has %x", i.Replaced, sum)
	}
}
