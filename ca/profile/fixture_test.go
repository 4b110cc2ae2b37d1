package profile

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sigstore/fulcio/pkg/certificate"
)

// testKey is a software key that signs as a token would and counts.
type testKey struct {
	*ecdsa.PrivateKey
	signatures atomic.Int64
	fail       error
}

func (k *testKey) Public() crypto.PublicKey { return k.PrivateKey.Public() }

func (k *testKey) SignContext(ctx context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if k.fail != nil {
		return nil, k.fail
	}
	k.signatures.Add(1)
	return k.Sign(rand.Reader, digest, opts)
}

func newKey(t testing.TB, curve elliptic.Curve) *testKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &testKey{PrivateKey: k}
}

var testStart = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func testSerial(n byte) *big.Int {
	octets := make([]byte, 20)
	octets[0], octets[19] = 0x41, n
	return new(big.Int).SetBytes(octets)
}

// authority builds, signs and parses one certificate of the hierarchy.
func authority(t testing.TB, spec AuthoritySpec, issuer *x509.Certificate, signer Signer) *x509.Certificate {
	t.Helper()
	tbs, err := NewAuthority(spec, issuer)
	if err != nil {
		t.Fatalf("NewAuthority(%s): %v", spec.Kind, err)
	}
	der, err := tbs.Sign(t.Context(), signer)
	if err != nil {
		t.Fatalf("Sign(%s): %v", spec.Kind, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// hierarchy is a root, an intermediate, a TSA root and a TSA.
type hierarchy struct {
	rootKey, interKey, tsaRootKey, tsaKey *testKey
	root, inter, tsaRoot, tsa             *x509.Certificate
}

func rootSpec(pub crypto.PublicKey) AuthoritySpec {
	return AuthoritySpec{
		Kind: Root, Subject: pkix.Name{Organization: []string{"Acme"}, CommonName: "Acme Sigstore Root G1"},
		Serial: testSerial(1), Public: pub, NotBefore: testStart, NotAfter: testStart.AddDate(30, 0, 0), PathLen: 1,
	}
}

func interSpec(pub crypto.PublicKey) AuthoritySpec {
	return AuthoritySpec{
		Kind: Intermediate, Subject: pkix.Name{Organization: []string{"Acme"}, CommonName: "Acme Sigstore Intermediate G1"},
		Serial: testSerial(2), Public: pub, NotBefore: testStart, NotAfter: testStart.AddDate(3, 0, 0),
	}
}

func tsaRootSpec(pub crypto.PublicKey) AuthoritySpec {
	return AuthoritySpec{
		Kind: TSARoot, Subject: pkix.Name{Organization: []string{"Acme"}, CommonName: "Acme Timestamping Root G1"},
		Serial: testSerial(3), Public: pub, NotBefore: testStart, NotAfter: testStart.AddDate(10, 0, 0),
	}
}

func tsaSpec(pub crypto.PublicKey) AuthoritySpec {
	return AuthoritySpec{
		Kind: TSA, Subject: pkix.Name{Organization: []string{"Acme"}, CommonName: "Acme Timestamping G1"},
		Serial: testSerial(4), Public: pub, NotBefore: testStart, NotAfter: testStart.AddDate(3, 0, 0),
	}
}

func newHierarchy(t testing.TB) *hierarchy {
	t.Helper()
	h := &hierarchy{
		rootKey: newKey(t, elliptic.P384()), interKey: newKey(t, elliptic.P256()),
		tsaRootKey: newKey(t, elliptic.P384()), tsaKey: newKey(t, elliptic.P256()),
	}
	h.root = authority(t, rootSpec(h.rootKey.Public()), nil, h.rootKey)
	h.inter = authority(t, interSpec(h.interKey.Public()), h.root, h.rootKey)
	h.tsaRoot = authority(t, tsaRootSpec(h.tsaRootKey.Public()), nil, h.tsaRootKey)
	h.tsa = authority(t, tsaSpec(h.tsaKey.Public()), h.tsaRoot, h.tsaRootKey)
	return h
}

func newIssuer(t testing.TB, h *hierarchy) *Issuer {
	t.Helper()
	i, err := NewIssuer(h.inter)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func emailSpec(pub crypto.PublicKey) LeafSpec {
	return LeafSpec{
		Public: pub, SAN: SAN{Type: Email, Value: "jane@example.com"},
		Extensions: certificate.Extensions{Issuer: "https://login.example.com", Subject: "auth0|1234"},
		NotBefore:  testStart.Add(time.Hour), NotAfter: testStart.Add(time.Hour + 10*time.Minute),
	}
}

// workflowSpec fills in every extension of docs/oid-info.md of Fulcio.
func workflowSpec(pub crypto.PublicKey) LeafSpec {
	const (
		repo = "https://github.com/acme/widget"
		flow = repo + "/.github/workflows/release.yml@refs/heads/main"
		sha  = "0123456789abcdef0123456789abcdef01234567"
	)
	return LeafSpec{
		Public: pub, SAN: SAN{Type: URI, Value: flow},
		Extensions: certificate.Extensions{
			Issuer: "https://token.actions.githubusercontent.com", GithubWorkflowTrigger: "push", GithubWorkflowSHA: sha,
			GithubWorkflowName: "Release", GithubWorkflowRepository: "acme/widget", GithubWorkflowRef: "refs/heads/main",
			BuildSignerURI: flow, BuildSignerDigest: sha, RunnerEnvironment: "github-hosted", SourceRepositoryURI: repo,
			SourceRepositoryDigest: sha, SourceRepositoryRef: "refs/heads/main", SourceRepositoryIdentifier: "1234",
			SourceRepositoryOwnerURI: "https://github.com/acme", SourceRepositoryOwnerIdentifier: "99", BuildConfigURI: flow,
			BuildConfigDigest: sha, BuildTrigger: "push", RunInvocationURI: repo + "/actions/runs/1/attempts/1",
			SourceRepositoryVisibilityAtSigning: "private", DeploymentEnvironment: "prod", Subject: "repo:acme/widget:ref:refs/heads/main",
		},
		NotBefore: testStart.Add(time.Hour), NotAfter: testStart.Add(time.Hour + 10*time.Minute),
	}
}

func usernameSpec(pub crypto.PublicKey) LeafSpec {
	spec := emailSpec(pub)
	spec.SAN = SAN{Type: OtherName, Value: "jürg!example.com"}
	return spec
}
