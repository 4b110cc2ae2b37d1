package main

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/chancery-ca/chancery/ceremony"
)

// Rules of what is printed: at most 80 columns of plain text, one fact a line,
// nothing that moves or blinks, no colour. Hashes are shown whole and as
// words, because people compare them.

const width = 80

// printer writes to the terminal and keeps the first error.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) line(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format+"\n", args...)
	}
}

// field prints "name  text" with the text broken at spaces and indented.
func (p *printer) field(name, text string) {
	const indent = 13
	for i, l := range wrap(text, width-indent) {
		if i > 0 {
			name = ""
		}
		p.line("%-*s%s", indent, name, l)
	}
}

// wrap breaks text at spaces into lines of at most n columns; a longer word
// stays whole. What is not printable (a device says of itself what it likes)
// becomes a question mark.
func wrap(text string, n int) []string {
	text = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) && !unicode.IsSpace(r) {
			return '?'
		}
		return r
	}, text)
	var lines []string
	line := ""
	for _, word := range strings.Fields(text) {
		switch {
		case line == "":
			line = word
		case utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) <= n:
			line += " " + word
		default:
			lines = append(lines, line)
			line = word
		}
	}
	return append(lines, line)
}

// hash prints a SHA-256 in hexadecimal and as words.
func (p *printer) hash(name string, h [32]byte) {
	p.field(name, fmt.Sprintf("%x", h))
	p.field("", ceremony.Words(h))
}

// step prints one step; how is "", "ok", "kept" or a time.
func (p *printer) step(index, total int, how, title string) {
	head := fmt.Sprintf("[%*d/%d] ", len(fmt.Sprint(total)), index, total)
	if how != "" {
		head += fmt.Sprintf("%-4s ", how)
	}
	for i, l := range wrap(title, width-len(head)) {
		if i > 0 {
			head = strings.Repeat(" ", len(head))
		}
		p.line("%s%s", head, l)
	}
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }
