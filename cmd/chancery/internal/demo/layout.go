package demo

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
)

// layout is the demo's folder; its methods are the one list of what is where.
type layout string

func (l layout) path(elem ...string) string {
	return filepath.Join(append([]string{string(l)}, elem...)...)
}

func (l layout) state() string         { return l.path("demo.json") }
func (l layout) config() string        { return l.path("chancery.yaml") }
func (l layout) tokens() string        { return l.path("tokens") }
func (l layout) pin(tok string) string { return l.path("pins", tok) }
func (l layout) trust() string         { return l.path("trust") }
func (l layout) data() string          { return l.path("state") }

// What a client needs, at the top of the folder.
func (l layout) trustedRoot() string   { return l.path("trusted_root.json") }
func (l layout) signingConfig() string { return l.path("signing_config.v0.2.json") }
func (l layout) clientConfig() string  { return l.path("client_trust_config.json") }
func (l layout) tlsCA() string         { return l.path("tls-ca.pem") }
func (l layout) token() string         { return l.path("token") }
func (l layout) hello() string         { return l.path("hello.txt") }

// The private keys in files.
func (l layout) tlsCAKey() string    { return l.path("tls", "ca.key") }
func (l layout) tlsKey() string      { return l.path("tls", "server.key") }
func (l layout) tlsCert() string     { return l.path("tls", "server.pem") }
func (l layout) providerKey() string { return l.path("identity-provider.key") }

// PrivateKeyFiles lists the only private keys that are outside a token, as
// paths below the demo's folder.
func PrivateKeyFiles() []string {
	l := layout("")
	return []string{l.tlsCAKey(), l.tlsKey(), l.providerKey()}
}

// loopback refuses an address that other machines could reach.
func loopback(address string) error {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("listen address %q: want 127.0.0.1:PORT", address)
	}
	// 127.0.0.1 alone: the TLS certificate and the logs' origins name it.
	if ip, err := netip.ParseAddr(host); err != nil || ip != netip.MustParseAddr("127.0.0.1") {
		return fmt.Errorf("listen address %q: the demo listens on 127.0.0.1 alone", address)
	}
	return nil
}

// The ports among which a new demo chooses. Linux gives programs that ask for
// any port those from 32768 on: one of these is free when the demo comes back.
const firstPort, lastPort = 10240, 32767

// listenAt listens at the address, or, if it is "", at a free port that will be
// free the next time, too.
func listenAt(address string) (net.Listener, error) {
	if address != "" {
		if err := loopback(address); err != nil {
			return nil, err
		}
		l, err := net.Listen("tcp", address)
		if err != nil {
			return nil, fmt.Errorf("listen: %w", err)
		}
		return l, nil
	}
	for range 100 {
		port := firstPort + rand.IntN(lastPort-firstPort+1) //nolint:gosec // a port is no secret
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			return l, nil
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	return l, nil
}

func hostPort(raw string) (string, error) {
	u, err := url.Parse(raw)
	if err != nil {
		return "", fmt.Errorf("read issuer %q: %w", raw, err)
	}
	return u.Host, loopback(u.Host)
}
