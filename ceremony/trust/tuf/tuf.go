// Package tuf makes, checks and refreshes the TUF repository by which clients
// learn of a Chancery's trust files (The Update Framework specification
// 1.0.31): trusted_root.json, signing_config.v0.2.json and, for old clients,
// the public keys and certificates as files of their own.
//
// # Who signs what
//
// Root and targets are signed by custodians, people with P-256 keys in tokens
// of their own, at a threshold. Snapshot and timestamp are signed by one online
// key in the service's token. Keys have the type "ecdsa" and the scheme
// "ecdsa-sha2-nistp256", and their id is the SHA-256 of their canonical JSON;
// a signature is ASN.1 DER over the SHA-256 of the canonical JSON of the signed
// part. Snapshots are consistent (Section 6.2). The root says, beside the keys,
// for how long each role's files are valid ("x-chancery-expires" of the role,
// "7d" or "1y", which clients ignore): so the custodians decide how long a
// stolen online key is good for, and the service reads it from what they signed.
//
// # Data flow
//
// Layout → NewRoot, target files → NewTargets → a Draft each → custodians sign
// its Payload, at one table or far away, in any order → Draft.Bytes. NewSnapshot
// and NewTimestamp → Drafts that the online key signs → New → Repository →
// files, by Files, Write or a Mirror. All of it but the signatures is a pure
// function of its input, and equal input gives equal octets, so that a ceremony
// can put on record what it is going to sign.
//
// # What it promises
//
// One form: a metadata file is read into a small model, written again from the
// model, and refused if a single octet differs. So there are no unknown fields,
// no double keys, no second document and no other white space; with the
// signatures, all of which must verify (a threshold of good ones is not
// enough), any change of an octet of a repository is noticed. The files of a
// repository are a closed list.
//
// A root is accepted as a successor only when a threshold of the custodians of
// the old and a threshold of those of the new have signed it (Section 5.3.4).
//
// A client never sees a version go back, even if the online state is lost or an
// old backup restored: the versions of snapshot and timestamp are minutes of
// the Unix time, or one more than the newest known.
//
// # What it trusts
//
// Its caller, for which keys are the custodians'; the clock it is given; of the
// online state's folder nothing: it may be lost, and who can write to it can
// stop the service or wear out its key, but not sign.
package tuf

import (
	"errors"
	"fmt"
	"strconv"
	"time"
)

// Errors that callers branch on.
var (
	// ErrFormat: the octets are not what this package writes.
	ErrFormat = errors.New("not a valid TUF file")
	// ErrLayout: keys, threshold, periods or target files that cannot be.
	ErrLayout = errors.New("invalid TUF layout")
	// ErrSignature: a signature does not verify.
	ErrSignature = errors.New("wrong signature")
	// ErrForeign: a signature by a key that has no say in the file.
	ErrForeign = errors.New("not a key of this role")
	// ErrDouble: a key has signed already.
	ErrDouble = errors.New("signed already by this key")
	// ErrThreshold: too few signatures.
	ErrThreshold = errors.New("signatures are missing")
	// ErrExpired: metadata is past its time.
	ErrExpired = errors.New("TUF metadata expired")
	// ErrVersion: a version that is not the successor, or goes back.
	ErrVersion = errors.New("TUF version out of order")
)

// The bounds of what is read and served, in octets and files.
const (
	MaxFile       = 1 << 20
	maxCustodians = 16
	maxRoots      = 1024
	maxTargets    = 128
	maxVersion    = 1<<53 - 1 // JavaScript's largest exact integer
)

// TargetsFolder is the folder of the target files, with the final slash.
const TargetsFolder = "targets/"

// TimestampName is the one file of a repository whose content changes.
const TimestampName = "timestamp.json"

// Role is a top-level role of TUF.
type Role string

// The roles.
const (
	RoleRoot      Role = "root"
	RoleTargets   Role = "targets"
	RoleSnapshot  Role = "snapshot"
	RoleTimestamp Role = "timestamp"
)

// fileName returns the name of a role's metadata file with consistent
// snapshots (TUF 1.0.31, Section 6.2): "7.targets.json", "timestamp.json".
func (r Role) fileName(version int64) string {
	if r == RoleTimestamp {
		return TimestampName
	}
	return strconv.FormatInt(version, 10) + "." + string(r) + ".json"
}

// File is a file of a repository: its slash-separated name and its octets.
type File struct {
	Name    string
	Content []byte
}

// Period is a number of days or of years, as definitions write it: "7d", "1y".
type Period struct {
	Years, Days int
}

// ParsePeriod reads 1 to 9999 days or 1 to 99 years.
func ParsePeriod(s string) (Period, error) {
	if len(s) < 2 || len(s) > 5 {
		return Period{}, fmt.Errorf("period %.20q: want a number of days or years, as 7d or 1y: %w", s, ErrLayout)
	}
	n, err := strconv.ParseUint(s[:len(s)-1], 10, 16)
	p := Period{Days: int(n)}
	if s[len(s)-1] == 'y' {
		p = Period{Years: int(n)}
	}
	if err != nil || !p.valid() || p.String() != s {
		return Period{}, fmt.Errorf("period %.20q: want a number of days or years, as 7d or 1y: %w", s, ErrLayout)
	}
	return p, nil
}

func (p Period) valid() bool {
	return p.Years == 0 && p.Days >= 1 && p.Days <= 9999 || p.Days == 0 && p.Years >= 1 && p.Years <= 99
}

// String returns what ParsePeriod reads.
func (p Period) String() string {
	if p.Years != 0 {
		return strconv.Itoa(p.Years) + "y"
	}
	return strconv.Itoa(p.Days) + "d"
}

// After returns the end of a period that begins at t, in UTC and whole seconds.
func (p Period) After(t time.Time) time.Time {
	return t.UTC().Truncate(time.Second).AddDate(p.Years, 0, p.Days)
}

// NextVersion returns the version of a snapshot or timestamp that is signed at
// now when previous is the newest known one (0 = none).
func NextVersion(previous int64, now time.Time) int64 {
	return max(previous+1, now.Unix()/60)
}
