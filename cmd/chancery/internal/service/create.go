package service

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/chancery-ca/chancery/ca/audit"
	"github.com/chancery-ca/chancery/config"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/tpm"
	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/tree"
)

// ErrLogExists: a log that was to be made is there already, whole or in part.
var ErrLogExists = errors.New("log exists already")

// ErrHalfLog: of a log the tree or the anchor is there and the other is not. It
// is never completed: what is missing may have been lost.
var ErrHalfLog = errors.New("half of the log is missing")

// ErrCounterExists: the counter of a new log is there already. It may be another
// log's, or one that an interrupted init left.
var ErrCounterExists = errors.New("counter exists already")

// Create makes the logs and their anchors that the configuration names, the
// counters that the anchors are bound to, and the audit. It and Add are the only
// ways in which a log or the audit begins. When any of them exists nothing is
// made: ErrLogExists, ErrHalfLog, audit.ErrExists.
func Create(ctx context.Context, cfg *config.Config, opts Options) error {
	_, _, err := create(ctx, cfg, opts, false)
	return err
}

// Add makes those logs of the configuration that do not exist, and the audit if
// it does not, and leaves the others as they are, but for a configured counter
// that does not exist. It returns the names of both, as LogPlaces has them, and
// "the audit". When a log exists in part none is made: ErrHalfLog.
func Add(ctx context.Context, cfg *config.Config, opts Options) (made, kept []string, err error) {
	return create(ctx, cfg, opts, true)
}

func create(ctx context.Context, cfg *config.Config, opts Options, add bool) (made, kept []string, err error) {
	if begun, err := audit.Files(AuditDir(cfg)); err != nil || len(begun) > 0 && !add {
		return nil, nil, fmt.Errorf("create audit: %w", errors.Join(err, audit.ErrExists))
	}
	for _, dir := range []string{logDir(cfg), filepath.Join(cfg.State, "anchor")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, nil, fmt.Errorf("create state folder: %w", err)
		}
	}
	engine, err := tree.Open(ctx, tree.Config{Dir: logDir(cfg), Now: newClock(opts.Logger).Now, Logger: opts.Logger})
	if err != nil {
		return nil, nil, fmt.Errorf("open logs: %w", err)
	}
	defer func() { err = errors.Join(err, engine.Close(ctx)) }()
	tokens, err := counterTokens(ctx, cfg, opts.Logger)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, tokens.Close()) }()
	var missing []LogPlace
	for _, place := range LogPlaces(cfg) {
		there, err := exists(ctx, engine, place)
		switch {
		case err != nil:
			return nil, nil, fmt.Errorf("create log %s: %w", place.Name, err)
		case there && !add:
			return nil, nil, fmt.Errorf("create log %s: %w", place.Name, ErrLogExists)
		case there:
			kept = append(kept, place.Name)
			added, err := addCounter(ctx, tokens, place)
			if err != nil {
				return made, kept, fmt.Errorf("create counter of log %s: %w", place.Name, err)
			}
			if added {
				made = append(made, "the counter of "+place.Name)
			}
		default:
			missing = append(missing, place)
		}
	}
	for _, place := range missing {
		if err := begin(ctx, engine, tokens, place); err != nil {
			return made, kept, err
		}
		made = append(made, place.Name)
	}
	if !HasAudit(cfg) {
		return made, kept, nil
	}
	switch err := audit.Create(AuditDir(cfg), newClock(opts.Logger).Now); {
	case errors.Is(err, audit.ErrExists) && add:
		kept = append(kept, auditName)
	case err != nil:
		return made, kept, err
	default:
		made = append(made, auditName)
	}
	return made, kept, nil
}

// auditName is how Add calls the audit.
const auditName = "the audit"

// exists says whether the log is there, whole.
func exists(ctx context.Context, engine *tree.Engine, place LogPlace) (bool, error) {
	_, err := os.Lstat(place.Anchor)
	anchored := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("look for its anchor: %w", err)
	}
	_, err = engine.Tree(ctx, place.Name)
	if err != nil && !errors.Is(err, tree.ErrNotFound) {
		return false, err
	}
	switch grown := err == nil; {
	case anchored && !grown:
		return false, fmt.Errorf("%w: the anchor %s is there, the tree is not", ErrHalfLog, place.Anchor)
	case grown && !anchored:
		return false, fmt.Errorf("%w: the tree is there, the anchor %s is not", ErrHalfLog, place.Anchor)
	}
	return anchored, nil
}

// begin makes a log of which nothing is there, and first its counter.
func begin(ctx context.Context, engine *tree.Engine, tokens *openTokens, place LogPlace) error {
	epoch, err := newCounter(ctx, tokens, place.Counter)
	if err != nil {
		return fmt.Errorf("create counter of log %s: %w", place.Name, err)
	}
	if err := head.CreateAnchorAt(place.Anchor, epoch); err != nil {
		return fmt.Errorf("create anchor of log %s: %w", place.Name, err)
	}
	if err := engine.Create(ctx, place.Name); err != nil {
		return fmt.Errorf("create log %s: %w", place.Name, err)
	}
	return nil
}

// addCounter makes the configured counter of a log that exists if nothing is at
// its index. The anchor is not bound to it by that: an operator does so.
func addCounter(ctx context.Context, tokens *openTokens, place LogPlace) (bool, error) {
	if place.Counter == nil {
		return false, nil
	}
	_, err := OpenCounter(ctx, tokens.open[place.Counter.Token], place.Counter)
	if !errors.Is(err, hsm.ErrNotFound) {
		return false, err
	}
	_, err = newCounter(ctx, tokens, place.Counter)
	return err == nil, err
}

// newCounter makes the counter and returns its value, 0 where there is to be
// none. One that exists is an error: it may be another log's.
func newCounter(ctx context.Context, tokens *openTokens, c *config.Counter) (uint64, error) {
	if c == nil {
		return 0, nil
	}
	t, err := asTPM(tokens.open[c.Token], c)
	if err != nil {
		return 0, err
	}
	counter, err := tpm.CreateCounter(ctx, t, c.Index)
	if errors.Is(err, hsm.ErrExists) {
		return 0, fmt.Errorf("%w: %w", ErrCounterExists, err)
	}
	if err != nil {
		return 0, err
	}
	return counter.Value(ctx)
}
