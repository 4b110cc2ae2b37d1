package hsm

import "context"

// Inspection is what a token, its slot and its library say of themselves to
// anybody: it takes no login, so it shows a token that refuses one, too.
type Inspection struct {
	Token   TokenInfo   `json:"token"`
	Slot    SlotInfo    `json:"slot"`
	Library LibraryInfo `json:"library"`
	// Mechanisms are sorted by name.
	Mechanisms []Mechanism `json:"mechanisms"`
}

// SlotInfo describes where a PKCS#11 token is plugged in (PKCS #11 v2.40, 3.2,
// CK_SLOT_INFO). It is zero for a TPM.
type SlotInfo struct {
	Description  string `json:"description"`
	Manufacturer string `json:"manufacturer"`
	Firmware     string `json:"firmware"`
	Hardware     string `json:"hardware"`
	// Flags are the names of the set flags, for example "HW_SLOT".
	Flags []string `json:"flags"`
}

// LibraryInfo describes a PKCS#11 library (PKCS #11 v2.40, 3.1, CK_INFO). For
// a TPM it names the specification and its revision.
type LibraryInfo struct {
	Path         string `json:"path"`
	Description  string `json:"description"`
	Manufacturer string `json:"manufacturer"`
	Version      string `json:"version"`
	// Interface is the version of the interface, for example "2.40".
	Interface string `json:"interface"`
}

// Mechanism is one thing that a token can do.
type Mechanism struct {
	// Name is "CKM_ECDSA" or a TPM's "TPM_ECC_NIST_P256"; a number in
	// hexadecimal if we have no name for it.
	Name string `json:"name"`
	// MinKeySize and MaxKeySize are in the mechanism's own unit (bits for
	// ECDSA and RSA, octets for AES); 0 if the token gives none.
	MinKeySize uint `json:"minKeySize"`
	MaxKeySize uint `json:"maxKeySize"`
	// Flags are the names of the set flags, for example "SIGN".
	Flags []string `json:"flags"`
}

// Listing is one private key as the token shows it, whether or not it is one
// that we would use.
type Listing struct {
	Label string `json:"label"`
	ID    string `json:"id"` // hexadecimal
	// URI names it for Token.Open.
	URI string `json:"uri"`
	// Algorithm and SPKI (hexadecimal SHA-256) are "" when Problem says why.
	Algorithm Algorithm `json:"algorithm"`
	SPKI      string    `json:"spkiSHA256"`
	// Attributes are those of the private key, as in Evidence.
	Attributes map[string]string `json:"attributes"`
	Level      Level             `json:"level"`
	// Problem says why the key cannot be opened: no public key, two of them, an
	// unsupported type. It is "" for one that can.
	Problem string `json:"problem,omitempty"`
}

// Lister is a token that shows what is in it, for tools that look. Both
// backends are one.
type Lister interface {
	// List describes every private key, in the order of label and id.
	List(ctx context.Context) ([]Listing, error)
	// Look returns the Ref of the one key that uri names, whatever its public
	// key is. Errors: ErrNotFound, ErrAmbiguous, ErrPolicy.
	Look(ctx context.Context, uri string) (Ref, error)
}
