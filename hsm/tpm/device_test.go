package tpm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"
)

// nodePair is a node whose other end stands for the kernel: like a character
// device, a socket of this kind keeps one write together for one read.
func nodePair(t *testing.T) (*node, int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fds[1], false); err != nil {
		t.Fatal(err)
	}
	n, err := newNode(fds[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		n.close()
		_ = unix.Close(fds[1])
	})
	return n, fds[1]
}

// message is a response of size octets that says it has told.
func message(size, told int) []byte {
	b := make([]byte, size)
	binary.BigEndian.PutUint16(b, tagNoSessions)
	binary.BigEndian.PutUint32(b[2:], uint32(told))
	return b
}

// TestNode: commands and responses of a character device; a node stays usable
// only as long as its answers are whole.
func TestNode(t *testing.T) {
	rows := []struct {
		name     string
		response []byte
		want     error
	}{
		{"the least", message(10, 10), nil},
		{"the most", message(maxMessage, maxMessage), nil},
		{"shorter than told", message(20, 21), errMalformed},
		{"longer than told", message(21, 20), errMalformed},
		{"too long", message(maxMessage+1, maxMessage+1), errMalformed},
		{"too short", message(10, 10)[:9], errMalformed},
		{"a wrong tag", make([]byte, 10), errMalformed},
	}
	command := message(12, 12)
	for _, row := range rows {
		n, kernel := nodePair(t)
		go func() {
			buf := make([]byte, maxMessage)
			if got, err := unix.Read(kernel, buf); err == nil && bytes.Equal(buf[:got], command) {
				_, _ = unix.Write(kernel, row.response)
			}
		}()
		response, err := n.exchange(command, time.Now().Add(time.Minute))
		if !errors.Is(err, row.want) {
			t.Errorf("%s: error %v, want %v", row.name, err, row.want)
		}
		if err == nil && !bytes.Equal(response, row.response) {
			t.Errorf("%s: another response came", row.name)
		}
	}
	n, _ := nodePair(t)
	for _, bad := range [][]byte{nil, make([]byte, 9), make([]byte, maxMessage+1)} {
		if _, err := n.exchange(bad, time.Now().Add(time.Second)); err == nil {
			t.Errorf("a command of %d octets was sent", len(bad))
		}
	}
}

// TestNodeEnds: an exchange ends at its deadline, and when the node is closed
// elsewhere; a closed node does nothing.
func TestNodeEnds(t *testing.T) {
	n, _ := nodePair(t)
	_, err := n.exchange(message(10, 10), time.Now().Add(20*time.Millisecond))
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("no answer: %v, want a deadline", err)
	}
	n, kernel := nodePair(t)
	if err := unix.Shutdown(kernel, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	if _, err := n.read(time.Now().Add(20 * time.Millisecond)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("nothing to read, and told that there is: %v, want a deadline", err)
	}
	n.mu.Lock() // as exchange does
	go n.close()
	if _, err := n.read(time.Now().Add(time.Minute)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("closed while there is nothing to read: %v, want ErrClosed", err)
	}
	n.mu.Unlock()
	n, kernel = nodePair(t)
	go func() {
		_, _ = unix.Read(kernel, make([]byte, maxMessage)) // the command has come
		n.close()
	}()
	if _, err := n.exchange(message(10, 10), time.Now().Add(time.Minute)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("closed during an exchange: %v, want ErrClosed", err)
	}
	n.close()
	if _, err := n.exchange(message(10, 10), time.Now().Add(time.Minute)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("closed before an exchange: %v, want ErrClosed", err)
	}
}

// TestWarningForEver: a TPM that asks to repeat a command is asked for half of the
// deadline, and is busy then.
func TestWarningForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const deadline = 30 * time.Second
		answer := message(10, 10)
		binary.BigEndian.PutUint32(answer[6:], uint32(tpm2.TPMRCRetry))
		c := &connection{device: fixed{answer}, cfg: Config{Deadline: deadline}}
		began := time.Now() // of the bubble
		if err := c.flush(0x80000000); !errors.Is(err, hsm.ErrBusy) {
			t.Errorf("error %v, want ErrBusy", err)
		}
		if took := time.Since(began); took < deadline/2-time.Second || took > deadline/2 {
			t.Errorf("it was asked for %s, want half of %s", took, deadline)
		}
	})
}

// streamPair is an emulator's socket and the emulator's end of it.
func streamPair(t *testing.T) (client, server *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fds[0]), "client"), os.NewFile(uintptr(fds[1]), "server")
}

// fixed is a device that answers every command with the same octets.
type fixed struct{ response []byte }

func (f fixed) exchange([]byte, time.Time) ([]byte, error) { return bytes.Clone(f.response), nil }
func (f fixed) close()                                     {}
func (f fixed) exclusive() bool                            { return true }

// FuzzExchange: whatever comes over a stream, an exchange gives a response that
// has the length that it says, or an error.
func FuzzExchange(f *testing.F) {
	f.Add(message(10, 10))
	f.Add(message(30, 20))
	f.Add(message(10, 1<<31))
	f.Add([]byte(nil))
	f.Fuzz(func(t *testing.T, octets []byte) {
		client, server := streamPair(t)
		var emulator sync.WaitGroup
		emulator.Go(func() {
			_, _ = io.ReadFull(server, make([]byte, headerSize))
			_, _ = server.Write(octets)
			_ = server.Close()
		})
		s := &stream{conn: client}
		response, err := s.exchange(message(10, 10), time.Now().Add(time.Minute))
		s.close()
		emulator.Wait() // octets are the fuzzer's again when this function returns
		if err == nil && (len(response) < headerSize || int(binary.BigEndian.Uint32(response[2:])) != len(response) || !bytes.HasPrefix(octets, response)) {
			t.Errorf("response of %d octets out of %x", len(response), octets)
		}
	})
}

// FuzzResponse: whatever a TPM answers, the commands that we read answers of end
// with an error or a result, and without a panic.
func FuzzResponse(f *testing.F) {
	f.Add(message(10, 10))
	f.Add(message(200, 200))
	f.Add([]byte{0x80, 2, 0, 0, 0, 30, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{0x80, 1, 0, 0, 0, 27, 0, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 1, 0, 0, 1, 5, 'I', 'B', 'M', 0})
	f.Fuzz(func(t *testing.T, octets []byte) {
		if len(octets) < headerSize || patienceWith(tpm2.TPMRC(binary.BigEndian.Uint32(octets[6:]))) == again {
			return // exchange gives no such; a warning would be repeated for ever
		}
		cfg := Config{Deadline: time.Second, Dir: "/", Auth: make([]byte, 32)}
		c := &connection{device: fixed{octets}, cfg: cfg, srk: tpm2.TPMRHOwner, parents: map[tpm2.TPMHandle]*parent{}, objects: map[string]*object{}}
		_, _ = c.readInfo()
		_, _ = c.handles(0x80000000)
		_, _, _ = c.readPersistent(srkHandle)
		_, _ = c.persistentParent(srkHandle)
		if _, err := c.parent(tpm2.TPMRHOwner); err == nil {
			t.Error("a storage key without a TPM")
		}
		s := &session{handle: 0x02000000, key: make([]byte, 32), nonceTPM: make([]byte, 32)}
		c.salted = s
		if random, err := c.random(16); err == nil {
			t.Errorf("random %x without the session's key", random)
		}
		err := execute(c, commandDictionaryAttackParameters, tpm2.TPMRHLockout, s.with(nil, plain), make([]byte, 12))
		if err == nil {
			t.Error("an answer without the session's key")
		}
	})
}
