package trust

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"

	"github.com/chancery-ca/chancery/hsm"
)

// Roles lists every role in the order in which keys are made and written.
func Roles() []hsm.Role {
	return []hsm.Role{
		hsm.RoleRoot, hsm.RoleTSARoot, hsm.RoleIntermediate, hsm.RoleCT, hsm.RoleRekor, hsm.RoleRekorV1, hsm.RoleTSA, hsm.RoleTUFOnline,
	}
}

// Optional says whether a Chancery can do without the role.
func Optional(role hsm.Role) bool {
	return role == hsm.RoleRekorV1 || role == hsm.RoleTUFOnline
}

// KeyRing is the content of keys.yaml: where each role's key lives and which
// public key it has. It contains no secret and no PIN.
//
// The URI of a TPM names the folder of its key files, "tpm2:DIR?device=PATH", and
// that of a key in it "tpm2:DIR/NAME.pem?device=PATH"; octets that a URI cannot
// hold are percent-encoded. In the file DIR may be relative: it is then below the
// folder in which keys.yaml is, so that the ceremony's output folder can be
// moved with the key files in it. LoadKeyRing makes it absolute. A token's DIR
// may be empty, and its keys' URIs "tpm2:NAME.pem?device=PATH": the service's
// configuration then says where the folder is (SetFolder).
type KeyRing struct {
	// Tokens are the devices, by the names of the ceremony's definition.
	Tokens map[string]Token
	// Keys are the keys, by role.
	Keys map[hsm.Role]Key
}

// Token is a device as the service finds it again.
type Token struct {
	// URI is "pkcs11:token=…;serial=…" (RFC 7512) or "tpm2:DIR?device=PATH".
	URI string
	// Module is the path of the PKCS#11 module, "" for a TPM.
	Module string
}

// Key is a key pair in one of the tokens.
type Key struct {
	// Token is a name of KeyRing.Tokens.
	Token string
	// URI and SPKI are the hsm.Ref.
	URI  string
	SPKI [32]byte
}

// Ref returns the name under which hsm.Token.Open finds the key.
func (k Key) Ref() hsm.Ref { return hsm.Ref{URI: k.URI, SPKI: k.SPKI} }

// The wire form of keys.yaml.
type keyRingFile struct {
	Version int                     `yaml:"version"`
	Tokens  map[string]keyRingToken `yaml:"tokens"`
	Keys    map[string]keyRingKey   `yaml:"keys"`
}

type keyRingToken struct {
	URI    string `yaml:"uri"`
	Module string `yaml:"module,omitempty"`
}

type keyRingKey struct {
	Token string `yaml:"token"`
	URI   string `yaml:"uri"`
	SPKI  string `yaml:"spki-sha256"`
}

// The bounds of keys.yaml, in octets. The YAML parser's time grows with the
// square of a line.
const (
	maxKeyRing = 64 << 10
	maxLine    = 2000
)

// ParseKeyRing reads keys.yaml strictly: unknown and double keys, unknown
// roles and tokens, and a key that stands twice are errors, as is a ring
// without one of the roles that are not optional.
func ParseKeyRing(data []byte) (*KeyRing, error) {
	if len(data) > maxKeyRing {
		return nil, fmt.Errorf("read keys: %d octets, at most %d: %w", len(data), maxKeyRing, ErrFormat)
	}
	for line := range bytes.Lines(data) {
		if len(line) > maxLine {
			return nil, fmt.Errorf("read keys: a line of %d octets, at most %d: %w", len(line), maxLine, ErrFormat)
		}
	}
	dec := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict())
	var f keyRingFile
	if err := dec.Decode(&f); err != nil {
		return nil, fmt.Errorf("read keys: %w", errors.Join(ErrFormat, err))
	}
	if err := dec.Decode(new(any)); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read keys: more than one document: %w", ErrFormat)
	}
	if f.Version != 1 {
		return nil, fmt.Errorf("read keys: version %d, want 1: %w", f.Version, ErrFormat)
	}
	ring := &KeyRing{Tokens: map[string]Token{}, Keys: map[hsm.Role]Key{}}
	for name, t := range f.Tokens {
		ring.Tokens[name] = Token(t)
	}
	for role, k := range f.Keys {
		spki, err := hsm.ParseSPKIHash(k.SPKI)
		if err != nil {
			return nil, fmt.Errorf("read key %.40q: %w", role, errors.Join(ErrFormat, err))
		}
		ring.Keys[hsm.Role(role)] = Key{Token: k.Token, URI: k.URI, SPKI: spki}
	}
	if err := ring.check(); err != nil {
		return nil, fmt.Errorf("read keys: %w", err)
	}
	return ring, nil
}

// LoadKeyRing reads the keys.yaml at path. The folders of TPM key files become
// absolute, those of tokens that name none excepted.
func LoadKeyRing(path string) (*KeyRing, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open keys: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxKeyRing+1))
	if err != nil {
		return nil, fmt.Errorf("read keys: %w", err)
	}
	ring, err := ParseKeyRing(data)
	if err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("locate keys: %w", err)
	}
	for name, t := range ring.Tokens {
		if path, ok := tpmPath(t.URI); ok && path != "" {
			ring.below(name, dir)
		}
	}
	return ring, nil
}

// SetFolder says where the key files are of a TPM whose URI names no folder: in
// dir, an absolute path. It refuses a token whose URI names one, or that is no
// TPM (ErrFormat).
func (r *KeyRing) SetFolder(token, dir string) error {
	path, ok := tpmPath(r.Tokens[token].URI)
	switch {
	case !ok:
		return fmt.Errorf("token %.40q is no TPM: %w", token, ErrFormat)
	case path != "":
		return fmt.Errorf("keys.yaml names the folder of token %.40q: %.200q: %w", token, path, ErrFormat)
	case !filepath.IsAbs(dir):
		return fmt.Errorf("folder %.200q: want an absolute path: %w", dir, ErrFormat)
	}
	r.below(token, dir)
	return nil
}

// below puts the relative paths of a TPM and of its keys below dir.
func (r *KeyRing) below(token, dir string) {
	t := r.Tokens[token]
	t.URI = joinTPM(dir, t.URI)
	r.Tokens[token] = t
	for role, k := range r.Keys {
		if k.Token == token {
			k.URI = joinTPM(dir, k.URI)
			r.Keys[role] = k
		}
	}
}

// tpmPath returns the path in a TPM's URI, percent-encoded as it stands there.
func tpmPath(uri string) (path string, ok bool) {
	rest, ok := strings.CutPrefix(uri, "tpm2:")
	path, _, _ = strings.Cut(rest, "?")
	return path, ok
}

// joinTPM puts the path in a TPM's URI below dir, unless it is absolute or the
// handle of a persistent key. A path that is wrongly encoded stays: whoever
// opens it says so.
func joinTPM(dir, uri string) string {
	encoded, ok := tpmPath(uri)
	path, err := url.PathUnescape(encoded)
	if !ok || err != nil || filepath.IsAbs(path) || strings.HasPrefix(path, "0x") {
		return uri
	}
	absolute := url.URL{Path: filepath.Join(dir, path)}
	return "tpm2:" + absolute.EscapedPath() + strings.TrimPrefix(uri, "tpm2:"+encoded)
}

// Marshal returns keys.yaml with a heading, in the order of Roles.
func (r *KeyRing) Marshal() ([]byte, error) {
	if err := r.check(); err != nil {
		return nil, fmt.Errorf("write keys: %w", err)
	}
	var b bytes.Buffer
	b.WriteString("# Where each key lives and which public key it has. Written by the key ceremony;\n" +
		"# the service opens a key only if both fit. There is no secret in this file.\n")
	tokens := yaml.MapSlice{}
	for _, name := range slices.Sorted(maps.Keys(r.Tokens)) {
		tokens = append(tokens, yaml.MapItem{Key: name, Value: keyRingToken(r.Tokens[name])})
	}
	keys := yaml.MapSlice{}
	for _, role := range Roles() {
		if k, ok := r.Keys[role]; ok {
			keys = append(keys, yaml.MapItem{Key: string(role), Value: keyRingKey{k.Token, k.URI, hex.EncodeToString(k.SPKI[:])}})
		}
	}
	body, err := yaml.Marshal(yaml.MapSlice{{Key: "version", Value: 1}, {Key: "tokens", Value: tokens}, {Key: "keys", Value: keys}})
	if err != nil {
		return nil, fmt.Errorf("write keys: %w", err)
	}
	b.Write(body)
	return b.Bytes(), nil
}

func (r *KeyRing) check() error {
	for name, t := range r.Tokens {
		if name == "" || !tokenURI(t.URI) {
			return fmt.Errorf("token %.40q: URI %.200q: %w", name, t.URI, ErrFormat)
		}
	}
	seen := map[[32]byte]hsm.Role{}
	for role, k := range r.Keys {
		if !slices.Contains(Roles(), role) {
			return fmt.Errorf("unknown role %.40q: %w", role, ErrFormat)
		}
		if _, ok := r.Tokens[k.Token]; !ok {
			return fmt.Errorf("key %s: unknown token %.40q: %w", role, k.Token, ErrFormat)
		}
		if !tokenURI(k.URI) || k.SPKI == ([32]byte{}) {
			return fmt.Errorf("key %s: URI %.200q or no public key hash: %w", role, k.URI, ErrFormat)
		}
		if other, ok := seen[k.SPKI]; ok {
			return fmt.Errorf("roles %s and %s have one key: %w", role, other, ErrFormat)
		}
		seen[k.SPKI] = role
	}
	for _, role := range Roles() {
		if _, ok := r.Keys[role]; !ok && !Optional(role) {
			return fmt.Errorf("role %s has no key: %w", role, ErrIncomplete)
		}
	}
	return nil
}

// tokenURI accepts the schemes of hsm.Ref and refuses a URI that carries a
// PIN (RFC 7512, 2.4: pin-value, pin-source).
func tokenURI(uri string) bool {
	scheme := hsm.Ref{URI: uri}.Scheme()
	lower := strings.ToLower(uri)
	return (scheme == "pkcs11" || scheme == "tpm2") &&
		!strings.Contains(lower, "pin-value=") && !strings.Contains(lower, "pin-source=")
}
