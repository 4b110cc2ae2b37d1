package ceremony

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"github.com/chancery-ca/chancery/ca/profile"
	"github.com/chancery-ca/chancery/hsm"
)

// The data of records, by step and type. Octets are standard base64 in JSON,
// hashes and ids hexadecimal.

// openData is the result of StepOpen.
type openData struct {
	Definition  string            `json:"definitionSHA256"`
	Kind        Kind              `json:"kind"`
	Environment Environment       `json:"environment"`
	Binary      string            `json:"binarySHA256"`      // "" when the caller named none
	Machine     Machine           `json:"machine,omitempty"` // of two
	GoVersion   string            `json:"goVersion"`
	Modules     map[string]string `json:"modulesSHA256"` // empty in a rehearsal
}

// presenceData is a statement in StepPeople: the person's words of the
// definition, "" if they are not there.
type presenceData struct {
	Present bool   `json:"present"`
	Words   string `json:"words,omitempty"`
}

// peopleData is the result of StepPeople: who is there.
type peopleData struct {
	Present []string `json:"present"`
}

// watchData is a statement in StepClock: a person's watch, HH:MM in UTC.
type watchData struct {
	Watch string `json:"watch"`
}

// clockData is the result of StepClock.
type clockData struct {
	Watches int `json:"watches"`
}

// inventoryData is the result of StepInventory.
type inventoryData struct {
	Token        hsm.TokenInfo   `json:"token"`
	Keys         int             `json:"keys"`         // private keys found on it
	ModuleSHA256 string          `json:"moduleSHA256"` // "" for a token without a module
	Inspection   *hsm.Inspection `json:"inspection,omitempty"`
}

// selfTestData is the result of StepSelfTest.
type selfTestData struct {
	Health      Health `json:"randomHealth"`
	KnownAnswer string `json:"knownAnswer"` // "pass": SHA-256 and SHA-384 of "abc" (FIPS 180-4)
}

// contribution is one share of the public randomness; its value is 32 octets.
type contribution struct {
	Contributor string `json:"contributor"`
	Commitment  string `json:"commitment,omitempty"`
	Value       string `json:"value,omitempty"`
}

// entropyIntent is the intent of StepEntropy: the token's commitment.
type entropyIntent struct {
	Token      string `json:"token"` // whose random is the hardware random
	Commitment string `json:"commitment"`
}

// commitmentData is a statement in StepEntropy: a person's commitment.
type commitmentData struct {
	Commitment string `json:"commitment"`
}

// entropyResult is the seed record: all values, the token's last, and the seed.
type entropyResult struct {
	Reveals []contribution `json:"reveals"`
	Seed    string         `json:"seed"`
}

// seededData is the result of StepSeed: whether the token took the seed, or
// why not.
type seededData struct {
	Taken  bool   `json:"taken"`
	Answer string `json:"answer,omitempty"`
}

// keyIntent is the intent of StepKey.
type keyIntent struct {
	Role        hsm.Role      `json:"role"`
	Token       string        `json:"token"`
	Label       string        `json:"label"`
	ID          string        `json:"id"` // CKA_ID, 16 random octets
	Algorithm   hsm.Algorithm `json:"alg"`
	Extractable bool          `json:"extractable"`
}

// keyResult is the result of StepKey.
type keyResult struct {
	// Adopted: an interrupted run had made the key; this one found it.
	Adopted  bool         `json:"adopted"`
	Evidence hsm.Evidence `json:"evidence"`
	// DistinctR is how many of the signatures of one digest had different r.
	DistinctR  int `json:"distinctR"`
	Signatures int `json:"signatures"`
}

// quarantineData says what was found in place of an announced key.
type quarantineData struct {
	Token string `json:"token"`
	ID    string `json:"id"`
	Found string `json:"found"`
}

// certificateIntent is the intent of StepCertificate.
type certificateIntent struct {
	Kind      profile.Kind `json:"kind"`
	Serial    string       `json:"serial"`
	NotBefore time.Time    `json:"notBefore"`
	NotAfter  time.Time    `json:"notAfter"`
	TBS       []byte       `json:"tbs"`
	TBSSHA256 string       `json:"tbsSHA256"`
}

// confirmData is a statement in StepCertificate: words of the TBS's hash.
type confirmData struct {
	Words string `json:"words"`
}

// certificateResult is the result of StepCertificate.
type certificateResult struct {
	Certificate []byte `json:"certificate"`
	SHA256      string `json:"sha256"` // the certificate's fingerprint
}

// outputsData is the intent and the result of StepOutputs.
type outputsData struct {
	Files []File `json:"files"`
}

// abortData is a statement in StepAbort: why.
type abortData struct {
	Reason string `json:"reason"`
}

// abortResult is the result of StepAbort.
type abortResult struct {
	Step string `json:"step"` // that was not finished
	// Keys are those that were made or announced; they stay in the tokens.
	Keys []string `json:"keys"`
}

// checkpointData is the result of StepCheckpoint: the RFC 6962 tree over the
// lines of the transcript before this one.
type checkpointData struct {
	Size uint64 `json:"size"`
	Root string `json:"root"`
}

// witnessData is a statement in StepWitnesses: a signature of the checkpoint,
// armored as ssh-keygen does, or why there is none.
type witnessData struct {
	Signature string `json:"signature,omitempty"`
	Declined  string `json:"declined,omitempty"`
}

// witnessesData is the result of StepWitnesses.
type witnessesData struct {
	Signed   []string `json:"signed"`
	Declined []string `json:"declined"`
}

// closeData is the result of StepClose.
type closeData struct {
	Status Ending `json:"status"`
}

const knownAnswerPass = "pass"

// Ending is how a ceremony ended.
type Ending string

// The endings.
const (
	// Complete: every step was done and enough witnesses signed.
	Complete Ending = "complete"
	// Declined: every step was done, and too few witnesses signed.
	Declined Ending = "declined"
	// Aborted: people ended it before.
	Aborted Ending = "aborted"
)

// facts is what the records of a transcript say. It is made by apply alone, so
// that a run, a resumed run and a verifier all know the same.
type facts struct {
	def  *Definition
	plan []Step
	next int // the step in plan that is not done

	openedAt                            time.Time
	since                               time.Time // when what is made becomes valid: openedAt, of two machines the offline one's
	exchange                            exchangeFacts
	before                              *previousFacts
	crl                                 crlFacts
	backups                             map[string]backupFacts  // by key
	destroyed                           map[string]destroyFacts // by role
	frozen                              map[string]frozenData   // by role
	binary                              string
	present                             map[string]bool          // people
	watches                             map[string]bool          // people
	inventory                           map[string]inventoryData // by token
	hardware                            string                   // the token's commitment
	commitments                         []contribution           // in order, the token's last
	seed                                [sha256.Size]byte
	seedRecord                          [sha256.Size]byte // hash of the seed record
	seeded                              map[string]bool   // tokens that took it
	keyIntents                          map[string]keyIntent
	keys                                map[string]keyFact
	quarantined                         string // the key that is not what was announced
	tbs                                 map[string]certificateIntent
	confirmed                           map[string]bool // certificates
	certs                               map[string]*x509.Certificate
	tuf                                 tufFacts
	pins                                map[string]bool // tokens whose PIN may have changed
	announced                           bool            // the files of StepOutputs
	abortedAt                           *abortResult
	abortedStep, abortedBy, abortReason string
	root                                [sha256.Size]byte // of the checkpoint
	size                                uint64
	answers                             map[string]witnessData // by witness
	status                              Ending
	lines                               [][sha256.Size]byte // leaf hashes of the records
	head                                [sha256.Size]byte
	records                             int
}

func newFacts(d *Definition, plan []Step) *facts {
	return &facts{
		def: d, plan: slices.Clone(plan),
		present: map[string]bool{}, watches: map[string]bool{}, inventory: map[string]inventoryData{},
		seeded: map[string]bool{}, keyIntents: map[string]keyIntent{}, keys: map[string]keyFact{},
		tbs: map[string]certificateIntent{}, confirmed: map[string]bool{}, certs: map[string]*x509.Certificate{},
		answers: map[string]witnessData{},
		tuf:     tufFacts{keys: map[string]*ecdsa.PublicKey{}, signatures: map[string]tufData{}},
	}
}

// replay takes in the records of a transcript, from the first.
func (f *facts) replay(records []Record) error {
	for i := range records {
		if err := f.apply(&records[i]); err != nil {
			return err
		}
	}
	return nil
}

// apply takes in the next record. It accepts only what a ceremony of this
// definition writes: the steps of the plan in its order, an intent before its
// result where there is one, statements of people who are there, nothing after
// the end.
func (f *facts) apply(rec *Record) error {
	if rec.Step == string(StepAbort) {
		f.turn()
	}
	if f.next == len(f.plan) || rec.Step != f.plan[f.next].ID {
		return fmt.Errorf("%w: record %d: step %.80q is not the plan's next", ErrTranscript, rec.Seq, rec.Step)
	}
	step := f.plan[f.next]
	if f.quarantined != "" && !f.aborted() {
		return bad(rec, "key %s is in quarantine", f.quarantined)
	}
	if rec.Type == Statement && step.Kind != StepPeople && step.Kind != StepAbort && !f.present[rec.Actor] && !f.def.isCustodian(step, rec.Actor) {
		return bad(rec, "%.40q is not there", rec.Actor)
	}
	if !step.Kind.ends() {
		if err := f.def.Window.check(rec.Time); err != nil {
			return bad(rec, "%w", err)
		}
	}
	a, err := actionOf(step.Kind)
	if err != nil {
		return err
	}
	if err := a.take(f, rec, step); err != nil {
		return err
	}
	line, err := rec.line()
	if err != nil {
		return err
	}
	f.lines = append(f.lines, leafHash(line))
	f.head, f.records = rec.Digest(), f.records+1
	if rec.Type == Done {
		f.next++
	}
	return nil
}

// turn puts the end of an aborted ceremony in place of the steps that are
// left. It does so once, and not after the checkpoint.
func (f *facts) turn() {
	closing := f.def.closing()
	if f.aborted() || f.next > len(f.plan)-len(closing) {
		return
	}
	f.abortedStep = f.plan[f.next].ID
	f.plan = append(f.plan[:f.next:f.next], abortStep())
	f.plan = append(f.plan, closing...)
}

// aborted says whether the plan has turned.
func (f *facts) aborted() bool {
	return slices.ContainsFunc(f.plan, func(s Step) bool { return s.Kind == StepAbort })
}

// bad says what is wrong with a record.
func bad(rec *Record, format string, args ...any) error {
	return fmt.Errorf("%w: record %d (%s): %w", ErrTranscript, rec.Seq, rec.Step, fmt.Errorf(format, args...))
}

// result decodes a record that must be a step's result.
func (r *Record) result(v any) error {
	if r.Type != Done {
		return bad(r, "%s of this step is unknown", r.Type)
	}
	return r.decode(v)
}

// previous is the hash of the record before.
func (r *Record) previous() [sha256.Size]byte {
	var h [sha256.Size]byte
	_, _ = hex.Decode(h[:], []byte(r.Prev)) // checked by checkChain
	return h
}
