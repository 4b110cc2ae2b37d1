//go:build cgo

package main

import (
	"os/exec"
	"regexp"
	"testing"

	"github.com/chancery-ca/chancery/test/terminal"
)

// dialogue is a person at the program's terminal.
type dialogue struct {
	*terminal.Dialogue
	t *testing.T
}

func inTerminal(t *testing.T, cmd *exec.Cmd) *dialogue {
	t.Helper()
	return &dialogue{terminal.Start(t, cmd), t}
}

func (d *dialogue) wait(re string) []string {
	d.t.Helper()
	return d.Wait(regexp.MustCompile(re))
}

func (d *dialogue) say(line string) { d.t.Helper(); d.Say(line) }
func (d *dialogue) interrupt()      { d.t.Helper(); d.Interrupt() }
func (d *dialogue) exit() int       { d.t.Helper(); return d.Exit() }
func (d *dialogue) text() string    { return d.Text() }

// longer are lines that need not fit the terminal: an error and its hint are one
// line each, for programs, an answer is as long as it is, and a path is not
// broken.
var longer = regexp.MustCompile("^" + program + ": error: |^hint: |: .*/|^[a-z]* +/[^ ]*$")

func (d *dialogue) columns() { d.t.Helper(); d.Columns(longer) }
