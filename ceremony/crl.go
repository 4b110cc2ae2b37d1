package ceremony

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"

	"github.com/chancery-ca/chancery/ca/profile"
	"github.com/chancery-ca/chancery/hsm"
)

// StepCRL has the root sign the list of the certificates that it revokes.
const StepCRL StepKind = "crl"

// Revocations is what the root's next list says (RFC 5280, Section 5).
type Revocations struct {
	// Valid is until the next list is due: "30d", "1y".
	Valid string `yaml:"valid"`
	// Revoked are added to those of the list before, which stay.
	Revoked []Revoked `yaml:"revoked"`
}

// Revoked is a certificate of the root that is no longer good.
type Revoked struct {
	Serial string `yaml:"serial"` // hexadecimal, lower case
	// At is since when: signatures before it stay good.
	At     time.Time `yaml:"at"`
	Reason string    `yaml:"reason"`
}

// reasons are the reason codes that make sense for a CA (RFC 5280, 5.3.1).
var reasons = map[string]int{
	"unspecified": 0, "keyCompromise": 1, "caCompromise": 2, "affiliationChanged": 3,
	"superseded": 4, "cessationOfOperation": 5,
}

const (
	// defaultCRLValid is how long a list is good when nothing else is asked for.
	defaultCRLValid = "1y"
	maxRevoked      = 100
	maxCRL          = 64 << 10 // octets
)

// crlIntent is the intent of StepCRL.
type crlIntent struct {
	Number     uint64    `json:"number"`
	ThisUpdate time.Time `json:"thisUpdate"`
	NextUpdate time.Time `json:"nextUpdate"`
	TBS        []byte    `json:"tbs"`
	TBSSHA256  string    `json:"tbsSHA256"`
}

// crlResult is the result of StepCRL.
type crlResult struct {
	CRL    []byte `json:"crl"`
	SHA256 string `json:"sha256"`
}

// crlFacts is what the records say of the list.
type crlFacts struct {
	intent    *crlIntent
	confirmed bool
	list      *x509.RevocationList
}

func (d *Definition) checkCRL(f *faults) {
	c := d.CRL
	if c == nil {
		if d.Kind == CRL {
			f.add("crl: the kind %s says what is revoked", d.Kind)
		}
		return
	}
	if !tufDuration.MatchString(c.Valid) {
		f.add("crl: valid: %.20q: want a number of days or years, as 30d or 1y", c.Valid)
	}
	if len(c.Revoked) > maxRevoked {
		f.add("crl: %d revoked, at most %d", len(c.Revoked), maxRevoked)
	}
	seen := map[string]bool{}
	for i, r := range c.Revoked {
		n, ok := new(big.Int).SetString(r.Serial, 16)
		if !ok || n.Sign() <= 0 || n.BitLen() > 159 || n.Text(16) != r.Serial || seen[r.Serial] {
			f.add("crl: revoked: entry %d: serial %.60q: want hexadecimal digits in lower case, once", i+1, r.Serial)
		}
		seen[r.Serial] = true
		if _, ok := reasons[r.Reason]; !ok {
			f.add("crl: revoked: entry %d: reason %.40q", i+1, r.Reason)
		}
		if r.At.IsZero() || r.At.Nanosecond() != 0 {
			f.add("crl: revoked: entry %d: at: want a time in whole seconds", i+1)
		}
	}
	if d.Kind == Genesis && len(c.Revoked) > 0 {
		f.add("crl: revoked: a genesis has nothing to revoke")
	}
}

func (d *Definition) crlStep() Step {
	s := Step{
		ID: string(StepCRL), Kind: StepCRL, Title: "The root signs its list of revoked certificates.",
		Why:     "Whoever checks a chain learns from it which intermediates are no longer good.",
		Details: []string{"next list due in " + d.crlValid()},
	}
	if d.CRL != nil {
		for _, r := range d.CRL.Revoked {
			s.Details = append(s.Details, fmt.Sprintf("revoked: serial %s, since %s, %s", r.Serial, r.At.UTC().Format(time.RFC3339), r.Reason))
		}
	}
	return s
}

func (d *Definition) crlValid() string {
	if d.CRL == nil {
		return defaultCRLValid
	}
	return d.CRL.Valid
}

// crlIssuer is the root that signs: of this ceremony, or of the one before.
func (f *facts) crlIssuer() *x509.Certificate {
	if name := f.def.certificateOfKind(profile.Root); name != "" {
		return f.certs[name]
	}
	return f.certs[previousRoot]
}

// crlBefore is the list that the new one goes on from, nil for the first of a
// root.
func (f *facts) crlBefore() *x509.RevocationList {
	if f.before == nil || f.before.crl == nil || !f.crlIssuer().Equal(f.before.root) {
		return nil
	}
	return f.before.crl
}

// revoke signs the list: what is signed is on disk, and was confirmed, before.
func (r *run) revoke(ctx context.Context, s Step) error {
	if r.facts.crl.intent == nil {
		if err := r.announceCRL(s); err != nil {
			return err
		}
	}
	if err := r.confirmCRL(ctx, s); err != nil {
		return err
	}
	key, err := r.roleKey(ctx, hsm.RoleRoot)
	if err != nil {
		return err
	}
	ctx, cancel := device(ctx)
	defer cancel()
	der, err := signCRL(ctx, key, r.facts.crl.intent.TBS)
	if err != nil {
		return fmt.Errorf("sign list: %w", err)
	}
	sum := sha256.Sum256(der)
	if err := r.record(s, Done, crlResult{CRL: der, SHA256: hex.EncodeToString(sum[:])}); err != nil {
		return err
	}
	return r.show(ctx, "The list of revoked certificates is signed.", hashFact("list", sum)...)
}

// roleKey opens the role's key, of this ceremony or of the one before.
func (r *run) roleKey(ctx context.Context, role hsm.Role) (hsm.Key, error) {
	if name := r.def.keyOfRole(role); name != "" {
		return r.openKey(ctx, name)
	}
	key, _, err := r.previousKey(ctx, role)
	return key, err
}

func (r *run) announceCRL(s Step) error {
	now, err := r.now()
	if err != nil {
		return err
	}
	intent := crlIntent{Number: 1, ThisUpdate: now.UTC().Truncate(time.Second)}
	if before := r.facts.crlBefore(); before != nil {
		intent.Number = before.Number.Uint64() + 1
	}
	intent.NextUpdate = addPeriod(intent.ThisUpdate, r.def.crlValid())
	if intent.TBS, err = r.facts.buildCRL(intent); err != nil {
		return err
	}
	sum := sha256.Sum256(intent.TBS)
	intent.TBSSHA256 = hex.EncodeToString(sum[:])
	return r.record(s, Intent, intent)
}

// addPeriod adds "30d" or "1y", which were validated.
func addPeriod(t time.Time, period string) time.Time {
	n := 0
	for _, c := range strings.TrimRight(period, "dy") {
		n = n*10 + int(c-'0')
	}
	if strings.HasSuffix(period, "y") {
		return t.AddDate(n, 0, 0)
	}
	return t.AddDate(0, 0, n)
}

func (r *run) confirmCRL(ctx context.Context, s Step) error {
	who := r.def.confirmer(r.facts.present)
	if who == "" || r.facts.crl.confirmed {
		return nil
	}
	intent := r.facts.crl.intent
	sum := sha256.Sum256(intent.TBS)
	c := newChallenge(s.ID, sum)
	facts := []Fact{
		{"signed by", r.facts.crlIssuer().Subject.String()},
		{"number", fmt.Sprint(intent.Number)},
		{"valid", intent.ThisUpdate.Format(time.RFC3339) + " to " + intent.NextUpdate.Format(time.RFC3339)},
	}
	for _, e := range r.facts.revokedEntries() {
		facts = append(facts, Fact{"revoked", fmt.Sprintf("%x since %s", e.SerialNumber, e.RevocationTime.Format(time.RFC3339))})
	}
	_, err := r.ask(ctx, Question{
		ID: s.ID, Person: who, Confirmation: true,
		Title:  "The token signs this list.",
		Why:    "A certificate that is on it stays on it; to say no, press Ctrl-C now.",
		Facts:  append(facts, hashFact("to be signed", sum)...),
		Prompt: r.def.person(who).label() + ": " + c.prompt() + " of what will be signed",
		Check:  c.check, Practice: c.answer(),
	})
	if err != nil {
		return err
	}
	return r.state(s, who, confirmData{Words: c.answer()})
}

// revokedEntries are those of the list before and then those of the definition.
func (f *facts) revokedEntries() []x509.RevocationListEntry {
	var all []x509.RevocationListEntry
	if before := f.crlBefore(); before != nil {
		for _, e := range before.RevokedCertificateEntries {
			all = append(all, x509.RevocationListEntry{SerialNumber: e.SerialNumber, RevocationTime: e.RevocationTime.UTC(), ReasonCode: e.ReasonCode})
		}
	}
	if f.def.CRL == nil {
		return all
	}
	for _, r := range f.def.CRL.Revoked {
		n, _ := new(big.Int).SetString(r.Serial, 16) // validated
		all = append(all, x509.RevocationListEntry{SerialNumber: n, RevocationTime: r.At.UTC(), ReasonCode: reasons[r.Reason]})
	}
	return all
}

// buildCRL makes the TBSCertList (RFC 5280, 5.1) that an intent describes: the
// standard library's, signed with a throw-away key that is thrown away with the
// signature. It is a pure function of the definition and the records.
func (f *facts) buildCRL(intent crlIntent) ([]byte, error) {
	issuer := f.crlIssuer()
	if issuer == nil {
		return nil, fmt.Errorf("%w: no root certificate", ErrTranscript)
	}
	entries := f.revokedEntries()
	for i, e := range entries {
		same := func(o x509.RevocationListEntry) bool { return o.SerialNumber.Cmp(e.SerialNumber) == 0 }
		if slices.ContainsFunc(entries[:i], same) {
			return nil, fmt.Errorf("serial %x is revoked already: %w", e.SerialNumber, ErrDefinition)
		}
		if e.SerialNumber.Cmp(issuer.SerialNumber) == 0 {
			return nil, fmt.Errorf("a root does not revoke itself: %w", ErrDefinition)
		}
	}
	throwAway, err := throwAwayKey(issuer)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: new(big.Int).SetUint64(intent.Number), ThisUpdate: intent.ThisUpdate, NextUpdate: intent.NextUpdate,
		RevokedCertificateEntries: entries,
	}, issuer, throwAway)
	if err != nil {
		return nil, fmt.Errorf("build list: %w", err)
	}
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return nil, fmt.Errorf("parse list: %w", err)
	}
	return list.RawTBSRevocationList, nil
}

func throwAwayKey(issuer *x509.Certificate) (*ecdsa.PrivateKey, error) {
	pub, ok := issuer.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("root's key is %T: %w", issuer.PublicKey, hsm.ErrUnsupported)
	}
	return ecdsa.GenerateKey(pub.Curve, rand.Reader)
}

// ecdsaWith names the signature algorithms (RFC 5758, 3.2), by our algorithms.
var ecdsaWith = map[hsm.Algorithm]asn1.ObjectIdentifier{
	hsm.ECDSAP256: {1, 2, 840, 10045, 4, 3, 2}, hsm.ECDSAP384: {1, 2, 840, 10045, 4, 3, 3},
}

// signCRL puts a signature on the octets of a TBSCertList.
func signCRL(ctx context.Context, key hsm.Key, tbs []byte) ([]byte, error) {
	alg, err := hsm.AlgorithmOf(key.Public())
	if err != nil {
		return nil, err
	}
	h := alg.Hash().New()
	h.Write(tbs)
	sig, err := key.SignContext(ctx, h.Sum(nil), alg.Hash())
	if err != nil {
		return nil, err
	}
	return signedDER(tbs, alg, sig)
}

// parseCRL reads a list in PEM and verifies that the root signed it.
func parseCRL(content []byte, root *x509.Certificate) (*x509.RevocationList, error) {
	block, rest := pem.Decode(content)
	if block == nil || block.Type != "X509 CRL" || len(rest) > 0 || len(content) > maxCRL {
		return nil, errors.New("not one revocation list in PEM")
	}
	list, err := x509.ParseRevocationList(block.Bytes)
	if err != nil {
		return nil, err
	}
	if list.Number == nil || !list.Number.IsUint64() {
		return nil, errors.New("revocation list without a number")
	}
	return list, list.CheckSignatureFrom(root)
}

func (f *facts) takeCRL(rec *Record, s Step) error {
	switch rec.Type {
	case Intent:
		return f.takeCRLIntent(rec)
	case Statement:
		var d confirmData
		if err := rec.decode(&d); err != nil {
			return err
		}
		if f.crl.intent == nil || f.crl.confirmed || rec.Actor != f.def.confirmer(f.present) ||
			d.Words != newChallenge(s.ID, sha256.Sum256(f.crl.intent.TBS)).answer() {
			return bad(rec, "%.40q was not asked, or has other words", rec.Actor)
		}
		f.crl.confirmed = true
		return nil
	}
	var d crlResult
	if err := rec.result(&d); err != nil {
		return err
	}
	list, err := x509.ParseRevocationList(d.CRL)
	if err != nil {
		return bad(rec, "%w", err)
	}
	if f.crl.intent == nil || !bytes.Equal(list.RawTBSRevocationList, f.crl.intent.TBS) || !f.crl.confirmed && f.def.confirmer(f.present) != "" {
		return bad(rec, "not the announced list, or nobody confirmed it")
	}
	if err := list.CheckSignatureFrom(f.crlIssuer()); err != nil {
		return bad(rec, "%w", err)
	}
	if sum := sha256.Sum256(d.CRL); hex.EncodeToString(sum[:]) != d.SHA256 {
		return bad(rec, "hash differs")
	}
	f.crl.list = list
	return nil
}

func (f *facts) takeCRLIntent(rec *Record) error {
	var d crlIntent
	if err := rec.decode(&d); err != nil {
		return err
	}
	want := uint64(1)
	if before := f.crlBefore(); before != nil {
		want = before.Number.Uint64() + 1
	}
	d.ThisUpdate, d.NextUpdate = d.ThisUpdate.UTC(), d.NextUpdate.UTC()
	if f.crl.intent != nil || d.Number != want || d.ThisUpdate.After(rec.Time) || rec.Time.Sub(d.ThisUpdate) > maxAnnounce ||
		!d.NextUpdate.Equal(addPeriod(d.ThisUpdate, f.def.crlValid())) {
		return bad(rec, "announced before, or with another number or time")
	}
	tbs, err := f.buildCRL(d)
	if err != nil {
		return bad(rec, "%w", err)
	}
	if sum := sha256.Sum256(d.TBS); !bytes.Equal(tbs, d.TBS) || hex.EncodeToString(sum[:]) != d.TBSSHA256 {
		return bad(rec, "the list is not the definition's")
	}
	f.crl.intent = &d
	return nil
}

// crlFiles is root.crl: the new list, or the one that was.
func (f *facts) crlFiles() []File {
	switch {
	case f.crl.list != nil:
		return []File{newFile(crlName, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: f.crl.list.Raw}))}
	case f.before != nil && f.before.files[crlName] != nil:
		return []File{newFile(crlName, f.before.files[crlName])}
	}
	return nil
}
