package ceremony

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/chancery-ca/chancery/ca/profile"
	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/ceremony/trust/tuf"
	"github.com/chancery-ca/chancery/hsm"
)

// ErrFrozen: what should be the last checkpoint of a log is not one, or not of
// that log.
var ErrFrozen = errors.New("not a last checkpoint")

// StepFreeze records the last checkpoint of a shard that gets a successor.
const StepFreeze StepKind = "freeze"

// Rotation says how what is new follows what was.
type Rotation struct {
	// Overlap is how long the old stays valid beside the new: "7d". Everything
	// that is signed by then verifies for ever.
	Overlap string `yaml:"overlap"`
}

// frozenData is the result of StepFreeze.
type frozenData struct {
	Log string `json:"log"` // id of the frozen shard
	// Checkpoint is what the shard signed last: a signed note, or a CT log's
	// answer to get-sth. Empty, with Missing, if there is none.
	Checkpoint []byte `json:"checkpoint,omitempty"`
	Size       uint64 `json:"size"`
	Missing    string `json:"missing,omitempty"` // why there is none
}

func (d *Definition) checkRotation(f *faults) {
	rotates := d.Kind == Rotate || d.Kind == LogKey || d.Kind == IntermediateCSR
	switch {
	case rotates && (d.Rotation == nil || !tufDuration.MatchString(d.Rotation.Overlap)):
		f.add("rotation: overlap: want a number of days or years, as 7d")
	case !rotates && d.Rotation != nil:
		f.add("rotation: the kind %s rotates nothing", d.Kind)
	}
	if d.Kind == LogKey && len(d.Certificates) > 0 {
		f.add("certificates: the kind %s issues none", d.Kind)
	}
	if rotates && d.hasOwn(profile.Root) && !d.hasOwn(profile.Intermediate) {
		f.add("certificates: a new root needs a new intermediate")
	}
	if rotates && d.hasOwn(profile.TSARoot) && !d.hasOwn(profile.TSA) {
		f.add("certificates: a new timestamp root needs a new timestamp authority")
	}
}

// hasOwn says whether the definition has a certificate of the kind.
func (d *Definition) hasOwn(kind profile.Kind) bool {
	for name := range d.Certificates {
		if d.certificateKind(name) == kind {
			return true
		}
	}
	return false
}

// isPrevious says whether an issuer is one of the ceremony before.
func (d *Definition) isPrevious(name string) bool {
	_, own := d.Certificates[name]
	return d.Previous != nil && !own && (name == previousRoot || name == previousTSARoot)
}

// checkNextService checks the shards that follow: the address and the issuers
// are those of the ceremony before.
func (d *Definition) checkNextService(f *faults) {
	if d.Service.URL != "" || len(d.Service.OIDC) > 0 {
		f.add("service: url and oidc are those of the ceremony before")
	}
	if d.Kind != Rotate && d.Kind != LogKey && len(d.logs()) > 0 {
		f.add("service: logs: the kind %s makes no shards", d.Kind)
	}
}

// planRotate replaces keys: intermediates, timestamp authorities, logs, roots.
func planRotate(d *Definition) ([]Step, error) {
	steps := append([]Step{previousStep(d.Previous)}, d.tokenSteps()...)
	if d.hasOwn(profile.Root) {
		steps = append(steps, d.entropyStep())
		for _, name := range sorted(d.Tokens) {
			steps = append(steps, seedStep(name))
		}
	}
	for _, name := range d.keyOrder() {
		steps = append(steps, d.keyStep(name))
	}
	steps = append(steps, d.backupSteps()...)
	for _, l := range d.logs() {
		steps = append(steps, named(StepFreeze, string(l.role), "Whoever has the last checkpoint can prove that nothing was added after it.",
			"Record the last checkpoint of the %s shard that %s follows.", l.role, l.Shard.Shard))
	}
	for _, name := range d.certificateOrder() {
		steps = append(steps, d.certificateStep(name))
	}
	if d.CRL != nil || d.hasOwn(profile.Root) {
		steps = append(steps, d.crlStep())
	}
	custody, err := d.custodySteps()
	if err != nil {
		return nil, err
	}
	return append(append(steps, custody...), outputsStep()), nil
}

// planCRL has the root sign its next list.
func planCRL(d *Definition) ([]Step, error) {
	if len(d.Keys) > 0 || d.TUF != nil {
		return nil, fmt.Errorf("%w: the kind %s makes no keys and no TUF files", ErrDefinition, d.Kind)
	}
	steps := append([]Step{previousStep(d.Previous)}, d.tokenSteps()...)
	return append(steps, d.crlStep(), outputsStep()), nil
}

// freeze takes the last checkpoint of a shard.
func (r *run) freeze(ctx context.Context, s Step) error {
	old, err := r.facts.oldLog(hsm.Role(s.Name))
	if err != nil {
		return err
	}
	id, err := old.ID()
	if err != nil {
		return err
	}
	q := Question{
		ID: s.ID, Title: fmt.Sprintf("The shard %s takes no more entries.", old.BaseURL),
		Why:    "Its last checkpoint becomes part of the record; freeze the log before you fetch it.",
		Prompt: "Path of its last checkpoint (a signed note or an answer to get-sth), or: " + nonePrefix + " REASON",
		Check: func(answer string) error {
			_, err := parseFrozen(old, answer)
			return err
		},
	}
	if r.def.Environment == Rehearsal {
		q.Practice = nonePrefix + " a rehearsal has no log"
	}
	answer, err := r.ask(ctx, q)
	if err != nil {
		return err
	}
	data, err := parseFrozen(old, answer)
	if err != nil {
		return err
	}
	data.Log = fmt.Sprintf("%x", id)
	return r.record(s, Done, data)
}

// nonePrefix begins the answer of someone who has no checkpoint.
const nonePrefix = "none:"

// parseFrozen reads the answer: a path, or why there is none.
func parseFrozen(old trust.Log, answer string) (frozenData, error) {
	if reason, ok := strings.CutPrefix(answer, nonePrefix); ok {
		reason, err := checkReason(reason)
		return frozenData{Missing: reason}, err
	}
	content, err := readBounded(answer, trust.MaxLastHead)
	if err != nil {
		return frozenData{}, err
	}
	size, err := verifyFrozen(old.PublicKey, content)
	return frozenData{Checkpoint: content, Size: size}, err
}

func (f *facts) takeFreeze(rec *Record, s Step) error {
	var d frozenData
	if err := rec.result(&d); err != nil {
		return err
	}
	old, err := f.oldLog(hsm.Role(s.Name))
	if err != nil {
		return bad(rec, "%w", err)
	}
	if id, err := old.ID(); err != nil || d.Log != fmt.Sprintf("%x", id) || (len(d.Checkpoint) == 0) == (d.Missing == "") {
		return bad(rec, "not of the shard that gets a successor")
	}
	if d.Missing == "" {
		if size, err := verifyFrozen(old.PublicKey, d.Checkpoint); err != nil || size != d.Size {
			return bad(rec, "size %d: %w", d.Size, errors.Join(err, ErrFrozen))
		}
	}
	if f.frozen == nil {
		f.frozen = map[string]frozenData{}
	}
	f.frozen[s.Name] = d
	return nil
}

// verifyFrozen verifies a checkpoint with the key of its log and returns its
// size.
func verifyFrozen(pub *ecdsa.PublicKey, content []byte) (uint64, error) {
	last, err := trust.ParseLastHead(pub, content)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrFrozen, err)
	}
	return last.Size, nil
}

// oldLog is the shard that the role's new one follows.
func (f *facts) oldLog(role hsm.Role) (trust.Log, error) {
	logs := f.before.trusted.Logs
	if role == hsm.RoleCT {
		logs = f.before.trusted.CTLogs
	}
	for _, l := range logs {
		if id, err := l.ID(); err == nil && id == f.before.ring.Keys[role].SPKI {
			return l, nil
		}
	}
	return trust.Log{}, fmt.Errorf("%w: there is no shard of the role %s", ErrPrevious, role)
}

// serviceURL is where the service answers, as the ceremony before says.
func (p *previousFacts) serviceURL() string {
	if n := len(p.signing.CAs); n > 0 {
		return p.signing.CAs[n-1].URL
	}
	return ""
}

// current is the certificate of the kind that is in use after the ceremony.
func (f *facts) current(kind profile.Kind) *x509.Certificate {
	if name := f.def.certificateOfKind(kind); name != "" {
		return f.certs[name]
	}
	return map[profile.Kind]*x509.Certificate{
		profile.Root: f.before.root, profile.Intermediate: f.before.inter,
		profile.TSARoot: f.before.tsaRoot, profile.TSA: f.before.tsa,
	}[kind]
}

// nextTrust is the trusted root and the signing configuration after the
// ceremony: what was stays, with an end, and what follows is added.
func (f *facts) nextTrust() (trust.Root, trust.SigningConfig, error) {
	trusted, signing := f.before.trusted, f.before.signing
	if f.def.Rotation == nil {
		return trusted, signing, nil
	}
	url, overlap := f.before.serviceURL(), f.def.Rotation.Overlap
	var err error
	if f.def.hasOwn(profile.Intermediate) {
		inter := f.current(profile.Intermediate)
		end := addPeriod(inter.NotBefore, overlap)
		if trusted, err = trusted.RotateCertificateAuthority(authority(url, inter, f.current(profile.Root)), end); err != nil {
			return trusted, signing, err
		}
		next := f.before.signing.CAs[len(f.before.signing.CAs)-1]
		next.Validity = trust.Validity{Start: inter.NotBefore, End: inter.NotAfter}
		if signing, err = signing.RotateCA(next, end); err != nil {
			return trusted, signing, err
		}
	}
	if f.def.hasOwn(profile.TSA) {
		tsa := f.current(profile.TSA)
		next := authority(url+trust.TimestampPath, tsa, f.current(profile.TSARoot))
		if trusted, err = trusted.RotateTimestampAuthority(next, addPeriod(tsa.NotBefore, overlap)); err != nil {
			return trusted, signing, err
		}
	}
	for _, l := range f.def.logs() {
		if trusted, err = f.nextLog(trusted, l); err != nil {
			return trusted, signing, err
		}
	}
	return trusted, signing, nil
}

// nextLog adds a shard.
func (f *facts) nextLog(trusted trust.Root, l namedShard) (trust.Root, error) {
	pub, ok := f.keys[f.def.keyOfRole(l.role)].public.(*ecdsa.PublicKey)
	if !ok {
		return trusted, fmt.Errorf("%w: the key of %s was not made", ErrTranscript, l.role)
	}
	start := f.since.Truncate(time.Second)
	end := addPeriod(start, f.def.Rotation.Overlap)
	old := f.before.ring.Keys[l.role].SPKI
	next := trust.Log{BaseURL: f.before.serviceURL() + "/log/" + l.Shard.Shard, PublicKey: pub, Validity: trust.Validity{Start: start}}
	if l.role == hsm.RoleCT {
		next.BaseURL = f.before.serviceURL() + "/ct/" + l.Shard.Shard
		return trusted.RotateCTLog(old, next, end)
	}
	return trusted.RotateLog(old, next, end)
}

// nextRing is keys.yaml after the ceremony. A token without a key leaves it.
func (f *facts) nextRing() (*trust.KeyRing, error) {
	ring := &trust.KeyRing{Tokens: maps.Clone(f.before.ring.Tokens), Keys: maps.Clone(f.before.ring.Keys)}
	for name, u := range f.def.uses {
		k, ok := f.keys[name]
		if !ok {
			return nil, fmt.Errorf("%w: key %s was not made", ErrTranscript, name)
		}
		token := f.def.Keys[name].Token
		info := f.inventory[token].Token
		ring.Tokens[token] = trust.Token{URI: observedURI(info, f.def.Tokens[token].URI), Module: info.Module}
		ring.Keys[u.role] = trust.Key{Token: token, URI: placedURI(k.evidence.URI, f.def.Tokens[token].URI), SPKI: k.spki}
	}
	maps.DeleteFunc(ring.Tokens, func(name string, _ trust.Token) bool {
		for _, k := range ring.Keys {
			if k.Token == name {
				return false
			}
		}
		return true
	})
	return ring, nil
}

// checkSameDevice refuses a token in which a key is to be made and that has the
// name, but not the address, of one in which keys of before stay: keys.yaml has
// one address for each name, and the service would look for those keys in the
// wrong device.
func (f *facts) checkSameDevice(name string, info hsm.TokenInfo) error {
	makes := func(k Key) bool { return k.Token == name }
	if f.before == nil || f.def.madeElsewhere() || !slices.ContainsFunc(slices.Collect(maps.Values(f.def.Keys)), makes) {
		return nil
	}
	have, ok := f.before.ring.Tokens[name]
	uri := observedURI(info, f.def.Tokens[name].URI)
	if !ok || have.URI == uri {
		return nil
	}
	for _, role := range sorted(f.before.ring.Keys) {
		if f.before.ring.Keys[role].Token == name && f.def.keyOfRole(role) == "" {
			return fmt.Errorf("token %s is %.200s, and the key of the role %s is in %.200s under that name: give this one another: %w",
				name, uri, role, have.URI, ErrDefinition)
		}
	}
	return nil
}

// laterFiles are the outputs of a ceremony that continues another: all of its,
// with what is new in the place of what was.
func (f *facts) laterFiles() ([]File, error) {
	if f.before == nil {
		return nil, fmt.Errorf("%w: %w", ErrTranscript, ErrPrevious)
	}
	all := map[string]File{}
	for name, content := range f.before.files {
		all[name] = newFile(name, content)
	}
	var fresh []File
	for _, part := range []func() ([]File, error){f.rotatedFiles, f.nextTUFFiles, f.evidenceFiles, f.backupFiles} {
		files, err := part()
		if err != nil {
			return nil, err
		}
		fresh = append(fresh, files...)
	}
	if f.def.TUF != nil {
		maps.DeleteFunc(all, func(name string, _ File) bool { return strings.HasPrefix(name, tufFolder) })
	}
	for _, file := range slices.Concat(fresh, f.crlFiles()) {
		all[file.Name] = file
	}
	var files []File
	for _, name := range sorted(all) {
		files = append(files, all[name])
	}
	return files, nil
}

// rotatedFiles are those that change when a key does.
func (f *facts) rotatedFiles() ([]File, error) {
	if f.def.Rotation == nil {
		return nil, nil
	}
	root, inter := f.current(profile.Root), f.current(profile.Intermediate)
	files := []File{
		newFile(rootName, certificatePEM(root)), newFile(intermediateName, certificatePEM(inter)),
		newFile(chainName, certificatePEM(inter, root)),
		newFile(tsaChainName, certificatePEM(f.current(profile.TSA), f.current(profile.TSARoot))),
	}
	for _, l := range f.def.logs() {
		files = append(files, newFile(string(l.role)+".pub",
			pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: f.keys[f.def.keyOfRole(l.role)].evidence.PublicKey})))
		if frozen := f.frozen[string(l.role)]; frozen.Missing == "" && len(frozen.Checkpoint) > 0 {
			files = append(files, newFile(trust.LastHeadName(f.before.ring.Keys[l.role].SPKI), frozen.Checkpoint))
		}
	}
	trusted, err := f.trustFiles()
	return append(files, trusted...), err
}

// nextTUFFiles is the repository with its next root and targets.
func (f *facts) nextTUFFiles() ([]File, error) { return f.tufFiles() }

// makesKeys says whether the kind makes keys.
func (d *Definition) makesKeys() bool {
	switch d.Kind {
	case Genesis, Rotate, LogKey, IntermediateCSR:
		return true
	}
	return false
}

// The TUF repository of the ceremony before; there may be none, and no ceremony
// before.

func (p *previousFacts) tufRoot() *tuf.Root {
	if p == nil || p.repository == nil {
		return nil
	}
	return p.repository.Root()
}

func (p *previousFacts) tufRoots() [][]byte {
	if p == nil || p.repository == nil {
		return nil
	}
	return slices.Clone(p.repository.RootFiles())
}

func (p *previousFacts) tufTargets() int64 {
	if p == nil || p.repository == nil {
		return 0
	}
	return p.repository.TargetsVersion()
}

func (p *previousFacts) tufVersion() int64 {
	if p == nil || p.repository == nil {
		return 0
	}
	snapshot, timestamp := p.repository.OnlineVersions()
	return max(snapshot, timestamp)
}

// signers are all who sign the root: the custodians and those who leave.
func (t *TUF) signers() []TUFSigner { return slices.Concat(t.Custodians, t.Leaving) }

// isLeaving says whether a custodian signs the root alone.
func (t *TUF) isLeaving(id string) bool {
	return slices.ContainsFunc(t.Leaving, func(c TUFSigner) bool { return c.ID == id })
}
