package head

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func record(n uint64) Record {
	r := Record{Sequence: n, Epoch: 3, SPKI: [32]byte{1, 2}}
	r.Head = Head{Size: 10 * n, Root: [32]byte{byte(n)}, Time: time.UnixMilli(int64(1000 + n)).UTC()}
	r.Signature = bytes.Repeat([]byte{byte(n)}, 70)
	r.Note = []byte(strings.Repeat("note\n", int(n)))
	return r
}

// anchorWith makes an anchor file with the records 1 to n.
func anchorWith(t testing.TB, n uint64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "anchor")
	if err := CreateAnchor(path); err != nil {
		t.Fatal(err)
	}
	a := mustOpen(t, path)
	for i := range n {
		if err := a.Store(record(i + 1)); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func mustOpen(t testing.TB, path string) *FileAnchor {
	t.Helper()
	a, err := OpenAnchor(path)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// load opens the anchor as a new process would.
func load(t testing.TB, path string) (Record, bool, error) {
	t.Helper()
	a := mustOpen(t, path)
	defer a.Close()
	return a.Load()
}

func wantRecord(t testing.TB, path string, n uint64) {
	t.Helper()
	got, ok, err := load(t, path)
	if err != nil || ok != (n > 0) {
		t.Fatalf("ok %v: %v", ok, err)
	}
	want := Record{}
	if n > 0 {
		want = record(n)
	} else {
		want.Signature, want.Note = []byte{}, []byte{}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("record (-want +got):\n%s", diff)
	}
}

func TestAnchorKeepsTheLastRecord(t *testing.T) {
	for n := range uint64(5) {
		path := anchorWith(t, n)
		wantRecord(t, path, n)
		if info, err := os.Stat(path); err != nil || info.Size() != 2*slotSize || info.Mode() != 0o600 {
			t.Errorf("after %d records: %v, %v", n, info, err)
		}
	}
}

// TestAnchorTornWrites tears the write of every record from 1 to 4 at every
// 512 octets, with each kind of remainder a disk may leave.
func TestAnchorTornWrites(t *testing.T) {
	for n := uint64(1); n <= 4; n++ {
		path := anchorWith(t, n-1)
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		slot, err := record(n).marshal()
		if err != nil {
			t.Fatal(err)
		}
		at := int(n%2) * slotSize
		for cut := 0; cut <= slotSize; cut += 512 {
			for name, tear := range map[string]func(old, now []byte) []byte{
				"head is new": func(old, now []byte) []byte { return append(bytes.Clone(now[:cut]), old[cut:]...) },
				"tail is new": func(old, now []byte) []byte { return append(bytes.Clone(old[:cut]), now[cut:]...) },
				"zeros":       func(_, now []byte) []byte { return append(bytes.Clone(now[:cut]), make([]byte, slotSize-cut)...) },
				"one sector is": func(old, now []byte) []byte {
					b := bytes.Clone(now)
					copy(b[cut:min(cut+512, slotSize)], old[cut:])
					return b
				},
			} {
				file := bytes.Clone(before)
				copy(file[at:], tear(before[at:at+slotSize], slot))
				if err := os.WriteFile(path, file, 0o600); err != nil {
					t.Fatal(err)
				}
				want := n - 1
				if bytes.Equal(file[at:at+slotSize], slot) {
					want = n
				}
				t.Logf("record %d, %s at %d", n, name, cut)
				wantRecord(t, path, want)
				// It goes on from there.
				a := mustOpen(t, path)
				if err := a.Store(record(want + 1)); err != nil {
					t.Fatal(err)
				}
				a.Close()
				wantRecord(t, path, want+1)
			}
		}
	}
}

func TestAnchorBitFlips(t *testing.T) {
	path := anchorWith(t, 4) // record 4 in slot 0, record 3 in slot 1
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	flip := func(bits ...int) {
		t.Helper()
		b := bytes.Clone(good)
		for _, i := range bits {
			b[i/8] ^= 1 << (i % 8)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for bit := 0; bit < slotSize*8; bit += 61 {
		flip(bit)
		wantRecord(t, path, 3)
		flip(slotSize*8 + bit)
		wantRecord(t, path, 4)
		flip(bit, slotSize*8+bit)
		if _, _, err := load(t, path); !errors.Is(err, ErrAnchor) {
			t.Fatalf("bit %d in both slots: error %v, want ErrAnchor", bit, err)
		}
	}
}

func TestAnchorRefusals(t *testing.T) {
	slot := func(n uint64) []byte {
		b, err := record(n).marshal()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	newer := slot(2)
	newer[9] = 3 // a version that we do not know, with a good checksum
	copy(newer[slotSum:], sum(newer[:slotSum]))
	for _, tc := range []struct {
		name string
		file []byte
	}{
		{"empty file", nil},
		{"short file", make([]byte, 2*slotSize-1)},
		{"long file", append(append(slot(2), slot(1)...), 0)},
		{"zeros", make([]byte, 2*slotSize)},
		{"slots exchanged", append(slot(1), slot(2)...)},
		{"newer version", append(newer, slot(1)...)},
		{"text", bytes.Repeat([]byte("anchor! "), 2*slotSize/8)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "anchor")
			if err := os.WriteFile(path, tc.file, 0o600); err != nil {
				t.Fatal(err)
			}
			a, err := OpenAnchor(path)
			if err == nil {
				_, _, err = a.Load()
				a.Close()
			}
			if !errors.Is(err, ErrAnchor) {
				t.Errorf("error %v, want ErrAnchor", err)
			}
		})
	}
	t.Run("missing", func(t *testing.T) {
		if _, err := OpenAnchor(filepath.Join(t.TempDir(), "anchor")); !errors.Is(err, ErrAnchor) || !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("error %v, want ErrAnchor", err)
		}
	})
	t.Run("directory", func(t *testing.T) {
		if _, err := OpenAnchor(t.TempDir()); !errors.Is(err, ErrAnchor) {
			t.Errorf("error %v, want ErrAnchor", err)
		}
	})
	t.Run("in use", func(t *testing.T) {
		path := anchorWith(t, 1)
		a := mustOpen(t, path)
		defer a.Close()
		if _, err := OpenAnchor(path); !errors.Is(err, ErrAnchor) {
			t.Errorf("error %v, want ErrAnchor", err)
		}
	})
	t.Run("created twice", func(t *testing.T) {
		path := anchorWith(t, 2)
		if err := CreateAnchor(path); !errors.Is(err, fs.ErrExist) {
			t.Errorf("error %v, want fs.ErrExist", err)
		}
		wantRecord(t, path, 2)
	})
	t.Run("note too long", func(t *testing.T) {
		path := anchorWith(t, 2)
		a := mustOpen(t, path)
		r := record(3)
		r.Note = make([]byte, slotSize)
		if err := a.Store(r); err == nil {
			t.Error("stored")
		}
		a.Close()
		wantRecord(t, path, 2)
	})
}

func FuzzParseSlot(f *testing.F) {
	for n := range uint64(3) {
		b, err := record(n).marshal()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(n, b, false)
		f.Add(n, b[:slotSum], true)
	}
	loss := record(2)
	loss.Loss, loss.Replaced, loss.Signature = true, [32]byte{7}, nil
	b, err := loss.marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint64(0), b[:slotSum], true)
	begun := record(2)
	begun.Start = EpochStart{Head: Head{Size: 3, Time: time.UnixMilli(5).UTC()}, Signature: []byte("signature")}
	if b, err = begun.marshal(); err != nil {
		f.Fatal(err)
	}
	f.Add(uint64(0), b[:slotSum], true)
	f.Fuzz(func(t *testing.T, n uint64, b []byte, fix bool) {
		if fix && len(b) >= slotSum { // get past the checksum
			b = append(bytes.Clone(b[:slotSum]), sum(b[:slotSum])...)
		}
		r, err := parseSlot(n%2, b)
		if err != nil {
			return
		}
		again, err := r.marshal()
		if err != nil || !bytes.Equal(again, b) {
			t.Errorf("accepted what is not written: %v", err)
		}
	})
}
