//go:build cgo

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/ceremony"
	"github.com/chancery-ca/chancery/hsm/softhsm"
)

// room is what a production ceremony needs: a program, tokens with PINs of
// their own, people with ssh keys, and a definition. The tokens are SoftHSM,
// which the definition has to accept by name.
type room struct {
	t       *testing.T
	bin     string
	dir     string // of everything
	def     string // path of the definition
	pins    map[string]string
	env     []string
	printed string // the words of the definition, as on everyone's paper
}

// newRoom makes everything anew. edit changes the definition's text.
func newRoom(t *testing.T, edit func(string) string) *room {
	t.Helper()
	needSoftHSM(t)
	r := &room{t: t, dir: t.TempDir(), pins: map[string]string{"root": "root-pin-4711", "online": "online-pin-1234"}}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	r.bin = filepath.Join(r.dir, program)
	if err := os.Symlink(self, r.bin); err != nil {
		t.Fatal(err)
	}
	r.tokens()
	text := r.definition()
	if edit != nil {
		text = edit(text)
	}
	r.def = filepath.Join(r.dir, "genesis.yaml")
	r.write("genesis.yaml", text, 0o644)
	r.printed = ceremony.Words(sha256.Sum256([]byte(text)))
	return r
}

func (r *room) write(name, content string, mode os.FileMode) string {
	r.t.Helper()
	path := filepath.Join(r.dir, name)
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		r.t.Fatal(err)
	}
	return path
}

// tokens makes two SoftHSM tokens with softhsm2-util, as an administrator
// would, in a home of this room.
func (r *room) tokens() {
	r.t.Helper()
	tokens := filepath.Join(r.dir, "softhsm")
	if err := os.Mkdir(tokens, 0o700); err != nil {
		r.t.Fatal(err)
	}
	conf := r.write("softhsm2.conf", "directories.tokendir = "+tokens+"\nobjectstore.backend = file\nlog.level = ERROR\n", 0o600)
	r.env = append(os.Environ(), "SOFTHSM2_CONF="+conf, "TERM=xterm", "NO_COLOR=")
	for name, pin := range r.pins {
		r.tool("softhsm2-util", "--init-token", "--free", "--label", "acme-"+name, "--so-pin", "so-"+pin, "--pin", pin)
	}
}

// tool runs a program of somebody else in the room.
func (r *room) tool(name string, args ...string) string {
	r.t.Helper()
	cmd := exec.CommandContext(r.t.Context(), name, args...)
	cmd.Dir, cmd.Env = r.dir, r.env
	out, err := cmd.CombinedOutput()
	if err != nil {
		r.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// definition is the example for production, with people's keys made by
// ssh-keygen.
func (r *room) definition() string {
	r.t.Helper()
	source, err := os.ReadFile(examplePath)
	if err != nil {
		r.t.Fatal(err)
	}
	module, err := softhsm.Module()
	if err != nil {
		r.t.Fatal(err)
	}
	library, err := os.ReadFile(module)
	if err != nil {
		r.t.Fatal(err)
	}
	now := time.Now().UTC()
	head := fmt.Sprintf("environment: production\nwindow: {not-before: %s, not-after: %s}\nmodules: {soft: {path: %s, sha256: %x}}",
		now.Add(-time.Hour).Format(time.RFC3339), now.Add(time.Hour).Format(time.RFC3339), module, sha256.Sum256(library))
	text := strings.Replace(string(source), "environment: rehearsal", head, 1)
	text = strings.ReplaceAll(text, "must-be-empty: true", "module: soft, must-be-empty: true, accept-software: true")
	for _, id := range []string{"ca1", "w1", "w2"} {
		r.tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", id, "-f", id)
		public, err := os.ReadFile(filepath.Join(r.dir, id+".pub"))
		if err != nil {
			r.t.Fatal(err)
		}
		lines := strings.Split(text, "\n")
		for i, line := range lines {
			if strings.Contains(line, "{id: "+id+",") {
				before, _, _ := strings.Cut(line, `key: "`)
				lines[i] = before + `key: "` + strings.TrimSpace(string(public)) + `"}`
			}
		}
		text = strings.Join(lines, "\n")
	}
	return text
}

// out is the output folder of the room's ceremony.
func (r *room) out() string { return filepath.Join(r.dir, "acme", "out") }

// command is the program with these arguments.
func (r *room) command(args ...string) *exec.Cmd {
	cmd := exec.CommandContext(r.t.Context(), r.bin, args...)
	cmd.Dir, cmd.Env = r.dir, r.env
	return cmd
}

// run performs the ceremony in a terminal.
func (r *room) run(args ...string) *dialogue {
	r.t.Helper()
	return inTerminal(r.t, r.command(append([]string{"run", r.def, "--dir", "acme"}, args...)...))
}

// words picks the words that a prompt asks for from text.
func words(text string, numbers ...string) string {
	all := strings.Fields(text)
	var picked []string
	for _, n := range numbers {
		i, err := strconv.Atoi(n)
		if err != nil {
			return ""
		}
		picked = append(picked, all[i-1])
	}
	return strings.Join(picked, " ")
}

const askedWords = `Type words (\d+), (\d+) and (\d+)[^:]*:\s+> `

// arrive has everybody type their words from paper.
func (r *room) arrive(d *dialogue, people ...string) {
	r.t.Helper()
	for range people {
		n := d.wait(askedWords)
		d.say(words(r.printed, n[1:]...))
	}
}

// watches has two people read their watches.
func watches(d *dialogue) {
	d.t.Helper()
	for range 2 {
		d.wait(`as\s+HH:MM:\s+> `)
		d.say(time.Now().UTC().Format("15:04"))
	}
}

// shownWords finds the words of a hash on the screen, after a label.
func shownWords(text, after string) string {
	_, text, _ = strings.Cut(text[strings.LastIndex(text, after):], "in words")
	return strings.Join(strings.Fields(text)[:24], " ")
}

// certificates confirms what will be signed, by the words on the screen.
func certificates(d *dialogue, n int) {
	d.t.Helper()
	for range n {
		asked := d.wait(askedWords)
		d.say(words(shownWords(d.Read(), "to be signed"), asked[1:]...))
	}
}

// sign has a witness sign with ssh-keygen, away from the ceremony, and returns
// the signature's path.
func (r *room) sign(id string) string {
	r.t.Helper()
	content, err := os.ReadFile(filepath.Join(r.out(), ceremony.CheckpointName))
	if err != nil {
		r.t.Fatal(err)
	}
	own := r.write(id+".checkpoint", string(content), 0o600)
	r.tool("ssh-keygen", "-Y", "sign", "-f", id, "-n", ceremony.Namespace, own)
	return own + ".sig"
}

// TestProduction is a whole production ceremony, driven through a terminal: two
// tokens with different PINs, one typed and one from a file, an administrator
// and two witnesses, mistakes in between, a Ctrl-C and a resume.
func TestProduction(t *testing.T) {
	r := newRoom(t, nil)
	pin := r.write("online.pin", r.pins["online"]+"\n", 0o400)
	share := r.write("w2.share", strings.Repeat("1234561234", 11), 0o600)

	d := r.run("--pin-file", "online="+pin)
	d.wait("definition")
	n := d.wait(askedWords)
	d.say("wrong wrong wrong")
	d.wait("Not accepted: these are not the words")
	d.wait(askedWords)
	d.say(strings.ToUpper(words(r.printed, n[1:]...)))
	r.arrive(d, "w1", "w2")
	d.wait(`as\s+HH:MM:\s+> `)
	d.say(time.Now().UTC().Add(17 * time.Minute).Format("15:04"))
	d.wait("differ by 1[67]m0s")                               // a minute may have ended in between
	for _, ahead := range []string{"", "\n0000-typed-ahead"} { // is nobody's PIN
		d.wait(`as\s+HH:MM:\s+> `)
		d.say(time.Now().UTC().Format("15:04") + ahead)
	}
	d.wait("acme-root")
	d.wait(`PIN of token root .nothing is shown.: `)
	d.say(r.pins["root"])
	d.wait(`nothing is shown[^>]*> `)
	d.say("73 is not a share")
	d.wait("Not accepted")
	d.wait(`nothing is shown[^>]*> `)
	d.say(strings.Repeat("0f", 32))
	d.wait(`nothing is shown[^>]*> `)
	d.say("file:" + share)
	certificates(d, 2)
	d.wait(askedWords)
	d.interrupt()
	d.wait(": interrupted\\s")
	d.wait("nothing is lost; go on with")
	if status := d.exit(); status != exitFailed {
		t.Errorf("interrupted: status %d, want %d", status, exitFailed)
	}
	d.columns()

	d2 := inTerminal(t, r.command("resume", r.out(), "--pin-file", "online="+pin))
	certificates(d2, 1)
	d2.wait(`PIN of token root`)
	d2.say(r.pins["root"])
	certificates(d2, 2) // and the list of revoked ones
	d2.wait(`Path of the signature[^>]*> `)
	d2.say("/nowhere")
	d2.wait("Not accepted")
	d2.wait(`Path of the signature[^>]*> `)
	d2.say(r.sign("w1"))
	d2.wait(`Path of the signature[^>]*> `)
	d2.say("later")
	if status := d2.exit(); status != exitFailed || !strings.Contains(d2.text(), "--signature FILE") {
		t.Errorf("waiting for a witness: status %d\n%s", status, d2.Unread())
	}
	d2.columns()

	if out, err := r.command("sign", r.out(), "--as", "w2", "--signature", r.sign("w2")).CombinedOutput(); err != nil {
		t.Fatalf("sign: %v\n%s", err, out)
	}
	verifyProduction(t, r)
	for _, secret := range r.pins {
		if strings.Contains(d.text()+d2.text(), secret) {
			t.Error("a PIN was shown")
		}
		if out, _ := exec.Command("grep", "-rl", secret, r.out()).Output(); len(out) > 0 {
			t.Errorf("a PIN is in %s", out)
		}
	}
}

// verifyProduction checks a complete ceremony with our verifier and with
// programs that we did not write.
func verifyProduction(t *testing.T, r *room) {
	t.Helper()
	if err := ceremony.Verify(r.out()).Err(); err != nil {
		t.Fatal(err)
	}
	signers := ""
	for _, id := range []string{"w1", "w2"} {
		public, err := os.ReadFile(filepath.Join(r.dir, id+".pub"))
		if err != nil {
			t.Fatal(err)
		}
		signers += id + " " + string(public)
	}
	r.write("allowed", signers, 0o600)
	for _, id := range []string{"w1", "w2"} {
		checkpoint, err := os.Open(filepath.Join(r.out(), ceremony.CheckpointName))
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), "ssh-keygen", "-Y", "verify", "-f", "allowed", "-I", id, "-n", ceremony.Namespace,
			"-s", filepath.Join(r.out(), ceremony.SignatureName(id)))
		cmd.Dir, cmd.Stdin = r.dir, checkpoint
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("ssh-keygen does not verify %s's signature: %v\n%s", id, err, out)
		}
		_ = checkpoint.Close()
	}
	root := r.tool("openssl", "x509", "-in", filepath.Join(r.out(), "root.pem"), "-noout", "-subject")
	if strings.Contains(root, "REHEARSAL") {
		t.Errorf("a production root is called %s", root)
	}
	for name, want := range map[string]int{"acme-root": 2, "acme-online": 4} {
		if n := r.countKeys(name); n != want {
			t.Errorf("token %s has %d private keys, want %d", name, n, want)
		}
	}
}

// countKeys counts private keys with pkcs11-tool's listing of the token folder:
// SoftHSM keeps one file for each object, two for a pair.
func (r *room) countKeys(label string) int {
	r.t.Helper()
	count := 0
	folders, err := filepath.Glob(filepath.Join(r.dir, "softhsm", "*"))
	if err != nil {
		r.t.Fatal(err)
	}
	for _, folder := range folders {
		content, err := os.ReadFile(filepath.Join(folder, "token.object"))
		if err != nil || !bytes.Contains(content, []byte(label)) {
			continue
		}
		objects, err := filepath.Glob(filepath.Join(folder, "*.object"))
		if err != nil {
			r.t.Fatal(err)
		}
		count = (len(objects) - 1) / 2
	}
	return count
}

// TestProductionRefused: what stops a production ceremony before a key is made.
func TestProductionRefused(t *testing.T) {
	for _, tc := range []struct {
		name   string
		edit   func(string) string
		talk   func(*room, *dialogue)
		stderr string
		status int
	}{
		{"the definition is not the one on paper", nil, func(r *room, d *dialogue) {
			for range 5 {
				d.wait(askedWords)
				d.say("abandon abandon about")
			}
		}, "no acceptable answer", exitFailed},
		{"too few witnesses", nil, func(r *room, d *dialogue) {
			r.arrive(d, "ca1", "w1")
			d.wait(askedWords)
			d.say("absent")
		}, "too few people", exitFailed},
		{"a clock that two watches refuse", nil, func(r *room, d *dialogue) {
			r.arrive(d, "ca1", "w1", "w2")
			for range 5 {
				d.wait(`as\s+HH:MM:\s+> `)
				d.say(time.Now().Add(time.Hour).UTC().Format("15:04"))
			}
		}, "no acceptable answer", exitFailed},
		{"software without leave", func(s string) string { return strings.ReplaceAll(s, ", accept-software: true", "") },
			func(r *room, d *dialogue) {
				r.arrive(d, "ca1", "w1", "w2")
				watches(d)
			}, "is software", exitFailed},
		{"another module", func(s string) string {
			i := strings.Index(s, "modules: {soft:")
			i += strings.Index(s[i:], "sha256: ") + len("sha256: ")
			return s[:i] + strings.Repeat("a", 64) + s[i+64:]
		}, nil, "module is not the definition's", exitFailed},
		{"a wrong PIN", nil, func(r *room, d *dialogue) {
			r.arrive(d, "ca1", "w1", "w2")
			watches(d)
			d.wait(`PIN of token online`)
			d.say("0000")
		}, "PIN refused", exitRefused},
		{"before the window", func(s string) string { return shiftWindow(s, 24*time.Hour) }, nil, "outside the ceremony's window", exitFailed},
		{"after the window", func(s string) string { return shiftWindow(s, -24*time.Hour) }, nil, "outside the ceremony's window", exitFailed},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRoom(t, tc.edit)
			d := r.run()
			if tc.talk != nil {
				tc.talk(r, d)
			}
			d.wait(tc.stderr)
			if status := d.exit(); status != tc.status {
				t.Errorf("status %d, want %d", status, tc.status)
			}
			if n := r.countKeys("acme-root"); n != 0 {
				t.Errorf("%d keys were made", n)
			}
		})
	}
}

// shiftWindow moves the definition's window.
func shiftWindow(source string, by time.Duration) string {
	for _, end := range []string{"not-before: ", "not-after: "} {
		before, rest, _ := strings.Cut(source, end)
		at, err := time.Parse(time.RFC3339, rest[:20])
		if err != nil {
			panic(err) // the definition is the test's own
		}
		source = before + end + at.Add(by).Format(time.RFC3339) + rest[20:]
	}
	return source
}

// TestColours: the terminal has them, unless somebody says that it should not.
func TestColours(t *testing.T) {
	r := newRoom(t, nil)
	for i, row := range []struct {
		env  []string
		want bool
	}{{nil, true}, {[]string{"NO_COLOR=1"}, false}, {[]string{"NO_COLOR="}, true}, {[]string{"TERM=dumb"}, false}} {
		cmd := r.command("run", r.def, "--dir", fmt.Sprintf("acme-%d", i))
		cmd.Env = append(append([]string{}, r.env...), row.env...)
		d := inTerminal(t, cmd)
		d.wait(askedWords)
		d.interrupt()
		d.wait("go on with")
		d.exit()
		if d.Coloured() != row.want {
			t.Errorf("%v: coloured: %t", row.env, d.Coloured())
		}
	}
}

// TestProductionNeedsAPerson: neither a pipe nor an answers file stands in for
// people.
func TestProductionNeedsAPerson(t *testing.T) {
	r := newRoom(t, nil)
	out, err := r.command("run", r.def, "--dir", "pipe").CombinedOutput()
	if err == nil || !bytes.Contains(out, []byte(errNoTerminal.Error())) {
		t.Errorf("without a terminal: %v\n%s", err, out)
	}
	answers := r.write("answers.yaml", `"people:ca1": abandon abandon about`+"\n", 0o600)
	d := r.run("--answers", answers)
	d.wait(ceremony.ErrLive.Error())
	if status := d.exit(); status != exitFailed {
		t.Errorf("status %d, want %d", status, exitFailed)
	}
	// A definition for production is rehearsed as it is, by nobody.
	if out, err := r.command("rehearse", r.def, "--dir", "practice").CombinedOutput(); err != nil {
		t.Fatalf("rehearse: %v\n%s", err, out)
	}
	if err := ceremony.Verify(filepath.Join(r.dir, "practice", "out")).Err(); err != nil {
		t.Error(err)
	}
}

// TestAnswersFile: an answers file answers what is not a decision.
func TestAnswersFile(t *testing.T) {
	r := newRoom(t, nil)
	share := strings.Repeat("a1", 32)
	answers := r.write("answers.yaml", "entropy:w1: "+share+"\n", 0o600)
	if out, err := r.command("rehearse", r.def, "--dir", "practice", "--answers", answers).CombinedOutput(); err != nil {
		t.Fatalf("rehearse: %v\n%s", err, out)
	}
	transcript, err := os.ReadFile(filepath.Join(r.dir, "practice", "out", ceremony.TranscriptName))
	if err != nil || !bytes.Contains(transcript, []byte(`"contributor":"w1","value":"`+share)) {
		t.Errorf("the share of the answers file is not in the transcript (%v)", err)
	}
	if _, err := hex.DecodeString(share); err != nil {
		t.Fatal(err)
	}
}

// TestDeclined: a witness who declines leaves too few; the ceremony is over and
// void, and says so.
func TestDeclined(t *testing.T) {
	r := newRoom(t, nil)
	if out, err := r.command("rehearse", r.def, "--dir", "acme", "--answers",
		r.write("answers.yaml", `"witnesses:w2": "decline: I did not see the root token"`+"\n", 0o600)).CombinedOutput(); err == nil ||
		!bytes.Contains(out, []byte(ceremony.ErrDeclined.Error())) {
		t.Fatalf("rehearse: %v\n%s", err, out)
	}
	out, err := r.command("verify", r.out()).CombinedOutput()
	if err == nil || !bytes.Contains(out, []byte("too few witnesses signed")) || !bytes.Contains(out, []byte("declined: w2")) {
		t.Errorf("verify: %v\n%s", err, out)
	}
	if out, err := r.command("resume", r.out()).CombinedOutput(); err == nil {
		t.Errorf("a void ceremony was resumed:\n%s", out)
	}
	text, err := os.ReadFile(filepath.Join(r.out(), ceremony.MarkdownName))
	if err != nil || !bytes.Contains(text, []byte("declined: I did not see the root token")) {
		t.Errorf("the reason is not in the transcript for people (%v)", err)
	}
}

// TestAbort: an aborted ceremony is a signed end.
func TestAbort(t *testing.T) {
	r := newRoom(t, nil)
	d := r.run()
	r.arrive(d, "ca1", "w1", "w2")
	watches(d)
	d.wait(`PIN of token online`)
	d.interrupt()
	d.wait("go on with")
	d.exit()
	a := inTerminal(t, r.command("abort", r.out(), "--as", "ca1", "--reason", "the fire alarm rang"))
	a.wait(`Type the ceremony's id[^>]*> `)
	a.say("acme-genesis-2026")
	for _, id := range []string{"w1", "w2"} {
		a.wait(`Path of the signature[^>]*> `)
		a.say(r.sign(id))
	}
	a.wait("the record of it is in")
	if status := a.exit(); status != 0 {
		t.Errorf("abort: status %d\n%s", status, a.text())
	}
	a.columns()
	out, err := r.command("verify", r.out()).CombinedOutput()
	if err == nil || !strings.Contains(strings.Join(strings.Fields(string(out)), " "), "by ca1: the fire alarm rang") || bytes.Count(out, []byte("FAIL")) != 1 {
		t.Errorf("verify of an aborted ceremony: %v\n%s", err, out)
	}
	status, err := r.command("status", r.out()).CombinedOutput()
	if err != nil || !bytes.Contains(status, []byte("End          aborted")) {
		t.Errorf("status: %v\n%s", err, status)
	}
}

// TestSecondCeremony: neither the folder nor the tokens of a ceremony are used
// twice.
func TestSecondCeremony(t *testing.T) {
	r := newRoom(t, nil)
	if out, err := r.command("rehearse", r.def, "--dir", "acme").CombinedOutput(); err != nil {
		t.Fatalf("rehearse: %v\n%s", err, out)
	}
	out, err := r.command("rehearse", r.def, "--dir", "acme").CombinedOutput()
	if err == nil || !bytes.Contains(out, []byte("not empty")) {
		t.Errorf("the same id in the same folder: %v\n%s", err, out)
	}
	if err := os.RemoveAll(r.out()); err != nil {
		t.Fatal(err)
	}
	// The tokens of the first are there and have keys.
	if out, err := r.command("resume", r.out()).CombinedOutput(); err == nil {
		t.Errorf("resumed without outputs:\n%s", out)
	}
	out, err = r.command("rehearse", r.def, "--dir", "again", "--tokens", "acme").CombinedOutput()
	if err == nil || !bytes.Contains(out, []byte(ceremony.ErrNotEmpty.Error())) {
		t.Errorf("the same tokens: %v\n%s", err, out)
	}
}

func (r *room) read(path string) string {
	r.t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		r.t.Fatal(err)
	}
	return string(content)
}
