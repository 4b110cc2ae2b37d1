package store

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"google.golang.org/protobuf/proto"
)

// Bounds of one step of a backup: one short snapshot, one transaction.
const (
	backupRows  = 4096
	backupBytes = 8 << 20
)

// Backup copies the store into dir, an existing empty directory, while it is
// in use. Each tree is copied as of one root, the newest when its turn comes:
// what is stored never changes, so many short snapshots make one whole copy
// and nobody is held back. Every row's sum is checked on the way. Leaves of a
// PREORDERED_LOG beyond that root are not copied, queued leaves neither.
//
// The copy is opened with Open. It is older than the log from the next batch
// on: log/head refuses to sign for it until that is resolved.
func (s *Store) Backup(ctx context.Context, dir string) error {
	names, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("read backup directory: %w", err)
	}
	if len(names) > 0 {
		return fmt.Errorf("back up to %s: %w", dir, os.ErrExist)
	}
	trees := s.admin.current()
	for id := range trees {
		t, err := s.tree(id)
		if err == nil {
			err = t.backup(ctx, filepath.Join(dir, filepath.Base(t.path)))
		}
		if err != nil {
			return fmt.Errorf("back up tree %d: %w", id, err)
		}
	}
	// The list is last: without it the copy is an empty store.
	if err := backupAdmin(filepath.Join(dir, "admin.db"), trees); err != nil {
		return fmt.Errorf("back up list of trees: %w", err)
	}
	return syncDir(dir)
}

func backupAdmin(path string, trees treeMap) (err error) {
	c, err := openConn(path, modeCreate, writerPragmas...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	if err := adminSchema.migrate(c, true); err != nil {
		return err
	}
	return c.transaction(func() error {
		for id, t := range trees {
			data, err := proto.Marshal(t)
			if err != nil {
				return fmt.Errorf("serialise tree: %w", err)
			}
			if err := c.exec("INSERT INTO trees (id, data, sum) VALUES (?,?,?)", id, data, checksum(inTrees, id, data)); err != nil {
				return err
			}
		}
		return nil
	})
}

// backup copies one tree into a new file.
func (t *logTree) backup(ctx context.Context, path string) (err error) {
	s, err := t.snapshot(ctx)
	if err != nil {
		return err
	}
	tp, v := s.tip, s.view
	if err := s.Close(); err != nil {
		return err
	}
	c, err := openConn(path, modeCreate, writerPragmas...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	if err := treeSchema.migrate(c, true); err != nil {
		return err
	}
	if err := t.copyRows(ctx, c, "entries", "idx", inEntries, 0, int64(tp.entries)); err != nil {
		return err
	}
	for i, e := range tp.edges {
		first := uint64(0)
		if i-1 == identities {
			first = min(tp.distinct, e.count/runHashes)
		}
		if err := t.copyRows(ctx, c, "runs", "id", inRuns, runID(i-1, first), runID(i-1, e.count/runHashes)); err != nil {
			return err
		}
	}
	for k := range kinds {
		for _, g := range v.sealed[k] {
			if err := t.copyRows(ctx, c, "buckets", "id", inBuckets, bucketID(g.id, 0), bucketID(g.id, buckets)); err != nil {
				return err
			}
		}
	}
	return t.finishBackup(ctx, c, tp, v)
}

// finishBackup stores what makes the copied rows a tree.
func (t *logTree) finishBackup(ctx context.Context, c *conn, tp *tip, v *view) error {
	var secret []byte
	err := t.rows(ctx, "SELECT secret FROM facts", func(cols []driver.Value) error {
		secret, _ = cols[0].([]byte)
		return nil
	})
	if err != nil {
		return err
	}
	return c.transaction(func() error {
		for k := range kinds {
			for _, g := range v.sealed[k] {
				if err := g.storeFilter(c, g.filter()); err != nil {
					return err
				}
			}
		}
		if err := storeFacts(c, t.id, secret); err != nil {
			return err
		}
		return writeTip(c, nil, tp)
	})
}

// copyRows copies the rows of a table with keys in [from, to) in steps.
func (t *logTree) copyRows(ctx context.Context, dst *conn, table, key string, tag byte, from, to int64) error {
	type row struct {
		key  int64
		data []byte
		sum  int64
	}
	selectRows := fmt.Sprintf("SELECT %[2]s, data, sum FROM %[1]s WHERE %[2]s>=? AND %[2]s<? ORDER BY %[2]s LIMIT %[3]d", table, key, backupRows)
	insertRow := fmt.Sprintf("INSERT INTO %s (%s, data, sum) VALUES (?,?,?)", table, key)
	for from < to {
		var rows []row
		size := 0
		err := t.rows(ctx, selectRows, func(cols []driver.Value) error {
			k, _ := cols[0].(int64)
			data, err := checked(tag, k, cols[1], cols[2])
			if err != nil {
				return err
			}
			rows = append(rows, row{k, data, cols[2].(int64)})
			if size += len(data); size > backupBytes {
				return errEnough
			}
			return nil
		}, from, to)
		if ignoreEnough(err) != nil {
			return fmt.Errorf("read %s: %w", table, err)
		}
		if len(rows) == 0 || rows[0].key != from {
			return fmt.Errorf("read %s: row %d is missing: %w", table, from, ErrCorrupt)
		}
		err = dst.transaction(func() error {
			for _, r := range rows {
				if r.key != from {
					return fmt.Errorf("row %d is missing: %w", from, ErrCorrupt)
				}
				if err := dst.exec(insertRow, r.key, r.data, r.sum); err != nil {
					return err
				}
				from++
			}
			return nil
		})
		if err == nil {
			err = dst.checkpoint()
		}
		if err != nil {
			return fmt.Errorf("copy %s: %w", table, err)
		}
	}
	return nil
}

// rows is query in a snapshot of its own.
func (t *logTree) rows(ctx context.Context, sql string, f func(cols []driver.Value) error, args ...any) error {
	return t.read(ctx, func(s *snapshot) error {
		return s.use(func() error { return s.c.query(ctx, sql, f, args...) })
	})
}

// checkpoint keeps the write-ahead log of a file that nobody else uses short.
func (c *conn) checkpoint() error {
	return c.query(context.Background(), "PRAGMA wal_checkpoint(TRUNCATE)", func([]driver.Value) error { return nil })
}

// ignoreEnough turns the sentinel for "stop early" into success.
func ignoreEnough(err error) error {
	if errors.Is(err, errEnough) {
		return nil
	}
	return err
}
