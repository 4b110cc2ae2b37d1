package ceremony

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"math/big"
	"time"

	"github.com/chancery-ca/chancery/ca/profile"
	"github.com/chancery-ca/chancery/hsm"
)

// certificate issues one certificate: its TBS is linted and on disk before it
// is signed, and the signed octets are compared with it after.
func (r *run) certificate(ctx context.Context, s Step) error {
	intent, resumed := r.facts.tbs[s.Name]
	if !resumed {
		var err error
		if intent, err = r.newCertificateIntent(s.Name); err != nil {
			return err
		}
	}
	tbs, err := r.facts.buildTBS(s.Name, intent)
	if err != nil {
		return err
	}
	if !resumed {
		intent.TBS = tbs.Raw()
		sum := sha256.Sum256(intent.TBS)
		intent.TBSSHA256 = hex.EncodeToString(sum[:])
		if err := r.record(s, Intent, intent); err != nil {
			return err
		}
	}
	signer, err := r.signer(ctx, s.Name)
	if err != nil {
		return err
	}
	der, err := tbs.Sign(ctx, signer)
	if err != nil {
		return fmt.Errorf("sign: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("parse signed certificate: %w", err)
	}
	if !bytes.Equal(cert.RawTBSCertificate, intent.TBS) {
		return fmt.Errorf("signed certificate is not the announced one: %w", ErrStopped)
	}
	if err := cert.CheckSignatureFrom(r.facts.issuerOf(s.Name, cert)); err != nil {
		return fmt.Errorf("verify signed certificate: %w", err)
	}
	sum := sha256.Sum256(der)
	return r.record(s, Done, certificateResult{Certificate: der, SHA256: hex.EncodeToString(sum[:])})
}

// newCertificateIntent decides serial number and dates. A certificate never
// outlives its issuer.
func (r *run) newCertificateIntent(name string) (certificateIntent, error) {
	def := r.def.Certificates[name]
	now, err := r.now()
	if err != nil {
		return certificateIntent{}, err
	}
	notBefore := now.UTC().Truncate(time.Second)
	notAfter := notBefore.AddDate(def.Years, 0, 0).Add(-time.Second) // the last second counts (RFC 5280, 4.1.2.5)
	if issuer := r.facts.certs[def.Issuer]; issuer != nil && notAfter.After(issuer.NotAfter) {
		notAfter = issuer.NotAfter
	}
	kind := r.def.certificateKind(name)
	serial := randomSerial()
	if kind == profile.Root {
		serial = rootSerial(r.facts.seedRecord, r.facts.seed)
	}
	return certificateIntent{Kind: kind, Serial: serial.Text(16), NotBefore: notBefore, NotAfter: notAfter}, nil
}

// randomSerial returns 20 octets, positive, with 158 random bits.
func randomSerial() *big.Int {
	b := make([]byte, 20)
	_, _ = rand.Read(b) // never fails
	b[0] = b[0]&0x7f | 0x40
	return new(big.Int).SetBytes(b)
}

// buildTBS makes the TBS that an intent describes. It is a pure function of
// the definition and the records, and lints what it makes.
func (f *facts) buildTBS(name string, intent certificateIntent) (*profile.TBS, error) {
	def := f.def.Certificates[name]
	serial, ok := new(big.Int).SetString(intent.Serial, 16)
	if !ok {
		return nil, fmt.Errorf("%w: serial %.60q", ErrTranscript, intent.Serial)
	}
	key, ok := f.keys[def.Key]
	if !ok {
		return nil, fmt.Errorf("%w: key %s was not made", ErrTranscript, def.Key)
	}
	spec := profile.AuthoritySpec{
		Kind: f.def.certificateKind(name), Subject: f.def.subject(def.Subject), Serial: serial,
		Public: key.public, NotBefore: intent.NotBefore, NotAfter: intent.NotAfter,
	}
	if def.PathLen != nil {
		spec.PathLen = *def.PathLen
	}
	tbs, err := profile.NewAuthority(spec, f.certs[def.Issuer])
	if err != nil {
		return nil, fmt.Errorf("build certificate %s: %w", name, err)
	}
	return tbs, nil
}

func (d *Definition) subject(s Subject) pkix.Name {
	n := pkix.Name{Organization: []string{s.Organization}, CommonName: d.CommonName(s)}
	if s.Country != "" {
		n.Country = []string{s.Country}
	}
	return n
}

// issuerOf returns the certificate that signs cert: its issuer, or itself.
func (f *facts) issuerOf(name string, cert *x509.Certificate) *x509.Certificate {
	if def := f.def.Certificates[name]; !def.SelfSigned {
		return f.certs[def.Issuer]
	}
	return cert
}

// signer opens the key that signs the named certificate, by its public key.
func (r *run) signer(ctx context.Context, name string) (hsm.Key, error) {
	def := r.def.Certificates[name]
	keyName := def.Key
	if !def.SelfSigned {
		keyName = r.def.Certificates[def.Issuer].Key
	}
	fact := r.facts.keys[keyName]
	key, err := r.opts.Tokens[r.def.Keys[keyName].Token].Open(ctx, hsm.Ref{URI: fact.evidence.URI, SPKI: fact.spki}, r.def.uses[keyName].role)
	if err != nil {
		return nil, fmt.Errorf("open key %s: %w", keyName, err)
	}
	return key, nil
}
