package demo

import (
	"errors"
	"net"
	"syscall"
	"testing"
)

// TestListenAt: a port that is chosen is none of those that the system gives to
// whoever asks for any; one that is asked for is taken, or it is an error.
func TestListenAt(t *testing.T) {
	l, err := listenAt("")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if port := l.Addr().(*net.TCPAddr).Port; port < firstPort || port > lastPort {
		t.Errorf("port %d", port)
	}
	if again, err := listenAt(l.Addr().String()); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("%v, %v", again, err)
	}
	for _, address := range []string{"0.0.0.0:0", "localhost:0", "127.0.0.2:0", "8443", "127.0.0.1:x"} {
		if other, err := listenAt(address); err == nil {
			t.Errorf("%s: %v", address, other.Addr())
		}
	}
}
