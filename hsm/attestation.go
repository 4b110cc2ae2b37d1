package hsm

import (
	"context"
	"crypto/sha256"
)

// Attester is a Token whose device can sign statements about its keys.
type Attester interface {
	// Attest lets the device certify key with nonce in the statement: 16 to 64
	// octets of the caller's, for example the hash of a transcript, which bind
	// the statement to an occasion. Errors: ErrUnsupported (nonce, or the
	// device lacks a command), ErrBusy, ErrLost, ErrPIN.
	Attest(ctx context.Context, key Key, nonce []byte) (Attestation, error)
}

// AttestationTPM is the Format of an Attestation by a TPM 2.0.
const AttestationTPM = "tpm2-certify-1"

// Attestation is what a device signed about a key, with all that a verifier
// needs who has nothing but files. tpm.VerifyAttestation says what follows from
// it and what does not. Its JSON form is stable; octet strings are in base64.
// The structures are those of TPM 2.0 Part 2, as they were hashed or signed,
// without an outer length.
type Attestation struct {
	// Format names the kind, AttestationTPM.
	Format string `json:"format"`
	// Nonce is the caller's, 16 to 64 octets; extraData of both statements.
	Nonce []byte `json:"nonce"`
	// Key is the TPMT_PUBLIC of the key that is spoken of.
	Key []byte `json:"key"`
	// AK is the TPMT_PUBLIC of the attestation key: a restricted signing key,
	// a primary key of the endorsement hierarchy, so that it cannot sign what
	// did not come into being in the TPM.
	AK []byte `json:"ak"`
	// EK is the TPMT_PUBLIC of the endorsement key: the TPM's identity, which
	// decrypts but does not sign.
	EK []byte `json:"ek"`
	// EKCertificate is the manufacturer's certificate of EK, in DER, as the TPM
	// keeps it; empty if it keeps none.
	EKCertificate []byte `json:"ekCertificate,omitempty"`
	// Certify is the TPMS_ATTEST of TPM2_Certify, CertifySignature the
	// TPMT_SIGNATURE of AK over its SHA-256.
	Certify          []byte `json:"certify"`
	CertifySignature []byte `json:"certifySignature"`
	// Creation is the TPMS_ATTEST of TPM2_CertifyCreation, CreationSignature
	// the TPMT_SIGNATURE of AK, and CreationData the TPMS_CREATION_DATA whose
	// hash it contains. All three are empty for a key whose creation ticket was
	// not kept. The ticket itself is for the TPM alone, which has checked it.
	Creation          []byte `json:"creation,omitempty"`
	CreationSignature []byte `json:"creationSignature,omitempty"`
	CreationData      []byte `json:"creationData,omitempty"`
	// Activation records that the TPM proved to hold EK and AK together.
	Activation *Activation `json:"activation,omitempty"`
}

// Activation is the record of a credential activation (TPM 2.0 Part 1,
// Section 24, "Credential Protection"): a secret was encrypted to EK for the
// name of AK, and the TPM gave it back. It convinces whoever made it or trusts
// who did; to anybody else it is a record, because who knows the secret can
// write down the answer.
type Activation struct {
	// Secret is what was encrypted and Answer what the TPM returned, 32 octets
	// each.
	Secret []byte `json:"secret"`
	Answer []byte `json:"answer"`
}

// AttestationNonce is the nonce of the attestation that Token.Evidence makes of
// its own: the SHA-256 of SelfTestText.
func (e Evidence) AttestationNonce() []byte {
	sum := sha256.Sum256([]byte(e.SelfTestText))
	return sum[:]
}
