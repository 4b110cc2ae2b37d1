package hsmtest

import (
	"crypto/rand"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/chancery-ca/chancery/hsm/pkcs11"
)

// reservedSource is the C source of a module that gives another its
// initialisation string.
//
//go:embed testdata/reserved.c
var reservedSource []byte

// softoknPaths are where distributions put NSS's software token.
var softoknPaths = []string{
	"/usr/lib/x86_64-linux-gnu/libsoftokn3.so",
	"/usr/lib/aarch64-linux-gnu/libsoftokn3.so",
	"/usr/lib64/libsoftokn3.so",
	"/usr/lib/libsoftokn3.so",
}

// nssModule is built at the first use.
var nssModule = sync.OnceValues(buildReserved)

// NewNSS makes a fresh NSS database (softokn, the token of Firefox) in a
// private folder. Softokn reads its place from the string of C_Initialize and
// is one for the process, so the database of the last call is the one that the
// next Open finds: one at a time, and no parallel tests. The test is skipped
// (or failed, see Missing) where NSS, its tools or a C compiler is missing.
func NewNSS(t testing.TB) SoftHSMToken {
	t.Helper()
	for _, tool := range []string{"certutil", "gcc"} {
		if _, err := exec.LookPath(tool); err != nil {
			Missing(t, tool+" is not installed (Debian: apt install libnss3-tools gcc)")
		}
	}
	if firstFile(softoknPaths) == "" {
		Missing(t, "NSS's softokn is not installed (Debian: apt install libnss3)")
	}
	sharedHome(t)
	module, err := nssModule()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", homePrefix+"nss-") // not t.TempDir: a test's name may hold a quote
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	token := SoftHSMToken{Module: module, Label: "test-" + rand.Text()[:12], PIN: []byte(rand.Text())}
	token.URI = pkcs11.TokenURI(token.Label)
	password := filepath.Join(dir, "password")
	if err := os.WriteFile(password, append(token.PIN, '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("certutil", "-N", "-d", "sql:"+dir, "-f", password).CombinedOutput(); err != nil {
		t.Fatalf("certutil: %v: %s", err, out)
	}
	reserved := fmt.Sprintf("configdir='sql:%s' certPrefix='' keyPrefix='' secmod='' flags= dbTokenDescription='%s'", dir, token.Label)
	if err := os.Setenv("CHANCERY_RESERVED", reserved); err != nil {
		t.Fatal(err)
	}
	return token
}

// firstFile returns the first of paths that exists, or "".
func firstFile(paths []string) string {
	for _, path := range paths {
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			return path
		}
	}
	return ""
}

// buildReserved compiles the module that stands before softokn.
func buildReserved() (string, error) {
	home, err := shared()
	if err != nil {
		return "", err
	}
	dir := filepath.Dir(home.Dir()) // which is removed when the process has ended
	source, module := filepath.Join(dir, "reserved.c"), filepath.Join(dir, "reserved.so")
	if err := os.WriteFile(source, reservedSource, 0o600); err != nil {
		return "", err
	}
	if out, err := exec.Command("gcc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", module, source, "-ldl").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build module: %s", out)
	}
	return module, os.Setenv("CHANCERY_RESERVED_MODULE", firstFile(softoknPaths))
}
