//go:build cgo

package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/ceremony/trust/tuf"
	"github.com/chancery-ca/chancery/hsm/softhsm"
)

// custodianRoom has custodians with SoftHSM tokens of their own, whose keys the
// program made.
type custodianRoom struct {
	*room
	module string
	keys   map[string]*ecdsa.PublicKey
	online *ecdsa.PublicKey
}

func newCustodianRoom(t *testing.T, ids ...string) *custodianRoom {
	t.Helper()
	r := &custodianRoom{room: newRoom(t, nil), keys: map[string]*ecdsa.PublicKey{}}
	var err error
	if r.module, err = softhsm.Module(); err != nil {
		t.Fatal(err)
	}
	for _, id := range append(ids, "service") {
		r.tool("softhsm2-util", "--init-token", "--free", "--label", id, "--so-pin", "so-pin-"+id, "--pin", "pin-of-"+id)
		r.write(id+".pin", "pin-of-"+id, 0o400)
		out, err := r.command("custodian", "key", "--module", r.module, "--uri", "pkcs11:token="+id,
			"--pin-file", id+".pin", "--out", id+".pem").CombinedOutput()
		if err != nil || bytes.Contains(out, []byte("pin-of-")) {
			t.Fatalf("make key of %s: %v\n%s", id, err, out)
		}
		block, _ := pem.Decode([]byte(r.read(filepath.Join(r.dir, id+".pem"))))
		pub, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		r.keys[id] = pub.(*ecdsa.PublicKey)
	}
	r.online = r.keys["service"]
	return r
}

// drafts writes the drafts of a root of these custodians, which follows before,
// and of its targets. It returns both and the folder.
func (r *custodianRoom) drafts(before *tuf.Root, ids ...string) (root, targets *tuf.Draft, folder string) {
	r.t.Helper()
	year, err := tuf.ParsePeriod("1y")
	if err != nil {
		r.t.Fatal(err)
	}
	layout := tuf.Layout{Threshold: 2, Online: r.online, Expires: tuf.Expires{Root: year, Targets: tuf.Decade, Snapshot: tuf.Decade, Timestamp: year}}
	for _, id := range ids {
		layout.Custodians = append(layout.Custodians, r.keys[id])
	}
	now := time.Now().UTC().Truncate(time.Second)
	if root, err = tuf.NewRoot(layout, before, now); err != nil {
		r.t.Fatal(err)
	}
	next := r.parsed(root)
	if targets, err = tuf.NewTargets(next, next.Version, []tuf.Target{{Name: "trusted_root.json", Content: []byte("{}")}}, now); err != nil {
		r.t.Fatal(err)
	}
	if folder, err = os.MkdirTemp(r.dir, "custodians-"); err != nil {
		r.t.Fatal(err)
	}
	for _, d := range []*tuf.Draft{root, targets} {
		if err := os.WriteFile(filepath.Join(folder, d.Name()), r.bytes(d), 0o600); err != nil {
			r.t.Fatal(err)
		}
	}
	return root, targets, folder
}

func (r *custodianRoom) bytes(d *tuf.Draft) []byte {
	r.t.Helper()
	content, err := d.Bytes()
	if err != nil {
		r.t.Fatal(err)
	}
	return content
}

func (r *custodianRoom) parsed(d *tuf.Draft) *tuf.Root {
	r.t.Helper()
	root, err := tuf.ParseRoot(r.bytes(d))
	if err != nil {
		r.t.Fatal(err)
	}
	return root
}

// signs has a custodian sign the drafts of a folder with the program. It returns
// what the program said and its signatures.
func (r *custodianRoom) signs(id, folder string, args ...string) (string, []tuf.Signature, error) {
	r.t.Helper()
	result := filepath.Join(folder, "..", filepath.Base(folder)+"-"+id+".sig")
	out, err := r.command(append([]string{
		"custodian", "sign", folder, "--module", r.module,
		"--uri", "pkcs11:token=" + id + ";object=tuf", "--pin-file", id + ".pin", "--out", result,
	}, args...)...).CombinedOutput()
	text := strings.Join(strings.Fields(string(out)), " ")
	if err != nil {
		if _, there := os.Stat(result); !errors.Is(there, fs.ErrNotExist) {
			r.t.Errorf("%s was refused, and there is a file: %v", id, there)
		}
		return text, nil, err
	}
	var sigs []tuf.Signature
	for line := range strings.Lines(r.read(result)) {
		sig, err := tuf.ParseSignature([]byte(line))
		if err != nil {
			r.t.Fatal(err)
		}
		sigs = append(sigs, sig)
	}
	return text, sigs, nil
}

// TestCustodianSign: a first root, and one whose custodians change: who stays,
// who joins and who leaves sign with their own tokens; the root takes the
// thresholds of both, the targets those of the new alone.
func TestCustodianSign(t *testing.T) {
	r := newCustodianRoom(t, "c1", "c2", "c3", "c4")
	root1, targets1, folder := r.drafts(nil, "c1", "c2", "c3")
	for _, id := range []string{"c1", "c2"} {
		said, sigs, err := r.signs(id, folder)
		if err != nil || len(sigs) != 2 || !strings.Contains(said, "signs root and targets") {
			t.Fatalf("%s: %d signatures (%v)\n%s", id, len(sigs), err, said)
		}
		if err := errors.Join(root1.Add(sigs[0]), targets1.Add(sigs[1])); err != nil {
			t.Fatalf("%s: %v", id, err)
		}
	}
	if err := errors.Join(root1.Err(), targets1.Err()); err != nil {
		t.Fatal(err)
	}
	inForce := r.write("1.root.json", string(r.bytes(root1)), 0o600)

	// c1 and c2 leave, c4 joins.
	root2, targets2, folder := r.drafts(r.parsed(root1), "c3", "c4")
	for _, row := range []struct {
		id, says          string
		signatures        int
		rootOK, targetsOK bool // after it
	}{
		{"c3", "leaving: 2, joining: 1", 2, false, false},
		{"c4", "joins with root 2", 2, false, true}, // the old threshold is missing
		{"c1", "leaves with root 2, and signs that root for the last time", 1, true, true},
	} {
		said, sigs, err := r.signs(row.id, folder, "--previous", inForce)
		if err != nil || len(sigs) != row.signatures || !strings.Contains(said, row.says) {
			t.Fatalf("%s: %d signatures (%v), want %d and %q\n%s", row.id, len(sigs), err, row.signatures, row.says, said)
		}
		if err := root2.Add(sigs[0]); err != nil {
			t.Fatalf("%s: %v", row.id, err)
		}
		if len(sigs) == 2 {
			if err := targets2.Add(sigs[1]); err != nil {
				t.Fatalf("%s: %v", row.id, err)
			}
		}
		if got := root2.Err() == nil; got != row.rootOK {
			t.Errorf("after %s: root complete %t, want %t", row.id, got, row.rootOK)
		}
		if got := targets2.Err() == nil; got != row.targetsOK {
			t.Errorf("after %s: targets complete %t, want %t", row.id, got, row.targetsOK)
		}
	}

	// After it c1 has no say: neither in root 3 nor in anything else.
	inForce2 := r.write("2.root.json", string(r.bytes(root2)), 0o600)
	_, _, folder3 := r.drafts(r.parsed(root2), "c3", "c4")
	for _, row := range []struct {
		name, id, folder string
		args             []string
		says             string
	}{
		{"who has left", "c1", folder3, []string{"--previous", inForce2}, errCustodian.Error()},
		{"without the root in force", "c2", folder, nil, "hint: --previous"},
		{"with a root that is not in force", "c2", folder, []string{"--previous", inForce2}, "version 2, want 3"},
		{"a first root that follows one", "c1", folder3, []string{"--previous", inForce}, "version 3, want 2"},
		{"another folder", "c1", r.dir, nil, "want 1"},
		{"a root that is none", "c2", folder, []string{"--previous", r.write("bad.json", "{}", 0o600)}, "read root in force"},
	} {
		t.Run(row.name, func(t *testing.T) {
			said, _, err := r.signs(row.id, row.folder, row.args...)
			if err == nil || !strings.Contains(said, row.says) {
				t.Errorf("error %v, want %q in:\n%s", err, row.says, said)
			}
		})
	}
}
