package trust

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/chancery-ca/chancery/hsm"
)

func newKeyRing() *KeyRing {
	ring := &KeyRing{
		Tokens: map[string]Token{
			"root":   {"pkcs11:token=acme%20root;serial=01", "/usr/lib/softhsm/libsofthsm2.so"},
			"online": {"tpm2:?device=/dev/tpmrm0", ""},
		},
		Keys: map[hsm.Role]Key{},
	}
	for i, role := range Roles() {
		ring.Keys[role] = Key{"root", "pkcs11:token=acme%20root;object=" + string(role) + ";id=%01", [32]byte{byte(i + 1)}}
	}
	return ring
}

func TestKeyRingRoundTrip(t *testing.T) {
	want := newKeyRing()
	data, err := want.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "keys.yaml")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := LoadKeyRing(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("read back (-want +got):\n%s", diff)
	}
	if again, err := got.Marshal(); err != nil || !bytes.Equal(again, data) {
		t.Errorf("written again it differs (%v)", err)
	}
	if ref := got.Keys[hsm.RoleCT].Ref(); ref.URI != want.Keys[hsm.RoleCT].URI || ref.SPKI != want.Keys[hsm.RoleCT].SPKI {
		t.Errorf("ref %v", ref)
	}
	if _, err := LoadKeyRing(path + "x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
}

func TestParseKeyRingRefuses(t *testing.T) {
	data, err := newKeyRing().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	const one, two = "0100000000000000000000000000000000000000000000000000000000000000", "0200000000000000000000000000000000000000000000000000000000000000"
	for _, tc := range []struct{ name, old, new string }{
		{"version", "version: 1", "version: 2"},
		{"no version", "version: 1\n", ""},
		{"unknown key", "version: 1", "version: 1\nfoo: 1"},
		{"unknown key below", "spki-sha256:", "spki:"},
		{"unknown role", "\n  ct:", "\n  cat:"},
		{"role twice", "\n  ct:", "\n  root:"},
		{"unknown token", "token: root\n", "token: toot\n"},
		{"hash cut short", one, one[2:]},
		{"hash not hexadecimal", one, "zz" + one[2:]},
		{"hash of nothing", one, strings.Repeat("0", 64)},
		{"two roles with one key", two, one},
		{"URI of another scheme", "uri: pkcs11:token=acme%20root;object=root", "uri: file:/root.key;object=root"},
		{"token with a PIN", "serial=01", "serial=01?pin-value=1234"},
		{"key with a PIN source", "object=root;", "object=root;pin-source=/etc/pin;"},
		{"second document", "version: 1", "---\na: 1\n---\nversion: 1"},
		{"empty", string(data), ""},
		{"a word", string(data), "hello"},
		{"long line", "version: 1", "version: 1 #" + strings.Repeat("x", maxLine)},
		{"huge", "version: 1", strings.Repeat("# x\n", maxKeyRing/4) + "version: 1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			changed := strings.Replace(string(data), tc.old, tc.new, 1)
			if changed == string(data) {
				t.Fatalf("the file has no %q", tc.old)
			}
			if _, err := ParseKeyRing([]byte(changed)); !errors.Is(err, ErrFormat) {
				t.Errorf("error %v, want ErrFormat", err)
			}
		})
	}
	ring := newKeyRing()
	delete(ring.Keys, hsm.RoleTSA)
	if _, err := ring.Marshal(); !errors.Is(err, ErrIncomplete) {
		t.Errorf("a ring without a timestamp key: %v, want ErrIncomplete", err)
	}
	ring = newKeyRing()
	delete(ring.Keys, hsm.RoleRekorV1)
	delete(ring.Keys, hsm.RoleTUFOnline)
	if _, err := ring.Marshal(); err != nil {
		t.Errorf("a ring without the optional keys: %v", err)
	}
}

func FuzzParseKeyRing(f *testing.F) {
	data, err := newKeyRing().Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		ring, err := ParseKeyRing(data)
		if err != nil {
			if !errors.Is(err, ErrFormat) && !errors.Is(err, ErrIncomplete) {
				t.Fatalf("error %v is neither ErrFormat nor ErrIncomplete", err)
			}
			return
		}
		if _, err := ring.Marshal(); err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
	})
}
