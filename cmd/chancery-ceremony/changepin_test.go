//go:build cgo

package main

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chancery-ca/chancery/ceremony"
)

// changing has the definition change the PINs of these tokens.
func changing(tokens ...string) func(string) string {
	return func(text string) string {
		for _, name := range tokens {
			text = strings.Replace(text, `uri: "pkcs11:token=acme-`+name+`",`, `uri: "pkcs11:token=acme-`+name+`", change-pin: true,`, 1)
		}
		return text
	}
}

// TestPINChanged: at the end of a production ceremony people type a new PIN,
// twice, and a file has the other. The old ones open nothing, and none is in the
// outputs or on the screen.
func TestPINChanged(t *testing.T) {
	r := newRoom(t, changing("root", "online"))
	pin, next := r.write("online.pin", r.pins["online"], 0o400), r.write("online.next", "online-next-4242", 0o400)
	d := r.run("--pin-file", "online="+pin, "--new-pin-file", "online="+next)
	r.arrive(d, "ca1", "w1", "w2")
	watches(d)
	d.wait(`PIN of token root .nothing is shown.: `)
	d.say(r.pins["root"])
	for range 2 {
		d.wait(`nothing is shown[^>]*> `)
		d.say(strings.Repeat("0f", 32))
	}
	certificates(d, 5) // and the list of revoked ones
	d.wait(`The PIN of token root is changed`)
	d.wait(`PIN of token root .nothing is shown.: `)
	d.say(r.pins["root"])
	d.wait(`Write the new PIN of token root on its paper`)
	for _, typed := range []string{"root-next-1111", "root-next-2222", "root-next-3333", "root-next-3333"} {
		d.wait(`new PIN of token root[^:]*.nothing is shown.: `)
		d.say(typed)
		if typed == "root-next-2222" {
			d.wait("Not accepted")
		}
	}
	for _, id := range []string{"w1", "w2"} {
		d.wait(`Path of the signature[^>]*> `)
		d.say(r.sign(id))
	}
	d.wait("Done")
	if status := d.exit(); status != 0 {
		t.Fatalf("status %d\n%s", status, d.text())
	}
	d.columns()
	verifyProduction(t, r)
	for _, secret := range []string{r.pins["root"], r.pins["online"], "root-next", "online-next"} {
		if strings.Contains(d.text(), secret) {
			t.Errorf("%s is on the screen", secret)
		}
		if out, _ := exec.Command("grep", "-rl", secret, r.out()).Output(); len(out) > 0 {
			t.Errorf("a PIN is in %s", out)
		}
	}
	for token, pins := range map[string][2]string{"root": {r.pins["root"], "root-next-3333"}, "online": {r.pins["online"], "online-next-4242"}} {
		for i, pin := range pins {
			opened, err := r.opens("acme-"+token, pin)
			if opened != (i == 1) {
				t.Errorf("PIN %d of %s opens it: %t (%v)", i, token, opened, err)
			}
		}
	}
}

// opens says whether a program of somebody else, which imports a key, gets into a
// token with the PIN.
func (r *room) opens(label, pin string) (bool, error) {
	r.t.Helper()
	r.tool("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", "tried.key")
	r.tool("openssl", "pkcs8", "-topk8", "-nocrypt", "-in", "tried.key", "-out", "tried.p8")
	cmd := exec.CommandContext(r.t.Context(), "softhsm2-util", "--import", "tried.p8", "--token", label,
		"--label", "tried", "--id", "4711", "--pin", pin)
	cmd.Dir, cmd.Env = r.dir, r.env
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, out)
	}
	return err == nil, err
}

// TestPINChangeKilled: a rehearsal is killed before C_SetPIN, and when it is
// resumed again between C_SetPIN and the new PIN's place in its file. Resumed
// once more it ends, and the file has the PIN of the token.
func TestPINChangeKilled(t *testing.T) {
	needStrace(t)
	r := newRoom(t, changing("root"))
	killed := func(call, file string, args ...string) {
		t.Helper()
		path := filepath.Join("acme", pinsFolder, file)
		cmd := exec.CommandContext(t.Context(), "strace", append([]string{
			"-f", "-qq", "-o", "/dev/null", "-e", "trace=" + call, "-P", path, "-P", filepath.Join(r.dir, path),
			"-e", "inject=" + call + ":signal=SIGKILL:when=1", r.bin,
		}, args...)...)
		cmd.Dir, cmd.Env = r.dir, r.env
		out, err := cmd.CombinedOutput()
		if err == nil || strings.Contains(string(out), "error:") {
			t.Fatalf("not killed at %s of %s: %v\n%s", call, file, err, out)
		}
		state, err := ceremony.ReadStatus(r.out())
		if err != nil {
			t.Fatal(err)
		}
		if step := state.Steps[state.Done].ID; step != "pin/root" {
			t.Fatalf("killed in step %s, want pin/root", step)
		}
	}
	killed("fsync", ".partial-root.new", "rehearse", r.def, "--dir", "acme")
	killed("renameat", ".partial-root", "resume", r.out())
	old := r.read(filepath.Join(r.dir, "acme", pinsFolder, "root"))
	if out, err := r.command("resume", r.out()).CombinedOutput(); err != nil {
		t.Fatalf("resume: %v\n%s", err, out)
	}
	if err := ceremony.Verify(r.out()).Err(); err != nil {
		t.Error(err)
	}
	if text := r.read(filepath.Join(r.out(), ceremony.TranscriptName)); !strings.Contains(text, `"already":true`) {
		t.Error("the record does not say that the new PIN was there")
	}
	r.env = append(r.env, "SOFTHSM2_CONF="+filepath.Join(r.dir, "acme", tokensFolder, "softhsm2.conf"))
	if ok, err := r.opens("acme-root", r.read(filepath.Join(r.dir, "acme", pinsFolder, "root"))); !ok {
		t.Errorf("the PIN of the file does not open the token: %v", err)
	}
	if ok, _ := r.opens("acme-root", old); ok {
		t.Error("the old PIN opens the token")
	}
}
