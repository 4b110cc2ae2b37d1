package oidctest

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/oauth2"
)

// start serves a provider on loopback under a path prefix.
func start(t *testing.T, cfg Config) *Provider {
	t.Helper()
	var p *Provider
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { p.ServeHTTP(w, r) }))
	t.Cleanup(srv.Close)
	cfg.Issuer = srv.URL + "/idp"
	p = New(cfg)
	return p
}

func discover(t *testing.T, p *Provider) *oidc.Provider {
	t.Helper()
	found, err := oidc.NewProvider(t.Context(), p.Issuer())
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// noFollow stops at the first redirect, as a browser would hand it to the
// client's loopback listener.
var noFollow = &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}

func get(t *testing.T, url string) *http.Response {
	t.Helper()
	resp, err := noFollow.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = resp.Body.Close() })
	return resp
}

func TestAuthorizationCodeWithPKCE(t *testing.T) {
	p := start(t, Config{})
	found := discover(t, p)
	client := oauth2.Config{
		ClientID: "sigstore", Endpoint: found.Endpoint(), Scopes: []string{"openid", "email"},
		RedirectURL: "http://localhost:40123/auth/callback",
	}
	verifier := oauth2.GenerateVerifier()
	resp := get(t, client.AuthCodeURL("the state", oauth2.S256ChallengeOption(verifier), oidc.Nonce("the nonce")))
	back, err := resp.Location()
	if err != nil {
		t.Fatalf("status %d: %v", resp.StatusCode, err)
	}
	if back.Host != "localhost:40123" || back.Query().Get("state") != "the state" {
		t.Fatalf("redirected to %s", back)
	}
	code := back.Query().Get("code")
	if _, err := client.Exchange(t.Context(), "another"+code, oauth2.VerifierOption(verifier)); err == nil {
		t.Fatal("an unknown code was redeemed")
	}
	token, err := client.Exchange(t.Context(), code, oauth2.VerifierOption(verifier))
	if err != nil {
		t.Fatal(err)
	}
	raw, _ := token.Extra("id_token").(string)
	id, err := found.Verifier(&oidc.Config{ClientID: "sigstore"}).Verify(t.Context(), raw)
	if err != nil {
		t.Fatal(err)
	}
	if id.Nonce != "the nonce" || id.Subject != DefaultSubject {
		t.Fatalf("nonce %q, subject %q", id.Nonce, id.Subject)
	}
	if _, err := client.Exchange(t.Context(), code, oauth2.VerifierOption(verifier)); err == nil {
		t.Fatal("a code was redeemed twice")
	}
}

func TestAuthorizationRefusals(t *testing.T) {
	p := start(t, Config{})
	good := url.Values{
		"client_id": {"sigstore"}, "response_type": {"code"}, "redirect_uri": {"http://127.0.0.1:1/cb"},
		"code_challenge_method": {"S256"}, "code_challenge": {strings.Repeat("a", 43)},
	}
	for _, test := range []struct{ name, field, value string }{
		{"another client", "client_id", "other"},
		{"redirect to another host", "redirect_uri", "http://evil.example/cb"},
		{"redirect to a name that starts like ours", "redirect_uri", "http://localhost.evil.example/cb"},
		{"redirect with user info", "redirect_uri", "http://localhost@evil.example/cb"},
		{"redirect with https", "redirect_uri", "https://127.0.0.1/cb"},
		{"no redirect", "redirect_uri", ""},
		{"implicit flow", "response_type", "id_token"},
		{"plain PKCE", "code_challenge_method", "plain"},
		{"no PKCE", "code_challenge", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			q := url.Values{}
			for k, v := range good {
				q[k] = v
			}
			q.Set(test.field, test.value)
			if resp := get(t, p.Issuer()+"/auth?"+q.Encode()); resp.StatusCode != http.StatusBadRequest {
				t.Errorf("status %d", resp.StatusCode)
			}
		})
	}
}

func TestWrongVerifierIsRefused(t *testing.T) {
	p := start(t, Config{})
	client := oauth2.Config{ClientID: "sigstore", Endpoint: discover(t, p).Endpoint(), RedirectURL: "http://[::1]:9/cb"}
	resp := get(t, client.AuthCodeURL("s", oauth2.S256ChallengeOption(oauth2.GenerateVerifier())))
	back, err := resp.Location()
	if err != nil {
		t.Fatal(err)
	}
	_, err = client.Exchange(t.Context(), back.Query().Get("code"), oauth2.VerifierOption(oauth2.GenerateVerifier()))
	if err == nil {
		t.Fatal("a stolen code was redeemed")
	}
}

func TestOutOfBandShowsTheCode(t *testing.T) {
	p := start(t, Config{})
	client := oauth2.Config{ClientID: "sigstore", Endpoint: discover(t, p).Endpoint(), RedirectURL: outOfBand}
	verifier := oauth2.GenerateVerifier()
	body, err := io.ReadAll(get(t, client.AuthCodeURL("s", oauth2.S256ChallengeOption(verifier))).Body)
	if err != nil {
		t.Fatal(err)
	}
	_, code, _ := strings.Cut(string(body), "Code: ")
	code, _, _ = strings.Cut(code, "<")
	if _, err := client.Exchange(t.Context(), code, oauth2.VerifierOption(verifier)); err != nil {
		t.Fatal(err)
	}
}

func TestDeviceFlow(t *testing.T) {
	for _, auto := range []bool{false, true} {
		p := start(t, Config{AutoApprove: auto})
		found := discover(t, p)
		client := oauth2.Config{ClientID: "sigstore", Endpoint: found.Endpoint()}
		verifier := oauth2.GenerateVerifier()
		device, err := client.DeviceAuth(t.Context(), oauth2.S256ChallengeOption(verifier))
		if err != nil {
			t.Fatal(err)
		}
		if got := poll(t, found, device.DeviceCode, verifier); !auto {
			if got["error"] != "authorization_pending" {
				t.Fatalf("before approval: %v", got)
			}
			if resp := get(t, device.VerificationURIComplete); resp.StatusCode != http.StatusOK {
				t.Fatalf("verification page: %d", resp.StatusCode)
			}
			checkIDToken(t, found, poll(t, found, device.DeviceCode, verifier))
		} else {
			checkIDToken(t, found, got)
		}
		if got := poll(t, found, device.DeviceCode, verifier); got["error"] != "expired_token" {
			t.Errorf("second redemption: %v", got)
		}
	}
}

func TestUnknownUserCode(t *testing.T) {
	p := start(t, Config{})
	if resp := get(t, p.Issuer()+"/device?user_code=NOTACODE"); resp.StatusCode != http.StatusNotFound {
		t.Errorf("status %d", resp.StatusCode)
	}
}

func poll(t *testing.T, found *oidc.Provider, code, verifier string) map[string]any {
	t.Helper()
	resp, err := http.PostForm(found.Endpoint().TokenURL, url.Values{
		"grant_type": {grantDevice}, "client_id": {"sigstore"}, "device_code": {code}, "code_verifier": {verifier},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var got map[string]any
	if err := json.NewDecoder(resp.Body).Decode(&got); err != nil {
		t.Fatal(err)
	}
	return got
}

func checkIDToken(t *testing.T, found *oidc.Provider, answer map[string]any) {
	t.Helper()
	raw, _ := answer["id_token"].(string)
	id, err := found.Verifier(&oidc.Config{ClientID: "sigstore"}).Verify(context.Background(), raw)
	if err != nil {
		t.Fatalf("%v: %v", answer, err)
	}
	var claims map[string]any
	if err := id.Claims(&claims); err != nil {
		t.Fatal(err)
	}
	if claims["email"] != DefaultEmail || claims["email_verified"] != true {
		t.Errorf("claims %v", claims)
	}
}

func TestTokenOverrides(t *testing.T) {
	now := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	p := New(Config{Issuer: "http://127.0.0.1:1", Now: func() time.Time { return now }, Lifetime: time.Minute, EmailUnverified: true})
	got := p.Claims(map[string]any{"aud": "other", "email": nil, "extra": 1})
	want := map[string]any{
		"iss": "http://127.0.0.1:1", "sub": DefaultSubject, "aud": "other", "email_verified": false,
		"iat": now.Unix(), "exp": now.Unix() + 60, "extra": 1,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestRotation(t *testing.T) {
	p := start(t, Config{})
	old, err := p.Token(nil)
	if err != nil {
		t.Fatal(err)
	}
	id, err := p.Rotate(nil)
	if err != nil {
		t.Fatal(err)
	}
	fresh, err := p.Token(nil)
	if err != nil {
		t.Fatal(err)
	}
	verify := func(raw string) error {
		_, err := discover(t, p).Verifier(&oidc.Config{ClientID: "sigstore"}).Verify(t.Context(), raw)
		return err
	}
	if err := verify(old); err != nil {
		t.Errorf("token of the key before: %v", err)
	}
	if err := verify(fresh); err != nil {
		t.Errorf("token of the new key: %v", err)
	}
	p.Retire()
	if keys := p.JWKS().Keys; len(keys) != 1 || keys[0].KeyID != id || !keys[0].IsPublic() {
		t.Errorf("published after retirement: %v", keys)
	}
	if verify(old) == nil {
		t.Error("a retired key's token verified")
	}
}

func TestBadIssuer(t *testing.T) {
	if _, err := New(Config{Issuer: "not a URL"}).Token(nil); err == nil {
		t.Error("a provider without a URL signed")
	}
}

func TestStoreIsBounded(t *testing.T) {
	now := time.Unix(0, 0)
	p := newPending[int](func() time.Time { return now }, time.Minute)
	for i := range maxPending {
		if _, ok := p.put(i); !ok {
			t.Fatalf("full after %d", i)
		}
	}
	if _, ok := p.put(0); ok {
		t.Fatal("more than the limit")
	}
	now = now.Add(time.Minute)
	if _, ok := p.put(0); !ok {
		t.Fatal("expired entries still count")
	}
}
