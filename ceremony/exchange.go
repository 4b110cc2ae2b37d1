package ceremony

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/chancery-ca/chancery/ceremony/bundle"
	"github.com/chancery-ca/chancery/ceremony/trust/tuf"
	"github.com/chancery-ca/chancery/hsm"
)

// Errors of the exchange between two machines. Those of a bundle's form are
// bundle.ErrFormat, ErrTooLarge, ErrTruncated, ErrOther and ErrContent.
var (
	// ErrBundle: the ceremony is sound and waits for the bundle of the other
	// machine.
	ErrBundle = errors.New("ceremony waits for a bundle")
	// ErrNothingToExport: the other machine needs nothing from this one now.
	ErrNothingToExport = errors.New("nothing to export")
)

// StepImport takes in what the other machine did.
const StepImport StepKind = "import"

// The files of a bundle besides the requests, evidence and certificates.
const (
	requestSuffix  = ".csr"
	evidenceSuffix = ".evidence.json"
	issuedSuffix   = ".pem"
)

// importIntent is the intent of StepImport: what was read, before anybody is
// asked. Nothing is read again after the words.
type importIntent struct {
	Bundle     string `json:"bundleSHA256"` // of the manifest, which covers all
	Head       string `json:"head"`         // of the other transcript
	Transcript []byte `json:"transcript"`
	// Definition is that of the other transcript, if it is a ceremony of its own.
	Definition []byte `json:"definition,omitempty"`
}

// importResult is the result of StepImport.
type importResult struct {
	Bundle string `json:"bundleSHA256"`
}

// exchangeFacts is what the records say of the exchange.
type exchangeFacts struct {
	requests   map[string]*x509.CertificateRequest // by certificate
	transcript []byte                              // of the other machine
	definition []byte                              // under that transcript, if it is another
	other      *facts                              // what it says
	bundle     [sha256.Size]byte                   // hash of the bundle that came
	confirmed  bool                                // people compared its words
	done       bool
}

func (d *Definition) importStep() Step {
	return Step{
		ID: string(StepImport), Kind: StepImport,
		Title: fmt.Sprintf("Take in the bundle of the %s machine.", d.side().other()),
		Why:   "Nothing on a USB stick is believed: its words are compared, and its transcript is verified from the first record.",
		Details: append([]string{
			"export: chancery-ceremony export OUTPUTS FILE; then carry both ways: chancery-ceremony import OUTPUTS FILE",
			"the words of the bundle are read aloud from the other machine's screen",
		}, d.importDetails()...),
	}
}

// openKey opens a key that the ceremony made in a token of this machine.
func (r *run) openKey(ctx context.Context, name string) (hsm.Key, error) {
	tok, err := r.token(ctx, r.def.Keys[name].Token)
	if err != nil {
		return nil, err
	}
	ctx, cancel := device(ctx)
	defer cancel()
	fact := r.facts.keys[name]
	key, err := tok.Open(ctx, hsm.Ref{URI: fact.evidence.URI, SPKI: fact.spki}, r.def.uses[name].role)
	if err != nil {
		return nil, fmt.Errorf("open key %s: %w", name, err)
	}
	return key, nil
}

// takeBundle takes in the bundle: it is read, checked and on record before people
// compare its words.
func (r *run) takeBundle(ctx context.Context, s Step) error {
	if r.facts.exchange.other == nil {
		if err := r.readBundle(s); err != nil {
			return err
		}
	} else if err := r.sameBundle(); err != nil {
		return err
	}
	if err := r.confirmBundle(ctx, s); err != nil {
		return err
	}
	return r.record(s, Done, importResult{Bundle: hex.EncodeToString(r.facts.exchange.bundle[:])})
}

// readBundle reads the bundle and records its content.
func (r *run) readBundle(s Step) error {
	b, err := r.bundleFile()
	if err != nil {
		return err
	}
	hash := b.Hash()
	intent := importIntent{
		Bundle: hex.EncodeToString(hash[:]), Head: hex.EncodeToString(b.Head[:]), Transcript: b.File(TranscriptName),
	}
	now, err := r.now()
	switch {
	case err != nil:
		return err
	case r.def.apart():
		intent.Definition = b.File(definitionName)
	case !bytes.Equal(b.File(definitionName), r.def.source):
		return fmt.Errorf("import: %w: the bundle is of another definition", ErrDefinition)
	}
	// As a verifier will: before it is on record, not after. The record is a
	// little later than now.
	if _, err := r.facts.replayOther(intent, r.facts.head, now.Add(maxAnnounce)); err != nil {
		return fmt.Errorf("import: %w", err)
	}
	return r.record(s, Intent, intent)
}

// expect is what this side knows of the bundle that should come. The online one
// knows which request must have been answered.
func (d *Definition) expect(request [sha256.Size]byte) bundle.Expect {
	if d.side() == Online {
		return bundle.Expect{Ceremony: d.exchangeID(), Kind: bundle.Response, InReplyTo: request, Names: d.responseNames()}
	}
	return bundle.Expect{Ceremony: d.exchangeID(), Kind: bundle.Request, Names: d.requestNames()}
}

// exchangeID is the ceremony that the bundles of both directions name: the one
// that asks.
func (d *Definition) exchangeID() string {
	if d.Request != nil {
		return d.Request.Ceremony
	}
	return d.ID
}

// bundleFile reads the bundle of the other machine.
func (r *run) bundleFile() (*bundle.Bundle, error) {
	var asked [sha256.Size]byte
	if r.def.side() == Online {
		request, err := makeBundle(r.facts, r.transcript.Records())
		if err != nil {
			return nil, err
		}
		asked = request.Hash()
	}
	if r.opts.Bundle == "" {
		return nil, fmt.Errorf("from the %s machine: %w", r.def.side().other(), ErrBundle)
	}
	return bundle.ReadFile(r.opts.Bundle, r.def.expect(asked))
}

// sameBundle refuses another bundle than the one on record.
func (r *run) sameBundle() error {
	if r.opts.Bundle == "" {
		return nil
	}
	b, err := bundle.ReadFile(r.opts.Bundle, r.def.expect(r.facts.exchange.other.exchange.bundle))
	if err != nil {
		return err
	}
	if b.Hash() != r.facts.exchange.bundle {
		return fmt.Errorf("import: another bundle was taken in before: %w", bundle.ErrOther)
	}
	return nil
}

// confirmBundle has the words compared.
func (r *run) confirmBundle(ctx context.Context, s Step) error {
	who := r.def.confirmer(r.facts.present)
	x := r.facts.exchange
	if who == "" || x.confirmed {
		return nil
	}
	c := newChallenge(s.ID, x.bundle)
	_, err := r.ask(ctx, Question{
		ID: s.ID, Person: who, Confirmation: true,
		Title:  fmt.Sprintf("What the %s machine did becomes part of this ceremony.", r.def.side().other()),
		Why:    "The bundle's words come from the other machine, aloud or on paper; one that was changed on the way has others, and this screen does not tell them.",
		Facts:  x.shown(),
		Prompt: r.def.person(who).label() + ": " + c.prompt() + " of the bundle, as they were read aloud",
		Check:  c.check, Practice: c.answer(),
	})
	if err != nil {
		return err
	}
	return r.state(s, who, confirmData{Words: c.answer()})
}

// shown is what people see of the bundle before they accept it: all but its
// words, which have to come from the other machine.
func (x *exchangeFacts) shown() []Fact {
	other := x.other
	facts := hashFact("last record", other.head)
	if len(x.definition) > 0 {
		facts = append(facts, Fact{"ceremony", fmt.Sprintf("%s, %s, begun %s", other.def.ID, other.def.Kind, other.openedAt.Format(time.RFC3339))})
		facts = append(facts, hashFact("definition", other.def.Hash())...)
	}
	for _, name := range sorted(other.exchange.requests) {
		csr, key := other.exchange.requests[name], other.keys[other.def.Certificates[name].Key]
		facts = append(facts,
			Fact{"request", fmt.Sprintf("%s: %s, SPKI SHA-256 %x", name, csr.Subject, sha256.Sum256(csr.RawSubjectPublicKeyInfo))},
			Fact{"made in", key.origin()})
	}
	if other.def.side() == Offline {
		for _, name := range other.def.requests() {
			c := other.certs[name]
			facts = append(facts, Fact{"certificate", fmt.Sprintf("%s: %s, serial %x, until %s, SHA-256 %x",
				name, c.Subject, c.SerialNumber, c.NotAfter.Format(time.RFC3339), sha256.Sum256(c.Raw))})
		}
	}
	return facts
}

// origin says in which device a key was made, and how far that is shown.
func (k keyFact) origin() string {
	t := k.evidence.Token
	text := fmt.Sprintf("%s %s %s, evidence %s", t.Manufacturer, t.Model, t.Serial, k.evidence.Level)
	if k.evidence.Attestation != nil {
		text += ", attested"
	}
	return text
}

func (f *facts) takeImport(rec *Record, s Step) error {
	x := &f.exchange
	switch rec.Type {
	case Intent:
		var d importIntent
		if err := rec.decode(&d); err != nil {
			return err
		}
		if x.other != nil {
			return bad(rec, "a bundle was taken in before")
		}
		other, err := f.replayOther(d, rec.previous(), rec.Time)
		if err != nil {
			return bad(rec, "%w", err)
		}
		hash, err := hsm.ParseSPKIHash(d.Bundle)
		if err != nil {
			return bad(rec, "hash of the bundle: %w", err)
		}
		x.other, x.bundle, x.transcript, x.definition = other, hash, d.Transcript, d.Definition
		return nil
	case Statement:
		var d confirmData
		if err := rec.decode(&d); err != nil {
			return err
		}
		if x.other == nil || x.confirmed || rec.Actor != f.def.confirmer(f.present) ||
			d.Words != newChallenge(s.ID, x.bundle).answer() {
			return bad(rec, "%.40q was not asked, or has other words", rec.Actor)
		}
		x.confirmed = true
		return nil
	}
	var d importResult
	if err := rec.result(&d); err != nil {
		return err
	}
	if x.other == nil || d.Bundle != hex.EncodeToString(x.bundle[:]) || !x.confirmed && f.def.confirmer(f.present) != "" {
		return bad(rec, "no bundle was taken in, or nobody compared its words")
	}
	if err := f.merge(x.other); err != nil {
		return bad(rec, "%w", err)
	}
	x.done = true
	return nil
}

// replayOther verifies the transcript of the other machine from its first
// record to its last, exactly as its own verifier does, and that the bundle is
// the one that follows from it. head is that of this machine's transcript when
// it was exported: a response must have been made for it. at is when it is on
// record, or later.
func (f *facts) replayOther(d importIntent, head [sha256.Size]byte, at time.Time) (*facts, error) {
	records, err := ReadTranscript(bytes.NewReader(d.Transcript))
	if err != nil {
		return nil, err
	}
	def, err := f.def.otherDefinition(d.Definition, records)
	if err != nil {
		return nil, err
	}
	steps, err := Plan(def)
	if err != nil {
		return nil, err
	}
	other := newFacts(def, steps)
	if err := other.replay(records); err != nil {
		return nil, fmt.Errorf("the %s machine: %w", def.side(), err)
	}
	if f.def.side() == Online && (other.exchange.other == nil || other.exchange.other.head != head) {
		return nil, fmt.Errorf("%w: the response is to another request", bundle.ErrOther)
	}
	b, err := makeBundle(other, records)
	if err != nil {
		return nil, err
	}
	if hash := b.Hash(); hex.EncodeToString(hash[:]) != d.Bundle || hex.EncodeToString(other.head[:]) != d.Head {
		return nil, fmt.Errorf("%w: the files are not those that follow from its transcript", bundle.ErrContent)
	}
	if f.def.apart() {
		return other, f.checkOtherCeremony(other, at)
	}
	return other, nil
}

// merge takes over what the other machine made. The keys of the two are
// different.
func (f *facts) merge(other *facts) error {
	for name, k := range other.keys {
		for mine, have := range f.keys {
			if have.spki == k.spki && mine != name {
				return fmt.Errorf("keys %s and %s have one public key", mine, name)
			}
		}
	}
	if f.def.apart() {
		f.takeFromApart(other)
		return nil
	}
	for name, k := range other.keys {
		if f.def.machineOf(Step{Kind: StepKey, Name: name}) != f.def.machine {
			f.keys[name] = k
		}
	}
	for name, inv := range other.inventory {
		if !f.def.isHere(name) {
			f.inventory[name] = inv
		}
	}
	if f.def.machine == Online {
		maps.Copy(f.certs, other.certs)
		f.takeOver(other)
	}
	return nil
}

// requestNames are the files of a bundle from the online machine, in order.
func (d *Definition) requestNames() []string {
	names := []string{definitionName, TranscriptName}
	for _, name := range d.requests() {
		names = append(names, name+requestSuffix)
	}
	for _, name := range sorted(d.Keys) {
		names = append(names, name+evidenceSuffix)
	}
	return names
}

// responseNames are the files of a bundle from the offline machine, in order.
func (d *Definition) responseNames() []string {
	names := []string{definitionName, TranscriptName, CheckpointName}
	for _, p := range d.exchangeWitnesses() {
		names = append(names, SignatureName(p.ID))
	}
	for _, name := range sorted(d.Certificates) {
		names = append(names, name+issuedSuffix)
	}
	return names
}

// exchangeWitnesses are those whose signatures are files of the response. Of a
// ceremony of its own the other side does not know them; their signatures are
// in its transcript.
func (d *Definition) exchangeWitnesses() []Person {
	if d.apart() {
		return nil
	}
	return d.witnesses()
}

// makeBundle makes the bundle for the other machine. It is a pure function of
// the definition and the records: the online machine's before it imports, the
// offline machine's when its ceremony is complete.
func makeBundle(f *facts, records []Record) (*bundle.Bundle, error) {
	transcript, err := transcriptFile(records)
	if err != nil {
		return nil, err
	}
	h := bundle.Header{Ceremony: f.def.exchangeID(), Kind: bundle.Request, Head: f.head}
	files := []bundle.File{{Name: definitionName, Content: f.def.source}, {Name: TranscriptName, Content: transcript.content}}
	switch {
	case f.def.side() == Online && f.waitsForImport():
		more, err := f.requestFiles()
		if err != nil {
			return nil, err
		}
		files = append(files, more...)
	case f.def.side() == Offline && f.status == Complete:
		h.Kind, h.InReplyTo = bundle.Response, f.exchange.bundle
		files = append(files, f.responseFiles()...)
	default:
		return nil, fmt.Errorf("the %s machine is not ready, or is done: %w", f.def.side(), ErrNothingToExport)
	}
	return bundle.New(h, files)
}

// waitsForImport says whether the import is next and has not begun.
func (f *facts) waitsForImport() bool {
	return f.next < len(f.plan) && f.plan[f.next].Kind == StepImport && f.exchange.other == nil
}

func (f *facts) requestFiles() ([]bundle.File, error) {
	var files []bundle.File
	for _, name := range f.def.requests() {
		files = append(files, bundle.File{Name: name + requestSuffix, Content: requestPEM(f.exchange.requests[name])})
	}
	for _, name := range sorted(f.keys) {
		content, err := evidenceJSON(f.keys[name].evidence)
		if err != nil {
			return nil, err
		}
		files = append(files, bundle.File{Name: name + evidenceSuffix, Content: content})
	}
	return files, nil
}

func (f *facts) responseFiles() []bundle.File {
	files := []bundle.File{{Name: CheckpointName, Content: f.checkpointFile().content}}
	for _, p := range f.def.exchangeWitnesses() {
		if a := f.answers[p.ID]; a.Signature != "" {
			files = append(files, bundle.File{Name: SignatureName(p.ID), Content: []byte(a.Signature)})
		}
	}
	for _, name := range sorted(f.def.Certificates) {
		files = append(files, bundle.File{Name: name + issuedSuffix, Content: certificatePEM(f.certs[name])})
	}
	return files
}

// exchangeFiles are the outputs of the exchange: the other machine's transcript
// and, if that is a ceremony of its own, its definition and the request.
func (f *facts) exchangeFiles() []File {
	if !f.exchange.done {
		return nil
	}
	side := f.def.side().other()
	files := []File{newFile(OtherTranscriptName(side), f.exchange.transcript)}
	if !f.def.apart() {
		return files
	}
	files = append(files, newFile(OtherDefinitionName(side), f.exchange.definition))
	requests := f.exchange.requests
	if f.def.madeElsewhere() {
		requests = f.exchange.other.exchange.requests
	}
	for _, name := range sorted(requests) {
		files = append(files, newFile(requestFolder+name+requestSuffix, requestPEM(requests[name])))
	}
	return files
}

// OtherTranscriptName is the file with the transcript that came from m.
func OtherTranscriptName(m Machine) string { return "transcript." + string(m) + ".jsonl" }

// OtherDefinitionName is the file with the definition that came from m, where
// the two machines perform two ceremonies.
func OtherDefinitionName(m Machine) string { return "definition." + string(m) + ".yaml" }

// Export writes the bundle for the other machine to path, which must not exist,
// from the output folder dir of the ceremony. It writes no record, so it can be
// repeated, and gives the same octets each time. The words of the bundle, which
// are read aloud, are returned with it.
//
// The online machine exports when it waits for certificates (also again after
// it has imported them), the offline one when its ceremony is complete. Errors:
// ErrNothingToExport, ErrTranscript, fs.ErrExist.
func Export(dir, path string) (*bundle.Bundle, error) {
	def, records, err := openFolder(dir)
	if err != nil {
		return nil, fmt.Errorf("export: %w", err)
	}
	if def.side() == Online {
		for i, rec := range records {
			if rec.Step == string(StepImport) {
				records = records[:i]
				break
			}
		}
	}
	steps, err := Plan(def)
	if err != nil {
		return nil, fmt.Errorf("export: %w", err)
	}
	f := newFacts(def, steps)
	if err := f.replay(records); err != nil {
		return nil, fmt.Errorf("export: %w", err)
	}
	b, err := makeBundle(f, records)
	if err != nil {
		return nil, fmt.Errorf("export: %w", err)
	}
	return b, b.WriteFile(path)
}

// takeOver makes the online machine's outputs those of the offline one: what is
// valid begins when the offline ceremony did, and the custodians signed there.
func (f *facts) takeOver(other *facts) {
	f.since, f.crl = other.since, other.crl
	repository := f.tuf.repository
	f.tuf = other.tuf
	f.tuf.repository = repository
}

// offlineRepository is the TUF repository as the custodians signed it; the
// online key has its turn on the online machine.
func (f *facts) offlineRepository() (*tuf.Repository, error) {
	signed, err := f.custodianFiles()
	if err != nil {
		return nil, err
	}
	return signed.assemble(nil, nil)
}
