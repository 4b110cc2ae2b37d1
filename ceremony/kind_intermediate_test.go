package ceremony

import (
	"bytes"
	"context"
	"crypto"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/ceremony/bundle"
	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/ceremony/trust/tuf"
	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/tpm"
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
func (l *life) csrSource(token, rest string) string {
	return l.apartDefinition(csrID, IntermediateCSR, token,
		"rotation: {overlap: 7d}\nkeys: {inter-g2: {token: "+token+", alg: ecdsa-p256}}\n"+rest)
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

// otherToken is one more online token; the definition calls it so.
func (l *life) otherToken(t *testing.T) string {
	t.Helper()
	name := fmt.Sprintf("online-%d", len(l.tokens))
	l.tokens[name] = hsmtest.SoftHSM(t)
	return name
}

// asks is the first day: the online host has a key and a request.
func (l *life) asks(token, rest string) *apart {
	l.t.Helper()
	stick := l.t.TempDir()
	a := &apart{request: filepath.Join(stick, "request.tar"), response: filepath.Join(stick, "response.tar")}
	a.online = l.host(l.csrSource(token, rest), token)
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
	a := l.asks(DemoOnlineToken, "")
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

// forgery is what someone with the online host, but not its people, could make:
// records that are changed, sealed again, and put into a bundle that fits.
func (a *apart) forgery(t *testing.T, change func(*testing.T, *Record)) (path string, head Hash) {
	t.Helper()
	records, err := readTranscriptFile(filepath.Join(a.online.opts.Dir, TranscriptName))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{definitionName: a.online.def.source}
	for i := range records {
		change(t, &records[i])
		if i > 0 {
			records[i].Prev = records[i-1].Hash
		}
		records[i] = reseal(t, records[i])
		switch r := &records[i]; {
		case r.Step == "request/inter-g2":
			var d requestData
			if err := r.decode(&d); err != nil {
				t.Fatal(err)
			}
			files["inter-g2"+requestSuffix] = requestPEM(&x509.CertificateRequest{Raw: d.Request})
		case r.Step == "key/inter-g2" && r.Type == Done:
			var d keyResult
			if err := r.decode(&d); err != nil {
				t.Fatal(err)
			}
			if files["inter-g2"+evidenceSuffix], err = evidenceJSON(d.Evidence); err != nil {
				t.Fatal(err)
			}
		}
	}
	transcript, err := transcriptFile(records)
	if err != nil {
		t.Fatal(err)
	}
	files[TranscriptName] = transcript.content
	head = Hash(records[len(records)-1].Digest())
	header := bundle.Header{Ceremony: csrID, Kind: bundle.Request, Head: head}
	var list []bundle.File
	for _, name := range a.online.def.requestNames() {
		list = append(list, bundle.File{Name: name, Content: files[name]})
	}
	b, err := bundle.New(header, list)
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "forged.tar")
	if err := b.WriteFile(path); err != nil {
		t.Fatal(err)
	}
	return path, head
}

// edited changes the data of one record.
func edited(step string, typ RecordType, change func(string) string) func(*testing.T, *Record) {
	return func(t *testing.T, r *Record) {
		t.Helper()
		if r.Step != step || r.Type != typ {
			return
		}
		data := change(string(r.Data))
		if data == string(r.Data) {
			t.Fatalf("record %d is as it was", r.Seq)
		}
		r.Data = json.RawMessage(data)
	}
}

func swapped(before, after string) func(string) string {
	return func(s string) string { return strings.Replace(s, before, after, 1) }
}

// asking puts another request into the record of the request.
func asking(der []byte) func(*testing.T, *Record) {
	return edited("request/inter-g2", Done, func(string) string {
		sum := sha256.Sum256(der)
		return fmt.Sprintf(`{"request":%q,"sha256":"%x"}`, base64.StdEncoding.EncodeToString(der), sum)
	})
}

// The root refuses every request that is not what its own definition says, even
// if the definition names its last record and the bundle fits: nothing is
// signed, and nothing recorded of it.
func TestRequestRefused(t *testing.T) {
	l := begin(t, "")
	a := l.asks(DemoOnlineToken, "")
	key := l.tokenKey(t, a.online)
	subject := a.online.def.subject(a.online.def.Certificates["inter-g2"].Subject)
	csr := func(template x509.CertificateRequest, key crypto.Signer) []byte {
		if template.Subject.CommonName == "" {
			template.Subject = subject
		}
		return requestOf(t, template, key)
	}
	good := csr(x509.CertificateRequest{}, contextSigner{t.Context(), key})
	stranger := generated(t, elliptic.P256())
	for _, tc := range []struct {
		name   string
		change func(*testing.T, *Record)
		want   error
	}{
		{"nothing is changed", func(*testing.T, *Record) {}, nil},
		{"for another key", asking(csr(x509.CertificateRequest{}, stranger)), ErrRequest},
		{"another's signature", asking(signedInfo(t, infoOf(t, 0, mustMarshal(t, subject.ToRDNSequence()), spkiOf(t, key.Public())), stranger)), ErrRequest},
		{"for a key on another curve", asking(csr(x509.CertificateRequest{}, generated(t, elliptic.P521()))), ErrRequest},
		{"something after it", asking(append(bytes.Clone(good), 0)), ErrRequest},
		{"extensions are asked for", asking(csr(x509.CertificateRequest{DNSNames: []string{"acme.example"}}, contextSigner{t.Context(), key})), ErrRequest},
		{"another subject", asking(csr(x509.CertificateRequest{Subject: pkix.Name{CommonName: "Sigstore Root G2"}}, contextSigner{t.Context(), key})), ErrRequest},
		{"a hash that is not its", edited("request/inter-g2", Done, swapped(`"sha256":"`, `"sha256":"0`)), ErrTranscript},
		{"a key that can be taken out", edited("key/inter-g2", Done, swapped(`"EXTRACTABLE":"false"`, `"EXTRACTABLE":"true"`)), hsm.ErrPolicy},
		{"a key that was brought", edited("key/inter-g2", Done, swapped(`"LOCAL":"true"`, `"LOCAL":"false"`)), hsm.ErrPolicy},
		{"evidence of another self-test", edited("key/inter-g2", Done, swapped(`self-test of`, `self-test  of`)), hsm.ErrBadSignature},
		{"evidence of another key", edited("key/inter-g2", Done, swapped(`"spkiSHA256":"`, `"spkiSHA256":"0`)), hsm.ErrMismatch},
		{"evidence that claims more than was shown", edited("key/inter-g2", Done, swapped(`"level":"software"`, `"level":"attested"`)), ErrTranscript},
		{"a key in another token", edited("inventory/online", Done, swapped(`"serial":"`, `"serial":"0`)), ErrTranscript},
		{"a ceremony of another definition", edited("open", Done, swapped(`"definitionSHA256":"`, `"definitionSHA256":"0`)), ErrDefinition},
		{"a ceremony of another kind", edited("open", Done, swapped(`"kind":"intermediate-csr"`, `"kind":"rotate"`)), ErrTranscript},
		{"a production ceremony", edited("open", Done, swapped(`"environment":"rehearsal"`, `"environment":"production"`)), ErrTranscript},
		{"nobody agreed", edited("people", Statement, swapped(`"present":true`, `"present":false`)), ErrTranscript},
		{"a root that is revoked", edited("previous", Done, l.revokedRoot(t)), ErrPrevious},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path, head := a.forgery(t, tc.change)
			offline := l.host(l.signSource(head), DemoRootToken)
			if err := offline.run(t, ""); !errors.Is(err, ErrBundle) {
				t.Fatal(err)
			}
			before := countRecords(t, offline.opts.Dir)
			err := offline.run(t, path)
			if !errors.Is(err, tc.want) || tc.want != nil && countRecords(t, offline.opts.Dir) != before {
				t.Errorf("error %v, want %v; %d records were written", err, tc.want, countRecords(t, offline.opts.Dir)-before)
			}
		})
	}
}

// tokenKey is the key that the online host made.
func (l *life) tokenKey(t *testing.T, h *host) hsm.Key {
	t.Helper()
	records, err := readTranscriptFile(filepath.Join(h.opts.Dir, TranscriptName))
	if err != nil {
		t.Fatal(err)
	}
	f := factsOf(t, h.def)
	if err := f.replay(records); err != nil {
		t.Fatal(err)
	}
	k := f.keys["inter-g2"]
	key, err := l.tokens[DemoOnlineToken].Open(t.Context(), hsm.Ref{URI: k.evidence.URI, SPKI: k.spki}, hsm.RoleIntermediate)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// revokedRoot puts a list of the root's, on which the root itself is, in the
// place of the one that was carried over.
func (l *life) revokedRoot(t *testing.T) func(string) string {
	t.Helper()
	root := l.certificate2(rootName)
	throwAway := generated(t, elliptic.P256())
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(9), ThisUpdate: l.now, NextUpdate: l.now.AddDate(1, 0, 0),
		RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: root.SerialNumber, RevocationTime: l.now}},
	}, root, throwAway)
	if err != nil {
		t.Fatal(err)
	}
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		t.Fatal(err)
	}
	if der, err = signCRL(t.Context(), l.key(hsm.RoleRoot), list.RawTBSRevocationList); err != nil {
		t.Fatal(err)
	}
	encoded := pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
	if _, err := parseCRL(encoded, root); err != nil {
		t.Fatal(err)
	}
	return swapped(base64.StdEncoding.EncodeToString(l.read(crlName)), base64.StdEncoding.EncodeToString(encoded))
}

// What does not fit the definition of the root's ceremony, or is no bundle for
// it, is refused.
func TestRequestOfAnotherCeremony(t *testing.T) {
	l := begin(t, "")
	a := l.asks(DemoOnlineToken, "")
	head := a.online.head(t)
	source := l.signSource(head)
	other := l.asks(l.otherToken(t), "") // another key
	stranger := begin(t, "")
	strangers := stranger.asks(DemoOnlineToken, "")
	second := l.otherToken(t)
	windowed := l.host(strings.Replace(l.csrSource(second, ""), "environment: rehearsal", "environment: rehearsal\nwindow: {not-before: 2026-11-22T09:00:00Z, not-after: 2026-11-22T18:00:00Z}", 1), second)
	late := &apart{online: windowed, request: filepath.Join(t.TempDir(), "request.tar")}
	if err := windowed.run(t, ""); !errors.Is(err, ErrBundle) {
		t.Fatal(err)
	}
	windowed.export(t, late.request)
	l.now = time.Date(2026, 11, 22, 17, 59, 30, 0, time.UTC)
	if err := l.host(l.signSource(windowed.head(t)), DemoRootToken).run(t, late.request); !errors.Is(err, ErrWindow) {
		t.Errorf("half a minute before the end of its window: %v, want ErrWindow", err)
	}
	l.now = l.now.AddDate(0, 0, 1)
	content := contentOf(t, a.request)
	for _, tc := range []struct {
		name   string
		source string
		path   string
		want   error
	}{
		{"another id", strings.Replace(source, "request: {ceremony: "+csrID, "request: {ceremony: inter-csr-2", 1), a.request, bundle.ErrOther},
		{"another last record", l.signSource(Hash{}), a.request, bundle.ErrOther},
		{"another run of the same id", source, other.request, bundle.ErrOther},
		{"a longer life", strings.Replace(source, "years: 3", "years: 4", 1), a.request, ErrDefinition},
		{"another name", strings.Replace(source, "Intermediate G2", "Intermediate G3", 1), a.request, ErrDefinition},
		{"another algorithm", strings.Replace(source, "alg: ecdsa-p256", "alg: ecdsa-p384", 1), a.request, ErrDefinition},
		{"another root", l.signSource(strangers.online.head(t)), strangers.request, ErrPrevious},
		{"a window that is over", l.signSource(windowed.head(t)), late.request, ErrWindow},
		{"its own window is over", strings.Replace(source, "environment: rehearsal", "environment: rehearsal\nwindow: {not-before: 2026-11-22T09:00:00Z, not-after: 2026-11-22T18:00:00Z}", 1), a.request, ErrWindow},
		{"cut short", source, placed(t, content[:len(content)-600]), bundle.ErrTruncated},
		{"something after the end", source, placed(t, append(bytes.Clone(content), 0)), bundle.ErrFormat},
		{"another request in it", source, placed(t, remadeOf(t, csrID, content, a.online.def.requestNames(), func(f *bundle.File) {
			if strings.HasSuffix(f.Name, requestSuffix) {
				f.Content = bytes.Replace(f.Content, []byte("A"), []byte("B"), 1)
			}
		})), bundle.ErrContent},
		{"other evidence in it", source, placed(t, remadeOf(t, csrID, content, a.online.def.requestNames(), func(f *bundle.File) {
			if strings.HasSuffix(f.Name, evidenceSuffix) {
				f.Content = bytes.Replace(f.Content, []byte(`"EXTRACTABLE": "false"`), []byte(`"EXTRACTABLE": "true"`), 1)
			}
		})), bundle.ErrContent},
		{"another definition in it", source, placed(t, remadeOf(t, csrID, content, a.online.def.requestNames(), func(f *bundle.File) {
			if f.Name == definitionName {
				f.Content = bytes.Replace(f.Content, []byte("First Witness"), []byte("Other Witness"), 1)
			}
		})), ErrDefinition},
		{"a definition that is none", source, placed(t, remadeOf(t, csrID, content, a.online.def.requestNames(), func(f *bundle.File) {
			if f.Name == definitionName {
				f.Content = []byte("version: 1\n")
			}
		})), ErrDefinition},
		{"a shorter transcript in it", source, placed(t, remadeOf(t, csrID, content, a.online.def.requestNames(), func(f *bundle.File) {
			if f.Name == TranscriptName {
				lines := bytes.SplitAfter(f.Content, []byte("\n"))
				f.Content = bytes.Join(lines[:len(lines)-2], nil)
			}
		})), ErrNothingToExport},
	} {
		t.Run(tc.name, func(t *testing.T) {
			offline := l.host(tc.source, DemoRootToken)
			if err := offline.run(t, tc.path); !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
			if n, err := readTranscriptFile(filepath.Join(offline.opts.Dir, TranscriptName)); err == nil && len(n) > 0 && n[len(n)-1].Step == string(StepImport) {
				t.Error("it is on record")
			}
		})
	}
	t.Run("the root is another", func(t *testing.T) {
		offline := l.host(source, DemoRootToken)
		offline.opts.Tokens = map[string]hsm.Token{DemoRootToken: stranger.tokens[DemoRootToken]}
		if err := offline.run(t, a.request); !errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("error %v, want ErrNotFound", err)
		}
		if _, err := Export(offline.opts.Dir, filepath.Join(t.TempDir(), "b")); !errors.Is(err, ErrNothingToExport) {
			t.Errorf("export: %v, want ErrNothingToExport", err)
		}
	})
	t.Run("words that are not on the screen", func(t *testing.T) {
		offline := l.host(source, DemoRootToken)
		seen := &onlooker{}
		offline.opts.People = seen
		if err := offline.run(t, a.request); err != nil {
			t.Fatal(err)
		}
		b, err := bundle.ReadFile(a.request, offline.def.expect([sha256.Size]byte{}))
		if err != nil {
			t.Fatal(err)
		}
		q := seen.questions[string(StepImport)]
		screen := fmt.Sprint(q.Title, q.Why, q.Facts, q.Prompt)
		for _, secret := range []string{b.Words(), fmt.Sprintf("%x", b.Hash())} {
			if strings.Contains(screen, secret) {
				t.Errorf("the question tells its answer: %s", secret)
			}
		}
		for _, want := range []string{csrID, hexOf(head), Words(a.online.def.Hash()), fmt.Sprintf("%x", sha256.Sum256(offline.requested(t).RawSubjectPublicKeyInfo)), "evidence software"} {
			if !strings.Contains(screen, want) {
				t.Errorf("the question does not show %s", want)
			}
		}
	})
	t.Run("other words", func(t *testing.T) {
		offline := l.host(source, DemoRootToken)
		offline.opts.People = &Prepared{Answers: map[string]string{"import": "zoo zoo zoo"}, Next: refuses{}}
		if err := offline.run(t, a.request); !errors.Is(err, ErrAnswer) {
			t.Errorf("error %v, want ErrAnswer", err)
		}
	})
}

// onlooker remembers the questions.
type onlooker struct {
	Practice
	questions map[string]Question
}

func (o *onlooker) Ask(ctx context.Context, q Question) (string, error) {
	if o.questions == nil {
		o.questions = map[string]Question{}
	}
	o.questions[q.ID] = q
	return o.Practice.Ask(ctx, q)
}

// requested is the request that the root's host was given.
func (h *host) requested(t *testing.T) *x509.CertificateRequest {
	t.Helper()
	block, _ := pem.Decode(contentOf(t, filepath.Join(h.opts.Dir, requestFolder, "inter-g2.csr")))
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

// The online host takes no certificate but that of its own root for its own
// request.
func TestResponseRefused(t *testing.T) {
	l := begin(t, "")
	a := l.asks(DemoOnlineToken, "")
	l.answers(a)
	response := contentOf(t, a.response)
	twin := l.asks(l.otherToken(t), "")
	stranger := begin(t, "")
	strangers := stranger.asks(DemoOnlineToken, "")
	stranger.answers(strangers)
	for _, tc := range []struct {
		name string
		path string
		want error
	}{
		{"the request", a.request, bundle.ErrOther},
		{"cut short", placed(t, response[:len(response)-600]), bundle.ErrTruncated},
		{"to another request", strangers.response, bundle.ErrOther},
		{"to another request, made to fit", placed(t, inReplyTo(t, a, contentOf(t, strangers.response))), bundle.ErrOther},
		{"another certificate in it", placed(t, remadeOf(t, csrID, response, a.online.def.responseNames(), func(f *bundle.File) {
			if f.Name == "inter-g2"+issuedSuffix {
				f.Content = certificatePEM(l.certificate(chainName))
			}
		})), bundle.ErrContent},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := countRecords(t, a.online.opts.Dir)
			if err := a.online.run(t, tc.path); !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
			if n := countRecords(t, a.online.opts.Dir); n != before {
				t.Errorf("%d records were written", n-before)
			}
		})
	}
	t.Run("by another's request", func(t *testing.T) {
		if err := twin.online.run(t, a.response); !errors.Is(err, bundle.ErrOther) {
			t.Errorf("error %v, want ErrOther", err)
		}
	})
	t.Run("a ceremony that was aborted", func(t *testing.T) {
		offline := l.host(strings.Replace(l.signSource(twin.online.head(t)), signID, "inter-sign-2", 1), DemoRootToken)
		if err := offline.run(t, ""); !errors.Is(err, ErrBundle) {
			t.Fatal(err)
		}
		offline.opts.People = Practice{}
		if err := Abort(t.Context(), offline.def, offline.opts, "a1", "the stick is lost"); err != nil {
			t.Fatal(err)
		}
		if _, err := Export(offline.opts.Dir, filepath.Join(t.TempDir(), "b")); !errors.Is(err, ErrNothingToExport) {
			t.Errorf("export: %v, want ErrNothingToExport", err)
		}
	})
	l.completes(a)
	t.Run("no ceremony continues the root's", func(t *testing.T) {
		next := *l
		next.last, next.id, next.head = a.offline.opts, signID, a.offline.head(t)
		if err := next.run(next.definition("crl-9", CRL, "crl: {valid: 30d}\n"), next.options()); !errors.Is(err, ErrPrevious) {
			t.Errorf("error %v, want ErrPrevious", err)
		}
	})
	t.Run("a ceremony continues the online host's", func(t *testing.T) {
		inter := l.certificate(chainName)
		l.mustRun(l.definition("crl-9", CRL, fmt.Sprintf("crl: {valid: 30d, revoked: [{serial: \"%x\", at: %s, reason: superseded}]}\n",
			inter.SerialNumber, l.now.Format(time.RFC3339))))
	})
}

// remadeOf is a bundle of the exchange that was changed and put together again.
func remadeOf(t *testing.T, id string, content []byte, names []string, change func(*bundle.File)) []byte {
	t.Helper()
	kind := bundle.Request
	b, err := bundle.Read(bytes.NewReader(content), bundle.Expect{Ceremony: id, Kind: kind, Names: names})
	if err != nil {
		kind = bundle.Response
		b, err = bundle.Read(bytes.NewReader(content), bundle.Expect{Ceremony: id, Kind: kind, InReplyTo: replyOf(t, content), Names: names})
	}
	if err != nil {
		t.Fatal(err)
	}
	var files []bundle.File
	for _, f := range b.Files {
		change(&f)
		files = append(files, f)
	}
	return encoded(t, b.Header, files)
}

func encoded(t *testing.T, h bundle.Header, files []bundle.File) []byte {
	t.Helper()
	b, err := bundle.New(h, files)
	if err != nil {
		t.Fatal(err)
	}
	out, err := b.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// replyOf reads from the manifest which request a response answers.
func replyOf(t *testing.T, content []byte) (h [sha256.Size]byte) {
	t.Helper()
	_, rest, ok := bytes.Cut(content, []byte(`"in-reply-to": "`))
	if !ok {
		t.Fatal("not a response")
	}
	h, err := hsm.ParseSPKIHash(string(rest[:64]))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// inReplyTo makes a response say that it answers the request of a.
func inReplyTo(t *testing.T, a *apart, content []byte) []byte {
	t.Helper()
	names := a.online.def.responseNames()
	b, err := bundle.Read(bytes.NewReader(content), bundle.Expect{Ceremony: csrID, Kind: bundle.Response, InReplyTo: replyOf(t, content), Names: names})
	if err != nil {
		t.Fatal(err)
	}
	request, err := bundle.ReadFile(a.request, bundle.Expect{Ceremony: csrID, Kind: bundle.Request, Names: a.online.def.requestNames()})
	if err != nil {
		t.Fatal(err)
	}
	b.InReplyTo = request.Hash()
	return encoded(t, b.Header, b.Files)
}

// The online host's own window is for its import, too.
func TestResponseAfterTheWindow(t *testing.T) {
	l := begin(t, "")
	stick := t.TempDir()
	a := &apart{request: filepath.Join(stick, "request.tar"), response: filepath.Join(stick, "response.tar")}
	a.online = l.host(strings.Replace(l.csrSource(DemoOnlineToken, ""), "environment: rehearsal",
		"environment: rehearsal\nwindow: {not-before: 2026-11-22T09:00:00Z, not-after: 2026-11-24T18:00:00Z}", 1), DemoOnlineToken)
	if err := a.online.run(t, ""); !errors.Is(err, ErrBundle) {
		t.Fatal(err)
	}
	a.online.export(t, a.request)
	l.answers(a)
	now := l.now.AddDate(0, 0, 2)
	a.online.opts.Now = func() (time.Time, error) { return now, nil }
	if err := a.online.run(t, a.response); !errors.Is(err, ErrWindow) {
		t.Errorf("error %v, want ErrWindow", err)
	}
	l.completes(a)
}

// Killed before every record and resumed, both hosts end with one key, one
// certificate and outputs that verify.
func TestIntermediateApartResumed(t *testing.T) {
	l := begin(t, "")
	stick := t.TempDir()
	a := &apart{request: filepath.Join(stick, "request.tar"), response: filepath.Join(stick, "response.tar")}
	killing := func(h *host, bundle string) (kills int, err error) {
		for ; ; kills++ {
			h.opts.Now = killAfter(2 + kills%3)
			err := h.run(t, bundle)
			if !errors.Is(err, errKilled) || kills > 100 {
				return kills, err
			}
			tear(t, h.opts.Dir)
		}
	}
	a.online = l.host(l.csrSource(DemoOnlineToken, ""), DemoOnlineToken)
	first, err := killing(a.online, "")
	if !errors.Is(err, ErrBundle) {
		t.Fatal(err)
	}
	a.online.export(t, a.request)
	a.offline = l.host(l.signSource(a.online.head(t)), DemoRootToken)
	second, err := killing(a.offline, a.request)
	if err != nil {
		t.Fatal(err)
	}
	a.offline.export(t, a.response)
	third, err := killing(a.online, a.response)
	if err != nil {
		t.Fatal(err)
	}
	if first < 5 || second < 5 || third < 3 {
		t.Errorf("%d, %d and %d kills", first, second, third)
	}
	if n, err := l.tokens[DemoOnlineToken].Keys(t.Context()); n != 5 || err != nil {
		t.Errorf("%d keys online (%v), want 5", n, err)
	}
	for _, h := range []*host{a.online, a.offline} {
		if err := Verify(h.opts.Dir).Err(); err != nil {
			t.Errorf("verify %s: %v", h.def.Kind, err)
		}
	}
}

// Every octet of every output of both hosts is compared by verify, and a forger
// who seals the chain again is found.
func TestIntermediateApartTampered(t *testing.T) {
	l := begin(t, "")
	a := l.asks(DemoOnlineToken, "")
	l.answers(a)
	l.completes(a)
	all := map[string][]Record{}
	for name, h := range map[string]*host{"online": a.online, "offline": a.offline} {
		records, err := readTranscriptFile(filepath.Join(h.opts.Dir, TranscriptName))
		if err != nil {
			t.Fatal(err)
		}
		all[name] = records
		f := factsOf(t, h.def)
		if err := f.replay(records); err != nil {
			t.Fatal(err)
		}
		files, err := f.allFiles(records)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			tamperEach(t, h.opts.Dir, filepath.Join(h.opts.Dir, file.Name), file)
		}
		if err := Verify(h.opts.Dir).Err(); err != nil {
			t.Error(err)
		}
	}
	for _, tc := range []struct {
		name    string
		h       *host
		records []Record
		step    string
		typ     RecordType
		old     string
		new     string
	}{
		{"another request", a.online, all["online"], "request/inter-g2", Done, `"request":"M`, `"request":"N`},
		{"another request's hash", a.online, all["online"], "request/inter-g2", Done, `"sha256":"`, `"sha256":"0`},
		{"another response", a.online, all["online"], "import", Intent, `"bundleSHA256":"`, `"bundleSHA256":"0`},
		{"another ceremony's head", a.online, all["online"], "import", Intent, `"head":"`, `"head":"0`},
		{"another definition", a.online, all["online"], "import", Intent, `"definition":"`, `"definition":"AAAA`},
		{"no definition", a.online, all["online"], "import", Intent, `"definition":"`, `"definition":"","x":"`},
		{"another transcript", a.online, all["online"], "import", Intent, `"transcript":"`, `"transcript":"AAAA`},
		{"other words", a.online, all["online"], "import", Statement, `"words":"`, `"words":"zoo `},
		{"a response to another request", a.online, all["online"], "key/inter-g2", Done, `"adopted":false`, `"adopted":true`},
		{"another bundle", a.offline, all["offline"], "import", Intent, `"bundleSHA256":"`, `"bundleSHA256":"0`},
		{"another request's definition", a.offline, all["offline"], "import", Intent, `"definition":"`, `"definition":"AAAA`},
		{"other words of the request", a.offline, all["offline"], "import", Statement, `"words":"`, `"words":"zoo `},
		{"another bundle at the end", a.offline, all["offline"], "import", Done, `"bundleSHA256":"`, `"bundleSHA256":"0`},
		{"a longer life", a.offline, all["offline"], "certificate/inter-g2", Intent, `"notAfter":"2029`, `"notAfter":"2030`},
		{"nobody confirmed", a.offline, all["offline"], "certificate/inter-g2", Statement, `"words":"`, `"words":"zoo `},
		{"another certificate", a.offline, all["offline"], "certificate/inter-g2", Done, `"sha256":"`, `"sha256":"0`},
	} {
		t.Run(tc.name, func(t *testing.T) { resealedIsRefused(t, tc.h.def, tc.records, tc.step, tc.typ, tc.old, tc.new) })
	}
	t.Run("outputs", func(t *testing.T) { apartOutputs(t, l, a) })
}

// apartOutputs: what each host has in the end, and that others read it.
func apartOutputs(t *testing.T, l *life, a *apart) {
	for _, name := range []string{chainName, intermediateName, rootName, requestFolder + "inter-g2.csr", evidenceFolder + "inter-g2.json"} {
		if !bytes.Equal(contentOf(t, filepath.Join(a.online.opts.Dir, name)), contentOf(t, filepath.Join(a.offline.opts.Dir, name))) {
			t.Errorf("%s differs", name)
		}
	}
	for _, tc := range []struct{ of, have string }{
		{filepath.Join(a.offline.opts.Dir, TranscriptName), OtherTranscriptName(Offline)},
		{filepath.Join(a.offline.opts.Dir, definitionName), OtherDefinitionName(Offline)},
	} {
		if !bytes.Equal(contentOf(t, tc.of), contentOf(t, filepath.Join(a.online.opts.Dir, tc.have))) {
			t.Errorf("the online host has another %s", tc.have)
		}
	}
	for _, name := range []string{keysName, trustedRootName} {
		if _, err := os.Stat(filepath.Join(a.offline.opts.Dir, name)); err == nil {
			t.Errorf("the root's host has a %s, which is not the one to serve", name)
		}
	}
	shell(t, a.offline.opts.Dir, "openssl", "verify", "-x509_strict", "-purpose", "any", "-attime", "1795521600", "-CAfile", rootName, intermediateName)
	shell(t, a.offline.opts.Dir, "openssl", "req", "-verify", "-noout", "-in", requestFolder+"inter-g2.csr")
	ring, err := trust.LoadKeyRing(filepath.Join(a.online.opts.Dir, keysName))
	if err != nil {
		t.Fatal(err)
	}
	for role, k := range ring.Keys {
		if _, err := l.tokens[k.Token].Open(t.Context(), k.Ref(), role); err != nil {
			t.Errorf("open the key of %s as keys.yaml names it: %v", role, err)
		}
	}
	if k, old := ring.Keys[hsm.RoleIntermediate], l.certificate(chainName); sha256.Sum256(old.RawSubjectPublicKeyInfo) != k.SPKI {
		t.Error("keys.yaml names another intermediate than the chain")
	}
	text := string(contentOf(t, filepath.Join(a.offline.opts.Dir, MarkdownName)))
	for _, want := range []string{"## Exchange", csrID, "inter-g2", fmt.Sprintf("%x", ring.Keys[hsm.RoleIntermediate].SPKI)} {
		if !strings.Contains(text, want) {
			t.Errorf("the transcript for people does not say %q", want)
		}
	}
}

// Where there is a TUF repository, the custodians sign on the online host when
// the certificate is there.
func TestIntermediateApartTUF(t *testing.T) {
	l := begin(t, custodiansOf("c1", "c2"))
	if err := l.host(l.csrSource(DemoOnlineToken, ""), DemoOnlineToken).run(t, ""); !errors.Is(err, ErrDefinition) {
		t.Errorf("without custodians: %v, want ErrDefinition", err)
	}
	a := l.asks(DemoOnlineToken, custodiansOf("c1", "c2"))
	l.answers(a)
	l.completes(a)
	if err := Verify(l.last.Dir).Err(); err != nil {
		t.Fatal(err)
	}
	repository, err := tuf.Load(filepath.Join(l.last.Dir, "tuf"))
	if err != nil {
		t.Fatal(err)
	}
	if v := repository.Root().Version; v != 2 || !bytes.Equal(repository.Target(tuf.TrustedRootTarget), l.read(trustedRootName)) {
		t.Errorf("root %d, or the repository has another trusted root", v)
	}
	if err := repository.Expired(l.now); err != nil {
		t.Error(err)
	}
}

// The online token is a TPM: the root sees the key attested, with the head of
// the request's transcript as nonce.
func TestIntermediateApartTPM(t *testing.T) {
	l := begin(t, "")
	emulator := hsmtest.SWTPM(t)
	token, err := tpm.Open(t.Context(), tpm.Config{Device: emulator.Socket(), Dir: t.TempDir(), Auth: []byte("an auth value of the test")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := token.Close(); err != nil {
			t.Error(err)
		}
	})
	l.tokens["board"] = token
	source := strings.Replace(l.csrSource("board", ""), "pkcs11:token=board", "tpm2:?device="+emulator.Socket(), 1)
	a := &apart{request: filepath.Join(t.TempDir(), "request.tar"), response: filepath.Join(t.TempDir(), "response.tar")}
	a.online = l.host(source, "board")
	if err := a.online.run(t, ""); !errors.Is(err, ErrBundle) {
		t.Fatal(err)
	}
	a.online.export(t, a.request)
	for _, tc := range []struct {
		name   string
		change func(*testing.T, *Record)
	}{
		{"another statement of the TPM", edited("key/inter-g2", Done, swapped(`"certify":"`, `"certify":"AAAA`))},
		{"no statement of the TPM's key", edited("key/inter-g2", Done, swapped(`"certifySignature":"`, `"certifySignature":"AAAA`))},
		{"a record before the key, which the TPM's nonce covers", edited("open", Done, swapped(`"goVersion":"go`, `"goVersion":"no`))},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path, head := a.forgery(t, tc.change)
			if err := l.host(l.signSource(head), DemoRootToken).run(t, path); !errors.Is(err, tpm.ErrAttestation) {
				t.Errorf("error %v, want ErrAttestation", err)
			}
		})
	}
	l.answers(a)
	l.completes(a)
	if err := Verify(l.last.Dir).Err(); err != nil {
		t.Error(err)
	}
	var e hsm.Evidence
	if err := json.Unmarshal(contentOf(t, filepath.Join(a.offline.opts.Dir, evidenceFolder+"inter-g2.json")), &e); err != nil || e.Attestation == nil {
		t.Errorf("the root's host has no attestation (%v)", err)
	}
	if err := l.verify(l.sign()); err != nil {
		t.Error(err)
	}
}

// A token that is called like one whose keys stay, and is another device, is
// noticed before a key is made in it.
func TestOtherDeviceOfTheName(t *testing.T) {
	l := begin(t, "")
	l.tokens[DemoOnlineToken] = hsmtest.SoftHSM(t)
	h := l.host(l.csrSource(DemoOnlineToken, ""), DemoOnlineToken)
	if err := h.run(t, ""); !errors.Is(err, ErrDefinition) || !strings.Contains(err.Error(), "give this one another") {
		t.Errorf("error %v, want ErrDefinition", err)
	}
	if n, err := h.opts.Tokens[DemoOnlineToken].Keys(t.Context()); n != 0 || err != nil {
		t.Errorf("%d keys (%v), want none", n, err)
	}
}

// A key that anything of before has is not certified again, whether it is in use
// or was followed by another.
func TestUsedKey(t *testing.T) {
	l := begin(t, "")
	first := l.certificate(chainName)
	l.now = l.now.AddDate(0, 1, 0)
	l.mustRun(l.definition("rotate-1", Rotate, newIntermediate))
	var files []carriedFile
	err := filepath.WalkDir(l.last.Dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		if name, err := filepath.Rel(l.last.Dir, path); err == nil && carried(name) {
			files = append(files, carriedFile{name, contentOf(t, path)})
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	before, err := parsePrevious(files)
	if err != nil {
		t.Fatal(err)
	}
	spki := func(c *x509.Certificate) [sha256.Size]byte { return sha256.Sum256(c.RawSubjectPublicKeyInfo) }
	for name, key := range map[string][sha256.Size]byte{
		"the old intermediate's": spki(first), "the intermediate's": spki(l.certificate(chainName)), "the root's": spki(l.certificate2(rootName)),
		"the timestamp authority's": spki(l.certificate(tsaChainName)), "a log's": l.key(hsm.RoleRekor).Ref().SPKI, "the CT log's": l.key(hsm.RoleCT).Ref().SPKI,
	} {
		if err := before.checkNew(key); !errors.Is(err, hsm.ErrExists) {
			t.Errorf("%s key: %v, want ErrExists", name, err)
		}
	}
	if err := before.checkNew(sha256.Sum256(spkiOf(t, generated(t, elliptic.P256()).Public()))); err != nil {
		t.Errorf("a new key: %v", err)
	}
}

// What evidence may claim, and what a root certifies.
func TestCheckOrigin(t *testing.T) {
	for _, tc := range []struct {
		name   string
		env    Environment
		accept bool
		model  string
		level  hsm.Level
		want   error
	}{
		{"software in a rehearsal", Rehearsal, false, "SoftHSM v2", hsm.LevelSoftware, nil},
		{"software in production", Production, false, "SoftHSM v2", hsm.LevelSoftware, ErrEnvironment},
		{"software that is accepted", Production, true, "SoftHSM v2", hsm.LevelSoftware, nil},
		{"software that claims to be a module", Production, true, "SoftHSM v2", hsm.LevelModule, hsm.ErrPolicy},
		{"a module", Production, false, "Luna K7", hsm.LevelModule, nil},
		{"a module that claims to be software", Production, true, "Luna K7", hsm.LevelSoftware, hsm.ErrPolicy},
		{"a module that claims to be attested", Production, false, "Luna K7", hsm.LevelAttested, hsm.ErrPolicy},
		{"a key that was restored", Production, false, "Luna K7", hsm.LevelRestored, hsm.ErrPolicy},
		{"no level", Production, false, "Luna K7", "", hsm.ErrPolicy},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := &Definition{Environment: tc.env, Request: &Request{AcceptSoftware: tc.accept}}
			maker := map[bool]string{true: "SoftHSM project", false: "Thales"}[tc.model == "SoftHSM v2"]
			err := d.checkOrigin(hsm.Evidence{Level: tc.level, Token: hsm.TokenInfo{Manufacturer: maker, Model: tc.model}})
			if !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
		})
	}
}

func TestApartDefinitions(t *testing.T) {
	l := &life{t: t, id: "genesis-1"}
	csr, sign := l.csrSource(DemoOnlineToken, ""), l.signSource(Hash{})
	for _, tc := range []struct{ name, source, old, new, want string }{
		{"no predecessor", csr, "previous: {", "#", "continues a ceremony"},
		{"a signature without a predecessor", sign, "previous: {", "#", "continues a ceremony"},
		{"no request", sign, "request: {", "#", "request: the kind"},
		{"a request of a request", csr, "rotation: {", "request: {ceremony: a-b, head: \"" + strings.Repeat("00", 32) + "\"}\nrotation: {", "request: the kind"},
		{"a request of itself", sign, "request: {ceremony: " + csrID, "request: {ceremony: " + signID, "request: ceremony"},
		{"a head that is short", sign, "head: \"00", "head: \"", "request: head"},
		{"a head in capitals", sign, "head: \"00", "head: \"AA", "request: head"},
		{"a head that is a number", sign, "head: \"" + strings.Repeat("00", 32) + "\"", "head: " + strings.Repeat("00", 32), "write it in quotes"},
		{"no overlap", csr, "rotation: {overlap: 7d}\n", "", "overlap"},
		{"a rotation at the root", sign, "keys: {", "rotation: {overlap: 7d}\nkeys: {", "rotates nothing"},
		{"a key without a token", csr, "token: online, ", "", "unknown token"},
		{"a key in the root's token", sign, "keys: {inter-g2: {", "keys: {inter-g2: {token: root, ", "made elsewhere"},
		{"a key with a protection", sign, "alg: ecdsa-p256", "alg: ecdsa-p256, protection: non-extractable", "made elsewhere"},
		{"no key", sign, "keys: {inter-g2: {alg: ecdsa-p256}}", "", "unknown key"},
		{"two keys", csr, "keys: {", "keys: {tuf-online: {token: online, alg: ecdsa-p256}, ", "one intermediate with one key"},
		{"two certificates", csr, "certificates:\n", "certificates:\n  other: {key: inter-g2, issuer: root, subject: {o: a, cn: b}, years: 3, path-len: 0, eku: [codeSigning]}\n", "one intermediate with one key"},
		{"a timestamp authority", csr, "issuer: root, subject: {o: Chancery Demo, cn: Sigstore Intermediate G2}, years: 3, path-len: 0, eku: [codeSigning]",
			"issuer: tsa-root, subject: {o: a, cn: b}, years: 3, eku: [timeStamping]", "one intermediate with one key"},
		{"the timestamp root as issuer", csr, "issuer: root", "issuer: tsa-root", "issuer: \"tsa-root\", want root"},
		{"a root of its own", csr, "issuer: root, subject", "self-signed: true, subject", "issuer: \"\", want root"},
		{"a list", sign, "keys: {", "crl: {valid: 30d}\nkeys: {", "crl, drills"},
		{"custodians at the root", sign, "keys: {", custodiansOf("c1", "c2") + "keys: {", "custodians sign in the intermediate-csr"},
		{"a shard", csr, "keys: {", "service: {logs: {ct: {shard: ct2}}}\nkeys: {", "makes no shards"},
		{"an address", sign, "keys: {", "service: {url: \"https://a.example\"}\nkeys: {", "url and oidc"},
		{"two machines", sign, `uri: "pkcs11:token=root"`, `uri: "pkcs11:token=root", machine: offline`, "happens on one machine"},
		{"a drill", csr, "keys: {", "drills: [{key: root, token: online}]\nkeys: {", "drills"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := ParseDefinition([]byte(tc.source)); err != nil {
				t.Fatalf("before the change: %v", err)
			}
			changed := strings.Replace(tc.source, tc.old, tc.new, 1)
			if changed == tc.source {
				t.Fatalf("the definition has no %q", tc.old)
			}
			if _, err := ParseDefinition([]byte(changed)); !errors.Is(err, ErrDefinition) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
}
