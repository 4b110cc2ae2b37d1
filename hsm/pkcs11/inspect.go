package pkcs11

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/miekg/pkcs11"
)

var _ hsm.Lister = (*Token)(nil)

// CheckTokenURI says, without touching a device, whether uri names a token as
// Config.URI must. The error wraps ErrURI.
func CheckTokenURI(uri string) error {
	_, err := parseURI(uri)
	return err
}

// CheckKeyURI says the same of the URI of a key, as hsm.Ref has it.
func CheckKeyURI(uri string) error {
	_, err := parseKeyURI(uri)
	return err
}

// inspectTime bounds a look at a library's tokens.
const inspectTime = 30 * time.Second

// Inspect describes the tokens of the library at the absolute path module, or
// with uri those that it names. It logs in to none and opens no session, so it
// neither needs nor harms a PIN. Errors: ErrNotFound if there is none, ErrURI,
// ErrLost.
func Inspect(ctx context.Context, module, uri string) ([]hsm.Inspection, error) {
	names := func(hsm.TokenInfo) bool { return true }
	if uri != "" {
		u, err := parseURI(uri)
		if err != nil {
			return nil, fmt.Errorf("inspect token: %w", err)
		}
		names = u.names
	}
	m, err := moduleFor(module)
	if err != nil {
		return nil, fmt.Errorf("inspect token: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, inspectTime)
	defer cancel()
	var found []hsm.Inspection
	err = m.exclusive(ctx, func() error {
		return m.initialised(func() (err error) {
			found, err = m.inspect(names)
			return err
		})
	}, func() {})
	if err == nil && len(found) == 0 {
		err = hsm.ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("inspect tokens of %s: %w", m.path, err)
	}
	return found, nil
}

// inspect describes the present tokens; the library is initialised.
func (m *module) inspect(names func(hsm.TokenInfo) bool) ([]hsm.Inspection, error) {
	tokens, err := m.present()
	if err != nil {
		return nil, err
	}
	library, err := libraryInfo(m.handle(), m.path)
	if err != nil {
		return nil, err
	}
	var found []hsm.Inspection
	for _, t := range tokens {
		if !names(t) {
			continue
		}
		d := hsm.Inspection{Token: t, Library: library}
		if d.Slot, err = slotInfo(m.handle(), t.Slot); err != nil {
			return nil, err
		}
		if d.Mechanisms, err = mechanismList(m.handle(), t.Slot); err != nil {
			return nil, err
		}
		found = append(found, d)
	}
	return found, nil
}

// libraryInfo translates CK_INFO.
func libraryInfo(raw *pkcs11.Ctx, path string) (hsm.LibraryInfo, error) {
	info, err := raw.GetInfo()
	if err != nil {
		return hsm.LibraryInfo{}, fmt.Errorf("describe library: %w", classify(err))
	}
	return hsm.LibraryInfo{
		Path: path, Description: unpad(info.LibraryDescription), Manufacturer: unpad(info.ManufacturerID),
		Version: versionText(info.LibraryVersion), Interface: versionText(info.CryptokiVersion),
	}, nil
}

// slotFlags are the slot flags (PKCS #11 v2.40, 3.2).
var slotFlags = []struct {
	flag uint
	name string
}{
	{pkcs11.CKF_TOKEN_PRESENT, "TOKEN_PRESENT"},
	{pkcs11.CKF_REMOVABLE_DEVICE, "REMOVABLE_DEVICE"},
	{pkcs11.CKF_HW_SLOT, "HW_SLOT"},
}

// slotInfo translates CK_SLOT_INFO.
func slotInfo(raw *pkcs11.Ctx, id uint) (hsm.SlotInfo, error) {
	info, err := raw.GetSlotInfo(id)
	if err != nil {
		return hsm.SlotInfo{}, fmt.Errorf("describe slot %d: %w", id, classify(err))
	}
	s := hsm.SlotInfo{
		Description: unpad(info.SlotDescription), Manufacturer: unpad(info.ManufacturerID),
		Firmware: versionText(info.FirmwareVersion), Hardware: versionText(info.HardwareVersion),
	}
	for _, f := range slotFlags {
		if info.Flags&f.flag != 0 {
			s.Flags = append(s.Flags, f.name)
		}
	}
	return s, nil
}

// unpad takes the padding off a fixed-length string.
func unpad(s string) string { return strings.TrimRight(s, " \x00") }

func versionText(v pkcs11.Version) string { return fmt.Sprintf("%d.%d", v.Major, v.Minor) }

// mechanismFlags are the mechanism flags (PKCS #11 v2.40, 3.5, and 2.3.1 of the
// mechanisms for those of elliptic curves).
var mechanismFlags = []struct {
	flag uint
	name string
}{
	{pkcs11.CKF_HW, "HW"},
	{pkcs11.CKF_ENCRYPT, "ENCRYPT"},
	{pkcs11.CKF_DECRYPT, "DECRYPT"},
	{pkcs11.CKF_DIGEST, "DIGEST"},
	{pkcs11.CKF_SIGN, "SIGN"},
	{pkcs11.CKF_SIGN_RECOVER, "SIGN_RECOVER"},
	{pkcs11.CKF_VERIFY, "VERIFY"},
	{pkcs11.CKF_VERIFY_RECOVER, "VERIFY_RECOVER"},
	{pkcs11.CKF_GENERATE, "GENERATE"},
	{pkcs11.CKF_GENERATE_KEY_PAIR, "GENERATE_KEY_PAIR"},
	{pkcs11.CKF_WRAP, "WRAP"},
	{pkcs11.CKF_UNWRAP, "UNWRAP"},
	{pkcs11.CKF_DERIVE, "DERIVE"},
}

// mechanismList lists what the token in the slot can do.
func mechanismList(raw *pkcs11.Ctx, slot uint) ([]hsm.Mechanism, error) {
	list, err := raw.GetMechanismList(slot)
	if err != nil {
		return nil, fmt.Errorf("list mechanisms: %w", classify(err))
	}
	var all []hsm.Mechanism
	for _, one := range list {
		mechanism := hsm.Mechanism{Name: mechanismName(one.Mechanism)}
		// A token that lists a mechanism and does not describe it has it still.
		if info, err := raw.GetMechanismInfo(slot, []*pkcs11.Mechanism{one}); err == nil {
			mechanism.MinKeySize, mechanism.MaxKeySize = info.MinKeySize, info.MaxKeySize
			for _, f := range mechanismFlags {
				if info.Flags&f.flag != 0 {
					mechanism.Flags = append(mechanism.Flags, f.name)
				}
			}
		}
		all = append(all, mechanism)
	}
	slices.SortFunc(all, func(a, b hsm.Mechanism) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

// mechanismNames are the mechanisms that matter to us: signing with elliptic
// curves, wrapping for backup, and what should not be there.
var mechanismNames = map[uint]string{
	pkcs11.CKM_EC_KEY_PAIR_GEN:       "CKM_EC_KEY_PAIR_GEN",
	pkcs11.CKM_ECDSA:                 "CKM_ECDSA",
	pkcs11.CKM_ECDSA_SHA1:            "CKM_ECDSA_SHA1",
	pkcs11.CKM_ECDSA_SHA224:          "CKM_ECDSA_SHA224",
	pkcs11.CKM_ECDSA_SHA256:          "CKM_ECDSA_SHA256",
	pkcs11.CKM_ECDSA_SHA384:          "CKM_ECDSA_SHA384",
	pkcs11.CKM_ECDSA_SHA512:          "CKM_ECDSA_SHA512",
	pkcs11.CKM_ECDH1_DERIVE:          "CKM_ECDH1_DERIVE",
	pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN: "CKM_RSA_PKCS_KEY_PAIR_GEN",
	pkcs11.CKM_RSA_PKCS:              "CKM_RSA_PKCS",
	pkcs11.CKM_RSA_PKCS_PSS:          "CKM_RSA_PKCS_PSS",
	pkcs11.CKM_RSA_PKCS_OAEP:         "CKM_RSA_PKCS_OAEP",
	pkcs11.CKM_AES_KEY_GEN:           "CKM_AES_KEY_GEN",
	pkcs11.CKM_AES_KEY_WRAP:          "CKM_AES_KEY_WRAP",
	pkcs11.CKM_AES_KEY_WRAP_PAD:      "CKM_AES_KEY_WRAP_PAD",
	pkcs11.CKM_AES_CBC:               "CKM_AES_CBC",
	pkcs11.CKM_AES_CBC_PAD:           "CKM_AES_CBC_PAD",
	pkcs11.CKM_AES_GCM:               "CKM_AES_GCM",
	pkcs11.CKM_SHA256:                "CKM_SHA256",
	pkcs11.CKM_SHA384:                "CKM_SHA384",
	pkcs11.CKM_SHA512:                "CKM_SHA512",
	0x1055:                           "CKM_EC_EDWARDS_KEY_PAIR_GEN",
	0x1057:                           "CKM_EDDSA",
}

// mechanismName gives "CKM_ECDSA", or "CKM_0x80000001" for one that we have no
// name for.
func mechanismName(code uint) string {
	if name, ok := mechanismNames[code]; ok {
		return name
	}
	return fmt.Sprintf("CKM_%#x", code)
}

// Look finds the one pair that uri names. See hsm.Lister.
func (t *Token) Look(ctx context.Context, uri string) (hsm.Ref, error) {
	u, err := parseKeyURI(uri)
	if err != nil {
		return hsm.Ref{}, fmt.Errorf("look for key: %w", err)
	}
	if !u.names(t.Info()) {
		return hsm.Ref{}, fmt.Errorf("look for key %s: names another token than %s: %w", u, t.uri, hsm.ErrNotFound)
	}
	found, err := t.resolve(ctx, u, nil, hsm.RoleNone)
	if err != nil {
		return hsm.Ref{}, fmt.Errorf("look for key %s: %w", u, err)
	}
	return hsm.Ref{URI: uri, SPKI: found.spki}, nil
}

// List describes every private key object. See hsm.Lister.
func (t *Token) List(ctx context.Context) ([]hsm.Listing, error) {
	var all []hsm.Listing
	err := t.do(ctx, hsm.ShareRest, true, func(c *connection) error {
		all = nil // this may be the second attempt
		return c.withAdmin(func(s pkcs11.SessionHandle) error {
			objects, err := c.find(s, pkcs11.CKO_PRIVATE_KEY, "", nil)
			if err != nil {
				return err
			}
			for _, object := range objects {
				l, err := c.describe(s, t.uri, object)
				if err != nil {
					return err
				}
				all = append(all, l)
			}
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("list keys of %s: %w", t.uri, err)
	}
	slices.SortFunc(all, func(a, b hsm.Listing) int {
		return cmp.Or(strings.Compare(a.Label, b.Label), strings.Compare(a.ID, b.ID))
	})
	return all, nil
}

// describe reads one private key object and looks for its public key.
func (c *connection) describe(s pkcs11.SessionHandle, token uri, object pkcs11.ObjectHandle) (hsm.Listing, error) {
	attributes, err := c.attributes(s, object, privateAttributes, "")
	if err != nil {
		return hsm.Listing{}, err
	}
	text := func(name string) []byte {
		raw, _ := hex.DecodeString(attributes[name]) // "unavailable: …" gives none
		return raw
	}
	label, id := string(text("LABEL")), text("ID")
	l := hsm.Listing{
		Label: label, ID: hex.EncodeToString(id), URI: token.key(label, id).String(),
		Attributes: attributes, Level: hsm.LevelOf(c.info, attributes),
	}
	p, err := c.locatePair(s, token.key(label, id))
	if err == nil {
		l.SPKI = hex.EncodeToString(p.spki[:])
		l.Algorithm, err = hsm.AlgorithmOf(p.pub)
	}
	switch {
	case err == nil:
	case errors.Is(err, hsm.ErrNotFound), errors.Is(err, hsm.ErrAmbiguous), errors.Is(err, hsm.ErrUnsupported):
		l.Problem = err.Error()
	default:
		return hsm.Listing{}, err
	}
	return l, nil
}
