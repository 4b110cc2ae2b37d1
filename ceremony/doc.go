// Package ceremony establishes and keeps a Chancery's trust root: it makes the
// keys in their tokens, observes them, issues the certificates of the
// hierarchy, has witnesses sign what was done, and writes the files that
// clients and the service take as they are.
//
// # Data flow
//
// A definition (one strict YAML file, reviewed by people) → a plan (a list of
// steps, which is data and can be printed without a token) → a run, which does
// one step after the other and writes a transcript of records → facts, which
// are what the records say and nothing else → files, which are a pure function
// of the definition and the facts. Verify walks the same way without a token
// and compares every octet.
//
// # What it promises
//
// Every record of the transcript is on disk (fsync) before the ceremony goes
// on, and is bound to all earlier ones by its hash. Before a key is made, an
// intent record with the random CKA_ID that it will have is on disk; before a
// certificate is signed, its TBS is. So a ceremony that is killed anywhere and
// resumed looks for what it announced, by that id and never by label: no such
// key → it is generated; exactly one → it is adopted; anything else → the key
// is in quarantine, and the ceremony can only be aborted. It ends with exactly
// one key for each name.
//
// Nothing is signed that a person did not see: who answers for it types words
// of its hash. People prove that they agreed to the definition by words of its
// hash, from their own paper. Where a ceremony is for production no file
// answers for them (Question.Live).
//
// The root certificate's serial number is derived from the record of the
// ceremony's randomness, so that the root commits to the ceremony that made
// it. The randomness is committed to before it is revealed, the token's first.
//
// The end is signed, a refusal and an abort too: the checkpoint stands for
// every line before it (RFC 6962), and the witnesses who are there sign it with
// their own ssh keys, or decline and say why. Fewer signatures than the quorum
// make the ceremony void.
//
// No output replaces a file that exists. A rehearsal cannot be mistaken for
// the real thing: it runs on tokens known to be software and only on those,
// and every name it certifies begins with "REHEARSAL ".
//
// # What it trusts
//
// The people who read the definition; the tokens, for the secrecy of keys and
// for their share of the randomness; the binary itself, whose hash is in the
// first record; the clock, as two watches confirm it. It opens no token by
// itself, knows no PIN, and makes no network connection: tokens come opened,
// by name (Options.Open), and people through an interface (People).
//
// # The steps
//
//	open        definition, program and modules by hash
//	people      who is there, each with words of the definition
//	clock       two watches
//	inventory   each token: what it is, its flags, that it is empty
//	self-test   each token's random source; known answers of our hashes
//	entropy     commitments, the token's first; then all reveals; the seed
//	seed        each token: the seed, if it takes one
//	key         intent; generate; read back; attest; self-test
//	certificate intent with the TBS; confirmation; signature
//	custodians  their public keys, pinned by the definition (with a TUF repository)
//	tuf         root and targets, signed by custodians in any order
//	tuf-online  snapshot and timestamp, signed by the online key
//	previous    the outputs that this ceremony continues, verified
//	backup      a wrapped key, restored in a second token; or a statement
//	request     a certificate request: the online machine has the key
//	import      the other machine's transcript, verified; its words
//	freeze      the last checkpoint of a shard that gets a successor
//	crl         the root's list of what it revokes
//	drill       a backup proves itself
//	destroy     a key that is gone
//	outputs     hashes of the files; then the files
//	checkpoint  log out; the tree over all lines so far
//	witnesses   signatures or refusals, in any order, over any number of runs
//	close       complete, declined or aborted
//
// A record is an intent (before something that cannot be undone), a statement
// (what a person said; the actor is the person), a quarantine, or a result,
// which ends its step.
//
// # How a kind of ceremony is added
//
// A kind is a list of steps. Give it a case in kindOf (kind.go): plan, which
// lists the steps between the opening and the closing (tokenSteps, keyStep,
// certificateStep, outputsStep and the like make those that there are), and
// files, which makes its outputs from the facts. All kinds share the opening
// and the closing, the engine, resume, abort, status and verify.
//
// A new kind of step needs a StepKind, a case in actionOf (plan.go) with its
// two functions, the data of its records in records.go, and what it teaches in
// facts. do writes records and nothing else remembers; it goes on from the
// facts when it is called again; it talks to people through run.ask and
// run.show, to tokens through run.token with a context of device. take checks
// every record against the definition and the facts, so that a forger who
// seals the chain again is found: add a row to the resealed-chain test. A file
// that comes from outside is read bounded, checked, and its octets or their
// hash are in a record before anything follows from it.
//
// # Two machines
//
// A root that is kept away from every network is on a machine of its own, and
// nothing but bundles (package bundle) goes between the two. Either both perform
// parts of one ceremony (Definition.On; a genesis, a rotate), or each performs one
// of its own, on another day: intermediate-csr asks, sign-intermediate answers.
// Each transcript has the other's in it, replayed from the first record.
package ceremony
