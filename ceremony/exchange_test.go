package ceremony

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chancery-ca/chancery/ceremony/bundle"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// twoMachineSource is the demonstration on two machines, with a TUF repository.
func twoMachineSource(t testing.TB) string {
	t.Helper()
	return strings.NewReplacer(
		`uri: "pkcs11:token=root",`, `uri: "pkcs11:token=root", machine: offline,`,
		`uri: "pkcs11:token=online",`, `uri: "pkcs11:token=online", machine: online,`,
		"  tsa-1:    {", "  tuf-online: {token: online, alg: ecdsa-p256}\n  tsa-1:    {",
		"service:\n", `tuf:
  threshold: 2
  custodians:
    - {id: c1, key: "pkcs11:token=c1", spki-sha256: "`+strings.Repeat("11", 32)+`"}
    - {id: c2, key: "pkcs11:token=c2", spki-sha256: "`+strings.Repeat("22", 32)+`"}
  root-expires: 1y
  timestamp-expires: 7d
service:
`).Replace(string(demoDefinition(t).Source()))
}

func parse(t testing.TB, source string) *Definition {
	t.Helper()
	d, err := ParseDefinition([]byte(source))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// half is one machine of a ceremony: it shares nothing with the other but the
// folder of bundles.
type half struct {
	def  *Definition
	opts Options
}

func newHalf(t testing.TB, d *Definition, m Machine, token hsm.Token) *half {
	t.Helper()
	def, err := d.On(m)
	if err != nil {
		t.Fatal(err)
	}
	name := DemoRootToken
	if m == Online {
		name = DemoOnlineToken
	}
	return &half{def, Options{
		Tokens: map[string]hsm.Token{name: token}, Dir: filepath.Join(memoryFolder(t), "out"), Now: fixedClock, Resume: true,
	}}
}

func (h *half) run(t testing.TB, bundle string) error {
	t.Helper()
	h.opts.Bundle = bundle
	_, err := Rehearse(t.Context(), h.def, h.opts)
	return err
}

func (h *half) export(t testing.TB, path string) *bundle.Bundle {
	t.Helper()
	b, err := Export(h.opts.Dir, path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// exchanged is a complete ceremony on two machines.
type exchanged struct {
	online, offline   *half
	request, response string // paths of the bundles
}

func exchange(t testing.TB, d *Definition) *exchanged {
	t.Helper()
	stick, people := t.TempDir(), &scripted{}
	x := &exchanged{
		online: newHalf(t, d, Online, hsmtest.SoftHSM(t)), offline: newHalf(t, d, Offline, hsmtest.SoftHSM(t)),
		request: filepath.Join(stick, "request.tar"), response: filepath.Join(stick, "response.tar"),
	}
	x.online.opts.People, x.offline.opts.People = people, people
	if err := x.online.run(t, ""); !errors.Is(err, ErrBundle) {
		t.Fatalf("online, before the exchange: %v, want ErrBundle", err)
	}
	request := x.online.export(t, x.request)
	if err := x.offline.run(t, ""); !errors.Is(err, ErrBundle) {
		t.Fatalf("offline, before the exchange: %v, want ErrBundle", err)
	}
	if _, err := Export(x.offline.opts.Dir, x.response); !errors.Is(err, ErrNothingToExport) {
		t.Fatalf("offline export before the import: %v, want ErrNothingToExport", err)
	}
	if err := x.offline.run(t, x.request); err != nil {
		t.Fatal(err)
	}
	response := x.offline.export(t, x.response)
	if err := x.online.run(t, x.response); err != nil {
		t.Fatal(err)
	}
	wordsComeFromElsewhere(t, people, request, response)
	return x
}

// wordsComeFromElsewhere fails the test if the screen before which the words of a
// bundle are typed has told them.
func wordsComeFromElsewhere(t testing.TB, people *scripted, bundles ...*bundle.Bundle) {
	t.Helper()
	var screen strings.Builder
	imports := 0
	for _, q := range people.asked {
		if q.ID == string(StepImport) {
			imports++
		}
		for _, f := range q.Facts {
			screen.WriteString(f.Text + "\n")
		}
		screen.WriteString(q.Title + q.Why + q.Prompt + "\n")
	}
	for _, n := range people.told {
		for _, f := range n.Facts {
			screen.WriteString(f.Text + "\n")
		}
	}
	for _, b := range bundles {
		if hash := b.Hash(); strings.Contains(screen.String(), b.Words()) || strings.Contains(screen.String(), hex.EncodeToString(hash[:])) {
			t.Errorf("the words of the %s are on the screen that asks for them", b.Kind)
		}
	}
	if imports != len(bundles) {
		t.Errorf("%d questions for the words of a bundle, want %d", imports, len(bundles))
	}
}

func TestTwoMachines(t *testing.T) {
	d := parse(t, twoMachineSource(t))
	x := exchange(t, d)
	for _, h := range []*half{x.online, x.offline} {
		if err := Verify(h.opts.Dir).Err(); err != nil {
			t.Errorf("verify %s: %v", h.def.Machine(), err)
		}
	}
	t.Run("same outputs", func(t *testing.T) { sameOutputs(t, x) })
	t.Run("bundles refused", func(t *testing.T) { bundlesRefused(t, d, x) })
	t.Run("exported again", func(t *testing.T) {
		again := filepath.Join(t.TempDir(), "again.tar")
		x.online.export(t, again)
		if !bytes.Equal(contentOf(t, again), contentOf(t, x.request)) {
			t.Error("the same request has other octets")
		}
		if _, err := Export(x.online.opts.Dir, again); !errors.Is(err, fs.ErrExist) {
			t.Errorf("over a file that exists: %v, want ErrExist", err)
		}
	})
	t.Run("tampered with", func(t *testing.T) { exchangeTampered(t, x) })
}

func contentOf(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Both machines have the same files for clients and for the service; only the
// online one has the online key's part of the TUF repository.
func sameOutputs(t *testing.T, x *exchanged) {
	same := 0
	err := filepath.WalkDir(x.offline.opts.Dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		rel, _ := filepath.Rel(x.offline.opts.Dir, path)
		if strings.HasPrefix(rel, "transcript.") || rel == ChecksumsName {
			return nil
		}
		if !bytes.Equal(contentOf(t, path), contentOf(t, filepath.Join(x.online.opts.Dir, rel))) {
			t.Errorf("%s differs", rel)
		}
		same++
		return nil
	})
	if err != nil || same < 20 {
		t.Errorf("%d files are the same (%v)", same, err)
	}
	if !bytes.Equal(contentOf(t, filepath.Join(x.online.opts.Dir, OtherTranscriptName(Offline))), contentOf(t, filepath.Join(x.offline.opts.Dir, TranscriptName))) {
		t.Error("the online machine has another transcript of the offline one")
	}
	if _, err := os.Stat(filepath.Join(x.online.opts.Dir, "tuf/timestamp.json")); err != nil {
		t.Error(err)
	}
	if n, err := x.online.opts.Tokens[DemoOnlineToken].Keys(context.Background()); err != nil || n != 5 {
		t.Errorf("%d online keys (%v), want 5", n, err)
	}
	if n, err := x.offline.opts.Tokens[DemoRootToken].Keys(context.Background()); err != nil || n != 2 {
		t.Errorf("%d offline keys (%v), want 2", n, err)
	}
}

// Everything that is not the bundle that was exported is refused, by either
// machine, and nothing is recorded of it.
func bundlesRefused(t *testing.T, d *Definition, x *exchanged) {
	offline := newHalf(t, d, Offline, hsmtest.SoftHSM(t))
	if err := offline.run(t, ""); !errors.Is(err, ErrBundle) {
		t.Fatal(err)
	}
	otherDef := parse(t, strings.Replace(string(d.Source()), "id: demo-", "id: other-", 1))
	otherIDBundle := filepath.Join(t.TempDir(), "other.tar")
	other := newHalf(t, otherDef, Online, hsmtest.SoftHSM(t))
	if err := other.run(t, ""); !errors.Is(err, ErrBundle) {
		t.Fatal(err)
	}
	other.export(t, otherIDBundle)
	otherContent := parse(t, strings.Replace(string(d.Source()), "years: 3, path-len: 0", "years: 2, path-len: 0", 1))
	changedDefBundle := filepath.Join(t.TempDir(), "changed.tar")
	changed := newHalf(t, otherContent, Online, hsmtest.SoftHSM(t))
	if err := changed.run(t, ""); !errors.Is(err, ErrBundle) {
		t.Fatal(err)
	}
	changed.export(t, changedDefBundle)

	request, response := contentOf(t, x.request), contentOf(t, x.response)
	before := countRecords(t, offline.opts.Dir)
	for _, tc := range []struct {
		name string
		path func(t *testing.T) string
		want error
	}{
		{"not there", func(t *testing.T) string { return filepath.Join(t.TempDir(), "none") }, fs.ErrNotExist},
		{"of another ceremony", func(*testing.T) string { return otherIDBundle }, bundle.ErrOther},
		{"of another definition", func(*testing.T) string { return changedDefBundle }, ErrDefinition},
		{"the response", func(*testing.T) string { return x.response }, bundle.ErrOther},
		{"truncated", func(t *testing.T) string { return placed(t, request[:len(request)/2]) }, bundle.ErrTruncated},
		{"a link", func(t *testing.T) string {
			path := filepath.Join(t.TempDir(), "link")
			if err := os.Symlink(x.request, path); err != nil {
				t.Fatal(err)
			}
			return path
		}, bundle.ErrFormat},
		{"10 GiB", func(t *testing.T) string {
			path := placed(t, request)
			if err := os.Truncate(path, 10<<30); err != nil {
				t.Skip(err)
			}
			return path
		}, bundle.ErrTooLarge},
		{"something after the end", func(t *testing.T) string { return placed(t, append(bytes.Clone(request), 0)) }, bundle.ErrFormat},
		{"another request in it", func(t *testing.T) string {
			return placed(t, remade(t, request, d.requestNames(), func(f *bundle.File) {
				if f.Name == "inter"+requestSuffix {
					f.Content = bytes.Replace(f.Content, []byte("A"), []byte("B"), 1)
				}
			}))
		}, bundle.ErrContent},
		{"a forged transcript in it", func(t *testing.T) string {
			return placed(t, remade(t, request, d.requestNames(), func(f *bundle.File) {
				if f.Name == TranscriptName {
					f.Content = bytes.Replace(f.Content, []byte(`"distinctR":64`), []byte(`"distinctR":63`), 1)
				}
			}))
		}, ErrTranscript},
		{"a shorter transcript in it", func(t *testing.T) string {
			return placed(t, remade(t, request, d.requestNames(), func(f *bundle.File) {
				if f.Name == TranscriptName {
					lines := bytes.SplitAfter(f.Content, []byte("\n"))
					f.Content = bytes.Join(lines[:len(lines)-2], nil)
				}
			}))
		}, ErrNothingToExport},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := offline.run(t, tc.path(t)); !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
		})
	}
	if n := countRecords(t, offline.opts.Dir); n != before {
		t.Errorf("%d records were written about bundles that were refused", n-before)
	}

	t.Run("a response to another request", func(t *testing.T) {
		online := newHalf(t, d, Online, hsmtest.SoftHSM(t))
		if err := online.run(t, ""); !errors.Is(err, ErrBundle) {
			t.Fatal(err)
		}
		if err := online.run(t, placed(t, response)); !errors.Is(err, bundle.ErrOther) {
			t.Errorf("error %v, want ErrOther", err)
		}
	})
	t.Run("changed after the words", func(t *testing.T) {
		offline.opts.People = &Prepared{Answers: map[string]string{"import": "zoo zoo zoo"}, Next: refuses{}}
		if err := offline.run(t, x.request); !errors.Is(err, ErrAnswer) {
			t.Fatalf("other words: %v, want ErrAnswer", err)
		}
		offline.opts.People = nil
		second := filepath.Join(t.TempDir(), "second.tar")
		online := newHalf(t, d, Online, hsmtest.SoftHSM(t))
		if err := online.run(t, ""); !errors.Is(err, ErrBundle) {
			t.Fatal(err)
		}
		online.export(t, second)
		if err := offline.run(t, second); !errors.Is(err, bundle.ErrOther) {
			t.Errorf("another bundle after the first is on record: %v, want ErrOther", err)
		}
		if err := offline.run(t, ""); err != nil {
			t.Errorf("going on without the stick: %v", err)
		}
	})
}

// refuses gives up at the first question.
type refuses struct{ Practice }

func (refuses) Ask(context.Context, Question) (string, error) { return "", ErrAnswer }

func placed(t *testing.T, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "bundle.tar")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// remade is a request that was changed and put together again, so that its
// manifest fits.
func remade(t *testing.T, request []byte, names []string, change func(*bundle.File)) []byte {
	t.Helper()
	id := "demo-" + strings.ToLower(testNow.Format("20060102t150405z"))
	b, err := bundle.Read(bytes.NewReader(request), bundle.Expect{Ceremony: id, Kind: bundle.Request, Names: names})
	if err != nil {
		t.Fatal(err)
	}
	var files []bundle.File
	for _, f := range b.Files {
		change(&f)
		files = append(files, f)
	}
	forged, err := bundle.New(b.Header, files)
	if err != nil {
		t.Fatal(err)
	}
	out, err := forged.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// A forger who seals the chain again is found in what came from the other
// machine, too.
func exchangeTampered(t *testing.T, x *exchanged) {
	records, err := readTranscriptFile(filepath.Join(x.offline.opts.Dir, TranscriptName))
	if err != nil {
		t.Fatal(err)
	}
	online, err := readTranscriptFile(filepath.Join(x.online.opts.Dir, TranscriptName))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name    string
		def     *Definition
		records []Record
		step    string
		typ     RecordType
		old     string
		new     string
	}{
		{"another bundle", x.offline.def, records, "import", Intent, `"bundleSHA256":"`, `"bundleSHA256":"0`},
		{"another head", x.offline.def, records, "import", Intent, `"head":"`, `"head":"0`},
		{"another transcript", x.offline.def, records, "import", Intent, `"transcript":"`, `"transcript":"AAAA`},
		{"other words", x.offline.def, records, "import", Statement, `"words":"`, `"words":"zoo `},
		{"another bundle at the end", x.offline.def, records, "import", Done, `"bundleSHA256":"`, `"bundleSHA256":"0`},
		{"another machine", x.offline.def, records, "open", Done, `"machine":"offline"`, `"machine":"online"`},
		{"another request", x.online.def, online, "request/inter", Done, `"request":"M`, `"request":"N`},
		{"another request's hash", x.online.def, online, "request/inter", Done, `"sha256":"`, `"sha256":"0`},
		{"a response to another request", x.online.def, online, "key/ct-1", Done, `"adopted":false`, `"adopted":true`},
	} {
		t.Run(tc.name, func(t *testing.T) { resealedIsRefused(t, tc.def, tc.records, tc.step, tc.typ, tc.old, tc.new) })
	}
}

// resealedIsRefused changes one record, seals the chain again from there on, and
// wants the facts to refuse it.
func resealedIsRefused(t *testing.T, d *Definition, records []Record, step string, typ RecordType, before, after string) {
	t.Helper()
	forged := append([]Record(nil), records...)
	at := -1
	for i, r := range forged {
		if r.Step == step && r.Type == typ && at < 0 {
			at = i
		}
	}
	if at < 0 || !bytes.Contains(forged[at].Data, []byte(before)) {
		t.Fatalf("no %s of %s with %q", typ, step, before)
	}
	forged[at].Data = bytes.Replace(forged[at].Data, []byte(before), []byte(after), 1)
	for i := at; i < len(forged); i++ {
		if i > 0 {
			forged[i].Prev = forged[i-1].Hash
		}
		forged[i] = reseal(t, forged[i])
	}
	if err := factsOf(t, d).replay(forged); err == nil {
		t.Error("the forged records were accepted")
	}
}

// Both machines are killed before every record, and resumed.
func TestTwoMachinesResumed(t *testing.T) {
	d := parse(t, twoMachineSource(t))
	online, offline := newHalf(t, d, Online, hsmtest.SoftHSM(t)), newHalf(t, d, Offline, hsmtest.SoftHSM(t))
	request, response := filepath.Join(t.TempDir(), "request.tar"), filepath.Join(t.TempDir(), "response.tar")
	killing := func(h *half, bundle string) error {
		for kills := 0; ; kills++ {
			h.opts.Now = killAfter(2 + kills%5)
			err := h.run(t, bundle)
			if !errors.Is(err, errKilled) || kills > 100 {
				h.opts.Now = fixedClock
				return err
			}
			tear(t, h.opts.Dir)
		}
	}
	if err := killing(online, ""); !errors.Is(err, ErrBundle) {
		t.Fatal(err)
	}
	online.export(t, request)
	if err := killing(offline, request); err != nil {
		t.Fatal(err)
	}
	offline.export(t, response)
	if err := killing(online, response); err != nil {
		t.Fatal(err)
	}
	sameOutputs(t, &exchanged{online: online, offline: offline})
	for _, h := range []*half{online, offline} {
		if err := Verify(h.opts.Dir).Err(); err != nil {
			t.Errorf("verify %s: %v", h.def.Machine(), err)
		}
	}
}

func TestMachinesDefinition(t *testing.T) {
	for _, tc := range []struct{ name, old, new, want string }{
		{"one token without a machine", ", machine: online", "", "want offline or online for every token"},
		{"an unknown machine", "machine: online", "machine: cloud", "want offline or online for every token"},
		{"one side has none", "machine: online", "machine: offline", "one side has no token"},
		{"a root that is online", "root-g1:  {token: root,", "root-g1:  {token: online,", "belongs on the offline one"},
		{"a log that is offline", "ct-1:     {token: online,", "ct-1:     {token: root,", "belongs on the online one"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			source := strings.Replace(twoMachineSource(t), tc.old, tc.new, 1)
			if _, err := ParseDefinition([]byte(source)); !errors.Is(err, ErrDefinition) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
	d := parse(t, twoMachineSource(t))
	if _, err := Plan(d); !errors.Is(err, ErrMachine) {
		t.Errorf("plan of neither machine: %v, want ErrMachine", err)
	}
	if _, err := d.On("cloud"); !errors.Is(err, ErrMachine) {
		t.Errorf("on a cloud: %v, want ErrMachine", err)
	}
	if _, err := demoDefinition(t).On(Online); !errors.Is(err, ErrMachine) {
		t.Errorf("one machine as two: %v, want ErrMachine", err)
	}
}

// The record of the last import has room for whatever a ceremony may carry over:
// it must not turn out too large when the root has signed.
func TestLargestRecord(t *testing.T) {
	const besides = 256 << 10 // of a transcript, more than ever was
	inBase64 := base64.StdEncoding.EncodedLen
	request := inBase64(maxCarried) + besides
	response := inBase64(maxCarried) + inBase64(request) + besides
	if response > bundle.MaxFile {
		t.Errorf("a response's transcript of %d octets is too large for a bundle", response)
	}
	if last := inBase64(response) + besides; last > MaxRecord {
		t.Errorf("the last import has %d octets, a record at most %d", last, MaxRecord)
	}
	if all := inBase64(maxCarried) + inBase64(response) + 2*besides; all > MaxTranscript {
		t.Errorf("a transcript has %d octets", all)
	}
}
