// Package ceremony establishes a Chancery's trust root: it makes the keys in
// their tokens, observes them, issues the certificates of the hierarchy, and
// writes the files that clients and the service take as they are.
//
// # Data flow
//
// A definition (one strict YAML file, reviewed by people) → a plan (a list of
// steps, which is data and can be printed without a token) → a run, which does
// one step after the other and writes a transcript → outputs, which are a pure
// function of the definition and the transcript.
//
// # What it promises
//
// Every record of the transcript is on disk (fsync) before the ceremony goes
// on, and is bound to all earlier ones by its hash. Before a key is made, an
// intent record with the random CKA_ID that it will have is on disk; before a
// certificate is signed, its TBS is. So a ceremony that is killed anywhere and
// resumed looks for what it announced, by that id and never by label: no such
// key → it is generated; exactly one → it is adopted; anything else → the
// ceremony stops. It ends with exactly one key for each name.
//
// The root certificate's serial number is derived from the record of the
// ceremony's randomness, so that the root commits to the ceremony that made
// it. No output replaces a file that exists. A rehearsal cannot be mistaken
// for the real thing: it runs on tokens known to be software and only on
// those, and every name it certifies begins with "REHEARSAL ".
//
// # What it trusts
//
// The people who read the definition; the tokens, for the secrecy of keys and
// for their share of the randomness; the binary itself, whose hash is in the
// first record; the clock it is given. It opens no token, knows no PIN, and
// makes no network connection: tokens come opened, by name.
//
// # This version
//
// The kind genesis, in rehearsal, without a TUF repository, backups, or
// witnesses' signatures. A definition may name the rest; Plan then refuses it
// with ErrNotInVersion.
package ceremony
