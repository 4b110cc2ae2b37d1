package rekor_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	"github.com/sigstore/protobuf-specs/gen/pb-go/dsse"
	pb "github.com/sigstore/rekor-tiles/v2/pkg/generated/protobuf"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/rekor"
	"github.com/chancery-ca/chancery/log/tree"
)

func TestRefusedHashedRekords(t *testing.T) {
	f := newFixture(t)
	s := p256(t)
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki224, err := x509.MarshalPKIXPublicKey(p224.Public())
	if err != nil {
		t.Fatal(err)
	}
	rsa2560, err := rsa.GenerateKey(rand.Reader, 2560)
	if err != nil {
		t.Fatal(err)
	}
	spki2560, err := x509.MarshalPKIXPublicKey(rsa2560.Public())
	if err != nil {
		t.Fatal(err)
	}
	key := func(der []byte) *pb.Verifier_PublicKey {
		return &pb.Verifier_PublicKey{PublicKey: &pb.PublicKey{RawBytes: der}}
	}
	certificate := func(der []byte) *pb.Verifier_X509Certificate {
		return &pb.Verifier_X509Certificate{X509Certificate: &v1.X509Certificate{RawBytes: der}}
	}
	cert := s.certificate(t, nil, s)
	big := sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Unix(1, 0),
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Value: make([]byte, 60<<10)}},
	}, nil, s.Public(), s)
	for _, tc := range []struct {
		name   string
		change func(*pb.HashedRekordRequestV002)
		want   string
	}{
		{"no signature", func(r *pb.HashedRekordRequestV002) { r.Signature = nil }, "invalid hashedrekord request: the signature is missing"},
		{"empty signature", func(r *pb.HashedRekordRequestV002) { r.Signature.Content = nil }, "invalid hashedrekord request: the signature is missing"},
		{"no verifier", func(r *pb.HashedRekordRequestV002) { r.Signature.Verifier = nil }, "invalid hashedrekord request: the verifier is missing"},
		{"no digest", func(r *pb.HashedRekordRequestV002) { r.Digest = nil }, "invalid hashedrekord request: the digest is missing"},
		{"verifier without a key", func(r *pb.HashedRekordRequestV002) { r.Signature.Verifier.Verifier = nil }, "invalid hashedrekord request: the verifier has neither"},
		{"empty key", func(r *pb.HashedRekordRequestV002) { r.Signature.Verifier.Verifier = key(nil) }, "invalid hashedrekord request: the verifier is not"},
		{"malformed key", func(r *pb.HashedRekordRequestV002) { r.Signature.Verifier.Verifier = key([]byte("key")) }, "invalid hashedrekord request: the verifier is not"},
		{"certificate as key", func(r *pb.HashedRekordRequestV002) { r.Signature.Verifier.Verifier = key(cert.Raw) }, "invalid hashedrekord request: the verifier is not"},
		{"trailing octets after the key", func(r *pb.HashedRekordRequestV002) {
			r.Signature.Verifier.Verifier = key(append(r.Signature.Verifier.GetPublicKey().RawBytes, 0))
		}, "invalid hashedrekord request: the verifier is not"},
		{"malformed certificate", func(r *pb.HashedRekordRequestV002) { r.Signature.Verifier.Verifier = certificate([]byte("cert")) }, "invalid hashedrekord request: the verifier is not"},
		{"trailing octets after the certificate", func(r *pb.HashedRekordRequestV002) {
			r.Signature.Verifier.Verifier = certificate(append(bytes.Clone(cert.Raw), 0))
		}, "invalid hashedrekord request: the verifier is not"},
		{"PEM certificate", func(r *pb.HashedRekordRequestV002) {
			r.Signature.Verifier.Verifier = certificate([]byte("-----BEGIN CERTIFICATE-----\n"))
		}, "invalid hashedrekord request: the verifier is not"},
		{"no key details", func(r *pb.HashedRekordRequestV002) { r.Signature.Verifier.KeyDetails = 0 }, "invalid hashedrekord request: keyDetails is missing"},
		{"unknown key details", func(r *pb.HashedRekordRequestV002) { r.Signature.Verifier.KeyDetails = 4711 }, "invalid hashedrekord request: keyDetails must be PKIX_ECDSA_P256_SHA_256"},
		{"key details of another key", func(r *pb.HashedRekordRequestV002) {
			r.Signature.Verifier.KeyDetails = v1.PublicKeyDetails_PKIX_ECDSA_P384_SHA_384
		}, "invalid hashedrekord request: keyDetails must be PKIX_ECDSA_P256_SHA_256"},
		{"P-224 key", func(r *pb.HashedRekordRequestV002) { r.Signature.Verifier.Verifier = key(spki224) }, "invalid hashedrekord request: keys of this type"},
		{"RSA-2560 key", func(r *pb.HashedRekordRequestV002) { r.Signature.Verifier.Verifier = key(spki2560) }, "invalid hashedrekord request: keys of this type"},
		{"digest of 31 octets", func(r *pb.HashedRekordRequestV002) { r.Digest = r.Digest[:31] }, "invalid hashedrekord request: the digest has 31 octets; SHA-256 has 32"},
		{"digest of 64 octets", func(r *pb.HashedRekordRequestV002) { r.Digest = append(r.Digest, r.Digest...) }, "invalid hashedrekord request: the digest has 64 octets"},
		{"signature over another digest", func(r *pb.HashedRekordRequestV002) { r.Digest[0] ^= 1 }, "invalid hashedrekord request: the signature does not verify"},
		{"flipped signature", func(r *pb.HashedRekordRequestV002) { r.Signature.Content[8] ^= 1 }, "invalid hashedrekord request: the signature does not verify"},
		{"signature by another key", func(r *pb.HashedRekordRequestV002) { r.Signature.Content = p256(t).sign(t, r.Digest) }, "invalid hashedrekord request: the signature does not verify"},
		{"trailing octets after the signature", func(r *pb.HashedRekordRequestV002) { r.Signature.Content = append(r.Signature.Content, 0) }, "invalid hashedrekord request: the signature does not verify"},
		{"entry of more than 65535 octets", func(r *pb.HashedRekordRequestV002) { r.Signature.Verifier.Verifier = certificate(big.Raw) }, "invalid entry: "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			hr := s.request(t, "artefact")
			tc.change(hr)
			resp, answer := f.post(t, body(t, hr))
			got := parseStatus(t, answer)
			if resp.StatusCode != 400 || got.Code != 3 || !strings.HasPrefix(got.Message, tc.want) {
				t.Errorf("%d %+v, want 400, 3, %q", resp.StatusCode, got, tc.want)
			}
		})
	}
	if size := f.tree.Root().Size; size != 0 {
		t.Errorf("tree of %d leaves", size)
	}
}

func TestRefusedKeyDetails(t *testing.T) {
	f := newFixture(t)
	for _, tc := range []struct {
		name      string
		key, said v1.PublicKeyDetails
	}{
		{"RSA-PSS", v1.PublicKeyDetails_PKIX_RSA_PKCS1V15_2048_SHA256, v1.PublicKeyDetails_PKIX_RSA_PSS_2048_SHA256},
		{"pure Ed25519", v1.PublicKeyDetails_PKIX_ED25519_PH, v1.PublicKeyDetails_PKIX_ED25519},
		{"P-384 with SHA-256", v1.PublicKeyDetails_PKIX_ECDSA_P384_SHA_384, v1.PublicKeyDetails_PKIX_ECDSA_P384_SHA_256},
		{"RSA-3072 as RSA-2048", v1.PublicKeyDetails_PKIX_RSA_PKCS1V15_3072_SHA256, v1.PublicKeyDetails_PKIX_RSA_PKCS1V15_2048_SHA256},
	} {
		t.Run(tc.name, func(t *testing.T) {
			hr := newSigner(t, tc.key).request(t, "artefact")
			hr.Signature.Verifier.KeyDetails = tc.said
			resp, answer := f.post(t, body(t, hr))
			if got := parseStatus(t, answer); resp.StatusCode != 400 || got.Code != 3 || !strings.Contains(got.Message, "keyDetails must be "+tc.key.String()) {
				t.Errorf("%d %+v", resp.StatusCode, got)
			}
		})
	}
}

func TestRefusedBodies(t *testing.T) {
	f := newFixture(t)
	good := string(body(t, p256(t).request(t, "artefact")))
	inner := good[len(`{"hashedRekordRequestV002":`) : len(good)-1]
	for _, tc := range []struct {
		name, body string
		status     int
		want       string
	}{
		{"empty", "", 400, "invalid request body"},
		{"not JSON", "entry", 400, "invalid request body"},
		{"no request", "{}", 400, "invalid type, must be hashedrekord"},
		{"unknown field", `{"hashedRekordRequestV002":` + inner + `,"note":"x"}`, 400, "invalid request body"},
		{"unknown field within", strings.Replace(good, `"digest"`, `"time":1,"digest"`, 1), 400, "invalid request body"},
		{"Rekor v1 entry", `{"apiVersion":"0.0.1","kind":"hashedrekord","spec":{}}`, 400, "invalid request body"},
		{"both requests", `{"hashedRekordRequestV002":` + inner + `,"dsseRequestV002":{}}`, 400, "invalid request body"},
		{"a field twice", `{"hashedRekordRequestV002":` + inner + `,"hashedRekordRequestV002":` + inner + `}`, 400, "invalid request body"},
		{"trailing JSON", good + "{}", 400, "invalid request body"},
		{"truncated", good[:len(good)/2], 400, "invalid request body"},
		{"not base64", strings.Replace(good, `"digest":"`, `"digest":"!`, 1), 400, "invalid request body"},
		{"deeply nested", strings.Repeat(`{"hashedRekordRequestV002":`, 20000), 400, "invalid request body"},
		{"5 MiB", `{"x":"` + strings.Repeat("A", 5<<20) + `"}`, 413, "the request is larger than 4194304 octets"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			resp, answer := f.post(t, []byte(tc.body))
			if got := parseStatus(t, answer); resp.StatusCode != tc.status || got.Code != 3 || !strings.HasPrefix(got.Message, tc.want) {
				t.Errorf("%d %+v, want %d %q", resp.StatusCode, got, tc.status, tc.want)
			}
		})
	}
	if size := f.tree.Root().Size; size != 0 {
		t.Errorf("tree of %d leaves", size)
	}
	if resp, _ := f.get(t, "/api/v2/log/entries"); resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("GET of entries: %d", resp.StatusCode)
	}
}

func TestRefusedEnvelopes(t *testing.T) {
	f := newFixture(t)
	s := p256(t)
	v := s.request(t, "").Signature.Verifier
	sig := s.sign(t, s.digest([]byte("DSSEv1 4 text 1 x")))
	for _, tc := range []struct {
		name   string
		change func(*pb.DSSERequestV002)
		want   string
	}{
		{"no envelope", func(r *pb.DSSERequestV002) { r.Envelope = nil }, "the envelope is missing"},
		{"no signature", func(r *pb.DSSERequestV002) { r.Envelope.Signatures = nil }, "the envelope has 0 signatures"},
		{"two signatures", func(r *pb.DSSERequestV002) {
			r.Envelope.Signatures = append(r.Envelope.Signatures, &dsse.Signature{Sig: sig})
		}, "the envelope has 2 signatures"},
		{"empty signature", func(r *pb.DSSERequestV002) { r.Envelope.Signatures[0].Sig = nil }, "the signature is missing"},
		{"no verifier", func(r *pb.DSSERequestV002) { r.Verifiers = nil }, "the request has 0 verifiers"},
		{"two verifiers", func(r *pb.DSSERequestV002) { r.Verifiers = append(r.Verifiers, v) }, "the request has 2 verifiers"},
		{"another payload", func(r *pb.DSSERequestV002) { r.Envelope.Payload = []byte("y") }, "the signature does not verify"},
		{"another type", func(r *pb.DSSERequestV002) { r.Envelope.PayloadType = "html" }, "the signature does not verify"},
		{"signature over the payload alone", func(r *pb.DSSERequestV002) { r.Envelope.Signatures[0].Sig = s.sign(t, s.digest([]byte("x"))) }, "the signature does not verify"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			req := envelopeRequest("text", []byte("x"), sig, v)
			tc.change(req.GetDsseRequestV002())
			raw, err := protojson.Marshal(req)
			if err != nil {
				t.Fatal(err)
			}
			resp, answer := f.post(t, raw)
			if got := parseStatus(t, answer); resp.StatusCode != 400 || got.Code != 3 || !strings.HasPrefix(got.Message, "invalid hashedrekord request: "+tc.want) {
				t.Errorf("%d %+v, want %q", resp.StatusCode, got, tc.want)
			}
		})
	}
	if size := f.tree.Root().Size; size != 0 {
		t.Errorf("tree of %d leaves", size)
	}
}

func TestDuplicate(t *testing.T) {
	f := newFixture(t)
	first := body(t, p256(t).request(t, "first"))
	resp, answer := f.post(t, body(t, p256(t).request(t, "zeroth")))
	f.created(t, resp, answer)
	resp, answer = f.post(t, first)
	f.created(t, resp, answer)
	resp, answer = f.post(t, first)
	got := parseStatus(t, answer)
	if resp.StatusCode != 409 || got.Code != 6 || resp.Header.Get("x-log-index") != "1" ||
		got.Message != "an equivalent entry already exists in the transparency log with index 1" {
		t.Errorf("%d %+v %q", resp.StatusCode, got, resp.Header.Get("x-log-index"))
	}
	if size := f.tree.Root().Size; size != 2 {
		t.Errorf("tree of %d leaves", size)
	}
}

func TestReplayWindow(t *testing.T) {
	var seconds atomic.Int64
	f := newFixture(t, func(c *rekor.Config) {
		c.Replay = time.Minute
		c.Now = func() (time.Time, error) { return time.Unix(1_700_000_000+seconds.Load(), 0), nil }
	})
	b := body(t, p256(t).request(t, "artefact"))
	for _, at := range []int64{0, 1, 59} {
		seconds.Store(at)
		resp, answer := f.post(t, b)
		if tle := f.created(t, resp, answer); tle.GetLogIndex() != 0 {
			t.Errorf("after %d s: index %d", at, tle.GetLogIndex())
		}
	}
	seconds.Store(59 + 60)
	if resp, answer := f.post(t, b); resp.StatusCode != 409 {
		t.Errorf("after the window: %d %s", resp.StatusCode, answer)
	}
}

// faulty is a tree and a publication that fail where they are told to.
type faulty struct {
	tree.Tree
	head.Publication
	appendErr, awaitErr error
	latched             error // Err says this
	lost                bool  // Append fails after it has appended
	wrongProof          bool
}

func (f *faulty) Append(ctx context.Context, l tree.Leaf) (tree.Entry, bool, error) {
	if f.appendErr != nil && !f.lost {
		return tree.Entry{}, false, f.appendErr
	}
	e, existed, err := f.Tree.Append(ctx, l)
	if f.appendErr != nil {
		return tree.Entry{}, false, f.appendErr
	}
	return e, existed, err
}

func (f *faulty) Await(ctx context.Context, size uint64) (head.Signed, error) {
	if f.awaitErr != nil {
		return head.Signed{}, f.awaitErr
	}
	return f.Publication.Await(ctx, size)
}

func (f *faulty) InclusionProof(ctx context.Context, index, size uint64) ([]tree.Hash, error) {
	p, err := f.Tree.InclusionProof(ctx, index, size)
	if f.wrongProof {
		p = append(p, tree.Hash{})
	}
	return p, err
}

func (f *faulty) Err() error {
	if f.latched != nil {
		return f.latched
	}
	return f.Publication.Err()
}

// TestLatchedLogAppendsNothing: an entry that would get no head is refused
// before it is in the tree.
func TestLatchedLogAppendsNothing(t *testing.T) {
	bad := &faulty{}
	f := newFixture(t, func(c *rekor.Config) {
		bad.Tree, bad.Publication = c.Tree, c.Heads
		c.Tree, c.Heads = bad, bad
	})
	bad.latched = fmt.Errorf("secret: %w", head.ErrFork)
	b := body(t, p256(t).request(t, "artefact"))
	resp, answer := f.post(t, b)
	if s := parseStatus(t, answer); resp.StatusCode != 503 || s.Message != "the log is not available now; retry" {
		t.Errorf("latched: %d %s", resp.StatusCode, answer)
	}
	if size := f.tree.Root().Size; size != 0 {
		t.Errorf("the tree has %d leaves, want none", size)
	}
	bad.latched = nil
	if resp, answer := f.post(t, b); resp.StatusCode != 201 {
		t.Errorf("unlatched: %d %s", resp.StatusCode, answer)
	}
}

func TestFaults(t *testing.T) {
	bad := &faulty{}
	f := newFixture(t, func(c *rekor.Config) {
		bad.Tree, bad.Publication = c.Tree, c.Heads
		c.Tree, c.Heads = bad, bad
	})
	wrap := func(err error) error { return fmt.Errorf("secret: %w", err) }
	for _, tc := range []struct {
		name         string
		fault        faulty
		status, code int
		message      string
		retry        int // status of the next try, when the fault is gone
	}{
		{"queue full", faulty{appendErr: tree.ErrBusy}, 503, 14, "reached max pushback; retry", 201},
		{"shutting down", faulty{appendErr: tree.ErrClosed}, 503, 14, "the log is not available now; retry", 201},
		{"disk full after queueing", faulty{appendErr: tree.ErrStorage, lost: true}, 503, 14, "the log is not available now; retry", 201},
		{"client went away while appending", faulty{appendErr: context.Canceled, lost: true}, 499, 1, "the client cancelled the request", 201},
		{"timeout while appending", faulty{appendErr: context.DeadlineExceeded, lost: true}, 504, 4, "the log did not answer in time; retry", 201},
		{"anything else", faulty{appendErr: errors.New("row 7")}, 500, 2, "failed to integrate entry", 201},
		{"no head", faulty{awaitErr: head.ErrUnavailable}, 503, 14, "the log is not available now; retry", 201},
		{"fork", faulty{awaitErr: head.ErrFork}, 503, 14, "the log is not available now; retry", 201},
		{"client went away while waiting", faulty{awaitErr: context.Canceled}, 499, 1, "the client cancelled the request", 201},
		{"proof that does not verify", faulty{wrongProof: true}, 500, 2, "failed to integrate entry", 201},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := body(t, p256(t).request(t, tc.name))
			bad.lost, bad.wrongProof = tc.fault.lost, tc.fault.wrongProof
			if tc.fault.appendErr != nil {
				bad.appendErr = wrap(tc.fault.appendErr)
			}
			if tc.fault.awaitErr != nil {
				bad.awaitErr = wrap(tc.fault.awaitErr)
			}
			resp, answer := f.post(t, b)
			if got := parseStatus(t, answer); resp.StatusCode != tc.status || got.Code != tc.code || got.Message != tc.message {
				t.Errorf("%d %+v, want %d %d %q", resp.StatusCode, got, tc.status, tc.code, tc.message)
			}
			if (resp.StatusCode == 503) != (resp.Header.Get("Retry-After") != "") {
				t.Errorf("Retry-After %q with %d", resp.Header.Get("Retry-After"), resp.StatusCode)
			}
			bad.appendErr, bad.awaitErr, bad.lost, bad.wrongProof = nil, nil, false, false
			// The client never had an answer: its next try must succeed.
			if resp, answer := f.post(t, b); resp.StatusCode != tc.retry {
				t.Errorf("next try: %d %s", resp.StatusCode, answer)
			}
		})
	}
}

func TestClockRefuses(t *testing.T) {
	f := newFixture(t, func(c *rekor.Config) {
		c.Now = func() (time.Time, error) { return time.Time{}, errors.New("clock went back") }
	})
	resp, answer := f.post(t, body(t, p256(t).request(t, "artefact")))
	if got := parseStatus(t, answer); resp.StatusCode != 503 || got.Code != 14 || strings.Contains(got.Message, "clock") {
		t.Errorf("%d %+v", resp.StatusCode, got)
	}
}

func TestFrozen(t *testing.T) {
	f := newFixture(t, func(c *rekor.Config) { c.Frozen = true })
	resp, answer := f.post(t, body(t, p256(t).request(t, "artefact")))
	if resp.StatusCode != 405 || string(answer) != "This log has been frozen, please switch to the latest log.\n" {
		t.Errorf("%d %q", resp.StatusCode, answer)
	}
}

func TestOnlyOurCertificates(t *testing.T) {
	rootKey, issuerKey := newECDSA(t, elliptic.P384()), newECDSA(t, elliptic.P256())
	ca := func(name string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
			NotBefore: time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2035, 1, 1, 0, 0, 0, 0, time.UTC),
			KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: []byte(name),
		}
	}
	root := sign(t, ca("root"), nil, rootKey.Public(), rootKey)
	issuer := sign(t, ca("issuer"), root, issuerKey.Public(), rootKey)
	impostorKey := newECDSA(t, elliptic.P256())
	impostor := sign(t, ca("issuer"), nil, impostorKey.Public(), impostorKey)
	f := newFixture(t, func(c *rekor.Config) {
		c.Roots, c.Intermediates = []*x509.Certificate{root}, []*x509.Certificate{issuer}
	})
	s := p256(t)
	server := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2026, 1, 1, 0, 10, 0, 0, time.UTC),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, DNSNames: []string{"test.example"},
	}
	// The SAN of a username certificate: an otherName, critical.
	san, err := asn1.Marshal([]asn1.RawValue{{Class: 2, Tag: 0, IsCompound: true, Bytes: []byte{6, 3, 42, 3, 4, 0xa0, 3, 12, 1, 'u'}}})
	if err != nil {
		t.Fatal(err)
	}
	user := &x509.Certificate{
		SerialNumber: big.NewInt(3), NotBefore: server.NotBefore, NotAfter: server.NotAfter, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: san}},
	}
	for _, tc := range []struct {
		name   string
		cert   *x509.Certificate
		status int
	}{
		{"ours, expired long ago", s.certificate(t, issuer, issuerKey), 201},
		{"ours, for a username", sign(t, user, issuer, s.Public(), issuerKey), 201},
		{"bare key", nil, 403},
		{"self-signed", s.certificate(t, nil, s), 403},
		{"our name, another key", s.certificate(t, impostor, impostorKey), 403},
		{"ours, not for code signing", sign(t, server, issuer, s.Public(), issuerKey), 403},
	} {
		t.Run(tc.name, func(t *testing.T) {
			hr := s.request(t, tc.name)
			if tc.cert != nil {
				certified(hr, tc.cert)
			}
			resp, answer := f.post(t, body(t, hr))
			if resp.StatusCode != tc.status {
				t.Errorf("%d %s, want %d", resp.StatusCode, answer, tc.status)
			}
			if resp.StatusCode == 403 && parseStatus(t, answer).Code != 7 {
				t.Errorf("%s", answer)
			}
		})
	}
}

func TestRateLimit(t *testing.T) {
	var seconds atomic.Int64
	f := newFixture(t, func(c *rekor.Config) {
		c.Rate, c.Burst = 1, 2
		c.Now = func() (time.Time, error) { return time.Unix(1_700_000_000+seconds.Load(), 0), nil }
		c.Client = func(r *http.Request) string { return r.Header.Get("Test-Client") }
	})
	try := func(client string) int {
		resp, answer := f.do(t, http.MethodPost, "/api/v2/log/entries", []byte("{}"), "Test-Client", client)
		if resp.StatusCode == 429 && (parseStatus(t, answer).Code != 8 || resp.Header.Get("Retry-After") == "") {
			t.Errorf("%s %v", answer, resp.Header)
		}
		return resp.StatusCode
	}
	for i, tc := range []struct {
		after  int64
		client string
		want   int
	}{
		{0, "192.0.2.1", 400}, {0, "192.0.2.1", 400}, {0, "192.0.2.1", 429},
		{0, "192.0.2.2", 400},
		{1, "192.0.2.1", 400}, {0, "192.0.2.1", 429},
		{0, "2001:db8::1", 400}, {0, "2001:db8::2", 400}, {0, "2001:db8::3", 429}, {0, "2001:db8:0:1::3", 400},
	} {
		seconds.Add(tc.after)
		if got := try(tc.client); got != tc.want {
			t.Errorf("try %d by %s: %d, want %d", i, tc.client, got, tc.want)
		}
	}
}

// slow stops in Append until the gate is open.
type slow struct {
	tree.Tree
	arrived, gate chan struct{}
}

func (s *slow) Append(ctx context.Context, l tree.Leaf) (tree.Entry, bool, error) {
	s.arrived <- struct{}{}
	<-s.gate
	return s.Tree.Append(ctx, l)
}

func TestEntriesAreBounded(t *testing.T) {
	s := &slow{arrived: make(chan struct{}), gate: make(chan struct{})}
	f := newFixture(t, func(c *rekor.Config) { s.Tree = c.Tree; c.Tree = s; c.MaxInFlight = 1 })
	b := body(t, p256(t).request(t, "artefact"))
	done := make(chan int, 1)
	go func() {
		resp, err := f.srv.Client().Post(f.srv.URL+"/api/v2/log/entries", "application/json", bytes.NewReader(b))
		if err != nil {
			done <- 0
			return
		}
		_ = resp.Body.Close()
		done <- resp.StatusCode
	}()
	select {
	case <-s.arrived:
	case status := <-done:
		t.Fatalf("answered before it was appended: %d", status)
	}
	resp, answer := f.post(t, b)
	if got := parseStatus(t, answer); resp.StatusCode != 503 || got.Code != 14 || got.Message != "reached max pushback; retry" || resp.Header.Get("Retry-After") == "" {
		t.Errorf("%d %+v", resp.StatusCode, got)
	}
	close(s.gate)
	if status := <-done; status != 201 {
		t.Errorf("first entry: %d", status)
	}
}

// waiting stops in Entries until the gate is open.
type waiting struct {
	tree.Tree
	arrived, gate chan struct{}
}

func (w *waiting) Entries(ctx context.Context, start, count uint64) ([]tree.Entry, error) {
	w.arrived <- struct{}{}
	<-w.gate
	return w.Tree.Entries(ctx, start, count)
}

// TestBundlesAreBounded: whoever asks for many at once, and takes none, holds no
// more of our memory than the budget.
func TestBundlesAreBounded(t *testing.T) {
	const most = (64 << 20) / tree.Answer
	w := &waiting{arrived: make(chan struct{}), gate: make(chan struct{})}
	f := newFixture(t, func(c *rekor.Config) { w.Tree = c.Tree; c.Tree = w })
	resp, answer := f.post(t, body(t, p256(t).request(t, "artefact")))
	f.created(t, resp, answer)
	handler, answers := f.srv.Config.Handler, make(chan int, most)
	ask := func() *httptest.ResponseRecorder {
		rec := httptest.NewRecorder()
		handler.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/api/v2/tile/entries/000.p/1", nil))
		return rec
	}
	for range most {
		go func() { answers <- ask().Code }()
	}
	for range most {
		<-w.arrived
	}
	if rec := ask(); rec.Code != 503 || rec.Header().Get("Retry-After") == "" || parseStatus(t, rec.Body.Bytes()).Code != 14 {
		t.Errorf("one more: %d %v", rec.Code, rec.Header())
	}
	if resp, _ := f.get(t, "/api/v2/tile/0/000.p/1"); resp.StatusCode != 200 {
		t.Errorf("a tile without entries: %d", resp.StatusCode)
	}
	close(w.gate)
	for range most {
		if code := <-answers; code != 200 {
			t.Errorf("answer %d", code)
		}
	}
}

func TestRefusedReads(t *testing.T) {
	f := newFixture(t)
	for i := range 3 {
		resp, answer := f.post(t, body(t, p256(t).request(t, fmt.Sprint(i))))
		f.created(t, resp, answer)
	}
	for _, tc := range []struct {
		name, path string
		status     int
	}{
		{"beyond the checkpoint", "0/000.p/4", 404},
		{"full tile of a small tree", "0/000", 404},
		{"bundle beyond the checkpoint", "entries/000.p/4", 404},
		{"next bundle", "entries/001.p/1", 404},
		{"level beyond the tree", "1/000.p/1", 404},
		{"level 63", "63/000", 404},
		{"largest index", "entries/x009/x223/x372/x036/x854/x775/807", 404},
		{"ungrouped index", "0/1234", 400},
		{"width zero", "0/000.p/0", 400},
		{"the word of CT logs", "data/000.p/3", 400},
		{"climbing", "0/..%2f..%2f000", 400},
		{"a kilobyte of path", "0/" + strings.Repeat("x000/", 200) + "000", 400},
	} {
		t.Run(tc.name, func(t *testing.T) {
			resp, answer := f.get(t, "/api/v2/tile/"+tc.path)
			if resp.StatusCode != tc.status || resp.Header.Get("Cache-Control") != "no-store" {
				t.Errorf("%d %q %s, want %d", resp.StatusCode, resp.Header.Get("Cache-Control"), answer, tc.status)
			}
			parseStatus(t, answer)
		})
	}
	if resp, _ := f.get(t, "/api/v2/tile/0/000.p/3"); resp.StatusCode != 200 {
		t.Errorf("the tile that is there: %d", resp.StatusCode)
	}
}
