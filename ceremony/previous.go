package ceremony

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/chancery-ca/chancery/ceremony/trust"
	"github.com/chancery-ca/chancery/ceremony/trust/tuf"
	"github.com/chancery-ca/chancery/hsm"
)

// ErrPrevious: the outputs that the ceremony continues are not there, do not
// verify, or are not those that the definition names.
var ErrPrevious = errors.New("not the ceremony to continue")

// StepPrevious verifies the outputs that the ceremony continues.
const StepPrevious StepKind = "previous"

// Previous names the ceremony that this one continues.
type Previous struct {
	Ceremony string `yaml:"ceremony"` // its id
	// Heads are the hashes of its last record, hexadecimal: one, or those of
	// both machines.
	Heads []string `yaml:"heads"`
}

// The names in a definition of the certificates that the ceremony before has
// issued with.
const (
	previousRoot    = "root"
	previousTSARoot = "tsa-root"
)

// The outputs that go from ceremony to ceremony.
const (
	rootName          = "root.pem"
	intermediateName  = "intermediate.pem"
	chainName         = "chain.pem"
	tsaChainName      = "tsa-chain.pem"
	crlName           = "root.crl"
	keysName          = "keys.yaml"
	trustedRootName   = tuf.TrustedRootTarget
	signingConfigName = tuf.SigningConfigTarget
	clientConfigName  = "client_trust_config.json"
	backupFolder      = "backup/"
)

// maxCarried bounds the files that are carried over, in octets in all: they are
// in one record.
const maxCarried = 640 << 10

// carriedFile is an output of the ceremony before.
type carriedFile struct {
	Name    string `json:"name"`
	Content []byte `json:"content"`
}

// previousData is the result of StepPrevious.
type previousData struct {
	Ceremony string        `json:"ceremony"`
	Head     string        `json:"head"`
	Files    []carriedFile `json:"files"` // by name
}

// previousFacts is what the outputs of the ceremony before say.
type previousFacts struct {
	root, inter, tsaRoot, tsa *x509.Certificate
	trusted                   trust.Root
	signing                   trust.SigningConfig
	ring                      *trust.KeyRing
	crl                       *x509.RevocationList
	repository                *tuf.Repository // nil if there is none
	files                     map[string][]byte
}

func previousStep(p *Previous) Step {
	return Step{
		ID: string(StepPrevious), Kind: StepPrevious,
		Title:   fmt.Sprintf("Verify the outputs of ceremony %s, which this one continues.", p.Ceremony),
		Why:     "What was is kept, so that old signatures stay good; it must be exactly what the witnesses signed.",
		Details: []string{"last record: " + strings.Join(p.Heads, " or ")},
	}
}

// checkPrevious wants a predecessor for every kind but genesis.
func (d *Definition) checkPrevious(f *faults) {
	switch p := d.Previous; {
	case p == nil && d.Kind != Genesis:
		f.add("previous: the kind %s continues a ceremony", d.Kind)
	case p != nil && d.Kind == Genesis:
		f.add("previous: a genesis has none")
	case p != nil:
		if !idPattern.MatchString(p.Ceremony) || p.Ceremony == d.ID {
			f.add("previous: ceremony %.80q", p.Ceremony)
		}
		if len(p.Heads) < 1 || len(p.Heads) > 2 {
			f.add("previous: heads: %d, want 1 or 2", len(p.Heads))
		}
		for _, h := range p.Heads {
			if _, err := hsm.ParseSPKIHash(h); err != nil || h != strings.ToLower(h) {
				f.add("previous: head %.80q: want 64 hexadecimal digits in lower case", h)
			}
		}
	}
}

// previous verifies the folder of the ceremony before and takes its files into
// the transcript.
func (r *run) previous(_ context.Context, s Step) error {
	dir := r.opts.Previous
	if dir == "" {
		return fmt.Errorf("its output folder is needed: %w", ErrPrevious)
	}
	report := Verify(dir)
	if err := report.Err(); err != nil {
		return fmt.Errorf("%w: %w", ErrPrevious, err)
	}
	data := previousData{Ceremony: report.Definition.ID, Head: hex.EncodeToString(report.Head[:])}
	if report.Definition.Environment != r.def.Environment {
		return fmt.Errorf("%w: it was a %s", ErrPrevious, report.Definition.Environment)
	}
	total := 0
	for _, name := range report.outputs {
		if !carried(name) {
			continue
		}
		content, err := readBounded(filepath.Join(dir, filepath.FromSlash(name)), maxCarried)
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		if total += len(content); total > maxCarried {
			return fmt.Errorf("%w: its files have more than %d octets", ErrPrevious, maxCarried)
		}
		data.Files = append(data.Files, carriedFile{name, content})
	}
	slices.SortFunc(data.Files, func(a, b carriedFile) int { return strings.Compare(a.Name, b.Name) })
	return r.record(s, Done, data)
}

// carried says whether a ceremony takes the file over from the one before: all
// but what tells of that ceremony itself.
func carried(name string) bool {
	return !strings.HasPrefix(name, "transcript.") && !strings.HasPrefix(name, evidenceFolder) &&
		!strings.HasPrefix(name, draftsFolder) && !strings.HasPrefix(name, requestFolder) &&
		!strings.HasPrefix(name, "definition.") && name != ChecksumsName
}

func (f *facts) takePrevious(rec *Record, _ Step) error {
	var d previousData
	if err := rec.result(&d); err != nil {
		return err
	}
	p := f.def.Previous
	if d.Ceremony != p.Ceremony || !slices.Contains(p.Heads, d.Head) {
		return bad(rec, "%w: ceremony %.80q with last record %.64q", ErrPrevious, d.Ceremony, d.Head)
	}
	before, err := parsePrevious(d.Files)
	if err != nil {
		return bad(rec, "%w: %w", ErrPrevious, err)
	}
	if before.repository != nil && f.def.Rotation != nil && f.def.TUF == nil {
		return bad(rec, "%w: the TUF repository needs its custodians: tuf is missing", ErrDefinition)
	}
	f.before = before
	for name, cert := range map[string]*x509.Certificate{previousRoot: before.root, previousTSARoot: before.tsaRoot} {
		if _, ok := f.def.Certificates[name]; !ok {
			f.certs[name] = cert
		}
	}
	return nil
}

// parsePrevious reads the files that were carried over, and wants them to fit
// together.
func parsePrevious(files []carriedFile) (*previousFacts, error) {
	p := &previousFacts{files: map[string][]byte{}}
	var repository []tuf.File
	last := ""
	for _, file := range files {
		if file.Name <= last || !carried(file.Name) || !filepath.IsLocal(file.Name) {
			return nil, fmt.Errorf("file %.80q does not belong, or is out of order", file.Name)
		}
		last = file.Name
		p.files[file.Name] = file.Content
		if name, ok := strings.CutPrefix(file.Name, tufFolder); ok {
			repository = append(repository, tuf.File{Name: name, Content: file.Content})
		}
	}
	chain, err := certificatesIn(p.files[chainName], 2)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", chainName, err)
	}
	stamps, err := certificatesIn(p.files[tsaChainName], 2)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", tsaChainName, err)
	}
	p.inter, p.root, p.tsa, p.tsaRoot = chain[0], chain[1], stamps[0], stamps[1]
	if p.trusted, err = trust.ParseRoot(p.files[trustedRootName]); err != nil {
		return nil, err
	}
	if p.signing, err = trust.ParseSigningConfig(p.files[signingConfigName]); err != nil {
		return nil, err
	}
	if p.ring, err = trust.ParseKeyRing(p.files[keysName]); err != nil {
		return nil, err
	}
	if raw := p.files[crlName]; raw != nil {
		if p.crl, err = parseCRL(raw, p.root); err != nil {
			return nil, err
		}
		if err := notRevoked(p.root, p.crl); err != nil {
			return nil, err
		}
	}
	if len(repository) > 0 {
		if p.repository, err = tuf.New(repository); err != nil {
			return nil, err
		}
	}
	return p, p.check()
}

// check wants the key of each certificate to be the one of keys.yaml.
func (p *previousFacts) check() error {
	for role, cert := range map[hsm.Role]*x509.Certificate{
		hsm.RoleRoot: p.root, hsm.RoleIntermediate: p.inter, hsm.RoleTSARoot: p.tsaRoot, hsm.RoleTSA: p.tsa,
	} {
		if sha256.Sum256(cert.RawSubjectPublicKeyInfo) != p.ring.Keys[role].SPKI {
			return fmt.Errorf("the certificate of the role %s has another key than %s says", role, keysName)
		}
	}
	if p.repository != nil && !bytes.Equal(p.repository.Target(tuf.TrustedRootTarget), p.files[trustedRootName]) {
		return errors.New("the TUF repository has another trusted root")
	}
	return errors.Join(p.inter.CheckSignatureFrom(p.root), p.tsa.CheckSignatureFrom(p.tsaRoot))
}

// certificatesIn reads exactly n certificates in PEM.
func certificatesIn(content []byte, n int) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for range n {
		block, rest := pem.Decode(content)
		if block == nil || block.Type != "CERTIFICATE" || len(block.Headers) > 0 {
			return nil, errors.New("a certificate is missing")
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs, content = append(certs, cert), rest
	}
	if len(content) > 0 {
		return nil, errors.New("something follows the last certificate")
	}
	return certs, nil
}

// previousKey opens a key that an earlier ceremony made, by its public key.
func (r *run) previousKey(ctx context.Context, role hsm.Role) (hsm.Key, hsm.Token, error) {
	k, ok := r.facts.before.ring.Keys[role]
	if !ok {
		return nil, nil, fmt.Errorf("role %s has no key: %w", role, hsm.ErrNotFound)
	}
	if _, ok := r.def.Tokens[k.Token]; !ok {
		return nil, nil, fmt.Errorf("the key of the role %s is in token %s, which the definition does not name: %w", role, k.Token, ErrDefinition)
	}
	tok, err := r.token(ctx, k.Token)
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := device(ctx)
	defer cancel()
	ref := k.Ref()
	if t := tok.Info(); t.Module == "" { // keys.yaml may name a folder of its outputs: see placedURI
		ref.URI = placedURI(ref.URI, "tpm2:"+t.Label+"?")
	}
	key, err := tok.Open(ctx, ref, role)
	if err != nil {
		return nil, nil, fmt.Errorf("open key of the role %s: %w", role, err)
	}
	return key, tok, nil
}
