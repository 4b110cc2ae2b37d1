// Package rekor is the signature transparency log: a Rekor v2 front end on
// log/tree and log/head.
//
// Data flows one way: a request → strict parsing → checks → the canonical
// leaf → the tree, durable → a published head that covers it → the answer with
// an inclusion proof and that head's checkpoint. Everything that can be
// computed is computed before the leaf is appended, and the client's signature
// is verified once.
//
// The package promises that a leaf is bit for bit what rekor-tiles 2.3.0 would
// log for the same request: verifiers rebuild the leaf from the bundle, so one
// other octet would make a signature that can never be verified. It promises
// that nobody can log a signature that does not verify, that an answer's proof
// leads to the root of the checkpoint in it (checked before it is sent), and
// that tiles never show more than the newest checkpoint covers.
//
// It is a notary: it looks at no certificate's validity, issuer or identity
// unless Config.Roots asks it to admit only what our CA certified.
package rekor

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"golang.org/x/time/rate"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/tree"
)

// Limits of the front end.
const (
	maxBody  = 4 << 20 // octets of a request
	maxEntry = 0xffff  // octets of a leaf: C2SP entry bundles count in uint16
	// Bodies above smallBody hold a DSSE payload; few are read at once, so
	// that large or slow ones cannot take the memory or the slots of others.
	smallBody  = 128 << 10
	largeSlots = 8
	// maxHeld bounds the octets of entry bundles that clients are taking.
	maxHeld = 64 << 20
	// DefaultMaxInFlight is how many entries are worked on at once.
	DefaultMaxInFlight = 512
	// DefaultMaxClients is how many client addresses have a token bucket.
	DefaultMaxClients = 16384
)

// Config is what a Log needs. Tree, Heads, Origin, PublicKey and Now are
// required.
type Config struct {
	Tree  tree.Tree
	Heads head.Publication
	// Origin is the log's name, a bare hostname: first line and signature name
	// of its checkpoints, and the host of its baseUrl in the trusted root. It
	// must not end in " - digits", which would mean Rekor v1.
	Origin string
	// PublicKey is the P-256 key of the heads. Its SPKI hash is the log id.
	PublicKey crypto.PublicKey
	// Roots, if any, are the authorities of the only signers admitted: an
	// entry must carry a certificate that leads to one of them at the time
	// when it became valid. With none, every valid signature is admitted.
	Roots []*x509.Certificate
	// Intermediates complete the way from a certificate to Roots.
	Intermediates []*x509.Certificate
	// Frozen says that the log takes no more entries (405); reads go on.
	Frozen bool
	// MaxInFlight bounds the entries worked on at once; 0 means
	// DefaultMaxInFlight. More get 503 at once.
	MaxInFlight int
	// Rate is how many entries per second one client address may submit, and
	// Burst how many at once; Rate 0 means no limit. IPv6 clients are counted
	// by their /64.
	Rate  rate.Limit
	Burst int
	// Client names the client of a request for the rate limit; nil means its
	// network address. It is for servers behind a proxy.
	Client func(*http.Request) string
	// Replay is how long after its logging a repeated entry is answered with
	// 201 like the first time, for clients that lost the answer; then, and if
	// it is 0, a repeated entry is answered with 409. An entry whose first
	// answer failed on our side is answered with 201 in any case.
	Replay time.Duration
	// Now is the process's clock; it may refuse.
	Now func() (time.Time, error)
	// Logger receives warnings for bad requests and errors for our faults;
	// nil means none.
	Logger *slog.Logger
}

// Log is one Rekor v2 log. It is safe for concurrent use.
type Log struct {
	cfg   Config
	logID [sha256.Size]byte
	small chan struct{} // requests in flight
	large chan struct{} // of those, requests with a large body
	reads *tree.Budget  // answers with entries
	admit *admission
	rates *buckets
	again *replays
}

// New returns the log. It refuses an origin that clients would misread, and a
// key that is not P-256 (every Sigstore client reads P-256).
func New(cfg Config) (*Log, error) {
	logID, err := cfg.check()
	if err != nil {
		return nil, fmt.Errorf("configure Rekor log: %w", err)
	}
	admit, err := newAdmission(cfg.Roots, cfg.Intermediates)
	if err != nil {
		return nil, fmt.Errorf("configure Rekor log: %w", err)
	}
	return &Log{
		cfg:   cfg,
		logID: logID,
		small: make(chan struct{}, cfg.MaxInFlight),
		large: make(chan struct{}, largeSlots),
		reads: tree.NewBudget(maxHeld),
		admit: admit,
		rates: newBuckets(cfg.Rate, cfg.Burst, DefaultMaxClients),
		again: newReplays(cfg.Replay),
	}, nil
}

func (c *Config) check() ([sha256.Size]byte, error) {
	var logID [sha256.Size]byte
	switch {
	case c.Tree == nil || c.Heads == nil || c.PublicKey == nil || c.Now == nil:
		return logID, errors.New("tree, heads, public key and clock are required")
	case c.MaxInFlight < 0 || c.Rate < 0 || c.Burst < 0 || c.Replay < 0:
		return logID, errors.New("negative limit")
	}
	if err := checkOrigin(c.Origin); err != nil {
		return logID, err
	}
	if alg, err := hsm.AlgorithmOf(c.PublicKey); err != nil || alg != hsm.ECDSAP256 {
		return logID, errors.New("the key is not ECDSA P-256")
	}
	if c.MaxInFlight == 0 {
		c.MaxInFlight = DefaultMaxInFlight
	}
	if c.Client == nil {
		c.Client = remoteHost
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return hsm.SPKIHash(c.PublicKey)
}

// LogID returns the SHA-256 of the key's SubjectPublicKeyInfo, the logId.keyId
// of entries and of the trusted root.
func (l *Log) LogID() [sha256.Size]byte { return l.logID }

// Origin returns the log's name.
func (l *Log) Origin() string { return l.cfg.Origin }

// remoteHost is the address of the connection without its port.
func remoteHost(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return host
}
