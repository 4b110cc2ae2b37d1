package policy

import (
	"errors"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/chancery-ca/chancery/ca/profile"
)

func TestPattern(t *testing.T) {
	for _, test := range []struct {
		pattern, value string
		separator      byte
		want           bool
	}{
		{"https://github.com/acme/*", "https://github.com/acme/tool", '/', true},
		{"https://github.com/acme/*", "https://github.com/acme/", '/', true},
		{"https://github.com/acme/*", "https://github.com/acme/tool/x", '/', false},
		{"https://github.com/acme/*", "https://github.com/acme-evil/tool", '/', false},
		{"https://github.com/acme/*", "https://github.com/evil/acme/tool", '/', false},
		{"https://github.com/acme/**", "https://github.com/acme/tool/.github/workflows/x.yml@refs/heads/main", '/', true},
		{"https://github.com/acme/**@refs/heads/main", "https://github.com/acme/a/b@refs/heads/main", '/', true},
		{"https://github.com/acme/**@refs/heads/main", "https://github.com/acme/a/b@refs/heads/main2", '/', false},
		{"https://github.com/*/*/x", "https://github.com/a/b/x", '/', true},
		{"https://github.com/*/*/x", "https://github.com/a/b/c/x", '/', false},
		{"*@acme.example", "alice@acme.example", '@', true},
		{"*@acme.example", "a/b@acme.example", '@', true},
		{"*@acme.example", "alice@evil.example@acme.example", '@', false},
		{"*@acme.example", "alice@acme.example.evil", '@', false},
		{"*@acme.example", "alice@notacme.example", '@', false},
		{"*@acme.example", "alice@ACME.example", '@', false},
		{"**", "", '/', true},
		{"*", "a/b", '/', false},
		{"**", "a/b", '/', true},
		{"a*a", "a", '/', false},
		{"a*a", "aa", '/', true},
		{"a*b*c", "a1b2c", '/', true},
		{"a*b*c", "abcbcbc", '/', true},
		{"refs/heads/release-*", "refs/heads/release-1.0", '/', true},
		{"refs/heads/release-*", "refs/heads/release-1/evil", '/', false},
		{"main", "main", '/', true},
		{"main", "mainx", '/', false},
		{"ä*", "äb", '/', true},
	} {
		p, err := parsePattern(test.pattern)
		if err != nil {
			t.Errorf("%s: %v", test.pattern, err)
		} else if got := p.fits(test.value, test.separator); got != test.want {
			t.Errorf("%s fits %q: %v, want %v", test.pattern, test.value, got, test.want)
		}
	}
	for name, text := range map[string]string{
		"empty": "", "three stars": "a***b", "a line break": "a\n*", "not UTF-8": "a\xff", "long": strings.Repeat("a", maxPattern+1),
		"too many wildcards": strings.Repeat("a*", maxWildcards+1), "invisible": "a\u200b",
	} {
		if _, err := parsePattern(text); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// FuzzPattern compares with a regular expression that says the same.
func FuzzPattern(f *testing.F) {
	f.Add("a*b", "axb")
	f.Add("**/x@*", "a/b/x@c")
	f.Add("a*a**a", "aaaa/a")
	f.Fuzz(func(t *testing.T, text, value string) {
		p, err := parsePattern(text)
		if err != nil || len(value) > 200 {
			return
		}
		const separator = "/"
		quoted := regexp.QuoteMeta(text)
		quoted = strings.ReplaceAll(quoted, `\*\*`, `(?s:.*)`)
		quoted = strings.ReplaceAll(quoted, `\*`, `[^`+separator+`]*`)
		oracle := regexp.MustCompile(`^(?:` + quoted + `)$`)
		if strings.ContainsRune(value, '\uFFFD') || !strings.EqualFold(strings.ToValidUTF8(value, ""), value) {
			return // the expression reads runes
		}
		if got, want := p.fits(value, separator[0]), oracle.MatchString(value); got != want {
			t.Errorf("%q fits %q: %v, the expression says %v", text, value, got, want)
		}
	})
}

// tenant is a policy as an organisation would write it.
var tenant = []Rule{
	{Name: "no-forks", Effect: Deny, Issuer: "https://ci.example", Claims: map[string]string{"repository_visibility": "public"}},
	{Name: "releases", Effect: Allow, Issuer: "https://ci.example", Identity: "https://ci.example/acme/**",
		Claims: map[string]string{"ref": "refs/heads/release-*", "flags>protected": "true"}, Lifetime: 5 * time.Minute},
	{Name: "people", Effect: Allow, Issuer: "https://id.example", Identity: "*@acme.example", Claims: map[string]string{"groups": "signers"}, Keys: []string{"ecdsa-p256"}},
}

func TestDecide(t *testing.T) {
	p, err := New(tenant)
	if err != nil {
		t.Fatal(err)
	}
	build := map[string][]string{"ref": {"refs/heads/release-1"}, "flags>protected": {"true"}, "repository_visibility": {"private"}}
	with := func(name string, values ...string) map[string][]string {
		out := map[string][]string{name: values}
		for n, v := range build {
			if n != name {
				out[n] = v
			}
		}
		return out
	}
	ci := profile.SAN{Type: profile.URI, Value: "https://ci.example/acme/tool/x.yml@refs/heads/release-1"}
	alice := profile.SAN{Type: profile.Email, Value: "alice@acme.example"}
	for _, test := range []struct {
		name    string
		issuer  string
		san     profile.SAN
		claims  map[string][]string
		key     string
		allowed bool
		rule    string
		trace   []Step
	}{
		{"release", "https://ci.example", ci, build, "ecdsa-p384", true, "releases", []Step{{"no-forks", false, "claim repository_visibility"}, {"releases", true, ""}}},
		{"public fork", "https://ci.example", ci, with("repository_visibility", "public"), "", false, "no-forks", []Step{{"no-forks", true, ""}}},
		{"other branch", "https://ci.example", ci, with("ref", "refs/heads/main"), "", false, "", []Step{{"no-forks", false, "claim repository_visibility"}, {"releases", false, "claim ref"}, {"people", false, "issuer"}}},
		{"branch not protected", "https://ci.example", ci, with("flags>protected", "false"), "", false, "", nil},
		{"claim missing", "https://ci.example", ci, with("flags>protected"), "", false, "", nil},
		{"other owner", "https://ci.example", profile.SAN{Type: profile.URI, Value: "https://ci.example/evil/acme/x"}, build, "", false, "", nil},
		{"same claims, other issuer", "https://evil.example", ci, build, "", false, "", nil},
		{"issuer with a slash", "https://ci.example/", ci, build, "", false, "", nil},
		{"person", "https://id.example", alice, map[string][]string{"groups": {"staff", "signers"}}, "ecdsa-p256", true, "people", nil},
		{"person of another group", "https://id.example", alice, map[string][]string{"groups": {"staff", "signers2"}}, "ecdsa-p256", false, "", nil},
		{"person with another key", "https://id.example", alice, map[string][]string{"groups": {"signers"}}, "rsa-2048", false, "people", nil},
		{"nobody", "", profile.SAN{}, nil, "", false, "", nil},
	} {
		d := p.Decide(Subject{Issuer: test.issuer, SAN: test.san, Key: test.key, Claim: func(n string) []string { return test.claims[n] }})
		if d.Allowed != test.allowed || d.Rule != test.rule || d.Reason == "" {
			t.Errorf("%s: %+v", test.name, d)
		}
		if test.trace != nil {
			if diff := cmp.Diff(test.trace, d.Trace); diff != "" {
				t.Errorf("%s: %s", test.name, diff)
			}
		}
		if d.Allowed && d.Rule == "releases" && d.Lifetime != 5*time.Minute {
			t.Errorf("%s: lifetime %v", test.name, d.Lifetime)
		}
	}
	if d := p.Decide(Subject{Issuer: "https://ci.example", SAN: ci}); d.Allowed {
		t.Error("a subject without claims is allowed")
	}
	var none *Policy
	if d := none.Decide(Subject{}); !d.Allowed {
		t.Error("without a policy everybody is allowed")
	}
}

func TestNewRefuses(t *testing.T) {
	for name, rules := range map[string][]Rule{
		"nothing":            nil,
		"no name":            {{Effect: Allow}},
		"name with a space":  {{Name: "a b", Effect: Allow}},
		"name twice":         {{Name: "a", Effect: Allow}, {Name: "a", Effect: Deny}},
		"no effect":          {{Name: "a"}},
		"other effect":       {{Name: "a", Effect: "permit"}},
		"lifetime of a deny": {{Name: "a", Effect: Deny, Lifetime: time.Minute}},
		"keys of a deny":     {{Name: "a", Effect: Deny, Keys: []string{"ed25519"}}},
		"long lifetime":      {{Name: "a", Effect: Allow, Lifetime: profile.MaxLifetime + time.Second}},
		"negative lifetime":  {{Name: "a", Effect: Allow, Lifetime: -time.Second}},
		"odd lifetime":       {{Name: "a", Effect: Allow, Lifetime: 1500 * time.Millisecond}},
		"unknown key":        {{Name: "a", Effect: Allow, Keys: []string{"dsa"}}},
		"bad identity":       {{Name: "a", Effect: Allow, Identity: "***"}},
		"bad claim":          {{Name: "a", Effect: Allow, Claims: map[string]string{"x": ""}}},
	} {
		if _, err := New(rules); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: err %v", name, err)
		}
	}
}
