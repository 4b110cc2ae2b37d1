// Package ctlog is a Certificate Transparency log elsewhere, as ca needs it:
// an RFC 6962 log that is known by its URL and its public key.
//
// Data flows one way: precertificate and chain → POST ct/v1/add-pre-chain →
// the answer, bounded and parsed → an SCT in its TLS encoding, which ca
// verifies with the pinned key.
//
// The package promises that a Submit ends: within Config.Timeout, after at
// most two requests, having read at most 64 KiB of each answer. It speaks to
// the configured URL alone: https, no proxy, no redirect. It returns an SCT
// only if that names the pinned key, has no extension beyond 512 octets and
// carries a time within five minutes of this process's clock: a precertificate
// of ours is always new, so another time is a log with a wrong clock, or an
// SCT made before or for something else.
//
// It trusts nobody: the transport's TLS keeps others from seeing what is
// submitted, and the signature of the SCT is what counts. That signature is
// verified once, by ca, before the certificate is signed.
package ctlog

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/cryptobyte"

	"github.com/chancery-ca/chancery/ca"
)

// Limits.
const (
	// DefaultTimeout bounds one Submit, with its second attempt.
	DefaultTimeout = 10 * time.Second
	maxAnswer      = 64 << 10 // octets of an answer
	maxHeaders     = 32 << 10 // octets of its header
	maxExtensions  = 512      // octets; ca refuses an SCT above 1,024
	maxPause       = 5 * time.Second
	maxSkew        = 5 * time.Minute
	// maxConnections to the log; more submissions wait for one of them.
	maxConnections = 64
	// doubt is how long a failure speaks for the log's state: afterwards only
	// another Submit can tell.
	doubt = 10 * time.Second
)

// Errors that callers branch on. What will pass wraps ca.ErrUnavailable.
var (
	// ErrConfig: the URL or the key cannot be a log's.
	ErrConfig = errors.New("log elsewhere: configuration refused")
	// ErrRefused: the log answered that it does not take the precertificate,
	// or redirected.
	ErrRefused = errors.New("log elsewhere refused the precertificate")
	// ErrAnswer: the answer is not an SCT of this log for a new precertificate.
	ErrAnswer = errors.New("log elsewhere gave no usable SCT")
)

var errRedirect = errors.New("redirects are not followed")

// Config is what a Log needs. URL, Key and Now are required.
type Config struct {
	// URL is the log's base URL, to which ct/v1/add-pre-chain is added:
	// https, without query or fragment; a final slash makes no difference.
	URL string
	// Key is the log's public key: ECDSA P-256 (RFC 6962, Section 2.1.4).
	Key crypto.PublicKey
	// Roots are the TLS authorities of the log's server; nil means the
	// system's.
	Roots *x509.CertPool
	// Timeout bounds one Submit; 0 means DefaultTimeout.
	Timeout time.Duration
	// Now is the process's clock; it may refuse.
	Now func() (time.Time, error)
}

// Log is a log elsewhere. It implements ca.Submitter and is safe for
// concurrent use.
type Log struct {
	cfg    Config
	target string // URL of add-pre-chain
	logID  [sha256.Size]byte
	client *http.Client

	mu     sync.Mutex
	failed error     // how the newest Submit failed; guarded by mu
	at     time.Time // when; guarded by mu
}

// New returns the log. It does not connect. Errors: ErrConfig.
func New(cfg Config) (*Log, error) {
	target, err := submissionURL(cfg.URL)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	key, ok := cfg.Key.(*ecdsa.PublicKey)
	switch {
	case !ok || key == nil || key.Curve != elliptic.P256():
		return nil, fmt.Errorf("%w: the key is not ECDSA P-256", ErrConfig)
	case cfg.Now == nil:
		return nil, fmt.Errorf("%w: no clock", ErrConfig)
	case cfg.Timeout < 0:
		return nil, fmt.Errorf("%w: negative timeout", ErrConfig)
	case cfg.Timeout == 0:
		cfg.Timeout = DefaultTimeout
	}
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, fmt.Errorf("%w: encode key: %w", ErrConfig, err)
	}
	return &Log{cfg: cfg, target: target, logID: sha256.Sum256(spki), client: newClient(cfg)}, nil
}

// submissionURL checks a base URL and returns that of add-pre-chain.
func submissionURL(base string) (string, error) {
	u, err := url.Parse(base)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || u.Opaque != "" {
		return "", fmt.Errorf("URL %.200q: want https://HOST[:PORT][/PATH]", base)
	}
	return strings.TrimRight(u.String(), "/") + "/ct/v1/add-pre-chain", nil
}

func newClient(cfg Config) *http.Client {
	dialer := &net.Dialer{Timeout: cfg.Timeout / 2}
	return &http.Client{
		Transport: &http.Transport{
			DialContext:            dialer.DialContext,
			TLSClientConfig:        &tls.Config{RootCAs: cfg.Roots, MinVersion: tls.VersionTLS12},
			TLSHandshakeTimeout:    cfg.Timeout / 2,
			MaxResponseHeaderBytes: maxHeaders,
			MaxConnsPerHost:        maxConnections,
			MaxIdleConnsPerHost:    maxConnections,
			IdleConnTimeout:        time.Minute,
			DisableCompression:     true, // a bounded body stays bounded
			ForceAttemptHTTP2:      true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return errRedirect },
	}
}

// Close lets the connections to the log go. The Log can be used again.
func (l *Log) Close() { l.client.CloseIdleConnections() }

// Submit implements ca.Submitter. A log that answers 429 or 503 with a
// Retry-After of at most five seconds is asked once more. Errors:
// ca.ErrUnavailable (no connection, no answer in time, 429, 5xx, our clock),
// ErrRefused, ErrAnswer.
func (l *Log) Submit(ctx context.Context, precert []byte, chain [][]byte) ([]byte, error) {
	sct, err := l.submit(ctx, precert, chain)
	if err == nil || !errors.Is(ctx.Err(), context.Canceled) { // not the caller's doing
		l.note(err)
	}
	return sct, err
}

// Err returns how the newest Submit failed, for readiness: nil when it
// succeeded, and ten seconds after the failure, since nobody submits to a CA
// that is not ready.
func (l *Log) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.at) > doubt {
		return nil
	}
	return l.failed
}

func (l *Log) note(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed, l.at = err, time.Now()
}

func (l *Log) submit(ctx context.Context, precert []byte, chain [][]byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, l.cfg.Timeout)
	defer cancel()
	body, err := json.Marshal(map[string][][]byte{"chain": append([][]byte{precert}, chain...)})
	if err != nil {
		return nil, fmt.Errorf("encode chain: %w", err)
	}
	got, err := l.post(ctx, body)
	if err != nil {
		return nil, err
	}
	if pause, again := got.retry(); again {
		if err := wait(ctx, pause); err != nil {
			return nil, err
		}
		if got, err = l.post(ctx, body); err != nil {
			return nil, err
		}
	}
	if err := got.check(); err != nil {
		return nil, err
	}
	return l.sct(got.body)
}

// answer is what the log said.
type answer struct {
	status     int
	retryAfter string
	body       []byte
}

func (l *Log) post(ctx context.Context, body []byte) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, l.target, bytes.NewReader(body))
	if err != nil {
		return answer{}, fmt.Errorf("make request: %w", err)
	}
	req.Header.Set("Content-Type", "application/json")
	// A log gives a chain that it knows the SCT of the first time, so a request
	// on a connection that the server has just closed may be sent again. An
	// empty value is not sent.
	req.Header["Idempotency-Key"] = nil
	resp, err := l.client.Do(req)
	switch {
	case errors.Is(err, errRedirect):
		return answer{}, fmt.Errorf("%w: %w", ErrRefused, errRedirect)
	case err != nil:
		return answer{}, fmt.Errorf("%w: %w", ca.ErrUnavailable, err)
	}
	defer func() { _ = resp.Body.Close() }()
	read, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err == nil {
		// A server that sees us hang up may still end its answer in order, and
		// half of it would look whole.
		err = ctx.Err()
	}
	switch {
	case err != nil:
		return answer{}, fmt.Errorf("%w: read answer: %w", ca.ErrUnavailable, err)
	case len(read) > maxAnswer:
		return answer{}, fmt.Errorf("%w: more than %d octets", ErrAnswer, maxAnswer)
	}
	return answer{resp.StatusCode, resp.Header.Get("Retry-After"), read}, nil
}

// retry says whether the log asks to be asked again, and when. Only seconds
// are understood (RFC 9110, Section 10.2.3): a date would compare two clocks.
func (a answer) retry() (pause time.Duration, again bool) {
	if a.status != http.StatusTooManyRequests && a.status != http.StatusServiceUnavailable {
		return 0, false
	}
	seconds, err := strconv.ParseUint(a.retryAfter, 10, 16)
	pause = time.Duration(seconds) * time.Second
	return pause, err == nil && pause <= maxPause
}

// check turns any status but 200 into an error. The log's text is not
// repeated: who reads our log must not be told stories by another's server.
func (a answer) check() error {
	switch {
	case a.status == http.StatusOK:
		return nil
	case a.status == http.StatusTooManyRequests, a.status >= http.StatusInternalServerError:
		return fmt.Errorf("%w: log elsewhere answered %d", ca.ErrUnavailable, a.status)
	}
	return fmt.Errorf("%w: status %d", ErrRefused, a.status)
}

// wait pauses, unless ctx will end before.
func wait(ctx context.Context, pause time.Duration) error {
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) <= pause {
		return fmt.Errorf("%w: log elsewhere asks to wait %v", ca.ErrUnavailable, pause)
	}
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ca.ErrUnavailable, ctx.Err())
	}
}

// addChainAnswer is the JSON of RFC 6962, Section 4.1. The fields are pointers
// where a missing one must not pass for zero.
type addChainAnswer struct {
	Version    *uint8  `json:"sct_version"`
	ID         []byte  `json:"id"`
	Timestamp  *uint64 `json:"timestamp"`
	Extensions string  `json:"extensions"`
	Signature  []byte  `json:"signature"` // a DigitallySigned structure
}

// sct builds the TLS encoding (RFC 6962, Section 3.2) of the answer's SCT.
func (l *Log) sct(body []byte) ([]byte, error) {
	var a addChainAnswer
	if err := json.Unmarshal(body, &a); err != nil {
		return nil, fmt.Errorf("%w: not the JSON of an SCT", ErrAnswer)
	}
	extensions, err := base64.StdEncoding.DecodeString(a.Extensions)
	switch {
	case err != nil || len(extensions) > maxExtensions:
		return nil, fmt.Errorf("%w: extensions", ErrAnswer)
	case a.Version == nil || *a.Version != 0:
		return nil, fmt.Errorf("%w: not version 1", ErrAnswer)
	case !bytes.Equal(a.ID, l.logID[:]):
		return nil, fmt.Errorf("%w: by another log", ErrAnswer)
	case a.Timestamp == nil:
		return nil, fmt.Errorf("%w: no timestamp", ErrAnswer)
	}
	if err := l.checkTime(*a.Timestamp); err != nil {
		return nil, err
	}
	var b cryptobyte.Builder
	b.AddUint8(*a.Version)
	b.AddBytes(a.ID)
	b.AddUint64(*a.Timestamp)
	b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(extensions) })
	b.AddBytes(a.Signature)
	sct, err := b.Bytes()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAnswer, err)
	}
	return sct, nil
}

// checkTime compares the SCT's time, in milliseconds, with our clock.
func (l *Log) checkTime(ms uint64) error {
	now, err := l.cfg.Now()
	if err != nil {
		return fmt.Errorf("read clock: %w: %w", ca.ErrUnavailable, err)
	}
	ours := now.UnixMilli()
	skew := maxSkew.Milliseconds()
	if ours < skew || ms < uint64(ours-skew) || ms > uint64(ours+skew) {
		return fmt.Errorf("%w: its time %d ms is more than %v from ours", ErrAnswer, ms, maxSkew)
	}
	return nil
}
