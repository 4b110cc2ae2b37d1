package identity

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// maxDepth bounds the nesting of a token's JSON.
const maxDepth = 16

// claims is one decoded JSON object. Names are matched octet for octet (the
// standard decoder would take "ISS" for iss); numbers are json.Number.
type claims map[string]any

var (
	errJSON      = errors.New("not one JSON object in UTF-8")
	errDuplicate = errors.New("name appears twice in an object")
	errDepth     = errors.New("nested too deeply")
	errNumber    = errors.New("number is too large") // RFC 8259, Section 6
)

// parseClaims decodes one JSON object. It refuses invalid UTF-8, a name that
// appears twice at any level (two parsers would choose differently), numbers
// beyond those of float64, nesting beyond maxDepth, and anything after the
// object.
func parseClaims(b []byte) (claims, error) {
	if !utf8.Valid(b) {
		return nil, errJSON
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	value, err := decodeValue(dec, maxDepth)
	if err != nil {
		return nil, err
	}
	object, ok := value.(map[string]any)
	if !ok {
		return nil, errJSON
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errJSON
	}
	return object, nil
}

func decodeValue(dec *json.Decoder, depth int) (any, error) {
	t, err := dec.Token()
	if err != nil {
		return nil, errJSON
	}
	if n, ok := t.(json.Number); ok {
		if _, err := n.Float64(); err != nil {
			return nil, errNumber
		}
	}
	delim, ok := t.(json.Delim)
	if !ok {
		return t, nil
	}
	if depth == 0 {
		return nil, errDepth
	}
	if delim == '{' {
		return decodeObject(dec, depth-1)
	}
	return decodeArray(dec, depth-1)
}

func decodeObject(dec *json.Decoder, depth int) (any, error) {
	object := map[string]any{}
	for dec.More() {
		t, err := dec.Token()
		name, ok := t.(string)
		if err != nil || !ok {
			return nil, errJSON
		}
		if _, twice := object[name]; twice {
			return nil, errDuplicate
		}
		if object[name], err = decodeValue(dec, depth); err != nil {
			return nil, err
		}
	}
	return object, closing(dec)
}

func decodeArray(dec *json.Decoder, depth int) (any, error) {
	array := []any{}
	for dec.More() {
		value, err := decodeValue(dec, depth)
		if err != nil {
			return nil, err
		}
		array = append(array, value)
	}
	return array, closing(dec)
}

// closing reads the delimiter that ends an object or array.
func closing(dec *json.Decoder) error {
	if _, err := dec.Token(); err != nil {
		return errJSON
	}
	return nil
}

// text returns a claim that is a string, or "".
func (c claims) text(name string) string {
	s, _ := c[name].(string)
	return s
}

// nested returns a claim that is a string, by its name or by the names of
// objects and a claim joined by >, or "".
func (c claims) nested(path string) string {
	name, rest, deeper := strings.Cut(path, ">")
	if !deeper {
		return c.text(name)
	}
	object, _ := c[name].(map[string]any)
	return claims(object).nested(rest)
}

// values returns a claim, by its name or by a path as in nested, as texts.
func (c claims) values(path string) []string {
	name, rest, deeper := strings.Cut(path, ">")
	if deeper {
		object, _ := c[name].(map[string]any)
		return claims(object).values(rest)
	}
	list, ok := c[name].([]any)
	if !ok {
		list = []any{c[name]}
	}
	var out []string
	for _, v := range list {
		switch v := v.(type) {
		case string:
			out = append(out, v)
		case json.Number:
			out = append(out, v.String())
		case bool:
			out = append(out, strconv.FormatBool(v))
		}
	}
	return out
}

// time reads a NumericDate (RFC 7519, Section 2), whole seconds kept.
func (c claims) time(name string) (time.Time, bool) {
	n, ok := c[name].(json.Number)
	if !ok {
		return time.Time{}, false
	}
	if i, err := n.Int64(); err == nil {
		return time.Unix(i, 0), i >= 0 && i <= maxSeconds
	}
	f, err := n.Float64()
	if err != nil || f < 0 || f > maxSeconds {
		return time.Time{}, false
	}
	return time.Unix(int64(math.Floor(f)), 0), true
}

// maxSeconds is the end of the year 9999, the last that a certificate can name.
const maxSeconds = 253402300799

// hasAudience says whether aud, a string or an array of strings, contains want.
func (c claims) hasAudience(want string) bool {
	switch aud := c["aud"].(type) {
	case string:
		return aud == want
	case []any:
		found := false
		for _, a := range aud {
			s, ok := a.(string)
			if !ok {
				return false
			}
			found = found || s == want
		}
		return found
	}
	return false
}

// verified reads a claim such as email_verified, which some providers send as
// a string; ok is false for a value that is neither.
func (c claims) verified(name string) (value, ok bool) {
	switch v := c[name].(type) {
	case nil:
		_, present := c[name]
		return false, !present
	case bool:
		return v, true
	case string:
		switch v {
		case "true", "True":
			return true, true
		case "false", "False":
			return false, true
		}
	}
	return false, false
}

// at follows a path of the form $.name.name to a string (the part of JSONPath
// that issuer-claim supports).
func (c claims) at(path string) string {
	var value any = map[string]any(c)
	for _, name := range strings.Split(path, ".")[1:] {
		object, ok := value.(map[string]any)
		if !ok {
			return ""
		}
		value = object[name]
	}
	s, _ := value.(string)
	return s
}
