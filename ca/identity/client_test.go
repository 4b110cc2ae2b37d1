package identity

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"testing"

	jose "github.com/go-jose/go-jose/v4"

	"github.com/chancery-ca/chancery/ca/internal/idptest"
)

// hostile is a provider that answers as a test wants.
type hostile struct {
	issuer     string // "" is the right one
	algorithms []string
	keys       jose.JSONWebKeySet
	jwksURI    string           // "" is the right one
	discovery  http.HandlerFunc // instead of the document
	jwks       http.HandlerFunc // instead of the keys
}

func serveProvider(t *testing.T, h hostile) string {
	t.Helper()
	srv := httptest.NewServer(nil)
	t.Cleanup(srv.Close)
	srv.Config.Handler = h.handler(srv.URL)
	return srv.URL
}

func (h hostile) handler(base string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/.well-known/openid-configuration", func(w http.ResponseWriter, r *http.Request) {
		if h.discovery != nil {
			h.discovery(w, r)
			return
		}
		doc := map[string]any{"issuer": base, "jwks_uri": base + "/jwks", "id_token_signing_alg_values_supported": h.algorithms}
		if h.issuer != "" {
			doc["issuer"] = h.issuer
		}
		if h.jwksURI != "" {
			doc["jwks_uri"] = h.jwksURI
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(doc)
	})
	mux.HandleFunc("/jwks", func(w http.ResponseWriter, r *http.Request) {
		if h.jwks != nil {
			h.jwks(w, r)
			return
		}
		_ = json.NewEncoder(w).Encode(h.keys)
	})
	return mux
}

// TestHostileProviders: each of these ends without keys and with its reason.
func TestHostileProviders(t *testing.T) {
	inner := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		t.Error("a redirect or a document led to another server")
	}))
	defer inner.Close()
	redirect := func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, inner.URL, http.StatusFound) }
	for _, test := range []struct {
		name   string
		h      hostile
		reason string
	}{
		{"another issuer", hostile{issuer: "https://other.example"}, "did not match"},
		{"issuer with a slash", hostile{issuer: "SLASH"}, "did not match"},
		{"redirected discovery", hostile{discovery: redirect}, errRedirect.Error()},
		{"redirected keys", hostile{jwks: redirect}, errRedirect.Error()},
		{"discovery of 10 MiB", hostile{discovery: idptest.Flood}, errTooLarge.Error()},
		{"keys of 10 MiB", hostile{jwks: idptest.Flood}, errTooLarge.Error()},
		{"10,000 keys", hostile{jwks: idptest.ManyKeys}, "10001 keys, at most 64"},
		{"keys at a private address", hostile{jwksURI: "https://10.0.0.1/jwks"}, errPrivate.Error()},
		{"keys at a metadata service", hostile{jwksURI: "http://169.254.169.254/latest"}, errScheme.Error()},
		{"keys at a file", hostile{jwksURI: "file:///etc/passwd"}, errScheme.Error()},
		{"keys nowhere", hostile{jwksURI: ":"}, "missing protocol scheme"},
		{"HS256 only", hostile{algorithms: []string{"HS256", "none"}}, "no signature algorithm"},
		{"compressed", hostile{jwks: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
		}}, errTransport.Error()},
		{"not JSON", hostile{jwks: func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") }}, "not a JSON Web Key Set"},
		{"server error", hostile{jwks: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }}, "status 500"},
		{"no keys", hostile{}, "no key that can verify"},
		{"symmetric key", hostile{keys: jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: []byte("secret"), KeyID: "k"}}}}, "no key that can verify"},
	} {
		t.Run(test.name, func(t *testing.T) {
			base := serveProvider(t, test.h)
			if test.h.issuer == "SLASH" {
				h := test.h
				h.issuer = base + "/"
				base = serveProvider(t, h)
			}
			s, err := newSource(known{Issuer: Issuer{IssuerURL: base, ClientID: "c", Type: "email"}}, Options{LoopbackHTTP: true, Logger: discard})
			if err != nil {
				t.Fatal(err)
			}
			defer s.client.CloseIdleConnections()
			_, err = s.keys.fetchOnce(t.Context())
			if err == nil || !strings.Contains(err.Error(), test.reason) {
				t.Errorf("err %v, want %q", err, test.reason)
			}
			if err != nil && len(err.Error()) > 300 {
				t.Errorf("error of %d octets", len(err.Error()))
			}
		})
	}
}

// TestTLS: a provider with a private certificate is reached with ca-cert and
// its network configured, and not without either.
func TestTLS(t *testing.T) {
	good := startIDP(t)
	srv := httptest.NewTLSServer(nil)
	t.Cleanup(srv.Close)
	srv.Config.Handler = hostile{keys: good.JWKS()}.handler(srv.URL)
	cert := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}))
	loopback := []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	for _, test := range []struct {
		name   string
		ca     string
		nets   []netip.Prefix
		reason string
	}{
		{"configured", cert, loopback, ""},
		{"without ca-cert", "", loopback, "certificate"},
		{"without its network", cert, nil, errPrivate.Error()},
		{"with another network", cert, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, errPrivate.Error()},
	} {
		t.Run(test.name, func(t *testing.T) {
			s, err := newSource(known{Issuer: Issuer{IssuerURL: srv.URL, ClientID: "c", Type: "email", CACert: test.ca}},
				Options{PrivateNetworks: test.nets, Logger: discard})
			if err != nil {
				t.Fatal(err)
			}
			defer s.client.CloseIdleConnections()
			_, err = s.keys.fetchOnce(t.Context())
			switch {
			case test.reason == "" && err != nil:
				t.Error(err)
			case test.reason != "" && (err == nil || !strings.Contains(err.Error(), test.reason)):
				t.Errorf("err %v, want %q", err, test.reason)
			}
		})
	}
}

func TestDialGuard(t *testing.T) {
	for address, public := range map[string]bool{
		"8.8.8.8": true, "2606:4700::1111": true,
		"127.0.0.1": false, "::1": false, "0.0.0.0": false, "::": false,
		"10.1.2.3": false, "172.16.0.1": false, "192.168.1.1": false, "100.64.0.1": false,
		"169.254.169.254": false, "fe80::1": false, "fd00::1": false, "fec0::1": false,
		"224.0.0.1": false, "ff02::1": false, "255.255.255.255": false, "240.0.0.1": false,
		"::ffff:10.0.0.1": false, "::ffff:127.0.0.1": false, "64:ff9b::a00:1": false, "2002:a00:1::": false,
		"::ffff:0:10.0.0.1": false, "4000::1": false, "100::1": false, "5f00::1": false,
		"198.18.0.1": false, "192.0.2.1": false, "::7f00:1": false, "2001:db8::1": false,
	} {
		err := dialGuard{}.control(t.Context(), "tcp", netip.AddrPortFrom(netip.MustParseAddr(address), 443).String(), nil)
		if (err == nil) != public {
			t.Errorf("%s: err %v, public %v", address, err, public)
		}
	}
	local := dialGuard{networks: []netip.Prefix{netip.MustParsePrefix("fe80::/10")}}
	if err := local.control(t.Context(), "tcp", "[fe80::1%eth0]:443", nil); err != nil {
		t.Errorf("a configured address with a zone: %v", err)
	}
	if !(dialGuard{loopback: true}).allows(netip.MustParseAddr("127.0.0.1")) {
		t.Error("loopback refused where it is allowed")
	}
	if (dialGuard{loopback: true}).allows(netip.MustParseAddr("10.0.0.1")) {
		t.Error("loopback opened a private network")
	}
}

func TestCheckURL(t *testing.T) {
	for raw, want := range map[string]bool{
		"https://idp.example":               true,
		"http://127.0.0.1:8080":             true,
		"http://[::1]:8080":                 true,
		"http://localhost:8080":             true,
		"http://idp.example":                false,
		"http://localhost.evil.example":     false,
		"http://127.0.0.1.evil.example":     false,
		"http://10.0.0.1":                   false,
		"ftp://127.0.0.1":                   false,
		"http://0x7f000001":                 false,
		"http://127.0.0.1@evil.example/":    false,
		"http://evil.example#http://[::1]/": false,
	} {
		u, err := url.Parse(raw)
		if err != nil {
			t.Fatal(err)
		}
		if got := checkURL(u, true) == nil; got != want {
			t.Errorf("%s: %v, want %v", raw, got, want)
		}
	}
}
