package test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"debug/buildinfo"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	osuser "os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	ctclient "github.com/google/certificate-transparency-go/client"
	"github.com/google/certificate-transparency-go/jsonclient"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/hsm/hsmtest"
)

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
			all += r.cpu(p.t)
		}
		return all
	}}
}

// shares says how the processor time of all processes is spread.
func (p *peer) shares() string {
	var parts []string
	all := p.target().cpu()
	for _, r := range p.running {
		parts = append(parts, fmt.Sprintf("%s %.0f %%", r.name, 100*r.cpu(p.t).Seconds()/all.Seconds()))
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
	p.versions = append(p.versions, strings.TrimSpace(must(p.t, nil, p.postgres("postgres"), "--version")))
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
	return p.startAs(nil, path, args...)
}

// startAs is start by another account, unless that is nil.
func (p *peer) startAs(account *syscall.Credential, path string, args ...string) *program {
	p.t.Helper()
	r := &program{name: filepath.Base(path), ended: make(chan struct{}), log: p.path(filepath.Base(path) + ".log")}
	output, err := os.Create(r.log)
	if err != nil {
		p.t.Fatal(err)
	}
	defer output.Close()
	r.cmd = exec.Command(path, args...)
	r.cmd.Stdout, r.cmd.Stderr, r.cmd.Dir = output, output, "/"
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Credential: account}
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

// cpu is the processor time of the program with its children, as which
// PostgreSQL has one for each connection (proc(5)).
func (r *program) cpu(t testing.TB) time.Duration {
	t.Helper()
	pid := r.cmd.Process.Pid
	all := processTime(t, pid)
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, child := range strings.Fields(string(children)) {
		id, err := strconv.Atoi(child)
		if err != nil {
			t.Fatal(err)
		}
		used, err := readProcessTime(id)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ESRCH) { // ended meanwhile
			t.Fatal(err)
		}
		all += used
	}
	return all
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

// startDatabase starts PostgreSQL on a Unix socket with Trillian's schema, and
// returns the options with which Trillian finds it. Commits are durable, as
// our log's are.
func (p *peer) startDatabase() []string {
	p.t.Helper()
	dir, account := p.databaseHome()
	data := filepath.Join(dir, "data")
	p.runAs(account, "initdb", "--pgdata="+data, "--username=trillian", "--auth=trust", "--encoding=UTF8", "--locale=C")
	database := p.startAs(account, p.postgres("postgres"), "-D", data, "-k", dir, "-c", "listen_addresses=",
		"-c", "shared_buffers=1GB", "-c", "max_wal_size=4GB", "-c", "max_connections=200", "-c", "jit=off")
	sql := []string{"--no-psqlrc", "--quiet", "--host=" + dir, "--username=trillian", "--set=ON_ERROR_STOP=1"}
	p.await(database, func() bool {
		return command(p.t, nil, p.postgres("psql"), append(sql, "--dbname=postgres", "--command=SELECT 1")...).code == 0
	})
	must(p.t, nil, p.postgres("psql"), append(sql, "--dbname=postgres", "--command=CREATE DATABASE trillian")...)
	must(p.t, nil, p.postgres("psql"), append(sql, "--dbname=trillian", "--file="+p.schema())...)
	return []string{"--storage_system=postgresql", "--quota_system=noop",
		"--postgresql_uri=postgresql:///trillian?host=" + dir + "&user=trillian&pool_max_conns=32"}
}

// databaseHome makes the database's folder, and says whose it is: PostgreSQL
// refuses to run as root and is then run by the account of its package.
func (p *peer) databaseHome() (dir string, account *syscall.Credential) {
	p.t.Helper()
	dir, err := os.MkdirTemp("", "chancery-peer-") // others do not get into p.dir
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if os.Getuid() != 0 {
		return dir, nil
	}
	entry, err := osuser.Lookup("postgres")
	if err != nil {
		p.t.Fatal(err)
	}
	uid, err1 := strconv.ParseUint(entry.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(entry.Gid, 10, 32)
	if err := errors.Join(err1, err2, os.Chown(dir, int(uid), int(gid))); err != nil {
		p.t.Fatal(err)
	}
	return dir, &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}

// runAs runs a program of PostgreSQL to its end.
func (p *peer) runAs(account *syscall.Credential, name string, args ...string) {
	p.t.Helper()
	cmd := exec.CommandContext(p.t.Context(), p.postgres(name), args...)
	cmd.Dir, cmd.SysProcAttr = "/", &syscall.SysProcAttr{Credential: account}
	if out, err := cmd.CombinedOutput(); err != nil {
		p.t.Fatalf("%s: %v\n%s", name, err, out)
	}
}

// postgres is where Debian has a program of PostgreSQL, of its newest version.
func (p *peer) postgres(name string) string {
	p.t.Helper()
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/" + name)
	if err != nil || len(found) == 0 {
		p.t.Fatalf("no %s in /usr/lib/postgresql: install Debian's package postgresql", name)
	}
	return slices.Max(found)
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
	return filepath.Join(source.Dir, "storage", "postgresql", "schema", "storage.sql")
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
