package tpm_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/tpm"
	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// TestConformance runs every backend's suite. The authorisation value is in no
// log record, and nothing of ours is in the TPM after Close.
func TestConformance(t *testing.T) {
	hsmtest.Conformance(t, func(t *testing.T) hsmtest.Device {
		e := hsmtest.SWTPM(t)
		t.Cleanup(func() { empty(t, e) })
		var logs lockedBuffer
		device := e.Device(t, tpm.Config{Logger: slog.New(slog.NewTextHandler(&logs, nil))})
		t.Cleanup(func() {
			if strings.Contains(logs.String(), string(device.PIN)) {
				t.Error("the log holds the authorisation value")
			}
			if t.Failed() {
				t.Logf("log:\n%s", logs.String())
			}
		})
		return device
	})
}

// lockedBuffer is a log's memory.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// empty fails the test if a transient object or a session is in the TPM. No
// token is open.
func empty(t testing.TB, e *hsmtest.Emulator) {
	t.Helper()
	conn, err := net.Dial("unix", e.Socket())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	for name, class := range map[string]uint32{"objects": 0x80000000, "loaded sessions": 0x02000000, "saved sessions": 0x03000000} {
		rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: class, PropertyCount: 64}.Execute(transport.FromReadWriter(conn))
		if err != nil {
			t.Fatal(err)
		}
		list, err := rsp.CapabilityData.Data.Handles()
		if err != nil {
			t.Fatal(err)
		}
		if len(list.Handle) != 0 {
			t.Errorf("%d %s were left in the TPM: %x", len(list.Handle), name, list.Handle)
		}
	}
}

// open opens a token that the test closes itself.
func open(t testing.TB, cfg tpm.Config) *tpm.Token {
	t.Helper()
	token, err := tpm.Open(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = token.Close() })
	token.SetRetryWait(patience)
	return token
}

// signs fails the test unless key signs. Key verifies the signature.
func signs(t testing.TB, key hsm.Key) {
	t.Helper()
	if err := sign(t.Context(), key); err != nil {
		t.Error(err)
	}
}

// sign signs a random digest with the key's own hash.
func sign(ctx context.Context, key hsm.Key) error {
	algorithm, err := hsm.AlgorithmOf(key.Public())
	if err != nil {
		return err
	}
	digest := make([]byte, algorithm.Hash().Size())
	_, _ = rand.Read(digest)
	_, err = key.SignContext(ctx, digest, algorithm.Hash())
	return err
}

func wants(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: error %v, want %v", what, err, want)
	}
}

// TestSlots: more keys than the TPM has room for, with the storage key made and
// with it persistent. No more than three objects and one session are ever there,
// none after Close.
func TestSlots(t *testing.T) {
	for _, persistent := range []bool{false, true} {
		t.Run(fmt.Sprintf("persistent storage key %v", persistent), func(t *testing.T) {
			e := hsmtest.SWTPM(t)
			parent := "0x40000001"
			if persistent {
				persistSRK(t, e, srk())
				parent = "0x81000001"
			}
			token := open(t, e.Config(t))
			var keys []hsm.Key
			for i := range 5 {
				algorithm := hsm.ECDSAP256
				if i == 0 {
					algorithm = hsm.ECDSAP384
				}
				keys = append(keys, hsmtest.NewKey(t, token, fmt.Sprintf("key-%d", i), algorithm))
			}
			for i := range 24 {
				signs(t, keys[i*3%len(keys)])
				objects, sessions, err := token.Handles(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if objects > 3 || sessions != 1 {
					t.Errorf("%d objects and %d sessions, want at most 3 and 1", objects, sessions)
				}
			}
			evidence, err := token.Evidence(t.Context(), keys[0])
			if err != nil {
				t.Fatal(err)
			}
			if got := evidence.Attributes["TPM.parent"]; got != parent {
				t.Errorf("parent is %s, want %s", got, parent)
			}
			if err := token.Close(); err != nil {
				t.Fatal(err)
			}
			empty(t, e)
		})
	}
}

// srk is the storage key's template, written here anew.
func srk() tpm2.TPMTPublic {
	template := tpm2.ECCSRKTemplate
	template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{})
	return template
}

// persistSRK makes a primary key from template and puts it where the storage
// key belongs.
func persistSRK(t *testing.T, e *hsmtest.Emulator, template tpm2.TPMTPublic) {
	t.Helper()
	conn, err := net.Dial("unix", e.Socket())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	device := transport.FromReadWriter(conn)
	made, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(template)}.Execute(device)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.EvictControl{
		Auth:             tpm2.TPMRHOwner,
		ObjectHandle:     &tpm2.NamedHandle{Handle: made.ObjectHandle, Name: made.Name},
		PersistentHandle: 0x81000001,
	}.Execute(device)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (tpm2.FlushContext{FlushHandle: made.ObjectHandle}).Execute(device); err != nil {
		t.Fatal(err)
	}
}

// TestOtherSRK: what is at the storage key's handle and is none is not used.
func TestOtherSRK(t *testing.T) {
	e := hsmtest.SWTPM(t)
	open := srk()
	open.ObjectAttributes.NoDA = false
	persistSRK(t, e, open)
	token := hsmtest.OpenTPM(t, e.Config(t))
	evidence, err := token.Evidence(t.Context(), hsmtest.NewKey(t, token, "key", hsm.ECDSAP256))
	if err != nil {
		t.Fatal(err)
	}
	if got := evidence.Attributes["TPM.parent"]; got != "0x40000001" {
		t.Errorf("parent is %s, want the owner's", got)
	}
}

// TestLeftovers: what a killed process left in the emulator does not stop the
// next one.
func TestLeftovers(t *testing.T) {
	e := hsmtest.SWTPM(t)
	conn, err := net.Dial("unix", e.Socket())
	if err != nil {
		t.Fatal(err)
	}
	device := transport.FromReadWriter(conn)
	for range 3 {
		if _, err := (tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(srk())}).Execute(device); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		if _, _, err := tpm2.HMACSession(device, tpm2.TPMAlgSHA256, 16); err != nil {
			t.Fatal(err)
		}
	}
	_ = conn.Close()
	token := open(t, e.Config(t))
	signs(t, hsmtest.NewKey(t, token, "key", hsm.ECDSAP256))
	if objects, sessions, err := token.Handles(t.Context()); err != nil || objects > 3 || sessions != 1 {
		t.Errorf("%d objects, %d sessions, %v", objects, sessions, err)
	}
}

// TestAuthValues: values with zero octets at each place, short and long ones.
// Each key is made, and found again in another session.
func TestAuthValues(t *testing.T) {
	rows := map[string][]byte{
		"a zero inside":    append([]byte{1, 2, 3, 0, 5}, bytes.Repeat([]byte{7}, 27)...),
		"a zero first":     append([]byte{0}, bytes.Repeat([]byte{7}, 31)...),
		"zeros at the end": append(bytes.Repeat([]byte{7}, 28), 0, 0, 0, 0),
		"zeros alone":      make([]byte, 32),
		"16 octets":        bytes.Repeat([]byte{9}, 16),
		"33 octets":        bytes.Repeat([]byte{9}, 33),
		"a kilobyte":       bytes.Repeat([]byte{9}, 1024),
	}
	e := hsmtest.SWTPM(t)
	for name, auth := range rows {
		cfg := e.Config(t)
		cfg.Auth = auth
		token := open(t, cfg)
		key := hsmtest.NewKey(t, token, strings.ReplaceAll(name, " ", "-"), hsm.ECDSAP256)
		if err := token.Close(); err != nil {
			t.Fatal(err)
		}
		token = open(t, cfg)
		if _, err := token.Open(t.Context(), key.Ref(), hsm.RoleCT); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := token.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestConfig(t *testing.T) {
	e := hsmtest.SWTPM(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	rows := []struct {
		name   string
		change func(*tpm.Config)
		want   error
	}{
		{"no value", func(c *tpm.Config) { c.Auth = nil }, hsm.ErrPIN},
		{"a value of 15 octets", func(c *tpm.Config) { c.Auth = make([]byte, 15) }, hsm.ErrPIN},
		{"no device", func(c *tpm.Config) { c.Device = "" }, tpm.ErrURI},
		{"relative device", func(c *tpm.Config) { c.Device = "tpm" }, tpm.ErrURI},
		{"absent device", func(c *tpm.Config) { c.Device = "/nonexistent/tpm" }, hsm.ErrNotFound},
		{"a file as device", func(c *tpm.Config) { c.Device = file }, hsm.ErrLost},
		{"no folder", func(c *tpm.Config) { c.Dir = "" }, tpm.ErrURI},
		{"absent folder", func(c *tpm.Config) { c.Dir = "/nonexistent" }, hsm.ErrNotFound},
		{"a file as folder", func(c *tpm.Config) { c.Dir = file }, hsm.ErrNotFound},
	}
	for _, row := range rows {
		cfg := e.Config(t)
		row.change(&cfg)
		token, err := tpm.Open(t.Context(), cfg)
		if err == nil {
			_ = token.Close()
		}
		wants(t, row.name, err, row.want)
	}
}

// TestLoadRefuses: key files that are damaged, of another TPM, or too loose.
func TestLoadRefuses(t *testing.T) {
	e := hsmtest.SWTPM(t)
	cfg := e.Config(t)
	token := hsmtest.OpenTPM(t, cfg)
	key := hsmtest.NewKey(t, token, "key", hsm.ECDSAP256)
	other := hsmtest.OpenSWTPM(t)
	foreign := hsmtest.NewKey(t, other, "foreign", hsm.ECDSAP256)
	copyFile(t, filepath.Join(other.Info().Label, "foreign.pem"), filepath.Join(cfg.Dir, "foreign.pem"))
	ours, err := os.ReadFile(filepath.Join(cfg.Dir, "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	write := func(label string, text []byte) {
		if err := os.WriteFile(filepath.Join(cfg.Dir, label+".pem"), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("empty", nil)
	write("cut", ours[:len(ours)/2])
	write("renamed", ours)
	write("twice", append(bytes.Clone(ours), ours...))
	write("large", append(bytes.Clone(ours), make([]byte, 1<<20)...))
	if err := os.Symlink("key.pem", filepath.Join(cfg.Dir, "link.pem")); err != nil {
		t.Fatal(err)
	}
	for label, want := range map[string]error{
		"empty": tpm.ErrKeyFile, "cut": tpm.ErrKeyFile, "renamed": tpm.ErrKeyFile, "twice": tpm.ErrKeyFile,
		"large": tpm.ErrKeyFile, "link": tpm.ErrKeyFile, "absent": hsm.ErrNotFound,
	} {
		ref := hsm.Ref{URI: tpm.KeyURI(cfg.Dir, cfg.Device, label, nil), SPKI: key.Ref().SPKI}
		_, err := token.Open(t.Context(), ref, hsm.RoleNone)
		wants(t, label, err, want)
	}
	ref := hsm.Ref{URI: tpm.KeyURI(cfg.Dir, cfg.Device, "foreign", nil), SPKI: foreign.Ref().SPKI}
	_, err = token.Open(t.Context(), ref, hsm.RoleNone)
	wants(t, "another TPM's key", err, hsm.ErrMismatch)
	// The damaged files hide neither the key nor its id.
	if _, err := token.Open(t.Context(), key.Ref(), hsm.RoleCT); err != nil {
		t.Error(err)
	}
	objects, sessions, err := token.Handles(t.Context())
	if err != nil || objects > 3 || sessions != 1 {
		t.Errorf("after the refusals: %d objects, %d sessions, %v", objects, sessions, err)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	text, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestFiles: key and creation file are whole, private and durable under their
// names; nothing else is in the folder.
func TestFiles(t *testing.T) {
	cfg := hsmtest.SWTPM(t).Config(t)
	token := hsmtest.OpenTPM(t, cfg)
	hsmtest.NewKey(t, token, "..a/b%c", hsm.ECDSAP256)
	hsmtest.NewKey(t, token, "plain", hsm.ECDSAP384)
	entries, err := os.ReadDir(cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, entry := range entries {
		names = append(names, entry.Name())
		info, err := entry.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != 0o600 {
			t.Errorf("%s has mode %v, want 0600", entry.Name(), info.Mode())
		}
	}
	want := "%2E.a%2Fb%25c.creation %2E.a%2Fb%25c.pem plain.creation plain.pem"
	if got := strings.Join(names, " "); got != want {
		t.Errorf("files are %s, want %s", got, want)
	}
}

// TestGenerateCutOff: a generation that ended between its two files is not
// found, and can be done again; one that cannot write leaves no key.
func TestGenerateCutOff(t *testing.T) {
	cfg := hsmtest.SWTPM(t).Config(t)
	token := hsmtest.OpenTPM(t, cfg)
	id := hsmtest.RandomID()
	spec := hsm.Spec{Label: "key", ID: id, Algorithm: hsm.ECDSAP256}
	first, err := token.Generate(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(cfg.Dir, "key.pem")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(cfg.Dir, ".new-XYZ"), []byte("half a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = token.Find(t.Context(), id)
	wants(t, "find what was cut off", err, hsm.ErrNotFound)
	if n, err := token.Keys(t.Context()); err != nil || n != 0 {
		t.Errorf("Keys = %d, %v; want 0", n, err)
	}
	second, err := token.Generate(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if first.Ref() == second.Ref() {
		t.Error("the same key came again")
	}
	if found, err := token.Find(t.Context(), id); err != nil || found.Ref() != second.Ref() {
		t.Errorf("Find gives %v, %v; want %v", found, err, second.Ref())
	}
	// A damaged file could have the id: nothing is made before that is known.
	if err := os.WriteFile(filepath.Join(cfg.Dir, "damaged.pem"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = token.Generate(t.Context(), hsm.Spec{Label: "new", ID: hsmtest.RandomID(), Algorithm: hsm.ECDSAP256})
	wants(t, "generate beside a damaged file", err, tpm.ErrKeyFile)
}

// TestPersist: a copy at a persistent handle signs, after a restart too, and
// goes again.
func TestPersist(t *testing.T) {
	e := hsmtest.SWTPM(t)
	cfg := e.Config(t)
	token := open(t, cfg)
	key := hsmtest.NewKey(t, token, "key", hsm.ECDSAP384)
	other := hsmtest.NewKey(t, token, "other", hsm.ECDSAP256)
	const handle = 0x81010001
	ref := hsm.Ref{URI: tpm.HandleURI(cfg.Device, handle), SPKI: key.Ref().SPKI}
	_, err := token.Open(t.Context(), ref, hsm.RoleCT)
	wants(t, "open before", err, hsm.ErrNotFound)
	wants(t, "evict before", token.Evict(t.Context(), ref), hsm.ErrNotFound)
	for _, bad := range []uint32{0, 0x80000001, 0x81000001, 0x81800000} {
		wants(t, fmt.Sprintf("persist at %#x", bad), token.Persist(t.Context(), key, bad), hsm.ErrUnsupported)
	}
	if err := token.Persist(t.Context(), key, handle); err != nil {
		t.Fatal(err)
	}
	wants(t, "persist another there", token.Persist(t.Context(), other, handle), hsm.ErrExists)
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	e.Stop(t)
	e.Start(t)
	if err := os.RemoveAll(cfg.Dir); err != nil {
		t.Fatal(err)
	}
	e.KeyDir(t)
	token = open(t, cfg)
	copied, err := token.Open(t.Context(), ref, hsm.RoleIntermediate)
	if err != nil {
		t.Fatal(err)
	}
	signs(t, copied)
	if copied.Ref() != ref {
		t.Errorf("Ref is %v, want %v", copied.Ref(), ref)
	}
	if e, err := token.Evidence(t.Context(), copied); err != nil || e.Attributes["LOCAL"] != "true" {
		t.Errorf("evidence: %v, %v", e.Attributes, err)
	}
	_, err = token.Open(t.Context(), hsm.Ref{URI: ref.URI, SPKI: other.Ref().SPKI}, hsm.RoleCT)
	wants(t, "open with another hash", err, hsm.ErrMismatch)
	wants(t, "evict with another hash", token.Evict(t.Context(), hsm.Ref{URI: ref.URI, SPKI: other.Ref().SPKI}), hsm.ErrMismatch)
	if err := token.Evict(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	wants(t, "sign after evicting", sign(t.Context(), copied), hsm.ErrNotFound)
	if err := token.Err(); err != nil {
		t.Errorf("health after evicting: %v", err)
	}
}

// TestOwnerAuth: a TPM whose owner has a value, which never goes over the wire
// as it is.
func TestOwnerAuth(t *testing.T) {
	e := hsmtest.SWTPM(t)
	owner := append([]byte("owner\x00value-"), hsmtest.RandomID()...)
	conn, err := net.Dial("unix", e.Socket())
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.HierarchyChangeAuth{AuthHandle: tpm2.TPMRHOwner, NewAuth: tpm2.TPM2BAuth{Buffer: owner}}.Execute(transport.FromReadWriter(conn))
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
	cfg := e.Config(t)
	wrong := open(t, cfg)
	_, err = wrong.Generate(t.Context(), hsm.Spec{Label: "key", ID: hsmtest.RandomID(), Algorithm: hsm.ECDSAP256})
	wants(t, "generate without the owner's value", err, hsm.ErrPIN)
	if err := wrong.Close(); err != nil {
		t.Fatal(err)
	}
	empty(t, e)
	cfg.OwnerAuth = owner
	token := open(t, cfg)
	key := hsmtest.NewKey(t, token, "key", hsm.ECDSAP256)
	if err := token.Persist(t.Context(), key, 0x81010002); err != nil {
		t.Error(err)
	}
}

func TestLockout(t *testing.T) {
	e := hsmtest.SWTPM(t)
	cfg := e.Config(t)
	token := open(t, cfg)
	want := tpm.Lockout{MaxTries: 31, Recovery: 2 * time.Hour, LockoutRecovery: 24 * time.Hour}
	before, err := token.Lockout(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if before.AuthSet || before.Lockout == want {
		t.Fatalf("a fresh TPM has %+v", before)
	}
	for name, bad := range map[string]tpm.Lockout{
		"no tries":        {Recovery: time.Hour},
		"no recovery":     {MaxTries: 1},
		"half a second":   {MaxTries: 1, Recovery: 1500 * time.Millisecond},
		"a negative time": {MaxTries: 1, Recovery: time.Hour, LockoutRecovery: -time.Second},
		"200 years":       {MaxTries: 1, Recovery: 200 * 366 * 24 * time.Hour},
	} {
		wants(t, name, token.SetLockout(t.Context(), nil, bad, nil), hsm.ErrUnsupported)
	}
	wants(t, "a short value", token.SetLockout(t.Context(), nil, want, []byte("short")), hsm.ErrUnsupported)
	value := append([]byte{1, 0, 2}, hsmtest.RandomID()...)
	if err := token.SetLockout(t.Context(), nil, want, value); err != nil {
		t.Fatal(err)
	}
	after, err := token.Lockout(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := (tpm.LockoutState{Lockout: want, AuthSet: true}); after != got {
		t.Errorf("after: %+v, want %+v", after, got)
	}
	again := want
	again.MaxTries = 7
	if err := token.SetLockout(t.Context(), value, again, nil); err != nil {
		t.Fatal(err)
	}
	if after, err = token.Lockout(t.Context()); err != nil || after.MaxTries != 7 {
		t.Errorf("after: %+v, %v; want 7 tries", after, err)
	}
	wants(t, "the old value", token.SetLockout(t.Context(), nil, want, nil), hsm.ErrPIN)
	wants(t, "the right value, now locked", token.SetLockout(t.Context(), value, want, nil), hsm.ErrPIN)
	// Keys neither cause nor suffer from a lockout, and the token lives.
	signs(t, hsmtest.NewKey(t, token, "key", hsm.ECDSAP256))
	if err := token.Err(); err != nil {
		t.Errorf("health: %v", err)
	}
}

// TestWrongAuthCountsNothing: a refused key value does not move the TPM's
// dictionary-attack counter.
func TestWrongAuthCountsNothing(t *testing.T) {
	e := hsmtest.SWTPM(t)
	cfg := e.Config(t)
	token := open(t, cfg)
	ref := hsmtest.NewKey(t, token, "key", hsm.ECDSAP256).Ref()
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		wrong := open(t, e.Config(t))
		_, err := wrong.Open(t.Context(), ref, hsm.RoleCT)
		wants(t, "wrong value", err, hsm.ErrPIN)
		if err := wrong.Close(); err != nil {
			t.Fatal(err)
		}
	}
	token = open(t, cfg)
	if state, err := token.Lockout(t.Context()); err != nil || state.Failed != 0 || state.Locked {
		t.Errorf("lockout is %+v, %v", state, err)
	}
	if _, err := token.Open(t.Context(), ref, hsm.RoleCT); err != nil {
		t.Error(err)
	}
}

// TestOneHash: the wrong hash is refused without the TPM: here it is closed.
func TestOneHash(t *testing.T) {
	e := hsmtest.SWTPM(t)
	token := open(t, e.Config(t))
	key := hsmtest.NewKey(t, token, "key", hsm.ECDSAP384)
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := key.Sign(nil, make([]byte, 32), crypto.SHA256)
	wants(t, "SHA-256 with a P-384 key", err, hsm.ErrUnsupported)
	_, err = key.Sign(nil, make([]byte, 48), crypto.SHA384)
	wants(t, "SHA-384 with a P-384 key", err, hsm.ErrLost)
}

// tools runs a program of tpm2-tools against the emulator. No token is open.
func tools(t *testing.T, e *hsmtest.Emulator, name string, args ...string) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		hsmtest.Missing(t, "tpm2-tools are not installed (Debian: apt install tpm2-tools)")
	}
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Env = append(os.Environ(), "TPM2TOOLS_TCTI=swtpm:path="+e.Socket())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}
