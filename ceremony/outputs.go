package ceremony

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/chancery-ca/chancery/ca/profile"
	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/hsm"
)

// The names of the outputs. Evidence is in evidence/KEY.json.
const (
	definitionName = "definition.yaml"
	ChecksumsName  = "checksums.txt"
	evidenceFolder = "evidence/"
)

// outputs records what will be written, then writes it.
func (r *run) outputs(_ context.Context, s Step) error {
	files, err := r.facts.outputFiles()
	if err != nil {
		return err
	}
	if !r.facts.announced {
		if err := r.record(s, Intent, outputsData{Files: files}); err != nil {
			return err
		}
	}
	for _, f := range files {
		if err := f.write(r.opts.Dir); err != nil {
			return err
		}
	}
	return r.record(s, Done, outputsData{Files: files})
}

// takeOutputs compares the announced files with those that follow from the
// records before.
func (f *facts) takeOutputs(rec *Record, _ Step) error {
	var d outputsData
	if err := rec.decode(&d); err != nil {
		return err
	}
	if rec.Type != Intent && rec.Type != Done || (rec.Type == Intent) == f.announced {
		return bad(rec, "files were not announced once")
	}
	files, err := f.outputFiles()
	if err != nil {
		return bad(rec, "%w", err)
	}
	same := func(a, b File) bool { return a.Name == b.Name && a.SHA256 == b.SHA256 && a.Size == b.Size }
	if !slices.EqualFunc(files, d.Files, same) {
		return bad(rec, "the files are not those that follow from the records")
	}
	f.announced = true
	return nil
}

// finish writes what covers the whole transcript, after its last record.
func (r *run) finish() error {
	files, err := r.facts.allFiles(r.transcript.Records())
	if err != nil {
		return err
	}
	for _, f := range files {
		if f.Name == TranscriptName {
			continue // it writes itself
		}
		if err := f.write(r.opts.Dir); err != nil {
			return err
		}
	}
	return nil
}

// outputFiles makes the definition's copy and what the kind of ceremony makes.
// It is a pure function of the definition and the records: run twice, or by a
// verifier, it gives the same octets.
func (f *facts) outputFiles() ([]File, error) {
	kind, err := kindOf(f.def.Kind)
	if err != nil {
		return nil, err
	}
	files, err := kind.files(f)
	if err != nil {
		return nil, err
	}
	return slices.Concat([]File{newFile(definitionName, f.def.source)}, files, f.exchangeFiles()), nil
}

// allFiles makes every file of a ceremony that is over. An aborted one has no
// outputs but the record of its end.
func (f *facts) allFiles(records []Record) ([]File, error) {
	files := []File{newFile(definitionName, f.def.source)}
	if f.announced {
		var err error
		if files, err = f.outputFiles(); err != nil {
			return nil, err
		}
	}
	files = append(files, f.checkpointFile())
	for _, p := range f.def.witnesses() {
		if a := f.answers[p.ID]; a.Signature != "" {
			files = append(files, newFile(SignatureName(p.ID), []byte(a.Signature)))
		}
	}
	transcript, err := transcriptFile(records)
	if err != nil {
		return nil, err
	}
	files = append(files, transcript, f.markdown(records))
	return append(files, f.checksumsFile(files)), nil
}

// checksumsFile is read by "sha256sum -c"; its comments have the words that
// are read aloud.
func (f *facts) checksumsFile(files []File) File {
	var b bytes.Buffer
	fmt.Fprintf(&b, "# Ceremony %s: %s. Check with: sha256sum -c %s\n", f.def.ID, f.status, ChecksumsName)
	fmt.Fprintf(&b, "# definition: %s\n", Words(f.def.Hash()))
	if root := f.certs[f.def.certificateOfKind(profile.Root)]; root != nil {
		fmt.Fprintf(&b, "# root certificate: %s\n", Words(sha256.Sum256(root.Raw)))
	}
	fmt.Fprintf(&b, "# checkpoint: %s\n# last record: %s\n", Words(f.root), Words(f.head))
	for _, file := range files {
		fmt.Fprintf(&b, "%s  %s\n", file.SHA256, file.Name)
	}
	return newFile(ChecksumsName, b.Bytes())
}

// transcriptFile returns the octets that the records have on disk.
func transcriptFile(records []Record) (File, error) {
	var b bytes.Buffer
	for i := range records {
		line, err := records[i].line()
		if err != nil {
			return File{}, err
		}
		b.Write(line)
		b.WriteByte('\n')
	}
	return newFile(TranscriptName, b.Bytes()), nil
}

// genesisFiles makes what a new trust root consists of.
func (f *facts) genesisFiles() ([]File, error) {
	d := f.def
	root, inter := f.certs[d.certificateOfKind(profile.Root)], f.certs[d.certificateOfKind(profile.Intermediate)]
	tsaRoot, tsa := f.certs[d.certificateOfKind(profile.TSARoot)], f.certs[d.certificateOfKind(profile.TSA)]
	if root == nil || inter == nil || tsaRoot == nil || tsa == nil {
		return nil, fmt.Errorf("%w: a certificate is missing", ErrTranscript)
	}
	files := []File{
		newFile("root.pem", certificatePEM(root)),
		newFile("intermediate.pem", certificatePEM(inter)),
		newFile("chain.pem", certificatePEM(inter, root)),
		newFile("tsa-chain.pem", certificatePEM(tsa, tsaRoot)),
	}
	for _, l := range d.logs() {
		key := f.keys[d.keyOfRole(l.role)]
		files = append(files, newFile(string(l.role)+".pub",
			pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: key.evidence.PublicKey})))
	}
	trustFiles, err := f.trustFiles()
	if err != nil {
		return nil, err
	}
	repository, err := f.tufFiles()
	if err != nil {
		return nil, err
	}
	backups, err := f.backupFiles()
	if err != nil {
		return nil, err
	}
	evidence, err := f.evidenceFiles()
	return slices.Concat(files, trustFiles, f.crlFiles(), repository, backups, evidence), err
}

// evidenceFiles has one file for each key that was made.
func (f *facts) evidenceFiles() ([]File, error) {
	var files []File
	for _, name := range sorted(f.keys) {
		raw, err := evidenceJSON(f.keys[name].evidence)
		if err != nil {
			return nil, fmt.Errorf("encode evidence of %s: %w", name, err)
		}
		files = append(files, newFile(evidenceFolder+name+".json", raw))
	}
	return files, nil
}

// evidenceJSON is evidence as a file.
func evidenceJSON(e hsm.Evidence) ([]byte, error) {
	raw, err := json.MarshalIndent(e, "", "  ")
	return append(raw, '\n'), err
}

func certificatePEM(certs ...*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range certs {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return b.Bytes()
}

// trustFiles are the four files of ceremony/trust after the ceremony: where the
// keys are, and what clients are told. A later ceremony's begin with what the
// one before says.
func (f *facts) trustFiles() ([]File, error) {
	trustOf := f.firstTrust
	if f.before != nil {
		trustOf = f.nextTrust
	}
	ring, err := f.resultRing()
	if err != nil {
		return nil, err
	}
	ringYAML, err := ring.Marshal()
	if err != nil {
		return nil, err
	}
	trusted, signing, err := trustOf()
	if err != nil {
		return nil, err
	}
	trustedJSON, err := trusted.Marshal()
	if err != nil {
		return nil, err
	}
	signingJSON, err := signing.Marshal()
	if err != nil {
		return nil, err
	}
	clientJSON, err := trust.MarshalClientConfig(trustedJSON, signingJSON)
	if err != nil {
		return nil, err
	}
	return []File{
		newFile(keysName, ringYAML), newFile(trustedRootName, trustedJSON),
		newFile(signingConfigName, signingJSON), newFile(clientConfigName, clientJSON),
	}, nil
}

// keyRing says where the keys are.
func (f *facts) keyRing() (*trust.KeyRing, error) {
	ring := &trust.KeyRing{Tokens: map[string]trust.Token{}, Keys: map[hsm.Role]trust.Key{}}
	for name, inv := range f.inventory {
		ring.Tokens[name] = trust.Token{URI: observedURI(inv.Token, f.def.Tokens[name].URI), Module: inv.Token.Module}
	}
	for name, u := range f.def.uses {
		k, ok := f.keys[name]
		if !ok {
			return nil, fmt.Errorf("%w: key %s was not made", ErrTranscript, name)
		}
		token := f.def.Keys[name].Token
		ring.Keys[u.role] = trust.Key{Token: token, URI: placedURI(k.evidence.URI, f.def.Tokens[token].URI), SPKI: k.spki}
	}
	return ring, nil
}

// observedURI names a token as it presented itself: a rehearsal's is not the
// one of the definition.
func observedURI(info hsm.TokenInfo, defined string) string {
	if info.Module == "" {
		return defined
	}
	uri := "pkcs11:token=" + escape(info.Label)
	if info.Serial != "" {
		uri += ";serial=" + escape(info.Serial)
	}
	return uri
}

// placedURI names a key of a TPM in the folder of the definition, which may be
// relative to the outputs: they can then be moved with the key files in them.
// Another key keeps the name under which it was observed.
func placedURI(observed, defined string) string {
	const scheme = "tpm2:"
	folder, _, _ := strings.Cut(strings.TrimPrefix(defined, scheme), "?")
	path, query, _ := strings.Cut(strings.TrimPrefix(observed, scheme), "?")
	file := strings.LastIndexByte(path, '/')
	if !strings.HasPrefix(defined, scheme) || !strings.HasPrefix(observed, scheme) || folder == "" || file < 0 {
		return observed
	}
	return scheme + folder + path[file:] + "?" + query
}

// escape percent-encodes what is not unreserved (RFC 7512, 2.3).
func escape(s string) string {
	return strings.ReplaceAll(url.QueryEscape(s), "+", "%20")
}

// firstTrust is the trusted root and the signing configuration of a genesis.
func (f *facts) firstTrust() (trust.Root, trust.SigningConfig, error) {
	trusted, err := f.trustedRoot()
	if err != nil {
		return trusted, trust.SigningConfig{}, err
	}
	return trusted, f.signingConfig(f.certs[f.def.certificateOfKind(profile.Intermediate)]), nil
}

// trustedRoot is the content of trusted_root.json (clients want a validity start
// everywhere, the certificate authority's window is the intermediate's).
func (f *facts) trustedRoot() (trust.Root, error) {
	d := f.def
	cert := func(kind profile.Kind) *x509.Certificate { return f.certs[d.certificateOfKind(kind)] }
	tr := trust.Root{
		CertificateAuthorities: []trust.Authority{authority(d.Service.URL, cert(profile.Intermediate), cert(profile.Root))},
		TimestampAuthorities:   []trust.Authority{authority(d.Service.URL+trust.TimestampPath, cert(profile.TSA), cert(profile.TSARoot))},
	}
	for _, l := range d.logs() {
		fact := f.keys[d.keyOfRole(l.role)]
		pub, ok := fact.public.(*ecdsa.PublicKey)
		if !ok {
			return tr, fmt.Errorf("%w: key of %s is not ECDSA", ErrTranscript, l.role)
		}
		log := trust.Log{
			BaseURL: d.LogURL(l.role), PublicKey: pub,
			Validity: trust.Validity{Start: f.since.Truncate(time.Second)},
		}
		if l.role == hsm.RoleCT {
			tr.CTLogs = append(tr.CTLogs, log)
		} else {
			tr.Logs = append(tr.Logs, log)
		}
	}
	return tr, nil
}

func authority(uri string, leaf, root *x509.Certificate) trust.Authority {
	a := trust.Authority{
		CommonName: root.Subject.CommonName, URI: uri, Chain: []*x509.Certificate{leaf, root},
		Validity: trust.Validity{Start: leaf.NotBefore, End: leaf.NotAfter},
	}
	if len(root.Subject.Organization) > 0 {
		a.Organization = root.Subject.Organization[0]
	}
	return a
}

// signingConfig is the content of signing_config.v0.2.json. Clients that take
// the newest start must find v2 before v1.
func (f *facts) signingConfig(inter *x509.Certificate) trust.SigningConfig {
	d := f.def
	operator := d.Certificates[d.certificateOfKind(profile.Root)].Subject.Organization
	start := f.since.Truncate(time.Second)
	at := func(url string, version uint32, start time.Time) trust.Service {
		return trust.Service{URL: url, MajorAPIVersion: version, Operator: operator, Validity: trust.Validity{Start: start}}
	}
	ca := at(d.Service.URL, 1, inter.NotBefore)
	ca.Validity.End = inter.NotAfter
	c := trust.SigningConfig{
		CAs:   []trust.Service{ca},
		Rekor: []trust.Service{at(d.Service.URL, 2, start)},
		TSAs:  []trust.Service{at(d.Service.URL+trust.TimestampPath, 1, start)},
	}
	for _, issuer := range d.Service.OIDC {
		c.OIDC = append(c.OIDC, at(issuer, 1, start))
	}
	if d.Service.Logs.RekorV1 != nil {
		c.Rekor = append(c.Rekor, at(d.Service.URL, 1, start.Add(-time.Second)))
	}
	return c
}

// LogURL returns the base URL by which the trusted root names the first shard
// of a log: URL/ct/SHARD or URL/log/SHARD. It is "" for other roles.
func (d *Definition) LogURL(role hsm.Role) string {
	for _, l := range d.logs() {
		switch {
		case l.role != role:
		case role == hsm.RoleCT:
			return d.Service.URL + "/ct/" + l.Shard.Shard
		default:
			return d.Service.URL + "/log/" + l.Shard.Shard
		}
	}
	return ""
}

// LogOrigin returns the first line of the checkpoints of a log's first shard:
// the bare host for Rekor v2, HOST[:port]/ct/SHARD for CT unless the
// definition says otherwise. A Rekor v1 log's ends with its tree id, which
// only the service knows: it is "" here.
func (d *Definition) LogOrigin(role hsm.Role) string {
	u, err := url.Parse(d.Service.URL)
	if err != nil { // validated
		return ""
	}
	switch {
	case role == hsm.RoleRekor:
		return u.Hostname()
	case role == hsm.RoleCT && d.Service.Logs.CT.Origin != "":
		return d.Service.Logs.CT.Origin
	case role == hsm.RoleCT:
		return u.Host + "/ct/" + d.Service.Logs.CT.Shard
	}
	return ""
}
