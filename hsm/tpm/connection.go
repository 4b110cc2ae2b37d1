package tpm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// srkHandle is where the storage key of a machine is kept, if it is (TCG TPM
// v2.0 Provisioning Guidance, Section 7.5.1).
const srkHandle = tpm2.TPMHandle(0x81000001)

// connection is one connection to a TPM and what we have in the TPM: handles of
// it are meaningless to any other. It implements transport.TPM. One goroutine
// uses it at a time.
type connection struct {
	device  device
	cfg     Config
	log     *slog.Logger
	info    hsm.TokenInfo
	srk     tpm2.TPMHandle // srkHandle, or TPM_RH_OWNER: made from srkTemplate
	parents map[tpm2.TPMHandle]*parent
	objects map[string]*object
	uses    uint64   // counts; the last use of an object is its place in time
	salted  *session // nil until it is first needed
}

var _ transport.TPM = (*connection)(nil)

// parent is a storage key.
type parent struct {
	tpm2.NamedHandle // the handle is zero for one that is an object
	public           *tpm2.TPMTPublic
}

// connect opens the TPM, throws leftovers out of an emulator and reads what
// the TPM says of itself, before ctx ends.
func connect(ctx context.Context, cfg Config) (*connection, error) {
	d, err := openDevice(cfg.Device)
	if err != nil {
		return nil, &lostError{err}
	}
	stop := context.AfterFunc(ctx, d.close)
	c := &connection{
		device: d, cfg: cfg, log: cfg.Logger, srk: tpm2.TPMRHOwner,
		parents: map[tpm2.TPMHandle]*parent{}, objects: map[string]*object{},
	}
	err = c.begin()
	if !stop() && err == nil {
		err = &lostError{context.Cause(ctx)}
	}
	if err != nil {
		d.close()
		return nil, err
	}
	return c, nil
}

// begin brings a new connection to where operations can start.
func (c *connection) begin() error {
	if c.device.exclusive() {
		// The kernel does this for a device.
		_, err := tpm2.Startup{StartupType: tpm2.TPMSUClear}.Execute(c)
		if err != nil && !errors.Is(err, tpm2.TPMRCInitialize) {
			return fmt.Errorf("start up: %w", classify(err))
		}
		if err := c.sweep(); err != nil {
			return fmt.Errorf("flush leftovers: %w", err)
		}
	}
	info, err := c.readInfo()
	if err != nil {
		return fmt.Errorf("read properties: %w", err)
	}
	c.info = info
	if _, err := c.persistentParent(srkHandle); err == nil {
		c.srk = srkHandle
	} else if isLost(err) {
		return err
	}
	return nil
}

// Send carries a command to the TPM. It sends it again if the TPM asks for that,
// for half of the deadline, and after making room if our objects fill it. It
// implements transport.TPM.
func (c *connection) Send(command []byte) ([]byte, error) {
	// Later than the queue's watch and the context of connect, which say what
	// has happened better than a failed read does.
	deadline := time.Now().Add(2 * c.cfg.Deadline)
	patient := time.Now().Add(c.cfg.Deadline / 2)
	for pause := time.Millisecond; ; {
		response, err := c.device.exchange(command, deadline)
		if err != nil {
			c.device.close()
			return nil, &lostError{err}
		}
		switch patienceWith(tpm2.TPMRC(binary.BigEndian.Uint32(response[6:]))) {
		case again:
			if time.Until(patient) > pause {
				time.Sleep(pause)
				pause = min(2*pause, 100*time.Millisecond)
				continue
			}
		case afterRoom:
			kept := bytes.Clone(response)
			if c.evictOne(command) {
				continue
			}
			return kept, nil
		}
		return bytes.Clone(response), nil
	}
}

// close flushes what is ours and ends the connection.
func (c *connection) close() {
	for _, o := range c.objects {
		if o.handle != zero {
			_ = c.flush(o.handle)
		}
	}
	if c.salted != nil {
		_ = c.flush(c.salted.handle)
	}
	c.device.close()
}

// flush removes a transient object or a session (TPM2_FlushContext, Part 3,
// Section 28.4).
func (c *connection) flush(handle tpm2.TPMHandle) error {
	_, err := run(c, tpm2.FlushContext{FlushHandle: handle})
	return err
}

// sweep flushes every transient object and session. Nobody else is connected,
// so they are what a process left that was killed.
func (c *connection) sweep() error {
	for _, class := range []tpm2.TPMHandle{tpm2.TPMHandle(tpm2.TPMHTTransient) << 24, 0x02000000, 0x03000000} {
		handles, err := c.handles(class)
		if err != nil {
			return err
		}
		for _, handle := range handles {
			if err := c.flush(handle); err != nil {
				return err
			}
		}
		if len(handles) > 0 {
			c.log.Warn("flushed leftovers from the emulator", "class", fmt.Sprintf("%#x", uint32(class)), "count", len(handles))
		}
	}
	return nil
}

// maxHandles is how many handles one question is answered with.
const maxHandles = 64

// handles lists the handles from first on in its class, at most maxHandles.
func (c *connection) handles(first tpm2.TPMHandle) ([]tpm2.TPMHandle, error) {
	rsp, err := run(c, tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: uint32(first), PropertyCount: maxHandles})
	if err != nil {
		return nil, err
	}
	list, err := rsp.CapabilityData.Data.Handles()
	if err != nil {
		return nil, &lostError{err}
	}
	return list.Handle, nil
}

// property reads properties from first on, at most 64.
func (c *connection) properties(first tpm2.TPMPT) (map[tpm2.TPMPT]uint32, error) {
	rsp, err := run(c, tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(first), PropertyCount: 64})
	if err != nil {
		return nil, err
	}
	list, err := rsp.CapabilityData.Data.TPMProperties()
	if err != nil {
		return nil, &lostError{err}
	}
	values := map[tpm2.TPMPT]uint32{}
	for _, p := range list.TPMProperty {
		values[p.Property] = p.Value
	}
	return values, nil
}

// readInfo reads what the TPM says of itself (Part 2, Section 6.13).
func (c *connection) readInfo() (hsm.TokenInfo, error) {
	fixed, err := c.properties(tpm2.TPMPTFamilyIndicator)
	if err != nil {
		return hsm.TokenInfo{}, err
	}
	variable, err := c.properties(tpm2.TPMPTPermanent)
	if err != nil {
		return hsm.TokenInfo{}, err
	}
	text := func(properties ...tpm2.TPMPT) string {
		var b strings.Builder
		for _, p := range properties {
			b.Write(bytes.TrimRight(uint32Bytes(fixed[p]), "\x00"))
		}
		return strings.TrimSpace(strings.ToValidUTF8(b.String(), "?"))
	}
	v1, v2 := fixed[tpm2.TPMPTFirmwareVersion1], fixed[tpm2.TPMPTFirmwareVersion2]
	revision := fixed[tpm2.TPMPTRevision]
	return hsm.TokenInfo{
		Label:        c.cfg.Dir,
		Manufacturer: text(tpm2.TPMPTManufacturer),
		Model:        text(tpm2.TPMPTVendorString1, tpm2.TPMPTVendorString2, tpm2.TPMPTVendorString3, tpm2.TPMPTVendorString4),
		Firmware:     fmt.Sprintf("%d.%d.%d.%d", v1>>16, v1&0xFFFF, v2>>16, v2&0xFFFF),
		Hardware:     fmt.Sprintf("TPM %s revision %d.%02d", text(tpm2.TPMPTFamilyIndicator), revision/100, revision%100),
		Flags:        permanentFlags(variable[tpm2.TPMPTPermanent]),
	}, nil
}

// permanentFlags names the set bits of TPMA_PERMANENT (Part 2, Section 8.6).
func permanentFlags(bits uint32) []string {
	var flags []string
	for _, flag := range []struct {
		bit  int
		name string
	}{
		{0, "ownerAuthSet"}, {1, "endorsementAuthSet"}, {2, "lockoutAuthSet"},
		{8, "disableClear"}, {9, "inLockout"}, {10, "tpmGeneratedEPS"},
	} {
		if bits&(1<<flag.bit) != 0 {
			flags = append(flags, flag.name)
		}
	}
	return flags
}

// session returns the connection's salted session.
func (c *connection) session() (*session, error) {
	if c.salted != nil {
		return c.salted, nil
	}
	p, err := c.parent(c.srk)
	if err != nil {
		return nil, err
	}
	s, err := startSession(c, &p)
	if err != nil {
		return nil, err
	}
	c.salted = s
	return s, nil
}

// parent returns a storage key with a handle that is good for the next command:
// the one at a persistent handle, or for TPM_RH_OWNER the one made from
// srkTemplate.
func (c *connection) parent(handle tpm2.TPMHandle) (parent, error) {
	if handle != tpm2.TPMRHOwner {
		return c.persistentParent(handle)
	}
	var made *tpm2.CreatePrimaryResponse
	loaded, err := c.hold("owner", func() (tpm2.TPMHandle, error) {
		rsp, err := c.createSRK()
		if err != nil {
			return zero, err
		}
		made = rsp
		return rsp.ObjectHandle, nil
	})
	if err != nil {
		return parent{}, fmt.Errorf("make storage key: %w", err)
	}
	if made != nil {
		public, err := made.OutPublic.Contents()
		if err != nil || !isSRK(public) {
			return parent{}, &lostError{fmt.Errorf("%w: another storage key than asked for", errMalformed)}
		}
		name, err := tpm2.ObjectName(public)
		if err != nil {
			return parent{}, &lostError{err}
		}
		c.parents[handle] = &parent{tpm2.NamedHandle{Name: *name}, public}
	}
	p := *c.parents[handle]
	p.Handle = loaded
	return p, nil
}

// createSRK makes the storage key, authorised by the owner without showing the
// value. There is no storage key yet to which a session could be salted.
func (c *connection) createSRK() (*tpm2.CreatePrimaryResponse, error) {
	s, err := startSession(c, nil)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.flush(s.handle) }()
	return run(c, tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{
			Handle: tpm2.TPMRHOwner, Name: tpm2.HandleName(tpm2.TPMRHOwner), Auth: s.with(c.cfg.OwnerAuth, plain),
		},
		InPublic: tpm2.New2B(srkTemplate()),
	})
}

// persistentParent looks at a persistent handle once and returns the storage
// key there; hsm.ErrNotFound if there is none.
func (c *connection) persistentParent(handle tpm2.TPMHandle) (parent, error) {
	if p := c.parents[handle]; p != nil {
		return *p, nil
	}
	area, name, err := c.readPersistent(handle)
	if err != nil {
		return parent{}, err
	}
	if !isSRK(area) {
		return parent{}, fmt.Errorf("what is at %#x is no storage key of ours: %w", uint32(handle), hsm.ErrNotFound)
	}
	p := &parent{tpm2.NamedHandle{Handle: handle, Name: name}, area}
	c.parents[handle] = p
	return *p, nil
}

// readPersistent reads what is at a persistent handle (TPM2_ReadPublic, Part 3,
// Section 12.4); hsm.ErrNotFound if nothing is.
func (c *connection) readPersistent(handle tpm2.TPMHandle) (*tpm2.TPMTPublic, tpm2.TPM2BName, error) {
	rsp, err := run(c, tpm2.ReadPublic{ObjectHandle: handle})
	if errors.Is(err, tpm2.TPMRCHandle) {
		return nil, tpm2.TPM2BName{}, fmt.Errorf("nothing at %#x: %w", uint32(handle), hsm.ErrNotFound)
	}
	if err != nil {
		return nil, tpm2.TPM2BName{}, err
	}
	area, err := rsp.OutPublic.Contents()
	if err != nil {
		return nil, tpm2.TPM2BName{}, &lostError{err}
	}
	name, err := tpm2.ObjectName(area)
	if err != nil || !bytes.Equal(name.Buffer, rsp.Name.Buffer) {
		return nil, tpm2.TPM2BName{}, &lostError{fmt.Errorf("%w: a Name that does not fit", errMalformed)}
	}
	return area, *name, nil
}

// random reads n octets, encrypted.
func (c *connection) random(n int) ([]byte, error) {
	s, err := c.session()
	if err != nil {
		return nil, err
	}
	random := make([]byte, 0, n)
	for len(random) < n {
		// A TPM gives no more than its largest digest at a time.
		want := min(n-len(random), 32)
		rsp, err := run(c, tpm2.GetRandom{BytesRequested: uint16(want)}, s.with(nil, out))
		if err != nil {
			return nil, err
		}
		got := rsp.RandomBytes.Buffer
		if len(got) == 0 || len(got) > want {
			return nil, &lostError{fmt.Errorf("%w: %d random octets, want %d", errMalformed, len(got), want)}
		}
		random = append(random, got...)
	}
	return random, nil
}
