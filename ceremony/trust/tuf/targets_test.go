package tuf

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/testing/ca"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

const service = "https://sig.example"

// trustFiles are a trusted root with an authority and a log that have ended,
// and a signing configuration.
func trustFiles(t testing.TB) (trustedRoot, signingConfig []byte) {
	t.Helper()
	v, err := ca.NewVirtualSigstore()
	if err != nil {
		t.Fatal(err)
	}
	open, ended := trust.Validity{Start: start}, trust.Validity{Start: start.AddDate(-1, 0, 0), End: start}
	fulcio := v.FulcioCertificateAuthorities()[0].(*root.FulcioCertificateAuthority)
	tsa := v.TimestampingAuthorities()[0].(*root.SigstoreTimestampingAuthority)
	old, err := ca.NewVirtualSigstore()
	if err != nil {
		t.Fatal(err)
	}
	oldFulcio := old.FulcioCertificateAuthorities()[0].(*root.FulcioCertificateAuthority)
	newKey := func() *ecdsa.PublicKey { return public(hsmtest.SoftwareKey(hsm.ECDSAP256)) }
	r := trust.Root{
		Logs: []trust.Log{
			{BaseURL: service + "/log/l1", PublicKey: newKey(), Validity: ended}, {BaseURL: service + "/log/l2", PublicKey: newKey(), Validity: open},
		},
		CTLogs: []trust.Log{{BaseURL: service + "/ct/c1", PublicKey: newKey(), Validity: open}},
		CertificateAuthorities: []trust.Authority{
			{Organization: "Acme", CommonName: "root", URI: service, Chain: append(oldFulcio.Intermediates, oldFulcio.Root), Validity: ended},
			{Organization: "Acme", CommonName: "root", URI: service, Chain: append(fulcio.Intermediates, fulcio.Root), Validity: open},
		},
		TimestampAuthorities: []trust.Authority{{
			Organization: "Acme", CommonName: "tsa", URI: service + trust.TimestampPath,
			Chain: []*x509.Certificate{tsa.Leaf, tsa.Intermediates[0], tsa.Root}, Validity: open,
		}},
	}
	if trustedRoot, err = r.Marshal(); err != nil {
		t.Fatal(err)
	}
	c := trust.SigningConfig{CAs: []trust.Service{{URL: service, MajorAPIVersion: 1, Validity: open, Operator: "acme"}}}
	if signingConfig, err = c.Marshal(); err != nil {
		t.Fatal(err)
	}
	return trustedRoot, signingConfig
}

func TestTargets(t *testing.T) {
	trustedRoot, signingConfig := trustFiles(t)
	targets := must(Targets(trustedRoot, signingConfig, start.Add(time.Hour)))(t)
	type flat struct{ Name, Usage, Status, URI string }
	var got []flat
	for _, target := range targets {
		got = append(got, flat{target.Name, target.Usage, target.Status, target.URI})
		if target.Usage == "" {
			continue
		}
		block, rest := pem.Decode(target.Content)
		if block == nil || len(rest) != 0 {
			t.Errorf("%s is not one PEM block", target.Name)
			continue
		}
		var err error
		if block.Type == "CERTIFICATE" {
			_, err = x509.ParseCertificate(block.Bytes)
		} else {
			_, err = x509.ParsePKIXPublicKey(block.Bytes)
		}
		if err != nil {
			t.Errorf("%s: %v", target.Name, err)
		}
	}
	want := []flat{
		{"fulcio_intermediate_v1.crt.pem", "Fulcio", "Expired", service},
		{"fulcio_v1.crt.pem", "Fulcio", "Expired", service},
		{"fulcio_intermediate_v2.crt.pem", "Fulcio", "Active", service},
		{"fulcio_v2.crt.pem", "Fulcio", "Active", service},
		{"tsa_leaf.crt.pem", "TSA", "Active", service + trust.TimestampPath},
		{"tsa_intermediate_0.crt.pem", "TSA", "Active", service + trust.TimestampPath},
		{"tsa_root.crt.pem", "TSA", "Active", service + trust.TimestampPath},
		{"ctfe.pub", "CTFE", "Active", service + "/ct/c1"},
		{"rekor.pub", "Rekor", "Expired", service + "/log/l1"},
		{"rekor_2.pub", "Rekor", "Active", service + "/log/l2"},
		{TrustedRootTarget, "", "", ""},
		{SigningConfigTarget, "", "", ""},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("targets (-want +got):\n%s", diff)
	}
	// A root whose first intermediate has ended goes on with the second.
	r := must(trust.ParseRoot(trustedRoot))(t)
	r.CertificateAuthorities[0].Chain, r.CertificateAuthorities[0].Organization = r.CertificateAuthorities[1].Chain, "Before"
	shared := must(Targets(must(r.Marshal())(t), signingConfig, start.Add(time.Hour)))(t)
	if shared[0].Name != "fulcio_intermediate_v1.crt.pem" || shared[1].Name != "fulcio_v1.crt.pem" || shared[1].Status != "Active" || shared[2].Usage != "TSA" {
		t.Errorf("one chain twice: %s %s, %s %s, %s", shared[0].Name, shared[0].Status, shared[1].Name, shared[1].Status, shared[2].Name)
	}
	if again := must(Targets(trustedRoot, signingConfig, start.Add(time.Hour)))(t); !cmp.Equal(targets, again) {
		t.Error("equal files give different targets")
	}
	p := newPeople(2)
	repo := p.genesis(t, targets)
	if _, err := root.NewTrustedRootFromJSON(repo.Target(TrustedRootTarget)); err != nil {
		t.Error(err)
	}
	for name, files := range map[string][2][]byte{"swapped": {signingConfig, trustedRoot}, "empty": {nil, nil}} {
		if _, err := Targets(files[0], files[1], start); !errors.Is(err, trust.ErrFormat) {
			t.Errorf("%s: %v, want ErrFormat", name, err)
		}
	}
}
