package tpm

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-tpm/tpm2"
)

// ErrAttestation: an attestation does not say what it should of the key.
var ErrAttestation = errors.New("attestation does not hold")

// Sizes of what is attested, in octets.
const (
	minNonce = 16
	maxNonce = 64
	// activationSize is the length of an Activation's secret.
	activationSize = 32
)

// Chain says what is known of the endorsement key's certificate.
type Chain string

// The states of a chain. One that was checked and does not hold is an error.
const (
	// ChainVerified: the certificate is of EK and leads to one of the roots.
	ChainVerified Chain = "verified"
	// ChainUnchecked: there is a certificate of EK, and the caller gave no roots.
	ChainUnchecked Chain = "unchecked"
	// ChainAbsent: there is no certificate, and the caller gave no roots.
	ChainAbsent Chain = "absent"
)

// Verdict is what an attestation that holds is worth.
type Verdict struct {
	Chain Chain
	// Device is what the EK certificate says of the TPM; it is proven by
	// ChainVerified alone.
	Device EKDevice
	// Software says that Device is an emulator of ours.
	Software bool
	// Creation says that the TPM vouched for the key's birth in it as well.
	Creation bool
	// Activation says that a credential activation is on record.
	Activation bool
	// Firmware is the TPM's firmware version as in its statements (Part 2,
	// Section 10.12.12).
	Firmware uint64
	// Level is hsm.LevelAttested if Chain is ChainVerified, Activation is set
	// and Software is not; hsm.LevelSoftware for an emulator; otherwise
	// hsm.LevelModule: somebody's word.
	Level hsm.Level
}

// VerifyAttestation checks an attestation from files alone: without a TPM, and
// without cgo. spki is the SHA-256 of the key's SubjectPublicKeyInfo and nonce
// what the statement must be bound to. roots are certificates of TPM
// manufacturers that the caller trusts, which may be intermediate ones; nil
// leaves the certificate unchecked, and the Verdict says so.
//
// It holds if both statements are TPM-generated (TPM_GENERATED_VALUE) and of
// their type, carry the nonce, name the key with that SPKI, name AK as their
// signer by its qualified name and are signed by AK; if AK is a restricted
// signing key fixed to its TPM; if the key can sign and nothing else, is fixed
// to the TPM and its parent, and was made inside; if the creation data has the
// hash that the TPM certified, and the qualified names of key and parent fit;
// and if the certificate is of EK. Otherwise the error wraps ErrAttestation.
//
// What follows: a device that holds AK has the private key, made it, and cannot
// give it away, if AK is in a TPM. Restricted keys sign only what the TPM made.
//
// What does not follow from files: that AK is in the TPM of EK, which alone has
// a certificate. EK decrypts and does not sign, so only a challenge can show
// it: MakeCredential, which needs no TPM, and Token.ActivateCredential. The
// attestation records that its maker did that; a verifier who does not trust
// the maker runs it again. Nor does it follow that the TPM keeps secrets as it
// should, nor when the statement was made, beyond the nonce. Expiry is not
// looked at, a statement stays made: the chain is checked for the time when the
// certificate was issued. Revocation is not looked at either.
func VerifyAttestation(a hsm.Attestation, spki [sha256.Size]byte, nonce []byte, roots *x509.CertPool) (Verdict, error) {
	v, err := verifyAttestation(a, spki, nonce, roots)
	if err != nil {
		return Verdict{}, fmt.Errorf("verify attestation: %w: %w", ErrAttestation, err)
	}
	return v, nil
}

func verifyAttestation(a hsm.Attestation, spki [sha256.Size]byte, nonce []byte, roots *x509.CertPool) (Verdict, error) {
	var v Verdict
	if a.Format != hsm.AttestationTPM {
		return v, fmt.Errorf("format %.40q, want %q", a.Format, hsm.AttestationTPM)
	}
	if err := checkNonce(nonce); err != nil {
		return v, err
	}
	if !bytes.Equal(a.Nonce, nonce) {
		return v, errors.New("another nonce")
	}
	key, err := attestedKey(a.Key, spki)
	if err != nil {
		return v, err
	}
	ak, err := attestationKey(a.AK)
	if err != nil {
		return v, err
	}
	certify, err := ak.statement(a.Certify, a.CertifySignature, tpm2.TPMSTAttestCertify, nonce)
	if err != nil {
		return v, fmt.Errorf("certify: %w", err)
	}
	qualified, err := certifies(certify, key)
	if err != nil {
		return v, fmt.Errorf("certify: %w", err)
	}
	v.Firmware = certify.FirmwareVersion
	if len(a.Creation)+len(a.CreationSignature)+len(a.CreationData) > 0 {
		creation, err := ak.statement(a.Creation, a.CreationSignature, tpm2.TPMSTAttestCreation, nonce)
		if err == nil {
			err = certifiesCreation(creation, key, qualified, a.CreationData)
		}
		if err == nil && creation.FirmwareVersion != certify.FirmwareVersion {
			err = errors.New("another firmware than in the other statement")
		}
		if err != nil {
			return v, fmt.Errorf("creation: %w", err)
		}
		v.Creation = true
	}
	if v.Chain, v.Device, err = verifyEK(a, roots); err != nil {
		return v, err
	}
	if v.Activation, err = activated(a.Activation); err != nil {
		return v, err
	}
	v.Software = v.Device.emulator()
	v.Level = v.level()
	return v, nil
}

func (v Verdict) level() hsm.Level {
	switch {
	case v.Software:
		return hsm.LevelSoftware
	case v.Chain == ChainVerified && v.Activation:
		return hsm.LevelAttested
	}
	return hsm.LevelModule
}

// checkNonce refuses a nonce that TPM2_Certify would not take or that is too
// short to be fresh.
func checkNonce(nonce []byte) error {
	if len(nonce) < minNonce || len(nonce) > maxNonce {
		return fmt.Errorf("nonce of %d octets, want %d to %d: %w", len(nonce), minNonce, maxNonce, hsm.ErrUnsupported)
	}
	return nil
}

// structure decodes what is called what, which takes up all of b.
func structure[T tpm2.Marshallable, P interface {
	*T
	tpm2.Unmarshallable
}](what string, b []byte) (*T, error) {
	if len(b) > maxMessage {
		return nil, fmt.Errorf("%s of %d octets", what, len(b))
	}
	v, err := decode[T, P](b)
	if err != nil {
		return nil, fmt.Errorf("%s is not one, or not as a TPM writes it", what)
	}
	return v, nil
}

// The attributes of a key's public area (TPMA_OBJECT, Part 2, Section 8.3.2):
// those that the statement is about must be set or clear, and the ways to
// authorise it are free.
const (
	signingAttributes = 1<<1 | 1<<4 | 1<<5 | 1<<18 // fixedTPM, fixedParent, sensitiveDataOrigin, sign
	freeAttributes    = 1<<2 | 1<<6 | 1<<7 | 1<<10 // stClear, userWithAuth, adminWithPolicy, noDA
)

// attestedKey reads the public area of the key that spki names.
func attestedKey(b []byte, spki [sha256.Size]byte) (*public, error) {
	area, err := structure[tpm2.TPMTPublic]("key", b)
	if err != nil {
		return nil, err
	}
	key, err := newPublic(area)
	if err != nil {
		return nil, errors.New("key is not an ECC key of ours")
	}
	if err := key.bound(); err != nil {
		return nil, err
	}
	// TPMT_PUBLIC: type, nameAlg, objectAttributes.
	if got := binary.BigEndian.Uint32(b[4:]); got&^freeAttributes != signingAttributes {
		return nil, fmt.Errorf("key has attributes %#x: not one that is fixed to its TPM, made there and for signing alone", got)
	}
	got, err := hsm.SPKIHash(key.key)
	if err != nil {
		return nil, err
	}
	if got != spki {
		return nil, fmt.Errorf("key has SPKI %x…, want %x…", got[:8], spki[:8])
	}
	return key, nil
}

// akTemplate is the attestation key: a primary key of the endorsement hierarchy,
// so the same seed makes the same one each time and nothing has to be stored.
func akTemplate() tpm2.TPMTPublic {
	t := signingTemplate(hsm.ECDSAP256)
	t.ObjectAttributes.Restricted = true
	return t
}

// ak is an attestation key, for verifying.
type ak struct {
	key       *ecdsa.PublicKey
	qualified []byte // its qualified name
}

// attestationKey reads the public area of an attestation key, which must be made
// from akTemplate.
func attestationKey(b []byte) (*ak, error) {
	area, err := structure[tpm2.TPMTPublic]("attestation key", b)
	if err != nil {
		return nil, err
	}
	if template := akTemplate(); !sameTemplate(area, &template) {
		return nil, errors.New("attestation key is not a restricted P-256 signing key that is fixed to its TPM")
	}
	p, err := newPublic(area)
	if err != nil {
		return nil, errors.New("attestation key is not a point of P-256")
	}
	return &ak{key: p.key, qualified: qualifiedName(hierarchyName(tpm2.TPMRHEndorsement), p.name.Buffer)}, nil
}

// hierarchyName is the name, and the qualified name, of a hierarchy.
func hierarchyName(h tpm2.TPMHandle) []byte {
	return binary.BigEndian.AppendUint32(nil, uint32(h))
}

// qualifiedName is that of the object with this name under a parent (Part 1,
// Section 16), all names being by SHA-256.
func qualifiedName(parent, name []byte) []byte {
	h := sha256.New()
	h.Write(parent)
	h.Write(name)
	return h.Sum(binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMAlgSHA256)))
}

// statement reads a TPMS_ATTEST and checks its signature, type, signer and nonce.
func (k *ak) statement(b, signature []byte, kind tpm2.TPMST, nonce []byte) (*tpm2.TPMSAttest, error) {
	if err := k.verify(b, signature); err != nil {
		return nil, err
	}
	s, err := structure[tpm2.TPMSAttest]("statement", b)
	switch {
	case err != nil:
		return nil, err
	case s.Magic != tpm2.TPMGeneratedValue:
		return nil, errors.New("statement was not made by a TPM")
	case s.Type != kind:
		return nil, fmt.Errorf("statement of type %#x, want %#x", s.Type, kind)
	case !bytes.Equal(s.QualifiedSigner.Buffer, k.qualified):
		return nil, errors.New("statement names another signer")
	case !bytes.Equal(s.ExtraData.Buffer, nonce):
		return nil, errors.New("statement has another nonce")
	}
	return s, nil
}

// verify checks a TPMT_SIGNATURE of ECDSA over SHA-256 of b.
func (k *ak) verify(b, signature []byte) error {
	sig, err := structure[tpm2.TPMTSignature]("signature", signature)
	if err != nil {
		return err
	}
	pair, err := sig.Signature.ECDSA()
	if sig.SigAlg != tpm2.TPMAlgECDSA || err != nil || pair.Hash != tpm2.TPMAlgSHA256 {
		return errors.New("signature is not ECDSA with SHA-256")
	}
	digest := sha256.Sum256(b)
	if !ecdsa.Verify(k.key, digest[:], new(big.Int).SetBytes(pair.SignatureR.Buffer), new(big.Int).SetBytes(pair.SignatureS.Buffer)) {
		return errors.New("signature does not verify")
	}
	return nil
}

// certifies checks a statement of TPM2_Certify (Part 3, Section 18.2) and
// returns the key's qualified name.
func certifies(s *tpm2.TPMSAttest, key *public) ([]byte, error) {
	info, err := s.Attested.Certify()
	if err != nil {
		return nil, errors.New("statement is of another type")
	}
	if !bytes.Equal(info.Name.Buffer, key.name.Buffer) {
		return nil, errors.New("statement names another key")
	}
	if len(info.QualifiedName.Buffer) != 2+sha256.Size {
		return nil, errors.New("qualified name is not by SHA-256")
	}
	return info.QualifiedName.Buffer, nil
}

// certifiesCreation checks a statement of TPM2_CertifyCreation (Part 3,
// Section 18.3) and the creation data.
func certifiesCreation(s *tpm2.TPMSAttest, key *public, qualified, data []byte) error {
	info, err := s.Attested.Creation()
	if err != nil {
		return errors.New("statement is of another type")
	}
	if !bytes.Equal(info.ObjectName.Buffer, key.name.Buffer) {
		return errors.New("statement names another key")
	}
	if sum := sha256.Sum256(data); !bytes.Equal(sum[:], info.CreationHash.Buffer) {
		return errors.New("creation data have another hash")
	}
	d, err := structure[tpm2.TPMSCreationData]("creation data", data)
	if err != nil {
		return err
	}
	if !bytes.Equal(qualifiedName(d.ParentQualifiedName.Buffer, key.name.Buffer), qualified) {
		return errors.New("key has another parent than its creation data say")
	}
	for _, h := range []tpm2.TPMHandle{tpm2.TPMRHOwner, tpm2.TPMRHEndorsement, tpm2.TPMRHPlatform} {
		if bytes.Equal(qualifiedName(hierarchyName(h), d.ParentName.Buffer), d.ParentQualifiedName.Buffer) {
			return nil
		}
	}
	return errors.New("parent is not a primary key")
}

// activated checks the record of a credential activation.
func activated(a *hsm.Activation) (bool, error) {
	switch {
	case a == nil:
		return false, nil
	case len(a.Secret) != activationSize || !bytes.Equal(a.Secret, a.Answer):
		return false, errors.New("activation: the TPM did not give the secret back")
	}
	return true, nil
}
