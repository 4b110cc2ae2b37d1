package ceremony

import (
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/hsm"
)

// csrID and signID are the two ceremonies.
const (
	csrID  = "inter-csr-1"
	signID = "inter-sign-1"
)

// newInter is the certificate that both definitions name.
const newInter = `certificates:
  inter-g2: {key: inter-g2, issuer: root, subject: {o: Chancery Demo, cn: Sigstore Intermediate G2}, years: 3, path-len: 0, eku: [codeSigning]}
`

// apartDefinition is the beginning of a definition of one of the two ceremonies.
func (l *life) apartDefinition(id string, kind Kind, token, rest string) string {
	return fmt.Sprintf(`version: 1
id: %s
kind: %s
environment: rehearsal
previous: {ceremony: %s, heads: ["%x"]}
people:
  - {id: a1, role: administrator, name: The Administrator}
  - {id: w1, role: witness, name: First Witness}
quorum: {witness: 1}
tokens:
  %s: {uri: "pkcs11:token=%s"}
entropy: {mode: commit-reveal, contributors: []}
outputs: {dir: out}
`, id, kind, l.id, l.head, token, token) + newInter + rest
}

// csrSource is the online host's definition.
func (l *life) csrSource(rest string) string {
	return l.apartDefinition(csrID, IntermediateCSR, DemoOnlineToken,
		"rotation: {overlap: 7d}\nkeys: {inter-g2: {token: online, alg: ecdsa-p256}}\n"+rest)
}

// signSource is the root host's definition, of the request with this last
// record.
func (l *life) signSource(head Hash) string {
	return l.apartDefinition(signID, SignIntermediate, DemoRootToken,
		fmt.Sprintf("request: {ceremony: %s, head: \"%x\"}\nkeys: {inter-g2: {alg: ecdsa-p256}}\n", csrID, head))
}

// host performs a ceremony on one host, which has one of the tokens and a copy
// of the outputs of before, and nothing of the other host.
type host struct {
	def  *Definition
	opts Options
}

func (l *life) host(source, token string) *host {
	l.t.Helper()
	now := l.now
	return &host{parse(l.t, source), Options{
		Tokens: map[string]hsm.Token{token: l.tokens[token]}, Previous: l.last.Dir, Resume: true,
		Dir: filepath.Join(memoryFolder(l.t), "out"), Now: func() (time.Time, error) { return now, nil },
		Custodian: l.options().Custodian,
	}}
}

func (h *host) run(t testing.TB, bundle string) error {
	t.Helper()
	h.opts.Bundle = bundle
	_, err := Rehearse(t.Context(), h.def, h.opts)
	return err
}

func (h *host) export(t testing.TB, path string) {
	t.Helper()
	if _, err := Export(h.opts.Dir, path); err != nil {
		t.Fatal(err)
	}
}

func (h *host) head(t testing.TB) Hash {
	t.Helper()
	s, err := ReadStatus(h.opts.Dir)
	if err != nil {
		t.Fatal(err)
	}
	return s.Head
}

// apart is an intermediate on two hosts, on three days.
type apart struct {
	online, offline   *host
	request, response string // paths of the bundles
}

// asks is the first day: the online host has a key and a request.
func (l *life) asks(rest string) *apart {
	l.t.Helper()
	stick := l.t.TempDir()
	a := &apart{request: filepath.Join(stick, "request.tar"), response: filepath.Join(stick, "response.tar")}
	a.online = l.host(l.csrSource(rest), DemoOnlineToken)
	if err := a.online.run(l.t, ""); !errors.Is(err, ErrBundle) {
		l.t.Fatalf("online, before the exchange: %v, want ErrBundle", err)
	}
	a.online.export(l.t, a.request)
	return a
}

// answers is the second day: the root signs.
func (l *life) answers(a *apart) {
	l.t.Helper()
	l.now = l.now.AddDate(0, 0, 1)
	a.offline = l.host(l.signSource(a.online.head(l.t)), DemoRootToken)
	if err := a.offline.run(l.t, ""); !errors.Is(err, ErrBundle) {
		l.t.Fatalf("offline, before the exchange: %v, want ErrBundle", err)
	}
	if err := a.offline.run(l.t, a.request); err != nil {
		l.t.Fatal(err)
	}
	a.offline.export(l.t, a.response)
}

// completes is the third day: the outputs are those to serve.
func (l *life) completes(a *apart) {
	l.t.Helper()
	l.now = l.now.AddDate(0, 0, 1)
	now := l.now
	a.online.opts.Now = func() (time.Time, error) { return now, nil }
	if err := a.online.run(l.t, a.response); err != nil {
		l.t.Fatal(err)
	}
	l.last, l.id, l.head = a.online.opts, csrID, a.online.head(l.t)
}

// An intermediate is made online, its certificate offline, in two ceremonies.
// What was signed before verifies after, and what is signed after does too.
func TestIntermediateApart(t *testing.T) {
	l := begin(t, "")
	before := l.sign()
	a := l.asks("")
	l.answers(a)
	l.completes(a)
	for _, h := range []*host{a.online, a.offline} {
		if err := Verify(h.opts.Dir).Err(); err != nil {
			t.Errorf("verify %s: %v", h.def.Kind, err)
		}
	}
	after := l.sign()
	for name, s := range map[string]*signed{"before": before, "after": after} {
		if err := l.verify(s); err != nil {
			t.Errorf("signature %s: %v", name, err)
		}
	}
	trusted, err := trust.ParseRoot(l.read(trustedRootName))
	if err != nil || len(trusted.CertificateAuthorities) != 2 {
		t.Errorf("%d certificate authorities, %v", len(trusted.CertificateAuthorities), err)
	}
}
