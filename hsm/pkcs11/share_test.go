package pkcs11_test

import (
	"bytes"
	"context"
	"crypto"
	"fmt"
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

// TestHeadWaits: on a slow token that keys of every other share saturate, a
// tree head waits for at most two signatures of others on each session. What
// is counted is what the token made, in its order, from the moment the head is
// in line: the token stands still at that moment.
func TestHeadWaits(t *testing.T) {
	const length, heads, delay = 8, 10, 2000
	for _, sessions := range []int{1, 2} {
		t.Run(fmt.Sprintf("%d sessions", sessions), func(t *testing.T) {
			f := setUp(t, pkcs11.Config{MaxSessions: sessions, MaxQueue: length})
			id := hsmtest.RandomID()
			head := openAs(t, f.open, id, hsm.RoleRekor)
			stop := saturate(t, f, length)
			defer stop()
			f.shim.Delay(delay)
			for range heads {
				f.shim.Hang(hsmtest.Sign)
				eventually(t, "the token to stand still", func() bool { return f.shim.Running() == sessions })
				if _, err := f.shim.Records(); err != nil {
					t.Fatal(err)
				}
				ctx, answer := newWaiting(t.Context()), make(chan error, 1)
				go func() {
					_, err := head.SignContext(ctx, digest[:], crypto.SHA256)
					answer <- err
				}()
				<-ctx.began
				f.shim.Hang(0)
				if err := <-answer; err != nil {
					t.Fatal(err)
				}
				if others := signedBefore(t, f, id); others > 2*sessions {
					t.Errorf("%d signatures of others came first, want at most %d", others, 2*sessions)
				}
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

// signedBefore counts the signatures that the token has recorded before that
// of the key with this id.
func signedBefore(t *testing.T, f fixture, id []byte) int {
	t.Helper()
	records, err := f.shim.Records()
	if err != nil {
		t.Fatal(err)
	}
	others := 0
	for _, r := range records {
		if r.Function != hsmtest.Sign {
			continue
		}
		if bytes.Equal(r.ID, id) {
			return others
		}
		others++
	}
	t.Fatal("the token has not recorded the head's signature")
	return 0
}
