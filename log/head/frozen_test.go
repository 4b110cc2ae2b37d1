package head

import (
	"crypto/ecdsa"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/log/tree"
	"github.com/google/go-cmp/cmp"
)

// A log that takes no more leaves shows its last head without its key.
func TestFrozen(t *testing.T) {
	f := newFixture(t).open()
	f.add(3)
	last := f.await(3)
	f.close()
	f.openTree()
	pub := f.key.Public().(*ecdsa.PublicKey)
	format := func(origin string) (Format, error) { return checkpoint(origin), nil }
	before := f.key.Count()
	frozen, err := OpenFrozen(t.Context(), f.tree, f.anchor(), pub, format)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(last, frozen.Latest()); diff != "" || frozen.Err() != nil {
		t.Errorf("last head (-want +got), %v:\n%s", frozen.Err(), diff)
	}
	if got, err := frozen.Await(t.Context(), 3); err != nil || got.Size != 3 {
		t.Errorf("await 3: %d, %v", got.Size, err)
	}
	if _, err := frozen.Await(t.Context(), 4); !errors.Is(err, ErrClosed) {
		t.Errorf("await 4: error %v, want ErrClosed", err)
	}
	if n := f.key.Count() - before; n != 0 {
		t.Errorf("%d signatures", n)
	}

	unused, damaged := filepath.Join(t.TempDir(), "unused"), filepath.Join(t.TempDir(), "damaged")
	if err := errors.Join(CreateAnchor(unused), os.WriteFile(damaged, make([]byte, 2*slotSize), 0o600)); err != nil {
		t.Fatal(err)
	}
	other := newFixture(t)
	for name, tc := range map[string]struct {
		tree   tree.Tree
		anchor string
		pub    *ecdsa.PublicKey
		format func(string) (Format, error)
		want   error
	}{
		"no anchor":      {f.tree, unused + "x", pub, format, fs.ErrNotExist},
		"no head":        {f.tree, unused, pub, format, ErrAnchor},
		"damaged":        {f.tree, damaged, pub, format, ErrDamaged},
		"another key":    {f.tree, f.anchor(), hsmtest.SoftwareKey(hsm.ECDSAP256).Public().(*ecdsa.PublicKey), format, ErrMismatch},
		"another format": {f.tree, f.anchor(), pub, func(o string) (Format, error) { return suffixed{checkpoint(o)}, nil }, ErrMismatch},
		"a bad origin":   {f.tree, f.anchor(), pub, func(string) (Format, error) { return nil, errors.New("bad") }, ErrMismatch},
		"a smaller tree": {other.tree, f.anchor(), pub, format, ErrFork},
	} {
		if _, err := OpenFrozen(t.Context(), tc.tree, tc.anchor, tc.pub, tc.format); !errors.Is(err, tc.want) {
			t.Errorf("%s: error %v, want %v", name, err, tc.want)
		}
	}
	other.next.Store(100)
	other.open()
	other.add(3)
	other.await(3)
	if _, err := OpenFrozen(t.Context(), other.tree, f.anchor(), pub, format); !errors.Is(err, ErrFork) {
		t.Errorf("another tree: error %v, want ErrFork", err)
	}
}
