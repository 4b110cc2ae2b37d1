package ceremony

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sigstore/sigstore-go/pkg/root"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// TestOutputs looks at one ceremony's outputs in every way.
func TestOutputs(t *testing.T) {
	d, res, opts := rehearsed(t)
	for name, test := range map[string]func(*testing.T, *Definition, *Result, Options){
		"tampered with":         verifyTamper,
		"resealed":              verifyResealedChain,
		"read by programs":      outputsByOtherPrograms,
		"root serial by script": rootSerialByScript,
		"read by sigstore-go":   outputsBySigstore,
		"complete":              outputsComplete,
	} {
		t.Run(name, func(t *testing.T) { test(t, d, res, opts) })
	}
}

// Every output, changed anywhere, is noticed: every octet by the comparison
// with what follows from the records, and a sample by the whole of Verify,
// which for the transcript is all there is.
func verifyTamper(t *testing.T, d *Definition, res *Result, opts Options) {
	if err := Verify(opts.Dir).Err(); err != nil {
		t.Fatal(err)
	}
	records, err := readTranscriptFile(filepath.Join(opts.Dir, TranscriptName))
	if err != nil {
		t.Fatal(err)
	}
	f := factsOf(t, d)
	if err := f.replay(records); err != nil {
		t.Fatal(err)
	}
	files, err := f.allFiles(records)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != len(fileNames(res)) {
		t.Fatalf("%d files, the ceremony wrote %d", len(files), len(fileNames(res)))
	}
	for _, file := range files {
		path := filepath.Join(opts.Dir, file.Name)
		tamperEach(t, opts.Dir, path, file)
		for name, damage := range damages {
			damage(t, path, file.content)
			err := file.compare(opts.Dir)
			if strings.HasPrefix(name, "changed") {
				err = Verify(opts.Dir).Err()
			}
			if err == nil {
				t.Errorf("%s %s: accepted", file.Name, name)
			}
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
			rewrite(t, path, file.content)
		}
	}
	if err := Verify(opts.Dir).Err(); err != nil {
		t.Errorf("after all was put back: %v", err)
	}
}

// tamperEach flips a bit of every octet of a file, in place.
func tamperEach(t *testing.T, dir, path string, file File) {
	t.Helper()
	w, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	step := 1
	if file.Size > 8192 {
		step = file.Size / 512 // a sample of large files
	}
	for i := 0; i < file.Size; i += step {
		if _, err := w.WriteAt([]byte{file.content[i] ^ 1}, int64(i)); err != nil {
			t.Fatal(err)
		}
		if err := file.compare(dir); err == nil {
			t.Fatalf("%s with octet %d changed is accepted", file.Name, i)
		}
		if _, err := w.WriteAt(file.content[i:i+1], int64(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := file.compare(dir); err != nil {
		t.Fatal(err)
	}
}

// damages are what happens to a file besides.
var damages = map[string]func(t *testing.T, path string, content []byte){
	"changed in the middle": func(t *testing.T, path string, content []byte) {
		changed := bytes.Clone(content)
		changed[len(changed)/2] ^= 1
		rewrite(t, path, changed)
	},
	"cut short":   func(t *testing.T, path string, content []byte) { rewrite(t, path, content[:len(content)-1]) },
	"with a tail": func(t *testing.T, path string, content []byte) { rewrite(t, path, append(bytes.Clone(content), '\n')) },
	"empty":       func(t *testing.T, path string, _ []byte) { rewrite(t, path, nil) },
	"missing":     func(t *testing.T, path string, _ []byte) { remove(t, path) },
	"a link":      func(t *testing.T, path string, _ []byte) { remove(t, path); link(t, path) },
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func link(t *testing.T, path string) {
	t.Helper()
	if err := os.Symlink("/etc/passwd", path); err != nil {
		t.Fatal(err)
	}
}

func rewrite(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o644); err != nil {
		t.Fatal(err)
	}
}

// A forger who changes a record can seal the chain again from there on. What
// the records say must still follow from one another.
func verifyResealedChain(t *testing.T, d *Definition, _ *Result, opts Options) {
	records, err := readTranscriptFile(filepath.Join(opts.Dir, TranscriptName))
	if err != nil {
		t.Fatal(err)
	}
	index := func(step string, typ RecordType) int {
		for i, r := range records {
			if r.Step == step && r.Type == typ {
				return i
			}
		}
		t.Fatalf("no %s of %s", typ, step)
		return 0
	}
	replaced := func(old, new string) func(*Record) {
		return func(r *Record) {
			data := strings.Replace(string(r.Data), old, new, 1)
			if data == string(r.Data) {
				t.Fatalf("record %d has no %q", r.Seq, old)
			}
			r.Data = json.RawMessage(data)
		}
	}
	key := records[index("key/ct-1", Done)]
	var made keyResult
	if err := key.decode(&made); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		at     int
		change func(*Record)
	}{
		{"another definition", index("open", Done), replaced(`"definitionSHA256":"`, `"definitionSHA256":"0`)},
		{"an unknown field", index("open", Done), replaced(`{`, `{"extra":1,`)},
		{"keys on an empty token", index("inventory/root", Done), replaced(`"keys":0`, `"keys":1`)},
		{"hardware in a rehearsal", index("inventory/root", Done), replaced(`SoftHSM v2`, `Luna`)},
		{"a worse random source", index("self-test/root", Done), replaced(`"longestRun":`, `"longestRun":1`)},
		{"another seed", index("entropy", Done), replaced(`"seed":"`, `"seed":"00`)},
		{"another share", index("entropy", Done), replaced(`"value":"`, `"value":"00`)},
		{"a contributor left out", index("entropy", Statement), func(r *Record) { r.Actor = "w2" }},
		{"a person who was not there", index("people", Statement), replaced(`"present":true`, `"present":false`)},
		{"a stranger", index("people", Statement), func(r *Record) { r.Actor = "w9" }},
		{"other words", index("people", Statement), replaced(`"words":"`, `"words":"zoo `)},
		{"another watch", index("clock", Statement), replaced(`"watch":"12:00"`, `"watch":"11:00"`)},
		{"nobody confirmed", index("certificate/root", Statement), replaced(`"words":"`, `"words":"zoo `)},
		{"another checkpoint", index("checkpoint", Done), replaced(`"size":`, `"size":1`)},
		{"another signature", index("witnesses", Statement), replaced(`AAAA`, `AAAB`)},
		{"a witness who declined", index("witnesses", Done), replaced(`"signed":["w1","w2"]`, `"signed":["w1"]`)},
		{"a key by another id", index("key/ct-1", Intent), replaced(`"id":"`, `"id":"00`)},
		{"a key with another role", index("key/ct-1", Intent), replaced(`"role":"ct"`, `"role":"tsa"`)},
		{"an extractable key", index("key/ct-1", Done), replaced(`"EXTRACTABLE":"false"`, `"EXTRACTABLE":"true"`)},
		{"another self-test", index("key/ct-1", Done), replaced(`self-test of key`, `self-test of a key`)},
		{"a repeated r", index("key/ct-1", Done), replaced(`"distinctR":64`, `"distinctR":63`)},
		{"another serial number", index("certificate/root", Intent), replaced(`"serial":"`, `"serial":"4`)},
		{"a longer life", index("certificate/inter", Intent), replaced(`"notAfter":"2029`, `"notAfter":"2030`)},
		{"another certificate", index("certificate/inter", Done), replaced(`"sha256":"`, `"sha256":"0`)},
		{"another file", index("outputs", Intent), replaced(`"sha256":"`, `"sha256":"0`)},
		{"another end", index("close", Done), replaced(`complete`, `declined`)},
		{"a step of another ceremony", index("close", Done), func(r *Record) { r.Step = "party" }},
		{"the token's key in place of another", index("key/rekor-1", Done), func(r *Record) { r.Data = key.Data }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			forged := append([]Record(nil), records...)
			tc.change(&forged[tc.at])
			for i := tc.at; i < len(forged); i++ {
				if i > 0 {
					forged[i].Prev = forged[i-1].Hash
				}
				forged[i] = reseal(t, forged[i])
			}
			if err := factsOf(t, d).replay(forged); err == nil {
				t.Error("the forged records were accepted")
			}
		})
	}
}

func TestVerifyIncomplete(t *testing.T) {
	d := demoDefinition(t)
	opts := Options{Tokens: twoTokens(t), Dir: filepath.Join(t.TempDir(), "out"), Now: killAfter(8)}
	if _, err := Rehearse(context.Background(), d, opts); !errors.Is(err, errKilled) {
		t.Fatal(err)
	}
	if err := Verify(opts.Dir).Err(); !errors.Is(err, ErrVerify) {
		t.Errorf("an interrupted ceremony: %v, want ErrVerify", err)
	}
	if err := Verify(t.TempDir()).Err(); !errors.Is(err, ErrVerify) {
		t.Errorf("an empty folder: %v, want ErrVerify", err)
	}
}

// shell runs a command in dir and returns its output.
func shell(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		hsmtest.Missing(t, name+" is not installed")
	}
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Programs that we did not write accept the certificates and the checksums.
func outputsByOtherPrograms(t *testing.T, _ *Definition, _ *Result, opts Options) {
	at := []string{"-attime", "1795348800"} // testNow + 1 day
	shell(t, opts.Dir, "openssl", append([]string{"verify", "-x509_strict", "-purpose", "any", "-CAfile", "root.pem"}, append(at, "intermediate.pem")...)...)
	shell(t, opts.Dir, "openssl", append([]string{"verify", "-x509_strict", "-CAfile", "chain.pem"}, append(at, "chain.pem")...)...)
	shell(t, opts.Dir, "openssl", append([]string{"verify", "-x509_strict", "-purpose", "timestampsign", "-CAfile", "tsa-chain.pem"}, append(at, "tsa-chain.pem")...)...)
	shell(t, opts.Dir, "openssl", "pkey", "-pubin", "-in", "ct.pub", "-noout")
	shell(t, opts.Dir, "sha256sum", "--strict", "-c", ChecksumsName)
	if out := shell(t, opts.Dir, "openssl", "x509", "-in", "chain.pem", "-noout", "-subject"); !strings.Contains(strings.ReplaceAll(out, " = ", "="), "CN="+RehearsalPrefix) {
		t.Errorf("a rehearsal's certificate is called %s", out)
	}
}

// serialScript is the ten-line script of the specification: it follows the
// transcript to the root's serial number and needs nothing of this package.
const serialScript = `
import hashlib, json
seed = record = None
prev = "0" * 64
for line in open("transcript.jsonl", "rb"):
    r = json.loads(line)
    assert r["prev"] == prev
    prev = r.pop("hash")
    jcs = json.dumps(r, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert hashlib.sha256(b"\0" + jcs).hexdigest() == prev
    if r["step"] == "entropy" and r["type"] == "result":
        record, seed = bytes.fromhex(prev), bytes.fromhex(r["data"]["seed"])
s = bytearray(hashlib.sha256(b"chancery root serial v1\0" + record + seed).digest()[:20])
s[0] = s[0] & 0x7f | 0x40
print(s.hex())
`

func rootSerialByScript(t *testing.T, _ *Definition, res *Result, opts Options) {
	got, ok := new(big.Int).SetString(strings.TrimSpace(shell(t, opts.Dir, "python3", "-c", serialScript)), 16)
	if want := res.Certificates["root"].SerialNumber; !ok || got.Cmp(want) != 0 {
		t.Errorf("the script finds serial %x, the root has %x", got, want)
	}
	if n := len(res.Certificates["root"].SerialNumber.Bytes()); n != 20 {
		t.Errorf("the serial has %d octets, want 20", n)
	}
}

// sigstore-go, the clients' library, reads what the ceremony writes.
func outputsBySigstore(t *testing.T, d *Definition, res *Result, opts Options) {
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(opts.Dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	tr, err := root.NewTrustedRootFromJSON(read("trusted_root.json"))
	if err != nil {
		t.Fatal(err)
	}
	if n := len(tr.FulcioCertificateAuthorities()); n != 1 {
		t.Errorf("%d certificate authorities", n)
	}
	ca := tr.FulcioCertificateAuthorities()[0].(*root.FulcioCertificateAuthority)
	if !ca.Root.Equal(res.Certificates["root"]) || len(ca.Intermediates) != 1 || !ca.Intermediates[0].Equal(res.Certificates["inter"]) {
		t.Error("the certificate authority is not root and inter")
	}
	tsa := tr.TimestampingAuthorities()[0].(*root.SigstoreTimestampingAuthority)
	if !tsa.Leaf.Equal(res.Certificates["tsa"]) || !tsa.Root.Equal(res.Certificates["tsa-root"]) {
		t.Error("the timestamp authority is not tsa and tsa-root")
	}
	for id, l := range tr.RekorLogs() {
		spki := res.Keys.Keys[hsm.RoleRekor].SPKI
		if id != hexOf(spki) || l.BaseURL != d.LogURL(hsm.RoleRekor) || l.ValidityPeriodStart.IsZero() {
			t.Errorf("log %s at %s", id, l.BaseURL)
		}
	}
	for id := range tr.CTLogs() {
		if id != hexOf(res.Keys.Keys[hsm.RoleCT].SPKI) {
			t.Errorf("CT log %s", id)
		}
	}
	sc, err := root.NewSigningConfigFromPath(filepath.Join(opts.Dir, "signing_config.v0.2.json"))
	if err != nil {
		t.Fatal(err)
	}
	rekor, err := root.SelectService(sc.RekorLogURLs(), []uint32{1, 2}, testNow)
	if err != nil || rekor.URL != d.Service.URL || rekor.MajorAPIVersion != 2 {
		t.Errorf("Rekor service %+v, %v", rekor, err)
	}
	if _, err := root.SelectServices(sc.TimestampAuthorityURLs(), sc.TimestampAuthorityURLsConfig(), []uint32{1}, testNow); err != nil {
		t.Errorf("timestamp service: %v", err)
	}
	var client struct {
		TrustedRoot   json.RawMessage `json:"trustedRoot"`
		SigningConfig json.RawMessage `json:"signingConfig"`
	}
	if err := json.Unmarshal(read("client_trust_config.json"), &client); err != nil {
		t.Fatal(err)
	}
	if _, err := root.NewTrustedRootFromJSON(client.TrustedRoot); err != nil {
		t.Error(err)
	}
	for _, word := range []string{"checkpointKeyId", "operator"} {
		if bytes.Contains(read("trusted_root.json"), []byte(word)) {
			t.Errorf("trusted_root.json has %s, which clients misread", word)
		}
	}
}

// factsOf knows nothing yet but the plan.
func factsOf(t testing.TB, d *Definition) *facts {
	t.Helper()
	steps, err := Plan(d)
	if err != nil {
		t.Fatal(err)
	}
	return newFacts(d, steps)
}

// fileNames lists every file of a complete ceremony.
func fileNames(res *Result) []string {
	names := []string{ChecksumsName}
	for _, f := range res.Files {
		names = append(names, f.Name)
	}
	return names
}

func hexOf(h [sha256.Size]byte) string { return hex.EncodeToString(h[:]) }
