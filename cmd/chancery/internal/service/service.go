// Package service puts the house together: from one configuration it opens the
// tokens, the logs, the authorities and their routes, and serves them on one
// TLS listener.
//
// It promises an order. At start: tokens and keys (each key by its URI and its
// public key), logs (locked, compared with their anchors; one that contradicts its
// anchor is read-only and the service not ready), authorities
// (certificates compared with keys), and only then the listener. At the end:
// not ready, no new requests, requests in flight answered, heads signed, logs
// drained, tokens logged out. A part that does not fit stops the start; there
// is no reduced service. What is only read is the exception: a shard that has a
// successor and does not verify is not shown, and readiness warns of it.
//
// It trusts the configuration and the trust folder of the ceremony. It is the
// only place where the certificate authority and the logs meet.
package service

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"github.com/labstack/echo/v4"
	"golang.org/x/net/netutil"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"

	"github.com/chancery-ca/chancery/ca"
	"github.com/chancery-ca/chancery/ca/audit"
	"github.com/chancery-ca/chancery/ca/ctlog"
	"github.com/chancery-ca/chancery/ca/identity"
	caserver "github.com/chancery-ca/chancery/ca/server"
	"github.com/chancery-ca/chancery/ca/tsa"
	"github.com/chancery-ca/chancery/ceremony/trust/tuf"
	"github.com/chancery-ca/chancery/config"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/ct"
	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/rekor"
	"github.com/chancery-ca/chancery/log/tree"
)

const (
	// mergeDelay is the CT log's promise: a tree head includes every leaf at
	// most this long after its SCT.
	mergeDelay = 60 * time.Second
	// headInterval is the least time between two heads of a log on which
	// nobody waits.
	headInterval = time.Second
	// drainTime is how long requests in flight and the logs get at shutdown.
	drainTime = 20 * time.Second
	// maxTokens is how many living ID tokens are remembered to count their uses.
	maxTokens = 100_000
	// maxConnections bounds the open connections of the listener.
	maxConnections = 8192
)

// ErrNoLogs: the logs that the configuration names were never created, or
// their files are gone.
var ErrNoLogs = errors.New("logs not found")

// Options are what the configuration file cannot say.
type Options struct {
	Logger *slog.Logger
	// LoopbackHTTP accepts an OpenID provider on http://127.0.0.1, for the
	// demo and tests.
	LoopbackHTTP bool
}

// Service is everything that runs behind the listener.
type Service struct {
	cfg   *config.Config
	log   *slog.Logger
	clock *clock

	tokens   map[string]hsm.Token
	keys     map[hsm.Role]hsm.Key
	identity *identity.Verifier
	audit    *audit.Log
	engine   *tree.Engine
	logs     []openLog // what of the logs is open, in the order of opening
	echo     *echo.Echo
	issuing  *caserver.Server
	grpc     *grpc.Server // nil, as issuing, for a service that is a CT log alone
	// elsewhere are the CT logs if ours is not one of logs, else nil.
	elsewhere *ctlog.Group
	// tuf is nil when the ceremony made no TUF repository.
	tuf *tuf.Mirror
	// crl is the root's list of revoked certificates, nil if there is none.
	crl *x509.RevocationList
	// unreadable are the frozen shards that do not verify.
	unreadable []string

	state readiness
}

// openLog is a tree with its publisher.
type openLog struct {
	name  string
	tree  tree.Tree
	heads *head.Publisher
}

// treeName and anchorPath are the one place that says where a log lives.
func treeName(kind string, l config.Log) string { return kind + "-" + l.Shard }

func logDir(cfg *config.Config) string { return filepath.Join(cfg.State, "log") }

func anchorPath(cfg *config.Config, name string) string {
	return filepath.Join(cfg.State, "anchor", name+".anchor")
}

// Open starts everything but the listener. On error nothing is left open.
func Open(ctx context.Context, cfg *config.Config, opts Options) (*Service, error) {
	s := &Service{
		cfg: cfg, log: opts.Logger, clock: newClock(opts.Logger),
		tokens: map[string]hsm.Token{}, keys: map[hsm.Role]hsm.Key{},
	}
	if err := s.open(ctx, opts); err != nil {
		return nil, errors.Join(err, s.Close(context.WithoutCancel(ctx)))
	}
	return s, nil
}

func (s *Service) open(ctx context.Context, opts Options) error {
	if err := s.openKeys(ctx); err != nil {
		return err
	}
	accepted, err := s.acceptedRoots()
	if err != nil {
		return err
	}
	if s.cfg.Only == config.OnlyCT {
		return s.openAlone(ctx, accepted)
	}
	chain, err := readChain(filepath.Join(s.cfg.Trust, "chain.pem"))
	if err != nil {
		return err
	}
	ctLog, rekorLog, err := s.openLogs(ctx, chain, accepted)
	if err != nil {
		return missing(err)
	}
	source, err := s.certificateLog(ctLog)
	if err != nil {
		return err
	}
	timestamps, err := s.openTSA()
	if err != nil {
		return err
	}
	if err := s.openAudit(timestamps); err != nil {
		return err
	}
	authority, err := s.openCA(ctx, chain, source, opts)
	if err != nil {
		return err
	}
	s.issuing = authority
	s.echo = s.newEcho()
	authority.Register(s.echo)
	s.grpc = s.newGRPC()
	authority.RegisterGRPC(s.grpc)
	timestamps.Register(s.echo.Group(""))
	if ctLog != nil {
		ctLog.Register(s.echo.Group("/ct/" + s.cfg.CT.Shard))
	}
	rekorLog.Register(s.echo.Group(""))
	rekorLog.RegisterReads(s.echo.Group("/log/" + s.cfg.Rekor.Shard))
	if err := s.serveFrozen(ctx, append(chain[len(chain)-1:len(chain):len(chain)], accepted...)); err != nil {
		return err
	}
	if err := s.openCRL(chain); err != nil {
		return err
	}
	if err := s.openTUF(ctx); err != nil {
		return err
	}
	s.registerHealth()
	return nil
}

// missing turns the error of a log that is not there into ErrNoLogs.
func missing(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, tree.ErrNotFound) {
		return fmt.Errorf("%w: %w", ErrNoLogs, err)
	}
	return err
}

// openAlone opens a service that is a CT log and nothing else.
func (s *Service) openAlone(ctx context.Context, accepted []*x509.Certificate) error {
	if err := s.openEngine(ctx); err != nil {
		return missing(err)
	}
	log, err := s.openCT(ctx, accepted, nil)
	if err != nil {
		return missing(fmt.Errorf("open CT log: %w", err))
	}
	s.echo = s.newEcho()
	log.Register(s.echo.Group("/ct/" + s.cfg.CT.Shard))
	if err := s.serveFrozen(ctx, accepted); err != nil {
		return err
	}
	s.registerHealth()
	return nil
}

func (s *Service) openEngine(ctx context.Context) (err error) {
	s.engine, err = tree.Open(ctx, tree.Config{Dir: logDir(s.cfg), Now: s.clock.Now, Logger: s.log})
	if err != nil {
		return fmt.Errorf("open logs: %w", err)
	}
	return nil
}

// openLogs opens the trees and starts their publishers. The CT log is nil when
// it is elsewhere.
func (s *Service) openLogs(ctx context.Context, chain, accepted []*x509.Certificate) (ctLog *ct.Log, rekorLog *rekor.Log, err error) {
	if err := s.openEngine(ctx); err != nil {
		return nil, nil, err
	}
	if !s.cfg.CT.Elsewhere() {
		root := len(chain) - 1
		if ctLog, err = s.openCT(ctx, append(chain[root:root+1:root+1], accepted...), chain[:root]); err != nil {
			return nil, nil, fmt.Errorf("open CT log: %w", err)
		}
	}
	rekorKey := s.keys[hsm.RoleRekor]
	rekorFormat, err := rekor.NewFormat(s.cfg.Rekor.Origin, rekorKey.Public())
	if err != nil {
		return nil, nil, fmt.Errorf("open signature log: %w", err)
	}
	opened, err := s.openLog(ctx, treeName("rekor", s.cfg.Rekor.Log), rekorKey, rekorFormat, rhythm{last: s.cfg.Rekor.Frozen})
	if err != nil {
		return nil, nil, fmt.Errorf("open signature log: %w", err)
	}
	cfg := rekor.Config{
		Tree: opened.tree, Heads: opened.heads, Origin: s.cfg.Rekor.Origin, PublicKey: rekorKey.Public(),
		Frozen: s.cfg.Rekor.Frozen, Rate: rate.Limit(s.cfg.Rekor.Rate), Burst: s.cfg.Rekor.Burst,
		Now: s.clock.Now, Logger: s.log,
	}
	if s.cfg.Rekor.Writers == config.Certified {
		cfg.Roots, cfg.Intermediates = chain[len(chain)-1:], chain[:len(chain)-1]
	}
	rekorLog, err = rekor.New(cfg)
	if err != nil {
		return nil, nil, fmt.Errorf("open signature log: %w", err)
	}
	return ctLog, rekorLog, nil
}

// openCT opens our CT log, which accepts chains to roots; issuers are
// intermediates that it knows from the start.
func (s *Service) openCT(ctx context.Context, roots, issuers []*x509.Certificate) (*ct.Log, error) {
	key := s.keys[hsm.RoleCT]
	format, err := ct.NewFormat(s.cfg.CT.Origin, key.Public())
	if err != nil {
		return nil, err
	}
	cfg, heads := ct.Config{Key: key}, rhythm{interval: headInterval, maxAge: mergeDelay / 2}
	if s.cfg.CT.Frozen {
		cfg, heads = ct.Config{Frozen: key.Public()}, rhythm{last: true}
	}
	opened, err := s.openLog(ctx, treeName("ct", s.cfg.CT.Log), key, format, heads)
	if err != nil {
		return nil, err
	}
	cfg.Tree, cfg.Heads, cfg.Roots, cfg.Issuers = opened.tree, opened.heads, roots, issuers
	cfg.Origin, cfg.Now, cfg.Logger = s.cfg.CT.Origin, s.clock.Now, s.log
	return ct.New(cfg)
}

// rhythm is when a log's heads are signed: as head.Config says, or, for a frozen
// log, once at the start if a leaf is in no head yet, and never again.
type rhythm struct {
	interval, maxAge time.Duration
	last             bool
}

// acceptedRoots reads the roots of CAs elsewhere that our CT log accepts.
func (s *Service) acceptedRoots() (roots []*x509.Certificate, err error) {
	for _, path := range s.cfg.CT.Roots {
		more, err := readChain(path)
		if err != nil {
			return nil, fmt.Errorf("accepted roots of the CT log: %w", err)
		}
		roots = append(roots, more...)
	}
	return roots, nil
}

// openLog opens one tree, starts its publisher, and tells the clock of the
// newest head.
func (s *Service) openLog(ctx context.Context, name string, key hsm.Key, format head.Format, when rhythm) (openLog, error) {
	t, err := s.engine.Tree(ctx, name)
	if err != nil {
		return openLog{}, err
	}
	counter, err := s.counter(ctx, name)
	if err != nil {
		return openLog{}, err
	}
	heads, err := head.Open(ctx, head.Config{
		Tree: t, Key: key, Format: format, Anchor: anchorPath(s.cfg, name), Counter: counter,
		Now: s.clock.Now, MinInterval: when.interval, MaxAge: when.maxAge, Logger: s.log.With("log", name),
	})
	if err != nil {
		return openLog{}, err
	}
	if when.last {
		// What waits for a head gets it before the head is shown as the last.
		if _, err := heads.Await(ctx, heads.Tree().Root().Size); err != nil && !errors.Is(err, head.ErrFork) {
			return openLog{}, errors.Join(fmt.Errorf("sign last head: %w", err), heads.Close(context.WithoutCancel(ctx)))
		}
	}
	s.clock.Observe(heads.Latest().Time)
	opened := openLog{name, heads.Tree(), heads}
	s.logs = append(s.logs, opened)
	return opened, nil
}

// counter opens the counter that the log's anchor is bound to; nil if the
// configuration names none.
func (s *Service) counter(ctx context.Context, name string) (head.Counter, error) {
	for _, place := range LogPlaces(s.cfg) {
		if place.Name != name || place.Counter == nil {
			continue
		}
		ring, err := LoadRing(s.cfg)
		if err != nil {
			return nil, err
		}
		token, err := s.openToken(ctx, place.Counter.Token, ring.Tokens[place.Counter.Token])
		if err != nil {
			return nil, fmt.Errorf("open token %q: %w", place.Counter.Token, err)
		}
		counter, err := OpenCounter(ctx, token, place.Counter)
		if err != nil {
			return nil, fmt.Errorf("open counter: %w", err)
		}
		return counter, nil
	}
	return nil, nil
}

// openCA opens the certificate authority and joins it to the CT log.
func (s *Service) openCA(ctx context.Context, chain []*x509.Certificate, log certificateLog, opts Options) (*caserver.Server, error) {
	rules, err := s.cfg.CA.Rules()
	if err != nil {
		return nil, fmt.Errorf("read policy: %w", err)
	}
	authority, err := ca.New(ca.Config{
		Key: s.keys[hsm.RoleIntermediate], Chain: chain, SCTs: log.here, Submitter: log.elsewhere, LogKey: log.key, LogKeys: log.keys,
		Policy: rules, Uses: identity.NewUses(maxTokens), Audit: s.audit,
		Now: s.clock.Now, Lifetime: s.cfg.CA.Lifetime, Logger: s.log,
	})
	if err != nil {
		return nil, fmt.Errorf("open certificate authority: %w", err)
	}
	s.identity, err = identity.New(ctx, s.cfg.CA.Config, identity.Options{
		LoopbackHTTP: opts.LoopbackHTTP, PrivateNetworks: s.cfg.CA.PrivateNetworks, ReadFile: readBounded,
		Now: s.clock.Now, Logger: s.log,
	})
	if err != nil {
		return nil, fmt.Errorf("open identity issuers: %w", err)
	}
	for _, issuer := range ForEverybody(s.cfg) {
		s.log.Warn("anybody can get a token of this issuer, and without a policy a certificate", "issuer", issuer)
	}
	server, err := caserver.New(caserver.Config{Authority: authority, Identity: s.identity, Logger: s.log})
	if err != nil {
		return nil, fmt.Errorf("open issuance server: %w", err)
	}
	return server, nil
}

// ForEverybody returns the configured issuers of which anybody in the world can
// get a token, if there is no policy that says who of them gets a certificate.
func ForEverybody(cfg *config.Config) []string {
	if len(cfg.CA.Policy) > 0 {
		return nil
	}
	return cfg.CA.ForEverybody()
}

func (s *Service) openTSA() (*tsa.Authority, error) {
	chain, err := readChain(filepath.Join(s.cfg.Trust, "tsa-chain.pem"))
	if err != nil {
		return nil, err
	}
	policy, err := x509.ParseOID(s.cfg.TSA.Policy)
	if err != nil {
		return nil, fmt.Errorf("read timestamp policy: %w", err)
	}
	id, err := asn1OID(policy)
	if err != nil {
		return nil, fmt.Errorf("read timestamp policy: %w", err)
	}
	authority, err := tsa.New(tsa.Config{
		Key: s.keys[hsm.RoleTSA], Chain: chain, Now: s.clock.Now, Policy: id, Logger: s.log,
	})
	if err != nil {
		return nil, fmt.Errorf("open timestamp authority: %w", err)
	}
	return authority, nil
}

// Listen opens the TLS listener that the configuration names.
func (s *Service) Listen() (net.Listener, error) {
	plain, err := net.Listen("tcp", s.cfg.Listen)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	l, err := s.TLS(plain)
	if err != nil {
		return nil, errors.Join(err, plain.Close())
	}
	return l, nil
}

// TLS puts the service's TLS on a listener: TLS 1.2 or newer, HTTP/2 and
// HTTP/1.1, a bounded number of connections.
func (s *Service) TLS(plain net.Listener) (net.Listener, error) {
	pair, err := tls.LoadX509KeyPair(s.cfg.TLS.Certificate, s.cfg.TLS.Key)
	if err != nil {
		return nil, fmt.Errorf("load TLS certificate: %w", err)
	}
	return tls.NewListener(netutil.LimitListener(plain, maxConnections), &tls.Config{
		Certificates: []tls.Certificate{pair},
		MinVersion:   tls.VersionTLS12,
		NextProtos:   []string{"h2", "http/1.1"},
	}), nil
}

// limits bound what a connection may take: in order the time to send the headers
// of a request (and to shake hands), the whole of it, to take the answer, and
// between requests.
type limits struct{ header, read, write, idle time.Duration }

// edgeLimits are those of the listeners.
var edgeLimits = limits{header: 10 * time.Second, read: 60 * time.Second, write: 60 * time.Second, idle: 2 * time.Minute}

func newServer(h http.Handler, l limits, logger *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: l.header,
		ReadTimeout:       l.read,
		WriteTimeout:      l.write,
		IdleTimeout:       l.idle,
		MaxHeaderBytes:    64 << 10,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: 250},
		ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
	}
}

// Serve answers requests on l until ctx ends, then drains: it returns when the
// requests in flight are answered or drainTime is over. Beside l it serves the
// operator's listener if one is configured. It calls up when both listen and the
// service is ready as far as it can be: nobody is told before. Close is the
// caller's.
func (s *Service) Serve(ctx context.Context, l net.Listener, up func()) error {
	stop, err := s.serveOperator()
	if err != nil {
		return errors.Join(err, l.Close())
	}
	defer stop()
	server := newServer(s.Handler(), edgeLimits, s.log)
	failed := make(chan error, 1)
	s.state.set(serving) // before the first request
	go func() { failed <- server.Serve(l) }()
	up()
	select {
	case err := <-failed:
		return fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
	}
	s.state.set(draining)
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
	defer cancel()
	if err := server.Shutdown(drain); err != nil {
		return errors.Join(fmt.Errorf("drain requests: %w", err), server.Close())
	}
	return nil
}

// Handler is the whole service without a listener, for tests and benchmarks.
func (s *Service) Handler() http.Handler { return http.HandlerFunc(s.split) }

// Close signs the last heads, drains the logs and logs out of the tokens. It
// may be called on a service that opened only in part, and once.
func (s *Service) Close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, drainTime)
	defer cancel()
	var errs []error
	for _, l := range s.logs {
		errs = append(errs, l.heads.Close(ctx))
	}
	if s.engine != nil {
		errs = append(errs, s.engine.Close(ctx))
	}
	if s.identity != nil {
		s.identity.Close()
	}
	if s.audit != nil { // it has its last line timestamped: before the tokens
		errs = append(errs, s.audit.Close())
	}
	if s.elsewhere != nil {
		s.elsewhere.Close()
	}
	if s.tuf != nil {
		s.tuf.Close()
	}
	for _, token := range s.tokens {
		errs = append(errs, token.Close())
	}
	return errors.Join(errs...)
}
