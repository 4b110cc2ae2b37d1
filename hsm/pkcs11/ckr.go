package pkcs11

import (
	"errors"
	"fmt"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/miekg/pkcs11"
)

// class says whose fault a return value is, and so what is done about it.
type class int

const (
	// callers: the request cannot be carried out by this token; nothing is
	// wrong with the connection. The error goes to the caller.
	callers class = iota
	// lost: the session, the login or the device is gone. The module is
	// closed and opened again (see supervise.go).
	lost
	// fatal: the PIN. Nothing may try again in this process (exit status 77).
	fatal
	// busy: the token has no room for now. Nothing was done.
	busy
)

// codes is the classification of PKCS#11 return values (PKCS#11 v2.40,
// Section 5.1), with their names, which miekg/pkcs11 does not export. A value
// that is not listed is the caller's and is shown as a number.
var codes = map[uint]struct {
	name  string
	class class
}{
	pkcs11.CKR_HOST_MEMORY:                    {"HOST_MEMORY", busy},
	pkcs11.CKR_SLOT_ID_INVALID:                {"SLOT_ID_INVALID", lost},
	pkcs11.CKR_GENERAL_ERROR:                  {"GENERAL_ERROR", lost},
	pkcs11.CKR_FUNCTION_FAILED:                {"FUNCTION_FAILED", callers},
	pkcs11.CKR_ARGUMENTS_BAD:                  {"ARGUMENTS_BAD", callers},
	0x1B:                                      {"ACTION_PROHIBITED", callers},
	pkcs11.CKR_ATTRIBUTE_READ_ONLY:            {"ATTRIBUTE_READ_ONLY", callers},
	pkcs11.CKR_ATTRIBUTE_SENSITIVE:            {"ATTRIBUTE_SENSITIVE", callers},
	pkcs11.CKR_ATTRIBUTE_TYPE_INVALID:         {"ATTRIBUTE_TYPE_INVALID", callers},
	pkcs11.CKR_ATTRIBUTE_VALUE_INVALID:        {"ATTRIBUTE_VALUE_INVALID", callers},
	pkcs11.CKR_DATA_INVALID:                   {"DATA_INVALID", callers},
	pkcs11.CKR_DATA_LEN_RANGE:                 {"DATA_LEN_RANGE", callers},
	pkcs11.CKR_DEVICE_ERROR:                   {"DEVICE_ERROR", lost},
	pkcs11.CKR_DEVICE_MEMORY:                  {"DEVICE_MEMORY", busy},
	pkcs11.CKR_DEVICE_REMOVED:                 {"DEVICE_REMOVED", lost},
	pkcs11.CKR_FUNCTION_CANCELED:              {"FUNCTION_CANCELED", callers},
	pkcs11.CKR_FUNCTION_NOT_SUPPORTED:         {"FUNCTION_NOT_SUPPORTED", callers},
	pkcs11.CKR_KEY_HANDLE_INVALID:             {"KEY_HANDLE_INVALID", lost},
	pkcs11.CKR_KEY_SIZE_RANGE:                 {"KEY_SIZE_RANGE", callers},
	pkcs11.CKR_KEY_TYPE_INCONSISTENT:          {"KEY_TYPE_INCONSISTENT", callers},
	pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED:     {"KEY_FUNCTION_NOT_PERMITTED", callers},
	pkcs11.CKR_KEY_UNEXTRACTABLE:              {"KEY_UNEXTRACTABLE", callers},
	pkcs11.CKR_MECHANISM_INVALID:              {"MECHANISM_INVALID", callers},
	pkcs11.CKR_MECHANISM_PARAM_INVALID:        {"MECHANISM_PARAM_INVALID", callers},
	pkcs11.CKR_OBJECT_HANDLE_INVALID:          {"OBJECT_HANDLE_INVALID", lost},
	pkcs11.CKR_OPERATION_ACTIVE:               {"OPERATION_ACTIVE", lost},
	pkcs11.CKR_OPERATION_NOT_INITIALIZED:      {"OPERATION_NOT_INITIALIZED", lost},
	pkcs11.CKR_PIN_INCORRECT:                  {"PIN_INCORRECT", fatal},
	pkcs11.CKR_PIN_INVALID:                    {"PIN_INVALID", fatal},
	pkcs11.CKR_PIN_LEN_RANGE:                  {"PIN_LEN_RANGE", fatal},
	pkcs11.CKR_PIN_EXPIRED:                    {"PIN_EXPIRED", fatal},
	pkcs11.CKR_PIN_LOCKED:                     {"PIN_LOCKED", fatal},
	pkcs11.CKR_SESSION_CLOSED:                 {"SESSION_CLOSED", lost},
	pkcs11.CKR_SESSION_COUNT:                  {"SESSION_COUNT", busy},
	pkcs11.CKR_SESSION_HANDLE_INVALID:         {"SESSION_HANDLE_INVALID", lost},
	pkcs11.CKR_SESSION_READ_ONLY:              {"SESSION_READ_ONLY", callers},
	pkcs11.CKR_SIGNATURE_INVALID:              {"SIGNATURE_INVALID", callers},
	pkcs11.CKR_TEMPLATE_INCOMPLETE:            {"TEMPLATE_INCOMPLETE", callers},
	pkcs11.CKR_TEMPLATE_INCONSISTENT:          {"TEMPLATE_INCONSISTENT", callers},
	pkcs11.CKR_TOKEN_NOT_PRESENT:              {"TOKEN_NOT_PRESENT", lost},
	pkcs11.CKR_TOKEN_NOT_RECOGNIZED:           {"TOKEN_NOT_RECOGNIZED", lost},
	pkcs11.CKR_TOKEN_WRITE_PROTECTED:          {"TOKEN_WRITE_PROTECTED", callers},
	pkcs11.CKR_USER_ALREADY_LOGGED_IN:         {"USER_ALREADY_LOGGED_IN", fatal},
	pkcs11.CKR_USER_NOT_LOGGED_IN:             {"USER_NOT_LOGGED_IN", lost},
	pkcs11.CKR_USER_PIN_NOT_INITIALIZED:       {"USER_PIN_NOT_INITIALIZED", fatal},
	pkcs11.CKR_USER_TYPE_INVALID:              {"USER_TYPE_INVALID", fatal},
	pkcs11.CKR_USER_ANOTHER_ALREADY_LOGGED_IN: {"USER_ANOTHER_ALREADY_LOGGED_IN", fatal},
	pkcs11.CKR_USER_TOO_MANY_TYPES:            {"USER_TOO_MANY_TYPES", fatal},
	pkcs11.CKR_RANDOM_NO_RNG:                  {"RANDOM_NO_RNG", callers},
	pkcs11.CKR_BUFFER_TOO_SMALL:               {"BUFFER_TOO_SMALL", callers},
	pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED:       {"CRYPTOKI_NOT_INITIALIZED", lost},
	pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED:   {"CRYPTOKI_ALREADY_INITIALIZED", callers},
}

// codeName gives "CKR_DEVICE_ERROR", or "CKR_0x80000001" for a value that is
// not in the table.
func codeName(code pkcs11.Error) string {
	if c, ok := codes[uint(code)]; ok {
		return "CKR_" + c.name
	}
	return fmt.Sprintf("CKR_%#x", uint(code))
}

// unsupported are the caller's codes that mean that the token cannot do it.
var unsupported = map[pkcs11.Error]bool{
	pkcs11.CKR_MECHANISM_INVALID:      true,
	pkcs11.CKR_FUNCTION_NOT_SUPPORTED: true,
	pkcs11.CKR_KEY_SIZE_RANGE:         true,
	pkcs11.CKR_DATA_LEN_RANGE:         true,
	pkcs11.CKR_TEMPLATE_INCONSISTENT:  true,
	pkcs11.CKR_RANDOM_NO_RNG:          true,
}

// codeError is a return value in our words. It unwraps to the sentinel of
// package hsm and to miekg's number.
type codeError struct {
	code     pkcs11.Error
	sentinel error // nil for a caller's code without one
}

func (e *codeError) Error() string {
	if e.sentinel == nil {
		return codeName(e.code)
	}
	return codeName(e.code) + ": " + e.sentinel.Error()
}

func (e *codeError) Unwrap() []error {
	if e.sentinel == nil {
		return []error{e.code}
	}
	return []error{e.code, e.sentinel}
}

// connection says whether the code is about the connection or the token's
// present state, and not about what was asked.
func (e *codeError) connection() bool { return codes[uint(e.code)].class != callers }

// classify rewrites an error of miekg/pkcs11 or crypto11 by the table. Errors
// without a return value in them, and nil, pass unchanged.
func classify(err error) error {
	var code pkcs11.Error
	var done *codeError
	if err == nil || errors.As(err, &done) || !errors.As(err, &code) {
		return err
	}
	e := &codeError{code: code}
	switch codes[uint(code)].class {
	case lost:
		e.sentinel = hsm.ErrLost
	case fatal:
		e.sentinel = hsm.ErrPIN
	case busy:
		e.sentinel = hsm.ErrBusy
	case callers:
		if unsupported[code] {
			e.sentinel = hsm.ErrUnsupported
		}
	}
	return e
}

// temporary says whether err is worth one more try after a recovery.
func temporary(err error) bool {
	var code *codeError
	return errors.As(err, &code) && errors.Is(err, hsm.ErrLost)
}
