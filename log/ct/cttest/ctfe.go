// Package cttest is the reference RFC 6962 log for tests: ctfe of
// certificate-transparency-go, unchanged, over a Trillian log server in the
// same process. Its key is in memory.
//
// Of this module it uses the storage driver alone, which passes Trillian's own
// suites: Trillian's storage in memory does not deduplicate.
package cttest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/certificate-transparency-go/trillian/ctfe"
	"github.com/google/certificate-transparency-go/trillian/ctfe/configpb"
	"github.com/google/trillian"
	"github.com/google/trillian/crypto/keys"
	"github.com/google/trillian/crypto/keys/der"
	"github.com/google/trillian/crypto/keyspb"
	"github.com/google/trillian/extension"
	trillianlog "github.com/google/trillian/log"
	"github.com/google/trillian/monitoring"
	"github.com/google/trillian/quota"
	"github.com/google/trillian/server"
	"github.com/google/trillian/server/interceptor"
	"github.com/google/trillian/storage"
	"github.com/google/trillian/util/clock"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/chancery-ca/chancery/log/tree"
)

// maxChain is the default of ct_server's flag max_cert_chain_size, in octets.
const maxChain = 512000

// Options change the log.
type Options struct {
	// ExtKeyUsages are those that a leaf must have one of, by ctfe's names
	// ("CodeSigning"); none means any.
	ExtKeyUsages []string
}

// CTFE is a running log.
type CTFE struct {
	// Server speaks TLS; the log is below its URL and Prefix.
	Server *httptest.Server
	Prefix string
	// Key is the log's public key.
	Key *ecdsa.PublicKey

	tree  *trillian.Tree
	store storage.LogStorage
}

// MaxGetEntries is set as --max_get_entries would be: to the 256 entries of a
// tile, at which our log cuts, too.
const MaxGetEntries = 256

var once sync.Once

// prepare registers, once in a process, how Trillian reads keys.
func prepare() {
	once.Do(func() {
		trillianlog.InitMetrics(nil)
		ctfe.MaxGetEntriesAllowed = MaxGetEntries
		keys.RegisterHandler(&keyspb.PrivateKey{}, der.FromProto)
	})
}

// New starts a log that accepts chains to roots. It ends with the test.
func New(t testing.TB, roots []*x509.Certificate, opts Options) *CTFE {
	t.Helper()
	prepare()
	backend := openStore(t)
	meta, err := storage.CreateTree(t.Context(), backend.Admin, &trillian.Tree{
		TreeState: trillian.TreeState_ACTIVE, TreeType: trillian.TreeType_LOG, MaxRootDuration: durationpb.New(0),
	})
	if err != nil {
		t.Fatal(err)
	}
	c := &CTFE{Prefix: "/ct/oracle", tree: meta, store: backend.Log}
	client := c.serveTrillian(t, backend)
	if _, err := client.InitLog(t.Context(), &trillian.InitLogRequest{LogId: meta.TreeId}); err != nil {
		t.Fatal(err)
	}
	instance, err := ctfe.SetUpInstance(t.Context(), ctfe.InstanceOptions{
		Validated: c.config(t, roots, opts), Client: client, Deadline: 2 * time.Minute,
		MetricFactory: monitoring.InertMetricFactory{}, RequestLog: new(ctfe.DefaultRequestLog),
	})
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	for path, handler := range instance.Handlers {
		mux.Handle(path, http.MaxBytesHandler(handler, maxChain))
	}
	c.Server = httptest.NewTLSServer(mux)
	t.Cleanup(c.Server.Close)
	return c
}

func openStore(t testing.TB) *tree.Backend {
	t.Helper()
	backend, err := tree.OpenStore(tree.Config{
		Dir: t.TempDir(), Now: func() (time.Time, error) { return time.Now(), nil }, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := backend.Close(); err != nil {
			t.Error(err)
		}
	})
	return backend
}

// serveTrillian puts Trillian's log server behind its gRPC interface, as ctfe
// expects it, without a socket.
func (c *CTFE) serveTrillian(t testing.TB, backend *tree.Backend) trillian.TrillianLogClient {
	t.Helper()
	grpcServer := grpc.NewServer(grpc.UnaryInterceptor(interceptor.ErrorWrapper))
	trillian.RegisterTrillianLogServer(grpcServer, server.NewTrillianLogRPCServer(extension.Registry{
		AdminStorage: backend.Admin, LogStorage: backend.Log, QuotaManager: quota.Noop(),
	}, clock.System))
	listener := bufconn.Listen(1 << 20)
	served := make(chan error, 1)
	go func() { served <- grpcServer.Serve(listener) }()
	conn, err := grpc.NewClient("passthrough:trillian",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		grpcServer.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return trillian.NewTrillianLogClient(conn)
}

// config makes the log's key and configuration.
func (c *CTFE) config(t testing.TB, roots []*x509.Certificate, opts Options) *ctfe.ValidatedLogConfig {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c.Key = &key.PublicKey
	raw, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := anypb.New(&keyspb.PrivateKey{Der: raw})
	if err != nil {
		t.Fatal(err)
	}
	var accepted []byte
	for _, root := range roots {
		accepted = append(accepted, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw})...)
	}
	file := filepath.Join(t.TempDir(), "roots.pem")
	if err := os.WriteFile(file, accepted, 0o600); err != nil {
		t.Fatal(err)
	}
	validated, err := ctfe.ValidateLogConfig(&configpb.LogConfig{
		LogId: c.tree.TreeId, Prefix: c.Prefix, RootsPemFile: []string{file}, PrivateKey: private,
		ExtKeyUsages: opts.ExtKeyUsages, MaxMergeDelaySec: 60, ExpectedMergeDelaySec: 1,
	})
	if err != nil {
		t.Fatal(err)
	}
	return validated
}

// URL is the log's base URL.
func (c *CTFE) URL() string { return c.Server.URL + c.Prefix }

// Integrate puts what was submitted into the tree, in the order of submission.
func (c *CTFE) Integrate(t testing.TB) {
	t.Helper()
	for {
		n, err := trillianlog.IntegrateBatch(t.Context(), proto.CloneOf(c.tree), 1000, 0, 0, clock.System, c.store, quota.Noop())
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			return
		}
	}
}
