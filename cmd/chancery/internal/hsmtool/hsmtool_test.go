package hsmtool

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/config"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

func TestQuantile(t *testing.T) {
	ms := func(n ...int) (times []time.Duration) {
		for _, n := range n {
			times = append(times, time.Duration(n)*time.Millisecond)
		}
		return times
	}
	hundred := make([]time.Duration, 100)
	for i := range hundred {
		hundred[i] = time.Duration(i+1) * time.Millisecond
	}
	for _, tc := range []struct {
		name     string
		times    []time.Duration
		p50, p99 int
	}{
		{"one", ms(7), 7, 7},
		{"two", ms(1, 9), 1, 9},
		{"three", ms(1, 2, 9), 2, 9},
		{"hundred", hundred, 50, 99},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := summarise(2, time.Second, slices.Clone(tc.times))
			if r.P50 != ms(tc.p50)[0] || r.P99 != ms(tc.p99)[0] || r.Rate != float64(len(tc.times)) {
				t.Errorf("%+v, want p50 %d ms, p99 %d ms", r, tc.p50, tc.p99)
			}
		})
	}
}

func TestSteps(t *testing.T) {
	for parallel, want := range map[int][]int{1: {1}, 2: {1, 2}, 3: {1, 2, 3}, 8: {1, 2, 4, 8}, 9: {1, 2, 4, 8, 9}} {
		if diff := cmp.Diff(want, steps(parallel)); diff != "" {
			t.Errorf("steps(%d) (-want +got):\n%s", parallel, diff)
		}
	}
}

func TestMeasure(t *testing.T) {
	key := &hsmtest.Counting{Key: hsmtest.SoftwareKey(hsm.ECDSAP256)}
	r, err := Measure(t.Context(), key, 3, 20*time.Millisecond, nil)
	if err != nil {
		t.Fatal(err)
	}
	if int64(r.Signatures) != key.Count() || r.Signatures < 3 || r.Took < 20*time.Millisecond || r.P50 <= 0 || r.P99 < r.P50 {
		t.Errorf("%+v of %d signatures", r, key.Count())
	}
	failing := &hsmtest.Failing{Key: key}
	failing.Fail(hsm.ErrBusy)
	if _, err := Measure(t.Context(), failing, 4, time.Hour, nil); !errors.Is(err, hsm.ErrBusy) {
		t.Errorf("error %v, want ErrBusy", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Measure(ctx, key, 2, time.Hour, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want Canceled", err)
	}
}

// ring has the CT key in token "online" and the root in "root".
func ring(spki [32]byte) *trust.KeyRing {
	return &trust.KeyRing{
		Tokens: map[string]trust.Token{"online": {URI: "pkcs11:token=online", Module: "/m.so"}},
		Keys: map[hsm.Role]trust.Key{
			hsm.RoleCT:   {Token: "online", URI: "pkcs11:token=online;object=ct", SPKI: spki},
			hsm.RoleRoot: {Token: "root", URI: "pkcs11:token=root;object=root", SPKI: [32]byte{2}},
		},
	}
}

func TestTarget(t *testing.T) {
	online := Place{Name: "online", Token: trust.Token{URI: "pkcs11:token=online", Module: "/m.so"}}
	tpm := Place{Name: "tpm", Token: trust.Token{URI: "tpm2:/keys?device=/dev/tpmrm0"}}
	both := Places{Tokens: []Place{online, tpm}, Ring: ring([32]byte{1})}
	bare := Places{Tokens: []Place{online}}
	for _, tc := range []struct {
		name, reference string
		places          Places
		want            Target
		err             error
	}{
		{"a role", "ct", both, Target{online, hsm.RoleCT, "pkcs11:token=online;object=ct", [32]byte{1}}, nil},
		{"its URI", "pkcs11:token=online;object=ct", both, Target{online, hsm.RoleCT, "pkcs11:token=online;object=ct", [32]byte{1}}, nil},
		{"another URI", "pkcs11:token=online;object=x", both, Target{Place: online, URI: "pkcs11:token=online;object=x"}, nil},
		{"a TPM key", "tpm2:/keys/ct.pem?device=/dev/tpmrm0", both, Target{Place: tpm, URI: "tpm2:/keys/ct.pem?device=/dev/tpmrm0"}, nil},
		{"without a ring", "pkcs11:token=online;object=ct", bare, Target{Place: online, URI: "pkcs11:token=online;object=ct"}, nil},
		{"a role without a ring", "ct", bare, Target{}, ErrNoKey},
		{"an unknown role", "clerk", both, Target{}, ErrNoKey},
		{"nothing", "", both, Target{}, ErrNoKey},
		{"a role in a token that is not configured", "root", both, Target{}, ErrNoToken},
		{"a TPM key without a TPM", "tpm2:/keys/ct.pem?device=/dev/tpmrm0", bare, Target{}, ErrNoKey},
		{"another scheme", "file:/etc/passwd", both, Target{}, hsm.ErrUnsupported},
		{"two tokens that it may be in", "pkcs11:token=online;object=x", Places{Tokens: []Place{online, online}}, Target{}, ErrNoKey},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := tc.places.Target(tc.reference)
			if !errors.Is(err, tc.err) || err == nil && tc.err != nil {
				t.Fatalf("error %v, want %v", err, tc.err)
			}
			if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(config.Secret{})); diff != "" {
				t.Errorf("target (-want +got):\n%s", diff)
			}
		})
	}
}

// lister is a token that lists what it is told to.
type lister struct {
	hsm.Token
	list []hsm.Listing
}

func (l lister) List(context.Context) ([]hsm.Listing, error)   { return l.list, nil }
func (l lister) Look(context.Context, string) (hsm.Ref, error) { return hsm.Ref{}, hsm.ErrNotFound }

func TestContentsErr(t *testing.T) {
	token := hsmtest.SoftHSM(t)
	key := hsmtest.NewKey(t, token, "ct", hsm.ECDSAP256)
	good, err := token.(hsm.Lister).List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	change := func(f func(*hsm.Listing)) []hsm.Listing {
		l := good[0]
		l.Attributes = map[string]string{}
		for name, value := range good[0].Attributes {
			l.Attributes[name] = value
		}
		f(&l)
		return []hsm.Listing{l}
	}
	places := Places{Ring: ring(key.Ref().SPKI)}
	for _, tc := range []struct {
		name string
		list []hsm.Listing
		want error // nil: none
	}{
		{"good", good, nil},
		{"missing", nil, hsm.ErrNotFound},
		{"extractable", change(func(l *hsm.Listing) { l.Attributes["EXTRACTABLE"] = "true" }), hsm.ErrPolicy},
		{"a stranger's extractable key beside it", append(change(func(l *hsm.Listing) {
			l.Attributes["EXTRACTABLE"], l.Attributes["SENSITIVE"], l.SPKI = "true", "false", strings.Repeat("00", 32)
		}), good...), nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := places.List(t.Context(), Place{Name: "online"}, lister{token, tc.list})
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Err(); !errors.Is(err, tc.want) || tc.want == nil && err != nil {
				t.Errorf("error %v, want %v", err, tc.want)
			}
		})
	}
	c, err := places.List(t.Context(), Place{Name: "online"}, lister{token, change(func(l *hsm.Listing) { l.Problem = "no public key" })})
	if err != nil || c.Err() == nil {
		t.Errorf("a key that cannot be opened: %v, %v", err, c.Err())
	}
}

func TestEvidence(t *testing.T) {
	token := hsmtest.SoftHSM(t)
	key := hsmtest.NewKey(t, token, "inter", hsm.ECDSAP256)
	other := hsmtest.NewKey(t, token, "other", hsm.ECDSAP256)
	a, err := Attest(t.Context(), token, key, nil)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "evidence")
	if err := a.Write(dir); err != nil {
		t.Fatal(err)
	}
	if err := a.Write(dir); !errors.Is(err, os.ErrExist) {
		t.Errorf("written twice: %v, want ErrExist", err)
	}
	read, err := Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(a, read); diff != "" {
		t.Errorf("read back (-want +got):\n%s", diff)
	}
	spki, stranger := key.Ref().SPKI, other.Ref().SPKI
	if _, err := read.Verify(Expect{SPKI: &spki, Role: hsm.RoleIntermediate}); err != nil {
		t.Error(err)
	}
	elsewhere, err := Attest(t.Context(), token, other, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		change func(*hsm.Evidence)
		want   Expect
	}{
		{"another key is meant", func(*hsm.Evidence) {}, Expect{SPKI: &stranger}},
		{"a statement is wanted", func(*hsm.Evidence) {}, Expect{Nonce: make([]byte, MinNonce)}},
		{"no public key", func(e *hsm.Evidence) { e.PublicKey = nil }, Expect{}},
		{"another public key", func(e *hsm.Evidence) { e.PublicKey = elsewhere.Evidence.PublicKey }, Expect{}},
		{"another hash", func(e *hsm.Evidence) { e.SPKI = hex.EncodeToString(stranger[:]) }, Expect{}},
		{"another algorithm", func(e *hsm.Evidence) { e.Algorithm = hsm.ECDSAP384 }, Expect{}},
		{"an unknown algorithm", func(e *hsm.Evidence) { e.Algorithm = "rsa" }, Expect{}},
		{"a flipped bit in the signature", func(e *hsm.Evidence) { e.SelfTest[len(e.SelfTest)-1] ^= 1 }, Expect{}},
		{"no signature", func(e *hsm.Evidence) { e.SelfTest = nil }, Expect{}},
		{"another text", func(e *hsm.Evidence) { e.SelfTestText += " " }, Expect{}},
		{"a text of another key", func(e *hsm.Evidence) {
			e.SelfTestText, e.SelfTest = elsewhere.Evidence.SelfTestText, elsewhere.Evidence.SelfTest
		}, Expect{}},
		{"extractable", func(e *hsm.Evidence) { e.Attributes["EXTRACTABLE"] = "true" }, Expect{Role: hsm.RoleIntermediate}},
		{"attributes left out", func(e *hsm.Evidence) { e.Attributes = nil }, Expect{}},
		{"a level that it does not support", func(e *hsm.Evidence) { e.Level = hsm.LevelModule }, Expect{}},
		{"attested without a statement", func(e *hsm.Evidence) { e.Level = hsm.LevelAttested }, Expect{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			changed, err := Read(dir)
			if err != nil {
				t.Fatal(err)
			}
			tc.change(&changed.Evidence)
			if _, err := changed.Verify(tc.want); !errors.Is(err, ErrEvidence) {
				t.Errorf("error %v, want ErrEvidence", err)
			}
		})
	}
	if _, err := Attest(t.Context(), token, key, make([]byte, MinNonce)); !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("a nonce for a token that signs no statements: %v, want ErrUnsupported", err)
	}
}

func TestReadRefuses(t *testing.T) {
	for _, tc := range []struct{ name, evidence, attestation string }{
		{"no evidence", "", ""},
		{"not JSON", "evidence", ""},
		{"an unknown field", `{"colour": "blue"}`, ""},
		{"two values", `{} {}`, ""},
		{"huge", `{"uri": "` + strings.Repeat("x", maxEvidence) + `"}`, ""},
		{"a statement that is not JSON", `{}`, "statement"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range map[string]string{evidenceName: tc.evidence, attestationName: tc.attestation} {
				if text == "" {
					continue
				}
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if a, err := Read(dir); err == nil {
				t.Errorf("read as %+v", a)
			}
		})
	}
}

func TestClean(t *testing.T) {
	for text, want := range map[string]string{
		"SoftHSM": "SoftHSM", "\x1b[31mred": "?[31mred", "a\nb\tc": "a?b?c", "\xff": "?", "caf\u00e9": "caf\u00e9", "a\u202eb": "a?b", "\u009b1m": "?1m",
	} {
		if got := Clean(text); got != want {
			t.Errorf("Clean(%q) = %q, want %q", text, got, want)
		}
	}
}

// FuzzVerify: foreign evidence neither panics nor verifies by chance.
func FuzzVerify(f *testing.F) {
	f.Add([]byte(`{"algorithm":"ecdsa-p256","selfTestText":"x","level":"software"}`), []byte(`{"format":"tpm2-certify-1"}`))
	f.Add([]byte(`{}`), []byte(``))
	f.Fuzz(func(t *testing.T, evidence, statement []byte) {
		var a Attested
		if parse(evidence, &a.Evidence) != nil {
			return
		}
		var s hsm.Attestation
		if parse(statement, &s) == nil {
			a.Attestation = &s
		}
		if found, err := a.Verify(Expect{}); err == nil {
			if _, err := json.Marshal(found); err != nil || hsm.PolicyFloor.Check(a.Evidence.Attributes) != nil {
				t.Fatalf("verified: %+v", a)
			}
		}
	})
}
