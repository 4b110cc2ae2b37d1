package pkcs11_test

import (
	"crypto"
	"errors"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
)

// TestRemoteConformance runs the suite on SoftHSM in another process.
func TestRemoteConformance(t *testing.T) {
	hsmtest.Conformance(t, func(t *testing.T) hsmtest.Device {
		r := hsmtest.NewRemote(t)
		return r.Token.Device(pkcs11.Config{Logger: watchLogs(t, r.Token)}, nil)
	})
}

// TestUnplug kills the device's server and brings it back. First it shows that
// signing fails without it.
func TestUnplug(t *testing.T) {
	r := hsmtest.NewRemote(t)
	token, err := pkcs11.Open(t.Context(), pkcs11.Config{
		Module: r.Token.Module, URI: r.Token.URI, PIN: r.Token.PIN, Logger: watchLogs(t, r.Token),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := token.Close(); err != nil {
			t.Error(err)
		}
	}()
	if wait := token.RetryWait(); wait > 2*time.Second {
		t.Errorf("the caller who finds out would wait for %s, want 2 s at most", wait)
	}
	token.SetRetryWait(time.Millisecond)
	key := hsmtest.NewKey(t, token, "key", hsm.ECDSAP256)
	sign := func() error {
		_, err := key.SignContext(t.Context(), digest[:], crypto.SHA256)
		return err
	}
	r.Kill(t)
	if err := sign(); !errors.Is(err, hsm.ErrLost) && !errors.Is(err, hsm.ErrBusy) {
		t.Fatalf("without the device: error %v, want ErrLost or ErrBusy", err)
	}
	r.Start(t)
	eventually(t, "signing after the device is back", func() bool { return sign() == nil })
}
