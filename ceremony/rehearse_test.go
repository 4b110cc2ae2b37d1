package ceremony

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// testNow is the clock of tests: the signatures are real, the time is fixed.
var testNow = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func fixedClock() (time.Time, error) { return testNow, nil }

func demoDefinition(t testing.TB) *Definition {
	t.Helper()
	d, err := DemoDefinition(DemoParameters{
		URL: "https://127.0.0.1:8443", Issuers: []string{"https://127.0.0.1:8443/oidc"}, Now: testNow,
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func twoTokens(t testing.TB) map[string]hsm.Token {
	t.Helper()
	return map[string]hsm.Token{DemoRootToken: hsmtest.SoftHSM(t), DemoOnlineToken: hsmtest.SoftHSM(t)}
}

// rehearsed runs a complete ceremony in a fresh folder.
func rehearsed(t testing.TB) (*Definition, *Result, Options) {
	t.Helper()
	d := demoDefinition(t)
	opts := Options{Tokens: twoTokens(t), Dir: filepath.Join(t.TempDir(), "out"), Now: fixedClock}
	res, err := Rehearse(context.Background(), d, opts)
	if err != nil {
		t.Fatal(err)
	}
	return d, res, opts
}

func TestRehearseWritesEverything(t *testing.T) {
	d, res, opts := rehearsed(t)
	for _, name := range append(outputNames(d), TranscriptName) {
		info, err := os.Stat(filepath.Join(opts.Dir, name))
		if err != nil || info.Size() == 0 {
			t.Errorf("output %s: %v", name, err)
		}
	}
	for name, tok := range opts.Tokens {
		want := map[string]int{DemoRootToken: 2, DemoOnlineToken: 4}[name]
		if n, err := tok.Keys(context.Background()); err != nil || n != want {
			t.Errorf("token %s has %d keys (%v), want %d", name, n, err, want)
		}
	}
	for role, k := range res.Keys.Keys {
		if _, err := opts.Tokens[k.Token].Open(context.Background(), k.Ref()); err != nil {
			t.Errorf("open the key of %s as keys.yaml names it: %v", role, err)
		}
	}
	if _, err := Rehearse(context.Background(), d, opts); !errors.Is(err, ErrOutputExists) {
		t.Errorf("second run in the same folder: %v, want ErrOutputExists", err)
	}
}
