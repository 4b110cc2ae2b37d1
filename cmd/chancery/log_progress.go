package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"github.com/chancery-ca/chancery/cmd/chancery/internal/logtool"
)

// reportEvery is how often a task that is not on a terminal says how far it
// is: anything shorter says nothing. The tests, in which everything is short, set
// it so that a machine that stands still does not make them long.
var reportEvery = 5 * time.Second

// progress shows tasks of leaves with their rate: bars on a terminal, else a
// line now and then.
type progress struct {
	w    io.Writer
	bars *mpb.Progress // nil: not a terminal
	once sync.Once
}

var _ logtool.Progress = (*progress)(nil)

func newProgress(w io.Writer) *progress {
	p := &progress{w: w}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		p.bars = mpb.New(mpb.WithOutput(w), mpb.WithWidth(40))
	}
	return p
}

// Begin implements logtool.Progress.
func (p *progress) Begin(task string, total uint64) (add func(int), done func()) {
	if p.bars == nil {
		l := &lineReport{w: p.w, task: task, total: total, began: time.Now(), every: reportEvery}
		l.last = l.began
		return func(n int) { l.add(n, time.Now()) }, func() {}
	}
	if total == 0 {
		return func(int) {}, func() {}
	}
	bar := p.bars.AddBar(int64(total),
		mpb.PrependDecorators(decor.Name(task, decor.WCSyncSpaceR), decor.CountersNoUnit("%d / %d", decor.WCSyncSpace)),
		mpb.AppendDecorators(decor.Percentage(decor.WC{W: 5}), decor.AverageSpeed(0, "  %.0f leaves/s"), decor.AverageETA(decor.ET_STYLE_GO, decor.WC{W: 8})),
	)
	return bar.IncrBy, func() {
		bar.Abort(false) // if it is not complete
		bar.Wait()
	}
}

// close ends the bars, so that what is printed next comes below them.
func (p *progress) close() {
	p.once.Do(func() {
		if p.bars != nil {
			p.bars.Wait()
		}
	})
}

// printf prints a result; while bars are shown, above them.
func (p *progress) printf(w io.Writer, format string, args ...any) {
	if p.bars != nil && w == io.Writer(os.Stdout) && term.IsTerminal(int(os.Stdout.Fd())) {
		_, _ = fmt.Fprintf(p.bars, format, args...)
		return
	}
	_, _ = fmt.Fprintf(w, format, args...)
}

// lineReport is a task on something that is not a terminal.
type lineReport struct {
	w           io.Writer
	task        string
	total, n    uint64
	began, last time.Time
	every       time.Duration
}

func (l *lineReport) add(leaves int, now time.Time) {
	l.n += uint64(leaves)
	if now.Sub(l.last) < l.every {
		return
	}
	l.last = now
	rate := float64(l.n) / now.Sub(l.began).Seconds()
	_, _ = fmt.Fprintf(l.w, "%s: %d of %d leaves, %.0f/s\n", l.task, l.n, l.total, rate)
}
