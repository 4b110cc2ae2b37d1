package ceremony

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"

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

// The kinds of steps of the exchange.
const (
	// StepRequest makes a certificate request, which proves that this machine
	// has the key.
	StepRequest StepKind = "request"
	// StepImport takes in what the other machine did.
	StepImport StepKind = "import"
)

// The files of a bundle besides the requests, evidence and certificates.
const (
	requestSuffix  = ".csr"
	evidenceSuffix = ".evidence.json"
	issuedSuffix   = ".pem"
)

// requestData is the result of StepRequest: a PKCS #10 request (RFC 2986), DER.
type requestData struct {
	Request []byte `json:"request"`
	SHA256  string `json:"sha256"`
}

// importIntent is the intent of StepImport: what was read, before anybody is
// asked. Nothing is read again after the words.
type importIntent struct {
	Bundle     string `json:"bundleSHA256"` // of the manifest, which covers all
	Head       string `json:"head"`         // of the other transcript
	Transcript []byte `json:"transcript"`
}

// importResult is the result of StepImport.
type importResult struct {
	Bundle string `json:"bundleSHA256"`
}

// exchangeFacts is what the records say of the exchange.
type exchangeFacts struct {
	requests   map[string]*x509.CertificateRequest // by certificate
	transcript []byte                              // of the other machine
	other      *facts                              // what it says
	bundle     [sha256.Size]byte                   // hash of the bundle that came
	confirmed  bool                                // people compared its words
	done       bool
}

func (d *Definition) requestSteps() []Step {
	var steps []Step
	if d.machine != Online {
		return nil
	}
	for _, name := range d.requests() {
		c := d.Certificates[name]
		steps = append(steps, named(StepRequest, name, "The signature under the request proves that this token has the private key.",
			"Make the certificate request %s with key %s: %q.", name, c.Key, d.CommonName(c.Subject)))
	}
	return steps
}

func (d *Definition) importStep() Step {
	return Step{
		ID: string(StepImport), Kind: StepImport,
		Title: fmt.Sprintf("Take in the bundle of the %s machine.", d.machine.other()),
		Why:   "Nothing on a USB stick is believed: its words are compared, and its transcript is verified from the first record.",
		Details: []string{
			"export: chancery-ceremony export OUTPUTS FILE; then carry both ways: chancery-ceremony import OUTPUTS FILE",
			"the words of the bundle are read aloud from the other machine's screen",
		},
	}
}

// request makes a certificate request.
func (r *run) request(ctx context.Context, s Step) error {
	c := r.def.Certificates[s.Name]
	key, err := r.openKey(ctx, c.Key)
	if err != nil {
		return err
	}
	ctx, cancel := device(ctx)
	defer cancel()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: r.def.subject(c.Subject)}, contextSigner{ctx, key})
	if err != nil {
		return fmt.Errorf("sign request: %w", err)
	}
	sum := sha256.Sum256(der)
	return r.record(s, Done, requestData{Request: der, SHA256: hex.EncodeToString(sum[:])})
}

// contextSigner is a key for one call of the standard library.
type contextSigner struct {
	ctx context.Context
	hsm.Key
}

func (s contextSigner) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return s.SignContext(s.ctx, digest, opts)
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

func (f *facts) takeRequest(rec *Record, s Step) error {
	var d requestData
	if err := rec.result(&d); err != nil {
		return err
	}
	csr, err := x509.ParseCertificateRequest(d.Request)
	if err != nil {
		return bad(rec, "%w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return bad(rec, "proof of possession: %w", err)
	}
	c := f.def.Certificates[s.Name]
	if sum := sha256.Sum256(csr.RawSubjectPublicKeyInfo); sum != f.keys[c.Key].spki {
		return bad(rec, "the request is for another key than %s", c.Key)
	}
	if got, want := csr.Subject.String(), f.def.subject(c.Subject).String(); got != want || len(csr.Extensions) > 0 {
		return bad(rec, "the request is for %.200q with %d extensions, the definition wants %q", got, len(csr.Extensions), want)
	}
	if sum := sha256.Sum256(d.Request); hex.EncodeToString(sum[:]) != d.SHA256 {
		return bad(rec, "hash differs")
	}
	if f.exchange.requests == nil {
		f.exchange.requests = map[string]*x509.CertificateRequest{}
	}
	f.exchange.requests[s.Name] = csr
	return nil
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
	if !bytes.Equal(b.File(definitionName), r.def.source) {
		return fmt.Errorf("import: %w: the bundle is of another definition", ErrDefinition)
	}
	// As a verifier will: before it is on record, not after.
	if _, err := r.facts.replayOther(intent, r.facts.head); err != nil {
		return fmt.Errorf("import: %w", err)
	}
	return r.record(s, Intent, intent)
}

// bundleFile reads the bundle of the other machine. The online one knows which
// request must have been answered.
func (r *run) bundleFile() (*bundle.Bundle, error) {
	want := bundle.Expect{Ceremony: r.def.ID, Kind: bundle.Request, Names: r.def.requestNames()}
	if r.def.machine == Online {
		request, err := makeBundle(r.facts, r.transcript.Records())
		if err != nil {
			return nil, err
		}
		want.Kind, want.InReplyTo, want.Names = bundle.Response, request.Hash(), r.def.responseNames()
	}
	if r.opts.Bundle == "" {
		return nil, fmt.Errorf("from the %s machine: %w", r.def.machine.other(), ErrBundle)
	}
	return bundle.ReadFile(r.opts.Bundle, want)
}

// sameBundle refuses another bundle than the one on record.
func (r *run) sameBundle() error {
	if r.opts.Bundle == "" {
		return nil
	}
	want := bundle.Expect{Ceremony: r.def.ID, Kind: bundle.Request, Names: r.def.requestNames()}
	if r.def.machine == Online {
		want.Kind, want.InReplyTo, want.Names = bundle.Response, r.facts.exchange.other.exchange.bundle, r.def.responseNames()
	}
	b, err := bundle.ReadFile(r.opts.Bundle, want)
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
	facts := append(hashFact("bundle", x.bundle), hashFact("its last record", x.other.head)...)
	for _, name := range sorted(x.other.exchange.requests) {
		facts = append(facts, Fact{"request " + name, fmt.Sprintf("%s, SPKI SHA-256 %x", x.other.exchange.requests[name].Subject,
			sha256.Sum256(x.other.exchange.requests[name].RawSubjectPublicKeyInfo))})
	}
	_, err := r.ask(ctx, Question{
		ID: s.ID, Person: who, Confirmation: true,
		Title:  fmt.Sprintf("What the %s machine did becomes part of this ceremony.", r.def.machine.other()),
		Why:    "Somebody reads the words from the other machine's screen; a bundle that was changed on the way has others.",
		Facts:  facts,
		Prompt: r.def.person(who).label() + ": " + c.prompt() + " of the bundle, as they were read aloud",
		Check:  c.check, Practice: c.answer(),
	})
	if err != nil {
		return err
	}
	return r.state(s, who, confirmData{Words: c.answer()})
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
		other, err := f.replayOther(d, rec.previous())
		if err != nil {
			return bad(rec, "%w", err)
		}
		hash, err := hsm.ParseSPKIHash(d.Bundle)
		if err != nil {
			return bad(rec, "hash of the bundle: %w", err)
		}
		x.other, x.bundle, x.transcript = other, hash, d.Transcript
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
// it was exported: a response must have been made for it.
func (f *facts) replayOther(d importIntent, head [sha256.Size]byte) (*facts, error) {
	records, err := ReadTranscript(bytes.NewReader(d.Transcript))
	if err != nil {
		return nil, err
	}
	def, err := f.def.On(f.def.machine.other())
	if err != nil {
		return nil, err
	}
	steps, err := Plan(def)
	if err != nil {
		return nil, err
	}
	other := newFacts(def, steps)
	if err := other.replay(records); err != nil {
		return nil, fmt.Errorf("the %s machine: %w", def.machine, err)
	}
	if f.def.machine == Online && (other.exchange.other == nil || other.exchange.other.head != head) {
		return nil, fmt.Errorf("%w: the response is to another request", bundle.ErrOther)
	}
	b, err := makeBundle(other, records)
	if err != nil {
		return nil, err
	}
	if hash := b.Hash(); hex.EncodeToString(hash[:]) != d.Bundle || hex.EncodeToString(other.head[:]) != d.Head {
		return nil, fmt.Errorf("%w: the files are not those that follow from its transcript", bundle.ErrContent)
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
	for _, p := range d.witnesses() {
		names = append(names, SignatureName(p.ID))
	}
	for _, name := range sorted(d.Certificates) {
		names = append(names, name+issuedSuffix)
	}
	return names
}

// makeBundle makes the bundle for the other machine. It is a pure function of
// the definition and the records: the online machine's before it imports, the
// offline machine's when its ceremony is complete.
func makeBundle(f *facts, records []Record) (*bundle.Bundle, error) {
	transcript, err := transcriptFile(records)
	if err != nil {
		return nil, err
	}
	h := bundle.Header{Ceremony: f.def.ID, Kind: bundle.Request, Head: f.head}
	files := []bundle.File{{Name: definitionName, Content: f.def.source}, {Name: TranscriptName, Content: transcript.content}}
	switch {
	case f.def.machine == Online && f.waitsForImport():
		more, err := f.requestFiles()
		if err != nil {
			return nil, err
		}
		files = append(files, more...)
	case f.def.machine == Offline && f.status == Complete:
		h.Kind, h.InReplyTo = bundle.Response, f.exchange.bundle
		files = append(files, f.responseFiles()...)
	default:
		return nil, fmt.Errorf("the %s machine is not ready, or is done: %w", f.def.machine, ErrNothingToExport)
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
		files = append(files, bundle.File{Name: name + requestSuffix, Content: pem.EncodeToMemory(
			&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: f.exchange.requests[name].Raw})})
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
	for _, p := range f.def.witnesses() {
		if a := f.answers[p.ID]; a.Signature != "" {
			files = append(files, bundle.File{Name: SignatureName(p.ID), Content: []byte(a.Signature)})
		}
	}
	for _, name := range sorted(f.def.Certificates) {
		files = append(files, bundle.File{Name: name + issuedSuffix, Content: certificatePEM(f.certs[name])})
	}
	return files
}

// exchangeFiles are the outputs of the exchange: the other machine's transcript.
func (f *facts) exchangeFiles() []File {
	if !f.exchange.done {
		return nil
	}
	return []File{newFile(OtherTranscriptName(f.def.machine.other()), f.exchange.transcript)}
}

// OtherTranscriptName is the file with the transcript that came from m.
func OtherTranscriptName(m Machine) string { return "transcript." + string(m) + ".jsonl" }

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
	if def.machine == Online {
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
