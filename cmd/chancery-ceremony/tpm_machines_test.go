//go:build cgo

package main

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chancery-ca/chancery/ceremony"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// TestTPMOnTwoMachines: the online token of a genesis on two machines is a TPM,
// which the offline machine has not got. That one verifies each attestation
// against the transcript of the other before it issues.
func TestTPMOnTwoMachines(t *testing.T) {
	emulator := hsmtest.SWTPM(t)
	r := newRoom(t, nil)
	_, text, _ := strings.Cut(r.read(filepath.Join("testdata", "script", "machines.txtar")), "-- genesis.yaml --\n")
	text = strings.Replace(text, "pkcs11:token=online", "tpm2:online-keys?device="+emulator.Socket(), 1)
	for _, machine := range []string{"online", "offline"} { // nothing is shared but the stick
		r.write(machine+".yaml", text, 0o600)
	}
	stays := func(args ...string) {
		t.Helper()
		out, err := r.command(args...).CombinedOutput()
		if err == nil || !bytes.Contains(out, []byte(ceremony.ErrBundle.Error())) {
			t.Fatalf("%s: %v\n%s", args[0], err, out)
		}
	}
	does := func(args ...string) {
		t.Helper()
		if out, err := r.command(args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", args[0], err, out)
		}
	}
	stays("rehearse", "online.yaml", "--machine", "online", "--dir", "online")
	does("export", "online/out", "request.tar")
	emulator.Stop(t) // the other machine has none
	stays("rehearse", "offline.yaml", "--machine", "offline", "--dir", "offline")
	does("import", "offline/out", "request.tar")
	does("export", "offline/out", "response.tar")
	emulator.Start(t)
	does("import", "online/out", "response.tar")
	emulator.Stop(t)
	for _, machine := range []string{"online", "offline"} {
		does("verify", machine+"/out")
	}
	attested(t, filepath.Join(r.dir, "online", "out"), "inter-g1")
	if online, offline := r.read(filepath.Join(r.dir, "online/out/keys.yaml")), r.read(filepath.Join(r.dir, "offline/out/keys.yaml")); online != offline {
		t.Errorf("two keys.yaml:\n%s\n%s", online, offline)
	}
	emulator.Start(t)
	r.roles(filepath.Join(r.dir, "online", "out", "keys.yaml"), filepath.Join(r.dir, "online", pinsFolder, "online"), emulator.Socket())
}
