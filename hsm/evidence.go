package hsm

import "time"

// Level says how strong the evidence is that a key was made in hardware and
// cannot leave it. Higher is stronger.
type Level string

// The evidence levels, strongest first.
const (
	// LevelAttested: the hardware signed a statement about the key.
	LevelAttested Level = "attested"
	// LevelModule: the PKCS#11 module says so.
	LevelModule Level = "module-claimed"
	// LevelRestored: the key was unwrapped into the token (LOCAL is false).
	LevelRestored Level = "restored"
	// LevelSoftware: the token is known to be software (SoftHSM, swtpm).
	LevelSoftware Level = "software"
)

// TokenInfo is what a device says of itself. Strings are trimmed of padding.
type TokenInfo struct {
	Label        string `json:"label"`
	Manufacturer string `json:"manufacturer"`
	Model        string `json:"model"`
	Serial       string `json:"serial"`
	Firmware     string `json:"firmware"`
	Hardware     string `json:"hardware"`
	// Module is the module's path, and ModuleVersion what the library says.
	Module        string `json:"module"`
	ModuleVersion string `json:"moduleVersion"`
	// Slot is the slot's number at the time; it is not stable.
	Slot uint `json:"slot"`
	// Flags are the names of the set token flags, for example "RNG".
	Flags []string `json:"flags"`
}

// Evidence is what could be observed of one key. It contains no secret and is
// written to the ceremony's records as JSON.
type Evidence struct {
	Time  time.Time `json:"time"`
	Token TokenInfo `json:"token"`
	// Slot is where the token is plugged in, Library what speaks for it.
	Slot    SlotInfo    `json:"slot"`
	Library LibraryInfo `json:"library"`
	// Mechanisms are what the token can do with such a key: make it, sign or
	// derive with it, wrap it. They are sorted by name.
	Mechanisms []Mechanism `json:"mechanisms,omitempty"`

	URI       string    `json:"uri"`
	SPKI      string    `json:"spkiSHA256"` // hexadecimal
	PublicKey []byte    `json:"publicKey"`  // DER SubjectPublicKeyInfo
	Algorithm Algorithm `json:"algorithm"`
	Mechanism string    `json:"mechanism"` // the generation mechanism as the token reports it, "" if it does not
	// Attributes maps a PKCS#11 attribute's name without its CKA_ prefix, in
	// the private object ("SENSITIVE") or in the public one ("PUBLIC.VERIFY"),
	// to "true", "false", a hexadecimal value or "unavailable: CKR_…".
	Attributes map[string]string `json:"attributes"`
	// SelfTest is a signature over SHA-256 (SHA-384 for P-384) of
	// SelfTestText, which a verifier can check with PublicKey.
	SelfTestText string `json:"selfTestText"`
	SelfTest     []byte `json:"selfTest"`
	Level        Level  `json:"level"`
	// Restored says that the token does not claim to have made the key (LOCAL
	// is not true): it was unwrapped into it, or the module knows no better. A
	// restored key in a software token has LevelSoftware and Restored.
	Restored bool `json:"restored,omitempty"`
	// Attestation is what the device signed about the key, nil if it cannot.
	// Its nonce is AttestationNonce unless a caller put another one in place.
	Attestation *Attestation `json:"attestation,omitempty"`
}
