package pkcs11_test

import (
	"bytes"
	"context"
	"crypto"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
)

// waiting is a context that says when somebody begins to wait for its end,
// which is when a call is in its line.
type waiting struct {
	context.Context
	once  *sync.Once
	began chan struct{}
}

func newWaiting(ctx context.Context) waiting {
	return waiting{ctx, new(sync.Once), make(chan struct{})}
}

func (w waiting) Done() <-chan struct{} {
	w.once.Do(func() { close(w.began) })
	return w.Context.Done()
}

// TestHeadWaits: on a token that keys of every other share saturate, a tree head
// waits for one signature of others: when the token has made that, the head is
// inside it. The token stands still before and after, so that no thread's pace
// decides what it does.
func TestHeadWaits(t *testing.T) {
	const length, heads = 8, 10
	for _, sessions := range []int{1, 2} {
		t.Run(fmt.Sprintf("%d sessions", sessions), func(t *testing.T) {
			f := setUp(t, pkcs11.Config{MaxSessions: sessions, MaxQueue: length})
			id := hsmtest.RandomID()
			head := openAs(t, f.open, id, hsm.RoleRekor)
			stop := saturate(t, f, length)
			defer stop()
			for range heads {
				f.shim.Hang(hsmtest.Sign)
				eventually(t, "the token to stand still", func() bool { return f.shim.Hanging() == sessions })
				parent, cancel := context.WithCancel(t.Context())
				ctx, answer := newWaiting(parent), make(chan error, 1)
				go func() {
					_, err := head.SignContext(ctx, digest[:], crypto.SHA256)
					answer <- err
				}()
				<-ctx.began
				signed(t, f, id) // what was before
				signs := f.shim.Signs()
				f.shim.Pass()
				eventually(t, "one signature", func() bool { return f.shim.Signs() == signs+1 && f.shim.Hanging() == sessions })
				cancel()
				// ErrBusy is what a caller gets who leaves the line.
				wants(t, f.token, "the head's caller leaves", <-answer, hsm.ErrLost)
				f.shim.Hang(0)
				eventually(t, "the head's signature", func() bool { return signed(t, f, id) })
			}
		})
	}
}

// openAs makes a key with this id and opens it for a role.
func openAs(t *testing.T, token *pkcs11.Token, id []byte, role hsm.Role) hsm.Key {
	t.Helper()
	made, err := token.Generate(t.Context(), hsm.Spec{Label: string(role), ID: id, Algorithm: hsm.ECDSAP256})
	if err != nil {
		t.Fatal(err)
	}
	key, err := token.Open(t.Context(), made.Ref(), role)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// saturate keeps n calls of every share but the heads' at the token until stop
// is called.
func saturate(t *testing.T, f fixture, n int) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for _, role := range []hsm.Role{hsm.RoleCT, hsm.RoleTSA, hsm.RoleTUFOnline} {
		key := openAs(t, f.open, hsmtest.RandomID(), role)
		for range n {
			wg.Go(func() {
				for ctx.Err() == nil {
					if _, err := key.SignContext(ctx, digest[:], crypto.SHA256); err != nil && ctx.Err() == nil {
						t.Error(err)
						return
					}
				}
			})
		}
	}
	return func() { cancel(); wg.Wait() }
}

// signed says whether the key with this id has signed since the last records.
func signed(t *testing.T, f fixture, id []byte) bool {
	t.Helper()
	records, err := f.shim.Records()
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(records, func(r hsmtest.Record) bool {
		return r.Function == hsmtest.Sign && bytes.Equal(r.ID, id)
	})
}
