package ceremony

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	sigbundle "github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/tlog"
	"github.com/sigstore/sigstore-go/pkg/verify"

	"github.com/chancery-ca/chancery/ca/tsa"
	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/ceremony/trust/tuf"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// life is a Chancery whose ceremonies follow one another, on two tokens.
type life struct {
	t       testing.TB
	tokens  map[string]hsm.Token
	last    Options // of the newest ceremony
	id      string
	head    [sha256.Size]byte
	now     time.Time
	custody map[string]hsm.Key // custodians' keys
}

// begin is the genesis. tufSection is put into its definition.
func begin(t testing.TB, tufSection string) *life {
	t.Helper()
	l := &life{t: t, tokens: twoTokens(t), now: testNow, custody: map[string]hsm.Key{}}
	for _, id := range []string{"c1", "c2", "c3", "c4"} {
		l.custody[id] = hsmtest.SoftwareKey(hsm.ECDSAP256)
	}
	source := string(demoDefinition(t).Source())
	if tufSection != "" {
		source = strings.NewReplacer("  tsa-1:    {", "  tuf-online: {token: online, alg: ecdsa-p256}\n  tsa-1:    {",
			"service:\n", tufSection+"service:\n").Replace(source)
	}
	l.mustRun(source)
	return l
}

// custodiansOf is the tuf section with these custodians.
func custodiansOf(ids ...string) string {
	text := "tuf:\n  threshold: 2\n  root-expires: 1y\n  timestamp-expires: 7d\n  custodians:\n"
	return text + custodianLines(ids...)
}

func custodianLines(ids ...string) string {
	text := ""
	for _, id := range ids {
		text += fmt.Sprintf("    - {id: %s, key: \"pkcs11:token=%s\", spki-sha256: %q}\n", id, id, strings.Repeat(fmt.Sprintf("%02x", id[len(id)-1]), 32))
	}
	return text
}

// clock stands still at the day that it is now.
func (l *life) clock() func() (time.Time, error) {
	now := l.now
	return func() (time.Time, error) { return now, nil }
}

func (l *life) options() Options {
	return Options{
		Tokens: l.tokens, Dir: filepath.Join(memoryFolder(l.t), "out"), Previous: l.last.Dir,
		Now:       l.clock(),
		Custodian: func(_ context.Context, id string) (hsm.Key, error) { return l.custody[id], nil },
	}
}

// run performs the next ceremony and, when it is complete, makes it the newest.
func (l *life) run(source string, opts Options) error {
	l.t.Helper()
	d, err := ParseDefinition([]byte(source))
	if err != nil {
		return err
	}
	res, err := Rehearse(l.t.Context(), d, opts)
	if err != nil {
		return err
	}
	if err := Verify(opts.Dir).Err(); err != nil {
		return err
	}
	l.last, l.id, l.head = opts, d.ID, res.Head
	return nil
}

func (l *life) mustRun(source string) {
	l.t.Helper()
	if err := l.run(source, l.options()); err != nil {
		l.t.Fatal(err)
	}
}

func (l *life) read(name string) []byte {
	l.t.Helper()
	return contentOf(l.t, filepath.Join(l.last.Dir, name))
}

// definition is the beginning of a later ceremony's definition.
func (l *life) definition(id string, kind Kind, rest string) string {
	return fmt.Sprintf(`version: 1
id: %s
kind: %s
environment: rehearsal
previous: {ceremony: %s, heads: ["%x"]}
people:
  - {id: a1, role: administrator, name: The Administrator}
  - {id: w1, role: witness, name: First Witness}
quorum: {witness: 1}
tokens:
  root:   {uri: "pkcs11:token=root"}
  online: {uri: "pkcs11:token=online"}
entropy: {mode: commit-reveal, contributors: [w1]}
outputs: {dir: out}
`, id, kind, l.id, l.head) + rest
}

const newIntermediate = `rotation: {overlap: 7d}
keys:
  inter-g2: {token: online, alg: ecdsa-p256}
certificates:
  inter-g2: {key: inter-g2, issuer: root, subject: {o: Chancery Demo, cn: Sigstore Intermediate G2}, years: 3, path-len: 0, eku: [codeSigning]}
`

func (l *life) certificate(name string) *x509.Certificate {
	l.t.Helper()
	chain, err := certificatesIn(l.read(name), 2)
	if err != nil {
		l.t.Fatal(err)
	}
	return chain[0]
}

func (l *life) key(role hsm.Role) hsm.Key {
	l.t.Helper()
	ring, err := trust.ParseKeyRing(l.read(keysName))
	if err != nil {
		l.t.Fatal(err)
	}
	k := ring.Keys[role]
	key, err := l.tokens[k.Token].Open(context.Background(), k.Ref(), role)
	if err != nil {
		l.t.Fatal(err)
	}
	return key
}

// signed is a signature by a key under a leaf of the intermediate, with a
// timestamp of the authority: both of the newest ceremony, by keys in tokens.
type signed struct {
	leaf      *x509.Certificate
	signature []byte
	stamp     []byte
}

var artefact = []byte("something worth signing\n")

const signerName = "alice@acme.example"

func (l *life) sign() *signed {
	l.t.Helper()
	check := func(err error) {
		l.t.Helper()
		if err != nil {
			l.t.Fatal(err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(l.now.Unix()), NotBefore: l.now.Add(-time.Minute), NotAfter: l.now.Add(9 * time.Minute),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}, EmailAddresses: []string{signerName},
	}, l.certificate(chainName), key.Public(), l.key(hsm.RoleIntermediate))
	check(err)
	leaf, err := x509.ParseCertificate(der)
	check(err)
	digest := sha256.Sum256(artefact)
	sig, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	check(err)
	return &signed{leaf, sig, l.stamp(sig)}
}

// stamp is a timestamp of the authority over a signature.
func (l *life) stamp(sig []byte) []byte {
	l.t.Helper()
	chain, err := certificatesIn(l.read(tsaChainName), 2)
	if err != nil {
		l.t.Fatal(err)
	}
	authority, err := tsa.New(tsa.Config{Key: l.key(hsm.RoleTSA), Chain: chain, Now: l.clock()})
	if err != nil {
		l.t.Fatal(err)
	}
	imprint := sha256.Sum256(sig)
	stamp, err := authority.Timestamp(l.t.Context(), &tsa.Request{Hash: crypto.SHA256, Digest: imprint[:]})
	if err != nil {
		l.t.Fatal(err)
	}
	return stamp
}

// The parts of verify.SignedEntity.

func (s *signed) HasInclusionPromise() bool { return false }
func (s *signed) HasInclusionProof() bool   { return false }
func (s *signed) SignatureContent() (verify.SignatureContent, error) {
	digest := sha256.Sum256(artefact)
	return sigbundle.NewMessageSignature(digest[:], "SHA2_256", s.signature), nil
}
func (s *signed) Timestamps() ([][]byte, error) { return [][]byte{s.stamp}, nil }
func (s *signed) VerificationContent() (verify.VerificationContent, error) {
	return sigbundle.NewCertificate(s.leaf), nil
}

// verify checks a signature with the newest trusted_root.json, as sigstore-go
// does.
func (l *life) verify(s *signed) error {
	l.t.Helper()
	trusted, err := root.NewTrustedRootFromJSON(l.read(trustedRootName))
	if err != nil {
		return err
	}
	v, err := verify.NewVerifier(trusted, verify.WithSignedTimestamps(1))
	if err != nil {
		return err
	}
	_, err = v.Verify(&entity{s}, verify.NewPolicy(verify.WithArtifact(bytes.NewReader(artefact)), verify.WithoutIdentitiesUnsafe()))
	return err
}

// entity adds what only a log would have.
type entity struct{ *signed }

func (e *entity) TlogEntries() ([]*tlog.Entry, error) { return nil, nil }
func (e *entity) Version() (string, error)            { return "v0.3", nil }

// The whole life of a Chancery: what was signed before every change verifies
// after it.
func TestRotate(t *testing.T) {
	l := begin(t, "")
	genesis := l.last.Dir
	first := l.sign()
	if err := l.verify(first); err != nil {
		t.Fatal(err)
	}
	oldInter, oldRekor := l.certificate(chainName), l.key(hsm.RoleRekor)

	l.now = l.now.AddDate(0, 1, 0)
	l.mustRun(l.definition("rotate-1", Rotate, newIntermediate))
	second := l.sign()
	for name, s := range map[string]*signed{"before": first, "after": second} {
		if err := l.verify(s); err != nil {
			t.Errorf("signature of %s the rotation: %v", name, err)
		}
	}
	if second.leaf.CheckSignatureFrom(oldInter) == nil {
		t.Error("the new leaf is of the old intermediate")
	}

	l.now = l.now.AddDate(0, 0, 8) // the overlap is over
	if err := l.verify(l.signedBy(oldInter, genesis)); err == nil {
		t.Error("a signature of the old intermediate after its end verifies")
	}

	l.now = l.now.AddDate(0, 1, 0)
	l.mustRun(l.definition("crl-2", CRL, fmt.Sprintf("crl: {valid: 30d, revoked: [{serial: \"%x\", at: %s, reason: superseded}]}\n",
		oldInter.SerialNumber, l.now.Add(-time.Hour).Format(time.RFC3339))))
	list, err := parseCRL(l.read(crlName), l.certificate2(rootName))
	if err != nil {
		t.Fatal(err)
	}
	if n := len(list.RevokedCertificateEntries); n != 1 || list.RevokedCertificateEntries[0].SerialNumber.Cmp(oldInter.SerialNumber) != 0 || list.Number.Uint64() != 2 {
		t.Errorf("list %s of %d", list.Number, n)
	}
	if out := shell(t, l.last.Dir, "openssl", "crl", "-in", crlName, "-CAfile", rootName, "-noout", "-text"); !strings.Contains(out, strings.ToUpper(oldInter.SerialNumber.Text(16))) || !strings.Contains(out, "verify OK") {
		t.Errorf("openssl: %s", out)
	}

	l.now = l.now.AddDate(0, 1, 0)
	checkpoint := signedCheckpoint(t, oldRekor, 42)
	opts := l.options()
	opts.People = &Prepared{Answers: map[string]string{"freeze/rekor": placed(t, checkpoint)}, Next: Practice{}}
	if err := l.run(l.definition("log-key-3", LogKey, `rotation: {overlap: 1d}
keys: {rekor-2: {token: online, alg: ecdsa-p256}}
service: {logs: {rekor: {shard: log2}}}
`), opts); err != nil {
		t.Fatal(err)
	}
	trusted, err := trust.ParseRoot(l.read(trustedRootName))
	if err != nil {
		t.Fatal(err)
	}
	if n := len(trusted.Logs); n != 2 || trusted.Logs[0].Validity.End.IsZero() || !trusted.Logs[1].Validity.End.IsZero() || !strings.HasSuffix(trusted.Logs[1].BaseURL, "/log/log2") {
		t.Errorf("%d logs: %+v", n, trusted.Logs)
	}
	frozen, err := filepath.Glob(filepath.Join(l.last.Dir, "frozen", "*.checkpoint"))
	if err != nil || len(frozen) != 1 || !bytes.Equal(contentOf(t, frozen[0]), checkpoint) {
		t.Errorf("frozen %v, %v", frozen, err)
	}

	l.now = l.now.AddDate(0, 1, 0)
	earlier := *l
	l.mustRun(l.definition("rekey-4", Rotate, `rotation: {overlap: 7d}
keys:
  root-g2:  {token: root,   alg: ecdsa-p384}
  inter-g3: {token: online, alg: ecdsa-p256}
  tsa-2:    {token: online, alg: ecdsa-p256}
certificates:
  root-g2:  {key: root-g2, self-signed: true, subject: {o: Chancery Demo, cn: Sigstore Root G2}, years: 10, path-len: 1}
  inter-g3: {key: inter-g3, issuer: root-g2, subject: {o: Chancery Demo, cn: Sigstore Intermediate G3}, years: 3, path-len: 0, eku: [codeSigning]}
  tsa-2:    {key: tsa-2, issuer: tsa-root, subject: {o: Chancery Demo, cn: Timestamping G2}, years: 3, eku: [timeStamping]}
`))
	third := l.sign()
	for name, s := range map[string]*signed{"the first": first, "the second": second, "the third": third} {
		if err := l.verify(s); err != nil {
			t.Errorf("%s generation's signature with the newest trusted root: %v", name, err)
		}
	}
	if trusted, err = trust.ParseRoot(l.read(trustedRootName)); err != nil || len(trusted.CertificateAuthorities) != 3 || len(trusted.TimestampAuthorities) != 2 {
		t.Errorf("%d certificate authorities, %d for timestamps, %v", len(trusted.CertificateAuthorities), len(trusted.TimestampAuthorities), err)
	}
	for days, good := range map[int]bool{6: true, 8: false} { // the overlap is 7
		late := *l
		late.now = l.now.AddDate(0, 0, days)
		earlier.now = late.now
		s := late.sign()
		if err := late.verify(s); err != nil {
			t.Errorf("timestamp of the new authority after %d days: %v", days, err)
		}
		s.stamp = earlier.stamp(s.signature)
		if err := late.verify(s); (err == nil) != good {
			t.Errorf("timestamp of the old authority after %d days: %v, want it good: %t", days, err, good)
		}
	}
	rotatedIsTamperProof(t, l)
}

// certificate2 reads a file with one certificate.
func (l *life) certificate2(name string) *x509.Certificate {
	l.t.Helper()
	certs, err := certificatesIn(l.read(name), 1)
	if err != nil {
		l.t.Fatal(err)
	}
	return certs[0]
}

// signedBy signs with the intermediate of an earlier ceremony, at this time.
func (l *life) signedBy(_ *x509.Certificate, dir string) *signed {
	l.t.Helper()
	old := *l
	old.last.Dir = dir
	return old.sign()
}

// signedCheckpoint is a note as a Rekor v2 log signs it.
func signedCheckpoint(t testing.TB, key hsm.Key, size int) []byte {
	t.Helper()
	text := fmt.Sprintf("127.0.0.1\n%d\n%s\n", size, base64.StdEncoding.EncodeToString(make([]byte, 32)))
	digest := sha256.Sum256([]byte(text))
	sig, err := key.SignContext(t.Context(), digest[:], hsm.ECDSAP256.Hash())
	if err != nil {
		t.Fatal(err)
	}
	spki := key.Ref().SPKI
	return []byte(text + "\n— 127.0.0.1 " + base64.StdEncoding.EncodeToString(append(spki[:4:4], sig...)) + "\n")
}

// rotatedIsTamperProof changes every output of the newest ceremony.
func rotatedIsTamperProof(t *testing.T, l *life) {
	records, err := readTranscriptFile(filepath.Join(l.last.Dir, TranscriptName))
	if err != nil {
		t.Fatal(err)
	}
	def, err := OpenFolder(l.last.Dir)
	if err != nil {
		t.Fatal(err)
	}
	f := factsOf(t, def)
	if err := f.replay(records); err != nil {
		t.Fatal(err)
	}
	files, err := f.allFiles(records)
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		tamperEach(t, l.last.Dir, filepath.Join(l.last.Dir, file.Name), file)
	}
	for _, tc := range []struct {
		name, step string
		typ        RecordType
		old, new   string
	}{
		{"another ceremony before", "previous", Done, `"ceremony":"`, `"ceremony":"x`},
		{"another head before", "previous", Done, `"head":"`, `"head":"0`},
		{"another file before", "previous", Done, `"content":"`, `"content":"AAAA`},
		{"a file left out", "previous", Done, `"name":"chain.pem"`, `"name":"chain.pen"`},
		{"another list", "crl", Intent, `"number":1`, `"number":2`},
		{"a list for longer", "crl", Intent, `"nextUpdate":"20`, `"nextUpdate":"21`},
		{"other words", "crl", Statement, `"words":"`, `"words":"zoo `},
		{"another signature", "crl", Done, `"sha256":"`, `"sha256":"0`},
	} {
		t.Run(tc.name, func(t *testing.T) { resealedIsRefused(t, def, records, tc.step, tc.typ, tc.old, tc.new) })
	}
}

// Killed before every record and resumed, a rotation gives one key for each name
// and outputs that verify.
func TestRotateResumed(t *testing.T) {
	l := begin(t, "")
	source := l.definition("rotate-1", Rotate, newIntermediate+"crl: {valid: 1y}\n")
	opts := l.options()
	opts.Resume = true
	kills := 0
	for ; ; kills++ {
		opts.Now = killAfter(2 + kills%3)
		err := l.run(source, opts)
		if err == nil {
			break
		}
		if !errors.Is(err, errKilled) || kills > 60 {
			t.Fatalf("after %d kills: %v", kills, err)
		}
		tear(t, opts.Dir)
	}
	if n, err := l.tokens[DemoOnlineToken].Keys(t.Context()); kills < 8 || n != 5 || err != nil {
		t.Errorf("%d kills, %d keys online (%v), want 5", kills, n, err)
	}
}

// The custodians sign the next root of the TUF repository, and new custodians
// follow the old ones.
func TestRotateTUF(t *testing.T) {
	l := begin(t, custodiansOf("c1", "c2"))
	if err := l.run(l.definition("rotate-1", Rotate, newIntermediate), l.options()); !errors.Is(err, ErrDefinition) {
		t.Errorf("without custodians: %v, want ErrDefinition", err)
	}
	l.now = l.now.AddDate(0, 1, 0)
	l.mustRun(l.definition("rotate-1", Rotate, newIntermediate+custodiansOf("c3", "c4")+
		"  leaving:\n"+custodianLines("c1", "c2")))
	repository, err := tuf.Load(filepath.Join(l.last.Dir, "tuf"))
	if err != nil {
		t.Fatal(err)
	}
	if v := repository.Root().Version; v != 2 || repository.TargetsVersion() != 2 {
		t.Errorf("root %d, targets %d, want 2 and 2", v, repository.TargetsVersion())
	}
	if !bytes.Equal(repository.Target(tuf.TrustedRootTarget), l.read(trustedRootName)) {
		t.Error("the repository has another trusted root")
	}
	if err := repository.Expired(l.now); err != nil {
		t.Error(err)
	}
}

// Custodians leave with their own signature, brought as a file: the root in force
// needs its threshold too. What could never be signed is refused before anybody
// signs.
func TestLeavingCustodians(t *testing.T) {
	l := begin(t, custodiansOf("c1", "c2"))
	l.now = l.now.AddDate(0, 1, 0)
	attempts := 0
	leaving := func(next []string, ids ...string) string { // the token keeps each attempt's key
		attempts++
		return strings.ReplaceAll(newIntermediate, "inter-g2", fmt.Sprintf("inter-a%d", attempts)) + custodiansOf(next...) + "  leaving:\n" + custodianLines(ids...)
	}
	for _, tc := range []struct {
		name, rest, want string
	}{
		{"one of the old is missing", leaving([]string{"c3", "c4"}, "c1"), "1 of the custodians of root 1 sign, it takes 2"},
		{"one leaves who never was", leaving([]string{"c1", "c2"}, "c3"), "custodian c3 cannot leave: in root 1 false"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			opts := l.options()
			err := l.run(l.definition("rotate-1", Rotate, tc.rest), opts)
			if !errors.Is(err, ErrCustodians) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
			// It is not on record, so the ceremony is sound and can be ended.
			state, err := ReadStatus(opts.Dir)
			if err != nil {
				t.Fatal(err)
			}
			if step := state.Steps[state.Done].Kind; step != StepCustodians {
				t.Errorf("it stands at %s, want %s", step, StepCustodians)
			}
		})
	}

	// c1 signs elsewhere.
	source := l.definition("rotate-1", Rotate, leaving([]string{"c3", "c4"}, "c1", "c2"))
	opts := l.options()
	away := l.custody["c1"]
	der, err := x509.MarshalPKIXPublicKey(away.Public())
	if err != nil {
		t.Fatal(err)
	}
	delete(l.custody, "c1")
	opts.People = &Prepared{Next: Practice{}, Answers: map[string]string{
		"custodians:c1": string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), "tuf:c1": later,
	}}
	if err := l.run(source, opts); !errors.Is(err, ErrCustodians) || !strings.Contains(err.Error(), "1 of 2 signatures of the custodians of root 1") {
		t.Fatalf("without c1: error %v, want ErrCustodians", err)
	}
	repository, err := tuf.Load(filepath.Join(l.last.Dir, "tuf"))
	if err != nil {
		t.Fatal(err)
	}
	signature := func(name string, parse func([]byte) (*tuf.Draft, error)) string {
		t.Helper()
		draft, err := parse(contentOf(t, filepath.Join(opts.Dir, draftsFolder, name)))
		if err != nil {
			t.Fatal(err)
		}
		sig, err := draft.Sign(t.Context(), away)
		if err != nil {
			t.Fatal(err)
		}
		line, err := sig.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return string(line)
	}
	last := signature("2.root.json", func(data []byte) (*tuf.Draft, error) { return tuf.ReadRootDraft(data, repository.Root()) })
	opts.Resume = true
	for _, answer := range []string{last + last, "{}", "/nowhere"} {
		opts.People = &Prepared{Next: Practice{}, Answers: map[string]string{"tuf:c1": strings.TrimSuffix(answer, "\n")}}
		if err := l.run(source, opts); !errors.Is(err, ErrAnswer) {
			t.Errorf("answer %.20q: error %v, want ErrAnswer", answer, err)
		}
	}
	opts.People = &Prepared{Next: Practice{}, Answers: map[string]string{"tuf:c1": strings.TrimSuffix(last, "\n")}}
	if err := l.run(source, opts); err != nil {
		t.Fatal(err)
	}
	if repository, err = tuf.Load(filepath.Join(l.last.Dir, "tuf")); err != nil {
		t.Fatal(err)
	}
	for i, id := range []string{"c3", "c4"} {
		if !slices.ContainsFunc(repository.Root().Layout.Custodians, func(k *ecdsa.PublicKey) bool { return k.Equal(l.custody[id].Public()) }) {
			t.Errorf("custodian %d is not in root 2", i)
		}
	}
}

// What a later ceremony refuses to continue.
func TestPreviousRefused(t *testing.T) {
	l := begin(t, "")
	source := l.definition("rotate-1", Rotate, newIntermediate)
	copied := func(t *testing.T) string {
		dir := filepath.Join(t.TempDir(), "out")
		if err := os.CopyFS(dir, os.DirFS(l.last.Dir)); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	for _, tc := range []struct {
		name   string
		source string
		dir    func(t *testing.T) string
	}{
		{"no folder", source, func(*testing.T) string { return "" }},
		{"an empty folder", source, func(t *testing.T) string { return t.TempDir() }},
		{"a changed file", source, func(t *testing.T) string {
			dir := copied(t)
			rewrite(t, filepath.Join(dir, trustedRootName), []byte("{}"))
			return dir
		}},
		{"another last record", strings.Replace(source, fmt.Sprintf("%x", l.head), strings.Repeat("00", 32), 1), copied},
		{"another ceremony", strings.Replace(source, "{ceremony: demo-", "{ceremony: dema-", 1), copied},
	} {
		t.Run(tc.name, func(t *testing.T) {
			opts := l.options()
			opts.Previous = tc.dir(t)
			if err := l.run(tc.source, opts); !errors.Is(err, ErrPrevious) {
				t.Errorf("error %v, want ErrPrevious", err)
			}
		})
	}
}

// lifecycleRows are definitions that are refused, and a word of why.
func TestLifecycleDefinitions(t *testing.T) {
	l := &life{t: t, id: "genesis-1"}
	rotate := l.definition("rotate-1", Rotate, newIntermediate)
	crl := l.definition("crl-1", CRL, "crl: {valid: 30d, revoked: [{serial: \"1f\", at: 2026-11-22T00:00:00Z, reason: superseded}]}\n")
	logKey := l.definition("log-1", LogKey, "rotation: {overlap: 1d}\nkeys: {ct-2: {token: online, alg: ecdsa-p256}}\nservice: {logs: {ct: {shard: ct2}}}\n")
	const randomness = "entropy: {mode: commit-reveal, contributors: [w1]}\n"
	rekey := strings.NewReplacer("  inter-g2: {token", "  root-g2: {token: root, alg: ecdsa-p384}\n  inter-g2: {token", "issuer: root", "issuer: root-g2",
		"certificates:\n", "certificates:\n  root-g2: {key: root-g2, self-signed: true, subject: {o: a, cn: b}, years: 10, path-len: 1}\n").Replace(rotate)
	logKey = strings.Replace(logKey, randomness, "", 1) // without a new root it needs none
	rows := map[string]struct{ source, old, new, want string }{
		"no predecessor":             {rotate, "previous: {ceremony: genesis-1", "#", "continues a ceremony"},
		"its own predecessor":        {rotate, "ceremony: genesis-1", "ceremony: rotate-1", "previous: ceremony"},
		"three heads":                {rotate, "heads: [", "heads: [aa, bb, ", "heads: 3"},
		"a head that is short":       {rotate, "heads: [\"00", "heads: [\"", "64 hexadecimal digits"},
		"a root without randomness":  {rekey, randomness, "", "entropy"},
		"no overlap":                 {rotate, "rotation: {overlap: 7d}\n", "", "overlap"},
		"a wrong overlap":            {rotate, "7d", "7h", "overlap"},
		"no keys":                    {rotate, "keys:\n  inter-g2: {token: online, alg: ecdsa-p256}\n", "", "keys: none"},
		"an unknown issuer":          {rotate, "issuer: root", "issuer: boot", "issuer"},
		"an address":                 {rotate, "outputs:", "service: {url: \"https://a.example\"}\noutputs:", "url and oidc"},
		"a genesis that revokes":     {string(demoDefinition(t).Source()), "service:\n", "crl: {valid: 1y, revoked: [{serial: \"1f\", at: 2026-11-22T00:00:00Z, reason: superseded}]}\nservice:\n", "nothing to revoke"},
		"a genesis that continues":   {string(demoDefinition(t).Source()), "service:\n", "previous: {ceremony: old, heads: []}\nservice:\n", "genesis has none"},
		"a list without a period":    {crl, "valid: 30d", "valid: soon", "crl: valid"},
		"a list that is missing":     {crl, "crl: {", "#", "says what is revoked"},
		"a serial in capitals":       {crl, "serial: \"1f\"", "serial: \"1F\"", "serial"},
		"a negative serial":          {crl, "serial: \"1f\"", "serial: \"-1f\"", "serial"},
		"an unknown reason":          {crl, "superseded", "boredom", "reason"},
		"no time":                    {crl, "at: 2026-11-22T00:00:00Z, ", "", "at:"},
		"a serial twice":             {crl, "reason: superseded}", "reason: superseded}, {serial: \"1f\", at: 2026-11-22T00:00:00Z, reason: superseded}", "once"},
		"a rotation in a list":       {crl, "crl: {", "rotation: {overlap: 1d}\ncrl: {", "rotates nothing"},
		"a log on P-384":             {logKey, "ecdsa-p256", "ecdsa-p384", "needs ecdsa-p256"},
		"a key without a use":        {logKey, "ct: {shard", "rekor: {shard", "has no use"},
		"a log key with certificate": {logKey, "service:", "certificates: {x: {key: ct-2, issuer: root, subject: {o: a, cn: b}, years: 1, path-len: 0, eku: [codeSigning]}}\nservice:", "issues none"},
	}
	for _, name := range slices.Sorted(maps.Keys(rows)) {
		tc := rows[name]
		t.Run(name, func(t *testing.T) {
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

func FuzzVerifyFrozen(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte("a\n1\nAAAA\n\n— a AAAA\n"))
	f.Add([]byte(`{"tree_size":1,"timestamp":1,"sha256_root_hash":"AAAA","tree_head_signature":"BAMAAA=="}`))
	f.Fuzz(func(t *testing.T, content []byte) {
		if _, err := verifyFrozen(&key.PublicKey, content); !errors.Is(err, ErrFrozen) {
			t.Errorf("error %v, want ErrFrozen", err)
		}
	})
}
