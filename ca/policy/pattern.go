package policy

import (
	"errors"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/chancery-ca/chancery/ca/profile"
)

// pattern is a text in which * stands for any run of characters without the
// separator of its place, the empty run too, and ** for any run at all. It fits
// a whole value. Characters are compared as they are, large and small apart.
//
// The separator is / in URIs and claims, and @ in e-mail addresses and user
// names: https://github.com/acme/* fits no repository below another owner,
// *@acme.example no address of another domain.
type pattern []piece

// piece is a literal, or a wildcard.
type piece struct {
	literal string
	wild    bool // * or **
	far     bool // **
}

const (
	// maxPattern bounds a pattern, in octets.
	maxPattern = 1024
	// maxWildcards bounds the work of fits: each wildcard looks at every place
	// of the value at most once for each of those before it.
	maxWildcards = 8
)

// separator is what * does not pass in a name of this kind.
func separator(t profile.SANType) byte {
	if t == profile.URI {
		return '/'
	}
	return '@'
}

func parsePattern(text string) (pattern, error) {
	switch {
	case text == "":
		return nil, errors.New("the pattern is empty")
	case len(text) > maxPattern:
		return nil, errors.New("the pattern is too long")
	case !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsGraphic(r) }):
		return nil, errors.New("the pattern has a character that no name can have")
	case strings.Contains(text, "***"):
		return nil, errors.New("*** is neither * nor **")
	case strings.Count(strings.ReplaceAll(text, "**", "*"), "*") > maxWildcards:
		return nil, errors.New("the pattern has too many wildcards")
	}
	var p pattern
	for text != "" {
		at := strings.IndexByte(text, '*')
		switch {
		case at < 0:
			return append(p, piece{literal: text}), nil
		case at > 0:
			p = append(p, piece{literal: text[:at]})
			text = text[at:]
		default:
			far := strings.HasPrefix(text, "**")
			p = append(p, piece{wild: true, far: far})
			text = strings.TrimPrefix(text[1:], "*")
		}
	}
	return p, nil
}

// fits says whether the whole value is of the pattern.
func (p pattern) fits(value string, separator byte) bool {
	// reach[i]: what the pieces so far stand for may end at octet i.
	reach := make([]bool, len(value)+1)
	reach[0] = true
	for _, piece := range p {
		next := make([]bool, len(value)+1)
		for i := range reach {
			if !reach[i] {
				continue
			}
			if !piece.wild {
				if strings.HasPrefix(value[i:], piece.literal) {
					next[i+len(piece.literal)] = true
				}
				continue
			}
			for j := i; ; j++ {
				if j > i && next[j] {
					break // from here on another place has gone before
				}
				next[j] = true
				if j == len(value) || !piece.far && value[j] == separator {
					break
				}
			}
		}
		reach = next
	}
	return reach[len(value)]
}
