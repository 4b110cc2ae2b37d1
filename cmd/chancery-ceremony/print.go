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

// clean returns text with a question mark for what is not printable: escape
// sequences, marks that turn the direction of writing. A device says of itself
// what it likes, and so does a file that somebody brings.
func clean(text string) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) && r != '\n' {
			return '?'
		}
		return r
	}, text)
}

// wrap breaks text at spaces into lines of at most n columns, clean; a longer
// word stays whole.
func wrap(text string, n int) []string {
	var lines []string
	line := ""
	for _, word := range strings.Fields(text) {
		word = clean(word)
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
