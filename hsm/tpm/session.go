package tpm

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// session is an HMAC session with a TPM, salted to a key in it and with AES-128
// CFB parameter encryption (TPM 2.0 Part 1, Sections 17.6 and 19), which lasts
// until it is flushed. One at a time serves all commands of a connection.
//
// It is our own and not go-tpm's because theirs belongs to one authorisation
// value, and cuts a value at its first zero octet where the TPM drops zeros at
// the end alone: one random value of 32 octets in eight would be refused.
type session struct {
	handle      tpm2.TPMHandle
	key         []byte // sessionKey: what the salt was worth
	nonceCaller [sha256.Size]byte
	nonceTPM    []byte
}

// The parameters of a session.
const (
	sessionHash = tpm2.TPMAlgSHA256
	aesBits     = 128
)

// direction says which first parameter of a command is encrypted. Only a
// parameter with a length before it (TPM2B) can be.
type direction int

const (
	plain direction = 0
	in    direction = 1 << iota
	out
)

// startSession starts a session salted to the loaded storage key p, or not
// salted at all if p is nil: then only its HMAC is worth something.
func startSession(tpm transport.TPM, p *parent) (*session, error) {
	var salt, encrypted []byte
	saltKey := tpm2.TPMRHNull
	if p != nil {
		encapsulate, err := tpm2.ImportEncapsulationKey(p.public)
		if err != nil {
			return nil, fmt.Errorf("salt session: %w", err)
		}
		if salt, encrypted, err = tpm2.CreateEncryptedSalt(rand.Reader, encapsulate); err != nil {
			return nil, fmt.Errorf("salt session: %w", err)
		}
		saltKey = p.Handle
	}
	s := &session{}
	_, _ = rand.Read(s.nonceCaller[:]) // never fails
	rsp, err := run(tpm, tpm2.StartAuthSession{
		TPMKey: saltKey, Bind: tpm2.TPMRHNull,
		NonceCaller:   tpm2.TPM2BNonce{Buffer: s.nonceCaller[:]},
		EncryptedSalt: tpm2.TPM2BEncryptedSecret{Buffer: encrypted},
		SessionType:   tpm2.TPMSEHMAC,
		Symmetric: tpm2.TPMTSymDef{
			Algorithm: tpm2.TPMAlgAES,
			KeyBits:   tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, tpm2.TPMKeyBits(aesBits)),
			Mode:      tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
		},
		AuthHash: sessionHash,
	})
	if err != nil {
		return nil, fmt.Errorf("start session: %w", err)
	}
	s.handle = tpm2.TPMHandle(rsp.SessionHandle.HandleValue())
	s.nonceTPM = rsp.NonceTPM.Buffer
	// Part 1, Section 19.6.8.
	if p != nil {
		s.key = tpm2.KDFa(crypto.SHA256, salt, "ATH", s.nonceTPM, s.nonceCaller[:], 8*sha256.Size)
	}
	clear(salt)
	return s, nil
}

// with returns the session for one command: authorised by the value auth, or
// only for its encryption if it is an extra session (auth is then nil).
func (s *session) with(auth []byte, encrypt direction) tpm2.Session {
	auth = bytes.TrimRight(auth, "\x00") // as the TPM keeps it: Part 1, Section 19.6.5
	return &authorisation{
		session: s, auth: auth, answer: auth,
		attributes: tpm2.TPMASession{
			ContinueSession: true, Decrypt: encrypt&in != 0, Encrypt: encrypt&out != 0,
		},
	}
}

// changing returns the session for a command that replaces the value current,
// which authorises it, with its encrypted first parameter next, which authorises
// the response (TPM2_HierarchyChangeAuth, Part 3, Section 24.8.1).
func (s *session) changing(current, next []byte) tpm2.Session {
	a := s.with(current, in).(*authorisation)
	a.answer = bytes.TrimRight(next, "\x00")
	return a
}

// authorisation is the use of a session by one command. It implements
// tpm2.Session.
type authorisation struct {
	*session
	auth       []byte // of the command
	answer     []byte // of the response
	attributes tpm2.TPMASession
}

var _ tpm2.Session = (*authorisation)(nil)

// errHMAC: a response is not from the TPM that the session is with.
var errHMAC = errors.New("response with a wrong HMAC")

// Init does nothing: the session runs.
func (a *authorisation) Init(transport.TPM) error { return nil }

// CleanupFailure does nothing: the session goes on.
func (a *authorisation) CleanupFailure(transport.TPM) error { return nil }

// NonceTPM returns the TPM's last nonce.
func (a *authorisation) NonceTPM() tpm2.TPM2BNonce { return tpm2.TPM2BNonce{Buffer: a.nonceTPM} }

// NewNonceCaller makes our next nonce.
func (a *authorisation) NewNonceCaller() error {
	_, _ = rand.Read(a.nonceCaller[:]) // never fails
	return nil
}

// Handle returns the session's handle.
func (a *authorisation) Handle() tpm2.TPMHandle { return a.handle }

// IsEncryption says whether the response's first parameter is encrypted.
func (a *authorisation) IsEncryption() bool { return a.attributes.Encrypt }

// IsDecryption says whether the command's first parameter is encrypted.
func (a *authorisation) IsDecryption() bool { return a.attributes.Decrypt }

// Authorize makes the HMAC over a command (Part 1, Sections 16.7 and 19.6.5).
func (a *authorisation) Authorize(cc tpm2.TPMCC, parameters, addNonces []byte, names []tpm2.TPM2BName, _ int) (*tpm2.TPMSAuthCommand, error) {
	h := sha256.New()
	h.Write(uint32Bytes(uint32(cc)))
	for _, name := range names {
		h.Write(name.Buffer)
	}
	h.Write(parameters)
	mac := a.mac(a.auth, h.Sum(nil), a.nonceCaller[:], a.nonceTPM, addNonces, a.attributes)
	return &tpm2.TPMSAuthCommand{
		Handle:        a.handle,
		Nonce:         tpm2.TPM2BNonce{Buffer: a.nonceCaller[:]},
		Attributes:    a.attributes,
		Authorization: tpm2.TPM2BData{Buffer: mac},
	}, nil
}

// Validate checks the HMAC over a response (Part 1, Sections 16.8 and 19.6.5).
func (a *authorisation) Validate(rc tpm2.TPMRC, cc tpm2.TPMCC, parameters []byte, _ []tpm2.TPM2BName, _ int, auth *tpm2.TPMSAuthResponse) error {
	h := sha256.New()
	h.Write(uint32Bytes(uint32(rc)))
	h.Write(uint32Bytes(uint32(cc)))
	h.Write(parameters)
	a.nonceTPM = auth.Nonce.Buffer
	mac := a.mac(a.answer, h.Sum(nil), a.nonceTPM, a.nonceCaller[:], nil, auth.Attributes)
	if !hmac.Equal(mac, auth.Authorization.Buffer) {
		return errHMAC
	}
	if !auth.Attributes.ContinueSession {
		return fmt.Errorf("%w: the TPM ended the session", errMalformed)
	}
	return nil
}

// mac is the HMAC of Part 1, Section 19.6.5.
func (a *authorisation) mac(auth, hash, newer, older, addNonces []byte, attributes tpm2.TPMASession) []byte {
	m := hmac.New(sha256.New, append(bytes.Clone(a.key), auth...))
	m.Write(hash)
	m.Write(newer)
	m.Write(older)
	m.Write(addNonces)
	m.Write([]byte{attributeOctet(attributes)})
	return m.Sum(nil)
}

// attributeOctet is a TPMA_SESSION (Part 2, Section 8.4).
func attributeOctet(a tpm2.TPMASession) byte {
	var octet byte
	for bit, set := range [...]bool{
		a.ContinueSession, a.AuditExclusive, a.AuditReset, false, false, a.Decrypt, a.Encrypt, a.Audit,
	} {
		if set {
			octet |= 1 << bit
		}
	}
	return octet
}

// Encrypt encrypts a command's first parameter in place (Part 1, Section 21).
func (a *authorisation) Encrypt(parameter []byte) error {
	if !a.attributes.Decrypt {
		return nil
	}
	block, iv, err := a.cipher(a.nonceCaller[:], a.nonceTPM)
	if err != nil {
		return err
	}
	cipher.NewCFBEncrypter(block, iv).XORKeyStream(parameter, parameter) //nolint:staticcheck // what the TPM speaks; the HMAC is its integrity
	return nil
}

// Decrypt decrypts a response's first parameter in place.
func (a *authorisation) Decrypt(parameter []byte) error {
	if !a.attributes.Encrypt {
		return nil
	}
	block, iv, err := a.cipher(a.nonceTPM, a.nonceCaller[:])
	if err != nil {
		return err
	}
	cipher.NewCFBDecrypter(block, iv).XORKeyStream(parameter, parameter) //nolint:staticcheck // what the TPM speaks; the HMAC is its integrity
	return nil
}

// cipher derives the key and the first vector (Part 1, Section 21.3).
func (a *authorisation) cipher(newer, older []byte) (cipher.Block, []byte, error) {
	secret := append(bytes.Clone(a.key), a.auth...)
	material := tpm2.KDFa(crypto.SHA256, secret, "CFB", newer, older, aesBits+8*aes.BlockSize)
	block, err := aes.NewCipher(material[:aesBits/8])
	return block, material[aesBits/8:], err
}

func uint32Bytes(n uint32) []byte {
	return []byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}
}
