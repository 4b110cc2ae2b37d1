package hsm

import (
	"fmt"
	"sort"
	"strings"
)

// Role is what a key is for, by the name that ceremonies and keys.yaml use. A
// role decides the Policy of its key and the Share of the token that its calls
// get.
type Role string

// The roles of our keys. RoleRekor is the Rekor v2 log. RoleNone is for a look
// at a key that is not (yet) in use: its policy is PolicyFloor, its share
// ShareRest. No service signs with a key that was opened so.
const (
	RoleNone         Role = ""
	RoleRoot         Role = "root"
	RoleTSARoot      Role = "tsa-root"
	RoleIntermediate Role = "intermediate"
	RoleCT           Role = "ct"
	RoleRekor        Role = "rekor"
	RoleRekorV1      Role = "rekor-v1"
	RoleTSA          Role = "tsa"
	RoleTUFOnline    Role = "tuf-online"
)

// Policy returns what the role allows. The two roots are kept offline and may
// be backed up by wrapping and restored; RoleNone asks for PolicyFloor alone;
// every other key, and every key of an unknown role, has the strictest policy.
func (r Role) Policy() Policy {
	switch r {
	case RoleRoot, RoleTSARoot:
		return Policy{Extractable: true, Restored: true}
	case RoleNone:
		return PolicyFloor
	}
	return Policy{}
}

// Share is a part of a token's rate. Each token keeps one bounded line of
// calls for each share and serves them in turn, so that a flood of one never
// starves another; what a share does not use the others get.
type Share uint8

// The shares. ShareRest is everything that nobody waits for at a terminal of
// another service: opening, reading, generating, roots.
const (
	ShareRest Share = iota
	ShareHeads
	ShareIssuing
	ShareTimestamps
	// Shares is how many there are.
	Shares
)

// String gives the share's name: "heads", "issuing", "timestamps" or "rest".
func (s Share) String() string {
	switch s {
	case ShareHeads:
		return "heads"
	case ShareIssuing:
		return "issuing"
	case ShareTimestamps:
		return "timestamps"
	}
	return "rest"
}

// Share returns the share of the role's calls: tree heads of the Rekor logs;
// certificates and SCTs; timestamps; and the rest, to which unknown roles
// belong.
func (r Role) Share() Share {
	switch r {
	case RoleRekor, RoleRekorV1:
		return ShareHeads
	case RoleIntermediate, RoleCT:
		return ShareIssuing
	case RoleTSA:
		return ShareTimestamps
	}
	return ShareRest
}

// Policy says what the attributes of a private key may be. The zero Policy is
// the strictest: made in the token, never extractable, for signing only.
type Policy struct {
	// Extractable allows the key to be wrapped for backup. It stays SENSITIVE.
	Extractable bool
	// Restored allows a key that was unwrapped into the token (LOCAL,
	// ALWAYS_SENSITIVE and NEVER_EXTRACTABLE are then false).
	Restored bool
}

// PolicyFloor is what every key must satisfy, whatever its role: sensitive,
// private, permanent, unchangeable, and good for signing alone.
var PolicyFloor = Policy{Extractable: true, Restored: true}

// requirements returns what the policy demands of a key with these attributes,
// by the names of Evidence.Attributes. A key that may leave the token may leave
// it under a trusted wrapping key alone.
func (p Policy) requirements(attributes map[string]string) map[string]string {
	want := map[string]string{
		"TOKEN": "true", "PRIVATE": "true", "SENSITIVE": "true", "SIGN": "true",
		"DECRYPT": "false", "UNWRAP": "false", "DERIVE": "false", "MODIFIABLE": "false",
	}
	if !p.Restored {
		want["LOCAL"] = "true"
		want["ALWAYS_SENSITIVE"] = "true"
	}
	if !p.Extractable {
		want["EXTRACTABLE"] = "false"
		if !p.Restored {
			want["NEVER_EXTRACTABLE"] = "true"
		}
	}
	if p.Extractable && attributes["EXTRACTABLE"] != "false" {
		want["WRAP_WITH_TRUSTED"] = "true"
	}
	return want
}

// Check compares attributes, named as in Evidence.Attributes, with the policy.
// An attribute that is required but absent or unavailable is a violation. The
// error wraps ErrPolicy and names every attribute that differs.
func (p Policy) Check(attributes map[string]string) error {
	var wrong []string
	for name, want := range p.requirements(attributes) {
		if got := attributes[name]; got != want {
			wrong = append(wrong, fmt.Sprintf("%s is %q, want %s", name, got, want))
		}
	}
	if len(wrong) == 0 {
		return nil
	}
	sort.Strings(wrong)
	return fmt.Errorf("%s: %w", strings.Join(wrong, ", "), ErrPolicy)
}

// LevelOf returns the evidence level that a token's own statements support.
// Attestation is not a statement of the module, so LevelAttested never comes
// from here.
func LevelOf(token TokenInfo, attributes map[string]string) Level {
	switch {
	case IsSoftware(token):
		return LevelSoftware
	case attributes["LOCAL"] != "true":
		return LevelRestored
	}
	return LevelModule
}

// softwareMarks are found, in lower case, in the manufacturer or model of the
// tokens that are known to be software.
var softwareMarks = []string{"softhsm", "swtpm", "sw   tpm", "mozilla", "nss ", "gnome", "opencryptoki soft", "ibm soft", "kryoptic"}

// IsSoftware says whether the token is known to be software. A false answer is
// not evidence of hardware: a module says of itself what it likes.
func IsSoftware(token TokenInfo) bool {
	text := strings.ToLower(token.Manufacturer + "\n" + token.Model)
	for _, mark := range softwareMarks {
		if strings.Contains(text, mark) {
			return true
		}
	}
	return false
}
