package tpm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

var _ hsm.Attester = (*Token)(nil)

// Attest implements hsm.Attester with TPM2_Certify and, for a key whose creation
// file is there, TPM2_CertifyCreation (Part 3, Sections 18.2 and 18.3), signed by
// an attestation key that the TPM makes each time anew from its endorsement
// seed. It runs a credential activation against an endorsement key, one with a
// certificate if there is one, and verifies the whole before it returns it. The
// TPM is taken for some steps in turn, not for all of it: keys go on signing.
// It needs Config.EndorsementAuth.
func (t *Token) Attest(ctx context.Context, k hsm.Key, nonce []byte) (hsm.Attestation, error) {
	own, err := t.own(k)
	if err != nil {
		return hsm.Attestation{}, fmt.Errorf("attest: %w", err)
	}
	a, err := t.attest(ctx, own, bytes.Clone(nonce))
	if err == nil {
		_, err = VerifyAttestation(a, own.ref.SPKI, nonce, nil)
	}
	if err != nil {
		return hsm.Attestation{}, fmt.Errorf("attest %s: %w", own.ref, err)
	}
	return a, nil
}

// attested puts an attestation into evidence if the TPM can make one.
func (t *Token) attested(ctx context.Context, k *key, e hsm.Evidence) (hsm.Evidence, error) {
	a, err := t.Attest(ctx, k, e.AttestationNonce())
	switch {
	case err == nil:
		e.Attestation = &a
	case errors.Is(err, hsm.ErrPIN), errors.Is(err, hsm.ErrUnsupported):
		t.log.Warn("evidence without an attestation", "key", k.ref.URI, "error", err)
	default:
		return hsm.Evidence{}, err
	}
	return e, nil
}

func (t *Token) attest(ctx context.Context, k *key, nonce []byte) (hsm.Attestation, error) {
	a := hsm.Attestation{Format: hsm.AttestationTPM, Nonce: nonce, Key: tpm2.Marshal(k.public.area)}
	if err := checkNonce(nonce); err != nil {
		return a, err
	}
	birth, err := t.birth(k)
	if err != nil {
		return a, err
	}
	template, err := t.endorsed(ctx, &a)
	if err != nil {
		return hsm.Attestation{}, fmt.Errorf("endorsement key: %w", err)
	}
	secret := make([]byte, activationSize)
	_, _ = rand.Read(secret) // never fails
	steps := []func(*connection) error{
		func(c *connection) error { return c.certify(k, &a) },
		func(c *connection) error { return c.certifyCreation(k, birth, &a) },
		func(c *connection) error { return c.activateOwn(template, secret, &a) },
	}
	for _, step := range steps {
		if err := t.do(ctx, hsm.ShareRest, true, step); err != nil {
			return hsm.Attestation{}, err // a step that was left may still write to a
		}
	}
	return a, nil
}

// birth returns what is on file of a key's creation, nil if nothing is.
func (t *Token) birth(k *key) (*creation, error) {
	if k.file == nil {
		return nil, nil
	}
	birth, err := t.files.creation(k.file.label)
	switch {
	case errors.Is(err, hsm.ErrNotFound):
		return nil, nil
	case err == nil && !bytes.Equal(birth.name, k.public.name.Buffer):
		return nil, fmt.Errorf("%s is of another key: %w", creationOf(k.file.label), ErrKeyFile)
	}
	return birth, err
}

// endorsed chooses an endorsement key and writes it, and its certificate, into a.
func (t *Token) endorsed(ctx context.Context, a *hsm.Attestation) (ekTemplate, error) {
	for _, template := range ekTemplates() {
		var found bool
		err := t.do(ctx, hsm.ShareRest, true, func(c *connection) (err error) {
			found, err = c.certified(template, a)
			return err
		})
		if err != nil && !errors.Is(err, hsm.ErrUnsupported) || found {
			return template, err
		}
	}
	plain := ekTemplates()[0]
	return plain, t.do(ctx, hsm.ShareRest, true, func(c *connection) error {
		ek, err := c.endorsement("ek", plain.area)
		if err != nil {
			return err
		}
		a.EK = tpm2.Marshal(ek.area)
		return c.drop("ek")
	})
}

// certified writes the endorsement key of a template into a if the TPM has a
// certificate of it, and says whether it has.
func (c *connection) certified(template ekTemplate, a *hsm.Attestation) (bool, error) {
	der, err := c.readCertificate(template.certificate)
	if errors.Is(err, hsm.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read certificate: %w", err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		c.log.Warn("EK certificate in the TPM cannot be read", "index", fmt.Sprintf("%#x", uint32(template.certificate)), "error", err)
		return false, nil
	}
	ek, err := c.endorsement("ek", template.area)
	if err != nil {
		return false, err
	}
	if err := c.drop("ek"); err != nil {
		return false, err
	}
	area := tpm2.Marshal(ek.area)
	key, _, err := endorsementKey(area)
	if err != nil {
		return false, &lostError{err}
	}
	if pub, ok := certificate.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(key) {
		c.log.Warn("EK certificate in the TPM is of another key than the template makes", "index", fmt.Sprintf("%#x", uint32(template.certificate)))
		return false, nil
	}
	a.EK, a.EKCertificate = area, der
	return true, nil
}

// nvChunk is how much of an index is read at once, in octets: every TPM can
// (TPM_PT_NV_BUFFER_MAX).
const nvChunk = 512

// readCertificate reads a certificate from NV memory (TPM2_NV_Read, Part 3,
// Section 31.13), where anybody may read it; hsm.ErrNotFound if there is none.
func (c *connection) readCertificate(index tpm2.TPMHandle) ([]byte, error) {
	area, name, err := c.readNVPublic(index)
	if err != nil {
		return nil, err
	}
	if area.DataSize > maxMessage || !area.Attributes.Written {
		return nil, fmt.Errorf("NV index %#x of %d octets is no certificate: %w", uint32(index), area.DataSize, hsm.ErrNotFound)
	}
	by := tpm2.AuthHandle{Handle: name.Handle, Name: name.Name, Auth: tpm2.PasswordAuth(nil)}
	if !area.Attributes.AuthRead {
		s, err := c.session()
		if err != nil {
			return nil, err
		}
		by = c.owner(s, plain)
	}
	var all []byte
	for len(all) < int(area.DataSize) {
		rsp, err := run(c, tpm2.NVRead{
			AuthHandle: by, NVIndex: name, Offset: uint16(len(all)), Size: min(nvChunk, area.DataSize-uint16(len(all))),
		})
		if err != nil {
			return nil, err
		}
		if len(rsp.Data.Buffer) == 0 {
			return nil, &lostError{fmt.Errorf("%w: nothing read", errMalformed)}
		}
		all = append(all, rsp.Data.Buffer...)
	}
	der, err := trimCertificate(all)
	if err != nil {
		return nil, fmt.Errorf("NV index %#x: %w: %w", uint32(index), err, hsm.ErrNotFound)
	}
	return der, nil
}

// primary is a loaded primary key of the endorsement hierarchy.
type primary struct {
	tpm2.NamedHandle
	area *tpm2.TPMTPublic
}

// endorsement makes the primary key of a template, or finds it loaded as id. The
// handle is good until the next hold or room.
func (c *connection) endorsement(id string, template tpm2.TPMTPublic) (primary, error) {
	s, err := c.session()
	if err != nil {
		return primary{}, err
	}
	handle, err := c.hold(id, func() (tpm2.TPMHandle, error) {
		rsp, err := run(c, tpm2.CreatePrimary{
			PrimaryHandle: c.endorser(s),
			InPublic:      tpm2.New2B(template),
		})
		if err != nil {
			return zero, err
		}
		return rsp.ObjectHandle, nil
	})
	if err != nil {
		return primary{}, fmt.Errorf("make primary key: %w", err)
	}
	area, name, err := c.readPersistent(handle)
	if err != nil {
		return primary{}, err
	}
	if !sameTemplate(area, &template) {
		return primary{}, &lostError{fmt.Errorf("%w: another primary key than asked for", errMalformed)}
	}
	return primary{tpm2.NamedHandle{Handle: handle, Name: name}, area}, nil
}

// endorser authorises a command by the endorsement hierarchy.
func (c *connection) endorser(s *session) tpm2.AuthHandle {
	return tpm2.AuthHandle{
		Handle: tpm2.TPMRHEndorsement, Name: tpm2.HandleName(tpm2.TPMRHEndorsement), Auth: s.with(c.cfg.EndorsementAuth, plain),
	}
}

// drop flushes an object that is not needed again soon.
func (c *connection) drop(id string) error {
	o := c.objects[id]
	if o == nil {
		return nil
	}
	delete(c.objects, id)
	if o.handle == zero {
		return nil
	}
	return c.flush(o.handle)
}

// together loads the key and then the attestation key, and leaves both loaded:
// of three slots the least recently used one is given up.
func (c *connection) together(k *key) (tpm2.TPMHandle, primary, error) {
	if _, err := c.endorsement("ak", akTemplate()); err != nil {
		return zero, primary{}, fmt.Errorf("attestation key: %w", err)
	}
	handle, err := c.load(k)
	if err != nil {
		return zero, primary{}, err
	}
	ak, err := c.endorsement("ak", akTemplate())
	if err != nil {
		return zero, primary{}, fmt.Errorf("attestation key: %w", err)
	}
	return handle, ak, nil
}

// certify is one TPM2_Certify. The attestation key has no authValue; it stays
// loaded for what follows.
func (c *connection) certify(k *key, a *hsm.Attestation) error {
	handle, ak, err := c.together(k)
	if err != nil {
		return err
	}
	s, err := c.session()
	if err != nil {
		return err
	}
	rsp, err := run(c, tpm2.Certify{
		ObjectHandle:   tpm2.AuthHandle{Handle: handle, Name: k.public.name, Auth: s.with(c.cfg.Auth, plain)},
		SignHandle:     tpm2.AuthHandle{Handle: ak.Handle, Name: ak.Name, Auth: tpm2.PasswordAuth(nil)},
		QualifyingData: tpm2.TPM2BData{Buffer: a.Nonce},
		InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
	})
	if err != nil {
		return fmt.Errorf("certify: %w", err)
	}
	a.AK = tpm2.Marshal(ak.area)
	a.Certify, a.CertifySignature = rsp.CertifyInfo.Bytes(), tpm2.Marshal(rsp.Signature)
	return nil
}

// certifyCreation is one TPM2_CertifyCreation, if birth is known.
func (c *connection) certifyCreation(k *key, birth *creation, a *hsm.Attestation) error {
	if birth == nil {
		return nil
	}
	handle, ak, err := c.together(k)
	if err != nil {
		return err
	}
	s, err := c.session()
	if err != nil {
		return err
	}
	rsp, err := run(c, tpm2.CertifyCreation{
		SignHandle:     tpm2.AuthHandle{Handle: ak.Handle, Name: ak.Name, Auth: s.with(nil, plain)},
		ObjectHandle:   tpm2.NamedHandle{Handle: handle, Name: k.public.name},
		QualifyingData: tpm2.TPM2BData{Buffer: a.Nonce},
		CreationHash:   tpm2.TPM2BDigest{Buffer: birth.hash},
		InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		CreationTicket: birth.ticket,
	})
	if errors.Is(err, tpm2.TPMRCTicket) {
		return fmt.Errorf("the TPM does not recognise the key's creation file: %w: %w", hsm.ErrMismatch, err)
	}
	if err != nil {
		return fmt.Errorf("certify creation: %w", err)
	}
	a.Creation, a.CreationSignature, a.CreationData = rsp.CertifyInfo.Bytes(), tpm2.Marshal(rsp.Signature), birth.data
	return nil
}

// activateOwn runs a credential activation with a secret of our own.
func (c *connection) activateOwn(template ekTemplate, secret []byte, a *hsm.Attestation) error {
	credential, err := MakeCredential(*a, secret)
	if err != nil {
		return err
	}
	answer, err := c.activate(template, credential)
	if err != nil {
		return err
	}
	a.Activation = &hsm.Activation{Secret: secret, Answer: answer}
	return nil
}

// ActivateCredential gives back the secret of a Credential that was made for the
// endorsement key and the attestation key of an attestation by this TPM
// (TPM2_ActivateCredential, Part 3, Section 12.5): the proof, to whoever made it,
// that both are in this TPM. The secret goes encrypted from the TPM to here.
// Errors: ErrMismatch (it was made for another TPM or attestation key),
// ErrPIN (EndorsementAuth is wrong), ErrBusy, ErrLost.
func (t *Token) ActivateCredential(ctx context.Context, a hsm.Attestation, credential Credential) ([]byte, error) {
	secret, err := t.activateCredential(ctx, a, credential)
	if err != nil {
		return nil, fmt.Errorf("activate credential in %s: %w", t.uri, err)
	}
	return secret, nil
}

func (t *Token) activateCredential(ctx context.Context, a hsm.Attestation, credential Credential) ([]byte, error) {
	_, ek, err := endorsementKey(a.EK)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAttestation, err)
	}
	for _, template := range ekTemplates() {
		if !sameTemplate(ek, &template.area) {
			continue
		}
		var secret []byte
		err := t.do(ctx, hsm.ShareRest, true, func(c *connection) (err error) {
			secret, err = c.activate(template, credential)
			return err
		})
		if err != nil {
			return nil, err
		}
		return secret, nil
	}
	return nil, hsm.ErrUnsupported // unreachable: endorsementKey knows the templates
}

// activate is one TPM2_ActivateCredential.
func (c *connection) activate(template ekTemplate, credential Credential) ([]byte, error) {
	if _, err := c.endorsement("ak", akTemplate()); err != nil {
		return nil, fmt.Errorf("attestation key: %w", err)
	}
	ek, err := c.endorsement("ek", template.area)
	if err != nil {
		return nil, fmt.Errorf("endorsement key: %w", err)
	}
	ak, err := c.endorsement("ak", akTemplate())
	if err != nil {
		return nil, fmt.Errorf("attestation key: %w", err)
	}
	s, err := c.session()
	if err != nil {
		return nil, err
	}
	rsp, err := run(c, tpm2.ActivateCredential{
		ActivateHandle: tpm2.AuthHandle{Handle: ak.Handle, Name: ak.Name, Auth: s.with(nil, out)},
		KeyHandle:      tpm2.AuthHandle{Handle: ek.Handle, Name: ek.Name, Auth: c.useEK(template, s)},
		CredentialBlob: tpm2.TPM2BIDObject{Buffer: credential.Blob},
		Secret:         tpm2.TPM2BEncryptedSecret{Buffer: credential.EncryptedSecret},
	})
	if isForeignCredential(err) {
		err = fmt.Errorf("credential is for another TPM or attestation key: %w: %w", hsm.ErrMismatch, err)
	}
	if err = errors.Join(err, c.drop("ek"), c.drop("ak")); err != nil {
		return nil, err
	}
	return rsp.CertInfo.Buffer, nil
}

// isForeignCredential knows what a TPM says to a credential that it cannot open.
func isForeignCredential(err error) bool {
	for _, code := range []tpm2.TPMRC{tpm2.TPMRCIntegrity, tpm2.TPMRCValue, tpm2.TPMRCSize, tpm2.TPMRCInsufficient, tpm2.TPMRCECCPoint, tpm2.TPMRCNoResult} {
		if errors.Is(err, code) {
			return true
		}
	}
	return false
}

// useEK authorises the use of an endorsement key: by its policy, which asks for
// the endorsement hierarchy's value, or by its own value, which is empty.
func (c *connection) useEK(template ekTemplate, s *session) tpm2.Session {
	if template.area.ObjectAttributes.UserWithAuth {
		return tpm2.PasswordAuth(nil)
	}
	return tpm2.Policy(tpm2.TPMAlgSHA256, 16, func(tpm transport.TPM, policy tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
		_, err := run(tpm, tpm2.PolicySecret{AuthHandle: c.endorser(s), PolicySession: policy, NonceTPM: nonce})
		return err
	})
}
