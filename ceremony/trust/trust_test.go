package trust

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sigstore/sigstore-go/pkg/root"
)

var start = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func newKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// newChain returns a certificate and its root; the certificate is a CA or not.
func newChain(t testing.TB, ca bool) []*x509.Certificate {
	t.Helper()
	rootKey, key := newKey(t, elliptic.P384()), newKey(t, elliptic.P256())
	template := func(name string, ca bool) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: start, NotAfter: start.AddDate(1, 0, 0),
			IsCA: ca, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
	}
	issue := func(tmpl, issuer *x509.Certificate, pub *ecdsa.PublicKey) *x509.Certificate {
		der, err := x509.CreateCertificate(rand.Reader, tmpl, issuer, pub, rootKey)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	rootCert := issue(template("root", true), template("root", true), &rootKey.PublicKey)
	return []*x509.Certificate{issue(template("leaf", ca), rootCert, &key.PublicKey), rootCert}
}

func newRoot(t testing.TB) Root {
	t.Helper()
	valid := Validity{Start: start, End: start.AddDate(1, 0, 0)}
	open := Validity{Start: start}
	log := func(url string) Log {
		return Log{BaseURL: url, PublicKey: &newKey(t, elliptic.P256()).PublicKey, Validity: open}
	}
	return Root{
		Logs:                   []Log{log("https://sig.example/log/l1"), log("https://sig.example/log/l2")},
		CTLogs:                 []Log{log("https://sig.example/ct/c1")},
		CertificateAuthorities: []Authority{{"Acme", "root", "https://sig.example", newChain(t, true), valid}},
		TimestampAuthorities:   []Authority{{"Acme", "tsa root", "https://sig.example" + TimestampPath, newChain(t, false), valid}},
	}
}

func TestRootRoundTrip(t *testing.T) {
	want := newRoot(t)
	data, err := want.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseRoot(data)
	if err != nil {
		t.Fatal(err)
	}
	again, err := got.Marshal()
	if err != nil || !bytes.Equal(data, again) {
		t.Errorf("written, read and written again it differs (%v):\n%s", err, cmp.Diff(string(data), string(again)))
	}
	tr, err := root.NewTrustedRootFromJSON(data)
	if err != nil {
		t.Fatal(err)
	}
	if len(tr.RekorLogs()) != 2 || len(tr.CTLogs()) != 1 || len(tr.TimestampingAuthorities()) != 1 {
		t.Errorf("sigstore-go reads %d logs, %d CT logs, %d timestamp authorities",
			len(tr.RekorLogs()), len(tr.CTLogs()), len(tr.TimestampingAuthorities()))
	}
}

func TestRootMarshalRefuses(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*Root)
	}{
		{"no log", func(r *Root) { r.Logs = nil }},
		{"no certificate authority", func(r *Root) { r.CertificateAuthorities = nil }},
		{"log without a start", func(r *Root) { r.Logs[0].Validity = Validity{} }},
		{"log that ends before it starts", func(r *Root) { r.Logs[0].Validity.End = start.Add(-1) }},
		{"log without a key", func(r *Root) { r.Logs[0].PublicKey = nil }},
		{"log on P-384", func(r *Root) { r.Logs[0].PublicKey = &newKey(t, elliptic.P384()).PublicKey }},
		{"two shards with one key", func(r *Root) { r.Logs[1].PublicKey = r.Logs[0].PublicKey }},
		{"log without a URL", func(r *Root) { r.Logs[0].BaseURL = "" }},
		{"log with a bare host", func(r *Root) { r.Logs[0].BaseURL = "sig.example" }},
		{"authority without a root", func(r *Root) { r.CertificateAuthorities[0].Chain = r.CertificateAuthorities[0].Chain[:1] }},
		{"authority with a leaf", func(r *Root) { r.CertificateAuthorities[0].Chain = r.TimestampAuthorities[0].Chain }},
		{"authority in the wrong order", func(r *Root) {
			c := r.CertificateAuthorities[0].Chain
			c[0], c[1] = c[1], c[0]
		}},
		{"authority with another's root", func(r *Root) { r.CertificateAuthorities[0].Chain[1] = r.TimestampAuthorities[0].Chain[1] }},
		{"timestamp authority without a leaf", func(r *Root) { r.TimestampAuthorities[0].Chain = r.CertificateAuthorities[0].Chain }},
		{"authority without a start", func(r *Root) { r.TimestampAuthorities[0].Validity = Validity{} }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRoot(t)
			tc.change(&r)
			if _, err := r.Marshal(); err == nil {
				t.Error("written")
			}
		})
	}
}

func TestParseRootRefuses(t *testing.T) {
	data, err := newRoot(t).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	replaced := func(old, new string) string { return strings.Replace(string(data), old, new, 1) }
	for _, tc := range []struct{ name, content string }{
		{"empty", ""},
		{"not JSON", "{"},
		{"array", "[]"},
		{"media type v0.2", replaced("version=0.1", "version=0.2")},
		{"unknown field", replaced(`"tlogs"`, `"tlogz"`)},
		{"two values", string(data) + "{}"},
		{"no start", replaced(`"start": "2026-11-22T12:00:00Z"`, "")},
		{"key of another type", replaced("PKIX_ECDSA_P256_SHA_256", "PKIX_ED25519")},
		{"log id of another key", replaced(`"keyId": "`, `"keyId": "AAAA`)},
		{"key cut short", replaced(`"rawBytes": "MFkw`, `"rawBytes": "`)},
		{"huge", strings.Repeat(" ", maxFile+1)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.content == string(data) {
				t.Fatal("nothing changed")
			}
			if _, err := ParseRoot([]byte(tc.content)); !errors.Is(err, ErrFormat) {
				t.Errorf("error %v, want ErrFormat", err)
			}
		})
	}
}

func newSigningConfig() SigningConfig {
	v := Validity{Start: start}
	return SigningConfig{
		CAs:   []Service{{"https://127.0.0.1:8443", 1, v, "acme"}},
		OIDC:  []Service{{"https://127.0.0.1:8443/oidc", 1, v, "acme"}},
		Rekor: []Service{{"https://127.0.0.1:8443", 2, v, "acme"}},
		TSAs:  []Service{{"https://127.0.0.1:8443" + TimestampPath, 1, v, "acme"}},
	}
}

func TestSigningConfigMovesToAnotherAddress(t *testing.T) {
	data, err := newSigningConfig().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	moved, err := RewriteServiceURL(data, "https://127.0.0.1:9999")
	if err != nil {
		t.Fatal(err)
	}
	want := newSigningConfig()
	want.CAs[0].URL, want.Rekor[0].URL, want.TSAs[0].URL =
		"https://127.0.0.1:9999", "https://127.0.0.1:9999", "https://127.0.0.1:9999"+TimestampPath
	got, err := ParseSigningConfig(moved)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("after the move (-want +got):\n%s", diff)
	}
	back, err := RewriteServiceURL(moved, "https://127.0.0.1:8443")
	if err != nil || !bytes.Equal(back, data) {
		t.Errorf("moved there and back it differs (%v)", err)
	}
	for _, bad := range []string{"", "127.0.0.1:1", "https://h/path", "ftp://h", "https://h?q", "https://u:p@h"} {
		if _, err := RewriteServiceURL(data, bad); err == nil {
			t.Errorf("moved to %q", bad)
		}
	}
}

func TestSigningConfigBySigstore(t *testing.T) {
	data, err := newSigningConfig().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	sc, err := root.NewSigningConfigFromJSON(data)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := root.SelectService(sc.FulcioCertificateAuthorityURLs(), []uint32{1}, start); err != nil || s.URL != "https://127.0.0.1:8443" {
		t.Errorf("CA %+v, %v", s, err)
	}
	if _, err := root.SelectServices(sc.RekorLogURLs(), sc.RekorLogURLsConfig(), []uint32{2}, start); err != nil {
		t.Error(err)
	}
	// An empty list has no configuration: sigstore-js would look for a member.
	empty := newSigningConfig()
	empty.TSAs = nil
	if data, err = empty.Marshal(); err != nil || bytes.Contains(data, []byte("tsaConfig")) {
		t.Errorf("configuration of no timestamp authority: %s (%v)", data, err)
	}
}

func TestSigningConfigRefuses(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*Service)
	}{
		{"final slash", func(s *Service) { s.URL += "/" }},
		{"no version", func(s *Service) { s.MajorAPIVersion = 0 }},
		{"no operator", func(s *Service) { s.Operator = "" }},
		{"no start", func(s *Service) { s.Validity = Validity{} }},
		{"no URL", func(s *Service) { s.URL = "" }},
	} {
		c := newSigningConfig()
		tc.change(&c.CAs[0])
		if _, err := c.Marshal(); !errors.Is(err, ErrIncomplete) {
			t.Errorf("%s: %v, want ErrIncomplete", tc.name, err)
		}
	}
	data, err := newSigningConfig().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for _, change := range [][2]string{{"v0.2", "v0.1"}, {`"ANY"`, `"ALL"`}, {"caUrls", "caUrlz"}, {`"start": "2026-11-22T12:00:00Z"`, ""}} {
		if _, err := ParseSigningConfig([]byte(strings.Replace(string(data), change[0], change[1], 1))); !errors.Is(err, ErrFormat) {
			t.Errorf("%s for %s: %v, want ErrFormat", change[1], change[0], err)
		}
	}
}

func TestClientConfig(t *testing.T) {
	tr, err := newRoot(t).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	sc, err := newSigningConfig().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	data, err := MarshalClientConfig(tr, sc)
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		MediaType                  string
		TrustedRoot, SigningConfig json.RawMessage
	}
	if err := json.Unmarshal(data, &got); err != nil || got.MediaType != ClientConfigMediaType {
		t.Fatalf("media type %q, %v", got.MediaType, err)
	}
	if _, err := ParseRoot(got.TrustedRoot); err != nil {
		t.Error(err)
	}
	if _, err := ParseSigningConfig(got.SigningConfig); err != nil {
		t.Error(err)
	}
	if _, err := MarshalClientConfig(sc, tr); !errors.Is(err, ErrFormat) {
		t.Errorf("files swapped: %v, want ErrFormat", err)
	}
}

func FuzzParseRoot(f *testing.F) {
	data, err := newRoot(f).Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := ParseRoot(data); err != nil && !errors.Is(err, ErrFormat) {
			t.Fatalf("error %v is not ErrFormat", err)
		}
	})
}

func FuzzParseSigningConfig(f *testing.F) {
	data, err := newSigningConfig().Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := ParseSigningConfig(data); err != nil && !errors.Is(err, ErrFormat) {
			t.Fatalf("error %v is not ErrFormat", err)
		}
	})
}
