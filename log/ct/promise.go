package ct

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"

	ct "github.com/google/certificate-transparency-go"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/tree"
)

// Promise is a signed SCT whose leaf is not in the log yet. It belongs to one
// caller; Commit it once or drop it.
type Promise struct {
	log       *Log
	entry     *ct.TimestampedEntry
	signed    []byte // what the signature covers, and the leaf's value
	digest    [sha256.Size]byte
	signature []byte // DER ECDSA
	sct       []byte
}

// Promise signs an SCT for a precertificate that is still to be made: tbs is
// the DER TBSCertificate without the poison, issuerKeyHash the SHA-256 of the
// issuer's SubjectPublicKeyInfo (RFC 6962, Section 3.2). Nothing is queued.
// Errors: ErrUnavailable (clock or key).
func (l *Log) Promise(ctx context.Context, issuerKeyHash [sha256.Size]byte, tbs []byte) (*Promise, error) {
	return l.promise(ctx, &ct.TimestampedEntry{
		EntryType: ct.PrecertLogEntryType,
		PrecertEntry: &ct.PreCert{
			IssuerKeyHash:  issuerKeyHash,
			TBSCertificate: bytes.Clone(tbs),
		},
	})
}

// promise stamps entry with the time and signs its SCT.
func (l *Log) promise(ctx context.Context, entry *ct.TimestampedEntry) (*Promise, error) {
	now, err := l.cfg.Now()
	if err != nil {
		return nil, fmt.Errorf("read clock: %w: %w", ErrUnavailable, err)
	}
	ms := now.UnixMilli()
	if ms < 0 {
		return nil, fmt.Errorf("read clock: %w: time before 1970", ErrUnavailable)
	}
	entry.Timestamp = uint64(ms)
	signed, err := encodeEntry(entry)
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256(signed)
	signature, err := l.cfg.Key.SignContext(ctx, digest[:], crypto.SHA256)
	if err != nil {
		if errors.Is(err, hsm.ErrBusy) || errors.Is(err, hsm.ErrLost) {
			return nil, fmt.Errorf("sign SCT: %w: %w", ErrUnavailable, err)
		}
		return nil, fmt.Errorf("sign SCT: %w", err)
	}
	sct, err := l.encodeSCT(entry.Timestamp, signature)
	if err != nil {
		return nil, err
	}
	return &Promise{log: l, entry: entry, signed: signed, digest: digest, signature: signature, sct: sct}, nil
}

// SCT returns the TLS-encoded SignedCertificateTimestamp. The slice belongs to
// the promise.
func (p *Promise) SCT() []byte { return p.sct }

// Signed returns the SHA-256 digest that the log's key signed, and the DER
// ECDSA signature, which the key verified before it returned it (hsm.Key). Who
// computes the digest of his own TBS need not verify the SCT again. The slice
// belongs to the promise.
func (p *Promise) Signed() (digest [sha256.Size]byte, signature []byte) {
	return p.digest, p.signature
}

// Commit puts the promised leaf into the log and returns its index when it is
// durable. precert is the DER precertificate, whose TBS without the poison
// must be the promised one; chain is the rest of the chain, issuer first, root
// last. It fails with ErrConflict when the precertificate does not fit the
// promise or is in the log under another SCT; otherwise as tree.Append does.
func (p *Promise) Commit(ctx context.Context, precert []byte, chain [][]byte) (uint64, error) {
	tbs, err := defang(precert)
	if err != nil {
		return 0, fmt.Errorf("read precertificate: %w: %w", ErrConflict, err)
	}
	if p.entry.PrecertEntry == nil || !bytes.Equal(tbs, p.entry.PrecertEntry.TBSCertificate) {
		return 0, ErrConflict
	}
	if len(chain) == 0 {
		return 0, fmt.Errorf("%w: no issuer", ErrConflict)
	}
	leaf, err := p.leaf(precert, chain)
	if err != nil {
		return 0, err
	}
	entry, existed, err := p.log.cfg.Tree.Append(ctx, leaf)
	if err != nil {
		return 0, fmt.Errorf("append precertificate: %w", err)
	}
	if existed && !bytes.Equal(entry.Value, leaf.Value) {
		return 0, fmt.Errorf("%w: logged before as entry %d", ErrConflict, entry.Index)
	}
	for _, der := range chain {
		p.log.learn(der)
	}
	return entry.Index, nil
}

// leaf is the promise as the tree keeps it.
func (p *Promise) leaf(cert []byte, chain [][]byte) (tree.Leaf, error) {
	extra, err := encodeExtra(p.signature, p.entry.EntryType, cert, chain)
	if err != nil {
		return tree.Leaf{}, err
	}
	return tree.Leaf{Value: p.signed, Extra: extra, Identity: identity(p.entry.EntryType, cert)}, nil
}

// identity is what makes two submissions the same: the certificate's octets
// and the method, SHA-256(entry_type (2 octets) ‖ DER).
func identity(kind ct.LogEntryType, cert []byte) tree.Hash {
	h := sha256.New()
	h.Write([]byte{byte(kind >> 8), byte(kind)})
	h.Write(cert)
	return tree.Hash(h.Sum(nil))
}
