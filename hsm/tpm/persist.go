package tpm

import (
	"context"
	"fmt"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-tpm/tpm2"
)

// Persist puts a copy of a key in a file at a persistent handle, 0x81000000 to
// 0x817FFFFF, authorised by the owner (TPM2_EvictControl, Part 3, Section 28.5).
// It is for the rescue of a host whose files are in doubt: persistent memory is
// small, and the key file remains the key's place. HandleURI names the copy.
// Errors: ErrExists (the handle is taken), ErrUnsupported (not such a handle),
// ErrPIN (OwnerAuth is wrong), ErrBusy, ErrLost.
func (t *Token) Persist(ctx context.Context, k hsm.Key, handle uint32) error {
	own, err := t.own(k)
	if err != nil {
		return fmt.Errorf("persist: %w", err)
	}
	if own.file == nil || !isPersistent(uint64(handle)) || tpm2.TPMHandle(handle) == srkHandle {
		return fmt.Errorf("persist %s at %#x: not a key in a file, or not a handle for one: %w", own.ref, handle, hsm.ErrUnsupported)
	}
	err = t.do(ctx, hsm.ShareRest, false, func(c *connection) error {
		loaded, err := c.load(own)
		if err != nil {
			return err
		}
		return c.evictControl(tpm2.NamedHandle{Handle: loaded, Name: own.public.name}, tpm2.TPMHandle(handle))
	})
	if err != nil {
		return fmt.Errorf("persist %s at %#x: %w", own.ref, handle, err)
	}
	return nil
}

// Evict removes the key with this Ref from its persistent handle. A handle where
// another object is, also one that is no key of ours, is left alone (ErrMismatch,
// ErrKeyFile). Errors: ErrNotFound, ErrPIN (OwnerAuth is wrong), ErrBusy, ErrLost.
func (t *Token) Evict(ctx context.Context, ref hsm.Ref) error {
	u, err := parseURI(ref.URI)
	if err != nil {
		return fmt.Errorf("evict: %w", err)
	}
	if u.handle == 0 || u.device != t.uri.device {
		return fmt.Errorf("evict %s: names no handle of %s: %w", ref, t.uri, hsm.ErrNotFound)
	}
	err = t.do(ctx, hsm.ShareRest, false, func(c *connection) error {
		k, err := t.atHandle(c, u.handle)
		if err != nil {
			return err
		}
		if k.ref.SPKI != ref.SPKI {
			return hsm.ErrMismatch
		}
		delete(c.parents, k.handle)
		return c.evictControl(tpm2.NamedHandle{Handle: k.handle, Name: k.public.name}, k.handle)
	})
	if err != nil {
		return fmt.Errorf("evict %s: %w", ref, err)
	}
	return nil
}

// evictControl makes a loaded object persistent, or removes a persistent one
// when object is at the handle itself.
func (c *connection) evictControl(object tpm2.NamedHandle, handle tpm2.TPMHandle) error {
	s, err := c.session()
	if err != nil {
		return err
	}
	_, err = run(c, tpm2.EvictControl{
		Auth: tpm2.AuthHandle{
			Handle: tpm2.TPMRHOwner, Name: tpm2.HandleName(tpm2.TPMRHOwner), Auth: s.with(c.cfg.OwnerAuth, plain),
		},
		ObjectHandle:     &object,
		PersistentHandle: handle,
	})
	return err
}
