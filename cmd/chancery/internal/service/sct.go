package service

import (
	"context"
	"errors"
	"fmt"

	"github.com/chancery-ca/chancery/ca"
	"github.com/chancery-ca/chancery/log/ct"
	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/tree"
)

// sctSource is the CT log as the certificate authority needs it: ca and log do
// not know each other, and neither knows the other's errors.
type sctSource struct{ log *ct.Log }

func (s sctSource) Promise(ctx context.Context, issuerKeyHash [32]byte, tbs []byte) (ca.Promise, error) {
	p, err := s.log.Promise(ctx, issuerKeyHash, tbs)
	if err != nil {
		return nil, passing(err)
	}
	return promise{p}, nil
}

type promise struct{ *ct.Promise }

func (p promise) Commit(ctx context.Context, precert []byte, chain [][]byte) (uint64, error) {
	index, err := p.Promise.Commit(ctx, precert, chain)
	return index, passing(err)
}

// passing tells the authority which of the log's errors will pass: its answer
// is then "try again", not "internal error".
func passing(err error) error {
	switch {
	case errors.Is(err, tree.ErrBusy):
		return fmt.Errorf("%w: %w", ca.ErrBusy, err)
	case errors.Is(err, ct.ErrUnavailable), errors.Is(err, tree.ErrClosed), errors.Is(err, tree.ErrStorage), errors.Is(err, head.ErrFork):
		return fmt.Errorf("%w: %w", ca.ErrUnavailable, err)
	}
	return err
}
