package ceremony

import (
	"fmt"
	"slices"

	"github.com/chancery-ca/chancery/ca/profile"
	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/hsm"
)

// StepKind is what a step does.
type StepKind string

// The kinds of steps, in the order of a ceremony.
const (
	StepOpen        StepKind = "open"
	StepInventory   StepKind = "inventory"
	StepSelfTest    StepKind = "self-test"
	StepEntropy     StepKind = "entropy"
	StepKey         StepKind = "key"
	StepCertificate StepKind = "certificate"
	StepOutputs     StepKind = "outputs"
	StepClose       StepKind = "close"
)

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
}

// Plan returns the steps of the ceremony in order. It opens nothing. A
// definition that asks for what this version does not do is refused with
// ErrNotInVersion.
func Plan(d *Definition) ([]Step, error) {
	if err := d.supported(); err != nil {
		return nil, err
	}
	steps := []Step{{string(StepOpen), StepOpen, "", "Record the definition, this program and the time."}}
	add := func(kind StepKind, name, title string, args ...any) {
		steps = append(steps, Step{string(kind) + "/" + name, kind, name, fmt.Sprintf(title, args...)})
	}
	for _, name := range sorted(d.Tokens) {
		add(StepInventory, name, "Look at token %s: what it is and what is on it.", name)
	}
	for _, name := range sorted(d.Tokens) {
		add(StepSelfTest, name, "Test the random numbers of token %s.", name)
	}
	steps = append(steps, Step{string(StepEntropy), StepEntropy, "", "Make the ceremony's public randomness: commit, then reveal."})
	for _, name := range d.keyOrder() {
		k := d.Keys[name]
		add(StepKey, name, "Make key %s (%s, role %s) in token %s.", name, k.Algorithm, d.uses[name].role, k.Token)
	}
	for _, name := range d.certificateOrder() {
		c := d.Certificates[name]
		add(StepCertificate, name, "Issue certificate %s: %q, %d years.", name, d.CommonName(c.Subject), c.Years)
	}
	return append(steps,
		Step{string(StepOutputs), StepOutputs, "", "Write the files for clients and for the service."},
		Step{string(StepClose), StepClose, "", "Close the transcript."}), nil
}

// supported refuses what is specified and not done by this version.
func (d *Definition) supported() error {
	if d.Kind != Genesis {
		return fmt.Errorf("kind %s: %w", d.Kind, ErrNotInVersion)
	}
	if d.TUF != nil {
		return fmt.Errorf("tuf: %w", ErrNotInVersion)
	}
	for _, name := range sorted(d.Keys) {
		if p := d.Keys[name].Protection; p == NativeBackup || p == WrappedBackup {
			return fmt.Errorf("key %s: protection %s: %w", name, p, ErrNotInVersion)
		}
	}
	return nil
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
