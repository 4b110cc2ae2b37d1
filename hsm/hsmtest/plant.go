package hsmtest

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
	p11 "github.com/miekg/pkcs11"
)

// Device describes token for Conformance. Opening it starts from cfg, which may
// set limits and a logger. logins may be nil.
func (token SoftHSMToken) Device(cfg pkcs11.Config, logins func() int) Device {
	cfg.Module, cfg.URI = token.Module, token.URI
	malformed := map[string]string{
		"empty":               "",
		"another scheme":      "tpm2:0x81000001",
		"no token":            "pkcs11:object=key",
		"no key":              token.URI,
		"PIN in the URI":      token.URI + ";object=key?pin-value=" + string(token.PIN),
		"PIN source":          token.URI + ";object=key?pin-source=/dev/null",
		"module in the URI":   token.URI + ";object=key?module-path=/lib/evil.so",
		"unknown attribute":   token.URI + ";object=key;colour=red",
		"attribute twice":     token.URI + ";object=key;object=key",
		"a certificate":       token.URI + ";object=key;type=cert",
		"half a percent":      token.URI + ";object=key;id=%4",
		"PIN as an attribute": token.URI + ";object=key;pin-value=" + string(token.PIN),
		"another token":       pkcs11.KeyURI("nobody", "key", nil),
		"a megabyte":          token.URI + ";object=" + strings.Repeat("a", 1<<20),
	}
	return Device{
		Open: func(ctx context.Context, pin []byte) (hsm.Token, error) {
			cfg := cfg
			cfg.PIN = pin
			opened, err := pkcs11.Open(ctx, cfg)
			if err != nil {
				return nil, err // not a nil *Token in an interface
			}
			return opened, nil
		},
		PIN:       token.PIN,
		URI:       func(label string, id []byte) string { return pkcs11.KeyURI(token.Label, label, id) },
		Malformed: malformed,
		Plant: func(t testing.TB, opened hsm.Token, planted Planted) {
			plant(t, opened, token.PIN, planted)
		},
		Logins: logins,
		Level:  hsm.LevelSoftware,
	}
}

// plant adds a P-256 pair to an open token as other tools do: through the
// library itself. Where the library has one state for the process it shares
// the token's login, else it logs in.
func plant(t testing.TB, token hsm.Token, pin []byte, planted Planted) {
	t.Helper()
	lib := p11.New(token.Info().Module)
	if lib == nil {
		t.Fatal("cannot load the module")
	}
	session, err := lib.OpenSession(token.Info().Slot, p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION)
	if errors.Is(err, p11.Error(p11.CKR_CRYPTOKI_NOT_INITIALIZED)) {
		session, err = ownSession(lib, token.Info().Label, string(pin))
		defer func() { _ = lib.Finalize() }()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lib.CloseSession(session) }()
	common := func(extra ...*p11.Attribute) []*p11.Attribute {
		return append(extra,
			p11.NewAttribute(p11.CKA_TOKEN, true),
			p11.NewAttribute(p11.CKA_ID, planted.ID),
			p11.NewAttribute(p11.CKA_LABEL, planted.Label),
		)
	}
	p256 := []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}
	_, _, err = lib.GenerateKeyPair(session,
		[]*p11.Mechanism{p11.NewMechanism(p11.CKM_EC_KEY_PAIR_GEN, nil)},
		common(p11.NewAttribute(p11.CKA_EC_PARAMS, p256), p11.NewAttribute(p11.CKA_VERIFY, true)),
		common(
			p11.NewAttribute(p11.CKA_PRIVATE, true),
			p11.NewAttribute(p11.CKA_SENSITIVE, true),
			p11.NewAttribute(p11.CKA_EXTRACTABLE, false),
			p11.NewAttribute(p11.CKA_SIGN, true),
			p11.NewAttribute(p11.CKA_UNWRAP, false),
			p11.NewAttribute(p11.CKA_DERIVE, false),
			p11.NewAttribute(p11.CKA_DECRYPT, planted.Careless),
			p11.NewAttribute(p11.CKA_MODIFIABLE, planted.Careless),
		))
	if err != nil {
		t.Fatal(err)
	}
}

// ownSession initialises a library and logs in to the token with this label.
func ownSession(lib *p11.Ctx, label, pin string) (p11.SessionHandle, error) {
	if err := lib.Initialize(); err != nil {
		return 0, err
	}
	slots, err := lib.GetSlotList(true)
	if err != nil {
		return 0, err
	}
	for _, slot := range slots {
		if info, err := lib.GetTokenInfo(slot); err != nil || info.Label != label {
			continue
		}
		session, err := lib.OpenSession(slot, p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION)
		if err != nil {
			return 0, err
		}
		return session, lib.Login(session, p11.CKU_USER, pin)
	}
	return 0, errors.New("token " + label + " is not there")
}
