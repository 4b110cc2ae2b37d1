// Package terminal lets a test be the person at a program's terminal: it starts
// the program in a pseudo-terminal of its own, waits for what it prints and types
// answers, as expect(1) does. Every wait is bounded.
package terminal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Width is how many columns a terminal has.
const Width = 80

// limit bounds every wait for the program, only to end a hang.
const limit = 3 * time.Minute

// Dialogue is a program in a terminal. Its methods fail the test when the program
// does not do what they wait for; one goroutine at a time uses it.
type Dialogue struct {
	t      testing.TB
	cmd    *exec.Cmd
	master *os.File
	done   chan struct{} // closed when the program has ended
	ended  error         // then: how
	gone   chan struct{} // and everything that it printed is on the screen

	mu     sync.Mutex
	screen bytes.Buffer // everything that was printed
	grown  chan struct{}
	read   int // how much of Text the person has read
}

// Start runs cmd as the foreground of a terminal of its own, until the test ends.
// Where there are no pseudo-terminals the test is skipped, or fails if
// CHANCERY_REQUIRE_HSM is 1.
func Start(t testing.TB, cmd *exec.Cmd) *Dialogue {
	t.Helper()
	master, slave := open(t)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = slave.Close()
	d := &Dialogue{t: t, cmd: cmd, master: master, done: make(chan struct{}), gone: make(chan struct{}), grown: make(chan struct{}, 1)}
	go d.watch()
	go func() {
		defer close(d.done)
		d.ended = cmd.Wait()
	}()
	t.Cleanup(func() { // nothing of it is left when the test's folders are removed
		_ = cmd.Process.Kill()
		<-d.done
	})
	return d
}

// open returns both ends of a new pseudo-terminal.
func open(t testing.TB) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		if os.Getenv("CHANCERY_REQUIRE_HSM") == "1" { // as hsmtest.Missing, which needs cgo
			t.Fatalf("open a pseudo-terminal: %v", err)
		}
		t.Skipf("open a pseudo-terminal: %v", err)
	}
	t.Cleanup(func() { _ = master.Close() })
	conn, err := master.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var number int
	var failed error
	if err := conn.Control(func(fd uintptr) {
		if failed = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); failed == nil {
			number, failed = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
		_ = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: Width})
	}); err != nil || failed != nil {
		t.Fatal(err, failed)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return master, slave
}

// watch reads the screen until the program has left the terminal.
func (d *Dialogue) watch() {
	defer close(d.gone)
	buf := make([]byte, 4096)
	for {
		n, err := d.master.Read(buf)
		d.mu.Lock()
		d.screen.Write(buf[:n])
		d.mu.Unlock()
		select {
		case d.grown <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

// escapes are colours, also one that is not there whole yet, and carriage
// returns.
var escapes = regexp.MustCompile("\x1b\\[[0-9;]*m|\x1b[^m]*$|\r")

// Text is everything that was printed, as a person reads it.
func (d *Dialogue) Text() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return escapes.ReplaceAllString(d.screen.String(), "")
}

// Coloured says whether anything that was printed so far is styled.
func (d *Dialogue) Coloured() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return bytes.ContainsRune(d.screen.Bytes(), '\x1b')
}

// Read is the part of Text that the person has waited for.
func (d *Dialogue) Read() string { return d.Text()[:d.read] }

// Unread is the part of Text that nobody has waited for yet.
func (d *Dialogue) Unread() string { return d.Text()[d.read:] }

// Wait reads on until re matches what has not been read yet, and returns its
// groups.
func (d *Dialogue) Wait(re *regexp.Regexp) []string {
	d.t.Helper()
	_, groups, ok := d.Next(re)
	if !ok {
		d.t.Fatalf("the program ended; waited for %q; the screen since then:\n%s", re, d.Unread())
	}
	return groups
}

// Next is Wait for a program that may be done: ok is false when it has ended and
// nothing matches. passed is what was read, up to the end of the match.
func (d *Dialogue) Next(re *regexp.Regexp) (passed string, groups []string, ok bool) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), limit)
	defer cancel()
	for ended := false; ; {
		unread := d.Unread()
		if at := re.FindStringSubmatchIndex(unread); at != nil {
			d.read += at[1]
			return unread[:at[1]], re.FindStringSubmatch(unread), true
		}
		if ended {
			return unread, nil, false
		}
		select {
		case <-d.grown:
		case <-d.gone:
			ended = true
		case <-ctx.Done():
			d.t.Fatalf("waited for %q; the screen since then:\n%s", re, unread)
		}
	}
}

// Say types a line.
func (d *Dialogue) Say(line string) {
	d.t.Helper()
	if _, err := io.WriteString(d.master, line+"\n"); err != nil {
		d.t.Fatal(err)
	}
}

// Interrupt types Ctrl-C.
func (d *Dialogue) Interrupt() {
	d.t.Helper()
	if _, err := d.master.Write([]byte{3}); err != nil {
		d.t.Fatal(err)
	}
}

// Exit waits for the program's end and returns its status.
func (d *Dialogue) Exit() int {
	d.t.Helper()
	late := time.After(limit)
	for _, end := range []<-chan struct{}{d.done, d.gone} {
		select {
		case <-end:
		case <-late:
			d.t.Fatalf("the program, or what it has started, does not end; the screen:\n%s", d.Text())
		}
	}
	var status *exec.ExitError
	if d.ended != nil && !errors.As(d.ended, &status) {
		d.t.Fatal(d.ended)
	}
	return d.cmd.ProcessState.ExitCode()
}

// Columns fails the test on a line that is wider than the terminal, but for
// those that longer matches.
func (d *Dialogue) Columns(longer *regexp.Regexp) {
	d.t.Helper()
	for _, line := range strings.Split(d.Text(), "\n") {
		if n := len([]rune(line)); n > Width && !longer.MatchString(line) {
			d.t.Errorf("%d columns: %s", n, line)
		}
	}
}
