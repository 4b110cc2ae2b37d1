package tree

import "crypto/sha256"

// LeafHash returns SHA-256(0x00 ‖ value) (RFC 6962, Section 2.1).
func LeafHash(value []byte) Hash {
	h := sha256.New()
	h.Write([]byte{0x00})
	h.Write(value)
	return Hash(h.Sum(nil))
}

// EmptyRoot returns the root of the tree without leaves, SHA-256("")
// (RFC 6962, Section 2.1).
func EmptyRoot() Hash { return sha256.Sum256(nil) }

// hashChildren returns SHA-256(0x01 ‖ left ‖ right) (RFC 6962, Section 2.1).
func hashChildren(left, right *Hash) Hash {
	var b [1 + 2*HashSize]byte
	b[0] = 0x01
	copy(b[1:], left[:])
	copy(b[1+HashSize:], right[:])
	return sha256.Sum256(b[:])
}
