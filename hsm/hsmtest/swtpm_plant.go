package hsmtest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/tpm"
	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// Device describes the TPM for Conformance. Opening it starts from cfg, which
// may set limits and a logger.
func (e *Emulator) Device(t testing.TB, cfg tpm.Config) Device {
	t.Helper()
	cfg.Device, cfg.Dir = e.Socket(), e.KeyDir(t)
	pin := []byte(rand.Text())
	careful, careless := e.foreignKey(t, false), e.foreignKey(t, true)
	key := tpm.KeyURI(cfg.Dir, cfg.Device, "key", nil)
	return Device{
		Open: func(ctx context.Context, pin []byte) (hsm.Token, error) {
			cfg := cfg
			cfg.Auth = pin
			opened, err := tpm.Open(ctx, cfg)
			if err != nil {
				return nil, err // not a nil *Token in an interface
			}
			return opened, nil
		},
		PIN: pin,
		URI: func(label string, id []byte) string { return tpm.KeyURI(cfg.Dir, cfg.Device, label, id) },
		Malformed: map[string]string{
			"empty":             "",
			"another scheme":    "pkcs11:token=a;object=key",
			"no key":            tpm.TokenURI(cfg.Dir, cfg.Device),
			"no device":         "tpm2:" + cfg.Dir + "/key.pem",
			"another device":    tpm.KeyURI(cfg.Dir, "/dev/null", "key", nil),
			"another folder":    tpm.KeyURI("/tmp", cfg.Device, "key", nil),
			"PIN in the URI":    key + "&auth=" + string(pin),
			"device twice":      key + "&device=" + cfg.Device,
			"half a percent":    key + "%4",
			"half an id":        key + "&id=00",
			"a fragment":        key + "#PIN",
			"out of the folder": "tpm2:" + cfg.Dir + "/../keys/key.pem?device=" + cfg.Device,
			"relative":          "tpm2:keys/key.pem?device=" + cfg.Device,
			"not persistent":    tpm.HandleURI(cfg.Device, 0x80000000),
			"nothing there":     tpm.HandleURI(cfg.Device, 0x81234567),
			"a megabyte":        key + "&id=" + strings.Repeat("0", 1<<20),
		},
		Plant: func(t testing.TB, _ hsm.Token, planted Planted) {
			t.Helper()
			text := careful
			if planted.Careless {
				text = careless
			}
			text = append(fmt.Appendf(nil, "Label: %s\nId: %x\n", planted.Label, planted.ID), text...)
			if err := os.WriteFile(filepath.Join(cfg.Dir, planted.Label+".pem"), text, 0o600); err != nil {
				t.Fatal(err)
			}
		},
		Level:    hsm.LevelSoftware,
		OneHash:  "a TPM key's scheme names its hash",
		OneLabel: "the label is the name of the key file",
		NoBackup: "a fixedTPM key cannot leave its TPM",
		PINAtUse: "a TPM has no login",
	}
}

// foreignKey makes a P-256 key as other tools do, without our package, and
// returns its TSS2 PEM. A careless one is good for ECDH too. No token is open.
func (e *Emulator) foreignKey(t testing.TB, careless bool) []byte {
	t.Helper()
	conn, err := net.Dial("unix", e.Socket())
	if err != nil {
		t.Fatal(err)
	}
	device := transport.FromReadWriteCloser(conn)
	defer func() { _ = device.Close() }()
	above := tpm2.ECCSRKTemplate
	above.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{})
	srk, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(above)}.Execute(device)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = tpm2.FlushContext{FlushHandle: srk.ObjectHandle}.Execute(device) }()
	scheme := tpm2.TPMTECCScheme{
		Scheme:  tpm2.TPMAlgECDSA,
		Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
	}
	if careless {
		scheme = tpm2.TPMTECCScheme{}
	}
	made, err := tpm2.Create{
		ParentHandle: tpm2.NamedHandle{Handle: srk.ObjectHandle, Name: srk.Name},
		InPublic: tpm2.New2B(tpm2.TPMTPublic{
			Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
			ObjectAttributes: tpm2.TPMAObject{
				FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true,
				SignEncrypt: true, Decrypt: careless,
			},
			Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
				Scheme: scheme, CurveID: tpm2.TPMECCNistP256,
			}),
		}),
	}.Execute(device)
	if err != nil {
		t.Fatal(err)
	}
	der, err := asn1.Marshal(struct {
		Type            asn1.ObjectIdentifier
		Parent          int64
		Public, Private []byte
	}{
		asn1.ObjectIdentifier{2, 23, 133, 10, 1, 3}, int64(tpm2.TPMRHOwner),
		tpm2.Marshal(made.OutPublic), tpm2.Marshal(made.OutPrivate),
	})
	if err != nil {
		t.Fatal(err)
	}
	var text bytes.Buffer
	if err := pem.Encode(&text, &pem.Block{Type: "TSS2 PRIVATE KEY", Bytes: der}); err != nil {
		t.Fatal(err)
	}
	return text.Bytes()
}
