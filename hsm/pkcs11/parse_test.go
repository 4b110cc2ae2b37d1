package pkcs11

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/asn1"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-cmp/cmp"
	"github.com/miekg/pkcs11"
	perrors "github.com/pkg/errors"
)

func TestParseURI(t *testing.T) {
	rows := []struct {
		name, text string
		want       uri // the zero uri: refused
	}{
		{"label", "pkcs11:token=a", uri{token: "a", id: []byte{}}},
		{"serial", "pkcs11:serial=12", uri{serial: "12", id: []byte{}}},
		{
			"everything", "pkcs11:token=My%20Token;manufacturer=Maker;serial=1;model=M;object=key;type=private;id=%00%ff",
			uri{token: "My Token", manufacturer: "Maker", serial: "1", model: "M", object: "key", id: []byte{0, 0xff}},
		},
		{"empty query", "pkcs11:token=a?", uri{token: "a", id: []byte{}}},
		{name: "empty", text: ""},
		{name: "scheme alone", text: "pkcs11:"},
		{name: "scheme in capitals", text: "PKCS11:token=a"},
		{name: "another scheme", text: "tpm2:token=a"},
		{name: "no token", text: "pkcs11:object=a"},
		{name: "empty token", text: "pkcs11:token=;object=a"},
		{name: "attribute without value", text: "pkcs11:token"},
		{name: "attribute twice", text: "pkcs11:token=a;token=b"},
		{name: "bad escape", text: "pkcs11:token=%zz"},
		{name: "cut escape", text: "pkcs11:token=a%2"},
		{name: "unknown attribute", text: "pkcs11:token=a;slot-id=1"},
		{name: "vendor attribute", text: "pkcs11:token=a;x-vendor=1"},
		{name: "public key", text: "pkcs11:token=a;type=public"},
		{name: "PIN", text: "pkcs11:token=a?pin-value=1234"},
		{name: "PIN among attributes", text: "pkcs11:token=a;pin-value=1234"},
		{name: "PIN source", text: "pkcs11:token=a?pin-source=file:/etc/pin"},
		{name: "module", text: "pkcs11:token=a?module-path=/lib/a.so"},
		{name: "trailing semicolon", text: "pkcs11:token=a;"},
		{name: "huge", text: "pkcs11:token=" + strings.Repeat("a", maxURI)},
	}
	for _, row := range rows {
		got, err := parseURI(row.text)
		if row.want.token == "" && row.want.serial == "" {
			if !errors.Is(err, ErrURI) {
				t.Errorf("%s: error %v, want ErrURI", row.name, err)
			}
			if err != nil && strings.Contains(err.Error(), "1234") {
				t.Errorf("%s: the error holds the PIN", row.name)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", row.name, err)
		}
		if diff := cmp.Diff(row.want, got, cmp.AllowUnexported(uri{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", row.name, diff)
		}
	}
}

func FuzzParseURI(f *testing.F) {
	f.Add("pkcs11:token=My%20Token;object=key;id=%00%ff")
	f.Add("pkcs11:token=a;serial=1?pin-value=1234")
	f.Add("pkcs11:token=a;id=%")
	f.Add("pkcs11:token=a;object=" + strings.Repeat("\xad", 500))
	f.Add("pkcs11:token=a;object=" + strings.Repeat("*", 500))
	f.Fuzz(func(t *testing.T, text string) {
		u, err := parseKeyURI(text)
		if err != nil {
			return
		}
		again, err := parseKeyURI(u.String())
		if err != nil {
			t.Fatalf("%q became %q: %v", text, u, err)
		}
		if diff := cmp.Diff(u, again, cmp.AllowUnexported(uri{})); diff != "" {
			t.Errorf("%q became %q (-first +second):\n%s", text, u, diff)
		}
	})
}

// wrap puts a point into its OCTET STRING.
func wrap(t testing.TB, point []byte) []byte {
	t.Helper()
	der, err := asn1.Marshal(point)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestParsePublic(t *testing.T) {
	points := map[elliptic.Curve][]byte{}
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		private, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if points[curve], err = private.PublicKey.Bytes(); err != nil {
			t.Fatal(err)
		}
	}
	p256, p384 := points[elliptic.P256()], points[elliptic.P384()]
	off := bytes.Clone(p256)
	off[len(off)-1] ^= 1
	rows := []struct {
		name          string
		params, point []byte
		ok            bool
	}{
		{"P-256", paramsP256, wrap(t, p256), true},
		{"P-384", paramsP384, wrap(t, p384), true},
		{"P-256 by name", nameP256, wrap(t, p256), true},
		{"P-384 by name", nameP384, wrap(t, p384), true},
		{"bare point", paramsP256, p256, true},
		{"point of the other curve", paramsP256, wrap(t, p384), false},
		{"point off the curve", paramsP256, wrap(t, off), false},
		{"infinity", paramsP256, wrap(t, []byte{0}), false},
		{"compressed", paramsP256, wrap(t, append([]byte{2 + p256[64]&1}, p256[1:33]...)), false},
		{"empty point", paramsP256, nil, false},
		{"trailing octet", paramsP256, append(wrap(t, p256), 0), false},
		{"wrapped twice", paramsP256, wrap(t, wrap(t, p256)), false},
		{"P-224", []byte{0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x21}, wrap(t, p256), false},
		{"no curve", nil, wrap(t, p256), false},
		{"explicit parameters", append([]byte{0x30, 0x82, 1, 0}, make([]byte, 256)...), wrap(t, p256), false},
	}
	for _, row := range rows {
		pub, err := parsePublic(row.params, row.point)
		switch {
		case row.ok && err != nil:
			t.Errorf("%s: %v", row.name, err)
		case !row.ok && !errors.Is(err, hsm.ErrUnsupported):
			t.Errorf("%s: %v, error %v, want ErrUnsupported", row.name, pub, err)
		}
	}
}

func FuzzParsePublic(f *testing.F) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	point, err := private.PublicKey.Bytes()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(paramsP256, wrap(f, point))
	f.Add(paramsP384, point)
	f.Add([]byte{}, []byte{4})
	f.Fuzz(func(t *testing.T, params, point []byte) {
		pub, err := parsePublic(params, point)
		if err != nil {
			return
		}
		if _, err := hsm.SPKIHash(pub); err != nil {
			t.Errorf("accepted a key that cannot be encoded: %v", err)
		}
	})
}

// TestClassify: every return value has one meaning, however crypto11 wraps it.
func TestClassify(t *testing.T) {
	sentinels := []error{hsm.ErrLost, hsm.ErrPIN, hsm.ErrBusy, hsm.ErrUnsupported}
	rows := map[uint]error{
		pkcs11.CKR_DEVICE_REMOVED:       hsm.ErrLost,
		pkcs11.CKR_USER_NOT_LOGGED_IN:   hsm.ErrLost,
		pkcs11.CKR_PIN_INCORRECT:        hsm.ErrPIN,
		pkcs11.CKR_PIN_LOCKED:           hsm.ErrPIN,
		pkcs11.CKR_SESSION_COUNT:        hsm.ErrBusy,
		pkcs11.CKR_MECHANISM_INVALID:    hsm.ErrUnsupported,
		pkcs11.CKR_FUNCTION_FAILED:      nil,
		pkcs11.CKR_KEY_UNEXTRACTABLE:    nil,
		pkcs11.CKR_VENDOR_DEFINED | 0x7: nil,
	}
	for code, want := range rows {
		raw := pkcs11.Error(code)
		for name, err := range map[string]error{
			"bare": raw, "fmt": fmt.Errorf("log in: %w", raw), "pkg/errors": perrors.WithMessage(raw, "failed to log in"),
		} {
			got := classify(classify(err))
			if !errors.Is(got, raw) {
				t.Errorf("%#x (%s): %v does not unwrap to the code", code, name, got)
			}
			for _, s := range sentinels {
				if errors.Is(got, s) != (s == want) {
					t.Errorf("%#x (%s): is %v: %v, want %v", code, name, s, errors.Is(got, s), s == want)
				}
			}
			if !strings.HasPrefix(got.Error(), "CKR_") {
				t.Errorf("%#x (%s): text %q has no name", code, name, got)
			}
		}
	}
	if classify(nil) != nil || classify(errForeign) != errForeign {
		t.Error("classify changes what is not a return value")
	}
}

func TestMechanism(t *testing.T) {
	rows := map[string]string{
		"4010000000000000": "CKM_EC_KEY_PAIR_GEN",
		"40100000":         "CKM_EC_KEY_PAIR_GEN",
		"ffffffffffffffff": "",
		"ffffffff":         "",
		"":                 "",
		"unavailable: CKR_ATTRIBUTE_TYPE_INVALID": "",
		"0000000000000000":                        "CKM_0x0",
	}
	for value, want := range rows {
		if got := mechanism(value); got != want {
			t.Errorf("%q is %q, want %q", value, got, want)
		}
	}
}
