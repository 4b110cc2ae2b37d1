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
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/netutil"
)

// TestSilentConnections: a thousand connections that send nothing, or not
// enough, keep nobody from an answer and are cut off when their time is over. The
// times are shorter than the service's.
func TestSilentConnections(t *testing.T) {
	const each = 250
	short := limits{header: 3 * time.Second, read: 4 * time.Second, write: 4 * time.Second, idle: 5 * time.Second}
	logger := slog.New(slog.DiscardHandler)
	s := &Service{log: logger}
	s.echo = s.newEcho()
	s.registerHealth()
	var failed atomic.Int64
	server := newServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			if _, err := io.ReadAll(r.Body); err != nil {
				failed.Add(1)
			}
		}
		s.echo.ServeHTTP(w, r)
	}), short, logger)
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	certificate := httptest.NewTLSServer(nil)
	certificate.Close()
	l := tls.NewListener(netutil.LimitListener(plain, maxConnections), &tls.Config{
		Certificates: certificate.TLS.Certificates, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"},
	})
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	defer func() {
		_ = server.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	}()

	trust := &tls.Config{InsecureSkipVerify: true} // whose server it is does not matter here
	address := plain.Addr().String()
	shake := func() (net.Conn, error) { return tls.Dial("tcp", address, trust) }
	send := func(text string) func() (net.Conn, error) {
		return func() (net.Conn, error) {
			c, err := shake()
			if err == nil {
				_, err = io.WriteString(c, text)
			}
			return c, err
		}
	}
	kinds := map[string]func() (net.Conn, error){
		"nothing":         func() (net.Conn, error) { return net.Dial("tcp", address) },
		"a handshake":     shake,
		"half a header":   send("POST /healthz HTTP/1.1\r\nHost: x\r\nX-"),
		"half of a body":  send("POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"),
		"one and no more": send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"),
	}
	began := time.Now()
	var open sync.WaitGroup
	var connections []net.Conn
	var mu sync.Mutex
	for name, dial := range kinds {
		for range 4 {
			open.Go(func() {
				for range each / 4 {
					c, err := dial()
					if err != nil { // on a slow machine it may be cut off already
						t.Logf("%s: %v", name, err)
						continue
					}
					mu.Lock()
					connections = append(connections, c)
					mu.Unlock()
				}
			})
		}
	}
	open.Wait()
	if len(connections) < 1000 {
		t.Fatalf("%d connections: this would show nothing", len(connections))
	}
	client := &http.Client{Timeout: edgeLimits.header, Transport: &http.Transport{TLSClientConfig: trust}}
	defer client.CloseIdleConnections()
	resp, err := client.Get("https://" + address + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("status %d beside them", resp.StatusCode)
	}
	t.Logf("%d connections and an answer within %v", len(connections), time.Since(began))

	// Each ends, and what the server says before is no fault of its own.
	deadline := time.Now().Add(short.idle + 20*time.Second)
	for _, c := range connections {
		_ = c.SetReadDeadline(deadline)
		if status, err := firstStatus(c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("a connection is still open")
		} else if strings.HasPrefix(status, "5") && status != "501" { // no such method
			t.Errorf("status %s", status)
		}
		_ = c.Close()
	}
	if n := failed.Load(); n < each/2 {
		t.Errorf("%d half bodies ended, want about %d", n, each)
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
