package ceremony

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"math/big"
	"time"

	"github.com/chancery-ca/chancery/ca/profile"
	"github.com/chancery-ca/chancery/ceremony/trust"
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
	Role        trust.Role    `json:"role"`
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
	Status string `json:"status"` // complete
}

// facts is what the records of a transcript say. It is made by apply alone, so
// that a run, a resumed run and a verifier all know the same.
type facts struct {
	def         *Definition
	done        map[string]bool // Step.ID
	opened      *openData
	openedAt    time.Time
	inventory   map[string]inventoryData
	health      map[string]Health
	commitments *entropyIntent
	reveals     *entropyResult
	seed        [sha256.Size]byte
	seedRecord  [sha256.Size]byte
	keyIntents  map[string]keyIntent
	keys        map[string]keyFact
	tbs         map[string]certificateIntent
	certs       map[string]*x509.Certificate
	files       []File
	head        [sha256.Size]byte
	records     int
}

// keyFact is a key that was made.
type keyFact struct {
	keyResult
	public crypto.PublicKey
	spki   [sha256.Size]byte
	time   time.Time
}

func newFacts(d *Definition) *facts {
	return &facts{
		def: d, done: map[string]bool{}, inventory: map[string]inventoryData{}, health: map[string]Health{},
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

// take decodes the data of one record.
func (f *facts) take(rec *Record, step Step) error {
	intent := rec.Type == Intent
	switch {
	case step.Kind == StepOpen && !intent:
		f.opened, f.openedAt = new(openData), rec.Time
		return rec.decode(f.opened)
	case step.Kind == StepInventory && !intent:
		return decodeInto(rec, f.inventory, step.Name)
	case step.Kind == StepSelfTest && !intent:
		var d selfTestData
		err := rec.decode(&d)
		f.health[step.Name] = d.Health
		return err
	case step.Kind == StepEntropy && intent:
		f.commitments = new(entropyIntent)
		return rec.decode(f.commitments)
	case step.Kind == StepEntropy:
		return f.takeSeed(rec)
	case step.Kind == StepKey && intent:
		return decodeInto(rec, f.keyIntents, step.Name)
	case step.Kind == StepKey:
		return f.takeKey(rec, step.Name)
	case step.Kind == StepCertificate && intent:
		return decodeInto(rec, f.tbs, step.Name)
	case step.Kind == StepCertificate:
		return f.takeCertificate(rec, step.Name)
	case step.Kind == StepOutputs:
		var d outputsData
		err := rec.decode(&d)
		f.files = d.Files
		return err
	case step.Kind == StepClose && !intent:
		return rec.decode(new(closeData))
	}
	return fmt.Errorf("%w: record %d: %s of %s is unknown", ErrTranscript, rec.Seq, rec.Type, rec.Step)
}

func decodeInto[T any](rec *Record, m map[string]T, name string) error {
	var d T
	err := rec.decode(&d)
	m[name] = d
	return err
}

func (f *facts) takeSeed(rec *Record) error {
	f.reveals = new(entropyResult)
	if err := rec.decode(f.reveals); err != nil {
		return err
	}
	if f.commitments == nil {
		return fmt.Errorf("%w: record %d: reveals before commitments", ErrTranscript, rec.Seq)
	}
	seed, err := checkReveals(f.commitments, f.reveals)
	if err != nil {
		return fmt.Errorf("%w: record %d: %w", ErrTranscript, rec.Seq, err)
	}
	f.seed, f.seedRecord = seed, rec.Digest()
	return nil
}

func (f *facts) takeKey(rec *Record, name string) error {
	k := keyFact{time: rec.Time}
	if err := rec.decode(&k.keyResult); err != nil {
		return err
	}
	if _, ok := f.keyIntents[name]; !ok {
		return fmt.Errorf("%w: record %d: key %s was not announced", ErrTranscript, rec.Seq, name)
	}
	pub, err := x509.ParsePKIXPublicKey(k.Evidence.PublicKey)
	if err != nil {
		return fmt.Errorf("%w: record %d: key %s: %w", ErrTranscript, rec.Seq, name, err)
	}
	k.public, k.spki = pub, sha256.Sum256(k.Evidence.PublicKey)
	if hex.EncodeToString(k.spki[:]) != k.Evidence.SPKI {
		return fmt.Errorf("%w: record %d: key %s: public key and its hash differ", ErrTranscript, rec.Seq, name)
	}
	f.keys[name] = k
	return nil
}

func (f *facts) takeCertificate(rec *Record, name string) error {
	var d certificateResult
	if err := rec.decode(&d); err != nil {
		return err
	}
	cert, err := x509.ParseCertificate(d.Certificate)
	if err != nil {
		return fmt.Errorf("%w: record %d: certificate %s: %w", ErrTranscript, rec.Seq, name, err)
	}
	intent, ok := f.tbs[name]
	if !ok || string(intent.TBS) != string(cert.RawTBSCertificate) {
		return fmt.Errorf("%w: record %d: certificate %s is not the announced one", ErrTranscript, rec.Seq, name)
	}
	if fp := sha256.Sum256(d.Certificate); hex.EncodeToString(fp[:]) != d.SHA256 {
		return fmt.Errorf("%w: record %d: certificate %s: fingerprint differs", ErrTranscript, rec.Seq, name)
	}
	f.certs[name] = cert
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
