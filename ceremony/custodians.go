package ceremony

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/chancery-ca/chancery/ceremony/trust/tuf"
	"github.com/chancery-ca/chancery/hsm"
)

// The folders of the TUF repository and of the drafts that custodians sign,
// below the outputs.
const (
	tufFolder    = "tuf/"
	draftsFolder = "custodians/"
)

// maxPEM bounds a custodian's public key in PEM, in octets.
const maxPEM = 1024

// custodianData is a statement in StepCustodians: the custodian's public key,
// PKIX DER.
type custodianData struct {
	PublicKey []byte `json:"publicKey"`
}

// custodiansData is the result of StepCustodians.
type custodiansData struct {
	Custodians []string `json:"custodians"`
}

// tufIntent is the intent of StepTUF: the SHA-256 of what the custodians sign.
type tufIntent struct {
	At      time.Time `json:"at"`
	Root    string    `json:"rootSHA256"`
	Targets string    `json:"targetsSHA256"`
}

// tufData is a statement in StepTUF: a custodian's signatures.
type tufData struct {
	Root    []byte `json:"root"`
	Targets []byte `json:"targets,omitempty"`
}

// tufResult is the result of StepTUF.
type tufResult struct {
	Signed []string `json:"signed"`
}

// tufOnlineData is the intent (the time alone) and the result of StepTUFOnline.
type tufOnlineData struct {
	At        time.Time `json:"at"`
	Snapshot  []byte    `json:"snapshot,omitempty"`
	Timestamp []byte    `json:"timestamp,omitempty"`
}

// tufFacts is what the records say of the TUF repository.
type tufFacts struct {
	keys       map[string]*ecdsa.PublicKey // by custodian
	at         time.Time                   // of root and targets
	signatures map[string]tufData          // by custodian
	onlineAt   time.Time                   // of snapshot and timestamp
	repository *tuf.Repository             // complete
}

// custodySteps makes the first TUF repository, if the definition wants one.
func (d *Definition) custodySteps() ([]Step, error) {
	if d.TUF == nil {
		return nil, nil
	}
	if d.keyOfRole(hsm.RoleTUFOnline) == "" && d.Previous == nil {
		return nil, fmt.Errorf("tuf: no key %s: %w", hsm.RoleTUFOnline, ErrDefinition)
	}
	if _, err := d.tufExpires(); err != nil {
		return nil, err
	}
	keys := Step{
		ID: string(StepCustodians), Kind: StepCustodians, Title: "Record the public keys of the custodians of the TUF repository.",
		Why: "Their keys say from now on which trust files are current; each was pinned in the definition.",
	}
	for _, c := range d.TUF.Custodians {
		keys.Details = append(keys.Details, fmt.Sprintf("%s: SPKI SHA-256 %s", c.ID, c.SPKISHA256))
	}
	sign := Step{
		ID: string(StepTUF), Kind: StepTUF, Title: fmt.Sprintf("%d of %d custodians sign the TUF root and targets.", d.TUF.Threshold, len(d.TUF.Custodians)),
		Why:     "Clients follow the trust files that a threshold of custodians has signed, and no others.",
		Details: []string{"root valid for " + d.TUF.RootExpires + ", targets for " + tuf.Decade.String()},
	}
	online := Step{
		ID: string(StepTUFOnline), Kind: StepTUFOnline, Title: "The online key signs the TUF snapshot and timestamp.",
		Why:     "They say what is current; the service signs new ones before they expire.",
		Details: []string{"timestamp valid for " + d.TUF.TimestampExpires},
	}
	return []Step{keys, sign, online}, nil
}

func (d *Definition) tufExpires() (tuf.Expires, error) {
	e := tuf.Expires{Targets: tuf.Decade, Snapshot: tuf.Decade}
	var err error
	if e.Root, err = tuf.ParsePeriod(d.TUF.RootExpires); err == nil {
		e.Timestamp, err = tuf.ParsePeriod(d.TUF.TimestampExpires)
	}
	if err != nil {
		return e, fmt.Errorf("tuf: %w: %w", ErrDefinition, err)
	}
	return e, nil
}

// isCustodian says whether a step's statements may be of this custodian.
func (d *Definition) isCustodian(step Step, id string) bool {
	return (step.Kind == StepCustodians || step.Kind == StepTUF) && d.TUF != nil &&
		slices.ContainsFunc(d.TUF.signers(), func(c TUFSigner) bool { return c.ID == id })
}

// custodianKey returns the key of a custodian who has brought their token, or
// nil.
func (r *run) custodianKey(ctx context.Context, id string) (hsm.Key, error) {
	if r.opts.Custodian == nil {
		return nil, nil
	}
	key, err := r.opts.Custodian(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("open key of custodian %s: %w", id, err)
	}
	return key, nil
}

// custodians records every custodian's public key.
func (r *run) custodians(ctx context.Context, s Step) error {
	data := custodiansData{}
	for _, c := range r.def.TUF.signers() {
		data.Custodians = append(data.Custodians, c.ID)
		if r.facts.tuf.keys[c.ID] != nil {
			continue
		}
		der, err := r.custodianPublic(ctx, s, c)
		if err != nil {
			return err
		}
		if err := r.state(s, c.ID, custodianData{PublicKey: der}); err != nil {
			return err
		}
	}
	if err := r.facts.checkSuccession(); err != nil { // before it is on record
		return err
	}
	return r.record(s, Done, data)
}

// checkSuccession wants keys with which the next root can be signed: enough
// custodians of the root in force are among the signers, and those who leave it
// have a say in it and none in the next (TUF 1.0.31, Section 6.1). Without it
// the want of a signature would show when people have gone home.
func (f *facts) checkSuccession() error {
	old := f.before.tufRoot()
	if old == nil {
		if len(f.def.TUF.Leaving) > 0 {
			return fmt.Errorf("custodians leave, and there is no TUF repository before: %w", ErrCustodians)
		}
		return nil
	}
	n := 0
	for _, c := range f.def.TUF.signers() {
		key := f.tuf.keys[c.ID]
		inForce := slices.ContainsFunc(old.Layout.Custodians, func(k *ecdsa.PublicKey) bool { return k.Equal(key) })
		stays := slices.ContainsFunc(f.def.TUF.Custodians, func(other TUFSigner) bool { return f.tuf.keys[other.ID].Equal(key) })
		if inForce {
			n++
		}
		if f.def.TUF.isLeaving(c.ID) && (!inForce || stays) {
			return fmt.Errorf("custodian %s cannot leave: in root %d %t, in the next %t: %w", c.ID, old.Version, inForce, stays, ErrCustodians)
		}
	}
	if n < old.Layout.Threshold {
		return fmt.Errorf("%d of the custodians of root %d sign, it takes %d: %w", n, old.Version, old.Layout.Threshold, ErrCustodians)
	}
	return nil
}

// custodianPublic takes the public key from the custodian's token, or asks for
// it.
func (r *run) custodianPublic(ctx context.Context, s Step, c TUFSigner) ([]byte, error) {
	key, err := r.custodianKey(ctx, c.ID)
	if err != nil {
		return nil, err
	}
	if key != nil {
		der, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			return nil, fmt.Errorf("encode key of custodian %s: %w", c.ID, err)
		}
		_, err = r.def.checkCustodian(c, der)
		return der, err
	}
	q := Question{
		ID: s.ID + ":" + c.ID, Title: "The public key of custodian " + c.ID + " is recorded.",
		Why:    "It must be the one that the definition pins.",
		Facts:  []Fact{{"SPKI SHA-256", c.SPKISHA256}},
		Prompt: "Path of the public key in PEM",
		Check: func(answer string) error {
			_, err := r.def.parseCustodian(c, answer)
			return err
		},
	}
	if r.def.Environment == Rehearsal {
		der, err := x509.MarshalPKIXPublicKey(practiceCustodian(r.def.Hash(), c.ID).Public())
		if err != nil {
			return nil, err
		}
		q.Practice = string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	}
	answer, err := r.ask(ctx, q)
	if err != nil {
		return nil, err
	}
	return r.def.parseCustodian(c, answer)
}

// parseCustodian reads a public key: a path, or PEM.
func (d *Definition) parseCustodian(c TUFSigner, answer string) ([]byte, error) {
	text := []byte(answer)
	if !strings.HasPrefix(answer, "-----BEGIN ") {
		var err error
		if text, err = readBounded(answer, maxPEM); err != nil {
			return nil, err
		}
	}
	block, rest := pem.Decode(text)
	if block == nil || block.Type != "PUBLIC KEY" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("not one public key in PEM")
	}
	_, err := d.checkCustodian(c, block.Bytes)
	return block.Bytes, err
}

// checkCustodian wants the P-256 key that the definition pins; in a rehearsal,
// whose keys are for practice, any.
func (d *Definition) checkCustodian(c TUFSigner, der []byte) (*ecdsa.PublicKey, error) {
	pub, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, fmt.Errorf("key of custodian %s: %w", c.ID, err)
	}
	key, ok := pub.(*ecdsa.PublicKey)
	if again, err := x509.MarshalPKIXPublicKey(pub); !ok || key.Curve != elliptic.P256() || err != nil || !bytes.Equal(again, der) {
		return nil, fmt.Errorf("key of custodian %s is not P-256: %w", c.ID, hsm.ErrUnsupported)
	}
	if sum := sha256.Sum256(der); d.Environment != Rehearsal && !strings.EqualFold(hex.EncodeToString(sum[:]), c.SPKISHA256) {
		return nil, fmt.Errorf("key of custodian %s: %w", c.ID, hsm.ErrMismatch)
	}
	return key, nil
}

// practiceCustodian is a custodian's key in a rehearsal without one, as
// practiceKey: everybody can make it, and no production ceremony accepts it.
// Its scalar is SHA-256("chancery practice custodian v1\0" ‖ custodian ‖ 0x00 ‖
// hash of the definition).
func practiceCustodian(definition [sha256.Size]byte, custodian string) *ecdsa.PrivateKey {
	scalar := sha256.Sum256(append([]byte("chancery practice custodian v1\x00"+custodian+"\x00"), definition[:]...))
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), scalar[:])
	if err != nil { // with probability 2^-32: not a scalar of the curve
		scalar[0] = 0
		key, _ = ecdsa.ParseRawPrivateKey(elliptic.P256(), scalar[:])
	}
	return key
}

func (f *facts) takeCustodians(rec *Record, _ Step) error {
	if rec.Type != Statement {
		var d custodiansData
		if err := rec.result(&d); err != nil {
			return err
		}
		if len(d.Custodians) != len(f.def.TUF.signers()) || len(f.tuf.keys) != len(d.Custodians) {
			return bad(rec, "not every custodian's key is known")
		}
		for i, c := range f.def.TUF.signers() {
			if d.Custodians[i] != c.ID {
				return bad(rec, "not the custodians of the definition")
			}
		}
		if err := f.checkSuccession(); err != nil {
			return bad(rec, "%w", err)
		}
		return nil
	}
	var d custodianData
	if err := rec.decode(&d); err != nil {
		return err
	}
	i := slices.IndexFunc(f.def.TUF.signers(), func(c TUFSigner) bool { return c.ID == rec.Actor })
	if i < 0 || f.tuf.keys[rec.Actor] != nil {
		return bad(rec, "%.40q is no custodian, or their key is known", rec.Actor)
	}
	key, err := f.def.checkCustodian(f.def.TUF.signers()[i], d.PublicKey)
	if err != nil {
		return bad(rec, "%w", err)
	}
	f.tuf.keys[rec.Actor] = key
	return nil
}

// tufLayout says whose signatures count.
func (f *facts) tufLayout() (tuf.Layout, error) {
	expires, err := f.def.tufExpires()
	if err != nil {
		return tuf.Layout{}, err
	}
	online, ok := f.keys[f.def.keyOfRole(hsm.RoleTUFOnline)].public.(*ecdsa.PublicKey)
	if before := f.before.tufRoot(); !ok && before != nil {
		online, ok = before.Layout.Online, true
	}
	if !ok {
		return tuf.Layout{}, fmt.Errorf("%w: key %s was not made", ErrTranscript, hsm.RoleTUFOnline)
	}
	l := tuf.Layout{Threshold: f.def.TUF.Threshold, Online: online, Expires: expires}
	for _, c := range f.def.TUF.Custodians {
		l.Custodians = append(l.Custodians, f.tuf.keys[c.ID])
	}
	return l, nil
}

// tufTargets are the files that clients download.
func (f *facts) tufTargets(at time.Time) ([]tuf.Target, error) {
	files, err := f.trustFiles()
	if err != nil {
		return nil, err
	}
	content := map[string][]byte{}
	for _, file := range files {
		content[file.Name] = file.content
	}
	return tuf.Targets(content[tuf.TrustedRootTarget], content[tuf.SigningConfigTarget], at)
}

// tufDrafts makes what the custodians sign, and adds the signatures there are.
// It is a pure function of the definition and the records.
func (f *facts) tufDrafts(at time.Time) (root, targets *tuf.Draft, err error) {
	layout, err := f.tufLayout()
	if err != nil {
		return nil, nil, err
	}
	if root, err = tuf.NewRoot(layout, f.before.tufRoot(), at); err != nil {
		return nil, nil, err
	}
	unsigned, err := root.Bytes()
	if err != nil {
		return nil, nil, err
	}
	parsed, err := tuf.ParseRoot(unsigned)
	if err != nil {
		return nil, nil, err
	}
	files, err := f.tufTargets(at)
	if err != nil {
		return nil, nil, err
	}
	if targets, err = tuf.NewTargets(parsed, f.before.tufTargets()+1, files, at); err != nil {
		return nil, nil, err
	}
	for _, id := range sorted(f.tuf.signatures) {
		if err := f.addTUF(root, targets, id, f.tuf.signatures[id]); err != nil {
			return nil, nil, err
		}
	}
	return root, targets, nil
}

// addTUF adds a custodian's signatures to the drafts: both or none.
func (f *facts) addTUF(root, targets *tuf.Draft, custodian string, d tufData) error {
	id, err := tuf.KeyID(f.tuf.keys[custodian])
	if err != nil {
		return err
	}
	if err := root.Add(tuf.Signature{KeyID: id, Sig: d.Root}); err != nil {
		return err
	}
	if f.def.TUF.isLeaving(custodian) {
		if d.Targets != nil {
			return fmt.Errorf("custodian %s leaves and signs the root alone: %w", custodian, tuf.ErrForeign)
		}
		return nil
	}
	return targets.Add(tuf.Signature{KeyID: id, Sig: d.Targets})
}

// draftFiles are the unsigned drafts, for custodians at other machines.
func (f *facts) draftFiles() ([]File, error) {
	bare := *f
	bare.tuf.signatures = nil
	root, targets, err := bare.tufDrafts(f.tuf.at)
	if err != nil {
		return nil, err
	}
	var files []File
	for _, d := range []*tuf.Draft{root, targets} {
		content, err := d.Bytes()
		if err != nil {
			return nil, err
		}
		files = append(files, newFile(draftsFolder+d.Name(), content))
	}
	return files, nil
}

// custodiansSign collects the custodians' signatures, in any order and over any
// number of runs.
func (r *run) custodiansSign(ctx context.Context, s Step) error {
	if r.facts.tuf.at.IsZero() {
		now, err := r.now()
		if err != nil {
			return err
		}
		at := now.UTC().Truncate(time.Second)
		root, targets, err := r.facts.tufDrafts(at)
		if err != nil {
			return err
		}
		if err := r.record(s, Intent, tufIntent{At: at, Root: digestOf(root), Targets: digestOf(targets)}); err != nil {
			return err
		}
	}
	files, err := r.facts.draftFiles()
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := f.write(r.opts.Dir); err != nil {
			return err
		}
	}
	for _, c := range r.def.TUF.signers() {
		if _, ok := r.facts.tuf.signatures[c.ID]; ok {
			continue
		}
		data, err := r.custodianSignatures(ctx, s, c)
		if err != nil {
			return err
		}
		if data.Root == nil {
			continue // later
		}
		if err := r.state(s, c.ID, data); err != nil {
			return err
		}
	}
	root, targets, err := r.facts.tufDrafts(r.facts.tuf.at)
	if err != nil {
		return err
	}
	if err := errors.Join(root.Err(), targets.Err()); err != nil {
		return fmt.Errorf("%w: %w", ErrCustodians, err)
	}
	return r.record(s, Done, tufResult{Signed: sorted(r.facts.tuf.signatures)})
}

// ErrCustodians: the ceremony is sound and waits for signatures of custodians.
var ErrCustodians = errors.New("ceremony waits for its custodians")

func digestOf(d *tuf.Draft) string {
	h := d.Digest()
	return hex.EncodeToString(h[:])
}

// custodianSignatures has a custodian sign here, or asks for what they signed
// elsewhere. No signature means later.
func (r *run) custodianSignatures(ctx context.Context, s Step, c TUFSigner) (tufData, error) {
	root, targets, err := r.facts.tufDrafts(r.facts.tuf.at)
	if err != nil {
		return tufData{}, err
	}
	key, err := r.custodianKey(ctx, c.ID)
	if err != nil {
		return tufData{}, err
	}
	if key != nil {
		ctx, cancel := device(ctx)
		defer cancel()
		a, err := root.Sign(ctx, key)
		if err != nil {
			return tufData{}, err
		}
		if r.def.TUF.isLeaving(c.ID) {
			return tufData{Root: a.Sig}, nil
		}
		b, err := targets.Sign(ctx, key)
		return tufData{Root: a.Sig, Targets: b.Sig}, err
	}
	facts := append([]Fact{{"files", filepath.Join(r.opts.Dir, draftsFolder)}}, hashFact("root", root.Digest())...)
	q := Question{
		ID: s.ID + ":" + c.ID, Title: "Custodian " + c.ID + " signs the TUF root and targets with their own token.",
		Why:    "Without enough custodians' signatures no client follows this trust root.",
		Facts:  append(facts, hashFact("targets", targets.Digest())...),
		Prompt: "Path of the two signatures, or: " + later,
		Check: func(answer string) error {
			_, err := r.facts.parseTUFSignatures(c.ID, answer)
			return err
		},
	}
	if r.def.TUF.isLeaving(c.ID) {
		q.Title = "Custodian " + c.ID + " leaves, and signs the next TUF root for the last time."
		q.Why = "Clients follow from one root to the next by the signatures of those whom they know."
		q.Facts, q.Prompt = facts, "Path of the signature, or: "+later
	}
	if practice := practiceCustodian(r.def.Hash(), c.ID); r.def.Environment == Rehearsal && practice.PublicKey.Equal(r.facts.tuf.keys[c.ID]) {
		drafts := []*tuf.Draft{root, targets}
		if r.def.TUF.isLeaving(c.ID) {
			drafts = drafts[:1]
		}
		if q.Practice, err = practiceSignatures(practice, drafts...); err != nil {
			return tufData{}, err
		}
	}
	answer, err := r.ask(ctx, q)
	if err != nil {
		return tufData{}, err
	}
	return r.facts.parseTUFSignatures(c.ID, answer)
}

// practiceSignatures is what a custodian would bring.
func practiceSignatures(key *ecdsa.PrivateKey, drafts ...*tuf.Draft) (string, error) {
	id, err := tuf.KeyID(&key.PublicKey)
	if err != nil {
		return "", err
	}
	var text strings.Builder
	for _, d := range drafts {
		digest := d.Digest()
		sig, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
		if err != nil {
			return "", err
		}
		line, err := tuf.Signature{KeyID: id, Sig: sig}.Marshal()
		if err != nil {
			return "", err
		}
		text.Write(line)
	}
	return text.String(), nil
}

// parseTUFSignatures reads a custodian's answer: a path, or the signatures of
// root and targets as tuf.Signature.Marshal writes them, or "later", which is
// the zero tufData.
func (f *facts) parseTUFSignatures(custodian, answer string) (tufData, error) {
	if answer == later {
		return tufData{}, nil
	}
	text := []byte(answer + "\n") // its line end was trimmed
	if !strings.HasPrefix(answer, "{") {
		var err error
		if text, err = readBounded(answer, maxAnswer); err != nil {
			return tufData{}, err
		}
	}
	lines := bytes.SplitAfter(text, []byte("\n"))
	want := 2
	if f.def.TUF.isLeaving(custodian) {
		want = 1 // of the root
	}
	if len(lines) != want+1 || len(lines[want]) != 0 {
		return tufData{}, fmt.Errorf("not %d signatures, a line each", want)
	}
	id, err := tuf.KeyID(f.tuf.keys[custodian])
	if err != nil {
		return tufData{}, err
	}
	var sigs [2]tuf.Signature
	for i, line := range lines[:want] {
		sig, err := tuf.ParseSignature(line)
		if err != nil {
			return tufData{}, err
		}
		if sig.KeyID != id {
			return tufData{}, fmt.Errorf("signatures of another key than custodian %s: %w", custodian, tuf.ErrForeign)
		}
		sigs[i] = sig
	}
	d := tufData{Root: sigs[0].Sig, Targets: sigs[1].Sig}
	root, targets, err := f.tufDrafts(f.tuf.at)
	if err != nil {
		return tufData{}, err
	}
	return d, f.addTUF(root, targets, custodian, d)
}

func (f *facts) takeTUF(rec *Record, _ Step) error {
	switch rec.Type {
	case Intent:
		return f.takeTUFIntent(rec)
	case Statement:
		var d tufData
		if err := rec.decode(&d); err != nil {
			return err
		}
		if f.tuf.at.IsZero() || f.tuf.keys[rec.Actor] == nil {
			return bad(rec, "%.40q is no custodian, or nothing was announced", rec.Actor)
		}
		root, targets, err := f.tufDrafts(f.tuf.at)
		if err == nil {
			err = f.addTUF(root, targets, rec.Actor, d)
		}
		if err != nil {
			return bad(rec, "%w", err)
		}
		f.tuf.signatures[rec.Actor] = d
		return nil
	}
	var d tufResult
	if err := rec.result(&d); err != nil {
		return err
	}
	if f.tuf.at.IsZero() {
		return bad(rec, "nothing was announced")
	}
	root, targets, err := f.tufDrafts(f.tuf.at)
	if err == nil {
		err = errors.Join(root.Err(), targets.Err())
	}
	if err != nil || !slices.Equal(d.Signed, sorted(f.tuf.signatures)) {
		return bad(rec, "not what the custodians signed: %w", errors.Join(err, ErrCustodians))
	}
	return nil
}

func (f *facts) takeTUFIntent(rec *Record) error {
	var d tufIntent
	if err := rec.decode(&d); err != nil {
		return err
	}
	if !f.tuf.at.IsZero() || d.At.After(rec.Time) || d.At.Before(f.openedAt.Truncate(time.Second)) || !d.At.Equal(d.At.UTC().Truncate(time.Second)) {
		return bad(rec, "announced before, or for another time")
	}
	at := d.At.UTC()
	root, targets, err := f.tufDrafts(at)
	if err != nil {
		return bad(rec, "%w", err)
	}
	if digestOf(root) != d.Root || digestOf(targets) != d.Targets {
		return bad(rec, "not what follows from the records")
	}
	f.tuf.at = at
	return nil
}

// onlineSigns has the online key sign snapshot and timestamp. Interrupted, it
// signs again: neither was used.
func (r *run) onlineSigns(ctx context.Context, s Step) error {
	if r.facts.tuf.onlineAt.IsZero() {
		now, err := r.now()
		if err != nil {
			return err
		}
		if err := r.record(s, Intent, tufOnlineData{At: now.UTC().Truncate(time.Second)}); err != nil {
			return err
		}
	}
	key, err := r.roleKey(ctx, hsm.RoleTUFOnline)
	if err != nil {
		return err
	}
	ctx, cancel := device(ctx)
	defer cancel()
	data := tufOnlineData{At: r.facts.tuf.onlineAt}
	sign := func(into *[]byte) func(*tuf.Draft) error {
		return func(d *tuf.Draft) error {
			sig, err := d.Sign(ctx, key)
			*into = sig.Sig
			return err
		}
	}
	if _, err := r.facts.tufRepository(data.At, sign(&data.Snapshot), sign(&data.Timestamp)); err != nil {
		return err
	}
	return r.record(s, Done, data)
}

// custodianFiles is the part of a repository that the custodians signed.
type custodianFiles struct {
	roots   [][]byte // version 1 first
	root    *tuf.Root
	targets []byte
	listed  []tuf.Target // what targets lists
}

// custodianFiles follows from the definition and the records. That enough
// signed is for assemble to see.
func (f *facts) custodianFiles() (custodianFiles, error) {
	rootDraft, targetsDraft, err := f.tufDrafts(f.tuf.at)
	if err != nil {
		return custodianFiles{}, err
	}
	c := custodianFiles{}
	if c.listed, err = f.tufTargets(f.tuf.at); err != nil {
		return c, err
	}
	if c.targets, err = targetsDraft.Bytes(); err != nil {
		return c, err
	}
	file, err := rootDraft.Bytes()
	if err != nil {
		return c, err
	}
	c.roots = append(f.before.tufRoots(), file)
	c.root, err = tuf.ParseRoot(file)
	return c, err
}

// assemble adds what the online key signed; nil and nil if it has not yet.
func (c custodianFiles) assemble(snapshot, timestamp []byte) (*tuf.Repository, error) {
	return tuf.Assemble(c.roots, c.targets, snapshot, timestamp, c.listed)
}

// tufRepository puts the repository together; the two functions add the
// signature to the snapshot and, when that is done, to the timestamp.
func (f *facts) tufRepository(at time.Time, snapshot, timestamp func(*tuf.Draft) error) (*tuf.Repository, error) {
	signed, err := f.custodianFiles()
	if err != nil {
		return nil, err
	}
	version := tuf.NextVersion(f.before.tufVersion(), at)
	snapshotFile, err := signedDraft(snapshot)(tuf.NewSnapshot(signed.root, signed.targets, version, at))
	if err != nil {
		return nil, err
	}
	timestampFile, err := signedDraft(timestamp)(tuf.NewTimestamp(signed.root, snapshotFile, version, at))
	if err != nil {
		return nil, err
	}
	return signed.assemble(snapshotFile, timestampFile)
}

// signedDraft returns what signs a draft and writes it.
func signedDraft(sign func(*tuf.Draft) error) func(*tuf.Draft, error) ([]byte, error) {
	return func(d *tuf.Draft, err error) ([]byte, error) {
		if err != nil {
			return nil, err
		}
		if err := sign(d); err != nil {
			return nil, err
		}
		return d.Bytes()
	}
}

func (f *facts) takeTUFOnline(rec *Record, _ Step) error {
	var d tufOnlineData
	if err := rec.decode(&d); err != nil {
		return err
	}
	at := d.At.UTC()
	if rec.Type == Intent {
		if !f.tuf.onlineAt.IsZero() || at.After(rec.Time) || at.Before(f.tuf.at) || !at.Equal(at.Truncate(time.Second)) || d.Snapshot != nil || d.Timestamp != nil {
			return bad(rec, "announced before, or for another time")
		}
		f.tuf.onlineAt = at
		return nil
	}
	if rec.Type != Done || f.tuf.onlineAt.IsZero() || !at.Equal(f.tuf.onlineAt) {
		return bad(rec, "not what was announced")
	}
	layout, err := f.tufLayout()
	if err != nil {
		return bad(rec, "%w", err)
	}
	id, err := tuf.KeyID(layout.Online)
	if err != nil {
		return bad(rec, "%w", err)
	}
	add := func(sig []byte) func(*tuf.Draft) error {
		return func(d *tuf.Draft) error { return d.Add(tuf.Signature{KeyID: id, Sig: sig}) }
	}
	if f.tuf.repository, err = f.tufRepository(at, add(d.Snapshot), add(d.Timestamp)); err != nil {
		return bad(rec, "%w", err)
	}
	return nil
}

// tufFiles are the repository and the drafts, if the definition wants them.
func (f *facts) tufFiles() ([]File, error) {
	if f.def.TUF == nil {
		return nil, nil
	}
	repository := f.tuf.repository
	if repository == nil && f.def.machine == Offline {
		var err error
		if repository, err = f.offlineRepository(); err != nil {
			return nil, err
		}
	}
	if repository == nil {
		return nil, fmt.Errorf("%w: the TUF repository is missing", ErrTranscript)
	}
	files, err := f.draftFiles()
	if err != nil {
		return nil, err
	}
	for _, file := range repository.Files() {
		files = append(files, newFile(tufFolder+file.Name, file.Content))
	}
	return files, nil
}
