// Package client signs and verifies files as any Sigstore client does, for
// people who have no cosign at hand and for the demo. It is sigstore-go with
// files for trust and services instead of TUF; nothing in it is special to
// this project's server.
//
// Data flows one way. Sign: file → SHA-256 → signature by a throw-away key,
// certificate from the CA, timestamp, log entry → bundle, which is verified
// before it is returned. Verify: file and bundle → the policy that the caller
// states → what the certificate says.
//
// It trusts the trusted root file, and from the servers only what verifies.
package client

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	rekorclient "github.com/sigstore/rekor-tiles/v2/pkg/client"
	rekorwrite "github.com/sigstore/rekor-tiles/v2/pkg/client/write"
	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/sign"
	"github.com/sigstore/sigstore-go/pkg/verify"
)

const (
	callTimeout = 30 * time.Second
	// maxFile bounds what is read of a trust file or a bundle.
	maxFile = 16 << 20
)

// Trust names the files that say whom to trust and whom to ask.
type Trust struct {
	TrustedRoot   string // trusted_root.json
	SigningConfig string // signing_config.v0.2.json; not needed to verify
	TLSCA         string // PEM of the servers' TLS authority; "" = the system's
}

// Policy says which signature is acceptable. One of Identity and
// IdentityRegexp, and one of Issuer and IssuerRegexp, must be set.
type Policy struct {
	Identity, IdentityRegexp string // the certificate's subject alternative name
	Issuer, IssuerRegexp     string // the OpenID Connect issuer
}

// Sign signs the file at path for the holder of the OpenID Connect token and
// returns a Sigstore bundle, v0.3 JSON, that has been verified. The file is
// read as a stream; its size is not limited.
func Sign(ctx context.Context, path, token string, trust Trust) ([]byte, error) {
	digest, err := digestFile(path)
	if err != nil {
		return nil, err
	}
	services, err := readSigningConfig(trust.SigningConfig)
	if err != nil {
		return nil, err
	}
	trusted, err := readTrustedRoot(trust.TrustedRoot)
	if err != nil {
		return nil, err
	}
	tlsConfig, err := tlsConfig(trust.TLSCA)
	if err != nil {
		return nil, err
	}
	key, err := newKeypair()
	if err != nil {
		return nil, err
	}
	opts, err := bundleOptions(ctx, services, tlsConfig, key, token)
	if err != nil {
		return nil, err
	}
	opts.Context = ctx
	pb, err := sign.Bundle(artifact{digest}, digested{key}, opts)
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	b, err := bundle.NewBundle(pb)
	if err != nil {
		return nil, fmt.Errorf("check own bundle: %w", err)
	}
	if _, err := check(b, trusted, digest, verify.WithoutIdentitiesUnsafe()); err != nil {
		return nil, fmt.Errorf("verify own bundle: %w", err)
	}
	return b.MarshalJSON()
}

// Verify checks the bundle for the file at path against the policy, offline,
// and returns what was verified. A certificate timestamp, a log inclusion
// proof and a signed time are all required.
func Verify(path, bundlePath string, trust Trust, policy Policy) (*verify.VerificationResult, error) {
	identity, err := verify.NewShortCertificateIdentity(policy.Issuer, policy.IssuerRegexp, policy.Identity, policy.IdentityRegexp)
	if err != nil {
		return nil, fmt.Errorf("read expected identity: %w", err)
	}
	trusted, err := readTrustedRoot(trust.TrustedRoot)
	if err != nil {
		return nil, err
	}
	raw, err := readFile(bundlePath)
	if err != nil {
		return nil, fmt.Errorf("read bundle: %w", err)
	}
	b := new(bundle.Bundle)
	if err := b.UnmarshalJSON(raw); err != nil {
		return nil, fmt.Errorf("parse bundle %s: %w", bundlePath, err)
	}
	digest, err := digestFile(path)
	if err != nil {
		return nil, err
	}
	return check(b, trusted, digest, verify.WithCertificateIdentity(identity))
}

func check(b *bundle.Bundle, trusted root.TrustedMaterial, digest [sha256.Size]byte, identity verify.PolicyOption) (*verify.VerificationResult, error) {
	verifier, err := verify.NewVerifier(trusted,
		verify.WithSignedCertificateTimestamps(1), verify.WithTransparencyLog(1), verify.WithObserverTimestamps(1))
	if err != nil {
		return nil, fmt.Errorf("set up verifier: %w", err)
	}
	return verifier.Verify(b, verify.NewPolicy(verify.WithArtifactDigest("sha256", digest[:]), identity))
}

// bundleOptions selects the services that are valid now, as every client does.
func bundleOptions(ctx context.Context, services *root.SigningConfig, tlsConfig *tls.Config, key *keypair, token string) (sign.BundleOptions, error) {
	var opts sign.BundleOptions
	now := time.Now()
	// Each transport gets a copy: it adds the protocols that it speaks.
	transport := patient{ctx, &http.Transport{TLSClientConfig: tlsConfig.Clone(), Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true}}
	ca, err := root.SelectService(services.FulcioCertificateAuthorityURLs(), sign.FulcioAPIVersions, now)
	if err != nil {
		return opts, fmt.Errorf("select certificate authority: %w", err)
	}
	opts.CertificateProvider = certifier{key: key, fulcio: sign.NewFulcio(&sign.FulcioOptions{
		BaseURL: ca.URL, Timeout: callTimeout, Transport: transport,
	})}
	opts.CertificateProviderOptions = &sign.CertificateProviderOptions{IDToken: token}

	tsas, err := root.SelectServices(services.TimestampAuthorityURLs(), services.TimestampAuthorityURLsConfig(), sign.TimestampAuthorityAPIVersions, now)
	if err != nil {
		return opts, fmt.Errorf("select timestamp authority: %w", err)
	}
	for _, tsa := range tsas {
		opts.TimestampAuthorities = append(opts.TimestampAuthorities, sign.NewTimestampAuthority(&sign.TimestampAuthorityOptions{
			URL: tsa.URL, Timeout: callTimeout, Transport: transport,
		}))
	}
	logs, err := root.SelectServices(services.RekorLogURLs(), services.RekorLogURLsConfig(), []uint32{2}, now)
	if err != nil {
		return opts, fmt.Errorf("select signature log: %w", err)
	}
	for _, log := range logs {
		writer, err := rekorwrite.NewWriter(log.URL, rekorclient.WithTLSConfig(tlsConfig.Clone()), rekorclient.WithTimeout(callTimeout))
		if err != nil {
			return opts, fmt.Errorf("set up log client: %w", err)
		}
		opts.TransparencyLogs = append(opts.TransparencyLogs, sign.NewRekor(&sign.RekorOptions{
			BaseURL: log.URL, Version: log.MajorAPIVersion, ClientV2: writer,
		}))
	}
	return opts, nil
}

func digestFile(path string) (digest [sha256.Size]byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return digest, fmt.Errorf("open file: %w", err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return digest, fmt.Errorf("hash file: %w", err)
	}
	return [sha256.Size]byte(h.Sum(nil)), nil
}

func readTrustedRoot(path string) (*root.TrustedRoot, error) {
	raw, err := readFile(path)
	if err != nil {
		return nil, fmt.Errorf("read trusted root: %w", err)
	}
	trusted, err := root.NewTrustedRootFromJSON(raw)
	if err != nil {
		return nil, fmt.Errorf("parse trusted root %s: %w", path, err)
	}
	return trusted, nil
}

func readSigningConfig(path string) (*root.SigningConfig, error) {
	raw, err := readFile(path)
	if err != nil {
		return nil, fmt.Errorf("read signing config: %w", err)
	}
	services, err := root.NewSigningConfigFromJSON(raw)
	if err != nil {
		return nil, fmt.Errorf("parse signing config %s: %w", path, err)
	}
	return services, nil
}

// tlsConfig trusts the authorities in the PEM file, or the system's if path is "".
func tlsConfig(path string) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if path == "" {
		return config, nil
	}
	raw, err := readFile(path)
	if err != nil {
		return nil, fmt.Errorf("read TLS authority: %w", err)
	}
	config.RootCAs = x509.NewCertPool()
	if !config.RootCAs.AppendCertsFromPEM(raw) {
		return nil, fmt.Errorf("read TLS authority %s: no certificate in it", path)
	}
	return config, nil
}

var errTooLarge = errors.New("file too large")

// readFile reads a whole file of at most maxFile octets.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(raw) > maxFile {
		err = fmt.Errorf("%s: %w (limit %d MiB)", path, errTooLarge, maxFile>>20)
	}
	return raw, err
}
