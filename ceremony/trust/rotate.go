package trust

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"
)

// ErrRotation: what follows does not follow what was.
var ErrRotation = errors.New("cannot rotate")

// RotateCertificateAuthority returns a root in which the certificate authority
// next has followed those at the same URI: they stay, so that what they certified
// still verifies, and their validity ends at end, unless it ends before. A client
// accepts a certificate of theirs only with a timestamp up to end; so end is
// later than the start of next by the time that both are in use (the overlap),
// or is the time of a compromise.
//
// It fails with ErrRotation when nothing is followed, when next is in the root
// already, or when between end and the start of next nobody would be valid.
func (r Root) RotateCertificateAuthority(next Authority, end time.Time) (Root, error) {
	var err error
	out := r.clone()
	out.CertificateAuthorities, err = rotateAuthority(out.CertificateAuthorities, next, end)
	if err != nil {
		return Root{}, fmt.Errorf("rotate certificate authority: %w", err)
	}
	return out, nil
}

// RotateTimestampAuthority is RotateCertificateAuthority for the authority of
// timestamps.
func (r Root) RotateTimestampAuthority(next Authority, end time.Time) (Root, error) {
	var err error
	out := r.clone()
	out.TimestampAuthorities, err = rotateAuthority(out.TimestampAuthorities, next, end)
	if err != nil {
		return Root{}, fmt.Errorf("rotate timestamp authority: %w", err)
	}
	return out, nil
}

// RotateLog returns a root in which the signature log next follows the shard
// with the id old, which is frozen: it stays, so that its proofs still verify,
// and its validity ends at end, unless it ends before. Errors as of
// RotateCertificateAuthority.
func (r Root) RotateLog(old [sha256.Size]byte, next Log, end time.Time) (Root, error) {
	var err error
	out := r.clone()
	out.Logs, err = rotateLog(out.Logs, old, next, end)
	if err != nil {
		return Root{}, fmt.Errorf("rotate signature log: %w", err)
	}
	return out, nil
}

// RotateCTLog is RotateLog for a Certificate Transparency log.
func (r Root) RotateCTLog(old [sha256.Size]byte, next Log, end time.Time) (Root, error) {
	var err error
	out := r.clone()
	out.CTLogs, err = rotateLog(out.CTLogs, old, next, end)
	if err != nil {
		return Root{}, fmt.Errorf("rotate CT log: %w", err)
	}
	return out, nil
}

// RotateCA returns a signing configuration in which the certificate authority
// next follows those at the same URL and of the same version, whose validity
// ends at end unless it ends before. Clients take one that is valid when they
// sign. Errors as of Root.RotateCertificateAuthority.
func (c SigningConfig) RotateCA(next Service, end time.Time) (SigningConfig, error) {
	out := SigningConfig{slices.Clone(c.CAs), slices.Clone(c.OIDC), slices.Clone(c.Rekor), slices.Clone(c.TSAs)}
	followed := false
	for i, s := range out.CAs {
		if s.URL != next.URL || s.MajorAPIVersion != next.MajorAPIVersion {
			continue
		}
		v, err := s.Validity.until(end, next.Validity)
		if err != nil {
			return SigningConfig{}, fmt.Errorf("rotate certificate authority: %w", err)
		}
		out.CAs[i].Validity, followed = v, true
	}
	if !followed {
		return SigningConfig{}, fmt.Errorf("rotate certificate authority: none at %.200q: %w", next.URL, ErrRotation)
	}
	out.CAs = append(out.CAs, next)
	return out, nil
}

// clone copies the lists, not what they point to.
func (r Root) clone() Root {
	return Root{
		slices.Clone(r.Logs), slices.Clone(r.CertificateAuthorities), slices.Clone(r.CTLogs), slices.Clone(r.TimestampAuthorities),
	}
}

// until returns the validity cut off at end, when next is valid by then.
func (v Validity) until(end time.Time, next Validity) (Validity, error) {
	if !v.End.IsZero() && !v.End.After(end) {
		return v, nil
	}
	switch {
	case !end.After(v.Start):
		return v, fmt.Errorf("the end %s is before the start %s: %w", end.Format(time.RFC3339), v.Start.Format(time.RFC3339), ErrRotation)
	case next.Start.After(end):
		return v, fmt.Errorf("nothing is valid between %s and %s: %w", end.Format(time.RFC3339), next.Start.Format(time.RFC3339), ErrRotation)
	}
	v.End = end
	return v, nil
}

func rotateAuthority(all []Authority, next Authority, end time.Time) ([]Authority, error) {
	if len(next.Chain) == 0 {
		return nil, fmt.Errorf("no certificate: %w", ErrRotation)
	}
	followed := false
	for i, a := range all {
		if len(a.Chain) > 0 && a.Chain[0].Equal(next.Chain[0]) {
			return nil, fmt.Errorf("%s is in the root already: %w", next.Chain[0].Subject.CommonName, ErrRotation)
		}
		if a.URI != next.URI {
			continue
		}
		v, err := a.Validity.until(end, next.Validity)
		if err != nil {
			return nil, err
		}
		all[i].Validity, followed = v, true
	}
	if !followed {
		return nil, fmt.Errorf("no authority at %.200q: %w", next.URI, ErrRotation)
	}
	return append(all, next), nil
}

func rotateLog(all []Log, old [sha256.Size]byte, next Log, end time.Time) ([]Log, error) {
	if next.PublicKey == nil {
		return nil, fmt.Errorf("no key: %w", ErrRotation)
	}
	followed := false
	for i, l := range all {
		if l.PublicKey.Equal(next.PublicKey) || l.BaseURL == next.BaseURL {
			return nil, fmt.Errorf("a shard with the key or the URL %.200q is in the root already: %w", next.BaseURL, ErrRotation)
		}
		id, err := l.ID()
		if err != nil {
			return nil, err
		}
		if id != old {
			continue
		}
		if all[i].Validity, err = l.Validity.until(end, next.Validity); err != nil {
			return nil, err
		}
		followed = true
	}
	if !followed {
		return nil, fmt.Errorf("no shard with id %x: %w", old[:8], ErrRotation)
	}
	return append(all, next), nil
}
