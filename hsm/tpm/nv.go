package tpm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-tpm/tpm2"
)

// The NV indices that an owner defines for himself (TCG Registry of Reserved TPM
// 2.0 Handles and Localities, Section 2.2.2).
const (
	minIndex = 0x01800000
	maxIndex = 0x01BFFFFF
)

// counterSize is the size of a counter, in octets.
const counterSize = 8

// The attributes of our counters (TPMA_NV, Part 2, Section 13.4): the index is
// read and incremented with its own authValue, which the dictionary-attack
// logic leaves alone, and it is a counter, which can only go up. It is not
// ORDERLY: such a one is kept in RAM and jumps after a power cut.
const (
	nvAuthWrite = 1 << 2
	nvCounter   = 1 << 4 // TPM_NT_COUNTER in bits 7:4
	nvAuthRead  = 1 << 18
	nvNoDA      = 1 << 25
	nvWritten   = 1 << 29

	counterAttributes = nvAuthWrite | nvCounter | nvAuthRead | nvNoDA
)

// Counter is a counter in a TPM's NV memory that only goes up, also over power
// cuts and its own deletion: one that is defined anew begins above every value
// that a counter ever had in this TPM (Part 1, Section 37.2.4.2). Only
// TPM2_Clear begins anew. NV memory wears out: a counter is for events that
// happen some times an hour. It is safe for concurrent use, as its Token is.
type Counter struct {
	token *Token
	index tpm2.NamedHandle
}

// CreateCounter defines a counter at index, 0x01800000 to 0x01BFFFFF
// (TPM2_NV_DefineSpace, Part 3, Section 31.3), authorised by the owner, and
// increments it once, without which it has no value. Its authValue is
// Config.Auth. Errors: ErrExists, ErrUnsupported (not such an index, or no room
// in the TPM), ErrPIN (OwnerAuth is wrong), ErrBusy, ErrLost.
func CreateCounter(ctx context.Context, t *Token, index uint32) (*Counter, error) {
	c := &Counter{token: t, index: tpm2.NamedHandle{Handle: tpm2.TPMHandle(index)}}
	if err := c.create(ctx); err != nil {
		return nil, fmt.Errorf("create counter %#x in %s: %w", index, t.uri, err)
	}
	return c, nil
}

// OpenCounter finds the counter at index and reads it once. What is there must
// be a counter as CreateCounter makes it. Errors: ErrNotFound, ErrMismatch
// (another kind of index, or one whose creation was cut off: delete it),
// ErrPIN (it has another authValue), ErrUnsupported, ErrBusy, ErrLost.
func OpenCounter(ctx context.Context, t *Token, index uint32) (*Counter, error) {
	c := &Counter{token: t, index: tpm2.NamedHandle{Handle: tpm2.TPMHandle(index)}}
	err := c.find(ctx)
	if err == nil {
		_, err = c.Value(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("open counter %#x in %s: %w", index, t.uri, err)
	}
	return c, nil
}

// DeleteCounter removes the counter at index, authorised by the owner
// (TPM2_NV_UndefineSpace, Part 3, Section 31.4), also one whose creation was cut
// off. An index of another kind is left alone (ErrMismatch). Errors:
// ErrNotFound, ErrPIN (OwnerAuth is wrong), ErrUnsupported, ErrBusy, ErrLost.
func DeleteCounter(ctx context.Context, t *Token, index uint32) error {
	err := checkIndex(index)
	if err == nil {
		err = t.do(ctx, hsm.ShareRest, false, func(c *connection) error { return c.undefine(tpm2.TPMHandle(index)) })
	}
	if err != nil {
		return fmt.Errorf("delete counter %#x in %s: %w", index, t.uri, err)
	}
	return nil
}

func checkIndex(index uint32) error {
	if index < minIndex || index > maxIndex {
		return fmt.Errorf("not an owner's NV index, %#x to %#x: %w", minIndex, maxIndex, hsm.ErrUnsupported)
	}
	return nil
}

// Value reads the counter (TPM2_NV_Read, Part 3, Section 31.13). The answer is
// authenticated. Errors: ErrNotFound or ErrMismatch (it was removed or replaced),
// ErrPIN, ErrBusy, ErrLost.
func (c *Counter) Value(ctx context.Context) (uint64, error) {
	var value uint64
	err := c.token.do(ctx, hsm.ShareRest, true, func(conn *connection) (err error) {
		value, err = conn.readCounter(c.index)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("read counter %#x: %w", uint32(c.index.Handle), err)
	}
	return value, nil
}

// Advance adds one (TPM2_NV_Increment, Part 3, Section 31.8) and returns the new
// value. It is never tried twice: after ErrLost, or when ctx ended, it may have
// been done or not, and Value says so. Errors as of Value.
func (c *Counter) Advance(ctx context.Context) (uint64, error) {
	var value uint64
	err := c.token.do(ctx, hsm.ShareRest, false, func(conn *connection) (err error) {
		if err := conn.increment(c.index); err != nil {
			return err
		}
		value, err = conn.readCounter(c.index)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("advance counter %#x: %w", uint32(c.index.Handle), err)
	}
	return value, nil
}

// create defines the index and gives it its first value.
func (c *Counter) create(ctx context.Context) error {
	if err := checkIndex(uint32(c.index.Handle)); err != nil {
		return err
	}
	return c.token.do(ctx, hsm.ShareRest, false, func(conn *connection) error {
		if err := conn.define(c.index.Handle); err != nil {
			return err
		}
		found, err := conn.counterAt(c.index.Handle, false)
		if err != nil {
			return err
		}
		if err := conn.increment(found); err != nil {
			return fmt.Errorf("first increment: %w", err)
		}
		c.index, err = conn.counterAt(c.index.Handle, true)
		return err
	})
}

// find reads the index's public area.
func (c *Counter) find(ctx context.Context) error {
	if err := checkIndex(uint32(c.index.Handle)); err != nil {
		return err
	}
	return c.token.do(ctx, hsm.ShareRest, true, func(conn *connection) (err error) {
		c.index, err = conn.counterAt(c.index.Handle, true)
		return err
	})
}

// define makes a counter's index.
func (c *connection) define(index tpm2.TPMHandle) error {
	s, err := c.session()
	if err != nil {
		return err
	}
	_, err = run(c, tpm2.NVDefineSpace{
		AuthHandle: c.owner(s, in),
		Auth:       tpm2.TPM2BAuth{Buffer: c.cfg.Auth},
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
			NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, DataSize: counterSize,
			Attributes: tpm2.TPMANV{NT: tpm2.TPMNTCounter, AuthWrite: true, AuthRead: true, NoDA: true},
		}),
	})
	switch {
	case errors.Is(err, tpm2.TPMRCNVDefined):
		return fmt.Errorf("%w: %w", hsm.ErrExists, err)
	case errors.Is(err, tpm2.TPMRCNVSpace):
		return fmt.Errorf("no room in the TPM: %w: %w", hsm.ErrUnsupported, err)
	}
	return err
}

// owner authorises a command by the owner, whose first parameter is encrypted
// as e says.
func (c *connection) owner(s *session, e direction) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Name: tpm2.HandleName(tpm2.TPMRHOwner), Auth: s.with(c.cfg.OwnerAuth, e)}
}

// counterAt reads the public area of a counter (TPM2_NV_ReadPublic, Part 3,
// Section 31.6), which has its first value if written is set.
func (c *connection) counterAt(index tpm2.TPMHandle, written bool) (tpm2.NamedHandle, error) {
	area, name, err := c.readNVPublic(index)
	if err != nil {
		return name, err
	}
	// TPMS_NV_PUBLIC: nvIndex, nameAlg, attributes.
	attributes := binary.BigEndian.Uint32(tpm2.Marshal(area)[6:])
	switch {
	case attributes == counterAttributes && area.DataSize == counterSize && written:
		return name, fmt.Errorf("creation was cut off before the first increment: %w", hsm.ErrMismatch)
	case attributes&^nvWritten != counterAttributes, area.DataSize != counterSize, len(area.AuthPolicy.Buffer) > 0:
		return name, fmt.Errorf("not a counter of ours: attributes %#x, want %#x: %w", attributes, counterAttributes|nvWritten, hsm.ErrMismatch)
	}
	return name, nil
}

// readNVPublic reads the public area of an index and its Name, which the area
// must have; hsm.ErrNotFound if nothing is defined there.
func (c *connection) readNVPublic(index tpm2.TPMHandle) (*tpm2.TPMSNVPublic, tpm2.NamedHandle, error) {
	none := tpm2.NamedHandle{Handle: index}
	rsp, err := run(c, tpm2.NVReadPublic{NVIndex: index})
	if errors.Is(err, tpm2.TPMRCHandle) {
		return nil, none, fmt.Errorf("nothing at NV index %#x: %w", uint32(index), hsm.ErrNotFound)
	}
	if err != nil {
		return nil, none, err
	}
	area, err := rsp.NVPublic.Contents()
	if err != nil {
		return nil, none, &lostError{err}
	}
	name, err := tpm2.NVName(area)
	if err != nil || area.NVIndex != index || string(name.Buffer) != string(rsp.NVName.Buffer) {
		return nil, none, &lostError{fmt.Errorf("%w: another NV index, or a Name that does not fit", errMalformed)}
	}
	return area, tpm2.NamedHandle{Handle: index, Name: *name}, nil
}

// increment is one TPM2_NV_Increment.
func (c *connection) increment(index tpm2.NamedHandle) error {
	s, err := c.session()
	if err != nil {
		return err
	}
	_, err = run(c, tpm2.NVIncrement{AuthHandle: c.byIndex(index, s, plain), NVIndex: index})
	return c.counterError(index, err)
}

// readCounter is one TPM2_NV_Read.
func (c *connection) readCounter(index tpm2.NamedHandle) (uint64, error) {
	s, err := c.session()
	if err != nil {
		return 0, err
	}
	rsp, err := run(c, tpm2.NVRead{AuthHandle: c.byIndex(index, s, out), NVIndex: index, Size: counterSize})
	if err != nil {
		return 0, c.counterError(index, err)
	}
	if len(rsp.Data.Buffer) != counterSize {
		return 0, &lostError{fmt.Errorf("%w: %d octets of a counter, want %d", errMalformed, len(rsp.Data.Buffer), counterSize)}
	}
	return binary.BigEndian.Uint64(rsp.Data.Buffer), nil
}

// byIndex authorises a command by the index's own authValue.
func (c *connection) byIndex(index tpm2.NamedHandle, s *session, e direction) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: index.Handle, Name: index.Name, Auth: s.with(c.cfg.Auth, e)}
}

// counterError says what became of an index that a command did not find as it
// was. A Name that is not the TPM's makes a wrong HMAC, as a wrong value does.
func (c *connection) counterError(index tpm2.NamedHandle, err error) error {
	switch {
	case errors.Is(err, tpm2.TPMRCHandle):
		return fmt.Errorf("counter was removed: %w: %w", hsm.ErrNotFound, err)
	case errors.Is(err, hsm.ErrPIN):
		if now, e := c.counterAt(index.Handle, true); e != nil || string(now.Name.Buffer) != string(index.Name.Buffer) {
			return fmt.Errorf("counter was replaced: %w", errors.Join(hsm.ErrMismatch, e))
		}
	}
	return err
}

// undefine removes a counter.
func (c *connection) undefine(index tpm2.TPMHandle) error {
	found, err := c.counterAt(index, false)
	if err != nil {
		return err
	}
	s, err := c.session()
	if err != nil {
		return err
	}
	_, err = run(c, tpm2.NVUndefineSpace{AuthHandle: c.owner(s, plain), NVIndex: found})
	return err
}
