package identity

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/sigstore/fulcio/pkg/certificate"
	"go.uber.org/goleak"

	"github.com/chancery-ca/chancery/ca/identity/oidctest"
	"github.com/chancery-ca/chancery/ca/internal/idptest"
	"github.com/chancery-ca/chancery/ca/profile"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// noon is when every token of these tests is used.
var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func atNoon() (time.Time, error) { return noon, nil }

// idp is a provider on loopback, and how often its keys were fetched.
type idp struct {
	*oidctest.Provider
	key     *rsa.PrivateKey
	fetches atomic.Int64
}

func startIDP(t *testing.T) *idp {
	t.Helper()
	i := &idp{key: idptest.Key(t)}
	i.Provider = idptest.Serve(t, noon, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/jwks" {
				i.fetches.Add(1)
			}
			next.ServeHTTP(w, r)
		})
	})
	return i
}

func newVerifier(t *testing.T, issuers ...Issuer) *Verifier {
	t.Helper()
	cfg := Config{OIDCIssuers: map[string]Issuer{}}
	for _, i := range issuers {
		cfg.OIDCIssuers[i.IssuerURL] = i
	}
	v, err := New(t.Context(), cfg, Options{Now: atNoon, LoopbackHTTP: true, wait: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.Close)
	for _, s := range v.issuers {
		s.keys.bucket.SetLimit(0) // what is counted is not refilled on a slow day
	}
	return v
}

func (i *idp) email() Issuer {
	return Issuer{IssuerURL: i.Issuer(), ClientID: "sigstore", Type: "email"}
}

func (i *idp) token(t *testing.T, claims map[string]any) string {
	t.Helper()
	raw, err := i.Token(claims)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// forge makes a compact JWS by hand: any header, any signature.
func forge(t *testing.T, header, claims any, sign func(input string) []byte) string {
	t.Helper()
	part := func(v any) string {
		b, ok := v.([]byte)
		if !ok {
			var err error
			if b, err = json.Marshal(v); err != nil {
				t.Fatal(err)
			}
		}
		return base64.RawURLEncoding.EncodeToString(b)
	}
	input := part(header) + "." + part(claims)
	return input + "." + part(sign(input))
}

func rs256(t *testing.T, key *rsa.PrivateKey) func(string) []byte {
	return func(input string) []byte {
		digest := sha256.Sum256([]byte(input))
		sig, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, digest[:])
		if err != nil {
			t.Fatal(err)
		}
		return sig
	}
}

func TestVerifyEmail(t *testing.T) {
	i := startIDP(t)
	raw := i.token(t, nil)
	got, err := newVerifier(t, i.email()).Verify(t.Context(), raw)
	if err != nil {
		t.Fatal(err)
	}
	want := &Principal{
		Token:      TokenUse{ID: sha256.Sum256([]byte(raw[:strings.LastIndexByte(raw, '.')])), Expires: got.Token.Expires},
		SAN:        profile.SAN{Type: profile.Email, Value: "alice@example.com"},
		Extensions: certificate.Extensions{Issuer: i.Issuer(), Subject: "alice-id"},
		Challenges: []string{"alice@example.com"},
		Issuer:     i.Issuer(), Subject: "alice-id",
	}
	if d := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Principal{})); d != "" {
		t.Error(d)
	}
}

func TestVerifyVariants(t *testing.T) {
	i := startIDP(t)
	with := func(change func(*Issuer)) Issuer {
		issuer := i.email()
		change(&issuer)
		return issuer
	}
	for _, test := range []struct {
		name       string
		issuer     Issuer
		claims     map[string]any
		wantIssuer string
		challenges []string
	}{
		{"email_verified as a string", i.email(), map[string]any{"email_verified": "true"}, i.Issuer(), []string{"alice@example.com"}},
		{"email_verified as Python writes it", i.email(), map[string]any{"email_verified": "True"}, i.Issuer(), []string{"alice@example.com"}},
		{"several audiences", i.email(), map[string]any{"aud": []string{"other", "sigstore"}}, i.Issuer(), []string{"alice@example.com"}},
		{"fractional times", i.email(), map[string]any{"exp": float64(noon.Unix()) + 60.5}, i.Issuer(), []string{"alice@example.com"}},
		{"no time of issue", i.email(), map[string]any{"iat": nil}, i.Issuer(), []string{"alice@example.com"}},
		{"nbf within the leeway", i.email(), map[string]any{"nbf": noon.Add(4 * time.Minute).Unix()}, i.Issuer(), []string{"alice@example.com"}},
		{"unverified, and the issuer is trusted to verify", with(func(i *Issuer) { i.SkipEmailVerification = true }),
			map[string]any{"email_verified": nil}, i.Issuer(), []string{"alice@example.com"}},
		{"federated issuer", with(func(i *Issuer) { i.IssuerClaim = "$.federated_claims.connector_id" }),
			map[string]any{"federated_claims": map[string]any{"connector_id": "https://up.example"}}, "https://up.example", []string{"alice@example.com"}},
		{"challenge by subject", with(func(i *Issuer) { i.ChallengeClaim = "sub" }), nil, i.Issuer(), []string{"alice@example.com", "alice-id"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := newVerifier(t, test.issuer).Verify(t.Context(), i.token(t, test.claims))
			if err != nil {
				t.Fatal(err)
			}
			if got.Extensions.Issuer != test.wantIssuer {
				t.Errorf("issuer %q, want %q", got.Extensions.Issuer, test.wantIssuer)
			}
			if d := cmp.Diff(test.challenges, got.Challenges); d != "" {
				t.Error(d)
			}
		})
	}
}

// TestVerifyAlgorithms: every algorithm of the allow list that the provider
// advertises works, by a library's signature.
func TestVerifyAlgorithms(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string]any{}
	for alg, curve := range map[string]elliptic.Curve{"ES256": elliptic.P256(), "ES384": elliptic.P384(), "ES512": elliptic.P521()} {
		if keys[alg], err = ecdsa.GenerateKey(curve, rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	for _, alg := range []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"} {
		keys[alg] = rsaKey
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	keys["EdDSA"] = ed

	var set jose.JSONWebKeySet
	for alg, key := range keys {
		private := jose.JSONWebKey{Key: key, KeyID: alg, Algorithm: alg, Use: "sig"}
		set.Keys = append(set.Keys, private.Public())
	}
	p := serveProvider(t, hostile{algorithms: algorithms, keys: set})
	v := newVerifier(t, Issuer{IssuerURL: p, ClientID: "sigstore", Type: "email"})
	for _, alg := range algorithms {
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(alg),
			Key: jose.JSONWebKey{Key: keys[alg], KeyID: alg}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		jws, err := signer.Sign([]byte(validClaims(p)))
		if err != nil {
			t.Fatal(err)
		}
		raw, err := jws.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := v.Verify(t.Context(), raw); err != nil {
			t.Errorf("%s: %v", alg, err)
		}
	}
}

// TestAlgorithmOfTheKey: RS256 and PS256 of one RSA key are two algorithms; a
// key published for one does not verify the other.
func TestAlgorithmOfTheKey(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k", Algorithm: "PS256"}}}
	p := serveProvider(t, hostile{algorithms: []string{"RS256", "PS256"}, keys: set})
	v := newVerifier(t, Issuer{IssuerURL: p, ClientID: "sigstore", Type: "email"})
	raw := forge(t, map[string]any{"alg": "RS256", "kid": "k"}, []byte(validClaims(p)), rs256(t, key))
	wantRefusal(t, v, raw, "signature does not verify")
}

func validClaims(issuer string) string {
	b, err := json.Marshal(map[string]any{
		"iss": issuer, "sub": "s", "aud": "sigstore", "email": "a@example.com", "email_verified": true,
		"iat": noon.Unix(), "exp": noon.Add(time.Minute).Unix(),
	})
	if err != nil {
		panic(err) // constant input
	}
	return string(b)
}

func wantRefusal(t *testing.T, v *Verifier, raw, reason string) {
	t.Helper()
	_, err := v.Verify(t.Context(), raw)
	if !errors.Is(err, ErrToken) {
		t.Fatalf("err %v, want ErrToken", err)
	}
	if want := ErrToken.Error() + ": " + reason; err.Error() != want {
		t.Errorf("err %q, want %q", err, want)
	}
}

func TestTokenRefusals(t *testing.T) {
	i := startIDP(t)
	v := newVerifier(t, i.email())
	other, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	kid := i.JWKS().Keys[0].KeyID
	good := i.Claims(nil)
	token := func(claims map[string]any) string { return i.token(t, claims) }
	payload := func(json string) string {
		raw, err := i.Sign([]byte(json))
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	header := func(h map[string]any) string { return forge(t, h, good, rs256(t, i.key)) }
	spki, err := x509.MarshalPKIXPublicKey(i.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	hs256 := func(secret []byte) string {
		return forge(t, map[string]any{"alg": "HS256", "kid": kid}, good, func(input string) []byte {
			mac := hmac.New(sha256.New, secret)
			mac.Write([]byte(input))
			return mac.Sum(nil)
		})
	}
	valid := token(nil)
	parts := strings.Split(valid, ".")
	base := validClaims(i.Issuer())

	for _, test := range []struct{ name, raw, reason string }{
		{"none", "", "no token"},
		{"1 MiB long", strings.Repeat("a.", 1<<19), "token is too long"},
		{"one octet too long", valid + strings.Repeat("A", maxToken+1-len(valid)), "token is too long"},
		{"two parts", parts[0] + "." + parts[1], "token is not a signed compact JWS"},
		{"four parts", valid + ".x", "token is not a signed compact JWS"},
		{"empty signature", parts[0] + "." + parts[1] + ".", "token is not a signed compact JWS"},
		{"JSON serialisation", `{"payload":"","protected":"","signature":""}`, "token is not a signed compact JWS"},
		{"padded base64", parts[0] + "=." + parts[1] + "." + parts[2], "header is not strict JSON"},
		{"line break in base64", parts[0] + "." + parts[1] + "\n." + parts[2], "token is not a signed compact JWS"},

		{"alg none", forge(t, map[string]any{"alg": "none"}, good, func(string) []byte { return []byte{1} }), "signature algorithm is not allowed"},
		{"alg None in other case", forge(t, map[string]any{"alg": "nOnE"}, good, func(string) []byte { return []byte{1} }), "signature algorithm is not allowed"},
		{"HS256 under the public key in PEM", hs256(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki})), "signature algorithm is not allowed"},
		{"HS256 under the public key in DER", hs256(spki), "signature algorithm is not allowed"},
		{"HS256 under the modulus", hs256(i.key.N.Bytes()), "signature algorithm is not allowed"},
		{"ES256 under an RSA key", forge(t, map[string]any{"alg": "ES256", "kid": kid}, good, rs256(t, i.key)), "signature algorithm is not the issuer's"},
		{"alg missing", header(map[string]any{"kid": kid}), "signature algorithm is not allowed"},
		{"alg not a string", header(map[string]any{"alg": []string{"RS256"}, "kid": kid}), "signature algorithm is not allowed"},
		{"alg twice", forge(t, []byte(`{"alg":"RS256","alg":"none"}`), good, rs256(t, i.key)), "header is not strict JSON"},
		{"crit", header(map[string]any{"alg": "RS256", "kid": kid, "crit": []string{"b64"}, "b64": false}), "header has critical extensions"},
		{"logout token", header(map[string]any{"alg": "RS256", "kid": kid, "typ": "logout+jwt"}), "header names another kind of token"},
		{"access token", header(map[string]any{"alg": "RS256", "kid": kid, "typ": "application/AT+JWT"}), "header names another kind of token"},
		{"crit that is null", forge(t, []byte(`{"alg":"RS256","crit":null}`), good, rs256(t, i.key)), "header has critical extensions"},
		{"header not JSON", forge(t, []byte("alg"), good, rs256(t, i.key)), "header is not strict JSON"},

		{"another key under a known kid", forge(t, map[string]any{"alg": "RS256", "kid": kid}, good, rs256(t, other)), "signature does not verify"},
		{"jwk in the header", forge(t, map[string]any{"alg": "RS256", "kid": kid, "jwk": jose.JSONWebKey{Key: other.Public(), KeyID: kid}}, good, rs256(t, other)), "signature does not verify"},
		{"jku in the header", forge(t, map[string]any{"alg": "RS256", "kid": kid, "jku": i.Issuer() + "/jwks"}, good, rs256(t, other)), "signature does not verify"},
		{"x5u in the header", forge(t, map[string]any{"alg": "RS256", "kid": kid, "x5u": i.Issuer()}, good, rs256(t, other)), "signature does not verify"},
		{"claims changed after signing", parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(base)) + "." + parts[2], "signature does not verify"},
		{"signature cut", valid[:len(valid)-8], "signature does not verify"},
		{"no kid, another key", forge(t, map[string]any{"alg": "RS256"}, good, rs256(t, other)), "signature does not verify"},

		{"unknown issuer", token(map[string]any{"iss": "https://unknown.example"}), "issuer is not configured"},
		{"issuer in other case", token(map[string]any{"iss": strings.ToUpper(i.Issuer())}), "issuer is not configured"},
		{"issuer with a slash", token(map[string]any{"iss": i.Issuer() + "/"}), "issuer is not configured"},
		{"issuer not a string", token(map[string]any{"iss": []string{i.Issuer()}}), "issuer is not configured"},
		{"no issuer", token(map[string]any{"iss": nil}), "issuer is not configured"},
		{"ISS for iss", token(map[string]any{"iss": nil, "ISS": i.Issuer()}), "issuer is not configured"},
		{"iss and ISS", payload(strings.TrimSuffix(base, "}") + `,"ISS":"https://unknown.example"}`), "signature does not verify"},

		{"expired", token(map[string]any{"exp": noon.Add(-time.Second).Unix()}), "token has expired or never does"},
		{"expires now", token(map[string]any{"exp": noon.Unix()}), "token has expired or never does"},
		{"no expiry", token(map[string]any{"exp": nil}), "token has expired or never does"},
		{"expiry as a string", token(map[string]any{"exp": "1900000000"}), "token has expired or never does"},
		{"expiry beyond all times", payload(strings.Replace(base, `"exp":`, `"exp":1e400,"old":`, 1)), "payload is not strict JSON"},
		{"expiry after year 9999", token(map[string]any{"exp": 1e15}), "token has expired or never does"},
		{"future nbf", token(map[string]any{"nbf": noon.Add(6 * time.Minute).Unix()}), "token is not valid yet"},
		{"nbf not a number", token(map[string]any{"nbf": "soon"}), "token is not valid yet"},
		{"future iat", token(map[string]any{"iat": noon.Add(6 * time.Minute).Unix(), "exp": noon.Add(time.Hour).Unix()}), "issue time is absurd"},
		{"issued after it expires", token(map[string]any{"iat": noon.Add(2 * time.Minute).Unix(), "exp": noon.Add(time.Minute).Unix()}), "issue time is absurd"},
		{"iat that is no number", token(map[string]any{"iat": "now"}), "issue time is absurd"},
		{"negative iat", token(map[string]any{"iat": -1}), "issue time is absurd"},

		{"other audience", token(map[string]any{"aud": "other"}), "token is for another audience"},
		{"audience as part of a name", token(map[string]any{"aud": "sigstore2"}), "token is for another audience"},
		{"audience in other case", token(map[string]any{"aud": "Sigstore"}), "token is for another audience"},
		{"no audience", token(map[string]any{"aud": nil}), "token is for another audience"},
		{"empty audience", token(map[string]any{"aud": []string{}}), "token is for another audience"},
		{"audience of numbers", token(map[string]any{"aud": []any{"sigstore", 1}}), "token is for another audience"},
		{"missing sub", token(map[string]any{"sub": nil}), "token has no subject"},
		{"sub not a string", token(map[string]any{"sub": 7}), "token has no subject"},

		{"events of a logout token", token(map[string]any{"events": map[string]any{"http://schemas.openid.net/event/backchannel-logout": map[string]any{}}}), "token reports events"},

		{"email not verified", token(map[string]any{"email_verified": false}), "e-mail address is not verified"},
		{"email_verified missing", token(map[string]any{"email_verified": nil}), "e-mail address is not verified"},
		{"email_verified as the string false", token(map[string]any{"email_verified": "false"}), "e-mail address is not verified"},
		{"email_verified as a word", token(map[string]any{"email_verified": "yes"}), "email_verified is not a boolean"},
		{"email_verified as a number", token(map[string]any{"email_verified": 1}), "email_verified is not a boolean"},
		{"email missing", token(map[string]any{"email": nil}), "claim email is missing"},
		{"email empty", token(map[string]any{"email": ""}), "claim email is missing"},
		{"email a list", token(map[string]any{"email": []string{"alice@example.com"}}), "claim email is missing"},
		{"email without domain", token(map[string]any{"email": "alice"}), "email is not an e-mail address"},
		{"email with NUL", token(map[string]any{"email": "alice@example.com\x00.evil.example"}), "email is not an e-mail address"},
		{"email with a homograph", token(map[string]any{"email": "аlice@example.com"}), "email is not an e-mail address"},
		{"two addresses", token(map[string]any{"email": "alice@example.com,bob@example.com"}), "email is not an e-mail address"},
		{"over-long email", token(map[string]any{"email": strings.Repeat("a", 250) + "@example.com"}), "email is not an e-mail address"},

		{"claim twice", payload(strings.Replace(base, "{", `{"email":"root@example.com",`, 1)), "payload is not strict JSON"},
		{"claim twice, nested", payload(strings.Replace(base, "{", `{"x":{"a":1,"a":2},`, 1)), "payload is not strict JSON"},
		{"claim twice, one escaped", payload(strings.Replace(base, "{", `{"\u0065mail":"root@example.com",`, 1)), "payload is not strict JSON"},
		{"deep nesting", payload(strings.Replace(base, "{", `{"x":`+strings.Repeat("[", 100)+strings.Repeat("]", 100)+",", 1)), "payload is not strict JSON"},
		{"invalid UTF-8", payload(strings.Replace(base, "alice", "\xff", 1) + "\xff"), "payload is not strict JSON"},
		{"number beyond all bounds, nested", payload(strings.Replace(base, "{", `{"x":[{"y":-1e999}],`, 1)), "payload is not strict JSON"},
		{"payload not an object", payload(`["iss"]`), "payload is not strict JSON"},
		{"two payloads", payload(base + base), "payload is not strict JSON"},
		{"payload cut", payload(base[:len(base)-1]), "payload is not strict JSON"},
	} {
		t.Run(test.name, func(t *testing.T) { wantRefusal(t, v, test.raw, test.reason) })
	}
}

// TestNoClaimInErrors: an error never repeats what a token contained.
func TestNoClaimInErrors(t *testing.T) {
	i := startIDP(t)
	v := newVerifier(t, i.email())
	const secret = "s3cr3t-claim"
	for _, claims := range []map[string]any{
		{"iss": secret}, {"aud": secret}, {"email": secret}, {"email_verified": secret},
		{"exp": secret}, {"sub": secret + "\x00"}, {"email": secret + "@x"},
	} {
		_, err := v.Verify(t.Context(), i.token(t, claims))
		if err == nil {
			t.Errorf("%v was accepted", claims)
		} else if strings.Contains(err.Error(), secret) {
			t.Errorf("error repeats a claim: %v", err)
		}
	}
}

func TestClockRefuses(t *testing.T) {
	i := startIDP(t)
	broken := errors.New("clock went back")
	v, err := New(t.Context(), Config{OIDCIssuers: map[string]Issuer{i.Issuer(): i.email()}}, Options{
		Now: func() (time.Time, error) { return time.Time{}, broken }, LoopbackHTTP: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if _, err := v.Verify(t.Context(), i.token(t, nil)); !errors.Is(err, ErrClock) || !errors.Is(err, broken) {
		t.Errorf("err %v", err)
	}
}

// TestRotation: a new key is found without a failed request, a retired one is
// refused after the next fetch, and a key that does not exist is looked for a
// limited number of times.
func TestRotation(t *testing.T) {
	i := startIDP(t)
	v := newVerifier(t, i.email())
	old := i.token(t, nil)
	if _, err := v.Verify(t.Context(), old); err != nil {
		t.Fatal(err)
	}
	if _, err := i.Rotate(nil); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(t.Context(), i.token(t, nil)); err != nil {
		t.Fatalf("after rotation: %v", err)
	}
	if _, err := v.Verify(t.Context(), old); err != nil {
		t.Fatalf("the key before: %v", err)
	}
	before := i.fetches.Load()
	for n := range 50 {
		raw := forge(t, map[string]any{"alg": "RS256", "kid": "unknown-" + string(rune('a'+n))}, i.Claims(nil), rs256(t, i.key))
		wantRefusal(t, v, raw, "key is not the issuer's")
	}
	if n := i.fetches.Load() - before; n > askBurst {
		t.Errorf("%d fetches for unknown keys, at most %d", n, askBurst)
	}
}

// TestRotationUnderOneID: a new key with the id of the one before, or without one,
// is found without a failed request, and tokens of no key cost few fetches.
func TestRotationUnderOneID(t *testing.T) {
	for _, id := range []string{"credential", ""} {
		var mu sync.Mutex
		var current jose.JSONWebKey
		var fetches int
		issuer := serveProvider(t, hostile{jwks: func(w http.ResponseWriter, _ *http.Request) {
			mu.Lock()
			defer mu.Unlock()
			fetches++
			_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{current}})
		}})
		turn := func(key *rsa.PrivateKey) {
			mu.Lock()
			defer mu.Unlock()
			current = jose.JSONWebKey{Key: key.Public(), KeyID: id}
		}
		raw := func(key *rsa.PrivateKey) string {
			header := map[string]any{"alg": "RS256"}
			if id != "" {
				header["kid"] = id
			}
			return forge(t, header, []byte(validClaims(issuer)), rs256(t, key))
		}
		first, second, other := must(rsa.GenerateKey(rand.Reader, 2048)), must(rsa.GenerateKey(rand.Reader, 2048)), must(rsa.GenerateKey(rand.Reader, 2048))
		turn(first)
		v := newVerifier(t, Issuer{IssuerURL: issuer, ClientID: "sigstore", Type: "email"})
		if _, err := v.Verify(t.Context(), raw(first)); err != nil {
			t.Fatal(err)
		}
		turn(second)
		if _, err := v.Verify(t.Context(), raw(second)); err != nil {
			t.Errorf("id %q, after rotation: %v", id, err)
		}
		for range 20 {
			wantRefusal(t, v, raw(other), "signature does not verify")
		}
		if _, err := v.Verify(t.Context(), raw(second)); err != nil {
			t.Errorf("id %q, beside tokens of no key: %v", id, err)
		}
		mu.Lock()
		if fetches > 1+askBurst {
			t.Errorf("id %q: %d fetches", id, fetches)
		}
		mu.Unlock()
	}
}

func TestProviderDown(t *testing.T) {
	srv := httptest.NewServer(http.NotFoundHandler())
	issuer := srv.URL
	srv.Close()
	v := newVerifier(t, Issuer{IssuerURL: issuer, ClientID: "sigstore", Type: "email"})
	p := oidctest.New(oidctest.Config{Issuer: issuer, Now: func() time.Time { return noon }})
	raw, err := p.Token(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(t.Context(), raw); !errors.Is(err, ErrUnavailable) {
		t.Errorf("err %v", err)
	}
	if h := v.Health(); len(h) != 1 || h[0].Err == nil || h[0].Issuer != issuer {
		t.Errorf("health %+v", h)
	}
}

func TestVerifyEndsWithContext(t *testing.T) {
	release := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }))
	t.Cleanup(srv.Close)
	t.Cleanup(func() { close(release) })
	v := newVerifier(t, Issuer{IssuerURL: srv.URL, ClientID: "sigstore", Type: "email"})
	raw, err := oidctest.New(oidctest.Config{Issuer: srv.URL, Now: func() time.Time { return noon }}).Token(nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := v.Verify(ctx, raw); !errors.Is(err, ErrUnavailable) {
		t.Errorf("err %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	good := Issuer{IssuerURL: "https://idp.example", ClientID: "sigstore", Type: "email"}
	for _, test := range []struct {
		name string
		cfg  Config
		opts Options
	}{
		{"no clock", Config{OIDCIssuers: map[string]Issuer{good.IssuerURL: good}}, Options{}},
		{"no issuer", Config{}, Options{Now: atNoon}},
		{"http", Config{OIDCIssuers: map[string]Issuer{"http://127.0.0.1": {IssuerURL: "http://127.0.0.1", ClientID: "c", Type: "email"}}}, Options{Now: atNoon}},
		{"http to another host", Config{OIDCIssuers: map[string]Issuer{"http://idp.example": {IssuerURL: "http://idp.example", ClientID: "c", Type: "email"}}},
			Options{Now: atNoon, LoopbackHTTP: true, wait: time.Minute}},
	} {
		if _, err := New(t.Context(), test.cfg, test.opts); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: err %v", test.name, err)
		}
	}
}
