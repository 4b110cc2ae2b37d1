package ceremony

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/chancery-ca/chancery/ceremony/trust/tuf"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// withTUF adds a TUF repository with three custodians to the demo's definition.
func withTUF(t testing.TB) *Definition {
	t.Helper()
	source := string(demoDefinition(t).Source())
	source = strings.Replace(source, "certificates:\n", "  tuf-online: {token: online, alg: ecdsa-p256}\ncertificates:\n", 1)
	var custodians []string
	for i := range 3 {
		custodians = append(custodians, fmt.Sprintf(`{id: c%d, key: "pkcs11:token=c%d;object=t", spki-sha256: "%064x"}`, i+1, i+1, i+1))
	}
	source += "tuf: {threshold: 2, custodians: [" + strings.Join(custodians, ", \n  ") + "], root-expires: 1y, timestamp-expires: 7d}\n"
	d, err := ParseDefinition([]byte(source))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// tufOf loads and checks the repository of a ceremony's outputs.
func tufOf(t testing.TB, dir string) *tuf.Repository {
	t.Helper()
	if err := Verify(dir).Err(); err != nil {
		t.Error(err)
	}
	repo, err := tuf.Load(filepath.Join(dir, "tuf"))
	if err != nil {
		t.Fatal(err)
	}
	if err := repo.Expired(testNow); err != nil {
		t.Error(err)
	}
	for _, name := range []string{tuf.TrustedRootTarget, tuf.SigningConfigTarget} {
		if want, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(repo.Target(name), want) {
			t.Errorf("target %s is not the output (%v)", name, err)
		}
	}
	return repo
}

func TestCustodiansPractice(t *testing.T) {
	d := withTUF(t)
	opts := Options{Tokens: twoTokens(t), Dir: filepath.Join(memoryFolder(t), "out"), Now: fixedClock}
	res, err := Rehearse(t.Context(), d, opts)
	if err != nil {
		t.Fatal(err)
	}
	repo := tufOf(t, opts.Dir)
	root := repo.Root()
	if root.Layout.Threshold != 2 || len(root.Layout.Custodians) != 3 || root.Layout.Expires.Timestamp.String() != "7d" {
		t.Errorf("layout %+v", root.Layout)
	}
	spki, err := hsm.SPKIHash(root.Layout.Online)
	if err != nil || spki != res.Keys.Keys[hsm.RoleTUFOnline].SPKI {
		t.Errorf("the online key is not the one of keys.yaml (%v)", err)
	}
	if again, err := tuf.ReadRootDraft(mustRead(t, filepath.Join(opts.Dir, "custodians", "1.root.json")), nil); err != nil || len(again.Signatures()) != 0 {
		t.Errorf("the draft for custodians elsewhere: %v", err)
	}
	// Every file of the repository counts.
	for _, f := range repo.Files() {
		path := filepath.Join(opts.Dir, "tuf", f.Name)
		changed := bytes.Clone(f.Content)
		changed[len(changed)/2] ^= 1
		if err := os.WriteFile(path, changed, 0o600); err != nil {
			t.Fatal(err)
		}
		if Verify(opts.Dir).Err() == nil {
			t.Errorf("a changed %s is not noticed", f.Name)
		}
		if err := os.WriteFile(path, f.Content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := Verify(opts.Dir).Err(); err != nil {
		t.Error(err)
	}
	t.Run("forged", func(t *testing.T) { custodiansForged(t, d, opts) })
}

func mustRead(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// answering is People who answer some questions otherwise.
type answering struct {
	People
	answers map[string]string
}

func (a answering) Ask(ctx context.Context, q Question) (string, error) {
	if answer, ok := a.answers[q.ID]; ok {
		return answer, nil
	}
	return a.People.Ask(ctx, q)
}

// TestCustodiansWithTokens: two custodians sign here with tokens of their own,
// one after an interruption; the third brings a public key and no signature.
func TestCustodiansWithTokens(t *testing.T) {
	d := withTUF(t)
	keys := map[string]hsm.Key{}
	for _, id := range []string{"c1", "c2", "c3"} {
		keys[id] = hsmtest.NewKey(t, hsmtest.SoftHSM(t), id, hsm.ECDSAP256)
	}
	der, err := x509.MarshalPKIXPublicKey(keys["c3"].Public())
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "c3.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	here := map[string]bool{"c1": true}
	opts := Options{
		Tokens: twoTokens(t), Dir: filepath.Join(memoryFolder(t), "out"), Now: fixedClock, Resume: true,
		Custodian: func(_ context.Context, id string) (hsm.Key, error) {
			if here[id] {
				return keys[id], nil
			}
			return nil, nil
		},
		People: answering{Practice{}, map[string]string{
			"custodians:c3": file, "tuf:c2": "later", "tuf:c3": "later",
		}},
	}
	c2 := filepath.Join(t.TempDir(), "c2.pem")
	if der, err = x509.MarshalPKIXPublicKey(keys["c2"].Public()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c2, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	opts.People.(answering).answers["custodians:c2"] = c2
	if _, err := Rehearse(t.Context(), d, opts); !errors.Is(err, ErrCustodians) || !errors.Is(err, tuf.ErrThreshold) {
		t.Fatalf("one signature: %v, want ErrCustodians", err)
	}

	// The second signs at another machine, from the draft files.
	sign := func(name string) string {
		data := mustRead(t, filepath.Join(opts.Dir, "custodians", name))
		draft, err := tuf.ReadRootDraft(data, nil)
		if strings.Contains(name, "targets") {
			root, e := tuf.ParseRoot(mustRead(t, filepath.Join(opts.Dir, "custodians", "1.root.json")))
			if e != nil {
				t.Fatal(e)
			}
			draft, err = tuf.ReadTargetsDraft(data, root)
		}
		if err != nil {
			t.Fatal(err)
		}
		sig, err := draft.Sign(t.Context(), keys["c2"])
		if err != nil {
			t.Fatal(err)
		}
		line, err := sig.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return string(line)
	}
	root, targets := sign("1.root.json"), sign("1.targets.json")
	answers := opts.People.(answering).answers
	for _, bad := range []string{targets + root, root, root + targets + root, "{}"} {
		answers["tuf:c2"] = bad
		if _, err := Rehearse(t.Context(), d, opts); !errors.Is(err, ErrAnswer) {
			t.Errorf("answer %.30q: %v, want ErrAnswer", bad, err)
		}
	}
	answers["tuf:c2"] = root + targets
	if _, err := Rehearse(t.Context(), d, opts); err != nil {
		t.Fatal(err)
	}
	repo := tufOf(t, opts.Dir)
	for i, c := range repo.Root().Layout.Custodians {
		_ = i
		id, err := tuf.KeyID(c)
		if err != nil {
			t.Fatal(err)
		}
		want := !c.Equal(keys["c3"].Public())
		if got := bytes.Contains(repo.RootFiles()[0], []byte(`"keyid": "`+id)); got != want {
			t.Errorf("key %.8s has signed: %t, want %t", id, got, want)
		}
	}
}

// TestCustodiansResumed kills a ceremony with custodians before every record.
func TestCustodiansResumed(t *testing.T) {
	d := withTUF(t)
	opts := Options{Tokens: twoTokens(t), Dir: filepath.Join(memoryFolder(t), "out"), Resume: true}
	kills := 0
	for ; ; kills++ {
		opts.Now = killAfter(3 + kills%5)
		_, err := Rehearse(t.Context(), d, opts)
		if err == nil {
			break
		}
		if !errors.Is(err, errKilled) || kills > 150 {
			t.Fatalf("after %d kills: %v", kills, err)
		}
	}
	if kills < 15 {
		t.Errorf("only %d kills", kills)
	}
	tufOf(t, opts.Dir)
}

func TestCheckCustodian(t *testing.T) {
	d := withTUF(t)
	der := func(alg hsm.Algorithm) []byte {
		b, err := x509.MarshalPKIXPublicKey(hsmtest.SoftwareKey(alg).Public())
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	good := der(hsm.ECDSAP256)
	spki, err := hsm.SPKIHash(must(x509.ParsePKIXPublicKey(good))(t))
	if err != nil {
		t.Fatal(err)
	}
	pinned := TUFSigner{ID: "c1", SPKISHA256: strings.ToUpper(hex.EncodeToString(spki[:]))}
	production := *d
	production.Environment = Production
	for _, tc := range []struct {
		name string
		def  *Definition
		c    TUFSigner
		der  []byte
		want error
	}{
		{"pinned", &production, pinned, good, nil},
		{"another key", &production, pinned, der(hsm.ECDSAP256), hsm.ErrMismatch},
		{"another key in a rehearsal", d, pinned, der(hsm.ECDSAP256), nil},
		{"P-384", d, pinned, der(hsm.ECDSAP384), hsm.ErrUnsupported},
	} {
		if _, err := tc.def.checkCustodian(tc.c, tc.der); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
	}
	for _, answer := range []string{"", "/nonexistent", "-----BEGIN PUBLIC KEY-----", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: good})),
		strings.Repeat(string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: good})), 2)} {
		if _, err := d.parseCustodian(pinned, answer); err == nil {
			t.Errorf("accepted %.40q", answer)
		}
	}
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// custodiansForged: a forger who changes what the records say of the
// custodians, and seals the chain again, is found before the outputs follow.
func custodiansForged(t *testing.T, d *Definition, opts Options) {
	records, err := readTranscriptFile(filepath.Join(opts.Dir, TranscriptName))
	if err != nil {
		t.Fatal(err)
	}
	first := func(records []Record, step string, typ RecordType) int {
		for i, r := range records {
			if r.Step == step && r.Type == typ {
				return i
			}
		}
		t.Fatalf("no %s of %s", typ, step)
		return 0
	}
	replaced := func(step string, typ RecordType, old, new string) func([]Record) []Record {
		return func(r []Record) []Record {
			at := &r[first(r, step, typ)]
			data := strings.Replace(string(at.Data), old, new, 1)
			if data == string(at.Data) {
				t.Fatalf("record %d has no %q: %s", at.Seq, old, at.Data)
			}
			at.Data = []byte(data)
			return r
		}
	}
	other, err := x509.MarshalPKIXPublicKey(hsmtest.SoftwareKey(hsm.ECDSAP256).Public())
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		change func([]Record) []Record
		ok     bool
	}{
		{"nothing changed", func(r []Record) []Record { return r }, true},
		{"another custodian's key", func(r []Record) []Record {
			r[first(r, "custodians", Statement)].Data = fmt.Appendf(nil, `{"publicKey":"%s"}`, base64.StdEncoding.EncodeToString(other))
			return r
		}, false},
		{"a custodian left out", func(r []Record) []Record { i := first(r, "custodians", Statement); return slices.Delete(r, i, i+1) }, false},
		{"a custodian twice", func(r []Record) []Record { r[first(r, "custodians", Statement)+1].Actor = "c1"; return r }, false},
		{"a stranger", func(r []Record) []Record { r[first(r, "custodians", Statement)].Actor = "c9"; return r }, false},
		{"a witness as a custodian", func(r []Record) []Record { r[first(r, "custodians", Statement)].Actor = "w1"; return r }, false},
		{"a custodian elsewhere", func(r []Record) []Record {
			for i := range r {
				if r[i].Type == Statement && r[i].Step == "people" {
					r[i].Actor = "c1"
					break
				}
			}
			return r
		}, false},
		{"other custodians in the result", replaced("custodians", Done, `"c1"`, `"c2"`), false},
		{"another root", replaced("tuf", Intent, `"rootSHA256":"`, `"rootSHA256":"0`), false},
		{"another time", replaced("tuf", Intent, `T12:00:00Z`, `T11:59:59Z`), false},
		{"a later time", replaced("tuf", Intent, `T12:00:00Z`, `T12:00:01Z`), false},
		{"one for another", func(r []Record) []Record {
			i := first(r, "tuf", Statement)
			r[i].Actor, r[i+1].Actor = r[i+1].Actor, r[i].Actor
			return r
		}, false},
		{"signatures swapped", func(r []Record) []Record {
			i := first(r, "tuf", Statement)
			r[i].Data = []byte(strings.NewReplacer(`"root"`, `"targets"`, `"targets"`, `"root"`).Replace(string(r[i].Data)))
			return r
		}, false},
		{"one signature of two", func(r []Record) []Record {
			i := first(r, "tuf", Statement)
			r = slices.Delete(r, i, i+2)
			return replaced("tuf", Done, `["c1","c2","c3"]`, `["c3"]`)(r)
		}, false},
		{"two signatures of two", func(r []Record) []Record {
			i := first(r, "tuf", Statement)
			r = slices.Delete(r, i, i+1)
			return replaced("tuf", Done, `["c1","c2","c3"]`, `["c2","c3"]`)(r)
		}, false}, // the snapshot names other targets
		{"other names in the result", replaced("tuf", Done, `["c1","c2","c3"]`, `["c1","c2"]`), false},
		{"the online part before the custodians'", replaced("tuf-online", Intent, `T12:00:00Z`, `T11:59:59Z`), false},
		{"the online part at another time", replaced("tuf-online", Done, `T12:00:00Z`, `T12:00:01Z`), false},
		{"the snapshot's signature changed", replaced("tuf-online", Done, `"snapshot":"ME`, `"snapshot":"MA`), false},
		{"no timestamp", replaced("tuf-online", Done, `"timestamp":"`, `"timestamp":"AAAA`), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			forged := tc.change(slices.Clone(records))
			forged = forged[:first(forged, "outputs", Intent)]
			for i := range forged {
				forged[i].Seq = records[i].Seq
				if i > 0 {
					forged[i].Prev = forged[i-1].Hash
				}
				forged[i] = reseal(t, forged[i])
			}
			if err := factsOf(t, d).replay(forged); (err == nil) != tc.ok {
				t.Errorf("replayed: %v, want %t", err, tc.ok)
			}
		})
	}
}
