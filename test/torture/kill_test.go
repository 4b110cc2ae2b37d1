package torture

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// lane is one log that is tortured again and again.
type lane struct {
	t    testing.TB
	dir  string
	key  string
	said said
}

func newLane(t testing.TB) *lane {
	t.Helper()
	l := &lane{t: t, dir: t.TempDir(), key: newKey(t)}
	create(t, l.dir)
	return l
}

// run runs a child, by way of another program if one is given, until it ends
// or is killed, and takes down what it said. It returns how it ended and what
// it complained about.
func (l *lane) run(quota int, by ...string) (syscall.WaitStatus, string) {
	l.t.Helper()
	self, err := os.Executable()
	if err != nil {
		l.t.Fatal(err)
	}
	by = append(by, self)
	cmd := exec.CommandContext(l.t.Context(), by[0], by[1:]...)
	cmd.Env = append(os.Environ(), childDir+"="+l.dir, childKey+"="+l.key, childQuota+"="+strconv.Itoa(quota))
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if _, ok := errors.AsType[*exec.ExitError](cmd.Run()); !ok && !cmd.ProcessState.Exited() {
		l.t.Fatalf("run child: %v", cmd.ProcessState)
	}
	if err := l.said.readAll(out.Bytes()); err != nil {
		l.t.Fatal(err)
	}
	l.readSigned()
	return cmd.ProcessState.Sys().(syscall.WaitStatus), complaint.String()
}

// readSigned reads all heads that children signed so far.
func (l *lane) readSigned() {
	l.t.Helper()
	b, err := os.ReadFile(filepath.Join(l.dir, "signed"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		l.t.Fatal(err)
	}
	l.said.signed = nil
	if err := l.said.readAll(b); err != nil {
		l.t.Fatal(err)
	}
}

// examine checks a copy, so that the next child finds what this one left.
func (l *lane) examine() {
	l.t.Helper()
	dir, err := os.MkdirTemp(l.dir, "copy-")
	if err != nil {
		l.t.Fatal(err)
	}
	copyLog(l.t, l.dir, dir)
	examine(l.t, dir, l.key, l.said)
	if err := os.RemoveAll(dir); err != nil {
		l.t.Fatal(err)
	}
}

// needStrace skips where processes cannot be traced.
func needStrace(t testing.TB) string {
	t.Helper()
	strace, err := exec.LookPath("strace")
	if err != nil {
		hsmtest.Missing(t, "strace is not installed")
	}
	if out, err := exec.Command(strace, "-f", "-qq", "-e", "trace=fsync", "-o", os.DevNull, "true").CombinedOutput(); err != nil {
		t.Skipf("strace may not trace here: %v: %s", err, out)
	}
	return strace
}

// The calls by which a log changes its disk.
const (
	writes  = "pwrite64"
	plain   = "write"
	syncs   = "fsync,fdatasync"
	lengths = "ftruncate"
	names   = "?unlink,?unlinkat,?rename,?renameat,?renameat2"
)

// fault is one thing that happens to a child at its n-th call, counted by
// thread as strace does.
type fault struct {
	calls  string
	what   string // strace's injection
	within int    // n is at most this
	share  int    // of the points of a long run, percent
}

// TestFaults kills and fails children that work on one log, each at another
// call, and examines the log after each. A child that the fault did not meet
// does not count.
func TestFaults(t *testing.T) {
	strace := needStrace(t)
	for _, f := range []fault{
		{writes, "signal=KILL:when=%d", 250, 25},
		{syncs, "signal=KILL:when=%d", 60, 25},
		{plain, "signal=KILL:when=%d", 100, 5},
		{lengths, "signal=KILL:when=%d", 3, 3},
		{names, "signal=KILL:when=%d", 3, 2},
		{writes, "error=EIO:when=%d", 150, 5},
		{writes, "error=EIO:when=%d+", 150, 5},
		{writes, "error=ENOSPC:when=%d", 150, 8},
		{writes, "error=ENOSPC:when=%d+", 150, 7},
		{writes, "error=EROFS:when=%d+", 150, 5},
		{syncs, "error=EIO:when=%d", 30, 5},
		{syncs, "error=EIO:when=%d+", 30, 5},
	} {
		t.Run(strings.NewReplacer(",", "+", "?", "", ":when=%d", "").Replace(f.calls+" "+f.what), func(t *testing.T) {
			t.Parallel()
			f.torture(t, strace)
		})
	}
}

const (
	// roundsInLane is how many children work on one log.
	roundsInLane = 20
	// triesForHit bounds the children for each that is met.
	triesForHit = 8
	// workOfChild is how many answers a child gives that nothing stops.
	workOfChild = 300
)

func (f fault) torture(t *testing.T, strace string) {
	var l *lane
	rounds, hits, answers := 0, 0, 0
	for want := long(2, f.share); hits < want && rounds < triesForHit*want; rounds++ {
		if rounds%roundsInLane == 0 {
			if l != nil {
				answers += l.finish()
			}
			l = newLane(t)
		}
		// Small n are as likely as large ones together: start-up is short.
		what := fmt.Sprintf(f.what, int(math.Exp(rand.Float64()*math.Log(float64(f.within+1)))))
		before := l.said.failed
		status, complaint := l.run(workOfChild, strace, "-f", "-qq", "-o", os.DevNull,
			"-e", "signal=none", "-e", "trace="+f.calls, "-e", "inject="+f.calls+":"+what)
		if strings.Contains(complaint, "unclear: ") {
			t.Fatalf("%s: %s", what, complaint)
		}
		if status.Signaled() || complaint != "" || l.said.failed > before {
			hits++
		}
		l.examine()
	}
	answers += l.finish()
	t.Logf("%d children, %d met by it, %d answers hold", rounds, hits, answers)
}

// finish runs a last child, undisturbed, examines the log in place, and returns
// how many answers hold.
func (l *lane) finish() int {
	l.t.Helper()
	if status, complaint := l.run(20); status != 0 || complaint != "" {
		l.t.Fatalf("undisturbed child: %v: %s", status, complaint)
	}
	examine(l.t, l.dir, l.key, l.said)
	return len(l.said.answers)
}
