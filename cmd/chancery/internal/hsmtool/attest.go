package hsmtool

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/tpm"
)

// Attested is what could be observed of a key, and what its device signed about
// it.
type Attested struct {
	Evidence hsm.Evidence `json:"evidence"`
	// Attestation is nil for a device that signs no statements.
	Attestation *hsm.Attestation `json:"attestation,omitempty"`
}

// The bounds of a nonce, in octets.
const (
	MinNonce = 16
	MaxNonce = 64
)

// ParseNonce reads MinNonce to MaxNonce octets in hexadecimal.
func ParseNonce(text string) ([]byte, error) {
	nonce, err := hex.DecodeString(text)
	if err != nil || len(nonce) < MinNonce || len(nonce) > MaxNonce {
		return nil, fmt.Errorf("nonce: want %d to %d octets in hexadecimal", MinNonce, MaxNonce)
	}
	return nonce, nil
}

// Attest reads the evidence of the key and, where the device can, has it sign a
// statement with the nonce. Without a nonce the statement is bound to the
// self-test (hsm.Evidence.AttestationNonce); with one, a device that signs no
// statements is hsm.ErrUnsupported.
func Attest(ctx context.Context, token hsm.Token, key hsm.Key, nonce []byte) (Attested, error) {
	evidence, err := token.Evidence(ctx, key)
	if err != nil {
		return Attested{}, err
	}
	a := Attested{Evidence: evidence}
	attester, ok := token.(hsm.Attester)
	switch {
	case !ok && nonce != nil:
		return a, fmt.Errorf("a statement about %s: the token signs none: %w", key.Ref(), hsm.ErrUnsupported)
	case !ok:
		return a, nil
	case nonce == nil:
		nonce = evidence.AttestationNonce()
	}
	statement, err := attester.Attest(ctx, key, nonce)
	if err != nil {
		return a, err
	}
	a.Attestation = &statement
	return a, nil
}

// The files of a folder of evidence.
const (
	evidenceName    = "evidence.json"
	attestationName = "attestation.json"
	// maxEvidence bounds either, in octets.
	maxEvidence = 256 << 10
)

// Write makes the folder dir, which must not exist, with evidence.json and, if
// there is one, attestation.json in it.
func (a Attested) Write(dir string) (err error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("write evidence: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("write evidence: %w", err), os.RemoveAll(dir))
		}
	}()
	if err := writeJSON(filepath.Join(dir, evidenceName), a.Evidence); err != nil {
		return err
	}
	if a.Attestation == nil {
		return nil
	}
	return writeJSON(filepath.Join(dir, attestationName), a.Attestation)
}

func writeJSON(path string, value any) error {
	raw, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Clean(path), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(append(raw, '\n'))
	return errors.Join(err, f.Sync(), f.Close())
}

// Read reads what Write wrote, strictly.
func Read(dir string) (Attested, error) {
	var a Attested
	if err := readJSON(filepath.Join(dir, evidenceName), &a.Evidence); err != nil {
		return a, err
	}
	var statement hsm.Attestation
	err := readJSON(filepath.Join(dir, attestationName), &statement)
	if errors.Is(err, os.ErrNotExist) {
		return a, nil
	}
	a.Attestation = &statement
	return a, err
}

func readJSON(path string, value any) error {
	f, err := os.Open(filepath.Clean(path))
	if err != nil {
		return fmt.Errorf("read evidence: %w", err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxEvidence+1))
	if err != nil {
		return fmt.Errorf("read evidence: %w", err)
	}
	if len(raw) > maxEvidence {
		return fmt.Errorf("read evidence: %s has more than %d octets", filepath.Base(path), maxEvidence)
	}
	if err := parse(raw, value); err != nil {
		return fmt.Errorf("read evidence: %s: %w", filepath.Base(path), err)
	}
	return nil
}

// parse reads one JSON value whose fields are all known.
func parse(raw []byte, value any) error {
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(value); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something after the value")
	}
	return nil
}

// ErrEvidence: the evidence contradicts itself or what it was held against.
var ErrEvidence = errors.New("evidence does not verify")

// Expect is what evidence is held against; zero fields are not.
type Expect struct {
	// SPKI is the hash of the key that is meant.
	SPKI *[sha256.Size]byte
	// Role is whose policy the attributes must keep; RoleNone: PolicyFloor.
	Role hsm.Role
	// Nonce is that of the statement; nil: that of the self-test.
	Nonce []byte
	// Roots are the manufacturers' certificates to which the device's must
	// lead; nil: the certificate is not looked at.
	Roots *x509.CertPool
}

// Finding is one thing that a verification looked at.
type Finding struct {
	What string `json:"what"`
	Text string `json:"text"`
	Err  error  `json:"-"`
	// Error is the text of Err, for JSON.
	Error string `json:"error,omitempty"`
}

// Verify holds the evidence, and the device's statement if there is one, against
// what is expected, with the files alone. The error wraps ErrEvidence.
func (a Attested) Verify(want Expect) ([]Finding, error) {
	var all []Finding
	add := func(what, text string, err error) {
		f := Finding{What: what, Text: text, Err: err}
		if err != nil {
			f.Error = err.Error()
		}
		all = append(all, f)
	}
	pub, spki, err := a.publicKey(want.SPKI)
	add("key", fmt.Sprintf("%s, spki %x", a.Evidence.Algorithm, spki), err)
	if pub != nil {
		add("self-test", a.Evidence.SelfTestText, a.selfTest(pub))
	}
	add("policy", policyName(want.Role), want.Role.Policy().Check(a.Evidence.Attributes))
	add("level", string(a.Evidence.Level), a.level())
	if a.Attestation != nil {
		nonce := want.Nonce
		if nonce == nil {
			nonce = a.Evidence.AttestationNonce()
		}
		text := "no nonce was named, so it was held against that of the evidence itself"
		verdict, err := tpm.VerifyAttestation(*a.Attestation, spki, nonce, want.Roots)
		switch {
		case err == nil:
			text = verdictText(verdict)
		case want.Nonce != nil:
			text = ""
		}
		add("statement", text, err)
	} else if want.Nonce != nil || want.Roots != nil {
		add("statement", "", errors.New("none was made"))
	}
	var errs []error
	for _, f := range all {
		if f.Err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", f.What, f.Err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return all, fmt.Errorf("%w: %w", ErrEvidence, err)
	}
	return all, nil
}

func policyName(role hsm.Role) string {
	if role == hsm.RoleNone {
		return "what every key must keep"
	}
	return "that of role " + string(role)
}

// verdictText says what a statement that holds is worth.
func verdictText(v tpm.Verdict) string {
	text := fmt.Sprintf("signed by one TPM, evidence level %s, certificate %s", v.Level, v.Chain)
	if v.Creation {
		text += ", made in it"
	}
	if v.Activation {
		text += ", identity challenged by whoever wrote this"
	}
	return text
}

// publicKey reads the public key and holds it against its own hash and want.
func (a Attested) publicKey(want *[sha256.Size]byte) (pub *ecdsa.PublicKey, spki [sha256.Size]byte, err error) {
	parsed, err := x509.ParsePKIXPublicKey(a.Evidence.PublicKey)
	if err != nil {
		return nil, spki, fmt.Errorf("parse public key: %w", err)
	}
	algorithm, err := hsm.AlgorithmOf(parsed)
	if err != nil {
		return nil, spki, err
	}
	pub = parsed.(*ecdsa.PublicKey)
	if spki, err = hsm.SPKIHash(pub); err != nil {
		return pub, spki, err
	}
	switch {
	case algorithm != a.Evidence.Algorithm:
		return pub, spki, fmt.Errorf("the public key is %s, the evidence says %.40q", algorithm, a.Evidence.Algorithm)
	case hex.EncodeToString(spki[:]) != a.Evidence.SPKI:
		return pub, spki, fmt.Errorf("the evidence says spki %.64q: %w", a.Evidence.SPKI, hsm.ErrMismatch)
	case want != nil && *want != spki:
		return pub, spki, fmt.Errorf("expected was spki %x: %w", *want, hsm.ErrMismatch)
	}
	return pub, spki, nil
}

// selfTest checks the signature of the text, which must name the key.
func (a Attested) selfTest(pub *ecdsa.PublicKey) error {
	if a.Evidence.SelfTestText == "" || !bytes.Contains([]byte(a.Evidence.SelfTestText), []byte(a.Evidence.SPKI)) {
		return errors.New("the text does not name the key")
	}
	h := a.Evidence.Algorithm.Hash()
	if h == 0 {
		return hsm.ErrUnsupported
	}
	w := h.New()
	w.Write([]byte(a.Evidence.SelfTestText))
	return hsm.Verify(pub, w.Sum(nil), a.Evidence.SelfTest)
}

// level refuses evidence that claims more than what is in it supports.
func (a Attested) level() error {
	said := a.Evidence.Level
	switch claimed := hsm.LevelOf(a.Evidence.Token, a.Evidence.Attributes); {
	case said == claimed:
		return nil
	case said == hsm.LevelAttested && a.Attestation != nil:
		return nil // the statement is checked by itself
	default:
		return fmt.Errorf("the evidence says %.40q, what is in it supports %q", said, claimed)
	}
}
