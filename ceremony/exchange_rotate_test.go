package ceremony

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/hsm"
)

// An intermediate that is online gets its successor from the root that is
// offline.
func TestRotateOnTwoMachines(t *testing.T) {
	source := twoMachineSource(t)
	source = source[:bytes.Index([]byte(source), []byte("tuf:\n"))] + source[bytes.Index([]byte(source), []byte("service:\n")):]
	first := exchange(t, parse(t, source))
	heads := ""
	for _, h := range []*half{first.online, first.offline} {
		s, err := ReadStatus(h.opts.Dir)
		if err != nil {
			t.Fatal(err)
		}
		heads += fmt.Sprintf("%q, ", fmt.Sprintf("%x", s.Head))
	}
	d := parse(t, fmt.Sprintf(`version: 1
id: rotate-1
kind: rotate
environment: rehearsal
previous: {ceremony: %s, heads: [%s]}
people:
  - {id: a1, role: administrator, name: The Administrator}
  - {id: w1, role: witness, name: First Witness}
quorum: {witness: 1}
tokens:
  root:   {uri: "pkcs11:token=root", machine: offline}
  online: {uri: "pkcs11:token=online", machine: online}
entropy: {mode: commit-reveal, contributors: [w1]}
crl: {valid: 1y}
outputs: {dir: out}
`, first.online.def.ID, heads[:len(heads)-2])+strings.NewReplacer(
		"certificates:\n", "  tsa-2:    {token: online, alg: ecdsa-p256}\ncertificates:\n"+
			"  tsa-2: {key: tsa-2, issuer: tsa-root, subject: {o: Chancery Demo, cn: Timestamping G2}, years: 3, eku: [timeStamping]}\n",
	).Replace(newIntermediate))
	stick := t.TempDir()
	x := &exchanged{request: filepath.Join(stick, "request.tar"), response: filepath.Join(stick, "response.tar")}
	next := func(before *half, m Machine, token string) *half {
		h := newHalf(t, d, m, before.opts.Tokens[token])
		h.opts.Previous = before.opts.Dir
		return h
	}
	x.online, x.offline = next(first.online, Online, DemoOnlineToken), next(first.offline, Offline, DemoRootToken)
	if err := x.online.run(t, ""); !errors.Is(err, ErrBundle) {
		t.Fatal(err)
	}
	x.online.export(t, x.request)
	if err := x.offline.run(t, x.request); err != nil {
		t.Fatal(err)
	}
	x.offline.export(t, x.response)
	if err := x.online.run(t, x.response); err != nil {
		t.Fatal(err)
	}
	for _, h := range []*half{x.online, x.offline} {
		if err := Verify(h.opts.Dir).Err(); err != nil {
			t.Errorf("verify %s: %v", h.def.Machine(), err)
		}
	}
	for _, name := range []string{trustedRootName, signingConfigName, keysName, chainName, crlName} {
		if !bytes.Equal(contentOf(t, filepath.Join(x.online.opts.Dir, name)), contentOf(t, filepath.Join(x.offline.opts.Dir, name))) {
			t.Errorf("%s differs", name)
		}
	}
	trusted, err := trust.ParseRoot(contentOf(t, filepath.Join(x.online.opts.Dir, trustedRootName)))
	if err != nil || len(trusted.CertificateAuthorities) != 2 || len(trusted.TimestampAuthorities) != 2 {
		t.Errorf("%d certificate authorities, %d for timestamps, %v", len(trusted.CertificateAuthorities), len(trusted.TimestampAuthorities), err)
	}
	ring, err := trust.LoadKeyRing(filepath.Join(x.online.opts.Dir, keysName))
	if err != nil {
		t.Fatal(err)
	}
	for _, role := range []hsm.Role{hsm.RoleIntermediate, hsm.RoleTSA} {
		k := ring.Keys[role]
		if _, err := x.online.opts.Tokens[k.Token].Open(t.Context(), k.Ref(), role); err != nil {
			t.Errorf("open the new key of %s as keys.yaml names it: %v", role, err)
		}
	}
}
