package pkcs11

import (
	"errors"
	"fmt"
	"strings"

	"github.com/chancery-ca/chancery/hsm"
	pkcs11uri "github.com/stefanberger/go-pkcs11uri"
)

// maxURI bounds the length of a URI in octets before anything parses it.
const maxURI = 1024

// ErrURI: the URI is not a PKCS#11 URI (RFC 7512) that we accept.
var ErrURI = errors.New("unacceptable PKCS#11 URI")

// uri is a parsed PKCS#11 URI (RFC 7512): what a token or a key must match.
// An empty field is not compared.
type uri struct {
	token, serial, manufacturer, model string
	object                             string
	id                                 []byte
}

// pathNames are the path attributes that we understand. RFC 7512, Section 2.3
// asks to refuse others, because ignoring one would match more than was meant.
var pathNames = map[string]bool{
	"token": true, "serial": true, "manufacturer": true, "model": true,
	"object": true, "id": true, "type": true,
}

// parseURI reads a URI that names a token: token or serial is present, there
// is no PIN in it, and every attribute is one that we compare. Attributes of
// the query (module-path, pin-source …) are refused: where the module and the
// PIN come from is the configuration's business.
func parseURI(text string) (uri, error) {
	if len(text) > maxURI {
		return uri{}, fmt.Errorf("%d octets: %w", len(text), ErrURI)
	}
	if strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return uri{}, fmt.Errorf("a character that is not percent-encoded: %w", ErrURI) // RFC 3986, Section 2
	}
	path, query, _ := strings.Cut(text, "?")
	if query != "" {
		// Never quote the query: it may hold a PIN.
		return uri{}, fmt.Errorf("query attributes (a PIN, a module) do not belong here: %w", ErrURI)
	}
	parsed := pkcs11uri.New()
	if err := parsed.Parse(path); err != nil {
		return uri{}, fmt.Errorf("parse: %w", ErrURI)
	}
	for _, part := range strings.Split(strings.TrimPrefix(path, "pkcs11:"), ";") {
		name, _, _ := strings.Cut(part, "=")
		if name != "" && !pathNames[name] {
			return uri{}, fmt.Errorf("attribute %.40q: %w", name, ErrURI)
		}
	}
	get := func(name string) string {
		value, _ := parsed.GetPathAttribute(name, false)
		return value
	}
	if kind := get("type"); kind != "" && kind != "private" {
		return uri{}, fmt.Errorf("type %.20q, want private: %w", kind, ErrURI)
	}
	u := uri{
		token: get("token"), serial: get("serial"),
		manufacturer: get("manufacturer"), model: get("model"),
		object: get("object"), id: []byte(get("id")),
	}
	if u.token == "" && u.serial == "" {
		return uri{}, fmt.Errorf("neither token nor serial: %w", ErrURI)
	}
	if n := len(u.String()); n > maxURI {
		// What we would write ourselves must be read again.
		return uri{}, fmt.Errorf("%d octets when percent-encoded: %w", n, ErrURI)
	}
	return u, nil
}

// parseKeyURI is parseURI for a URI that names a key: object or id is present.
func parseKeyURI(text string) (uri, error) {
	u, err := parseURI(text)
	if err == nil && u.object == "" && len(u.id) == 0 {
		return uri{}, fmt.Errorf("neither object nor id: %w", ErrURI)
	}
	return u, err
}

// names says whether u can mean the token that info describes.
func (u uri) names(info hsm.TokenInfo) bool {
	same := func(want, got string) bool { return want == "" || want == got }
	return same(u.token, info.Label) && same(u.serial, info.Serial) &&
		same(u.manufacturer, info.Manufacturer) && same(u.model, info.Model)
}

// key returns u's token with another key.
func (u uri) key(object string, id []byte) uri {
	u.object, u.id = object, id
	return u
}

// String writes the URI in the order of RFC 7512, Section 2.3, every octet
// outside the unreserved set and every octet of id percent-encoded.
func (u uri) String() string {
	var parts []string
	add := func(name, value string) {
		if value != "" {
			parts = append(parts, name+"="+escape(value))
		}
	}
	add("token", u.token)
	add("manufacturer", u.manufacturer)
	add("serial", u.serial)
	add("model", u.model)
	add("object", u.object)
	if len(u.id) > 0 {
		var b strings.Builder
		for _, c := range u.id {
			fmt.Fprintf(&b, "%%%02x", c)
		}
		parts = append(parts, "id="+b.String())
	}
	return "pkcs11:" + strings.Join(parts, ";")
}

// escape percent-encodes every octet that is not unreserved (RFC 3986, 2.3).
func escape(value string) string {
	var b strings.Builder
	for _, c := range []byte(value) {
		if 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("-._~", c) >= 0 {
			b.WriteByte(c)
			continue
		}
		fmt.Fprintf(&b, "%%%02X", c)
	}
	return b.String()
}

// TokenURI returns the URI of the token with this label, for Config.URI.
func TokenURI(label string) string { return uri{token: label}.String() }

// KeyURI returns the URI of a key in the token with this label, for hsm.Ref.
// object may be empty if id is not, and the other way round.
func KeyURI(label, object string, id []byte) string {
	return uri{token: label, object: object, id: id}.String()
}
