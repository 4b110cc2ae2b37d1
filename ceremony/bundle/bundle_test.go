package bundle

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/tyler-smith/go-bip39"
)

var (
	head  = sha256.Sum256([]byte("the last record"))
	names = []string{"definition.yaml", "transcript.jsonl", "inter-g1.csr", "inter-g1.json", "notes.txt"}
)

func request() Header { return Header{Ceremony: "acme-genesis-2026", Kind: Request, Head: head} }

func files() []File {
	return []File{
		{"definition.yaml", []byte("version: 1\n")},
		{"transcript.jsonl", bytes.Repeat([]byte("{}\n"), 1000)},
		{"inter-g1.csr", bytes.Repeat([]byte{0x30}, 512)},
		{"notes.txt", nil},
	}
}

func expectation() Expect { return Expect{Ceremony: "acme-genesis-2026", Kind: Request, Names: names} }

func encoded(t testing.TB, h Header, files []File) []byte {
	t.Helper()
	b, err := New(h, files)
	if err != nil {
		t.Fatal(err)
	}
	data, err := b.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestRoundTrip(t *testing.T) {
	sent, err := New(request(), files())
	if err != nil {
		t.Fatal(err)
	}
	stick := filepath.Join(t.TempDir(), "request.tar")
	if err := sent.WriteFile(stick); err != nil {
		t.Fatal(err)
	}
	if err := sent.WriteFile(stick); !errors.Is(err, fs.ErrExist) {
		t.Errorf("written over a file: %v", err)
	}
	got, err := ReadFile(stick, expectation())
	if err != nil {
		t.Fatal(err)
	}
	if got.Header != sent.Header || got.Hash() != sent.Hash() || got.Words() != sent.Words() || len(strings.Fields(got.Words())) != 24 {
		t.Errorf("read back: header %+v, words %q", got.Header, got.Words())
	}
	if entropy, err := bip39.EntropyFromMnemonic(got.Words()); err != nil || !bytes.Equal(entropy, func() []byte { h := got.Hash(); return h[:] }()) {
		t.Errorf("the words are not those of the hash: %v", err)
	}
	dir := filepath.Join(t.TempDir(), "in")
	if err := got.Extract(dir); err != nil {
		t.Fatal(err)
	}
	for _, f := range files() {
		have, err := os.ReadFile(filepath.Join(dir, f.Name))
		if err != nil || !bytes.Equal(have, f.Content) || !bytes.Equal(got.File(f.Name), f.Content) {
			t.Errorf("%s: %d octets, %v", f.Name, len(have), err)
		}
	}
	if got.File("inter-g1.json") != nil {
		t.Error("a file that is not there")
	}
	if err := got.Extract(dir); !errors.Is(err, fs.ErrExist) {
		t.Errorf("extracted over a folder: %v", err)
	}
	reply := Header{Ceremony: "acme-genesis-2026", Kind: Response, Head: head, InReplyTo: sent.Hash()}
	want := expectation()
	want.Kind, want.InReplyTo = Response, sent.Hash()
	if _, err := Read(bytes.NewReader(encoded(t, reply, files())), want); err != nil {
		t.Errorf("the response: %v", err)
	}
}

// TestTar: what everybody else calls a tar file, with the metadata that we say.
func TestTar(t *testing.T) {
	data := encoded(t, request(), files())
	in := tar.NewReader(bytes.NewReader(data))
	var list []string
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag != tar.TypeReg || h.Mode != 0o644 || h.Uid != 0 || h.Gid != 0 || h.Uname != "" || !h.ModTime.Equal(time.Unix(0, 0)) {
			t.Errorf("header %+v", h)
		}
		list = append(list, h.Name)
	}
	want := []string{ManifestName, "definition.yaml", "transcript.jsonl", "inter-g1.csr", "notes.txt"}
	if diff := cmp.Diff(want, list); diff != "" {
		t.Errorf("entries (-want +got):\n%s", diff)
	}
	cmd := exec.Command("tar", "-tf", "-")
	cmd.Stdin = bytes.NewReader(data)
	if out, err := cmd.CombinedOutput(); err != nil || strings.Join(strings.Fields(string(out)), " ") != strings.Join(want, " ") {
		t.Errorf("tar -t: %v: %s", err, out)
	}
	if again := encoded(t, request(), files()); !bytes.Equal(data, again) {
		t.Error("equal files give different octets")
	}
}

func TestNewRefuses(t *testing.T) {
	big := make([]byte, MaxFile)
	for _, tc := range []struct {
		name   string
		header func(*Header)
		files  []File
		want   error
	}{
		{"no files", nil, []File{}, ErrTooLarge},
		{"path", nil, []File{{"../x", nil}}, ErrFormat},
		{"absolute path", nil, []File{{"/etc/passwd", nil}}, ErrFormat},
		{"folder", nil, []File{{"a/b", nil}}, ErrFormat},
		{"hidden", nil, []File{{".x", nil}}, ErrFormat},
		{"long name", nil, []File{{strings.Repeat("x", 100), nil}}, ErrFormat},
		{"name twice", nil, []File{{"a", nil}, {"a", nil}}, ErrFormat},
		{"a second manifest", nil, []File{{ManifestName, nil}}, ErrFormat},
		{"file too large", nil, []File{{"a", append(big, 0)}}, ErrTooLarge},
		{"too large in all", nil, []File{{"a", big}, {"b", big}, {"c", big}, {"d", big}}, ErrTooLarge},
		{"no ceremony", func(h *Header) { h.Ceremony = "" }, nil, ErrFormat},
		{"unknown kind", func(h *Header) { h.Kind = "gift" }, nil, ErrFormat},
		{"no head", func(h *Header) { h.Head = [32]byte{} }, nil, ErrFormat},
		{"a request in reply", func(h *Header) { h.InReplyTo = head }, nil, ErrFormat},
		{"a response to nothing", func(h *Header) { h.Kind = Response }, nil, ErrFormat},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h, f := request(), tc.files
			if tc.header != nil {
				tc.header(&h)
			}
			if f == nil {
				f = files()
			}
			if _, err := New(h, f); !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
		})
	}
}

// archive writes the entries of a good bundle as change wants them.
func archive(t *testing.T, change func(entries []entry) []entry) []byte {
	t.Helper()
	in := tar.NewReader(bytes.NewReader(encoded(t, request(), files())))
	var entries []entry
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		entries = append(entries, entry{h, content})
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range change(entries) {
		if err := w.WriteHeader(e.header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(e.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

type entry struct {
	header  *tar.Header
	content []byte
}

func TestReadRefusesOtherArchives(t *testing.T) {
	header := func(change func(*tar.Header)) func([]entry) []entry {
		return func(e []entry) []entry {
			change(e[1].header)
			return e
		}
	}
	instead := func(h *tar.Header) func([]entry) []entry {
		return func(e []entry) []entry {
			h.Name, h.Mode, h.ModTime = "definition.yaml", 0o644, time.Unix(0, 0)
			e[1] = entry{h, nil}
			return e
		}
	}
	for _, tc := range []struct {
		name   string
		change func([]entry) []entry
		want   error
	}{
		{"nothing changed", func(e []entry) []entry { return e }, nil},
		{"manifest not first", func(e []entry) []entry { e[0], e[1] = e[1], e[0]; return e }, ErrFormat},
		{"two files change places", func(e []entry) []entry { e[1], e[2] = e[2], e[1]; return e }, ErrFormat},
		{"a file is missing", func(e []entry) []entry { return slices.Delete(e, 2, 3) }, ErrFormat},
		{"the last file is missing", func(e []entry) []entry { return e[:4] }, ErrFormat},
		{"a file more", func(e []entry) []entry { return append(e, e[1]) }, ErrFormat},
		{"a file twice", func(e []entry) []entry { return slices.Insert(e, 1, e[1]) }, ErrFormat},
		{"symbolic link", instead(&tar.Header{Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"}), ErrFormat},
		{"hard link", instead(&tar.Header{Typeflag: tar.TypeLink, Linkname: "manifest.json"}), ErrFormat},
		{"device", instead(&tar.Header{Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 5}), ErrFormat},
		{"pipe", instead(&tar.Header{Typeflag: tar.TypeFifo}), ErrFormat},
		{"folder", instead(&tar.Header{Typeflag: tar.TypeDir}), ErrFormat},
		{"path", header(func(h *tar.Header) { h.Name = "../definition.yaml" }), ErrFormat},
		{"absolute path", header(func(h *tar.Header) { h.Name = "/definition.yaml" }), ErrFormat},
		{"executable", header(func(h *tar.Header) { h.Mode = 0o4755 }), ErrFormat},
		{"owner", header(func(h *tar.Header) { h.Uid = 1000 }), ErrFormat},
		{"owner's name", header(func(h *tar.Header) { h.Uname = "root" }), ErrFormat},
		{"time", header(func(h *tar.Header) { h.ModTime = time.Unix(1, 0) }), ErrFormat},
		{"PAX extension", header(func(h *tar.Header) {
			h.Format, h.PAXRecords = tar.FormatPAX, map[string]string{"VENDOR.note": "x"}
		}), ErrFormat},
		{"GNU format", header(func(h *tar.Header) { h.Format = tar.FormatGNU }), ErrFormat},
		{"content of the same size", func(e []entry) []entry { e[1].content[0] ^= 1; return e }, ErrContent},
		{"content shorter", func(e []entry) []entry {
			e[1].content, e[1].header.Size = e[1].content[1:], e[1].header.Size-1
			return e
		}, ErrFormat},
	} {
		t.Run(tc.name, func(t *testing.T) {
			data := archive(t, tc.change)
			if _, err := Read(bytes.NewReader(data), expectation()); !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
		})
	}
}

func TestReadRefusesOtherManifests(t *testing.T) {
	sent, err := New(request(), files())
	if err != nil {
		t.Fatal(err)
	}
	good := encoded(t, request(), files())
	first, second, _ := strings.Cut(sent.Words(), " ")
	second, _, _ = strings.Cut(second, " ")
	for _, tc := range []struct {
		name     string
		old, new string // of the same length
		want     error
	}{
		{"words of another hash", first + " " + second, second + " " + first, ErrFormat},
		{"another ceremony in it", "acme-genesis-2026", "acme-genesis-2025", ErrOther},
		{"version", `"version": 1`, `"version": 2`, ErrFormat},
		{"unknown member", `"head"`, `"haed"`, ErrFormat},
		{"path", `"name": "definition.yaml"`, `"name": "../inition.yaml"`, ErrFormat},
		{"slash", `"name": "definition.yaml"`, `"name": "definition/yaml"`, ErrFormat},
		{"negative size", `"size": 3000`, `"size": -300`, ErrTooLarge},
		{"more in all than a bundle has", `"size": 3000`, `"size": 9e99`, ErrFormat},
		{"another size", `"size": 3000`, `"size": 3001`, ErrFormat},
		{"hash not hexadecimal", `"head": "` + hex.EncodeToString(head[:1]), `"head": "zz`, ErrFormat},
		{"white space", `"version": 1`, `"version" :1`, ErrFormat},
	} {
		t.Run(tc.name, func(t *testing.T) {
			data := bytes.Replace(good, []byte(tc.old), []byte(tc.new), 1)
			if bytes.Equal(data, good) || len(data) != len(good) {
				t.Fatal("the row changes nothing, or the length")
			}
			if _, err := Read(bytes.NewReader(data), expectation()); !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
		})
	}
}

func TestReadRefusesTheWrongBundle(t *testing.T) {
	good := encoded(t, request(), files())
	reply := Header{Ceremony: "acme-genesis-2026", Kind: Response, Head: head, InReplyTo: head}
	for _, tc := range []struct {
		name string
		data []byte
		want func(*Expect)
		err  error
	}{
		{"another ceremony", good, func(e *Expect) { e.Ceremony = "acme-rotate-2027" }, ErrOther},
		{"a request where a response should come", good, func(e *Expect) { e.Kind, e.InReplyTo = Response, head }, ErrOther},
		{"a response where a request should come", encoded(t, reply, files()), nil, ErrOther},
		{"the response to another request", encoded(t, reply, files()), func(e *Expect) { e.Kind, e.InReplyTo = Response, [32]byte{1} }, ErrOther},
		{"a file that is not expected", good, func(e *Expect) { e.Names = names[1:] }, ErrFormat},
		{"another order", good, func(e *Expect) { e.Names = slices.Concat(names[1:], names[:1]) }, ErrFormat},
		{"empty", nil, nil, ErrTruncated},
		{"one octet follows", append(bytes.Clone(good), 0), nil, ErrFormat},
		{"one block follows", append(bytes.Clone(good), make([]byte, 512)...), nil, ErrFormat},
		{"two bundles", append(bytes.Clone(good), good...), nil, ErrFormat},
		{"zeros without end", nil, nil, ErrFormat},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var r io.Reader = bytes.NewReader(tc.data)
			if tc.name == "zeros without end" {
				r = zeros{}
			}
			e := expectation()
			if tc.want != nil {
				tc.want(&e)
			}
			if _, err := Read(r, e); !errors.Is(err, tc.err) {
				t.Errorf("%v, want %v", err, tc.err)
			}
		})
	}
}

// zeros is a stream that does not end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// TestEveryCut: a bundle that ends early anywhere is cut short and nothing else.
func TestEveryCut(t *testing.T) {
	good := encoded(t, request(), files())
	for n := range len(good) {
		if _, err := Read(bytes.NewReader(good[:n]), expectation()); !errors.Is(err, ErrTruncated) {
			t.Fatalf("cut after %d octets: %v, want ErrTruncated", n, err)
		}
	}
}

// TestEveryOctet: any octet changed, and nothing is read.
func TestEveryOctet(t *testing.T) {
	good := encoded(t, request(), files())
	data := bytes.Clone(good)
	for i := range good {
		for _, flip := range []byte{1, 0x80, good[i]} { // the last makes it zero
			if flip == 0 {
				continue
			}
			data[i] ^= flip
			if _, err := Read(bytes.NewReader(data), expectation()); err == nil {
				t.Fatalf("octet %d, changed by %#x, is not noticed", i, flip)
			}
			data[i] = good[i]
		}
	}
}

func TestReadFileRefuses(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good.tar")
	if err := os.WriteFile(good, encoded(t, request(), files()), 0o600); err != nil {
		t.Fatal(err)
	}
	link, sparse, missing := filepath.Join(dir, "link.tar"), filepath.Join(dir, "sparse.tar"), filepath.Join(dir, "none.tar")
	if err := os.Symlink(good, link); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(sparse, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(sparse, 10<<30); err != nil {
		t.Skipf("no file of 10 GiB can be made here: %v", err)
	}
	for _, tc := range []struct {
		name, path string
		want       error
	}{
		{"link", link, ErrFormat}, {"folder", dir, ErrFormat}, {"10 GiB", sparse, ErrTooLarge}, {"missing", missing, fs.ErrNotExist},
	} {
		if _, err := ReadFile(tc.path, expectation()); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
	}
}

// TestSparseEntry: GNU tar's sparse file of 10 GiB, a few octets on the stick.
func TestSparseEntry(t *testing.T) {
	dir := t.TempDir()
	raw := encoded(t, request(), files())
	cmd := exec.Command("tar", "-xf", "-", "-C", dir)
	cmd.Stdin = bytes.NewReader(raw)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("tar -x: %v: %s", err, out)
	}
	if err := os.Truncate(filepath.Join(dir, "definition.yaml"), 10<<30); err != nil {
		t.Skipf("no file of 10 GiB can be made here: %v", err)
	}
	cmd = exec.Command("tar", "--sparse", "-cf", "bad.tar", ManifestName, "definition.yaml")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("tar -c: %v: %s", err, out)
	}
	bad := filepath.Join(dir, "bad.tar")
	if info, err := os.Stat(bad); err != nil || info.Size() > MaxSize {
		t.Fatalf("the archive is not sparse: %v, %v", info, err)
	}
	if _, err := ReadFile(bad, expectation()); !errors.Is(err, ErrFormat) {
		t.Errorf("%v, want ErrFormat", err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add(encoded(f, request(), files()))
	f.Add(encoded(f, request(), files()[:1]))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := Read(bytes.NewReader(data), expectation())
		if err != nil {
			for _, known := range []error{ErrFormat, ErrTooLarge, ErrTruncated, ErrOther, ErrContent} {
				if errors.Is(err, known) {
					return
				}
			}
			t.Fatalf("error of no kind: %v", err)
		}
		if again, err := b.Encode(); err != nil || !bytes.Equal(again, data) {
			t.Fatalf("what was read is written differently (%v)", err)
		}
	})
}
