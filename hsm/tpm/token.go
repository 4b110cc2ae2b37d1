// Package tpm holds private keys in a TPM 2.0.
//
// It promises what package hsm promises, and:
//   - A key cannot leave its TPM and does nothing but sign digests of one hash:
//     fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA, sign;
//     ECDSA with SHA-256 on P-256, with SHA-384 on P-384. Another hash is
//     ErrUnsupported before the TPM is asked. There is no backup: a key is lost
//     with its TPM, so a root belongs in an HSM.
//   - A key is used with Config.Auth only, and that value never goes over the
//     wire: commands are authorised by HMAC in a session salted to the storage
//     key, in which digests, new keys' secrets and randomness are encrypted.
//     A wrong value is tried once (ErrPIN); after it the token refuses all.
//     noDA keeps the key out of the TPM's dictionary-attack lockout, which it
//     could neither cause nor suffer from.
//   - Nothing is left in the TPM: at most three transient objects and one
//     session are ours at a time, and Close flushes them. An emulator's socket
//     is ours alone, so leftovers of a killed process are flushed from it on
//     connecting; a machine's TPM is used through the kernel's resource manager
//     (/dev/tpmrm0), which does that itself.
//   - Every wait ends. One worker serves a bounded line for each hsm.Share
//     (hsm/internal/queue), one whole operation at a time; a response is bounded
//     and checked; an operation that outlives the deadline wedges the token.
//   - A TPM that was reset, or whose connection broke, comes back by itself: the
//     token connects again and loads what is asked for (supervise.go).
//   - No file is ever replaced, and a file is there whole or not at all. A key is
//     destroyed (hsm.Destroyer) with its copies in the TPM and its file.
//
// It trusts the TPM for secrecy and randomness, and the storage key that it
// first sees there: who is between us and the TPM at that time and stays there
// can read along. Attestation shows whether a key is in a TPM whose maker is
// trusted. A signature is verified before it is returned, whoever made it.
//
// Keys are files, NAME.pem in one folder, each with NAME.creation beside it.
// Both are useless without the TPM; they are the only copy of the key.
//
// A TPM knows no PKCS#11 attributes. Evidence and policies use these:
//
//	TOKEN              not stClear: the blob or the handle outlives a power cycle
//	PRIVATE            userWithAuth, and the key file does not say emptyAuth
//	SENSITIVE          true: no TPM command returns a private key in the clear
//	ALWAYS_SENSITIVE   sensitiveDataOrigin
//	EXTRACTABLE        not fixedTPM
//	NEVER_EXTRACTABLE  fixedTPM and sensitiveDataOrigin (neither can change)
//	LOCAL              fixedTPM and sensitiveDataOrigin
//	SIGN               sign
//	DECRYPT, UNWRAP, DERIVE  decrypt (which allows ECDH)
//	MODIFIABLE         false: the attributes are part of the key's Name
//	LABEL, ID          of the key file, in hexadecimal
//
// and beside them each TPMA_OBJECT bit, scheme, Name and parent as "TPM.…". A
// key that another tool made is opened if its attributes satisfy the policy of
// its role, it is bound to ECDSA with its curve's hash, has noDA, and no policy
// by which it could be used without its authorisation value (ErrPolicy).
package tpm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/internal/queue"
	"github.com/google/go-tpm/tpm2/transport"
)

// Config says which TPM to open, and where its key files are.
type Config struct {
	// Device is the absolute path of a character device (/dev/tpmrm0) or of the
	// Unix socket of an emulator (swtpm) that speaks plain TPM commands.
	Device string
	// Dir is the absolute path of the folder of key files. It must exist.
	Dir string
	// Auth is the authorisation value of all keys, 16 octets or more, random.
	// Of more than 32 octets, which is all that a TPM takes, the SHA-256 is
	// used. Open copies it; the caller should clear it.
	Auth []byte
	// OwnerAuth and EndorsementAuth are the values of these hierarchies,
	// usually empty. They are needed to make the storage key (unless it is
	// persistent), to persist a key, and to attest. Open copies them.
	OwnerAuth, EndorsementAuth []byte
	// MaxQueue is how many calls of each hsm.Share may wait; 0 means 256.
	// Beyond it is ErrBusy.
	MaxQueue int
	// Deadline is how long one operation may take before the token is given up
	// as wedged, and how long Open, Close and one attempt to reconnect may
	// take; 0 means 30 s.
	Deadline time.Duration
	// Logger receives loss, recovery and wedging; nil discards them.
	Logger *slog.Logger
}

// The limits of Config.
const (
	defaultQueue    = 256
	defaultDeadline = 30 * time.Second
	minAuth         = 16
	maxAuth         = sha256.Size // of a key whose Name is a SHA-256: Part 1, Section 19.6.4
)

// ErrOpen: this process has the token open already.
var ErrOpen = errors.New("token is open already")

// withDefaults checks c, fills in what is zero and copies the secrets.
func (c Config) withDefaults() (Config, error) {
	if c.MaxQueue < 0 || c.Deadline < 0 {
		return c, errors.New("negative limit")
	}
	for _, path := range []string{c.Device, c.Dir} {
		if err := clean(path); err != nil {
			return c, fmt.Errorf("%.80q: %w", path, err)
		}
	}
	if len(c.Auth) < minAuth {
		return c, fmt.Errorf("authorisation value of %d octets, want %d or more: %w", len(c.Auth), minAuth, hsm.ErrPIN)
	}
	if c.MaxQueue == 0 {
		c.MaxQueue = defaultQueue
	}
	if c.Deadline == 0 {
		c.Deadline = defaultDeadline
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	c.Auth = authValue(c.Auth)
	c.OwnerAuth, c.EndorsementAuth = bytes.Clone(c.OwnerAuth), bytes.Clone(c.EndorsementAuth)
	return c, nil
}

// authValue returns what the TPM gets to know as a key's authValue.
func authValue(auth []byte) []byte {
	if len(auth) > maxAuth {
		sum := sha256.Sum256(auth)
		return sum[:]
	}
	return bytes.Clone(auth)
}

// Token is an open TPM with a folder of key files. It implements hsm.Token and
// is safe for concurrent use.
type Token struct {
	cfg    Config
	uri    uri
	files  folder
	log    *slog.Logger
	queue  *queue.Queue
	claim  string             // under which this token is in opened
	ctx    context.Context    // ends when the token is closed
	cancel context.CancelFunc // of ctx
	// retryWait is how long a call waits to be tried again.
	retryWait time.Duration

	// gate holds one: whoever took it has the TPM to himself. The worker takes
	// it for an operation, the supervisor to connect, Close for good.
	gate chan struct{}

	mu   sync.Mutex
	conn *connection   // nil while there is none; used by the holder of gate alone
	info hsm.TokenInfo // as of the last connection
	back chan struct{} // not nil while reconnecting; closed when that ends
	dead error         // an ErrPIN after which the TPM is not asked again
	// buried are the Names of keys that were destroyed: a key that is open has
	// its file's octets in memory.
	buried map[string]bool
}

var _ hsm.Token = (*Token)(nil)

// opened are the tokens of this process, by what no two may share.
var opened = struct {
	sync.Mutex
	claims map[string]bool
}{claims: map[string]bool{}}

// Open connects to the TPM. It changes nothing there, and tries no
// authorisation value: a wrong one shows when a key is opened. Errors:
// ErrNotFound (no such device or folder), ErrOpen, ErrPIN (Auth is too short),
// ErrURI, ErrLost, ErrUnsupported.
func Open(ctx context.Context, cfg Config) (*Token, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("open TPM: %w", err)
	}
	u := uri{dir: cfg.Dir, device: cfg.Device}
	t := &Token{
		cfg: cfg, uri: u, files: folder{cfg.Dir},
		log: cfg.Logger.With("token", u.String()), gate: make(chan struct{}, 1), retryWait: defaultRetryWait,
	}
	if err := t.open(ctx); err != nil {
		return nil, fmt.Errorf("open %s: %w", u, err)
	}
	return t, nil
}

func (t *Token) open(ctx context.Context) error {
	if info, err := os.Stat(t.cfg.Dir); err != nil || !info.IsDir() {
		return fmt.Errorf("%w: no folder of key files (%w)", hsm.ErrNotFound, err)
	}
	if err := t.claimDevice(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, t.cfg.Deadline)
	defer cancel()
	conn, err := connect(ctx, t.cfg)
	if err != nil {
		t.release()
		return err
	}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	t.conn, t.info = conn, conn.info
	t.queue = queue.New(queue.Config{
		Workers: 1, Length: t.cfg.MaxQueue, Deadline: t.cfg.Deadline, OnWedge: t.wedged,
	})
	return nil
}

// claimDevice makes the token this process's only one on its socket, or on its
// device and folder.
func (t *Token) claimDevice() error {
	info, err := os.Stat(t.cfg.Device)
	if err != nil {
		return fmt.Errorf("%w: %w", hsm.ErrNotFound, err)
	}
	real, err := filepath.EvalSymlinks(t.cfg.Device)
	if err != nil {
		return fmt.Errorf("%w: %w", hsm.ErrNotFound, err)
	}
	t.claim = real
	if info.Mode()&os.ModeSocket == 0 {
		t.claim += "\x00" + t.cfg.Dir
	}
	opened.Lock()
	defer opened.Unlock()
	if opened.claims[t.claim] {
		return ErrOpen
	}
	opened.claims[t.claim] = true
	return nil
}

func (t *Token) release() {
	opened.Lock()
	defer opened.Unlock()
	delete(opened.claims, t.claim)
}

// wedged is told by the queue that an operation outlived the deadline. Ending
// the connection ends the operation, whom nobody waits for any more.
func (t *Token) wedged() {
	t.log.Error("token wedged: an operation outlived its deadline", "deadline", t.cfg.Deadline)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.conn != nil {
		t.conn.device.close()
	}
}

// Info describes the TPM as it presented itself at the last connection.
func (t *Token) Info() hsm.TokenInfo {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.info
}

// Err implements hsm.Token. ErrPIN means that the TPM refused Config.Auth for a
// key.
func (t *Token) Err() error {
	if err := t.queue.Err(); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.dead != nil:
		return t.dead
	case t.conn == nil:
		return errReconnecting
	}
	return nil
}

// Close flushes what the token has in the TPM and disconnects. It waits for the
// running operation no longer than the deadline; while that hangs it returns
// ErrLost, having released nothing, and may be called again.
func (t *Token) Close() error {
	t.queue.Close()
	t.cancel()
	t.mu.Lock()
	back := t.back
	t.mu.Unlock()
	if back != nil {
		<-back // at once: the attempt to reconnect has been cancelled
	}
	select {
	case t.gate <- struct{}{}:
		defer func() { <-t.gate }()
	case <-time.After(t.cfg.Deadline):
		return fmt.Errorf("close %s: an operation does not end: %w", t.uri, hsm.ErrLost)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.conn != nil {
		t.conn.close()
		t.conn = nil
	}
	if t.claim != "" {
		t.release()
		t.claim = ""
		clear(t.cfg.Auth)
		clear(t.cfg.OwnerAuth)
		clear(t.cfg.EndorsementAuth)
	}
	return nil
}

// withTPM runs f with the TPM to itself, in share's turn. It is run once more
// if the connection was lost and came back; f must stand that. The commands of f
// go through run, which sorts their errors. f flushes what it makes, also when
// it fails.
func (t *Token) withTPM(ctx context.Context, share hsm.Share, f func(tpm transport.TPM) error) error {
	return t.do(ctx, share, true, func(c *connection) error { return f(c) })
}

// do runs f with the living connection, in share's turn. If that turns out to
// be lost the supervisor connects again, and if again is set do waits for it a
// short while and runs f once more. When it fails f may still be running: what f
// writes must not be read, nor its argument be the caller's memory.
func (t *Token) do(ctx context.Context, share hsm.Share, again bool, f func(*connection) error) error {
	err := t.once(ctx, share, f)
	if !again || !isLost(err) || !t.reconnected(ctx) {
		return err
	}
	return t.once(ctx, share, f)
}

// once is one run of f on the worker.
func (t *Token) once(ctx context.Context, share hsm.Share, f func(*connection) error) error {
	return t.queue.Do(ctx, share, func() error {
		select {
		case t.gate <- struct{}{}:
			defer func() { <-t.gate }()
		default: // the supervisor is connecting
			return errReconnecting
		}
		conn, err := t.living()
		if err != nil {
			return err
		}
		err = f(conn)
		if isLost(err) {
			t.lose(conn, err)
		}
		return err
	})
}

// living returns the connection, or why there is none.
func (t *Token) living() (*connection, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.ctx.Err() != nil:
		return nil, queue.ErrClosed
	case t.dead != nil:
		return nil, t.dead
	case t.conn == nil:
		return nil, errReconnecting
	}
	return t.conn, nil
}

// die makes the token refuse everything from now on.
func (t *Token) die(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.dead == nil {
		t.dead = err
		t.log.Error("token is dead: authorisation value refused", "error", err)
	}
}

// Random returns n octets from the TPM's generator (TPM2_GetRandom, Part 3,
// Section 16.1), encrypted on the way, n from 1 to 1024.
func (t *Token) Random(ctx context.Context, n int) ([]byte, error) {
	if n < 1 || n > 1024 {
		return nil, fmt.Errorf("random: %d octets, want 1 to 1024: %w", n, hsm.ErrUnsupported)
	}
	var random []byte
	err := t.do(ctx, hsm.ShareRest, true, func(c *connection) (err error) {
		random, err = c.random(n)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("random from %s: %w", t.uri, err)
	}
	return random, nil
}

// Keys counts the key files. Keys at persistent handles belong to no folder and
// are not counted.
func (t *Token) Keys(ctx context.Context) (int, error) {
	var n int
	err := t.do(ctx, hsm.ShareRest, true, func(*connection) error {
		labels, err := t.files.labels()
		n = len(labels)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("count keys of %s: %w", t.uri, err)
	}
	return n, nil
}
