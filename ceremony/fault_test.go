package ceremony

import (
	"context"
	"encoding/hex"
	"errors"
	"path/filepath"
	"testing"
	"time"

	p11 "github.com/miekg/pkcs11"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// A token that is pulled while it makes a key: whether or not the key came
// into being, the resumed ceremony ends with exactly one.
func TestTokenPulled(t *testing.T) {
	for _, tc := range []struct {
		name string
		pull func(*hsmtest.Shim)
		push func(*hsmtest.Shim)
		made bool // the key was
	}{
		{"before the key is made", func(s *hsmtest.Shim) { s.Fail(hsmtest.GenerateKeyPair, p11.CKR_DEVICE_REMOVED, 1) }, nil, false},
		{"after the key is made", func(s *hsmtest.Shim) { s.FailAfter(hsmtest.GenerateKeyPair, p11.CKR_DEVICE_REMOVED, 1) }, nil, true},
		{"and put back later", (*hsmtest.Shim).Remove, (*hsmtest.Shim).PutBack, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			shim := hsmtest.NewShim(t)
			defer shim.Reset()
			tokens := map[string]hsm.Token{
				DemoRootToken:   hsmtest.OpenSoftHSM(t, shim.NewToken(t)),
				DemoOnlineToken: hsmtest.OpenSoftHSM(t, shim.NewToken(t)),
			}
			opts := Options{Tokens: tokens, Dir: filepath.Join(memoryFolder(t), "out"), Now: fixedClock}
			opts.Progress = func(e Event) {
				if e.Step.ID == "key/tsa-root" && !e.Done && !e.Skipped {
					tc.pull(shim)
				}
			}
			d := demoDefinition(t)
			if _, err := Rehearse(t.Context(), d, opts); !errors.Is(err, hsm.ErrLost) {
				t.Fatalf("error %v, want ErrLost", err)
			}
			if tc.push != nil {
				tc.push(shim)
			}
			opts.Resume, opts.Progress = true, nil
			if err := resumeUntilBack(t, d, opts); err != nil {
				t.Fatal(err)
			}
			if err := Verify(opts.Dir).Err(); err != nil {
				t.Error(err)
			}
			if n, err := tokens[DemoRootToken].Keys(t.Context()); err != nil || n != 2 {
				t.Errorf("the token has %d keys (%v), want 2", n, err)
			}
			// One that was not there can be adopted, too: an attempt may make it, and
			// lose the token before it is proved.
			if tc.made && !adopted(t, opts.Dir, "key/tsa-root") {
				t.Error("the key was there, and was not adopted")
			}
		})
	}
}

// resumeUntilBack resumes while the token is being found again.
func resumeUntilBack(t *testing.T, d *Definition, opts Options) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for {
		_, err := Rehearse(t.Context(), d, opts)
		if !errors.Is(err, hsm.ErrLost) && !errors.Is(err, hsm.ErrBusy) {
			return err
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return err
		}
	}
}

func adopted(t *testing.T, dir, step string) bool {
	t.Helper()
	records, err := readTranscriptFile(filepath.Join(dir, TranscriptName))
	if err != nil {
		t.Fatal(err)
	}
	for i := range records {
		if records[i].Step == step && records[i].Type == Done {
			var d keyResult
			if err := records[i].decode(&d); err != nil {
				t.Fatal(err)
			}
			return d.Adopted
		}
	}
	t.Fatalf("no result of %s", step)
	return false
}

// Half a pair in a real token, as a kill inside its key generation leaves it,
// is quarantined: the ceremony says so and can only be aborted.
func TestHalfPair(t *testing.T) {
	d, opts, root := interrupted(t)
	root.generate = nil
	records, err := readTranscriptFile(filepath.Join(opts.Dir, TranscriptName))
	if err != nil {
		t.Fatal(err)
	}
	var intent keyIntent
	if err := records[len(records)-1].decode(&intent); err != nil {
		t.Fatal(err)
	}
	plantPublic(t, root.Info(), intent)
	_, err = Rehearse(t.Context(), d, opts)
	if !errors.Is(err, ErrStopped) || !errors.Is(err, hsm.ErrExists) {
		t.Fatalf("error %v, want ErrStopped and ErrExists", err)
	}
	state, err := ReadStatus(opts.Dir)
	if err != nil || state.Quarantined != "root-g1" {
		t.Errorf("status %+v, %v", state, err)
	}
	if n, err := root.Keys(t.Context()); err != nil || n != 0 {
		t.Errorf("%d private keys (%v), want none", n, err)
	}
}

// plantPublic puts the public half of an announced P-384 key into the token.
func plantPublic(t *testing.T, info hsm.TokenInfo, intent keyIntent) {
	t.Helper()
	id, err := hex.DecodeString(intent.ID)
	if err != nil {
		t.Fatal(err)
	}
	lib := p11.New(info.Module)
	if lib == nil {
		t.Fatal("cannot load the module")
	}
	session, err := lib.OpenSession(info.Slot, p11.CKF_SERIAL_SESSION|p11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lib.CloseSession(session) }()
	p384 := []byte{0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22}
	// DER OCTET STRING of an uncompressed point; SoftHSM does not look at it.
	octets := append([]byte{0x04, 0x61, 0x04}, make([]byte, 96)...)
	if _, err := lib.CreateObject(session, []*p11.Attribute{
		p11.NewAttribute(p11.CKA_CLASS, p11.CKO_PUBLIC_KEY), p11.NewAttribute(p11.CKA_KEY_TYPE, p11.CKK_EC),
		p11.NewAttribute(p11.CKA_TOKEN, true), p11.NewAttribute(p11.CKA_ID, id), p11.NewAttribute(p11.CKA_LABEL, intent.Label),
		p11.NewAttribute(p11.CKA_EC_PARAMS, p384), p11.NewAttribute(p11.CKA_EC_POINT, octets), p11.NewAttribute(p11.CKA_VERIFY, true),
	}); err != nil {
		t.Fatal(err)
	}
}
