package ceremony

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/chancery-ca/chancery/ca/profile"
	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/hsm"
)

// StepKind is what a step does.
type StepKind string

// The kinds of steps, in the order of a ceremony. StepAbort is in no plan: it
// takes the place of the steps that are left.
const (
	StepOpen        StepKind = "open"
	StepPeople      StepKind = "people"
	StepClock       StepKind = "clock"
	StepInventory   StepKind = "inventory"
	StepSelfTest    StepKind = "self-test"
	StepEntropy     StepKind = "entropy"
	StepSeed        StepKind = "seed"
	StepKey         StepKind = "key"
	StepCertificate StepKind = "certificate"
	StepCustodians  StepKind = "custodians"
	StepTUF         StepKind = "tuf"
	StepTUFOnline   StepKind = "tuf-online"
	StepOutputs     StepKind = "outputs"
	StepAbort       StepKind = "abort"
	StepCheckpoint  StepKind = "checkpoint"
	StepWitnesses   StepKind = "witnesses"
	StepClose       StepKind = "close"
)

// action is one kind of step: what it does, and what its records may say.
type action struct {
	// do carries the step out. It writes what it did with run.record and what
	// people said with run.state; its last record is of type Done. Called
	// again after an interruption it goes on from what the facts say.
	do func(*run, context.Context, Step) error
	// take checks one record of the step against the definition and the
	// records before, and keeps in the facts what later steps need. It alone
	// teaches the facts, for a run, a resumed run and a verifier alike.
	take func(*facts, *Record, Step) error
}

// actionOf returns the action of a kind of step.
func actionOf(kind StepKind) (action, error) {
	switch kind {
	case StepOpen:
		return action{(*run).begin, (*facts).takeOpen}, nil
	case StepPeople:
		return action{(*run).gather, (*facts).takePeople}, nil
	case StepClock:
		return action{(*run).watches, (*facts).takeClock}, nil
	case StepInventory:
		return action{(*run).inventory, (*facts).takeInventory}, nil
	case StepSelfTest:
		return action{(*run).selfTest, (*facts).takeSelfTest}, nil
	case StepEntropy:
		return action{(*run).entropy, (*facts).takeEntropy}, nil
	case StepSeed:
		return action{(*run).seed, (*facts).takeSeeded}, nil
	case StepKey:
		return action{(*run).key, (*facts).takeKey}, nil
	case StepCertificate:
		return action{(*run).certificate, (*facts).takeCertificate}, nil
	case StepBackup:
		return action{(*run).backup, (*facts).takeBackup}, nil
	case StepDrill:
		return action{(*run).drill, (*facts).takeDrill}, nil
	case StepDestroy:
		return action{(*run).destroy, (*facts).takeDestroy}, nil
	case StepPrevious:
		return action{(*run).previous, (*facts).takePrevious}, nil
	case StepFreeze:
		return action{(*run).freeze, (*facts).takeFreeze}, nil
	case StepCRL:
		return action{(*run).revoke, (*facts).takeCRL}, nil
	case StepRequest:
		return action{(*run).request, (*facts).takeRequest}, nil
	case StepImport:
		return action{(*run).takeBundle, (*facts).takeImport}, nil
	case StepCustodians:
		return action{(*run).custodians, (*facts).takeCustodians}, nil
	case StepTUF:
		return action{(*run).custodiansSign, (*facts).takeTUF}, nil
	case StepTUFOnline:
		return action{(*run).onlineSigns, (*facts).takeTUFOnline}, nil
	case StepOutputs:
		return action{(*run).outputs, (*facts).takeOutputs}, nil
	case StepPIN:
		return action{(*run).changePIN, (*facts).takePIN}, nil
	case StepAbort:
		return action{(*run).abort, (*facts).takeAbort}, nil
	case StepCheckpoint:
		return action{(*run).checkpoint, (*facts).takeCheckpoint}, nil
	case StepWitnesses:
		return action{(*run).witnesses, (*facts).takeWitnesses}, nil
	case StepClose:
		return action{(*run).end, (*facts).takeClose}, nil
	}
	return action{}, fmt.Errorf("step kind %s: %w", kind, ErrNotInVersion)
}

// ends says whether such a step only ends a ceremony: it is done after the
// window, too.
func (k StepKind) ends() bool {
	return k == StepAbort || k == StepCheckpoint || k == StepWitnesses || k == StepClose
}

// Stage says which part of a ceremony a step belongs to, for people: each
// stage ends with a summary.
func (k StepKind) Stage() string {
	switch k {
	case StepOpen, StepPeople, StepClock, StepPrevious:
		return "Opening"
	case StepInventory, StepSelfTest:
		return "Tokens"
	case StepEntropy, StepSeed:
		return "Randomness"
	case StepKey, StepFreeze, StepBackup, StepDrill, StepDestroy:
		return "Keys"
	case StepCertificate, StepCRL:
		return "Certificates"
	case StepRequest, StepImport:
		return "Exchange"
	case StepCustodians, StepTUF, StepTUFOnline:
		return "Custodians"
	case StepOutputs:
		return "Files"
	}
	return "Closing"
}

// Step is one thing that a ceremony does. It is data: it can be printed,
// compared and recorded without a token.
type Step struct {
	// ID is unique in the plan, for example "key/root-g1".
	ID   string
	Kind StepKind
	// Name is the token, key or certificate that the step is about, or "".
	Name string
	// Title says in one sentence what will happen.
	Title string
	// Why says in one sentence what it is good for.
	Why string
	// Details are what is known of it beforehand: the question that will be
	// put, the template of a key, the content of a certificate.
	Details []string
}

// Plan returns the steps of the ceremony in order. It opens nothing. A
// definition that asks for what this version does not do is refused with
// ErrNotInVersion.
func Plan(d *Definition) ([]Step, error) {
	kind, err := kindOf(d.Kind)
	if err != nil {
		return nil, err
	}
	middle, err := kind.plan(d)
	if err != nil {
		return nil, err
	}
	if middle, err = d.here(append(middle, d.pinSteps()...)); err != nil {
		return nil, err
	}
	return slices.Concat(d.opening(), middle, d.closing()), nil
}

// planGenesis is the plan of a new trust root.
func planGenesis(d *Definition) ([]Step, error) {
	steps := d.tokenSteps()
	steps = append(steps, d.entropyStep())
	for _, name := range sorted(d.Tokens) {
		steps = append(steps, seedStep(name))
	}
	for _, name := range d.keyOrder() {
		steps = append(steps, d.keyStep(name))
	}
	steps = append(steps, d.backupSteps()...)
	for _, name := range d.certificateOrder() {
		steps = append(steps, d.certificateStep(name))
	}
	steps = append(steps, d.crlStep())
	custody, err := d.custodySteps()
	if err != nil {
		return nil, err
	}
	return append(append(steps, custody...), outputsStep()), nil
}

// opening is how every ceremony begins.
func (d *Definition) opening() []Step {
	open := Step{
		ID: string(StepOpen), Kind: StepOpen, Title: "Record the definition, this program, the modules and the time.",
		Why: "Whoever checks later must know what was to be done, and by which program.",
	}
	h := d.Hash()
	open.Details = []string{"definition: " + Words(h)}
	for _, name := range sorted(d.Modules) {
		open.Details = append(open.Details, fmt.Sprintf("module %s: %s, SHA-256 %s", name, d.Modules[name].Path, d.Modules[name].SHA256))
	}
	if len(d.People) == 0 { // a rehearsal by nobody
		return []Step{open}
	}
	people := Step{
		ID: string(StepPeople), Kind: StepPeople, Title: "Everyone confirms the definition by typing words of it.",
		Why: "Words that come from everyone's own paper show that all agreed to this text and no other.",
	}
	for _, p := range d.People {
		people.Details = append(people.Details, p.label()+": "+newChallenge(presentPurpose(p.ID), h).prompt())
	}
	clock := Step{
		ID: string(StepClock), Kind: StepClock, Title: "Compare the machine's clock with two watches.",
		Why: "The certificates begin at the machine's time.",
	}
	return []Step{open, people, clock}
}

// closing is how every ceremony ends, an aborted one too.
func (d *Definition) closing() []Step {
	steps := []Step{{
		ID: string(StepCheckpoint), Kind: StepCheckpoint, Title: "Log out of the tokens and seal the transcript with a checkpoint.",
		Why: "One hash stands for every line up to here; it is what the witnesses sign.",
	}}
	if len(d.witnesses()) > 0 {
		step := Step{
			ID: string(StepWitnesses), Kind: StepWitnesses, Title: "The witnesses sign the checkpoint, or decline.",
			Why: "Their signatures say that the transcript is what they saw.",
		}
		for _, p := range d.witnesses() {
			step.Details = append(step.Details, p.label()+": "+SignCommand)
		}
		steps = append(steps, step)
	}
	return append(steps, Step{
		ID: string(StepClose), Kind: StepClose, Title: "Close the transcript.",
		Why: "The last record says how the ceremony ended; its words are read aloud.",
	})
}

// SignCommand is how a witness signs, on their own machine.
const SignCommand = "ssh-keygen -Y sign -f YOUR-KEY -n " + Namespace + " " + CheckpointName

// tokenSteps looks at every token and tests its random numbers.
func (d *Definition) tokenSteps() []Step {
	var steps []Step
	for _, name := range sorted(d.Tokens) {
		step := named(StepInventory, name, "A wrong, used or worn-out device is noticed before a key is in it.",
			"Look at token %s: what it is and what is on it.", name)
		step.Details = []string{d.Tokens[name].URI}
		if d.Tokens[name].MustBeEmpty {
			step.Details = append(step.Details, "must be empty")
		}
		if d.Tokens[name].AcceptSoftware {
			step.Details = append(step.Details, "WARNING: may be software")
		}
		steps = append(steps, step)
	}
	for _, name := range sorted(d.Tokens) {
		step := named(StepSelfTest, name, "A broken random source makes keys that others can guess.",
			"Test the random numbers of token %s.", name)
		step.Details = []string{fmt.Sprintf("%d octets: runs shorter than %d, no octet %d times in %d (NIST SP 800-90B, 4.4)",
			healthOctets, runCutoff, windowCutoff, healthWindow)}
		steps = append(steps, step)
	}
	return steps
}

func (d *Definition) entropyStep() Step {
	return Step{
		ID: string(StepEntropy), Kind: StepEntropy, Title: "Make the ceremony's public randomness: commit, then reveal.",
		Why:     "The root's serial number comes from it, so nobody could have made this root before today.",
		Details: []string{"first the token commits, then " + orNobody(strings.Join(d.Entropy.Contributors, ", ")) + "; then all reveal"},
	}
}

func orNobody(s string) string {
	if s == "" {
		return "nobody else"
	}
	return s
}

func seedStep(token string) Step {
	return named(StepSeed, token, "It cannot hurt a good generator and may help a poor one; it is never the only entropy of a key.",
		"Give the randomness to token %s, if it takes any.", token)
}

func (d *Definition) keyStep(name string) Step {
	k := d.Keys[name]
	step := named(StepKey, name, "The key is announced on disk, made in the token, read back and proved.",
		"Make key %s (%s, role %s) in token %s.", name, k.Algorithm, d.uses[name].role, k.Token)
	step.Details = []string{"template: " + templateOf(k)}
	return step
}

// templateOf is what a key is asked to be, as people read it.
func templateOf(k Key) string {
	return fmt.Sprintf("%s, random CKA_ID; yes: %s; no: %s", k.Algorithm,
		strings.Join(keyHas, " "), strings.Join(keyHasNot, " "))
}

// The attributes that every key of a ceremony has and has not, by the names of
// hsm.Evidence. hsm.Policy demands them.
var (
	keyHas    = []string{"TOKEN", "PRIVATE", "SENSITIVE", "SIGN", "LOCAL", "ALWAYS_SENSITIVE", "NEVER_EXTRACTABLE"}
	keyHasNot = []string{"EXTRACTABLE", "DECRYPT", "UNWRAP", "DERIVE", "MODIFIABLE"}
)

func (d *Definition) certificateStep(name string) Step {
	c := d.Certificates[name]
	step := named(StepCertificate, name, "Everyone sees what will be signed before it is signed.",
		"Issue certificate %s: %q, %d years.", name, d.CommonName(c.Subject), c.Years)
	issuer := c.Issuer
	if c.SelfSigned {
		issuer = "itself"
	}
	serial := "20 octets, random"
	if d.certificateKind(name) == profile.Root {
		serial = "from the ceremony's randomness"
	}
	step.Details = []string{
		fmt.Sprintf("subject: %s", d.subject(c.Subject)),
		fmt.Sprintf("profile: %s; key: %s; signed by: %s", d.certificateKind(name), c.Key, issuer),
		"serial number: " + serial + "; valid from the moment of signing",
	}
	if p := d.confirmer(nil); p != "" {
		step.Details = append(step.Details, d.person(p).label()+" (or the next who is there) types three words of its hash")
	}
	return step
}

func outputsStep() Step {
	return Step{
		ID: string(StepOutputs), Kind: StepOutputs, Title: "Write the files for clients and for the service.",
		Why: "They follow from the records alone, so anybody can make them again and compare.",
	}
}

func named(kind StepKind, name, why, title string, args ...any) Step {
	return Step{ID: string(kind) + "/" + name, Kind: kind, Name: name, Title: fmt.Sprintf(title, args...), Why: why}
}

// keyOrder lists the keys by role.
func (d *Definition) keyOrder() []string {
	names := sorted(d.Keys)
	rank := func(name string) int { return slices.Index(trust.Roles(), d.uses[name].role) }
	slices.SortStableFunc(names, func(a, b string) int { return rank(a) - rank(b) })
	return names
}

// certificateOrder lists issuers before what they issue.
func (d *Definition) certificateOrder() []string {
	names := sorted(d.Certificates)
	order := []profile.Kind{profile.Root, profile.Intermediate, profile.TSARoot, profile.TSA}
	rank := func(name string) int { return slices.Index(order, d.certificateKind(name)) }
	slices.SortStableFunc(names, func(a, b string) int { return rank(a) - rank(b) })
	return names
}

// keyOfRole returns the name of the role's key, or "".
func (d *Definition) keyOfRole(role hsm.Role) string {
	for _, name := range sorted(d.uses) {
		if d.uses[name].role == role {
			return name
		}
	}
	return ""
}

// certificateOfKind returns the name of the one certificate of that kind, or "".
func (d *Definition) certificateOfKind(kind profile.Kind) string {
	return d.uses[d.keyOfRole(kindRole[kind])].certificate
}
