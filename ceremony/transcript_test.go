package ceremony

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

type testData struct {
	Text string `json:"text"`
}

// newTranscript writes three records and returns the file's octets.
func newTranscript(t testing.TB) (path string, content []byte) {
	t.Helper()
	path = filepath.Join(t.TempDir(), TranscriptName)
	tr, err := CreateTranscript(path, "test-ceremony", fixedClock)
	if err != nil {
		t.Fatal(err)
	}
	for i, text := range []string{"one", "<two> & Ünïcode \u2028", "three"} {
		typ := []RecordType{Done, Intent, Done}[i]
		if _, err := tr.Append(actor, "step", typ, testData{text}); err != nil {
			t.Fatal(err)
		}
	}
	if err := tr.Close(); err != nil {
		t.Fatal(err)
	}
	if content, err = os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	return path, content
}

// goldenTranscript was computed by hand, outside this package:
//
//	printf '\0%s' '{"actor":"chancery-ceremony","ceremony":"test-ceremony","data":{"text":"one"},
//	"prev":"0…0","seq":0,"step":"step","time":"2026-11-22T12:00:00Z","type":"result","v":1}' | sha256sum
const goldenTranscript = `{"actor":"chancery-ceremony","ceremony":"test-ceremony","data":{"text":"one"},"hash":"367364d807f2d85db0d77c8fc86ad085593d926e10285e9848fb61fce0409627","prev":"0000000000000000000000000000000000000000000000000000000000000000","seq":0,"step":"step","time":"2026-11-22T12:00:00Z","type":"result","v":1}`

func TestTranscriptGolden(t *testing.T) {
	_, content := newTranscript(t)
	first, _, _ := strings.Cut(string(content), "\n")
	if diff := cmp.Diff(goldenTranscript, first); diff != "" {
		t.Errorf("first record (-golden +written):\n%s", diff)
	}
	records, err := ReadTranscript(bytes.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	if len(records) != 3 {
		t.Errorf("%d records, want 3", len(records))
	}
}

// Every octet of a transcript, changed in three ways, is noticed.
func TestTranscriptTamper(t *testing.T) {
	_, content := newTranscript(t)
	for i := range content {
		for _, b := range []byte{content[i] ^ 1, content[i] ^ 0x20, ' '} {
			if b == content[i] {
				continue
			}
			changed := bytes.Clone(content)
			changed[i] = b
			if _, err := ReadTranscript(bytes.NewReader(changed)); !errors.Is(err, ErrTranscript) {
				t.Fatalf("octet %d changed from %q to %q: %v, want ErrTranscript", i, content[i], b, err)
			}
		}
	}
}

// reseal gives a record, changed by hand, a hash that fits it again.
func reseal(t testing.TB, rec Record) Record {
	t.Helper()
	if err := rec.seal(); err != nil {
		t.Fatal(err)
	}
	return rec
}

func TestReadTranscriptRefuses(t *testing.T) {
	_, content := newTranscript(t)
	records, err := ReadTranscript(bytes.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(strings.TrimSuffix(string(content), "\n"), "\n")
	text := func(recs ...Record) string {
		f, err := transcriptFile(recs)
		if err != nil {
			t.Fatal(err)
		}
		return string(f.content)
	}
	change := func(i int, f func(*Record)) string {
		recs := append([]Record(nil), records...)
		f(&recs[i])
		recs[i] = reseal(t, recs[i])
		return text(recs...)
	}
	for _, tc := range []struct{ name, content, want string }{
		{"torn", string(content[:len(content)-1]), "torn"},
		{"torn inside", string(content[:len(content)-40]), "torn"},
		{"empty line", string(content) + "\n", "decode"},
		{"garbage", "garbage\n", "decode"},
		{"array", "[]\n", "decode"},
		{"two values on a line", strings.Replace(string(content), "}\n", "}{}\n", 1), "canonical"},
		{"trailing space", strings.Replace(string(content), "}\n", "} \n", 1), "canonical"},
		{"CRLF", strings.ReplaceAll(string(content), "\n", "\r\n"), "canonical"},
		{"first record missing", lines[1] + lines[2] + "\n", "sequence"},
		{"middle record missing", lines[0] + lines[2] + "\n", "sequence"},
		{"record twice", lines[0] + lines[0], "sequence"},
		{"records swapped", lines[0] + lines[2] + "\n" + lines[1], "sequence"},
		{"another ceremony, sealed again", change(2, func(r *Record) { r.Ceremony = "other" }), "another ceremony"},
		{"content changed and sealed again", change(1, func(r *Record) { r.Data = json.RawMessage(`{"text":"2"}`) }), "does not continue"},
		{"earlier time, sealed again", change(2, func(r *Record) { r.Time = r.Time.Add(-time.Second) }), "earlier"},
		{"unknown type, sealed again", change(2, func(r *Record) { r.Type = "rumour" }), "type"},
		{"another version, sealed again", change(0, func(r *Record) { r.V = 2 }), "version"},
		{"first with a predecessor", change(0, func(r *Record) { r.Prev = strings.Repeat("1", 64) }), "predecessor"},
		{"huge", strings.Repeat(string(content), MaxTranscript/len(content)+1), "larger"},
		{"huge line", `{"actor":"` + strings.Repeat("x", MaxRecord) + "\"}\n", "larger"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := ReadTranscript(strings.NewReader(tc.content))
			if !errors.Is(err, ErrTranscript) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want ErrTranscript with %q", err, tc.want)
			}
		})
	}
}

func TestTranscriptContinues(t *testing.T) {
	path, content := newTranscript(t)
	if _, err := CreateTranscript(path, "test-ceremony", fixedClock); !errors.Is(err, fs.ErrExist) {
		t.Errorf("create over a transcript: %v, want fs.ErrExist", err)
	}
	if _, err := OpenTranscript(path, "other-ceremony", fixedClock); !errors.Is(err, ErrTranscript) {
		t.Errorf("open for another ceremony: %v, want ErrTranscript", err)
	}
	// A kill tore the fourth record.
	if err := os.WriteFile(path, append(content, `{"actor":"chan`...), 0o600); err != nil {
		t.Fatal(err)
	}
	tr, err := OpenTranscript(path, "test-ceremony", fixedClock)
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Close()
	if _, err := OpenTranscript(path, "test-ceremony", fixedClock); err == nil {
		t.Error("two processes have one transcript")
	}
	if _, err := tr.Append(actor, "step", Done, testData{"four"}); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if records, err := ReadTranscript(f); err != nil || len(records) != 4 {
		t.Errorf("%d records, %v; want 4", len(records), err)
	}
}

func TestTranscriptStopsAtFaults(t *testing.T) {
	now, clockErr := testNow, error(nil)
	path := filepath.Join(t.TempDir(), TranscriptName)
	tr, err := CreateTranscript(path, "test-ceremony", func() (time.Time, error) { return now, clockErr })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tr.Append(actor, "step", Done, testData{"one"}); err != nil {
		t.Fatal(err)
	}
	now = now.Add(-time.Hour)
	if _, err := tr.Append(actor, "step", Done, testData{"two"}); err == nil {
		t.Error("a record earlier than the last was written")
	}
	clockErr = errors.New("clock jumped")
	if _, err := tr.Append(actor, "step", Done, testData{"two"}); !errors.Is(err, clockErr) {
		t.Errorf("error %v, want the clock's", err)
	}
	now, clockErr = testNow, nil
	if _, err := tr.Append(actor, "step", Done, testData{strings.Repeat("x", MaxRecord)}); err == nil {
		t.Error("a huge record was written")
	}
	if err := tr.file.Close(); err != nil { // the disk goes away
		t.Fatal(err)
	}
	_, first := tr.Append(actor, "step", Done, testData{"two"})
	_, second := tr.Append(actor, "step", Done, testData{"two"})
	if first == nil || !errors.Is(second, first) {
		t.Errorf("after a write error: %v, then %v; want the same error for good", first, second)
	}
}

func FuzzReadTranscript(f *testing.F) {
	_, content := newTranscript(f)
	f.Add(content)
	f.Add([]byte("{}\n"))
	f.Add([]byte(goldenTranscript + "\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		records, err := ReadTranscript(bytes.NewReader(data))
		if err != nil {
			if !errors.Is(err, ErrTranscript) {
				t.Fatalf("error %v is not ErrTranscript", err)
			}
			return
		}
		again, err := transcriptFile(records)
		if err != nil || !bytes.Equal(again.content, data) {
			t.Fatalf("an accepted transcript is not what its records say (%v)", err)
		}
	})
}

// What a device or a person says cannot make another table, HTML or an escape
// sequence of the transcript for reading.
func TestMarkdownOfForeignText(t *testing.T) {
	m := &document{}
	m.row("root", "A|B\n\n## End\n", "\x1b[2J\u009b\u202e\xff", `<img src=x> [a](b) \|`, "`ab…`", "Ç, 東")
	want := `| root | A\|B??## End? | ?\[2J??? | \<img src=x> \[a](b) \\\| | ` + "`ab…` | Ç, 東 |\n"
	if got := m.String(); got != want {
		t.Errorf("row\n%q, want\n%q", got, want)
	}
}
