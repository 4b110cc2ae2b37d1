package tpm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The framing of TPM 2.0 Part 1, Section 18 ("Command/Response Structure"): a
// tag of 2 octets, the whole length in 4, and a command or response code in 4.
const (
	headerSize = 10
	// maxMessage bounds a command and a response, in octets. The largest of
	// any TPM that we know is 4096 (TPM_PT_MAX_RESPONSE_SIZE).
	maxMessage = 4096

	tagNoSessions = 0x8001 // TPM_ST_NO_SESSIONS
	tagSessions   = 0x8002 // TPM_ST_SESSIONS
	tagOld        = 0x00C4 // TPM_ST_RSP_COMMAND: what a TPM 1.2 would answer
)

// device carries commands to a TPM and responses back, one at a time. After an
// error it is good for nothing but close.
type device interface {
	// exchange sends command and returns the response, whose header has been
	// checked, before the deadline. The response is valid until the next call.
	exchange(command []byte, deadline time.Time) ([]byte, error)
	// close releases the device. A running exchange ends with an error. It may
	// be called from another goroutine and more than once.
	close()
	// exclusive says that nobody else can be connected to this TPM, so that
	// every transient object and session in it is ours or a leftover.
	exclusive() bool
}

// errMalformed: what came from the TPM is not a response.
var errMalformed = errors.New("malformed response")

// openDevice opens what is at path: a character device of the kernel, or the
// Unix socket of an emulator.
func openDevice(path string) (device, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	switch mode := info.Mode(); {
	case mode&os.ModeSocket != 0:
		conn, err := openSocket(path)
		if err != nil {
			return nil, err
		}
		return &stream{conn: conn}, nil
	case mode&os.ModeCharDevice != 0:
		// Non-blocking, or write would wait for the answer inside the kernel
		// where no deadline reaches it.
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", path, err)
		}
		return newNode(fd)
	}
	return nil, fmt.Errorf("%s is neither a character device nor a socket", path)
}

// openSocket connects to an emulator's socket. It does without package net, which
// the offline tools do not have: this is all that they can connect to. It does
// not wait, a Unix socket accepts or refuses at once.
func openSocket(path string) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket: %w", err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return nil, errors.Join(fmt.Errorf("connect %s: %w", path, err), unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), path), nil
}

// checkHeader checks the first headerSize octets of a response and returns its
// whole length.
func checkHeader(header []byte) (int, error) {
	switch tag := binary.BigEndian.Uint16(header); tag {
	case tagNoSessions, tagSessions, tagOld:
	default:
		return 0, fmt.Errorf("%w: tag %#04x", errMalformed, tag)
	}
	size := binary.BigEndian.Uint32(header[2:])
	if size < headerSize || size > maxMessage {
		return 0, fmt.Errorf("%w: length %d, want %d to %d", errMalformed, size, headerSize, maxMessage)
	}
	return int(size), nil
}

// checkCommand refuses what no TPM could take.
func checkCommand(command []byte) error {
	if len(command) < headerSize || len(command) > maxMessage {
		return fmt.Errorf("command of %d octets, want %d to %d", len(command), headerSize, maxMessage)
	}
	return nil
}

// stream is an emulator's socket. Commands and responses follow one another
// without any further framing.
type stream struct {
	conn *os.File // not blocking, so that deadlines reach it
	buf  [maxMessage]byte
}

func (s *stream) exchange(command []byte, deadline time.Time) ([]byte, error) {
	if err := checkCommand(command); err != nil {
		return nil, err
	}
	if err := s.conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	if _, err := s.conn.Write(command); err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(s.conn, s.buf[:headerSize]); err != nil {
		return nil, err
	}
	size, err := checkHeader(s.buf[:headerSize])
	if err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(s.conn, s.buf[headerSize:size]); err != nil {
		return nil, err
	}
	return s.buf[:size], nil
}

func (s *stream) close() { _ = s.conn.Close() }

// exclusive is true: an emulator serves one connection at a time.
func (s *stream) exclusive() bool { return true }

// node is a character device, /dev/tpmrm0 or /dev/tpm0: one write is one
// command and one read is one response. It stays away from Go's poller, which
// reads at once and takes the empty answer of a busy TPM for an end of file.
type node struct {
	mu    sync.Mutex // held during an exchange and by the end of close
	fd    int        // under mu; -1 when closed
	wake  *os.File   // readable when close has begun
	stop  *os.File   // the other end of wake
	begun sync.Once  // close
	buf   [maxMessage]byte
}

// newNode takes over fd, which is in non-blocking mode.
func newNode(fd int) (*node, error) {
	wake, stop, err := os.Pipe()
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return &node{fd: fd, wake: wake, stop: stop}, nil
}

// close ends a running exchange. The descriptor itself is closed elsewhere:
// the kernel waits there for a command that it has begun.
func (n *node) close() {
	n.begun.Do(func() {
		_ = n.stop.Close()
		go func() {
			n.mu.Lock()
			defer n.mu.Unlock()
			_ = unix.Close(n.fd)
			_ = n.wake.Close()
			n.fd = -1
		}()
	})
}

// exclusive is false: other processes use the TPM of a machine, and flush what
// they leave themselves or have the kernel do it.
func (n *node) exclusive() bool { return false }

func (n *node) exchange(command []byte, deadline time.Time) ([]byte, error) {
	if err := checkCommand(command); err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.fd < 0 {
		return nil, fmt.Errorf("write command: %w", os.ErrClosed)
	}
	written, err := unix.Write(n.fd, command)
	if err != nil {
		return nil, fmt.Errorf("write command: %w", err)
	}
	if written != len(command) {
		return nil, fmt.Errorf("write command: %d of %d octets", written, len(command))
	}
	got, err := n.read(deadline)
	if err != nil {
		return nil, err
	}
	if got < headerSize {
		return nil, fmt.Errorf("%w: %d octets", errMalformed, got)
	}
	size, err := checkHeader(n.buf[:headerSize])
	if err != nil {
		return nil, err
	}
	if size != got {
		return nil, fmt.Errorf("%w: %d octets that say %d", errMalformed, got, size)
	}
	return n.buf[:size], nil
}

// read reads a response once there is one. A kernel may say too early that
// there is; it then gives nothing.
func (n *node) read(deadline time.Time) (int, error) {
	for {
		if err := n.wait(deadline); err != nil {
			return 0, err
		}
		got, err := unix.Read(n.fd, n.buf[:])
		switch {
		case err == nil && got > 0:
			return got, nil
		case err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR):
			return 0, fmt.Errorf("read response: %w", err)
		}
		time.Sleep(time.Millisecond)
	}
}

// wait returns when there may be a response to read.
func (n *node) wait(deadline time.Time) error {
	fds := []unix.PollFd{{Fd: int32(n.fd), Events: unix.POLLIN}, {Fd: int32(n.wake.Fd()), Events: unix.POLLIN}}
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("read response: %w", os.ErrDeadlineExceeded)
		}
		ready, err := unix.Poll(fds, int(left.Milliseconds())+1)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait for response: %w", err)
		case ready == 0:
		case fds[1].Revents != 0:
			return fmt.Errorf("read response: %w", os.ErrClosed)
		case fds[0].Revents&unix.POLLIN != 0:
			return nil
		default:
			return fmt.Errorf("wait for response: poll events %#x", fds[0].Revents)
		}
	}
}
