package tpm

import (
	"bytes"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-tpm/tpm2"
	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// ErrKeyFile: a file is not a key file or creation file that we accept.
var ErrKeyFile = errors.New("unacceptable TPM key file")

// keyFile is a private key as a TSS2 PEM file keeps it
// (draft-bottomley-tpm2-keys, Section 3): what TPM2_Create made, which only the
// same TPM can load again.
//
//	Label: NAME
//	Id: 32 hexadecimal digits
//	-----BEGIN TSS2 PRIVATE KEY-----
//	TPMKey ::= SEQUENCE {
//	    type        OBJECT IDENTIFIER (2.23.133.10.1.3, a loadable key),
//	    emptyAuth   [0] EXPLICIT BOOLEAN OPTIONAL,
//	    parent      INTEGER,
//	    pubkey      OCTET STRING (TPM2B_PUBLIC),
//	    privkey     OCTET STRING (TPM2B_PRIVATE) }
//	-----END TSS2 PRIVATE KEY-----
//
// The two lines before it are ours: readers of PEM skip them (RFC 7468,
// Section 2). They are not inside, as the description that the draft has, because
// widespread readers know no such field. A file without them has no id. Keys
// with a policy, a secret to import or an RSA parent are refused.
type keyFile struct {
	label     string
	id        []byte // nil if the file says none
	emptyAuth bool
	parent    tpm2.TPMHandle // persistent, or TPM_RH_OWNER: the SRK made from srkTemplate
	public    []byte         // TPMT_PUBLIC
	private   []byte         // TPM2B_PRIVATE's buffer
}

const (
	pemType = "TSS2 PRIVATE KEY"
	// maxFile bounds a key file and a creation file, in octets.
	maxFile = 16 << 10
)

// oidLoadable is id-loadablekey.
var oidLoadable = asn1.ObjectIdentifier{2, 23, 133, 10, 1, 3}

// marshal writes the file.
func (f *keyFile) marshal() ([]byte, error) {
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(oidLoadable)
		if f.emptyAuth {
			b.AddASN1(cbasn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) { b.AddASN1Boolean(true) })
		}
		b.AddASN1Int64(int64(f.parent))
		b.AddASN1OctetString(sized(f.public))
		b.AddASN1OctetString(sized(f.private))
	})
	der, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("encode key file: %w", err)
	}
	var text bytes.Buffer
	if f.id != nil {
		fmt.Fprintf(&text, "Label: %s\nId: %x\n", f.label, f.id)
	}
	if err := pem.Encode(&text, &pem.Block{Type: pemType, Bytes: der}); err != nil {
		return nil, fmt.Errorf("encode key file: %w", err)
	}
	return text.Bytes(), nil
}

// sized puts the length of a TPM2B before its octets.
func sized(b []byte) []byte {
	return append([]byte{byte(len(b) >> 8), byte(len(b))}, b...)
}

// parseKeyFile reads a key file. It accepts what marshal writes and what other
// tools write without the two lines before the PEM. The error wraps ErrKeyFile.
func parseKeyFile(text []byte) (*keyFile, error) {
	if len(text) > maxFile {
		return nil, fmt.Errorf("%d octets: %w", len(text), ErrKeyFile)
	}
	f := &keyFile{}
	start := bytes.Index(text, []byte("-----BEGIN "))
	if start < 0 {
		return nil, fmt.Errorf("no PEM: %w", ErrKeyFile)
	}
	if err := f.parseLines(string(text[:start])); err != nil {
		return nil, err
	}
	block, rest := pem.Decode(text[start:])
	if block == nil || block.Type != pemType || len(block.Headers) != 0 || len(bytes.TrimSpace(rest)) != 0 {
		return nil, fmt.Errorf("not one %s and nothing else: %w", pemType, ErrKeyFile)
	}
	if err := f.parseDER(block.Bytes); err != nil {
		return nil, err
	}
	return f, nil
}

// parseLines reads the lines before the PEM: both, or none.
func (f *keyFile) parseLines(text string) error {
	if text == "" {
		return nil
	}
	rest, ok := strings.CutPrefix(text, "Label: ")
	label, rest, cut := strings.Cut(rest, "\n")
	digits, idOK := strings.CutPrefix(rest, "Id: ")
	digits, end := strings.CutSuffix(digits, "\n")
	id, err := hex.DecodeString(digits)
	spec := hsm.Spec{Label: label, ID: id, Algorithm: hsm.ECDSAP256}
	if !ok || !cut || !idOK || !end || err != nil || digits != strings.ToLower(digits) || hsm.CheckSpec(spec) != nil {
		return fmt.Errorf("before the PEM there is more than a label and an id: %w", ErrKeyFile)
	}
	f.label, f.id = label, id
	return nil
}

// parseDER reads a TPMKey.
func (f *keyFile) parseDER(der []byte) error {
	input := cryptobyte.String(der)
	var key cryptobyte.String
	var oid asn1.ObjectIdentifier
	if !input.ReadASN1(&key, cbasn1.SEQUENCE) || !input.Empty() || !key.ReadASN1ObjectIdentifier(&oid) {
		return fmt.Errorf("not a TPMKey: %w", ErrKeyFile)
	}
	if !oid.Equal(oidLoadable) {
		return fmt.Errorf("type %s, want %s: %w", oid, oidLoadable, ErrKeyFile)
	}
	var wrapped cryptobyte.String
	var given bool
	if !key.ReadOptionalASN1(&wrapped, &given, cbasn1.Tag(0).ContextSpecific().Constructed()) {
		return fmt.Errorf("emptyAuth: %w", ErrKeyFile)
	}
	if given && (!wrapped.ReadASN1Boolean(&f.emptyAuth) || !wrapped.Empty()) {
		return fmt.Errorf("emptyAuth: %w", ErrKeyFile)
	}
	var parent uint64
	var public, private cryptobyte.String
	if !key.ReadASN1Integer(&parent) {
		return fmt.Errorf("no parent, or a policy, secret or description before it: %w", ErrKeyFile)
	}
	if !key.ReadASN1(&public, cbasn1.OCTET_STRING) || !key.ReadASN1(&private, cbasn1.OCTET_STRING) || !key.Empty() {
		return fmt.Errorf("pubkey, privkey: %w", ErrKeyFile)
	}
	if parent != uint64(tpm2.TPMRHOwner) && !isPersistent(parent) {
		return fmt.Errorf("parent %#x: %w", parent, ErrKeyFile)
	}
	f.parent = tpm2.TPMHandle(parent)
	var ok bool
	if f.public, ok = unsized(public); !ok {
		return fmt.Errorf("pubkey is no TPM2B: %w", ErrKeyFile)
	}
	if f.private, ok = unsized(private); !ok {
		return fmt.Errorf("privkey is no TPM2B: %w", ErrKeyFile)
	}
	_, err := parsePublic(f.public)
	return err
}

// unsized takes the octets out of a TPM2B that is not empty.
func unsized(b []byte) ([]byte, bool) {
	input := cryptobyte.String(b)
	var inner cryptobyte.String
	if !input.ReadUint16LengthPrefixed(&inner) || !input.Empty() || len(inner) == 0 {
		return nil, false
	}
	return inner, true
}

// isPersistent says whether handle is a persistent object of the owner
// (Part 2, Section 7.5: 0x81000000 to 0x817FFFFF).
func isPersistent(handle uint64) bool {
	return handle>>24 == 0x81 && handle < 0x81800000
}
