package tuf

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/secure-systems-lab/go-securesystemslib/cjson"
	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/chancery-ca/chancery/hsm"
)

// Signature is one key's signature of a draft.
type Signature struct {
	// KeyID is the key's id, 64 hexadecimal digits.
	KeyID string
	// Sig is ASN.1 DER over the SHA-256 of the draft's payload.
	Sig []byte
}

// signatureFile is the wire form of a Signature that travels alone.
type signatureFile struct {
	KeyID string `json:"keyid"`
	Sig   string `json:"sig"`
}

// maxSignature bounds the octets of a DER P-256 signature (72) and of the file
// of one.
const (
	maxSignature     = 80
	maxSignatureFile = 1024
)

// Marshal returns the signature as a file of its own, for one who brings it
// from another machine.
func (s Signature) Marshal() ([]byte, error) {
	raw, err := json.Marshal(signatureFile{s.KeyID, hex.EncodeToString(s.Sig)})
	if err != nil {
		return nil, fmt.Errorf("encode signature: %w", err)
	}
	return append(raw, '\n'), nil
}

// ParseSignature reads what Marshal wrote, and nothing else.
func ParseSignature(data []byte) (Signature, error) {
	var f signatureFile
	if len(data) > maxSignatureFile {
		return Signature{}, fmt.Errorf("read signature: %d octets: %w", len(data), ErrFormat)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&f); err != nil {
		return Signature{}, fmt.Errorf("read signature: %w: %w", ErrFormat, err)
	}
	sig, err := hex.DecodeString(f.Sig)
	if err != nil {
		return Signature{}, fmt.Errorf("read signature: %w: %w", ErrFormat, err)
	}
	s := Signature{f.KeyID, sig}
	if again, err := s.Marshal(); err != nil || !bytes.Equal(again, data) || !s.valid() {
		return Signature{}, fmt.Errorf("read signature: not in our form: %w", ErrFormat)
	}
	return s, nil
}

func (s Signature) valid() bool {
	id, err := hex.DecodeString(s.KeyID)
	return err == nil && len(id) == sha256.Size && hex.EncodeToString(id) == s.KeyID && len(s.Sig) > 0 && len(s.Sig) <= maxSignature
}

// document is the signed part of a metadata file.
type document struct {
	role    Role
	version int64
	expires time.Time
	payload []byte // its canonical JSON
	file    func([]Signature) ([]byte, error)
}

// newDocument encodes the signed part of a role.
func newDocument[T metadata.Roles](role Role, version int64, expires time.Time, signed T) (document, error) {
	if version < 1 || version > maxVersion {
		return document{}, fmt.Errorf("%s version %d: %w", role, version, ErrVersion)
	}
	if expires.Location() != time.UTC || expires.Nanosecond() != 0 || expires.Year() < 2000 || expires.Year() > 9999 {
		return document{}, fmt.Errorf("%s expires %s: not UTC in whole seconds: %w", role, expires, ErrLayout)
	}
	payload, err := cjson.EncodeCanonical(signed)
	if err != nil {
		return document{}, fmt.Errorf("encode %s: %w", role, err)
	}
	return document{role, version, expires, payload, func(sigs []Signature) ([]byte, error) {
		m := metadata.Metadata[T]{Signed: signed, Signatures: []metadata.Signature{}}
		for _, s := range sigs {
			m.Signatures = append(m.Signatures, metadata.Signature{KeyID: s.KeyID, Signature: s.Sig})
		}
		raw, err := json.MarshalIndent(m, "", "  ")
		if err != nil {
			return nil, fmt.Errorf("encode %s: %w", role, err)
		}
		return append(raw, '\n'), nil
	}}, nil
}

// decode reads a metadata file into go-tuf's type. It is lenient: matched makes
// it strict.
func decode[T metadata.Roles](data []byte) (signed T, sigs []Signature, err error) {
	if len(data) > MaxFile {
		return signed, nil, fmt.Errorf("%d octets, at most %d: %w", len(data), MaxFile, ErrFormat)
	}
	m, err := new(metadata.Metadata[T]).FromBytes(data)
	if err != nil {
		return signed, nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	for _, s := range m.Signatures {
		sigs = append(sigs, Signature{s.KeyID, s.Signature})
	}
	return m.Signed, sigs, nil
}

// parsed is a document that was read, with the signatures on it.
type parsed struct {
	document
	signatures []Signature
}

// matched returns the document with its signatures if data is what this package
// writes of them.
func (d document) matched(data []byte, sigs []Signature) (*parsed, error) {
	if len(sigs) > 2*maxCustodians {
		return nil, fmt.Errorf("%d signatures: %w", len(sigs), ErrFormat)
	}
	for i, s := range sigs {
		if !s.valid() || i > 0 && sigs[i-1].KeyID >= s.KeyID {
			return nil, fmt.Errorf("signature %d is malformed or out of order: %w", i+1, ErrFormat)
		}
	}
	again, err := d.file(sigs)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, data) {
		return nil, fmt.Errorf("not in the one form that we write: %w", ErrFormat)
	}
	return &parsed{d, sigs}, nil
}

// verify checks every signature and every authority's threshold.
func (p *parsed) verify(by ...authority) error {
	d := Draft{doc: p.document, authorities: by}
	for _, s := range p.signatures {
		if err := d.Add(s); err != nil {
			return err
		}
	}
	return d.Err()
}

// Draft is a metadata file that collects signatures. It is not safe for
// concurrent use.
type Draft struct {
	doc         document
	authorities []authority // each needs its threshold
	signatures  []Signature // sorted by key id
}

// NewRoot drafts the first root (previous is nil) or the successor of previous,
// valid from now for Layout.Expires.Root. A successor needs a threshold of the
// old custodians and one of the new; who is both signs once.
func NewRoot(layout Layout, previous *Root, now time.Time) (*Draft, error) {
	r := &Root{Version: 1, Expires: layout.Expires.Root.After(now), Layout: layout}
	if previous != nil {
		r.Version = previous.Version + 1
	}
	doc, err := r.document()
	if err != nil {
		return nil, fmt.Errorf("make root: %w", err)
	}
	by, err := rootAuthorities(r, previous)
	if err != nil {
		return nil, fmt.Errorf("make root: %w", err)
	}
	return &Draft{doc: doc, authorities: by}, nil
}

func rootAuthorities(r, previous *Root) ([]authority, error) {
	own, err := r.Layout.custodians(fmt.Sprintf("custodians of root %d", r.Version))
	if err != nil || previous == nil {
		return []authority{own}, err
	}
	old, err := previous.Layout.custodians(fmt.Sprintf("custodians of root %d", previous.Version))
	return []authority{old, own}, err
}

// ReadRootDraft reads a draft that came from another machine, with the
// signatures that it has; previous is the root before it, or nil. It fails with
// ErrFormat, ErrVersion, or as Add does.
func ReadRootDraft(data []byte, previous *Root) (*Draft, error) {
	r, p, err := parseRoot(data)
	if err != nil {
		return nil, err
	}
	want := int64(1)
	if previous != nil {
		want = previous.Version + 1
	}
	if r.Version != want {
		return nil, fmt.Errorf("read root: version %d, want %d: %w", r.Version, want, ErrVersion)
	}
	by, err := rootAuthorities(r, previous)
	if err != nil {
		return nil, fmt.Errorf("read root: %w", err)
	}
	return p.draft(by...)
}

// ReadTargetsDraft is ReadRootDraft for targets that the custodians of root
// sign.
func ReadTargetsDraft(data []byte, root *Root) (*Draft, error) {
	_, p, err := parseTargets(data)
	if err != nil {
		return nil, err
	}
	by, err := root.Layout.custodians("custodians")
	if err != nil {
		return nil, fmt.Errorf("read targets: %w", err)
	}
	return p.draft(by)
}

// draft goes on with a document that was read.
func (p *parsed) draft(by ...authority) (*Draft, error) {
	d := &Draft{doc: p.document, authorities: by}
	for _, s := range p.signatures {
		if err := d.Add(s); err != nil {
			return nil, fmt.Errorf("read %s: %w", p.role, err)
		}
	}
	return d, nil
}

// Role says which of the repository's roles the file is for.
func (d *Draft) Role() Role { return d.doc.role }

// Version is the file's version, 1 or more.
func (d *Draft) Version() int64 { return d.doc.version }

// Expires is when clients stop to accept the file, in UTC.
func (d *Draft) Expires() time.Time { return d.doc.expires }

// Name returns the name of the file in the repository.
func (d *Draft) Name() string { return d.doc.role.fileName(d.doc.version) }

// Payload returns the octets that are signed: the canonical JSON of the signed
// part (TUF 1.0.31, Section 4.2).
func (d *Draft) Payload() []byte { return bytes.Clone(d.doc.payload) }

// Digest returns the SHA-256 of Payload: what a token signs and people compare.
func (d *Draft) Digest() [sha256.Size]byte { return sha256.Sum256(d.doc.payload) }

// Sign signs the draft with a key that has a say in it and adds the signature.
// It asks the token only when the signature would be taken: ErrForeign,
// ErrDouble, or an error of the key.
func (d *Draft) Sign(ctx context.Context, key hsm.Key) (Signature, error) {
	pub, ok := key.Public().(*ecdsa.PublicKey)
	if !ok {
		return Signature{}, fmt.Errorf("sign %s: %T: %w", d.doc.role, key.Public(), ErrForeign)
	}
	id, err := KeyID(pub)
	if err != nil {
		return Signature{}, fmt.Errorf("sign %s: %w: %w", d.doc.role, ErrForeign, err)
	}
	if _, err := d.admit(id); err != nil {
		return Signature{}, fmt.Errorf("sign %s: %w", d.doc.role, err)
	}
	digest := d.Digest()
	sig, err := key.SignContext(ctx, digest[:], crypto.SHA256)
	if err != nil {
		return Signature{}, fmt.Errorf("sign %s: %w", d.doc.role, err)
	}
	s := Signature{id, sig}
	return s, d.Add(s)
}

// Add adds a signature that was made elsewhere. It fails with ErrForeign,
// ErrDouble or ErrSignature, and then changes nothing.
func (d *Draft) Add(s Signature) error {
	pub, err := d.admit(s.KeyID)
	if err != nil {
		return fmt.Errorf("add signature to %s: %w", d.doc.role, err)
	}
	digest := d.Digest()
	if !s.valid() || !ecdsa.VerifyASN1(pub, digest[:], s.Sig) {
		return fmt.Errorf("add signature to %s: key %.16s…: %w", d.doc.role, s.KeyID, ErrSignature)
	}
	s.Sig = bytes.Clone(s.Sig)
	d.signatures = append(d.signatures, s)
	slices.SortFunc(d.signatures, func(a, b Signature) int { return cmp.Compare(a.KeyID, b.KeyID) })
	return nil
}

// admit returns the key of an id that may still sign.
func (d *Draft) admit(id string) (*ecdsa.PublicKey, error) {
	if d.signed(id) {
		return nil, fmt.Errorf("key %.16s…: %w", id, ErrDouble)
	}
	for _, a := range d.authorities {
		if pub := a.keys[id]; pub != nil {
			return pub, nil
		}
	}
	return nil, fmt.Errorf("key %.16s…: %w", id, ErrForeign)
}

func (d *Draft) signed(id string) bool {
	return slices.ContainsFunc(d.signatures, func(s Signature) bool { return s.KeyID == id })
}

// Err returns nil when enough have signed, else ErrThreshold and who is missing.
func (d *Draft) Err() error {
	var errs []error
	for _, a := range d.authorities {
		n := 0
		for _, id := range a.ids() {
			if d.signed(id) {
				n++
			}
		}
		if n < a.threshold {
			errs = append(errs, fmt.Errorf("%s: %d of %d signatures of the %s: %w", d.doc.role, n, a.threshold, a.name, ErrThreshold))
		}
	}
	return errors.Join(errs...)
}

// Signatures returns the signatures there are, by key id.
func (d *Draft) Signatures() []Signature { return slices.Clone(d.signatures) }

// Bytes returns the metadata file with the signatures there are. Before Err is
// nil it is a draft for another machine, not a file of a repository.
func (d *Draft) Bytes() ([]byte, error) { return d.doc.file(d.signatures) }

// strictJSON decodes one JSON value without unknown fields.
func strictJSON(data []byte, into any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return err
	}
	if err := dec.Decode(new(any)); !errors.Is(err, io.EOF) {
		return errors.New("more than one value")
	}
	return nil
}
