package hsmtest

import (
	"crypto/x509"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// Certify manufactures the TPM anew: with endorsement keys (RSA-2048 and ECC
// P-384) and their certificates by a CA of its own, in the TPM's folder. It
// returns the CA's certificates. The test is skipped (or failed, see Missing)
// where swtpm_setup or certtool is missing.
func (e *Emulator) Certify(t testing.TB) *x509.CertPool {
	t.Helper()
	for tool, pkg := range map[string]string{"swtpm_setup": "swtpm-tools", "swtpm_localca": "swtpm-tools", "certtool": "gnutls-bin"} {
		if _, err := exec.LookPath(tool); err != nil {
			Missing(t, tool+" is not installed (Debian: apt install "+pkg+")")
		}
	}
	e.Stop(t)
	ca := filepath.Join(e.dir, "ca")
	if err := os.MkdirAll(ca, 0o700); err != nil {
		t.Fatal(err)
	}
	issuer := filepath.Join(ca, "issuer.pem")
	localCA := writeText(t, ca, "localca.conf", fmt.Sprintf("statedir = %[1]s\nsigningkey = %[1]s/key.pem\nissuercert = %[2]s\ncertserial = %[1]s/serial\n", ca, issuer))
	options := writeText(t, ca, "options", "")
	setup := writeText(t, ca, "setup.conf", fmt.Sprintf("create_certs_tool = %s\ncreate_certs_tool_config = %s\ncreate_certs_tool_options = %s\nactive_pcr_banks = sha256\n", tool(t, "swtpm_localca"), localCA, options))
	cmd := exec.CommandContext(t.Context(), "swtpm_setup", "--tpm2", "--tpm-state", e.StateDir(), "--config", setup, "--create-ek-cert", "--overwrite")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("swtpm_setup: %v\n%s", err, out)
	}
	var all []byte
	for _, file := range []string{issuer, filepath.Join(ca, "swtpm-localca-rootca-cert.pem")} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, text...)
	}
	pool := x509.NewCertPool()
	if writeText(t, ca, filepath.Base(e.CAFile()), string(all)); !pool.AppendCertsFromPEM(all) {
		t.Fatal("no CA certificates")
	}
	e.Start(t)
	return pool
}

// CAFile is where Certify leaves the CA's certificates, in PEM.
func (e *Emulator) CAFile() string { return filepath.Join(e.dir, "ca", "roots.pem") }

func writeText(t testing.TB, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// tool returns the path of a program.
func tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}
