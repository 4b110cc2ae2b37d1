package hsmtest

import (
	"fmt"
	"iter"
)

// Function is a PKCS#11 function: its place in CK_FUNCTION_LIST (PKCS#11
// v2.40, pkcs11f.h), counted from 1. The zero Function is none.
type Function uint64

// The functions of PKCS#11 v2.40, without their C_.
const (
	Initialize Function = iota + 1
	Finalize
	GetInfo
	GetFunctionList
	GetSlotList
	GetSlotInfo
	GetTokenInfo
	GetMechanismList
	GetMechanismInfo
	InitToken
	InitPIN
	SetPIN
	OpenSession
	CloseSession
	CloseAllSessions
	GetSessionInfo
	GetOperationState
	SetOperationState
	Login
	Logout
	CreateObject
	CopyObject
	DestroyObject
	GetObjectSize
	GetAttributeValue
	SetAttributeValue
	FindObjectsInit
	FindObjects
	FindObjectsFinal
	EncryptInit
	Encrypt
	EncryptUpdate
	EncryptFinal
	DecryptInit
	Decrypt
	DecryptUpdate
	DecryptFinal
	DigestInit
	Digest
	DigestUpdate
	DigestKey
	DigestFinal
	SignInit
	Sign
	SignUpdate
	SignFinal
	SignRecoverInit
	SignRecover
	VerifyInit
	Verify
	VerifyUpdate
	VerifyFinal
	VerifyRecoverInit
	VerifyRecover
	DigestEncryptUpdate
	DecryptDigestUpdate
	SignEncryptUpdate
	DecryptVerifyUpdate
	GenerateKey
	GenerateKeyPair
	WrapKey
	UnwrapKey
	DeriveKey
	SeedRandom
	GenerateRandom
	GetFunctionStatus
	CancelFunction
	WaitForSlotEvent
)

// Lost is no function: in a Record it says that the shim took every session
// away.
const Lost Function = 101

var functionNames = [...]string{
	"Initialize", "Finalize", "GetInfo", "GetFunctionList", "GetSlotList", "GetSlotInfo", "GetTokenInfo",
	"GetMechanismList", "GetMechanismInfo", "InitToken", "InitPIN", "SetPIN", "OpenSession", "CloseSession",
	"CloseAllSessions", "GetSessionInfo", "GetOperationState", "SetOperationState", "Login", "Logout",
	"CreateObject", "CopyObject", "DestroyObject", "GetObjectSize", "GetAttributeValue", "SetAttributeValue",
	"FindObjectsInit", "FindObjects", "FindObjectsFinal", "EncryptInit", "Encrypt", "EncryptUpdate",
	"EncryptFinal", "DecryptInit", "Decrypt", "DecryptUpdate", "DecryptFinal", "DigestInit", "Digest",
	"DigestUpdate", "DigestKey", "DigestFinal", "SignInit", "Sign", "SignUpdate", "SignFinal",
	"SignRecoverInit", "SignRecover", "VerifyInit", "Verify", "VerifyUpdate", "VerifyFinal",
	"VerifyRecoverInit", "VerifyRecover", "DigestEncryptUpdate", "DecryptDigestUpdate", "SignEncryptUpdate",
	"DecryptVerifyUpdate", "GenerateKey", "GenerateKeyPair", "WrapKey", "UnwrapKey", "DeriveKey", "SeedRandom",
	"GenerateRandom", "GetFunctionStatus", "CancelFunction", "WaitForSlotEvent",
}

// String returns the name with its C_, "lost", or the number of an unknown one.
func (f Function) String() string {
	switch {
	case f >= 1 && int(f) <= len(functionNames):
		return "C_" + functionNames[f-1]
	case f == Lost:
		return "lost"
	}
	return fmt.Sprintf("function %d", uint64(f))
}

// Functions gives every function of the list in its order.
func Functions() iter.Seq[Function] {
	return func(yield func(Function) bool) {
		for f := Initialize; f <= WaitForSlotEvent; f++ {
			if !yield(f) {
				return
			}
		}
	}
}
