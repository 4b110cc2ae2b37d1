package tpm_test

import (
	"context"
	"encoding/hex"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/tpm"
)

// TestInspect: a look says the same as an opened token, and leaves nothing in
// the TPM.
func TestInspect(t *testing.T) {
	e := hsmtest.SWTPM(t)
	seen, err := tpm.Inspect(t.Context(), e.Socket())
	if err != nil {
		t.Fatal(err)
	}
	empty(t, e)
	cfg := e.Config(t)
	token := open(t, cfg)
	want := token.Info()
	if want.Label != cfg.Dir || seen.Token.Label != "" {
		t.Errorf("labels are %q and %q, want the folder and none", want.Label, seen.Token.Label)
	}
	want.Label = ""
	if diff := cmp.Diff(want, seen.Token); diff != "" {
		t.Errorf("token (-open +look):\n%s", diff)
	}
	if seen.Library.Interface != want.Hardware || !hsm.IsSoftware(seen.Token) {
		t.Errorf("inspected %+v", seen)
	}
	for _, m := range []hsm.Mechanism{
		{Name: "TPM_ALG_ECDSA"}, {Name: "TPM_ALG_SHA256"}, {Name: "TPM_ALG_SHA384"},
		{Name: "TPM_ECC_NIST_P256", MinKeySize: 256, MaxKeySize: 256},
		{Name: "TPM_ECC_NIST_P384", MinKeySize: 384, MaxKeySize: 384},
	} {
		if !slices.ContainsFunc(seen.Mechanisms, func(got hsm.Mechanism) bool { return cmp.Equal(m, got) }) {
			t.Errorf("no %+v in %+v", m, seen.Mechanisms)
		}
	}
	if !slices.IsSortedFunc(seen.Mechanisms, func(a, b hsm.Mechanism) int { return strings.Compare(a.Name, b.Name) }) {
		t.Errorf("mechanisms are not sorted by name: %+v", seen.Mechanisms)
	}
	evidence, err := token.Evidence(t.Context(), hsmtest.NewKey(t, token, "key", hsm.ECDSAP256))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(seen.Mechanisms, evidence.Mechanisms); diff != "" {
		t.Errorf("mechanisms (-look +evidence):\n%s", diff)
	}
}

func TestInspectRefusals(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("not a TPM"), 0o600); err != nil {
		t.Fatal(err)
	}
	// Something that is no TPM: it ends every connection.
	mute, err := net.Listen("unix", filepath.Join(dir, "mute"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = mute.Close() }()
	go func() {
		for {
			conn, err := mute.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	}()
	for _, row := range []struct {
		name, device string
		want         error
	}{
		{"nothing there", filepath.Join(dir, "nothing"), hsm.ErrLost},
		{"a file", file, hsm.ErrLost},
		{"no TPM behind the socket", filepath.Join(dir, "mute"), hsm.ErrLost},
		{"relative", "tpmrm0", tpm.ErrURI},
		{"not in its shortest form", dir + "/../tpmrm0", tpm.ErrURI},
		{"empty", "", tpm.ErrURI},
	} {
		t.Run(row.name, func(t *testing.T) {
			seen, err := tpm.Inspect(t.Context(), row.device)
			wants(t, "inspect", err, row.want)
			if diff := cmp.Diff(hsm.Inspection{}, seen); diff != "" {
				t.Errorf("an error and (-nothing +got):\n%s", diff)
			}
		})
	}
}

// TestCheckURI: what a configuration may say, without a device.
func TestCheckURI(t *testing.T) {
	for _, row := range []struct {
		name, uri  string
		token, key bool
	}{
		{"a folder", tpm.TokenURI("/keys", "/dev/tpmrm0"), true, false},
		{"a key file", tpm.KeyURI("/keys", "/dev/tpmrm0", "root", nil), false, true},
		{"an id", tpm.KeyURI("/keys", "/dev/tpmrm0", "", hsmtest.RandomID()), false, true},
		{"a handle", tpm.HandleURI("/dev/tpmrm0", 0x81010001), false, true},
		{"another scheme", "pkcs11:token=a", false, false},
		{"no device", "tpm2:/keys", false, false},
		{"empty", "", false, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			for what, of := range map[string]struct {
				err  error
				good bool
			}{
				"token": {tpm.CheckTokenURI(row.uri), row.token},
				"key":   {tpm.CheckKeyURI(row.uri), row.key},
			} {
				if of.good && of.err != nil {
					t.Errorf("%s: %v", what, of.err)
				}
				if !of.good {
					wants(t, what, of.err, tpm.ErrURI)
				}
			}
		})
	}
}

// TestList: every key file is listed by label, one that cannot be used with the
// reason, and what is listed can be looked at and opened.
func TestList(t *testing.T) {
	e := hsmtest.SWTPM(t)
	device := e.Device(t, tpm.Config{}) // makes another tool's keys, while no token is open
	token := open(t, e.Config(t))
	if list, err := token.List(t.Context()); err != nil || len(list) != 0 {
		t.Fatalf("an empty folder lists %+v, %v", list, err)
	}
	b := hsmtest.NewKey(t, token, "b", hsm.ECDSAP256)
	a := hsmtest.NewKey(t, token, "a", hsm.ECDSAP384)
	device.Plant(t, token, hsmtest.Planted{Label: "c", ID: hsmtest.RandomID(), Careless: true})
	if err := os.WriteFile(filepath.Join(e.KeyDir(t), "d.pem"), []byte("no key"), 0o600); err != nil {
		t.Fatal(err)
	}
	list, err := token.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var labels string
	for _, l := range list {
		labels += l.Label
	}
	if labels != "abcd" {
		t.Fatalf("listed %q, want abcd", labels)
	}
	for i, key := range []hsm.Key{a, b} {
		l, spki := list[i], key.Ref().SPKI
		algorithm, err := hsm.AlgorithmOf(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		if l.SPKI != hex.EncodeToString(spki[:]) || l.Algorithm != algorithm || l.Level != hsm.LevelSoftware || l.Problem != "" || l.ID == "" {
			t.Errorf("listed %+v, want the key %s", l, key.Ref())
		}
		if err := hsm.RoleCT.Policy().Check(l.Attributes); err != nil {
			t.Errorf("attributes of a generated key: %v", err)
		}
		id, err := hex.DecodeString(l.ID)
		if err != nil {
			t.Fatal(err)
		}
		for _, uri := range []string{l.URI, tpm.KeyURI(e.KeyDir(t), e.Socket(), "", id)} {
			ref, err := token.Look(t.Context(), uri)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(hsm.Ref{URI: uri, SPKI: spki}, ref); diff != "" {
				t.Errorf("a look at what was listed (-want +got):\n%s", diff)
			}
			opened, err := token.Open(t.Context(), ref, hsm.RoleCT)
			if err != nil {
				t.Fatal(err)
			}
			signs(t, opened)
		}
	}
	for _, l := range list[2:] {
		if l.Problem == "" {
			t.Errorf("listed %s without a problem: %+v", l.Label, l)
		}
		if _, err := token.Look(t.Context(), l.URI); err == nil {
			t.Errorf("a look at %s shows a key", l.Label)
		}
	}
	for _, row := range []struct {
		name, uri string
		want      error
	}{
		{"no such key", tpm.KeyURI(e.KeyDir(t), e.Socket(), "e", nil), hsm.ErrNotFound},
		{"another folder", tpm.KeyURI("/nowhere", e.Socket(), "a", nil), hsm.ErrNotFound},
		{"another device", tpm.KeyURI(e.KeyDir(t), "/dev/null", "a", nil), hsm.ErrNotFound},
		{"nothing at the handle", tpm.HandleURI(e.Socket(), 0x81234567), hsm.ErrNotFound},
		{"a token, not a key", tpm.TokenURI(e.KeyDir(t), e.Socket()), tpm.ErrURI},
		{"not a URI", "tpm", tpm.ErrURI},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, err := token.Look(t.Context(), row.uri)
			wants(t, "look", err, row.want)
		})
	}
}

// TestListWithoutTPM: a TPM that is away is an error, not a list of broken keys.
func TestListWithoutTPM(t *testing.T) {
	e := hsmtest.SWTPM(t)
	cfg := e.Config(t)
	token := open(t, cfg)
	hsmtest.NewKey(t, token, "key", hsm.ECDSAP256)
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	token = open(t, cfg) // which has not loaded the key yet
	e.Stop(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second) // the token itself waits for its deadline
	defer cancel()
	if list, err := token.List(ctx); !errors.Is(err, hsm.ErrLost) && !errors.Is(err, hsm.ErrBusy) {
		t.Errorf("list is %+v, %v; want ErrLost or ErrBusy", list, err)
	}
}
