package profile

import (
	"encoding/asn1"
	"fmt"
	"net/mail"
	"net/netip"
	"net/url"
	"strings"

	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// SANType is the kind of a leaf's one subject alternative name.
type SANType string

// The kinds of name that sigstore clients know (Fulcio 1.8, pkg/identity).
const (
	// Email is an rfc822Name: ASCII, an addr-spec of RFC 5322 without quoting
	// or comment; an internationalised domain is given as A-labels (RFC 5280,
	// 7.5).
	Email SANType = "email"
	// URI is a uniformResourceIdentifier: absolute, with an authority, no user
	// information. It is written as net/url renders it (upstream does the
	// same), so that characters outside of ASCII are percent-encoded.
	URI SANType = "uri"
	// OtherName is an otherName of type 1.3.6.1.4.1.57264.1.7, a UTF8String:
	// "<sub>!<subject-domain>".
	OtherName SANType = "othername"
)

// SAN is the identity in a leaf: exactly one name.
type SAN struct {
	Type  SANType
	Value string
}

// Bounds of a name, in octets.
const (
	maxEmail = 254 // RFC 5321, 4.5.3.1.3: a path is 256 with its brackets
	maxName  = 2048
)

// GeneralName tags (RFC 5280, 4.2.1.6).
const (
	tagOtherName = casn1.Tag(0 | 0x80 | 0x20)
	tagEmail     = casn1.Tag(1 | 0x80)
	tagURI       = casn1.Tag(6 | 0x80)
)

// encode gives the subjectAltName extension's value. Errors: ErrName.
func (s SAN) encode() ([]byte, error) {
	var b cryptobyte.Builder
	switch s.Type {
	case Email:
		if err := checkEmail(s.Value); err != nil {
			return nil, err
		}
		b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { addTagged(b, tagEmail, s.Value) })
	case URI:
		uri, err := canonicalURI(s.Value)
		if err != nil {
			return nil, err
		}
		b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { addTagged(b, tagURI, uri) })
	case OtherName:
		if err := checkOtherName(s.Value); err != nil {
			return nil, err
		}
		b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { addOtherName(b, s.Value) })
	default:
		return nil, fmt.Errorf("%w: unknown type %.40q", ErrName, s.Type)
	}
	value, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("encode name: %w", err)
	}
	return value, nil
}

func addTagged(b *cryptobyte.Builder, tag casn1.Tag, text string) {
	b.AddASN1(tag, func(b *cryptobyte.Builder) { b.AddBytes([]byte(text)) })
}

func addOtherName(b *cryptobyte.Builder, text string) {
	b.AddASN1(tagOtherName, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(oidOtherName)
		b.AddASN1(casn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
			addTagged(b, casn1.UTF8String, text)
		})
	})
}

// checkEmail wants printable ASCII that net/mail reads back as itself.
func checkEmail(s string) error {
	if len(s) > maxEmail {
		return fmt.Errorf("%w: e-mail address of %d octets, at most %d", ErrName, len(s), maxEmail)
	}
	for i := range len(s) {
		if s[i] <= ' ' || s[i] >= 0x7f {
			return fmt.Errorf("%w: e-mail address with an octet %#02x", ErrName, s[i])
		}
	}
	if strings.ContainsAny(s, `"<>()[]:;,\`) {
		return fmt.Errorf("%w: e-mail address with quoting or comment", ErrName)
	}
	a, err := mail.ParseAddress(s)
	if err != nil || a.Address != s || a.Name != "" {
		return fmt.Errorf("%w: not an e-mail address", ErrName)
	}
	return nil
}

// canonicalURI parses and renders a URI.
func canonicalURI(s string) (string, error) {
	if err := checkLength(s); err != nil {
		return "", err
	}
	if err := plainText(s); err != nil {
		return "", err
	}
	u, err := url.Parse(s)
	if err != nil {
		return "", fmt.Errorf("%w: not a URI", ErrName) // url.Error quotes all of it
	}
	out := u.String()
	return out, checkURI(out)
}

// checkURI wants ASCII, a scheme, an authority without user information.
func checkURI(s string) error {
	if err := checkLength(s); err != nil {
		return err
	}
	for i := range len(s) {
		if s[i] <= ' ' || s[i] >= 0x7f {
			return fmt.Errorf("%w: URI with an octet %#02x", ErrName, s[i])
		}
	}
	u, err := url.Parse(s)
	if err != nil {
		return fmt.Errorf("%w: not a URI", ErrName)
	}
	if u.Scheme == "" || u.Hostname() == "" || u.Opaque != "" || u.User != nil {
		return fmt.Errorf("%w: not an absolute URI with a host and without user information", ErrName)
	}
	if !validHost(u.Hostname()) {
		return fmt.Errorf("%w: URI whose host is no name in A-labels and no address", ErrName)
	}
	return nil
}

// validHost takes an address without zone, or a DNS name: labels of 1 to 63
// letters, digits, hyphens and underscores, 253 octets in all, no dot at the
// end (crypto/x509 refuses to parse one).
func validHost(host string) bool {
	if strings.Contains(host, ":") {
		addr, err := netip.ParseAddr(host)
		return err == nil && addr.Zone() == ""
	}
	if len(host) > 253 {
		return false
	}
	for label := range strings.SplitSeq(host, ".") {
		if len(label) == 0 || len(label) > 63 || strings.ContainsFunc(label, notHostRune) {
			return false
		}
	}
	return true
}

func notHostRune(r rune) bool {
	switch {
	case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-', r == '_':
		return false
	}
	return true
}

func checkOtherName(s string) error {
	if err := checkLength(s); err != nil {
		return err
	}
	return plainText(s)
}

func checkLength(s string) error {
	if len(s) > maxName {
		return fmt.Errorf("%w: name of %d octets, at most %d", ErrName, len(s), maxName)
	}
	return nil
}

// parseSAN reads a subjectAltName value back: one name of a known kind, valid.
func parseSAN(value []byte) error {
	var names, name cryptobyte.String
	var tag casn1.Tag
	in := cryptobyte.String(value)
	if !in.ReadASN1(&names, casn1.SEQUENCE) || !in.Empty() || !names.ReadAnyASN1(&name, &tag) || !names.Empty() {
		return fmt.Errorf("%w: not exactly one name", ErrName)
	}
	switch tag {
	case tagEmail:
		return checkEmail(string(name))
	case tagURI:
		return checkURI(string(name))
	case tagOtherName:
		return parseOtherName(name)
	}
	return fmt.Errorf("%w: name with tag %#02x", ErrName, uint8(tag))
}

// parseOtherName reads { type-id, [0] UTF8String }.
func parseOtherName(in cryptobyte.String) error {
	var value, text cryptobyte.String
	var id asn1.ObjectIdentifier
	if !in.ReadASN1ObjectIdentifier(&id) || !id.Equal(oidOtherName) ||
		!in.ReadASN1(&value, casn1.Tag(0).ContextSpecific().Constructed()) || !in.Empty() ||
		!value.ReadASN1(&text, casn1.UTF8String) || !value.Empty() {
		return fmt.Errorf("%w: not an otherName of type 57264.1.7", ErrName)
	}
	return checkOtherName(string(text))
}
