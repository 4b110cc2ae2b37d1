package ceremony

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/tpm"
)

// TestDecommissionTPM: the online keys are in a TPM. Their end is resumed after
// every record, and the TPM and its folder have none of them after it.
func TestDecommissionTPM(t *testing.T) {
	cfg := hsmtest.SWTPM(t).Config(t)
	token := hsmtest.OpenTPM(t, cfg)
	l := &life{t: t, now: testNow, tokens: map[string]hsm.Token{
		DemoRootToken: hsmtest.SoftHSM(t), DemoOnlineToken: token,
	}}
	inTPM := func(source string) string {
		return strings.NewReplacer(
			`"pkcs11:token=online"`, fmt.Sprintf("%q", tpm.TokenURI(cfg.Dir, cfg.Device)),
			`"pkcs11:token=`+DemoOnlineToken+`"`, fmt.Sprintf("%q", tpm.TokenURI(cfg.Dir, cfg.Device)),
		).Replace(source)
	}
	l.mustRun(inTPM(string(demoDefinition(t).Source())))
	const keys = 4
	if n, err := token.Keys(t.Context()); err != nil || n != keys {
		t.Fatalf("%d keys in the TPM (%v), want %d", n, err, keys)
	}
	// A copy at a persistent handle goes with its key.
	ring, err := trust.ParseKeyRing(l.read(keysName))
	if err != nil {
		t.Fatal(err)
	}
	ref := ring.Keys[hsm.RoleIntermediate].Ref()
	inter, err := token.Open(t.Context(), ref, hsm.RoleIntermediate)
	if err != nil {
		t.Fatal(err)
	}
	if err := token.Persist(t.Context(), inter, 0x81010001); err != nil {
		t.Fatal(err)
	}

	source := inTPM(l.definition("end-1", Decommission, fmt.Sprintf(
		"crl: {valid: 10y, revoked: [{serial: \"%x\", at: 2026-11-22T00:00:00Z, reason: cessationOfOperation}]}\ndestroy: [intermediate, ct, rekor, tsa]\n",
		l.certificate(chainName).SerialNumber)))
	opts := l.options()
	opts.Resume = true
	for kills := 0; ; kills++ {
		opts.Now = killAfter(3 + kills%3)
		err := l.run(source, opts)
		if err == nil {
			break
		}
		if !errors.Is(err, errKilled) || kills > 60 {
			t.Fatalf("after %d kills: %v", kills, err)
		}
		tear(t, opts.Dir)
	}
	if n, err := token.Keys(t.Context()); err != nil || n != 0 {
		t.Errorf("%d keys in the TPM (%v), want none", n, err)
	}
	left, err := filepath.Glob(filepath.Join(cfg.Dir, "*"))
	if err != nil || len(left) != 0 {
		t.Errorf("left in the folder: %v (%v)", left, err)
	}
	copied := hsm.Ref{URI: tpm.HandleURI(cfg.Device, 0x81010001), SPKI: ref.SPKI}
	if _, err := token.Open(t.Context(), copied, hsm.RoleIntermediate); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("the persistent copy: %v, want ErrNotFound", err)
	}
}
