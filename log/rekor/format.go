package rekor

import (
	"crypto"
	"encoding/base64"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"unicode"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/head"
)

// format writes the heads of a Rekor log.
type format struct {
	origin string
	keyID  [4]byte
}

// v1Origin is how the origins of Rekor v1 shards end; verifiers switch to the
// v1 rules when they see it.
var v1Origin = regexp.MustCompile(` - [0-9]+$`)

// NewFormat returns how the log with this origin and P-256 key writes its
// heads. Message is the checkpoint's text (C2SP tlog-checkpoint, no extension
// lines); Note adds one signature line (C2SP signed-note type 0x02): the
// origin as name, SHA-256(SPKI)[:4] as key id, an ASN.1 DER ECDSA signature.
func NewFormat(origin string, pub crypto.PublicKey) (head.Format, error) {
	if err := checkOrigin(origin); err != nil {
		return nil, err
	}
	if alg, err := hsm.AlgorithmOf(pub); err != nil || alg != hsm.ECDSAP256 {
		return nil, errors.New("key of a Rekor log: want ECDSA P-256")
	}
	id, err := hsm.SPKIHash(pub)
	if err != nil {
		return nil, err
	}
	return &format{origin: origin, keyID: [4]byte(id[:4])}, nil
}

// checkOrigin accepts a bare hostname or address: what url.Hostname gives for
// the log's baseUrl.
func checkOrigin(origin string) error {
	bad := strings.IndexFunc(origin, func(r rune) bool {
		return r == unicode.ReplacementChar || unicode.IsSpace(r) || unicode.IsControl(r) || strings.ContainsRune("+/?#@", r)
	})
	switch {
	case origin == "":
		return errors.New("origin is empty")
	case v1Origin.MatchString(origin):
		return fmt.Errorf("origin %q: ends as those of Rekor v1 do", origin)
	case bad >= 0:
		return fmt.Errorf("origin %q: not a bare hostname", origin)
	case strings.Contains(origin, ":") && strings.Count(origin, ":") == 1:
		return fmt.Errorf("origin %q: has a port", origin)
	}
	return nil
}

// Message implements head.Format.
func (f *format) Message(h head.Head) ([]byte, error) {
	return f.text(h), nil
}

func (f *format) text(h head.Head) []byte {
	return fmt.Appendf(nil, "%s\n%d\n%s\n", f.origin, h.Size, base64.StdEncoding.EncodeToString(h.Root[:]))
}

// Note implements head.Format.
func (f *format) Note(h head.Head, signature []byte) ([]byte, error) {
	if len(signature) == 0 {
		return nil, errors.New("write checkpoint: no signature")
	}
	line := append(f.keyID[:len(f.keyID):len(f.keyID)], signature...)
	return fmt.Appendf(f.text(h), "\n\u2014 %s %s\n", f.origin, base64.StdEncoding.EncodeToString(line)), nil
}
