package store

import (
	"context"
	"database/sql/driver"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net/url"

	"github.com/mattn/go-sqlite3"
)

// conn is one SQLite connection with its prepared statements. It is used by
// one goroutine at a time. We speak to the driver, not to database/sql: which
// connection a statement runs on is the point of this package, and it saves a
// lock and several allocations for each row.
type conn struct {
	db    *sqlite3.SQLiteConn
	stmts map[string]*sqlite3.SQLiteStmt
	args  []driver.NamedValue
	row   []driver.Value
}

// Modes of openConn.
const (
	modeCreate   = "rwc"
	modeExisting = "rw"
	modeRead     = "ro"
)

// busyTimeout bounds, in milliseconds, how long a connection waits for a lock
// of another one of this process (only checkpoints take such locks).
const busyTimeout = 2000

var sqliteDriver sqlite3.SQLiteDriver

func openConn(path, mode string, pragmas ...string) (*conn, error) {
	dsn := (&url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath(), RawQuery: "mode=" + mode + "&_mutex=no"}).String()
	db, err := sqliteDriver.Open(dsn)
	if err != nil {
		return nil, fmt.Errorf("open database: %w", sqlError(err))
	}
	c := &conn{db: db.(*sqlite3.SQLiteConn), stmts: make(map[string]*sqlite3.SQLiteStmt)}
	pragmas = append([]string{
		fmt.Sprintf("PRAGMA busy_timeout=%d", busyTimeout),
		"PRAGMA trusted_schema=OFF",
		"PRAGMA cell_size_check=ON",
		"PRAGMA mmap_size=0",
	}, pragmas...)
	for _, p := range pragmas {
		if err := c.script(p); err != nil {
			return nil, errors.Join(fmt.Errorf("set up connection: %w", err), c.close())
		}
	}
	return c, nil
}

func (c *conn) close() error {
	if c == nil {
		return nil
	}
	for _, s := range c.stmts {
		_ = s.Close()
	}
	c.stmts = nil
	return c.db.Close()
}

// script runs SQL without arguments and without a prepared statement.
func (c *conn) script(sql string) error {
	if _, err := c.db.Exec(sql, nil); err != nil {
		return sqlError(err)
	}
	return nil
}

func (c *conn) stmt(sql string) (*sqlite3.SQLiteStmt, error) {
	if s, ok := c.stmts[sql]; ok {
		return s, nil
	}
	p, err := c.db.Prepare(sql)
	if err != nil {
		return nil, sqlError(err)
	}
	s := p.(*sqlite3.SQLiteStmt)
	c.stmts[sql] = s
	return s, nil
}

func (c *conn) bind(args []any) []driver.NamedValue {
	c.args = c.args[:0]
	for i, a := range args {
		c.args = append(c.args, driver.NamedValue{Ordinal: i + 1, Value: a})
	}
	return c.args
}

// exec runs a prepared statement. Arguments are int64 or []byte. It cannot be
// cancelled: a write is short, and half of one is worth nothing.
func (c *conn) exec(sql string, args ...any) error {
	s, err := c.stmt(sql)
	if err != nil {
		return err
	}
	if _, err := s.ExecContext(context.Background(), c.bind(args)); err != nil {
		return sqlError(err)
	}
	return nil
}

// query calls f for each row with its columns, which are int64 or []byte and
// belong to f.
func (c *conn) query(ctx context.Context, sql string, f func(cols []driver.Value) error, args ...any) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	s, err := c.stmt(sql)
	if err != nil {
		return err
	}
	rows, err := s.QueryContext(context.Background(), c.bind(args))
	if err != nil {
		return sqlError(err)
	}
	defer func() {
		if e := rows.Close(); e != nil && err == nil {
			err = sqlError(e)
		}
	}()
	n := len(rows.Columns())
	if cap(c.row) < n {
		c.row = make([]driver.Value, n)
	}
	for i := 0; ; i++ {
		if i%64 == 63 && ctx.Err() != nil {
			return ctx.Err()
		}
		err := rows.Next(c.row[:n])
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return sqlError(err)
		}
		if err := f(c.row[:n]); err != nil {
			return err
		}
	}
}

// integer returns the one integer that a query yields.
func (c *conn) integer(sql string, args ...any) (int64, error) {
	var n int64
	err := c.query(context.Background(), sql, func(cols []driver.Value) error {
		v, ok := cols[0].(int64)
		if !ok {
			return fmt.Errorf("read integer: %w", ErrCorrupt)
		}
		n = v
		return nil
	}, args...)
	return n, err
}

// sqlError gives SQLite's word for damage our name.
func sqlError(err error) error {
	var e sqlite3.Error
	if errors.As(err, &e) && (e.Code == sqlite3.ErrCorrupt || e.Code == sqlite3.ErrNotADB) {
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return err
}

// isFull reports whether err says that nothing more fits: the one write error
// after which the transaction is known not to have happened.
func isFull(err error) bool {
	var e sqlite3.Error
	return errors.As(err, &e) && e.Code == sqlite3.ErrFull
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checksum is stored beside octets and covers the key they are stored under,
// so that a row found in another's place is noticed too.
func checksum(table byte, key int64, data []byte) int64 {
	var k [9]byte
	k[0] = table
	binary.BigEndian.PutUint64(k[1:], uint64(key))
	return int64(crc32.Update(crc32.Checksum(k[:], castagnoli), castagnoli, data))
}

// Tables as checksum knows them.
const (
	inTip         = 't'
	inRuns        = 'r'
	inEntries     = 'e'
	inStaged      = 's'
	inGenerations = 'g'
	inBuckets     = 'b'
	inTrees       = 'a'
	inFacts       = 'f'
)

// checked returns the octets of a row (data, sum) after comparing its sum.
func checked(table byte, key int64, data, sum driver.Value) ([]byte, error) {
	b, ok := data.([]byte)
	n, ok2 := sum.(int64)
	if !ok || !ok2 || checksum(table, key, b) != n {
		return nil, fmt.Errorf("check row %c/%d: %w", table, key, ErrCorrupt)
	}
	return b, nil
}
