package tpm

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"strconv"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-tpm/tpm2"
)

// Evidence loads the key again, and with that has the TPM confirm its public
// area, and signs a proof. The level comes from what the TPM says of itself; a
// verified attestation is stronger: it is made too, unless the TPM lacks a command
// for it or refuses Config.EndorsementAuth, and VerifyAttestation says what it is
// worth. See hsm.Token and, for the attributes, the
// package comment.
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
	var mechanisms []hsm.Mechanism
	err := t.do(ctx, hsm.ShareRest, true, func(c *connection) error {
		handle, err := c.load(k)
		if err != nil {
			return err
		}
		token = c.info
		if mechanisms, err = c.mechanisms(); err != nil {
			return err
		}
		return c.confirm(k, handle)
	})
	if err != nil {
		return hsm.Evidence{}, err
	}
	der, err := x509.MarshalPKIXPublicKey(k.public.key)
	if err != nil {
		return hsm.Evidence{}, err
	}
	now := time.Now()
	proof, err := hsm.Prove(ctx, k, now)
	if err != nil {
		return hsm.Evidence{}, err
	}
	attributes := k.attributes()
	return t.attested(ctx, k, hsm.Evidence{
		Time: now.UTC(), Token: token, URI: k.ref.URI,
		Library: hsm.LibraryInfo{Interface: token.Hardware}, Mechanisms: mechanisms,
		SPKI: hex.EncodeToString(k.ref.SPKI[:]), PublicKey: der, Algorithm: k.public.algorithm,
		Mechanism: k.mechanism(), Attributes: attributes,
		SelfTestText: proof.Text, SelfTest: proof.Signature,
		Level: hsm.LevelOf(token, attributes),
	})
}

// confirm reads the public area of a loaded key again.
func (c *connection) confirm(k *key, handle tpm2.TPMHandle) error {
	rsp, err := run(c, tpm2.ReadPublic{ObjectHandle: handle})
	if err != nil {
		return fmt.Errorf("read public area: %w", err)
	}
	if string(rsp.Name.Buffer) != string(k.public.name.Buffer) {
		return fmt.Errorf("the TPM has another key: %w", hsm.ErrMismatch)
	}
	return nil
}

// mechanism names the command that made the key, if the TPM did.
func (k *key) mechanism() string {
	if k.public.area.ObjectAttributes.SensitiveDataOrigin {
		return "TPM2_Create"
	}
	return ""
}

// attributes says what the key is in the words of hsm.Evidence. The table is in
// the package comment.
func (k *key) attributes() map[string]string {
	is := k.public.area.ObjectAttributes
	made := is.FixedTPM && is.SensitiveDataOrigin
	attributes := map[string]string{}
	for name, value := range map[string]bool{
		"TOKEN": !is.STClear, "SENSITIVE": true, "MODIFIABLE": false,
		"PRIVATE":          is.UserWithAuth && (k.file == nil || !k.file.emptyAuth),
		"ALWAYS_SENSITIVE": is.SensitiveDataOrigin,
		"EXTRACTABLE":      !is.FixedTPM,
		"LOCAL":            made, "NEVER_EXTRACTABLE": made,
		"SIGN":    is.SignEncrypt,
		"DECRYPT": is.Decrypt, "UNWRAP": is.Decrypt, "DERIVE": is.Decrypt,

		"TPM.fixedTPM": is.FixedTPM, "TPM.stClear": is.STClear, "TPM.fixedParent": is.FixedParent,
		"TPM.sensitiveDataOrigin": is.SensitiveDataOrigin, "TPM.userWithAuth": is.UserWithAuth,
		"TPM.adminWithPolicy": is.AdminWithPolicy, "TPM.noDA": is.NoDA,
		"TPM.encryptedDuplication": is.EncryptedDuplication, "TPM.restricted": is.Restricted,
		"TPM.decrypt": is.Decrypt, "TPM.sign": is.SignEncrypt,
	} {
		attributes[name] = strconv.FormatBool(value)
	}
	attributes["TPM.name"] = hex.EncodeToString(k.public.name.Buffer)
	attributes["TPM.scheme"] = "ECDSA with " + k.public.algorithm.Hash().String()
	attributes["TPM.policy"] = hex.EncodeToString(k.public.area.AuthPolicy.Buffer)
	const unavailable = "unavailable: no key file"
	attributes["ID"], attributes["LABEL"], attributes["TPM.parent"] = unavailable, unavailable, unavailable
	if k.file != nil {
		attributes["ID"] = hex.EncodeToString(k.file.id)
		attributes["LABEL"] = hex.EncodeToString([]byte(k.file.label))
		attributes["TPM.parent"] = fmt.Sprintf("%#x", uint32(k.file.parent))
	}
	return attributes
}
