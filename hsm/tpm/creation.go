package tpm

import (
	"bytes"
	"crypto/sha256"
	"encoding/pem"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// creation is what TPM2_Create said of the birth of a key, kept in a file
// beside the key file for TPM2_CertifyCreation: NAME.creation, PEM.
//
//	TPMCreation ::= SEQUENCE {
//	    version  INTEGER (1),
//	    name     OCTET STRING (the key's Name),
//	    data     OCTET STRING (TPMS_CREATION_DATA),
//	    hash     OCTET STRING (its SHA-256),
//	    ticket   OCTET STRING (TPMT_TK_CREATION) }
//
// It holds no secret. It is written before the key file, so that no key is
// without it; one that is alone is the trace of a generation that was cut off,
// and its key exists nowhere.
type creation struct {
	name   []byte
	data   []byte
	hash   []byte
	ticket tpm2.TPMTTKCreation
}

const (
	creationPEM     = "CHANCERY TPM CREATION"
	creationVersion = 1
)

// marshal writes the file.
func (c *creation) marshal() ([]byte, error) {
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Int64(creationVersion)
		b.AddASN1OctetString(c.name)
		b.AddASN1OctetString(c.data)
		b.AddASN1OctetString(c.hash)
		b.AddASN1OctetString(tpm2.Marshal(c.ticket))
	})
	der, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("encode creation file: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: creationPEM, Bytes: der}), nil
}

// parseCreation reads a creation file. That its parts fit the key and one
// another is checked here as far as it can be without the TPM; the ticket is
// the TPM's to judge. The error wraps ErrKeyFile.
func parseCreation(text []byte) (*creation, error) {
	if len(text) > maxFile {
		return nil, fmt.Errorf("%d octets: %w", len(text), ErrKeyFile)
	}
	block, rest := pem.Decode(text)
	if block == nil || block.Type != creationPEM || len(block.Headers) != 0 || len(bytes.TrimSpace(rest)) != 0 ||
		!bytes.HasPrefix(text, []byte("-----BEGIN ")) {
		return nil, fmt.Errorf("not one %s and nothing else: %w", creationPEM, ErrKeyFile)
	}
	input := cryptobyte.String(block.Bytes)
	var all, name, data, hash, ticket cryptobyte.String
	var version int
	if !input.ReadASN1(&all, cbasn1.SEQUENCE) || !input.Empty() || !all.ReadASN1Integer(&version) ||
		!all.ReadASN1(&name, cbasn1.OCTET_STRING) || !all.ReadASN1(&data, cbasn1.OCTET_STRING) ||
		!all.ReadASN1(&hash, cbasn1.OCTET_STRING) || !all.ReadASN1(&ticket, cbasn1.OCTET_STRING) || !all.Empty() {
		return nil, fmt.Errorf("not a TPMCreation: %w", ErrKeyFile)
	}
	if version != creationVersion {
		return nil, fmt.Errorf("version %d, want %d: %w", version, creationVersion, ErrKeyFile)
	}
	if sum := sha256.Sum256(data); !bytes.Equal(sum[:], hash) {
		return nil, fmt.Errorf("hash is not that of the data: %w", ErrKeyFile)
	}
	if err := decodes[tpm2.TPMSCreationData](data); err != nil {
		return nil, fmt.Errorf("data: %w", err)
	}
	tk, err := decode[tpm2.TPMTTKCreation](ticket)
	if err != nil {
		return nil, fmt.Errorf("ticket: %w", err)
	}
	return &creation{name: name, data: data, hash: hash, ticket: *tk}, nil
}
