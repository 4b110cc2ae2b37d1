//go:build !cgo

package main

import (
	"context"

	"github.com/chancery-ca/chancery/ceremony"
	"github.com/chancery-ca/chancery/hsm"
)

func tokensPossible() error { return errNoCgo }

// openTokens needs cgo: PKCS#11 modules are C libraries. A program without it
// plans and verifies.
func openTokens(context.Context, *ceremony.Definition, string) (map[string]hsm.Token, error) {
	return nil, errNoCgo
}
