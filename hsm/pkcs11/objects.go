package pkcs11

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/ThalesIgnite/crypto11"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/miekg/pkcs11"
)

// pair is a key pair as found on one connection.
type pair struct {
	conn    *connection
	private pkcs11.ObjectHandle
	public  pkcs11.ObjectHandle
	id      []byte
	label   string
	pub     *ecdsa.PublicKey
	spki    [32]byte
	signer  crypto11.Signer
	works   atomic.Bool // it has signed on conn
}

// proved notes that the pair has signed, or marks the error of one that has not.
func (p *pair) proved(err error) error {
	switch {
	case err == nil:
		p.works.Store(true)
	case !p.works.Load():
		return unproven{err}
	}
	return err
}

// ref gives the pair its name in the token that u names.
func (p *pair) ref(u uri) hsm.Ref {
	return hsm.Ref{URI: u.key(p.label, p.id).String(), SPKI: p.spki}
}

// maxObjects bounds a search: a token that lists more is not one of ours.
const maxObjects = 4096

// find lists the objects of a class with this label and id; an empty one is
// not compared. It makes no assumption about their order.
func (c *connection) find(s pkcs11.SessionHandle, class uint, label string, id []byte) ([]pkcs11.ObjectHandle, error) {
	template := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, class)}
	if label != "" {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_LABEL, label))
	}
	if len(id) > 0 {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_ID, id))
	}
	if err := c.raw.FindObjectsInit(s, template); err != nil {
		return nil, fmt.Errorf("find objects: %w", classify(err))
	}
	var all []pkcs11.ObjectHandle
	var err error
	for {
		var some []pkcs11.ObjectHandle
		some, _, err = c.raw.FindObjects(s, 64)
		all = append(all, some...)
		if err != nil || len(some) == 0 || len(all) > maxObjects {
			break
		}
	}
	if final := c.raw.FindObjectsFinal(s); err == nil {
		err = final
	}
	if err != nil {
		return nil, fmt.Errorf("find objects: %w", classify(err))
	}
	return all, nil
}

// one is find for exactly one object.
func (c *connection) one(s pkcs11.SessionHandle, class uint, what, label string, id []byte) (pkcs11.ObjectHandle, error) {
	objects, err := c.find(s, class, label, id)
	switch {
	case err != nil:
		return 0, err
	case len(objects) == 0:
		return 0, fmt.Errorf("%s key: %w", what, hsm.ErrNotFound)
	case len(objects) > 1:
		return 0, fmt.Errorf("%d %s keys: %w", len(objects), what, hsm.ErrAmbiguous)
	}
	return objects[0], nil
}

// read returns one attribute. Attributes are read one by one: some modules fail
// a whole batch for one attribute that they do not know.
func (c *connection) read(s pkcs11.SessionHandle, object pkcs11.ObjectHandle, attribute uint) ([]byte, error) {
	values, err := c.raw.GetAttributeValue(s, object, []*pkcs11.Attribute{pkcs11.NewAttribute(attribute, nil)})
	if err != nil {
		return nil, classify(err)
	}
	return values[0].Value, nil
}

// resolve finds the one pair that u names. With spki the public key must hash
// to it (ErrMismatch). The pair satisfies the role's policy.
func (c *connection) resolve(u uri, spki *[32]byte, role hsm.Role) (*pair, error) {
	var p *pair
	err := c.withAdmin(func(s pkcs11.SessionHandle) (err error) {
		p, err = c.locatePair(s, u)
		if err != nil {
			return err
		}
		if spki != nil && p.spki != *spki {
			return fmt.Errorf("spki %x: %w", p.spki, hsm.ErrMismatch)
		}
		attributes, err := c.attributes(s, p.private, privateAttributes, "")
		if err != nil {
			return err
		}
		return role.Policy().Check(attributes)
	})
	if err != nil {
		return nil, err
	}
	return p, c.bind(p)
}

// locatePair finds the one private object that u names and the one public
// object with the same id (or label, where there is no id).
func (c *connection) locatePair(s pkcs11.SessionHandle, u uri) (*pair, error) {
	p := &pair{conn: c}
	var err error
	if p.private, err = c.one(s, pkcs11.CKO_PRIVATE_KEY, "private", u.object, u.id); err != nil {
		return nil, err
	}
	if p.id, err = c.read(s, p.private, pkcs11.CKA_ID); err != nil {
		return nil, fmt.Errorf("read id: %w", err)
	}
	label, err := c.read(s, p.private, pkcs11.CKA_LABEL)
	if err != nil {
		return nil, fmt.Errorf("read label: %w", err)
	}
	p.label = string(label)
	// crypto11 will look with both, so they must single out this object.
	if _, err = c.one(s, pkcs11.CKO_PRIVATE_KEY, "private", p.label, p.id); err != nil {
		return nil, err
	}
	byLabel := p.label
	if len(p.id) > 0 {
		byLabel = ""
		// Another private key with this id could be taken for this one.
		if _, err = c.one(s, pkcs11.CKO_PRIVATE_KEY, "private", "", p.id); err != nil {
			return nil, err
		}
	}
	if p.public, err = c.one(s, pkcs11.CKO_PUBLIC_KEY, "public", byLabel, p.id); err != nil {
		return nil, err
	}
	if p.pub, err = c.publicKey(s, p.public); err != nil {
		return nil, err
	}
	p.spki, err = hsm.SPKIHash(p.pub)
	return p, err
}

// publicKey reads the public key from a public object.
func (c *connection) publicKey(s pkcs11.SessionHandle, object pkcs11.ObjectHandle) (*ecdsa.PublicKey, error) {
	kind, err := c.read(s, object, pkcs11.CKA_KEY_TYPE)
	if err != nil {
		return nil, fmt.Errorf("read key type: %w", err)
	}
	if n, ok := number(kind); !ok || n != pkcs11.CKK_EC {
		return nil, fmt.Errorf("key type %x: %w", kind, hsm.ErrUnsupported)
	}
	params, err := c.read(s, object, pkcs11.CKA_EC_PARAMS)
	if err != nil {
		return nil, fmt.Errorf("read curve: %w", err)
	}
	point, err := c.read(s, object, pkcs11.CKA_EC_POINT)
	if err != nil {
		return nil, fmt.Errorf("read point: %w", err)
	}
	return parsePublic(params, point)
}

// bind gets crypto11's signer for p and compares what it says with p.
func (c *connection) bind(p *pair) error {
	var label []byte
	if p.label != "" {
		label = []byte(p.label)
	}
	signer, err := c.context.FindKeyPair(p.id, label)
	if err != nil {
		return fmt.Errorf("find pair: %w", classify(err))
	}
	if signer == nil {
		return fmt.Errorf("find pair: %w", hsm.ErrNotFound)
	}
	if !p.pub.Equal(signer.Public()) {
		return fmt.Errorf("find pair: %w", hsm.ErrAmbiguous)
	}
	p.signer = signer
	return nil
}

// The curves by their DER ECParameters: a named curve's OID (RFC 5480,
// Section 2.1.1.1), or its name as a PrintableString, which PKCS#11 v3.0 allows.
var (
	paramsP256 = []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}
	paramsP384 = []byte{0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22}
	nameP256   = append([]byte{0x13, 9}, "secp256r1"...)
	nameP384   = append([]byte{0x13, 9}, "secp384r1"...)
)

// params returns the DER ECParameters of an algorithm's curve, nil if unknown.
func params(a hsm.Algorithm) []byte {
	switch a {
	case hsm.ECDSAP256:
		return paramsP256
	case hsm.ECDSAP384:
		return paramsP384
	}
	return nil
}

// parsePublic reads CKA_EC_PARAMS and CKA_EC_POINT. The point is an
// uncompressed one (SEC 1, Section 2.3.3) in a DER OCTET STRING, or bare as
// some older modules have it. Errors wrap ErrUnsupported.
func parsePublic(params, point []byte) (*ecdsa.PublicKey, error) {
	var curve elliptic.Curve
	switch {
	case bytes.Equal(params, paramsP256), bytes.Equal(params, nameP256):
		curve = elliptic.P256()
	case bytes.Equal(params, paramsP384), bytes.Equal(params, nameP384):
		curve = elliptic.P384()
	default:
		return nil, fmt.Errorf("curve %.40x: %w", params, hsm.ErrUnsupported)
	}
	size := 1 + 2*((curve.Params().BitSize+7)/8)
	if len(point) != size {
		var inner []byte
		rest, err := asn1.Unmarshal(point, &inner)
		if err != nil || len(rest) != 0 {
			return nil, fmt.Errorf("point of %d octets is not an OCTET STRING: %w", len(point), hsm.ErrUnsupported)
		}
		point = inner
	}
	pub, err := ecdsa.ParseUncompressedPublicKey(curve, point)
	if err != nil {
		return nil, fmt.Errorf("point of %d octets: %w (%w)", len(point), hsm.ErrUnsupported, err)
	}
	return pub, nil
}

// number reads a CK_ULONG in the machine's order, of 4 or 8 octets.
func number(b []byte) (uint64, bool) {
	switch len(b) {
	case 4:
		return uint64(binary.NativeEndian.Uint32(b)), true
	case 8:
		return binary.NativeEndian.Uint64(b), true
	}
	return 0, false
}

// attribute is a PKCS#11 attribute that we read back.
type attribute struct {
	code uint
	name string // without CKA_
	flag bool   // a CK_BBOOL
}

// privateAttributes are read from the private object.
var privateAttributes = []attribute{
	{pkcs11.CKA_TOKEN, "TOKEN", true},
	{pkcs11.CKA_PRIVATE, "PRIVATE", true},
	{pkcs11.CKA_SENSITIVE, "SENSITIVE", true},
	{pkcs11.CKA_ALWAYS_SENSITIVE, "ALWAYS_SENSITIVE", true},
	{pkcs11.CKA_EXTRACTABLE, "EXTRACTABLE", true},
	{pkcs11.CKA_NEVER_EXTRACTABLE, "NEVER_EXTRACTABLE", true},
	{pkcs11.CKA_LOCAL, "LOCAL", true},
	{pkcs11.CKA_MODIFIABLE, "MODIFIABLE", true},
	{pkcs11.CKA_COPYABLE, "COPYABLE", true},
	{pkcs11.CKA_SIGN, "SIGN", true},
	{pkcs11.CKA_SIGN_RECOVER, "SIGN_RECOVER", true},
	{pkcs11.CKA_DECRYPT, "DECRYPT", true},
	{pkcs11.CKA_UNWRAP, "UNWRAP", true},
	{pkcs11.CKA_DERIVE, "DERIVE", true},
	{pkcs11.CKA_WRAP_WITH_TRUSTED, "WRAP_WITH_TRUSTED", true},
	{pkcs11.CKA_ALWAYS_AUTHENTICATE, "ALWAYS_AUTHENTICATE", true},
	{pkcs11.CKA_KEY_TYPE, "KEY_TYPE", false},
	{pkcs11.CKA_KEY_GEN_MECHANISM, "KEY_GEN_MECHANISM", false},
	{pkcs11.CKA_EC_PARAMS, "EC_PARAMS", false},
	{pkcs11.CKA_ID, "ID", false},
	{pkcs11.CKA_LABEL, "LABEL", false},
}

// publicAttributes are read from the public object.
var publicAttributes = []attribute{
	{pkcs11.CKA_TOKEN, "TOKEN", true},
	{pkcs11.CKA_PRIVATE, "PRIVATE", true},
	{pkcs11.CKA_LOCAL, "LOCAL", true},
	{pkcs11.CKA_MODIFIABLE, "MODIFIABLE", true},
	{pkcs11.CKA_VERIFY, "VERIFY", true},
	{pkcs11.CKA_VERIFY_RECOVER, "VERIFY_RECOVER", true},
	{pkcs11.CKA_ENCRYPT, "ENCRYPT", true},
	{pkcs11.CKA_WRAP, "WRAP", true},
	{pkcs11.CKA_DERIVE, "DERIVE", true},
	{pkcs11.CKA_KEY_TYPE, "KEY_TYPE", false},
	{pkcs11.CKA_EC_PARAMS, "EC_PARAMS", false},
	{pkcs11.CKA_EC_POINT, "EC_POINT", false},
	{pkcs11.CKA_ID, "ID", false},
	{pkcs11.CKA_LABEL, "LABEL", false},
}

// attributes reads attributes one by one into the form of
// hsm.Evidence.Attributes. An attribute that the module does not have is noted
// as unavailable; a lost connection or a busy token is an error.
func (c *connection) attributes(s pkcs11.SessionHandle, object pkcs11.ObjectHandle, list []attribute, prefix string) (map[string]string, error) {
	out := make(map[string]string, len(list))
	for _, a := range list {
		value, err := c.read(s, object, a.code)
		var code *codeError
		switch {
		case errors.As(err, &code) && !code.connection():
			out[prefix+a.name] = "unavailable: " + codeName(code.code)
		case err != nil:
			return nil, fmt.Errorf("read %s: %w", a.name, err)
		default:
			out[prefix+a.name] = show(a, value)
		}
	}
	return out, nil
}

// show writes a value as hsm.Evidence.Attributes has it.
func show(a attribute, value []byte) string {
	if a.flag && len(value) == 1 {
		switch value[0] {
		case 1: // CK_TRUE
			return "true"
		case 0: // CK_FALSE
			return "false"
		}
	}
	return hex.EncodeToString(value)
}
