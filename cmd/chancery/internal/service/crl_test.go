package service

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/config"
)

// issuer is a root with an intermediate, serial 2.
type issuer struct {
	t     *testing.T
	key   *ecdsa.PrivateKey
	chain []*x509.Certificate
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	i := &issuer{t: t}
	key, root := i.certificate("root", 1, nil, nil)
	_, inter := i.certificate("intermediate", 2, root, key)
	i.key, i.chain = key, []*x509.Certificate{inter, root}
	return i
}

func (i *issuer) certificate(name string, serial int64, parent *x509.Certificate, by *ecdsa.PrivateKey) (*ecdsa.PrivateKey, *x509.Certificate) {
	i.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		i.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	if parent == nil {
		parent, by = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), by)
	if err != nil {
		i.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		i.t.Fatal(err)
	}
	return key, cert
}

// list is a list of revoked serials in PEM.
func (i *issuer) list(due time.Time, serials ...int64) []byte {
	i.t.Helper()
	list := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: due}
	for _, serial := range serials {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: big.NewInt(serial), RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, i.chain[1], i.key)
	if err != nil {
		i.t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
}

func TestCRL(t *testing.T) {
	ours, theirs := newIssuer(t), newIssuer(t)
	soon := time.Now().Add(time.Hour)
	for _, tc := range []struct {
		name    string
		content []byte
		refused bool
		want    error
		due     bool
	}{
		{"empty list", ours.list(soon), false, nil, false},
		{"another certificate", ours.list(soon, 3), false, nil, false},
		{"past its next update", ours.list(time.Now().Add(-time.Minute), 3), false, nil, true},
		{"our intermediate", ours.list(soon, 3, 2), true, ErrRevoked, false},
		{"another root's", theirs.list(soon), true, nil, false},
		{"nothing", nil, true, nil, false},
		{"a certificate", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ours.chain[0].Raw}), true, nil, false},
		{"two lists", append(ours.list(soon), ours.list(soon)...), true, nil, false},
		{"not DER", pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: []byte("?")}), true, nil, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir, logger := t.TempDir(), slog.New(slog.DiscardHandler)
			if err := os.WriteFile(filepath.Join(dir, crlName), tc.content, 0o600); err != nil {
				t.Fatal(err)
			}
			s := &Service{cfg: &config.Config{Trust: dir}, log: logger, clock: newClock(logger)}
			s.echo = s.newEcho()
			err := s.openCRL(ours.chain)
			if (err != nil) != tc.refused || tc.want != nil && !errors.Is(err, tc.want) {
				t.Fatalf("error %v", err)
			}
			get := httptest.NewRecorder()
			s.echo.ServeHTTP(get, httptest.NewRequest(http.MethodGet, "/"+crlName, nil))
			if tc.refused {
				if get.Code != http.StatusNotFound {
					t.Errorf("status %d of a list that was refused", get.Code)
				}
				return
			}
			list, err := x509.ParseRevocationList(get.Body.Bytes())
			if err != nil || get.Code != http.StatusOK || get.Header().Get("Content-Type") != "application/pkix-crl" || list.CheckSignatureFrom(ours.chain[1]) != nil {
				t.Errorf("status %d, %v, %v", get.Code, get.Header(), err)
			}
			if s.crlDue() != tc.due || (len(s.warnings()) == 1) != tc.due {
				t.Errorf("due %t, warnings %v", s.crlDue(), s.warnings())
			}
		})
	}
}
