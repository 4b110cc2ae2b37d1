package head

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/hsm/hsmtest"
	"github.com/chancery-ca/chancery/hsm/tpm"
)

// How a victim of TestKilledAtEpoch reaches its counter, and where it dies.
const (
	victimSocket = "CHANCERY_TEST_VICTIM_TPM"
	victimKeys   = "CHANCERY_TEST_VICTIM_TPM_KEYS"
	victimAuth   = "CHANCERY_TEST_VICTIM_TPM_AUTH"
	victimDies   = "CHANCERY_TEST_VICTIM_DIES"
	counterIndex = 0x01800020
)

// victimCounter gives a victim a counter in a TPM, a new epoch for nearly each
// head, and its death.
func victimCounter(t *testing.T) func(*Config) {
	if os.Getenv(victimSocket) == "" {
		return func(*Config) {}
	}
	auth, err := hex.DecodeString(os.Getenv(victimAuth))
	if err != nil {
		t.Fatal(err)
	}
	token, err := tpm.Open(t.Context(), tpm.Config{Device: os.Getenv(victimSocket), Dir: os.Getenv(victimKeys), Auth: auth})
	if err != nil {
		t.Fatal(err)
	}
	counter, err := tpm.OpenCounter(t.Context(), token, counterIndex)
	if err != nil {
		t.Fatal(err)
	}
	return func(cfg *Config) {
		anchor, err := OpenAnchor(cfg.Anchor)
		if err != nil {
			t.Fatal(err)
		}
		d := &dying{Anchor: anchor, Counter: counter}
		if _, err := fmt.Sscanf(os.Getenv(victimDies), "%d %s", &d.after, &d.where); err != nil {
			t.Fatal(err)
		}
		cfg.AnchorStore, cfg.Counter, cfg.EpochInterval = d, d, time.Millisecond
	}
}

// dying kills the process at one step of an epoch, after some epochs.
type dying struct {
	Anchor
	Counter
	where string
	after int64
	begun atomic.Int64
	epoch uint64 // of the last record
}

func (d *dying) at(where string) {
	if where == d.where && d.begun.Load() > d.after {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}

func (d *dying) Store(r Record) error {
	begins := r.Epoch != d.epoch
	if begins {
		d.begun.Add(1)
		d.at("before-record")
	}
	err := d.Anchor.Store(r)
	d.epoch = r.Epoch
	if begins {
		d.at("after-record")
	}
	return err
}

func (d *dying) Advance(ctx context.Context) (uint64, error) {
	d.at("before-advance")
	value, err := d.Counter.Advance(ctx)
	d.at("after-advance")
	return value, err
}

// TestKilledAtEpoch kills a process at each step of an epoch, with its counter
// in a TPM. The next process goes on; every answer that was given holds; and an
// older copy of everything is refused.
func TestKilledAtEpoch(t *testing.T) {
	e := hsmtest.SWTPM(t)
	cfg := e.Config(t)
	token, err := tpm.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	counter, err := tpm.CreateCounter(t.Context(), token, counterIndex)
	if err != nil {
		t.Fatal(err)
	}
	first, err := counter.Value(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f, key := newVictims(t)
	f.bindNew(first)
	f.key = &hsmtest.Counting{Key: keyOf(t, key)}
	f.openTree()
	f.open(counted(counter)) // a new log says so, which is not for victims to do
	f.until("first epoch", func() bool { return f.heads.Stats().Advances == 1 })
	f.close()
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	t.Setenv(victimSocket, cfg.Device)
	t.Setenv(victimKeys, cfg.Dir)
	t.Setenv(victimAuth, hex.EncodeToString(cfg.Auth))
	var all []acked
	old := t.TempDir()
	for round, dies := range []string{
		"2 before-record", "0 after-record", "0 before-advance", "0 after-advance",
		"1 before-record", "3 after-record", "3 before-advance", "3 after-advance",
	} {
		t.Setenv(victimDies, dies)
		all = append(all, runVictim(t, f.dir, key, 1000+round, 1<<30)...)
		token := hsmtest.OpenTPM(t, cfg)
		counter, err := tpm.OpenCounter(t.Context(), token, counterIndex)
		if err != nil {
			t.Fatal(err)
		}
		before := f.record()
		value, err := counter.Value(t.Context())
		if err != nil || before.Epoch != value && before.Epoch != value+1 {
			t.Fatalf("%s: record of epoch %d, counter at %d, %v", dies, before.Epoch, value, err)
		}
		f.openTree()
		f.open(counted(counter))
		f.until("counter that follows", func() bool {
			value, err := counter.Value(t.Context())
			return err == nil && value == before.Epoch && f.heads.CounterErr() == nil
		})
		f.close()
		if err := token.Close(); err != nil {
			t.Fatal(err)
		}
		if round == 3 {
			b, err := os.ReadFile(f.anchor())
			if err := errors.Join(err, os.WriteFile(filepath.Join(old, "anchor"), b, 0o600), os.CopyFS(filepath.Join(old, "log"), os.DirFS(filepath.Join(f.dir, "log")))); err != nil {
				t.Fatal(err)
			}
		}
	}
	if len(all) == 0 {
		t.Fatal("no answers")
	}
	token = hsmtest.OpenTPM(t, cfg)
	if counter, err = tpm.OpenCounter(t.Context(), token, counterIndex); err != nil {
		t.Fatal(err)
	}
	f.openTree()
	f.open(counted(counter))
	for _, a := range all {
		if a.size > f.heads.Latest().Size {
			t.Fatalf("head of %d leaves was given, the anchor has %d", a.size, f.heads.Latest().Size)
		}
		if r, err := f.tree.RootAt(t.Context(), a.size); err != nil || r != a.root {
			t.Fatalf("head of %d leaves is not of this tree: %v", a.size, err)
		}
	}
	f.close()
	if err := errors.Join(os.RemoveAll(filepath.Join(f.dir, "log")), os.CopyFS(filepath.Join(f.dir, "log"), os.DirFS(filepath.Join(old, "log")))); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(old, "anchor"))
	if err := errors.Join(err, os.WriteFile(f.anchor(), b, 0o600)); err != nil {
		t.Fatal(err)
	}
	f.openTree()
	f.openAny(counted(counter))
	if err := f.heads.Err(); !errors.Is(err, ErrEpoch) {
		t.Errorf("old copy: error %v, want ErrEpoch", err)
	}
	value, err := counter.Value(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d answers, counter from %d to %d", len(all), first, value)
}

// TestEpochWithTPM: a TPM that goes away and comes back.
func TestEpochWithTPM(t *testing.T) {
	e := hsmtest.SWTPM(t)
	token := hsmtest.OpenTPM(t, e.Config(t))
	counter, err := tpm.CreateCounter(t.Context(), token, counterIndex)
	if err != nil {
		t.Fatal(err)
	}
	value := func() uint64 {
		t.Helper()
		v, err := counter.Value(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	f := newFixture(t)
	f.bindNew(value())
	f.open(counted(counter), func(c *Config) { c.EpochInterval = time.Millisecond })
	f.until("first epoch", func() bool { return f.heads.Stats().Advances == 1 })
	e.Stop(t)
	for i := range uint64(5) {
		f.add(1)
		f.verify(f.await(i + 1)) // the head key is elsewhere: heads go on
	}
	f.until("counter error", func() bool { return f.heads.CounterErr() != nil })
	e.Start(t)
	f.until("return", func() bool { return f.heads.CounterErr() == nil })
	if r, v := f.record(), value(); r.Epoch < v {
		t.Errorf("record of epoch %d, counter at %d", r.Epoch, v)
	}
	f.close()
	if r, v := f.record(), value(); r.Epoch != v {
		t.Errorf("closed in epoch %d, counter at %d", r.Epoch, v)
	}
}
