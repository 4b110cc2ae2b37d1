package ceremony

import (
	"errors"
	"fmt"
	"slices"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/hsm"
)

// ErrMachine: the definition is for two machines and nobody said which one
// this is, or the reverse.
var ErrMachine = errors.New("which machine this is")

// Machine is one of the two machines of a ceremony whose root is kept away
// from every network.
type Machine string

// The machines. The offline one has the tokens of the roots and issues every
// certificate; the online one has all other tokens.
const (
	Offline Machine = "offline"
	Online  Machine = "online"
)

// side is this ceremony's side of the exchange, "" if it has none.
func (d *Definition) side() Machine {
	switch d.Kind {
	case IntermediateCSR:
		return Online
	case SignIntermediate:
		return Offline
	}
	return d.machine
}

// other returns the machine on the other side of the USB stick.
func (m Machine) other() Machine {
	if m == Offline {
		return Online
	}
	return Offline
}

// TwoMachines says whether the definition is for two machines: each of its
// tokens names one.
func (d *Definition) TwoMachines() bool {
	for _, t := range d.Tokens {
		if t.Machine != "" {
			return true
		}
	}
	return false
}

// Machine returns the machine whose part of the ceremony this is, "" for one
// that is not divided or of which no part was chosen.
func (d *Definition) Machine() Machine { return d.machine }

// On returns the part of the ceremony that happens on m. Source and hash stay
// the same, so that both machines are prepared with one paper. For a definition
// that is not for two machines m is "". Errors: ErrMachine.
func (d *Definition) On(m Machine) (*Definition, error) {
	if d.TwoMachines() != (m == Offline || m == Online) || !d.TwoMachines() && m != "" {
		return nil, fmt.Errorf("machine %.20q: definition %s: %w", m, d.ID, ErrMachine)
	}
	r := *d
	r.machine = m
	return &r, nil
}

// checkMachines wants a machine on all tokens or on none; on two, the keys that
// issue certificates are offline and nothing else is.
func (d *Definition) checkMachines(f *faults) {
	if !d.TwoMachines() {
		return
	}
	have := map[Machine]bool{}
	for _, name := range sorted(d.Tokens) {
		m := d.Tokens[name].Machine
		if m != Offline && m != Online {
			f.add("tokens: %s: machine %.20q: want %s or %s for every token, or none", name, m, Offline, Online)
		}
		have[m] = true
	}
	if !have[Offline] || !have[Online] {
		f.add("tokens: machine: one side has no token")
	}
	for _, name := range sorted(d.Keys) {
		want := Online
		if d.issues(name) {
			want = Offline
		}
		if m := d.Tokens[d.Keys[name].Token].Machine; m != want {
			f.add("keys: %s: is on the %.20s machine, belongs on the %s one", name, m, want)
		}
	}
}

// issues says whether certificates are issued with the key.
func (d *Definition) issues(key string) bool {
	for _, c := range d.Certificates {
		if c.Key == key && c.SelfSigned {
			return true
		}
	}
	return false
}

// isHere says whether the token is on this machine.
func (d *Definition) isHere(token string) bool {
	return d.machine == "" || d.Tokens[token].Machine == d.machine
}

// modulesHere are the modules of the tokens on this machine.
func (d *Definition) modulesHere() []string {
	var names []string
	for _, name := range sorted(d.Modules) {
		for token, t := range d.Tokens {
			if t.Module == name && d.isHere(token) && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names
}

// entropyToken is whose random numbers take part: the root's, or else those of
// the first token on this machine.
func (d *Definition) entropyToken() string {
	if token := d.Keys[d.keyOfRole(hsm.RoleRoot)].Token; token != "" && d.isHere(token) {
		return token
	}
	for _, name := range sorted(d.Tokens) {
		if d.isHere(name) {
			return name
		}
	}
	return ""
}

// machineOf says where a step is done, "" for both machines.
func (d *Definition) machineOf(s Step) Machine {
	switch s.Kind {
	case StepInventory, StepSelfTest, StepSeed, StepPIN:
		return d.Tokens[s.Name].Machine
	case StepKey, StepBackup:
		return d.Tokens[d.Keys[s.Name].Token].Machine
	case StepCertificate, StepCRL, StepCustodians, StepTUF:
		return Offline
	case StepTUFOnline, StepFreeze:
		return Online
	}
	return ""
}

// here takes from the steps of a ceremony those of this machine, and puts the
// exchange between them: the online machine makes its keys and requests, the
// offline one imports them before it issues, the online one imports what was
// issued before it writes its outputs.
func (d *Definition) here(steps []Step) ([]Step, error) {
	if !d.TwoMachines() {
		return steps, nil
	}
	if d.machine == "" {
		return nil, fmt.Errorf("definition %s is for two machines: %w", d.ID, ErrMachine)
	}
	var out []Step
	imported := false
	for _, s := range steps {
		if m := d.machineOf(s); m != "" && m != d.machine {
			continue
		}
		if !imported && d.needsImport(s) {
			out, imported = append(append(out, d.requestSteps()...), d.importStep()), true
		}
		out = append(out, s)
	}
	return out, nil
}

// needsImport says whether a step needs what the other machine has made.
func (d *Definition) needsImport(s Step) bool {
	switch s.Kind {
	case StepCertificate:
		return !d.Certificates[s.Name].SelfSigned
	case StepCustodians, StepTUF, StepTUFOnline, StepOutputs:
		return true
	}
	return false
}

// resultRing is keys.yaml.
func (f *facts) resultRing() (*trust.KeyRing, error) {
	switch {
	case f.def.madeElsewhere():
		return f.before.ring, nil
	case f.before != nil:
		return f.nextRing()
	}
	return f.keyRing()
}

// requests lists the certificates that the online machine asks for.
func (d *Definition) requests() []string {
	if d.apart() {
		return d.certificateOrder()
	}
	return slices.DeleteFunc(d.certificateOrder(), func(name string) bool {
		return d.Tokens[d.Keys[d.Certificates[name].Key].Token].Machine != Online
	})
}
