package pkcs11

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"time"

	"github.com/ThalesIgnite/crypto11"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/miekg/pkcs11"
)

// Generate makes a key pair in the token. See hsm.Token.
//
// Order: check spec; refuse an id or label that exists, in any object; generate
// with every attribute explicit; find the pair again as Open would; read its
// attributes back and check them against spec; sign and verify, 65 times
// (hsm.SelfTest). When a step
// after the generation fails the pair stays in the token, to be looked at, and
// the error says so. A generation is never tried twice: after ErrLost, Find
// with the id says whether it happened.
func (t *Token) Generate(ctx context.Context, spec hsm.Spec) (hsm.Key, error) {
	if err := hsm.CheckSpec(spec); err != nil {
		return nil, fmt.Errorf("generate key: %w", err)
	}
	spec.ID = bytes.Clone(spec.ID)
	var made *pair
	err := t.do(ctx, hsm.ShareRest, false, func(c *connection) (err error) {
		made, err = c.generate(spec)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("generate %s in %s: %w", spec.Label, t.uri, err)
	}
	k := t.adopt(made.ref(t.uri), hsm.RoleNone, made)
	if _, err := hsm.SelfTest(ctx, k, time.Now()); err != nil {
		return nil, fmt.Errorf("self-test of %s, which stays in the token: %w", k.Ref(), err)
	}
	return k, nil
}

// generate makes the pair and checks what the token made of it.
func (c *connection) generate(spec hsm.Spec) (*pair, error) {
	bits := spec.Algorithm.Curve().Params().BitSize
	for _, mechanism := range []uint{pkcs11.CKM_EC_KEY_PAIR_GEN, pkcs11.CKM_ECDSA} {
		if err := c.supports(mechanism, bits); err != nil {
			return nil, err
		}
	}
	if err := c.withAdmin(func(s pkcs11.SessionHandle) error { return c.vacant(s, spec) }); err != nil {
		return nil, err
	}
	public, private, err := templates(spec)
	if err != nil {
		return nil, err
	}
	signer, err := c.context.GenerateECDSAKeyPairWithAttributes(public, private, spec.Algorithm.Curve())
	if err != nil {
		return nil, fmt.Errorf("C_GenerateKeyPair: %w", classify(err))
	}
	var made *pair
	err = c.withAdmin(func(s pkcs11.SessionHandle) (err error) {
		if made, err = c.locatePair(s, uri{object: spec.Label, id: spec.ID}); err != nil {
			return err
		}
		if !made.pub.Equal(signer.Public()) {
			return hsm.ErrMismatch
		}
		attributes, err := c.attributes(s, made.private, privateAttributes, "")
		if err != nil {
			return err
		}
		return checkMade(spec, attributes)
	})
	if err != nil {
		return nil, fmt.Errorf("read back the new pair, which stays in the token: %w", err)
	}
	made.signer = signer
	return made, nil
}

// vacant refuses a spec whose id or label any key object of the token has.
func (c *connection) vacant(s pkcs11.SessionHandle, spec hsm.Spec) error {
	for _, class := range []uint{pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_PUBLIC_KEY, pkcs11.CKO_SECRET_KEY} {
		same, err := c.find(s, class, spec.Label, nil)
		if err != nil {
			return err
		}
		if len(same) > 0 {
			return fmt.Errorf("label %s: %w", spec.Label, hsm.ErrExists)
		}
		if same, err = c.find(s, class, "", spec.ID); err != nil {
			return err
		}
		if len(same) > 0 {
			return fmt.Errorf("id %x: %w", spec.ID, hsm.ErrExists)
		}
	}
	return nil
}

// templates returns the attributes of a new pair. None is left to the module's
// default: defaults have allowed DECRYPT, UNWRAP and MODIFIABLE.
func templates(spec hsm.Spec) (public, private crypto11.AttributeSet, err error) {
	public, err = attributeSet(map[uint]any{
		pkcs11.CKA_CLASS: pkcs11.CKO_PUBLIC_KEY, pkcs11.CKA_KEY_TYPE: pkcs11.CKK_EC,
		pkcs11.CKA_TOKEN: true, pkcs11.CKA_PRIVATE: false, pkcs11.CKA_MODIFIABLE: false,
		pkcs11.CKA_VERIFY: true, pkcs11.CKA_VERIFY_RECOVER: false,
		pkcs11.CKA_ENCRYPT: false, pkcs11.CKA_WRAP: false, pkcs11.CKA_DERIVE: false,
		pkcs11.CKA_EC_PARAMS: params(spec.Algorithm),
		pkcs11.CKA_ID:        spec.ID, pkcs11.CKA_LABEL: []byte(spec.Label),
	})
	if err != nil {
		return nil, nil, err
	}
	private, err = attributeSet(map[uint]any{
		pkcs11.CKA_CLASS: pkcs11.CKO_PRIVATE_KEY, pkcs11.CKA_KEY_TYPE: pkcs11.CKK_EC,
		pkcs11.CKA_TOKEN: true, pkcs11.CKA_PRIVATE: true, pkcs11.CKA_MODIFIABLE: false,
		pkcs11.CKA_SENSITIVE: true, pkcs11.CKA_EXTRACTABLE: spec.Extractable,
		pkcs11.CKA_SIGN: true, pkcs11.CKA_SIGN_RECOVER: false, pkcs11.CKA_DECRYPT: false,
		pkcs11.CKA_UNWRAP: false, pkcs11.CKA_DERIVE: false,
		pkcs11.CKA_WRAP_WITH_TRUSTED: spec.Extractable, pkcs11.CKA_ALWAYS_AUTHENTICATE: false,
		pkcs11.CKA_ID: spec.ID, pkcs11.CKA_LABEL: []byte(spec.Label),
	})
	return public, private, err
}

// attributeSet builds a crypto11 template.
func attributeSet(values map[uint]any) (crypto11.AttributeSet, error) {
	set := crypto11.NewAttributeSet()
	for code, value := range values {
		if err := set.Set(code, value); err != nil {
			return nil, fmt.Errorf("attribute %#x: %w", code, err)
		}
	}
	return set, nil
}

// checkMade compares a new key's attributes with its spec: the policy, and the
// template's remaining words, where the module knows them.
func checkMade(spec hsm.Spec, attributes map[string]string) error {
	policy := hsm.Policy{Extractable: spec.Extractable}
	if err := policy.Check(attributes); err != nil {
		return err
	}
	if spec.Extractable && attributes["EXTRACTABLE"] != "true" {
		return fmt.Errorf("EXTRACTABLE is %q, want true: %w", attributes["EXTRACTABLE"], hsm.ErrPolicy)
	}
	for _, name := range []string{"SIGN_RECOVER", "ALWAYS_AUTHENTICATE"} {
		if attributes[name] == "true" {
			return fmt.Errorf("%s is true: %w", name, hsm.ErrPolicy)
		}
	}
	want := map[string]string{
		"ID": hex.EncodeToString(spec.ID), "LABEL": hex.EncodeToString([]byte(spec.Label)),
		"EC_PARAMS": hex.EncodeToString(params(spec.Algorithm)),
	}
	for name, value := range want {
		if attributes[name] != value {
			return fmt.Errorf("%s is %q, want %s: %w", name, attributes[name], value, hsm.ErrPolicy)
		}
	}
	return nil
}
