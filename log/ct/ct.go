// Package ct is the Certificate Transparency log: a thin RFC 6962 front end on
// log/tree and log/head.
//
// Data flows one way. In this process: the CA's TBS → Promise (the SCT is
// signed; nothing is queued) → Commit with the precertificate (the leaf is
// durable). Over HTTP: a chain → checks → SCT → leaf, durable → answer. Heads
// come from log/head; one hardware signature per head serves get-sth and the
// C2SP checkpoint alike.
//
// The package promises that an SCT leaves it over HTTP only when its leaf is
// durable, that a certificate submitted again gets the SCT that it got the
// first time, without a new signature, and that reads never show more of the
// tree than the newest published head covers. An SCT that Promise returned in
// this process is the caller's to drop if Commit does not succeed.
//
// It is an RFC 6962 log with tile reads, not a static-ct-api log: SCT
// extensions are empty, and the entries of /tile/data have the TileLeaf layout
// of static-ct-api without the leaf_index extension.
//
// It trusts the key and the tree. It trusts nothing in a submitted chain: the
// chain must lead to a configured root, in the order submitted, and expired
// certificates are welcome (a log observes, it does not police).
package ct

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	ctx509 "github.com/google/certificate-transparency-go/x509"
	"github.com/google/certificate-transparency-go/x509util"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/tree"
)

// Limits of the HTTP front end.
const (
	maxBody    = 512 << 10 // octets of an add-chain body
	maxChain   = 10        // certificates of a submitted chain
	maxEntries = 256       // entries of one get-entries answer: one tile
	// maxEntryOctets ends a get-entries answer early: entries are read in
	// pages until the answer holds this many octets.
	maxEntryOctets = 4 << 20
	entryPage      = 32
	// maxHeld bounds the octets of entries in answers that clients are taking.
	maxHeld    = 64 << 20
	maxIssuers = 1024 // issuers remembered for /issuer
	// Larger keys make a verification a denial of service.
	maxRSABits         = 8192
	maxDSABits         = 3072 // FIPS 186-4, with a subgroup of
	maxDSASubgroupBits = 256
	// DefaultMaxInFlight is how many submissions are worked on at once.
	DefaultMaxInFlight = 64
)

// Errors that callers branch on.
var (
	// ErrUnavailable: the clock, the key or the tree refuses for now. No SCT
	// was issued; try again.
	ErrUnavailable = errors.New("log unavailable")
	// ErrConflict: the precertificate is in the log under another SCT, or is
	// not the one that was promised. The SCT must not be used.
	ErrConflict = errors.New("precertificate does not fit the promise")
)

// Config is what a Log needs. Tree, Heads, Key (or Frozen), Roots, Origin and
// Now are required.
type Config struct {
	Tree  tree.Tree
	Heads head.Publication
	// Key signs SCTs. It is the key that signs the heads of Heads: RFC 6962
	// logs have one key.
	Key hsm.Key
	// Frozen is the public key of a log that takes no more entries, in place of
	// Key, which may be gone: nothing is signed, and Register adds reads alone.
	Frozen crypto.PublicKey
	// Roots are the certificates to which submitted chains must lead.
	Roots []*x509.Certificate
	// Issuers are intermediates known from the start, so that /issuer finds
	// them before the first entry is read. Roots need not be repeated.
	Issuers []*x509.Certificate
	// Origin is the first line of checkpoints: HOST[:port]/path in lower case,
	// without a scheme or a final slash.
	Origin string
	// ExtKeyUsages, if any, are those of which a submitted leaf must have one.
	ExtKeyUsages []x509.ExtKeyUsage
	// MaxInFlight bounds the submissions worked on at once over HTTP; 0 means
	// DefaultMaxInFlight. More get 503 at once.
	MaxInFlight int
	// Now is the process's clock; it may refuse.
	Now func() (time.Time, error)
	// Logger receives warnings for bad requests and errors for our faults;
	// nil means none.
	Logger *slog.Logger
}

// Log is one Certificate Transparency log. It is safe for concurrent use.
type Log struct {
	cfg    Config
	logID  [sha256.Size]byte
	roots  *x509util.PEMCertPool
	ekus   []ctx509.ExtKeyUsage
	slots  chan struct{} // submissions in flight
	reads  *tree.Budget  // answers with entries
	answer struct {      // answers that never change
		roots, rootsTag []byte
	}

	mu      sync.RWMutex
	issuers map[[sha256.Size]byte][]byte // by SHA-256 of the DER; guarded by mu
}

// New returns the log. It refuses a key that is not P-256 (RFC 6962, Section
// 2.1.4), an origin that is not a C2SP one, and a configuration without roots.
func New(cfg Config) (*Log, error) {
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("configure CT log: %w", err)
	}
	cfg.Key = latchedKey{cfg.Key, cfg.Heads}
	logID, err := hsm.SPKIHash(cfg.Key.Public())
	if err != nil {
		return nil, fmt.Errorf("configure CT log: %w", err)
	}
	l := &Log{
		cfg:     cfg,
		logID:   logID,
		roots:   x509util.NewPEMCertPool(),
		slots:   make(chan struct{}, cfg.MaxInFlight),
		reads:   tree.NewBudget(maxHeld),
		issuers: make(map[[sha256.Size]byte][]byte),
	}
	for _, eku := range cfg.ExtKeyUsages {
		l.ekus = append(l.ekus, ctx509.ExtKeyUsage(eku))
	}
	for _, root := range cfg.Roots {
		cert, err := ctx509.ParseCertificate(root.Raw)
		if ctx509.IsFatal(err) {
			return nil, fmt.Errorf("configure CT log: read root %q: %w", root.Subject, err)
		}
		l.roots.AddCert(cert)
		l.learn(root.Raw)
	}
	for _, issuer := range cfg.Issuers {
		l.learn(issuer.Raw)
	}
	if err := l.prepare(); err != nil {
		return nil, fmt.Errorf("configure CT log: %w", err)
	}
	return l, nil
}

func (c *Config) check() error {
	if c.Frozen != nil {
		if c.Key != nil {
			return errors.New("a frozen log signs nothing: key and frozen")
		}
		c.Key = frozenKey{public: c.Frozen}
	}
	switch {
	case c.Tree == nil || c.Heads == nil || c.Key == nil || c.Now == nil:
		return errors.New("tree, heads, key and clock are required")
	case len(c.Roots) == 0:
		return errors.New("no accepted roots")
	case c.MaxInFlight < 0:
		return errors.New("negative limit")
	}
	if alg, err := hsm.AlgorithmOf(c.Key.Public()); err != nil || alg != hsm.ECDSAP256 {
		return errors.New("the key is not ECDSA P-256")
	}
	if err := checkOrigin(c.Origin); err != nil {
		return err
	}
	if c.MaxInFlight == 0 {
		c.MaxInFlight = DefaultMaxInFlight
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// prepare makes the get-roots answer (RFC 6962, Section 4.7).
func (l *Log) prepare() error {
	var ders [][]byte
	for _, cert := range l.roots.RawCertificates() {
		ders = append(ders, cert.Raw)
	}
	body, err := json.Marshal(map[string][][]byte{"certificates": ders})
	if err != nil {
		return fmt.Errorf("encode roots: %w", err)
	}
	l.answer.roots = append(body, '\n')
	l.answer.rootsTag = etag(l.answer.roots)
	return nil
}

// LogID returns the SHA-256 of the key's SubjectPublicKeyInfo (RFC 6962,
// Section 3.2).
func (l *Log) LogID() [sha256.Size]byte { return l.logID }

// Public returns the key with which SCTs and heads verify.
func (l *Log) Public() crypto.PublicKey { return l.cfg.Key.Public() }

// learn remembers an issuer for /issuer.
func (l *Log) learn(der []byte) [sha256.Size]byte {
	fp := sha256.Sum256(der)
	if l.issuer(fp) != nil {
		return fp
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.issuers) < maxIssuers {
		l.issuers[fp] = append([]byte(nil), der...)
	}
	return fp
}

func (l *Log) issuer(fp [sha256.Size]byte) []byte {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.issuers[fp]
}
