package tpm

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/google/go-tpm/tpm2"
)

var _ hsm.Lister = (*Token)(nil)

// CheckTokenURI says, without touching a device, whether uri names a token: a
// folder and a device, and no key. The error wraps ErrURI.
func CheckTokenURI(uri string) error {
	u, err := parseURI(uri)
	if err == nil && u.isKey() {
		err = fmt.Errorf("names a key: %w", ErrURI)
	}
	return err
}

// CheckKeyURI says whether uri names a key, as hsm.Ref has it.
func CheckKeyURI(uri string) error {
	u, err := parseURI(uri)
	if err == nil && !u.isKey() {
		err = fmt.Errorf("names no key: %w", ErrURI)
	}
	return err
}

// inspectTime bounds a visit to a TPM. An emulator that serves another program
// does not answer.
const inspectTime = 5 * time.Second

// Inspect describes the TPM at device, an absolute path, without authorisation
// and without key files: the folder of Token is not known, so its Label is "".
// Mechanisms are the elliptic curves (Part 2, Section 6.4) and the signature
// schemes and hashes that matter to us. Errors: ErrURI (the path is not absolute
// and clean), ErrLost, also when the TPM is an emulator that another program uses.
func Inspect(ctx context.Context, device string) (hsm.Inspection, error) {
	var seen hsm.Inspection
	err := visit(ctx, device, func(c *connection) error {
		mechanisms, err := c.mechanisms()
		seen = hsm.Inspection{Token: c.info, Library: hsm.LibraryInfo{Interface: c.info.Hardware}, Mechanisms: mechanisms}
		return err
	})
	if err != nil {
		return hsm.Inspection{}, fmt.Errorf("inspect TPM at %.80q: %w", device, err)
	}
	return seen, nil
}

// visit connects to the TPM at device for one operation that uses no key.
func visit(ctx context.Context, device string, f func(c *connection) error) error {
	if err := clean(device); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, inspectTime)
	defer cancel()
	c, err := connect(ctx, Config{Device: device, Deadline: inspectTime, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return classify(err)
	}
	defer c.close()
	return f(c)
}

// curveNames are the curves that have a name (Part 2, Section 6.4), with their
// size in bits.
var curveNames = []struct {
	curve tpm2.TPMECCCurve
	name  string
	bits  uint
}{
	{tpm2.TPMECCNistP256, "TPM_ECC_NIST_P256", 256},
	{tpm2.TPMECCNistP384, "TPM_ECC_NIST_P384", 384},
	{tpm2.TPMECCNistP521, "TPM_ECC_NIST_P521", 521},
	{tpm2.TPMECCBNP256, "TPM_ECC_BN_P256", 256},
	{tpm2.TPMECCSM2P256, "TPM_ECC_SM2_P256", 256},
	{tpm2.TPMECCCurve25519, "TPM_ECC_CURVE_25519", 255},
}

// algorithmNames are the algorithms that matter to us (Part 2, Section 6.3).
var algorithmNames = []struct {
	algorithm tpm2.TPMAlgID
	name      string
}{
	{tpm2.TPMAlgECDSA, "TPM_ALG_ECDSA"},
	{tpm2.TPMAlgRSASSA, "TPM_ALG_RSASSA"},
	{tpm2.TPMAlgRSAPSS, "TPM_ALG_RSAPSS"},
	{tpm2.TPMAlgSHA256, "TPM_ALG_SHA256"},
	{tpm2.TPMAlgSHA384, "TPM_ALG_SHA384"},
	{tpm2.TPMAlgSHA512, "TPM_ALG_SHA512"},
}

// mechanisms lists the curves and algorithms of the TPM that have a name here,
// by name.
func (c *connection) mechanisms() ([]hsm.Mechanism, error) {
	rsp, err := run(c, tpm2.GetCapability{Capability: tpm2.TPMCapECCCurves, PropertyCount: 64})
	if err != nil {
		return nil, fmt.Errorf("list curves: %w", err)
	}
	curves, err := rsp.CapabilityData.Data.ECCCurves()
	if err != nil {
		return nil, &lostError{err}
	}
	rsp, err = run(c, tpm2.GetCapability{Capability: tpm2.TPMCapAlgs, PropertyCount: 256})
	if err != nil {
		return nil, fmt.Errorf("list algorithms: %w", err)
	}
	algorithms, err := rsp.CapabilityData.Data.Algorithms()
	if err != nil {
		return nil, &lostError{err}
	}
	hasCurve, hasAlgorithm := map[tpm2.TPMECCCurve]bool{}, map[tpm2.TPMAlgID]bool{}
	for _, curve := range curves.ECCCurves {
		hasCurve[curve] = true
	}
	for _, algorithm := range algorithms.AlgProperties {
		hasAlgorithm[algorithm.Alg] = true
	}
	var all []hsm.Mechanism
	for _, curve := range curveNames {
		if hasCurve[curve.curve] {
			all = append(all, hsm.Mechanism{Name: curve.name, MinKeySize: curve.bits, MaxKeySize: curve.bits})
		}
	}
	for _, algorithm := range algorithmNames {
		if hasAlgorithm[algorithm.algorithm] {
			all = append(all, hsm.Mechanism{Name: algorithm.name})
		}
	}
	slices.SortFunc(all, func(a, b hsm.Mechanism) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

// Look finds the one key that uri names. See hsm.Lister.
func (t *Token) Look(ctx context.Context, uri string) (hsm.Ref, error) {
	u, err := parseURI(uri)
	if err != nil {
		return hsm.Ref{}, fmt.Errorf("look for key: %w", err)
	}
	if !u.isKey() {
		return hsm.Ref{}, fmt.Errorf("look for key: names no key: %w", ErrURI)
	}
	if u.device != t.uri.device || u.handle == 0 && u.dir != t.uri.dir {
		return hsm.Ref{}, fmt.Errorf("look for key %s: names another token than %s: %w", u, t.uri, hsm.ErrNotFound)
	}
	k, err := t.resolve(ctx, u, nil, hsm.RoleNone)
	if err != nil {
		return hsm.Ref{}, fmt.Errorf("look for key %s: %w", u, err)
	}
	return hsm.Ref{URI: uri, SPKI: k.ref.SPKI}, nil
}

// List describes every key file of the folder, and has the TPM load each key that
// is not loaded. Keys at persistent handles are not listed: which of them are ours
// only a Ref says. See hsm.Lister.
func (t *Token) List(ctx context.Context) ([]hsm.Listing, error) {
	labels, err := t.files.labels()
	if err != nil {
		return nil, fmt.Errorf("list keys of %s: %w", t.uri, err)
	}
	var all []hsm.Listing
	for _, label := range labels {
		var l hsm.Listing
		err := t.do(ctx, hsm.ShareRest, true, func(c *connection) (err error) {
			l, err = t.describe(c, label)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("list keys of %s: %w", t.uri, err)
		}
		all = append(all, l)
	}
	return all, nil
}

// describe reads one key file and loads the key. What is wrong with the file
// becomes the Problem; what is wrong with the TPM is an error.
func (t *Token) describe(c *connection, label string) (hsm.Listing, error) {
	named := t.uri
	named.label = label
	l := hsm.Listing{Label: label, URI: named.String(), Attributes: map[string]string{}}
	k, err := t.inFile(named)
	if err != nil {
		l.Problem, l.Level = err.Error(), hsm.LevelOf(c.info, nil)
		return l, nil
	}
	l.ID, l.SPKI, l.Algorithm = hex.EncodeToString(k.file.id), hex.EncodeToString(k.ref.SPKI[:]), k.public.algorithm
	l.Attributes = k.attributes()
	l.Level = hsm.LevelOf(c.info, l.Attributes)
	_, err = c.load(k)
	if err == nil {
		err = k.public.usable()
	}
	if isLost(err) || errors.Is(err, hsm.ErrPIN) {
		return l, err
	}
	if err != nil {
		l.Problem = err.Error()
	}
	return l, nil
}
