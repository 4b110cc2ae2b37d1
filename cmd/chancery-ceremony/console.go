package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/chancery-ca/chancery/ceremony"
)

// Rules of the terminal: at most 80 columns, one question at a time, nothing
// that moves or blinks; every line that was printed stays. A question says what
// will happen, why, and what to type. Bold and red are used on a terminal only,
// and not if NO_COLOR is set. Without a terminal the same lines are printed
// plain.

// errNoTerminal: a person has to answer, and there is no terminal.
var errNoTerminal = errors.New("a person must answer at a terminal, and this is none")

// console is the terminal of a ceremony. It implements ceremony.People.
type console struct {
	printer
	in       *os.File
	terminal bool // in is one
	color    bool
	clock    func() (time.Time, error)

	stage   string
	began   time.Time // of the stage
	steps   int       // done in the stage, by this run
	started time.Time // of the step
}

// newConsole talks through in and out.
func newConsole(in *os.File, out io.Writer) *console {
	c := &console{printer: printer{w: out}, in: in, terminal: in != nil && term.IsTerminal(int(in.Fd())), clock: clock}
	if f, ok := out.(*os.File); ok {
		c.color = term.IsTerminal(int(f.Fd())) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
	}
	return c
}

const (
	bold = "\x1b[1m"
	red  = "\x1b[1;31m"
	end  = "\x1b[0m"
)

// styled puts style around text on a terminal with colours.
func (c *console) styled(style, text string) string {
	if !c.color || style == "" {
		return text
	}
	return style + text + end
}

// paragraph prints text broken at spaces; a style is put on every line.
func (c *console) paragraph(style, text string) {
	for _, l := range wrap(text, width) {
		c.line("%s", c.styled(style, l))
	}
}

func (c *console) facts(facts []ceremony.Fact) {
	for _, f := range facts {
		c.field(f.Name, f.Text)
	}
}

// Show prints a notice.
func (c *console) Show(ctx context.Context, n ceremony.Notice) error {
	style := bold
	if n.Warning {
		style = red
	}
	c.line("")
	c.paragraph(style, n.Title)
	c.facts(n.Facts)
	return errors.Join(ctx.Err(), c.err)
}

// Ask prints a question and reads a line.
func (c *console) Ask(ctx context.Context, q ceremony.Question) (string, error) {
	if q.Live && !c.terminal {
		return "", errNoTerminal
	}
	c.line("")
	c.paragraph(bold, q.Title)
	c.paragraph("", q.Why)
	c.facts(q.Facts)
	if q.Practice != "" {
		c.paragraph("", "(Rehearsal: an empty answer stands for the right one.)")
	}
	c.paragraph(bold, q.Prompt+":")
	return c.read(ctx, c.styled(bold, ">")+" ", q.Secret) // the answer has a line of its own
}

// read prints prompt and reads a line, without echo if it is secret: the echo
// is off before the prompt is there, and what was typed ahead is thrown away.
func (c *console) read(ctx context.Context, prompt string, secret bool) (string, error) {
	if c.err != nil {
		return "", c.err
	}
	if c.in == nil {
		return "", errNoTerminal
	}
	quiet := secret && c.terminal
	if quiet {
		restore, err := hush(int(c.in.Fd()))
		if err != nil {
			return "", fmt.Errorf("turn the terminal's echo off: %w", err)
		}
		defer restore()
	}
	if _, err := io.WriteString(c.w, prompt); err != nil {
		return "", err
	}
	type answer struct {
		line []byte
		err  error
	}
	got := make(chan answer, 1)
	go func() { // ends with the line, or with the process
		line, err := c.readLine()
		got <- answer{line, err}
	}()
	select {
	case <-ctx.Done():
		c.line("")
		return "", ctx.Err()
	case a := <-got:
		if quiet || !c.terminal || a.err != nil { // no echo has ended the line
			c.line("")
		}
		if a.err != nil {
			return "", fmt.Errorf("read answer: %w", a.err)
		}
		return string(a.line), nil
	}
}

// hush turns a terminal's echo off and forgets what was typed. restore turns
// it on again.
func hush(fd int) (restore func(), err error) {
	before, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, err
	}
	silent := *before
	silent.Lflag &^= unix.ECHO
	if err := unix.IoctlSetTermios(fd, unix.TCSETSF, &silent); err != nil {
		return nil, err
	}
	return func() { _ = unix.IoctlSetTermios(fd, unix.TCSETS, before) }, nil
}

// maxLine bounds what is read for one answer, in octets.
const maxLine = 8192

// readLine reads octet by octet, because what follows the line may be for
// somebody else, who reads without echo.
func (c *console) readLine() ([]byte, error) {
	var line []byte
	for octet := make([]byte, 1); len(line) <= maxLine; {
		n, err := c.in.Read(octet)
		if n == 1 && octet[0] == '\n' {
			return bytes.TrimSuffix(line, []byte("\r")), nil
		}
		line = append(line, octet[:n]...)
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	return nil, fmt.Errorf("longer than %d octets", maxLine)
}

// secretOf asks for a PIN. It never comes back to the screen.
func (c *console) secretOf(ctx context.Context, what string) ([]byte, error) {
	if !c.terminal {
		return nil, errNoTerminal
	}
	c.line("")
	line, err := c.read(ctx, c.styled(bold, what)+" (nothing is shown): ", true)
	return []byte(line), err
}

// progress prints a line with the time when a step begins and one when it is
// done, and a summary when a stage is over.
func (c *console) progress(e ceremony.Event) {
	switch {
	case e.Skipped && e.Done:
		c.step(e.Index, e.Total, "kept", e.Step.Title)
	case e.Skipped:
	case e.Done:
		c.steps++
		c.line("%*sok, %s", stepIndent, "", seconds(time.Since(c.started)))
		if e.Index == e.Total {
			c.endStage()
		}
	default:
		c.beginStep(e)
	}
}

func (c *console) beginStep(e ceremony.Event) {
	if stage := e.Step.Kind.Stage(); stage != c.stage {
		c.endStage()
		c.stage, c.began, c.steps = stage, time.Now(), 0
		c.line("")
		c.line("%s", c.styled(bold, "== "+stage+" "+strings.Repeat("=", width-4-len(stage))))
	}
	at := "--:--:--"
	if now, err := c.clock(); err == nil {
		at = now.UTC().Format(time.TimeOnly)
	}
	c.started = time.Now()
	c.line("")
	c.step(e.Index, e.Total, at, e.Step.Title)
	c.indented(stepIndent, e.Step.Why)
}

// stepIndent is where what belongs to a step begins.
const stepIndent = 8

// endStage says what the stage was.
func (c *console) endStage() {
	if c.stage == "" || c.steps == 0 {
		return
	}
	c.line("")
	c.line("-- %s: %d done in %s", c.stage, c.steps, seconds(time.Since(c.began)))
	c.stage = ""
}

// brief prints one line for each step that is done.
func (c *console) brief(e ceremony.Event) {
	switch {
	case e.Done && e.Skipped:
		c.step(e.Index, e.Total, "kept", e.Step.Title)
	case e.Done:
		c.step(e.Index, e.Total, "ok", e.Step.Title)
	}
}
