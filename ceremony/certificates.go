package ceremony

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"math/big"
	"time"

	"github.com/chancery-ca/chancery/ca/profile"
	"github.com/chancery-ca/chancery/hsm"
)

// certificate issues one certificate: its TBS is linted, on disk, and seen and
// confirmed by a person before it is signed, and the signed octets are compared
// with it after.
func (r *run) certificate(ctx context.Context, s Step) error {
	intent, resumed := r.facts.tbs[s.Name]
	if !resumed {
		var err error
		if intent, err = r.announceCertificate(s); err != nil {
			return err
		}
	}
	tbs, err := r.facts.buildTBS(s.Name, intent)
	if err != nil {
		return err
	}
	if err := r.confirm(ctx, s, intent); err != nil {
		return err
	}
	der, err := r.signCertificate(ctx, s, tbs)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(der)
	if err := r.record(s, Done, certificateResult{Certificate: der, SHA256: hex.EncodeToString(sum[:])}); err != nil {
		return err
	}
	return r.show(ctx, "Certificate "+s.Name+" is signed.", hashFact("fingerprint", sum)...)
}

// announceCertificate writes what will be signed.
func (r *run) announceCertificate(s Step) (certificateIntent, error) {
	intent, err := r.newCertificateIntent(s.Name)
	if err != nil {
		return intent, err
	}
	tbs, err := r.facts.buildTBS(s.Name, intent)
	if err != nil {
		return intent, err
	}
	intent.TBS = tbs.Raw()
	sum := sha256.Sum256(intent.TBS)
	intent.TBSSHA256 = hex.EncodeToString(sum[:])
	return intent, r.record(s, Intent, intent)
}

// confirm shows what will be signed to the one who answers for it, who types
// words of its hash.
func (r *run) confirm(ctx context.Context, s Step, intent certificateIntent) error {
	who := r.def.confirmer(r.facts.present)
	if who == "" || r.facts.confirmed[s.Name] {
		return nil
	}
	sum := sha256.Sum256(intent.TBS)
	c := newChallenge(s.ID, sum)
	def := r.def.Certificates[s.Name]
	issuer := def.Issuer
	if def.SelfSigned {
		issuer = "itself"
	}
	facts := []Fact{
		{"certificate", fmt.Sprintf("%s (%s)", s.Name, intent.Kind)},
		{"subject", r.def.subject(def.Subject).String()},
		{"signed by", issuer},
		{"key", fmt.Sprintf("%s, SPKI SHA-256 %x", def.Key, r.facts.keys[def.Key].spki)},
		{"serial", intent.Serial},
		{"valid", intent.NotBefore.Format(time.RFC3339) + " to " + intent.NotAfter.Format(time.RFC3339)},
	}
	_, err := r.ask(ctx, Question{
		ID: s.ID, Person: who, Confirmation: true,
		Title:  "The token signs this certificate.",
		Why:    "Once it is signed it exists for its whole life; to say no, press Ctrl-C now.",
		Facts:  append(facts, hashFact("to be signed", sum)...),
		Prompt: r.def.person(who).label() + ": " + c.prompt() + " of what will be signed",
		Check:  c.check, Practice: c.answer(),
	})
	if err != nil {
		return err
	}
	return r.state(s, who, confirmData{Words: c.answer()})
}

// signCertificate has the token sign, and compares.
func (r *run) signCertificate(ctx context.Context, s Step, tbs *profile.TBS) ([]byte, error) {
	if _, err := r.now(); err != nil { // a question can take long
		return nil, err
	}
	signer, err := r.signer(ctx, s.Name)
	if err != nil {
		return nil, err
	}
	ctx, cancel := device(ctx)
	defer cancel()
	der, err := tbs.Sign(ctx, signer)
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse signed certificate: %w", err)
	}
	if !bytes.Equal(cert.RawTBSCertificate, tbs.Raw()) {
		return nil, fmt.Errorf("signed certificate is not the announced one: %w", hsm.ErrMismatch)
	}
	if err := cert.CheckSignatureFrom(r.facts.issuerOf(s.Name, cert)); err != nil {
		return nil, fmt.Errorf("verify signed certificate: %w", err)
	}
	return der, nil
}

// newCertificateIntent decides serial number and dates. A certificate never
// outlives its issuer.
func (r *run) newCertificateIntent(name string) (certificateIntent, error) {
	def := r.def.Certificates[name]
	now, err := r.now()
	if err != nil {
		return certificateIntent{}, err
	}
	notBefore := now.UTC().Truncate(time.Second)
	notAfter := notBefore.AddDate(def.Years, 0, 0).Add(-time.Second) // the last second counts (RFC 5280, 4.1.2.5)
	if issuer := r.facts.certs[def.Issuer]; issuer != nil && notAfter.After(issuer.NotAfter) {
		notAfter = issuer.NotAfter
	}
	kind := r.def.certificateKind(name)
	serial := randomSerial()
	if kind == profile.Root {
		serial = rootSerial(r.facts.seedRecord, r.facts.seed)
	}
	return certificateIntent{Kind: kind, Serial: serial.Text(16), NotBefore: notBefore, NotAfter: notAfter}, nil
}

// randomSerial returns 20 octets, positive, with 158 random bits.
func randomSerial() *big.Int {
	b := make([]byte, 20)
	_, _ = rand.Read(b) // never fails
	b[0] = b[0]&0x7f | 0x40
	return new(big.Int).SetBytes(b)
}

// buildTBS makes the TBS that an intent describes. It is a pure function of
// the definition and the records, and lints what it makes.
func (f *facts) buildTBS(name string, intent certificateIntent) (*profile.TBS, error) {
	def := f.def.Certificates[name]
	serial, ok := new(big.Int).SetString(intent.Serial, 16)
	if !ok {
		return nil, fmt.Errorf("%w: serial %.60q", ErrTranscript, intent.Serial)
	}
	key, ok := f.keys[def.Key]
	if !ok {
		return nil, fmt.Errorf("%w: key %s was not made", ErrTranscript, def.Key)
	}
	spec := profile.AuthoritySpec{
		Kind: f.def.certificateKind(name), Subject: f.def.subject(def.Subject), Serial: serial,
		Public: key.public, NotBefore: intent.NotBefore, NotAfter: intent.NotAfter,
	}
	if def.PathLen != nil {
		spec.PathLen = *def.PathLen
	}
	tbs, err := profile.NewAuthority(spec, f.certs[def.Issuer])
	if err != nil {
		return nil, fmt.Errorf("build certificate %s: %w", name, err)
	}
	return tbs, nil
}

func (d *Definition) subject(s Subject) pkix.Name {
	n := pkix.Name{Organization: []string{s.Organization}, CommonName: d.CommonName(s)}
	if s.Country != "" {
		n.Country = []string{s.Country}
	}
	return n
}

// issuerOf returns the certificate that signs cert: its issuer, or itself.
func (f *facts) issuerOf(name string, cert *x509.Certificate) *x509.Certificate {
	if def := f.def.Certificates[name]; !def.SelfSigned {
		return f.certs[def.Issuer]
	}
	return cert
}

// signer opens the key that signs the named certificate, by its public key.
func (r *run) signer(ctx context.Context, name string) (hsm.Key, error) {
	def := r.def.Certificates[name]
	if r.def.isPrevious(def.Issuer) {
		role := map[string]hsm.Role{previousRoot: hsm.RoleRoot, previousTSARoot: hsm.RoleTSARoot}[def.Issuer]
		key, _, err := r.previousKey(ctx, role)
		return key, err
	}
	keyName := def.Key
	if !def.SelfSigned {
		keyName = r.def.Certificates[def.Issuer].Key
	}
	tok, err := r.token(ctx, r.def.Keys[keyName].Token)
	if err != nil {
		return nil, err
	}
	ctx, cancel := device(ctx)
	defer cancel()
	fact := r.facts.keys[keyName]
	key, err := tok.Open(ctx, hsm.Ref{URI: fact.evidence.URI, SPKI: fact.spki}, r.def.uses[keyName].role)
	if err != nil {
		return nil, fmt.Errorf("open key %s: %w", keyName, err)
	}
	return key, nil
}

func (f *facts) takeCertificate(rec *Record, s Step) error {
	switch rec.Type {
	case Intent:
		return f.takeCertificateIntent(rec, s.Name)
	case Statement:
		return f.takeConfirmation(rec, s)
	}
	var d certificateResult
	if err := rec.result(&d); err != nil {
		return err
	}
	cert, err := x509.ParseCertificate(d.Certificate)
	if err != nil {
		return bad(rec, "%w", err)
	}
	intent, ok := f.tbs[s.Name]
	if !ok || !bytes.Equal(intent.TBS, cert.RawTBSCertificate) {
		return bad(rec, "the certificate is not the announced one")
	}
	if !f.confirmed[s.Name] && f.def.confirmer(f.present) != "" {
		return bad(rec, "nobody confirmed the certificate")
	}
	if err := cert.CheckSignatureFrom(f.issuerOf(s.Name, cert)); err != nil {
		return bad(rec, "%w", err)
	}
	if sum := sha256.Sum256(d.Certificate); hex.EncodeToString(sum[:]) != d.SHA256 {
		return bad(rec, "fingerprint differs")
	}
	f.certs[s.Name] = cert
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
	if d.NotBefore.After(rec.Time) || rec.Time.Sub(d.NotBefore) > maxAnnounce {
		return bad(rec, "validity does not begin when the certificate was announced")
	}
	f.tbs[name] = d
	return nil
}

// maxAnnounce is how long it may take from deciding the dates of a certificate
// to its intent record.
const maxAnnounce = time.Minute

func (f *facts) takeConfirmation(rec *Record, s Step) error {
	var d confirmData
	if err := rec.decode(&d); err != nil {
		return err
	}
	intent, ok := f.tbs[s.Name]
	if !ok || f.confirmed[s.Name] || rec.Actor != f.def.confirmer(f.present) {
		return bad(rec, "%.40q was not asked", rec.Actor)
	}
	if d.Words != newChallenge(s.ID, sha256.Sum256(intent.TBS)).answer() {
		return bad(rec, "words are not those of what will be signed")
	}
	f.confirmed[s.Name] = true
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
