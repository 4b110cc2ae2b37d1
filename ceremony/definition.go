package ceremony

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/token"

	"github.com/chancery-ca/chancery/hsm"
)

// Errors that callers branch on.
var (
	// ErrDefinition: the definition is malformed or contradicts itself.
	ErrDefinition = errors.New("invalid definition")
	// ErrNotInVersion: the definition asks for something that is specified
	// but that this version does not do.
	ErrNotInVersion = errors.New("not in this version")
)

// MaxDefinition is the largest definition that is read, in octets. People read
// it aloud; 64 KiB is far more than a ceremony needs.
const MaxDefinition = 64 << 10

// Kind is what a ceremony does.
type Kind string

// The kinds of ceremony.
const (
	Genesis          Kind = "genesis"
	IntermediateCSR  Kind = "intermediate-csr"
	SignIntermediate Kind = "sign-intermediate"
	LogKey           Kind = "log-key"
	Rotate           Kind = "rotate"
	CRL              Kind = "crl"
	RestoreDrill     Kind = "restore-drill"
	Decommission     Kind = "decommission"
)

var kinds = []Kind{Genesis, IntermediateCSR, SignIntermediate, LogKey, Rotate, CRL, RestoreDrill, Decommission}

// Environment says whether the ceremony counts.
type Environment string

// The environments. A rehearsal runs on software tokens alone and prefixes
// every common name with RehearsalPrefix.
const (
	Production Environment = "production"
	Rehearsal  Environment = "rehearsal"
)

// RehearsalPrefix begins every common name that a rehearsal certifies.
const RehearsalPrefix = "REHEARSAL "

// Definition is the one file that says what a ceremony will do. It is made by
// ParseDefinition and read-only after.
type Definition struct {
	Version      int                    `yaml:"version"`
	ID           string                 `yaml:"id"`
	Kind         Kind                   `yaml:"kind"`
	Environment  Environment            `yaml:"environment"`
	Window       Window                 `yaml:"window"`
	Modules      map[string]Module      `yaml:"modules"`
	People       []Person               `yaml:"people"`
	Quorum       map[PersonRole]int     `yaml:"quorum"`
	Tokens       map[string]Token       `yaml:"tokens"`
	Entropy      Entropy                `yaml:"entropy"`
	Keys         map[string]Key         `yaml:"keys"`
	Certificates map[string]Certificate `yaml:"certificates"`
	TUF          *TUF                   `yaml:"tuf"`
	Previous     *Previous              `yaml:"previous"`
	Request      *Request               `yaml:"request"`
	Rotation     *Rotation              `yaml:"rotation"`
	CRL          *Revocations           `yaml:"crl"`
	Drills       []Drill                `yaml:"drills"`
	Destroy      []hsm.Role             `yaml:"destroy"`
	Service      Service                `yaml:"service"`
	Outputs      Outputs                `yaml:"outputs"`

	source  []byte
	machine Machine        // whose part it is, see On
	uses    map[string]use // by key name; made by validate
}

// Source returns the octets that were parsed. Their SHA-256 is what people
// compare.
func (d *Definition) Source() []byte { return bytes.Clone(d.source) }

// Hash returns the SHA-256 of Source.
func (d *Definition) Hash() [sha256.Size]byte { return sha256.Sum256(d.source) }

// Rehearsal returns the definition as it is rehearsed: in the environment
// rehearsal, at any time. Its source and hash stay the same, so that people
// practise with the words of the real day.
func (d *Definition) Rehearsal() (*Definition, error) {
	if d.Environment == Rehearsal {
		return d, nil
	}
	r := *d
	r.Environment, r.Window = Rehearsal, Window{}
	if err := r.validate(); err != nil {
		return nil, fmt.Errorf("as a rehearsal: %w", err)
	}
	return &r, nil
}

// Window is when the ceremony may run, ends included. A production ceremony
// has both ends; a rehearsal may leave them out.
type Window struct {
	NotBefore time.Time `yaml:"not-before"`
	NotAfter  time.Time `yaml:"not-after"`
}

// Module is a PKCS#11 library, pinned by its hash.
type Module struct {
	Path   string `yaml:"path"`
	SHA256 string `yaml:"sha256"` // hexadecimal
}

// PersonRole is what a person does in a ceremony.
type PersonRole string

// The roles of people.
const (
	Administrator PersonRole = "administrator"
	Witness       PersonRole = "witness"
	Custodian     PersonRole = "custodian"
	Operator      PersonRole = "operator"
)

// Person takes part in the ceremony. Key is an OpenSSH public key line of type
// ssh-ed25519; in a rehearsal it may be left out.
type Person struct {
	ID   string     `yaml:"id"`
	Role PersonRole `yaml:"role"`
	Name string     `yaml:"name"`
	Key  string     `yaml:"key"`
}

// Token is a device that keys are made in.
type Token struct {
	// URI is "pkcs11:token=…" (RFC 7512) or "tpm2:?device=…", without a PIN.
	URI string `yaml:"uri"`
	// Module is a name of Definition.Modules; a TPM has none.
	Module string `yaml:"module"`
	// MustBeEmpty stops the ceremony when the token has a private key.
	MustBeEmpty bool `yaml:"must-be-empty"`
	// AcceptSoftware lets a production ceremony use a token that is known to be
	// software. Everyone reads it aloud.
	AcceptSoftware bool `yaml:"accept-software"`
	// Machine says on which of two machines the token is; "" when there is one.
	Machine Machine `yaml:"machine"`
	// PINParts is how many people type a part of the PIN, one after the other;
	// 0 means 1.
	PINParts int `yaml:"pin-parts"`
	// ChangePIN has a new PIN set at the end, when the token is not used any
	// more: by as many people, each with a part of their own.
	ChangePIN bool `yaml:"change-pin"`
}

// Label returns the token's label as its URI has it, or "".
func (t Token) Label() string {
	if !strings.HasPrefix(t.URI, "pkcs11:") {
		return ""
	}
	return tokenLabel(t.URI)
}

// Entropy says how the ceremony's public randomness is made.
type Entropy struct {
	Mode         string   `yaml:"mode"`         // commit-reveal
	Contributors []string `yaml:"contributors"` // ids of people, in order
}

// CommitReveal is the one mode of Entropy.
const CommitReveal = "commit-reveal"

// Protection says whether and how a key is backed up.
type Protection string

// The protections. The empty one means NonExtractable.
const (
	NonExtractable Protection = "non-extractable"
	NativeBackup   Protection = "native-backup"
	WrappedBackup  Protection = "wrapped-backup"
)

// Key is a key pair to be made. Its name becomes its label in the token. Of a
// sign-intermediate it was made elsewhere, and has an Algorithm alone.
type Key struct {
	Token      string        `yaml:"token"`
	Algorithm  hsm.Algorithm `yaml:"alg"`
	Protection Protection    `yaml:"protection"`
	Backup     *Backup       `yaml:"backup"` // of a wrapped-backup
}

// Usage is an extended key usage by its name in a definition.
type Usage string

// The extended key usages (RFC 5280, 4.2.1.12).
const (
	CodeSigning  Usage = "codeSigning"
	TimeStamping Usage = "timeStamping"
)

// Certificate is a certificate to be issued. Its place in the hierarchy
// follows from its shape: self-signed is a root (a timestamp root when what it
// issues is for timestamps), codeSigning an intermediate, timeStamping the
// leaf of the timestamp authority.
type Certificate struct {
	Key        string  `yaml:"key"`
	Issuer     string  `yaml:"issuer"`
	SelfSigned bool    `yaml:"self-signed"`
	Subject    Subject `yaml:"subject"`
	Years      int     `yaml:"years"`
	PathLen    *int    `yaml:"path-len"`
	EKU        []Usage `yaml:"eku"`
}

// Subject is a distinguished name.
type Subject struct {
	Country      string `yaml:"c"`
	Organization string `yaml:"o"`
	CommonName   string `yaml:"cn"`
}

// TUF describes the update repository.
type TUF struct {
	Threshold  int         `yaml:"threshold"`
	Custodians []TUFSigner `yaml:"custodians"`
	// Leaving are custodians of before who sign the new root and have no say
	// after it.
	Leaving          []TUFSigner `yaml:"leaving"`
	RootExpires      string      `yaml:"root-expires"`
	TimestampExpires string      `yaml:"timestamp-expires"`
}

// TUFSigner is a custodian's key in a token of their own.
type TUFSigner struct {
	ID         string `yaml:"id"`
	Key        string `yaml:"key"`
	SPKISHA256 string `yaml:"spki-sha256"`
}

// Service is what the keys will serve.
type Service struct {
	// URL is the base URL, scheme, host and port alone, without final slash.
	URL  string   `yaml:"url"`
	Logs Logs     `yaml:"logs"`
	OIDC []string `yaml:"oidc"` // issuers, at least one
}

// Logs names the first shard of every log. RekorV1 is optional.
type Logs struct {
	CT      *Shard `yaml:"ct"`
	Rekor   *Shard `yaml:"rekor"`
	RekorV1 *Shard `yaml:"rekor-v1"`
}

// Shard is one log.
type Shard struct {
	Shard string `yaml:"shard"`
	// Key names the shard's key. Without it the one key is taken whose name
	// is the log's, with or without a generation: "ct", "ct-1", "ct-g1".
	Key string `yaml:"key"`
	// Origin is the first line of the log's checkpoints. Without it a CT
	// log's is HOST[:port]/ct/SHARD and a Rekor v2 log's is HOST. A Rekor
	// log's cannot be set: clients derive it from the URL.
	Origin string `yaml:"origin"`
}

// Outputs says where the files go, relative to the folder of the ceremony.
type Outputs struct {
	Dir string `yaml:"dir"`
}

// ParseDefinition reads and validates a definition. Unknown keys, double keys,
// a second document, anchors, aliases, merges, tags, and numbers that are not
// plain decimal ones (all of which make a text mean something else than what is
// read aloud) are errors. Every error wraps
// ErrDefinition; those of validation name all faults, one a line.
func ParseDefinition(source []byte) (*Definition, error) {
	if len(source) > MaxDefinition {
		return nil, fmt.Errorf("%w: %d octets, at most %d", ErrDefinition, len(source), MaxDefinition)
	}
	if err := checkPlainYAML(source); err != nil {
		return nil, err
	}
	d := &Definition{source: bytes.Clone(source)}
	dec := yaml.NewDecoder(bytes.NewReader(source), yaml.Strict())
	if err := dec.Decode(d); err != nil {
		return nil, fmt.Errorf("%w: %s", ErrDefinition, yamlError(err))
	}
	if err := dec.Decode(new(any)); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: more than one document", ErrDefinition)
	}
	if err := d.validate(); err != nil {
		return nil, err
	}
	return d, nil
}

// maxYAMLDepth bounds flow nesting; the definition itself needs 3. maxYAMLLine
// bounds a line, in octets: the parser's time grows with the square of it.
const (
	maxYAMLDepth = 16
	maxYAMLLine  = 1000
)

// checkPlainYAML refuses what a reader of the text would not see.
func checkPlainYAML(source []byte) error {
	text := strings.ReplaceAll(string(source), "\r\n", "\n")
	for _, r := range text {
		if r == utf8.RuneError || !unicode.IsPrint(r) && r != '\n' && r != '\t' {
			return fmt.Errorf("%w: character %U, which nobody sees", ErrDefinition, r)
		}
	}
	n := 0
	for line := range bytes.Lines(source) {
		if n++; len(line) > maxYAMLLine {
			return fmt.Errorf("%w: line %d: longer than %d octets", ErrDefinition, n, maxYAMLLine)
		}
	}
	depth := 0
	for _, t := range lexer.Tokenize(string(source)) {
		switch t.Type {
		case token.AnchorType, token.AliasType, token.MergeKeyType, token.TagType, token.DirectiveType:
			return fmt.Errorf("%w: line %d: %s is not allowed", ErrDefinition, t.Position.Line, t.Type)
		case token.StringType, token.IntegerType, token.BinaryIntegerType, token.OctetIntegerType,
			token.HexIntegerType, token.FloatType, token.InfinityType, token.NanType:
			if yamlNumber.MatchString(t.Value) && !plainNumber.MatchString(t.Value) {
				return fmt.Errorf("%w: line %d: %s: YAML takes %.20s for a number and changes it: write it in quotes",
					ErrDefinition, t.Position.Line, fieldOf(t), t.Value)
			}
		case token.MappingStartType, token.SequenceStartType:
			depth++
		case token.MappingEndType, token.SequenceEndType:
			depth--
		}
		if depth > maxYAMLDepth || t.Position.IndentNum > 8*maxYAMLDepth {
			return fmt.Errorf("%w: line %d: nested too deeply", ErrDefinition, t.Position.Line)
		}
	}
	return nil
}

// yamlNumber is what YAML 1.1 or 1.2 takes for a number, of which a parser may
// drop zeros, signs and digits: hexadecimal text among it, if it has no letters
// or only an e. plainNumber is what every parser gives back as it is written.
var (
	yamlNumber = regexp.MustCompile(`^[-+]?(0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+|` +
		`[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF|nan|NaN|NAN))$`)
	plainNumber = regexp.MustCompile(`^(0|-?[1-9][0-9]{0,17})$`)
)

// fieldOf names the field that a value belongs to: the key before the nearest
// colon that is not inside something closed.
func fieldOf(t *token.Token) string {
	depth := 0
	for p := t.Prev; p != nil; p = p.Prev {
		switch p.Type {
		case token.MappingEndType, token.SequenceEndType:
			depth++
		case token.MappingStartType, token.SequenceStartType:
			depth = max(depth-1, 0)
		case token.MappingValueType:
			if depth == 0 && p.Prev != nil {
				return p.Prev.Value
			}
		}
	}
	return "a key"
}

var yamlPosition = regexp.MustCompile(`^\[(\d+):(\d+)\] `)

// yamlError returns the first line of a goccy error, which goes on with an
// excerpt, with its position in words.
func yamlError(err error) string {
	first, _, _ := bytes.Cut([]byte(err.Error()), []byte("\n"))
	return string(yamlPosition.ReplaceAll(first, []byte("line $1, column $2: ")))
}
