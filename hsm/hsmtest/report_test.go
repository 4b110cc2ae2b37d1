package hsmtest_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
	"github.com/google/go-cmp/cmp"
	p11 "github.com/miekg/pkcs11"
)

var update = flag.Bool("update", false, "write the golden reports anew")

// reportOf tells a child process which device it finds, as JSON in a file: a
// PIN is in no argument and no variable.
const reportOf = "CHANCERY_TEST_REPORT"

// TestReportNSS runs the conformance suite on NSS's softokn, which does not
// pass it, as it is and with the policy that it breaks put aside.
func TestReportNSS(t *testing.T) {
	fresh := func() hsmtest.SoftHSMToken { return hsmtest.NewNSS(t) }
	report(t, "nss", fresh, "as it is", "policy put aside")
}

// TestReportTPM2PKCS11 runs the conformance suite on tpm2-pkcs11.
func TestReportTPM2PKCS11(t *testing.T) {
	kit := hsmtest.NewTPM2PKCS11(t)
	fresh := func() hsmtest.SoftHSMToken { kit.Renew(t); return kit.Token }
	report(t, "tpm2-pkcs11", fresh, "as it is")
}

// TestReportChild is the child process: it may fail, hang or crash. The
// module's own settings it has from its parent's environment.
func TestReportChild(t *testing.T) {
	path := os.Getenv(reportOf)
	if path == "" {
		t.Skip("this is the child process of the reports")
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var token hsmtest.SoftHSMToken
	if err := json.Unmarshal(text, &token); err != nil {
		t.Fatal(err)
	}
	d := token.Device(pkcs11.Config{}, nil)
	open := d.Open
	t.Run("keys", func(t *testing.T) { keys(t, token) })
	t.Run("as it is", func(t *testing.T) {
		hsmtest.Conformance(t, func(*testing.T) hsmtest.Device { return d })
	})
	t.Run("policy put aside", func(t *testing.T) {
		d.Open = func(ctx context.Context, pin []byte) (hsm.Token, error) {
			token, err := open(ctx, pin)
			if err != nil {
				return nil, err
			}
			return forgiving{token}, nil
		}
		hsmtest.Conformance(t, func(*testing.T) hsmtest.Device { return d })
	})
}

// forgiving is a token of which we look at the rest although Generate refuses
// what its keys are: it opens the key that Generate left there. The floor of
// the policy holds for it.
type forgiving struct{ hsm.Token }

func (f forgiving) Generate(ctx context.Context, spec hsm.Spec) (hsm.Key, error) {
	key, err := f.Token.Generate(ctx, spec)
	if errors.Is(err, hsm.ErrPolicy) {
		return f.Find(ctx, spec.ID)
	}
	return key, err
}

// keys makes keys as Generate does and as a careless tool does, and says what
// becomes of them.
func keys(t *testing.T, token hsmtest.SoftHSMToken) {
	opened := hsmtest.OpenSoftHSM(t, token)
	lib := p11.New(token.Module)
	session, err := lib.OpenSession(opened.Info().Slot, p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"first key of another tool", "second key of another tool"} {
		_, private, err := lib.GenerateKeyPair(session,
			[]*p11.Mechanism{p11.NewMechanism(p11.CKM_EC_KEY_PAIR_GEN, nil)},
			[]*p11.Attribute{
				p11.NewAttribute(p11.CKA_TOKEN, true), p11.NewAttribute(p11.CKA_ID, id),
				p11.NewAttribute(p11.CKA_EC_PARAMS, []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}),
			},
			[]*p11.Attribute{
				p11.NewAttribute(p11.CKA_TOKEN, true), p11.NewAttribute(p11.CKA_ID, id), p11.NewAttribute(p11.CKA_SIGN, true),
				p11.NewAttribute(p11.CKA_PRIVATE, true), p11.NewAttribute(p11.CKA_SENSITIVE, true),
			})
		t.Logf("%s: %v", id, err)
		if err == nil {
			read(t, lib, session, private)
		}
	}
	_, err = opened.Generate(t.Context(), hsm.Spec{Label: "key", ID: hsmtest.RandomID(), Algorithm: hsm.ECDSAP256})
	t.Logf("Generate: %v", err)
}

// read says what attributes a private key has: in one call, and one by one.
func read(t *testing.T, lib *p11.Ctx, session p11.SessionHandle, private p11.ObjectHandle) {
	attributes := []struct {
		name string
		code uint
	}{
		{"LOCAL", p11.CKA_LOCAL}, {"ALWAYS_SENSITIVE", p11.CKA_ALWAYS_SENSITIVE}, {"EXTRACTABLE", p11.CKA_EXTRACTABLE},
		{"NEVER_EXTRACTABLE", p11.CKA_NEVER_EXTRACTABLE}, {"DECRYPT", p11.CKA_DECRYPT}, {"UNWRAP", p11.CKA_UNWRAP},
		{"DERIVE", p11.CKA_DERIVE}, {"MODIFIABLE", p11.CKA_MODIFIABLE}, {"WRAP_WITH_TRUSTED", p11.CKA_WRAP_WITH_TRUSTED},
		{"ALWAYS_AUTHENTICATE", p11.CKA_ALWAYS_AUTHENTICATE}, {"KEY_GEN_MECHANISM", p11.CKA_KEY_GEN_MECHANISM},
	}
	var all []*p11.Attribute
	var values []string
	for _, a := range attributes {
		all = append(all, p11.NewAttribute(a.code, nil))
		value, err := lib.GetAttributeValue(session, private, []*p11.Attribute{p11.NewAttribute(a.code, nil)})
		if err != nil {
			values = append(values, a.name+" unavailable")
			continue
		}
		values = append(values, fmt.Sprintf("%s %x", a.name, value[0].Value))
	}
	_, err := lib.GetAttributeValue(session, private, all)
	t.Logf("its attributes in one call: %v", err)
	t.Logf("one by one: %s", strings.Join(values, ", "))
}

// report runs each part of the suite in a process of its own, on a fresh
// device, and compares what passes, and why the rest fails, with the golden
// report. A difference is news about the module or about us: look, then write
// it anew with -update.
func report(t *testing.T, module string, fresh func() hsmtest.SoftHSMToken, modes ...string) {
	t.Helper()
	fresh() // what is missing skips the test here
	got := part(t, fresh(), "keys")
	for _, mode := range modes {
		got += mode + ":\n"
		for _, name := range parts(t) {
			got += part(t, fresh(), mode, name)
		}
	}
	golden := filepath.Join("testdata", module+".report")
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s behaves otherwise (-%s +now):\n%s", module, golden, diff)
	}
}

// parts are the names of the suite's parts, none of which is run.
func parts(t *testing.T) []string {
	var names []string
	t.Run("names", func(t *testing.T) {
		hsmtest.Conformance(t, func(t *testing.T) hsmtest.Device {
			names = append(names, filepath.Base(t.Name()))
			t.Skip("only the name is wanted")
			return hsmtest.Device{}
		})
	})
	return names
}

// part runs one part in a child process and gives its lines of the report.
func part(t *testing.T, token hsmtest.SoftHSMToken, name ...string) string {
	t.Helper()
	text, err := json.Marshal(token)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	pattern := "^TestReportChild$"
	for _, n := range name {
		pattern += "/^" + regexp.QuoteMeta(strings.ReplaceAll(n, " ", "_")) + "$"
	}
	child := exec.Command(os.Args[0], "-test.run", pattern, "-test.v", "-test.timeout", "5m")
	child.Env = append(os.Environ(), reportOf+"="+path)
	out, _ := child.CombinedOutput() // it fails: what and why is what we want
	if strings.Contains(string(out), string(token.PIN)) {
		t.Errorf("%s: the PIN is in the output", name)
	}
	return summary(string(out), name[len(name)-1])
}

// volatile is what differs from run to run.
var volatile = []struct {
	is *regexp.Regexp
	to string
}{
	{regexp.MustCompile(`test-[A-Z0-9]{12}`), "TOKEN"},
	{regexp.MustCompile(`(%[0-9a-f]{2}){4,}`), "%…"},
	{regexp.MustCompile(`\b[0-9a-f]{16,}…?`), "…"},
	{regexp.MustCompile(`/tmp/[^ :]*`), "/tmp/…"},
}

// line is a message of a test, with its place in front.
var line = regexp.MustCompile(`^ +[a-z0-9_]+\.go:\d+: (.*)$`)

// summary says of the part called name whether it passed, and what it said
// first (if it passed: all).
func summary(out, name string) string {
	result, module := "died", ""
	var said []string
	for _, text := range strings.Split(out, "\n") {
		fields := strings.Fields(text)
		m := line.FindStringSubmatch(text)
		switch {
		case len(fields) == 4 && fields[0] == "---" && strings.HasSuffix(fields[2], "/"+name):
			result = strings.ToLower(strings.TrimSuffix(fields[1], ":"))
		case strings.HasPrefix(text, "ERROR: ") && module == "":
			module = text // tpm2-pkcs11 says more on its standard error
		case strings.HasPrefix(text, "panic: "), strings.HasPrefix(text, "SIG"), strings.HasPrefix(text, "fatal error: "):
			said = append(said, text)
		case m != nil:
			said = append(said, m[1])
		}
	}
	if result != "pass" && len(said) > 1 {
		said = said[:1]
	}
	if result != "pass" && module != "" {
		said = append(said, module)
	}
	text := fmt.Sprintf("%-5s %s\n", result, strings.ReplaceAll(name, "_", " "))
	for _, m := range said {
		for _, v := range volatile {
			m = v.is.ReplaceAllString(m, v.to)
		}
		text += "      " + m + "\n"
	}
	return text
}
