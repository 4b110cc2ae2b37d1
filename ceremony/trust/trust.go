// Package trust writes and reads the files by which clients and the service
// know a Chancery: trusted_root.json, signing_config.v0.2.json and
// client_trust_config.json for Sigstore clients, keys.yaml for the service.
//
// Data flows one way: public keys, certificates and URLs → Root and
// SigningConfig → protobuf messages → canonical JSON octets. Equal input gives
// equal octets, so that a ceremony can record the hash of a file before the
// file is written.
//
// The package promises that what it writes is what every client reads: exactly
// media type v0.1 of the trusted root and v0.2 of the signing configuration,
// a validity start on every key and authority, and none of the newer fields
// (checkpointKeyId, operator of a log) that some clients misread. What it
// reads it reads strictly: an unknown field, a second document or a wrong
// media type is an error.
//
// Rotation is a pure function from a Root to a Root: what was is kept, with an
// end, and what follows is added, so that every signature of before verifies
// with the new file too.
//
// It holds no private key and signs nothing. It trusts its caller that the
// public material is the right one. ceremony/trust/tuf distributes the files.
package trust

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"time"

	commonpb "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	trustpb "github.com/sigstore/protobuf-specs/gen/pb-go/trustroot/v1"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/chancery-ca/chancery/hsm"
)

// The media types (protobuf-specs, sigstore_trustroot.proto). Go, Python and
// Java clients refuse any other spelling.
const (
	RootMediaType          = "application/vnd.dev.sigstore.trustedroot+json;version=0.1"
	SigningConfigMediaType = "application/vnd.dev.sigstore.signingconfig.v0.2+json"
	ClientConfigMediaType  = "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json"
)

// maxFile bounds every file that the package reads, in octets.
const maxFile = 1 << 20

// Errors that callers branch on.
var (
	// ErrFormat: the octets are not a file of the expected kind.
	ErrFormat = errors.New("not a valid file of this kind")
	// ErrIncomplete: a value lacks something that some client needs.
	ErrIncomplete = errors.New("incomplete")
)

// Validity is a span of time, ends included. A zero End means open.
type Validity struct {
	Start, End time.Time
}

// Log is one shard of a transparency log or of a Certificate Transparency log.
type Log struct {
	// BaseURL names the shard. For a Rekor v2 log its host is the origin of
	// the checkpoints.
	BaseURL string
	// PublicKey is the P-256 key of the shard; no other shard has it.
	PublicKey *ecdsa.PublicKey
	Validity  Validity
}

// ID returns the log id: the SHA-256 of the DER SubjectPublicKeyInfo
// (RFC 6962, Section 3.2; C2SP signed-note type 0x02 takes its first 4 octets).
func (l Log) ID() ([sha256.Size]byte, error) {
	return hsm.SPKIHash(l.PublicKey)
}

// Authority is a certificate authority or a timestamp authority.
type Authority struct {
	Organization, CommonName string
	// URI is where the authority answers; a timestamp authority's differs
	// from the certificate authority's.
	URI string
	// Chain is in the order of the file: a certificate authority's begins
	// with the intermediate, a timestamp authority's with its leaf; both end
	// with the root.
	Chain    []*x509.Certificate
	Validity Validity
}

// Root is the content of trusted_root.json.
type Root struct {
	Logs                   []Log // signature logs (Rekor)
	CertificateAuthorities []Authority
	CTLogs                 []Log
	TimestampAuthorities   []Authority
}

// Marshal returns trusted_root.json, indented, with a final newline. It fails
// with ErrIncomplete when a client would refuse the file.
func (r Root) Marshal() ([]byte, error) {
	if len(r.Logs) == 0 || len(r.CertificateAuthorities) == 0 {
		return nil, fmt.Errorf("trusted root: a log and a certificate authority are needed: %w", ErrIncomplete)
	}
	m := &trustpb.TrustedRoot{MediaType: RootMediaType}
	var err error
	if m.Tlogs, err = logsToProto(r.Logs); err != nil {
		return nil, fmt.Errorf("encode signature logs: %w", err)
	}
	if m.Ctlogs, err = logsToProto(r.CTLogs); err != nil {
		return nil, fmt.Errorf("encode CT logs: %w", err)
	}
	if m.CertificateAuthorities, err = authoritiesToProto(r.CertificateAuthorities, true); err != nil {
		return nil, fmt.Errorf("encode certificate authorities: %w", err)
	}
	if m.TimestampAuthorities, err = authoritiesToProto(r.TimestampAuthorities, false); err != nil {
		return nil, fmt.Errorf("encode timestamp authorities: %w", err)
	}
	return marshal(m)
}

// ParseRoot reads trusted_root.json strictly.
func ParseRoot(data []byte) (Root, error) {
	var m trustpb.TrustedRoot
	if err := unmarshal(data, &m); err != nil {
		return Root{}, fmt.Errorf("read trusted root: %w", err)
	}
	if m.GetMediaType() != RootMediaType {
		return Root{}, fmt.Errorf("read trusted root: media type %.80q: %w", m.GetMediaType(), ErrFormat)
	}
	var r Root
	var err error
	if r.Logs, err = logsFromProto(m.GetTlogs()); err != nil {
		return Root{}, fmt.Errorf("read signature logs: %w", err)
	}
	if r.CTLogs, err = logsFromProto(m.GetCtlogs()); err != nil {
		return Root{}, fmt.Errorf("read CT logs: %w", err)
	}
	if r.CertificateAuthorities, err = authoritiesFromProto(m.GetCertificateAuthorities()); err != nil {
		return Root{}, fmt.Errorf("read certificate authorities: %w", err)
	}
	if r.TimestampAuthorities, err = authoritiesFromProto(m.GetTimestampAuthorities()); err != nil {
		return Root{}, fmt.Errorf("read timestamp authorities: %w", err)
	}
	return r, nil
}

func logsToProto(logs []Log) ([]*trustpb.TransparencyLogInstance, error) {
	seen := map[[sha256.Size]byte]bool{}
	var out []*trustpb.TransparencyLogInstance
	for _, l := range logs {
		if l.PublicKey == nil || l.PublicKey.Curve != elliptic.P256() {
			return nil, fmt.Errorf("log %s: key is not P-256: %w", l.BaseURL, ErrIncomplete)
		}
		if err := checkURL(l.BaseURL); err != nil {
			return nil, err
		}
		der, err := x509.MarshalPKIXPublicKey(l.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("log %s: encode key: %w", l.BaseURL, err)
		}
		id := sha256.Sum256(der)
		if seen[id] {
			return nil, fmt.Errorf("log %s: another shard has the same key: %w", l.BaseURL, ErrIncomplete)
		}
		seen[id] = true
		valid, err := l.Validity.toProto()
		if err != nil {
			return nil, fmt.Errorf("log %s: %w", l.BaseURL, err)
		}
		out = append(out, &trustpb.TransparencyLogInstance{
			BaseUrl:       l.BaseURL,
			HashAlgorithm: commonpb.HashAlgorithm_SHA2_256,
			PublicKey: &commonpb.PublicKey{
				RawBytes:   der,
				KeyDetails: commonpb.PublicKeyDetails_PKIX_ECDSA_P256_SHA_256,
				ValidFor:   valid,
			},
			LogId: &commonpb.LogId{KeyId: id[:]},
		})
	}
	return out, nil
}

func logsFromProto(in []*trustpb.TransparencyLogInstance) ([]Log, error) {
	var out []Log
	for _, m := range in {
		l := Log{BaseURL: m.GetBaseUrl()}
		pub, err := x509.ParsePKIXPublicKey(m.GetPublicKey().GetRawBytes())
		if err != nil {
			return nil, fmt.Errorf("log %.200q: parse key: %w", l.BaseURL, errors.Join(ErrFormat, err))
		}
		key, ok := pub.(*ecdsa.PublicKey)
		if !ok || m.GetPublicKey().GetKeyDetails() != commonpb.PublicKeyDetails_PKIX_ECDSA_P256_SHA_256 ||
			m.GetHashAlgorithm() != commonpb.HashAlgorithm_SHA2_256 {
			return nil, fmt.Errorf("log %.200q: key is not P-256 with SHA-256: %w", l.BaseURL, ErrFormat)
		}
		l.PublicKey = key
		if l.Validity, err = validityFromProto(m.GetPublicKey().GetValidFor()); err != nil {
			return nil, fmt.Errorf("log %.200q: %w", l.BaseURL, err)
		}
		if id, err := l.ID(); err != nil || !bytes.Equal(id[:], m.GetLogId().GetKeyId()) {
			return nil, fmt.Errorf("log %.200q: log id is not the SHA-256 of its key: %w", l.BaseURL, ErrFormat)
		}
		out = append(out, l)
	}
	return out, nil
}

// authoritiesToProto checks the order of each chain: a CA's has CA
// certificates only, a timestamp authority's a leaf first.
func authoritiesToProto(as []Authority, ca bool) ([]*trustpb.CertificateAuthority, error) {
	var out []*trustpb.CertificateAuthority
	for _, a := range as {
		if err := checkURL(a.URI); err != nil {
			return nil, err
		}
		if len(a.Chain) < 2 || a.Chain[0].IsCA != ca {
			return nil, fmt.Errorf("authority %s: chain has %d certificates or the wrong first one: %w", a.URI, len(a.Chain), ErrIncomplete)
		}
		valid, err := a.Validity.toProto()
		if err != nil {
			return nil, fmt.Errorf("authority %s: %w", a.URI, err)
		}
		chain := &commonpb.X509CertificateChain{}
		for i, c := range a.Chain {
			if i+1 < len(a.Chain) {
				if err := c.CheckSignatureFrom(a.Chain[i+1]); err != nil {
					return nil, fmt.Errorf("authority %s: certificate %d is not signed by the next: %w", a.URI, i, err)
				}
			}
			chain.Certificates = append(chain.Certificates, &commonpb.X509Certificate{RawBytes: c.Raw})
		}
		out = append(out, &trustpb.CertificateAuthority{
			Subject:   &commonpb.DistinguishedName{Organization: a.Organization, CommonName: a.CommonName},
			Uri:       a.URI,
			CertChain: chain,
			ValidFor:  valid,
		})
	}
	return out, nil
}

func authoritiesFromProto(in []*trustpb.CertificateAuthority) ([]Authority, error) {
	var out []Authority
	for _, m := range in {
		a := Authority{
			Organization: m.GetSubject().GetOrganization(),
			CommonName:   m.GetSubject().GetCommonName(),
			URI:          m.GetUri(),
		}
		for _, c := range m.GetCertChain().GetCertificates() {
			cert, err := x509.ParseCertificate(c.GetRawBytes())
			if err != nil {
				return nil, fmt.Errorf("authority %.200q: parse certificate: %w", a.URI, errors.Join(ErrFormat, err))
			}
			a.Chain = append(a.Chain, cert)
		}
		var err error
		if a.Validity, err = validityFromProto(m.GetValidFor()); err != nil {
			return nil, fmt.Errorf("authority %.200q: %w", a.URI, err)
		}
		out = append(out, a)
	}
	return out, nil
}

func (v Validity) toProto() (*commonpb.TimeRange, error) {
	if v.Start.IsZero() {
		return nil, fmt.Errorf("validity has no start: %w", ErrIncomplete)
	}
	if !v.End.IsZero() && !v.End.After(v.Start) {
		return nil, fmt.Errorf("validity ends before it starts: %w", ErrIncomplete)
	}
	r := &commonpb.TimeRange{Start: timestamppb.New(v.Start)}
	if !v.End.IsZero() {
		r.End = timestamppb.New(v.End)
	}
	return r, nil
}

func validityFromProto(r *commonpb.TimeRange) (Validity, error) {
	if r.GetStart() == nil {
		return Validity{}, fmt.Errorf("validity has no start: %w", ErrFormat)
	}
	v := Validity{Start: r.GetStart().AsTime()}
	if r.GetEnd() != nil {
		v.End = r.GetEnd().AsTime()
	}
	return v, nil
}

// checkURL accepts an absolute http or https URL with a host and without
// credentials, query or fragment.
func checkURL(s string) error {
	u, err := url.Parse(s)
	if err != nil || (u.Scheme != "https" && u.Scheme != "http") || u.Hostname() == "" ||
		u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("URL %.200q: %w", s, ErrIncomplete)
	}
	return nil
}

// marshal returns the message's JSON with two-space indentation: protojson
// alone varies its white space from build to build.
func marshal(m proto.Message) ([]byte, error) {
	raw, err := protojson.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode JSON: %w", err)
	}
	return indent(raw)
}

func indent(raw []byte) ([]byte, error) {
	var compact, out bytes.Buffer
	if err := json.Compact(&compact, raw); err != nil {
		return nil, fmt.Errorf("compact JSON: %w", err)
	}
	if err := json.Indent(&out, compact.Bytes(), "", "  "); err != nil {
		return nil, fmt.Errorf("indent JSON: %w", err)
	}
	out.WriteByte('\n')
	return out.Bytes(), nil
}

func unmarshal(data []byte, m proto.Message) error {
	if len(data) > maxFile {
		return fmt.Errorf("%d octets, at most %d: %w", len(data), maxFile, ErrFormat)
	}
	if err := protojson.Unmarshal(data, m); err != nil {
		return errors.Join(ErrFormat, err)
	}
	return nil
}
