// Package head signs tree heads so that a log can never fork or roll back.
//
// For one tree there is one Publisher, and it alone holds the tree's head key.
// Data flows one way: a durable Root of log/tree → a Head (checked against the
// last one: time not earlier, size not smaller, equal roots at equal size,
// consistent by proof) → a signature made in the token → the anchor, written
// and synced → published, which wakes whoever waits for that size.
//
// The package promises that a head is published only after it is in the
// anchor, that no two published heads of one size differ, and that each is
// consistent with every earlier one, across crashes and restored databases:
// at start the anchor is compared with the tree, and for a tree that is behind
// or beside its anchor, or has none, the Publisher opens latched: it signs and
// appends nothing until an operator has acted (see latch). It trusts the key
// and, without a Counter, the anchor file: an attacker who can put back both
// the database and the anchor can roll back the log. With a Counter in hardware
// that is possible within one epoch only (see Counter), or with a record that
// pretends to an operator's act, which the next start logs as an error.
package head

import (
	"bytes"
	"context"
	"errors"
	"time"

	"github.com/chancery-ca/chancery/log/tree"
)

// Errors that callers branch on.
var (
	// ErrFork: the tree contradicts the last signed head. The publisher is
	// latched read-only until an operator decides.
	ErrFork = errors.New("tree contradicts the last signed head")
	// ErrUnavailable: no head could be signed (token lost or busy, clock
	// wrong). Leaves are safe; a later head will include them.
	ErrUnavailable = errors.New("no tree head could be signed")
	// ErrClosed: the publisher is shut down.
	ErrClosed = errors.New("publisher closed")
	// ErrMismatch: the anchor belongs to another key, origin or kind of log.
	ErrMismatch = errors.New("anchor belongs to another log")
	// ErrAnchor: the anchor file is missing, damaged or in use. A missing one
	// is never made silently: CreateAnchor is an operator's act.
	ErrAnchor = errors.New("anchor unusable")
	// ErrDamaged: nothing in the anchor file is valid. It comes with ErrAnchor.
	ErrDamaged = errors.New("anchor damaged")
)

// Head is what is signed about a tree.
type Head struct {
	Size uint64
	Root tree.Hash
	// Time is when the head was made, in UTC with a precision of 1 ms, never
	// earlier than the head before. A C2SP checkpoint does not contain it.
	Time time.Time
}

// Signed is a published head.
type Signed struct {
	Head
	// Signature is the DER ECDSA signature over SHA-256 of Format.Message.
	Signature []byte
	// Note is the signed note (C2SP signed-note, tlog-checkpoint), ready to serve.
	Note []byte
}

// Origin returns the first line of the note, which names the log.
func (s Signed) Origin() string {
	origin, _, _ := bytes.Cut(s.Note, []byte("\n"))
	return string(origin)
}

// Format is how a kind of log writes its heads. RFC 6962 logs sign the
// TreeHeadSignature structure, Rekor logs a checkpoint.
type Format interface {
	// Message returns the octets whose SHA-256 is signed. It is a pure
	// function of the head.
	Message(h Head) ([]byte, error)
	// Note returns the signed note for a head and its signature.
	Note(h Head, signature []byte) ([]byte, error)
}

// Publication is the reading side of a Publisher: what front ends are given.
type Publication interface {
	// Latest returns the newest published head, from memory. It is zero, with
	// no signature, in a log that is latched because its anchor is missing.
	Latest() Signed
	// Await asks for and waits for a published head with Size ≥ size. Errors:
	// ErrUnavailable, ErrFork, ErrClosed, ctx.Err().
	Await(ctx context.Context, size uint64) (Signed, error)
	// Err returns why the log is not signing heads, or nil: for readiness. While
	// it is ErrFork nothing may be appended or promised.
	Err() error
}
