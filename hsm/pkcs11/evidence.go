package pkcs11

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"maps"
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
	var token hsm.TokenInfo
	var attributes map[string]string
	err := t.do(ctx, hsm.ShareRest, true, func(c *connection) error {
		p, err := k.on(c)
		if err != nil {
			return err
		}
		token = c.info
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
		Time: now.UTC(), Token: token, URI: k.ref.URI,
		SPKI: hex.EncodeToString(k.ref.SPKI[:]), PublicKey: der, Algorithm: algorithm,
		Mechanism:  mechanism(attributes["KEY_GEN_MECHANISM"]),
		Attributes: attributes, SelfTestText: proof.Text, SelfTest: proof.Signature,
		Level: hsm.LevelOf(token, attributes), Restored: attributes["LOCAL"] != "true",
	}, nil
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
