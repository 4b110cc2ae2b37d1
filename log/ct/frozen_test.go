package ct_test

import (
	"crypto/x509"
	"errors"
	"net/http"
	"testing"

	"github.com/chancery-ca/chancery/log/ct"
)

// TestFrozen: a log with a public key alone is read and takes nothing.
func TestFrozen(t *testing.T) {
	f := newFixture(t)
	f.fill(t, 2)
	f.publish(t)
	f.stop(t)
	f.start(t, func(c *ct.Config) { c.Key, c.Frozen = nil, f.key.Public() })
	signed := f.key.Count()
	for _, path := range []string{"/checkpoint", "/ct/v1/get-sth", "/ct/v1/get-roots", "/ct/v1/get-entries?start=0&end=1", "/tile/0/000.p/2"} {
		if resp, body := f.get(t, path); resp.StatusCode != http.StatusOK {
			t.Errorf("%s: %d %s", path, resp.StatusCode, body)
		}
	}
	for _, path := range []string{"/ct/v1/add-pre-chain", "/ct/v1/add-chain"} {
		if resp, body := f.post(t, path, chainBody(t, f.chain(f.leaf(t, poison))...)); resp.StatusCode/100 == 2 {
			t.Errorf("%s: %d %s", path, resp.StatusCode, body)
		}
	}
	if _, err := f.log.Promise(t.Context(), issuerKeyHash(f.issuer), tbs(t, f.leaf(t, poison))); !errors.Is(err, ct.ErrUnavailable) {
		t.Errorf("promise: error %v, want ErrUnavailable", err)
	}
	if n := f.key.Count() - signed; n != 0 || f.tree.Root().Size != 2 {
		t.Errorf("%d signatures, %d leaves", n, f.tree.Root().Size)
	}
	if _, err := ct.New(ct.Config{Tree: f.tree, Heads: f.heads, Key: f.key, Frozen: f.key.Public(), Roots: []*x509.Certificate{f.root}, Origin: testOrigin, Now: wallClock}); err == nil {
		t.Error("a log has a key and is frozen")
	}
}
