package tpm

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/crypto/cryptobyte"
)

// Lockout is how a TPM answers guessing at authorisation values that it
// protects against that (TPM 2.0 Part 1, Section 19.8). Our keys are not among
// them (noDA), but systemd's credentials and disk keys are.
type Lockout struct {
	// MaxTries is how many wrong values lock, at least 1.
	MaxTries uint32
	// Recovery is after how long one wrong value is forgotten, in whole
	// seconds, at least 1 s: with 0 a TPM would never lock.
	Recovery time.Duration
	// LockoutRecovery is how long the lockout value may not be tried again
	// after it was wrong once, in whole seconds; 0 is until the next restart.
	LockoutRecovery time.Duration
}

// LockoutState is what a TPM says of its lockout.
type LockoutState struct {
	Lockout
	// Failed counts the wrong values that are not forgotten yet.
	Failed uint32
	// Locked says that no protected value can be tried now.
	Locked bool
	// AuthSet says that the lockout value is not empty.
	AuthSet bool
}

// Lockout reads the TPM's lockout parameters and state.
func (t *Token) Lockout(ctx context.Context) (LockoutState, error) {
	var state LockoutState
	err := t.do(ctx, hsm.ShareRest, true, func(c *connection) (err error) {
		state, err = c.lockout()
		return err
	})
	if err != nil {
		return LockoutState{}, fmt.Errorf("read lockout of %s: %w", t.uri, err)
	}
	return state, nil
}

// ReadLockout is Token.Lockout of the TPM at device, an absolute path, without
// keys. Errors: ErrURI, ErrLost.
func ReadLockout(ctx context.Context, device string) (state LockoutState, err error) {
	err = visit(ctx, device, func(c *connection) (err error) {
		state, err = c.lockout()
		return err
	})
	if err != nil {
		return LockoutState{}, fmt.Errorf("read lockout of %.80q: %w", device, err)
	}
	return state, nil
}

func (c *connection) lockout() (LockoutState, error) {
	values, err := c.properties(tpm2.TPMPTPermanent)
	if err != nil {
		return LockoutState{}, err
	}
	seconds := func(p tpm2.TPMPT) time.Duration { return time.Duration(values[p]) * time.Second }
	return LockoutState{
		Lockout: Lockout{
			MaxTries:        values[tpm2.TPMPTMaxAuthFail],
			Recovery:        seconds(tpm2.TPMPTLockoutInterval),
			LockoutRecovery: seconds(tpm2.TPMPTLockoutRecovery),
		},
		Failed:  values[tpm2.TPMPTLockoutCounter],
		AuthSet: values[tpm2.TPMPTPermanent]&(1<<2) != 0,
		Locked:  values[tpm2.TPMPTPermanent]&(1<<9) != 0,
	}, nil
}

// check refuses parameters that would switch the protection off, or that a TPM
// cannot keep.
func (l Lockout) check() error {
	for _, d := range []time.Duration{l.Recovery, l.LockoutRecovery} {
		if d < 0 || d%time.Second != 0 || d/time.Second > 1<<32-1 {
			return fmt.Errorf("%s is not a number of seconds in 32 bits: %w", d, hsm.ErrUnsupported)
		}
	}
	if l.MaxTries == 0 || l.Recovery == 0 {
		return fmt.Errorf("%d tries, one forgotten every %s: no protection: %w", l.MaxTries, l.Recovery, hsm.ErrUnsupported)
	}
	return nil
}

// SetLockout sets the lockout parameters (TPM2_DictionaryAttackParameters, Part
// 3, Section 25.3) and then, if next is not nil, the lockout value
// (TPM2_HierarchyChangeAuth, Section 24.8). current is the present value,
// usually empty on a new TPM: when it is wrong (ErrPIN) the TPM does not take
// another for its LockoutRecovery, so nothing is tried twice. It is for the
// ceremony; no service needs the lockout value.
func (t *Token) SetLockout(ctx context.Context, current []byte, l Lockout, next []byte) error {
	if err := checkLockout(l, next); err != nil {
		return fmt.Errorf("set lockout: %w", err)
	}
	current, next = bytes.Clone(current), bytes.Clone(next) // an abandoned call goes on
	err := t.do(ctx, hsm.ShareRest, false, func(c *connection) error {
		defer func() { clear(current); clear(next) }()
		return c.setLockout(current, l, next)
	})
	if err != nil {
		return fmt.Errorf("set lockout of %s: %w", t.uri, err)
	}
	return nil
}

// SetLockout is Token.SetLockout of the TPM at device, an absolute path, without
// keys. Errors beside those: ErrURI.
func SetLockout(ctx context.Context, device string, current []byte, l Lockout, next []byte) error {
	err := checkLockout(l, next)
	if err == nil {
		err = visit(ctx, device, func(c *connection) error { return c.setLockout(current, l, next) })
	}
	if err != nil {
		return fmt.Errorf("set lockout of %.80q: %w", device, err)
	}
	return nil
}

func checkLockout(l Lockout, next []byte) error {
	if err := l.check(); err != nil {
		return err
	}
	if next != nil && len(next) < minAuth {
		return fmt.Errorf("value of %d octets, want %d or more: %w", len(next), minAuth, hsm.ErrUnsupported)
	}
	return nil
}

func (c *connection) setLockout(current []byte, l Lockout, next []byte) error {
	s, err := c.session()
	if err != nil {
		return err
	}
	if _, err := run(c, dictionaryAttackParameters{Lockout: l, auth: s.with(current, plain)}); err != nil {
		return err
	}
	if next == nil {
		return nil
	}
	_, err = run(c, tpm2.HierarchyChangeAuth{
		AuthHandle: tpm2.AuthHandle{
			Handle: tpm2.TPMRHLockout, Name: tpm2.HandleName(tpm2.TPMRHLockout), Auth: s.changing(current, next),
		},
		NewAuth: tpm2.TPM2BAuth{Buffer: next},
	})
	return err
}

// commandDictionaryAttackParameters is TPM_CC_DictionaryAttackParameters (Part
// 2, Section 6.5.2).
const commandDictionaryAttackParameters = tpm2.TPMCC(0x13A)

// dictionaryAttackParameters is a command that go-tpm lacks.
type dictionaryAttackParameters struct {
	Lockout
	auth tpm2.Session
}

// Execute sends the command and checks the response.
func (d dictionaryAttackParameters) Execute(tpm transport.TPM, _ ...tpm2.Session) (*struct{}, error) {
	parameters := uint32Bytes(d.MaxTries)
	parameters = append(parameters, uint32Bytes(uint32(d.Recovery/time.Second))...)
	parameters = append(parameters, uint32Bytes(uint32(d.LockoutRecovery/time.Second))...)
	return nil, execute(tpm, commandDictionaryAttackParameters, tpm2.TPMRHLockout, d.auth, parameters)
}

// execute sends a command with one handle, whose Name is the handle, and with
// parameters of which none is encrypted, to which the answer is no parameter.
func execute(tpm transport.TPM, cc tpm2.TPMCC, handle tpm2.TPMHandle, s tpm2.Session, parameters []byte) error {
	names := []tpm2.TPM2BName{tpm2.HandleName(handle)}
	if err := s.NewNonceCaller(); err != nil {
		return err
	}
	auth, err := s.Authorize(cc, parameters, nil, names, 0)
	if err != nil {
		return err
	}
	var b cryptobyte.Builder
	area := tpm2.Marshal(*auth)
	b.AddUint16(tagSessions)
	b.AddUint32(uint32(headerSize + 4 + 4 + len(area) + len(parameters)))
	b.AddUint32(uint32(cc))
	b.AddUint32(uint32(handle))
	b.AddUint32(uint32(len(area)))
	b.AddBytes(area)
	b.AddBytes(parameters)
	response, err := tpm.Send(b.BytesOrPanic())
	if err != nil {
		return err
	}
	if rc := tpm2.TPMRC(binary.BigEndian.Uint32(response[6:])); rc != tpm2.TPMRCSuccess {
		return rc
	}
	rest := cryptobyte.String(response[headerSize:])
	var length uint32
	if !rest.ReadUint32(&length) || length != 0 {
		return fmt.Errorf("%w: parameters of %d octets, want none", errMalformed, length)
	}
	answer, err := tpm2.Unmarshal[tpm2.TPMSAuthResponse](rest)
	if err != nil {
		return err
	}
	return s.Validate(tpm2.TPMRCSuccess, cc, nil, names, 0, answer)
}
