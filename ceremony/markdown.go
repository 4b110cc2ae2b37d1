package ceremony

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// MarkdownName is the transcript for people.
const MarkdownName = "transcript.md"

// markdown writes the transcript as an auditor reads it. It is a pure function
// of the definition and the records, so verify compares it octet by octet; it
// is no proof of its own.
func (f *facts) markdown(records []Record) File {
	m := &document{}
	f.writeHead(m, records)
	f.writePeople(m)
	f.writeTokens(m)
	f.writeEntropy(m)
	f.writeKeys(m)
	f.writeExchange(m)
	f.writeCertificates(m)
	f.writeFiles(m)
	f.writeWitnesses(m)
	writeRecords(m, records)
	return newFile(MarkdownName, m.Bytes())
}

// document is a Markdown text being written.
type document struct{ bytes.Buffer }

func (m *document) line(format string, args ...any) { fmt.Fprintf(m, format+"\n", args...) }

func (m *document) heading(text string) { m.line("\n## %s\n", text) }

// table begins a table with these columns.
func (m *document) table(columns ...string) {
	m.row(columns...)
	m.line("|%s", strings.Repeat("---|", len(columns)))
}

func (m *document) row(cells ...string) {
	line := "|"
	for _, c := range cells {
		line += " " + plainCell(c) + " |"
	}
	m.line("%s", line)
}

// notMarkup keeps a text from being a cell of its own, HTML or a link.
var notMarkup = strings.NewReplacer(`\`, `\\`, "|", `\|`, "<", `\<`, "[", `\[`)

// plainCell returns text as a reader may see it: a device says of itself what it
// likes, with line ends, escape sequences and marks that turn the direction.
func plainCell(text string) string {
	return notMarkup.Replace(strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, text))
}

func (f *facts) writeHead(m *document, records []Record) {
	m.line("# Transcript of the ceremony %s", f.def.ID)
	if f.def.Environment == Rehearsal {
		m.line("\n**REHEARSAL: practice keys in software tokens. Nothing made here counts.**")
	}
	m.line("\nMade from %s, which is the proof; this file is for reading.\n", TranscriptName)
	m.table("", "")
	m.row("Kind", string(f.def.Kind))
	m.row("Environment", string(f.def.Environment))
	m.row("Began", f.openedAt.Format(time.RFC3339))
	if n := len(records); n > 0 {
		m.row("Ended", records[n-1].Time.Format(time.RFC3339))
	}
	m.row("End", string(f.status))
	if f.aborted() {
		m.row("Aborted", fmt.Sprintf("before the end of step %s, by %s: %s", f.abortedStep, f.abortedBy, f.abortReason))
	}
	if f.quarantined != "" {
		m.row("Quarantine", "key "+f.quarantined+": the token holds something else than what was announced")
	}
	m.hash("Definition", f.def.Hash())
	if f.binary != "" {
		m.row("Program", "SHA-256 `"+f.binary+"`")
	}
	m.hash("Checkpoint", f.root)
	m.hash("Last record", f.head)
}

// hash writes a row with a hash in hexadecimal and one in words.
func (m *document) hash(name string, h [sha256.Size]byte) {
	m.row(name, fmt.Sprintf("`%x`", h))
	m.row("", Words(h))
}

func (f *facts) writePeople(m *document) {
	if len(f.def.People) == 0 {
		return
	}
	m.heading("People")
	m.table("Id", "Name", "Role", "There", "Watch compared", "Key")
	yes := map[bool]string{true: "yes", false: "no"}
	for _, p := range f.def.People {
		m.row(p.ID, p.Name, string(p.Role), yes[f.present[p.ID]], yes[f.watches[p.ID]], "`"+p.Key+"`")
	}
	for _, role := range sorted(f.def.Quorum) {
		m.line("\nNeeded with the role %s: %d.", role, f.def.Quorum[role])
	}
}

func (f *facts) writeTokens(m *document) {
	if len(f.inventory) == 0 {
		return
	}
	m.heading("Tokens")
	m.table("Name", "Device", "Label", "Serial", "Firmware", "Flags", "Keys before", "Module SHA-256", "Took the randomness")
	for _, name := range sorted(f.inventory) {
		d := f.inventory[name]
		taken := "no"
		if f.seeded[name] {
			taken = "yes"
		}
		m.row(name, strings.TrimSpace(d.Token.Manufacturer+" "+d.Token.Model), d.Token.Label, d.Token.Serial,
			d.Token.Firmware, strings.Join(d.Token.Flags, " "), fmt.Sprint(d.Keys), "`"+d.ModuleSHA256+"`", taken)
	}
}

func (f *facts) writeEntropy(m *document) {
	if len(f.commitments) == 0 {
		return
	}
	m.heading("Randomness")
	m.table("Who", "Commitment")
	for _, c := range f.commitments {
		m.row(c.Contributor, "`"+c.Commitment+"`")
	}
	m.line("\nSeed `%x`, seed record `%x`.", f.seed, f.seedRecord)
}

func (f *facts) writeKeys(m *document) {
	if len(f.keyIntents) == 0 {
		return
	}
	m.heading("Keys")
	m.table("Name", "Role", "Token", "Algorithm", "Evidence", "CKA_ID", "SPKI SHA-256")
	for _, name := range sorted(f.keyIntents) {
		in := f.keyIntents[name]
		level, spki := "announced only", ""
		if k, ok := f.keys[name]; ok {
			level, spki = string(k.evidence.Level), fmt.Sprintf("`%x`", k.spki)
		}
		m.row(name, string(in.Role), in.Token, string(in.Algorithm), level, "`"+in.ID+"`", spki)
	}
}

// writeExchange says what came from the other machine, of which its transcript
// is among the files.
func (f *facts) writeExchange(m *document) {
	x := f.exchange
	if x.other == nil {
		return
	}
	m.heading("Exchange")
	m.line("Taken in from the %s machine: ceremony %s, %s, begun %s.\n",
		x.other.def.side(), x.other.def.ID, x.other.def.Kind, x.other.openedAt.Format(time.RFC3339))
	m.table("", "")
	m.hash("Bundle", x.bundle)
	m.hash("Its last record", x.other.head)
	m.hash("Its definition", x.other.def.Hash())
	for _, name := range sorted(x.other.exchange.requests) {
		csr, key := x.other.exchange.requests[name], x.other.keys[x.other.def.Certificates[name].Key]
		m.row("Request "+name, csr.Subject.String())
		m.row("", fmt.Sprintf("SPKI SHA-256 `%x`, %s", sha256.Sum256(csr.RawSubjectPublicKeyInfo), key.origin()))
	}
}

func (f *facts) writeCertificates(m *document) {
	for _, name := range f.def.certificateOrder() {
		c := f.certs[name]
		if c == nil {
			continue
		}
		m.heading("Certificate " + name)
		m.table("", "")
		m.row("Subject", c.Subject.String())
		m.row("Issuer", c.Issuer.String())
		m.row("Serial", fmt.Sprintf("`%x`", c.SerialNumber))
		m.row("Valid", c.NotBefore.Format(time.RFC3339)+" to "+c.NotAfter.Format(time.RFC3339))
		m.hash("SHA-256", sha256.Sum256(c.Raw))
	}
}

func (f *facts) writeFiles(m *document) {
	if !f.announced {
		return
	}
	files, err := f.outputFiles()
	if err != nil { // takeOutputs made them
		return
	}
	m.heading("Files")
	m.table("Name", "Octets", "SHA-256")
	for _, file := range files {
		m.row(file.Name, fmt.Sprint(file.Size), "`"+file.SHA256+"`")
	}
}

func (f *facts) writeWitnesses(m *document) {
	if len(f.answers) == 0 {
		return
	}
	m.heading("Witnesses")
	m.table("Id", "Name", "Answer")
	for _, p := range f.def.witnesses() {
		switch a, ok := f.answers[p.ID]; {
		case !ok:
		case a.Signature != "":
			m.row(p.ID, p.Name, "signed: "+SignatureName(p.ID))
		default:
			m.row(p.ID, p.Name, "declined: "+a.Declined)
		}
	}
	m.line("\nThey signed %d lines, as `%s` says. To check one:\n", f.size, CheckpointName)
	m.line("    ssh-keygen -Y verify -f ALLOWED-SIGNERS -I ID -n %s \\", Namespace)
	m.line("      -s %s < %s", SignatureName("ID"), CheckpointName)
}

func writeRecords(m *document, records []Record) {
	m.heading("Records")
	m.table("Seq", "Time", "Who", "Step", "Type", "Hash")
	for i := range records {
		r := &records[i]
		m.row(fmt.Sprint(r.Seq), r.Time.Format(time.RFC3339), r.Actor, r.Step, string(r.Type), "`"+r.Hash[:16]+"…`")
	}
	m.line("\n`chancery-ceremony verify` checks all of this without a token.")
}
