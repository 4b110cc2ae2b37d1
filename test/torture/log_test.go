// Package torture breaks the whole log engine (log/store, log/tree, log/head
// with a software key) from outside and looks at what is left. It has tests
// only; each runs in a short form with `go test` and in a long one with `make
// torture`.
//
//   - kill_test.go: a process that works is killed at its n-th write, sync,
//     truncation or removal, or gets EIO, ENOSPC or EROFS there.
//   - powercut_test.go: the system calls of a process are recorded; the disk
//     is put together as a power cut may leave it at any of them, with what
//     was not synced kept, lost, torn and out of order.
//   - refuse_test.go: bits flipped in each table, a file system that is read-only,
//     a clock that is wrong when the log is opened.
//
// After each the log is opened and everything that was said must hold (see
// examine). What needs no second process is tested beside the code: torn and
// flipped anchors, forks, older copies, clocks and bad signers in log/head,
// flipped bits in files and tiles in log/store and log/tree.
package torture

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"

	"github.com/chancery-ca/chancery/hsm"
	"github.com/chancery-ca/chancery/log/head"
	"github.com/chancery-ca/chancery/log/store"
	"github.com/chancery-ca/chancery/log/tree"
)

// origin is that of every log here.
const origin = "torture.example"

// signed is one head that the key signed, published or not.
type signed struct {
	size uint64
	root tree.Hash
	ms   int64 // time of the head
}

// answer is what a client was told: a leaf, and a published head with it.
type answer struct {
	index uint64
	leaf  tree.Hash
	size  uint64
	root  tree.Hash
}

func (s signed) String() string { return fmt.Sprintf("signed %d %x %d", s.size, s.root, s.ms) }

func (a answer) String() string {
	return fmt.Sprintf("answer %d %x %d %x", a.index, a.leaf, a.size, a.root)
}

// said is everything that left a log, in order.
type said struct {
	signed  []signed
	answers []answer
	failed  int // clients that were told no
}

// read adds one line. A line that is cut off was not said.
func (s *said) read(line string) error {
	var a answer
	var g signed
	var leaf, root string
	var err error
	switch kind, _, _ := strings.Cut(line, " "); kind {
	case "signed":
		if _, err = fmt.Sscanf(line, "signed %d %s %d", &g.size, &root, &g.ms); err == nil {
			g.root, err = parseHash(root)
			s.signed = append(s.signed, g)
		}
	case "answer":
		if _, err = fmt.Sscanf(line, "answer %d %s %d %s", &a.index, &leaf, &a.size, &root); err == nil {
			var err1, err2 error
			a.leaf, err1 = parseHash(leaf)
			a.root, err2 = parseHash(root)
			err = errors.Join(err1, err2)
			s.answers = append(s.answers, a)
		}
	case "failed":
		s.failed++
	default:
		err = errors.New("neither an answer nor a head")
	}
	if err != nil {
		return fmt.Errorf("%q: %w", line, err)
	}
	return nil
}

// readAll adds whole lines.
func (s *said) readAll(b []byte) error {
	for {
		line, rest, whole := bytes.Cut(b, []byte("\n"))
		if !whole {
			return nil
		}
		if err := s.read(string(line)); err != nil {
			return err
		}
		b = rest
	}
}

func parseHash(s string) (tree.Hash, error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != tree.HashSize {
		return tree.Hash{}, fmt.Errorf("hash %q: %v", s, err)
	}
	return tree.Hash(b), nil
}

// oracle is the head key and the format of heads in one. It writes every head
// down before its signature leaves, and signs nothing that is not a head.
type oracle struct {
	*ecdsa.PrivateKey
	record io.Writer

	mu    sync.Mutex
	heads map[[sha256.Size]byte]head.Head
}

var (
	_ hsm.Key     = (*oracle)(nil)
	_ head.Format = (*oracle)(nil)
)

func newOracle(pkcs8 string, record io.Writer) (*oracle, error) {
	der, err := hex.DecodeString(pkcs8)
	if err != nil {
		return nil, err
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, err
	}
	return &oracle{PrivateKey: key.(*ecdsa.PrivateKey), record: record, heads: map[[sha256.Size]byte]head.Head{}}, nil
}

// newKey returns a P-256 key as newOracle reads it.
func newKey(t testing.TB) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(der)
}

// Message implements head.Format: a C2SP checkpoint with the time below it.
func (o *oracle) Message(h head.Head) ([]byte, error) {
	msg := fmt.Appendf(nil, "%s\n%d\n%s\n%d\n", origin, h.Size, base64.StdEncoding.EncodeToString(h.Root[:]), h.Time.UnixMilli())
	o.mu.Lock()
	defer o.mu.Unlock()
	o.heads[sha256.Sum256(msg)] = h
	return msg, nil
}

// Note implements head.Format.
func (o *oracle) Note(h head.Head, sig []byte) ([]byte, error) {
	msg, err := o.Message(h)
	return fmt.Appendf(msg, "\n— %s %s\n", origin, base64.StdEncoding.EncodeToString(sig)), err
}

// Ref implements hsm.Key.
func (*oracle) Ref() hsm.Ref { return hsm.Ref{} }

// SignContext implements hsm.Key.
func (o *oracle) SignContext(_ context.Context, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	o.mu.Lock()
	h, ok := o.heads[[sha256.Size]byte(digest)]
	o.mu.Unlock()
	if !ok {
		return nil, errors.New("asked to sign what is no head")
	}
	if _, err := fmt.Fprintln(o.record, signed{h.Size, h.Root, h.Time.UnixMilli()}); err != nil {
		return nil, err
	}
	return o.Sign(crand.Reader, digest, opts)
}

// victim is a whole log in one directory.
type victim struct {
	engine *tree.Engine
	tree   tree.Tree
	heads  *head.Publisher
}

// create makes the log in dir, as an operator does, once.
func create(t testing.TB, dir string) {
	t.Helper()
	if err := os.Mkdir(filepath.Join(dir, "log"), 0o700); err != nil {
		t.Fatal(err)
	}
	e, err := tree.Open(t.Context(), engineConfig(dir))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(e.Create(t.Context(), "log"), e.Close(t.Context()), head.CreateAnchor(filepath.Join(dir, "anchor"))); err != nil {
		t.Fatal(err)
	}
}

func engineConfig(dir string) tree.Config {
	return tree.Config{
		Dir: filepath.Join(dir, "log"), MaxBackoff: 20 * time.Millisecond,
		Now:    func() (time.Time, error) { return time.Now(), nil },
		Logger: slog.New(slog.DiscardHandler),
	}
}

// open opens the log in dir.
func open(ctx context.Context, dir string, key *oracle) (*victim, error) {
	return openAt(ctx, dir, key, 0)
}

// openAt opens the log in dir with a clock that is fast by so much.
func openAt(ctx context.Context, dir string, key *oracle, fast time.Duration) (*victim, error) {
	cfg := engineConfig(dir)
	cfg.Now = func() (time.Time, error) { return time.Now().Add(fast), nil }
	e, err := tree.Open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	v := &victim{engine: e}
	if v.tree, err = e.Tree(ctx, "log"); err != nil {
		return nil, errors.Join(err, e.Close(ctx))
	}
	v.heads, err = head.Open(ctx, head.Config{
		Tree: v.tree, Key: key, Format: key, Anchor: filepath.Join(dir, "anchor"),
		Now: cfg.Now, MaxBackoff: cfg.MaxBackoff, Logger: cfg.Logger,
	})
	if err != nil {
		return nil, errors.Join(err, e.Close(ctx))
	}
	return v, nil
}

func (v *victim) close(ctx context.Context) error {
	return errors.Join(v.heads.Close(ctx), v.engine.Close(ctx))
}

// append is what a client does: append, await a head, and believe neither.
func (v *victim) append(ctx context.Context, leaf tree.Leaf) (answer, error) {
	e, _, err := v.tree.Append(ctx, leaf)
	if err != nil {
		return answer{}, err
	}
	s, err := v.heads.Await(ctx, e.Index+1)
	if err != nil {
		return answer{}, err
	}
	a := answer{e.Index, tree.LeafHash(leaf.Value), s.Size, s.Root}
	path, err := v.tree.InclusionProof(ctx, a.index, a.size)
	if err != nil {
		return answer{}, err
	}
	return a, included(a, a.size, a.root, path)
}

// included checks the proof that the leaf of a is in a head.
func included(a answer, size uint64, root tree.Hash, path []tree.Hash) error {
	return proof.VerifyInclusion(rfc6962.DefaultHasher, a.index, size, a.leaf[:], octets(path), root[:])
}

func octets(path []tree.Hash) [][]byte {
	out := make([][]byte, len(path))
	for i := range path {
		out[i] = path[i][:]
	}
	return out
}

// examine opens the log in dir, which something has happened to, and checks
// everything that it said before: every leaf is there and provable in a new
// head, every head that was signed is consistent with the new one, no two of
// one size have two roots. Then it closes the log. The new head is its own
// affair: it is not added to what was said.
func examine(t testing.TB, dir, pkcs8 string, all said) {
	t.Helper()
	var mine bytes.Buffer
	key, err := newOracle(pkcs8, &mine)
	if err != nil {
		t.Fatal(err)
	}
	v, err := open(t.Context(), dir, key)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	a, err := v.append(t.Context(), tree.Leaf{Value: fmt.Append(nil, "examined ", rand.Uint64())})
	if err != nil {
		t.Fatalf("append: %v", err)
	}
	if err := all.readAll(mine.Bytes()); err != nil {
		t.Fatal(err)
	}
	all.answers = append(all.answers, a)
	now := v.heads.Latest()
	if err := all.holdsIn(t.Context(), v.tree, now); err != nil {
		t.Fatal(err)
	}
	if err := v.close(t.Context()); err != nil {
		t.Fatalf("close: %v", err)
	}
}

// holdsIn checks everything that was said against the log under a head.
func (s *said) holdsIn(ctx context.Context, tr tree.Tree, now head.Signed) error {
	leaves := make([]tree.Hash, 0, now.Size)
	for uint64(len(leaves)) < now.Size {
		entries, err := tr.Entries(ctx, uint64(len(leaves)), now.Size)
		if err != nil {
			return fmt.Errorf("read entries: %w", err)
		}
		for _, e := range entries {
			leaves = append(leaves, tree.LeafHash(e.Value))
		}
	}
	for _, a := range s.answers {
		if a.index >= now.Size || leaves[a.index] != a.leaf {
			return fmt.Errorf("lost: %v, head has %d leaves", a, now.Size)
		}
		path, err := tr.InclusionProof(ctx, a.index, now.Size)
		if err == nil {
			err = included(a, now.Size, now.Root, path)
		}
		if err != nil {
			return fmt.Errorf("%v: %w", a, err)
		}
	}
	return s.oneHistory(ctx, tr, now)
}

// oneHistory checks that all heads are of one log that only grew.
func (s *said) oneHistory(ctx context.Context, tr tree.Tree, now head.Signed) error {
	heads := map[uint64]tree.Hash{}
	add := func(size uint64, root tree.Hash) error {
		if r, ok := heads[size]; ok && r != root {
			return fmt.Errorf("two roots of %d leaves", size)
		}
		heads[size] = root
		return nil
	}
	var last signed
	for _, g := range s.signed {
		if g.size < last.size || g.ms < last.ms {
			return fmt.Errorf("%v after %v", g, last)
		}
		last = g
		if err := add(g.size, g.root); err != nil {
			return err
		}
	}
	for _, a := range s.answers {
		if err := add(a.size, a.root); err != nil {
			return err
		}
	}
	for size, root := range heads {
		if size > now.Size {
			return fmt.Errorf("a head of %d leaves was signed, now there are %d", size, now.Size)
		}
		path, err := tr.ConsistencyProof(ctx, size, now.Size)
		if err == nil {
			err = proof.VerifyConsistency(rfc6962.DefaultHasher, size, now.Size, octets(path), root[:], now.Root[:])
		}
		if err != nil {
			return fmt.Errorf("heads of %d and %d leaves: %w", size, now.Size, err)
		}
	}
	return nil
}

// What the test binary does as a child, see TestMain.
const (
	childDir   = "CHANCERY_TORTURE_CHILD"
	childKey   = "CHANCERY_TORTURE_KEY"
	childQuota = "CHANCERY_TORTURE_QUOTA"
)

// TestMain lets the test binary be its own victim.
func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		if err := child(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// clients is how many work at once in a child.
const clients = 8

// child works on the log in dir until it has given CHANCERY_TORTURE_QUOTA
// answers, and closes it. It writes each answer, and each time that there was
// none, to stdout and each head that is signed to the file "signed", with one
// write each. Every error must be one that the packages name.
func child(dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute) // ends a hang
	defer cancel()
	quota, err := strconv.Atoi(os.Getenv(childQuota))
	if err != nil {
		return err
	}
	record, err := os.OpenFile(filepath.Join(dir, "signed"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	key, err := newOracle(os.Getenv(childKey), record)
	if err != nil {
		return err
	}
	v, err := open(ctx, dir, key)
	if err != nil {
		return fmt.Errorf("refused: %w", err)
	}
	var given, failures atomic.Int64
	var unclear atomic.Pointer[error]
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for given.Load() < int64(quota) && failures.Load() < 3*clients {
				a, err := v.append(ctx, newLeaf())
				switch {
				case err == nil:
					fmt.Println(a)
					given.Add(1)
				case clear(err):
					fmt.Println("failed", err)
					failures.Add(1)
				default:
					unclear.Store(&err)
					return
				}
			}
		})
	}
	wg.Wait()
	err = v.close(ctx)
	if p := unclear.Load(); p != nil {
		return fmt.Errorf("unclear: %w", *p)
	}
	return err
}

// newLeaf returns a leaf of up to 2 KiB; one in four has an identity of its own
// and extra data.
func newLeaf() tree.Leaf {
	leaf := tree.Leaf{Value: make([]byte, 16+rand.IntN(2048))}
	if _, err := crand.Read(leaf.Value); err != nil {
		panic(err)
	}
	if leaf.Value[0]%4 == 0 {
		leaf.Identity = sha256.Sum256(leaf.Value[1:])
		leaf.Extra = leaf.Value[:16]
	}
	return leaf
}

// clear reports whether err says what is wrong by a name.
func clear(err error) bool {
	for _, known := range []error{
		tree.ErrStorage, tree.ErrCorrupt, tree.ErrClosed, tree.ErrBusy,
		head.ErrUnavailable, head.ErrAnchor, head.ErrClosed, store.ErrFailed,
	} {
		if errors.Is(err, known) {
			return true
		}
	}
	return false
}

// long returns how often a fault is repeated: few times, or as often as
// CHANCERY_TORTURE_POINTS says, of which the fault has a share in percent.
func long(few, share int) int {
	if n, err := strconv.Atoi(os.Getenv("CHANCERY_TORTURE_POINTS")); err == nil {
		return max(few, n*share/100)
	}
	return few
}

// copyLog copies what a machine has after its processes are gone: no locks and
// no shared memory.
func copyLog(t testing.TB, from, to string) {
	t.Helper()
	for _, name := range []string{"anchor", "log"} {
		if err := copyPath(filepath.Join(from, name), filepath.Join(to, name)); err != nil {
			t.Fatal(err)
		}
	}
}

func copyPath(from, to string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		b, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		return os.WriteFile(to, b, 0o600)
	}
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	names, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, n := range names {
		if passing(n.Name()) {
			continue
		}
		if err := copyPath(filepath.Join(from, n.Name()), filepath.Join(to, n.Name())); err != nil {
			return err
		}
	}
	return nil
}

// passing reports whether a file means nothing without its process.
func passing(name string) bool { return name == "LOCK" || strings.HasSuffix(name, "-shm") }
