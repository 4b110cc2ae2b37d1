//go:build cgo

package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/ceremony"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/tpm"
)

// TestTPM: a ceremony whose online token is a TPM. Every key is attested by it,
// with the transcript's head of that moment as nonce.
func TestTPM(t *testing.T) {
	emulator := hsmtest.SWTPM(t)
	r := newRoom(t, func(s string) string {
		return strings.Replace(s, `uri: "pkcs11:token=acme-online", module: soft`, `uri: "tpm2:?device=`+emulator.Socket()+`"`, 1)
	})
	if out, err := r.command("rehearse", r.def, "--dir", "acme").CombinedOutput(); err != nil {
		t.Fatalf("rehearse: %v\n%s", err, out)
	}
	if err := ceremony.Verify(r.out()).Err(); err != nil {
		t.Fatal(err)
	}
	// Without the emulator, and in a program without cgo.
	emulator.Stop(t)
	bin := filepath.Join(r.dir, "static")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", bin, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build without cgo: %v\n%s", err, out)
	}
	verify := exec.CommandContext(t.Context(), bin, "verify", r.out())
	if out, err := verify.CombinedOutput(); err != nil {
		t.Errorf("verify: %v\n%s", err, out)
	}
	// What it takes on a machine that has nothing else to do.
	if took := verify.ProcessState.UserTime() + verify.ProcessState.SystemTime(); took > 2*time.Second {
		t.Errorf("verify took %s, want 2 s at most", took)
	}
	attested(t, r.out(), "inter-g1")
}

// attested checks the attestation in a key's evidence file.
func attested(t *testing.T, out, key string) {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(out, "evidence", key+".json"))
	if err != nil {
		t.Fatal(err)
	}
	var e hsm.Evidence
	if err := json.Unmarshal(content, &e); err != nil {
		t.Fatal(err)
	}
	if e.Attestation == nil {
		t.Fatalf("key %s is not attested", key)
	}
	spki, err := hsm.ParseSPKIHash(e.SPKI)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tpm.VerifyAttestation(*e.Attestation, spki, e.Attestation.Nonce, nil); err != nil {
		t.Error(err)
	}
	// The nonce is the hash of the record that announced the key.
	f, err := os.Open(filepath.Join(out, ceremony.TranscriptName))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	records, err := ceremony.ReadTranscript(f)
	if err != nil {
		t.Fatal(err)
	}
	for i := range records {
		digest := records[i].Digest()
		if records[i].Step == "key/"+key && records[i].Type == ceremony.Intent && !bytes.Equal(digest[:], e.Attestation.Nonce) {
			t.Errorf("nonce %x, want %x", e.Attestation.Nonce, digest)
		}
	}
}
