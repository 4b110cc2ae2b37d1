package config

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/testing/ca"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/hsm"
)

// outputs writes a trust folder after a rotation: two shards of each log, of
// which keys.yaml has the keys of the second.
func outputs(t *testing.T) string {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dir, valid := t.TempDir(), trust.Validity{Start: time.Now()}
	write := func(name string, content []byte, err error) {
		t.Helper()
		check(err)
		check(os.WriteFile(filepath.Join(dir, name), content, 0o600))
	}
	const url = "https://sig.example:8443"
	v, err := ca.NewVirtualSigstore()
	check(err)
	fulcio := v.FulcioCertificateAuthorities()[0].(*root.FulcioCertificateAuthority)
	trusted := trust.Root{CertificateAuthorities: []trust.Authority{{
		CommonName: "root", URI: url, Chain: []*x509.Certificate{fulcio.Intermediates[0], fulcio.Root}, Validity: valid,
	}}}
	ring := &trust.KeyRing{Tokens: map[string]trust.Token{"online": {URI: "pkcs11:token=online", Module: "/m.so"}}, Keys: map[hsm.Role]trust.Key{}}
	for i, role := range trust.Roles() {
		ring.Keys[role] = trust.Key{Token: "online", URI: "pkcs11:token=online;id=%01", SPKI: [32]byte{byte(i + 1)}}
	}
	for _, of := range []struct {
		role  hsm.Role
		logs  *[]trust.Log
		names []string
	}{{hsm.RoleRekor, &trusted.Logs, []string{"/log/log1", "/log/log2"}}, {hsm.RoleCT, &trusted.CTLogs, []string{"/ct/ct1", "/ct/ct2"}}} {
		for _, name := range of.names {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			check(err)
			*of.logs = append(*of.logs, trust.Log{BaseURL: url + name, PublicKey: &key.PublicKey, Validity: valid})
			k := ring.Keys[of.role]
			k.SPKI, err = hsm.SPKIHash(key.Public())
			check(err)
			ring.Keys[of.role] = k
		}
	}
	raw, err := trusted.Marshal()
	write("trusted_root.json", raw, err)
	raw, err = trust.SigningConfig{CAs: []trust.Service{{URL: url, MajorAPIVersion: 1, Validity: valid, Operator: "acme"}}}.Marshal()
	write("signing_config.v0.2.json", raw, err)
	raw, err = ring.Marshal()
	write("keys.yaml", raw, err)
	return dir
}

// What the ceremony said is not said again; what the file says goes before it.
func TestFromCeremony(t *testing.T) {
	dir := outputs(t)
	silent := strings.NewReplacer("url: https://sig.example:8443\n", "", "ct: {shard: ct1}\n", "", "rekor: {shard: log1}\n", "",
		"trust: /trust", "trust: "+dir).Replace(minimal)
	c, err := Parse([]byte(silent), "/etc/chancery")
	if err != nil {
		t.Fatal(err)
	}
	if c.URL != "https://sig.example:8443" || c.CT.Shard != "ct2" || c.Rekor.Shard != "log2" || c.CT.Origin != "sig.example:8443/ct/ct2" || c.Rekor.Origin != "sig.example" {
		t.Errorf("read as %q, CT %+v, Rekor %+v", c.URL, c.CT.Log, c.Rekor.Log)
	}
	if c, err = Parse([]byte(strings.Replace(minimal, "/trust", dir, 1)), "/etc/chancery"); err != nil || c.CT.Shard != "ct1" || c.Rekor.Shard != "log1" {
		t.Errorf("shards of the file were replaced: %v", err)
	}
	for _, name := range []string{"signing_config.v0.2.json", "trusted_root.json", "keys.yaml"} {
		path := filepath.Join(dir, name)
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, broken := range []string{"", "{}", strings.ReplaceAll(string(content), "spki-sha256: ", "spki-sha256: ff")} {
			if broken == string(content) {
				continue
			}
			if err := os.WriteFile(path, []byte(broken), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := Parse([]byte(silent), "/etc/chancery"); !errors.Is(err, ErrInvalid) {
				t.Errorf("%s of %d octets: error %v, want ErrInvalid", name, len(broken), err)
			}
		}
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
