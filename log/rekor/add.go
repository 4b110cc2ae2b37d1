package rekor

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"google.golang.org/grpc/codes"

	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/tree"
)

// patience bounds how long one entry waits for its leaf and its head.
const patience = 30 * time.Second

// failure is an error with its gRPC code and HTTP status and the sentence for
// the client. The wrapped error is for our log alone.
type failure struct {
	code    codes.Code
	status  int
	message string
	index   string // x-log-index of a duplicate
	err     error
}

func (f *failure) Error() string {
	if f.err == nil {
		return f.message
	}
	return f.message + ": " + f.err.Error()
}

func (f *failure) Unwrap() error { return f.err }

// classify finds the code and status of an error: the one mapping.
func classify(err error) *failure {
	var f *failure
	var r *refusal
	switch {
	case errors.As(err, &f):
		return f
	case errors.As(err, &r):
		return &failure{codes.InvalidArgument, http.StatusBadRequest, r.Error(), "", err}
	case errors.Is(err, context.Canceled):
		return &failure{codes.Canceled, 499, "the client cancelled the request", "", err}
	case errors.Is(err, context.DeadlineExceeded):
		return &failure{codes.DeadlineExceeded, http.StatusGatewayTimeout, "the log did not answer in time; retry", "", err}
	case errors.Is(err, tree.ErrBusy):
		return &failure{codes.Unavailable, http.StatusServiceUnavailable, "reached max pushback; retry", "", err}
	case errors.Is(err, tree.ErrNotFound):
		return &failure{codes.NotFound, http.StatusNotFound, "not in the log", "", err}
	case errors.Is(err, tree.ErrClosed), errors.Is(err, tree.ErrStorage), errors.Is(err, tree.ErrCorrupt),
		errors.Is(err, head.ErrClosed), errors.Is(err, head.ErrUnavailable), errors.Is(err, head.ErrFork):
		return &failure{codes.Unavailable, http.StatusServiceUnavailable, "the log is not available now; retry", "", err}
	}
	return &failure{codes.Unknown, http.StatusInternalServerError, "failed to integrate entry", "", err}
}

// duplicate is the refusal of an entry that is in the log.
func duplicate(index uint64) error {
	n := strconv.FormatUint(index, 10)
	return &failure{
		code:    codes.AlreadyExists,
		status:  http.StatusConflict,
		message: "an equivalent entry already exists in the transparency log with index " + n,
		index:   n,
	}
}

// receipt proves that a leaf is in the log.
type receipt struct {
	index uint64
	leaf  []byte
	proof []tree.Hash
	head  head.Signed
}

// add logs a checked entry and proves it.
func (l *Log) add(ctx context.Context, e *entry, now time.Time) (*receipt, error) {
	if err := l.admit.admits(e.cert); err != nil {
		return nil, &failure{codes.PermissionDenied, http.StatusForbidden, "this log takes entries only with a certificate of its own authority", "", err}
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := l.cfg.Heads.Err(); errors.Is(err, head.ErrFork) {
		return nil, fmt.Errorf("append entry: %w", err) // it would get no head
	}
	hash := tree.LeafHash(e.leaf)
	stored, existed, err := l.cfg.Tree.Append(ctx, tree.Leaf{Value: e.leaf})
	if err != nil {
		if !errors.Is(err, tree.ErrBusy) {
			l.again.failed(hash, now) // it may be in the log all the same
		}
		return nil, fmt.Errorf("append entry: %w", err)
	}
	if existed && !l.again.allowed(hash, now) {
		return nil, duplicate(stored.Index)
	}
	r, err := l.prove(ctx, stored.Index, hash)
	if err != nil {
		l.again.failed(hash, now)
		return nil, err
	}
	r.leaf = e.leaf
	l.again.answered(hash, now)
	return r, nil
}

// prove waits for a published head that covers index and proves the leaf's
// inclusion in it. The proof is checked before it leaves.
func (l *Log) prove(ctx context.Context, index uint64, hash tree.Hash) (*receipt, error) {
	signed, err := l.cfg.Heads.Await(ctx, index+1)
	if err != nil {
		return nil, fmt.Errorf("await checkpoint: %w", err)
	}
	path, err := l.cfg.Tree.InclusionProof(ctx, index, signed.Size)
	if err != nil {
		return nil, fmt.Errorf("prove entry %d: %w", index, err)
	}
	hashes := make([][]byte, len(path))
	for i := range path {
		hashes[i] = path[i][:]
	}
	if err := proof.VerifyInclusion(rfc6962.DefaultHasher, index, signed.Size, hash[:], hashes, signed.Root[:]); err != nil {
		return nil, fmt.Errorf("check proof of entry %d: %w", index, err)
	}
	return &receipt{index: index, proof: path, head: signed}, nil
}
