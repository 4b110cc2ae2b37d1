package tpm_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/tpm"
)

// TestCertificate: a self-signed certificate by a TPM key is good for openssl.
func TestCertificate(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		hsmtest.Missing(t, "openssl is not installed (Debian: apt install openssl)")
	}
	token := hsmtest.OpenSWTPM(t)
	for _, algorithm := range []hsm.Algorithm{hsm.ECDSAP256, hsm.ECDSAP384} {
		key := hsmtest.NewKey(t, token, string(algorithm), algorithm)
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "TPM"},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
			SignatureAlgorithm: map[hsm.Algorithm]x509.SignatureAlgorithm{
				hsm.ECDSAP256: x509.ECDSAWithSHA256, hsm.ECDSAP384: x509.ECDSAWithSHA384,
			}[algorithm],
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "root.pem")
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), openssl, "verify", "-check_ss_sig", "-x509_strict", "-CAfile", file, file)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: openssl: %v\n%s", algorithm, err, out)
		}
	}
}

// TestOtherTools: tpm2-tools makes the same storage key, loads our key file's
// blobs under it and signs with our authorisation value; and the other way
// round, a key that tpm2-tools made with that value is a key of ours.
func TestOtherTools(t *testing.T) {
	e := hsmtest.SWTPM(t)
	cfg := e.Config(t)
	token := open(t, cfg)
	key := hsmtest.NewKey(t, token, "ours", hsm.ECDSAP256)
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	auth := "hex:" + hex.EncodeToString(cfg.Auth)
	ours := blobs(t, read(t, filepath.Join(cfg.Dir, "ours.pem")))
	write(t, at("ours.pub"), ours.Public)
	write(t, at("ours.priv"), ours.Private)
	digest := make([]byte, 32)
	_, _ = rand.Read(digest)
	write(t, at("digest"), digest)

	tools(t, e, "tpm2_createprimary", "-Q", "-C", "o", "-G", "ecc", "-g", "sha256", "-c", at("srk"),
		"-a", "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|decrypt")
	tools(t, e, "tpm2_flushcontext", "-t")
	tools(t, e, "tpm2_load", "-Q", "-C", at("srk"), "-u", at("ours.pub"), "-r", at("ours.priv"), "-c", at("ours"))
	tools(t, e, "tpm2_flushcontext", "-t")
	tools(t, e, "tpm2_sign", "-Q", "-c", at("ours"), "-p", auth, "-g", "sha256", "-d", "-f", "plain", "-o", at("sig"), at("digest"))
	tools(t, e, "tpm2_flushcontext", "-t")
	if !verified(key, digest, read(t, at("sig"))) {
		t.Error("the signature by tpm2-tools does not verify")
	}

	tools(t, e, "tpm2_create", "-Q", "-C", at("srk"), "-G", "ecc256:ecdsa-sha256", "-g", "sha256", "-p", auth,
		"-a", "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|sign", "-u", at("theirs.pub"), "-r", at("theirs.priv"))
	tools(t, e, "tpm2_flushcontext", "-t")
	theirs := tssKey{ours.Type, ours.Parent, read(t, at("theirs.pub")), read(t, at("theirs.priv"))}
	der, err := asn1.Marshal(theirs)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(cfg.Dir, "theirs.pem"), pem.EncodeToMemory(&pem.Block{Type: "TSS2 PRIVATE KEY", Bytes: der}))
	token = open(t, cfg)
	_, err = token.Open(t.Context(), hsm.Ref{URI: tpm.KeyURI(cfg.Dir, cfg.Device, "theirs", nil), SPKI: key.Ref().SPKI}, hsm.RoleCT)
	wants(t, "their key with our hash", err, hsm.ErrMismatch)
	listed, err := token.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range listed {
		if l.Label != "theirs" {
			continue
		}
		spki, err := hsm.ParseSPKIHash(l.SPKI)
		if err != nil {
			t.Fatal(err)
		}
		opened, err := token.Open(t.Context(), hsm.Ref{URI: l.URI, SPKI: spki}, hsm.RoleCT)
		if err != nil {
			t.Fatal(err)
		}
		signs(t, opened)
		return
	}
	t.Error("their key is not listed")
}

// tssKey is a TSS2 PEM file's contents as another reader has them.
type tssKey struct {
	Type            asn1.ObjectIdentifier
	Parent          int64
	Public, Private []byte
}

// blobs reads a key file by encoding/pem and encoding/asn1 alone.
func blobs(t *testing.T, text []byte) tssKey {
	t.Helper()
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "TSS2 PRIVATE KEY" {
		t.Fatal("no TSS2 PEM")
	}
	var k tssKey
	if rest, err := asn1.Unmarshal(block.Bytes, &k); err != nil || len(rest) != 0 {
		t.Fatalf("%v, %d octets more", err, len(rest))
	}
	return k
}

// TestPytss: the TPM software stack's own reader of TSS2 PEM files takes ours.
func TestPytss(t *testing.T) {
	const python = "/usr/bin/python3" // Debian's own, which has Debian's modules
	if err := exec.Command(python, "-c", "from tpm2_pytss.tsskey import TSSPrivKey").Run(); err != nil {
		hsmtest.Missing(t, "tpm2-pytss is not installed (Debian: apt install python3-tpm2-pytss)")
	}
	cfg := hsmtest.SWTPM(t).Config(t)
	token := hsmtest.OpenTPM(t, cfg)
	hsmtest.NewKey(t, token, "key", hsm.ECDSAP384)
	file := filepath.Join(cfg.Dir, "key.pem")
	const script = `
import sys
from tpm2_pytss.tsskey import TSSPrivKey
from tpm2_pytss.constants import TPM2_ECC
k = TSSPrivKey.from_pem(open(sys.argv[1], "rb").read())
assert k.parent == 0x40000001, k.parent
assert not k.empty_auth
assert k.public.publicArea.parameters.eccDetail.curveID == TPM2_ECC.NIST_P384
sys.stdout.buffer.write(bytes(k.public.publicArea.unique.ecc.x))
`
	out, err := exec.CommandContext(t.Context(), python, "-c", script, file).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if k := blobs(t, read(t, file)); len(out) == 0 || !bytes.Contains(k.Public, out) {
		t.Errorf("its x is %x", out)
	}
}

func write(t *testing.T, path string, text []byte) {
	t.Helper()
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// verified says whether sig, in ASN.1, is the key's.
func verified(key hsm.Key, digest, sig []byte) bool {
	return hsm.Verify(key.Public().(*ecdsa.PublicKey), digest, sig) == nil
}
