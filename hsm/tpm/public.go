package tpm

import (
	"bytes"
	"crypto/ecdsa"
	"fmt"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-tpm/tpm2"
)

// decode reads a TPM structure that takes up all of b. go-tpm's decoder may
// panic on what it does not expect; that too is an ErrKeyFile.
func decode[T tpm2.Marshallable, P interface {
	*T
	tpm2.Unmarshallable
}](b []byte) (v *T, err error) {
	defer func() {
		if p := recover(); p != nil {
			v, err = nil, fmt.Errorf("decoder panicked: %v: %w", p, ErrKeyFile)
		}
	}()
	v, err = tpm2.Unmarshal[T, P](b)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKeyFile, err)
	}
	if !bytes.Equal(tpm2.Marshal(*v), b) { // trailing octets, or another encoding
		return nil, fmt.Errorf("not encoded as a TPM does: %w", ErrKeyFile)
	}
	return v, nil
}

// decodes is decode for its error.
func decodes[T tpm2.Marshallable, P interface {
	*T
	tpm2.Unmarshallable
}](b []byte) error {
	_, err := decode[T, P](b)
	return err
}

// public is the public area of a signing key, read and found usable: an ECC key
// on one of our curves that signs ECDSA with the hash that goes with the curve.
type public struct {
	area      tpm2.TPMTPublic
	name      tpm2.TPM2BName
	key       *ecdsa.PublicKey
	algorithm hsm.Algorithm
}

// curves are the TPM's names of our algorithms (Part 2, Sections 6.3 and 6.4).
var curves = map[hsm.Algorithm]struct {
	curve tpm2.TPMECCCurve
	hash  tpm2.TPMIAlgHash
}{
	hsm.ECDSAP256: {tpm2.TPMECCNistP256, tpm2.TPMAlgSHA256},
	hsm.ECDSAP384: {tpm2.TPMECCNistP384, tpm2.TPMAlgSHA384},
}

// parsePublic reads a TPMT_PUBLIC of a signing key. Its error wraps ErrKeyFile.
// What the attributes allow is for evidence and the policy to judge.
func parsePublic(b []byte) (*public, error) {
	area, err := decode[tpm2.TPMTPublic](b)
	if err != nil {
		return nil, fmt.Errorf("public area: %w", err)
	}
	return newPublic(area)
}

// newPublic is parsePublic after decoding.
func newPublic(area *tpm2.TPMTPublic) (*public, error) {
	if area.Type != tpm2.TPMAlgECC || area.NameAlg != tpm2.TPMAlgSHA256 {
		return nil, fmt.Errorf("public area: type %#x named by %#x, want ECC and SHA-256: %w", area.Type, area.NameAlg, ErrKeyFile)
	}
	parameters, err := area.Parameters.ECCDetail()
	if err != nil {
		return nil, fmt.Errorf("public area: %w: %w", ErrKeyFile, err)
	}
	point, err := area.Unique.ECC()
	if err != nil {
		return nil, fmt.Errorf("public area: %w: %w", ErrKeyFile, err)
	}
	for algorithm, want := range curves {
		if parameters.CurveID != want.curve {
			continue
		}
		key, err := uncompressed(algorithm, point)
		if err != nil {
			return nil, err
		}
		name, err := tpm2.ObjectName(area)
		if err != nil {
			return nil, fmt.Errorf("public area: %w: %w", ErrKeyFile, err)
		}
		return &public{area: *area, name: *name, key: key, algorithm: algorithm}, nil
	}
	return nil, fmt.Errorf("public area: curve %#x: %w", parameters.CurveID, ErrKeyFile)
}

// uncompressed returns the key of a point, which is on the curve.
func uncompressed(algorithm hsm.Algorithm, point *tpm2.TPMSECCPoint) (*ecdsa.PublicKey, error) {
	curve := algorithm.Curve()
	size := (curve.Params().BitSize + 7) / 8
	if len(point.X.Buffer) > size || len(point.Y.Buffer) > size {
		return nil, fmt.Errorf("public area: coordinates of %d and %d octets: %w", len(point.X.Buffer), len(point.Y.Buffer), ErrKeyFile)
	}
	encoded := make([]byte, 1+2*size)
	encoded[0] = 4
	copy(encoded[1+size-len(point.X.Buffer):], point.X.Buffer)
	copy(encoded[1+2*size-len(point.Y.Buffer):], point.Y.Buffer)
	key, err := ecdsa.ParseUncompressedPublicKey(curve, encoded)
	if err != nil {
		return nil, fmt.Errorf("public area: %w: %w", ErrKeyFile, err)
	}
	return key, nil
}

// bound refuses, with hsm.ErrPolicy, a key that signs anything but ECDSA with
// its curve's hash.
func (p *public) bound() error {
	parameters, err := p.area.Parameters.ECCDetail()
	if err != nil {
		return err
	}
	scheme, err := parameters.Scheme.Details.ECDSA()
	if parameters.Scheme.Scheme != tpm2.TPMAlgECDSA || err != nil || scheme.HashAlg != curves[p.algorithm].hash {
		return fmt.Errorf("key is not bound to ECDSA with %s: %w", p.algorithm.Hash(), hsm.ErrPolicy)
	}
	return nil
}

// usable refuses, with hsm.ErrPolicy, a key that is not bound, or could be used
// without its authorisation value, or be locked by guesses at other values. What
// hsm.Policy asks for is not repeated here.
func (p *public) usable() error {
	is := p.area.ObjectAttributes
	switch {
	case is.Restricted:
		return fmt.Errorf("key signs only what the TPM made: %w", hsm.ErrPolicy)
	case !is.NoDA:
		return fmt.Errorf("key takes part in the dictionary-attack lockout: %w", hsm.ErrPolicy)
	case len(p.area.AuthPolicy.Buffer) != 0:
		return fmt.Errorf("key has a policy beside its authorisation value: %w", hsm.ErrPolicy)
	}
	return p.bound()
}

// signingTemplate is the public area that Generate asks for.
func signingTemplate(algorithm hsm.Algorithm) tpm2.TPMTPublic {
	is := curves[algorithm]
	return tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgECC,
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
			UserWithAuth: true, NoDA: true, SignEncrypt: true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Scheme: tpm2.TPMTECCScheme{
				Scheme:  tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: is.hash}),
			},
			CurveID: is.curve,
		}),
	}
}

// srkTemplate is the storage key under which all keys are: the template H-2 of
// the TCG's EK Credential Profile for a storage key, which
// draft-bottomley-tpm2-keys, Section 3.1.8 means by a parent of TPM_RH_OWNER.
// The same seed makes the same key from it each time.
func srkTemplate() tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgECC,
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
			UserWithAuth: true, NoDA: true, Restricted: true, Decrypt: true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Symmetric: tpm2.TPMTSymDefObject{
				Algorithm: tpm2.TPMAlgAES,
				KeyBits:   tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, tpm2.TPMKeyBits(aesBits)),
				Mode:      tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
			},
			CurveID: tpm2.TPMECCNistP256,
		}),
	}
}

// isSRK says whether area is of a key made from srkTemplate, or from the same
// with other octets in unique.
func isSRK(area *tpm2.TPMTPublic) bool {
	same := *area
	same.Unique = tpm2.TPMUPublicID{}
	want := srkTemplate()
	return bytes.Equal(tpm2.Marshal(same), tpm2.Marshal(want))
}
