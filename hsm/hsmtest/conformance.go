package hsmtest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
)

// Device is an empty device for Conformance, not open.
type Device struct {
	// Open opens the device with a PIN. Logging goes to the suite's own log,
	// if the backend logs.
	Open func(ctx context.Context, pin []byte) (hsm.Token, error)
	// PIN is the right one: unique, so that it can be looked for in texts.
	PIN []byte
	// URI names a key of the device by label or id; either may be empty.
	URI func(label string, id []byte) string
	// Malformed are URIs that Open of a key must refuse, by the reason's name.
	Malformed map[string]string
	// Plant adds a pair by other means than Generate, while token is open. Nil
	// if the backend cannot have two pairs with one label.
	Plant func(t testing.TB, token hsm.Token, planted Planted)
	// Logins counts login attempts. Nil if they cannot be counted.
	Logins func() int
	// Level is the evidence level of a key made by Generate.
	Level hsm.Level

	// What the backend cannot do by its nature, each with the reason; "" if it
	// can. The suite then asks for the refusal instead.

	// OneHash: a key signs digests of its algorithm's hash alone.
	OneHash string
	// OneLabel: no two pairs can have one label.
	OneLabel string
	// NoBackup: no key can be extractable.
	NoBackup string
	// PINAtUse: a wrong PIN shows when a key is opened, not when the device is.
	PINAtUse string
}

// Planted is a key pair that Generate would not make.
type Planted struct {
	Label string
	ID    []byte
	// Decrypt and Modifiable are set as a careless tool does.
	Careless bool
}

// Conformance is the suite that every backend passes. fresh is called once for
// each part and returns an empty device.
func Conformance(t *testing.T, fresh func(t *testing.T) Device) {
	parts := []struct {
		name string
		run  func(t *testing.T, d Device)
	}{
		{"generate and open", generateAndOpen},
		{"sign", signs},
		{"open refuses", openRefuses},
		{"generate refuses", generateRefuses},
		{"ambiguous", ambiguous},
		{"policy", policy},
		{"evidence", evidence},
		{"self-test", selfTest},
		{"random and keys", randomAndKeys},
		{"concurrent", concurrent},
		{"ended context", endedContext},
		{"wrong PIN", wrongPIN},
		{"open twice", openTwice},
		{"close", closes},
	}
	for _, part := range parts {
		t.Run(part.name, func(t *testing.T) { part.run(t, fresh(t)) })
	}
}

// open opens the device until the test ends.
func (d Device) open(t *testing.T) hsm.Token {
	t.Helper()
	token, err := d.Open(t.Context(), d.PIN)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := token.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return token
}

// wants fails the test unless err is want and holds no PIN.
func (d Device) wants(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: error %v, want %v", what, err, want)
	}
	if err != nil && strings.Contains(err.Error(), string(d.PIN)) {
		t.Errorf("%s: the error holds the PIN", what)
	}
}

// verifies fails the test unless key signs digest and the signature verifies.
func verifies(t *testing.T, key hsm.Key, hash crypto.Hash) {
	t.Helper()
	digest := make([]byte, hash.Size())
	_, _ = rand.Read(digest)
	sig, err := key.SignContext(t.Context(), digest, hash)
	if err != nil {
		t.Fatal(err)
	}
	if !ecdsa.VerifyASN1(key.Public().(*ecdsa.PublicKey), digest, sig) {
		t.Fatalf("%s: signature over a %s digest does not verify", key.Ref(), hash)
	}
}

func generateAndOpen(t *testing.T, d Device) {
	token := d.open(t)
	for _, algorithm := range []hsm.Algorithm{hsm.ECDSAP256, hsm.ECDSAP384} {
		id, label := RandomID(), "key-"+string(algorithm)
		made, err := token.Generate(t.Context(), hsm.Spec{Label: label, ID: id, Algorithm: algorithm})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := hsm.AlgorithmOf(made.Public()); err != nil || got != algorithm {
			t.Errorf("made a %s key, %v; want %s", got, err, algorithm)
		}
		if want, err := hsm.SPKIHash(made.Public()); err != nil || made.Ref().SPKI != want {
			t.Errorf("Ref has spki %x, want %x (%v)", made.Ref().SPKI, want, err)
		}
		spki := made.Ref().SPKI
		// In this order: a report holds the first line.
		for _, row := range []struct {
			name string
			ref  hsm.Ref
		}{
			{"its own ref", made.Ref()},
			{"by label", hsm.Ref{URI: d.URI(label, nil), SPKI: spki}},
			{"by id", hsm.Ref{URI: d.URI("", id), SPKI: spki}},
			{"by both", hsm.Ref{URI: d.URI(label, id), SPKI: spki}},
		} {
			key, err := token.Open(t.Context(), row.ref, hsm.RoleCT)
			if err != nil {
				t.Errorf("open %s: %v", row.name, err)
				continue
			}
			if key.Ref() != row.ref {
				t.Errorf("open %s: Ref is %v, want %v", row.name, key.Ref(), row.ref)
			}
			verifies(t, key, algorithm.Hash())
		}
		found, err := token.Find(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		if !made.Public().(*ecdsa.PublicKey).Equal(found.Public()) || found.Ref() != made.Ref() {
			t.Errorf("Find gives %v, want %v", found.Ref(), made.Ref())
		}
	}
	if _, err := token.Find(t.Context(), RandomID()); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("Find of an unknown id: %v, want ErrNotFound", err)
	}
}

func signs(t *testing.T, d Device) {
	token := d.open(t)
	for _, algorithm := range []hsm.Algorithm{hsm.ECDSAP256, hsm.ECDSAP384} {
		key := NewKey(t, token, string(algorithm), algorithm)
		for _, hash := range []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512} {
			if d.OneHash != "" && hash != algorithm.Hash() {
				_, err := key.SignContext(t.Context(), make([]byte, hash.Size()), hash)
				d.wants(t, fmt.Sprintf("%s with %s (%s)", algorithm, hash, d.OneHash), err, hsm.ErrUnsupported)
				continue
			}
			verifies(t, key, hash)
		}
		refused := []struct {
			name   string
			digest []byte
			opts   crypto.SignerOpts
		}{
			{"no digest", nil, crypto.SHA256},
			{"digest one octet short", make([]byte, 31), crypto.SHA256},
			{"digest one octet long", make([]byte, 33), crypto.SHA256},
			{"SHA-256 digest named SHA-384", make([]byte, 32), crypto.SHA384},
			{"no options", make([]byte, 32), nil},
			{"no hash", make([]byte, 32), crypto.Hash(0)},
			{"SHA-1", make([]byte, 20), crypto.SHA1},
			{"a whole message", make([]byte, 1<<20), crypto.SHA256},
		}
		for _, row := range refused {
			sig, err := key.SignContext(t.Context(), row.digest, row.opts)
			d.wants(t, row.name, err, hsm.ErrUnsupported)
			if sig != nil {
				t.Errorf("%s: a signature came with the error", row.name)
			}
		}
	}
}

func openRefuses(t *testing.T, d Device) {
	token := d.open(t)
	id := RandomID()
	key, err := token.Generate(t.Context(), hsm.Spec{Label: "key", ID: id, Algorithm: hsm.ECDSAP256})
	if err != nil {
		t.Fatal(err)
	}
	other := NewKey(t, token, "other", hsm.ECDSAP256)
	spki := key.Ref().SPKI
	rows := []struct {
		name string
		ref  hsm.Ref
		want error
	}{
		{"another key's hash", hsm.Ref{URI: key.Ref().URI, SPKI: other.Ref().SPKI}, hsm.ErrMismatch},
		{"no hash", hsm.Ref{URI: key.Ref().URI}, hsm.ErrMismatch},
		{"unknown label", hsm.Ref{URI: d.URI("nobody", nil), SPKI: spki}, hsm.ErrNotFound},
		{"unknown id", hsm.Ref{URI: d.URI("", RandomID()), SPKI: spki}, hsm.ErrNotFound},
		{"label of one key, id of another", hsm.Ref{URI: d.URI("other", id), SPKI: spki}, hsm.ErrNotFound},
	}
	for _, row := range rows {
		_, err := token.Open(t.Context(), row.ref, hsm.RoleNone)
		d.wants(t, row.name, err, row.want)
	}
	for name, uri := range d.Malformed {
		if _, err := token.Open(t.Context(), hsm.Ref{URI: uri, SPKI: spki}, hsm.RoleNone); err == nil {
			t.Errorf("%s: opened", name)
		} else {
			d.wants(t, name, err, err) // looks for the PIN
		}
	}
}

func generateRefuses(t *testing.T, d Device) {
	token := d.open(t)
	id := RandomID()
	good := hsm.Spec{Label: "key", ID: id, Algorithm: hsm.ECDSAP256}
	if _, err := token.Generate(t.Context(), good); err != nil {
		t.Fatal(err)
	}
	spec := func(change func(*hsm.Spec)) hsm.Spec {
		s := hsm.Spec{Label: "new", ID: RandomID(), Algorithm: hsm.ECDSAP256}
		change(&s)
		return s
	}
	rows := []struct {
		name string
		spec hsm.Spec
		want error
	}{
		{"the same again", good, hsm.ErrExists},
		{"the label again", spec(func(s *hsm.Spec) { s.Label = "key" }), hsm.ErrExists},
		{"the id again", spec(func(s *hsm.Spec) { s.ID = id }), hsm.ErrExists},
		{"no label", spec(func(s *hsm.Spec) { s.Label = "" }), hsm.ErrUnsupported},
		{"label of 33 octets", spec(func(s *hsm.Spec) { s.Label = strings.Repeat("a", 33) }), hsm.ErrUnsupported},
		{"label with a space", spec(func(s *hsm.Spec) { s.Label = "a b" }), hsm.ErrUnsupported},
		{"label with a NUL", spec(func(s *hsm.Spec) { s.Label = "a\x00" }), hsm.ErrUnsupported},
		{"no id", spec(func(s *hsm.Spec) { s.ID = nil }), hsm.ErrUnsupported},
		{"id of 17 octets", spec(func(s *hsm.Spec) { s.ID = make([]byte, 17) }), hsm.ErrUnsupported},
		{"no algorithm", spec(func(s *hsm.Spec) { s.Algorithm = "" }), hsm.ErrUnsupported},
		{"RSA", spec(func(s *hsm.Spec) { s.Algorithm = "rsa-2048" }), hsm.ErrUnsupported},
	}
	for _, row := range rows {
		_, err := token.Generate(t.Context(), row.spec)
		d.wants(t, row.name, err, row.want)
	}
	if n, err := token.Keys(t.Context()); err != nil || n != 1 {
		t.Errorf("after the refusals the token has %d keys (%v), want 1", n, err)
	}
}

func ambiguous(t *testing.T, d Device) {
	if d.Plant == nil {
		t.Skip("the backend cannot hold two pairs with one label")
	}
	token := d.open(t)
	if d.OneLabel == "" {
		oneLabelTwice(t, d, token)
	}
	twin := NewKey(t, token, "twin", hsm.ECDSAP256)
	id := mustID(t, token, twin)
	label, uris := "twin", []string{d.URI("twin", nil), d.URI("", id), twin.Ref().URI}
	if d.OneLabel != "" {
		label, uris = "other", []string{d.URI("", id)}
	}
	d.Plant(t, token, Planted{Label: label, ID: id})
	for _, uri := range uris {
		_, err := token.Open(t.Context(), hsm.Ref{URI: uri, SPKI: twin.Ref().SPKI}, hsm.RoleCT)
		d.wants(t, "two pairs with one id, by "+uri, err, hsm.ErrAmbiguous)
	}
	_, err := token.Find(t.Context(), id)
	d.wants(t, "two pairs with one id, Find", err, hsm.ErrAmbiguous)
}

// oneLabelTwice: two pairs with one label are told apart by their ids alone.
func oneLabelTwice(t *testing.T, d Device, token hsm.Token) {
	key := NewKey(t, token, "key", hsm.ECDSAP256)
	d.Plant(t, token, Planted{Label: "key", ID: RandomID()})
	_, err := token.Open(t.Context(), hsm.Ref{URI: d.URI("key", nil), SPKI: key.Ref().SPKI}, hsm.RoleCT)
	d.wants(t, "two pairs with one label, by label", err, hsm.ErrAmbiguous)
	if opened, err := token.Open(t.Context(), key.Ref(), hsm.RoleCT); err != nil {
		t.Errorf("two pairs with one label, by id: %v", err)
	} else {
		verifies(t, opened, crypto.SHA256)
	}
}

// mustID reads a key's id from its evidence.
func mustID(t *testing.T, token hsm.Token, key hsm.Key) []byte {
	t.Helper()
	e, err := token.Evidence(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	id, err := hex.DecodeString(e.Attributes["ID"])
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func policy(t *testing.T, d Device) {
	token := d.open(t)
	strict := NewKey(t, token, "strict", hsm.ECDSAP256)
	e, err := token.Evidence(t.Context(), strict)
	if err != nil {
		t.Fatal(err)
	}
	if err := (hsm.Policy{}).Check(e.Attributes); err != nil {
		t.Errorf("a generated key breaks the strictest policy: %v", err)
	}
	extractable(t, d, token)
	if d.Plant == nil {
		return
	}
	id := RandomID()
	d.Plant(t, token, Planted{Label: "careless", ID: id, Careless: true})
	_, err = token.Find(t.Context(), id)
	d.wants(t, "a key with DECRYPT and MODIFIABLE", err, hsm.ErrPolicy)
}

// extractable: a key that can be backed up is good for roots alone.
func extractable(t *testing.T, d Device, token hsm.Token) {
	backup, err := token.Generate(t.Context(), hsm.Spec{Label: "backup", ID: RandomID(), Algorithm: hsm.ECDSAP256, Extractable: true})
	if d.NoBackup != "" {
		d.wants(t, "extractable key ("+d.NoBackup+")", err, hsm.ErrUnsupported)
		if n, err := token.Keys(t.Context()); err != nil || n != 1 {
			t.Errorf("after the refusal the token has %d keys (%v), want 1", n, err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	e, err := token.Evidence(t.Context(), backup)
	if err != nil {
		t.Fatal(err)
	}
	d.wants(t, "extractable key, strict policy", hsm.Policy{}.Check(e.Attributes), hsm.ErrPolicy)
	if err := hsm.RoleRoot.Policy().Check(e.Attributes); err != nil {
		t.Errorf("extractable key, root policy: %v", err)
	}
	for _, role := range []hsm.Role{hsm.RoleIntermediate, hsm.RoleCT, hsm.RoleRekor, hsm.RoleTSA, hsm.RoleTUFOnline, "unknown"} {
		_, err := token.Open(t.Context(), backup.Ref(), role)
		d.wants(t, fmt.Sprintf("extractable key, opened for %s", role), err, hsm.ErrPolicy)
	}
	for _, role := range []hsm.Role{hsm.RoleRoot, hsm.RoleTSARoot, hsm.RoleNone} {
		key, err := token.Open(t.Context(), backup.Ref(), role)
		if err != nil {
			t.Errorf("extractable key, opened for %q: %v", role, err)
			continue
		}
		verifies(t, key, crypto.SHA256)
	}
}

func evidence(t *testing.T, d Device) {
	token := d.open(t)
	for _, algorithm := range []hsm.Algorithm{hsm.ECDSAP256, hsm.ECDSAP384} {
		key := NewKey(t, token, string(algorithm), algorithm)
		e, err := token.Evidence(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		spki := key.Ref().SPKI
		if e.SPKI != hex.EncodeToString(spki[:]) || sha256.Sum256(e.PublicKey) != spki {
			t.Error("evidence is of another public key")
		}
		if e.URI != key.Ref().URI || e.Algorithm != algorithm || e.Level != d.Level || e.Time.IsZero() {
			t.Errorf("evidence says %s, %s, %s, %s", e.URI, e.Algorithm, e.Level, e.Time)
		}
		if e.Library.Interface == "" || len(e.Mechanisms) == 0 {
			t.Errorf("evidence says of the device %+v, %+v, mechanisms %+v", e.Slot, e.Library, e.Mechanisms)
		}
		h := algorithm.Hash().New()
		h.Write([]byte(e.SelfTestText))
		if err := hsm.Verify(key.Public().(*ecdsa.PublicKey), h.Sum(nil), e.SelfTest); err != nil {
			t.Errorf("self-test: %v", err)
		}
		if !strings.Contains(e.SelfTestText, e.SPKI) {
			t.Errorf("self-test text %q does not name the key", e.SelfTestText)
		}
		text, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(text, d.PIN) {
			t.Error("evidence holds the PIN")
		}
	}
	if _, err := token.Evidence(t.Context(), SoftwareKey(hsm.ECDSAP256)); err == nil {
		t.Error("evidence of a key of another backend")
	}
}

// stuck is a key of a token whose randomness fails: from the n-th signature on
// it gives the first one again.
type stuck struct {
	hsm.Key
	n, made int
	first   []byte
}

func (k *stuck) SignContext(ctx context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	k.made++
	if k.made >= k.n {
		return k.first, nil
	}
	sig, err := k.Key.SignContext(ctx, digest, opts)
	if k.made == 2 { // the first of the digest that is signed again and again
		k.first = sig
	}
	return sig, err
}

// selfTest: the backend's signatures of one digest have different r, and a
// token that repeats one is found out, whichever it is.
func selfTest(t *testing.T, d Device) {
	token := d.open(t)
	now := time.Now()
	for _, algorithm := range []hsm.Algorithm{hsm.ECDSAP256, hsm.ECDSAP384} {
		key := NewKey(t, token, string(algorithm), algorithm)
		proof, err := hsm.SelfTest(t.Context(), key, now)
		if err != nil {
			t.Fatal(err)
		}
		h := algorithm.Hash().New()
		h.Write([]byte(proof.Text))
		if err := hsm.Verify(key.Public().(*ecdsa.PublicKey), h.Sum(nil), proof.Signature); err != nil {
			t.Errorf("proof: %v", err)
		}
		repeats := []int{3}
		if algorithm == hsm.ECDSAP256 { // the other takes ten times as long
			repeats = []int{3, 40, hsm.SelfTestSignatures + 1}
		}
		for _, n := range repeats {
			_, err := hsm.SelfTest(t.Context(), &stuck{Key: key, n: n}, now)
			d.wants(t, fmt.Sprintf("%s: signature %d repeats another", algorithm, n), err, hsm.ErrBadSignature)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err = hsm.SelfTest(ctx, key, now)
		d.wants(t, "ended context", err, hsm.ErrBusy)
	}
}

func randomAndKeys(t *testing.T, d Device) {
	token := d.open(t)
	if n, err := token.Keys(t.Context()); err != nil || n != 0 {
		t.Fatalf("Keys of an empty token = %d, %v", n, err)
	}
	for _, n := range []int{1, 32, 1024} {
		a, err := token.Random(t.Context(), n)
		if err != nil || len(a) != n {
			t.Fatalf("Random(%d) = %d octets, %v", n, len(a), err)
		}
		b, err := token.Random(t.Context(), n)
		if err != nil {
			t.Fatal(err)
		}
		if n >= 32 && bytes.Equal(a, b) {
			t.Errorf("Random(%d) twice gave the same", n)
		}
	}
	for _, n := range []int{-1, 0, 1025} {
		_, err := token.Random(t.Context(), n)
		d.wants(t, fmt.Sprintf("Random(%d)", n), err, hsm.ErrUnsupported)
	}
	NewKey(t, token, "one", hsm.ECDSAP256)
	NewKey(t, token, "two", hsm.ECDSAP256)
	if n, err := token.Keys(t.Context()); err != nil || n != 2 {
		t.Errorf("Keys = %d, %v; want 2", n, err)
	}
}

func concurrent(t *testing.T, d Device) {
	token := d.open(t)
	keys := []hsm.Key{NewKey(t, token, "a", hsm.ECDSAP256), NewKey(t, token, "b", hsm.ECDSAP384)}
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			key := keys[i%len(keys)]
			hash := hashOf(t, key)
			for j := range 2 {
				h := hash.New()
				_, _ = fmt.Fprintf(h, "%d %d", i, j)
				digest := h.Sum(nil)
				sig, err := key.SignContext(t.Context(), digest, hash)
				if err != nil {
					t.Error(err)
				} else if !ecdsa.VerifyASN1(key.Public().(*ecdsa.PublicKey), digest, sig) {
					t.Error("a signature over something else")
				}
			}
		})
	}
	wg.Wait()
}

// hashOf returns the hash of the key's algorithm.
func hashOf(t *testing.T, key hsm.Key) crypto.Hash {
	algorithm, err := hsm.AlgorithmOf(key.Public())
	if err != nil {
		t.Error(err)
	}
	return algorithm.Hash()
}

func endedContext(t *testing.T, d Device) {
	token := d.open(t)
	key := NewKey(t, token, "key", hsm.ECDSAP256)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := key.SignContext(ctx, make([]byte, 32), crypto.SHA256)
	d.wants(t, "sign", err, hsm.ErrBusy)
	_, err = token.Generate(ctx, hsm.Spec{Label: "late", ID: RandomID(), Algorithm: hsm.ECDSAP256})
	d.wants(t, "generate", err, hsm.ErrBusy)
	if n, err := token.Keys(t.Context()); err != nil || n != 1 {
		t.Errorf("Keys = %d, %v; want 1", n, err)
	}
	verifies(t, key, crypto.SHA256)
}

func wrongPIN(t *testing.T, d Device) {
	if d.PINAtUse != "" {
		wrongPINAtUse(t, d)
		return
	}
	before := 0
	if d.Logins != nil {
		before = d.Logins()
	}
	wrong := append([]byte("wrong-"), d.PIN...)
	token, err := d.Open(t.Context(), wrong)
	if err == nil {
		_ = token.Close()
		t.Fatal("a wrong PIN opened the token")
	}
	d.wants(t, "wrong PIN", err, hsm.ErrPIN)
	if d.Logins != nil && d.Logins() != before+1 {
		t.Errorf("%d login attempts, want 1", d.Logins()-before)
	}
}

// wrongPINAtUse: the PIN is tried at the first use of a key, once, and the token
// is dead afterwards; the right PIN works as before.
func wrongPINAtUse(t *testing.T, d Device) {
	token, err := d.Open(t.Context(), d.PIN)
	if err != nil {
		t.Fatal(err)
	}
	ref := NewKey(t, token, "key", hsm.ECDSAP256).Ref()
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	wrong, err := d.Open(t.Context(), append([]byte("wrong-"), d.PIN...))
	if err != nil {
		t.Fatal(err)
	}
	_, err = wrong.Open(t.Context(), ref, hsm.RoleCT)
	d.wants(t, "open with a wrong PIN", err, hsm.ErrPIN)
	d.wants(t, "health after a wrong PIN", wrong.Err(), hsm.ErrPIN)
	_, err = wrong.Open(t.Context(), ref, hsm.RoleCT)
	d.wants(t, "open again", err, hsm.ErrPIN)
	_, err = wrong.Random(t.Context(), 8)
	d.wants(t, "random after a wrong PIN", err, hsm.ErrPIN)
	if err := wrong.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	again, err := d.open(t).Open(t.Context(), ref, hsm.RoleCT)
	if err != nil {
		t.Fatalf("open with the right PIN: %v", err)
	}
	verifies(t, again, crypto.SHA256)
}

func openTwice(t *testing.T, d Device) {
	token := d.open(t)
	key := NewKey(t, token, "key", hsm.ECDSAP256)
	for name, pin := range map[string][]byte{"right PIN": d.PIN, "wrong PIN": []byte("0000")} {
		second, err := d.Open(t.Context(), pin)
		if err == nil {
			_ = second.Close()
			t.Errorf("a second Open with the %s succeeded", name)
		}
	}
	verifies(t, key, crypto.SHA256)
}

func closes(t *testing.T, d Device) {
	token, err := d.Open(t.Context(), d.PIN)
	if err != nil {
		t.Fatal(err)
	}
	key := NewKey(t, token, "key", hsm.ECDSAP256)
	if err := token.Err(); err != nil {
		t.Errorf("health of an open token: %v", err)
	}
	for range 2 {
		if err := token.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
	d.wants(t, "health after Close", token.Err(), hsm.ErrLost)
	_, err = key.Sign(nil, make([]byte, 32), crypto.SHA256)
	d.wants(t, "sign after Close", err, hsm.ErrLost)
	_, err = token.Open(t.Context(), key.Ref(), hsm.RoleCT)
	d.wants(t, "open after Close", err, hsm.ErrLost)
	_, err = token.Random(t.Context(), 8)
	d.wants(t, "random after Close", err, hsm.ErrLost)
	_, err = token.Evidence(t.Context(), key)
	d.wants(t, "evidence after Close", err, hsm.ErrLost)

	again := d.open(t)
	opened, err := again.Open(t.Context(), key.Ref(), hsm.RoleCT)
	if err != nil {
		t.Fatalf("open the key in the reopened token: %v", err)
	}
	verifies(t, opened, crypto.SHA256)
	_, err = key.Sign(nil, make([]byte, 32), crypto.SHA256)
	d.wants(t, "the old key after reopening", err, hsm.ErrLost)
	if _, err := again.Evidence(t.Context(), key); err == nil {
		t.Error("evidence of a key of the closed token")
	}
}
