package pkcs11_test

import (
	"encoding/hex"
	"errors"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
)

func TestInspect(t *testing.T) {
	token := hsmtest.NewSoftHSM(t)
	closed, err := pkcs11.Inspect(t.Context(), token.Module, token.URI)
	if err != nil {
		t.Fatal(err)
	}
	opened := hsmtest.OpenSoftHSM(t, token)
	again, err := pkcs11.Inspect(t.Context(), token.Module, token.URI)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(closed, again); diff != "" {
		t.Errorf("the same token beside its own login (-before +after):\n%s", diff)
	}
	if len(closed) != 1 || closed[0].Token.Label != token.Label || closed[0].Library.Interface != "2.40" || closed[0].Slot.Description == "" {
		t.Fatalf("inspected %+v", closed)
	}
	if diff := cmp.Diff(opened.Info(), again[0].Token); diff != "" {
		t.Errorf("token (-login +look):\n%s", diff)
	}
	i := slices.IndexFunc(closed[0].Mechanisms, func(m hsm.Mechanism) bool { return m.Name == "CKM_ECDSA" })
	if i < 0 {
		t.Fatalf("no CKM_ECDSA in %+v", closed[0].Mechanisms)
	}
	if got := closed[0].Mechanisms[i]; got.MinKeySize > 256 || got.MaxKeySize < 384 || !slices.Contains(got.Flags, "SIGN") {
		t.Errorf("CKM_ECDSA is %+v, want it to sign with 256 to 384 bits", got)
	}
	all, err := pkcs11.Inspect(t.Context(), token.Module, "")
	if err != nil || !slices.ContainsFunc(all, func(i hsm.Inspection) bool { return i.Token.Label == token.Label }) {
		t.Errorf("all tokens: %d, %v", len(all), err)
	}
	for _, row := range []struct {
		name, uri string
		want      error
	}{
		{"no such token", "pkcs11:token=nowhere", hsm.ErrNotFound},
		{"a PIN in the URI", token.URI + "?pin-value=1234", pkcs11.ErrURI},
		{"not a URI", "softhsm", pkcs11.ErrURI},
	} {
		t.Run(row.name, func(t *testing.T) {
			if _, err := pkcs11.Inspect(t.Context(), token.Module, row.uri); !errors.Is(err, row.want) {
				t.Errorf("error %v, want %v", err, row.want)
			}
		})
	}
}

func TestList(t *testing.T) {
	token := hsmtest.OpenSoftHSM(t, hsmtest.NewSoftHSM(t))
	if list, err := token.List(t.Context()); err != nil || len(list) != 0 {
		t.Fatalf("an empty token lists %+v, %v", list, err)
	}
	b := hsmtest.NewKey(t, token, "b", hsm.ECDSAP256)
	a := hsmtest.NewKey(t, token, "a", hsm.ECDSAP384)
	list, err := token.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 2 || list[0].Label != "a" || list[1].Label != "b" {
		t.Fatalf("listed %+v", list)
	}
	for i, key := range []hsm.Key{a, b} {
		spki := key.Ref().SPKI
		algorithm, err := hsm.AlgorithmOf(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		if list[i].SPKI != hex.EncodeToString(spki[:]) || list[i].Algorithm != algorithm || list[i].Level != hsm.LevelSoftware || list[i].Problem != "" {
			t.Errorf("listed %+v, want the key %s", list[i], key.Ref())
		}
		if err := hsm.RoleCT.Policy().Check(list[i].Attributes); err != nil {
			t.Errorf("attributes of a generated key: %v", err)
		}
		ref, err := token.Look(t.Context(), list[i].URI)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(hsm.Ref{URI: list[i].URI, SPKI: spki}, ref); diff != "" {
			t.Errorf("a look at what was listed (-want +got):\n%s", diff)
		}
	}
	for _, row := range []struct {
		name, uri string
		want      error
	}{
		{"no such key", pkcs11.KeyURI(token.Info().Label, "c", nil), hsm.ErrNotFound},
		{"another token", pkcs11.KeyURI("nowhere", "a", nil), hsm.ErrNotFound},
		{"a token, not a key", pkcs11.TokenURI(token.Info().Label), pkcs11.ErrURI},
	} {
		t.Run(row.name, func(t *testing.T) {
			if _, err := token.Look(t.Context(), row.uri); !errors.Is(err, row.want) {
				t.Errorf("error %v, want %v", err, row.want)
			}
		})
	}
}
