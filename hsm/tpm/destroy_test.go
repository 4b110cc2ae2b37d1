package tpm_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/tpm"
)

// condemn condemns a key of the token.
func condemn(t *testing.T, token *tpm.Token, key hsm.Key) hsm.Condemned {
	t.Helper()
	c, err := token.Condemn(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// gone fails the test unless nothing of a condemned key is left: no file, no key
// with the id, no copy in the TPM, no open key that signs.
func gone(t *testing.T, token *tpm.Token, dir string, c hsm.Condemned, open ...hsm.Key) {
	t.Helper()
	id, err := hex.DecodeString(c.ID)
	if err != nil {
		t.Fatal(err)
	}
	_, err = token.Find(t.Context(), id)
	wants(t, "find after it", err, hsm.ErrNotFound)
	for _, key := range open {
		wants(t, "sign after it with "+key.Ref().URI, sign(t.Context(), key), hsm.ErrNotFound)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), c.Label+".") || strings.HasPrefix(e.Name(), ".") {
			t.Errorf("file %s is left", e.Name())
		}
	}
	wants(t, "destroy again", token.Destroy(t.Context(), c), hsm.ErrNotFound)
	if err := token.Err(); err != nil {
		t.Errorf("health after it: %v", err)
	}
}

// TestDestroyedFileCopy: what the documents say of a copy of the file is so. It
// signs again in its TPM.
func TestDestroyedFileCopy(t *testing.T) {
	cfg := hsmtest.SWTPM(t).Config(t)
	token := hsmtest.OpenTPM(t, cfg)
	key := hsmtest.NewKey(t, token, "condemned", hsm.ECDSAP256)
	path := filepath.Join(cfg.Dir, "condemned.pem")
	backup, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := token.Destroy(t.Context(), condemn(t, token, key)); err != nil {
		t.Fatal(err)
	}
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, backup, 0o600); err != nil {
		t.Fatal(err)
	}
	again := hsmtest.OpenTPM(t, cfg)
	restored, err := again.Open(t.Context(), key.Ref(), hsm.RoleNone)
	if err != nil {
		t.Fatal(err)
	}
	signs(t, restored)
}

// TestDestroy: exactly the condemned key ends, with its copies at persistent
// handles, and nothing else does.
func TestDestroy(t *testing.T) {
	e := hsmtest.SWTPM(t)
	cfg := e.Config(t)
	token := hsmtest.OpenTPM(t, cfg)
	key, kept := hsmtest.NewKey(t, token, "condemned", hsm.ECDSAP384), hsmtest.NewKey(t, token, "kept", hsm.ECDSAP256)
	const handle, other = 0x81010001, 0x81010002
	for at, k := range map[uint32]hsm.Key{handle: key, other: kept} {
		if err := token.Persist(t.Context(), k, at); err != nil {
			t.Fatal(err)
		}
	}
	at := func(handle uint32, k hsm.Key) hsm.Key {
		copied, err := token.Open(t.Context(), hsm.Ref{URI: tpm.HandleURI(cfg.Device, handle), SPKI: k.Ref().SPKI}, hsm.RoleNone)
		if err != nil {
			t.Fatal(err)
		}
		return copied
	}
	persistent, keptPersistent := at(handle, key), at(other, kept)
	_, err := token.Condemn(t.Context(), persistent)
	wants(t, "condemn a copy", err, hsm.ErrUnsupported)
	if _, err := token.Condemn(t.Context(), hsmtest.SoftwareKey(hsm.ECDSAP256)); err == nil {
		t.Error("a key of somebody else was condemned")
	}
	c, keptC := condemn(t, token, key), condemn(t, token, kept)
	with := func(change func(*hsm.Condemned)) hsm.Condemned {
		d := c
		change(&d)
		return d
	}
	for _, tc := range []struct {
		name string
		c    hsm.Condemned
		want error
	}{
		{"in another token", with(func(c *hsm.Condemned) { c.Token.Serial = "0" }), hsm.ErrMismatch},
		{"in another folder", with(func(c *hsm.Condemned) { c.Token.Label = "/nowhere" }), hsm.ErrMismatch},
		{"without an id", with(func(c *hsm.Condemned) { c.ID = "" }), hsm.ErrMismatch},
		{"without a label", with(func(c *hsm.Condemned) { c.Label = "" }), hsm.ErrMismatch},
		{"with a path for a label", with(func(c *hsm.Condemned) { c.Label = "../condemned" }), hsm.ErrMismatch},
		{"with an id and a label of nobody", with(func(c *hsm.Condemned) { c.ID, c.Label = hex.EncodeToString(hsmtest.RandomID()), "nobody" }), hsm.ErrNotFound},
		{"with an id of nobody", with(func(c *hsm.Condemned) { c.ID = hex.EncodeToString(hsmtest.RandomID()) }), hsm.ErrMismatch},
		{"with the id of another", with(func(c *hsm.Condemned) { c.ID = keptC.ID }), hsm.ErrMismatch},
		{"with the label of another", with(func(c *hsm.Condemned) { c.Label = keptC.Label }), hsm.ErrMismatch},
		{"with the hash of another", with(func(c *hsm.Condemned) { c.SPKI = keptC.SPKI }), hsm.ErrMismatch},
		{"without a hash", with(func(c *hsm.Condemned) { c.SPKI = "" }), hsm.ErrMismatch},
	} {
		t.Run(tc.name, func(t *testing.T) {
			wants(t, "destroy", token.Destroy(t.Context(), tc.c), tc.want)
		})
	}
	signs(t, key)
	signs(t, persistent)

	if err := token.Destroy(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	gone(t, token, cfg.Dir, c, key, persistent)
	signs(t, kept)
	signs(t, keptPersistent)
	if n, err := token.Keys(t.Context()); err != nil || n != 1 {
		t.Errorf("%d keys (%v), want 1", n, err)
	}
	// The label and the id are free again, for a key that is another.
	id, err := hex.DecodeString(c.ID)
	if err != nil {
		t.Fatal(err)
	}
	again, err := token.Generate(t.Context(), hsm.Spec{Label: c.Label, ID: id, Algorithm: hsm.ECDSAP384})
	if err != nil {
		t.Fatal(err)
	}
	signs(t, again)
	wants(t, "destroy what came after", token.Destroy(t.Context(), c), hsm.ErrMismatch)
}

// TestDestroyFiles: what is done with a folder in which somebody has been.
func TestDestroyFiles(t *testing.T) {
	for _, row := range []struct {
		name   string
		damage func(path string) error // of the key file
		want   error
	}{
		{"as it was", func(string) error { return nil }, nil},
		{"no creation file", func(p string) error { return os.Remove(strings.TrimSuffix(p, ".pem") + ".creation") }, nil},
		{"no key file", os.Remove, hsm.ErrNotFound},
		{"an empty key file", func(p string) error { return os.Truncate(p, 0) }, tpm.ErrKeyFile},
		{"half a key file", func(p string) error { return os.Truncate(p, 100) }, tpm.ErrKeyFile},
		{"a link", func(p string) error { return errors.Join(os.Rename(p, p+".real"), os.Symlink(p+".real", p)) }, tpm.ErrKeyFile},
		{"the id in two files", func(p string) error {
			text, err := os.ReadFile(p)
			other := filepath.Join(filepath.Dir(p), "other.pem")
			return errors.Join(err, os.WriteFile(other, bytes.Replace(text, []byte("Label: condemned"), []byte("Label: other"), 1), 0o600))
		}, hsm.ErrAmbiguous},
		{"under another name", func(p string) error {
			text, err := os.ReadFile(p)
			other := filepath.Join(filepath.Dir(p), "other.pem")
			return errors.Join(err, os.Remove(p), os.WriteFile(other, bytes.Replace(text, []byte("Label: condemned"), []byte("Label: other"), 1), 0o600))
		}, hsm.ErrMismatch},
	} {
		t.Run(row.name, func(t *testing.T) {
			cfg := hsmtest.SWTPM(t).Config(t)
			token := hsmtest.OpenTPM(t, cfg)
			key := hsmtest.NewKey(t, token, "condemned", hsm.ECDSAP256)
			c := condemn(t, token, key)
			if err := row.damage(filepath.Join(cfg.Dir, "condemned.pem")); err != nil {
				t.Fatal(err)
			}
			if err := token.Destroy(t.Context(), c); !errors.Is(err, row.want) || row.want == nil && err != nil {
				t.Fatalf("error %v, want %v", err, row.want)
			}
			if row.want == nil {
				gone(t, token, cfg.Dir, c, key)
			}
		})
	}
}

// TestDestroyKilled: killed at each of its calls to the file system, and
// repeated, it ends the key; before that the key is whole or found no more.
// What a kill leaves under the other name is not read again.
func TestDestroyKilled(t *testing.T) {
	whole := t // the test, of which each row is a part
	if _, err := exec.LookPath("strace"); err != nil {
		hsmtest.Missing(t, "strace is not installed")
	}
	e := hsmtest.SWTPM(t)
	cfg := e.Config(t)
	token := open(t, cfg)
	// By file, not by count: strace counts for each thread.
	for i, row := range []struct {
		name, call string
		file       func(c hsm.Condemned) string
		found      bool // the key, after the kill
	}{
		{"before the new name", "renameat", keyFile, true},
		{"before the folder is synced", "fsync", func(hsm.Condemned) string { return "" }, false},
		{"before the creation file is removed", "unlinkat", func(c hsm.Condemned) string { return c.Label + ".creation" }, false},
		{"before the file is overwritten", "write", doomedFile, false},
		{"before it is synced", "fsync", doomedFile, false},
		{"before it is removed", "unlinkat", doomedFile, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			key := hsmtest.NewKey(t, token, fmt.Sprintf("key-%d", i), hsm.ECDSAP256)
			if err := token.Persist(t.Context(), key, 0x81010001); err != nil {
				t.Fatal(err)
			}
			c := condemn(t, token, key)
			if err := token.Close(); err != nil { // the other process wants the emulator
				t.Fatal(err)
			}
			destroyKilled(t, cfg, c, row.call, row.file(c))
			token = open(whole, cfg) // for the rows after this one too
			id, err := hex.DecodeString(c.ID)
			if err != nil {
				t.Fatal(err)
			}
			found, err := token.Find(t.Context(), id)
			if row.found {
				if err != nil {
					t.Fatalf("find after the kill: %v", err)
				}
				signs(t, found)
			} else {
				wants(t, "find after the kill", err, hsm.ErrNotFound)
			}
			if err := token.Destroy(t.Context(), c); err != nil {
				t.Fatal(err)
			}
			gone(t, token, cfg.Dir, c)
			copied := hsm.Ref{URI: tpm.HandleURI(cfg.Device, 0x81010001), SPKI: key.Ref().SPKI}
			_, err = token.Open(t.Context(), copied, hsm.RoleNone)
			wants(t, "open the copy", err, hsm.ErrNotFound)
		})
	}
}

func keyFile(c hsm.Condemned) string    { return c.Label + ".pem" }
func doomedFile(c hsm.Condemned) string { return ".destroy-" + c.ID + "-" + c.SPKI[:32] }

// condemnedHere is what TestMain destroys in a process of its own: device, folder
// and key, a line each.
const condemnedHere = "CHANCERY_TPM_DESTROY"

// destroyKilled has this test's program destroy the key, and kills it when it
// makes the call on the file of the folder.
func destroyKilled(t *testing.T, cfg tpm.Config, c hsm.Condemned, call, file string) {
	t.Helper()
	calls := filepath.Join(t.TempDir(), "calls")
	cmd := exec.CommandContext(t.Context(), "strace", "-f", "-qq", "-o", calls, "-e", "trace="+call,
		"-P", filepath.Join(cfg.Dir, file), "-e", "inject="+call+":signal=SIGKILL:when=1", os.Args[0])
	cmd.Env = append(os.Environ(), condemnedHere+"="+strings.Join([]string{cfg.Device, cfg.Dir, c.Label, c.ID, c.SPKI}, "\n"))
	out, err := cmd.CombinedOutput()
	if _, missing := os.Stat(calls); errors.Is(missing, fs.ErrNotExist) {
		hsmtest.Missing(t, fmt.Sprintf("strace does not work here: %v\n%s", err, out))
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() == destroyFailed {
		t.Fatalf("destroy was not killed: %v\n%s", err, out)
	}
}

// destroyFailed is the status of a destruction that failed by itself.
const destroyFailed = 3

// destroyHere destroys what condemnedHere says.
func destroyHere(text string) error {
	lines := strings.Split(text, "\n")
	token, err := tpm.Open(context.Background(), tpm.Config{Device: lines[0], Dir: lines[1], Auth: make([]byte, 16)})
	if err != nil {
		return err
	}
	err = token.Destroy(context.Background(), hsm.Condemned{Token: token.Info().Device(), Label: lines[2], ID: lines[3], SPKI: lines[4]})
	return errors.Join(err, token.Close())
}
