//go:build cgo

package main

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

// openPTY returns both ends of a new pseudo-terminal of 80 columns.
func openPTY(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
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
		_ = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: width})
	}); err != nil || failed != nil {
		t.Fatal(err, failed)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return master, slave
}

// dialogue is a program in a terminal, and a person who waits for text and
// types answers.
type dialogue struct {
	t      *testing.T
	cmd    *exec.Cmd
	master *os.File
	done   chan error    // the program has ended
	gone   chan struct{} // and everything that it printed is on the screen

	mu     sync.Mutex
	screen bytes.Buffer // everything that was printed
	grown  chan struct{}
	read   int // how much of the screen the person has read
}

// inTerminal starts cmd as the foreground of a terminal of its own.
func inTerminal(t *testing.T, cmd *exec.Cmd) *dialogue {
	t.Helper()
	master, slave := openPTY(t)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = slave.Close()
	d := &dialogue{t: t, cmd: cmd, master: master, done: make(chan error, 1), gone: make(chan struct{}), grown: make(chan struct{}, 1)}
	go d.watch()
	go func() { d.done <- cmd.Wait() }()
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	return d
}

// watch reads the screen until the program has left the terminal.
func (d *dialogue) watch() {
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

// text is the whole screen as a person reads it.
func (d *dialogue) text() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return escapes.ReplaceAllString(d.screen.String(), "")
}

// escapes are colours, also one that is not there whole yet, and carriage
// returns.
var escapes = regexp.MustCompile("\x1b\\[[0-9;]*m|\x1b[^m]*$|\r")

// dialogueWait bounds every wait for the program.
const dialogueWait = 60 * time.Second

// wait reads on until re matches what has not been read yet, and returns its
// groups.
func (d *dialogue) wait(re string) []string {
	d.t.Helper()
	pattern := regexp.MustCompile(re)
	ctx, cancel := context.WithTimeout(d.t.Context(), dialogueWait)
	defer cancel()
	for {
		unread := d.text()[d.read:]
		if at := pattern.FindStringSubmatchIndex(unread); at != nil {
			d.read += at[1]
			return pattern.FindStringSubmatch(unread)
		}
		select {
		case <-d.grown:
		case <-ctx.Done():
			d.t.Fatalf("waited for %q; the screen since then:\n%s", re, unread)
		}
	}
}

// say types a line.
func (d *dialogue) say(line string) {
	d.t.Helper()
	if _, err := io.WriteString(d.master, line+"\n"); err != nil {
		d.t.Fatal(err)
	}
}

// interrupt types Ctrl-C.
func (d *dialogue) interrupt() {
	d.t.Helper()
	if _, err := d.master.Write([]byte{3}); err != nil {
		d.t.Fatal(err)
	}
}

// exit waits for the program's end and returns its status.
func (d *dialogue) exit() int {
	d.t.Helper()
	select {
	case err := <-d.done:
		<-d.gone
		var status *exec.ExitError
		if err != nil && !errors.As(err, &status) {
			d.t.Fatal(err)
		}
		return d.cmd.ProcessState.ExitCode()
	case <-time.After(dialogueWait):
		d.t.Fatalf("the program does not end; the screen:\n%s", d.text())
		return -1
	}
}

// columns fails on a line that does not fit the terminal: an error and its hint
// are one line each, for programs, and an answer is as long as it is.
func (d *dialogue) columns() {
	d.t.Helper()
	longer := regexp.MustCompile("^" + program + ": error: |^hint: |: .*/")
	for _, line := range strings.Split(d.text(), "\n") {
		if longer.MatchString(line) {
			continue
		}
		if n := len([]rune(line)); n > width {
			d.t.Errorf("%d columns: %s", n, line)
		}
	}
}
