package test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"debug/buildinfo"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	ctclient "github.com/google/certificate-transparency-go/client"
	"github.com/google/certificate-transparency-go/jsonclient"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

// mariadbd is where Debian has it, which is not in everybody's PATH.
const mariadbd = "/usr/sbin/mariadbd"

// peer is the running assembly that TestPeer compares with.
type peer struct {
	t        testing.TB
	dir      string // private, removed at the end
	programs string // where they are
	versions []string
	running  []*program

	log    *ctclient.LogClient
	logKey []byte // PEM
	url    string // Fulcio's HTTP
}

// program is one running process.
type program struct {
	name  string
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has ended
	log   string        // file of what it wrote
}

// startPeer starts the assembly, which trusts one issuer of ID tokens, and
// ends it, every process by its id, when the test ends.
func startPeer(t testing.TB, programs, issuer string) *peer {
	t.Helper()
	p := &peer{t: t, dir: t.TempDir(), programs: programs}
	p.listVersions()
	storage := p.startDatabase()
	tree, logServer := p.startTrillian(storage)
	token := hsmtest.NewSoftHSM(t)
	root, config := p.makeCA(token)
	logURL := p.startLog(tree, logServer, root)
	p.startFulcio(issuer, config, logURL)
	return p
}

func (p *peer) target() target {
	return target{url: p.url, cpu: func() (all time.Duration) {
		for _, r := range p.running {
			all += processTime(p.t, r.cmd.Process.Pid)
		}
		return all
	}}
}

// shares says how the processor time of all processes is spread.
func (p *peer) shares() string {
	var parts []string
	all := p.target().cpu()
	for _, r := range p.running {
		parts = append(parts, fmt.Sprintf("%s %.0f %%", r.name, 100*processTime(p.t, r.cmd.Process.Pid).Seconds()/all.Seconds()))
	}
	return strings.Join(parts, ", ")
}

// listVersions reads the versions of the peer's modules from its programs.
func (p *peer) listVersions() {
	p.t.Helper()
	for _, name := range []string{"fulcio", "ct_server", "trillian_log_server"} {
		info, err := buildinfo.ReadFile(p.program(name))
		if err != nil {
			p.t.Fatal(err)
		}
		p.versions = append(p.versions, info.Main.Path+" "+info.Main.Version)
	}
	p.versions = append(p.versions, strings.TrimSpace(must(p.t, nil, mariadbd, "--no-defaults", "--version")))
}

func (p *peer) program(name string) string { return filepath.Join(p.programs, name) }

func (p *peer) path(name string) string { return filepath.Join(p.dir, name) }

func (p *peer) write(name string, content []byte) string {
	p.t.Helper()
	if err := os.WriteFile(p.path(name), content, 0o600); err != nil {
		p.t.Fatal(err)
	}
	return p.path(name)
}

// start runs a program until the test ends. What it writes goes to a file.
func (p *peer) start(path string, args ...string) *program {
	p.t.Helper()
	r := &program{name: filepath.Base(path), ended: make(chan struct{}), log: p.path(filepath.Base(path) + ".log")}
	output, err := os.Create(r.log)
	if err != nil {
		p.t.Fatal(err)
	}
	defer output.Close()
	r.cmd = exec.Command(path, args...)
	r.cmd.Stdout, r.cmd.Stderr, r.cmd.Dir = output, output, p.dir
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := r.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	go func() {
		_ = r.cmd.Wait() // ended by stop, or await says so
		close(r.ended)
	}()
	p.running = append(p.running, r)
	p.t.Cleanup(r.stop)
	return r
}

// stop ends the program, at last by force.
func (r *program) stop() {
	_ = r.cmd.Process.Signal(syscall.SIGTERM) // may have ended
	select {
	case <-r.ended:
	case <-time.After(15 * time.Second):
		_ = r.cmd.Process.Kill()
		<-r.ended
	}
}

// await waits until ready says that the program answers.
func (p *peer) await(r *program, ready func() bool) {
	p.t.Helper()
	eventually(p.t, r.name, func() bool {
		select {
		case <-r.ended:
			text, _ := os.ReadFile(r.log)
			p.t.Fatalf("%s ended:\n%s", r.name, text[max(0, len(text)-4000):])
		default:
		}
		return ready()
	})
}

// listens says whether an address accepts connections.
func listens(network, address string) func() bool {
	return func() bool {
		conn, err := net.Dial(network, address)
		if err != nil {
			return false
		}
		return conn.Close() == nil
	}
}

// answers says whether a URL answers with 200.
func answers(url string) func() bool {
	return func() bool {
		resp, err := http.Get(url)
		if err != nil {
			return false
		}
		return resp.Body.Close() == nil && resp.StatusCode == http.StatusOK
	}
}

// startDatabase starts MariaDB on a Unix socket with Trillian's schema, and
// returns the options with which Trillian finds it. Commits are durable, as
// our log's are.
func (p *peer) startDatabase() []string {
	p.t.Helper()
	data, socket := p.path("data"), p.path("db.sock")
	var asRoot []string
	if os.Getuid() == 0 {
		asRoot = []string{"--user=root"}
	}
	must(p.t, nil, "mariadb-install-db", append([]string{"--no-defaults", "--datadir=" + data,
		"--auth-root-authentication-method=normal", "--skip-test-db"}, asRoot...)...)
	database := p.start(mariadbd, append([]string{"--no-defaults", "--datadir=" + data, "--socket=" + socket,
		"--skip-networking", "--max-connections=300", "--innodb-flush-log-at-trx-commit=1",
		"--innodb-buffer-pool-size=1G", "--innodb-log-file-size=1G"}, asRoot...)...)
	p.await(database, listens("unix", socket))
	sql := []string{"--no-defaults", "--socket=" + socket, "--user=root"}
	must(p.t, nil, "mariadb", append(sql, "--execute=CREATE DATABASE trillian")...)
	must(p.t, nil, "mariadb", append(sql, "--database=trillian", "--execute=source "+p.schema())...)
	return []string{"--storage_system=mysql", "--mysql_uri=root@unix(" + socket + ")/trillian",
		"--mysql_max_conns=64", "--mysql_max_idle_conns=64", "--quota_system=noop"}
}

// schema is the file of Trillian's tables, from the source of its programs.
func (p *peer) schema() string {
	p.t.Helper()
	info, err := buildinfo.ReadFile(p.program("trillian_log_server"))
	if err != nil {
		p.t.Fatal(err)
	}
	var source struct{ Dir string }
	answer := must(p.t, nil, "go", "mod", "download", "-json", info.Main.Path+"@"+info.Main.Version)
	if err := json.Unmarshal([]byte(answer), &source); err != nil {
		p.t.Fatal(err)
	}
	return filepath.Join(source.Dir, "storage", "mysql", "schema", "storage.sql")
}

// startTrillian starts log server and signer, makes a tree and returns its id
// and the server's address.
func (p *peer) startTrillian(storage []string) (tree, address string) {
	p.t.Helper()
	address = freePort(p.t)
	server := p.start(p.program("trillian_log_server"), append(storage, "--rpc_endpoint="+address, "--http_endpoint=")...)
	p.await(server, listens("tcp", address))
	tree = strings.TrimSpace(must(p.t, nil, p.program("createtree"), "--admin_server="+address))
	rpc := freePort(p.t)
	signer := p.start(p.program("trillian_log_signer"), append(storage, "--rpc_endpoint="+rpc, "--http_endpoint=",
		"--force_master", "--sequencer_interval=1s", "--batch_size=10000")...)
	p.await(signer, listens("tcp", rpc))
	return tree, address
}

// makeCA makes a key and a root certificate in a token, as Fulcio's
// documentation says, and returns their files: the certificate and the
// configuration of crypto11.
func (p *peer) makeCA(token hsmtest.SoftHSMToken) (root, config string) {
	p.t.Helper()
	opened := hsmtest.OpenSoftHSM(p.t, token)
	hsmtest.NewKey(p.t, opened, "PKCS11CA", hsm.ECDSAP256)
	if err := opened.Close(); err != nil {
		p.t.Fatal(err)
	}
	raw, err := json.Marshal(map[string]string{"Path": token.Module, "TokenLabel": token.Label, "Pin": string(token.PIN)})
	if err != nil {
		p.t.Fatal(err)
	}
	root, config = p.path("root.pem"), p.write("crypto11.conf", raw)
	must(p.t, nil, p.program("fulcio"), "createca", "--pkcs11-config-path", config, "--hsm-caroot-id", "1", "--org", "peer", "--out", root)
	return root, config
}

// startLog starts the CT log's front end and returns the log's URL.
func (p *peer) startLog(tree, logServer, root string) string {
	p.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		p.t.Fatal(err)
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		p.t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		p.t.Fatal(err)
	}
	var octets strings.Builder
	for _, octet := range private {
		fmt.Fprintf(&octets, `\x%02x`, octet)
	}
	p.logKey = pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})
	config := p.write("log.cfg", fmt.Appendf(nil, `config {
  log_id: %s
  prefix: "peer"
  roots_pem_file: %q
  private_key: { [type.googleapis.com/keyspb.PrivateKey] { der: "%s" } }
  ext_key_usages: "CodeSigning"
  max_merge_delay_sec: 86400
}
`, tree, root, &octets))
	address := freePort(p.t)
	log := p.start(p.program("ct_server"), "--http_endpoint="+address, "--log_rpc_server="+logServer, "--log_config="+config, "--get_sth_interval=0")
	url := "http://" + address + "/peer"
	p.await(log, answers(url+"/ct/v1/get-sth"))
	p.log, err = ctclient.New(url, new(http.Client), jsonclient.Options{PublicKey: string(p.logKey)})
	if err != nil {
		p.t.Fatal(err)
	}
	return url
}

// startFulcio starts Fulcio.
func (p *peer) startFulcio(issuer, crypto11, logURL string) {
	p.t.Helper()
	config := p.write("fulcio.yaml", fmt.Appendf(nil, `oidc-issuers:
  %s: {issuer-url: %q, client-id: sigstore, type: email}
`, issuer, issuer))
	_, metrics, err := net.SplitHostPort(freePort(p.t))
	if err != nil {
		p.t.Fatal(err)
	}
	host, port, err := net.SplitHostPort(freePort(p.t))
	if err != nil {
		p.t.Fatal(err)
	}
	_, rpc, err := net.SplitHostPort(freePort(p.t))
	if err != nil {
		p.t.Fatal(err)
	}
	fulcio := p.start(p.program("fulcio"), "serve", "--log_type=prod", "--ca=pkcs11ca", "--hsm-caroot-id=1", "--pkcs11-config-path="+crypto11,
		"--ct-log-url="+logURL, "--config-path="+config, "--host="+host, "--port="+port, "--grpc-host="+host, "--grpc-port="+rpc,
		"--metrics-port="+metrics, "--legacy-unix-domain-socket="+p.path("legacy.sock"))
	p.url = "http://" + net.JoinHostPort(host, port)
	p.await(fulcio, answers(p.url+"/healthz"))
}
