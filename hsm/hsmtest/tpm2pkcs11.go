package hsmtest

import (
	"crypto/rand"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/chancery-ca/chancery/hsm/pkcs11"
)

// tpm2Paths are where distributions put tpm2-pkcs11's module.
var tpm2Paths = []string{
	"/usr/lib/x86_64-linux-gnu/libtpm2_pkcs11.so.1",
	"/usr/lib/aarch64-linux-gnu/libtpm2_pkcs11.so.1",
	"/usr/lib64/libtpm2_pkcs11.so.1",
	"/usr/lib64/pkcs11/libtpm2_pkcs11.so",
}

// flushing runs one of tpm2-tools and then empties the TPM's transient slots.
// Without a resource manager the three of them run out inside tpm2_ptool.
const flushing = `#!/bin/sh
PATH=${PATH#*:}
"$(basename "$0")" "$@"
code=$?
tpm2_flushcontext -t >/dev/null 2>&1
exit $code
`

// TPM2PKCS11 is a token of tpm2-pkcs11 in an emulated TPM of its own, without a
// resource manager.
type TPM2PKCS11 struct {
	Token    SoftHSMToken
	emulator *Emulator
	store    string
	// empty is the store and the TPM's memory before anything was made in the
	// token, by the files' paths.
	empty map[string][]byte
}

// NewTPM2PKCS11 makes a TPM and an empty token in it. The module reads the
// places of both from the environment: one for the process at a time. The test
// is skipped (or failed, see Missing) where tpm2-pkcs11, its tools, tpm2-tools
// or swtpm is missing.
func NewTPM2PKCS11(t testing.TB) *TPM2PKCS11 {
	t.Helper()
	for _, tool := range []string{"tpm2_ptool", "tpm2_flushcontext"} {
		if _, err := exec.LookPath(tool); err != nil {
			Missing(t, tool+" is not installed (Debian: apt install libtpm2-pkcs11-tools tpm2-tools)")
		}
	}
	module := firstFile(tpm2Paths)
	if module == "" {
		Missing(t, "tpm2-pkcs11 is not installed (Debian: apt install libtpm2-pkcs11-1)")
	}
	k := &TPM2PKCS11{
		Token: SoftHSMToken{
			Module: module, Label: "test-" + rand.Text()[:12],
			PIN: []byte(rand.Text()), SOPIN: []byte(rand.Text()),
		},
		emulator: SWTPM(t),
		store:    t.TempDir(),
	}
	k.Token.URI = pkcs11.TokenURI(k.Token.Label)
	tcti := "swtpm:path=" + k.emulator.Socket()
	for name, value := range map[string]string{
		"TPM2_PKCS11_TCTI": tcti, "TPM2TOOLS_TCTI": tcti, "TPM2_PKCS11_STORE": k.store,
		"TPM2_PKCS11_LOG_LEVEL": "0", "TSS2_LOG": "all+NONE",
	} {
		if err := os.Setenv(name, value); err != nil {
			t.Fatal(err)
		}
	}
	k.provision(t)
	return k
}

// provision makes the store and the token.
func (k *TPM2PKCS11) provision(t testing.TB) {
	t.Helper()
	tools := t.TempDir()
	for _, tool := range []string{"tpm2_createprimary", "tpm2_create", "tpm2_load", "tpm2_unseal", "tpm2_evictcontrol", "tpm2_readpublic"} {
		if err := os.WriteFile(filepath.Join(tools, tool), []byte(flushing), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, arguments := range [][]string{
		{"init"},
		{"addtoken", "--pid=1", "--label=" + k.Token.Label, "--sopin=" + string(k.Token.SOPIN), "--userpin=" + string(k.Token.PIN)},
	} {
		command := exec.Command("tpm2_ptool", append(arguments, "--path="+k.store)...)
		command.Env = append(os.Environ(), "PATH="+tools+":"+os.Getenv("PATH"))
		if out, err := command.CombinedOutput(); err != nil {
			t.Fatalf("tpm2_ptool %s: %v: %s", arguments[0], err, out)
		}
	}
	// An orderly end: after any other the TPM counts a failed authorization.
	if out, err := exec.Command("tpm2_shutdown", "-c").CombinedOutput(); err != nil {
		t.Fatalf("tpm2_shutdown: %v: %s", err, out)
	}
	k.emulator.Stop(t)
	k.empty = map[string][]byte{}
	for _, dir := range []string{k.store, k.emulator.StateDir()} {
		files, err := filepath.Glob(filepath.Join(dir, "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range files {
			if k.empty[path], err = os.ReadFile(path); err != nil {
				t.Fatal(err)
			}
		}
	}
	k.emulator.Start(t)
}

// Renew power-cycles the TPM and makes it and the token empty again. The token
// is not open.
func (k *TPM2PKCS11) Renew(t testing.TB) {
	t.Helper()
	k.emulator.Stop(t)
	for path, content := range k.empty {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	k.emulator.Start(t)
}
