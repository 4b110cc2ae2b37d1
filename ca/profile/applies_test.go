package profile

import (
	"crypto/elliptic"
	"crypto/x509/pkix"
	"encoding/asn1"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	zx509 "github.com/zmap/zcrypto/x509"
	"github.com/zmap/zlint/v3/lint"
)

// TestAboutExtension: the lints that are not asked would have said that they
// do not apply, for every form of every leaf and for the hierarchy; and a
// certificate with one of the extensions gets the findings of the whole
// registry.
func TestAboutExtension(t *testing.T) {
	h := newHierarchy(t)
	issuer := newIssuer(t, h)
	some, err := registry()
	if err != nil {
		t.Fatal(err)
	}
	every := &linter{lints: some.lints, config: some.config}
	check := func(name string, der []byte) (asked int) {
		t.Helper()
		cert, err := zx509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		for _, one := range some.lints {
			id, ok := some.needs[one.Name]
			if _, present := cert.ExtensionsMap[id]; !ok || present {
				asked++
				continue
			}
			if r := one.Execute(cert, some.config); r.Status != lint.NA && r.Status != lint.NE {
				t.Errorf("%s: %s applies: %s", name, one.Name, r.Status)
			}
		}
		if d := cmp.Diff(every.run(cert), some.run(cert)); d != "" {
			t.Errorf("%s: other findings (-every +some): %s", name, d)
		}
		return asked
	}
	for name, spec := range leafSpecs(t) {
		l, err := issuer.Leaf(spec)
		if err != nil {
			t.Fatal(err)
		}
		final, err := l.final(placeholderSCT())
		if err != nil {
			t.Fatal(err)
		}
		for _, tbs := range [][]byte{l.logged, l.precert, final} {
			if asked := check(name, throwawayCopy(t, tbs, issuer.algorithm)); asked == len(some.lints) {
				t.Errorf("%s: every lint was asked", name)
			}
		}
	}
	for _, cert := range [][]byte{h.root.Raw, h.inter.Raw, h.tsaRoot.Raw, h.tsa.Raw} {
		check("hierarchy", cert)
	}
	tmpl, _, err := issuer.template(emailSpec(newKey(t, elliptic.P256()).Public()))
	if err != nil {
		t.Fatal(err)
	}
	for id := range aboutExtension {
		for _, value := range []string{"\x30\x00", "\x30\x03\x01\x01\xff"} {
			with := *tmpl
			with.extensions = append(append([]pkix.Extension{}, tmpl.extensions...), pkix.Extension{Id: parseOID(t, id), Value: []byte(value)})
			b, err := with.encode()
			if err != nil {
				t.Fatal(err)
			}
			tbs, err := b.tbs(nil)
			if err != nil {
				t.Fatal(err)
			}
			der := throwawayCopy(t, tbs, issuer.algorithm)
			if _, err := zx509.ParseCertificate(der); err != nil {
				continue // chancery_parse refuses it
			}
			check("with "+id, der)
		}
	}
}

func throwawayCopy(t *testing.T, tbs []byte, alg *algorithm) []byte {
	t.Helper()
	der, err := throwawaySign(tbs, alg)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func parseOID(t *testing.T, text string) (id asn1.ObjectIdentifier) {
	t.Helper()
	for part := range strings.SplitSeq(text, ".") {
		n, err := strconv.Atoi(part)
		if err != nil {
			t.Fatal(err)
		}
		id = append(id, n)
	}
	return id
}
