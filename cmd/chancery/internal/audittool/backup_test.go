package audittool

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/chancery-ca/chancery/ca/audit"
)

// stamps is a sealer whose seals are what they are over.
type stamps struct{}

func (stamps) Timestamp(_ context.Context, digest [sha256.Size]byte) ([]byte, error) {
	return digest[:], nil
}

func checkStamp(seal, line []byte) error {
	if digest := sha256.Sum256(line); string(seal) != string(digest[:]) {
		return errors.New("seal of another line")
	}
	return nil
}

// verifyAt is audit.Verify with the seals beside the audit.
func verifyAt(dir string) (audit.Report, error) {
	text, err := os.ReadFile(filepath.Join(dir, audit.SealsName))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return audit.Report{}, err
	}
	seals, err := audit.ReadSeals(text)
	if err != nil {
		return audit.Report{}, err
	}
	return audit.Verify(dir, checkStamp, seals, nil)
}

// backup copies an audit and returns what verifying the copy found.
func backup(dir, to string) (report audit.Report, err error) {
	err = Backup(dir, to, func(dir string) (err error) {
		report, err = verifyAt(dir)
		return err
	})
	return report, err
}

// TestBackupBesideTheWriter: copies that are made while records, new files and
// seals come are audits each, and the last has all.
func TestBackupBesideTheWriter(t *testing.T) {
	dir, parent := t.TempDir(), t.TempDir()
	now := func() (time.Time, error) { return noon, nil }
	if err := audit.Create(dir, now); err != nil {
		t.Fatal(err)
	}
	l, err := audit.Open(audit.Config{Dir: dir, Now: now, MaxFile: 4 << 10, Sealer: stamps{}, SealEvery: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	// Each copy lets the writers go on by so much: writers that are faster than
	// copies would otherwise make each copy longer than the one before.
	const each = 200
	turns := make(chan struct{}, each)
	var writers sync.WaitGroup
	for n := range 4 {
		writers.Go(func() {
			i := 0
			for range turns {
				i++
				for _, r := range issue(fmt.Sprintf("%d-%d", n, i), "alice@example.com") {
					if err := l.Append(context.Background(), r); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	var last audit.Report
	rounds, deadline := 0, time.Now().Add(5*time.Minute)
	for ; rounds < 10 || last.Files < 3 || last.Seals == 0; rounds++ {
		if time.Now().After(deadline) {
			t.Fatalf("after %d copies %+v: this would show nothing", rounds, last)
		}
		for range each - len(turns) {
			turns <- struct{}{}
		}
		got, err := backup(dir, filepath.Join(parent, fmt.Sprint(rounds)))
		if err != nil {
			t.Fatal(err)
		}
		if got.Records < last.Records || got.Unfinished != 0 {
			t.Errorf("copy %d: %+v after %+v", rounds, got, last)
		}
		last = got
	}
	close(turns)
	writers.Wait()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	want, err := verifyAt(dir)
	if err != nil {
		t.Fatal(err)
	}
	saved := filepath.Join(parent, "saved")
	if got, err := backup(dir, saved); err != nil || got != want {
		t.Errorf("the copy has %+v, %v; the audit %+v", got, err, want)
	}

	// The copy goes on as an audit where the first was.
	again, err := audit.Open(audit.Config{Dir: saved, Now: now})
	if err != nil {
		t.Fatal(err)
	}
	write(t, again, issue("more", "alice@example.com")...)
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := verifyAt(saved); err != nil || got.Records != want.Records+2 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestBackupRefusals(t *testing.T) {
	dir, l := begin(t)
	write(t, l, issue("1", "alice@example.com")...)
	parent := t.TempDir()
	to := filepath.Join(parent, "saved")
	refused := errors.New("refused")
	sound := func(string) error { return nil }
	for name, test := range map[string]struct {
		dir    string
		verify func(string) error
		want   error
	}{
		"no audit":                      {t.TempDir(), sound, audit.ErrNotFound},
		"a copy that does not verify":   {dir, func(string) error { return refused }, refused},
		"a line that no writer can end": {endless(t), sound, audit.ErrDamaged},
	} {
		if err := Backup(test.dir, to, test.verify); !errors.Is(err, test.want) {
			t.Errorf("%s: %v", name, err)
		}
		if left, err := os.ReadDir(parent); err != nil || len(left) != 0 {
			t.Errorf("%s: left %v, %v", name, left, err)
		}
	}
	if _, err := backup(dir, to); err != nil {
		t.Fatal(err)
	}
	if _, err := backup(dir, to); !errors.Is(err, os.ErrExist) {
		t.Errorf("over another: %v", err)
	}
}

// endless is the folder of an audit with a line that is too long.
func endless(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "audit-00000000000000000000.jsonl"), make([]byte, 2*maxLine), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}
