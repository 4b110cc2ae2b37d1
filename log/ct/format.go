package ct

import (
	"crypto"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"unicode"

	ct "github.com/google/certificate-transparency-go"
	"github.com/google/certificate-transparency-go/tls"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/head"
)

// format writes the heads of an RFC 6962 log.
type format struct {
	origin string
	keyID  [4]byte
}

// NewFormat returns how the log with this origin and P-256 key writes its
// heads. Message is the TreeHeadSignature structure of RFC 6962, Section 3.5.
// Note is a C2SP checkpoint whose one signature line has type 0x05 (C2SP
// static-ct-api, Checkpoints): key id SHA-256(origin ‖ 0x0A ‖ 0x05 ‖
// LogID)[:4], then the 8-octet timestamp in ms, then the DigitallySigned
// structure that get-sth shows.
func NewFormat(origin string, pub crypto.PublicKey) (head.Format, error) {
	if err := checkOrigin(origin); err != nil {
		return nil, err
	}
	if alg, err := hsm.AlgorithmOf(pub); err != nil || alg != hsm.ECDSAP256 {
		return nil, errors.New("key of a CT log: want ECDSA P-256")
	}
	logID, err := hsm.SPKIHash(pub)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(append([]byte(origin+"\n\x05"), logID[:]...))
	return &format{origin: origin, keyID: [4]byte(sum[:4])}, nil
}

// checkOrigin accepts what static-ct-api derives from a submission prefix: no
// scheme, no final slash, lower case, and a signed-note key name.
func checkOrigin(origin string) error {
	bad := strings.IndexFunc(origin, func(r rune) bool {
		return r == unicode.ReplacementChar || r == '+' || unicode.IsSpace(r) || unicode.IsControl(r) || unicode.IsUpper(r)
	})
	switch {
	case origin == "":
		return errors.New("origin is empty")
	case bad >= 0:
		return fmt.Errorf("origin %q: space, +, upper case or control character", origin)
	case strings.Contains(origin, "://"):
		return fmt.Errorf("origin %q: has a scheme", origin)
	case strings.HasSuffix(origin, "/"):
		return fmt.Errorf("origin %q: ends in a slash", origin)
	}
	return nil
}

// Message implements head.Format.
func (f *format) Message(h head.Head) ([]byte, error) {
	ms, err := milliseconds(h)
	if err != nil {
		return nil, err
	}
	return ct.SerializeSTHSignatureInput(ct.SignedTreeHead{
		Version:        ct.V1,
		TreeSize:       h.Size,
		Timestamp:      ms,
		SHA256RootHash: h.Root,
	})
}

// Note implements head.Format.
func (f *format) Note(h head.Head, signature []byte) ([]byte, error) {
	ms, err := milliseconds(h)
	if err != nil {
		return nil, err
	}
	signed, err := tls.Marshal(digitallySigned(signature))
	if err != nil {
		return nil, fmt.Errorf("encode signature: %w", err)
	}
	line := append([]byte(nil), f.keyID[:]...)
	line = binary.BigEndian.AppendUint64(line, ms)
	line = append(line, signed...)
	return fmt.Appendf(nil, "%s\n%d\n%s\n\n\u2014 %s %s\n",
		f.origin, h.Size, base64.StdEncoding.EncodeToString(h.Root[:]),
		f.origin, base64.StdEncoding.EncodeToString(line)), nil
}

// milliseconds is a head's RFC 6962 timestamp.
func milliseconds(h head.Head) (uint64, error) {
	ms := h.Time.UnixMilli()
	if ms < 0 {
		return 0, fmt.Errorf("head of %v: before 1970", h.Time)
	}
	return uint64(ms), nil
}

// digitallySigned wraps a DER ECDSA signature over SHA-256 (RFC 5246, 4.7).
func digitallySigned(signature []byte) tls.DigitallySigned {
	return tls.DigitallySigned{
		Algorithm: tls.SignatureAndHashAlgorithm{Hash: tls.SHA256, Signature: tls.ECDSA},
		Signature: signature,
	}
}
