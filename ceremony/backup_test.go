package ceremony

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
)

// backupTokens are three tokens: root, its copy, with which it shares a
// wrapping key, and online.
func backupTokens(t testing.TB) (map[string]hsm.Token, hsm.Pairing) {
	t.Helper()
	from, to := hsmtest.NewSoftHSM(t), hsmtest.NewSoftHSM(t)
	officer := func(s hsmtest.SoftHSMToken) pkcs11.Officer {
		return pkcs11.Officer{Module: s.Module, URI: s.URI, PIN: s.SOPIN}
	}
	pairing, err := pkcs11.Pair(t.Context(), "wrapping", officer(from), officer(to))
	if err != nil {
		t.Fatal(err)
	}
	return map[string]hsm.Token{
		DemoRootToken: hsmtest.OpenSoftHSM(t, from), "copy": hsmtest.OpenSoftHSM(t, to), DemoOnlineToken: hsmtest.SoftHSM(t),
	}, pairing
}

const backupKey = `alg: ecdsa-p256, protection: wrapped-backup, backup: {token: copy, wrapping-key: {label: wrapping}}}`

func backupSource(t testing.TB) string {
	return strings.NewReplacer(
		"  online: {uri", "  copy: {uri: \"pkcs11:token=copy\", must-be-empty: true}\n  online: {uri",
		"root-g1:  {token: root,   alg: ecdsa-p256, protection: non-extractable}", "root-g1:  {token: root, "+backupKey,
		"tsa-root: {token: root,   alg: ecdsa-p256, protection: non-extractable}", "tsa-root: {token: root, alg: ecdsa-p256, protection: native-backup}",
	).Replace(string(demoDefinition(t).Source()))
}

// A backed-up root, its drill, and the end of everything, each killed before
// every record and resumed.
func TestBackupDrillDecommission(t *testing.T) {
	l := &life{t: t, now: testNow}
	var pairing hsm.Pairing
	l.tokens, pairing = backupTokens(t)
	resumed := func(source string) {
		t.Helper()
		opts := l.options()
		opts.Resume, opts.Pairing = true, func(string, string) (hsm.Pairing, error) { return pairing, nil }
		for kills := 0; ; kills++ {
			opts.Now = killAfter(3 + kills%5)
			err := l.run(source, opts)
			if err == nil {
				return
			}
			if !errors.Is(err, errKilled) || kills > 100 {
				t.Fatalf("after %d kills: %v", kills, err)
			}
			tear(t, opts.Dir)
		}
	}
	resumed(backupSource(t))
	if n, err := l.tokens["copy"].Keys(t.Context()); n != 1 || err != nil {
		t.Errorf("%d keys in the copy (%v), want 1", n, err)
	}
	if !bytes.Contains(l.read("evidence/root-g1.restored.json"), []byte(`"restored": true`)) {
		t.Error("the evidence does not say restored")
	}
	genesis := l.last.Dir
	t.Run("forged", func(t *testing.T) { forgedBackup(t, genesis) })

	three := func(source string) string {
		return strings.Replace(source, "  online: {uri", "  copy: {uri: \"pkcs11:token=copy\"}\n  online: {uri", 1)
	}
	resumed(three(l.definition("drill-1", RestoreDrill, "drills: [{key: root-g1, token: copy}]\n")))
	if !bytes.Contains(l.read("evidence/root-g1.restored.json"), []byte(`"restored": true`)) {
		t.Error("the drill's evidence does not say restored")
	}

	inter := l.certificate(chainName)
	resumed(three(l.definition("end-1", Decommission, fmt.Sprintf(
		"crl: {valid: 10y, revoked: [{serial: \"%x\", at: 2026-11-22T00:00:00Z, reason: cessationOfOperation}]}\ndestroy: [root, intermediate, ct, rekor, tsa, tsa-root]\n", inter.SerialNumber))))
	for name, want := range map[string]int{DemoRootToken: 0, DemoOnlineToken: 0, "copy": 1} {
		if n, err := l.tokens[name].Keys(t.Context()); n != want || err != nil {
			t.Errorf("%d keys in %s (%v), want %d", n, name, err, want)
		}
	}
	shell(t, l.last.Dir, "openssl", "crl", "-in", crlName, "-CAfile", rootName, "-noout")
	records, err := readTranscriptFile(filepath.Join(l.last.Dir, TranscriptName))
	if err != nil {
		t.Fatal(err)
	}
	def, err := OpenFolder(l.last.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name     string
		typ      RecordType
		old, new string
	}{
		{"another key condemned", Intent, `"spkiSHA256":"`, `"spkiSHA256":"0`},
		{"in another token", Intent, `"label":"`, `"label":"x`},
		{"nobody confirmed", Statement, `"words":"`, `"words":"zoo `},
		{"still there", Done, `"found":0`, `"found":1`},
		{"another key destroyed", Done, `"id":"`, `"id":"0`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			resealedIsRefused(t, def, records, "destroy/root", tc.typ, tc.old, tc.new)
		})
	}
}

func forgedBackup(t *testing.T, dir string) {
	records, err := readTranscriptFile(filepath.Join(dir, TranscriptName))
	if err != nil {
		t.Fatal(err)
	}
	def, err := OpenFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, step string
		typ        RecordType
		old, new   string
	}{
		{"other octets", "backup/root-g1", Intent, `"octets":"`, `"octets":"AAAA`},
		{"another role", "backup/root-g1", Intent, `"role":"root"`, `"role":"tsa-root"`},
		{"another id", "backup/root-g1", Intent, `"id":"`, `"id":"0`},
		{"not restored", "backup/root-g1", Done, `"restored":true,`, ``},
		{"extractable", "backup/root-g1", Done, `"EXTRACTABLE":"false"`, `"EXTRACTABLE":"true"`},
		{"another self-test", "backup/root-g1", Done, `"selfTestText":"`, `"selfTestText":"x`},
		{"another kind", "backup/root-g1", Done, `"kind":"wrapped-backup"`, `"kind":"native-backup"`},
		{"nothing said", "backup/tsa-root", Statement, `"statement":"`, `"statement":" `},
		{"a key that may not leave", "key/root-g1", Intent, `"extractable":true`, `"extractable":false`},
	} {
		t.Run(tc.name, func(t *testing.T) { resealedIsRefused(t, def, records, tc.step, tc.typ, tc.old, tc.new) })
	}
}

func TestBackupDefinitions(t *testing.T) {
	source := backupSource(t)
	l := &life{t: t, id: "genesis-1"}
	drill := l.definition("drill-1", RestoreDrill, "drills: [{key: root-g1, token: root}]\n")
	end := l.definition("end-1", Decommission, "crl: {valid: 1y}\ndestroy: [ct]\n")
	for _, tc := range []struct{ name, source, old, new, want string }{
		{"no second token", source, ", backup: {token: copy, wrapping-key: {label: wrapping}}", "", "second token is missing"},
		{"itself as the second token", source, "backup: {token: copy", "backup: {token: root", "not a second one"},
		{"an unknown second token", source, "backup: {token: copy", "backup: {token: moon", "not a second one"},
		{"no wrapping key", source, "{label: wrapping}", "{}", "label, id and check"},
		{"a backup of a key without one", source, "protection: wrapped-backup", "protection: native-backup", "the protection is not"},
		{"a log's key", source, "ct-1:     {token: online, alg: ecdsa-p256}", "ct-1:     {token: online, alg: ecdsa-p256, protection: wrapped-backup, backup: {token: copy, wrapping-key: {label: wrapping}}}", "has no backup"},
		{"no drill", drill, "drills: [{key: root-g1, token: root}]\n", "", "drills"},
		{"a drill in an unknown token", drill, "token: root}]", "token: moon}]", "unknown, or twice"},
		{"a drill twice", drill, "token: root}]", "token: root}, {key: root-g1, token: root}]", "unknown, or twice"},
		{"a drill in a genesis", source, "outputs:", "drills: [{key: root-g1, token: root}]\noutputs:", "drills"},
		{"nothing to destroy", end, "destroy: [ct]\n", "", "destroy"},
		{"an unknown role", end, "[ct]", "[cat]", "unknown, or twice"},
		{"a role twice", end, "[ct]", "[ct, ct]", "unknown, or twice"},
		{"no last list", end, "crl: {valid: 1y}\n", "", "last list"},
		{"destroying in a genesis", source, "outputs:", "destroy: [ct]\noutputs:", "destroy"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := ParseDefinition([]byte(tc.source)); err != nil {
				t.Fatalf("before the change: %v", err)
			}
			changed := strings.Replace(tc.source, tc.old, tc.new, 1)
			if changed == tc.source {
				t.Fatalf("the definition has no %q", tc.old)
			}
			if _, err := ParseDefinition([]byte(changed)); !errors.Is(err, ErrDefinition) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
}
