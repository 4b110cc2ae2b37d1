package hsm_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-cmp/cmp"
)

// wrappedBy is a wrapped key as a backend writes it: of private's public half,
// with octets that no token made.
func wrappedBy(t testing.TB, private *ecdsa.PrivateKey) hsm.Wrapped {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(&private.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	hash, err := hsm.SPKIHash(&private.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	w := hsm.Wrapped{
		Format: hsm.WrappedFormat, Time: time.Unix(1800000000, 0).UTC(), Role: hsm.RoleRoot,
		Label: "root-1", ID: strings.Repeat("0a", hsm.IDSize), Algorithm: hsm.ECDSAP256,
		SPKI: hex.EncodeToString(hash[:]), PublicKey: der,
		Source:    hsm.Device{Label: "source", Manufacturer: "maker", Model: "model", Serial: "1"},
		Key:       hsm.WrappingKey{Label: "wrapping-key", ID: strings.Repeat("0b", 16), Check: "ede7ad"},
		Mechanism: hsm.MechanismAESKWP, Octets: bytes.Repeat([]byte{7}, 80),
	}
	return signed(t, private, w)
}

// signed signs w as its key does.
func signed(t testing.TB, private *ecdsa.PrivateKey, w hsm.Wrapped) hsm.Wrapped {
	t.Helper()
	digest, err := w.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if w.Signature, err = private.Sign(rand.Reader, digest, crypto.SHA256); err != nil {
		t.Fatal(err)
	}
	return w
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return private
}

func TestWrapped(t *testing.T) {
	private, other := newKey(t), newKey(t)
	w := wrappedBy(t, private)
	hash, err := hsm.SPKIHash(&private.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	otherHash, err := hsm.SPKIHash(&other.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Verify(hsm.RoleRoot, hash); err != nil {
		t.Fatal(err)
	}
	with := func(change func(*hsm.Wrapped)) hsm.Wrapped {
		c := w
		change(&c)
		return c
	}
	// Changed and not signed again.
	rows := map[string]hsm.Wrapped{
		"another time":             with(func(w *hsm.Wrapped) { w.Time = w.Time.Add(time.Second) }),
		"another role":             with(func(w *hsm.Wrapped) { w.Role = hsm.RoleTSARoot }),
		"another label":            with(func(w *hsm.Wrapped) { w.Label = "root-2" }),
		"another id":               with(func(w *hsm.Wrapped) { w.ID = strings.Repeat("0c", 16) }),
		"another algorithm":        with(func(w *hsm.Wrapped) { w.Algorithm = hsm.ECDSAP384 }),
		"another source":           with(func(w *hsm.Wrapped) { w.Source.Serial = "2" }),
		"another wrapping key":     with(func(w *hsm.Wrapped) { w.Key.ID = strings.Repeat("0d", 16) }),
		"another check value":      with(func(w *hsm.Wrapped) { w.Key.Check = "000000" }),
		"no octets":                with(func(w *hsm.Wrapped) { w.Octets = nil }),
		"truncated octets":         with(func(w *hsm.Wrapped) { w.Octets = w.Octets[:72] }),
		"no signature":             with(func(w *hsm.Wrapped) { w.Signature = nil }),
		"signature of another":     with(func(w *hsm.Wrapped) { *w = signed(t, other, *w) }),
		"the zero wrapped key":     {},
		"another key's altogether": wrappedBy(t, other),
	}
	for name, row := range rows {
		if err := row.Verify(hsm.RoleRoot, hash); !errors.Is(err, hsm.ErrWrapped) {
			t.Errorf("%s: error %v, want ErrWrapped", name, err)
		}
	}
	// Wrong although the key itself signed it.
	signedRows := map[string]func(*hsm.Wrapped){
		"another format":             func(w *hsm.Wrapped) { w.Format += "x" },
		"another mechanism":          func(w *hsm.Wrapped) { w.Mechanism = "CKM_AES_CBC_PAD" },
		"octets of odd length":       func(w *hsm.Wrapped) { w.Octets = w.Octets[:79] },
		"one block":                  func(w *hsm.Wrapped) { w.Octets = w.Octets[:8] },
		"a kilobyte and a block":     func(w *hsm.Wrapped) { w.Octets = make([]byte, 1032) },
		"id of 15 octets":            func(w *hsm.Wrapped) { w.ID = w.ID[2:] },
		"id that is not hexadecimal": func(w *hsm.Wrapped) { w.ID = strings.Repeat("zz", 16) },
		"label with a space":         func(w *hsm.Wrapped) { w.Label = "a b" },
		"another key's SPKI":         func(w *hsm.Wrapped) { w.SPKI = hex.EncodeToString(otherHash[:]) },
		"trailing public key":        func(w *hsm.Wrapped) { w.PublicKey = append(bytes.Clone(w.PublicKey), 0) },
	}
	for name, change := range signedRows {
		if err := signed(t, private, with(change)).Verify(hsm.RoleRoot, hash); !errors.Is(err, hsm.ErrWrapped) {
			t.Errorf("%s: error %v, want ErrWrapped", name, err)
		}
	}
	if err := w.Verify(hsm.RoleRoot, otherHash); !errors.Is(err, hsm.ErrWrapped) {
		t.Errorf("another key wanted: error %v, want ErrWrapped", err)
	}
	for _, role := range []hsm.Role{hsm.RoleNone, hsm.RoleIntermediate, hsm.RoleCT, hsm.RoleRekor, hsm.RoleRekorV1, hsm.RoleTSA, hsm.RoleTUFOnline, "unknown"} {
		row := signed(t, private, with(func(w *hsm.Wrapped) { w.Role = role }))
		if err := row.Verify(role, hash); !errors.Is(err, hsm.ErrPolicy) {
			t.Errorf("role %q: error %v, want ErrPolicy", role, err)
		}
	}
}

func TestParseWrapped(t *testing.T) {
	private := newKey(t)
	w := wrappedBy(t, private)
	hash, err := hsm.SPKIHash(&private.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	text, err := w.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	got, err := hsm.ParseWrapped(text)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(w, got); diff != "" {
		t.Errorf("read back (-wrote +read):\n%s", diff)
	}
	replaced := func(old, new string) []byte {
		out := bytes.Replace(text, []byte(old), []byte(new), 1)
		if bytes.Equal(out, text) {
			t.Fatalf("%s is not in the text", old)
		}
		return out
	}
	rows := map[string][]byte{
		"nothing":            nil,
		"not JSON":           []byte("wrapped\n"),
		"null":               []byte("null\n"),
		"no line end":        text[:len(text)-1],
		"truncated":          text[:len(text)/2],
		"a trailing line":    append(bytes.Clone(text), '\n'),
		"twice":              append(bytes.Clone(text), text...),
		"a space":            replaced(`,"role"`, `, "role"`),
		"a member twice":     replaced(`"role":"root"`, `"role":"root","role":"root"`),
		"an unknown member":  replaced(`"role":"root"`, `"role":"root","rule":1`),
		"another case":       replaced(`"role"`, `"Role"`),
		"a missing member":   replaced(`"role":"root",`, ``),
		"an escape":          replaced(`"root-1"`, `"root\u002d1"`),
		"16 KiB and more":    replaced(`"root-1"`, `"`+strings.Repeat("a", 16<<10)+`"`),
		"a megabyte of [":    bytes.Repeat([]byte{'['}, 1<<20),
		"base64 with spaces": replaced(`"octets":"`, `"octets":"\n`),
	}
	for name, row := range rows {
		if _, err := hsm.ParseWrapped(row); !errors.Is(err, hsm.ErrWrapped) {
			t.Errorf("%s: error %v, want ErrWrapped", name, err)
		}
	}
	// No octet of the file can be changed.
	for i := range text {
		changed := bytes.Clone(text)
		changed[i] ^= 1
		read, err := hsm.ParseWrapped(changed)
		if err == nil {
			err = read.Verify(hsm.RoleRoot, hash)
		}
		if !errors.Is(err, hsm.ErrWrapped) {
			t.Fatalf("octet %d of %d changed: error %v, want ErrWrapped", i, len(text), err)
		}
	}
}

func FuzzParseWrapped(f *testing.F) {
	private := newKey(f)
	text, err := wrappedBy(f, private).Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte("{}\n"))
	f.Add([]byte(`{"format":"chancery wrapped key v1","octets":"AAAA"}` + "\n"))
	hash, err := hsm.SPKIHash(&private.PublicKey)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		w, err := hsm.ParseWrapped(in)
		if err != nil {
			if !errors.Is(err, hsm.ErrWrapped) {
				t.Errorf("error %v, want ErrWrapped", err)
			}
			return
		}
		out, err := w.Marshal()
		if err != nil || !bytes.Equal(in, out) {
			t.Errorf("%q is also written %q (%v)", in, out, err)
		}
		if err := w.Verify(hsm.RoleRoot, hash); err == nil && !bytes.Equal(in, text) {
			t.Errorf("%q verifies and was never signed", in)
		}
	})
}
