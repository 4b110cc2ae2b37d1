package audittool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/chancery-ca/chancery/ca/audit"
)

var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// begin makes an audit whose files hold only a few records each.
func begin(t *testing.T) (dir string, l *audit.Log) {
	t.Helper()
	return beginWith(t, 1<<10)
}

// beginWith makes one whose files end after so many octets.
func beginWith(t *testing.T, maxFile int64) (dir string, l *audit.Log) {
	t.Helper()
	dir = t.TempDir()
	now := func() (time.Time, error) { return noon, nil }
	if err := audit.Create(dir, now); err != nil {
		t.Fatal(err)
	}
	l, err := audit.Open(audit.Config{Dir: dir, Now: now, MaxFile: maxFile})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return dir, l
}

func write(t *testing.T, l *audit.Log, records ...audit.Record) {
	t.Helper()
	for _, r := range records {
		if err := l.Append(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
}

// issue is the two records of a certificate.
func issue(serial, san string) []audit.Record {
	return []audit.Record{
		{Type: audit.TypeAllowed, Serial: serial, SAN: san, Issuer: "https://idp.example"},
		{Type: audit.TypeIssued, Serial: serial},
	}
}

// names is what of records a test compares.
func names(records []audit.Record) (out []string) {
	for _, r := range records {
		out = append(out, fmt.Sprintf("%s %s%s", r.Type, r.Serial, r.Reason))
	}
	return out
}

func TestLast(t *testing.T) {
	dir, l := begin(t)
	for i := range 20 {
		write(t, l, issue(fmt.Sprintf("a%d", i), "alice@example.com")...)
		write(t, l, issue(fmt.Sprintf("b%d", i), "bob@example.com")...)
	}
	write(t, l, audit.Record{Type: audit.TypeRefused, SAN: "bob@example.com", Issuer: "https://other.example", Reason: "no"})
	if files, err := audit.Files(dir); err != nil || len(files) < 5 {
		t.Fatalf("%d files, %v: this would show nothing", len(files), err)
	}
	tests := []struct {
		name   string
		n      int
		filter Filter
		want   []string
	}{
		{"none", 0, Filter{}, nil},
		{"the newest", 2, Filter{}, []string{"issued b19", "refused no"}},
		{"of an identity", 3, Filter{Identity: "bob@example.com"}, []string{"allowed b19", "issued b19", "refused no"}},
		{"of an issuer", 9, Filter{Issuer: "https://other.example"}, []string{"refused no"}},
		{"of a type", 2, Filter{Type: audit.TypeAllowed}, []string{"allowed a19", "allowed b19"}},
		{"of an identity and a type", 2, Filter{Type: audit.TypeAllowed, Identity: "alice@example.com"}, []string{"allowed a18", "allowed a19"}},
		{"of a serial, in the first file", 9, Filter{Serial: "00A0"}, []string{"allowed a0", "issued a0"}},
		{"of nobody", 9, Filter{Identity: "carol@example.com"}, nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, _, err := Last(dir, test.n, test.filter)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(test.want, names(got)); d != "" {
				t.Error(d)
			}
		})
	}
	if all, _, err := Last(dir, 1000, Filter{Serial: ""}); err != nil || len(all) < 81 {
		t.Errorf("%d records, %v", len(all), err)
	}
}

// TestFollow: what is appended comes once and in order, over new files.
func TestFollow(t *testing.T) {
	dir, l := begin(t)
	write(t, l, issue("old", "alice@example.com")...)
	_, tail, err := Last(dir, 0, Filter{Identity: "alice@example.com"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithTimeout(t.Context(), 5*time.Minute)
	defer stop()
	var want, got []string
	for i := range 30 {
		write(t, l, issue(fmt.Sprint(i), "alice@example.com")...)
		write(t, l, issue(fmt.Sprint("b", i), "bob@example.com")...)
		want = append(want, names(issue(fmt.Sprint(i), ""))...)
		if i%10 == 0 {
			if err := tail.next(func(r audit.Record) error { got = append(got, names([]audit.Record{r})...); return nil }); err != nil {
				t.Fatal(err)
			}
		}
	}
	err = tail.Follow(ctx, func(r audit.Record) error {
		if got = append(got, names([]audit.Record{r})...); len(got) == len(want) {
			stop()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// TestNewFileBetween: a certificate that was allowed in one file and released in
// another is shown with both, read and followed.
func TestNewFileBetween(t *testing.T) {
	dir, l := beginWith(t, 1) // a file for each record
	alice, bob := Filter{Identity: "alice@example.com"}, Filter{Issuer: "https://idp.example", Type: audit.TypeIssued}
	var want, wantIssued []string
	for i := range 8 {
		a, b := issue(fmt.Sprint("a", i), "alice@example.com"), issue(fmt.Sprint("b", i), "bob@example.com")
		write(t, l, a[0], b[0], b[1], a[1])
		want = append(want, names(a)...)
		wantIssued = append(wantIssued, names([]audit.Record{b[1], a[1]})...)
	}
	open := issue("late", "alice@example.com")
	write(t, l, open[0])
	want = append(want, "allowed late")
	write(t, l, audit.Record{Type: audit.TypeRefused, Reason: "no"})
	if files, err := audit.Files(dir); err != nil || len(files) < 30 {
		t.Fatalf("%d files, %v: this would show nothing", len(files), err)
	}
	for _, n := range []int{1, 2, 3, 7, 100} {
		got, _, err := Last(dir, n, alice)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want[max(0, len(want)-n):], names(got)); d != "" {
			t.Errorf("the newest %d: %s", n, d)
		}
	}
	got, tail, err := Last(dir, 100, bob)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(wantIssued, names(got)); d != "" {
		t.Error(d)
	}
	write(t, l, open[1])
	var followed []string
	if err := tail.next(func(r audit.Record) error { followed = append(followed, names([]audit.Record{r})...); return nil }); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"issued late"}, followed); d != "" {
		t.Errorf("followed: %s", d)
	}
}

// TestDamaged: what is no audit is said to be none; a line that is being
// written is not there yet.
func TestDamaged(t *testing.T) {
	dir, l := begin(t)
	write(t, l, issue("1", "alice@example.com")...)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	files, err := audit.Files(dir)
	if err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{
		"not a record":     append(good[:len(good):len(good)], "{}\n"...),
		"an endless line":  append(good[:len(good):len(good)], make([]byte, 2*maxLine)...),
		"a changed record": append([]byte("x"), good[1:]...),
	} {
		if err := os.WriteFile(files[0], text, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := Last(dir, 9, Filter{}); !errors.Is(err, audit.ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.WriteFile(files[0], good[:len(good)-5], 0o600); err != nil {
		t.Fatal(err)
	}
	if got, _, err := Last(dir, 9, Filter{}); err != nil || len(got) != 2 {
		t.Errorf("an unfinished line: %v, %v", names(got), err)
	}
	for _, none := range []string{t.TempDir(), filepath.Join(dir, "missing")} {
		if _, _, err := Last(none, 9, Filter{}); !errors.Is(err, audit.ErrNotFound) {
			t.Errorf("%s: %v", none, err)
		}
	}
}

// TestForgets: what was allowed long ago and never released takes no room.
func TestForgets(t *testing.T) {
	var s serials
	for i := range 2 * maxOpen {
		s.add(fmt.Sprint(i))
	}
	if len(s.list) != maxOpen || s.take("0") || !s.take(fmt.Sprint(2*maxOpen-1)) || s.take(fmt.Sprint(2*maxOpen-1)) {
		t.Errorf("%d remembered", len(s.list))
	}
}
