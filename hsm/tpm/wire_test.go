package tpm_test

import (
	"bytes"
	"crypto/ecdsa"
	"encoding/binary"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/tpm"
	"github.com/google/go-tpm/tpm2"
)

// wire is what is between us and the emulator: it records everything and can
// change what the TPM answers.
type wire struct {
	socket string

	mu     sync.Mutex
	seen   []byte
	answer answer // nil lets all through
	asked  map[tpm2.TPMCC]int
}

// answer makes the answer to a command; ask gets it from the TPM.
type answer func(cc tpm2.TPMCC, ask func() []byte) []byte

// newWire lays a wire to the emulator until the test ends.
func newWire(t testing.TB, e *hsmtest.Emulator) *wire {
	t.Helper()
	dir, err := os.MkdirTemp("", "chancery-wire-")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{socket: filepath.Join(dir, "tpm"), asked: map[tpm2.TPMCC]int{}}
	l, err := net.Listen("unix", w.socket)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			w.serve(client, e.Socket()) // one at a time, as the emulator does
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
		_ = os.RemoveAll(dir)
	})
	return w
}

// serve carries one connection until either end closes.
func (w *wire) serve(client net.Conn, emulator string) {
	defer func() { _ = client.Close() }()
	device, err := net.Dial("unix", emulator)
	if err != nil {
		return
	}
	defer func() { _ = device.Close() }()
	for {
		command, err := readMessage(client)
		if err != nil {
			return
		}
		w.mu.Lock()
		response := w.respond(device, command)
		w.mu.Unlock()
		if _, err := client.Write(response); err != nil || len(response) < 10 {
			return
		}
	}
}

// respond answers one command, with nil if the wire breaks. The caller holds mu.
func (w *wire) respond(device net.Conn, command []byte) []byte {
	cc := tpm2.TPMCC(binary.BigEndian.Uint32(command[6:]))
	w.asked[cc]++
	w.seen = append(w.seen, command...)
	ask := func() []byte {
		if _, err := device.Write(command); err != nil {
			return nil
		}
		response, err := readMessage(device)
		if err != nil {
			return nil
		}
		w.seen = append(w.seen, response...)
		return response
	}
	if w.answer == nil {
		return ask()
	}
	return w.answer(cc, ask)
}

// readMessage reads a command or a response.
func readMessage(r io.Reader) ([]byte, error) {
	header := make([]byte, 10)
	if _, err := io.ReadFull(r, header); err != nil {
		return nil, err
	}
	message := make([]byte, binary.BigEndian.Uint32(header[2:]))
	copy(message, header)
	_, err := io.ReadFull(r, message[10:])
	return message, err
}

// set changes what happens to answers, and forgets what was asked.
func (w *wire) set(to answer) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.answer = to
	clear(w.asked)
}

// count says how often a command was seen since set.
func (w *wire) count(cc tpm2.TPMCC) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.asked[cc]
}

// failing answers the next n commands of this kind with a code, without asking
// the TPM.
func failing(of tpm2.TPMCC, code tpm2.TPMRC, n int) answer {
	return func(cc tpm2.TPMCC, ask func() []byte) []byte {
		if cc != of || n == 0 {
			return ask()
		}
		n--
		return binary.BigEndian.AppendUint32([]byte{0x80, 0x01, 0, 0, 0, 10}, uint32(code))
	}
}

// openWire returns a token behind a wire, and a key of it.
func openWire(t *testing.T) (*wire, *tpm.Token, hsm.Key, tpm.Config) {
	t.Helper()
	e := hsmtest.SWTPM(t)
	w := newWire(t, e)
	cfg := e.Config(t)
	cfg.Device = w.socket
	token := open(t, cfg)
	return w, token, hsmtest.NewKey(t, token, "key", hsm.ECDSAP256), cfg
}

// TestSecretsOnTheWire: neither the keys' authorisation value, nor the owner's,
// nor the lockout's, nor a digest, nor randomness is seen between us and the TPM.
func TestSecretsOnTheWire(t *testing.T) {
	w, token, key, cfg := openWire(t)
	digest := hsmtest.RandomID()
	digest = append(digest, hsmtest.RandomID()...)
	if _, err := key.Sign(nil, digest, hsm.ECDSAP256.Hash()); err != nil {
		t.Fatal(err)
	}
	random, err := token.Random(t.Context(), 32)
	if err != nil {
		t.Fatal(err)
	}
	lockout := append([]byte("lockout-"), hsmtest.RandomID()...)
	if err := token.SetLockout(t.Context(), nil, tpm.Lockout{MaxTries: 3, Recovery: time.Hour}, lockout); err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !bytes.Contains(w.seen, key.Public().(*ecdsa.PublicKey).X.Bytes()) { //nolint:staticcheck // the coordinate as the TPM writes it
		t.Error("not even the public key was seen: the wire is not where the commands go")
	}
	for name, secret := range map[string][]byte{"the keys' value": cfg.Auth, "the lockout value": lockout, "a digest": digest, "randomness": random} {
		if bytes.Contains(w.seen, secret) {
			t.Errorf("%s went over the wire", name)
		}
	}
}

// TestWarnings: what the TPM asks to repeat is repeated.
func TestWarnings(t *testing.T) {
	w, _, key, _ := openWire(t)
	for name, code := range map[string]tpm2.TPMRC{
		"RETRY": tpm2.TPMRCRetry, "YIELDED": tpm2.TPMRCYielded, "TESTING": tpm2.TPMRCTesting,
		"NV_RATE": tpm2.TPMRCNVRate, "NV_UNAVAILABLE": tpm2.TPMRCNVUnavailable,
		"RETRY of a resource manager": tpm2.TPMRCRetry | 0xB0000,
	} {
		w.set(failing(tpm2.TPMCCSign, code, 3))
		signs(t, key)
		if n := w.count(tpm2.TPMCCSign); n != 4 {
			t.Errorf("%s: asked %d times, want 4", name, n)
		}
	}
}

// TestRoom: a TPM that has no room for another object gets some of ours out of
// the way; one that still has none is ErrBusy.
func TestRoom(t *testing.T) {
	w, token, key, _ := openWire(t)
	other := hsmtest.NewKey(t, token, "other", hsm.ECDSAP256)
	w.set(failing(tpm2.TPMCCSign, tpm2.TPMRCObjectMemory, -1))
	wants(t, "no room for ever", sign(t.Context(), key), hsm.ErrBusy)
	if n := w.count(tpm2.TPMCCSign); n < 2 || n > 4 {
		t.Errorf("asked %d times, want once for each object out of the way", n)
	}
	w.set(nil)
	signs(t, other)
	signs(t, key)
	w.set(failing(tpm2.TPMCCSign, tpm2.TPMRCObjectMemory, 1))
	signs(t, key)
	w.set(nil)
	signs(t, other)
}

// TestCodes: what the codes of a TPM become, and whether the token lives on.
func TestCodes(t *testing.T) {
	rows := []struct {
		name   string
		code   tpm2.TPMRC
		want   error // nil: the one retry succeeds
		health error
	}{
		{"a session that is not there", tpm2.TPMRCReferenceS0, nil, nil},
		{"an object that is not there", tpm2.TPMRCReferenceH0, nil, nil},
		{"failure mode", tpm2.TPMRCFailure, nil, nil},
		{"before startup", tpm2.TPMRCInitialize, nil, nil},
		{"scheme", tpm2.TPMRCScheme + 0x240, hsm.ErrUnsupported, nil},
		{"session memory", tpm2.TPMRCSessionMemory, hsm.ErrBusy, nil},
		{"something else", tpm2.TPMRCType, tpm2.TPMRCType, nil},
		{"a refused value", tpm2.TPMRCBadAuth + 0x900, hsm.ErrPIN, hsm.ErrPIN},
		{"a refused value with DA", tpm2.TPMRCAuthFail + 0x900, hsm.ErrPIN, hsm.ErrPIN},
		{"lockout", tpm2.TPMRCLockout, hsm.ErrPIN, hsm.ErrPIN},
		{"lockout of a resource manager", tpm2.TPMRCLockout | 0xB0000, hsm.ErrPIN, hsm.ErrPIN},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			w, token, key, _ := openWire(t)
			w.set(failing(tpm2.TPMCCSign, row.code, 1))
			wants(t, "sign", sign(t.Context(), key), row.want)
			wants(t, "health", token.Err(), row.health)
			before := w.count(tpm2.TPMCCSign)
			if row.health != nil {
				wants(t, "sign again", sign(t.Context(), key), row.health)
				if after := w.count(tpm2.TPMCCSign); after != before {
					t.Errorf("the TPM was asked again after %v", row.health)
				}
			}
		})
	}
}

// TestBadResponses: whatever comes instead of a response, no wrong signature is
// given out, the caller gets ErrLost, and the token recovers.
func TestBadResponses(t *testing.T) {
	w, _, key, _ := openWire(t)
	header := func(tag uint16, size uint32, code uint32) []byte {
		b := binary.BigEndian.AppendUint16(nil, tag)
		return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, size), code)
	}
	rows := map[string]func(response []byte) []byte{
		"nothing":                func([]byte) []byte { return nil },
		"half a header":          func(r []byte) []byte { return r[:5] },
		"a wrong tag":            func(r []byte) []byte { return append([]byte{0, 0}, r[2:]...) },
		"a length of 0":          func([]byte) []byte { return header(0x8001, 0, 0) },
		"a length of 9":          func([]byte) []byte { return header(0x8001, 9, 0) },
		"a length of 4097":       func([]byte) []byte { return append(header(0x8002, 4097, 0), make([]byte, 4087)...) },
		"a length of 4 GiB":      func([]byte) []byte { return header(0x8002, 0xFFFFFFFF, 0) },
		"success without a body": func([]byte) []byte { return header(0x8001, 10, 0) },
		"success with zeros":     func([]byte) []byte { return append(header(0x8002, 110, 0), make([]byte, 100)...) },
		"a flipped bit in the r": func(r []byte) []byte { r[20] ^= 1; return r },
		"a flipped bit in HMAC":  func(r []byte) []byte { r[len(r)-1] ^= 1; return r },
		"a parameter area cut":   func(r []byte) []byte { binary.BigEndian.PutUint32(r[10:], 3); return r },
		"a huge parameter area":  func(r []byte) []byte { binary.BigEndian.PutUint32(r[10:], 1<<31); return r },
	}
	for name, change := range rows {
		w.set(func(cc tpm2.TPMCC, ask func() []byte) []byte {
			if cc != tpm2.TPMCCSign {
				return ask()
			}
			return change(ask())
		})
		wants(t, name, sign(t.Context(), key), hsm.ErrLost)
		w.set(nil)
		until(t, "recovery after "+name, func() bool { return sign(t.Context(), key) == nil })
	}
	// What stands before the next response: that one is lost, and tried again.
	extra := true
	w.set(func(cc tpm2.TPMCC, ask func() []byte) []byte {
		response := ask()
		if extra && cc == tpm2.TPMCCSign {
			extra = false
			response = append(response, 7)
		}
		return response
	})
	signs(t, key)
	signs(t, key)
	if n := w.count(tpm2.TPMCCCreatePrimary); n != 1 {
		t.Errorf("%d new storage keys after a stray octet, want 1", n)
	}
}
