package identity

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"text/template"
	"text/template/parse"

	"github.com/chancery-ca/chancery/ca/profile"
)

// kind makes the row of a ci-provider issuer of its templates. Each is a Go
// template over the claims, or the name of one claim; Issuer and Subject of the
// extensions are always the token's. Errors: ErrConfig.
func (m CIMetadata) kind() (kind, error) {
	k := kind{challenge: "sub", sanType: profile.URI, templates: &m}
	if strings.TrimSpace(m.SubjectAlternativeNameTemplate) == "" {
		return k, fmt.Errorf("%w: subject-alternative-name-template is missing", ErrConfig)
	}
	san, err := compile(m.SubjectAlternativeNameTemplate)
	if err != nil {
		return k, fmt.Errorf("%w: subject-alternative-name-template: %w", ErrConfig, err)
	}
	k.san = absolute(san, m.below)
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		text := *fields[name](&m.ExtensionTemplates)
		if strings.TrimSpace(text) == "" {
			continue
		}
		v, err := compile(text)
		if err != nil {
			return k, fmt.Errorf("%w: extension template %s: %w", ErrConfig, name, err)
		}
		k.extensions = append(k.extensions, extension{name, v})
	}
	return k, nil
}

// compile reads one template of ci-issuer-metadata (Fulcio 1.8,
// pkg/identity/ciprovider). It may decide by if and with, and not repeat: every
// token ends.
func compile(text string) (value, error) {
	if !strings.Contains(text, "{{") {
		return named(text), nil
	}
	t, err := template.New("").Option("missingkey=error").Funcs(template.FuncMap{"need": need, "refuse": refuseTemplate}).Parse(text)
	if err != nil {
		return nil, err
	}
	if len(t.Templates()) != 1 || !straight(t.Root) {
		return nil, errors.New("a template has no range, define, block or template here")
	}
	return func(a assertion) (string, error) {
		var out limitedText
		if err := t.Execute(&out, a.texts); err != nil {
			// The error quotes the template, which is the configuration's, and
			// no claim but the name of one that is missing.
			return "", fmt.Errorf("%w: template: a claim that it needs is missing or unknown", ErrMapping)
		}
		return certifiable(out.String())
	}, nil
}

// straight says whether a part of a template runs each of its actions once at
// most.
func straight(list *parse.ListNode) bool {
	if list == nil {
		return true // no else
	}
	for _, node := range list.Nodes {
		switch node := node.(type) {
		case *parse.TextNode, *parse.ActionNode, *parse.CommentNode:
		case *parse.IfNode:
			if !straight(node.List) || !straight(node.ElseList) {
				return false
			}
		case *parse.WithNode:
			if !straight(node.List) || !straight(node.ElseList) {
				return false
			}
		default:
			return false
		}
	}
	return true
}

// named is the claim, or default, of that name.
func named(name string) value {
	return func(a assertion) (string, error) {
		text, ok := a.texts[name]
		if !ok {
			return "", fmt.Errorf("%w: claim %s is missing", ErrMapping, name)
		}
		return certifiable(text)
	}
}

// certifiable refuses what may not stand in a certificate: text that is not
// plain, and a web address that leads to another place than it says.
func certifiable(text string) (string, error) {
	if !plain(text) {
		return "", fmt.Errorf("%w: value of a template is too long or not plain text", ErrMapping)
	}
	if !strings.HasPrefix(text, "https://") && !strings.HasPrefix(text, "http://") {
		return text, nil
	}
	u, err := url.Parse(text)
	if err != nil {
		return "", fmt.Errorf("%w: value of a template does not make a URL", ErrMapping)
	}
	return text, checkPath(u.EscapedPath())
}

// absolute wants a URL with a host, and below another if that is not empty.
func absolute(v value, below string) value {
	return func(a assertion) (string, error) {
		s, err := v(a)
		if err != nil {
			return "", err
		}
		u, err := parseURL(s)
		if err != nil {
			return "", err
		}
		if below != "" && !strings.HasPrefix(u.String(), below+"/") {
			return "", fmt.Errorf("%w: name is not of the provider's site", ErrMapping)
		}
		return u.String(), nil
	}
}

// limitedText collects what a template writes, as far as it can be certified.
type limitedText struct{ strings.Builder }

var errLongText = errors.New("longer than a certificate may have it")

// Write implements io.Writer; beyond maxText octets it fails.
func (l *limitedText) Write(p []byte) (int, error) {
	if l.Len()+len(p) > maxText {
		return 0, errLongText
	}
	return l.Builder.Write(p)
}

// need is the template function for a claim whose name is no identifier: {{need
// . "name"}}. Unlike index it fails when there is none.
func need(texts map[string]string, name string) (string, error) {
	if texts[name] == "" {
		return "", errors.New("claim is missing")
	}
	return texts[name], nil
}

// refuseTemplate is the template function that refuses the token.
func refuseTemplate() (string, error) { return "", errors.New("refused by the template") }

// texts are the claims as texts, over the defaults. Numbers are written as
// Fulcio writes them: from a float64, integral ones by %v, which gives
// 1234567 as 1.234567e+06, others without exponent; in a preset, whose texts
// are ours, an integer stays as it is. An integer that float64 cannot hold would
// be written as its neighbour, another identity: it counts as missing, without
// default. A claim that is null counts as missing.
func (c claims) texts(m CIMetadata) map[string]string {
	out := make(map[string]string, len(c)+len(m.DefaultTemplateValues)+len(m.fixed))
	maps.Copy(out, m.DefaultTemplateValues)
	for name, v := range c {
		switch v := v.(type) {
		case nil:
		case string:
			out[name] = v
		case json.Number:
			text, exact := number(v)
			switch {
			case !exact:
				delete(out, name)
			case m.fixed != nil && isInteger(v):
				out[name] = v.String()
			default:
				out[name] = text
			}
		default:
			out[name] = fmt.Sprintf("%v", floats(v))
		}
	}
	maps.Copy(out, m.fixed)
	return out
}

// number writes one number; exact is false for an integer that float64 does not
// hold.
func number(n json.Number) (text string, exact bool) {
	f, err := n.Float64()
	if err != nil {
		return "", false
	}
	if isInteger(n) && strconv.FormatFloat(f, 'f', 0, 64) != n.String() {
		return "", false
	}
	if f == math.Trunc(f) {
		return fmt.Sprintf("%v", f), true
	}
	return strconv.FormatFloat(f, 'f', -1, 64), true
}

// isInteger says whether a number is written without fraction and exponent.
func isInteger(n json.Number) bool { return !strings.ContainsAny(n.String(), ".eE") }

// floats turns the numbers in a value into float64, as the standard decoder
// gives them.
func floats(v any) any {
	switch v := v.(type) {
	case json.Number:
		f, err := v.Float64()
		if err != nil {
			return v.String()
		}
		return f
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = floats(v[i])
		}
		return out
	case map[string]any:
		out := make(map[string]any, len(v))
		for name := range v {
			out[name] = floats(v[name])
		}
		return out
	}
	return v
}
