package main

import (
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/chancery-ca/chancery/cmd/chancery/internal/hsmtool"
	"github.com/chancery-ca/chancery/hsm"
)

// The form of the texts for people: a name, two spaces, the rest of a line of
// lineWidth columns. Only a URI, a hash and a path may be longer, because they
// are copied.
const (
	nameWidth = 10
	lineWidth = 80
)

// row prints a value under its name, if there is one, on as many lines as it
// takes.
func (p *printer) row(name, value string) {
	for _, text := range fold(hsmtool.Clean(value), lineWidth-nameWidth-2) {
		p.printf("%-*s  %s\n", nameWidth, name, text)
		name = ""
	}
}

// fold breaks text at spaces into lines of at most width runes; longer words
// stay whole.
func fold(text string, width int) []string {
	var lines []string
	for _, word := range strings.Fields(text) {
		if n := len(lines) - 1; n >= 0 && utf8.RuneCountInString(lines[n])+1+utf8.RuneCountInString(word) <= width {
			lines[n] += " " + word
			continue
		}
		lines = append(lines, word)
	}
	return lines
}

func (p *printer) infos(list []hsmtool.Info) {
	for i, t := range list {
		if i > 0 {
			p.printf("\n")
		}
		p.info(t)
	}
}

func (p *printer) info(i hsmtool.Info) {
	t, l, s := i.Token, i.Library, i.Slot
	p.row("token", i.Name)
	if i.Name != i.URI {
		p.row("uri", i.URI)
	}
	p.row("label", t.Label)
	p.row("made by", join(", ", t.Manufacturer, t.Model))
	p.row("serial", t.Serial)
	p.row("firmware", join(", ", t.Firmware, prefix("hardware ", t.Hardware)))
	p.row("library", join(", ", l.Manufacturer, l.Description, prefix("version ", l.Version), prefix("interface ", l.Interface)))
	p.row("module", l.Path)
	if s.Description != "" || s.Manufacturer != "" {
		p.row("slot", fmt.Sprintf("%d: %s", t.Slot, join(", ", s.Description, s.Manufacturer, strings.Join(s.Flags, " "))))
	}
	p.row("flags", strings.Join(t.Flags, " "))
	p.row("PIN", pinState(t.Flags))
	p.row("level", levelText(i.Level))
	p.mechanisms(i.Mechanisms)
}

// mechanisms prints name, sizes and flags in columns, and counts those that we
// have no name for.
func (p *printer) mechanisms(all []hsm.Mechanism) {
	name, others := "can", 0
	for _, m := range all {
		if strings.HasPrefix(m.Name, "CKM_0x") {
			others++
			continue
		}
		sizes := ""
		if m.MaxKeySize != 0 {
			sizes = fmt.Sprintf("%d-%d", m.MinKeySize, m.MaxKeySize)
		}
		// The name, the sizes, and what is left of the line for the flags.
		flags := fold(strings.Join(m.Flags, " "), lineWidth-nameWidth-2-28-14)
		if len(flags) == 0 {
			flags = []string{""}
		}
		for _, f := range flags {
			p.printf("%s\n", strings.TrimRight(fmt.Sprintf("%-*s  %-27s %-13s %s", nameWidth, name, hsmtool.Clean(m.Name), sizes, f), " "))
			name, sizes, m.Name = "", "", ""
		}
	}
	if others > 0 {
		p.row(name, fmt.Sprintf("and %d others: --output json has them", others))
	}
}

// join joins what is not empty.
func join(separator string, parts ...string) string {
	var some []string
	for _, part := range parts {
		if part != "" {
			some = append(some, part)
		}
	}
	return strings.Join(some, separator)
}

// prefix puts p before s, unless s is empty.
func prefix(p, s string) string {
	if s == "" {
		return ""
	}
	return p + s
}

// pinState says in words what the flags mean for a login.
func pinState(flags []string) string {
	has := map[string]bool{}
	for _, f := range flags {
		has[f] = true
	}
	switch {
	case has["USER_PIN_LOCKED"]:
		return "locked: only the security officer can set a new one"
	case has["USER_PIN_FINAL_TRY"]:
		return "one try is left; chancery does not log in until the right PIN was entered elsewhere"
	case has["USER_PIN_COUNT_LOW"]:
		return "a wrong one was entered; chancery does not log in until the right PIN was entered elsewhere"
	case has["USER_PIN_TO_BE_CHANGED"]:
		return "must be changed before it can be used"
	case has["USER_PIN_INITIALIZED"]:
		return "set, and no wrong one was entered since the last login"
	case has["LOGIN_REQUIRED"]:
		return "not set: the security officer has to"
	}
	return ""
}

func levelText(level hsm.Level) string {
	switch level {
	case hsm.LevelSoftware:
		return "software: its keys are in files"
	case hsm.LevelModule:
		return "module-claimed: hardware by its own word"
	}
	return string(level)
}

func (p *printer) contents(list []hsmtool.Contents) {
	for i, c := range list {
		if i > 0 {
			p.printf("\n")
		}
		p.row("token", c.Token)
		if c.Token != c.URI {
			p.row("uri", c.URI)
		}
		p.row("keys", fmt.Sprint(len(c.Keys)))
		for _, k := range c.Keys {
			p.listed(k)
		}
		for _, role := range c.Missing {
			p.printf("\n")
			p.row("missing", fmt.Sprintf("the %s key: keys.yaml says that it is in this token", role))
		}
	}
}

func (p *printer) listed(k hsmtool.Listed) {
	p.printf("\n")
	p.row("key", orNone(k.Label))
	p.row("id", orNone(k.ID))
	p.row("uri", k.URI)
	p.row("algorithm", string(k.Algorithm))
	p.row("spki", k.SPKI)
	p.row("role", orNone(string(k.Role)))
	p.row("policy", k.Policy)
	p.row("level", string(k.Level))
	p.row("problem", k.Problem)
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

func (p *printer) tested(r hsmtool.Tested) {
	p.row("key", join(", ", string(r.Role), string(r.Algorithm), "token "+r.Token))
	p.row("uri", r.URI)
	p.row("spki", r.SPKI)
	p.row("self-test", fmt.Sprintf("good: %d signatures of one digest have %d different r", r.Signatures, r.Signatures))
	p.row("rate", fmt.Sprintf("%.0f/s, one after the other: %d in %s, each verified", r.Run.Rate, r.Run.Signatures, short(r.Run.Took)))
	p.row("latency", fmt.Sprintf("p50 %s, p99 %s", short(r.Run.P50), short(r.Run.P99)))
}

// short writes a duration with three digits.
func short(d time.Duration) string {
	switch {
	case d >= 10*time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d >= time.Second:
		return d.Round(10 * time.Millisecond).String()
	case d >= 10*time.Millisecond:
		return d.Round(100 * time.Microsecond).String()
	}
	return d.Round(10 * time.Microsecond).String()
}

func (p *printer) attested(a hsmtool.Attested, dir string) {
	e := a.Evidence
	p.row("key", e.URI)
	p.row("spki", e.SPKI)
	p.row("level", string(e.Level))
	if a.Attestation == nil {
		p.row("statement", "none: the token signs none about its keys")
	} else {
		p.row("statement", fmt.Sprintf("signed by the device, nonce %x", a.Attestation.Nonce))
	}
	p.row("written", dir)
}

func (p *printer) findings(all []hsmtool.Finding) {
	for _, f := range all {
		verdict := "good"
		if f.Err != nil {
			verdict = "BAD"
		}
		p.row(verdict, join(": ", f.What, join("; ", f.Text, f.Error)))
	}
}

func (p *printer) benched(b hsmtool.Benched) {
	p.row("key", join(", ", string(b.Role), "token "+b.Token))
	p.row("uri", b.URI)
	p.printf("\n%8s  %12s  %10s  %10s  %10s\n", "at once", "signatures/s", "p50", "p99", "against 1")
	for _, r := range b.Runs {
		p.printf("%8d  %12.0f  %10s  %10s  %10.2f\n", r.Parallel, r.Rate, short(r.P50), short(r.P99), r.Rate/b.Runs[0].Rate)
	}
}
