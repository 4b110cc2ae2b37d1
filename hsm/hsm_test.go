package hsm_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"maps"
	"strings"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
)

func TestVerify(t *testing.T) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte("text"))
	sig, err := ecdsa.SignASN1(rand.Reader, private, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	if err := hsm.Verify(&private.PublicKey, digest[:], sig); err != nil {
		t.Fatalf("good signature: %v", err)
	}
	flip := func(b []byte, i int) []byte {
		b = append([]byte(nil), b...)
		b[i] ^= 1
		return b
	}
	rows := []struct {
		name        string
		pub         *ecdsa.PublicKey
		digest, sig []byte
	}{
		{"another key", &other.PublicKey, digest[:], sig},
		{"flipped digest", &private.PublicKey, flip(digest[:], 0), sig},
		{"flipped last bit", &private.PublicKey, digest[:], flip(sig, len(sig)-1)},
		{"trailing octet", &private.PublicKey, digest[:], append(append([]byte(nil), sig...), 0)},
		{"truncated", &private.PublicKey, digest[:], sig[:len(sig)-1]},
		{"empty", &private.PublicKey, digest[:], nil},
		{"r and s are 0", &private.PublicKey, digest[:], []byte{0x30, 6, 2, 1, 0, 2, 1, 0}},
		{"raw r and s", &private.PublicKey, digest[:], make([]byte, 64)},
		{"a megabyte", &private.PublicKey, digest[:], make([]byte, 1<<20)},
	}
	for _, row := range rows {
		if err := hsm.Verify(row.pub, row.digest, row.sig); !errors.Is(err, hsm.ErrBadSignature) {
			t.Errorf("%s: error %v, want ErrBadSignature", row.name, err)
		}
	}
}

func TestCheckDigest(t *testing.T) {
	for _, hash := range []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512} {
		if err := hsm.CheckDigest(make([]byte, hash.Size()), hash); err != nil {
			t.Errorf("%s: %v", hash, err)
		}
		for _, n := range []int{0, hash.Size() - 1, hash.Size() + 1} {
			if err := hsm.CheckDigest(make([]byte, n), hash); !errors.Is(err, hsm.ErrUnsupported) {
				t.Errorf("%s, %d octets: error %v, want ErrUnsupported", hash, n, err)
			}
		}
	}
	for _, opts := range []crypto.SignerOpts{nil, crypto.Hash(0), crypto.SHA1, crypto.MD5, crypto.SHA3_256} {
		if err := hsm.CheckDigest(make([]byte, 32), opts); !errors.Is(err, hsm.ErrUnsupported) {
			t.Errorf("%v: error %v, want ErrUnsupported", opts, err)
		}
	}
}

// madeHere are the attributes of a key that satisfies the strictest policy.
var madeHere = map[string]string{
	"TOKEN": "true", "PRIVATE": "true", "SENSITIVE": "true", "ALWAYS_SENSITIVE": "true",
	"EXTRACTABLE": "false", "NEVER_EXTRACTABLE": "true", "LOCAL": "true", "SIGN": "true",
	"DECRYPT": "false", "UNWRAP": "false", "DERIVE": "false", "MODIFIABLE": "false",
}

func TestPolicy(t *testing.T) {
	if err := (hsm.Policy{}).Check(madeHere); err != nil {
		t.Fatal(err)
	}
	flip := map[string]string{"true": "false", "false": "true"}
	for name, value := range madeHere {
		for _, bad := range []string{flip[value], "", "unavailable: CKR_ATTRIBUTE_TYPE_INVALID", "01"} {
			attributes := maps.Clone(madeHere)
			attributes[name] = bad
			err := (hsm.Policy{}).Check(attributes)
			if !errors.Is(err, hsm.ErrPolicy) || !strings.Contains(err.Error(), name) {
				t.Errorf("%s is %q: error %v, want ErrPolicy that names it", name, bad, err)
			}
		}
	}
	if err := (hsm.Policy{}).Check(nil); !errors.Is(err, hsm.ErrPolicy) {
		t.Errorf("no attributes: error %v, want ErrPolicy", err)
	}
}

// TestRolePolicy: only the roots may be backed up, and only by wrapping. A key
// that is open for no role satisfies the floor.
func TestRolePolicy(t *testing.T) {
	with := func(changes ...string) map[string]string {
		attributes := maps.Clone(madeHere)
		for i := 0; i < len(changes); i += 2 {
			attributes[changes[i]] = changes[i+1]
		}
		return attributes
	}
	backup := with("EXTRACTABLE", "true", "NEVER_EXTRACTABLE", "false", "WRAP_WITH_TRUSTED", "true")
	restored := with("LOCAL", "false", "ALWAYS_SENSITIVE", "false", "NEVER_EXTRACTABLE", "false")
	plain := with("SENSITIVE", "false")
	loose := with("EXTRACTABLE", "true", "NEVER_EXTRACTABLE", "false", "WRAP_WITH_TRUSTED", "false")
	online := []hsm.Role{hsm.RoleIntermediate, hsm.RoleCT, hsm.RoleRekorV1, hsm.RoleRekor, hsm.RoleTSA, hsm.RoleTUFOnline, "unknown"}
	for _, role := range online {
		for name, attributes := range map[string]map[string]string{"backup": backup, "restored": restored, "plain": plain} {
			if err := role.Policy().Check(attributes); !errors.Is(err, hsm.ErrPolicy) {
				t.Errorf("role %q accepts a %s key: %v", role, name, err)
			}
		}
	}
	for _, role := range []hsm.Role{hsm.RoleRoot, hsm.RoleTSARoot, hsm.RoleNone} {
		for name, attributes := range map[string]map[string]string{"backup": backup, "restored": restored} {
			if err := role.Policy().Check(attributes); err != nil {
				t.Errorf("role %q refuses a %s key: %v", role, name, err)
			}
		}
		for name, attributes := range map[string]map[string]string{"plain": plain, "loose": loose} {
			if err := role.Policy().Check(attributes); !errors.Is(err, hsm.ErrPolicy) {
				t.Errorf("role %q accepts a %s key: %v", role, name, err)
			}
		}
	}
}

func TestRoleShare(t *testing.T) {
	want := map[hsm.Role]string{
		hsm.RoleRekor: "heads", hsm.RoleRekorV1: "heads",
		hsm.RoleIntermediate: "issuing", hsm.RoleCT: "issuing",
		hsm.RoleTSA:  "timestamps",
		hsm.RoleRoot: "rest", hsm.RoleTSARoot: "rest", hsm.RoleTUFOnline: "rest", hsm.RoleNone: "rest", "unknown": "rest",
	}
	for role, name := range want {
		if got := role.Share(); got.String() != name || got >= hsm.Shares {
			t.Errorf("role %q is in share %s, want %s", role, got, name)
		}
	}
}

func TestLevelOf(t *testing.T) {
	rows := []struct {
		name  string
		token hsm.TokenInfo
		local string
		want  hsm.Level
	}{
		{"SoftHSM", hsm.TokenInfo{Manufacturer: "SoftHSM project", Model: "SoftHSM v2"}, "true", hsm.LevelSoftware},
		{"NSS", hsm.TokenInfo{Manufacturer: "Mozilla Foundation", Model: "NSS 3"}, "true", hsm.LevelSoftware},
		{"a TPM emulator", hsm.TokenInfo{Manufacturer: "IBM", Model: "SWTPM"}, "true", hsm.LevelSoftware},
		{"a TPM emulator as libtpms names itself", hsm.TokenInfo{Manufacturer: "IBM", Model: "SW   TPM"}, "true", hsm.LevelSoftware},
		{"a device", hsm.TokenInfo{Manufacturer: "Nitrokey", Model: "Nitrokey HSM"}, "true", hsm.LevelModule},
		{"restored", hsm.TokenInfo{Manufacturer: "Nitrokey"}, "false", hsm.LevelRestored},
		{"unknown origin", hsm.TokenInfo{Manufacturer: "Nitrokey"}, "unavailable: CKR_ATTRIBUTE_TYPE_INVALID", hsm.LevelRestored},
	}
	for _, row := range rows {
		if got := hsm.LevelOf(row.token, map[string]string{"LOCAL": row.local}); got != row.want {
			t.Errorf("%s: level %s, want %s", row.name, got, row.want)
		}
	}
}

func FuzzParseSPKIHash(f *testing.F) {
	f.Add(strings.Repeat("0a", 32))
	f.Add("")
	f.Add(strings.Repeat("zz", 32))
	f.Fuzz(func(t *testing.T, text string) {
		h, err := hsm.ParseSPKIHash(text)
		if err == nil && (len(text) != 64 || h == [32]byte{} && strings.Trim(text, "0") != "") {
			t.Errorf("%q was read as %x", text, h)
		}
	})
}
