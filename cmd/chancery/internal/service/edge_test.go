package service

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/netutil"
)

// TestSilentConnections: a thousand connections that send nothing, or not
// enough, keep nobody from an answer. The service's own limits are so long that
// all of them are open still when the answer comes.
func TestSilentConnections(t *testing.T) {
	const each = 250
	e := newEdge(t, limits{header: 5 * time.Minute, read: 5 * time.Minute, write: 5 * time.Minute, idle: 5 * time.Minute})
	began := time.Now()
	var open sync.WaitGroup
	for name, dial := range e.kinds() {
		for range 4 {
			open.Go(func() {
				for range each / 4 {
					if _, err := dial(); err != nil {
						t.Errorf("%s: %v", name, err)
						return
					}
				}
			})
		}
	}
	open.Wait()
	client := &http.Client{Timeout: 2 * time.Minute, Transport: &http.Transport{TLSClientConfig: anyServer}}
	defer client.CloseIdleConnections()
	resp, err := client.Get("https://" + e.address + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("status %d beside them", resp.StatusCode)
	}
	t.Logf("%d connections and an answer within %v", len(e.connections), time.Since(began))
}

// TestSilentConnectionsEnd: they are cut off when their time is over, and what
// the server says before is no fault of its own. The times are shorter than the
// service's.
func TestSilentConnectionsEnd(t *testing.T) {
	e := newEdge(t, limits{header: time.Second, read: 2 * time.Second, write: 2 * time.Second, idle: 2 * time.Second})
	for name, dial := range e.kinds() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for {
				c, err := dial()
				if err != nil { // on a slow machine it is cut off already
					t.Logf("%v", err)
					return
				}
				_ = c.SetReadDeadline(time.Now().Add(2 * time.Minute))
				status, err := firstStatus(c)
				if errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatal("the connection is still open")
				}
				if strings.HasPrefix(status, "5") && status != "501" { // no such method
					t.Errorf("status %s", status)
				}
				// A body has to have ended before it was whole: unless the machine was so
				// slow that the request did not even begin.
				if name != halfBody || e.halves.Load() > 0 {
					return
				}
			}
		})
	}
}

// edge is the service's server, without a service behind it, and connections to
// it.
type edge struct {
	address string
	halves  atomic.Int64 // bodies that ended before they were whole

	mu          sync.Mutex
	connections []net.Conn
}

func newEdge(t *testing.T, l limits) *edge {
	t.Helper()
	e := &edge{}
	logger := slog.New(slog.DiscardHandler)
	s := &Service{log: logger}
	s.echo = s.newEcho()
	s.registerHealth()
	server := newServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			if _, err := io.ReadAll(r.Body); err != nil {
				e.halves.Add(1)
			}
		}
		s.echo.ServeHTTP(w, r)
	}), l, logger)
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e.address = plain.Addr().String()
	key, certificate := (&issuer{t: t}).certificate("edge", 1, nil, nil)
	tlsListener := tls.NewListener(netutil.LimitListener(plain, maxConnections), &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{certificate.Raw}, PrivateKey: key}}, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"},
	})
	served := make(chan error, 1)
	go func() { served <- server.Serve(tlsListener) }()
	t.Cleanup(func() {
		_ = server.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
		for _, c := range e.connections {
			_ = c.Close()
		}
	})
	return e
}

// anyServer trusts every server: whose it is does not matter here.
var anyServer = &tls.Config{InsecureSkipVerify: true}

// halfBody is the kind of connection that sends half of a body.
const halfBody = "half of a body"

// kinds are the ways to say nothing or not enough. What they open is closed at
// the end of the test.
func (e *edge) kinds() map[string]func() (net.Conn, error) {
	kept := func(c net.Conn, err error) (net.Conn, error) {
		if err != nil {
			return nil, err
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		e.connections = append(e.connections, c)
		return c, nil
	}
	send := func(text string) func() (net.Conn, error) {
		return func() (net.Conn, error) {
			c, err := tls.Dial("tcp", e.address, anyServer)
			if err == nil {
				_, err = io.WriteString(c, text)
			}
			return kept(c, err)
		}
	}
	return map[string]func() (net.Conn, error){
		"nothing":         func() (net.Conn, error) { return kept(net.Dial("tcp", e.address)) },
		"a handshake":     send(""),
		"half a header":   send("POST /healthz HTTP/1.1\r\nHost: x\r\nX-"),
		halfBody:          send("POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"),
		"one and no more": send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"),
	}
}

// firstStatus reads a connection to its end and returns the status of the first
// answer, or nothing.
func firstStatus(c net.Conn) (status string, err error) {
	lines := bufio.NewReader(c)
	line, err := lines.ReadString('\n')
	if err == nil {
		_, _ = fmt.Sscanf(line, "HTTP/1.1 %s", &status)
		_, err = io.Copy(io.Discard, lines)
	}
	return status, err
}
