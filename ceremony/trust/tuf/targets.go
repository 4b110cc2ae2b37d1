package tuf

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"time"

	"github.com/chancery-ca/chancery/ceremony/trust"
)

// The targets that current clients ask for by name.
const (
	TrustedRootTarget   = "trusted_root.json"
	SigningConfigTarget = "signing_config.v0.2.json"
)

// Targets returns the target files that follow from the two trust files: those
// themselves, and for clients that know no trusted_root.json each certificate
// and key as a PEM file with its usage, "Active" or, if its validity has ended
// at now, "Expired". Equal input gives equal targets.
func Targets(trustedRoot, signingConfig []byte, now time.Time) ([]Target, error) {
	root, err := trust.ParseRoot(trustedRoot)
	if err != nil {
		return nil, err
	}
	if _, err := trust.ParseSigningConfig(signingConfig); err != nil {
		return nil, err
	}
	f := flat{now: now, at: map[entry]int{}, count: map[series]int{}}
	for _, a := range root.CertificateAuthorities {
		f.chain(a, "Fulcio", fulcioIntermediate, fulcioIntermediate, fulcioRoot)
	}
	for _, a := range root.TimestampAuthorities {
		f.chain(a, "TSA", tsaLeaf, tsaIntermediate, tsaRoot)
	}
	for _, l := range root.CTLogs {
		if err := f.key(l, "CTFE", ctfe); err != nil {
			return nil, err
		}
	}
	for _, l := range root.Logs {
		if err := f.key(l, "Rekor", rekor); err != nil {
			return nil, err
		}
	}
	return append(f.targets,
		Target{Name: TrustedRootTarget, Content: trustedRoot}, Target{Name: SigningConfigTarget, Content: signingConfig}), nil
}

// series are the names of targets of one kind: of the first, and of the others
// by their number from 2.
type series struct{ first, others string }

// The names of the public service, as old clients ask for them.
var (
	fulcioRoot         = series{"fulcio_v1.crt.pem", "fulcio_v%d.crt.pem"}
	fulcioIntermediate = series{"fulcio_intermediate_v1.crt.pem", "fulcio_intermediate_v%d.crt.pem"}
	tsaLeaf            = series{"tsa_leaf.crt.pem", "tsa_leaf_%d.crt.pem"}
	tsaIntermediate    = series{"tsa_intermediate_0.crt.pem", "tsa_intermediate_%d.crt.pem"}
	tsaRoot            = series{"tsa_root.crt.pem", "tsa_root_%d.crt.pem"}
	ctfe               = series{"ctfe.pub", "ctfe_%d.pub"}
	rekor              = series{"rekor.pub", "rekor_%d.pub"}
)

// flat collects the targets of one PEM block each.
type flat struct {
	now     time.Time
	targets []Target
	at      map[entry]int // index in targets
	count   map[series]int
}

// entry is a certificate or key in one use.
type entry struct {
	usage string
	hash  [sha256.Size]byte
}

// chain adds the certificates of an authority: the first, those between, the
// last.
func (f *flat) chain(a trust.Authority, usage string, first, between, last series) {
	for i, c := range a.Chain {
		names := between
		switch i {
		case len(a.Chain) - 1:
			names = last
		case 0:
			names = first
		}
		f.add(names, "CERTIFICATE", c.Raw, usage, a.URI, a.Validity)
	}
}

func (f *flat) key(l trust.Log, usage string, names series) error {
	der, err := x509.MarshalPKIXPublicKey(l.PublicKey)
	if err != nil {
		return fmt.Errorf("encode key of %s: %w", l.BaseURL, err)
	}
	f.add(names, "PUBLIC KEY", der, usage, l.BaseURL, l.Validity)
	return nil
}

// add adds a target, or says of one that stands in the list already (a root has
// several intermediates) that it is active too.
func (f *flat) add(names series, block string, der []byte, usage, uri string, valid trust.Validity) {
	status := "Active"
	if !valid.End.IsZero() && valid.End.Before(f.now) {
		status = "Expired"
	}
	content := pem.EncodeToMemory(&pem.Block{Type: block, Bytes: der})
	what := entry{usage, sha256.Sum256(content)}
	if i, ok := f.at[what]; ok {
		if status == "Active" {
			f.targets[i].Status = status
		}
		return
	}
	f.at[what] = len(f.targets)
	t := Target{Name: names.first, Content: content, Usage: usage, Status: status, URI: uri}
	if f.count[names]++; f.count[names] > 1 {
		t.Name = fmt.Sprintf(names.others, f.count[names])
	}
	f.targets = append(f.targets, t)
}
