package oidctest

import (
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html"
	"net"
	"net/http"
	"net/url"
	"time"
)

const (
	thumbprintHash = crypto.SHA256
	maxForm        = 64 << 10 // octets of a form

	codeLifetime   = time.Minute
	deviceLifetime = 5 * time.Minute
	deviceInterval = 1 // seconds between two polls of the device flow

	grantCode   = "authorization_code"
	grantDevice = "urn:ietf:params:oauth:grant-type:device_code"

	// outOfBand is the redirect URI of clients that cannot listen: the user
	// copies the code from the page.
	outOfBand = "urn:ietf:wg:oauth:2.0:oob"
)

// authorization is what the token endpoint must see again (RFC 7636, 4.6).
type authorization struct {
	redirectURI, challenge, nonce string
}

// deviceGrant is one device flow; userCode is what the user types.
type deviceGrant struct {
	userCode, challenge string
	approved            bool
}

func (p *Provider) serveDiscovery(w http.ResponseWriter, _ *http.Request) {
	at := func(path string) string { return p.cfg.Issuer + path }
	writeJSON(w, http.StatusOK, map[string]any{
		"issuer":                                p.cfg.Issuer,
		"authorization_endpoint":                at("/auth"),
		"token_endpoint":                        at("/token"),
		"device_authorization_endpoint":         at("/device/code"),
		"jwks_uri":                              at("/jwks"),
		"response_types_supported":              []string{"code"},
		"response_modes_supported":              []string{"query"},
		"grant_types_supported":                 []string{grantCode, grantDevice},
		"subject_types_supported":               []string{"public"},
		"id_token_signing_alg_values_supported": []string{"RS256"},
		"scopes_supported":                      []string{"openid", "email"},
		"token_endpoint_auth_methods_supported": []string{"none"},
		"claims_supported":                      []string{"aud", "email", "email_verified", "exp", "iat", "iss", "sub"},
		"code_challenge_methods_supported":      []string{"S256"},
	})
}

func (p *Provider) serveKeys(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Cache-Control", "max-age=60")
	writeJSON(w, http.StatusOK, p.JWKS())
}

// serveAuthorize approves the user at once. A request whose client or redirect
// URI is wrong is answered with a page, never with a redirect (RFC 6749,
// 4.1.2.1).
func (p *Provider) serveAuthorize(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	redirect, err := loopbackRedirect(q.Get("redirect_uri"))
	switch {
	case q.Get("client_id") != p.cfg.ClientID:
		page(w, http.StatusBadRequest, "Unknown client", "The request names another client.")
		return
	case err != nil:
		page(w, http.StatusBadRequest, "Redirect refused", "Only addresses of this machine are allowed.")
		return
	case q.Get("response_type") != "code", q.Get("code_challenge_method") != "S256", len(q.Get("code_challenge")) != 43:
		page(w, http.StatusBadRequest, "Request refused", "Only the code flow with PKCE S256 is supported.")
		return
	}
	code, ok := p.codes.put(authorization{
		redirectURI: q.Get("redirect_uri"), challenge: q.Get("code_challenge"), nonce: q.Get("nonce"),
	})
	if !ok {
		page(w, http.StatusServiceUnavailable, "Busy", "Too many sign-ins are waiting.")
		return
	}
	if redirect == nil {
		page(w, http.StatusOK, "Signed in as "+p.cfg.Email, "Code: "+code)
		return
	}
	back := redirect.Query()
	back.Set("code", code)
	if state := q.Get("state"); state != "" {
		back.Set("state", state)
	}
	redirect.RawQuery = back.Encode()
	http.Redirect(w, r, redirect.String(), http.StatusSeeOther) //nolint:gosec // G710: loopbackRedirect has let it pass
}

// loopbackRedirect accepts http to this machine on any port (RFC 8252, 7.3);
// nil without an error is the out-of-band form.
func loopbackRedirect(raw string) (*url.URL, error) {
	if raw == outOfBand {
		return nil, nil
	}
	u, err := url.Parse(raw)
	if err != nil {
		return nil, fmt.Errorf("parse redirect URI: %w", err)
	}
	ip := net.ParseIP(u.Hostname())
	if u.Scheme != "http" || u.User != nil || u.Fragment != "" || (u.Hostname() != "localhost" && !ip.IsLoopback()) {
		return nil, fmt.Errorf("redirect URI %q does not lead to this machine", raw)
	}
	return u, nil
}

func (p *Provider) serveToken(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		refuse(w, "invalid_request")
		return
	}
	client := r.PostForm.Get("client_id")
	if user, _, ok := r.BasicAuth(); ok {
		client = user
	}
	if client != p.cfg.ClientID {
		refuse(w, "invalid_client")
		return
	}
	switch r.PostForm.Get("grant_type") {
	case grantCode:
		p.redeemCode(w, r.PostForm)
	case grantDevice:
		p.redeemDevice(w, r.PostForm)
	default:
		refuse(w, "unsupported_grant_type")
	}
}

func (p *Provider) redeemCode(w http.ResponseWriter, form url.Values) {
	auth, taken, _ := p.codes.take(form.Get("code"), func(authorization) bool { return true })
	if !taken || auth.redirectURI != form.Get("redirect_uri") || !verifierFits(auth.challenge, form.Get("code_verifier")) {
		refuse(w, "invalid_grant")
		return
	}
	p.grant(w, auth.nonce)
}

func (p *Provider) redeemDevice(w http.ResponseWriter, form url.Values) {
	d, taken, found := p.device.take(form.Get("device_code"), func(d deviceGrant) bool { return d.approved })
	switch {
	case !found:
		refuse(w, "expired_token")
	case !taken:
		refuse(w, "authorization_pending")
	case d.challenge != "" && !verifierFits(d.challenge, form.Get("code_verifier")):
		refuse(w, "invalid_grant")
	default:
		p.grant(w, "")
	}
}

// verifierFits is the check of RFC 7636, Section 4.6 for S256.
func verifierFits(challenge, verifier string) bool {
	sum := sha256.Sum256([]byte(verifier))
	got := base64.RawURLEncoding.EncodeToString(sum[:])
	return subtle.ConstantTimeCompare([]byte(got), []byte(challenge)) == 1
}

func (p *Provider) grant(w http.ResponseWriter, nonce string) {
	extra := map[string]any{}
	if nonce != "" {
		extra["nonce"] = nonce
	}
	token, err := p.Token(extra)
	if err != nil {
		writeJSON(w, http.StatusInternalServerError, map[string]string{"error": "server_error"})
		return
	}
	w.Header().Set("Cache-Control", "no-store")
	writeJSON(w, http.StatusOK, map[string]any{
		"access_token": rand.Text(), // opens nothing: there is no resource behind it
		"token_type":   "Bearer",
		"expires_in":   int(p.cfg.Lifetime.Seconds()),
		"id_token":     token,
		"scope":        "openid email",
	})
}

func (p *Provider) serveDeviceCode(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		refuse(w, "invalid_request")
		return
	}
	method, challenge := r.PostForm.Get("code_challenge_method"), r.PostForm.Get("code_challenge")
	switch {
	case r.PostForm.Get("client_id") != p.cfg.ClientID:
		refuse(w, "invalid_client")
		return
	case challenge != "" && method != "S256":
		refuse(w, "invalid_request")
		return
	}
	userCode := rand.Text()[:8]
	code, ok := p.device.put(deviceGrant{userCode: userCode, challenge: challenge, approved: p.cfg.AutoApprove})
	if !ok {
		refuse(w, "slow_down")
		return
	}
	verification := p.cfg.Issuer + "/device"
	writeJSON(w, http.StatusOK, map[string]any{
		"device_code":               code,
		"user_code":                 userCode,
		"verification_uri":          verification,
		"verification_uri_complete": verification + "?user_code=" + userCode,
		"expires_in":                int(deviceLifetime.Seconds()),
		"interval":                  deviceInterval,
	})
}

// serveDevice is the verification page: opening it with a code approves the
// flow, opening it without one asks for the code.
func (p *Provider) serveDevice(w http.ResponseWriter, r *http.Request) {
	code := r.URL.Query().Get("user_code")
	if code == "" {
		header(w, http.StatusOK, "Sign in on another device")
		fmt.Fprint(w, `<form><label>Code <input name="user_code" autofocus></label> <button>Sign in</button></form>`)
		return
	}
	approved := p.device.update(func(d *deviceGrant) bool {
		if d.userCode != code {
			return false
		}
		d.approved = true
		return true
	})
	if !approved {
		page(w, http.StatusNotFound, "Unknown code", "The code has expired or was used.")
		return
	}
	page(w, http.StatusOK, "Signed in as "+p.cfg.Email, "You can go back to the terminal.")
}

// refuse answers with an error of RFC 6749, Section 5.2.
func refuse(w http.ResponseWriter, code string) {
	writeJSON(w, http.StatusBadRequest, map[string]string{"error": code})
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	out, err := json.Marshal(body)
	if err != nil {
		http.Error(w, "encode answer", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(out) // the client has gone; nobody is left to tell
}

func header(w http.ResponseWriter, status int, title string) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", "default-src 'none'")
	w.WriteHeader(status)
	fmt.Fprintf(w, "<!doctype html><title>%s</title><h1>%[1]s</h1>\n", html.EscapeString(title))
}

func page(w http.ResponseWriter, status int, title, text string) {
	header(w, status, title)
	fmt.Fprintf(w, "<p>%s</p>\n", html.EscapeString(text))
}
