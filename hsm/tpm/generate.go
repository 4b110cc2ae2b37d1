package tpm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-tpm/tpm2"
)

// Generate makes a key pair in the TPM (TPM2_Create, Part 3, Section 12.1). See
// hsm.Token. Extractable is ErrUnsupported: a key of ours never leaves its TPM.
//
// Order: check spec; refuse a label or id that exists; create with every
// attribute explicit and the id as outsideInfo; compare the public area with
// the template; write the creation file, then the key file; find the key again
// as Open would; hsm.SelfTest. Until the key file is there the key exists
// nowhere; when a later step fails it stays, and the error says so. A generation
// is never tried twice: after ErrLost, Find with the id says whether it
// happened.
func (t *Token) Generate(ctx context.Context, spec hsm.Spec) (hsm.Key, error) {
	if err := hsm.CheckSpec(spec); err != nil {
		return nil, fmt.Errorf("generate key: %w", err)
	}
	if spec.Extractable {
		return nil, fmt.Errorf("generate %s: a TPM key cannot be extractable: %w", spec.Label, hsm.ErrUnsupported)
	}
	spec.ID = bytes.Clone(spec.ID)
	err := t.do(ctx, hsm.ShareRest, false, func(c *connection) error {
		if err := t.files.vacant(spec.Label, spec.ID); err != nil {
			return err
		}
		key, creation, err := c.create(spec)
		if err != nil {
			return err
		}
		return t.files.add(spec.Label, key, creation)
	})
	if err != nil {
		return nil, fmt.Errorf("generate %s in %s: %w", spec.Label, t.uri, err)
	}
	u := t.uri
	u.label, u.id = spec.Label, spec.ID
	k, err := t.resolve(ctx, u, nil, "generate") // an unknown role: the strictest policy
	if err != nil {
		return nil, fmt.Errorf("read back %s, which stays in %s: %w", spec.Label, t.uri, err)
	}
	k.role = hsm.RoleNone
	if _, err := hsm.SelfTest(ctx, k, time.Now()); err != nil {
		return nil, fmt.Errorf("self-test of %s, which stays in the folder: %w", k.Ref(), err)
	}
	return k, nil
}

// create makes the pair and returns the texts of its files.
func (c *connection) create(spec hsm.Spec) (keyText, creationText []byte, err error) {
	s, err := c.session()
	if err != nil {
		return nil, nil, err
	}
	above, err := c.parent(c.srk)
	if err != nil {
		return nil, nil, err
	}
	template := signingTemplate(spec.Algorithm)
	rsp, err := run(c, tpm2.Create{
		ParentHandle: tpm2.AuthHandle{Handle: above.Handle, Name: above.Name, Auth: s.with(nil, in|out)},
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			UserAuth: tpm2.TPM2BAuth{Buffer: c.cfg.Auth},
		}},
		InPublic:    tpm2.New2B(template),
		OutsideInfo: tpm2.TPM2BData{Buffer: spec.ID},
	})
	if err != nil {
		return nil, nil, fmt.Errorf("create key: %w", err)
	}
	made, err := parsePublic(rsp.OutPublic.Bytes())
	if err != nil {
		return nil, nil, &lostError{err}
	}
	if !made.is(template) {
		return nil, nil, fmt.Errorf("the TPM made another key than it was asked for: %w", hsm.ErrPolicy)
	}
	file := &keyFile{
		label: spec.Label, id: spec.ID, parent: c.srk,
		public: rsp.OutPublic.Bytes(), private: rsp.OutPrivate.Buffer,
	}
	if keyText, err = file.marshal(); err != nil {
		return nil, nil, err
	}
	creationText, err = newCreation(made, rsp).marshal()
	return keyText, creationText, err
}

// newCreation takes the creation file's contents from the TPM's answer.
func newCreation(made *public, rsp *tpm2.CreateResponse) *creation {
	data := rsp.CreationData.Bytes()
	hash := sha256.Sum256(data)
	return &creation{name: made.name.Buffer, data: data, hash: hash[:], ticket: rsp.CreationTicket}
}

// is says whether p is what template asked for.
func (p *public) is(template tpm2.TPMTPublic) bool {
	same := p.area
	same.Unique = template.Unique
	return bytes.Equal(tpm2.Marshal(same), tpm2.Marshal(template))
}
