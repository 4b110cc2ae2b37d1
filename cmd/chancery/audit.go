package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/digitorus/timestamp"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/chancery-ca/chancery/ca/audit"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/audittool"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/hsmtool"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/service"
	"github.com/chancery-ca/chancery/config"
)

func newAudit() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "audit",
		Short: "Verify, read and copy the record of every decision",
		Long: "Work on the audit's files, without a token and without a PIN, also beside the\n" +
			"running service. Run it as the service's user.",
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return &usageError{fmt.Errorf("unknown command %q", args[0]), cmd.CommandPath()}
			}
			return cmd.Help()
		},
	}
	cmd.AddCommand(newAuditVerify(), newAuditTail(), newAuditBackup())
	return cmd
}

// auditHint says what usually mends an audit command that failed.
func auditHint(err error) error {
	switch {
	case errors.Is(err, os.ErrPermission):
		return hint(err, "run it as the service's user")
	case errors.Is(err, os.ErrExist):
		return hint(err, "nothing is overwritten; name a new folder")
	case errors.Is(err, audit.ErrNotFound):
		return hint(err, "a new service begins its audit once: chancery init --config FILE")
	case errors.Is(err, audit.ErrDamaged):
		return hint(err, "keep the files as they are; what to do is in ca/README.md")
	}
	return err
}

func newAuditVerify() *cobra.Command {
	var path, dir string
	var seals []string
	var output outputFlag
	cmd := &cobra.Command{
		Use:   "verify --config FILE",
		Short: "Follow the whole audit and verify every seal",
		Long: "Read every record, follow every link from line to line, and verify each seal with\n" +
			"the timestamp authority's certificates in the trust folder. What a seal covers\n" +
			"cannot have been changed, inserted, reordered or taken away since its time.\n\n" +
			"Who can write to the disk can take away the end of the audit together with its\n" +
			"seals. Keep seals (lines of STATE/audit/seals.jsonl) elsewhere and name them with\n" +
			"--seal: what one of them covers must be there.\n\n" +
			"--dir verifies a copy in place of the service's own audit.\n\n" +
			"Exit status: 0 whole, 1 damaged.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := output.check(cmd); err != nil {
				return err
			}
			cfg, err := loadAuthority(path)
			if err != nil {
				return err
			}
			if dir == "" {
				dir = service.AuditDir(cfg)
			}
			seen, err := verifyAudit(cmd, cfg, dir, seals)
			if err != nil {
				return auditHint(err)
			}
			return output.print(cmd.OutOrStdout(), seen, func(p *printer) { p.auditSummary(seen) })
		},
	}
	addConfigFlag(cmd, &path)
	cmd.Flags().StringArrayVar(&seals, "seal", nil, "`file` of seals that were kept elsewhere; may be given again")
	cmd.Flags().StringVar(&dir, "dir", "", "`folder` of a copy (default: STATE/audit)")
	output.add(cmd)
	return cmd
}

// verifyAudit verifies the audit in dir and says what is in it; on a terminal
// it counts the records meanwhile.
func verifyAudit(cmd *cobra.Command, cfg *config.Config, dir string, seals []string) (auditSummary, error) {
	shown := &recordCount{w: onTerminal(cmd.ErrOrStderr())}
	defer shown.clear()
	seen := auditSummary{Outside: len(seals)}
	report, err := service.VerifyAudit(cfg, dir, seals, func(r audit.Record) error {
		shown.add()
		seen.add(r)
		return cmd.Context().Err()
	})
	if err != nil {
		return seen, err
	}
	return seen, seen.finish(report)
}

func newAuditBackup() *cobra.Command {
	var path string
	var output outputFlag
	cmd := &cobra.Command{
		Use:   "backup --config FILE DIR",
		Short: "Copy the audit into a new folder while the service runs",
		Long: "Copy the audit's files and seals into a new folder, up to a line that was\n" +
			"complete, and verify the copy as chancery audit verify does. To copy the logs\n" +
			"too, run chancery log backup first: the audit then has every certificate that the\n" +
			"copied CT log has.\n\n" +
			"The copy is an audit: with the service stopped and STATE/audit away, put it there\n" +
			"under that name. What came after the copy is then missing, as a seal that is\n" +
			"younger and was kept elsewhere shows.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := output.check(cmd); err != nil {
				return err
			}
			cfg, err := loadAuthority(path)
			if err != nil {
				return err
			}
			var seen auditSummary
			err = audittool.Backup(service.AuditDir(cfg), args[0], func(dir string) (err error) {
				seen, err = verifyAudit(cmd, cfg, dir, nil)
				return err
			})
			if err != nil {
				return auditHint(err)
			}
			return output.print(cmd.OutOrStdout(), seen, func(p *printer) {
				p.row("copy", args[0])
				p.auditSummary(seen)
			})
		},
	}
	addConfigFlag(cmd, &path)
	output.add(cmd)
	return cmd
}

// auditSummary is what `chancery audit verify` found.
type auditSummary struct {
	Records uint64                `json:"records"`
	Files   int                   `json:"files"`
	Types   map[audit.Type]uint64 `json:"types"`
	// Head is the SHA-256 of the last line, Last its time.
	Head string    `json:"head"`
	Last time.Time `json:"last"`
	// Seals is how many seals there are, and Sealed how many records the newest
	// covers; SealTime is its time by the timestamp authority.
	Seals    int        `json:"seals"`
	Sealed   uint64     `json:"sealed"`
	SealTime *time.Time `json:"sealTime,omitempty"`
	// Outside is how many files of seals were given.
	Outside int `json:"sealFiles"`
	// Unfinished are octets behind the last line.
	Unfinished int `json:"unfinishedOctets"`

	seal []byte // the newest
}

func (s *auditSummary) add(r audit.Record) {
	if s.Types == nil {
		s.Types = map[audit.Type]uint64{}
	}
	s.Types[r.Type]++
	if r.Type == audit.TypeSeal {
		s.seal = r.Seal
	}
}

func (s *auditSummary) finish(r audit.Report) error {
	s.Records, s.Files, s.Head, s.Last = r.Records, r.Files, r.Head, r.Last
	s.Seals, s.Sealed, s.Unfinished = r.Seals, r.Sealed, r.Unfinished
	if s.seal == nil {
		return nil
	}
	parsed, err := timestamp.ParseResponse(s.seal)
	if err != nil {
		return fmt.Errorf("read newest seal: %w", err)
	}
	s.SealTime = &parsed.Time
	return nil
}

func (p *printer) auditSummary(s auditSummary) {
	p.row("audit", "whole")
	p.row("records", fmt.Sprintf("%d in %s, the last of %s", s.Records, counted(s.Files, "file"), stamp(s.Last)))
	var types []string
	for _, t := range auditTypes {
		if s.Types[t] > 0 {
			types = append(types, fmt.Sprintf("%d %s", s.Types[t], t))
		}
	}
	p.row("", strings.Join(types, ", "))
	p.row("head", s.Head)
	if s.SealTime == nil {
		p.row("seals", "none yet: one is made every day and when the service stops")
	} else {
		p.row("seals", fmt.Sprintf("%d; the newest of %s covers %d records", s.Seals, stamp(*s.SealTime), s.Sealed))
	}
	if s.Outside > 0 {
		p.row("", fmt.Sprintf("what the seals in %s cover is there", counted(s.Outside, "other file")))
	}
	if s.Unfinished > 0 {
		p.row("unfinished", fmt.Sprintf("%d octets of a record that nobody was told of", s.Unfinished))
	}
}

func counted(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// auditTypes are the types of records, for --type and counts.
var auditTypes = []audit.Type{
	audit.TypeAllowed, audit.TypeIssued, audit.TypeWithdrawn, audit.TypeRefused, audit.TypeOmitted, audit.TypeSeal, audit.TypeBegin,
}

// onTerminal returns w if it is a terminal, else nil.
func onTerminal(w io.Writer) io.Writer {
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return f
	}
	return nil
}

// recordCount shows on a terminal how many records were read.
type recordCount struct {
	w     io.Writer // nil: nothing is shown
	n     int
	shown time.Time
}

func (c *recordCount) add() {
	c.n++
	if c.w == nil || c.n%1024 != 0 || time.Since(c.shown) < 200*time.Millisecond {
		return
	}
	c.shown = time.Now()
	_, _ = fmt.Fprintf(c.w, "\r%12d records", c.n)
}

// clear takes the line off the screen.
func (c *recordCount) clear() {
	if c.w != nil && !c.shown.IsZero() {
		_, _ = fmt.Fprintf(c.w, "\r%s\r", strings.Repeat(" ", 24))
	}
}

// maxTail bounds how many records `chancery audit tail` holds.
const maxTail = 1_000_000

func newAuditTail() *cobra.Command {
	var t auditTail
	cmd := &cobra.Command{
		Use:   "tail --config FILE",
		Short: "Show the newest records, and follow",
		Long: "Show the newest records of the audit, oldest first, and with -f those that come.\n" +
			"The links between them are not followed: chancery audit verify does that.\n\n" +
			"allowed    a certificate will be released; this was on the disk before\n" +
			"issued     it was released; the serial is that of the record before\n" +
			"withdrawn  it was not released, and why\n" +
			"refused    a request got no certificate, and why\n" +
			"omitted    so many refused requests without a valid token have no record\n" +
			"seal       a timestamp over everything before\n" +
			"begin      the first record of a file, or what a crash cut off",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return t.run(cmd) },
	}
	addConfigFlag(cmd, &t.config)
	flags := cmd.Flags()
	flags.IntVarP(&t.n, "lines", "n", 20, "how `many` records, at most 1000000")
	flags.BoolVarP(&t.follow, "follow", "f", false, "go on with those that come")
	flags.StringVar(&t.filter.Identity, "identity", "", "only of this `name` in the certificate")
	flags.StringVar(&t.filter.Issuer, "issuer", "", "only of this identity provider, a `URL`")
	flags.StringVar((*string)(&t.filter.Type), "type", "", "only of this `type`")
	flags.StringVar(&t.filter.Serial, "serial", "", "only of the certificate with this `serial` number, hexadecimal")
	t.output.add(cmd)
	return cmd
}

// auditTail is one reading of the audit's end.
type auditTail struct {
	config string
	n      int
	follow bool
	filter audittool.Filter
	output outputFlag
}

func (t auditTail) run(cmd *cobra.Command) error {
	if err := t.output.check(cmd); err != nil {
		return err
	}
	if t.n < 0 || t.n > maxTail {
		return &usageError{fmt.Errorf("-n %d: want 0 to %d", t.n, maxTail), cmd.CommandPath()}
	}
	if t.filter.Type != "" && !slices.Contains(auditTypes, t.filter.Type) {
		return &usageError{fmt.Errorf("--type %q: want one of %v", string(t.filter.Type), auditTypes), cmd.CommandPath()}
	}
	cfg, err := loadAuthority(t.config)
	if err != nil {
		return err
	}
	records, tail, err := audittool.Last(service.AuditDir(cfg), t.n, t.filter)
	if err != nil {
		return auditHint(err)
	}
	show := t.shower(cmd.OutOrStdout())
	for _, r := range records {
		if err := show(r); err != nil {
			return err
		}
	}
	if !t.follow {
		return nil
	}
	return auditHint(ignoreCancel(tail.Follow(cmd.Context(), show)))
}

// ignoreCancel makes the end of a context no error.
func ignoreCancel(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// shower returns what prints a record: a line of JSON, or text.
func (t auditTail) shower(w io.Writer) func(audit.Record) error {
	if t.output == "json" {
		enc := json.NewEncoder(w)
		return func(r audit.Record) error { return enc.Encode(r) }
	}
	p := &printer{w: w}
	return func(r audit.Record) error {
		p.record(r)
		return p.err
	}
}

// The columns before a record's text: the time, two spaces, the type, two spaces.
const (
	stampWidth = len("2006-01-02T15:04:05Z")
	typeWidth  = len(audit.TypeWithdrawn)
	textIndent = stampWidth + 2 + typeWidth + 2
)

// record prints a record for people: a line, and more below it if one does not
// do.
func (p *printer) record(r audit.Record) {
	head := fmt.Sprintf("%-*s  %-*s  ", stampWidth, stamp(r.Time), typeWidth, r.Type)
	for _, text := range recordText(r) {
		for _, line := range fold(hsmtool.Clean(text), lineWidth-textIndent) {
			p.printf("%s%s\n", head, line)
			head = strings.Repeat(" ", textIndent)
		}
	}
}

// recordText is what a record says, each part on lines of its own.
func recordText(r audit.Record) (parts []string) {
	if r.SAN != "" {
		parts = append(parts, r.SAN+" of "+r.Issuer)
	}
	if r.Serial != "" {
		parts = append(parts, "serial "+r.Serial)
	}
	switch r.Type {
	case audit.TypeAllowed:
		if r.Rule != "" {
			parts = append(parts, "rule "+r.Rule)
		}
		if r.Uses > 1 {
			parts = append(parts, fmt.Sprintf("use %d of token %s", r.Uses, r.Token))
		}
	case audit.TypeIssued:
		if r.LogIndex != nil {
			parts = append(parts, "entry "+strconv.FormatUint(*r.LogIndex, 10)+" of the CT log")
		}
	case audit.TypeOmitted:
		parts = append(parts, counted(int(min(r.Count, 1<<53)), "refused request")+" without a record")
	case audit.TypeSeal:
		parts = append(parts, fmt.Sprintf("over the %d records before", r.Seq))
	case audit.TypeBegin:
		parts = append(parts, "with record "+strconv.FormatUint(r.Seq, 10), r.Reason)
	default:
		parts = append(parts, r.Reason)
	}
	return parts
}
