//go:build cgo

package main

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chancery-ca/chancery/ceremony"
	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/tpm"
)

// TestTPMRotate: a later ceremony goes on with the folder of key files of the one
// before, wherever that is; the service opens the old keys and the new one by
// the new keys.yaml.
func TestTPMRotate(t *testing.T) {
	for _, row := range []struct{ name, folder string }{
		{"key files in the outputs", ""},
		{"in a named folder of the outputs", "online-keys"},
	} {
		t.Run(row.name, func(t *testing.T) {
			emulator := hsmtest.SWTPM(t)
			r := newRoom(t, nil)
			uri := func(text string) string {
				return strings.Replace(text, `"pkcs11:token=online"`, fmt.Sprintf("%q", "tpm2:"+row.folder+"?device="+emulator.Socket()), 1)
			}
			_, genesis, _ := strings.Cut(r.read(filepath.Join("testdata", "script", "intermediate.txtar")), "-- genesis.yaml --\n")
			genesis, _, _ = strings.Cut(genesis, "\n-- ")
			does := func(args ...string) {
				t.Helper()
				if out, err := r.command(args...).CombinedOutput(); err != nil {
					t.Fatalf("%s: %v\n%s", args[0], err, out)
				}
			}
			does("rehearse", r.write("first.yaml", uri(genesis), 0o600), "--dir", "acme")
			// The service opens all, after each.
			value := filepath.Join(r.dir, "acme", pinsFolder, "online")
			check := func(dir string) string {
				t.Helper()
				r.roles(filepath.Join(r.dir, dir, "out", "keys.yaml"), value, emulator.Socket())
				state, err := ceremony.ReadStatus(filepath.Join(r.dir, dir, "out"))
				if err != nil {
					t.Fatal(err)
				}
				return fmt.Sprintf("%x", state.Head)
			}
			head := check("acme")
			rotate := uri(fmt.Sprintf(laterText, "rotate-1", "rotate", "genesis-1", head) + rotateText)
			does("rehearse", r.write("rotate.yaml", rotate, 0o600), "--dir", "next", "--previous", "acme/out", "--tokens", "acme")
			does("verify", "next/out")
			head = check("next")
			end := uri(fmt.Sprintf(laterText, "end-1", "decommission", "rotate-1", head) +
				"crl: {valid: 10y}\ndestroy: [intermediate, ct, rekor, tsa]\n")
			does("rehearse", r.write("end.yaml", end, 0o600), "--dir", "end", "--previous", "next/out", "--tokens", "acme")
			does("verify", "end/out")
			if text := r.read(filepath.Join(r.dir, "end", "out", ceremony.TranscriptName)); strings.Count(text, `"found":0`) != 4 {
				t.Errorf("%d keys are gone, want 4", strings.Count(text, `"found":0`))
			}
		})
	}
}

// laterText begins the definition of a later ceremony: id, kind, the id and the
// head of the one before.
const laterText = `version: 1
id: %s
kind: %s
environment: rehearsal
previous: {ceremony: %s, heads: ["%s"]}
people:
  - {id: a1, role: administrator, name: The Administrator}
  - {id: w1, role: witness, name: First Witness}
quorum: {witness: 1}
tokens:
  root:   {uri: "pkcs11:token=root"}
  online: {uri: "pkcs11:token=online"}
outputs: {dir: out}
`

const rotateText = `rotation: {overlap: 7d}
keys:
  inter-g2: {token: online, alg: ecdsa-p256}
certificates:
  inter-g2: {key: inter-g2, issuer: root, subject: {o: Acme, cn: Intermediate G2}, years: 3, path-len: 0, eku: [codeSigning]}
`

// roles opens every key of a TPM by its place in keys.yaml, as the service does.
func (r *room) roles(keys, value, device string) {
	r.t.Helper()
	ring, err := trust.LoadKeyRing(keys)
	if err != nil {
		r.t.Fatal(err)
	}
	opened := 0
	for _, role := range []hsm.Role{hsm.RoleIntermediate, hsm.RoleCT, hsm.RoleRekor, hsm.RoleTSA} {
		ref := ring.Keys[role].Ref()
		file, _, _ := splitTPM(ref.URI)
		token, err := tpm.Open(r.t.Context(), tpm.Config{Device: device, Dir: filepath.Dir(file), Auth: []byte(r.read(value))})
		if err != nil {
			r.t.Errorf("open the token of %s: %v", ref.URI, err)
			continue
		}
		if _, err := token.Open(r.t.Context(), ref, role); err != nil {
			r.t.Errorf("open the key of %s: %v", role, err)
		} else {
			opened++
		}
		if err := token.Close(); err != nil {
			r.t.Error(err)
		}
	}
	if opened != 4 {
		r.t.Errorf("%d keys were opened, want 4\n%s", opened, r.read(keys))
	}
}
