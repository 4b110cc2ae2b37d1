package tpm

import (
	"encoding/binary"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// maxLoaded is how many transient objects a connection has in the TPM at once.
// Three is what every TPM has room for (TPM_PT_HR_TRANSIENT_MIN), and what the
// kernel's resource manager keeps for each open file: a fourth would not be
// refused there but lost.
const maxLoaded = 3

// zero is a handle that names nothing.
const zero = tpm2.TPMHandle(0)

// object is a key that the connection loads when it is wanted. When its slot
// is wanted for another its context is saved outside (TPM2_ContextSave, Part 3,
// Section 28.2), from where it comes back faster than from its blob.
type object struct {
	handle tpm2.TPMHandle // zero while it is not loaded
	saved  *tpm2.TPMSContext
	used   uint64
}

// hold returns the handle of the object called id, which load loads if it is
// new. The handle is good until the next hold or room.
func (c *connection) hold(id string, load func() (tpm2.TPMHandle, error)) (tpm2.TPMHandle, error) {
	o := c.objects[id]
	if o == nil {
		o = &object{}
	}
	c.uses++
	o.used = c.uses
	if o.handle != zero {
		return o.handle, nil
	}
	if err := c.room(1); err != nil {
		return zero, err
	}
	handle, err := c.bring(o, load)
	if err != nil {
		return zero, err
	}
	o.handle = handle
	c.objects[id] = o
	return handle, nil
}

// bring loads an object from its context or, if it has none that the TPM takes,
// by load.
func (c *connection) bring(o *object, load func() (tpm2.TPMHandle, error)) (tpm2.TPMHandle, error) {
	if o.saved == nil {
		return load()
	}
	rsp, err := run(c, tpm2.ContextLoad{Context: *o.saved})
	switch {
	case isLost(err):
		return zero, fmt.Errorf("load context: %w", err)
	case err != nil:
		o.saved = nil
		return load()
	}
	return rsp.LoadedHandle, nil
}

// room leaves n transient slots free of our own objects, 1 ≤ n ≤ maxLoaded, by
// saving those that were used least recently.
func (c *connection) room(n int) error {
	for {
		loaded, oldest := 0, (*object)(nil)
		for _, o := range c.objects {
			if o.handle == zero {
				continue
			}
			loaded++
			if oldest == nil || o.used < oldest.used {
				oldest = o
			}
		}
		if loaded <= maxLoaded-n {
			return nil
		}
		if err := c.evict(oldest); err != nil {
			return err
		}
	}
}

// evict saves an object's context, if that has not been done, and flushes it.
func (c *connection) evict(o *object) error {
	if o.saved == nil {
		rsp, err := run(c, tpm2.ContextSave{SaveHandle: o.handle})
		if err != nil {
			return fmt.Errorf("save context: %w", err)
		}
		o.saved = &rsp.Context
	}
	handle := o.handle
	o.handle = zero
	return c.flush(handle)
}

// evictOne makes room for a command that the TPM had none for, by evicting the
// least recently used object that the command does not name. It says whether
// there was one.
func (c *connection) evictOne(command []byte) bool {
	var oldest *object
	for _, o := range c.objects {
		if o.handle != zero && !names(command, o.handle) && (oldest == nil || o.used < oldest.used) {
			oldest = o
		}
	}
	return oldest != nil && c.evict(oldest) == nil
}

// names says whether one of the first three words after a command's header,
// where its handles are, is handle.
func names(command []byte, handle tpm2.TPMHandle) bool {
	for at := headerSize; at+4 <= len(command) && at < headerSize+12; at += 4 {
		if binary.BigEndian.Uint32(command[at:]) == uint32(handle) {
			return true
		}
	}
	return false
}
