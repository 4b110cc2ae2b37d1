package ceremony

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// testNow is the clock of tests: the signatures are real, the time is fixed.
var testNow = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func fixedClock() (time.Time, error) { return testNow, nil }

// demoDefinition is the demonstration's, with P-256 roots: P-384 takes ten
// times as long, and shows no more of a ceremony.
func demoDefinition(t testing.TB) *Definition {
	t.Helper()
	d, err := ParseDefinition([]byte(strings.ReplaceAll(string(theDemo(t).Source()), "ecdsa-p384", "ecdsa-p256")))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// memoryFolder is a new folder in memory, where there is one: a ceremony waits
// for the disk a hundred times, which is shown elsewhere.
func memoryFolder(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "chancery-ceremony-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// theDemo is the demonstration's definition itself.
func theDemo(t testing.TB) *Definition {
	t.Helper()
	d, err := DemoDefinition(DemoParameters{
		URL: "https://127.0.0.1:8443", Issuers: []string{"https://127.0.0.1:8443/oidc"}, Now: testNow,
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func twoTokens(t testing.TB) map[string]hsm.Token {
	t.Helper()
	return map[string]hsm.Token{DemoRootToken: hsmtest.SoftHSM(t), DemoOnlineToken: hsmtest.SoftHSM(t)}
}

// rehearsed runs a complete ceremony in a fresh folder.
func rehearsed(t testing.TB) (*Definition, *Result, Options) {
	t.Helper()
	d := theDemo(t)
	opts := Options{Tokens: twoTokens(t), Dir: filepath.Join(memoryFolder(t), "out"), Now: fixedClock}
	res, err := Rehearse(context.Background(), d, opts)
	if err != nil {
		t.Fatal(err)
	}
	return d, res, opts
}

func outputsComplete(t *testing.T, d *Definition, res *Result, opts Options) {
	for _, name := range fileNames(res) {
		info, err := os.Stat(filepath.Join(opts.Dir, name))
		if err != nil || info.Size() == 0 {
			t.Errorf("output %s: %v", name, err)
		}
	}
	for name, tok := range opts.Tokens {
		want := map[string]int{DemoRootToken: 2, DemoOnlineToken: 4}[name]
		if n, err := tok.Keys(context.Background()); err != nil || n != want {
			t.Errorf("token %s has %d keys (%v), want %d", name, n, err, want)
		}
	}
	for role, k := range res.Keys.Keys {
		if _, err := opts.Tokens[k.Token].Open(context.Background(), k.Ref(), role); err != nil {
			t.Errorf("open the key of %s as keys.yaml names it: %v", role, err)
		}
	}
	if _, err := Rehearse(context.Background(), d, opts); !errors.Is(err, ErrOutputExists) {
		t.Errorf("second run in the same folder: %v, want ErrOutputExists", err)
	}
}

// killAfter is a clock that works n times and then fails: the ceremony stops
// right before a record is written, with its step's work done, as a kill
// would.
func killAfter(n int) func() (time.Time, error) {
	return func() (time.Time, error) {
		if n--; n < 0 {
			return time.Time{}, errKilled
		}
		return testNow, nil
	}
}

var errKilled = errors.New("killed")

// A ceremony that is killed before every record, one after the other, and
// resumed each time, ends with exactly one key for each name and verifies.
func TestResumeAfterEveryRecord(t *testing.T) {
	d := demoDefinition(t)
	opts := Options{Tokens: twoTokens(t), Dir: filepath.Join(memoryFolder(t), "out"), Resume: true}
	kills := 0
	for ; ; kills++ {
		// One reading of the clock before anything is written, one for each
		// record, and more in some steps. Up to six, because an interrupted
		// entropy step begins anew and writes four records.
		opts.Now = killAfter(2 + kills%5)
		_, err := Rehearse(context.Background(), d, opts)
		if err == nil {
			break
		}
		if !errors.Is(err, errKilled) || kills > 100 {
			t.Fatalf("after %d kills: %v", kills, err)
		}
		tear(t, opts.Dir)
	}
	if kills < 20 {
		t.Errorf("only %d kills", kills)
	}
	for name, want := range map[string]int{DemoRootToken: 2, DemoOnlineToken: 4} {
		if n, err := opts.Tokens[name].Keys(context.Background()); err != nil || n != want {
			t.Errorf("token %s has %d keys (%v), want %d", name, n, err, want)
		}
	}
	if err := Verify(opts.Dir).Err(); err != nil {
		t.Error(err)
	}
	records := countRecords(t, opts.Dir)
	opts.Now = fixedClock
	if _, err := Rehearse(context.Background(), d, opts); err != nil || countRecords(t, opts.Dir) != records {
		t.Errorf("resuming a complete ceremony: %v, and it has %d records", err, countRecords(t, opts.Dir))
	}
}

// tear leaves the beginning of a record at the end of the transcript.
func tear(t *testing.T, dir string) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, TranscriptName), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(`{"actor":"chancery-cer`); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func countRecords(t *testing.T, dir string) int {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, TranscriptName))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	records, err := ReadTranscript(f)
	if err != nil && !errors.Is(err, ErrTorn) {
		t.Fatal(err)
	}
	return len(records)
}

// faulty is a token of which one answer is changed.
type faulty struct {
	hsm.Token
	info     func(hsm.TokenInfo) hsm.TokenInfo
	find     error
	generate error
	evidence func(hsm.Evidence) hsm.Evidence
	random   func(n int) []byte
}

func (f *faulty) Info() hsm.TokenInfo {
	if f.info != nil {
		return f.info(f.Token.Info())
	}
	return f.Token.Info()
}

func (f *faulty) Find(ctx context.Context, id []byte) (hsm.Key, error) {
	if f.find != nil {
		return nil, f.find
	}
	return f.Token.Find(ctx, id)
}

func (f *faulty) Generate(ctx context.Context, spec hsm.Spec) (hsm.Key, error) {
	if f.generate != nil {
		return nil, f.generate
	}
	return f.Token.Generate(ctx, spec)
}

func (f *faulty) Evidence(ctx context.Context, key hsm.Key) (hsm.Evidence, error) {
	e, err := f.Token.Evidence(ctx, key)
	if f.evidence != nil {
		e = f.evidence(e)
	}
	return e, err
}

func (f *faulty) Random(ctx context.Context, n int) ([]byte, error) {
	if f.random != nil {
		return f.random(n), nil
	}
	return f.Token.Random(ctx, n)
}

func TestRehearseRefuses(t *testing.T) {
	changed := func(change func(*hsm.Evidence)) *faulty {
		return &faulty{evidence: func(e hsm.Evidence) hsm.Evidence {
			attributes := map[string]string{}
			for k, v := range e.Attributes {
				attributes[k] = v
			}
			e.Attributes = attributes
			change(&e)
			return e
		}}
	}
	for _, tc := range []struct {
		name  string
		token *faulty // stands before the root's token
		opts  func(*Options)
		want  error
	}{
		{"a token that is not software", &faulty{info: func(i hsm.TokenInfo) hsm.TokenInfo {
			i.Manufacturer, i.Model = "Thales", "Luna K7"
			return i
		}}, nil, ErrEnvironment},
		{"a key that is not software", changed(func(e *hsm.Evidence) { e.Level = hsm.LevelModule }), nil, ErrEnvironment},
		{"an extractable key", changed(func(e *hsm.Evidence) { e.Attributes["EXTRACTABLE"] = "true" }), nil, hsm.ErrPolicy},
		{"a key that was imported", changed(func(e *hsm.Evidence) { e.Attributes["LOCAL"] = "false" }), nil, hsm.ErrPolicy},
		{"a key with another id", changed(func(e *hsm.Evidence) { e.Attributes["ID"] = "00" }), nil, hsm.ErrMismatch},
		{"a self-test that does not verify", changed(func(e *hsm.Evidence) { e.SelfTestText += "." }), nil, hsm.ErrBadSignature},
		{"a key of another type", changed(func(e *hsm.Evidence) { e.Algorithm = hsm.ECDSAP384 }), nil, hsm.ErrPolicy},
		{"a random source that is stuck", &faulty{random: func(n int) []byte { return make([]byte, n) }}, nil, ErrEntropy},
		{"a random source that is dry", &faulty{random: func(int) []byte { return nil }}, nil, ErrEntropy},
		{"a token that is lost", &faulty{generate: hsm.ErrLost}, nil, hsm.ErrLost},
		{"a token that is missing", nil, func(o *Options) { delete(o.Tokens, DemoOnlineToken) }, hsm.ErrNotFound},
		{"an output that exists", nil, func(o *Options) { place(t, o.Dir, "root.pem") }, ErrOutputExists},
		{"a transcript that exists", nil, func(o *Options) { place(t, o.Dir, TranscriptName) }, ErrOutputExists},
		{"another definition in the folder", nil, func(o *Options) { place(t, o.Dir, definitionName) }, ErrOutputExists},
		{"evidence that exists", nil, func(o *Options) { place(t, o.Dir, "evidence/ct-1.json") }, ErrOutputExists},
		{"a clock that refuses", nil, func(o *Options) { o.Now = killAfter(0) }, errKilled},
		{"a program that is not there", nil, func(o *Options) { o.Binary = "/nonexistent" }, os.ErrNotExist},
	} {
		t.Run(tc.name, func(t *testing.T) {
			opts := Options{Tokens: twoTokens(t), Dir: filepath.Join(memoryFolder(t), "out"), Now: fixedClock}
			if tc.token != nil {
				f := *tc.token
				f.Token = opts.Tokens[DemoRootToken]
				opts.Tokens[DemoRootToken] = &f
			}
			if tc.opts != nil {
				tc.opts(&opts)
			}
			if _, err := Rehearse(context.Background(), demoDefinition(t), opts); !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
			if _, err := os.Stat(filepath.Join(opts.Dir, "trusted_root.json")); err == nil {
				t.Error("it wrote a trusted root")
			}
		})
	}
}

// place puts a foreign file among the outputs.
func place(t testing.TB, dir, name string) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("foreign\n"), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestRehearseTokenNotEmpty(t *testing.T) {
	opts := Options{Tokens: twoTokens(t), Dir: memoryFolder(t), Now: fixedClock}
	hsmtest.NewKey(t, opts.Tokens[DemoOnlineToken], "left-behind", hsm.ECDSAP256)
	if _, err := Rehearse(context.Background(), demoDefinition(t), opts); !errors.Is(err, ErrNotEmpty) {
		t.Errorf("error %v, want ErrNotEmpty", err)
	}
}

// What is in the token in place of an announced key stops the ceremony for
// good: it can be looked at, and aborted.
func TestQuarantine(t *testing.T) {
	for _, tc := range []struct {
		name  string
		fault func(*faulty)
	}{
		{"two keys with the announced id", func(f *faulty) { f.find = hsm.ErrAmbiguous }},
		{"a key that breaks the policy", func(f *faulty) { f.find = hsm.ErrPolicy }},
		{"half a pair", func(f *faulty) { f.generate = hsm.ErrExists }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d, opts, root := interrupted(t)
			root.generate = nil
			tc.fault(root)
			if _, err := Rehearse(t.Context(), d, opts); !errors.Is(err, ErrStopped) {
				t.Errorf("resume: %v, want ErrStopped", err)
			}
			root.generate, root.find = nil, nil
			if _, err := Rehearse(t.Context(), d, opts); !errors.Is(err, ErrStopped) {
				t.Errorf("resume with the token as it should be: %v, want ErrStopped", err)
			}
			opts.People = Practice{}
			if err := Abort(t.Context(), d, opts, "w1", "the token holds half a key"); err != nil {
				t.Fatal(err)
			}
			err := Verify(opts.Dir).Err()
			if !errors.Is(err, ErrAborted) || errors.Is(err, ErrTranscript) {
				t.Errorf("verify: %v, want ErrAborted alone", err)
			}
			if _, err := Rehearse(t.Context(), d, opts); !errors.Is(err, ErrAborted) {
				t.Errorf("resume after the end: %v, want ErrAborted", err)
			}
		})
	}
}

// interrupted returns a ceremony that stopped after it announced its first key.
func interrupted(t *testing.T) (*Definition, Options, *faulty) {
	t.Helper()
	d, tokens := demoDefinition(t), twoTokens(t)
	root := &faulty{Token: tokens[DemoRootToken], generate: hsm.ErrLost}
	tokens[DemoRootToken] = root
	opts := Options{Tokens: tokens, Dir: filepath.Join(memoryFolder(t), "out"), Now: fixedClock}
	if _, err := Rehearse(t.Context(), d, opts); !errors.Is(err, hsm.ErrLost) {
		t.Fatalf("error %v, want ErrLost", err)
	}
	opts.Resume = true
	return d, opts, root
}

// A token that does not answer is no reason for quarantine, and another
// definition never goes on with a ceremony.
func TestResumeGoesOn(t *testing.T) {
	d, opts, root := interrupted(t)
	root.generate, root.find = nil, hsm.ErrLost
	if _, err := Rehearse(t.Context(), d, opts); !errors.Is(err, hsm.ErrLost) || errors.Is(err, ErrStopped) {
		t.Errorf("a lost token: %v, want ErrLost alone", err)
	}
	root.find = nil
	other := strings.Replace(string(d.Source()), "years: 10", "years: 20", 1)
	changed, err := ParseDefinition([]byte(other))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Rehearse(t.Context(), changed, opts); !errors.Is(err, ErrDefinition) {
		t.Errorf("another definition: %v, want ErrDefinition", err)
	}
	if _, err := Rehearse(t.Context(), d, opts); err != nil {
		t.Errorf("resuming on a good token: %v", err)
	}
}

// No other program than the one on record goes on with a ceremony.
func TestResumedByAnotherProgram(t *testing.T) {
	program := func(content string) string {
		t.Helper()
		path := filepath.Join(t.TempDir(), "program")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	d, tokens := demoDefinition(t), twoTokens(t)
	root := &faulty{Token: tokens[DemoRootToken], generate: hsm.ErrLost}
	tokens[DemoRootToken] = root
	opts := Options{Tokens: tokens, Dir: filepath.Join(memoryFolder(t), "out"), Now: fixedClock, Binary: program("one")}
	if _, err := Rehearse(t.Context(), d, opts); !errors.Is(err, hsm.ErrLost) {
		t.Fatalf("error %v, want ErrLost", err)
	}
	root.generate, opts.Resume = nil, true
	before, first := countRecords(t, opts.Dir), opts.Binary
	opts.Binary = program("another")
	if _, err := Rehearse(t.Context(), d, opts); !errors.Is(err, ErrProgram) || countRecords(t, opts.Dir) != before {
		t.Errorf("another program: %v, %d records, want ErrProgram and %d", err, countRecords(t, opts.Dir), before)
	}
	opts.Binary = first
	if _, err := Rehearse(t.Context(), d, opts); err != nil {
		t.Errorf("the same program: %v", err)
	}
	opts.Binary = program("a third")
	if _, err := Rehearse(t.Context(), d, opts); err != nil {
		t.Errorf("another program, and nothing is to be done: %v", err)
	}
}

// Shares that people bring are committed to and used.
func TestRehearseShares(t *testing.T) {
	d := demoDefinition(t)
	share := bytes.Repeat([]byte{7}, shareSize)
	opts := Options{
		Tokens: twoTokens(t), Dir: t.TempDir(), Now: fixedClock,
		People: &Prepared{Answers: map[string]string{"entropy:w2": hex.EncodeToString(share)}, Next: Practice{}},
	}
	if _, err := Rehearse(t.Context(), d, opts); err != nil {
		t.Fatal(err)
	}
	records, err := readTranscriptFile(filepath.Join(opts.Dir, TranscriptName))
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		if r.Step != string(StepEntropy) || r.Type != Done {
			continue
		}
		var data entropyResult
		if err := r.decode(&data); err != nil {
			t.Fatal(err)
		}
		if got := data.Reveals[1]; got.Contributor != "w2" || got.Value != hex.EncodeToString(share) {
			t.Errorf("second share %+v", got)
		}
		if data.Reveals[0].Value == data.Reveals[1].Value || len(data.Reveals) != 3 {
			t.Errorf("shares %+v", data.Reveals)
		}
		return
	}
	t.Error("no seed record")
}

func TestRehearseWindow(t *testing.T) {
	source := strings.Replace(string(demoDefinition(t).Source()), "environment: rehearsal",
		"environment: rehearsal\nwindow: {not-before: 2026-11-22T09:00:00Z, not-after: 2026-11-22T18:00:00Z}", 1)
	d, err := ParseDefinition([]byte(source))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		now  time.Time
		want error
	}{
		{"an hour early", time.Date(2026, 11, 22, 8, 0, 0, 0, time.UTC), ErrWindow},
		{"a second late", time.Date(2026, 11, 22, 18, 0, 1, 0, time.UTC), ErrWindow},
		{"the last second", time.Date(2026, 11, 22, 18, 0, 0, 0, time.UTC), nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			opts := Options{Tokens: twoTokens(t), Dir: filepath.Join(memoryFolder(t), "out"), Now: func() (time.Time, error) { return tc.now, nil }}
			if _, err := Rehearse(context.Background(), d, opts); !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
			if _, err := os.Stat(opts.Dir); tc.want != nil && err == nil {
				t.Error("it made the output folder")
			}
		})
	}
}

// A disk that fills up stops the ceremony; with more room it is resumed.
func TestResumeAfterFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=24k"); err != nil {
		t.Skipf("mount a small tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	d := demoDefinition(t)
	opts := Options{Tokens: twoTokens(t), Dir: dir, Now: fixedClock}
	if _, err := Rehearse(context.Background(), d, opts); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("error %v, want ENOSPC", err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_REMOUNT, "size=1m"); err != nil {
		t.Fatal(err)
	}
	opts.Resume = true
	if _, err := Rehearse(context.Background(), d, opts); err != nil {
		t.Fatal(err)
	}
	if err := Verify(dir).Err(); err != nil {
		t.Error(err)
	}
	for name, want := range map[string]int{DemoRootToken: 2, DemoOnlineToken: 4} {
		if n, err := opts.Tokens[name].Keys(context.Background()); err != nil || n != want {
			t.Errorf("token %s has %d keys (%v), want %d", name, n, err, want)
		}
	}
}

func TestRehearseCancelled(t *testing.T) {
	d := demoDefinition(t)
	ctx, cancel := context.WithCancel(context.Background())
	opts := Options{Tokens: twoTokens(t), Dir: filepath.Join(memoryFolder(t), "out"), Now: fixedClock}
	opts.Progress = func(e Event) {
		if e.Step.Kind == StepKey && e.Done {
			cancel()
		}
	}
	if _, err := Rehearse(ctx, d, opts); !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v, want context.Canceled", err)
	}
	opts.Resume, opts.Progress = true, nil
	if _, err := Rehearse(context.Background(), d, opts); err != nil {
		t.Error(err)
	}
}
