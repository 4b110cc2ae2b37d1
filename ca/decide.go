package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/chancery-ca/chancery/ca/audit"
	"github.com/chancery-ca/chancery/ca/identity"
	"github.com/chancery-ca/chancery/ca/policy"
	"github.com/chancery-ca/chancery/hsm"
)

// grant is a decision: what may be issued, and its record in the making.
type grant struct {
	lifetime time.Duration
	record   audit.Record
	counted  bool // a use of the token was counted
}

// decide asks the policy and counts the use of the token. The grant that comes
// with an error holds the record of the refusal.
func (a *Authority) decide(req Request) (*grant, error) {
	g := &grant{lifetime: a.cfg.Lifetime, record: record(req.ID, req.Principal)}
	if req.Principal == nil {
		return g, fmt.Errorf("%w: no principal", ErrIdentity)
	}
	spki, err := hsm.SPKIHash(req.Public)
	if err != nil {
		return g, fmt.Errorf("%w: %w", ErrIdentity, err)
	}
	g.record.SPKI = hex.EncodeToString(spki[:])
	d := a.cfg.Policy.Decide(policy.Subject{
		Issuer: req.Principal.Issuer, SAN: req.Principal.SAN, Claim: req.Principal.Claim, Key: keyType(req.Public),
	})
	g.record.Rule = d.Rule
	if !d.Allowed {
		return g, fmt.Errorf("%w: %s", ErrPolicy, d.Reason)
	}
	if d.Lifetime > 0 {
		g.lifetime = min(g.lifetime, d.Lifetime)
	}
	if a.cfg.Uses == nil {
		return g, nil
	}
	now, err := a.cfg.Now()
	if err != nil {
		return g, fmt.Errorf("read clock: %w: %w", ErrUnavailable, err)
	}
	if g.record.Uses, err = a.cfg.Uses.Count(req.Principal.Token, spki, now); err != nil {
		return g, err
	}
	g.counted = true
	return g, nil
}

// record begins the audit's record of a request, of which p may be nil.
func record(id string, p *identity.Principal) audit.Record {
	r := audit.Record{Request: id}
	if p != nil {
		r.Issuer, r.SANType, r.SAN = p.Issuer, string(p.SAN.Type), p.SAN.Value
		r.Token = hex.EncodeToString(p.Token.ID[:8])
	}
	return r
}

// allow records that the certificate will be released, durably.
func (a *Authority) allow(ctx context.Context, g *grant) error {
	if a.cfg.Audit == nil {
		return nil
	}
	r := g.record
	r.Type = audit.TypeAllowed
	if err := a.cfg.Audit.Append(ctx, r); err != nil {
		return fmt.Errorf("record decision: %w", classify(ErrUnavailable, err))
	}
	return nil
}

// withdraw records that nothing came of a grant, and gives the use of the token
// back.
func (a *Authority) withdraw(g *grant, req Request, err error) {
	if g.counted {
		a.cfg.Uses.Undo(req.Principal.Token)
	}
	r := g.record
	r.Type, r.Reason = audit.TypeWithdrawn, reason(err)
	a.note(r)
}

// Refused records a request that was refused before it came to Issue. p is nil
// if its token was not valid. err must hold no token and no claim.
func (a *Authority) Refused(id string, p *identity.Principal, err error) {
	a.refuse(record(id, p), err, p != nil)
}

func (a *Authority) refuse(r audit.Record, err error, authenticated bool) {
	if a.cfg.Audit != nil {
		r.Reason = reason(err)
		a.cfg.Audit.Refuse(r, authenticated)
	}
}

func (a *Authority) note(r audit.Record) {
	if a.cfg.Audit != nil {
		a.cfg.Audit.Note(r)
	}
}

// maxReason bounds the text of an error in a record, in octets.
const maxReason = 300

func reason(err error) string {
	text := err.Error()
	if len(text) > maxReason {
		text = strings.ToValidUTF8(text[:maxReason], "")
	}
	return text
}

// keyType names a public key as the policy does.
func keyType(pub crypto.PublicKey) string {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		return fmt.Sprintf("ecdsa-p%d", k.Curve.Params().BitSize)
	case *rsa.PublicKey:
		return fmt.Sprintf("rsa-%d", k.N.BitLen())
	case ed25519.PublicKey:
		return "ed25519"
	}
	return ""
}
