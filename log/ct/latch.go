package ct

import (
	"context"
	"crypto"
	"errors"
	"fmt"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/head"
)

// latchedKey is the log's key as SCTs use it: while the log is latched
// read-only it promises nothing, because nothing can be kept. The question is
// asked last, before the token.
type latchedKey struct {
	hsm.Key
	heads head.Publication
}

// SignContext implements hsm.Key. Errors: ErrUnavailable with head.ErrFork in a
// latched log, and those of the key.
func (k latchedKey) SignContext(ctx context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if err := k.heads.Err(); errors.Is(err, head.ErrFork) {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return k.Key.SignContext(ctx, digest, opts)
}

// frozenKey stands for the key of a frozen log: it has a public part alone.
type frozenKey struct {
	hsm.Key
	public crypto.PublicKey
}

// Public implements crypto.Signer.
func (k frozenKey) Public() crypto.PublicKey { return k.public }

// SignContext implements hsm.Key. It always fails: ErrUnavailable.
func (k frozenKey) SignContext(context.Context, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, fmt.Errorf("%w: the log is frozen", ErrUnavailable)
}
