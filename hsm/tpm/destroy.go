package tpm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-tpm/tpm2"
)

var _ hsm.Destroyer = (*Token)(nil)

// Condemn implements hsm.Destroyer. A key at a persistent handle, or in a file
// that says no id, is ErrUnsupported: such a key another tool made, or Persist
// copied; Evict removes a copy.
func (t *Token) Condemn(_ context.Context, k hsm.Key) (hsm.Condemned, error) {
	own, err := t.own(k)
	if err != nil {
		return hsm.Condemned{}, fmt.Errorf("condemn key: %w", err)
	}
	if own.file == nil || own.file.id == nil {
		return hsm.Condemned{}, fmt.Errorf("condemn %s: not a key in a file with an id: %w", own.ref, hsm.ErrUnsupported)
	}
	return hsm.Condemned{
		Token: t.Info().Device(), Label: own.file.label, ID: hex.EncodeToString(own.file.id), SPKI: hex.EncodeToString(own.ref.SPKI[:]),
	}, nil
}

// Destroy implements hsm.Destroyer for a key in a file. Order: evict every copy
// at a persistent handle (TPM2_EvictControl, Part 3, Section 28.5; that needs
// OwnerAuth); flush the loaded key; give the key file a name that is no key's,
// and sync the folder, after which nobody finds the key; remove the creation
// file; overwrite the key file and sync it; remove it and sync the folder; look
// again. From the new name on, a repeated Destroy ends what was begun without
// reading the file. This process signs with the key no more, also where it is
// open.
//
// The overwriting reaches the file's own blocks on media that write in place,
// and no copy: not one that a file system or a flash controller keeps, and not a
// backup. A copy, with this TPM and the authorisation value, is the key still; it
// is useless without any of the two.
// Who wants to be sure of every copy clears the TPM (TPM2_Clear, Part 3, Section
// 24.6), which ends all that is under its storage seed.
//
// Errors beside those of hsm.Destroyer: ErrKeyFile (the file of the label cannot
// be read, so nobody knows whose it is), ErrPIN (OwnerAuth is wrong).
func (t *Token) Destroy(ctx context.Context, c hsm.Condemned) error {
	end, err := t.condemned(c)
	if err != nil {
		return fmt.Errorf("destroy key %.40q: %w", c.Label, err)
	}
	err = t.do(ctx, hsm.ShareRest, true, func(conn *connection) error { return t.destroy(conn, end) })
	if err != nil {
		return fmt.Errorf("destroy key %.40q in %s: %w", c.Label, t.uri, err)
	}
	return nil
}

// condemned is a key at its end.
type condemned struct {
	label string
	id    []byte
	spki  [sha256.Size]byte
}

// condemned reads c.
func (t *Token) condemned(c hsm.Condemned) (condemned, error) {
	if c.Token != t.Info().Device() {
		return condemned{}, fmt.Errorf("condemned in token %.80q: %w", c.Token.Label, hsm.ErrMismatch)
	}
	id, err := hex.DecodeString(c.ID)
	spec := hsm.Spec{Label: c.Label, ID: id, Algorithm: hsm.ECDSAP256}
	if err != nil || hsm.CheckSpec(spec) != nil {
		return condemned{}, fmt.Errorf("label or id %.40q is no key's: %w", c.ID, hsm.ErrMismatch)
	}
	spki, err := hsm.ParseSPKIHash(c.SPKI)
	if err != nil {
		return condemned{}, fmt.Errorf("%w: %w", hsm.ErrMismatch, err)
	}
	return condemned{c.Label, id, spki}, nil
}

// doomedName is what the file of a key is called when it is not a key's any
// more. Who has the name was compared with what was condemned.
func (e condemned) doomedName() string { return fmt.Sprintf(".destroy-%x-%x", e.id, e.spki[:16]) }

// destroy is one attempt. It can be repeated after any error.
func (t *Token) destroy(c *connection, e condemned) error {
	if err := t.doom(c, e); err != nil {
		return err
	}
	if err := t.files.wipe(e.doomedName(), creationOf(e.label)); err != nil {
		return fmt.Errorf("wipe key file: %w", err)
	}
	left, err := t.files.withID(e.id, func(string, error) {})
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("the folder still has it: %w", hsm.ErrPolicy)
	}
	return nil
}

// doom takes the key out of the TPM and its file from among the keys, unless
// that has been done.
func (t *Token) doom(c *connection, e condemned) error {
	_, err := os.Lstat(filepath.Join(t.files.dir, e.doomedName()))
	if err == nil {
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	k, err := t.sentenced(e)
	if err != nil {
		return err
	}
	if err := c.evictCopies(k.public.name); err != nil {
		return err
	}
	t.bury(k.public.name)
	if err := c.drop(string(k.public.name.Buffer)); err != nil {
		return err
	}
	return t.files.rename(fileOf(e.label), e.doomedName())
}

// sentenced finds the one key file with the id, which has the label and the
// public key that were condemned.
func (t *Token) sentenced(e condemned) (*key, error) {
	labels, err := t.files.withID(e.id, func(string, error) {})
	if err != nil {
		return nil, err
	}
	if len(labels) > 1 {
		return nil, fmt.Errorf("%d key files have the id: %w", len(labels), hsm.ErrAmbiguous)
	}
	u := t.uri
	u.label = e.label
	k, err := t.inFile(u) // ErrNotFound, or ErrKeyFile if it cannot be read
	switch {
	case errors.Is(err, hsm.ErrNotFound) && len(labels) == 1:
		return nil, fmt.Errorf("the id is in the file of %s: %w", labels[0], hsm.ErrMismatch)
	case err != nil:
		return nil, err
	case !bytes.Equal(k.file.id, e.id) || k.ref.SPKI != e.spki:
		return nil, fmt.Errorf("the file of the label has another key: %w", hsm.ErrMismatch)
	}
	return k, nil
}

// evictCopies removes the object with this Name from every persistent handle.
func (c *connection) evictCopies(name tpm2.TPM2BName) error {
	for first := tpm2.TPMHandle(tpm2.TPMHTPersistent) << 24; ; {
		handles, err := c.handles(first)
		if err != nil {
			return fmt.Errorf("list persistent handles: %w", err)
		}
		for _, at := range handles {
			// The Name alone: what else is there may be of any kind.
			rsp, err := run(c, tpm2.ReadPublic{ObjectHandle: at})
			if err != nil {
				return fmt.Errorf("read %#x: %w", uint32(at), err)
			}
			if !bytes.Equal(rsp.Name.Buffer, name.Buffer) {
				continue
			}
			delete(c.parents, at)
			if err := c.evictControl(tpm2.NamedHandle{Handle: at, Name: name}, at); err != nil {
				return fmt.Errorf("evict the copy at %#x: %w", uint32(at), err)
			}
		}
		if len(handles) < maxHandles {
			return nil
		}
		first = handles[len(handles)-1] + 1
	}
}

// bury notes that the key with this Name is no more.
func (t *Token) bury(name tpm2.TPM2BName) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.buried == nil {
		t.buried = map[string]bool{}
	}
	t.buried[string(name.Buffer)] = true
}

// alive refuses a key that was destroyed, with hsm.ErrNotFound.
func (t *Token) alive(name tpm2.TPM2BName) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.buried[string(name.Buffer)] {
		return fmt.Errorf("key was destroyed: %w", hsm.ErrNotFound)
	}
	return nil
}

// rename gives a file another name and syncs the folder.
func (f folder) rename(from, to string) error {
	err := os.Rename(filepath.Join(f.dir, from), filepath.Join(f.dir, to))
	return errors.Join(err, syncDir(f.dir))
}

// wipe removes beside, if it is there, and then doomed, after its octets were
// overwritten.
func (f folder) wipe(doomed, beside string) error {
	if err := os.Remove(filepath.Join(f.dir, beside)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	path := filepath.Join(f.dir, doomed)
	if err := overwrite(path); err != nil {
		return err
	}
	return errors.Join(os.Remove(path), syncDir(f.dir))
}

// overwrite replaces the octets of a regular file in place by zeros, and syncs
// it.
func overwrite(path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Size() > maxFile {
		return fmt.Errorf("not a regular file of at most %d octets: %w", maxFile, ErrKeyFile)
	}
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = file.Write(make([]byte, info.Size()))
	return errors.Join(err, file.Sync(), file.Close())
}
