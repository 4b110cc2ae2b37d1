package demo

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"
	"time"
)

// BenchmarkIssueHandler issues certificates through the whole service in this
// process, without the network, for profiles:
//
//	go test -run '^$' -bench IssueHandler -cpuprofile cpu.out ./cmd/chancery/internal/demo
//
// The figures that count are those of BenchmarkPath in test.
func BenchmarkIssueHandler(b *testing.B) {
	d, err := Start(b.Context(), Options{
		Dir: filepath.Join(b.TempDir(), "demo"), Logger: slog.New(slog.DiscardHandler), Step: func(string, string, time.Duration) {},
	})
	if err != nil {
		b.Skip(err)
	}
	defer func() {
		if err := d.Close(); err != nil {
			b.Error(err)
		}
	}()
	body := request(b, d)
	b.Run("parallel", func(b *testing.B) { post(b, d.service.Handler(), body) })
}

func post(b *testing.B, handler http.Handler, body []byte) {
	b.SetParallelism(8)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			r := httptest.NewRequest(http.MethodPost, "/api/v2/signingCert", bytes.NewReader(body))
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, r)
			if w.Code != http.StatusOK {
				b.Errorf("status %d: %s", w.Code, w.Body)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "per-s")
}

// request is a signing request of the demo's user for a fresh key.
func request(b *testing.B, d *Demo) []byte {
	b.Helper()
	token, err := d.idp.Token(map[string]any{"exp": time.Now().Add(time.Hour).Unix()})
	if err != nil {
		b.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		b.Fatal(err)
	}
	digest := sha256.Sum256([]byte(Email))
	possession, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		b.Fatal(err)
	}
	body, err := json.Marshal(map[string]any{
		"credentials": map[string]string{"oidcIdentityToken": token},
		"publicKeyRequest": map[string]any{
			"publicKey":         map[string]string{"content": string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))},
			"proofOfPossession": possession,
		},
	})
	if err != nil {
		b.Fatal(err)
	}
	return body
}
