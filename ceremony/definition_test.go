package ceremony

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/chancery-ca/chancery/ceremony/internal/sshsig"
	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/hsm"
)

const examplePath = "../config/example/genesis.yaml"

func exampleSource(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile(examplePath)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestParseDefinitionExample(t *testing.T) {
	d, err := ParseDefinition([]byte(exampleSource(t)))
	if err != nil {
		t.Fatal(err)
	}
	want := map[hsm.Role]string{
		hsm.RoleRoot: "root-g1", hsm.RoleTSARoot: "tsa-root", hsm.RoleIntermediate: "inter-g1",
		hsm.RoleCT: "ct-1", hsm.RoleRekor: "rekor-1", hsm.RoleTSA: "tsa-1",
	}
	for _, role := range trust.Roles() {
		if got := d.keyOfRole(role); got != want[role] {
			t.Errorf("role %s: key %q, want %q", role, got, want[role])
		}
	}
	if got, want := d.LogOrigin(hsm.RoleCT), "sig.acme.example/ct/ct2026"; got != want {
		t.Errorf("CT origin %q, want %q", got, want)
	}
	if got, want := d.LogOrigin(hsm.RoleRekor), "sig.acme.example"; got != want {
		t.Errorf("Rekor origin %q, want %q", got, want)
	}
	if got, want := d.LogURL(hsm.RoleRekor), "https://sig.acme.example/log/log2026-1"; got != want {
		t.Errorf("Rekor URL %q, want %q", got, want)
	}
}

// The demonstration is the example with other names: same keys, tokens and
// hierarchy.
func TestDemoDefinitionIsTheExample(t *testing.T) {
	example, err := ParseDefinition([]byte(exampleSource(t)))
	if err != nil {
		t.Fatal(err)
	}
	demo := theDemo(t)
	if diff := cmp.Diff(example.Keys, demo.Keys); diff != "" {
		t.Errorf("keys (-example +demo):\n%s", diff)
	}
	opt := cmpopts.IgnoreFields(Certificate{}, "Subject")
	if diff := cmp.Diff(example.Certificates, demo.Certificates, opt); diff != "" {
		t.Errorf("certificates (-example +demo):\n%s", diff)
	}
	if diff := cmp.Diff(example.Entropy, demo.Entropy); diff != "" {
		t.Errorf("entropy (-example +demo):\n%s", diff)
	}
	if got := demo.LogOrigin(hsm.RoleCT); strings.Contains(got, "8443") {
		t.Errorf("the demo's CT origin %q depends on the port", got)
	}
}

// ceremonySpec is the definition of the specification, whole.
const ceremonySpec = `version: 1
id: acme-genesis-2026
kind: genesis
environment: production
window: {not-before: 2026-12-01T09:00:00Z, not-after: 2026-12-01T18:00:00Z}
modules: {root-hsm: {path: /usr/lib/x.so, sha256: "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"}}
people:
  - {id: ca1, role: administrator, name: "A", key: "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHSbForDJk3mGJmNfOXTENl3Hl3uY59lyZTCrd3qvN8V"}
  - {id: w1,  role: witness,       name: "W", key: "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKI8fjMX41bmQvzEgJin/uQrm9Da1QTNBIu0yyKUcqZh"}
  - {id: w2,  role: witness,       name: "X", key: "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKdLtULqaJrCKcN1s18Ekgy7f0fPAW+DglQ4bxQFvLn3"}
quorum: {witness: 2}
tokens:
  root:   {uri: "pkcs11:token=acme-root;serial=1", module: root-hsm, must-be-empty: true}
  online: {uri: "tpm2:?device=/dev/tpmrm0"}
entropy: {mode: commit-reveal, contributors: [w1, w2]}
keys:
  root-g1:  {token: root,   alg: ecdsa-p384, protection: non-extractable}
  inter-g1: {token: online, alg: ecdsa-p256}
  ct-1:     {token: online, alg: ecdsa-p256}
  rekor-1:  {token: online, alg: ecdsa-p256}
  rekor-v1-1: {token: online, alg: ecdsa-p256}
  tsa-root: {token: root,   alg: ecdsa-p384, protection: non-extractable}
  tsa-1:    {token: online, alg: ecdsa-p256}
  tuf-online: {token: online, alg: ecdsa-p256}
certificates:
  root:  {key: root-g1, self-signed: true, subject: {o: Acme, cn: Acme Sigstore Root G1}, years: 10, path-len: 1}
  inter: {key: inter-g1, issuer: root, subject: {o: Acme, cn: Acme Sigstore Intermediate G1}, years: 3, path-len: 0, eku: [codeSigning]}
  tsa-root: {key: tsa-root, self-signed: true, subject: {o: Acme, cn: Acme Timestamping Root G1}, years: 10, path-len: 0}
  tsa:   {key: tsa-1, issuer: tsa-root, subject: {o: Acme, cn: Acme Timestamping G1}, years: 3, eku: [timeStamping]}
tuf: {threshold: 2, custodians: [{id: c1, key: "pkcs11:token=c1;object=t", spki-sha256: "1111111111111111111111111111111111111111111111111111111111111111"}, {id: c2, key: "pkcs11:token=c2;object=t", spki-sha256: "2222222222222222222222222222222222222222222222222222222222222222"}], root-expires: 1y, timestamp-expires: 7d}
service: {url: https://sig.acme.example, logs: {ct: {shard: ct2026}, rekor: {shard: log2026-1}, rekor-v1: {shard: log2026-v1}}, oidc: [https://login.acme.example]}
outputs: {dir: out}
`

func TestParseDefinitionOfTheSpecification(t *testing.T) {
	d, err := ParseDefinition([]byte(ceremonySpec))
	if err != nil {
		t.Fatal(err)
	}
	if got := d.keyOfRole(hsm.RoleRekorV1); got != "rekor-v1-1" {
		t.Errorf("rekor-v1 key %q", got)
	}
	if _, err := Plan(d); err != nil {
		t.Errorf("plan: %v", err)
	}
	if _, err := Rehearse(t.Context(), d, Options{}); !errors.Is(err, ErrEnvironment) {
		t.Errorf("rehearse production: %v, want ErrEnvironment", err)
	}
}

func TestParseDefinitionRefuses(t *testing.T) {
	for _, tc := range []struct {
		name     string
		old, new string // replaced once in the specification's definition
		want     string // in the error
	}{
		{"empty", ceremonySpec, "", "more than one document|version|EOF"},
		{"not yaml", "version: 1", "version: [1", ""},
		{"scalar", ceremonySpec, "hello", ""},
		{"unknown key", "version: 1", "version: 1\nfoo: 1", "unknown field"},
		{"unknown key below", "must-be-empty: true", "must-be-vacant: true", "unknown field"},
		{"double key", "id: acme-genesis-2026", "id: acme-genesis-2026\nid: acme-genesis-2027", "already defined"},
		{"double key name", "  tsa-1:    {token: online", "  ct-1:    {token: online", "already defined"},
		{"second document", "outputs: {dir: out}", "outputs: {dir: out}\n---\nversion: 1", "more than one document"},
		{"anchor", "outputs: {dir: out}", "outputs: &o {dir: out}", "not allowed"},
		{"alias", "outputs: {dir: out}", "outputs: *o", "not allowed"},
		{"merge", "outputs: {dir: out}", "outputs: {<<: {dir: out}}", "not allowed"},
		{"tag", "outputs: {dir: out}", "outputs: {dir: !!str out}", "not allowed"},
		{"control character", "name: \"A\"", "name: \"A\x1b[2J\"", "U+001B"},
		{"control character of 8 bits", "version: 1", "version: 1 # \u009b2J", "U+009B"},
		{"writing that turns, in a comment", "version: 1", "version: 1 # \u202e1 :noisrev", "U+202E"},
		{"a line end that no screen shows", "version: 1", "version: 1 # x\u2028quorum: {witness: 1}", "U+2028"},
		{"a line that hides another", "version: 1", "version: 1 # x\rquorum: {witness: 1}\r", "U+000D"},
		{"space of no width", "A\"", "A\u200b\"", "U+200B"},
		{"not UTF-8", "name: \"A\"", "name: \"\xff\"", "U+FFFD"},
		{"escaped in a name", "name: \"A\"", `name: "A\x1b[2J"`, "not printable"},
		{"escaped in a subject", "cn: Acme Sigstore Root G1", `cn: "Acme \u202eRoot"`, "not printable"},
		{"deep nesting", "outputs: {dir: out}", "outputs: " + strings.Repeat("[", 500), "deep"},
		{"key files above the outputs", "tpm2:?device=/dev/tpmrm0", "tpm2:../keys?device=/dev/tpmrm0", "folder"},
		{"key files above by a detour", "tpm2:?device=/dev/tpmrm0", "tpm2:a/../../keys?device=/dev/tpmrm0", "folder"},
		{"key files above in disguise", "tpm2:?device=/dev/tpmrm0", "tpm2:%2e%2e/keys?device=/dev/tpmrm0", "folder"},
		{"key files that is the outputs", "tpm2:?device=/dev/tpmrm0", "tpm2:.?device=/dev/tpmrm0", "folder"},
		{"key files absolute with a detour", "tpm2:?device=/dev/tpmrm0", "tpm2:/var/keys/../../etc?device=/dev/tpmrm0", "folder"},
		{"key files with a line end", "tpm2:?device=/dev/tpmrm0", "tpm2:/var/k%0aeys?device=/dev/tpmrm0", "folder"},
		{"long line", "version: 1", "version: 1 #" + strings.Repeat("x", 1000), "longer than"},
		{"version", "version: 1", "version: 2", "version"},
		{"id with a path", "id: acme-genesis-2026", "id: ../../etc", "id:"},
		{"kind", "kind: genesis", "kind: party", "kind"},
		{"environment", "environment: production", "environment: test", "environment"},
		{"window reversed", "not-after: 2026-12-01T18:00:00Z", "not-after: 2026-12-01T08:00:00Z", "window"},
		{"window half", "not-before: 2026-12-01T09:00:00Z, ", "", "window"},
		{"window not a time", "not-before: 2026-12-01T09:00:00Z", "not-before: tomorrow", ""},
		{"module relative", "path: /usr/lib/x.so", "path: x.so", "not absolute"},
		{"module hash short", "sha256: \"0011", "sha256: \"", "64 hexadecimal"},
		{"person twice", "id: w2,", "id: w1,", "twice"},
		{"person's role", "role: administrator", "role: king", "unknown role"},
		{"person's key missing in production", `, key: "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHSbForDJk3mGJmNfOXTENl3Hl3uY59lyZTCrd3qvN8V"`, "", "ssh-ed25519"},
		{"person's key is rsa", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHSb", "ssh-rsa AAAAC3NzaC1lZDI1NTE5AAAAIHSb", "ssh-ed25519"},
		{"person's key truncated", "AAAAIHSbForDJk3mGJmNfOXTENl3Hl3uY59lyZTCrd3qvN8V", "AAAAIHSb", "not an ssh-ed25519"},
		{"two people with one key", "AAAAIKdLtULqaJrCKcN1s18Ekgy7f0fPAW+DglQ4bxQFvLn3", "AAAAIKI8fjMX41bmQvzEgJin/uQrm9Da1QTNBIu0yyKUcqZh", "one key"},
		{"quorum too big", "quorum: {witness: 2}", "quorum: {witness: 3}", "quorum"},
		{"entropy mode", "mode: commit-reveal", "mode: dice", "entropy"},
		{"contributor unknown", "contributors: [w1, w2]", "contributors: [w1, w9]", "contributor"},
		{"contributor twice", "contributors: [w1, w2]", "contributors: [w1, w1]", "contributor"},
		{"token without label", "pkcs11:token=acme-root;serial=1", "pkcs11:serial=1", "token="},
		{"token with a PIN", "pkcs11:token=acme-root;serial=1", "pkcs11:token=acme-root?pin-value=1234", "PIN"},
		{"token of another scheme", "tpm2:?device=/dev/tpmrm0", "file:/tmp/key.pem", "tpm2"},
		{"two tokens with one URI", "tpm2:?device=/dev/tpmrm0", "pkcs11:token=acme-root;serial=1", "one URI"},
		{"token of an unknown module", "module: root-hsm", "module: other", "unknown module"},
		{"key in an unknown token", "ct-1:     {token: online", "ct-1:     {token: offline", "unknown token"},
		{"key of an unknown algorithm", "ct-1:     {token: online, alg: ecdsa-p256}", "ct-1:     {token: online, alg: rsa-1024}", "unknown alg"},
		{"log key on P-384", "ct-1:     {token: online, alg: ecdsa-p256}", "ct-1:     {token: online, alg: ecdsa-p384}", "needs ecdsa-p256"},
		{"key with a space in its name", "ct-1:     {token", "\"ct 1\":     {token", "keys: name"},
		{"key with a path for a name", "ct-1:     {token", "\"../ct-1\":     {token", "keys: name"},
		{"key without a use", "keys:\n", "keys:\n  spare: {token: root, alg: ecdsa-p256}\n", "no use"},
		{"key with two uses", "tsa:   {key: tsa-1", "tsa:   {key: inter-g1", "one key, one role"},
		{"two keys for a log", "keys:\n", "keys:\n  ct-2: {token: root, alg: ecdsa-p256}\n", "say which"},
		{"protection", "protection: non-extractable}\n  inter", "protection: usb-stick}\n  inter", "unknown protection"},
		{"certificate of an unknown key", "key: tsa-1", "key: tsa-2", "unknown key"},
		{"certificate of an unknown issuer", "issuer: tsa-root", "issuer: nobody", "issuer"},
		{"certificate outlives its issuer", "years: 3, eku: [timeStamping]", "years: 11, eku: [timeStamping]", "lives longer"},
		{"certificate for ever", "years: 10, path-len: 1", "years: 1000, path-len: 1", "years"},
		{"certificate backwards", "years: 10, path-len: 1", "years: -1, path-len: 1", "years"},
		{"intermediate with a longer path", "path-len: 0, eku", "path-len: 1, eku", "path-len: 0"},
		{"root without room for the intermediate", "years: 10, path-len: 1", "years: 10, path-len: 0", "allows no intermediate"},
		{"root with an eku", "path-len: 1}", "path-len: 1, eku: [codeSigning]}", "self-signed"},
		{"unknown eku", "eku: [timeStamping]", "eku: [serverAuth]", "eku"},
		{"two ekus", "eku: [timeStamping]", "eku: [timeStamping, codeSigning]", "eku"},
		{"no name", "cn: Acme Sigstore Root G1", "cn: \"\"", "subject"},
		{"long name", "cn: Acme Sigstore Root G1", "cn: " + strings.Repeat("x", 65), "64 characters"},
		{"production called rehearsal", "cn: Acme Sigstore Root G1", "cn: Rehearsal Root", "REHEARSAL"},
		{"no root", "  root:  {key: root-g1, self-signed: true, subject: {o: Acme, cn: Acme Sigstore Root G1}, years: 10, path-len: 1}\n", "", "issuer"},
		{"service over http", "url: https://sig", "url: http://sig", "https"},
		{"service with a path", "url: https://sig.acme.example", "url: https://sig.acme.example/base", "host and port alone"},
		{"service with a password", "url: https://sig", "url: https://a:b@sig", "host and port alone"},
		{"no CT log", "ct: {shard: ct2026}, ", "", "ct and rekor"},
		{"shard with a path", "shard: ct2026", "shard: ../x", "shard"},
		{"two shards of one name", "shard: log2026-v1", "shard: log2026-1", "one shard name"},
		{"rekor origin set", "rekor: {shard: log2026-1}", "rekor: {shard: log2026-1, origin: other.example}", "cannot be set"},
		{"origin with a line break", "ct: {shard: ct2026}", `ct: {shard: ct2026, origin: "a\nb"}`, "malformed"},
		{"no issuer", "oidc: [https://login.acme.example]", "oidc: []", "no issuer"},
		{"issuer over http", "oidc: [https://login", "oidc: [http://login", "https URL"},
		{"issuer twice", "oidc: [https://login.acme.example]", "oidc: [https://login.acme.example, https://login.acme.example]", "twice"},
		{"outputs above", "dir: out", "dir: ../out", "stays inside"},
		{"outputs absolute", "dir: out", "dir: /etc", "stays inside"},
		{"outputs through a parent", "dir: out", "dir: a/../../out", "stays inside"},
		{"outputs nowhere", "dir: out", "dir: \"\"", "stays inside"},
		{"module hash in capitals", "aabbccddeeff00112233445566778899aabbccddeeff", "AABBCCDDEEFF00112233445566778899aabbccddeeff", "lower case"},
		{"no administrator in production", "role: administrator", "role: operator", "needs an administrator"},
		{"no quorum of witnesses in production", "quorum: {witness: 2}", "quorum: {administrator: 1}", "quorum of witnesses"},
		{"two people with one key", "AAAAC3NzaC1lZDI1NTE5AAAAIKdLtULqaJrCKcN1s18Ekgy7f0fPAW+DglQ4bxQFvLn3", "AAAAC3NzaC1lZDI1NTE5AAAAIKI8fjMX41bmQvzEgJin/uQrm9Da1QTNBIu0yyKUcqZh", "one key"},
		{"person's key of another type", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKdLtULqaJrCKcN1s18Ekgy7f0fPAW+DglQ4bxQFvLn3", "ssh-rsa AAAA", "ssh-ed25519"},
		{"too many people", "people:", "people:\n" + crowd(40), "at most"},
		{"PIN in five parts", "must-be-empty: true}", "must-be-empty: true, pin-parts: 5}", "pin-parts"},
		{"PIN in fewer than no parts", "must-be-empty: true}", "must-be-empty: true, pin-parts: -1}", "pin-parts"},
		{"tuf threshold", "threshold: 2", "threshold: 3", "threshold"},
		{"tuf expiry", "root-expires: 1y", "root-expires: soon", "root-expires"},
		{"tuf custodian twice", "id: c2", "id: c1", "twice"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			source := strings.Replace(ceremonySpec, tc.old, tc.new, 1)
			if source == ceremonySpec {
				t.Fatalf("the definition does not contain %q", tc.old)
			}
			_, err := ParseDefinition([]byte(source))
			if !errors.Is(err, ErrDefinition) {
				t.Fatalf("error %v, want ErrDefinition", err)
			}
			for _, want := range strings.Split(tc.want, "|") {
				if strings.Contains(err.Error(), want) {
					return
				}
			}
			t.Errorf("error %q does not say %q", err, tc.want)
		})
	}
}

// crowd is a list of so many operators, each with a key of their own.
func crowd(n int) string {
	var b strings.Builder
	for i := range n {
		key, err := sshsig.NewPublicKey(bytes.Repeat([]byte{byte(i)}, 32))
		if err != nil {
			panic(err)
		}
		fmt.Fprintf(&b, "  - {id: o%d, role: operator, name: O, key: %q}\n", i, key)
	}
	return b.String()
}

// A definition for production can be rehearsed as it is: same words, other
// names, any time.
func TestRehearsal(t *testing.T) {
	d, err := ParseDefinition([]byte(ceremonySpec))
	if err != nil {
		t.Fatal(err)
	}
	r, err := d.Rehearsal()
	if err != nil {
		t.Fatal(err)
	}
	if r.Hash() != d.Hash() || r.Environment != Rehearsal || !r.Window.NotBefore.IsZero() || d.Environment != Production {
		t.Errorf("rehearsal %+v of %+v", r.Environment, d.Environment)
	}
	if cn := r.CommonName(r.Certificates["root"].Subject); !strings.HasPrefix(cn, RehearsalPrefix) {
		t.Errorf("certifies %q", cn)
	}
	long := strings.Replace(ceremonySpec, "Acme Sigstore Root G1", strings.Repeat("x", 60), 1)
	if d, err = ParseDefinition([]byte(long)); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Rehearsal(); !errors.Is(err, ErrDefinition) {
		t.Errorf("a name that the prefix makes too long: %v, want ErrDefinition", err)
	}
}

func TestParseDefinitionRefusesHuge(t *testing.T) {
	huge := append([]byte(ceremonySpec), bytes.Repeat([]byte("# padding\n"), 1<<20)...)
	if _, err := ParseDefinition(huge); !errors.Is(err, ErrDefinition) {
		t.Errorf("10 MiB: %v, want ErrDefinition", err)
	}
}

func TestPlanRefusesOtherVersions(t *testing.T) {
	for _, kind := range kinds[1:] {
		// A genesis by another name.
		if _, err := ParseDefinition([]byte(strings.Replace(exampleSource(t), "kind: genesis", "kind: "+string(kind), 1))); !errors.Is(err, ErrDefinition) {
			t.Errorf("kind %s: %v, want ErrDefinition", kind, err)
		}
	}
}

func FuzzParseDefinition(f *testing.F) {
	f.Add([]byte(ceremonySpec))
	f.Add([]byte(exampleSource(f)))
	f.Add([]byte("version: 1\n---\n"))
	f.Add([]byte("a: &a [*a]"))
	f.Fuzz(func(t *testing.T, source []byte) {
		d, err := ParseDefinition(source)
		if err != nil {
			if !errors.Is(err, ErrDefinition) {
				t.Fatalf("error %v is not ErrDefinition", err)
			}
			return
		}
		if _, err := Plan(d); err != nil && !errors.Is(err, ErrNotInVersion) {
			t.Fatalf("a valid definition has no plan: %v", err)
		}
	})
}

// A value that a YAML parser takes for a number is refused unless it is written
// as every parser gives it back; in quotes it is what it says.
func TestParseDefinitionNumbers(t *testing.T) {
	module := strings.Repeat("00112233445566778899aabbccddeeff", 2)
	for _, tc := range []struct {
		name, old, value string
		want             string // in the error, "" if it is taken
	}{
		{"all zeros", `"` + module + `"`, strings.Repeat("0", 64), "line 6: sha256: YAML takes 00000000000000000000 for a number"},
		{"all digits", `"` + module + `"`, strings.Repeat("12", 32), "line 6: sha256:"},
		{"a leading zero", `"` + module + `"`, "0" + strings.Repeat("1", 63), "line 6: sha256:"},
		{"an exponent", `"` + module + `"`, strings.Repeat("1", 30) + "e" + strings.Repeat("3", 33), "line 6: sha256:"},
		{"hexadecimal with its prefix", `"` + module + `"`, "0x" + module, "line 6: sha256:"},
		{"letters", `"` + module + `"`, strings.Replace(module, "00", "ab", 1), ""},
		{"in quotes", `"` + module + `"`, `"` + strings.Repeat("0", 64) + `"`, ""},
		{"in single quotes", `"` + module + `"`, `'` + strings.Repeat("0", 64) + `'`, ""},
		{"in a list", "[w1, w2]", "[{id: a}, 1e5]", "line 15: contributors: YAML takes 1e5"},
		{"after something nested", "ct2026", "{x: [1]}, key: 1_000", "line 31: key: YAML takes 1_000"},
		{"a custodian", `"` + strings.Repeat("1", 64) + `"`, strings.Repeat("1", 64), "line 30: spki-sha256:"},
		{"an octal shard", "ct2026", "007", "line 31: shard: YAML takes 007"},
		{"octal with its prefix", "ct2026", "0o17", "shard:"},
		{"binary", "ct2026", "0b11", "shard:"},
		{"a fraction", "ct2026", "1.50", "shard:"},
		{"a fraction alone", "ct2026", ".5", "shard:"},
		{"infinity", "ct2026", ".inf", "shard:"},
		{"not a number", "ct2026", ".NaN", "shard:"},
		{"a sign", "witness: 2}", "witness: +2}", "line 11: witness: YAML takes +2"},
		{"a key", "root-hsm: {path", "1e5: {path", "line 6: modules: YAML takes 1e5"},
		{"a year", "ct2026", "2026", ""},
		{"a version", "ct2026", "1.2.3", ""},
		{"a date in a name", "ct2026", "2026-11-22", ""},
		{"an e in a name", "ct2026", "1e5-a", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			source := strings.Replace(ceremonySpec, tc.old, tc.value, 1)
			if source == ceremonySpec {
				t.Fatalf("the definition has no %s", tc.old)
			}
			_, err := ParseDefinition([]byte(source))
			switch {
			case tc.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case tc.want != "" && (!errors.Is(err, ErrDefinition) || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), "in quotes")):
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
	// The same in an answers file: a share of digits alone.
	if _, err := ParseAnswers([]byte("entropy:w1: " + strings.Repeat("1", 64) + "\n")); !errors.Is(err, ErrDefinition) || !strings.Contains(err.Error(), "in quotes") {
		t.Errorf("a share of digits: %v, want ErrDefinition", err)
	}
	answers, err := ParseAnswers([]byte("entropy:w1: \"" + strings.Repeat("1", 64) + "\"\n"))
	if err != nil || answers["entropy:w1"] != strings.Repeat("1", 64) {
		t.Errorf("in quotes: %v, %v", answers, err)
	}
}
