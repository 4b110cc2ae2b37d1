// Command verify checks the attestation in a file of evidence. The tests build
// it without cgo and run it where there is nothing but files:
//
//	verify EVIDENCE.json ROOTS.pem
package main

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/tpm"
)

func main() {
	verdict, err := verify(os.Args[1], os.Args[2])
	if err != nil {
		fmt.Fprintf(os.Stderr, "verify: %v\n", err)
		os.Exit(1)
	}
	fmt.Printf("chain %s, creation %v, activation %v, level %s, model %s\n",
		verdict.Chain, verdict.Creation, verdict.Activation, verdict.Level, verdict.Device.Model)
}

func verify(evidence, roots string) (tpm.Verdict, error) {
	text, err := os.ReadFile(evidence)
	if err != nil {
		return tpm.Verdict{}, err
	}
	var e hsm.Evidence
	if err := json.Unmarshal(text, &e); err != nil {
		return tpm.Verdict{}, err
	}
	if e.Attestation == nil {
		return tpm.Verdict{}, errors.New("no attestation")
	}
	pem, err := os.ReadFile(roots)
	if err != nil {
		return tpm.Verdict{}, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return tpm.Verdict{}, errors.New("no certificates")
	}
	spki, err := hsm.ParseSPKIHash(e.SPKI)
	if err != nil {
		return tpm.Verdict{}, err
	}
	return tpm.VerifyAttestation(*e.Attestation, spki, e.AttestationNonce(), pool)
}
