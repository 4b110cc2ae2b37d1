package pkcs11

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/miekg/pkcs11"
)

// Evidence reads every attribute of both objects of key one by one, and signs
// a self-test. The level comes from what the token says of itself, so it is at
// most hsm.LevelModule. See hsm.Token.
func (t *Token) Evidence(ctx context.Context, k hsm.Key) (hsm.Evidence, error) {
	own, err := t.own(k)
	if err != nil {
		return hsm.Evidence{}, fmt.Errorf("evidence: %w", err)
	}
	e, err := t.evidence(ctx, own)
	if err != nil {
		return hsm.Evidence{}, fmt.Errorf("evidence of %s: %w", own.ref, err)
	}
	return e, nil
}

func (t *Token) evidence(ctx context.Context, k *key) (hsm.Evidence, error) {
	var device hsm.Inspection
	var attributes map[string]string
	err := t.do(ctx, hsm.ShareRest, true, func(c *connection) error {
		p, err := k.on(c)
		if err != nil {
			return err
		}
		if device, err = c.describeDevice(); err != nil {
			return err
		}
		return c.withAdmin(func(s pkcs11.SessionHandle) (err error) {
			attributes, err = c.pairAttributes(s, p)
			return err
		})
	})
	if err != nil {
		return hsm.Evidence{}, err
	}
	algorithm, err := hsm.AlgorithmOf(k.pub)
	if err != nil {
		return hsm.Evidence{}, err
	}
	der, err := x509.MarshalPKIXPublicKey(k.pub)
	if err != nil {
		return hsm.Evidence{}, err
	}
	now := time.Now()
	proof, err := hsm.Prove(ctx, k, now)
	if err != nil {
		return hsm.Evidence{}, err
	}
	return hsm.Evidence{
		Time: now.UTC(), Token: device.Token, Slot: device.Slot, Library: device.Library,
		Mechanisms: slices.DeleteFunc(device.Mechanisms, foreign), URI: k.ref.URI,
		SPKI: hex.EncodeToString(k.ref.SPKI[:]), PublicKey: der, Algorithm: algorithm,
		Mechanism:  mechanism(attributes["KEY_GEN_MECHANISM"]),
		Attributes: attributes, SelfTestText: proof.Text, SelfTest: proof.Signature,
		Level: hsm.LevelOf(device.Token, attributes), Restored: attributes["LOCAL"] != "true",
	}, nil
}

// describeDevice says what the token, its slot and the library say of
// themselves now.
func (c *connection) describeDevice() (hsm.Inspection, error) {
	d := hsm.Inspection{Token: c.info}
	var err error
	if d.Library, err = libraryInfo(c.raw, c.info.Module); err != nil {
		return d, err
	}
	if d.Slot, err = slotInfo(c.raw, c.slot); err != nil {
		return d, err
	}
	d.Mechanisms, err = mechanismList(c.raw, c.slot)
	return d, err
}

// foreign says that a mechanism can do nothing with an elliptic curve key: it
// neither makes nor uses one, nor wraps private keys.
func foreign(m hsm.Mechanism) bool {
	return !strings.HasPrefix(m.Name, "CKM_EC") && !slices.Contains(m.Flags, "WRAP")
}

// pairAttributes reads both objects.
func (c *connection) pairAttributes(s pkcs11.SessionHandle, p *pair) (map[string]string, error) {
	all, err := c.attributes(s, p.private, privateAttributes, "")
	if err != nil {
		return nil, err
	}
	public, err := c.attributes(s, p.public, publicAttributes, "PUBLIC.")
	if err != nil {
		return nil, err
	}
	maps.Copy(all, public)
	return all, nil
}

// mechanism names the value of CKA_KEY_GEN_MECHANISM, given in hexadecimal.
// It is "" if the token does not say (CK_UNAVAILABLE_INFORMATION).
func mechanism(value string) string {
	raw, err := hex.DecodeString(value)
	if err != nil {
		return ""
	}
	n, ok := number(raw)
	switch {
	case !ok || n == ^uint64(0) || n == uint64(^uint32(0)):
		return ""
	case n == pkcs11.CKM_EC_KEY_PAIR_GEN:
		return "CKM_EC_KEY_PAIR_GEN"
	}
	return fmt.Sprintf("CKM_%#x", n)
}
