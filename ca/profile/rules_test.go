package profile

import (
	"crypto"
	"crypto/elliptic"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sigstore/fulcio/pkg/certificate"
	"github.com/zmap/zlint/v3/lint"
)

// specimen is a good certificate that a row spoils.
type specimen struct {
	template
	last []pkix.Extension
	c    candidate
}

// set replaces the value of an extension.
func (s *specimen) set(id asn1.ObjectIdentifier, change func(*pkix.Extension)) {
	for i := range s.extensions {
		if s.extensions[i].Id.Equal(id) {
			change(&s.extensions[i])
		}
	}
}

func (s *specimen) drop(id asn1.ObjectIdentifier) {
	s.extensions = slices.DeleteFunc(s.extensions, func(e pkix.Extension) bool { return e.Id.Equal(id) })
}

func (s *specimen) add(id asn1.ObjectIdentifier, critical bool, value ...byte) {
	s.extensions = append(s.extensions, pkix.Extension{Id: id, Critical: critical, Value: value})
}

// rulesOf builds and parses the specimen and runs our rules on it.
func (s *specimen) rulesOf(t *testing.T) []string {
	t.Helper()
	b, err := s.encode()
	if err != nil {
		t.Fatal(err)
	}
	var tail []byte
	for _, e := range s.last {
		one, err := encodeExtension(e)
		if err != nil {
			t.Fatal(err)
		}
		tail = append(tail, one...)
	}
	tbs, err := b.tbs(tail)
	if err != nil {
		t.Fatal(err)
	}
	der, err := throwawaySign(tbs, s.algorithm)
	if err != nil {
		t.Fatal(err)
	}
	if s.c.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return (&LintError{Findings: s.c.check()}).Rules()
}

// TestRules: every rule catches a violation, alone or with its neighbours, and
// a good certificate of every kind and form gives none.
func TestRules(t *testing.T) {
	h := newHierarchy(t)
	issuer := newIssuer(t, h)
	key := newKey(t, elliptic.P256())
	list := listOf(t, placeholderSCT())

	newSpecimen := func(kind Kind) *specimen {
		s := &specimen{c: candidate{kind: kind, algorithm: ecdsaSHA256}}
		var tmpl *template
		var err error
		switch kind {
		case leaf:
			tmpl, _, err = issuer.template(emailSpec(key.Public()))
			s.c.issuer, s.last = h.inter, []pkix.Extension{list}
		case Root, TSARoot:
			tmpl, _, err = authorityTemplate(rootSpec(key.Public()), nil)
		case Intermediate:
			tmpl, _, err = authorityTemplate(interSpec(key.Public()), h.root)
			s.c.issuer, s.c.algorithm = h.root, ecdsaSHA384
		case TSA:
			tmpl, _, err = authorityTemplate(tsaSpec(key.Public()), h.tsaRoot)
			s.c.issuer, s.c.algorithm = h.tsaRoot, ecdsaSHA384
		}
		if err != nil {
			t.Fatal(err)
		}
		s.template = *tmpl
		return s
	}
	withKey := func(pub crypto.PublicKey) func(*specimen) {
		return func(s *specimen) {
			spki, err := x509.MarshalPKIXPublicKey(pub)
			if err != nil {
				t.Fatal(err)
			}
			s.spki = spki
		}
	}
	name := func(n pkix.Name) []byte {
		der, err := asn1.Marshal(n.ToRDNSequence())
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	oldIssuer, newIssuerText := certificate.OIDIssuer, certificate.OIDIssuerV2
	bothPurposes := []byte{0x30, 20, 6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 3, 6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 8}
	timeStamping := []byte{0x30, 10, 6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 8}
	forty := asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57264, 1, 40}

	rows := []struct {
		name, rule string
		kind       Kind
		spoil      func(*specimen)
	}{
		{"serial of 63 bits", "chancery_serial", leaf, func(s *specimen) { s.serial = big.NewInt(1 << 62) }},
		{"serial of 21 octets", "chancery_serial", TSA, func(s *specimen) { s.serial = new(big.Int).Lsh(big.NewInt(1), 159) }},
		{"another algorithm than the issuer's", "chancery_signature_algorithm", leaf, func(s *specimen) { s.algorithm = ecdsaSHA384 }},
		{"starts before the issuer", "chancery_validity", leaf, func(s *specimen) { s.notBefore = testStart.Add(-time.Second) }},
		{"ends before it starts", "chancery_validity", Root, func(s *specimen) { s.notAfter = s.notBefore.Add(-time.Second) }},
		{"issuer's name is another", "chancery_issuer_name", leaf, func(s *specimen) { s.issuer = h.root.RawSubject }},
		{"subject is the issuer's", "chancery_issuer_name", Intermediate, func(s *specimen) { s.subject = h.root.RawSubject }},
		{"root names another issuer", "chancery_issuer_name", Root, func(s *specimen) { s.issuer = h.inter.RawSubject }},
		{"SKI of another key", "chancery_ski", leaf, withKey(newKey(t, elliptic.P256()).Public())},
		{"no SKI", "chancery_ski", Root, func(s *specimen) { s.drop(oidSubjectKeyID) }},
		{"AKI of another issuer", "chancery_aki", leaf, func(s *specimen) {
			s.set(oidAuthorityKeyID, func(e *pkix.Extension) { e.Value = append([]byte{0x30, 22, 0x80, 20}, h.root.SubjectKeyId...) })
		}},
		{"no AKI", "chancery_aki", leaf, func(s *specimen) { s.drop(oidAuthorityKeyID) }},
		{"AKI with a serial number", "chancery_aki", leaf, func(s *specimen) {
			s.set(oidAuthorityKeyID, func(e *pkix.Extension) {
				e.Value = append(append([]byte{0x30, 25, 0x80, 20}, h.inter.SubjectKeyId...), 0x82, 1, 5)
			})
		}},
		{"AKI on a root", "chancery_aki", Root, func(s *specimen) {
			s.add(oidAuthorityKeyID, false, append([]byte{0x30, 22, 0x80, 20}, h.root.SubjectKeyId...)...)
		}},
		{"unknown extension", "chancery_extensions", leaf, func(s *specimen) { s.add(asn1.ObjectIdentifier{1, 2, 3}, false, 5, 0) }},
		{"57264.1.40", "chancery_extensions", leaf, func(s *specimen) { s.add(forty, false, 0x0c, 1, 'x') }},
		{"57264.1.7 as an extension", "chancery_extensions", leaf, func(s *specimen) { s.add(oidOtherName, false, 0x0c, 1, 'x') }},
		{"critical 57264 extension", "chancery_extensions", leaf, func(s *specimen) { s.set(oldIssuer, func(e *pkix.Extension) { e.Critical = true }) }},
		{"57264 extension on a CA", "chancery_extensions", Intermediate, func(s *specimen) { s.add(oldIssuer, false, 'x') }},
		{"name constraints on a CA", "chancery_extensions", Intermediate, func(s *specimen) {
			s.add(asn1.ObjectIdentifier{2, 5, 29, 30}, true, 0x30, 9, 0xa0, 7, 0x30, 5, 0x82, 3, 'a', '.', 'b')
		}},
		{"no common name", "chancery_subject", Root, func(s *specimen) { s.subject = name(pkix.Name{Organization: []string{"Acme"}}); s.issuer = s.subject }},
		{"common name with a line break", "chancery_subject", TSA, func(s *specimen) { s.subject = name(pkix.Name{CommonName: "a\nb"}) }},
		{"P-521 authority", "chancery_authority_key", Root, withKey(newKey(t, elliptic.P521()).Public())},
		{"intermediate with its issuer's key", "chancery_authority_key", Intermediate, withKey(h.rootKey.Public())},
		{"CA:FALSE", "chancery_ca_constraints", Intermediate, func(s *specimen) { s.set(oidBasicConstraints, func(e *pkix.Extension) { e.Value = []byte{0x30, 0} }) }},
		{"no path length", "chancery_ca_constraints", Root, func(s *specimen) {
			s.set(oidBasicConstraints, func(e *pkix.Extension) { e.Value = []byte{0x30, 3, 1, 1, 0xff} })
		}},
		{"constraints not critical", "chancery_ca_constraints", Root, func(s *specimen) { s.set(oidBasicConstraints, func(e *pkix.Extension) { e.Critical = false }) }},
		{"CA may sign data", "chancery_ca_ku", Intermediate, func(s *specimen) {
			s.set(oidKeyUsage, func(e *pkix.Extension) { e.Value = []byte{3, 2, 1, 0x86} })
		}},
		{"CA usage not critical", "chancery_ca_ku", Root, func(s *specimen) { s.set(oidKeyUsage, func(e *pkix.Extension) { e.Critical = false }) }},
		{"no CA usage", "chancery_ca_ku", Intermediate, func(s *specimen) { s.drop(oidKeyUsage) }},
		{"root with a purpose", "chancery_root_eku", Root, func(s *specimen) { s.add(oidExtKeyUsage, false, timeStamping...) }},
		{"TSA root with a purpose", "chancery_root_eku", TSARoot, func(s *specimen) { s.add(oidExtKeyUsage, false, timeStamping...) }},
		{"intermediate without purpose", "chancery_intermediate_eku", Intermediate, func(s *specimen) { s.drop(oidExtKeyUsage) }},
		{"intermediate's purpose critical", "chancery_intermediate_eku", Intermediate, func(s *specimen) {
			s.set(oidExtKeyUsage, func(e *pkix.Extension) { e.Critical = true })
		}},
		{"intermediate with path length 1", "chancery_intermediate_pathlen", Intermediate, func(s *specimen) {
			s.set(oidBasicConstraints, func(e *pkix.Extension) { e.Value = []byte{0x30, 6, 1, 1, 0xff, 2, 1, 1} })
		}},
		{"constraints on a leaf", "chancery_end_constraints", leaf, func(s *specimen) { s.add(oidBasicConstraints, true, 0x30, 0) }},
		{"TSA is a CA", "chancery_end_constraints", TSA, func(s *specimen) { s.add(oidBasicConstraints, true, 0x30, 3, 1, 1, 0xff) }},
		{"leaf may sign certificates", "chancery_end_ku", leaf, func(s *specimen) {
			s.set(oidKeyUsage, func(e *pkix.Extension) { e.Value = []byte{3, 2, 2, 0x84} })
		}},
		{"leaf usage not critical", "chancery_end_ku", leaf, func(s *specimen) { s.set(oidKeyUsage, func(e *pkix.Extension) { e.Critical = false }) }},
		{"TSA's purpose not critical", "chancery_tsa_eku", TSA, func(s *specimen) { s.set(oidExtKeyUsage, func(e *pkix.Extension) { e.Critical = false }) }},
		{"TSA with two purposes", "chancery_tsa_eku", TSA, func(s *specimen) { s.set(oidExtKeyUsage, func(e *pkix.Extension) { e.Value = bothPurposes }) }},
		{"leaf's purpose critical", "chancery_leaf_eku", leaf, func(s *specimen) { s.set(oidExtKeyUsage, func(e *pkix.Extension) { e.Critical = true }) }},
		{"leaf for timestamping", "chancery_leaf_eku", leaf, func(s *specimen) { s.set(oidExtKeyUsage, func(e *pkix.Extension) { e.Value = timeStamping }) }},
		{"leaf with two purposes", "chancery_leaf_eku", leaf, func(s *specimen) { s.set(oidExtKeyUsage, func(e *pkix.Extension) { e.Value = bothPurposes }) }},
		{"leaf without purpose", "chancery_leaf_eku", leaf, func(s *specimen) { s.drop(oidExtKeyUsage) }},
		{"leaf with a subject", "chancery_leaf_subject", leaf, func(s *specimen) { s.subject = name(pkix.Name{CommonName: "jane"}) }},
		{"SAN not critical", "chancery_leaf_san", leaf, func(s *specimen) { s.set(oidSubjectAltName, func(e *pkix.Extension) { e.Critical = false }) }},
		{"no SAN", "chancery_leaf_san", leaf, func(s *specimen) { s.drop(oidSubjectAltName) }},
		{"two names", "chancery_leaf_san", leaf, func(s *specimen) {
			s.set(oidSubjectAltName, func(e *pkix.Extension) { e.Value = []byte{0x30, 10, 0x81, 3, 'a', '@', 'b', 0x81, 3, 'c', '@', 'd'} })
		}},
		{"a DNS name", "chancery_leaf_san", leaf, func(s *specimen) {
			s.set(oidSubjectAltName, func(e *pkix.Extension) { e.Value = []byte{0x30, 5, 0x82, 3, 'a', '.', 'b'} })
		}},
		{"an otherName of another type", "chancery_leaf_san", leaf, func(s *specimen) {
			s.set(oidSubjectAltName, func(e *pkix.Extension) { e.Value = []byte{0x30, 11, 0xa0, 9, 6, 2, 0x2a, 3, 0xa0, 3, 0x0c, 1, 'x'} })
		}},
		{"another name than asked for", "chancery_leaf_san", leaf, func(s *specimen) { s.c.san = []byte{0x30, 5, 0x81, 3, 'a', '@', 'b'} }},
		{"P-224 leaf key", "chancery_leaf_key", leaf, withKey(newKey(t, elliptic.P224()).Public())},
		{"the issuer's key", "chancery_leaf_key", leaf, withKey(h.interKey.Public())},
		{"a day and a second", "chancery_leaf_lifetime", leaf, func(s *specimen) { s.notAfter = s.notBefore.Add(MaxLifetime + time.Second) }},
		{"17 KiB", "chancery_leaf_size", leaf, func(s *specimen) { s.set(oldIssuer, func(e *pkix.Extension) { e.Value = make([]byte, 17<<10) }) }},
		{"no old issuer", "chancery_leaf_issuer", leaf, func(s *specimen) { s.drop(oldIssuer) }},
		{"no new issuer", "chancery_leaf_issuer", leaf, func(s *specimen) { s.drop(newIssuerText) }},
		{"issuers differ", "chancery_leaf_issuer", leaf, func(s *specimen) { s.set(oldIssuer, func(e *pkix.Extension) { e.Value = []byte("https://x") }) }},
		{"1.8 is raw text", "chancery_leaf_issuer", leaf, func(s *specimen) { s.set(newIssuerText, func(e *pkix.Extension) { e.Value = []byte("https://x") }) }},
		{"1.24 is raw text", "chancery_leaf_text", leaf, func(s *specimen) {
			s.set(certificate.OIDTokenSubject, func(e *pkix.Extension) { e.Value = []byte("jane") })
		}},
		{"1.1 with NUL", "chancery_leaf_text", leaf, func(s *specimen) { s.set(oldIssuer, func(e *pkix.Extension) { e.Value = []byte("a\x00") }) }},
		{"1.24 not UTF-8", "chancery_leaf_text", leaf, func(s *specimen) {
			s.set(certificate.OIDTokenSubject, func(e *pkix.Extension) { e.Value = []byte{0x0c, 1, 0xff} })
		}},
		{"no SCT", "chancery_leaf_sct", leaf, func(s *specimen) { s.last = nil }},
		{"final with poison", "chancery_leaf_sct", leaf, func(s *specimen) { s.last = []pkix.Extension{poison, list} }},
		{"SCT list critical", "chancery_leaf_sct", leaf, func(s *specimen) { e := list; e.Critical = true; s.last = []pkix.Extension{e} }},
		{"SCT list empty", "chancery_leaf_sct", leaf, func(s *specimen) { s.last = []pkix.Extension{{Id: oidSCTList, Value: []byte{4, 2, 0, 0}}} }},
		{"SCT of version 2", "chancery_leaf_sct", leaf, func(s *specimen) {
			v2 := placeholderSCT()
			v2[0] = 1
			s.last = []pkix.Extension{listOf(t, v2)}
		}},
		{"precertificate with an SCT", "chancery_leaf_sct", leaf, func(s *specimen) { s.c.form, s.last = formPrecertificate, []pkix.Extension{poison, list} }},
		{"precertificate without poison", "chancery_leaf_sct", leaf, func(s *specimen) { s.c.form, s.last = formPrecertificate, nil }},
		{"poison not critical", "chancery_leaf_sct", leaf, func(s *specimen) {
			e := poison
			e.Critical = false
			s.c.form, s.last = formPrecertificate, []pkix.Extension{e}
		}},
		{"poison not NULL", "chancery_leaf_sct", leaf, func(s *specimen) {
			s.c.form, s.last = formPrecertificate, []pkix.Extension{{Id: oidPoison, Critical: true, Value: []byte{4, 0}}}
		}},
	}
	caught := map[string]bool{
		// encode writes no other version, and crypto/x509 parses no other one
		// with extensions: see TestVersionRule.
		"chancery_version": true,
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			s := newSpecimen(row.kind)
			row.spoil(s)
			if got := s.rulesOf(t); !slices.Contains(got, row.rule) {
				t.Errorf("rules %v, want %s", got, row.rule)
			}
			caught[row.rule] = true
		})
	}
	for _, r := range rules {
		if !caught[r.id] {
			t.Errorf("no row violates %s", r.id)
		}
	}
	for _, kind := range everyKind {
		if got := newSpecimen(kind).rulesOf(t); len(got) != 0 {
			t.Errorf("a good %s fails %v", kind, got)
		}
	}
}

func TestVersionRule(t *testing.T) {
	if checkVersion(&candidate{cert: &x509.Certificate{Version: 1}}) == "" || checkVersion(&candidate{cert: &x509.Certificate{Version: 3}}) != "" {
		t.Error("chancery_version does not tell 1 from 3")
	}
}

// TestRegistry: the registry is of the sources of the design and no other, and
// every exception has a reason.
func TestRegistry(t *testing.T) {
	l, err := registry()
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[lint.LintSource]bool)
	for _, one := range l.lints {
		if !slices.Contains(lintSources, one.Source) {
			t.Errorf("%s is of source %s", one.Name, one.Source)
		}
		seen[one.Source] = true
	}
	for _, source := range []lint.LintSource{lint.RFC5280, lint.RFC5480, lint.RFC5891, lint.RFC8813, lint.Community} {
		if !seen[source] {
			t.Errorf("no lint of %s: is its package imported?", source)
		}
	}
	for name, reason := range exceptions {
		if len(reason) < 20 {
			t.Errorf("exception %s has no reason", name)
		}
	}
}

// TestExceptionIsNeeded: a name that the excepted lint would refuse is issued,
// and the rule in its place still refuses what has no host.
func TestExceptionIsNeeded(t *testing.T) {
	h := newHierarchy(t)
	issuer := newIssuer(t, h)
	spec := emailSpec(newKey(t, elliptic.P256()).Public())
	spec.SAN = SAN{Type: URI, Value: "spiffe://prod/build"}
	if _, err := issuer.Leaf(spec); err != nil {
		t.Error(err)
	}
	reason := exceptions["e_ext_san_uri_host_not_fqdn_or_ip"]
	delete(exceptions, "e_ext_san_uri_host_not_fqdn_or_ip")
	defer func() { exceptions["e_ext_san_uri_host_not_fqdn_or_ip"] = reason }()
	_, err := issuer.Leaf(spec)
	wantRule(t, err, "e_ext_san_uri_host_not_fqdn_or_ip")
}

// TestFatalLintStops: a lint that panics is fatal, and an exception does not
// excuse it.
func TestFatalLintStops(t *testing.T) {
	one := &lint.CertificateLint{LintMetadata: lint.LintMetadata{Name: "e_ext_san_uri_host_not_fqdn_or_ip", Source: lint.RFC5280}}
	l := &linter{lints: []*lint.CertificateLint{one}, config: lint.NewEmptyConfig()}
	found := l.run(nil) // a nil constructor and a nil certificate: Execute recovers
	if len(found) != 1 || !strings.Contains(found[0].Detail, "panicked") {
		t.Errorf("findings %v", found)
	}
}
