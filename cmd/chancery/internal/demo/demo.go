// Package demo runs a whole Chancery on one folder: SoftHSM tokens, two of the
// service and one for each custodian of the TUF repository, a rehearsed key
// ceremony, an identity provider that approves one user, and the service, all on
// loopback addresses.
//
// It promises that everything it makes is below the one folder, that a folder
// which is complete is reopened as it is (no ceremony, same keys, same logs),
// and that one which is not complete is refused rather than repaired. Beside
// the tokens it holds exactly three private keys in files, those of the TLS
// authority, the TLS server and the identity provider (PrivateKeyFiles); none
// of them belongs to the trust that clients verify.
//
// Data flows one way: folder → tokens → ceremony → configuration → service →
// a signature made and verified as any client would.
package demo

import (
	"bytes"
	"context"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"

	"github.com/chancery-ca/chancery/ca/identity/oidctest"
	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/client"
	"github.com/chancery-ca/chancery/cmd/chancery/internal/service"
	"github.com/chancery-ca/chancery/config"
	"github.com/chancery-ca/chancery/hsm/softhsm"
)

// Email is the one user of the demo's identity provider.
const Email = oidctest.DefaultEmail

// ErrIncomplete: the folder is not empty and not a finished demo.
var ErrIncomplete = errors.New("not a complete demo")

// Options say where the demo lives.
type Options struct {
	// Dir is the folder; it is made if it is missing.
	Dir string
	// Listen is the service's address, 127.0.0.1:PORT. "" means the address
	// of the last time, or any free port the first time.
	Listen string
	Logger *slog.Logger
	// Step is told what was done and how long it took.
	Step func(name, what string, took time.Duration)
}

// Demo is a running demo.
type Demo struct {
	opts  Options
	at    layout
	saved saved
	url   string

	idp         *oidctest.Provider
	idpServer   *http.Server
	idpListener net.Listener

	service  *service.Service
	listener net.Listener
	done     chan error // the result of the service's Serve
	stop     context.CancelFunc
	bg       chan struct{} // closed when the token renewal has ended
}

// saved is what a folder remembers, in demo.json. It is written last: a folder
// that has it is complete.
type saved struct {
	Version int    `json:"version"`
	Issuer  string `json:"issuer"` // the identity provider's URL, never changes
	Listen  string `json:"listen"` // the service's address of the last run
	CT      shard  `json:"ct"`
	Rekor   shard  `json:"rekor"`
}

type shard struct {
	Shard  string `json:"shard"`
	Origin string `json:"origin"`
}

// Start sets the demo up, or reopens it, and serves until Close. When it
// returns, the service is ready and DIR/token is fresh.
func Start(ctx context.Context, opts Options) (*Demo, error) {
	dir, err := filepath.Abs(opts.Dir)
	if err != nil {
		return nil, fmt.Errorf("locate demo folder: %w", err)
	}
	d := &Demo{opts: opts, at: layout(dir), done: make(chan error, 1), bg: make(chan struct{})}
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	d.stop = stop
	if err := d.start(ctx, running); err != nil {
		return nil, errors.Join(err, d.abandon())
	}
	go d.keepToken(running)
	return d, nil
}

// start brings everything up; what it starts goes on until running ends.
func (d *Demo) start(ctx, running context.Context) error {
	fresh, err := d.load()
	if err != nil {
		return err
	}
	if err := d.listen(fresh); err != nil {
		return err
	}
	prepare := d.reopen
	if fresh {
		prepare = d.create
	}
	if err := prepare(ctx); err != nil {
		return err
	}
	if err := d.startProvider(); err != nil {
		return err
	}
	if err := d.startService(running); err != nil {
		return err
	}
	return d.renewToken()
}

// load reads demo.json and says whether the folder is fresh.
func (d *Demo) load() (fresh bool, err error) {
	raw, err := os.ReadFile(d.at.state())
	switch {
	case err == nil:
		if err := json.Unmarshal(raw, &d.saved); err != nil || d.saved.Version != 1 {
			return false, fmt.Errorf("read %s: %w", d.at.state(), ErrIncomplete)
		}
		return false, nil
	case !errors.Is(err, fs.ErrNotExist):
		return false, fmt.Errorf("read demo state: %w", err)
	}
	entries, err := os.ReadDir(string(d.at))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("read demo folder: %w", err)
	}
	if len(entries) > 0 {
		return false, fmt.Errorf("folder %s: %w", d.at, ErrIncomplete)
	}
	return true, nil
}

// listen takes both addresses, so that they are known before the ceremony
// writes them into files.
func (d *Demo) listen(fresh bool) (err error) {
	address := d.opts.Listen
	if address == "" {
		address = d.saved.Listen
	}
	if d.listener, err = listenAt(address); err != nil {
		return err
	}
	provider := ""
	if !fresh {
		if provider, err = hostPort(d.saved.Issuer); err != nil {
			return err
		}
	}
	l, err := listenAt(provider)
	if err != nil {
		return fmt.Errorf("identity provider: %w", err)
	}
	d.saved.Issuer = "http://" + l.Addr().String()
	d.saved.Listen = d.listener.Addr().String()
	d.url = "https://" + d.saved.Listen
	d.idpListener = l
	return nil
}

// reopen uses what an earlier run made; another address changes the signing
// configuration alone.
func (d *Demo) reopen(context.Context) error {
	if _, err := softhsm.Open(d.at.tokens()); err != nil {
		return err
	}
	raw, err := os.ReadFile(d.at.signingConfig())
	if err != nil {
		return fmt.Errorf("read signing configuration: %w", err)
	}
	moved, err := trust.RewriteServiceURL(raw, d.url)
	if err != nil {
		return fmt.Errorf("move signing configuration: %w", err)
	}
	if err := renameio.WriteFile(d.at.signingConfig(), moved, 0o644); err != nil {
		return fmt.Errorf("write signing configuration: %w", err)
	}
	return d.finish()
}

func (d *Demo) startProvider() error {
	key, err := readKey[*rsa.PrivateKey](d.at.providerKey())
	if err != nil {
		return fmt.Errorf("read identity provider's key: %w", err)
	}
	d.idp = oidctest.New(oidctest.Config{Issuer: d.saved.Issuer, Key: key, Email: Email, AutoApprove: true})
	d.idpServer = &http.Server{
		Handler: d.idp, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: time.Minute,
	}
	go func() { _ = d.idpServer.Serve(d.idpListener) }()
	return nil
}

func (d *Demo) startService(ctx context.Context) error {
	began := time.Now()
	cfg, err := config.Load(d.at.config())
	if err != nil {
		return err
	}
	opts := service.Options{Logger: d.opts.Logger, LoopbackHTTP: true}
	if d.service, err = service.Open(ctx, cfg, opts); err != nil {
		return err
	}
	l, err := d.service.TLS(d.listener)
	if err != nil {
		return err
	}
	go func() { d.done <- d.service.Serve(ctx, l, func() {}) }()
	d.opts.Step("service", d.url+"  CA, CT log, Rekor log, TSA", time.Since(began))
	d.opts.Step("identity", d.saved.Issuer+"  "+Email, 0)
	return nil
}

// renewToken writes a fresh ID token to DIR/token.
func (d *Demo) renewToken() error {
	token, err := d.idp.Token(nil)
	if err != nil {
		return fmt.Errorf("make token: %w", err)
	}
	if err := renameio.WriteFile(d.at.token(), []byte(token), 0o600); err != nil {
		return fmt.Errorf("write token: %w", err)
	}
	return nil
}

// keepToken renews the token until ctx ends, long before it expires.
func (d *Demo) keepToken(ctx context.Context) {
	defer close(d.bg)
	tick := time.NewTicker(oidctest.DefaultLifetime / 4)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := d.renewToken(); err != nil {
				d.opts.Logger.Error("token not renewed", "err", err)
			}
		}
	}
}

// Trust returns the files by which a client knows the demo.
func (d *Demo) Trust() client.Trust {
	return client.Trust{TrustedRoot: d.at.trustedRoot(), SigningConfig: d.at.signingConfig(), TLSCA: d.at.tlsCA()}
}

// TUF returns the mirror's URL and the path of its first root below the folder,
// for clients that follow a TUF repository. ok is false when there is none, or
// when the service has moved since the custodians signed where it is.
func (d *Demo) TUF() (mirror, root string, ok bool) {
	root = filepath.Join("trust", "tuf", "1.root.json")
	signed, err := os.ReadFile(d.at.path("trust", "signing_config.v0.2.json"))
	if err != nil {
		return "", "", false
	}
	now, err := os.ReadFile(d.at.signingConfig())
	if err != nil || !bytes.Equal(signed, now) {
		return "", "", false
	}
	if _, err := os.Stat(d.at.path(root)); err != nil {
		return "", "", false // of a version that made none
	}
	return d.url + "/tuf", root, true
}

// Dir is the demo's folder, absolute.
func (d *Demo) Dir() string { return string(d.at) }

// Issuer is the identity provider's URL, the iss of its tokens.
func (d *Demo) Issuer() string { return d.saved.Issuer }

// Token returns a fresh ID token of the demo's user.
func (d *Demo) Token() (string, error) { return d.idp.Token(nil) }

// Wait blocks until ctx ends or the service fails.
func (d *Demo) Wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case err := <-d.done:
		d.done <- err
		return err
	}
}

// Close drains the service and ends everything that Start began.
func (d *Demo) Close() error {
	d.stop()
	<-d.bg
	err := <-d.done
	return errors.Join(err, d.service.Close(context.Background()), d.idpServer.Close())
}

// abandon releases what a failed Start had taken.
func (d *Demo) abandon() error {
	d.stop()
	var errs []error
	if d.service != nil {
		errs = append(errs, d.service.Close(context.Background()))
	}
	if d.idpServer != nil {
		_ = d.idpServer.Close()
	}
	for _, l := range []net.Listener{d.idpListener, d.listener} {
		if l != nil {
			_ = l.Close()
		}
	}
	return errors.Join(errs...)
}
