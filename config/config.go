// Package config reads the service's one configuration file.
//
// It promises that a Config that it returns is complete and consistent: every
// field is known, present or defaulted, and within its range; an unknown or
// double key is an error that names the line. It never contains a secret: a
// PIN is a reference (Secret) to a systemd credential or to a file that only
// its owner can read.
//
// What the ceremony has said already need not be said again: the URL and the
// shards come from its outputs, in the trust folder, where the file is silent.
//
// Data flows one way: the file's octets (and the outputs') → Config → cmd, which
// hands each package what it needs. Nothing but cmd imports this package.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/chancery-ca/chancery/ca/identity"
	"github.com/chancery-ca/chancery/ca/policy"
	"github.com/chancery-ca/chancery/hsm"
)

// ErrInvalid: the file is not a configuration. The text says where and why.
var ErrInvalid = errors.New("invalid configuration")

// maxFile bounds the file, in octets.
const maxFile = 1 << 20

// Config is the whole configuration of `chancery serve`.
type Config struct {
	// Version is 1.
	Version int `yaml:"version"`
	// Only is "" for the whole service, or OnlyCT.
	Only string `yaml:"only"`
	// URL is the service's public base URL, https, without a path or a final
	// slash. Certificates and trust files name it. Default: that of the
	// ceremony's signing configuration.
	URL string `yaml:"url"`
	// Listen is the address of the one TLS listener, HOST:PORT.
	Listen string `yaml:"listen"`
	// Operator is the address of a plain HTTP listener for who runs the service
	// (metrics, status), HOST:PORT, of which HOST is a loopback address; "" = none.
	Operator string `yaml:"operator"`
	// TLS is the server's own certificate.
	TLS TLS `yaml:"tls"`
	// State is the directory of the logs and their anchors.
	State string `yaml:"state"`
	// Trust is the directory of the ceremony's outputs: keys.yaml, chain.pem,
	// tsa-chain.pem and the client files.
	Trust string `yaml:"trust"`
	// Tokens says how to log in to the tokens that keys.yaml names.
	Tokens map[string]Token `yaml:"tokens"`
	// CA is who may have which certificate.
	CA CA `yaml:"ca"`
	// CT is the current shard of the Certificate Transparency log, Rekor that
	// of the signature log.
	CT    CT    `yaml:"ct"`
	Rekor Rekor `yaml:"rekor"`
	// TSA is the timestamp authority.
	TSA TSA `yaml:"tsa"`
}

// OnlyCT makes a service that is a CT log and nothing else, for CAs elsewhere:
// those whose roots are in CT.Roots. It has no ca, rekor and tsa section.
const OnlyCT = "ct"

// TLS names PEM files. The key's file must be readable by its owner alone.
type TLS struct {
	Certificate string `yaml:"certificate"`
	Key         string `yaml:"key"`
}

// Token says how a token is used. Zero numbers mean the defaults. Whether it is
// a PKCS#11 token or a TPM, and where it is, stands in keys.yaml.
type Token struct {
	// PIN is the user PIN, or of a TPM the auth value of its keys (at least
	// MinAuth octets).
	PIN Secret `yaml:"pin"`
	// Keys is the folder of a TPM's key files, for one whose URI in keys.yaml
	// names none ("tpm2:?device=PATH"); else "".
	Keys string `yaml:"keys"`
	// OwnerAuth and EndorsementAuth are the auth values of a TPM's owner and
	// endorsement hierarchies, if they have one.
	OwnerAuth       Secret `yaml:"owner-auth"`
	EndorsementAuth Secret `yaml:"endorsement-auth"`
	// Sessions is how many signatures the token makes at once, 2 to 1,024;
	// default 16. A TPM makes one at a time whatever it says.
	Sessions int `yaml:"sessions"`
	// Queue is how many callers of each share of the token (tree heads,
	// issuing, timestamps, others) may wait for a session before more are
	// refused, 1 to 100,000; default 1,024.
	Queue int `yaml:"queue"`
	// Deadline is how long the token may take for one operation before it is
	// taken for dead; default 10 s.
	Deadline time.Duration `yaml:"deadline"`
}

// MinAuth is the least length of a TPM's auth value in octets. The keys have no
// dictionary-attack protection, so it must be too long to guess.
const MinAuth = 16

// Counter names an NV counter of a TPM to which a log's anchor is bound.
type Counter struct {
	// Token is a name of Config.Tokens, a TPM.
	Token string `yaml:"token"`
	// Index is the counter's NV index, MinIndex to MaxIndex.
	Index uint32 `yaml:"index"`
}

// The NV indices that are the owner's to give (TCG Registry of Reserved TPM 2.0
// Handles and Localities, Section 2.2.2).
const (
	MinIndex uint32 = 0x01800000
	MaxIndex uint32 = 0x01bfffff
)

// CA configures the certificate authority.
type CA struct {
	// Lifetime of a certificate, 1 to 10 minutes; default 10.
	Lifetime time.Duration `yaml:"lifetime"`
	// Config is the OpenID Connect issuers, in Fulcio's form: oidc-issuers.
	identity.Config `yaml:",inline"`
	// FulcioConfig is a Fulcio configuration file, YAML or JSON, that is read in
	// place of the fields above.
	FulcioConfig string `yaml:"fulcio-config"`
	// Policy says who may have a certificate: the first rule that fits decides,
	// and without one the answer is no. Empty allows every identity.
	Policy []Rule `yaml:"policy"`
	// PrivateNetworks are networks in CIDR form, not of the public Internet,
	// in which issuers may be; without one they are not dialled.
	PrivateNetworks []netip.Prefix `yaml:"private-networks"`
}

// Rule is a rule of the policy: Allow or Deny is its name.
type Rule struct {
	Allow string `yaml:"allow"`
	Deny  string `yaml:"deny"`
	// Issuer, Identity, Claims, Keys and Lifetime are those of policy.Rule.
	Issuer   string            `yaml:"issuer"`
	Identity string            `yaml:"identity"`
	Claims   map[string]string `yaml:"claims"`
	Keys     []string          `yaml:"keys"`
	Lifetime time.Duration     `yaml:"lifetime"`
}

// Rules returns the policy, nil if there is none. The error wraps
// policy.ErrInvalid.
func (c *CA) Rules() (*policy.Policy, error) {
	if len(c.Policy) == 0 {
		return nil, nil
	}
	rules := make([]policy.Rule, len(c.Policy))
	for i, r := range c.Policy {
		rules[i] = policy.Rule{
			Name: r.Allow, Effect: policy.Allow, Issuer: r.Issuer, Identity: r.Identity,
			Claims: r.Claims, Keys: r.Keys, Lifetime: r.Lifetime,
		}
		if r.Deny != "" {
			rules[i].Name, rules[i].Effect = r.Deny, policy.Deny
		}
		if (r.Allow == "") == (r.Deny == "") {
			return nil, fmt.Errorf("%w: rule %d has not one name, in allow or in deny", policy.ErrInvalid, i+1)
		}
	}
	return policy.New(rules)
}

// Log names a shard of a log.
type Log struct {
	// Shard is the shard's name in paths and on disk, [a-z0-9-]{1,64}. Default:
	// that whose key is in keys.yaml, as the ceremony's trusted root names it.
	Shard string `yaml:"shard"`
	// Origin is the first line of its checkpoints. It can never change.
	// Default: for CT HOST[:PORT]/ct/SHARD, for Rekor HOST.
	Origin string `yaml:"origin"`
	// Counter binds the log's anchor to a TPM; nil = to nothing. Each log has
	// one of its own.
	Counter *Counter `yaml:"counter"`
}

// CT is the Certificate Transparency log: a shard of this service, or a log
// elsewhere that is known by its URL and key.
type CT struct {
	Log `yaml:",inline"`
	// Roots are PEM files of certificates to which a submitted chain may lead
	// beside this service's own root: those of CAs elsewhere that use this log.
	Roots []string `yaml:"roots"`
	// Frozen: the log is read and takes no certificate; so none is issued.
	Frozen bool `yaml:"frozen"`
	// LogElsewhere is a log elsewhere. With it this service has no CT log of its
	// own, and none of the fields above.
	LogElsewhere `yaml:",inline"`
	// Others are further logs elsewhere, each with a key of its own: one of
	// all gives the SCT, the next when one does not answer. At most 7.
	Others []LogElsewhere `yaml:"others"`
}

// LogElsewhere is a CT log that is known by its URL and key.
type LogElsewhere struct {
	// URL is the log's base URL, https; Key the PEM file of its public key.
	URL string `yaml:"url"`
	Key string `yaml:"key"`
	// TLSRoots is a PEM file of the authorities of that log's TLS certificate;
	// default: the system's.
	TLSRoots string `yaml:"tls-roots"`
}

// Elsewhere says whether the log is not of this service.
func (c *CT) Elsewhere() bool { return c.LogElsewhere != (LogElsewhere{}) || len(c.Others) > 0 }

// Rekor names a shard of the signature log and says who may write to it.
type Rekor struct {
	Log `yaml:",inline"`
	// Writers is Certified (default) or Anyone.
	Writers Writers `yaml:"writers"`
	// Rate is how many entries per second one client address may submit, 0 to
	// 1,000,000, 0 = no limit; Burst how many at once, default 10.
	Rate  float64 `yaml:"rate"`
	Burst int     `yaml:"burst"`
	// Frozen shards are read and take no entry.
	Frozen bool `yaml:"frozen"`
}

// Writers says whose entries a signature log takes.
type Writers string

// Certified takes entries that carry a certificate of our CA, Anyone takes
// every entry whose signature verifies.
const (
	Certified Writers = "certified"
	Anyone    Writers = "anyone"
)

// TSA configures the timestamp authority.
type TSA struct {
	// Policy is the object identifier in every timestamp, in dotted form.
	Policy string `yaml:"policy"`
}

// Load reads the file at path. Relative paths in it are relative to its folder.
func Load(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open configuration: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("locate configuration: %w", err)
	}
	return Parse(data, dir)
}

// Parse reads a configuration from YAML octets; relative paths in it are taken
// below dir. Every error wraps ErrInvalid.
func Parse(data []byte, dir string) (*Config, error) {
	if len(data) > maxFile {
		return nil, fmt.Errorf("%w: more than %d octets", ErrInvalid, maxFile)
	}
	c := new(Config)
	dec := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict())
	if err := dec.Decode(c); errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: nothing in it", ErrInvalid)
	} else if err != nil {
		// Without the lines around the fault: somebody may have put a PIN there.
		return nil, fmt.Errorf("%w: %s", ErrInvalid, yaml.FormatError(err, false, false))
	}
	if err := dec.Decode(new(any)); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: more than one document", ErrInvalid)
	}
	c.resolve(dir)
	if err := c.CA.readFulcio(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	c.CA.resolve(dir)
	if err := c.finish(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return c, nil
}

// resolve makes relative paths absolute.
func (c *Config) resolve(dir string) {
	paths := []*string{&c.TLS.Certificate, &c.TLS.Key, &c.State, &c.Trust, &c.CT.Key, &c.CT.TLSRoots, &c.CA.FulcioConfig}
	for i := range c.CT.Roots {
		paths = append(paths, &c.CT.Roots[i])
	}
	for i := range c.CT.Others {
		paths = append(paths, &c.CT.Others[i].Key, &c.CT.Others[i].TLSRoots)
	}
	for _, path := range paths {
		if *path != "" && !filepath.IsAbs(*path) {
			*path = filepath.Join(dir, *path)
		}
	}
	for name, token := range c.Tokens {
		for _, secret := range []*Secret{&token.PIN, &token.OwnerAuth, &token.EndorsementAuth} {
			secret.resolve(dir)
		}
		if token.Keys != "" && !filepath.IsAbs(token.Keys) {
			token.Keys = filepath.Join(dir, token.Keys)
		}
		c.Tokens[name] = token
	}
}

// resolve makes the paths of issuers absolute, also those of a Fulcio
// configuration file.
func (c *CA) resolve(dir string) {
	for url, issuer := range c.OIDCIssuers {
		for _, path := range []*string{&issuer.KeysFile, &issuer.DiscoveryFile} {
			if *path != "" && !filepath.IsAbs(*path) {
				*path = filepath.Join(dir, *path)
			}
		}
		c.OIDCIssuers[url] = issuer
	}
}

// finish fills in defaults and checks every field.
func (c *Config) finish() error {
	if c.Version != 1 {
		return fmt.Errorf("version: %d, want 1", c.Version)
	}
	if err := c.defaultURL(); err != nil {
		return err
	}
	host, err := checkURL(c.URL)
	if err != nil {
		return err
	}
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	if err := checkOperator(c.Operator); err != nil {
		return fmt.Errorf("operator: %w", err)
	}
	for name, value := range map[string]string{
		"tls.certificate": c.TLS.Certificate, "tls.key": c.TLS.Key, "state": c.State, "trust": c.Trust,
	} {
		if value == "" {
			return fmt.Errorf("%s: missing", name)
		}
	}
	if err := c.finishTokens(); err != nil {
		return err
	}
	if !c.CT.Elsewhere() {
		if err := c.defaultShard(&c.CT.Log, "ct", hsm.RoleCT); err != nil {
			return err
		}
	}
	if err := c.CT.finish(host); err != nil {
		return err
	}
	if err := c.checkCounters(); err != nil {
		return err
	}
	switch c.Only {
	case "":
	case OnlyCT:
		return c.checkOnlyCT()
	default:
		return fmt.Errorf("only: %.80q, want nothing or %s", c.Only, OnlyCT)
	}
	if err := c.CA.finish(); err != nil {
		return err
	}
	if err := c.defaultShard(&c.Rekor.Log, "rekor", hsm.RoleRekor); err != nil {
		return err
	}
	if err := c.Rekor.finish((&url.URL{Host: host}).Hostname()); err != nil {
		return err
	}
	return c.TSA.finish()
}

// checkOperator wants an address that only this machine reaches: who reaches it
// is asked for nothing.
func checkOperator(address string) error {
	if address == "" {
		return nil
	}
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	if !ap.Addr().IsLoopback() {
		return fmt.Errorf("%s is not a loopback address", address)
	}
	return nil
}

// checkOnlyCT refuses what a CT log alone would not use.
func (c *Config) checkOnlyCT() error {
	switch {
	case c.CT.Elsewhere():
		return errors.New("only: ct: the CT log is elsewhere (ct.url): nothing is left to serve")
	case len(c.CT.Roots) == 0:
		return errors.New("ct.roots: missing: a CT log alone takes the certificates of CAs elsewhere")
	case c.CA.Lifetime != 0 || len(c.CA.OIDCIssuers) > 0 || c.CA.FulcioConfig != "" || len(c.CA.Policy) > 0 || len(c.CA.PrivateNetworks) > 0:
		return errors.New("ca: not with only: ct")
	case c.Rekor != (Rekor{}):
		return errors.New("rekor: not with only: ct")
	case c.TSA != (TSA{}):
		return errors.New("tsa: not with only: ct")
	}
	return nil
}

func (c *Config) finishTokens() error {
	if len(c.Tokens) == 0 {
		return errors.New("tokens: missing")
	}
	for name, t := range c.Tokens {
		if err := t.PIN.check(); err != nil {
			return fmt.Errorf("tokens.%s.pin: %w", name, err)
		}
		if t.Sessions == 0 {
			t.Sessions = 16
		}
		if t.Queue == 0 {
			t.Queue = 1024
		}
		if t.Deadline == 0 {
			t.Deadline = 10 * time.Second
		}
		if t.Sessions < 2 || t.Sessions > 1024 || t.Queue < 1 || t.Queue > 100_000 || t.Deadline < 100*time.Millisecond || t.Deadline > 5*time.Minute {
			return fmt.Errorf("tokens.%s: sessions 2 to 1024, queue 1 to 100000, deadline 100ms to 5m", name)
		}
		c.Tokens[name] = t
	}
	return nil
}

// checkCounters refuses a counter of an unknown token, outside the owner's
// indices, or of two logs.
func (c *Config) checkCounters() error {
	for name, counter := range map[string]*Counter{"ct": c.CT.Counter, "rekor": c.Rekor.Counter} {
		if counter == nil {
			continue
		}
		if _, ok := c.Tokens[counter.Token]; !ok {
			return fmt.Errorf("%s.counter.token: %.80q is not one of tokens", name, counter.Token)
		}
		if counter.Index < MinIndex || counter.Index > MaxIndex {
			return fmt.Errorf("%s.counter.index: %#x, want %#x to %#x", name, counter.Index, MinIndex, MaxIndex)
		}
	}
	if c.CT.Counter != nil && c.Rekor.Counter != nil && *c.CT.Counter == *c.Rekor.Counter {
		return errors.New("ct.counter and rekor.counter are one counter: each log needs its own")
	}
	return nil
}

func (c *CA) finish() error {
	if c.Lifetime == 0 {
		c.Lifetime = 10 * time.Minute
	}
	if c.Lifetime < time.Minute || c.Lifetime > 10*time.Minute || c.Lifetime%time.Second != 0 {
		return fmt.Errorf("ca.lifetime: %s, want whole seconds from 1m to 10m", c.Lifetime)
	}
	if err := c.Config.Validate(); err != nil {
		return fmt.Errorf("ca.oidc-issuers: %w", err)
	}
	if _, err := c.Rules(); err != nil {
		return fmt.Errorf("ca.policy: %w", err)
	}
	for i, r := range c.Policy {
		if r.Lifetime > c.Lifetime {
			return fmt.Errorf("ca.policy: rule %d has a longer lifetime than ca.lifetime", i+1)
		}
	}
	return nil
}

// readFulcio reads the Fulcio configuration file, if there is one.
func (c *CA) readFulcio() error {
	if c.FulcioConfig == "" {
		return nil
	}
	if len(c.OIDCIssuers)+len(c.MetaIssuers)+len(c.CIIssuerMetadata) > 0 {
		return errors.New("ca: fulcio-config stands in place of oidc-issuers, meta-issuers and ci-issuer-metadata")
	}
	f, err := os.Open(c.FulcioConfig)
	if err != nil {
		return fmt.Errorf("ca.fulcio-config: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return fmt.Errorf("ca.fulcio-config: %w", err)
	}
	if len(data) > maxFile {
		return fmt.Errorf("ca.fulcio-config: more than %d octets", maxFile)
	}
	if c.Config, err = identity.ParseConfig(data); err != nil {
		return fmt.Errorf("ca.fulcio-config: %w", err)
	}
	return nil
}

var shardName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$`)

func (l *Log) finish(name, origin string) error {
	if !shardName.MatchString(l.Shard) {
		return fmt.Errorf("%s.shard: %.80q, want 1 to 64 of a-z, 0-9 and inner -", name, l.Shard)
	}
	if l.Origin == "" {
		l.Origin = origin
	}
	if strings.ContainsAny(l.Origin, " \t\r\n+") || len(l.Origin) > 255 {
		return fmt.Errorf("%s.origin: %.80q has white space or +, or is too long", name, l.Origin)
	}
	return nil
}

func (r *Rekor) finish(origin string) error {
	if err := r.Log.finish("rekor", origin); err != nil {
		return err
	}
	if r.Writers == "" {
		r.Writers = Certified
	}
	if r.Burst == 0 {
		r.Burst = 10
	}
	switch {
	case r.Writers != Certified && r.Writers != Anyone:
		return fmt.Errorf("rekor.writers: %.80q, want %s or %s", r.Writers, Certified, Anyone)
	case !(r.Rate >= 0 && r.Rate <= 1e6) || r.Burst < 1 || r.Burst > 1e6:
		return errors.New("rekor: rate 0 to 1000000, burst 1 to 1000000")
	}
	return nil
}

func (c *CT) finish(host string) error {
	if !c.Elsewhere() {
		if slices.Contains(c.Roots, "") {
			return errors.New("ct.roots: an empty name")
		}
		return c.Log.finish("ct", host+"/ct/"+c.Shard)
	}
	if c.Log != (Log{}) || len(c.Roots) > 0 || c.Frozen {
		return errors.New("ct: url, key, tls-roots and others name logs elsewhere; shard, origin, counter, roots and frozen are of a log here")
	}
	if err := c.LogElsewhere.check("ct"); err != nil {
		return err
	}
	if len(c.Others) > 7 {
		return fmt.Errorf("ct.others: %d logs, at most 7", len(c.Others))
	}
	for i := range c.Others {
		if err := c.Others[i].check(fmt.Sprintf("ct.others[%d]", i)); err != nil {
			return err
		}
	}
	return nil
}

func (l *LogElsewhere) check(name string) error {
	u, err := url.Parse(l.URL)
	switch {
	case err != nil || u.Scheme != "https" || u.Hostname() == "" || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || u.User != nil:
		return fmt.Errorf("%s.url: %.200q, want https://HOST[:PORT][/PATH]", name, l.URL)
	case l.Key == "":
		return fmt.Errorf("%s.key: missing: the public key of the log at %[1]s.url", name)
	}
	return nil
}

// defaultPolicy is the timestamp policy of Sigstore's authority, which every
// client accepts.
const defaultPolicy = "1.3.6.1.4.1.57264.2"

var dottedOID = regexp.MustCompile(`^[0-2](\.(0|[1-9][0-9]{0,9})){2,30}$`)

func (t *TSA) finish() error {
	if t.Policy == "" {
		t.Policy = defaultPolicy
	}
	if !dottedOID.MatchString(t.Policy) {
		return fmt.Errorf("tsa.policy: %.80q is not an object identifier", t.Policy)
	}
	return nil
}

// checkURL returns the host[:port] of a base URL.
func checkURL(raw string) (string, error) {
	u, err := url.Parse(raw)
	if err != nil || u.Hostname() == "" || strings.HasSuffix(u.Host, ":") || raw != "https://"+u.Host {
		return "", fmt.Errorf("url: %.200q, want https://HOST[:PORT] and nothing after it", raw)
	}
	return u.Host, nil
}
