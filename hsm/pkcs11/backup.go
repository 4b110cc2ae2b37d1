// # Backup
//
// A key whose role allows it leaves a token in one way: wrapped with AES-KWP
// under an AES-256 key that its security officer made trusted, for one other
// token, in which it is never extractable again (backup.go, backup_pair.go).
//
// Who may do what. The user PIN alone must not be able to take a key out. So a
// key that may be wrapped is SENSITIVE, EXTRACTABLE and WRAP_WITH_TRUSTED, and
// the token wraps it under a key with CKA_TRUSTED only, which it lets nobody
// but the security officer set (PKCS #11 v2.40, Section 4.9). A module without
// this is refused. That is not enough: with the user PIN one could unwrap the
// result with a template of one's own (SENSITIVE false), give the wrapping key
// DECRYPT, or copy it. So the source's wrapping key can wrap and nothing else;
// the target's can unwrap and nothing else, and only what its UNWRAP_TEMPLATE
// says: a private EC key, PRIVATE, SENSITIVE and not EXTRACTABLE; and neither
// is MODIFIABLE or COPYABLE. Wrap and Restore read all of that back before they
// use the key, and Restore also asks the token for an extractable copy, which
// it must refuse.
//
// How the wrapping key comes into both tokens. Pair logs in to both as security
// officer. Each token makes an ephemeral P-384 pair (session objects); the
// points are exchanged through the host; each derives the same AES-256 key
// inside (CKM_ECDH1_DERIVE, CKD_NULL: the last 32 octets of the shared
// x-coordinate) with all its attributes, CKA_TRUSTED and MODIFIABLE false, in
// the one call that makes it; the ephemeral keys end with the sessions. The
// wrapping key was never extractable, and no secret passes through the host's
// memory but the two officers' PINs, as long as Pair runs, and in crypto11's
// keeping the user PINs. The host that runs Pair is trusted to hand each token
// the other's point and not its own: that is why it is an act of the ceremony,
// with two officers present. The points are in the record.
//
// What it costs. An officer's session sees no private objects (PKCS #11 v2.40,
// Section 5.6), so the wrapping key is CKA_PRIVATE false: without any PIN it
// can be seen and destroyed (and the key be restored no more; pair and wrap
// again), and not be used for anything, because what it wraps and what it makes
// is private. SoftHSM encrypts private objects alone, so its wrapping key is in
// the clear in its files: a rehearsal's, like everything in SoftHSM. The
// officer and the user PIN of the source together can take the key out; give
// them to different people.
//
// What the module must do: CKM_ECDH1_DERIVE, CKM_AES_KEY_WRAP_PAD, CKA_TRUSTED,
// CKA_WRAP_WITH_TRUSTED, CKA_UNWRAP_TEMPLATE and CKA_COPYABLE. SoftHSM 2.6.1
// does. p11-kit's remoting 0.24 does not carry the derivation: pair where the
// token is.
//
// A wrapped key signs itself (hsm.Wrapped), for AES-KWP protects the key's
// octets and neither its name nor its role.
//
// Order of a restore: verify in the host; find and check the wrapping key;
// unwrap into the session, sign, verify, drop (a wrong key leaves nothing
// behind); unwrap into the token; create the public object; find the pair as
// Open would; check its attributes; self-test. Killed after the unwrapping it
// leaves a private object without a public one, which no Open takes. The next
// Restore of the same key has it sign, and makes the public object.
package pkcs11

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"time"

	"github.com/ThalesIgnite/crypto11"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/miekg/pkcs11"
)

var _ hsm.Backup = (*Token)(nil)

// aesKWP is CKM_AES_KEY_WRAP_PAD in the sense of RFC 5649.
var aesKWP = []*pkcs11.Mechanism{pkcs11.NewMechanism(0x210A, nil)}

// Wrap implements hsm.Backup.
func (t *Token) Wrap(ctx context.Context, k hsm.Key, role hsm.Role, pairing hsm.Pairing) (hsm.Wrapped, error) {
	own, err := t.own(k)
	if err != nil {
		return hsm.Wrapped{}, fmt.Errorf("wrap: %w", err)
	}
	w, err := t.wrap(ctx, own, role, pairing)
	if err != nil {
		return hsm.Wrapped{}, fmt.Errorf("wrap %s: %w", own.ref, err)
	}
	return w, nil
}

// wrap fills in a Wrapped, has the token wrap and the key sign, and verifies.
func (t *Token) wrap(ctx context.Context, k *key, role hsm.Role, pairing hsm.Pairing) (hsm.Wrapped, error) {
	w, err := t.describe(k, role, pairing)
	if err != nil {
		return w, err
	}
	var octets []byte
	err = t.do(ctx, hsm.ShareRest, true, func(c *connection) error {
		p, err := k.on(c)
		if err != nil {
			return err
		}
		return c.withAdmin(func(s pkcs11.SessionHandle) (err error) {
			octets, err = c.wrap(s, p.private, role, pairing.Key)
			return err
		})
	})
	if err != nil {
		return w, err
	}
	w.Octets = octets
	digest, err := w.Digest()
	if err != nil {
		return w, err
	}
	if w.Signature, err = k.SignContext(ctx, digest, w.Algorithm.Hash()); err != nil {
		return w, err
	}
	return w, w.Verify(role, k.ref.SPKI)
}

// describe is a Wrapped without its octets. It refuses what needs no token to
// be refused.
func (t *Token) describe(k *key, role hsm.Role, pairing hsm.Pairing) (hsm.Wrapped, error) {
	w := hsm.Wrapped{
		Format: hsm.WrappedFormat, Time: time.Now().UTC().Truncate(time.Second), Role: role,
		Label: k.label, ID: hex.EncodeToString(k.id), SPKI: hex.EncodeToString(k.ref.SPKI[:]),
		Source: t.Info().Device(), Key: pairing.Key, Mechanism: hsm.MechanismAESKWP,
	}
	if err := hsm.CheckBackup(role); err != nil {
		return w, err
	}
	if k.role != hsm.RoleNone && k.role != role {
		return w, fmt.Errorf("key is open for role %q, not %q: %w", k.role, role, hsm.ErrPolicy)
	}
	if pairing.Source != w.Source {
		return w, fmt.Errorf("pairing is of source token %q: %w", pairing.Source.Label, hsm.ErrMismatch)
	}
	var err error
	if w.Algorithm, err = hsm.AlgorithmOf(k.pub); err != nil {
		return w, err
	}
	if err := hsm.CheckSpec(hsm.Spec{Label: k.label, ID: k.id, Algorithm: w.Algorithm}); err != nil {
		return w, err
	}
	w.PublicKey, err = x509.MarshalPKIXPublicKey(k.pub)
	return w, err
}

// wrap checks both keys and wraps.
func (c *connection) wrap(s pkcs11.SessionHandle, private pkcs11.ObjectHandle, role hsm.Role, name hsm.WrappingKey) ([]byte, error) {
	attributes, err := c.attributes(s, private, privateAttributes, "")
	if err != nil {
		return nil, err
	}
	if err := role.Policy().Check(attributes); err != nil {
		return nil, err
	}
	for _, flag := range []string{"EXTRACTABLE", "WRAP_WITH_TRUSTED"} {
		if attributes[flag] != "true" {
			return nil, fmt.Errorf("%s is %q: the key was not made for backup: %w", flag, attributes[flag], hsm.ErrPolicy)
		}
	}
	under, err := c.wrappingKey(s, name, wraps)
	if err != nil {
		return nil, err
	}
	return c.wrapUnder(s, under, private)
}

// wrapUnder is C_WrapKey alone.
func (c *connection) wrapUnder(s pkcs11.SessionHandle, under, private pkcs11.ObjectHandle) ([]byte, error) {
	octets, err := c.raw.WrapKey(s, aesKWP, under, private)
	if err != nil {
		return nil, fmt.Errorf("C_WrapKey: %w", refused(err, map[pkcs11.Error]error{
			pkcs11.CKR_KEY_UNEXTRACTABLE: hsm.ErrPolicy,
			pkcs11.CKR_KEY_NOT_WRAPPABLE: hsm.ErrPolicy,
		}))
	}
	return octets, nil
}

// refused classifies a return value of a wrapping function: the listed codes
// by their sentinel, the others by the table.
func refused(err error, sentinels map[pkcs11.Error]error) error {
	var code pkcs11.Error
	if errors.As(err, &code) && sentinels[code] != nil {
		return &codeError{code: code, sentinel: sentinels[code]}
	}
	return classify(err)
}

// Restore implements hsm.Backup.
func (t *Token) Restore(ctx context.Context, w hsm.Wrapped, role hsm.Role, spki [32]byte) (hsm.Key, hsm.Evidence, error) {
	k, e, err := t.restore(ctx, w, role, spki)
	if err != nil {
		return nil, hsm.Evidence{}, fmt.Errorf("restore %.40q in %s: %w", w.Label, t.uri, err)
	}
	return k, e, nil
}

func (t *Token) restore(ctx context.Context, w hsm.Wrapped, role hsm.Role, spki [32]byte) (hsm.Key, hsm.Evidence, error) {
	r, err := newRestoring(w, role, spki)
	if err != nil {
		return nil, hsm.Evidence{}, err
	}
	var made *pair
	err = t.do(ctx, hsm.ShareRest, false, func(c *connection) (err error) {
		made, err = r.on(c)
		return err
	})
	if err != nil {
		return nil, hsm.Evidence{}, err
	}
	k := t.adopt(made.ref(t.uri), role, made)
	if _, err := hsm.SelfTest(ctx, k, time.Now()); err != nil {
		return nil, hsm.Evidence{}, fmt.Errorf("self-test of the restored key, which stays in the token: %w", err)
	}
	e, err := t.Evidence(ctx, k)
	if err != nil {
		return nil, hsm.Evidence{}, fmt.Errorf("evidence of the restored key, which stays in the token: %w", err)
	}
	return k, e, nil
}

// restoring is a Wrapped that was verified.
type restoring struct {
	wrapped hsm.Wrapped
	spec    hsm.Spec
	spki    [32]byte
	pub     *ecdsa.PublicKey
	digest  []byte // what the key signed when it was wrapped
}

// newRestoring verifies w.
func newRestoring(w hsm.Wrapped, role hsm.Role, spki [32]byte) (*restoring, error) {
	if err := w.Verify(role, spki); err != nil {
		return nil, err
	}
	spec, err := w.Spec()
	if err != nil {
		return nil, err
	}
	digest, err := w.Digest()
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParsePKIXPublicKey(w.PublicKey)
	if err != nil {
		return nil, err
	}
	return &restoring{wrapped: w, spec: spec, spki: spki, pub: parsed.(*ecdsa.PublicKey), digest: digest}, nil
}

// on restores through connection c and binds the new pair.
func (r *restoring) on(c *connection) (*pair, error) {
	if err := c.supports(pkcs11.CKM_ECDSA, r.pub.Params().BitSize); err != nil {
		return nil, err
	}
	var made *pair
	err := c.withAdmin(func(s pkcs11.SessionHandle) (err error) {
		under, err := c.wrappingKey(s, r.wrapped.Key, unwraps)
		if err != nil {
			return err
		}
		private, public, err := r.halves(c, s)
		if err != nil {
			return err
		}
		if private == 0 {
			if err := r.try(c, s, under); err != nil {
				return err
			}
			if _, err := r.unwrap(c, s, under, true, false); err != nil {
				return fmt.Errorf("unwrap into the token, if the private key is there now restore again to finish: %w", err)
			}
		}
		if public == 0 {
			if err := r.createPublic(c, s); err != nil {
				return fmt.Errorf("create public key, the private one is in the token, restore again to finish: %w", err)
			}
		}
		made, err = r.readBack(c, s)
		if err != nil {
			return fmt.Errorf("read back the restored pair, which stays in the token: %w", err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return made, c.bind(made)
}

// halves looks for what an interrupted restore of this key left: a private
// object that signs as the key does, or a public object of it. Nothing is 0
// and 0. Everything else with the label or the id is hsm.ErrExists.
func (r *restoring) halves(c *connection, s pkcs11.SessionHandle) (private, public pkcs11.ObjectHandle, err error) {
	found := map[uint]pkcs11.ObjectHandle{}
	for _, class := range []uint{pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_PUBLIC_KEY, pkcs11.CKO_SECRET_KEY} {
		if found[class], err = r.half(c, s, class); err != nil {
			return 0, 0, err
		}
	}
	private, public = found[pkcs11.CKO_PRIVATE_KEY], found[pkcs11.CKO_PUBLIC_KEY]
	switch {
	case private != 0 && public != 0, found[pkcs11.CKO_SECRET_KEY] != 0:
		return 0, 0, fmt.Errorf("key %s with id %x: %w", r.spec.Label, r.spec.ID, hsm.ErrExists)
	case private != 0:
		if err := r.ours(c, s, private); err != nil {
			return 0, 0, fmt.Errorf("private object without a public one: %w: %w", hsm.ErrExists, err)
		}
	case public != 0:
		if pub, err := c.publicKey(s, public); err != nil || !pub.Equal(r.pub) {
			return 0, 0, fmt.Errorf("public object of another key: %w", hsm.ErrExists)
		}
	}
	return private, public, nil
}

// half returns the one object of a class that has both the label and the id, 0
// if none has either.
func (r *restoring) half(c *connection, s pkcs11.SessionHandle, class uint) (pkcs11.ObjectHandle, error) {
	var both []pkcs11.ObjectHandle
	for i, by := range []hsm.Spec{r.spec, {Label: r.spec.Label}, {ID: r.spec.ID}} {
		some, err := c.find(s, class, by.Label, by.ID)
		if err != nil {
			return 0, err
		}
		if i == 0 {
			both = some
		}
		if len(some) > 1 || len(some) != len(both) {
			return 0, fmt.Errorf("label %s or id %x: %w", r.spec.Label, r.spec.ID, hsm.ErrExists)
		}
	}
	if len(both) == 0 {
		return 0, nil
	}
	return both[0], nil
}

// ours says whether a private object is one that a restore of this key made.
func (r *restoring) ours(c *connection, s pkcs11.SessionHandle, private pkcs11.ObjectHandle) error {
	if err := r.checkPrivate(c, s, private); err != nil {
		return err
	}
	return r.signs(c, s, private)
}

// try unwraps into the session: first as an extractable key, which the token
// must refuse; then as what it will be. The key signs, and is dropped.
func (r *restoring) try(c *connection, s pkcs11.SessionHandle, under pkcs11.ObjectHandle) error {
	leak, err := r.unwrap(c, s, under, false, true)
	if err == nil {
		_ = c.raw.DestroyObject(s, leak)
		return fmt.Errorf("token unwraps into an extractable key, the wrapping key has no CKA_UNWRAP_TEMPLATE: %w", hsm.ErrPolicy)
	}
	if !templateRefused(err) {
		return err
	}
	trial, err := r.unwrap(c, s, under, false, false)
	if err != nil {
		return err
	}
	err = r.signs(c, s, trial)
	if dropped := c.raw.DestroyObject(s, trial); err == nil && dropped != nil {
		err = fmt.Errorf("drop trial key: %w", classify(dropped))
	}
	return err
}

// templateRefused says whether a token refused what an object should be, and
// not the wrapped octets or the whole call.
func templateRefused(err error) bool {
	var code *codeError
	if !errors.As(err, &code) {
		return false
	}
	switch code.code {
	case pkcs11.CKR_TEMPLATE_INCONSISTENT, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, pkcs11.CKR_ATTRIBUTE_READ_ONLY:
		return true
	}
	return false
}

// unwrap is C_UnwrapKey into the token or into the session. What SoftHSM and
// others answer to octets that do not unwrap (CKR_GENERAL_ERROR) is not taken
// for a lost device.
func (r *restoring) unwrap(c *connection, s pkcs11.SessionHandle, under pkcs11.ObjectHandle, token, extractable bool) (pkcs11.ObjectHandle, error) {
	_, template, err := templates(r.spec)
	if err != nil {
		return 0, err
	}
	change := map[uint]any{pkcs11.CKA_TOKEN: token, pkcs11.CKA_EXTRACTABLE: extractable}
	if !token { // not to be taken for the key if it cannot be dropped
		change[pkcs11.CKA_LABEL], change[pkcs11.CKA_ID] = []byte("trial"), []byte("trial")
	}
	for code, value := range change {
		if err := template.Set(code, value); err != nil {
			return 0, err
		}
	}
	private, err := c.raw.UnwrapKey(s, aesKWP, under, r.wrapped.Octets, modifiableLast(template))
	if err != nil {
		return 0, fmt.Errorf("C_UnwrapKey: %w", refused(err, map[pkcs11.Error]error{
			pkcs11.CKR_GENERAL_ERROR:            hsm.ErrWrapped,
			pkcs11.CKR_FUNCTION_FAILED:          hsm.ErrWrapped,
			pkcs11.CKR_WRAPPED_KEY_INVALID:      hsm.ErrWrapped,
			pkcs11.CKR_WRAPPED_KEY_LEN_RANGE:    hsm.ErrWrapped,
			pkcs11.CKR_ENCRYPTED_DATA_INVALID:   hsm.ErrWrapped,
			pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE: hsm.ErrWrapped,
		}))
	}
	return private, nil
}

// modifiableLast lists a template with MODIFIABLE at its end: SoftHSM applies
// them in order, and refuses to change what is not modifiable any more.
func modifiableLast(set crypto11.AttributeSet) []*pkcs11.Attribute {
	var list []*pkcs11.Attribute
	for code, attribute := range set {
		if code != pkcs11.CKA_MODIFIABLE {
			list = append(list, attribute)
		}
	}
	if last, ok := set[pkcs11.CKA_MODIFIABLE]; ok {
		list = append(list, last)
	}
	return list
}

// signs has a private object sign what the key signed when it was wrapped, and
// verifies with the key's public half. Another key is hsm.ErrWrapped.
func (r *restoring) signs(c *connection, s pkcs11.SessionHandle, private pkcs11.ObjectHandle) error {
	if err := c.raw.SignInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}, private); err != nil {
		return fmt.Errorf("C_SignInit: %w", classify(err))
	}
	raw, err := c.raw.Sign(s, r.digest)
	if err != nil {
		return fmt.Errorf("C_Sign: %w", classify(err))
	}
	half := len(raw) / 2
	sig, err := asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(raw[:half]), new(big.Int).SetBytes(raw[half:])})
	clear(raw)
	if err != nil {
		return err
	}
	if err := hsm.Verify(r.pub, r.digest, sig); err != nil {
		return fmt.Errorf("private key does not belong to the public one: %w: %w", hsm.ErrWrapped, err)
	}
	return nil
}

// createPublic makes the public object as Generate would have it.
func (r *restoring) createPublic(c *connection, s pkcs11.SessionHandle) error {
	template, _, err := templates(r.spec)
	if err != nil {
		return err
	}
	point, err := r.pub.Bytes()
	if err != nil {
		return err
	}
	der, err := asn1.Marshal(point)
	if err != nil {
		return err
	}
	if err := template.Set(pkcs11.CKA_EC_POINT, der); err != nil {
		return err
	}
	if _, err := c.raw.CreateObject(s, modifiableLast(template)); err != nil {
		return fmt.Errorf("C_CreateObject: %w", classify(err))
	}
	return nil
}

// readBack finds the restored pair as Open would and checks it.
func (r *restoring) readBack(c *connection, s pkcs11.SessionHandle) (*pair, error) {
	made, err := c.locatePair(s, uri{object: r.spec.Label, id: r.spec.ID})
	if err != nil {
		return nil, err
	}
	if made.spki != r.spki {
		return nil, fmt.Errorf("spki %x: %w", made.spki, hsm.ErrMismatch)
	}
	return made, r.checkPrivate(c, s, made.private)
}

// checkPrivate says whether the attributes of a private object are those of a
// restored key.
func (r *restoring) checkPrivate(c *connection, s pkcs11.SessionHandle, private pkcs11.ObjectHandle) error {
	attributes, err := c.attributes(s, private, privateAttributes, "")
	if err != nil {
		return err
	}
	if err := (hsm.Policy{Restored: true}).Check(attributes); err != nil {
		return err
	}
	if attributes["LOCAL"] == "true" {
		return fmt.Errorf("LOCAL is true for a restored key: %w", hsm.ErrPolicy)
	}
	return nil
}

// The uses of a wrapping key.
const (
	wraps   = "WRAP"
	unwraps = "UNWRAP"
)

// wrappingAttributes are read from a wrapping key.
var wrappingAttributes = []attribute{
	{pkcs11.CKA_TOKEN, "TOKEN", true},
	{pkcs11.CKA_SENSITIVE, "SENSITIVE", true},
	{pkcs11.CKA_EXTRACTABLE, "EXTRACTABLE", true},
	{pkcs11.CKA_MODIFIABLE, "MODIFIABLE", true},
	{pkcs11.CKA_COPYABLE, "COPYABLE", true},
	{pkcs11.CKA_TRUSTED, "TRUSTED", true},
	{pkcs11.CKA_ENCRYPT, "ENCRYPT", true},
	{pkcs11.CKA_DECRYPT, "DECRYPT", true},
	{pkcs11.CKA_SIGN, "SIGN", true},
	{pkcs11.CKA_VERIFY, "VERIFY", true},
	{pkcs11.CKA_DERIVE, "DERIVE", true},
	{pkcs11.CKA_WRAP, "WRAP", true},
	{pkcs11.CKA_UNWRAP, "UNWRAP", true},
	{pkcs11.CKA_KEY_TYPE, "KEY_TYPE", false},
	{pkcs11.CKA_CHECK_VALUE, "CHECK_VALUE", false},
}

// checkWrapping compares a wrapping key's attributes with what it must be for
// its one use. The error wraps hsm.ErrPolicy and names the first that differs.
func checkWrapping(attributes map[string]string, use string) error {
	for _, a := range wrappingAttributes {
		want := "false"
		switch a.name {
		case "TOKEN", "SENSITIVE", "TRUSTED", use:
			want = "true"
		case "KEY_TYPE":
			want = show(a, pkcs11.NewAttribute(a.code, pkcs11.CKK_AES).Value)
		case "CHECK_VALUE":
			continue
		}
		if got := attributes[a.name]; got != want {
			return fmt.Errorf("wrapping key: %s is %q, want %s: %w", a.name, got, want, hsm.ErrPolicy)
		}
	}
	return nil
}

// checkValue gives a wrapping key's check value, "" if the token has none.
func checkValue(attributes map[string]string) string {
	value := attributes["CHECK_VALUE"]
	if strings.HasPrefix(value, "unavailable") {
		return ""
	}
	return value
}

// wrappingKey finds the one wrapping key that name names and checks that it is
// good for its use and nothing else.
func (c *connection) wrappingKey(s pkcs11.SessionHandle, name hsm.WrappingKey, use string) (pkcs11.ObjectHandle, error) {
	id, err := hex.DecodeString(name.ID)
	if err != nil || len(id) == 0 || name.Label == "" {
		return 0, fmt.Errorf("wrapping key %.40q with id %.40q: %w", name.Label, name.ID, hsm.ErrNotFound)
	}
	object, err := c.one(s, pkcs11.CKO_SECRET_KEY, "wrapping", name.Label, id)
	if err != nil {
		return 0, err
	}
	attributes, err := c.attributes(s, object, wrappingAttributes, "")
	if err != nil {
		return 0, err
	}
	if err := checkWrapping(attributes, use); err != nil {
		return 0, err
	}
	if got := checkValue(attributes); got != name.Check {
		return 0, fmt.Errorf("wrapping key %s has check value %q, want %q: %w", name.Label, got, name.Check, hsm.ErrMismatch)
	}
	return object, nil
}
