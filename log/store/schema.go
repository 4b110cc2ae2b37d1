package store

import "fmt"

// applicationID marks our files in SQLite's header ("Chry").
const applicationID = 0x43687279

// schema is the list of steps that bring a file from nothing to the newest
// version; SQLite's user_version counts the steps done. A step is never
// changed once released, only followed.
type schema []string

var treeSchema = schema{`
-- Facts that never change: the tree's ID and the secret of the lookup hash.
CREATE TABLE facts (id INTEGER PRIMARY KEY CHECK (id = 0), tree INTEGER NOT NULL, secret BLOB NOT NULL, sum INTEGER NOT NULL);
-- The newest state, one page: slot 0 the root and sizes, slot level+2 the
-- last, partial run of hashes of a level (-1: identities).
CREATE TABLE tip (slot INTEGER PRIMARY KEY, data BLOB NOT NULL, sum INTEGER NOT NULL);
-- Full runs of 64 hashes; id = (level+1) << 58 | number of the run.
CREATE TABLE runs (id INTEGER PRIMARY KEY, data BLOB NOT NULL, sum INTEGER NOT NULL);
-- Entries by index; data is described at record.
CREATE TABLE entries (idx INTEGER PRIMARY KEY, data BLOB NOT NULL, sum INTEGER NOT NULL);
-- PREORDERED_LOG: stored but not integrated; data is leaf hash, then record.
CREATE TABLE staged (idx INTEGER PRIMARY KEY, identity BLOB NOT NULL UNIQUE, data BLOB NOT NULL, sum INTEGER NOT NULL);
-- Sealed generations of the lookup; id = kind << 48 | number.
CREATE TABLE generations (id INTEGER PRIMARY KEY, first INTEGER NOT NULL, count INTEGER NOT NULL, filter BLOB NOT NULL, sum INTEGER NOT NULL);
-- Their sorted pieces; id = generation << 12 | bucket.
CREATE TABLE buckets (id INTEGER PRIMARY KEY, data BLOB NOT NULL, sum INTEGER NOT NULL);
`}

var adminSchema = schema{`
-- data is a serialised trillian.Tree.
CREATE TABLE trees (id INTEGER PRIMARY KEY, data BLOB NOT NULL, sum INTEGER NOT NULL);
`}

// migrate brings the file of a write connection to the newest version, one
// transaction for each step. With create it turns an empty file into version
// 0 first; without, an empty file is refused.
func (s schema) migrate(c *conn, create bool) error {
	app, err := c.integer("PRAGMA application_id")
	if err != nil {
		return fmt.Errorf("read application id: %w", err)
	}
	version, err := c.integer("PRAGMA user_version")
	if err != nil {
		return fmt.Errorf("read schema version: %w", err)
	}
	switch {
	case app == 0 && version == 0 && create:
	case app != applicationID:
		return fmt.Errorf("%w: not a database of this program", ErrSchema)
	case version > int64(len(s)):
		return fmt.Errorf("%w: version %d, this program knows up to %d", ErrSchema, version, len(s))
	}
	for v := int(version); v < len(s); v++ {
		step := fmt.Sprintf("BEGIN IMMEDIATE; %s; PRAGMA user_version=%d; PRAGMA application_id=%d; COMMIT", s[v], v+1, applicationID)
		if err := c.script(step); err != nil {
			_ = c.script("ROLLBACK")
			return fmt.Errorf("migrate schema to version %d: %w", v+1, err)
		}
	}
	return nil
}

const pageSize = 16384

// writerPragmas set up a connection that writes. page_size takes effect on an
// empty file only, and before journal_mode.
var writerPragmas = []string{
	fmt.Sprintf("PRAGMA page_size=%d", pageSize),
	"PRAGMA journal_mode=WAL",
	"PRAGMA synchronous=FULL",
	"PRAGMA wal_autocheckpoint=0",
	"PRAGMA cache_size=-4096",
	"PRAGMA temp_store=MEMORY",
}

// readerPragmas set up a connection that reads; each may cache 512 KiB.
var readerPragmas = []string{"PRAGMA query_only=ON", "PRAGMA cache_size=-512"}
