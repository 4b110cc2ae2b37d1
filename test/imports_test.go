package test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/chancery-ca/chancery"

// importRules says which packages of this module a package may import: the
// arrows of the design. Production files only; a test may look anywhere.
// A rule covers the package it names and all below it unless they have one of
// their own.
var importRules = map[string][]string{
	"config": {"hsm", "ca/identity", "ca/policy", "ceremony/trust"},

	"hsm":            {},
	"hsm/internal":   {"hsm"},
	"hsm/pkcs11":     {"hsm", "hsm/internal/queue"},
	"hsm/tpm":        {"hsm", "hsm/internal/queue"},
	"hsm/softhsm":    {"hsm", "hsm/pkcs11"},
	"hsm/hsmtest":    {"hsm", "hsm/pkcs11", "hsm/softhsm", "hsm/tpm"},
	"ca":             {"hsm", "ca/profile", "ca/identity", "ca/policy", "ca/audit"},
	"ca/identity":    {"ca/profile"},
	"ca/profile":     {},
	"ca/policy":      {"ca/profile"},
	"ca/audit":       {},
	"ca/server":      {"ca", "ca/profile", "ca/identity", "ca/policy", "ca/audit"},
	"ca/tsa":         {"hsm"},
	"ca/ctlog":       {"ca"},
	"log/store":      {},
	"log/tree":       {"log/store"},
	"log/head":       {"hsm", "log/tree"},
	"log/ct":         {"hsm", "log/tree", "log/head"},
	"log/rekor":      {"hsm", "log/tree", "log/head"},
	"ceremony":       {"hsm", "hsm/tpm", "ca/profile", "ceremony/trust", "ceremony/durable"},
	"ceremony/trust": {"hsm"},

	"ceremony/trust/tuf": {"hsm", "ceremony/trust", "ceremony/durable"},
	"ceremony/bundle":    {"ceremony/durable"},
	"ceremony/durable":   {},

	// For tests; TestTestPackages keeps them out of the programs.
	"ca/identity/oidctest": {},
	"ca/internal/catest":   {"hsm", "hsm/hsmtest", "ca", "ca/profile"},
	"ca/internal/idptest":  {"ca/identity/oidctest"},
	"log/ct/cttest":        {"log/tree"},
}

// forbidden lists imports that a package must not reach, directly or not.
var forbidden = map[string][]string{
	"cmd/chancery-ceremony": {
		"github.com/labstack/echo", "github.com/google/trillian", "github.com/mattn/go-sqlite3",
		module + "/log", module + "/ca/server", module + "/ca/identity",
	},
	"hsm": {"github.com", "google.golang.org", "golang.org"},
}

type listed struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func TestImportDirections(t *testing.T) {
	packages := list(t)
	for _, p := range packages {
		name := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		if strings.HasPrefix(name, "cmd") || strings.HasPrefix(name, "test") {
			continue
		}
		allowed, ok := ruleFor(name)
		if !ok {
			t.Errorf("package %s has no rule: say in importRules what it may import", name)
			continue
		}
		for _, imp := range p.Imports {
			rel, ours := strings.CutPrefix(imp, module+"/")
			if ours && !slices.Contains(allowed, rel) && !strings.HasPrefix(rel, name+"/") {
				t.Errorf("%s imports %s; it may import only %v", name, rel, allowed)
			}
		}
	}
}

func TestForbiddenDependencies(t *testing.T) {
	for _, p := range list(t) {
		name := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		for _, bad := range forbidden[name] {
			for _, dep := range p.Deps {
				if dep == bad || strings.HasPrefix(dep, bad+"/") {
					// hsm's own subpackages are not dependencies of hsm.
					t.Errorf("%s reaches %s", name, dep)
				}
			}
		}
	}
}

// TestTestPackages: what exists for tests is in no program, but for the demo's
// identity provider, which the demo command alone may reach: it approves
// everybody.
func TestTestPackages(t *testing.T) {
	const provider, demo = "ca/identity/oidctest", "cmd/chancery/internal/demo"
	for _, p := range list(t) {
		name := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		for _, imp := range p.Imports {
			rel, ours := strings.CutPrefix(imp, module+"/")
			if !ours || !strings.HasSuffix(rel, "test") || strings.HasSuffix(name, "test") {
				continue
			}
			if rel != provider || name != demo {
				t.Errorf("%s imports %s, which is for tests", name, rel)
			}
		}
	}
}

func ruleFor(name string) ([]string, bool) {
	for at := name; at != ""; {
		if rule, ok := importRules[at]; ok {
			return rule, true
		}
		cut := strings.LastIndexByte(at, '/')
		if cut < 0 {
			return nil, false
		}
		at = at[:cut]
	}
	return nil, false
}

func list(t *testing.T) []listed {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Imports,Deps", module+"/...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("list packages: %v", err)
	}
	var all []listed
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("decode package list: %v", err)
		}
		all = append(all, p)
	}
	if len(all) < 10 {
		t.Fatalf("only %d packages listed: this check would show nothing", len(all))
	}
	return all
}
