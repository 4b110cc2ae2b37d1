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

// tpmRing has the CT key in a TPM whose URI has this path.
func tpmRing(t *testing.T, path, key string) *KeyRing {
	t.Helper()
	ring := newKeyRing()
	ring.Tokens["online"] = Token{URI: "tpm2:" + path + "?device=/run/tpm.sock"}
	ct := ring.Keys[hsm.RoleCT]
	ct.Token, ct.URI = "online", "tpm2:"+key
	ring.Keys[hsm.RoleCT] = ct
	return ring
}

// A ceremony's output folder can be moved with the key files of a TPM in it.
func TestKeyRingFolders(t *testing.T) {
	const device = "?device=/run/tpm.sock"
	for _, tc := range []struct{ name, token, key, wantToken, wantKey string }{
		{"relative", "tpm", "tpm/ct.pem" + device, "DIR/tpm" + device, "DIR/tpm/ct.pem" + device},
		{"with an id", "tpm", "tpm" + device + "&id=00", "DIR/tpm" + device, "DIR/tpm" + device + "&id=00"},
		{"upwards", "../tpm", "../tpm/ct.pem" + device, "UP/tpm" + device, "UP/tpm/ct.pem" + device},
		{"the folder itself", ".", "./ct.pem" + device, "DIR" + device, "DIR/ct.pem" + device},
		{"encoded", "t%20m", "t%20m/ct.pem" + device, "DIR/t%20m" + device, "DIR/t%20m/ct.pem" + device},
		{"absolute", "/srv/tpm", "/srv/tpm/ct.pem" + device, "/srv/tpm" + device, "/srv/tpm/ct.pem" + device},
		{"an encoded slash is one", "%2Fsrv", "%2Fsrv/ct.pem" + device, "%2Fsrv" + device, "%2Fsrv/ct.pem" + device},
		{"persistent", "tpm", "0x81010001" + device, "DIR/tpm" + device, "0x81010001" + device},
		{"wrongly encoded", "t%zz", "t%zz/ct.pem" + device, "t%zz" + device, "t%zz/ct.pem" + device},
		{"no folder", "", "ct.pem" + device, device, "ct.pem" + device},
	} {
		t.Run(tc.name, func(t *testing.T) {
			data, err := tpmRing(t, tc.token, tc.key).Marshal()
			if err != nil {
				t.Fatal(err)
			}
			up := t.TempDir()
			dir := filepath.Join(up, "my trust")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "keys.yaml"), data, 0o600); err != nil {
				t.Fatal(err)
			}
			ring, err := LoadKeyRing(filepath.Join(dir, "keys.yaml"))
			if err != nil {
				t.Fatal(err)
			}
			where := strings.NewReplacer("DIR", up+"/my%20trust", "UP", up)
			if diff := cmp.Diff("tpm2:"+where.Replace(tc.wantToken), ring.Tokens["online"].URI); diff != "" {
				t.Errorf("token (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff("tpm2:"+where.Replace(tc.wantKey), ring.Keys[hsm.RoleCT].URI); diff != "" {
				t.Errorf("key (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(newKeyRing().Keys[hsm.RoleRoot], ring.Keys[hsm.RoleRoot]); diff != "" {
				t.Errorf("a PKCS#11 key changed:\n%s", diff)
			}
		})
	}
}

func TestSetFolder(t *testing.T) {
	ring := tpmRing(t, "", "ct.pem?device=/run/tpm.sock")
	if err := ring.SetFolder("online", "/etc/keys of ours"); err != nil {
		t.Fatal(err)
	}
	if got, want := ring.Tokens["online"].URI, "tpm2:/etc/keys%20of%20ours?device=/run/tpm.sock"; got != want {
		t.Errorf("token %s, want %s", got, want)
	}
	if got, want := ring.Keys[hsm.RoleCT].URI, "tpm2:/etc/keys%20of%20ours/ct.pem?device=/run/tpm.sock"; got != want {
		t.Errorf("key %s, want %s", got, want)
	}
	for _, tc := range []struct{ name, token, dir string }{
		{"a folder is named", "online", "/etc/other"},
		{"a PKCS#11 token", "root", "/etc/keys"},
		{"no such token", "tpm", "/etc/keys"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := ring.SetFolder(tc.token, tc.dir); !errors.Is(err, ErrFormat) {
				t.Errorf("error %v, want ErrFormat", err)
			}
		})
	}
	if err := tpmRing(t, "", "ct.pem?device=/x").SetFolder("online", "keys"); !errors.Is(err, ErrFormat) {
		t.Errorf("a relative folder: %v, want ErrFormat", err)
	}
}
