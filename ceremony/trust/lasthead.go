package trust

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/chancery-ca/chancery/hsm"
)

// ErrLastHead: what should be the last head of a log is not one, or not of that
// log.
var ErrLastHead = errors.New("not a signed head of the log")

// MaxLastHead bounds what ParseLastHead reads, in octets.
const MaxLastHead = 4096

// LastHead is what a log that has a successor signed last, as the ceremony that
// made the successor put it on record.
type LastHead struct {
	Size uint64
	Root [sha256.Size]byte
}

// LastHeadName is the file, among the outputs of a ceremony, with the last head
// of the log whose key has the SHA-256 spki.
func LastHeadName(spki [sha256.Size]byte) string {
	return fmt.Sprintf("frozen/%x.checkpoint", spki[:8])
}

// ParseLastHead reads a head and verifies it with the key of its log. It accepts
// a signed note (C2SP signed-note, tlog-checkpoint) with an ECDSA signature over
// SHA-256 of its text, and the answer of a CT log to get-sth (RFC 6962, 4.3).
// Errors: ErrLastHead.
func ParseLastHead(pub *ecdsa.PublicKey, content []byte) (LastHead, error) {
	if len(content) > MaxLastHead {
		return LastHead{}, fmt.Errorf("%w: more than %d octets", ErrLastHead, MaxLastHead)
	}
	if bytes.HasPrefix(content, []byte("{")) {
		return parseTreeHead(pub, content)
	}
	text, signatures, ok := strings.Cut(string(content), "\n\n")
	lines := strings.Split(text, "\n")
	if !ok || len(lines) < 3 {
		return LastHead{}, fmt.Errorf("%w: not a signed note", ErrLastHead)
	}
	size, err := strconv.ParseUint(lines[1], 10, 63)
	root, rootErr := base64.StdEncoding.DecodeString(lines[2])
	if err != nil || rootErr != nil || len(root) != sha256.Size {
		return LastHead{}, fmt.Errorf("%w: no size and root", ErrLastHead)
	}
	digest := sha256.Sum256([]byte(text + "\n"))
	spki, err := hsm.SPKIHash(pub)
	if err != nil {
		return LastHead{}, err
	}
	for line := range strings.SplitSeq(signatures, "\n") {
		fields := strings.Fields(line)
		if len(fields) != 3 || fields[0] != "—" {
			continue
		}
		sig, err := base64.StdEncoding.DecodeString(fields[2])
		if err == nil && len(sig) > 4 && bytes.Equal(sig[:4], spki[:4]) && ecdsa.VerifyASN1(pub, digest[:], sig[4:]) {
			return LastHead{size, [sha256.Size]byte(root)}, nil
		}
	}
	return LastHead{}, fmt.Errorf("%w: no signature of the shard's key", ErrLastHead)
}

// parseTreeHead verifies a signed tree head (RFC 6962, 3.5).
func parseTreeHead(pub *ecdsa.PublicKey, content []byte) (LastHead, error) {
	var sth struct {
		Size      uint64 `json:"tree_size"`
		Timestamp uint64 `json:"timestamp"`
		Root      []byte `json:"sha256_root_hash"`
		Signature []byte `json:"tree_head_signature"`
	}
	if err := json.Unmarshal(content, &sth); err != nil {
		return LastHead{}, fmt.Errorf("%w: %w", ErrLastHead, err)
	}
	// DigitallySigned (RFC 5246, 4.7): SHA-256, ECDSA, length, signature.
	s := sth.Signature
	if len(sth.Root) != sha256.Size || len(s) < 4 || s[0] != 4 || s[1] != 3 || int(binary.BigEndian.Uint16(s[2:4])) != len(s)-4 {
		return LastHead{}, fmt.Errorf("%w: not an answer to get-sth", ErrLastHead)
	}
	message := []byte{0, 1} // v1, tree_hash
	message = binary.BigEndian.AppendUint64(message, sth.Timestamp)
	message = binary.BigEndian.AppendUint64(message, sth.Size)
	digest := sha256.Sum256(append(message, sth.Root...))
	if !ecdsa.VerifyASN1(pub, digest[:], s[4:]) {
		return LastHead{}, fmt.Errorf("%w: no signature of the log's key", ErrLastHead)
	}
	return LastHead{sth.Size, [sha256.Size]byte(sth.Root)}, nil
}
