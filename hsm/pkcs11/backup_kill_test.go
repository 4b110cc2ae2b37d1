package pkcs11_test

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
)

// restoreOrder names the file that tells a child process what to restore. It
// uses the SoftHSM home and the shim of its parent, whose places it inherits.
const restoreOrder = "CHANCERY_TEST_RESTORE"

// order is what a child process is told, in a file: a PIN is in no argument.
type order struct {
	Module, URI string
	PIN         []byte
	Wrapped     []byte
}

// TestRestoreChild is the child of TestRestoreKilled.
func TestRestoreChild(t *testing.T) {
	path := os.Getenv(restoreOrder)
	if path == "" {
		t.Skip("this is the child process of TestRestoreKilled")
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var o order
	if err := json.Unmarshal(text, &o); err != nil {
		t.Fatal(err)
	}
	token, err := pkcs11.Open(t.Context(), pkcs11.Config{Module: o.Module, URI: o.URI, PIN: o.PIN})
	if err != nil {
		t.Fatal(err)
	}
	w, err := hsm.ParseWrapped(o.Wrapped)
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = token.Restore(t.Context(), w, hsm.RoleRoot, mustSPKI(t, w))
	t.Fatalf("Restore returned before it was killed: %v", err)
}

// TestRestoreKilled kills a process between the unwrapping and the public
// object, and restores again.
func TestRestoreKilled(t *testing.T) {
	p := newBackupPair(t)
	key := p.key(t, "root", hsm.ECDSAP256)
	w := p.wrap(t, key)
	spki := key.Ref().SPKI
	for _, token := range []*pkcs11.Token{p.source, p.target} {
		if err := token.Close(); err != nil { // so that only the child's sessions count
			t.Fatal(err)
		}
	}
	p.shim.Hang(hsmtest.CreateObject)
	child := startRestore(t, order{Module: p.to.Module, URI: p.to.URI, PIN: p.to.PIN}, w)
	eventually(t, "the child to create the public object", func() bool { return p.shim.Hanging() == 1 })
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait() // killed
	p.shim.Hang(0)
	p.shim.Forget()

	target := hsmtest.OpenSoftHSM(t, p.to)
	if n, err := target.Keys(t.Context()); err != nil || n != 1 {
		t.Fatalf("the target has %d private keys (%v), want the one half", n, err)
	}
	if _, err := target.Find(t.Context(), mustSpec(t, w).ID); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("the half pair: error %v, want ErrNotFound", err)
	}
	restored, e, err := target.Restore(t.Context(), w, hsm.RoleRoot, spki)
	if err != nil {
		t.Fatal(err)
	}
	if restored.Ref().SPKI != spki || !e.Restored {
		t.Errorf("restored %v, evidence says %t", restored.Ref(), e.Restored)
	}
	if n, err := target.Keys(t.Context()); err != nil || n != 1 {
		t.Errorf("the target has %d private keys (%v), want 1", n, err)
	}
}

// startRestore starts a child process that restores w, until the test ends.
func startRestore(t *testing.T, o order, w hsm.Wrapped) *exec.Cmd {
	t.Helper()
	var err error
	if o.Wrapped, err = w.Marshal(); err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "order")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	child := exec.Command(os.Args[0], "-test.run", "^TestRestoreChild$")
	child.Env = append(os.Environ(), restoreOrder+"="+path)
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = child.Process.Kill() }) // if it still runs
	return child
}

// TestPairThroughRemoting: p11-kit does not carry what Pair needs. It must say
// so, and not send the pointers of a template to another process.
func TestPairThroughRemoting(t *testing.T) {
	source := hsmtest.NewRemote(t)
	target := hsmtest.NewSoftHSM(t)
	target.Module = source.Token.Module
	source.Kill(t)
	source.Start(t) // it sees the new token
	_, err := pkcs11.Pair(t.Context(), "wrapping-key", officer(source.Token), officer(target))
	wants(t, source.Token, "pair", err, hsm.ErrUnsupported)
	opened := hsmtest.OpenSoftHSM(t, target)
	if n, err := opened.Keys(t.Context()); err != nil || n != 0 {
		t.Errorf("the target has %d keys (%v), want 0", n, err)
	}
}
