package ceremony

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/chancery-ca/chancery/ca/profile"
	"github.com/chancery-ca/chancery/ceremony/bundle"
	"github.com/chancery-ca/chancery/hsm"
)

// An intermediate whose key is made online and whose root is kept elsewhere is
// two ceremonies, on two days, of two definitions:
//
//	intermediate-csr    previous, tokens, key, request | import, custodians, outputs
//	sign-intermediate   previous, tokens | import, certificate, outputs
//
// Only bundles go between them, at the bars: the request and the transcript
// under it go to the root, the certificate and the transcript under that come
// back. The definition of the second names the last record of the first, so
// that what people agreed to is this request and no other; the first knows the
// second by the root's signature, by its own key, and by its own last record in
// the other's transcript.

// Request names the request that a sign-intermediate answers.
type Request struct {
	// Ceremony is the id of the intermediate-csr.
	Ceremony string `yaml:"ceremony"`
	// Head is the hash of its last record when it was exported, hexadecimal.
	Head string `yaml:"head"`
	// AcceptSoftware lets a production ceremony certify a key that was made in a
	// token known to be software. Everyone reads it aloud.
	AcceptSoftware bool `yaml:"accept-software"`
}

// peerKinds are the kinds that are each other's other side.
var peerKinds = map[Kind]Kind{IntermediateCSR: SignIntermediate, SignIntermediate: IntermediateCSR}

// apart says whether the other side of the exchange is a ceremony of its own.
func (d *Definition) apart() bool { return peerKinds[d.Kind] != "" }

// checkApart wants one new intermediate of the root of before, with one key,
// and of a sign-intermediate nothing but that. Lists, logs and timestamps have
// kinds of their own.
func (d *Definition) checkApart(f *faults) {
	signs := d.Kind == SignIntermediate
	if signs != (d.Request != nil) {
		f.add("request: the kind %s answers one, no other does", SignIntermediate)
	}
	if !d.apart() {
		return
	}
	if d.TwoMachines() {
		f.add("tokens: machine: the kind %s happens on one machine", d.Kind)
	}
	if len(d.Certificates) != 1 || len(d.Keys) != 1 || !d.hasOwn(profile.Intermediate) {
		f.add("certificates: the kind %s has one intermediate with one key", d.Kind)
	}
	for _, name := range sorted(d.Certificates) {
		if issuer := d.Certificates[name].Issuer; issuer != previousRoot {
			f.add("certificates: %.40s: issuer: %.40q, want %s", name, issuer, previousRoot)
		}
	}
	if d.CRL != nil || len(d.Drills) > 0 {
		f.add("crl, drills: the kind %s has none", d.Kind)
	}
	if signs {
		d.checkRequest(f)
	}
}

func (d *Definition) checkRequest(f *faults) {
	if r := d.Request; r != nil {
		if !idPattern.MatchString(r.Ceremony) || r.Ceremony == d.ID {
			f.add("request: ceremony %.80q", r.Ceremony)
		}
		if _, err := hsm.ParseSPKIHash(r.Head); err != nil || r.Head != strings.ToLower(r.Head) {
			f.add("request: head %.80q: want 64 hexadecimal digits in lower case", r.Head)
		}
	}
	for _, name := range sorted(d.Keys) {
		if k := d.Keys[name]; k.Token != "" || k.Protection != "" || k.Backup != nil {
			f.add("keys: %s: the key is made elsewhere: alg is all that is said of it here", name)
		}
	}
	if d.TUF != nil {
		f.add("tuf: custodians sign in the %s, after its import", IntermediateCSR)
	}
}

// madeElsewhere says whether the definition's keys are the other side's.
func (d *Definition) madeElsewhere() bool { return d.Kind == SignIntermediate }

// planIntermediateCSR makes a key and its request, waits for the certificate,
// and makes it the one in use.
func planIntermediateCSR(d *Definition) ([]Step, error) {
	steps := append([]Step{previousStep(d.Previous)}, d.tokenSteps()...)
	for _, name := range d.keyOrder() {
		steps = append(steps, d.keyStep(name))
	}
	steps = append(steps, d.backupSteps()...)
	steps = append(append(steps, d.requestSteps()...), d.importStep())
	custody, err := d.custodySteps()
	if err != nil {
		return nil, err
	}
	return append(append(steps, custody...), outputsStep()), nil
}

// planSignIntermediate has the root answer a request.
func planSignIntermediate(d *Definition) ([]Step, error) {
	steps := append([]Step{previousStep(d.Previous)}, d.tokenSteps()...)
	steps = append(steps, d.importStep())
	for _, name := range d.certificateOrder() {
		steps = append(steps, d.certificateStep(name))
	}
	return append(steps, outputsStep()), nil
}

// importDetails is what people at the root know beforehand of what will come.
func (d *Definition) importDetails() []string {
	if d.side() != Offline {
		return nil
	}
	var details []string
	if r := d.Request; r != nil {
		details = append(details, "request of ceremony "+r.Ceremony, "its last record: "+r.Head)
		if r.AcceptSoftware {
			details = append(details, "WARNING: the key may be in software")
		}
	}
	for _, name := range d.requests() {
		c := d.Certificates[name]
		details = append(details, fmt.Sprintf("%s: %s, key %s (%s); nothing else may be asked for",
			name, d.subject(c.Subject), c.Key, d.Keys[c.Key].Algorithm))
	}
	return details
}

// otherDefinition is the definition of the other side: the same, of two
// machines, or else the one that came with its transcript.
func (d *Definition) otherDefinition(source []byte, records []Record) (*Definition, error) {
	if !d.apart() {
		if len(source) > 0 {
			return nil, fmt.Errorf("%w: both machines have one", ErrDefinition)
		}
		return d.On(d.side().other())
	}
	other, err := ParseDefinition(source)
	if err != nil {
		return nil, fmt.Errorf("of the other ceremony: %w", err)
	}
	if other, err = environmentOf(other, records); err != nil {
		return nil, fmt.Errorf("of the other ceremony: %w", err)
	}
	return other, d.checkPeer(other)
}

// checkPeer wants the definition of the other side to name the same exchange,
// the same certificate and the same kind of key.
func (d *Definition) checkPeer(other *Definition) error {
	switch {
	case other.Kind != peerKinds[d.Kind] || other.exchangeID() != d.exchangeID():
		return fmt.Errorf("%w: %s of %s, want %s of %s", bundle.ErrOther, other.Kind, other.exchangeID(), peerKinds[d.Kind], d.exchangeID())
	case other.Environment != d.Environment:
		return fmt.Errorf("it was a %s: %w", other.Environment, ErrEnvironment)
	case !reflect.DeepEqual(other.Certificates, d.Certificates):
		return fmt.Errorf("the two ceremonies' certificates differ: %w", ErrDefinition)
	}
	for name, k := range d.Keys {
		if other.Keys[name].Algorithm != k.Algorithm {
			return fmt.Errorf("the two ceremonies' keys differ: %w", ErrDefinition)
		}
	}
	return nil
}

// checkOtherCeremony wants what the other ceremony's records say to fit these: one
// root, the request that the definition names, a key that no certificate has
// yet, and an exchange that is not over.
func (f *facts) checkOtherCeremony(other *facts, at time.Time) error {
	if !bytes.Equal(f.before.root.Raw, other.before.root.Raw) {
		return fmt.Errorf("%w: its root is another: %x, here %x", ErrPrevious,
			sha256.Sum256(other.before.root.RawSubjectPublicKeyInfo), sha256.Sum256(f.before.root.RawSubjectPublicKeyInfo))
	}
	if f.def.Kind == IntermediateCSR {
		return nil
	}
	if hex.EncodeToString(other.head[:]) != f.def.Request.Head {
		return fmt.Errorf("%w: its last record is %x", bundle.ErrOther, other.head)
	}
	if end := other.def.Window.NotAfter; !end.IsZero() && at.After(end) {
		return fmt.Errorf("nobody could import the certificate after %s: %w", end.UTC().Format(time.RFC3339), ErrWindow)
	}
	for name := range f.def.Keys {
		k := other.keys[name]
		if err := errors.Join(f.def.checkOrigin(k.evidence), f.before.checkNew(k.spki), other.before.checkNew(k.spki)); err != nil {
			return fmt.Errorf("key %s: %w", name, err)
		}
	}
	return nil
}

// checkOrigin wants the evidence to claim no more than a ceremony can record
// (nobody has checked a maker's certificate, and a key that was restored was not
// made), and no software in production unless the root's own definition accepts
// it: that the other one does is not enough.
func (d *Definition) checkOrigin(e hsm.Evidence) error {
	software := hsm.IsSoftware(e.Token)
	if claimed := map[bool]hsm.Level{true: hsm.LevelSoftware, false: hsm.LevelModule}[software]; e.Level != claimed {
		return fmt.Errorf("evidence level %.20q of a %.40q, want %s: %w", e.Level, e.Token.Model, claimed, hsm.ErrPolicy)
	}
	if software && d.Environment == Production && !d.Request.AcceptSoftware {
		return fmt.Errorf("it was made in software (%.40q): %w", e.Token.Model, ErrEnvironment)
	}
	return nil
}

// errUsedKey: a key has a use already.
var errUsedKey = fmt.Errorf("the public key has been used before: %w", hsm.ErrExists)

// checkNew refuses a public key that the ceremony before knows: of a role, of a
// certificate, or of a log, in use or not any more.
func (p *previousFacts) checkNew(spki [sha256.Size]byte) error {
	used := map[[sha256.Size]byte]bool{}
	for _, k := range p.ring.Keys {
		used[k.SPKI] = true
	}
	for _, a := range slices.Concat(p.trusted.CertificateAuthorities, p.trusted.TimestampAuthorities) {
		for _, c := range a.Chain {
			used[sha256.Sum256(c.RawSubjectPublicKeyInfo)] = true
		}
	}
	for _, l := range slices.Concat(p.trusted.Logs, p.trusted.CTLogs) {
		id, err := l.ID()
		if err != nil {
			return err
		}
		used[id] = true
	}
	if used[spki] {
		return errUsedKey
	}
	return nil
}

// takeFromApart takes over what the other ceremony made: the key that is to be
// certified, or the certificate.
func (f *facts) takeFromApart(other *facts) {
	if f.def.Kind == SignIntermediate {
		for name := range f.def.Keys {
			f.keys[name] = other.keys[name]
		}
		return
	}
	for name := range f.def.Certificates {
		f.certs[name] = other.certs[name]
	}
}

// signedFiles are the outputs of a sign-intermediate: what it signed and what it
// saw. They are no folder to serve, and no ceremony continues it: that is the
// intermediate-csr.
func (f *facts) signedFiles() ([]File, error) {
	inter := f.current(profile.Intermediate)
	if inter == nil {
		return nil, fmt.Errorf("%w: a certificate is missing", ErrTranscript)
	}
	root := f.current(profile.Root)
	evidence, err := f.evidenceFiles()
	return append([]File{
		newFile(rootName, certificatePEM(root)), newFile(intermediateName, certificatePEM(inter)),
		newFile(chainName, certificatePEM(inter, root)),
	}, evidence...), err
}

// notRevoked refuses a root that is on the list.
func notRevoked(root *x509.Certificate, list *x509.RevocationList) error {
	if list == nil {
		return nil
	}
	for _, e := range list.RevokedCertificateEntries {
		if e.SerialNumber.Cmp(root.SerialNumber) == 0 {
			return fmt.Errorf("the root is revoked since %s", e.RevocationTime.UTC().Format(time.RFC3339))
		}
	}
	return nil
}
