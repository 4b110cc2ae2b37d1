package identity

import (
	"compress/gzip"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// wycheproof reads the groups of a file of Project Wycheproof's vectors.
func wycheproof(t *testing.T, name string, groups any) {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", "wycheproof", name+"_test.json.gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	file := struct {
		Groups any `json:"testGroups"`
	}{groups}
	if err := json.NewDecoder(z).Decode(&file); err != nil {
		t.Fatal(err)
	}
}

// TestWycheproofProofs: signatures over a challenge, in every way in which they
// can be wrong.
func TestWycheproofProofs(t *testing.T) {
	for name, want := range map[string]struct{ accepted, refused, weak int }{
		"ecdsa_secp256r1_sha256":    {174, 310, 0},
		"ecdsa_secp384r1_sha384":    {194, 310, 0},
		"ecdsa_secp521r1_sha512":    {232, 310, 0},
		"rsa_signature_2048_sha256": {7, 250, 2}, // the weak keys have e = 3
		"rsa_signature_3072_sha256": {7, 251, 1},
		"rsa_signature_4096_sha256": {7, 251, 0},
		"ed25519":                   {88, 63, 0},
	} {
		var groups []struct {
			Key   string `json:"publicKeyPem"`
			Tests []struct {
				ID              int `json:"tcId"`
				Comment, Result string
				Message         string `json:"msg"`
				Signature       string `json:"sig"`
			}
		}
		wycheproof(t, name, &groups)
		accepted, refused, weak := 0, 0, 0
		for _, g := range groups {
			for _, test := range g.Tests {
				message, err1 := hex.DecodeString(test.Message)
				signature, err2 := hex.DecodeString(test.Signature)
				if err := errors.Join(err1, err2); err != nil {
					t.Fatal(err)
				}
				_, err := ProveKey(g.Key, signature, []string{string(message)})
				// "acceptable" is an RSA padding without its NULL, for which RFC
				// 8017, Section 9.2, note 1 asks.
				switch valid := test.Result == "valid"; {
				case err == nil && valid:
					accepted++
				case errors.Is(err, ErrProof) && !valid:
					refused++
				case errors.Is(err, ErrWeakKey):
					weak++
				default:
					t.Errorf("%s %d (%s): err %v, want %s", name, test.ID, test.Comment, err, test.Result)
				}
			}
		}
		if accepted != want.accepted || refused != want.refused || weak != want.weak {
			t.Errorf("%s: %d accepted, %d refused, %d weak", name, accepted, refused, weak)
		}
	}
}

// TestWycheproofTokens: compact JWS, in every way in which they can be wrong.
// A vector is accepted if its key is one of an issuer's that may verify tokens,
// its header passes and its signature verifies; the payloads are no claims.
func TestWycheproofTokens(t *testing.T) {
	var groups []struct {
		Comment string
		Public  json.RawMessage
		Private json.RawMessage
		Tests   []struct {
			ID              int `json:"tcId"`
			Comment, Result string
			JWS             any
		}
	}
	wycheproof(t, "json_web_signature", &groups)
	var stricter []int
	accepted, refused := 0, 0
	for _, g := range groups {
		key := g.Public
		if key == nil {
			key = g.Private // of HMAC
		}
		for _, test := range g.Tests {
			raw, compact := test.JWS.(string)
			err := errors.New("not compact")
			if compact {
				err = verifyVector(key, raw)
			}
			switch {
			case err == nil && test.Result != "valid":
				t.Errorf("%d (%s, %s) was accepted", test.ID, g.Comment, test.Comment)
			case err == nil:
				accepted++
			case test.Result == "valid":
				stricter = append(stricter, test.ID)
			default:
				refused++
			}
		}
	}
	// Valid vectors that we refuse: keys of HMAC (1, 348, 352, 357 to 377), and
	// keys that name another algorithm than the token (346, 350) or one that
	// does not exist (347 and 351, ES521).
	want := []int{1, 346, 347, 348, 350, 351, 352, 357, 358, 359, 372, 373, 376, 377}
	if d := cmp.Diff(want, stricter); d != "" {
		t.Error(d)
	}
	if accepted != 32 || refused != 355 {
		t.Errorf("%d accepted, %d refused", accepted, refused)
	}
}

// verifyVector takes the steps of Verifier.Verify that look at the form, the
// header and the signature.
func verifyVector(key json.RawMessage, raw string) error {
	keys, err := parseKeys([]byte(`{"keys":[` + string(key) + `]}`))
	if err != nil {
		return err
	}
	if _, err := parseToken(raw); err != nil && !strings.HasSuffix(err.Error(), "payload is not strict JSON") {
		return err
	}
	_, err = candidates(keys).VerifySignature(context.Background(), raw)
	return err
}
