package hsmtest_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"errors"
	"math/big"
	"runtime"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/google/go-cmp/cmp"
	p11 "github.com/miekg/pkcs11"
)

// bare is the shim used without our stack: a token, its slot and a session
// that is logged in.
type bare struct {
	*p11.Ctx
	shim    *hsmtest.Shim
	token   hsmtest.SoftHSMToken
	slot    uint
	session p11.SessionHandle
}

// newBare opens a fresh token behind the shim. The library is finalised when
// the test ends.
func newBare(t *testing.T) *bare {
	t.Helper()
	b := &bare{shim: hsmtest.NewShim(t)}
	b.token = b.shim.NewToken(t)
	b.Ctx = p11.New(b.token.Module)
	if err := b.Initialize(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		b.shim.Reset()
		if err := b.Finalize(); err != nil {
			t.Errorf("finalise: %v", err)
		}
		if n := b.shim.Sessions(); n != 0 {
			t.Errorf("%d sessions after C_Finalize", n)
		}
	})
	slots, err := b.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	for _, slot := range slots {
		if info, err := b.GetTokenInfo(slot); err == nil && info.Label == b.token.Label {
			b.slot = slot
		}
	}
	b.open(t)
	return b
}

// open opens the session and logs in.
func (b *bare) open(t *testing.T) {
	t.Helper()
	var err error
	if b.session, err = b.OpenSession(b.slot, p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION); err != nil {
		t.Fatal(err)
	}
	if err := b.Login(b.session, p11.CKU_USER, string(b.token.PIN)); err != nil {
		t.Fatal(err)
	}
}

// generate makes a P-256 pair and returns the private handle and the public key.
func (b *bare) generate(t *testing.T, id []byte) (p11.ObjectHandle, *ecdsa.PublicKey) {
	t.Helper()
	params := []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}
	pub, private, err := b.GenerateKeyPair(b.session, []*p11.Mechanism{p11.NewMechanism(p11.CKM_EC_KEY_PAIR_GEN, nil)},
		[]*p11.Attribute{p11.NewAttribute(p11.CKA_EC_PARAMS, params)},
		[]*p11.Attribute{p11.NewAttribute(p11.CKA_SIGN, true), p11.NewAttribute(p11.CKA_ID, id)})
	if err != nil {
		t.Fatal(err)
	}
	values, err := b.GetAttributeValue(b.session, pub, []*p11.Attribute{p11.NewAttribute(p11.CKA_EC_POINT, nil)})
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), values[0].Value[2:])
	if err != nil {
		t.Fatal(err)
	}
	return private, key
}

// sign signs 32 octets.
func (b *bare) sign(key p11.ObjectHandle, digest []byte) ([]byte, error) {
	if err := b.SignInit(b.session, []*p11.Mechanism{p11.NewMechanism(p11.CKM_ECDSA, nil)}, key); err != nil {
		return nil, err
	}
	return b.Sign(b.session, digest)
}

// verifies says whether r ‖ s is a signature of pub.
func verifies(pub *ecdsa.PublicKey, digest, sig []byte) bool {
	n := len(sig) / 2
	return ecdsa.Verify(pub, digest, new(big.Int).SetBytes(sig[:n]), new(big.Int).SetBytes(sig[n:]))
}

func second[T any](_ T, err error) error { return err }

// calls has a call of every function that the binding can call. What it would
// do if it did not fail does not matter: it is made to fail.
func (b *bare) calls() map[hsmtest.Function]func() error {
	s, data := b.session, []byte("data")
	mechanism := []*p11.Mechanism{p11.NewMechanism(p11.CKM_ECDSA, nil)}
	session := func(f func(p11.SessionHandle) error) func() error { return func() error { return f(s) } }
	onData := func(f func(p11.SessionHandle, []byte) ([]byte, error)) func() error {
		return func() error { return second(f(s, data)) }
	}
	final := func(f func(p11.SessionHandle) ([]byte, error)) func() error {
		return func() error { return second(f(s)) }
	}
	begin := func(f func(p11.SessionHandle, []*p11.Mechanism, p11.ObjectHandle) error) func() error {
		return func() error { return f(s, mechanism, 1) }
	}
	return map[hsmtest.Function]func() error{
		hsmtest.Initialize:        func() error { return b.Initialize() },
		hsmtest.Finalize:          b.Finalize,
		hsmtest.GetInfo:           func() error { return second(b.GetInfo()) },
		hsmtest.GetSlotList:       func() error { return second(b.GetSlotList(true)) },
		hsmtest.GetSlotInfo:       func() error { return second(b.GetSlotInfo(b.slot)) },
		hsmtest.GetTokenInfo:      func() error { return second(b.GetTokenInfo(b.slot)) },
		hsmtest.GetMechanismList:  func() error { return second(b.GetMechanismList(b.slot)) },
		hsmtest.GetMechanismInfo:  func() error { return second(b.GetMechanismInfo(b.slot, mechanism)) },
		hsmtest.InitToken:         func() error { return b.InitToken(b.slot, "pin", "label") },
		hsmtest.InitPIN:           func() error { return b.InitPIN(s, "pin") },
		hsmtest.SetPIN:            func() error { return b.SetPIN(s, "pin", "pin") },
		hsmtest.OpenSession:       func() error { return second(b.OpenSession(b.slot, p11.CKF_SERIAL_SESSION)) },
		hsmtest.CloseSession:      session(b.CloseSession),
		hsmtest.CloseAllSessions:  func() error { return b.CloseAllSessions(b.slot) },
		hsmtest.GetSessionInfo:    func() error { return second(b.GetSessionInfo(s)) },
		hsmtest.GetOperationState: final(b.GetOperationState),
		hsmtest.SetOperationState: func() error { return b.SetOperationState(s, data, 0, 0) },
		hsmtest.Login:             func() error { return b.Login(s, p11.CKU_USER, "wrong") },
		hsmtest.Logout:            session(b.Logout),
		hsmtest.CreateObject:      func() error { return second(b.CreateObject(s, nil)) },
		hsmtest.CopyObject:        func() error { return second(b.CopyObject(s, 1, nil)) },
		hsmtest.DestroyObject:     func() error { return b.DestroyObject(s, 1) },
		hsmtest.GetObjectSize:     func() error { return second(b.GetObjectSize(s, 1)) },
		hsmtest.GetAttributeValue: func() error {
			return second(b.GetAttributeValue(s, 1, []*p11.Attribute{p11.NewAttribute(p11.CKA_ID, nil)}))
		},
		hsmtest.SetAttributeValue:   func() error { return b.SetAttributeValue(s, 1, []*p11.Attribute{p11.NewAttribute(p11.CKA_ID, data)}) },
		hsmtest.FindObjectsInit:     func() error { return b.FindObjectsInit(s, nil) },
		hsmtest.FindObjects:         func() error { _, _, err := b.FindObjects(s, 1); return err },
		hsmtest.FindObjectsFinal:    session(b.FindObjectsFinal),
		hsmtest.EncryptInit:         begin(b.EncryptInit),
		hsmtest.Encrypt:             onData(b.Encrypt),
		hsmtest.EncryptUpdate:       onData(b.EncryptUpdate),
		hsmtest.EncryptFinal:        final(b.EncryptFinal),
		hsmtest.DecryptInit:         begin(b.DecryptInit),
		hsmtest.Decrypt:             onData(b.Decrypt),
		hsmtest.DecryptUpdate:       onData(b.DecryptUpdate),
		hsmtest.DecryptFinal:        final(b.DecryptFinal),
		hsmtest.DigestInit:          func() error { return b.DigestInit(s, mechanism) },
		hsmtest.Digest:              onData(b.Digest),
		hsmtest.DigestUpdate:        func() error { return b.DigestUpdate(s, data) },
		hsmtest.DigestKey:           func() error { return b.DigestKey(s, 1) },
		hsmtest.DigestFinal:         final(b.DigestFinal),
		hsmtest.SignInit:            begin(b.SignInit),
		hsmtest.SignUpdate:          func() error { return b.SignUpdate(s, data) },
		hsmtest.SignFinal:           final(b.SignFinal),
		hsmtest.SignRecoverInit:     begin(b.SignRecoverInit),
		hsmtest.SignRecover:         onData(b.SignRecover),
		hsmtest.VerifyInit:          begin(b.VerifyInit),
		hsmtest.Verify:              func() error { return b.Verify(s, data, data) },
		hsmtest.VerifyUpdate:        func() error { return b.VerifyUpdate(s, data) },
		hsmtest.VerifyFinal:         func() error { return b.VerifyFinal(s, data) },
		hsmtest.VerifyRecoverInit:   begin(b.VerifyRecoverInit),
		hsmtest.DigestEncryptUpdate: onData(b.DigestEncryptUpdate),
		hsmtest.DecryptDigestUpdate: onData(b.DecryptDigestUpdate),
		hsmtest.SignEncryptUpdate:   onData(b.SignEncryptUpdate),
		hsmtest.DecryptVerifyUpdate: onData(b.DecryptVerifyUpdate),
		hsmtest.GenerateKey:         func() error { return second(b.GenerateKey(s, mechanism, nil)) },
		hsmtest.GenerateKeyPair:     func() error { _, _, err := b.GenerateKeyPair(s, mechanism, nil, nil); return err },
		hsmtest.WrapKey:             func() error { return second(b.WrapKey(s, mechanism, 1, 1)) },
		hsmtest.UnwrapKey:           func() error { return second(b.UnwrapKey(s, mechanism, 1, data, nil)) },
		hsmtest.DeriveKey:           func() error { return second(b.DeriveKey(s, mechanism, 1, nil)) },
		hsmtest.SeedRandom:          func() error { return b.SeedRandom(s, data) },
		hsmtest.GenerateRandom:      func() error { return second(b.GenerateRandom(s, 1)) },
	}
}

// unbound are the functions that the binding does not call so simply, and why.
var unbound = map[hsmtest.Function]string{
	hsmtest.GetFunctionList:   "loading the library calls it; the binding drops its code",
	hsmtest.Sign:              "asks for the length first: TestShimSign",
	hsmtest.GetFunctionStatus: "legacy: not in the binding",
	hsmtest.CancelFunction:    "legacy: not in the binding",
	hsmtest.WaitForSlotEvent:  "the binding drops its code",
	hsmtest.VerifyRecover:     "the binding calls C_DecryptVerifyUpdate instead",
}

// TestShimFails makes every function fail with a listed and a vendor's code,
// at once, later, and counts the calls. SoftHSM sees none of them: the session
// signs afterwards.
func TestShimFails(t *testing.T) {
	b := newBare(t)
	key, pub := b.generate(t, []byte("id"))
	calls := b.calls()
	for f := range hsmtest.Functions() {
		call := calls[f]
		if call == nil {
			if unbound[f] == "" {
				t.Errorf("%s: not called by this test", f)
			}
			continue
		}
		for _, code := range []uint{p11.CKR_DEVICE_ERROR, 0x80000001} {
			failed, count := b.shim.Failed(), b.shim.Calls(f)
			b.shim.Fail(f, code, 1)
			if err := call(); !errors.Is(err, p11.Error(code)) {
				t.Errorf("%s: error %v, want %#x", f, err, code)
			}
			if b.shim.Failed() != failed+1 || b.shim.Calls(f) != count+1 || b.shim.Pending() != 0 {
				t.Errorf("%s: %d failed, %d calls, want one more of each; %d pending",
					f, b.shim.Failed()-failed, b.shim.Calls(f)-count, b.shim.Pending())
			}
		}
	}
	digest := make([]byte, 32)
	if sig, err := b.sign(key, digest); err != nil || !verifies(pub, digest, sig) {
		t.Errorf("signature after all: %v", err)
	}
}

// TestShimFailLater: calls pass first, and then as many fail as were named.
func TestShimFailLater(t *testing.T) {
	b := newBare(t)
	b.shim.FailLater(hsmtest.GenerateRandom, p11.CKR_FUNCTION_FAILED, 2, 2)
	var failed []bool
	for range 6 {
		_, err := b.GenerateRandom(b.session, 1)
		failed = append(failed, err != nil)
	}
	if diff := cmp.Diff([]bool{false, false, true, true, false, false}, failed); diff != "" {
		t.Errorf("calls that failed (-want +got):\n%s", diff)
	}
}

// TestShimSign: every signature that was made is in the records, as it was
// made, with the key's id; whether it was corrupted, denied or given.
func TestShimSign(t *testing.T) {
	b := newBare(t)
	id := hsmtest.RandomID()
	key, pub := b.generate(t, id)
	rows := []struct {
		name  string
		fault func()
		code  uint // what C_Sign returns
		made  bool
		wrong bool // the signature that is given
	}{
		{name: "none", fault: func() {}, made: true},
		{name: "corrupted", fault: func() { b.shim.CorruptEvery(1) }, made: true, wrong: true},
		{name: "denied", fault: func() { b.shim.FailAfter(hsmtest.Sign, p11.CKR_DEVICE_ERROR, 1) }, code: p11.CKR_DEVICE_ERROR, made: true},
		{name: "failed", fault: func() { b.shim.Fail(hsmtest.Sign, p11.CKR_DEVICE_ERROR, 1) }, code: p11.CKR_DEVICE_ERROR},
	}
	for i, row := range rows {
		b.shim.Reset()
		row.fault()
		digest := bytes.Repeat([]byte{byte(i)}, 32)
		sig, err := b.sign(key, digest)
		if row.code == 0 && err != nil || row.code != 0 && !errors.Is(err, p11.Error(row.code)) {
			t.Errorf("%s: error %v, want %#x", row.name, err, row.code)
		}
		if row.code == 0 && verifies(pub, digest, sig) == row.wrong {
			t.Errorf("%s: signature wrong is %v, want %v", row.name, !row.wrong, row.wrong)
		}
		records, err := b.shim.Records()
		if err != nil {
			t.Fatal(err)
		}
		if !row.made {
			if len(records) != 0 || b.shim.Signs() != 0 {
				t.Errorf("%s: records %v, want none", row.name, records)
			}
			// The operation is still active: end it.
			if _, err := b.Sign(b.session, digest); err != nil {
				t.Errorf("%s: %v", row.name, err)
			}
			continue
		}
		if len(records) != 1 {
			t.Fatalf("%s: %d records, want 1", row.name, len(records))
		}
		got := records[0]
		if !verifies(pub, digest, got.Signature) {
			t.Errorf("%s: the recorded signature does not verify", row.name)
		}
		want := hsmtest.Record{
			Sequence: got.Sequence, Function: hsmtest.Sign, Code: row.code, Slot: b.slot, Corrupted: row.wrong,
			Injected: row.code != 0, ID: id, Digest: digest, Signature: got.Signature,
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: record (-want +got):\n%s", row.name, diff)
		}
	}
}

// TestShimPIN: the token behaves as one that counts wrong PINs, and SoftHSM,
// which notes them for good, is never asked.
func TestShimPIN(t *testing.T) {
	b := newBare(t)
	if err := b.Logout(b.session); err != nil {
		t.Fatal(err)
	}
	const low, final, locked = p11.CKF_USER_PIN_COUNT_LOW, p11.CKF_USER_PIN_FINAL_TRY, p11.CKF_USER_PIN_LOCKED
	flags := func() uint {
		info, err := b.GetTokenInfo(b.slot)
		if err != nil {
			t.Fatal(err)
		}
		return info.Flags & (low | final | locked)
	}
	b.shim.RefusePIN(3)
	rows := []struct {
		name   string
		before uint
		want   uint
	}{
		{"first", 0, p11.CKR_PIN_INCORRECT},
		{"second", low, p11.CKR_PIN_INCORRECT},
		{"last", low | final, p11.CKR_PIN_INCORRECT},
		{"locked", low | locked, p11.CKR_PIN_LOCKED},
		{"locked still", low | locked, p11.CKR_PIN_LOCKED},
	}
	for _, row := range rows {
		if got := flags(); got != row.before {
			t.Errorf("%s: flags %#x, want %#x", row.name, got, row.before)
		}
		if err := b.Login(b.session, p11.CKU_USER, string(b.token.PIN)); !errors.Is(err, p11.Error(row.want)) {
			t.Errorf("%s: error %v, want %#x", row.name, err, row.want)
		}
	}
	b.shim.RefusePIN(0)
	if got := flags(); got != 0 {
		t.Errorf("flags %#x after the end, want none", got)
	}
	if err := b.Login(b.session, p11.CKU_USER, string(b.token.PIN)); err != nil {
		t.Error(err)
	}
	if got, want := b.shim.Logins(), len(rows)+2; got != want {
		t.Errorf("%d logins counted, want %d", got, want)
	}
	records, err := b.shim.Records()
	if err != nil {
		t.Fatal(err)
	}
	var codes []uint
	for _, r := range records {
		if r.Function == hsmtest.Login && r.Slot == b.slot {
			codes = append(codes, r.Code)
		}
	}
	if diff := cmp.Diff([]uint{0, 0xA0, 0xA0, 0xA0, 0xA4, 0xA4, 0}, codes); diff != "" {
		t.Errorf("recorded logins (-want +got):\n%s", diff)
	}
}

// TestShimSessions counts, limits and loses sessions.
func TestShimSessions(t *testing.T) {
	b := newBare(t)
	key, _ := b.generate(t, []byte("id"))
	if got := b.shim.Sessions(); got != 1 {
		t.Fatalf("%d sessions, want 1", got)
	}
	b.shim.LimitSessions(3)
	for _, want := range []error{nil, nil, p11.Error(p11.CKR_SESSION_COUNT)} {
		if _, err := b.OpenSession(b.slot, p11.CKF_SERIAL_SESSION); !errors.Is(err, want) {
			t.Errorf("open: %v, want %v", err, want)
		}
	}
	if got := b.shim.SessionsPeak(); got != 3 {
		t.Errorf("peak of %d sessions, want 3", got)
	}
	b.shim.LoseSessions()
	if _, err := b.sign(key, make([]byte, 32)); !errors.Is(err, p11.Error(p11.CKR_SESSION_HANDLE_INVALID)) {
		t.Errorf("sign in a lost session: %v", err)
	}
	if got := b.shim.Sessions(); got != 0 {
		t.Errorf("%d sessions after the loss", got)
	}
	b.open(t) // the login was lost too, else this were CKR_USER_ALREADY_LOGGED_IN
	if got := b.shim.Sessions(); got != 1 {
		t.Errorf("%d sessions, want 1", got)
	}
}

// TestShimRemove pulls the device and puts it back.
func TestShimRemove(t *testing.T) {
	b := newBare(t)
	calls := b.calls()
	b.shim.Remove()
	rows := map[hsmtest.Function]uint{
		hsmtest.GetTokenInfo: p11.CKR_TOKEN_NOT_PRESENT, hsmtest.OpenSession: p11.CKR_TOKEN_NOT_PRESENT,
		hsmtest.GetMechanismInfo: p11.CKR_TOKEN_NOT_PRESENT, hsmtest.InitToken: p11.CKR_TOKEN_NOT_PRESENT,
		hsmtest.SignInit: p11.CKR_DEVICE_REMOVED, hsmtest.Login: p11.CKR_DEVICE_REMOVED,
		hsmtest.GenerateRandom: p11.CKR_DEVICE_REMOVED,
	}
	for f, want := range rows {
		if err := calls[f](); !errors.Is(err, p11.Error(want)) {
			t.Errorf("%s: error %v, want %#x", f, err, want)
		}
	}
	if slots, err := b.GetSlotList(true); err != nil || len(slots) != 0 {
		t.Errorf("slots with a token: %v, %v; want none", slots, err)
	}
	if slots, err := b.GetSlotList(false); err != nil || len(slots) == 0 {
		t.Errorf("slots: %v, %v; want some", slots, err)
	}
	b.shim.PutBack()
	if err := calls[hsmtest.GenerateRandom](); !errors.Is(err, p11.Error(p11.CKR_SESSION_HANDLE_INVALID)) {
		t.Errorf("the old session: %v, want CKR_SESSION_HANDLE_INVALID", err)
	}
	b.open(t)
}

// patience bounds a wait for what must happen: only to end a hang.
const patience = 2 * time.Minute

// TestShimHang: a call does not return until it, or one, is let go.
func TestShimHang(t *testing.T) {
	b := newBare(t)
	b.shim.Hang(hsmtest.GenerateRandom)
	done := make(chan error, 1)
	go func() { done <- second(b.GenerateRandom(b.session, 1)) }()
	b.hangs(t)
	select {
	case err := <-done:
		t.Errorf("the call returned: %v", err)
	default:
	}
	b.shim.Pass()
	if err := <-done; err != nil {
		t.Error(err)
	}
	go func() { done <- second(b.GenerateRandom(b.session, 1)) }()
	b.hangs(t)
	b.shim.Hang(0)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// hangs waits until a call hangs.
func (b *bare) hangs(t *testing.T) {
	t.Helper()
	for began := time.Now(); b.shim.Hanging() == 0; runtime.Gosched() {
		if time.Since(began) > patience {
			t.Fatal("no call hangs")
		}
	}
}
