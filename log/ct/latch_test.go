package ct_test

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/chancery-ca/chancery/log/ct"
	"github.com/chancery-ca/chancery/log/head"
)

// TestLatchedLogPromisesNothing: an older copy is restored. No SCT is signed,
// nothing is appended, and what cannot be proven is not shown; the head that
// everybody saw is.
func TestLatchedLogPromisesNothing(t *testing.T) {
	f := newFixture(t)
	f.fill(t, 3)
	f.publish(t)
	f.stop(t)
	old := copyDatabases(t, f.dir)
	f.start(t)
	f.fill(t, 4)
	anchored := f.publish(t)
	f.stop(t)
	restoreDatabases(t, old, f.dir)
	f.start(t, func(c *ct.Config) { c.Tree = f.heads.Tree() })
	signed := f.key.Count()

	precert := f.leaf(t, poison)
	_, err := f.log.Promise(t.Context(), issuerKeyHash(f.issuer), tbs(t, precert))
	if !errors.Is(err, ct.ErrUnavailable) || !errors.Is(err, head.ErrFork) {
		t.Errorf("promise: error %v, want ErrUnavailable and head.ErrFork", err)
	}
	for _, path := range []string{"/ct/v1/add-pre-chain", "/ct/v1/add-chain"} {
		if resp, body := f.post(t, path, chainBody(t, f.chain(f.leaf(t, poison))...)); resp.StatusCode/100 == 2 {
			t.Errorf("%s: %d %s", path, resp.StatusCode, body)
		}
	}
	if resp, body := f.post(t, "/ct/v1/add-pre-chain", chainBody(t, f.chain(precert)...)); resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("add-pre-chain: %d %s", resp.StatusCode, body)
	}
	if n := f.key.Count() - signed; n != 0 {
		t.Errorf("%d signatures in a latched log", n)
	}
	if size := f.tree.Root().Size; size != 3 {
		t.Errorf("the tree has %d leaves, want 3", size)
	}
	for path, want := range map[string]int{
		"/checkpoint":                                 200,
		"/ct/v1/get-sth":                              200,
		"/ct/v1/get-roots":                            200,
		"/ct/v1/get-entries?start=0&end=0":            503,
		"/ct/v1/get-sth-consistency?first=1&second=2": 503,
		"/tile/0/000.p/7":                             503,
	} {
		if resp, body := f.get(t, path); resp.StatusCode != want {
			t.Errorf("%s: %d, want %d: %s", path, resp.StatusCode, want, body)
		}
	}
	if diff := cmp.Diff(anchored.Head, f.heads.Latest().Head); diff != "" {
		t.Errorf("published head (-want +got):\n%s", diff)
	}
}

// copyDatabases copies the database files of a log that is stopped.
func copyDatabases(t *testing.T, dir string) string {
	t.Helper()
	to := t.TempDir()
	copyFiles(t, dir, to)
	return to
}

// restoreDatabases puts a copy in the place of what is there.
func restoreDatabases(t *testing.T, from, dir string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.db*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
	copyFiles(t, from, dir)
}

func copyFiles(t *testing.T, from, to string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(from, "*.db*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%d files: %v", len(files), err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err == nil {
			err = os.WriteFile(filepath.Join(to, filepath.Base(file)), data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}
