package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/chancery-ca/chancery/cmd/chancery/internal/logtool"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/service"
	"github.com/chancery-ca/chancery/log/head"
)

func newLog() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "log",
		Short: "Look at, verify, copy and restore the logs of a service",
		Long: "Work on the logs' files, without a token and without a PIN but where a hardware\n" +
			"counter is asked for. status, verify,\n" +
			"export and backup work beside the running service; restore and accept-loss\n" +
			"need it stopped. Run them as the service's user.",
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return &usageError{fmt.Errorf("unknown command %q", args[0]), cmd.CommandPath()}
			}
			return cmd.Help()
		},
	}
	cmd.AddCommand(newLogStatus(), newLogVerify(), newLogExport(), newLogBackup(), newLogRestore(), newLogAcceptLoss())
	return cmd
}

// logFlags name the logs that a command works on.
type logFlags struct {
	config, log string
}

func (f *logFlags) add(cmd *cobra.Command) {
	addConfigFlag(cmd, &f.config)
	cmd.Flags().StringVar(&f.log, "log", "", "`name` of one log, as status shows it (default: all)")
}

func (f *logFlags) find() ([]logtool.Log, error) {
	cfg, err := loadConfig(f.config)
	if err != nil {
		return nil, err
	}
	return logtool.Find(cfg, f.log)
}

// openCounters opens the hardware counters of the logs, of which some may have
// none; done logs out of their tokens.
func (f *logFlags) openCounters(cmd *cobra.Command, logs []logtool.Log) (done func() error, err error) {
	cfg, err := loadConfig(f.config)
	if err != nil {
		return nil, err
	}
	counters, done, err := service.Counters(cmd.Context(), cfg, quiet(cmd))
	if err != nil {
		return nil, hsmHint(err)
	}
	for i := range logs {
		logs[i].Hardware = counters[logs[i].Name]
	}
	return done, nil
}

// withCounters runs do with the counters open if want is set.
func (f *logFlags) withCounters(cmd *cobra.Command, logs []logtool.Log, want bool, do func() error) (err error) {
	if want {
		done, err := f.openCounters(cmd, logs)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, done()) }()
	}
	return do()
}

// addCounter adds the flag that lets a command log in to a TPM.
func addCounter(cmd *cobra.Command, counter *bool) {
	cmd.Flags().BoolVar(counter, "counter", false, "read the hardware counters too, for which the TPM's auth value is needed")
}

// logHint says what usually mends a log command that failed.
func logHint(err error) error {
	switch {
	case errors.Is(err, logtool.ErrRunning), errors.Is(err, head.ErrAnchor) && strings.Contains(fmt.Sprint(err), "lock anchor"):
		return hint(err, "stop the service first: systemctl stop chancery")
	case errors.Is(err, logtool.ErrFrozen):
		return hint(err, "a frozen shard is mended by its newest database and anchor alone; see log/README.md, A shard that has a successor")
	case errors.Is(err, logtool.ErrNotProven):
		return hint(err, "the log is read-only until its newest database is back, or: chancery log accept-loss; see log/README.md")
	case errors.Is(err, os.ErrPermission):
		return hint(err, "run it as the service's user")
	case errors.Is(err, os.ErrExist):
		return hint(err, "nothing is overwritten; name a new folder")
	case errors.Is(err, os.ErrNotExist):
		return hint(err, "a new service needs its logs made once: chancery init --config FILE")
	}
	return err
}

func newLogStatus() *cobra.Command {
	var f logFlags
	var output string
	var counter bool
	cmd := &cobra.Command{
		Use:   "status --config FILE",
		Short: "Show the size, the head and the state of each log",
		Long: "Show each log's tree and anchored head, and whether the one continues the\n" +
			"other. The exit status is 1 if a log is read-only or its anchor another's.\n\n" +
			"A shard that has a successor is \"frozen\" when it ends with its last head, by the\n" +
			"key in trusted_root.json, and \"frozen, not proven\", with exit status 1, when not.\n\n" +
			"An anchor that is bound to a hardware counter has an epoch, the counter's value.\n" +
			"--counter reads the counter from the TPM and compares them; without it no token\n" +
			"is touched. After a mismatch put the newest anchor and database back; if there\n" +
			"are none, see chancery log accept-loss.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return &usageError{fmt.Errorf("--output %q: want text or json", output), cmd.CommandPath()}
			}
			logs, err := f.find()
			if err != nil {
				return err
			}
			list := []logtool.Status{}
			err = f.withCounters(cmd, logs, counter, func() error {
				var errs []error
				for _, l := range logs {
					s, err := l.Check(cmd.Context())
					if errs = append(errs, err); err == nil {
						list = append(list, *s)
					}
				}
				return logHint(errors.Join(append(errs, notSound(list))...))
			})
			if len(list) == 0 {
				return err
			}
			sound := err
			if output == "json" {
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				err = enc.Encode(list)
			} else {
				err = printStatus(cmd.OutOrStdout(), list)
			}
			return errors.Join(err, sound)
		},
	}
	f.add(cmd)
	addCounter(cmd, &counter)
	cmd.Flags().StringVar(&output, "output", "text", "`form` of the output: text or json")
	return cmd
}

// notSound is the error of a list with a log that would not sign, or that is
// frozen and does not end with its last head.
func notSound(list []logtool.Status) error {
	var errs []error
	for _, s := range list {
		if err := s.Err(); err != nil {
			errs = append(errs, fmt.Errorf("log %s: %w", s.Name, err))
		}
	}
	return errors.Join(errs...)
}

func printStatus(w io.Writer, list []logtool.Status) error {
	tw := tabwriter.NewWriter(w, 0, 0, 4, ' ', 0)
	row := func(name string, value any) { _, _ = fmt.Fprintf(tw, "%s\t%v\n", name, value) }
	for i, s := range list {
		if i > 0 {
			if err := errors.Join(tw.Flush(), line(w)); err != nil {
				return err
			}
		}
		row("log", s.Name)
		if s.Origin != "" {
			row("origin", s.Origin)
		}
		row("state", s.State)
		if s.Reason != "" {
			row("reason", s.Reason)
		}
		if s.Tree == (logtool.Point{}) {
			continue // a frozen log without a tree here
		}
		row("tree", sizeOf(s.Tree))
		row("", rootOf(s.Tree))
		if s.Head != nil {
			row("head", sizeOf(*s.Head))
			row("", rootOf(*s.Head))
		} else {
			row("head", "none")
		}
		row("pending", fmt.Sprintf("%d leaves without a head", s.Pending))
		row("anchor", fmt.Sprintf("sequence %d", s.AnchorSequence))
		if s.Bound || s.Epoch > 0 {
			row("epoch", epochText(s))
		}
	}
	return tw.Flush()
}

// epochText says to which value of a hardware counter the anchor is bound.
func epochText(s logtool.Status) string {
	text := "the anchor is bound to no hardware counter"
	if s.Epoch > 0 {
		text = fmt.Sprintf("%d by the anchor", s.Epoch)
	}
	if s.Counter != nil {
		return fmt.Sprintf("%s, %d by the hardware counter", text, *s.Counter)
	}
	return text
}

func line(w io.Writer) error {
	_, err := fmt.Fprintln(w)
	return err
}

// sizeOf and rootOf are the two lines about a point: in one they are too long.
func sizeOf(p logtool.Point) string {
	return fmt.Sprintf("%d leaves, %s", p.Size, p.Time.UTC().Format("2006-01-02T15:04:05.000Z"))
}

func rootOf(p logtool.Point) string { return "root " + p.Root.String() }

// indented are further lines below one that begins with ten columns of what was
// done.
func indented(lines ...string) string { return "\n          " + strings.Join(lines, "\n          ") }

func newLogVerify() *cobra.Command {
	var f logFlags
	var from uint64
	var counter bool
	cmd := &cobra.Command{
		Use:   "verify --config FILE",
		Short: "Check every leaf, tile, root, anchor and signature",
		Long: "Compute every leaf hash from the leaf's octets, every tile from the tiles below\n" +
			"it and the root; compare them with what is stored, and the root with the anchored\n" +
			"head, whose key, signature and origin are checked. Every row's sum is checked too.\n\n" +
			"Shards that have a successor are verified too, with the keys in\n" +
			"trusted_root.json; their last head must cover all that is there.\n\n" +
			"--from SIZE goes on where an earlier verify ended: of the leaves before it only\n" +
			"the hashes are used.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logs, err := f.find()
			if err != nil {
				return err
			}
			if from > 0 && len(logs) > 1 {
				return &usageError{errors.New("--from is of one log: name it with --log"), cmd.CommandPath()}
			}
			p := newProgress(cmd.ErrOrStderr())
			defer p.close()
			return f.withCounters(cmd, logs, counter, func() error {
				var errs []error
				for _, l := range logs {
					r, err := l.Verify(cmd.Context(), from, p)
					if err == nil && r.State == logtool.Absent && len(logs) == 1 {
						err = fmt.Errorf("log %s: %s: %w", l.Name, r.Reason, logtool.ErrNoLog)
					}
					if errs = append(errs, err); err != nil {
						continue
					}
					p.printf(cmd.OutOrStdout(), "%s\n", verified(r))
				}
				return logHint(errors.Join(errs...))
			})
		},
	}
	f.add(cmd)
	addCounter(cmd, &counter)
	cmd.Flags().Uint64Var(&from, "from", 0, "`size` that was verified before")
	return cmd
}

// verified says what was proven of a log.
func verified(r *logtool.Result) string {
	if r.State == logtool.Absent {
		return notHere(r.Status)
	}
	kind, lines := "anchored", epochVerified(r.Status)
	if r.State == logtool.Frozen {
		kind, lines = "last", []string{"frozen: it has a successor"}
	}
	proven := fmt.Sprintf("%d leaves from their octets, every tile, the %s head of %d", r.Leaves, kind, headSize(r.Status))
	return fmt.Sprintf("verified  %s: %s%s", r.Name, sizeOf(r.Tree), indented(append([]string{rootOf(r.Tree), proven}, lines...)...))
}

// notHere says that of an old shard nothing was looked at.
func notHere(s *logtool.Status) string {
	return fmt.Sprintf("not here  %s: frozen; %s", s.Name, s.Reason)
}

// epochVerified says that the counter was looked at.
func epochVerified(s *logtool.Status) []string {
	if s.Counter == nil {
		return nil
	}
	return []string{fmt.Sprintf("epoch %d of the hardware counter", s.Epoch)}
}

func headSize(s *logtool.Status) uint64 {
	if s.Head == nil {
		return 0
	}
	return s.Head.Size
}

func newLogExport() *cobra.Command {
	var f logFlags
	cmd := &cobra.Command{
		Use:   "export --config FILE DIR",
		Short: "Write the logs as static files that any web server can serve",
		Long: "Write the tiles, entry bundles and checkpoint of each log, as of its anchored\n" +
			"head, into a new folder, under the very paths of the service's URL (C2SP). All of\n" +
			"it is proven on the way.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			logs, err := f.find()
			if err != nil {
				return err
			}
			p := newProgress(cmd.ErrOrStderr())
			defer p.close()
			list, err := logtool.Export(cmd.Context(), logs, args[0], p)
			if err != nil {
				return logHint(err)
			}
			for i, s := range list {
				if s.State == logtool.Absent {
					p.printf(cmd.OutOrStdout(), "%s\n", notHere(&s))
					continue
				}
				p.printf(cmd.OutOrStdout(), "exported  %s: %s%s\n", s.Name, sizeOf(*s.Head), indented(rootOf(*s.Head), args[0]+"/"+logs[i].Path))
			}
			return nil
		},
	}
	f.add(cmd)
	return cmd
}

func newLogBackup() *cobra.Command {
	var f logFlags
	cmd := &cobra.Command{
		Use:   "backup --config FILE DIR",
		Short: "Copy the logs into a new folder while the service runs",
		Long: "Copy the logs' databases, each as of one root, into a new folder, and prove that\n" +
			"each copy holds the head that was anchored when the command began. The anchors\n" +
			"are not copied: an old one would let a log sign a second history. The audit has a\n" +
			"backup of its own, best made after this one: chancery audit backup.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			logs, err := f.find()
			if err != nil {
				return err
			}
			m, err := logtool.Backup(cmd.Context(), logs, args[0], time.Now())
			if err != nil {
				return logHint(err)
			}
			for _, s := range m.Logs {
				if _, err := fmt.Fprintf(cmd.OutOrStdout(), "backed up %s: %s%s\n", s.Name, sizeOf(s.Tree), indented(rootOf(s.Tree))); err != nil {
					return err
				}
			}
			for _, s := range m.Others {
				proven := "with its last head"
				if s.Head == nil {
					proven = "not proven: see chancery log status"
				}
				if _, err := fmt.Fprintf(cmd.OutOrStdout(), "backed up %s: %s%s\n", s.Name, sizeOf(s.Tree), indented(rootOf(s.Tree), "an old shard, "+proven)); err != nil {
					return err
				}
			}
			return nil
		},
	}
	addConfigFlag(cmd, &f.config) // all logs: they share a data directory
	return cmd
}

func newLogRestore() *cobra.Command {
	var f logFlags
	cmd := &cobra.Command{
		Use:   "restore --config FILE DIR",
		Short: "Put a backup into an empty state folder",
		Long: "Prove a backup whole and put it into the place of the logs' databases, which must\n" +
			"not be there. The anchors stay as they are. A log that is behind its anchor, or\n" +
			"has none, is read-only when the service starts; status says why.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			logs, err := f.find()
			if err != nil {
				return err
			}
			p := newProgress(cmd.ErrOrStderr())
			defer p.close()
			list, err := logtool.Restore(cmd.Context(), logs, args[0], p)
			if err != nil {
				if errors.Is(err, os.ErrExist) {
					return hint(err, "restore only goes where no logs are: move the old folder away, and keep it")
				}
				return logHint(err)
			}
			p.close()
			if err := printStatus(cmd.OutOrStdout(), list); err != nil {
				return err
			}
			if err := notSound(list); err != nil {
				_, err = fmt.Fprintln(cmd.ErrOrStderr(), "restored, but not every log will sign: see log/README.md, After a restore")
				return err
			}
			return nil
		},
	}
	addConfigFlag(cmd, &f.config)
	return cmd
}

func newLogAcceptLoss() *cobra.Command {
	var f logFlags
	var size uint64
	var root string
	cmd := &cobra.Command{
		Use:   "accept-loss --config FILE --log NAME",
		Short: "Let a read-only log go on from the tree that is there",
		Long: "Show what a read-only log has lost and, when the size and the root of the tree\n" +
			"that is there are typed exactly, let the log go on from it: the anchor is replaced\n" +
			"by a record that names the one before it, and an incident file is written beside\n" +
			"it. Everybody who saw a lost head can then prove that the log contradicts itself.\n" +
			"To freeze the log and begin a new shard is the honest way wherever it is possible.\n\n" +
			"A log whose configuration names a hardware counter is bound to the value that the\n" +
			"counter has now; it is read from the TPM. If nothing but the epoch is wrong (a\n" +
			"counter taken into use, replaced or given up), the head stays and no leaf is lost.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.log == "" {
				return &usageError{errors.New("--log is needed"), cmd.CommandPath()}
			}
			logs, err := f.find()
			if err != nil {
				return err
			}
			return f.withCounters(cmd, logs, logs[0].Counter != nil, func() error {
				return acceptLoss(cmd, logs[0], size, root)
			})
		},
	}
	f.add(cmd)
	cmd.Flags().Uint64Var(&size, "size", 0, "`leaves` of the tree that is there, as shown")
	cmd.Flags().StringVar(&root, "root", "", "`root` of that tree in hexadecimal, as shown")
	return cmd
}

func acceptLoss(cmd *cobra.Command, l logtool.Log, size uint64, root string) error {
	p := newProgress(cmd.ErrOrStderr())
	defer p.close()
	s, err := l.Lost(cmd.Context(), p)
	p.close()
	if err != nil {
		if errors.Is(err, logtool.ErrNothingLost) {
			return err
		}
		return logHint(err)
	}
	if err := printStatus(cmd.OutOrStdout(), []logtool.Status{*s}); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(cmd.OutOrStdout(), "\n%s\n", whatIsLost(s)); err != nil {
		return err
	}
	if !cmd.Flags().Changed("size") || !cmd.Flags().Changed("root") {
		return &usageError{fmt.Errorf("to accept this, type --size %d --root %s", s.Tree.Size, s.Tree.Root), cmd.CommandPath()}
	}
	if size != s.Tree.Size || root != s.Tree.Root.String() {
		return fmt.Errorf("--size and --root are not those of the tree that is there: %d, %s; nothing was changed", s.Tree.Size, s.Tree.Root)
	}
	file, err := l.AcceptLoss(cmd.Context(), s, time.Now())
	if err != nil {
		return logHint(err)
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "accepted  log %s goes on from %d leaves at the next start\nincident  %s\n", l.Name, s.Tree.Size, file)
	return err
}

// whatIsLost says in words what an acceptance gives up.
func whatIsLost(s *logtool.Status) string {
	switch {
	case s.EpochOnly():
		return "No leaf that is there is lost. You vouch that this anchor is the newest: heads that\n" +
			"were published after it, if there are any, will contradict what is signed from now on."
	case s.Head == nil:
		return fmt.Sprintf("Which heads were published is not known: the anchor is gone. Whatever was logged\n"+
			"after the %d leaves that are there is lost, and whoever holds a later head, an SCT\n"+
			"or an entry's proof can show that this log contradicts itself.", s.Tree.Size)
	case s.Tree.Size < s.Head.Size:
		return fmt.Sprintf("%d leaves, %d to %d, are lost. The published heads of more than %d leaves, up to\n"+
			"that of %d at %s, will contradict all that this log signs from now on.",
			s.Head.Size-s.Tree.Size, s.Tree.Size, s.Head.Size-1, s.Tree.Size, s.Head.Size, s.Head.Time.Format(time.RFC3339))
	}
	return fmt.Sprintf("The tree that is there is another one: its first %d leaves are not those that were\n"+
		"published at %s. Which leaves are lost is not known. This is not how a disk fails:\n"+
		"find out who put this database here before you go on.", s.Head.Size, s.Head.Time.Format(time.RFC3339))
}
