package tpm

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-tpm/tpm2"
	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// ekTemplate is a kind of endorsement key, and where a TPM keeps its certificate
// (TCG EK Credential Profile, Sections 2.2.1 and B.3, B.4).
type ekTemplate struct {
	certificate tpm2.TPMHandle // NV index
	area        tpm2.TPMTPublic
}

// ekTemplates are the kinds that we know, the cheapest to use first: L-2, H-3, L-1.
func ekTemplates() []ekTemplate {
	p384 := tpm2.ECCEKTemplate
	p384.NameAlg = tpm2.TPMAlgSHA384
	p384.ObjectAttributes.UserWithAuth = true
	p384.AuthPolicy = tpm2.TPM2BDigest{Buffer: policyB384}
	p384.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
		Symmetric: tpm2.TPMTSymDefObject{
			Algorithm: tpm2.TPMAlgAES,
			KeyBits:   tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, tpm2.TPMKeyBits(256)),
			Mode:      tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
		},
		CurveID: tpm2.TPMECCNistP384,
	})
	p384.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{})
	return []ekTemplate{
		{0x01c0000a, tpm2.ECCEKTemplate},
		{0x01c00016, p384},
		{0x01c00002, tpm2.RSAEKTemplate},
	}
}

// policyB384 is the policy of the profile's high range with SHA-384
// (PolicyB_SHA384). We use such a key by its empty authorisation value.
var policyB384 = []byte{
	0xb2, 0x6e, 0x7d, 0x28, 0xd1, 0x1a, 0x50, 0xbc, 0x53, 0xd8, 0x82, 0xbc, 0xf5, 0xfd, 0x3a, 0x1a,
	0x07, 0x41, 0x48, 0xbb, 0x35, 0xd3, 0xb4, 0xe4, 0xcb, 0x1c, 0x0a, 0xd9, 0xbd, 0xe4, 0x19, 0xca,
	0xcb, 0x47, 0xba, 0x09, 0x69, 0x96, 0x46, 0x15, 0x0f, 0x9f, 0xc0, 0x00, 0xf3, 0xf8, 0x0e, 0x12,
}

// endorsementKey reads the public area of an endorsement key, which must be made
// from one of ekTemplates.
func endorsementKey(b []byte) (crypto.PublicKey, *tpm2.TPMTPublic, error) {
	area, err := structure[tpm2.TPMTPublic]("endorsement key", b)
	if err != nil {
		return nil, nil, err
	}
	if !slices.ContainsFunc(ekTemplates(), func(t ekTemplate) bool { return sameTemplate(area, &t.area) }) {
		return nil, nil, errors.New("endorsement key is not made from a template of the TCG")
	}
	if area.Type == tpm2.TPMAlgRSA {
		n, err := area.Unique.RSA()
		if err != nil || len(n.Buffer) != 256 || n.Buffer[0]&0x80 == 0 {
			return nil, nil, errors.New("endorsement key is not one of 2048 bits")
		}
		return &rsa.PublicKey{N: new(big.Int).SetBytes(n.Buffer), E: 65537}, area, nil
	}
	algorithm := hsm.ECDSAP256
	if area.NameAlg == tpm2.TPMAlgSHA384 {
		algorithm = hsm.ECDSAP384
	}
	point, err := area.Unique.ECC()
	if err != nil {
		return nil, nil, errors.New("endorsement key has no point")
	}
	key, err := uncompressed(algorithm, point)
	if err != nil {
		return nil, nil, errors.New("endorsement key is not a point of its curve")
	}
	return key, area, nil
}

// sameTemplate says whether two areas differ in unique at most.
func sameTemplate(a, b *tpm2.TPMTPublic) bool {
	x, y := *a, *b
	x.Unique, y.Unique = tpm2.TPMUPublicID{}, tpm2.TPMUPublicID{}
	return bytes.Equal(tpm2.Marshal(x), tpm2.Marshal(y))
}

// EKDevice is what an endorsement key's certificate says of the TPM (TCG EK
// Credential Profile, Section 3.1.2: the directory name in its
// subjectAltName). All three are empty if it says nothing.
type EKDevice struct {
	// Manufacturer is "id:" and eight hexadecimal digits: the four octets of
	// the TCG's vendor id.
	Manufacturer string
	// Model is the manufacturer's name of the part, Version its firmware's,
	// "id:" and hexadecimal digits.
	Model, Version string
}

// emulator says whether the device says of itself that it is swtpm or the
// reference simulator. A false answer is not evidence of hardware.
func (d EKDevice) emulator() bool {
	model := strings.ToLower(d.Model)
	return strings.Contains(model, "swtpm") || strings.Contains(model, "simulator") || d.Manufacturer == "id:00001014" && model == ""
}

var (
	oidSAN             = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidEKCertificate   = asn1.ObjectIdentifier{2, 23, 133, 8, 1} // tcg-kp-EKCertificate
	oidTPMManufacturer = asn1.ObjectIdentifier{2, 23, 133, 2, 1}
	oidTPMModel        = asn1.ObjectIdentifier{2, 23, 133, 2, 2}
	oidTPMVersion      = asn1.ObjectIdentifier{2, 23, 133, 2, 3}
)

// verifyEK checks the endorsement key and its certificate. Without roots a
// certificate must still be of the key.
func verifyEK(a hsm.Attestation, roots *x509.CertPool) (Chain, EKDevice, error) {
	key, _, err := endorsementKey(a.EK)
	if err != nil {
		return "", EKDevice{}, err
	}
	if len(a.EKCertificate) == 0 {
		if roots != nil {
			return "", EKDevice{}, errors.New("endorsement key has no certificate")
		}
		return ChainAbsent, EKDevice{}, nil
	}
	if len(a.EKCertificate) > maxMessage {
		return "", EKDevice{}, fmt.Errorf("EK certificate of %d octets", len(a.EKCertificate))
	}
	c, err := x509.ParseCertificate(a.EKCertificate)
	if err != nil {
		return "", EKDevice{}, fmt.Errorf("EK certificate: %w", err)
	}
	if pub, ok := c.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(key) {
		return "", EKDevice{}, errors.New("EK certificate is of another key")
	}
	device, err := deviceOf(c)
	if err != nil || roots == nil {
		return ChainUnchecked, device, err
	}
	if err := verifyEKChain(c, roots); err != nil {
		return "", device, fmt.Errorf("EK certificate: %w", err)
	}
	return ChainVerified, device, nil
}

// verifyEKChain checks an EK certificate at the time of its issue.
func verifyEKChain(c *x509.Certificate, roots *x509.CertPool) error {
	if c.IsCA {
		return errors.New("it is of a CA")
	}
	if len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) > 0 && !slices.ContainsFunc(c.UnknownExtKeyUsage, oidEKCertificate.Equal) {
		return errors.New("it is not for an endorsement key")
	}
	// Critical in many EK certificates; deviceOf has read it.
	c.UnhandledCriticalExtensions = slices.DeleteFunc(c.UnhandledCriticalExtensions, oidSAN.Equal)
	_, err := c.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: c.NotBefore, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err
}

// deviceOf reads the directory name in the subjectAltName, if there is one.
func deviceOf(c *x509.Certificate) (EKDevice, error) {
	var d EKDevice
	i := slices.IndexFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oidSAN) })
	if i < 0 {
		return d, nil
	}
	input, names := cryptobyte.String(c.Extensions[i].Value), cryptobyte.String(nil)
	if !input.ReadASN1(&names, cbasn1.SEQUENCE) || !input.Empty() {
		return d, errors.New("EK certificate: subjectAltName is not one")
	}
	for !names.Empty() {
		var name cryptobyte.String
		var tag cbasn1.Tag
		if !names.ReadAnyASN1(&name, &tag) {
			return d, errors.New("EK certificate: subjectAltName is not one")
		}
		if tag != cbasn1.Tag(4).ContextSpecific().Constructed() {
			continue
		}
		var rdns pkix.RDNSequence
		if rest, err := asn1.Unmarshal(name, &rdns); err != nil || len(rest) > 0 {
			return d, errors.New("EK certificate: directory name is not one")
		}
		for _, rdn := range rdns {
			for _, attribute := range rdn {
				d.set(attribute)
			}
		}
	}
	return d, nil
}

func (d *EKDevice) set(attribute pkix.AttributeTypeAndValue) {
	value, ok := attribute.Value.(string)
	if !ok || len(value) > 64 || !utf8.ValidString(value) {
		return
	}
	switch {
	case attribute.Type.Equal(oidTPMManufacturer):
		d.Manufacturer = value
	case attribute.Type.Equal(oidTPMModel):
		d.Model = value
	case attribute.Type.Equal(oidTPMVersion):
		d.Version = value
	}
}

// Credential is a secret that only one TPM can read, and only while it holds
// the attestation key for which it is meant.
type Credential struct {
	// Blob is the contents of a TPM2B_ID_OBJECT, EncryptedSecret of a
	// TPM2B_ENCRYPTED_SECRET.
	Blob            []byte `json:"blob"`
	EncryptedSecret []byte `json:"encryptedSecret"`
}

// MakeCredential encrypts secret, 16 to 32 octets, to the endorsement key of an
// attestation, bound to its attestation key (TPM 2.0 Part 1, Section 24). It
// needs no TPM. Whoever gets the secret back from Token.ActivateCredential
// knows that the TPM with this endorsement key holds the attestation key; so
// the secret is fresh, random, and told to nobody. The caller has checked the
// attestation with VerifyAttestation.
func MakeCredential(a hsm.Attestation, secret []byte) (Credential, error) {
	if len(secret) < 16 || len(secret) > activationSize {
		return Credential{}, fmt.Errorf("make credential: secret of %d octets, want 16 to %d: %w", len(secret), activationSize, hsm.ErrUnsupported)
	}
	if _, err := attestationKey(a.AK); err != nil {
		return Credential{}, fmt.Errorf("make credential: %w: %w", ErrAttestation, err)
	}
	_, ek, err := endorsementKey(a.EK)
	if err != nil {
		return Credential{}, fmt.Errorf("make credential: %w: %w", ErrAttestation, err)
	}
	c, err := makeCredential(ek, nameOf(a.AK), secret)
	if err != nil {
		return Credential{}, fmt.Errorf("make credential: %w", err)
	}
	return c, nil
}

// nameOf is the name of a public area that is named by SHA-256.
func nameOf(area []byte) []byte { return qualifiedName(nil, area) }

func makeCredential(ek *tpm2.TPMTPublic, name, secret []byte) (Credential, error) {
	to, err := tpm2.ImportEncapsulationKey(ek)
	if err != nil {
		return Credential{}, err
	}
	blob, encrypted, err := tpm2.CreateCredential(rand.Reader, to, name, secret)
	if err != nil {
		return Credential{}, err
	}
	return Credential{Blob: blob, EncryptedSecret: encrypted}, nil
}

// trimCertificate cuts what fills an NV index after a certificate.
func trimCertificate(b []byte) ([]byte, error) {
	input := cryptobyte.String(b)
	var der cryptobyte.String
	if !input.ReadASN1Element(&der, cbasn1.SEQUENCE) {
		return nil, errors.New("no certificate in it")
	}
	return bytes.Clone(der), nil
}
