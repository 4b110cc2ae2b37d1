package ceremony

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/chancery-ca/chancery/ca/profile"
	"github.com/chancery-ca/chancery/hsm"
)

// The data of records, by step and type. Octets are standard base64 in JSON,
// hashes and ids hexadecimal.

// openData is the result of StepOpen.
type openData struct {
	Definition  string      `json:"definitionSHA256"`
	Kind        Kind        `json:"kind"`
	Environment Environment `json:"environment"`
	Binary      string      `json:"binarySHA256"` // "" when the caller named none
	GoVersion   string      `json:"goVersion"`
}

// inventoryData is the result of StepInventory.
type inventoryData struct {
	Token        hsm.TokenInfo `json:"token"`
	Keys         int           `json:"keys"`         // private keys found on it
	ModuleSHA256 string        `json:"moduleSHA256"` // "" for a token without a module
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

// entropyIntent is the intent of StepEntropy: all commitments, the token's last.
type entropyIntent struct {
	Token       string         `json:"token"` // whose random is the hardware random
	Commitments []contribution `json:"commitments"`
}

// entropyResult is the seed record: all values in the same order, and the seed.
type entropyResult struct {
	Reveals []contribution `json:"reveals"`
	Seed    string         `json:"seed"`
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

// certificateIntent is the intent of StepCertificate.
type certificateIntent struct {
	Kind      profile.Kind `json:"kind"`
	Serial    string       `json:"serial"`
	NotBefore time.Time    `json:"notBefore"`
	NotAfter  time.Time    `json:"notAfter"`
	TBS       []byte       `json:"tbs"`
	TBSSHA256 string       `json:"tbsSHA256"`
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

// closeData is the result of StepClose.
type closeData struct {
	Status string `json:"status"`
}

// The fixed words in records.
const (
	knownAnswerPass = "pass"
	statusComplete  = "complete"
)

// facts is what the records of a transcript say. It is made by apply alone, so
// that a run, a resumed run and a verifier all know the same.
type facts struct {
	def         *Definition
	done        map[string]bool // Step.ID
	openedAt    time.Time
	inventory   map[string]inventoryData // by token
	commitments *entropyIntent
	seed        [sha256.Size]byte
	seedRecord  [sha256.Size]byte // hash of the seed record
	keyIntents  map[string]keyIntent
	keys        map[string]keyFact
	tbs         map[string]certificateIntent
	certs       map[string]*x509.Certificate
	announced   bool // the files of StepOutputs
	head        [sha256.Size]byte
	records     int
}

// keyFact is a key that was made.
type keyFact struct {
	evidence hsm.Evidence
	public   crypto.PublicKey
	spki     [sha256.Size]byte
}

func newFacts(d *Definition) *facts {
	return &facts{
		def: d, done: map[string]bool{}, inventory: map[string]inventoryData{},
		keyIntents: map[string]keyIntent{}, keys: map[string]keyFact{},
		tbs: map[string]certificateIntent{}, certs: map[string]*x509.Certificate{},
	}
}

// apply takes in the next record. It accepts only what a ceremony of this
// definition writes: known steps in the order of the plan, an intent before
// its result where there is one, nothing after the end.
func (f *facts) apply(rec *Record, step Step) error {
	f.head, f.records = rec.Digest(), f.records+1
	if rec.Type == Note {
		return nil
	}
	if f.done[step.ID] || f.done[string(StepClose)] {
		return fmt.Errorf("%w: record %d: step %s is over", ErrTranscript, rec.Seq, rec.Step)
	}
	if err := f.take(rec, step); err != nil {
		return err
	}
	if rec.Type == Done {
		f.done[step.ID] = true
	}
	return nil
}

// take decodes the data of one record and compares it with the definition.
func (f *facts) take(rec *Record, step Step) error {
	intent := rec.Type == Intent
	switch {
	case step.Kind == StepOpen && !intent:
		return f.takeOpen(rec)
	case step.Kind == StepInventory && !intent:
		return f.takeInventory(rec, step.Name)
	case step.Kind == StepSelfTest && !intent:
		return takeSelfTest(rec)
	case step.Kind == StepEntropy && intent:
		return f.takeCommitments(rec)
	case step.Kind == StepEntropy:
		return f.takeSeed(rec)
	case step.Kind == StepKey && intent:
		return f.takeKeyIntent(rec, step.Name)
	case step.Kind == StepKey:
		return f.takeKey(rec, step.Name)
	case step.Kind == StepCertificate && intent:
		return f.takeCertificateIntent(rec, step.Name)
	case step.Kind == StepCertificate:
		return f.takeCertificate(rec, step.Name)
	case step.Kind == StepOutputs:
		return f.takeOutputs(rec)
	case step.Kind == StepClose && !intent:
		return takeClose(rec)
	}
	return bad(rec, "%s of this step is unknown", rec.Type)
}

// bad says what is wrong with a record.
func bad(rec *Record, format string, args ...any) error {
	return fmt.Errorf("%w: record %d (%s): %w", ErrTranscript, rec.Seq, rec.Step, fmt.Errorf(format, args...))
}

func (f *facts) takeOpen(rec *Record) error {
	var d openData
	if err := rec.decode(&d); err != nil {
		return err
	}
	if h := f.def.Hash(); d.Definition != hex.EncodeToString(h[:]) {
		return bad(rec, "%w: not the one that the ceremony began with", ErrDefinition)
	}
	if rec.Ceremony != f.def.ID || d.Kind != f.def.Kind || d.Environment != f.def.Environment {
		return bad(rec, "id, kind or environment is not the definition's")
	}
	f.openedAt = rec.Time
	return nil
}

func (f *facts) takeInventory(rec *Record, token string) error {
	var d inventoryData
	if err := rec.decode(&d); err != nil {
		return err
	}
	if d.Keys < 0 || d.Keys > 0 && f.def.Tokens[token].MustBeEmpty {
		return bad(rec, "%w: %d keys", ErrNotEmpty, d.Keys)
	}
	if f.def.Environment == Rehearsal && !hsm.IsSoftware(d.Token) {
		return bad(rec, "%w: token is not known to be software", ErrEnvironment)
	}
	f.inventory[token] = d
	return nil
}

func takeSelfTest(rec *Record) error {
	var d selfTestData
	if err := rec.decode(&d); err != nil {
		return err
	}
	if d.KnownAnswer != knownAnswerPass {
		return bad(rec, "known-answer test: %.40q", d.KnownAnswer)
	}
	if err := d.Health.check(); err != nil {
		return bad(rec, "%w", err)
	}
	return nil
}

// takeCommitments accepts commitments again: an interrupted step begins anew.
func (f *facts) takeCommitments(rec *Record) error {
	var d entropyIntent
	if err := rec.decode(&d); err != nil {
		return err
	}
	var who []string
	for _, c := range d.Commitments {
		who = append(who, c.Contributor)
	}
	if want := append(slices.Clone(f.def.Entropy.Contributors), hardwareShare); !slices.Equal(who, want) {
		return bad(rec, "commitments are not those of the definition's contributors")
	}
	if d.Token != f.def.Keys[f.def.keyOfRole(hsm.RoleRoot)].Token {
		return bad(rec, "hardware random is not of the root's token")
	}
	f.commitments = &d
	return nil
}

func (f *facts) takeSeed(rec *Record) error {
	var d entropyResult
	if err := rec.decode(&d); err != nil {
		return err
	}
	if f.commitments == nil {
		return bad(rec, "reveals before commitments")
	}
	seed, err := checkReveals(f.commitments, &d)
	if err != nil {
		return bad(rec, "%w", err)
	}
	f.seed, f.seedRecord = seed, rec.Digest()
	return nil
}

func (f *facts) takeKeyIntent(rec *Record, name string) error {
	var d keyIntent
	if err := rec.decode(&d); err != nil {
		return err
	}
	want := keyIntent{
		Role: f.def.uses[name].role, Token: f.def.Keys[name].Token, Label: name,
		ID: d.ID, Algorithm: f.def.Keys[name].Algorithm,
	}
	if id, err := hex.DecodeString(d.ID); d != want || err != nil || len(id) != hsm.IDSize {
		return bad(rec, "not the key of the definition")
	}
	if _, ok := f.keyIntents[name]; ok {
		return bad(rec, "the key was announced before")
	}
	f.keyIntents[name] = d
	return nil
}

func (f *facts) takeKey(rec *Record, name string) error {
	var d keyResult
	if err := rec.decode(&d); err != nil {
		return err
	}
	intent, ok := f.keyIntents[name]
	if !ok {
		return bad(rec, "the key was not announced")
	}
	if err := checkEvidence(d.Evidence, intent); err != nil {
		return bad(rec, "%w", err)
	}
	if tok := f.inventory[intent.Token].Token; d.Evidence.Token.Serial != tok.Serial || d.Evidence.Token.Label != tok.Label {
		return bad(rec, "the key is in another token than the inventory's")
	}
	if d.Signatures != rSignatures || d.DistinctR != rSignatures {
		return bad(rec, "r-uniqueness was not shown")
	}
	if f.def.Environment == Rehearsal && d.Evidence.Level != hsm.LevelSoftware {
		return bad(rec, "%w: evidence level %.20q", ErrEnvironment, d.Evidence.Level)
	}
	pub, err := x509.ParsePKIXPublicKey(d.Evidence.PublicKey)
	if err != nil {
		return bad(rec, "%w", err)
	}
	k := keyFact{evidence: d.Evidence, public: pub, spki: sha256.Sum256(d.Evidence.PublicKey)}
	for other, have := range f.keys {
		if have.spki == k.spki {
			return bad(rec, "key %s has the same public key", other)
		}
	}
	f.keys[name] = k
	return nil
}

func (f *facts) takeCertificateIntent(rec *Record, name string) error {
	var d certificateIntent
	if err := rec.decode(&d); err != nil {
		return err
	}
	if _, ok := f.tbs[name]; ok {
		return bad(rec, "the certificate was announced before")
	}
	if d.Kind == profile.Root && d.Serial != rootSerial(f.seedRecord, f.seed).Text(16) {
		return bad(rec, "the root's serial number is not derived from the seed record")
	}
	tbs, err := f.buildTBS(name, d)
	if err != nil {
		return bad(rec, "%w", err)
	}
	if sum := sha256.Sum256(d.TBS); !bytes.Equal(tbs.Raw(), d.TBS) || hex.EncodeToString(sum[:]) != d.TBSSHA256 ||
		d.Kind != f.def.certificateKind(name) {
		return bad(rec, "the TBS is not the definition's")
	}
	f.tbs[name] = d
	return nil
}

func (f *facts) takeCertificate(rec *Record, name string) error {
	var d certificateResult
	if err := rec.decode(&d); err != nil {
		return err
	}
	cert, err := x509.ParseCertificate(d.Certificate)
	if err != nil {
		return bad(rec, "%w", err)
	}
	intent, ok := f.tbs[name]
	if !ok || !bytes.Equal(intent.TBS, cert.RawTBSCertificate) {
		return bad(rec, "the certificate is not the announced one")
	}
	if err := cert.CheckSignatureFrom(f.issuerOf(name, cert)); err != nil {
		return bad(rec, "%w", err)
	}
	if sum := sha256.Sum256(d.Certificate); hex.EncodeToString(sum[:]) != d.SHA256 {
		return bad(rec, "fingerprint differs")
	}
	f.certs[name] = cert
	return nil
}

// takeOutputs compares the announced files with those that follow from the
// records before.
func (f *facts) takeOutputs(rec *Record) error {
	var d outputsData
	if err := rec.decode(&d); err != nil {
		return err
	}
	if rec.Type == Intent && f.announced || rec.Type == Done && !f.announced {
		return bad(rec, "files were not announced once")
	}
	files, err := f.outputFiles()
	if err != nil {
		return bad(rec, "%w", err)
	}
	same := func(a, b File) bool { return a.Name == b.Name && a.SHA256 == b.SHA256 && a.Size == b.Size }
	if !slices.EqualFunc(files, d.Files, same) {
		return bad(rec, "the files are not those that follow from the records")
	}
	f.announced = true
	return nil
}

func takeClose(rec *Record) error {
	var d closeData
	if err := rec.decode(&d); err != nil {
		return err
	}
	if d.Status != statusComplete {
		return bad(rec, "status %.40q", d.Status)
	}
	return nil
}

// rootSerial derives the root's serial number: the first 20 octets of
// SHA-256("chancery root serial v1\0" ‖ hash of the seed record ‖ seed), with
// the first octet & 0x7f | 0x40, so that it is positive and 20 octets long.
func rootSerial(seedRecord, seed [sha256.Size]byte) *big.Int {
	h := sha256.New()
	h.Write([]byte("chancery root serial v1\x00"))
	h.Write(seedRecord[:])
	h.Write(seed[:])
	octets := h.Sum(nil)[:20]
	octets[0] = octets[0]&0x7f | 0x40
	return new(big.Int).SetBytes(octets)
}
