package pkcs11

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"time"
	"unsafe"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/miekg/pkcs11"
)

// Officer says which token to open as security officer.
type Officer struct {
	// Module and URI are as in Config.
	Module string
	URI    string
	// PIN is the security officer's. Pair sends it at most once and clears its
	// copy; the caller should clear its own.
	PIN []byte
}

// pairTimeout bounds Pair, which makes two EC key pairs.
const pairTimeout = time.Minute

// Pair makes the wrapping key label in two tokens: the source, whose keys can
// then be wrapped for the target. No secret leaves a token (see the package
// comment, Backup). Neither token may be open in this process, for a token is
// logged in as one or the other (ErrOpen), and neither may have a secret key of
// this label (ErrExists).
//
// If it fails it takes back what it made. Killed half-way it leaves a wrapping
// key that nothing else has: harmless; choose another label.
//
// Errors also: ErrPIN (refused, or a flag forbids another try), ErrNotFound,
// ErrAmbiguous, ErrUnsupported (the module cannot do what a backup needs),
// ErrPolicy (it can, and does something else), ErrMismatch (the two tokens did
// not derive the same key), ErrURI, ErrBusy, ErrLost.
func Pair(ctx context.Context, label string, source, target Officer) (hsm.Pairing, error) {
	wrap := func(err error) (hsm.Pairing, error) {
		return hsm.Pairing{}, fmt.Errorf("pair tokens: %w", err)
	}
	if err := hsm.CheckSpec(hsm.Spec{Label: label, ID: make([]byte, hsm.IDSize), Algorithm: hsm.ECDSAP384}); err != nil {
		return wrap(err)
	}
	from, err := newOffice(source)
	if err != nil {
		return wrap(fmt.Errorf("source: %w", err))
	}
	to, err := newOffice(target)
	if err != nil {
		return wrap(fmt.Errorf("target: %w", err))
	}
	ctx, cancel := context.WithTimeout(ctx, pairTimeout)
	defer cancel()
	var made hsm.Pairing
	err = exclusively(ctx, from.module, to.module, func() (err error) {
		made, err = pair2(label, from, to)
		return err
	})
	if err != nil {
		return wrap(err)
	}
	return made, nil
}

// exclusively runs f while holding two modules, which may be one, and with both
// initialised. The locks are taken in the order of the paths.
func exclusively(ctx context.Context, a, b *module, f func() error) error {
	if b.path < a.path {
		a, b = b, a
	}
	return a.exclusive(ctx, func() error {
		if a == b {
			return a.initialised(f)
		}
		select {
		case b.lock <- struct{}{}:
			defer func() { <-b.lock }()
			defer b.enter()()
		case <-ctx.Done():
			return fmt.Errorf("wait for module: %w (%w)", hsm.ErrBusy, context.Cause(ctx))
		}
		return a.initialised(func() error { return b.initialised(f) })
	}, func() {})
}

// office is a token with its security officer logged in.
type office struct {
	module  *module
	uri     uri
	pin     []byte
	info    hsm.TokenInfo
	session pkcs11.SessionHandle
	desk    *connection // for its reading methods; it is no login of a Token
	made    pkcs11.ObjectHandle
}

// newOffice looks at what the caller says; no library is asked.
func newOffice(o Officer) (*office, error) {
	u, err := parseURI(o.URI)
	if err != nil {
		return nil, err
	}
	m, err := moduleFor(o.Module)
	if err != nil {
		return nil, err
	}
	return &office{module: m, uri: u, pin: slices.Clone(o.PIN)}, nil
}

// open finds the token and logs in, once. The caller holds the module's lock.
func (o *office) open() error {
	var err error
	if o.info, _, err = o.module.locate(o.uri); err != nil {
		return err
	}
	for t := range o.module.tokens {
		if t.Info().Device() == o.info.Device() {
			return ErrOpen
		}
	}
	for _, flag := range []string{"SO_PIN_COUNT_LOW", "SO_PIN_FINAL_TRY", "SO_PIN_LOCKED", "SO_PIN_TO_BE_CHANGED"} {
		if slices.Contains(o.info.Flags, flag) {
			return fmt.Errorf("token flag %s is set: %w", flag, hsm.ErrPIN)
		}
	}
	raw := o.module.handle()
	if o.session, err = raw.OpenSession(o.info.Slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION); err != nil {
		return fmt.Errorf("open session: %w", classify(err))
	}
	o.desk = &connection{raw: raw}
	if err := raw.Login(o.session, pkcs11.CKU_SO, string(o.pin)); err != nil {
		return fmt.Errorf("log in as security officer: %w", classify(err))
	}
	return nil
}

// close takes back what was made unless keep, logs out and ends the ephemeral
// keys with the session. It may be called whatever open did.
func (o *office) close(keep bool) {
	clear(o.pin)
	if o.desk == nil {
		return
	}
	if o.made != 0 && !keep {
		_ = o.desk.raw.DestroyObject(o.session, o.made)
	}
	_ = o.desk.raw.Logout(o.session)
	_ = o.desk.raw.CloseSession(o.session)
}

// pair2 does Pair's work with both modules held.
func pair2(label string, source, target *office) (made hsm.Pairing, err error) {
	done := false
	for _, o := range []*office{source, target} {
		defer func() { o.close(done) }()
		if err := o.open(); err != nil {
			return made, fmt.Errorf("open %s: %w", o.uri, err)
		}
	}
	if source.module == target.module && source.info.Slot == target.info.Slot {
		return made, fmt.Errorf("source and target are one token: %w", hsm.ErrMismatch)
	}
	exchange := map[*office]*ephemeral{}
	for _, o := range []*office{source, target} {
		if exchange[o], err = o.ephemeral(label); err != nil {
			return made, fmt.Errorf("exchange with %s: %w", o.uri, err)
		}
	}
	made = hsm.Pairing{
		Time: time.Now().UTC().Truncate(time.Second), Key: hsm.WrappingKey{Label: label},
		Source: source.info.Device(), Target: target.info.Device(),
		SourcePoint: exchange[source].point, TargetPoint: exchange[target].point,
	}
	id := sha256.Sum256(slices.Concat(made.SourcePoint, made.TargetPoint))
	made.Key.ID = hex.EncodeToString(id[:hsm.IDSize])
	made.Key.Check, err = target.derive(exchange[target], made.SourcePoint, label, id[:hsm.IDSize], unwraps)
	if err != nil {
		return made, fmt.Errorf("derive in %s: %w", target.uri, err)
	}
	check, err := source.derive(exchange[source], made.TargetPoint, label, id[:hsm.IDSize], wraps)
	if err != nil {
		return made, fmt.Errorf("derive in %s: %w", source.uri, err)
	}
	if check != made.Key.Check {
		return made, fmt.Errorf("check value is %q in the source and %q in the target: %w", check, made.Key.Check, hsm.ErrMismatch)
	}
	done = true
	return made, nil
}

// ephemeral is one side of a key agreement, inside the session.
type ephemeral struct {
	private pkcs11.ObjectHandle
	point   []byte // SEC 1, Section 2.3.3, uncompressed
}

// ephemeral makes a P-384 pair that lives as long as the session. It refuses a
// label that a secret key has.
func (o *office) ephemeral(label string) (*ephemeral, error) {
	same, err := o.desk.find(o.session, pkcs11.CKO_SECRET_KEY, label, nil)
	if err != nil {
		return nil, err
	}
	if len(same) > 0 {
		return nil, fmt.Errorf("secret key %s: %w", label, hsm.ErrExists)
	}
	flags := func(on ...uint) []*pkcs11.Attribute {
		var list []*pkcs11.Attribute
		for _, code := range []uint{
			pkcs11.CKA_TOKEN, pkcs11.CKA_PRIVATE, pkcs11.CKA_SENSITIVE, pkcs11.CKA_EXTRACTABLE,
			pkcs11.CKA_SIGN, pkcs11.CKA_DECRYPT, pkcs11.CKA_UNWRAP, pkcs11.CKA_DERIVE,
		} {
			list = append(list, pkcs11.NewAttribute(code, slices.Contains(on, code)))
		}
		return list
	}
	public, private, err := o.desk.raw.GenerateKeyPair(o.session,
		[]*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
		[]*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
			pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, paramsP384),
		},
		flags(pkcs11.CKA_SENSITIVE, pkcs11.CKA_DERIVE))
	if err != nil {
		return nil, fmt.Errorf("C_GenerateKeyPair: %w", unable(err))
	}
	pub, err := o.desk.publicKey(o.session, public)
	if err != nil {
		return nil, err
	}
	point, err := pub.Bytes()
	return &ephemeral{private: private, point: point}, err
}

// derive makes the wrapping key for its one use, with every attribute in the
// call that makes it, and reads it back. It returns the check value.
func (o *office) derive(e *ephemeral, peer []byte, label string, id []byte, use string) (string, error) {
	template := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
		pkcs11.NewAttribute(pkcs11.CKA_ID, id),
	}
	for _, a := range wrappingAttributes {
		if a.flag && a.code != pkcs11.CKA_MODIFIABLE {
			on := a.name == "TOKEN" || a.name == "SENSITIVE" || a.name == "TRUSTED" || a.name == use
			template = append(template, pkcs11.NewAttribute(a.code, on))
		}
	}
	var pinner runtime.Pinner
	defer pinner.Unpin()
	if use == unwraps {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_UNWRAP_TEMPLATE, unwrapTemplate(&pinner)))
	}
	template = append(template, pkcs11.NewAttribute(pkcs11.CKA_MODIFIABLE, false)) // last: see modifiableLast
	made, err := o.desk.raw.DeriveKey(o.session,
		[]*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDH1_DERIVE, pkcs11.NewECDH1DeriveParams(pkcs11.CKD_NULL, nil, peer))},
		e.private, template)
	if err != nil {
		return "", fmt.Errorf("C_DeriveKey: %w", unable(err))
	}
	o.made = made
	attributes, err := o.desk.attributes(o.session, made, wrappingAttributes, "")
	if err != nil {
		return "", err
	}
	return checkValue(attributes), checkWrapping(attributes, use)
}

// unable turns the codes with which a module says that it does not know an
// attribute or takes it from nobody into hsm.ErrUnsupported.
func unable(err error) error {
	var code pkcs11.Error
	if errors.As(err, &code) {
		switch code {
		case pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, pkcs11.CKR_ATTRIBUTE_READ_ONLY,
			pkcs11.CKR_MECHANISM_PARAM_INVALID, pkcs11.CKR_USER_NOT_LOGGED_IN:
			return &codeError{code: code, sentinel: hsm.ErrUnsupported}
		}
	}
	return classify(err)
}

// ckAttribute is a CK_ATTRIBUTE (PKCS #11 v2.40, Section 3.4): a CK_ULONG is as
// wide as a pointer wherever this package runs.
type ckAttribute struct {
	kind   uintptr
	value  unsafe.Pointer
	length uintptr
}

// unwrapTemplate is the value of a CKA_UNWRAP_TEMPLATE: what an unwrapped key
// must be asked to be. Its values are pinned until the caller unpins them.
func unwrapTemplate(pinner *runtime.Pinner) []byte {
	list := make([]ckAttribute, 0, 5)
	for _, a := range []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
	} {
		value := slices.Clone(a.Value)
		pinner.Pin(&value[0])
		pointer := unsafe.Pointer(&value[0]) //nolint:gosec // pinned; the library copies what it points to
		list = append(list, ckAttribute{kind: uintptr(a.Type), value: pointer, length: uintptr(len(value))})
	}
	first := (*byte)(unsafe.Pointer(&list[0]))                                      //nolint:gosec // the array's own octets
	return slices.Clone(unsafe.Slice(first, len(list)*int(unsafe.Sizeof(list[0])))) //nolint:gosec // as long as the array
}
