package ceremony

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"

	"github.com/chancery-ca/chancery/ceremony/internal/sshsig"
	"github.com/chancery-ca/chancery/hsm"
)

// scripted answers from a list, one answer after the other for each question,
// and then as Practice does. It keeps what it was asked and told.
type scripted struct {
	answers map[string][]string
	asked   []Question
	told    []Notice
}

func (s *scripted) Show(_ context.Context, n Notice) error {
	s.told = append(s.told, n)
	return nil
}

func (s *scripted) Ask(ctx context.Context, q Question) (string, error) {
	s.asked = append(s.asked, q)
	if list := s.answers[q.ID]; len(list) > 0 {
		s.answers[q.ID] = list[1:]
		return list[0], nil
	}
	return Practice{}.Ask(ctx, q)
}

// rehearsedBy runs the demonstration's ceremony with these people.
func rehearsedBy(t *testing.T, people People) (Options, error) {
	t.Helper()
	opts := Options{Tokens: twoTokens(t), Dir: filepath.Join(memoryFolder(t), "out"), Now: fixedClock, People: people}
	_, err := Rehearse(t.Context(), demoDefinition(t), opts)
	return opts, err
}

func repeat(s string) []string { return []string{s, s, s, s, s} }

// What people answer decides: a wrong answer is asked again, and after the
// fifth the ceremony stops with nothing lost.
func TestAnswers(t *testing.T) {
	for _, tc := range []struct {
		name    string
		answers map[string][]string
		want    error
		resume  bool // and then everybody answers as they should
	}{
		{"slips, and then as they should", map[string][]string{
			"people:w1": {"oops"}, "people:w2": {"a", "b", "c", ""}, "clock:w1": {"noon", "12:02"}, "certificate/root": {"no"},
			"witnesses:w1": {"/etc/passwd", "decline:", strings.Repeat("x", 1<<20), "/nowhere"},
		}, nil, false},
		{"empty answers for the right ones", map[string][]string{
			"people:w1": {""}, "certificate/root": {""}, "witnesses:w1": {""}, "witnesses:w2": {""},
		}, nil, false},
		{"never the words", map[string][]string{"people:w1": repeat("abandon abandon abandon")}, ErrAnswer, false},
		{"a witness is absent", map[string][]string{"people:w2": {"absent"}}, ErrQuorum, true},
		{"a watch an hour off", map[string][]string{"clock:w1": repeat("13:00")}, ErrAnswer, false},
		{"a watch three minutes off", map[string][]string{"clock:w1": repeat("11:57")}, ErrAnswer, false},
		{"a share that is none", map[string][]string{"entropy:w2": repeat("73")}, ErrAnswer, true},
		{"a share from a file that is not there", map[string][]string{"entropy:w1": repeat("file:/nowhere")}, ErrAnswer, false},
		{"a root that nobody wants", map[string][]string{"certificate/root": repeat("no")}, ErrAnswer, true},
		{"a witness declines", map[string][]string{"witnesses:w2": {"decline: not what I saw"}}, ErrDeclined, false},
		{"a witness signs later", map[string][]string{"witnesses:w1": {"later"}}, ErrUnfinished, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			opts, err := rehearsedBy(t, &scripted{answers: tc.answers})
			if !errors.Is(err, tc.want) || (err == nil) != (tc.want == nil) {
				t.Fatalf("error %v, want %v", err, tc.want)
			}
			if verified := Verify(opts.Dir).Err(); (verified == nil) != (tc.want == nil) {
				t.Errorf("verify: %v", verified)
			}
			if !tc.resume {
				return
			}
			opts.Resume, opts.People = true, nil
			if _, err := Rehearse(t.Context(), demoDefinition(t), opts); err != nil {
				t.Errorf("resume: %v", err)
			}
			if err := Verify(opts.Dir).Err(); err != nil {
				t.Errorf("verify after the resume: %v", err)
			}
		})
	}
}

// In production nobody but a person makes a decision, and nothing has a
// practice answer.
func TestLive(t *testing.T) {
	source := strings.NewReplacer("2026-12-01T09:00:00Z", "2026-11-22T09:00:00Z", "2026-12-01T18:00:00Z", "2026-11-22T18:00:00Z").Replace(ceremonySpec)
	d, err := ParseDefinition([]byte(source))
	if err != nil {
		t.Fatal(err)
	}
	person := &scripted{}
	r := &run{def: d, people: &Prepared{Answers: map[string]string{"decision": "yes", "file": "x"}, Next: person}}
	q := Question{ID: "decision", Confirmation: true, Practice: "yes"}
	if _, err := r.ask(t.Context(), q); !errors.Is(err, ErrLive) {
		t.Errorf("a prepared decision: %v, want ErrLive", err)
	}
	q.ID = "another"
	if _, err := r.ask(t.Context(), q); !errors.Is(err, ErrAnswer) || len(person.asked) != 1 || person.asked[0].Practice != "" || !person.asked[0].Live {
		t.Errorf("a decision: %v, asked %+v", err, person.asked)
	}
	if answer, err := r.ask(t.Context(), Question{ID: "file"}); err != nil || answer != "x" {
		t.Errorf("what is no decision: %q, %v", answer, err)
	}
	if _, err := Run(t.Context(), d, Options{}); !errors.Is(err, ErrNotInVersion) && !errors.Is(err, ErrAnswer) {
		t.Errorf("a ceremony without people: %v", err)
	}
}

// A prepared answer is given once: a wrong one is then asked of a person.
func TestPreparedOnce(t *testing.T) {
	d := demoDefinition(t)
	r := &run{def: d, people: &Prepared{Answers: map[string]string{"q": "wrong"}, Next: &scripted{answers: map[string][]string{"q": {"right"}}}}}
	check := func(s string) error { return wantText(s, "right") }
	if answer, err := r.ask(t.Context(), Question{ID: "q", Check: check}); err != nil || answer != "right" {
		t.Errorf("answer %q, %v", answer, err)
	}
}

func TestParseShare(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return "file:" + path
	}
	hexadecimal := strings.Repeat("0f", 32)
	words := Words([32]byte(bytes.Repeat([]byte{0x0f}, 32)))
	const dice = "1234561234"
	for _, tc := range []struct{ name, text, want string }{
		{"hexadecimal", hexadecimal, hexadecimal},
		{"hexadecimal in capitals, in groups", strings.ToUpper(strings.Repeat("0f0f ", 16)), hexadecimal},
		{"words", words, hexadecimal},
		{"words in capitals", strings.ToUpper(words), hexadecimal},
		{"a file", file("hex", hexadecimal+"\n"), hexadecimal},
		{"a file with words", file("words", words), hexadecimal},
		{"63 digits", hexadecimal[1:], ""},
		{"words that are swapped", strings.Join(append(strings.Fields(words)[1:], "about"), " "), ""},
		{"99 throws", strings.Repeat(dice, 10)[:99], ""},
		{"a die with seven sides", strings.Repeat("1234567123", 10), ""},
		{"nothing", "", ""},
		{"a file that names a file", file("loop", file("hex2", hexadecimal)), ""},
		{"a huge file", file("huge", strings.Repeat("1", 10000)), ""},
		{"a folder", "file:" + dir, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			share, err := parseShare(tc.text)
			if got := hex.EncodeToString(share); got != tc.want || (err == nil) != (tc.want != "") {
				t.Errorf("share %s, %v; want %q", got, err, tc.want)
			}
		})
	}
	one, err := parseShare(strings.Repeat(dice, 10))
	two, err2 := parseShare(strings.Repeat(dice+" \n", 10))
	if err != nil || err2 != nil || !bytes.Equal(one, two) || len(one) != shareSize {
		t.Errorf("throws: %x, %x, %v, %v", one, two, err, err2)
	}
}

// The words that are asked for are those of the hash, by their numbers, and
// depend on what they are asked for.
func TestChallenge(t *testing.T) {
	hash := [32]byte(bytes.Repeat([]byte{0x7f}, 32))
	all := strings.Fields(Words(hash))
	seen := map[string]bool{}
	for i := range 200 {
		c := newChallenge(fmt.Sprint(i), hash)
		for k, n := range c.numbers {
			if n < 1 || n > 24 || c.words[k] != all[n-1] || k > 0 && n <= c.numbers[k-1] {
				t.Fatalf("challenge %+v", c)
			}
		}
		if c != newChallenge(fmt.Sprint(i), hash) {
			t.Fatal("a challenge is not the same again")
		}
		seen[c.prompt()] = true
	}
	if len(seen) < 150 {
		t.Errorf("%d different challenges of 200", len(seen))
	}
	c := newChallenge("x", hash)
	for text, want := range map[string]bool{
		c.answer():                  true,
		strings.ToUpper(c.answer()): true,
		strings.ReplaceAll(c.answer(), " ", ",  "): true,
		c.answer() + " " + c.words[0]:              false,
		strings.Join(c.words[:2], " "):             false,
		"":                                         false,
	} {
		if c.fits(text) != want {
			t.Errorf("%q: %v, want %v", text, !want, want)
		}
	}
}

// treeRoot is RFC 6962's tree, as a package that we did not write computes it.
func TestTreeRoot(t *testing.T) {
	var leaves [][32]byte
	factory := &compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}
	r := factory.NewEmptyRange(0)
	for n := range 70 {
		want := rfc6962.DefaultHasher.EmptyRoot()
		if n > 0 {
			var err error
			if want, err = r.GetRootHash(nil); err != nil {
				t.Fatal(err)
			}
		}
		if got := treeRoot(leaves); !bytes.Equal(got[:], want) {
			t.Fatalf("root of %d leaves (%d bits) is %x, want %x", n, bits.Len(uint(n)), got, want)
		}
		leaf := leafHash([]byte(fmt.Sprint(n)))
		leaves = append(leaves, leaf)
		if err := r.Append(leaf[:], nil); err != nil {
			t.Fatal(err)
		}
	}
}

// A witness's signature is of this checkpoint, by the key of the definition:
// the practice key is for rehearsals alone.
func TestPracticeKeyOnlyInRehearsals(t *testing.T) {
	d := demoDefinition(t)
	f := factsOf(t, d)
	armored, err := sshsig.Sign(practiceKey(d.Hash(), "w1"), f.checkpointFile().content, Namespace)
	if err != nil {
		t.Fatal(err)
	}
	w1 := d.person("w1")
	if err := f.checkSignature(w1, string(armored)); err != nil {
		t.Errorf("in a rehearsal: %v", err)
	}
	if err := f.checkSignature(d.person("w2"), string(armored)); !errors.Is(err, sshsig.ErrSignature) {
		t.Errorf("of another witness: %v, want ErrSignature", err)
	}
	production := *d
	production.Environment = Production
	f = factsOf(t, &production)
	if err := f.checkSignature(w1, string(armored)); !errors.Is(err, sshsig.ErrSignature) {
		t.Errorf("in production: %v, want ErrSignature", err)
	}
}

func TestCheckWatch(t *testing.T) {
	at := func(h, m int) time.Time { return time.Date(2026, 11, 22, h, m, 59, 0, time.UTC) }
	for _, tc := range []struct {
		name, watch string
		now         time.Time
		ok          bool
	}{
		{"the same minute", "12:00", at(12, 0), true},
		{"two minutes early", "11:58", at(12, 0), true},
		{"three minutes early", "11:57", at(12, 0), false},
		{"over midnight", "23:59", at(0, 1), true},
		{"before midnight", "00:01", at(23, 59), true},
		{"twelve hours", "00:00", at(12, 0), false},
		{"with seconds", "12:00:00", at(12, 0), false},
		{"no zero", "9:00", at(9, 0), false},
		{"25 hours", "25:00", at(1, 0), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := checkWatch(tc.watch, tc.now, clockTolerance); (err == nil) != tc.ok {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestParseAnswers(t *testing.T) {
	got, err := ParseAnswers([]byte("people:w1: a b c\n\"clock:w1\": \"12:00\"\n"))
	if diff := cmp.Diff(map[string]string{"people:w1": "a b c", "clock:w1": "12:00"}, got); diff != "" || err != nil {
		t.Errorf("%v, (-want +got):\n%s", err, diff)
	}
	for name, text := range map[string]string{
		"a list": "[a, b]", "double": "a: b\na: c", "anchor": "a: &x b", "nested": "a: {b: c}",
		"huge": "a: " + strings.Repeat("x", MaxDefinition),
	} {
		if _, err := ParseAnswers([]byte(text)); !errors.Is(err, ErrDefinition) {
			t.Errorf("%s: %v, want ErrDefinition", name, err)
		}
	}
}

func FuzzParseAnswers(f *testing.F) {
	f.Add([]byte("people:w1: a b c\n"))
	f.Add([]byte("a: &x [*x]"))
	f.Fuzz(func(t *testing.T, content []byte) {
		if _, err := ParseAnswers(content); err != nil && !errors.Is(err, ErrDefinition) {
			t.Fatalf("error %v is not ErrDefinition", err)
		}
	})
}

// The attributes that a plan promises are those that keys have.
func TestTemplateIsTheEvidence(t *testing.T) {
	_, res, opts := rehearsed(t)
	for name := range res.Keys.Keys {
		records, err := readTranscriptFile(filepath.Join(opts.Dir, TranscriptName))
		if err != nil {
			t.Fatal(err)
		}
		for i := range records {
			var made keyResult
			if !strings.HasPrefix(records[i].Step, "key/") || records[i].Type != Done {
				continue
			}
			if err := records[i].decode(&made); err != nil {
				t.Fatal(err)
			}
			for want, attributes := range map[string][]string{"true": keyHas, "false": keyHasNot} {
				for _, a := range attributes {
					if got := made.Evidence.Attributes[a]; got != want {
						t.Errorf("key %s: %s is %q, the plan says %s", name, a, got, want)
					}
				}
			}
		}
		break
	}
}

// A rehearsal seeds what takes a seed.
func TestSeeded(t *testing.T) {
	tokens := twoTokens(t)
	refusing := &seeder{Token: tokens[DemoOnlineToken], err: hsm.ErrUnsupported}
	taking := &seeder{Token: tokens[DemoRootToken]}
	opts := Options{
		Tokens: map[string]hsm.Token{DemoRootToken: taking, DemoOnlineToken: refusing},
		Dir:    filepath.Join(memoryFolder(t), "out"), Now: fixedClock,
	}
	if _, err := Rehearse(t.Context(), demoDefinition(t), opts); err != nil {
		t.Fatal(err)
	}
	if len(taking.seed) != 32 || !bytes.Equal(taking.seed, refusing.seed) {
		t.Errorf("seeds %x and %x", taking.seed, refusing.seed)
	}
	text, err := os.ReadFile(filepath.Join(opts.Dir, TranscriptName))
	if err != nil || !bytes.Contains(text, []byte(`"answer":"the token does not take it","taken":false`)) || !bytes.Contains(text, []byte(`"data":{"taken":true}`)) {
		t.Errorf("the transcript does not say who took the seed (%v)", err)
	}
}

type seeder struct {
	hsm.Token
	err  error
	seed []byte
}

func (s *seeder) SeedRandom(_ context.Context, seed []byte) error {
	s.seed = bytes.Clone(seed)
	return s.err
}

// The window is for the ceremony, not for its end: after it nothing goes on,
// and a witness can sign and people abort.
func TestAfterTheWindow(t *testing.T) {
	source := strings.Replace(string(demoDefinition(t).Source()), "environment: rehearsal",
		"environment: rehearsal\nwindow: {not-before: 2026-11-22T09:00:00Z, not-after: 2026-11-22T18:00:00Z}", 1)
	d, err := ParseDefinition([]byte(source))
	if err != nil {
		t.Fatal(err)
	}
	tomorrow := func() (time.Time, error) { return testNow.AddDate(0, 0, 1), nil }
	begun := func(answers map[string][]string, want error) Options {
		t.Helper()
		opts := Options{Tokens: twoTokens(t), Dir: filepath.Join(memoryFolder(t), "out"), Now: fixedClock, People: &scripted{answers: answers}}
		if _, err := Rehearse(t.Context(), d, opts); !errors.Is(err, want) {
			t.Fatalf("error %v, want %v", err, want)
		}
		opts.Resume, opts.People, opts.Now = true, Practice{}, tomorrow
		return opts
	}
	opts := begun(map[string][]string{"entropy:w1": repeat("no share")}, ErrAnswer)
	if _, err := Rehearse(t.Context(), d, opts); !errors.Is(err, ErrWindow) {
		t.Errorf("resume on the next day: %v, want ErrWindow", err)
	}
	if err := Abort(t.Context(), d, opts, "w1", "we ran out of time"); err != nil {
		t.Errorf("abort on the next day: %v", err)
	}
	if err := Verify(opts.Dir).Err(); !errors.Is(err, ErrAborted) || errors.Is(err, ErrTranscript) {
		t.Errorf("verify: %v, want ErrAborted alone", err)
	}
	opts = begun(map[string][]string{"witnesses:w1": {later}}, ErrUnfinished)
	if _, err := Rehearse(t.Context(), d, opts); err != nil {
		t.Errorf("sign on the next day: %v", err)
	}
	if err := Verify(opts.Dir).Err(); err != nil {
		t.Error(err)
	}
}

// suspended is People whose machine sleeps for minutes after the answer to one
// question was found right, and before it is on record.
type suspended struct {
	People
	question string
	clock    time.Time
	readings int // of the clock until it sleeps; 0 for never
}

func (s *suspended) Ask(ctx context.Context, q Question) (string, error) {
	if q.ID == s.question {
		s.question, s.readings = "", 2
	}
	return s.People.Ask(ctx, q)
}

func (s *suspended) now() (time.Time, error) {
	if s.readings > 0 {
		if s.readings--; s.readings == 0 {
			s.clock = s.clock.Add(4 * time.Minute)
		}
	}
	return s.clock, nil
}

// What a verifier would refuse is not put on record: it could never be taken
// back, and no resumed run would get past it.
func TestRefusedIsNotRecorded(t *testing.T) {
	d := demoDefinition(t)
	people := &suspended{People: Practice{}, question: "clock:w1", clock: testNow}
	opts := Options{Tokens: twoTokens(t), Dir: filepath.Join(memoryFolder(t), "out"), Now: people.now, People: people}
	if _, err := Rehearse(t.Context(), d, opts); !errors.Is(err, ErrTranscript) || !strings.Contains(err.Error(), "differ by 4m0s") {
		t.Fatalf("a watch that was right minutes ago: %v, want ErrTranscript", err)
	}
	opts.Resume = true
	if _, err := Rehearse(t.Context(), d, opts); err != nil {
		t.Fatalf("resume: %v", err)
	}
	if err := Verify(opts.Dir).Err(); err != nil {
		t.Error(err)
	}
}
