package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"syscall"
	"time"
)

const (
	// maxAnswer bounds the body of a discovery document or key set.
	maxAnswer = 256 << 10
	// maxHeaders bounds the headers of an answer.
	maxHeaders = 32 << 10
	// fetchTimeout bounds everything that one fetch does.
	fetchTimeout = 10 * time.Second
)

var (
	errScheme    = errors.New("only https is allowed")
	errRedirect  = errors.New("redirects are not followed")
	errPrivate   = errors.New("address is not on the public Internet and not configured")
	errTooLarge  = errors.New("answer is too large")
	errTransport = errors.New("answer in an unexpected encoding")
)

// newClient makes the client for one issuer. It speaks https (and http with
// loopback hosts if opts allow it), follows no redirect, uses no proxy, dials
// only addresses that opts allow, and cuts answers off at maxAnswer.
func newClient(issuer Issuer, opts Options) (*http.Client, error) {
	var roots *x509.CertPool // nil: the system's
	if issuer.CACert != "" {
		var err error
		if roots, err = x509.SystemCertPool(); err != nil {
			roots = x509.NewCertPool()
		}
		if !roots.AppendCertsFromPEM([]byte(issuer.CACert)) {
			return nil, fmt.Errorf("%w: ca-cert is not a PEM certificate", ErrConfig)
		}
	}
	guard := dialGuard{networks: opts.PrivateNetworks, loopback: opts.LoopbackHTTP}
	dialer := &net.Dialer{Timeout: fetchTimeout / 2, ControlContext: guard.control}
	transport := &http.Transport{
		DialContext:            dialer.DialContext,
		TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:    fetchTimeout / 2,
		ResponseHeaderTimeout:  fetchTimeout / 2,
		MaxResponseHeaderBytes: maxHeaders,
		MaxConnsPerHost:        2,
		MaxIdleConns:           2,
		IdleConnTimeout:        30 * time.Second,
		DisableCompression:     true, // a bounded body stays bounded
		ForceAttemptHTTP2:      true,
	}
	return &http.Client{
		Transport:     bounded{next: transport, loopbackHTTP: opts.LoopbackHTTP},
		CheckRedirect: func(*http.Request, []*http.Request) error { return errRedirect },
		Timeout:       fetchTimeout,
	}, nil
}

// bounded refuses URLs that are not allowed and bounds what comes back.
type bounded struct {
	next         *http.Transport
	loopbackHTTP bool
}

// RoundTrip implements http.RoundTripper.
func (b bounded) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := checkURL(req.URL, b.loopbackHTTP); err != nil {
		return nil, err
	}
	resp, err := b.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if resp.Header.Get("Content-Encoding") != "" {
		_ = resp.Body.Close()
		return nil, errTransport
	}
	resp.Body = &limitedBody{body: resp.Body, left: maxAnswer}
	return resp, nil
}

// CloseIdleConnections lets http.Client.CloseIdleConnections reach the transport.
func (b bounded) CloseIdleConnections() { b.next.CloseIdleConnections() }

// checkURL allows https, and http to this machine if loopbackHTTP.
func checkURL(u *url.URL, loopbackHTTP bool) error {
	if u.Scheme == "https" {
		return nil
	}
	ip, _ := netip.ParseAddr(u.Hostname())
	if u.Scheme == "http" && loopbackHTTP && (ip.IsLoopback() || u.Hostname() == "localhost") {
		return nil
	}
	return errScheme
}

// limitedBody fails, rather than ends, beyond its limit.
type limitedBody struct {
	body io.ReadCloser
	left int
}

// Read implements io.Reader; beyond the limit it fails with errTooLarge.
func (l *limitedBody) Read(p []byte) (int, error) {
	if len(p) > l.left+1 {
		p = p[:l.left+1]
	}
	n, err := l.body.Read(p)
	if n > l.left {
		return l.left, errTooLarge
	}
	l.left -= n
	return n, err
}

// Close implements io.Closer.
func (l *limitedBody) Close() error { return l.body.Close() }

// dialGuard looks at the address that is really dialled, after the name was
// resolved, so that no answer of a name server leads into a private network.
type dialGuard struct {
	networks []netip.Prefix
	loopback bool
}

func (g dialGuard) control(_ context.Context, _, address string, _ syscall.RawConn) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("parse dialled address: %w", err)
	}
	if !g.allows(ap.Addr().Unmap()) {
		return errPrivate
	}
	return nil
}

func (g dialGuard) allows(ip netip.Addr) bool {
	ip = ip.WithZone("")
	if slices.ContainsFunc(g.networks, func(n netip.Prefix) bool { return n.Contains(ip) }) {
		return true
	}
	if ip.IsLoopback() {
		return g.loopback
	}
	return isPublic(ip)
}

// isPublic is false for every address that the IANA special-purpose registries
// (RFC 6890 and its successors) keep out of the global Internet, and for IPv6
// addresses that embed an IPv4 address or were never assigned.
func isPublic(ip netip.Addr) bool {
	if !ip.IsGlobalUnicast() || ip.IsPrivate() || ip.Is6() && !allocated.Contains(ip) {
		return false
	}
	return !slices.ContainsFunc(special, func(n netip.Prefix) bool { return n.Contains(ip) })
}

// allocated are the IPv6 addresses that are in use as global ones (IANA, IPv6
// Global Unicast Address Assignments).
var allocated = netip.MustParsePrefix("2000::/3")

var special = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),       // this network
	netip.MustParsePrefix("100.64.0.0/10"),   // shared address space, RFC 6598
	netip.MustParsePrefix("192.0.0.0/24"),    // protocol assignments
	netip.MustParsePrefix("192.0.2.0/24"),    // documentation
	netip.MustParsePrefix("192.88.99.0/24"),  // 6to4 relays
	netip.MustParsePrefix("198.18.0.0/15"),   // benchmarking, RFC 2544
	netip.MustParsePrefix("198.51.100.0/24"), // documentation
	netip.MustParsePrefix("203.0.113.0/24"),  // documentation
	netip.MustParsePrefix("240.0.0.0/4"),     // reserved
	netip.MustParsePrefix("2001::/23"),       // protocol assignments, Teredo
	netip.MustParsePrefix("2001:db8::/32"),   // documentation
	netip.MustParsePrefix("2002::/16"),       // 6to4
	netip.MustParsePrefix("3fff::/20"),       // documentation
}
