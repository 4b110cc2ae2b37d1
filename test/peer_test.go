package test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	ctclient "github.com/google/certificate-transparency-go/client"
	"github.com/google/certificate-transparency-go/ctutil"
	"github.com/google/certificate-transparency-go/x509util"
)

// TestPeer measures this product beside the field's assembly of the same
// service, in one run, on one machine, with one client program. The assembly
// is of unmodified programs from the Go module proxy, in the folder that
// CHANCERY_PEER names (make bench-peer builds them), and of PostgreSQL from
// the distribution:
//
//	fulcio               certificates: OIDC, Fulcio's HTTP interface
//	ct_server            the CT log's front end (RFC 6962)
//	trillian_log_server  the log
//	trillian_log_signer  its sequencer
//	postgres             the log's storage
//
// Alike on both sides: the request, octet for octet (an RS256 ID token of one
// issuer of type email, a P-256 key, its proof of possession); an issuing key,
// P-256, in SoftHSM; certificates with an embedded SCT, whose precertificate is
// on disk before the SCT is given; a connection for each client, kept alive.
// What differs favours the peer:
//
//   - its HTTP interface has no TLS and is asked without; ours is HTTP/2 over
//     TLS;
//   - its log signs with a key in memory, the program as it is built having no
//     other: of three signatures for a certificate the token makes two, and all
//     three of ours;
//   - its CA is a root itself, so that a chain is one certificate shorter;
//   - it does not verify SCTs (an option that is off by default), nor lint
//     certificates, nor keep an audit;
//   - its sequencer passes once a second, as our head is made, and not ten
//     times; quotas are off; the database has room for all connections, and
//     is PostgreSQL, with which Trillian takes a tenth less processor time
//     than with MariaDB. In-memory storage no program of Trillian offers.
//
// Everything else is as the programs have it: GOGC=400 in the environment of
// the peer's made it a few per cent faster.
//
// The sides take turns, round after round, so that a slow minute of the machine
// meets both. The table has the median of the rounds, and the ratio of each
// round's pair: median, least and greatest. Processor time is the operating
// system's account of all processes of a side, read when the log's head covers
// every certificate of the turn, so that the log's later work counts. A turn
// fails the test if a request is not answered with a certificate, or if the
// log has not grown by exactly the number of certificates; before the first,
// one certificate of each side, and its SCT, are verified.
//
// CHANCERY_PEER_SECONDS is about how long a turn lasts, 5 by default.
// Everything listens on loopback, but for Fulcio's metrics, which cannot be
// told to.
func TestPeer(t *testing.T) {
	programs := os.Getenv("CHANCERY_PEER")
	if programs == "" {
		t.Skip("CHANCERY_PEER names no folder of the peer's programs: make bench-peer")
	}
	turn := turnLength(t)
	d := startDemo(t, filepath.Join(t.TempDir(), "demo"))
	p := startPeer(t, programs, d.issuer)
	key := freshKey(t)
	body := signingRequest(t, key, d.token(map[string]any{"exp": time.Now().Add(3 * time.Hour).Unix()}), user)
	ours := &side{at: d.target(), log: d.ctClient(t), logKey: d.read("trust", "ct.pub"), body: body}
	peer := &side{at: p.target(), log: p.log, logKey: p.logKey, body: body}
	for _, s := range []*side{ours, peer} {
		s.check(t, key)
		s.turn(t, 32, time.Second) // warm
	}

	const rounds = 5
	began := machineTime(t)
	used := ours.at.cpu() + peer.at.cpu() + processTime(t, os.Getpid())
	var many, one comparison
	for range rounds {
		many.add(ours.turn(t, 32, turn), peer.turn(t, 32, turn))
		one.add(ours.turn(t, 1, turn), peer.turn(t, 1, turn))
	}
	used = ours.at.cpu() + peer.at.cpu() + processTime(t, os.Getpid()) - used
	machine := machineTime(t).since(began)

	var out bytes.Buffer
	fmt.Fprintf(&out, "peer: %s\n", strings.Join(p.versions, ", "))
	fmt.Fprintf(&out, "%d processors, %d rounds of %v a turn; others took %.0f %% of the machine\n",
		runtime.NumCPU(), rounds, turn, 100*max(0, machine.busy-used).Seconds()/machine.all.Seconds())
	table := tabwriter.NewWriter(&out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(table, "\tthis\tpeer\tratio (least, greatest)")
	many.row(table, "certificates/s, 32 clients", func(r measured) float64 { return r.rate })
	many.row(table, "CPU ms per certificate, 32 clients", func(r measured) float64 { return r.cpu })
	many.row(table, "CPU ms of the load generator, beside", func(r measured) float64 { return r.load })
	many.row(table, "p50 ms, 32 clients", func(r measured) float64 { return r.p50 })
	one.row(table, "certificates/s, 1 client", func(r measured) float64 { return r.rate })
	one.row(table, "CPU ms per certificate, 1 client", func(r measured) float64 { return r.cpu })
	one.row(table, "p50 ms, 1 client", func(r measured) float64 { return r.p50 })
	if err := table.Flush(); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(&out, "peer's processor time: %s\n", p.shares())
	t.Logf("\n%s", &out)
}

func turnLength(t *testing.T) time.Duration {
	t.Helper()
	text := os.Getenv("CHANCERY_PEER_SECONDS")
	if text == "" {
		return 5 * time.Second
	}
	seconds, err := strconv.Atoi(text)
	if err != nil || seconds < 1 || seconds > 600 {
		t.Fatalf("CHANCERY_PEER_SECONDS is %q, not a number of seconds to 600", text)
	}
	return time.Duration(seconds) * time.Second
}

// side is one of the two that are compared.
type side struct {
	at     target
	log    *ctclient.LogClient // verifies tree heads
	logKey []byte              // PEM
	body   []byte              // of every request
}

// measured is what a turn gave: certificates in a second; and in milliseconds
// the processor time of a certificate, that of the load generator for it, and
// the median wait for it.
type measured struct{ rate, cpu, load, p50 float64 }

// turn sends requests from a number of clients for about as long as it is
// told: as many as fit there at the rate of a first hundred.
func (s *side) turn(t *testing.T, clients int, length time.Duration) measured {
	t.Helper()
	l := load{at: s.at, clients: clients, status: http.StatusOK,
		request: func(int64) (string, []byte) { return "/api/v2/signingCert", s.body }}
	connected := l.connect(t)
	defer connected.close()
	size := s.size(t)
	const first = 100
	began := time.Now()
	l.send(t, connected, first)
	n := max(first, int(first*length.Seconds()/time.Since(began).Seconds()))
	s.awaitSize(t, size+first)

	cpu, generator, began := s.at.cpu(), processTime(t, os.Getpid()), time.Now()
	times := l.send(t, connected, n)
	took := time.Since(began)
	generator = processTime(t, os.Getpid()) - generator
	s.awaitSize(t, size+first+uint64(n))
	cpu = s.at.cpu() - cpu
	if t.Failed() {
		t.FailNow()
	}
	slices.Sort(times)
	return measured{
		rate: float64(n) / took.Seconds(), p50: milliseconds(times[n/2]),
		cpu: milliseconds(cpu) / float64(n), load: milliseconds(generator) / float64(n),
	}
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// size is that of the log by its newest head.
func (s *side) size(t *testing.T) uint64 {
	t.Helper()
	sth, err := s.log.GetSTH(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return sth.TreeSize
}

// awaitSize waits until the log's head covers size leaves, and no more.
func (s *side) awaitSize(t *testing.T, size uint64) {
	t.Helper()
	if sth := awaitSTH(t, s.log, size); sth.TreeSize != size {
		t.Fatalf("the log has %d leaves for %d certificates", sth.TreeSize, size)
	}
}

// check has a certificate issued for key, and verifies it and its SCT.
func (s *side) check(t *testing.T, key *ecdsa.PrivateKey) {
	t.Helper()
	size := s.size(t)
	one := load{at: s.at, clients: 1}.connect(t)
	defer one.close()
	resp, err := one[0].Post(s.at.url+"/api/v2/signingCert", "application/json", bytes.NewReader(s.body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var issued struct {
		SignedCertificateEmbeddedSct struct {
			Chain struct{ Certificates []string }
		}
	}
	if err := json.NewDecoder(resp.Body).Decode(&issued); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("status %d, %v", resp.StatusCode, err)
	}
	block, issuers := pem.Decode([]byte(strings.Join(issued.SignedCertificateEmbeddedSct.Chain.Certificates, "\n")))
	if block == nil {
		t.Fatalf("no certificate in the answer")
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	chain := ctChain(t, leaf.Raw, issuers)
	if !key.PublicKey.Equal(leaf.PublicKey) || !slices.Equal(leaf.EmailAddresses, []string{user}) {
		t.Errorf("a certificate for %v and another key", leaf.EmailAddresses)
	}
	for i := range chain[:len(chain)-1] {
		if err := chain[i].CheckSignatureFrom(chain[i+1]); err != nil {
			t.Errorf("certificate %d: %v", i, err)
		}
	}
	scts, err := x509util.ParseSCTsFromCertificate(leaf.Raw)
	if err != nil || len(scts) != 1 {
		t.Fatalf("%d SCTs, %v", len(scts), err)
	}
	if err := ctutil.VerifySCT(publicKey(t, s.logKey), chain[:2], scts[0], true); err != nil {
		t.Errorf("SCT: %v", err)
	}
	s.awaitSize(t, size+1)
}

// comparison has the turns of both sides, round by round.
type comparison struct{ ours, peers []measured }

func (c *comparison) add(ours, peer measured) {
	c.ours, c.peers = append(c.ours, ours), append(c.peers, peer)
}

// row writes the medians of one number and of its ratio.
func (c *comparison) row(w *tabwriter.Writer, name string, number func(measured) float64) {
	var ours, peers, ratios []float64
	for i := range c.ours {
		mine, theirs := number(c.ours[i]), number(c.peers[i])
		ours, peers, ratios = append(ours, mine), append(peers, theirs), append(ratios, mine/theirs)
	}
	fmt.Fprintf(w, "%s\t%.4g\t%.4g\t%.2f (%.2f, %.2f)\n", name,
		middle(ours), middle(peers), middle(ratios), slices.Min(ratios), slices.Max(ratios))
}

func middle(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}

// machine is time of all processors together: busy, and busy or idle.
type machine struct{ busy, all time.Duration }

func (m machine) since(before machine) machine {
	return machine{m.busy - before.busy, m.all - before.all}
}

// machineTime reads the first line of /proc/stat, in ticks of 10 ms (proc(5)).
func machineTime(t *testing.T) (m machine) {
	t.Helper()
	raw, err := os.ReadFile("/proc/stat")
	if err != nil {
		t.Fatal(err)
	}
	line, _, _ := strings.Cut(string(raw), "\n")
	const idle, iowait, guest = 3, 4, 8
	for i, field := range strings.Fields(line)[1:] {
		ticks, err := strconv.Atoi(field)
		if err != nil {
			t.Fatal(err)
		}
		spent := time.Duration(ticks) * 10 * time.Millisecond
		if i >= guest { // is in the first already
			break
		}
		m.all += spent
		if i != idle && i != iowait {
			m.busy += spent
		}
	}
	return m
}
