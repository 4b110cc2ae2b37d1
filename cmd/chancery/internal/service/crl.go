package service

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/labstack/echo/v4"
)

// ErrRevoked: the root's list of revoked certificates names one of the service's
// own.
var ErrRevoked = errors.New("certificate is revoked")

// crlName is the root's list in the trust folder, in PEM, and the path under
// which it is served, in DER (RFC 5280, Section 4.2.1.13; RFC 2585, Section 4).
const crlName = "root.crl"

// maxCRL bounds the list, in octets.
const maxCRL = 1 << 20

// openCRL serves the root's list of the trust folder, if there is one. The list
// has to be the root's, and the authority must not be on it.
func (s *Service) openCRL(chain []*x509.Certificate) error {
	list, err := readCRL(filepath.Join(s.cfg.Trust, crlName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := list.CheckSignatureFrom(chain[len(chain)-1]); err != nil {
		return fmt.Errorf("%s is not of the root in chain.pem: %w", crlName, err)
	}
	for _, revoked := range list.RevokedCertificateEntries {
		for _, cert := range chain[:len(chain)-1] {
			if cert.SerialNumber.Cmp(revoked.SerialNumber) == 0 {
				return fmt.Errorf("%s, serial %x, since %s: %w", cert.Subject.CommonName, cert.SerialNumber, revoked.RevocationTime.Format(time.RFC3339), ErrRevoked)
			}
		}
	}
	s.crl = list
	serve := func(c echo.Context) error { return serveCRL(c, list.Raw) }
	s.echo.GET("/"+crlName, serve)
	s.echo.HEAD("/"+crlName, serve)
	return nil
}

func serveCRL(c echo.Context, der []byte) error {
	hash := sha256.Sum256(der)
	header := c.Response().Header()
	header.Set("Cache-Control", "no-cache") // the next list may come at any time
	header.Set("Content-Type", "application/pkix-crl")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("ETag", `"`+hex.EncodeToString(hash[:16])+`"`)
	http.ServeContent(c.Response(), c.Request(), "", time.Time{}, bytes.NewReader(der))
	return nil
}

// readCRL reads a file that holds one list in PEM.
func readCRL(path string) (*x509.RevocationList, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read revoked certificates: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxCRL))
	if err != nil {
		return nil, fmt.Errorf("read revoked certificates: %w", err)
	}
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "X509 CRL" || len(rest) > 0 {
		return nil, fmt.Errorf("read revoked certificates %s: want one X509 CRL block and nothing else", path)
	}
	list, err := x509.ParseRevocationList(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read revoked certificates %s: %w", path, err)
	}
	return list, nil
}

// crlDue says whether the list should have been followed by another.
func (s *Service) crlDue() bool {
	now, err := s.clock.Now()
	return s.crl != nil && err == nil && now.After(s.crl.NextUpdate)
}
