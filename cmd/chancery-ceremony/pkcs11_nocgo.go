//go:build !cgo

package main

import (
	"context"
	"strings"

	"github.com/chancery-ca/chancery/ceremony"
	"github.com/chancery-ca/chancery/hsm"
)

// PKCS#11 modules are C libraries. A program without cgo plans, verifies, signs,
// aborts, and runs ceremonies on TPMs.

func tokensPossible(def *ceremony.Definition) error {
	if needsCgo(def) {
		return errNoCgo
	}
	return nil
}

// needsCgo says whether a definition names a PKCS#11 token.
func needsCgo(def *ceremony.Definition) bool {
	for _, t := range def.Tokens {
		if strings.HasPrefix(t.URI, "pkcs11:") {
			return true
		}
	}
	return def.Environment == ceremony.Rehearsal
}

func openPKCS11(context.Context, string, string, []byte) (hsm.Token, error) { return nil, errNoCgo }

func changePKCS11(context.Context, string, string, []byte, []byte, bool) (bool, error) {
	return false, errNoCgo
}

func inspectPKCS11(context.Context, string, string) (hsm.Inspection, error) {
	return hsm.Inspection{}, errNoCgo
}

func pairPKCS11(context.Context, string, officer, officer) (hsm.Pairing, error) {
	return hsm.Pairing{}, errNoCgo
}

// softTokens cannot be.
type softTokens struct{}

func (*softTokens) make(string, string, []byte, []byte) (string, error) { return "", errNoCgo }
