package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/chancery-ca/chancery/ca/audit"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/service"
	"github.com/chancery-ca/chancery/config"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/store"
)

func newServe() *cobra.Command {
	var path, level string
	cmd := &cobra.Command{
		Use:   "serve --config FILE",
		Short: "Run the whole service on one TLS listener",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger, err := newLogger(cmd.ErrOrStderr(), level)
			if err != nil {
				return &usageError{err, cmd.CommandPath()}
			}
			cfg, err := loadConfig(path)
			if err != nil {
				return err
			}
			return serve(cmd.Context(), cfg, logger)
		},
	}
	addConfigFlag(cmd, &path)
	cmd.Flags().StringVar(&level, "log-level", "info", "least `level` to log: debug, info, warn, error")
	return cmd
}

// slotsPerProcessor is how many slots of the scheduler there are for each
// processor.
const slotsPerProcessor = 6

// widen gives the scheduler more slots than there are processors, unless the
// environment says otherwise. A call into a PKCS#11 library holds a slot until
// the runtime notices that it blocks, and what waits for the slot waits, too.
// Measured on two busy processors: with a token that takes 5 ms and 16 calls at
// once, twelve slots issue a quarter more certificates than four, for a quarter
// less processor time each; with a fast token no fewer, and for no more
// (BenchmarkPath in test).
func widen() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(slotsPerProcessor * runtime.GOMAXPROCS(0))
	}
}

// serve runs the service until ctx ends and reports its life to systemd.
func serve(ctx context.Context, cfg *config.Config, logger *slog.Logger) (err error) {
	widen()
	tuneMemory(ctx, logger)
	s, err := service.Open(ctx, cfg, service.Options{Logger: logger})
	if err != nil {
		return startHint(err)
	}
	defer func() { err = errors.Join(err, s.Close(context.WithoutCancel(ctx))) }()
	l, err := s.Listen()
	if err != nil {
		return err
	}
	err = serveWatched(ctx, s, l, logger, func() {
		notify(logger, daemon.SdNotifyReady)
		logger.Info("serving", "url", cfg.URL, "listen", l.Addr().String(), "version", version())
	})
	notify(logger, daemon.SdNotifyStopping)
	logger.Info("stopping", "err", err)
	return err
}

// watchInterval is how often the tokens are looked at without a watchdog.
const watchInterval = 5 * time.Second

// serveWatched serves until ctx ends or a token must not be logged in to again.
// It calls up when the service listens.
func serveWatched(ctx context.Context, s *service.Service, l net.Listener, logger *slog.Logger, up func()) error {
	interval, feed := watchInterval, func() {}
	if limit, err := daemon.SdWatchdogEnabled(false); err == nil && limit > 0 {
		interval, feed = limit/3, func() { notify(logger, daemon.SdNotifyWatchdog) }
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	watched := make(chan error, 1)
	go func() {
		watched <- s.Watch(ctx, interval, feed)
		stop()
	}()
	err := s.Serve(ctx, l, up)
	stop()
	return errors.Join(err, <-watched)
}

func notify(logger *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		logger.Warn("systemd not notified", "err", err)
	}
}

// startHint says what usually mends a start that failed.
func startHint(err error) error {
	switch {
	case errors.Is(err, service.ErrNoLogs):
		return hint(err, "a new service needs its logs made once: chancery init --config FILE; after a rotation the new shard: chancery init --add --config FILE")
	case errors.Is(err, service.ErrRevoked):
		return hint(err, "its successor is in the outputs of the ceremony that revoked it: trust in the configuration names their folder")
	case errors.Is(err, audit.ErrNotFound):
		return hint(err, "the state of a version without an audit gets one by: chancery init --add --config FILE; one that is gone is to be restored")
	case errors.Is(err, hsm.ErrPIN), errors.Is(err, hsm.ErrMismatch):
		return hsmHint(err)
	case errors.Is(err, store.ErrLocked):
		return hint(err, "is the service running already? systemctl status chancery")
	case errors.Is(err, audit.ErrDamaged):
		return hint(err, "chancery audit verify says where; what to do is in ca/README.md")
	}
	return err
}

func newInit() *cobra.Command {
	var path string
	var add bool
	cmd := &cobra.Command{
		Use:   "init --config FILE",
		Short: "Create the empty logs and the audit of a new service, once",
		Long: "Create the empty logs, their anchors and the audit in the state folder, and in a\n" +
			"TPM the counters to which the configuration binds them. A log and the audit begin\n" +
			"only here: serve refuses to run without one, so that a lost disk is noticed. When\n" +
			"one of them exists nothing is made.\n\n" +
			"--add makes what does not exist, a new shard or the audit, and keeps the others\n" +
			"as they are. A log of which the tree or the anchor is missing is never completed.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(path)
			if err != nil {
				return err
			}
			logger, err := newLogger(cmd.ErrOrStderr(), "warn")
			if err != nil {
				return err
			}
			if add {
				return addLogs(cmd, cfg, logger)
			}
			if err := service.Create(cmd.Context(), cfg, service.Options{Logger: logger}); err != nil {
				return initHint(err, cfg)
			}
			p := &printer{w: cmd.OutOrStdout()}
			p.printf("created   logs %s in %s\n", strings.Join(service.Logs(cfg), " and "), cfg.State)
			if service.HasAudit(cfg) {
				p.printf("created   the audit in %s\n", service.AuditDir(cfg))
			}
			return p.err
		},
	}
	addConfigFlag(cmd, &path)
	cmd.Flags().BoolVar(&add, "add", false, "make what is missing, keep what is there")
	return cmd
}

// addLogs is init --add: one line for each log, and for the audit.
func addLogs(cmd *cobra.Command, cfg *config.Config, logger *slog.Logger) error {
	made, kept, err := service.Add(cmd.Context(), cfg, service.Options{Logger: logger})
	p := &printer{w: cmd.OutOrStdout()}
	for _, name := range kept {
		p.printf("kept      %s\n", name)
	}
	for _, name := range made {
		p.printf("created   %s in %s\n", name, cfg.State)
	}
	return errors.Join(initHint(err, cfg), p.err)
}

// initHint says what to do about logs that could not be made.
func initHint(err error, cfg *config.Config) error {
	switch {
	case errors.Is(err, service.ErrHalfLog):
		return hint(err, "restore what is missing (log/README.md); if an init was interrupted and the service never ran, remove %s", cfg.State)
	case errors.Is(err, service.ErrCounterExists):
		return hint(err, "name another index; or if it is no log's, remove it with: tpm2_nvundefine INDEX")
	case errors.Is(err, service.ErrLogExists):
		return hint(err, "logs that exist are kept; for a further shard: chancery init --add")
	case errors.Is(err, audit.ErrExists):
		return hint(err, "is %s the state of another service? to keep its audit and go on: chancery init --add", cfg.State)
	}
	return hint(err, "if the service is running, stop it first")
}

func newConfig() *cobra.Command {
	var path string
	check := &cobra.Command{
		Use:   "check --config FILE",
		Short: "Read the configuration and say whether it is good",
		Long: "Read the configuration as serve will, and hold it against keys.yaml in the trust\n" +
			"folder: every online key is in a token that it can log in to, and the URIs of both,\n" +
			"PKCS#11 or TPM, can be understood. No token is touched and no PIN is read.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(path)
			if err != nil {
				return err
			}
			p := &printer{w: cmd.OutOrStdout()}
			err = service.Check(cfg)
			if errors.Is(err, service.ErrNoKeys) {
				p.printf("note      %s has no keys.yaml yet: tokens and keys are not checked\n", cfg.Trust)
				err = nil
			}
			if err != nil {
				return err
			}
			for _, issuer := range service.ForEverybody(cfg) {
				p.printf("note      anybody can get a token of %s,\n          and without ca.policy a certificate\n", issuer)
			}
			p.printf("good      %s\n", path)
			return p.err
		},
	}
	addConfigFlag(check, &path)
	cmd := &cobra.Command{Use: "config", Short: "Work with the configuration file", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(check)
	return cmd
}

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "chancery %s\n", version())
			return err
		},
	}
}

// version is the module's version, or the commit it was built from.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := strings.Trim(info.Main.Version, "()")
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && (v == "" || v == "devel") {
			v = s.Value
		}
	}
	if v == "" {
		return "unknown"
	}
	return v
}

// defaultConfig is where the package and the systemd unit put the file.
const defaultConfig = "/etc/chancery/chancery.yaml"

func addConfigFlag(cmd *cobra.Command, path *string) {
	cmd.Flags().StringVar(path, "config", defaultConfig, "configuration `file`")
}

func loadConfig(path string) (*config.Config, error) {
	cfg, err := config.Load(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, hint(err, "start from the commented example, config/example/chancery.yaml")
	}
	return cfg, err
}

func newLogger(w io.Writer, level string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("log level %q: want debug, info, warn or error", level)
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: l, ReplaceAttr: trimTime})), nil
}

// trimTime writes times with milliseconds; the journal has its own.
func trimTime(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && a.Key == slog.TimeKey {
		a.Value = slog.StringValue(a.Value.Time().UTC().Format("2006-01-02T15:04:05.000Z"))
	}
	return a
}
