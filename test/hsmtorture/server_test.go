package hsmtorture

import (
	"testing"

	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// TestServerKilled: the token is in another process, behind p11-kit's remoting.
// The whole group of the server is killed under load, so that nothing signs any
// more, which the test proves, and comes back. Nobody restarts anything.
func TestServerKilled(t *testing.T) {
	shim := hsmtest.NewShim(t)
	remote := shim.NewRemote(t)
	r := newRigOn(t, shim, remote.Token)
	r.shim.Delay(int(signTime.Microseconds()))
	r.startLoad()
	for range rounds(2, 25) {
		logins := shim.Logins()
		r.during(&fault{phase: "sign", call: "all", kind: "server killed"}, func() {
			remote.Kill(t)
			r.mustFail()
			signs := shim.Signs()
			r.mustFail()
			if got := shim.Signs(); got != signs {
				t.Errorf("%d signatures were made without a server", got-signs)
			}
			if got := shim.Logins(); got != logins {
				t.Errorf("%d logins without a server", got-logins)
			}
			r.audit()
			r.ledger.killed()
		}, func() { remote.Start(t) })
		if got := shim.Logins() - logins; got != 1 {
			t.Errorf("%d logins after the server's return, want 1", got)
		}
	}
}
