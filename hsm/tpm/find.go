package tpm

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-tpm/tpm2"
)

// Open finds the key that ref names, loads it, holds its attributes against the
// role's policy and has it sign once, so that a wrong Config.Auth shows now. Errors beside those of hsm.Token: ErrPIN,
// ErrURI, ErrKeyFile. ErrMismatch is also a key file of another TPM.
func (t *Token) Open(ctx context.Context, ref hsm.Ref, role hsm.Role) (hsm.Key, error) {
	u, err := parseURI(ref.URI)
	if err != nil {
		return nil, fmt.Errorf("open key: %w", err)
	}
	if !u.isKey() {
		return nil, fmt.Errorf("open key: names no key: %w", ErrURI)
	}
	if u.device != t.uri.device || u.handle == 0 && u.dir != t.uri.dir {
		return nil, fmt.Errorf("open key %s: names another token than %s: %w", ref, t.uri, hsm.ErrNotFound)
	}
	k, err := t.resolve(ctx, u, &ref.SPKI, role)
	if err != nil {
		return nil, fmt.Errorf("open key %s: %w", ref, err)
	}
	k.ref = ref
	if _, err := hsm.Prove(ctx, k, time.Now()); err != nil {
		return nil, fmt.Errorf("open key: %w", err)
	}
	return k, nil
}

// Find opens the key in the file with this id. See hsm.Token.
func (t *Token) Find(ctx context.Context, id []byte) (hsm.Key, error) {
	u := t.uri
	u.id = bytes.Clone(id)
	if len(id) == 0 {
		return nil, fmt.Errorf("find key: empty id: %w", hsm.ErrNotFound)
	}
	k, err := t.resolve(ctx, u, nil, hsm.RoleNone)
	if err != nil {
		return nil, fmt.Errorf("find key with id %x in %s: %w", id, t.uri, err)
	}
	return k, nil
}

// resolve looks for the key that u names, with this SPKI hash if it is not nil,
// and loads it.
func (t *Token) resolve(ctx context.Context, u uri, spki *[32]byte, role hsm.Role) (*key, error) {
	var found *key
	err := t.do(ctx, hsm.ShareRest, true, func(c *connection) (err error) {
		if u.handle != 0 {
			found, err = t.atHandle(c, u.handle)
		} else {
			found, err = t.inFile(u)
		}
		if err != nil {
			return err
		}
		found.role = role
		if spki != nil && found.ref.SPKI != *spki {
			return hsm.ErrMismatch
		}
		if _, err = c.load(found); err != nil {
			return err
		}
		if err := found.public.usable(); err != nil {
			return err
		}
		return role.Policy().Check(found.attributes())
	})
	if err != nil {
		return nil, err
	}
	return found, nil
}

// inFile reads the one key file that u names.
func (t *Token) inFile(u uri) (*key, error) {
	label := u.label
	if label == "" {
		labels, err := t.files.withID(u.id, func(label string, err error) {
			t.log.Warn("key file cannot be read", "label", label, "error", err)
		})
		switch {
		case err != nil:
			return nil, err
		case len(labels) == 0:
			return nil, fmt.Errorf("no key file with id %x: %w", u.id, hsm.ErrNotFound)
		case len(labels) > 1:
			return nil, fmt.Errorf("%d key files with id %x: %w", len(labels), u.id, hsm.ErrAmbiguous)
		}
		label = labels[0]
	}
	file, err := t.files.key(label)
	if err != nil {
		return nil, err
	}
	if u.id != nil && !bytes.Equal(file.id, u.id) {
		return nil, fmt.Errorf("id of %s is %x: %w", label, file.id, hsm.ErrNotFound)
	}
	public, err := parsePublic(file.public)
	if err != nil {
		return nil, err
	}
	canonical := t.uri
	canonical.label = label
	return t.newKey(canonical, &key{public: public, file: file})
}

// atHandle reads the key at a persistent handle.
func (t *Token) atHandle(c *connection, handle uint32) (*key, error) {
	at := tpm2.TPMHandle(handle)
	area, _, err := c.readPersistent(at)
	if err != nil {
		return nil, err
	}
	public, err := newPublic(area)
	if err != nil {
		return nil, err
	}
	return t.newKey(uri{device: t.uri.device, handle: handle}, &key{public: public, handle: at})
}

// newKey gives a key its token and its name.
func (t *Token) newKey(u uri, k *key) (*key, error) {
	spki, err := hsm.SPKIHash(k.public.key)
	if err != nil {
		return nil, err
	}
	k.token, k.ref = t, hsm.Ref{URI: u.String(), SPKI: spki}
	return k, nil
}
