// Package logtooltest makes the folders of a service whose logs have leaves
// and heads: everything that the log tools look at, with keys in memory in the
// place of the token.
package logtooltest

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	gct "github.com/google/certificate-transparency-go"
	"github.com/google/certificate-transparency-go/tls"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/service"
	"github.com/chancery-ca/chancery/config"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/log/ct"
	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/rekor"
	"github.com/chancery-ca/chancery/log/tree"
)

const configText = `version: 1
url: https://sig.example
listen: 127.0.0.1:0
tls: {certificate: tls.pem, key: tls.key}
state: state
trust: trust
tokens: {online: {pin: "file:pin"}}
ca: {oidc-issuers: {"https://idp.example": {issuer-url: "https://idp.example", client-id: sigstore, type: email}}}
ct: {shard: ct1}
rekor: {shard: log1}
`

// Names of the two logs, and of those that follow them.
const (
	CT        = "ct-ct1"
	Rekor     = "rekor-log1"
	NextCT    = "ct-ct2"
	NextRekor = "rekor-log2"
)

// Service is a service's folder, and its logs while they run.
type Service struct {
	Dir    string
	Config *config.Config
	// Keys are the head keys.
	Keys map[hsm.Role]hsm.Key

	engine *tree.Engine
	// Trees and Heads are the running logs, by name.
	Trees map[string]tree.Tree
	Heads map[string]*head.Publisher
	next  map[string]int
}

// Create makes the configuration, the trust folder and the empty logs in dir.
func Create(dir string) (*Service, error) {
	s := &Service{Dir: dir, Keys: map[hsm.Role]hsm.Key{}, next: map[string]int{}}
	for _, role := range trust.Roles() {
		if !trust.Optional(role) {
			s.Keys[role] = hsmtest.SoftwareKey(hsm.ECDSAP256)
		}
	}
	if err := errors.Join(s.writeTrust(), s.write("chancery.yaml", []byte(configText))); err != nil {
		return nil, err
	}
	var err error
	if s.Config, err = config.Load(filepath.Join(dir, "chancery.yaml")); err != nil {
		return nil, err
	}
	return s, service.Create(context.Background(), s.Config, quiet())
}

func quiet() service.Options { return service.Options{Logger: slog.New(slog.DiscardHandler)} }

// write writes a file and the folder above it.
func (s *Service) write(name string, data []byte) error {
	path := filepath.Join(s.Dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return os.WriteFile(path, data, 0o600)
}

// writeTrust writes what the trust folder has of the keys.
func (s *Service) writeTrust() error {
	ring := &trust.KeyRing{Tokens: map[string]trust.Token{"online": {URI: "pkcs11:token=online", Module: "/nowhere"}}, Keys: map[hsm.Role]trust.Key{}}
	for role, key := range s.Keys {
		spki, err := hsm.SPKIHash(key.Public())
		if err != nil {
			return err
		}
		ring.Keys[role] = trust.Key{Token: "online", URI: "pkcs11:token=online;object=" + string(role), SPKI: spki}
		der, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			return err
		}
		if err := s.write(filepath.Join("trust", string(role)+".pub"), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})); err != nil {
			return err
		}
	}
	text, err := ring.Marshal()
	if err != nil {
		return err
	}
	return s.write(filepath.Join("trust", "keys.yaml"), text)
}

// Rotate gives both logs of a stopped service successors with other keys, as a
// ceremony does: CT and Rekor are old shards then, with their last heads on record.
func (s *Service) Rotate() (err error) {
	old := s.Keys
	s.Keys = maps.Clone(old)
	s.Keys[hsm.RoleCT], s.Keys[hsm.RoleRekor] = hsmtest.SoftwareKey(hsm.ECDSAP256), hsmtest.SoftwareKey(hsm.ECDSAP256)
	text := strings.NewReplacer("shard: ct1", "shard: ct2", "shard: log1", "shard: log2").Replace(configText)
	if err := errors.Join(s.Record(CT, old), s.Record(Rekor, old), s.writeTrust(), s.WriteRoot(old), s.write("chancery.yaml", []byte(text))); err != nil {
		return err
	}
	if s.Config, err = config.Load(filepath.Join(s.Dir, "chancery.yaml")); err != nil {
		return err
	}
	_, _, err = service.Add(context.Background(), s.Config, quiet())
	return err
}

// WriteRoot writes a trusted root with the logs of old keys and of ours.
func (s *Service) WriteRoot(old map[hsm.Role]hsm.Key) error {
	type object = map[string]any
	logs := func(role hsm.Role, url string) (list []object, err error) {
		for i, keys := range []map[hsm.Role]hsm.Key{old, s.Keys} {
			der, e := x509.MarshalPKIXPublicKey(keys[role].Public())
			id := sha256.Sum256(der)
			list, err = append(list, object{
				"baseUrl": fmt.Sprintf("https://sig.example/%s%d", url, i+1), "hashAlgorithm": "SHA2_256", "logId": object{"keyId": id[:]},
				"publicKey": object{"rawBytes": der, "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": object{"start": "2026-01-01T00:00:00Z"}},
			}), errors.Join(err, e)
		}
		return list, err
	}
	signature, err := logs(hsm.RoleRekor, "log/log")
	ct, ctErr := logs(hsm.RoleCT, "ct/ct")
	text, jsonErr := json.Marshal(object{"mediaType": trust.RootMediaType, "tlogs": signature, "ctlogs": ct})
	return errors.Join(err, ctErr, jsonErr, s.write(filepath.Join("trust", "trusted_root.json"), text))
}

// Record puts the anchored head of an old shard where a ceremony puts it.
func (s *Service) Record(name string, old map[hsm.Role]hsm.Key) error {
	role := hsm.RoleCT
	if strings.HasPrefix(name, "rekor-") {
		role = hsm.RoleRekor
	}
	spki, err := hsm.SPKIHash(old[role].Public())
	if err != nil {
		return err
	}
	a, err := head.ReadAnchor(filepath.Join(s.Config.State, "anchor", name+".anchor"))
	if err != nil {
		return err
	}
	last := a.Record.Note
	if role == hsm.RoleCT {
		if last, err = sth(a.Record.Signed); err != nil {
			return err
		}
	}
	return s.write(filepath.Join("trust", trust.LastHeadName(spki)), last)
}

// sth is the answer to get-sth.
func sth(h head.Signed) ([]byte, error) {
	signature := binary.BigEndian.AppendUint16([]byte{4, 3}, uint16(len(h.Signature)))
	return json.Marshal(gct.GetSTHResponse{
		TreeSize: h.Size, Timestamp: uint64(h.Time.UnixMilli()), SHA256RootHash: h.Root[:], TreeHeadSignature: append(signature, h.Signature...),
	})
}

// Copy copies a stopped service to another folder, with its keys.
func (s *Service) Copy(dir string) (*Service, error) {
	if err := os.CopyFS(dir, os.DirFS(s.Dir)); err != nil {
		return nil, err
	}
	c := &Service{Dir: dir, Keys: s.Keys, next: map[string]int{}}
	for name, n := range s.next {
		c.next[name] = n
	}
	var err error
	c.Config, err = config.Load(filepath.Join(dir, "chancery.yaml"))
	return c, err
}

func now() (time.Time, error) { return time.Now(), nil }

// Start opens the logs as the service does.
func (s *Service) Start() (err error) {
	ctx, quiet := context.Background(), slog.New(slog.DiscardHandler)
	s.Trees, s.Heads = map[string]tree.Tree{}, map[string]*head.Publisher{}
	if s.engine, err = tree.Open(ctx, tree.Config{Dir: filepath.Join(s.Config.State, "log"), Now: now, Logger: quiet}); err != nil {
		return err
	}
	for _, l := range service.LogPlaces(s.Config) {
		t, err := s.engine.Tree(ctx, l.Name)
		if err != nil {
			return errors.Join(err, s.Stop())
		}
		newFormat := ct.NewFormat
		if l.Role == hsm.RoleRekor {
			newFormat = rekor.NewFormat
		}
		format, err := newFormat(l.Origin, s.Keys[l.Role].Public())
		if err != nil {
			return errors.Join(err, s.Stop())
		}
		p, err := head.Open(ctx, head.Config{Tree: t, Key: s.Keys[l.Role], Format: format, Anchor: l.Anchor, Now: now, Logger: quiet})
		if err != nil {
			return errors.Join(err, s.Stop())
		}
		s.Trees[l.Name], s.Heads[l.Name] = p.Tree(), p
	}
	return nil
}

// Stop ends the logs as a clean shutdown does.
func (s *Service) Stop() error {
	var errs []error
	for _, p := range s.Heads {
		errs = append(errs, p.Close(context.Background()))
	}
	return errors.Join(append(errs, s.engine.Close(context.Background()))...)
}

// Fill appends n leaves to a running log and waits for a head over them.
func (s *Service) Fill(name string, n int) error {
	first := s.next[name]
	s.next[name] += n
	errs := make(chan error, n)
	var work sync.WaitGroup
	slots := make(chan struct{}, 2048)
	for i := first; i < first+n; i++ {
		slots <- struct{}{}
		work.Go(func() {
			leaf, err := Leaf(name, i)
			if err == nil {
				_, _, err = s.Trees[name].Append(context.Background(), leaf)
			}
			errs <- err
			<-slots
		})
	}
	work.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			return err
		}
	}
	_, err := s.Heads[name].Await(context.Background(), s.Trees[name].Root().Size)
	return err
}

// Leaf returns a leaf of the log's kind: octets that are encoded as they
// should be, of certificates that are none.
func Leaf(name string, i int) (tree.Leaf, error) {
	body := fmt.Appendf(nil, "leaf %d of %s", i, name)
	if strings.HasPrefix(name, "rekor-") {
		return tree.Leaf{Value: body}, nil
	}
	value, err := tls.Marshal(gct.MerkleTreeLeaf{
		Version: gct.V1, LeafType: gct.TimestampedEntryLeafType,
		TimestampedEntry: &gct.TimestampedEntry{Timestamp: uint64(i), EntryType: gct.X509LogEntryType, X509Entry: &gct.ASN1Cert{Data: body}},
	})
	if err != nil {
		return tree.Leaf{}, err
	}
	chain, err := tls.Marshal(gct.CertificateChain{Entries: []gct.ASN1Cert{{Data: fmt.Appendf(nil, "issuer %d", i%3)}}})
	if err != nil {
		return tree.Leaf{}, err
	}
	signature := []byte{0x30, 0x00}
	extra := binary.BigEndian.AppendUint16([]byte{1}, uint16(len(signature)))
	return tree.Leaf{Value: value, Extra: append(append(extra, signature...), chain...), Identity: tree.LeafHash(body)}, nil
}

// Must ends the test on an error.
func Must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// New makes a service of n leaves in each log, stopped.
func New(dir string, n int) (*Service, error) {
	s, err := Create(dir)
	if err != nil {
		return nil, err
	}
	if err := s.Start(); err != nil {
		return nil, err
	}
	return s, errors.Join(s.Fill(CT, n), s.Fill(Rekor, n), s.Stop())
}
