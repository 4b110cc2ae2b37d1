package torture

import (
	"bufio"
	"bytes"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestPowerCuts records the system calls of a child with what they wrote, cuts
// the power at random ones, and examines what the disk may have then. The
// next child goes on from such a state. Half of the cuts are right after
// something was said.
//
// The model of the disk is POSIX and no more: what fsync or fdatasync of a file
// returned for is there; a name is there when its directory was synced; every
// other change is there or not, one sector of 512 octets at a time, in any
// order. That it sees every change is checked: with everything kept it must be
// the directory that the child left.
func TestPowerCuts(t *testing.T) {
	strace := needStrace(t)
	const lanes = 2
	for n := range lanes {
		t.Run(fmt.Sprintf("lane %d", n), func(t *testing.T) {
			t.Parallel()
			l := newLane(t)
			cuts, lost := 0, 0
			for want := long(20, 25) / lanes; cuts < want; cuts += cutsInRound {
				lost += l.cutPower(strace)
			}
			t.Logf("%d power cuts, %d changes not synced at them, %d answers hold", cuts, lost, l.finish())
		})
	}
}

const (
	cutsInRound = 10
	// workBeforeCut is how many answers a recorded child gives.
	workBeforeCut = 250
)

// cutPower records one child and examines what cuts leave. The lane is then as
// the last cut left it. It returns how many changes were pending at the cuts.
func (l *lane) cutPower(strace string) (pending int) {
	l.t.Helper()
	before := said{signed: slices.Clone(l.said.signed), answers: slices.Clone(l.said.answers)}
	d := readDisk(l.t, l.dir)
	trace := filepath.Join(l.dir, "trace")
	status, complaint := l.run(workBeforeCut, strace, "-f", "-qq", "-y", "-xx", "-s", "1000000", "-o", trace, "-e", "signal=none",
		"-e", "trace=openat,write,writev,pwrite64,pwritev,fsync,fdatasync,ftruncate,fallocate,"+names)
	if status != 0 || complaint != "" {
		l.t.Fatalf("recorded child: %v: %s", status, complaint)
	}
	events := readTrace(l.t, trace)
	if err := os.Remove(trace); err != nil {
		l.t.Fatal(err)
	}
	at := choose(events)
	for i, e := range events {
		if err := d.happens(e); err != nil {
			l.t.Fatal(err)
		}
		if err := before.hears(e, l.dir); err != nil {
			l.t.Fatal(err)
		}
		for ; len(at) > 0 && at[0] == i; at = at[1:] {
			pending += d.pending()
			state := d.cut()
			dir := l.t.TempDir()
			state.write(l.t, dir)
			examine(l.t, dir, l.key, said{signed: slices.Clone(before.signed), answers: slices.Clone(before.answers)})
			if len(at) == 1 {
				defer l.become(state, said{signed: slices.Clone(before.signed), answers: slices.Clone(before.answers)})
			} else if err := os.RemoveAll(dir); err != nil {
				l.t.Fatal(err)
			}
		}
	}
	if diff := d.now().differsFrom(readDisk(l.t, l.dir).now()); diff != "" {
		l.t.Fatalf("the model of the disk is wrong: %s", diff)
	}
	return pending
}

// TestSyncsOfHeads counts what a child costs the disk: one sync of the write-ahead
// log for each batch, and one of the anchor for each head that is signed.
// Checkpoints are counted apart; they are not on the way of an answer.
func TestSyncsOfHeads(t *testing.T) {
	strace := needStrace(t)
	l := newLane(t)
	if status, complaint := l.run(10); status != 0 || complaint != "" {
		t.Fatalf("child: %v: %s", status, complaint)
	}
	trace, signed, before := filepath.Join(l.dir, "trace"), len(l.said.signed), l.batches()
	if status, complaint := l.run(workOfChild, strace, "-f", "-qq", "-y", "-xx", "-s", "0", "-o", trace, "-e", "signal=none", "-e", "trace="+syncs); status != 0 || complaint != "" {
		t.Fatalf("child: %v: %s", status, complaint)
	}
	commits, anchors, checkpoints := 0, 0, 0
	for _, e := range readTrace(t, trace) {
		switch {
		case e.returned:
		case strings.HasSuffix(e.path, "-wal"):
			commits++
		case strings.HasSuffix(e.path, "anchor"):
			anchors++
		default:
			checkpoints++
		}
	}
	heads, batches := len(l.said.signed)-signed, l.batches()-before
	t.Logf("%d batches: %d signatures, %d syncs of the write-ahead log, %d of the anchor; %d in checkpoints", batches, heads, commits, anchors, checkpoints)
	if anchors != heads {
		t.Errorf("%d syncs of the anchor for %d heads", anchors, heads)
	}
	// A batch may commit while a head is signed.
	if heads < 1 || heads > batches {
		t.Errorf("%d heads for %d batches", heads, batches)
	}
	// A checkpoint syncs the log before it copies from it, and the log is synced
	// when it starts over after one, is begun and is closed.
	if commits < batches || commits > batches+2*checkpoints+4 {
		t.Errorf("%d syncs of the write-ahead log for %d batches", commits, batches)
	}
}

// batches counts the transactions that put the leaves into the log: those of one
// have one time.
func (l *lane) batches() (n int) {
	l.t.Helper()
	files, err := filepath.Glob(filepath.Join(l.dir, "log", "tree-*.db"))
	if err != nil || len(files) != 1 {
		l.t.Fatalf("tree files %v, %v", files, err)
	}
	db, err := sql.Open("sqlite3", files[0])
	if err != nil {
		l.t.Fatal(err)
	}
	defer db.Close()
	if err := db.QueryRow("SELECT count(DISTINCT substr(data, 9, 8)) FROM entries").Scan(&n); err != nil {
		l.t.Fatal(err)
	}
	return n
}

// become puts the lane where a power cut left it.
func (l *lane) become(state files, s said) {
	l.t.Helper()
	l.dir, l.said = l.t.TempDir(), s
	state.write(l.t, l.dir)
	var record bytes.Buffer
	for _, g := range s.signed {
		fmt.Fprintln(&record, g)
	}
	if err := os.WriteFile(filepath.Join(l.dir, "signed"), record.Bytes(), 0o600); err != nil {
		l.t.Fatal(err)
	}
}

// choose picks the events after which the power is cut, in order.
func choose(events []event) []int {
	var spoken []int
	for i, e := range events {
		if !e.returned && e.name == "write" {
			spoken = append(spoken, i)
		}
	}
	at := make([]int, cutsInRound)
	for i := range at {
		if at[i] = rand.IntN(len(events)); i%2 == 0 && len(spoken) > 0 {
			at[i] = spoken[rand.IntN(len(spoken))]
		}
	}
	slices.Sort(at)
	return at
}

// hears adds what a child says in one system call, to its parent or to the
// oracle's record, when it enters the call.
func (s *said) hears(e event, dir string) error {
	if e.returned || e.name != "write" || (e.fd != 1 && e.path != filepath.Join(dir, "signed")) {
		return nil
	}
	return s.readAll(e.data)
}

// event is the entry of a system call or its return.
type event struct {
	name     string
	path     string // of the file or directory
	fd       int
	data     []byte
	number   int64 // offset or length
	creates  bool  // openat with O_CREAT
	returned bool
	failed   bool
	// id is the same for entry and return.
	id int
}

// readTrace reads what strace -f -y -xx wrote.
func readTrace(t testing.TB, path string) (events []event) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	under := map[string]event{} // by thread
	gone := map[string]bool{}   // threads that ended in a call that strace could not read
	lines := bufio.NewReaderSize(f, 1<<20)
	for n := 0; ; n++ {
		line, err := lines.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return events
		}
		if err != nil {
			t.Fatal(err)
		}
		thread, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		rest = strings.TrimLeft(rest, " ")
		if strings.HasPrefix(rest, "+++") || strings.HasPrefix(rest, "---") {
			continue
		}
		if gone[thread] {
			t.Fatalf("line %d of the trace: a thread goes on after a call that was not read", n+1)
		}
		if strings.HasPrefix(rest, "???") { // the process ended before strace could ask which call it was
			gone[thread] = true
			continue
		}
		e, resumed := under[thread]
		if !resumed {
			if e, err = parseCall(rest); err != nil {
				t.Fatalf("line %d of the trace: %v", n+1, err)
			}
			e.id = n
			events = append(events, e)
			if strings.HasSuffix(rest, "<unfinished ...>") {
				under[thread] = e
				continue
			}
		}
		delete(under, thread)
		result := strings.TrimSpace(rest[strings.LastIndex(rest, " = ")+len(" = "):])
		e.returned, e.failed = true, strings.HasPrefix(result, "-") || strings.HasPrefix(result, "?")
		if !e.failed && len(e.data) > 0 && result != strconv.Itoa(len(e.data)) {
			t.Fatalf("line %d of the trace: %d octets, the call returned %s", n+1, len(e.data), result)
		}
		events = append(events, e)
	}
}

// parseCall reads a call and its arguments up to the last one that matters.
func parseCall(s string) (e event, err error) {
	name, args, ok := strings.Cut(s, "(")
	if !ok {
		return e, fmt.Errorf("no call: %.80q", s)
	}
	e.name = name
	var words, paths, strs []string
	for len(args) > 0 && args[0] != ')' {
		switch end := 0; args[0] {
		case ' ', ',':
			args = args[1:]
		case '"', '<':
			if end = strings.IndexByte(args[1:], map[byte]byte{'"': '"', '<': '>'}[args[0]]); end < 0 {
				return e, fmt.Errorf("open string: %.80q", s)
			}
			text, derr := unescape(args[1 : 1+end])
			if derr != nil {
				if args[0] == '<' { // "<unfinished ...>"
					args = ""
					continue
				}
				return e, derr
			}
			if args[0] == '"' {
				strs = append(strs, text)
			} else {
				paths = append(paths, text)
			}
			args = args[end+2:]
		default:
			if end = strings.IndexAny(args, " ,<)"); end < 0 {
				end = len(args)
			}
			words = append(words, args[:end])
			args = args[end:]
		}
	}
	return e, e.fill(words, paths, strs)
}

// fill sorts the arguments into their places.
func (e *event) fill(words, paths, strs []string) (err error) {
	last := ""
	if len(words) > 0 {
		last = words[len(words)-1]
	}
	switch e.name {
	case "write", "pwrite64", "fsync", "fdatasync", "ftruncate":
		if len(paths) != 1 {
			return fmt.Errorf("%s of %d files", e.name, len(paths))
		}
		e.path = paths[0]
		if e.fd, err = strconv.Atoi(words[0]); err != nil {
			return err
		}
		if len(strs) > 0 {
			e.data = []byte(strs[0])
		}
		if e.name == "pwrite64" || e.name == "ftruncate" {
			e.number, err = strconv.ParseInt(last, 10, 64)
		}
		return err
	case "openat":
		e.path, e.creates = strs[0], slices.ContainsFunc(words, func(w string) bool { return strings.Contains(w, "O_CREAT") })
		return nil
	case "unlink", "unlinkat":
		e.path = strs[0]
		return nil
	}
	return fmt.Errorf("%s has no place in the model of the disk", e.name)
}

// unescape decodes a string of \xNN.
func unescape(s string) (string, error) {
	b, err := hex.DecodeString(strings.ReplaceAll(s, `\x`, ""))
	if err != nil || len(b)*4 != len(s) {
		return "", fmt.Errorf("string %.40q: %v", s, err)
	}
	return string(b), nil
}

// disk is what is, and what may be, in the directory of a log.
type disk struct {
	dir    string
	names  map[string]*inode // as processes see it, by path relative to dir
	synced map[string]*inode // as it is after a power cut at least
	moves  []move            // changes of names that are not synced, in order
	syncs  map[int][]*change // what a sync under way will have made durable
}

// move is a name that was made, or removed if file is nil.
type move struct {
	path string
	file *inode
}

// inode is the content of a file.
type inode struct {
	synced  []byte
	changes []*change // not synced, in order
}

// change is a write, or a truncation to length off if data is nil.
type change struct {
	off  int64
	data []byte
	id   int
	done bool
}

// files is what a directory holds, by path relative to it.
type files map[string][]byte

// readDisk reads a directory in which everything has been synced.
func readDisk(t testing.TB, dir string) *disk {
	t.Helper()
	d := &disk{dir: dir, names: map[string]*inode{}, syncs: map[int][]*change{}}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil || !d.holds(name) {
			return err
		}
		b, err := os.ReadFile(path)
		d.names[name] = &inode{synced: b}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	d.synced = maps.Clone(d.names)
	return d
}

// holds reports whether a file belongs to the log.
func (d *disk) holds(name string) bool {
	return name == "anchor" || filepath.Dir(name) == "log" && !passing(filepath.Base(name))
}

// happens takes one event.
func (d *disk) happens(e event) error {
	name, ok := strings.CutPrefix(e.path, d.dir+"/")
	if e.path == d.dir {
		name, ok = ".", true
	}
	switch {
	case !ok || e.name == "write" && !d.holds(name):
		return nil
	case strings.HasSuffix(e.name, "sync"):
		d.sync(name, e)
		return nil
	case !d.holds(name) || e.failed:
		return nil
	}
	f := d.names[name]
	switch {
	case e.name == "openat" && e.returned && e.creates && f == nil:
		f = &inode{}
		d.names[name] = f
		d.moves = append(d.moves, move{name, f})
	case strings.HasPrefix(e.name, "unlink") && e.returned:
		delete(d.names, name)
		d.moves = append(d.moves, move{name, nil})
	case e.name == "write":
		return fmt.Errorf("%s is written without an offset", name)
	case (e.name == "pwrite64" || e.name == "ftruncate") && f == nil:
		return fmt.Errorf("%s is written and was never made", name)
	case (e.name == "pwrite64" || e.name == "ftruncate") && !e.returned:
		f.changes = append(f.changes, &change{off: e.number, data: e.data, id: e.id})
	case e.name == "pwrite64" || e.name == "ftruncate":
		for _, c := range f.changes {
			c.done = c.done || c.id == e.id
		}
	}
	return nil
}

// sync makes durable, when it returns, what was done when it began.
func (d *disk) sync(name string, e event) {
	f := d.names[name]
	switch {
	case f != nil && !e.returned:
		for _, c := range f.changes {
			if c.done {
				d.syncs[e.id] = append(d.syncs[e.id], c)
			}
		}
	case f != nil && !e.failed:
		for _, c := range d.syncs[e.id] {
			f.synced = c.apply(f.synced)
		}
		f.changes = slices.DeleteFunc(f.changes, func(c *change) bool { return slices.Contains(d.syncs[e.id], c) })
	case f == nil && e.returned && !e.failed:
		d.moves = slices.DeleteFunc(d.moves, func(m move) bool {
			if filepath.Dir(m.path) != name {
				return false
			}
			m.apply(d.synced)
			return true
		})
	}
	if e.returned {
		delete(d.syncs, e.id)
	}
}

func (m move) apply(names map[string]*inode) {
	if m.file == nil {
		delete(names, m.path)
		return
	}
	names[m.path] = m.file
}

// apply returns b with the change.
func (c *change) apply(b []byte) []byte {
	end := c.off + int64(len(c.data))
	if n := end - int64(len(b)); n > 0 {
		b = append(b, make([]byte, n)...)
	}
	if c.data == nil {
		return b[:c.off]
	}
	copy(b[c.off:], c.data)
	return b
}

const sector = 512

// tear returns the change cut at sectors, some of which are lost.
func (c *change) tear() (kept []*change) {
	if c.data == nil {
		if rand.IntN(2) == 0 {
			kept = append(kept, c)
		}
		return kept
	}
	for at := int64(0); at < int64(len(c.data)); {
		end := min(int64(len(c.data)), (c.off+at)/sector*sector+sector-c.off)
		if rand.IntN(2) == 0 {
			kept = append(kept, &change{off: c.off + at, data: c.data[at:end]})
		}
		at = end
	}
	return kept
}

// pending counts the changes that a power cut now may undo.
func (d *disk) pending() (n int) {
	for _, f := range d.names {
		n += len(f.changes)
	}
	return n + len(d.moves)
}

// now returns what processes see.
func (d *disk) now() files {
	all := files{}
	for name, f := range d.names {
		b := bytes.Clone(f.synced)
		for _, c := range f.changes {
			b = c.apply(b)
		}
		all[name] = b
	}
	return all
}

// cut returns what a power cut now may leave: of what is not synced nothing,
// or everything, or some, in whole or in part.
func (d *disk) cut() files {
	style := rand.IntN(4)
	names := maps.Clone(d.synced)
	moves := map[int]int{0: 0, 1: len(d.moves)}
	n, ok := moves[style]
	if !ok {
		n = rand.IntN(len(d.moves) + 1)
	}
	for _, m := range d.moves[:n] {
		m.apply(names)
	}
	all := files{}
	for name, f := range names {
		b := bytes.Clone(f.synced)
		for _, c := range f.changes {
			kept := []*change{c}
			switch {
			case style == 0 || style > 1 && rand.IntN(2) == 0:
				kept = nil
			case style == 3:
				kept = c.tear()
			}
			for _, k := range kept {
				b = k.apply(b)
			}
		}
		all[name] = b
	}
	return all
}

// write puts the files into an empty directory.
func (f files) write(t testing.TB, dir string) {
	t.Helper()
	if err := os.Mkdir(filepath.Join(dir, "log"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, b := range f {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// differsFrom names a file that is not the same in both, or returns "".
func (f files) differsFrom(other files) string {
	for _, name := range slices.Sorted(maps.Keys(f)) {
		if b, ok := other[name]; !ok || !bytes.Equal(b, f[name]) {
			return fmt.Sprintf("%s: %d octets, found %d (%v)", name, len(f[name]), len(b), ok)
		}
	}
	if len(f) != len(other) {
		return fmt.Sprintf("%d files, found %d", len(f), len(other))
	}
	return ""
}
