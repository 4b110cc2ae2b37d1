package ct

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	ct "github.com/google/certificate-transparency-go"
	"github.com/google/certificate-transparency-go/tls"

	"github.com/chancery-ca/chancery/log/tree"
)

// Bundle returns what /tile/data/… serves for consecutive entries: the
// TileLeaf structures of static-ct-api, Log Entries, without leaf_index. issuer
// is called with each certificate that they name by its fingerprint, in DER,
// which /issuer/… serves.
func Bundle(entries []tree.Entry, issuer func(der []byte)) ([]byte, error) {
	var out []byte
	for _, e := range entries {
		_, data, err := splitExtra(e.Extra)
		if err != nil {
			return nil, fmt.Errorf("read entry %d: %w", e.Index, err)
		}
		leaf, err := tileLeaf(e.Value, data, func(der []byte) [sha256.Size]byte {
			issuer(der)
			return sha256.Sum256(der)
		})
		if err != nil {
			return nil, fmt.Errorf("read entry %d: %w", e.Index, err)
		}
		out = append(out, leaf...)
	}
	return out, nil
}

// tileLeaf turns a MerkleTreeLeaf and its extra_data into a TileLeaf: the
// TimestampedEntry (whose extensions are empty here), the precertificate of a
// precert entry, and the fingerprints of the chain, which learn gives.
func tileLeaf(value, data []byte, learn func(der []byte) [sha256.Size]byte) ([]byte, error) {
	var leaf ct.MerkleTreeLeaf
	if rest, err := tls.Unmarshal(value, &leaf); err != nil || len(rest) > 0 || len(value) < 2 {
		return nil, errExtra
	}
	precert, chain, err := parseExtra(leaf.TimestampedEntry.EntryType, data)
	if err != nil {
		return nil, err
	}
	// A MerkleTreeLeaf is version, leaf type and the TimestampedEntry.
	out := append([]byte(nil), value[2:]...)
	if leaf.TimestampedEntry.EntryType == ct.PrecertLogEntryType {
		n := len(precert)
		out = append(out, byte(n>>16), byte(n>>8), byte(n))
		out = append(out, precert...)
	}
	if len(chain)*sha256.Size > 0xffff {
		return nil, errExtra
	}
	out = binary.BigEndian.AppendUint16(out, uint16(len(chain)*sha256.Size))
	for _, cert := range chain {
		fp := learn(cert.Data)
		out = append(out, fp[:]...)
	}
	return out, nil
}
