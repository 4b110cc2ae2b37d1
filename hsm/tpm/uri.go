package tpm

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/chancery-ca/chancery/hsm"
)

// maxURI bounds the length of a URI in octets before anything parses it.
const maxURI = 4096

// ErrURI: the URI is not one that we accept.
var ErrURI = errors.New("unacceptable TPM URI")

// uri is a parsed URI of a token or key:
//
//	tpm2:DIR?device=PATH                    a token
//	tpm2:DIR/LABEL.pem?device=PATH          a key in a file
//	tpm2:DIR/LABEL.pem?device=PATH&id=HEX   the same, if its id is this
//	tpm2:DIR?device=PATH&id=HEX             the key with this id
//	tpm2:0x81010001?device=PATH             a key at a persistent handle
//
// DIR and PATH are absolute and clean; octets outside the unreserved set and
// "/" are percent-encoded.
type uri struct {
	dir, device string
	label       string // "" if none
	id          []byte // nil if none
	handle      uint32 // 0 if none
}

// extension is what a key file's name ends with.
const extension = ".pem"

// parseURI reads any of the forms.
func parseURI(text string) (uri, error) {
	if len(text) > maxURI {
		return uri{}, fmt.Errorf("%d octets: %w", len(text), ErrURI)
	}
	rest, ok := strings.CutPrefix(text, "tpm2:")
	if !ok {
		return uri{}, fmt.Errorf("scheme is not tpm2: %w", ErrURI)
	}
	path, query, _ := strings.Cut(rest, "?")
	var u uri
	if err := u.parseQuery(query); err != nil {
		return uri{}, err
	}
	if strings.HasPrefix(path, "0x") {
		return u, u.parseHandle(path)
	}
	path, err := unescape(path)
	if err != nil {
		return uri{}, err
	}
	if err := clean(path); err != nil {
		return uri{}, fmt.Errorf("folder: %w", err)
	}
	if dir, file := filepath.Split(path); strings.HasSuffix(file, extension) {
		if u.label, ok = labelOf(file); !ok {
			return uri{}, fmt.Errorf("file name %.80q is no label's: %w", file, ErrURI)
		}
		path = filepath.Clean(dir)
	}
	u.dir = path
	return u, nil
}

// parseQuery reads device and id. Nothing else may be there, and no value is
// quoted in an error: it may be a secret in a wrong place.
func (u *uri) parseQuery(query string) error {
	for pair := range strings.SplitSeq(query, "&") {
		name, value, _ := strings.Cut(pair, "=")
		value, err := unescape(value)
		switch {
		case err != nil:
			return err
		case name == "device" && u.device == "":
			u.device = value
		case name == "id" && u.id == nil:
			u.id, err = hex.DecodeString(value)
			if err != nil || len(u.id) != hsm.IDSize {
				return fmt.Errorf("id: want %d hexadecimal digits: %w", 2*hsm.IDSize, ErrURI)
			}
		default:
			return fmt.Errorf("query has more than one device and one id: %w", ErrURI)
		}
	}
	if err := clean(u.device); err != nil {
		return fmt.Errorf("device: %w", err)
	}
	return nil
}

func (u *uri) parseHandle(text string) error {
	handle, err := strconv.ParseUint(text, 0, 32)
	if err != nil || !isPersistent(handle) || u.id != nil {
		return fmt.Errorf("handle %.20q: want 0x81000000 to 0x817fffff, and no id: %w", text, ErrURI)
	}
	u.handle = uint32(handle)
	return nil
}

// clean refuses a path that is not absolute and in its shortest form.
func clean(path string) error {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || strings.ContainsRune(path, 0) {
		return fmt.Errorf("path is not absolute and clean: %w", ErrURI)
	}
	return nil
}

// unescape undoes percent-encoding.
func unescape(text string) (string, error) {
	plain, err := url.PathUnescape(text)
	if err != nil {
		return "", fmt.Errorf("percent-encoding: %w", ErrURI)
	}
	return plain, nil
}

// escape percent-encodes what is neither unreserved (RFC 3986, Section 2.3) nor
// in also.
func escape(text, also string) string {
	var b strings.Builder
	for _, c := range []byte(text) {
		if 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("-._~"+also, c) >= 0 {
			b.WriteByte(c)
			continue
		}
		fmt.Fprintf(&b, "%%%02X", c)
	}
	return b.String()
}

// String writes the URI.
func (u uri) String() string {
	path := escape(u.dir, "/")
	switch {
	case u.handle != 0:
		path = fmt.Sprintf("%#x", u.handle)
	case u.label != "":
		path = escape(filepath.Join(u.dir, fileOf(u.label)), "/")
	}
	text := "tpm2:" + path + "?device=" + escape(u.device, "/")
	if u.id != nil {
		text += fmt.Sprintf("&id=%x", u.id)
	}
	return text
}

// isKey says whether u names a key.
func (u uri) isKey() bool { return u.label != "" || u.id != nil || u.handle != 0 }

// fileOf returns the name of a label's key file. Labels are printable ASCII;
// what could mean something in a path, and the first dot, is percent-encoded.
func fileOf(label string) string {
	name := escape(label, "+=,@:")
	if strings.HasPrefix(name, ".") {
		name = "%2E" + name[1:]
	}
	return name + extension
}

// labelOf is the reverse of fileOf. It refuses the name of a file that fileOf
// would not give.
func labelOf(file string) (string, bool) {
	name, ok := strings.CutSuffix(file, extension)
	label, err := url.PathUnescape(name)
	spec := hsm.Spec{Label: label, ID: make([]byte, hsm.IDSize), Algorithm: hsm.ECDSAP256}
	if !ok || err != nil || hsm.CheckSpec(spec) != nil || fileOf(label) != file {
		return "", false
	}
	return label, true
}

// TokenURI returns the URI of the token whose key files are in dir and whose TPM
// is at device. Both are absolute, clean paths.
func TokenURI(dir, device string) string { return uri{dir: dir, device: device}.String() }

// KeyURI returns the URI, for hsm.Ref, of a key of such a token. label may be ""
// if id is not nil, and the other way round.
func KeyURI(dir, device, label string, id []byte) string {
	return uri{dir: dir, device: device, label: label, id: id}.String()
}

// HandleURI returns the URI, for hsm.Ref, of the key at a persistent handle.
func HandleURI(device string, handle uint32) string {
	return uri{device: device, handle: handle}.String()
}

// ParseTokenURI returns the folder and the device of a URI that names a token.
// A URI that names a key gives those of its token; the folder is "" if it is at
// a handle. The error wraps ErrURI.
func ParseTokenURI(text string) (dir, device string, err error) {
	u, err := parseURI(text)
	if err != nil {
		return "", "", fmt.Errorf("parse %.80q: %w", text, err)
	}
	return u.dir, u.device, nil
}
