package audit

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

// TestMain is also the child of TestKilled.
func TestMain(m *testing.M) {
	if dir := os.Getenv("CHANCERY_AUDIT_CHILD"); dir != "" {
		child(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// sealer is a timestamp authority whose token is the digest itself.
type sealer struct{ err error }

func (s sealer) Timestamp(_ context.Context, digest [sha256.Size]byte) ([]byte, error) {
	return digest[:], s.err
}

func checkSeal(seal, line []byte) error {
	if digest := sha256.Sum256(line); !bytes.Equal(seal, digest[:]) {
		return errors.New("timestamp of something else")
	}
	return nil
}

func open(t testing.TB, cfg Config) *Log {
	t.Helper()
	if cfg.Now == nil {
		cfg.Now = func() (time.Time, error) { return noon, nil }
	}
	if err := Create(cfg.Dir, cfg.Now); err != nil && !errors.Is(err, ErrExists) {
		t.Fatal(err)
	}
	l, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func shut(t testing.TB, l *Log) {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func appendTo(t testing.TB, l *Log, n int) {
	t.Helper()
	for i := range n {
		if err := l.Append(t.Context(), Record{Type: TypeAllowed, Serial: fmt.Sprintf("%x", i), SAN: "alice@example.com"}); err != nil {
			t.Fatal(err)
		}
	}
}

// types lists the records in dir.
func types(t testing.TB, dir string) (out []Type) {
	t.Helper()
	if _, err := Verify(dir, checkSeal, nil, func(r Record) error { out = append(out, r.Type); return nil }); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestAppend(t *testing.T) {
	dir := t.TempDir()
	l := open(t, Config{Dir: dir, Sealer: sealer{}})
	index := uint64(7)
	if err := l.Append(t.Context(), Record{Type: TypeAllowed, Request: "r", Issuer: "https://idp.example", SANType: "email", SAN: "<alice&bob>@example.com", Serial: "1a"}); err != nil {
		t.Fatal(err)
	}
	l.Note(Record{Type: TypeIssued, Serial: "1a", LogIndex: &index})
	l.Refuse(Record{Reason: "token refused"}, false)
	shut(t, l)
	if err := l.Append(t.Context(), Record{}); !errors.Is(err, ErrUnavailable) {
		t.Errorf("after Close: %v", err)
	}
	want := []Type{TypeBegin, TypeAllowed, TypeIssued, TypeRefused, TypeSeal}
	if d := cmp.Diff(want, types(t, dir)); d != "" {
		t.Error(d)
	}
	again := open(t, Config{Dir: dir, Sealer: sealer{}})
	shut(t, again)
	if d := cmp.Diff(want, types(t, dir)); d != "" {
		t.Errorf("opening and closing wrote something: %s", d)
	}
	report, err := Verify(dir, checkSeal, nil, nil)
	if err != nil || report.Records != 5 || report.Files != 1 || report.Seals != 1 || report.Sealed != 4 {
		t.Errorf("report %+v, %v", report, err)
	}
}

// TestCloseAtOnce: whoever closes, and however many, finds the files closed and
// every record that was accepted written.
func TestCloseAtOnce(t *testing.T) {
	dir := t.TempDir()
	l := open(t, Config{Dir: dir})
	var all sync.WaitGroup
	var written atomic.Int64
	for range 8 {
		all.Go(func() {
			for l.Append(context.Background(), Record{Type: TypeAllowed}) == nil {
				written.Add(1)
			}
		})
	}
	appendTo(t, l, 1)
	for range 4 {
		all.Go(func() { shut(t, l) })
	}
	all.Wait()
	if n := len(types(t, dir)); int64(n) < written.Load()+2 {
		t.Errorf("%d records, %d were acknowledged", n-2, written.Load())
	}
	shut(t, open(t, Config{Dir: dir})) // nobody holds it
}

// TestCreate: an audit begins once, and only when it is told to.
func TestCreate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	now := func() (time.Time, error) { return noon, nil }
	for _, state := range []string{"no folder", "empty folder"} {
		if l, err := Open(Config{Dir: dir, Now: now}); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v, %v", state, l, err)
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := Create(dir, now); err != nil {
		t.Fatal(err)
	}
	if err := Create(dir, now); !errors.Is(err, ErrExists) {
		t.Errorf("a second time: %v", err)
	}
	l := open(t, Config{Dir: dir})
	if err := Create(dir, now); !errors.Is(err, ErrInUse) {
		t.Errorf("while it is open: %v", err)
	}
	shut(t, l)
	if d := cmp.Diff([]Type{TypeBegin}, types(t, dir)); d != "" {
		t.Error(d)
	}
}

// TestConcurrent: everybody's record is there once, in one chain, over several
// files, and many share a write.
func TestConcurrent(t *testing.T) {
	dir := t.TempDir()
	l := open(t, Config{Dir: dir, MaxFile: 20 << 10})
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			for j := range 20 {
				if err := l.Append(t.Context(), Record{Type: TypeAllowed, Serial: fmt.Sprintf("%d-%d", i, j)}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	shut(t, l)
	seen := map[string]int{}
	report, err := Verify(dir, nil, nil, func(r Record) error { seen[r.Serial]++; return nil })
	if err != nil {
		t.Fatal(err)
	}
	delete(seen, "")
	if len(seen) != 640 || report.Files < 2 {
		t.Errorf("%d records in %d files", len(seen), report.Files)
	}
	for serial, n := range seen {
		if n != 1 {
			t.Errorf("%s stands %d times", serial, n)
		}
	}
	shut(t, open(t, Config{Dir: dir}))
}

// TestStrangers: refusals without a token are limited and counted.
func TestStrangers(t *testing.T) {
	dir := t.TempDir()
	l := open(t, Config{Dir: dir})
	const flood = 10 * strangerBurst
	start := time.Now()
	for range flood {
		l.Refuse(Record{Reason: "no token"}, false)
	}
	most := strangerBurst + 1 + int(strangerRate*time.Since(start).Seconds())
	for range 20 {
		l.Refuse(Record{Reason: "policy", SAN: "alice@example.com"}, true)
	}
	shut(t, l)
	strangers, known, omitted := 0, 0, uint64(0)
	if _, err := Verify(dir, nil, nil, func(r Record) error {
		switch {
		case r.Type == TypeOmitted:
			omitted += r.Count
		case r.Type == TypeRefused && r.SAN == "":
			strangers++
		case r.Type == TypeRefused:
			known++
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if known != 20 || strangers+int(omitted) != flood || strangers < strangerBurst || strangers > most {
		t.Errorf("%d strangers, %d omitted, %d known", strangers, omitted, known)
	}
}

// TestTampering flips a bit of every octet, and takes, doubles and swaps lines.
func TestTampering(t *testing.T) {
	dir := t.TempDir()
	l := open(t, Config{Dir: dir, Sealer: sealer{}})
	appendTo(t, l, 4)
	shut(t, l)
	names, err := Files(dir)
	if err != nil || len(names) != 1 {
		t.Fatal(names, err)
	}
	good, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	seals, err := os.ReadFile(filepath.Join(dir, SealsName))
	if err != nil {
		t.Fatal(err)
	}
	kept, err := ReadSeals(seals)
	if err != nil || len(kept) != 1 {
		t.Fatal(kept, err)
	}
	refused := func(name string, text []byte) {
		t.Helper()
		if err := os.WriteFile(names[0], text, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Verify(dir, checkSeal, kept, nil); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 1 << (i % 8)
		refused(fmt.Sprintf("octet %d", i), bad)
	}
	lines := bytes.SplitAfter(bytes.TrimSuffix(good, []byte("\n")), []byte("\n"))
	lines[len(lines)-1] = append(lines[len(lines)-1], '\n')
	for i := range lines {
		refused(fmt.Sprintf("without line %d", i), bytes.Join(slices.Delete(slices.Clone(lines), i, i+1), nil))
		refused(fmt.Sprintf("line %d twice", i), bytes.Join(slices.Insert(slices.Clone(lines), i, lines[i]), nil))
		if i > 0 {
			swapped := slices.Clone(lines)
			swapped[i-1], swapped[i] = swapped[i], swapped[i-1]
			refused(fmt.Sprintf("lines %d and %d swapped", i-1, i), bytes.Join(swapped, nil))
		}
		refused(fmt.Sprintf("cut before line %d", i), bytes.Join(lines[:i], nil))
	}
	refused("empty", nil)
	if err := os.WriteFile(names[0], good, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(dir, checkSeal, kept, nil); err != nil {
		t.Errorf("as it was: %v", err)
	}
	if _, err := Verify(t.TempDir(), nil, nil, nil); !errors.Is(err, ErrDamaged) {
		t.Errorf("no audit at all: %v", err)
	}
}

// TestOpenRefuses: what does not hold together is not continued.
func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	l := open(t, Config{Dir: dir, MaxFile: 1})
	if _, err := Open(Config{Dir: dir, Now: l.cfg.Now}); !errors.Is(err, ErrInUse) {
		t.Errorf("a second process: %v", err)
	}
	appendTo(t, l, 3)
	shut(t, l)
	names, err := Files(dir)
	if err != nil || len(names) < 3 {
		t.Fatal(names, err)
	}
	for name, change := range map[string]func() error{
		"newest file changed":      func() error { return os.WriteFile(names[len(names)-1], []byte("{}\n"), 0o600) },
		"file before it changed":   func() error { return os.WriteFile(names[len(names)-2], []byte("{}\n"), 0o600) },
		"file before it is gone":   func() error { return os.Remove(names[len(names)-2]) },
		"newest file renamed":      func() error { return os.Rename(names[len(names)-1], filepath.Join(dir, fileName(999))) },
		"file before it cut short": func() error { return os.Truncate(names[len(names)-2], 10) },
	} {
		saved := map[string][]byte{}
		for _, n := range names {
			if saved[n], err = os.ReadFile(n); err != nil {
				t.Fatal(err)
			}
		}
		if err := change(); err != nil {
			t.Fatal(err)
		}
		if l, err := Open(Config{Dir: dir, Now: l.cfg.Now}); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v, %v", name, l, err)
		}
		_ = os.Remove(filepath.Join(dir, fileName(999)))
		for n, text := range saved {
			if err := os.WriteFile(n, text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	shut(t, open(t, Config{Dir: dir}))
}

// TestUnfinished: octets of a record that was never acknowledged are cut off,
// and that is written down.
func TestUnfinished(t *testing.T) {
	dir := t.TempDir()
	l := open(t, Config{Dir: dir})
	appendTo(t, l, 2)
	shut(t, l)
	names, err := Files(dir)
	if err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	last := bytes.LastIndexByte(good[:len(good)-1], '\n') + 1
	for cut := last; cut < len(good); cut += 7 {
		if err := os.WriteFile(names[0], good[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		l := open(t, Config{Dir: dir})
		appendTo(t, l, 1)
		shut(t, l)
		want := []Type{TypeBegin, TypeAllowed, TypeBegin, TypeAllowed}
		if cut == last {
			want = []Type{TypeBegin, TypeAllowed, TypeAllowed}
		}
		if d := cmp.Diff(want, types(t, dir)); d != "" {
			t.Errorf("cut at %d: %s", cut, d)
		}
	}
	if err := os.WriteFile(names[0], nil, 0o600); err != nil {
		t.Fatal(err)
	}
	shut(t, open(t, Config{Dir: dir}))
	if d := cmp.Diff([]Type{TypeBegin}, types(t, dir)); d != "" {
		t.Errorf("a file that was made and not written: %s", d)
	}
}

// TestWriteFails: after one failure nothing is acknowledged any more.
func TestWriteFails(t *testing.T) {
	dir := t.TempDir()
	l := open(t, Config{Dir: dir})
	appendTo(t, l, 1)
	reader, err := os.Open(filepath.Join(dir, fileName(0))) // not for writing: EBADF
	if err != nil {
		t.Fatal(err)
	}
	file := l.w.file
	defer file.Close()
	l.w.file = reader // the writer is idle
	for range 2 {
		if err := l.Append(t.Context(), Record{Type: TypeAllowed}); !errors.Is(err, ErrUnavailable) {
			t.Errorf("err %v", err)
		}
	}
	if l.Err() == nil {
		t.Error("Err is nil")
	}
	l.Refuse(Record{}, true)
	shut(t, l)
	if d := cmp.Diff([]Type{TypeBegin, TypeAllowed}, types(t, dir)); d != "" {
		t.Error(d)
	}
}

// TestBounds: a queue has a limit, a wait an end, a record a size.
func TestBounds(t *testing.T) {
	l := open(t, Config{Dir: t.TempDir()})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Append(ctx, Record{Type: TypeAllowed}); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("ended context: %v", err)
	}
	if err := l.Append(t.Context(), Record{Type: TypeAllowed, Reason: strings.Repeat("x", maxLine)}); !errors.Is(err, ErrUnavailable) {
		t.Errorf("huge record: %v", err)
	}
	shut(t, l)
	full := &Log{queue: make(chan *entry), stop: make(chan struct{}), done: make(chan struct{})}
	if err := full.Append(t.Context(), Record{}); !errors.Is(err, ErrBusy) {
		t.Errorf("full queue: %v", err)
	}
}

// TestClock: a clock that goes back or fails leaves the times in order.
func TestClock(t *testing.T) {
	dir := t.TempDir()
	var mu sync.Mutex
	now, failed := noon, error(nil)
	l := open(t, Config{Dir: dir, Now: func() (time.Time, error) { mu.Lock(); defer mu.Unlock(); return now, failed }})
	for _, step := range []struct {
		to  time.Time
		err error
	}{{noon.Add(-time.Hour), nil}, {time.Time{}, errors.New("clock refuses")}, {noon.Add(time.Second), nil}} {
		mu.Lock()
		now, failed = step.to, step.err
		mu.Unlock()
		appendTo(t, l, 1)
	}
	shut(t, l)
	var times []time.Time
	if _, err := Verify(dir, nil, nil, func(r Record) error { times = append(times, r.Time); return nil }); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]time.Time{noon, noon, noon, noon.Add(time.Second)}, times); d != "" {
		t.Error(d)
	}
}

// TestSeals: a seal that fails is tried again; one of another line is found.
func TestSeals(t *testing.T) {
	dir := t.TempDir()
	l := open(t, Config{Dir: dir, Sealer: sealer{errors.New("token lost")}})
	appendTo(t, l, 1)
	shut(t, l)
	if d := cmp.Diff([]Type{TypeBegin, TypeAllowed}, types(t, dir)); d != "" {
		t.Error(d)
	}
	shut(t, open(t, Config{Dir: dir, Sealer: sealer{}}))
	if d := cmp.Diff([]Type{TypeBegin, TypeAllowed, TypeSeal}, types(t, dir)); d != "" {
		t.Error(d)
	}
	wrong := func(_, _ []byte) error { return errors.New("another key") }
	if _, err := Verify(dir, wrong, nil, nil); !errors.Is(err, ErrDamaged) {
		t.Errorf("a seal that does not verify: %v", err)
	}
	for name, text := range map[string]string{"not a record": "{}\n", "not a seal": `{"v":1,"seq":0,"time":"2026-11-22T12:00:00Z","type":"allowed","prev":""}` + "\n"} {
		if _, err := ReadSeals([]byte(text)); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSealsInTime: a seal a day of what is new, one that failed soon again, and
// one soon of what a process left unsealed when it ended.
func TestSealsInTime(t *testing.T) {
	for name, test := range map[string]struct {
		fails int64 // times
		after time.Duration
	}{"left unsealed": {0, sealAgain}, "failed twice": {2, 3 * sealAgain}} {
		synctest.Test(t, func(t *testing.T) {
			dir := t.TempDir()
			now := func() (time.Time, error) { return time.Now(), nil }
			s := new(moody)
			s.fails.Store(test.fails)
			l := open(t, Config{Dir: dir, Now: now, Sealer: s}) // Create has left a line
			seals := func(want int64, when string) {
				t.Helper()
				synctest.Wait()
				if n := s.made.Load(); n != want {
					t.Errorf("%s: %d seals %s, want %d", name, n, when, want)
				}
			}
			time.Sleep(test.after - time.Second) // the bubble's clock
			seals(0, "before the time")
			time.Sleep(time.Second)
			seals(1, "at the time")
			time.Sleep(2 * defaultSeal)
			seals(1, "when nothing was new")
			appendTo(t, l, 1)
			time.Sleep(defaultSeal)
			seals(2, "a day after a record")
			shut(t, l)
			seals(2, "at the end")
			if _, err := Verify(dir, checkSeal, nil, nil); err != nil {
				t.Error(err)
			}
		})
	}
}

// moody is a sealer that fails a few times first.
type moody struct{ fails, made atomic.Int64 }

func (m *moody) Timestamp(_ context.Context, digest [sha256.Size]byte) ([]byte, error) {
	if m.fails.Add(-1) >= 0 {
		return nil, errors.New("token busy")
	}
	m.made.Add(1)
	return digest[:], nil
}

// TestSealOfAFullFile: a seal stands behind the line that it is over, also where
// the next record begins a file.
func TestSealOfAFullFile(t *testing.T) {
	dir := t.TempDir()
	for range 3 {
		l := open(t, Config{Dir: dir, MaxFile: 1, Sealer: sealer{}})
		appendTo(t, l, 1)
		shut(t, l)
	}
	want := []Type{TypeBegin, TypeBegin, TypeAllowed, TypeSeal, TypeBegin, TypeAllowed, TypeSeal, TypeBegin, TypeAllowed, TypeSeal}
	if d := cmp.Diff(want, types(t, dir)); d != "" {
		t.Error(d)
	}
}

// child appends until it is killed and says what was acknowledged.
func child(dir string) {
	l, err := Open(Config{Dir: dir, Now: func() (time.Time, error) { return time.Now(), nil }, MaxFile: 8 << 10})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	var mu sync.Mutex
	for i := range 4 {
		go func() {
			for j := 0; ; j++ {
				serial := fmt.Sprintf("%d-%d-%d", os.Getpid(), i, j)
				if err := l.Append(context.Background(), Record{Type: TypeAllowed, Serial: serial}); err != nil {
					fmt.Println("error", err)
					os.Exit(1)
				}
				mu.Lock()
				fmt.Println(serial)
				mu.Unlock()
			}
		}()
	}
	select {}
}

// TestKilled: whatever moment a process dies, what it acknowledged is there
// and the chain holds.
func TestKilled(t *testing.T) {
	dir := t.TempDir()
	if err := Create(dir, func() (time.Time, error) { return time.Now(), nil }); err != nil {
		t.Fatal(err)
	}
	acknowledged := map[string]bool{}
	for round := range 12 {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), "CHANCERY_AUDIT_CHILD="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for n := 0; lines.Scan(); n++ {
			if strings.HasPrefix(lines.Text(), "error") {
				t.Fatal(lines.Text())
			}
			acknowledged[lines.Text()] = true
			if n == 20+7*round {
				_ = cmd.Process.Kill()
			}
		}
		_ = cmd.Wait()
	}
	if _, err := Verify(dir, nil, nil, func(r Record) error { delete(acknowledged, r.Serial); return nil }); err != nil {
		t.Fatal(err)
	}
	if len(acknowledged) != 0 {
		t.Errorf("%d acknowledged records are gone", len(acknowledged))
	}
	shut(t, open(t, Config{Dir: dir}))
}

func FuzzParseRecord(f *testing.F) {
	f.Add([]byte(`{"v":1,"seq":0,"time":"2026-11-22T12:00:00Z","type":"begin","prev":"` + strings.Repeat("0", 64) + `"}`))
	f.Add([]byte(`{"v":1,"seq":` + strconv.FormatUint(1<<63, 10) + `,"time":"2026-11-22T12:00:00.5Z","type":"seal","seal":"AA==","prev":""}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		r, err := ParseRecord(line)
		if err == nil && r.Version != version {
			t.Errorf("accepted %q", line)
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	for _, clients := range []int{1, 32} {
		b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
			l := open(b, Config{Dir: b.TempDir()})
			defer shut(b, l)
			record := Record{Type: TypeAllowed, Request: "0123456789ABCDEFGHIJKLMNOP", Issuer: "https://idp.example", SANType: "email", SAN: "alice@example.com", SPKI: strings.Repeat("a", 64), Serial: strings.Repeat("b", 40)}
			b.SetParallelism(clients)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := l.Append(b.Context(), record); err != nil {
						b.Error(err)
					}
				}
			})
		})
	}
}
