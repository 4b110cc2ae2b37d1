package tpm

import (
	"errors"
	"fmt"
	"runtime/debug"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// lostError is the loss of the connection to the TPM or of what we kept in it.
// It is an hsm.ErrLost, and the one error that starts a recovery.
type lostError struct{ cause error }

func (e *lostError) Error() string {
	return "TPM does not answer as it should: " + e.cause.Error()
}

func (e *lostError) Unwrap() []error { return []error{e.cause, hsm.ErrLost} }

// isLost says whether err calls for a new connection.
func isLost(err error) bool {
	var lost *lostError
	return errors.As(err, &lost)
}

// command is a command structure of go-tpm.
type command[R any] interface {
	Execute(tpm transport.TPM, sessions ...tpm2.Session) (*R, error)
}

// run executes cmd and sorts its errors: a response code becomes what classify
// makes of it, and everything else (the device, a response that cannot be read,
// an HMAC that does not fit) a lost connection. A panic in the decoder is a
// response that cannot be read.
func run[R any](tpm transport.TPM, cmd command[R], sessions ...tpm2.Session) (rsp *R, err error) {
	defer func() {
		if p := recover(); p != nil {
			rsp, err = nil, &lostError{fmt.Errorf("%w: decoder panicked: %v\n%s", errMalformed, p, debug.Stack())}
		}
	}()
	rsp, err = cmd.Execute(tpm, sessions...)
	if err != nil {
		return nil, classify(err)
	}
	return rsp, nil
}

// layerMask are the bits of a response code above the TPM's own: the kernel's
// resource manager marks the codes that it made itself there.
const layerMask = 0x00FF0000

// classify gives an error of go-tpm or of a device the hsm error that it means,
// and is the only place that knows the codes (TPM 2.0 Part 2, Section 6.6.3).
func classify(err error) error {
	if err == nil || isLost(err) {
		return err
	}
	var rc tpm2.TPMRC
	if !errors.As(err, &rc) {
		return &lostError{err}
	}
	rc &^= layerMask
	for _, class := range classes {
		for _, code := range class.codes {
			if errors.Is(rc, code) {
				return class.wrap(rc)
			}
		}
	}
	return rc
}

// with wraps a code in an hsm error.
func with(sentinel error) func(tpm2.TPMRC) error {
	return func(rc tpm2.TPMRC) error { return fmt.Errorf("%w: %w", sentinel, rc) }
}

// classes sorts the response codes that mean something to a caller. The others
// are errors of their own name.
var classes = []struct {
	codes []tpm2.TPMRC
	wrap  func(tpm2.TPMRC) error
}{
	{ // The handles and sessions of before are gone, or the TPM is.
		codes: []tpm2.TPMRC{
			tpm2.TPMRCInitialize, tpm2.TPMRCReboot, tpm2.TPMRCFailure, tpm2.TPMRCUpgrade,
			tpm2.TPMRCReferenceH0, tpm2.TPMRCReferenceH1, tpm2.TPMRCReferenceH2, tpm2.TPMRCReferenceH3,
			tpm2.TPMRCReferenceH4, tpm2.TPMRCReferenceH5, tpm2.TPMRCReferenceH6,
			tpm2.TPMRCReferenceS0, tpm2.TPMRCReferenceS1, tpm2.TPMRCReferenceS2, tpm2.TPMRCReferenceS3,
			tpm2.TPMRCReferenceS4, tpm2.TPMRCReferenceS5, tpm2.TPMRCReferenceS6,
			tpm2.TPMRCContextGap, tpm2.TPMRCTooManyContexts, tpm2.TPMRCBadContext,
		},
		wrap: func(rc tpm2.TPMRC) error { return &lostError{rc} },
	},
	{ // An authorisation value is wrong, or guessing has been locked out.
		codes: []tpm2.TPMRC{tpm2.TPMRCAuthFail, tpm2.TPMRCBadAuth, tpm2.TPMRCLockout},
		wrap:  with(hsm.ErrPIN),
	},
	{ // Room was made where it could be; see connection.Send.
		codes: []tpm2.TPMRC{
			tpm2.TPMRCObjectMemory, tpm2.TPMRCSessionMemory, tpm2.TPMRCMemory, tpm2.TPMRCObjectHandles, tpm2.TPMRCSessionHandles,
			tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting, tpm2.TPMRCNVRate, tpm2.TPMRCNVUnavailable, tpm2.TPMRCCanceled,
		},
		wrap: with(hsm.ErrBusy),
	},
	{
		codes: []tpm2.TPMRC{tpm2.TPMRCNVDefined}, // also of a persistent handle
		wrap:  with(hsm.ErrExists),
	},
	{ // The TPM lacks it, or the key is not made for it.
		codes: []tpm2.TPMRC{
			tpm2.TPMRCCommandCode, tpm2.TPMRCDisabled, tpm2.TPMRCCurve, tpm2.TPMRCHash, tpm2.TPMRCScheme,
			tpm2.TPMRCAsymmetric, tpm2.TPMRCSymmetric, tpm2.TPMRCKDF, tpm2.TPMRCKeySize,
		},
		wrap: with(hsm.ErrUnsupported),
	},
}

// patience says what to do with a command that was answered with rc: send it
// again after a pause, after making room, or not at all.
type patience int

const (
	answered patience = iota
	again
	afterRoom
)

// patienceWith returns what the warning rc asks for (TPM 2.0 Part 1,
// Section 39 and Part 2, Section 6.6.3, "TPM_RC_WARN").
func patienceWith(rc tpm2.TPMRC) patience {
	switch rc &^ layerMask {
	case tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting, tpm2.TPMRCNVRate, tpm2.TPMRCNVUnavailable:
		return again
	case tpm2.TPMRCObjectMemory, tpm2.TPMRCMemory, tpm2.TPMRCObjectHandles:
		return afterRoom
	}
	return answered
}
