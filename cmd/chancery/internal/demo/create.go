package demo

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/google/renameio/v2"

	"github.com/chancery-ca/chancery/ceremony"
	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/service"
	"github.com/chancery-ca/chancery/config"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/pkcs11"
	"github.com/chancery-ca/chancery/hsm/softhsm"
)

// create makes everything in an empty folder; demo.json comes last.
func (d *Demo) create(ctx context.Context) error {
	for _, dir := range []string{string(d.at), d.at.path("pins"), d.at.path("tls")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("create demo folder: %w", err)
		}
	}
	if err := d.createKeys(); err != nil {
		return err
	}
	def, err := d.rehearse(ctx)
	if err != nil {
		return err
	}
	for name, to := range map[string]string{
		"trusted_root.json": d.at.trustedRoot(), "signing_config.v0.2.json": d.at.signingConfig(),
	} {
		if err := copyFile(d.at.path("trust", name), to); err != nil {
			return err
		}
	}
	logs := def.Service.Logs
	d.saved.CT = shard{logs.CT.Shard, logs.CT.Origin}
	d.saved.Rekor = shard{logs.Rekor.Shard, "127.0.0.1"}
	if err := d.writeConfig(); err != nil {
		return err
	}
	cfg, err := config.Load(d.at.config())
	if err != nil {
		return err
	}
	if err := service.Create(ctx, cfg, service.Options{Logger: d.opts.Logger}); err != nil {
		return err
	}
	if err := os.WriteFile(d.at.hello(), []byte("Hello from the Chancery demo.\n"), 0o644); err != nil {
		return fmt.Errorf("write example file: %w", err)
	}
	return d.finish()
}

// createKeys makes the three keys that are files: TLS authority, TLS server,
// identity provider.
func (d *Demo) createKeys() error {
	if err := createTLS(d.at); err != nil {
		return fmt.Errorf("make TLS certificates: %w", err)
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return fmt.Errorf("make identity provider's key: %w", err)
	}
	if err := writeKey(d.at.providerKey(), key); err != nil {
		return fmt.Errorf("write identity provider's key: %w", err)
	}
	return nil
}

// custodians of the demo's TUF repository; two of them have to sign.
var custodians = []string{"c1", "c2", "c3"}

// rehearse makes the tokens and performs the ceremony on them. It returns the
// ceremony's definition.
func (d *Demo) rehearse(ctx context.Context) (def *ceremony.Definition, err error) {
	began := time.Now()
	home, err := softhsm.Create(d.at.tokens())
	if err != nil {
		return nil, err
	}
	tokens, keys := map[string]hsm.Token{}, map[string]hsm.Key{}
	defer func() {
		for _, token := range tokens {
			err = errors.Join(err, token.Close())
		}
	}()
	for _, name := range append([]string{ceremony.DemoRootToken, ceremony.DemoOnlineToken}, custodians...) {
		if tokens[name], err = d.newToken(ctx, home, name); err != nil {
			return nil, err
		}
	}
	parameters := ceremony.DemoParameters{URL: d.url, Issuers: []string{d.saved.Issuer}, Now: time.Now()}
	for _, name := range custodians {
		if keys[name], err = custodianKey(ctx, tokens[name]); err != nil {
			return nil, fmt.Errorf("make key of custodian %s: %w", name, err)
		}
		ref := keys[name].Ref()
		parameters.Custodians = append(parameters.Custodians, ceremony.TUFSigner{ID: name, Key: ref.URI, SPKISHA256: hex.EncodeToString(ref.SPKI[:])})
	}
	if def, err = ceremony.DemoDefinition(parameters); err != nil {
		return nil, err
	}
	d.opts.Step("tokens", fmt.Sprintf("%d SoftHSM tokens: root, online, %d custodians", len(tokens), len(custodians)), time.Since(began))
	began = time.Now()
	result, err := ceremony.Rehearse(ctx, def, ceremony.Options{
		Tokens:    map[string]hsm.Token{ceremony.DemoRootToken: tokens[ceremony.DemoRootToken], ceremony.DemoOnlineToken: tokens[ceremony.DemoOnlineToken]},
		Custodian: func(_ context.Context, id string) (hsm.Key, error) { return keys[id], nil },
		Dir:       d.at.trust(), Now: func() (time.Time, error) { return time.Now().UTC(), nil },
	})
	if err != nil {
		return nil, err
	}
	d.opts.Step("ceremony", fmt.Sprintf("%d keys, %d certificates, %d records in the transcript",
		len(result.Keys.Keys), len(result.Certificates), result.Records), time.Since(began))
	return def, nil
}

// custodianKey makes a custodian's key in their own token, which is how
// `chancery-ceremony custodian key` does it.
func custodianKey(ctx context.Context, token hsm.Token) (hsm.Key, error) {
	id := make([]byte, hsm.IDSize)
	_, _ = rand.Read(id) // never fails
	return token.Generate(ctx, hsm.Spec{Label: "tuf", ID: id, Algorithm: hsm.ECDSAP256})
}

// newToken initialises a token with random PINs; the user PIN is kept in a
// file for the service, the SO PIN is not kept.
func (d *Demo) newToken(ctx context.Context, home *softhsm.Home, name string) (hsm.Token, error) {
	pin := []byte(randomPIN())
	if err := home.InitToken(name, []byte(randomPIN()), pin); err != nil {
		return nil, fmt.Errorf("make token %s: %w", name, err)
	}
	if err := os.WriteFile(d.at.pin(name), pin, 0o400); err != nil {
		return nil, fmt.Errorf("write PIN of token %s: %w", name, err)
	}
	return pkcs11.Open(ctx, pkcs11.Config{
		Module: home.Module(), URI: "pkcs11:token=" + name, PIN: pin, MaxSessions: 2, Logger: d.opts.Logger,
	})
}

func randomPIN() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// writeConfig writes the service's configuration, as a person would write it.
func (d *Demo) writeConfig() error {
	type m = map[string]any
	body, err := yaml.Marshal(yaml.MapSlice{
		{Key: "version", Value: 1},
		{Key: "url", Value: d.url},
		{Key: "listen", Value: d.saved.Listen},
		{Key: "tls", Value: m{"certificate": d.at.tlsCert(), "key": d.at.tlsKey()}},
		{Key: "state", Value: d.at.data()},
		{Key: "trust", Value: d.at.trust()},
		{Key: "tokens", Value: m{ceremony.DemoOnlineToken: m{"pin": config.FileSecret(d.at.pin(ceremony.DemoOnlineToken)).String()}}},
		{Key: "ca", Value: m{"oidc-issuers": m{d.saved.Issuer: m{
			"issuer-url": d.saved.Issuer, "client-id": "sigstore", "type": "email",
			"description": "the demo's identity provider: it approves everybody",
		}}}},
		{Key: "ct", Value: m{"shard": d.saved.CT.Shard, "origin": d.saved.CT.Origin}},
		{Key: "rekor", Value: m{"shard": d.saved.Rekor.Shard, "origin": d.saved.Rekor.Origin}},
	})
	if err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	head := "# Written by `chancery demo`. The demo's service runs with it.\n"
	if err := renameio.WriteFile(d.at.config(), append([]byte(head), body...), 0o644); err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	return nil
}

// finish writes what depends on the addresses, and demo.json, which says that
// the folder is complete.
func (d *Demo) finish() error {
	d.saved.Version = 1
	if err := d.writeConfig(); err != nil {
		return err
	}
	if err := d.writeClientConfig(); err != nil {
		return err
	}
	raw, err := json.MarshalIndent(d.saved, "", "  ")
	if err != nil {
		return fmt.Errorf("write demo state: %w", err)
	}
	if err := renameio.WriteFile(d.at.state(), append(raw, '\n'), 0o644); err != nil {
		return fmt.Errorf("write demo state: %w", err)
	}
	return nil
}

// writeClientConfig joins the two client files for clients that want one
// (sigstore-python's --trust-config).
func (d *Demo) writeClientConfig() error {
	trusted, err := os.ReadFile(d.at.trustedRoot())
	if err != nil {
		return fmt.Errorf("read trusted root: %w", err)
	}
	signing, err := os.ReadFile(d.at.signingConfig())
	if err != nil {
		return fmt.Errorf("read signing configuration: %w", err)
	}
	joined, err := trust.MarshalClientConfig(trusted, signing)
	if err != nil {
		return err
	}
	if err := renameio.WriteFile(d.at.clientConfig(), joined, 0o644); err != nil {
		return fmt.Errorf("write client configuration: %w", err)
	}
	return nil
}

func copyFile(from, to string) error {
	raw, err := os.ReadFile(from)
	if err != nil {
		return fmt.Errorf("copy client file: %w", err)
	}
	if err := renameio.WriteFile(to, raw, 0o644); err != nil {
		return fmt.Errorf("copy client file: %w", err)
	}
	return nil
}
