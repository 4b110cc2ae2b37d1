package pkcs11_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"encoding/hex"
	"encoding/json"
	"errors"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
	p11 "github.com/miekg/pkcs11"
)

// backupPair is two open tokens behind the shim that share a wrapping key.
type backupPair struct {
	shim *hsmtest.Shim
	// from and to are the tokens of source and target.
	from, to       hsmtest.SoftHSMToken
	source, target *pkcs11.Token
	pairing        hsm.Pairing
}

// officer is the security officer of a token.
func officer(token hsmtest.SoftHSMToken) pkcs11.Officer {
	return pkcs11.Officer{Module: token.Module, URI: token.URI, PIN: token.SOPIN}
}

// newBackupPair makes two tokens, pairs them and opens them. Before opens runs
// between.
func newBackupPair(t *testing.T, before ...func(p *backupPair)) *backupPair {
	t.Helper()
	p := &backupPair{shim: hsmtest.NewShim(t)}
	p.from, p.to = p.shim.NewToken(t), p.shim.NewToken(t)
	var err error
	if p.pairing, err = pkcs11.Pair(t.Context(), "wrapping-key", officer(p.from), officer(p.to)); err != nil {
		t.Fatal(err)
	}
	for _, f := range before {
		f(p)
	}
	p.source, p.target = hsmtest.OpenSoftHSM(t, p.from), hsmtest.OpenSoftHSM(t, p.to)
	t.Cleanup(p.shim.Reset) // before the tokens are closed
	return p
}

// key makes a key in the source that may be wrapped.
func (p *backupPair) key(t *testing.T, label string, algorithm hsm.Algorithm) hsm.Key {
	t.Helper()
	key, err := p.source.Generate(t.Context(), hsm.Spec{Label: label, ID: hsmtest.RandomID(), Algorithm: algorithm, Extractable: true})
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// wrap wraps a key of the source for the root's role.
func (p *backupPair) wrap(t *testing.T, key hsm.Key) hsm.Wrapped {
	t.Helper()
	w, err := p.source.Wrap(t.Context(), key, hsm.RoleRoot, p.pairing)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// resign has key sign w as Wrap does: only who may sign with the key can.
func resign(t *testing.T, key hsm.Key, w hsm.Wrapped) hsm.Wrapped {
	t.Helper()
	digest, err := w.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if w.Signature, err = key.SignContext(t.Context(), digest, w.Algorithm.Hash()); err != nil {
		t.Fatal(err)
	}
	return w
}

// empty fails the test unless the target holds no key object but its wrapping
// keys.
func (p *backupPair) empty(t *testing.T, after string) {
	t.Helper()
	lib, session := rawSession(t, p.target)
	for _, class := range []uint{p11.CKO_PRIVATE_KEY, p11.CKO_PUBLIC_KEY} {
		if found := rawFind(t, lib, session, class, ""); len(found) != 0 {
			t.Errorf("after %s the target holds %d objects of class %d", after, len(found), class)
		}
	}
}

// rawSession is a session of the library itself, with the login of an open
// token: what anybody can do who has the user PIN.
func rawSession(t *testing.T, token *pkcs11.Token) (*p11.Ctx, p11.SessionHandle) {
	t.Helper()
	lib := p11.New(token.Info().Module)
	if lib == nil {
		t.Fatal("cannot load the module")
	}
	session, err := lib.OpenSession(token.Info().Slot, p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = lib.CloseSession(session) })
	return lib, session
}

// rawFind lists objects of a class, with a label if there is one.
func rawFind(t *testing.T, lib *p11.Ctx, session p11.SessionHandle, class uint, label string) []p11.ObjectHandle {
	t.Helper()
	template := []*p11.Attribute{p11.NewAttribute(p11.CKA_CLASS, class)}
	if label != "" {
		template = append(template, p11.NewAttribute(p11.CKA_LABEL, label))
	}
	if err := lib.FindObjectsInit(session, template); err != nil {
		t.Fatal(err)
	}
	found, _, err := lib.FindObjects(session, 100)
	if err != nil {
		t.Fatal(err)
	}
	if err := lib.FindObjectsFinal(session); err != nil {
		t.Fatal(err)
	}
	return found
}

// aesKWP is CKM_AES_KEY_WRAP_PAD.
var aesKWP = []*p11.Mechanism{p11.NewMechanism(0x210A, nil)}

// restoredTemplate is what a restored private key is asked to be.
func restoredTemplate(label string, id []byte, token bool, change map[uint]any) []*p11.Attribute {
	values := map[uint]any{
		p11.CKA_CLASS: p11.CKO_PRIVATE_KEY, p11.CKA_KEY_TYPE: p11.CKK_EC,
		p11.CKA_TOKEN: token, p11.CKA_PRIVATE: true, p11.CKA_SENSITIVE: true, p11.CKA_EXTRACTABLE: false,
		p11.CKA_SIGN: true, p11.CKA_DECRYPT: false, p11.CKA_UNWRAP: false, p11.CKA_DERIVE: false,
		p11.CKA_ID: id, p11.CKA_LABEL: label,
	}
	for code, value := range change {
		values[code] = value
	}
	var list []*p11.Attribute
	for code, value := range values {
		list = append(list, p11.NewAttribute(code, value))
	}
	return append(list, p11.NewAttribute(p11.CKA_MODIFIABLE, false)) // last, for SoftHSM
}

func TestBackup(t *testing.T) {
	p := newBackupPair(t)
	for _, row := range []struct {
		role      hsm.Role
		algorithm hsm.Algorithm
	}{{hsm.RoleRoot, hsm.ECDSAP256}, {hsm.RoleTSARoot, hsm.ECDSAP384}} {
		t.Run(string(row.algorithm), func(t *testing.T) {
			key := p.key(t, string(row.role), row.algorithm)
			made, err := p.source.Wrap(t.Context(), key, row.role, p.pairing)
			if err != nil {
				t.Fatal(err)
			}
			text, err := made.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			w, err := hsm.ParseWrapped(text)
			if err != nil {
				t.Fatal(err)
			}
			restored, e, err := p.target.Restore(t.Context(), w, row.role, key.Ref().SPKI)
			if err != nil {
				t.Fatal(err)
			}
			if !key.Public().(*ecdsa.PublicKey).Equal(restored.Public()) || restored.Ref().SPKI != key.Ref().SPKI {
				t.Error("another public key was restored")
			}
			digest := make([]byte, row.algorithm.Hash().Size())
			sig, err := restored.SignContext(t.Context(), digest, row.algorithm.Hash())
			if err != nil || !ecdsa.VerifyASN1(key.Public().(*ecdsa.PublicKey), digest, sig) {
				t.Errorf("the restored key's signature does not verify with the source's public key (%v)", err)
			}
			if !e.Restored || e.Attributes["LOCAL"] != "false" || e.Attributes["EXTRACTABLE"] != "false" || e.Attributes["SENSITIVE"] != "true" {
				t.Errorf("evidence of the restored key: restored %t, %v", e.Restored, e.Attributes)
			}
			if level := hsm.LevelOf(hsm.TokenInfo{Manufacturer: "maker"}, e.Attributes); level != hsm.LevelRestored {
				t.Errorf("in a hardware token the level would be %s, want restored", level)
			}
			before, err := p.source.Evidence(t.Context(), key)
			if err != nil {
				t.Fatal(err)
			}
			if before.Restored || before.Attributes["WRAP_WITH_TRUSTED"] != "true" {
				t.Errorf("evidence of the source's key: restored %t, %v", before.Restored, before.Attributes)
			}
			if _, err := p.target.Open(t.Context(), restored.Ref(), row.role); err != nil {
				t.Errorf("open the restored key for %s: %v", row.role, err)
			}
			_, err = p.target.Open(t.Context(), restored.Ref(), hsm.RoleIntermediate)
			wants(t, p.to, "open the restored key for an online role", err, hsm.ErrPolicy)
			_, _, err = p.target.Restore(t.Context(), w, row.role, key.Ref().SPKI)
			wants(t, p.to, "restore again", err, hsm.ErrExists)
		})
	}
	record, err := json.Marshal(p.pairing)
	if err != nil {
		t.Fatal(err)
	}
	noPIN(t, p.from, "the pairing's record", string(record))
	noPIN(t, p.to, "the pairing's record", string(record))
}

func TestWrapRefuses(t *testing.T) {
	p := newBackupPair(t)
	key := p.key(t, "root", hsm.ECDSAP256)
	strict := hsmtest.NewKey(t, p.source, "strict", hsm.ECDSAP256)
	other := hsmtest.NewKey(t, p.target, "other", hsm.ECDSAP256)
	asTSARoot, err := p.source.Open(t.Context(), key.Ref(), hsm.RoleTSARoot)
	if err != nil {
		t.Fatal(err)
	}
	plantWrapping(t, p.source, "untrusted")
	pairing := func(change func(*hsm.Pairing)) hsm.Pairing {
		c := p.pairing
		change(&c)
		return c
	}
	rows := []struct {
		name    string
		key     hsm.Key
		role    hsm.Role
		pairing hsm.Pairing
		want    error // nil: any
	}{
		{"an online role", key, hsm.RoleIntermediate, p.pairing, hsm.ErrPolicy},
		{"an unknown role", key, "unknown", p.pairing, hsm.ErrPolicy},
		{"no role", key, hsm.RoleNone, p.pairing, hsm.ErrPolicy},
		{"a key that is open for another role", asTSARoot, hsm.RoleRoot, p.pairing, hsm.ErrPolicy},
		{"a key that is not extractable", strict, hsm.RoleRoot, p.pairing, hsm.ErrPolicy},
		{"a key of another token", other, hsm.RoleRoot, p.pairing, nil},
		{"a key in memory", hsmtest.SoftwareKey(hsm.ECDSAP256), hsm.RoleRoot, p.pairing, nil},
		{"a pairing of another source", key, hsm.RoleRoot, pairing(func(p *hsm.Pairing) { p.Source = p.Target }), hsm.ErrMismatch},
		{"the zero pairing", key, hsm.RoleRoot, hsm.Pairing{}, hsm.ErrMismatch},
		{"an unknown wrapping key", key, hsm.RoleRoot, pairing(func(p *hsm.Pairing) { p.Key.Label = "nobody" }), hsm.ErrNotFound},
		{"another wrapping key's id", key, hsm.RoleRoot, pairing(func(p *hsm.Pairing) { p.Key.ID = "00" }), hsm.ErrNotFound},
		{"no id", key, hsm.RoleRoot, pairing(func(p *hsm.Pairing) { p.Key.ID = "" }), hsm.ErrNotFound},
		{"another check value", key, hsm.RoleRoot, pairing(func(p *hsm.Pairing) { p.Key.Check = "000000" }), hsm.ErrMismatch},
		{"an untrusted wrapping key", key, hsm.RoleRoot, pairing(func(p *hsm.Pairing) { p.Key = hsm.WrappingKey{Label: "untrusted", ID: "75"} }), hsm.ErrPolicy},
	}
	for _, row := range rows {
		_, err := p.source.Wrap(t.Context(), row.key, row.role, row.pairing)
		if err == nil {
			t.Errorf("%s: wrapped", row.name)
		}
		if row.want != nil {
			wants(t, p.from, row.name, err, row.want)
		}
	}
	// The target's wrapping key unwraps only.
	turned := pairing(func(p *hsm.Pairing) { p.Source, p.Target = p.Target, p.Source })
	extractable, err := p.target.Generate(t.Context(), hsm.Spec{Label: "t", ID: hsmtest.RandomID(), Algorithm: hsm.ECDSAP256, Extractable: true})
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.target.Wrap(t.Context(), extractable, hsm.RoleRoot, turned)
	wants(t, p.to, "wrap in the target", err, hsm.ErrPolicy)
	if n := p.shim.Calls(hsmtest.WrapKey); n != 0 {
		t.Errorf("the token was asked to wrap %d times before the refusals", n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = p.source.Wrap(ctx, key, hsm.RoleRoot, p.pairing)
	wants(t, p.from, "an ended context", err, hsm.ErrBusy)
}

// plantWrapping makes a wrapping key of one's own, as the user can.
func plantWrapping(t *testing.T, token *pkcs11.Token, label string) p11.ObjectHandle {
	t.Helper()
	lib, session := rawSession(t, token)
	made, err := lib.GenerateKey(session, []*p11.Mechanism{p11.NewMechanism(p11.CKM_AES_KEY_GEN, nil)}, []*p11.Attribute{
		p11.NewAttribute(p11.CKA_TOKEN, true), p11.NewAttribute(p11.CKA_VALUE_LEN, 32),
		p11.NewAttribute(p11.CKA_WRAP, true), p11.NewAttribute(p11.CKA_LABEL, label), p11.NewAttribute(p11.CKA_ID, label[:1]),
	})
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// TestTokenKeepsKeys: what the user PIN alone cannot do, by the token's own
// word. Nothing of ours is between.
func TestTokenKeepsKeys(t *testing.T) {
	p := newBackupPair(t)
	root := p.key(t, "root", hsm.ECDSAP256)
	hsmtest.NewKey(t, p.source, "online", hsm.ECDSAP256)
	w := p.wrap(t, root)
	own := plantWrapping(t, p.source, "own")
	lib, from := rawSession(t, p.source)
	_, to := rawSession(t, p.target)
	one := func(session p11.SessionHandle, class uint, label string) p11.ObjectHandle {
		found := rawFind(t, lib, session, class, label)
		if len(found) != 1 {
			t.Fatalf("%d objects %s", len(found), label)
		}
		return found[0]
	}
	private, online := one(from, p11.CKO_PRIVATE_KEY, "root"), one(from, p11.CKO_PRIVATE_KEY, "online")
	wrapping, unwrapping := one(from, p11.CKO_SECRET_KEY, "wrapping-key"), one(to, p11.CKO_SECRET_KEY, "wrapping-key")
	wrap := func(under, key p11.ObjectHandle) error {
		_, err := lib.WrapKey(from, aesKWP, under, key)
		return err
	}
	set := func(session p11.SessionHandle, object p11.ObjectHandle, code uint) error {
		return lib.SetAttributeValue(session, object, []*p11.Attribute{p11.NewAttribute(code, true)})
	}
	unwrap := func(session p11.SessionHandle, under p11.ObjectHandle, change map[uint]any) error {
		_, err := lib.UnwrapKey(session, aesKWP, under, w.Octets, restoredTemplate("x", []byte("x"), false, change))
		return err
	}
	if err := wrap(wrapping, private); err != nil {
		t.Errorf("wrap as Wrap does: %v", err)
	}
	if err := unwrap(to, unwrapping, nil); err != nil {
		t.Errorf("unwrap as Restore does: %v", err)
	}
	const actionProhibited = 0x1B
	rows := []struct {
		name string
		err  error
		want uint
	}{
		{"wrap an online key under the trusted wrapping key", wrap(wrapping, online), p11.CKR_KEY_UNEXTRACTABLE},
		{"wrap the root under one's own wrapping key", wrap(own, private), p11.CKR_KEY_NOT_WRAPPABLE},
		{"trust one's own wrapping key", set(from, own, p11.CKA_TRUSTED), p11.CKR_ATTRIBUTE_READ_ONLY},
		{"make the wrapping key decrypt", set(from, wrapping, p11.CKA_DECRYPT), actionProhibited},
		{"make the source unwrap", set(from, wrapping, p11.CKA_UNWRAP), actionProhibited},
		{"make the unwrapping key decrypt", set(to, unwrapping, p11.CKA_DECRYPT), actionProhibited},
		{"make the online key extractable", set(from, online, p11.CKA_EXTRACTABLE), actionProhibited},
		{"free the root of WRAP_WITH_TRUSTED", lib.SetAttributeValue(from, private, []*p11.Attribute{p11.NewAttribute(p11.CKA_WRAP_WITH_TRUSTED, false)}), actionProhibited},
		{"copy the wrapping key", second(lib.CopyObject(from, wrapping, []*p11.Attribute{p11.NewAttribute(p11.CKA_DECRYPT, true)})), actionProhibited},
		{"copy the unwrapping key", second(lib.CopyObject(to, unwrapping, []*p11.Attribute{p11.NewAttribute(p11.CKA_DECRYPT, true)})), actionProhibited},
		{"read the wrapping key", second(lib.GetAttributeValue(from, wrapping, []*p11.Attribute{p11.NewAttribute(p11.CKA_VALUE, nil)})), p11.CKR_ATTRIBUTE_SENSITIVE},
		{"unwrap in the source", unwrap(from, wrapping, nil), p11.CKR_KEY_FUNCTION_NOT_PERMITTED},
		{"unwrap as readable", unwrap(to, unwrapping, map[uint]any{p11.CKA_SENSITIVE: false}), p11.CKR_TEMPLATE_INCONSISTENT},
		{"unwrap as extractable", unwrap(to, unwrapping, map[uint]any{p11.CKA_EXTRACTABLE: true}), p11.CKR_TEMPLATE_INCONSISTENT},
		{"unwrap as public", unwrap(to, unwrapping, map[uint]any{p11.CKA_PRIVATE: false}), p11.CKR_TEMPLATE_INCONSISTENT},
		{"unwrap as a secret", unwrap(to, unwrapping, map[uint]any{p11.CKA_CLASS: p11.CKO_SECRET_KEY, p11.CKA_KEY_TYPE: p11.CKK_GENERIC_SECRET}), p11.CKR_TEMPLATE_INCONSISTENT},
	}
	for _, row := range rows {
		if !errors.Is(row.err, p11.Error(row.want)) {
			t.Errorf("%s: %v, want %v", row.name, row.err, p11.Error(row.want))
		}
	}
}

// second is the error of a call with a result.
func second[T any](_ T, err error) error { return err }

func TestRestoreRefuses(t *testing.T) {
	var later hsm.Pairing
	p := newBackupPair(t, func(p *backupPair) {
		var err error
		if later, err = pkcs11.Pair(t.Context(), "later", officer(p.from), officer(p.to)); err != nil {
			t.Fatal(err)
		}
	})
	key, other := p.key(t, "root", hsm.ECDSAP256), p.key(t, "other", hsm.ECDSAP256)
	w, otherW := p.wrap(t, key), p.wrap(t, other)
	with := func(change func(*hsm.Wrapped)) hsm.Wrapped {
		c := w
		c.Octets = bytes.Clone(w.Octets)
		change(&c)
		return c
	}
	// The signed rows are what the host cannot see: the token must.
	signed := func(change func(*hsm.Wrapped)) hsm.Wrapped { return resign(t, key, with(change)) }
	spki := key.Ref().SPKI
	rows := []struct {
		name string
		w    hsm.Wrapped
		role hsm.Role
		spki [32]byte
		want error
	}{
		{"nothing", hsm.Wrapped{}, hsm.RoleRoot, spki, hsm.ErrWrapped},
		{"an online role", w, hsm.RoleIntermediate, spki, hsm.ErrPolicy},
		{"no role", w, hsm.RoleNone, spki, hsm.ErrPolicy},
		{"another root's role", w, hsm.RoleTSARoot, spki, hsm.ErrWrapped},
		{"another public key", w, hsm.RoleRoot, other.Ref().SPKI, hsm.ErrWrapped},
		{"another label", with(func(w *hsm.Wrapped) { w.Label = "toor" }), hsm.RoleRoot, spki, hsm.ErrWrapped},
		{"another id", with(func(w *hsm.Wrapped) { w.ID = otherW.ID }), hsm.RoleRoot, spki, hsm.ErrWrapped},
		{"another key's octets", with(func(w *hsm.Wrapped) { w.Octets = otherW.Octets }), hsm.RoleRoot, spki, hsm.ErrWrapped},
		{"another key's octets, signed", signed(func(w *hsm.Wrapped) { w.Octets = otherW.Octets }), hsm.RoleRoot, spki, hsm.ErrWrapped},
		{"truncated octets, signed", signed(func(w *hsm.Wrapped) { w.Octets = w.Octets[:len(w.Octets)-8] }), hsm.RoleRoot, spki, hsm.ErrWrapped},
		{"two blocks, signed", signed(func(w *hsm.Wrapped) { w.Octets = w.Octets[:16] }), hsm.RoleRoot, spki, hsm.ErrWrapped},
		{"a kilobyte, signed", signed(func(w *hsm.Wrapped) { w.Octets = make([]byte, 1024) }), hsm.RoleRoot, spki, hsm.ErrWrapped},
		{"more than a kilobyte, signed", signed(func(w *hsm.Wrapped) { w.Octets = make([]byte, 1<<20) }), hsm.RoleRoot, spki, hsm.ErrWrapped},
		{"under another wrapping key", signed(func(w *hsm.Wrapped) { w.Key = later.Key }), hsm.RoleRoot, spki, hsm.ErrWrapped},
		{"under an unknown wrapping key", signed(func(w *hsm.Wrapped) { w.Key.Label = "nobody" }), hsm.RoleRoot, spki, hsm.ErrNotFound},
		{"another check value", signed(func(w *hsm.Wrapped) { w.Key.Check = "000000" }), hsm.RoleRoot, spki, hsm.ErrMismatch},
	}
	for _, row := range rows {
		_, _, err := p.target.Restore(t.Context(), row.w, row.role, row.spki)
		wants(t, p.to, row.name, err, row.want)
		p.empty(t, row.name)
	}
	for i := range w.Octets {
		_, _, err := p.target.Restore(t.Context(), signed(func(w *hsm.Wrapped) { w.Octets[i] ^= 1 }), hsm.RoleRoot, spki)
		if !errors.Is(err, hsm.ErrWrapped) {
			t.Errorf("octet %d flipped and signed: error %v, want ErrWrapped", i, err)
		}
	}
	p.empty(t, "flipped octets")
	if err := p.target.Err(); err != nil {
		t.Errorf("a wrapped key that was refused cost the connection: %v", err)
	}
	_, _, err := p.source.Restore(t.Context(), w, hsm.RoleRoot, spki)
	wants(t, p.from, "restore into the source", err, hsm.ErrPolicy)

	for name, spec := range map[string]hsm.Spec{
		"the label": {Label: "root", ID: hsmtest.RandomID(), Algorithm: hsm.ECDSAP256},
		"the id":    {Label: "another", ID: mustSpec(t, w).ID, Algorithm: hsm.ECDSAP256},
	} {
		if _, err := p.target.Generate(t.Context(), spec); err != nil {
			t.Fatal(err)
		}
		_, _, err := p.target.Restore(t.Context(), w, hsm.RoleRoot, spki)
		wants(t, p.to, "another key has "+name, err, hsm.ErrExists)
		lib, session := rawSession(t, p.target)
		for _, class := range []uint{p11.CKO_PRIVATE_KEY, p11.CKO_PUBLIC_KEY} {
			for _, object := range rawFind(t, lib, session, class, "") {
				if err := lib.DestroyObject(session, object); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if _, _, err := p.target.Restore(t.Context(), w, hsm.RoleRoot, spki); err != nil {
		t.Errorf("after all the refusals: %v", err)
	}
}

// mustSpec is the Spec of a wrapped key.
func mustSpec(t *testing.T, w hsm.Wrapped) hsm.Spec {
	t.Helper()
	spec, err := w.Spec()
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

// TestRestoreUnderLooseKey: a target whose wrapping key has no template for
// what it unwraps would give the key to anybody with the user PIN.
func TestRestoreUnderLooseKey(t *testing.T) {
	p := newBackupPair(t, func(p *backupPair) {
		for _, token := range []hsmtest.SoftHSMToken{p.from, p.to} {
			plantTrusted(t, token, "loose", token.Label == p.from.Label)
		}
	})
	p.pairing.Key = hsm.WrappingKey{Label: "loose", ID: "6c6f6f7365", Check: checkOf(t, p.source, "loose")}
	key := p.key(t, "root", hsm.ECDSAP256)
	w := p.wrap(t, key)
	_, _, err := p.target.Restore(t.Context(), w, hsm.RoleRoot, key.Ref().SPKI)
	wants(t, p.to, "restore", err, hsm.ErrPolicy)
	p.empty(t, "the refusal")
}

// plantTrusted has the officer enter a wrapping key by its value.
func plantTrusted(t *testing.T, token hsmtest.SoftHSMToken, label string, wrap bool) {
	t.Helper()
	lib := p11.New(token.Module)
	if err := lib.Initialize(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lib.Finalize() }()
	slots, err := lib.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	for _, slot := range slots {
		if info, err := lib.GetTokenInfo(slot); err != nil || info.Label != token.Label {
			continue
		}
		session, err := lib.OpenSession(slot, p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION)
		if err != nil {
			t.Fatal(err)
		}
		if err := lib.Login(session, p11.CKU_SO, string(token.SOPIN)); err != nil {
			t.Fatal(err)
		}
		var template []*p11.Attribute
		for code, value := range map[uint]any{
			p11.CKA_CLASS: p11.CKO_SECRET_KEY, p11.CKA_KEY_TYPE: p11.CKK_AES, p11.CKA_VALUE: bytes.Repeat([]byte{7}, 32),
			p11.CKA_TOKEN: true, p11.CKA_PRIVATE: false, p11.CKA_SENSITIVE: true, p11.CKA_EXTRACTABLE: false,
			p11.CKA_TRUSTED: true, p11.CKA_COPYABLE: false, p11.CKA_WRAP: wrap, p11.CKA_UNWRAP: !wrap,
			p11.CKA_ENCRYPT: false, p11.CKA_DECRYPT: false, p11.CKA_SIGN: false, p11.CKA_VERIFY: false, p11.CKA_DERIVE: false,
			p11.CKA_LABEL: label, p11.CKA_ID: label,
		} {
			template = append(template, p11.NewAttribute(code, value))
		}
		if _, err := lib.CreateObject(session, append(template, p11.NewAttribute(p11.CKA_MODIFIABLE, false))); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatal("the token is not there")
}

// checkOf reads a wrapping key's check value, in hexadecimal, "" if there is
// none.
func checkOf(t *testing.T, token *pkcs11.Token, label string) string {
	t.Helper()
	lib, session := rawSession(t, token)
	values, err := lib.GetAttributeValue(session, rawFind(t, lib, session, p11.CKO_SECRET_KEY, label)[0],
		[]*p11.Attribute{p11.NewAttribute(p11.CKA_CHECK_VALUE, nil)})
	if err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(values[0].Value)
}

// TestHalfPairs: what an interrupted restore leaves is found by the next one.
func TestHalfPairs(t *testing.T) {
	rows := []struct {
		name string
		// leave makes the target as the interruption leaves it.
		leave func(t *testing.T, p *backupPair, w hsm.Wrapped)
		want  error // of the next restore
	}{
		{"a private object of the key", func(t *testing.T, p *backupPair, w hsm.Wrapped) {
			p.unwrapRaw(t, w, mustSpec(t, w))
		}, nil},
		{"a public object of the key", func(t *testing.T, p *backupPair, w hsm.Wrapped) {
			if _, _, err := p.target.Restore(t.Context(), w, hsm.RoleRoot, mustSPKI(t, w)); err != nil {
				t.Fatal(err)
			}
			p.destroy(t, p11.CKO_PRIVATE_KEY, w.Label)
		}, nil},
		{"a private object of another key", func(t *testing.T, p *backupPair, w hsm.Wrapped) {
			p.unwrapRaw(t, p.wrap(t, p.key(t, "other", hsm.ECDSAP256)), mustSpec(t, w))
		}, hsm.ErrExists},
		{"a private object that was made there", func(t *testing.T, p *backupPair, w hsm.Wrapped) {
			if _, err := p.target.Generate(t.Context(), mustSpec(t, w)); err != nil {
				t.Fatal(err)
			}
			p.destroy(t, p11.CKO_PUBLIC_KEY, w.Label)
		}, hsm.ErrExists},
		{"a public object of another key", func(t *testing.T, p *backupPair, w hsm.Wrapped) {
			if _, err := p.target.Generate(t.Context(), mustSpec(t, w)); err != nil {
				t.Fatal(err)
			}
			p.destroy(t, p11.CKO_PRIVATE_KEY, w.Label)
		}, hsm.ErrExists},
		{"two private objects", func(t *testing.T, p *backupPair, w hsm.Wrapped) {
			p.unwrapRaw(t, w, mustSpec(t, w))
			p.unwrapRaw(t, w, mustSpec(t, w))
		}, hsm.ErrExists},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			p := newBackupPair(t)
			key := p.key(t, "root", hsm.ECDSAP256)
			w := p.wrap(t, key)
			row.leave(t, p, w)
			if _, err := p.target.Find(t.Context(), mustSpec(t, w).ID); err == nil {
				t.Error("the half pair opens")
			}
			restored, e, err := p.target.Restore(t.Context(), w, hsm.RoleRoot, key.Ref().SPKI)
			if row.want != nil {
				wants(t, p.to, "restore", err, row.want)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !e.Restored || restored.Ref().SPKI != key.Ref().SPKI {
				t.Errorf("restored %v, evidence says %t", restored.Ref(), e.Restored)
			}
		})
	}
}

// mustSPKI is the hash that a wrapped key names.
func mustSPKI(t *testing.T, w hsm.Wrapped) [32]byte {
	t.Helper()
	hash, err := hsm.ParseSPKIHash(w.SPKI)
	if err != nil {
		t.Fatal(err)
	}
	return hash
}

// unwrapRaw unwraps into the target under the names of spec.
func (p *backupPair) unwrapRaw(t *testing.T, w hsm.Wrapped, spec hsm.Spec) {
	t.Helper()
	lib, session := rawSession(t, p.target)
	under := rawFind(t, lib, session, p11.CKO_SECRET_KEY, w.Key.Label)[0]
	if _, err := lib.UnwrapKey(session, aesKWP, under, w.Octets, restoredTemplate(spec.Label, spec.ID, true, nil)); err != nil {
		t.Fatal(err)
	}
}

// destroy removes the target's objects of a class with a label.
func (p *backupPair) destroy(t *testing.T, class uint, label string) {
	t.Helper()
	lib, session := rawSession(t, p.target)
	for _, object := range rawFind(t, lib, session, class, label) {
		if err := lib.DestroyObject(session, object); err != nil {
			t.Fatal(err)
		}
	}
}

// TestBackupFaults makes single calls of a backup fail. Whatever happens, the
// call that reported an error is repeated without the fault and succeeds, or
// says that the key is there.
func TestBackupFaults(t *testing.T) {
	p := newBackupPair(t)
	wrapped := []struct {
		name string
		code uint
		want error // nil: succeeds by itself
	}{
		{"C_WrapKey says DEVICE_ERROR", p11.CKR_DEVICE_ERROR, nil}, // reopened and asked again
		{"C_WrapKey says DEVICE_MEMORY", p11.CKR_DEVICE_MEMORY, hsm.ErrBusy},
		{"C_WrapKey says MECHANISM_INVALID", p11.CKR_MECHANISM_INVALID, hsm.ErrUnsupported},
		{"C_WrapKey says KEY_NOT_WRAPPABLE", p11.CKR_KEY_NOT_WRAPPABLE, hsm.ErrPolicy},
		{"C_WrapKey says KEY_UNEXTRACTABLE", p11.CKR_KEY_UNEXTRACTABLE, hsm.ErrPolicy},
	}
	for _, row := range wrapped {
		t.Run(row.name, func(t *testing.T) {
			key := p.key(t, "w-"+t.Name()[len(t.Name())-6:], hsm.ECDSAP256)
			p.shim.Fail(hsmtest.WrapKey, row.code, 1)
			_, err := p.source.Wrap(t.Context(), key, hsm.RoleRoot, p.pairing)
			if p.shim.Pending() != 0 {
				t.Fatal("the fault was not met")
			}
			wants(t, p.from, "wrap", err, row.want)
			eventually(t, "wrapping", func() bool {
				_, err := p.source.Wrap(t.Context(), key, hsm.RoleRoot, p.pairing)
				return err == nil
			})
		})
	}
	// A restore calls C_UnwrapKey three times: an extractable trial, which is
	// refused, a trial, and into the token.
	restored := []struct {
		name     string
		function hsmtest.Function
		code     uint
		skip     int
		after    bool // it was done all the same
		want     error
		again    error // of the next one
	}{
		{"first C_UnwrapKey lost", hsmtest.UnwrapKey, p11.CKR_DEVICE_ERROR, 0, false, hsm.ErrLost, nil},
		{"first C_UnwrapKey lacks the mechanism", hsmtest.UnwrapKey, p11.CKR_MECHANISM_INVALID, 0, false, hsm.ErrUnsupported, nil},
		{"trial lost", hsmtest.UnwrapKey, p11.CKR_DEVICE_REMOVED, 1, false, hsm.ErrLost, nil},
		{"trial refused", hsmtest.UnwrapKey, p11.CKR_WRAPPED_KEY_INVALID, 1, false, hsm.ErrWrapped, nil},
		{"trial cannot sign", hsmtest.SignInit, p11.CKR_KEY_FUNCTION_NOT_PERMITTED, 0, false, p11.Error(p11.CKR_KEY_FUNCTION_NOT_PERMITTED), nil},
		{"trial is not dropped", hsmtest.DestroyObject, p11.CKR_FUNCTION_FAILED, 0, false, p11.Error(p11.CKR_FUNCTION_FAILED), nil},
		{"last C_UnwrapKey lost", hsmtest.UnwrapKey, p11.CKR_DEVICE_ERROR, 2, false, hsm.ErrLost, nil},
		{"last C_UnwrapKey out of room", hsmtest.UnwrapKey, p11.CKR_DEVICE_MEMORY, 2, false, hsm.ErrBusy, nil},
		{"C_CreateObject lost", hsmtest.CreateObject, p11.CKR_DEVICE_ERROR, 0, false, hsm.ErrLost, nil},
		{"C_CreateObject out of room", hsmtest.CreateObject, p11.CKR_DEVICE_MEMORY, 0, false, hsm.ErrBusy, nil},
		{"C_CreateObject's answer lost", hsmtest.CreateObject, p11.CKR_DEVICE_ERROR, 0, true, hsm.ErrLost, hsm.ErrExists},
	}
	for i, row := range restored {
		t.Run(row.name, func(t *testing.T) {
			key := p.key(t, "r"+string(rune('a'+i)), hsm.ECDSAP256)
			w := p.wrap(t, key)
			if row.after {
				p.shim.FailAfter(row.function, row.code, 1)
			} else {
				p.shim.FailLater(row.function, row.code, row.skip, 1)
			}
			_, _, err := p.target.Restore(t.Context(), w, hsm.RoleRoot, key.Ref().SPKI)
			if p.shim.Pending() != 0 {
				t.Fatal("the fault was not met")
			}
			wants(t, p.to, "restore", err, row.want)
			eventually(t, "the token to be back", func() bool { return p.target.Err() == nil })
			_, _, err = p.target.Restore(t.Context(), w, hsm.RoleRoot, key.Ref().SPKI)
			wants(t, p.to, "restore again", err, row.again)
			opened, err := p.target.Open(t.Context(), hsm.Ref{URI: pkcs11.KeyURI(p.to.Label, w.Label, mustSpec(t, w).ID), SPKI: key.Ref().SPKI}, hsm.RoleRoot)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := opened.SignContext(t.Context(), digest[:], crypto.SHA256); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestPairRefuses(t *testing.T) {
	shim := hsmtest.NewShim(t)
	a, b, open := shim.NewToken(t), shim.NewToken(t), shim.NewToken(t)
	kept := hsmtest.OpenSoftHSM(t, open) // other tokens of the module stay open
	hsmtest.NewKey(t, kept, "key", hsm.ECDSAP256)
	if _, err := pkcs11.Pair(t.Context(), "taken", officer(a), officer(b)); err != nil {
		t.Fatal(err)
	}
	with := func(token hsmtest.SoftHSMToken, change func(*pkcs11.Officer)) pkcs11.Officer {
		o := officer(token)
		change(&o)
		return o
	}
	rows := []struct {
		name           string
		label          string
		source, target pkcs11.Officer
		fault          func()
		want           error
		logins         int
	}{
		{"no label", "", officer(a), officer(b), nil, hsm.ErrUnsupported, 0},
		{"a label with a space", "a b", officer(a), officer(b), nil, hsm.ErrUnsupported, 0},
		{"a URI with a PIN", "k", with(a, func(o *pkcs11.Officer) { o.URI += "?pin-value=1" }), officer(b), nil, pkcs11.ErrURI, 0},
		{"an unknown token", "k", officer(a), with(b, func(o *pkcs11.Officer) { o.URI = pkcs11.TokenURI("nobody") }), nil, hsm.ErrNotFound, 1},
		{"a token that is open", "k", officer(open), officer(b), nil, pkcs11.ErrOpen, 0},
		{"one token twice", "k", officer(a), officer(a), nil, nil, 2},
		{"a label that is taken", "taken", officer(a), officer(b), nil, hsm.ErrExists, 2},
		{"a flag that forbids a try", "k", officer(a), officer(b), func() { shim.TokenFlags(p11.CKF_SO_PIN_FINAL_TRY) }, hsm.ErrPIN, 0},
		{"no derivation in the target", "k", officer(a), officer(b), func() { shim.Fail(hsmtest.DeriveKey, p11.CKR_MECHANISM_INVALID, 1) }, hsm.ErrUnsupported, 2},
		{"no template in the target", "k", officer(a), officer(b), func() { shim.Fail(hsmtest.DeriveKey, p11.CKR_ATTRIBUTE_TYPE_INVALID, 1) }, hsm.ErrUnsupported, 2},
		{"nobody may trust in the source", "k", officer(a), officer(b), func() { shim.FailLater(hsmtest.DeriveKey, p11.CKR_ATTRIBUTE_READ_ONLY, 1, 1) }, hsm.ErrUnsupported, 2},
		{"the source is lost", "k", officer(a), officer(b), func() { shim.FailLater(hsmtest.DeriveKey, p11.CKR_DEVICE_ERROR, 1, 1) }, hsm.ErrLost, 2},
		{"no key pair", "k", officer(a), officer(b), func() { shim.Fail(hsmtest.GenerateKeyPair, p11.CKR_MECHANISM_INVALID, 1) }, hsm.ErrUnsupported, 2},
	}
	for _, row := range rows {
		shim.Reset()
		if row.fault != nil {
			row.fault()
		}
		made, err := pkcs11.Pair(t.Context(), row.label, row.source, row.target)
		if err == nil {
			t.Errorf("%s: paired %v", row.name, made)
		}
		if row.want != nil {
			wants(t, a, row.name, err, row.want)
			noPIN(t, b, row.name, err.Error())
		}
		if n := shim.Calls(hsmtest.Login); n > row.logins {
			t.Errorf("%s: %d logins, want at most %d", row.name, n, row.logins)
		}
	}
	shim.Reset()
	if _, err := pkcs11.Pair(t.Context(), "k", officer(a), officer(b)); err != nil {
		t.Errorf("what failed left something behind: %v", err)
	}
	wrong := with(a, func(o *pkcs11.Officer) { o.PIN = []byte("wrong-" + string(a.SOPIN)) })
	shim.Reset()
	_, err := pkcs11.Pair(t.Context(), "l", wrong, officer(b))
	wants(t, a, "a wrong PIN", err, hsm.ErrPIN)
	if n := shim.Calls(hsmtest.Login); n != 1 {
		t.Errorf("a wrong PIN was sent %d times", n)
	}
	if _, err := kept.Random(t.Context(), 8); err != nil {
		t.Errorf("the token that was open: %v", err)
	}
}
