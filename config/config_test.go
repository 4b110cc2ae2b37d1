package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestExampleIsComplete(t *testing.T) {
	c, err := Load("example/chancery.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if c.URL != "https://sig.acme.example" || c.CA.Lifetime != 10*time.Minute || c.Tokens["online"].Sessions != 16 ||
		len(c.CA.OIDCIssuers) != 3 || len(c.CA.Policy) != 3 || len(c.CA.PrivateNetworks) != 1 || c.Tokens["online"].PIN.String() != "credential:hsm-pin" {
		t.Errorf("the example was read as %+v", c)
	}
}

// What the example shows of a TPM is good too.
func TestExampleOfTPM(t *testing.T) {
	raw, err := os.ReadFile("example/chancery.yaml")
	if err != nil {
		t.Fatal(err)
	}
	text := string(raw)
	for _, field := range []string{"keys: /", "owner-auth:", "endorsement-auth:", "counter:"} {
		if !strings.Contains(text, "# "+field) {
			t.Errorf("the example does not show %q", field)
		}
		text = strings.ReplaceAll(text, "# "+field, field)
	}
	c, err := Parse([]byte(text), "/etc/chancery")
	if err != nil {
		t.Fatal(err)
	}
	token := c.Tokens["online"]
	if token.Keys == "" || token.OwnerAuth.IsZero() || token.EndorsementAuth.IsZero() || c.CT.Counter == nil || c.Rekor.Counter == nil {
		t.Errorf("the example was read as %+v", c)
	}
}

const minimal = `version: 1
url: https://sig.example:8443
listen: 127.0.0.1:8443
tls: {certificate: tls.pem, key: tls.key}
state: state
trust: /trust
tokens: {online: {pin: "file:pin"}}
ca: {oidc-issuers: {"https://idp.example": {issuer-url: "https://idp.example", client-id: sigstore, type: email}}}
ct: {shard: ct1}
rekor: {shard: log1}
`

func TestDefaults(t *testing.T) {
	c, err := Parse([]byte(minimal), "/etc/chancery")
	if err != nil {
		t.Fatal(err)
	}
	for name, pair := range map[string][2]string{
		"CT origin":    {c.CT.Origin, "sig.example:8443/ct/ct1"},
		"Rekor origin": {c.Rekor.Origin, "sig.example"},
		"policy":       {c.TSA.Policy, defaultPolicy},
		"writers":      {string(c.Rekor.Writers), "certified"},
		"state":        {c.State, "/etc/chancery/state"},
		"trust":        {c.Trust, "/trust"},
		"PIN":          {c.Tokens["online"].PIN.String(), "file:/etc/chancery/pin"},
	} {
		if pair[0] != pair[1] {
			t.Errorf("%s is %q, want %q", name, pair[0], pair[1])
		}
	}
	if token := c.Tokens["online"]; token.Sessions != 16 || token.Queue != 1024 || token.Deadline != 10*time.Second {
		t.Errorf("token defaults: %+v", token)
	}
}

func TestCTElsewhere(t *testing.T) {
	c, err := Parse([]byte(strings.Replace(minimal, "{shard: ct1}", "{url: 'https://ct.example/2026', key: ct.pub, tls-roots: /tls.pem}", 1)), "/etc/chancery")
	if err != nil {
		t.Fatal(err)
	}
	if !c.CT.Elsewhere() || c.CT.URL != "https://ct.example/2026" || c.CT.Key != "/etc/chancery/ct.pub" || c.CT.TLSRoots != "/tls.pem" || c.CT.Origin != "" {
		t.Errorf("a log elsewhere was read as %+v", c.CT)
	}
	c, err = Parse([]byte(strings.Replace(minimal, "{shard: ct1}", "{shard: ct1, roots: [a.pem, /b.pem]}", 1)), "/etc/chancery")
	if err != nil {
		t.Fatal(err)
	}
	if c.CT.Elsewhere() || len(c.CT.Roots) != 2 || c.CT.Roots[0] != "/etc/chancery/a.pem" || c.CT.Roots[1] != "/b.pem" {
		t.Errorf("roots were read as %+v", c.CT)
	}
}

// onlyCT is the minimal configuration of a CT log alone.
func onlyCT() string {
	var kept []string
	for _, line := range strings.Split(minimal, "\n") {
		switch {
		case strings.HasPrefix(line, "ca:"), strings.HasPrefix(line, "rekor:"):
		case strings.HasPrefix(line, "ct:"):
			kept = append(kept, "ct: {shard: ct1, roots: [root.pem]}")
		default:
			kept = append(kept, line)
		}
	}
	return strings.Join(kept, "\n") + "only: ct\n"
}

func TestOnlyCT(t *testing.T) {
	c, err := Parse([]byte(onlyCT()), "/etc/chancery")
	if err != nil {
		t.Fatal(err)
	}
	if c.Only != OnlyCT || c.CT.Origin != "sig.example:8443/ct/ct1" || c.CT.Roots[0] != "/etc/chancery/root.pem" {
		t.Errorf("a CT log alone was read as %+v", c)
	}
	for _, tc := range []struct{ name, old, new, want string }{
		{"no roots", ", roots: [root.pem]", "", "ct.roots"},
		{"log elsewhere", "{shard: ct1, roots: [root.pem]}", "{url: 'https://ct.example', key: ct.pub}", "elsewhere"},
		{"with a CA", "only: ct", "only: ct\nca: {lifetime: 5m}", "ca:"},
		{"with a signature log", "only: ct", "only: ct\nrekor: {shard: log1}", "rekor:"},
		{"with a timestamp authority", "only: ct", "only: ct\ntsa: {policy: 1.2.3}", "tsa:"},
		{"another part", "only: ct", "only: tsa", "only:"},
		{"a service without a CA that does not say so", "only: ct", "", "ca"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Parse([]byte(strings.Replace(onlyCT(), tc.old, tc.new, 1)), "/")
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want ErrInvalid that mentions %q", err, tc.want)
			}
		})
	}
}

func TestTPM(t *testing.T) {
	text := strings.Replace(minimal, `{pin: "file:pin"}`, `{pin: "file:auth", keys: tpm, owner-auth: "file:owner", endorsement-auth: "credential:e"}`, 1)
	text = strings.Replace(text, "{shard: ct1}", "{shard: ct1, counter: {token: online, index: 0x01800010}}", 1)
	text = strings.Replace(text, "{shard: log1}", "{shard: log1, counter: {token: online, index: 25165841}}", 1)
	c, err := Parse([]byte(text), "/etc/chancery")
	if err != nil {
		t.Fatal(err)
	}
	token := c.Tokens["online"]
	for name, pair := range map[string][2]string{
		"keys":             {token.Keys, "/etc/chancery/tpm"},
		"owner auth":       {token.OwnerAuth.String(), "file:/etc/chancery/owner"},
		"endorsement auth": {token.EndorsementAuth.String(), "credential:e"},
	} {
		if pair[0] != pair[1] {
			t.Errorf("%s is %q, want %q", name, pair[0], pair[1])
		}
	}
	if want := (Counter{"online", 0x01800010}); *c.CT.Counter != want {
		t.Errorf("CT counter is %+v, want %+v", *c.CT.Counter, want)
	}
	if want := (Counter{"online", 0x01800011}); *c.Rekor.Counter != want {
		t.Errorf("Rekor counter is %+v, want %+v", *c.Rekor.Counter, want)
	}
	plain, err := Parse([]byte(minimal), "/etc/chancery")
	if err != nil {
		t.Fatal(err)
	}
	if !plain.Tokens["online"].OwnerAuth.IsZero() || plain.CT.Counter != nil || plain.Rekor.Counter != nil {
		t.Errorf("a PKCS#11 token was read as %+v", plain.Tokens["online"])
	}
}

func TestIPv6Origin(t *testing.T) {
	c, err := Parse([]byte(strings.Replace(minimal, "sig.example:8443", "'[::1]:8443'", 1)), "/")
	if err == nil {
		t.Fatalf("a quoted host inside a URL was accepted: %q", c.Rekor.Origin)
	}
	c, err = Parse([]byte(strings.Replace(minimal, "https://sig.example:8443", `"https://[::1]:8443"`, 1)), "/")
	if err != nil {
		t.Fatal(err)
	}
	if c.Rekor.Origin != "::1" {
		t.Errorf("origin %q, want the bare host", c.Rekor.Origin)
	}
}

func TestRefused(t *testing.T) {
	edit := func(old, new string) string {
		if !strings.Contains(minimal, old) {
			t.Fatalf("%q is not in the minimal configuration", old)
		}
		return strings.Replace(minimal, old, new, 1)
	}
	tests := []struct{ name, yaml, want string }{
		{"empty", "", "nothing in it"},
		{"not YAML", "\x00\x01{{{", ""},
		{"huge", strings.Repeat("#", maxFile+1), "octets"},
		{"unknown key", minimal + "colour: blue\n", "colour"},
		{"unknown inner key", edit("{shard: ct1}", "{shard: ct1, size: 3}"), "size"},
		{"double key", minimal + "state: other\n", "state"},
		{"two documents", minimal + "---\nversion: 1\n", "more than one document"},
		{"version", edit("version: 1", "version: 2"), "version"},
		{"http URL", edit("https://sig.example:8443", "http://sig.example"), "https://HOST"},
		{"URL with a path", edit("https://sig.example:8443", "https://sig.example/x"), "https://HOST"},
		{"URL with a slash", edit("https://sig.example:8443", "https://sig.example/"), "https://HOST"},
		{"URL with an empty query", edit("https://sig.example:8443", "https://sig.example?"), "https://HOST"},
		{"URL with an empty fragment", edit("https://sig.example:8443", "'https://sig.example#'"), "https://HOST"},
		{"URL without a host", edit("https://sig.example:8443", "https://:8443"), "https://HOST"},
		{"URL with an empty port", edit("https://sig.example:8443", "'https://sig.example:'"), "https://HOST"},
		{"CT log elsewhere without a host", edit("{shard: ct1}", "{url: 'https://:443', key: ct.pub}"), "ct.url"},
		{"URL with a user", edit("https://sig.example:8443", "https://a@sig.example"), "https://HOST"},
		{"listen", edit("listen: 127.0.0.1:8443", "listen: 8443"), "listen"},
		{"operator without a port", minimal + "operator: 127.0.0.1\n", "operator"},
		{"operator by a name", minimal + "operator: localhost:9464\n", "operator"},
		{"operator for everybody", minimal + "operator: 0.0.0.0:9464\n", "not a loopback address"},
		{"no state", edit("state: state\n", ""), "state: missing"},
		{"no token", edit(`{online: {pin: "file:pin"}}`, "{}"), "tokens"},
		{"no PIN", edit(`{pin: "file:pin"}`, "{sessions: 4}"), "pin"},
		{"a PIN instead of a reference", edit(`"file:pin"`, `"s3cret"`), "reference"},
		{"a numeric PIN", edit(`"file:pin"`, `123456`), "reference"},
		{"a PIN beside another fault", edit(`{pin: "file:pin"}`, "{\n  colour: blue,\n  pin: s3cret}"), ""},
		{"credential with a path", edit(`"file:pin"`, `"credential:../x"`), "a name"},
		{"one session", edit(`{pin: "file:pin"}`, `{pin: "file:pin", sessions: 1}`), "sessions"},
		{"negative deadline", edit(`{pin: "file:pin"}`, `{pin: "file:pin", deadline: -1s}`), "deadline"},
		{"lifetime too long", edit("ca: {", "ca: {lifetime: 11m, "), "lifetime"},
		{"lifetime too short", edit("ca: {", "ca: {lifetime: 30s, "), "lifetime"},
		{"no issuer", edit(`{oidc-issuers: {"https://idp.example": {issuer-url: "https://idp.example", client-id: sigstore, type: email}}}`, "{}"), "issuer"},
		{"issuer under another name", edit(`issuer-url: "https://idp.example"`, `issuer-url: "https://idp.example/"`), "issuer"},
		{"policy without a name", edit("ca: {", "ca: {policy: [{issuer: 'https://idp.example'}], "), "ca.policy"},
		{"policy with two names", edit("ca: {", "ca: {policy: [{allow: a, deny: b}], "), "ca.policy"},
		{"policy of a doubtful pattern", edit("ca: {", "ca: {policy: [{allow: a, identity: '***'}], "), "ca.policy"},
		{"policy with a long lifetime", edit("ca: {", "ca: {lifetime: 5m, policy: [{allow: a, lifetime: 6m}], "), "ca.policy"},
		{"policy with an unknown key", edit("ca: {", "ca: {policy: [{allow: a, san: b}], "), "san"},
		{"Fulcio file and issuers", edit("ca: {", "ca: {fulcio-config: fulcio.yaml, "), "ca: fulcio-config"},
		{"Fulcio file that is missing", edit(`{oidc-issuers: {"https://idp.example": {issuer-url: "https://idp.example", client-id: sigstore, type: email}}}`, "{fulcio-config: /nowhere}"), "ca.fulcio-config"},
		{"Fulcio file that is none", edit(`{oidc-issuers: {"https://idp.example": {issuer-url: "https://idp.example", client-id: sigstore, type: email}}}`, "{fulcio-config: /dev/null}"), "no issuer"},
		{"private network", edit("ca: {", "ca: {private-networks: [ten], "), ""},
		{"shard with a slash", edit("ct1", "../ct1"), "ct.shard"},
		{"CT log here and elsewhere", edit("{shard: ct1}", "{shard: ct1, url: 'https://ct.example', key: ct.pub}"), "elsewhere"},
		{"CT log elsewhere with roots", edit("{shard: ct1}", "{url: 'https://ct.example', key: ct.pub, roots: [root.pem]}"), "elsewhere"},
		{"frozen CT log elsewhere", edit("{shard: ct1}", "{url: 'https://ct.example', key: ct.pub, frozen: true}"), "elsewhere"},
		{"CT log elsewhere without a key", edit("{shard: ct1}", "{url: 'https://ct.example'}"), "ct.key"},
		{"other CT log without a key", edit("{shard: ct1}", "{url: 'https://ct.example', key: ct.pub, others: [{url: 'https://b.example'}]}"), "ct.others[0].key"},
		{"other CT logs beside ours", edit("{shard: ct1}", "{shard: ct1, others: [{url: 'https://b.example', key: b.pub}]}"), "elsewhere"},
		{"other CT logs without a first", edit("{shard: ct1}", "{others: [{url: 'https://b.example', key: b.pub}]}"), "ct.url"},
		{"CT key without a URL", edit("{shard: ct1}", "{key: ct.pub}"), "ct.url"},
		{"CT log elsewhere on http", edit("{shard: ct1}", "{url: 'http://ct.example', key: ct.pub}"), "ct.url"},
		{"CT log elsewhere with a query", edit("{shard: ct1}", "{url: 'https://ct.example/?a=b', key: ct.pub}"), "ct.url"},
		{"no CT log", edit("{shard: ct1}", "{}"), "ct.shard"},
		{"a CT root without a name", edit("{shard: ct1}", "{shard: ct1, roots: ['']}"), "ct.roots"},
		{"no shard", edit("{shard: log1}", "{}"), "rekor.shard"},
		{"unknown writers", edit("{shard: log1}", "{shard: log1, writers: friends}"), "rekor.writers"},
		{"negative rate", edit("{shard: log1}", "{shard: log1, rate: -1}"), "rate"},
		{"rate that is no number", edit("{shard: log1}", "{shard: log1, rate: .nan}"), "rate"},
		{"origin with a space", edit("{shard: log1}", `{shard: log1, origin: "a b"}`), "rekor.origin"},
		{"counter of an unknown token", edit("{shard: log1}", "{shard: log1, counter: {token: tpm, index: 0x01800010}}"), "rekor.counter.token"},
		{"counter without an index", edit("{shard: log1}", "{shard: log1, counter: {token: online}}"), "rekor.counter.index"},
		{"counter at the vendor's index", edit("{shard: ct1}", "{shard: ct1, counter: {token: online, index: 0x01c00002}}"), "ct.counter.index"},
		{"counter with a number that is too long", edit("{shard: ct1}", "{shard: ct1, counter: {token: online, index: 0x101800010}}"), "overflow"},
		{"negative counter", edit("{shard: ct1}", "{shard: ct1, counter: {token: online, index: -1}}"), "overflow"},
		{"counter of a CT log elsewhere", edit("{shard: ct1}", "{url: 'https://ct.example', key: ct.pub, counter: {token: online, index: 0x01800010}}"), "elsewhere"},
		{"one counter for two logs", strings.Replace(edit("{shard: log1}", "{shard: log1, counter: {token: online, index: 0x01800010}}"),
			"{shard: ct1}", "{shard: ct1, counter: {token: online, index: 0x01800010}}", 1), "one counter"},
		{"owner auth instead of a reference", edit(`"file:pin"`, `"file:pin", owner-auth: s3cret`), "reference"},
		{"policy", minimal + "tsa: {policy: 1.2.x}\n", "tsa.policy"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := Parse([]byte(test.yaml), "/etc/chancery")
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("error %v, want ErrInvalid that mentions %q", err, test.want)
			}
			if strings.Contains(err.Error(), "s3cret") || strings.Contains(err.Error(), "123456") {
				t.Errorf("the error repeats a PIN: %v", err)
			}
		})
	}
}

func TestSecret(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil { // whatever the umask
			t.Fatal(err)
		}
		return path
	}
	for _, pipe := range []string{"pipe", "pipe2"} {
		if err := syscall.Mkfifo(filepath.Join(dir, pipe), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	good := write("good", "1234\n", 0o400)
	if err := os.Symlink(good, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		s    Secret
		want string // "" = an error
	}{
		{"file", FileSecret(good), "1234"},
		{"no final newline", FileSecret(write("bare", "12 34", 0o600)), "12 34"},
		{"readable by the group", FileSecret(write("group", "1234", 0o440)), ""},
		{"empty", FileSecret(write("empty", "\n", 0o400)), ""},
		{"huge", FileSecret(write("huge", strings.Repeat("1", maxSecret+1), 0o400)), ""},
		{"missing", FileSecret(filepath.Join(dir, "none")), ""},
		{"a folder", FileSecret(dir), ""},
		{"a link", FileSecret(filepath.Join(dir, "link")), ""},
		{"a pipe", FileSecret(filepath.Join(dir, "pipe")), ""},
		{"credential", Secret{"credential", "good"}, "1234"},
		{"credential that is a pipe", Secret{"credential", "pipe2"}, ""},
		{"missing credential", Secret{"credential", "none"}, ""},
	}
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := test.s.Read()
			if (err != nil) != (test.want == "") || string(got) != test.want {
				t.Errorf("Read gives %q, %v; want %q", got, err, test.want)
			}
		})
	}
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	if _, err := (Secret{"credential", "good"}).Read(); !errors.Is(err, ErrNoCredential) {
		t.Errorf("a credential without systemd: %v, want ErrNoCredential", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(minimal))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse(data, "/etc/chancery")
		if err == nil && (c.URL == "" || len(c.Tokens) == 0 || len(c.CA.OIDCIssuers) == 0) {
			t.Errorf("an incomplete configuration was accepted: %+v", c)
		}
	})
}

// TestFulcioConfig: a Fulcio configuration file is read unchanged, also JSON.
func TestFulcioConfig(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"fulcio.yaml": "oidc-issuers:\n  https://idp.example:\n    issuer-url: https://idp.example\n    client-id: sigstore\n    type: email\n    jwks-file: keys.json\n",
		"fulcio.json": `{"OIDCIssuers": {"https://idp.example": {"IssuerURL": "https://idp.example", "ClientID": "sigstore", "Type": "email", "KeysFile": "keys.json"}}}`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		issuers := `{oidc-issuers: {"https://idp.example": {issuer-url: "https://idp.example", client-id: sigstore, type: email}}}`
		c, err := Parse([]byte(strings.Replace(minimal, issuers, "{fulcio-config: "+name+"}", 1)), dir)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if i := c.CA.OIDCIssuers["https://idp.example"]; i.Type != "email" || i.KeysFile != filepath.Join(dir, "keys.json") {
			t.Errorf("%s: %+v", name, c.CA)
		}
	}
}

// TestIssuerFiles: files of an issuer are named from the configuration's folder.
func TestIssuerFiles(t *testing.T) {
	c, err := Parse([]byte(strings.Replace(minimal, "type: email", "type: email, jwks-file: keys.json", 1)), "/etc/chancery")
	if err != nil {
		t.Fatal(err)
	}
	if path := c.CA.OIDCIssuers["https://idp.example"].KeysFile; path != "/etc/chancery/keys.json" {
		t.Errorf("path %s", path)
	}
}
