package identity

import (
	"context"
	"encoding/pem"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

// nameServer answers every question for an IPv4 address with the next of
// answers, the last of them again and again.
type nameServer struct {
	conn    net.PacketConn
	answers [][4]byte
	asked   atomic.Int64
}

// serve answers until the connection is closed.
func (n *nameServer) serve() {
	buf := make([]byte, 1500)
	for {
		size, from, err := n.conn.ReadFrom(buf)
		if err != nil {
			return
		}
		var query dnsmessage.Message
		if err := query.Unpack(buf[:size]); err != nil || len(query.Questions) != 1 {
			continue
		}
		answer := dnsmessage.Message{
			Header:    dnsmessage.Header{ID: query.ID, Response: true, Authoritative: true, RecursionAvailable: true},
			Questions: query.Questions,
		}
		if q := query.Questions[0]; q.Type == dnsmessage.TypeA {
			at := min(int(n.asked.Add(1)), len(n.answers)) - 1
			answer.Answers = []dnsmessage.Resource{{
				Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class},
				Body:   &dnsmessage.AResource{A: n.answers[at]},
			}}
		}
		packed, err := answer.Pack()
		if err != nil {
			return
		}
		if _, err := n.conn.WriteTo(packed, from); err != nil {
			return
		}
	}
}

// resolveWith makes the process ask a name server of ours.
func resolveWith(t *testing.T, answers ...[4]byte) *nameServer {
	t.Helper()
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &nameServer{conn: conn, answers: answers}
	done := make(chan struct{})
	go func() {
		defer close(done)
		n.serve()
	}()
	before := net.DefaultResolver
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp4", conn.LocalAddr().String())
	}}
	t.Cleanup(func() {
		net.DefaultResolver = before
		_ = conn.Close()
		<-done
	})
	return n
}

// samePort listens on one port of two addresses.
func samePort(t *testing.T, one, other string) (a, b net.Listener, port string) {
	t.Helper()
	for {
		a, err := net.Listen("tcp4", net.JoinHostPort(one, "0"))
		if err != nil {
			t.Skipf("%s is not of this machine: %v", one, err)
		}
		_, port, err := net.SplitHostPort(a.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		b, err := net.Listen("tcp4", net.JoinHostPort(other, port))
		if err == nil {
			return a, b, port
		}
		_ = a.Close()
		if !errors.Is(err, syscall.EADDRINUSE) {
			t.Fatal(err)
		}
	}
}

// TestRebinding: a name that leads to an allowed address when it is first
// looked up, and into another network the next time, is not followed there: the
// address that is dialled decides.
func TestRebinding(t *testing.T) {
	good := startIDP(t)
	allowed, inner, port := samePort(t, "127.0.0.2", "127.0.0.1")
	issuer := "https://example.com:" + port // a name in httptest's certificate
	serve := func(l net.Listener, h http.Handler) *httptest.Server {
		srv := httptest.NewUnstartedServer(h)
		_ = srv.Listener.Close()
		srv.Listener = l
		srv.Config.SetKeepAlivesEnabled(false) // each request looks the name up
		srv.StartTLS()
		t.Cleanup(srv.Close)
		return srv
	}
	srv := serve(allowed, hostile{keys: good.JWKS()}.handler(issuer))
	serve(inner, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the other network was reached") }))
	cert := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}))

	for name, test := range map[string]struct {
		answers [][4]byte
		private bool
	}{
		"an address that stays":           {[][4]byte{{127, 0, 0, 2}}, false},
		"another address for the keys":    {[][4]byte{{127, 0, 0, 2}, {127, 0, 0, 1}}, true},
		"another address at once":         {[][4]byte{{127, 0, 0, 1}, {127, 0, 0, 2}}, true},
		"the metadata service afterwards": {[][4]byte{{127, 0, 0, 2}, {169, 254, 169, 254}}, true},
	} {
		t.Run(name, func(t *testing.T) {
			names := resolveWith(t, test.answers...)
			s, err := newSource(known{Issuer: Issuer{IssuerURL: issuer, ClientID: "c", Type: "email", CACert: cert}},
				Options{PrivateNetworks: []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32")}, Logger: discard})
			if err != nil {
				t.Fatal(err)
			}
			defer s.client.CloseIdleConnections()
			_, err = s.keys.fetchOnce(t.Context())
			if refused := err != nil && strings.Contains(err.Error(), errPrivate.Error()); refused != test.private || !test.private && err != nil {
				t.Errorf("err %v", err)
			}
			if names.asked.Load() == 0 {
				t.Error("the name was not looked up")
			}
		})
	}
}
